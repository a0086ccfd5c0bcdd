/* compute/without_cuda.c: what a build without the CUDA backend answers. With KVLOOM_CUDA on,
 * cuda/backend.c takes its place. */
#include "compute/backend.h"

kvl_status kvl_backend_cuda_create(kvl_pool *pool, uint32_t number, kvl_backend **backend,
                                   kvl_error *error)
{
    (void)pool;
    *backend = NULL;
    return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                    "CUDA device %u was asked for, but this kvloom was built without the CUDA "
                    "backend: build with -DKVLOOM_CUDA=ON where nvcc is, or use --device cpu",
                    number);
}
