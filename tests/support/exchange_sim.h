/* exchange_sim.h: hosts, their protocols and the network between them in one thread and in made-up
 * time. The same seed gives the same run, so a failure can be looked at again.
 *
 * Every message goes through the real encoder and decoder. The network loses, doubles, delays,
 * reorders and damages, and falls apart; hosts are killed and come back with a new epoch, their
 * clocks jump, their disks fail. What must hold whatever happens is checked on the way; the first
 * thing that does not is the report's `violation`. */
#ifndef KVL_TEST_EXCHANGE_SIM_H
#define KVL_TEST_EXCHANGE_SIM_H

#include <stdbool.h>
#include <stdint.h>

#define KVL_SIM_HOSTS_MAX 12u

typedef struct kvl_sim_options {
    uint64_t seed;
    uint32_t n_hosts;    /* 2 .. KVL_SIM_HOSTS_MAX */
    uint32_t n_requests; /* of the whole run, spread over two seconds */
    /* Of a thousand messages */
    uint32_t n_lost, n_doubled, n_damaged;
    bool reorders; /* each message takes its own time, so that later ones overtake */
    bool kills;    /* some hosts die and come back */
    bool splits;   /* for a while some hosts cannot reach the others; nobody is told */
    bool jumps;    /* the clock of a host goes forward by up to six seconds, as after a sleep */
    uint32_t n_disk_errors; /* of a thousand reads of a store */
    uint64_t n_steps;       /* events, then the run ends as it is; 0: to its end */
} kvl_sim_options;

typedef struct kvl_sim_report {
    uint64_t n_messages, n_requests, n_ended, n_ok, n_unreachable, n_timeout, n_not_found;
    uint64_t n_steps, trace; /* the same seed and options give the same trace */
    uint64_t n_splits, n_jumps, n_disk_errors;
    uint64_t n_kills, n_tasks_run, n_blocks_damaged, n_refused;
    uint64_t n_hedges, n_hedges_won;
    uint64_t under_way_bytes_max; /* of blocks, from one host to another */
    uint64_t n_final_ok, n_final; /* requests after all faults have stopped */
    char violation[256];          /* "": none */
} kvl_sim_report;

/* Everything that can go wrong, more or less of each as the seed wants it. */
kvl_sim_options kvl_sim_everything(uint64_t seed);

void kvl_sim_run(const kvl_sim_options *options, kvl_sim_report *report);

#endif /* KVL_TEST_EXCHANGE_SIM_H */
