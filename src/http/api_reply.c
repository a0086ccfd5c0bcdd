/* http/api_reply.c: events to choices, choices to JSON. */
#include "base/alloc.h"
#include "http/api.h"
#include "http/tools.h"
#include "model/model.h"

#include <string.h>

static const char *const finish_names[] = {
    [KVL_FINISH_NONE] = NULL,        [KVL_FINISH_STOP] = "stop",    [KVL_FINISH_LENGTH] = "length",
    [KVL_FINISH_CANCELLED] = "stop", [KVL_FINISH_FAILED] = "error",
};

/* ---- logprobs ---- */

/* The token's text as JSON may hold it: a token may end within a character, so its bytes stand
 * beside it. */
static json_t *token_text(const kvl_tokenizer *tokenizer, uint32_t token)
{
    size_t n_bytes = 0;
    const char *bytes = kvl_token_bytes(tokenizer, token, true, &n_bytes);
    json_t *text = json_stringn(bytes == NULL ? "" : bytes, n_bytes);
    return text != NULL ? text : json_string("\xef\xbf\xbd");
}

static json_t *chat_logprob(const kvl_tokenizer *tokenizer, uint32_t token, float logprob)
{
    size_t n_bytes = 0;
    const char *bytes = kvl_token_bytes(tokenizer, token, true, &n_bytes);
    json_t *list = json_array();
    for (size_t i = 0; i < n_bytes; i++)
        (void)json_array_append_new(list, json_integer((unsigned char)bytes[i]));
    return json_pack("{s:o, s:f, s:o}", "token", token_text(tokenizer, token), "logprob",
                     (double)logprob, "bytes", list);
}

static json_t *chat_entry(const kvl_tokenizer *tokenizer, const kvl_drawn *drawn)
{
    json_t *entry = chat_logprob(tokenizer, drawn->token, drawn->logprob);
    json_t *top = json_array();
    for (uint32_t i = 0; i < drawn->n_top; i++)
        (void)json_array_append_new(
            top, chat_logprob(tokenizer, drawn->top[i].token, drawn->top[i].logprob));
    (void)json_object_set_new(entry, "top_logprobs", top);
    return entry;
}

/* {"token", "logprob", "top": {text: logprob}}: completions have three lists of these. */
static json_t *text_entry(const kvl_tokenizer *tokenizer, const kvl_drawn *drawn)
{
    json_t *top = json_object();
    for (uint32_t i = 0; i < drawn->n_top; i++) {
        json_t *text = token_text(tokenizer, drawn->top[i].token);
        (void)json_object_setn_new(top, json_string_value(text), json_string_length(text),
                                   json_real((double)drawn->top[i].logprob));
        json_decref(text);
    }
    return json_pack("{s:o, s:f, s:o}", "token", token_text(tokenizer, drawn->token), "logprob",
                     (double)drawn->logprob, "top", top);
}

/* Entries to what a choice shows. NULL entries give null. */
static json_t *logprobs_json(const kvl_api_request *request, json_t *entries)
{
    if (entries == NULL) return json_null();
    if (request->is_chat) return json_pack("{s:O}", "content", entries);
    json_t *tokens = json_array();
    json_t *numbers = json_array();
    json_t *tops = json_array();
    json_t *offsets = json_array();
    size_t at = 0;
    for (size_t i = 0; i < json_array_size(entries); i++) {
        json_t *entry = json_array_get(entries, i);
        json_t *token = json_object_get(entry, "token");
        (void)json_array_append(tokens, token);
        (void)json_array_append(numbers, json_object_get(entry, "logprob"));
        (void)json_array_append(tops, json_object_get(entry, "top"));
        (void)json_array_append_new(offsets, json_integer((json_int_t)at));
        at += json_string_length(token);
    }
    return json_pack("{s:o, s:o, s:o, s:o}", "tokens", tokens, "token_logprobs", numbers,
                     "top_logprobs", tops, "text_offset", offsets);
}

/* ---- collecting ---- */

void kvl_api_answer_deinit(kvl_api_answer *answer)
{
    for (uint32_t i = 0; i < KVL_BRANCHES_MAX; i++) {
        kvl_free(answer->choices[i].text);
        json_decref(answer->choices[i].logprobs);
    }
}

static bool add_text(kvl_api_choice *choice, const char *text, size_t n_bytes)
{
    if (choice->n_text + n_bytes > choice->text_max) {
        const size_t wanted = 2 * (choice->n_text + n_bytes) + 256;
        char *larger = kvl_realloc(choice->text, wanted);
        if (larger == NULL) return false;
        choice->text = larger;
        choice->text_max = wanted;
    }
    if (n_bytes > 0) memcpy(choice->text + choice->n_text, text, n_bytes);
    choice->n_text += n_bytes;
    return true;
}

static json_t *entry_of(const kvl_api_request *request, const kvl_tokenizer *tokenizer,
                        const kvl_generation_event *event)
{
    return request->is_chat ? chat_entry(tokenizer, event->drawn)
                            : text_entry(tokenizer, event->drawn);
}

/* A token that ends the answer is drawn and not shown: nobody is told of its logprob. */
static bool has_entry(const kvl_api_request *request, const kvl_generation_event *event)
{
    return request->generation.sampling.with_logprobs && event->drawn != NULL &&
           !(event->finish == KVL_FINISH_STOP && event->n_text_bytes == 0);
}

bool kvl_api_answer_add(kvl_api_answer *answer, const kvl_api_request *request,
                        const kvl_tokenizer *tokenizer, const kvl_generation_event *event)
{
    KVL_ASSERT(event->branch < KVL_BRANCHES_MAX);
    kvl_api_choice *choice = &answer->choices[event->branch];
    choice->n_tokens = event->n_tokens;
    if (event->finish != KVL_FINISH_NONE) choice->finish = event->finish;
    answer->n_cached = event->n_cached;
    answer->reuse = event->reuse;
    if (request->is_stream && request->kind != KVL_API_RESPONSE && request->tools == NULL)
        return true;
    if (!add_text(choice, event->text, event->n_text_bytes)) return false;
    if (!has_entry(request, event) || (request->is_stream && request->tools != NULL)) return true;
    if (choice->logprobs == NULL) choice->logprobs = json_array();
    return json_array_append_new(choice->logprobs, entry_of(request, tokenizer, event)) == 0;
}

/* ---- JSON ---- */

static json_t *usage_json(const kvl_api_request *request, const kvl_api_answer *answer)
{
    json_int_t n_answer = 0;
    for (uint32_t i = 0; i < request->generation.n_branches; i++)
        n_answer += answer->choices[i].n_tokens;
    const json_int_t n_prompt = request->generation.n_ids;
    return json_pack("{s:I, s:I, s:I, s:{s:I}}", "prompt_tokens", n_prompt, "completion_tokens",
                     n_answer, "total_tokens", n_prompt + n_answer, "prompt_tokens_details",
                     "cached_tokens", (json_int_t)answer->n_cached);
}

/* What is this server's own: not in OpenAI's API. */
static json_t *kvloom_json(const kvl_api_request *request, const kvl_api_answer *answer)
{
    const double ttft_ms = answer->first_token_ns == 0
                               ? 0.0
                               : (double)(answer->first_token_ns - request->start_ns) / 1e6;
    const kvl_reuse_report *reuse = &answer->reuse;
    const json_int_t n_known = (json_int_t)answer->n_cached + reuse->n_placed;
    json_t *own = json_pack("{s:I, s:f}", "computed_tokens",
                            (json_int_t)request->generation.n_ids - n_known + reuse->n_recomputed,
                            "ttft_ms", ttft_ms);
    if (request->generation.quality == KVL_REUSE_EXACT) return own;
    json_t *more =
        json_pack("{s:s, s:b, s:I, s:I, s:I, s:b, s:b, s:b}", "quality",
                  kvl_api_quality_name(request->generation.quality), "approximate",
                  reuse->is_approximate, "placed_tokens", (json_int_t)reuse->n_placed,
                  "recomputed_tokens", (json_int_t)reuse->n_recomputed, "corrected_tokens",
                  (json_int_t)reuse->n_corrected, "verified", reuse->is_verified, "healing",
                  reuse->is_healing, "fallback", reuse->is_fallback);
    (void)json_object_update(own, more);
    json_decref(more);
    return own;
}

static json_t *envelope(const kvl_api_request *request, const char *object, json_t *choices)
{
    return json_pack("{s:s, s:s, s:I, s:s, s:o}", "id", request->id, "object", object, "created",
                     (json_int_t)request->created_s, "model", request->model_name, "choices",
                     choices);
}

/* A chat's message, and why it ended. A call that is whole takes the place of its text. */
static json_t *message_of(const kvl_api_request *request, const kvl_api_choice *choice,
                          const char **finish)
{
    size_t n_content = choice->n_text;
    json_t *calls = kvl_tools_calls(request, choice->text, choice->n_text, &n_content);
    json_t *content = calls != NULL && n_content == 0
                          ? json_null()
                          : json_stringn(choice->text == NULL ? "" : choice->text, n_content);
    json_t *message =
        json_pack("{s:s, s:o?, s:n}", "role", "assistant", "content", content, "refusal");
    *finish = calls == NULL ? finish_names[choice->finish] : "tool_calls";
    if (calls != NULL) (void)json_object_set_new(message, "tool_calls", calls);
    return message;
}

json_t *kvl_api_whole(const kvl_api_request *request, const kvl_api_answer *answer)
{
    json_t *choices = json_array();
    for (uint32_t i = 0; i < request->generation.n_branches; i++) {
        const kvl_api_choice *choice = &answer->choices[i];
        const char *finish = finish_names[choice->finish];
        json_t *message = request->is_chat ? message_of(request, choice, &finish) : NULL;
        json_t *made = json_pack("{s:i, s:o, s:s?}", "index", (int)i, "logprobs",
                                 logprobs_json(request, choice->logprobs), "finish_reason", finish);
        if (message != NULL)
            (void)json_object_set_new(made, "message", message);
        else
            (void)json_object_set_new(
                made, "text",
                json_stringn(choice->text == NULL ? "" : choice->text, choice->n_text));
        (void)json_array_append_new(choices, made);
    }
    json_t *whole =
        envelope(request, request->is_chat ? "chat.completion" : "text_completion", choices);
    (void)json_object_set_new(whole, "usage", usage_json(request, answer));
    (void)json_object_set_new(whole, "kvloom", kvloom_json(request, answer));
    return whole;
}

static json_t *chunk(const kvl_api_request *request, json_t *choice)
{
    json_t *choices = json_array();
    if (choice != NULL) (void)json_array_append_new(choices, choice);
    json_t *made =
        envelope(request, request->is_chat ? "chat.completion.chunk" : "text_completion", choices);
    /* Whoever asked for usage finds the field in every chunk, and the number in the last. */
    if (request->with_usage) (void)json_object_set_new(made, "usage", json_null());
    return made;
}

json_t *kvl_api_opening(const kvl_api_request *request, uint32_t choice)
{
    return chunk(request,
                 json_pack("{s:i, s:{s:s, s:s}, s:n, s:n}", "index", (int)choice, "delta", "role",
                           "assistant", "content", "", "logprobs", "finish_reason"));
}

/* What a chunk says beside its text. */
typedef struct piece {
    const char *text;
    size_t n_text;
    json_t *calls; /* or NULL */
    const char *finish;
} piece;

/* With tools the text goes out as far as no call can be in it; at its end it is known. */
static piece take_piece(const kvl_api_request *request, kvl_api_choice *choice,
                        const kvl_generation_event *event)
{
    piece p = {event->text, event->n_text_bytes, NULL, finish_names[event->finish]};
    if (request->tools == NULL) return p;
    const bool is_end = event->finish != KVL_FINISH_NONE;
    size_t n_shown = kvl_tools_shown(choice->text, choice->n_text);
    if (is_end) p.calls = kvl_tools_calls(request, choice->text, choice->n_text, &n_shown);
    if (p.calls != NULL) p.finish = "tool_calls";
    if (n_shown < choice->n_shown) n_shown = choice->n_shown;
    p.text = choice->n_text == 0 ? "" : choice->text + choice->n_shown;
    p.n_text = n_shown - choice->n_shown;
    choice->n_shown = n_shown;
    for (size_t i = 0; i < json_array_size(p.calls); i++)
        (void)json_object_set_new(json_array_get(p.calls, i), "index", json_integer((json_int_t)i));
    return p;
}

json_t *kvl_api_piece(const kvl_api_request *request, kvl_api_answer *answer,
                      const kvl_tokenizer *tokenizer, const kvl_generation_event *event)
{
    const bool with_entry = has_entry(request, event);
    const piece p = take_piece(request, &answer->choices[event->branch], event);
    if (p.n_text == 0 && event->finish == KVL_FINISH_NONE && !with_entry) return NULL;
    json_t *entries = NULL;
    if (with_entry) {
        entries = json_array();
        (void)json_array_append_new(entries, entry_of(request, tokenizer, event));
    }
    json_t *choice = json_pack("{s:i, s:o, s:s?}", "index", (int)event->branch, "logprobs",
                               logprobs_json(request, entries), "finish_reason", p.finish);
    json_decref(entries);
    if (!request->is_chat) {
        (void)json_object_set_new(choice, "text", json_stringn(p.text, p.n_text));
        return chunk(request, choice);
    }
    json_t *delta = json_object();
    if (p.n_text > 0) (void)json_object_set_new(delta, "content", json_stringn(p.text, p.n_text));
    if (p.calls != NULL) (void)json_object_set_new(delta, "tool_calls", p.calls);
    (void)json_object_set_new(choice, "delta", delta);
    return chunk(request, choice);
}

json_t *kvl_api_usage(const kvl_api_request *request, const kvl_api_answer *answer)
{
    json_t *made = chunk(request, NULL);
    (void)json_object_set_new(made, "usage", usage_json(request, answer));
    (void)json_object_set_new(made, "kvloom", kvloom_json(request, answer));
    return made;
}
