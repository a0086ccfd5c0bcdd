/* segment/codec: every format gives back what its rounding promises, in every shape and for every
 * range of tokens; the processor's conversions and ours give the same bits.
 * With the argument "bench", prints how fast blocks are encoded and decoded. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/clock.h"
#include "segment/codec.h"
#include "segment/codec_rows.h"
#include "test_random.h"

#include <float.h>
#include <math.h>
#include <stdio.h>

static const kvl_kv_dtype DTYPES[] = {KVL_KV_F32, KVL_KV_F16, KVL_KV_BF16, KVL_KV_INT8};
enum { N_DTYPES = sizeof DTYPES / sizeof *DTYPES };

static float float_of(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

static uint32_t bits_of(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

/* The value of a float16 by its definition, IEEE 754-2008, 3.4. */
static double f16_value(uint16_t half)
{
    const int exponent = half >> 10 & 0x1f;
    const double mantissa = half & 0x3ff;
    const double sign = half & 0x8000 ? -1.0 : 1.0;
    if (exponent == 0x1f) return mantissa == 0 ? sign * (double)INFINITY : (double)NAN;
    if (exponent == 0) return sign * ldexp(mantissa, -24);
    return sign * ldexp(mantissa + 1024.0, exponent - 25);
}

static void test_f16_widens_exactly(void **state)
{
    (void)state;
    for (uint32_t half = 0; half <= 0xffff; half++) {
        const uint16_t in = (uint16_t)half;
        float portable;
        float best;
        kvl_codec_rows_portable()->f32_from_f16(1, &in, &portable);
        kvl_f32_from_f16(1, &in, &best);
        assert_int_equal(bits_of(portable), bits_of(best));
        const double expected = f16_value(in);
        if (isnan(expected)) {
            assert_true(isnan(portable));
        } else {
            assert_true((double)portable == expected);
            assert_int_equal(signbit(portable) != 0, in >> 15);
        }
    }
}

/* Between any two neighbours: below the middle goes down, above goes up, the middle to the even. */
static void test_f16_rounds_to_nearest_even(void **state)
{
    (void)state;
    for (uint32_t half = 0; half < 0x7c00; half++) {
        const uint16_t low = (uint16_t)half;
        const uint16_t high = (uint16_t)(half + 1);
        const double high_value = high == 0x7c00 ? 65536.0 : f16_value(high);
        const float middle = (float)((f16_value(low) + high_value) / 2);
        const float in[3] = {nextafterf(middle, 0), middle, nextafterf(middle, INFINITY)};
        const uint16_t expected[3] = {low, low % 2 == 0 ? low : high, high};
        for (int i = 0; i < 3; i++) {
            const float negative = -in[i];
            uint16_t out;
            kvl_codec_rows_portable()->f16_from_f32(1, &in[i], &out);
            assert_int_equal(out, expected[i]);
            kvl_codec_rows_portable()->f16_from_f32(1, &negative, &out);
            assert_int_equal(out, expected[i] | 0x8000);
        }
    }
}

static void test_bf16_rounds_to_nearest_even(void **state)
{
    (void)state;
    for (uint32_t high = 0; high < 0x7f80; high++) {
        const uint32_t middle = high << 16 | 0x8000;
        const uint32_t in[3] = {middle - 1, middle, middle + 1};
        const uint32_t expected[3] = {high, high + (high & 1), high + 1};
        for (int i = 0; i < 3; i++) {
            const float number = float_of(in[i]);
            uint16_t out;
            kvl_codec_rows_portable()->bf16_from_f32(1, &number, &out);
            assert_int_equal(out, expected[i]);
        }
    }
    const float nan = float_of(0x7f800001); /* cut off, its mantissa would be that of infinity */
    uint16_t out;
    kvl_codec_rows_portable()->bf16_from_f32(1, &nan, &out);
    assert_int_equal(out, 0x7fc0);
}

/* Any bits at all: half of them small enough for subnormal float16, infinities and NaN among
 * them. */
static float any_float(kvl_random *random)
{
    const uint32_t bits = (uint32_t)kvl_random_next(random);
    switch (kvl_test_below(random, 4)) {
    case 0: return float_of(bits);
    case 1: return float_of((bits & 0x80ffffff) | 0x33000000 | (bits & 0x7000000));
    case 2: return float_of((bits & 0x807fffff) | 0x7f800000);
    default: return float_of((bits & 0x807fffff) | (102 + kvl_test_below(random, 60)) << 23);
    }
}

static void test_twins_give_the_same_bits(void **state)
{
    (void)state;
    const kvl_codec_rows *plain = kvl_codec_rows_portable();
    const kvl_codec_rows *fast = kvl_codec_rows_avx2();
    if (fast == NULL) skip();
    enum { N_MAX = 130 };
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 5000; round++) {
        const size_t n = kvl_test_below(&random, N_MAX + 1);
        float in[N_MAX];
        for (size_t i = 0; i < n; i++) in[i] = any_float(&random);
        uint16_t a[N_MAX], b[N_MAX];
        float wide_a[N_MAX], wide_b[N_MAX];
        int8_t steps_a[N_MAX], steps_b[N_MAX];
        plain->f16_from_f32(n, in, a);
        fast->f16_from_f32(n, in, b);
        assert_memory_equal(a, b, n * sizeof *a);
        plain->f32_from_f16(n, a, wide_a);
        fast->f32_from_f16(n, a, wide_b);
        assert_memory_equal(wide_a, wide_b, n * sizeof *wide_a);
        plain->bf16_from_f32(n, in, a);
        fast->bf16_from_f32(n, in, b);
        assert_memory_equal(a, b, n * sizeof *a);
        plain->f32_from_bf16(n, a, wide_a);
        fast->f32_from_bf16(n, a, wide_b);
        assert_memory_equal(wide_a, wide_b, n * sizeof *wide_a);
        assert_int_equal(plain->magnitude_max(n, in), fast->magnitude_max(n, in));
        const float inverse = ldexpf(kvl_random_uniform(&random), (int)kvl_test_below(&random, 30));
        plain->int8_from_f32(n, in, inverse, steps_a);
        fast->int8_from_f32(n, in, inverse, steps_b);
        assert_memory_equal(steps_a, steps_b, n);
        plain->f32_from_int8(n, steps_a, inverse, wide_a);
        fast->f32_from_int8(n, steps_a, inverse, wide_b);
        assert_memory_equal(wide_a, wide_b, n * sizeof *wide_a);
    }
}

static float largest_of(const float *numbers, size_t n)
{
    float largest = 0;
    for (size_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(numbers[i]));
    return largest;
}

/* How far a number may be off after one rounding; `group` is its int8 group. Half a unit in the
 * last place: 2^-11 relative and 2^-25 absolute for float16, 2^-8 for bfloat16. The int8 scale is
 * at most one float16 step above max / 127, and a number at most half a scale off, computed in
 * float. */
static double error_bound(kvl_kv_dtype dtype, const float *group, size_t dim, float number)
{
    switch (dtype) {
    case KVL_KV_F32: return 0;
    case KVL_KV_F16: return fmax(fabs((double)number) * 0x1p-11, 0x1p-25);
    case KVL_KV_BF16: return fabs((double)number) * 0x1p-8;
    case KVL_KV_INT8: {
        const double step = (double)largest_of(group, dim) / 127;
        const double scale = step * (1 + 0x1p-10) + 0x1p-24;
        return scale / 2 + 127 * scale * 4 * (double)FLT_EPSILON;
    }
    }
    return 0;
}

typedef struct sample {
    uint32_t n_heads, n_tokens, dim;
    size_t n;
    float *keys, *values, *keys_back, *values_back;
    uint64_t block_bytes;
    uint8_t *block;
} sample;

static sample sample_make(kvl_random *random, kvl_kv_dtype dtype)
{
    sample s = {.n_heads = 1 + kvl_test_below(random, 4),
                .n_tokens = 1 + kvl_test_below(random, 40),
                .dim = 1 + kvl_test_below(random, 80)};
    s.n = (size_t)s.n_heads * s.n_tokens * s.dim;
    s.keys = kvl_alloc(s.n * sizeof(float));
    s.values = kvl_alloc(s.n * sizeof(float));
    s.keys_back = kvl_alloc(s.n * sizeof(float));
    s.values_back = kvl_alloc(s.n * sizeof(float));
    kvl_test_fill_normal(random, s.keys, s.n);
    kvl_test_fill_normal(random, s.values, s.n);
    const float size = ldexpf(1, (int)kvl_test_below(random, 20) - 12);
    for (size_t i = 0; i < s.n; i++) s.keys[i] *= size;
    assert_true(kvl_segment_block_bytes(dtype, s.n_heads, s.n_tokens, s.dim, &s.block_bytes));
    s.block = kvl_alloc_aligned(s.block_bytes + 1);
    s.block[s.block_bytes] = 0xa5;
    return s;
}

static void sample_end(sample *s)
{
    assert_int_equal(s->block[s->block_bytes], 0xa5);
    kvl_free(s->keys);
    kvl_free(s->values);
    kvl_free(s->keys_back);
    kvl_free(s->values_back);
    kvl_free(s->block);
}

static void assert_near(kvl_kv_dtype dtype, const float *expected, const float *actual, size_t dim,
                        size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const double bound = error_bound(dtype, expected + i / dim * dim, dim, expected[i]);
        if (fabs((double)expected[i] - (double)actual[i]) <= bound) continue;
        fail_msg("dtype %d, number %zu: %.9g came back as %.9g, bound %.3g", (int)dtype, i,
                 (double)expected[i], (double)actual[i], bound);
    }
}

static void test_every_format_comes_back_within_its_rounding(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 400; round++) {
        const kvl_kv_dtype dtype = DTYPES[round % N_DTYPES];
        sample s = sample_make(&random, dtype);
        kvl_segment_encode_block(dtype, s.n_heads, s.n_tokens, s.dim, s.keys, s.values, s.block);
        kvl_segment_decode_block(dtype, s.n_heads, s.n_tokens, s.dim, s.block, 0, s.n_tokens,
                                 s.keys_back, s.values_back);
        assert_near(dtype, s.keys, s.keys_back, s.dim, s.n);
        assert_near(dtype, s.values, s.values_back, s.dim, s.n);
        sample_end(&s);
    }
}

static void test_a_range_of_tokens_is_the_same_as_part_of_all(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 400; round++) {
        const kvl_kv_dtype dtype = DTYPES[round % N_DTYPES];
        sample s = sample_make(&random, dtype);
        kvl_segment_encode_block(dtype, s.n_heads, s.n_tokens, s.dim, s.keys, s.values, s.block);
        kvl_segment_decode_block(dtype, s.n_heads, s.n_tokens, s.dim, s.block, 0, s.n_tokens,
                                 s.keys, s.values);
        const uint32_t first = kvl_test_below(&random, s.n_tokens + 1);
        const uint32_t n = kvl_test_below(&random, s.n_tokens - first + 1);
        const size_t row = (size_t)s.n_heads * s.dim;
        kvl_segment_decode_block(dtype, s.n_heads, s.n_tokens, s.dim, s.block, first, n,
                                 s.keys_back, NULL);
        kvl_segment_decode_block(dtype, s.n_heads, s.n_tokens, s.dim, s.block, first, n, NULL,
                                 s.values_back);
        if (n > 0) {
            assert_memory_equal(s.keys_back, s.keys + first * row, n * row * sizeof(float));
            assert_memory_equal(s.values_back, s.values + first * row, n * row * sizeof(float));
        }
        sample_end(&s);
    }
}

/* The place of every number, as the format promises it to other programs. */
static void test_block_is_head_major(void **state)
{
    (void)state;
    enum { HEADS = 2, TOKENS = 3, DIM = 4, N = HEADS * TOKENS * DIM };
    float keys[N], values[N], block[2 * N];
    for (int i = 0; i < N; i++) {
        keys[i] = (float)i;
        values[i] = (float)(100 + i);
    }
    kvl_segment_encode_block(KVL_KV_F32, HEADS, TOKENS, DIM, keys, values, block);
    for (int h = 0; h < HEADS; h++) {
        for (int t = 0; t < TOKENS; t++) {
            for (int d = 0; d < DIM; d++) {
                const int from = (t * HEADS + h) * DIM + d;
                const int to = (h * TOKENS + t) * DIM + d;
                assert_true(block[to] == keys[from]);
                assert_true(block[N + to] == values[from]);
            }
        }
    }
}

static void test_int8_scales_stand_behind_both(void **state)
{
    (void)state;
    /* Two groups of one number: 254 = 127 * 2 and 127 * 0.5; values 127 * 4 and zero. */
    const float keys[2] = {254.0F, -63.5F};
    const float values[2] = {508.0F, 0.0F};
    _Alignas(2) uint8_t block[4 + 8];
    uint64_t n_bytes = 0;
    assert_true(kvl_segment_block_bytes(KVL_KV_INT8, 2, 1, 1, &n_bytes));
    assert_int_equal(n_bytes, sizeof block);
    kvl_segment_encode_block(KVL_KV_INT8, 2, 1, 1, keys, values, block);
    const uint8_t expected[12] = {127, 0x81, 127, 0, 0x00, 0x40, 0x00, 0x38, 0x00, 0x44, 0, 0};
    assert_memory_equal(block, expected, sizeof expected);
}

/* The scale in the block is the smallest that no number of the group needs more than 127 of. */
static void test_int8_scale_is_the_smallest_that_suffices(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 20000; round++) {
        const float key =
            ldexpf(1 + kvl_random_uniform(&random), (int)kvl_test_below(&random, 36) - 20);
        const float value = 0;
        _Alignas(2) uint8_t block[6];
        kvl_segment_encode_block(KVL_KV_INT8, 1, 1, 1, &key, &value, block);
        uint16_t scale;
        memcpy(&scale, block + 2, sizeof scale);
        assert_true(f16_value(scale) * 127 >= (double)key);
        assert_true(f16_value((uint16_t)(scale - 1)) * 127 < (double)key);
    }
}

static void test_int8_of_hostile_numbers(void **state)
{
    (void)state;
    enum { DIM = 6 };
    const float cases[][DIM] = {
        {0, -0.0F, 0, 0, 0, 0},
        {FLT_TRUE_MIN, -FLT_TRUE_MIN, FLT_MIN, 0, 0, 0}, /* scale would be subnormal or zero */
        {1e-7F, -2e-7F, 3e-8F, 0, 0, 0},
        {NAN, 1, -2, NAN, 0.5F, 0},
        {INFINITY, 1, -2, -INFINITY, 0.5F, 0},
        {INFINITY, NAN, 0, -INFINITY, 0, 0},
        {FLT_MAX, -FLT_MAX, 1, 0, 1e6F, -1e6F}, /* scale is past float16 */
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        const float zeros[DIM] = {0};
        float back[DIM], values_back[DIM];
        _Alignas(2) uint8_t block[2 * DIM + 4];
        kvl_segment_encode_block(KVL_KV_INT8, 1, 1, DIM, cases[c], zeros, block);
        kvl_segment_decode_block(KVL_KV_INT8, 1, 1, DIM, block, 0, 1, back, values_back);
        assert_memory_equal(values_back, zeros, sizeof zeros);
        float largest = 0;
        for (size_t i = 0; i < DIM; i++) {
            if (isfinite(cases[c][i])) largest = fmaxf(largest, fabsf(cases[c][i]));
        }
        for (size_t i = 0; i < DIM; i++) {
            const float number = cases[c][i];
            assert_true(isfinite(back[i]));
            if (isnan(number)) {
                assert_true(back[i] == 0.0F);
            } else if (isinf(number)) {
                assert_true(largest == 0.0F || signbit(back[i]) == signbit(number));
                assert_true(fabsf(back[i]) >= largest * 0.999F);
            } else if (fabsf(number) > 127.0F * 65504.0F) {
                assert_true(fabsf(back[i]) == 127.0F * 65504.0F);
            } else {
                const double scale = fmin((double)largest / 127 * (1 + 0x1p-10) + 0x1p-24, 65504.0);
                assert_true(fabs((double)back[i] - (double)number) <= scale * 0.50001);
            }
        }
    }
}

static void test_block_bytes(void **state)
{
    (void)state;
    uint64_t n_bytes = 7;
    assert_true(kvl_segment_block_bytes(KVL_KV_F32, 3, 1000, 64, &n_bytes));
    assert_int_equal(n_bytes, 2 * 3 * 1000 * 64 * 4);
    assert_true(kvl_segment_block_bytes(KVL_KV_BF16, 3, 1000, 64, &n_bytes));
    assert_int_equal(n_bytes, 2 * 3 * 1000 * 64 * 2);
    assert_true(kvl_segment_block_bytes(KVL_KV_INT8, 3, 1000, 64, &n_bytes));
    assert_int_equal(n_bytes, 2 * 3 * 1000 * (64 + 2));
    n_bytes = 7;
    assert_false(kvl_segment_block_bytes((kvl_kv_dtype)0, 3, 1000, 64, &n_bytes));
    assert_false(kvl_segment_block_bytes((kvl_kv_dtype)5, 3, 1000, 64, &n_bytes));
    assert_false(kvl_segment_block_bytes(KVL_KV_F32, UINT32_MAX, UINT32_MAX, 1, &n_bytes));
    assert_false(kvl_segment_block_bytes(KVL_KV_INT8, UINT32_MAX, UINT32_MAX, 1, &n_bytes));
    assert_false(kvl_segment_block_bytes(KVL_KV_INT8, 1u << 31, 1u << 31, 2, &n_bytes));
    assert_int_equal(n_bytes, 7);
}

/* GB/s of the float32 side, 1,000 tokens of 30 layers with 3 heads of 64, best of 30. */
static int bench(void)
{
    enum { LAYERS = 30, HEADS = 3, TOKENS = 1000, DIM = 64, N = HEADS * TOKENS * DIM, ROUNDS = 30 };
    float *numbers = kvl_alloc((size_t)LAYERS * 2 * N * sizeof(float));
    uint8_t *blocks = kvl_alloc_aligned((size_t)LAYERS * 2 * N * sizeof(float));
    if (numbers == NULL || blocks == NULL) return 1;
    kvl_random random = {1};
    for (size_t i = 0; i < (size_t)LAYERS * 2 * N; i++) numbers[i] = kvl_random_uniform(&random);
    const char *names[N_DTYPES] = {"f32", "f16", "bf16", "int8"};
    for (int d = 0; d < N_DTYPES; d++) {
        int64_t encode_ns = INT64_MAX, decode_ns = INT64_MAX;
        uint64_t stride = 0;
        if (!kvl_segment_block_bytes(DTYPES[d], HEADS, TOKENS, DIM, &stride)) return 1;
        for (int round = 0; round < ROUNDS; round++) {
            const int64_t start = kvl_clock_now(kvl_clock_system());
            for (size_t l = 0; l < LAYERS; l++)
                kvl_segment_encode_block(DTYPES[d], HEADS, TOKENS, DIM, numbers + 2 * l * N,
                                         numbers + (2 * l + 1) * N, blocks + l * stride);
            const int64_t middle = kvl_clock_now(kvl_clock_system());
            for (size_t l = 0; l < LAYERS; l++)
                kvl_segment_decode_block(DTYPES[d], HEADS, TOKENS, DIM, blocks + l * stride, 0,
                                         TOKENS, numbers + 2 * l * N, numbers + (2 * l + 1) * N);
            const int64_t end = kvl_clock_now(kvl_clock_system());
            if (middle - start < encode_ns) encode_ns = middle - start;
            if (end - middle < decode_ns) decode_ns = end - middle;
        }
        const double bytes = (double)LAYERS * 2 * N * sizeof(float);
        (void)printf("%s: encode %.2f ms, %.1f GB/s; decode %.2f ms, %.1f GB/s\n", names[d],
                     kvl_ns_to_ms(encode_ns), bytes / (double)encode_ns, kvl_ns_to_ms(decode_ns),
                     bytes / (double)decode_ns);
    }
    kvl_free(numbers);
    kvl_free(blocks);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "bench") == 0) return bench();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_f16_widens_exactly),
        cmocka_unit_test(test_f16_rounds_to_nearest_even),
        cmocka_unit_test(test_bf16_rounds_to_nearest_even),
        cmocka_unit_test(test_twins_give_the_same_bits),
        cmocka_unit_test(test_every_format_comes_back_within_its_rounding),
        cmocka_unit_test(test_a_range_of_tokens_is_the_same_as_part_of_all),
        cmocka_unit_test(test_block_is_head_major),
        cmocka_unit_test(test_int8_scales_stand_behind_both),
        cmocka_unit_test(test_int8_scale_is_the_smallest_that_suffices),
        cmocka_unit_test(test_int8_of_hostile_numbers),
        cmocka_unit_test(test_block_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
