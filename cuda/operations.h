/* cuda/operations.h: the small kernels of a forward pass, one for each operation of
 * compute/backend.h that is no matrix product and no attention.
 *
 * All pointers are device memory; launches are put on `stream` and return before the work is done.
 * Sums are taken by one block a row, in an order that depends on the width alone. */
#ifndef KVL_CUDA_OPERATIONS_H
#define KVL_CUDA_OPERATIONS_H

#include "cuda/moves.h"

#ifdef __cplusplus
extern "C" {
#endif

/* n words, from pinned host memory too. By a kernel and not by the copy engine, where a plan of some
 * kilobytes would wait for all KV that has been asked for before. */
cudaError_t kvl_cuda_copy_words(size_t n, const uint32_t *from, uint32_t *to, cudaStream_t stream);

/* n floats to bf16, to nearest. */
cudaError_t kvl_cuda_narrow(size_t n, const float *from, void *to, cudaStream_t stream);

/* y[r] = bias, or y[r] += bias: rows [n_rows][width]. */
cudaError_t kvl_cuda_bias(uint32_t n_rows, uint32_t width, const float *bias, int add, float *y,
                          cudaStream_t stream);

/* y[r] = x[r] / sqrt(mean(x[r]^2) + epsilon) * weight; rounded: the same as bf16, for the product
 * that follows. */
cudaError_t kvl_cuda_rms_norm(uint32_t n_rows, uint32_t width, const float *x, const float *weight,
                              float epsilon, float *y, void *rounded, cudaStream_t stream);

/* RoPE in place: rows [n_rows][n_heads][head_dim], positions [n_rows]. */
cudaError_t kvl_cuda_rotate(const kvl_cuda_rotation *rotation, uint32_t n_rows,
                            const uint32_t *positions, uint32_t n_heads, uint32_t head_dim,
                            float *rows, cudaStream_t stream);

/* gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i]; rounded: as above. */
cudaError_t kvl_cuda_silu_multiply(size_t n, float *gate, const float *up, void *rounded,
                                   cudaStream_t stream);

/* out[r] = row ids[r] of a bf16 table. width: a multiple of 2. */
cudaError_t kvl_cuda_embed(uint32_t n_rows, uint32_t width, const uint32_t *ids, const void *table,
                           float *out, cudaStream_t stream);

/* out[r] = rows[from[r]], float. */
cudaError_t kvl_cuda_gather_rows(uint32_t n_rows, uint32_t width, const uint32_t *from,
                                 const float *rows, float *out, cudaStream_t stream);

/* Rows [n_rows][n_kv_heads][head_dim] of keys and values into the slots of a layer's pages, and
 * back. head_dim: a multiple of 8. */
cudaError_t kvl_cuda_pages_write(uint32_t n_rows, uint32_t n_kv_heads, uint32_t head_dim,
                                 const uint32_t *slots, const float *keys, const float *values,
                                 void *pages, cudaStream_t stream);
cudaError_t kvl_cuda_pages_read(uint32_t n_rows, uint32_t n_kv_heads, uint32_t head_dim,
                                const uint32_t *slots, float *keys, float *values,
                                const void *pages, cudaStream_t stream);

/* What rows of one path give each key: see attend_mass of compute/backend.h. */
typedef struct kvl_cuda_mass {
    const void *pages; /* of the layer */
    const float *queries;
    const uint32_t *positions;
    const uint32_t *page_ids;
    float *normalisers; /* [n_rows][n_heads], room for what the first pass finds */
    float *mass;        /* [n_kv_heads][n_keys], added to */
    uint32_t n_rows;
    uint32_t n_heads;
    uint32_t n_kv_heads;
    uint32_t head_dim; /* a multiple of 8, at most 256 */
    uint32_t n_keys;
} kvl_cuda_mass;

/* Two passes: each row's sum of weights, then each key's; in an order that never changes. */
cudaError_t kvl_cuda_attend_mass(const kvl_cuda_mass *mass, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* KVL_CUDA_OPERATIONS_H */
