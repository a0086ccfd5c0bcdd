/* compute_weights.h: for tests of the compute room: random weights, and a backend of every variant
 * that this processor runs. */
#ifndef KVL_COMPUTE_WEIGHTS_H
#define KVL_COMPUTE_WEIGHTS_H

#include "base/alloc.h"
#include "compute/backend.h"
#include "test_random.h"

#include <string.h>

static const kvl_cpu_variant test_variants[] = {KVL_CPU_PORTABLE, KVL_CPU_AVX2, KVL_CPU_AVX512};
enum { N_TEST_VARIANTS = sizeof test_variants / sizeof *test_variants };

static inline uint32_t test_lanes(kvl_cpu_variant variant)
{
    return variant == KVL_CPU_AVX512 ? 16 : variant == KVL_CPU_AVX2 ? 8 : 4;
}

/* NULL where the variant does not run here. */
static inline kvl_backend *test_backend(kvl_pool *pool, kvl_cpu_variant variant)
{
    kvl_backend *backend = NULL;
    kvl_error error;
    if (!kvl_cpu_variant_runs(variant)) return NULL;
    assert_int_equal(kvl_backend_cpu_create(pool, variant, &backend, &error), KVL_OK);
    return backend;
}

static inline kvl_pool *test_pool(size_t n_threads)
{
    kvl_pool *pool = NULL;
    assert_int_equal(kvl_pool_create(n_threads, false, &pool, NULL), KVL_OK);
    return pool;
}

/* A finite half: any sign and mantissa, exponents up to `exponent_past`, subnormal ones too. */
static inline uint16_t test_half(kvl_random *random, uint32_t exponent_past)
{
    const uint32_t bits = kvl_test_below(random, 1U << 16);
    return (uint16_t)((bits & 0x83FFU) | kvl_test_below(random, exponent_past) << 10);
}

static inline void test_put_half(uint8_t *to, uint16_t half)
{
    memcpy(to, &half, sizeof half);
}

/* Random bytes, with finite numbers where a block keeps scales. */
static inline void test_fill_block(kvl_random *random, kvl_dtype dtype, uint8_t *block)
{
    const uint32_t n_bytes = kvl_dtype_about(dtype)->block_bytes;
    for (uint32_t i = 0; i < n_bytes; i++) block[i] = (uint8_t)kvl_test_below(random, 256);
    switch (dtype) {
    case KVL_DTYPE_F32: {
        const float value = 2.0F * kvl_random_uniform(random) - 1.0F;
        memcpy(block, &value, sizeof value);
        break;
    }
    case KVL_DTYPE_BF16: block[1] = (uint8_t)((block[1] & 0x80) | 0x3E); break;
    case KVL_DTYPE_F16: test_put_half(block, test_half(random, 31)); break;
    case KVL_DTYPE_Q6_K: test_put_half(block + 208, test_half(random, 12)); break;
    case KVL_DTYPE_Q8_0:
    case KVL_DTYPE_Q4_0:
    case KVL_DTYPE_Q5_0: test_put_half(block, test_half(random, 16)); break;
    default:
        test_put_half(block, test_half(random, 16));
        test_put_half(block + 2, test_half(random, 16));
        break;
    }
}

/* Owns: data is ended with kvl_free((void *)matrix.data). Rows lie as in a file, at odd addresses
 * where the format has odd sizes. */
static inline kvl_matrix test_matrix(kvl_random *random, kvl_dtype dtype, uint32_t n_outputs,
                                     uint32_t n_inputs)
{
    const kvl_dtype_info *about = kvl_dtype_about(dtype);
    const size_t row_bytes = (size_t)n_inputs / about->block_weights * about->block_bytes;
    uint8_t *data = kvl_alloc(n_outputs * row_bytes);
    assert_non_null(data);
    for (size_t at = 0; at < n_outputs * row_bytes; at += about->block_bytes)
        test_fill_block(random, dtype, data + at);
    return (kvl_matrix){data, row_bytes, n_outputs, n_inputs, dtype};
}

/* 1 .. about n_max inputs, a multiple of the block. */
static inline uint32_t test_inputs(kvl_random *random, kvl_dtype dtype, uint32_t n_max)
{
    const uint32_t block = kvl_dtype_about(dtype)->block_weights;
    return block * (1 + kvl_test_below(random, n_max / block));
}

static inline float *test_floats(size_t n)
{
    float *floats = kvl_alloc(n * sizeof(float));
    assert_non_null(floats);
    return floats;
}

#endif /* KVL_COMPUTE_WEIGHTS_H */
