/* attention/plan.h: what a plan holds. Private to the room.
 *
 * Planning goes in two passes: order.c lines rows up so that those with common pages are
 * neighbours, tiles.c cuts the line into blocks, tiles and runs (compute/backend.h says what these
 * are). Pages are compared by their ids: the same page is the same memory.
 * Memory   Arrays only grow, so a plan that is made again for no more work allocates nothing. */
#ifndef KVL_ATTENTION_PLAN_H
#define KVL_ATTENTION_PLAN_H

#include "attention/attention.h"

/* Pages that rows share are used in common from this many on, counted from a slice's first page:
 * fewer would be read faster than one more tile is begun. Divides the pages of a slice. */
#define KVL_ATTENTION_SHARE_PAGES 4u

/* A link between rows of the same path: they share all pages. */
#define KVL_ATTENTION_LINK_ALL UINT32_MAX

struct kvl_attention_plan {
    /* Borrowed while the plan is made. */
    const kvl_attention_row *rows;
    const kvl_attention_path *paths;
    uint32_t n_rows;
    uint32_t n_paths;

    /* Parts of `numbers`. */
    uint32_t *order;      /* [n_rows]: planned row r is the caller's row order[r] */
    uint32_t *positions;  /* [n_rows], as planned */
    uint32_t *links;      /* [n_rows]: leading pages that row r's path shares with the path of row
                           * r - 1, rounded down to KVL_ATTENTION_SHARE_PAGES; links[0] is 0 */
    uint32_t *path_order; /* [n_paths]: path ids, sorted */
    uint32_t *path_ranks; /* [n_paths]: where a path stands in path_order */
    uint32_t *path_links; /* [n_paths]: as links, between neighbours in path_order */

    kvl_attend_block *blocks;
    kvl_attend_tile *tiles;
    kvl_attend_run *runs;
    uint32_t *page_ids;
    uint32_t *numbers;
    size_t blocks_max; /* how many of each have been allocated */
    size_t tiles_max;
    size_t runs_max;
    size_t page_ids_max;
    size_t numbers_max;

    uint64_t serial;
    uint32_t n_page_ids;
    uint32_t n_tiles;
    uint32_t n_blocks;
    uint32_t n_runs;
    uint32_t n_splits;
    uint32_t n_partials;
};

/* Makes *array hold n elements of `size` bytes, keeping its contents: at least twice what it had,
 * so that growing one by one stays cheap.
 * Errors   KVL_ERR_NO_MEMORY: the array is as before */
KVL_MUST_USE kvl_status kvl_attention_reserve(void **array, size_t *n_max, size_t n, size_t size);

/* Fills order, positions, links and the three arrays of paths. The arrays are there; rows name
 * existing paths. */
void kvl_attention_order_rows(kvl_attention_plan *plan);

/* Fills blocks, tiles, runs and page_ids from what order_rows left.
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_attention_cut_tiles(kvl_attention_plan *plan);

#endif /* KVL_ATTENTION_PLAN_H */
