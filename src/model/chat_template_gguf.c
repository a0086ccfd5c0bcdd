/* model/chat_template_gguf.c: recognises chat templates by their text.
 *
 * Method   Templates differ in spaces, quotes and ways to name a field, so the text is squeezed to
 *          one form of these first. Then it must contain the expressions that make a layout, and
 *          none of those that are known to change what the layout renders. What is in doubt is
 *          unknown: a prompt that is nearly right costs answers and tells nobody. */
#include "model/chat_template_gguf.h"

#include "base/alloc.h"
#include "model/chat_template_state.h"

#include <string.h>

#define TEMPLATE_BYTES_MAX (1u << 20)
#define DEFAULT_SYSTEM_BYTES_MAX 65536u

static const char smollm2_system[] =
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
static const char qwen25_system[] =
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.";

/* A template in two forms, both with ' for ", and with escaped line ends as line ends. */
typedef struct forms {
    char *plain;
    char *squeezed; /* without spaces and tabs; .role for ['role'], .content for ['content'] */
} forms;

static bool has(const char *text, const char *wanted)
{
    return strstr(text, wanted) != NULL;
}

/* ---- forms */

static void make_plain(kvl_gguf_text text, char *plain)
{
    size_t n = 0;
    for (size_t i = 0; i < text.n_bytes; i++) {
        const char c = text.bytes[i];
        if (c == '\\' && i + 1 < text.n_bytes && text.bytes[i + 1] == 'n') {
            plain[n++] = '\n';
            i++;
        } else if (c != '\0') {
            plain[n++] = c == '"' ? '\'' : c;
        }
    }
    plain[n] = '\0';
}

/* Replaces every `from` by the shorter `to`, in place. */
static void replace_all(char *text, const char *from, const char *to)
{
    const size_t n_from = strlen(from);
    const size_t n_to = strlen(to);
    KVL_ASSERT(n_to <= n_from);
    const char *read = text;
    char *write = text;
    while (*read != '\0') {
        if (strncmp(read, from, n_from) == 0) {
            memcpy(write, to, n_to);
            write += n_to;
            read += n_from;
        } else {
            *write++ = *read++;
        }
    }
    *write = '\0';
}

static void make_squeezed(const char *plain, char *squeezed)
{
    size_t n = 0;
    for (const char *c = plain; *c != '\0'; c++) {
        if (*c != ' ' && *c != '\t') squeezed[n++] = *c;
    }
    squeezed[n] = '\0';
    replace_all(squeezed, "['role']", ".role");
    replace_all(squeezed, "['content']", ".content");
}

/* ---- layouts */

/* Line ends between expressions are rendered, unless the next tag takes them away. */
static bool renders_line_ends(const char *squeezed)
{
    for (const char *at = squeezed; (at = strstr(at, "}}\n")) != NULL;) {
        at += 2;
        at += strspn(at, "\n");
        if (*at != '\0' && strncmp(at, "{%-", 3) != 0 && strncmp(at, "{{-", 3) != 0 &&
            strncmp(at, "{#-", 3) != 0) {
            return true;
        }
    }
    return false;
}

/* The text between <|im_start|>system and <|im_end|>, if it is written out. Sets *n_bytes; NULL if
 * there is none. */
static const char *written_system(const char *plain, size_t *n_bytes)
{
    static const char open[] = "<|im_start|>system\n";
    for (const char *at = plain; (at = strstr(at, open)) != NULL;) {
        at += strlen(open);
        const char *past = strstr(at, "<|im_end|>");
        const size_t n = past == NULL ? 0 : (size_t)(past - at);
        if (n == 0 || memchr(at, '\'', n) != NULL || memchr(at, '{', n) != NULL) continue;
        *n_bytes = n;
        return at;
    }
    return NULL;
}

static bool equals(const char *bytes, size_t n_bytes, const char *text)
{
    return strlen(text) == n_bytes && memcmp(bytes, text, n_bytes) == 0;
}

/* A default system message is used where the first message is not one: said in one of two ways. */
static bool has_default_condition(const char *squeezed)
{
    return has(squeezed, "ifloop.firstandmessages[0].role!='system'") ||
           (has(squeezed, "ifmessages[0].role=='system'") && has(squeezed, "{%-else%}"));
}

static bool recognise_chatml(const forms *text, kvl_chat_template *chat, kvl_error *error,
                             kvl_status *status)
{
    /* Thinking, trimming, order checks and the like make it another template. */
    static const char *const others[] = {
        "think",     "reasoning", "strip(",    "|trim",     "raise_exception", "bos_token",
        "eos_token", "strftime",  "namespace", "|replace(", "split(",
    };
    const char *squeezed = text->squeezed;
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        if (has(squeezed, others[i])) return false;
    }
    const char turn[] = "{{'<|im_start|>'+message.role+'\n'+message.content+'<|im_end|>'+'\n'}}";
    const char turn_closed[] =
        "{{'<|im_start|>'+message.role+'\n'+message.content+'<|im_end|>\n'}}";
    if (!has(squeezed, turn) && !has(squeezed, turn_closed)) return false;
    if (!has(squeezed, "ifadd_generation_prompt%}")) return false;
    if (!has(squeezed, "'<|im_start|>assistant\n'")) return false;

    chat->layout = KVL_CHAT_CHATML;
    chat->name = "chatml";
    size_t n_system = 0;
    const char *system = written_system(text->plain, &n_system);
    if (system == NULL) return !has(squeezed, "<|im_start|>system");
    if (n_system > DEFAULT_SYSTEM_BYTES_MAX || !has_default_condition(squeezed)) return false;
    if (equals(system, n_system, smollm2_system)) chat->name = "chatml-smollm2";
    if (equals(system, n_system, qwen25_system)) chat->name = "chatml-qwen2.5";
    chat->default_system = kvl_alloc(n_system + 1);
    if (chat->default_system == NULL) {
        *status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a chat template");
        return false;
    }
    memcpy(chat->default_system, system, n_system);
    chat->default_system[n_system] = '\0';
    return true;
}

static bool recognise_llama_3(const forms *text, kvl_chat_template *chat)
{
    const char *squeezed = text->squeezed;
    if (!has(squeezed, "'<|start_header_id|>'+message.role+'<|end_header_id|>\n\n'+"
                       "message.content|trim+'<|eot_id|>'")) {
        return false;
    }
    if (!has(squeezed, "{{'<|start_header_id|>assistant<|end_header_id|>\n\n'}}")) return false;
    const bool asks = has(squeezed, "ifadd_generation_prompt%}");
    chat->name = "llama-3";
    if (has(squeezed, "CuttingKnowledgeDate")) {
        chat->layout = KVL_CHAT_LLAMA_31;
        return asks && has(text->plain, "'Cutting Knowledge Date: December 2023\n'") &&
               has(text->plain, "'Today Date: ' + date_string + '\n\n'") &&
               has(text->plain, "date_string = '26 Jul 2024'") &&
               has(squeezed, "{{system_message}}\n{{'<|eot_id|>'}}");
    }
    chat->layout = KVL_CHAT_LLAMA_3;
    chat->always_opens_answer = !asks;
    return has(squeezed, "setcontent=bos_token+content") &&
           !has(squeezed, "<|start_header_id|>system");
}

/* Mistral's templates, in the order they came out. */
static const struct {
    const char *user; /* the expressions that must be there, in plain form */
    const char *assistant;
    const char *condition; /* for the system message, or NULL */
    kvl_chat_template chat;
} mistral[] = {
    {"'[INST] ' + message['content'] + ' [/INST]'",
     "message['content'] + eos_token + ' ' ",
     NULL,
     {.user_open = "[INST] ",
      .user_close = " [/INST]",
      .assistant_open = "",
      .assistant_close = " "}},
    {"'[INST] ' + message['content'] + ' [/INST]'",
     "{{ message['content'] + eos_token",
     NULL,
     {.user_open = "[INST] ",
      .user_close = " [/INST]",
      .assistant_open = "",
      .assistant_close = ""}},
    {"' [INST] ' + system_message + '\n\n' + message['content'] + ' [/INST]'",
     "' ' + message['content'] + eos_token",
     "loop.first and system_message is defined",
     {.user_open = " [INST] ",
      .user_close = " [/INST]",
      .assistant_open = " ",
      .assistant_close = "",
      .system_place = KVL_CHAT_SYSTEM_FIRST}},
    {"'[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]'",
     "' ' + message['content']|trim + eos_token",
     "loop.last and system_message is defined",
     {.user_open = "[INST] ",
      .user_close = "[/INST]",
      .assistant_open = " ",
      .assistant_close = "",
      .system_place = KVL_CHAT_SYSTEM_LAST,
      .trims_assistant = true}},
    {"'[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]'",
     "' ' + message['content'] + eos_token",
     "loop.last and system_message is defined",
     {.user_open = "[INST] ",
      .user_close = "[/INST]",
      .assistant_open = " ",
      .assistant_close = "",
      .system_place = KVL_CHAT_SYSTEM_LAST}},
};

static bool recognise_mistral(const forms *text, kvl_chat_template *chat)
{
    const char *plain = text->plain;
    if (!has(plain, "[INST]") || has(plain, "<<SYS>>") || !has(plain, "bos_token }}")) return false;
    for (size_t i = 0; i < sizeof mistral / sizeof mistral[0]; i++) {
        if (!has(plain, mistral[i].user) || !has(plain, mistral[i].assistant)) continue;
        const char *condition = mistral[i].condition;
        if (condition == NULL ? has(plain, "system") : !has(plain, condition)) continue;
        *chat = mistral[i].chat;
        chat->layout = KVL_CHAT_MISTRAL;
        chat->name = "mistral";
        return true;
    }
    return false;
}

static kvl_status recognise(const forms *text, kvl_chat_template *chat, kvl_error *error)
{
    kvl_status status = KVL_OK;
    /* Dashes of tags only say which spaces around are not rendered. */
    const bool is_clean = !renders_line_ends(text->squeezed);
    replace_all(text->squeezed, "{{-", "{{");
    replace_all(text->squeezed, "-}}", "}}");
    if (is_clean && recognise_chatml(text, chat, error, &status)) return KVL_OK;
    if (status < 0) return status;
    *chat = (kvl_chat_template){0};
    if (is_clean && recognise_llama_3(text, chat)) return KVL_OK;
    *chat = (kvl_chat_template){0};
    if (is_clean && recognise_mistral(text, chat)) return KVL_OK;
    *chat = (kvl_chat_template){.layout = KVL_CHAT_UNKNOWN, .name = "unknown"};
    return KVL_OK;
}

kvl_status kvl_chat_template_create(const kvl_gguf *gguf, kvl_chat_template **chat_template,
                                    kvl_error *error)
{
    KVL_ASSERT(gguf != NULL && chat_template != NULL);
    *chat_template = NULL;
    kvl_gguf_text text;
    KVL_TRY(kvl_gguf_find_text(gguf, "tokenizer.chat_template", &text, error));
    /* A longer one than any known is as unknown as one that is not there. */
    const size_t n_bytes = text.n_bytes > TEMPLATE_BYTES_MAX ? 0 : text.n_bytes;
    kvl_chat_template *made = kvl_alloc_zero(1, sizeof *made);
    const forms both = {.plain = kvl_alloc(n_bytes + 1), .squeezed = kvl_alloc(n_bytes + 1)};
    kvl_status status = KVL_OK;
    if (made == NULL || both.plain == NULL || both.squeezed == NULL) {
        status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a chat template");
    } else {
        make_plain((kvl_gguf_text){text.bytes, n_bytes}, both.plain);
        make_squeezed(both.plain, both.squeezed);
        status = recognise(&both, made, error);
    }
    kvl_free(both.plain);
    kvl_free(both.squeezed);
    if (status < 0) {
        kvl_chat_template_destroy(made);
        return status;
    }
    *chat_template = made;
    return KVL_OK;
}

void kvl_chat_template_destroy(kvl_chat_template *chat_template)
{
    if (chat_template == NULL) return;
    kvl_free(chat_template->default_system);
    kvl_free(chat_template);
}

const char *kvl_chat_template_name(const kvl_chat_template *chat_template)
{
    return chat_template->name;
}
