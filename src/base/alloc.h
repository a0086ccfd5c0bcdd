/* base/alloc.h: the one way to memory from the heap, counted and failable.
 *
 * Every room allocates through here, so that tests can make the N-th allocation fail and check
 * that nothing leaks. A count that comes from outside is multiplied with kvl_size_mul and checked
 * against its limit before it gets here.
 * Threads  Safe from any thread. */
#ifndef KVL_BASE_ALLOC_H
#define KVL_BASE_ALLOC_H

#include "base/status.h"

/* Cache line, AVX-512 vector and the alignment of blocks in segments. */
#define KVL_ALIGNMENT 64u

/* Owns: the caller ends it with kvl_free. NULL when there is none or `size` is 0. */
KVL_MUST_USE void *kvl_alloc(size_t size);

/* Same, zeroed: n elements of `size` bytes; NULL when the product overflows. */
KVL_MUST_USE void *kvl_alloc_zero(size_t n, size_t size);

/* Same as kvl_alloc, aligned to KVL_ALIGNMENT. Ended with kvl_free too. */
KVL_MUST_USE void *kvl_alloc_aligned(size_t size);

/* Changes the size of memory from kvl_alloc or kvl_alloc_zero (never of aligned memory). On NULL
 * the caller still has the old memory. `memory` may be NULL. */
KVL_MUST_USE void *kvl_realloc(void *memory, size_t size);

/* NULL does nothing. */
void kvl_free(void *memory);

/* Copies a text that ends with NUL. Owns: the caller ends it with kvl_free. */
KVL_MUST_USE char *kvl_strdup(const char *text);

/* product = a * b; false on overflow, and then *product is untouched. */
KVL_MUST_USE bool kvl_size_mul(size_t a, size_t b, size_t *product);
KVL_MUST_USE bool kvl_size_add(size_t a, size_t b, size_t *sum);

/* Memory that other processes can be given to read: an anonymous file that is mapped here for
 * writing. Sealed from the start: whoever gets `fd` can map it for reading, and can neither write
 * to it nor change its size, so no reader can be harmed by another one or by a file cut short. */
typedef struct kvl_shared_memory {
    void *bytes; /* of whole pages, zeroed */
    size_t n_bytes;
    int fd;
} kvl_shared_memory;

/* False, and nothing is made, where there is no memory, no descriptor or no such file.
 * Owns     *memory: ended with kvl_free_shared; readers keep what they mapped until they unmap */
KVL_MUST_USE bool kvl_alloc_shared(size_t size, kvl_shared_memory *memory);
/* One that was never made (bytes NULL) does nothing. */
void kvl_free_shared(kvl_shared_memory *memory);
/* Asks for huge pages in memory or a map that has not been touched yet, where it is large enough.
 * Of shared files the system follows only where
 * /sys/kernel/mm/transparent_hugepage/shmem_enabled says advise: then whoever maps 16 MiB faults 8
 * times instead of 4,096, and copies out of it as fast as memcpy (19 GB/s instead of 6 on the
 * machine where this was written). */
void kvl_advise_huge(void *bytes, size_t n_bytes);

/* For tests. The allocation after `n_allowed` more fails, and all later ones with it; a negative
 * number switches failing off. */
void kvl_alloc_fail_after(int64_t n_allowed);
/* Allocations that have not been freed. */
int64_t kvl_alloc_live(void);

#endif /* KVL_BASE_ALLOC_H */
