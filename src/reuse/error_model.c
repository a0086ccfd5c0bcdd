/* reuse/error_model.c: a linear model, learnt from one audit after the other. */
#include "reuse/error_model.h"

#include "reuse/planner.h"

#include <math.h>

_Static_assert(KVL_ACTION_BLEND == KVL_ACTIONS - 1, "the model has a number for every action");

/* Of the difference that one audit takes away: single answers scatter by more than their mean. */
static const double LEARNING_RATE = 0.1;
static const double KL_MAX = 10.0;

kvl_error_model kvl_error_model_first(void)
{
    kvl_error_model model = {{0.0}};
    model.kl[KVL_ACTION_PLACE] = 0.31;
    model.kl[KVL_ACTION_OFFSET] = 0.04;
    model.kl[KVL_ACTION_BLEND] = 0.10;
    return model;
}

static bool is_exact(uint32_t action)
{
    return action == KVL_ACTION_COMPUTE || action == KVL_ACTION_SHARE;
}

double kvl_error_expected(const kvl_error_model *model, const double *shares)
{
    double sum = 0.0;
    for (uint32_t a = 0; a < KVL_ACTIONS; a++) sum += is_exact(a) ? 0.0 : shares[a] * model->kl[a];
    return sum;
}

void kvl_error_learn(kvl_error_model *model, const double *shares, double kl)
{
    double squares = 0.0;
    for (uint32_t a = 0; a < KVL_ACTIONS; a++) squares += is_exact(a) ? 0.0 : shares[a] * shares[a];
    if (!(squares > 0.0) || !isfinite(kl)) return;
    const double measured = fmin(fmax(kl, 0.0), KL_MAX);
    const double step = LEARNING_RATE * (measured - kvl_error_expected(model, shares)) / squares;
    for (uint32_t a = 0; a < KVL_ACTIONS; a++) {
        if (!is_exact(a)) model->kl[a] = fmin(fmax(model->kl[a] + step * shares[a], 0.0), KL_MAX);
    }
}
