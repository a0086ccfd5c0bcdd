/* host/refresh.h: stale tokens computed again while an answer is decoded.
 *
 * The tokens of an answer look at placed KV that the question did not look at. At each step, the
 * few stale tokens that the newest row looks at most are computed again, in one batch with the row
 * of the new token: every row sees what stands before it, and the rows of the batch among it. What
 * they give is written over the stale KV in the session's own pages. Each token is computed again
 * at most once, so the extra work has an end, and vanishes.
 * Which row is newest: the one of the step before, since a row's attention is known only after it
 * was computed; for the first step, what chose among the placed tokens, where anything did.
 * A token refreshed behind stale ones is still approximate; refreshed in order, all are those of a
 * full prefill.
 * Method   KVShare (arXiv:2503.16525), DHD in the decode stage; score: attention times deviation
 * Threads  The engine thread only. */
#ifndef KVL_HOST_REFRESH_H
#define KVL_HOST_REFRESH_H

#include "base/clock.h"
#include "host/engine.h"

/* Of a task: rows that a step has beside its own. */
#define KVL_REFRESH_MAX 8u

typedef struct kvl_refresh_options {
    uint32_t n_per_step; /* 0: nothing is ever refreshed */
    int64_t deadline_ns; /* of `clock`: none are refreshed from then on; INT64_MAX: no end */
    const kvl_clock *clock;
    uint32_t n_own_first;  /* positions below stand in pages that others share: never written */
    uint32_t n_tokens_max; /* of the session, at the last step */
    /* By position of the prompt, borrowed, may be NULL: what the first step goes by; and how far
     * each token is from its KV in context, where that is known. */
    const float *first_scores, *deviation;
} kvl_refresh_options;

typedef struct kvl_refresh {
    kvl_refresh_options options;
    uint32_t *stale; /* [n_stale] ascending */
    uint32_t n_stale;
    float *mass; /* [n_tokens_max] attention of the newest row, by position */
    bool has_mass;
    uint32_t *rows;                /* [n_per_step + 1] scratch */
    uint32_t n_refreshed, n_steps; /* so far; steps that refreshed any */
} kvl_refresh;

/* stale    [n_stale] placed positions, ascending, copied; all at or above n_own_first
 * Owns     what it makes: ended with kvl_refresh_deinit, also after an error
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_refresh_init(kvl_refresh *refresh, const kvl_refresh_options *options,
                                         const uint32_t *stale, uint32_t n_stale, kvl_error *error);
void kvl_refresh_deinit(kvl_refresh *refresh);

/* Computes the session's last token, and stale ones with it while there are any.
 * logits   [n_logits][n_vocab] of the last token; n_logits 0 or 1
 * Errors   those of kvl_session_compute; then nothing counts as refreshed */
KVL_MUST_USE kvl_status kvl_refresh_step(kvl_refresh *refresh, kvl_session *session,
                                         uint32_t n_logits, float *logits, kvl_error *error);

#endif /* KVL_HOST_REFRESH_H */
