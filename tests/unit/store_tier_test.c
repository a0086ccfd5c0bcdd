/* store: one list of cases that every tier passes: memory, LMDB, and both as a stack. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/log.h"
#include "store/store.h"
#include "store_sample.h"
#include "test_random.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { MEMORY, LMDB, STACK, N_KINDS };

static const char *const NAMES[N_KINDS] = {"memory", "lmdb", "stack"};

/* A tier, and where its database is. */
typedef struct fixture {
    kvl_store_place place;
    kvl_tier *tier;
} fixture;

static kvl_status tier_make(int kind, const char *path, uint64_t bytes_max, kvl_tier **tier)
{
    const kvl_lmdb_tier_options options = {path, bytes_max, kvl_store_fingerprint(), false, NULL};
    kvl_tier *parts[2] = {NULL, NULL};
    *tier = NULL;
    if (kind == MEMORY) return kvl_memory_tier_create(bytes_max, tier, NULL);
    if (kind == LMDB) return kvl_lmdb_tier_create(&options, tier, NULL);
    kvl_status status = kvl_memory_tier_create(bytes_max / 3 + 1, &parts[0], NULL);
    if (status == KVL_OK) status = kvl_lmdb_tier_create(&options, &parts[1], NULL);
    if (status == KVL_OK) status = kvl_stack_tier_create(parts, 2, tier, NULL);
    for (int i = 0; status != KVL_OK && i < 2; i++) {
        if (parts[i] != NULL) parts[i]->ops->destroy(parts[i]);
    }
    return status;
}

static fixture fixture_make(const int *kind, uint64_t bytes_max)
{
    fixture f;
    kvl_store_place_make(&f.place);
    assert_int_equal(tier_make(*kind, f.place.path, bytes_max, &f.tier), KVL_OK);
    return f;
}

static void fixture_end(fixture *f)
{
    f->tier->ops->destroy(f->tier);
    kvl_store_place_end(&f->place);
}

static void put_number(kvl_tier *tier, uint32_t number, size_t payload)
{
    kvl_container *container = kvl_store_sample(number, payload);
    kvl_error error = {.text = ""};
    if (tier->ops->put(tier, container, &error) != KVL_OK) fail_msg("put: %s", error.text);
    kvl_container_release(container);
}

/* Gets and compares; false where it is not there. */
static bool get_number(kvl_tier *tier, uint32_t number)
{
    const kvl_digest id = kvl_store_sample_id(number);
    kvl_container *container = NULL;
    const kvl_status status = tier->ops->get(tier, &id, true, &container, NULL);
    if (status != KVL_OK) {
        assert_int_equal(status, KVL_ERR_NOT_FOUND);
        assert_null(container);
        return false;
    }
    kvl_store_sample_check(container, number);
    kvl_container_release(container);
    return true;
}

static kvl_tier_stats stats_of(kvl_tier *tier)
{
    kvl_tier_stats stats;
    tier->ops->stats(tier, &stats);
    return stats;
}

static uint64_t sample_bytes(size_t payload)
{
    kvl_container *container = kvl_store_sample(1, payload);
    size_t n_bytes = 0;
    (void)kvl_container_bytes(container, &n_bytes);
    kvl_container_release(container);
    return n_bytes;
}

typedef struct listed {
    uint32_t n, n_limit;
    uint64_t bytes;
    bool is_there[64];
} listed;

static bool note_listed(void *context, const kvl_digest *id, kvl_container_kind kind,
                        uint64_t n_bytes)
{
    listed *all = context;
    assert_int_equal(kind, KVL_CONTAINER_ANCHOR);
    for (uint32_t i = 0; i < 64; i++) {
        const kvl_digest known = kvl_store_sample_id(i);
        if (!kvl_digest_equal(&known, id)) continue;
        assert_false(all->is_there[i]);
        all->is_there[i] = true;
    }
    all->n++;
    all->bytes += n_bytes;
    return all->n < all->n_limit;
}

/* Random operations beside a plain array that knows what must come out. */
static void test_behaves_like_a_set(void **state)
{
    enum { NUMBERS = 40 };
    fixture f = fixture_make(*state, 1u << 30);
    kvl_random random = kvl_test_random();
    bool expected[64] = {false};
    uint64_t n_hits = 0, n_misses = 0;
    for (int round = 0; round < 600; round++) {
        const uint32_t number = kvl_test_below(&random, NUMBERS);
        const kvl_digest id = kvl_store_sample_id(number);
        switch (kvl_test_below(&random, 4)) {
        case 0:
            put_number(f.tier, number, 100 * (size_t)number + 1);
            expected[number] = true;
            break;
        case 1:
            assert_int_equal(f.tier->ops->remove(f.tier, &id, NULL),
                             expected[number] ? KVL_OK : KVL_ERR_NOT_FOUND);
            expected[number] = false;
            break;
        case 2:
            assert_int_equal(get_number(f.tier, number), expected[number]);
            n_hits += expected[number];
            n_misses += !expected[number];
            break;
        default: assert_int_equal(f.tier->ops->has(f.tier, &id), expected[number]);
        }
    }
    listed all = {.n_limit = UINT32_MAX};
    f.tier->ops->list(f.tier, note_listed, &all);
    assert_memory_equal(all.is_there, expected, sizeof expected);
    const kvl_tier_stats stats = stats_of(f.tier);
    assert_int_equal(stats.n_containers, all.n);
    assert_int_equal(stats.bytes, all.bytes);
    assert_int_equal(stats.hits, n_hits);
    assert_int_equal(stats.misses, n_misses);
    assert_int_equal(stats.bytes_max, 1u << 30);
    assert_int_equal(stats.damaged + stats.foreign + stats.evictions, 0);
    fixture_end(&f);
}

static void test_listing_stops_when_told(void **state)
{
    fixture f = fixture_make(*state, 1u << 30);
    for (uint32_t i = 0; i < 10; i++) put_number(f.tier, i, 50);
    for (uint32_t n_limit = 1; n_limit <= 10; n_limit++) {
        listed all = {.n_limit = n_limit};
        f.tier->ops->list(f.tier, note_listed, &all);
        assert_int_equal(all.n, n_limit);
    }
    fixture_end(&f);
}

static void test_putting_twice_changes_nothing(void **state)
{
    fixture f = fixture_make(*state, 1u << 30);
    put_number(f.tier, 3, 5000);
    const kvl_tier_stats before = stats_of(f.tier);
    put_number(f.tier, 3, 5000);
    put_number(f.tier, 3, 9000); /* the same id: what is there stays */
    const kvl_tier_stats after = stats_of(f.tier);
    assert_int_equal(after.n_containers, 1);
    assert_int_equal(after.bytes, before.bytes);
    assert_true(get_number(f.tier, 3));
    fixture_end(&f);
}

static void test_what_cannot_be_kept_is_refused(void **state)
{
    const uint64_t one = sample_bytes(4000);
    fixture f = fixture_make(*state, 3 * one);
    put_number(f.tier, 1, 4000);
    kvl_container *large = kvl_store_sample(2, 16000);
    assert_int_equal(f.tier->ops->put(f.tier, large, NULL), KVL_ERR_TOO_LARGE);
    kvl_container_release(large);
    kvl_container *unsealed = kvl_store_sample_unsealed(4, 1000);
    assert_int_equal(f.tier->ops->put(f.tier, unsealed, NULL), KVL_ERR_INVALID);
    kvl_container_release(unsealed);
    assert_int_equal(stats_of(f.tier).n_containers, 1);
    assert_true(get_number(f.tier, 1));
    assert_false(get_number(f.tier, 2));
    assert_false(get_number(f.tier, 4));
    put_number(f.tier, 5, 3 * 4000 - 600); /* nearly the whole cap is allowed, all else goes */
    assert_true(get_number(f.tier, 5));
    fixture_end(&f);
}

static void test_the_oldest_used_goes_first(void **state)
{
    enum { ROOM = 40, HOT = 7 };
    const uint64_t one = sample_bytes(3000);
    fixture f = fixture_make(*state, ROOM * one);
    for (uint32_t i = 0; i < 10 * ROOM; i++) {
        put_number(f.tier, i, 3000);
        assert_true(stats_of(f.tier).bytes <= ROOM * one);
        if (i >= HOT) assert_true(get_number(f.tier, HOT)); /* used again and again: stays */
        assert_true(get_number(f.tier, i));
    }
    const kvl_tier_stats stats = stats_of(f.tier);
    assert_int_equal(stats.n_containers + stats.evictions, 10 * ROOM);
    assert_true(stats.n_containers >= ROOM * 8 / 10);
    /* The newest are there, the oldest are not. */
    for (uint32_t i = 0; i < 10 * ROOM; i++) {
        const kvl_digest id = kvl_store_sample_id(i);
        if (i == HOT || i >= 10 * ROOM - ROOM / 2) assert_true(f.tier->ops->has(f.tier, &id));
        if (i != HOT && i < 10 * ROOM - 2 * ROOM) assert_false(f.tier->ops->has(f.tier, &id));
    }
    fixture_end(&f);
}

static void test_a_held_container_outlives_eviction(void **state)
{
    const uint64_t one = sample_bytes(3000);
    fixture f = fixture_make(*state, 4 * one);
    put_number(f.tier, 1, 3000);
    const kvl_digest id = kvl_store_sample_id(1);
    kvl_container *held = NULL;
    assert_int_equal(f.tier->ops->get(f.tier, &id, false, &held, NULL), KVL_OK);
    for (uint32_t i = 2; i < 20; i++) put_number(f.tier, i, 3000);
    if (f.tier->ops->has(f.tier, &id))
        assert_int_equal(f.tier->ops->remove(f.tier, &id, NULL), KVL_OK);
    kvl_store_sample_check(held, 1);
    kvl_container_release(held);
    fixture_end(&f);
}

typedef struct worker {
    kvl_tier *tier;
    uint64_t seed;
    bool is_right;
} worker;

static void *work(void *context)
{
    enum { NUMBERS = 30, ROUNDS = 400 };
    worker *w = context;
    kvl_random random = {w->seed};
    for (int round = 0; round < ROUNDS; round++) {
        const uint32_t number = kvl_test_below(&random, NUMBERS);
        const kvl_digest id = kvl_store_sample_id(number);
        kvl_container *container = NULL;
        switch (kvl_test_below(&random, 5)) {
        case 0:
            container = kvl_store_sample(number, 2000);
            w->is_right &= w->tier->ops->put(w->tier, container, NULL) == KVL_OK;
            break;
        case 1: (void)!w->tier->ops->remove(w->tier, &id, NULL); break;
        default:
            if (w->tier->ops->get(w->tier, &id, true, &container, NULL) == KVL_OK)
                w->is_right &= kvl_store_sample_is(container, number);
        }
        kvl_container_release(container);
    }
    return NULL;
}

static void check_threads(const int *kind, uint32_t n_containers_max)
{
    enum { THREADS = 4 };
    const uint64_t one = sample_bytes(2000);
    fixture f = fixture_make(kind, n_containers_max * one);
    kvl_random random = kvl_test_random();
    worker workers[THREADS];
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) {
        workers[i] = (worker){f.tier, kvl_random_next(&random), true};
        assert_int_equal(pthread_create(&threads[i], NULL, work, &workers[i]), 0);
    }
    for (int i = 0; i < THREADS; i++) {
        (void)pthread_join(threads[i], NULL);
        assert_true(workers[i].is_right);
    }
    listed all = {.n_limit = UINT32_MAX};
    f.tier->ops->list(f.tier, note_listed, &all);
    const kvl_tier_stats stats = stats_of(f.tier);
    assert_int_equal(all.bytes, all.n * one);
    assert_int_equal(stats.bytes, stats.n_containers * one);
    /* Sizes of a stack are the slowest tier's; a faster one may have what that one evicted. */
    if (*kind == STACK && stats.evictions > 0)
        assert_true(stats.n_containers <= all.n);
    else
        assert_int_equal(stats.n_containers, all.n);
    assert_int_equal(stats.damaged, 0);
    fixture_end(&f);
}

static void test_threads_see_whole_containers(void **state)
{
    check_threads(*state, 20);
    check_threads(*state, 100); /* room for all: nothing is evicted, and all counts are equal */
}

/* One operation after another, with memory that ends after n allocations; each n once. */
static void test_failing_allocations_change_nothing(void **state)
{
    const int64_t live_before = kvl_alloc_live();
    const int kind = *(const int *)*state;
    kvl_store_place place;
    kvl_store_place_make(&place);
    kvl_status made = KVL_ERR_NO_MEMORY;
    for (int64_t n = 0; made != KVL_OK; n++) {
        kvl_tier *tier = NULL;
        kvl_alloc_fail_after(n);
        made = tier_make(kind, place.path, 1u << 20, &tier);
        kvl_alloc_fail_after(-1);
        assert_true(n < 100);
        if (made == KVL_OK) tier->ops->destroy(tier);
        assert_int_equal(kvl_alloc_live(), live_before);
    }
    kvl_tier *tier = NULL;
    assert_int_equal(tier_make(kind, place.path, 1u << 20, &tier), KVL_OK);
    put_number(tier, 1, 3000);
    kvl_status status = KVL_ERR_NO_MEMORY;
    kvl_container *container = kvl_store_sample(2, 3000);
    for (int64_t n = 0; status != KVL_OK; n++) {
        const uint64_t n_before = stats_of(tier).n_containers;
        kvl_alloc_fail_after(n);
        status = tier->ops->put(tier, container, NULL);
        kvl_alloc_fail_after(-1);
        assert_true(status == KVL_OK || status == KVL_ERR_NO_MEMORY);
        assert_int_equal(stats_of(tier).n_containers, n_before + (status == KVL_OK));
    }
    kvl_container_release(container);
    status = KVL_ERR_NO_MEMORY;
    for (int64_t n = 0; status != KVL_OK; n++) {
        const kvl_digest id = kvl_store_sample_id(2);
        kvl_container *got = NULL;
        kvl_alloc_fail_after(n);
        status = tier->ops->get(tier, &id, true, &got, NULL);
        kvl_alloc_fail_after(-1);
        assert_true(status == KVL_OK || status == KVL_ERR_NO_MEMORY);
        if (got != NULL) kvl_store_sample_check(got, 2);
        kvl_container_release(got);
    }
    assert_true(get_number(tier, 1));
    assert_int_equal(stats_of(tier).damaged, 0);
    tier->ops->destroy(tier);
    kvl_store_place_end(&place);
    assert_int_equal(kvl_alloc_live(), live_before);
}

/* Memory that was overwritten after it was sealed: a get that checks does not hand it out. */
static void test_damaged_memory_is_a_miss(void **state)
{
    (void)state;
    kvl_tier *tier = NULL;
    assert_int_equal(kvl_memory_tier_create(1u << 20, &tier, NULL), KVL_OK);
    kvl_container *container = kvl_store_sample(1, 3000);
    assert_int_equal(tier->ops->put(tier, container, NULL), KVL_OK);
    size_t n_bytes = 0;
    uint8_t *block = (uint8_t *)(uintptr_t)kvl_container_block_view(container, 0, &n_bytes);
    block[n_bytes / 2] ^= 4;
    const kvl_digest id = kvl_store_sample_id(1);
    kvl_container *got = NULL;
    assert_int_equal(tier->ops->get(tier, &id, false, &got, NULL), KVL_OK);
    kvl_container_release(got);
    assert_int_equal(tier->ops->get(tier, &id, true, &got, NULL), KVL_ERR_DAMAGED);
    assert_null(got);
    assert_false(tier->ops->has(tier, &id));
    const kvl_tier_stats stats = stats_of(tier);
    assert_int_equal(stats.damaged, 1);
    assert_int_equal(stats.hits, 1);
    assert_int_equal(stats.misses, 1);
    assert_int_equal(stats.n_containers, 0);
    kvl_container_release(container);
    tier->ops->destroy(tier);
}

/* What is asked for again survives any number of those that are not. */
static void test_a_scan_does_not_empty_memory(void **state)
{
    (void)state;
    enum { ROOM = 20, HOT = 10 };
    const uint64_t one = sample_bytes(1000);
    kvl_tier *tier = NULL;
    assert_int_equal(kvl_memory_tier_create(ROOM * one, &tier, NULL), KVL_OK);
    for (uint32_t i = 0; i < HOT; i++) {
        put_number(tier, i, 1000);
        assert_true(get_number(tier, i));
    }
    for (uint32_t i = HOT; i < HOT + 5 * ROOM; i++) put_number(tier, i, 1000);
    for (uint32_t i = 0; i < HOT; i++) assert_true(get_number(tier, i));
    tier->ops->destroy(tier);
}

static void test_stack_fills_its_faster_tier(void **state)
{
    (void)state;
    kvl_tier *parts[2], *stack = NULL;
    assert_int_equal(kvl_memory_tier_create(1u << 20, &parts[0], NULL), KVL_OK);
    assert_int_equal(kvl_memory_tier_create(1u << 20, &parts[1], NULL), KVL_OK);
    put_number(parts[1], 9, 2000);
    assert_int_equal(kvl_stack_tier_create(parts, 0, &stack, NULL), KVL_ERR_INVALID);
    assert_int_equal(kvl_stack_tier_create(parts, 2, &stack, NULL), KVL_OK);
    const kvl_digest id = kvl_store_sample_id(9);
    assert_false(parts[0]->ops->has(parts[0], &id));
    assert_true(get_number(stack, 9));
    assert_true(parts[0]->ops->has(parts[0], &id));
    assert_true(get_number(stack, 9));
    assert_int_equal(stats_of(parts[1]).hits, 1);
    put_number(stack, 10, 2000);
    assert_int_equal(stats_of(parts[0]).n_containers, 2);
    assert_int_equal(stats_of(parts[1]).n_containers, 2);
    assert_int_equal(parts[0]->ops->remove(parts[0], &id, NULL), KVL_OK);
    assert_int_equal(stack->ops->remove(stack, &id, NULL), KVL_OK);
    assert_int_equal(stack->ops->remove(stack, &id, NULL), KVL_ERR_NOT_FOUND);
    stack->ops->destroy(stack);
}

static void test_a_store_needs_a_cap(void **state)
{
    (void)state;
    kvl_tier *tier = NULL;
    kvl_error error;
    assert_int_equal(kvl_memory_tier_create(0, &tier, &error), KVL_ERR_INVALID);
    assert_non_null(strstr(error.text, "bytes_max is 0"));
    assert_null(tier);
}

/* Median times of a 16 MiB container in each tier, and of a small one in memory. */
static int bench(void)
{
    enum { ROUNDS = 21, SMALL = 100000 };
    const kvl_clock *clock = kvl_clock_system();
    for (int kind = 0; kind < N_KINDS; kind++) {
        for (int durable = 0; durable <= (kind == LMDB); durable++) {
            kvl_store_place place;
            kvl_store_place_make(&place);
            kvl_tier *tier = NULL;
            const kvl_lmdb_tier_options options = {place.path, (uint64_t)4 << 30,
                                                   kvl_store_fingerprint(), durable == 1, NULL};
            const kvl_status status = durable
                                          ? kvl_lmdb_tier_create(&options, &tier, NULL)
                                          : tier_make(kind, place.path, (uint64_t)4 << 30, &tier);
            if (status != KVL_OK) return 1;
            int64_t put_ns[ROUNDS], get_ns[ROUNDS];
            for (uint32_t i = 0; i < ROUNDS; i++) {
                kvl_container *container = kvl_store_sample(i, 16u << 20);
                const kvl_digest id = kvl_store_sample_id(i);
                int64_t start = kvl_clock_now(clock);
                if (tier->ops->put(tier, container, NULL) != KVL_OK) return 1;
                put_ns[i] = kvl_clock_now(clock) - start;
                kvl_container_release(container);
                start = kvl_clock_now(clock);
                if (tier->ops->get(tier, &id, true, &container, NULL) != KVL_OK) return 1;
                get_ns[i] = kvl_clock_now(clock) - start;
                kvl_container_release(container);
            }
            (void)printf("%s%s: 16 MiB put %.2f ms, checked get %.2f ms\n", NAMES[kind],
                         durable ? ", durable" : "", kvl_ns_to_ms(kvl_store_median(put_ns, ROUNDS)),
                         kvl_ns_to_ms(kvl_store_median(get_ns, ROUNDS)));
            put_number(tier, 1000, 3000);
            const kvl_digest id = kvl_store_sample_id(1000);
            const int64_t start = kvl_clock_now(clock);
            for (int i = 0; i < SMALL; i++) {
                kvl_container *container = NULL;
                if (tier->ops->get(tier, &id, false, &container, NULL) != KVL_OK) return 1;
                kvl_container_release(container);
            }
            (void)printf("%s: 3 KiB get %.0f ns\n", NAMES[kind],
                         (double)(kvl_clock_now(clock) - start) / SMALL);
            tier->ops->destroy(tier);
            kvl_store_place_end(&place);
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    static int kinds[N_KINDS] = {MEMORY, LMDB, STACK};
    static const struct {
        const char *name;
        void (*run)(void **state);
    } shared[] = {
        {"behaves_like_a_set", test_behaves_like_a_set},
        {"listing_stops_when_told", test_listing_stops_when_told},
        {"putting_twice_changes_nothing", test_putting_twice_changes_nothing},
        {"what_cannot_be_kept_is_refused", test_what_cannot_be_kept_is_refused},
        {"the_oldest_used_goes_first", test_the_oldest_used_goes_first},
        {"a_held_container_outlives_eviction", test_a_held_container_outlives_eviction},
        {"threads_see_whole_containers", test_threads_see_whole_containers},
        {"failing_allocations_change_nothing", test_failing_allocations_change_nothing},
    };
    enum { N_SHARED = sizeof shared / sizeof *shared, N_OWN = 4 };
    if (argc > 1 && strcmp(argv[1], "bench") == 0) return bench();
    kvl_log_set_level(KVL_LOG_ERROR);
    static char names[N_KINDS * N_SHARED][64];
    struct CMUnitTest tests[N_KINDS * N_SHARED + N_OWN] = {
        cmocka_unit_test(test_damaged_memory_is_a_miss),
        cmocka_unit_test(test_a_scan_does_not_empty_memory),
        cmocka_unit_test(test_stack_fills_its_faster_tier),
        cmocka_unit_test(test_a_store_needs_a_cap),
    };
    for (size_t i = 0; i < N_KINDS * N_SHARED; i++) {
        (void)snprintf(names[i], sizeof names[i], "%s: %s", NAMES[i % N_KINDS],
                       shared[i / N_KINDS].name);
        tests[N_OWN + i] = (struct CMUnitTest){.name = names[i],
                                               .test_func = shared[i / N_KINDS].run,
                                               .initial_state = &kinds[i % N_KINDS]};
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
