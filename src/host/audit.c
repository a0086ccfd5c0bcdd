/* host/audit.c: what of a run is looked at again, when it has been answered. */
#include "base/alloc.h"
#include "host/decode.h"
#include "host/host_parts.h"

#include <stdio.h>
#include <string.h>

/* Rows of logits of a small model have 200 KB, of a large one 600 KB. */
enum { AUDITED_TOKENS = 32 };

void run_begin_audit(run *r)
{
    r->lowest_probability = 1.0F;
    if (r->is_exact || !quality_draws_audit(&r->host->quality)) return;
    /* Healing comes first: an audit that would push it out is not worth it. */
    if (r->host->heals.n >= KVL_HEALS_MAX / 2) {
        r->host->quality.n_audits_skipped++;
        return;
    }
    const size_t n = AUDITED_TOKENS;
    r->sent_logits = kvl_alloc_aligned(n * r->host->engine->shape->n_vocab * sizeof(float));
    if (r->sent_logits == NULL) r->host->quality.n_audits_skipped++;
}

void run_watch(run *r, const float *logits)
{
    const uint32_t n_vocab = r->host->engine->shape->n_vocab;
    if (r->task->gate) {
        const float top = kvl_top_probability(logits, n_vocab);
        if (top < r->lowest_probability) r->lowest_probability = top;
    }
    if (r->sent_logits == NULL || r->n_sent_logits == AUDITED_TOKENS) return;
    memcpy(r->sent_logits + (size_t)r->n_sent_logits++ * n_vocab, logits, n_vocab * sizeof *logits);
}

static void fill_shares(const run *r, double *shares)
{
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const kvl_plan_step *step = &r->parts[p].step;
        shares[step->action] += (double)step->n_reused / (double)r->n_ids;
    }
}

void run_check_later(run *r)
{
    const bool swaps =
        r->task->quality == KVLOOM__V1__QUALITY__QUALITY_HEALED && !r->is_exact && !r->is_verified;
    if (r->sent.tokens == NULL || (!swaps && r->sent_logits == NULL)) return;
    heal_request asked = {
        .sent = r->sent,
        .home = r->answer_home,
        .swaps = swaps,
        .reused = r->sent_logits,
        .n_reused = r->n_sent_logits,
        /* One that was verified has taught the gate already. */
        .has_score = r->is_gated && !r->is_healed_first,
        .score = r->gate_score,
    };
    (void)snprintf(asked.workflow, sizeof asked.workflow, "%s", r->task->workflow);
    (void)snprintf(asked.template_name, sizeof asked.template_name, "%s", r->task->template_name);
    fill_shares(r, asked.shares);
    run_make_lesson(r, &asked.lesson);
    r->sent = (kvl_sent_answer){0};
    r->sent_logits = NULL;
    heal_add(r->host, &asked);
    r->is_healing = swaps;
}
