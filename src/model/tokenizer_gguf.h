/* model/tokenizer_gguf.h: makes the tokenizer that a GGUF file describes. Private to the room. */
#ifndef KVL_MODEL_TOKENIZER_GGUF_H
#define KVL_MODEL_TOKENIZER_GGUF_H

#include "model/gguf.h"
#include "model/tokenizer.h"

/* Borrowed for the call: the tokenizer keeps nothing of the file.
 * Owns     *tokenizer: ended with kvl_tokenizer_destroy; NULL after an error
 * Errors   KVL_ERR_MALFORMED, KVL_ERR_UNSUPPORTED, KVL_ERR_TOO_LARGE, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_tokenizer_create(const kvl_gguf *gguf, kvl_tokenizer **tokenizer,
                                             kvl_error *error);
/* NULL does nothing. */
void kvl_tokenizer_destroy(kvl_tokenizer *tokenizer);

#endif /* KVL_MODEL_TOKENIZER_GGUF_H */
