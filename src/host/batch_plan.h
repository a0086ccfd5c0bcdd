/* host/batch_plan.h: in which order the rows of a whole file are computed, so that what they share
 * is computed once, at every depth, and lives only as long as it is needed.
 *
 * All prompts are known, so their prefix tree is too. Groups are cut from it by dynamic
 * programming: a subtree is either one group, which shares what all its rows begin with, or falls
 * apart into the groups of its children, which share more, whichever saves more tokens. Groups of
 * one parent stand together, so that what the parents share is still in the prefix tree. Among
 * neighbours of one parent, those with more decoding for each token of prompt come first: decoding
 * then goes on beside the prompts of later ones.
 * Method   BatchLLM (arXiv:2412.03594, sections 4.1 and 4.2), cut at whole pages
 * Threads  Pure: no state. */
#ifndef KVL_HOST_BATCH_PLAN_H
#define KVL_HOST_BATCH_PLAN_H

#include "base/status.h"

#define KVL_BATCH_ROWS_MAX 100000u

typedef struct kvl_batch_row {
    const uint32_t *ids; /* [n_ids], at least one; borrowed */
    uint32_t n_ids;
    uint32_t n_decoded; /* tokens that its answers may have */
} kvl_batch_row;

typedef struct kvl_batch_group {
    uint32_t first, n_rows; /* of the plan's order */
    uint32_t n_shared;      /* leading ids of all its rows, whole pages */
} kvl_batch_group;

typedef struct kvl_batch_plan {
    uint32_t *order; /* [n_rows]: indices of rows, as they are computed */
    uint32_t n_rows;
    kvl_batch_group *groups; /* [n_groups], in order, covering all rows */
    uint32_t n_groups;
    uint64_t n_tokens;   /* of all prompts */
    uint64_t n_distinct; /* of those, to compute where every shared page is computed once */
    uint64_t n_saved;    /* by sharing inside groups alone */
} kvl_batch_plan;

/* Owns     *plan: ended with kvl_batch_plan_deinit, also after an error
 * Errors   KVL_ERR_TOO_LARGE (more than KVL_BATCH_ROWS_MAX), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_batch_plan_make(const kvl_batch_row *rows, uint32_t n_rows,
                                            kvl_batch_plan *plan, kvl_error *error);
void kvl_batch_plan_deinit(kvl_batch_plan *plan);

#endif /* KVL_HOST_BATCH_PLAN_H */
