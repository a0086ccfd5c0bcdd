/* http/tools.c: signatures into the prompt, calls out of the answer. */
#include "http/tools.h"

#include "base/alloc.h"
#include "base/random.h"
#include "model/model.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_BYTES_MAX = 64 };

static const char CALL[] = "<tool_call>";
static const char CALL_END[] = "</tool_call>";
static const char DEFAULT_SYSTEM[] = "You are a helpful assistant.";

/* ---- what is asked ---- */

static bool is_name(const json_t *value)
{
    const char *name = json_string_value(value);
    const size_t n = json_string_length(value);
    return name != NULL && n > 0 && n <= NAME_BYTES_MAX && strlen(name) == n &&
           strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") == n;
}

static bool check_tool(const json_t *tool, size_t index, kvl_api_error *error)
{
    char param[64];
    (void)snprintf(param, sizeof param, "tools[%zu]", index);
    const char *type = json_string_value(json_object_get(tool, "type"));
    const json_t *function = json_object_get(tool, "function");
    const json_t *parameters = json_object_get(function, "parameters");
    const json_t *description = json_object_get(function, "description");
    if (type == NULL || strcmp(type, "function") != 0)
        return kvl_api_refuse(error, param, "%s must have the type \"function\"", param);
    if (!is_name(json_object_get(function, "name")))
        return kvl_api_refuse(error, param,
                              "the function of %s needs a name of 1 to %d letters, digits, '_' and "
                              "'-'",
                              param, NAME_BYTES_MAX);
    if (parameters != NULL && !json_is_object(parameters))
        return kvl_api_refuse(error, param, "parameters of %s must be an object", param);
    if (description != NULL && !json_is_string(description))
        return kvl_api_refuse(error, param, "description of %s must be a text", param);
    return true;
}

/* "none" is as if there were no tools; that one must be called cannot be promised. */
static bool take_choice(const json_t *body, bool *wants_tools, kvl_api_error *error)
{
    const json_t *choice = json_object_get(body, "tool_choice");
    const char *text = json_string_value(choice);
    *wants_tools = text == NULL || strcmp(text, "none") != 0;
    if (choice == NULL || json_is_null(choice)) return true;
    if (text != NULL && (strcmp(text, "auto") == 0 || strcmp(text, "none") == 0)) return true;
    (void)kvl_api_refuse(error, "tool_choice",
                         "tool_choice must be \"auto\" or \"none\": this server does not force "
                         "calls");
    error->code = "unsupported_parameter";
    return false;
}

static bool take_tools(const kvl_engine *engine, kvl_api_request *request, kvl_api_error *error)
{
    const json_t *tools = json_object_get(request->body, "tools");
    bool wants_tools = false;
    if (!take_choice(request->body, &wants_tools, error)) return false;
    if (tools == NULL || json_is_null(tools)) return true;
    const size_t n = json_array_size(tools);
    if (!json_is_array(tools) || n > KVL_TOOLS_MAX)
        return kvl_api_refuse(error, "tools", "tools must be an array of up to %u tools",
                              KVL_TOOLS_MAX);
    for (size_t i = 0; i < n; i++)
        if (!check_tool(json_array_get(tools, i), i, error)) return false;
    if (n == 0 || !wants_tools) return true;
    const char *name = kvl_chat_template_name(kvl_model_chat_template(engine->model));
    if (strncmp(name, "chatml", 6) != 0) {
        (void)kvl_api_refuse(error, "tools", "models with the template '%s' have no tools here",
                             name);
        error->code = "unsupported_parameter";
        return false;
    }
    request->tools = tools;
    return true;
}

/* ---- messages ---- */

/* A text that is put together; NULL bytes without memory. */
typedef struct writing {
    char *bytes;
    size_t n_bytes;
    FILE *file;
} writing;

static bool begin(writing *t)
{
    *t = (writing){.bytes = NULL};
    t->file = open_memstream(&t->bytes, &t->n_bytes);
    return t->file != NULL;
}

static json_t *finish(writing *t)
{
    const bool is_whole = ferror(t->file) == 0 && fclose(t->file) == 0;
    json_t *string = is_whole ? json_stringn(t->bytes, t->n_bytes) : NULL;
    free(t->bytes); /* tidy: free, open_memstream allocated it */
    return string;
}

static int write_bytes(const char *bytes, size_t n_bytes, void *file)
{
    return fwrite(bytes, 1, n_bytes, file) == n_bytes ? 0 : -1;
}

static void write_json(writing *t, const json_t *value)
{
    (void)json_dump_callback(value, write_bytes, t->file, JSON_ENCODE_ANY);
}

/* Writes a message's content. `may_miss`: or nothing, where there is none. */
static bool write_content(writing *t, const json_t *message, size_t index, bool may_miss,
                          kvl_api_error *error)
{
    const json_t *content = json_object_get(message, "content");
    if (may_miss && (content == NULL || json_is_null(content))) return true;
    size_t n_bytes = 0;
    char *bytes = json_is_string(content) || json_is_array(content)
                      ? kvl_api_content(content, &n_bytes)
                      : NULL;
    if (bytes != NULL) {
        (void)fwrite(bytes, 1, n_bytes, t->file);
        kvl_free(bytes);
        return true;
    }
    char param[64];
    (void)snprintf(param, sizeof param, "messages[%zu]", index);
    return kvl_api_refuse(error, param, "the content of %s must be a text or parts of type text",
                          param);
}

static void write_signatures(writing *t, const json_t *tools)
{
    (void)fprintf(t->file, "\n\n# Tools\n\nYou may call one or more functions to assist with the "
                           "user query.\n\nYou are provided with function signatures within "
                           "<tools></tools> XML tags:\n<tools>");
    for (size_t i = 0; i < json_array_size(tools); i++) {
        (void)fputc('\n', t->file);
        write_json(t, json_array_get(tools, i));
    }
    (void)fprintf(t->file, "\n</tools>\n\nFor each function call, return a json object with "
                           "function name and arguments within <tool_call></tool_call> XML tags:\n"
                           "<tool_call>\n{\"name\": <function-name>, \"arguments\": "
                           "<args-json-object>}\n</tool_call>");
}

/* Adds a message of a role with the text, which ends here. */
static bool add_message(json_t *messages, const char *role, writing *t)
{
    json_t *content = finish(t);
    if (content == NULL) return false;
    json_t *message = json_pack("{s:s, s:o}", "role", role, "content", content);
    return message != NULL && json_array_append_new(messages, message) == 0;
}

static bool no_memory(kvl_api_error *error)
{
    kvl_api_error_from(error, KVL_ERR_NO_MEMORY, "", "no memory for messages");
    return false;
}

static bool add_system(json_t *messages, const json_t *given, const json_t *tools,
                       kvl_api_error *error)
{
    writing t;
    if (!begin(&t)) return no_memory(error);
    if (given == NULL) {
        (void)fputs(DEFAULT_SYSTEM, t.file);
    } else if (!write_content(&t, given, 0, false, error)) {
        json_decref(finish(&t));
        return false;
    }
    write_signatures(&t, tools);
    return add_message(messages, "system", &t) || no_memory(error);
}

static bool write_call(writing *t, const json_t *call, bool is_first)
{
    const json_t *function = json_object_get(call, "function");
    const json_t *arguments = json_object_get(function, "arguments");
    if (!is_name(json_object_get(function, "name")) || !json_is_string(arguments)) return false;
    json_t *parsed = json_loadb(json_string_value(arguments), json_string_length(arguments),
                                JSON_DECODE_ANY, NULL);
    if (parsed == NULL) return false;
    (void)fprintf(t->file, "%s%s\n{\"name\": \"%s\", \"arguments\": ", is_first ? "" : "\n", CALL,
                  json_string_value(json_object_get(function, "name")));
    write_json(t, parsed);
    (void)fprintf(t->file, "}\n%s", CALL_END);
    json_decref(parsed);
    return true;
}

static bool add_calls(json_t *messages, const json_t *given, size_t index, kvl_api_error *error)
{
    const json_t *calls = json_object_get(given, "tool_calls");
    writing t;
    bool is_right = json_is_array(calls);
    if (!begin(&t)) return no_memory(error);
    if (!write_content(&t, given, index, true, error)) {
        json_decref(finish(&t));
        return false;
    }
    (void)fflush(t.file);
    for (size_t i = 0; i < json_array_size(calls) && is_right; i++)
        is_right = write_call(&t, json_array_get(calls, i), i == 0 && t.n_bytes == 0);
    if (is_right) return add_message(messages, "assistant", &t) || no_memory(error);
    json_decref(finish(&t));
    return kvl_api_refuse(error, "messages",
                          "each of tool_calls of messages[%zu] needs a function with a name and "
                          "arguments, which are JSON in a text",
                          index);
}

static bool has_role(const json_t *message, const char *role)
{
    const char *has = json_string_value(json_object_get(message, "role"));
    return has != NULL && strcmp(has, role) == 0;
}

/* Neighbouring answers of tools are one message of the user's. */
static bool add_responses(json_t *messages, const json_t *given, size_t *index,
                          kvl_api_error *error)
{
    writing t;
    if (!begin(&t)) return no_memory(error);
    const size_t first = *index;
    bool is_right = true;
    for (; has_role(json_array_get(given, *index), "tool"); ++*index) {
        const json_t *message = json_array_get(given, *index);
        is_right &= json_is_string(json_object_get(message, "tool_call_id"));
        (void)fprintf(t.file, "%s<tool_response>\n", *index == first ? "" : "\n");
        if (!write_content(&t, message, *index, false, error)) {
            json_decref(finish(&t));
            return false;
        }
        (void)fputs("\n</tool_response>", t.file);
    }
    if (is_right) return add_message(messages, "user", &t) || no_memory(error);
    json_decref(finish(&t));
    return kvl_api_refuse(error, "messages", "a message of the role tool needs a tool_call_id");
}

static bool add_all(const kvl_api_request *request, const json_t *given, json_t *messages,
                    kvl_api_error *error)
{
    size_t i = 0;
    if (request->tools != NULL) {
        const json_t *first = json_array_get(given, 0);
        const bool has_system = has_role(first, "system") || has_role(first, "developer");
        if (!add_system(messages, has_system ? first : NULL, request->tools, error)) return false;
        i = has_system ? 1 : 0;
    }
    while (i < json_array_size(given)) {
        json_t *message = json_array_get(given, i);
        if (has_role(message, "tool")) {
            if (!add_responses(messages, given, &i, error)) return false;
            continue;
        }
        const json_t *calls = json_object_get(message, "tool_calls");
        if (has_role(message, "assistant") && calls != NULL && !json_is_null(calls)) {
            if (!add_calls(messages, message, i, error)) return false;
        } else if (json_array_append(messages, message) != 0) {
            return no_memory(error);
        }
        i++;
    }
    return true;
}

/* Whether any message is one that only tools have. */
static bool has_tool_messages(const json_t *given)
{
    for (size_t i = 0; i < json_array_size(given); i++) {
        const json_t *message = json_array_get(given, i);
        if (has_role(message, "tool") || json_object_get(message, "tool_calls") != NULL)
            return true;
    }
    return false;
}

bool kvl_tools_translate(const kvl_engine *engine, kvl_api_request *request, kvl_api_error *error)
{
    const json_t *given = json_object_get(request->body, "messages");
    if (!take_tools(engine, request, error)) return false;
    if (request->tools == NULL && !has_tool_messages(given)) return true;
    json_t *messages = json_array();
    if (messages == NULL) return no_memory(error);
    if (!add_all(request, given, messages, error)) {
        json_decref(messages);
        return false;
    }
    return json_object_set_new(request->body, "messages", messages) == 0 || no_memory(error);
}

/* ---- what is answered ---- */

static bool is_tool(const json_t *tools, const char *name)
{
    for (size_t i = 0; i < json_array_size(tools); i++) {
        const json_t *function = json_object_get(json_array_get(tools, i), "function");
        if (strcmp(json_string_value(json_object_get(function, "name")), name) == 0) return true;
    }
    return false;
}

/* One call from the JSON between two marks, or NULL. */
static json_t *call_of(const kvl_api_request *request, const char *bytes, size_t n_bytes)
{
    json_t *parsed = json_loadb(bytes, n_bytes, JSON_REJECT_DUPLICATES, NULL);
    const char *name = json_string_value(json_object_get(parsed, "name"));
    const json_t *arguments = json_object_get(parsed, "arguments");
    json_t *call = NULL;
    if (name != NULL && json_is_object(arguments) && is_tool(request->tools, name)) {
        char *dumped = json_dumps(arguments, JSON_COMPACT);
        uint64_t number = 0;
        char id[32];
        kvl_random_secret(&number, sizeof number);
        (void)snprintf(id, sizeof id, "call_%016" PRIx64, number);
        if (dumped != NULL)
            call = json_pack("{s:s, s:s, s:{s:s, s:s}}", "id", id, "type", "function", "function",
                             "name", name, "arguments", dumped);
        free(dumped); /* tidy: free, jansson allocated it */
    }
    json_decref(parsed);
    return call;
}

static bool is_blank(char c)
{
    return c == ' ' || c == '\n' || c == '\t' || c == '\r';
}

/* Small models leave the marks out, or put a fence of code in their place: then an answer that is a
 * call and nothing else is one. */
static json_t *bare_call(const kvl_api_request *request, const char *text, size_t n_bytes)
{
    static const char *const fences[] = {"```json", "```"};
    const char *end = text + n_bytes;
    while (text < end && is_blank(*text)) text++;
    while (text < end && is_blank(end[-1])) end--;
    for (size_t i = 0; i < sizeof fences / sizeof *fences; i++) {
        const size_t n = strlen(fences[i]);
        if ((size_t)(end - text) < n + 3 || memcmp(text, fences[i], n) != 0 ||
            memcmp(end - 3, "```", 3) != 0)
            continue;
        text += n;
        end -= 3;
        break;
    }
    while (text < end && is_blank(*text)) text++;
    return text < end && *text == '{' ? call_of(request, text, (size_t)(end - text)) : NULL;
}

json_t *kvl_tools_calls(const kvl_api_request *request, const char *text, size_t n_bytes,
                        size_t *n_before)
{
    *n_before = n_bytes;
    if (request->tools == NULL || n_bytes == 0) return NULL;
    json_t *calls = NULL;
    json_t *bare = bare_call(request, text, n_bytes);
    if (bare != NULL) {
        *n_before = 0;
        calls = json_array();
        (void)json_array_append_new(calls, bare);
        return calls;
    }
    const char *end = text + n_bytes;
    const char *at = memmem(text, n_bytes, CALL, sizeof CALL - 1);
    const char *first = at;
    while (at != NULL) {
        const char *from = at + sizeof CALL - 1;
        const char *to = memmem(from, (size_t)(end - from), CALL_END, sizeof CALL_END - 1);
        /* A model that ends its answer with the call may leave the last mark out. */
        const char *past = to == NULL ? end : to;
        json_t *call = call_of(request, from, (size_t)(past - from));
        if (call == NULL) {
            json_decref(calls);
            return NULL;
        }
        if (calls == NULL) calls = json_array();
        (void)json_array_append_new(calls, call);
        at = to == NULL ? NULL : memmem(to, (size_t)(end - to), CALL, sizeof CALL - 1);
    }
    if (calls == NULL) return NULL;
    *n_before = (size_t)(first - text);
    while (*n_before > 0 && is_blank(text[*n_before - 1])) --*n_before;
    return calls;
}

size_t kvl_tools_shown(const char *text, size_t n_bytes)
{
    size_t n_blank = 0;
    while (n_blank < n_bytes && is_blank(text[n_blank])) n_blank++;
    if (n_blank < n_bytes && (text[n_blank] == '{' || text[n_blank] == '`')) return 0;
    const char *at = n_bytes == 0 ? NULL : memmem(text, n_bytes, CALL, sizeof CALL - 1);
    size_t n = at == NULL ? n_bytes : (size_t)(at - text);
    /* The longest end that may be the beginning of a mark. */
    for (size_t n_mark = at == NULL ? sizeof CALL - 2 : 0; n_mark > 0; n_mark--) {
        if (n_mark <= n && memcmp(text + n - n_mark, CALL, n_mark) == 0) {
            n -= n_mark;
            break;
        }
    }
    /* White space before a call is not shown either. */
    while (n > 0 && is_blank(text[n - 1])) n--;
    return n;
}
