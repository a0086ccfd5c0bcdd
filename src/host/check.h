/* host/check.h: an answer that approximate KV gave, held against exact KV; private to this room.
 *
 * Prompt and answer are prefilled in full, in slices, so that whoever waits need not wait for the
 * whole of it; each of the answer's tokens is compared with what exact KV would have given behind
 * the ones before it, as in speculative decoding (arXiv:2211.17192, greedy case). A row of a
 * product does not depend on the others of its batch, so slices give the bits of one prefill.
 * Threads  The engine thread only. */
#ifndef KVL_HOST_CHECK_H
#define KVL_HOST_CHECK_H

#include "host/engine.h"

/* The answer as it was sent. */
typedef struct kvl_sent_answer {
    uint32_t *tokens; /* [n_prompt + n_answer] */
    uint32_t n_prompt, n_answer;
    bool ended; /* by the model, not by a limit */
    uint64_t salt;
} kvl_sent_answer;

typedef struct exact_check {
    kvl_engine *engine;
    const kvl_sent_answer *sent; /* borrowed */
    kvl_session *session;        /* exact KV of prompt and answer, as far as n_done */
    float *logits;               /* [CHECK_LOGITS][n_vocab], scratch */
    float *next;                 /* [n_vocab] behind the tokens that agree */
    uint32_t n_done;
    uint32_t n_agreed;   /* tokens of the answer before the first that differs */
    uint32_t n_differed; /* tokens of it that exact KV would not have given */
    bool has_differed;   /* n_agreed is the first of them; n_answer: where the answer ends */
    bool stops_at_first; /* what comes behind the first that differs is of no use */
    /* Told of each row of exact logits, in order: [n_vocab] before token `at` of the answer, or
     * behind its last one. NULL: nobody. */
    void (*row)(void *context, uint32_t at, const float *logits);
    void *context;
} exact_check;

/* Begins with what the prefix tree has. `n_more`: room for tokens behind the answer.
 * Owns     what it makes: ended with exact_check_end, also after an error
 * Errors   those of kvl_session_begin */
KVL_MUST_USE kvl_status exact_check_begin(exact_check *check, kvl_engine *engine,
                                          const kvl_sent_answer *sent, uint32_t n_more,
                                          kvl_error *error);
/* The same for a session that has some KV of all of the prompt, and the answer's tokens: what that
 * cache would have given. Borrows the session: taken out before exact_check_end.
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status exact_check_begin_on(exact_check *check, kvl_engine *engine,
                                             const kvl_sent_answer *sent, kvl_session *session,
                                             kvl_error *error);
/* Computes about n_rows more tokens. Errors   those of kvl_session_compute */
KVL_MUST_USE kvl_status exact_check_step(exact_check *check, uint32_t n_rows, kvl_error *error);
bool exact_check_is_done(const exact_check *check);
/* Keeps nothing: whoever wants the session takes it out before. */
void exact_check_end(exact_check *check);

#endif /* KVL_HOST_CHECK_H */
