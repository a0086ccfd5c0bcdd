/* cuda/moves, cuda/mover: what is moved arrives, rotated as the reference in double says.
 * Ends with 77 (skipped) where there is no device. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "attention_world.h"
#include "base/alloc.h"
#include "compute/reference.h"
#include "cuda/mover.h"
#include "cuda/moves.h"
#include "segment/codec.h"

#include <math.h>

enum { SKIPPED = 77, ROUNDS = 24, N_POSITIONS = 700, DIM_MAX = 128 };

typedef struct shape {
    uint32_t n_kv_heads, head_dim, rotary_dim;
    kvl_rotation_pairs pairs;
    double frequencies[DIM_MAX / 2];
    kvl_rotation *tables;
    kvl_cuda_rotation rotation;
} shape;

static void *must_alloc(size_t n_bytes)
{
    void *memory = kvl_alloc_aligned(n_bytes);
    assert_non_null(memory);
    return memory;
}

static void *to_device(const void *from, size_t n_bytes)
{
    void *to = NULL;
    assert_int_equal(cudaMalloc(&to, n_bytes), cudaSuccess);
    assert_int_equal(cudaMemcpy(to, from, n_bytes, cudaMemcpyHostToDevice), cudaSuccess);
    return to;
}

static void release(const void *device)
{
    assert_int_equal(cudaFree((void *)(uintptr_t)device), cudaSuccess);
}

static shape random_shape(kvl_random *random)
{
    shape s = {.n_kv_heads = 1 + kvl_test_below(random, 8),
               .head_dim = 16 * (1 + kvl_test_below(random, DIM_MAX / 16)),
               .pairs = kvl_test_below(random, 2) == 0 ? KVL_PAIRS_ADJACENT : KVL_PAIRS_HALVES};
    s.rotary_dim = 16 * (1 + kvl_test_below(random, s.head_dim / 16));
    for (uint32_t j = 0; j < s.rotary_dim / 2; j++)
        s.frequencies[j] = pow(10000, -2.0 * j / s.rotary_dim);
    kvl_error error;
    assert_int_equal(
        kvl_rotation_create(s.frequencies, s.rotary_dim, N_POSITIONS, s.pairs, &s.tables, &error),
        KVL_OK);
    const size_t n_bytes = (size_t)N_POSITIONS * s.rotary_dim / 2 * sizeof(float);
    s.rotation = (kvl_cuda_rotation){.cosines = to_device(s.tables->cosines, n_bytes),
                                     .sines = to_device(s.tables->sines, n_bytes),
                                     .rotary_dim = s.rotary_dim,
                                     .halves = s.pairs == KVL_PAIRS_HALVES};
    return s;
}

static void free_shape(shape *s)
{
    release(s->rotation.cosines);
    release(s->rotation.sines);
    kvl_rotation_destroy(s->tables);
}

static size_t page_numbers(const shape *s)
{
    return (size_t)2 * s->n_kv_heads * KVL_CUDA_PAGE_TOKENS * s->head_dim;
}

static const uint16_t *number_at(const shape *s, const uint16_t *pages, uint32_t slot,
                                 uint32_t head, uint32_t dim)
{
    return pages + slot / KVL_CUDA_PAGE_TOKENS * page_numbers(s) +
           (size_t)head * KVL_CUDA_PAGE_TOKENS * s->head_dim +
           kvl_cuda_page_at(s->head_dim, slot % KVL_CUDA_PAGE_TOKENS, dim);
}

/* One head of one token: half a unit of bf16, and the float rotation. */
static void check_head(const shape *s, const uint16_t *pages, uint32_t slot, uint32_t head,
                       const float *unrotated, int32_t turn)
{
    double wanted[DIM_MAX];
    if (turn == 0) {
        for (uint32_t d = 0; d < s->head_dim; d++) wanted[d] = (double)unrotated[d];
    } else {
        kvl_reference_rotate(s->frequencies, s->rotary_dim, s->pairs, (uint32_t)abs(turn), turn < 0,
                             s->head_dim, unrotated, wanted);
    }
    for (uint32_t d = 0; d < s->head_dim; d++) {
        const double seen = (double)world_float(*number_at(s, pages, slot, head, d));
        double size = 0; /* of the largest number: rotation errs relative to its pair */
        for (uint32_t i = 0; i < s->head_dim; i++) size = fmax(size, fabs((double)unrotated[i]));
        assert_true(fabs(seen - wanted[d]) <= fabs(wanted[d]) / 256 + 1e-5 * size);
    }
}

/* --- segments into pages --- */

typedef struct segment {
    uint32_t n_tokens, first, n; /* of the block; of what is placed */
    uint16_t *block;
    float *keys, *values;        /* [n][n_kv_heads][head_dim], as the block has them */
    float *offsets[2];           /* [n_kv_heads][n][head_dim] or NULL */
    uint32_t *positions, *slots; /* [n] */
    uint32_t n_pages;
} segment;

static const kvl_kv_dtype dtypes[] = {KVL_KV_F32, KVL_KV_F16, KVL_KV_BF16, KVL_KV_INT8};

static void place_tokens(kvl_random *random, segment *g)
{
    g->n_pages = g->n / KVL_CUDA_PAGE_TOKENS + 3;
    const uint32_t shift = kvl_test_below(random, KVL_CUDA_PAGE_TOKENS);
    const bool scattered = kvl_test_below(random, 2) == 0;
    g->positions = must_alloc(g->n * sizeof *g->positions);
    g->slots = must_alloc(g->n * sizeof *g->slots);
    const uint32_t n_slots = g->n_pages * KVL_CUDA_PAGE_TOKENS;
    for (uint32_t i = 0; i < g->n; i++) {
        g->positions[i] = (i * 3 + shift) % N_POSITIONS;
        /* A step that shares no factor with the slots visits each once. */
        g->slots[i] = scattered ? (uint32_t)(((uint64_t)i * 1000003 + shift) % n_slots) : i + shift;
    }
}

static segment random_segment(const shape *s, kvl_random *random, uint32_t format)
{
    segment g = {.n_tokens = 1 + kvl_test_below(random, 300)};
    g.first = kvl_test_below(random, g.n_tokens);
    g.n = 1 + kvl_test_below(random, g.n_tokens - g.first);
    const size_t width = (size_t)s->n_kv_heads * s->head_dim;
    float *numbers = must_alloc(2 * g.n_tokens * width * sizeof(float));
    kvl_test_fill_normal(random, numbers, 2 * g.n_tokens * width);
    uint64_t n_bytes = 0;
    assert_true(
        kvl_segment_block_bytes(dtypes[format], s->n_kv_heads, g.n_tokens, s->head_dim, &n_bytes));
    g.block = must_alloc(n_bytes + 64);
    kvl_segment_encode_block(dtypes[format], s->n_kv_heads, g.n_tokens, s->head_dim, numbers,
                             numbers + g.n_tokens * width, g.block);
    kvl_free(numbers);
    g.keys = must_alloc(g.n * width * sizeof(float));
    g.values = must_alloc(g.n * width * sizeof(float));
    kvl_segment_decode_block(dtypes[format], s->n_kv_heads, g.n_tokens, s->head_dim, g.block,
                             g.first, g.n, g.keys, g.values);
    for (uint32_t i = 0; i < 2; i++) {
        if (kvl_test_below(random, 2) == 0) continue;
        g.offsets[i] = must_alloc(g.n * width * sizeof(float));
        kvl_test_fill_uniform(random, g.offsets[i], g.n * width);
    }
    place_tokens(random, &g);
    return g;
}

static void free_segment(segment *g)
{
    kvl_free(g->block);
    kvl_free(g->keys);
    kvl_free(g->values);
    kvl_free(g->offsets[0]);
    kvl_free(g->offsets[1]);
    kvl_free(g->positions);
    kvl_free(g->slots);
}

static uint16_t *run_place(const shape *s, const segment *g, uint32_t format)
{
    uint64_t block_bytes = 0;
    assert_true(kvl_segment_block_bytes(dtypes[format], s->n_kv_heads, g->n_tokens, s->head_dim,
                                        &block_bytes));
    const size_t offset_bytes = (size_t)g->n * s->n_kv_heads * s->head_dim * sizeof(float);
    const size_t page_bytes = g->n_pages * page_numbers(s) * sizeof(uint16_t);
    uint16_t *pages = must_alloc(page_bytes);
    memset(pages, 0xff, page_bytes);
    kvl_cuda_place place = {
        .block = to_device(g->block, block_bytes),
        .key_offsets = g->offsets[0] ? to_device(g->offsets[0], offset_bytes) : NULL,
        .value_offsets = g->offsets[1] ? to_device(g->offsets[1], offset_bytes) : NULL,
        .positions = to_device(g->positions, g->n * sizeof *g->positions),
        .slots = to_device(g->slots, g->n * sizeof *g->slots),
        .pages = to_device(pages, page_bytes),
        .rotation = s->rotation,
        .format = (kvl_cuda_format)format,
        .block_tokens = g->n_tokens,
        .token_first = g->first,
        .n_tokens = g->n,
        .n_kv_heads = s->n_kv_heads,
        .head_dim = s->head_dim,
    };
    assert_int_equal(kvl_cuda_place_launch(&place, NULL), cudaSuccess);
    assert_int_equal(cudaMemcpy(pages, place.pages, page_bytes, cudaMemcpyDeviceToHost),
                     cudaSuccess);
    const void *const used[] = {place.block,     place.key_offsets, place.value_offsets,
                                place.positions, place.slots,       place.pages};
    for (size_t i = 0; i < sizeof used / sizeof *used; i++) release(used[i]);
    return pages;
}

static void check_token(const shape *s, const segment *g, const uint16_t *pages, uint32_t token)
{
    for (uint32_t half = 0; half < 2; half++) {
        const float *stored = half == 0 ? g->keys : g->values;
        for (uint32_t h = 0; h < s->n_kv_heads; h++) {
            float head[DIM_MAX];
            for (uint32_t d = 0; d < s->head_dim; d++) {
                head[d] = stored[((size_t)token * s->n_kv_heads + h) * s->head_dim + d];
                if (g->offsets[half] != NULL)
                    head[d] += g->offsets[half][((size_t)h * g->n + token) * s->head_dim + d];
            }
            check_head(s, pages, g->slots[token], half * s->n_kv_heads + h, head,
                       half == 0 ? (int32_t)g->positions[token] : 0);
        }
    }
}

static void test_a_segment_is_placed_rotated_and_offset(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (uint32_t i = 0; i < ROUNDS; i++) {
        shape s = random_shape(&random);
        segment g = random_segment(&s, &random, i % 4);
        uint16_t *pages = run_place(&s, &g, i % 4);
        for (uint32_t t = 0; t < g.n; t++) check_token(&s, &g, pages, t);
        /* Every slot that nothing was placed in is as it was. */
        uint32_t n_untouched = 0;
        for (uint32_t slot = 0; slot < g.n_pages * KVL_CUDA_PAGE_TOKENS; slot++)
            n_untouched += *number_at(&s, pages, slot, 0, 0) == 0xffff;
        assert_int_equal(n_untouched, g.n_pages * KVL_CUDA_PAGE_TOKENS - g.n);
        kvl_free(pages);
        free_segment(&g);
        free_shape(&s);
    }
}

/* --- pages to pages --- */

enum { N_FROM = 20, N_TO = 25, N_MOVES = 11, N_LAYERS = 2 };

static uint16_t *random_pages(const shape *s, kvl_random *random, uint32_t n)
{
    const size_t n_numbers = n * page_numbers(s);
    float *numbers = must_alloc(n_numbers * sizeof *numbers);
    uint16_t *pages = must_alloc(n_numbers * sizeof *pages);
    kvl_test_fill_normal(random, numbers, n_numbers);
    for (size_t i = 0; i < n_numbers; i++) pages[i] = world_bf16(numbers[i]);
    kvl_free(numbers);
    return pages;
}

static void check_move(const shape *s, const uint16_t *from, const uint16_t *to,
                       const kvl_cuda_page_move *move)
{
    for (uint32_t t = 0; t < KVL_CUDA_PAGE_TOKENS; t++) {
        for (uint32_t h = 0; h < 2 * s->n_kv_heads; h++) {
            float head[DIM_MAX];
            for (uint32_t d = 0; d < s->head_dim; d++)
                head[d] =
                    world_float(*number_at(s, from, move->from * KVL_CUDA_PAGE_TOKENS + t, h, d));
            check_head(s, to, move->to * KVL_CUDA_PAGE_TOKENS + t, h, head,
                       h < s->n_kv_heads ? move->turn : 0);
        }
    }
}

static void check_moves(const shape *s, kvl_random *random, bool from_host, uint32_t n_blocks)
{
    uint16_t *from = random_pages(s, random, N_LAYERS * N_FROM);
    uint16_t *to = random_pages(s, random, N_LAYERS * N_TO);
    kvl_cuda_page_move moves[N_MOVES];
    for (uint32_t i = 0; i < N_MOVES; i++)
        moves[i] = (kvl_cuda_page_move){kvl_test_below(random, N_FROM), (i * 7 + 3) % N_TO,
                                        (int32_t)kvl_test_below(random, 2 * N_POSITIONS - 1) -
                                            (N_POSITIONS - 1)};
    moves[0].turn = 0;
    const size_t from_bytes = N_LAYERS * N_FROM * page_numbers(s) * sizeof *from;
    const size_t to_bytes = N_LAYERS * N_TO * page_numbers(s) * sizeof *to;
    void *pinned = NULL;
    if (from_host) {
        assert_int_equal(cudaMallocHost(&pinned, from_bytes), cudaSuccess);
        memcpy(pinned, from, from_bytes);
    }
    const kvl_cuda_page_moves work = {.from = from_host ? pinned : to_device(from, from_bytes),
                                      .to = to_device(to, to_bytes),
                                      .moves = to_device(moves, sizeof moves),
                                      .rotation = s->rotation,
                                      .n_moves = N_MOVES,
                                      .n_layers = N_LAYERS,
                                      .n_from_pages = N_FROM,
                                      .n_to_pages = N_TO,
                                      .n_kv_heads = s->n_kv_heads,
                                      .head_dim = s->head_dim,
                                      .n_blocks = n_blocks};
    assert_int_equal(kvl_cuda_page_moves_launch(&work, NULL), cudaSuccess);
    assert_int_equal(cudaMemcpy(to, work.to, to_bytes, cudaMemcpyDeviceToHost), cudaSuccess);
    for (uint32_t layer = 0; layer < N_LAYERS; layer++)
        for (uint32_t i = 0; i < N_MOVES; i++)
            check_move(s, from + layer * N_FROM * page_numbers(s),
                       to + layer * N_TO * page_numbers(s), &moves[i]);
    if (from_host)
        assert_int_equal(cudaFreeHost(pinned), cudaSuccess);
    else
        release(work.from);
    release(work.to);
    release(work.moves);
    kvl_free(from);
    kvl_free(to);
}

static void test_pages_move_and_turn(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (uint32_t i = 0; i < ROUNDS; i++) {
        shape s = random_shape(&random);
        check_moves(&s, &random, i % 2 == 1, i % 3 * 8);
        free_shape(&s);
    }
}

static void test_shapes_without_kernels_are_refused(void **state)
{
    (void)state;
    const kvl_cuda_page_moves moves = {.n_moves = 1,
                                       .n_layers = 1,
                                       .n_kv_heads = 1,
                                       .head_dim = 64,
                                       .rotation = {.rotary_dim = 24}};
    assert_int_equal(kvl_cuda_page_moves_launch(&moves, NULL), cudaErrorInvalidValue);
    const kvl_cuda_place place = {.n_tokens = 1, .n_kv_heads = 1, .head_dim = 20};
    assert_int_equal(kvl_cuda_place_launch(&place, NULL), cudaErrorInvalidValue);
}

/* --- the mover --- */

static void check_round_trip(kvl_cuda_mover *mover, size_t n_bytes, bool pinned, uint8_t seed)
{
    void *device = NULL;
    assert_int_equal(cudaMalloc(&device, n_bytes), cudaSuccess);
    uint8_t *host[2];
    for (int i = 0; i < 2; i++) {
        void *memory = NULL;
        if (pinned)
            assert_int_equal(cudaMallocHost(&memory, n_bytes), cudaSuccess);
        else
            memory = must_alloc(n_bytes);
        host[i] = memory;
    }
    for (size_t i = 0; i < n_bytes; i++) host[0][i] = (uint8_t)(i * 31 + i / 251 + seed);
    memset(host[1], 0, n_bytes);
    kvl_error error;
    assert_int_equal(kvl_cuda_mover_load(mover, device, host[0], n_bytes, pinned, &error), KVL_OK);
    if (seed % 2 == 0) {
        assert_int_equal(kvl_cuda_mover_order(mover, NULL, &error), KVL_OK);
    } else {
        cudaEvent_t event;
        assert_int_equal(cudaEventCreate(&event), cudaSuccess);
        assert_int_equal(kvl_cuda_mover_mark(mover, event, &error), KVL_OK);
        assert_int_equal(cudaStreamWaitEvent(NULL, event, 0), cudaSuccess);
        assert_int_equal(cudaEventDestroy(event), cudaSuccess);
    }
    assert_int_equal(kvl_cuda_mover_store(mover, host[1], device, n_bytes, pinned, NULL, &error),
                     KVL_OK);
    assert_int_equal(kvl_cuda_mover_finish(mover, &error), KVL_OK);
    assert_memory_equal(host[0], host[1], n_bytes);
    for (int i = 0; i < 2; i++) {
        if (pinned)
            assert_int_equal(cudaFreeHost(host[i]), cudaSuccess);
        else
            kvl_free(host[i]);
    }
    release(device);
}

static void test_bytes_come_back_as_they_went(void **state)
{
    (void)state;
    kvl_error error;
    kvl_cuda_mover *mover = NULL;
    assert_int_equal(kvl_cuda_mover_create(3, 1000, &mover, &error), KVL_OK);
    const size_t sizes[] = {1, 999, 1000, 1001, 3000, 12345};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        check_round_trip(mover, sizes[i], false, (uint8_t)i);
        check_round_trip(mover, sizes[i], true, (uint8_t)i);
    }
    kvl_cuda_mover_destroy(mover);
}

int main(void)
{
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        (void)fprintf(stderr, "skipped: no CUDA device\n");
        return SKIPPED;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_segment_is_placed_rotated_and_offset),
        cmocka_unit_test(test_pages_move_and_turn),
        cmocka_unit_test(test_shapes_without_kernels_are_refused),
        cmocka_unit_test(test_bytes_come_back_as_they_went),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
