/* compute/reference.h: every operation once more, naive and in double: what tests compare with.
 *
 * Written from the definitions and sharing nothing with the kernels, dequantisation included. Slow.
 * Where a bound on rounding needs it, a function also gives `magnitude`: the sum of the absolute
 * values of what is added up, to which a rounding error is relative.
 * Threads  Pure functions. */
#ifndef KVL_COMPUTE_REFERENCE_H
#define KVL_COMPUTE_REFERENCE_H

#include "compute/dtype.h"
#include "compute/rotation.h"

/* n weights, a multiple of the block of the dtype; out [n] double, exact. */
void kvl_reference_dequantise(kvl_dtype dtype, size_t n, const void *weights, double *out);

/* y = x W^T (+ bias). x [n_rows][n_inputs]; bias [n_outputs] or NULL; y, magnitude
 * [n_rows][n_outputs]; magnitude may be NULL.
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_reference_matmul(const kvl_matrix *weights, uint32_t n_rows,
                                             const float *x, const float *bias, double *y,
                                             double *magnitude);

/* x, y [n_rows][width] */
void kvl_reference_rms_norm(uint32_t n_rows, uint32_t width, const float *x, const float *weight,
                            double epsilon, double *y);

/* out[i] = gate[i] / (1 + exp(-gate[i])) * up[i] */
void kvl_reference_silu_multiply(size_t n, const float *gate, const float *up, double *out);

/* One head [head_dim] at one position; inverse_frequencies [rotary_dim / 2]. */
void kvl_reference_rotate(const double *inverse_frequencies, uint32_t rotary_dim,
                          kvl_rotation_pairs pairs, uint32_t position, bool backwards,
                          uint32_t head_dim, const float *head, double *out);

/* Attention of rows to the keys of one sequence. Row r sees keys 0 .. positions[r], and none at or
 * behind n_keys; query head h uses KV head h / (n_heads / n_kv_heads); scores are divided by
 * sqrt(head_dim). A row that sees nothing gives 0.
 * queries [n_rows][n_heads][head_dim], rotated; keys, values [n_keys][n_kv_heads][head_dim]
 * out     [n_rows][n_heads][head_dim] double
 * Errors   KVL_ERR_NO_MEMORY */
typedef struct kvl_reference_attention {
    uint32_t n_rows;
    uint32_t n_heads;
    uint32_t n_kv_heads;
    uint32_t head_dim;
    uint32_t n_keys;
    const float *queries;
    const uint32_t *positions; /* [n_rows] */
    const float *keys;
    const float *values;
} kvl_reference_attention;

KVL_MUST_USE kvl_status kvl_reference_attend(const kvl_reference_attention *attention, double *out);

#endif /* KVL_COMPUTE_REFERENCE_H */
