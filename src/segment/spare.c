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
#include <sys/mman.h>

enum { SPARES_MAX = 4 };

static const size_t SPARE_BYTES_MIN = (size_t)1 << 20;
static const size_t SPARE_BYTES_MAX = (size_t)256 << 20;
static const size_t HUGE_PAGE_BYTES = (size_t)2 << 20;

typedef struct spare {
    void *bytes;
    size_t capacity;
} spare;

/* Oldest first. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static spare spares[SPARES_MAX];
static size_t n_spares;
static size_t n_spare_bytes;

static spare remove_at(size_t index)
{
    const spare removed = spares[index];
    n_spares--;
    n_spare_bytes -= removed.capacity;
    for (size_t i = index; i < n_spares; i++) spares[i] = spares[i + 1];
    return removed;
}

/* The smallest that fits and is not more than twice as large: a large buffer under a small
 * container would be memory that no cap of a store counts. */
static spare find_fit(size_t size)
{
    size_t best = SPARES_MAX;
    for (size_t i = 0; i < n_spares; i++) {
        if (spares[i].capacity < size || spares[i].capacity / 2 > size) continue;
        if (best == SPARES_MAX || spares[i].capacity < spares[best].capacity) best = i;
    }
    return best == SPARES_MAX ? (spare){0} : remove_at(best);
}

/* Only whole huge pages inside the buffer; a refusal changes nothing but speed. */
static void ask_for_huge_pages(void *bytes, size_t size)
{
    const uintptr_t start = (uintptr_t)bytes;
    const uintptr_t first = (start + HUGE_PAGE_BYTES - 1) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    const uintptr_t past = (start + size) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    if (past > first) (void)madvise((void *)first, past - first, MADV_HUGEPAGE);
}

void *kvl_spare_take(size_t size, size_t *capacity)
{
    KVL_ASSERT(size > 0);
    if (size >= SPARE_BYTES_MIN) {
        (void)pthread_mutex_lock(&lock);
        const spare found = find_fit(size);
        (void)pthread_mutex_unlock(&lock);
        if (found.bytes != NULL) {
            *capacity = found.capacity;
            return found.bytes;
        }
    }
    void *bytes = kvl_alloc_aligned(size);
    if (bytes == NULL) return NULL;
    if (size >= HUGE_PAGE_BYTES) ask_for_huge_pages(bytes, size);
    *capacity = size;
    return bytes;
}

void kvl_spare_give(void *bytes, size_t capacity)
{
    if (bytes == NULL) return;
    if (capacity < SPARE_BYTES_MIN || capacity > SPARE_BYTES_MAX) {
        kvl_free(bytes);
        return;
    }
    void *dropped[SPARES_MAX];
    size_t n_dropped = 0;
    (void)pthread_mutex_lock(&lock);
    while (n_spares == SPARES_MAX || n_spare_bytes > SPARE_BYTES_MAX - capacity)
        dropped[n_dropped++] = remove_at(0).bytes;
    spares[n_spares++] = (spare){bytes, capacity};
    n_spare_bytes += capacity;
    (void)pthread_mutex_unlock(&lock);
    for (size_t i = 0; i < n_dropped; i++) kvl_free(dropped[i]);
}

void kvl_container_spare_clear(void)
{
    (void)pthread_mutex_lock(&lock);
    while (n_spares > 0) kvl_free(remove_at(n_spares - 1).bytes);
    (void)pthread_mutex_unlock(&lock);
}
