/* cli/cmd_eval.c: `kvloom eval reuse`: what blending keeps of full prefill's answers. Every prompt
 * is run in full, then with each policy, by one host that has read all chunks before. */
#include "base/alloc.h"
#include "cli/eval.h"
#include "cli/task.h"
#include "reuse/select.h"

#include <argp.h>
#include <jansson.h>
#include <string.h>

enum {
    PROMPTS_DEFAULT = 8,
    PROMPTS_QUICK = 1,
    PROMPTS_MAX = 1000,
    ANSWER_TOKENS = 24,
    POLICIES_MAX = 12,
    SCENARIOS_MAX = 8,
    PARTS_MAX = 2 * EVAL_CHUNKS_MAX + 2,
    OPTION_JSON = 256,
    OPTION_QUICK,
    OPTION_SEED
};

typedef struct arguments {
    kvl_cli_engine engine;
    uint32_t n_prompts, seed;
    bool json;
} arguments;

static const struct argp_option options[] = {
    {"prompts", 'n', "N", 0, "Prompts of each scenario (8)", 0},
    {"seed", OPTION_SEED, "N", 0, "Other prompts: tune on some, report others (1)", 0},
    {"quick", OPTION_QUICK, NULL, 0, "One prompt of each scenario, about a minute", 0},
    {"json", OPTION_JSON, NULL, 0, "Print one JSON object instead of a table", 0},
    {0},
};

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &wanted->engine; return 0;
    case 'n':
        wanted->n_prompts = kvl_cli_number(state, "--prompts", text, 1, PROMPTS_MAX);
        return 0;
    case OPTION_SEED: wanted->seed = kvl_cli_number(state, "--seed", text, 1, 1 << 30); return 0;
    case OPTION_QUICK: wanted->n_prompts = PROMPTS_QUICK; return 0;
    case OPTION_JSON: wanted->json = true; return 0;
    case ARGP_KEY_ARG:
        if (state->arg_num > 0 || strcmp(text, "reuse") != 0) argp_usage(state);
        return 0;
    case ARGP_KEY_NO_ARGS: argp_usage(state); return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

/* A policy as it is asked for; the last is verified, and comes last because what it leaves in the
 * prefix tree is exact and would be shared by the others. */
typedef struct policy {
    const char *name, *select;
    Kvloom__V1__Quality quality;
} policy;

static const policy policies[] = {
    {"none", "none", KVLOOM__V1__QUALITY__QUALITY_BALANCED},
    {"sink8", "sink8", KVLOOM__V1__QUALITY__QUALITY_BALANCED},
    {"sink16", "sink16", KVLOOM__V1__QUALITY__QUALITY_BALANCED},
    {"query10", "query10", KVLOOM__V1__QUALITY__QUALITY_BALANCED},
    {"sink8+query10", "sink8+query10", KVLOOM__V1__QUALITY__QUALITY_BALANCED},
    {"sink8+query25", "sink8+query25", KVLOOM__V1__QUALITY__QUALITY_BALANCED},
    {"deviation15", "deviation15", KVLOOM__V1__QUALITY__QUALITY_BALANCED},
    {"verified", "sink8+query10", KVLOOM__V1__QUALITY__QUALITY_VERIFIED},
};
enum { N_POLICIES = sizeof policies / sizeof *policies };

/* Sums over the prompts of one scenario. */
typedef struct cell {
    double n, kl, top1, exact, needle, placed, recomputed, ttft_ms, corrected;
} cell;

typedef struct evaluation {
    const arguments *wanted;
    eval_corpus corpus;
    kvl_local_host *host;
    uint32_t n_scenarios;
    cell cells[SCENARIOS_MAX][N_POLICIES];
    cell full[SCENARIOS_MAX];
} evaluation;

typedef struct task {
    Kvloom__V1__RunTask run;
    Kvloom__V1__PromptPart parts[PARTS_MAX];
    Kvloom__V1__PromptPart *pointers[PARTS_MAX];
    char names[EVAL_CHUNKS_MAX][24];
} task;

static void add_part(task *made, char *slot, const char *text)
{
    Kvloom__V1__PromptPart *part = &made->parts[made->run.n_parts];
    kvloom__v1__prompt_part__init(part);
    if (slot != NULL) part->slot = slot;
    part->text = (ProtobufCBinaryData){strlen(text), (uint8_t *)(uintptr_t)text};
    made->pointers[made->run.n_parts++] = part;
}

/* No workflow: chunks of a retrieval pipeline have no template that comes again. */
static void begin_task(task *made, Kvloom__V1__Mode mode, const policy *by, uint32_t max_tokens)
{
    kvloom__v1__run_task__init(&made->run);
    made->run.parts = made->pointers;
    made->run.mode = mode;
    made->run.max_tokens = max_tokens;
    made->run.quality = by->quality;
    made->run.select = (char *)(uintptr_t)by->select;
    made->run.evaluate = mode == KVLOOM__V1__MODE__MODE_REUSE && max_tokens > 1;
}

static kvl_status ask(evaluation *e, const eval_prompt *prompt, Kvloom__V1__Mode mode,
                      const policy *by, Kvloom__V1__RunReply **reply, kvl_error *error)
{
    task made;
    begin_task(&made, mode, by, ANSWER_TOKENS);
    add_part(&made, NULL, prompt->opening);
    for (uint32_t c = 0; c < prompt->n_chunks; c++) {
        if (c > 0) add_part(&made, NULL, "\n\n");
        (void)snprintf(made.names[c], sizeof made.names[c], "chunk_%u", c + 1);
        add_part(&made, made.names[c], prompt->chunks[c]);
    }
    char ending[sizeof prompt->question + 64];
    (void)snprintf(ending, sizeof ending, "%s<|im_end|>\n<|im_start|>assistant\n",
                   prompt->question);
    add_part(&made, NULL, ending);
    return kvl_local_host_run(e->host, &made.run, reply, error);
}

/* Has the host read each chunk once, so that its KV at home is in the store. */
static kvl_status read_chunks(evaluation *e, const eval_prompt *prompt, kvl_error *error)
{
    for (uint32_t c = 0; c < prompt->n_chunks; c++) {
        task made;
        begin_task(&made, KVLOOM__V1__MODE__MODE_REUSE, &policies[0], 1);
        (void)snprintf(made.names[0], sizeof made.names[0], "chunk");
        add_part(&made, made.names[0], prompt->chunks[c]);
        add_part(&made, NULL, "\n");
        Kvloom__V1__RunReply *reply = NULL;
        KVL_TRY(kvl_local_host_run(e->host, &made.run, &reply, error));
        kvloom__v1__run_reply__free_unpacked(reply, NULL);
    }
    return KVL_OK;
}

static bool contains(const Kvloom__V1__RunReply *reply, const char *needle)
{
    return memmem(reply->text.data, reply->text.len, needle, strlen(needle)) != NULL;
}

static void add(cell *sum, const eval_prompt *prompt, const Kvloom__V1__RunReply *full,
                const Kvloom__V1__RunReply *reply)
{
    sum->n++;
    if (reply->evaluation != NULL) {
        sum->kl += reply->evaluation->kl;
        sum->top1 += reply->evaluation->top1_agreement;
    }
    const bool is_same =
        reply->n_tokens == full->n_tokens &&
        memcmp(reply->tokens, full->tokens, full->n_tokens * sizeof *full->tokens) == 0;
    sum->exact += is_same ? 1.0 : 0.0;
    const bool has_needle = prompt->needle[0] != '\0'; /* an open question has no right answer */
    sum->needle += has_needle && contains(reply, prompt->needle) ? 1.0 : 0.0;
    for (size_t p = 0; p < reply->n_parts; p++) sum->placed += reply->parts[p]->blended;
    sum->recomputed += reply->recomputed;
    sum->corrected += reply->corrected;
    /* A verified answer is held back until it is checked. */
    sum->ttft_ms += reply->verify_ms > 0.0 ? reply->total_ms + reply->verify_ms : reply->ttft_ms;
}

static kvl_status compare(evaluation *e, uint32_t s, const eval_prompt *prompt,
                          const Kvloom__V1__RunReply *full, kvl_error *error)
{
    add(&e->full[s], prompt, full, full);
    for (size_t p = 0; p < N_POLICIES; p++) {
        Kvloom__V1__RunReply *reply = NULL;
        KVL_TRY(ask(e, prompt, KVLOOM__V1__MODE__MODE_REUSE, &policies[p], &reply, error));
        add(&e->cells[s][p], prompt, full, reply);
        kvloom__v1__run_reply__free_unpacked(reply, NULL);
    }
    return KVL_OK;
}

static kvl_status run_prompt(evaluation *e, uint32_t s, uint32_t index, kvl_error *error)
{
    eval_prompt prompt;
    KVL_TRY(
        eval_prompt_make(&e->corpus, &eval_scenarios[s], e->wanted->seed, index, &prompt, error));
    Kvloom__V1__RunReply *full = NULL;
    kvl_status status = read_chunks(e, &prompt, error);
    if (status == KVL_OK)
        status = ask(e, &prompt, KVLOOM__V1__MODE__MODE_FULL, &policies[0], &full, error);
    if (status == KVL_OK) status = compare(e, s, &prompt, full, error);
    if (full != NULL) kvloom__v1__run_reply__free_unpacked(full, NULL);
    eval_prompt_deinit(&prompt);
    return status;
}

static kvl_status run_all(evaluation *e, kvl_error *error)
{
    for (uint32_t s = 0; eval_scenarios[s].name != NULL; s++) {
        e->n_scenarios = s + 1;
        for (uint32_t i = 0; i < e->wanted->n_prompts; i++) {
            KVL_TRY(run_prompt(e, s, i, error));
            (void)fprintf(stderr, "\r%s: %u of %u prompts ", eval_scenarios[s].name, i + 1,
                          e->wanted->n_prompts);
        }
        (void)fprintf(stderr, "\n");
    }
    return KVL_OK;
}

/* ---- what it says ---- */

/* Mean of one sum over the scenarios of some kinds. */
static double mean(const evaluation *e, const char *name, unsigned kinds, size_t offset)
{
    double sum = 0.0, n = 0.0;
    for (uint32_t s = 0; s < e->n_scenarios; s++) {
        if ((kinds >> eval_scenarios[s].kind & 1U) == 0) continue;
        const cell *of = &e->full[s];
        for (size_t p = 0; p < N_POLICIES; p++) {
            if (strcmp(policies[p].name, name) == 0) of = &e->cells[s][p];
        }
        double value = 0.0;
        memcpy(&value, (const char *)of + offset, sizeof value);
        sum += value;
        n += of->n;
    }
    return n > 0.0 ? sum / n : 0.0;
}

static json_t *figures_of(const evaluation *e)
{
    enum { FACTS = 1U << EVAL_NEEDLE | 1U << EVAL_CUT, OPEN = 1U << EVAL_OPEN };
    static const struct {
        const char *figure, *policy;
        unsigned kinds;
        size_t offset;
    } wanted[] = {
        {"em_balanced", "sink8+query10", FACTS, offsetof(cell, exact)},
        {"em_fast", "sink8", FACTS, offsetof(cell, exact)},
        {"em_verified", "verified", FACTS | OPEN, offsetof(cell, exact)},
        {"read_full", "full", FACTS, offsetof(cell, needle)},
        {"read_balanced", "sink8+query10", FACTS, offsetof(cell, needle)},
        {"read_cacheblend15", "deviation15", FACTS, offsetof(cell, needle)},
        {"kl_balanced_open", "sink8+query10", OPEN, offsetof(cell, kl)},
        {"kl_cacheblend15_open", "deviation15", OPEN, offsetof(cell, kl)},
        {"corrected_verified", "verified", FACTS | OPEN, offsetof(cell, corrected)},
    };
    json_t *figures = json_object();
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        (void)json_object_set_new(
            figures, wanted[i].figure,
            json_real(mean(e, wanted[i].policy, wanted[i].kinds, wanted[i].offset)));
    const double all = FACTS | OPEN;
    const double placed = mean(e, "sink8+query10", (unsigned)all, offsetof(cell, placed));
    const double again = mean(e, "sink8+query10", (unsigned)all, offsetof(cell, recomputed));
    (void)json_object_set_new(figures, "recomputed_balanced",
                              json_real(placed > 0.0 ? again / placed : 0.0));
    return figures;
}

static json_t *row_of(const cell *c, const cell *full, const char *scenario, const char *name)
{
    return json_pack("{s:s, s:s, s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "scenario", scenario,
                     "policy", name, "n", (int)c->n, "kl", c->kl / c->n, "top1_agreement",
                     c->top1 / c->n, "exact_match", c->exact / c->n, "needle", c->needle / c->n,
                     "recomputed", c->placed > 0.0 ? c->recomputed / c->placed : 0.0, "ttft_ms",
                     c->ttft_ms / c->n, "ttft_ratio", full->ttft_ms / c->ttft_ms);
}

static void print_json(const evaluation *e)
{
    json_t *rows = json_array();
    for (uint32_t s = 0; s < e->n_scenarios; s++) {
        (void)json_array_append_new(
            rows, row_of(&e->full[s], &e->full[s], eval_scenarios[s].name, "full"));
        for (size_t p = 0; p < N_POLICIES; p++)
            (void)json_array_append_new(rows, row_of(&e->cells[s][p], &e->full[s],
                                                     eval_scenarios[s].name, policies[p].name));
    }
    const char *model = e->wanted->engine.model;
    json_t *report = json_pack(
        "{s:s, s:o, s:o, s:{s:s, s:i, s:i}, s:s}", "name", "reuse", "figures", figures_of(e),
        "rows", rows, "machine", "model", model == NULL ? "smollm2-135m" : model, "prompts",
        (int)e->wanted->n_prompts, "seed", (int)e->wanted->seed, "version", KVL_VERSION);
    (void)json_dumpf(report, stdout, JSON_INDENT(2));
    (void)printf("\n");
    json_decref(report);
}

static void print_table(const evaluation *e)
{
    (void)printf(
        "scenario   policy          exact  needle      KL   top-1  again     TTFT  ratio\n");
    for (uint32_t s = 0; s < e->n_scenarios; s++) {
        const cell *full = &e->full[s];
        (void)printf("%-10s %-14s %6.3f  %6.3f %7s %7s %6s %5.0f ms\n", eval_scenarios[s].name,
                     "full", full->exact / full->n, full->needle / full->n, "", "", "",
                     full->ttft_ms / full->n);
        for (size_t p = 0; p < N_POLICIES; p++) {
            const cell *c = &e->cells[s][p];
            (void)printf("%-10s %-14s %6.3f  %6.3f %7.4f %7.3f %6.3f %5.0f ms %5.1fx\n", "",
                         policies[p].name, c->exact / c->n, c->needle / c->n, c->kl / c->n,
                         c->top1 / c->n, c->placed > 0.0 ? c->recomputed / c->placed : 0.0,
                         c->ttft_ms / c->n, full->ttft_ms / c->ttft_ms);
        }
    }
}

int kvl_command_eval(int argc, char **argv)
{
    static const struct argp_child children[] = {{&kvl_cli_engine_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        options,  parse, "reuse", "What reuse keeps of full prefill's answers, policy by policy.",
        children, NULL,  NULL};
    arguments wanted = {.n_prompts = PROMPTS_DEFAULT, .seed = 1};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    if (wanted.engine.n_positions == 0) wanted.engine.n_positions = 4096;
    evaluation e = {.wanted = &wanted};
    kvl_error error = {0};
    kvl_status status = eval_corpus_load(kvl_cli_data_directory(), &e.corpus, &error);
    if (status == KVL_OK) status = kvl_local_host_start(&wanted.engine, &e.host, &error);
    if (status == KVL_OK) status = run_all(&e, &error);
    kvl_local_host_stop(e.host);
    eval_corpus_deinit(&e.corpus);
    if (status != KVL_OK) return kvl_cli_fail(&error);
    if (wanted.json)
        print_json(&e);
    else
        print_table(&e);
    return KVL_EXIT_OK;
}
