/* host/decode.h: one token after another.
 * Threads  The engine thread only. */
#ifndef KVL_HOST_DECODE_H
#define KVL_HOST_DECODE_H

#include "base/random.h"
#include "host/engine.h"

typedef struct kvl_decode_options {
    uint32_t max_tokens;
    float temperature; /* 0: greedy, the lowest id among equals */
    uint64_t seed;     /* of the draws where temperature > 0 */
    /* What the answer may begin with, borrowed; computed in one pass, and as much of it is kept as
     * greedy draws confirm (speculative decoding): the answer is the same. Not for sampling;
     * without a token that ends the answer. */
    const uint32_t *guess;
    uint32_t n_guess;
    bool keep_last; /* compute the KV of the last token too, so that the answer can be published */
    /* May be NULL. Called with every token drawn, also the one that ends the answer, and the logits
     * [n_vocab] that it was drawn from (borrowed for the call); true stops after this token. */
    bool (*drawn)(void *context, uint32_t token, const float *logits);
    void *context;
} kvl_decode_options;

/* Draws from logits [n_vocab] as they are. */
uint32_t kvl_draw_token(const float *logits, uint32_t n_vocab, float temperature,
                        kvl_random *random);

/* Probability of the likeliest token. */
float kvl_top_probability(const float *logits, uint32_t n_vocab);

/* Decodes an answer behind everything that the session holds.
 * logits   [n_vocab]: of the last token of the prompt; overwritten
 * *n_tokens  tokens appended to the session: without the one that ended the answer
 * *ended     the model ended the answer itself
 * *n_kept    tokens of the guess that were kept; may be NULL
 * Errors   those of kvl_session_append and kvl_session_compute */
KVL_MUST_USE kvl_status kvl_decode(kvl_session *session, kvl_engine *engine,
                                   const kvl_decode_options *options, float *logits,
                                   uint32_t *n_tokens, bool *ended, uint32_t *n_kept,
                                   kvl_error *error);

#endif /* KVL_HOST_DECODE_H */
