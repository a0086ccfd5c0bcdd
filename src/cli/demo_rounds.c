/* cli/demo_rounds.c: one round: every agent reads the question, its document and all earlier
 * answers; each prompt is run in full first, then with reuse, by the same host. */
#include "base/alloc.h"
#include "cli/demo.h"
#include "cli/task.h"

#include <string.h>

enum { CALL_TIMEOUT_S = 600, KEEP_TIMEOUT_S = 30 };

static double seconds(const demo *d)
{
    return (double)(kvl_clock_now(kvl_clock_system()) - d->start_ns) / (double)KVL_NS_PER_S;
}

/* A task with its parts; everything in it is borrowed from the workflow and from replies. */
typedef struct task {
    Kvloom__V1__RunTask run;
    Kvloom__V1__PromptPart parts[DEMO_PARTS_MAX];
    Kvloom__V1__PromptPart *pointers[DEMO_PARTS_MAX];
} task;

static void fill_slot(const demo *d, uint32_t round, const char *slot, Kvloom__V1__PromptPart *part)
{
    unsigned agent = 0;
    if (sscanf(slot, "agent_%u", &agent) == 1 && agent >= 1 && agent <= d->options->n_agents) {
        const Kvloom__V1__RunReply *answer = d->cells[round][agent - 1].reuse;
        if (answer == NULL) return;
        part->n_tokens = answer->n_tokens;
        part->tokens = answer->tokens;
        part->home = answer->home;
        return;
    }
    char *text = d->workflow.questions[round % d->workflow.n_rounds];
    part->text = (ProtobufCBinaryData){strlen(text), (uint8_t *)text};
}

static void build_task(const demo *d, uint32_t round, uint32_t agent, task *made)
{
    const demo_agent *about = &d->workflow.agents[agent];
    kvloom__v1__run_task__init(&made->run);
    for (size_t p = 0; p < about->n_pieces; p++) {
        Kvloom__V1__PromptPart *part = &made->parts[p];
        kvloom__v1__prompt_part__init(part);
        made->pointers[p] = part;
        const demo_piece *piece = &about->pieces[p];
        if (piece->text != NULL) {
            part->text = (ProtobufCBinaryData){strlen(piece->text), (uint8_t *)piece->text};
        } else {
            part->slot = (char *)(uintptr_t)piece->slot;
            fill_slot(d, round, piece->slot, part);
        }
    }
    made->run.workflow = (char *)(uintptr_t) "demo";
    made->run.template_name = (char *)(uintptr_t)about->name;
    made->run.n_parts = about->n_pieces;
    made->run.parts = made->pointers;
    made->run.quality = d->options->quality;
    made->run.max_tokens = d->options->max_tokens;
}

static kvl_status run_mode(demo *d, size_t host, task *asked, Kvloom__V1__Mode mode,
                           Kvloom__V1__RunReply **ran, kvl_error *error)
{
    asked->run.mode = mode;
    return kvl_cli_call_run(d->exchange, d->hosts[host].name, &asked->run, CALL_TIMEOUT_S, ran,
                            error);
}

/* The next host keeps copies of new anchors. It is a kindness, so a failure is only told. */
static void copy_anchors(demo *d, size_t host, const Kvloom__V1__RunReply *ran)
{
    const size_t n = d->options->n_agents;
    const size_t keeper = (host + 1) % n;
    if (n < 2 || d->hosts[keeper].pid == 0) return;
    for (size_t i = 0; i < ran->n_anchors; i++) {
        Kvloom__V1__HostTask message = KVLOOM__V1__HOST_TASK__INIT;
        Kvloom__V1__KeepTask keep = KVLOOM__V1__KEEP_TASK__INIT;
        keep.id = ran->anchors[i];
        message.what_case = KVLOOM__V1__HOST_TASK__WHAT_KEEP;
        message.keep = &keep;
        Kvloom__V1__HostReply *reply = NULL;
        kvl_error error;
        if (kvl_cli_call(d->exchange, d->hosts[keeper].name, &message, KEEP_TIMEOUT_S, &reply,
                         &error) != KVL_OK) {
            (void)fprintf(stderr, "kvloom: %s keeps no copy of an anchor of %s: %s\n",
                          d->hosts[keeper].name, d->hosts[host].name, error.text);
            continue;
        }
        kvloom__v1__host_reply__free_unpacked(reply, NULL);
    }
}

/* The agent's own host, or the next one that runs. */
static size_t find_host(const demo *d, uint32_t agent)
{
    for (uint32_t i = 0; i < d->options->n_agents; i++) {
        const size_t host = (agent + i) % d->options->n_agents;
        if (d->hosts[host].pid != 0 && kvl_exchange_peer_is_up(d->exchange, d->hosts[host].name))
            return host;
    }
    return agent;
}

/* Hosts with new stores have nothing to reuse in the first round, so there is nothing to compare:
 * the run is one in full, and it is not done twice. */
static bool is_cold(const demo *d, uint32_t round)
{
    return round == 0 && d->options->state == NULL;
}

/* Runs the prompt on one host, in full and with reuse. */
static kvl_status run_on(demo *d, size_t host, task *asked, bool cold, demo_cell *cell,
                         kvl_error *error)
{
    cell->full_start_s = seconds(d);
    asked->run.evaluate = false;
    asked->run.place_only = false;
    if (!cold) KVL_TRY(run_mode(d, host, asked, KVLOOM__V1__MODE__MODE_FULL, &cell->full, error));
    cell->full_end_s = seconds(d);
    cell->reuse_start_s = cell->full_end_s;
    asked->run.evaluate = !cold;
    asked->run.place_only = !cold;
    KVL_TRY(run_mode(d, host, asked, KVLOOM__V1__MODE__MODE_REUSE, &cell->reuse, error));
    cell->reuse_end_s = cell->reuse_start_s + cell->reuse->total_ms / 1e3;
    copy_anchors(d, host, cell->reuse);
    return KVL_OK;
}

static kvl_status run_agent(demo *d, uint32_t round, uint32_t agent, kvl_error *error)
{
    demo_cell *cell = &d->cells[round][agent];
    task asked;
    build_task(d, round, agent, &asked);
    for (uint32_t attempt = 0;; attempt++) {
        const size_t host = find_host(d, agent);
        cell->is_substitute = host != agent;
        const kvl_status status = run_on(d, host, &asked, is_cold(d, round), cell, error);
        if (status == KVL_OK) return KVL_OK;
        if (cell->full != NULL) kvloom__v1__run_reply__free_unpacked(cell->full, NULL);
        cell->full = NULL;
        /* A host that has gone is replaced by another; any other failure is a failure. */
        if (kvl_status_class_of(status) != KVL_CLASS_RETRY || attempt == d->options->n_agents)
            return status;
        (void)fprintf(stderr, "kvloom: host %s is gone; another one takes over\n",
                      d->hosts[host].name);
        demo_host_kill(d, host);
    }
}

kvl_status demo_run_round(demo *d, uint32_t round, kvl_error *error)
{
    KVL_TRY(demo_hosts_revive(d, error));
    for (uint32_t agent = 0; agent < d->options->n_agents; agent++) {
        KVL_TRY(run_agent(d, round, agent, error));
        demo_print_cell(d, round, agent);
        if (d->options->kill_round == round + 1 && d->options->kill_agent == agent + 1) {
            (void)fprintf(stderr, "kvloom: host %s is killed now, as asked\n",
                          d->hosts[agent].name);
            demo_host_kill(d, agent);
        }
    }
    d->n_rounds_done = round + 1;
    return KVL_OK;
}
