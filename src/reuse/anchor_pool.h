/* reuse/anchor_pool.h: what the files of the anchor pool share; nobody else includes it. */
#ifndef KVL_REUSE_ANCHOR_POOL_H
#define KVL_REUSE_ANCHOR_POOL_H

#include "reuse/anchor_kernel.h"
#include "reuse/anchor_layout.h"

typedef struct kvl_anchor {
    kvl_container *container; /* one reference */
    kvl_anchor_extra extra;
    kvl_anchor_layout layout;
    uint64_t bytes;
    float *means;  /* [keys|values][n_layers][width]: mean offset past the head; NULL: unused */
    uint32_t uses; /* ages: halved whenever an anchor of the slot is evicted */
} kvl_anchor;

struct kvl_anchor_pool {
    kvl_anchor_options options;
    const kvl_anchor_kernels *kernels;
    kvl_anchor **anchors; /* [n], oldest first; room for KVL_ANCHOR_POOL_ANCHORS_MAX */
    uint32_t n;
    uint64_t bytes, evictions;

    /* Working memory of match and correct, had when an anchor comes, so that the path of a request
     * allocates nothing. */
    float *per_token; /* [2][n_anchors_max][the longest text that an anchor is long enough for] */
    size_t n_per_token;
    float *per_channel; /* [n threads][max(n_anchors_max, 2)][the largest width of a row] */
    size_t n_per_channel;
};

/* The paper's mode adds offsets as they are. */
static inline bool kvl_anchor_pool_shrinks(const kvl_anchor_pool *pool)
{
    return pool->options.shrink && pool->options.mode != KVL_ANCHOR_PAPER;
}

static inline bool kvl_anchor_is_of(const kvl_anchor *anchor, const kvl_anchor_slot *slot)
{
    return anchor->extra.slot.slot == slot->slot &&
           kvl_digest_equal(&anchor->extra.slot.template_id, &slot->template_id);
}

/* An anchor need not reach the end of a longer text (not so in the paper). */
static inline bool kvl_anchor_is_long_enough(const kvl_anchor_pool *pool, const kvl_anchor *anchor,
                                             uint32_t n_tokens)
{
    const float share = pool->options.mode == KVL_ANCHOR_PAPER ? 1.0F : pool->options.coverage_min;
    return n_tokens <= KVL_SEGMENT_TOKENS_MAX &&
           (float)anchor->layout.n_tokens >= share * (float)n_tokens;
}

/* Runs task for every item, over the pool's threads if it has any. */
void kvl_anchor_run(const kvl_anchor_pool *pool, kvl_pool_task *task, void *context,
                    size_t n_items);
size_t kvl_anchor_n_threads(const kvl_anchor_pool *pool);

/* Rows of one section of one layer. */
static inline kvl_anchor_rows kvl_anchor_rows_of(const kvl_anchor *anchor, uint32_t layer,
                                                 kvl_anchor_section section)
{
    const uint8_t *block = kvl_container_block_view(anchor->container, layer, &(size_t){0});
    return kvl_anchor_section_rows(&anchor->layout, block, section);
}

/* ---- reuse/anchor_shrink.c ---- */

/* Tokens at the start of a slot that have offsets of their own. */
uint32_t kvl_anchor_head(uint32_t n_tokens);

/* Fills anchor->means, which is freed with the anchor, also after an error.
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_anchor_means_create(const kvl_anchor_pool *pool, kvl_anchor *anchor,
                                                kvl_error *error);

/* Cosines of texts at relative distances; 0 for what no anchor knows. n numbers each. */
void kvl_anchor_similarities(size_t n, const float *distances, float *similarities);

/* Past the head: what of each weight is for the token's own offset stays in `weights`, what is for
 * the anchor's mean replaces `similarities`; tokens that no anchor knows get the mean of all. Both
 * [n_anchors][n_tokens]; the head is left as it is. */
void kvl_anchor_split_weights(uint32_t n_anchors, uint32_t n_tokens, float *weights,
                              float *similarities);

/* One layer's keys or values of one slot. */
typedef struct kvl_anchor_correction {
    const kvl_anchor_kernels *kernels;
    kvl_anchor *const *anchors; /* [n_anchors], at least one, with means */
    uint32_t n_anchors;
    uint32_t n_tokens; /* of the request */
    uint32_t layer;
    kvl_anchor_section section; /* KVL_ANCHOR_SLOT_KEYS or _VALUES */
} kvl_anchor_correction;

/* Adds the head's offsets to rows [n_tokens][width]. weights, similarities as before the split;
 * scratch [2][width]. */
void kvl_anchor_add_head(const kvl_anchor_correction *c, const float *weights,
                         const float *similarities, float *scratch, float *rows);
/* Adds the means past the head. scratch [width]. */
void kvl_anchor_add_means(const kvl_anchor_correction *c, const float *mean_weights, float *scratch,
                          float *rows);

#endif /* KVL_REUSE_ANCHOR_POOL_H */
