/* model/chat_template.h: messages to prompt text, for the templates that we know by their text:
 * ChatML (SmolLM2, Qwen2.5), Llama-3, Mistral. No Jinja interpreter; another template is refused
 * with the names of those known.
 * Threads  Never changes once made: share it freely. */
#ifndef KVL_MODEL_CHAT_TEMPLATE_H
#define KVL_MODEL_CHAT_TEMPLATE_H

#include "base/status.h"

typedef struct kvl_tokenizer kvl_tokenizer;
typedef struct kvl_chat_template kvl_chat_template;

typedef struct kvl_message {
    const char *role; /* "system", "user", "assistant" */
    const char *content;
    size_t content_bytes;
    /* Bytes of the content, ascending, where one of its texts ends and another begins: each is
     * tokenized by itself and a part of its own. Not in a content that is trimmed. */
    const size_t *seams; /* [n_seams] */
    size_t n_seams;
} kvl_message;

/* A run of ids of the prompt. Template text and message content are tokenized apart, so that the
 * ids of a content are the same in every prompt: that is what makes it a part of its own. */
typedef struct kvl_prompt_part {
    uint32_t first; /* index of its first id */
    uint32_t n_tokens;
    int32_t message; /* index of the message whose content it is, or -1 for template text */
} kvl_prompt_part;

typedef struct kvl_prompt {
    uint32_t *ids;
    size_t n_ids;
    kvl_prompt_part *parts; /* in order, covering all ids, none empty */
    size_t n_parts;
} kvl_prompt;

/* Renders messages and tokenizes them part by part; content is never parsed for special tokens.
 * add_generation  end with the opening of an assistant's turn
 * Owns     *prompt: ended with kvl_prompt_deinit, also after an error
 * Errors   KVL_ERR_UNSUPPORTED (unknown template: text lists the known; a vocabulary without the
 *          special tokens of the template), KVL_ERR_INVALID (no messages, a role the
 *          template does not have, or an order it refuses), KVL_ERR_TOO_LARGE, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_chat_render(const kvl_chat_template *chat_template,
                                        const kvl_tokenizer *tokenizer, const kvl_message *messages,
                                        size_t n_messages, bool add_generation, kvl_prompt *prompt,
                                        kvl_error *error);
void kvl_prompt_deinit(kvl_prompt *prompt);

/* "chatml-smollm2", "chatml-qwen2.5", "chatml", "llama-3", "mistral", or "unknown". */
const char *kvl_chat_template_name(const kvl_chat_template *chat_template);

#endif /* KVL_MODEL_CHAT_TEMPLATE_H */
