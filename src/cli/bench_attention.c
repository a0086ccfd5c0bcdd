/* cli/bench_attention.c: `kvloom bench attention`: decoding behind shared prefixes, beside the same
 * engine without sharing and beside the two limits of this machine: the bytes that must be read
 * (every page once) at the measured bandwidth, and the operations at the measured rate of sgemm.
 * Whichever takes longer is the nearer limit; a fraction is its time over ours.
 * All that is compared alternates (shared, unshared, sgemm, reading, and again), and medians count:
 * on a machine that others use too, rates from another minute would say nothing. */
#include "base/alloc.h"
#include "base/clock.h"
#include "cli/bench.h"
#include "cli/bench_scene.h"
#include "cli/cli.h"

#include <string.h>

enum { SUFFIX_TOKENS = 128, REPEATS_MAX = 99 };

/* Holds 32 rows of 8K tokens of the 8B shape, each with pages of its own: what has more rows
 * without sharing is measured on as many as fit, and told so. */
#define SCENE_FLOATS ((size_t)544 << 20)

static const kvl_bench_shape shapes[] = {
    {"smollm2-135m", 30, 9, 3, 64},
    {"qwen2.5-coder-0.5b", 24, 14, 2, 64},
    {"llama-3.1-8b", 32, 32, 8, 128},
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

typedef struct bench {
    const kvl_bench_attention *wanted;
    kvl_pool *threads;
    kvl_backend *backend;
    float *memory;             /* [SCENE_FLOATS], keys and values */
    float *limit_memory;       /* [KVL_BENCH_FLOATS], what the limits are measured with */
    kvl_bench_product product; /* that sgemm is fastest at */
    double fraction_min;       /* of the nearer limit, over all cells with 32 rows or more */
    json_t *figures, *rows;
} bench;

/* ---- one comparison ---- */

typedef struct timing {
    double seconds, limit_bytes, limit_operations;
    double sgemm_gflops, read_gbs; /* as they were beside it */
    uint32_t n_rows;               /* that were measured */
} timing;

static double nearer_limit(const timing *t)
{
    return t->limit_bytes > t->limit_operations ? t->limit_bytes : t->limit_operations;
}

/* Measures the tree with n_shared[i] of its levels shared, for each of n_ways, alternately. */
static kvl_status compare(const bench *b, const kvl_bench_shape *shape, const kvl_bench_tree *tree,
                          const uint32_t *n_shared, uint32_t n_ways, timing *timings,
                          kvl_error *error)
{
    kvl_bench_scene scenes[KVL_BENCH_LEVELS_MAX] = {0};
    double seconds[KVL_BENCH_LEVELS_MAX][REPEATS_MAX];
    double gflops[REPEATS_MAX], gbs[REPEATS_MAX];
    const uint32_t n_repeats = b->wanted->n_repeats;
    KVL_ASSERT(n_ways <= KVL_BENCH_LEVELS_MAX && n_repeats <= REPEATS_MAX);
    kvl_status status = KVL_OK;
    for (uint32_t i = 0; i < n_ways && status == KVL_OK; i++)
        status = kvl_bench_scene_init(&scenes[i], tree, n_shared[i], shape, b->memory, SCENE_FLOATS,
                                      error);
    for (uint32_t i = 0; i < n_ways && status == KVL_OK; i++)
        (void)kvl_bench_scene_run(&scenes[i], b->backend);
    for (uint32_t r = 0; r < n_repeats && status == KVL_OK; r++) {
        for (uint32_t i = 0; i < n_ways; i++)
            seconds[i][r] = kvl_bench_scene_run(&scenes[i], b->backend);
        gflops[r] = kvl_bench_sgemm_gflops(b->threads, &b->product, b->limit_memory, 2);
        gbs[r] = kvl_bench_read_gbs(b->threads, b->limit_memory, 1);
    }
    for (uint32_t i = 0; i < n_ways; i++) {
        if (status == KVL_OK) {
            timing *t = &timings[i];
            *t = (timing){.seconds = kvl_bench_median(seconds[i], n_repeats),
                          .sgemm_gflops = kvl_bench_median(gflops, n_repeats),
                          .read_gbs = kvl_bench_median(gbs, n_repeats),
                          .n_rows = scenes[i].n_rows};
            t->limit_bytes = scenes[i].n_bytes / t->read_gbs / 1e9;
            t->limit_operations = scenes[i].flops / t->sgemm_gflops / 1e9;
        }
        kvl_bench_scene_deinit(&scenes[i]);
    }
    return status;
}

static void add_figure(bench *b, const char *name, double value)
{
    (void)json_object_set_new(b->figures, name, json_real(value));
}

/* ---- decoding behind one prefix ---- */

static kvl_status measure_cell(bench *b, const kvl_bench_shape *shape, uint32_t n_rows,
                               uint32_t n_prefix, kvl_error *error)
{
    const kvl_bench_tree tree = {n_rows, 2, {n_prefix, SUFFIX_TOKENS}, {1, n_rows}};
    const uint32_t ways[] = {1, 0};
    timing t[2];
    KVL_TRY(compare(b, shape, &tree, ways, 2, t, error));
    const double fraction = nearer_limit(&t[0]) / t[0].seconds;
    const double speedup = t[1].seconds / t[0].seconds;
    if (n_rows >= 32 && fraction < b->fraction_min) b->fraction_min = fraction;
    (void)json_array_append_new(
        b->rows,
        json_pack(
            "{s:s, s:i, s:i, s:i, s:f, s:f, s:i, s:f, s:f, s:s, s:f, s:f, s:f, s:f, s:f, s:f}",
            "shape", shape->name, "rows", (int)n_rows, "prefix", (int)n_prefix, "suffix",
            SUFFIX_TOKENS, "shared_ms", t[0].seconds * 1e3, "unshared_ms", t[1].seconds * 1e3,
            "unshared_rows_measured", (int)t[1].n_rows, "limit_bytes_ms", t[0].limit_bytes * 1e3,
            "limit_operations_ms", t[0].limit_operations * 1e3, "bound_by",
            t[0].limit_bytes > t[0].limit_operations ? "bytes" : "operations", "fraction_of_limit",
            fraction, "unshared_fraction_of_limit", nearer_limit(&t[1]) / t[1].seconds,
            "shared_vs_unshared", speedup, "limits_shared_vs_unshared",
            nearer_limit(&t[1]) / nearer_limit(&t[0]), "sgemm_gflops", t[0].sgemm_gflops,
            "read_gb_per_s", t[0].read_gbs));
    (void)fprintf(stderr,
                  "%-18s rows %3u, prefix %4u: shared %8.3f ms, unshared %9.3f ms (%.2f times; the "
                  "limits: %.2f), %.2f of the limit of %s (%.0f GFLOP/s, %.1f GB/s)\n",
                  shape->name, n_rows, n_prefix, t[0].seconds * 1e3, t[1].seconds * 1e3, speedup,
                  nearer_limit(&t[1]) / nearer_limit(&t[0]), fraction,
                  t[0].limit_bytes > t[0].limit_operations ? "bytes" : "operations",
                  t[0].sgemm_gflops, t[0].read_gbs);
    if (n_rows == 32 && n_prefix == 8192) {
        char name[64];
        (void)snprintf(name, sizeof name, "shared_vs_unshared_b32_p8k_%s", shape->name);
        for (char *at = name; *at != '\0'; at++)
            if (*at == '-' || *at == '.') *at = '_';
        add_figure(b, name, speedup);
        const json_t *least = json_object_get(b->figures, "shared_vs_unshared_b32_p8k");
        if (least == NULL || json_real_value(least) > speedup)
            add_figure(b, "shared_vs_unshared_b32_p8k", speedup);
    }
    return KVL_OK;
}

static kvl_status measure_cells(bench *b, const kvl_bench_shape *shape, kvl_error *error)
{
    static const uint32_t n_rows[] = {8, 32, 128};
    static const uint32_t n_prefix[] = {1024, 4096, 8192};
    for (size_t i = 0; i < sizeof n_rows / sizeof *n_rows; i++)
        for (size_t k = 0; k < sizeof n_prefix / sizeof *n_prefix; k++)
            KVL_TRY(measure_cell(b, shape, n_rows[i], n_prefix[k], error));
    return KVL_OK;
}

/* ---- a tree ---- */

/* Competitive programming (Hydragen, section 4.4): examples before all problems, 16 samples of
 * each. Saved is what tree sharing takes less than sharing the examples only. */
static kvl_status measure_tree(bench *b, const kvl_bench_shape *shape, kvl_error *error)
{
    enum { PROBLEMS = 8, SAMPLES = 16, EXAMPLES = 2048, PROBLEM = 512 };
    const kvl_bench_tree tree = {PROBLEMS * SAMPLES,
                                 3,
                                 {EXAMPLES, PROBLEM, SUFFIX_TOKENS},
                                 {1, PROBLEMS, PROBLEMS * SAMPLES}};
    const uint32_t ways[] = {2, 1, 0};
    timing t[3];
    KVL_TRY(compare(b, shape, &tree, ways, 3, t, error));
    const double saved = 1.0 - t[0].seconds / t[2].seconds;
    const double saved_level = 1.0 - t[0].seconds / t[1].seconds;
    (void)json_array_append_new(
        b->rows,
        json_pack("{s:s, s:s, s:i, s:f, s:f, s:f, s:f, s:f, s:f}", "shape", shape->name, "tree",
                  "2048 examples, 8 problems of 512, 16 samples each", "rows", PROBLEMS * SAMPLES,
                  "tree_ms", t[0].seconds * 1e3, "one_level_ms", t[1].seconds * 1e3, "unshared_ms",
                  t[2].seconds * 1e3, "limit_ms", nearer_limit(&t[0]) * 1e3, "limits_saved",
                  1.0 - nearer_limit(&t[0]) / nearer_limit(&t[2]), "limits_saved_over_one_level",
                  1.0 - nearer_limit(&t[0]) / nearer_limit(&t[1])));
    (void)fprintf(stderr,
                  "%-18s tree: %.3f ms, one level %.3f ms, unshared %.3f ms: saves %.2f of no "
                  "sharing (the limits: %.2f), %.2f of one level\n",
                  shape->name, t[0].seconds * 1e3, t[1].seconds * 1e3, t[2].seconds * 1e3, saved,
                  1.0 - nearer_limit(&t[0]) / nearer_limit(&t[2]), saved_level);
    const json_t *least = json_object_get(b->figures, "tree_time_saved");
    if (least == NULL || json_real_value(least) > saved) {
        add_figure(b, "tree_time_saved", saved);
        add_figure(b, "tree_time_saved_over_one_level", saved_level);
    }
    return KVL_OK;
}

/* ---- a whole model ---- */

/* A step of n_rows rows in everything but attention. */
typedef struct rest {
    double seconds, n_bytes, flops;
} rest;

/* One row a path, each in a page of its own, so that attention is next to nothing. */
static kvl_status measure_rest(const bench *b, kvl_engine *engine, uint32_t n_rows, rest *out,
                               kvl_error *error)
{
    enum { ROWS_MAX = 64 };
    kvl_forward_row rows[ROWS_MAX];
    kvl_attention_path paths[ROWS_MAX];
    uint32_t pages[ROWS_MAX], logit_rows[ROWS_MAX];
    double seconds[REPEATS_MAX];
    KVL_ASSERT(n_rows <= ROWS_MAX);
    KVL_TRY(kvl_page_pool_acquire(engine->pool, n_rows, pages));
    float *logits = kvl_alloc_aligned((size_t)n_rows * engine->shape->n_vocab * sizeof(float));
    for (uint32_t r = 0; r < n_rows; r++) {
        paths[r] = (kvl_attention_path){&pages[r], 1};
        rows[r] = (kvl_forward_row){r, r, 0};
        logit_rows[r] = r;
    }
    const kvl_forward_batch batch = {.rows = rows,
                                     .n_rows = n_rows,
                                     .paths = paths,
                                     .n_paths = n_rows,
                                     .logit_rows = logit_rows,
                                     .n_logit_rows = n_rows,
                                     .logits = logits};
    kvl_status status =
        logits == NULL ? KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for logits") : KVL_OK;
    for (uint32_t i = 0; i <= b->wanted->n_repeats && status == KVL_OK; i++) {
        const int64_t start = kvl_clock_now(kvl_clock_system());
        status = kvl_forward_run(engine->forward, &batch, error);
        if (i > 0) seconds[i - 1] = kvl_bench_seconds_since(start);
    }
    if (status == KVL_OK) out->seconds = kvl_bench_median(seconds, b->wanted->n_repeats);
    kvl_free(logits);
    kvl_page_pool_release(engine->pool, n_rows, pages);
    kvl_bench_count_weights(engine, &out->n_bytes, &out->flops);
    const kvl_matrix *output = kvl_model_output(engine->model);
    out->flops = n_rows * (out->flops + 2.0 * output->n_inputs * output->n_outputs);
    return status;
}

/* How much slower a whole step of 64 rows is behind 16K tokens than behind 1K. The model may have
 * fewer positions, so a step is put together: attention measured by itself, times the layers, and
 * everything else measured in the model. */
static kvl_status measure_drop(bench *b, kvl_engine *engine, kvl_error *error)
{
    enum { ROWS = 64 };
    const kvl_bench_shape shape = {engine->shape->name, engine->shape->n_layers,
                                   engine->shape->n_heads, engine->shape->n_kv_heads,
                                   engine->shape->head_dim};
    static const uint32_t n_prefix[] = {1024, 16384};
    const uint32_t ways[] = {1};
    rest others;
    double step[2];
    double limit[2];
    KVL_TRY(measure_rest(b, engine, ROWS, &others, error));
    for (int i = 0; i < 2; i++) {
        const kvl_bench_tree tree = {ROWS, 2, {n_prefix[i], SUFFIX_TOKENS}, {1, ROWS}};
        timing t;
        KVL_TRY(compare(b, &shape, &tree, ways, 1, &t, error));
        step[i] = others.seconds + shape.n_layers * t.seconds;
        const timing limits = {.limit_bytes = others.n_bytes / t.read_gbs / 1e9,
                               .limit_operations = others.flops / t.sgemm_gflops / 1e9};
        limit[i] = nearer_limit(&limits) + shape.n_layers * nearer_limit(&t);
        (void)fprintf(stderr,
                      "%-18s rows %d, prefix %5u: step %.1f ms, of it attention %.1f ms; limits "
                      "%.1f ms\n",
                      "whole model", ROWS, n_prefix[i], step[i] * 1e3,
                      shape.n_layers * t.seconds * 1e3, limit[i] * 1e3);
    }
    add_figure(b, "throughput_drop_1k_16k", 1.0 - step[0] / step[1]);
    add_figure(b, "limits_throughput_drop_1k_16k", 1.0 - limit[0] / limit[1]);
    add_figure(b, "step_ms_64_rows_1k", step[0] * 1e3);
    add_figure(b, "step_ms_64_rows_16k", step[1] * 1e3);
    return KVL_OK;
}

/* ---- all of it ---- */

static void fill_item(void *context, size_t item, size_t thread)
{
    (void)thread;
    enum { ITEM_FLOATS = 1 << 20 };
    float *at = (float *)context + item * ITEM_FLOATS;
    for (size_t i = 0; i < ITEM_FLOATS; i++)
        at[i] = (float)((item + i) * 2654435761U % 2048) / 1024.0F - 1.0F;
}

/* OpenBLAS likes some shapes better than others: the limit is the one it likes best. */
static void choose_product(bench *b)
{
    static const kvl_bench_product products[] = {
        {512, 576, 1536}, {512, 1024, 2048}, {1024, 1024, 1024}, {512, 2048, 2048}};
    double best = 0.0;
    for (size_t i = 0; i < sizeof products / sizeof *products; i++) {
        const double rate = kvl_bench_sgemm_gflops(b->threads, &products[i], b->limit_memory, 5);
        if (rate <= best) continue;
        best = rate;
        b->product = products[i];
    }
    (void)fprintf(stderr, "limits: sgemm %.0f GFLOP/s (%u x %u x %u), reading %.1f GB/s\n", best,
                  b->product.n_rows, b->product.n_inputs, b->product.n_outputs,
                  kvl_bench_read_gbs(b->threads, b->limit_memory, 3));
}

static kvl_status measure_all(bench *b, kvl_engine *engine, kvl_error *error)
{
    b->memory = kvl_alloc_aligned(SCENE_FLOATS * sizeof(float));
    b->limit_memory = kvl_alloc_aligned(KVL_BENCH_FLOATS * sizeof(float));
    if (b->memory == NULL || b->limit_memory == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no %zu MiB of memory for keys and values",
                        (SCENE_FLOATS + KVL_BENCH_FLOATS) * sizeof(float) >> 20);
    kvl_pool_run(b->threads, fill_item, b->memory, SCENE_FLOATS >> 20);
    kvl_pool_run(b->threads, fill_item, b->limit_memory, KVL_BENCH_FLOATS >> 20);
    choose_product(b);
    bool found = false;
    for (size_t i = 0; i < N_SHAPES; i++) {
        if (b->wanted->shape != NULL && strcmp(b->wanted->shape, shapes[i].name) != 0) continue;
        found = true;
        KVL_TRY(measure_cells(b, &shapes[i], error));
        KVL_TRY(measure_tree(b, &shapes[i], error));
    }
    if (!found)
        return KVL_FAIL(error, KVL_ERR_NOT_FOUND, "there is no shape '%s'; there are %s, %s and %s",
                        b->wanted->shape, shapes[0].name, shapes[1].name, shapes[2].name);
    KVL_TRY(measure_drop(b, engine, error));
    add_figure(b, "shared_fraction_of_limit_min", b->fraction_min);
    return KVL_OK;
}

kvl_status kvl_bench_attention_run(const kvl_bench_attention *wanted, kvl_engine *engine,
                                   kvl_error *error)
{
    bench b = {.wanted = wanted,
               .threads = engine->threads,
               .backend = engine->backend,
               .fraction_min = 1e9,
               .figures = json_object(),
               .rows = json_array()};
    const kvl_status status = measure_all(&b, engine, error);
    kvl_free(b.memory);
    kvl_free(b.limit_memory);
    if (status == KVL_OK && wanted->json) {
        kvl_bench_print("attention", b.figures, b.rows, kvl_pool_n_threads(engine->threads),
                        engine->backend->ops->name);
        return KVL_OK;
    }
    if (status == KVL_OK) {
        const char *name = NULL;
        json_t *value = NULL;
        json_object_foreach(b.figures, name, value)(void)
            printf("%-48s %.3f\n", name, json_real_value(value));
    }
    json_decref(b.figures);
    json_decref(b.rows);
    return status;
}
