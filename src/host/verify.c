/* host/verify.c: approximation as a head start, never the last word. The answer that approximate KV
 * gave is held against exact KV: what agrees stays, and decoding goes on from the first token that
 * does not. */
#include "base/alloc.h"
#include "forward/forward.h"
#include "host/decode.h"
#include "host/host_parts.h"

#include <string.h>

static kvl_status correct(run *r, exact_check *check, kvl_error *error)
{
    kvl_host *host = r->host;
    if (!check->has_differed && (r->ended || r->n_answer == r->task->max_tokens)) return KVL_OK;
    kvl_session_truncate(check->session, (uint32_t)r->n_ids + check->n_agreed);
    memcpy(host->logits, check->next, host->engine->shape->n_vocab * sizeof *host->logits);
    const kvl_decode_options options = {.max_tokens = r->task->max_tokens - check->n_agreed,
                                        .keep_last = true};
    uint32_t n_more = 0;
    KVL_TRY(kvl_decode(check->session, host->engine, &options, host->logits, &n_more, &r->ended,
                       NULL, error));
    const uint32_t n_before = r->n_answer;
    r->n_answer = check->n_agreed + n_more;
    r->n_corrected = (n_before > r->n_answer ? n_before : r->n_answer) - check->n_agreed;
    return KVL_OK;
}

kvl_status run_verify(run *r, kvl_error *error)
{
    kvl_host *host = r->host;
    const int64_t start = kvl_clock_now(host->clock);
    kvl_sent_answer sent = {0};
    KVL_TRY(run_copy_sent(r, &sent, error));
    exact_check check = {.stops_at_first = true};
    kvl_status status =
        exact_check_begin(&check, host->engine, &sent, r->task->max_tokens - r->n_answer, error);
    while (status == KVL_OK && !exact_check_is_done(&check))
        status = exact_check_step(&check, KVL_FORWARD_ROWS_MAX, error);
    if (status == KVL_OK) status = correct(r, &check, error);
    if (status == KVL_OK) {
        kvl_session_destroy(r->session);
        r->session = check.session;
        check.session = NULL;
        r->is_verified = true;
        r->verify_ns += kvl_clock_now(host->clock) - start;
    }
    exact_check_end(&check);
    kvl_free(sent.tokens);
    return status;
}
