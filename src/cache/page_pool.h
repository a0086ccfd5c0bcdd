/* cache/page_pool.h: a fixed number of pages of KV, counted references, no growth.
 * Threads  The engine thread only. */
#ifndef KVL_CACHE_PAGE_POOL_H
#define KVL_CACHE_PAGE_POOL_H

#include "compute/backend.h"

typedef struct kvl_page_pool kvl_page_pool;

/* Takes n_pages of device memory at once and touches it (first use of fresh memory is slow).
 * Owns     *pool: ended with kvl_page_pool_destroy, before the backend
 * Errors   KVL_ERR_OUT_OF_RANGE, KVL_ERR_NO_MEMORY (text: bytes needed) */
KVL_MUST_USE kvl_status kvl_page_pool_create(kvl_backend *backend, uint32_t n_layers,
                                             uint32_t n_kv_heads, uint32_t head_dim,
                                             uint32_t n_pages, kvl_page_pool **pool,
                                             kvl_error *error);
void kvl_page_pool_destroy(kvl_page_pool *pool);

const kvl_pages *kvl_page_pool_pages(const kvl_page_pool *pool);
uint32_t kvl_page_pool_n_free(const kvl_page_pool *pool);

/* Gives n pages, each with one reference, or none at all.
 * Errors   KVL_ERR_BUSY  fewer than n are free */
KVL_MUST_USE kvl_status kvl_page_pool_acquire(kvl_page_pool *pool, uint32_t n, uint32_t *pages);
/* One more reference to each of n pages that are in use. */
void kvl_page_pool_share(kvl_page_pool *pool, uint32_t n, const uint32_t *pages);
/* One reference less; a page without any is free again. */
void kvl_page_pool_release(kvl_page_pool *pool, uint32_t n, const uint32_t *pages);
uint32_t kvl_page_pool_references(const kvl_page_pool *pool, uint32_t page);

#endif /* KVL_CACHE_PAGE_POOL_H */
