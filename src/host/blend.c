/* host/blend.c: which tokens of placed chunks are computed again.
 *
 * Query attention needs a pass of its own: the rows that are computed anyway (the question, seams)
 * run once over the placed KV, and the keys that those behind the last chunk look at are chosen.
 * Their own KV is computed again with the chosen tokens', so the pass costs little and decides
 * nothing but the choice. */
#include "base/alloc.h"
#include "host/host_parts.h"

#include <string.h>

static size_t list_runs(const run *r, kvl_select_run *runs)
{
    size_t n = 0;
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const run_part *part = &r->parts[p];
        if (part->step.action != KVL_ACTION_BLEND || part->step.n_reused == 0) continue;
        runs[n++] = (kvl_select_run){part->first + part->step.n_shared, part->step.n_reused};
    }
    return n;
}

/* All of what is blended and what is computed, ascending, into `all`. */
static uint32_t merge(const uint32_t *computed, uint32_t n_computed, const uint32_t *chosen,
                      uint32_t n_chosen, uint32_t *all)
{
    uint32_t n = 0, c = 0, s = 0;
    while (c < n_computed || s < n_chosen) {
        const bool takes_chosen = c == n_computed || (s < n_chosen && chosen[s] < computed[c]);
        all[n++] = takes_chosen ? chosen[s++] : computed[c++];
    }
    return n;
}

/* Attention from the rows behind the last run, by position. */
static kvl_status attend(run *r, const kvl_select_run *runs, size_t n_runs, uint32_t n_computed,
                         float *scores, kvl_error *error)
{
    const kvl_select_run *last = &runs[n_runs - 1];
    return kvl_session_attention(r->session, r->positions, n_computed, last->first + last->n,
                                 scores, error);
}

static kvl_status deviate(run *r, const kvl_select_run *runs, size_t n_runs, uint32_t n_computed,
                          float *scores, kvl_error *error)
{
    uint32_t *all = kvl_alloc_zero(2 * r->n_ids, sizeof *all);
    if (all == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to score a prompt");
    uint32_t *placed = all + r->n_ids;
    uint32_t n_placed = 0;
    for (size_t i = 0; i < n_runs; i++) {
        for (uint32_t t = 0; t < runs[i].n; t++) placed[n_placed++] = runs[i].first + t;
    }
    const uint32_t n = merge(r->positions, n_computed, placed, n_placed, all);
    const kvl_status status = kvl_session_deviation(r->session, all, n, scores, error);
    if (status == KVL_OK) run_keep_deviation(r, scores);
    kvl_free(all);
    return status;
}

/* Attention first: the pass of deviations replaces what it would look at. */
static kvl_status score(run *r, const kvl_select_run *runs, size_t n_runs, uint32_t n_computed,
                        float *scores, kvl_error *error)
{
    if (r->select->score == KVL_SELECT_QUERY_ATTENTION)
        return attend(r, runs, n_runs, n_computed, scores, error);
    if (r->select->score == KVL_SELECT_DEVIATION)
        return deviate(r, runs, n_runs, n_computed, scores, error);
    float *attended = kvl_alloc_zero(r->n_ids, sizeof *attended);
    if (attended == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to score a prompt");
    kvl_status status = attend(r, runs, n_runs, n_computed, attended, error);
    if (status == KVL_OK) status = deviate(r, runs, n_runs, n_computed, scores, error);
    for (size_t i = 0; status == KVL_OK && i < r->n_ids; i++) scores[i] *= attended[i];
    kvl_free(attended);
    return status;
}

/* Rows before the first placed one have seen nothing approximate: the pass of the scores has left
 * them as they are. */
static void drop_final(run *r, uint32_t first_placed, uint32_t *n)
{
    uint32_t n_final = 0;
    while (n_final < *n && r->positions[n_final] < first_placed) n_final++;
    if (n_final == *n) return;
    *n -= n_final;
    memmove(r->positions, r->positions + n_final, *n * sizeof *r->positions);
}

static kvl_status choose(run *r, const kvl_select_run *runs, size_t n_runs, uint32_t *n,
                         uint32_t *chosen, uint32_t *all, float *scores, kvl_error *error)
{
    if (r->select->score != KVL_SELECT_NO_SCORE) {
        KVL_TRY(score(r, runs, n_runs, *n, scores, error));
        run_keep_scores(r, scores);
    }
    if (r->select->score == KVL_SELECT_QUERY_ATTENTION) drop_final(r, runs[0].first, n);
    uint32_t n_chosen = 0;
    KVL_TRY(kvl_select_tokens(r->select, runs, n_runs, scores, chosen, &n_chosen, error));
    *n = merge(r->positions, *n, chosen, n_chosen, all);
    memcpy(r->positions, all, *n * sizeof *all);
    r->n_recomputed = n_chosen;
    return KVL_OK;
}

kvl_status run_select(run *r, uint32_t *n, kvl_error *error)
{
    kvl_select_run runs[KVL_PARTS_MAX];
    const size_t n_runs = r->select == NULL ? 0 : list_runs(r, runs);
    if (n_runs == 0) return KVL_OK;
    const int64_t start = kvl_clock_now(r->host->clock);
    uint32_t *chosen = kvl_alloc_zero(2 * r->n_ids, sizeof *chosen);
    float *scores = kvl_alloc_zero(r->n_ids, sizeof *scores);
    kvl_status status = KVL_OK;
    if (chosen == NULL || scores == NULL)
        status =
            KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to choose among %zu tokens", r->n_ids);
    else
        status = choose(r, runs, n_runs, n, chosen, chosen + r->n_ids, scores, error);
    kvl_free(chosen);
    kvl_free(scores);
    r->select_ns += kvl_clock_now(r->host->clock) - start;
    return status;
}
