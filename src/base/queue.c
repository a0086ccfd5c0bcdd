/* base/queue.c: a ring under one lock. */
#include "base/queue.h"

#include "base/alloc.h"

#include <pthread.h>

struct kvl_queue {
    pthread_mutex_t lock;
    pthread_cond_t filled;
    size_t n_max, n, first;
    bool closed;
    void *items[];
};

kvl_status kvl_queue_create(size_t n_max, kvl_queue **queue)
{
    KVL_ASSERT(n_max > 0);
    *queue = NULL;
    size_t n_bytes = 0;
    if (!kvl_size_mul(n_max, sizeof(void *), &n_bytes) ||
        !kvl_size_add(n_bytes, sizeof(kvl_queue), &n_bytes))
        return KVL_ERR_NO_MEMORY;
    kvl_queue *made = kvl_alloc_zero(1, n_bytes);
    if (made == NULL) return KVL_ERR_NO_MEMORY;
    made->n_max = n_max;
    (void)pthread_mutex_init(&made->lock, NULL);
    (void)pthread_cond_init(&made->filled, NULL);
    *queue = made;
    return KVL_OK;
}

void kvl_queue_destroy(kvl_queue *queue)
{
    if (queue == NULL) return;
    pthread_cond_destroy(&queue->filled);
    pthread_mutex_destroy(&queue->lock);
    kvl_free(queue);
}

kvl_status kvl_queue_push(kvl_queue *queue, void *item)
{
    KVL_ASSERT(item != NULL);
    kvl_status status = KVL_OK;
    pthread_mutex_lock(&queue->lock);
    if (queue->closed) {
        status = KVL_ERR_CANCELLED;
    } else if (queue->n == queue->n_max) {
        status = KVL_ERR_BUSY;
    } else {
        queue->items[(queue->first + queue->n) % queue->n_max] = item;
        queue->n++;
        pthread_cond_signal(&queue->filled);
    }
    pthread_mutex_unlock(&queue->lock);
    return status;
}

/* With the lock held. */
static void *take_first(kvl_queue *queue)
{
    if (queue->n == 0) return NULL;
    void *item = queue->items[queue->first];
    queue->first = (queue->first + 1) % queue->n_max;
    queue->n--;
    return item;
}

void *kvl_queue_pop(kvl_queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    while (queue->n == 0 && !queue->closed) pthread_cond_wait(&queue->filled, &queue->lock);
    void *item = take_first(queue);
    pthread_mutex_unlock(&queue->lock);
    return item;
}

void *kvl_queue_try_pop(kvl_queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    void *item = take_first(queue);
    pthread_mutex_unlock(&queue->lock);
    return item;
}

void kvl_queue_close(kvl_queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    queue->closed = true;
    pthread_cond_broadcast(&queue->filled);
    pthread_mutex_unlock(&queue->lock);
}
