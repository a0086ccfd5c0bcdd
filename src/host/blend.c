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

uint32_t run_merge(const uint32_t *computed, uint32_t n_computed, const uint32_t *chosen,
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
                                 scores, NULL, error);
}

uint32_t run_list_others(const kvl_select_run *runs, size_t n_runs, const uint32_t *chosen,
                         uint32_t n_chosen, uint32_t *others)
{
    uint32_t n = 0, c = 0;
    for (size_t i = 0; i < n_runs; i++) {
        for (uint32_t p = runs[i].first; p < runs[i].first + runs[i].n; p++) {
            if (c < n_chosen && chosen[c] == p)
                c++;
            else
                others[n++] = p;
        }
    }
    return n;
}

/* Scores of what was not computed in the last check are below all others. */
static void mark_rest(const kvl_select_run *runs, size_t n_runs, const uint32_t *went_on,
                      uint32_t n_went_on, float *scores)
{
    uint32_t at = 0;
    for (size_t i = 0; i < n_runs; i++) {
        for (uint32_t p = runs[i].first; p < runs[i].first + runs[i].n; p++) {
            const bool is_in = at < n_went_on && went_on[at] == p;
            at += is_in ? 1 : 0;
            if (!is_in) scores[p] = -1.0F;
        }
    }
}

/* One check after another, each with those of the one before that deviated most.
 * placed, all  [n_ids] scratch; placed: where they all go on, ascending */
static kvl_status check_layers(run *r, const kvl_select_run *runs, size_t n_runs,
                               uint32_t n_computed, uint32_t *placed, uint32_t *all, float *scores,
                               kvl_error *error)
{
    const uint32_t last_layer = r->host->engine->shape->n_layers - 1;
    kvl_select_policy next = {.name = "next", .score = KVL_SELECT_DEVIATION, .pool_width = 1};
    uint32_t n_placed = run_list_others(runs, n_runs, NULL, 0, placed);
    for (uint32_t c = 0; c < r->select->n_checks; c++) {
        const uint32_t layer = r->select->checks[c].layer;
        const kvl_deviation_check check = {layer < last_layer ? layer : last_layer,
                                           r->select->values_only};
        const uint32_t n = run_merge(r->positions, n_computed, placed, n_placed, all);
        KVL_TRY(kvl_session_deviation(r->session, &check, all, n, scores, error));
        if (c == 0) KVL_TRY(run_note_deviation(r, scores, error));
        mark_rest(runs, n_runs, placed, n_placed, scores);
        if (c + 1 == r->select->n_checks) break;
        next.share = r->select->checks[c].share;
        KVL_TRY(kvl_select_tokens(&next, runs, n_runs, scores, placed, &n_placed, error));
    }
    return KVL_OK;
}

static kvl_status deviate(run *r, const kvl_select_run *runs, size_t n_runs, uint32_t n_computed,
                          float *scores, kvl_error *error)
{
    uint32_t *scratch = kvl_alloc_zero(2 * r->n_ids, sizeof *scratch);
    if (scratch == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to score a prompt");
    const kvl_status status =
        check_layers(r, runs, n_runs, n_computed, scratch, scratch + r->n_ids, scores, error);
    if (status == KVL_OK) run_keep_deviation(r, scores);
    kvl_free(scratch);
    return status;
}

/* Attention first: the pass of deviations replaces what it would look at. */
static kvl_status score_product(run *r, const kvl_select_run *runs, size_t n_runs,
                                uint32_t n_computed, float *scores, kvl_error *error)
{
    float *attended = kvl_alloc_zero(r->n_ids, sizeof *attended);
    if (attended == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to score a prompt");
    kvl_status status = attend(r, runs, n_runs, n_computed, attended, error);
    if (status == KVL_OK) status = deviate(r, runs, n_runs, n_computed, scores, error);
    for (size_t i = 0; status == KVL_OK && i < r->n_ids; i++) scores[i] *= attended[i];
    kvl_free(attended);
    return status;
}

static kvl_status score(run *r, const kvl_select_run *runs, size_t n_runs, uint32_t n_computed,
                        float *scores, kvl_error *error)
{
    switch (r->select->score) {
    case KVL_SELECT_NO_SCORE: return KVL_OK;
    case KVL_SELECT_QUERY_ATTENTION: return attend(r, runs, n_runs, n_computed, scores, error);
    case KVL_SELECT_DRAFT_ATTENTION: return run_draft(r, n_computed, scores, error);
    case KVL_SELECT_DEVIATION: return deviate(r, runs, n_runs, n_computed, scores, error);
    default: return score_product(r, runs, n_runs, n_computed, scores, error);
    }
}

/* Whether the scores came with a pass of all layers. */
static bool leaves_final(kvl_select_score score)
{
    return score == KVL_SELECT_QUERY_ATTENTION || score == KVL_SELECT_DRAFT_ATTENTION;
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
    KVL_TRY(score(r, runs, n_runs, *n, scores, error));
    if (r->select->score != KVL_SELECT_NO_SCORE) run_keep_scores(r, scores);
    if (leaves_final(r->select->score)) drop_final(r, runs[0].first, n);
    uint32_t n_chosen = 0;
    KVL_TRY(kvl_select_tokens(r->select, runs, n_runs, scores, chosen, &n_chosen, error));
    KVL_TRY(run_choose_probes(r, runs, n_runs, *n, chosen, n_chosen, error));
    *n = run_merge(r->positions, *n, chosen, n_chosen, all);
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
