/* reuse/place.h: puts KV that was stored before rotation into pages, at its positions, and back.
 *
 * A segment's keys are stored before rotation, so it can stand anywhere in a prompt: each key is
 * rotated once, straight from the stored value, and values are not touched. Keys out of pages are
 * rotated backwards once, when decoded KV is published.
 *
 * Method   RoFormer, arXiv:2104.09864; the rotation itself is compute/rotation.h's.
 * Error    One rotation's (4 * FLT_EPSILON relative to the larger of a pair); there and back, two.
 *          Position 0 changes nothing.
 * Memory   Keys, values and scratch are the host's memory, as rotation.h works there.
 * Threads  The engine thread only: the backend's operations are called. */
#ifndef KVL_REUSE_PLACE_H
#define KVL_REUSE_PLACE_H

#include "compute/backend.h"
#include "reuse/correct.h"
#include "segment/container.h"

/* Where KV goes, or comes from. All borrowed for the call. */
typedef struct kvl_place_target {
    kvl_backend *backend;
    const kvl_pages *pages;
    const kvl_rotation *rotation;
} kvl_place_target;

/* A run of tokens: token i stands at positions[i], in slots[i] = page * KVL_PAGE_TOKENS + index.
 * Positions need not be neighbours. Borrowed for the call. */
typedef struct kvl_place_tokens_view {
    uint32_t n_tokens;
    const uint32_t *positions; /* [n_tokens] */
    const uint32_t *slots;     /* [n_tokens] */
} kvl_place_tokens_view;

/* Floats of one layer's keys, or of its values, for n tokens: n * n_kv_heads * head_dim.
 * False on overflow. */
KVL_MUST_USE bool kvl_place_floats(const kvl_pages *pages, uint32_t n_tokens, size_t *n_floats);

/* Writes one layer of a run.
 * keys, values  [n_tokens][n_kv_heads][head_dim] float, keys before rotation; not changed
 * scratch       kvl_place_floats floats, the caller's
 * Errors        KVL_ERR_OUT_OF_RANGE  a position or a slot is past its table; nothing was written
 */
KVL_MUST_USE kvl_status kvl_place_tokens(const kvl_place_target *target, uint32_t layer,
                                         const kvl_place_tokens_view *tokens, const float *keys,
                                         const float *values, float *scratch, kvl_error *error);

/* The reverse: one layer of a run out of pages, keys before rotation.
 * keys, values  [n_tokens][n_kv_heads][head_dim] float, the caller's
 * Errors        KVL_ERR_OUT_OF_RANGE  as above */
KVL_MUST_USE kvl_status kvl_extract_tokens(const kvl_place_target *target, uint32_t layer,
                                           const kvl_place_tokens_view *tokens, float *keys,
                                           float *values, kvl_error *error);

typedef struct kvl_place_options {
    uint32_t token_first; /* of the container: the run is its tokens from here on */
    bool blocks_checked;  /* by whoever brought the container: checksums are not looked at again */
    kvl_pool *threads;    /* share out layers; NULL: the calling thread does all */
    float *scratch;       /* the caller's; room for one layer's keys and values at least, for two a
                             thread for full speed: kvl_place_floats * 2 * layers at once */
    size_t n_scratch_floats;
} kvl_place_options;

/* Writes all layers of a segment's tokens token_first .. token_first + n_tokens - 1. Some layers at
 * a time are checked, decoded and rotated in parallel, then written one by one. Blocks.
 * Errors   KVL_ERR_OUT_OF_RANGE  a position, a slot or the run is past its table; nothing was
 *                                written
 *          KVL_ERR_FOREIGN       the container is no segment, or its shape is not the pages'
 *          KVL_ERR_DAMAGED       a block is damaged: the pages of this run hold nothing of use */
KVL_MUST_USE kvl_status kvl_place_container(const kvl_place_target *target,
                                            const kvl_container *container,
                                            const kvl_place_tokens_view *tokens,
                                            const kvl_place_options *options, kvl_error *error);

/* Floats of scratch for kvl_place_layer. */
KVL_MUST_USE bool kvl_place_layer_floats(const kvl_pages *pages, size_t *n_floats);

/* Whether a run of a segment's tokens can be placed at all: nothing is written.
 * Errors   as kvl_place_layer */
KVL_MUST_USE kvl_status kvl_place_check(const kvl_place_target *target,
                                        const kvl_container *container,
                                        const kvl_place_tokens_view *tokens, uint32_t token_first,
                                        kvl_error *error);

/* One layer of a segment's tokens token_first .. token_first + n_tokens - 1 straight into pages: a
 * page's worth of numbers at a time is decoded, rotated and written while it is in the nearest
 * cache. Gives the bits of kvl_place_container.
 *
 * Blocks must have been checked. The pages must be the host's memory, and nobody may read or write
 * these slots of this layer meanwhile.
 * Threads  Safe from any thread, beside backend operations on other layers: no operation of the
 *          backend is called.
 * scratch  kvl_place_layer_floats floats, the caller's, aligned to KVL_ALIGNMENT
 * Errors   KVL_ERR_OUT_OF_RANGE, KVL_ERR_FOREIGN, KVL_ERR_DAMAGED, as kvl_place_container: nothing
 *          was written */
KVL_MUST_USE kvl_status kvl_place_layer(const kvl_place_target *target,
                                        const kvl_container *container, uint32_t layer,
                                        const kvl_place_tokens_view *tokens, uint32_t token_first,
                                        float *scratch, kvl_error *error);
/* The same with a mean added before rotation, by the token's place in the segment; NULL: none. */
KVL_MUST_USE kvl_status kvl_place_layer_moved(const kvl_place_target *target,
                                              const kvl_container *container, uint32_t layer,
                                              const kvl_place_tokens_view *tokens,
                                              uint32_t token_first, const kvl_mean *mean,
                                              float *scratch, kvl_error *error);

#endif /* KVL_REUSE_PLACE_H */
