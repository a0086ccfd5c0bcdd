/* spare.c: a few large buffers are kept instead of freed.
 *
 * A host fetches one container after another, each some 10 MiB. The C library gives memory of that
 * size back to the system when it is freed, and the system hands out the next buffer page by page,
 * each page faulted in and cleared: filling it then takes several times as long as the copy alone.
 * A buffer that was touched before costs nothing. Fresh ones ask for huge pages, which makes their
 * first touch cheaper where the system grants them. */
#include "segment/spare.h"

#include "base/alloc.h"
#include "segment/container.h"

#include <pthread.h>
#include <stdatomic.h>

enum { SPARES_MAX = 4 };

static const size_t SPARE_BYTES_MIN = (size_t)1 << 20;
static const size_t SPARE_BYTES_MAX = (size_t)256 << 20;

/* Containers from this size on are made in shared memory; SIZE_MAX: none. */
static _Atomic size_t shared_bytes_min = SIZE_MAX;

/* Oldest first. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static kvl_spare spares[SPARES_MAX];
static size_t n_spares;
static size_t n_spare_bytes;

static kvl_spare remove_at(size_t index)
{
    const kvl_spare removed = spares[index];
    n_spares--;
    n_spare_bytes -= removed.capacity;
    for (size_t i = index; i < n_spares; i++) spares[i] = spares[i + 1];
    return removed;
}

/* The smallest that fits and is not more than twice as large: a large buffer under a small
 * container would be memory that no cap of a store counts. */
static bool find_fit(size_t size, bool shared, kvl_spare *memory)
{
    size_t best = SPARES_MAX;
    for (size_t i = 0; i < n_spares; i++) {
        if (spares[i].capacity < size || spares[i].capacity / 2 > size) continue;
        if ((spares[i].fd >= 0) != shared) continue;
        if (best == SPARES_MAX || spares[i].capacity < spares[best].capacity) best = i;
    }
    if (best == SPARES_MAX) return false;
    *memory = remove_at(best);
    return true;
}

static bool make(size_t size, bool shared, kvl_spare *memory)
{
    if (shared) {
        kvl_shared_memory made;
        if (kvl_alloc_shared(size, &made)) {
            *memory = (kvl_spare){made.bytes, made.n_bytes, made.fd, true};
        } else {
            /* Without a descriptor the container is as good as any, it only cannot be lent. */
            *memory = (kvl_spare){kvl_alloc_aligned(size), size, -1, false};
        }
    } else {
        *memory = (kvl_spare){kvl_alloc_aligned(size), size, -1, false};
    }
    if (memory->bytes == NULL) return false;
    kvl_advise_huge(memory->bytes, size);
    return true;
}

static void end(kvl_spare memory)
{
    if (memory.fd < 0) {
        kvl_free(memory.bytes);
    } else {
        kvl_shared_memory shared = {memory.bytes, memory.capacity, memory.fd};
        kvl_free_shared(&shared);
    }
}

bool kvl_spare_take(size_t size, kvl_spare *memory)
{
    KVL_ASSERT(size > 0);
    const bool shared = size >= atomic_load_explicit(&shared_bytes_min, memory_order_relaxed);
    if (size >= SPARE_BYTES_MIN) {
        (void)pthread_mutex_lock(&lock);
        const bool found = find_fit(size, shared, memory);
        (void)pthread_mutex_unlock(&lock);
        if (found) return true;
    }
    return make(size, shared, memory);
}

void kvl_spare_give(kvl_spare memory, bool may_be_used_again)
{
    if (memory.bytes == NULL) return;
    memory.is_zeroed = false;
    if (!may_be_used_again || memory.capacity < SPARE_BYTES_MIN ||
        memory.capacity > SPARE_BYTES_MAX) {
        end(memory);
        return;
    }
    kvl_spare dropped[SPARES_MAX];
    size_t n_dropped = 0;
    (void)pthread_mutex_lock(&lock);
    while (n_spares == SPARES_MAX || n_spare_bytes > SPARE_BYTES_MAX - memory.capacity)
        dropped[n_dropped++] = remove_at(0);
    spares[n_spares++] = memory;
    n_spare_bytes += memory.capacity;
    (void)pthread_mutex_unlock(&lock);
    for (size_t i = 0; i < n_dropped; i++) end(dropped[i]);
}

void kvl_container_spare_clear(void)
{
    (void)pthread_mutex_lock(&lock);
    while (n_spares > 0) end(remove_at(n_spares - 1));
    (void)pthread_mutex_unlock(&lock);
}

void kvl_container_use_shared_memory(size_t n_bytes_min)
{
    atomic_store(&shared_bytes_min, n_bytes_min == 0 ? SIZE_MAX : n_bytes_min);
}
