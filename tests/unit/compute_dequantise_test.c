/* compute: weights come out of their blocks exactly as GGUF defines: the reference against blocks
 * that another implementation expanded, and every variant against the reference, bit for bit. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "compute/cpu/kernels.h"
#include "compute/reference.h"
#include "compute_golden.h"
#include "compute_weights.h"

#include <math.h>

enum { WEIGHTS_MAX = 2048 };

static uint64_t fnv1a(const void *bytes, size_t n_bytes)
{
    uint64_t digest = UINT64_C(0xCBF29CE484222325);
    for (size_t i = 0; i < n_bytes; i++)
        digest = (digest ^ ((const uint8_t *)bytes)[i]) * UINT64_C(0x100000001B3);
    return digest;
}

static bool choose(kvl_cpu_variant variant, kvl_cpu_kernels *kernels)
{
    if (!kvl_cpu_variant_runs(variant)) return false;
    assert_int_equal(kvl_cpu_kernels_choose(variant, kernels, NULL), KVL_OK);
    return true;
}

static void test_golden_blocks(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof golden_blocks / sizeof *golden_blocks; i++) {
        const size_t n = golden_blocks[i].n_weights;
        double exact[WEIGHTS_MAX];
        float rounded[WEIGHTS_MAX];
        assert_true(n <= WEIGHTS_MAX);
        kvl_reference_dequantise(golden_blocks[i].dtype, n, golden_blocks[i].bytes, exact);
        for (size_t k = 0; k < n; k++) rounded[k] = (float)exact[k];
        assert_int_equal(fnv1a(rounded, n * sizeof(float)), golden_blocks[i].digest);
        for (size_t v = 0; v < N_TEST_VARIANTS; v++) {
            kvl_cpu_kernels kernels;
            if (!choose(test_variants[v], &kernels)) continue;
            kernels.matmul->dequantise[golden_blocks[i].dtype](n, golden_blocks[i].bytes, rounded);
            assert_int_equal(fnv1a(rounded, n * sizeof(float)), golden_blocks[i].digest);
        }
    }
}

/* At most one rounding: the float nearest to the exact weight. */
static void test_every_variant_rounds_the_exact_weight_once(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int dtype = 0; dtype < KVL_DTYPE_COUNT; dtype++) {
        for (int round = 0; round < 30; round++) {
            const uint32_t n = test_inputs(&random, (kvl_dtype)dtype, WEIGHTS_MAX);
            const kvl_matrix matrix = test_matrix(&random, (kvl_dtype)dtype, 1, n);
            double exact[WEIGHTS_MAX];
            float got[WEIGHTS_MAX + 1];
            kvl_reference_dequantise((kvl_dtype)dtype, n, matrix.data, exact);
            for (size_t v = 0; v < N_TEST_VARIANTS; v++) {
                kvl_cpu_kernels kernels;
                if (!choose(test_variants[v], &kernels)) continue;
                got[n] = 12345.0F;
                kernels.matmul->dequantise[dtype](n, matrix.data, got);
                for (uint32_t k = 0; k < n; k++) {
                    if (got[k] != (float)exact[k])
                        fail_msg("%s %s: weight %u of %u is %.9g, not %.9g",
                                 kvl_cpu_variant_name(test_variants[v]),
                                 kvl_dtype_about((kvl_dtype)dtype)->name, k, n, (double)got[k],
                                 exact[k]);
                }
                assert_true(got[n] == 12345.0F);
            }
            kvl_free((void *)(uintptr_t)matrix.data);
        }
    }
}

/* All 65,536 halves, infinities included; NaN stays NaN. */
static void test_all_halves(void **state)
{
    (void)state;
    for (size_t v = 0; v < N_TEST_VARIANTS; v++) {
        kvl_cpu_kernels kernels;
        if (!choose(test_variants[v], &kernels)) continue;
        for (uint32_t first = 0; first < 1U << 16; first += 64) {
            uint16_t halves[64];
            float got[64];
            double exact[64];
            for (uint32_t i = 0; i < 64; i++) halves[i] = (uint16_t)(first + i);
            kernels.matmul->dequantise[KVL_DTYPE_F16](64, halves, got);
            kvl_reference_dequantise(KVL_DTYPE_F16, 64, halves, exact);
            for (uint32_t i = 0; i < 64; i++) {
                assert_int_equal(isnan(got[i]), isnan(exact[i]));
                if (!isnan(exact[i])) assert_true((double)got[i] == exact[i]);
                assert_int_equal(signbit(got[i]) != 0, (first + i) >> 15);
            }
        }
    }
}

static void test_embed_takes_rows_of_the_table(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_pool *pool = test_pool(2);
    for (size_t v = 0; v < N_TEST_VARIANTS; v++) {
        kvl_backend *backend = test_backend(pool, test_variants[v]);
        if (backend == NULL) continue;
        for (int dtype = 0; dtype < KVL_DTYPE_COUNT; dtype++) {
            enum { N_IDS = 21, N_TABLE = 9 };
            const uint32_t width = kvl_dtype_about((kvl_dtype)dtype)->block_weights * 3;
            const kvl_matrix table = test_matrix(&random, (kvl_dtype)dtype, N_TABLE, width);
            uint32_t ids[N_IDS];
            float *out = test_floats((size_t)N_IDS * width);
            double *exact = kvl_alloc_zero(width, sizeof(double));
            assert_non_null(exact);
            for (uint32_t i = 0; i < N_IDS; i++) ids[i] = kvl_test_below(&random, N_TABLE);
            backend->ops->embed(backend, &table, N_IDS, ids, out);
            for (uint32_t i = 0; i < N_IDS; i++) {
                kvl_reference_dequantise(table.dtype, width,
                                         (const uint8_t *)table.data + ids[i] * table.row_bytes,
                                         exact);
                for (uint32_t d = 0; d < width; d++)
                    assert_true(out[(size_t)i * width + d] == (float)exact[d]);
            }
            kvl_free(exact);
            kvl_free(out);
            kvl_free((void *)(uintptr_t)table.data);
        }
        backend->ops->destroy(backend);
    }
    kvl_pool_destroy(pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_blocks),
        cmocka_unit_test(test_every_variant_rounds_the_exact_weight_once),
        cmocka_unit_test(test_all_halves),
        cmocka_unit_test(test_embed_takes_rows_of_the_table),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
