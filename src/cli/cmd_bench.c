/* cli/cmd_bench.c: `kvloom bench prefill|decode`: this engine beside this machine's own limits, in
 * one run. The limits: plain sgemm of the model's widest product, every thread its half, and
 * reading memory that fits no cache. Figures are medians of alternated repetitions. */
#include "base/alloc.h"
#include "base/clock.h"
#include "cli/bench.h"
#include "host/decode.h"

#include <argp.h>
#include <cblas.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

enum {
    TOKENS_DEFAULT = 512,
    REPEATS_MAX = 99,
    REPEATS_DEFAULT = 5,
    REPEATS_QUICK = 3,
    DECODED_TOKENS = 32,
    READ_FLOATS = 1 << 26, /* 256 MiB */
    OPTION_JSON = 256,
    OPTION_QUICK
};

typedef struct arguments {
    kvl_cli_engine engine;
    const char *name;
    uint32_t n_tokens, n_repeats;
    bool json;
} arguments;

static const struct argp_option options[] = {
    {"tokens", 'n', "N", 0, "Tokens of the prompt, or of context before decoding (512)", 0},
    {"repeats", 'r', "N", 0, "Repetitions; the median counts (5)", 0},
    {"quick", OPTION_QUICK, NULL, 0, "Fewer repetitions, under a minute", 0},
    {"json", OPTION_JSON, NULL, 0, "Print one JSON object", 0},
    {0},
};

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &wanted->engine; return 0;
    case 'n':
        wanted->n_tokens = kvl_cli_number(state, "--tokens", text, 2, KVL_POSITIONS_MAX);
        return 0;
    case 'r':
        wanted->n_repeats = kvl_cli_number(state, "--repeats", text, 1, REPEATS_MAX);
        return 0;
    case OPTION_QUICK: wanted->n_repeats = REPEATS_QUICK; return 0;
    case OPTION_JSON: wanted->json = true; return 0;
    case ARGP_KEY_ARG:
        if (wanted->name != NULL || (strcmp(text, "prefill") != 0 && strcmp(text, "decode") != 0))
            argp_usage(state);
        wanted->name = text;
        return 0;
    case ARGP_KEY_NO_ARGS: argp_usage(state); return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static int compare_doubles(const void *a, const void *b)
{
    const double x = *(const double *)a;
    const double y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *numbers, size_t n)
{
    qsort(numbers, n, sizeof *numbers, compare_doubles);
    return n % 2 == 1 ? numbers[n / 2] : (numbers[n / 2 - 1] + numbers[n / 2]) / 2;
}

static double seconds_since(int64_t start)
{
    return (double)(kvl_clock_now(kvl_clock_system()) - start) / (double)KVL_NS_PER_S;
}

/* --- the machine's limits --- */

typedef struct product {
    uint32_t n_rows, n_inputs, n_outputs;
    size_t n_parts;
    const float *x, *weights;
    float *y;
} product;

static void multiply_part(void *context, size_t item, size_t thread)
{
    (void)thread;
    const product *p = context;
    const uint32_t n = p->n_outputs / (uint32_t)p->n_parts;
    const size_t first = item * n;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)p->n_rows, (int)n, (int)p->n_inputs,
                1.0F, p->x, (int)p->n_inputs, p->weights + first * p->n_inputs, (int)p->n_inputs,
                0.0F, p->y + first, (int)p->n_outputs);
}

/* GFLOP/s of plain sgemm: 512 rows through the first product of the gated part. */
static double measure_sgemm(kvl_engine *engine, float *memory)
{
    enum { ROWS = 512 };
    product p = {ROWS,
                 engine->shape->width,
                 engine->shape->feed_forward,
                 kvl_pool_n_threads(engine->threads),
                 memory,
                 NULL,
                 NULL};
    const size_t n_x = (size_t)ROWS * p.n_inputs;
    const size_t n_weights = (size_t)p.n_outputs * p.n_inputs;
    KVL_ASSERT(n_x + n_weights + (size_t)ROWS * p.n_outputs <= READ_FLOATS);
    p.weights = memory + n_x;
    p.y = memory + n_x + n_weights;
    const double flops = 2.0 * ROWS * p.n_inputs * (double)(p.n_outputs / p.n_parts * p.n_parts);
    double best = 0.0;
    for (int i = 0; i < 10; i++) {
        const int64_t start = kvl_clock_now(kvl_clock_system());
        kvl_pool_run(engine->threads, multiply_part, &p, p.n_parts);
        const double rate = flops / seconds_since(start) / 1e9;
        if (i > 0 && rate > best) best = rate;
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
    const size_t n = READ_FLOATS / r->n_parts;
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

/* GB/s of reading memory with all threads. */
static double measure_reading(kvl_engine *engine, const float *memory)
{
    reading r = {.memory = memory, .n_parts = kvl_pool_n_threads(engine->threads)};
    double best = 0.0;
    for (int i = 0; i < 5; i++) {
        const int64_t start = kvl_clock_now(kvl_clock_system());
        kvl_pool_run(engine->threads, read_part, &r, r.n_parts);
        const double rate = (double)READ_FLOATS * sizeof(float) / seconds_since(start) / 1e9;
        if (i > 0 && rate > best) best = rate;
    }
    return best;
}

/* --- the engine --- */

static size_t matrix_bytes(const kvl_matrix *matrix)
{
    return matrix->row_bytes * matrix->n_outputs;
}

/* Weights that one decoded token reads, and multiplications and additions of one token in them. */
static void count_weights(const kvl_engine *engine, double *n_bytes, double *flops)
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

static kvl_status run_prefill(kvl_engine *engine, const uint32_t *ids, uint32_t n, float *logits,
                              double *seconds, kvl_error *error)
{
    kvl_session *session = NULL;
    uint32_t n_shared = 0;
    KVL_TRY(kvl_session_create(engine, &session, error));
    kvl_status status = kvl_session_begin(session, ids, n, 0, false, 0, &n_shared, error);
    const int64_t start = kvl_clock_now(kvl_clock_system());
    if (status == KVL_OK) status = kvl_session_compute_range(session, 0, n, 1, logits, error);
    *seconds = seconds_since(start);
    kvl_session_destroy(session);
    return status;
}

/* Decodes behind n tokens of context, always the same tokens: the speed does not depend on them. */
static kvl_status run_decode(kvl_engine *engine, const uint32_t *ids, uint32_t n, float *logits,
                             double *seconds, uint32_t n_repeats, kvl_error *error)
{
    kvl_session *session = NULL;
    uint32_t n_shared = 0;
    KVL_TRY(kvl_session_create(engine, &session, error));
    kvl_status status =
        kvl_session_begin(session, ids, n, DECODED_TOKENS, false, 0, &n_shared, error);
    if (status == KVL_OK) status = kvl_session_compute_range(session, 0, n, 1, logits, error);
    for (uint32_t r = 0; r < n_repeats && status == KVL_OK; r++) {
        kvl_session_truncate(session, n);
        const int64_t start = kvl_clock_now(kvl_clock_system());
        for (uint32_t i = 0; i < DECODED_TOKENS && status == KVL_OK; i++) {
            status = kvl_session_append(session, &ids[i], 1, error);
            if (status == KVL_OK)
                status = kvl_session_compute_range(session, n + i, n + i + 1, 1, logits, error);
        }
        seconds[r] = seconds_since(start);
    }
    kvl_session_destroy(session);
    return status;
}

typedef struct figures {
    double tokens_per_s, sgemm_gflops, read_gbs, fraction;
} figures;

static kvl_status measure(kvl_engine *engine, const arguments *wanted, float *memory,
                          const uint32_t *ids, float *logits, figures *out, kvl_error *error)
{
    double seconds[REPEATS_MAX] = {0};
    double n_bytes = 0.0;
    double flops = 0.0;
    const kvl_model_shape *shape = engine->shape;
    count_weights(engine, &n_bytes, &flops);
    out->sgemm_gflops = measure_sgemm(engine, memory);
    out->read_gbs = measure_reading(engine, memory);
    if (strcmp(wanted->name, "prefill") == 0) {
        double warm_up = 0.0;
        KVL_TRY(run_prefill(engine, ids, wanted->n_tokens, logits, &warm_up, error));
        for (uint32_t r = 0; r < wanted->n_repeats; r++)
            KVL_TRY(run_prefill(engine, ids, wanted->n_tokens, logits, &seconds[r], error));
        out->tokens_per_s = wanted->n_tokens / median(seconds, wanted->n_repeats);
        /* Attention: scores and values, half of the square on average. */
        flops += 2.0 * shape->n_layers * shape->n_heads * shape->head_dim * wanted->n_tokens;
        out->fraction = out->tokens_per_s * flops / 1e9 / out->sgemm_gflops;
        return KVL_OK;
    }
    KVL_TRY(run_decode(engine, ids, wanted->n_tokens, logits, seconds, wanted->n_repeats, error));
    out->tokens_per_s = DECODED_TOKENS / median(seconds, wanted->n_repeats);
    n_bytes += 2.0 * shape->n_layers * shape->n_kv_heads * shape->head_dim * sizeof(float) *
               wanted->n_tokens;
    out->fraction = out->tokens_per_s * n_bytes / 1e9 / out->read_gbs;
    return KVL_OK;
}

static void print_figures(const kvl_engine *engine, const arguments *wanted, const figures *seen)
{
    const bool prefill = strcmp(wanted->name, "prefill") == 0;
    const char *fraction = prefill ? "fraction_of_sgemm" : "fraction_of_memory_bandwidth";
    if (!wanted->json) {
        (void)printf("%s of %u tokens: %.1f tokens/s, %.2f of %s (sgemm %.0f GFLOP/s, reading "
                     "%.1f GB/s)\n",
                     wanted->name, wanted->n_tokens, seen->tokens_per_s, seen->fraction,
                     prefill ? "sgemm" : "memory bandwidth", seen->sgemm_gflops, seen->read_gbs);
        return;
    }
    json_t *report = json_pack(
        "{s:s, s:{s:f, s:f, s:f, s:f}, s:[], s:{s:i, s:s}, s:s}", "name", wanted->name, "figures",
        prefill ? "prefill_tokens_per_s" : "decode_tokens_per_s", seen->tokens_per_s, fraction,
        seen->fraction, "sgemm_gflops", seen->sgemm_gflops, "read_gb_per_s", seen->read_gbs, "rows",
        "machine", "threads", (int)kvl_pool_n_threads(engine->threads), "kernels",
        engine->backend->ops->name, "version", KVL_VERSION);
    (void)json_dumpf(report, stdout, JSON_INDENT(2));
    (void)printf("\n");
    json_decref(report);
}

static kvl_status bench(kvl_engine *engine, const arguments *wanted, kvl_error *error)
{
    const uint32_t n_vocab = engine->shape->n_vocab;
    float *memory = kvl_alloc_aligned((size_t)READ_FLOATS * sizeof(float));
    float *logits = kvl_alloc((size_t)n_vocab * sizeof(float));
    uint32_t *ids = kvl_alloc_zero(wanted->n_tokens + DECODED_TOKENS, sizeof *ids);
    kvl_status status = KVL_OK;
    if (memory == NULL || logits == NULL || ids == NULL) {
        status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a benchmark");
    } else {
        kvl_random random = {1};
        for (size_t i = 0; i < READ_FLOATS; i++) memory[i] = (float)(i % 17) - 8.0F;
        for (uint32_t i = 0; i < wanted->n_tokens + DECODED_TOKENS; i++)
            ids[i] = (uint32_t)kvl_random_below(&random, n_vocab);
        figures seen = {0};
        status = measure(engine, wanted, memory, ids, logits, &seen, error);
        if (status == KVL_OK) print_figures(engine, wanted, &seen);
    }
    kvl_free(ids);
    kvl_free(logits);
    kvl_free(memory);
    return status;
}

int kvl_command_bench(int argc, char **argv)
{
    static const struct argp_child children[] = {{&kvl_cli_engine_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {options,
                                     parse,
                                     "prefill|decode|exchange|store",
                                     "Measure this engine beside this machine's limits.",
                                     children,
                                     NULL,
                                     NULL};
    if (argc > 1 && strcmp(argv[1], "exchange") == 0) return kvl_bench_exchange(argc - 1, argv + 1);
    if (argc > 1 && strcmp(argv[1], "store") == 0) return kvl_bench_store(argc - 1, argv + 1);
    arguments wanted = {.n_tokens = TOKENS_DEFAULT, .n_repeats = REPEATS_DEFAULT};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    kvl_error error;
    kvl_engine *engine = NULL;
    if (kvl_cli_engine_create(&wanted.engine, 0, &engine, &error) != KVL_OK)
        return kvl_cli_fail(&error);
    const kvl_status status = bench(engine, &wanted, &error);
    kvl_engine_destroy(engine);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
