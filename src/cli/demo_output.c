/* cli/demo_output.c: what the demo prints: lines as it goes, a table, or JSON. */
#include "cli/demo.h"

#include <jansson.h>
#include <string.h>

demo_counts demo_count(const Kvloom__V1__RunReply *reply)
{
    demo_counts counts = {.fetched_bytes = reply->fetched_bytes};
    for (size_t p = 0; p < reply->n_parts; p++) {
        counts.shared += reply->parts[p]->shared;
        counts.placed += reply->parts[p]->placed;
        counts.offset += reply->parts[p]->offset;
        counts.computed += reply->parts[p]->computed;
    }
    return counts;
}

/* Figures are those of the rounds in which anchors can be used; a shorter demo has only others. */
static uint32_t first_counted_round(const demo *d)
{
    return d->n_rounds_done > DEMO_STEADY_ROUND ? DEMO_STEADY_ROUND : 0;
}

static void add_cell(demo_figures *f, const demo_cell *cell)
{
    const demo_counts counts = demo_count(cell->reuse);
    f->n++;
    f->prompt_tokens += cell->reuse->prompt_tokens;
    f->shared += counts.shared;
    f->placed += counts.placed;
    f->offset += counts.offset;
    f->computed += counts.computed;
    f->fetched_bytes += (double)counts.fetched_bytes;
    f->ttft_full_ms += demo_full_of(cell)->ttft_ms;
    f->ttft_reuse_ms += cell->reuse->ttft_ms;
    const Kvloom__V1__Evaluation *reuse = cell->reuse->evaluation;
    /* An exact run has nothing to place: both ways are the same run. */
    const Kvloom__V1__Evaluation *place =
        cell->reuse->place_only != NULL ? cell->reuse->place_only : reuse;
    if (reuse == NULL) return;
    f->n_compared++;
    f->top1 += reuse->top1_agreement;
    f->kl += reuse->kl;
    f->place_only_top1 += place->top1_agreement;
    f->place_only_kl += place->kl;
}

static void divide(demo_figures *f)
{
    if (f->n == 0) return;
    double *const means[] = {&f->prompt_tokens, &f->shared,       &f->placed,
                             &f->offset,        &f->computed,     &f->fetched_bytes,
                             &f->ttft_full_ms,  &f->ttft_reuse_ms};
    for (size_t i = 0; i < sizeof means / sizeof *means; i++) *means[i] /= f->n;
    if (f->ttft_reuse_ms > 0.0) f->speedup = f->ttft_full_ms / f->ttft_reuse_ms;
    if (f->n_compared == 0) return;
    double *const compared[] = {&f->top1, &f->kl, &f->place_only_top1, &f->place_only_kl};
    for (size_t i = 0; i < sizeof compared / sizeof *compared; i++) *compared[i] /= f->n_compared;
}

static void add_quality(const demo_figures *f, demo_summary *s)
{
    if (f->n_compared == 0) return;
    s->n_compared++;
    s->top1 += f->top1;
    s->kl += f->kl;
    s->place_only_top1 += f->place_only_top1;
    s->place_only_kl += f->place_only_kl;
}

static void divide_quality(demo_summary *s)
{
    if (s->n_compared == 0) return;
    double *const means[] = {&s->top1, &s->kl, &s->place_only_top1, &s->place_only_kl};
    for (size_t i = 0; i < sizeof means / sizeof *means; i++) *means[i] /= s->n_compared;
}

void demo_summarise(const demo *d, demo_summary *s)
{
    *s = (demo_summary){0};
    const uint32_t n_agents = d->options->n_agents;
    double reused = 0.0;
    double tokens = 0.0;
    for (uint32_t a = 0; a < n_agents; a++) {
        for (uint32_t r = 0; r < d->n_rounds_done; r++) {
            const demo_cell *cell = &d->cells[r][a];
            if (cell->reuse == NULL) continue;
            if (cell->reuse->exact) s->wrong_exact_tokens += cell->reuse->wrong_tokens;
            if (r >= first_counted_round(d)) add_cell(&s->agents[a], cell);
        }
        demo_figures *f = &s->agents[a];
        reused += (f->shared + f->placed + f->offset) * f->n;
        tokens += f->prompt_tokens * f->n;
        divide(f);
        add_quality(f, s);
        if (a > 0) s->speedup_mean += f->speedup / (n_agents - 1);
    }
    divide_quality(s);
    s->speedup_last = s->agents[n_agents - 1].speedup;
    if (n_agents == 1) s->speedup_mean = s->speedup_last;
    s->reuse_rate = tokens > 0.0 ? reused / tokens : 0.0;
}

void demo_print_start(const demo *d)
{
    if (d->options->json) return;
    (void)printf("%u agent hosts, each with its own store, joined by ZeroMQ\n"
                 "TTFT: time to first token, full prefill -> with reuse, same host and threads\n"
                 "KL, top-1: next-token distributions against full prefill\n\n",
                 d->options->n_agents);
    (void)fflush(stdout);
}

static void print_answer(const char *label, const Kvloom__V1__RunReply *reply)
{
    (void)printf("      %s: ", label);
    for (size_t i = 0; i < reply->text.len; i++) {
        const char c = (char)reply->text.data[i];
        if (c == '\n')
            (void)printf("\n      ");
        else
            (void)putchar(c);
    }
    (void)printf("\n");
}

static void print_missing(const Kvloom__V1__RunReply *reply)
{
    for (size_t p = 0; p < reply->n_parts; p++) {
        const Kvloom__V1__PartReport *part = reply->parts[p];
        if (strstr(part->reason, "not to be had") != NULL)
            (void)printf("      dense prefill of {%s}, %u tokens: %s\n", part->slot, part->n_tokens,
                         part->reason);
    }
}

void demo_print_cell(const demo *d, uint32_t round, uint32_t agent)
{
    if (d->options->json) return;
    const demo_cell *cell = &d->cells[round][agent];
    const Kvloom__V1__RunReply *full = demo_full_of(cell);
    const Kvloom__V1__RunReply *reuse = cell->reuse;
    const demo_counts n = demo_count(reuse);
    if (agent == 0)
        (void)printf("round %u: %s\n", round + 1,
                     d->workflow.short_questions[round % d->workflow.n_rounds]);
    (void)printf("  %-12s %5u tokens: %4u shared %4u placed %4u offset %4u computed, %5.1f MB "
                 "fetched, TTFT %6.0f -> %5.0f ms (%.1fx)",
                 d->workflow.agents[agent].name, reuse->prompt_tokens, n.shared, n.placed, n.offset,
                 n.computed, (double)n.fetched_bytes / 1e6, full->ttft_ms, reuse->ttft_ms,
                 full->ttft_ms / reuse->ttft_ms);
    if (cell->full == NULL)
        (void)printf(", nothing to reuse yet");
    else if (reuse->exact)
        (void)printf(", exact, %u wrong", reuse->wrong_tokens);
    else if (reuse->evaluation != NULL)
        (void)printf(", KL %.4f, top-1 %.3f", reuse->evaluation->kl,
                     reuse->evaluation->top1_agreement);
    (void)printf("%s\n", cell->is_substitute ? ", by another host" : "");
    print_missing(reuse);
    if (d->options->is_verbose)
        (void)printf("      fetch %.1f, correct %.1f, place %.1f, compute %.1f ms\n",
                     reuse->fetch_ms, reuse->correct_ms, reuse->place_ms, reuse->compute_ms);
    if (d->options->show_answers) {
        print_answer("full ", full);
        print_answer("reuse", reuse);
    }
    (void)fflush(stdout);
}

void demo_print_table(const demo *d, const demo_summary *s)
{
    (void)printf("\nMeans of rounds %u to %u\n"
                 "agent         tokens  shared  placed  offset  computed  fetched  TTFT full  "
                 "reuse  ratio  top-1     KL  | place only: top-1     KL\n",
                 first_counted_round(d) + 1, d->n_rounds_done);
    for (uint32_t a = 0; a < d->options->n_agents; a++) {
        const demo_figures *f = &s->agents[a];
        (void)printf("%-12s %7.0f %7.0f %7.0f %7.0f %9.0f %5.1f MB %7.0f ms %3.0f ms %5.1fx "
                     "%6.3f %6.4f  |             %6.3f %6.4f\n",
                     d->workflow.agents[a].name, f->prompt_tokens, f->shared, f->placed, f->offset,
                     f->computed, f->fetched_bytes / 1e6, f->ttft_full_ms, f->ttft_reuse_ms,
                     f->speedup, f->top1, f->kl, f->place_only_top1, f->place_only_kl);
    }
    (void)printf(
        "\nreused %.1f %% of prompt tokens; TTFT %.1fx faster for the last agent, %.1fx on "
        "average from the second on\n"
        "anchors: top-1 %.4f, KL %.5f; placed without them: top-1 %.4f, KL %.5f\n"
        "exact runs: %u wrong tokens\n",
        100.0 * s->reuse_rate, s->speedup_last, s->speedup_mean, s->top1, s->kl, s->place_only_top1,
        s->place_only_kl, s->wrong_exact_tokens);
}

/* Measures of quality are null where nothing was compared: 0 would look measured. */
static void add_measures(json_t *object, uint32_t n_compared, const double *values)
{
    static const char *const names[] = {"top1_agreement", "kl", "place_only_top1_agreement",
                                        "place_only_kl"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        (void)json_object_set_new(object, names[i],
                                  n_compared > 0 ? json_real(values[i]) : json_null());
}

static json_t *agent_json(const demo *d, const demo_figures *f, uint32_t agent)
{
    json_t *row =
        json_pack("{s:s, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "name",
                  d->workflow.agents[agent].name, "prompt_tokens", f->prompt_tokens, "shared",
                  f->shared, "placed", f->placed, "offset", f->offset, "blended", f->blended,
                  "computed", f->computed, "fetched_bytes", f->fetched_bytes, "ttft_full_ms",
                  f->ttft_full_ms, "ttft_reuse_ms", f->ttft_reuse_ms, "speedup", f->speedup);
    add_measures(row, f->n_compared,
                 (double[]){f->top1, f->kl, f->place_only_top1, f->place_only_kl});
    return row;
}

static json_t *cell_json(const demo *d, uint32_t round, uint32_t agent)
{
    const demo_cell *cell = &d->cells[round][agent];
    const demo_counts n = demo_count(cell->reuse);
    json_t *row = json_pack(
        "{s:i, s:s, s:i, s:i, s:i, s:i, s:i, s:I, s:f, s:f, s:b, s:b, s:i, s:s%, s:s%}", "round",
        (int)round + 1, "agent", d->workflow.agents[agent].name, "prompt_tokens",
        (int)cell->reuse->prompt_tokens, "shared", (int)n.shared, "placed", (int)n.placed, "offset",
        (int)n.offset, "computed", (int)n.computed, "fetched_bytes", (json_int_t)n.fetched_bytes,
        "ttft_full_ms", demo_full_of(cell)->ttft_ms, "ttft_reuse_ms", cell->reuse->ttft_ms, "exact",
        cell->reuse->exact, "substitute", cell->is_substitute, "wrong_tokens",
        (int)cell->reuse->wrong_tokens, "answer_full", (const char *)demo_full_of(cell)->text.data,
        demo_full_of(cell)->text.len, "answer_reuse", (const char *)cell->reuse->text.data,
        cell->reuse->text.len);
    if (row != NULL && cell->reuse->evaluation != NULL) {
        (void)json_object_set_new(row, "top1_agreement",
                                  json_real(cell->reuse->evaluation->top1_agreement));
        (void)json_object_set_new(row, "kl", json_real(cell->reuse->evaluation->kl));
    }
    return row;
}

void demo_print_json(const demo *d, const demo_summary *s)
{
    json_t *agents = json_array();
    json_t *rows = json_array();
    for (uint32_t a = 0; a < d->options->n_agents; a++)
        (void)json_array_append_new(agents, agent_json(d, &s->agents[a], a));
    for (uint32_t r = 0; r < d->n_rounds_done; r++) {
        for (uint32_t a = 0; a < d->options->n_agents; a++)
            (void)json_array_append_new(rows, cell_json(d, r, a));
    }
    json_t *report =
        json_pack("{s:s, s:o, s:i, s:f, s:f, s:f, s:i, s:o, s:s}", "name", "demo", "agents", agents,
                  "rounds", (int)d->n_rounds_done, "reuse_rate", s->reuse_rate, "speedup_mean",
                  s->speedup_mean, "speedup_last", s->speedup_last, "wrong_exact_tokens",
                  (int)s->wrong_exact_tokens, "rows", rows, "version", KVL_VERSION);
    add_measures(report, s->n_compared,
                 (double[]){s->top1, s->kl, s->place_only_top1, s->place_only_kl});
    (void)json_dumpf(report, stdout, JSON_INDENT(2));
    (void)printf("\n");
    json_decref(report);
}
