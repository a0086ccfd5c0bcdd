/* host/session.c: the KV of one prompt. Pages below `n_shared_pages` came from the prefix tree and
 * are never written; all others are the session's own. */
#include "base/alloc.h"
#include "host/engine.h"
#include "host/load.h"

#include <string.h>

struct kvl_session {
    kvl_engine *engine;
    uint32_t *ids; /* [n_positions] */
    uint32_t n_ids;
    uint32_t *pages; /* [pages of n_positions] */
    uint32_t n_pages;
    kvl_forward_row *rows;    /* [n_positions], scratch */
    uint32_t *logit_rows;     /* [n_positions], scratch */
    uint32_t *slots;          /* [n_positions], scratch */
    uint32_t *positions;      /* [n_positions], scratch */
    float *scratch;           /* one layer's keys of n_positions tokens */
    kvl_loader_piece *pieces; /* of the loading that is under way, or NULL */
    uint32_t *load_positions; /* what they point to, with their slots */
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
    kvl_session_load_end(session, NULL);
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

/* The batch that computes n tokens; `path` must outlive it. */
static kvl_forward_batch batch_of(kvl_session *session, const uint32_t *positions, uint32_t n,
                                  kvl_attention_path *path)
{
    KVL_ASSERT(n > 0 && positions[n - 1] < session->n_ids);
    for (uint32_t i = 0; i < n; i++)
        session->rows[i] = (kvl_forward_row){session->ids[positions[i]], 0, positions[i]};
    *path = (kvl_attention_path){session->pages, positions[n - 1] + 1};
    return (kvl_forward_batch){.rows = session->rows, .n_rows = n, .paths = path, .n_paths = 1};
}

/* Layer l + 1 is looked at once layer l is done. */
static void pass_layer(kvl_session *session, uint32_t layer)
{
    kvl_engine *engine = session->engine;
    kvl_loader_passed(engine->loader, layer);
    if (layer + 1 < engine->shape->n_layers) kvl_loader_wait(engine->loader, layer + 1);
}

static bool pass_layer_of_session(void *context, uint32_t layer, uint32_t row_first,
                                  uint32_t n_rows)
{
    (void)row_first;
    (void)n_rows;
    pass_layer(context, layer);
    return false;
}

static void want_logits(kvl_session *session, kvl_forward_batch *batch, uint32_t n_logits,
                        float *logits)
{
    KVL_ASSERT(n_logits <= batch->n_rows);
    for (uint32_t i = 0; i < n_logits; i++) session->logit_rows[i] = batch->n_rows - n_logits + i;
    batch->logit_rows = session->logit_rows;
    batch->n_logit_rows = n_logits;
    batch->logits = logits;
}

kvl_status kvl_session_compute(kvl_session *session, const uint32_t *positions, uint32_t n,
                               uint32_t n_logits, float *logits, kvl_error *error)
{
    kvl_attention_path path;
    kvl_forward_batch batch = batch_of(session, positions, n, &path);
    want_logits(session, &batch, n_logits, logits);
    if (session->pieces != NULL) {
        kvl_loader_wait(session->engine->loader, 0);
        batch.after_layer = pass_layer_of_session;
        batch.context = session;
    }
    return kvl_forward_run(session->engine->forward, &batch, error);
}

kvl_status kvl_session_compute_range(kvl_session *session, uint32_t first, uint32_t past,
                                     uint32_t n_logits, float *logits, kvl_error *error)
{
    KVL_ASSERT(first < past && past <= session->n_ids);
    for (uint32_t p = first; p < past; p++) session->positions[p - first] = p;
    return kvl_session_compute(session, session->positions, past - first, n_logits, logits, error);
}

typedef struct watched {
    kvl_session *session;
    const kvl_session_walk *walk;
} watched;

static bool pass_layer_of_watched(void *context, uint32_t layer, uint32_t row_first,
                                  uint32_t n_rows)
{
    (void)n_rows;
    const watched *w = context;
    if (w->session->pieces != NULL) pass_layer(w->session, layer);
    if (row_first == 0 && layer + 1 < w->session->engine->shape->n_layers)
        w->walk->before(w->walk->context, layer + 1);
    return false;
}

static void tell_of_keys(void *context, uint32_t layer, uint32_t row_first, uint32_t n_rows)
{
    const watched *w = context;
    if (layer > 0) w->walk->after(w->walk->context, layer, row_first, n_rows);
}

kvl_status kvl_session_compute_watched(kvl_session *session, const uint32_t *positions, uint32_t n,
                                       uint32_t n_logits, float *logits,
                                       const kvl_session_walk *walk, kvl_error *error)
{
    watched w = {session, walk};
    kvl_attention_path path;
    kvl_forward_batch batch = batch_of(session, positions, n, &path);
    want_logits(session, &batch, n_logits, logits);
    if (session->pieces != NULL) kvl_loader_wait(session->engine->loader, 0);
    batch.after_layer = pass_layer_of_watched;
    batch.on_keys = tell_of_keys;
    batch.context = &w;
    return kvl_forward_run(session->engine->forward, &batch, error);
}

typedef struct mass_of_queries {
    kvl_session *session;
    const uint32_t *positions;
    uint32_t from;
    float *mass; /* [n_kv_heads][n_ids] */
} mass_of_queries;

static void add_mass(void *context, uint32_t layer, uint32_t row_first, uint32_t n_rows,
                     const float *queries)
{
    const mass_of_queries *sum = context;
    const kvl_engine *engine = sum->session->engine;
    uint32_t skipped = 0;
    while (skipped < n_rows && sum->positions[row_first + skipped] < sum->from) skipped++;
    if (skipped == n_rows) return;
    const size_t row = (size_t)engine->shape->n_heads * engine->shape->head_dim;
    const kvl_attend_mass_call call = {
        .pages = kvl_page_pool_pages(engine->pool),
        .layer = layer,
        .n_heads = engine->shape->n_heads,
        .n_rows = n_rows - skipped,
        .queries = queries + skipped * row,
        .positions = sum->positions + row_first + skipped,
        .page_ids = sum->session->pages,
        .n_keys = sum->session->n_ids,
    };
    engine->backend->ops->attend_mass(engine->backend, &call, sum->mass);
}

static bool pass_layer_of_mass(void *context, uint32_t layer, uint32_t row_first, uint32_t n_rows)
{
    (void)row_first;
    (void)n_rows;
    pass_layer(((const mass_of_queries *)context)->session, layer);
    return false;
}

kvl_status kvl_session_attention(kvl_session *session, const uint32_t *positions, uint32_t n,
                                 uint32_t from, float *mass, float *logits, kvl_error *error)
{
    const uint32_t n_heads = session->engine->shape->n_kv_heads;
    const uint32_t n_ids = session->n_ids;
    float *per_head = kvl_alloc_zero((size_t)n_heads * n_ids, sizeof *per_head);
    if (per_head == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the attention to %u keys", n_ids);
    mass_of_queries sum = {session, positions, from, per_head};
    kvl_attention_path path;
    kvl_forward_batch batch = batch_of(session, positions, n, &path);
    batch.on_queries = add_mass;
    batch.context = &sum;
    session->logit_rows[0] = n - 1;
    batch.logit_rows = session->logit_rows;
    batch.n_logit_rows = logits == NULL ? 0 : 1;
    batch.logits = logits;
    if (session->pieces != NULL) {
        kvl_loader_wait(session->engine->loader, 0);
        batch.after_layer = pass_layer_of_mass;
    }
    const kvl_status status = kvl_forward_run(session->engine->forward, &batch, error);
    for (uint32_t i = 0; i < n_ids; i++) {
        mass[i] = 0.0F;
        for (uint32_t h = 0; h < n_heads; h++) mass[i] += per_head[(size_t)h * n_ids + i];
    }
    kvl_free(per_head);
    return status;
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

static kvl_place_tokens_view scattered_view(kvl_session *session, const uint32_t *positions,
                                            uint32_t n)
{
    KVL_ASSERT(n <= session->n_ids);
    for (uint32_t i = 0; i < n; i++) session->slots[i] = kvl_session_slot(session, positions[i]);
    return (kvl_place_tokens_view){n, positions, session->slots};
}

void kvl_session_read_layer(kvl_session *session, uint32_t layer, const uint32_t *positions,
                            uint32_t n, float *keys, float *values)
{
    const kvl_place_tokens_view tokens = scattered_view(session, positions, n);
    const kvl_place_target target = target_of(session);
    const kvl_status status = kvl_extract_tokens(&target, layer, &tokens, keys, values, NULL);
    KVL_ASSERT(status == KVL_OK);
}

void kvl_session_write_layer(kvl_session *session, uint32_t layer, const uint32_t *positions,
                             uint32_t n, const float *keys, const float *values)
{
    const kvl_place_tokens_view tokens = scattered_view(session, positions, n);
    const kvl_place_target target = target_of(session);
    const kvl_status status =
        kvl_place_tokens(&target, layer, &tokens, keys, values, session->scratch, NULL);
    KVL_ASSERT(status == KVL_OK);
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

/* ---- loading ---- */

bool kvl_engine_loads(const kvl_engine *engine)
{
    return strcmp(engine->backend->ops->name, "cpu") == 0;
}

static kvl_status make_pieces(kvl_session *session, const kvl_session_load *loads, size_t n,
                              kvl_error *error)
{
    size_t n_tokens = 0;
    for (size_t i = 0; i < n; i++) n_tokens += loads[i].n;
    session->pieces = kvl_alloc_zero(n, sizeof *session->pieces);
    session->load_positions = kvl_alloc_zero(2 * n_tokens + 1, sizeof *session->load_positions);
    if (session->pieces == NULL || session->load_positions == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to load %zu segments", n);
    uint32_t *at = session->load_positions;
    for (size_t i = 0; i < n; i++) {
        const kvl_session_load *load = &loads[i];
        uint32_t *slots = at + load->n;
        for (uint32_t t = 0; t < load->n; t++) {
            at[t] = load->position_first + t;
            slots[t] = kvl_session_slot(session, at[t]);
        }
        session->pieces[i] = (kvl_loader_piece){
            load->container, load->token_first, {load->n, at, slots}, load->mean};
        at = slots + load->n;
    }
    return KVL_OK;
}

static void drop_pieces(kvl_session *session)
{
    kvl_free(session->pieces);
    kvl_free(session->load_positions);
    session->pieces = NULL;
    session->load_positions = NULL;
}

kvl_status kvl_session_load_begin(kvl_session *session, const kvl_session_load *loads, size_t n,
                                  kvl_error *error)
{
    kvl_engine *engine = session->engine;
    const kvl_place_target target = target_of(session);
    KVL_ASSERT(kvl_engine_loads(engine) && session->pieces == NULL && n > 0);
    if (engine->loader == NULL) KVL_TRY(kvl_loader_create(target.pages, &engine->loader, error));
    kvl_status status = make_pieces(session, loads, n, error);
    for (size_t i = 0; i < n && status == KVL_OK; i++) {
        const kvl_loader_piece *piece = &session->pieces[i];
        status =
            kvl_place_check(&target, piece->container, &piece->tokens, piece->token_first, error);
    }
    if (status != KVL_OK) {
        drop_pieces(session);
        return status;
    }
    const kvl_loader_job job = {target, session->pieces, n, engine->shape->n_layers};
    kvl_loader_begin(engine->loader, &job);
    return KVL_OK;
}

void kvl_session_load_end(kvl_session *session, kvl_load_times *times)
{
    if (session->pieces == NULL) return;
    kvl_loader_end(session->engine->loader, times);
    drop_pieces(session);
}

/* ---- deviation ---- */

/* What a comparison of KV before and after a pass needs. */
typedef struct deviating {
    kvl_session *session;
    kvl_deviation_check check;
    size_t width;          /* floats of a row's keys, and of its values */
    float *before, *after; /* [2][KVL_FORWARD_ROWS_MAX][width]: keys, then values */
} deviating;

static bool stop_at_check_layer(void *context, uint32_t layer, uint32_t row_first, uint32_t n_rows)
{
    const deviating *d = context;
    (void)row_first;
    (void)n_rows;
    return layer == d->check.layer;
}

static void read_check_layer(const deviating *d, const uint32_t *positions, uint32_t n, float *rows)
{
    kvl_session_read_layer(d->session, d->check.layer, positions, n, rows, rows + n * d->width);
}

/* One cut of the forward pass: a walk that stops ends all of its cuts. */
static kvl_status deviate(deviating *d, const uint32_t *positions, uint32_t n, float *deviation,
                          kvl_error *error)
{
    read_check_layer(d, positions, n, d->before);
    kvl_attention_path path;
    kvl_forward_batch batch = batch_of(d->session, positions, n, &path);
    batch.after_layer = stop_at_check_layer;
    batch.context = d;
    const kvl_status status = kvl_forward_run(d->session->engine->forward, &batch, error);
    if (status != KVL_ERR_CANCELLED && status != KVL_OK) return status;
    read_check_layer(d, positions, n, d->after);
    for (uint32_t i = 0; i < n; i++) {
        float sum = 0.0F;
        for (size_t half = d->check.values_only ? 1 : 0; half < 2; half++) {
            const size_t at = (half * n + i) * d->width;
            for (size_t k = 0; k < d->width; k++) {
                const float away = d->after[at + k] - d->before[at + k];
                sum += away * away;
            }
        }
        deviation[positions[i]] = sum;
    }
    return KVL_OK;
}

kvl_status kvl_session_deviation(kvl_session *session, const kvl_deviation_check *check,
                                 const uint32_t *positions, uint32_t n, float *deviation,
                                 kvl_error *error)
{
    const kvl_model_shape *shape = session->engine->shape;
    KVL_ASSERT(check->layer < shape->n_layers);
    memset(deviation, 0, session->n_ids * sizeof *deviation);
    /* Its own hook stops the walk: the layers that it looks at are loaded before. */
    if (session->pieces != NULL) kvl_loader_wait(session->engine->loader, check->layer);
    deviating d = {session, *check, (size_t)shape->n_kv_heads * shape->head_dim, NULL, NULL};
    const size_t n_floats = 2 * KVL_FORWARD_ROWS_MAX * d.width;
    d.before = kvl_alloc_zero(2 * n_floats, sizeof *d.before);
    if (d.before == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to compare %u tokens", n);
    d.after = d.before + n_floats;
    kvl_status status = KVL_OK;
    for (uint32_t first = 0; first < n && status == KVL_OK; first += KVL_FORWARD_ROWS_MAX) {
        const uint32_t left = n - first;
        status =
            deviate(&d, positions + first,
                    left < KVL_FORWARD_ROWS_MAX ? left : KVL_FORWARD_ROWS_MAX, deviation, error);
    }
    kvl_free(d.before);
    return status;
}
