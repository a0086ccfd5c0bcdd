/* cli/common.c: options, files and errors that the subcommands share. */
#include "base/alloc.h"
#include "base/file.h"
#include "cli/cli.h"

#include <argp.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

const char *argp_program_version = "kvloom " KVL_VERSION;

enum { IDS_FILE_BYTES_MAX = 64 << 20 };

int kvl_cli_fail(const kvl_error *error)
{
    (void)fprintf(stderr, "kvloom: %s (%s)\n", error->text, kvl_status_name(error->status));
    return KVL_EXIT_FAILED;
}

uint32_t kvl_cli_number(const struct argp_state *state, const char *option, const char *text,
                        uint32_t least, uint32_t most)
{
    char *end = NULL;
    errno = 0;
    const unsigned long number = strtoul(text, &end, 10);
    const bool is_number = text[0] >= '0' && text[0] <= '9' && *end == '\0' && errno == 0;
    if (!is_number || number < least || number > most)
        argp_error(state, "%s is '%s'; it must be a whole number from %u to %u", option, text,
                   least, most);
    return (uint32_t)number;
}

kvl_status kvl_cli_temporary(const char *what, char *path, size_t n_path_bytes, kvl_error *error)
{
    const char *parent = getenv("TMPDIR");
    if (parent == NULL || parent[0] != '/') parent = "/tmp";
    const int n = snprintf(path, n_path_bytes, "%s/kvloom-%s-XXXXXX", parent, what);
    if (n < 0 || (size_t)n >= n_path_bytes) {
        path[0] = '\0';
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "TMPDIR is %s: too long for a socket's path; use a shorter one", parent);
    }
    if (mkdtemp(path) != NULL) return KVL_OK;
    const int reason = errno;
    path[0] = '\0';
    return KVL_FAIL(error, KVL_ERR_IO, "cannot make a directory in %s: %s", parent,
                    strerror(reason));
}

enum { OPTION_CPU = 256, OPTION_DEVICE };

static const struct argp_option engine_options[] = {
    {"model", 'm', "MODEL", 0, "GGUF file, or a name of `kvloom model list` (smollm2-135m)", 0},
    {"threads", 't', "N", 0, "Threads to compute with (one a processor)", 0},
    {"context", 'c', "N", 0, "Tokens of context (what the model was made for)", 0},
    {"device", OPTION_DEVICE, "DEVICE", 0, "auto, cpu, cuda or cuda:N (auto)", 0},
    {"cpu", OPTION_CPU, "KERNELS", 0, "best, portable, avx2 or avx512 (best)", 0},
    {0},
};

static kvl_cpu_variant parse_variant(const struct argp_state *state, const char *text)
{
    if (strcmp(text, "best") == 0) return KVL_CPU_BEST;
    for (kvl_cpu_variant v = KVL_CPU_PORTABLE; v <= KVL_CPU_AVX512; v++) {
        if (strcmp(text, kvl_cpu_variant_name(v)) == 0) return v;
    }
    argp_error(state, "--cpu is '%s'; it must be best, portable, avx2 or avx512", text);
    return KVL_CPU_BEST;
}

static error_t parse_engine_option(int key, char *text, struct argp_state *state)
{
    kvl_cli_engine *engine = state->input;
    switch (key) {
    case 'm': engine->model = text; return 0;
    case 't':
        engine->n_threads = kvl_cli_number(state, "--threads", text, 1, KVL_POOL_THREADS_MAX);
        return 0;
    case 'c':
        engine->n_positions = kvl_cli_number(state, "--context", text, 1, KVL_POSITIONS_MAX);
        return 0;
    case OPTION_DEVICE: engine->device = text; return 0;
    case OPTION_CPU: engine->variant = parse_variant(state, text); return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

const struct argp kvl_cli_engine_argp = {
    .options = engine_options,
    .parser = parse_engine_option,
};

const char *kvl_cli_device(const kvl_cli_engine *options)
{
    return options->device == NULL ? "auto" : options->device;
}

kvl_status kvl_cli_engine_create(const kvl_cli_engine *options, uint32_t n_pages,
                                 kvl_engine **engine, kvl_error *error)
{
    *engine = NULL;
    char path[PATH_MAX];
    KVL_TRY(kvl_models_find(options->model == NULL ? "smollm2-135m" : options->model, path, error));
    const kvl_engine_options made = {
        .model_path = path,
        .n_threads = options->n_threads,
        .n_positions = options->n_positions,
        .n_pages = n_pages,
        .device = kvl_cli_device(options),
        .variant = options->variant,
    };
    return kvl_engine_create(&made, engine, error);
}

void kvl_cli_name_model(const char *model, char name[KVL_MODEL_NAME_MAX])
{
    if (model == NULL) model = "smollm2-135m";
    const char *slash = strrchr(model, '/');
    (void)snprintf(name, KVL_MODEL_NAME_MAX, "%s", slash == NULL ? model : slash + 1);
    char *ending = strstr(name, ".gguf");
    if (ending != NULL) *ending = '\0';
}

static kvl_status parse_ids(const char *path, const char *text, uint32_t n_vocab, uint32_t *ids,
                            size_t *n_ids, kvl_error *error)
{
    size_t n = 0;
    for (const char *at = text; *at != '\0';) {
        if (*at == ' ' || *at == '\n' || *at == '\r' || *at == '\t') {
            at++;
            continue;
        }
        char *end = NULL;
        errno = 0;
        const unsigned long id = strtoul(at, &end, 10);
        if (*at < '0' || *at > '9' || errno != 0 || id >= n_vocab)
            return KVL_FAIL(error, KVL_ERR_MALFORMED,
                            "%s, byte %td: '%.12s' is not a token id below %u", path, at - text, at,
                            n_vocab);
        ids[n++] = (uint32_t)id;
        at = end;
    }
    *n_ids = n;
    return KVL_OK;
}

kvl_status kvl_cli_read_ids(const char *path, uint32_t n_vocab, uint32_t **ids, size_t *n_ids,
                            kvl_error *error)
{
    *ids = NULL;
    *n_ids = 0;
    char *text = NULL;
    size_t n_bytes = 0;
    KVL_TRY(kvl_file_read(path, IDS_FILE_BYTES_MAX, &text, &n_bytes, error));
    /* Every id takes at least one digit and, but for the last, one separator. */
    uint32_t *read = kvl_alloc_zero(n_bytes / 2 + 1, sizeof *read);
    kvl_status status = KVL_OK;
    if (read == NULL) {
        status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the ids of %s", path);
    } else {
        status = parse_ids(path, text, n_vocab, read, n_ids, error);
    }
    if (status == KVL_OK && *n_ids == 0)
        status = KVL_FAIL(error, KVL_ERR_MALFORMED, "%s has no token ids", path);
    kvl_free(text);
    if (status != KVL_OK) {
        kvl_free(read);
        return status;
    }
    *ids = read;
    return KVL_OK;
}
