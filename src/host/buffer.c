/* host/buffer.c: float rows of KV, kept between runs. */
#include "base/alloc.h"
#include "host/host_parts.h"
#include "segment/codec.h"

static size_t layer_floats(const kvl_model_shape *shape, uint32_t n_tokens)
{
    return (size_t)n_tokens * shape->n_kv_heads * shape->head_dim;
}

kvl_status kv_buffer_reserve(kv_buffer *buffer, const kvl_model_shape *shape, uint32_t n_tokens,
                             kvl_error *error)
{
    const size_t n_floats = layer_floats(shape, n_tokens) * shape->n_layers;
    if (n_floats <= buffer->n_floats) return KVL_OK;
    kv_buffer_deinit(buffer);
    buffer->keys = kvl_alloc_aligned(n_floats * sizeof(float));
    buffer->values = kvl_alloc_aligned(n_floats * sizeof(float));
    if (buffer->keys == NULL || buffer->values == NULL) {
        kv_buffer_deinit(buffer);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the KV of %u tokens", n_tokens);
    }
    buffer->n_floats = n_floats;
    return KVL_OK;
}

void kv_buffer_deinit(kv_buffer *buffer)
{
    kvl_free(buffer->keys);
    kvl_free(buffer->values);
    *buffer = (kv_buffer){0};
}

kvl_kv_view kv_buffer_view(const kv_buffer *buffer, const kvl_model_shape *shape, uint32_t n_tokens)
{
    return (kvl_kv_view){shape->n_layers, n_tokens,     shape->n_kv_heads,
                         shape->head_dim, buffer->keys, buffer->values};
}

typedef struct loading {
    kv_buffer *buffer;
    const kvl_container *container;
    size_t layer_floats;
} loading;

static void load_layer(void *context, size_t layer, size_t thread)
{
    (void)thread;
    const loading *work = context;
    const kvl_container_info *info = kvl_container_info_of(work->container);
    size_t n_bytes = 0;
    const void *block = kvl_container_block_view(work->container, (uint32_t)layer, &n_bytes);
    kvl_segment_decode_block(info->dtype, info->n_kv_heads, info->n_tokens, info->head_dim, block,
                             0, info->n_tokens, work->buffer->keys + layer * work->layer_floats,
                             work->buffer->values + layer * work->layer_floats);
}

kvl_status kv_buffer_load(kv_buffer *buffer, kvl_engine *engine, const kvl_container *container,
                          kvl_error *error)
{
    const kvl_container_info *info = kvl_container_info_of(container);
    KVL_TRY(kv_buffer_reserve(buffer, engine->shape, info->n_tokens, error));
    loading work = {buffer, container, layer_floats(engine->shape, info->n_tokens)};
    kvl_pool_run(engine->threads, load_layer, &work, info->n_layers);
    return KVL_OK;
}
