/* compute/cpu/variant_mass.c: how much attention rows give each key of one path, for one KV head.
 *
 * Keys of a page lie dimension-major, so a page is one column of 16 lanes and a score is one chain
 * of multiply-adds over the dimensions, as in variant_attend.c. A row's scores are kept whole: the
 * weights are divided by their sum, which is known only behind the last of them. */
#include "compute/cpu/attend.h"
#include "compute/cpu/variant.h"

#include <math.h>

enum {
    PAGE = KVL_PAGE_TOKENS,
    UNIT_VECS = KVL_PAGE_TOKENS / KVL_LANES, /* vectors in 16 floats */
#if defined(KVL_VARIANT_portable)
    ROWS_MAX = 1,
    PANEL_PAGES = 1,
#else
    ROWS_MAX = 4,
    PANEL_PAGES = 4 / UNIT_VECS, /* so that 16 sums fill the registers */
#endif
};

/* Query heads of rows, one after the other: pair p is head p % group of row p / group. */
typedef struct pairs {
    const kvl_attend_mass_call *call;
    uint32_t kv_head, group;
    uint32_t first, n; /* of this turn */
    float *queries;    /* [ROWS_MAX][head_dim], times 1 / sqrt(head_dim) */
    float *scores;     /* [ROWS_MAX][stride] */
    size_t stride;
} pairs;

/* scores[r][16 p + lane] = query r . key `lane` of page p; r < n_rows, p < n_pages. */
KVL_INLINE void score_panel(const uint32_t n_rows, const uint32_t n_pages, const pairs *work,
                            uint32_t page)
{
    const kvl_attend_mass_call *call = work->call;
    const uint32_t head_dim = call->pages->head_dim;
    const float *keys[PANEL_PAGES];
    kvl_vec sums[ROWS_MAX][PANEL_PAGES * UNIT_VECS];
    for (uint32_t p = 0; p < n_pages; p++)
        keys[p] = kvl_pages_keys(call->pages, call->layer, call->page_ids[page + p], work->kv_head);
    for (uint32_t r = 0; r < n_rows; r++)
        for (uint32_t v = 0; v < n_pages * UNIT_VECS; v++) sums[r][v] = kvl_vec_zero();
    for (uint32_t d = 0; d < head_dim; d++) {
        for (uint32_t v = 0; v < n_pages * UNIT_VECS; v++) {
            const kvl_vec column =
                kvl_vec_load(keys[v / UNIT_VECS] + (size_t)d * PAGE + v % UNIT_VECS * KVL_LANES);
            for (uint32_t r = 0; r < n_rows; r++)
                sums[r][v] = kvl_vec_fma(kvl_vec_all(work->queries[(size_t)r * head_dim + d]),
                                         column, sums[r][v]);
        }
    }
    for (uint32_t r = 0; r < n_rows; r++)
        for (uint32_t v = 0; v < n_pages * UNIT_VECS; v++)
            kvl_vec_store(work->scores + r * work->stride + (size_t)page * PAGE + v * KVL_LANES,
                          sums[r][v]);
}

KVL_INLINE void score_pages(const uint32_t n_rows, const pairs *work, uint32_t n_pages)
{
    uint32_t page = 0;
    for (; page + PANEL_PAGES <= n_pages; page += PANEL_PAGES)
        score_panel(n_rows, PANEL_PAGES, work, page);
    for (; page < n_pages; page++) score_panel(n_rows, 1, work, page);
}

/* Turns a number of rows into a constant of the microkernels. */
static void score_rows(const pairs *work, uint32_t n_pages)
{
    switch (work->n) {
    case 1: score_pages(1, work, n_pages); break;
#if !defined(KVL_VARIANT_portable)
    case 2: score_pages(2, work, n_pages); break;
    case 3: score_pages(3, work, n_pages); break;
    case 4: score_pages(4, work, n_pages); break;
#endif
    default: KVL_ASSERT(work->n <= ROWS_MAX);
    }
}

/* Adds the weights of one pair, of its first n scores, to mass. */
static void add_weights(float *scores, uint32_t n, float *mass)
{
    float top = -INFINITY;
    for (uint32_t k = 0; k < n; k++) top = scores[k] > top ? scores[k] : top;
    const kvl_vec shift = kvl_vec_all(top);
    kvl_vec sums = kvl_vec_zero();
    const uint32_t whole = n / KVL_LANES * KVL_LANES;
    for (uint32_t k = 0; k < whole; k += KVL_LANES) {
        const kvl_vec weight = kvl_vec_exp(kvl_vec_load(scores + k) - shift);
        kvl_vec_store(scores + k, weight);
        sums = sums + weight;
    }
    float sum = kvl_vec_sum(sums);
    for (uint32_t k = whole; k < n; k++) {
        scores[k] = expf(scores[k] - top);
        sum += scores[k];
    }
    const kvl_vec share = kvl_vec_all(1.0F / sum);
    for (uint32_t k = 0; k < whole; k += KVL_LANES)
        kvl_vec_store(mass + k,
                      kvl_vec_fma(kvl_vec_load(scores + k), share, kvl_vec_load(mass + k)));
    for (uint32_t k = whole; k < n; k++) mass[k] += scores[k] / sum;
}

static uint32_t keys_seen(const pairs *work, uint32_t pair)
{
    const uint32_t seen = work->call->positions[pair / work->group] + 1;
    return seen < work->call->n_keys ? seen : work->call->n_keys;
}

static void pack(const pairs *work)
{
    const kvl_attend_mass_call *call = work->call;
    const uint32_t head_dim = call->pages->head_dim;
    const float scale = (float)(1.0 / sqrt((double)head_dim));
    for (uint32_t r = 0; r < work->n; r++) {
        const uint32_t pair = work->first + r;
        const size_t at = (size_t)(pair / work->group) * call->n_heads +
                          work->kv_head * work->group + pair % work->group;
        for (uint32_t d = 0; d < head_dim; d++)
            work->queries[(size_t)r * head_dim + d] = call->queries[at * head_dim + d] * scale;
    }
}

static void mass(const kvl_attend_mass_call *call, uint32_t kv_head, float *scratch, float *out)
{
    pairs work = {.call = call,
                  .kv_head = kv_head,
                  .group = call->n_heads / call->pages->n_kv_heads,
                  .queries = scratch,
                  .scores = scratch + ROWS_MAX * KVL_HEAD_DIM_MAX};
    const uint32_t n_pages = (call->n_keys + PAGE - 1) / PAGE;
    work.stride = (size_t)n_pages * PAGE;
    const size_t n_fit = (KVL_CPU_SCRATCH_FLOATS - ROWS_MAX * KVL_HEAD_DIM_MAX) / work.stride;
    const uint32_t n_most = n_fit < ROWS_MAX ? (uint32_t)n_fit : ROWS_MAX;
    KVL_ASSERT(n_most > 0);
    const uint32_t n_pairs = call->n_rows * work.group;
    for (; work.first < n_pairs; work.first += work.n) {
        work.n = n_pairs - work.first < n_most ? n_pairs - work.first : n_most;
        pack(&work);
        score_rows(&work, n_pages);
        for (uint32_t r = 0; r < work.n; r++)
            add_weights(work.scores + r * work.stride, keys_seen(&work, work.first + r), out);
    }
}

const kvl_cpu_mass_kernels *KVL_VARIANT_NAME(kvl_cpu_mass)(void)
{
    static const kvl_cpu_mass_kernels kernels = {mass};
    return &kernels;
}
