/* host/draft.c: an answer drafted over placed KV, to see what an answer looks at.
 *
 * The question's rows look at everything that may matter; the row that is about to say a number
 * looks straight at where it stands. A draft of a few tokens costs little beside what is computed
 * again, and where the final KV confirms it, it is the beginning of the answer (host/decode.h). */
#include "base/alloc.h"
#include "host/decode.h"
#include "host/host_parts.h"

#include <string.h>

/* The first pass: what is computed anyway, and the first tokens of each run, which draw attention
 * for want of anything before them. Ends with the logits of the prompt's last token. */
static kvl_status first_pass(run *r, const kvl_select_run *runs, size_t n_runs, uint32_t n_computed,
                             uint32_t *scratch, kvl_error *error)
{
    kvl_select_policy heads = *r->select;
    heads.score = KVL_SELECT_NO_SCORE;
    uint32_t n_heads = 0;
    KVL_TRY(kvl_select_tokens(&heads, runs, n_runs, NULL, scratch, &n_heads, error));
    uint32_t *all = scratch + r->n_ids;
    const uint32_t n = run_merge(r->positions, n_computed, scratch, n_heads, all);
    return kvl_session_compute(r->session, all, n, 1, r->host->logits, error);
}

static kvl_status decode_draft(run *r, kvl_error *error)
{
    const kvl_decode_options options = {
        .max_tokens = r->task->max_tokens < RUN_DRAFT_MAX ? r->task->max_tokens : RUN_DRAFT_MAX,
        .keep_last = true,
    };
    bool ended = false;
    KVL_TRY(kvl_decode(r->session, r->host->engine, &options, r->host->logits, &r->n_draft, &ended,
                       NULL, error));
    memcpy(r->draft, kvl_session_tokens(r->session) + r->n_ids, r->n_draft * sizeof *r->draft);
    return KVL_OK;
}

/* What the rows that say the draft look at: the prompt's last, and all of the draft. */
static kvl_status look(run *r, float *scores, kvl_error *error)
{
    const uint32_t first = (uint32_t)r->n_ids - 1;
    const uint32_t n = r->n_draft + 1;
    uint32_t rows[RUN_DRAFT_MAX + 1];
    for (uint32_t i = 0; i < n; i++) rows[i] = first + i;
    float *mass = kvl_alloc_zero(first + n, sizeof *mass);
    if (mass == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to look at a draft");
    const kvl_status status = kvl_session_attention(r->session, rows, n, first, mass, error);
    memcpy(scores, mass, r->n_ids * sizeof *scores);
    kvl_free(mass);
    return status;
}

kvl_status run_draft(run *r, const kvl_select_run *runs, size_t n_runs, uint32_t n_computed,
                     float *scores, kvl_error *error)
{
    uint32_t *scratch = kvl_alloc_zero(2 * r->n_ids, sizeof *scratch);
    if (scratch == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to draft an answer");
    kvl_status status = first_pass(r, runs, n_runs, n_computed, scratch, error);
    if (status == KVL_OK) status = decode_draft(r, error);
    if (status == KVL_OK) status = look(r, scores, error);
    kvl_session_truncate(r->session, (uint32_t)r->n_ids);
    kvl_free(scratch);
    return status;
}
