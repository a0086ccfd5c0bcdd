/* base/alloc.c: the heap behind a counter and a switch. */
#include "base/alloc.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* From this size on, memory asks for huge pages: touching 1 GiB in small pages took 1 to 3 s, in
 * huge ones 0.2 s, and a pass over it misses the translation cache less often. */
enum { HUGE_PAGE = 2 << 20, HUGE_FROM = 4 << 20 };

static _Atomic int64_t live;
static _Atomic int64_t allowed = -1;

static bool may_allocate(void)
{
    int64_t left = atomic_load(&allowed);
    while (left > 0) {
        if (atomic_compare_exchange_weak(&allowed, &left, left - 1)) return true;
    }
    return left < 0;
}

static void *counted(void *memory)
{
    if (memory != NULL) atomic_fetch_add(&live, 1);
    return memory;
}

void *kvl_alloc(size_t size)
{
    if (size == 0 || !may_allocate()) return NULL;
    return counted(malloc(size));
}

void *kvl_alloc_zero(size_t n, size_t size)
{
    size_t bytes = 0;
    if (!kvl_size_mul(n, size, &bytes) || bytes == 0 || !may_allocate()) return NULL;
    return counted(calloc(n, size));
}

void *kvl_alloc_aligned(size_t size)
{
    size_t padded = 0;
    if (size == 0 || !kvl_size_add(size, KVL_ALIGNMENT - 1, &padded) || !may_allocate())
        return NULL;
    if (size < HUGE_FROM)
        return counted(aligned_alloc(KVL_ALIGNMENT, padded / KVL_ALIGNMENT * KVL_ALIGNMENT));
    if (!kvl_size_add(size, HUGE_PAGE - 1, &padded)) return NULL;
    padded = padded / HUGE_PAGE * HUGE_PAGE;
    void *memory = aligned_alloc(HUGE_PAGE, padded);
    /* Advice: where it is not taken, the memory is as good, only slower to touch. */
    if (memory != NULL) (void)madvise(memory, padded, MADV_HUGEPAGE);
    return counted(memory);
}

void *kvl_realloc(void *memory, size_t size)
{
    if (memory == NULL) return kvl_alloc(size);
    if (size == 0 || !may_allocate()) return NULL;
    return realloc(memory, size);
}

void kvl_free(void *memory)
{
    if (memory == NULL) return;
    atomic_fetch_sub(&live, 1);
    free(memory);
}

/* Only whole huge pages inside the memory; a refusal changes nothing but speed. */
void kvl_advise_huge(void *bytes, size_t n_bytes)
{
    const uintptr_t start = (uintptr_t)bytes;
    const uintptr_t first = (start + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const uintptr_t past = (start + n_bytes) / HUGE_PAGE * HUGE_PAGE;
    if (past > first) (void)madvise((void *)first, past - first, MADV_HUGEPAGE);
}

/* The seal against future writers comes after our own map for writing, which stays. */
bool kvl_alloc_shared(size_t size, kvl_shared_memory *memory)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t padded = 0;
    *memory = (kvl_shared_memory){NULL, 0, -1};
    if (size == 0 || !kvl_size_add(size, page - 1, &padded) || !may_allocate()) return false;
    padded = padded / page * page;
    const int fd = memfd_create("kvloom", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) return false;
    void *bytes = MAP_FAILED;
    if (ftruncate(fd, (off_t)padded) == 0)
        bytes = mmap(NULL, padded, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    const int seals = F_SEAL_FUTURE_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    if (bytes == MAP_FAILED || fcntl(fd, F_ADD_SEALS, seals) != 0) {
        if (bytes != MAP_FAILED) (void)munmap(bytes, padded);
        (void)close(fd);
        return false;
    }
    atomic_fetch_add(&live, 1);
    *memory = (kvl_shared_memory){bytes, padded, fd};
    return true;
}

void kvl_free_shared(kvl_shared_memory *memory)
{
    if (memory->bytes == NULL) return;
    (void)munmap(memory->bytes, memory->n_bytes);
    (void)close(memory->fd);
    atomic_fetch_sub(&live, 1);
    *memory = (kvl_shared_memory){NULL, 0, -1};
}

char *kvl_strdup(const char *text)
{
    const size_t size = strlen(text) + 1;
    char *copy = kvl_alloc(size);
    if (copy != NULL) memcpy(copy, text, size);
    return copy;
}

bool kvl_size_mul(size_t a, size_t b, size_t *product)
{
    size_t result;
    if (__builtin_mul_overflow(a, b, &result)) return false;
    *product = result;
    return true;
}

bool kvl_size_add(size_t a, size_t b, size_t *sum)
{
    size_t result;
    if (__builtin_add_overflow(a, b, &result)) return false;
    *sum = result;
    return true;
}

void kvl_alloc_fail_after(int64_t n_allowed)
{
    atomic_store(&allowed, n_allowed);
}

int64_t kvl_alloc_live(void)
{
    return atomic_load(&live);
}
