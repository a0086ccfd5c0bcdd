/* reuse/budget.h: the cheapest of many choices whose errors add up to no more than a budget; it is
 * private to this room.
 * Method   Multiple-choice knapsack over the frontier of what no other is both cheaper and more
 *          exact than (Pisinger, 1995). Exact while a frontier has no more than KVL_BUDGET_STATES
 *          members; beyond it is thinned, which may cost time but never breaks the budget.
 * Pure, allocates nothing.   Threads  Safe from any thread. */
#ifndef KVL_REUSE_BUDGET_H
#define KVL_REUSE_BUDGET_H

#include <stddef.h>
#include <stdint.h>

#define KVL_BUDGET_STATES 256u
#define KVL_BUDGET_GROUPS 64u
#define KVL_BUDGET_CHOICES 6u

/* One of the choices of each group is taken. */
typedef struct kvl_budget_group {
    uint32_t n;                                                 /* 1 .. KVL_BUDGET_CHOICES */
    double cost[KVL_BUDGET_CHOICES], error[KVL_BUDGET_CHOICES]; /* >= 0 */
} kvl_budget_group;

/* groups [n], n <= KVL_BUDGET_GROUPS; each has a choice without error, so there is an answer.
 * taken [n], the caller's: which choice of each; among equals the one with less error. */
void kvl_budget_choose(const kvl_budget_group *groups, size_t n, double budget, uint8_t *taken);

#endif /* KVL_REUSE_BUDGET_H */
