/* compute/cpu/attend.h: attention on the CPU: who does which part, and the kernels it calls.
 *
 * A thread takes a run (slices of one block of rows) for one KV head. Every query head that uses
 * this KV head is packed as a row of one matrix, so that scores and outputs are matrix products.
 * Each slice gives a partial result of its own; partials of a row are folded from the first slice
 * to the last, always by the same function, whether they come from the cache of one thread or from
 * memory that several threads wrote. Bits therefore do not depend on threads, blocks or runs.
 * Method   FlashAttention (arXiv:2205.14135, section 3.1) inside a slice; Hydragen
 *          (arXiv:2402.05099, section 3) for pages that rows share. */
#ifndef KVL_COMPUTE_CPU_ATTEND_H
#define KVL_COMPUTE_CPU_ATTEND_H

#include "compute/cpu/backend_cpu.h"

/* A partial: output [head_dim], not divided by the sum; at [head_dim] the largest score, one after
 * it the sum of exp(score - largest). Nothing seen: largest -infinity, sum 0, output 0. */
#define KVL_ATTEND_PARTIAL_EXTRA 16u

static inline size_t kvl_attend_partial_floats(uint32_t head_dim)
{
    return (size_t)head_dim + KVL_ATTEND_PARTIAL_EXTRA;
}

/* What one thread does at a time: neighbouring tiles of one block, for one KV head. */
typedef struct kvl_attend_job {
    const kvl_attend_call *call;
    const kvl_attend_block *block;
    const kvl_attend_tile *tiles; /* whole slices */
    uint32_t n_tiles;
    uint32_t kv_head;
    float *partials; /* of all split blocks [n_partials][n_heads][partial]; NULL: write `out` */
    float *scratch;  /* [KVL_CPU_SCRATCH_FLOATS], aligned */
} kvl_attend_job;

struct kvl_cpu_attend_kernels {
    void (*run)(const kvl_attend_job *job);
    /* Folds n partials that lie `stride` floats apart, in order, and writes the row's output
     * [head_dim], 0 when all are empty. `state` has room for one partial. */
    void (*merge)(uint32_t head_dim, uint32_t n, const float *partials, size_t stride, float *state,
                  float *out);
};

struct kvl_cpu_mass_kernels {
    /* out[k] += weights of all rows and all query heads of one KV head; out [n_keys];
     * scratch [KVL_CPU_SCRATCH_FLOATS], aligned */
    void (*mass)(const kvl_attend_mass_call *call, uint32_t kv_head, float *scratch, float *out);
};

/* Slots of kvl_backend_ops. */
void kvl_cpu_attend(kvl_backend *backend, const kvl_attend_call *call);
void kvl_cpu_attend_mass(kvl_backend *backend, const kvl_attend_mass_call *call, float *mass);
void kvl_cpu_pages_write(kvl_backend *backend, const kvl_pages *pages, uint32_t layer,
                         uint32_t n_rows, const uint32_t *slots, const float *keys,
                         const float *values);
void kvl_cpu_pages_read(kvl_backend *backend, const kvl_pages *pages, uint32_t layer,
                        uint32_t n_rows, const uint32_t *slots, float *keys, float *values);

#endif /* KVL_COMPUTE_CPU_ATTEND_H */
