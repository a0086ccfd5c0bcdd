/* rag/collection_search.c: BM25 over the words of a question. */
#include "base/alloc.h"
#include "rag/collection_parts.h"

#include <string.h>

static bool is_word(unsigned char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c >= 0x80;
}

/* The question as FTS5 wants it: its words in quotes, so that nothing in it is an operator. */
static kvl_status make_match(const char *question, char **match, kvl_error *error)
{
    const size_t n = strlen(question);
    size_t room = 0;
    *match = NULL;
    if (!kvl_size_mul(n, 7, &room) || !kvl_size_add(room, 8, &room))
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the question is too long");
    char *made = kvl_alloc(room); /* a word of one letter becomes `"a" OR ` */
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a question");
    size_t to = 0;
    uint32_t n_words = 0;
    for (size_t i = 0; i < n && n_words < KVL_COLLECTION_WORDS_MAX;) {
        size_t past = i;
        while (past < n && is_word((unsigned char)question[past])) past++;
        if (past == i) {
            i++;
            continue;
        }
        if (n_words++ > 0) {
            memcpy(made + to, " OR ", 4);
            to += 4;
        }
        made[to++] = '"';
        memcpy(made + to, question + i, past - i);
        to += past - i;
        made[to++] = '"';
        i = past;
    }
    made[to] = '\0';
    if (n_words == 0) {
        kvl_free(made);
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "the question '%.64s' has no word to look for; ask with words", question);
    }
    *match = made;
    return KVL_OK;
}

static kvl_status take_row(sqlite3_stmt *s, kvl_collection_found *found, kvl_error *error)
{
    const char *text = (const char *)sqlite3_column_text(s, 1);
    const char *path = (const char *)sqlite3_column_text(s, 2);
    *found = (kvl_collection_found){
        .number = sqlite3_column_int64(s, 0),
        .text = kvl_strdup(text == NULL ? "" : text),
        .n_bytes = (size_t)sqlite3_column_bytes(s, 1),
        .path = kvl_strdup(path == NULL ? "" : path),
        .place = (uint32_t)sqlite3_column_int64(s, 3),
        .score = -sqlite3_column_double(s, 4),
        .is_read = sqlite3_column_int(s, 5) != 0,
    };
    if (found->text != NULL && found->path != NULL) return KVL_OK;
    kvl_collection_found_deinit(found);
    return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for what was found");
}

kvl_status kvl_collection_search(kvl_collection *collection, const char *model,
                                 const char *question, size_t n_max, kvl_collection_found *found,
                                 size_t *n, kvl_error *error)
{
    static const char which[] =
        "SELECT c.number, c.text, d.path, p.place, w.score,"
        " EXISTS (SELECT 1 FROM reads r WHERE r.chunk = c.number AND r.model = ?3)"
        " FROM (SELECT rowid AS number, bm25(words) AS score FROM words WHERE words MATCH ?1"
        " ORDER BY score, rowid LIMIT ?2) w JOIN chunks c ON c.number = w.number"
        " JOIN places p ON p.chunk = c.number AND (p.document, p.place) ="
        " (SELECT document, place FROM places WHERE chunk = c.number ORDER BY 1, 2 LIMIT 1)"
        " JOIN documents d ON d.number = p.document ORDER BY w.score, c.number";
    *n = 0;
    if (n_max == 0 || n_max > KVL_COLLECTION_FOUND_MAX)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "%zu chunks were asked for; it may be 1 to %u",
                        n_max, KVL_COLLECTION_FOUND_MAX);
    char *match = NULL;
    sqlite3_stmt *s = NULL;
    KVL_TRY(make_match(question, &match, error));
    kvl_status status = kvl_collection_prepare(collection, which, &s, error);
    if (status == KVL_OK) {
        (void)sqlite3_bind_text(s, 1, match, -1, SQLITE_STATIC);
        (void)sqlite3_bind_int64(s, 2, (int64_t)n_max);
        (void)sqlite3_bind_text(s, 3, model, -1, SQLITE_STATIC);
    }
    bool more = false;
    if (status == KVL_OK) status = kvl_collection_step(collection, s, &more, error);
    while (status == KVL_OK && more && *n < n_max) {
        status = take_row(s, &found[*n], error);
        if (status != KVL_OK) break;
        (*n)++;
        status = kvl_collection_step(collection, s, &more, error);
    }
    (void)sqlite3_finalize(s);
    kvl_free(match);
    if (status == KVL_OK) return KVL_OK;
    for (size_t i = 0; i < *n; i++) kvl_collection_found_deinit(&found[i]);
    *n = 0;
    return status;
}

void kvl_collection_found_deinit(kvl_collection_found *found)
{
    kvl_free(found->text);
    kvl_free(found->path);
    *found = (kvl_collection_found){0};
}
