/* compute/cpu/matmul.h: products with weights on the CPU: who does which part. */
#ifndef KVL_COMPUTE_CPU_MATMUL_H
#define KVL_COMPUTE_CPU_MATMUL_H

#include "compute/cpu/backend_cpu.h"

/* Up to this many rows the quantised weights go straight through registers; above, a panel of them
 * is dequantised once for all rows. Both give the same bits (kernels.h); this is where the times
 * cross on Zen 4, with either vector length. */
#define KVL_CPU_FEW_ROWS_MAX 2u

/* Slots of kvl_backend_ops. */
void kvl_cpu_matmul(kvl_backend *backend, const kvl_matmul_job *jobs, size_t n_jobs,
                    uint32_t n_rows, const float *x);
void kvl_cpu_embed(kvl_backend *backend, const kvl_matrix *table, uint32_t n_rows,
                   const uint32_t *ids, float *out);

#endif /* KVL_COMPUTE_CPU_MATMUL_H */
