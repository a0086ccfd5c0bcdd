/* cuda/attention.c: sends plans to the device, in one launch each, and launches layers. */
#include "cuda/attention.h"

#include "base/alloc.h"
#include "cuda/operations.h"

#include <string.h>

enum { PARTS = 9, PART_ALIGNMENT = 256, BARRIER_BYTES = 256 };

/* Memory that grows, on the device or pinned on the host. */
typedef struct memory {
    char *bytes;
    size_t n_bytes;
} memory;

struct kvl_cuda_step {
    kvl_cuda_plan *plan;
    memory staging; /* pinned */
    memory device;  /* the plan */
    memory partials;
    uint64_t *barrier;
    cudaEvent_t sent; /* the staging memory may be written again */
    uint64_t generation;
    uint32_t n_blocks;
    kvl_cuda_attention work; /* all but the layer's pointers */
};

kvl_status kvl_cuda_check(cudaError_t result, const char *what, kvl_error *error)
{
    if (result == cudaSuccess) return KVL_OK;
    const kvl_status status = result == cudaErrorMemoryAllocation ? KVL_ERR_NO_MEMORY : KVL_ERR_IO;
    return KVL_FAIL(error, status, "%s: %s (%s)", what, cudaGetErrorString(result),
                    cudaGetErrorName(result));
}

static kvl_status check_device(uint32_t *n_blocks, kvl_error *error)
{
    int device = 0;
    int major = 0;
    int minor = 0;
    int n_processors = 0;
    KVL_TRY(kvl_cuda_check(cudaGetDevice(&device), "finding the CUDA device", error));
    KVL_TRY(
        kvl_cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
                       "asking the CUDA device what it can do", error));
    KVL_TRY(
        kvl_cuda_check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
                       "asking the CUDA device what it can do", error));
    KVL_TRY(kvl_cuda_check(
        cudaDeviceGetAttribute(&n_processors, cudaDevAttrMultiProcessorCount, device),
        "asking the CUDA device what it can do", error));
    if (major != 9 || minor != 0)
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                        "CUDA device %d has compute capability %d.%d; the kernels are for 9.0 "
                        "(H100, H200): use --device cpu",
                        device, major, minor);
    if (*n_blocks == 0 || *n_blocks > (uint32_t)n_processors) *n_blocks = (uint32_t)n_processors;
    return KVL_OK;
}

static kvl_status create_parts(kvl_cuda_step *step, kvl_error *error)
{
    KVL_TRY(check_device(&step->n_blocks, error));
    KVL_TRY(kvl_cuda_plan_create(&step->plan, error));
    KVL_TRY(kvl_cuda_check(cudaEventCreateWithFlags(&step->sent, cudaEventDisableTiming),
                           "creating a CUDA event", error));
    void *barrier = NULL;
    KVL_TRY(kvl_cuda_check(cudaMalloc(&barrier, BARRIER_BYTES), "device memory", error));
    step->barrier = barrier;
    return kvl_cuda_check(cudaMemset(barrier, 0, BARRIER_BYTES), "clearing device memory", error);
}

kvl_status kvl_cuda_step_create(uint32_t n_blocks, kvl_cuda_step **step, kvl_error *error)
{
    *step = NULL;
    kvl_cuda_step *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a step");
    made->n_blocks = n_blocks;
    const kvl_status status = create_parts(made, error);
    if (status != KVL_OK) {
        kvl_cuda_step_destroy(made);
        return status;
    }
    *step = made;
    return KVL_OK;
}

void kvl_cuda_step_destroy(kvl_cuda_step *step)
{
    if (step == NULL) return;
    /* Nothing can be done about a driver that fails to free. */
    (void)cudaFreeHost(step->staging.bytes);
    (void)cudaFree(step->device.bytes);
    (void)cudaFree(step->partials.bytes);
    (void)cudaFree(step->barrier);
    if (step->sent != NULL) (void)cudaEventDestroy(step->sent);
    kvl_cuda_plan_destroy(step->plan);
    kvl_free(step);
}

/* Contents are lost. Freeing device memory waits for the launches that use it. */
static kvl_status grow(kvl_cuda_step *step, memory *m, size_t n_bytes, bool host, kvl_error *error)
{
    if (n_bytes <= m->n_bytes) return KVL_OK;
    const size_t wanted = n_bytes + n_bytes / 2;
    KVL_TRY(kvl_cuda_check(host ? cudaFreeHost(m->bytes) : cudaFree(m->bytes),
                           "freeing memory of a step", error));
    m->bytes = NULL;
    m->n_bytes = 0;
    void *bytes = NULL;
    KVL_TRY(kvl_cuda_check(host ? cudaMallocHost(&bytes, wanted) : cudaMalloc(&bytes, wanted),
                           "memory for a step of attention", error));
    m->bytes = bytes;
    m->n_bytes = wanted;
    step->generation++;
    return KVL_OK;
}

typedef struct part {
    const void *from;
    size_t n_bytes;
    size_t offset;
} part;

static kvl_status send(kvl_cuda_step *step, part *parts, cudaStream_t stream, kvl_error *error)
{
    size_t n_bytes = 0;
    for (uint32_t i = 0; i < PARTS; i++) {
        parts[i].offset = n_bytes;
        n_bytes += (parts[i].n_bytes + PART_ALIGNMENT - 1) / PART_ALIGNMENT * PART_ALIGNMENT;
    }
    KVL_TRY(kvl_cuda_check(cudaEventSynchronize(step->sent), "waiting for a plan", error));
    KVL_TRY(grow(step, &step->staging, n_bytes, true, error));
    KVL_TRY(grow(step, &step->device, n_bytes, false, error));
    for (uint32_t i = 0; i < PARTS; i++)
        if (parts[i].n_bytes != 0)
            memcpy(step->staging.bytes + parts[i].offset, parts[i].from, parts[i].n_bytes);
    KVL_TRY(kvl_cuda_check(kvl_cuda_copy_words(n_bytes / sizeof(uint32_t),
                                               (const uint32_t *)(const void *)step->staging.bytes,
                                               (uint32_t *)(void *)step->device.bytes, stream),
                           "sending a plan", error));
    return kvl_cuda_check(cudaEventRecord(step->sent, stream), "sending a plan", error);
}

static kvl_status make_room(kvl_cuda_step *step, uint32_t n_slots, kvl_error *error)
{
    kvl_cuda_attention *work = &step->work;
    const size_t n = (size_t)n_slots * (work->n_heads / work->n_kv_heads);
    const size_t rows = n * work->head_dim * sizeof(float);
    KVL_TRY(grow(step, &step->partials, rows + 2 * n * sizeof(float), false, error));
    work->partial_rows = (float *)(void *)step->partials.bytes;
    work->partial_sums = work->partial_rows + n * work->head_dim;
    return KVL_OK;
}

kvl_status kvl_cuda_step_make(kvl_cuda_step *step, const kvl_attend_call *call, uint32_t n_kv_heads,
                              uint32_t head_dim, cudaStream_t stream, kvl_error *error)
{
    if (head_dim != 64 && head_dim != 128)
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                        "head dimension %u: the CUDA backend has kernels for 64 and 128; use "
                        "--device cpu",
                        head_dim);
    KVL_TRY(kvl_cuda_plan_make(step->plan, call, n_kv_heads, step->n_blocks, error));
    const kvl_cuda_plan_view v = kvl_cuda_plan_look(step->plan);
    const size_t word = sizeof(uint32_t);
    part parts[PARTS] = {
        {call->order, call->n_rows * word, 0},
        {call->positions, call->n_rows * word, 0},
        {v.page_ids, v.n_page_ids * word, 0},
        {v.matrix, v.n_matrix * sizeof *v.matrix, 0},
        {v.matrix_first, (step->n_blocks + 1) * word, 0},
        {v.vectors, v.n_vectors * sizeof *v.vectors, 0},
        {v.vector_first, (step->n_blocks + 1) * word, 0},
        {v.slots, v.n_slot_entries * word, 0},
        {v.merges, v.n_merges * sizeof *v.merges, 0},
    };
    KVL_TRY(send(step, parts, stream, error));
    const char *at = step->device.bytes;
    step->work = (kvl_cuda_attention){
        .order = (const uint32_t *)(const void *)(at + parts[0].offset),
        .positions = (const uint32_t *)(const void *)(at + parts[1].offset),
        .page_ids = (const uint32_t *)(const void *)(at + parts[2].offset),
        .matrix = (const kvl_cuda_matrix_work *)(const void *)(at + parts[3].offset),
        .matrix_first = (const uint32_t *)(const void *)(at + parts[4].offset),
        .vectors = (const kvl_cuda_vector_work *)(const void *)(at + parts[5].offset),
        .vector_first = (const uint32_t *)(const void *)(at + parts[6].offset),
        .slots = (const uint32_t *)(const void *)(at + parts[7].offset),
        .merges = (const kvl_cuda_merge *)(const void *)(at + parts[8].offset),
        .barrier = step->barrier,
        .n_merges = v.n_merges,
        .n_parts_max = v.n_parts_max,
        .n_heads = call->n_heads,
        .n_kv_heads = n_kv_heads,
        .head_dim = head_dim,
        .n_blocks = step->n_blocks,
        .is_first = true,
    };
    return make_room(step, v.n_slots, error);
}

kvl_status kvl_cuda_step_run(kvl_cuda_step *step, const void *kv, const void *queries, void *out,
                             bool float_numbers, uint32_t variant, cudaStream_t stream,
                             kvl_error *error)
{
    kvl_cuda_attention work = step->work;
    step->work.is_first = false;
    work.kv = kv;
    work.queries = queries;
    work.out = out;
    work.float_numbers = float_numbers;
    return kvl_cuda_check(kvl_cuda_attention_launch(&work, variant, stream), "launching attention",
                          error);
}

uint64_t kvl_cuda_step_generation(const kvl_cuda_step *step)
{
    return step->generation;
}

kvl_cuda_plan_view kvl_cuda_step_plan(const kvl_cuda_step *step)
{
    return kvl_cuda_plan_look(step->plan);
}
