/* segment/spare.h: large buffers that ended containers leave to the next ones.
 * Threads  Safe from any thread. */
#ifndef KVL_SEGMENT_SPARE_H
#define KVL_SEGMENT_SPARE_H

#include "base/alloc.h"

/* The memory of one container. */
typedef struct kvl_spare {
    void *bytes; /* aligned to KVL_ALIGNMENT, with whatever content */
    size_t capacity;
    int fd;         /* of shared memory, as kvl_alloc_shared makes it; -1: of the heap */
    bool is_zeroed; /* never used before, and so zero all over */
} kvl_spare;

/* False when there is no memory. `size` > 0. Shared memory where the process wants it for this size
 * (kvl_container_use_shared_memory) and the system gives it.
 * Owns     the caller, who ends it with kvl_spare_give */
KVL_MUST_USE bool kvl_spare_take(size_t size, kvl_spare *memory);

/* Memory that was lent to another process may not be used again, for nobody can tell whether it is
 * still read there. Bytes NULL does nothing. */
void kvl_spare_give(kvl_spare memory, bool may_be_used_again);

#endif /* KVL_SEGMENT_SPARE_H */
