/* compute/device: texts that name a device, and what a build without CUDA answers. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "compute/backend.h"

static kvl_pool *make_pool(void)
{
    kvl_pool *pool = NULL;
    kvl_error error;
    assert_int_equal(kvl_pool_create(1, false, &pool, &error), KVL_OK);
    return pool;
}

static void test_the_cpu_is_there(void **state)
{
    (void)state;
    kvl_pool *pool = make_pool();
    kvl_backend *backend = NULL;
    kvl_error error;
    assert_int_equal(kvl_backend_create(pool, "cpu", KVL_CPU_PORTABLE, &backend, &error), KVL_OK);
    assert_string_equal(backend->ops->name, "cpu");
    backend->ops->destroy(backend);
    assert_int_equal(kvl_backend_create(pool, "auto", KVL_CPU_PORTABLE, &backend, &error), KVL_OK);
    assert_non_null(backend);
    backend->ops->destroy(backend);
    kvl_pool_destroy(pool);
}

static void test_unknown_texts_are_refused(void **state)
{
    (void)state;
    static const char *const texts[] = {"",        "gpu",     "cuda:",    "cuda:x", "cuda0",
                                        "cuda:64", "cuda:-1", "cuda:000", "CUDA",   "cpu0"};
    kvl_pool *pool = make_pool();
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        kvl_backend *backend = NULL;
        kvl_error error;
        assert_int_equal(kvl_backend_create(pool, texts[i], KVL_CPU_BEST, &backend, &error),
                         KVL_ERR_INVALID);
        assert_null(backend);
        assert_non_null(strstr(error.text, "auto, cpu, cuda"));
    }
    kvl_pool_destroy(pool);
}

/* Where it is not there, with or without CUDA in the build, the refusal says what to do. */
static void test_a_device_asked_for_by_name_is_never_replaced(void **state)
{
    (void)state;
    kvl_pool *pool = make_pool();
    kvl_backend *backend = NULL;
    kvl_error error;
    const kvl_status status = kvl_backend_create(pool, "cuda:63", KVL_CPU_BEST, &backend, &error);
    assert_int_equal(status, KVL_ERR_UNSUPPORTED);
    assert_null(backend);
    assert_non_null(strstr(error.text, "63"));
    kvl_pool_destroy(pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_cpu_is_there),
        cmocka_unit_test(test_unknown_texts_are_refused),
        cmocka_unit_test(test_a_device_asked_for_by_name_is_never_replaced),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
