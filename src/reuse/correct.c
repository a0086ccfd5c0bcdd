/* reuse/correct.c: means that are learnt one text at a time, and shifts that probes give. */
#include "reuse/correct.h"

#include "base/alloc.h"

#include <math.h>
#include <string.h>

const kvl_correction kvl_corrections[] = {
    {"none", KVL_CORRECT_NONE},
    {"anchors", KVL_CORRECT_ANCHORS},
    {"mean", KVL_CORRECT_MEAN},
    {"probe", KVL_CORRECT_PROBE},
    {0},
};

const kvl_correction *kvl_correct_find(const char *name)
{
    for (const kvl_correction *c = kvl_corrections; c->name != NULL; c++) {
        if (strcmp(c->name, name) == 0) return c;
    }
    return NULL;
}

/* ---- mean by position ---- */

static size_t width_of(const kvl_mean *mean)
{
    return (size_t)mean->n_kv_heads * mean->head_dim;
}

kvl_status kvl_mean_init(kvl_mean *mean, uint32_t n_layers, uint32_t n_kv_heads, uint32_t head_dim,
                         kvl_error *error)
{
    *mean = (kvl_mean){.n_layers = n_layers, .n_kv_heads = n_kv_heads, .head_dim = head_dim};
    size_t n_floats = 0;
    if (!kvl_size_mul(n_kv_heads, head_dim, &n_floats) ||
        !kvl_size_mul(n_floats, KVL_MEAN_ROWS, &n_floats) ||
        !kvl_size_mul(n_floats, n_layers, &n_floats))
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "a mean of %u layers, %u heads of %u is too large", n_layers, n_kv_heads,
                        head_dim);
    mean->keys = kvl_alloc_zero(n_floats, sizeof *mean->keys);
    mean->values = kvl_alloc_zero(n_floats, sizeof *mean->values);
    mean->sums = kvl_alloc_zero(2 * width_of(mean), sizeof *mean->sums);
    if (mean->keys != NULL && mean->values != NULL && mean->sums != NULL) return KVL_OK;
    kvl_mean_deinit(mean);
    return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a mean of %u layers", n_layers);
}

void kvl_mean_deinit(kvl_mean *mean)
{
    kvl_free(mean->keys);
    kvl_free(mean->values);
    kvl_free(mean->sums);
    *mean = (kvl_mean){0};
}

/* Tokens of a text of n that one row is about: first .. first + the returned number - 1. */
static uint32_t tokens_of_row(uint32_t row, uint32_t n)
{
    if (row >= n) return 0;
    return row + 1 == KVL_MEAN_ROWS ? n - row : 1;
}

static void add_differences(const float *in_context, const float *at_home, uint32_t n, size_t width,
                            double *sum)
{
    for (uint32_t t = 0; t < n; t++) {
        for (size_t d = 0; d < width; d++)
            sum[d] += (double)in_context[t * width + d] - (double)at_home[t * width + d];
    }
}

/* The running mean after n more tokens, whose differences sum up to `sum`. */
static void move_row(float *row, const double *sum, size_t width, uint64_t n_before, uint32_t n)
{
    const double n_after = (double)n_before + (double)n;
    for (size_t d = 0; d < width; d++)
        row[d] = (float)((double)row[d] + (sum[d] - (double)n * (double)row[d]) / n_after);
}

static void learn_row(kvl_mean *mean, const kvl_kv_view *in_context, const kvl_kv_view *at_home,
                      uint32_t row, uint32_t n)
{
    const size_t width = width_of(mean);
    for (uint32_t layer = 1; layer < mean->n_layers; layer++) {
        const size_t from = ((size_t)layer * in_context->n_tokens + row) * width;
        const size_t to = ((size_t)layer * KVL_MEAN_ROWS + row) * width;
        memset(mean->sums, 0, 2 * width * sizeof *mean->sums);
        add_differences(in_context->keys + from, at_home->keys + from, n, width, mean->sums);
        add_differences(in_context->values + from, at_home->values + from, n, width,
                        mean->sums + width);
        move_row(mean->keys + to, mean->sums, width, mean->n_tokens[row], n);
        move_row(mean->values + to, mean->sums + width, width, mean->n_tokens[row], n);
    }
    mean->n_tokens[row] += n;
}

void kvl_mean_learn(kvl_mean *mean, const kvl_kv_view *in_context, const kvl_kv_view *at_home)
{
    KVL_ASSERT(in_context->n_tokens == at_home->n_tokens);
    KVL_ASSERT(in_context->n_layers == mean->n_layers && at_home->n_layers == mean->n_layers);
    KVL_ASSERT(in_context->n_kv_heads == mean->n_kv_heads);
    KVL_ASSERT(in_context->head_dim == mean->head_dim);
    for (uint32_t row = 0; row < KVL_MEAN_ROWS; row++) {
        const uint32_t n = tokens_of_row(row, in_context->n_tokens);
        if (n > 0) learn_row(mean, in_context, at_home, row, n);
    }
}

void kvl_mean_apply(const kvl_mean *mean, uint32_t layer, uint32_t token_first, uint32_t n,
                    float *keys, float *values)
{
    KVL_ASSERT(layer < mean->n_layers);
    const size_t width = width_of(mean);
    for (uint32_t t = 0; t < n; t++) {
        const uint32_t token = token_first + t;
        const uint32_t row = token < KVL_MEAN_ROWS - 1 ? token : KVL_MEAN_ROWS - 1;
        const size_t from = ((size_t)layer * KVL_MEAN_ROWS + row) * width;
        for (size_t d = 0; d < width; d++) {
            keys[t * width + d] += mean->keys[from + d];
            values[t * width + d] += mean->values[from + d];
        }
    }
}

/* ---- probes ---- */

void kvl_probe_weights(const float *deviation, const uint32_t *probes, uint32_t n_probes,
                       const uint32_t *others, uint32_t n_others, float *weights)
{
    double sum = 0.0;
    for (uint32_t i = 0; i < n_probes; i++) sum += sqrt((double)deviation[probes[i]]);
    const double mean = n_probes == 0 ? 0.0 : sum / n_probes;
    for (uint32_t i = 0; i < n_others; i++) {
        const double share = sqrt((double)deviation[others[i]]) / mean;
        weights[i] = mean > 0.0 && share > 0.0 ? (float)fmin(share, 1.0) : 0.0F;
    }
}

void kvl_probe_shift(const float *fresh, const float *stale, uint32_t n, size_t width, float *shift)
{
    for (size_t d = 0; d < width; d++) {
        double sum = 0.0;
        for (uint32_t i = 0; i < n; i++)
            sum += (double)fresh[i * width + d] - (double)stale[i * width + d];
        shift[d] = n == 0 ? 0.0F : (float)(sum / n);
    }
}

void kvl_probe_apply(const float *shift, const float *weights, uint32_t n, size_t width,
                     float *rows)
{
    for (uint32_t i = 0; i < n; i++) {
        for (size_t d = 0; d < width; d++) rows[i * width + d] += weights[i] * shift[d];
    }
}
