/* reuse/anchor_shrink: what anchors agree on is added, what they do not agree on is left out, and a
 * token that is the anchor's own gets the anchor's own offset; against a plain twin in double. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "reuse_anchor_case.h"

#include <float.h>
#include <math.h>

enum { ANCHORS = 5, ROUNDS = 20, HEAD = 16 };

static kvl_anchor_options shrinking_options(void)
{
    kvl_anchor_options options = exact_options();
    options.shrink = true;
    return options;
}

/* Texts of one slot with nothing after it. */
typedef struct scene {
    kvl_kv_view shape;
    kv nothing;
    example request;
    example anchors[ANCHORS];
    uint32_t n;
} scene;

static scene scene_random(kvl_random *random, uint32_t n, uint32_t n_tokens)
{
    static const uint32_t dims[] = {4, 20, 64};
    scene made = {.n = n};
    made.shape = (kvl_kv_view){.n_layers = 3 + kvl_test_below(random, 5),
                               .n_kv_heads = 1 + kvl_test_below(random, 3),
                               .head_dim = dims[kvl_test_below(random, 3)]};
    made.nothing = kv_zero(made.shape.n_layers, 0, made.shape.n_kv_heads, made.shape.head_dim);
    made.request = example_random(random, 1000, &made.shape, n_tokens, &made.nothing);
    for (uint32_t a = 0; a < n; a++)
        made.anchors[a] = example_random(random, a, &made.shape,
                                         n_tokens + kvl_test_below(random, 9), &made.nothing);
    return made;
}

static void scene_free(scene *gone)
{
    kv_free(&gone->nothing);
    example_free(&gone->request);
    for (uint32_t a = 0; a < gone->n; a++) example_free(&gone->anchors[a]);
}

/* Every token of anchor a past layer 0 changes by sign * offset [width], the same in all layers. */
static void offset_evenly(example *e, const float *offset, float sign)
{
    const size_t width = kv_row(&e->base.view);
    for (size_t i = e->base.view.n_tokens * width; i < e->base.n; i++) {
        e->real.keys[i] = e->base.keys[i] + sign * offset[i % width];
        e->real.values[i] = e->base.values[i] + sign * offset[i % width];
    }
}

static corrected corrected_by(const kvl_anchor_options *options, const scene *s)
{
    kvl_anchor_pool *pool = pool_of(options);
    for (uint32_t a = 0; a < s->n; a++) example_measure(pool, &s->anchors[a]);
    corrected out = correct(pool, &s->request);
    kvl_anchor_pool_destroy(pool);
    return out;
}

static void test_agreed_offsets_are_added_whole(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        scene s =
            scene_random(&random, 2 + kvl_test_below(&random, 3), 1 + kvl_test_below(&random, 60));
        const size_t width = kv_row(&s.shape);
        kv offset = kv_random(&random, &s.shape, 1);
        for (uint32_t a = 0; a < s.n; a++) offset_evenly(&s.anchors[a], offset.keys, 1.0F);
        const kvl_anchor_options options = shrinking_options();
        corrected out = corrected_by(&options, &s);
        const kv *base = &s.request.base;
        const size_t layer = base->view.n_tokens * width;
        /* Layer 0 stays, bit for bit. */
        assert_memory_equal(out.slot.keys, base->keys, layer * sizeof(float));
        for (size_t i = layer; i < base->n; i++) {
            const double wanted = (double)base->keys[i] + (double)offset.keys[i % width];
            /* Each stored offset is a difference of two floats of size 6 at most, and so is the
             * spread that shrinks their mean. */
            assert_true(fabs((double)out.slot.keys[i] - wanted) <= 200.0 * 6.0 * FLT_EPSILON);
        }
        corrected_free(&out);
        kv_free(&offset);
        scene_free(&s);
    }
}

/* Half say the opposite of the other half, and the request is like none of them: better nothing. */
static void test_contradicting_offsets_are_left_out(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        scene s = scene_random(&random, 4, 1 + kvl_test_below(&random, 60));
        kv offset = kv_random(&random, &s.shape, 1);
        /* Values of other signs stand at 1.5 or more: no token is like the anchor's. */
        for (size_t i = 0; i < s.request.base.n; i++) {
            s.request.base.values[i] = 1.0F;
            for (uint32_t a = 0; a < s.n; a++) {
                if (i < s.anchors[a].base.n) s.anchors[a].base.values[i] = -1.0F;
            }
        }
        for (uint32_t a = 0; a < s.n; a++) {
            for (size_t i = s.request.base.n; i < s.anchors[a].base.n; i++)
                s.anchors[a].base.values[i] = -1.0F;
            offset_evenly(&s.anchors[a], offset.keys, a % 2 == 0 ? 1.0F : -1.0F);
        }
        const kvl_anchor_options options = shrinking_options();
        corrected out = corrected_by(&options, &s);
        assert_same_bits(&out.slot, &s.request.base);
        corrected_free(&out);
        kv_free(&offset);
        scene_free(&s);
    }
}

/* A longer text that begins with the request's is no exact hit, but each of its tokens is. */
static void test_a_token_that_is_the_anchors_gets_its_offset(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        scene s = scene_random(&random, 1, 40 + kvl_test_below(&random, 30));
        const kv *base = &s.request.base;
        const size_t width = kv_row(&s.shape);
        const uint32_t n_long = s.anchors[0].base.view.n_tokens;
        for (uint32_t l = 0; l < s.shape.n_layers; l++) {
            for (size_t i = 0; i < base->view.n_tokens * width; i++) {
                const size_t to = l * base->view.n_tokens * width + i;
                const size_t from = l * n_long * width + i;
                s.request.base.keys[to] = s.anchors[0].base.keys[from];
                s.request.base.values[to] = s.anchors[0].base.values[from];
            }
        }
        kvl_anchor_options options = shrinking_options();
        corrected shrunk = corrected_by(&options, &s);
        options.shrink = false;
        corrected plain = corrected_by(&options, &s);
        /* A distance between equal values is 0 to rounding, so their cosine is 1 to rounding. */
        for (size_t i = 0; i < base->n; i++)
            assert_true(fabs((double)shrunk.slot.keys[i] - (double)plain.slot.keys[i]) <= 1e-5);
        corrected_free(&shrunk);
        corrected_free(&plain);
        scene_free(&s);
    }
}

/* ---- the formulas once more, in double and without tiles ---- */

static double distance_of(const kvl_kv_view *x, const kvl_kv_view *anchor, uint32_t token)
{
    if (token >= anchor->n_tokens) return INFINITY;
    const size_t width = kv_row(x);
    double difference = 0.0, norm = 0.0;
    for (uint32_t l = x->n_layers > 2 ? 2 : x->n_layers - 1; l < x->n_layers; l += 4) {
        for (size_t i = 0; i < width; i++) {
            const double v = (double)x->values[(l * x->n_tokens + token) * width + i];
            const double w = (double)anchor->values[(l * anchor->n_tokens + token) * width + i];
            difference += (v - w) * (v - w);
            norm += v * v;
        }
    }
    return sqrt(difference) / sqrt(norm);
}

static double offset_at(const example *e, bool values, uint32_t layer, uint32_t token, size_t i)
{
    const size_t at = ((size_t)layer * e->base.view.n_tokens + token) * kv_row(&e->base.view) + i;
    return values ? (double)e->real.values[at] - (double)e->base.values[at]
                  : (double)e->real.keys[at] - (double)e->base.keys[at];
}

static double mean_at(const example *e, bool values, uint32_t layer, size_t i)
{
    const uint32_t n = e->base.view.n_tokens, head = n >= 2 * HEAD ? HEAD : n / 2;
    double sum = 0.0;
    for (uint32_t t = head; t < n; t++) sum += offset_at(e, values, layer, t, i);
    return sum / (n - head);
}

/* What stands for an anchor where tokens are not alike: in the head its own token, else its mean.
 */
static double typical_at(const example *e, bool values, uint32_t layer, uint32_t token,
                         uint32_t head, size_t i)
{
    return token < head ? offset_at(e, values, layer, token, i) : mean_at(e, values, layer, i);
}

static double twin_agreement(const scene *s, bool values, uint32_t layer, uint32_t token,
                             uint32_t head)
{
    double norm = 0.0, spread = 0.0;
    if (s->n < 2) return 0.0;
    for (size_t i = 0; i < kv_row(&s->shape); i++) {
        double mean = 0.0;
        for (uint32_t a = 0; a < s->n; a++)
            mean += typical_at(&s->anchors[a], values, layer, token, head, i) / s->n;
        norm += mean * mean;
        for (uint32_t a = 0; a < s->n; a++) {
            const double away = typical_at(&s->anchors[a], values, layer, token, head, i) - mean;
            spread += away * away / (s->n - 1);
        }
    }
    return fmax(1.0 - spread / (s->n * norm), 0.0);
}

/* The correction of one token in one layer, all dimensions, compared with what came out. */
static void compare_token(const scene *s, const corrected *out, bool values, uint32_t layer,
                          uint32_t token)
{
    const kvl_kv_view *base = &s->request.base.view;
    const uint32_t head = base->n_tokens >= 2 * HEAD ? HEAD : base->n_tokens / 2;
    double weights[ANCHORS], likeness[ANCHORS], sum = 0.0;
    for (uint32_t a = 0; a < s->n; a++) {
        const double d = distance_of(base, &s->anchors[a].base.view, token);
        weights[a] = exp(-d);
        likeness[a] = fmax(1.0 - d * d / 2.0, 0.0);
        sum += weights[a];
    }
    const double agreed = twin_agreement(s, values, layer, token, head);
    const size_t width = kv_row(&s->shape);
    for (size_t i = 0; i < width; i++) {
        const size_t at = ((size_t)layer * base->n_tokens + token) * width + i;
        double wanted = values ? (double)base->values[at] : (double)base->keys[at];
        for (uint32_t a = 0; a < s->n; a++) {
            const example *e = &s->anchors[a];
            wanted += weights[a] / sum *
                      (likeness[a] * offset_at(e, values, layer, token, i) +
                       (1.0 - likeness[a]) * agreed * typical_at(e, values, layer, token, head, i));
        }
        const float got = values ? out->slot.values[at] : out->slot.keys[at];
        /* The agreement is a ratio of sums that may be small: 1e-4 of numbers of size 1. */
        if (!(fabs((double)got - wanted) <= 1e-4))
            fail_msg("layer %u token %u: %g, wanted %g", layer, token, (double)got, wanted);
    }
}

static void test_formulas(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        scene s = scene_random(&random, 1 + kvl_test_below(&random, ANCHORS),
                               1 + kvl_test_below(&random, 50));
        /* Some tokens are like the anchors', and offsets have something in common. */
        kv common = kv_random(&random, &s.shape, 1);
        for (uint32_t a = 0; a < s.n; a++) {
            kv *values = &s.anchors[a].base;
            for (size_t i = 0; i < values->n && i < s.request.base.n; i++)
                s.request.base.values[i] += 0.4F * values->values[i];
            const size_t width = kv_row(&s.shape);
            for (size_t i = values->view.n_tokens * width; i < values->n; i++) {
                s.anchors[a].real.keys[i] += 0.3F * common.keys[i % width];
                s.anchors[a].real.values[i] += 0.3F * common.values[i % width];
            }
        }
        const kvl_anchor_options options = shrinking_options();
        corrected out = corrected_by(&options, &s);
        for (uint32_t l = 1; l < s.shape.n_layers; l++) {
            for (uint32_t t = 0; t < s.request.base.view.n_tokens; t++) {
                compare_token(&s, &out, false, l, t);
                compare_token(&s, &out, true, l, t);
            }
        }
        corrected_free(&out);
        kv_free(&common);
        scene_free(&s);
    }
}

static void test_threads_change_nothing(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_pool *threads = NULL;
    assert_int_equal(kvl_pool_create(3, false, &threads, NULL), KVL_OK);
    for (int round = 0; round < ROUNDS; round++) {
        scene s = scene_random(&random, 3, 1 + kvl_test_below(&random, 60));
        kvl_anchor_options options = shrinking_options();
        options.dtype = round % 2 == 0 ? KVL_KV_INT8 : KVL_KV_F32;
        corrected alone = corrected_by(&options, &s);
        options.threads = threads;
        corrected shared = corrected_by(&options, &s);
        assert_same_bits(&alone.slot, &shared.slot);
        corrected_free(&alone);
        corrected_free(&shared);
        scene_free(&s);
    }
    kvl_pool_destroy(threads);
}

/* Tokens past the end of every anchor have no offset of their own: they get what anchors agree on.
 */
static void test_tokens_past_all_anchors_get_the_mean(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    scene s = scene_random(&random, 3, 40);
    kv offset = kv_random(&random, &s.shape, 1);
    for (uint32_t a = 0; a < s.n; a++) offset_evenly(&s.anchors[a], offset.keys, 1.0F);
    example longer = example_random(&random, 2000, &s.shape, 70, &s.nothing);
    kvl_anchor_options options = shrinking_options();
    options.coverage_min = 0.5F;
    kvl_anchor_pool *pool = pool_of(&options);
    for (uint32_t a = 0; a < s.n; a++) example_measure(pool, &s.anchors[a]);
    corrected out = correct(pool, &longer);
    const size_t width = kv_row(&s.shape);
    for (uint32_t l = 1; l < s.shape.n_layers; l++) {
        const size_t at = ((size_t)l * 70 + 69) * width;
        for (size_t i = 0; i < width; i++)
            assert_true(fabs((double)out.slot.keys[at + i] - (double)longer.base.keys[at + i] -
                             (double)offset.keys[i]) <= 200.0 * 6.0 * FLT_EPSILON);
    }
    corrected_free(&out);
    kvl_anchor_pool_destroy(pool);
    example_free(&longer);
    kv_free(&offset);
    scene_free(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_agreed_offsets_are_added_whole),
        cmocka_unit_test(test_contradicting_offsets_are_left_out),
        cmocka_unit_test(test_a_token_that_is_the_anchors_gets_its_offset),
        cmocka_unit_test(test_formulas),
        cmocka_unit_test(test_threads_change_nothing),
        cmocka_unit_test(test_tokens_past_all_anchors_get_the_mean),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
