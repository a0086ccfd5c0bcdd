/* reuse/select.h: which of the reused tokens are computed again, so that a placed chunk fits into
 * its prompt.
 *
 * A policy is a row of numbers; what it asks for is united. Scores come from whoever has them: the
 * attention that the question's rows give each key (as in ProphetKV, arXiv:2602.02579), that the
 * rows of a drafted answer give it, which look straight at what is answered, or how far a key or
 * value is from the one in context (CacheBlend, arXiv:2405.16444, section 4).
 * Pure: looks nothing up; the same input gives the same choice, ties go to the lower position.
 * Threads  Safe from any thread. */
#ifndef KVL_REUSE_SELECT_H
#define KVL_REUSE_SELECT_H

#include "base/status.h"

typedef enum kvl_select_score {
    KVL_SELECT_NO_SCORE,
    KVL_SELECT_QUERY_ATTENTION, /* of the rows behind the last reused token, all layers and heads */
    KVL_SELECT_DEVIATION,       /* of KV in the check layers after a pass of all reused tokens */
    KVL_SELECT_DRAFT_ATTENTION, /* of the rows of an answer drafted over the placed KV */
    KVL_SELECT_ATTENDED_DEVIATION, /* the product of both (KVShare, arXiv:2503.16525, prefill) */
} kvl_select_score;

enum { KVL_SELECT_CHECKS_MAX = 3 };

typedef struct kvl_select_check {
    uint32_t layer; /* a model with fewer layers: its last */
    float share;    /* of all candidates that go on to the next check; the last one's is not used */
} kvl_select_check;

typedef struct kvl_select_policy {
    const char *name; /* static */
    uint32_t n_sink;  /* first tokens of every run (EPIC, arXiv:2410.15332): they draw attention
                         for want of anything before them */
    kvl_select_score score;
    float share;         /* of all candidates, by score; 0 .. 1 */
    bool is_total;       /* what n_sink takes counts against share */
    uint32_t pool_width; /* a token has the highest score of this many around it, odd; 1: its own */
    uint32_t n_draft;    /* tokens of the draft at most, where one is a score */
    /* Where deviation is looked at. Gradual filtering (CacheBlend, section 5.1): what deviates most
     * in one check layer goes on to the next, and the last one chooses. */
    kvl_select_check checks[KVL_SELECT_CHECKS_MAX]; /* layers ascending, shares falling */
    uint32_t n_checks;                              /* at least 1 where deviation is a score */
    bool values_only;                               /* |dV|^2, without |dK|^2 */
} kvl_select_policy;

/* A table of policies, ended by one without name. "sink8+query10" is the default of balanced,
 * "sink8" of fast; "deviation15" is CacheBlend's, "kvshare15" KVShare's. */
extern const kvl_select_policy kvl_select_policies[];
/* NULL where there is none of that name. */
const kvl_select_policy *kvl_select_find(const char *name);

/* Neighbouring positions whose KV was placed. */
typedef struct kvl_select_run {
    uint32_t first, n;
} kvl_select_run;

/* Chooses among the tokens of the runs.
 * runs       [n_runs], ascending, not overlapping
 * scores     by position, of every position of the runs; NULL where the policy wants none
 * chosen     the caller's, room for all tokens of the runs: the chosen positions, ascending
 * *n_chosen  how many
 * Pooling does not cross the end of a run. share is of all tokens of all runs together, rounded
 * down; what n_sink takes counts against it only where is_total.
 * Errors     KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_select_tokens(const kvl_select_policy *policy,
                                          const kvl_select_run *runs, size_t n_runs,
                                          const float *scores, uint32_t *chosen, uint32_t *n_chosen,
                                          kvl_error *error);

#endif /* KVL_REUSE_SELECT_H */
