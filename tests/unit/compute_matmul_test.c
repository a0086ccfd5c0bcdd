/* compute/cpu matmul: every dtype and variant against the double-precision reference, and the
 * promise that a row's bits depend on nothing but the row and the weights. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "compute/cpu/kernels.h"
#include "compute/reference.h"
#include "compute_weights.h"

#include <float.h>
#include <math.h>

enum { INPUTS_MAX = 1800, OUTPUTS_MAX = 60, ROWS_MAX = 110 };

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

typedef struct product {
    kvl_matrix weights;
    uint32_t n_rows;
    float *x;
    float *bias;
    float *before; /* what y holds at first */
    bool with_bias;
    bool accumulate;
} product;

static product make_product(kvl_random *random, kvl_dtype dtype, uint32_t n_inputs,
                            uint32_t n_outputs, uint32_t n_rows)
{
    product p = {.weights = test_matrix(random, dtype, n_outputs, n_inputs),
                 .n_rows = n_rows,
                 .x = test_floats((size_t)n_rows * n_inputs),
                 .bias = test_floats(n_outputs),
                 .before = test_floats((size_t)n_rows * n_outputs),
                 .with_bias = kvl_test_below(random, 2) == 1,
                 .accumulate = kvl_test_below(random, 2) == 1};
    kvl_test_fill_normal(random, p.x, (size_t)n_rows * n_inputs);
    kvl_test_fill_normal(random, p.bias, n_outputs);
    kvl_test_fill_normal(random, p.before, (size_t)n_rows * n_outputs);
    return p;
}

static void end_product(product *p)
{
    kvl_free((void *)(uintptr_t)p->weights.data);
    kvl_free(p->x);
    kvl_free(p->bias);
    kvl_free(p->before);
}

/* y [n_rows][n_outputs] from the backend. */
static void run_product(kvl_backend *backend, const product *p, float *y)
{
    memcpy(y, p->before, (size_t)p->n_rows * p->weights.n_outputs * sizeof *y);
    const kvl_matmul_job job = {&p->weights, p->with_bias ? p->bias : NULL, y, p->accumulate};
    backend->ops->matmul(backend, &job, 1, p->n_rows, p->x);
}

/* Roundings on the longest way of a product to y: two for each fused step (the portable twin rounds
 * product and sum), one a level of the sum over lanes, one a run, and one each for the weight, the
 * bias and what y held; each relative to the sum of absolute values. */
static double roundings(const product *p, kvl_cpu_variant variant)
{
    const uint32_t lanes = test_lanes(variant);
    const uint32_t run = kvl_cpu_run_inputs(p->weights.n_inputs);
    return 2.0 * ((run + lanes - 1) / lanes) + log2(lanes) + p->weights.n_inputs / run + 4;
}

static void check_product(kvl_backend *backend, kvl_cpu_variant variant, const product *p)
{
    const size_t n = (size_t)p->n_rows * p->weights.n_outputs;
    float *y = test_floats(n);
    double *expected = kvl_alloc_zero(n, sizeof(double));
    double *magnitude = kvl_alloc_zero(n, sizeof(double));
    assert_non_null(expected);
    assert_non_null(magnitude);
    run_product(backend, p, y);
    assert_int_equal(kvl_reference_matmul(&p->weights, p->n_rows, p->x,
                                          p->with_bias ? p->bias : NULL, expected, magnitude),
                     KVL_OK);
    const double relative = roundings(p, variant) * 0.5 * (double)FLT_EPSILON;
    for (size_t i = 0; i < n; i++) {
        const double before = p->accumulate ? (double)p->before[i] : 0.0;
        const double bound = relative * (magnitude[i] + fabs(before));
        if (fabs((double)y[i] - (expected[i] + before)) > bound)
            fail_msg("%s %s: rows %u, %u -> %u, output %zu: %.9g, not %.9g (bound %.3g)",
                     kvl_cpu_variant_name(variant), kvl_dtype_about(p->weights.dtype)->name,
                     p->n_rows, p->weights.n_inputs, p->weights.n_outputs, i, (double)y[i],
                     expected[i] + before, bound);
    }
    kvl_free(y);
    kvl_free(expected);
    kvl_free(magnitude);
}

static void test_products_match_reference(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int dtype = 0; dtype < KVL_DTYPE_COUNT; dtype++) {
        for (int round = 0; round < 6; round++) {
            const uint32_t n_inputs = test_inputs(&random, (kvl_dtype)dtype, INPUTS_MAX);
            const uint32_t n_rows = 1 + kvl_test_below(&random, round < 3 ? 3 : 12);
            const uint32_t n_outputs = 1 + kvl_test_below(&random, OUTPUTS_MAX);
            product p = make_product(&random, (kvl_dtype)dtype, n_inputs, n_outputs, n_rows);
            for (size_t v = 0; v < N_TEST_VARIANTS; v++)
                if (backends[v] != NULL) check_product(backends[v], test_variants[v], &p);
            end_product(&p);
        }
    }
}

/* More rows than a block of rows, more outputs than a panel, several runs. */
static void test_large_product_matches_reference(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    product p = make_product(&random, KVL_DTYPE_Q4_1, 800, 131, ROWS_MAX);
    for (size_t v = 0; v < N_TEST_VARIANTS; v++)
        if (backends[v] != NULL) check_product(backends[v], test_variants[v], &p);
    end_product(&p);
}

/* Rows picked at random, in random order, in batches of every kind of size. */
static void check_rows_alone(kvl_random *random, kvl_backend *backend, const product *all)
{
    static const uint32_t sizes[] = {1, 2, 3, 4, 5, 8, 9, 16, 17, 33};
    const uint32_t n_inputs = all->weights.n_inputs;
    const uint32_t n_outputs = all->weights.n_outputs;
    float *y_all = test_floats((size_t)all->n_rows * n_outputs);
    run_product(backend, all, y_all);
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        product some = *all;
        some.n_rows = sizes[s];
        some.x = test_floats((size_t)some.n_rows * n_inputs);
        some.before = test_floats((size_t)some.n_rows * n_outputs);
        float *y = test_floats((size_t)some.n_rows * n_outputs);
        uint32_t picked[ROWS_MAX];
        for (uint32_t r = 0; r < some.n_rows; r++) {
            picked[r] = kvl_test_below(random, all->n_rows);
            memcpy(some.x + (size_t)r * n_inputs, all->x + (size_t)picked[r] * n_inputs,
                   n_inputs * sizeof(float));
            memcpy(some.before + (size_t)r * n_outputs, all->before + (size_t)picked[r] * n_outputs,
                   n_outputs * sizeof(float));
        }
        run_product(backend, &some, y);
        for (uint32_t r = 0; r < some.n_rows; r++)
            assert_memory_equal(y + (size_t)r * n_outputs, y_all + (size_t)picked[r] * n_outputs,
                                n_outputs * sizeof(float));
        kvl_free(some.x);
        kvl_free(some.before);
        kvl_free(y);
    }
    kvl_free(y_all);
}

static void test_bits_of_a_row_do_not_depend_on_the_batch(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int dtype = 0; dtype < KVL_DTYPE_COUNT; dtype++) {
        const uint32_t n_inputs = test_inputs(&random, (kvl_dtype)dtype, INPUTS_MAX);
        const uint32_t n_outputs = 1 + kvl_test_below(&random, OUTPUTS_MAX);
        product p = make_product(&random, (kvl_dtype)dtype, n_inputs, n_outputs, ROWS_MAX);
        for (size_t v = 0; v < N_TEST_VARIANTS; v++)
            if (backends[v] != NULL) check_rows_alone(&random, backends[v], &p);
        end_product(&p);
    }
}

/* The same product alone and together with others of the call, and with other numbers of threads.
 */
static void test_jobs_and_threads_do_not_change_bits(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_pool *pools[] = {test_pool(1), test_pool(3)};
    for (uint32_t n_rows = 1; n_rows < 40; n_rows += 19) {
        product a = make_product(&random, KVL_DTYPE_Q8_0, 608, 71, n_rows);
        product b = make_product(&random, KVL_DTYPE_F16, 608, 23, n_rows);
        const size_t n_a = (size_t)n_rows * 71;
        float *y_a = test_floats(n_a);
        float *y_together = test_floats(n_a);
        float *y_b = test_floats((size_t)n_rows * 23);
        for (size_t v = 0; v < N_TEST_VARIANTS; v++) {
            if (backends[v] == NULL) continue;
            run_product(backends[v], &a, y_a);
            for (size_t t = 0; t < 2; t++) {
                kvl_backend *other = test_backend(pools[t], test_variants[v]);
                memcpy(y_together, a.before, n_a * sizeof(float));
                const kvl_matmul_job jobs[] = {
                    {&b.weights, NULL, y_b, false},
                    {&a.weights, a.with_bias ? a.bias : NULL, y_together, a.accumulate},
                };
                other->ops->matmul(other, jobs, 2, n_rows, a.x);
                assert_memory_equal(y_together, y_a, n_a * sizeof(float));
                other->ops->destroy(other);
            }
        }
        kvl_free(y_a);
        kvl_free(y_together);
        kvl_free(y_b);
        end_product(&a);
        end_product(&b);
    }
    for (size_t t = 0; t < 2; t++) kvl_pool_destroy(pools[t]);
}

static void test_no_rows_is_nothing(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    product p = make_product(&random, KVL_DTYPE_F32, 5, 3, 1);
    float y[3] = {1, 2, 3};
    const float before[3] = {1, 2, 3};
    const kvl_matmul_job job = {&p.weights, p.bias, y, false};
    backends[0]->ops->matmul(backends[0], &job, 1, 0, p.x);
    assert_memory_equal(y, before, sizeof y);
    end_product(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products_match_reference),
        cmocka_unit_test(test_large_product_matches_reference),
        cmocka_unit_test(test_bits_of_a_row_do_not_depend_on_the_batch),
        cmocka_unit_test(test_jobs_and_threads_do_not_change_bits),
        cmocka_unit_test(test_no_rows_is_nothing),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
