/* cli/cmd_logits.c: `kvloom logits`: logits of every position of a text, for comparison with other
 * engines: float32 [n_tokens][n_vocab], little endian. */
#include "base/alloc.h"
#include "cli/cli.h"

#include <argp.h>
#include <errno.h>
#include <string.h>

typedef struct arguments {
    kvl_cli_engine engine;
    const char *ids;
    const char *out;
    uint32_t n_rows;
} arguments;

/* Rows of logits that are held in memory at a time: 25 MB for 49,152 tokens of vocabulary. */
enum { ROWS_DEFAULT = 128, OPTION_ROWS = 256 };

static const struct argp_option options[] = {
    {"tokens-file", 'f', "IDS", 0, "Token ids, one a line", 0},
    {"out", 'o', "FILE", 0, "Where the logits go", 0},
    {"rows", OPTION_ROWS, "N", 0, "Tokens to compute at a time (128)", 0},
    {0},
};

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &wanted->engine; return 0;
    case 'f': wanted->ids = text; return 0;
    case 'o': wanted->out = text; return 0;
    case OPTION_ROWS:
        wanted->n_rows = kvl_cli_number(state, "--rows", text, 1, KVL_FORWARD_ROWS_MAX);
        return 0;
    case ARGP_KEY_END:
        if (wanted->ids == NULL || wanted->out == NULL)
            argp_error(state, "--tokens-file and --out are needed");
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static kvl_status write_logits(kvl_session *session, const arguments *wanted, uint32_t n_vocab,
                               float *logits, FILE *out, kvl_error *error)
{
    const uint32_t n_tokens = kvl_session_n_tokens(session);
    for (uint32_t first = 0; first < n_tokens; first += wanted->n_rows) {
        const uint32_t left = n_tokens - first;
        const uint32_t n = left < wanted->n_rows ? left : wanted->n_rows;
        KVL_TRY(kvl_session_compute_range(session, first, first + n, n, logits, error));
        if (fwrite(logits, n_vocab * sizeof(float), n, out) != n)
            return KVL_FAIL(error, KVL_ERR_IO, "cannot write %s: %s", wanted->out, strerror(errno));
    }
    return KVL_OK;
}

static kvl_status compute(kvl_engine *engine, const arguments *wanted, FILE *out, kvl_error *error)
{
    const uint32_t n_vocab = engine->shape->n_vocab;
    uint32_t *ids = NULL;
    size_t n_ids = 0;
    KVL_TRY(kvl_cli_read_ids(wanted->ids, n_vocab, &ids, &n_ids, error));
    float *logits = kvl_alloc((size_t)wanted->n_rows * n_vocab * sizeof(float));
    kvl_session *session = NULL;
    uint32_t n_shared = 0;
    kvl_status status = kvl_session_create(engine, &session, error);
    if (status == KVL_OK && logits == NULL)
        status =
            KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for %u rows of logits", wanted->n_rows);
    if (status == KVL_OK)
        status =
            n_ids > engine->n_positions
                ? KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "%s has %zu ids, the context is %u",
                           wanted->ids, n_ids, engine->n_positions)
                : kvl_session_begin(session, ids, (uint32_t)n_ids, 0, false, 0, &n_shared, error);
    if (status == KVL_OK) status = write_logits(session, wanted, n_vocab, logits, out, error);
    kvl_session_destroy(session);
    kvl_free(logits);
    kvl_free(ids);
    return status;
}

int kvl_command_logits(int argc, char **argv)
{
    static const struct argp_child children[] = {{&kvl_cli_engine_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        options, parse, NULL, "Write the logits of every token of a text.", children, NULL, NULL};
    arguments wanted = {.n_rows = ROWS_DEFAULT};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    kvl_error error;
    kvl_engine *engine = NULL;
    if (kvl_cli_engine_create(&wanted.engine, 0, &engine, &error) != KVL_OK)
        return kvl_cli_fail(&error);
    FILE *out = fopen(wanted.out, "wb");
    kvl_status status = out == NULL ? KVL_FAIL(&error, KVL_ERR_IO, "cannot create %s: %s",
                                               wanted.out, strerror(errno))
                                    : compute(engine, &wanted, out, &error);
    if (out != NULL && fclose(out) != 0 && status == KVL_OK)
        status = KVL_FAIL(&error, KVL_ERR_IO, "cannot write %s: %s", wanted.out, strerror(errno));
    kvl_engine_destroy(engine);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
