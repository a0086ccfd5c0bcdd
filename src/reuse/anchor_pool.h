/* reuse/anchor_pool.h: what the files of the anchor pool share; nobody else includes it. */
#ifndef KVL_REUSE_ANCHOR_POOL_H
#define KVL_REUSE_ANCHOR_POOL_H

#include "reuse/anchor_layout.h"

typedef struct kvl_anchor {
    kvl_container *container; /* one reference */
    kvl_anchor_extra extra;
    kvl_anchor_layout layout;
    uint64_t bytes;
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
    float *per_channel; /* paper mode: [n threads][n_anchors_max][the largest width of a row] */
    size_t n_per_channel;
};

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

#endif /* KVL_REUSE_ANCHOR_POOL_H */
