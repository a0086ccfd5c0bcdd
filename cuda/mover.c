/* cuda/mover.c: see mover.h. */
#include "cuda/mover.h"

#include "base/alloc.h"
#include "cuda/attention.h"

#include <string.h>

/* One way: a stream, and a ring of slots with the events that say when each is free again. */
typedef struct way {
    cudaStream_t stream;
    char *slots; /* pinned */
    cudaEvent_t *events;
    uint32_t next;
} way;

struct kvl_cuda_mover {
    way in;
    way out;
    cudaEvent_t loaded;
    cudaEvent_t computed;
    size_t slot_bytes;
    uint32_t n_slots;
};

static kvl_status create_event(cudaEvent_t *event, kvl_error *error)
{
    return kvl_cuda_check(cudaEventCreateWithFlags(event, cudaEventDisableTiming),
                          "creating a CUDA event", error);
}

static kvl_status create_way(const kvl_cuda_mover *mover, way *w, kvl_error *error)
{
    KVL_TRY(kvl_cuda_check(cudaStreamCreateWithFlags(&w->stream, cudaStreamNonBlocking),
                           "creating a CUDA stream", error));
    void *slots = NULL;
    KVL_TRY(kvl_cuda_check(cudaMallocHost(&slots, mover->n_slots * mover->slot_bytes),
                           "pinned memory for moving KV", error));
    w->slots = slots;
    w->events = kvl_alloc_zero(mover->n_slots, sizeof *w->events);
    if (w->events == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a mover");
    for (uint32_t i = 0; i < mover->n_slots; i++) KVL_TRY(create_event(&w->events[i], error));
    return KVL_OK;
}

static kvl_status create_parts(kvl_cuda_mover *mover, kvl_error *error)
{
    KVL_TRY(create_event(&mover->loaded, error));
    KVL_TRY(create_event(&mover->computed, error));
    KVL_TRY(create_way(mover, &mover->in, error));
    return create_way(mover, &mover->out, error);
}

kvl_status kvl_cuda_mover_create(uint32_t n_slots, size_t slot_bytes, kvl_cuda_mover **mover,
                                 kvl_error *error)
{
    KVL_ASSERT(n_slots >= 2 && slot_bytes > 0);
    *mover = NULL;
    size_t n_bytes = 0;
    if (!kvl_size_mul(n_slots, slot_bytes, &n_bytes))
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "%u slots of %zu bytes do not fit memory",
                        n_slots, slot_bytes);
    kvl_cuda_mover *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a mover");
    made->n_slots = n_slots;
    made->slot_bytes = slot_bytes;
    const kvl_status status = create_parts(made, error);
    if (status != KVL_OK) {
        kvl_cuda_mover_destroy(made);
        return status;
    }
    *mover = made;
    return KVL_OK;
}

/* Nothing can be done about a driver that fails to free. */
static void destroy_way(const kvl_cuda_mover *mover, way *w)
{
    if (w->stream != NULL) {
        (void)cudaStreamSynchronize(w->stream);
        (void)cudaStreamDestroy(w->stream);
    }
    for (uint32_t i = 0; w->events != NULL && i < mover->n_slots; i++)
        if (w->events[i] != NULL) (void)cudaEventDestroy(w->events[i]);
    kvl_free(w->events);
    (void)cudaFreeHost(w->slots);
}

void kvl_cuda_mover_destroy(kvl_cuda_mover *mover)
{
    if (mover == NULL) return;
    destroy_way(mover, &mover->in);
    destroy_way(mover, &mover->out);
    if (mover->loaded != NULL) (void)cudaEventDestroy(mover->loaded);
    if (mover->computed != NULL) (void)cudaEventDestroy(mover->computed);
    kvl_free(mover);
}

static size_t piece_bytes(const kvl_cuda_mover *mover, size_t left)
{
    return left < mover->slot_bytes ? left : mover->slot_bytes;
}

kvl_status kvl_cuda_mover_load(kvl_cuda_mover *mover, void *device, const void *host,
                               size_t n_bytes, bool pinned, kvl_error *error)
{
    way *w = &mover->in;
    if (pinned)
        return kvl_cuda_check(
            cudaMemcpyAsync(device, host, n_bytes, cudaMemcpyHostToDevice, w->stream), "loading KV",
            error);
    for (size_t at = 0; at < n_bytes; at += mover->slot_bytes) {
        const size_t n = piece_bytes(mover, n_bytes - at);
        char *slot = w->slots + w->next * mover->slot_bytes;
        KVL_TRY(kvl_cuda_check(cudaEventSynchronize(w->events[w->next]), "loading KV", error));
        memcpy(slot, (const char *)host + at, n);
        KVL_TRY(kvl_cuda_check(
            cudaMemcpyAsync((char *)device + at, slot, n, cudaMemcpyHostToDevice, w->stream),
            "loading KV", error));
        KVL_TRY(
            kvl_cuda_check(cudaEventRecord(w->events[w->next], w->stream), "loading KV", error));
        w->next = (w->next + 1) % mover->n_slots;
    }
    return KVL_OK;
}

/* Asks for piece after piece, and takes each out of its slot when the next has been asked for. */
static kvl_status store_by_slots(kvl_cuda_mover *mover, char *host, const char *device,
                                 size_t n_bytes, kvl_error *error)
{
    way *w = &mover->out;
    const size_t n_pieces = (n_bytes + mover->slot_bytes - 1) / mover->slot_bytes;
    for (size_t i = 0; i <= n_pieces; i++) {
        if (i < n_pieces) {
            const size_t at = i * mover->slot_bytes;
            const size_t slot = i % mover->n_slots;
            KVL_TRY(kvl_cuda_check(cudaMemcpyAsync(w->slots + slot * mover->slot_bytes, device + at,
                                                   piece_bytes(mover, n_bytes - at),
                                                   cudaMemcpyDeviceToHost, w->stream),
                                   "storing KV", error));
            KVL_TRY(
                kvl_cuda_check(cudaEventRecord(w->events[slot], w->stream), "storing KV", error));
        }
        if (i == 0) continue;
        const size_t at = (i - 1) * mover->slot_bytes;
        const size_t slot = (i - 1) % mover->n_slots;
        KVL_TRY(kvl_cuda_check(cudaEventSynchronize(w->events[slot]), "storing KV", error));
        memcpy(host + at, w->slots + slot * mover->slot_bytes, piece_bytes(mover, n_bytes - at));
    }
    return KVL_OK;
}

kvl_status kvl_cuda_mover_store(kvl_cuda_mover *mover, void *host, const void *device,
                                size_t n_bytes, bool pinned, cudaStream_t after, kvl_error *error)
{
    way *w = &mover->out;
    KVL_TRY(kvl_cuda_check(cudaEventRecord(mover->computed, after), "storing KV", error));
    KVL_TRY(
        kvl_cuda_check(cudaStreamWaitEvent(w->stream, mover->computed, 0), "storing KV", error));
    if (!pinned) return store_by_slots(mover, host, device, n_bytes, error);
    return kvl_cuda_check(cudaMemcpyAsync(host, device, n_bytes, cudaMemcpyDeviceToHost, w->stream),
                          "storing KV", error);
}

kvl_status kvl_cuda_mover_order(kvl_cuda_mover *mover, cudaStream_t stream, kvl_error *error)
{
    KVL_TRY(kvl_cuda_check(cudaEventRecord(mover->loaded, mover->in.stream), "loading KV", error));
    return kvl_cuda_check(cudaStreamWaitEvent(stream, mover->loaded, 0), "loading KV", error);
}

kvl_status kvl_cuda_mover_mark(kvl_cuda_mover *mover, cudaEvent_t event, kvl_error *error)
{
    return kvl_cuda_check(cudaEventRecord(event, mover->in.stream), "loading KV", error);
}

kvl_status kvl_cuda_mover_finish(kvl_cuda_mover *mover, kvl_error *error)
{
    KVL_TRY(kvl_cuda_check(cudaStreamSynchronize(mover->in.stream), "loading KV", error));
    return kvl_cuda_check(cudaStreamSynchronize(mover->out.stream), "storing KV", error);
}
