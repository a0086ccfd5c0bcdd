/* host/waiting.h: the tasks of a host that wait for the engine thread; private to this room.
 *
 * Runs that only want an answer are taken in the order of host/order.h; every other task (status,
 * keep, heal, forget, stop, full prefills and what is compared with them) stays where it came: what
 * came before it goes before it, what came behind it goes behind it.
 * Threads  waiting_push any thread; the others the engine thread. */
#ifndef KVL_HOST_WAITING_H
#define KVL_HOST_WAITING_H

#include "base/clock.h"
#include "base/hash.h"
#include "base/queue.h"
#include "host.pb-c.h"
#include "host/order.h"

/* A text of a prompt whose KV at home may be had. */
typedef struct waiting_segment {
    kvl_digest id;
    uint32_t first, n_tokens;
} waiting_segment;

/* What a task's priority is estimated from: found once, looked at whenever somebody is chosen. */
typedef struct waiting_prompt {
    uint32_t *ids; /* [n_ids] */
    uint32_t n_ids;
    uint64_t salt;
    waiting_segment *segments; /* [n_segments] in order; none where all is computed */
    uint32_t n_segments;
} waiting_prompt;

typedef struct waiting_task {
    uint64_t id;
    uint64_t number; /* of arrival */
    int64_t arrived_ns;
    Kvloom__V1__HostTask *asked; /* NULL: it cannot be read */
    bool has_prompt;
    waiting_prompt prompt;
    size_t n_bytes;
    uint8_t body[];
} waiting_task;

typedef struct waiting_tasks {
    waiting_task **items; /* [n] as they came; room for KVL_HOST_TASKS_MAX */
    uint32_t n;
    uint64_t n_ever, n_moved; /* tasks; those that went before an earlier one */
    bool is_in_order;         /* of arrival: nobody is moved */
    kvl_order_options options;
    /* Of the prompt that was taken last. */
    waiting_prompt last;
} waiting_tasks;

struct kvl_host;

/* Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status waiting_init(waiting_tasks *waiting, bool is_in_order, kvl_error *error);
/* Ends those that wait. */
void waiting_deinit(waiting_tasks *waiting);

/* Copies a task into the host's queue. Errors   KVL_ERR_BUSY, KVL_ERR_CANCELLED, NO_MEMORY */
KVL_MUST_USE kvl_status waiting_push(struct kvl_host *host, uint64_t id, const void *body,
                                     size_t n_bytes);
/* The next one; ended with waiting_task_destroy. NULL: none came; with `waits`, the queue is closed
 * and all is done. */
waiting_task *waiting_next(struct kvl_host *host, bool waits);
/* Whether any wait. */
bool waiting_any(struct kvl_host *host);
void waiting_task_destroy(waiting_task *task);

/* Whether a prompt that waits, and was looked at, has a text of this id. */
bool waiting_wants(const struct kvl_host *host, const kvl_digest *id);

/* What a prompt saves now, by the indices of tree, store and exchange. */
kvl_order_item waiting_estimate(struct kvl_host *host, const waiting_task *task);

#endif /* KVL_HOST_WAITING_H */
