/* compute/cpu/matmul.h: products with weights on the CPU: who does which part. */
#ifndef KVL_COMPUTE_CPU_MATMUL_H
#define KVL_COMPUTE_CPU_MATMUL_H

#include "compute/cpu/backend_cpu.h"

/* Slots of kvl_backend_ops. */
void kvl_cpu_matmul(kvl_backend *backend, const kvl_matmul_job *jobs, size_t n_jobs,
                    uint32_t n_rows, const float *x);
void kvl_cpu_embed(kvl_backend *backend, const kvl_matrix *table, uint32_t n_rows,
                   const uint32_t *ids, float *out);

#endif /* KVL_COMPUTE_CPU_MATMUL_H */
