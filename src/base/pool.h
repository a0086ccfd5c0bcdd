/* base/pool.h: a fixed set of threads that share out the items of one loop at a time.
 *
 * The caller is one of the threads. Items are taken in order from a counter; which thread gets
 * which item is open, so a result may depend on the item only. Workers spin for a few microseconds
 * before they sleep, because decoding starts some two hundred loops per token.
 * Threads  One thread at a time may call kvl_pool_run; a pool must not be used inside its loop. */
#ifndef KVL_BASE_POOL_H
#define KVL_BASE_POOL_H

#include "base/status.h"

#define KVL_POOL_THREADS_MAX 256u

typedef struct kvl_pool kvl_pool;

/* item: 0 .. n_items - 1; thread: 0 .. n_threads - 1, the caller of kvl_pool_run is 0. */
typedef void kvl_pool_task(void *context, size_t item, size_t thread);

/* n_threads: 0 for one a processor that this process may use. Where `pinned`, each thread is bound
 * to one of those processors (the calling thread too, from its first kvl_pool_run on).
 * Owns     *pool: ended with kvl_pool_destroy
 * Errors   KVL_ERR_OUT_OF_RANGE (more than KVL_POOL_THREADS_MAX), KVL_ERR_NO_MEMORY, KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_pool_create(size_t n_threads, bool pinned, kvl_pool **pool,
                                        kvl_error *error);
/* Waits for the threads to end. NULL does nothing. */
void kvl_pool_destroy(kvl_pool *pool);

size_t kvl_pool_n_threads(const kvl_pool *pool);

/* Runs task for every item and returns when all are done. Blocks. */
void kvl_pool_run(kvl_pool *pool, kvl_pool_task *task, void *context, size_t n_items);

#endif /* KVL_BASE_POOL_H */
