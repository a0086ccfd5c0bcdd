/* host/evaluate.c: how far an answer's distributions are from those of full prefill. The
 * reference's own answer is forced behind the prompt's KV, so that both are asked the same
 * questions. */
#include "base/alloc.h"
#include "host/host_parts.h"

#include <math.h>
#include <string.h>

static kvl_digest digest_of_prompt(const run *r)
{
    kvl_digester digester;
    kvl_digester_init(&digester, NULL, 0);
    kvl_digester_add(&digester, r->ids, r->n_ids * sizeof *r->ids);
    return kvl_digester_end(&digester);
}

void reference_deinit(reference *kept)
{
    kvl_free(kept->tokens);
    kvl_free(kept->logits);
    *kept = (reference){0};
}

kvl_status reference_begin(reference *kept, const run *r, kvl_error *error)
{
    const uint32_t n = r->task->max_tokens;
    const size_t n_vocab = r->host->engine->shape->n_vocab;
    if (n > kept->n_positions_max) {
        reference_deinit(kept);
        kept->tokens = kvl_alloc_zero(n, sizeof *kept->tokens);
        kept->logits = kvl_alloc_aligned(n * n_vocab * sizeof(float));
        if (kept->tokens == NULL || kept->logits == NULL) {
            reference_deinit(kept);
            return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to compare %u tokens", n);
        }
        kept->n_positions_max = n;
    }
    kept->prompt = digest_of_prompt(r);
    kept->n_tokens = 0;
    kept->n_positions = 0;
    return KVL_OK;
}

void reference_add(reference *kept, uint32_t n_vocab, const float *logits)
{
    KVL_ASSERT(kept->n_positions < kept->n_positions_max);
    memcpy(kept->logits + (size_t)kept->n_positions * n_vocab, logits, n_vocab * sizeof(float));
    kept->n_positions++;
}

static double log_sum_exp(const float *logits, uint32_t n, uint32_t *best)
{
    *best = 0;
    for (uint32_t i = 1; i < n; i++) {
        if (logits[i] > logits[*best]) *best = i;
    }
    double sum = 0.0;
    for (uint32_t i = 0; i < n; i++) sum += exp((double)(logits[i] - logits[*best]));
    return (double)logits[*best] + log(sum);
}

double divergence(const float *full, const float *reused, uint32_t n_vocab, bool *agrees)
{
    uint32_t best_full = 0;
    uint32_t best_reused = 0;
    const double norm_full = log_sum_exp(full, n_vocab, &best_full);
    const double norm_reused = log_sum_exp(reused, n_vocab, &best_reused);
    double kl = 0.0;
    for (uint32_t i = 0; i < n_vocab; i++) {
        const double log_full = (double)full[i] - norm_full;
        kl += exp(log_full) * (log_full - ((double)reused[i] - norm_reused));
    }
    *agrees = best_full == best_reused;
    /* Rounding can leave a sum of nothing slightly below zero. */
    return kl > 0.0 ? kl : 0.0;
}

typedef struct comparison {
    const float *full, *reused; /* [n_positions][n_vocab] */
    uint32_t n_vocab;
    double *kl; /* [n_positions] */
    bool *agrees;
} comparison;

static void compare_position(void *context, size_t at, size_t thread)
{
    (void)thread;
    const comparison *c = context;
    c->kl[at] = divergence(c->full + at * c->n_vocab, c->reused + at * c->n_vocab, c->n_vocab,
                           &c->agrees[at]);
}

static void summarise(run *r, const float *reused, Kvloom__V1__Evaluation *evaluation, double *kl,
                      bool *agrees)
{
    const reference *kept = &r->host->reference;
    comparison c = {kept->logits, reused, r->host->engine->shape->n_vocab, kl, agrees};
    kvl_pool_run(r->host->engine->threads, compare_position, &c, kept->n_positions);
    double sum = 0.0;
    double n_agree = 0.0;
    for (uint32_t i = 0; i < kept->n_positions; i++) {
        sum += kl[i];
        n_agree += agrees[i] ? 1.0 : 0.0;
    }
    evaluation->n_positions = kept->n_positions;
    evaluation->kl = sum / kept->n_positions;
    evaluation->top1_agreement = n_agree / kept->n_positions;
}

/* The reference's answer in one batch; the last token of the prompt goes first: its logits are
 * those of the first token. */
static kvl_status force(run *r, uint32_t n, float *reused, kvl_error *error)
{
    const uint32_t n_prompt = (uint32_t)r->n_ids;
    KVL_TRY(kvl_session_append(r->session, r->host->reference.tokens, n - 1, error));
    return kvl_session_compute_range(r->session, n_prompt - 1, n_prompt - 1 + n, n, reused, error);
}

/* Token by token over the prompt as it was filled at first, refreshed as it was while the answer
 * was decoded. */
static kvl_status force_refreshing(run *r, uint32_t n, float *reused, kvl_error *error)
{
    const size_t n_vocab = r->host->engine->shape->n_vocab;
    if (!run_loads_beside(r)) KVL_TRY(run_load_bases(r, error));
    KVL_TRY(run_fill(r, true, error));
    memcpy(reused, r->host->logits, n_vocab * sizeof *reused);
    KVL_TRY(run_begin_refresh(r, error));
    for (uint32_t i = 1; i < n; i++) {
        KVL_TRY(kvl_session_append(r->session, &r->host->reference.tokens[i - 1], 1, error));
        KVL_TRY(kvl_refresh_step(&r->refresh, r->session, 1, reused + i * n_vocab, error));
    }
    return KVL_OK;
}

kvl_status run_evaluate(run *r, bool refreshes, Kvloom__V1__Evaluation *evaluation,
                        kvl_error *error)
{
    const reference *kept = &r->host->reference;
    const kvl_digest prompt = digest_of_prompt(r);
    if (kept->n_positions == 0 || !kvl_digest_equal(&kept->prompt, &prompt))
        return KVL_FAIL(error, KVL_ERR_NOT_FOUND,
                        "no full run of this prompt came before; run it with MODE_FULL first");
    const uint32_t n = kept->n_positions;
    const uint32_t n_prompt = (uint32_t)r->n_ids;
    kvl_session_truncate(r->session, n_prompt);
    float *reused = kvl_alloc_aligned((size_t)n * r->host->engine->shape->n_vocab * sizeof(float));
    double *kl = kvl_alloc_zero(n, sizeof *kl);
    bool *agrees = kvl_alloc_zero(n, sizeof *agrees);
    kvl_status status = KVL_OK;
    if (reused == NULL || kl == NULL || agrees == NULL)
        status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to compare %u tokens", n);
    if (status == KVL_OK)
        status = refreshes ? force_refreshing(r, n, reused, error) : force(r, n, reused, error);
    if (status == KVL_OK) summarise(r, reused, evaluation, kl, agrees);
    kvl_session_truncate(r->session, n_prompt);
    kvl_free(agrees);
    kvl_free(kl);
    kvl_free(reused);
    return status;
}
