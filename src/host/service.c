/* host/service.c: the loop of the engine thread. */
#include "host/service.h"

#include "base/alloc.h"
#include "base/clock.h"
#include "base/queue.h"
#include "host/service_parts.h"

#include <stdatomic.h>

/* Beside the requests that may wait in the scheduler: a burst while one step runs. */
enum { COMMANDS_MAX = 1024 };

/* A stream to start, or a look to answer; NULL, both: to be woken only. */
typedef struct command {
    kvl_stream *stream;
    service_look *look;
} command;

struct kvl_service {
    kvl_engine *engine;
    kvl_scheduler *scheduler;
    kvl_queue *commands;
    kvl_stream *streams; /* not over; the engine thread's */
    bool (*work)(void *context, bool is_idle);
    void *work_context;
    void (*feed)(void *context, kvl_scheduler *scheduler);
    void *feed_context;
    kvl_service_filler fill;
    void *fill_context;
    _Atomic bool is_stopping;
    pthread_mutex_t lock; /* of state */
    kvl_service_state state;
};

kvl_status kvl_service_create(kvl_engine *engine, const kvl_scheduler_options *options,
                              kvl_service **service, kvl_error *error)
{
    *service = NULL;
    kvl_service *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a service");
    made->engine = engine;
    (void)pthread_mutex_init(&made->lock, NULL);
    kvl_status status = kvl_scheduler_create(engine, options, &made->scheduler, error);
    if (status == KVL_OK && kvl_queue_create(COMMANDS_MAX, &made->commands) != KVL_OK)
        status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a queue");
    if (status != KVL_OK) {
        kvl_service_destroy(made);
        return status;
    }
    kvl_scheduler_stats_read(made->scheduler, &made->state.scheduler);
    *service = made;
    return KVL_OK;
}

static void drop_streams(kvl_service *service)
{
    const kvl_generation_event end = {.text = "", .finish = KVL_FINISH_CANCELLED, .is_last = true};
    while (service->streams != NULL) {
        kvl_stream *stream = service->streams;
        service->streams = stream->next;
        kvl_stream_put(stream, &end);
        kvl_stream_release(stream);
    }
}

static void drop_commands(kvl_service *service)
{
    for (command *c = kvl_queue_try_pop(service->commands); c != NULL;
         c = kvl_queue_try_pop(service->commands)) {
        if (c->look != NULL) service_look_answer(c->look, NULL);
        if (c->stream != NULL) {
            c->stream->next = service->streams;
            service->streams = c->stream;
        }
        kvl_free(c);
    }
}

void kvl_service_destroy(kvl_service *service)
{
    if (service == NULL) return;
    if (service->commands != NULL) {
        kvl_queue_close(service->commands);
        drop_commands(service);
    }
    drop_streams(service);
    kvl_scheduler_destroy(service->scheduler);
    kvl_queue_destroy(service->commands);
    (void)pthread_mutex_destroy(&service->lock);
    kvl_free(service);
}

const kvl_engine *kvl_service_engine(const kvl_service *service)
{
    return service->engine;
}

/* ---- the engine thread ---- */

static void remember_state(kvl_service *service, bool is_running)
{
    kvl_service_state state = {.last_step_ns = kvl_clock_now(kvl_clock_system()),
                               .is_running = is_running};
    kvl_scheduler_stats_read(service->scheduler, &state.scheduler);
    for (const kvl_stream *stream = service->streams; stream != NULL; stream = stream->next)
        state.n_streams++;
    pthread_mutex_lock(&service->lock);
    service->state = state;
    pthread_mutex_unlock(&service->lock);
}

static void pass_on(void *context, const kvl_generation_event *event)
{
    kvl_stream_put(context, event);
}

static kvl_status submit_filled(kvl_service *service, kvl_stream *stream, kvl_error *error)
{
    kvl_filled filled = {.n_cached = 0};
    if (service->fill == NULL)
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED, "this server has no store of texts");
    KVL_TRY(service->fill(service->fill_context, &stream->asked, &filled, error));
    if (filled.is_answered) return KVL_OK;
    if (filled.sequence.n_ids > 0)
        return kvl_scheduler_submit_filled(service->scheduler, &stream->asked, &filled.sequence,
                                           filled.n_cached, &filled.report, &stream->id, error);
    kvl_sequence sequence;
    KVL_TRY(kvl_sequence_init(&sequence, service->engine, stream->asked.salt, stream->asked.ids,
                              stream->asked.n_ids, error));
    return kvl_scheduler_submit_filled(service->scheduler, &stream->asked, &sequence, 0,
                                       &filled.report, &stream->id, error);
}

static void start_stream(kvl_service *service, kvl_stream *stream)
{
    kvl_error error = {0};
    stream->asked.event = pass_on;
    stream->asked.context = stream;
    const kvl_status status =
        stream->asked.quality == KVL_REUSE_EXACT
            ? kvl_scheduler_submit(service->scheduler, &stream->asked, &stream->id, &error)
            : submit_filled(service, stream, &error);
    if (status != KVL_OK) {
        const kvl_generation_event refused = {
            .text = "", .finish = KVL_FINISH_FAILED, .is_last = true, .error = &error};
        kvl_stream_put(stream, &refused);
        kvl_stream_release(stream);
        return;
    }
    if (stream->has_ended) {
        kvl_stream_release(stream);
        return;
    }
    stream->next = service->streams;
    service->streams = stream;
}

static void do_command(kvl_service *service, command *c)
{
    if (c->stream != NULL) start_stream(service, c->stream);
    if (c->look != NULL) service_look_answer(c->look, service->engine->tree);
    kvl_free(c);
}

/* Cancels what nobody reads any more, and lets go of what is over. */
static void look_after_streams(kvl_service *service)
{
    for (kvl_stream **at = &service->streams; *at != NULL;) {
        kvl_stream *stream = *at;
        if (stream->has_ended) {
            *at = stream->next;
            kvl_stream_release(stream);
            continue;
        }
        if (!stream->is_cancelled && kvl_stream_is_unread(stream)) {
            stream->is_cancelled = true;
            kvl_scheduler_cancel(service->scheduler, stream->id);
        }
        at = &stream->next;
    }
}

void kvl_service_run(kvl_service *service)
{
    bool has_work = false;
    bool has_more = false; /* of the attached work */
    while (!atomic_load(&service->is_stopping)) {
        remember_state(service, true);
        const bool waits = !has_work && !has_more;
        command *c =
            waits ? kvl_queue_pop(service->commands) : kvl_queue_try_pop(service->commands);
        if (c == NULL && waits) break;
        for (; c != NULL; c = kvl_queue_try_pop(service->commands)) do_command(service, c);
        const bool is_idle = !has_work && service->streams == NULL;
        if (service->work != NULL) has_more = service->work(service->work_context, is_idle);
        look_after_streams(service);
        if (service->feed != NULL) service->feed(service->feed_context, service->scheduler);
        has_work = kvl_scheduler_step(service->scheduler);
        look_after_streams(service);
    }
    drop_commands(service);
    kvl_scheduler_cancel_all(service->scheduler);
    while (kvl_scheduler_step(service->scheduler)) continue;
    look_after_streams(service);
    drop_streams(service);
    remember_state(service, false);
}

/* ---- any thread ---- */

void kvl_service_stop(kvl_service *service)
{
    atomic_store(&service->is_stopping, true);
    kvl_queue_close(service->commands);
}

static kvl_status push(kvl_service *service, kvl_stream *stream, service_look *look)
{
    command *c = kvl_alloc(sizeof *c);
    if (c == NULL) return KVL_ERR_NO_MEMORY;
    *c = (command){stream, look};
    const kvl_status status = kvl_queue_push(service->commands, c);
    if (status != KVL_OK) kvl_free(c);
    return status;
}

void kvl_service_attach(kvl_service *service, bool (*work)(void *context, bool is_idle),
                        void *context)
{
    service->work = work;
    service->work_context = context;
}

void kvl_service_feed(kvl_service *service, void (*feed)(void *context, kvl_scheduler *scheduler),
                      void *context)
{
    service->feed = feed;
    service->feed_context = context;
}

void kvl_service_fill(kvl_service *service, kvl_service_filler fill, void *context)
{
    service->fill = fill;
    service->fill_context = context;
}

bool kvl_service_fills(const kvl_service *service)
{
    return service->fill != NULL;
}

void kvl_service_wake(kvl_service *service)
{
    /* A full queue wakes the engine thread anyway; a closed one has nobody to wake. */
    kvl_ignore(push(service, NULL, NULL));
}

kvl_status kvl_service_start(kvl_service *service, const kvl_generation *generation,
                             kvl_stream **stream, kvl_error *error)
{
    KVL_TRY(kvl_stream_create(generation, stream, error));
    const kvl_status status = push(service, *stream, NULL);
    if (status == KVL_OK) return KVL_OK;
    kvl_stream_release(*stream);
    kvl_stream_close(*stream);
    *stream = NULL;
    return KVL_FAIL(error, status, "the server has no room for another request; try again later");
}

kvl_status kvl_service_look(kvl_service *service, uint64_t salt, uint32_t timeout_ms,
                            kvl_prefix_view *view)
{
    service_look *look = service_look_create(salt);
    if (look == NULL) return KVL_ERR_NO_MEMORY;
    const kvl_status status = push(service, NULL, look);
    if (status == KVL_OK) return service_look_wait(look, timeout_ms, view);
    service_look_release(look);
    service_look_release(look);
    return status;
}

void kvl_service_state_read(kvl_service *service, kvl_service_state *state)
{
    pthread_mutex_lock(&service->lock);
    *state = service->state;
    pthread_mutex_unlock(&service->lock);
}
