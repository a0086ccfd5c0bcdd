/* reuse/error_model.h: how far from full prefill an answer is expected to be, by what was done to
 * its prompt: mean KL(full || reuse) of the answer's tokens, in nats.
 *
 * The model is linear: a prompt of which `share` was had by an action is off by share times that
 * action's error, and what several actions do adds up. First numbers are measured ones; audits of
 * what was really sent correct them, template by template.
 * Pure.    Threads  Safe from any thread, one at a time for each model. */
#ifndef KVL_REUSE_ERROR_MODEL_H
#define KVL_REUSE_ERROR_MODEL_H

#include <stdint.h>

#define KVL_ACTIONS 5u /* of kvl_action (reuse/planner.h) */

typedef struct kvl_error_model {
    double kl[KVL_ACTIONS]; /* by action, of a prompt that was had by it alone; 0 of exact ones */
} kvl_error_model;

/* Measured on a 0.5B model, six chunks or five agents: placed behind a header 0.31, corrected by
 * anchors 0.04, blended with 12 % recomputed 0.10. */
kvl_error_model kvl_error_model_first(void);

/* shares [KVL_ACTIONS]: of the prompt's tokens; those of exact actions do not count. */
double kvl_error_expected(const kvl_error_model *model, const double *shares);

/* An answer whose prompt was had so was off by `kl`. Moves the numbers of the actions that had a
 * share towards it, those with more share more (normalised least mean squares); never below 0, and
 * a measurement beyond 10 nats counts as 10. */
void kvl_error_learn(kvl_error_model *model, const double *shares, double kl);

#endif /* KVL_REUSE_ERROR_MODEL_H */
