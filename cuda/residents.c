/* cuda/residents.c: see residents.h. */
#include "cuda/residents.h"

#include "base/alloc.h"
#include "cuda/attention.h"
#include "cuda/operations.h"

#include <string.h>

enum { INDEX_SLOTS = 5, UPLOAD_FLOATS = 4 << 20 };

typedef struct resident {
    const void *original;
    size_t n_bytes; /* on the device */
    void *device;
} resident;

typedef struct table {
    const float *cosines; /* the original */
    uint32_t n_positions;
    uint32_t rotary_dim;
    float *last_row; /* cosines, then sines: [rotary_dim] */
    float *device;   /* cosines, then sines */
} table;

typedef struct indices {
    uint32_t *host; /* pinned: what the device has, or is about to read */
    cudaEvent_t sent;
    uint32_t *device;
    uint32_t n;
    uint32_t n_max;
} indices;

struct kvl_cuda_residents {
    kvl_backend *host;
    cudaStream_t stream;
    resident *items; /* by address of the original, ascending */
    size_t n_items;
    size_t items_max;
    table *tables;
    size_t n_tables;
    indices slots[INDEX_SLOTS];
    uint32_t next_slot;
};

kvl_status kvl_cuda_residents_create(kvl_backend *host, cudaStream_t stream,
                                     kvl_cuda_residents **residents, kvl_error *error)
{
    *residents = kvl_alloc_zero(1, sizeof **residents);
    if (*residents == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to keep track of weights");
    (*residents)->host = host;
    (*residents)->stream = stream;
    return KVL_OK;
}

/* Nothing can be done about a driver that fails to free. */
void kvl_cuda_residents_destroy(kvl_cuda_residents *residents)
{
    if (residents == NULL) return;
    for (size_t i = 0; i < residents->n_items; i++) (void)cudaFree(residents->items[i].device);
    for (size_t i = 0; i < residents->n_tables; i++) {
        (void)cudaFree(residents->tables[i].device);
        kvl_free(residents->tables[i].last_row);
    }
    for (uint32_t i = 0; i < INDEX_SLOTS; i++) {
        (void)cudaFree(residents->slots[i].device);
        (void)cudaFreeHost(residents->slots[i].host);
        if (residents->slots[i].sent != NULL) (void)cudaEventDestroy(residents->slots[i].sent);
    }
    kvl_free(residents->items);
    kvl_free(residents->tables);
    kvl_free(residents);
}

static kvl_status allocate(size_t n_bytes, const char *what, void **device, kvl_error *error)
{
    const cudaError_t result = cudaMalloc(device, n_bytes);
    if (result == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError(); /* it was told here: later calls shall not see it again */
        size_t n_free = 0;
        size_t n_total = 0;
        if (cudaMemGetInfo(&n_free, &n_total) != cudaSuccess) n_free = 0;
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY,
                        "%zu bytes of CUDA memory for %s could not be had, %zu are free: use a "
                        "smaller model or context, or --device cpu",
                        n_bytes, what, n_free);
    }
    return kvl_cuda_check(result, what, error);
}

/* Where an original stands, or would. */
static size_t find(const kvl_cuda_residents *residents, const void *original)
{
    size_t first = 0;
    size_t past = residents->n_items;
    while (first < past) {
        const size_t middle = first + (past - first) / 2;
        if ((uintptr_t)residents->items[middle].original < (uintptr_t)original)
            first = middle + 1;
        else
            past = middle;
    }
    return first;
}

/* *is_new: the device memory is there, but nothing in it yet. */
static kvl_status enter(kvl_cuda_residents *residents, const void *original, size_t n_bytes,
                        const char *what, void **device, bool *is_new, kvl_error *error)
{
    const size_t at = find(residents, original);
    *is_new = at == residents->n_items || residents->items[at].original != original;
    if (!*is_new) {
        KVL_ASSERT(residents->items[at].n_bytes == n_bytes);
        *device = residents->items[at].device;
        return KVL_OK;
    }
    if (residents->n_items == residents->items_max) {
        const size_t wanted = 2 * residents->items_max + 64;
        void *larger = kvl_realloc(residents->items, wanted * sizeof *residents->items);
        if (larger == NULL)
            return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to keep track of %s", what);
        residents->items = larger;
        residents->items_max = wanted;
    }
    KVL_TRY(allocate(n_bytes, what, device, error));
    memmove(&residents->items[at + 1], &residents->items[at],
            (residents->n_items - at) * sizeof *residents->items);
    residents->items[at] = (resident){original, n_bytes, *device};
    residents->n_items++;
    return KVL_OK;
}

static void leave(kvl_cuda_residents *residents, const void *original)
{
    const size_t at = find(residents, original);
    (void)cudaFree(residents->items[at].device);
    residents->n_items--;
    memmove(&residents->items[at], &residents->items[at + 1],
            (residents->n_items - at) * sizeof *residents->items);
}

/* Some rows at a time: dequantised by the host, rounded by the device. */
static kvl_status send_matrix(kvl_cuda_residents *residents, const kvl_matrix *matrix,
                              float *numbers, uint32_t *ids, uint32_t n_rows_max, float *wide,
                              char *device, kvl_error *error)
{
    const size_t width = matrix->n_inputs;
    for (uint32_t row = 0; row < matrix->n_outputs; row += n_rows_max) {
        const uint32_t left = matrix->n_outputs - row;
        const uint32_t n = left < n_rows_max ? left : n_rows_max;
        for (uint32_t i = 0; i < n; i++) ids[i] = row + i;
        residents->host->ops->embed(residents->host, matrix, n, ids, numbers);
        /* From pageable memory: returns when `numbers` may be written again. */
        KVL_TRY(kvl_cuda_check(cudaMemcpyAsync(wide, numbers, n * width * sizeof(float),
                                               cudaMemcpyHostToDevice, residents->stream),
                               "sending weights", error));
        KVL_TRY(
            kvl_cuda_check(kvl_cuda_narrow(n * width, wide, device + row * width * sizeof(uint16_t),
                                           residents->stream),
                           "rounding weights", error));
        KVL_TRY(kvl_cuda_check(cudaStreamSynchronize(residents->stream), "sending weights", error));
    }
    return KVL_OK;
}

static kvl_status fill_matrix(kvl_cuda_residents *residents, const kvl_matrix *matrix, char *device,
                              kvl_error *error)
{
    uint32_t n_rows = UPLOAD_FLOATS / matrix->n_inputs;
    if (n_rows == 0) n_rows = 1;
    if (n_rows > matrix->n_outputs) n_rows = matrix->n_outputs;
    const size_t n_bytes = (size_t)n_rows * matrix->n_inputs * sizeof(float);
    float *numbers = kvl_alloc_aligned(n_bytes);
    uint32_t *ids = kvl_alloc(n_rows * sizeof *ids);
    void *wide = NULL;
    kvl_status status = KVL_OK;
    if (numbers == NULL || ids == NULL)
        status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to dequantise weights");
    if (status == KVL_OK) status = allocate(n_bytes, "dequantised weights", &wide, error);
    if (status == KVL_OK)
        status = send_matrix(residents, matrix, numbers, ids, n_rows, wide, device, error);
    (void)cudaFree(wide);
    kvl_free(numbers);
    kvl_free(ids);
    return status;
}

kvl_status kvl_cuda_resident_matrix(kvl_cuda_residents *residents, const kvl_matrix *matrix,
                                    const void **device, kvl_error *error)
{
    void *memory = NULL;
    bool is_new = false;
    const size_t n_bytes = (size_t)matrix->n_outputs * matrix->n_inputs * sizeof(uint16_t);
    KVL_TRY(enter(residents, matrix->data, n_bytes, "weights", &memory, &is_new, error));
    *device = memory;
    if (!is_new) return KVL_OK;
    kvl_status status = KVL_OK;
    if (matrix->dtype == KVL_DTYPE_BF16 && matrix->row_bytes * matrix->n_outputs == n_bytes) {
        status = kvl_cuda_check(cudaMemcpyAsync(memory, matrix->data, n_bytes,
                                                cudaMemcpyHostToDevice, residents->stream),
                                "sending weights", error);
    } else {
        status = fill_matrix(residents, matrix, memory, error);
    }
    if (status != KVL_OK) leave(residents, matrix->data);
    return status;
}

kvl_status kvl_cuda_resident_floats(kvl_cuda_residents *residents, const float *numbers, size_t n,
                                    const float **device, kvl_error *error)
{
    void *memory = NULL;
    bool is_new = false;
    KVL_TRY(
        enter(residents, numbers, n * sizeof(float), "norms and biases", &memory, &is_new, error));
    *device = memory;
    if (!is_new) return KVL_OK;
    const kvl_status status =
        kvl_cuda_check(cudaMemcpyAsync(memory, numbers, n * sizeof(float), cudaMemcpyHostToDevice,
                                       residents->stream),
                       "sending norms and biases", error);
    if (status != KVL_OK) leave(residents, numbers);
    return status;
}

/* --- rotation tables --- */

static bool is_table(const table *t, const kvl_rotation *rotation)
{
    const size_t half = rotation->rotary_dim / 2;
    const size_t last = (rotation->n_positions - 1) * half;
    return t->cosines == rotation->cosines && t->n_positions == rotation->n_positions &&
           t->rotary_dim == rotation->rotary_dim &&
           memcmp(t->last_row, rotation->cosines + last, half * sizeof(float)) == 0 &&
           memcmp(t->last_row + half, rotation->sines + last, half * sizeof(float)) == 0;
}

static kvl_status send_table(kvl_cuda_residents *residents, const kvl_rotation *rotation, table *t,
                             kvl_error *error)
{
    const size_t half = rotation->rotary_dim / 2;
    const size_t n = rotation->n_positions * half;
    const size_t last = n - half;
    void *device = NULL;
    KVL_TRY(allocate(2 * n * sizeof(float), "rotation tables", &device, error));
    t->device = device;
    t->last_row = kvl_alloc(2 * half * sizeof(float));
    if (t->last_row == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a rotation table");
    memcpy(t->last_row, rotation->cosines + last, half * sizeof(float));
    memcpy(t->last_row + half, rotation->sines + last, half * sizeof(float));
    KVL_TRY(kvl_cuda_check(cudaMemcpyAsync(t->device, rotation->cosines, n * sizeof(float),
                                           cudaMemcpyHostToDevice, residents->stream),
                           "sending rotation tables", error));
    return kvl_cuda_check(cudaMemcpyAsync(t->device + n, rotation->sines, n * sizeof(float),
                                          cudaMemcpyHostToDevice, residents->stream),
                          "sending rotation tables", error);
}

static kvl_cuda_rotation describe(const table *t, const kvl_rotation *rotation)
{
    const size_t n = (size_t)rotation->n_positions * rotation->rotary_dim / 2;
    return (kvl_cuda_rotation){t->device, t->device + n, rotation->rotary_dim,
                               rotation->pairs == KVL_PAIRS_HALVES};
}

kvl_status kvl_cuda_resident_rotation(kvl_cuda_residents *residents, const kvl_rotation *rotation,
                                      kvl_cuda_rotation *device, kvl_error *error)
{
    for (size_t i = 0; i < residents->n_tables; i++) {
        if (!is_table(&residents->tables[i], rotation)) continue;
        *device = describe(&residents->tables[i], rotation);
        return KVL_OK;
    }
    if (rotation->rotary_dim % 16 != 0)
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                        "%u rotated dimensions: the CUDA backend needs a multiple of 16; use "
                        "--device cpu",
                        rotation->rotary_dim);
    void *larger =
        kvl_realloc(residents->tables, (residents->n_tables + 1) * sizeof *residents->tables);
    if (larger == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a rotation table");
    residents->tables = larger;
    table *t = &residents->tables[residents->n_tables];
    *t = (table){rotation->cosines, rotation->n_positions, rotation->rotary_dim, NULL, NULL};
    const kvl_status status = send_table(residents, rotation, t, error);
    if (status != KVL_OK) {
        (void)cudaFree(t->device);
        kvl_free(t->last_row);
        return status;
    }
    residents->n_tables++;
    *device = describe(t, rotation);
    return KVL_OK;
}

/* --- indices --- */

static kvl_status grow_indices(indices *slot, uint32_t n, kvl_error *error)
{
    if (slot->sent == NULL)
        KVL_TRY(kvl_cuda_check(cudaEventCreateWithFlags(&slot->sent, cudaEventDisableTiming),
                               "creating a CUDA event", error));
    /* What was sent last may not have been read yet. */
    KVL_TRY(kvl_cuda_check(cudaEventSynchronize(slot->sent), "sending indices", error));
    if (n <= slot->n_max) return KVL_OK;
    (void)cudaFree(slot->device);
    (void)cudaFreeHost(slot->host);
    slot->device = NULL;
    slot->host = NULL;
    slot->n_max = 0;
    void *host = NULL;
    KVL_TRY(kvl_cuda_check(cudaMallocHost(&host, n * sizeof *slot->host),
                           "pinned memory for indices", error));
    slot->host = host;
    void *device = NULL;
    KVL_TRY(allocate(n * sizeof *slot->device, "indices", &device, error));
    slot->device = device;
    slot->n_max = n;
    return KVL_OK;
}

kvl_status kvl_cuda_resident_indices(kvl_cuda_residents *residents, const uint32_t *numbers,
                                     uint32_t n, const uint32_t **device, kvl_error *error)
{
    *device = NULL;
    if (n == 0) return KVL_OK;
    for (uint32_t i = 0; i < INDEX_SLOTS; i++) {
        const indices *slot = &residents->slots[i];
        if (slot->n != n || memcmp(slot->host, numbers, n * sizeof *numbers) != 0) continue;
        *device = slot->device;
        return KVL_OK;
    }
    indices *slot = &residents->slots[residents->next_slot];
    residents->next_slot = (residents->next_slot + 1) % INDEX_SLOTS;
    slot->n = 0;
    KVL_TRY(grow_indices(slot, n, error));
    memcpy(slot->host, numbers, n * sizeof *numbers);
    KVL_TRY(kvl_cuda_check(kvl_cuda_copy_words(n, slot->host, slot->device, residents->stream),
                           "sending indices", error));
    KVL_TRY(
        kvl_cuda_check(cudaEventRecord(slot->sent, residents->stream), "sending indices", error));
    slot->n = n;
    *device = slot->device;
    return KVL_OK;
}
