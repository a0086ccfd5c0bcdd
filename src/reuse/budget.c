/* reuse/budget.c: frontiers, group by group, with the way back. */
#include "reuse/budget.h"

#include "base/status.h"

#include <stdlib.h>
#include <string.h>

typedef struct state {
    double cost, error;
    uint16_t from; /* state of the frontier before */
    uint8_t choice;
} state;

static int compare(const void *a, const void *b)
{
    const state *left = a;
    const state *right = b;
    if (left->cost != right->cost) return left->cost < right->cost ? -1 : 1;
    return (left->error > right->error) - (left->error < right->error);
}

/* Cheapest first, error falling: what is dearer than another must be more exact. */
static uint32_t keep_frontier(state *states, uint32_t n)
{
    qsort(states, n, sizeof *states, compare);
    uint32_t n_kept = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (n_kept > 0 && states[i].error >= states[n_kept - 1].error) continue;
        states[n_kept++] = states[i];
    }
    return n_kept;
}

/* Every so many of them, and always the most exact, which keeps an answer within reach. */
static uint32_t thin(state *states, uint32_t n)
{
    if (n <= KVL_BUDGET_STATES) return n;
    for (uint32_t i = 0; i < KVL_BUDGET_STATES; i++)
        states[i] = states[(size_t)i * (n - 1) / (KVL_BUDGET_STATES - 1)];
    return KVL_BUDGET_STATES;
}

void kvl_budget_choose(const kvl_budget_group *groups, size_t n, double budget, uint8_t *taken)
{
    KVL_ASSERT(n <= KVL_BUDGET_GROUPS);
    uint16_t from[KVL_BUDGET_GROUPS][KVL_BUDGET_STATES];
    uint8_t choice[KVL_BUDGET_GROUPS][KVL_BUDGET_STATES];
    state frontier[KVL_BUDGET_STATES * KVL_BUDGET_CHOICES] = {{0}};
    state grown[KVL_BUDGET_STATES * KVL_BUDGET_CHOICES];
    uint32_t n_states = 1;
    for (size_t g = 0; g < n; g++) {
        uint32_t n_grown = 0;
        for (uint32_t s = 0; s < n_states; s++) {
            for (uint32_t c = 0; c < groups[g].n; c++) {
                const double error = frontier[s].error + groups[g].error[c];
                if (error > budget) continue;
                grown[n_grown++] =
                    (state){frontier[s].cost + groups[g].cost[c], error, (uint16_t)s, (uint8_t)c};
            }
        }
        KVL_ASSERT(n_grown > 0);
        n_states = thin(grown, keep_frontier(grown, n_grown));
        memcpy(frontier, grown, n_states * sizeof *grown);
        for (uint32_t s = 0; s < n_states; s++) {
            from[g][s] = frontier[s].from;
            choice[g][s] = frontier[s].choice;
        }
    }
    uint32_t at = 0; /* the cheapest */
    for (size_t g = n; g-- > 0;) {
        taken[g] = choice[g][at];
        at = from[g][at];
    }
}
