/* attention/order.c: lines rows up so that rows with common pages are neighbours.
 *
 * Sorting the lists of pages like words in a dictionary puts every shared prefix into one
 * unbroken stretch, at every depth at once, so the tree of spans never has to be built: it is the
 * number of leading pages that neighbours have in common. */
#include "attention/plan.h"

#include <string.h>

typedef bool comes_before(const kvl_attention_plan *plan, uint32_t a, uint32_t b);

static void swap(uint32_t *a, uint32_t *b)
{
    const uint32_t kept = *a;
    *a = *b;
    *b = kept;
}

/* Restores the heap (the last in order on top) below items[at]. */
static void sift_down(const kvl_attention_plan *plan, comes_before *before, uint32_t *items,
                      uint32_t n, uint32_t at)
{
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= n) return;
        if (child + 1 < n && before(plan, items[child], items[child + 1])) child++;
        if (!before(plan, items[at], items[child])) return;
        swap(&items[at], &items[child]);
        at = child;
    }
}

/* Heap sort: in place, and n log n for every input. Items that stand in order already, which is
 * the common case, are left after one look. */
static void sort(const kvl_attention_plan *plan, comes_before *before, uint32_t *items, uint32_t n)
{
    uint32_t n_sorted = 1;
    while (n_sorted < n && before(plan, items[n_sorted - 1], items[n_sorted])) n_sorted++;
    if (n_sorted >= n) return;
    for (uint32_t at = n / 2; at-- > 0;) sift_down(plan, before, items, n, at);
    for (uint32_t left = n; left > 1;) {
        left--;
        swap(&items[0], &items[left]);
        sift_down(plan, before, items, left, 0);
    }
}

static uint32_t pages_of(const kvl_attention_path *path)
{
    return path->n_tokens / KVL_PAGE_TOKENS + (path->n_tokens % KVL_PAGE_TOKENS != 0);
}

/* Any total order of pages would do; memcmp's is the fastest. */
static bool path_before(const kvl_attention_plan *plan, uint32_t a, uint32_t b)
{
    const uint32_t n_a = pages_of(&plan->paths[a]);
    const uint32_t n_b = pages_of(&plan->paths[b]);
    const size_t n_both = n_a < n_b ? n_a : n_b;
    if (n_both != 0) {
        const int order = memcmp(plan->paths[a].pages, plan->paths[b].pages,
                                 n_both * sizeof *plan->paths[a].pages);
        if (order != 0) return order < 0;
    }
    if (n_a != n_b) return n_a < n_b;
    return a < b;
}

static bool row_before(const kvl_attention_plan *plan, uint32_t a, uint32_t b)
{
    const uint32_t rank_a = plan->path_ranks[plan->rows[a].path];
    const uint32_t rank_b = plan->path_ranks[plan->rows[b].path];
    if (rank_a != rank_b) return rank_a < rank_b;
    if (plan->rows[a].position != plan->rows[b].position)
        return plan->rows[a].position < plan->rows[b].position;
    return a < b;
}

/* Leading pages that two paths share, rounded down. */
static uint32_t link_paths(const kvl_attention_path *a, const kvl_attention_path *b)
{
    const uint32_t n_a = pages_of(a);
    const uint32_t n_b = pages_of(b);
    const uint32_t n_both = n_a < n_b ? n_a : n_b;
    uint32_t n_shared = 0;
    while (n_shared < n_both && a->pages[n_shared] == b->pages[n_shared]) n_shared++;
    return n_shared / KVL_ATTENTION_SHARE_PAGES * KVL_ATTENTION_SHARE_PAGES;
}

static void order_paths(kvl_attention_plan *plan)
{
    for (uint32_t i = 0; i < plan->n_paths; i++) plan->path_order[i] = i;
    sort(plan, path_before, plan->path_order, plan->n_paths);
    for (uint32_t i = 0; i < plan->n_paths; i++) {
        const uint32_t path = plan->path_order[i];
        plan->path_ranks[path] = i;
        plan->path_links[i] =
            i == 0 ? 0 : link_paths(&plan->paths[plan->path_order[i - 1]], &plan->paths[path]);
    }
}

/* Paths without rows may stand between two that have some: what those two share is the least of
 * the links on the way. */
static uint32_t link_ranks(const kvl_attention_plan *plan, uint32_t rank, uint32_t later)
{
    uint32_t link = KVL_ATTENTION_LINK_ALL;
    while (rank < later) {
        rank++;
        if (plan->path_links[rank] < link) link = plan->path_links[rank];
    }
    return link;
}

void kvl_attention_order_rows(kvl_attention_plan *plan)
{
    order_paths(plan);
    for (uint32_t r = 0; r < plan->n_rows; r++) plan->order[r] = r;
    sort(plan, row_before, plan->order, plan->n_rows);
    uint32_t rank_before = 0;
    for (uint32_t r = 0; r < plan->n_rows; r++) {
        const kvl_attention_row *row = &plan->rows[plan->order[r]];
        const uint32_t rank = plan->path_ranks[row->path];
        plan->positions[r] = row->position;
        plan->links[r] = r == 0 ? 0 : link_ranks(plan, rank_before, rank);
        rank_before = rank;
    }
}
