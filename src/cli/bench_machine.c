/* cli/bench_machine.c: what this machine can do at most: plain sgemm, every thread its part of the
 * outputs, and reading memory that fits no cache. Best of some, since a limit is not to be
 * underestimated by whoever else runs here. */
#include "base/clock.h"
#include "cli/bench.h"

#include <cblas.h>
#include <stdio.h>
#include <stdlib.h>

static int compare_doubles(const void *a, const void *b)
{
    const double x = *(const double *)a;
    const double y = *(const double *)b;
    return (x > y) - (x < y);
}

double kvl_bench_median(double *numbers, size_t n)
{
    qsort(numbers, n, sizeof *numbers, compare_doubles);
    return n % 2 == 1 ? numbers[n / 2] : (numbers[n / 2 - 1] + numbers[n / 2]) / 2;
}

double kvl_bench_seconds_since(int64_t start_ns)
{
    return (double)(kvl_clock_now(kvl_clock_system()) - start_ns) / (double)KVL_NS_PER_S;
}

typedef struct product_call {
    kvl_bench_product shape;
    size_t n_parts;
    const float *x, *weights;
    float *y;
} product_call;

static void multiply_part(void *context, size_t item, size_t thread)
{
    (void)thread;
    const product_call *p = context;
    const kvl_bench_product *shape = &p->shape;
    const uint32_t n = shape->n_outputs / (uint32_t)p->n_parts;
    const size_t first = item * n;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)shape->n_rows, (int)n,
                (int)shape->n_inputs, 1.0F, p->x, (int)shape->n_inputs,
                p->weights + first * shape->n_inputs, (int)shape->n_inputs, 0.0F, p->y + first,
                (int)shape->n_outputs);
}

double kvl_bench_sgemm_gflops(kvl_pool *threads, const kvl_bench_product *product, float *memory,
                              uint32_t n_times)
{
    const size_t n_x = (size_t)product->n_rows * product->n_inputs;
    const size_t n_weights = (size_t)product->n_outputs * product->n_inputs;
    const size_t n_y = (size_t)product->n_rows * product->n_outputs;
    KVL_ASSERT(n_x + n_weights + n_y <= KVL_BENCH_FLOATS);
    product_call p = {
        .shape = *product,
        .n_parts = kvl_pool_n_threads(threads),
        .x = memory,
        .weights = memory + n_x,
        .y = memory + n_x + n_weights,
    };
    const size_t n_outputs = product->n_outputs / p.n_parts * p.n_parts;
    const double flops = 2.0 * (double)n_x * (double)n_outputs;
    double best = 0.0;
    for (uint32_t i = 0; i < n_times; i++) {
        const int64_t start = kvl_clock_now(kvl_clock_system());
        kvl_pool_run(threads, multiply_part, &p, p.n_parts);
        const double rate = flops / kvl_bench_seconds_since(start) / 1e9;
        if (rate > best) best = rate;
    }
    return best;
}

typedef struct reading {
    const float *memory;
    size_t n_parts;
    double sums[KVL_POOL_THREADS_MAX];
} reading;

static void read_part(void *context, size_t item, size_t thread)
{
    (void)thread;
    reading *r = context;
    const size_t n = KVL_BENCH_FLOATS / r->n_parts;
    /* Integers, not floats: a sum of floats may not be reordered, and the additions would be what
     * is measured. */
    uint64_t sums[8] = {0};
    const uint64_t *at = (const uint64_t *)(const void *)(r->memory + item * n);
    for (size_t i = 0; i + 8 <= n / 2; i += 8) {
        for (size_t k = 0; k < 8; k++) sums[k] += at[i + k];
    }
    uint64_t sum = 0;
    for (size_t k = 0; k < 8; k++) sum += sums[k];
    r->sums[item] = (double)sum;
}

double kvl_bench_read_gbs(kvl_pool *threads, const float *memory, uint32_t n_times)
{
    reading r = {.memory = memory, .n_parts = kvl_pool_n_threads(threads)};
    double best = 0.0;
    for (uint32_t i = 0; i < n_times; i++) {
        const int64_t start = kvl_clock_now(kvl_clock_system());
        kvl_pool_run(threads, read_part, &r, r.n_parts);
        const double rate =
            (double)KVL_BENCH_FLOATS * sizeof(float) / kvl_bench_seconds_since(start) / 1e9;
        if (rate > best) best = rate;
    }
    return best;
}

static size_t matrix_bytes(const kvl_matrix *matrix)
{
    return matrix->row_bytes * matrix->n_outputs;
}

void kvl_bench_count_weights(const kvl_engine *engine, double *n_bytes, double *flops)
{
    *n_bytes = (double)matrix_bytes(kvl_model_output(engine->model));
    *flops = 0.0;
    for (uint32_t l = 0; l < engine->shape->n_layers; l++) {
        const kvl_layer_weights *w = kvl_model_layer(engine->model, l);
        const kvl_matrix *const all[] = {&w->query, &w->key, &w->value, &w->attention_output,
                                         &w->gate,  &w->up,  &w->down};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
            *n_bytes += (double)matrix_bytes(all[i]);
            *flops += 2.0 * all[i]->n_inputs * all[i]->n_outputs;
        }
    }
}

void kvl_bench_print(const char *name, json_t *figures, json_t *rows, size_t n_threads,
                     const char *kernels)
{
    json_t *report = json_pack("{s:s, s:o, s:o, s:{s:i, s:s}, s:s}", "name", name, "figures",
                               figures, "rows", rows, "machine", "threads", (int)n_threads,
                               "kernels", kernels, "version", KVL_VERSION);
    (void)json_dumpf(report, stdout, JSON_INDENT(2));
    (void)printf("\n");
    json_decref(report);
}
