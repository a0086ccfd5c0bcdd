/* host/session.c: the KV of one prompt. Pages below `n_shared_pages` came from the prefix tree and
 * are never written; all others are the session's own. */
#include "base/alloc.h"
#include "host/engine.h"
#include "reuse/place.h"

#include <string.h>

struct kvl_session {
    kvl_engine *engine;
    uint32_t *ids; /* [n_positions] */
    uint32_t n_ids;
    uint32_t *pages; /* [pages of n_positions] */
    uint32_t n_pages;
    kvl_forward_row *rows; /* [n_positions], scratch */
    uint32_t *logit_rows;  /* [n_positions], scratch */
    uint32_t *slots;       /* [n_positions], scratch */
    uint32_t *positions;   /* [n_positions], scratch */
    float *scratch;        /* one layer's keys of n_positions tokens */
};

static uint32_t pages_for(uint32_t n_tokens)
{
    return (n_tokens + KVL_PAGE_TOKENS - 1) / KVL_PAGE_TOKENS;
}

kvl_status kvl_session_create(kvl_engine *engine, kvl_session **session, kvl_error *error)
{
    *session = NULL;
    const uint32_t n = engine->n_positions;
    kvl_session *made = kvl_alloc_zero(1, sizeof *made);
    if (made != NULL) {
        made->engine = engine;
        made->ids = kvl_alloc_zero(n, sizeof *made->ids);
        made->pages = kvl_alloc_zero(pages_for(n), sizeof *made->pages);
        made->rows = kvl_alloc_zero(n, sizeof *made->rows);
        made->logit_rows = kvl_alloc_zero(n, sizeof *made->logit_rows);
        made->slots = kvl_alloc_zero(n, sizeof *made->slots);
        made->positions = kvl_alloc_zero(n, sizeof *made->positions);
        made->scratch = kvl_alloc_aligned((size_t)n * engine->shape->n_kv_heads *
                                          engine->shape->head_dim * sizeof(float));
    }
    if (made == NULL || made->ids == NULL || made->pages == NULL || made->rows == NULL ||
        made->logit_rows == NULL || made->slots == NULL || made->positions == NULL ||
        made->scratch == NULL) {
        kvl_session_destroy(made);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a session of %u tokens", n);
    }
    *session = made;
    return KVL_OK;
}

void kvl_session_destroy(kvl_session *session)
{
    if (session == NULL) return;
    if (session->n_pages > 0)
        kvl_page_pool_release(session->engine->pool, session->n_pages, session->pages);
    kvl_free(session->ids);
    kvl_free(session->pages);
    kvl_free(session->rows);
    kvl_free(session->logit_rows);
    kvl_free(session->slots);
    kvl_free(session->positions);
    kvl_free(session->scratch);
    kvl_free(session);
}

/* Has pages for n_tokens; what only the prefix tree holds makes room. */
static kvl_status reserve(kvl_session *session, uint32_t n_tokens, kvl_error *error)
{
    kvl_engine *engine = session->engine;
    if (n_tokens > engine->n_positions)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "%u tokens do not fit the context of %u; shorten the prompt or the answer",
                        n_tokens, engine->n_positions);
    if (pages_for(n_tokens) <= session->n_pages) return KVL_OK;
    const uint32_t n_wanted = pages_for(n_tokens) - session->n_pages;
    if (kvl_page_pool_n_free(engine->pool) < n_wanted)
        (void)kvl_prefix_tree_evict(engine->tree, n_wanted);
    const kvl_status status =
        kvl_page_pool_acquire(engine->pool, n_wanted, session->pages + session->n_pages);
    if (status != KVL_OK)
        return KVL_FAIL(error, status, "%u pages are needed, %u are free; give the host more pages",
                        n_wanted, kvl_page_pool_n_free(engine->pool));
    session->n_pages += n_wanted;
    return KVL_OK;
}

kvl_status kvl_session_begin(kvl_session *session, const uint32_t *ids, uint32_t n_ids,
                             uint32_t n_more, bool use_tree, uint64_t salt, uint32_t *n_shared,
                             kvl_error *error)
{
    KVL_ASSERT(session->n_ids == 0 && session->n_pages == 0 && n_ids > 0);
    *n_shared = 0;
    if (n_ids > session->engine->n_positions || n_more > session->engine->n_positions - n_ids)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "a prompt of %u tokens and an answer of %u do not fit the context of %u",
                        n_ids, n_more, session->engine->n_positions);
    memcpy(session->ids, ids, n_ids * sizeof *ids);
    session->n_ids = n_ids;
    size_t n_found = 0;
    /* The last token is always computed: its logits are what comes next. */
    if (use_tree)
        kvl_prefix_tree_acquire(session->engine->tree, salt, ids, n_ids - 1, session->pages,
                                &n_found);
    session->n_pages = (uint32_t)n_found;
    *n_shared = session->n_pages * KVL_PAGE_TOKENS;
    return reserve(session, n_ids + n_more, error);
}

kvl_status kvl_session_append(kvl_session *session, const uint32_t *ids, uint32_t n,
                              kvl_error *error)
{
    if (n > session->engine->n_positions - session->n_ids)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "%u tokens more than %u do not fit the context "
                        "of %u",
                        n, session->n_ids, session->engine->n_positions);
    KVL_TRY(reserve(session, session->n_ids + n, error));
    memcpy(session->ids + session->n_ids, ids, n * sizeof *ids);
    session->n_ids += n;
    return KVL_OK;
}

void kvl_session_truncate(kvl_session *session, uint32_t n_tokens)
{
    KVL_ASSERT(n_tokens <= session->n_ids);
    session->n_ids = n_tokens;
}

kvl_status kvl_session_compute(kvl_session *session, const uint32_t *positions, uint32_t n,
                               uint32_t n_logits, float *logits, kvl_error *error)
{
    KVL_ASSERT(n > 0 && n_logits <= n && positions[n - 1] < session->n_ids);
    for (uint32_t i = 0; i < n; i++)
        session->rows[i] = (kvl_forward_row){session->ids[positions[i]], 0, positions[i]};
    for (uint32_t i = 0; i < n_logits; i++) session->logit_rows[i] = n - n_logits + i;
    const kvl_attention_path path = {session->pages, positions[n - 1] + 1};
    const kvl_forward_batch batch = {
        .rows = session->rows,
        .n_rows = n,
        .paths = &path,
        .n_paths = 1,
        .logit_rows = session->logit_rows,
        .n_logit_rows = n_logits,
        .logits = logits,
    };
    return kvl_forward_run(session->engine->forward, &batch, error);
}

kvl_status kvl_session_compute_range(kvl_session *session, uint32_t first, uint32_t past,
                                     uint32_t n_logits, float *logits, kvl_error *error)
{
    KVL_ASSERT(first < past && past <= session->n_ids);
    for (uint32_t p = first; p < past; p++) session->positions[p - first] = p;
    return kvl_session_compute(session, session->positions, past - first, n_logits, logits, error);
}

uint32_t kvl_session_n_tokens(const kvl_session *session)
{
    return session->n_ids;
}

const uint32_t *kvl_session_tokens(const kvl_session *session)
{
    return session->ids;
}

uint32_t kvl_session_slot(const kvl_session *session, uint32_t position)
{
    KVL_ASSERT(position < session->n_ids);
    return session->pages[position / KVL_PAGE_TOKENS] * KVL_PAGE_TOKENS +
           position % KVL_PAGE_TOKENS;
}

kvl_status kvl_session_keep_prefix(kvl_session *session, uint64_t salt, uint32_t n_tokens,
                                   kvl_error *error)
{
    KVL_ASSERT(n_tokens <= session->n_ids);
    const kvl_status status =
        kvl_prefix_tree_insert(session->engine->tree, salt, session->ids, n_tokens, session->pages);
    if (status != KVL_OK) return KVL_FAIL(error, status, "no memory for the prefix tree");
    return KVL_OK;
}

static kvl_place_tokens_view tokens_view(kvl_session *session, uint32_t first, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        session->positions[i] = first + i;
        session->slots[i] = kvl_session_slot(session, first + i);
    }
    return (kvl_place_tokens_view){n, session->positions, session->slots};
}

static kvl_place_target target_of(const kvl_session *session)
{
    const kvl_engine *engine = session->engine;
    return (kvl_place_target){engine->backend, kvl_page_pool_pages(engine->pool),
                              kvl_forward_rotation(engine->forward)};
}

void kvl_session_extract(kvl_session *session, uint32_t first, uint32_t n, float *keys,
                         float *values)
{
    const kvl_model_shape *shape = session->engine->shape;
    const size_t layer_floats = (size_t)n * shape->n_kv_heads * shape->head_dim;
    const kvl_place_tokens_view tokens = tokens_view(session, first, n);
    const kvl_place_target target = target_of(session);
    for (uint32_t l = 0; l < shape->n_layers; l++) {
        /* Positions and slots are the session's own, so nothing can be out of range. */
        const kvl_status status = kvl_extract_tokens(&target, l, &tokens, keys + l * layer_floats,
                                                     values + l * layer_floats, NULL);
        KVL_ASSERT(status == KVL_OK);
    }
}

void kvl_session_place(kvl_session *session, const kvl_placement *placement)
{
    const kvl_kv_view *kv = placement->kv;
    const size_t token_floats = (size_t)kv->n_kv_heads * kv->head_dim;
    KVL_ASSERT(placement->n <= kv->n_tokens - placement->token_first);
    const kvl_place_tokens_view tokens =
        tokens_view(session, placement->position_first, placement->n);
    const kvl_place_target target = target_of(session);
    for (uint32_t l = 0; l < kv->n_layers; l++) {
        const size_t at = ((size_t)l * kv->n_tokens + placement->token_first) * token_floats;
        const kvl_status status = kvl_place_tokens(&target, l, &tokens, kv->keys + at,
                                                   kv->values + at, session->scratch, NULL);
        KVL_ASSERT(status == KVL_OK);
    }
}
