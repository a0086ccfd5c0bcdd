/* cuda/backend: every operation of the table against the naive reference in double, with device
 * memory and, where the table allows it, with the host's.
 * Ends with 77 (skipped) where there is no device that the backend runs on. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "attention_world.h"
#include "base/alloc.h"
#include "compute/reference.h"

#include <cuda_runtime_api.h>
#include <math.h>

enum { SKIPPED = 77, ROUNDS = 12, N_POSITIONS = 300 };

static kvl_pool *pool;
static kvl_backend *backend;

static void *must_alloc(size_t n_bytes)
{
    void *memory = kvl_alloc_aligned(n_bytes + 1);
    assert_non_null(memory);
    return memory;
}

static float *normal(kvl_random *random, size_t n)
{
    float *numbers = must_alloc(n * sizeof *numbers);
    kvl_test_fill_normal(random, numbers, n);
    return numbers;
}

static float *to_device(const float *from, size_t n)
{
    float *to = backend->ops->memory_create(backend, n * sizeof *to);
    assert_non_null(to);
    backend->ops->synchronize(backend);
    assert_int_equal(cudaMemcpy(to, from, n * sizeof *to, cudaMemcpyHostToDevice), cudaSuccess);
    return to;
}

static float *to_host(const float *from, size_t n)
{
    float *to = must_alloc(n * sizeof *to);
    backend->ops->synchronize(backend);
    assert_int_equal(cudaMemcpy(to, from, n * sizeof *to, cudaMemcpyDeviceToHost), cudaSuccess);
    return to;
}

static void release(float *device)
{
    backend->ops->memory_destroy(backend, device);
}

/* --- products --- */

typedef struct product {
    kvl_matrix matrix;
    uint32_t n_rows;
    float *weights, *x, *bias, *before;
    double *wanted, *magnitude;
    bool accumulate;
} product;

static product random_product(kvl_random *random)
{
    product p = {.n_rows = 1 + kvl_test_below(random, 40),
                 .accumulate = kvl_test_below(random, 2) == 0};
    const uint32_t n_inputs = 8 * (1 + kvl_test_below(random, 40));
    const uint32_t n_outputs = 8 * (1 + kvl_test_below(random, 40));
    const size_t n = (size_t)p.n_rows * n_outputs;
    p.weights = normal(random, (size_t)n_inputs * n_outputs);
    p.x = normal(random, (size_t)p.n_rows * n_inputs);
    if (kvl_test_below(random, 2) == 0) p.bias = normal(random, n_outputs);
    p.before = normal(random, n);
    p.matrix =
        (kvl_matrix){p.weights, n_inputs * sizeof(float), n_outputs, n_inputs, KVL_DTYPE_F32};
    p.wanted = must_alloc(n * sizeof *p.wanted);
    p.magnitude = must_alloc(n * sizeof *p.magnitude);
    assert_int_equal(kvl_reference_matmul(&p.matrix, p.n_rows, p.x, p.bias, p.wanted, p.magnitude),
                     KVL_OK);
    for (size_t i = 0; p.accumulate && i < n; i++) p.wanted[i] += (double)p.before[i];
    return p;
}

static void free_product(product *p)
{
    kvl_free(p->weights);
    kvl_free(p->x);
    kvl_free(p->bias);
    kvl_free(p->before);
    kvl_free(p->wanted);
    kvl_free(p->magnitude);
}

/* Weights and rows are rounded to bf16: half a unit each, and the sums are float. */
static void check_product(const product *p, const float *y)
{
    for (size_t i = 0; i < (size_t)p->n_rows * p->matrix.n_outputs; i++) {
        const double allowed = p->magnitude[i] * (2.0 / 256 + 1e-4) + 1e-6 * fabs(p->wanted[i]);
        assert_true(fabs((double)y[i] - p->wanted[i]) <= allowed);
    }
}

static void test_products(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    product kept[ROUNDS]; /* weights must stay while the backend lives */
    for (uint32_t i = 0; i < ROUNDS; i++) {
        product *p = &kept[i];
        *p = random_product(&random);
        const size_t n = (size_t)p->n_rows * p->matrix.n_outputs;
        float *x = to_device(p->x, (size_t)p->n_rows * p->matrix.n_inputs);
        float *y = to_device(p->before, n);
        kvl_error error;
        assert_int_equal(backend->ops->weights_load(backend, &p->matrix, &error), KVL_OK);
        const kvl_matmul_job job = {&p->matrix, p->bias, y, p->accumulate};
        backend->ops->matmul(backend, &job, 1, p->n_rows, x);
        float *seen = to_host(y, n);
        check_product(p, seen);
        kvl_free(seen);
        /* Rows and results of the host. */
        const kvl_matmul_job at_home = {&p->matrix, p->bias, p->before, p->accumulate};
        backend->ops->matmul(backend, &at_home, 1, p->n_rows, p->x);
        check_product(p, p->before);
        release(x);
        release(y);
    }
    backend->ops->destroy(backend);
    kvl_error error;
    assert_int_equal(kvl_backend_cuda_create(pool, 0, &backend, &error), KVL_OK);
    for (uint32_t i = 0; i < ROUNDS; i++) free_product(&kept[i]);
}

static void test_products_of_one_call(void **state)
{
    (void)state;
    enum { JOBS = 3, ROWS = 17, INPUTS = 64, OUTPUTS = 48 };
    kvl_random random = kvl_test_random();
    static float weights[JOBS][OUTPUTS * INPUTS]; /* they stay while the backend lives */
    kvl_test_fill_normal(&random, weights[0], (size_t)JOBS * OUTPUTS * INPUTS);
    float *x = normal(&random, (size_t)ROWS * INPUTS);
    float *on_device = to_device(x, (size_t)ROWS * INPUTS);
    kvl_matrix matrices[JOBS];
    kvl_matmul_job jobs[JOBS];
    for (uint32_t i = 0; i < JOBS; i++) {
        /* The last has another shape. */
        matrices[i] = (kvl_matrix){weights[i], INPUTS * sizeof(float), i == 2 ? 24 : OUTPUTS,
                                   INPUTS, KVL_DTYPE_F32};
        jobs[i] =
            (kvl_matmul_job){&matrices[i], NULL, to_device(weights[i], ROWS * OUTPUTS), false};
    }
    backend->ops->matmul(backend, jobs, JOBS, ROWS, on_device);
    for (uint32_t i = 0; i < JOBS; i++) {
        product p = {.matrix = matrices[i], .n_rows = ROWS};
        const size_t n = (size_t)ROWS * matrices[i].n_outputs;
        p.wanted = must_alloc(n * sizeof *p.wanted);
        p.magnitude = must_alloc(n * sizeof *p.magnitude);
        assert_int_equal(kvl_reference_matmul(&matrices[i], ROWS, x, NULL, p.wanted, p.magnitude),
                         KVL_OK);
        float *seen = to_host(jobs[i].y, n);
        check_product(&p, seen);
        release(jobs[i].y);
        kvl_free(seen);
        kvl_free(p.wanted);
        kvl_free(p.magnitude);
    }
    release(on_device);
    kvl_free(x);
}

/* --- rows --- */

static void test_rows_are_normalised(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    const uint32_t widths[] = {1, 64, 576, 1000};
    static float weight[1000];
    kvl_test_fill_normal(&random, weight, 1000);
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        const uint32_t width = widths[i];
        const uint32_t n_rows = 1 + kvl_test_below(&random, 20);
        const size_t n = (size_t)n_rows * width;
        float *x = normal(&random, n);
        double *wanted = must_alloc(n * sizeof *wanted);
        kvl_reference_rms_norm(n_rows, width, x, weight + i, 1e-5, wanted);
        float *rows = to_device(x, n);
        backend->ops->rms_norm(backend, n_rows, width, rows, weight + i, 1e-5F, rows);
        float *seen = to_host(rows, n);
        for (size_t k = 0; k < n; k++)
            assert_true(fabs((double)seen[k] - wanted[k]) <= 1e-5 * fabs(wanted[k]) + 1e-7);
        release(rows);
        kvl_free(seen);
        kvl_free(wanted);
        kvl_free(x);
    }
}

static void check_rotated(const double *frequencies, const kvl_rotation *rotation, uint32_t n_rows,
                          uint32_t n_heads, uint32_t head_dim, const uint32_t *positions,
                          const float *before, const float *seen)
{
    double wanted[128];
    for (uint32_t i = 0; i < n_rows * n_heads; i++) {
        const float *head = before + (size_t)i * head_dim;
        kvl_reference_rotate(frequencies, rotation->rotary_dim, rotation->pairs,
                             positions[i / n_heads], false, head_dim, head, wanted);
        for (uint32_t d = 0; d < head_dim; d++)
            assert_true(fabs((double)seen[(size_t)i * head_dim + d] - wanted[d]) < 1e-5);
    }
}

static void test_rows_are_rotated(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    double frequencies[64];
    uint32_t positions[20];
    for (uint32_t i = 0; i < ROUNDS; i++) {
        const uint32_t head_dim = i % 2 == 0 ? 64 : 128;
        const uint32_t n_heads = 1 + kvl_test_below(&random, 9);
        const uint32_t n_rows = 1 + kvl_test_below(&random, 20);
        const uint32_t rotary_dim = i % 3 == 0 ? 48 : head_dim;
        for (uint32_t j = 0; j < rotary_dim / 2; j++)
            frequencies[j] = pow(10000 + i, -2.0 * j / rotary_dim);
        for (uint32_t r = 0; r < n_rows; r++) positions[r] = kvl_test_below(&random, N_POSITIONS);
        kvl_rotation *rotation = NULL;
        kvl_error error;
        assert_int_equal(kvl_rotation_create(frequencies, rotary_dim, N_POSITIONS,
                                             i % 4 < 2 ? KVL_PAIRS_HALVES : KVL_PAIRS_ADJACENT,
                                             &rotation, &error),
                         KVL_OK);
        const size_t n = (size_t)n_rows * n_heads * head_dim;
        float *before = normal(&random, n);
        float *rows = to_device(before, n);
        backend->ops->rotate(backend, rotation, n_rows, positions, n_heads, head_dim, rows);
        float *seen = to_host(rows, n);
        check_rotated(frequencies, rotation, n_rows, n_heads, head_dim, positions, before, seen);
        memcpy(seen, before, n * sizeof *seen);
        backend->ops->rotate(backend, rotation, n_rows, positions, n_heads, head_dim, seen);
        check_rotated(frequencies, rotation, n_rows, n_heads, head_dim, positions, before, seen);
        release(rows);
        kvl_free(seen);
        kvl_free(before);
        kvl_rotation_destroy(rotation);
    }
}

/* A product may take the rows that a norm has rounded, but never rows that changed since. */
static void test_products_see_rows_as_they_are(void **state)
{
    (void)state;
    enum { ROWS = 9, INPUTS = 64, OUTPUTS = 40 };
    kvl_random random = kvl_test_random();
    static float weights[OUTPUTS * INPUTS]; /* they stay while the backend lives */
    static float ones[INPUTS];
    static const uint32_t from[ROWS - 1] = {1, 2, 3, 4, 5, 6, 7, 8};
    kvl_test_fill_normal(&random, weights, (size_t)OUTPUTS * INPUTS);
    for (uint32_t i = 0; i < INPUTS; i++) ones[i] = 1;
    const kvl_matrix matrix = {weights, INPUTS * sizeof(float), OUTPUTS, INPUTS, KVL_DTYPE_F32};
    float *x = normal(&random, (size_t)ROWS * INPUTS);
    float *rows = to_device(x, (size_t)ROWS * INPUTS);
    float *y = to_device(x, (size_t)ROWS * OUTPUTS);
    const kvl_matmul_job job = {&matrix, NULL, y, false};
    for (uint32_t changes = 0; changes < 3; changes++) {
        const uint32_t n_rows = changes == 0 ? ROWS : ROWS - 1;
        backend->ops->rms_norm(backend, ROWS, INPUTS, rows, ones, 1e-5F, rows);
        if (changes == 2) backend->ops->matmul(backend, &job, 1, ROWS, rows);
        if (changes > 0) backend->ops->rows_keep(backend, ROWS - 1, INPUTS, from, rows);
        backend->ops->matmul(backend, &job, 1, n_rows, rows);
        product p = {.matrix = matrix, .n_rows = n_rows};
        p.wanted = must_alloc(ROWS * OUTPUTS * sizeof *p.wanted);
        p.magnitude = must_alloc(ROWS * OUTPUTS * sizeof *p.magnitude);
        float *now = to_host(rows, (size_t)ROWS * INPUTS);
        assert_int_equal(kvl_reference_matmul(&matrix, n_rows, now, NULL, p.wanted, p.magnitude),
                         KVL_OK);
        float *seen = to_host(y, (size_t)n_rows * OUTPUTS);
        check_product(&p, seen);
        kvl_free(seen);
        kvl_free(now);
        kvl_free(p.wanted);
        kvl_free(p.magnitude);
    }
    release(rows);
    release(y);
    kvl_free(x);
}

static void test_rows_are_gated(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    const size_t n = 5000 + kvl_test_below(&random, 500);
    float *gate = normal(&random, n);
    float *up = normal(&random, n);
    gate[0] = 100;
    gate[1] = -100;
    double *wanted = must_alloc(n * sizeof *wanted);
    kvl_reference_silu_multiply(n, gate, up, wanted);
    float *on_device[] = {to_device(gate, n), to_device(up, n)};
    backend->ops->silu_multiply(backend, n, on_device[0], on_device[1]);
    float *seen = to_host(on_device[0], n);
    for (size_t i = 0; i < n; i++)
        assert_true(fabs((double)seen[i] - wanted[i]) <= 1e-5 * fabs(wanted[i]) + 1e-7);
    release(on_device[0]);
    release(on_device[1]);
    kvl_free(seen);
    kvl_free(wanted);
    kvl_free(gate);
    kvl_free(up);
}

static void test_rows_are_kept_and_embedded(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    enum { N = 30, WIDTH = 96, KEPT = 4 };
    static const uint32_t from[KEPT] = {0, 5, 6, 29};
    static float table[N * WIDTH];
    kvl_test_fill_normal(&random, table, N * WIDTH);
    float *rows = to_device(table, N * WIDTH);
    backend->ops->rows_keep(backend, KEPT, WIDTH, from, rows);
    float *seen = to_host(rows, KEPT * WIDTH);
    const kvl_matrix matrix = {table, WIDTH * sizeof(float), N, WIDTH, KVL_DTYPE_F32};
    float *embedded = to_device(table, KEPT * WIDTH);
    backend->ops->embed(backend, &matrix, KEPT, from, embedded);
    float *rounded = to_host(embedded, KEPT * WIDTH);
    for (size_t i = 0; i < KEPT * WIDTH; i++) {
        const float wanted = table[from[i / WIDTH] * WIDTH + i % WIDTH];
        assert_true(memcmp(&seen[i], &wanted, sizeof wanted) == 0);
        assert_true(fabs((double)rounded[i] - (double)wanted) <= fabs((double)wanted) / 256);
    }
    release(rows);
    release(embedded);
    kvl_free(seen);
    kvl_free(rounded);
}

/* --- pages and attention --- */

static void test_pages_give_back_what_was_written(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    enum { N_PAGES = 6, N_ROWS = 40, LAYERS = 2 };
    for (uint32_t i = 0; i < ROUNDS; i++) {
        kvl_pages pages = {NULL, LAYERS, N_PAGES, 1 + kvl_test_below(&random, 4),
                           i % 2 == 0 ? 64 : 128};
        pages.memory = backend->ops->memory_create(
            backend, LAYERS * N_PAGES * kvl_pages_page_floats(&pages) * sizeof(float));
        assert_non_null(pages.memory);
        const size_t n = (size_t)N_ROWS * pages.n_kv_heads * pages.head_dim;
        uint32_t slots[N_ROWS];
        for (uint32_t r = 0; r < N_ROWS; r++) slots[r] = (r * 7 + i) % (N_PAGES * KVL_PAGE_TOKENS);
        float *keys = normal(&random, n);
        float *values = normal(&random, n);
        float *k = i % 3 == 0 ? keys : to_device(keys, n);
        float *v = i % 3 == 0 ? values : to_device(values, n);
        backend->ops->pages_write(backend, &pages, i % LAYERS, N_ROWS, slots, k, v);
        float *seen[] = {must_alloc(n * sizeof(float)), must_alloc(n * sizeof(float))};
        backend->ops->pages_read(backend, &pages, i % LAYERS, N_ROWS, slots, seen[0], seen[1]);
        for (size_t j = 0; j < n; j++) {
            assert_true(fabsf(seen[0][j] - keys[j]) <= fabsf(keys[j]) / 256);
            assert_true(fabsf(seen[1][j] - values[j]) <= fabsf(values[j]) / 256);
        }
        if (k != keys) release(k);
        if (v != values) release(v);
        release(pages.memory);
        kvl_free(seen[0]);
        kvl_free(seen[1]);
        kvl_free(keys);
        kvl_free(values);
    }
}

/* Keys and values of a world go through pages_write, so that both layouts are checked at once. */
static void fill_pages(const world *w, const kvl_pages *pages)
{
    const uint32_t heads = w->shape.n_kv_heads;
    const uint32_t dim = w->shape.head_dim;
    const size_t n = (size_t)KVL_PAGE_TOKENS * heads * dim;
    float *numbers = must_alloc(2 * n * sizeof *numbers);
    for (uint32_t page = 0; page < w->n_pages; page++) {
        uint32_t slots[KVL_PAGE_TOKENS];
        for (uint32_t t = 0; t < KVL_PAGE_TOKENS; t++) {
            slots[t] = page * KVL_PAGE_TOKENS + t;
            for (uint32_t h = 0; h < 2 * heads; h++)
                for (uint32_t d = 0; d < dim; d++)
                    numbers[h / heads * n + ((size_t)t * heads + h % heads) * dim + d] =
                        world_float(
                            w->kv[page * world_page_numbers(w) + (size_t)h * KVL_PAGE_TOKENS * dim +
                                  kvl_cuda_page_at(dim, t, d)]);
        }
        backend->ops->pages_write(backend, pages, 0, KVL_PAGE_TOKENS, slots, numbers, numbers + n);
    }
    kvl_free(numbers);
}

static void test_attention_through_the_table(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_error error;
    kvl_attention_plan *plan = NULL;
    assert_int_equal(kvl_attention_plan_create(&plan, &error), KVL_OK);
    for (uint32_t i = 0; i < ROUNDS; i++) {
        world_shape shape = world_random_shape(&random);
        if (shape.n_tokens_max > 300) shape.n_tokens_max = 300;
        world *w = world_create(&random, &shape);
        world_attend(w);
        kvl_pages pages = {NULL, 1, w->n_pages, shape.n_kv_heads, shape.head_dim};
        pages.memory = backend->ops->memory_create(
            backend, w->n_pages * kvl_pages_page_floats(&pages) * sizeof(float));
        fill_pages(w, &pages);
        const size_t n = (size_t)w->n_rows * w->n_heads * shape.head_dim;
        float *queries = must_alloc(n * sizeof *queries);
        for (size_t k = 0; k < n; k++) queries[k] = world_float(w->queries[k]);
        float *on_device[] = {to_device(queries, n), to_device(queries, n)};
        assert_int_equal(
            kvl_attention_plan_make(plan, w->rows, w->n_rows, w->paths, shape.n_paths, &error),
            KVL_OK);
        for (uint32_t again = 0; again < 2; again++)
            kvl_attention_run(plan, backend, &pages, 0, w->n_heads, on_device[0], on_device[1]);
        float *out = to_host(on_device[1], n);
        assert_true(world_error(w, out, false) <= 1);
        release(on_device[0]);
        release(on_device[1]);
        release(pages.memory);
        kvl_free(out);
        kvl_free(queries);
        world_destroy(w);
    }
    kvl_attention_plan_destroy(plan);
}

/* Scores and weights of one query head of one row in double, added to mass [n_keys]. */
static void add_weights(const float *query, const float *keys, uint32_t n_seen, uint32_t stride,
                        uint32_t dim, double *mass)
{
    double *scores = must_alloc(n_seen * sizeof *scores);
    double top = -INFINITY;
    double sum = 0;
    for (uint32_t k = 0; k < n_seen; k++) {
        scores[k] = 0;
        for (uint32_t d = 0; d < dim; d++)
            scores[k] += (double)query[d] * (double)keys[(size_t)k * stride + d] / sqrt(dim);
        top = fmax(top, scores[k]);
    }
    for (uint32_t k = 0; k < n_seen; k++) sum += exp(scores[k] - top);
    for (uint32_t k = 0; k < n_seen; k++) mass[k] += exp(scores[k] - top) / sum;
    kvl_free(scores);
}

static void test_attention_is_summed_for_each_key(void **state)
{
    (void)state;
    enum { KEYS = 330, ROWS = 7, KV_HEADS = 2, GROUP = 3, DIM = 64, PAGES = 25 };
    kvl_random random = kvl_test_random();
    kvl_pages pages = {NULL, 1, PAGES, KV_HEADS, DIM};
    pages.memory =
        backend->ops->memory_create(backend, PAGES * kvl_pages_page_floats(&pages) * sizeof(float));
    const size_t n = (size_t)KEYS * KV_HEADS * DIM;
    float *keys = normal(&random, n);
    for (size_t i = 0; i < n; i++) keys[i] = world_float(world_bf16(keys[i]));
    uint32_t slots[KEYS];
    uint32_t page_ids[KEYS / KVL_PAGE_TOKENS + 1];
    for (uint32_t i = 0; i < sizeof page_ids / sizeof *page_ids; i++) page_ids[i] = i * 7 % PAGES;
    for (uint32_t k = 0; k < KEYS; k++)
        slots[k] = page_ids[k / KVL_PAGE_TOKENS] * KVL_PAGE_TOKENS + k % KVL_PAGE_TOKENS;
    backend->ops->pages_write(backend, &pages, 0, KEYS, slots, keys, keys);
    static const uint32_t positions[ROWS] = {0, 5, 100, 255, 256, 329, 1000};
    float *queries = normal(&random, (size_t)ROWS * KV_HEADS * GROUP * DIM);
    static float mass[KV_HEADS * KEYS];
    static double wanted[KV_HEADS * KEYS];
    for (uint32_t i = 0; i < KV_HEADS * KEYS; i++) wanted[i] = (double)(mass[i] = 0.25F);
    const kvl_attend_mass_call call = {&pages,  0,         KV_HEADS * GROUP, ROWS,
                                       queries, positions, page_ids,         KEYS};
    backend->ops->attend_mass(backend, &call, mass);
    for (uint32_t i = 0; i < ROWS * KV_HEADS * GROUP; i++) {
        const uint32_t row = i / (KV_HEADS * GROUP);
        const uint32_t kv_head = i % (KV_HEADS * GROUP) / GROUP;
        const uint32_t n_seen = positions[row] < KEYS ? positions[row] + 1 : KEYS;
        add_weights(queries + (size_t)i * DIM, keys + kv_head * DIM, n_seen, KV_HEADS * DIM, DIM,
                    wanted + kv_head * KEYS);
    }
    for (uint32_t i = 0; i < KV_HEADS * KEYS; i++)
        assert_true(fabs((double)mass[i] - wanted[i]) <= 1e-5 * (1 + wanted[i]));
    release(pages.memory);
    kvl_free(queries);
    kvl_free(keys);
}

static void test_devices_that_are_not_there_are_refused(void **state)
{
    (void)state;
    kvl_error error;
    kvl_backend *other = NULL;
    assert_int_equal(kvl_backend_create(pool, "cuda:63", KVL_CPU_BEST, &other, &error),
                     KVL_ERR_UNSUPPORTED);
    assert_non_null(strstr(error.text, "63"));
    assert_null(other);
}

int main(void)
{
    kvl_error error;
    if (kvl_pool_create(2, false, &pool, &error) != KVL_OK) return 1;
    const kvl_status status = kvl_backend_cuda_create(pool, 0, &backend, &error);
    if (status != KVL_OK) {
        (void)fprintf(stderr, "skipped: %s\n", error.text);
        kvl_pool_destroy(pool);
        return status == KVL_ERR_UNSUPPORTED ? SKIPPED : 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_products_of_one_call),
        cmocka_unit_test(test_rows_are_normalised),
        cmocka_unit_test(test_rows_are_rotated),
        cmocka_unit_test(test_rows_are_gated),
        cmocka_unit_test(test_products_see_rows_as_they_are),
        cmocka_unit_test(test_rows_are_kept_and_embedded),
        cmocka_unit_test(test_pages_give_back_what_was_written),
        cmocka_unit_test(test_attention_through_the_table),
        cmocka_unit_test(test_attention_is_summed_for_each_key),
        cmocka_unit_test(test_devices_that_are_not_there_are_refused),
    };
    const int n_failed = cmocka_run_group_tests(tests, NULL, NULL);
    backend->ops->destroy(backend);
    kvl_pool_destroy(pool);
    return n_failed;
}
