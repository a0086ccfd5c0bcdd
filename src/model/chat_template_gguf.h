/* model/chat_template_gguf.h: makes the chat template of a GGUF file. Private to the room. */
#ifndef KVL_MODEL_CHAT_TEMPLATE_GGUF_H
#define KVL_MODEL_CHAT_TEMPLATE_GGUF_H

#include "model/chat_template.h"
#include "model/gguf.h"

/* Borrowed for the call. A template whose text is not known, or that is not there, is no error
 * here: rendering with it is. Owns     *chat_template: ended with kvl_chat_template_destroy; NULL
 * after an error Errors   KVL_ERR_MALFORMED, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_chat_template_create(const kvl_gguf *gguf,
                                                 kvl_chat_template **chat_template,
                                                 kvl_error *error);
/* NULL does nothing. */
void kvl_chat_template_destroy(kvl_chat_template *chat_template);

#endif /* KVL_MODEL_CHAT_TEMPLATE_GGUF_H */
