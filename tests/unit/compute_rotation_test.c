/* compute/rotation: angles against double, both kinds of pairs, back again, and what is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "compute/pages.h"
#include "compute/reference.h"
#include "compute/rotation.h"
#include "test_random.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum { POSITIONS = 600, HEADS_MAX = 4, ROWS_MAX = 6, DIM_MAX = 64, STRIDE_EXTRA = 3 };

static kvl_rotation *make(const double *frequencies, uint32_t rotary_dim, kvl_rotation_pairs pairs)
{
    kvl_rotation *rotation = NULL;
    assert_int_equal(
        kvl_rotation_create(frequencies, rotary_dim, POSITIONS, pairs, &rotation, NULL), KVL_OK);
    return rotation;
}

typedef struct rows_case {
    double frequencies[DIM_MAX / 2];
    kvl_rotation_pairs pairs;
    uint32_t rotary_dim, head_dim, n_heads, n_rows;
    size_t stride;
    uint32_t positions[ROWS_MAX];
    float rows[ROWS_MAX * (HEADS_MAX * DIM_MAX + STRIDE_EXTRA)];
} rows_case;

static rows_case draw(kvl_random *random)
{
    rows_case c = {0};
    c.head_dim = 2 * (1 + kvl_test_below(random, DIM_MAX / 2));
    c.rotary_dim = 2 * (1 + kvl_test_below(random, c.head_dim / 2));
    c.n_heads = 1 + kvl_test_below(random, HEADS_MAX);
    c.n_rows = 1 + kvl_test_below(random, ROWS_MAX);
    c.pairs = kvl_test_below(random, 2) == 0 ? KVL_PAIRS_ADJACENT : KVL_PAIRS_HALVES;
    c.stride = (size_t)c.n_heads * c.head_dim + kvl_test_below(random, STRIDE_EXTRA + 1);
    for (uint32_t j = 0; j < c.rotary_dim / 2; j++)
        c.frequencies[j] = pow(10000.0, -2.0 * j / c.rotary_dim);
    for (uint32_t r = 0; r < c.n_rows; r++) c.positions[r] = kvl_test_below(random, POSITIONS);
    kvl_test_fill_uniform(random, c.rows, sizeof c.rows / sizeof *c.rows);
    return c;
}

/* The larger number of the pair that dimension d belongs to; of itself where it is not rotated. */
static double pair_size(const rows_case *c, const float *head, uint32_t d)
{
    if (d >= c->rotary_dim) return fabs((double)head[d]);
    const uint32_t half = c->rotary_dim / 2;
    const uint32_t other = c->pairs == KVL_PAIRS_ADJACENT ? d ^ 1U : d < half ? d + half : d - half;
    return fmax(fabs((double)head[d]), fabs((double)head[other]));
}

/* The door promises 4 * FLT_EPSILON of the larger of the pair. */
static void check_against_reference(const rows_case *c, bool backwards)
{
    kvl_rotation *rotation = make(c->frequencies, c->rotary_dim, c->pairs);
    rows_case got = *c;
    kvl_rotate_rows(rotation, c->n_rows, c->positions, c->n_heads, c->head_dim, c->stride,
                    backwards, got.rows);
    for (uint32_t r = 0; r < c->n_rows; r++) {
        for (uint32_t h = 0; h < c->n_heads; h++) {
            const size_t at = r * c->stride + (size_t)h * c->head_dim;
            double expected[DIM_MAX];
            kvl_reference_rotate(c->frequencies, c->rotary_dim, c->pairs, c->positions[r],
                                 backwards, c->head_dim, c->rows + at, expected);
            for (uint32_t d = 0; d < c->head_dim; d++)
                assert_true(fabs((double)got.rows[at + d] - expected[d]) <=
                            4 * (double)FLT_EPSILON * pair_size(c, c->rows + at, d));
        }
        for (size_t i = (size_t)c->n_heads * c->head_dim; i < c->stride; i++)
            assert_true(got.rows[r * c->stride + i] == c->rows[r * c->stride + i]);
    }
    kvl_rotation_destroy(rotation);
}

static void test_rows_match_reference(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 200; round++) {
        const rows_case c = draw(&random);
        check_against_reference(&c, round % 2 == 1);
    }
}

/* There and back: two rotations, each within the door's bound of values that grow at most by the
 * square root of two. */
static void test_backwards_undoes_forwards(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 200; round++) {
        const rows_case before = draw(&random);
        rows_case c = before;
        kvl_rotation *rotation = make(c.frequencies, c.rotary_dim, c.pairs);
        kvl_rotate_rows(rotation, c.n_rows, c.positions, c.n_heads, c.head_dim, c.stride, false,
                        c.rows);
        kvl_rotate_rows(rotation, c.n_rows, c.positions, c.n_heads, c.head_dim, c.stride, true,
                        c.rows);
        for (uint32_t r = 0; r < c.n_rows; r++)
            for (size_t i = 0; i < (size_t)c.n_heads * c.head_dim; i++)
                assert_true(fabs((double)c.rows[r * c.stride + i] -
                                 (double)before.rows[r * c.stride + i]) <=
                            16 * (double)FLT_EPSILON);
        kvl_rotation_destroy(rotation);
    }
}

static void test_position_zero_changes_nothing(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    const rows_case before = draw(&random);
    rows_case c = before;
    memset(c.positions, 0, sizeof c.positions);
    kvl_rotation *rotation = make(c.frequencies, c.rotary_dim, c.pairs);
    kvl_rotate_rows(rotation, c.n_rows, c.positions, c.n_heads, c.head_dim, c.stride, false,
                    c.rows);
    assert_memory_equal(c.rows, before.rows, sizeof c.rows);
    kvl_rotation_destroy(rotation);
}

static void test_shapes_out_of_range_are_refused(void **state)
{
    (void)state;
    static const struct {
        uint32_t rotary_dim, n_positions;
    } refused[] = {{0, 8}, {3, 8}, {KVL_HEAD_DIM_MAX + 2, 8}, {4, 0}, {4, KVL_POSITIONS_MAX + 1}};
    const double frequencies[KVL_HEAD_DIM_MAX] = {1.0};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        kvl_rotation *rotation = NULL;
        kvl_error error;
        assert_int_equal(kvl_rotation_create(frequencies, refused[i].rotary_dim,
                                             refused[i].n_positions, KVL_PAIRS_HALVES, &rotation,
                                             &error),
                         KVL_ERR_OUT_OF_RANGE);
        assert_null(rotation);
        assert_true(strlen(error.text) > 0);
    }
    kvl_rotation_destroy(NULL);
}

static void test_creation_survives_missing_memory(void **state)
{
    (void)state;
    const double frequencies[2] = {1.0, 0.1};
    const int64_t before = kvl_alloc_live();
    for (int64_t n = 0;; n++) {
        kvl_rotation *rotation = NULL;
        kvl_alloc_fail_after(n);
        const kvl_status status =
            kvl_rotation_create(frequencies, 4, 10, KVL_PAIRS_HALVES, &rotation, NULL);
        kvl_alloc_fail_after(-1);
        kvl_rotation_destroy(rotation);
        assert_int_equal(kvl_alloc_live(), before);
        if (status == KVL_OK) break;
        assert_int_equal(status, KVL_ERR_NO_MEMORY);
        assert_true(n < 10);
    }
}

/* The reference itself: with equal scores it averages what a row may see, and nothing else. */
static void test_reference_attention_averages_what_is_seen(void **state)
{
    (void)state;
    enum { KEYS = 5, DIM = 2, ROWS = 3 };
    const float queries[ROWS * DIM] = {0};
    const uint32_t positions[ROWS] = {0, 2, 9};
    const float keys[KEYS * DIM] = {9, 8, 7, 6, 5, 4, 3, 2, 1, 0};
    const float values[KEYS * DIM] = {1, 10, 2, 20, 3, 30, 4, 40, 5, 50};
    const double expected[ROWS * DIM] = {1, 10, 2, 20, 3, 30};
    double out[ROWS * DIM];
    kvl_reference_attention a = {ROWS, 1, 1, DIM, KEYS, queries, positions, keys, values};
    assert_int_equal(kvl_reference_attend(&a, out), KVL_OK);
    for (int i = 0; i < ROWS * DIM; i++) assert_true(fabs(out[i] - expected[i]) < 1e-14);
    a.n_keys = 0;
    assert_int_equal(kvl_reference_attend(&a, out), KVL_OK);
    for (int i = 0; i < ROWS * DIM; i++) assert_true(out[i] == 0.0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_match_reference),
        cmocka_unit_test(test_backwards_undoes_forwards),
        cmocka_unit_test(test_position_zero_changes_nothing),
        cmocka_unit_test(test_shapes_out_of_range_are_refused),
        cmocka_unit_test(test_creation_survives_missing_memory),
        cmocka_unit_test(test_reference_attention_averages_what_is_seen),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
