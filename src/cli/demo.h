/* cli/demo.h: what the files of `kvloom demo` share; private to them. */
#ifndef KVL_CLI_DEMO_H
#define KVL_CLI_DEMO_H

#include "base/clock.h"
#include "cli/cli.h"
#include "exchange/exchange.h"
#include "host.pb-c.h"

#include <sys/types.h>

enum {
    DEMO_AGENTS_MAX = 5,
    DEMO_ROUNDS_MAX = 64,
    DEMO_PARTS_MAX = 32,
    DEMO_NAME_MAX = 32,
    DEMO_STEADY_ROUND = 2 /* anchors are measured in rounds 0 and 1 */
};

typedef struct demo_options {
    kvl_cli_engine engine;
    uint32_t n_agents, n_rounds, max_tokens;
    Kvloom__V1__Quality quality;
    bool json, show_answers, paper_anchors, is_verbose;
    const char *data;   /* directory of workflow.json */
    const char *report; /* HTML file, or NULL */
    const char *state;  /* directory of stores that is kept, or NULL for one that is removed */
    uint32_t kill_agent, kill_round; /* 1-based; 0: nobody is killed */
} demo_options;

/* A piece of a template: text, or the name of a slot. */
typedef struct demo_piece {
    char *text; /* NULL for a slot */
    char slot[DEMO_NAME_MAX];
} demo_piece;

typedef struct demo_agent {
    char name[DEMO_NAME_MAX];
    demo_piece pieces[DEMO_PARTS_MAX];
    size_t n_pieces;
} demo_agent;

typedef struct demo_workflow {
    demo_agent agents[DEMO_AGENTS_MAX];
    size_t n_agents;
    char *questions[DEMO_ROUNDS_MAX]; /* question and document as the slot has them */
    char *short_questions[DEMO_ROUNDS_MAX];
    size_t n_rounds;
} demo_workflow;

/* cli/demo_workflow.c */
KVL_MUST_USE kvl_status demo_workflow_load(const char *directory, demo_workflow *workflow,
                                           kvl_error *error);
void demo_workflow_deinit(demo_workflow *workflow);

typedef struct demo_host {
    pid_t pid; /* 0: not running */
    char name[DEMO_NAME_MAX];
    char endpoint[PATH_MAX];
    char store[PATH_MAX];
} demo_host;

/* What happened to one agent in one round. */
typedef struct demo_cell {
    /* Unpacked; `full` is NULL where the run itself reused nothing: it is its own baseline. */
    Kvloom__V1__RunReply *full, *reuse;
    double full_start_s, full_end_s, reuse_start_s, reuse_end_s; /* since the demo began */
    bool is_substitute; /* another host did it, since its own was down */
} demo_cell;

typedef struct demo {
    const demo_options *options;
    demo_workflow workflow;
    demo_host hosts[DEMO_AGENTS_MAX];
    kvl_exchange *exchange;
    char directory[PATH_MAX]; /* sockets, stores, key */
    char model[PATH_MAX];
    int64_t start_ns;
    demo_cell cells[DEMO_ROUNDS_MAX][DEMO_AGENTS_MAX];
    uint32_t n_rounds_done;
    double place_only_kl, place_only_top1;
} demo;

/* cli/demo_hosts.c */
KVL_MUST_USE kvl_status demo_hosts_start(demo *d, kvl_error *error);
/* Starts those that are not running and waits until all answer. */
KVL_MUST_USE kvl_status demo_hosts_revive(demo *d, kvl_error *error);
void demo_host_kill(demo *d, size_t host);
void demo_hosts_stop(demo *d);

/* cli/demo_rounds.c */
KVL_MUST_USE kvl_status demo_run_round(demo *d, uint32_t round, kvl_error *error);

/* The run without any reuse. */
static inline const Kvloom__V1__RunReply *demo_full_of(const demo_cell *cell)
{
    return cell->full != NULL ? cell->full : cell->reuse;
}

/* Figures of one agent over the steady rounds. */
typedef struct demo_figures {
    uint32_t n;          /* rounds that count */
    uint32_t n_compared; /* of them, where the answer was compared with full prefill's */
    double prompt_tokens, shared, placed, offset, blended, computed, fetched_bytes; /* means */
    double ttft_full_ms, ttft_reuse_ms, speedup;
    double top1, kl, place_only_top1, place_only_kl; /* means of n_compared; 0 where that is 0 */
} demo_figures;

typedef struct demo_summary {
    demo_figures agents[DEMO_AGENTS_MAX];
    double reuse_rate, speedup_mean, speedup_last, top1, kl, place_only_top1, place_only_kl;
    uint32_t wrong_exact_tokens;
    uint32_t n_compared; /* agents that were compared; without any, the measures of quality are 0 */
} demo_summary;

/* cli/demo_output.c */
void demo_summarise(const demo *d, demo_summary *summary);
void demo_print_start(const demo *d);
void demo_print_cell(const demo *d, uint32_t round, uint32_t agent);
void demo_print_table(const demo *d, const demo_summary *summary);
void demo_print_json(const demo *d, const demo_summary *summary);
/* Tokens of a reply by what happened to them. */
typedef struct demo_counts {
    uint32_t shared, placed, offset, computed;
    uint64_t fetched_bytes;
} demo_counts;
demo_counts demo_count(const Kvloom__V1__RunReply *reply);

/* cli/demo_report.c: one self-contained page. Errors   KVL_ERR_IO, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status demo_write_report(const demo *d, const demo_summary *summary,
                                          const char *path, kvl_error *error);

#endif /* KVL_CLI_DEMO_H */
