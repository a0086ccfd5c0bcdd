/* host/check.c: prefills in slices and compares as it goes. */
#include "host/check.h"

#include "base/alloc.h"
#include "host/decode.h"

#include <string.h>

/* Rows of logits at once: with 150,000 words each has 600 KB. */
enum { CHECK_LOGITS = 32 };

static kvl_status allocate(exact_check *check, kvl_engine *engine, const kvl_sent_answer *sent,
                           kvl_error *error)
{
    const size_t n_vocab = engine->shape->n_vocab;
    check->engine = engine;
    check->sent = sent;
    check->logits = kvl_alloc_aligned(CHECK_LOGITS * n_vocab * sizeof *check->logits);
    check->next = kvl_alloc_aligned(n_vocab * sizeof *check->next);
    if (check->logits == NULL || check->next == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to check %u tokens", sent->n_answer);
    return KVL_OK;
}

kvl_status exact_check_begin_on(exact_check *check, kvl_engine *engine, const kvl_sent_answer *sent,
                                kvl_session *session, kvl_error *error)
{
    KVL_TRY(allocate(check, engine, sent, error));
    check->session = session;
    check->n_done = sent->n_prompt - 1; /* its row gives the first token */
    return KVL_OK;
}

kvl_status exact_check_begin(exact_check *check, kvl_engine *engine, const kvl_sent_answer *sent,
                             uint32_t n_more, kvl_error *error)
{
    KVL_TRY(allocate(check, engine, sent, error));
    KVL_TRY(kvl_session_create(engine, &check->session, error));
    /* The session begins with the prompt alone: of that, the last token is never shared, so its row
     * is computed, which gives the first token of the answer. */
    KVL_TRY(kvl_session_begin(check->session, sent->tokens, sent->n_prompt, sent->n_answer + n_more,
                              true, sent->salt, &check->n_done, error));
    return kvl_session_append(check->session, sent->tokens + sent->n_prompt, sent->n_answer, error);
}

/* Exact logits before token `at` of the answer, or behind its last one. An answer that stopped
 * because the model ended it agrees there if exact KV ends it too; one that reached its limit says
 * nothing of what comes next. */
static void compare(exact_check *check, uint32_t at, const float *logits)
{
    const kvl_sent_answer *sent = check->sent;
    const uint32_t n_vocab = check->engine->shape->n_vocab;
    const uint32_t exact = kvl_draw_token(logits, n_vocab, 0.0F, NULL);
    const bool is_behind = at == sent->n_answer;
    const kvl_tokenizer *tokenizer = kvl_model_tokenizer(check->engine->model);
    const bool agrees = is_behind ? !sent->ended || kvl_tokenizer_is_end(tokenizer, exact)
                                  : exact == sent->tokens[sent->n_prompt + at];
    if (!check->has_differed && (!agrees || is_behind))
        memcpy(check->next, logits, n_vocab * sizeof *logits);
    if (check->row != NULL) check->row(check->context, at, logits);
    if (!agrees) {
        check->n_differed++;
        check->has_differed = true;
    }
    if (!check->has_differed && !is_behind) check->n_agreed++;
}

bool exact_check_is_done(const exact_check *check)
{
    return check->n_done == check->sent->n_prompt + check->sent->n_answer ||
           (check->stops_at_first && check->has_differed);
}

kvl_status exact_check_step(exact_check *check, uint32_t n_rows, kvl_error *error)
{
    const uint32_t n_prompt = check->sent->n_prompt;
    const uint32_t n_all = n_prompt + check->sent->n_answer;
    const uint32_t first = check->n_done;
    const uint32_t told_first = first > n_prompt - 1 ? first : n_prompt - 1;
    uint32_t past = n_rows < n_all - first ? first + n_rows : n_all;
    if (past > told_first + CHECK_LOGITS) past = told_first + CHECK_LOGITS;
    const uint32_t n_logits = past > told_first ? past - told_first : 0;
    KVL_TRY(kvl_session_compute_range(check->session, first, past, n_logits, check->logits, error));
    check->n_done = past;
    for (uint32_t i = 0; i < n_logits; i++)
        compare(check, told_first + i - (n_prompt - 1),
                check->logits + (size_t)i * check->engine->shape->n_vocab);
    return KVL_OK;
}

void exact_check_end(exact_check *check)
{
    kvl_session_destroy(check->session);
    kvl_free(check->logits);
    kvl_free(check->next);
    *check = (exact_check){0};
}
