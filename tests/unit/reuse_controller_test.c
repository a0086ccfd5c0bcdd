/* reuse/controller: the ratio never falls as loading gets slower, and never below the least;
 * nothing is slower than computing; of several places the fastest that is worth it is taken. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "reuse/controller.h"
#include "test_random.h"

enum { ROUNDS = 300, PLACES = 5 };

static kvl_load_case draw(kvl_random *random)
{
    return (kvl_load_case){.prefill_ms = 1.0 + kvl_test_below(random, 1000),
                           .least_ratio = (double)kvl_test_below(random, 101) / 100.0,
                           .select_ms = (double)kvl_test_below(random, 20),
                           .overlaps = kvl_test_below(random, 2) == 0};
}

/* algorithms 2.9 i */
static void test_the_ratio_follows_loading(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    uint32_t n_grown = 0;
    for (int round = 0; round < ROUNDS; round++) {
        const kvl_load_case about = draw(&random);
        double before = 0.0;
        for (double load_ms = 0.0; load_ms < 1500.0; load_ms = load_ms * 1.3 + 0.5) {
            const kvl_load_decision d = kvl_load_control(&about, load_ms);
            assert_true(d.ratio >= before && d.ratio >= about.least_ratio && d.ratio <= 1.0);
            before = d.ratio;
            /* What is computed again more than it must be costs nothing. */
            const double least_ms = about.least_ratio * about.prefill_ms;
            const double both_ms = about.overlaps ? fmax(load_ms, least_ms) : load_ms + least_ms;
            assert_true(fabs(d.total_ms - about.select_ms - both_ms) <= 1e-9 * (1.0 + both_ms));
            assert_int_equal(d.reuses, d.total_ms < about.prefill_ms);
            if (!about.overlaps) assert_true(d.ratio == about.least_ratio);
            n_grown += d.ratio > about.least_ratio;
        }
        assert_false(kvl_load_control(&about, HUGE_VAL).reuses);
    }
    assert_true(n_grown > 0);
}

static void test_the_fastest_place_is_chosen_or_none(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    uint32_t n_none = 0, n_some = 0;
    for (int round = 0; round < ROUNDS; round++) {
        const kvl_load_case about = draw(&random);
        double load_ms[PLACES];
        for (size_t i = 0; i < PLACES; i++)
            load_ms[i] =
                kvl_test_below(&random, 4) == 0 ? HUGE_VAL : (double)kvl_test_below(&random, 1200);
        const size_t chosen = kvl_load_choose(&about, load_ms, PLACES);
        double fastest = about.prefill_ms;
        for (size_t i = 0; i < PLACES; i++)
            fastest = fmin(fastest, kvl_load_control(&about, load_ms[i]).total_ms);
        const bool is_worth_it = fastest < about.prefill_ms;
        assert_int_equal(chosen < PLACES, is_worth_it);
        n_none += !is_worth_it;
        n_some += is_worth_it;
        if (!is_worth_it) continue;
        assert_true(kvl_load_control(&about, load_ms[chosen]).total_ms == fastest);
        for (size_t i = 0; i < chosen; i++)
            assert_true(kvl_load_control(&about, load_ms[i]).total_ms > fastest);
    }
    assert_true(n_none > 0 && n_some > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_ratio_follows_loading),
        cmocka_unit_test(test_the_fastest_place_is_chosen_or_none),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
