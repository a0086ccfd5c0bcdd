/* cli/bench_data.c: medians, containers and output of the benches of exchange and store. */
#include "cli/bench_data.h"
#include "base/random.h"

#include <argp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

enum { OPTION_JSON = 256, OPTION_QUICK, REPEATS_DEFAULT = 15, REPEATS_QUICK = 5 };

static const struct argp_option options[] = {
    {"repeats", 'r', "N", 0, "Repetitions, in turns; the median counts (15)", 0},
    {"quick", OPTION_QUICK, NULL, 0, "Fewer repetitions, under a minute", 0},
    {"json", OPTION_JSON, NULL, 0, "Print one JSON object", 0},
    {0},
};

static error_t parse(int key, char *text, struct argp_state *state)
{
    kvl_bench_options *wanted = state->input;
    switch (key) {
    case 'r': wanted->n_repeats = kvl_cli_number(state, "--repeats", text, 1, 1000); return 0;
    case OPTION_QUICK: wanted->n_repeats = REPEATS_QUICK; return 0;
    case OPTION_JSON: wanted->json = true; return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

bool kvl_bench_parse(int argc, char **argv, const char *about, kvl_bench_options *wanted)
{
    const struct argp argp = {options, parse, NULL, about, NULL, NULL, NULL};
    *wanted = (kvl_bench_options){.n_repeats = REPEATS_DEFAULT};
    return argp_parse(&argp, argc, argv, 0, NULL, wanted) == 0;
}

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a;
    const double y = *(const double *)b;
    return (x > y) - (x < y);
}

double kvl_bench_quantile(double *numbers, size_t n, double quantile)
{
    qsort(numbers, n, sizeof *numbers, compare);
    return numbers[(size_t)((double)(n - 1) * quantile + 0.5)];
}

kvl_digest kvl_bench_fingerprint(void)
{
    kvl_digest digest;
    memset(digest.bytes, 0x42, sizeof digest.bytes);
    return digest;
}

kvl_digest kvl_bench_id(uint64_t number)
{
    kvl_digest digest;
    kvl_random random = {number};
    for (size_t i = 0; i < sizeof digest.bytes; i++)
        digest.bytes[i] = (uint8_t)kvl_random_next(&random);
    return digest;
}

kvl_status kvl_bench_container(uint64_t number, size_t n_bytes, uint32_t n_layers,
                               kvl_container **container, kvl_error *error)
{
    const uint32_t tokens[] = {1};
    const kvl_container_info info = {.kind = KVL_CONTAINER_ANCHOR,
                                     .id = kvl_bench_id(number),
                                     .fingerprint = kvl_bench_fingerprint(),
                                     .dtype = KVL_KV_F16,
                                     .n_layers = n_layers,
                                     .n_kv_heads = 1,
                                     .head_dim = 1,
                                     .n_tokens = 1,
                                     .block_bytes = n_bytes / n_layers,
                                     .tokens = tokens};
    KVL_TRY(kvl_container_create(&info, container, error));
    kvl_random random = {number + 1};
    for (uint32_t l = 0; l < n_layers; l++) {
        size_t n = 0;
        uint8_t *block = kvl_container_block(*container, l, &n);
        for (size_t i = 0; i + 8 <= n; i += 8) {
            const uint64_t word = kvl_random_next(&random);
            memcpy(block + i, &word, sizeof word);
        }
    }
    kvl_container_seal(*container);
    return KVL_OK;
}

void kvl_bench_row(json_t *rows, const char *what, double value, const char *unit)
{
    (void)json_array_append_new(
        rows, json_pack("{s:s, s:f, s:s}", "what", what, "value", value, "unit", unit));
}

void kvl_bench_report(const char *name, const kvl_bench_options *wanted, json_t *figures,
                      json_t *rows)
{
    struct utsname machine;
    (void)uname(&machine);
    if (wanted->json) {
        json_t *report =
            json_pack("{s:s, s:o, s:o, s:{s:i, s:s}, s:s}", "name", name, "figures", figures,
                      "rows", rows, "machine", "processors", (int)sysconf(_SC_NPROCESSORS_ONLN),
                      "kernel", machine.release, "version", KVL_VERSION);
        (void)json_dumpf(report, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(5));
        (void)printf("\n");
        json_decref(report);
        return;
    }
    const char *key = NULL;
    json_t *value = NULL;
    json_object_foreach(figures, key, value)
    {
        if (json_is_number(value)) (void)printf("%-24s %.3g\n", key, json_number_value(value));
        if (json_is_null(value)) (void)printf("%-24s not measured\n", key);
    }
    size_t i = 0;
    json_array_foreach(rows, i, value)
    {
        (void)printf("  %-44s %10.4g %s\n", json_string_value(json_object_get(value, "what")),
                     json_number_value(json_object_get(value, "value")),
                     json_string_value(json_object_get(value, "unit")));
    }
    json_decref(figures);
    json_decref(rows);
}
