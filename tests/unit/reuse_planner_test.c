/* reuse/planner: every rule by an example, and what holds for any prompt by random ones. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "reuse/planner.h"
#include "test_random.h"

#include <math.h>
#include <string.h>

enum { PARTS_MAX = 12 };

/* Prefill 1 ms a token and a little for the square, everything else far cheaper. */
static const kvl_plan_rates rates = {
    .prefill_ms_per_token = 1.0,
    .prefill_ms_per_square_token = 1e-4,
    .local_bytes_per_ms = 1e6,
    .fetch_bytes_per_ms = 1e5,
    .fetch_latency_ms = 1.0,
    .place_tokens_per_ms = 100.0,
    .offset_tokens_per_ms = 200.0,
};

static void assert_near(double value, double wanted)
{
    assert_true(fabs(value - wanted) <= 1e-12 * fabs(wanted)); /* a few roundings */
}

static kvl_plan_part text(uint32_t n_tokens)
{
    return (kvl_plan_part){.kind = KVL_PART_TEXT,
                           .n_tokens = n_tokens,
                           .where = KVL_SEGMENT_LOCAL,
                           .segment_bytes = 1000};
}

static kvl_plan_part slot(uint32_t n_tokens, kvl_anchor_verdict verdict)
{
    return (kvl_plan_part){.kind = KVL_PART_SLOT,
                           .n_tokens = n_tokens,
                           .where = KVL_SEGMENT_LOCAL,
                           .segment_bytes = 1000,
                           .verdict = verdict,
                           .n_anchors = verdict == KVL_ANCHOR_SHARE ? 5 : 1};
}

/* An agent's prompt: role (in the prefix), question, text, answer, text, last words. */
static size_t agent_prompt(kvl_plan_part *parts)
{
    size_t n = 0;
    parts[n] = text(300);
    parts[n++].n_shared = 300;
    parts[n++] = slot(500, KVL_ANCHOR_SHARE);
    parts[n++] = text(100);
    parts[n++] = slot(200, KVL_ANCHOR_EXACT);
    parts[n++] = text(20);
    return n;
}

static void test_agent_prompt_is_reused(void **state)
{
    (void)state;
    kvl_plan_part parts[PARTS_MAX];
    kvl_plan_step steps[PARTS_MAX];
    kvl_plan_totals totals;
    const kvl_plan_options options = kvl_plan_default_options();
    const size_t n = agent_prompt(parts);
    kvl_plan_make(&options, &rates, parts, n, steps, &totals);
    const kvl_action wanted[] = {KVL_ACTION_SHARE, KVL_ACTION_OFFSET, KVL_ACTION_OFFSET,
                                 KVL_ACTION_OFFSET, KVL_ACTION_COMPUTE};
    for (size_t i = 0; i < n; i++) assert_int_equal(steps[i].action, wanted[i]);
    assert_int_equal(totals.n_shared, 300);
    assert_int_equal(totals.n_offset, 800);
    assert_int_equal(totals.n_placed, 0);
    assert_int_equal(totals.n_computed, 20);
    assert_false(totals.dense);
    /* 500 tokens, 5 anchors: 1000 bytes / 1e6 + 500 / 100 + 500 * 5 / 200. */
    assert_near(steps[1].cost_ms, 0.001 + 5.0 + 12.5);
    /* 20 tokens behind 1100: 20 + 1e-4 * (1120^2 - 1100^2). */
    assert_near(steps[4].cost_ms, 20.0 + 4.44);
    assert_near(steps[4].cost_ms, steps[4].compute_ms);
    assert_true(totals.cost_ms < totals.compute_ms / 10.0);
}

static void test_exact_quality_shares_and_computes_only(void **state)
{
    (void)state;
    kvl_plan_part parts[PARTS_MAX];
    kvl_plan_step steps[PARTS_MAX];
    kvl_plan_totals totals;
    kvl_plan_options options = kvl_plan_default_options();
    options.quality = KVL_QUALITY_EXACT;
    const size_t n = agent_prompt(parts);
    kvl_plan_make(&options, &rates, parts, n, steps, &totals);
    assert_int_equal(totals.n_shared, 300);
    assert_int_equal(totals.n_computed, 820);
    assert_false(steps[1].measure);
    assert_false(totals.dense);
}

/* Invariant 13 of reuse: falling back gives the very plan of a run without reuse, but for pages of
 * the exact prefix, which are the same KV. */
static void test_one_missing_slot_makes_the_prompt_dense(void **state)
{
    (void)state;
    kvl_plan_part parts[PARTS_MAX];
    kvl_plan_step steps[PARTS_MAX];
    kvl_plan_totals totals;
    const kvl_plan_options options = kvl_plan_default_options();
    const size_t n = agent_prompt(parts);
    const kvl_anchor_verdict misses[] = {KVL_ANCHOR_TOO_FEW, KVL_ANCHOR_TOO_FAR};
    for (size_t m = 0; m < 2; m++) {
        parts[3].verdict = misses[m];
        kvl_plan_make(&options, &rates, parts, n, steps, &totals);
        assert_true(totals.dense);
        assert_int_equal(totals.n_shared, 300);
        assert_int_equal(totals.n_computed, 820);
        for (size_t i = 0; i < n; i++) assert_int_equal(steps[i].measure, i == 3);
        assert_int_equal(steps[1].action, KVL_ACTION_COMPUTE);
        assert_non_null(strstr(steps[1].reason, "another slot"));
        assert_non_null(strstr(steps[3].reason, m == 0 ? "too few" : "no anchor is near"));
    }
}

static void test_without_all_or_nothing_only_the_slot_is_computed(void **state)
{
    (void)state;
    kvl_plan_part parts[PARTS_MAX];
    kvl_plan_step steps[PARTS_MAX];
    kvl_plan_totals totals;
    kvl_plan_options options = kvl_plan_default_options();
    options.all_or_nothing = false;
    const size_t n = agent_prompt(parts);
    parts[1].verdict = KVL_ANCHOR_TOO_FAR;
    kvl_plan_make(&options, &rates, parts, n, steps, &totals);
    assert_false(totals.dense);
    assert_int_equal(steps[1].action, KVL_ACTION_COMPUTE);
    assert_true(steps[1].measure);
    assert_int_equal(steps[2].action, KVL_ACTION_COMPUTE); /* its slot's anchors do not fit */
    assert_int_equal(steps[3].action, KVL_ACTION_OFFSET);
}

static void test_fast_places_what_no_anchor_covers(void **state)
{
    (void)state;
    kvl_plan_part parts[PARTS_MAX];
    kvl_plan_step steps[PARTS_MAX];
    kvl_plan_totals totals;
    kvl_plan_options options = kvl_plan_default_options();
    options.quality = KVL_QUALITY_FAST;
    const size_t n = agent_prompt(parts);
    parts[1].verdict = KVL_ANCHOR_TOO_FEW;
    kvl_plan_make(&options, &rates, parts, n, steps, &totals);
    assert_int_equal(steps[1].action, KVL_ACTION_PLACE);
    assert_int_equal(steps[2].action, KVL_ACTION_PLACE);
    assert_int_equal(steps[3].action, KVL_ACTION_OFFSET);
    assert_int_equal(totals.n_placed, 600);
    assert_false(totals.dense);
}

static void test_anchors_off_places_and_reuse_off_computes(void **state)
{
    (void)state;
    kvl_plan_part parts[PARTS_MAX];
    kvl_plan_step steps[PARTS_MAX];
    kvl_plan_totals totals;
    kvl_plan_options options = kvl_plan_default_options();
    const size_t n = agent_prompt(parts);
    parts[3].verdict = KVL_ANCHOR_TOO_FEW;
    options.anchors = false;
    kvl_plan_make(&options, &rates, parts, n, steps, &totals);
    assert_int_equal(totals.n_placed, 800);
    assert_int_equal(totals.n_shared, 300);
    assert_int_equal(steps[4].action, KVL_ACTION_COMPUTE); /* short text, placed or not */
    options.reuse = false;
    kvl_plan_make(&options, &rates, parts, n, steps, &totals);
    assert_int_equal(totals.n_computed, 1120);
    assert_int_equal(totals.n_shared, 0);
}

/* A slot that has no segment is computed and takes nobody with it: it can never be measured. */
static void test_slot_without_segment_is_computed_alone(void **state)
{
    (void)state;
    kvl_plan_part parts[PARTS_MAX];
    kvl_plan_step steps[PARTS_MAX];
    kvl_plan_totals totals;
    const kvl_plan_options options = kvl_plan_default_options();
    const size_t n = agent_prompt(parts);
    parts[3].where = KVL_SEGMENT_NOWHERE;
    parts[3].verdict = KVL_ANCHOR_TOO_FEW;
    kvl_plan_make(&options, &rates, parts, n, steps, &totals);
    assert_false(totals.dense);
    assert_false(steps[3].measure);
    assert_int_equal(steps[1].action, KVL_ACTION_OFFSET);
    assert_int_equal(steps[3].action, KVL_ACTION_COMPUTE);
}

static void test_short_text_after_a_slot_is_computed(void **state)
{
    (void)state;
    kvl_plan_part parts[3] = {slot(100, KVL_ANCHOR_SHARE), text(48), text(100)};
    kvl_plan_step steps[3];
    kvl_plan_totals totals;
    kvl_plan_options options = kvl_plan_default_options();
    kvl_plan_make(&options, &rates, parts, 3, steps, &totals);
    assert_int_equal(steps[1].action, KVL_ACTION_COMPUTE);
    assert_int_equal(steps[2].action, KVL_ACTION_COMPUTE); /* behind a text: no anchor knows it */
    parts[1].n_tokens = 49;
    kvl_plan_make(&options, &rates, parts, 3, steps, &totals);
    assert_int_equal(steps[1].action, KVL_ACTION_OFFSET);
    options.short_text_tokens = 49;
    kvl_plan_make(&options, &rates, parts, 3, steps, &totals);
    assert_int_equal(steps[1].action, KVL_ACTION_COMPUTE);
}

static void test_reuse_that_does_not_pay_is_not_admitted(void **state)
{
    (void)state;
    kvl_plan_part parts[2] = {slot(400, KVL_ANCHOR_SHARE), text(10)};
    kvl_plan_step steps[2];
    kvl_plan_totals totals;
    const kvl_plan_options options = kvl_plan_default_options();
    kvl_plan_rates slow = rates;

    parts[0].where = KVL_SEGMENT_PEER; /* 416 ms to compute, 4 to place, 10 to correct */
    parts[0].segment_bytes = (uint64_t)(400.0 * 1e5);
    kvl_plan_make(&options, &slow, parts, 2, steps, &totals);
    assert_int_equal(steps[0].action, KVL_ACTION_OFFSET);
    assert_near(steps[0].cost_ms, 1.0 + 400.0 + 4.0 + 10.0);
    parts[0].segment_bytes += (uint64_t)(2.0 * 1e5);
    kvl_plan_make(&options, &slow, parts, 2, steps, &totals);
    assert_int_equal(steps[0].action, KVL_ACTION_COMPUTE);

    parts[0] = slot(400, KVL_ANCHOR_SHARE);
    slow.offset_tokens_per_ms = 4.0; /* 500 ms to correct */
    kvl_plan_make(&options, &slow, parts, 2, steps, &totals);
    assert_int_equal(steps[0].action, KVL_ACTION_COMPUTE);
    assert_non_null(strstr(steps[0].reason, "correct"));
    /* And a slot for which loading alone costs too much is no reason to go dense. */
    parts[0].verdict = KVL_ANCHOR_TOO_FEW;
    slow.place_tokens_per_ms = 0.5;
    kvl_plan_make(&options, &slow, parts, 2, steps, &totals);
    assert_false(totals.dense);
    assert_false(steps[0].measure);
}

static void test_unknown_rate_is_never_chosen(void **state)
{
    (void)state;
    kvl_plan_part parts[2] = {slot(400, KVL_ANCHOR_SHARE), text(10)};
    kvl_plan_step steps[2];
    kvl_plan_totals totals;
    const kvl_plan_options options = kvl_plan_default_options();
    for (int which = 0; which < 4; which++) {
        kvl_plan_rates unknown = rates;
        parts[0].where = which == 3 ? KVL_SEGMENT_PEER : KVL_SEGMENT_LOCAL;
        if (which == 0) unknown.place_tokens_per_ms = 0.0;
        if (which == 1) unknown.offset_tokens_per_ms = 0.0;
        if (which == 2) unknown.local_bytes_per_ms = 0.0;
        if (which == 3) unknown.fetch_bytes_per_ms = 0.0;
        kvl_plan_make(&options, &unknown, parts, 2, steps, &totals);
        assert_int_equal(steps[0].action, KVL_ACTION_COMPUTE);
        kvl_plan_make(&options, &rates, parts, 2, steps, &totals);
        assert_int_equal(steps[0].action, KVL_ACTION_OFFSET);
    }
}

static void test_sharing_ends_with_the_first_part_that_is_not_whole(void **state)
{
    (void)state;
    kvl_plan_part parts[3] = {text(100), slot(200, KVL_ANCHOR_SHARE), text(10)};
    kvl_plan_step steps[3];
    kvl_plan_totals totals;
    const kvl_plan_options options = kvl_plan_default_options();
    parts[0].n_shared = 96;
    parts[1].n_shared = 64;
    kvl_plan_make(&options, &rates, parts, 3, steps, &totals);
    assert_int_equal(steps[0].n_shared, 96);
    assert_int_equal(steps[0].n_computed, 4);
    assert_int_equal(steps[1].n_shared, 0);
    parts[0].n_shared = 100;
    kvl_plan_make(&options, &rates, parts, 3, steps, &totals);
    assert_int_equal(steps[0].action, KVL_ACTION_SHARE);
    assert_int_equal(steps[1].n_shared, 64);
    assert_int_equal(steps[1].n_reused, 136);
    assert_int_equal(steps[1].action, KVL_ACTION_OFFSET);
}

static void test_last_token_is_computed(void **state)
{
    (void)state;
    kvl_plan_step steps[3];
    kvl_plan_totals totals;
    const kvl_plan_options options = kvl_plan_default_options();
    kvl_plan_part parts[3] = {text(100), slot(200, KVL_ANCHOR_EXACT), text(0)};
    parts[0].n_shared = 100;
    kvl_plan_make(&options, &rates, parts, 3, steps, &totals);
    assert_int_equal(steps[1].n_reused, 199);
    assert_int_equal(steps[1].n_computed, 1);
    assert_int_equal(totals.n_computed, 1);
    parts[1].n_shared = 200; /* the whole prompt is known: all but one row */
    kvl_plan_make(&options, &rates, parts, 3, steps, &totals);
    assert_int_equal(steps[1].action, KVL_ACTION_SHARE);
    assert_int_equal(steps[1].n_shared, 199);
    assert_int_equal(totals.n_computed, 1);
    parts[1].n_tokens = 1;
    parts[1].n_shared = 0;
    kvl_plan_make(&options, &rates, parts, 3, steps, &totals);
    assert_int_equal(steps[1].action, KVL_ACTION_COMPUTE);
    assert_non_null(strstr(steps[1].reason, "last token"));
    kvl_plan_make(&options, &rates, NULL, 0, NULL, &totals);
    assert_int_equal(totals.n_tokens, 0);
}

static kvl_plan_part random_part(kvl_random *random)
{
    kvl_plan_part part = {
        .kind = kvl_test_below(random, 2) == 0 ? KVL_PART_TEXT : KVL_PART_SLOT,
        .n_tokens = kvl_test_below(random, 4) == 0 ? kvl_test_below(random, 3)
                                                   : kvl_test_below(random, 600),
        .where = (kvl_segment_where)kvl_test_below(random, 3),
        .segment_bytes = kvl_test_below(random, 40000000),
        .verdict = (kvl_anchor_verdict)kvl_test_below(random, 4),
        .n_anchors = kvl_test_below(random, 20),
    };
    if (kvl_test_below(random, 2) == 0) {
        part.n_shared = part.n_tokens;
    } else if (part.n_tokens > 0) {
        part.n_shared = kvl_test_below(random, part.n_tokens);
    }
    return part;
}

static void check_step(const kvl_plan_options *options, const kvl_plan_part *part,
                       const kvl_plan_step *step)
{
    assert_int_equal((uint64_t)step->n_shared + step->n_reused + step->n_computed, part->n_tokens);
    assert_true(step->n_shared <= part->n_shared);
    assert_non_null(step->reason);
    /* Nothing is chosen that costs more than computing it. */
    assert_true(step->cost_ms <= step->compute_ms * (1.0 + 1e-12));
    if (step->n_reused > 0) {
        assert_true(step->action == KVL_ACTION_PLACE || step->action == KVL_ACTION_OFFSET ||
                    step->action == KVL_ACTION_BLEND);
        if (step->action == KVL_ACTION_BLEND) assert_true(options->blend);
        assert_int_not_equal(part->where, KVL_SEGMENT_NOWHERE);
        assert_true(options->reuse && options->quality != KVL_QUALITY_EXACT);
        if (step->action == KVL_ACTION_OFFSET) assert_true(options->anchors);
        if (step->action == KVL_ACTION_PLACE) {
            assert_true(!options->anchors || options->quality == KVL_QUALITY_FAST);
            if (part->kind == KVL_PART_SLOT) assert_false(options->blend);
        }
    }
    if (step->measure) {
        assert_int_equal(part->kind, KVL_PART_SLOT);
        assert_int_equal(step->n_reused, 0);
        assert_true(part->verdict == KVL_ANCHOR_TOO_FEW || part->verdict == KVL_ANCHOR_TOO_FAR);
    }
}

/* Invariant 12 of reuse: what is shared, reused and computed adds up to the prompt, in order; the
 * text before the first slot is never corrected. */
static void test_any_prompt_adds_up(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 20000; round++) {
        kvl_plan_part parts[PARTS_MAX];
        kvl_plan_step steps[PARTS_MAX];
        kvl_plan_totals totals;
        const size_t n = 1 + kvl_test_below(&random, PARTS_MAX);
        for (size_t i = 0; i < n; i++) parts[i] = random_part(&random);
        const kvl_plan_options options = {
            .quality = (kvl_quality)kvl_test_below(&random, 3),
            .reuse = kvl_test_below(&random, 8) != 0,
            .anchors = kvl_test_below(&random, 4) != 0,
            .all_or_nothing = kvl_test_below(&random, 2) == 0,
            .short_text_tokens = kvl_test_below(&random, 100),
            .blend = kvl_test_below(&random, 3) == 0,
            .blend_share = 0.2,
            .errors = kvl_error_model_first(),
            .error_budget = kvl_test_below(&random, 3) != 0
                                ? HUGE_VAL
                                : (double)kvl_test_below(&random, 40) / 100,
        };
        kvl_plan_make(&options, &rates, parts, n, steps, &totals);
        bool in_prefix = options.reuse, slot_seen = false;
        uint64_t n_tokens = 0, n_reused = 0;
        const kvl_plan_step *last = NULL;
        for (size_t i = 0; i < n; i++) {
            check_step(&options, &parts[i], &steps[i]);
            if (!in_prefix) assert_int_equal(steps[i].n_shared, 0);
            if (totals.dense) assert_int_equal(steps[i].n_reused, 0);
            slot_seen = slot_seen || parts[i].kind == KVL_PART_SLOT;
            if (!slot_seen) assert_int_not_equal(steps[i].action, KVL_ACTION_OFFSET);
            in_prefix = in_prefix && parts[i].n_shared == parts[i].n_tokens;
            n_tokens += parts[i].n_tokens;
            n_reused += steps[i].n_reused;
            if (parts[i].n_tokens > 0) last = &steps[i];
        }
        if (last != NULL) assert_true(last->n_computed >= 1);
        assert_int_equal(totals.n_tokens, n_tokens);
        assert_int_equal(totals.n_placed + totals.n_offset + totals.n_blended, n_reused);
        assert_int_equal(totals.n_shared + n_reused + totals.n_computed, n_tokens);
    }
}

static double random_kl(kvl_random *random)
{
    return (double)kvl_test_below(random, 1000) / 1000.0;
}

/* What the planner may choose of a part, priced by plans in which it alone is so. */
typedef struct priced {
    double cost, error;
} priced;

static double price_total(const kvl_plan_options *options, const kvl_plan_part *parts, size_t n,
                          const bool *computed, double *error)
{
    kvl_plan_part changed[PARTS_MAX];
    kvl_plan_step steps[PARTS_MAX];
    kvl_plan_totals totals;
    for (size_t i = 0; i < n; i++) {
        changed[i] = parts[i];
        if (computed[i]) changed[i].where = KVL_SEGMENT_NOWHERE;
    }
    kvl_plan_options free_of_budget = *options;
    free_of_budget.error_budget = HUGE_VAL;
    kvl_plan_make(&free_of_budget, &rates, changed, n, steps, &totals);
    *error = totals.error;
    return totals.cost_ms;
}

/* Of all ways to compute some of the parts, by brute force. */
static priced cheapest(const kvl_plan_options *options, const kvl_plan_part *parts, size_t n)
{
    priced best = {HUGE_VAL, HUGE_VAL};
    for (uint32_t set = 0; set < 1U << n; set++) {
        bool computed[PARTS_MAX] = {false};
        for (size_t i = 0; i < n; i++) computed[i] = (set >> i & 1U) != 0;
        priced at = {0.0, 0.0};
        at.cost = price_total(options, parts, n, computed, &at.error);
        if (at.error <= options->error_budget && at.cost < best.cost) best = at;
    }
    return best;
}

static kvl_plan_options random_budget(kvl_random *random)
{
    kvl_plan_options options = kvl_plan_default_options();
    options.quality = KVL_QUALITY_FAST;
    options.all_or_nothing = false;
    options.anchors = kvl_test_below(random, 4) != 0;
    for (uint32_t a = KVL_ACTION_PLACE; a < KVL_ACTIONS; a++)
        options.errors.kl[a] = random_kl(random);
    options.error_budget = 0.001 + 0.3 * random_kl(random);
    return options;
}

/* As cheap as what brute force finds among all subsets of computed parts, and within the budget. */
static void test_the_cheapest_under_the_budget_is_chosen(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    uint32_t n_bound = 0;
    for (int round = 0; round < 2000; round++) {
        kvl_plan_part parts[PARTS_MAX];
        kvl_plan_step steps[PARTS_MAX];
        kvl_plan_totals totals;
        const size_t n = 1 + kvl_test_below(&random, 6);
        for (size_t i = 0; i < n; i++) parts[i] = random_part(&random);
        const kvl_plan_options options = random_budget(&random);
        kvl_plan_make(&options, &rates, parts, n, steps, &totals);
        const priced best = cheapest(&options, parts, n);
        assert_true(totals.error <= options.error_budget);
        assert_true(totals.cost_ms <= best.cost * (1.0 + 1e-9));
        kvl_plan_options no_budget = options;
        no_budget.error_budget = HUGE_VAL;
        kvl_plan_make(&no_budget, &rates, parts, n, steps, &totals);
        n_bound += totals.error > options.error_budget;
    }
    assert_true(n_bound > 200); /* otherwise the budget was not asked */
}

static void test_more_budget_never_costs_more_and_none_is_exact(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 2000; round++) {
        kvl_plan_part parts[PARTS_MAX];
        kvl_plan_step steps[PARTS_MAX], exact_steps[PARTS_MAX];
        kvl_plan_totals totals, exact;
        const size_t n = 1 + kvl_test_below(&random, PARTS_MAX);
        for (size_t i = 0; i < n; i++) parts[i] = random_part(&random);
        kvl_plan_options options = random_budget(&random);
        options.blend = kvl_test_below(&random, 2) == 0;
        kvl_plan_options is_exact = options;
        is_exact.quality = KVL_QUALITY_EXACT;
        kvl_plan_make(&is_exact, &rates, parts, n, exact_steps, &exact);
        options.error_budget = 0.0;
        kvl_plan_make(&options, &rates, parts, n, steps, &totals);
        assert_int_equal(totals.n_shared, exact.n_shared);
        assert_int_equal(totals.n_computed, exact.n_computed);
        assert_true(totals.error == 0.0);
        for (size_t i = 0; i < n; i++) {
            assert_int_equal(steps[i].action, exact_steps[i].action);
            assert_int_equal(steps[i].n_reused, 0);
        }
        double before = totals.cost_ms;
        for (int step = 1; step <= 8; step++) {
            options.error_budget = 0.05 * step;
            kvl_plan_make(&options, &rates, parts, n, steps, &totals);
            assert_true(totals.error <= options.error_budget);
            assert_true(totals.cost_ms <= before * (1.0 + 1e-9));
            before = totals.cost_ms;
            double sum = 0.0;
            for (size_t i = 0; i < n; i++) sum += steps[i].error;
            assert_near(sum, totals.error);
        }
    }
}

/* A slot that is corrected is blended where that is what the budget has room for. */
static void test_a_tight_budget_blends_before_it_computes(void **state)
{
    (void)state;
    kvl_plan_options options = kvl_plan_default_options();
    options.blend = true;
    options.errors.kl[KVL_ACTION_OFFSET] = 0.5;
    options.errors.kl[KVL_ACTION_BLEND] = 0.1;
    const kvl_plan_part parts[2] = {slot(400, KVL_ANCHOR_SHARE), text(10)};
    kvl_plan_step steps[2];
    kvl_plan_totals totals;
    kvl_plan_make(&options, &rates, parts, 2, steps, &totals);
    assert_int_equal(steps[0].action, KVL_ACTION_OFFSET);
    options.error_budget = 0.2;
    kvl_plan_make(&options, &rates, parts, 2, steps, &totals);
    assert_int_equal(steps[0].action, KVL_ACTION_BLEND);
    options.error_budget = 0.05;
    kvl_plan_make(&options, &rates, parts, 2, steps, &totals);
    assert_int_equal(steps[0].action, KVL_ACTION_COMPUTE);
    assert_non_null(strstr(steps[0].reason, "budget"));
}

/* More parts than are weighed against each other: the rest is computed, within the budget. */
static void test_many_parts_stay_under_the_budget(void **state)
{
    (void)state;
    enum { MANY = 200 };
    kvl_random random = kvl_test_random();
    kvl_plan_part parts[MANY];
    kvl_plan_step steps[MANY];
    kvl_plan_totals totals;
    for (int round = 0; round < 50; round++) {
        for (size_t i = 0; i < MANY; i++) {
            parts[i] = random_part(&random);
            parts[i].n_shared = 0;
        }
        kvl_plan_options options = random_budget(&random);
        options.blend = kvl_test_below(&random, 2) == 0;
        options.error_budget = 0.05;
        kvl_plan_make(&options, &rates, parts, MANY, steps, &totals);
        assert_true(totals.error <= options.error_budget);
        kvl_action slot_action = KVL_ACTION_COMPUTE;
        for (size_t i = 0; i < MANY; i++) {
            /* A text is corrected beside a slot that is, and nowhere else. */
            if (parts[i].kind == KVL_PART_TEXT && steps[i].action == KVL_ACTION_OFFSET)
                assert_int_equal(slot_action, KVL_ACTION_OFFSET);
            slot_action = steps[i].action;
        }
    }
}

static void test_errors_are_learnt(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    const double truth[KVL_ACTIONS] = {0.0, 0.0, 0.5, 0.02, 0.2};
    kvl_error_model model = kvl_error_model_first();
    for (int i = 0; i < 20000; i++) {
        double shares[KVL_ACTIONS] = {0.0};
        double kl = 0.0;
        for (uint32_t a = 0; a < KVL_ACTIONS; a++) {
            shares[a] = random_kl(&random) / KVL_ACTIONS;
            kl += shares[a] * truth[a];
        }
        kvl_error_learn(&model, shares, kl * (0.5 + random_kl(&random)));
    }
    for (uint32_t a = 0; a < KVL_ACTIONS; a++) {
        assert_true(model.kl[a] > truth[a] - 0.12);
        assert_true(model.kl[a] < truth[a] + 0.12);
    }
    const kvl_error_model before = model;
    const double nothing[KVL_ACTIONS] = {0.9, 0.1};
    kvl_error_learn(&model, nothing, 3.0); /* exact actions have no error to learn */
    kvl_error_learn(&model, truth, nan(""));
    assert_memory_equal(&before, &model, sizeof model);
    const double all_placed[KVL_ACTIONS] = {0.0, 0.0, 1.0};
    for (int i = 0; i < 1000; i++) kvl_error_learn(&model, all_placed, 1e30);
    assert_true(model.kl[KVL_ACTION_PLACE] <= 10.0);
    for (int i = 0; i < 1000; i++) kvl_error_learn(&model, all_placed, -1.0);
    assert_true(model.kl[KVL_ACTION_PLACE] >= 0.0);
}

/* Loaded beside computing again, what is slower decides: up to the share nothing changes, beyond it
 * the share grows with the time of loading, at no cost; one after the other, times add up. */
static void test_slow_loading_computes_more_again(void **state)
{
    (void)state;
    kvl_plan_options options = kvl_plan_default_options();
    options.anchors = false;
    options.blend = true;
    double share_before = 0.0;
    bool grew = false, declined = false;
    for (double bytes_per_ms = 1e6; bytes_per_ms > 10.0; bytes_per_ms /= 1.5) {
        kvl_plan_part parts[] = {text(50), slot(500, KVL_ANCHOR_TOO_FEW), text(20)};
        kvl_plan_step steps[3];
        kvl_plan_totals totals;
        kvl_plan_rates slow = rates;
        parts[0].n_shared = 50;
        parts[1].segment_bytes = 100000;
        slow.local_bytes_per_ms = bytes_per_ms;
        const double load_ms = kvl_plan_load_ms(&slow, &parts[1], 500);
        const double prefill_ms = kvl_plan_compute_ms(&slow, 50, 500);
        options.blend_overlaps = true;
        kvl_plan_make(&options, &slow, parts, 3, steps, &totals);
        if (load_ms >= prefill_ms) {
            assert_int_equal(steps[1].action, KVL_ACTION_COMPUTE);
            assert_true(totals.blend_share == 0.0);
            declined = true;
            continue;
        }
        assert_int_equal(steps[1].action, KVL_ACTION_BLEND);
        assert_near(steps[1].blend_share, fmax(options.blend_share, load_ms / prefill_ms));
        assert_near(totals.blend_share, steps[1].blend_share);
        assert_true(steps[1].blend_share >= share_before);
        assert_near(steps[1].cost_ms, fmax(load_ms, options.blend_share * prefill_ms));
        grew = grew || steps[1].blend_share > options.blend_share;
        share_before = steps[1].blend_share;
        options.blend_overlaps = false;
        kvl_plan_make(&options, &slow, parts, 3, steps, &totals);
        const double sum_ms = load_ms + options.blend_share * prefill_ms;
        assert_int_equal(steps[1].action,
                         sum_ms < prefill_ms ? KVL_ACTION_BLEND : KVL_ACTION_COMPUTE);
        if (sum_ms < prefill_ms) {
            assert_near(steps[1].blend_share, options.blend_share);
            assert_near(steps[1].cost_ms, sum_ms);
        }
    }
    assert_true(grew && declined);
}

/* Chunks that no anchor covers are blended; a slot with anchors is corrected all the same, and
 * nothing makes the prompt dense. */
static void test_blending_covers_what_anchors_do_not(void **state)
{
    (void)state;
    kvl_plan_options options = kvl_plan_default_options();
    options.blend = true;
    kvl_plan_step steps[4];
    kvl_plan_totals totals;
    const kvl_plan_part parts[4] = {text(100), slot(200, KVL_ANCHOR_TOO_FEW),
                                    slot(300, KVL_ANCHOR_SHARE), text(30)};
    kvl_plan_make(&options, &rates, parts, 4, steps, &totals);
    assert_false(totals.dense);
    assert_int_equal(steps[1].action, KVL_ACTION_BLEND);
    assert_int_equal(steps[2].action, KVL_ACTION_OFFSET);
    assert_int_equal(totals.n_blended, 200);
    assert_false(steps[1].measure);
    options.anchors = false;
    kvl_plan_make(&options, &rates, parts, 4, steps, &totals);
    assert_int_equal(totals.n_blended, 500);
    options.quality = KVL_QUALITY_EXACT;
    kvl_plan_make(&options, &rates, parts, 4, steps, &totals);
    assert_int_equal(totals.n_blended, 0);
    /* Blending that costs more than the prefill it saves is no use. */
    options.quality = KVL_QUALITY_BALANCED;
    options.blend_share = 1.0;
    kvl_plan_make(&options, &rates, parts, 4, steps, &totals);
    assert_int_equal(totals.n_blended, 0);
}

static void test_actions_have_names(void **state)
{
    (void)state;
    assert_string_equal(kvl_action_name(KVL_ACTION_COMPUTE), "compute");
    assert_string_equal(kvl_action_name(KVL_ACTION_SHARE), "share");
    assert_string_equal(kvl_action_name(KVL_ACTION_PLACE), "place");
    assert_string_equal(kvl_action_name(KVL_ACTION_OFFSET), "offset");
    assert_string_equal(kvl_action_name(KVL_ACTION_BLEND), "blend");
    assert_string_equal(kvl_action_name((kvl_action)77), "unknown");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_agent_prompt_is_reused),
        cmocka_unit_test(test_exact_quality_shares_and_computes_only),
        cmocka_unit_test(test_one_missing_slot_makes_the_prompt_dense),
        cmocka_unit_test(test_without_all_or_nothing_only_the_slot_is_computed),
        cmocka_unit_test(test_fast_places_what_no_anchor_covers),
        cmocka_unit_test(test_anchors_off_places_and_reuse_off_computes),
        cmocka_unit_test(test_slot_without_segment_is_computed_alone),
        cmocka_unit_test(test_short_text_after_a_slot_is_computed),
        cmocka_unit_test(test_reuse_that_does_not_pay_is_not_admitted),
        cmocka_unit_test(test_unknown_rate_is_never_chosen),
        cmocka_unit_test(test_sharing_ends_with_the_first_part_that_is_not_whole),
        cmocka_unit_test(test_last_token_is_computed),
        cmocka_unit_test(test_any_prompt_adds_up),
        cmocka_unit_test(test_blending_covers_what_anchors_do_not),
        cmocka_unit_test(test_slow_loading_computes_more_again),
        cmocka_unit_test(test_the_cheapest_under_the_budget_is_chosen),
        cmocka_unit_test(test_more_budget_never_costs_more_and_none_is_exact),
        cmocka_unit_test(test_a_tight_budget_blends_before_it_computes),
        cmocka_unit_test(test_many_parts_stay_under_the_budget),
        cmocka_unit_test(test_errors_are_learnt),
        cmocka_unit_test(test_actions_have_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
