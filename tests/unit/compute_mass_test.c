/* compute: how much attention rows give each key, on every variant that runs here, against a plain
 * softmax in double. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "compute/backend.h"
#include "test_random.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum { ROUNDS = 40, KEYS_MAX = 700, ROWS_MAX = 9, PAGES_MAX = KEYS_MAX / KVL_PAGE_TOKENS + 3 };

typedef struct world {
    kvl_pages pages;
    uint32_t page_ids[PAGES_MAX];
    uint32_t positions[ROWS_MAX];
    float *queries;
    kvl_attend_mass_call call;
    float *mass;
    size_t n_mass;
} world;

static void make(world *w, kvl_random *random)
{
    static const uint32_t dims[] = {16, 64, 80, 128};
    const uint32_t n_kv_heads = 1 + kvl_test_below(random, 3);
    const uint32_t n_heads = n_kv_heads * (1 + kvl_test_below(random, 7));
    const uint32_t n_keys = 1 + kvl_test_below(random, KEYS_MAX);
    const uint32_t n_rows = 1 + kvl_test_below(random, ROWS_MAX);
    w->pages = (kvl_pages){.n_layers = 2,
                           .n_pages = PAGES_MAX,
                           .n_kv_heads = n_kv_heads,
                           .head_dim = dims[kvl_test_below(random, 4)]};
    const size_t n_floats = 2 * PAGES_MAX * kvl_pages_page_floats(&w->pages);
    w->pages.memory = kvl_alloc_aligned(n_floats * sizeof(float));
    const size_t n_queries = (size_t)n_rows * n_heads * w->pages.head_dim;
    w->queries = kvl_alloc_aligned(n_queries * sizeof(float));
    w->n_mass = (size_t)n_kv_heads * n_keys;
    w->mass = kvl_alloc_zero(w->n_mass, sizeof(float));
    assert_non_null(w->pages.memory);
    assert_non_null(w->queries);
    assert_non_null(w->mass);
    kvl_test_fill_normal(random, w->pages.memory, n_floats);
    kvl_test_fill_normal(random, w->queries, n_queries);
    for (uint32_t i = 0; i < PAGES_MAX; i++) {
        const uint32_t at = kvl_test_below(random, i + 1);
        w->page_ids[i] = w->page_ids[at];
        w->page_ids[at] = i;
    }
    for (uint32_t r = 0; r < n_rows; r++) w->positions[r] = kvl_test_below(random, n_keys + 20);
    w->call = (kvl_attend_mass_call){.pages = &w->pages,
                                     .layer = 1,
                                     .n_heads = n_heads,
                                     .n_rows = n_rows,
                                     .queries = w->queries,
                                     .positions = w->positions,
                                     .page_ids = w->page_ids,
                                     .n_keys = n_keys};
}

static void end(world *w)
{
    kvl_free(w->pages.memory);
    kvl_free(w->queries);
    kvl_free(w->mass);
}

static double score(const world *w, uint32_t row, uint32_t head, uint32_t key)
{
    const uint32_t dim = w->pages.head_dim;
    const uint32_t kv_head = head / (w->call.n_heads / w->pages.n_kv_heads);
    const float *keys = kvl_pages_keys(&w->pages, 1, w->page_ids[key / KVL_PAGE_TOKENS], kv_head);
    const float *query = w->queries + ((size_t)row * w->call.n_heads + head) * dim;
    double sum = 0.0;
    for (uint32_t d = 0; d < dim; d++)
        sum += (double)query[d] * (double)keys[(size_t)d * KVL_PAGE_TOKENS + key % KVL_PAGE_TOKENS];
    return sum / sqrt((double)dim);
}

/* wanted [n_keys] += the weights of one head of one row. */
static void add_row(const world *w, uint32_t row, uint32_t head, double *wanted)
{
    double scores[KEYS_MAX];
    double top = -INFINITY, sum = 0.0;
    uint32_t n = w->positions[row] + 1;
    if (n > w->call.n_keys) n = w->call.n_keys;
    for (uint32_t k = 0; k < n; k++) {
        scores[k] = score(w, row, head, k);
        top = fmax(top, scores[k]);
    }
    for (uint32_t k = 0; k < n; k++) sum += exp(scores[k] - top);
    for (uint32_t k = 0; k < n; k++) wanted[k] += exp(scores[k] - top) / sum;
}

static void check(const world *w)
{
    const uint32_t group = w->call.n_heads / w->pages.n_kv_heads;
    for (uint32_t h = 0; h < w->pages.n_kv_heads; h++) {
        double wanted[KEYS_MAX] = {0};
        for (uint32_t r = 0; r < w->call.n_rows; r++)
            for (uint32_t g = 0; g < group; g++) add_row(w, r, h * group + g, wanted);
        for (uint32_t k = 0; k < w->call.n_keys; k++) {
            const double got = (double)w->mass[(size_t)h * w->call.n_keys + k];
            /* A score of size 10 is off by head_dim roundings of its terms, and moves its weight in
             * proportion; each of rows * group weights is rounded once more. */
            const double bound = 1e-6 + wanted[k] * FLT_EPSILON *
                                            (10.0 * w->pages.head_dim + w->call.n_rows * group);
            if (!(fabs(got - wanted[k]) <= bound))
                fail_msg("head %u key %u: %g, wanted %g", h, k, got, wanted[k]);
        }
    }
}

static void test_weights_are_softmax(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_pool *pool = NULL;
    assert_int_equal(kvl_pool_create(2, false, &pool, NULL), KVL_OK);
    for (int round = 0; round < ROUNDS; round++) {
        world w;
        make(&w, &random);
        for (kvl_cpu_variant v = KVL_CPU_PORTABLE; v <= KVL_CPU_AVX512; v++) {
            if (!kvl_cpu_variant_runs(v)) continue;
            kvl_backend *backend = NULL;
            assert_int_equal(kvl_backend_cpu_create(pool, v, &backend, NULL), KVL_OK);
            memset(w.mass, 0, w.n_mass * sizeof *w.mass);
            backend->ops->attend_mass(backend, &w.call, w.mass);
            check(&w);
            backend->ops->destroy(backend);
        }
        end(&w);
    }
    kvl_pool_destroy(pool);
}

/* Adds to what is there, and a row far behind the keys sees all of them. */
static void test_sums_add_up(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_pool *pool = NULL;
    assert_int_equal(kvl_pool_create(1, false, &pool, NULL), KVL_OK);
    kvl_backend *backend = NULL;
    assert_int_equal(kvl_backend_cpu_create(pool, KVL_CPU_BEST, &backend, NULL), KVL_OK);
    for (int round = 0; round < ROUNDS; round++) {
        world w;
        make(&w, &random);
        for (int times = 1; times <= 3; times++) {
            backend->ops->attend_mass(backend, &w.call, w.mass);
            double sum = 0.0;
            for (size_t i = 0; i < w.n_mass; i++) sum += (double)w.mass[i];
            const double wanted = (double)times * w.call.n_rows * w.call.n_heads;
            assert_true(fabs(sum - wanted) <= 1e-4 * wanted);
        }
        end(&w);
    }
    backend->ops->destroy(backend);
    kvl_pool_destroy(pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_weights_are_softmax),
        cmocka_unit_test(test_sums_add_up),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
