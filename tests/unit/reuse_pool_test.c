/* reuse/anchor: what the pool keeps and what it refuses: limits, eviction, hostile containers,
 * memory that cannot be had. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "reuse/anchor_layout.h"
#include "reuse_anchor_case.h"

#include <math.h>
#include <stdlib.h>

static const kvl_kv_view small = {.n_layers = 3, .n_kv_heads = 2, .head_dim = 4};

/* A slot of `n_tokens` tokens with 3 tokens after it; the number is its id. */
static example small_example(kvl_random *random, uint64_t number, uint32_t n_tokens)
{
    kv after = kv_random(random, &small, 3);
    const example made = example_random(random, number, &small, n_tokens, &after);
    kv_free(&after);
    return made;
}

static void measure_new(kvl_anchor_pool *pool, kvl_random *random, uint64_t number)
{
    example e = small_example(random, number, 5);
    example_measure(pool, &e);
    example_free(&e);
}

/* Whether the text of that number has an anchor. */
static bool holds(kvl_anchor_pool *pool, uint64_t number)
{
    const float nothing[3 * 5 * 2 * 4] = {0};
    const kvl_kv_view view = {3, 5, 2, 4, nothing, nothing};
    const kvl_digest id = digest_of(number);
    kvl_anchor_match match;
    kvl_anchor_pool_match(pool, &question, &id, &view, &match);
    return match.verdict == KVL_ANCHOR_EXACT;
}

static void use(kvl_anchor_pool *pool, uint64_t number)
{
    float keys[3 * 5 * 2 * 4] = {0}, values[3 * 5 * 2 * 4] = {0};
    const kvl_kv_view view = {3, 5, 2, 4, keys, values};
    const kvl_digest id = digest_of(number);
    assert_int_equal(
        kvl_anchor_pool_correct(pool, &question, &id, &view, keys, values, NULL, NULL, NULL, NULL),
        KVL_OK);
}

/* Invariant 10: never more than n_anchors_max; who goes is among the `window` oldest and has been
 * used least, the oldest of equals. Against a list kept here. */
static void test_eviction_follows_the_rule(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 20; round++) {
        kvl_anchor_options options = exact_options();
        options.n_anchors_max = 1 + kvl_test_below(&random, 9);
        options.window = 1 + kvl_test_below(&random, 6);
        kvl_anchor_pool *pool = pool_of(&options);
        struct {
            uint64_t number;
            uint32_t uses;
        } list[16];
        uint32_t n = 0;
        uint64_t n_evicted = 0;
        for (uint64_t number = 0; number < 40; number++) {
            for (uint32_t i = 0; i < n; i++) {
                for (uint32_t k = kvl_test_below(&random, 3); k > 0; k--) {
                    use(pool, list[i].number);
                    list[i].uses++;
                }
            }
            if (n == options.n_anchors_max) {
                uint32_t victim = 0;
                for (uint32_t i = 1; i < n && i < options.window; i++) {
                    if (list[i].uses < list[victim].uses) victim = i;
                }
                for (uint32_t i = victim; i + 1 < n; i++) list[i] = list[i + 1];
                n--;
                n_evicted++;
                for (uint32_t i = 0; i < n; i++) list[i].uses /= 2; /* ageing */
            }
            measure_new(pool, &random, number);
            list[n].number = number;
            list[n++].uses = 0;
            kvl_anchor_stats stats;
            kvl_anchor_pool_stats(pool, &stats);
            assert_int_equal(stats.n_anchors, n);
            assert_int_equal(stats.evictions, n_evicted);
            for (uint32_t i = 0; i < n; i++) assert_true(holds(pool, list[i].number));
        }
        kvl_anchor_pool_destroy(pool);
    }
}

/* Smallest set with `mass` of the weight counts as used: seen through who is evicted. */
static void test_anchors_with_the_mass_count_as_used(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_anchor_options options = exact_options();
    options.n_anchors_max = 3;
    options.window = 3;
    options.temperature = 0.001F;
    kvl_anchor_pool *pool = pool_of(&options);
    example near = small_example(&random, 0, 5);
    example_measure(pool, &near); /* oldest: would go first if nobody were used */
    measure_new(pool, &random, 1);
    measure_new(pool, &random, 2);
    near.base_id = digest_of(99); /* the same text under another id: all weight goes to anchor 0 */
    corrected out = correct(pool, &near);
    corrected_free(&out);
    measure_new(pool, &random, 3);
    assert_true(holds(pool, 0));
    assert_false(holds(pool, 1));
    assert_true(holds(pool, 2));
    assert_true(holds(pool, 3));
    example_free(&near);
    kvl_anchor_pool_destroy(pool);
}

static void test_bytes_stay_below_the_limit(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_anchor_options options = exact_options();
    options.bytes_max = 20000;
    options.n_anchors_max = 64;
    kvl_anchor_pool *pool = pool_of(&options);
    kvl_anchor_stats stats;
    for (uint64_t number = 0; number < 60; number++) {
        example e = small_example(&random, number, 1 + kvl_test_below(&random, 20));
        example_measure(pool, &e);
        example_free(&e);
        kvl_anchor_pool_stats(pool, &stats);
        assert_true(stats.bytes <= options.bytes_max);
        assert_true(stats.n_anchors > 0);
    }
    assert_true(stats.evictions > 0);
    /* One that can never fit is refused, and nothing goes for it. */
    const uint32_t n_before = stats.n_anchors;
    example huge = small_example(&random, 1000, 400);
    kvl_container *container = NULL;
    kvl_error error;
    assert_int_equal(kvl_anchor_pool_measure(
                         pool, &question, &model, &huge.base_id, &huge.base.view, &huge.real.view,
                         &huge.after_base.view, &huge.after_real.view, &container, &error),
                     KVL_ERR_TOO_LARGE);
    assert_null(container);
    assert_non_null(strstr(error.text, "bytes_max"));
    kvl_anchor_pool_stats(pool, &stats);
    assert_int_equal(stats.n_anchors, n_before);
    example_free(&huge);
    kvl_anchor_pool_destroy(pool);
}

static void test_options_are_checked(void **state)
{
    (void)state;
    const char *const fields[] = {
        "n_anchors_max", "n_anchors_max", "n_anchors_min", "n_anchors_min", "window",
        "temperature",   "temperature",   "mass",          "entropy_share", "distance_max",
        "coverage_min",  "coverage_min",  "dtype"};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        kvl_anchor_options options = kvl_anchor_default_options();
        switch (i) {
        case 0: options.n_anchors_max = 0; break;
        case 1: options.n_anchors_max = KVL_ANCHORS_PER_SLOT_MAX + 1; break;
        case 2: options.n_anchors_min = 0; break;
        case 3: options.n_anchors_min = options.n_anchors_max + 1; break;
        case 4: options.window = 0; break;
        case 5: options.temperature = 0.0F; break;
        case 6: options.temperature = INFINITY; break;
        case 7: options.mass = 1.5F; break;
        case 8: options.entropy_share = NAN; break;
        case 9: options.distance_max = -1.0F; break;
        case 10: options.coverage_min = 0.01F; break;
        case 11: options.coverage_min = 1.5F; break;
        default: options.dtype = KVL_KV_BF16; break;
        }
        kvl_anchor_pool *pool = NULL;
        kvl_error error;
        assert_int_equal(kvl_anchor_pool_create(&options, &pool, &error), KVL_ERR_OUT_OF_RANGE);
        assert_null(pool);
        assert_non_null(strstr(error.text, fields[i]));
    }
    kvl_anchor_pool_destroy(NULL);
}

/* A container of a measured anchor, and the pool's answer to it in a pool of the given options. */
static kvl_container *container_of(const kvl_anchor_options *options, const example *e)
{
    kvl_anchor_pool *pool = pool_of(options);
    kvl_container *container = NULL;
    assert_int_equal(kvl_anchor_pool_measure(pool, &question, &model, &e->base_id, &e->base.view,
                                             &e->real.view, &e->after_base.view,
                                             &e->after_real.view, &container, NULL),
                     KVL_OK);
    kvl_anchor_pool_destroy(pool);
    return container;
}

/* Stored, sent as bytes, read and added elsewhere, an anchor corrects as where it was measured. */
static void test_anchor_travels(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 40; round++) {
        kvl_anchor_options options = exact_options();
        options.mode = round % 2 == 0 ? KVL_ANCHOR_SCALE_FREE : KVL_ANCHOR_PAPER;
        options.dtype = round % 4 < 2 ? KVL_KV_F32 : KVL_KV_INT8;
        example e = small_example(&random, 1, 1 + kvl_test_below(&random, 30));
        example request = small_example(&random, 2, e.base.view.n_tokens);
        kvl_anchor_pool *here = pool_of(&options);
        kvl_container *container = NULL;
        assert_int_equal(kvl_anchor_pool_measure(here, &question, &model, &e.base_id, &e.base.view,
                                                 &e.real.view, &e.after_base.view,
                                                 &e.after_real.view, &container, NULL),
                         KVL_OK);
        const kvl_container_info *info = kvl_container_info_of(container);
        assert_int_equal(info->kind, KVL_CONTAINER_ANCHOR);
        assert_memory_equal(info->extra, question.template_id.bytes, KVL_ANCHOR_PREFIX_BYTES);
        size_t n_bytes = 0;
        const void *bytes = kvl_container_bytes(container, &n_bytes);
        kvl_container *copy = NULL;
        assert_int_equal(kvl_container_from_bytes(bytes, n_bytes, &copy, NULL), KVL_OK);
        kvl_container_release(container);
        kvl_anchor_pool *there = pool_of(&options);
        kvl_error error;
        assert_int_equal(kvl_anchor_pool_add(there, &model, copy, &error), KVL_OK);
        kvl_container_release(copy);
        corrected one = correct(here, &request);
        corrected other = correct(there, &request);
        assert_same_bits(&one.slot, &other.slot);
        assert_same_bits(&one.after, &other.after);
        corrected_free(&one);
        corrected_free(&other);
        example_free(&e);
        example_free(&request);
        kvl_anchor_pool_destroy(here);
        kvl_anchor_pool_destroy(there);
    }
}

/* A default-mode pool reads what a paper-mode host measured, and weighs it as its own. */
static void test_modes_read_each_other(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_anchor_options options = exact_options();
    kvl_anchor_options paper = options;
    paper.mode = KVL_ANCHOR_PAPER;
    example e = small_example(&random, 1, 6), f = small_example(&random, 2, 6);
    example request = small_example(&random, 3, 6);
    kvl_anchor_pool *own = pool_of(&options);
    example_measure(own, &e);
    example_measure(own, &f);
    kvl_anchor_pool *mixed = pool_of(&options);
    kvl_container *container = container_of(&paper, &e);
    assert_int_equal(kvl_anchor_pool_add(mixed, &model, container, NULL), KVL_OK);
    kvl_container_release(container);
    example_measure(mixed, &f);
    corrected one = correct(own, &request);
    corrected other = correct(mixed, &request);
    assert_same_bits(&one.slot, &other.slot);
    corrected_free(&one);
    corrected_free(&other);

    container = container_of(&options, &e);
    kvl_anchor_pool *strict = pool_of(&paper);
    kvl_error error;
    assert_int_equal(kvl_anchor_pool_add(strict, &model, container, &error), KVL_ERR_FOREIGN);
    assert_non_null(strstr(error.text, "keys of the base"));
    kvl_container_release(container);
    example_free(&e);
    example_free(&f);
    example_free(&request);
    kvl_anchor_pool_destroy(own);
    kvl_anchor_pool_destroy(mixed);
    kvl_anchor_pool_destroy(strict);
}

/* Makes a container like `from` with another info, and the same blocks as far as they go. */
static kvl_container *rebuilt(const kvl_container *from, const kvl_container_info *info)
{
    kvl_container *made = NULL;
    assert_int_equal(kvl_container_create(info, &made, NULL), KVL_OK);
    const uint32_t n = kvl_container_n_blocks(made);
    for (uint32_t l = 0; l < n && l < kvl_container_n_blocks(from); l++) {
        size_t n_from = 0, n_to = 0;
        const void *source = kvl_container_block_view(from, l, &n_from);
        void *target = kvl_container_block(made, l, &n_to);
        memcpy(target, source, n_from < n_to ? n_from : n_to);
    }
    return made;
}

static void assert_refused(kvl_container *container, kvl_status wanted)
{
    kvl_container_seal(container);
    const kvl_anchor_options options = exact_options();
    kvl_anchor_pool *pool = pool_of(&options);
    kvl_error error = {.status = KVL_OK};
    const kvl_status status = kvl_anchor_pool_add(pool, &model, container, &error);
    assert_int_equal(kvl_status_class_of(status), KVL_CLASS_MISS);
    if (wanted != KVL_OK) assert_int_equal(status, wanted);
    assert_int_equal(error.status, status);
    assert_true(strlen(error.text) > 0);
    kvl_anchor_stats stats;
    kvl_anchor_pool_stats(pool, &stats);
    assert_int_equal(stats.n_anchors, 0);
    assert_int_equal(stats.bytes, 0);
    kvl_anchor_pool_destroy(pool);
    kvl_container_release(container);
}

/* Valid containers, as far as the container room can tell, with lies in what belongs to anchors. */
static void test_hostile_headers_are_refused(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_anchor_options options = exact_options();
    options.dtype = KVL_KV_INT8;
    example e = small_example(&random, 1, 5);
    kvl_container *good = container_of(&options, &e);
    const kvl_container_info *info = kvl_container_info_of(good);
    uint8_t extra[KVL_ANCHOR_EXTRA_BYTES + 8] = {0};

    /* Any bit of the extra. */
    for (uint32_t bit = 0; bit < 8 * KVL_ANCHOR_EXTRA_BYTES; bit++) {
        memcpy(extra, info->extra, KVL_ANCHOR_EXTRA_BYTES);
        extra[bit / 8] ^= (uint8_t)(1U << bit % 8);
        kvl_container_info changed = *info;
        changed.extra = extra;
        assert_refused(rebuilt(good, &changed), KVL_OK);
    }
    memcpy(extra, info->extra, KVL_ANCHOR_EXTRA_BYTES);
    for (size_t n = 0; n < sizeof extra; n++) {
        if (n == KVL_ANCHOR_EXTRA_BYTES) continue;
        kvl_container_info changed = *info;
        changed.extra = n == 0 ? NULL : extra;
        changed.n_extra_bytes = n;
        assert_refused(rebuilt(good, &changed), KVL_ERR_DAMAGED);
    }
    /* Shape and size. */
    for (int i = 0; i < 8; i++) {
        kvl_container_info changed = *info;
        switch (i) {
        case 0: changed.n_layers = 2; break;
        case 1: changed.n_kv_heads = 1; break;
        case 2: changed.head_dim = 3; break;
        case 3: changed.head_dim = KVL_HEAD_DIM_MAX + 1; break;
        case 4: changed.block_bytes -= 64; break;
        case 5: changed.block_bytes += 64; break;
        case 6: changed.dtype = KVL_KV_F32; break;
        default: changed.id.bytes[0] ^= 1; break;
        }
        assert_refused(rebuilt(good, &changed), KVL_ERR_DAMAGED);
    }
    kvl_container_info changed = *info;
    changed.fingerprint.bytes[3] ^= 1;
    assert_refused(rebuilt(good, &changed), KVL_ERR_FOREIGN);
    kvl_container_release(good);
    example_free(&e);
}

/* Numbers that no KV has: a scale or a float that is infinite, none, negative or huge. */
static void test_hostile_numbers_are_refused(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    example e = small_example(&random, 1, 5);
    const uint16_t bad_halves[] = {0x7c00, 0x7e00, 0x8000, 0xbc00, 0x7bff};
    const float bad_floats[] = {INFINITY, NAN, -INFINITY, 1e30F};
    for (int dtype = 0; dtype < 2; dtype++) {
        kvl_anchor_options options = exact_options();
        options.dtype = dtype == 0 ? KVL_KV_INT8 : KVL_KV_F32;
        kvl_container *good = container_of(&options, &e);
        kvl_anchor_extra extra;
        kvl_anchor_layout layout;
        assert_int_equal(kvl_anchor_container_check(&model, good, &extra, &layout, NULL), KVL_OK);
        for (uint32_t section = 0; section < KVL_ANCHOR_SECTIONS; section++) {
            for (size_t i = 0; i < (dtype == 0 ? 5U : 4U); i++) {
                kvl_container *bad = rebuilt(good, kvl_container_info_of(good));
                size_t n_bytes = 0;
                uint8_t *block = kvl_container_block(bad, 1, &n_bytes);
                if (dtype == 0) {
                    memcpy(block + layout.scales_at[section], &bad_halves[i], 2);
                } else {
                    const bool second = section != KVL_ANCHOR_BASE && i % 2 == 0;
                    memcpy(block + (second ? layout.scales_at[section] : layout.at[section]),
                           &bad_floats[i], 4);
                }
                assert_refused(bad, KVL_ERR_DAMAGED);
            }
        }
        kvl_container_release(good);
    }
    example_free(&e);
}

/* Bytes changed anywhere: either the container room refuses, or the pool does, or it is the same
 * anchor (a byte of padding). Never a crash, never an anchor of other numbers. */
static void test_mutated_bytes_never_become_an_anchor(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_anchor_options options = exact_options();
    options.dtype = KVL_KV_INT8;
    example e = small_example(&random, 1, 5);
    kvl_container *good = container_of(&options, &e);
    kvl_anchor_pool *own = pool_of(&options);
    assert_int_equal(kvl_anchor_pool_add(own, &model, good, NULL), KVL_OK);
    corrected wanted = correct(own, &e);
    size_t n_bytes = 0;
    const uint8_t *bytes = kvl_container_bytes(good, &n_bytes);
    uint8_t *copy = kvl_alloc(n_bytes);
    assert_non_null(copy);
    for (int round = 0; round < 3000; round++) {
        memcpy(copy, bytes, n_bytes);
        const uint32_t n_changes = 1 + kvl_test_below(&random, 3);
        for (uint32_t i = 0; i < n_changes; i++) {
            const size_t at = kvl_test_below(&random, 4) != 0
                                  ? kvl_test_below(&random, n_bytes < 600 ? (uint32_t)n_bytes : 600)
                                  : kvl_test_below(&random, (uint32_t)n_bytes);
            copy[at] = (uint8_t)kvl_random_next(&random);
        }
        const size_t n = kvl_test_below(&random, 8) == 0
                             ? kvl_test_below(&random, (uint32_t)n_bytes + 1)
                             : n_bytes;
        kvl_container *container = NULL;
        if (kvl_container_from_bytes(copy, n, &container, NULL) < 0) continue;
        kvl_anchor_pool *pool = pool_of(&options);
        if (kvl_anchor_pool_add(pool, &model, container, NULL) == KVL_OK) {
            corrected out = correct(pool, &e);
            assert_same_bits(&out.slot, &wanted.slot);
            assert_same_bits(&out.after, &wanted.after);
            corrected_free(&out);
        }
        kvl_anchor_pool_destroy(pool);
        kvl_container_release(container);
    }
    kvl_free(copy);
    corrected_free(&wanted);
    kvl_anchor_pool_destroy(own);
    kvl_container_release(good);
    example_free(&e);
}

static void test_kv_that_is_not_finite_is_not_measured(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    const float bad[] = {NAN, INFINITY, 1e20F};
    for (int i = 0; i < 12; i++) {
        example e = small_example(&random, 1, 5);
        float *const places[] = {&e.real.keys[e.real.n - 1], &e.real.values[40],
                                 &e.after_real.keys[30], &e.base.values[45]};
        *places[i % 4] = bad[i / 4];
        kvl_anchor_options options = exact_options();
        options.dtype = i % 2 == 0 ? KVL_KV_INT8 : KVL_KV_F32;
        kvl_anchor_pool *pool = pool_of(&options);
        kvl_container *container = NULL;
        kvl_error error;
        assert_int_equal(kvl_anchor_pool_measure(pool, &question, &model, &e.base_id, &e.base.view,
                                                 &e.real.view, &e.after_base.view,
                                                 &e.after_real.view, &container, &error),
                         KVL_ERR_OUT_OF_RANGE);
        assert_null(container);
        kvl_anchor_stats stats;
        kvl_anchor_pool_stats(pool, &stats);
        assert_int_equal(stats.n_anchors, 0);
        kvl_anchor_pool_destroy(pool);
        example_free(&e);
    }
}

/* A stranger's anchor with another text after the slot is refused beside our own, and gives way to
 * what this host measures. */
static void test_own_measurements_win(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    const kvl_anchor_options options = exact_options();
    example ours = small_example(&random, 1, 5);
    kv longer = kv_random(&random, &small, 9);
    example theirs = example_random(&random, 2, &small, 5, &longer);
    kvl_container *container = container_of(&options, &theirs);
    kvl_anchor_pool *pool = pool_of(&options);
    example_measure(pool, &ours);
    kvl_error error;
    assert_int_equal(kvl_anchor_pool_add(pool, &model, container, &error), KVL_ERR_FOREIGN);
    assert_true(holds(pool, 1));
    kvl_anchor_pool_destroy(pool);

    pool = pool_of(&options);
    assert_int_equal(kvl_anchor_pool_add(pool, &model, container, &error), KVL_OK);
    assert_true(holds(pool, 2));
    example_measure(pool, &ours);
    assert_false(holds(pool, 2));
    assert_true(holds(pool, 1));
    kvl_anchor_pool_destroy(pool);
    kvl_container_release(container);
    kv_free(&longer);
    example_free(&ours);
    example_free(&theirs);
}

/* Every allocation fails once: no leak, and the pool goes on as it was. */
static void test_memory_that_cannot_be_had(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_anchor_options options = exact_options();
    options.mode = KVL_ANCHOR_PAPER;
    options.n_anchors_max = 2;
    example first = small_example(&random, 1, 5), second = small_example(&random, 2, 50);
    kvl_container *container = container_of(&options, &second);
    const int64_t live = kvl_alloc_live();
    kvl_status status = KVL_ERR_NO_MEMORY;
    for (int64_t n = 0; status != KVL_OK; n++) {
        kvl_anchor_pool *pool = NULL;
        kvl_alloc_fail_after(n);
        status = kvl_anchor_pool_create(&options, &pool, NULL);
        kvl_alloc_fail_after(-1);
        assert_true(status == KVL_OK || status == KVL_ERR_NO_MEMORY);
        kvl_anchor_pool_destroy(pool);
        assert_int_equal(kvl_alloc_live(), live);
    }
    for (int what = 0; what < 2; what++) {
        status = KVL_ERR_NO_MEMORY;
        int64_t n = 0;
        for (; status != KVL_OK; n++) {
            kvl_anchor_pool *pool = pool_of(&options);
            example_measure(pool, &first);
            kvl_container *made = NULL;
            kvl_alloc_fail_after(n);
            status = what == 0 ? kvl_anchor_pool_add(pool, &model, container, NULL)
                               : kvl_anchor_pool_measure(pool, &question, &model, &second.base_id,
                                                         &second.base.view, &second.real.view,
                                                         &second.after_base.view,
                                                         &second.after_real.view, &made, NULL);
            kvl_alloc_fail_after(-1);
            assert_true(status == KVL_OK || status == KVL_ERR_NO_MEMORY);
            kvl_anchor_stats stats;
            kvl_anchor_pool_stats(pool, &stats);
            assert_int_equal(stats.n_anchors, status == KVL_OK ? 2 : 1);
            kvl_container_release(made);
            /* What there was still serves, without any allocation. */
            kv copy = kv_copy(&first.base);
            kvl_alloc_fail_after(0);
            assert_int_equal(match_of(pool, &first).verdict, KVL_ANCHOR_SHARE);
            assert_int_equal(kvl_anchor_pool_correct(pool, &question, &first.base_id,
                                                     &first.base.view, copy.keys, copy.values, NULL,
                                                     NULL, NULL, NULL),
                             KVL_OK);
            kvl_alloc_fail_after(-1);
            kv_free(&copy);
            kvl_anchor_pool_destroy(pool);
            assert_int_equal(kvl_alloc_live(), live);
        }
        assert_true(n > 2);
    }
    kvl_container_release(container);
    example_free(&first);
    example_free(&second);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_eviction_follows_the_rule),
        cmocka_unit_test(test_anchors_with_the_mass_count_as_used),
        cmocka_unit_test(test_bytes_stay_below_the_limit),
        cmocka_unit_test(test_options_are_checked),
        cmocka_unit_test(test_anchor_travels),
        cmocka_unit_test(test_modes_read_each_other),
        cmocka_unit_test(test_hostile_headers_are_refused),
        cmocka_unit_test(test_hostile_numbers_are_refused),
        cmocka_unit_test(test_mutated_bytes_never_become_an_anchor),
        cmocka_unit_test(test_kv_that_is_not_finite_is_not_measured),
        cmocka_unit_test(test_own_measurements_win),
        cmocka_unit_test(test_memory_that_cannot_be_had),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
