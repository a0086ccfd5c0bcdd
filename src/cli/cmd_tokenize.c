/* cli/cmd_tokenize.c: `kvloom tokenize`: text to ids, one a line, and back. */
#include "base/alloc.h"
#include "base/file.h"
#include "cli/cli.h"

#include <argp.h>

typedef struct arguments {
    kvl_cli_engine engine;
    const char *file;
    bool decode;
    bool special;
} arguments;

static const struct argp_option options[] = {
    {"decode", 'd', NULL, 0, "Turn ids, one a line, back to bytes", 0},
    {"special", 's', NULL, 0, "Recognise the texts of special tokens", 0},
    {0},
};

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &wanted->engine; return 0;
    case 'd': wanted->decode = true; return 0;
    case 's': wanted->special = true; return 0;
    case ARGP_KEY_ARG:
        if (wanted->file != NULL) argp_usage(state);
        wanted->file = text;
        return 0;
    case ARGP_KEY_NO_ARGS: argp_usage(state); return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static kvl_status encode(const kvl_tokenizer *tokenizer, const arguments *wanted, kvl_error *error)
{
    char *text = NULL;
    size_t n_bytes = 0;
    KVL_TRY(kvl_file_read(wanted->file, KVL_TEXT_BYTES_MAX, &text, &n_bytes, error));
    uint32_t *ids = NULL;
    size_t n_ids = 0;
    const kvl_status status =
        kvl_tokenize(tokenizer, text, n_bytes, wanted->special, &ids, &n_ids, error);
    for (size_t i = 0; status == KVL_OK && i < n_ids; i++) (void)printf("%u\n", ids[i]);
    kvl_free(ids);
    kvl_free(text);
    return status;
}

static kvl_status decode(const kvl_tokenizer *tokenizer, const arguments *wanted, kvl_error *error)
{
    uint32_t *ids = NULL;
    size_t n_ids = 0;
    KVL_TRY(kvl_cli_read_ids(wanted->file, kvl_tokenizer_n_vocab(tokenizer), &ids, &n_ids, error));
    for (size_t i = 0; i < n_ids; i++) {
        size_t n_bytes = 0;
        const char *bytes = kvl_token_bytes(tokenizer, ids[i], true, &n_bytes);
        (void)fwrite(bytes, 1, n_bytes, stdout);
    }
    kvl_free(ids);
    return KVL_OK;
}

int kvl_command_tokenize(int argc, char **argv)
{
    static const struct argp_child children[] = {{&kvl_cli_engine_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        options, parse, "FILE", "Print the token ids of a text, one a line.", children, NULL, NULL};
    arguments wanted = {0};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    kvl_error error;
    char path[PATH_MAX];
    kvl_model *model = NULL;
    const char *name = wanted.engine.model == NULL ? "smollm2-135m" : wanted.engine.model;
    if (kvl_models_find(name, path, &error) != KVL_OK) return kvl_cli_fail(&error);
    if (kvl_model_open(path, &model, &error) != KVL_OK) return kvl_cli_fail(&error);
    const kvl_tokenizer *tokenizer = kvl_model_tokenizer(model);
    const kvl_status status =
        wanted.decode ? decode(tokenizer, &wanted, &error) : encode(tokenizer, &wanted, &error);
    kvl_model_close(model);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
