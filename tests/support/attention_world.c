/* attention_world.c: see attention_world.h. */
#include "attention_world.h"

#include "base/alloc.h"
#include "compute/reference.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *must(void *memory)
{
    if (memory == NULL) {
        (void)fprintf(stderr, "no memory for a test\n");
        abort();
    }
    return memory;
}

float world_float(uint16_t bf16)
{
    const uint32_t bits = (uint32_t)bf16 << 16;
    float number = 0;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* Round to nearest, ties to even; finite numbers only. */
uint16_t world_bf16(float number)
{
    uint32_t bits = 0;
    memcpy(&bits, &number, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

size_t world_page_numbers(const world *w)
{
    return (size_t)2 * w->shape.n_kv_heads * KVL_PAGE_TOKENS * w->shape.head_dim;
}

world_shape world_random_shape(kvl_random *random)
{
    world_shape shape = {
        .n_kv_heads = 1 + kvl_test_below(random, 3),
        .group = 1 + kvl_test_below(random, 8),
        .head_dim = kvl_test_below(random, 2) == 0 ? 64 : 128,
        .n_paths = 1 + kvl_test_below(random, kvl_test_below(random, 3) == 0 ? 80 : 12),
        .n_tokens_max = 1 + kvl_test_below(random, kvl_test_below(random, 2) == 0 ? 1500 : 100),
        .n_rows_max = 1 + kvl_test_below(random, 60),
        .decode = kvl_test_below(random, 3) == 0,
    };
    if (shape.n_paths > 12) shape.n_rows_max = 1 + kvl_test_below(random, 4);
    return shape;
}

static uint32_t pages_of(uint32_t n_tokens)
{
    return (n_tokens + KVL_PAGE_TOKENS - 1) / KVL_PAGE_TOKENS;
}

/* A path begins like one before it (whole pages of it, or none) and goes on by itself. */
static uint32_t grow_path(world *w, kvl_random *random, uint32_t p, uint32_t *ids)
{
    uint32_t n_shared = 0;
    if (p > 0 && kvl_test_below(random, 6) != 0) {
        const uint32_t from = kvl_test_below(random, 3) == 0 ? kvl_test_below(random, p) : 0;
        const uint32_t n_pages = w->paths[from].n_tokens / KVL_PAGE_TOKENS;
        n_shared = kvl_test_below(random, 2) == 0 ? n_pages : kvl_test_below(random, n_pages + 1);
        if (n_shared != 0) memcpy(ids, w->paths[from].pages, n_shared * sizeof *ids);
    }
    const uint32_t least = n_shared * KVL_PAGE_TOKENS;
    uint32_t n_tokens = 1 + kvl_test_below(random, w->shape.n_tokens_max);
    if (n_tokens <= least) n_tokens = least + kvl_test_below(random, 40);
    if (n_tokens == 0) n_tokens = 1;
    for (uint32_t i = n_shared; i < pages_of(n_tokens); i++) ids[i] = w->n_pages++;
    w->paths[p] = (kvl_attention_path){ids, n_tokens};
    return pages_of(n_tokens);
}

static void add_rows(world *w, kvl_random *random, uint32_t p)
{
    const uint32_t n_tokens = w->paths[p].n_tokens;
    if (w->shape.decode) {
        w->rows[w->n_rows++] = (kvl_attention_row){p, n_tokens - 1};
        return;
    }
    /* Either a dense stretch or scattered rows. */
    const uint32_t gap = kvl_test_below(random, 2) == 0 ? 1 : 1 + n_tokens / 20;
    uint32_t position = kvl_test_below(random, n_tokens);
    for (uint32_t i = 0; i < w->shape.n_rows_max && position < n_tokens; i++) {
        w->rows[w->n_rows++] = (kvl_attention_row){p, position};
        position += 1 + kvl_test_below(random, gap);
    }
}

static void shuffle_pages(world *w, kvl_random *random, uint32_t n_ids)
{
    w->n_pages += 2;
    uint32_t *shuffled = must(kvl_alloc(w->n_pages * sizeof *shuffled));
    for (uint32_t i = 0; i < w->n_pages; i++) {
        const uint32_t at = kvl_test_below(random, i + 1);
        shuffled[i] = shuffled[at];
        shuffled[at] = i;
    }
    for (uint32_t i = 0; i < n_ids; i++) w->page_ids[i] = shuffled[w->page_ids[i]];
    kvl_free(shuffled);
}

static uint16_t *random_bf16(kvl_random *random, size_t n)
{
    float *numbers = must(kvl_alloc(n * sizeof *numbers));
    uint16_t *rounded = must(kvl_alloc(n * sizeof *rounded));
    kvl_test_fill_normal(random, numbers, n);
    for (size_t i = 0; i < n; i++) rounded[i] = world_bf16(numbers[i]);
    kvl_free(numbers);
    return rounded;
}

world *world_create(kvl_random *random, const world_shape *shape)
{
    world *w = must(kvl_alloc_zero(1, sizeof *w));
    w->shape = *shape;
    w->n_heads = shape->n_kv_heads * shape->group;
    w->paths = must(kvl_alloc_zero(shape->n_paths, sizeof *w->paths));
    w->rows = must(kvl_alloc_zero((size_t)shape->n_paths * shape->n_rows_max, sizeof *w->rows));
    const size_t path_pages = pages_of(shape->n_tokens_max) + 5 * (size_t)shape->n_paths;
    w->page_ids = must(kvl_alloc_zero(shape->n_paths * path_pages, sizeof *w->page_ids));
    uint32_t n_ids = 0;
    for (uint32_t p = 0; p < shape->n_paths; p++) {
        n_ids += grow_path(w, random, p, w->page_ids + n_ids);
        add_rows(w, random, p);
    }
    shuffle_pages(w, random, n_ids);
    w->kv = random_bf16(random, w->n_pages * world_page_numbers(w));
    const size_t n = (size_t)w->n_rows * w->n_heads * shape->head_dim;
    w->queries = random_bf16(random, n);
    /* Some sharp rows: one key has nearly all the weight. */
    if (kvl_test_below(random, 3) == 0)
        for (size_t i = 0; i < n; i++) w->queries[i] = world_bf16(6 * world_float(w->queries[i]));
    return w;
}

void world_destroy(world *w)
{
    kvl_free(w->paths);
    kvl_free(w->rows);
    kvl_free(w->page_ids);
    kvl_free(w->kv);
    kvl_free(w->queries);
    kvl_free(w->out);
    kvl_free(w->magnitude);
    kvl_free(w);
}

/* Keys (half 0) or values (half 1) of a path: [n_tokens][n_kv_heads][head_dim] */
static float *gather(const world *w, uint32_t path, uint32_t half, bool absolute)
{
    const uint32_t dim = w->shape.head_dim;
    const uint32_t n_heads = w->shape.n_kv_heads;
    const uint32_t n_tokens = w->paths[path].n_tokens;
    float *numbers = must(kvl_alloc((size_t)n_tokens * n_heads * dim * sizeof(float)));
    for (uint32_t t = 0; t < n_tokens; t++) {
        const uint16_t *page =
            w->kv + w->paths[path].pages[t / KVL_PAGE_TOKENS] * world_page_numbers(w);
        for (uint32_t h = 0; h < n_heads; h++) {
            const uint16_t *head = page + (size_t)(half * n_heads + h) * KVL_PAGE_TOKENS * dim;
            for (uint32_t d = 0; d < dim; d++) {
                const float x = world_float(head[kvl_cuda_page_at(dim, t % KVL_PAGE_TOKENS, d)]);
                numbers[((size_t)t * n_heads + h) * dim + d] = absolute ? fabsf(x) : x;
            }
        }
    }
    return numbers;
}

static void attend_path(world *w, uint32_t path, uint32_t row_first, uint32_t n_rows)
{
    const size_t row_numbers = (size_t)w->n_heads * w->shape.head_dim;
    float *keys = gather(w, path, 0, false);
    float *values = gather(w, path, 1, false);
    float *absolute = gather(w, path, 1, true);
    float *queries = must(kvl_alloc(n_rows * row_numbers * sizeof(float)));
    uint32_t *positions = must(kvl_alloc(n_rows * sizeof *positions));
    for (size_t i = 0; i < n_rows * row_numbers; i++)
        queries[i] = world_float(w->queries[row_first * row_numbers + i]);
    for (uint32_t i = 0; i < n_rows; i++) positions[i] = w->rows[row_first + i].position;
    kvl_reference_attention attention = {.n_rows = n_rows,
                                         .n_heads = w->n_heads,
                                         .n_kv_heads = w->shape.n_kv_heads,
                                         .head_dim = w->shape.head_dim,
                                         .n_keys = w->paths[path].n_tokens,
                                         .queries = queries,
                                         .positions = positions,
                                         .keys = keys,
                                         .values = values};
    kvl_status status = kvl_reference_attend(&attention, w->out + row_first * row_numbers);
    attention.values = absolute;
    if (status == KVL_OK)
        status = kvl_reference_attend(&attention, w->magnitude + row_first * row_numbers);
    if (status != KVL_OK) abort();
    kvl_free(keys);
    kvl_free(values);
    kvl_free(absolute);
    kvl_free(queries);
    kvl_free(positions);
}

void world_attend(world *w)
{
    const size_t n = (size_t)w->n_rows * w->n_heads * w->shape.head_dim;
    w->out = must(kvl_alloc(n * sizeof *w->out));
    w->magnitude = must(kvl_alloc(n * sizeof *w->magnitude));
    for (uint32_t r = 0; r < w->n_rows;) {
        uint32_t past = r;
        while (past < w->n_rows && w->rows[past].path == w->rows[r].path) past++;
        attend_path(w, w->rows[r].path, r, past - r);
        r = past;
    }
}

double world_error(const world *w, const float *out, bool rounded)
{
    /* Half a unit in the last place of bf16 (8 bits of fraction, one implied) for each weight and
     * for what is written. Scores are sums of head_dim float products: their error, at most about
     * head_dim * 2^-24 * |q| |k|, stays below 2^-11 for these worlds. */
    const double half_unit = 1.0 / 256;
    double worst = 0;
    const size_t n = (size_t)w->n_rows * w->n_heads * w->shape.head_dim;
    for (size_t i = 0; i < n; i++) {
        const double allowed = w->magnitude[i] * (half_unit + 1.0 / 2048) +
                               (rounded ? fabs(w->out[i]) * half_unit : 0) + 1e-30;
        const double error = fabs((double)out[i] - w->out[i]) / allowed;
        if (!(error <= worst)) worst = isnan(error) ? INFINITY : error;
    }
    return worst;
}

/* Keeps the call that attention/ makes. */
typedef struct listener {
    kvl_backend backend;
    kvl_attend_call call;
} listener;

static void listen(kvl_backend *backend, const kvl_attend_call *call)
{
    ((listener *)(void *)backend)->call = *call;
}

kvl_attend_call world_plan(const world *w, kvl_attention_plan *plan)
{
    static const kvl_backend_ops ops = {.name = "listener", .attend = listen};
    listener l = {.backend = {.ops = &ops}};
    kvl_error error;
    if (kvl_attention_plan_make(plan, w->rows, w->n_rows, w->paths, w->shape.n_paths, &error) !=
        KVL_OK) {
        (void)fprintf(stderr, "%s\n", error.text);
        abort();
    }
    const kvl_pages pages = {.n_layers = 1,
                             .n_pages = w->n_pages,
                             .n_kv_heads = w->shape.n_kv_heads,
                             .head_dim = w->shape.head_dim};
    kvl_attention_run(plan, &l.backend, &pages, 0, w->n_heads, NULL, NULL);
    l.call.pages = NULL;
    return l.call;
}
