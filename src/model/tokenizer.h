/* model/tokenizer.h: byte-level BPE as GGUF files describe it (tokenizer.ggml.model = "gpt2"), with
 * the pre-tokenizers smollm, qwen2, llama-bpe and gpt-2. Ids are those of llama.cpp on any UTF-8.
 * Bytes that are no UTF-8 are kept, where llama.cpp puts U+FFFD; words end in the same places.
 * So kvl_token_bytes (with_special) of the ids of a text gives back the text, unless the vocabulary
 * lacks a token for a byte, as SmolLM2's does for six control characters and fifteen bytes that
 * assigned characters never need: such a byte is left out, or U+FFFD if it is no UTF-8, as in
 * llama.cpp.
 * Threads  Never changes once made: share it freely. */
#ifndef KVL_MODEL_TOKENIZER_H
#define KVL_MODEL_TOKENIZER_H

#include "base/status.h"

#define KVL_TOKEN_NONE UINT32_MAX
/* One call refuses longer texts; a longer one is a document to cut, not a prompt. */
#define KVL_TEXT_BYTES_MAX (64u << 20)

typedef struct kvl_tokenizer kvl_tokenizer;

/* Appends the ids of a text (any bytes; not NUL-terminated) to *ids, growing it with kvl_realloc.
 * parse_special  texts of special tokens ("<|im_end|>") become their ids; never for user text
 * ids, n_ids     in and out: start with NULL and 0, or with an earlier result
 * Owns           *ids belongs to the caller: ended with kvl_free, also after an error
 * Errors         KVL_ERR_TOO_LARGE, KVL_ERR_NO_MEMORY; *n_ids is then as before
 * Adds no beginning-of-text token: the template decides. */
KVL_MUST_USE kvl_status kvl_tokenize(const kvl_tokenizer *tokenizer, const char *text,
                                     size_t n_bytes, bool parse_special, uint32_t **ids,
                                     size_t *n_ids, kvl_error *error);

/* The bytes of one token; special tokens give their text where `with_special`, otherwise nothing.
 * Borrowed until the tokenizer ends. *n_bytes may be 0; an unknown id gives 0 bytes. */
const char *kvl_token_bytes(const kvl_tokenizer *tokenizer, uint32_t id, bool with_special,
                            size_t *n_bytes);

uint32_t kvl_tokenizer_n_vocab(const kvl_tokenizer *tokenizer);
/* KVL_TOKEN_NONE where the model has none. */
uint32_t kvl_tokenizer_bos(const kvl_tokenizer *tokenizer);
uint32_t kvl_tokenizer_eos(const kvl_tokenizer *tokenizer); /* end of text */
/* True for every token after which an answer is over: end of text, end of turn. */
bool kvl_tokenizer_is_end(const kvl_tokenizer *tokenizer, uint32_t id);
/* The id of a special token's text, or KVL_TOKEN_NONE. */
uint32_t kvl_tokenizer_special(const kvl_tokenizer *tokenizer, const char *text);

/* Turns tokens into text as they come, never splitting a UTF-8 character: bytes that can still
 * become one wait for the next token; bytes that cannot, and those still waiting at the end, are
 * replaced by U+FFFD, so that the text is always UTF-8. One thread at a time. No ender. */
typedef struct kvl_detokenizer {
    const kvl_tokenizer *tokenizer;
    char pending[4];
    size_t n_pending;
} kvl_detokenizer;

void kvl_detokenizer_init(kvl_detokenizer *detokenizer, const kvl_tokenizer *tokenizer);
/* Writes whole characters to out (at least KVL_DETOKENIZER_OUT_MIN bytes) and returns how many
 * bytes; adds no NUL. Special tokens give nothing. */
#define KVL_DETOKENIZER_OUT_MIN 1024u
size_t kvl_detokenizer_push(kvl_detokenizer *detokenizer, uint32_t id, char *out, size_t out_size);
/* What is left at the end of an answer; at most 12 bytes, which out_size must have. */
size_t kvl_detokenizer_finish(kvl_detokenizer *detokenizer, char *out, size_t out_size);

#endif /* KVL_MODEL_TOKENIZER_H */
