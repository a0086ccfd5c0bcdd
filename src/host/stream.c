/* host/stream.c: a list of items under a lock, with two holders. */
#include "base/alloc.h"
#include "base/clock.h"
#include "host/service_parts.h"

#include <string.h>
#include <time.h>

static void destroy(kvl_stream *stream)
{
    while (stream->first != NULL) {
        kvl_stream_item *next = stream->first->next;
        kvl_stream_item_destroy(stream->first);
        stream->first = next;
    }
    pthread_cond_destroy(&stream->filled);
    pthread_mutex_destroy(&stream->lock);
    kvl_free(stream->ids);
    kvl_free(stream->texts);
    kvl_free(stream->stops);
    kvl_free(stream->stop_bytes);
    kvl_free(stream);
}

static kvl_status copy_stops(const kvl_generation *asked, kvl_stream *stream)
{
    size_t n_bytes = 0;
    for (uint32_t i = 0; i < asked->n_stops; i++) n_bytes += strlen(asked->stops[i]) + 1;
    if (n_bytes == 0) return KVL_OK;
    stream->stops = kvl_alloc_zero(asked->n_stops, sizeof *stream->stops);
    stream->stop_bytes = kvl_alloc(n_bytes);
    if (stream->stops == NULL || stream->stop_bytes == NULL) return KVL_ERR_NO_MEMORY;
    char *at = stream->stop_bytes;
    for (uint32_t i = 0; i < asked->n_stops; i++) {
        const size_t n = strlen(asked->stops[i]) + 1;
        memcpy(at, asked->stops[i], n);
        stream->stops[i] = at;
        at += n;
    }
    return KVL_OK;
}

kvl_status kvl_stream_create(const kvl_generation *asked, kvl_stream **stream, kvl_error *error)
{
    *stream = NULL;
    kvl_stream *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a stream");
    service_cond_init(&made->filled);
    (void)pthread_mutex_init(&made->lock, NULL);
    made->n_holders = 2;
    made->asked = *asked;
    made->ids = asked->n_ids == 0 ? NULL : kvl_alloc_zero(asked->n_ids, sizeof *made->ids);
    if (asked->n_texts > 0) made->texts = kvl_alloc_zero(asked->n_texts, sizeof *made->texts);
    if ((asked->n_ids > 0 && made->ids == NULL) || (asked->n_texts > 0 && made->texts == NULL) ||
        copy_stops(asked, made) != KVL_OK) {
        destroy(made);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a request");
    }
    if (asked->n_ids > 0) memcpy(made->ids, asked->ids, asked->n_ids * sizeof *made->ids);
    if (asked->n_texts > 0) memcpy(made->texts, asked->texts, asked->n_texts * sizeof *made->texts);
    made->asked.texts = made->texts;
    made->asked.ids = made->ids;
    made->asked.stops = made->stops;
    *stream = made;
    return KVL_OK;
}

void kvl_stream_release(kvl_stream *stream)
{
    pthread_mutex_lock(&stream->lock);
    const bool was_last = --stream->n_holders == 0;
    pthread_mutex_unlock(&stream->lock);
    if (was_last) destroy(stream);
}

bool kvl_stream_is_unread(kvl_stream *stream)
{
    pthread_mutex_lock(&stream->lock);
    const bool is_unread = stream->is_closed || stream->is_over;
    pthread_mutex_unlock(&stream->lock);
    return is_unread;
}

static kvl_stream_item *copy_event(const kvl_generation_event *event)
{
    kvl_stream_item *item = kvl_alloc(sizeof *item + event->n_text_bytes);
    if (item == NULL) return NULL;
    *item = (kvl_stream_item){.branch = event->branch,
                              .has_token = event->drawn != NULL,
                              .finish = event->finish,
                              .n_tokens = event->n_tokens,
                              .n_cached = event->n_cached,
                              .reuse = event->reuse,
                              .is_last = event->is_last,
                              .n_text_bytes = event->n_text_bytes};
    if (event->drawn != NULL) item->drawn = *event->drawn;
    if (event->error != NULL) {
        item->status = event->error->status;
        item->error_text = kvl_strdup(event->error->text);
    }
    memcpy(item->text, event->text, event->n_text_bytes);
    return item;
}

void kvl_stream_put(kvl_stream *stream, const kvl_generation_event *event)
{
    kvl_stream_item *item = copy_event(event);
    pthread_mutex_lock(&stream->lock);
    if (item != NULL) {
        if (stream->last != NULL) stream->last->next = item;
        if (stream->first == NULL) stream->first = item;
        stream->last = item;
    }
    stream->is_over = stream->is_over || event->is_last || item == NULL;
    pthread_cond_signal(&stream->filled);
    pthread_mutex_unlock(&stream->lock);
    stream->has_ended = stream->has_ended || event->is_last;
}

void service_cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t attributes;
    (void)pthread_condattr_init(&attributes);
    (void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    (void)pthread_cond_init(cond, &attributes);
    (void)pthread_condattr_destroy(&attributes);
}

struct timespec service_deadline(uint32_t timeout_ms)
{
    const int64_t at = kvl_clock_now(kvl_clock_system()) + timeout_ms * KVL_NS_PER_MS;
    return (struct timespec){.tv_sec = at / KVL_NS_PER_S, .tv_nsec = at % KVL_NS_PER_S};
}

bool kvl_stream_next(kvl_stream *stream, uint32_t timeout_ms, kvl_stream_item **item)
{
    const struct timespec deadline = service_deadline(timeout_ms);
    pthread_mutex_lock(&stream->lock);
    int waited = 0;
    while (stream->first == NULL && !stream->is_over && waited == 0)
        waited = pthread_cond_timedwait(&stream->filled, &stream->lock, &deadline);
    *item = stream->first;
    if (*item != NULL) {
        stream->first = (*item)->next;
        if (stream->first == NULL) stream->last = NULL;
        (*item)->next = NULL;
    }
    const bool more = *item != NULL || !stream->is_over;
    pthread_mutex_unlock(&stream->lock);
    return more;
}

void kvl_stream_item_destroy(kvl_stream_item *item)
{
    if (item == NULL) return;
    kvl_free(item->error_text);
    kvl_free(item);
}

void kvl_stream_close(kvl_stream *stream)
{
    if (stream == NULL) return;
    pthread_mutex_lock(&stream->lock);
    stream->is_closed = true;
    pthread_mutex_unlock(&stream->lock);
    kvl_stream_release(stream);
}
