/* host/batch_plan.c: sorted rows, the tree of what neighbours have in common, groups cut from it.
 *
 * Sorting puts every shared prefix into one unbroken stretch, so the tree is that of the intervals
 * of common lengths between neighbours: built with one pass and a stack. */
#include "host/batch_plan.h"

#include "base/alloc.h"
#include "compute/pages.h"

#include <stdlib.h>
#include <string.h>

#define NONE UINT32_MAX

/* A node is a stretch of sorted rows and what they all begin with; a leaf is one row. */
typedef struct node {
    uint32_t first, past; /* of the sorted rows */
    uint32_t n_shared;    /* ids; of a leaf all that could be shared */
    uint32_t child, next; /* first child, next sibling, or NONE */
    uint64_t n_saved;     /* by the best groups of its subtree */
    uint64_t n_decoded, n_prefilled;
    bool is_group;
} node;

typedef struct planner {
    const kvl_batch_row *rows;
    uint32_t n_rows;
    uint32_t *sorted;  /* [n_rows] */
    uint32_t *commons; /* [n_rows]: ids that sorted row i shares with row i - 1, whole pages */
    node *nodes;       /* [2 n_rows] */
    uint32_t n_nodes;
    uint32_t *stack; /* [2 n_rows] */
    node **siblings; /* [n_rows], scratch */
} planner;

/* ---- sorting ---- */

static int compare_rows(const void *a, const void *b, void *context)
{
    const planner *p = context;
    const uint32_t i = *(const uint32_t *)a;
    const uint32_t k = *(const uint32_t *)b;
    const kvl_batch_row *x = &p->rows[i];
    const kvl_batch_row *y = &p->rows[k];
    const uint32_t n = x->n_ids < y->n_ids ? x->n_ids : y->n_ids;
    /* Any total order that keeps equal beginnings together would do. */
    const int order = memcmp(x->ids, y->ids, n * sizeof *x->ids);
    if (order != 0) return order;
    if (x->n_ids != y->n_ids) return x->n_ids < y->n_ids ? -1 : 1;
    return i < k ? -1 : i > k;
}

/* Whole pages, and never the last id: that one is always computed. */
static uint32_t shareable(uint32_t n_ids)
{
    return (n_ids - 1) / KVL_PAGE_TOKENS * KVL_PAGE_TOKENS;
}

static uint32_t common(const kvl_batch_row *x, const kvl_batch_row *y)
{
    uint32_t n = shareable(x->n_ids);
    if (shareable(y->n_ids) < n) n = shareable(y->n_ids);
    uint32_t i = 0;
    while (i < n && x->ids[i] == y->ids[i]) i++;
    return i / KVL_PAGE_TOKENS * KVL_PAGE_TOKENS;
}

static void sort_rows(planner *p)
{
    for (uint32_t i = 0; i < p->n_rows; i++) p->sorted[i] = i;
    qsort_r(p->sorted, p->n_rows, sizeof *p->sorted, compare_rows, p);
    p->commons[0] = 0;
    for (uint32_t i = 1; i < p->n_rows; i++)
        p->commons[i] = common(&p->rows[p->sorted[i - 1]], &p->rows[p->sorted[i]]);
}

/* ---- the tree ---- */

static uint32_t new_node(planner *p, uint32_t first, uint32_t n_shared)
{
    p->nodes[p->n_nodes] = (node){
        .first = first, .past = first + 1, .n_shared = n_shared, .child = NONE, .next = NONE};
    return p->n_nodes++;
}

static void adopt(planner *p, uint32_t parent, uint32_t child)
{
    p->nodes[child].next = p->nodes[parent].child;
    p->nodes[parent].child = child;
    p->nodes[parent].past = p->nodes[child].past;
}

/* The stack holds a path of nodes that share ever more; a row that shares less than the last ends
 * those that share more than it does. The root shares nothing and is node 0. */
static void build(planner *p)
{
    uint32_t n_stack = 0;
    p->stack[n_stack++] = new_node(p, 0, 0);
    uint32_t open = NONE; /* ended, but not yet anybody's child */
    for (uint32_t i = 0; i <= p->n_rows; i++) {
        const uint32_t n_common = i < p->n_rows ? p->commons[i] : 0;
        while (n_stack > 1 && p->nodes[p->stack[n_stack - 1]].n_shared > n_common) {
            const uint32_t ended = p->stack[--n_stack];
            if (open != NONE) adopt(p, ended, open);
            open = ended;
        }
        if (open != NONE && p->nodes[p->stack[n_stack - 1]].n_shared < n_common) {
            const uint32_t inner = new_node(p, p->nodes[open].first, n_common);
            p->stack[n_stack++] = inner;
        }
        if (open != NONE) adopt(p, p->stack[n_stack - 1], open);
        open = NONE;
        if (i < p->n_rows) open = new_node(p, i, shareable(p->rows[p->sorted[i]].n_ids));
    }
    p->nodes[0].past = p->n_rows;
}

/* ---- groups ---- */

/* More decoding for each token that has to be computed comes first. */
static bool comes_before(const node *a, const node *b)
{
    const double x = (double)a->n_decoded * (double)(b->n_prefilled + 1);
    const double y = (double)b->n_decoded * (double)(a->n_prefilled + 1);
    return x > y || (x == y && a->first < b->first);
}

static int compare_siblings(const void *a, const void *b)
{
    const node *x = *(node *const *)a;
    const node *y = *(node *const *)b;
    return comes_before(x, y) ? -1 : 1;
}

static void sort_children(planner *p, node *parent)
{
    size_t n = 0;
    for (uint32_t c = parent->child; c != NONE; c = p->nodes[c].next)
        p->siblings[n++] = &p->nodes[c];
    qsort(p->siblings, n, sizeof(node *), compare_siblings);
    parent->child = n == 0 ? NONE : (uint32_t)(p->siblings[0] - p->nodes);
    for (size_t i = 0; i < n; i++)
        p->siblings[i]->next = i + 1 < n ? (uint32_t)(p->siblings[i + 1] - p->nodes) : NONE;
}

/* Of a node whose children are done. What it prefills is counted from its parent's shared part on,
 * which is not known here: from the beginning, less what its children share. */
static void finish_node(planner *p, node *own)
{
    if (own->child == NONE) {
        const kvl_batch_row *row = &p->rows[p->sorted[own->first]];
        own->n_decoded = row->n_decoded;
        own->n_prefilled = row->n_ids;
        own->is_group = true;
        return;
    }
    own->n_prefilled = own->n_shared;
    for (uint32_t c = own->child; c != NONE; c = p->nodes[c].next) {
        own->n_saved += p->nodes[c].n_saved;
        own->n_decoded += p->nodes[c].n_decoded;
        own->n_prefilled += p->nodes[c].n_prefilled - own->n_shared;
    }
    const uint64_t as_group = (uint64_t)(own->past - own->first - 1) * own->n_shared;
    own->is_group = own->n_shared > 0 && as_group >= own->n_saved;
    if (own->is_group) own->n_saved = as_group;
    sort_children(p, own);
}

/* Parents first into the stack, then backwards over it: children before parents. */
static void finish_nodes(planner *p)
{
    uint32_t n_seen = 0;
    uint32_t n_stack = 0;
    p->stack[n_stack++] = 0;
    while (n_seen < n_stack) {
        const node *own = &p->nodes[p->stack[n_seen++]];
        for (uint32_t c = own->child; c != NONE; c = p->nodes[c].next) p->stack[n_stack++] = c;
    }
    while (n_stack > 0) finish_node(p, &p->nodes[p->stack[--n_stack]]);
}

/* ---- the plan ---- */

/* Rows in order of the tree; a node that is a group opens one that lasts until its rows end. */
static void fill_plan(planner *p, kvl_batch_plan *plan)
{
    uint32_t n_stack = 0;
    uint32_t n_left = 0; /* of the open group */
    p->stack[n_stack++] = 0;
    while (n_stack > 0) {
        const node *own = &p->nodes[p->stack[--n_stack]];
        if (own->is_group && n_left == 0) {
            n_left = own->past - own->first;
            plan->groups[plan->n_groups++] =
                (kvl_batch_group){plan->n_rows, n_left, own->child == NONE ? 0 : own->n_shared};
        }
        if (own->child == NONE && own->past == own->first + 1) {
            plan->order[plan->n_rows++] = p->sorted[own->first];
            n_left--;
            continue;
        }
        /* The first child on top. */
        const uint32_t bottom = n_stack;
        for (uint32_t c = own->child; c != NONE; c = p->nodes[c].next) p->stack[n_stack++] = c;
        for (uint32_t i = bottom, k = n_stack - 1; i < k; i++, k--) {
            const uint32_t kept = p->stack[i];
            p->stack[i] = p->stack[k];
            p->stack[k] = kept;
        }
    }
    plan->n_distinct = p->nodes[0].n_prefilled;
    plan->n_saved = p->nodes[0].n_saved;
}

static kvl_status make(planner *p, kvl_batch_plan *plan, kvl_error *error)
{
    const size_t n = p->n_rows;
    p->sorted = kvl_alloc_zero(n, sizeof *p->sorted);
    p->commons = kvl_alloc_zero(n, sizeof *p->commons);
    p->nodes = kvl_alloc_zero(2 * n + 1, sizeof *p->nodes);
    p->stack = kvl_alloc_zero(2 * n + 1, sizeof *p->stack);
    p->siblings = kvl_alloc_zero(n + 1, sizeof(node *));
    plan->order = kvl_alloc_zero(n, sizeof *plan->order);
    plan->groups = kvl_alloc_zero(n, sizeof *plan->groups);
    if (p->sorted == NULL || p->commons == NULL || p->nodes == NULL || p->stack == NULL ||
        p->siblings == NULL || plan->order == NULL || plan->groups == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to plan %u rows", p->n_rows);
    sort_rows(p);
    build(p);
    finish_nodes(p);
    fill_plan(p, plan);
    return KVL_OK;
}

kvl_status kvl_batch_plan_make(const kvl_batch_row *rows, uint32_t n_rows, kvl_batch_plan *plan,
                               kvl_error *error)
{
    *plan = (kvl_batch_plan){0};
    if (n_rows > KVL_BATCH_ROWS_MAX)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "a batch has %u rows; at most %u", n_rows,
                        KVL_BATCH_ROWS_MAX);
    if (n_rows == 0) return KVL_OK;
    for (uint32_t i = 0; i < n_rows; i++) {
        KVL_ASSERT(rows[i].n_ids > 0);
        plan->n_tokens += rows[i].n_ids;
    }
    planner p = {.rows = rows, .n_rows = n_rows};
    const kvl_status status = make(&p, plan, error);
    kvl_free(p.sorted);
    kvl_free(p.commons);
    kvl_free(p.nodes);
    kvl_free(p.stack);
    kvl_free(p.siblings);
    return status;
}

void kvl_batch_plan_deinit(kvl_batch_plan *plan)
{
    kvl_free(plan->order);
    kvl_free(plan->groups);
    *plan = (kvl_batch_plan){0};
}
