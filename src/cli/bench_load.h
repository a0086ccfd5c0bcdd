/* cli/bench_load.h: the run of `kvloom bench load`; private to the room. */
#ifndef KVL_CLI_BENCH_LOAD_H
#define KVL_CLI_BENCH_LOAD_H

#include "cli/cli.h"

#include <jansson.h>

/* Adds the figures and a row for each way and load: what healing and the gate cost, idle and
 * loaded, and what the order of those that wait gains.
 * only        "healing" or "order"; NULL: both
 * n_requests  of each way, 1 .. 48; twice as many for the order
 * Errors   those of hosts and of the corpus; KVL_ERR_IO (no thread) */
KVL_MUST_USE kvl_status kvl_bench_load_run(const kvl_cli_engine *engine, const char *only,
                                           uint32_t n_requests, json_t *figures, json_t *rows,
                                           kvl_error *error);

#endif /* KVL_CLI_BENCH_LOAD_H */
