/* reuse/select: what is chosen is what the policy's words say, whatever the scores. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "reuse/select.h"
#include "test_random.h"

#include <math.h>
#include <string.h>

enum { ROUNDS = 300, RUNS_MAX = 6, POSITIONS_MAX = 900 };

typedef struct scene {
    kvl_select_run runs[RUNS_MAX];
    size_t n_runs;
    uint32_t n_tokens;
    float scores[POSITIONS_MAX];
} scene;

static scene make(kvl_random *random)
{
    scene s = {.n_runs = kvl_test_below(random, RUNS_MAX + 1)};
    uint32_t at = kvl_test_below(random, 20);
    for (size_t r = 0; r < s.n_runs; r++) {
        s.runs[r] = (kvl_select_run){at, kvl_test_below(random, 120)};
        at += s.runs[r].n + kvl_test_below(random, 20);
        s.n_tokens += s.runs[r].n;
    }
    /* Few values, so that there are ties. */
    for (size_t i = 0; i < POSITIONS_MAX; i++) s.scores[i] = (float)kvl_test_below(random, 9);
    return s;
}

static const kvl_select_run *run_of(const scene *s, uint32_t position)
{
    for (size_t r = 0; r < s->n_runs; r++) {
        if (position >= s->runs[r].first && position < s->runs[r].first + s->runs[r].n)
            return &s->runs[r];
    }
    fail_msg("position %u is in no run", position);
    return NULL;
}

static float pooled(const scene *s, const kvl_select_policy *policy, uint32_t position)
{
    const kvl_select_run *run = run_of(s, position);
    const int reach = (int)policy->pool_width / 2;
    float highest = -INFINITY;
    for (int p = (int)position - reach; p <= (int)position + reach; p++) {
        if (p < (int)run->first || p >= (int)(run->first + run->n)) continue;
        highest = fmaxf(highest, s->scores[p]);
    }
    return highest;
}

static void test_heads_and_highest_are_chosen(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        const scene s = make(&random);
        const kvl_select_policy policy = {
            .name = "test",
            .n_sink = kvl_test_below(&random, 12),
            .score = KVL_SELECT_QUERY_ATTENTION,
            .share = (float)kvl_test_below(&random, 11) / 10.0F,
            .is_total = kvl_test_below(&random, 2) == 1,
            .pool_width = 1 + 2 * kvl_test_below(&random, 6),
        };
        uint32_t chosen[POSITIONS_MAX];
        uint32_t n = 0;
        assert_int_equal(kvl_select_tokens(&policy, s.runs, s.n_runs, s.scores, chosen, &n, NULL),
                         KVL_OK);
        bool is_chosen[POSITIONS_MAX] = {false};
        uint32_t n_heads = 0, n_scored = 0;
        float lowest_chosen = INFINITY;
        for (uint32_t i = 0; i < n; i++) {
            assert_true(i == 0 || chosen[i] > chosen[i - 1]);
            is_chosen[chosen[i]] = true;
            if (chosen[i] - run_of(&s, chosen[i])->first < policy.n_sink) {
                n_heads++;
                continue;
            }
            n_scored++;
            lowest_chosen = fminf(lowest_chosen, pooled(&s, &policy, chosen[i]));
        }
        uint32_t heads_wanted = 0;
        for (size_t r = 0; r < s.n_runs; r++)
            heads_wanted += s.runs[r].n < policy.n_sink ? s.runs[r].n : policy.n_sink;
        assert_int_equal(n_heads, heads_wanted);
        uint32_t wanted = (uint32_t)((double)policy.share * s.n_tokens);
        if (policy.is_total) wanted -= heads_wanted < wanted ? heads_wanted : wanted;
        const uint32_t rest = s.n_tokens - heads_wanted;
        assert_int_equal(n_scored, wanted < rest ? wanted : rest);
        /* Nobody left out has more than the least of the chosen. */
        for (size_t r = 0; r < s.n_runs; r++) {
            for (uint32_t i = policy.n_sink; i < s.runs[r].n; i++) {
                const uint32_t p = s.runs[r].first + i;
                if (!is_chosen[p]) assert_true(pooled(&s, &policy, p) <= lowest_chosen);
            }
        }
    }
}

static void test_ties_go_to_the_lower_position(void **state)
{
    (void)state;
    scene s = {.runs = {{10, 40}, {60, 40}}, .n_runs = 2};
    const kvl_select_policy policy = {
        .name = "test", .score = KVL_SELECT_DEVIATION, .share = 0.25F, .pool_width = 1};
    uint32_t chosen[80];
    uint32_t n = 0;
    assert_int_equal(kvl_select_tokens(&policy, s.runs, 2, s.scores, chosen, &n, NULL), KVL_OK);
    assert_int_equal(n, 20);
    for (uint32_t i = 0; i < n; i++) assert_int_equal(chosen[i], 10 + i);
}

/* A score that is no number is damage elsewhere: it must not hide the good ones. */
static void test_no_number_comes_last(void **state)
{
    (void)state;
    scene s = {.runs = {{0, 10}}, .n_runs = 1};
    for (int i = 0; i < 10; i++) s.scores[i] = i % 2 == 0 ? NAN : (float)i;
    const kvl_select_policy policy = {
        .name = "test", .score = KVL_SELECT_DEVIATION, .share = 0.5F, .pool_width = 1};
    uint32_t chosen[10];
    uint32_t n = 0;
    assert_int_equal(kvl_select_tokens(&policy, s.runs, 1, s.scores, chosen, &n, NULL), KVL_OK);
    assert_int_equal(n, 5);
    for (uint32_t i = 0; i < n; i++) assert_int_equal(chosen[i], 2 * i + 1);
}

static void test_policies_have_names(void **state)
{
    (void)state;
    size_t n = 0;
    for (const kvl_select_policy *p = kvl_select_policies; p->name != NULL; p++, n++) {
        assert_ptr_equal(kvl_select_find(p->name), p);
        assert_int_equal(p->pool_width % 2, 1);
        assert_true(p->share >= 0.0F && p->share <= 1.0F);
        const bool deviates =
            p->score == KVL_SELECT_DEVIATION || p->score == KVL_SELECT_ATTENDED_DEVIATION;
        assert_int_equal(deviates, p->n_checks > 0);
        for (uint32_t c = 1; c < p->n_checks; c++) {
            assert_true(p->checks[c].layer > p->checks[c - 1].layer);
            assert_true(p->checks[c].share < p->checks[c - 1].share);
        }
    }
    assert_true(n > 5);
    assert_null(kvl_select_find("no such policy"));
}

static void test_memory_that_cannot_be_had(void **state)
{
    (void)state;
    scene s = {.runs = {{0, 10}}, .n_runs = 1};
    const kvl_select_policy *policy = kvl_select_find("sink8+query10");
    uint32_t chosen[10];
    uint32_t n = 7;
    kvl_alloc_fail_after(0);
    const kvl_status status = kvl_select_tokens(policy, s.runs, 1, s.scores, chosen, &n, NULL);
    kvl_alloc_fail_after(-1);
    assert_int_equal(status, KVL_ERR_NO_MEMORY);
    assert_int_equal(n, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_heads_and_highest_are_chosen),
        cmocka_unit_test(test_ties_go_to_the_lower_position),
        cmocka_unit_test(test_no_number_comes_last),
        cmocka_unit_test(test_policies_have_names),
        cmocka_unit_test(test_memory_that_cannot_be_had),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
