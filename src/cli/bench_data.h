/* cli/bench_data.h: what the benches of exchange and store share, beside cli/bench.h. */
#ifndef KVL_CLI_BENCH_DATA_H
#define KVL_CLI_BENCH_DATA_H

#include "base/clock.h"
#include "cli/bench.h"
#include "cli/cli.h"
#include "segment/container.h"

#include <jansson.h>
#include <sys/types.h>

int kvl_bench_exchange(int argc, char **argv);
int kvl_bench_store(int argc, char **argv);

typedef struct kvl_bench_options {
    bool json;
    uint32_t n_repeats;
} kvl_bench_options;

/* --json, --quick, --repeats. False: wrong use, and the user has been told. */
bool kvl_bench_parse(int argc, char **argv, const char *about, kvl_bench_options *options);

/* Sorts. */
double kvl_bench_quantile(double *numbers, size_t n, double quantile);

/* A sealed segment of about n_bytes in n_layers blocks, named by `number`. */
KVL_MUST_USE kvl_status kvl_bench_container(uint64_t number, size_t n_bytes, uint32_t n_layers,
                                            kvl_container **container, kvl_error *error);
kvl_digest kvl_bench_id(uint64_t number);
kvl_digest kvl_bench_fingerprint(void);

/* Prints the one JSON object, or a line a figure. Takes figures and rows. */
void kvl_bench_report(const char *name, const kvl_bench_options *options, json_t *figures,
                      json_t *rows);
/* Adds a row of a name and a value in a unit. */
void kvl_bench_row(json_t *rows, const char *what, double value, const char *unit);

#endif /* KVL_CLI_BENCH_DATA_H */
