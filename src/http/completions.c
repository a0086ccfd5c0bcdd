/* http/completions.c: one request for completions, on its connection's thread.
 *
 * A client that goes away is noticed while nothing is written, too: its socket is looked at four
 * times a second, and closing the stream cancels the answers. A stream begins only when the first
 * item is there, so that what the scheduler refuses still has its status code. */
#include "base/alloc.h"
#include "base/clock.h"
#include "http/responses.h"
#include "http/server.h"
#include "model/model.h"

#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

enum { WAIT_MS = 250, EVENT_BYTES = 32 * 1024 };

/* One request under way; of a stream it lives as long as the response. */
typedef struct exchange {
    kvl_http *http;
    struct MHD_Connection *connection;
    kvl_stream *stream;
    kvl_api_request request;
    kvl_api_answer answer;
    kvl_stream_item *first; /* taken already */
    char *bytes;            /* events that wait to be written: [n_bytes], from n_sent on */
    size_t n_bytes, bytes_max, n_sent;
    uint32_t n_events; /* of a response */
    bool is_over;
} exchange;

static void destroy(exchange *e)
{
    if (e == NULL) return;
    kvl_stream_close(e->stream);
    kvl_stream_item_destroy(e->first);
    kvl_api_answer_deinit(&e->answer);
    kvl_api_request_deinit(&e->request);
    kvl_free(e->bytes);
    kvl_free(e);
}

static bool is_response(const exchange *e)
{
    return e->request.kind == KVL_API_RESPONSE;
}

static const kvl_tokenizer *tokenizer_of(const exchange *e)
{
    return kvl_model_tokenizer(kvl_service_engine(e->http->service)->model);
}

static bool has_gone(const exchange *e)
{
    if (atomic_load(&e->http->is_stopping)) return true;
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(e->connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    char byte = 0;
    return info != NULL && recv(info->connect_fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0;
}

/* The next item; NULL when there is none any more, or nobody to read it. */
static kvl_stream_item *next_item(exchange *e)
{
    kvl_stream_item *item = e->first;
    e->first = NULL;
    while (item == NULL) {
        if (!kvl_stream_next(e->stream, WAIT_MS, &item)) return NULL;
        if (item == NULL && has_gone(e)) return NULL;
    }
    if (item->has_token && e->answer.first_token_ns == 0)
        e->answer.first_token_ns = kvl_clock_now(kvl_clock_system());
    return item;
}

static void error_of(const kvl_stream_item *item, kvl_api_error *error)
{
    if (item->finish == KVL_FINISH_CANCELLED) {
        kvl_api_error_from(error, KVL_ERR_CANCELLED, "", "the server is stopping");
        return;
    }
    kvl_api_error_from(error, item->status, "",
                       item->error_text == NULL ? kvl_status_sentence(item->status)
                                                : item->error_text);
}

static kvl_generation_event event_of(const kvl_stream_item *item)
{
    return (kvl_generation_event){.branch = item->branch,
                                  .drawn = item->has_token ? &item->drawn : NULL,
                                  .text = item->text,
                                  .n_text_bytes = item->n_text_bytes,
                                  .finish = item->finish,
                                  .n_tokens = item->n_tokens,
                                  .n_cached = item->n_cached,
                                  .reuse = item->reuse,
                                  .is_last = item->is_last};
}

static bool add_to_answer(exchange *e, const kvl_stream_item *item)
{
    const kvl_generation_event event = event_of(item);
    return kvl_api_answer_add(&e->answer, &e->request, tokenizer_of(e), &event);
}

static bool is_bad(const kvl_stream_item *item)
{
    return item->finish == KVL_FINISH_FAILED || item->finish == KVL_FINISH_CANCELLED;
}

/* ---- the whole answer at once ---- */

static enum MHD_Result answer_whole(exchange *e, kvl_http_route route)
{
    kvl_api_error error = {0};
    bool is_whole = false;
    while (!is_whole && error.http_status == 0) {
        kvl_stream_item *item = next_item(e);
        if (item == NULL) return MHD_NO; /* the client has gone: nobody reads an answer */
        if (is_bad(item)) {
            error_of(item, &error);
        } else if (!add_to_answer(e, item)) {
            kvl_api_error_from(&error, KVL_ERR_NO_MEMORY, "", "no memory for an answer");
        }
        is_whole = item->is_last;
        kvl_stream_item_destroy(item);
    }
    if (error.http_status != 0) return kvl_http_reply_error(e->http, e->connection, route, &error);
    kvl_http_observe(e->http, &e->request, &e->answer);
    return kvl_http_reply(e->http, e->connection, route, MHD_HTTP_OK,
                          is_response(e) ? kvl_responses_whole(&e->request, &e->answer)
                                         : kvl_api_whole(&e->request, &e->answer));
}

/* ---- server-sent events ---- */

static bool add_bytes(exchange *e, const char *bytes, size_t n_bytes)
{
    if (e->n_bytes + n_bytes > e->bytes_max) {
        const size_t wanted = 2 * (e->n_bytes + n_bytes) + EVENT_BYTES;
        char *larger = kvl_realloc(e->bytes, wanted);
        if (larger == NULL) return false;
        e->bytes = larger;
        e->bytes_max = wanted;
    }
    memcpy(e->bytes + e->n_bytes, bytes, n_bytes);
    e->n_bytes += n_bytes;
    return true;
}

static int add_dumped(const char *bytes, size_t n_bytes, void *context)
{
    return add_bytes(context, bytes, n_bytes) ? 0 : -1;
}

/* Takes the object. NULL is nothing to say. */
static bool add_event(exchange *e, json_t *object)
{
    if (object == NULL) return true;
    const bool is_added = add_bytes(e, "data: ", 6) &&
                          json_dump_callback(object, add_dumped, e, JSON_COMPACT) == 0 &&
                          add_bytes(e, "\n\n", 2);
    json_decref(object);
    return is_added;
}

/* Takes the array. Each event of a response stands under its type. */
static bool add_events(exchange *e, json_t *events)
{
    bool is_added = true;
    for (size_t i = 0; i < json_array_size(events) && is_added; i++) {
        json_t *event = json_array_get(events, i);
        const char *type = json_string_value(json_object_get(event, "type"));
        is_added = add_bytes(e, "event: ", 7) && add_bytes(e, type, strlen(type)) &&
                   add_bytes(e, "\n", 1) && add_event(e, json_incref(event));
    }
    json_decref(events);
    return is_added;
}

static bool add_end(exchange *e)
{
    e->is_over = true;
    kvl_http_observe(e->http, &e->request, &e->answer);
    if (is_response(e))
        return add_events(e, kvl_responses_ending(&e->request, &e->answer, &e->n_events));
    if (e->request.with_usage && !add_event(e, kvl_api_usage(&e->request, &e->answer)))
        return false;
    return add_bytes(e, "data: [DONE]\n\n", 14);
}

/* Puts one item's event into the bytes. */
static bool add_item(exchange *e, const kvl_stream_item *item)
{
    if (is_bad(item)) {
        kvl_api_error error;
        error_of(item, &error);
        e->is_over = true;
        if (is_response(e)) return add_events(e, kvl_responses_error(&error, &e->n_events));
        return add_event(e, kvl_api_error_json(&error)) && add_bytes(e, "data: [DONE]\n\n", 14);
    }
    if (!add_to_answer(e, item)) return false;
    const kvl_generation_event event = event_of(item);
    if (is_response(e) && !add_events(e, kvl_responses_piece(&e->request, &event, &e->n_events)))
        return false;
    if (!is_response(e) &&
        !add_event(e, kvl_api_piece(&e->request, &e->answer, tokenizer_of(e), &event)))
        return false;
    return !item->is_last || add_end(e);
}

static ssize_t read_events(void *context, uint64_t at, char *buffer, size_t n_max)
{
    (void)at;
    exchange *e = context;
    if (e->n_sent == e->n_bytes) e->n_sent = e->n_bytes = 0;
    while (e->n_bytes == 0) {
        if (e->is_over) return MHD_CONTENT_READER_END_OF_STREAM;
        kvl_stream_item *item = next_item(e);
        if (item == NULL) return MHD_CONTENT_READER_END_WITH_ERROR;
        const bool is_added = add_item(e, item);
        kvl_stream_item_destroy(item);
        if (!is_added) return MHD_CONTENT_READER_END_WITH_ERROR;
    }
    const size_t n_left = e->n_bytes - e->n_sent;
    const size_t n = n_left < n_max ? n_left : n_max;
    memcpy(buffer, e->bytes + e->n_sent, n);
    e->n_sent += n;
    return (ssize_t)n;
}

static void end_events(void *context)
{
    destroy(context);
}

/* Takes the exchange. */
static enum MHD_Result answer_stream(exchange *e, kvl_http_route route)
{
    e->first = next_item(e);
    if (e->first == NULL || is_bad(e->first)) {
        enum MHD_Result result = MHD_NO;
        if (e->first != NULL) {
            kvl_api_error error;
            error_of(e->first, &error);
            result = kvl_http_reply_error(e->http, e->connection, route, &error);
        }
        destroy(e);
        return result;
    }
    bool is_whole = true;
    if (is_response(e))
        is_whole = add_events(e, kvl_responses_opening(&e->request, &e->answer, &e->n_events));
    for (uint32_t i = 0; e->request.kind == KVL_API_CHAT && i < e->request.generation.n_branches;
         i++)
        is_whole = is_whole && add_event(e, kvl_api_opening(&e->request, i));
    struct MHD_Response *response =
        is_whole ? MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, EVENT_BYTES, read_events, e,
                                                     end_events)
                 : NULL;
    if (response == NULL) {
        destroy(e);
        return MHD_NO;
    }
    (void)MHD_add_response_header(response, "Content-Type", "text/event-stream; charset=utf-8");
    (void)MHD_add_response_header(response, "Cache-Control", "no-store");
    (void)MHD_add_response_header(response, "X-Accel-Buffering", "no");
    kvl_http_count(e->http, route, MHD_HTTP_OK);
    const enum MHD_Result result = MHD_queue_response(e->connection, MHD_HTTP_OK, response);
    MHD_destroy_response(response);
    return result;
}

static kvl_api_kind kind_of(kvl_http_route route)
{
    if (route == KVL_ROUTE_COMPLETIONS) return KVL_API_TEXT;
    return route == KVL_ROUTE_RESPONSES ? KVL_API_RESPONSE : KVL_API_CHAT;
}

enum MHD_Result kvl_http_complete(kvl_http *http, struct MHD_Connection *connection,
                                  kvl_http_route route, const char *tenant, const char *body,
                                  size_t n_bytes)
{
    kvl_api_error error = {0};
    exchange *e = kvl_alloc_zero(1, sizeof *e);
    if (e == NULL) {
        kvl_api_error_from(&error, KVL_ERR_NO_MEMORY, "", "no memory for a request");
        return kvl_http_reply_error(http, connection, route, &error);
    }
    e->http = http;
    e->connection = connection;
    bool is_started = kvl_api_request_parse(kvl_service_engine(http->service), http->model_name,
                                            kind_of(route), body, n_bytes, &e->request, &error);
    if (is_started)
        is_started = kvl_api_request_reuse(&e->request, http->quality,
                                           kvl_service_fills(http->service), &error);
    if (is_started) {
        kvl_error failed = {0};
        e->request.generation.salt = kvl_http_keys_salt(http->keys, tenant, e->request.cache_salt);
        e->request.generation.owner = kvl_http_keys_owner(tenant, e->request.cache_salt);
        const kvl_status status =
            kvl_service_start(http->service, &e->request.generation, &e->stream, &failed);
        is_started = status == KVL_OK;
        if (!is_started) kvl_api_error_from(&error, status, "", failed.text);
    }
    if (!is_started) {
        const enum MHD_Result result = kvl_http_reply_error(http, connection, route, &error);
        destroy(e);
        return result;
    }
    if (e->request.is_stream) return answer_stream(e, route);
    const enum MHD_Result result = answer_whole(e, route);
    destroy(e);
    return result;
}
