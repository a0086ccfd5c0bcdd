/* host/decode.c: draw, append, compute, again. */
#include "host/decode.h"

#include <math.h>

static uint32_t highest(const float *logits, uint32_t n_vocab)
{
    uint32_t best = 0;
    for (uint32_t id = 1; id < n_vocab; id++) {
        if (logits[id] > logits[best]) best = id;
    }
    return best;
}

uint32_t kvl_draw_token(const float *logits, uint32_t n_vocab, float temperature,
                        kvl_random *random)
{
    const uint32_t best = highest(logits, n_vocab);
    if (!(temperature > 0.0F)) return best;
    /* Relative to the highest, so that nothing overflows; the sum is in double, since 49,152 small
     * terms added one by one in float would lose the tail. */
    double sum = 0.0;
    for (uint32_t id = 0; id < n_vocab; id++)
        sum += exp((double)(logits[id] - logits[best]) / (double)temperature);
    double left = (double)kvl_random_uniform(random) * sum;
    for (uint32_t id = 0; id < n_vocab; id++) {
        left -= exp((double)(logits[id] - logits[best]) / (double)temperature);
        if (left < 0.0) return id;
    }
    return best;
}

float kvl_top_probability(const float *logits, uint32_t n_vocab)
{
    const float most = logits[highest(logits, n_vocab)];
    double sum = 0.0;
    for (uint32_t id = 0; id < n_vocab; id++) sum += exp((double)(logits[id] - most));
    return (float)(1.0 / sum);
}

static kvl_status compute_last(kvl_session *session, const kvl_decode_options *options,
                               uint32_t n_logits, float *logits, kvl_error *error)
{
    if (options->compute != NULL)
        return options->compute(options->context, session, n_logits, logits, error);
    const uint32_t at = kvl_session_n_tokens(session) - 1;
    return kvl_session_compute_range(session, at, at + 1, n_logits, logits, error);
}

kvl_status kvl_decode(kvl_session *session, kvl_engine *engine, const kvl_decode_options *options,
                      float *logits, uint32_t *n_tokens, bool *ended, kvl_error *error)
{
    const kvl_tokenizer *tokenizer = kvl_model_tokenizer(engine->model);
    kvl_random random = {options->seed};
    *n_tokens = 0;
    *ended = false;
    while (*n_tokens < options->max_tokens) {
        const uint32_t token =
            kvl_draw_token(logits, engine->shape->n_vocab, options->temperature, &random);
        const bool stop = options->drawn != NULL && options->drawn(options->context, token, logits);
        *ended = kvl_tokenizer_is_end(tokenizer, token);
        if (*ended) return KVL_OK;
        KVL_TRY(kvl_session_append(session, &token, 1, error));
        *n_tokens += 1;
        const bool last = stop || *n_tokens == options->max_tokens;
        if (last && !options->keep_last) return KVL_OK;
        KVL_TRY(compute_last(session, options, last ? 0 : 1, logits, error));
        if (last) return KVL_OK;
    }
    return KVL_OK;
}
