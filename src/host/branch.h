/* host/branch.h: one answer of a request, as the scheduler keeps it; and the text that it shows.
 * Private to the room. Threads  The engine thread only. */
#ifndef KVL_HOST_BRANCH_H
#define KVL_HOST_BRANCH_H

#include "host/scheduler.h"

/* Tokens to text, less what a stop text could still begin with. */
typedef struct kvl_answer_text {
    kvl_detokenizer detokenizer;
    char *held; /* [n_held], not shown yet */
    size_t n_held, held_max;
    size_t n_shown; /* leading bytes of held that kvl_answer_text_push gave out */
} kvl_answer_text;

typedef struct kvl_request {
    struct kvl_request *next;
    uint64_t id;
    kvl_generation asked; /* ids NULL, stops owned */
    char *stop_bytes;     /* what stops point into */
    size_t longest_stop;
    uint32_t n_open;   /* branches not finished */
    uint32_t n_cached; /* of the prompt */
    kvl_reuse_report reuse;
    bool is_admitted, is_cancelled, is_forked;
} kvl_request;

typedef struct kvl_branch {
    struct kvl_branch *next; /* while it waits */
    kvl_request *request;
    kvl_sequence sequence;
    uint32_t index;
    uint32_t n_prompt;
    int64_t arrived_ns;
    uint64_t order; /* of admission; later ones are paused first */
    kvl_random random;
    kvl_answer_text text;
    /* Of the step that runs. */
    uint32_t n_rows;   /* that it computes */
    uint32_t logit_at; /* index of its logits, where has_logits */
    bool has_logits;
    bool was_paused;
    kvl_drawn drawn;
} kvl_branch;

/* Copies what the caller lends. Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_request_create(const kvl_generation *asked, kvl_request **request,
                                           kvl_error *error);
void kvl_request_destroy(kvl_request *request);

/* A branch over `sequence`, which it takes, also after an error.
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_branch_create(kvl_request *request, uint32_t index, uint32_t n_prompt,
                                          kvl_sequence *sequence, kvl_branch **branch,
                                          kvl_error *error);
void kvl_branch_destroy(kvl_branch *branch);

/* Adds a token's text, or, where `ends`, what the detokenizer still holds. *text [*n_bytes] may be
 * shown now; borrowed until the next call. True when a stop text came: what follows it is gone.
 * Errors   KVL_ERR_NO_MEMORY in *status */
KVL_MUST_USE bool kvl_branch_push_text(kvl_branch *branch, uint32_t token, bool ends,
                                       const char **text, size_t *n_bytes, kvl_status *status);

#endif /* KVL_HOST_BRANCH_H */
