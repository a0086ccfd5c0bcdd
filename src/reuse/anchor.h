/* reuse/anchor.h: anchors (KVCOMM, arXiv:2510.12872): measured examples of how the KV of one slot
 * of one template differed in context from KV at home, interpolated for a new text in the same
 * slot.
 *
 * Offsets of keys are kept de-rotated, so that an anchor measured at one position serves another.
 * Two modes: KVL_ANCHOR_PAPER repeats the reference's formulas and scales (notes 1.6 and 1.7 of the
 * paper's code) for replication; KVL_ANCHOR_SCALE_FREE, the default, uses one relative distance for
 * weights and gate, an exact hit rule, and an absolute gate.
 * Threads  The engine thread only. */
#ifndef KVL_REUSE_ANCHOR_H
#define KVL_REUSE_ANCHOR_H

#include "base/pool.h"
#include "segment/container.h"

#define KVL_ANCHORS_PER_SLOT_MAX 64u
#define KVL_ANCHOR_POOL_ANCHORS_MAX 4096u
#define KVL_ANCHOR_COVERAGE_LEAST 0.1F

typedef enum kvl_anchor_mode { KVL_ANCHOR_SCALE_FREE, KVL_ANCHOR_PAPER } kvl_anchor_mode;

/* Which slot of which template of which model: tenant and workflow are part of `template_id`, which
 * the host makes, so anchors of one tenant are never read for another. */
typedef struct kvl_anchor_slot {
    kvl_digest template_id;
    uint32_t slot; /* 0-based, in order of the template */
} kvl_anchor_slot;

typedef struct kvl_anchor_options {
    kvl_anchor_mode mode;
    uint32_t n_anchors_max; /* per slot; 20 in the paper */
    uint64_t bytes_max;     /* of the whole pool */
    uint32_t window;        /* eviction looks at this many of the oldest; 5 */
    float entropy_share;    /* gamma: above this share of log2 n, no reuse (paper mode); 0.3 */
    float mass;             /* top_p: anchors that count as used; 0.9 */
    float temperature;      /* tau of the softmax; 1 */
    float distance_max;     /* absolute gate of the scale-free mode; 1.5. Unrelated texts of SmolLM2
                               stand 1.2 to 1.5 apart, half the same text 0.7, so that 1.5 lets any
                               text pass and 1.1 near ones only */
    uint32_t n_anchors_min; /* below this many that are long enough: no reuse; 2 */
    float coverage_min;     /* scale-free mode: an anchor with this share of the request's tokens is
                               long enough; tokens past its end are corrected by longer anchors
                               only, or stay as they are. 1 is the paper's rule; 0.5 */
    bool shrink;            /* scale-free mode: offsets count as far as anchors agree on them, and
                               as far as a token is like the anchor's (anchor_shrink.c); true */
    kvl_kv_dtype dtype;     /* of stored offsets: int8, or f32 for exact tests */
    kvl_pool *threads;      /* shares out layers and tokens; borrowed until the anchor pool is
                               destroyed; NULL: the calling thread does all */
} kvl_anchor_options;

kvl_anchor_options kvl_anchor_default_options(void);

/* KV of a run of tokens, float32, keys NOT rotated:
 * keys, values [n_layers][n_tokens][n_kv_heads][head_dim]; borrowed */
typedef struct kvl_kv_view {
    uint32_t n_layers, n_tokens, n_kv_heads, head_dim;
    const float *keys;
    const float *values;
} kvl_kv_view;

typedef struct kvl_anchor_pool kvl_anchor_pool;

/* Owns     *pool: ended with kvl_anchor_pool_destroy
 * Errors   KVL_ERR_OUT_OF_RANGE (text names the option), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_anchor_pool_create(const kvl_anchor_options *options,
                                               kvl_anchor_pool **pool, kvl_error *error);
void kvl_anchor_pool_destroy(kvl_anchor_pool *pool);

/* Makes an anchor from a dense prefill and adds it; the same text in the same slot replaces its
 * earlier anchor. `base_id` is the id of the segment at home (the exact-hit key).
 * base, real            the slot's tokens at home and in context
 * after_base, after_real  the template's text right after the slot, at template home and in
 * context; n_tokens 0 where there is none container             the anchor as a sealed container,
 * to be stored and announced: a reference that the caller owns What was measured here wins: anchors
 * of the slot that have another shape are dropped. On error the pool is as it was. Errors
 * KVL_ERR_OUT_OF_RANGE (no tokens, or KV that is not finite), KVL_ERR_TOO_LARGE (than bytes_max),
 * KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_anchor_pool_measure(kvl_anchor_pool *pool, const kvl_anchor_slot *slot,
                                                const kvl_digest *fingerprint,
                                                const kvl_digest *base_id, const kvl_kv_view *base,
                                                const kvl_kv_view *real,
                                                const kvl_kv_view *after_base,
                                                const kvl_kv_view *after_real,
                                                kvl_container **container, kvl_error *error);

/* Adds an anchor that was stored or fetched; checks it whole. Shares the container.
 * On error the pool is as it was.
 * Errors   KVL_ERR_DAMAGED, KVL_ERR_FOREIGN (another model, another layout, or without what the
 *          pool's mode needs), KVL_ERR_TOO_LARGE (than bytes_max), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_anchor_pool_add(kvl_anchor_pool *pool, const kvl_digest *fingerprint,
                                            kvl_container *container, kvl_error *error);

/* What an anchor's header `extra` starts with: lets peers list the anchors of a template. */
#define KVL_ANCHOR_PREFIX_BYTES KVL_DIGEST_BYTES /* the template id */

typedef enum kvl_anchor_verdict {
    KVL_ANCHOR_EXACT,   /* the very text was measured: its offset alone; exact where all that comes
                           before the slot is as it was then (never in paper mode) */
    KVL_ANCHOR_SHARE,   /* interpolate */
    KVL_ANCHOR_TOO_FEW, /* fewer anchors of enough length than needed: compute, and measure */
    KVL_ANCHOR_TOO_FAR, /* nothing near enough: compute, and measure */
} kvl_anchor_verdict;

typedef struct kvl_anchor_match {
    kvl_anchor_verdict verdict;
    uint32_t n_anchors; /* that take part */
    float distance; /* to the nearest: mean over tokens of |dV|/|V|; in paper mode of all |dV| */
    float entropy_share; /* of log2 n */
} kvl_anchor_match;

/* Anchors of one slot that are long enough for a text of n_tokens. */
uint32_t kvl_anchor_pool_n_anchors(const kvl_anchor_pool *pool, const kvl_anchor_slot *slot,
                                   uint32_t n_tokens);

/* Decides for one slot whether KV at home can be corrected.
 * Cost     reads the values of the base and of every anchor of the slot in one of four layers (in
 *          paper mode in all); allocates nothing */
void kvl_anchor_pool_match(kvl_anchor_pool *pool, const kvl_anchor_slot *slot,
                           const kvl_digest *base_id, const kvl_kv_view *base,
                           kvl_anchor_match *match);

/* Adds the interpolated offsets to keys and values (in place, float32, keys not rotated, same shape
 * as base) of the slot, and of the text after it where `after` is not NULL (its base KV likewise).
 * `keys` may be base->keys itself, and so for values and for the text after; otherwise they must
 * not overlap. Call after a match with EXACT or SHARE, with the same base.
 * Layer 0 is left bit for bit as it was; the order of anchors does not matter beyond rounding, and
 * the number of threads not at all. Anchors with most of the weight (`mass`) count as used.
 * Errors   KVL_ERR_NOT_FOUND (no anchor fits: there was no such match), KVL_ERR_FOREIGN (anchors
 *          know another text after the slot); on both nothing was changed. Allocates nothing. */
KVL_MUST_USE kvl_status kvl_anchor_pool_correct(kvl_anchor_pool *pool, const kvl_anchor_slot *slot,
                                                const kvl_digest *base_id, const kvl_kv_view *base,
                                                float *keys, float *values,
                                                const kvl_kv_view *after_base, float *after_keys,
                                                float *after_values, kvl_error *error);

typedef struct kvl_anchor_stats {
    uint32_t n_anchors;
    uint64_t bytes, evictions;
} kvl_anchor_stats;
void kvl_anchor_pool_stats(const kvl_anchor_pool *pool, kvl_anchor_stats *stats);

#endif /* KVL_REUSE_ANCHOR_H */
