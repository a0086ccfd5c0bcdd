/* compute/pages.h: how the keys and values of a page lie in memory.
 *
 * A page holds KVL_PAGE_TOKENS tokens of one layer, float32, keys rotated to their position:
 *   keys    [n_kv_heads][head_dim][KVL_PAGE_TOKENS]   dimension-major: the 16 tokens of a page fill
 *                                                     one vector register, so that scores need no
 *                                                     horizontal sums
 *   values  [n_kv_heads][KVL_PAGE_TOKENS][head_dim]
 * Pages of one layer are contiguous: [n_layers][n_pages][K|V][n_kv_heads][...]. */
#ifndef KVL_COMPUTE_PAGES_H
#define KVL_COMPUTE_PAGES_H

#include "base/status.h"

#define KVL_PAGE_TOKENS 16u
#define KVL_HEAD_DIM_MAX 256u

typedef struct kvl_pages {
    float *memory; /* aligned to KVL_ALIGNMENT; belongs to the page pool (or to the device) */
    uint32_t n_layers;
    uint32_t n_pages;
    uint32_t n_kv_heads;
    uint32_t head_dim; /* a multiple of 16 */
} kvl_pages;

/* Floats of keys, or of values, of one head in one page. */
static inline size_t kvl_pages_head_floats(const kvl_pages *pages)
{
    return (size_t)KVL_PAGE_TOKENS * pages->head_dim;
}

static inline size_t kvl_pages_page_floats(const kvl_pages *pages)
{
    return 2 * (size_t)pages->n_kv_heads * kvl_pages_head_floats(pages);
}

/* [head_dim][KVL_PAGE_TOKENS] */
static inline float *kvl_pages_keys(const kvl_pages *pages, uint32_t layer, uint32_t page,
                                    uint32_t head)
{
    const size_t at = (size_t)layer * pages->n_pages + page;
    return pages->memory + at * kvl_pages_page_floats(pages) + head * kvl_pages_head_floats(pages);
}

/* [KVL_PAGE_TOKENS][head_dim] */
static inline float *kvl_pages_values(const kvl_pages *pages, uint32_t layer, uint32_t page,
                                      uint32_t head)
{
    return kvl_pages_keys(pages, layer, page, pages->n_kv_heads + head);
}

#endif /* KVL_COMPUTE_PAGES_H */
