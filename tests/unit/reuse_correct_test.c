/* reuse/correct: a mean is the mean, whatever the order of the texts; without data nothing changes;
 * probes move the others as their own words say; against plain twins in double. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "reuse/correct.h"
#include "reuse_anchor_case.h"

#include <float.h>
#include <math.h>

enum { TEXTS = 6, ROUNDS = 30, TOKENS_MOST = 40 };

typedef struct texts {
    kvl_kv_view shape;
    kv home[TEXTS], context[TEXTS];
} texts;

static texts texts_random(kvl_random *random)
{
    static const uint32_t dims[] = {2, 20, 64};
    texts made = {.shape = {.n_layers = 2 + kvl_test_below(random, 4),
                            .n_kv_heads = 1 + kvl_test_below(random, 3),
                            .head_dim = dims[kvl_test_below(random, 3)]}};
    for (int i = 0; i < TEXTS; i++) {
        made.home[i] = kv_random(random, &made.shape, 1 + kvl_test_below(random, TOKENS_MOST));
        made.context[i] = kv_moved(random, &made.home[i], 1.0F);
    }
    return made;
}

static void texts_free(texts *gone)
{
    for (int i = 0; i < TEXTS; i++) {
        kv_free(&gone->home[i]);
        kv_free(&gone->context[i]);
    }
}

static kvl_mean mean_of(const texts *from, bool backwards)
{
    kvl_mean mean;
    assert_int_equal(kvl_mean_init(&mean, from->shape.n_layers, from->shape.n_kv_heads,
                                   from->shape.head_dim, NULL),
                     KVL_OK);
    for (int i = 0; i < TEXTS; i++) {
        const int at = backwards ? TEXTS - 1 - i : i;
        kvl_mean_learn(&mean, &from->context[at].view, &from->home[at].view);
    }
    return mean;
}

/* Of all tokens of all texts that a row is about, at once. */
static double naive_mean(const texts *from, bool of_keys, uint32_t layer, uint32_t row, size_t d,
                         uint32_t *n)
{
    const size_t width = kv_row(&from->shape);
    double sum = 0.0;
    *n = 0;
    for (int i = 0; i < TEXTS; i++) {
        const kv *home = &from->home[i];
        const kv *context = &from->context[i];
        for (uint32_t t = 0; t < home->view.n_tokens; t++) {
            if ((t < 16 ? t : 16) != row) continue;
            const size_t at = ((size_t)layer * home->view.n_tokens + t) * width + d;
            sum += of_keys ? (double)context->keys[at] - (double)home->keys[at]
                           : (double)context->values[at] - (double)home->values[at];
            ++*n;
        }
    }
    return *n == 0 ? 0.0 : sum / *n;
}

static void test_a_mean_is_the_mean_in_any_order(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        texts given = texts_random(&random);
        const size_t width = kv_row(&given.shape);
        kvl_mean forwards = mean_of(&given, false);
        kvl_mean backwards = mean_of(&given, true);
        for (size_t i = 0; i < given.shape.n_layers * KVL_MEAN_ROWS * width; i++) {
            const uint32_t layer = (uint32_t)(i / width / KVL_MEAN_ROWS);
            const uint32_t row = (uint32_t)(i / width % KVL_MEAN_ROWS);
            uint32_t n = 0;
            /* Each text rounds once, to a mean that is at most as large as the largest of normal
             * numbers' differences, which is below 8 here. */
            const double room = 8.0 * TEXTS * (double)FLT_EPSILON;
            const double keys = naive_mean(&given, true, layer, row, i % width, &n);
            const double values = naive_mean(&given, false, layer, row, i % width, &n);
            assert_true(fabs(keys - (double)forwards.keys[i]) <= room);
            assert_true(fabs(values - (double)forwards.values[i]) <= room);
            assert_true(fabs(keys - (double)backwards.keys[i]) <= room);
            assert_true(fabs(values - (double)backwards.values[i]) <= room);
            if (layer == 0) assert_true(forwards.keys[i] == 0.0F && forwards.values[i] == 0.0F);
            if (layer == 1) assert_int_equal(forwards.n_tokens[row], n);
        }
        kvl_mean_deinit(&forwards);
        kvl_mean_deinit(&backwards);
        texts_free(&given);
    }
}

static void apply_all(const kvl_mean *mean, const kv *to)
{
    const size_t layer = to->view.n_tokens * kv_row(&to->view);
    for (uint32_t l = 0; l < to->view.n_layers; l++)
        kvl_mean_apply(mean, l, 0, to->view.n_tokens, to->keys + l * layer, to->values + l * layer);
}

static void test_without_data_nothing_changes(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    texts given = texts_random(&random);
    kvl_mean mean;
    assert_int_equal(kvl_mean_init(&mean, given.shape.n_layers, given.shape.n_kv_heads,
                                   given.shape.head_dim, NULL),
                     KVL_OK);
    kv moved = kv_copy(&given.home[0]);
    apply_all(&mean, &moved);
    assert_memory_equal(moved.keys, given.home[0].keys, moved.n * sizeof(float));
    assert_memory_equal(moved.values, given.home[0].values, moved.n * sizeof(float));
    kv_free(&moved);
    kvl_mean_deinit(&mean);
    texts_free(&given);
}

/* A text that is all that was learnt, each of its tokens with a row of its own, comes out as it
 * stood in context; and any part of a text as that part of the whole. */
static void test_one_short_text_comes_out_as_it_was(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        texts given = texts_random(&random);
        const uint32_t n = 1 + kvl_test_below(&random, KVL_MEAN_ROWS);
        kv home = kv_random(&random, &given.shape, n);
        kv context = kv_moved(&random, &home, 1.0F);
        kvl_mean mean;
        assert_int_equal(kvl_mean_init(&mean, given.shape.n_layers, given.shape.n_kv_heads,
                                       given.shape.head_dim, NULL),
                         KVL_OK);
        kvl_mean_learn(&mean, &context.view, &home.view);
        kv moved = kv_copy(&home);
        apply_all(&mean, &moved);
        for (size_t i = 0; i < moved.n; i++) {
            assert_true(fabsf(moved.keys[i] - context.keys[i]) <= 16.0F * FLT_EPSILON);
            assert_true(fabsf(moved.values[i] - context.values[i]) <= 16.0F * FLT_EPSILON);
        }
        const size_t width = kv_row(&home.view);
        const uint32_t first = kvl_test_below(&random, n);
        const size_t at = ((size_t)n + first) * width; /* layer 1 */
        kvl_mean_apply(&mean, 1, first, n - first, home.keys + at, home.values + at);
        assert_memory_equal(home.keys + at, moved.keys + at, (n - first) * width * sizeof(float));
        kvl_mean_deinit(&mean);
        kv_free(&home);
        kv_free(&context);
        kv_free(&moved);
        texts_free(&given);
    }
}

static void test_a_mean_without_memory_is_none(void **state)
{
    (void)state;
    const int64_t n_live = kvl_alloc_live();
    kvl_mean mean;
    kvl_status status = KVL_ERR_NO_MEMORY;
    int n_failed = 0;
    for (int64_t n_allowed = 0; status != KVL_OK; n_allowed++) {
        kvl_alloc_fail_after(n_allowed);
        status = kvl_mean_init(&mean, 3, 2, 8, NULL);
        kvl_alloc_fail_after(-1);
        if (status == KVL_OK) break;
        assert_int_equal(status, KVL_ERR_NO_MEMORY);
        assert_int_equal(kvl_alloc_live(), n_live);
        n_failed++;
    }
    assert_int_equal(n_failed, 3);
    kvl_mean_deinit(&mean);
    assert_int_equal(kvl_alloc_live(), n_live);
    assert_int_equal(kvl_mean_init(&mean, UINT32_MAX, UINT32_MAX, UINT32_MAX, NULL),
                     KVL_ERR_TOO_LARGE);
}

enum { POSITIONS = 120 };

/* Tokens of a prompt, each a probe, another, or neither. */
typedef struct scene {
    float deviation[POSITIONS], weights[POSITIONS];
    uint32_t probes[POSITIONS], others[POSITIONS];
    uint32_t n_probes, n_others;
} scene;

static scene scene_random(kvl_random *random)
{
    scene s = {.n_probes = 0};
    for (uint32_t p = 0; p < POSITIONS; p++) {
        const float root = kvl_random_uniform(random) * 3.0F;
        s.deviation[p] = root * root;
        const uint32_t kind = kvl_test_below(random, 3);
        if (kind == 0) s.probes[s.n_probes++] = p;
        if (kind == 1) s.others[s.n_others++] = p;
    }
    return s;
}

static void test_weights_are_what_the_words_say(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        scene s = scene_random(&random);
        kvl_probe_weights(s.deviation, s.probes, s.n_probes, s.others, s.n_others, s.weights);
        double sum = 0.0;
        for (uint32_t i = 0; i < s.n_probes; i++) sum += sqrt((double)s.deviation[s.probes[i]]);
        for (uint32_t i = 0; i < s.n_others; i++) {
            const double share = sqrt((double)s.deviation[s.others[i]]) * s.n_probes / sum;
            assert_true(fabs((double)s.weights[i] - fmin(share, 1.0)) <= 4.0 * (double)FLT_EPSILON);
        }
        /* What has not moved is not moved; nor is anything where there is nothing to compare it
         * with, or no number. */
        for (uint32_t i = 0; i < s.n_others; i++) s.deviation[s.others[i]] = 0.0F;
        if (s.n_others > 1) s.deviation[s.others[1]] = NAN;
        kvl_probe_weights(s.deviation, s.probes, s.n_probes, s.others, s.n_others, s.weights);
        for (uint32_t i = 0; i < s.n_others; i++) assert_true(s.weights[i] == 0.0F);
        for (uint32_t i = 0; i < s.n_others; i++) s.deviation[s.others[i]] = 1.0F;
        kvl_probe_weights(s.deviation, s.probes, 0, s.others, s.n_others, s.weights);
        for (uint32_t i = 0; i < s.n_others; i++) assert_true(s.weights[i] == 0.0F);
        for (uint32_t i = 0; i < s.n_probes; i++) s.deviation[s.probes[i]] = 0.0F;
        kvl_probe_weights(s.deviation, s.probes, s.n_probes, s.others, s.n_others, s.weights);
        for (uint32_t i = 0; i < s.n_others; i++) assert_true(s.weights[i] == 0.0F);
    }
}

enum { WIDTH = 24 };

/* Tokens that all moved by the same are moved back to where they belong; and in general the shift
 * is the mean, whatever the order of the probes. */
static void test_others_follow_the_probes(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        const uint32_t n = 1 + kvl_test_below(&random, 20);
        float fresh[20 * WIDTH], stale[20 * WIDTH], mirrored[2][20 * WIDTH];
        float shift[WIDTH], other[WIDTH];
        kvl_test_fill_normal(&random, fresh, (size_t)n * WIDTH);
        kvl_test_fill_normal(&random, stale, (size_t)n * WIDTH);
        for (uint32_t i = 0; i < n; i++) {
            memcpy(mirrored[0] + (size_t)i * WIDTH, fresh + (size_t)(n - 1 - i) * WIDTH,
                   WIDTH * sizeof(float));
            memcpy(mirrored[1] + (size_t)i * WIDTH, stale + (size_t)(n - 1 - i) * WIDTH,
                   WIDTH * sizeof(float));
        }
        kvl_probe_shift(fresh, stale, n, WIDTH, shift);
        kvl_probe_shift(mirrored[0], mirrored[1], n, WIDTH, other);
        for (size_t d = 0; d < WIDTH; d++) {
            double sum = 0.0;
            for (uint32_t i = 0; i < n; i++)
                sum += (double)fresh[i * WIDTH + d] - (double)stale[i * WIDTH + d];
            assert_true(fabs(sum / n - (double)shift[d]) <= 8.0 * (double)FLT_EPSILON);
            assert_true(fabsf(shift[d] - other[d]) <= 8.0F * FLT_EPSILON);
        }
        for (size_t i = 0; i < (size_t)n * WIDTH; i++) fresh[i] = stale[i] + shift[i % WIDTH];
        float weights[20];
        for (uint32_t i = 0; i < n; i++) weights[i] = i % 2 == 0 ? 1.0F : 0.0F;
        float moved[20 * WIDTH];
        memcpy(moved, stale, sizeof moved);
        kvl_probe_apply(shift, weights, n, WIDTH, moved);
        for (uint32_t i = 0; i < n; i++)
            assert_memory_equal(moved + (size_t)i * WIDTH,
                                (i % 2 == 0 ? fresh : stale) + (size_t)i * WIDTH,
                                WIDTH * sizeof(float));
        kvl_probe_shift(fresh, stale, 0, WIDTH, shift);
        for (size_t d = 0; d < WIDTH; d++) assert_true(shift[d] == 0.0F);
    }
}

static void test_the_table_knows_its_names(void **state)
{
    (void)state;
    for (const kvl_correction *c = kvl_corrections; c->name != NULL; c++)
        assert_ptr_equal(kvl_correct_find(c->name), c);
    assert_int_equal(kvl_corrections[0].kind, KVL_CORRECT_NONE);
    assert_null(kvl_correct_find(""));
    assert_null(kvl_correct_find("meander"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_mean_is_the_mean_in_any_order),
        cmocka_unit_test(test_without_data_nothing_changes),
        cmocka_unit_test(test_one_short_text_comes_out_as_it_was),
        cmocka_unit_test(test_a_mean_without_memory_is_none),
        cmocka_unit_test(test_weights_are_what_the_words_say),
        cmocka_unit_test(test_others_follow_the_probes),
        cmocka_unit_test(test_the_table_knows_its_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
