/* cli/cmd_explain.c: `kvloom explain`: asks a running host how it would have each part of a prompt,
 * or how it had those of one of its last requests. */
#include "base/alloc.h"
#include "cli/explain_html.h"
#include "cli/task.h"
#include "exchange/exchange.h"
#include "host.pb-c.h"

#include <argp.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

enum {
    MESSAGES_MAX = 31,
    PARTS_MAX = 2 * MESSAGES_MAX + 1,
    CONNECT_TIMEOUT_S = 5,
    CALL_TIMEOUT_S = 60,
    OPTION_WORKFLOW = 256,
    OPTION_BUDGET,
    OPTION_HTML
};

typedef struct arguments {
    kvl_exchange_peer host;
    const char *messages, *workflow, *html;
    uint64_t request; /* 0: a prompt of messages */
    double error_budget;
} arguments;

static const struct argp_option options[] = {
    {"host", 'H', "NAME=ENDPOINT", 0, "The host to ask, as `kvloom serve` was started", 0},
    {"messages", 'M', "FILE", 0, "Messages as JSON: [{\"role\": ..., \"content\": ...}, ...]", 0},
    {"request", 'r', "ID", 0,
     "Instead of messages: one of the host's last requests, by the number in its reply", 0},
    {"html", OPTION_HTML, "FILE", 0, "Draw the plan too, token by token, as one HTML file", 0},
    {"error-budget", OPTION_BUDGET, "KL", 0,
     "Most that the plan may be expected to be off from full prefill, in nats (no limit)", 0},
    {"workflow", OPTION_WORKFLOW, "NAME", 0, "Whose anchors to use (explain)", 0},
    {0},
};

static double budget_of(const char *text, struct argp_state *state)
{
    char *end = NULL;
    const double budget = strtod(text, &end);
    if (end == text || *end != '\0' || !(budget > 0.0 && budget <= 10.0))
        argp_error(state, "--error-budget is '%s'; it must be above 0, up to 10 nats", text);
    return budget;
}

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    switch (key) {
    case 'H': wanted->host = kvl_cli_peer(text, "--host", state); return 0;
    case 'M': wanted->messages = text; return 0;
    case 'r': wanted->request = kvl_cli_number(state, "--request", text, 1, UINT32_MAX); return 0;
    case OPTION_HTML: wanted->html = text; return 0;
    case OPTION_WORKFLOW: wanted->workflow = text; return 0;
    case OPTION_BUDGET: wanted->error_budget = budget_of(text, state); return 0;
    case ARGP_KEY_END:
        if (wanted->host.name == NULL || (wanted->messages == NULL) == (wanted->request == 0))
            argp_error(state, "--host is needed, and one of --messages and --request");
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

/* A prompt of messages: each content is a slot, the turns around it are template text. */
typedef struct prompt {
    Kvloom__V1__PromptPart parts[PARTS_MAX];
    Kvloom__V1__PromptPart *pointers[PARTS_MAX];
    char names[MESSAGES_MAX][24];
    char turns[MESSAGES_MAX + 1][96];
    size_t n;
} prompt;

static void add_part(prompt *made, char *slot, const char *text, size_t n_bytes)
{
    Kvloom__V1__PromptPart *part = &made->parts[made->n];
    kvloom__v1__prompt_part__init(part);
    if (slot != NULL) part->slot = slot;
    part->text = (ProtobufCBinaryData){n_bytes, (uint8_t *)(uintptr_t)text};
    made->pointers[made->n++] = part;
}

static kvl_status read_messages(const char *path, json_t **list, kvl_error *error)
{
    json_error_t reason;
    *list = json_load_file(path, JSON_REJECT_DUPLICATES, &reason);
    if (*list != NULL) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_MALFORMED, "%s, line %d: %s", path, reason.line, reason.text);
}

static kvl_status build_prompt(const json_t *list, prompt *made, kvl_error *error)
{
    const size_t n = json_array_size(list);
    if (n == 0 || n > MESSAGES_MAX)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "1 to %d messages are needed, not %zu",
                        MESSAGES_MAX, n);
    for (size_t i = 0; i < n; i++) {
        const json_t *message = json_array_get(list, i);
        const char *role = json_string_value(json_object_get(message, "role"));
        const json_t *content = json_object_get(message, "content");
        if (role == NULL || strlen(role) > 32 || !json_is_string(content))
            return KVL_FAIL(error, KVL_ERR_MALFORMED,
                            "message %zu needs a role and a content, both texts", i);
        (void)snprintf(made->turns[i], sizeof made->turns[i], "%s<|im_start|>%s\n",
                       i == 0 ? "" : "<|im_end|>\n", role);
        (void)snprintf(made->names[i], sizeof made->names[i], "message_%zu", i + 1);
        add_part(made, NULL, made->turns[i], strlen(made->turns[i]));
        add_part(made, made->names[i], json_string_value(content), json_string_length(content));
    }
    (void)snprintf(made->turns[n], sizeof made->turns[n], "<|im_end|>\n<|im_start|>assistant\n");
    add_part(made, NULL, made->turns[n], strlen(made->turns[n]));
    return KVL_OK;
}

static kvl_status plan_messages(kvl_exchange *exchange, const arguments *wanted, const prompt *made,
                                uint64_t *request, kvl_error *error)
{
    Kvloom__V1__RunReply *reply = NULL;
    Kvloom__V1__RunTask run = KVLOOM__V1__RUN_TASK__INIT;
    run.workflow = (char *)(uintptr_t)wanted->workflow;
    run.template_name = (char *)(uintptr_t) "messages";
    run.mode = KVLOOM__V1__MODE__MODE_PLAN;
    run.error_budget = wanted->error_budget;
    run.n_parts = made->n;
    run.parts = (Kvloom__V1__PromptPart **)(uintptr_t)made->pointers;
    KVL_TRY(kvl_cli_call_run(exchange, wanted->host.name, &run, CALL_TIMEOUT_S, &reply, error));
    *request = reply->request_id;
    kvloom__v1__run_reply__free_unpacked(reply, NULL);
    return KVL_OK;
}

/* made     NULL: the request that is wanted */
static kvl_status ask(const arguments *wanted, const prompt *made, Kvloom__V1__HostReply **reply,
                      kvl_error *error)
{
    kvl_exchange *exchange = NULL;
    Kvloom__V1__PlanTask plan = KVLOOM__V1__PLAN_TASK__INIT;
    Kvloom__V1__HostTask task = KVLOOM__V1__HOST_TASK__INIT;
    task.what_case = KVLOOM__V1__HOST_TASK__WHAT_PLAN;
    task.plan = &plan;
    plan.request_id = wanted->request;
    kvl_status status =
        kvl_cli_dial_host("explain", &wanted->host, CONNECT_TIMEOUT_S, &exchange, error);
    if (status == KVL_OK && made != NULL)
        status = plan_messages(exchange, wanted, made, &plan.request_id, error);
    if (status == KVL_OK)
        status = kvl_cli_call(exchange, wanted->host.name, &task, CALL_TIMEOUT_S, reply, error);
    kvl_exchange_stop(exchange);
    if (status != KVL_OK) return status;
    if ((*reply)->what_case == KVLOOM__V1__HOST_REPLY__WHAT_PLAN && (*reply)->plan->plan != NULL)
        return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_MALFORMED, "%s answered something else than a plan",
                    wanted->host.name);
}

static void print_plan(const Kvloom__V1__RunReply *plan)
{
    (void)printf("request %llu\n", (unsigned long long)plan->request_id);
    (void)printf("part          tokens  shared  placed  offset  blended  computed    cost  if "
                 "computed   error  "
                 "why\n");
    double cost = 0.0;
    double compute = 0.0;
    for (size_t p = 0; p < plan->n_parts; p++) {
        const Kvloom__V1__PartReport *part = plan->parts[p];
        (void)printf("%-12s %7u %7u %7u %7u %8u %9u %4.0f ms %9.0f ms  %.4f  %s%s%s\n",
                     part->slot[0] == '\0' ? "(template)" : part->slot, part->n_tokens,
                     part->shared, part->placed, part->offset, part->blended, part->computed,
                     part->cost_ms, part->compute_ms, part->error, part->reason,
                     part->from[0] == '\0' ? "" : ", from ", part->from);
        cost += part->cost_ms;
        compute += part->compute_ms;
    }
    (void)printf("%-12s %7u %43s %4.0f ms %9.0f ms  %.4f\n", "all", plan->prompt_tokens, "", cost,
                 compute, plan->expected_error);
}

int kvl_command_explain(int argc, char **argv)
{
    static const struct argp argp = {.options = options,
                                     .parser = parse,
                                     .doc = "Ask a running host how it would have each part of a "
                                            "prompt, at what cost, and why; or how it had those "
                                            "of one of its last requests."};
    arguments wanted = {.workflow = "explain"};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    kvl_error error = {0};
    json_t *list = NULL;
    prompt made = {.n = 0};
    kvl_status status = KVL_OK;
    if (wanted.messages != NULL) status = read_messages(wanted.messages, &list, &error);
    if (status == KVL_OK && list != NULL) status = build_prompt(list, &made, &error);
    Kvloom__V1__HostReply *reply = NULL;
    if (status == KVL_OK) status = ask(&wanted, list == NULL ? NULL : &made, &reply, &error);
    if (status == KVL_OK) print_plan(reply->plan->plan);
    if (status == KVL_OK && wanted.html != NULL)
        status = kvl_explain_html_write(reply->plan, wanted.html, &error);
    if (reply != NULL) kvloom__v1__host_reply__free_unpacked(reply, NULL);
    json_decref(list);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
