/* host/draft.c: an answer drafted over placed KV, to see what an answer looks at.
 *
 * The question's rows look at everything that may matter; the row that is about to say a number
 * looks straight at where it stands. A draft of a few tokens costs little beside what is computed
 * again, and where the final KV confirms it, it is the beginning of the answer (host/decode.h). */
#include "base/alloc.h"
#include "host/decode.h"
#include "host/host_parts.h"

#include <string.h>

/* What the row of the last token looks at is added to the scores; ends with its logits. */
static kvl_status look(run *r, const uint32_t *rows, uint32_t n, float *mass, float *scores,
                       kvl_error *error)
{
    KVL_TRY(kvl_session_attention(r->session, rows, n, rows[n - 1], mass, r->host->logits, error));
    for (size_t i = 0; i < r->n_ids; i++) scores[i] += mass[i];
    return KVL_OK;
}

static kvl_status decode_draft(run *r, float *mass, float *scores, kvl_error *error)
{
    const kvl_tokenizer *tokenizer = kvl_model_tokenizer(r->host->engine->model);
    const uint32_t n_vocab = r->host->engine->shape->n_vocab;
    const uint32_t wanted = r->select->n_draft;
    const uint32_t n_most = r->task->max_tokens < wanted ? r->task->max_tokens : wanted;
    while (r->n_draft < n_most) {
        const uint32_t token = kvl_draw_token(r->host->logits, n_vocab, 0.0F, NULL);
        if (kvl_tokenizer_is_end(tokenizer, token)) return KVL_OK;
        r->draft[r->n_draft++] = token;
        KVL_TRY(kvl_session_append(r->session, &token, 1, error));
        const uint32_t at = kvl_session_n_tokens(r->session) - 1;
        if (r->n_draft < n_most) KVL_TRY(look(r, &at, 1, mass, scores, error));
    }
    return KVL_OK;
}

kvl_status run_draft(run *r, uint32_t n_computed, float *scores, kvl_error *error)
{
    KVL_ASSERT(r->select->n_draft <= RUN_DRAFT_MAX);
    float *mass = kvl_alloc_zero(r->n_ids + RUN_DRAFT_MAX, sizeof *mass);
    if (mass == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to draft an answer");
    r->n_draft = 0; /* an evaluation fills the prompt once more */
    kvl_status status = look(r, r->positions, n_computed, mass, scores, error);
    if (status == KVL_OK) status = decode_draft(r, mass, scores, error);
    kvl_session_truncate(r->session, (uint32_t)r->n_ids);
    kvl_free(mass);
    return status;
}
