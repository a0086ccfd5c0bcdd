/* reuse: the gate lets pass only what outcomes bear out; disagreement never passes. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "reuse/gate.h"
#include "test_random.h"

static void test_disagreement_never_passes(void **state)
{
    (void)state;
    kvl_gate gate = {0};
    const kvl_gate_options options = kvl_gate_default_options();
    for (int i = 0; i < 5000; i++) kvl_gate_learn(&gate, &options, 0.01F, true);
    assert_true(kvl_gate_bar(&gate, &options) == 0.0F);
    assert_true(kvl_gate_score(false, 0.99F) == 0.0F);
    assert_false(kvl_gate_passes(kvl_gate_score(false, 0.99F), 0.0F));
    assert_true(kvl_gate_passes(kvl_gate_score(true, 0.01F), 0.0F));
    assert_true(kvl_gate_score(true, 7.0F) == 1.0F);
    assert_true(kvl_gate_score(true, -1.0F) == 0.0F);
    assert_true(kvl_gate_score(true, nanf("")) == 0.0F);
}

static void test_the_first_bar_holds_until_enough_was_checked(void **state)
{
    (void)state;
    kvl_gate gate = {0};
    kvl_gate_options options = kvl_gate_default_options();
    options.decay = 1.0F;
    assert_true(kvl_gate_bar(&gate, &options) == options.bar_first);
    for (int i = 0; i < 47; i++) kvl_gate_learn(&gate, &options, 0.9F, true);
    assert_true(kvl_gate_bar(&gate, &options) == options.bar_first);
    kvl_gate_learn(&gate, &options, 0.3F, true); /* 48 right ones: 1 / 50 may be wrong */
    const float bar = kvl_gate_bar(&gate, &options);
    assert_true(bar <= 0.3F && bar > 0.24F);
    /* Answers that turn out wrong above the first bar shut the gate, until more are right. */
    for (int i = 0; i < 3; i++) kvl_gate_learn(&gate, &options, 0.95F, false);
    assert_true(kvl_gate_bar(&gate, &options) == KVL_GATE_SHUT);
    assert_false(kvl_gate_passes(1.0F, kvl_gate_bar(&gate, &options)));
    for (int i = 0; i < 200; i++) kvl_gate_learn(&gate, &options, 0.99F, true);
    assert_true(kvl_gate_bar(&gate, &options) < 1.0F);
}

/* Scores below 0.5 are wrong as often as they are low: the bar settles where 98 % are right, and
 * what passes it later, of the same kind, is right. */
static void test_the_bar_is_learnt(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    const kvl_gate_options options = kvl_gate_default_options();
    kvl_gate gate = {0};
    uint32_t n_passed = 0;
    uint32_t n_right = 0;
    for (int i = 0; i < 20000; i++) {
        const float score = (1.0F + (float)kvl_test_below(&random, 1000)) / 1001.0F;
        const bool right = score >= 0.5F || (float)kvl_test_below(&random, 1000) < 2000.0F * score;
        if (i >= 5000 && kvl_gate_passes(score, kvl_gate_bar(&gate, &options))) {
            n_passed++;
            n_right += right;
        }
        kvl_gate_learn(&gate, &options, score, right);
    }
    assert_true(n_passed > 15000 / 2); /* it is no use where nothing passes */
    assert_true((double)n_right / n_passed >= 0.975);
}

static void test_one_wrong_outcome_more_never_lowers_the_bar(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_gate_options options = kvl_gate_default_options();
    options.decay = 1.0F;
    for (int round = 0; round < 300; round++) {
        kvl_gate gate = {0};
        const uint32_t n = kvl_test_below(&random, 400);
        const uint32_t rarely = 1 + kvl_test_below(&random, 200);
        for (uint32_t i = 0; i < n; i++)
            kvl_gate_learn(&gate, &options, (float)kvl_test_below(&random, 1001) / 1000.0F,
                           kvl_test_below(&random, rarely) != 0);
        const float before = kvl_gate_bar(&gate, &options);
        kvl_gate_learn(&gate, &options, (float)kvl_test_below(&random, 1001) / 1000.0F, false);
        assert_true(kvl_gate_bar(&gate, &options) >= before);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_disagreement_never_passes),
        cmocka_unit_test(test_the_first_bar_holds_until_enough_was_checked),
        cmocka_unit_test(test_the_bar_is_learnt),
        cmocka_unit_test(test_one_wrong_outcome_more_never_lowers_the_bar),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
