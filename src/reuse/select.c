/* reuse/select.c: unites what the parts of a policy ask for. */
#include "reuse/select.h"

#include "base/alloc.h"

#include <stdlib.h>
#include <string.h>

#define SINKS(n) .n_sink = (n), .pool_width = 1
/* By attention, each token with the highest score of its neighbours. */
#define QUERY(of) .score = KVL_SELECT_QUERY_ATTENTION, .share = (of), .pool_width = 9
#define DRAFT(of, n)                                                                               \
    .score = KVL_SELECT_DRAFT_ATTENTION, .share = (of), .is_total = true, .pool_width = 5,         \
    .n_draft = (n)
/* Layer 1, as the published code has it. */
#define DEVIATION(of)                                                                              \
    .score = KVL_SELECT_DEVIATION, .share = (of), .pool_width = 1, .checks = {{1, 1.0F}},          \
    .n_checks = 1

const kvl_select_policy kvl_select_policies[] = {
    {.name = "none", SINKS(0)},
    {.name = "sink8", SINKS(8)},
    {.name = "sink16", SINKS(16)},
    {.name = "query5", QUERY(0.05F)},
    {.name = "query10", QUERY(0.10F)},
    {.name = "query15", QUERY(0.15F)},
    {.name = "query30", QUERY(0.30F)},
    {.name = "sink8+query5", .n_sink = 8, QUERY(0.05F)},
    {.name = "sink8+query10", .n_sink = 8, QUERY(0.10F)},
    {.name = "sink8+query25", .n_sink = 8, QUERY(0.25F)},
    {.name = "sink4+draft5", .n_sink = 4, DRAFT(0.05F, 4)},
    {.name = "sink8+draft12", .n_sink = 8, DRAFT(0.12F, 8)},
    {.name = "sink8+draft15", .n_sink = 8, DRAFT(0.15F, 12)},
    {.name = "deviation5", DEVIATION(0.05F)},
    {.name = "deviation15", DEVIATION(0.15F)},
    {.name = "deviation30", DEVIATION(0.30F)},
    {.name = "deviation15v", DEVIATION(0.15F), .values_only = true},
    {.name = "deviation15g",
     .score = KVL_SELECT_DEVIATION,
     .share = 0.15F,
     .pool_width = 1,
     .checks = {{1, 0.30F}, {4, 0.20F}, {8, 0.15F}},
     .n_checks = 3},
    {.name = "kvshare15",
     .score = KVL_SELECT_ATTENDED_DEVIATION,
     .share = 0.15F,
     .pool_width = 1,
     .checks = {{1, 1.0F}},
     .n_checks = 1},
    {.name = "all", QUERY(1.0F)},
    {0},
};

const kvl_select_policy *kvl_select_find(const char *name)
{
    for (const kvl_select_policy *p = kvl_select_policies; p->name != NULL; p++) {
        if (strcmp(p->name, name) == 0) return p;
    }
    return NULL;
}

typedef struct candidate {
    float score;
    uint32_t position;
    bool is_chosen;
} candidate;

/* Highest first; what is no number last; among equals the lower position. */
static int compare_scores(const void *a, const void *b)
{
    const candidate *left = a;
    const candidate *right = b;
    const bool left_is_number = left->score == left->score;
    const bool right_is_number = right->score == right->score;
    if (left_is_number != right_is_number) return left_is_number ? -1 : 1;
    if (left_is_number && left->score != right->score) return left->score > right->score ? -1 : 1;
    return (left->position > right->position) - (left->position < right->position);
}

static int compare_positions(const void *a, const void *b)
{
    const uint32_t left = *(const uint32_t *)a;
    const uint32_t right = *(const uint32_t *)b;
    return (left > right) - (left < right);
}

/* The highest score of the tokens of a run around one of them. */
static float pooled(const kvl_select_policy *policy, const kvl_select_run *run, const float *scores,
                    uint32_t position)
{
    const uint32_t reach = policy->pool_width / 2;
    const uint32_t past = run->first + run->n;
    const uint32_t from = position - run->first > reach ? position - reach : run->first;
    const uint32_t to = past - position > reach ? position + reach + 1 : past;
    float highest = scores[from];
    for (uint32_t p = from + 1; p < to; p++) {
        if (!(scores[p] <= highest)) highest = scores[p];
    }
    return highest;
}

/* How many the scores may choose. */
static size_t places_of(const kvl_select_policy *policy, const candidate *candidates, size_t n)
{
    size_t left = (size_t)((double)policy->share * (double)n);
    for (size_t i = 0; policy->is_total && i < n && left > 0; i++) left -= candidates[i].is_chosen;
    return left;
}

static void fill(const kvl_select_policy *policy, const kvl_select_run *runs, size_t n_runs,
                 const float *scores, candidate *candidates)
{
    size_t n = 0;
    for (size_t r = 0; r < n_runs; r++) {
        for (uint32_t i = 0; i < runs[r].n; i++) {
            const uint32_t position = runs[r].first + i;
            candidates[n++] = (candidate){
                .score = scores == NULL ? 0.0F : pooled(policy, &runs[r], scores, position),
                .position = position,
                .is_chosen = i < policy->n_sink,
            };
        }
    }
}

kvl_status kvl_select_tokens(const kvl_select_policy *policy, const kvl_select_run *runs,
                             size_t n_runs, const float *scores, uint32_t *chosen,
                             uint32_t *n_chosen, kvl_error *error)
{
    KVL_ASSERT(policy->score == KVL_SELECT_NO_SCORE || scores != NULL);
    *n_chosen = 0;
    size_t n = 0;
    for (size_t r = 0; r < n_runs; r++) n += runs[r].n;
    if (n == 0) return KVL_OK;
    candidate *candidates = kvl_alloc_zero(n, sizeof *candidates);
    if (candidates == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to choose among %zu tokens", n);
    fill(policy, runs, n_runs, scores, candidates);
    if (policy->score != KVL_SELECT_NO_SCORE) {
        qsort(candidates, n, sizeof *candidates, compare_scores);
        /* A token that is a head already takes no place from the others. */
        size_t left = places_of(policy, candidates, n);
        for (size_t i = 0; i < n && left > 0; i++) {
            if (candidates[i].is_chosen) continue;
            candidates[i].is_chosen = true;
            left--;
        }
    }
    for (size_t i = 0; i < n; i++) {
        if (candidates[i].is_chosen) chosen[(*n_chosen)++] = candidates[i].position;
    }
    qsort(chosen, *n_chosen, sizeof *chosen, compare_positions);
    kvl_free(candidates);
    return KVL_OK;
}
