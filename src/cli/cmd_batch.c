/* cli/cmd_batch.c: `kvloom batch IN.jsonl OUT.jsonl`: a file of requests, answered offline. */
#include "cli/cli.h"
#include "http/batch.h"

#include <argp.h>
#include <jansson.h>
#include <string.h>
#include <unistd.h>

enum { OPTION_JSON = 256, OPTION_ORDER, OPTION_ANSWERS, OPTION_PAGES, OPTION_STEP_ROWS };

/* More than a server runs at once: nobody waits for any single answer. */
enum { ANSWERS_DEFAULT = 128, STEP_ROWS_DEFAULT = 512 };

typedef struct arguments {
    kvl_cli_engine engine;
    kvl_batch_options batch;
    uint32_t n_pages;
    bool json;
} arguments;

static const struct argp_option options[] = {
    {"order", OPTION_ORDER, "ORDER", 0,
     "plan: by what rows share; file: as they stand, to compare with (plan)", 0},
    {"answers", OPTION_ANSWERS, "N", 0, "Answers that are computed at once (128)", 0},
    {"step-rows", OPTION_STEP_ROWS, "N", 0, "Tokens of one step (512)", 0},
    {"pages", OPTION_PAGES, "N", 0, "Pages of 16 tokens of KV (three contexts)", 0},
    {"json", OPTION_JSON, NULL, 0, "Print one JSON object about the run", 0},
    {0},
};

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    kvl_batch_options *batch = &wanted->batch;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &wanted->engine; return 0;
    case OPTION_JSON: wanted->json = true; return 0;
    case OPTION_ORDER:
        if (strcmp(text, "plan") != 0 && strcmp(text, "file") != 0)
            argp_error(state, "--order is '%s'; it must be plan or file", text);
        batch->order = strcmp(text, "file") == 0 ? KVL_BATCH_BY_FILE : KVL_BATCH_BY_PLAN;
        return 0;
    case OPTION_ANSWERS:
        batch->scheduler.n_running_max = kvl_cli_number(state, "--answers", text, 1, 512);
        return 0;
    case OPTION_STEP_ROWS:
        batch->scheduler.n_step_rows =
            kvl_cli_number(state, "--step-rows", text, 1, KVL_FORWARD_ROWS_MAX);
        return 0;
    case OPTION_PAGES:
        wanted->n_pages = kvl_cli_number(state, "--pages", text, 16, 1 << 24);
        return 0;
    case ARGP_KEY_ARG:
        if (batch->in_path == NULL) {
            batch->in_path = text;
        } else if (batch->out_path == NULL) {
            batch->out_path = text;
        } else {
            argp_usage(state);
        }
        return 0;
    case ARGP_KEY_END:
        if (batch->out_path == NULL) argp_usage(state);
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static void print_result(const arguments *wanted, const kvl_batch_result *r)
{
    const double rate = r->seconds > 0.0 ? (double)r->n_answer_tokens / r->seconds : 0.0;
    if (!wanted->json) {
        (void)printf(
            "%u rows: %u answered, %u refused, %u from an earlier run; %.1f s, %.1f answer "
            "tokens/s; %.0f of %.0f prompt tokens were known\n",
            r->n_rows, r->n_answered, r->n_refused, r->n_resumed, r->seconds, rate,
            (double)r->n_cached_tokens, (double)r->n_prompt_tokens);
        return;
    }
    json_t *report = json_pack(
        "{s:s, s:{s:i, s:i, s:i, s:i, s:i, s:I, s:I, s:I, s:I, s:I, s:f, s:f}, s:s, s:s}", "name",
        "batch", "figures", "rows", (int)r->n_rows, "answered", (int)r->n_answered, "refused",
        (int)r->n_refused, "resumed", (int)r->n_resumed, "groups", (int)r->n_groups,
        "prompt_tokens", (json_int_t)r->n_prompt_tokens, "cached_tokens",
        (json_int_t)r->n_cached_tokens, "distinct_tokens", (json_int_t)r->n_distinct_tokens,
        "answer_tokens", (json_int_t)r->n_answer_tokens, "paused", (json_int_t)r->n_paused,
        "seconds", r->seconds, "answer_tokens_per_s", rate, "order",
        wanted->batch.order == KVL_BATCH_BY_FILE ? "file" : "plan", "version", KVL_VERSION);
    (void)json_dumpf(report, stdout, JSON_INDENT(2));
    (void)printf("\n");
    json_decref(report);
}

int kvl_command_batch(int argc, char **argv)
{
    static const struct argp_child children[] = {{&kvl_cli_engine_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        options,
        parse,
        "IN.jsonl OUT.jsonl",
        "Answer a file of requests in OpenAI's batch format. Started again after a crash, it goes "
        "on where it was.",
        children,
        NULL,
        NULL};
    arguments wanted = {
        .batch = {.scheduler = {.n_running_max = ANSWERS_DEFAULT, .n_step_rows = STEP_ROWS_DEFAULT},
                  .with_progress = isatty(STDERR_FILENO) != 0}};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    char name[KVL_MODEL_NAME_MAX];
    kvl_cli_name_model(wanted.engine.model, name);
    wanted.batch.model_name = name;
    kvl_error error;
    kvl_engine *engine = NULL;
    if (kvl_cli_engine_create(&wanted.engine, wanted.n_pages, &engine, &error) != KVL_OK)
        return kvl_cli_fail(&error);
    kvl_batch_result result;
    const kvl_status status = kvl_batch_run(engine, &wanted.batch, &result, &error);
    kvl_engine_destroy(engine);
    if (status != KVL_OK) return kvl_cli_fail(&error);
    print_result(&wanted, &result);
    return result.n_refused == 0 ? KVL_EXIT_OK : KVL_EXIT_FAILED;
}
