/* host/sequence.c: growing arrays of ids and pages, and the copy that comes before a write. */
#include "host/sequence.h"

#include "base/alloc.h"

#include <string.h>

static uint32_t pages_for(uint32_t n_tokens)
{
    return n_tokens / KVL_PAGE_TOKENS + (n_tokens % KVL_PAGE_TOKENS != 0);
}

static kvl_status grow(uint32_t **array, size_t *n_max, size_t n, kvl_error *error)
{
    if (n <= *n_max) return KVL_OK;
    const size_t wanted = n > 2 * *n_max ? n : 2 * *n_max;
    uint32_t *larger = kvl_realloc(*array, wanted * sizeof *larger);
    if (larger == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a sequence of %zu", wanted);
    *array = larger;
    *n_max = wanted;
    return KVL_OK;
}

kvl_status kvl_sequence_init(kvl_sequence *sequence, kvl_engine *engine, uint64_t salt,
                             const uint32_t *ids, uint32_t n_ids, kvl_error *error)
{
    KVL_ASSERT(n_ids > 0);
    *sequence = (kvl_sequence){.engine = engine, .salt = salt, .n_exact = UINT32_MAX};
    const kvl_status status = grow(&sequence->ids, &sequence->ids_max, n_ids, error);
    if (status != KVL_OK) return status;
    memcpy(sequence->ids, ids, n_ids * sizeof *ids);
    sequence->n_ids = n_ids;
    return KVL_OK;
}

kvl_status kvl_sequence_of_session(kvl_sequence *sequence, kvl_engine *engine, uint64_t salt,
                                   const kvl_session *session, uint32_t n_exact, kvl_error *error)
{
    const uint32_t n_ids = kvl_session_n_tokens(session);
    const uint32_t n_pages = pages_for(n_ids - 1);
    KVL_TRY(kvl_sequence_init(sequence, engine, salt, kvl_session_tokens(session), n_ids, error));
    const kvl_status status = grow(&sequence->pages, &sequence->pages_max, n_pages, error);
    if (status != KVL_OK) {
        kvl_sequence_deinit(sequence);
        return status;
    }
    for (uint32_t i = 0; i < n_pages; i++)
        sequence->pages[i] = kvl_session_slot(session, i * KVL_PAGE_TOKENS) / KVL_PAGE_TOKENS;
    if (n_pages > 0) kvl_page_pool_share(engine->pool, n_pages, sequence->pages);
    sequence->n_pages = n_pages;
    sequence->n_computed = n_ids - 1;
    sequence->n_exact = n_exact;
    return KVL_OK;
}

void kvl_sequence_deinit(kvl_sequence *sequence)
{
    if (sequence->n_pages > 0)
        kvl_page_pool_release(sequence->engine->pool, sequence->n_pages, sequence->pages);
    kvl_free(sequence->ids);
    kvl_free(sequence->pages);
    *sequence = (kvl_sequence){0};
}

kvl_status kvl_sequence_fork(const kvl_sequence *parent, uint32_t n_ids, kvl_sequence *child,
                             kvl_error *error)
{
    KVL_ASSERT(n_ids <= parent->n_ids);
    KVL_TRY(kvl_sequence_init(child, parent->engine, parent->salt, parent->ids, n_ids, error));
    const uint32_t n_computed = n_ids < parent->n_computed ? n_ids : parent->n_computed;
    const uint32_t n_pages = pages_for(n_computed);
    const kvl_status status = grow(&child->pages, &child->pages_max, n_pages, error);
    if (status != KVL_OK) {
        kvl_sequence_deinit(child);
        return status;
    }
    if (n_pages > 0) {
        memcpy(child->pages, parent->pages, n_pages * sizeof *child->pages);
        kvl_page_pool_share(parent->engine->pool, n_pages, child->pages);
    }
    child->n_pages = n_pages;
    child->n_computed = n_computed;
    child->n_exact = parent->n_exact;
    return KVL_OK;
}

kvl_status kvl_sequence_append(kvl_sequence *sequence, uint32_t id, kvl_error *error)
{
    KVL_TRY(grow(&sequence->ids, &sequence->ids_max, (size_t)sequence->n_ids + 1, error));
    sequence->ids[sequence->n_ids++] = id;
    return KVL_OK;
}

void kvl_sequence_forget(kvl_sequence *sequence, uint32_t n_computed)
{
    if (n_computed < sequence->n_computed) sequence->n_computed = n_computed;
    /* What was not exact is gone, and comes back computed. */
    if (sequence->n_computed <= sequence->n_exact) sequence->n_exact = UINT32_MAX;
    const uint32_t n_kept = pages_for(sequence->n_computed);
    if (n_kept >= sequence->n_pages) return;
    kvl_page_pool_release(sequence->engine->pool, sequence->n_pages - n_kept,
                          sequence->pages + n_kept);
    sequence->n_pages = n_kept;
}

void kvl_sequence_truncate(kvl_sequence *sequence, uint32_t n_ids)
{
    KVL_ASSERT(n_ids > 0 && n_ids <= sequence->n_ids);
    sequence->n_ids = n_ids;
    kvl_sequence_forget(sequence, n_ids);
}

uint32_t kvl_sequence_n_known(const kvl_sequence *sequence)
{
    return kvl_prefix_tree_peek(sequence->engine->tree, sequence->salt, sequence->ids,
                                sequence->n_ids - 1);
}

kvl_status kvl_sequence_adopt(kvl_sequence *sequence, kvl_error *error)
{
    const uint32_t n_wanted = (sequence->n_ids - 1) / KVL_PAGE_TOKENS;
    if (n_wanted * KVL_PAGE_TOKENS <= sequence->n_computed) return KVL_OK;
    KVL_TRY(
        grow(&sequence->pages, &sequence->pages_max, (size_t)n_wanted + sequence->n_pages, error));
    /* Behind its own pages: nothing changes unless the tree has more. */
    uint32_t *found = sequence->pages + sequence->n_pages;
    size_t n_found = 0;
    kvl_page_pool *pool = sequence->engine->pool;
    kvl_prefix_tree_acquire(sequence->engine->tree, sequence->salt, sequence->ids,
                            sequence->n_ids - 1, found, &n_found);
    if (n_found * KVL_PAGE_TOKENS <= sequence->n_computed) {
        kvl_page_pool_release(pool, (uint32_t)n_found, found);
        return KVL_OK;
    }
    /* Its pages hold nothing that the tree's do not hold too. */
    if (sequence->n_pages > 0) kvl_page_pool_release(pool, sequence->n_pages, sequence->pages);
    memmove(sequence->pages, found, n_found * sizeof *found);
    sequence->n_pages = (uint32_t)n_found;
    /* More of it than the sequence had: nothing of its own is left. */
    sequence->n_exact = UINT32_MAX;
    sequence->n_computed = (uint32_t)n_found * KVL_PAGE_TOKENS;
    return KVL_OK;
}

kvl_status kvl_sequence_keep(kvl_sequence *sequence, kvl_error *error)
{
    const uint32_t n_kept =
        sequence->n_computed < sequence->n_exact ? sequence->n_computed : sequence->n_exact;
    const kvl_status status = kvl_prefix_tree_insert(sequence->engine->tree, sequence->salt,
                                                     sequence->ids, n_kept, sequence->pages);
    if (status != KVL_OK) return KVL_FAIL(error, status, "no memory for the prefix tree");
    return KVL_OK;
}

/* The page of the next position, where it has been begun and somebody else holds it too. */
static bool must_copy(const kvl_sequence *sequence)
{
    const uint32_t page = sequence->n_computed / KVL_PAGE_TOKENS;
    return sequence->n_computed % KVL_PAGE_TOKENS != 0 &&
           kvl_page_pool_references(sequence->engine->pool, sequence->pages[page]) > 1;
}

uint32_t kvl_sequence_n_missing(const kvl_sequence *sequence, uint32_t past)
{
    if (past <= sequence->n_computed) return 0;
    const uint32_t n_wanted = pages_for(past);
    const uint32_t n_new = n_wanted > sequence->n_pages ? n_wanted - sequence->n_pages : 0;
    return n_new + (must_copy(sequence) ? 1 : 0);
}

/* Copies the first n_tokens tokens of a page, through the backend: pages are device memory. */
static kvl_status copy_page(kvl_engine *engine, uint32_t from, uint32_t to, uint32_t n_tokens,
                            kvl_error *error)
{
    const kvl_pages *pages = kvl_page_pool_pages(engine->pool);
    const size_t n_floats = (size_t)n_tokens * pages->n_kv_heads * pages->head_dim;
    float *rows = kvl_alloc_aligned(2 * n_floats * sizeof *rows);
    if (rows == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to copy a page");
    uint32_t from_slots[KVL_PAGE_TOKENS];
    uint32_t to_slots[KVL_PAGE_TOKENS];
    for (uint32_t i = 0; i < n_tokens; i++) {
        from_slots[i] = from * KVL_PAGE_TOKENS + i;
        to_slots[i] = to * KVL_PAGE_TOKENS + i;
    }
    kvl_backend *backend = engine->backend;
    for (uint32_t layer = 0; layer < pages->n_layers; layer++) {
        backend->ops->pages_read(backend, pages, layer, n_tokens, from_slots, rows,
                                 rows + n_floats);
        backend->ops->pages_write(backend, pages, layer, n_tokens, to_slots, rows, rows + n_floats);
    }
    backend->ops->synchronize(backend);
    kvl_free(rows);
    return KVL_OK;
}

kvl_status kvl_sequence_reserve(kvl_sequence *sequence, uint32_t past, kvl_error *error)
{
    KVL_ASSERT(past > sequence->n_computed && past <= sequence->n_ids);
    kvl_page_pool *pool = sequence->engine->pool;
    const uint32_t n_missing = kvl_sequence_n_missing(sequence, past);
    if (kvl_page_pool_n_free(pool) < n_missing)
        return KVL_FAIL(error, KVL_ERR_BUSY, "%u pages are needed, %u are free", n_missing,
                        kvl_page_pool_n_free(pool));
    KVL_TRY(
        grow(&sequence->pages, &sequence->pages_max, (size_t)sequence->n_pages + n_missing, error));
    if (must_copy(sequence)) {
        uint32_t *page = &sequence->pages[sequence->n_computed / KVL_PAGE_TOKENS];
        uint32_t copy = 0;
        KVL_TRY(kvl_page_pool_acquire(pool, 1, &copy));
        const kvl_status status =
            copy_page(sequence->engine, *page, copy, sequence->n_computed % KVL_PAGE_TOKENS, error);
        kvl_page_pool_release(pool, 1, status == KVL_OK ? page : &copy);
        if (status != KVL_OK) return status;
        *page = copy;
    }
    const uint32_t n_wanted = pages_for(past);
    if (n_wanted > sequence->n_pages) {
        KVL_TRY(kvl_page_pool_acquire(pool, n_wanted - sequence->n_pages,
                                      sequence->pages + sequence->n_pages));
        sequence->n_pages = n_wanted;
    }
    return KVL_OK;
}

void kvl_sequence_advance(kvl_sequence *sequence, uint32_t past)
{
    KVL_ASSERT(past >= sequence->n_computed && past <= sequence->n_ids);
    KVL_ASSERT(pages_for(past) <= sequence->n_pages);
    sequence->n_computed = past;
}

uint32_t kvl_sequence_n_common(const kvl_sequence *a, const kvl_sequence *b)
{
    if (a->salt != b->salt) return 0;
    const uint32_t n = a->n_ids < b->n_ids ? a->n_ids : b->n_ids;
    uint32_t i = 0;
    while (i < n && a->ids[i] == b->ids[i]) i++;
    return i;
}
