/* kvloom-sim: the protocol between hosts in a simulated network, one seed after another.
 *
 *     kvloom-sim --seed N [--steps N]    one run, to look at; the same every time
 *     kvloom-sim --seeds N [--first N]   N seeds, fresh ones unless --first says which
 *
 * Ends with 1 at the first seed that breaks an invariant (exchange_sim.h), and says how to repeat
 * it. */
#include "base/random.h"
#include "exchange_sim.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int run_one(uint64_t seed, uint64_t n_steps)
{
    kvl_sim_options options = kvl_sim_everything(seed);
    kvl_sim_report r;
    options.n_steps = n_steps;
    kvl_sim_run(&options, &r);
    (void)printf("seed %" PRIu64 ": %u hosts, %" PRIu64 " steps, trace %016" PRIx64 "\n", seed,
                 options.n_hosts, r.n_steps, r.trace);
    (void)printf("requests %" PRIu64 ", ended %" PRIu64 ", ok %" PRIu64 ", unreachable %" PRIu64
                 ", late %" PRIu64 ", nowhere %" PRIu64 "\n",
                 r.n_requests, r.n_ended, r.n_ok, r.n_unreachable, r.n_timeout, r.n_not_found);
    (void)printf("messages %" PRIu64 ", kills %" PRIu64 ", splits %" PRIu64 ", jumps %" PRIu64
                 ", disk errors %" PRIu64 ", damaged blocks %" PRIu64 ", hedges %" PRIu64
                 " (%" PRIu64 " won)\n",
                 r.n_messages, r.n_kills, r.n_splits, r.n_jumps, r.n_disk_errors,
                 r.n_blocks_damaged, r.n_hedges, r.n_hedges_won);
    (void)printf("%s\n", r.violation[0] == '\0' ? "nothing was violated" : r.violation);
    return r.violation[0] == '\0' ? 0 : 1;
}

static int run_many(uint64_t first, uint64_t n_seeds)
{
    uint64_t n_steps = 0, n_hedges = 0, n_hedges_won = 0;
    (void)printf("seeds %" PRIu64 " to %" PRIu64 "\n", first, first + n_seeds - 1);
    (void)fflush(stdout);
    for (uint64_t i = 0; i < n_seeds; i++) {
        const kvl_sim_options options = kvl_sim_everything(first + i);
        kvl_sim_report report;
        kvl_sim_run(&options, &report);
        n_steps += report.n_steps;
        n_hedges += report.n_hedges;
        n_hedges_won += report.n_hedges_won;
        if (report.violation[0] == '\0') continue;
        (void)printf("kvloom-sim --seed %" PRIu64 ": %s\n", options.seed, report.violation);
        return 1;
    }
    (void)printf("%" PRIu64 " seeds, %" PRIu64 " steps, %" PRIu64 " hedges (%" PRIu64
                 " won): nothing was violated\n",
                 n_seeds, n_steps, n_hedges, n_hedges_won);
    return 0;
}

int main(int argc, char **argv)
{
    uint64_t seed = 0, first = 0, n_seeds = 0, n_steps = 0;
    bool has_seed = false, has_first = false;
    for (int i = 1; i < argc; i += 2) {
        const bool has_value = i + 1 < argc;
        char *end = NULL;
        const uint64_t value = has_value ? strtoull(argv[i + 1], &end, 10) : 0;
        const bool is_number = has_value && argv[i + 1][0] != '\0' && *end == '\0';
        if (is_number && strcmp(argv[i], "--seed") == 0) {
            seed = value;
            has_seed = true;
        } else if (is_number && strcmp(argv[i], "--seeds") == 0) {
            n_seeds = value;
        } else if (is_number && strcmp(argv[i], "--first") == 0) {
            first = value;
            has_first = true;
        } else if (is_number && strcmp(argv[i], "--steps") == 0) {
            n_steps = value;
        } else {
            has_seed = false;
            n_seeds = 0;
            break;
        }
    }
    if (has_seed == (n_seeds > 0)) {
        (void)fprintf(stderr, "Usage: kvloom-sim --seed N [--steps N] | --seeds N [--first N]\n");
        return 2;
    }
    if (has_seed) return run_one(seed, n_steps);
    if (!has_first) kvl_random_secret(&first, 5); /* short enough to be typed */
    return run_many(first, n_seeds);
}
