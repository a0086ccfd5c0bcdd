/* cli/cmd_eval.c: `kvloom eval reuse`: what blending keeps of full prefill's answers. Every prompt
 * is run in full, then with each policy, by one host that has read all chunks before. */
#include "base/alloc.h"
#include "cli/eval.h"
#include "reuse/correct.h"

#include <argp.h>
#include <stdlib.h>
#include <string.h>

enum {
    PROMPTS_DEFAULT = 8,
    PROMPTS_MAX = 1000,
    ANSWER_TOKENS = 32,
    CONTEXT_DEFAULT = 4096,
    PRIMER_TEXTS = 3,
    PRIMER_TEXT_BYTES = 600,
    PRIMER_BYTES = 2048,
    WARM_SOURCES_LEAST = 6,
    WARM_VERSION = 1000, /* of prompts: none that is evaluated has so many */
    OPTION_JSON = 256,
    OPTION_QUICK,
    OPTION_SEED,
    OPTION_TEXTS,
    OPTION_SCENARIOS,
    OPTION_POLICIES,
    OPTION_SAVE,
    OPTION_FROM,
    OPTION_HOME,
    OPTION_CORRECT
};

typedef struct arguments {
    kvl_cli_engine engine;
    uint32_t n_prompts, seed;
    const char *texts, *scenarios, *policies, *save, *from, *home, *correct;
    eval_warmth warmth;
    bool json, is_quick;
} arguments;

static const struct argp_option options[] = {
    {"prompts", 'n', "N", 0, "Prompts of each scenario (8)", 0},
    {"seed", OPTION_SEED, "N", 0, "Other prompts: tune on some, report others (1)", 0},
    {"texts", OPTION_TEXTS, "DIR", 0, "Directory of *.txt to make prompts from", 0},
    {"scenarios", OPTION_SCENARIOS, "NAME,...", 0, "Only these, as the table names them", 0},
    {"policies", OPTION_POLICIES, "NAME,...", 0, "Only these, as the table names them", 0},
    {"home", OPTION_HOME, "HOME", 0,
     "What texts are read behind: header, nothing, or primer, which is header and three of the "
     "texts; donor: as they stood in other exact prompts (header)",
     0},
    {"correct", OPTION_CORRECT, "NAME,...", 0,
     "Each policy also with these corrections of what is placed: mean, probe", 0},
    {"save", OPTION_SAVE, "FILE", 0, "Add what was seen of every prompt to a file", 0},
    {"from", OPTION_FROM, "FILE", 0, "Run nothing: the figures of a file that --save made", 0},
    {"quick", OPTION_QUICK, NULL, 0, "A few policies; without --prompts, one prompt each", 0},
    {"json", OPTION_JSON, NULL, 0, "Print one JSON object instead of a table", 0},
    {0},
};

/* Whether a comma separated list has a name; an empty list has all. */
static bool has_name(const char *list, const char *name)
{
    if (list == NULL) return true;
    const size_t n = strlen(name);
    for (const char *at = list; at != NULL; at = strchr(at, ',')) {
        if (*at == ',') at++;
        if (strncmp(at, name, n) == 0 && (at[n] == ',' || at[n] == '\0')) return true;
    }
    return false;
}

static const char *scenario_name(uint32_t at)
{
    return eval_scenarios[at].name;
}

static const char *policy_name(uint32_t at)
{
    return eval_policies[at].name;
}

/* Every name of a list must be one that name_of gives before it gives NULL. */
static void check_names(const char *option, const char *list, const char *(*name_of)(uint32_t),
                        struct argp_state *state)
{
    char *copy = kvl_strdup(list);
    char *rest = NULL;
    if (copy == NULL) argp_failure(state, KVL_EXIT_FAILED, 0, "no memory for %s", option);
    for (char *name = strtok_r(copy, ",", &rest); name != NULL; name = strtok_r(NULL, ",", &rest)) {
        uint32_t at = 0;
        while (name_of(at) != NULL && strcmp(name_of(at), name) != 0) at++;
        if (name_of(at) != NULL) continue;
        (void)fprintf(stderr, "kvloom: %s has '%s'; there are", option, name);
        for (at = 0; name_of(at) != NULL; at++) (void)fprintf(stderr, " %s", name_of(at));
        (void)fprintf(stderr, "\n");
        exit(KVL_EXIT_USAGE);
    }
    kvl_free(copy);
}

/* Prompts here have no templates that come again, and so no anchors. */
static const char *correction_name(uint32_t at)
{
    static const char *const corrections[] = {"none", "mean", "probe", NULL};
    return corrections[at];
}

static void parse_home(arguments *wanted, const char *text, const struct argp_state *state)
{
    wanted->warmth.keeps_donors = strcmp(text, "donor") == 0;
    wanted->home = wanted->warmth.keeps_donors ? "header" : text;
    if (strcmp(wanted->home, "header") != 0 && strcmp(text, "nothing") != 0 &&
        strcmp(text, "primer") != 0)
        argp_error(state, "--home is '%s'; it must be header, nothing, primer or donor", text);
}

static void parse_corrections(arguments *wanted, const char *text, struct argp_state *state)
{
    check_names("--correct", text, correction_name, state);
    wanted->correct = text;
    wanted->warmth.learns_means = has_name(text, "mean");
}

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &wanted->engine; return 0;
    case 'n':
        wanted->n_prompts = kvl_cli_number(state, "--prompts", text, 1, PROMPTS_MAX);
        return 0;
    case OPTION_SEED: wanted->seed = kvl_cli_number(state, "--seed", text, 1, 1 << 30); return 0;
    case OPTION_TEXTS: wanted->texts = text; return 0;
    case OPTION_HOME: parse_home(wanted, text, state); return 0;
    case OPTION_CORRECT: parse_corrections(wanted, text, state); return 0;
    case OPTION_SAVE: wanted->save = text; return 0;
    case OPTION_FROM: wanted->from = text; return 0;
    case OPTION_SCENARIOS:
        check_names("--scenarios", text, scenario_name, state);
        wanted->scenarios = text;
        return 0;
    case OPTION_POLICIES:
        check_names("--policies", text, policy_name, state);
        wanted->policies = text;
        return 0;
    case OPTION_QUICK: wanted->is_quick = true; return 0;
    case OPTION_JSON: wanted->json = true; return 0;
    case ARGP_KEY_ARG:
        if (state->arg_num > 0 || strcmp(text, "reuse") != 0) argp_usage(state);
        return 0;
    case ARGP_KEY_NO_ARGS: argp_usage(state); return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

typedef struct evaluation {
    const arguments *wanted;
    eval_corpus corpus;
    demo_workflow workflow;
    kvl_local_host *host;
    eval_records records;
    uint32_t n_prompts; /* so far */
    char primer[PRIMER_BYTES];
} evaluation;

/* Three short texts, which no prompt of a large corpus has: the last of it. */
static void make_primer(evaluation *e)
{
    size_t n = 0, n_texts = 0;
    for (size_t i = e->corpus.n; i-- > 0 && n_texts < PRIMER_TEXTS;) {
        const char *text = e->corpus.paragraphs[i];
        const size_t n_text = strlen(text);
        if (n_text > PRIMER_TEXT_BYTES) continue;
        n += (size_t)snprintf(e->primer + n, sizeof e->primer - n, "%s\n\n", text);
        n_texts++;
    }
}

static void set_home(const evaluation *e, Kvloom__V1__RunTask *run)
{
    if (e->wanted->home == NULL) return;
    run->home = (char *)(uintptr_t)e->wanted->home;
    if (strcmp(run->home, "primer") != 0) return;
    run->primer =
        (ProtobufCBinaryData){strlen(e->primer), (uint8_t *)(uintptr_t)(const void *)e->primer};
}

static kvl_status ask(evaluation *e, const eval_prompt *prompt, Kvloom__V1__Mode mode,
                      uint32_t policy, Kvloom__V1__RunReply **reply, kvl_error *error)
{
    const eval_policy *by = &eval_policies[policy % eval_policy_number(0, 1)];
    eval_task made;
    eval_task_make(prompt, &made);
    made.run.mode = mode;
    made.run.max_tokens = ANSWER_TOKENS;
    made.run.quality = by->quality;
    made.run.select = (char *)(uintptr_t)by->select;
    made.run.gate = by->is_gated && mode == KVLOOM__V1__MODE__MODE_REUSE;
    made.run.align = true; /* all texts are read, but for those that were edited since */
    made.run.evaluate = mode == KVLOOM__V1__MODE__MODE_REUSE;
    set_home(e, &made.run);
    if (mode == KVLOOM__V1__MODE__MODE_REUSE) {
        eval_warmth_set(&e->wanted->warmth, true, &made.run);
        const char *correct = kvl_corrections[policy / eval_policy_number(0, 1)].name;
        made.run.correct = (char *)(uintptr_t)correct;
    }
    return kvl_local_host_run(e->host, &made.run, reply, error);
}

/* Has the host read each text once, so that its KV at home is in the store. */
static kvl_status read_slots(evaluation *e, const eval_prompt *prompt, kvl_error *error)
{
    for (uint32_t i = 0; i < prompt->n_pieces; i++) {
        if (!prompt->pieces[i].is_slot || prompt->pieces[i].text == NULL) continue;
        char ending[] = "\n";
        eval_prompt alone = {.n_pieces = 2, .pieces = {prompt->pieces[i], {.text = ending}}};
        eval_task made;
        eval_task_make(&alone, &made);
        made.run.mode = KVLOOM__V1__MODE__MODE_READ;
        set_home(e, &made.run);
        Kvloom__V1__RunReply *reply = NULL;
        KVL_TRY(kvl_local_host_run(e->host, &made.run, &reply, error));
        kvloom__v1__run_reply__free_unpacked(reply, NULL);
    }
    return KVL_OK;
}

static eval_record record_of(const eval_prompt *prompt, const Kvloom__V1__RunReply *full,
                             const Kvloom__V1__RunReply *reply)
{
    eval_record record = {.full_ttft_ms = full->ttft_ms};
    if (reply->evaluation != NULL) {
        record.kl = reply->evaluation->kl;
        record.top1 = reply->evaluation->top1_agreement;
    } else {
        record.top1 = 1.0; /* full prefill itself */
    }
    const bool is_same =
        reply->n_tokens == full->n_tokens &&
        memcmp(reply->tokens, full->tokens, full->n_tokens * sizeof *full->tokens) == 0;
    record.exact = is_same ? 1.0 : 0.0;
    const size_t n_needle = strlen(prompt->needle);
    const bool is_right =
        n_needle > 0 && memmem(reply->text.data, reply->text.len, prompt->needle, n_needle) != NULL;
    record.right = is_right ? 1.0 : 0.0;
    for (size_t p = 0; p < reply->n_parts; p++) record.placed += reply->parts[p]->blended;
    record.recomputed = record.placed > 0.0 ? reply->recomputed / record.placed : 0.0;
    record.corrected = reply->corrected;
    record.drafted = reply->drafted;
    record.draft_kept = reply->draft_kept;
    record.healed_first = reply->gated && reply->healed_first ? 1.0 : 0.0;
    record.passed = reply->gated && !reply->healed_first ? 1.0 : 0.0;
    record.passed_right = record.passed * record.exact;
    /* A verified or gated answer is held back until it is checked. */
    const double held_ms = reply->verify_ms + reply->gate_ms;
    record.ttft_ms = held_ms > 0.0 ? reply->total_ms + held_ms : reply->ttft_ms;
    record.work = (reply->select_ms + reply->compute_ms) / full->compute_ms;
    return record;
}

static kvl_status keep(evaluation *e, uint32_t s, uint32_t policy, eval_record record,
                       kvl_error *error)
{
    record.scenario = s;
    record.policy = policy;
    record.prompt = e->n_prompts;
    return eval_records_add(&e->records, &record, error);
}

static kvl_status make_prompt(evaluation *e, uint32_t s, uint32_t index, uint32_t version,
                              eval_prompt *prompt, kvl_error *error)
{
    const eval_scenario *scenario = &eval_scenarios[s];
    if (scenario->kind == EVAL_AGENTS)
        return eval_agents_make(&e->corpus, &e->workflow, e->host, &e->wanted->warmth,
                                e->wanted->seed, index, prompt, error);
    return eval_prompt_make(&e->corpus, scenario, e->wanted->seed, index, version, prompt, error);
}

/* Runs a prompt in full, and keeps a record of it once. */
static kvl_status run_full(evaluation *e, uint32_t s, const eval_prompt *prompt, bool is_first,
                           Kvloom__V1__RunReply **full, kvl_error *error)
{
    KVL_TRY(ask(e, prompt, KVLOOM__V1__MODE__MODE_FULL, 0, full, error));
    if (!is_first) return KVL_OK;
    return keep(e, s, EVAL_POLICIES_MAX, record_of(prompt, *full, *full), error);
}

static kvl_status run_policy(evaluation *e, uint32_t s, uint32_t policy, const eval_prompt *prompt,
                             const Kvloom__V1__RunReply *full, kvl_error *error)
{
    Kvloom__V1__RunReply *reply = NULL;
    KVL_TRY(ask(e, prompt, KVLOOM__V1__MODE__MODE_REUSE, policy, &reply, error));
    const eval_record record = record_of(prompt, full, reply);
    kvloom__v1__run_reply__free_unpacked(reply, NULL);
    return keep(e, s, policy, record, error);
}

static bool is_wanted(const evaluation *e, uint32_t s, uint32_t p, uint32_t c)
{
    const eval_policy *policy = &eval_policies[p];
    if (!has_name(e->wanted->policies, policy->name)) return false;
    if (e->wanted->policies == NULL && e->wanted->is_quick && !policy->is_quick) return false;
    if (eval_scenarios[s].kind == EVAL_AGENTS && policy->is_gated) return false;
    /* What is checked is full prefill's, however it was corrected before. */
    const bool is_checked =
        policy->is_gated || policy->quality == KVLOOM__V1__QUALITY__QUALITY_VERIFIED;
    return c == 0 || (!is_checked && e->wanted->correct != NULL &&
                      has_name(e->wanted->correct, kvl_corrections[c].name));
}

/* An edited text is read behind its first answer, so every policy gets an edit of its own; and what
 * was verified is shared behind it, so the gate gets a prompt of its own. */
static kvl_status compare(evaluation *e, uint32_t s, uint32_t index, eval_prompt *prompt,
                          kvl_error *error)
{
    const bool is_edited = eval_scenarios[s].kind == EVAL_EDITED;
    Kvloom__V1__RunReply *full = NULL;
    kvl_status status = KVL_OK;
    uint32_t policy = EVAL_POLICIES_MAX;
    while (eval_policy_next(&policy) && status == KVL_OK) {
        const uint32_t p = policy % eval_policy_number(0, 1);
        if (!is_wanted(e, s, p, policy / eval_policy_number(0, 1))) continue;
        const bool is_first = full == NULL;
        const bool is_own = is_edited || eval_policies[p].is_gated;
        if (is_own) {
            eval_prompt_deinit(prompt);
            status = make_prompt(e, s, index, policy + 1, prompt, error);
        }
        if (status == KVL_OK && (is_first || is_own)) {
            if (full != NULL) kvloom__v1__run_reply__free_unpacked(full, NULL);
            full = NULL;
            status = run_full(e, s, prompt, is_first, &full, error);
        }
        if (status == KVL_OK) status = run_policy(e, s, policy, prompt, full, error);
    }
    if (full != NULL) kvloom__v1__run_reply__free_unpacked(full, NULL);
    return status;
}

static kvl_status run_prompt(evaluation *e, uint32_t s, uint32_t index, kvl_error *error)
{
    eval_prompt prompt;
    KVL_TRY(make_prompt(e, s, index, 0, &prompt, error));
    kvl_status status = read_slots(e, &prompt, error);
    if (status == KVL_OK) status = compare(e, s, index, &prompt, error);
    eval_prompt_deinit(&prompt);
    e->n_prompts++;
    return status;
}

static kvl_status run_warm_prompt(evaluation *e, uint32_t s, uint32_t index,
                                  const eval_warm_up *warm, uint32_t of_warm, kvl_error *error)
{
    eval_prompt prompt;
    KVL_TRY(make_prompt(e, s, index, WARM_VERSION + of_warm, &prompt, error));
    kvl_status status = KVL_OK;
    if (!eval_warm_up_fill(warm, of_warm, &prompt))
        status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a prompt");
    if (status == KVL_OK) status = read_slots(e, &prompt, error);
    if (status == KVL_OK) {
        eval_task made;
        eval_task_make(&prompt, &made);
        made.run.mode = KVLOOM__V1__MODE__MODE_REUSE;
        made.run.quality = KVLOOM__V1__QUALITY__QUALITY_EXACT;
        made.run.max_tokens = 1;
        set_home(e, &made.run);
        eval_warmth_set(&e->wanted->warmth, false, &made.run);
        Kvloom__V1__RunReply *reply = NULL;
        status = kvl_local_host_run(e->host, &made.run, &reply, error);
        if (reply != NULL) kvloom__v1__run_reply__free_unpacked(reply, NULL);
    }
    eval_prompt_deinit(&prompt);
    return status;
}

/* Texts of the prompts from `first` on, and of some more where these are few. */
static kvl_status gather(evaluation *e, uint32_t s, uint32_t first, eval_warm_up *warm,
                         kvl_error *error)
{
    const uint32_t n_left = e->wanted->n_prompts - first;
    uint32_t n = n_left < EVAL_WARM_GROUP ? n_left : EVAL_WARM_GROUP;
    if (n < WARM_SOURCES_LEAST) n = WARM_SOURCES_LEAST;
    for (uint32_t i = 0; i < n; i++) {
        eval_prompt prompt;
        KVL_TRY(make_prompt(e, s, first + i, 0, &prompt, error));
        const bool is_added = eval_warm_up_add(warm, &prompt);
        eval_prompt_deinit(&prompt);
        if (!is_added) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a warm-up");
    }
    if (!eval_warm_up_draw(warm, e->wanted->seed + first))
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "%s has too few texts for prompts that are not the evaluated ones",
                        eval_scenarios[s].name);
    return KVL_OK;
}

/* Before the prompts of one pool: donors and means of their texts. Agents leave their own. */
static kvl_status warm_up(evaluation *e, uint32_t s, uint32_t first, kvl_error *error)
{
    if (!eval_warmth_is_wanted(&e->wanted->warmth)) return KVL_OK;
    if (first % EVAL_WARM_GROUP != 0 || eval_scenarios[s].kind == EVAL_AGENTS) return KVL_OK;
    eval_warm_up warm = {.n_texts = 0};
    kvl_status status = gather(e, s, first, &warm, error);
    for (uint32_t i = 0; i < warm.n_prompts && status == KVL_OK; i++)
        status = run_warm_prompt(e, s, first + i % EVAL_WARM_GROUP, &warm, i, error);
    eval_warm_up_deinit(&warm);
    return status;
}

static kvl_status run_all(evaluation *e, kvl_error *error)
{
    const uint32_t n = e->wanted->n_prompts;
    for (uint32_t s = 0; eval_scenarios[s].name != NULL; s++) {
        if (!has_name(e->wanted->scenarios, eval_scenarios[s].name)) continue;
        for (uint32_t i = 0; i < n; i++) {
            const size_t n_before = e->records.n;
            KVL_TRY(warm_up(e, s, i, error));
            KVL_TRY(run_prompt(e, s, i, error));
            /* At once: hours of work should outlive whatever ends them. */
            if (e->wanted->save != NULL)
                KVL_TRY(eval_records_save(&e->records, n_before, e->wanted->save, error));
            (void)fprintf(stderr, "\r%s: %u of %u prompts ", eval_scenarios[s].name, i + 1, n);
        }
        (void)fprintf(stderr, "\n");
    }
    return KVL_OK;
}

static kvl_status evaluate(evaluation *e, const char *texts, kvl_error *error)
{
    if (e->wanted->from != NULL) return eval_records_load(&e->records, e->wanted->from, error);
    KVL_TRY(eval_corpus_load(texts, &e->corpus, error));
    make_primer(e);
    KVL_TRY(demo_workflow_load(kvl_cli_data_directory(), &e->workflow, error));
    KVL_TRY(kvl_local_host_start(&e->wanted->engine, &e->host, error));
    return run_all(e, error);
}

int kvl_command_eval(int argc, char **argv)
{
    static const struct argp_child children[] = {{&kvl_cli_engine_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        options,  parse, "reuse", "What reuse keeps of full prefill's answers, policy by policy.",
        children, NULL,  NULL};
    arguments wanted = {.seed = 1};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    if (wanted.n_prompts == 0) wanted.n_prompts = wanted.is_quick ? 1 : PROMPTS_DEFAULT;
    if (wanted.engine.n_positions == 0) wanted.engine.n_positions = CONTEXT_DEFAULT;
    evaluation e = {.wanted = &wanted};
    kvl_error error = {0};
    const char *texts = wanted.texts == NULL ? kvl_cli_data_directory() : wanted.texts;
    const kvl_status status = evaluate(&e, texts, &error);
    kvl_local_host_stop(e.host);
    demo_workflow_deinit(&e.workflow);
    eval_corpus_deinit(&e.corpus);
    if (status == KVL_OK && wanted.json) {
        const char *model = wanted.engine.model;
        const eval_about about = {.model = model == NULL ? "smollm2-135m" : model,
                                  .texts = texts,
                                  .n_prompts = wanted.n_prompts,
                                  .seed = wanted.seed};
        eval_print_json(&e.records, &about);
    } else if (status == KVL_OK) {
        eval_print_table(&e.records);
    }
    eval_records_deinit(&e.records);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
