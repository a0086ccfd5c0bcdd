/* compute_bench.c: how near the products with weights come to what the machine can do: plain sgemm
 * for many rows, reading memory for one row. Shapes are those of SmolLM2-135M, weights are random.
 * Not part of the build:
 *     cmake --build build/release --target kvl_compute kvl_base
 *     gcc -std=c11 -D_GNU_SOURCE -O2 -Isrc tests/bench/compute_bench.c -o compute_bench \
 *         build/release/libkvl_compute.a build/release/libkvl_base.a \
 *         $(pkg-config --cflags --libs openblas libsodium libxxhash) -lpthread -lm
 *     KVLOOM_CPU=avx2 ./compute_bench [threads]
 * Figures are the best of several runs, so that other work on the machine disturbs them little. */
#include "base/alloc.h"
#include "base/clock.h"
#include "base/random.h"
#include "compute/backend.h"

#include <cblas.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_LAYERS = 30, WIDTH = 576, KV_WIDTH = 192, HIDDEN = 1536, ROWS = 512, RUNS = 12 };

typedef struct shape {
    uint32_t n_inputs;
    uint32_t n_jobs;
    uint32_t n_outputs[3];
} shape;

/* The four products of a layer. */
static const shape shapes[] = {
    {WIDTH, 3, {WIDTH, KV_WIDTH, KV_WIDTH}},
    {WIDTH, 1, {WIDTH}},
    {WIDTH, 2, {HIDDEN, HIDDEN}},
    {HIDDEN, 1, {WIDTH}},
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

static double now_s(void)
{
    return (double)kvl_clock_now(kvl_clock_system()) * 1e-9;
}

static void must(bool condition, const char *what)
{
    if (condition) return;
    (void)fprintf(stderr, "compute_bench: %s\n", what);
    exit(1);
}

/* ---- what the machine can do ---- */

typedef struct plain_product {
    size_t n_threads;
    int n_rows, n_outputs, n_inputs;
    const float *x, *w;
    float *y;
} plain_product;

static void plain_part(void *context, size_t item, size_t thread)
{
    (void)thread;
    const plain_product *p = context;
    const int first = p->n_outputs * (int)item / (int)p->n_threads;
    const int past = p->n_outputs * ((int)item + 1) / (int)p->n_threads;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, p->n_rows, past - first, p->n_inputs, 1.0F,
                p->x, p->n_inputs, p->w + (size_t)first * (size_t)p->n_inputs, p->n_inputs, 0.0F,
                p->y + first, p->n_outputs);
}

static void plain_sgemm(kvl_pool *pool, int n_outputs, int n_inputs, float *x, float *w, float *y)
{
    plain_product p = {kvl_pool_n_threads(pool), ROWS, n_outputs, n_inputs, x, w, y};
    double best = 1e9;
    for (int run = 0; run < RUNS; run++) {
        const double start = now_s();
        kvl_pool_run(pool, plain_part, &p, p.n_threads);
        const double seconds = now_s() - start;
        if (seconds < best) best = seconds;
    }
    printf("plain sgemm      %4d rows %4d -> %4d: %6.1f GFLOP/s\n", ROWS, n_inputs, n_outputs,
           2.0 * ROWS * n_outputs * n_inputs / best * 1e-9);
}

typedef struct reading {
    const uint64_t *words;
    size_t n_words; /* of an item */
    uint64_t sums[KVL_POOL_THREADS_MAX];
} reading;

static void read_part(void *context, size_t item, size_t thread)
{
    reading *r = context;
    const uint64_t *words = r->words + item * r->n_words;
    uint64_t sums[16] = {0};
    for (size_t i = 0; i < r->n_words; i += 16)
        for (size_t j = 0; j < 16; j++) sums[j] ^= words[i + j];
    for (size_t j = 0; j < 16; j++) r->sums[thread] ^= sums[j];
}

static double read_memory(kvl_pool *pool, const void *memory, size_t n_bytes)
{
    static reading r;
    const size_t n_items = n_bytes / (64 * 1024);
    r.words = memory;
    r.n_words = 64 * 1024 / sizeof(uint64_t);
    double best = 1e9;
    for (int run = 0; run < RUNS; run++) {
        const double start = now_s();
        kvl_pool_run(pool, read_part, &r, n_items);
        const double seconds = now_s() - start;
        if (seconds < best) best = seconds;
    }
    const double rate = (double)n_bytes / best * 1e-9;
    printf("reading memory   %zu MiB: %.1f GB/s\n", n_bytes >> 20, rate);
    return rate;
}

/* ---- our products ---- */

/* Random bytes as weights; scales are overwritten with small numbers, so that sums stay finite. */
static void fill_weights(kvl_random *random, kvl_dtype dtype, uint8_t *bytes, size_t n_bytes)
{
    for (size_t i = 0; i + 8 <= n_bytes; i += 8) {
        const uint64_t word = kvl_random_next(random);
        memcpy(bytes + i, &word, sizeof word);
    }
    const uint32_t block = kvl_dtype_about(dtype)->block_bytes;
    const size_t scale_at = dtype == KVL_DTYPE_Q6_K ? 208 : 0;
    const uint16_t scales[2] = {0x1C00, 0x9400};
    const size_t n_scales = dtype == KVL_DTYPE_Q8_0 || dtype == KVL_DTYPE_Q4_0 ||
                                    dtype == KVL_DTYPE_Q5_0 || dtype == KVL_DTYPE_Q6_K
                                ? 1
                                : 2;
    if (dtype == KVL_DTYPE_F32) {
        for (size_t i = 0; i + 4 <= n_bytes; i += 4) bytes[i + 3] = 0x3B;
    } else if (block == 2) {
        for (size_t i = 0; i + 2 <= n_bytes; i += 2) bytes[i + 1] = 0x21;
    } else {
        for (size_t at = scale_at; at + 2 * n_scales <= n_bytes; at += block)
            memcpy(bytes + at, scales, 2 * n_scales);
    }
}

typedef struct layers {
    kvl_matrix matrices[N_LAYERS][N_SHAPES][3];
    uint8_t *bytes;
    size_t n_bytes;
    double flops_a_row;
} layers;

static void layers_init(layers *all, kvl_dtype dtype, kvl_random *random)
{
    const kvl_dtype_info *about = kvl_dtype_about(dtype);
    memset(all, 0, sizeof *all);
    for (int pass = 0; pass < 2; pass++) {
        size_t at = 0;
        for (int l = 0; l < N_LAYERS; l++) {
            for (size_t s = 0; s < N_SHAPES; s++) {
                const size_t row = shapes[s].n_inputs / about->block_weights * about->block_bytes;
                for (uint32_t j = 0; j < shapes[s].n_jobs; j++) {
                    all->matrices[l][s][j] = (kvl_matrix){
                        all->bytes + at, row, shapes[s].n_outputs[j], shapes[s].n_inputs, dtype};
                    at += row * shapes[s].n_outputs[j];
                    if (pass == 0)
                        all->flops_a_row += 2.0 * shapes[s].n_inputs * shapes[s].n_outputs[j];
                }
            }
        }
        if (pass == 1) break;
        all->n_bytes = at;
        all->bytes = kvl_alloc_aligned(at);
        must(all->bytes != NULL, "no memory for weights");
    }
    fill_weights(random, dtype, all->bytes, all->n_bytes);
}

static double time_layers(kvl_backend *backend, const layers *all, uint32_t n_rows, const float *x,
                          float *y, int n_runs)
{
    double best = 1e9;
    for (int run = 0; run < n_runs; run++) {
        const double start = now_s();
        for (int l = 0; l < N_LAYERS; l++) {
            for (size_t s = 0; s < N_SHAPES; s++) {
                kvl_matmul_job jobs[3] = {{0}};
                for (uint32_t j = 0; j < shapes[s].n_jobs; j++)
                    jobs[j] = (kvl_matmul_job){.weights = &all->matrices[l][s][j],
                                               .y = y + (size_t)j * ROWS * HIDDEN};
                backend->ops->matmul(backend, jobs, shapes[s].n_jobs, n_rows, x);
            }
        }
        const double seconds = now_s() - start;
        if (seconds < best) best = seconds;
    }
    return best;
}

static void bench_dtype(kvl_backend *backend, kvl_dtype dtype, const float *x, float *y,
                        double rate, kvl_random *random)
{
    static layers all;
    layers_init(&all, dtype, random);
    printf("%-5s", kvl_dtype_about(dtype)->name);
    const double one = time_layers(backend, &all, 1, x, y, RUNS);
    const double bytes_rate = (double)all.n_bytes / one * 1e-9;
    printf(" 1 row %6.2f ms %5.1f GB/s (%3.0f %%);", one * 1e3, bytes_rate,
           100 * bytes_rate / rate);
    static const uint32_t rows[] = {2, 3, 4, 8, 16, 64};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        printf(" %u: %.2f", rows[i], time_layers(backend, &all, rows[i], x, y, 4) * 1e3);
    const double many = time_layers(backend, &all, ROWS, x, y, 3);
    printf(" ms; %d rows %6.1f GFLOP/s\n", ROWS, all.flops_a_row * ROWS / many * 1e-9);
    kvl_free(all.bytes);
}

int main(int argc, char **argv)
{
    kvl_pool *pool = NULL;
    kvl_backend *backend = NULL;
    kvl_error error = {0};
    const size_t n_threads = argc > 1 ? strtoul(argv[1], NULL, 10) : 0;
    if (kvl_pool_create(n_threads, true, &pool, &error) != KVL_OK ||
        kvl_backend_cpu_create(pool, KVL_CPU_BEST, &backend, &error) != KVL_OK)
        must(false, error.text);
    openblas_set_num_threads(1);
    kvl_random random = {1};
    const size_t n_floats = (size_t)32 << 20;
    float *x = backend->ops->memory_create(backend, n_floats * sizeof(float));
    float *y = backend->ops->memory_create(backend, (size_t)3 * ROWS * HIDDEN * sizeof(float));
    must(x != NULL && y != NULL, "no memory");
    for (size_t i = 0; i < (size_t)ROWS * HIDDEN; i++) x[i] = kvl_random_uniform(&random) - 0.5F;
    printf("%zu threads\n", kvl_pool_n_threads(pool));
    const double rate = read_memory(pool, x, n_floats * sizeof(float));
    plain_sgemm(pool, HIDDEN, WIDTH, x, x + 4096, y);
    plain_sgemm(pool, WIDTH, HIDDEN, x, x + 4096, y);
    for (int dtype = 0; dtype < KVL_DTYPE_COUNT; dtype++)
        bench_dtype(backend, (kvl_dtype)dtype, x, y, rate, &random);
    backend->ops->memory_destroy(backend, y);
    backend->ops->memory_destroy(backend, x);
    backend->ops->destroy(backend);
    kvl_pool_destroy(pool);
    return 0;
}
