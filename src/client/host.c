/* client/host.c: questions to a host and its answers, over the API that `kvloom serve --http` has:
 * a chat completion as a stream of events. */
#include "client/http_link.h"
#include "client/state.h"

#include "base/alloc.h"
#include "base/clock.h"

#include <errno.h>
#include <jansson.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MESSAGES_MAX = 1024, EVENT_BYTES_MAX = 1 << 20, TEXT_BYTES_MAX = 64 << 20 };

/* Bytes that grow, with a zero behind them. Zeroed is empty. */
typedef struct text_buffer {
    char *bytes;
    size_t n_bytes, capacity;
} text_buffer;

struct kvloom_answer {
    http_link link;
    kvloom_status status;
    kvloom_error error;
    int64_t deadline_ns; /* INT64_MAX: none */
    text_buffer event;   /* the line that is coming, or the body of an error */
    text_buffer text;
    bool is_done; /* "[DONE]" was there */
    bool has_usage;
    kvloom_usage usage;
};

static bool add(text_buffer *buffer, const char *bytes, size_t n_bytes, size_t n_max)
{
    if (n_bytes > n_max - buffer->n_bytes) return false;
    const size_t needed = buffer->n_bytes + n_bytes + 1;
    if (needed > buffer->capacity) {
        const size_t wider = needed < 512 ? 1024 : 2 * needed;
        char *larger = kvl_realloc(buffer->bytes, wider);
        if (larger == NULL) return false;
        buffer->bytes = larger;
        buffer->capacity = wider;
    }
    memcpy(buffer->bytes + buffer->n_bytes, bytes, n_bytes);
    buffer->n_bytes += n_bytes;
    buffer->bytes[buffer->n_bytes] = '\0';
    return true;
}

/* ---- the question ---- */

static bool add_messages(json_t *root, const kvloom_question *question)
{
    json_t *messages = json_array();
    for (size_t i = 0; i < question->n_messages; i++) {
        const kvloom_message *m = &question->messages[i];
        if (m->role == NULL || m->text == NULL ||
            json_array_append_new(
                messages, json_pack("{s:s, s:s}", "role", m->role, "content", m->text)) != 0) {
            json_decref(messages);
            return false;
        }
    }
    return json_object_set_new(root, "messages", messages) == 0;
}

/* NULL: a text is no UTF-8, or there is no memory. Ended with kvl_free. */
static char *body_of(const kvloom_question *question)
{
    json_t *root = json_pack("{s:b, s:{s:b}}", "stream", 1, "stream_options", "include_usage", 1);
    bool is_good = root != NULL && add_messages(root, question);
    if (is_good && question->max_tokens > 0)
        is_good = json_object_set_new(root, "max_tokens", json_integer(question->max_tokens)) == 0;
    if (is_good && question->has_temperature != 0)
        is_good = json_object_set_new(root, "temperature", json_real(question->temperature)) == 0;
    if (is_good && question->seed != 0)
        is_good = json_object_set_new(root, "seed", json_integer((json_int_t)question->seed)) == 0;
    if (is_good && question->cache_salt != NULL)
        is_good = json_object_set_new(root, "cache_salt", json_string(question->cache_salt)) == 0;
    char *dumped = is_good ? json_dumps(root, JSON_COMPACT) : NULL;
    json_decref(root);
    char *copy = dumped == NULL ? NULL : kvl_strdup(dumped);
    free(dumped); /* tidy: free, the C library allocated it */
    return copy;
}

static bool is_header_value(const char *text)
{
    for (; *text != '\0'; text++) {
        if (*text < 33 || *text > 126) return false;
    }
    return true;
}

/* Head and body in one; ended with kvl_free. */
static kvloom_status make_request(const kvloom_host *host, const kvloom_question *question,
                                  text_buffer *request, kvloom_error *error)
{
    char head[1024];
    if (question->n_messages == 0 || question->n_messages > MESSAGES_MAX) {
        return client_fail(error, KVLOOM_ERR_INVALID, "%zu messages, must be 1 .. %d",
                           question->n_messages, MESSAGES_MAX);
    }
    const char *key = host->api_key == NULL ? "" : host->api_key;
    if (strlen(key) > 256 || !is_header_value(key))
        return client_fail(error, KVLOOM_ERR_INVALID, "an API key has at most 256 letters");
    char *body = body_of(question);
    if (body == NULL) {
        return client_fail(error, KVLOOM_ERR_INVALID,
                           "a message without role or text, or that is no UTF-8");
    }
    (void)snprintf(head, sizeof head,
                   "POST /v1/chat/completions HTTP/1.1\r\nHost: kvloom\r\nConnection: close\r\n"
                   "Content-Type: application/json\r\n%s%s%sContent-Length: %zu\r\n\r\n",
                   key[0] == '\0' ? "" : "Authorization: Bearer ", key,
                   key[0] == '\0' ? "" : "\r\n", strlen(body));
    const bool is_made = add(request, head, strlen(head), SIZE_MAX - 1) &&
                         add(request, body, strlen(body), SIZE_MAX - 1);
    kvl_free(body);
    if (is_made) return KVLOOM_OK;
    return client_fail(error, KVLOOM_ERR_NO_MEMORY, "no memory for a question");
}

/* ---- the answer ---- */

static kvloom_status status_of_http(int status)
{
    switch (status) {
    case 401:
    case 403: return KVLOOM_ERR_DENIED;
    case 404: return KVLOOM_ERR_NOT_FOUND;
    case 413: return KVLOOM_ERR_TOO_LARGE;
    case 408:
    case 429:
    case 503: return KVLOOM_ERR_BUSY;
    default: return status >= 500 ? KVLOOM_ERR_IO : KVLOOM_ERR_INVALID;
    }
}

static kvloom_status fail_as_host_says(kvloom_answer *a, kvloom_status status, json_t *root)
{
    const char *text = "the host gave no reason";
    const json_t *reason = json_object_get(root, "error");
    const char *message = json_string_value(json_object_get(reason, "message"));
    return client_fail(&a->error, status, "%.400s", message == NULL ? text : message);
}

static void take_usage(kvloom_answer *a, const json_t *usage)
{
    const json_t *details = json_object_get(usage, "prompt_tokens_details");
    a->usage.prompt_tokens = (uint64_t)json_integer_value(json_object_get(usage, "prompt_tokens"));
    a->usage.answer_tokens =
        (uint64_t)json_integer_value(json_object_get(usage, "completion_tokens"));
    a->usage.cached_tokens =
        (uint64_t)json_integer_value(json_object_get(details, "cached_tokens"));
    a->has_usage = true;
}

/* What one event brings; other members are left alone, as the API's rules are. */
static bool take_chunk(kvloom_answer *a, json_t *root)
{
    if (json_object_get(root, "error") != NULL) {
        a->status = fail_as_host_says(a, KVLOOM_ERR_IO, root);
        return false;
    }
    const json_t *usage = json_object_get(root, "usage");
    if (json_is_object(usage)) take_usage(a, usage);
    const json_t *choice = json_array_get(json_object_get(root, "choices"), 0);
    const char *reason = json_string_value(json_object_get(choice, "finish_reason"));
    if (reason != NULL) a->usage.hit_max_tokens = strcmp(reason, "length") == 0;
    const json_t *content = json_object_get(json_object_get(choice, "delta"), "content");
    const char *text = json_string_value(content);
    return text == NULL || add(&a->text, text, json_string_length(content), TEXT_BYTES_MAX);
}

static bool take_event(kvloom_answer *a, const char *line, size_t n_bytes)
{
    static const char field[] = "data:";
    if (n_bytes < sizeof field - 1 || memcmp(line, field, sizeof field - 1) != 0)
        return true; /* an empty line, a comment, or another field */
    line += sizeof field - 1;
    n_bytes -= sizeof field - 1;
    while (n_bytes > 0 && *line == ' ') {
        line++;
        n_bytes--;
    }
    if (n_bytes == 6 && memcmp(line, "[DONE]", 6) == 0) {
        a->is_done = true;
        return true;
    }
    json_t *root = json_loadb(line, n_bytes, JSON_REJECT_DUPLICATES, NULL);
    const bool is_good = json_is_object(root) && take_chunk(a, root);
    json_decref(root);
    return is_good;
}

/* Lines of events; of another response than a good one, its body as it is. */
static bool take_body(void *context, const char *bytes, size_t n_bytes)
{
    kvloom_answer *a = context;
    if (a->link.status != 200) return add(&a->event, bytes, n_bytes, EVENT_BYTES_MAX);
    while (n_bytes > 0) {
        const char *end = memchr(bytes, '\n', n_bytes);
        const size_t n = end == NULL ? n_bytes : (size_t)(end - bytes);
        if (!add(&a->event, bytes, n, EVENT_BYTES_MAX)) return false;
        if (end == NULL) return true;
        size_t n_line = a->event.n_bytes;
        if (n_line > 0 && a->event.bytes[n_line - 1] == '\r') n_line--;
        a->event.n_bytes = 0;
        if (!take_event(a, a->event.bytes, n_line)) return false;
        bytes += n + 1;
        n_bytes -= n + 1;
    }
    return true;
}

static kvloom_status end_response(kvloom_answer *a)
{
    if (a->link.status != 200) {
        json_t *root =
            a->event.bytes == NULL ? NULL : json_loadb(a->event.bytes, a->event.n_bytes, 0, NULL);
        const kvloom_status status = fail_as_host_says(a, status_of_http(a->link.status), root);
        json_decref(root);
        return status;
    }
    if (a->is_done) return KVLOOM_OK;
    return client_fail(&a->error, KVLOOM_ERR_MALFORMED, "the answer has no end: this is no host");
}

kvloom_status kvloom_answer_read(kvloom_answer *answer, kvloom_error *error)
{
    if (answer->status == KVLOOM_IN_PROGRESS) {
        const kvloom_status read = http_link_read(&answer->link, take_body, answer);
        if (answer->status < 0) {
            /* The host has said why. */
        } else if (read == KVLOOM_OK || answer->is_done) {
            answer->status = end_response(answer);
        } else if (read == KVLOOM_ERR_UNREACHABLE) {
            answer->status = client_fail(&answer->error, read, "the host ended before its answer");
        } else if (read < 0) {
            answer->status = client_fail(
                &answer->error, read, "this is no host, or its answer is larger than one may be");
        } else if (client_now_ns() >= answer->deadline_ns) {
            answer->status = client_fail(&answer->error, KVLOOM_ERR_TIMEOUT, "the deadline passed");
        }
    }
    if (error != NULL && answer->status < 0) *error = answer->error;
    return answer->status;
}

int kvloom_answer_fd(const kvloom_answer *answer)
{
    return answer->link.fd;
}

const char *kvloom_answer_text(const kvloom_answer *answer, size_t *n_bytes)
{
    if (n_bytes != NULL) *n_bytes = answer->text.n_bytes;
    return answer->text.bytes == NULL ? "" : answer->text.bytes;
}

kvloom_status kvloom_answer_usage(const kvloom_answer *answer, kvloom_usage *usage)
{
    *usage = answer->usage;
    return answer->status == KVLOOM_OK && answer->has_usage ? KVLOOM_OK : KVLOOM_ERR_NOT_FOUND;
}

void kvloom_answer_end(kvloom_answer *answer)
{
    if (answer == NULL) return;
    http_link_close(&answer->link);
    kvl_free(answer->event.bytes);
    kvl_free(answer->text.bytes);
    kvl_free(answer);
}

/* ---- asking ---- */

kvloom_status kvloom_stream(const kvloom_host *host, const kvloom_question *question,
                            uint32_t deadline_ms, kvloom_answer **answer, kvloom_error *error)
{
    text_buffer request = {NULL, 0, 0};
    const char *address = host->address;
    *answer = NULL;
    if (address == NULL) address = getenv("KVLOOM_HOST");
    if (address == NULL || address[0] == '\0') address = "127.0.0.1:8080";
    kvloom_answer *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return client_fail(error, KVLOOM_ERR_NO_MEMORY, "no memory for an answer");
    made->link.fd = -1;
    made->status = KVLOOM_IN_PROGRESS;
    made->deadline_ns =
        deadline_ms == 0 ? INT64_MAX : client_now_ns() + deadline_ms * KVL_NS_PER_MS;
    kvloom_status status = make_request(host, question, &request, error);
    if (status == KVLOOM_OK) {
        status = http_link_open(&made->link, address, request.bytes, request.n_bytes,
                                made->deadline_ns, error);
    }
    kvl_free(request.bytes);
    if (status < 0) {
        kvloom_answer_end(made);
        return status;
    }
    *answer = made;
    return KVLOOM_OK;
}

kvloom_status kvloom_generate(const kvloom_host *host, const kvloom_question *question,
                              uint32_t deadline_ms, kvloom_answer **answer, kvloom_error *error)
{
    kvloom_status status = kvloom_stream(host, question, deadline_ms, answer, error);
    if (status < 0) return status;
    while ((status = kvloom_answer_read(*answer, error)) == KVLOOM_IN_PROGRESS) {
        struct pollfd item = {.fd = kvloom_answer_fd(*answer), .events = POLLIN};
        int wait_ms = -1;
        if ((*answer)->deadline_ns != INT64_MAX) {
            const int64_t left_ns = (*answer)->deadline_ns - client_now_ns();
            wait_ms = left_ns <= 0 ? 0 : (int)(left_ns / KVL_NS_PER_MS) + 1;
        }
        (void)poll(&item, 1, wait_ms);
    }
    if (status == KVLOOM_OK) return KVLOOM_OK;
    kvloom_answer_end(*answer);
    *answer = NULL;
    return status;
}
