/* model/chat_template_state.h: what is known of a chat template. Private to the room. */
#ifndef KVL_MODEL_CHAT_TEMPLATE_STATE_H
#define KVL_MODEL_CHAT_TEMPLATE_STATE_H

#include "model/chat_template.h"

/* For errors. */
#define KVL_CHAT_TEMPLATES_KNOWN                                                                   \
    "chatml (SmolLM2, Qwen2.5 and others), llama-3 (also 3.1 to 3.3), mistral (v0.1 to v0.3)"

typedef enum kvl_chat_layout {
    KVL_CHAT_UNKNOWN,
    KVL_CHAT_CHATML,
    KVL_CHAT_LLAMA_3,  /* as it came out: a system message is a message like any other */
    KVL_CHAT_LLAMA_31, /* a system block with dates always comes first */
    KVL_CHAT_MISTRAL,
} kvl_chat_layout;

/* Where Mistral's templates put a system message: before the content of a user's message. */
typedef enum kvl_chat_system_place {
    KVL_CHAT_SYSTEM_NOWHERE, /* refused */
    KVL_CHAT_SYSTEM_FIRST,
    KVL_CHAT_SYSTEM_LAST,
} kvl_chat_system_place;

struct kvl_chat_template {
    kvl_chat_layout layout;
    const char *name;         /* static text */
    char *default_system;     /* ChatML: for a prompt that begins otherwise; NULL: none */
    bool always_opens_answer; /* Llama 3 as it came out does so unasked */
    /* Mistral; static texts around the content. */
    kvl_chat_system_place system_place;
    const char *user_open, *user_close, *assistant_open, *assistant_close;
    bool trims_assistant;
};

#endif /* KVL_MODEL_CHAT_TEMPLATE_STATE_H */
