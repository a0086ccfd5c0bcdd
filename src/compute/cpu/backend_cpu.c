/* compute/cpu/backend_cpu.c: the CPU backend: its table of operations, its memory, and the
 * operations that are only a loop over rows. */
#include "compute/cpu/backend_cpu.h"

#include "base/alloc.h"
#include "compute/cpu/attend.h"
#include "compute/cpu/matmul.h"

#include <string.h>

/* Below about two microseconds of work a loop is not worth sharing out. */
enum { ITEM_ROWS = 8, ALONE_ROWS = 4, ITEM_FLOATS = 4096 };

static void *memory_create(kvl_backend *backend, size_t n_bytes)
{
    (void)backend;
    void *memory = kvl_alloc_aligned(n_bytes);
    /* First touch costs more than any later use: it happens here and not in a request. */
    if (memory != NULL) memset(memory, 0, n_bytes);
    return memory;
}

static void memory_destroy(kvl_backend *backend, void *memory)
{
    (void)backend;
    kvl_free(memory);
}

/* ---- rows ---- */

typedef struct row_range {
    uint32_t first;
    uint32_t n;
} row_range;

static row_range rows_of(size_t item, uint32_t item_rows, uint32_t n_rows)
{
    const uint32_t first = (uint32_t)item * item_rows;
    return (row_range){first, n_rows - first < item_rows ? n_rows - first : item_rows};
}

/* A call with few rows is one item, which the pool runs on the calling thread. */
static void run_rows(kvl_backend *backend, kvl_pool_task *task, void *call, uint32_t n_rows)
{
    if (n_rows <= ALONE_ROWS) {
        for (uint32_t item = 0; item * ITEM_ROWS < n_rows; item++) task(call, item, 0);
        return;
    }
    kvl_pool_run(backend->pool, task, call, (n_rows + ITEM_ROWS - 1) / ITEM_ROWS);
}

typedef struct norm_call {
    const kvl_cpu_vector_kernels *kernels;
    uint32_t n_rows;
    uint32_t width;
    const float *x;
    const float *weight;
    float epsilon;
    float *y;
} norm_call;

static void norm_item(void *context, size_t item, size_t thread)
{
    (void)thread;
    const norm_call *call = context;
    const row_range rows = rows_of(item, ITEM_ROWS, call->n_rows);
    for (uint32_t r = rows.first; r < rows.first + rows.n; r++) {
        const size_t at = (size_t)r * call->width;
        call->kernels->rms_norm(call->width, call->x + at, call->weight, call->epsilon,
                                call->y + at);
    }
}

static void rms_norm(kvl_backend *backend, uint32_t n_rows, uint32_t width, const float *x,
                     const float *weight, float epsilon, float *y)
{
    norm_call call = {
        kvl_backend_cpu_of(backend)->kernels.vector, n_rows, width, x, weight, epsilon, y};
    run_rows(backend, norm_item, &call, n_rows);
}

typedef struct rotate_call {
    const kvl_rotation *rotation;
    uint32_t n_rows;
    const uint32_t *positions;
    uint32_t n_heads;
    uint32_t head_dim;
    float *rows;
} rotate_call;

static void rotate_item(void *context, size_t item, size_t thread)
{
    (void)thread;
    const rotate_call *call = context;
    const row_range rows = rows_of(item, ITEM_ROWS, call->n_rows);
    const size_t stride = (size_t)call->n_heads * call->head_dim;
    kvl_rotate_rows(call->rotation, rows.n, call->positions + rows.first, call->n_heads,
                    call->head_dim, stride, false, call->rows + rows.first * stride);
}

static void rotate(kvl_backend *backend, const kvl_rotation *rotation, uint32_t n_rows,
                   const uint32_t *positions, uint32_t n_heads, uint32_t head_dim, float *rows)
{
    rotate_call call = {rotation, n_rows, positions, n_heads, head_dim, rows};
    run_rows(backend, rotate_item, &call, n_rows);
}

typedef struct gate_call {
    const kvl_cpu_vector_kernels *kernels;
    size_t n;
    float *gate;
    const float *up;
} gate_call;

static void gate_item(void *context, size_t item, size_t thread)
{
    (void)thread;
    const gate_call *call = context;
    const size_t first = item * ITEM_FLOATS;
    const size_t n = call->n - first < ITEM_FLOATS ? call->n - first : ITEM_FLOATS;
    call->kernels->silu_multiply(n, call->gate + first, call->up + first);
}

static void silu_multiply(kvl_backend *backend, size_t n, float *gate, const float *up)
{
    gate_call call = {kvl_backend_cpu_of(backend)->kernels.vector, n, gate, up};
    kvl_pool_run(backend->pool, gate_item, &call, (n + ITEM_FLOATS - 1) / ITEM_FLOATS);
}

static void synchronize(kvl_backend *backend)
{
    (void)backend; /* operations are done when they return */
}

/* ---- life ---- */

static void destroy(kvl_backend *backend)
{
    if (backend == NULL) return;
    kvl_backend_cpu *cpu = kvl_backend_cpu_of(backend);
    kvl_free(cpu->attend_memory);
    kvl_free(cpu->scratch);
    kvl_free(cpu);
}

/* Weights are used where they lie. */
static kvl_status weights_load(kvl_backend *backend, const kvl_matrix *weights, kvl_error *error)
{
    (void)backend;
    (void)weights;
    (void)error;
    return KVL_OK;
}

static void rows_keep(kvl_backend *backend, uint32_t n_rows, uint32_t width, const uint32_t *from,
                      float *rows)
{
    (void)backend;
    for (size_t i = 0; i < n_rows; i++) {
        if (from[i] != i)
            memmove(rows + i * width, rows + (size_t)from[i] * width, width * sizeof(float));
    }
}

static const kvl_backend_ops cpu_ops = {
    .name = "cpu",
    .memory_create = memory_create,
    .memory_destroy = memory_destroy,
    .weights_load = weights_load,
    .rows_keep = rows_keep,
    .matmul = kvl_cpu_matmul,
    .rms_norm = rms_norm,
    .rotate = rotate,
    .silu_multiply = silu_multiply,
    .embed = kvl_cpu_embed,
    .pages_write = kvl_cpu_pages_write,
    .pages_read = kvl_cpu_pages_read,
    .attend = kvl_cpu_attend,
    .attend_mass = kvl_cpu_attend_mass,
    .synchronize = synchronize,
    .destroy = destroy,
};

kvl_status kvl_backend_cpu_create(kvl_pool *pool, kvl_cpu_variant variant, kvl_backend **backend,
                                  kvl_error *error)
{
    *backend = NULL;
    kvl_cpu_kernels kernels;
    KVL_TRY(kvl_cpu_kernels_choose(variant, &kernels, error));
    kvl_backend_cpu *cpu = kvl_alloc_zero(1, sizeof *cpu);
    if (cpu == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the CPU backend");
    cpu->base.ops = &cpu_ops;
    cpu->base.pool = pool;
    cpu->kernels = kernels;
    cpu->n_threads = kvl_pool_n_threads(pool);
    const size_t scratch_bytes = cpu->n_threads * KVL_CPU_SCRATCH_FLOATS * sizeof(float);
    cpu->scratch = memory_create(&cpu->base, scratch_bytes);
    if (cpu->scratch == NULL) {
        const size_t n_threads = cpu->n_threads;
        destroy(&cpu->base);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY,
                        "no memory for %zu MiB of scratch: give fewer threads than %zu",
                        scratch_bytes >> 20, n_threads);
    }
    *backend = &cpu->base;
    return KVL_OK;
}
