/* compute/cpu/kernels.h: the families of kernels, one table of functions each, and every family in
 * the variants that this build has. dispatch.c chooses; nobody else names a variant.
 * Threads  Tables are constant. A kernel works on what it is given and keeps nothing. */
#ifndef KVL_COMPUTE_CPU_KERNELS_H
#define KVL_COMPUTE_CPU_KERNELS_H

#include "compute/backend.h"

/* How every product is summed, few rows or many, so that both give the same bits:
 * the inputs are cut into runs of kvl_cpu_run_inputs; inside a run lane l of a vector adds up, with
 * kvl_vec_fma and in order, the inputs k with k mod KVL_LANES = l; the lanes are added as
 * kvl_vec_sum does; the sums of the runs are added to y in order. Which rows and outputs a kernel
 * takes together is then a matter of speed only. */

/* A run of inputs of four rows and four outputs fits the first-level cache. */
#define KVL_CPU_RUN_INPUTS_MAX 768u

/* Length of a run (the last may be shorter): equal runs, rounded up to 256, the largest block. */
static inline uint32_t kvl_cpu_run_inputs(uint32_t n_inputs)
{
    const uint32_t n_runs = (n_inputs + KVL_CPU_RUN_INPUTS_MAX - 1) / KVL_CPU_RUN_INPUTS_MAX;
    const uint32_t equal = n_runs == 0 ? 1 : (n_inputs + n_runs - 1) / n_runs;
    return (equal + 255U) / 256U * 256U;
}

/* Outputs output_first .. output_past - 1 of a product, straight from the quantised weights. */
typedef struct kvl_cpu_few_part {
    const kvl_matrix *weights;
    uint32_t output_first;
    uint32_t output_past;
    uint32_t n_rows;
    const float *x; /* [n_rows][n_inputs] */
    float *y;       /* [n_rows][n_outputs], of the whole product */
    bool add;       /* to what y holds */
} kvl_cpu_few_part;

/* One run of inputs against a panel of dequantised weights. */
typedef struct kvl_cpu_panel {
    uint32_t n_rows;
    uint32_t n_outputs;
    uint32_t n_inputs; /* of the run */
    const float *x;    /* [n_rows][x_stride] */
    size_t x_stride;
    const float *w; /* [n_outputs][w_stride], zeros from n_inputs to a multiple of 32 */
    size_t w_stride;
    float *y; /* [n_rows][y_stride] */
    size_t y_stride;
    bool add; /* to what y holds */
} kvl_cpu_panel;

/* matmul: variant_matmul.c. Tables by kvl_dtype, every entry there. */
typedef struct kvl_cpu_matmul_kernels {
    /* n weights from the beginning of a block on to float32. n may end inside a block only where
     * a block is one weight. */
    void (*dequantise[KVL_DTYPE_COUNT])(size_t n, const void *weights, float *out);
    void (*few[KVL_DTYPE_COUNT])(const kvl_cpu_few_part *part);
    void (*multiply)(const kvl_cpu_panel *panel);
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

/* mass: variant_mass.c; the table is in compute/cpu/attend.h. */
typedef struct kvl_cpu_mass_kernels kvl_cpu_mass_kernels;

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
    const kvl_cpu_attend_kernels *kvl_cpu_attend_##variant(void);                                  \
    const kvl_cpu_mass_kernels *kvl_cpu_mass_##variant(void);
KVL_CPU_VARIANT_LIST(KVL_CPU_GETTERS)
#undef KVL_CPU_GETTERS

typedef struct kvl_cpu_kernels {
    kvl_cpu_variant variant; /* never KVL_CPU_BEST */
    const kvl_cpu_matmul_kernels *matmul;
    const kvl_cpu_vector_kernels *vector;
    const kvl_cpu_attend_kernels *attend;
    const kvl_cpu_mass_kernels *mass;
} kvl_cpu_kernels;

/* Chooses the tables of a variant. For KVL_CPU_BEST the environment's KVLOOM_CPU decides where it
 * is set, otherwise the best that runs here.
 * Errors   KVL_ERR_UNSUPPORTED (this processor or this build cannot run it)
 *          KVL_ERR_INVALID (KVLOOM_CPU names no variant) */
KVL_MUST_USE kvl_status kvl_cpu_kernels_choose(kvl_cpu_variant variant, kvl_cpu_kernels *kernels,
                                               kvl_error *error);

#endif /* KVL_COMPUTE_CPU_KERNELS_H */
