/* host/service.h: the engine thread of a server: other threads start answers and read them as they
 * come.
 *
 * A service takes requests from a bounded queue, runs the scheduler's steps, and puts what comes of
 * them into a stream for each request. A full queue is KVL_ERR_BUSY at once. A stream holds at most
 * the tokens of its answers, so a slow reader holds nobody up. Closing a stream that is not over
 * cancels its answers. */
#ifndef KVL_HOST_SERVICE_H
#define KVL_HOST_SERVICE_H

#include "cache/prefix_tree.h"
#include "host/scheduler.h"

typedef struct kvl_service kvl_service;

/* Borrows the engine until it is destroyed.
 * Owns     *service: ended with kvl_service_destroy, after all its streams are closed
 * Errors   those of kvl_scheduler_create */
KVL_MUST_USE kvl_status kvl_service_create(kvl_engine *engine, const kvl_scheduler_options *options,
                                           kvl_service **service, kvl_error *error);
/* After kvl_service_run has returned. NULL does nothing. */
void kvl_service_destroy(kvl_service *service);

const kvl_engine *kvl_service_engine(const kvl_service *service);

/* Takes the calling thread as the engine thread until kvl_service_stop. What is under way then is
 * cancelled. */
void kvl_service_run(kvl_service *service);
/* Any thread, any number of times. */
void kvl_service_stop(kvl_service *service);

/* Has work(context, is_idle) called on the engine thread between two steps, and once after every
 * wake. is_idle: no answer is under way. Where it then returns true, for there is more to do, it is
 * called again without a wake. Before kvl_service_run. */
void kvl_service_attach(kvl_service *service, bool (*work)(void *context, bool is_idle),
                        void *context);
/* Has feed(context, scheduler) called on the engine thread before each step, to submit requests of
 * the background. Before kvl_service_run. When the service stops, what runs is cancelled. */
void kvl_service_feed(kvl_service *service, void (*feed)(void *context, kvl_scheduler *scheduler),
                      void *context);
/* What fill has made of a prompt. */
typedef struct kvl_filled {
    kvl_sequence
        sequence; /* its KV; where n_ids is 0, nothing: the prompt is computed as any other */
    uint32_t n_cached;
    kvl_reuse_report report;
    bool is_answered; /* the request's event was called to its last: there is nothing to submit */
} kvl_filled;

/* Has fill(context, asked, filled) called on the engine thread for requests of a quality that is
 * not exact, before they are submitted: it takes as long as it takes, and everybody waits. Without
 * it these are refused. Before kvl_service_run. */
typedef kvl_status (*kvl_service_filler)(void *context, const kvl_generation *asked,
                                         kvl_filled *filled, kvl_error *error);
void kvl_service_fill(kvl_service *service, kvl_service_filler fill, void *context);
/* Whether there is one. Any thread, once the service runs. */
bool kvl_service_fills(const kvl_service *service);
/* Lets the engine thread look for attached work. Any thread. */
void kvl_service_wake(kvl_service *service);

/* ---- streams: any thread, one at a time each ---- */

typedef struct kvl_stream kvl_stream;

/* A kvl_generation_event that the reader owns: ended with kvl_stream_item_destroy. */
typedef struct kvl_stream_item {
    struct kvl_stream_item *next; /* private */
    uint32_t branch;
    bool has_token;
    kvl_drawn drawn; /* where has_token */
    kvl_finish finish;
    uint32_t n_tokens, n_cached;
    kvl_reuse_report reuse;
    bool is_last;
    kvl_status status; /* where failed */
    char *error_text;  /* likewise; may be NULL */
    size_t n_text_bytes;
    char text[];
} kvl_stream_item;

/* Queues a request; its event and context are not used. What the scheduler refuses comes as an item
 * of branch 0 that is failed and the last.
 * Owns     *stream: ended with kvl_stream_close
 * Errors   KVL_ERR_BUSY, KVL_ERR_CANCELLED (stopping), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_service_start(kvl_service *service, const kvl_generation *generation,
                                          kvl_stream **stream, kvl_error *error);
/* Waits for the next item: *item is NULL when none came in time, and after the last. False when
 * there will be no more. */
bool kvl_stream_next(kvl_stream *stream, uint32_t timeout_ms, kvl_stream_item **item);
void kvl_stream_item_destroy(kvl_stream_item *item);
/* NULL does nothing. */
void kvl_stream_close(kvl_stream *stream);

/* ---- state: any thread ---- */

typedef struct kvl_service_state {
    kvl_scheduler_stats scheduler;
    uint32_t n_streams;   /* not over */
    int64_t last_step_ns; /* monotonic: when the engine thread last got on */
    bool is_running;
} kvl_service_state;

/* What the engine's prefix tree has of a salt (kvl_prefix_tree_look), as the engine thread sees it
 * between two steps.
 * Errors   KVL_ERR_TIMEOUT (it did not come to it in time), KVL_ERR_BUSY, KVL_ERR_CANCELLED
 *          (stopping), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_service_look(kvl_service *service, uint64_t salt, uint32_t timeout_ms,
                                         kvl_prefix_view *view);

void kvl_service_state_read(kvl_service *service, kvl_service_state *state);

#endif /* KVL_HOST_SERVICE_H */
