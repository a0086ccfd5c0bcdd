/* rag/collection.h: a collection of documents: their chunks, an index of words over them, and what
 * has been prefilled. One SQLite database (index.db) in a directory of its own; whoever prefills
 * keeps the KV beside it.
 *
 * Chunks are kept by their text: a chunk of two documents is kept once, and one that an edit did
 * not touch keeps its number, its id and its KV. Every document is one transaction: when a process
 * is killed, the next pass goes on from the last whole document and the last chunk that was marked
 * as prefilled.
 * Retrieval  BM25 over stems (SQLite FTS5, porter), every word of the question optional.
 * Threads    One thread at a time. Blocks on the disk. */
#ifndef KVL_RAG_COLLECTION_H
#define KVL_RAG_COLLECTION_H

#include "base/hash.h"

#define KVL_COLLECTION_VERSION 1u
#define KVL_COLLECTION_FOUND_MAX 64u
/* Words of a question that are looked for; more are left out. */
#define KVL_COLLECTION_WORDS_MAX 64u

typedef struct kvl_collection kvl_collection;

typedef struct kvl_collection_options {
    const char *directory;
    bool create;             /* where there is none yet */
    uint32_t n_chunk_tokens; /* 0: as it was made with, or the default; changing it splits anew */
} kvl_collection_options;

/* Owns     *collection: ended with kvl_collection_close
 * Errors   KVL_ERR_NOT_FOUND (none there, and not to be created), KVL_ERR_BUSY (another process
 *          writes to it), KVL_ERR_FOREIGN (another version, or no collection), KVL_ERR_CORRUPT,
 *          KVL_ERR_OUT_OF_RANGE (n_chunk_tokens), KVL_ERR_IO, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_collection_open(const kvl_collection_options *options,
                                            kvl_collection **collection, kvl_error *error);
/* NULL does nothing. */
void kvl_collection_close(kvl_collection *collection);

/* ---- documents ---- */

typedef struct kvl_collection_change {
    uint32_t n_chunks; /* that the document has now */
    uint32_t n_new;    /* of these, not known before in any document */
    bool unchanged;    /* the very text was there */
} kvl_collection_change;

/* Begins a pass: documents that kvl_collection_put does not see until kvl_collection_sweep go. */
void kvl_collection_begin_pass(kvl_collection *collection);
/* Puts a document, or what it became, under its path. Blank chunks are left out.
 * Errors   those of kvl_split_text; KVL_ERR_IO, KVL_ERR_NO_MEMORY, KVL_ERR_CORRUPT */
KVL_MUST_USE kvl_status kvl_collection_put(kvl_collection *collection, const char *path,
                                           const char *text, size_t n_bytes,
                                           kvl_collection_change *change, kvl_error *error);
/* Removes the documents at or below `path` that this pass was not told of.
 * *n_removed  documents
 * Errors      as above */
KVL_MUST_USE kvl_status kvl_collection_sweep(kvl_collection *collection, const char *path,
                                             uint32_t *n_removed, kvl_error *error);

/* ---- what is prefilled ---- */

/* The texts that all chunks are prefilled behind: three short chunks of different documents, chosen
 * once and kept, since another primer is another home and all KV would have to be made again. Empty
 * for an empty collection.
 * *primer  borrowed until the collection is closed or reset
 * Errors   as above */
KVL_MUST_USE kvl_status kvl_collection_primer(kvl_collection *collection, const char **primer,
                                              kvl_error *error);

typedef struct kvl_collection_chunk {
    int64_t number;   /* never used again for another text */
    const char *text; /* borrowed until the next call about chunks */
    size_t n_bytes;
} kvl_collection_chunk;

/* The next chunk behind number `after` (0: the first) that is not marked as prefilled for `model`.
 * `found` is false, and that is no error, where there is none left. */
KVL_MUST_USE kvl_status kvl_collection_next_unread(kvl_collection *collection, const char *model,
                                                   int64_t after, kvl_collection_chunk *chunk,
                                                   bool *found, kvl_error *error);
/* Marks chunks as prefilled, in one transaction. segments [n]: ids of their KV in the store. */
KVL_MUST_USE kvl_status kvl_collection_mark_read(kvl_collection *collection, const char *model,
                                                 const int64_t *numbers, const kvl_digest *segments,
                                                 size_t n, kvl_error *error);
/* KV of chunks that are gone: at most n_max ids [n_max] of the store of `model`. */
KVL_MUST_USE kvl_status kvl_collection_list_orphans(kvl_collection *collection, const char *model,
                                                    size_t n_max, kvl_digest *segments, size_t *n,
                                                    kvl_error *error);
/* These ids are out of the store: forgets them. */
KVL_MUST_USE kvl_status kvl_collection_drop_orphans(kvl_collection *collection, const char *model,
                                                    const kvl_digest *segments, size_t n,
                                                    kvl_error *error);
/* Forgets the primer and all marks of all models: everything is prefilled anew. What was marked
 * becomes an orphan. */
KVL_MUST_USE kvl_status kvl_collection_reset(kvl_collection *collection, kvl_error *error);

/* ---- retrieval ---- */

typedef struct kvl_collection_found {
    int64_t number;
    char *text; /* ended by kvl_collection_found_deinit */
    size_t n_bytes;
    char *path;     /* of the first document that has it */
    uint32_t place; /* which chunk of that document, from 1 */
    double score;   /* BM25, higher is better */
    bool is_read;   /* prefilled for the model asked about */
} kvl_collection_found;

/* The n_max chunks that fit the question best, best first; fewer where fewer have any of its words.
 * found   [n_max], n_max <= KVL_COLLECTION_FOUND_MAX; the caller's, each ended with
 *         kvl_collection_found_deinit
 * Errors  KVL_ERR_INVALID (the question has no word), KVL_ERR_OUT_OF_RANGE, KVL_ERR_IO,
 *         KVL_ERR_NO_MEMORY, KVL_ERR_CORRUPT */
KVL_MUST_USE kvl_status kvl_collection_search(kvl_collection *collection, const char *model,
                                              const char *question, size_t n_max,
                                              kvl_collection_found *found, size_t *n,
                                              kvl_error *error);
void kvl_collection_found_deinit(kvl_collection_found *found);

typedef struct kvl_collection_stats {
    uint64_t n_documents, n_chunks, n_unread, n_bytes; /* bytes of chunks' texts */
    uint32_t n_chunk_tokens;
} kvl_collection_stats;

KVL_MUST_USE kvl_status kvl_collection_get_stats(kvl_collection *collection, const char *model,
                                                 kvl_collection_stats *stats, kvl_error *error);

#endif /* KVL_RAG_COLLECTION_H */
