/* rag/collection_parts.h: what the files of a collection share; private to the room. */
#ifndef KVL_RAG_COLLECTION_PARTS_H
#define KVL_RAG_COLLECTION_PARTS_H

#include "rag/collection.h"

#include <sqlite3.h>

struct kvl_collection {
    sqlite3 *db;
    uint32_t n_chunk_tokens;
    int64_t pass;
    char *primer;         /* once it was asked for */
    sqlite3_stmt *unread; /* whose row a caller looks at */
};

/* What SQLite said, as one of our statuses; `doing` is a verb. */
kvl_status kvl_collection_fail(kvl_collection *c, int code, const char *doing, kvl_error *error);

/* Prepares a statement; ended with sqlite3_finalize. */
KVL_MUST_USE kvl_status kvl_collection_prepare(kvl_collection *c, const char *sql,
                                               sqlite3_stmt **statement, kvl_error *error);
/* Steps to a row: *found says whether there is one. */
KVL_MUST_USE kvl_status kvl_collection_step(kvl_collection *c, sqlite3_stmt *statement, bool *found,
                                            kvl_error *error);
/* Steps a statement that has no rows, and ends it. */
KVL_MUST_USE kvl_status kvl_collection_finish(kvl_collection *c, sqlite3_stmt *statement,
                                              kvl_error *error);
/* Statements without parameters, and without rows. */
KVL_MUST_USE kvl_status kvl_collection_execute(kvl_collection *c, const char *sql,
                                               kvl_error *error);
/* Commits where status is KVL_OK, otherwise takes back what was done since "BEGIN IMMEDIATE". */
KVL_MUST_USE kvl_status kvl_collection_end(kvl_collection *c, kvl_status status, kvl_error *error);

/* A value of the table `about`; *value is NULL where there is none, ended with kvl_free. */
KVL_MUST_USE kvl_status kvl_collection_get_about(kvl_collection *c, const char *name, char **value,
                                                 kvl_error *error);
KVL_MUST_USE kvl_status kvl_collection_set_about(kvl_collection *c, const char *name,
                                                 const char *value, kvl_error *error);

#endif /* KVL_RAG_COLLECTION_PARTS_H */
