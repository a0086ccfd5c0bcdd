/* rag/collection.c: the database, and documents in it. */
#include "rag/collection_parts.h"

#include "base/alloc.h"
#include "base/file.h"
#include "rag/split.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* KVL: who made this file, for SQLite's header. */
#define APPLICATION_ID "0x4b564c52"
enum { BUSY_TIMEOUT_MS = 2000 };

static const char schema[] =
    "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;"
    "CREATE TABLE documents (number INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT UNIQUE NOT NULL,"
    " digest BLOB NOT NULL, pass INTEGER NOT NULL);"
    "CREATE TABLE chunks (number INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB UNIQUE NOT NULL,"
    " text TEXT NOT NULL, guess INTEGER NOT NULL);"
    "CREATE TABLE places (document INTEGER NOT NULL, place INTEGER NOT NULL, chunk INTEGER NOT "
    "NULL,"
    " PRIMARY KEY (document, place)) WITHOUT ROWID;"
    "CREATE INDEX places_of_chunk ON places (chunk);"
    "CREATE TABLE reads (chunk INTEGER NOT NULL, model TEXT NOT NULL, segment BLOB NOT NULL,"
    " PRIMARY KEY (chunk, model)) WITHOUT ROWID;"
    "CREATE TABLE orphans (model TEXT NOT NULL, segment BLOB NOT NULL,"
    " PRIMARY KEY (model, segment)) WITHOUT ROWID;"
    "CREATE VIRTUAL TABLE words USING fts5 (text, content='chunks', content_rowid='number',"
    " tokenize='porter unicode61');"
    "PRAGMA application_id = " APPLICATION_ID ";"
    "PRAGMA user_version = 1;";

kvl_status kvl_collection_fail(kvl_collection *c, int code, const char *doing, kvl_error *error)
{
    const char *reason = c->db == NULL ? sqlite3_errstr(code) : sqlite3_errmsg(c->db);
    switch (code & 0xff) {
    case SQLITE_NOMEM:
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "collection: no memory to %s", doing);
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
        return KVL_FAIL(error, KVL_ERR_BUSY,
                        "collection: another process writes to it; cannot %s, try again", doing);
    case SQLITE_CORRUPT:
        return KVL_FAIL(error, KVL_ERR_CORRUPT,
                        "collection: index.db is damaged (%s); remove it and ingest again", reason);
    case SQLITE_NOTADB:
        return KVL_FAIL(error, KVL_ERR_FOREIGN,
                        "collection: index.db is no database; it is of another program");
    default: return KVL_FAIL(error, KVL_ERR_IO, "collection: cannot %s: %s", doing, reason);
    }
}

kvl_status kvl_collection_prepare(kvl_collection *c, const char *sql, sqlite3_stmt **statement,
                                  kvl_error *error)
{
    const int code = sqlite3_prepare_v2(c->db, sql, -1, statement, NULL);
    return code == SQLITE_OK ? KVL_OK : kvl_collection_fail(c, code, "prepare", error);
}

kvl_status kvl_collection_step(kvl_collection *c, sqlite3_stmt *statement, bool *found,
                               kvl_error *error)
{
    const int code = sqlite3_step(statement);
    *found = code == SQLITE_ROW;
    if (code == SQLITE_ROW || code == SQLITE_DONE) return KVL_OK;
    return kvl_collection_fail(c, code, "read or write", error);
}

kvl_status kvl_collection_finish(kvl_collection *c, sqlite3_stmt *statement, kvl_error *error)
{
    bool found = false;
    const kvl_status status = kvl_collection_step(c, statement, &found, error);
    (void)sqlite3_finalize(statement);
    return status;
}

kvl_status kvl_collection_execute(kvl_collection *c, const char *sql, kvl_error *error)
{
    const int code = sqlite3_exec(c->db, sql, NULL, NULL, NULL);
    return code == SQLITE_OK ? KVL_OK : kvl_collection_fail(c, code, "read or write", error);
}

kvl_status kvl_collection_end(kvl_collection *c, kvl_status status, kvl_error *error)
{
    if (status == KVL_OK) status = kvl_collection_execute(c, "COMMIT", error);
    if (status != KVL_OK) (void)sqlite3_exec(c->db, "ROLLBACK", NULL, NULL, NULL);
    return status;
}

kvl_status kvl_collection_get_about(kvl_collection *c, const char *name, char **value,
                                    kvl_error *error)
{
    *value = NULL;
    sqlite3_stmt *s = NULL;
    bool found = false;
    KVL_TRY(kvl_collection_prepare(c, "SELECT value FROM about WHERE name = ?1", &s, error));
    (void)sqlite3_bind_text(s, 1, name, -1, SQLITE_STATIC);
    kvl_status status = kvl_collection_step(c, s, &found, error);
    if (status == KVL_OK && found) {
        *value = kvl_strdup((const char *)sqlite3_column_text(s, 0));
        if (*value == NULL) status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for %s", name);
    }
    (void)sqlite3_finalize(s);
    return status;
}

kvl_status kvl_collection_set_about(kvl_collection *c, const char *name, const char *value,
                                    kvl_error *error)
{
    sqlite3_stmt *s = NULL;
    KVL_TRY(kvl_collection_prepare(c, "INSERT OR REPLACE INTO about VALUES (?1, ?2)", &s, error));
    (void)sqlite3_bind_text(s, 1, name, -1, SQLITE_STATIC);
    (void)sqlite3_bind_text(s, 2, value, -1, SQLITE_STATIC);
    return kvl_collection_finish(c, s, error);
}

/* ---- opening ---- */

static kvl_status read_number(kvl_collection *c, const char *sql, int64_t *number, kvl_error *error)
{
    sqlite3_stmt *s = NULL;
    bool found = false;
    KVL_TRY(kvl_collection_prepare(c, sql, &s, error));
    const kvl_status status = kvl_collection_step(c, s, &found, error);
    *number = found ? sqlite3_column_int64(s, 0) : 0;
    (void)sqlite3_finalize(s);
    return status;
}

/* A new file gets its tables; one that is there must be ours. */
static kvl_status check_schema(kvl_collection *c, kvl_error *error)
{
    int64_t id = 0, version = 0, n_tables = 0;
    KVL_TRY(read_number(c, "PRAGMA application_id", &id, error));
    KVL_TRY(read_number(c, "PRAGMA user_version", &version, error));
    KVL_TRY(read_number(c, "SELECT count(*) FROM sqlite_master", &n_tables, error));
    if (n_tables == 0) {
        KVL_TRY(kvl_collection_execute(c, "BEGIN IMMEDIATE", error));
        return kvl_collection_end(c, kvl_collection_execute(c, schema, error), error);
    }
    if (id != strtol(APPLICATION_ID, NULL, 16))
        return KVL_FAIL(error, KVL_ERR_FOREIGN,
                        "collection: index.db is the database of another program; choose another "
                        "directory");
    if (version != KVL_COLLECTION_VERSION)
        return KVL_FAIL(error, KVL_ERR_FOREIGN,
                        "collection: index.db has version %lld, this program reads %u; ingest into "
                        "a new collection",
                        (long long)version, KVL_COLLECTION_VERSION);
    return KVL_OK;
}

static kvl_status settle_chunk_tokens(kvl_collection *c, uint32_t wanted, kvl_error *error)
{
    char *text = NULL;
    char number[16];
    KVL_TRY(kvl_collection_get_about(c, "chunk_tokens", &text, error));
    uint32_t known = text == NULL ? 0 : (uint32_t)strtoul(text, NULL, 10);
    kvl_free(text);
    if (known < KVL_SPLIT_TOKENS_LEAST || known > KVL_SPLIT_TOKENS_MAX) known = 0;
    c->n_chunk_tokens = wanted != 0 ? wanted : known != 0 ? known : KVL_SPLIT_TOKENS_DEFAULT;
    if (c->n_chunk_tokens < KVL_SPLIT_TOKENS_LEAST || c->n_chunk_tokens > KVL_SPLIT_TOKENS_MAX)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "chunks of %u tokens were asked for; they may have %u to %u",
                        c->n_chunk_tokens, KVL_SPLIT_TOKENS_LEAST, KVL_SPLIT_TOKENS_MAX);
    if (c->n_chunk_tokens == known) return KVL_OK;
    (void)snprintf(number, sizeof number, "%u", c->n_chunk_tokens);
    KVL_TRY(kvl_collection_execute(c, "BEGIN IMMEDIATE", error));
    /* Every document is split anew when its pass comes. */
    kvl_status status = kvl_collection_execute(c, "UPDATE documents SET digest = x''", error);
    if (status == KVL_OK) status = kvl_collection_set_about(c, "chunk_tokens", number, error);
    return kvl_collection_end(c, status, error);
}

static kvl_status open_database(kvl_collection *c, const kvl_collection_options *options,
                                kvl_error *error)
{
    char path[PATH_MAX];
    if (snprintf(path, sizeof path, "%s/index.db", options->directory) >= (int)sizeof path)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path of the collection is too long");
    if (options->create) KVL_TRY(kvl_directory_make(options->directory, error));
    const int flags = SQLITE_OPEN_READWRITE | (options->create ? SQLITE_OPEN_CREATE : 0);
    const int code = sqlite3_open_v2(path, &c->db, flags, NULL);
    if (code == SQLITE_CANTOPEN)
        return KVL_FAIL(error, options->create ? KVL_ERR_IO : KVL_ERR_NOT_FOUND,
                        "there is no collection in %s", options->directory);
    if (code != SQLITE_OK) return kvl_collection_fail(c, code, "open", error);
    (void)sqlite3_busy_timeout(c->db, BUSY_TIMEOUT_MS);
    KVL_TRY(check_schema(c, error));
    /* A power cut may cost the last documents, never the database. */
    KVL_TRY(
        kvl_collection_execute(c, "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL", error));
    KVL_TRY(settle_chunk_tokens(c, options->n_chunk_tokens, error));
    return read_number(c, "SELECT max(pass) FROM documents", &c->pass, error);
}

kvl_status kvl_collection_open(const kvl_collection_options *options, kvl_collection **collection,
                               kvl_error *error)
{
    *collection = NULL;
    kvl_collection *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a collection");
    const kvl_status status = open_database(made, options, error);
    if (status != KVL_OK) {
        kvl_collection_close(made);
        return status;
    }
    *collection = made;
    return KVL_OK;
}

void kvl_collection_close(kvl_collection *collection)
{
    if (collection == NULL) return;
    (void)sqlite3_finalize(collection->unread);
    (void)sqlite3_close(collection->db);
    kvl_free(collection->primer);
    kvl_free(collection);
}

/* ---- documents ---- */

static kvl_digest digest_of(const char *text, size_t n_bytes)
{
    kvl_digester digester;
    kvl_digester_init(&digester, NULL, 0);
    kvl_digester_add(&digester, text, n_bytes);
    return kvl_digester_end(&digester);
}

void kvl_collection_begin_pass(kvl_collection *collection)
{
    collection->pass++;
}

/* Number of a chunk, which is put where its text is new. */
static kvl_status put_chunk(kvl_collection *c, const char *text, size_t n_bytes, int64_t *number,
                            bool *is_new, kvl_error *error)
{
    const kvl_digest digest = digest_of(text, n_bytes);
    sqlite3_stmt *s = NULL;
    KVL_TRY(kvl_collection_prepare(c, "SELECT number FROM chunks WHERE digest = ?1", &s, error));
    (void)sqlite3_bind_blob(s, 1, digest.bytes, KVL_DIGEST_BYTES, SQLITE_STATIC);
    bool found = false;
    kvl_status status = kvl_collection_step(c, s, &found, error);
    if (found) *number = sqlite3_column_int64(s, 0);
    (void)sqlite3_finalize(s);
    *is_new = !found;
    if (status != KVL_OK || found) return status;
    KVL_TRY(kvl_collection_prepare(
        c, "INSERT INTO chunks (digest, text, guess) VALUES (?1, ?2, ?3)", &s, error));
    (void)sqlite3_bind_blob(s, 1, digest.bytes, KVL_DIGEST_BYTES, SQLITE_STATIC);
    (void)sqlite3_bind_text64(s, 2, text, n_bytes, SQLITE_STATIC, SQLITE_UTF8);
    (void)sqlite3_bind_int64(s, 3, kvl_split_guess_tokens(text, n_bytes));
    KVL_TRY(kvl_collection_finish(c, s, error));
    *number = sqlite3_last_insert_rowid(c->db);
    KVL_TRY(
        kvl_collection_prepare(c, "INSERT INTO words (rowid, text) VALUES (?1, ?2)", &s, error));
    (void)sqlite3_bind_int64(s, 1, *number);
    (void)sqlite3_bind_text64(s, 2, text, n_bytes, SQLITE_STATIC, SQLITE_UTF8);
    return kvl_collection_finish(c, s, error);
}

/* Chunks that stand in no document any more: their words, their marks, then they themselves. */
static kvl_status remove_loose_chunks(kvl_collection *c, kvl_error *error)
{
    return kvl_collection_execute(
        c,
        "INSERT INTO words (words, rowid, text) SELECT 'delete', number, text FROM chunks"
        " WHERE number IN (SELECT chunk FROM loose) AND number NOT IN (SELECT chunk FROM places);"
        "INSERT OR IGNORE INTO orphans SELECT model, segment FROM reads"
        " WHERE chunk IN (SELECT chunk FROM loose) AND chunk NOT IN (SELECT chunk FROM places);"
        "DELETE FROM reads"
        " WHERE chunk IN (SELECT chunk FROM loose) AND chunk NOT IN (SELECT chunk FROM places);"
        "DELETE FROM chunks"
        " WHERE number IN (SELECT chunk FROM loose) AND number NOT IN (SELECT chunk FROM places);"
        "DELETE FROM loose;",
        error);
}

/* Takes the places of a document away; its chunks may be loose now. */
static kvl_status take_places(kvl_collection *c, int64_t document, kvl_error *error)
{
    sqlite3_stmt *s = NULL;
    KVL_TRY(kvl_collection_execute(
        c, "CREATE TEMP TABLE IF NOT EXISTS loose (chunk INTEGER PRIMARY KEY)", error));
    KVL_TRY(kvl_collection_prepare(
        c, "INSERT OR IGNORE INTO loose SELECT chunk FROM places WHERE document = ?1", &s, error));
    (void)sqlite3_bind_int64(s, 1, document);
    KVL_TRY(kvl_collection_finish(c, s, error));
    KVL_TRY(kvl_collection_prepare(c, "DELETE FROM places WHERE document = ?1", &s, error));
    (void)sqlite3_bind_int64(s, 1, document);
    return kvl_collection_finish(c, s, error);
}

/* Line ends around a chunk say nothing and would make two of one text. */
static kvl_text_span trim(const char *text, kvl_text_span span)
{
    const char *const around = "\n\r\t\f\v ";
    while (span.n_bytes > 0 && strchr(around, text[span.first + span.n_bytes - 1]) != NULL)
        span.n_bytes--;
    while (span.n_bytes > 0 && strchr("\n\r\f\v", text[span.first]) != NULL) {
        span.first++;
        span.n_bytes--;
    }
    return span;
}

static kvl_status put_places(kvl_collection *c, int64_t document, const char *text,
                             const kvl_text_span *spans, size_t n, kvl_collection_change *change,
                             kvl_error *error)
{
    for (size_t i = 0; i < n; i++) {
        const kvl_text_span span = trim(text, spans[i]);
        if (span.n_bytes == 0) continue;
        int64_t chunk = 0;
        bool is_new = false;
        KVL_TRY(put_chunk(c, text + span.first, span.n_bytes, &chunk, &is_new, error));
        change->n_chunks++;
        change->n_new += is_new ? 1 : 0;
        sqlite3_stmt *s = NULL;
        KVL_TRY(kvl_collection_prepare(c, "INSERT INTO places VALUES (?1, ?2, ?3)", &s, error));
        (void)sqlite3_bind_int64(s, 1, document);
        (void)sqlite3_bind_int64(s, 2, change->n_chunks);
        (void)sqlite3_bind_int64(s, 3, chunk);
        KVL_TRY(kvl_collection_finish(c, s, error));
    }
    return KVL_OK;
}

/* The row of a path, made where there is none, and whether the very text is there. */
static kvl_status put_row(kvl_collection *c, const char *path, const kvl_digest *digest,
                          int64_t *document, bool *unchanged, kvl_error *error)
{
    sqlite3_stmt *s = NULL;
    bool found = false;
    KVL_TRY(kvl_collection_prepare(c, "SELECT number, digest FROM documents WHERE path = ?1", &s,
                                   error));
    (void)sqlite3_bind_text(s, 1, path, -1, SQLITE_STATIC);
    kvl_status status = kvl_collection_step(c, s, &found, error);
    if (found) {
        *document = sqlite3_column_int64(s, 0);
        *unchanged = sqlite3_column_bytes(s, 1) == KVL_DIGEST_BYTES &&
                     memcmp(sqlite3_column_blob(s, 1), digest->bytes, KVL_DIGEST_BYTES) == 0;
    }
    (void)sqlite3_finalize(s);
    KVL_TRY(status);
    KVL_TRY(kvl_collection_prepare(c,
                                   "INSERT INTO documents (path, digest, pass) VALUES (?1, ?2, ?3)"
                                   " ON CONFLICT (path) DO UPDATE SET digest = ?2, pass = ?3",
                                   &s, error));
    (void)sqlite3_bind_text(s, 1, path, -1, SQLITE_STATIC);
    (void)sqlite3_bind_blob(s, 2, digest->bytes, KVL_DIGEST_BYTES, SQLITE_STATIC);
    (void)sqlite3_bind_int64(s, 3, c->pass);
    KVL_TRY(kvl_collection_finish(c, s, error));
    if (!found) *document = sqlite3_last_insert_rowid(c->db);
    return KVL_OK;
}

static kvl_status put(kvl_collection *c, const char *path, const char *text, size_t n_bytes,
                      const kvl_text_span *spans, size_t n_spans, kvl_collection_change *change,
                      kvl_error *error)
{
    const kvl_digest digest = digest_of(text, n_bytes);
    int64_t document = 0;
    KVL_TRY(put_row(c, path, &digest, &document, &change->unchanged, error));
    if (change->unchanged) return KVL_OK;
    KVL_TRY(take_places(c, document, error));
    KVL_TRY(put_places(c, document, text, spans, n_spans, change, error));
    return remove_loose_chunks(c, error);
}

kvl_status kvl_collection_put(kvl_collection *collection, const char *path, const char *text,
                              size_t n_bytes, kvl_collection_change *change, kvl_error *error)
{
    *change = (kvl_collection_change){0};
    kvl_text_span *spans = NULL;
    size_t n_spans = 0;
    KVL_TRY(kvl_split_text(text, n_bytes, collection->n_chunk_tokens, &spans, &n_spans, error));
    kvl_status status = kvl_collection_execute(collection, "BEGIN IMMEDIATE", error);
    if (status == KVL_OK)
        status = kvl_collection_end(
            collection, put(collection, path, text, n_bytes, spans, n_spans, change, error), error);
    kvl_free(spans);
    return status;
}

/* Documents of an earlier pass at or below a path. A directory's name ends at a slash: /a is not
 * above /ab. */
static kvl_status sweep(kvl_collection *c, const char *path, uint32_t *n_removed, kvl_error *error)
{
    static const char which[] = "SELECT number FROM documents WHERE pass < ?1 AND"
                                " (path = ?2 OR substr(path, 1, length(?3)) = ?3) LIMIT 1";
    char inside[PATH_MAX];
    const size_t n_path = strlen(path);
    const char *slash = n_path > 0 && path[n_path - 1] == '/' ? "" : "/";
    if (snprintf(inside, sizeof inside, "%s%s", path, slash) >= (int)sizeof inside)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "a path of %zu bytes is too long", n_path);
    for (;;) {
        sqlite3_stmt *s = NULL;
        bool found = false;
        KVL_TRY(kvl_collection_prepare(c, which, &s, error));
        (void)sqlite3_bind_int64(s, 1, c->pass);
        (void)sqlite3_bind_text(s, 2, path, -1, SQLITE_STATIC);
        (void)sqlite3_bind_text(s, 3, inside, -1, SQLITE_STATIC);
        const kvl_status status = kvl_collection_step(c, s, &found, error);
        const int64_t document = found ? sqlite3_column_int64(s, 0) : 0;
        (void)sqlite3_finalize(s);
        if (status != KVL_OK || !found) return status;
        KVL_TRY(take_places(c, document, error));
        KVL_TRY(kvl_collection_prepare(c, "DELETE FROM documents WHERE number = ?1", &s, error));
        (void)sqlite3_bind_int64(s, 1, document);
        KVL_TRY(kvl_collection_finish(c, s, error));
        KVL_TRY(remove_loose_chunks(c, error));
        (*n_removed)++;
    }
}

kvl_status kvl_collection_sweep(kvl_collection *collection, const char *path, uint32_t *n_removed,
                                kvl_error *error)
{
    *n_removed = 0;
    KVL_TRY(kvl_collection_execute(collection, "BEGIN IMMEDIATE", error));
    return kvl_collection_end(collection, sweep(collection, path, n_removed, error), error);
}
