/* host: stale tokens that are computed again while an answer is decoded, on random small models:
 * all of them refreshed in order are a full prefill bit for bit; each goes once; those that are
 * looked at most go first; pages of others stay as they are; off changes nothing. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "host/refresh.h"
#include "placed_kv.h"
#include "tiny_engine.h"

enum { N_MAX = 90, ANSWER_MAX = 120, ROUNDS = 8, N_PAGES = 64 };

typedef struct fixture {
    kvl_engine *engine;
    kvl_random random;
    uint32_t ids[N_MAX];
    uint32_t n, n_shared;
    float logits[512];
} fixture;

static int setup(void **state)
{
    static fixture f;
    f = (fixture){.random = kvl_test_random()};
    kvl_tiny_gguf_options tiny = kvl_tiny_gguf_defaults("llama");
    tiny.n_layers = 3;
    tiny.is_mixed = true;
    f.engine = tiny_engine_open(&tiny, 2, N_PAGES);
    assert_true(f.engine->shape->n_vocab <= sizeof f.logits / sizeof *f.logits);
    *state = &f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    (void)kvl_prefix_tree_evict(f->engine->tree, N_PAGES);
    assert_int_equal(kvl_page_pool_n_free(f->engine->pool), N_PAGES);
    kvl_engine_destroy(f->engine);
    return 0;
}

static void draw_prompt(fixture *f)
{
    f->n = 8 + kvl_test_below(&f->random, N_MAX - 8);
    for (uint32_t i = 0; i < f->n; i++) f->ids[i] = kvl_test_below(&f->random, 256);
}

static kvl_session *begin(fixture *f, bool use_tree)
{
    kvl_session *session = NULL;
    kvl_error error = {0};
    assert_int_equal(kvl_session_create(f->engine, &session, &error), KVL_OK);
    assert_int_equal(
        kvl_session_begin(session, f->ids, f->n, ANSWER_MAX, use_tree, 1, &f->n_shared, &error),
        KVL_OK);
    return session;
}

static kv prefill(fixture *f)
{
    kvl_session *session = begin(f, false);
    kvl_error error = {0};
    assert_int_equal(kvl_session_compute_range(session, 0, f->n, 0, NULL, &error), KVL_OK);
    kv made = kv_of(f->engine, session, f->n);
    kvl_session_destroy(session);
    return made;
}

/* A prompt whose tokens first .. n - 2 are placed from noise and whose others are computed. */
static kvl_session *place_noise(fixture *f, uint32_t first, bool use_tree)
{
    kvl_session *session = begin(f, use_tree);
    kv noise = kv_random(f->engine, f->n - 1 - first, &f->random);
    kvl_error error = {0};
    if (first > f->n_shared)
        assert_int_equal(kvl_session_compute_range(session, f->n_shared, first, 0, NULL, &error),
                         KVL_OK);
    kv_place(session, &noise, first);
    assert_int_equal(kvl_session_compute_range(session, f->n - 1, f->n, 1, f->logits, &error),
                     KVL_OK);
    kv_end(&noise);
    return session;
}

static kvl_refresh ready(fixture *f, uint32_t first, const kvl_refresh_options *asked)
{
    uint32_t stale[N_MAX];
    for (uint32_t p = first; p + 1 < f->n; p++) stale[p - first] = p;
    kvl_refresh_options options = *asked;
    options.n_tokens_max = f->n + ANSWER_MAX;
    if (options.clock == NULL) {
        options.clock = kvl_clock_system();
        options.deadline_ns = INT64_MAX;
    }
    kvl_refresh made;
    kvl_error error = {0};
    assert_int_equal(kvl_refresh_init(&made, &options, stale, f->n - 1 - first, &error), KVL_OK);
    return made;
}

static void step(fixture *f, kvl_refresh *refresh, kvl_session *session)
{
    const uint32_t token = kvl_test_below(&f->random, 256);
    kvl_error error = {0};
    assert_int_equal(kvl_session_append(session, &token, 1, &error), KVL_OK);
    assert_int_equal(kvl_refresh_step(refresh, session, 1, f->logits, &error), KVL_OK);
}

/* algorithms 3.3: deviations that make the lowest stale positions the first, a few in each step. */
static void test_all_refreshed_in_order_are_a_full_prefill(void **state)
{
    fixture *f = *state;
    for (int round = 0; round < ROUNDS; round++) {
        draw_prompt(f);
        kv full = prefill(f);
        kvl_session *session = place_noise(f, 0, false);
        float deviation[N_MAX] = {0};
        const kvl_refresh_options options = {.n_per_step = 1 + kvl_test_below(&f->random, 9),
                                             .first_scores = deviation,
                                             .deviation = deviation};
        kvl_refresh refresh = ready(f, 0, &options);
        uint32_t n_steps = 0;
        while (refresh.n_stale > 0) {
            memset(deviation, 0, sizeof deviation);
            for (uint32_t i = 0; i < options.n_per_step && i < refresh.n_stale; i++)
                deviation[refresh.stale[i]] = 1.0F;
            step(f, &refresh, session);
            n_steps++;
        }
        const uint32_t b = options.n_per_step;
        assert_int_equal(refresh.n_refreshed, f->n - 1);
        assert_int_equal(n_steps, (f->n - 1 + b - 1) / b);
        assert_int_equal(refresh.n_steps, n_steps);
        kv seen = kv_of(f->engine, session, f->n - 1);
        for (uint32_t l = 0; l < f->engine->shape->n_layers; l++) {
            const size_t width = (size_t)f->engine->shape->n_kv_heads * f->engine->shape->head_dim;
            const size_t n_bytes = (f->n - 1) * width * sizeof(float);
            assert_memory_equal(seen.keys + l * (f->n - 1) * width,
                                full.keys + (size_t)l * f->n * width, n_bytes);
            assert_memory_equal(seen.values + l * (f->n - 1) * width,
                                full.values + (size_t)l * f->n * width, n_bytes);
        }
        kvl_refresh_deinit(&refresh);
        kvl_session_destroy(session);
        kv_end(&full);
        kv_end(&seen);
    }
}

/* What a step takes is gone from the stale ones, was stale before, and had the most attention of
 * the row before; its KV changes, everything else in the prompt stays. */
static void test_each_goes_once_and_the_most_attended_first(void **state)
{
    fixture *f = *state;
    const kvl_model_shape *s = f->engine->shape;
    const size_t width = (size_t)s->n_kv_heads * s->head_dim;
    for (int round = 0; round < ROUNDS; round++) {
        draw_prompt(f);
        kvl_session *session = place_noise(f, 0, false);
        const kvl_refresh_options options = {.n_per_step = 1 + kvl_test_below(&f->random, 8)};
        kvl_refresh refresh = ready(f, 0, &options);
        bool was_refreshed[N_MAX] = {false};
        step(f, &refresh, session);
        assert_int_equal(refresh.n_refreshed, 0); /* nothing to go by: it only looked */
        for (uint32_t n_steps = 0; refresh.n_stale > 0; n_steps++) {
            assert_true(n_steps < f->n);
            uint32_t before[N_MAX];
            float mass[N_MAX];
            const uint32_t n_before = refresh.n_stale;
            memcpy(before, refresh.stale, n_before * sizeof *before);
            memcpy(mass, refresh.mass, f->n * sizeof *mass);
            kv old = kv_of(f->engine, session, f->n);
            step(f, &refresh, session);
            kv new = kv_of(f->engine, session, f->n);
            float lowest_taken = INFINITY, highest_left = -INFINITY;
            uint32_t left = 0;
            bool is_changed[N_MAX] = {false};
            for (uint32_t i = 0; i < n_before; i++) {
                const uint32_t p = before[i];
                const bool is_left = left < refresh.n_stale && refresh.stale[left] == p;
                left += is_left;
                assert_false(was_refreshed[p]);
                was_refreshed[p] = is_changed[p] = !is_left;
                if (is_left && mass[p] > highest_left) highest_left = mass[p];
                if (!is_left && mass[p] < lowest_taken) lowest_taken = mass[p];
            }
            assert_int_equal(left, refresh.n_stale);
            assert_true(lowest_taken >= highest_left);
            for (uint32_t l = 0; l < s->n_layers; l++) {
                for (uint32_t p = 0; p < f->n; p++) {
                    const size_t at = ((size_t)l * f->n + p) * width;
                    const bool same =
                        memcmp(old.keys + at, new.keys + at, width * sizeof(float)) == 0;
                    assert_int_equal(same, !is_changed[p]);
                }
            }
            kv_end(&old);
            kv_end(&new);
        }
        assert_int_equal(refresh.n_refreshed, f->n - 1);
        kvl_refresh_deinit(&refresh);
        kvl_session_destroy(session);
    }
}

/* Two sessions share a prefix; one of them refreshes all that it placed behind. */
static void test_pages_of_others_stay_as_they_are(void **state)
{
    fixture *f = *state;
    for (int round = 0; round < ROUNDS; round++) {
        draw_prompt(f);
        f->n = 3 * KVL_PAGE_TOKENS + 1 + kvl_test_below(&f->random, N_MAX - 3 * KVL_PAGE_TOKENS);
        for (uint32_t i = 0; i < f->n; i++) f->ids[i] = kvl_test_below(&f->random, 256);
        kvl_error error = {0};
        kvl_session *other = begin(f, false);
        assert_int_equal(kvl_session_compute_range(other, 0, f->n, 0, NULL, &error), KVL_OK);
        const uint32_t n_kept = 2 * KVL_PAGE_TOKENS;
        assert_int_equal(kvl_session_keep_prefix(other, 1, n_kept, &error), KVL_OK);
        kv before = kv_of(f->engine, other, f->n);
        kvl_session *session = place_noise(f, n_kept, true);
        assert_int_equal(f->n_shared, n_kept);
        for (uint32_t p = 0; p < n_kept; p += KVL_PAGE_TOKENS)
            assert_int_equal(kvl_session_slot(session, p), kvl_session_slot(other, p));
        const kvl_refresh_options options = {.n_per_step = 4, .n_own_first = f->n_shared};
        kvl_refresh refresh = ready(f, n_kept, &options);
        while (refresh.n_stale > 0) step(f, &refresh, session);
        assert_int_equal(refresh.n_refreshed, f->n - 1 - n_kept);
        kv after = kv_of(f->engine, other, f->n);
        kv_assert_same(&before, &after);
        kv_end(&before);
        kv_end(&after);
        kvl_refresh_deinit(&refresh);
        kvl_session_destroy(session);
        kvl_session_destroy(other);
        (void)kvl_prefix_tree_evict(f->engine->tree, N_PAGES);
    }
}

static int64_t read_clock(void *context)
{
    return *(const int64_t *)context;
}

/* Off, or from its end on, a step is that of any other decoding: same bits, nothing rewritten. */
static void test_off_and_past_its_deadline_change_nothing(void **state)
{
    fixture *f = *state;
    for (int round = 0; round < 2 * ROUNDS; round++) {
        draw_prompt(f);
        int64_t now = 100;
        const kvl_clock clock = {.monotonic_ns = read_clock, .context = &now};
        const bool is_off = round % 2 == 0;
        const float scores[N_MAX] = {1.0F};
        const kvl_refresh_options options = {.n_per_step = is_off ? 0 : 2,
                                             .deadline_ns = 200,
                                             .clock = &clock,
                                             .first_scores = scores};
        kvl_session *session = place_noise(f, 0, false);
        kvl_refresh refresh = ready(f, 0, &options);
        if (!is_off) {
            step(f, &refresh, session);
            assert_int_equal(refresh.n_refreshed, 2);
            now = 200;
        }
        const uint32_t n_refreshed = refresh.n_refreshed;
        kv before = kv_of(f->engine, session, f->n);
        for (int i = 0; i < 3; i++) {
            step(f, &refresh, session);
            float plain[512];
            const uint32_t at = kvl_session_n_tokens(session) - 1;
            kvl_error error = {0};
            assert_int_equal(kvl_session_compute_range(session, at, at + 1, 1, plain, &error),
                             KVL_OK);
            assert_memory_equal(plain, f->logits, f->engine->shape->n_vocab * sizeof *plain);
        }
        assert_int_equal(refresh.n_refreshed, n_refreshed);
        kv after = kv_of(f->engine, session, f->n);
        kv_assert_same(&before, &after);
        kv_end(&before);
        kv_end(&after);
        kvl_refresh_deinit(&refresh);
        kvl_session_destroy(session);
    }
}

/* The N-th allocation fails: nothing counts as refreshed, nothing leaks, and the next try works. */
static void test_without_memory_nothing_counts(void **state)
{
    fixture *f = *state;
    draw_prompt(f);
    kvl_session *session = place_noise(f, 0, false);
    uint32_t stale[N_MAX];
    for (uint32_t p = 0; p + 1 < f->n; p++) stale[p] = p;
    const float scores[N_MAX] = {1.0F};
    const kvl_refresh_options options = {.n_per_step = 2,
                                         .deadline_ns = INT64_MAX,
                                         .clock = kvl_clock_system(),
                                         .first_scores = scores,
                                         .n_tokens_max = f->n + ANSWER_MAX};
    kvl_status status = KVL_ERR_NO_MEMORY;
    const uint32_t token = 7;
    kvl_error error = {0};
    assert_int_equal(kvl_session_append(session, &token, 1, &error), KVL_OK);
    for (int64_t allowed = 0; status != KVL_OK; allowed++) {
        assert_true(allowed < 1000);
        kvl_refresh refresh;
        kvl_alloc_fail_after(allowed);
        status = kvl_refresh_init(&refresh, &options, stale, f->n - 1, &error);
        if (status == KVL_OK) status = kvl_refresh_step(&refresh, session, 1, f->logits, &error);
        kvl_alloc_fail_after(-1);
        assert_int_equal(refresh.n_refreshed, status == KVL_OK ? 2 : 0);
        kvl_refresh_deinit(&refresh);
    }
    kvl_session_destroy(session);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_refreshed_in_order_are_a_full_prefill),
        cmocka_unit_test(test_each_goes_once_and_the_most_attended_first),
        cmocka_unit_test(test_pages_of_others_stay_as_they_are),
        cmocka_unit_test(test_off_and_past_its_deadline_change_nothing),
        cmocka_unit_test(test_without_memory_nothing_counts),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
