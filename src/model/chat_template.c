/* model/chat_template.c: renders messages part by part: template text gathers until a content
 * comes, then both become tokens, each on its own. */
#include "model/chat_template.h"

#include "base/alloc.h"
#include "model/chat_template_state.h"
#include "model/tokenizer.h"
#include "model/unicode_class.h"

#include <string.h>

#define MESSAGES_MAX 65536u

typedef struct rendering {
    const kvl_chat_template *chat;
    const kvl_tokenizer *tokenizer;
    const kvl_message *messages;
    size_t n_messages;
    bool add_generation;
    kvl_prompt *prompt;
    size_t parts_capacity;
    char *text; /* of the template, not yet tokens */
    size_t n_text;
    size_t text_capacity;
    kvl_error *error;
} rendering;

/* ---- parts */

/* Makes tokens of a text and a part of the tokens; nothing of a text that gives none (an empty one,
 * or bytes that the vocabulary lacks), because no part may be empty. */
static kvl_status add_part(rendering *render, const char *text, size_t n_bytes, int32_t message)
{
    kvl_prompt *prompt = render->prompt;
    const size_t first = prompt->n_ids;
    /* Only the template's own text may name special tokens. */
    KVL_TRY(kvl_tokenize(render->tokenizer, text, n_bytes, message < 0, &prompt->ids,
                         &prompt->n_ids, render->error));
    if (prompt->n_ids == first) return KVL_OK;
    if (prompt->n_ids > UINT32_MAX) {
        return KVL_FAIL(render->error, KVL_ERR_TOO_LARGE, "prompt of %zu tokens; at most %u",
                        prompt->n_ids, UINT32_MAX);
    }
    if (prompt->n_parts == render->parts_capacity) {
        const size_t capacity = render->parts_capacity == 0 ? 16 : 2 * render->parts_capacity;
        kvl_prompt_part *parts = kvl_realloc(prompt->parts, capacity * sizeof *parts);
        if (parts == NULL) {
            return KVL_FAIL(render->error, KVL_ERR_NO_MEMORY, "no memory for %zu parts", capacity);
        }
        prompt->parts = parts;
        render->parts_capacity = capacity;
    }
    prompt->parts[prompt->n_parts++] =
        (kvl_prompt_part){(uint32_t)first, (uint32_t)(prompt->n_ids - first), message};
    return KVL_OK;
}

static kvl_status put_bytes(rendering *render, const char *bytes, size_t n_bytes)
{
    if (n_bytes > render->text_capacity - render->n_text) {
        const size_t capacity = 2 * (render->n_text + n_bytes) + 256;
        char *text = kvl_realloc(render->text, capacity);
        if (text == NULL) {
            return KVL_FAIL(render->error, KVL_ERR_NO_MEMORY, "no memory for a prompt");
        }
        render->text = text;
        render->text_capacity = capacity;
    }
    if (n_bytes > 0) memcpy(render->text + render->n_text, bytes, n_bytes);
    render->n_text += n_bytes;
    return KVL_OK;
}

static kvl_status put(rendering *render, const char *text)
{
    return put_bytes(render, text, strlen(text));
}

/* The text of a token of the file, nothing if the file names none. */
static kvl_status put_token(rendering *render, uint32_t id)
{
    size_t n_bytes = 0;
    const char *bytes = kvl_token_bytes(render->tokenizer, id, true, &n_bytes);
    return put_bytes(render, bytes, n_bytes);
}

/* Template text before, between and after contents is one part each, however many messages with
 * nothing in them it runs over. */
static kvl_status flush_text(rendering *render)
{
    KVL_TRY(add_part(render, render->text, render->n_text, -1));
    render->n_text = 0;
    return KVL_OK;
}

/* ---- content */

/* What Python's str.strip takes away: White_Space and four separators of ASCII. */
static bool is_strippable(uint32_t code_point)
{
    if (code_point >= 0x80) return kvl_unicode_class_of(code_point) == KVL_UNICODE_SPACE;
    return code_point == ' ' || (code_point >= '\t' && code_point <= '\r') ||
           (code_point >= 0x1c && code_point <= 0x1f);
}

/* From the end, a character is found by going back over at most three bytes that continue one; what
 * is no character is not trimmed. */
static void trim(const char **text, size_t *n_bytes)
{
    uint32_t code_point = 0;
    while (*n_bytes > 0) {
        const size_t length = kvl_utf8_read(*text, *n_bytes, &code_point);
        if (length == 0 || !is_strippable(code_point)) break;
        *text += length;
        *n_bytes -= length;
    }
    while (*n_bytes > 0) {
        size_t first = *n_bytes - 1;
        while (first > 0 && *n_bytes - first < 4 && ((uint8_t)(*text)[first] & 0xc0) == 0x80)
            first--;
        const size_t length = kvl_utf8_read(*text + first, *n_bytes - first, &code_point);
        if (length != *n_bytes - first || !is_strippable(code_point)) break;
        *n_bytes = first;
    }
}

static kvl_status put_content(rendering *render, size_t message, bool is_trimmed)
{
    const char *text = render->messages[message].content;
    size_t n_bytes = render->messages[message].content_bytes;
    if (is_trimmed) trim(&text, &n_bytes);
    if (n_bytes == 0) return KVL_OK;
    KVL_TRY(flush_text(render));
    const kvl_message *about = &render->messages[message];
    size_t at = 0;
    for (size_t i = 0; i < about->n_seams && !is_trimmed; i++) {
        KVL_ASSERT(about->seams[i] >= at && about->seams[i] <= n_bytes);
        if (about->seams[i] > at)
            KVL_TRY(add_part(render, text + at, about->seams[i] - at, (int32_t)message));
        at = about->seams[i];
    }
    return at == n_bytes ? KVL_OK : add_part(render, text + at, n_bytes - at, (int32_t)message);
}

static bool has_role(const rendering *render, size_t message, const char *role)
{
    return strcmp(render->messages[message].role, role) == 0;
}

/* ---- layouts */

/* A role is written as it came: check_messages has seen to it that it is one of three. */
static kvl_status render_chatml(rendering *render)
{
    if (render->chat->default_system != NULL && !has_role(render, 0, "system")) {
        KVL_TRY(put(render, "<|im_start|>system\n"));
        KVL_TRY(put(render, render->chat->default_system));
        KVL_TRY(put(render, "<|im_end|>\n"));
    }
    for (size_t i = 0; i < render->n_messages; i++) {
        KVL_TRY(put(render, "<|im_start|>"));
        KVL_TRY(put(render, render->messages[i].role));
        KVL_TRY(put(render, "\n"));
        KVL_TRY(put_content(render, i, false));
        KVL_TRY(put(render, "<|im_end|>\n"));
    }
    return render->add_generation ? put(render, "<|im_start|>assistant\n") : KVL_OK;
}

/* Llama 3.1 and later say a date. It is the template's own for when it has no clock: a prompt that
 * changes from day to day would never be found again. */
static kvl_status render_llama_system(rendering *render, bool has_content)
{
    KVL_TRY(put(render, "<|start_header_id|>system<|end_header_id|>\n\n"
                        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"));
    if (has_content) KVL_TRY(put_content(render, 0, true));
    return put(render, "<|eot_id|>");
}

static kvl_status render_llama_3(rendering *render)
{
    size_t first = 0;
    KVL_TRY(put_token(render, kvl_tokenizer_bos(render->tokenizer)));
    if (render->chat->layout == KVL_CHAT_LLAMA_31) {
        first = has_role(render, 0, "system") ? 1 : 0;
        KVL_TRY(render_llama_system(render, first == 1));
    }
    for (size_t i = first; i < render->n_messages; i++) {
        KVL_TRY(put(render, "<|start_header_id|>"));
        KVL_TRY(put(render, render->messages[i].role));
        KVL_TRY(put(render, "<|end_header_id|>\n\n"));
        KVL_TRY(put_content(render, i, true));
        KVL_TRY(put(render, "<|eot_id|>"));
    }
    if (!render->add_generation && !render->chat->always_opens_answer) return KVL_OK;
    return put(render, "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

/* Whether the system message goes before the content of the user's message i. */
static bool takes_system(const rendering *render, size_t first, size_t i)
{
    if (first == 0) return false;
    return render->chat->system_place == KVL_CHAT_SYSTEM_FIRST ? i == first
                                                               : i + 1 == render->n_messages;
}

/* The system message is rendered out of turn, inside a user's; if the template puts it into the
 * last message and that is the assistant's, it is not rendered at all, as Jinja does it. */
static kvl_status render_mistral(rendering *render)
{
    const kvl_chat_template *chat = render->chat;
    const size_t first = has_role(render, 0, "system") ? 1 : 0;
    if (first == 1 && chat->system_place == KVL_CHAT_SYSTEM_NOWHERE) {
        return KVL_FAIL(render->error, KVL_ERR_INVALID,
                        "message 0 has role system, which this mistral template does not have: put "
                        "it into the first user message");
    }
    KVL_TRY(put_token(render, kvl_tokenizer_bos(render->tokenizer)));
    for (size_t i = first; i < render->n_messages; i++) {
        const bool is_user = has_role(render, i, "user");
        if (is_user != ((i - first) % 2 == 0) || has_role(render, i, "system")) {
            return KVL_FAIL(render->error, KVL_ERR_INVALID,
                            "message %zu has role %s; mistral templates want user and assistant in "
                            "turn, user first",
                            i, render->messages[i].role);
        }
        KVL_TRY(put(render, is_user ? chat->user_open : chat->assistant_open));
        if (is_user && takes_system(render, first, i)) {
            KVL_TRY(put_content(render, 0, false));
            KVL_TRY(put(render, "\n\n"));
        }
        KVL_TRY(put_content(render, i, !is_user && chat->trims_assistant));
        if (is_user) {
            KVL_TRY(put(render, chat->user_close));
            continue;
        }
        KVL_TRY(put_token(render, kvl_tokenizer_eos(render->tokenizer)));
        KVL_TRY(put(render, chat->assistant_close));
    }
    return KVL_OK; /* an answer simply follows */
}

/* ---- checks */

static kvl_status check_messages(const rendering *render)
{
    if (render->n_messages == 0) {
        return KVL_FAIL(render->error, KVL_ERR_INVALID, "no messages; a prompt needs at least one");
    }
    if (render->n_messages > MESSAGES_MAX) {
        return KVL_FAIL(render->error, KVL_ERR_TOO_LARGE, "%zu messages; at most %u",
                        render->n_messages, MESSAGES_MAX);
    }
    for (size_t i = 0; i < render->n_messages; i++) {
        KVL_ASSERT(render->messages[i].role != NULL);
        KVL_ASSERT(render->messages[i].content != NULL || render->messages[i].content_bytes == 0);
        if (has_role(render, i, "system") || has_role(render, i, "user") ||
            has_role(render, i, "assistant")) {
            continue;
        }
        return KVL_FAIL(render->error, KVL_ERR_INVALID,
                        "message %zu has role %.32s; known are system, user and assistant", i,
                        render->messages[i].role);
    }
    return KVL_OK;
}

/* Without their tokens, the marks between messages would be words like any other, and a message
 * could write them. */
static kvl_status check_marks(const rendering *render)
{
    static const char *const chatml[] = {"<|im_start|>", "<|im_end|>", NULL};
    static const char *const llama[] = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
                                        NULL};
    static const char *const none[] = {NULL};
    const kvl_chat_layout layout = render->chat->layout;
    const char *const *marks = layout == KVL_CHAT_CHATML    ? chatml
                               : layout == KVL_CHAT_MISTRAL ? none
                                                            : llama;
    for (; *marks != NULL; marks++) {
        if (kvl_tokenizer_special(render->tokenizer, *marks) != KVL_TOKEN_NONE) continue;
        return KVL_FAIL(render->error, KVL_ERR_UNSUPPORTED,
                        "chat template %s needs the special token %s, which the model's vocabulary "
                        "lacks: send tokens instead of messages",
                        render->chat->name, *marks);
    }
    return KVL_OK;
}

static kvl_status render_all(rendering *render)
{
    if (render->chat->layout == KVL_CHAT_UNKNOWN) {
        return KVL_FAIL(
            render->error, KVL_ERR_UNSUPPORTED,
            "the model's chat template (tokenizer.chat_template) is not known here: send "
            "a prompt instead of messages; known are " KVL_CHAT_TEMPLATES_KNOWN);
    }
    KVL_TRY(check_messages(render));
    KVL_TRY(check_marks(render));
    switch (render->chat->layout) {
    case KVL_CHAT_CHATML: KVL_TRY(render_chatml(render)); break;
    case KVL_CHAT_MISTRAL: KVL_TRY(render_mistral(render)); break;
    default: KVL_TRY(render_llama_3(render)); break;
    }
    return flush_text(render);
}

kvl_status kvl_chat_render(const kvl_chat_template *chat_template, const kvl_tokenizer *tokenizer,
                           const kvl_message *messages, size_t n_messages, bool add_generation,
                           kvl_prompt *prompt, kvl_error *error)
{
    KVL_ASSERT(chat_template != NULL && tokenizer != NULL && prompt != NULL);
    KVL_ASSERT(messages != NULL || n_messages == 0);
    *prompt = (kvl_prompt){0};
    rendering render = {
        .chat = chat_template,
        .tokenizer = tokenizer,
        .messages = messages,
        .n_messages = n_messages,
        .add_generation = add_generation,
        .prompt = prompt,
        .error = error,
    };
    const kvl_status status = render_all(&render);
    kvl_free(render.text);
    return status;
}

void kvl_prompt_deinit(kvl_prompt *prompt)
{
    if (prompt == NULL) return;
    kvl_free(prompt->ids);
    kvl_free(prompt->parts);
    *prompt = (kvl_prompt){0};
}
