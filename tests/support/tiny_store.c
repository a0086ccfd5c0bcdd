/* tiny_store.c: a tier in an array. */
#include "tiny_store.h"

#include <string.h>

static kvl_container *tiny_find(tiny_store *store, const kvl_digest *id)
{
    for (size_t i = 0; i < store->n_containers; i++) {
        if (memcmp(&kvl_container_info_of(store->containers[i])->id, id, sizeof *id) == 0) {
            return store->containers[i];
        }
    }
    return NULL;
}

static kvl_status tiny_put(kvl_tier *tier, kvl_container *container, kvl_error *error)
{
    tiny_store *store = (tiny_store *)tier;
    if (store->n_containers == TINY_STORE_CONTAINERS_MAX) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the tiny store is full");
    }
    (void)pthread_mutex_lock(&store->lock);
    if (tiny_find(store, &kvl_container_info_of(container)->id) == NULL) {
        kvl_container_share(container);
        store->containers[store->n_containers++] = container;
    }
    (void)pthread_mutex_unlock(&store->lock);
    return KVL_OK;
}

static kvl_status tiny_get(kvl_tier *tier, const kvl_digest *id, bool check_blocks,
                           kvl_container **container, kvl_error *error)
{
    (void)check_blocks;
    tiny_store *store = (tiny_store *)tier;
    (void)pthread_mutex_lock(&store->lock);
    *container = tiny_find(store, id);
    if (*container != NULL) kvl_container_share(*container);
    (void)pthread_mutex_unlock(&store->lock);
    if (*container == NULL) return KVL_FAIL(error, KVL_ERR_NOT_FOUND, "not in the tiny store");
    return KVL_OK;
}

static bool tiny_has(kvl_tier *tier, const kvl_digest *id)
{
    tiny_store *store = (tiny_store *)tier;
    (void)pthread_mutex_lock(&store->lock);
    const bool has = tiny_find(store, id) != NULL;
    (void)pthread_mutex_unlock(&store->lock);
    return has;
}

static kvl_status tiny_remove(kvl_tier *tier, const kvl_digest *id, kvl_error *error)
{
    tiny_store *store = (tiny_store *)tier;
    (void)pthread_mutex_lock(&store->lock);
    kvl_container *container = tiny_find(store, id);
    for (size_t i = 0; container != NULL && i < store->n_containers; i++) {
        if (store->containers[i] != container) continue;
        store->containers[i] = store->containers[--store->n_containers];
        break;
    }
    (void)pthread_mutex_unlock(&store->lock);
    if (container == NULL) return KVL_FAIL(error, KVL_ERR_NOT_FOUND, "not in the tiny store");
    kvl_container_release(container);
    return KVL_OK;
}

static void tiny_list(kvl_tier *tier,
                      bool (*visit)(void *context, const kvl_digest *id, kvl_container_kind kind,
                                    uint64_t n_bytes),
                      void *context)
{
    tiny_store *store = (tiny_store *)tier;
    (void)pthread_mutex_lock(&store->lock);
    for (size_t i = 0; i < store->n_containers; i++) {
        const kvl_container_info *info = kvl_container_info_of(store->containers[i]);
        if (!visit(context, &info->id, info->kind, info->block_bytes)) break;
    }
    (void)pthread_mutex_unlock(&store->lock);
}

static void tiny_stats(kvl_tier *tier, kvl_tier_stats *stats)
{
    memset(stats, 0, sizeof *stats);
    stats->n_containers = ((tiny_store *)tier)->n_containers;
}

void tiny_store_init(tiny_store *store)
{
    static const kvl_tier_ops ops = {.name = "tiny",
                                     .put = tiny_put,
                                     .get = tiny_get,
                                     .has = tiny_has,
                                     .remove = tiny_remove,
                                     .list = tiny_list,
                                     .stats = tiny_stats};
    memset(store, 0, sizeof *store);
    store->tier.ops = &ops;
    (void)pthread_mutex_init(&store->lock, NULL);
}

void tiny_store_deinit(tiny_store *store)
{
    for (size_t i = 0; i < store->n_containers; i++) kvl_container_release(store->containers[i]);
    store->n_containers = 0;
    (void)pthread_mutex_destroy(&store->lock);
}

kvl_digest tiny_id(uint64_t number)
{
    kvl_digester digester;
    kvl_digester_init(&digester, "tiny", 4);
    kvl_digester_add_u64(&digester, number);
    return kvl_digester_end(&digester);
}

/* The bytes of a block, eight at a time; the rest of a block stays zero. */
static uint64_t tiny_word(uint64_t number, uint64_t variant, uint64_t block, uint64_t index)
{
    return (number * 1000003 + variant * 7919 + block * 104729 + index + 1) *
           UINT64_C(0x9e3779b97f4a7c15);
}

kvl_container *tiny_container(uint64_t number, uint64_t variant, const tiny_shape *shape)
{
    const uint8_t extra[2] = {(uint8_t)shape->group, (uint8_t)number};
    const kvl_container_info info = {.kind = KVL_CONTAINER_ANCHOR,
                                     .id = tiny_id(number),
                                     .fingerprint = shape->fingerprint,
                                     .dtype = KVL_KV_F32,
                                     .n_layers = shape->n_blocks,
                                     .n_kv_heads = 1,
                                     .head_dim = 2,
                                     .pairs = 1,
                                     .block_bytes = shape->block_bytes,
                                     .extra = extra,
                                     .n_extra_bytes = sizeof extra};
    kvl_container *container = NULL;
    kvl_error error;
    const kvl_status status = kvl_container_create(&info, &container, &error);
    if (status == KVL_ERR_NO_MEMORY) return NULL;
    KVL_ASSERT(status == KVL_OK);
    for (uint32_t block = 0; block < shape->n_blocks; block++) {
        size_t n_bytes = 0;
        uint8_t *bytes = kvl_container_block(container, block, &n_bytes);
        for (uint64_t i = 0; i < n_bytes / 8; i++) {
            const uint64_t word = tiny_word(number, variant, block, i);
            memcpy(bytes + 8 * i, &word, sizeof word);
        }
    }
    kvl_container_seal(container);
    return container;
}

bool tiny_container_is(const kvl_container *container, uint64_t number, uint64_t variant)
{
    const kvl_digest id = tiny_id(number);
    if (!kvl_digest_equal(&id, &kvl_container_info_of(container)->id)) return false;
    for (uint32_t block = 0; block < kvl_container_n_blocks(container); block++) {
        size_t n_bytes = 0;
        const uint8_t *bytes = kvl_container_block_view(container, block, &n_bytes);
        for (uint64_t i = 0; i < n_bytes / 8; i++) {
            const uint64_t word = tiny_word(number, variant, block, i);
            if (memcmp(bytes + 8 * i, &word, sizeof word) != 0) return false;
        }
    }
    return true;
}

bool tiny_store_add(tiny_store *store, uint64_t number, uint64_t variant, const tiny_shape *shape)
{
    kvl_container *container = tiny_container(number, variant, shape);
    if (container == NULL) return false;
    const kvl_status status = tiny_put(&store->tier, container, NULL);
    kvl_container_release(container);
    return status == KVL_OK;
}
