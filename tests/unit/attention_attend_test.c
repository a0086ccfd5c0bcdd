/* attention: rows attend to exactly their own past, whatever they share and whoever stands beside
 * them. Checked over random trees of prompts against a naive reference in double, on every variant
 * of the CPU backend that runs here.
 * Bound   see `bound_of`: it is derived from the roundings on the way, not tuned. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "attention/attention.h"
#include "base/alloc.h"
#include "compute/cpu/attend.h"
#include "test_random.h"

#include <math.h>

enum { PATHS_MAX = 24, PAGES_MAX = 600, PATH_PAGES_MAX = 140, ROWS_MAX = 160, N_LAYERS = 2 };

/* Pages with numbers in them, a tree of paths over them, and rows that ask. */
typedef struct world {
    kvl_pages pages;
    uint32_t n_heads;
    uint32_t n_paths;
    uint32_t n_rows;
    uint32_t n_pages_used;
    uint32_t layer;
    uint32_t page_ids[PATHS_MAX][PATH_PAGES_MAX];
    kvl_attention_path paths[PATHS_MAX];
    kvl_attention_row rows[ROWS_MAX];
    float *queries; /* [n_rows][n_heads][head_dim] */
    float *out;     /* same */
} world;

static size_t row_floats(const world *w)
{
    return (size_t)w->n_heads * w->pages.head_dim;
}

static void *must_alloc(size_t size)
{
    void *memory = kvl_alloc_aligned(size);
    assert_non_null(memory);
    return memory;
}

/* A path begins like one before it (whole pages of it, or none) and goes on by itself; sometimes
 * it is a duplicate. */
static void grow_path(world *w, kvl_random *random, uint32_t n_tokens_max)
{
    const uint32_t p = w->n_paths++;
    uint32_t n_shared = 0;
    if (p > 0 && kvl_test_below(random, 5) != 0) {
        const kvl_attention_path *from = &w->paths[kvl_test_below(random, p)];
        const uint32_t n_pages = from->n_tokens / KVL_PAGE_TOKENS;
        n_shared = kvl_test_below(random, 3) == 0 ? n_pages : kvl_test_below(random, n_pages + 1);
        memcpy(w->page_ids[p], from->pages, n_shared * sizeof(uint32_t));
    }
    const uint32_t least = n_shared * KVL_PAGE_TOKENS;
    uint32_t n_tokens = 1 + kvl_test_below(random, n_tokens_max);
    if (n_tokens <= least) n_tokens = least + kvl_test_below(random, 2) * 5;
    if (n_tokens == 0) n_tokens = 1;
    for (uint32_t i = n_shared; i * KVL_PAGE_TOKENS < n_tokens; i++) {
        assert_true(i < PATH_PAGES_MAX);
        w->page_ids[p][i] = w->n_pages_used++;
    }
    w->paths[p] = (kvl_attention_path){w->page_ids[p], n_tokens};
}

static void fill_numbers(world *w, kvl_random *random)
{
    kvl_pages *pages = &w->pages;
    assert_true(w->n_pages_used <= PAGES_MAX);
    /* Pages are dealt out in random order, so that ids say nothing about sharing. */
    uint32_t shuffled[PAGES_MAX];
    pages->n_pages = w->n_pages_used + 3;
    for (uint32_t i = 0; i < pages->n_pages; i++) {
        const uint32_t at = kvl_test_below(random, i + 1);
        shuffled[i] = shuffled[at];
        shuffled[at] = i;
    }
    for (uint32_t p = 0; p < w->n_paths; p++)
        for (uint32_t i = 0; i * KVL_PAGE_TOKENS < w->paths[p].n_tokens; i++)
            w->page_ids[p][i] = shuffled[w->page_ids[p][i]];
    const size_t n = N_LAYERS * (size_t)pages->n_pages * kvl_pages_page_floats(pages);
    pages->memory = must_alloc(n * sizeof(float));
    kvl_test_fill_uniform(random, pages->memory, n);
    w->queries = must_alloc(w->n_rows * row_floats(w) * sizeof(float));
    w->out = must_alloc(w->n_rows * row_floats(w) * sizeof(float));
    kvl_test_fill_normal(random, w->queries, w->n_rows * row_floats(w));
    memset(w->out, 0xff, w->n_rows * row_floats(w) * sizeof(float));
}

static void make_shape(world *w, kvl_random *random, uint32_t head_dim_max)
{
    memset(w, 0, sizeof *w);
    w->pages.n_layers = N_LAYERS;
    w->pages.n_kv_heads = 1 + kvl_test_below(random, 3);
    w->pages.head_dim = 16 * (1 + kvl_test_below(random, head_dim_max / 16));
    w->n_heads = w->pages.n_kv_heads * (1 + kvl_test_below(random, 5));
    w->layer = kvl_test_below(random, N_LAYERS);
}

/* Rows of a path stand together, at ascending positions with random gaps. */
static world *make_world(kvl_random *random, uint32_t head_dim_max, uint32_t n_tokens_max)
{
    world *w = must_alloc(sizeof *w);
    make_shape(w, random, head_dim_max);
    const uint32_t n_paths = 1 + kvl_test_below(random, PATHS_MAX);
    while (w->n_paths < n_paths) grow_path(w, random, n_tokens_max / (1 + n_paths / 4));
    for (uint32_t p = 0; p < n_paths; p++) {
        const uint32_t n_tokens = w->paths[p].n_tokens;
        const uint32_t gap = 1 + kvl_test_below(random, 1 + n_tokens / 3);
        uint32_t position = kvl_test_below(random, n_tokens);
        if (kvl_test_below(random, 3) == 0) position = n_tokens - 1;
        for (; position < n_tokens && w->n_rows < ROWS_MAX - PATHS_MAX + p;
             position += 1 + kvl_test_below(random, gap))
            w->rows[w->n_rows++] = (kvl_attention_row){p, position};
    }
    fill_numbers(w, random);
    return w;
}

static void free_world(world *w)
{
    kvl_free(w->pages.memory);
    kvl_free(w->queries);
    kvl_free(w->out);
    kvl_free(w);
}

typedef struct machine {
    kvl_pool *pool;
    kvl_backend *backend;
    kvl_attention_plan *plan;
} machine;

static machine make_machine(kvl_cpu_variant variant, size_t n_threads)
{
    machine m;
    kvl_error error;
    assert_int_equal(kvl_pool_create(n_threads, false, &m.pool, &error), KVL_OK);
    assert_int_equal(kvl_backend_cpu_create(m.pool, variant, &m.backend, &error), KVL_OK);
    assert_int_equal(kvl_attention_plan_create(&m.plan, &error), KVL_OK);
    return m;
}

static void free_machine(machine *m)
{
    kvl_attention_plan_destroy(m->plan);
    m->backend->ops->destroy(m->backend);
    kvl_pool_destroy(m->pool);
}

static void attend(const machine *m, const world *w, const kvl_attention_row *rows, uint32_t n_rows,
                   const float *queries, float *out)
{
    kvl_error error;
    assert_int_equal(kvl_attention_plan_make(m->plan, rows, n_rows, w->paths, w->n_paths, &error),
                     KVL_OK);
    kvl_attention_run(m->plan, m->backend, &w->pages, w->layer, w->n_heads, queries, out);
    m->backend->ops->synchronize(m->backend);
}

/* ---- reference ---- */

typedef struct reference {
    double out[KVL_HEAD_DIM_MAX];
    double bound[KVL_HEAD_DIM_MAX];
} reference;

static double key_at(const world *w, const kvl_attention_path *path, uint32_t head, uint32_t t,
                     uint32_t d)
{
    const float *keys = kvl_pages_keys(&w->pages, w->layer, path->pages[t / KVL_PAGE_TOKENS], head);
    return (double)keys[(size_t)d * KVL_PAGE_TOKENS + t % KVL_PAGE_TOKENS];
}

static double value_at(const world *w, const kvl_attention_path *path, uint32_t head, uint32_t t,
                       uint32_t d)
{
    const float *values =
        kvl_pages_values(&w->pages, w->layer, path->pages[t / KVL_PAGE_TOKENS], head);
    return (double)values[(size_t)(t % KVL_PAGE_TOKENS) * w->pages.head_dim + d];
}

/* Largest error of an output whose weighted mean of |value| is `size`.
 *   score      query scaled twice rounded, then a chain of head_dim multiply-adds (two roundings
 *              each in the portable variant): (2 head_dim + 4) u sum |q k| / sqrt(head_dim)
 *   weight     argument of exp rounded (u spread), exp itself 4 u: on numerator and sum alike
 *   fold       once a slice: the same two, and two products
 *   sums       256 terms of a slice, twice rounded; 64 + 8 terms for the sum; division */
static double bound_of(const world *w, double score_size, double spread, uint32_t n_keys,
                       double size)
{
    const double u = 0x1p-24;
    const double score = (2.0 * w->pages.head_dim + 4.0) * u * score_size;
    const double weight = score + (spread + 4.0) * u;
    const double fold = (n_keys / KVL_ATTEND_SLICE_KEYS + 1.0) * (spread + 7.0) * u;
    return 1.01 * (2.0 * (weight + fold) + (512.0 + 72.0 + 4.0) * u) * size + 1e-37;
}

static void refer(const world *w, const kvl_attention_row *row, uint32_t query_head,
                  const float *query, reference *r)
{
    const kvl_attention_path *path = &w->paths[row->path];
    const uint32_t head = query_head / (w->n_heads / w->pages.n_kv_heads);
    const uint32_t n_keys = row->position + 1;
    const uint32_t head_dim = w->pages.head_dim;
    double scores[PATH_PAGES_MAX * KVL_PAGE_TOKENS];
    double top = -INFINITY, low = INFINITY, score_size = 0.0, sum = 0.0;
    for (uint32_t t = 0; t < n_keys; t++) {
        double score = 0.0, size = 0.0;
        for (uint32_t d = 0; d < head_dim; d++) {
            const double product = (double)query[d] * key_at(w, path, head, t, d);
            score += product;
            size += fabs(product);
        }
        scores[t] = score / sqrt((double)head_dim);
        top = fmax(top, scores[t]);
        low = fmin(low, scores[t]);
        score_size = fmax(score_size, size / sqrt((double)head_dim));
    }
    for (uint32_t t = 0; t < n_keys; t++) {
        scores[t] = exp(scores[t] - top);
        sum += scores[t];
    }
    for (uint32_t d = 0; d < head_dim; d++) {
        double out = 0.0, size = 0.0;
        for (uint32_t t = 0; t < n_keys; t++) {
            out += scores[t] * value_at(w, path, head, t, d);
            size += scores[t] * fabs(value_at(w, path, head, t, d));
        }
        r->out[d] = out / sum;
        r->bound[d] = bound_of(w, score_size, top - low, n_keys, size / sum);
    }
}

static void check_against_reference(const world *w, const float *out)
{
    for (uint32_t i = 0; i < w->n_rows; i++) {
        for (uint32_t h = 0; h < w->n_heads; h++) {
            const size_t at = i * row_floats(w) + (size_t)h * w->pages.head_dim;
            reference r;
            refer(w, &w->rows[i], h, w->queries + at, &r);
            for (uint32_t d = 0; d < w->pages.head_dim; d++) {
                const double error = fabs((double)out[at + d] - r.out[d]);
                if (!(error <= r.bound[d]))
                    fail_msg("row %u (path %u, position %u) head %u dimension %u: %g, not %g; "
                             "error %g above %g",
                             i, w->rows[i].path, w->rows[i].position, h, d, (double)out[at + d],
                             r.out[d], error, r.bound[d]);
            }
        }
    }
}

/* ---- tests ---- */

typedef void each_variant(kvl_cpu_variant variant, kvl_random *random);

static void on_every_variant(each_variant *test)
{
    kvl_random random = kvl_test_random();
    for (int v = KVL_CPU_PORTABLE; v <= KVL_CPU_AVX512; v++) {
        if (kvl_cpu_variant_runs((kvl_cpu_variant)v)) test((kvl_cpu_variant)v, &random);
    }
}

static void near_reference(kvl_cpu_variant variant, kvl_random *random)
{
    machine m = make_machine(variant, 1 + kvl_test_below(random, 3));
    for (int round = 0; round < 14; round++) {
        const bool wide = round % 7 == 6;
        world *w = make_world(random, wide ? 256 : 96, wide ? 300 : 700);
        attend(&m, w, w->rows, w->n_rows, w->queries, w->out);
        check_against_reference(w, w->out);
        free_world(w);
    }
    free_machine(&m);
}

static void test_near_reference(void **state)
{
    (void)state;
    on_every_variant(near_reference);
}

/* Large scores: one key takes nearly all the weight, and slices differ by hundreds. */
static void sharp_scores(kvl_cpu_variant variant, kvl_random *random)
{
    machine m = make_machine(variant, 2);
    for (int round = 0; round < 4; round++) {
        world *w = make_world(random, 64, 900);
        for (size_t i = 0; i < w->n_rows * row_floats(w); i++) w->queries[i] *= 40.0F;
        attend(&m, w, w->rows, w->n_rows, w->queries, w->out);
        check_against_reference(w, w->out);
        free_world(w);
    }
    free_machine(&m);
}

static void test_sharp_scores(void **state)
{
    (void)state;
    on_every_variant(sharp_scores);
}

/* Rows in another order, fewer of them, other threads: the same bits. */
static void same_bits_in_any_batch(kvl_cpu_variant variant, kvl_random *random)
{
    for (int round = 0; round < 6; round++) {
        world *w = make_world(random, 80, 1200);
        const size_t n = row_floats(w);
        machine whole = make_machine(variant, 1);
        machine other = make_machine(variant, 1 + kvl_test_below(random, 4));
        attend(&whole, w, w->rows, w->n_rows, w->queries, w->out);

        kvl_attention_row some[ROWS_MAX];
        uint32_t from[ROWS_MAX];
        float *queries = must_alloc(ROWS_MAX * n * sizeof(float));
        float *out = must_alloc(ROWS_MAX * n * sizeof(float));
        for (int draw = 0; draw < 6; draw++) {
            /* The first draws are single rows, the last is everything. */
            const uint32_t n_some = draw < 3    ? 1
                                    : draw == 5 ? w->n_rows
                                                : 1 + kvl_test_below(random, w->n_rows);
            for (uint32_t i = 0; i < n_some; i++) {
                from[i] = draw == 5 ? w->n_rows - 1 - i : kvl_test_below(random, w->n_rows);
                some[i] = w->rows[from[i]];
                memcpy(queries + i * n, w->queries + from[i] * n, n * sizeof(float));
            }
            attend(&other, w, some, n_some, queries, out);
            for (uint32_t i = 0; i < n_some; i++)
                assert_memory_equal(out + i * n, w->out + from[i] * n, n * sizeof(float));
        }
        kvl_free(queries);
        kvl_free(out);
        free_machine(&whole);
        free_machine(&other);
        free_world(w);
    }
}

static void test_same_bits_in_any_batch(void **state)
{
    (void)state;
    on_every_variant(same_bits_in_any_batch);
}

/* The same keys in pages of one's own instead of shared ones: the same bits. */
static void same_bits_unshared(kvl_cpu_variant variant, kvl_random *random)
{
    machine m = make_machine(variant, 2);
    world *w = make_world(random, 48, 500);
    attend(&m, w, w->rows, w->n_rows, w->queries, w->out);
    const size_t page_floats = kvl_pages_page_floats(&w->pages);
    float *out = must_alloc(w->n_rows * row_floats(w) * sizeof(float));

    uint32_t n_copies = 0;
    for (uint32_t p = 0; p < w->n_paths; p++)
        n_copies += (w->paths[p].n_tokens + KVL_PAGE_TOKENS - 1) / KVL_PAGE_TOKENS;
    kvl_pages apart = w->pages;
    apart.n_pages = n_copies;
    apart.memory = must_alloc(N_LAYERS * n_copies * page_floats * sizeof(float));
    uint32_t copy = 0;
    for (uint32_t p = 0; p < w->n_paths; p++) {
        for (uint32_t i = 0; i * KVL_PAGE_TOKENS < w->paths[p].n_tokens; i++, copy++) {
            memcpy(kvl_pages_keys(&apart, w->layer, copy, 0),
                   kvl_pages_keys(&w->pages, w->layer, w->page_ids[p][i], 0),
                   page_floats * sizeof(float));
            w->page_ids[p][i] = copy;
        }
    }
    kvl_free(w->pages.memory);
    w->pages = apart;
    attend(&m, w, w->rows, w->n_rows, w->queries, out);
    assert_memory_equal(out, w->out, w->n_rows * row_floats(w) * sizeof(float));
    kvl_free(out);
    free_world(w);
    free_machine(&m);
}

static void test_same_bits_unshared(void **state)
{
    (void)state;
    on_every_variant(same_bits_unshared);
}

/* Everything behind a row's position becomes NaN, in its last page too: nothing changes. Rows that
 * may see those keys are in the batch with it. */
static void the_future_does_not_matter(kvl_cpu_variant variant, kvl_random *random)
{
    machine m = make_machine(variant, 2);
    for (int round = 0; round < 6; round++) {
        world *w = make_world(random, 64, 800);
        const size_t n = row_floats(w);
        attend(&m, w, w->rows, w->n_rows, w->queries, w->out);
        const uint32_t r = kvl_test_below(random, w->n_rows);
        const kvl_attention_path *path = &w->paths[w->rows[r].path];
        const uint32_t past = (path->n_tokens + KVL_PAGE_TOKENS - 1) / KVL_PAGE_TOKENS;
        for (uint32_t t = w->rows[r].position + 1; t < past * KVL_PAGE_TOKENS; t++) {
            for (uint32_t h = 0; h < w->pages.n_kv_heads; h++) {
                const uint32_t page = path->pages[t / KVL_PAGE_TOKENS];
                const uint32_t at = t % KVL_PAGE_TOKENS;
                float *keys = kvl_pages_keys(&w->pages, w->layer, page, h);
                float *values = kvl_pages_values(&w->pages, w->layer, page, h);
                for (uint32_t d = 0; d < w->pages.head_dim; d++) {
                    keys[(size_t)d * KVL_PAGE_TOKENS + at] = NAN;
                    values[(size_t)at * w->pages.head_dim + d] = NAN;
                }
            }
        }
        float *out = must_alloc(w->n_rows * n * sizeof(float));
        attend(&m, w, w->rows, w->n_rows, w->queries, out);
        for (uint32_t i = 0; i < w->n_rows; i++) {
            if (w->rows[i].path == w->rows[r].path && w->rows[i].position <= w->rows[r].position)
                assert_memory_equal(out + i * n, w->out + i * n, n * sizeof(float));
        }
        kvl_free(out);
        free_world(w);
    }
    free_machine(&m);
}

static void test_the_future_does_not_matter(void **state)
{
    (void)state;
    on_every_variant(the_future_does_not_matter);
}

/* One long path. */
static world *make_long_world(kvl_random *random, uint32_t n_tokens, uint32_t n_rows)
{
    world *w = must_alloc(sizeof *w);
    make_shape(w, random, 64);
    w->n_paths = 1;
    for (uint32_t i = 0; i * KVL_PAGE_TOKENS < n_tokens; i++) w->page_ids[0][i] = w->n_pages_used++;
    w->paths[0] = (kvl_attention_path){w->page_ids[0], n_tokens};
    for (uint32_t i = 0; i < n_rows; i++)
        w->rows[w->n_rows++] = (kvl_attention_row){0, n_tokens - n_rows + i};
    fill_numbers(w, random);
    return w;
}

/* One row at a long context is split over threads between slices; without memory for partials it
 * is not. A prefill chunk holds the same row. All give the same bits. */
static void splitting_does_not_show(kvl_cpu_variant variant, kvl_random *random)
{
    world *w = make_long_world(random, 2100, 70);
    const size_t n = row_floats(w);
    machine chunk = make_machine(variant, 2);
    attend(&chunk, w, w->rows, w->n_rows, w->queries, w->out);
    check_against_reference(w, w->out);
    free_machine(&chunk);

    float *out = must_alloc(n * sizeof(float));
    for (size_t n_threads = 1; n_threads <= 4; n_threads++) {
        machine m = make_machine(variant, n_threads);
        kvl_error error;
        const uint32_t last = w->n_rows - 1;
        assert_int_equal(kvl_attention_plan_make(m.plan, &w->rows[last], 1, w->paths, 1, &error),
                         KVL_OK);
        kvl_alloc_fail_after(n_threads == 3 ? 0 : -1);
        kvl_attention_run(m.plan, m.backend, &w->pages, w->layer, w->n_heads, w->queries + last * n,
                          out);
        kvl_alloc_fail_after(-1);
        assert_memory_equal(out, w->out + last * n, n * sizeof(float));
        free_machine(&m);
    }
    kvl_free(out);
    free_world(w);
}

static void test_splitting_does_not_show(void **state)
{
    (void)state;
    on_every_variant(splitting_does_not_show);
}

/* pages_write puts a token where pages.h says; pages_read gives it back. */
static void pages_hold_what_was_written(kvl_cpu_variant variant, kvl_random *random)
{
    machine m = make_machine(variant, 2);
    world *w = make_long_world(random, 300, 1);
    const uint32_t n_rows = 150;
    const size_t n = (size_t)w->pages.n_kv_heads * w->pages.head_dim;
    float *numbers = must_alloc(4 * n_rows * n * sizeof(float));
    float *keys = numbers, *values = keys + n_rows * n;
    float *keys_read = values + n_rows * n, *values_read = keys_read + n_rows * n;
    kvl_test_fill_uniform(random, numbers, 2 * n_rows * n);
    uint32_t slots[150];
    for (uint32_t i = 0; i < n_rows; i++) slots[i] = 2 * i + kvl_test_below(random, 2);
    m.backend->ops->pages_write(m.backend, &w->pages, 1, n_rows, slots, keys, values);
    m.backend->ops->pages_read(m.backend, &w->pages, 1, n_rows, slots, keys_read, values_read);
    m.backend->ops->synchronize(m.backend);
    assert_memory_equal(keys_read, keys, n_rows * n * sizeof(float));
    assert_memory_equal(values_read, values, n_rows * n * sizeof(float));
    const uint32_t r = kvl_test_below(random, n_rows);
    const uint32_t h = kvl_test_below(random, w->pages.n_kv_heads);
    const uint32_t d = kvl_test_below(random, w->pages.head_dim);
    const uint32_t page = slots[r] / KVL_PAGE_TOKENS, at = slots[r] % KVL_PAGE_TOKENS;
    const size_t number = r * n + h * w->pages.head_dim + d;
    assert_true(kvl_pages_keys(&w->pages, 1, page, h)[d * KVL_PAGE_TOKENS + at] == keys[number]);
    assert_true(kvl_pages_values(&w->pages, 1, page, h)[at * w->pages.head_dim + d] ==
                values[number]);
    kvl_free(numbers);
    free_world(w);
    free_machine(&m);
}

static void test_pages_hold_what_was_written(void **state)
{
    (void)state;
    on_every_variant(pages_hold_what_was_written);
}

/* Empty partials, whatever their numbers are, change nothing wherever they stand; empty ones alone
 * give zeros, and no NaN comes of two infinities. */
static void empty_parts_do_not_count(kvl_cpu_variant variant, kvl_random *random)
{
    enum { N_PARTS = 5, HEAD_DIM = 48, STRIDE = HEAD_DIM + KVL_ATTEND_PARTIAL_EXTRA };
    kvl_cpu_kernels kernels;
    kvl_error error;
    assert_int_equal(kvl_cpu_kernels_choose(variant, &kernels, &error), KVL_OK);
    float parts[N_PARTS][STRIDE], dense[N_PARTS][STRIDE], state[STRIDE];
    float out[HEAD_DIM], expected[HEAD_DIM];
    for (uint32_t filled = 0; filled < 1u << N_PARTS; filled++) {
        uint32_t n = 0;
        for (uint32_t i = 0; i < N_PARTS; i++) {
            kvl_test_fill_normal(random, parts[i], HEAD_DIM);
            parts[i][HEAD_DIM] = 100.0F * kvl_random_uniform(random);
            parts[i][HEAD_DIM + 1] = 1.0F + kvl_random_uniform(random);
            if ((filled >> i & 1) != 0) {
                memcpy(dense[n++], parts[i], sizeof parts[i]);
            } else {
                for (uint32_t d = 0; d < HEAD_DIM; d++) parts[i][d] = NAN;
                parts[i][HEAD_DIM] = -INFINITY;
                parts[i][HEAD_DIM + 1] = 0.0F;
            }
        }
        kernels.attend->merge(HEAD_DIM, N_PARTS, parts[0], STRIDE, state, out);
        kernels.attend->merge(HEAD_DIM, n, dense[0], STRIDE, state, expected);
        assert_memory_equal(out, expected, sizeof out);
        for (uint32_t d = 0; n == 0 && d < HEAD_DIM; d++) assert_true(out[d] == 0.0F);
    }
}

static void test_empty_parts_do_not_count(void **state)
{
    (void)state;
    on_every_variant(empty_parts_do_not_count);
}

static void test_rows_that_are_nowhere_are_refused(void **state)
{
    (void)state;
    kvl_attention_plan *plan = NULL;
    kvl_error error;
    const uint32_t pages[] = {0, 1};
    const kvl_attention_path path = {pages, 20};
    assert_int_equal(kvl_attention_plan_create(&plan, &error), KVL_OK);
    const kvl_attention_row refused[] = {{1, 0}, {0, 20}, {0, UINT32_MAX}, {UINT32_MAX, 0}};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        const kvl_attention_row rows[] = {{0, 19}, refused[i]};
        assert_int_equal(kvl_attention_plan_make(plan, rows, 2, &path, 1, &error),
                         KVL_ERR_OUT_OF_RANGE);
        assert_non_null(strstr(error.text, "row 1"));
    }
    const kvl_attention_row row = {0, 19};
    assert_int_equal(kvl_attention_plan_make(plan, &row, 1, &path, 1, &error), KVL_OK);
    assert_int_equal(kvl_attention_plan_make(plan, NULL, 0, NULL, 0, &error), KVL_OK);
    kvl_attention_plan_destroy(plan);
    kvl_attention_plan_destroy(NULL);
}

/* Every allocation of a plan may fail; made again for no more work, it needs none. */
static void test_plan_allocations(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    world *w = make_world(&random, 16, 700);
    const int64_t live = kvl_alloc_live();
    kvl_error error;
    bool made = false;
    for (int64_t allowed = 0; !made; allowed++) {
        assert_true(allowed < 100);
        kvl_attention_plan *plan = NULL;
        kvl_alloc_fail_after(allowed);
        kvl_status status = kvl_attention_plan_create(&plan, &error);
        if (status == KVL_OK)
            status =
                kvl_attention_plan_make(plan, w->rows, w->n_rows, w->paths, w->n_paths, &error);
        kvl_alloc_fail_after(-1);
        made = status == KVL_OK;
        if (!made) assert_int_equal(status, KVL_ERR_NO_MEMORY);
        if (made) {
            kvl_alloc_fail_after(0);
            for (uint32_t n = w->n_rows; n > 0; n /= 2)
                assert_int_equal(
                    kvl_attention_plan_make(plan, w->rows, n, w->paths, w->n_paths, &error),
                    KVL_OK);
            kvl_alloc_fail_after(-1);
        }
        kvl_attention_plan_destroy(plan);
        assert_true(kvl_alloc_live() == live);
    }
    free_world(w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_near_reference),
        cmocka_unit_test(test_sharp_scores),
        cmocka_unit_test(test_same_bits_in_any_batch),
        cmocka_unit_test(test_same_bits_unshared),
        cmocka_unit_test(test_the_future_does_not_matter),
        cmocka_unit_test(test_splitting_does_not_show),
        cmocka_unit_test(test_pages_hold_what_was_written),
        cmocka_unit_test(test_empty_parts_do_not_count),
        cmocka_unit_test(test_rows_that_are_nowhere_are_refused),
        cmocka_unit_test(test_plan_allocations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
