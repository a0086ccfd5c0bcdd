/* cuda/plan: the works of a step are exactly the rows' keys, each once. The plan is carried out
 * here in double, work by work and merge by merge, as the device does, and compared with a naive
 * reference. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "attention_world.h"
#include "base/alloc.h"
#include "cuda/plan.h"

#include <math.h>

enum { WORLDS = 16, N_BLOCKS_MAX = 132 };

/* One query head of one row, as far as it has come. */
typedef struct state {
    double top;
    double sum;
    double out[128];
} state;

typedef struct runner {
    const world *w;
    const kvl_attend_call *call;
    const kvl_cuda_plan_view *view;
    state *partials; /* [n_slots][group] */
    float *out;      /* [n_rows][n_heads][head_dim] */
    uint32_t *seen;  /* results of a row and query head: must end as 1 */
} runner;

static void see_key(const runner *r, state *s, const uint16_t *query, const uint16_t *page,
                    uint32_t head, uint32_t token)
{
    const uint32_t dim = r->w->shape.head_dim;
    const size_t head_numbers = (size_t)KVL_PAGE_TOKENS * dim;
    const uint16_t *keys = page + head * head_numbers;
    const uint16_t *values = keys + r->w->shape.n_kv_heads * head_numbers;
    double score = 0;
    for (uint32_t d = 0; d < dim; d++)
        score += (double)world_float(query[d]) *
                 (double)world_float(keys[kvl_cuda_page_at(dim, token, d)]);
    score /= sqrt(dim);
    const double top = fmax(s->top, score);
    const double scale = exp(s->top - top);
    const double weight = exp(score - top);
    s->sum = s->sum * scale + weight;
    for (uint32_t d = 0; d < dim; d++)
        s->out[d] = s->out[d] * scale +
                    weight * (double)world_float(values[kvl_cuda_page_at(dim, token, d)]);
    s->top = top;
}

static void finish(const runner *r, const state *s, uint32_t place, uint32_t query_head)
{
    const uint32_t dim = r->w->shape.head_dim;
    const size_t at = (size_t)place * r->w->n_heads + query_head;
    for (uint32_t d = 0; d < dim; d++) r->out[at * dim + d] = (float)(s->out[d] / s->sum);
    r->seen[at]++;
}

typedef struct piece {
    uint32_t row_first, n_rows, head, n_pages, key_first;
    const uint32_t *slots;
    const uint32_t *pages;
    uint32_t mask_key; /* keys before it are not masked */
} piece;

static void run_piece(const runner *r, const piece *p)
{
    const uint32_t group = r->w->shape.group;
    for (uint32_t i = 0; i < p->n_rows * group; i++) {
        const uint32_t row = p->row_first + i / group;
        const uint32_t query_head = p->head * group + i % group;
        const uint16_t *query =
            r->w->queries +
            ((size_t)r->call->order[row] * r->w->n_heads + query_head) * r->w->shape.head_dim;
        state s = {.top = -INFINITY};
        for (uint32_t k = 0; k < p->n_pages * KVL_PAGE_TOKENS; k++) {
            const uint32_t key = p->key_first + k;
            const bool sees = key <= r->call->positions[row];
            if (key < p->mask_key) assert_true(sees);
            if (sees)
                see_key(r, &s, query,
                        r->w->kv + p->pages[k / KVL_PAGE_TOKENS] * world_page_numbers(r->w),
                        p->head, k % KVL_PAGE_TOKENS);
        }
        const uint32_t slot = p->slots[i / group];
        if (slot == KVL_CUDA_DIRECT) {
            finish(r, &s, r->call->order[row], query_head);
        } else {
            assert_true(slot < r->view->n_slots);
            r->partials[(size_t)slot * group + i % group] = s;
        }
    }
}

static void run_matrix(const runner *r)
{
    const uint32_t step_keys = KVL_CUDA_STEP_PAGES * KVL_PAGE_TOKENS;
    for (uint32_t i = 0; i < r->view->n_matrix; i++) {
        const kvl_cuda_matrix_work *m = &r->view->matrix[i];
        assert_in_range(m->n_rows * r->w->shape.group, 1, KVL_CUDA_MATRIX_ROWS);
        assert_true(m->page_first + m->n_pages <= r->view->n_page_ids);
        const piece p = {m->row_first,
                         m->n_rows,
                         m->head,
                         m->n_pages,
                         m->key_first,
                         r->view->slots + m->slot_first,
                         r->view->page_ids + m->page_first,
                         m->key_first + m->mask_step * step_keys};
        run_piece(r, &p);
    }
}

static void run_vectors(const runner *r)
{
    for (uint32_t i = 0; i < r->view->n_vectors; i++) {
        const kvl_cuda_vector_work *v = &r->view->vectors[i];
        assert_in_range(v->n_rows * r->w->shape.group, 1, KVL_CUDA_VECTOR_ROWS);
        assert_in_range(v->n_pages, 1, KVL_CUDA_VECTOR_PAGES);
        for (uint32_t k = 0; k < v->n_rows; k++) {
            assert_int_equal(v->places[k], r->call->order[v->row_first + k]);
            assert_int_equal(v->positions[k], r->call->positions[v->row_first + k]);
        }
        const piece p = {v->row_first, v->n_rows, v->head,  v->n_pages,
                         v->key_first, v->slots,  v->pages, 0};
        run_piece(r, &p);
    }
}

static void run_merges(const runner *r)
{
    const uint32_t group = r->w->shape.group;
    const uint32_t dim = r->w->shape.head_dim;
    for (uint32_t i = 0; i < r->view->n_merges; i++) {
        const kvl_cuda_merge *m = &r->view->merges[i];
        assert_in_range(m->n_slots, 2, r->view->n_parts_max);
        for (uint32_t g = 0; g < group; g++) {
            const state *parts = r->partials + (size_t)m->slot_first * group + g;
            state s = {.top = -INFINITY};
            for (uint32_t k = 0; k < m->n_slots; k++)
                s.top = fmax(s.top, parts[(size_t)k * group].top);
            for (uint32_t k = 0; k < m->n_slots; k++) {
                const state *part = &parts[(size_t)k * group];
                const double weight = exp(part->top - s.top);
                s.sum += weight * part->sum;
                for (uint32_t d = 0; d < dim; d++) s.out[d] += weight * part->out[d];
            }
            finish(r, &s, m->place, m->head * group + g);
        }
    }
}

static void check_blocks(const kvl_cuda_plan_view *view, uint32_t n_blocks)
{
    assert_int_equal(view->matrix_first[0], 0);
    assert_int_equal(view->vector_first[0], 0);
    for (uint32_t b = 0; b < n_blocks; b++) {
        assert_true(view->matrix_first[b] <= view->matrix_first[b + 1]);
        assert_true(view->vector_first[b] <= view->vector_first[b + 1]);
    }
    assert_int_equal(view->matrix_first[n_blocks], view->n_matrix);
    assert_int_equal(view->vector_first[n_blocks], view->n_vectors);
}

static void carry_out(world *w, const kvl_attend_call *call, const kvl_cuda_plan_view *view)
{
    const size_t n_heads = (size_t)w->n_rows * w->n_heads;
    const size_t n_partials = (size_t)view->n_slots * w->shape.group;
    runner r = {.w = w, .call = call, .view = view};
    r.partials = kvl_alloc_zero(n_partials + 1, sizeof *r.partials);
    r.out = kvl_alloc_zero(n_heads * w->shape.head_dim, sizeof *r.out);
    r.seen = kvl_alloc_zero(n_heads, sizeof *r.seen);
    assert_non_null(r.partials);
    assert_non_null(r.out);
    assert_non_null(r.seen);
    run_matrix(&r);
    run_vectors(&r);
    run_merges(&r);
    for (size_t i = 0; i < n_heads; i++) assert_int_equal(r.seen[i], 1);
    for (size_t i = 0; i < n_heads * w->shape.head_dim; i++)
        assert_true(fabs((double)r.out[i] - w->out[i]) <= 1e-6 * w->magnitude[i]);
    kvl_free(r.partials);
    kvl_free(r.out);
    kvl_free(r.seen);
}

static void test_every_key_of_a_row_is_in_one_work(void **unused)
{
    (void)unused;
    kvl_random random = kvl_test_random();
    kvl_error error;
    kvl_attention_plan *rows = NULL;
    kvl_cuda_plan *plan = NULL;
    assert_int_equal(kvl_attention_plan_create(&rows, &error), KVL_OK);
    assert_int_equal(kvl_cuda_plan_create(&plan, &error), KVL_OK);
    for (uint32_t i = 0; i < WORLDS; i++) {
        world_shape shape = world_random_shape(&random);
        if (shape.n_tokens_max > 400) shape.n_tokens_max = 400;
        world *w = world_create(&random, &shape);
        world_attend(w);
        const uint32_t n_blocks = 1 + kvl_test_below(&random, N_BLOCKS_MAX);
        const kvl_attend_call call = world_plan(w, rows);
        assert_int_equal(kvl_cuda_plan_make(plan, &call, shape.n_kv_heads, n_blocks, &error),
                         KVL_OK);
        const kvl_cuda_plan_view view = kvl_cuda_plan_look(plan);
        check_blocks(&view, n_blocks);
        carry_out(w, &call, &view);
        world_destroy(w);
    }
    kvl_cuda_plan_destroy(plan);
    kvl_attention_plan_destroy(rows);
}

/* Pages that the thread block with most of them reads, times blocks, over all pages. */
static double imbalance(const kvl_cuda_plan_view *view, uint32_t n_blocks)
{
    uint64_t most = 0;
    uint64_t total = 0;
    for (uint32_t b = 0; b < n_blocks; b++) {
        uint64_t pages = 0;
        for (uint32_t i = view->matrix_first[b]; i < view->matrix_first[b + 1]; i++)
            pages += view->matrix[i].n_pages;
        for (uint32_t i = view->vector_first[b]; i < view->vector_first[b + 1]; i++)
            pages += view->vectors[i].n_pages;
        if (pages > most) most = pages;
        total += pages;
    }
    return (double)most * n_blocks / (double)total;
}

static void test_a_shared_prefix_is_read_once_and_evenly(void **unused)
{
    (void)unused;
    enum { PREFIX_PAGES = 128, OWN_PAGES = 8, REQUESTS = 32, HEADS = 8, EACH = 136 };
    static uint32_t ids[REQUESTS][EACH];
    kvl_attention_path paths[REQUESTS];
    kvl_attention_row rows[REQUESTS];
    for (uint32_t r = 0; r < REQUESTS; r++) {
        for (uint32_t i = 0; i < EACH; i++)
            ids[r][i] = i < PREFIX_PAGES ? i : PREFIX_PAGES + r * OWN_PAGES + i - PREFIX_PAGES;
        paths[r] = (kvl_attention_path){ids[r], EACH * KVL_PAGE_TOKENS};
        rows[r] = (kvl_attention_row){r, EACH * KVL_PAGE_TOKENS - 1};
    }
    world w = {.shape = {.n_kv_heads = HEADS, .group = 4, .head_dim = 128, .n_paths = REQUESTS},
               .n_heads = HEADS * 4,
               .n_rows = REQUESTS,
               .paths = paths,
               .rows = rows};
    kvl_error error;
    kvl_attention_plan *of_rows = NULL;
    kvl_cuda_plan *plan = NULL;
    assert_int_equal(kvl_attention_plan_create(&of_rows, &error), KVL_OK);
    assert_int_equal(kvl_cuda_plan_create(&plan, &error), KVL_OK);
    const kvl_attend_call call = world_plan(&w, of_rows);
    assert_int_equal(kvl_cuda_plan_make(plan, &call, HEADS, N_BLOCKS_MAX, &error), KVL_OK);
    const kvl_cuda_plan_view view = kvl_cuda_plan_look(plan);
    uint64_t shared = 0;
    for (uint32_t i = 0; i < view.n_matrix; i++) shared += view.matrix[i].n_pages;
    assert_int_equal(shared, PREFIX_PAGES * HEADS);
    assert_true(imbalance(&view, N_BLOCKS_MAX) < 1.35);
    kvl_cuda_plan_destroy(plan);
    kvl_attention_plan_destroy(of_rows);
}

static void test_no_memory_is_reported_and_nothing_leaks(void **unused)
{
    (void)unused;
    kvl_random random = kvl_test_random();
    const world_shape shape = {2, 4, 64, 20, 300, 2, false};
    world *w = world_create(&random, &shape);
    kvl_error error;
    kvl_attention_plan *rows = NULL;
    assert_int_equal(kvl_attention_plan_create(&rows, &error), KVL_OK);
    const kvl_attend_call call = world_plan(w, rows);
    const int64_t live = kvl_alloc_live();
    kvl_status status = KVL_ERR_NO_MEMORY;
    for (int64_t n = 0; status != KVL_OK; n++) {
        kvl_cuda_plan *plan = NULL;
        kvl_alloc_fail_after(n);
        status = kvl_cuda_plan_create(&plan, &error);
        if (status == KVL_OK) status = kvl_cuda_plan_make(plan, &call, 2, 13, &error);
        kvl_alloc_fail_after(-1);
        assert_true(status == KVL_OK || status == KVL_ERR_NO_MEMORY);
        kvl_cuda_plan_destroy(plan);
        assert_int_equal(kvl_alloc_live(), live);
    }
    kvl_attention_plan_destroy(rows);
    world_destroy(w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_key_of_a_row_is_in_one_work),
        cmocka_unit_test(test_a_shared_prefix_is_read_once_and_evenly),
        cmocka_unit_test(test_no_memory_is_reported_and_nothing_leaks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
