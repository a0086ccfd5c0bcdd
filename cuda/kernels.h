/* cuda/kernels.h: the launches. They are put on `stream` and return before the work is done. */
#ifndef KVL_CUDA_KERNELS_H
#define KVL_CUDA_KERNELS_H

#include "cuda/work.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Variants of the kernel that are kept for measuring; 0 is what the backend uses. */
cudaError_t kvl_cuda_attention_launch(const kvl_cuda_attention *work, uint32_t variant,
                                      cudaStream_t stream);
uint32_t kvl_cuda_attention_n_variants(void);
const char *kvl_cuda_attention_variant_name(uint32_t variant);

#ifdef __cplusplus
}
#endif

#endif /* KVL_CUDA_KERNELS_H */
