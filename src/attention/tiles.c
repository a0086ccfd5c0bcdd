/* attention/tiles.c: cuts the line of rows into blocks, tiles and runs.
 *
 * A block is up to KVL_ATTEND_BLOCK_ROWS neighbours that share at least their first pages. Inside a
 * block, and slice by slice, a tile is a stretch of rows times a stretch of pages that all of them
 * have: the tree of spans, cut into rectangles. A block that would keep one thread busy too long is
 * split between slices into runs. Cost is counted in rows times pages. */
#include "attention/plan.h"

enum { SLICE_PAGES = KVL_ATTEND_SLICE_KEYS / KVL_PAGE_TOKENS };

_Static_assert(SLICE_PAGES % KVL_ATTENTION_SHARE_PAGES == 0, "slices begin where sharing may");

/* A block is split when it is more than 1 / SPLIT_ABOVE of all work, into runs of about
 * 1 / RUNS_WANTED of it. KV heads multiply the runs, so a few threads balance well and some dozens
 * still have work from a single row; a long prefill, where blocks are many, is never split. */
enum { SPLIT_ABOVE = 8, RUNS_WANTED = 32 };

#define RESERVE(plan, array, n)                                                                    \
    do {                                                                                           \
        void *memory = (plan)->array;                                                              \
        const kvl_status status =                                                                  \
            kvl_attention_reserve(&memory, &(plan)->array##_max, (n), sizeof *(plan)->array);      \
        (plan)->array = memory;                                                                    \
        if (status != KVL_OK) return status;                                                       \
    } while (0)

static kvl_status cut_blocks(kvl_attention_plan *plan)
{
    RESERVE(plan, blocks, plan->n_rows);
    for (uint32_t row = 0; row < plan->n_rows;) {
        kvl_attend_block *block = &plan->blocks[plan->n_blocks++];
        *block = (kvl_attend_block){.row_first = row};
        uint32_t last = 0;
        do {
            if (plan->positions[row] > last) last = plan->positions[row];
            block->n_rows++;
            row++;
        } while (row < plan->n_rows && block->n_rows < KVL_ATTEND_BLOCK_ROWS &&
                 plan->links[row] > 0);
        block->n_slices = last / KVL_ATTEND_SLICE_KEYS + 1;
    }
    return KVL_OK;
}

/* Adds the tile of rows row_first .. row_past - 1, which share pages page_first .. page_past - 1 as
 * far as they have them: less the rows at either end that see none, and the pages that none of
 * them sees. */
static kvl_status add_tile(kvl_attention_plan *plan, uint32_t row_first, uint32_t row_past,
                           uint32_t page_first, uint32_t page_past)
{
    const uint32_t key_first = page_first * KVL_PAGE_TOKENS;
    while (row_first < row_past && plan->positions[row_first] < key_first) row_first++;
    while (row_first < row_past && plan->positions[row_past - 1] < key_first) row_past--;
    if (row_first == row_past) return KVL_OK;
    uint32_t farthest = row_first;
    for (uint32_t r = row_first; r < row_past; r++)
        if (plan->positions[r] > plan->positions[farthest]) farthest = r;
    const uint32_t seen = plan->positions[farthest] / KVL_PAGE_TOKENS + 1;
    const uint32_t n_pages = (seen < page_past ? seen : page_past) - page_first;

    RESERVE(plan, tiles, (size_t)plan->n_tiles + 1);
    RESERVE(plan, page_ids, (size_t)plan->n_page_ids + n_pages);
    plan->tiles[plan->n_tiles++] = (kvl_attend_tile){.row_first = row_first,
                                                     .n_rows = row_past - row_first,
                                                     .key_first = key_first,
                                                     .page_first = plan->n_page_ids,
                                                     .n_pages = n_pages};
    const kvl_attention_path *path = &plan->paths[plan->rows[plan->order[farthest]].path];
    for (uint32_t i = 0; i < n_pages; i++)
        plan->page_ids[plan->n_page_ids++] = path->pages[page_first + i];
    return KVL_OK;
}

/* From page to page the block's rows fall apart into ever smaller groups: wherever a link ends. */
static kvl_status cut_slice(kvl_attention_plan *plan, const kvl_attend_block *block,
                            uint32_t page_first)
{
    const uint32_t row_past = block->row_first + block->n_rows;
    uint32_t page = page_first;
    while (page < page_first + SLICE_PAGES) {
        uint32_t page_past = page_first + SLICE_PAGES;
        for (uint32_t r = block->row_first + 1; r < row_past; r++)
            if (plan->links[r] > page && plan->links[r] < page_past) page_past = plan->links[r];
        uint32_t first = block->row_first;
        for (uint32_t r = first + 1; r <= row_past; r++) {
            if (r < row_past && plan->links[r] > page) continue;
            KVL_TRY(add_tile(plan, first, r, page, page_past));
            first = r;
        }
        page = page_past;
    }
    return KVL_OK;
}

static kvl_status cut_block(kvl_attention_plan *plan, kvl_attend_block *block)
{
    block->tile_first = plan->n_tiles;
    for (uint32_t slice = 0; slice < block->n_slices; slice++)
        KVL_TRY(cut_slice(plan, block, slice * SLICE_PAGES));
    block->n_tiles = plan->n_tiles - block->tile_first;
    return KVL_OK;
}

static uint64_t tiles_cost(const kvl_attention_plan *plan, uint32_t first, uint32_t n)
{
    uint64_t cost = 0;
    for (uint32_t t = first; t < first + n; t++)
        cost += (uint64_t)plan->tiles[t].n_rows * plan->tiles[t].n_pages;
    return cost;
}

static uint32_t slice_of(const kvl_attention_plan *plan, uint32_t tile)
{
    return plan->tiles[tile].key_first / KVL_ATTEND_SLICE_KEYS;
}

/* Cuts a block into runs of whole slices, each of at least run_cost but for the last. */
static kvl_status cut_runs(kvl_attention_plan *plan, uint32_t b, uint64_t run_cost)
{
    kvl_attend_block *block = &plan->blocks[b];
    const uint32_t tile_past = block->tile_first + block->n_tiles;
    block->run_first = plan->n_runs;
    uint32_t tile = block->tile_first;
    while (tile < tile_past) {
        const uint32_t first = tile;
        uint64_t cost = 0;
        while (tile < tile_past && cost < run_cost) {
            const uint32_t slice = slice_of(plan, tile);
            for (; tile < tile_past && slice_of(plan, tile) == slice; tile++)
                cost += tiles_cost(plan, tile, 1);
        }
        RESERVE(plan, runs, (size_t)plan->n_runs + 1);
        plan->runs[plan->n_runs++] =
            (kvl_attend_run){.block = b, .tile_first = first, .n_tiles = tile - first};
    }
    block->n_runs = plan->n_runs - block->run_first;
    if (block->n_runs > 1) {
        block->split = plan->n_splits++;
        block->partial_first = plan->n_partials;
        plan->n_partials += block->n_slices * block->n_rows;
    }
    return KVL_OK;
}

kvl_status kvl_attention_cut_tiles(kvl_attention_plan *plan)
{
    KVL_TRY(cut_blocks(plan));
    for (uint32_t b = 0; b < plan->n_blocks; b++) KVL_TRY(cut_block(plan, &plan->blocks[b]));
    const uint64_t total = tiles_cost(plan, 0, plan->n_tiles);
    for (uint32_t b = 0; b < plan->n_blocks; b++) {
        const kvl_attend_block *block = &plan->blocks[b];
        const uint64_t cost = tiles_cost(plan, block->tile_first, block->n_tiles);
        const bool split = cost > total / SPLIT_ABOVE;
        KVL_TRY(cut_runs(plan, b, split ? total / RUNS_WANTED + 1 : UINT64_MAX));
    }
    return KVL_OK;
}
