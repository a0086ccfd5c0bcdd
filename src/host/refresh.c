/* host/refresh.c: chooses, computes, forgets what is not stale any more. */
#include "host/refresh.h"

#include "base/alloc.h"
#include "host/host_parts.h"

#include <string.h>

kvl_status kvl_refresh_init(kvl_refresh *refresh, const kvl_refresh_options *options,
                            const uint32_t *stale, uint32_t n_stale, kvl_error *error)
{
    *refresh = (kvl_refresh){.options = *options};
    if (options->n_per_step == 0 || n_stale == 0) return KVL_OK;
    KVL_ASSERT(stale[0] >= options->n_own_first);
    if (refresh->options.n_per_step > n_stale) refresh->options.n_per_step = n_stale;
    refresh->stale = kvl_alloc_zero(n_stale, sizeof *refresh->stale);
    refresh->mass = kvl_alloc_zero(options->n_tokens_max, sizeof *refresh->mass);
    refresh->rows = kvl_alloc_zero(refresh->options.n_per_step + 1, sizeof *refresh->rows);
    if (refresh->stale == NULL || refresh->mass == NULL || refresh->rows == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to refresh %u tokens", n_stale);
    memcpy(refresh->stale, stale, n_stale * sizeof *stale);
    refresh->n_stale = n_stale;
    return KVL_OK;
}

void kvl_refresh_deinit(kvl_refresh *refresh)
{
    kvl_free(refresh->stale);
    kvl_free(refresh->mass);
    kvl_free(refresh->rows);
    *refresh = (kvl_refresh){.n_stale = 0};
}

static float score_of(const kvl_refresh *refresh, uint32_t position)
{
    const kvl_refresh_options *o = &refresh->options;
    if (!refresh->has_mass) return o->first_scores == NULL ? 0.0F : o->first_scores[position];
    return refresh->mass[position] * (o->deviation == NULL ? 1.0F : o->deviation[position]);
}

/* The index into `stale` of the highest score that is not taken yet; among equals the first. */
static uint32_t find_highest(const kvl_refresh *refresh, const uint32_t *taken, uint32_t n_taken)
{
    uint32_t best = UINT32_MAX;
    float highest = 0.0F;
    for (uint32_t i = 0; i < refresh->n_stale; i++) {
        bool is_taken = false;
        for (uint32_t t = 0; t < n_taken; t++) is_taken = is_taken || taken[t] == i;
        if (is_taken) continue;
        const float score = score_of(refresh, refresh->stale[i]);
        if (best != UINT32_MAX && !(score > highest)) continue;
        best = i;
        highest = score;
    }
    return best;
}

/* Indices into `stale`, ascending, into `rows`; how many. With nothing to go by, the first step
 * refreshes nothing, and only looks. */
static uint32_t choose(kvl_refresh *refresh)
{
    const kvl_refresh_options *o = &refresh->options;
    if (!refresh->has_mass && o->first_scores == NULL) return 0;
    const uint32_t n = o->n_per_step < refresh->n_stale ? o->n_per_step : refresh->n_stale;
    if (n == refresh->n_stale) {
        for (uint32_t i = 0; i < n; i++) refresh->rows[i] = i;
        return n;
    }
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t found = find_highest(refresh, refresh->rows, i);
        uint32_t at = i;
        for (; at > 0 && refresh->rows[at - 1] > found; at--)
            refresh->rows[at] = refresh->rows[at - 1];
        refresh->rows[at] = found;
    }
    return n;
}

/* Takes the chosen positions, which stand in `rows`, out of the stale ones. */
static void forget(kvl_refresh *refresh, uint32_t n_chosen)
{
    uint32_t n = 0, c = 0;
    for (uint32_t i = 0; i < refresh->n_stale; i++) {
        if (c < n_chosen && refresh->stale[i] == refresh->rows[c]) {
            c++;
        } else {
            refresh->stale[n++] = refresh->stale[i];
        }
    }
    refresh->n_stale = n;
    refresh->n_refreshed += n_chosen;
    refresh->n_steps += n_chosen > 0 ? 1 : 0;
}

kvl_status kvl_refresh_step(kvl_refresh *refresh, kvl_session *session, uint32_t n_logits,
                            float *logits, kvl_error *error)
{
    const uint32_t at = kvl_session_n_tokens(session) - 1;
    const kvl_refresh_options *o = &refresh->options;
    if (refresh->n_stale > 0 && o->deadline_ns != INT64_MAX &&
        kvl_clock_now(o->clock) >= o->deadline_ns)
        refresh->n_stale = 0;
    if (refresh->n_stale == 0)
        return kvl_session_compute_range(session, at, at + 1, n_logits, logits, error);
    KVL_ASSERT(at < o->n_tokens_max && refresh->stale[refresh->n_stale - 1] < at);
    const uint32_t n = choose(refresh);
    for (uint32_t i = 0; i < n; i++) refresh->rows[i] = refresh->stale[refresh->rows[i]];
    refresh->rows[n] = at;
    /* Nobody looks at the attention of the step that refreshes the last ones. */
    const kvl_status status =
        n == refresh->n_stale
            ? kvl_session_compute(session, refresh->rows, n + 1, n_logits, logits, error)
            : kvl_session_attention(session, refresh->rows, n + 1, at, refresh->mass,
                                    n_logits == 0 ? NULL : logits, error);
    if (status != KVL_OK) return status;
    refresh->has_mass = true;
    forget(refresh, n);
    return KVL_OK;
}

/* ---- of a run ---- */

/* Placed positions that were not computed again. */
static uint32_t list_stale(const run *r, uint32_t *stale)
{
    uint32_t n = 0, f = 0;
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const run_part *part = &r->parts[p];
        const uint32_t first = part->first + part->step.n_shared;
        for (uint32_t at = first; at < first + part->step.n_reused; at++) {
            while (f < r->n_filled && r->positions[f] < at) f++;
            if (f == r->n_filled || r->positions[f] != at) stale[n++] = at;
        }
    }
    return n;
}

kvl_status run_begin_refresh(run *r, kvl_error *error)
{
    if (r->task->refresh == 0 || r->is_exact) return KVL_OK;
    kvl_refresh_deinit(&r->refresh);
    const int64_t max_ns = (int64_t)r->task->refresh_ms * KVL_NS_PER_MS;
    const kvl_refresh_options options = {
        .n_per_step = r->task->refresh,
        .deadline_ns = max_ns == 0 ? INT64_MAX : kvl_clock_now(r->host->clock) + max_ns,
        .clock = r->host->clock,
        .n_own_first = r->n_shared,
        .n_tokens_max = (uint32_t)r->n_ids + r->task->max_tokens,
        .first_scores = r->has_scores ? r->scores : NULL,
        .deviation = r->has_deviation ? r->scores + r->n_ids : NULL,
    };
    uint32_t *stale = kvl_alloc_zero(r->n_ids, sizeof *stale);
    if (stale == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to refresh a prompt");
    const uint32_t n = list_stale(r, stale);
    const kvl_status status = kvl_refresh_init(&r->refresh, &options, stale, n, error);
    kvl_free(stale);
    return status;
}

kvl_status run_decode_row(void *context, kvl_session *session, uint32_t n_logits, float *logits,
                          kvl_error *error)
{
    run *r = context;
    return kvl_refresh_step(&r->refresh, session, n_logits, logits, error);
}

void run_keep_scores(run *r, const float *scores)
{
    if (r->scores == NULL) return;
    memcpy(r->scores, scores, r->n_ids * sizeof *scores);
    r->has_scores = true;
}

void run_keep_deviation(run *r, const float *deviation)
{
    if (r->scores == NULL) return;
    memcpy(r->scores + r->n_ids, deviation, r->n_ids * sizeof *deviation);
    r->has_deviation = true;
}
