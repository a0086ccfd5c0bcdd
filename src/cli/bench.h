/* cli/bench.h: what the parts of `kvloom bench` share: this machine's own limits, measured in the
 * run that is compared with them, and one report in JSON. Private to the room. */
#ifndef KVL_CLI_BENCH_H
#define KVL_CLI_BENCH_H

#include "host/engine.h"

#include <jansson.h>

/* Floats that the limits are measured over: 256 MiB, which no cache holds. */
#define KVL_BENCH_FLOATS ((size_t)1 << 26)

/* Sorts numbers [n] and gives the middle one, or the mean of the two in the middle. n > 0. */
double kvl_bench_median(double *numbers, size_t n);
/* Since a time of the system's monotonic clock. */
double kvl_bench_seconds_since(int64_t start_ns);

/* A plain float32 product, x [n_rows][n_inputs] times weights [n_outputs][n_inputs]. */
typedef struct kvl_bench_product {
    uint32_t n_rows, n_inputs, n_outputs;
} kvl_bench_product;

/* GFLOP/s of OpenBLAS's sgemm on the product, its outputs shared out over the pool's threads: the
 * best of n_times. memory [KVL_BENCH_FLOATS] is the caller's, and the product fits it. */
double kvl_bench_sgemm_gflops(kvl_pool *threads, const kvl_bench_product *product, float *memory,
                              uint32_t n_times);
/* GB/s of reading memory [KVL_BENCH_FLOATS] with all threads of the pool: the best of n_times. */
double kvl_bench_read_gbs(kvl_pool *threads, const float *memory, uint32_t n_times);

/* Prints a report of the form that every bench has, and ends the JSON values that it is given.
 * figures   object: name of a figure to its number
 * rows      array of objects, may be empty
 * n_threads what was computed with, and by which kernels */
void kvl_bench_print(const char *name, json_t *figures, json_t *rows, size_t n_threads,
                     const char *kernels);

/* Weights of a model that one decoded token reads, and multiplications and additions of one token
 * in its layers. */
void kvl_bench_count_weights(const kvl_engine *engine, double *n_bytes, double *flops);

/* `kvloom bench attention`. */
typedef struct kvl_bench_attention {
    const char *shape; /* only this one of the shapes; NULL: all */
    uint32_t n_repeats;
    bool json;
} kvl_bench_attention;

/* engine   gives threads, kernels, and the time of everything in a model that is not attention
 * Errors   KVL_ERR_NOT_FOUND (no such shape), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_bench_attention_run(const kvl_bench_attention *wanted,
                                                kvl_engine *engine, kvl_error *error);

#endif /* KVL_CLI_BENCH_H */
