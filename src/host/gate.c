/* host/gate.c: asks a second cache for the same answer, before it is sent.
 *
 * The first cache becomes the second: of the placed tokens, more of those that question and answer
 * look at are computed again, among the ones that were before. What the answer would be behind that
 * is found in one pass over it. The second cache is closer to full prefill than the first, so what
 * passes is published from it. */
#include "base/alloc.h"
#include "host/decode.h"
#include "host/host_parts.h"

#include <string.h>

/* Twice as much as balanced recomputes: a cache that is hardly another one agrees with anything. */
static const char SECOND_POLICY[] = "sink8+query25";

static size_t list_reused(const run *r, kvl_select_run *runs)
{
    size_t n = 0;
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const run_part *part = &r->parts[p];
        if (part->step.n_reused == 0) continue;
        runs[n++] = (kvl_select_run){part->first + part->step.n_shared, part->step.n_reused};
    }
    return n;
}

static uint32_t list_marked(const bool *marked, uint32_t past, uint32_t *positions)
{
    uint32_t n = 0;
    for (uint32_t p = 0; p < past; p++) {
        if (marked[p]) positions[n++] = p;
    }
    return n;
}

/* What the pass needs room for, by position of prompt and answer. */
typedef struct scratch {
    uint32_t *positions, *chosen;
    float *scores;
    bool *marked;
} scratch;

/* Computes the second cache's new rows of the prompt but the last, which belongs to the answer's
 * pass: the reused tokens that question and answer look at and that are stale yet, and all text
 * behind them. */
static kvl_status refill(run *r, const kvl_select_run *runs, size_t n_runs, const scratch *s,
                         kvl_error *error)
{
    const kvl_select_policy *policy = kvl_select_find(SECOND_POLICY);
    const uint32_t n_prompt = (uint32_t)r->n_ids;
    const uint32_t n_all = n_prompt + r->n_answer;
    const uint32_t behind = runs[n_runs - 1].first + runs[n_runs - 1].n;
    for (uint32_t p = behind; p < n_all; p++) s->marked[p] = true;
    const uint32_t n_queries = list_marked(s->marked, n_all, s->positions);
    KVL_TRY(
        kvl_session_attention(r->session, s->positions, n_queries, behind, s->scores, NULL, error));
    uint32_t n_chosen = 0;
    KVL_TRY(kvl_select_tokens(policy, runs, n_runs, s->scores, s->chosen, &n_chosen, error));
    for (uint32_t i = 0; i < n_chosen; i++) s->marked[s->chosen[i]] = true;
    for (uint32_t i = 0; i < r->n_filled; i++) {
        if (r->positions[i] < behind) s->marked[r->positions[i]] = false;
    }
    const uint32_t n = list_marked(s->marked, n_prompt - 1, s->positions);
    return n == 0 ? KVL_OK : kvl_session_compute(r->session, s->positions, n, 0, NULL, error);
}

static void note_probability(void *context, uint32_t at, const float *logits)
{
    (void)at;
    run *r = context;
    const float top = kvl_top_probability(logits, r->host->engine->shape->n_vocab);
    if (top < r->lowest_probability) r->lowest_probability = top;
}

/* Whether the second cache gives the answer that was decoded from the first. */
static kvl_status ask_again(run *r, bool *agrees, kvl_error *error)
{
    exact_check check = {.stops_at_first = true, .row = note_probability, .context = r};
    kvl_status status = exact_check_begin_on(&check, r->host->engine, &r->sent, r->session, error);
    while (status == KVL_OK && !exact_check_is_done(&check))
        status = exact_check_step(&check, UINT32_MAX, error);
    *agrees = !check.has_differed;
    check.session = NULL; /* the run's */
    exact_check_end(&check);
    return status;
}

static kvl_status second_cache(run *r, bool *agrees, kvl_error *error)
{
    kvl_select_run runs[KVL_PARTS_MAX];
    const size_t n_runs = list_reused(r, runs);
    KVL_ASSERT(n_runs > 0);
    const size_t n_all = r->n_ids + r->n_answer;
    scratch s = {.positions = kvl_alloc_zero(2 * n_all, sizeof *s.positions),
                 .scores = kvl_alloc_zero(n_all, sizeof *s.scores),
                 .marked = kvl_alloc_zero(n_all, sizeof *s.marked)};
    kvl_status status = KVL_OK;
    if (s.positions == NULL || s.scores == NULL || s.marked == NULL) {
        status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to ask a second cache");
    } else {
        s.chosen = s.positions + n_all;
        status = refill(r, runs, n_runs, &s, error);
    }
    if (status == KVL_OK) status = ask_again(r, agrees, error);
    kvl_free(s.positions);
    kvl_free(s.scores);
    kvl_free(s.marked);
    return status;
}

kvl_status run_gate(run *r, kvl_error *error)
{
    quality_book *book = &r->host->quality;
    if (!r->task->gate || r->is_exact || r->task->quality == KVLOOM__V1__QUALITY__QUALITY_VERIFIED)
        return KVL_OK;
    const int64_t start = kvl_clock_now(r->host->clock);
    bool agrees = false;
    KVL_TRY(second_cache(r, &agrees, error));
    quality_entry *entry = quality_find(book, r->task->workflow, r->task->template_name);
    r->gate_score = kvl_gate_score(agrees, r->lowest_probability);
    r->gate_bar = quality_bar(book, entry);
    r->is_gated = true;
    book->n_gated++;
    r->gate_ns = kvl_clock_now(r->host->clock) - start;
    if (kvl_gate_passes(r->gate_score, r->gate_bar)) return KVL_OK;
    KVL_TRY(run_verify(r, error));
    r->is_healed_first = true;
    book->n_healed_first++;
    kvl_gate_learn(&entry->gate, &book->gate, r->gate_score, r->n_corrected == 0);
    return KVL_OK;
}
