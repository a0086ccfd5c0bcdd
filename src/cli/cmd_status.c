/* cli/cmd_status.c: `kvloom status`: what a running host holds, has healed, and has learnt of what
 * reuse costs. */
#include "cli/task.h"
#include "reuse/planner.h"

#include <argp.h>
#include <jansson.h>
#include <string.h>

enum { CONNECT_TIMEOUT_S = 5, CALL_TIMEOUT_S = 60, OPTION_JSON = 256 };

typedef struct arguments {
    kvl_exchange_peer host;
    bool json;
} arguments;

static const struct argp_option options[] = {
    {"host", 'H', "NAME=ENDPOINT", 0, "The host to ask, as `kvloom serve` was started", 0},
    {"json", OPTION_JSON, NULL, 0, "Print one JSON object", 0},
    {0},
};

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    switch (key) {
    case 'H': wanted->host = kvl_cli_peer(text, "--host", state); return 0;
    case OPTION_JSON: wanted->json = true; return 0;
    case ARGP_KEY_END:
        if (wanted->host.name == NULL) argp_error(state, "--host is needed");
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static kvl_status ask(const arguments *wanted, Kvloom__V1__HostReply **reply, kvl_error *error)
{
    Kvloom__V1__HostTask task = KVLOOM__V1__HOST_TASK__INIT;
    task.what_case = KVLOOM__V1__HOST_TASK__WHAT_STATUS;
    task.status = true;
    kvl_exchange *exchange = NULL;
    KVL_TRY(kvl_cli_dial_host("status", &wanted->host, CONNECT_TIMEOUT_S, &exchange, error));
    kvl_status status =
        kvl_cli_call(exchange, wanted->host.name, &task, CALL_TIMEOUT_S, reply, error);
    kvl_exchange_stop(exchange);
    if (status == KVL_OK && (*reply)->what_case != KVLOOM__V1__HOST_REPLY__WHAT_STATUS)
        status = KVL_FAIL(error, KVL_ERR_MALFORMED, "%s answered something else than its status",
                          wanted->host.name);
    return status;
}

typedef struct figure {
    const char *name;
    uint64_t value;
} figure;

enum { FIGURES = 16 };

static void take(const Kvloom__V1__StatusReply *s, figure *figures)
{
    const figure all[FIGURES] = {
        {"anchors", s->n_anchors},
        {"anchor_bytes", s->anchor_bytes},
        {"store_containers", s->store_containers},
        {"store_bytes", s->store_bytes},
        {"free_pages", s->free_pages},
        {"tree_pages", s->tree_pages},
        {"healed", s->healed},
        {"heals_waiting", s->heals_waiting},
        {"heals_dropped", s->heals_dropped},
        {"heals_failed", s->heals_failed},
        {"healed_tokens", s->healed_tokens},
        {"differed_tokens", s->differed_tokens},
        {"gated", s->gated},
        {"healed_first", s->healed_first},
        {"donors", s->donors},
        {"donor_bytes", s->donor_bytes},
    };
    memcpy(figures, all, sizeof all);
}

static void print_json(const Kvloom__V1__StatusReply *s)
{
    figure figures[FIGURES];
    take(s, figures);
    json_t *audits = json_array();
    for (size_t i = 0; i < s->n_audits; i++) {
        const Kvloom__V1__AuditReport *a = s->audits[i];
        (void)json_array_append_new(audits,
                                    json_pack("{s:s, s:s, s:I, s:f, s:f, s:f, s:f}", "key", a->key,
                                              "action", kvl_action_name((kvl_action)a->action),
                                              "audited", (json_int_t)a->audited, "kl", a->kl,
                                              "top1_agreement", a->top1_agreement, "exact_match",
                                              a->exact_match, "gate_bar", (double)a->gate_bar));
    }
    json_t *root =
        json_pack("{s:s, s:s, s:o}", "name", s->name, "model", s->model, "audits", audits);
    for (int i = 0; i < FIGURES; i++)
        (void)json_object_set_new(root, figures[i].name,
                                  json_integer((json_int_t)figures[i].value));
    (void)json_dumpf(root, stdout, JSON_INDENT(2));
    (void)printf("\n");
    json_decref(root);
}

static void print_text(const Kvloom__V1__StatusReply *s)
{
    figure figures[FIGURES];
    take(s, figures);
    (void)printf("%-18s %s\n%-18s %s\n", "name", s->name, "model", s->model);
    for (int i = 0; i < FIGURES; i++)
        (void)printf("%-18s %llu\n", figures[i].name, (unsigned long long)figures[i].value);
    if (s->n_audits == 0) return;
    (void)printf(
        "\naudited template                 action  requests      KL   top-1   exact   bar\n");
    for (size_t i = 0; i < s->n_audits; i++) {
        const Kvloom__V1__AuditReport *a = s->audits[i];
        (void)printf("%-32s %-7s %8llu %7.4f %7.3f %7.3f %5.2f\n", a->key,
                     kvl_action_name((kvl_action)a->action), (unsigned long long)a->audited, a->kl,
                     a->top1_agreement, a->exact_match, (double)a->gate_bar);
    }
}

int kvl_command_status(int argc, char **argv)
{
    static const struct argp argp = {.options = options,
                                     .parser = parse,
                                     .doc = "What a running host holds, has healed, and has learnt "
                                            "of what reuse costs."};
    arguments wanted = {.json = false};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    kvl_error error = {0};
    Kvloom__V1__HostReply *reply = NULL;
    const kvl_status status = ask(&wanted, &reply, &error);
    if (status == KVL_OK && wanted.json)
        print_json(reply->status);
    else if (status == KVL_OK)
        print_text(reply->status);
    if (reply != NULL) kvloom__v1__host_reply__free_unpacked(reply, NULL);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
