/* host/verify.c: approximation as a head start, never the last word. The answer that approximate KV
 * gave is held against exact KV in one pass, as in speculative decoding (arXiv:2211.17192, greedy
 * case): what agrees stays, and decoding goes on from the first token that does not. */
#include "base/alloc.h"
#include "host/decode.h"
#include "host/host_parts.h"

#include <string.h>

/* The likeliest token of one row of logits: kvl_draw_token without temperature. */
static uint32_t likeliest(const run *r, const float *logits)
{
    return kvl_draw_token(logits, r->host->engine->shape->n_vocab, 0.0F, NULL);
}

/* How many of the answer's first tokens exact KV would have given. A row of logits for each of them
 * and one for what comes behind the last. */
static uint32_t count_agreed(const run *r, const uint32_t *answer, const float *logits)
{
    const size_t n_vocab = r->host->engine->shape->n_vocab;
    uint32_t n = 0;
    while (n < r->n_answer && likeliest(r, logits + n * n_vocab) == answer[n]) n++;
    return n;
}

/* Computes prompt and answer exactly; logits [n_answer + 1][n_vocab]. The session begins with the
 * prompt alone: of that, the last token is never shared, so its row is computed. */
static kvl_status prefill(run *r, kvl_session *exact, const uint32_t *tokens, float *logits,
                          kvl_error *error)
{
    const uint32_t n_prompt = (uint32_t)r->n_ids;
    uint32_t n_shared = 0;
    KVL_TRY(kvl_session_begin(exact, tokens, n_prompt, r->task->max_tokens, true, r->salt,
                              &n_shared, error));
    KVL_TRY(kvl_session_append(exact, tokens + n_prompt, r->n_answer, error));
    return kvl_session_compute_range(exact, n_shared, n_prompt + r->n_answer, r->n_answer + 1,
                                     logits, error);
}

static kvl_status correct(run *r, kvl_session *exact, uint32_t n_agreed, const float *logits,
                          kvl_error *error)
{
    kvl_host *host = r->host;
    const size_t n_vocab = host->engine->shape->n_vocab;
    const bool all_agreed = n_agreed == r->n_answer;
    /* The answer stops where it stopped, if that is where exact KV stops too. */
    const uint32_t next = likeliest(r, logits + n_agreed * n_vocab);
    const bool ends = kvl_tokenizer_is_end(kvl_model_tokenizer(host->engine->model), next);
    if (all_agreed && (r->n_answer == r->task->max_tokens || (r->ended && ends))) return KVL_OK;
    kvl_session_truncate(exact, (uint32_t)r->n_ids + n_agreed);
    memcpy(host->logits, logits + n_agreed * n_vocab, n_vocab * sizeof *logits);
    const kvl_decode_options options = {.max_tokens = r->task->max_tokens - n_agreed,
                                        .keep_last = true};
    uint32_t n_more = 0;
    KVL_TRY(kvl_decode(exact, host->engine, &options, host->logits, &n_more, &r->ended, error));
    const uint32_t n_before = r->n_answer;
    r->n_answer = n_agreed + n_more;
    r->n_corrected = (n_before > r->n_answer ? n_before : r->n_answer) - n_agreed;
    return KVL_OK;
}

kvl_status run_verify(run *r, kvl_error *error)
{
    kvl_host *host = r->host;
    const int64_t start = kvl_clock_now(host->clock);
    const uint32_t *tokens = kvl_session_tokens(r->session);
    float *logits =
        kvl_alloc_aligned((size_t)(r->n_answer + 1) * host->engine->shape->n_vocab * sizeof(float));
    kvl_session *exact = NULL;
    if (logits == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to check %u tokens", r->n_answer);
    kvl_status status = kvl_session_create(host->engine, &exact, error);
    if (status == KVL_OK) status = prefill(r, exact, tokens, logits, error);
    if (status == KVL_OK)
        status = correct(r, exact, count_agreed(r, tokens + r->n_ids, logits), logits, error);
    kvl_free(logits);
    if (status != KVL_OK) {
        kvl_session_destroy(exact);
        return status;
    }
    kvl_session_destroy(r->session);
    r->session = exact;
    r->is_verified = true;
    r->verify_ns += kvl_clock_now(host->clock) - start;
    return KVL_OK;
}
