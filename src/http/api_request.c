/* http/api_request.c: a body's fields, one by one. A field that would change the answer and that
 * this server cannot honour is refused; one that would not is left alone. */
#include "base/alloc.h"
#include "base/clock.h"
#include "base/random.h"
#include "http/api.h"
#include "http/responses.h"
#include "http/tools.h"
#include "model/model.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { MESSAGES_MAX = 4096, COMPLETION_TOKENS_DEFAULT = 16 };

/* ---- errors ---- */

bool kvl_api_refuse(kvl_api_error *error, const char *param, const char *format, ...)
{
    *error = (kvl_api_error){.http_status = 400, .type = "invalid_request_error"};
    (void)snprintf(error->param, sizeof error->param, "%s", param);
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(error->message, sizeof error->message, format, arguments);
    va_end(arguments);
    return false;
}

void kvl_api_error_from(kvl_api_error *error, kvl_status status, const char *param,
                        const char *text)
{
    (void)kvl_api_refuse(error, param, "%s", text);
    switch (kvl_status_class_of(status)) {
    case KVL_CLASS_REFUSE:
        if (status == KVL_ERR_TOO_LARGE || status == KVL_ERR_OUT_OF_RANGE)
            error->code = strstr(text, "context") != NULL ? "context_length_exceeded" : NULL;
        return;
    case KVL_CLASS_RETRY:
        error->http_status = status == KVL_ERR_CANCELLED ? 503 : 429;
        error->type = "rate_limit_error";
        error->code = "server_busy";
        return;
    default:
        error->http_status = 500;
        error->type = "server_error";
        error->code = "internal_error";
    }
}

json_t *kvl_api_error_json(const kvl_api_error *error)
{
    return json_pack("{s:{s:s, s:s, s:s?, s:s?}}", "error", "message", error->message, "type",
                     error->type, "param", error->param[0] == '\0' ? NULL : error->param, "code",
                     error->code);
}

/* ---- fields ---- */

/* A field that is there and not null; otherwise NULL. */
static json_t *find(const kvl_api_request *request, const char *name)
{
    json_t *value = json_object_get(request->body, name);
    return json_is_null(value) ? NULL : value;
}

static bool take_float(const kvl_api_request *request, const char *name, double least, double most,
                       float *number, kvl_api_error *error)
{
    const json_t *value = find(request, name);
    if (value == NULL) return true;
    if (!json_is_number(value) || !(json_number_value(value) >= least) ||
        !(json_number_value(value) <= most))
        return kvl_api_refuse(error, name, "%s must be a number from %g to %g", name, least, most);
    *number = (float)json_number_value(value);
    return true;
}

static bool take_whole(const kvl_api_request *request, const char *name, json_int_t least,
                       json_int_t most, uint32_t *number, kvl_api_error *error)
{
    const json_t *value = find(request, name);
    if (value == NULL) return true;
    if (!json_is_integer(value) || json_integer_value(value) < least ||
        json_integer_value(value) > most)
        return kvl_api_refuse(error, name,
                              "%s must be a whole number from %" JSON_INTEGER_FORMAT
                              " to %" JSON_INTEGER_FORMAT,
                              name, least, most);
    *number = (uint32_t)json_integer_value(value);
    return true;
}

static bool take_bool(const kvl_api_request *request, const char *name, bool *flag,
                      kvl_api_error *error)
{
    const json_t *value = find(request, name);
    if (value == NULL) return true;
    if (!json_is_boolean(value))
        return kvl_api_refuse(error, name, "%s must be true or false", name);
    *flag = json_is_true(value);
    return true;
}

/* ---- what this server has not ---- */

static bool is_empty(const json_t *value)
{
    return json_is_false(value) || (json_is_array(value) && json_array_size(value) == 0) ||
           (json_is_object(value) && json_object_size(value) == 0);
}

/* Answers that must be JSON, or fit a schema, need a decoder that masks tokens by a grammar, and no
 * C library that does so is kept by a distribution. To answer freely where JSON was asked for would
 * be a different promise, so it is refused. */
static bool take_format(const kvl_api_request *request, kvl_api_error *error)
{
    const json_t *format = find(request, "response_format");
    if (format == NULL) return true;
    const char *type = json_string_value(json_object_get(format, "type"));
    if (type != NULL && strcmp(type, "text") == 0) return true;
    static const char remedy[] = "leave it out or send {\"type\": \"text\"}, ask for JSON in a "
                                 "message and check the answer";
    const char *name = request->kind == KVL_API_RESPONSE ? "text.format" : "response_format";
    if (type == NULL)
        return kvl_api_refuse(error, "response_format",
                              "%s must be an object with the type \"text\"; %s", name, remedy);
    (void)kvl_api_refuse(error, "response_format",
                         "%s.type is '%.40s': this server does not constrain answers to JSON or a "
                         "schema; %s",
                         name, type, remedy);
    error->code = "unsupported_value";
    return false;
}

static bool refuse_unsupported(const kvl_api_request *request, kvl_api_error *error)
{
    static const char *const names[] = {
        "functions", "logit_bias", "audio", "prediction", "suffix", "echo", "web_search_options"};
    /* Calls are a chat's: completions have no messages, responses other words for them. */
    if (request->kind != KVL_API_CHAT && find(request, "tools") != NULL &&
        !is_empty(find(request, "tools"))) {
        (void)kvl_api_refuse(error, "tools", "tools are for /v1/chat/completions on this server");
        error->code = "unsupported_parameter";
        return false;
    }
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const json_t *value = find(request, names[i]);
        if (value == NULL || is_empty(value)) continue;
        (void)kvl_api_refuse(error, names[i], "%s is not supported by this server", names[i]);
        error->code = "unsupported_parameter";
        return false;
    }
    if (!take_format(request, error)) return false;
    const json_t *best_of = find(request, "best_of");
    if (best_of != NULL &&
        json_integer_value(best_of) != (json_int_t)request->generation.n_branches)
        return kvl_api_refuse(error, "best_of", "best_of must be n: every answer is given back");
    return true;
}

/* ---- parts of a request ---- */

static bool take_model(const kvl_api_request *request, kvl_api_error *error)
{
    const json_t *model = find(request, "model");
    if (model == NULL) return true;
    if (!json_is_string(model)) return kvl_api_refuse(error, "model", "model must be a string");
    if (strcmp(json_string_value(model), request->model_name) == 0) return true;
    (void)kvl_api_refuse(error, "model", "there is no model '%.100s' here; there is '%s'",
                         json_string_value(model), request->model_name);
    error->http_status = 404;
    error->code = "model_not_found";
    return false;
}

static bool take_sampling(kvl_api_request *request, kvl_api_error *error)
{
    kvl_sampling *s = &request->generation.sampling;
    uint64_t seed = 0;
    kvl_random_secret(&seed, sizeof seed);
    s->temperature = 1.0F;
    request->generation.seed = seed;
    if (!take_float(request, "temperature", 0.0, 2.0, &s->temperature, error) ||
        !take_float(request, "top_p", 0.0, 1.0, &s->top_p, error) ||
        !take_float(request, "min_p", 0.0, 1.0, &s->min_p, error) ||
        !take_float(request, "repetition_penalty", 0.01, 100.0, &s->repetition_penalty, error) ||
        !take_float(request, "presence_penalty", -2.0, 2.0, &s->presence_penalty, error) ||
        !take_float(request, "frequency_penalty", -2.0, 2.0, &s->frequency_penalty, error) ||
        !take_bool(request, "ignore_eos", &request->generation.ignore_end, error))
        return false;
    /* top_p of 0 is the likeliest token, as others read it. */
    if (s->top_p < 1e-6F) s->top_p = 1e-6F;
    const json_t *top_k = find(request, "top_k");
    /* -1 means all, in vLLM's words. */
    const bool is_all = json_is_integer(top_k) && json_integer_value(top_k) == -1;
    if (!is_all && !take_whole(request, "top_k", 0, INT32_MAX, &s->top_k, error)) return false;
    const json_t *given = find(request, "seed");
    if (given == NULL) return true;
    if (!json_is_integer(given))
        return kvl_api_refuse(error, "seed", "seed must be a whole number");
    request->generation.seed = (uint64_t)json_integer_value(given);
    return true;
}

static bool take_logprobs(kvl_api_request *request, kvl_api_error *error)
{
    kvl_sampling *s = &request->generation.sampling;
    if (!request->is_chat) {
        s->with_logprobs = find(request, "logprobs") != NULL;
        return take_whole(request, "logprobs", 0, KVL_LOGPROBS_MAX, &s->n_logprobs, error);
    }
    if (!take_bool(request, "logprobs", &s->with_logprobs, error) ||
        !take_whole(request, "top_logprobs", 0, KVL_LOGPROBS_MAX, &s->n_logprobs, error))
        return false;
    if (s->n_logprobs > 0 && !s->with_logprobs)
        return kvl_api_refuse(error, "top_logprobs", "top_logprobs needs logprobs to be true");
    return true;
}

static bool take_stops(kvl_api_request *request, kvl_api_error *error)
{
    const json_t *stop = find(request, "stop");
    if (stop == NULL) return true;
    const size_t n = json_is_array(stop) ? json_array_size(stop) : 1;
    if ((!json_is_string(stop) && !json_is_array(stop)) || n > KVL_STOPS_MAX)
        return kvl_api_refuse(error, "stop", "stop must be a text or up to %u texts",
                              KVL_STOPS_MAX);
    request->stops = kvl_alloc_zero(n == 0 ? 1 : n, sizeof *request->stops);
    if (request->stops == NULL) {
        kvl_api_error_from(error, KVL_ERR_NO_MEMORY, "", "no memory for a request");
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *text = json_is_array(stop) ? json_array_get(stop, i) : stop;
        const size_t n_bytes = json_string_length(text);
        if (!json_is_string(text) || n_bytes == 0 || n_bytes > KVL_STOP_BYTES_MAX ||
            strlen(json_string_value(text)) != n_bytes)
            return kvl_api_refuse(error, "stop", "each stop text must have 1 to %u bytes, no NUL",
                                  KVL_STOP_BYTES_MAX);
        request->stops[i] = json_string_value(text);
    }
    request->generation.stops = request->stops;
    request->generation.n_stops = (uint32_t)n;
    return true;
}

/* As vLLM checks it: up to 128 characters, none of which could mean anything in a path. */
static bool take_cache_salt(kvl_api_request *request, kvl_api_error *error)
{
    const json_t *salt = find(request, "cache_salt");
    if (salt == NULL) return true;
    const char *text = json_string_value(salt);
    const size_t n = json_string_length(salt);
    if (text == NULL || n == 0 || n >= sizeof request->cache_salt || strlen(text) != n ||
        strpbrk(text, "@/\\") != NULL)
        return kvl_api_refuse(error, "cache_salt",
                              "cache_salt must be a text of 1 to 128 bytes without '@', '/', '\\' "
                              "and NUL");
    memcpy(request->cache_salt, text, n + 1);
    return true;
}

static bool take_stream(kvl_api_request *request, kvl_api_error *error)
{
    if (!take_bool(request, "stream", &request->is_stream, error)) return false;
    const json_t *options = find(request, "stream_options");
    if (options == NULL) return true;
    if (!json_is_object(options))
        return kvl_api_refuse(error, "stream_options", "stream_options must be an object");
    if (!request->is_stream)
        return kvl_api_refuse(error, "stream_options", "stream_options needs stream to be true");
    request->with_usage = json_is_true(json_object_get(options, "include_usage"));
    return true;
}

/* ---- the prompt ---- */

char *kvl_api_content(const json_t *content, size_t *n_bytes)
{
    *n_bytes = 0;
    if (json_is_string(content)) *n_bytes = json_string_length(content);
    for (size_t i = 0; i < json_array_size(content); i++) {
        const json_t *part = json_array_get(content, i);
        const char *type = json_string_value(json_object_get(part, "type"));
        const json_t *text = json_object_get(part, "text");
        if (type == NULL || strcmp(type, "text") != 0 || !json_is_string(text)) return NULL;
        *n_bytes += json_string_length(text);
    }
    char *bytes = kvl_alloc(*n_bytes + 1);
    if (bytes == NULL) return NULL;
    size_t at = 0;
    if (json_is_string(content)) memcpy(bytes, json_string_value(content), *n_bytes);
    for (size_t i = 0; i < json_array_size(content); i++) {
        const json_t *text = json_object_get(json_array_get(content, i), "text");
        memcpy(bytes + at, json_string_value(text), json_string_length(text));
        at += json_string_length(text);
    }
    return bytes;
}

/* Parts of a content are texts by themselves only where they may be reused by themselves: else the
 * ids are those of the whole content, as every server has them. */
static bool take_message(const json_t *given, size_t index, bool with_seams, kvl_message *message,
                         kvl_api_error *error)
{
    char param[64];
    (void)snprintf(param, sizeof param, "messages[%zu]", index);
    const char *role = json_string_value(json_object_get(given, "role"));
    if (role == NULL) return kvl_api_refuse(error, param, "%s has no role", param);
    const bool is_known = strcmp(role, "system") == 0 || strcmp(role, "developer") == 0 ||
                          strcmp(role, "user") == 0 || strcmp(role, "assistant") == 0;
    if (!is_known)
        return kvl_api_refuse(error, param,
                              "the role of %s is '%.40s'; this server knows system, developer, "
                              "user and assistant",
                              param, role);
    const json_t *content = json_object_get(given, "content");
    if (!json_is_string(content) && !json_is_array(content))
        return kvl_api_refuse(error, param, "the content of %s must be a text or an array of parts",
                              param);
    char *bytes = kvl_api_content(content, &message->content_bytes);
    if (bytes == NULL)
        return kvl_api_refuse(error, param,
                              "each part of the content of %s must be {\"type\": \"text\", "
                              "\"text\": ...}",
                              param);
    message->role = strcmp(role, "developer") == 0 ? "system" : role;
    message->content = bytes;
    if (!with_seams || json_array_size(content) < 2) return true;
    size_t *seams = kvl_alloc_zero(json_array_size(content) - 1, sizeof *seams);
    if (seams == NULL) {
        kvl_api_error_from(error, KVL_ERR_NO_MEMORY, "", "no memory for messages");
        return false;
    }
    size_t at = 0;
    for (size_t i = 0; i + 1 < json_array_size(content); i++) {
        at += json_string_length(json_object_get(json_array_get(content, i), "text"));
        seams[i] = at;
    }
    message->seams = seams;
    message->n_seams = json_array_size(content) - 1;
    return true;
}

static bool wants_seams(const kvl_api_request *request)
{
    kvl_reuse_quality quality = KVL_REUSE_EXACT;
    const json_t *named = json_object_get(json_object_get(request->body, "kvloom"), "quality");
    return kvl_api_quality_of(json_string_value(named), &quality) && quality != KVL_REUSE_EXACT;
}

static bool render(const kvl_engine *engine, kvl_api_request *request, kvl_message *messages,
                   size_t n, kvl_api_error *error)
{
    const json_t *given = find(request, "messages");
    for (size_t i = 0; i < n; i++)
        if (!take_message(json_array_get(given, i), i, wants_seams(request), &messages[i], error))
            return false;
    kvl_error failed = {0};
    const kvl_status status =
        kvl_chat_render(kvl_model_chat_template(engine->model), kvl_model_tokenizer(engine->model),
                        messages, n, true, &request->prompt, &failed);
    if (status == KVL_OK) return true;
    kvl_api_error_from(error, status, "messages", failed.text);
    return false;
}

static bool take_messages(const kvl_engine *engine, kvl_api_request *request, kvl_api_error *error)
{
    if (request->kind == KVL_API_CHAT && !kvl_tools_translate(engine, request, error)) return false;
    const json_t *given = find(request, "messages");
    const size_t n = json_array_size(given);
    if (!json_is_array(given) || n == 0 || n > MESSAGES_MAX)
        return kvl_api_refuse(error, "messages", "messages must be an array of 1 to %d messages",
                              MESSAGES_MAX);
    kvl_message *messages = kvl_alloc_zero(n, sizeof *messages);
    if (messages == NULL) {
        kvl_api_error_from(error, KVL_ERR_NO_MEMORY, "", "no memory for messages");
        return false;
    }
    const bool is_taken = render(engine, request, messages, n, error);
    for (size_t i = 0; i < n; i++) {
        kvl_free((void *)(uintptr_t)messages[i].content);
        kvl_free((void *)(uintptr_t)messages[i].seams);
    }
    kvl_free(messages);
    return is_taken;
}

static bool take_ids(const kvl_engine *engine, kvl_api_request *request, const json_t *ids,
                     kvl_api_error *error)
{
    const size_t n = json_array_size(ids);
    request->prompt.ids = kvl_alloc_zero(n, sizeof *request->prompt.ids);
    if (request->prompt.ids == NULL) {
        kvl_api_error_from(error, KVL_ERR_NO_MEMORY, "", "no memory for a prompt");
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_array_get(ids, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= engine->shape->n_vocab)
            return kvl_api_refuse(error, "prompt", "prompt[%zu] must be a token id below %u", i,
                                  engine->shape->n_vocab);
        request->prompt.ids[i] = (uint32_t)json_integer_value(id);
    }
    request->prompt.n_ids = n;
    return true;
}

/* A text, or token ids, or an array with one of these. */
static bool take_prompt(const kvl_engine *engine, kvl_api_request *request, kvl_api_error *error)
{
    const json_t *given = find(request, "prompt");
    if (json_is_array(given) && json_array_size(given) == 1 &&
        !json_is_integer(json_array_get(given, 0)))
        given = json_array_get(given, 0);
    if (json_is_array(given) && json_array_size(given) > 0 &&
        json_is_integer(json_array_get(given, 0)))
        return take_ids(engine, request, given, error);
    if (!json_is_string(given))
        return kvl_api_refuse(error, "prompt", "prompt must be one text or one array of token ids");
    /* The text is the whole context, so that marks of a template mean what they say. */
    kvl_error failed = {0};
    const kvl_status status = kvl_tokenize(
        kvl_model_tokenizer(engine->model), json_string_value(given), json_string_length(given),
        true, &request->prompt.ids, &request->prompt.n_ids, &failed);
    if (status == KVL_OK) return true;
    kvl_api_error_from(error, status, "prompt", failed.text);
    return false;
}

/* The room that the prompt leaves, unless the request or, for completions, OpenAI's own default
 * says less. */
static bool take_max_tokens(const kvl_engine *engine, kvl_api_request *request,
                            kvl_api_error *error)
{
    kvl_generation *g = &request->generation;
    const size_t n_ids = request->prompt.n_ids;
    const char *param = request->is_chat ? "messages" : "prompt";
    if (n_ids == 0) return kvl_api_refuse(error, param, "the prompt has no tokens");
    const uint32_t room = kvl_scheduler_tokens_max(engine);
    if (n_ids >= room) {
        (void)kvl_api_refuse(error, param, "the prompt has %zu tokens; the context is %u tokens",
                             n_ids, room);
        error->code = "context_length_exceeded";
        return false;
    }
    const uint32_t left = (uint32_t)(room - n_ids);
    g->max_tokens = left;
    if (!request->is_chat && left > COMPLETION_TOKENS_DEFAULT)
        g->max_tokens = COMPLETION_TOKENS_DEFAULT;
    const bool is_new = find(request, "max_completion_tokens") != NULL;
    const char *name = is_new ? "max_completion_tokens" : "max_tokens";
    if (!take_whole(request, name, 1, INT32_MAX, &g->max_tokens, error)) return false;
    if (g->max_tokens > left) {
        (void)kvl_api_refuse(error, name,
                             "the prompt has %zu tokens and %s is %u, more than the context of "
                             "%u tokens",
                             n_ids, name, g->max_tokens, room);
        error->code = "context_length_exceeded";
        return false;
    }
    return true;
}

static bool take_fields(const kvl_engine *engine, kvl_api_request *request, kvl_api_error *error)
{
    kvl_generation *g = &request->generation;
    g->n_branches = 1;
    g->sampling = kvl_sampling_default();
    if (!take_model(request, error) ||
        !take_whole(request, "n", 1, KVL_BRANCHES_MAX, &g->n_branches, error) ||
        !refuse_unsupported(request, error) || !take_stream(request, error) ||
        !take_sampling(request, error) || !take_logprobs(request, error) ||
        !take_stops(request, error) || !take_cache_salt(request, error))
        return false;
    if (!(request->is_chat ? take_messages(engine, request, error)
                           : take_prompt(engine, request, error)))
        return false;
    if (!take_max_tokens(engine, request, error)) return false;
    g->ids = request->prompt.ids;
    g->n_ids = (uint32_t)request->prompt.n_ids;
    return true;
}

static bool parse_body(const kvl_engine *engine, const char *body, size_t n_bytes,
                       kvl_api_request *request, kvl_api_error *error)
{
    json_error_t failed;
    request->body = json_loadb(body, n_bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &failed);
    if (request->body == NULL)
        return kvl_api_refuse(error, "", "the body is no JSON: %s (line %d, column %d)",
                              failed.text, failed.line, failed.column);
    if (!json_is_object(request->body))
        return kvl_api_refuse(error, "", "the body must be a JSON object");
    if (request->kind != KVL_API_RESPONSE) return take_fields(engine, request, error);
    if (!kvl_responses_translate(request, error)) return false;
    const bool is_taken = take_fields(engine, request, error);
    if (!is_taken) kvl_responses_rename(error);
    return is_taken;
}

bool kvl_api_request_parse(const kvl_engine *engine, const char *model_name, kvl_api_kind kind,
                           const char *body, size_t n_bytes, kvl_api_request *request,
                           kvl_api_error *error)
{
    static const char *const prefixes[] = {
        [KVL_API_CHAT] = "chatcmpl-", [KVL_API_TEXT] = "cmpl-", [KVL_API_RESPONSE] = "resp_"};
    uint64_t number = 0;
    kvl_random_secret(&number, sizeof number);
    const kvl_clock *clock = kvl_clock_system();
    *request = (kvl_api_request){.kind = kind,
                                 .is_chat = kind != KVL_API_TEXT,
                                 .model_name = model_name,
                                 .start_ns = kvl_clock_now(clock),
                                 .created_s = clock->wall_ns(clock->context) / KVL_NS_PER_S};
    (void)snprintf(request->id, sizeof request->id, "%s%016" PRIx64, prefixes[kind], number);
    return parse_body(engine, body, n_bytes, request, error);
}

void kvl_api_request_deinit(kvl_api_request *request)
{
    kvl_prompt_deinit(&request->prompt);
    kvl_free(request->stops);
    kvl_free(request->texts);
    json_decref(request->body);
    *request = (kvl_api_request){0};
}
