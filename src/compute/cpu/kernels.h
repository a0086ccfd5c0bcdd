/* compute/cpu/kernels.h: the families of kernels, one table of functions each, and every family in
 * the variants that this build has. dispatch.c chooses; nobody else names a variant.
 * Threads  Tables are constant. A kernel works on what it is given and keeps nothing. */
#ifndef KVL_COMPUTE_CPU_KERNELS_H
#define KVL_COMPUTE_CPU_KERNELS_H

#include "compute/backend.h"

/* A part of one product for a few rows: outputs output_first .. output_past - 1 of
 * y = x W^T (+ bias) (+ y). y and bias are those of the whole product. */
typedef struct kvl_cpu_few_part {
    const kvl_matmul_job *job;
    uint32_t output_first;
    uint32_t output_past;
    uint32_t n_rows;
    const float *x; /* [n_rows][n_inputs] */
} kvl_cpu_few_part;

/* matmul: variant_matmul.c. Tables by kvl_dtype, every entry there. */
typedef struct kvl_cpu_matmul_kernels {
    /* n weights, a multiple of the dtype's block, to float32 */
    void (*dequantise[KVL_DTYPE_COUNT])(size_t n, const void *weights, float *out);
    /* each row's result depends on that row and the weights only, to the last bit */
    void (*few[KVL_DTYPE_COUNT])(const kvl_cpu_few_part *part);
} kvl_cpu_matmul_kernels;

/* vector: variant_vector.c. Arguments as in kvl_backend_ops, for one row or one range. */
typedef struct kvl_cpu_vector_kernels {
    void (*rms_norm)(uint32_t width, const float *x, const float *weight, float epsilon, float *y);
    void (*silu_multiply)(size_t n, float *gate, const float *up);
    /* out[i] = e^x[i] within 2 units in the last place; out may be x */
    void (*exp)(size_t n, const float *x, float *out);
} kvl_cpu_vector_kernels;

/* attend: variant_attend.c; the table is in compute/cpu/attend.h. */
typedef struct kvl_cpu_attend_kernels kvl_cpu_attend_kernels;

#if defined(__x86_64__)
#define KVL_CPU_VARIANT_LIST(X) X(portable) X(avx2) X(avx512)
#else
#define KVL_CPU_VARIANT_LIST(X) X(portable)
#endif

/* kvl_cpu_<family>_<variant>() gives a family's table. Static. A variant file defines each with
 *     const kvl_cpu_<family>_kernels *KVL_VARIANT_NAME(kvl_cpu_<family>)(void) */
#define KVL_CPU_GETTERS(variant)                                                                   \
    const kvl_cpu_matmul_kernels *kvl_cpu_matmul_##variant(void);                                  \
    const kvl_cpu_vector_kernels *kvl_cpu_vector_##variant(void);                                  \
    const kvl_cpu_attend_kernels *kvl_cpu_attend_##variant(void);
KVL_CPU_VARIANT_LIST(KVL_CPU_GETTERS)
#undef KVL_CPU_GETTERS

typedef struct kvl_cpu_kernels {
    kvl_cpu_variant variant; /* never KVL_CPU_BEST */
    const kvl_cpu_matmul_kernels *matmul;
    const kvl_cpu_vector_kernels *vector;
    const kvl_cpu_attend_kernels *attend;
} kvl_cpu_kernels;

/* Chooses the tables of a variant. For KVL_CPU_BEST the environment's KVLOOM_CPU decides where it
 * is set, otherwise the best that runs here.
 * Errors   KVL_ERR_UNSUPPORTED (this processor or this build cannot run it)
 *          KVL_ERR_INVALID (KVLOOM_CPU names no variant) */
KVL_MUST_USE kvl_status kvl_cpu_kernels_choose(kvl_cpu_variant variant, kvl_cpu_kernels *kernels,
                                               kvl_error *error);

#endif /* KVL_COMPUTE_CPU_KERNELS_H */
