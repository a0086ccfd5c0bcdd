/* client/put.c: segments on their way to the sidecar, through a file in memory that both see.
 *
 * The file is kept from put to put, because touching fresh memory costs more than filling it. After
 * a put that nobody answered it is given up: the sidecar may still be reading it. */
#include "client/state.h"

#include "base/alloc.h"
#include "segment/codec.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

size_t kvloom_layer_bytes(const kvloom_shape *shape, size_t n_tokens)
{
    uint64_t n_bytes = 0;
    if (n_tokens == 0 || n_tokens > KVL_SEGMENT_TOKENS_MAX || shape->n_kv_heads == 0 ||
        shape->n_kv_heads > KVL_CONTAINER_HEADS_MAX || shape->head_dim == 0 ||
        shape->head_dim > KVL_CONTAINER_HEAD_DIM_MAX ||
        !kvl_segment_block_bytes((kvl_kv_dtype)shape->dtype, shape->n_kv_heads, (uint32_t)n_tokens,
                                 shape->head_dim, &n_bytes)) {
        return 0;
    }
    return (size_t)n_bytes;
}

static void drop_staging(kvloom_client *client)
{
    if (client->staging != NULL) (void)munmap(client->staging, client->staging_bytes);
    if (client->staging_fd >= 0) (void)close(client->staging_fd);
    client->staging = NULL;
    client->staging_fd = -1;
    client->staging_bytes = 0;
}

static kvloom_status make_staging(kvloom_client *client, size_t n_bytes, kvloom_error *error)
{
    if (n_bytes <= client->staging_bytes) return KVLOOM_OK;
    drop_staging(client);
    const int fd = memfd_create("kvloom-put", MFD_CLOEXEC);
    void *made = MAP_FAILED;
    if (fd >= 0 && ftruncate(fd, (off_t)n_bytes) == 0) {
        made = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    }
    if (made == MAP_FAILED) {
        const int reason = errno;
        if (fd >= 0) (void)close(fd);
        return client_fail(error, KVLOOM_ERR_NO_MEMORY, "no memory to put %zu bytes: %s", n_bytes,
                           strerror(reason));
    }
    kvl_advise_huge(made, n_bytes);
    client->staging = made;
    client->staging_fd = fd;
    client->staging_bytes = n_bytes;
    return KVLOOM_OK;
}

kvloom_status kvloom_put_begin(kvloom_client *client, const kvloom_key *key, kvloom_error *error)
{
    Kvloom__Local__V1__Key message;
    size_t n_bytes = 0;
    if (client->put_is_open) {
        return client_fail(error, KVLOOM_ERR_BUSY, "a put is open already: end or cancel it");
    }
    kvloom_status status = client_key(key, &message, error);
    if (status < 0) return status;
    const size_t n_layer = kvloom_layer_bytes(&client->shape, key->n_tokens);
    if (n_layer == 0 || client->shape.n_layers == 0 ||
        client->shape.n_layers > KVL_CONTAINER_LAYERS_MAX ||
        !kvl_size_mul(n_layer, client->shape.n_layers, &n_bytes) ||
        n_bytes > KVL_CONTAINER_BYTES_MAX) {
        return client_fail(
            error, KVLOOM_ERR_OUT_OF_RANGE,
            "%zu tokens in %u layers, %u heads of %u, dtype %d: outside limits, or the "
            "options of this client have no shape",
            key->n_tokens, client->shape.n_layers, client->shape.n_kv_heads, client->shape.head_dim,
            (int)client->shape.dtype);
    }
    status = make_staging(client, n_bytes, error);
    if (status < 0) return status;
    uint32_t *ids = kvl_alloc((key->n_tokens + key->n_home) * sizeof *ids);
    if (ids == NULL) return client_fail(error, KVLOOM_ERR_NO_MEMORY, "no memory for the tokens");
    memcpy(ids, key->tokens, key->n_tokens * sizeof *ids);
    if (key->n_home > 0) memcpy(ids + key->n_tokens, key->home, key->n_home * sizeof *ids);
    client->put_ids = ids;
    client->put_n_tokens = key->n_tokens;
    client->put_n_home = key->n_home;
    client->put_layer_bytes = n_layer;
    client->put_is_open = true;
    return KVLOOM_OK;
}

void *kvloom_put_layer(kvloom_client *client, uint32_t layer)
{
    if (!client->put_is_open || layer >= client->shape.n_layers) return NULL;
    return client->staging + (size_t)layer * client->put_layer_bytes;
}

void kvloom_put_cancel(kvloom_client *client)
{
    kvl_free(client->put_ids);
    client->put_ids = NULL;
    client->put_is_open = false;
}

static void fill_shape(const kvloom_client *client, Kvloom__Local__V1__Shape *shape)
{
    kvloom__local__v1__shape__init(shape);
    shape->dtype = (uint32_t)client->shape.dtype;
    shape->n_layers = client->shape.n_layers;
    shape->n_kv_heads = client->shape.n_kv_heads;
    shape->head_dim = client->shape.head_dim;
    shape->pairs = client->shape.rotated_halves;
}

static kvloom_status send_put(kvloom_client *client, unsigned flags, kvloom_error *error)
{
    request_message request = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__Put put = KVLOOM__LOCAL__V1__PUT__INIT;
    Kvloom__Local__V1__Key key;
    Kvloom__Local__V1__Shape shape;
    const kvloom_key named = {.tokens = client->put_ids,
                              .n_tokens = client->put_n_tokens,
                              .home = client->put_ids + client->put_n_tokens,
                              .n_home = client->put_n_home};
    kvloom_status status = client_key(&named, &key, error);
    if (status < 0) return status;
    request.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_PUT;
    request.put = &put;
    put.key = &key;
    put.shape = &shape;
    put.home_is_canonical = (flags & KVLOOM_CANONICAL_HOME) != 0;
    put.write_back = (flags & KVLOOM_WRITE_BACK) != 0;
    put.deadline_ms = KVLOOM_CALL_MS_MAX;
    fill_shape(client, &shape);
    reply_message *reply = NULL;
    status =
        client_call(client, &request, client->staging_fd, KVLOOM_CALL_MS_MAX, &reply, NULL, error);
    client_reply_end(reply);
    return status;
}

kvloom_status kvloom_put_end(kvloom_client *client, unsigned flags, kvloom_error *error)
{
    if (!client->put_is_open) {
        return client_fail(error, KVLOOM_ERR_INVALID, "no put is open: begin one");
    }
    const kvloom_status status = send_put(client, flags, error);
    kvloom_put_cancel(client);
    if (KVLOOM_IS_RETRY(status) && status != KVLOOM_ERR_BUSY) drop_staging(client);
    return status;
}

kvloom_status kvloom_put(kvloom_client *client, const kvloom_key *key, const void *const *layers,
                         unsigned flags, kvloom_error *error)
{
    const kvloom_status status = kvloom_put_begin(client, key, error);
    if (status < 0) return status;
    for (uint32_t l = 0; l < client->shape.n_layers; l++) {
        memcpy(kvloom_put_layer(client, l), layers[l], client->put_layer_bytes);
    }
    return kvloom_put_end(client, flags, error);
}

/* ---- anchors ---- */

static kvloom_status check_anchor(const kvloom_client *client, const kvloom_anchor_key *key,
                                  size_t n_layer_bytes, size_t *n_bytes, kvloom_error *error)
{
    if (client->put_is_open) {
        return client_fail(error, KVLOOM_ERR_BUSY, "a put is open already: end or cancel it");
    }
    if (n_layer_bytes > 0 && client->shape.n_layers > 0 &&
        kvl_size_mul(n_layer_bytes, client->shape.n_layers, n_bytes) &&
        *n_bytes <= KVL_CONTAINER_BYTES_MAX && key->template_name != NULL) {
        return KVLOOM_OK;
    }
    return client_fail(
        error, KVLOOM_ERR_OUT_OF_RANGE,
        "an anchor of %u layers of %zu bytes: outside limits, or the options of this "
        "client have no shape, or the key no template",
        client->shape.n_layers, n_layer_bytes);
}

kvloom_status kvloom_put_anchor(kvloom_client *client, const kvloom_anchor_key *key,
                                const void *const *layers, size_t n_layer_bytes, const void *extra,
                                size_t n_extra, unsigned flags, kvloom_digest *id,
                                kvloom_error *error)
{
    request_message request = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__Put put = KVLOOM__LOCAL__V1__PUT__INIT;
    Kvloom__Local__V1__Anchor anchor = KVLOOM__LOCAL__V1__ANCHOR__INIT;
    Kvloom__Local__V1__Key tokens;
    Kvloom__Local__V1__Shape shape;
    const kvloom_key named = {.tokens = key->tokens, .n_tokens = key->n_tokens};
    size_t n_bytes = 0;
    kvloom_status status = client_key(&named, &tokens, error);
    if (status == KVLOOM_OK) status = check_anchor(client, key, n_layer_bytes, &n_bytes, error);
    if (status == KVLOOM_OK) status = make_staging(client, n_bytes, error);
    if (status < 0) return status;
    for (uint32_t l = 0; l < client->shape.n_layers; l++)
        memcpy(client->staging + l * n_layer_bytes, layers[l], n_layer_bytes);
    fill_shape(client, &shape);
    request.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_PUT;
    request.put = &put;
    put.key = &tokens;
    put.shape = &shape;
    put.anchor = &anchor;
    put.write_back = (flags & KVLOOM_WRITE_BACK) != 0;
    put.deadline_ms = KVLOOM_CALL_MS_MAX;
    anchor.template_name.data = (uint8_t *)(uintptr_t)key->template_name; /* only read */
    anchor.template_name.len = strlen(key->template_name);
    anchor.slot = key->slot;
    anchor.block_bytes = n_layer_bytes;
    anchor.extra.data = (uint8_t *)(uintptr_t)extra;
    anchor.extra.len = extra == NULL ? 0 : n_extra;
    reply_message *reply = NULL;
    status =
        client_call(client, &request, client->staging_fd, KVLOOM_CALL_MS_MAX, &reply, NULL, error);
    if (status == KVLOOM_OK && id != NULL &&
        reply->body_case == KVLOOM__LOCAL__V1__REPLY__BODY_STORED &&
        reply->stored->id.len == sizeof id->bytes) {
        memcpy(id->bytes, reply->stored->id.data, sizeof id->bytes);
    }
    client_reply_end(reply);
    if (KVLOOM_IS_RETRY(status) && status != KVLOOM_ERR_BUSY) drop_staging(client);
    return status;
}
