/* cuda/mover.h: bytes between host and device, one stream each way, so that both ways run at once
 * and beside the kernels.
 *
 * Pinned host memory is copied straight; other memory goes through a ring of pinned slots, a slot
 * being filled while the one before is on the bus. Layer by layer a model can compute with what has
 * come: kvl_cuda_mover_order makes its stream wait for the loads so far, not the host.
 * Threads  One at a time. */
#ifndef KVL_CUDA_MOVER_H
#define KVL_CUDA_MOVER_H

#include "base/status.h"

#include <cuda_runtime_api.h>

typedef struct kvl_cuda_mover kvl_cuda_mover;

/* n_slots pinned slots of slot_bytes each way, at least 2.
 * Owns     *mover: ended with kvl_cuda_mover_destroy
 * Errors   KVL_ERR_NO_MEMORY, KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_cuda_mover_create(uint32_t n_slots, size_t slot_bytes,
                                              kvl_cuda_mover **mover, kvl_error *error);
/* Waits for what is under way. NULL does nothing. */
void kvl_cuda_mover_destroy(kvl_cuda_mover *mover);

/* Host to device. With `pinned` the host's memory is read until the load is done; otherwise it may
 * be changed when this returns.
 * Errors   KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_cuda_mover_load(kvl_cuda_mover *mover, void *device, const void *host,
                                            size_t n_bytes, bool pinned, kvl_error *error);
/* Device to host, behind everything that `after` has been given so far. With `pinned` it returns
 * before the bytes are there (kvl_cuda_mover_finish); otherwise it blocks until they are.
 * Errors   KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_cuda_mover_store(kvl_cuda_mover *mover, void *host, const void *device,
                                             size_t n_bytes, bool pinned, cudaStream_t after,
                                             kvl_error *error);

/* What `stream` is given from now on runs after all loads so far. */
KVL_MUST_USE kvl_status kvl_cuda_mover_order(kvl_cuda_mover *mover, cudaStream_t stream,
                                             kvl_error *error);
/* Records an event of the caller's behind all loads so far, for streams that come to it later:
 * so a whole segment is asked for at once, and each layer waits for its own part only. */
KVL_MUST_USE kvl_status kvl_cuda_mover_mark(kvl_cuda_mover *mover, cudaEvent_t event,
                                            kvl_error *error);
/* Waits until everything so far is done, both ways. */
KVL_MUST_USE kvl_status kvl_cuda_mover_finish(kvl_cuda_mover *mover, kvl_error *error);

#endif /* KVL_CUDA_MOVER_H */
