/* cache/page_pool.c: one piece of device memory, a stack of free pages, a count for each page.
 * The page given back last is given out first: it is the likeliest to be in a cache still. */
#include "cache/page_pool.h"

#include "base/alloc.h"

/* One memory for everything keeps page addresses an affine function of layer and page. */
struct kvl_page_pool {
    kvl_backend *backend; /* borrowed */
    kvl_pages pages;
    uint32_t *references; /* [n_pages] */
    uint32_t *free_pages; /* [n_pages], the first n_free of them are free */
    uint32_t n_free;
};

static kvl_status check_shape(const kvl_pages *shape, kvl_error *error)
{
    if (shape->n_layers == 0 || shape->n_kv_heads == 0 || shape->n_pages == 0)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "a page pool of %u layers, %u KV heads and %u pages: each must be at least "
                        "1",
                        shape->n_layers, shape->n_kv_heads, shape->n_pages);
    /* A slot (page * KVL_PAGE_TOKENS + index) must fit 32 bits. */
    if (shape->n_pages > UINT32_MAX / KVL_PAGE_TOKENS)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "a page pool of %u pages: at most %u",
                        shape->n_pages, UINT32_MAX / KVL_PAGE_TOKENS);
    if (shape->head_dim == 0 || shape->head_dim % KVL_PAGE_TOKENS != 0 ||
        shape->head_dim > KVL_HEAD_DIM_MAX)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "head dimension %u: must be a multiple of %u, at most %u", shape->head_dim,
                        KVL_PAGE_TOKENS, KVL_HEAD_DIM_MAX);
    return KVL_OK;
}

static bool count_bytes(const kvl_pages *shape, size_t *n_bytes)
{
    size_t floats = 0;
    return kvl_size_mul(shape->n_kv_heads, 2 * sizeof(float) * kvl_pages_head_floats(shape),
                        &floats) &&
           kvl_size_mul(floats, shape->n_pages, &floats) &&
           kvl_size_mul(floats, shape->n_layers, n_bytes);
}

kvl_status kvl_page_pool_create(kvl_backend *backend, uint32_t n_layers, uint32_t n_kv_heads,
                                uint32_t head_dim, uint32_t n_pages, kvl_page_pool **pool,
                                kvl_error *error)
{
    *pool = NULL;
    const kvl_pages shape = {
        .n_layers = n_layers, .n_pages = n_pages, .n_kv_heads = n_kv_heads, .head_dim = head_dim};
    KVL_TRY(check_shape(&shape, error));
    size_t n_bytes = 0;
    if (!count_bytes(&shape, &n_bytes))
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "a page pool of %u pages does not fit an address space: ask for fewer",
                        n_pages);

    kvl_page_pool *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a page pool");
    made->backend = backend;
    made->pages = shape;
    made->references = kvl_alloc_zero(n_pages, sizeof *made->references);
    made->free_pages = kvl_alloc_zero(n_pages, sizeof *made->free_pages);
    if (made->references != NULL && made->free_pages != NULL)
        made->pages.memory = backend->ops->memory_create(backend, n_bytes);
    if (made->pages.memory == NULL) {
        kvl_page_pool_destroy(made);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY,
                        "%zu bytes of device memory for %u pages of KV could not be had: ask for "
                        "fewer pages",
                        n_bytes, n_pages);
    }
    /* Page 0 on top. */
    for (uint32_t i = 0; i < n_pages; i++) made->free_pages[i] = n_pages - 1 - i;
    made->n_free = n_pages;
    *pool = made;
    return KVL_OK;
}

void kvl_page_pool_destroy(kvl_page_pool *pool)
{
    if (pool == NULL) return;
    if (pool->pages.memory != NULL)
        pool->backend->ops->memory_destroy(pool->backend, pool->pages.memory);
    kvl_free(pool->references);
    kvl_free(pool->free_pages);
    kvl_free(pool);
}

const kvl_pages *kvl_page_pool_pages(const kvl_page_pool *pool)
{
    return &pool->pages;
}

uint32_t kvl_page_pool_n_free(const kvl_page_pool *pool)
{
    return pool->n_free;
}

kvl_status kvl_page_pool_acquire(kvl_page_pool *pool, uint32_t n, uint32_t *pages)
{
    if (n > pool->n_free) return KVL_ERR_BUSY;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t page = pool->free_pages[--pool->n_free];
        KVL_ASSERT(pool->references[page] == 0);
        pool->references[page] = 1;
        pages[i] = page;
    }
    return KVL_OK;
}

void kvl_page_pool_share(kvl_page_pool *pool, uint32_t n, const uint32_t *pages)
{
    for (uint32_t i = 0; i < n; i++) {
        KVL_ASSERT(pages[i] < pool->pages.n_pages);
        uint32_t *references = &pool->references[pages[i]];
        KVL_ASSERT(*references > 0 && *references < UINT32_MAX);
        ++*references;
    }
}

void kvl_page_pool_release(kvl_page_pool *pool, uint32_t n, const uint32_t *pages)
{
    /* Last page first, so that the first is on top and the next prompt gets them in this order. */
    for (uint32_t i = n; i-- > 0;) {
        KVL_ASSERT(pages[i] < pool->pages.n_pages);
        uint32_t *references = &pool->references[pages[i]];
        KVL_ASSERT(*references > 0);
        if (--*references == 0) pool->free_pages[pool->n_free++] = pages[i];
    }
}

uint32_t kvl_page_pool_references(const kvl_page_pool *pool, uint32_t page)
{
    KVL_ASSERT(page < pool->pages.n_pages);
    return pool->references[page];
}
