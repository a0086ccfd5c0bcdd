/* host: which of those that wait goes first, under a simulated clock: nobody starves under a stream
 * that saves as much as can be; equal gains go as they came; those that share a donor run beside
 * each other, so that a small memory tier is hit more often than in the order of arrival. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "base/clock.h"
#include "host/order.h"
#include "test_random.h"

enum { WAITING_MAX = 64 };

static void take_out(kvl_order_item *items, size_t *n, size_t at)
{
    --*n;
    memmove(&items[at], &items[at + 1], (*n - at) * sizeof *items);
}

/* Every task takes a while, and for each that is done two come that save everything and are near:
 * the queue is always full. One that saves nothing goes before all that come gain_max / per_second
 * later. */
static void test_nobody_starves(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 50; round++) {
        kvl_order_options options = kvl_order_default_options();
        options.per_second = 0.05 + (double)kvl_test_below(&random, 100) / 20.0;
        options.gain_max = 1.0 + kvl_test_below(&random, 16);
        const int64_t task_ns = (1 + kvl_test_below(&random, 1000)) * KVL_NS_PER_MS;
        options.near_max = kvl_test_below(&random, 8);
        const double longest_s = (options.gain_max + options.near_max) / options.per_second;
        kvl_order_item items[WAITING_MAX];
        size_t n = 0;
        int64_t now = 0;
        uint64_t number = 0, n_later = 0;
        items[n++] = (kvl_order_item){.n_remaining = 1000, .number = number++};
        bool is_done = false;
        while (!is_done) {
            for (int i = 0; i < 2 && n < WAITING_MAX; i++)
                items[n++] = (kvl_order_item){.n_saved = 1e6,
                                              .n_near = 1e6,
                                              .n_remaining = 1,
                                              .arrived_ns = now,
                                              .number = number++};
            const size_t at = kvl_order_first(&options, items, n, now);
            is_done = items[at].number == 0;
            n_later += !is_done;
            /* Only such as came within the time that a gain is worth have gone before it. */
            assert_true((double)items[at].arrived_ns / (double)KVL_NS_PER_S <= longest_s);
            take_out(items, &n, at);
            now += task_ns;
        }
        assert_true(n_later > 0);
        const double waited_s = (double)n_later * (double)task_ns / (double)KVL_NS_PER_S;
        /* All that came in that time, at two for each one done, but never more than may wait. */
        assert_true(waited_s <= longest_s + WAITING_MAX * (double)task_ns / (double)KVL_NS_PER_S);
    }
}

static void test_equal_gains_go_as_they_came(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    const kvl_order_options options = kvl_order_default_options();
    for (int round = 0; round < 50; round++) {
        kvl_order_item items[WAITING_MAX];
        size_t n = 1 + kvl_test_below(&random, WAITING_MAX);
        int64_t now = 0;
        const uint32_t factor = 1 + kvl_test_below(&random, 9);
        for (size_t i = 0; i < n; i++) {
            /* Two of three at the same instant; the same share saved of prompts of any length. */
            if (kvl_test_below(&random, 3) == 0) now += kvl_test_below(&random, 1000000);
            const uint32_t n_tokens = (1U + kvl_test_below(&random, 4)) << 4;
            items[i] = (kvl_order_item){.n_saved = (double)(factor * n_tokens),
                                        .n_remaining = 8 * n_tokens,
                                        .arrived_ns = now,
                                        .number = i};
        }
        for (size_t i = n; i > 1; i--) {
            const size_t j = kvl_test_below(&random, (uint32_t)i);
            const kvl_order_item kept = items[i - 1];
            items[i - 1] = items[j];
            items[j] = kept;
        }
        for (uint64_t number = 0; n > 0; number++) {
            const size_t at = kvl_order_first(&options, items, n, now + 1000);
            assert_int_equal(items[at].number, number);
            take_out(items, &n, at);
        }
    }
}

/* Who saves more goes first; who has waited long enough goes before him. */
static void test_gains_and_waiting_are_weighed(void **state)
{
    (void)state;
    const kvl_order_options options = {.per_second = 0.5, .gain_max = 8.0, .near_max = 2.0};
    kvl_order_item items[2] = {
        {.n_saved = 0.0, .n_remaining = 100, .arrived_ns = 0, .number = 0},
        {.n_saved = 300.0, .n_remaining = 100, .arrived_ns = 5 * KVL_NS_PER_S, .number = 1},
    };
    assert_int_equal(kvl_order_first(&options, items, 2, 5 * KVL_NS_PER_S), 1);
    items[1].arrived_ns = 7 * KVL_NS_PER_S;
    assert_int_equal(kvl_order_first(&options, items, 2, 7 * KVL_NS_PER_S), 0);
    /* What was just loaded counts by its share of the prompt, beside what is saved. */
    items[1].arrived_ns = 3 * KVL_NS_PER_S;
    assert_int_equal(kvl_order_first(&options, items, 2, 3 * KVL_NS_PER_S), 1);
    items[0].n_near = 90.0;
    assert_int_equal(kvl_order_first(&options, items, 2, 3 * KVL_NS_PER_S), 0);
    items[1].n_near = 300.0;
    assert_int_equal(kvl_order_first(&options, items, 2, 3 * KVL_NS_PER_S), 1);
    items[1].n_remaining = 0; /* as one */
    items[1].n_near = 1e9;
    assert_true(kvl_order_priority(&options, &items[1], 3 * KVL_NS_PER_S) ==
                options.gain_max + options.near_max);
}

/* ---- a load of repeated chunks over a small memory ---- */

enum { DONORS = 12, CHUNKS = 4, IN_MEMORY = 10, REQUESTS = 600, WAIT_AT_ONCE = 16 };

/* Chunks in memory, the last used first. */
typedef struct memory {
    uint32_t chunks[IN_MEMORY + 1];
    uint32_t n;
} memory;

static bool has(const memory *m, uint32_t chunk)
{
    for (uint32_t i = 0; i < m->n; i++) {
        if (m->chunks[i] == chunk) return true;
    }
    return false;
}

static void use(memory *m, uint32_t chunk)
{
    uint32_t at = 0;
    while (at < m->n && m->chunks[at] != chunk) at++;
    if (at == m->n && m->n < IN_MEMORY) m->n++;
    if (at == IN_MEMORY) at--;
    memmove(&m->chunks[1], &m->chunks[0], at * sizeof *m->chunks);
    m->chunks[0] = chunk;
}

/* A hit rate and the longest wait, in requests, of one stream of requests, each with the chunks of
 * one of many donors. */
static double hit_rate(const uint32_t *donors, bool in_order, uint64_t *longest)
{
    const kvl_order_options options = kvl_order_default_options();
    kvl_order_item items[WAIT_AT_ONCE];
    uint32_t waiting[WAIT_AT_ONCE];
    memory m = {.n = 0};
    size_t n = 0, n_come = 0, n_hits = 0;
    uint32_t last = UINT32_MAX;
    *longest = 0;
    for (uint64_t done = 0; done < REQUESTS; done++) {
        const int64_t now = (int64_t)done * 300 * KVL_NS_PER_MS;
        while (n < WAIT_AT_ONCE && n_come < REQUESTS) {
            waiting[n] = donors[n_come];
            items[n++] = (kvl_order_item){.arrived_ns = now, .number = n_come++};
        }
        for (size_t i = 0; i < n; i++) {
            uint32_t n_here = 0;
            for (uint32_t c = 0; c < CHUNKS; c++) n_here += has(&m, waiting[i] * CHUNKS + c);
            items[i].n_saved = 100.0 * n_here;
            items[i].n_near = waiting[i] == last ? 100.0 * CHUNKS : 0.0;
            items[i].n_remaining = 100 * (CHUNKS - n_here) + 50;
        }
        const size_t at = in_order ? 0 : kvl_order_first(&options, items, n, now);
        const uint64_t waited = done - items[at].number;
        if (done > items[at].number && waited > *longest) *longest = waited;
        last = waiting[at];
        for (uint32_t c = 0; c < CHUNKS; c++) {
            n_hits += has(&m, last * CHUNKS + c);
            use(&m, last * CHUNKS + c);
        }
        take_out(items, &n, at);
        memmove(&waiting[at], &waiting[at + 1], (n - at) * sizeof *waiting);
    }
    return (double)n_hits / (REQUESTS * CHUNKS);
}

static void test_shared_donors_hit_a_small_memory_more_often(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    double fifo = 0.0, ordered = 0.0;
    for (int round = 0; round < 10; round++) {
        uint32_t donors[REQUESTS];
        for (uint32_t i = 0; i < REQUESTS; i++) donors[i] = kvl_test_below(&random, DONORS);
        uint64_t ignored = 0, longest = 0;
        fifo += hit_rate(donors, true, &ignored) / 10.0;
        ordered += hit_rate(donors, false, &longest) / 10.0;
        /* 12 s of 300 ms each, and all that may wait at once. */
        assert_true(longest <= 40 + WAIT_AT_ONCE);
    }
    (void)printf("hit rate as they came %.3f, those first that save most %.3f\n", fifo, ordered);
    assert_true(ordered > 1.5 * fifo);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nobody_starves),
        cmocka_unit_test(test_equal_gains_go_as_they_came),
        cmocka_unit_test(test_gains_and_waiting_are_weighed),
        cmocka_unit_test(test_shared_donors_hit_a_small_memory_more_often),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
