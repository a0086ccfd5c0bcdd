/* cache/page_pool: pages are given all or none, counted, and come back exactly when nobody holds
 * them. The backend here only lends memory, and can be told not to. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "cache/page_pool.h"
#include "test_random.h"

static void *lend(kvl_backend *backend, size_t n_bytes)
{
    (void)backend;
    void *memory = kvl_alloc_aligned(n_bytes);
    if (memory != NULL) memset(memory, 0, n_bytes);
    return memory;
}

static void take_back(kvl_backend *backend, void *memory)
{
    (void)backend;
    kvl_free(memory);
}

static const kvl_backend_ops lender = {
    .name = "lender", .memory_create = lend, .memory_destroy = take_back};

enum { N_PAGES = 40, ROUNDS = 20000, HELD_MAX = 400 };

/* Random acquire, share and release against a plain array of counts. */
static void test_counts_match_a_model(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_backend backend = {.ops = &lender};
    kvl_page_pool *pool = NULL;
    kvl_error error;
    assert_int_equal(kvl_page_pool_create(&backend, 2, 3, 32, N_PAGES, &pool, &error), KVL_OK);
    uint32_t counts[N_PAGES] = {0};
    uint32_t held[HELD_MAX]; /* one entry a reference */
    uint32_t n_held = 0;
    uint32_t n_free = N_PAGES;
    for (int round = 0; round < ROUNDS; round++) {
        const uint32_t action = kvl_test_below(&random, 3);
        if (action == 0) {
            const uint32_t n = kvl_test_below(&random, N_PAGES / 3);
            uint32_t pages[N_PAGES];
            if (n_held + n > HELD_MAX) continue;
            const kvl_status status = kvl_page_pool_acquire(pool, n, pages);
            assert_int_equal(status, n <= n_free ? KVL_OK : KVL_ERR_BUSY);
            for (uint32_t i = 0; status == KVL_OK && i < n; i++) {
                assert_true(pages[i] < N_PAGES);
                assert_int_equal(counts[pages[i]]++, 0);
                held[n_held++] = pages[i];
                n_free--;
            }
        } else if (n_held > 0) {
            const uint32_t at = kvl_test_below(&random, n_held);
            const uint32_t page = held[at];
            if (action == 1 && n_held < HELD_MAX) {
                kvl_page_pool_share(pool, 1, &page);
                counts[page]++;
                held[n_held++] = page;
            } else {
                kvl_page_pool_release(pool, 1, &page);
                if (--counts[page] == 0) n_free++;
                held[at] = held[--n_held];
            }
        }
        assert_int_equal(kvl_page_pool_n_free(pool), n_free);
        const uint32_t page = kvl_test_below(&random, N_PAGES);
        assert_int_equal(kvl_page_pool_references(pool, page), counts[page]);
    }
    kvl_page_pool_release(pool, n_held, held);
    assert_int_equal(kvl_page_pool_n_free(pool), N_PAGES);
    kvl_page_pool_destroy(pool);
}

/* Writing every number of every page finds overlaps, and under a sanitizer overruns. */
static void test_pages_do_not_overlap(void **state)
{
    (void)state;
    kvl_backend backend = {.ops = &lender};
    kvl_page_pool *pool = NULL;
    kvl_error error;
    assert_int_equal(kvl_page_pool_create(&backend, 3, 2, 16, 5, &pool, &error), KVL_OK);
    const kvl_pages *pages = kvl_page_pool_pages(pool);
    assert_int_equal((uintptr_t)pages->memory % KVL_ALIGNMENT, 0);
    for (int pass = 0; pass < 2; pass++) {
        float number = 1.0F;
        for (uint32_t layer = 0; layer < 3; layer++) {
            for (uint32_t page = 0; page < 5; page++) {
                for (uint32_t head = 0; head < 2; head++) {
                    float *keys = kvl_pages_keys(pages, layer, page, head);
                    float *values = kvl_pages_values(pages, layer, page, head);
                    for (size_t i = 0; i < kvl_pages_head_floats(pages); i++, number += 2.0F) {
                        if (pass == 1) {
                            assert_true(keys[i] == number);
                            assert_true(values[i] == number + 1.0F);
                        }
                        keys[i] = number;
                        values[i] = number + 1.0F;
                    }
                }
            }
        }
    }
    kvl_page_pool_destroy(pool);
}

static void test_shapes_that_cannot_be_are_refused(void **state)
{
    (void)state;
    kvl_backend backend = {.ops = &lender};
    /* layers, KV heads, head_dim, pages */
    const uint32_t refused[][4] = {
        {0, 1, 16, 1},  {1, 0, 16, 1},          {1, 1, 0, 1},
        {1, 1, 16, 0},  {1, 1, 24, 1},          {1, 1, 8, 1},
        {1, 1, 272, 1}, {1, 1, 16, UINT32_MAX}, {UINT32_MAX, UINT32_MAX, 256, UINT32_MAX / 16}};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        const uint32_t *s = refused[i];
        kvl_page_pool *pool = NULL;
        kvl_error error = {0};
        assert_int_equal(kvl_page_pool_create(&backend, s[0], s[1], s[2], s[3], &pool, &error),
                         KVL_ERR_OUT_OF_RANGE);
        assert_null(pool);
        assert_true(error.text[0] != '\0');
    }
    kvl_page_pool_destroy(NULL);
}

static void test_every_allocation_may_fail(void **state)
{
    (void)state;
    kvl_backend backend = {.ops = &lender};
    const int64_t live = kvl_alloc_live();
    kvl_page_pool *pool = NULL;
    kvl_error error;
    int64_t allowed = 0;
    for (; pool == NULL; allowed++) {
        kvl_alloc_fail_after(allowed);
        const kvl_status status = kvl_page_pool_create(&backend, 1, 1, 16, 4, &pool, &error);
        kvl_alloc_fail_after(-1);
        assert_int_equal(status, pool != NULL ? KVL_OK : KVL_ERR_NO_MEMORY);
        if (pool == NULL) assert_true(kvl_alloc_live() == live);
    }
    assert_true(allowed > 1);
    kvl_page_pool_destroy(pool);
    assert_true(kvl_alloc_live() == live);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_counts_match_a_model),
        cmocka_unit_test(test_pages_do_not_overlap),
        cmocka_unit_test(test_shapes_that_cannot_be_are_refused),
        cmocka_unit_test(test_every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
