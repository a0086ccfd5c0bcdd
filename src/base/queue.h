/* base/queue.h: a bounded queue of pointers between threads. A full queue says so at once: back-
 * pressure reaches the caller as "busy", and nothing grows.
 * Threads  Any number may push and pop. */
#ifndef KVL_BASE_QUEUE_H
#define KVL_BASE_QUEUE_H

#include "base/status.h"

typedef struct kvl_queue kvl_queue;

/* n_max: 1 or more. Owns *queue: ended with kvl_queue_destroy.
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_queue_create(size_t n_max, kvl_queue **queue);
/* What is still in it is the caller's business: pop it first. NULL does nothing. */
void kvl_queue_destroy(kvl_queue *queue);

/* Takes `item` (not NULL). Errors   KVL_ERR_BUSY (full), KVL_ERR_CANCELLED (closed): the caller
 * still has it. Never blocks. */
KVL_MUST_USE kvl_status kvl_queue_push(kvl_queue *queue, void *item);
/* Waits for an item; NULL when the queue is closed and empty. */
void *kvl_queue_pop(kvl_queue *queue);
/* The same without waiting: NULL when it is empty. */
void *kvl_queue_try_pop(kvl_queue *queue);
/* No more pushes; waiting pops end when the queue is empty. May be called twice. */
void kvl_queue_close(kvl_queue *queue);

#endif /* KVL_BASE_QUEUE_H */
