/* cli/cmd_bench.c: `kvloom bench prefill|decode|attention`: this engine beside this machine's own
 * limits, in one run. The limits: plain sgemm of the model's widest product, and reading memory
 * that fits no cache (bench_machine.c). Figures are medians of repetitions. */
#include "base/alloc.h"
#include "base/clock.h"
#include "cli/bench_data.h"
#include "cli/bench_load.h"
#include "cli/bench_rag.h"
#include "cli/cli.h"
#include "host/decode.h"

#include <argp.h>
#include <string.h>

enum {
    TOKENS_DEFAULT = 512,
    REPEATS_MAX = 99,
    REPEATS_DEFAULT = 5,
    REPEATS_QUICK = 3,
    LOAD_MOST = 24,
    DECODED_TOKENS = 32,
    OPTION_JSON = 256,
    OPTION_QUICK,
    OPTION_ONLY
};

typedef struct arguments {
    kvl_cli_engine engine;
    const char *name, *shape, *only;
    uint32_t n_tokens, n_repeats;
    bool json, quick;
} arguments;

static const struct argp_option options[] = {
    {"tokens", 'n', "N", 0, "Tokens of the prompt, or of context before decoding (512)", 0},
    {"repeats", 'r', "N", 0, "Repetitions; the median counts (5). load: half of the requests", 0},
    {"shape", 's', "SHAPE", 0, "attention: only smollm2-135m, qwen2.5-coder-0.5b or llama-3.1-8b",
     0},
    {"only", OPTION_ONLY, "PART", 0, "load: only healing, or only order", 0},
    {"quick", OPTION_QUICK, NULL, 0, "Fewer repetitions, under a minute", 0},
    {"json", OPTION_JSON, NULL, 0, "Print one JSON object", 0},
    {0},
};

static bool is_bench(const char *name)
{
    return strcmp(name, "prefill") == 0 || strcmp(name, "decode") == 0 ||
           strcmp(name, "attention") == 0 || strcmp(name, "rag") == 0 || strcmp(name, "load") == 0;
}

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
    case OPTION_ONLY:
        if (strcmp(text, "healing") != 0 && strcmp(text, "order") != 0)
            argp_error(state, "--only is '%s'; it must be healing or order", text);
        wanted->only = text;
        return 0;
    case 's': wanted->shape = text; return 0;
    case OPTION_QUICK:
        wanted->n_repeats = REPEATS_QUICK;
        wanted->quick = true;
        return 0;
    case OPTION_JSON: wanted->json = true; return 0;
    case ARGP_KEY_ARG:
        if (wanted->name != NULL || (!is_bench(text))) argp_usage(state);
        wanted->name = text;
        return 0;
    case ARGP_KEY_NO_ARGS: argp_usage(state); return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

/* GFLOP/s of plain sgemm: 512 rows through the first product of the gated part. */
static double measure_sgemm(kvl_engine *engine, float *memory)
{
    const kvl_bench_product product = {512, engine->shape->width, engine->shape->feed_forward};
    return kvl_bench_sgemm_gflops(engine->threads, &product, memory, 10);
}

/* --- the engine --- */

static kvl_status run_prefill(kvl_engine *engine, const uint32_t *ids, uint32_t n, float *logits,
                              double *seconds, kvl_error *error)
{
    kvl_session *session = NULL;
    uint32_t n_shared = 0;
    KVL_TRY(kvl_session_create(engine, &session, error));
    kvl_status status = kvl_session_begin(session, ids, n, 0, false, 0, &n_shared, error);
    const int64_t start = kvl_clock_now(kvl_clock_system());
    if (status == KVL_OK) status = kvl_session_compute_range(session, 0, n, 1, logits, error);
    *seconds = kvl_bench_seconds_since(start);
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
        seconds[r] = kvl_bench_seconds_since(start);
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
    kvl_bench_count_weights(engine, &n_bytes, &flops);
    out->sgemm_gflops = measure_sgemm(engine, memory);
    out->read_gbs = kvl_bench_read_gbs(engine->threads, memory, 5);
    if (strcmp(wanted->name, "prefill") == 0) {
        double warm_up = 0.0;
        KVL_TRY(run_prefill(engine, ids, wanted->n_tokens, logits, &warm_up, error));
        for (uint32_t r = 0; r < wanted->n_repeats; r++)
            KVL_TRY(run_prefill(engine, ids, wanted->n_tokens, logits, &seconds[r], error));
        out->tokens_per_s = wanted->n_tokens / kvl_bench_median(seconds, wanted->n_repeats);
        /* Attention: scores and values, half of the square on average. */
        flops += 2.0 * shape->n_layers * shape->n_heads * shape->head_dim * wanted->n_tokens;
        out->fraction = out->tokens_per_s * flops / 1e9 / out->sgemm_gflops;
        return KVL_OK;
    }
    KVL_TRY(run_decode(engine, ids, wanted->n_tokens, logits, seconds, wanted->n_repeats, error));
    out->tokens_per_s = DECODED_TOKENS / kvl_bench_median(seconds, wanted->n_repeats);
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
    json_t *report =
        json_pack("{s:f, s:f, s:f, s:f}", prefill ? "prefill_tokens_per_s" : "decode_tokens_per_s",
                  seen->tokens_per_s, fraction, seen->fraction, "sgemm_gflops", seen->sgemm_gflops,
                  "read_gb_per_s", seen->read_gbs);
    kvl_bench_print(wanted->name, report, json_array(), kvl_pool_n_threads(engine->threads),
                    engine->backend->ops->name);
}

static kvl_status bench(kvl_engine *engine, const arguments *wanted, kvl_error *error)
{
    const uint32_t n_vocab = engine->shape->n_vocab;
    float *memory = kvl_alloc_aligned(KVL_BENCH_FLOATS * sizeof(float));
    float *logits = kvl_alloc((size_t)n_vocab * sizeof(float));
    uint32_t *ids = kvl_alloc_zero(wanted->n_tokens + DECODED_TOKENS, sizeof *ids);
    kvl_status status = KVL_OK;
    if (memory == NULL || logits == NULL || ids == NULL) {
        status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a benchmark");
    } else {
        kvl_random random = {1};
        for (size_t i = 0; i < KVL_BENCH_FLOATS; i++) memory[i] = (float)(i % 17) - 8.0F;
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

/* The figures stand beside the name as well as in their object. */
static int bench_hosts(arguments *wanted)
{
    const bool is_rag = strcmp(wanted->name, "rag") == 0;
    kvl_error error = {0};
    json_t *measured = json_object();
    json_t *rows = json_array();
    if (wanted->engine.n_positions == 0) wanted->engine.n_positions = 4096;
    const kvl_status status =
        is_rag ? kvl_bench_rag_run(&wanted->engine, wanted->quick, wanted->n_repeats, measured,
                                   rows, &error)
               : kvl_bench_load_run(&wanted->engine, wanted->only,
                                    wanted->n_repeats < LOAD_MOST ? 2 * wanted->n_repeats
                                                                  : 2 * LOAD_MOST,
                                    measured, rows, &error);
    if (status == KVL_OK && wanted->json) {
        json_t *report = json_pack("{s:s, s:O, s:O, s:{s:s}, s:s}", "name", wanted->name, "figures",
                                   measured, "rows", rows, "machine", "device",
                                   kvl_cli_device(&wanted->engine), "version", KVL_VERSION);
        (void)json_object_update(report, measured);
        (void)json_dumpf(report, stdout, JSON_INDENT(2));
        (void)printf("\n");
        json_decref(report);
    } else if (status == KVL_OK) {
        const char *name = NULL;
        json_t *value = NULL;
        json_object_foreach(measured, name, value)(void)
            printf("%-34s %8.3f\n", name, json_real_value(value));
    }
    json_decref(measured);
    json_decref(rows);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}

int kvl_command_bench(int argc, char **argv)
{
    static const struct argp_child children[] = {{&kvl_cli_engine_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {options,
                                     parse,
                                     "prefill|decode|attention|rag|load|exchange|store",
                                     "Measure this engine beside this machine's limits.",
                                     children,
                                     NULL,
                                     NULL};
    if (argc > 1 && strcmp(argv[1], "exchange") == 0) return kvl_bench_exchange(argc - 1, argv + 1);
    if (argc > 1 && strcmp(argv[1], "store") == 0) return kvl_bench_store(argc - 1, argv + 1);
    arguments wanted = {.n_tokens = TOKENS_DEFAULT, .n_repeats = REPEATS_DEFAULT};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    if (strcmp(wanted.name, "rag") == 0 || strcmp(wanted.name, "load") == 0)
        return bench_hosts(&wanted);
    kvl_error error;
    kvl_engine *engine = NULL;
    if (kvl_cli_engine_create(&wanted.engine, 0, &engine, &error) != KVL_OK)
        return kvl_cli_fail(&error);
    kvl_status status = KVL_OK;
    if (strcmp(wanted.name, "attention") == 0) {
        const kvl_bench_attention attention = {wanted.shape, wanted.n_repeats, wanted.json};
        status = kvl_bench_attention_run(&attention, engine, &error);
    } else {
        status = bench(engine, &wanted, &error);
    }
    kvl_engine_destroy(engine);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
