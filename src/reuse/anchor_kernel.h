/* reuse/anchor_kernel.h: the inner loops over stored rows of anchors.
 *
 * A stored row has n_groups groups of `dim` numbers, at most KVL_HEAD_DIM_MAX. int8: number = scale
 * of the group * q, scales are float16, finite and not negative (checked when an anchor is added).
 * f32: the numbers.
 * Nothing is assumed about alignment, since rows may lie in a mapped file.
 * Error    Sums in float, lanes of 16; within n * FLT_EPSILON of the exact sum of n terms.
 * Threads  Safe from any thread. */
#ifndef KVL_REUSE_ANCHOR_KERNEL_H
#define KVL_REUSE_ANCHOR_KERNEL_H

#include "compute/backend.h"
#include "segment/container.h"

typedef struct kvl_anchor_rows {
    kvl_kv_dtype dtype;
    const uint8_t *numbers; /* [n_rows][n_groups][dim] of int8 or float */
    const uint8_t *scales;  /* [n_rows][n_groups] float16; int8 only */
} kvl_anchor_rows;

typedef struct kvl_anchor_kernels {
    /* Sum of (x - row)^2 over one row; x [n_groups][dim]. */
    float (*squares_int8)(uint32_t n_groups, uint32_t dim, const uint8_t *numbers,
                          const uint8_t *scales, const float *x);
    /* out[r] += weights[r] * row r; out [n_rows][n_groups][dim], weights [n_rows]. */
    void (*add_int8)(uint32_t n_rows, uint32_t n_groups, uint32_t dim, const uint8_t *numbers,
                     const uint8_t *scales, const float *weights, float *out);
    /* x[i] = scale * numbers[i], one group. */
    void (*load_int8)(uint32_t dim, const uint8_t *numbers, float scale, float *x);
} kvl_anchor_kernels;

/* NULL where this processor cannot run the variant. Static. */
const kvl_anchor_kernels *kvl_anchor_kernels_for(kvl_cpu_variant variant);

/* Row `row` on, of rows that are n_groups * dim wide. */
kvl_anchor_rows kvl_anchor_rows_from(const kvl_anchor_rows *rows, size_t row, uint32_t n_groups,
                                     uint32_t dim);
/* Group `group` on, within the first row. */
kvl_anchor_rows kvl_anchor_rows_group(const kvl_anchor_rows *rows, uint32_t group, uint32_t dim);

float kvl_anchor_squares(const kvl_anchor_kernels *kernels, const kvl_anchor_rows *rows,
                         uint32_t n_groups, uint32_t dim, const float *x);
/* Sum of |x - row| over one row. */
float kvl_anchor_absolutes(const kvl_anchor_kernels *kernels, const kvl_anchor_rows *rows,
                           uint32_t n_groups, uint32_t dim, const float *x);
/* sums[i] += (x[i] - row[i])^2 for every channel of one row. */
void kvl_anchor_add_square_channels(const kvl_anchor_kernels *kernels, const kvl_anchor_rows *rows,
                                    uint32_t n_groups, uint32_t dim, const float *x, float *sums);

void kvl_anchor_add(const kvl_anchor_kernels *kernels, const kvl_anchor_rows *rows, uint32_t n_rows,
                    uint32_t n_groups, uint32_t dim, const float *weights, float *out);
/* out[r][i] += weights[i] * row r [i]; weights [n_groups][dim]. */
void kvl_anchor_add_channels(const kvl_anchor_kernels *kernels, const kvl_anchor_rows *rows,
                             uint32_t n_rows, uint32_t n_groups, uint32_t dim, const float *weights,
                             float *out);
/* out[i] = the float nearest to out[i] + high[i] + low[i]: where high + low is the exact
 * difference r - out[i] of two floats, the result is r, bit for bit (but +0 for -0). n numbers
 * each. */
void kvl_anchor_add_exact(size_t n, const uint8_t *high, const uint8_t *low, float *out);

#endif /* KVL_REUSE_ANCHOR_KERNEL_H */
