/* store/policy, store/trace: each policy chooses what its naive twin does, whatever is asked; a
 * scan pushes out nothing under those that promise it; what others hold stays; traces are read as
 * they were written, and hostile ones are refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "store/policy.h"
#include "store/trace.h"
#include "store_sample.h"
#include "test_random.h"

/* ---- the twins: arrays, the oldest first ---- */

enum { THINGS = 64, ROOM = 1000, STEPS = 20000 };

typedef struct row {
    int things[4 * THINGS];
    int n;
} row;

typedef struct twin {
    kvl_policy_kind kind;
    row rows[2], ghosts;
    int uses[THINGS];
    uint64_t size[THINGS];
} twin;

static int place_in(const row *r, int thing)
{
    for (int i = 0; i < r->n; i++) {
        if (r->things[i] == thing) return i;
    }
    return -1;
}

static bool drop(row *r, int thing)
{
    const int at = place_in(r, thing);
    if (at < 0) return false;
    memmove(&r->things[at], &r->things[at + 1], (size_t)(r->n - at - 1) * sizeof(int));
    r->n--;
    return true;
}

static void push(row *r, int thing)
{
    r->things[r->n++] = thing;
}

static uint64_t bytes_in(const twin *t, const row *r)
{
    uint64_t sum = 0;
    for (int i = 0; i < r->n; i++) sum += t->size[r->things[i]];
    return sum;
}

static void twin_add(twin *t, int thing)
{
    t->uses[thing] = 0;
    const bool was_here = t->kind == KVL_POLICY_S3FIFO && drop(&t->ghosts, thing);
    push(&t->rows[was_here ? 1 : 0], thing);
}

static void twin_use(twin *t, int thing)
{
    if (t->kind == KVL_POLICY_S3FIFO) {
        if (t->uses[thing] < 3) t->uses[thing]++;
        return;
    }
    (void)(drop(&t->rows[0], thing) || drop(&t->rows[1], thing));
    push(&t->rows[t->kind == KVL_POLICY_LRU ? 0 : 1], thing);
    while (bytes_in(t, &t->rows[1]) > ROOM / 5 * 4) {
        const int oldest = t->rows[1].things[0];
        (void)drop(&t->rows[1], oldest);
        push(&t->rows[0], oldest);
    }
}

/* Algorithm 1 of the paper, with bytes for counts. */
static int twin_evict_s3fifo(twin *t)
{
    for (;;) {
        const bool is_small =
            t->rows[1].n == 0 || (t->rows[0].n > 0 && bytes_in(t, &t->rows[0]) >= ROOM / 10);
        row *from = &t->rows[is_small ? 0 : 1];
        const int thing = from->things[0];
        (void)drop(from, thing);
        if (is_small && t->uses[thing] > 1) {
            push(&t->rows[1], thing);
            t->uses[thing] = 0;
        } else if (!is_small && t->uses[thing] > 0) {
            push(&t->rows[1], thing);
            t->uses[thing]--;
        } else {
            if (!is_small) return thing;
            while (t->ghosts.n > 0 && bytes_in(t, &t->ghosts) + t->size[thing] > ROOM - ROOM / 10)
                (void)drop(&t->ghosts, t->ghosts.things[0]);
            push(&t->ghosts, thing);
            return thing;
        }
    }
}

static int twin_evict(twin *t)
{
    if (t->kind == KVL_POLICY_S3FIFO) return twin_evict_s3fifo(t);
    row *from = &t->rows[t->rows[0].n > 0 ? 0 : 1];
    const int thing = from->things[0];
    (void)drop(from, thing);
    return thing;
}

/* ---- against the twins ---- */

static void compare_with_twin(kvl_random *random, kvl_policy_kind kind)
{
    kvl_policy policy;
    kvl_policy_entry entries[THINGS];
    bool is_there[THINGS] = {false};
    static twin t;
    memset(&t, 0, sizeof t);
    t.kind = kind;
    assert_int_equal(kvl_policy_init(&policy, kind, ROOM, NULL), KVL_OK);
    for (int i = 0; i < THINGS; i++) {
        entries[i].entry.id = kvl_store_sample_id((uint32_t)i);
        t.size[i] = entries[i].n_bytes = 1 + kvl_test_below(random, 120);
    }
    for (int step = 0; step < STEPS; step++) {
        /* Some are asked for more often than others. */
        const uint32_t limit = 1 + kvl_test_below(random, THINGS);
        const int thing = (int)kvl_test_below(random, limit);
        if (is_there[thing]) {
            if (kvl_test_below(random, 40) == 0) {
                kvl_policy_remove(&policy, &entries[thing]);
                (void)(drop(&t.rows[0], thing) || drop(&t.rows[1], thing));
                is_there[thing] = false;
                continue;
            }
            kvl_policy_use(&policy, &entries[thing]);
            twin_use(&t, thing);
            continue;
        }
        while (policy.bytes[0] + policy.bytes[1] + entries[thing].n_bytes > ROOM) {
            const kvl_policy_entry *victim = kvl_policy_evict(&policy, NULL);
            assert_non_null(victim);
            assert_int_equal(victim - entries, twin_evict(&t));
            is_there[victim - entries] = false;
        }
        kvl_policy_add(&policy, &entries[thing]);
        twin_add(&t, thing);
        is_there[thing] = true;
    }
    kvl_policy_deinit(&policy);
}

static void test_each_policy_does_as_its_twin(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (uint32_t k = 0; k < KVL_POLICIES; k++) {
        for (int round = 0; round < 5; round++) compare_with_twin(&random, (kvl_policy_kind)k);
    }
    assert_int_equal(kvl_alloc_live(), 0);
}

/* ---- what is held ---- */

static const kvl_policy_entry *held[THINGS];
static int n_held;

static bool is_not_held(const kvl_policy_entry *entry)
{
    for (int i = 0; i < n_held; i++) {
        if (held[i] == entry) return false;
    }
    return true;
}

/* Whatever is held is never chosen, and all the rest is before it says that none is left. */
static void test_what_is_held_stays(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (uint32_t k = 0; k < KVL_POLICIES; k++) {
        kvl_policy policy;
        kvl_policy_entry entries[THINGS];
        assert_int_equal(kvl_policy_init(&policy, (kvl_policy_kind)k, THINGS, NULL), KVL_OK);
        n_held = 0;
        for (int i = 0; i < THINGS; i++) {
            entries[i].entry.id = kvl_store_sample_id((uint32_t)i);
            entries[i].n_bytes = 1;
            kvl_policy_add(&policy, &entries[i]);
            if (kvl_test_below(&random, 2) == 0) kvl_policy_use(&policy, &entries[i]);
            if (kvl_test_below(&random, 2) == 0) held[n_held++] = &entries[i];
        }
        int n_evicted = 0;
        const kvl_policy_entry *victim = kvl_policy_evict(&policy, is_not_held);
        for (; victim != NULL; victim = kvl_policy_evict(&policy, is_not_held)) {
            assert_true(is_not_held(victim));
            n_evicted++;
        }
        assert_int_equal(n_evicted, THINGS - n_held);
        kvl_policy_deinit(&policy);
    }
}

/* ---- traces ---- */

static void add(kvl_trace *trace, size_t *capacity, uint32_t number, uint64_t n_bytes,
                kvl_access_kind kind)
{
    if (trace->n_accesses == *capacity) {
        *capacity = *capacity == 0 ? 1024 : 2 * *capacity;
        trace->accesses = kvl_realloc(trace->accesses, *capacity * sizeof *trace->accesses);
        assert_non_null(trace->accesses);
    }
    trace->accesses[trace->n_accesses] = (kvl_access_record){.time_us = trace->n_accesses,
                                                             .id = kvl_store_sample_id(number),
                                                             .n_bytes = n_bytes,
                                                             .kind = kind};
    trace->n_accesses++;
}

/* Twenty things that all ask for again and again, and between the rounds a scan of 400 that nobody
 * asks for twice, through room for 100. */
static void make_scans(kvl_trace *trace, size_t *capacity)
{
    uint32_t scanned = 1000;
    for (int round = 0; round < 30; round++) {
        for (int turn = 0; turn < 3; turn++) {
            for (uint32_t i = 0; i < 20; i++) add(trace, capacity, i, 1, KVL_ACCESS_MISS);
        }
        for (int i = 0; i < 400; i++) add(trace, capacity, scanned++, 1, KVL_ACCESS_MISS);
    }
}

static void test_a_scan_pushes_out_nothing(void **state)
{
    (void)state;
    kvl_trace trace = {NULL, 0};
    size_t capacity = 0;
    kvl_replay replays[KVL_POLICIES];
    kvl_policy_kind best;
    make_scans(&trace, &capacity);
    assert_int_equal(kvl_trace_choose(&trace, 100, replays, &best, NULL), KVL_OK);
    const uint64_t n_hot = 30 * 60;
    /* All but the first sight of each; LRU begins every round anew. */
    assert_int_equal(replays[KVL_POLICY_SLRU].n_hits, n_hot - 20);
    assert_int_equal(replays[KVL_POLICY_S3FIFO].n_hits, n_hot - 20);
    assert_int_equal(replays[KVL_POLICY_LRU].n_hits, n_hot - 30 * 20);
    assert_int_equal(best, KVL_POLICY_SLRU);
    kvl_trace_deinit(&trace);
}

/* A scan of pairs: each comes twice in a row and never again. Segmented LRU protects all and so
 * loses what all ask for; S3-FIFO's count of two keeps them out of the main queue. */
static void test_the_best_on_the_trace_is_chosen(void **state)
{
    (void)state;
    kvl_trace trace = {NULL, 0};
    size_t capacity = 0;
    kvl_replay replays[KVL_POLICIES];
    kvl_policy_kind best;
    uint32_t pair = 1000;
    for (int round = 0; round < 100; round++) {
        for (uint32_t i = 0; i < 60; i++) {
            for (int k = 0; k < (round == 0 ? 3 : 1); k++)
                add(&trace, &capacity, i, 1, KVL_ACCESS_MISS);
            for (int k = 0; k < 2; k++) add(&trace, &capacity, pair, 1, KVL_ACCESS_MISS);
            pair++;
        }
    }
    assert_int_equal(kvl_trace_choose(&trace, 100, replays, &best, NULL), KVL_OK);
    assert_int_equal(best, KVL_POLICY_S3FIFO);
    assert_true(replays[KVL_POLICY_S3FIFO].bytes_hit > replays[KVL_POLICY_SLRU].bytes_hit);
    assert_true(replays[KVL_POLICY_S3FIFO].bytes_hit > replays[KVL_POLICY_LRU].bytes_hit);
    kvl_trace_deinit(&trace);
}

/* A tier does what the replay of its accesses says, under each policy. */
static void test_a_tier_does_as_the_replay(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (uint32_t k = 0; k < KVL_POLICIES; k++) {
        kvl_trace trace = {NULL, 0};
        size_t capacity = 0;
        kvl_tier *tier = NULL;
        kvl_tier_stats stats;
        kvl_replay replay;
        kvl_container *one = kvl_store_sample(0, 100);
        const uint64_t bytes = kvl_container_n_bytes(one);
        kvl_container_release(one);
        const kvl_memory_tier_options options = {.bytes_max = 10 * bytes,
                                                 .policy = (kvl_policy_kind)k};
        assert_int_equal(kvl_memory_tier_create_with(&options, &tier, NULL), KVL_OK);
        for (int i = 0; i < 2000; i++) {
            const uint32_t number = kvl_test_below(&random, 1 + kvl_test_below(&random, 30));
            const kvl_digest id = kvl_store_sample_id(number);
            kvl_container *container = NULL;
            add(&trace, &capacity, number, bytes, KVL_ACCESS_MISS);
            if (tier->ops->get(tier, &id, false, &container, NULL) == KVL_ERR_NOT_FOUND) {
                container = kvl_store_sample(number, 100);
                assert_int_equal(tier->ops->put(tier, container, NULL), KVL_OK);
            }
            kvl_container_release(container);
        }
        tier->ops->stats(tier, &stats);
        tier->ops->destroy(tier);
        assert_int_equal(kvl_trace_replay(&trace, (kvl_policy_kind)k, 10 * bytes, &replay, NULL),
                         KVL_OK);
        assert_int_equal(replay.n_hits, stats.hits);
        assert_int_equal(replay.n_evicted, stats.evictions);
        kvl_trace_deinit(&trace);
    }
    assert_int_equal(kvl_alloc_live(), 0);
}

/* What a miss says of the size decides whether it brought anything in. */
static void test_what_a_miss_brings_in(void **state)
{
    (void)state;
    kvl_trace trace = {NULL, 0};
    size_t capacity = 0;
    kvl_replay replay;
    add(&trace, &capacity, 1, 0, KVL_ACCESS_MISS); /* to memory, then to the disk: one question */
    add(&trace, &capacity, 2, 0, KVL_ACCESS_MISS);
    add(&trace, &capacity, 1, 5, KVL_ACCESS_MISS);
    add(&trace, &capacity, 2, 0, KVL_ACCESS_MISS); /* nowhere: nothing comes in... */
    add(&trace, &capacity, 1, 5, KVL_ACCESS_HIT);
    add(&trace, &capacity, 2, 5, KVL_ACCESS_PUT); /* ...before this */
    add(&trace, &capacity, 2, 5, KVL_ACCESS_HIT);
    assert_int_equal(kvl_trace_replay(&trace, KVL_POLICY_LRU, 10, &replay, NULL), KVL_OK);
    assert_int_equal(replay.n_gets, 4);
    assert_int_equal(replay.n_hits, 2);
    assert_int_equal(replay.bytes_asked, 20);
    assert_int_equal(replay.bytes_hit, 10);
    assert_int_equal(replay.n_evicted, 0);
    kvl_trace_deinit(&trace);
}

/* ---- files ---- */

static void write_trace(const char *path, const char *text)
{
    assert_int_equal(kvl_file_write(path, text, strlen(text), NULL), KVL_OK);
}

static void test_a_trace_is_read_as_it_was_written(void **state)
{
    (void)state;
    kvl_store_place place;
    char path[96], text[4096] = KVL_TRACE_HEAD;
    kvl_trace trace;
    kvl_error error;
    kvl_store_place_make(&place);
    (void)snprintf(path, sizeof path, "%s/t", place.path);
    for (uint32_t i = 0; i < 9; i++) {
        char line[KVL_TRACE_LINE_BYTES];
        const kvl_access_record access = {.time_us = UINT64_MAX - i,
                                          .id = kvl_store_sample_id(i),
                                          .n_bytes = i * 1000,
                                          .kind = (kvl_access_kind)(1 + i % 3)};
        const size_t n = kvl_trace_line(&access, i % 2 == 0 ? "a" : "b", line);
        assert_int_equal(n, strlen(line));
        (void)strcat(text, line);
    }
    (void)strcat(text, "12 a 00"); /* the machine stopped here */
    write_trace(path, text);
    assert_int_equal(kvl_trace_read(path, "a", &trace, &error), KVL_OK);
    assert_int_equal(trace.n_accesses, 5);
    const kvl_digest id = kvl_store_sample_id(4);
    assert_int_equal(trace.accesses[2].time_us, UINT64_MAX - 4);
    assert_int_equal(trace.accesses[2].n_bytes, 4000);
    assert_int_equal(trace.accesses[2].kind, KVL_ACCESS_MISS);
    assert_memory_equal(&trace.accesses[2].id, &id, sizeof id);
    kvl_trace_deinit(&trace);
    assert_int_equal(kvl_trace_read(path, NULL, &trace, &error), KVL_OK);
    assert_int_equal(trace.n_accesses, 9);
    kvl_trace_deinit(&trace);
    kvl_store_place_end(&place);
}

static void test_what_is_no_trace_is_refused(void **state)
{
    (void)state;
#define ID "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
    static const char *const texts[] = {
        "",
        "# kvloom trace 2\n",
        KVL_TRACE_HEAD "1 a " ID " 5 hit extra\n",
        KVL_TRACE_HEAD "1 a " ID " 5\n",
        KVL_TRACE_HEAD "-1 a " ID " 5 hit\n",
        KVL_TRACE_HEAD "1 a " ID " 99999999999999999999 hit\n",
        KVL_TRACE_HEAD "1 a " ID " 5 eaten\n",
        KVL_TRACE_HEAD "1 a 0011 5 hit\n",
        KVL_TRACE_HEAD "1  " ID " 5 hit\n",
        KVL_TRACE_HEAD "1 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa " ID " 5 hit\n",
        KVL_TRACE_HEAD "\n",
    };
    kvl_store_place place;
    char path[96];
    kvl_trace trace;
    kvl_store_place_make(&place);
    (void)snprintf(path, sizeof path, "%s/t", place.path);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        kvl_error error = {.text = ""};
        write_trace(path, texts[i]);
        assert_int_equal(kvl_trace_read(path, NULL, &trace, &error), KVL_ERR_MALFORMED);
        assert_non_null(strstr(error.text, path));
        assert_null(trace.accesses);
    }
    (void)snprintf(path, sizeof path, "%s/none", place.path);
    assert_int_equal(kvl_trace_read(path, NULL, &trace, NULL), KVL_ERR_NOT_FOUND);
    kvl_store_place_end(&place);
}

static void test_every_allocation_may_fail(void **state)
{
    (void)state;
    kvl_trace trace = {NULL, 0};
    size_t capacity = 0;
    kvl_replay replays[KVL_POLICIES];
    kvl_policy_kind best;
    for (uint32_t i = 0; i < 50; i++) add(&trace, &capacity, i % 7, 3, KVL_ACCESS_MISS);
    const int64_t before = kvl_alloc_live();
    kvl_status status = KVL_ERR_NO_MEMORY;
    for (int64_t n = 0; status == KVL_ERR_NO_MEMORY; n++) {
        kvl_alloc_fail_after(n);
        status = kvl_trace_choose(&trace, 12, replays, &best, NULL);
        kvl_alloc_fail_after(-1);
        assert_int_equal(kvl_alloc_live(), before);
        assert_true(n < 100);
    }
    assert_int_equal(status, KVL_OK);
    assert_int_equal(kvl_trace_replay(&trace, KVL_POLICY_LRU, 0, &replays[0], NULL),
                     KVL_ERR_INVALID);
    kvl_trace_deinit(&trace);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_each_policy_does_as_its_twin),
        cmocka_unit_test(test_what_is_held_stays),
        cmocka_unit_test(test_a_scan_pushes_out_nothing),
        cmocka_unit_test(test_the_best_on_the_trace_is_chosen),
        cmocka_unit_test(test_a_tier_does_as_the_replay),
        cmocka_unit_test(test_what_a_miss_brings_in),
        cmocka_unit_test(test_a_trace_is_read_as_it_was_written),
        cmocka_unit_test(test_what_is_no_trace_is_refused),
        cmocka_unit_test(test_every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
