/* cli/eval_output.c: the figures, the table, and one JSON object with both. */
#include "cli/eval.h"

#include <jansson.h>

enum {
    FACTS = 1U << EVAL_NEEDLE | 1U << EVAL_CUT,
    READ = 1U << EVAL_READ,
    OPEN = 1U << EVAL_OPEN,
    AGENTS = 1U << EVAL_AGENTS,
    EDITED = 1U << EVAL_EDITED,
    ASKED = 1U << EVAL_ASKED,
    CHUNKS = FACTS | EDITED | READ | OPEN | ASKED,
    ALL = CHUNKS | AGENTS
};

#define BALANCED "sink8+query10"
#define CACHEBLEND "deviation15"

typedef struct figure {
    const char *name, *policy, *minus;
    unsigned kinds;
    size_t offset;
} figure;

static const figure figures[] = {
    {"em_balanced", BALANCED, NULL, FACTS, offsetof(eval_record, exact)},
    {"em_fast", "sink8", NULL, FACTS, offsetof(eval_record, exact)},
    {"em_verified", "verified", NULL, ALL, offsetof(eval_record, exact)},
    {"read_full", "full", NULL, READ, offsetof(eval_record, right)},
    {"read_balanced", BALANCED, NULL, READ, offsetof(eval_record, right)},
    {"facts_full", "full", NULL, FACTS, offsetof(eval_record, right)},
    {"facts_balanced", BALANCED, NULL, FACTS, offsetof(eval_record, right)},
    {"em_balanced_asked", BALANCED, NULL, ASKED, offsetof(eval_record, exact)},
    {"asked_full", "full", NULL, ASKED, offsetof(eval_record, right)},
    {"asked_balanced", BALANCED, NULL, ASKED, offsetof(eval_record, right)},
    {"edited_full", "full", NULL, EDITED, offsetof(eval_record, right)},
    {"edited_balanced", BALANCED, NULL, EDITED, offsetof(eval_record, right)},
    {"acc_pooled_balanced", BALANCED, NULL, FACTS | READ, offsetof(eval_record, right)},
    {"acc_pooled_fast", "sink8", NULL, FACTS | READ, offsetof(eval_record, right)},
    {"acc_pooled_cacheblend15", CACHEBLEND, NULL, FACTS | READ, offsetof(eval_record, right)},
    {"acc_balanced_minus_cacheblend15", BALANCED, CACHEBLEND, FACTS | READ,
     offsetof(eval_record, right)},
    {"kl_balanced_open", BALANCED, NULL, OPEN, offsetof(eval_record, kl)},
    {"kl_fast_open", "sink8", NULL, OPEN, offsetof(eval_record, kl)},
    {"kl_cacheblend15_open", CACHEBLEND, NULL, OPEN, offsetof(eval_record, kl)},
    {"kl_balanced_agents", BALANCED, NULL, AGENTS, offsetof(eval_record, kl)},
    {"top1_balanced_agents", BALANCED, NULL, AGENTS, offsetof(eval_record, top1)},
    {"gate_share", "gate", NULL, CHUNKS, offsetof(eval_record, healed_first)},
    {"corrected_verified", "verified", NULL, ALL, offsetof(eval_record, corrected)},
    {"recomputed_balanced", BALANCED, NULL, CHUNKS, offsetof(eval_record, recomputed)},
    {"recomputed_fast", "sink8", NULL, CHUNKS, offsetof(eval_record, recomputed)},
    {"work_balanced", BALANCED, NULL, CHUNKS, offsetof(eval_record, work)},
};

/* Of the answers that the gate let pass, those that are full prefill's; false: it let none pass. */
static bool gate_precision(const eval_records *records, double *precision)
{
    uint32_t n = 0;
    const double passed =
        eval_mean_of(records, "gate", CHUNKS, UINT32_MAX, offsetof(eval_record, passed), &n);
    const double right =
        eval_mean_of(records, "gate", CHUNKS, UINT32_MAX, offsetof(eval_record, passed_right), &n);
    if (!(passed > 0.0)) return false;
    *precision = right / passed;
    return true;
}

static json_t *figures_of(const eval_records *records, json_t *intervals)
{
    json_t *object = json_object();
    for (size_t i = 0; i < sizeof figures / sizeof *figures; i++) {
        const figure *f = &figures[i];
        const eval_estimate e =
            eval_estimate_of(records, f->policy, f->minus, f->kinds, UINT32_MAX, f->offset);
        /* Scenarios that were not run have no figure. */
        (void)json_object_set_new(object, f->name, e.n == 0 ? json_null() : json_real(e.mean));
        if (e.n > 0)
            (void)json_object_set_new(
                intervals, f->name,
                json_pack("{s:f, s:f, s:i}", "low", e.low, "high", e.high, "n", (int)e.n));
    }
    double precision = 0.0;
    const bool has_precision = gate_precision(records, &precision);
    (void)json_object_set_new(object, "gate_precision",
                              has_precision ? json_real(precision) : json_null());
    return object;
}

typedef struct column {
    const char *name;
    size_t offset;
} column;

static const column columns[] = {
    {"kl", offsetof(eval_record, kl)},
    {"top1_agreement", offsetof(eval_record, top1)},
    {"exact_match", offsetof(eval_record, exact)},
    {"right", offsetof(eval_record, right)},
    {"recomputed", offsetof(eval_record, recomputed)},
    {"work", offsetof(eval_record, work)},
    {"ttft_ms", offsetof(eval_record, ttft_ms)},
};

/* The ratio of mean times, full prefill's over the policy's. */
static double ttft_ratio(const eval_records *records, const char *policy, uint32_t scenario)
{
    uint32_t n = 0;
    const double full =
        eval_mean_of(records, policy, ALL, scenario, offsetof(eval_record, full_ttft_ms), &n);
    const double ours =
        eval_mean_of(records, policy, ALL, scenario, offsetof(eval_record, ttft_ms), &n);
    return ours > 0.0 ? full / ours : 0.0;
}

static json_t *row_of(const eval_records *records, uint32_t scenario, const char *policy)
{
    json_t *row =
        json_pack("{s:s, s:s}", "scenario", eval_scenarios[scenario].name, "policy", policy);
    uint32_t n = 0;
    for (size_t c = 0; c < sizeof columns / sizeof *columns; c++) {
        const eval_estimate e =
            eval_estimate_of(records, policy, NULL, ALL, scenario, columns[c].offset);
        n = e.n;
        (void)json_object_set_new(row, columns[c].name, json_real(e.mean));
        char name[48];
        (void)snprintf(name, sizeof name, "%s_interval", columns[c].name);
        (void)json_object_set_new(row, name, json_pack("[f, f]", e.low, e.high));
    }
    (void)json_object_set_new(row, "n", json_integer((json_int_t)n));
    (void)json_object_set_new(row, "ttft_ratio", json_real(ttft_ratio(records, policy, scenario)));
    if (n > 0) return row;
    json_decref(row);
    return NULL;
}

void eval_print_json(const eval_records *records, const eval_about *about)
{
    json_t *rows = json_array();
    for (uint32_t s = 0; eval_scenarios[s].name != NULL; s++) {
        uint32_t policy = EVAL_POLICIES_MAX;
        do {
            char name[EVAL_NAME_MAX];
            eval_policy_name(policy, name, sizeof name);
            json_t *row = row_of(records, s, name);
            if (row != NULL) (void)json_array_append_new(rows, row);
        } while (eval_policy_next(&policy));
    }
    json_t *intervals = json_object();
    json_t *values = figures_of(records, intervals);
    json_t *report =
        json_pack("{s:s, s:o, s:o, s:o, s:{s:s, s:s, s:i, s:i}, s:s}", "name", "reuse", "figures",
                  values, "intervals", intervals, "rows", rows, "machine", "model", about->model,
                  "texts", about->texts, "prompts", (int)about->n_prompts, "seed", (int)about->seed,
                  "version", KVL_VERSION);
    (void)json_dumpf(report, stdout, JSON_INDENT(2));
    (void)printf("\n");
    json_decref(report);
}

static void print_row(const eval_records *records, uint32_t scenario, const char *policy)
{
    double value[sizeof columns / sizeof *columns];
    uint32_t n = 0;
    for (size_t c = 0; c < sizeof columns / sizeof *columns; c++)
        value[c] = eval_mean_of(records, policy, ALL, scenario, columns[c].offset, &n);
    if (n == 0) return;
    (void)printf("%-10s %-20s %5u %7.4f %7.3f %7.3f %7.3f %6.3f %6.3f %7.1f ms %5.1fx\n",
                 eval_scenarios[scenario].name, policy, n, value[0], value[1], value[2], value[3],
                 value[4], value[5], value[6], ttft_ratio(records, policy, scenario));
}

void eval_print_table(const eval_records *records)
{
    (void)printf(
        "scenario   policy                   n      KL   top-1   exact   right  again   work"
        "       TTFT  ratio\n");
    for (uint32_t s = 0; eval_scenarios[s].name != NULL; s++) {
        uint32_t policy = EVAL_POLICIES_MAX;
        do {
            char name[EVAL_NAME_MAX];
            eval_policy_name(policy, name, sizeof name);
            print_row(records, s, name);
        } while (eval_policy_next(&policy));
    }
    (void)printf("\n");
    for (size_t i = 0; i < sizeof figures / sizeof *figures; i++) {
        const figure *f = &figures[i];
        const eval_estimate e =
            eval_estimate_of(records, f->policy, f->minus, f->kinds, UINT32_MAX, f->offset);
        if (e.n > 0)
            (void)printf("%-32s %8.4f  [%.4f, %.4f]  n %u\n", f->name, e.mean, e.low, e.high, e.n);
    }
    double precision = 0.0;
    if (gate_precision(records, &precision))
        (void)printf("%-32s %8.4f\n", "gate_precision", precision);
}
