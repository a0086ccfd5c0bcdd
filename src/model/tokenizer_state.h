/* model/tokenizer_state.h: what a tokenizer is made of. Private to the room. */
#ifndef KVL_MODEL_TOKENIZER_STATE_H
#define KVL_MODEL_TOKENIZER_STATE_H

#include "model/pretokenize.h"
#include "model/tokenizer.h"
#include "model/tokenizer_merges.h"
#include "model/tokenizer_specials.h"
#include "model/tokenizer_symbols.h"

/* One token; keeps the output of the detokenizer for one token below KVL_DETOKENIZER_OUT_MIN, as
 * every bad byte may become the three of U+FFFD and three may wait from before. */
#define KVL_TOKEN_BYTES_MAX 336u
#define KVL_VOCABULARY_MAX (1u << 20)
#define KVL_MERGES_MAX (1u << 21)

/* Flags of a token. */
#define KVL_TOKEN_HIDDEN 1u /* gives no text: control, unknown and unused tokens */
#define KVL_TOKEN_ENDS 2u   /* an answer is over after it */

struct kvl_tokenizer {
    uint32_t n_vocab;
    uint32_t bos, eos; /* or KVL_TOKEN_NONE */
    /* A word that is a token is that token, even where merges would not make it (Llama 3). */
    bool ignore_merges;
    kvl_pretokenizer *pretokenizer;
    kvl_symbols symbols; /* the first n_vocab are the tokens */
    kvl_merges merges;
    kvl_specials specials;
    uint8_t *flags;             /* [n_vocab] */
    uint32_t byte_symbols[256]; /* the token of each byte; KVL_SYMBOL_NONE where there is none */
};

#endif /* KVL_MODEL_TOKENIZER_STATE_H */
