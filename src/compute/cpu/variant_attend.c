/* compute/cpu/variant_attend.c: attention of a block of rows to some slices, for one KV head.
 *
 * Packed rows: (row, query head) pairs of the block that use the KV head, heads inside.
 * A slice takes three steps:
 *   scores    keys of a page lie dimension-major, so a page is one column of 16 lanes: an outer
 *             product of queries (broadcast) and pages, sums in registers, no horizontal sums
 *   weights   per packed row: largest score, exp(score - largest), their sum
 *   outputs   the same outer product, weights (broadcast) times values
 * Tiles inside a slice only say which rows share which pages. Every score is one chain of
 * multiply-adds over the dimensions, every output one chain over the keys in order, so tiles and
 * panels do not show in the bits.
 * Nothing past a row's own position is read on its behalf except scores that are then masked, so
 * not even NaN there can reach it. */
#include "compute/cpu/attend.h"
#include "compute/cpu/variant.h"

#include <math.h>

enum {
    PAGE = KVL_PAGE_TOKENS,
    UNIT_VECS = KVL_PAGE_TOKENS / KVL_LANES, /* vectors in 16 floats */
    PACKED_MAX = 128,
    PANEL_PAGES = 4, /* 16 KiB of keys at 64 dimensions: half of a first-level cache */
    SLICE_PAGES = KVL_ATTEND_SLICE_KEYS / KVL_PAGE_TOKENS,
    /* Not a power of two: rows one after the other would fall into the same cache sets. */
    SCORE_STRIDE = KVL_ATTEND_SLICE_KEYS + 16,
    PARTIAL_MAX = KVL_HEAD_DIM_MAX + KVL_ATTEND_PARTIAL_EXTRA,
    UNITS_MAX = 4,
};

_Static_assert(PACKED_MAX *(KVL_HEAD_DIM_MAX + SCORE_STRIDE + 2 * PARTIAL_MAX) <=
                   KVL_CPU_SCRATCH_FLOATS,
               "a block must fit into a thread's scratch");
_Static_assert(PACKED_MAX >= KVL_ATTEND_BLOCK_ROWS, "a block has at least one head a row");

/* Packed rows per microkernel, and how many units of 16 floats beside them, so that the sums fill
 * the registers and there are enough of them to hide the latency of a multiply-add. */
#if defined(KVL_VARIANT_avx512)
enum { GROUP_MAX = 6 };
#define UNITS_OF(n_rows) 4u
#elif defined(KVL_VARIANT_avx2)
enum { GROUP_MAX = 6 };
#define UNITS_OF(n_rows) ((n_rows) == 1u ? 4u : (n_rows) <= 3u ? 2u : 1u)
#else
enum { GROUP_MAX = 2 };
#define UNITS_OF(n_rows) 1u
#endif
#define VECS_MAX (UNITS_MAX * UNIT_VECS)

/* The rows of one block with as many of the query heads of a KV head as fit. */
typedef struct packing {
    const kvl_attend_job *job;
    uint32_t head_dim;
    uint32_t head_first; /* query head */
    uint32_t n_heads;
    uint32_t n_packed;
    float *queries;               /* [n_packed][head_dim], times 1 / sqrt(head_dim) */
    float *scores;                /* [n_packed][SCORE_STRIDE] */
    float *parts;                 /* [n_packed][partial]: of the slice at hand */
    float *states;                /* [n_packed][partial]: of all slices so far */
    uint32_t visible[PACKED_MAX]; /* keys of the slice at hand that a packed row sees */
} packing;

/* A group with few rows waits for memory and not for arithmetic, and a page is too short for the
 * processor to foresee the next: it asks for the panel after this one while it works. Decoding from
 * memory gains a third by it; in a full group it would cost 3 %. */
KVL_INLINE void ask_ahead(const uint32_t n_rows, const float *next)
{
    if (n_rows < GROUP_MAX) __builtin_prefetch(next, 0, 2);
}

/* ---- scores ---- */

/* scores[r][16 u + lane] = query r . key `lane` of page u; r < n_rows, u < n_units. Pages of the
 * next panel lie PANEL_PAGES further in `keys`. */
KVL_INLINE void score_panel(const uint32_t n_rows, const uint32_t n_units, uint32_t head_dim,
                            const float *queries, const float *const *keys, float *scores)
{
    kvl_vec sums[GROUP_MAX][VECS_MAX];
    for (uint32_t r = 0; r < n_rows; r++)
        for (uint32_t v = 0; v < n_units * UNIT_VECS; v++) sums[r][v] = kvl_vec_zero();
    for (uint32_t d = 0; d < head_dim; d++) {
        kvl_vec column[VECS_MAX];
        for (uint32_t u = 0; u < n_units; u++)
            ask_ahead(n_rows, keys[u + PANEL_PAGES] + (size_t)d * PAGE);
        for (uint32_t v = 0; v < n_units * UNIT_VECS; v++)
            column[v] =
                kvl_vec_load(keys[v / UNIT_VECS] + (size_t)d * PAGE + v % UNIT_VECS * KVL_LANES);
        for (uint32_t r = 0; r < n_rows; r++) {
            const kvl_vec query = kvl_vec_all(queries[(size_t)r * head_dim + d]);
            for (uint32_t v = 0; v < n_units * UNIT_VECS; v++)
                sums[r][v] = kvl_vec_fma(query, column[v], sums[r][v]);
        }
    }
    for (uint32_t r = 0; r < n_rows; r++)
        for (uint32_t v = 0; v < n_units * UNIT_VECS; v++)
            kvl_vec_store(scores + (size_t)r * SCORE_STRIDE + v * KVL_LANES, sums[r][v]);
}

KVL_INLINE void score_pages(const uint32_t n_rows, uint32_t head_dim, const float *queries,
                            const float *const *keys, uint32_t n_pages, float *scores)
{
    const uint32_t n_units = UNITS_OF(n_rows);
    uint32_t page = 0;
    for (; page + n_units <= n_pages; page += n_units)
        score_panel(n_rows, n_units, head_dim, queries, keys + page, scores + page * PAGE);
    for (; page < n_pages; page++)
        score_panel(n_rows, 1, head_dim, queries, keys + page, scores + page * PAGE);
}

/* ---- outputs ---- */

/* outputs[r][16 u + lane] += weight r of key k * value k, for keys key_first .. key_past - 1 of the
 * pages in order. values[page] points at the panel's first column. */
KVL_INLINE void output_panel(const uint32_t n_rows, const uint32_t n_units, uint32_t head_dim,
                             const float *weights, const float *const *values, uint32_t key_first,
                             uint32_t key_past, size_t column, float *outputs, size_t stride)
{
    kvl_vec sums[GROUP_MAX][VECS_MAX];
    for (uint32_t r = 0; r < n_rows; r++)
        for (uint32_t v = 0; v < n_units * UNIT_VECS; v++)
            sums[r][v] = kvl_vec_load(outputs + r * stride + column + v * KVL_LANES);
    uint32_t k = key_first;
    while (k < key_past) {
        const uint32_t page = k / PAGE;
        const uint32_t past = key_past < (page + 1) * PAGE ? key_past : (page + 1) * PAGE;
        const float *value = values[page] + (size_t)(k % PAGE) * head_dim + column;
        const float *next = values[page + PANEL_PAGES] + (size_t)(k % PAGE) * head_dim + column;
        for (; k < past; k++, value += head_dim, next += head_dim) {
            for (uint32_t u = 0; u < n_units; u++) ask_ahead(n_rows, next + (size_t)u * PAGE);
            kvl_vec row[VECS_MAX];
            for (uint32_t v = 0; v < n_units * UNIT_VECS; v++)
                row[v] = kvl_vec_load(value + v * KVL_LANES);
            for (uint32_t r = 0; r < n_rows; r++) {
                const kvl_vec weight = kvl_vec_all(weights[(size_t)r * SCORE_STRIDE + k]);
                for (uint32_t v = 0; v < n_units * UNIT_VECS; v++)
                    sums[r][v] = kvl_vec_fma(weight, row[v], sums[r][v]);
            }
        }
    }
    for (uint32_t r = 0; r < n_rows; r++)
        for (uint32_t v = 0; v < n_units * UNIT_VECS; v++)
            kvl_vec_store(outputs + r * stride + column + v * KVL_LANES, sums[r][v]);
}

KVL_INLINE void output_keys(const uint32_t n_rows, uint32_t head_dim, const float *weights,
                            const float *const *values, uint32_t key_first, uint32_t key_past,
                            float *outputs)
{
    const size_t stride = kvl_attend_partial_floats(head_dim);
    const uint32_t n_units = UNITS_OF(n_rows);
    uint32_t unit = 0;
    for (; unit + n_units <= head_dim / PAGE; unit += n_units)
        output_panel(n_rows, n_units, head_dim, weights, values, key_first, key_past,
                     (size_t)unit * PAGE, outputs, stride);
    for (; unit < head_dim / PAGE; unit++)
        output_panel(n_rows, 1, head_dim, weights, values, key_first, key_past, (size_t)unit * PAGE,
                     outputs, stride);
}

/* Turns a number of rows into a constant of the microkernels. */
static void score_group(uint32_t n_rows, uint32_t head_dim, const float *queries,
                        const float *const *keys, uint32_t n_pages, float *scores)
{
    switch (n_rows) {
    case 1: score_pages(1, head_dim, queries, keys, n_pages, scores); break;
    case 2: score_pages(2, head_dim, queries, keys, n_pages, scores); break;
#if !defined(KVL_VARIANT_portable)
    case 3: score_pages(3, head_dim, queries, keys, n_pages, scores); break;
    case 4: score_pages(4, head_dim, queries, keys, n_pages, scores); break;
    case 5: score_pages(5, head_dim, queries, keys, n_pages, scores); break;
    case 6: score_pages(6, head_dim, queries, keys, n_pages, scores); break;
#endif
    default: KVL_ASSERT(n_rows <= GROUP_MAX);
    }
}

static void output_group(uint32_t n_rows, uint32_t head_dim, const float *weights,
                         const float *const *values, uint32_t key_first, uint32_t key_past,
                         float *outputs)
{
    switch (n_rows) {
    case 1: output_keys(1, head_dim, weights, values, key_first, key_past, outputs); break;
    case 2: output_keys(2, head_dim, weights, values, key_first, key_past, outputs); break;
#if !defined(KVL_VARIANT_portable)
    case 3: output_keys(3, head_dim, weights, values, key_first, key_past, outputs); break;
    case 4: output_keys(4, head_dim, weights, values, key_first, key_past, outputs); break;
    case 5: output_keys(5, head_dim, weights, values, key_first, key_past, outputs); break;
    case 6: output_keys(6, head_dim, weights, values, key_first, key_past, outputs); break;
#endif
    default: KVL_ASSERT(n_rows <= GROUP_MAX);
    }
}

/* ---- weights ---- */

/* Scores become exp(score - largest); the largest and the sum go behind the output in `part`. */
static void weigh_row(float *scores, uint32_t n, float *largest, float *sum)
{
    const kvl_vec lowest = kvl_vec_all(-INFINITY);
    const uint32_t whole = n / KVL_LANES * KVL_LANES;
    kvl_vec top = lowest;
    for (uint32_t k = 0; k < whole; k += KVL_LANES)
        top = kvl_vec_max(kvl_vec_load(scores + k), top);
    if (whole < n)
        top = kvl_vec_max(kvl_vec_first(kvl_vec_load(scores + whole), n - whole, lowest), top);
    *largest = kvl_vec_top(top);

    const kvl_vec shift = kvl_vec_all(*largest);
    kvl_vec sums = kvl_vec_zero();
    for (uint32_t k = 0; k < whole; k += KVL_LANES) {
        const kvl_vec weight = kvl_vec_exp(kvl_vec_load(scores + k) - shift);
        kvl_vec_store(scores + k, weight);
        sums = sums + weight;
    }
    if (whole < n) {
        const kvl_vec last = kvl_vec_first(kvl_vec_load(scores + whole), n - whole, lowest);
        const kvl_vec weight = kvl_vec_exp(last - shift);
        kvl_vec_store(scores + whole, weight);
        sums = sums + weight;
    }
    *sum = kvl_vec_sum(sums);
}

/* ---- merging ---- */

static void clear_partial(float *partial, uint32_t head_dim)
{
    memset(partial, 0, head_dim * sizeof *partial);
    partial[head_dim] = -INFINITY;
    partial[head_dim + 1] = 0.0F;
}

/* state = state and part together. An empty part leaves the state alone, so that the difference of
 * two infinities never arises. */
static void fold(uint32_t head_dim, const float *part, float *state)
{
    const float part_top = part[head_dim];
    const float state_top = state[head_dim];
    if (part_top == -INFINITY) return;
    const float top = part_top > state_top ? part_top : state_top;
    const kvl_vec part_scale = kvl_vec_exp(kvl_vec_all(part_top - top));
    const kvl_vec state_scale = kvl_vec_exp(kvl_vec_all(state_top - top));
    for (uint32_t d = 0; d < head_dim; d += KVL_LANES) {
        const kvl_vec kept = kvl_vec_load(state + d) * state_scale;
        kvl_vec_store(state + d, kvl_vec_fma(kvl_vec_load(part + d), part_scale, kept));
    }
    state[head_dim] = top;
    state[head_dim + 1] = state[head_dim + 1] * state_scale[0] + part[head_dim + 1] * part_scale[0];
}

static void finish(uint32_t head_dim, const float *state, float *out)
{
    const float sum = state[head_dim + 1];
    const kvl_vec factor = kvl_vec_all(sum == 0.0F ? 0.0F : 1.0F / sum);
    for (uint32_t d = 0; d < head_dim; d += KVL_LANES)
        kvl_vec_store(out + d, kvl_vec_load(state + d) * factor);
}

static void merge(uint32_t head_dim, uint32_t n, const float *partials, size_t stride, float *state,
                  float *out)
{
    clear_partial(state, head_dim);
    for (uint32_t i = 0; i < n; i++) fold(head_dim, partials + i * stride, state);
    finish(head_dim, state, out);
}

/* ---- one run ---- */

/* Where packed row i of the block stands in queries and out. */
static size_t packed_at(const packing *pack, uint32_t i)
{
    const kvl_attend_call *call = pack->job->call;
    const uint32_t row = pack->job->block->row_first + i / pack->n_heads;
    const uint32_t head = pack->head_first + i % pack->n_heads;
    return ((size_t)call->order[row] * call->n_heads + head) * pack->head_dim;
}

static void pack_queries(packing *pack)
{
    const uint32_t head_dim = pack->head_dim;
    const kvl_vec scale = kvl_vec_all((float)(1.0 / sqrt((double)head_dim)));
    for (uint32_t i = 0; i < pack->n_packed; i++) {
        const float *query = pack->job->call->queries + packed_at(pack, i);
        float *packed = pack->queries + (size_t)i * head_dim;
        for (uint32_t d = 0; d < head_dim; d += KVL_LANES)
            kvl_vec_store(packed + d, kvl_vec_load(query + d) * scale);
    }
}

/* Notes what each packed row sees of the slice that begins at key_first, and clears its part. */
static void begin_slice(packing *pack, uint32_t key_first)
{
    const kvl_attend_call *call = pack->job->call;
    const size_t stride = kvl_attend_partial_floats(pack->head_dim);
    for (uint32_t i = 0; i < pack->n_packed; i++) {
        const uint32_t row = pack->job->block->row_first + i / pack->n_heads;
        const uint32_t position = call->positions[row];
        uint32_t visible = 0;
        if (position >= key_first) {
            visible = position - key_first + 1;
            if (visible > KVL_ATTEND_SLICE_KEYS) visible = KVL_ATTEND_SLICE_KEYS;
            clear_partial(pack->parts + i * stride, pack->head_dim);
        }
        pack->visible[i] = visible;
    }
}

/* Pages of a panel and the packed rows that share them. Keys are counted from the slice's first. */
typedef struct panel {
    /* Keys or values of the KV head, page by page, then those of the tile's next panel. */
    const float *heads[2 * PANEL_PAGES];
    uint32_t n_pages;
    uint32_t key_first;
    uint32_t packed_first;
    uint32_t packed_past;
} panel;

static panel panel_of(const packing *pack, const kvl_attend_tile *tile, uint32_t page, bool values)
{
    const kvl_attend_call *call = pack->job->call;
    const uint32_t head = pack->job->kv_head + (values ? call->pages->n_kv_heads : 0);
    const uint32_t left = tile->n_pages - page;
    const uint32_t row = tile->row_first - pack->job->block->row_first;
    panel made = {.n_pages = left < PANEL_PAGES ? left : PANEL_PAGES,
                  .key_first = tile->key_first % KVL_ATTEND_SLICE_KEYS + page * PAGE,
                  .packed_first = row * pack->n_heads,
                  .packed_past = (row + tile->n_rows) * pack->n_heads};
    const uint32_t *ids = call->page_ids + tile->page_first + page;
    /* The last page stands in for those that are not there. */
    for (uint32_t i = 0; i < 2 * PANEL_PAGES; i++)
        made.heads[i] =
            kvl_pages_keys(call->pages, call->layer, ids[i < left ? i : left - 1], head);
    return made;
}

/* A panel of keys stays in the first-level cache while all packed rows pass over it. */
static void score_tile(packing *pack, const kvl_attend_tile *tile)
{
    for (uint32_t page = 0; page < tile->n_pages; page += PANEL_PAGES) {
        const panel keys = panel_of(pack, tile, page, false);
        uint32_t n_rows = 0;
        for (uint32_t i = keys.packed_first; i < keys.packed_past; i += n_rows) {
            const uint32_t left = keys.packed_past - i;
            n_rows = left < GROUP_MAX ? left : GROUP_MAX;
            uint32_t seen = 0;
            for (uint32_t r = 0; r < n_rows; r++)
                if (pack->visible[i + r] > seen) seen = pack->visible[i + r];
            if (seen <= keys.key_first) continue;
            const uint32_t n_seen = (seen - keys.key_first + PAGE - 1) / PAGE;
            score_group(n_rows, pack->head_dim, pack->queries + (size_t)i * pack->head_dim,
                        keys.heads, n_seen < keys.n_pages ? n_seen : keys.n_pages,
                        pack->scores + (size_t)i * SCORE_STRIDE + keys.key_first);
        }
    }
}

/* Values of the panel's keys key_first .. key_past - 1, counted in the panel, to n_rows rows. */
static void output_rows(packing *pack, const panel *values, uint32_t i, uint32_t n_rows,
                        uint32_t key_first, uint32_t key_past)
{
    if (key_first >= key_past) return;
    output_group(n_rows, pack->head_dim,
                 pack->scores + (size_t)i * SCORE_STRIDE + values->key_first, values->heads,
                 key_first, key_past, pack->parts + i * kvl_attend_partial_floats(pack->head_dim));
}

/* Keys of a panel that a packed row sees. */
static uint32_t panel_keys(const packing *pack, const panel *values, uint32_t i)
{
    const uint32_t visible = pack->visible[i];
    const uint32_t seen = visible > values->key_first ? visible - values->key_first : 0;
    return seen < values->n_pages * PAGE ? seen : values->n_pages * PAGE;
}

/* What all rows of a group see they take together, the rest (near the diagonal) by rows that see
 * equally far. */
static void output_tile(packing *pack, const kvl_attend_tile *tile)
{
    for (uint32_t page = 0; page < tile->n_pages; page += PANEL_PAGES) {
        const panel values = panel_of(pack, tile, page, true);
        uint32_t n_rows = 0;
        for (uint32_t i = values.packed_first; i < values.packed_past; i += n_rows) {
            const uint32_t left = values.packed_past - i;
            n_rows = left < GROUP_MAX ? left : GROUP_MAX;
            uint32_t common = panel_keys(pack, &values, i);
            for (uint32_t r = 1; r < n_rows; r++) {
                const uint32_t seen = panel_keys(pack, &values, i + r);
                if (seen < common) common = seen;
            }
            output_rows(pack, &values, i, n_rows, 0, common);
            for (uint32_t r = 0, n_equal = 0; r < n_rows; r += n_equal) {
                const uint32_t seen = panel_keys(pack, &values, i + r);
                n_equal = 1;
                while (r + n_equal < n_rows && panel_keys(pack, &values, i + r + n_equal) == seen)
                    n_equal++;
                output_rows(pack, &values, i + r, n_equal, common, seen);
            }
        }
    }
}

/* Folds the slice into the rows' states, or leaves it in memory for the thread that merges. */
static void end_slice(packing *pack, uint32_t slice)
{
    const kvl_attend_job *job = pack->job;
    const uint32_t head_dim = pack->head_dim;
    const size_t stride = kvl_attend_partial_floats(head_dim);
    for (uint32_t i = 0; i < pack->n_packed; i++) {
        if (pack->visible[i] == 0) continue;
        const float *part = pack->parts + i * stride;
        if (job->partials == NULL) {
            fold(head_dim, part, pack->states + i * stride);
            continue;
        }
        const size_t partial =
            job->block->partial_first + (size_t)slice * job->block->n_rows + i / pack->n_heads;
        const uint32_t head = pack->head_first + i % pack->n_heads;
        memcpy(job->partials + (partial * job->call->n_heads + head) * stride, part,
               stride * sizeof *part);
    }
}

static void attend_slice(packing *pack, const kvl_attend_tile *tiles, uint32_t n_tiles)
{
    const uint32_t slice = tiles->key_first / KVL_ATTEND_SLICE_KEYS;
    const size_t stride = kvl_attend_partial_floats(pack->head_dim);
    begin_slice(pack, slice * KVL_ATTEND_SLICE_KEYS);
    for (uint32_t t = 0; t < n_tiles; t++) score_tile(pack, &tiles[t]);
    for (uint32_t i = 0; i < pack->n_packed; i++) {
        if (pack->visible[i] == 0) continue;
        float *behind = pack->parts + i * stride + pack->head_dim;
        weigh_row(pack->scores + (size_t)i * SCORE_STRIDE, pack->visible[i], behind, behind + 1);
    }
    for (uint32_t t = 0; t < n_tiles; t++) output_tile(pack, &tiles[t]);
    end_slice(pack, slice);
}

static void attend_packed(packing *pack)
{
    const kvl_attend_job *job = pack->job;
    const size_t stride = kvl_attend_partial_floats(pack->head_dim);
    pack_queries(pack);
    if (job->partials == NULL) {
        for (uint32_t i = 0; i < pack->n_packed; i++)
            clear_partial(pack->states + i * stride, pack->head_dim);
    }
    for (uint32_t first = 0, past = 0; first < job->n_tiles; first = past) {
        const uint32_t slice = job->tiles[first].key_first / KVL_ATTEND_SLICE_KEYS;
        while (past < job->n_tiles && job->tiles[past].key_first / KVL_ATTEND_SLICE_KEYS == slice)
            past++;
        attend_slice(pack, job->tiles + first, past - first);
    }
    if (job->partials == NULL) {
        for (uint32_t i = 0; i < pack->n_packed; i++)
            finish(pack->head_dim, pack->states + i * stride, job->call->out + packed_at(pack, i));
    }
}

static void run(const kvl_attend_job *job)
{
    const uint32_t n_rows = job->block->n_rows;
    const uint32_t head_dim = job->call->pages->head_dim;
    const uint32_t group = job->call->n_heads / job->call->pages->n_kv_heads;
    KVL_ASSERT(n_rows > 0 && n_rows <= KVL_ATTEND_BLOCK_ROWS);
    KVL_ASSERT(head_dim % PAGE == 0 && head_dim <= KVL_HEAD_DIM_MAX);
    const uint32_t n_heads_max = PACKED_MAX / n_rows;
    packing pack = {.job = job, .head_dim = head_dim};
    pack.queries = job->scratch;
    pack.scores = pack.queries + PACKED_MAX * KVL_HEAD_DIM_MAX;
    pack.parts = pack.scores + PACKED_MAX * SCORE_STRIDE;
    pack.states = pack.parts + PACKED_MAX * PARTIAL_MAX;
    for (uint32_t head = 0; head < group; head += pack.n_heads) {
        pack.head_first = job->kv_head * group + head;
        pack.n_heads = group - head < n_heads_max ? group - head : n_heads_max;
        pack.n_packed = n_rows * pack.n_heads;
        attend_packed(&pack);
    }
}

const kvl_cpu_attend_kernels *KVL_VARIANT_NAME(kvl_cpu_attend)(void)
{
    static const kvl_cpu_attend_kernels kernels = {.run = run, .merge = merge};
    return &kernels;
}
