/* gpu_support.h: what the programs that measure the device share.
 * A failing driver call ends the program with its text: there is nothing to measure then. */
#ifndef KVL_BENCH_GPU_SUPPORT_H
#define KVL_BENCH_GPU_SUPPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

void gpu_must(cudaError_t result, const char *what);
#define GPU_MUST(call) gpu_must((call), #call)

void *gpu_memory(size_t n_bytes);

/* n bf16 numbers (a multiple of 8), roughly normal, the same for the same seed. */
void gpu_fill_bf16(void *to, size_t n, float deviation, uint64_t seed, cudaStream_t stream);

/* Writes to more memory than the second-level cache holds. */
typedef struct gpu_flush {
    void *memory;
    size_t n_bytes;
} gpu_flush;
gpu_flush gpu_flush_create(void);
void gpu_flush_run(const gpu_flush *flush, cudaStream_t stream);
void gpu_flush_destroy(gpu_flush *flush);

/* Median of n numbers; sorts them. */
double gpu_median(double *numbers, size_t n);

/* Milliseconds of one replay: the median of n_repeats after warm-up, the cache cold each time where
 * `flush` is given. */
double gpu_time_graph(cudaGraphExec_t graph, const gpu_flush *flush, uint32_t n_repeats,
                      cudaStream_t stream);

/* The head of a result file: opens the object and leaves it open after "version". */
void gpu_print_head(const char *name, int argc, char **argv);
/* Tokens per second of nothing: the ceilings of this card, measured: bytes copied (read and
 * written) per second. */
double gpu_copy_rate(cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* KVL_BENCH_GPU_SUPPORT_H */
