/* reuse/anchor_kernel: every variant that this processor runs against plain loops in double. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "reuse/anchor_kernel.h"
#include "segment/codec.h"
#include "test_random.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS_MAX = 5, GROUPS_MAX = 4, DIM_MAX = 80, NUMBERS_MAX = ROWS_MAX * GROUPS_MAX * DIM_MAX };

/* Stored rows, one byte off alignment as they may be in a mapped file, and what they mean. */
typedef struct stored {
    uint32_t n_rows, n_groups, dim;
    size_t n;
    kvl_anchor_rows rows;
    uint8_t bytes[4 * NUMBERS_MAX + 1];
    uint8_t scale_bytes[2 * ROWS_MAX * GROUPS_MAX + 1];
    double meant[NUMBERS_MAX];
    float x[NUMBERS_MAX];
    float weights[NUMBERS_MAX];
} stored;

static void fill(stored *s, kvl_random *random, kvl_kv_dtype dtype)
{
    s->n_rows = 1 + kvl_test_below(random, ROWS_MAX);
    s->n_groups = 1 + kvl_test_below(random, GROUPS_MAX);
    s->dim = 1 + kvl_test_below(random, DIM_MAX);
    s->n = (size_t)s->n_rows * s->n_groups * s->dim;
    s->rows = (kvl_anchor_rows){dtype, s->bytes + 1, s->scale_bytes + 1};
    for (size_t g = 0; g < (size_t)s->n_rows * s->n_groups; g++) {
        /* From subnormal float16 to hundreds. */
        const float scale = ldexpf(kvl_random_uniform(random), 8 - (int)kvl_test_below(random, 30));
        uint16_t half;
        float rounded;
        kvl_f16_from_f32(1, &scale, &half);
        kvl_f32_from_f16(1, &half, &rounded);
        memcpy(s->scale_bytes + 1 + 2 * g, &half, 2);
        for (size_t i = g * s->dim; i < (g + 1) * s->dim; i++) {
            if (dtype == KVL_KV_INT8) {
                s->bytes[1 + i] = (uint8_t)kvl_random_next(random);
                s->meant[i] = (double)rounded * (double)(int8_t)s->bytes[1 + i];
            } else {
                float number;
                kvl_test_fill_normal(random, &number, 1);
                memcpy(s->bytes + 1 + 4 * i, &number, 4);
                s->meant[i] = (double)number;
            }
        }
    }
    kvl_test_fill_normal(random, s->x, s->n);
    kvl_test_fill_uniform(random, s->weights, s->n);
}

static void check_distances(const kvl_anchor_kernels *kernels, const stored *s)
{
    const size_t width = (size_t)s->n_groups * s->dim;
    for (uint32_t r = 0; r < s->n_rows; r++) {
        const kvl_anchor_rows row = kvl_anchor_rows_from(&s->rows, r, s->n_groups, s->dim);
        const float *x = s->x + r * width;
        double squares = 0.0, absolutes = 0.0;
        float sums[NUMBERS_MAX] = {0};
        kvl_anchor_add_square_channels(kernels, &row, s->n_groups, s->dim, x, sums);
        for (size_t i = 0; i < width; i++) {
            const double e = (double)x[i] - s->meant[r * width + i];
            squares += e * e;
            absolutes += fabs(e);
            /* The product scale * q and the difference are rounded, relative to the larger. */
            const double size = fabs((double)x[i]) + fabs(s->meant[r * width + i]);
            assert_true(fabs((double)sums[i] - e * e) <= 4.0 * size * size * (double)FLT_EPSILON);
        }
        const double terms = 4.0 + (double)width; /* roundings of a term, and of the sum */
        double scale = 0.0, scale_1 = 0.0;
        for (size_t i = 0; i < width; i++) {
            const double size = fabs((double)x[i]) + fabs(s->meant[r * width + i]);
            scale += size * size;
            scale_1 += size;
        }
        const float got = kvl_anchor_squares(kernels, &row, s->n_groups, s->dim, x);
        assert_true(fabs((double)got - squares) <= terms * scale * (double)FLT_EPSILON);
        const float got_1 = kvl_anchor_absolutes(kernels, &row, s->n_groups, s->dim, x);
        assert_true(fabs((double)got_1 - absolutes) <= terms * scale_1 * (double)FLT_EPSILON);
    }
}

static void check_sums(const kvl_anchor_kernels *kernels, const stored *s)
{
    const size_t width = (size_t)s->n_groups * s->dim;
    float rows[NUMBERS_MAX], channels[NUMBERS_MAX + 1];
    memcpy(rows, s->x, s->n * sizeof *rows);
    memcpy(channels, s->x, s->n * sizeof *channels);
    channels[s->n] = 1234.5F; /* nothing is written behind the rows */
    kvl_anchor_add(kernels, &s->rows, s->n_rows, s->n_groups, s->dim, s->weights, rows);
    kvl_anchor_add_channels(kernels, &s->rows, s->n_rows, s->n_groups, s->dim, s->weights,
                            channels);
    for (size_t i = 0; i < s->n; i++) {
        const double x = (double)s->x[i];
        const double by_row = (double)s->weights[i / width] * s->meant[i];
        const double by_channel = (double)s->weights[i % width] * s->meant[i];
        const double bound = 4.0 * (double)FLT_EPSILON;
        assert_true(fabs((double)rows[i] - x - by_row) <= bound * (fabs(x) + fabs(by_row)));
        assert_true(fabs((double)channels[i] - x - by_channel) <=
                    bound * (fabs(x) + fabs(by_channel)));
    }
    assert_true(channels[s->n] == 1234.5F);
}

static void test_variants_agree_with_plain_loops(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    static const kvl_cpu_variant variants[] = {KVL_CPU_BEST, KVL_CPU_PORTABLE, KVL_CPU_AVX2,
                                               KVL_CPU_AVX512};
    stored *s = calloc(1, sizeof *s);
    assert_non_null(s);
    for (size_t v = 0; v < sizeof variants / sizeof *variants; v++) {
        const kvl_anchor_kernels *kernels = kvl_anchor_kernels_for(variants[v]);
        if (variants[v] == KVL_CPU_BEST || variants[v] == KVL_CPU_PORTABLE) {
            assert_non_null(kernels);
        }
        if (kernels == NULL) continue;
        for (int round = 0; round < 200; round++) {
            fill(s, &random, round % 4 == 0 ? KVL_KV_F32 : KVL_KV_INT8);
            check_distances(kernels, s);
            check_sums(kernels, s);
        }
    }
    free(s);
}

static void test_group_and_row_offsets(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    stored *s = calloc(1, sizeof *s);
    assert_non_null(s);
    const kvl_anchor_kernels *kernels = kvl_anchor_kernels_for(KVL_CPU_PORTABLE);
    for (int round = 0; round < 200; round++) {
        fill(s, &random, round % 2 == 0 ? KVL_KV_F32 : KVL_KV_INT8);
        const uint32_t row = kvl_test_below(&random, s->n_rows);
        const uint32_t group = kvl_test_below(&random, s->n_groups);
        const kvl_anchor_rows from = kvl_anchor_rows_from(&s->rows, row, s->n_groups, s->dim);
        const kvl_anchor_rows at = kvl_anchor_rows_group(&from, group, s->dim);
        float out[DIM_MAX] = {0};
        const float one = 1.0F;
        kvl_anchor_add(kernels, &at, 1, 1, s->dim, &one, out);
        for (uint32_t d = 0; d < s->dim; d++) {
            const double meant = s->meant[((size_t)row * s->n_groups + group) * s->dim + d];
            assert_true((double)out[d] == meant);
        }
    }
    free(s);
}

/* The difference of two floats in two floats gives the first one back, bit for bit. */
static void test_exact_sum_is_exact(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 100000; round++) {
        const float r =
            ldexpf(kvl_random_uniform(&random) - 0.5F, (int)kvl_test_below(&random, 60) - 30);
        const float b =
            ldexpf(kvl_random_uniform(&random) - 0.5F, (int)kvl_test_below(&random, 60) - 30);
        const float high = r - b;
        const float back = high - r;
        const float low = (r - (high - back)) - (b + back);
        float out = b;
        kvl_anchor_add_exact(1, (const uint8_t *)&high, (const uint8_t *)&low, &out);
        assert_true(out == r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_variants_agree_with_plain_loops),
        cmocka_unit_test(test_group_and_row_offsets),
        cmocka_unit_test(test_exact_sum_is_exact),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
