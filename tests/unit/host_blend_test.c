/* host: what holds of recomputing some tokens among placed KV, on random small models, and on the
 * real one whose file KVLOOM_TEST_MODEL names (tests/integration/invariants_contract.py):
 * everything recomputed is a full prefill bit for bit, in one batch or refreshed in order; a stale
 * key never reaches a row before it; KV that was exact does not deviate. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "placed_kv.h"
#include "tiny_engine.h"

enum { N_MAX = 140, N_PAGES = 64 };

typedef struct fixture {
    kvl_engine *engine;
    kvl_random random;
    uint32_t ids[N_MAX];
    uint32_t n;
    int n_rounds;
} fixture;

static void open_engine(fixture *f, const char *architecture)
{
    *f = (fixture){.random = kvl_test_random(), .n_rounds = 12};
    kvl_tiny_gguf_options tiny = kvl_tiny_gguf_defaults(architecture);
    tiny.n_layers = 2 + kvl_test_below(&f->random, 3);
    tiny.is_mixed = true;
    f->engine = tiny_engine_open(&tiny, 2, N_PAGES);
}

static int setup_llama(void **state)
{
    static fixture f;
    open_engine(&f, "llama");
    *state = &f;
    return 0;
}

static int setup_qwen2(void **state)
{
    static fixture f;
    open_engine(&f, "qwen2");
    *state = &f;
    return 0;
}

static int setup_real(void **state)
{
    static fixture f;
    f = (fixture){.random = kvl_test_random(), .n_rounds = 2};
    const kvl_engine_options options = {
        .model_path = getenv("KVLOOM_TEST_MODEL"), .n_threads = 2, .n_pages = N_PAGES};
    kvl_error error = {0};
    if (kvl_engine_create(&options, &f.engine, &error) != KVL_OK) fail_msg("%s", error.text);
    *state = &f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    assert_int_equal(kvl_page_pool_n_free(f->engine->pool), N_PAGES);
    kvl_engine_destroy(f->engine);
    return 0;
}

static void draw_prompt(fixture *f)
{
    f->n = 8 + kvl_test_below(&f->random, N_MAX - 8);
    for (uint32_t i = 0; i < f->n; i++) f->ids[i] = kvl_test_below(&f->random, 256);
}

static kvl_session *begin(fixture *f)
{
    kvl_session *session = NULL;
    uint32_t n_shared = 0;
    kvl_error error = {0};
    assert_int_equal(kvl_session_create(f->engine, &session, &error), KVL_OK);
    assert_int_equal(kvl_session_begin(session, f->ids, f->n, 0, false, 1, &n_shared, &error),
                     KVL_OK);
    return session;
}

static void compute(kvl_session *session, const uint32_t *positions, uint32_t n)
{
    kvl_error error = {0};
    assert_int_equal(kvl_session_compute(session, positions, n, 0, NULL, &error), KVL_OK);
}

static kv prefill(fixture *f)
{
    kvl_session *session = begin(f);
    kvl_error error = {0};
    assert_int_equal(kvl_session_compute_range(session, 0, f->n, 0, NULL, &error), KVL_OK);
    kv made = kv_of(f->engine, session, f->n);
    kvl_session_destroy(session);
    return made;
}

/* algorithms 2.9 a: a ratio of 1. */
static void test_everything_recomputed_is_a_full_prefill(void **state)
{
    fixture *f = *state;
    uint32_t all[N_MAX];
    for (uint32_t i = 0; i < N_MAX; i++) all[i] = i;
    for (int round = 0; round < f->n_rounds; round++) {
        draw_prompt(f);
        kv full = prefill(f);
        kv stale = kv_random(f->engine, f->n, &f->random);
        kvl_session *session = begin(f);
        kv_place(session, &stale, 0);
        compute(session, all, f->n);
        kv seen = kv_of(f->engine, session, f->n);
        kv_assert_same(&full, &seen);
        kvl_session_destroy(session);
        kv_end(&full);
        kv_end(&stale);
        kv_end(&seen);
    }
}

/* algorithms 3.6: stale tokens refreshed a few at a time, in order, whatever was computed among
 * them before. */
static void test_refreshed_in_order_is_a_full_prefill(void **state)
{
    fixture *f = *state;
    for (int round = 0; round < f->n_rounds; round++) {
        draw_prompt(f);
        kv full = prefill(f);
        kv stale = kv_random(f->engine, f->n, &f->random);
        kvl_session *session = begin(f);
        kv_place(session, &stale, 0);
        uint32_t scattered[N_MAX];
        uint32_t n = 0;
        for (uint32_t p = 0; p < f->n; p++) {
            if (kvl_test_below(&f->random, 4) == 0) scattered[n++] = p;
        }
        if (n > 0) compute(session, scattered, n);
        for (uint32_t first = 0; first < f->n;) {
            uint32_t some[N_MAX];
            const uint32_t most = 1 + kvl_test_below(&f->random, 9);
            n = 0;
            while (n < most && first < f->n) some[n++] = first++;
            compute(session, some, n);
        }
        kv seen = kv_of(f->engine, session, f->n);
        kv_assert_same(&full, &seen);
        kvl_session_destroy(session);
        kv_end(&full);
        kv_end(&stale);
        kv_end(&seen);
    }
}

static bool row_differs(const fixture *f, const kv *a, const kv *b, uint32_t position)
{
    const kvl_model_shape *s = f->engine->shape;
    const size_t width = (size_t)s->n_kv_heads * s->head_dim;
    for (uint32_t l = 0; l < s->n_layers; l++) {
        const size_t at = ((size_t)l * f->n + position) * width;
        if (memcmp(a->keys + at, b->keys + at, width * sizeof(float)) != 0 ||
            memcmp(a->values + at, b->values + at, width * sizeof(float)) != 0)
            return true;
    }
    return false;
}

static kv blend(fixture *f, const kv *stale, const uint32_t *chosen, uint32_t n)
{
    kvl_session *session = begin(f);
    kv_place(session, stale, 0);
    compute(session, chosen, n);
    kv seen = kv_of(f->engine, session, f->n);
    kvl_session_destroy(session);
    return seen;
}

/* algorithms 2.9 g: a mask that is aligned to the end of the batch would let it through. */
static void test_a_stale_key_never_reaches_a_row_before_it(void **state)
{
    fixture *f = *state;
    const kvl_model_shape *s = f->engine->shape;
    const size_t width = (size_t)s->n_kv_heads * s->head_dim;
    uint32_t n_reached = 0;
    for (int round = 0; round < f->n_rounds; round++) {
        draw_prompt(f);
        const uint32_t at = 1 + kvl_test_below(&f->random, f->n - 2);
        uint32_t chosen[N_MAX];
        uint32_t n = 0;
        for (uint32_t p = 0; p < f->n; p++) {
            const bool is_taken = kvl_test_below(&f->random, 3) == 0 || p + 1 == f->n || p == 0;
            if (p != at && is_taken) chosen[n++] = p;
        }
        kv stale = kv_random(f->engine, f->n, &f->random);
        kv before = blend(f, &stale, chosen, n);
        for (uint32_t l = 0; l < s->n_layers; l++) {
            for (size_t d = 0; d < width; d++) {
                const size_t i = ((size_t)l * f->n + at) * width + d;
                stale.keys[i] = 3.0F - stale.keys[i];
                stale.values[i] = 5.0F - stale.values[i];
            }
        }
        kv after = blend(f, &stale, chosen, n);
        for (uint32_t p = 0; p < at; p++) assert_false(row_differs(f, &before, &after, p));
        for (uint32_t i = 0; i < n; i++)
            n_reached += chosen[i] > at && row_differs(f, &before, &after, chosen[i]);
        kv_end(&stale);
        kv_end(&before);
        kv_end(&after);
    }
    assert_true(n_reached > 0); /* rows behind it do see it */
}

/* algorithms 2.9 b: KV that stands where it was computed, behind what it was computed behind. */
static void test_exact_kv_does_not_deviate(void **state)
{
    fixture *f = *state;
    uint32_t all[N_MAX];
    for (uint32_t i = 0; i < N_MAX; i++) all[i] = i;
    for (int round = 0; round < f->n_rounds; round++) {
        draw_prompt(f);
        kv full = prefill(f);
        kv stale = kv_random(f->engine, f->n, &f->random);
        float exact[N_MAX], deviating[N_MAX];
        const kvl_deviation_check check = {(uint32_t)round % f->engine->shape->n_layers,
                                           round % 2 == 0};
        kvl_error error = {0};
        kvl_session *session = begin(f);
        kv_place(session, &full, 0);
        assert_int_equal(kvl_session_deviation(session, &check, all, f->n, exact, &error), KVL_OK);
        kv_place(session, &stale, 0);
        assert_int_equal(kvl_session_deviation(session, &check, all, f->n, deviating, &error),
                         KVL_OK);
        for (uint32_t p = 0; p < f->n; p++) {
            assert_true(exact[p] < 1e-6F); /* keys were rotated back and forth */
            assert_true(deviating[p] > 1e-3F);
        }
        kvl_session_destroy(session);
        kv_end(&full);
        kv_end(&stale);
    }
}

static int test_real(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_everything_recomputed_is_a_full_prefill, setup_real,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_refreshed_in_order_is_a_full_prefill, setup_real,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_a_stale_key_never_reaches_a_row_before_it, setup_real,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_exact_kv_does_not_deviate, setup_real, teardown),
    };
    return cmocka_run_group_tests_name("real model", tests, NULL, NULL);
}

int main(void)
{
    if (getenv("KVLOOM_TEST_MODEL") != NULL) return test_real();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_everything_recomputed_is_a_full_prefill, setup_llama,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_everything_recomputed_is_a_full_prefill, setup_qwen2,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_refreshed_in_order_is_a_full_prefill, setup_llama,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_refreshed_in_order_is_a_full_prefill, setup_qwen2,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_a_stale_key_never_reaches_a_row_before_it, setup_llama,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_a_stale_key_never_reaches_a_row_before_it, setup_qwen2,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_exact_kv_does_not_deviate, setup_llama, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
