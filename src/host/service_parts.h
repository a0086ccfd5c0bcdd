/* host/service_parts.h: what service.c and stream.c share; private to them. */
#ifndef KVL_HOST_SERVICE_PARTS_H
#define KVL_HOST_SERVICE_PARTS_H

#include "host/service.h"

#include <pthread.h>

/* Two hold a stream: its reader until it is closed, and the service until its last item. */
struct kvl_stream {
    pthread_mutex_t lock;
    pthread_cond_t filled;
    kvl_stream_item *first, *last;
    uint32_t n_holders;
    bool is_over;   /* the last item has been put in */
    bool is_closed; /* by the reader */
    /* The engine thread's. */
    kvl_stream *next; /* of the service's streams */
    uint64_t id;      /* of the scheduler; 0: not submitted yet */
    bool is_cancelled;
    bool has_ended; /* the scheduler has told of the last answer */
    /* The request, until it is submitted. */
    kvl_generation asked;
    uint32_t *ids;
    kvl_text_run *texts;
    char *stop_bytes;
    const char **stops;
};

/* Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_stream_create(const kvl_generation *asked, kvl_stream **stream,
                                          kvl_error *error);
/* One holder less; without any the stream ends. */
void kvl_stream_release(kvl_stream *stream);
/* Puts an item in for the reader. Without memory for it, the stream ends with what fits: a reader
 * then sees a failed ending without text. */
void kvl_stream_put(kvl_stream *stream, const kvl_generation_event *event);
/* Its reader has closed it, or would find no more in it, since memory was short. */
bool kvl_stream_is_unread(kvl_stream *stream);

/* ---- look.c ---- */

/* A question about the prefix tree. Two hold it: who asks, and the queue until it is answered. */
typedef struct service_look service_look;

/* NULL without memory. */
service_look *service_look_create(uint64_t salt);
/* The engine thread's: answers, tree NULL: with KVL_ERR_CANCELLED; and lets go of it. */
void service_look_answer(service_look *look, const kvl_prefix_tree *tree);
/* Who asks waits, has what was answered, or KVL_ERR_TIMEOUT, and lets go of it. */
KVL_MUST_USE kvl_status service_look_wait(service_look *look, uint32_t timeout_ms,
                                          kvl_prefix_view *view);
void service_look_release(service_look *look);

/* ---- stream.c ---- */

/* A condition whose waits end by the monotonic clock, and when a wait that begins now ends. */
void service_cond_init(pthread_cond_t *cond);
struct timespec service_deadline(uint32_t timeout_ms);

#endif /* KVL_HOST_SERVICE_PARTS_H */
