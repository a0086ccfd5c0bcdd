/* reuse/planner.h: chooses, part by part, how a prompt's KV will be had.
 *
 * Pure: looks nothing up, allocates nothing, decides the same from the same input. The host says
 * what is known of each part; the answer is what to do, what it should cost and why, in words that
 * `kvloom explain` prints.
 * Method   KVCOMM (arXiv:2510.12872, section 3): an agent's slot that no anchor covers is computed,
 *          and measured, in a dense prefill. Costs are a fit to this host's own measurements.
 * Threads  Safe from any thread. */
#ifndef KVL_REUSE_PLANNER_H
#define KVL_REUSE_PLANNER_H

#include "reuse/anchor.h"
#include "reuse/error_model.h"

/* How much error a request may have. */
typedef enum kvl_quality {
    KVL_QUALITY_EXACT,    /* none: only what a full prefill gives, bit for bit */
    KVL_QUALITY_BALANCED, /* placed KV must be corrected by anchors that fit */
    KVL_QUALITY_FAST,     /* placed KV may stay uncorrected where no anchor fits */
} kvl_quality;

typedef enum kvl_action {
    KVL_ACTION_COMPUTE, /* prefill */
    KVL_ACTION_SHARE,   /* pages of the exact prefix */
    KVL_ACTION_PLACE,   /* rotate a segment to its position */
    KVL_ACTION_OFFSET,  /* place, then add the anchors' offset */
    KVL_ACTION_BLEND,   /* place, then compute selected tokens again (reuse/select.h) */
} kvl_action;

/* "compute", "share", ... Static text. */
const char *kvl_action_name(kvl_action action);

typedef enum kvl_part_kind {
    KVL_PART_TEXT, /* fixed text of a template; right after a slot, that slot's anchors know it */
    KVL_PART_SLOT, /* question, another agent's answer, a document */
} kvl_part_kind;

typedef enum kvl_segment_where {
    KVL_SEGMENT_NOWHERE,
    KVL_SEGMENT_LOCAL, /* memory of this host */
    KVL_SEGMENT_DISK,  /* its LMDB */
    KVL_SEGMENT_PEER,
} kvl_segment_where;

typedef struct kvl_plan_part {
    kvl_part_kind kind;
    uint32_t n_tokens;
    uint32_t n_shared; /* first tokens that are in the exact prefix; counts only while every part
                          before is there whole */
    kvl_segment_where where;
    uint64_t segment_bytes;
    /* Slots only: what kvl_anchor_pool_match said; TOO_FEW where it was not asked. */
    kvl_anchor_verdict verdict;
    uint32_t n_anchors;
} kvl_plan_part;

/* Measured by the host. A rate of 0 is not known, and what needs it is not chosen. */
typedef struct kvl_plan_rates {
    double prefill_ms_per_token; /* a and b of a * L + b * L^2, the time to prefill L tokens */
    double prefill_ms_per_square_token;
    double local_bytes_per_ms;
    double disk_bytes_per_ms;
    double fetch_bytes_per_ms;
    double fetch_latency_ms; /* once a part; may be 0 */
    double place_tokens_per_ms;
    double offset_tokens_per_ms; /* tokens times anchors: one anchor's offset each */
} kvl_plan_rates;

typedef struct kvl_plan_options {
    kvl_quality quality;
    bool reuse;          /* false: compute all, not even the exact prefix is used */
    bool anchors;        /* false: place only, as if no correction were known */
    bool blend;          /* BALANCED, FAST: a slot that no anchor covers is placed and blended, not
                            computed and measured, nor placed as it is */
    double blend_share;  /* of a blended slot's prefill that computing again costs; 0.2 */
    bool blend_overlaps; /* blended slots are loaded beside computing again (controller.h) */
    bool all_or_nothing; /* BALANCED: one slot without anchors makes the whole prompt dense beyond
                            the exact prefix, so that its anchors are measured against exact KV;
                            false: they are measured behind whatever KV stands before the slot */
    kvl_error_model errors; /* what actions are expected to cost in exactness */
    /* Most that the request may be expected to be off, mean KL of its tokens in nats: the cheapest
     * plan under it is made of what the rules choose, of blending where that is allowed, and of
     * computing. 0: as KVL_QUALITY_EXACT; infinite: the rules alone. */
    double error_budget;
    uint32_t short_text_tokens; /* text after a slot up to this long is computed: cheaper than its
                                   correction, and the rows that the answer leans on most */
} kvl_plan_options;

kvl_plan_options kvl_plan_default_options(void);

/* What to do with one part: its first n_shared tokens are shared, the next n_reused placed or
 * corrected as `action` says, the last n_computed prefilled. They add up to the part's tokens. */
typedef struct kvl_plan_step {
    kvl_action action; /* of what is not shared; SHARE where nothing but the last token is left */
    uint32_t n_shared, n_reused, n_computed;
    bool measure;       /* a slot with a segment, computed for want of anchors: make one of it */
    double blend_share; /* BLEND: of its prefill, what to compute again; at least the options' */
    double cost_ms;     /* as chosen */
    double compute_ms;  /* prefilling the whole part in its place */
    double error;       /* expected of the request for this part's sake, nats */
    const char *reason; /* static text */
} kvl_plan_step;

typedef struct kvl_plan_totals {
    uint64_t n_tokens, n_shared, n_placed, n_offset, n_blended, n_computed;
    double cost_ms, compute_ms, error;
    double blend_share; /* of blended tokens' prefill; 0 without any */
    bool dense;         /* all_or_nothing struck */
} kvl_plan_totals;

/* Time to prefill n tokens behind `before` others; to have the first n tokens of a part from its
 * segment without correction, infinite where a rate that it needs is not known. */
double kvl_plan_compute_ms(const kvl_plan_rates *rates, uint64_t before, uint32_t n);
double kvl_plan_load_ms(const kvl_plan_rates *rates, const kvl_plan_part *part, uint32_t n);

/* Plans a prompt. The last token of the prompt is always computed, since its row gives the first
 * token of the answer. Parts of 0 tokens are fine; n_shared must be <= n_tokens.
 * steps [n_parts], the caller's */
void kvl_plan_make(const kvl_plan_options *options, const kvl_plan_rates *rates,
                   const kvl_plan_part *parts, size_t n_parts, kvl_plan_step *steps,
                   kvl_plan_totals *totals);

#endif /* KVL_REUSE_PLANNER_H */
