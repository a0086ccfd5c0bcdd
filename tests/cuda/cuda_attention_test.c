/* cuda/attention: rows attend to exactly their own past on the device too. Random trees, ragged
 * lengths, group sizes, scattered rows, against a naive reference in double.
 * Ends with 77 (skipped) where there is no device that the kernels run on. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "attention_world.h"
#include "base/alloc.h"
#include "cuda/attention.h"

enum { SKIPPED = 77, WORLDS = 60 };

static uint32_t n_worlds = WORLDS;

static void *to_device(const void *from, size_t n_bytes)
{
    void *to = NULL;
    assert_int_equal(cudaMalloc(&to, n_bytes), cudaSuccess);
    assert_int_equal(cudaMemcpy(to, from, n_bytes, cudaMemcpyHostToDevice), cudaSuccess);
    return to;
}

static float *widen(const uint16_t *numbers, size_t n)
{
    float *wide = kvl_alloc(n * sizeof *wide);
    assert_non_null(wide);
    for (size_t i = 0; i < n; i++) wide[i] = world_float(numbers[i]);
    return wide;
}

/* The device's answer as float. */
static float *run(const world *w, kvl_cuda_step *step, const void *kv, bool float_numbers,
                  uint32_t variant)
{
    const size_t n = (size_t)w->n_rows * w->n_heads * w->shape.head_dim;
    const size_t n_bytes = n * (float_numbers ? sizeof(float) : sizeof(uint16_t));
    float *wide = widen(w->queries, n);
    void *queries = to_device(float_numbers ? (const void *)wide : w->queries, n_bytes);
    void *out = NULL;
    assert_int_equal(cudaMalloc(&out, n_bytes), cudaSuccess);
    assert_int_equal(cudaMemset(out, 0xff, n_bytes), cudaSuccess);
    kvl_error error;
    assert_int_equal(
        kvl_cuda_step_run(step, kv, queries, out, float_numbers, variant, NULL, &error), KVL_OK);
    uint16_t *rounded = kvl_alloc(n * sizeof *rounded);
    assert_non_null(rounded);
    assert_int_equal(
        cudaMemcpy(float_numbers ? (void *)wide : rounded, out, n_bytes, cudaMemcpyDeviceToHost),
        cudaSuccess);
    if (!float_numbers) {
        kvl_free(wide);
        wide = widen(rounded, n);
    }
    kvl_free(rounded);
    assert_int_equal(cudaFree(queries), cudaSuccess);
    assert_int_equal(cudaFree(out), cudaSuccess);
    return wide;
}

static void check_world(const world_shape *shape, kvl_random *random, uint32_t n_blocks)
{
    world *w = world_create(random, shape);
    world_attend(w);
    kvl_error error;
    kvl_attention_plan *plan = NULL;
    kvl_cuda_step *step = NULL;
    assert_int_equal(kvl_attention_plan_create(&plan, &error), KVL_OK);
    assert_int_equal(kvl_cuda_step_create(n_blocks, &step, &error), KVL_OK);
    const kvl_attend_call call = world_plan(w, plan);
    assert_int_equal(
        kvl_cuda_step_make(step, &call, shape->n_kv_heads, shape->head_dim, NULL, &error), KVL_OK);
    void *kv = to_device(w->kv, w->n_pages * world_page_numbers(w) * sizeof *w->kv);
    const kvl_cuda_plan_view view = kvl_cuda_step_plan(step);
    for (uint32_t variant = 0; variant < kvl_cuda_attention_n_variants(); variant++) {
        if (strcmp(kvl_cuda_attention_variant_name(variant), "unmerged") == 0) continue;
        for (uint32_t is_float = 0; is_float < 2; is_float++) {
            float *out = run(w, step, kv, is_float, variant);
            const double worst = world_error(w, out, !is_float);
            if (worst > 1 || getenv("KVL_TEST_VERBOSE") != NULL)
                print_message("heads %u x %u, dim %u, %u paths, %u rows, %u pages: %u matrix, %u "
                              "vector, %u merges, variant %s, %s: error %.3f of allowed\n",
                              shape->n_kv_heads, shape->group, shape->head_dim, shape->n_paths,
                              w->n_rows, w->n_pages, view.n_matrix, view.n_vectors, view.n_merges,
                              kvl_cuda_attention_variant_name(variant), is_float ? "float" : "bf16",
                              worst);
            kvl_free(out);
            assert_true(worst <= 1);
        }
    }
    assert_int_equal(cudaFree(kv), cudaSuccess);
    kvl_cuda_step_destroy(step);
    kvl_attention_plan_destroy(plan);
    world_destroy(w);
}

static void test_rows_attend_to_exactly_their_own_past(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (uint32_t i = 0; i < n_worlds; i++) {
        const world_shape shape = world_random_shape(&random);
        /* Few blocks force long lines of works, many leave some with none. */
        check_world(&shape, &random, kvl_test_below(&random, 2) == 0 ? 0 : 7);
    }
}

static void test_a_long_shared_prefix(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    const world_shape shapes[] = {
        {8, 4, 128, 40, 1400, 1, true},   {2, 7, 64, 90, 700, 1, true},
        {3, 3, 64, 64, 900, 1, true},     {1, 8, 128, 33, 2000, 1, true},
        {2, 4, 128, 1, 3000, 700, false},
    };
    const uint32_t n = n_worlds < WORLDS ? 2 : sizeof shapes / sizeof *shapes;
    for (uint32_t i = 0; i < n; i++) check_world(&shapes[i], &random, 0);
}

static void test_one_token(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    const world_shape shape = {1, 1, 64, 1, 1, 1, true};
    check_world(&shape, &random, 0);
}

static void test_shapes_without_kernels_are_refused(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    const world_shape shape = {1, 9, 64, 2, 30, 1, true};
    world *w = world_create(&random, &shape);
    kvl_error error;
    kvl_attention_plan *plan = NULL;
    kvl_cuda_step *step = NULL;
    assert_int_equal(kvl_attention_plan_create(&plan, &error), KVL_OK);
    assert_int_equal(kvl_cuda_step_create(0, &step, &error), KVL_OK);
    const kvl_attend_call call = world_plan(w, plan);
    assert_int_equal(kvl_cuda_step_make(step, &call, 1, 64, NULL, &error), KVL_ERR_UNSUPPORTED);
    assert_non_null(strstr(error.text, "9 query heads"));
    assert_int_equal(kvl_cuda_step_make(step, &call, 1, 80, NULL, &error), KVL_ERR_UNSUPPORTED);
    assert_non_null(strstr(error.text, "80"));
    kvl_cuda_step_destroy(step);
    kvl_attention_plan_destroy(plan);
    world_destroy(w);
}

int main(int argc, char **argv)
{
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        (void)fprintf(stderr, "skipped: no CUDA device\n");
        return SKIPPED;
    }
    /* Fewer worlds for the sanitizers, which are slow: cuda_attention_test 5 */
    if (argc > 1) n_worlds = (uint32_t)strtoul(argv[1], NULL, 10);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_token),
        cmocka_unit_test(test_rows_attend_to_exactly_their_own_past),
        cmocka_unit_test(test_a_long_shared_prefix),
        cmocka_unit_test(test_shapes_without_kernels_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
