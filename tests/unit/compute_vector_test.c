/* compute: normalisation, gate, exponential and the backend's life, in every variant. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "compute/cpu/backend_cpu.h"
#include "compute/reference.h"
#include "compute_weights.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

enum { WIDTH_MAX = 1100, ROWS_MAX = 40 };

/* Half the distance between 1 and the next float: the relative error of one rounding. */
static const double one_rounding = 0.5 * (double)FLT_EPSILON;

static kvl_pool *pool;
static kvl_backend *backends[N_TEST_VARIANTS];

static int set_up(void **state)
{
    (void)state;
    pool = test_pool(2);
    for (size_t v = 0; v < N_TEST_VARIANTS; v++) backends[v] = test_backend(pool, test_variants[v]);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    for (size_t v = 0; v < N_TEST_VARIANTS; v++)
        if (backends[v] != NULL) backends[v]->ops->destroy(backends[v]);
    kvl_pool_destroy(pool);
    return 0;
}

/* The sum of squares has only positive terms: a relative error of one rounding a step (two in the
 * portable twin). The root halves it; division, root, inverse and two products add five. */
static void test_rms_norm(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 20; round++) {
        const uint32_t width = 1 + kvl_test_below(&random, WIDTH_MAX);
        const uint32_t n_rows = 1 + kvl_test_below(&random, ROWS_MAX);
        const size_t n = (size_t)n_rows * width;
        float *x = test_floats(n);
        float *weight = test_floats(width);
        float *y = test_floats(n);
        float *alone = test_floats(width);
        double *expected = kvl_alloc_zero(n, sizeof(double));
        assert_non_null(expected);
        kvl_test_fill_normal(&random, x, n);
        kvl_test_fill_normal(&random, weight, width);
        kvl_reference_rms_norm(n_rows, width, x, weight, (double)1e-5F, expected);
        for (size_t v = 0; v < N_TEST_VARIANTS; v++) {
            if (backends[v] == NULL) continue;
            const double bound = (width / test_lanes(test_variants[v]) + 16.0) * one_rounding;
            backends[v]->ops->rms_norm(backends[v], n_rows, width, x, weight, 1e-5F, y);
            for (size_t i = 0; i < n; i++)
                assert_true(fabs((double)y[i] - expected[i]) <= bound * fabs(expected[i]));
            /* In place, and any row by itself: the same bits. */
            const size_t at = (size_t)kvl_test_below(&random, n_rows) * width;
            memcpy(alone, x + at, width * sizeof(float));
            backends[v]->ops->rms_norm(backends[v], 1, width, alone, weight, 1e-5F, alone);
            assert_memory_equal(alone, y + at, width * sizeof(float));
        }
        kvl_free(x);
        kvl_free(weight);
        kvl_free(y);
        kvl_free(alone);
        kvl_free(expected);
    }
}

/* Two units in the last place for the exponential, and three roundings after it. */
static void test_silu_multiply(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 20; round++) {
        const size_t n = 1 + kvl_test_below(&random, 20000);
        float *gate = test_floats(n);
        float *up = test_floats(n);
        float *out = test_floats(n);
        double *expected = kvl_alloc_zero(n, sizeof(double));
        assert_non_null(expected);
        kvl_test_fill_normal(&random, gate, n);
        kvl_test_fill_normal(&random, up, n);
        for (size_t i = 0; i < n; i++) gate[i] *= 12.0F;
        kvl_reference_silu_multiply(n, gate, up, expected);
        for (size_t v = 0; v < N_TEST_VARIANTS; v++) {
            if (backends[v] == NULL) continue;
            memcpy(out, gate, n * sizeof(float));
            backends[v]->ops->silu_multiply(backends[v], n, out, up);
            for (size_t i = 0; i < n; i++)
                assert_true(fabs((double)out[i] - expected[i]) <=
                            8 * one_rounding * fabs(expected[i]) + (double)FLT_MIN);
            /* From any place on, the same bits. */
            const size_t first = kvl_test_below(&random, (uint32_t)n);
            const size_t n_some = 1 + kvl_test_below(&random, (uint32_t)(n - first));
            float *some = test_floats(n_some);
            memcpy(some, gate + first, n_some * sizeof(float));
            backends[v]->ops->silu_multiply(backends[v], n_some, some, up + first);
            assert_memory_equal(some, out + first, n_some * sizeof(float));
            kvl_free(some);
        }
        kvl_free(gate);
        kvl_free(up);
        kvl_free(out);
        kvl_free(expected);
    }
}

/* Distance of two floats that are not negative, in units in the last place. */
static uint32_t distance(float a, float b)
{
    uint32_t bits_a;
    uint32_t bits_b;
    memcpy(&bits_a, &a, sizeof a);
    memcpy(&bits_b, &b, sizeof b);
    return bits_a > bits_b ? bits_a - bits_b : bits_b - bits_a;
}

/* Over the whole range, steps of about 2^-9, also where results are subnormal or infinite. */
static void test_exponential_is_within_two_units(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    enum { N = 101 };
    for (size_t v = 0; v < N_TEST_VARIANTS; v++) {
        if (backends[v] == NULL) continue;
        const kvl_cpu_vector_kernels *kernels = kvl_backend_cpu_of(backends[v])->kernels.vector;
        for (int step = 0; step < 1000; step++) {
            float x[N];
            float out[N];
            for (int i = 0; i < N; i++)
                x[i] = -110.0F + 0.2F * ((float)step + kvl_random_uniform(&random));
            kernels->exp(N, x, out);
            for (int i = 0; i < N; i++) {
                const float expected = (float)exp((double)x[i]);
                if (distance(out[i], expected) > 2)
                    fail_msg("%s: exp(%.9g) is %.9g, not %.9g",
                             kvl_cpu_variant_name(test_variants[v]), (double)x[i], (double)out[i],
                             (double)expected);
            }
        }
        float special[5] = {-INFINITY, INFINITY, 0.0F, -0.0F, NAN};
        kernels->exp(5, special, special);
        assert_true(special[0] == 0.0F);
        assert_true(isinf(special[1]));
        assert_true(special[2] == 1.0F && special[3] == 1.0F);
        assert_true(isnan(special[4]));
    }
}

static void test_rotate_shares_out_rows(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    enum { HEAD_DIM = 16, HEADS = 3, POSITIONS = 50, N = ROWS_MAX * HEADS * HEAD_DIM };
    double frequencies[HEAD_DIM / 2];
    for (int j = 0; j < HEAD_DIM / 2; j++) frequencies[j] = pow(100.0, -j / 8.0);
    kvl_rotation *rotation = NULL;
    assert_int_equal(
        kvl_rotation_create(frequencies, HEAD_DIM, POSITIONS, KVL_PAIRS_HALVES, &rotation, NULL),
        KVL_OK);
    uint32_t positions[ROWS_MAX];
    float rows[N];
    float shared[N];
    for (int r = 0; r < ROWS_MAX; r++) positions[r] = kvl_test_below(&random, POSITIONS);
    kvl_test_fill_uniform(&random, rows, N);
    memcpy(shared, rows, sizeof rows);
    kvl_rotate_rows(rotation, ROWS_MAX, positions, HEADS, HEAD_DIM, (size_t)HEADS * HEAD_DIM, false,
                    rows);
    backends[0]->ops->rotate(backends[0], rotation, ROWS_MAX, positions, HEADS, HEAD_DIM, shared);
    assert_memory_equal(shared, rows, sizeof rows);
    kvl_rotation_destroy(rotation);
}

/* ---- life and choice ---- */

static void test_device_memory(void **state)
{
    (void)state;
    kvl_backend *backend = backends[0];
    uint8_t *memory = backend->ops->memory_create(backend, 1000);
    assert_non_null(memory);
    assert_int_equal((uintptr_t)memory % KVL_ALIGNMENT, 0);
    for (int i = 0; i < 1000; i++) assert_int_equal(memory[i], 0);
    backend->ops->memory_destroy(backend, memory);
    backend->ops->memory_destroy(backend, NULL);
    backend->ops->synchronize(backend);
    kvl_alloc_fail_after(0);
    assert_null(backend->ops->memory_create(backend, 1000));
    kvl_alloc_fail_after(-1);
    assert_string_equal(backend->ops->name, "cpu");
}

static void test_creation_survives_missing_memory(void **state)
{
    (void)state;
    const int64_t before = kvl_alloc_live();
    kvl_backend *backend = NULL;
    kvl_status status = KVL_ERR_NO_MEMORY;
    for (int64_t n = 0; status != KVL_OK; n++) {
        kvl_error error;
        kvl_alloc_fail_after(n);
        status = kvl_backend_cpu_create(pool, KVL_CPU_PORTABLE, &backend, &error);
        kvl_alloc_fail_after(-1);
        if (status == KVL_OK) break;
        assert_int_equal(status, KVL_ERR_NO_MEMORY);
        assert_null(backend);
        assert_int_equal(kvl_alloc_live(), before);
    }
    backend->ops->destroy(backend);
    assert_int_equal(kvl_alloc_live(), before);
}

static kvl_cpu_variant best_variant(void)
{
    kvl_cpu_variant best = KVL_CPU_PORTABLE;
    for (size_t v = 0; v < N_TEST_VARIANTS; v++)
        if (kvl_cpu_variant_runs(test_variants[v])) best = test_variants[v];
    return best;
}

static void test_environment_chooses_the_variant(void **state)
{
    (void)state;
    kvl_cpu_kernels kernels;
    kvl_error error;
    assert_int_equal(unsetenv("KVLOOM_CPU"), 0);
    assert_int_equal(kvl_cpu_kernels_choose(KVL_CPU_BEST, &kernels, &error), KVL_OK);
    assert_int_equal(kernels.variant, best_variant());
    for (size_t v = 0; v < N_TEST_VARIANTS; v++) {
        const kvl_cpu_variant variant = test_variants[v];
        assert_int_equal(setenv("KVLOOM_CPU", kvl_cpu_variant_name(variant), 1), 0);
        const kvl_status status = kvl_cpu_kernels_choose(KVL_CPU_BEST, &kernels, &error);
        if (kvl_cpu_variant_runs(variant)) {
            assert_int_equal(status, KVL_OK);
            assert_int_equal(kernels.variant, variant);
        } else {
            assert_int_equal(status, KVL_ERR_UNSUPPORTED);
            assert_non_null(strstr(error.text, kvl_cpu_variant_name(variant)));
        }
        /* A variant asked for by name is what one gets, whatever the environment says. */
        assert_int_equal(kvl_cpu_kernels_choose(KVL_CPU_PORTABLE, &kernels, &error), KVL_OK);
        assert_int_equal(kernels.variant, KVL_CPU_PORTABLE);
    }
    assert_int_equal(setenv("KVLOOM_CPU", "mmx", 1), 0);
    assert_int_equal(kvl_cpu_kernels_choose(KVL_CPU_BEST, &kernels, &error), KVL_ERR_INVALID);
    assert_non_null(strstr(error.text, "mmx"));
    assert_int_equal(setenv("KVLOOM_CPU", "", 1), 0);
    assert_int_equal(kvl_cpu_kernels_choose(KVL_CPU_BEST, &kernels, &error), KVL_OK);
    assert_int_equal(kernels.variant, best_variant());
    assert_int_equal(unsetenv("KVLOOM_CPU"), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rms_norm),
        cmocka_unit_test(test_silu_multiply),
        cmocka_unit_test(test_exponential_is_within_two_units),
        cmocka_unit_test(test_rotate_shares_out_rows),
        cmocka_unit_test(test_device_memory),
        cmocka_unit_test(test_creation_survives_missing_memory),
        cmocka_unit_test(test_environment_chooses_the_variant),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
