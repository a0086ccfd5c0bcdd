/* cuda/plan.c: spans, their cuts by rows and keys, and which thread block does what. */
#include "cuda/plan.h"

#include "base/alloc.h"

#include <string.h>

/* Vector works a thread block should have, so that its warps are busy to the end. */
enum { VECTOR_WORKS_A_BLOCK = 2, VECTOR_PAGES_LEAST = 4 };

/* A stretch of rows times a stretch of pages, all query heads. */
typedef struct span {
    uint32_t row_first;
    uint32_t n_rows;
    uint32_t key_first;
    uint32_t page_first;
    uint32_t n_pages;
    uint32_t block; /* of attention/ */
} span;

/* One KV head of a span's row chunk, before it is cut by keys. */
typedef struct unit {
    uint32_t row_first;
    uint32_t n_rows;
    uint32_t head;
    uint32_t page_first;
    uint32_t n_pages;
    uint32_t key_first;
} unit;

typedef struct array {
    void *items;
    size_t n_max;
} array;

struct kvl_cuda_plan {
    array spans, units, matrix, vectors, merges, slots, page_ids, counts, firsts, tile_spans;
    uint32_t n_spans, n_units, n_matrix, n_vectors, n_merges, n_slot_entries, n_page_ids, n_slots;
    uint32_t n_blocks, n_kv_heads, group;
    uint32_t n_parts_max;
    const kvl_attend_call *call; /* while the plan is made */
};

static kvl_status reserve(array *a, size_t n, size_t size)
{
    if (n <= a->n_max) return KVL_OK;
    const size_t wanted = n > 2 * a->n_max ? n : 2 * a->n_max;
    size_t n_bytes = 0;
    if (!kvl_size_mul(wanted, size, &n_bytes)) return KVL_ERR_NO_MEMORY;
    void *larger = kvl_realloc(a->items, n_bytes);
    if (larger == NULL) return KVL_ERR_NO_MEMORY;
    a->items = larger;
    a->n_max = wanted;
    return KVL_OK;
}

kvl_status kvl_cuda_plan_create(kvl_cuda_plan **plan, kvl_error *error)
{
    *plan = kvl_alloc_zero(1, sizeof **plan);
    if (*plan == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a device plan");
    return KVL_OK;
}

void kvl_cuda_plan_destroy(kvl_cuda_plan *plan)
{
    if (plan == NULL) return;
    array *const arrays[] = {&plan->spans,  &plan->units,     &plan->matrix, &plan->vectors,
                             &plan->merges, &plan->slots,     &plan->counts, &plan->page_ids,
                             &plan->firsts, &plan->tile_spans};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) kvl_free(arrays[i]->items);
    kvl_free(plan);
}

/* --- spans --- */

/* Does the tile go on where the span ends? Rows of the span that the tile lacks must see none of
 * its keys: the mask then leaves them out. */
static bool continues(const kvl_attend_call *call, const span *s, const kvl_attend_tile *tile)
{
    if (tile->key_first != s->key_first + s->n_pages * KVL_PAGE_TOKENS) return false;
    const uint32_t past = s->row_first + s->n_rows;
    const uint32_t tile_past = tile->row_first + tile->n_rows;
    if (tile->row_first < s->row_first || tile_past > past) return false;
    for (uint32_t r = s->row_first; r < past; r++) {
        const bool inside = r >= tile->row_first && r < tile_past;
        if (!inside && call->positions[r] >= tile->key_first) return false;
    }
    return true;
}

static void add_tile(kvl_cuda_plan *plan, uint32_t block, uint32_t block_spans, uint32_t t)
{
    span *spans = plan->spans.items;
    uint32_t *tile_spans = plan->tile_spans.items;
    const kvl_attend_tile *tile = &plan->call->tiles[t];
    for (uint32_t s = plan->n_spans; s-- > block_spans;) {
        if (!continues(plan->call, &spans[s], tile)) continue;
        tile_spans[t] = s;
        spans[s].n_pages += tile->n_pages;
        return;
    }
    tile_spans[t] = plan->n_spans;
    spans[plan->n_spans++] =
        (span){tile->row_first, tile->n_rows, tile->key_first, 0, tile->n_pages, block};
}

/* Pages of a span stand together; its tiles come in order of keys. */
static kvl_status copy_pages(kvl_cuda_plan *plan, uint32_t n_tiles)
{
    span *spans = plan->spans.items;
    for (uint32_t s = 0; s < plan->n_spans; s++) {
        spans[s].page_first = plan->n_page_ids;
        plan->n_page_ids += spans[s].n_pages;
        spans[s].n_pages = 0;
    }
    KVL_TRY(reserve(&plan->page_ids, plan->n_page_ids, sizeof(uint32_t)));
    uint32_t *ids = plan->page_ids.items;
    const uint32_t *tile_spans = plan->tile_spans.items;
    for (uint32_t t = 0; t < n_tiles; t++) {
        const kvl_attend_tile *tile = &plan->call->tiles[t];
        span *s = &spans[tile_spans[t]];
        memcpy(ids + s->page_first + s->n_pages, plan->call->page_ids + tile->page_first,
               tile->n_pages * sizeof(uint32_t));
        s->n_pages += tile->n_pages;
    }
    return KVL_OK;
}

static kvl_status join_tiles(kvl_cuda_plan *plan)
{
    const kvl_attend_call *call = plan->call;
    uint32_t n_tiles = 0;
    for (uint32_t b = 0; b < call->n_blocks; b++)
        n_tiles = call->blocks[b].tile_first + call->blocks[b].n_tiles;
    KVL_TRY(reserve(&plan->tile_spans, n_tiles, sizeof(uint32_t)));
    KVL_TRY(reserve(&plan->spans, n_tiles, sizeof(span)));
    for (uint32_t b = 0; b < call->n_blocks; b++) {
        const kvl_attend_block *block = &call->blocks[b];
        const uint32_t block_spans = plan->n_spans;
        for (uint32_t t = block->tile_first; t < block->tile_first + block->n_tiles; t++)
            add_tile(plan, b, block_spans, t);
    }
    return copy_pages(plan, n_tiles);
}

/* --- cuts --- */

static bool is_vector(const kvl_cuda_plan *plan, const span *s)
{
    return s->n_rows * plan->group <= KVL_CUDA_VECTOR_ROWS;
}

/* Units of all matrix spans, head by head, so that neighbours read the same pages together. */
static kvl_status make_units(kvl_cuda_plan *plan)
{
    const span *spans = plan->spans.items;
    const uint32_t rows_max = KVL_CUDA_MATRIX_ROWS / plan->group;
    size_t n = 0;
    for (uint32_t s = 0; s < plan->n_spans; s++)
        if (!is_vector(plan, &spans[s])) n += (spans[s].n_rows + rows_max - 1) / rows_max;
    KVL_TRY(reserve(&plan->units, n * plan->n_kv_heads, sizeof(unit)));
    unit *units = plan->units.items;
    for (uint32_t head = 0; head < plan->n_kv_heads; head++) {
        for (uint32_t i = 0; i < plan->n_spans; i++) {
            const span *s = &spans[i];
            if (is_vector(plan, s)) continue;
            for (uint32_t row = 0; row < s->n_rows; row += rows_max) {
                const uint32_t left = s->n_rows - row;
                units[plan->n_units++] = (unit){s->row_first + row,
                                                left < rows_max ? left : rows_max,
                                                head,
                                                s->page_first,
                                                s->n_pages,
                                                s->key_first};
            }
        }
    }
    return KVL_OK;
}

static uint32_t steps_of(uint32_t n_pages)
{
    return (n_pages + KVL_CUDA_STEP_PAGES - 1) / KVL_CUDA_STEP_PAGES;
}

static uint32_t *counts_at(const kvl_cuda_plan *plan, uint32_t row, uint32_t head)
{
    return (uint32_t *)plan->counts.items + ((size_t)row * plan->n_kv_heads + head);
}

static void count_rows(const kvl_cuda_plan *plan, uint32_t row_first, uint32_t n_rows,
                       uint32_t head)
{
    for (uint32_t r = row_first; r < row_first + n_rows; r++) ++*counts_at(plan, r, head);
}

/* The first step of which some row sees not every key. */
static uint32_t mask_step(const kvl_cuda_plan *plan, const unit *u, uint32_t key_first,
                          uint32_t n_pages)
{
    uint32_t least = UINT32_MAX;
    for (uint32_t r = u->row_first; r < u->row_first + u->n_rows; r++)
        if (plan->call->positions[r] < least) least = plan->call->positions[r];
    const uint32_t step_keys = KVL_CUDA_STEP_PAGES * KVL_PAGE_TOKENS;
    const uint32_t seen = least < key_first ? 0 : least - key_first + 1;
    const uint32_t held = n_pages * KVL_PAGE_TOKENS;
    return (seen < held ? seen : held) / step_keys;
}

static void add_matrix(kvl_cuda_plan *plan, const unit *u, uint32_t step, uint32_t n_steps)
{
    const uint32_t page = step * KVL_CUDA_STEP_PAGES;
    const uint32_t wanted = n_steps * KVL_CUDA_STEP_PAGES;
    const uint32_t n_pages = u->n_pages - page < wanted ? u->n_pages - page : wanted;
    const uint32_t key_first = u->key_first + page * KVL_PAGE_TOKENS;
    kvl_cuda_matrix_work *works = plan->matrix.items;
    works[plan->n_matrix++] = (kvl_cuda_matrix_work){
        .row_first = u->row_first,
        .n_rows = u->n_rows,
        .head = u->head,
        .page_first = u->page_first + page,
        .n_pages = n_pages,
        .key_first = key_first,
        .slot_first = plan->n_slot_entries,
        .mask_step = mask_step(plan, u, key_first, n_pages),
    };
    plan->n_slot_entries += u->n_rows;
    count_rows(plan, u->row_first, u->n_rows, u->head);
}

/* Every unit in the same number of pieces, one a thread block, where that leaves few blocks idle:
 * it makes the fewest partial results. */
static uint32_t even_pieces(const kvl_cuda_plan *plan)
{
    if (plan->n_units == 0 || plan->n_units > plan->n_blocks) return 0;
    const unit *units = plan->units.items;
    for (uint32_t i = 1; i < plan->n_units; i++)
        if (units[i].n_pages != units[0].n_pages) return 0;
    const uint32_t pieces = plan->n_blocks / plan->n_units;
    if (pieces > steps_of(units[0].n_pages)) return 0;
    return pieces * plan->n_units * 10 >= plan->n_blocks * 9 ? pieces : 0;
}

static void cut_evenly(kvl_cuda_plan *plan, uint32_t pieces)
{
    const unit *units = plan->units.items;
    uint32_t *first = plan->firsts.items;
    for (uint32_t b = 0; b < plan->n_blocks; b++) {
        first[b] = plan->n_matrix;
        if (b >= plan->n_units * pieces) continue;
        /* Pieces of one unit far apart, units that share pages side by side. */
        const unit *u = &units[b % plan->n_units];
        const uint32_t piece = b / plan->n_units;
        const uint32_t n_steps = steps_of(u->n_pages);
        const uint32_t from = (uint32_t)((uint64_t)n_steps * piece / pieces);
        const uint32_t to = (uint32_t)((uint64_t)n_steps * (piece + 1) / pieces);
        add_matrix(plan, u, from, to - from);
    }
    first[plan->n_blocks] = plan->n_matrix;
}

/* The steps of all units in one line, cut into equal lengths. */
static void cut_line(kvl_cuda_plan *plan)
{
    const unit *units = plan->units.items;
    uint32_t *first = plan->firsts.items;
    uint64_t total = 0;
    for (uint32_t i = 0; i < plan->n_units; i++) total += steps_of(units[i].n_pages);
    uint32_t at = 0;
    uint32_t step = 0;
    uint64_t done = 0;
    for (uint32_t b = 0; b < plan->n_blocks; b++) {
        first[b] = plan->n_matrix;
        const uint64_t goal = total * (b + 1) / plan->n_blocks;
        while (done < goal) {
            const uint32_t left = steps_of(units[at].n_pages) - step;
            const uint32_t n = goal - done < left ? (uint32_t)(goal - done) : left;
            add_matrix(plan, &units[at], step, n);
            done += n;
            step += n;
            if (n < left) continue;
            at++;
            step = 0;
        }
    }
    first[plan->n_blocks] = plan->n_matrix;
}

static void add_vector(kvl_cuda_plan *plan, const span *s, uint32_t head, uint32_t page,
                       uint32_t n_pages)
{
    kvl_cuda_vector_work *work = (kvl_cuda_vector_work *)plan->vectors.items + plan->n_vectors++;
    *work = (kvl_cuda_vector_work){
        .row_first = s->row_first,
        .n_rows = s->n_rows,
        .head = head,
        .n_pages = n_pages,
        .key_first = s->key_first + page * KVL_PAGE_TOKENS,
    };
    for (uint32_t i = 0; i < s->n_rows; i++) {
        work->places[i] = plan->call->order[s->row_first + i];
        work->positions[i] = plan->call->positions[s->row_first + i];
    }
    memcpy(work->pages, (uint32_t *)plan->page_ids.items + s->page_first + page,
           n_pages * sizeof(uint32_t));
    count_rows(plan, s->row_first, s->n_rows, head);
}

static uint32_t vector_pages(const kvl_cuda_plan *plan)
{
    const span *spans = plan->spans.items;
    uint64_t total = 0;
    for (uint32_t s = 0; s < plan->n_spans; s++)
        if (is_vector(plan, &spans[s])) total += (uint64_t)spans[s].n_pages * plan->n_kv_heads;
    const uint64_t wanted = total / ((uint64_t)VECTOR_WORKS_A_BLOCK * plan->n_blocks) + 1;
    if (wanted < VECTOR_PAGES_LEAST) return VECTOR_PAGES_LEAST;
    return wanted < KVL_CUDA_VECTOR_PAGES ? (uint32_t)wanted : KVL_CUDA_VECTOR_PAGES;
}

static kvl_status cut_vectors(kvl_cuda_plan *plan)
{
    const span *spans = plan->spans.items;
    const uint32_t most = vector_pages(plan);
    size_t n = 0;
    uint64_t total = 0;
    for (uint32_t s = 0; s < plan->n_spans; s++) {
        if (!is_vector(plan, &spans[s])) continue;
        n += (spans[s].n_pages + most - 1) / most * (size_t)plan->n_kv_heads;
        total += (uint64_t)spans[s].n_pages * plan->n_kv_heads;
    }
    KVL_TRY(reserve(&plan->vectors, n, sizeof(kvl_cuda_vector_work)));
    uint32_t *first = (uint32_t *)plan->firsts.items + plan->n_blocks + 1;
    uint64_t done = 0;
    uint32_t b = 0;
    for (uint32_t i = 0; i < plan->n_spans; i++) {
        const span *s = &spans[i];
        if (!is_vector(plan, s)) continue;
        const uint32_t pieces = (s->n_pages + most - 1) / most;
        for (uint32_t at = 0; at < pieces * plan->n_kv_heads; at++) {
            const uint32_t piece = at / plan->n_kv_heads;
            const uint32_t from = s->n_pages * piece / pieces;
            const uint32_t to = s->n_pages * (piece + 1) / pieces;
            while (b < plan->n_blocks && done * plan->n_blocks >= total * b)
                first[b++] = plan->n_vectors;
            add_vector(plan, s, at % plan->n_kv_heads, from, to - from);
            done += to - from;
        }
    }
    while (b <= plan->n_blocks) first[b++] = plan->n_vectors;
    return KVL_OK;
}

/* --- slots --- */

/* Turns counts of partial results into the first slot of each row and head, and lists merges. */
static kvl_status assign_slots(kvl_cuda_plan *plan)
{
    uint32_t n_merges = 0;
    const uint32_t n_rows = plan->call->n_rows;
    for (uint32_t r = 0; r < n_rows; r++)
        for (uint32_t h = 0; h < plan->n_kv_heads; h++) n_merges += *counts_at(plan, r, h) > 1;
    KVL_TRY(reserve(&plan->merges, n_merges, sizeof(kvl_cuda_merge)));
    KVL_TRY(reserve(&plan->slots, plan->n_slot_entries, sizeof(uint32_t)));
    kvl_cuda_merge *merges = plan->merges.items;
    for (uint32_t r = 0; r < n_rows; r++) {
        for (uint32_t h = 0; h < plan->n_kv_heads; h++) {
            uint32_t *count = counts_at(plan, r, h);
            if (*count <= 1) {
                *count = KVL_CUDA_DIRECT;
                continue;
            }
            merges[plan->n_merges++] =
                (kvl_cuda_merge){plan->call->order[r], h, plan->n_slots, *count};
            if (*count > plan->n_parts_max) plan->n_parts_max = *count;
            const uint32_t n = *count;
            *count = plan->n_slots;
            plan->n_slots += n;
        }
    }
    return KVL_OK;
}

static void give_slots(kvl_cuda_plan *plan, uint32_t *slots, uint32_t row_first, uint32_t n_rows,
                       uint32_t head)
{
    for (uint32_t i = 0; i < n_rows; i++) {
        uint32_t *next = counts_at(plan, row_first + i, head);
        slots[i] = *next == KVL_CUDA_DIRECT ? KVL_CUDA_DIRECT : (*next)++;
    }
}

static kvl_status make(kvl_cuda_plan *plan)
{
    const size_t n_counts = (size_t)plan->call->n_rows * plan->n_kv_heads;
    KVL_TRY(reserve(&plan->counts, n_counts, sizeof(uint32_t)));
    if (n_counts != 0) memset(plan->counts.items, 0, n_counts * sizeof(uint32_t));
    KVL_TRY(reserve(&plan->firsts, 2 * ((size_t)plan->n_blocks + 1), sizeof(uint32_t)));
    KVL_TRY(join_tiles(plan));
    KVL_TRY(make_units(plan));
    KVL_TRY(reserve(&plan->matrix, (size_t)plan->n_units + plan->n_blocks,
                    sizeof(kvl_cuda_matrix_work)));
    const uint32_t pieces = even_pieces(plan);
    if (pieces != 0) {
        cut_evenly(plan, pieces);
    } else {
        cut_line(plan);
    }
    KVL_TRY(cut_vectors(plan));
    KVL_TRY(assign_slots(plan));
    const kvl_cuda_matrix_work *matrix = plan->matrix.items;
    uint32_t *slots = plan->slots.items;
    for (uint32_t i = 0; i < plan->n_matrix; i++)
        give_slots(plan, slots + matrix[i].slot_first, matrix[i].row_first, matrix[i].n_rows,
                   matrix[i].head);
    kvl_cuda_vector_work *vectors = plan->vectors.items;
    for (uint32_t i = 0; i < plan->n_vectors; i++)
        give_slots(plan, vectors[i].slots, vectors[i].row_first, vectors[i].n_rows,
                   vectors[i].head);
    return KVL_OK;
}

static void empty(kvl_cuda_plan *plan)
{
    plan->n_spans = plan->n_units = plan->n_matrix = plan->n_vectors = 0;
    plan->n_merges = plan->n_slot_entries = plan->n_page_ids = plan->n_slots = 0;
    plan->n_parts_max = 0;
    plan->call = NULL;
}

kvl_status kvl_cuda_plan_make(kvl_cuda_plan *plan, const kvl_attend_call *call, uint32_t n_kv_heads,
                              uint32_t n_blocks, kvl_error *error)
{
    KVL_ASSERT(n_kv_heads > 0 && n_blocks > 0 && call->n_heads % n_kv_heads == 0);
    empty(plan);
    plan->group = call->n_heads / n_kv_heads;
    if (plan->group > KVL_CUDA_VECTOR_ROWS)
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                        "%u query heads for each KV head: the CUDA backend has kernels for at most "
                        "%u; use --device cpu",
                        plan->group, KVL_CUDA_VECTOR_ROWS);
    plan->n_kv_heads = n_kv_heads;
    plan->n_blocks = n_blocks;
    plan->call = call;
    kvl_status status = make(plan);
    if (status != KVL_OK) {
        status = KVL_FAIL(error, status, "no memory to plan attention of %u rows", call->n_rows);
        empty(plan);
    }
    plan->call = NULL;
    return status;
}

kvl_cuda_plan_view kvl_cuda_plan_look(const kvl_cuda_plan *plan)
{
    const uint32_t *firsts = plan->firsts.items;
    return (kvl_cuda_plan_view){
        .matrix = plan->matrix.items,
        .vectors = plan->vectors.items,
        .merges = plan->merges.items,
        .matrix_first = firsts,
        .vector_first = firsts + plan->n_blocks + 1,
        .slots = plan->slots.items,
        .page_ids = plan->page_ids.items,
        .n_matrix = plan->n_matrix,
        .n_vectors = plan->n_vectors,
        .n_merges = plan->n_merges,
        .n_slot_entries = plan->n_slot_entries,
        .n_page_ids = plan->n_page_ids,
        .n_slots = plan->n_slots,
        .n_parts_max = plan->n_parts_max,
    };
}
