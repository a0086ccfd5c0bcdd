/* cli/cmd_demo.c: `kvloom demo`: the main job. Hosts as processes, agents in a pipeline, every
 * prompt once in full and once with reuse. */
#include "base/alloc.h"
#include "cli/demo.h"
#include "cli/task.h"

#include <argp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    ROUNDS_DEFAULT = 3,
    ANSWER_DEFAULT = 32,
    OPTION_JSON = 256,
    OPTION_SHOW,
    OPTION_REPORT,
    OPTION_QUALITY,
    OPTION_DATA,
    OPTION_STATE,
    OPTION_KILL,
    OPTION_PAPER
};

static const struct argp_option options[] = {
    {"agents", 'a', "N", 0, "Agents, 1 to 5 (5)", 0},
    {"rounds", 'r', "N", 0, "Rounds; anchors are measured in the first two (3)", 0},
    {"max-tokens", 'n', "N", 0, "Longest answer in tokens (32)", 0},
    {"quality", OPTION_QUALITY, "Q", 0, "exact, balanced or fast (balanced)", 0},
    {"show-answers", OPTION_SHOW, NULL, 0, "Print both answers of every prompt", 0},
    {"report", OPTION_REPORT, "FILE", 0, "Write an HTML report", 0},
    {"json", OPTION_JSON, NULL, 0, "Print one JSON object instead of text", 0},
    {"verbose", 'v', NULL, 0, "Say where the time to first token went", 0},
    {"data", OPTION_DATA, "DIR", 0, "Directory of workflow.json", 0},
    {"state", OPTION_STATE, "DIR", 0, "Keep the hosts' stores here for a later run", 0},
    {"kill", OPTION_KILL, "AGENT@ROUND", 0, "Kill a host after its answer, by number", 0},
    {"paper-anchors", OPTION_PAPER, NULL, 0, "Match anchors as the KVCOMM paper does", 0},
    {0},
};

static Kvloom__V1__Quality parse_quality(const char *text, const struct argp_state *state)
{
    static const char *const names[] = {"balanced", "exact", "fast"};
    for (int q = 0; q < 3; q++) {
        if (strcmp(text, names[q]) == 0) return (Kvloom__V1__Quality)q;
    }
    argp_error(state, "--quality is '%s'; it must be exact, balanced or fast", text);
    return KVLOOM__V1__QUALITY__QUALITY_BALANCED;
}

static void parse_kill(demo_options *wanted, char *text, const struct argp_state *state)
{
    char *separator = strchr(text, '@');
    if (separator == NULL) argp_error(state, "--kill is '%s'; it must be AGENT@ROUND", text);
    if (separator == NULL) return;
    *separator = '\0';
    wanted->kill_agent = kvl_cli_number(state, "AGENT", text, 1, DEMO_AGENTS_MAX);
    wanted->kill_round = kvl_cli_number(state, "ROUND", separator + 1, 1, DEMO_ROUNDS_MAX);
}

static error_t parse(int key, char *text, struct argp_state *state)
{
    demo_options *wanted = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &wanted->engine; return 0;
    case 'a':
        wanted->n_agents = kvl_cli_number(state, "--agents", text, 1, DEMO_AGENTS_MAX);
        return 0;
    case 'r':
        wanted->n_rounds = kvl_cli_number(state, "--rounds", text, 1, DEMO_ROUNDS_MAX);
        return 0;
    case 'n': wanted->max_tokens = kvl_cli_number(state, "--max-tokens", text, 1, 1024); return 0;
    case 'v': wanted->is_verbose = true; return 0;
    case OPTION_QUALITY: wanted->quality = parse_quality(text, state); return 0;
    case OPTION_SHOW: wanted->show_answers = true; return 0;
    case OPTION_REPORT: wanted->report = text; return 0;
    case OPTION_JSON: wanted->json = true; return 0;
    case OPTION_DATA: wanted->data = text; return 0;
    case OPTION_STATE: wanted->state = text; return 0;
    case OPTION_KILL: parse_kill(wanted, text, state); return 0;
    case OPTION_PAPER: wanted->paper_anchors = true; return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static void free_cells(demo *d)
{
    for (uint32_t r = 0; r < DEMO_ROUNDS_MAX; r++) {
        for (uint32_t a = 0; a < DEMO_AGENTS_MAX; a++) {
            demo_cell *cell = &d->cells[r][a];
            if (cell->full != NULL) kvloom__v1__run_reply__free_unpacked(cell->full, NULL);
            if (cell->reuse != NULL) kvloom__v1__run_reply__free_unpacked(cell->reuse, NULL);
        }
    }
}

static kvl_status run(demo *d, kvl_error *error)
{
    const demo_options *wanted = d->options;
    KVL_TRY(demo_workflow_load(wanted->data == NULL ? kvl_cli_data_directory() : wanted->data,
                               &d->workflow, error));
    if (wanted->n_agents > d->workflow.n_agents)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "the workflow has %zu agents, not %u",
                        d->workflow.n_agents, wanted->n_agents);
    KVL_TRY(kvl_models_find(wanted->engine.model == NULL ? "smollm2-135m" : wanted->engine.model,
                            d->model, error));
    d->start_ns = kvl_clock_now(kvl_clock_system());
    KVL_TRY(demo_hosts_start(d, error));
    demo_print_start(d);
    for (uint32_t r = 0; r < wanted->n_rounds; r++) KVL_TRY(demo_run_round(d, r, error));
    demo_summary summary;
    demo_summarise(d, &summary);
    if (wanted->json)
        demo_print_json(d, &summary);
    else
        demo_print_table(d, &summary);
    if (wanted->report == NULL) return KVL_OK;
    return demo_write_report(d, &summary, wanted->report, error);
}

int kvl_command_demo(int argc, char **argv)
{
    static const struct argp_child children[] = {{&kvl_cli_engine_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        options,  parse, NULL, "Five agents share what they have read: the main job.",
        children, NULL,  NULL};
    demo_options wanted = {
        .n_agents = DEMO_AGENTS_MAX, .n_rounds = ROUNDS_DEFAULT, .max_tokens = ANSWER_DEFAULT};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    demo *d = kvl_alloc_zero(1, sizeof *d);
    kvl_error error = {0};
    if (d == NULL) return kvl_cli_fail(&error);
    d->options = &wanted;
    const kvl_status status = run(d, &error);
    demo_hosts_stop(d);
    free_cells(d);
    demo_workflow_deinit(&d->workflow);
    kvl_free(d);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
