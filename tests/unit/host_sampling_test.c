/* host/sampling: who may be drawn and how often, against a naive twin in double that sorts
 * everything; penalties and logprobs against their definitions.
 * Bound of frequencies: 5 standard deviations of a binomial count, 0.6 in a million a check. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "host/sampling.h"
#include "test_random.h"

#include <math.h>

enum { VOCABULARY = 50, IDS_MAX = 40, DRAWS = 4000 };

typedef struct ranked {
    double probability;
    uint32_t token;
} ranked;

static int by_probability(const void *a, const void *b)
{
    const ranked *x = a;
    const ranked *y = b;
    if (x->probability != y->probability) return x->probability > y->probability ? -1 : 1;
    return x->token < y->token ? -1 : 1;
}

/* Logits after penalties, by definition. */
static void penalise(const kvl_sampling *s, const kvl_sampled_text *text, const float *logits,
                     double *out)
{
    for (uint32_t id = 0; id < VOCABULARY; id++) {
        uint32_t n_answer = 0;
        bool is_there = false;
        for (uint32_t i = 0; i < text->n_ids; i++) {
            is_there |= text->ids[i] == id;
            n_answer += text->ids[i] == id && i >= text->n_prompt;
        }
        out[id] = (double)logits[id];
        if (is_there)
            out[id] = out[id] > 0.0 ? out[id] / (double)s->repetition_penalty
                                    : out[id] * (double)s->repetition_penalty;
        if (n_answer > 0)
            out[id] -= (double)s->presence_penalty + n_answer * (double)s->frequency_penalty;
    }
}

/* Probability of each token, 0 for those that top-k, top-p and min-p leave out. */
static void expect(const kvl_sampling *s, const double *logits, double *probabilities)
{
    ranked all[VOCABULARY];
    double sum = 0.0;
    double top = -INFINITY;
    for (uint32_t id = 0; id < VOCABULARY; id++) top = fmax(top, logits[id]);
    for (uint32_t id = 0; id < VOCABULARY; id++)
        all[id] = (ranked){exp((logits[id] - top) / (double)s->temperature), id};
    qsort(all, VOCABULARY, sizeof *all, by_probability);
    const uint32_t n_k = s->top_k > 0 && s->top_k < VOCABULARY ? s->top_k : VOCABULARY;
    for (uint32_t i = 0; i < n_k; i++) sum += all[i].probability;
    double kept = 0.0;
    uint32_t n = 0;
    while (n < n_k &&
           (n == 0 || (kept < (double)s->top_p * sum && all[n].probability >= (double)s->min_p)))
        kept += all[n++].probability;
    memset(probabilities, 0, VOCABULARY * sizeof *probabilities);
    for (uint32_t i = 0; i < n; i++) probabilities[all[i].token] = all[i].probability / kept;
}

static kvl_sampling random_sampling(kvl_random *random)
{
    kvl_sampling s = kvl_sampling_default();
    s.temperature = 0.2F + 1.5F * kvl_random_uniform(random);
    if (kvl_test_below(random, 2) == 0) s.top_k = 1 + kvl_test_below(random, VOCABULARY + 5);
    if (kvl_test_below(random, 2) == 0) s.top_p = 0.05F + 0.9F * kvl_random_uniform(random);
    if (kvl_test_below(random, 2) == 0) s.min_p = 0.3F * kvl_random_uniform(random);
    if (kvl_test_below(random, 2) == 0) s.repetition_penalty = 1.3F;
    if (kvl_test_below(random, 2) == 0) s.presence_penalty = 0.7F;
    if (kvl_test_below(random, 2) == 0) s.frequency_penalty = -0.2F;
    return s;
}

static kvl_sampler *make_sampler(void)
{
    kvl_sampler *sampler = NULL;
    kvl_error error;
    assert_int_equal(kvl_sampler_create(VOCABULARY, 2, &sampler, &error), KVL_OK);
    return sampler;
}

static void test_draws_follow_the_distribution(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_sampler *sampler = make_sampler();
    for (int round = 0; round < 40; round++) {
        const kvl_sampling s = random_sampling(&random);
        float logits[VOCABULARY];
        uint32_t ids[IDS_MAX];
        for (uint32_t i = 0; i < VOCABULARY; i++)
            logits[i] = 6.0F * kvl_random_uniform(&random) - 3.0F;
        for (uint32_t i = 0; i < IDS_MAX; i++) ids[i] = kvl_test_below(&random, VOCABULARY);
        const uint32_t n_ids = kvl_test_below(&random, IDS_MAX + 1);
        const kvl_sampled_text text = {ids, n_ids, kvl_test_below(&random, n_ids + 1)};
        double penalised[VOCABULARY];
        double expected[VOCABULARY];
        uint32_t counts[VOCABULARY] = {0};
        penalise(&s, &text, logits, penalised);
        expect(&s, penalised, expected);
        for (int draw = 0; draw < DRAWS; draw++) {
            kvl_drawn drawn;
            kvl_sampler_draw(sampler, (size_t)(draw % 2), &s, &text, logits, &random, &drawn);
            counts[drawn.token]++;
        }
        for (uint32_t id = 0; id < VOCABULARY; id++) {
            const double p = expected[id];
            const double bound = 5.0 * sqrt(DRAWS * p * (1.0 - p)) + 1e-9;
            /* What is rare is drawn twice more often than a normal distribution has it: a count has
             * Poisson's tail, and 3 more than five deviations is one in ten million. */
            const bool edge = p == 0.0 || fabs(p - 1.0) < 1e-12;
            if (fabs(counts[id] - DRAWS * p) > bound + (edge ? 0.0 : 3.0))
                fail_msg("token %u: drawn %u times, %g expected", id, counts[id], DRAWS * p);
        }
    }
    kvl_sampler_destroy(sampler);
}

static void test_greedy_takes_the_highest_and_lowest_id(void **state)
{
    (void)state;
    kvl_sampler *sampler = make_sampler();
    float logits[VOCABULARY] = {0};
    logits[9] = logits[30] = 2.0F;
    const kvl_sampling greedy = kvl_sampling_default();
    const uint32_t ids[] = {9};
    kvl_random random = {5};
    kvl_drawn drawn;
    kvl_sampler_draw(sampler, 0, &greedy, &(kvl_sampled_text){NULL, 0, 0}, logits, &random, &drawn);
    assert_int_equal(drawn.token, 9);
    assert_int_equal(random.state, 5);
    kvl_sampling penalised = greedy;
    penalised.repetition_penalty = 1.5F;
    kvl_sampler_draw(sampler, 0, &penalised, &(kvl_sampled_text){ids, 1, 1}, logits, &random,
                     &drawn);
    assert_int_equal(drawn.token, 30);
    kvl_sampler_destroy(sampler);
}

/* They are the model's own, whatever penalties and temperature do. */
static void test_logprobs_are_the_models(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_sampler *sampler = make_sampler();
    for (int round = 0; round < 100; round++) {
        kvl_sampling s = random_sampling(&random);
        s.with_logprobs = true;
        s.n_logprobs = kvl_test_below(&random, KVL_LOGPROBS_MAX + 1);
        float logits[VOCABULARY];
        double sum = 0.0;
        for (uint32_t i = 0; i < VOCABULARY; i++) {
            logits[i] = 20.0F * kvl_random_uniform(&random) - 10.0F;
            sum += exp((double)logits[i]);
        }
        const uint32_t ids[] = {1, 2, 3};
        kvl_drawn drawn;
        kvl_sampler_draw(sampler, 0, &s, &(kvl_sampled_text){ids, 3, 1}, logits, &random, &drawn);
        assert_true(fabs((double)drawn.logprob - ((double)logits[drawn.token] - log(sum))) < 1e-5);
        assert_int_equal(drawn.n_top, s.n_logprobs);
        for (uint32_t i = 0; i < drawn.n_top; i++) {
            const double expected = (double)logits[drawn.top[i].token] - log(sum);
            assert_true(fabs((double)drawn.top[i].logprob - expected) < 1e-5);
            uint32_t n_above = 0;
            for (uint32_t id = 0; id < VOCABULARY; id++)
                n_above += logits[id] > logits[drawn.top[i].token];
            assert_int_equal(n_above, i);
        }
    }
    kvl_sampler_destroy(sampler);
}

static void test_options_outside_their_range_are_named(void **state)
{
    (void)state;
    const struct {
        const char *name;
        kvl_sampling sampling;
    } cases[] = {
        {"temperature", {-0.1F, 0, 1.0F, 0.0F, 1.0F, 0.0F, 0.0F, false, 0}},
        {"temperature", {NAN, 0, 1.0F, 0.0F, 1.0F, 0.0F, 0.0F, false, 0}},
        {"top_p", {1.0F, 0, 1.5F, 0.0F, 1.0F, 0.0F, 0.0F, false, 0}},
        {"min_p", {1.0F, 0, 1.0F, -1.0F, 1.0F, 0.0F, 0.0F, false, 0}},
        {"repetition_penalty", {1.0F, 0, 1.0F, 0.0F, 0.0F, 0.0F, 0.0F, false, 0}},
        {"presence_penalty", {1.0F, 0, 1.0F, 0.0F, 1.0F, 3.0F, 0.0F, false, 0}},
        {"frequency_penalty", {1.0F, 0, 1.0F, 0.0F, 1.0F, 0.0F, -3.0F, false, 0}},
        {"top_logprobs", {1.0F, 0, 1.0F, 0.0F, 1.0F, 0.0F, 0.0F, true, 21}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kvl_error error = {0};
        assert_int_equal(kvl_sampling_check(&cases[i].sampling, &error), KVL_ERR_OUT_OF_RANGE);
        assert_non_null(strstr(error.text, cases[i].name));
    }
    const kvl_sampling fine = kvl_sampling_default();
    assert_int_equal(kvl_sampling_check(&fine, NULL), KVL_OK);
}

static void test_without_memory_there_is_no_sampler(void **state)
{
    (void)state;
    const int64_t n_live = kvl_alloc_live();
    for (int64_t n = 0;; n++) {
        kvl_sampler *sampler = NULL;
        kvl_error error;
        kvl_alloc_fail_after(n);
        const kvl_status status = kvl_sampler_create(VOCABULARY, 3, &sampler, &error);
        kvl_alloc_fail_after(-1);
        kvl_sampler_destroy(sampler);
        assert_int_equal(kvl_alloc_live(), n_live);
        if (status == KVL_OK) break;
        assert_int_equal(status, KVL_ERR_NO_MEMORY);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_draws_follow_the_distribution),
        cmocka_unit_test(test_greedy_takes_the_highest_and_lowest_id),
        cmocka_unit_test(test_logprobs_are_the_models),
        cmocka_unit_test(test_options_outside_their_range_are_named),
        cmocka_unit_test(test_without_memory_there_is_no_sampler),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
