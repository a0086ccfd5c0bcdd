/* host/scheduler.h: continuous batching with chunked prefill.
 *
 * Every step runs one batch through the model, so that weights are read once for all: one row of
 * each branch that decodes, and slices of prompts up to a budget of rows. What branches share is
 * found by their pages (attention/attention.h), whatever the depth of the tree.
 * A prompt that begins as another one does waits until the common part is in the prefix tree, and
 * takes it from there: many requests with one prefix compute it once.
 * Of the requests that wait, those go first that have most of their prompt in the tree, or in
 * common with the one admitted last, but for those that have waited long (host/order.h).
 * When pages run out the branch that was admitted last is paused: its pages stay in the prefix tree
 * for as long as nobody else needs them, it is resumed from there, and what was lost is computed
 * again. Nothing is ever ended for want of pages.
 * Requests in the background (rows of a batch) wait behind all others, stand still while any other
 * is under way, and are the first to be paused for its pages or its place. They count in none of
 * the limits of those that wait.
 * Greedy tokens of a branch are the same in every mix, paused or not, since every operation of the
 * backend gives a row the same bits in every batch (compute/backend.h).
 * Method   Orca (OSDI 2022), Sarathi-Serve (arXiv:2403.02310), RadixAttention (arXiv:2312.07104),
 *          Hydragen (arXiv:2402.05099)
 * Threads  The engine thread only. */
#ifndef KVL_HOST_SCHEDULER_H
#define KVL_HOST_SCHEDULER_H

#include "base/clock.h"
#include "base/hash.h"
#include "host/sampling.h"
#include "host/sequence.h"

#define KVL_STOPS_MAX 16u
#define KVL_STOP_BYTES_MAX 256u
#define KVL_BRANCHES_MAX 128u /* of one request */

typedef enum kvl_finish {
    KVL_FINISH_NONE,      /* not yet */
    KVL_FINISH_STOP,      /* the model ended it, or a stop text came */
    KVL_FINISH_LENGTH,    /* max_tokens */
    KVL_FINISH_CANCELLED, /* by kvl_scheduler_cancel */
    KVL_FINISH_FAILED,    /* by an error */
} kvl_finish;

/* What a prompt may be made of beside exact KV: the task's qualities (proto/host.proto). */
typedef enum kvl_reuse_quality {
    KVL_REUSE_EXACT,
    KVL_REUSE_BALANCED,
    KVL_REUSE_FAST,
    KVL_REUSE_VERIFIED, /* whole answers only: greedy, of one branch, without stops */
    KVL_REUSE_HEALED,   /* likewise */
} kvl_reuse_quality;

/* A run of a prompt's ids that may stand in other prompts too: a message, a document. */
typedef struct kvl_text_run {
    uint32_t first, n_ids;
} kvl_text_run;

/* What became of a prompt's texts, in tokens of the prompt, but for the last. */
typedef struct kvl_reuse_report {
    uint32_t n_placed;     /* as they stood elsewhere; of blended texts some were recomputed */
    uint32_t n_recomputed; /* of these, computed again among the others */
    uint32_t n_corrected;  /* tokens of the answer that a check changed */
    bool is_approximate;   /* something was placed, and is not checked */
    bool is_verified, is_healing;
    bool is_fallback; /* computed, since there was no room for the other way */
} kvl_reuse_report;

/* What happened to one branch. Everything is borrowed for the call. */
typedef struct kvl_generation_event {
    uint32_t branch;
    const kvl_drawn *drawn; /* NULL: no token came with it */
    const char *text;       /* UTF-8, whole characters, nothing of a stop text; [n_text_bytes] */
    size_t n_text_bytes;
    kvl_finish finish;
    uint32_t n_tokens; /* of the answer so far, without the one that ended it */
    uint32_t n_cached; /* of the prompt, found in the prefix tree and not computed */
    kvl_reuse_report reuse;
    bool is_last;           /* every branch of the request is finished: nothing more comes */
    const kvl_error *error; /* where failed */
} kvl_generation_event;

/* One request: a prompt and n answers. */
typedef struct kvl_generation {
    const uint32_t *ids; /* [n_ids], copied */
    uint32_t n_ids;
    uint64_t salt;       /* of the prefix tree: tenant and cache_salt */
    uint32_t max_tokens; /* of each answer, at least 1 */
    uint32_t n_branches; /* answers, 1 .. KVL_BRANCHES_MAX */
    kvl_sampling sampling;
    uint64_t seed;            /* branch b draws with seed + b */
    const char *const *stops; /* [n_stops] texts that end an answer, copied */
    uint32_t n_stops;         /* at most KVL_STOPS_MAX of KVL_STOP_BYTES_MAX bytes */
    bool ignore_end;          /* go on behind end tokens, for measuring */
    kvl_reuse_quality quality;
    const kvl_text_run
        *texts; /* [n_texts], ascending, apart; of a quality that is not exact, copied */
    uint32_t n_texts;
    kvl_digest owner;   /* whose the texts are; zero: the host's own */
    bool is_background; /* computed only while no other request is under way */
    /* Called during kvl_scheduler_step, also for a branch that drew nothing to show. Must not call
     * the scheduler. */
    void (*event)(void *context, const kvl_generation_event *event);
    void *context;
} kvl_generation;

typedef struct kvl_scheduler_options {
    uint32_t n_running_max; /* branches that are computed in one step; 0: 64 */
    uint32_t n_waiting_max; /* requests that wait for admission; 0: 256 */
    uint32_t n_step_rows;   /* rows of a step, where anybody decodes; 0: 256 */
    /* Admit only what can run to its end beside those that run: nobody is paused, and fewer begin.
     * For batches, where no single answer is awaited and a pause costs the work that is lost. */
    bool holds_whole_answers;
    /* Admit requests as they came; false: those first whose prompts the tree has most of
     * (host/order.h). */
    bool in_order;
    const kvl_clock *clock; /* NULL: the system's */
} kvl_scheduler_options;

/* Counted since the scheduler was made, but for the first five. */
typedef struct kvl_scheduler_stats {
    uint32_t n_running;  /* branches */
    uint32_t n_waiting;  /* branches, paused ones too */
    uint32_t free_pages; /* and what the tree could give back is not counted */
    uint32_t tree_pages;
    uint32_t n_background; /* branches in the background, of both kinds */
    uint64_t n_steps;
    uint64_t n_prompt_tokens; /* of admitted requests */
    uint64_t n_cached_tokens; /* of those, found in the tree */
    uint64_t n_computed_rows;
    uint64_t n_answer_tokens;
    uint64_t n_paused; /* times that a branch was paused */
    uint64_t n_finished;
    uint64_t n_failed;  /* branches, by an error */
    uint64_t n_refused; /* requests, for want of room */
} kvl_scheduler_stats;

typedef struct kvl_scheduler kvl_scheduler;

/* Borrows the engine until it is destroyed.
 * Owns     *scheduler: ended with kvl_scheduler_destroy
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_scheduler_create(kvl_engine *engine,
                                             const kvl_scheduler_options *options,
                                             kvl_scheduler **scheduler, kvl_error *error);
/* Ends what runs without telling it. NULL does nothing. */
void kvl_scheduler_destroy(kvl_scheduler *scheduler);

/* Tokens that a prompt and its answer may have together: the context, or what all pages hold. Never
 * changes. Any thread. */
uint32_t kvl_scheduler_tokens_max(const kvl_engine *engine);

/* Queues a request; events come from later steps. *id names it for cancelling.
 * Errors   KVL_ERR_OUT_OF_RANGE (an empty prompt, more than the context or all pages hold, an
 *          option of sampling), KVL_ERR_TOO_LARGE (stop texts), KVL_ERR_BUSY (as many wait as may),
 *          KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_scheduler_submit(kvl_scheduler *scheduler,
                                             const kvl_generation *generation, uint64_t *id,
                                             kvl_error *error);
/* The same for a prompt whose KV is there, as kvl_sequence_of_session has it: takes `sequence`,
 * also after an error.
 * n_cached  leading ids that came from the prefix tree */
KVL_MUST_USE kvl_status kvl_scheduler_submit_filled(kvl_scheduler *scheduler,
                                                    const kvl_generation *generation,
                                                    kvl_sequence *sequence, uint32_t n_cached,
                                                    const kvl_reuse_report *report, uint64_t *id,
                                                    kvl_error *error);
/* Ends all branches of a request at the beginning of the next step, each with an event. An id that
 * is over already does nothing. */
void kvl_scheduler_cancel(kvl_scheduler *scheduler, uint64_t id);

/* The same for all requests. */
void kvl_scheduler_cancel_all(kvl_scheduler *scheduler);
/* The engine that it borrows. */
kvl_engine *kvl_scheduler_engine(const kvl_scheduler *scheduler);
/* Branches that one step may compute. */
uint32_t kvl_scheduler_n_running_max(const kvl_scheduler *scheduler);

/* One batch. True while there is anything left to do. Errors of a branch end that branch and come
 * as its event. */
bool kvl_scheduler_step(kvl_scheduler *scheduler);

void kvl_scheduler_stats_read(const kvl_scheduler *scheduler, kvl_scheduler_stats *stats);

#endif /* KVL_HOST_SCHEDULER_H */
