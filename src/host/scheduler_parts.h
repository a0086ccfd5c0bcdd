/* host/scheduler_parts.h: what the two files of the scheduler share; private to them.
 * scheduler.c has who waits, runs and pauses; scheduler_step.c what one step computes. */
#ifndef KVL_HOST_SCHEDULER_PARTS_H
#define KVL_HOST_SCHEDULER_PARTS_H

#include "host/branch.h"

struct kvl_scheduler {
    kvl_engine *engine;
    kvl_scheduler_options options;
    kvl_sampler *sampler;
    kvl_request *requests; /* all that are not over */
    kvl_branch *waiting;   /* first to be admitted first; paused ones in front */
    kvl_branch *behind;    /* the same of the background */
    kvl_branch **running;  /* [n_running], as admitted */
    uint32_t n_running;
    uint32_t n_new; /* requests that were never admitted, without the background's */
    uint64_t next_id, next_order;
    kvl_scheduler_stats stats;
    /* Of the step that runs. */
    kvl_branch **batch; /* [n_running_max]: branches with rows */
    uint32_t n_batch;
    kvl_forward_row *rows;     /* [KVL_FORWARD_ROWS_MAX] */
    kvl_attention_path *paths; /* [n_running_max] */
    uint32_t *logit_rows;      /* [n_running_max] */
    float *logits;             /* [n_running_max][n_vocab] */
};

/* ---- scheduler.c ---- */

/* Whether a branch has to stand still: it is in the background, and another one is not. */
bool kvl_scheduler_stands_still(const kvl_scheduler *scheduler, const kvl_branch *branch);
/* At the front of those who wait. */
void kvl_scheduler_wait_first(kvl_scheduler *scheduler, kvl_branch *branch);
/* Admits whoever there are pages for. */
void kvl_scheduler_admit(kvl_scheduler *scheduler);
/* Ends the requests that were cancelled. */
void kvl_scheduler_end_cancelled(kvl_scheduler *scheduler);
/* Reserves pages for a branch up to position past - 1: free ones, then the tree's, then those of
 * branches that were admitted later, which are paused. False: it computes nothing in this step; it
 * was the last itself and is paused, or memory is short. Those before it are where they were. */
KVL_MUST_USE bool kvl_scheduler_make_room(kvl_scheduler *scheduler, kvl_branch *branch,
                                          uint32_t past);
/* Tells what happened; with a finish the branch is over and ends here, wherever it stood. */
void kvl_scheduler_tell(kvl_scheduler *scheduler, kvl_branch *branch, const kvl_drawn *drawn,
                        const char *text, size_t n_text_bytes, kvl_finish finish,
                        const kvl_error *error);
/* The same, for the whole request where it has not been forked yet: every answer is told of. */
void kvl_scheduler_end(kvl_scheduler *scheduler, kvl_branch *branch, kvl_finish finish,
                       const kvl_error *error);
/* Takes what the tree has of a prompt, and counts it. */
void kvl_scheduler_adopt(kvl_scheduler *scheduler, kvl_branch *branch);

#endif /* KVL_HOST_SCHEDULER_PARTS_H */
