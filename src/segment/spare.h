/* segment/spare.h: large buffers that ended containers leave to the next ones.
 * Threads  Safe from any thread. */
#ifndef KVL_SEGMENT_SPARE_H
#define KVL_SEGMENT_SPARE_H

#include "base/status.h"

/* Aligned to KVL_ALIGNMENT, with whatever content; NULL when there is no memory. `size` > 0.
 * Owns     the caller, who ends it with kvl_spare_give and the same *capacity */
KVL_MUST_USE void *kvl_spare_take(size_t size, size_t *capacity);

/* NULL does nothing. */
void kvl_spare_give(void *bytes, size_t capacity);

#endif /* KVL_SEGMENT_SPARE_H */
