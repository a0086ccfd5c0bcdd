/* cuda/backend.c: the table of operations of compute/backend.h on a CUDA device.
 *
 * One stream takes everything in order; the host waits only where it is given numbers. Weights are
 * bf16, sums and activations float, pages bf16 (cuda/work.h). A failing driver call ends the
 * process: operations have no way to fail, and a device that fails one will fail all that follow. */
#include "cuda/backend.h"

#include "base/alloc.h"
#include "base/log.h"
#include "cuda/attention.h"
#include "cuda/operations.h"
#include "cuda/residents.h"

#include <cublas_v2.h>
#include <stdlib.h>
#include <string.h>

enum { STEPS = 2, REGIONS_MAX = 64, BLAS_BYTES = 32 << 20 };

/* Rows of the host on their way, or room for a result. */
typedef enum room { ROOM_INPUT, ROOM_OUTPUT, ROOM_OTHER, ROOM_ROUNDED, ROOMS } room;

typedef struct region {
    char *first;
    size_t n_bytes;
} region;

/* A plan of attention that the device has. */
typedef struct step {
    kvl_cuda_step *step;
    uint64_t serial;
} step;

typedef struct cuda_backend {
    kvl_backend base; /* first, so that a kvl_backend of ours can be cast */
    kvl_backend *host;
    cudaStream_t stream;
    cublasHandle_t blas;
    void *blas_memory;
    kvl_cuda_residents *residents;
    region regions[REGIONS_MAX]; /* of memory_create */
    uint32_t n_regions;
    region rooms[ROOMS];
    /* ROOM_ROUNDED holds these rows as bf16, until an operation may have changed them. */
    const float *twin; /* NULL: nothing */
    size_t n_twin;
    step steps[STEPS]; /* the latest first */
    int number;
} cuda_backend;

static _Noreturn void end(const char *text)
{
    kvl_log(KVL_LOG_ERROR, "cuda_failed", "text=\"%s\"", text);
    abort();
}

static void must(kvl_status status, const kvl_error *error)
{
    if (status != KVL_OK) end(error->text);
}

static void must_run(cudaError_t result, const char *what)
{
    kvl_error error;
    must(kvl_cuda_check(result, what, &error), &error);
}

/* Which device is meant belongs to a thread, and the engine's is not the one that made us. */
static cuda_backend *cuda_of(kvl_backend *backend)
{
    cuda_backend *cuda = (cuda_backend *)(void *)backend;
    must_run(cudaSetDevice(cuda->number), "choosing the CUDA device");
    return cuda;
}

/* As cuda_of, for operations that write rows. */
static cuda_backend *cuda_to_write(kvl_backend *backend)
{
    cuda_backend *cuda = cuda_of(backend);
    cuda->twin = NULL;
    return cuda;
}

static bool is_device(const cuda_backend *cuda, const void *memory)
{
    for (uint32_t i = 0; i < cuda->n_regions; i++) {
        const region *r = &cuda->regions[i];
        if ((const char *)memory >= r->first && (const char *)memory < r->first + r->n_bytes)
            return true;
    }
    return false;
}

/* --- memory --- */

static void *memory_create(kvl_backend *backend, size_t n_bytes)
{
    cuda_backend *cuda = cuda_to_write(backend);
    void *memory = NULL;
    if (cuda->n_regions == REGIONS_MAX) return NULL;
    if (cudaMalloc(&memory, n_bytes) != cudaSuccess) {
        (void)cudaGetLastError(); /* told by NULL: later calls shall not see it again */
        return NULL;
    }
    must_run(cudaMemsetAsync(memory, 0, n_bytes, cuda->stream), "clearing CUDA memory");
    cuda->regions[cuda->n_regions++] = (region){memory, n_bytes};
    return memory;
}

static void memory_destroy(kvl_backend *backend, void *memory)
{
    if (memory == NULL) return;
    cuda_backend *cuda = cuda_to_write(backend);
    for (uint32_t i = 0; i < cuda->n_regions; i++) {
        if (cuda->regions[i].first != memory) continue;
        cuda->regions[i] = cuda->regions[--cuda->n_regions];
        break;
    }
    must_run(cudaFree(memory), "freeing CUDA memory");
}

/* Device memory of at least n_bytes, good until the room is asked for again. */
static void *room_of(cuda_backend *cuda, room which, size_t n_bytes)
{
    region *r = &cuda->rooms[which];
    if (n_bytes > r->n_bytes) {
        must_run(cudaFree(r->first), "freeing CUDA memory");
        void *memory = NULL;
        must_run(cudaMalloc(&memory, n_bytes + n_bytes / 2), "CUDA memory for activations");
        *r = (region){memory, n_bytes + n_bytes / 2};
    }
    return r->first;
}

/* The device's own memory as it is; the host's is brought. */
static const float *bring(cuda_backend *cuda, room which, const float *rows, size_t n)
{
    if (is_device(cuda, rows)) return rows;
    float *to = room_of(cuda, which, n * sizeof(float));
    must_run(cudaMemcpyAsync(to, rows, n * sizeof(float), cudaMemcpyHostToDevice, cuda->stream),
             "sending rows");
    return to;
}

/* Where a result is made: the caller's memory, or room from which `hand_over` takes it. */
static float *target(cuda_backend *cuda, room which, float *rows, size_t n)
{
    return is_device(cuda, rows) ? rows : room_of(cuda, which, n * sizeof(float));
}

static void hand_over(cuda_backend *cuda, float *rows, const float *made, size_t n)
{
    if (rows == made) return;
    must_run(cudaMemcpyAsync(rows, made, n * sizeof(float), cudaMemcpyDeviceToHost, cuda->stream),
             "fetching rows");
    must_run(cudaStreamSynchronize(cuda->stream), "fetching rows");
}

static const uint32_t *bring_indices(cuda_backend *cuda, const uint32_t *indices, uint32_t n)
{
    const uint32_t *device = NULL;
    kvl_error error;
    must(kvl_cuda_resident_indices(cuda->residents, indices, n, &device, &error), &error);
    return device;
}

static const float *bring_floats(cuda_backend *cuda, const float *numbers, size_t n)
{
    const float *device = NULL;
    kvl_error error;
    must(kvl_cuda_resident_floats(cuda->residents, numbers, n, &device, &error), &error);
    return device;
}

static const void *bring_matrix(cuda_backend *cuda, const kvl_matrix *matrix)
{
    const void *device = NULL;
    kvl_error error;
    must(kvl_cuda_resident_matrix(cuda->residents, matrix, &device, &error), &error);
    return device;
}

static kvl_status weights_load(kvl_backend *backend, const kvl_matrix *weights, kvl_error *error)
{
    cuda_backend *cuda = cuda_of(backend);
    const void *device = NULL;
    return kvl_cuda_resident_matrix(cuda->residents, weights, &device, error);
}

/* --- operations --- */

static void rows_keep(kvl_backend *backend, uint32_t n_rows, uint32_t width, const uint32_t *from,
                      float *rows)
{
    cuda_backend *cuda = cuda_to_write(backend);
    const size_t n_bytes = (size_t)n_rows * width * sizeof(float);
    float *kept = room_of(cuda, ROOM_OTHER, n_bytes);
    must_run(kvl_cuda_gather_rows(n_rows, width, bring_indices(cuda, from, n_rows), rows, kept,
                                  cuda->stream),
             "keeping rows");
    must_run(cudaMemcpyAsync(rows, kept, n_bytes, cudaMemcpyDeviceToDevice, cuda->stream),
             "keeping rows");
}

/* y [n_rows][n_outputs] = x W^T (+ y): for cuBLAS, which counts down columns, y^T = W x^T. */
static void multiply(cuda_backend *cuda, const kvl_matrix *weights, uint32_t n_rows,
                     const void *rounded, bool add, float *y)
{
    const float one = 1.0F;
    const float beta = add ? 1.0F : 0.0F;
    const cublasStatus_t status =
        cublasGemmEx(cuda->blas, CUBLAS_OP_T, CUBLAS_OP_N, (int)weights->n_outputs, (int)n_rows,
                     (int)weights->n_inputs, &one, bring_matrix(cuda, weights), CUDA_R_16BF,
                     (int)weights->n_inputs, rounded, CUDA_R_16BF, (int)weights->n_inputs, &beta, y,
                     CUDA_R_32F, (int)weights->n_outputs, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    if (status != CUBLAS_STATUS_SUCCESS) end(cublasGetStatusString(status));
}

/* Rows as bf16. Norms and gates have rounded what they wrote, and a result never overlaps x. */
static const void *round_rows(cuda_backend *cuda, const float *x, size_t n)
{
    if (cuda->twin == x && cuda->n_twin >= n) return cuda->rooms[ROOM_ROUNDED].first;
    const float *rows = bring(cuda, ROOM_INPUT, x, n);
    void *rounded = room_of(cuda, ROOM_ROUNDED, n * sizeof(uint16_t));
    must_run(kvl_cuda_narrow(n, rows, rounded, cuda->stream), "rounding rows");
    cuda->twin = NULL; /* the host's rows may change unseen */
    return rounded;
}

static void matmul(kvl_backend *backend, const kvl_matmul_job *jobs, size_t n_jobs, uint32_t n_rows,
                   const float *x)
{
    if (n_jobs == 0 || n_rows == 0) return;
    cuda_backend *cuda = cuda_of(backend);
    const size_t n_inputs = (size_t)n_rows * jobs[0].weights->n_inputs;
    const void *rounded = round_rows(cuda, x, n_inputs);
    for (size_t i = 0; i < n_jobs; i++) {
        const kvl_matmul_job *job = &jobs[i];
        const uint32_t width = job->weights->n_outputs;
        const size_t n = (size_t)n_rows * width;
        float *y = target(cuda, ROOM_OUTPUT, job->y, n);
        if (job->accumulate && y != job->y)
            must_run(
                cudaMemcpyAsync(y, job->y, n * sizeof(float), cudaMemcpyHostToDevice, cuda->stream),
                "sending rows");
        if (job->bias != NULL)
            must_run(kvl_cuda_bias(n_rows, width, bring_floats(cuda, job->bias, width),
                                   job->accumulate, y, cuda->stream),
                     "adding a bias");
        multiply(cuda, job->weights, n_rows, rounded, job->accumulate || job->bias != NULL, y);
        hand_over(cuda, job->y, y, n);
    }
}

static void rms_norm(kvl_backend *backend, uint32_t n_rows, uint32_t width, const float *x,
                     const float *weight, float epsilon, float *y)
{
    cuda_backend *cuda = cuda_to_write(backend);
    const size_t n = (size_t)n_rows * width;
    must_run(kvl_cuda_rms_norm(n_rows, width, x, bring_floats(cuda, weight, width), epsilon, y,
                               room_of(cuda, ROOM_ROUNDED, n * sizeof(uint16_t)), cuda->stream),
             "normalising rows");
    cuda->twin = y;
    cuda->n_twin = n;
}

static void rotate(kvl_backend *backend, const kvl_rotation *rotation, uint32_t n_rows,
                   const uint32_t *positions, uint32_t n_heads, uint32_t head_dim, float *rows)
{
    cuda_backend *cuda = cuda_to_write(backend);
    const size_t n = (size_t)n_rows * n_heads * head_dim;
    kvl_cuda_rotation tables;
    kvl_error error;
    must(kvl_cuda_resident_rotation(cuda->residents, rotation, &tables, &error), &error);
    float *turned = target(cuda, ROOM_OUTPUT, rows, n);
    if (turned != rows)
        must_run(
            cudaMemcpyAsync(turned, rows, n * sizeof(float), cudaMemcpyHostToDevice, cuda->stream),
            "sending rows");
    must_run(kvl_cuda_rotate(&tables, n_rows, bring_indices(cuda, positions, n_rows), n_heads,
                             head_dim, turned, cuda->stream),
             "rotating rows");
    hand_over(cuda, rows, turned, n);
}

static void silu_multiply(kvl_backend *backend, size_t n, float *gate, const float *up)
{
    cuda_backend *cuda = cuda_to_write(backend);
    must_run(kvl_cuda_silu_multiply(n, gate, up, room_of(cuda, ROOM_ROUNDED, n * sizeof(uint16_t)),
                                    cuda->stream),
             "gating rows");
    cuda->twin = gate;
    cuda->n_twin = n;
}

static void embed(kvl_backend *backend, const kvl_matrix *table, uint32_t n_rows,
                  const uint32_t *ids, float *out)
{
    cuda_backend *cuda = cuda_to_write(backend);
    const size_t n = (size_t)n_rows * table->n_inputs;
    float *made = target(cuda, ROOM_OUTPUT, out, n);
    must_run(kvl_cuda_embed(n_rows, table->n_inputs, bring_indices(cuda, ids, n_rows),
                            bring_matrix(cuda, table), made, cuda->stream),
             "embedding tokens");
    hand_over(cuda, out, made, n);
}

static char *layer_of(const kvl_pages *pages, uint32_t layer)
{
    const size_t page_bytes =
        (size_t)2 * pages->n_kv_heads * KVL_PAGE_TOKENS * pages->head_dim * sizeof(uint16_t);
    return (char *)(void *)pages->memory + (size_t)layer * pages->n_pages * page_bytes;
}

static void pages_write(kvl_backend *backend, const kvl_pages *pages, uint32_t layer,
                        uint32_t n_rows, const uint32_t *slots, const float *keys,
                        const float *values)
{
    cuda_backend *cuda = cuda_of(backend);
    const size_t n = (size_t)n_rows * pages->n_kv_heads * pages->head_dim;
    const float *k = bring(cuda, ROOM_INPUT, keys, n);
    const float *v = bring(cuda, ROOM_OTHER, values, n);
    must_run(kvl_cuda_pages_write(n_rows, pages->n_kv_heads, pages->head_dim,
                                  bring_indices(cuda, slots, n_rows), k, v, layer_of(pages, layer),
                                  cuda->stream),
             "writing pages");
}

static void pages_read(kvl_backend *backend, const kvl_pages *pages, uint32_t layer,
                       uint32_t n_rows, const uint32_t *slots, float *keys, float *values)
{
    cuda_backend *cuda = cuda_to_write(backend);
    const size_t n = (size_t)n_rows * pages->n_kv_heads * pages->head_dim;
    float *k = target(cuda, ROOM_OUTPUT, keys, n);
    float *v = target(cuda, ROOM_OTHER, values, n);
    must_run(kvl_cuda_pages_read(n_rows, pages->n_kv_heads, pages->head_dim,
                                 bring_indices(cuda, slots, n_rows), k, v, layer_of(pages, layer),
                                 cuda->stream),
             "reading pages");
    hand_over(cuda, keys, k, n);
    hand_over(cuda, values, v, n);
}

/* The device's copy of the plan, made at its first layer. */
static kvl_cuda_step *step_of(cuda_backend *cuda, const kvl_attend_call *call)
{
    for (uint32_t i = 0; i < STEPS; i++)
        if (cuda->steps[i].serial == call->serial) return cuda->steps[i].step;
    const step oldest = cuda->steps[STEPS - 1];
    memmove(&cuda->steps[1], &cuda->steps[0], (STEPS - 1) * sizeof *cuda->steps);
    cuda->steps[0] = (step){oldest.step, call->serial};
    kvl_error error;
    must(kvl_cuda_step_make(oldest.step, call, call->pages->n_kv_heads, call->pages->head_dim,
                            cuda->stream, &error),
         &error);
    return oldest.step;
}

static void attend(kvl_backend *backend, const kvl_attend_call *call)
{
    cuda_backend *cuda = cuda_to_write(backend);
    kvl_error error;
    must(kvl_cuda_step_run(step_of(cuda, call), layer_of(call->pages, call->layer), call->queries,
                           call->out, true, 0, cuda->stream, &error),
         &error);
}

static void attend_mass(kvl_backend *backend, const kvl_attend_mass_call *call, float *mass)
{
    cuda_backend *cuda = cuda_to_write(backend);
    const kvl_pages *pages = call->pages;
    const size_t n_heads = (size_t)call->n_rows * call->n_heads;
    const size_t n = (size_t)pages->n_kv_heads * call->n_keys;
    const uint32_t n_pages = (call->n_keys + KVL_PAGE_TOKENS - 1) / KVL_PAGE_TOKENS;
    float *made = target(cuda, ROOM_OUTPUT, mass, n);
    if (made != mass)
        must_run(
            cudaMemcpyAsync(made, mass, n * sizeof(float), cudaMemcpyHostToDevice, cuda->stream),
            "sending rows");
    const kvl_cuda_mass work = {
        .pages = layer_of(pages, call->layer),
        .queries = bring(cuda, ROOM_INPUT, call->queries, n_heads * pages->head_dim),
        .positions = bring_indices(cuda, call->positions, call->n_rows),
        .page_ids = bring_indices(cuda, call->page_ids, n_pages),
        .normalisers = room_of(cuda, ROOM_OTHER, n_heads * sizeof(float)),
        .mass = made,
        .n_rows = call->n_rows,
        .n_heads = call->n_heads,
        .n_kv_heads = pages->n_kv_heads,
        .head_dim = pages->head_dim,
        .n_keys = call->n_keys};
    must_run(kvl_cuda_attend_mass(&work, cuda->stream), "summing attention");
    hand_over(cuda, mass, made, n);
}

static void synchronize(kvl_backend *backend)
{
    must_run(cudaStreamSynchronize(cuda_of(backend)->stream), "waiting for the CUDA device");
}

/* --- the table --- */

/* Nothing can be done about a driver that fails to free. */
static void destroy(kvl_backend *backend)
{
    if (backend == NULL) return;
    cuda_backend *cuda = (cuda_backend *)(void *)backend;
    if (cuda->stream != NULL) {
        (void)cudaSetDevice(cuda->number);
        (void)cudaStreamSynchronize(cuda->stream);
    }
    for (uint32_t i = 0; i < STEPS; i++) kvl_cuda_step_destroy(cuda->steps[i].step);
    kvl_cuda_residents_destroy(cuda->residents);
    for (uint32_t i = 0; i < ROOMS; i++) (void)cudaFree(cuda->rooms[i].first);
    for (uint32_t i = 0; i < cuda->n_regions; i++) (void)cudaFree(cuda->regions[i].first);
    if (cuda->blas != NULL) (void)cublasDestroy(cuda->blas);
    (void)cudaFree(cuda->blas_memory);
    if (cuda->stream != NULL) (void)cudaStreamDestroy(cuda->stream);
    if (cuda->host != NULL) cuda->host->ops->destroy(cuda->host);
    kvl_free(cuda);
}

static const kvl_backend_ops cuda_ops = {
    .name = "cuda",
    .memory_create = memory_create,
    .memory_destroy = memory_destroy,
    .weights_load = weights_load,
    .rows_keep = rows_keep,
    .matmul = matmul,
    .rms_norm = rms_norm,
    .rotate = rotate,
    .silu_multiply = silu_multiply,
    .embed = embed,
    .pages_write = pages_write,
    .pages_read = pages_read,
    .attend = attend,
    .attend_mass = attend_mass,
    .synchronize = synchronize,
    .destroy = destroy,
};

cudaStream_t kvl_cuda_backend_stream(const kvl_backend *backend)
{
    KVL_ASSERT(backend->ops == &cuda_ops);
    return ((const cuda_backend *)(const void *)backend)->stream;
}

static kvl_status choose_device(uint32_t number, kvl_error *error)
{
    int n_devices = 0;
    const cudaError_t result = cudaGetDeviceCount(&n_devices);
    if (result != cudaSuccess || n_devices == 0) {
        (void)cudaGetLastError();
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                        "CUDA device %u was asked for, but there is none (%s): see what nvidia-smi "
                        "says, or use --device cpu",
                        number, result == cudaSuccess ? "none found" : cudaGetErrorString(result));
    }
    if (number >= (uint32_t)n_devices)
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                        "CUDA device %u was asked for, but there are %d, counted from 0", number,
                        n_devices);
    return kvl_cuda_check(cudaSetDevice((int)number), "choosing the CUDA device", error);
}

static kvl_status create_blas(cuda_backend *cuda, kvl_error *error)
{
    KVL_TRY(kvl_cuda_check(cudaMalloc(&cuda->blas_memory, BLAS_BYTES), "CUDA memory for cuBLAS",
                           error));
    cublasStatus_t status = cublasCreate(&cuda->blas);
    if (status == CUBLAS_STATUS_SUCCESS) status = cublasSetStream(cuda->blas, cuda->stream);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasSetWorkspace(cuda->blas, cuda->blas_memory, BLAS_BYTES);
    if (status == CUBLAS_STATUS_SUCCESS) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_IO, "cuBLAS could not be started: %s",
                    cublasGetStatusString(status));
}

static kvl_status create_parts(cuda_backend *cuda, kvl_pool *pool, kvl_error *error)
{
    KVL_TRY(choose_device((uint32_t)cuda->number, error));
    KVL_TRY(kvl_cuda_check(cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking),
                           "creating a CUDA stream", error));
    for (uint32_t i = 0; i < STEPS; i++)
        KVL_TRY(kvl_cuda_step_create(0, &cuda->steps[i].step, error));
    KVL_TRY(create_blas(cuda, error));
    KVL_TRY(kvl_backend_cpu_create(pool, KVL_CPU_BEST, &cuda->host, error));
    return kvl_cuda_residents_create(cuda->host, cuda->stream, &cuda->residents, error);
}

kvl_status kvl_backend_cuda_create(kvl_pool *pool, uint32_t number, kvl_backend **backend,
                                   kvl_error *error)
{
    *backend = NULL;
    cuda_backend *cuda = kvl_alloc_zero(1, sizeof *cuda);
    if (cuda == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the CUDA backend");
    cuda->base.ops = &cuda_ops;
    cuda->base.pool = pool;
    cuda->number = (int)number;
    const kvl_status status = create_parts(cuda, pool, error);
    if (status != KVL_OK) {
        destroy(&cuda->base);
        return status;
    }
    *backend = &cuda->base;
    return KVL_OK;
}
