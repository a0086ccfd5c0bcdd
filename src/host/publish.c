/* host/publish.c: what a host has computed becomes a segment or an anchor that others can have. */
#include "base/alloc.h"
#include "base/log.h"
#include "host/host_parts.h"
#include "segment/codec.h"

typedef struct encoding {
    kvl_container *container;
    const kv_buffer *buffer;
    size_t layer_floats;
} encoding;

static void encode_layer(void *context, size_t layer, size_t thread)
{
    (void)thread;
    const encoding *work = context;
    const kvl_container_info *info = kvl_container_info_of(work->container);
    size_t n_bytes = 0;
    void *block = kvl_container_block(work->container, (uint32_t)layer, &n_bytes);
    kvl_segment_encode_block(info->dtype, info->n_kv_heads, info->n_tokens, info->head_dim,
                             work->buffer->keys + layer * work->layer_floats,
                             work->buffer->values + layer * work->layer_floats, block);
}

/* Stores and announces. A full disk costs reuse later on, not the answer now: it is logged. */
static void keep(kvl_host *host, kvl_container *container)
{
    const kvl_container_info *info = kvl_container_info_of(container);
    kvl_error error;
    const kvl_status status = host->store->ops->put(host->store, container, &error);
    if (status != KVL_OK) {
        kvl_log(KVL_LOG_WARN, "store_put_failed", "status=%s text=\"%s\"", kvl_status_name(status),
                error.text);
        return;
    }
    kvl_exchange_announce(host->exchange, &info->id, info->kind);
    if (info->kind == KVL_CONTAINER_SEGMENT) host_remember_donor(host, container);
}

kvl_status host_encode(kvl_host *host, kvl_session *session, const host_publication *what,
                       kvl_container **container, kvl_error *error)
{
    *container = NULL;
    const uint32_t first = what->first;
    const uint32_t n = what->n;
    kvl_engine *engine = host->engine;
    const kvl_model_shape *shape = engine->shape;
    kvl_container_info info = {
        .kind = KVL_CONTAINER_SEGMENT,
        .fingerprint = host->fingerprint,
        .home = what->home,
        .home_is_canonical = what->is_canonical,
        .is_unhealed = what->is_unhealed,
        .dtype = host->segment_dtype,
        .n_layers = shape->n_layers,
        .n_kv_heads = shape->n_kv_heads,
        .head_dim = shape->head_dim,
        .n_tokens = n,
        .pairs = (uint32_t)shape->pairs,
        .tokens = kvl_session_tokens(session) + first,
        .extra = what->extra,
        .n_extra_bytes = what->n_extra_bytes,
    };
    info.id = kvl_segment_id(host->tenant_key, &host->fingerprint, &what->home, info.tokens, n);
    if (!kvl_segment_block_bytes(info.dtype, info.n_kv_heads, n, info.head_dim, &info.block_bytes))
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "a segment of %u tokens is too large", n);
    KVL_TRY(kv_buffer_reserve(&host->corrected, shape, n, error));
    kvl_session_extract(session, first, n, host->corrected.keys, host->corrected.values);
    KVL_TRY(kvl_container_create(&info, container, error));
    encoding work = {*container, &host->corrected, (size_t)n * shape->n_kv_heads * shape->head_dim};
    kvl_pool_run(engine->threads, encode_layer, &work, shape->n_layers);
    kvl_container_seal(*container);
    return KVL_OK;
}

kvl_status host_publish(kvl_host *host, kvl_session *session, const host_publication *what,
                        kvl_container **container, kvl_error *error)
{
    KVL_TRY(host_encode(host, session, what, container, error));
    keep(host, *container);
    return KVL_OK;
}

static kvl_status measure_slot(run *r, const run_part *part, kvl_error *error)
{
    kvl_host *host = r->host;
    const kvl_model_shape *shape = host->engine->shape;
    kv_buffer *base = &host->bases[part->slot];
    KVL_TRY(kv_buffer_load(base, host->engine, part->container, error));
    KVL_TRY(kv_buffer_reserve(&host->corrected, shape, part->n_tokens, error));
    kvl_session_extract(r->session, part->first, part->n_tokens, host->corrected.keys,
                        host->corrected.values);
    const kvl_kv_view base_view = kv_buffer_view(base, shape, part->n_tokens);
    const kvl_kv_view real_view = kv_buffer_view(&host->corrected, shape, part->n_tokens);
    const kvl_kv_view nothing = {shape->n_layers, 0,    shape->n_kv_heads,
                                 shape->head_dim, NULL, NULL};
    const kvl_anchor_slot slot = {r->template_id, part->slot};
    kvl_container *anchor = NULL;
    KVL_TRY(kvl_anchor_pool_measure(host->anchors, &slot, &host->fingerprint, &part->id, &base_view,
                                    &real_view, &nothing, &nothing, &anchor, error));
    keep(host, anchor);
    r->anchors[r->n_anchors++] = kvl_container_info_of(anchor)->id;
    kvl_container_release(anchor);
    return KVL_OK;
}

kvl_status run_measure_anchors(run *r, kvl_error *error)
{
    KVL_ASSERT(r->is_exact);
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const run_part *part = &r->parts[p];
        if (!part->is_slot || part->container == NULL || part->n_tokens == 0) continue;
        KVL_TRY(measure_slot(r, part, error));
    }
    return KVL_OK;
}
