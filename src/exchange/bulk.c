/* exchange/bulk.c: counted bytes and frames. */
#include "exchange/bulk.h"

#include "base/alloc.h"

#include <stdatomic.h>
#include <string.h>

struct kvl_bulk {
    _Atomic int64_t references;
    size_t n_bytes;
    uint8_t bytes[];
};

kvl_bulk *kvl_bulk_create(size_t n_bytes)
{
    size_t size = 0;
    if (!kvl_size_add(sizeof(kvl_bulk), n_bytes, &size)) return NULL;
    kvl_bulk *bulk = kvl_alloc(size);
    if (bulk == NULL) return NULL;
    atomic_init(&bulk->references, 1);
    bulk->n_bytes = n_bytes;
    return bulk;
}

kvl_bulk *kvl_bulk_copy(const void *bytes, size_t n_bytes)
{
    kvl_bulk *bulk = kvl_bulk_create(n_bytes);
    if (bulk != NULL && n_bytes > 0) memcpy(bulk->bytes, bytes, n_bytes);
    return bulk;
}

void kvl_bulk_share(kvl_bulk *bulk)
{
    (void)atomic_fetch_add_explicit(&bulk->references, 1, memory_order_relaxed);
}

void kvl_bulk_release(kvl_bulk *bulk)
{
    if (bulk == NULL) return;
    const int64_t before = atomic_fetch_sub_explicit(&bulk->references, 1, memory_order_acq_rel);
    KVL_ASSERT(before >= 1);
    if (before == 1) kvl_free(bulk);
}

uint8_t *kvl_bulk_bytes(kvl_bulk *bulk)
{
    return bulk->bytes;
}

size_t kvl_bulk_size(const kvl_bulk *bulk)
{
    return bulk->n_bytes;
}

size_t kvl_frames_cut(const void *bytes, size_t n_bytes, kvl_frame frames[KVL_FRAMES_MAX])
{
    size_t n = 0;
    for (size_t at = 0; at < n_bytes; n++) {
        KVL_ASSERT(n < KVL_FRAMES_MAX);
        const size_t rest = n_bytes - at;
        frames[n].bytes = (const uint8_t *)bytes + at;
        frames[n].n_bytes = rest < KVL_FRAME_BYTES_MAX ? rest : KVL_FRAME_BYTES_MAX;
        at += frames[n].n_bytes;
    }
    return n;
}

void kvl_frames_join(const kvl_frame *frames, size_t n_frames, uint8_t *bytes)
{
    for (size_t i = 0; i < n_frames; i++) {
        if (frames[i].n_bytes > 0) memcpy(bytes, frames[i].bytes, frames[i].n_bytes);
        bytes += frames[i].n_bytes;
    }
}

size_t kvl_frames_bytes(const kvl_frame *frames, size_t n_frames)
{
    size_t n_bytes = 0;
    for (size_t i = 0; i < n_frames; i++) n_bytes += frames[i].n_bytes;
    return n_bytes;
}
