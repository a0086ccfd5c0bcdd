/* cuda/backend.h: what lies beyond the table of operations, for whoever moves KV beside it. */
#ifndef KVL_CUDA_BACKEND_H
#define KVL_CUDA_BACKEND_H

#include "compute/backend.h"

#include <cuda_runtime_api.h>

/* The stream that a CUDA backend puts its operations on; borrowed. */
cudaStream_t kvl_cuda_backend_stream(const kvl_backend *backend);

#endif /* KVL_CUDA_BACKEND_H */
