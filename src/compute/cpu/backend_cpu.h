/* compute/cpu/backend_cpu.h: what the CPU backend keeps behind kvl_backend.
 * Threads  As the backend: the engine thread, and inside an operation thread t of the pool uses
 *          scratch t only. */
#ifndef KVL_COMPUTE_CPU_BACKEND_CPU_H
#define KVL_COMPUTE_CPU_BACKEND_CPU_H

#include "compute/cpu/kernels.h"

/* Scratch of one thread: a dequantised panel, or what attention needs for one tile. */
#define KVL_CPU_SCRATCH_FLOATS (256u * 1024u)

typedef struct kvl_backend_cpu {
    kvl_backend base; /* first, so that a kvl_backend of ours can be cast */
    kvl_cpu_kernels kernels;
    size_t n_threads;
    float *scratch; /* [n_threads][KVL_CPU_SCRATCH_FLOATS], aligned, touched */
    /* Memory that attention keeps from call to call and grows by itself (its partials): owned by
     * the backend, freed with kvl_free when that is destroyed. NULL and 0 at first. */
    void *attend_memory;
    size_t attend_memory_bytes;
} kvl_backend_cpu;

/* The backend must be ours. */
static inline kvl_backend_cpu *kvl_backend_cpu_of(kvl_backend *backend)
{
    return (kvl_backend_cpu *)backend;
}

/* [KVL_CPU_SCRATCH_FLOATS] of one pool thread, aligned to KVL_ALIGNMENT, contents open. */
static inline float *kvl_backend_cpu_scratch(const kvl_backend_cpu *cpu, size_t thread)
{
    return cpu->scratch + thread * KVL_CPU_SCRATCH_FLOATS;
}

#endif /* KVL_COMPUTE_CPU_BACKEND_CPU_H */
