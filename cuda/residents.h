/* cuda/residents.h: what the host owns and the device keeps copies of: weights as bf16, norms and
 * biases, rotation tables, and the small arrays of indices of a step.
 *
 * Copies are known by the address of the original. Weights, norms and biases must not change while
 * the residents live; a rotation table is compared by its last row, indices word by word, since
 * their memory is used again.
 * Threads  The engine thread only. */
#ifndef KVL_CUDA_RESIDENTS_H
#define KVL_CUDA_RESIDENTS_H

#include "compute/backend.h"
#include "cuda/moves.h"

typedef struct kvl_cuda_residents kvl_cuda_residents;

/* `host` dequantises weights; borrowed.
 * Owns     *residents: ended with kvl_cuda_residents_destroy
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_cuda_residents_create(kvl_backend *host, cudaStream_t stream,
                                                  kvl_cuda_residents **residents, kvl_error *error);
void kvl_cuda_residents_destroy(kvl_cuda_residents *residents);

/* Each gives device memory, borrowed; the first time brings it there.
 * Errors   KVL_ERR_NO_MEMORY (text: bytes), KVL_ERR_IO */

/* bf16 [n_outputs][n_inputs] */
KVL_MUST_USE kvl_status kvl_cuda_resident_matrix(kvl_cuda_residents *residents,
                                                 const kvl_matrix *matrix, const void **device,
                                                 kvl_error *error);
KVL_MUST_USE kvl_status kvl_cuda_resident_floats(kvl_cuda_residents *residents,
                                                 const float *numbers, size_t n,
                                                 const float **device, kvl_error *error);
/* Errors   also KVL_ERR_UNSUPPORTED: rotary_dim is no multiple of 16 */
KVL_MUST_USE kvl_status kvl_cuda_resident_rotation(kvl_cuda_residents *residents,
                                                   const kvl_rotation *rotation,
                                                   kvl_cuda_rotation *device, kvl_error *error);
/* Good until four other arrays have been asked for. */
KVL_MUST_USE kvl_status kvl_cuda_resident_indices(kvl_cuda_residents *residents,
                                                  const uint32_t *indices, uint32_t n,
                                                  const uint32_t **device, kvl_error *error);

#endif /* KVL_CUDA_RESIDENTS_H */
