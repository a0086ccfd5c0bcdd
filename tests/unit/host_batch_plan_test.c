/* host/batch_plan: every row once, groups that share what they say, nothing computed twice that
 * stands together, and savings that are the best there are: against naive twins over random trees
 * of prompts. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "compute/pages.h"
#include "host/batch_plan.h"
#include "test_random.h"

enum { ROWS_MAX = 60, IDS_MAX = 160, PAGE = KVL_PAGE_TOKENS };

typedef struct world {
    uint32_t ids[ROWS_MAX][IDS_MAX];
    kvl_batch_row rows[ROWS_MAX];
    uint32_t n_rows;
} world;

/* A row goes on from a random place of one before it, or begins anew. */
static void make_world(kvl_random *random, world *w)
{
    w->n_rows = 1 + kvl_test_below(random, ROWS_MAX);
    for (uint32_t r = 0; r < w->n_rows; r++) {
        const uint32_t n = 1 + kvl_test_below(random, IDS_MAX);
        uint32_t n_same = 0;
        if (r > 0 && kvl_test_below(random, 4) != 0) {
            const uint32_t from = kvl_test_below(random, r);
            n_same = kvl_test_below(random, w->rows[from].n_ids + 1);
            if (kvl_test_below(random, 2) == 0) n_same = n_same / PAGE * PAGE;
            if (n_same > n) n_same = n;
            memcpy(w->ids[r], w->ids[from], n_same * sizeof(uint32_t));
        }
        for (uint32_t i = n_same; i < n; i++) w->ids[r][i] = kvl_test_below(random, 5);
        w->rows[r] = (kvl_batch_row){w->ids[r], n, 1 + kvl_test_below(random, 50)};
    }
}

static uint32_t shareable(const kvl_batch_row *row)
{
    return (row->n_ids - 1) / PAGE * PAGE;
}

static uint32_t common_pages(const kvl_batch_row *a, const kvl_batch_row *b)
{
    uint32_t n = shareable(a) < shareable(b) ? shareable(a) : shareable(b);
    uint32_t i = 0;
    while (i < n && a->ids[i] == b->ids[i]) i++;
    return i / PAGE * PAGE;
}

static void check_order(const world *w, const kvl_batch_plan *plan)
{
    bool seen[ROWS_MAX] = {false};
    uint32_t at = 0;
    assert_int_equal(plan->n_rows, w->n_rows);
    for (uint32_t i = 0; i < plan->n_rows; i++) {
        assert_true(plan->order[i] < w->n_rows && !seen[plan->order[i]]);
        seen[plan->order[i]] = true;
    }
    for (uint32_t g = 0; g < plan->n_groups; g++) {
        const kvl_batch_group *group = &plan->groups[g];
        assert_int_equal(group->first, at);
        assert_true(group->n_rows > 0);
        at += group->n_rows;
        for (uint32_t i = group->first; i < at; i++)
            for (uint32_t k = group->first; k < i; k++)
                assert_true(common_pages(&w->rows[plan->order[i]], &w->rows[plan->order[k]]) >=
                            group->n_shared);
    }
    assert_int_equal(at, w->n_rows);
}

/* Computed in this order, with only the row before remembered: a page that any earlier row had must
 * be one that the row before has too, or it would be computed twice. */
static void check_neighbours(const world *w, const kvl_batch_plan *plan)
{
    uint64_t n_computed = 0;
    for (uint32_t i = 0; i < plan->n_rows; i++) {
        const kvl_batch_row *row = &w->rows[plan->order[i]];
        uint32_t best = 0;
        for (uint32_t k = 0; k < i; k++) {
            const uint32_t n = common_pages(row, &w->rows[plan->order[k]]);
            if (n > best) best = n;
        }
        if (i > 0) assert_int_equal(common_pages(row, &w->rows[plan->order[i - 1]]), best);
        n_computed += row->n_ids - best;
    }
    assert_int_equal(n_computed, plan->n_distinct);
}

/* The best that any cut of the tree saves, by trying: rows of `set` share `depth` ids at least. */
static uint64_t best_saving(const world *w, const uint32_t *set, uint32_t n, uint32_t depth)
{
    if (n < 2) return 0;
    uint32_t shared = UINT32_MAX;
    for (uint32_t i = 1; i < n; i++) {
        const uint32_t c = common_pages(&w->rows[set[0]], &w->rows[set[i]]);
        if (c < shared) shared = c;
    }
    assert_true(shared >= depth);
    /* Apart: rows that have the next page in common stay together. */
    uint64_t apart = 0;
    bool taken[ROWS_MAX] = {false};
    for (uint32_t i = 0; i < n; i++) {
        if (taken[i]) continue;
        uint32_t part[ROWS_MAX];
        uint32_t n_part = 0;
        for (uint32_t k = i; k < n; k++) {
            if (taken[k] || (k != i && common_pages(&w->rows[set[i]], &w->rows[set[k]]) <= shared))
                continue;
            taken[k] = true;
            part[n_part++] = set[k];
        }
        apart += best_saving(w, part, n_part, shared);
    }
    const uint64_t together = (uint64_t)(n - 1) * shared;
    return together > apart ? together : apart;
}

static void test_plans_over_random_trees(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    static world w;
    uint32_t n_shared_groups = 0;
    for (int round = 0; round < 600; round++) {
        make_world(&random, &w);
        kvl_batch_plan plan;
        kvl_error error = {0};
        assert_int_equal(kvl_batch_plan_make(w.rows, w.n_rows, &plan, &error), KVL_OK);
        check_order(&w, &plan);
        check_neighbours(&w, &plan);
        uint32_t all[ROWS_MAX];
        for (uint32_t i = 0; i < w.n_rows; i++) all[i] = i;
        assert_int_equal(plan.n_saved, best_saving(&w, all, w.n_rows, 0));
        uint64_t n_saved = 0;
        for (uint32_t g = 0; g < plan.n_groups; g++) {
            n_saved += (uint64_t)(plan.groups[g].n_rows - 1) * plan.groups[g].n_shared;
            n_shared_groups += plan.groups[g].n_shared > 0 && plan.groups[g].n_rows > 2;
        }
        assert_int_equal(plan.n_saved, n_saved);
        kvl_batch_plan_deinit(&plan);
    }
    assert_true(n_shared_groups > 100);
}

/* Two-level sharing: an instruction for all, documents for some: the documents are not lost. */
static void test_the_second_level_is_not_lost(void **state)
{
    (void)state;
    static uint32_t ids[20][100];
    kvl_batch_row rows[20];
    for (uint32_t r = 0; r < 20; r++) {
        for (uint32_t i = 0; i < 100; i++)
            ids[r][i] = i < 16 ? i : i < 80 ? 100 + r % 2 * 50 + i : 1000 + r;
        rows[r] = (kvl_batch_row){ids[r], 100, 5};
    }
    kvl_batch_plan plan;
    kvl_error error = {0};
    assert_int_equal(kvl_batch_plan_make(rows, 20, &plan, &error), KVL_OK);
    assert_int_equal(plan.n_groups, 2);
    for (uint32_t g = 0; g < 2; g++) {
        assert_int_equal(plan.groups[g].n_rows, 10);
        assert_int_equal(plan.groups[g].n_shared, 80);
    }
    assert_int_equal(plan.n_distinct, 16 + 2 * 64 + 20 * 20);
    kvl_batch_plan_deinit(&plan);
}

static void test_more_decoding_comes_first(void **state)
{
    (void)state;
    static uint32_t ids[6][40];
    kvl_batch_row rows[6];
    for (uint32_t r = 0; r < 6; r++) {
        for (uint32_t i = 0; i < 40; i++) ids[r][i] = 10 * r + i;
        rows[r] = (kvl_batch_row){ids[r], 40, (r * 7) % 6 + 1};
    }
    kvl_batch_plan plan;
    kvl_error error = {0};
    assert_int_equal(kvl_batch_plan_make(rows, 6, &plan, &error), KVL_OK);
    for (uint32_t i = 1; i < 6; i++)
        assert_true(rows[plan.order[i - 1]].n_decoded >= rows[plan.order[i]].n_decoded);
    kvl_batch_plan_deinit(&plan);
}

static void test_limits_and_want_of_memory(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    static world w;
    make_world(&random, &w);
    kvl_batch_plan plan;
    kvl_error error = {0};
    assert_int_equal(kvl_batch_plan_make(w.rows, 0, &plan, &error), KVL_OK);
    assert_int_equal(plan.n_groups, 0);
    assert_int_equal(kvl_batch_plan_make(w.rows, KVL_BATCH_ROWS_MAX + 1, &plan, &error),
                     KVL_ERR_TOO_LARGE);
    const int64_t n_live = kvl_alloc_live();
    for (int64_t n = 0;; n++) {
        kvl_alloc_fail_after(n);
        const kvl_status status = kvl_batch_plan_make(w.rows, w.n_rows, &plan, &error);
        kvl_alloc_fail_after(-1);
        kvl_batch_plan_deinit(&plan);
        assert_int_equal(kvl_alloc_live(), n_live);
        if (status == KVL_OK) return;
        assert_int_equal(status, KVL_ERR_NO_MEMORY);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plans_over_random_trees),
        cmocka_unit_test(test_the_second_level_is_not_lost),
        cmocka_unit_test(test_more_decoding_comes_first),
        cmocka_unit_test(test_limits_and_want_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
