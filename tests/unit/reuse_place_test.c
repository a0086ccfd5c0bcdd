/* reuse/place: what placing promises, as properties over random shapes. Pages are those of a plain
 * backend that lives here and counts its calls. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "reuse/place.h"
#include "segment/codec.h"
#include "test_random.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { POSITIONS = 512, TOKENS_MAX = 40, ROUNDS = 40 };

static uint32_t n_writes;

static float *number_in(const kvl_pages *pages, uint32_t layer, uint32_t slot, uint32_t head,
                        uint32_t d, bool values)
{
    const uint32_t page = slot / KVL_PAGE_TOKENS, index = slot % KVL_PAGE_TOKENS;
    return values ? kvl_pages_values(pages, layer, page, head) + (size_t)index * pages->head_dim + d
                  : kvl_pages_keys(pages, layer, page, head) + (size_t)d * KVL_PAGE_TOKENS + index;
}

static void plain_write(kvl_backend *backend, const kvl_pages *pages, uint32_t layer,
                        uint32_t n_rows, const uint32_t *slots, const float *keys,
                        const float *values)
{
    (void)backend;
    n_writes++;
    for (uint32_t r = 0; r < n_rows; r++) {
        for (uint32_t h = 0; h < pages->n_kv_heads; h++) {
            for (uint32_t d = 0; d < pages->head_dim; d++) {
                const size_t at = ((size_t)r * pages->n_kv_heads + h) * pages->head_dim + d;
                *number_in(pages, layer, slots[r], h, d, false) = keys[at];
                *number_in(pages, layer, slots[r], h, d, true) = values[at];
            }
        }
    }
}

static void plain_read(kvl_backend *backend, const kvl_pages *pages, uint32_t layer,
                       uint32_t n_rows, const uint32_t *slots, float *keys, float *values)
{
    (void)backend;
    for (uint32_t r = 0; r < n_rows; r++) {
        for (uint32_t h = 0; h < pages->n_kv_heads; h++) {
            for (uint32_t d = 0; d < pages->head_dim; d++) {
                const size_t at = ((size_t)r * pages->n_kv_heads + h) * pages->head_dim + d;
                keys[at] = *number_in(pages, layer, slots[r], h, d, false);
                values[at] = *number_in(pages, layer, slots[r], h, d, true);
            }
        }
    }
}

static void plain_rotate(kvl_backend *backend, const kvl_rotation *rotation, uint32_t n_rows,
                         const uint32_t *positions, uint32_t n_heads, uint32_t head_dim,
                         float *rows)
{
    (void)backend;
    kvl_rotate_rows(rotation, n_rows, positions, n_heads, head_dim, (size_t)n_heads * head_dim,
                    false, rows);
}

static const kvl_backend_ops plain_ops = {
    .name = "plain", .rotate = plain_rotate, .pages_write = plain_write, .pages_read = plain_read};

/* Pages of a random model, and a run of tokens in shuffled slots. */
typedef struct scene {
    kvl_backend backend;
    kvl_pages pages;
    kvl_rotation *rotation;
    kvl_place_target target;
    uint32_t positions[TOKENS_MAX], slots[TOKENS_MAX];
    kvl_place_tokens_view tokens;
    size_t n; /* floats of one layer's keys */
    size_t n_pages_floats;
    float *keys, *values, *scratch, *out_keys, *out_values; /* [n_layers][n], [2][n_layers][n] */
} scene;

static void draw_positions(scene *s, kvl_random *random)
{
    uint32_t position = kvl_test_below(random, POSITIONS - 4 * TOKENS_MAX);
    for (uint32_t i = 0; i < TOKENS_MAX; i++) {
        s->positions[i] = position;
        position += 1 + kvl_test_below(random, 3); /* not always neighbours */
    }
}

static scene *scene_random(kvl_random *random)
{
    scene *s = calloc(1, sizeof *s);
    assert_non_null(s);
    s->backend.ops = &plain_ops;
    s->pages = (kvl_pages){.n_layers = 1 + kvl_test_below(random, 4),
                           .n_pages = 4,
                           .n_kv_heads = 1 + kvl_test_below(random, 3),
                           .head_dim = 16 * (1 + kvl_test_below(random, 4))};
    s->n_pages_floats =
        (size_t)s->pages.n_layers * s->pages.n_pages * kvl_pages_page_floats(&s->pages);
    s->pages.memory = kvl_alloc_zero(s->n_pages_floats, sizeof(float));
    double frequencies[KVL_HEAD_DIM_MAX / 2];
    const uint32_t rotary = s->pages.head_dim - (kvl_test_below(random, 2) == 0 ? 0U : 8U);
    for (uint32_t j = 0; j < rotary / 2; j++) {
        frequencies[j] = pow(10000.0, -2.0 * j / rotary);
    }
    assert_int_equal(
        kvl_rotation_create(frequencies, rotary, POSITIONS,
                            kvl_test_below(random, 2) == 0 ? KVL_PAIRS_ADJACENT : KVL_PAIRS_HALVES,
                            &s->rotation, NULL),
        KVL_OK);
    s->target = (kvl_place_target){&s->backend, &s->pages, s->rotation};
    for (uint32_t i = 0; i < TOKENS_MAX; i++) s->slots[i] = i;
    for (uint32_t i = TOKENS_MAX; i-- > 1;) {
        const uint32_t other = kvl_test_below(random, i + 1), kept = s->slots[i];
        s->slots[i] = s->slots[other];
        s->slots[other] = kept;
    }
    draw_positions(s, random);
    s->tokens =
        (kvl_place_tokens_view){1 + kvl_test_below(random, TOKENS_MAX), s->positions, s->slots};
    assert_true(kvl_place_floats(&s->pages, s->tokens.n_tokens, &s->n));
    const size_t all = s->n * s->pages.n_layers;
    s->keys = kvl_alloc_zero(all, sizeof(float));
    s->values = kvl_alloc_zero(all, sizeof(float));
    s->out_keys = kvl_alloc_zero(all, sizeof(float));
    s->out_values = kvl_alloc_zero(all, sizeof(float));
    s->scratch = kvl_alloc_zero(2 * all, sizeof(float));
    assert_true(s->pages.memory != NULL && s->keys != NULL && s->values != NULL &&
                s->out_keys != NULL && s->out_values != NULL && s->scratch != NULL);
    kvl_test_fill_uniform(random, s->keys, all);
    kvl_test_fill_uniform(random, s->values, all);
    return s;
}

static void scene_free(scene *s)
{
    kvl_free(s->pages.memory);
    kvl_rotation_destroy(s->rotation);
    kvl_free(s->keys);
    kvl_free(s->values);
    kvl_free(s->out_keys);
    kvl_free(s->out_values);
    kvl_free(s->scratch);
    free(s);
}

static void place(scene *s, uint32_t layer)
{
    assert_int_equal(
        kvl_place_tokens(&s->target, layer, &s->tokens, s->keys, s->values, s->scratch, NULL),
        KVL_OK);
}

/* Rotated keys as they stand in the pages. */
static void read_pages(scene *s, uint32_t layer)
{
    plain_read(&s->backend, &s->pages, layer, s->tokens.n_tokens, s->slots, s->out_keys,
               s->out_values);
}

/* Placing at position 0 changes nothing; values never change, wherever they go. */
static void test_position_0_is_the_identity(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        scene *s = scene_random(&random);
        place(s, 0);
        read_pages(s, 0);
        assert_memory_equal(s->out_values, s->values, s->n * sizeof(float));
        memset(s->positions, 0, sizeof s->positions);
        place(s, 0);
        read_pages(s, 0);
        assert_memory_equal(s->out_values, s->values, s->n * sizeof(float));
        for (size_t i = 0; i < s->n; i++) assert_true(s->out_keys[i] == s->keys[i]);
        scene_free(s);
    }
}

/* There and back gives the stored KV within two rotations' rounding; the source is untouched. */
static void test_extract_undoes_place(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        scene *s = scene_random(&random);
        float *kept = kvl_alloc(s->n * sizeof *kept);
        assert_non_null(kept);
        memcpy(kept, s->keys, s->n * sizeof *kept);
        const uint32_t layer = s->pages.n_layers - 1;
        place(s, layer);
        assert_memory_equal(s->keys, kept, s->n * sizeof *kept);
        kvl_free(kept);
        assert_int_equal(
            kvl_extract_tokens(&s->target, layer, &s->tokens, s->out_keys, s->out_values, NULL),
            KVL_OK);
        assert_memory_equal(s->out_values, s->values, s->n * sizeof(float));
        for (size_t i = 0; i < s->n; i++) {
            assert_true(fabsf(s->out_keys[i] - s->keys[i]) <= 2 * 4 * 2.0F * FLT_EPSILON);
        }
        scene_free(s);
    }
}

/* Rotation by a and then by b is rotation by a + b: KV read at one place and put at another stands
 * there as if it had come from the store. */
static void test_moving_twice_is_moving_once(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        scene *s = scene_random(&random);
        place(s, 0);
        assert_int_equal(
            kvl_extract_tokens(&s->target, 0, &s->tokens, s->out_keys, s->out_values, NULL),
            KVL_OK);
        draw_positions(s, &random);
        place(s, 0); /* once, straight from the store */
        float *once = kvl_alloc(s->n * sizeof *once);
        assert_non_null(once);
        plain_read(&s->backend, &s->pages, 0, s->tokens.n_tokens, s->slots, once, s->out_values);
        memcpy(s->keys, s->out_keys, s->n * sizeof *once);
        place(s, 0); /* from what was read back */
        read_pages(s, 0);
        for (size_t i = 0; i < s->n; i++) {
            assert_true(fabsf(s->out_keys[i] - once[i]) <= 3 * 4 * 2.0F * FLT_EPSILON);
        }
        kvl_free(once);
        scene_free(s);
    }
}

/* The property that reuse rests on: a query and a key that move by the same distance score the
 * same. Keys play both parts. */
static void test_score_depends_on_distance_only(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        scene *s = scene_random(&random);
        if (s->tokens.n_tokens < 2) {
            scene_free(s);
            continue;
        }
        double scores[2];
        const uint32_t gap = kvl_test_below(&random, 100);
        for (int where = 0; where < 2; where++) {
            s->positions[0] = kvl_test_below(&random, POSITIONS - 100);
            s->positions[1] = s->positions[0] + gap;
            place(s, 0);
            read_pages(s, 0);
            scores[where] = 0.0;
            for (uint32_t d = 0; d < s->pages.head_dim; d++) {
                const size_t next = (size_t)s->pages.n_kv_heads * s->pages.head_dim + d;
                scores[where] += (double)s->out_keys[d] * (double)s->out_keys[next];
            }
        }
        /* Each product is off by a few roundings of numbers of size 1. */
        const double bound = 32.0 * s->pages.head_dim * (double)FLT_EPSILON;
        assert_true(fabs(scores[0] - scores[1]) <= bound);
        scene_free(s);
    }
}

static void test_out_of_range_writes_nothing(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    scene *s = scene_random(&random);
    const uint32_t bad_positions[] = {POSITIONS, POSITIONS + 1, UINT32_MAX};
    n_writes = 0;
    for (int i = 0; i < 3; i++) {
        const uint32_t kept = s->positions[s->tokens.n_tokens - 1];
        s->positions[s->tokens.n_tokens - 1] = bad_positions[i];
        kvl_error error;
        assert_int_equal(
            kvl_place_tokens(&s->target, 0, &s->tokens, s->keys, s->values, s->scratch, &error),
            KVL_ERR_OUT_OF_RANGE);
        assert_non_null(strstr(error.text, "position"));
        assert_int_equal(
            kvl_extract_tokens(&s->target, 0, &s->tokens, s->out_keys, s->out_values, NULL),
            KVL_ERR_OUT_OF_RANGE);
        s->positions[s->tokens.n_tokens - 1] = kept;
    }
    s->slots[0] = s->pages.n_pages * KVL_PAGE_TOKENS;
    assert_int_equal(
        kvl_place_tokens(&s->target, 0, &s->tokens, s->keys, s->values, s->scratch, NULL),
        KVL_ERR_OUT_OF_RANGE);
    s->slots[0] = 0;
    s->tokens.n_tokens = 0;
    assert_int_equal(kvl_place_tokens(&s->target, 0, &s->tokens, NULL, NULL, NULL, NULL), KVL_OK);
    assert_int_equal(n_writes, 0);
    scene_free(s);
}

/* A segment of all of the scene's tokens and `more` before and behind them. */
static kvl_container *segment_of(const scene *s, uint32_t more, kvl_kv_dtype dtype)
{
    const uint32_t n_tokens = s->tokens.n_tokens + 2 * more;
    uint32_t ids[3 * TOKENS_MAX] = {0};
    kvl_container_info info = {
        .kind = KVL_CONTAINER_SEGMENT,
        .dtype = dtype,
        .n_layers = s->pages.n_layers,
        .n_kv_heads = s->pages.n_kv_heads,
        .head_dim = s->pages.head_dim,
        .n_tokens = n_tokens,
        .tokens = ids,
    };
    assert_true(kvl_segment_block_bytes(dtype, info.n_kv_heads, n_tokens, info.head_dim,
                                        &info.block_bytes));
    kvl_container *container = NULL;
    assert_int_equal(kvl_container_create(&info, &container, NULL), KVL_OK);
    const size_t row = (size_t)info.n_kv_heads * info.head_dim;
    float *keys = kvl_alloc_zero(n_tokens * row, sizeof *keys);
    float *values = kvl_alloc_zero(n_tokens * row, sizeof *values);
    assert_true(keys != NULL && values != NULL);
    for (uint32_t l = 0; l < info.n_layers; l++) {
        memcpy(keys + more * row, s->keys + l * s->n, s->n * sizeof *keys);
        memcpy(values + more * row, s->values + l * s->n, s->n * sizeof *values);
        size_t n_bytes = 0;
        kvl_segment_encode_block(dtype, info.n_kv_heads, n_tokens, info.head_dim, keys, values,
                                 kvl_container_block(container, l, &n_bytes));
    }
    kvl_free(keys);
    kvl_free(values);
    return container;
}

/* A whole container lands as its layers would one by one: any scratch, any number of threads. */
static void test_container_is_its_layers(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_pool *threads = NULL;
    assert_int_equal(kvl_pool_create(3, false, &threads, NULL), KVL_OK);
    for (int round = 0; round < ROUNDS; round++) {
        scene *s = scene_random(&random);
        const uint32_t more = kvl_test_below(&random, 5);
        kvl_container *container = segment_of(s, more, KVL_KV_F32);
        kvl_container_seal(container);
        float *wanted = kvl_alloc(s->n_pages_floats * sizeof *wanted);
        assert_non_null(wanted);
        for (uint32_t l = 0; l < s->pages.n_layers; l++) {
            assert_int_equal(kvl_place_tokens(&s->target, l, &s->tokens, s->keys + l * s->n,
                                              s->values + l * s->n, s->scratch, NULL),
                             KVL_OK);
        }
        memcpy(wanted, s->pages.memory, s->n_pages_floats * sizeof *wanted);
        memset(s->pages.memory, 0, s->n_pages_floats * sizeof *wanted);
        const kvl_place_options options = {
            .token_first = more,
            .blocks_checked = kvl_test_below(&random, 2) == 0,
            .threads = kvl_test_below(&random, 2) == 0 ? NULL : threads,
            .scratch = s->scratch,
            .n_scratch_floats = 2 * s->n * (1 + kvl_test_below(&random, s->pages.n_layers)),
        };
        kvl_error error;
        assert_int_equal(kvl_place_container(&s->target, container, &s->tokens, &options, &error),
                         KVL_OK);
        assert_memory_equal(s->pages.memory, wanted, s->n_pages_floats * sizeof *wanted);
        kvl_free(wanted);
        kvl_container_release(container);
        scene_free(s);
    }
    kvl_pool_destroy(threads);
}

/* Layer by layer without the backend: the same bits as a whole container, whatever the format,
 * whether tokens stand side by side in their pages or anywhere. */
static void test_layers_are_the_container(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    static const kvl_kv_dtype dtypes[] = {KVL_KV_F32, KVL_KV_F16, KVL_KV_BF16, KVL_KV_INT8};
    for (int round = 0; round < ROUNDS; round++) {
        scene *s = scene_random(&random);
        const uint32_t more = kvl_test_below(&random, 5);
        if (round % 2 == 0) {
            const uint32_t first = kvl_test_below(&random, 4 * 16 - TOKENS_MAX + 1);
            for (uint32_t i = 0; i < TOKENS_MAX; i++) s->slots[i] = first + i;
        }
        kvl_container *container = segment_of(s, more, dtypes[kvl_test_below(&random, 4)]);
        kvl_container_seal(container);
        const kvl_place_options options = {
            .token_first = more, .scratch = s->scratch, .n_scratch_floats = 2 * s->n};
        assert_int_equal(kvl_place_container(&s->target, container, &s->tokens, &options, NULL),
                         KVL_OK);
        float *wanted = kvl_alloc(s->n_pages_floats * sizeof *wanted);
        size_t n_scratch = 0;
        assert_true(kvl_place_layer_floats(&s->pages, &n_scratch));
        float *scratch = kvl_alloc_aligned(n_scratch * sizeof *scratch);
        assert_true(wanted != NULL && scratch != NULL);
        memcpy(wanted, s->pages.memory, s->n_pages_floats * sizeof *wanted);
        memset(s->pages.memory, 0, s->n_pages_floats * sizeof *wanted);
        n_writes = 0;
        for (uint32_t l = 0; l < s->pages.n_layers; l++)
            assert_int_equal(
                kvl_place_layer(&s->target, container, l, &s->tokens, more, scratch, NULL), KVL_OK);
        assert_int_equal(n_writes, 0);
        assert_memory_equal(s->pages.memory, wanted, s->n_pages_floats * sizeof *wanted);
        /* What does not fit is told before anything is written. */
        assert_int_equal(
            kvl_place_layer(&s->target, container, 0, &s->tokens, 2 * more + 1, scratch, NULL),
            KVL_ERR_OUT_OF_RANGE);
        s->positions[0] = POSITIONS;
        assert_int_equal(kvl_place_check(&s->target, container, &s->tokens, more, NULL),
                         KVL_ERR_OUT_OF_RANGE);
        assert_memory_equal(s->pages.memory, wanted, s->n_pages_floats * sizeof *wanted);
        kvl_free(scratch);
        kvl_free(wanted);
        kvl_container_release(container);
        scene_free(s);
    }
}

/* A mean is added to what is stored, before rotation: the same bits as a segment that had it in. */
static void test_a_mean_lands_before_rotation(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < ROUNDS; round++) {
        scene *s = scene_random(&random);
        const uint32_t more = kvl_test_below(&random, 20);
        kvl_mean mean;
        assert_int_equal(
            kvl_mean_init(&mean, s->pages.n_layers, s->pages.n_kv_heads, s->pages.head_dim, NULL),
            KVL_OK);
        const size_t row = (size_t)s->pages.n_kv_heads * s->pages.head_dim;
        const size_t n_mean = row * KVL_MEAN_ROWS * s->pages.n_layers;
        kvl_test_fill_normal(&random, mean.keys, n_mean);
        kvl_test_fill_normal(&random, mean.values, n_mean);
        size_t n_scratch = 0;
        assert_true(kvl_place_layer_floats(&s->pages, &n_scratch));
        float *scratch = kvl_alloc_aligned(n_scratch * sizeof *scratch);
        float *seen = kvl_alloc(s->n_pages_floats * sizeof *seen);
        assert_true(scratch != NULL && seen != NULL);
        memcpy(seen, s->pages.memory, s->n_pages_floats * sizeof *seen);
        kvl_container *plain = segment_of(s, more, KVL_KV_F32);
        kvl_container_seal(plain);
        for (uint32_t l = 0; l < s->pages.n_layers; l++) {
            assert_int_equal(
                kvl_place_layer_moved(&s->target, plain, l, &s->tokens, more, &mean, scratch, NULL),
                KVL_OK);
            for (uint32_t t = 0; t < s->tokens.n_tokens; t++) {
                const size_t from =
                    ((size_t)l * KVL_MEAN_ROWS + (more + t < 16 ? more + t : 16)) * row;
                for (size_t d = 0; d < row; d++) {
                    s->keys[l * s->n + t * row + d] += mean.keys[from + d];
                    s->values[l * s->n + t * row + d] += mean.values[from + d];
                }
            }
        }
        kvl_container *moved = segment_of(s, more, KVL_KV_F32);
        kvl_container_seal(moved);
        float *wanted = kvl_alloc(s->n_pages_floats * sizeof *wanted);
        assert_non_null(wanted);
        memcpy(wanted, s->pages.memory, s->n_pages_floats * sizeof *wanted);
        memcpy(s->pages.memory, seen, s->n_pages_floats * sizeof *wanted);
        for (uint32_t l = 0; l < s->pages.n_layers; l++)
            assert_int_equal(kvl_place_layer(&s->target, moved, l, &s->tokens, more, scratch, NULL),
                             KVL_OK);
        assert_memory_equal(s->pages.memory, wanted, s->n_pages_floats * sizeof *wanted);
        kvl_free(wanted);
        kvl_free(seen);
        kvl_free(scratch);
        kvl_mean_deinit(&mean);
        kvl_container_release(plain);
        kvl_container_release(moved);
        scene_free(s);
    }
}

static void test_container_of_another_shape_is_refused(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    scene *s = scene_random(&random);
    kvl_container *container = segment_of(s, 0, KVL_KV_F16);
    kvl_container_seal(container);
    kvl_place_options options = {.scratch = s->scratch, .n_scratch_floats = 2 * s->n};
    kvl_pages right = s->pages;
    n_writes = 0;
    for (int i = 0; i < 3; i++) {
        s->pages = right;
        if (i == 0) s->pages.n_layers++;
        if (i == 1) s->pages.n_kv_heads++;
        if (i == 2) s->pages.head_dim += 16;
        assert_int_equal(kvl_place_container(&s->target, container, &s->tokens, &options, NULL),
                         KVL_ERR_FOREIGN);
    }
    s->pages = right;
    const uint32_t firsts[] = {1, s->tokens.n_tokens, s->tokens.n_tokens + 1, UINT32_MAX};
    for (int i = 0; i < 4; i++) {
        options.token_first = firsts[i];
        assert_int_equal(kvl_place_container(&s->target, container, &s->tokens, &options, NULL),
                         KVL_ERR_OUT_OF_RANGE);
    }
    options.token_first = 0;
    s->positions[0] = POSITIONS;
    assert_int_equal(kvl_place_container(&s->target, container, &s->tokens, &options, NULL),
                     KVL_ERR_OUT_OF_RANGE);
    assert_int_equal(n_writes, 0);
    kvl_container_release(container);
    scene_free(s);
}

/* A flipped bit in a block is found before its numbers are used. */
static void test_damaged_block_is_refused(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 10; round++) {
        scene *s = scene_random(&random);
        kvl_container *container = segment_of(s, 0, KVL_KV_INT8);
        kvl_container_seal(container);
        size_t n_bytes = 0, n_block_bytes = 0;
        const uint8_t *bytes = kvl_container_bytes(container, &n_bytes);
        uint8_t *copy = kvl_alloc_aligned(n_bytes);
        assert_non_null(copy);
        memcpy(copy, bytes, n_bytes);
        const uint32_t layer = kvl_test_below(&random, s->pages.n_layers);
        const uint8_t *block = kvl_container_block_view(container, layer, &n_block_bytes);
        const size_t at = kvl_test_below(&random, (uint32_t)n_block_bytes);
        copy[(size_t)(block - bytes) + at] ^= 4;
        kvl_container *damaged = NULL;
        assert_int_equal(kvl_container_borrow(copy, n_bytes, NULL, NULL, &damaged, NULL), KVL_OK);
        const kvl_place_options options = {.scratch = s->scratch,
                                           .n_scratch_floats = 2 * s->n * s->pages.n_layers};
        kvl_error error;
        n_writes = 0;
        assert_int_equal(kvl_place_container(&s->target, damaged, &s->tokens, &options, &error),
                         KVL_ERR_DAMAGED);
        assert_int_equal(n_writes, 0);
        kvl_container_release(damaged);
        kvl_free(copy);
        kvl_container_release(container);
        scene_free(s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_position_0_is_the_identity),
        cmocka_unit_test(test_extract_undoes_place),
        cmocka_unit_test(test_moving_twice_is_moving_once),
        cmocka_unit_test(test_score_depends_on_distance_only),
        cmocka_unit_test(test_out_of_range_writes_nothing),
        cmocka_unit_test(test_container_is_its_layers),
        cmocka_unit_test(test_layers_are_the_container),
        cmocka_unit_test(test_a_mean_lands_before_rotation),
        cmocka_unit_test(test_container_of_another_shape_is_refused),
        cmocka_unit_test(test_damaged_block_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
