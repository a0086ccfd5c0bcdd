/* reuse/anchor: what matching and correction promise, as properties over random shapes; both modes
 * against a plain reference in double. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "compute/rotation.h"
#include "reuse_anchor_case.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

enum { ANCHORS_MAX = 8, ROUNDS = 25 };

/* A slot with its examples. */
typedef struct scene {
    kvl_kv_view shape;
    kv after_base;
    example request;
    uint32_t n;
    example anchors[ANCHORS_MAX];
} scene;

static const uint32_t dims[] = {4, 16, 20, 64};

static scene scene_random(kvl_random *random, uint32_t n)
{
    scene made = {.n = n};
    made.shape = (kvl_kv_view){.n_layers = 1 + kvl_test_below(random, 7),
                               .n_kv_heads = 1 + kvl_test_below(random, 3),
                               .head_dim = dims[kvl_test_below(random, 4)]};
    const uint32_t n_tokens = 1 + kvl_test_below(random, 40);
    made.after_base = kv_random(random, &made.shape, kvl_test_below(random, 10));
    made.request = example_random(random, 1000, &made.shape, n_tokens, &made.after_base);
    for (uint32_t a = 0; a < n; a++) {
        made.anchors[a] = example_random(random, a, &made.shape,
                                         n_tokens + kvl_test_below(random, 10), &made.after_base);
    }
    return made;
}

static void scene_free(scene *gone)
{
    kv_free(&gone->after_base);
    example_free(&gone->request);
    for (uint32_t a = 0; a < gone->n; a++) example_free(&gone->anchors[a]);
}

static kvl_anchor_pool *measured(const kvl_anchor_options *options, const scene *s)
{
    kvl_anchor_pool *pool = pool_of(options);
    for (uint32_t a = 0; a < s->n; a++) example_measure(pool, &s->anchors[a]);
    return pool;
}

static void assert_near(const float *a, const float *b, size_t n, double bound)
{
    for (size_t i = 0; i < n; i++) {
        if (!(fabs((double)a[i] - (double)b[i]) <= bound)) {
            fail_msg("number %zu is %g, wanted %g within %g", i, (double)a[i], (double)b[i], bound);
        }
    }
}

static void assert_kv_near(const kv *a, const kv *b, double bound)
{
    assert_int_equal(a->n, b->n);
    assert_near(a->keys, b->keys, a->n, bound);
    assert_near(a->values, b->values, a->n, bound);
}

/* Invariant 1: an anchor of the very text gives what was measured, bit for bit with f32 offsets,
 * whatever else is in the pool; int8 within half a step of the largest offset of a head. */
static void test_exact_hit_gives_what_was_measured(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        scene s = scene_random(&random, 4);
        /* Also where base and truth differ by many powers of two, which a plain sum would lose. */
        for (size_t i = s.shape.head_dim; i < s.anchors[2].real.n; i += 7) {
            if (i < s.anchors[2].base.view.n_tokens * kv_row(&s.shape)) continue;
            s.anchors[2].real.keys[i] *= 1e-9F;
            s.anchors[2].base.values[i] *= 1e-7F;
        }
        kvl_anchor_options options = exact_options();
        kvl_anchor_pool *pool = measured(&options, &s);
        assert_int_equal(match_of(pool, &s.anchors[2]).verdict, KVL_ANCHOR_EXACT);
        corrected out = correct(pool, &s.anchors[2]);
        assert_same_bits(&out.slot, &s.anchors[2].real);
        assert_same_bits(&out.after, &s.anchors[2].after_real);
        corrected_free(&out);
        kvl_anchor_pool_destroy(pool);

        options.dtype = KVL_KV_INT8;
        pool = measured(&options, &s);
        out = correct(pool, &s.anchors[1]);
        /* Offsets are 0.3 of a normal number of at most 6 by construction: a step is 1.8 / 127. */
        assert_kv_near(&out.slot, &s.anchors[1].real, 0.51 * 1.8 / 127.0);
        assert_kv_near(&out.after, &s.anchors[1].after_real, 0.51 * 1.8 / 127.0);
        corrected_free(&out);
        kvl_anchor_pool_destroy(pool);
        scene_free(&s);
    }
}

/* Invariant 1, paper mode: softmax over one anchor is 1, so the same holds to rounding, and for a
 * text that is not the anchor's too, whose base then gets the anchor's offset. */
static void test_one_anchor_in_paper_mode(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        scene s = scene_random(&random, 1);
        kvl_anchor_options options = exact_options();
        options.mode = KVL_ANCHOR_PAPER;
        kvl_anchor_pool *pool = measured(&options, &s);
        assert_int_equal(match_of(pool, &s.anchors[0]).verdict, KVL_ANCHOR_SHARE);
        corrected out = correct(pool, &s.anchors[0]);
        assert_kv_near(&out.slot, &s.anchors[0].real, 16.0 * (double)FLT_EPSILON);
        assert_kv_near(&out.after, &s.anchors[0].after_real, 16.0 * (double)FLT_EPSILON);
        corrected_free(&out);
        kvl_anchor_pool_destroy(pool);
        scene_free(&s);
    }
}

/* Invariant 2: copies of an anchor under other ids weigh as much as one; the paper's entropy is
 * then its largest, so that its gate refuses. The same id is one anchor. */
static void test_copies_weigh_as_one(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int mode = 0; mode < 2; mode++) {
        for (int round = 0; round < ROUNDS; round++) {
            scene s = scene_random(&random, 1);
            kvl_anchor_options options = exact_options();
            options.mode = mode == 0 ? KVL_ANCHOR_SCALE_FREE : KVL_ANCHOR_PAPER;
            kvl_anchor_pool *pool = measured(&options, &s);
            corrected one = correct(pool, &s.request);
            example_measure(pool, &s.anchors[0]);
            kvl_anchor_stats stats;
            kvl_anchor_pool_stats(pool, &stats);
            assert_int_equal(stats.n_anchors, 1);
            for (uint64_t copy = 1; copy < 5; copy++) {
                s.anchors[0].base_id = digest_of(copy);
                example_measure(pool, &s.anchors[0]);
            }
            corrected five = correct(pool, &s.request);
            assert_kv_near(&five.slot, &one.slot, 32.0 * (double)FLT_EPSILON);
            assert_kv_near(&five.after, &one.after, 32.0 * (double)FLT_EPSILON);
            const kvl_anchor_match match = match_of(pool, &s.request);
            assert_int_equal(match.n_anchors, 5);
            assert_true(fabs((double)match.entropy_share - 1.0) < 1e-6);
            assert_int_equal(match.verdict, mode == 0 ? KVL_ANCHOR_SHARE : KVL_ANCHOR_TOO_FAR);
            corrected_free(&one);
            corrected_free(&five);
            kvl_anchor_pool_destroy(pool);
            scene_free(&s);
        }
    }
}

/* Invariant 3: no offsets, no change. Invariant 6: layer 0 never changes. */
static void test_zero_offsets_and_layer_0(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 4 * ROUNDS; round++) {
        scene s = scene_random(&random, 3);
        kvl_anchor_options options = exact_options();
        options.mode = round % 2 == 0 ? KVL_ANCHOR_SCALE_FREE : KVL_ANCHOR_PAPER;
        options.dtype = round % 4 < 2 ? KVL_KV_INT8 : KVL_KV_F32;
        kvl_anchor_pool *pool = measured(&options, &s);
        corrected out = correct(pool, &s.request);
        const size_t layer = s.request.base.view.n_tokens * kv_row(&s.shape) * sizeof(float);
        assert_memory_equal(out.slot.keys, s.request.base.keys, layer);
        assert_memory_equal(out.slot.values, s.request.base.values, layer);
        if (s.shape.n_layers > 1)
            assert_memory_not_equal(out.slot.keys, s.request.base.keys,
                                    s.request.base.n * sizeof(float));
        corrected_free(&out);
        /* An anchor whose layer 0 was measured with an offset, as rounding may leave one. */
        for (uint32_t a = 0; a < s.n; a++) s.anchors[a].real.keys[0] += 1.0F;
        for (uint32_t a = 0; a < s.n; a++) example_measure(pool, &s.anchors[a]);
        out = correct(pool, &s.request);
        assert_memory_equal(out.slot.keys, s.request.base.keys, layer);
        corrected_free(&out);
        for (uint32_t a = 0; a < s.n; a++) {
            example zero = s.anchors[a];
            zero.real = zero.base;
            zero.after_real = zero.after_base;
            example_measure(pool, &zero);
        }
        out = correct(pool, &s.request);
        assert_kv_near(&out.slot, &s.request.base, 0.0);
        assert_kv_near(&out.after, &s.request.after_base, 0.0);
        corrected_free(&out);
        kvl_anchor_pool_destroy(pool);
        scene_free(&s);
    }
}

/* Invariant 4: the order in which anchors came does not matter beyond rounding. */
static void test_order_does_not_matter(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 2 * ROUNDS; round++) {
        scene s = scene_random(&random, 5);
        kvl_anchor_options options = exact_options();
        options.mode = round % 2 == 0 ? KVL_ANCHOR_SCALE_FREE : KVL_ANCHOR_PAPER;
        kvl_anchor_pool *forwards = measured(&options, &s);
        kvl_anchor_pool *backwards = pool_of(&options);
        for (uint32_t a = s.n; a-- > 0;) example_measure(backwards, &s.anchors[a]);
        corrected one = correct(forwards, &s.request);
        corrected other = correct(backwards, &s.request);
        assert_kv_near(&one.slot, &other.slot, 32.0 * (double)FLT_EPSILON);
        assert_kv_near(&one.after, &other.after, 32.0 * (double)FLT_EPSILON);
        corrected_free(&one);
        corrected_free(&other);
        kvl_anchor_pool_destroy(forwards);
        kvl_anchor_pool_destroy(backwards);
        scene_free(&s);
    }
}

/* Invariant 5: weights are a convex combination, so every number lies in base + [least, most]. */
static void check_convex(const kv *out, const kv *base, const scene *s, bool after)
{
    const size_t row = kv_row(&s->shape);
    for (size_t i = 0; i < out->n; i++) {
        const size_t token = i / row % base->view.n_tokens;
        const size_t layer = i / row / base->view.n_tokens;
        double least = HUGE_VAL, most = -HUGE_VAL;
        for (uint32_t a = 0; a < s->n; a++) {
            const kv *from = after ? &s->anchors[a].after_base : &s->anchors[a].base;
            const kv *to = after ? &s->anchors[a].after_real : &s->anchors[a].real;
            const size_t at = (layer * from->view.n_tokens + token) * row + i % row;
            const double offset = (double)to->keys[at] - (double)from->keys[at];
            least = fmin(least, offset);
            most = fmax(most, offset);
        }
        const double slack = 32.0 * (double)FLT_EPSILON;
        assert_true((double)out->keys[i] >= (double)base->keys[i] + least - slack);
        assert_true((double)out->keys[i] <= (double)base->keys[i] + most + slack);
    }
}

static void test_result_is_a_convex_combination(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 2 * ROUNDS; round++) {
        scene s = scene_random(&random, 4);
        kvl_anchor_options options = exact_options();
        options.mode = round % 2 == 0 ? KVL_ANCHOR_SCALE_FREE : KVL_ANCHOR_PAPER;
        kvl_anchor_pool *pool = measured(&options, &s);
        corrected out = correct(pool, &s.request);
        check_convex(&out.slot, &s.request.base, &s, false);
        check_convex(&out.after, &s.request.after_base, &s, true);
        corrected_free(&out);
        kvl_anchor_pool_destroy(pool);
        scene_free(&s);
    }
}

/* Invariant 7, at full coverage as in the paper: a shorter anchor never contributes; a longer one
 * with its first tokens only. */
static void test_length_rules(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        scene s = scene_random(&random, 3);
        const uint32_t n_tokens = s.request.base.view.n_tokens;
        kvl_anchor_options options = exact_options();
        options.coverage_min = 1.0F;
        kvl_anchor_pool *pool = measured(&options, &s);
        corrected before = correct(pool, &s.request);
        if (n_tokens > 1) {
            example shorter = example_random(&random, 77, &s.shape, n_tokens - 1, &s.after_base);
            example_measure(pool, &shorter);
            example_free(&shorter);
        }
        /* What a longer anchor holds behind the request's length must not be seen. */
        const uint32_t longer_tokens = s.anchors[0].base.view.n_tokens;
        for (size_t i = 0; i < s.anchors[0].base.n; i++) {
            if (i / kv_row(&s.shape) % longer_tokens < n_tokens) continue;
            s.anchors[0].base.values[i] += 3.0F;
            s.anchors[0].real.keys[i] -= 2.0F;
        }
        kvl_anchor_pool *changed = measured(&options, &s);
        corrected after = correct(pool, &s.request);
        corrected same = correct(changed, &s.request);
        assert_same_bits(&before.slot, &after.slot);
        assert_same_bits(&before.after, &after.after);
        assert_same_bits(&before.slot, &same.slot);
        assert_int_equal(match_of(pool, &s.request).n_anchors, 3);
        corrected_free(&before);
        corrected_free(&after);
        corrected_free(&same);
        kvl_anchor_pool_destroy(pool);
        kvl_anchor_pool_destroy(changed);
        scene_free(&s);
    }
}

/* With less coverage asked for, a shorter anchor corrects the tokens that it has; those that no
 * anchor has stay as they are, bit for bit, and those before do not notice. */
static void test_shorter_anchors_correct_what_they_cover(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        scene s = scene_random(&random, 1);
        const uint32_t n_tokens = s.request.base.view.n_tokens;
        const uint32_t n_covered = 1 + kvl_test_below(&random, n_tokens);
        kvl_anchor_options options = exact_options();
        options.coverage_min = KVL_ANCHOR_COVERAGE_LEAST;
        if ((float)n_covered >= KVL_ANCHOR_COVERAGE_LEAST * (float)n_tokens) {
            kvl_anchor_pool *pool = pool_of(&options);
            example shorter = example_random(&random, 77, &s.shape, n_covered, &s.after_base);
            example_measure(pool, &shorter);
            assert_int_equal(match_of(pool, &s.request).verdict, KVL_ANCHOR_SHARE);
            corrected out = correct(pool, &s.request);
            uint32_t n_changed = 0;
            for (size_t i = 0; i < s.request.base.n; i++) {
                const bool is_covered = i / kv_row(&s.shape) % n_tokens < n_covered;
                const bool changed = out.slot.values[i] != s.request.base.values[i];
                assert_true(is_covered || !changed);
                n_changed += changed;
            }
            assert_true(s.shape.n_layers == 1 || n_changed > 0);
            corrected_free(&out);
            example_free(&shorter);
            kvl_anchor_pool_destroy(pool);
        }
        scene_free(&s);
    }
}

/* Invariant 8: the entropy is a share of its largest; 1 lets all pass, 0 only full certainty. */
static void test_entropy_gate(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        scene s = scene_random(&random, 2 + kvl_test_below(&random, 5));
        kvl_anchor_options options = exact_options();
        options.mode = KVL_ANCHOR_PAPER;
        options.entropy_share = 1.0F;
        kvl_anchor_pool *pool = measured(&options, &s);
        const kvl_anchor_match match = match_of(pool, &s.request);
        assert_true(match.entropy_share >= 0.0F && match.entropy_share <= 1.0F);
        assert_int_equal(match.verdict, KVL_ANCHOR_SHARE);
        kvl_anchor_pool_destroy(pool);
        options.entropy_share = 0.0F;
        pool = measured(&options, &s);
        const kvl_anchor_match strict = match_of(pool, &s.request);
        assert_int_equal(strict.verdict,
                         strict.entropy_share > 0.0F ? KVL_ANCHOR_TOO_FAR : KVL_ANCHOR_SHARE);
        kvl_anchor_pool_destroy(pool);
        scene_free(&s);
    }
}

/* Invariant 9: an anchor that is infinitely far changes nothing. */
static void test_far_anchor_weighs_nothing(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 2 * ROUNDS; round++) {
        scene s = scene_random(&random, 3);
        kvl_anchor_options options = exact_options();
        options.mode = round % 2 == 0 ? KVL_ANCHOR_SCALE_FREE : KVL_ANCHOR_PAPER;
        kvl_anchor_pool *pool = measured(&options, &s);
        corrected before = correct(pool, &s.request);
        example far =
            example_random(&random, 77, &s.shape, s.request.base.view.n_tokens + 3, &s.after_base);
        for (size_t i = 0; i < far.base.n; i++) {
            far.base.values[i] += 1e5F;
            far.base.keys[i] += 1e5F;
            far.real.values[i] += 1e5F;
            far.real.keys[i] += 1e5F;
        }
        example_measure(pool, &far);
        corrected after = correct(pool, &s.request);
        assert_kv_near(&before.slot, &after.slot, 0.0);
        assert_kv_near(&before.after, &after.after, 0.0);
        corrected_free(&before);
        corrected_free(&after);
        example_free(&far);
        kvl_anchor_pool_destroy(pool);
        scene_free(&s);
    }
}

/* The absolute gate: near enough at the distance itself, too far just above; never for numbers
 * that are none. */
static void test_distance_gate(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    scene s = scene_random(&random, 3);
    kvl_anchor_options options = exact_options();
    kvl_anchor_pool *pool = measured(&options, &s);
    const kvl_anchor_match match = match_of(pool, &s.request);
    assert_int_equal(match.verdict, KVL_ANCHOR_SHARE);
    kvl_anchor_pool_destroy(pool);
    const float limits[] = {match.distance, match.distance * 0.999F};
    for (int i = 0; i < 2; i++) {
        options.distance_max = limits[i];
        pool = measured(&options, &s);
        assert_int_equal(match_of(pool, &s.request).verdict,
                         i == 0 ? KVL_ANCHOR_SHARE : KVL_ANCHOR_TOO_FAR);
        kvl_anchor_pool_destroy(pool);
    }
    options = exact_options();
    for (int mode = 0; mode < 2; mode++) {
        options.mode = mode == 0 ? KVL_ANCHOR_SCALE_FREE : KVL_ANCHOR_PAPER;
        options.entropy_share = 1.0F;
        pool = measured(&options, &s);
        example broken = s.request;
        broken.base = kv_copy(&s.request.base);
        /* One number, in the last layer that the distance looks at. */
        const uint32_t n = s.shape.n_layers;
        const uint32_t l = n > 2 ? (n - 3) / 4 * 4 + 2 : n - 1;
        broken.base.values[l * broken.base.view.n_tokens * kv_row(&s.shape)] = NAN;
        assert_int_equal(match_of(pool, &broken).verdict, KVL_ANCHOR_TOO_FAR);
        kv_free(&broken.base);
        kvl_anchor_pool_destroy(pool);
    }
    scene_free(&s);
}

/* Invariant 11: a template that moved gives the same values and keys rotated further. Measured at
 * one position, used at another, keys as they would stand in pages. */
static void test_offsets_serve_any_position(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    enum { LAYERS = 3, TOKENS = 9, HEADS = 2, DIM = 16, THERE = 40, HERE = 7, POSITIONS = 128 };
    const kvl_kv_view shape = {.n_layers = LAYERS, .n_kv_heads = HEADS, .head_dim = DIM};
    double frequencies[DIM / 2];
    for (int j = 0; j < DIM / 2; j++) frequencies[j] = pow(10000.0, -2.0 * j / DIM);
    kvl_rotation *rotation = NULL;
    assert_int_equal(
        kvl_rotation_create(frequencies, DIM, POSITIONS, KVL_PAIRS_HALVES, &rotation, NULL),
        KVL_OK);
    kv nothing_after = kv_zero(LAYERS, 0, HEADS, DIM);
    example e = example_random(&random, 5, &shape, TOKENS, &nothing_after);
    kv in_context = kv_copy(&e.real);
    uint32_t there[LAYERS * TOKENS], here[LAYERS * TOKENS];
    for (uint32_t i = 0; i < LAYERS * TOKENS; i++) {
        there[i] = THERE + i % TOKENS;
        here[i] = HERE + i % TOKENS;
    }
    /* KV in context comes out of pages: rotated there, and back when it is read. */
    kvl_rotate_rows(rotation, LAYERS * TOKENS, there, HEADS, DIM, HEADS * DIM, false, e.real.keys);
    kvl_rotate_rows(rotation, LAYERS * TOKENS, there, HEADS, DIM, HEADS * DIM, true, e.real.keys);
    const kvl_anchor_options options = exact_options();
    kvl_anchor_pool *pool = pool_of(&options);
    example_measure(pool, &e);
    corrected out = correct(pool, &e);
    kvl_rotate_rows(rotation, LAYERS * TOKENS, here, HEADS, DIM, HEADS * DIM, false, out.slot.keys);
    kvl_rotate_rows(rotation, LAYERS * TOKENS, here, HEADS, DIM, HEADS * DIM, false,
                    in_context.keys);
    /* Three rotations of numbers up to 8. */
    assert_near(out.slot.keys, in_context.keys, in_context.n, 3 * 4 * 8.0 * (double)FLT_EPSILON);
    assert_near(out.slot.values, in_context.values, in_context.n, 0.0);
    corrected_free(&out);
    kv_free(&in_context);
    kv_free(&nothing_after);
    example_free(&e);
    kvl_anchor_pool_destroy(pool);
    kvl_rotation_destroy(rotation);
}

/* Invariant 14: a template id has the tenant in it; nothing of another one is read. A correction
 * that fails changes nothing (13: the part is then computed as without reuse). */
static void test_other_templates_and_slots_are_not_read(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    scene s = scene_random(&random, 3);
    const kvl_anchor_options options = exact_options();
    kvl_anchor_pool *pool = measured(&options, &s);
    for (int i = 0; i < 2; i++) {
        kvl_anchor_slot other = question;
        if (i == 0) other.template_id.bytes[31] ^= 1;
        if (i == 1) other.slot++;
        kvl_anchor_match match;
        kvl_anchor_pool_match(pool, &other, &s.anchors[0].base_id, &s.anchors[0].base.view, &match);
        assert_int_equal(match.verdict, KVL_ANCHOR_TOO_FEW);
        assert_int_equal(match.n_anchors, 0);
        kv copy = kv_copy(&s.request.base);
        assert_int_equal(kvl_anchor_pool_correct(pool, &other, &s.request.base_id,
                                                 &s.request.base.view, copy.keys, copy.values, NULL,
                                                 NULL, NULL, NULL),
                         KVL_ERR_NOT_FOUND);
        assert_same_bits(&copy, &s.request.base);
        kv_free(&copy);
    }
    /* Text after the slot that is not what the anchors saw. */
    example stretched = s.request;
    stretched.after_base = kv_random(&random, &s.shape, s.after_base.view.n_tokens + 1);
    corrected out;
    assert_int_equal(try_correct(pool, &stretched, &out), KVL_ERR_FOREIGN);
    assert_same_bits(&out.slot, &s.request.base);
    assert_same_bits(&out.after, &stretched.after_base);
    corrected_free(&out);
    kv_free(&stretched.after_base);
    kvl_anchor_pool_destroy(pool);
    scene_free(&s);
}

/* Fewer than n_anchors_min, and an empty slot. */
static void test_too_few_anchors(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    scene s = scene_random(&random, 2);
    kvl_anchor_options options = exact_options();
    options.n_anchors_min = 3;
    kvl_anchor_pool *pool = measured(&options, &s);
    assert_int_equal(match_of(pool, &s.request).verdict, KVL_ANCHOR_TOO_FEW);
    assert_int_equal(match_of(pool, &s.request).n_anchors, 2);
    assert_int_equal(match_of(pool, &s.anchors[1]).verdict, KVL_ANCHOR_EXACT);
    kvl_kv_view empty = s.request.base.view;
    empty.n_tokens = 0;
    kvl_anchor_match match;
    kvl_anchor_pool_match(pool, &question, &s.request.base_id, &empty, &match);
    assert_int_equal(match.verdict, KVL_ANCHOR_TOO_FEW);
    kvl_anchor_pool_destroy(pool);
    scene_free(&s);
}

/* --- A plain reference in double, straight from the formulas. --- */

typedef struct reference {
    const scene *s;
    const kvl_anchor_options *options;
    double distance; /* to the nearest */
} reference;

static double number(const float *numbers, const kvl_kv_view *view, size_t l, size_t t, size_t i)
{
    return (double)numbers[(l * view->n_tokens + t) * kv_row(view) + i];
}

static void soften(double *d, uint32_t n, double temperature)
{
    double sum = 0.0;
    double least = d[0];
    for (uint32_t a = 1; a < n; a++) least = fmin(least, d[a]);
    for (uint32_t a = 0; a < n; a++) sum += d[a] = exp(-(d[a] - least) / temperature);
    for (uint32_t a = 0; a < n; a++) d[a] /= sum;
}

/* |dV| / |V| of one token against one anchor. */
static double relative(const scene *s, size_t t, const example *anchor)
{
    double above = 0.0, below = 0.0;
    for (size_t l = s->shape.n_layers > 2 ? 2 : s->shape.n_layers - 1; l < s->shape.n_layers;
         l += 4) {
        for (size_t i = 0; i < kv_row(&s->shape); i++) {
            const double v = number(s->request.base.values, &s->request.base.view, l, t, i);
            const double w = number(anchor->base.values, &anchor->base.view, l, t, i);
            above += (v - w) * (v - w);
            below += v * v;
        }
    }
    return sqrt(above / below);
}

/* Mean |.| over layers, heads and dimensions of one token. */
static double absolute(const scene *s, size_t t, const example *anchor, bool keys)
{
    const float *x = keys ? s->request.base.keys : s->request.base.values;
    const float *y = keys ? anchor->base.keys : anchor->base.values;
    double sum = 0.0;
    for (size_t l = 0; l < s->shape.n_layers; l++) {
        for (size_t i = 0; i < kv_row(&s->shape); i++) {
            sum += fabs(number(x, &s->request.base.view, l, t, i) -
                        number(y, &anchor->base.view, l, t, i));
        }
    }
    return sum / (double)(s->shape.n_layers * kv_row(&s->shape));
}

/* L2 over the last tokens of one channel. */
static double channel(const scene *s, size_t l, size_t i, const example *anchor, bool keys)
{
    const float *x = keys ? s->request.base.keys : s->request.base.values;
    const float *y = keys ? anchor->base.keys : anchor->base.values;
    const size_t n = s->request.base.view.n_tokens, skipped = anchor->base.view.n_tokens - n;
    double sum = 0.0;
    for (size_t t = 0; t < n; t++) {
        const double e = number(x, &s->request.base.view, l, t, i) -
                         number(y, &anchor->base.view, l, skipped + t, i);
        sum += e * e;
    }
    return sqrt(sum);
}

static void reference_weights(const reference *r, bool after, bool keys, size_t l, size_t t,
                              size_t i, double *weights)
{
    const scene *s = r->s;
    const bool paper = r->options->mode == KVL_ANCHOR_PAPER;
    for (uint32_t a = 0; a < s->n; a++) {
        const example *anchor = &s->anchors[a];
        if (paper) {
            weights[a] = after ? channel(s, l, i, anchor, keys) : absolute(s, t, anchor, keys);
        } else if (after) {
            weights[a] = 0.0;
            const uint32_t n = s->request.base.view.n_tokens;
            for (size_t u = 0; u < n; u++) weights[a] += relative(s, u, anchor) / n;
        } else {
            weights[a] = relative(s, t, anchor);
        }
    }
    soften(weights, s->n, paper && after ? 1.0 : (double)r->options->temperature);
}

static double reference_number(const reference *r, bool after, bool keys, size_t l, size_t t,
                               size_t i)
{
    const scene *s = r->s;
    const kv *from = after ? &s->request.after_base : &s->request.base;
    double out = number(keys ? from->keys : from->values, &from->view, l, t, i);
    if (l == 0) return out;
    double weights[ANCHORS_MAX];
    reference_weights(r, after, keys, l, t, i, weights);
    for (uint32_t a = 0; a < s->n; a++) {
        const kv *b = after ? &s->anchors[a].after_base : &s->anchors[a].base;
        const kv *c = after ? &s->anchors[a].after_real : &s->anchors[a].real;
        out += weights[a] * (number(keys ? c->keys : c->values, &c->view, l, t, i) -
                             number(keys ? b->keys : b->values, &b->view, l, t, i));
    }
    return out;
}

static void check_against_reference(const reference *r, const kv *out, bool after, double bound,
                                    kvl_random *random)
{
    if (out->n == 0) return;
    for (int sample = 0; sample < 40; sample++) {
        const bool keys = kvl_test_below(random, 2) == 0;
        const size_t l = kvl_test_below(random, out->view.n_layers);
        const size_t t = kvl_test_below(random, out->view.n_tokens);
        const size_t i = kvl_test_below(random, (uint32_t)kv_row(&out->view));
        const double wanted = reference_number(r, after, keys, l, t, i);
        const double got = number(keys ? out->keys : out->values, &out->view, l, t, i);
        if (!(fabs(got - wanted) <= bound)) {
            fail_msg("layer %zu token %zu channel %zu: %.9g, wanted %.9g", l, t, i, got, wanted);
        }
    }
}

static void test_both_modes_against_the_formulas(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 4 * ROUNDS; round++) {
        scene s = scene_random(&random, 1 + kvl_test_below(&random, 6));
        kvl_anchor_options options = exact_options();
        options.mode = round % 2 == 0 ? KVL_ANCHOR_SCALE_FREE : KVL_ANCHOR_PAPER;
        options.dtype = round % 4 < 2 ? KVL_KV_F32 : KVL_KV_INT8;
        options.temperature = 0.2F + kvl_random_uniform(&random);
        const reference r = {.s = &s, .options = &options};
        kvl_anchor_pool *pool = measured(&options, &s);
        corrected out = correct(pool, &s.request);
        /* f32: distances up to 20 in float, at a temperature from 0.2, change a weight by 1e-4 at
         * most, offsets are below 1.8. int8: half a step of base (6 / 127) moves the mean
         * distances by less, that of one channel over a few tokens by about as much. */
        const double bound = options.dtype == KVL_KV_F32 ? 2e-4 : 0.12;
        check_against_reference(&r, &out.slot, false, bound, &random);
        check_against_reference(&r, &out.after, true, bound, &random);
        corrected_free(&out);
        kvl_anchor_pool_destroy(pool);
        scene_free(&s);
    }
}

/* The distance that match reports, and the paper's over everything. */
static void test_match_reports_the_distance(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        scene s = scene_random(&random, 3);
        kvl_anchor_options options = exact_options();
        double nearest = HUGE_VAL, nearest_all = HUGE_VAL;
        const kvl_kv_view *view = &s.request.base.view;
        for (uint32_t a = 0; a < s.n; a++) {
            double mean = 0.0, squares = 0.0;
            for (size_t t = 0; t < view->n_tokens; t++) {
                mean += relative(&s, t, &s.anchors[a]) / view->n_tokens;
            }
            for (size_t l = 0; l < view->n_layers; l++) {
                for (size_t t = 0; t < view->n_tokens; t++) {
                    for (size_t i = 0; i < kv_row(view); i++) {
                        const double e =
                            number(s.request.base.values, view, l, t, i) -
                            number(s.anchors[a].base.values, &s.anchors[a].base.view, l, t, i);
                        squares += e * e;
                    }
                }
            }
            nearest = fmin(nearest, mean);
            nearest_all = fmin(nearest_all, sqrt(squares));
        }
        kvl_anchor_pool *pool = measured(&options, &s);
        assert_true(fabs((double)match_of(pool, &s.request).distance - nearest) < 1e-5 * nearest);
        kvl_anchor_pool_destroy(pool);
        options.mode = KVL_ANCHOR_PAPER;
        pool = measured(&options, &s);
        const double all = (double)match_of(pool, &s.request).distance;
        assert_true(fabs(all - nearest_all) < 1e-5 * nearest_all);
        kvl_anchor_pool_destroy(pool);
        scene_free(&s);
    }
}

/* keys may be base->keys: the result is that of a copy. Threads change nothing. */
static void test_in_place_and_threads_change_nothing(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_pool *threads = NULL;
    assert_int_equal(kvl_pool_create(3, false, &threads, NULL), KVL_OK);
    for (int round = 0; round < 4 * ROUNDS; round++) {
        scene s = scene_random(&random, 4);
        kvl_anchor_options options = exact_options();
        options.mode = round % 2 == 0 ? KVL_ANCHOR_SCALE_FREE : KVL_ANCHOR_PAPER;
        options.dtype = round % 4 < 2 ? KVL_KV_F32 : KVL_KV_INT8;
        kvl_anchor_pool *pool = measured(&options, &s);
        options.threads = threads;
        kvl_anchor_pool *shared = measured(&options, &s);
        const example *e = round % 8 == 0 ? &s.anchors[1] : &s.request;
        corrected out = correct(pool, e);
        corrected same = correct(shared, e);
        assert_same_bits(&out.slot, &same.slot);
        assert_same_bits(&out.after, &same.after);
        kv base = kv_copy(&e->base);
        kv after = kv_copy(&e->after_base);
        assert_int_equal(kvl_anchor_pool_correct(shared, &question, &e->base_id, &base.view,
                                                 base.keys, base.values, &after.view, after.keys,
                                                 after.values, NULL),
                         KVL_OK);
        assert_same_bits(&base, &out.slot);
        assert_same_bits(&after, &out.after);
        kv_free(&base);
        kv_free(&after);
        corrected_free(&out);
        corrected_free(&same);
        kvl_anchor_pool_destroy(pool);
        kvl_anchor_pool_destroy(shared);
        scene_free(&s);
    }
    kvl_pool_destroy(threads);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exact_hit_gives_what_was_measured),
        cmocka_unit_test(test_one_anchor_in_paper_mode),
        cmocka_unit_test(test_copies_weigh_as_one),
        cmocka_unit_test(test_zero_offsets_and_layer_0),
        cmocka_unit_test(test_order_does_not_matter),
        cmocka_unit_test(test_result_is_a_convex_combination),
        cmocka_unit_test(test_length_rules),
        cmocka_unit_test(test_shorter_anchors_correct_what_they_cover),
        cmocka_unit_test(test_entropy_gate),
        cmocka_unit_test(test_far_anchor_weighs_nothing),
        cmocka_unit_test(test_distance_gate),
        cmocka_unit_test(test_offsets_serve_any_position),
        cmocka_unit_test(test_other_templates_and_slots_are_not_read),
        cmocka_unit_test(test_too_few_anchors),
        cmocka_unit_test(test_both_modes_against_the_formulas),
        cmocka_unit_test(test_match_reports_the_distance),
        cmocka_unit_test(test_in_place_and_threads_change_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
