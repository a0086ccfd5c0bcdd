/* reuse/align: what is found is there, what is long enough is found, and nothing else is touched.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "reuse/align.h"
#include "test_random.h"

enum { W = KVL_ALIGN_WINDOW, SEGMENTS_MAX = 8, TOKENS_MAX = 400, SPANS_MAX = 32 };

typedef struct stored {
    kvl_digest id, home;
    uint32_t tokens[TOKENS_MAX], n;
} stored;

static kvl_digest digest_of(uint32_t number)
{
    kvl_digest digest = {{0}};
    memcpy(digest.bytes, &number, sizeof number);
    return digest;
}

static kvl_align_index *make_index(uint32_t n_segments_max)
{
    kvl_align_index *index = NULL;
    assert_int_equal(kvl_align_create(n_segments_max, &index, NULL), KVL_OK);
    return index;
}

static void fill(kvl_random *random, uint32_t *tokens, uint32_t n, uint32_t n_kinds)
{
    for (uint32_t i = 0; i < n; i++) tokens[i] = kvl_test_below(random, n_kinds);
}

static void add(kvl_align_index *index, const stored *s)
{
    assert_int_equal(kvl_align_add(index, &s->id, &s->home, s->tokens, s->n, NULL), KVL_OK);
}

/* Runs of random texts, of few kinds of tokens, put together from one another. */
static void test_spans_are_equal_disjoint_and_long(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 200; round++) {
        static stored all[SEGMENTS_MAX];
        const uint32_t n_kinds = round % 3 == 0 ? 2 : 50;
        const uint32_t n_all = 1 + kvl_test_below(&random, SEGMENTS_MAX);
        kvl_align_index *index = make_index(SEGMENTS_MAX);
        for (uint32_t s = 0; s < n_all; s++) {
            all[s].id = digest_of(s);
            all[s].home = digest_of(100 + s % 2);
            all[s].n = 1 + kvl_test_below(&random, TOKENS_MAX);
            fill(&random, all[s].tokens, all[s].n, n_kinds);
            add(index, &all[s]);
        }
        uint32_t text[4 * TOKENS_MAX], n = 0;
        while (n + TOKENS_MAX / 2 < 4 * TOKENS_MAX) {
            const stored *from = &all[kvl_test_below(&random, n_all)];
            const uint32_t first = kvl_test_below(&random, from->n);
            uint32_t n_run = 1 + kvl_test_below(&random, from->n - first);
            if (n_run > TOKENS_MAX / 2) n_run = TOKENS_MAX / 2;
            memcpy(text + n, from->tokens + first, n_run * sizeof *text);
            n += n_run;
            if (n % 3 == 0) fill(&random, text + n++, 1, n_kinds);
        }
        const kvl_digest home = digest_of(100);
        const uint32_t n_least = W + kvl_test_below(&random, 20);
        kvl_align_span spans[SPANS_MAX];
        const uint32_t n_spans = kvl_align_find(index, &home, text, n, n_least, spans, SPANS_MAX);
        for (uint32_t i = 0; i < n_spans; i++) {
            uint32_t s = 0;
            while (s < n_all && !kvl_digest_equal(&all[s].id, &spans[i].id)) s++;
            assert_true(s < n_all && kvl_digest_equal(&all[s].home, &home));
            assert_true(spans[i].n >= n_least && spans[i].at + spans[i].n <= n);
            assert_true(spans[i].segment_at + spans[i].n <= all[s].n);
            assert_memory_equal(text + spans[i].at, all[s].tokens + spans[i].segment_at,
                                spans[i].n * sizeof *text);
            if (i > 0) assert_true(spans[i].at >= spans[i - 1].at + spans[i - 1].n);
        }
        kvl_align_destroy(index);
    }
}

/* One edit in a text whose tokens are all different: everything but the edit is found. */
static void test_an_edit_costs_its_own_tokens(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 100; round++) {
        stored s = {.id = digest_of(1), .home = digest_of(9), .n = TOKENS_MAX};
        for (uint32_t i = 0; i < s.n; i++) s.tokens[i] = 1000 * (uint32_t)round + i;
        kvl_align_index *index = make_index(2);
        add(index, &s);
        const uint32_t at = 2 * W + kvl_test_below(&random, TOKENS_MAX - 5 * W);
        const uint32_t n_out = kvl_test_below(&random, 5), n_in = 1 + kvl_test_below(&random, 9);
        uint32_t text[TOKENS_MAX + 16];
        memcpy(text, s.tokens, at * sizeof *text);
        for (uint32_t i = 0; i < n_in; i++) text[at + i] = 900000 + i;
        memcpy(text + at + n_in, s.tokens + at + n_out, (s.n - at - n_out) * sizeof *text);
        const uint32_t n = s.n - n_out + n_in;
        kvl_align_span spans[4];
        assert_int_equal(kvl_align_find(index, &s.home, text, n, W, spans, 4), 2);
        assert_int_equal(spans[0].at, 0);
        assert_int_equal(spans[0].n, at);
        assert_int_equal(spans[1].at, at + n_in);
        assert_int_equal(spans[1].segment_at, at + n_out);
        assert_int_equal(spans[1].n, n - at - n_in);
        kvl_align_destroy(index);
    }
}

static void test_a_run_of_two_windows_is_found_anywhere(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (uint32_t offset = 0; offset < 2 * W; offset++) {
        stored s = {.id = digest_of(1), .home = digest_of(9), .n = 8 * W};
        for (uint32_t i = 0; i < s.n; i++) s.tokens[i] = i;
        kvl_align_index *index = make_index(1);
        add(index, &s);
        uint32_t text[6 * W];
        for (uint32_t i = 0; i < 6 * W; i++) text[i] = 10000 + i;
        const uint32_t at = kvl_test_below(&random, 6 * W - 2 * W);
        memcpy(text + at, s.tokens + offset, (2 * W - 1) * sizeof *text);
        kvl_align_span span;
        assert_int_equal(kvl_align_find(index, &s.home, text, 6 * W, W, &span, 1), 1);
        assert_int_equal(span.at, at);
        assert_int_equal(span.n, 2 * W - 1);
        assert_int_equal(span.segment_at, offset);
        kvl_align_destroy(index);
    }
}

static void test_the_longer_span_wins(void **state)
{
    (void)state;
    stored longer = {.id = digest_of(1), .home = digest_of(9), .n = 5 * W};
    stored shorter = {.id = digest_of(2), .home = digest_of(9), .n = 3 * W};
    for (uint32_t i = 0; i < longer.n; i++) longer.tokens[i] = i;
    /* The shorter one begins before, and overlaps. */
    for (uint32_t i = 0; i < shorter.n; i++) shorter.tokens[i] = i < 2 * W ? 5000 + i : i - 2 * W;
    uint32_t text[7 * W];
    for (uint32_t i = 0; i < 7 * W; i++) text[i] = i < 2 * W ? 5000 + i : i - 2 * W;
    kvl_align_index *index = make_index(2);
    add(index, &shorter);
    add(index, &longer);
    kvl_align_span spans[2];
    assert_int_equal(kvl_align_find(index, &longer.home, text, 7 * W, W, spans, 2), 2);
    assert_true(kvl_digest_equal(&spans[0].id, &shorter.id) && spans[0].n == 2 * W);
    assert_true(kvl_digest_equal(&spans[1].id, &longer.id) && spans[1].n == 5 * W);
    kvl_align_destroy(index);
}

static void test_the_oldest_makes_room_and_what_is_removed_is_gone(void **state)
{
    (void)state;
    stored all[5];
    kvl_align_index *index = make_index(3);
    kvl_align_span span;
    for (uint32_t s = 0; s < 5; s++) {
        all[s] = (stored){.id = digest_of(s), .home = digest_of(9), .n = 3 * W};
        for (uint32_t i = 0; i < all[s].n; i++) all[s].tokens[i] = 1000 * s + i;
        add(index, &all[s]);
        add(index, &all[s]); /* once */
    }
    for (uint32_t s = 0; s < 5; s++)
        assert_int_equal(kvl_align_find(index, &all[s].home, all[s].tokens, all[s].n, W, &span, 1),
                         s >= 2);
    kvl_align_remove(index, &all[3].id);
    kvl_align_remove(index, &all[0].id);
    for (uint32_t s = 2; s < 5; s++)
        assert_int_equal(kvl_align_find(index, &all[s].home, all[s].tokens, all[s].n, W, &span, 1),
                         s != 3);
    kvl_align_destroy(index);
}

static void test_without_memory_nothing_changes(void **state)
{
    (void)state;
    const int64_t live = kvl_alloc_live();
    kvl_align_index *index = NULL;
    kvl_status status = KVL_ERR_NO_MEMORY;
    for (int64_t n = 0; status != KVL_OK; n++) {
        kvl_alloc_fail_after(n);
        status = kvl_align_create(4, &index, NULL);
        kvl_alloc_fail_after(-1);
        assert_true(status == KVL_OK || kvl_alloc_live() == live);
    }
    stored s = {.id = digest_of(1), .home = digest_of(9), .n = 3 * W};
    for (uint32_t i = 0; i < s.n; i++) s.tokens[i] = i;
    kvl_align_span span;
    const int64_t before = kvl_alloc_live();
    status = KVL_ERR_NO_MEMORY;
    for (int64_t n = 0; status != KVL_OK; n++) {
        kvl_alloc_fail_after(n);
        status = kvl_align_add(index, &s.id, &s.home, s.tokens, s.n, NULL);
        kvl_alloc_fail_after(-1);
        const uint32_t found = kvl_align_find(index, &s.home, s.tokens, s.n, W, &span, 1);
        assert_int_equal(found, status == KVL_OK);
        assert_true(status == KVL_OK || kvl_alloc_live() == before);
    }
    kvl_align_destroy(index);
    assert_int_equal(kvl_alloc_live(), live);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_spans_are_equal_disjoint_and_long),
        cmocka_unit_test(test_an_edit_costs_its_own_tokens),
        cmocka_unit_test(test_a_run_of_two_windows_is_found_anywhere),
        cmocka_unit_test(test_the_longer_span_wins),
        cmocka_unit_test(test_the_oldest_makes_room_and_what_is_removed_is_gone),
        cmocka_unit_test(test_without_memory_nothing_changes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
