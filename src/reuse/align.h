/* reuse/align.h: runs of a text's tokens that stand in stored segments too, at any offset.
 *
 * An edited document, or a quotation, is no segment that anybody stored, and yet most of its tokens
 * are. The index knows the hash of every window of KVL_ALIGN_WINDOW tokens that begins at a
 * multiple of it in a segment; a text is looked up at every offset with a rolling hash (as rsync
 * does). What is found is compared token by token and grown to both sides, so a hash that is wrong
 * costs time and nothing else. Longer spans win over shorter ones. Every common run of
 * 2 * KVL_ALIGN_WINDOW - 1 tokens is found, unless a longer one has its place.
 * Method   KVShare (arXiv:2503.16525, section 4.1), without its separators
 * Threads  One thread at a time for one index. */
#ifndef KVL_REUSE_ALIGN_H
#define KVL_REUSE_ALIGN_H

#include "base/hash.h"
#include "base/status.h"

#define KVL_ALIGN_WINDOW 16u

typedef struct kvl_align_index kvl_align_index;

/* Tokens at .. at + n - 1 of the text are tokens from segment_at on of segment `id`. */
typedef struct kvl_align_span {
    uint32_t at, n, segment_at;
    kvl_digest id;
} kvl_align_span;

/* For at most n_segments_max segments; the one that was added first makes room.
 * Owns     *index: ended with kvl_align_destroy
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_align_create(uint32_t n_segments_max, kvl_align_index **index,
                                         kvl_error *error);
void kvl_align_destroy(kvl_align_index *index); /* NULL does nothing */

/* Copies the tokens. What is there already, and what is shorter than a window, changes nothing.
 * home   what its KV was computed behind: only segments of one home are found together
 * Errors KVL_ERR_NO_MEMORY; the index is as before */
KVL_MUST_USE kvl_status kvl_align_add(kvl_align_index *index, const kvl_digest *id,
                                      const kvl_digest *home, const uint32_t *tokens,
                                      uint32_t n_tokens, kvl_error *error);
/* Of a segment that is gone; one that is not there is fine. */
void kvl_align_remove(kvl_align_index *index, const kvl_digest *id);

/* Finds spans of at least n_least tokens (not less than KVL_ALIGN_WINDOW).
 * spans    [n_spans_max], the caller's: ascending, not overlapping
 * Returns  how many */
uint32_t kvl_align_find(const kvl_align_index *index, const kvl_digest *home,
                        const uint32_t *tokens, uint32_t n_tokens, uint32_t n_least,
                        kvl_align_span *spans, uint32_t n_spans_max);

#endif /* KVL_REUSE_ALIGN_H */
