/* host/decode.c: draw, append, compute, again. */
#include "host/decode.h"

#include "base/alloc.h"

#include <math.h>
#include <string.h>

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

/* One answer as it grows. */
typedef struct decoding {
    kvl_session *session;
    kvl_engine *engine;
    const kvl_decode_options *options;
    float *logits; /* [n_vocab] behind the last token */
    kvl_random random;
    uint32_t n_tokens;
    bool ended, is_done;
} decoding;

/* What comes next; is_done where nothing follows it. */
static uint32_t draw(decoding *d, const float *logits)
{
    const kvl_decode_options *options = d->options;
    const uint32_t token =
        kvl_draw_token(logits, d->engine->shape->n_vocab, options->temperature, &d->random);
    const bool stop = options->drawn != NULL && options->drawn(options->context, token, logits);
    d->ended = kvl_tokenizer_is_end(kvl_model_tokenizer(d->engine->model), token);
    if (!d->ended) d->n_tokens++;
    d->is_done = d->ended || stop || d->n_tokens == options->max_tokens;
    return token;
}

static kvl_status decode_token(decoding *d, kvl_error *error)
{
    const uint32_t token = draw(d, d->logits);
    if (d->ended) return KVL_OK;
    KVL_TRY(kvl_session_append(d->session, &token, 1, error));
    if (d->is_done && !d->options->keep_last) return KVL_OK;
    const uint32_t at = kvl_session_n_tokens(d->session) - 1;
    return kvl_session_compute_range(d->session, at, at + 1, d->is_done ? 0 : 1, d->logits, error);
}

/* rows [n][n_vocab]: behind each token of the guess. The first token was drawn already, and is the
 * guess's. */
static void confirm(decoding *d, uint32_t n, const float *rows, uint32_t first, uint32_t *n_kept)
{
    const size_t n_vocab = d->engine->shape->n_vocab;
    uint32_t kept = 1;
    while (!d->is_done && kept < n) {
        const float *logits = rows + (kept - 1) * n_vocab;
        if (kvl_draw_token(logits, (uint32_t)n_vocab, 0.0F, NULL) != d->options->guess[kept]) break;
        (void)draw(d, logits);
        kept++;
    }
    memcpy(d->logits, rows + (kept - 1) * n_vocab, n_vocab * sizeof *rows);
    kvl_session_truncate(d->session, first + kept);
    *n_kept = kept;
}

static kvl_status take_guess(decoding *d, uint32_t *n_kept, kvl_error *error)
{
    const kvl_decode_options *options = d->options;
    const uint32_t n_vocab = d->engine->shape->n_vocab;
    const uint32_t n =
        options->n_guess < options->max_tokens ? options->n_guess : options->max_tokens;
    if (n == 0 || kvl_draw_token(d->logits, n_vocab, 0.0F, NULL) != options->guess[0])
        return KVL_OK;
    const uint32_t first = kvl_session_n_tokens(d->session);
    float *rows = kvl_alloc_aligned((size_t)n * n_vocab * sizeof *rows);
    if (rows == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for %u tokens", n);
    (void)draw(d, d->logits);
    kvl_status status = kvl_session_append(d->session, options->guess, n, error);
    if (status == KVL_OK)
        status = kvl_session_compute_range(d->session, first, first + n, n, rows, error);
    if (status == KVL_OK) confirm(d, n, rows, first, n_kept);
    kvl_free(rows);
    return status;
}

kvl_status kvl_decode(kvl_session *session, kvl_engine *engine, const kvl_decode_options *options,
                      float *logits, uint32_t *n_tokens, bool *ended, uint32_t *n_kept,
                      kvl_error *error)
{
    KVL_ASSERT(options->n_guess == 0 || !(options->temperature > 0.0F));
    decoding d = {session,         engine, options, logits,
                  {options->seed}, 0,      false,   options->max_tokens == 0};
    uint32_t kept = 0;
    kvl_status status = d.is_done ? KVL_OK : take_guess(&d, &kept, error);
    while (status == KVL_OK && !d.is_done) status = decode_token(&d, error);
    *n_tokens = d.n_tokens;
    *ended = d.ended;
    if (n_kept != NULL) *n_kept = kept;
    return status;
}
