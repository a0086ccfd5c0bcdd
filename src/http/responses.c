/* http/responses.c: one message in, one message out, in the Responses API's words. */
#include "http/responses.h"

#include <string.h>

/* ---- requests ---- */

static bool refuse(kvl_api_error *error, const char *param, const char *why)
{
    (void)kvl_api_refuse(error, param, "%s: %s", param, why);
    error->code = "unsupported_parameter";
    return false;
}

/* Parts of types input_text and output_text become a chat's parts of type text. NULL where a part
 * is something else. */
static json_t *translate_content(const json_t *content)
{
    if (json_is_string(content)) return json_incref((json_t *)(uintptr_t)content);
    if (!json_is_array(content)) return NULL;
    json_t *parts = json_array();
    for (size_t i = 0; i < json_array_size(content); i++) {
        const json_t *part = json_array_get(content, i);
        const char *type = json_string_value(json_object_get(part, "type"));
        json_t *text = json_object_get(part, "text");
        const bool is_text = type != NULL && json_is_string(text) &&
                             (strcmp(type, "input_text") == 0 || strcmp(type, "output_text") == 0);
        if (!is_text) {
            json_decref(parts);
            return NULL;
        }
        (void)json_array_append_new(parts, json_pack("{s:s, s:O}", "type", "text", "text", text));
    }
    return parts;
}

static bool add_item(json_t *messages, const json_t *item, kvl_api_error *error)
{
    const json_t *type = json_object_get(item, "type");
    json_t *role = json_object_get(item, "role");
    if (!json_is_object(item) || !json_is_string(role) ||
        (type != NULL &&
         (!json_is_string(type) || strcmp(json_string_value(type), "message") != 0)))
        return kvl_api_refuse(error, "input",
                              "input must be a text or an array of messages with role and content");
    json_t *content = translate_content(json_object_get(item, "content"));
    if (content == NULL)
        return kvl_api_refuse(error, "input",
                              "the content of a message of input must be a text, or parts of type "
                              "input_text or output_text");
    (void)json_array_append_new(messages,
                                json_pack("{s:O, s:o}", "role", role, "content", content));
    return true;
}

static bool add_input(const json_t *body, json_t *messages, kvl_api_error *error)
{
    json_t *instructions = json_object_get(body, "instructions");
    if (json_is_string(instructions)) {
        (void)json_array_append_new(
            messages, json_pack("{s:s, s:O}", "role", "system", "content", instructions));
    } else if (instructions != NULL && !json_is_null(instructions)) {
        return kvl_api_refuse(error, "instructions", "instructions must be a text");
    }
    json_t *input = json_object_get(body, "input");
    if (json_is_string(input)) {
        (void)json_array_append_new(messages,
                                    json_pack("{s:s, s:O}", "role", "user", "content", input));
        return true;
    }
    if (!json_is_array(input) || json_array_size(input) == 0)
        return kvl_api_refuse(error, "input", "input must be a text or an array of messages");
    for (size_t i = 0; i < json_array_size(input); i++)
        if (!add_item(messages, json_array_get(input, i), error)) return false;
    return true;
}

static void rename_field(json_t *body, const char *from, const char *to)
{
    json_t *value = json_incref(json_object_get(body, from));
    (void)json_object_del(body, to);
    if (value != NULL) (void)json_object_set_new(body, to, value);
}

bool kvl_responses_translate(kvl_api_request *request, kvl_api_error *error)
{
    static const char *const unknown[] = {"previous_response_id", "conversation", "prompt"};
    /* A chat's own fields mean nothing here. */
    static const char *const others[] = {"n", "stream_options", "logprobs", "top_logprobs",
                                         "best_of"};
    json_t *body = request->body;
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
        const json_t *value = json_object_get(body, unknown[i]);
        if (value != NULL && !json_is_null(value))
            return refuse(error, unknown[i], "this server keeps no responses; send them in input");
    }
    if (json_is_true(json_object_get(body, "background")))
        return refuse(error, "background", "this server answers at once or not at all");
    if (json_integer_value(json_object_get(body, "top_logprobs")) > 0)
        return refuse(error, "top_logprobs", "ask /v1/chat/completions for logprobs");
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        (void)json_object_del(body, others[i]);
    json_t *messages = json_array();
    if (!add_input(body, messages, error)) {
        json_decref(messages);
        return false;
    }
    (void)json_object_set_new(body, "messages", messages);
    (void)json_object_del(body, "max_completion_tokens");
    rename_field(body, "max_output_tokens", "max_tokens");
    json_t *text = json_object_get(body, "text");
    rename_field(json_is_object(text) ? text : body, "format", "response_format");
    json_t *format = json_object_get(text, "response_format");
    (void)json_object_del(body, "response_format");
    if (format != NULL) (void)json_object_set(body, "response_format", format);
    return true;
}

void kvl_responses_rename(kvl_api_error *error)
{
    static const char *const names[][2] = {
        {"messages", "input"}, {"max_tokens", "max_output_tokens"}, {"response_format", "text"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strncmp(error->param, names[i][0], strlen(names[i][0])) == 0)
            memcpy(error->param, names[i][1], strlen(names[i][1]) + 1);
}

/* ---- answers ---- */

static const char *item_id(const kvl_api_request *request)
{
    /* "resp_..." without its first word: a message's id is another one, and always the same. */
    return request->id + 5;
}

static json_t *part_json(const kvl_api_answer *answer)
{
    const kvl_api_choice *choice = &answer->choices[0];
    return json_pack("{s:s, s:o, s:[], s:[]}", "type", "output_text", "text",
                     json_stringn(choice->text == NULL ? "" : choice->text, choice->n_text),
                     "annotations", "logprobs");
}

static const char *status_of(const kvl_api_answer *answer)
{
    switch (answer->choices[0].finish) {
    case KVL_FINISH_NONE: return "in_progress";
    case KVL_FINISH_LENGTH: return "incomplete";
    default: return "completed";
    }
}

static json_t *item_json(const kvl_api_request *request, const kvl_api_answer *answer,
                         bool with_content)
{
    json_t *content = json_array();
    if (with_content) (void)json_array_append_new(content, part_json(answer));
    return json_pack("{s:s+, s:s, s:s, s:s, s:o}", "id", "msg_", item_id(request), "type",
                     "message", "role", "assistant", "status", status_of(answer), "content",
                     content);
}

static json_t *usage_json(const kvl_api_request *request, const kvl_api_answer *answer)
{
    const json_int_t n_in = request->generation.n_ids;
    const json_int_t n_out = answer->choices[0].n_tokens;
    return json_pack("{s:I, s:{s:I}, s:I, s:{s:i}, s:I}", "input_tokens", n_in,
                     "input_tokens_details", "cached_tokens", (json_int_t)answer->n_cached,
                     "output_tokens", n_out, "output_tokens_details", "reasoning_tokens", 0,
                     "total_tokens", n_in + n_out);
}

static json_t *response_json(const kvl_api_request *request, const kvl_api_answer *answer,
                             bool is_over)
{
    json_t *output = json_array();
    if (is_over) (void)json_array_append_new(output, item_json(request, answer, true));
    const bool is_cut = is_over && answer->choices[0].finish == KVL_FINISH_LENGTH;
    const json_t *instructions = json_object_get(request->body, "instructions");
    return json_pack(
        "{s:s, s:s, s:I, s:s, s:n, s:o, s:O?, s:I, s:s, s:o, s:n, s:f, s:f, s:s, s:[], s:b, s:b, "
        "s:o}",
        "id", request->id, "object", "response", "created_at", (json_int_t)request->created_s,
        "status", is_over ? status_of(answer) : "in_progress", "error", "incomplete_details",
        is_cut ? json_pack("{s:s}", "reason", "max_output_tokens") : json_null(), "instructions",
        instructions, "max_output_tokens", (json_int_t)request->generation.max_tokens, "model",
        request->model_name, "output", output, "previous_response_id", "temperature",
        (double)request->generation.sampling.temperature, "top_p",
        (double)request->generation.sampling.top_p, "tool_choice", "auto", "tools",
        "parallel_tool_calls", 0, "store", 0, "usage",
        is_over ? usage_json(request, answer) : json_null());
}

json_t *kvl_responses_whole(const kvl_api_request *request, const kvl_api_answer *answer)
{
    return response_json(request, answer, true);
}

/* ---- events ---- */

/* Takes `event`, which gets its type and number. */
static void add_event(json_t *events, const char *type, json_t *event, uint32_t *n_events)
{
    (void)json_object_set_new(event, "type", json_string(type));
    (void)json_object_set_new(event, "sequence_number", json_integer((*n_events)++));
    (void)json_array_append_new(events, event);
}

/* Where in the response something stands: there is one message with one part. */
static json_t *placed(const kvl_api_request *request)
{
    return json_pack("{s:s+, s:i, s:i}", "item_id", "msg_", item_id(request), "output_index", 0,
                     "content_index", 0);
}

json_t *kvl_responses_opening(const kvl_api_request *request, const kvl_api_answer *answer,
                              uint32_t *n_events)
{
    json_t *events = json_array();
    static const char *const types[] = {"response.created", "response.in_progress"};
    for (size_t i = 0; i < 2; i++)
        add_event(events, types[i],
                  json_pack("{s:o}", "response", response_json(request, answer, false)), n_events);
    add_event(events, "response.output_item.added",
              json_pack("{s:i, s:o}", "output_index", 0, "item", item_json(request, answer, false)),
              n_events);
    json_t *part = placed(request);
    (void)json_object_set_new(part, "part", part_json(answer));
    add_event(events, "response.content_part.added", part, n_events);
    return events;
}

json_t *kvl_responses_piece(const kvl_api_request *request, const kvl_generation_event *event,
                            uint32_t *n_events)
{
    json_t *events = json_array();
    if (event->n_text_bytes == 0) return events;
    json_t *delta = placed(request);
    (void)json_object_set_new(delta, "delta", json_stringn(event->text, event->n_text_bytes));
    (void)json_object_set_new(delta, "logprobs", json_array());
    add_event(events, "response.output_text.delta", delta, n_events);
    return events;
}

json_t *kvl_responses_ending(const kvl_api_request *request, const kvl_api_answer *answer,
                             uint32_t *n_events)
{
    json_t *events = json_array();
    json_t *text = placed(request);
    json_t *part = part_json(answer);
    (void)json_object_set(text, "text", json_object_get(part, "text"));
    (void)json_object_set_new(text, "logprobs", json_array());
    add_event(events, "response.output_text.done", text, n_events);
    json_t *done = placed(request);
    (void)json_object_set_new(done, "part", part);
    add_event(events, "response.content_part.done", done, n_events);
    add_event(events, "response.output_item.done",
              json_pack("{s:i, s:o}", "output_index", 0, "item", item_json(request, answer, true)),
              n_events);
    const bool is_cut = answer->choices[0].finish == KVL_FINISH_LENGTH;
    add_event(events, is_cut ? "response.incomplete" : "response.completed",
              json_pack("{s:o}", "response", response_json(request, answer, true)), n_events);
    return events;
}

json_t *kvl_responses_error(const kvl_api_error *error, uint32_t *n_events)
{
    json_t *events = json_array();
    add_event(
        events, "error",
        json_pack("{s:s?, s:s, s:n}", "code", error->code, "message", error->message, "param"),
        n_events);
    return events;
}
