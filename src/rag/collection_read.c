/* rag/collection_read.c: the primer, and which chunks are prefilled. */
#include "base/alloc.h"
#include "rag/collection_parts.h"

#include <string.h>

/* About 700 tokens in three documents: from there on more brought nothing that was resolved. */
enum { PRIMER_CHUNKS = 3, PRIMER_TOKENS_MAX = 700 };

/* ---- primer ---- */

/* Chunks in an order that looks random and is the same every time, of different documents first. */
static kvl_status choose_primer(kvl_collection *c, char **primer, kvl_error *error)
{
    static const char which[] =
        "SELECT text, guess FROM (SELECT c.text AS text, c.guess AS guess, c.digest AS digest,"
        " min(p.document) AS document FROM chunks c JOIN places p ON p.chunk = c.number"
        " GROUP BY c.number) GROUP BY document HAVING digest = min(digest)"
        " ORDER BY abs(guess - ?1) / 64, digest LIMIT ?2";
    sqlite3_stmt *s = NULL;
    KVL_TRY(kvl_collection_prepare(c, which, &s, error));
    (void)sqlite3_bind_int64(s, 1, PRIMER_TOKENS_MAX / PRIMER_CHUNKS);
    (void)sqlite3_bind_int64(s, 2, PRIMER_CHUNKS);
    size_t n = 0;
    int64_t n_tokens = 0;
    bool found = false;
    kvl_status status = kvl_collection_step(c, s, &found, error);
    while (status == KVL_OK && found) {
        const size_t n_text = (size_t)sqlite3_column_bytes(s, 0);
        n_tokens += sqlite3_column_int64(s, 1);
        if (n > 0 && n_tokens > PRIMER_TOKENS_MAX * 3 / 2) break;
        char *grown = kvl_realloc(*primer, n + n_text + 3);
        if (grown == NULL) {
            status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a primer");
            break;
        }
        *primer = grown;
        memcpy(grown + n, sqlite3_column_text(s, 0), n_text);
        memcpy(grown + n + n_text, "\n\n", 3);
        n += n_text + 2;
        status = kvl_collection_step(c, s, &found, error);
    }
    (void)sqlite3_finalize(s);
    return status;
}

kvl_status kvl_collection_primer(kvl_collection *collection, const char **primer, kvl_error *error)
{
    *primer = "";
    if (collection->primer == NULL) {
        char *text = NULL;
        KVL_TRY(kvl_collection_get_about(collection, "primer", &text, error));
        if (text == NULL) {
            kvl_status status = choose_primer(collection, &text, error);
            if (status == KVL_OK && text != NULL)
                status = kvl_collection_set_about(collection, "primer", text, error);
            if (status != KVL_OK) {
                kvl_free(text);
                return status;
            }
        }
        collection->primer = text;
    }
    if (collection->primer != NULL) *primer = collection->primer;
    return KVL_OK;
}

/* ---- marks ---- */

kvl_status kvl_collection_next_unread(kvl_collection *collection, const char *model, int64_t after,
                                      kvl_collection_chunk *chunk, bool *found, kvl_error *error)
{
    static const char which[] =
        "SELECT number, text FROM chunks WHERE number > ?1 AND NOT EXISTS"
        " (SELECT 1 FROM reads WHERE chunk = chunks.number AND model = ?2) ORDER BY number LIMIT 1";
    *found = false;
    (void)sqlite3_finalize(collection->unread);
    collection->unread = NULL;
    KVL_TRY(kvl_collection_prepare(collection, which, &collection->unread, error));
    sqlite3_stmt *s = collection->unread;
    (void)sqlite3_bind_int64(s, 1, after);
    (void)sqlite3_bind_text(s, 2, model, -1, SQLITE_TRANSIENT);
    KVL_TRY(kvl_collection_step(collection, s, found, error));
    if (!*found) return KVL_OK;
    chunk->number = sqlite3_column_int64(s, 0);
    chunk->text = (const char *)sqlite3_column_text(s, 1);
    chunk->n_bytes = (size_t)sqlite3_column_bytes(s, 1);
    return KVL_OK;
}

static kvl_status mark(kvl_collection *c, const char *model, const int64_t *numbers,
                       const kvl_digest *segments, size_t n, kvl_error *error)
{
    for (size_t i = 0; i < n; i++) {
        sqlite3_stmt *s = NULL;
        KVL_TRY(kvl_collection_prepare(c,
                                       "INSERT OR REPLACE INTO reads SELECT ?1, ?2, ?3 WHERE EXISTS"
                                       " (SELECT 1 FROM chunks WHERE number = ?1)",
                                       &s, error));
        (void)sqlite3_bind_int64(s, 1, numbers[i]);
        (void)sqlite3_bind_text(s, 2, model, -1, SQLITE_STATIC);
        (void)sqlite3_bind_blob(s, 3, segments[i].bytes, KVL_DIGEST_BYTES, SQLITE_STATIC);
        KVL_TRY(kvl_collection_finish(c, s, error));
        /* The same text may have been an orphan's. */
        KVL_TRY(kvl_collection_prepare(c, "DELETE FROM orphans WHERE model = ?1 AND segment = ?2",
                                       &s, error));
        (void)sqlite3_bind_text(s, 1, model, -1, SQLITE_STATIC);
        (void)sqlite3_bind_blob(s, 2, segments[i].bytes, KVL_DIGEST_BYTES, SQLITE_STATIC);
        KVL_TRY(kvl_collection_finish(c, s, error));
    }
    return KVL_OK;
}

kvl_status kvl_collection_mark_read(kvl_collection *collection, const char *model,
                                    const int64_t *numbers, const kvl_digest *segments, size_t n,
                                    kvl_error *error)
{
    (void)sqlite3_finalize(collection->unread);
    collection->unread = NULL;
    KVL_TRY(kvl_collection_execute(collection, "BEGIN IMMEDIATE", error));
    return kvl_collection_end(collection, mark(collection, model, numbers, segments, n, error),
                              error);
}

kvl_status kvl_collection_list_orphans(kvl_collection *collection, const char *model, size_t n_max,
                                       kvl_digest *segments, size_t *n, kvl_error *error)
{
    *n = 0;
    sqlite3_stmt *s = NULL;
    KVL_TRY(kvl_collection_prepare(
        collection, "SELECT segment FROM orphans WHERE model = ?1 LIMIT ?2", &s, error));
    (void)sqlite3_bind_text(s, 1, model, -1, SQLITE_STATIC);
    (void)sqlite3_bind_int64(s, 2, (int64_t)n_max);
    bool found = false;
    kvl_status status = kvl_collection_step(collection, s, &found, error);
    while (status == KVL_OK && found) {
        if (sqlite3_column_bytes(s, 0) == KVL_DIGEST_BYTES)
            memcpy(segments[(*n)++].bytes, sqlite3_column_blob(s, 0), KVL_DIGEST_BYTES);
        status = kvl_collection_step(collection, s, &found, error);
    }
    (void)sqlite3_finalize(s);
    return status;
}

kvl_status kvl_collection_drop_orphans(kvl_collection *collection, const char *model,
                                       const kvl_digest *segments, size_t n, kvl_error *error)
{
    KVL_TRY(kvl_collection_execute(collection, "BEGIN IMMEDIATE", error));
    kvl_status status = KVL_OK;
    for (size_t i = 0; i < n && status == KVL_OK; i++) {
        sqlite3_stmt *s = NULL;
        status = kvl_collection_prepare(
            collection, "DELETE FROM orphans WHERE model = ?1 AND segment = ?2", &s, error);
        if (status != KVL_OK) break;
        (void)sqlite3_bind_text(s, 1, model, -1, SQLITE_STATIC);
        (void)sqlite3_bind_blob(s, 2, segments[i].bytes, KVL_DIGEST_BYTES, SQLITE_STATIC);
        status = kvl_collection_finish(collection, s, error);
    }
    return kvl_collection_end(collection, status, error);
}

kvl_status kvl_collection_reset(kvl_collection *collection, kvl_error *error)
{
    (void)sqlite3_finalize(collection->unread);
    collection->unread = NULL;
    kvl_free(collection->primer);
    collection->primer = NULL;
    KVL_TRY(kvl_collection_execute(collection, "BEGIN IMMEDIATE", error));
    return kvl_collection_end(
        collection,
        kvl_collection_execute(collection,
                               "INSERT OR IGNORE INTO orphans SELECT model, segment FROM reads;"
                               "DELETE FROM reads; DELETE FROM about WHERE name = 'primer'",
                               error),
        error);
}

kvl_status kvl_collection_get_stats(kvl_collection *collection, const char *model,
                                    kvl_collection_stats *stats, kvl_error *error)
{
    static const char which[] =
        "SELECT (SELECT count(*) FROM documents), count(*), coalesce(sum(length(text)), 0),"
        " count(*) - (SELECT count(*) FROM reads WHERE model = ?1) FROM chunks";
    *stats = (kvl_collection_stats){.n_chunk_tokens = collection->n_chunk_tokens};
    sqlite3_stmt *s = NULL;
    bool found = false;
    KVL_TRY(kvl_collection_prepare(collection, which, &s, error));
    (void)sqlite3_bind_text(s, 1, model, -1, SQLITE_STATIC);
    const kvl_status status = kvl_collection_step(collection, s, &found, error);
    if (found) {
        stats->n_documents = (uint64_t)sqlite3_column_int64(s, 0);
        stats->n_chunks = (uint64_t)sqlite3_column_int64(s, 1);
        stats->n_bytes = (uint64_t)sqlite3_column_int64(s, 2);
        stats->n_unread = (uint64_t)sqlite3_column_int64(s, 3);
    }
    (void)sqlite3_finalize(s);
    return status;
}
