/* cli/eval_records.c: what was seen of every prompt, and means with intervals from it. */
#include "base/alloc.h"
#include "cli/eval.h"
#include "reuse/correct.h"

#include <stdlib.h>
#include <string.h>

enum { RESAMPLES = 1000, PERCENT_OUTSIDE = 5, SEED = 20260101 };

const eval_policy eval_policies[] = {
    {"none", "none", KVLOOM__V1__QUALITY__QUALITY_BALANCED, true, false},
    {"sink8", "sink8", KVLOOM__V1__QUALITY__QUALITY_FAST, true, false},
    {"sink16", "sink16", KVLOOM__V1__QUALITY__QUALITY_BALANCED, false, false},
    {"query5", "query5", KVLOOM__V1__QUALITY__QUALITY_BALANCED, false, false},
    {"query10", "query10", KVLOOM__V1__QUALITY__QUALITY_BALANCED, false, false},
    {"query15", "query15", KVLOOM__V1__QUALITY__QUALITY_BALANCED, false, false},
    {"query30", "query30", KVLOOM__V1__QUALITY__QUALITY_BALANCED, false, false},
    {"sink8+query5", "sink8+query5", KVLOOM__V1__QUALITY__QUALITY_BALANCED, false, false},
    {"sink8+query10", "sink8+query10", KVLOOM__V1__QUALITY__QUALITY_BALANCED, true, false},
    {"sink8+query25", "sink8+query25", KVLOOM__V1__QUALITY__QUALITY_BALANCED, false, false},
    {"sink4+draft5", "sink4+draft5", KVLOOM__V1__QUALITY__QUALITY_FAST, false, false},
    {"sink8+draft12", "sink8+draft12", KVLOOM__V1__QUALITY__QUALITY_BALANCED, true, false},
    {"sink8+draft15", "sink8+draft15", KVLOOM__V1__QUALITY__QUALITY_BALANCED, false, false},
    {"deviation5", "deviation5", KVLOOM__V1__QUALITY__QUALITY_BALANCED, false, false},
    {"deviation15", "deviation15", KVLOOM__V1__QUALITY__QUALITY_BALANCED, true, false},
    {"deviation30", "deviation30", KVLOOM__V1__QUALITY__QUALITY_BALANCED, false, false},
    {"deviation15v", "deviation15v", KVLOOM__V1__QUALITY__QUALITY_BALANCED, false, false},
    {"deviation15g", "deviation15g", KVLOOM__V1__QUALITY__QUALITY_BALANCED, false, false},
    {"kvshare15", "kvshare15", KVLOOM__V1__QUALITY__QUALITY_BALANCED, false, false},
    {"all", "all", KVLOOM__V1__QUALITY__QUALITY_BALANCED, true, false},
    /* What these leave in the prefix tree is exact, and others would share it: verified comes last
     * but one, and the gate has prompts of its own. */
    {"verified", "sink8+query10", KVLOOM__V1__QUALITY__QUALITY_VERIFIED, true, false},
    {"gate", "sink8+query10", KVLOOM__V1__QUALITY__QUALITY_BALANCED, true, true},
    {0},
};

kvl_status eval_records_add(eval_records *records, const eval_record *record, kvl_error *error)
{
    if (records->n == records->n_room) {
        const size_t n_room = records->n_room == 0 ? 256 : 2 * records->n_room;
        eval_record *grown = kvl_realloc(records->items, n_room * sizeof *grown);
        if (grown == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a record");
        records->items = grown;
        records->n_room = n_room;
    }
    records->items[records->n++] = *record;
    return KVL_OK;
}

void eval_records_deinit(eval_records *records)
{
    kvl_free(records->items);
    *records = (eval_records){.n = 0};
}

/* Room for full prefill behind the policies, so that a number says both. */
enum { STRIDE = EVAL_POLICIES_MAX + 1 };

uint32_t eval_policy_number(uint32_t p, uint32_t c)
{
    return c * STRIDE + p;
}

void eval_policy_name(uint32_t number, char *name, size_t n_bytes)
{
    const uint32_t p = number % STRIDE;
    const uint32_t c = number / STRIDE;
    (void)snprintf(name, n_bytes, "%s%s%s", p == EVAL_POLICIES_MAX ? "full" : eval_policies[p].name,
                   c == 0 ? "" : "+", c == 0 ? "" : kvl_corrections[c].name);
}

bool eval_policy_next(uint32_t *number)
{
    if (*number == EVAL_POLICIES_MAX) {
        *number = 0;
        return true;
    }
    const uint32_t p = *number % STRIDE;
    const uint32_t c = *number / STRIDE;
    if (kvl_corrections[c + 1].name != NULL) {
        *number = eval_policy_number(p, c + 1);
        return true;
    }
    *number = eval_policy_number(p + 1, 0);
    return eval_policies[p + 1].name != NULL;
}

bool eval_policy_find(const char *name, uint32_t *number)
{
    *number = EVAL_POLICIES_MAX;
    do {
        char known[EVAL_NAME_MAX];
        eval_policy_name(*number, known, sizeof known);
        if (strcmp(known, name) == 0) return true;
    } while (eval_policy_next(number));
    return false;
}

static uint32_t find_policy(const char *name)
{
    uint32_t number = 0;
    const bool is_known = eval_policy_find(name, &number);
    KVL_ASSERT(is_known);
    return number;
}

static double field(const eval_record *record, size_t offset)
{
    double value = 0.0;
    memcpy(&value, (const char *)record + offset, sizeof value);
    return value;
}

/* Records of one prompt stand one behind another. */
static const eval_record *find_same(const eval_records *records, size_t at, uint32_t policy)
{
    const uint32_t prompt = records->items[at].prompt;
    size_t first = at;
    while (first > 0 && records->items[first - 1].prompt == prompt) first--;
    for (size_t i = first; i < records->n && records->items[i].prompt == prompt; i++) {
        if (records->items[i].policy == policy) return &records->items[i];
    }
    return NULL;
}

static size_t collect(const eval_records *records, uint32_t policy, uint32_t minus, unsigned kinds,
                      uint32_t scenario, size_t offset, double *values)
{
    size_t n = 0;
    for (size_t i = 0; i < records->n; i++) {
        const eval_record *record = &records->items[i];
        if (record->policy != policy || (scenario != UINT32_MAX && record->scenario != scenario) ||
            (kinds >> eval_scenarios[record->scenario].kind & 1U) == 0)
            continue;
        double value = field(record, offset);
        if (minus != UINT32_MAX) {
            const eval_record *other = find_same(records, i, minus);
            if (other == NULL) continue;
            value -= field(other, offset);
        }
        values[n++] = value;
    }
    return n;
}

static double mean_of(const double *values, size_t n)
{
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) sum += values[i];
    return n == 0 ? 0.0 : sum / (double)n;
}

static int compare(const void *a, const void *b)
{
    const double left = *(const double *)a;
    const double right = *(const double *)b;
    return (left > right) - (left < right);
}

/* Percentile bootstrap (Efron, 1979). */
static void resample(const double *values, size_t n, eval_estimate *estimate)
{
    double means[RESAMPLES];
    kvl_random random = {SEED};
    for (size_t r = 0; r < RESAMPLES; r++) {
        double sum = 0.0;
        for (size_t i = 0; i < n; i++) sum += values[kvl_random_below(&random, n)];
        means[r] = sum / (double)n;
    }
    qsort(means, RESAMPLES, sizeof *means, compare);
    estimate->low = means[RESAMPLES * PERCENT_OUTSIDE / 200];
    estimate->high = means[RESAMPLES - 1 - RESAMPLES * PERCENT_OUTSIDE / 200];
}

/* The caller's, ended with kvl_free; NULL without memory. */
static double *gather(const eval_records *records, const char *policy, const char *minus,
                      unsigned kinds, uint32_t scenario, size_t offset, size_t *n)
{
    double *values = kvl_alloc_zero(records->n + 1, sizeof *values);
    *n = 0;
    if (values != NULL)
        *n = collect(records, find_policy(policy), minus == NULL ? UINT32_MAX : find_policy(minus),
                     kinds, scenario, offset, values);
    return values;
}

eval_estimate eval_estimate_of(const eval_records *records, const char *policy, const char *minus,
                               unsigned kinds, uint32_t scenario, size_t offset)
{
    size_t n = 0;
    double *values = gather(records, policy, minus, kinds, scenario, offset, &n);
    eval_estimate estimate = {.mean = mean_of(values, n), .n = (uint32_t)n};
    if (n > 0) resample(values, n, &estimate);
    kvl_free(values);
    return estimate;
}

double eval_mean_of(const eval_records *records, const char *policy, unsigned kinds,
                    uint32_t scenario, size_t offset, uint32_t *n)
{
    size_t n_values = 0;
    double *values = gather(records, policy, NULL, kinds, scenario, offset, &n_values);
    const double mean = mean_of(values, n_values);
    *n = (uint32_t)n_values;
    kvl_free(values);
    return mean;
}
