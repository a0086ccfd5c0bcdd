/* compute/cpu/variant_vector.c: what is done to each row or number by itself: RMS normalisation,
 * the gate of the feed-forward part, the exponential.
 * Every number is computed in its own lane, the last incomplete vector like the others, so that a
 * result does not depend on where its row or range begins. */
#include "compute/cpu/kernels.h"
#include "compute/cpu/variant.h"

#include <math.h>

/* Vectors added up side by side, so that one addition need not wait for the last. */
#define CHAINS 4u

static float sum_of_squares(uint32_t n, const float *x)
{
    kvl_vec sums[CHAINS];
    for (uint32_t c = 0; c < CHAINS; c++) sums[c] = kvl_vec_zero();
    uint32_t i = 0;
    for (; i + CHAINS * KVL_LANES <= n; i += CHAINS * KVL_LANES) {
        for (uint32_t c = 0; c < CHAINS; c++) {
            const kvl_vec v = kvl_vec_load(x + i + c * KVL_LANES);
            sums[c] = kvl_vec_fma(v, v, sums[c]);
        }
    }
    for (; i < n; i += KVL_LANES) {
        const kvl_vec v = kvl_vec_load_some(x + i, n - i < KVL_LANES ? n - i : KVL_LANES);
        sums[0] = kvl_vec_fma(v, v, sums[0]);
    }
    return kvl_vec_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

static void rms_norm(uint32_t width, const float *x, const float *weight, float epsilon, float *y)
{
    const float mean = sum_of_squares(width, x) / (float)width;
    const float scale = 1.0F / sqrtf(mean + epsilon);
    uint32_t i = 0;
    for (; i + KVL_LANES <= width; i += KVL_LANES)
        kvl_vec_store(y + i, kvl_vec_load(x + i) * kvl_vec_all(scale) * kvl_vec_load(weight + i));
    for (; i < width; i++) y[i] = x[i] * scale * weight[i];
}

KVL_INLINE kvl_vec gate_one(kvl_vec gate, kvl_vec up)
{
    return gate / (kvl_vec_all(1.0F) + kvl_vec_exp(-gate)) * up;
}

static void silu_multiply(size_t n, float *gate, const float *up)
{
    size_t i = 0;
    for (; i + KVL_LANES <= n; i += KVL_LANES)
        kvl_vec_store(gate + i, gate_one(kvl_vec_load(gate + i), kvl_vec_load(up + i)));
    if (i == n) return;
    const kvl_vec last =
        gate_one(kvl_vec_load_some(gate + i, n - i), kvl_vec_load_some(up + i, n - i));
    kvl_vec_store_some(gate + i, last, n - i);
}

static void exponential(size_t n, const float *x, float *out)
{
    size_t i = 0;
    for (; i + KVL_LANES <= n; i += KVL_LANES)
        kvl_vec_store(out + i, kvl_vec_exp(kvl_vec_load(x + i)));
    if (i == n) return;
    kvl_vec_store_some(out + i, kvl_vec_exp(kvl_vec_load_some(x + i, n - i)), n - i);
}

const kvl_cpu_vector_kernels *KVL_VARIANT_NAME(kvl_cpu_vector)(void)
{
    static const kvl_cpu_vector_kernels kernels = {rms_norm, silu_multiply, exponential};
    return &kernels;
}
