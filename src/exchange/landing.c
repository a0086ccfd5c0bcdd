/* exchange/landing.c: a small table under one lock. */
#include "exchange/landing.h"

void kvl_landings_init(kvl_landings *landings)
{
    (void)pthread_mutex_init(&landings->lock, NULL);
    landings->last_serial = 0;
    for (size_t i = 0; i < KVL_LANDINGS_MAX; i++)
        landings->landings[i] = (kvl_landing){.serial = 0};
}

/* With the lock held. */
static void end(kvl_landing *landing)
{
    kvl_container_release(landing->container);
    landing->container = NULL;
    landing->serial = 0;
}

void kvl_landings_deinit(kvl_landings *landings)
{
    for (size_t i = 0; i < KVL_LANDINGS_MAX; i++) {
        if (landings->landings[i].serial != 0) end(&landings->landings[i]);
    }
    (void)pthread_mutex_destroy(&landings->lock);
}

/* With the lock held. */
static kvl_landing *find(kvl_landings *landings, kvl_link link, uint64_t request)
{
    for (size_t i = 0; i < KVL_LANDINGS_MAX; i++) {
        kvl_landing *landing = &landings->landings[i];
        if (landing->serial != 0 && landing->link == link && landing->request == request)
            return landing;
    }
    return NULL;
}

void kvl_landings_begin(kvl_landings *landings, kvl_link link, uint64_t request,
                        kvl_container *container, uint32_t block)
{
    (void)pthread_mutex_lock(&landings->lock);
    KVL_ASSERT(find(landings, link, request) == NULL);
    for (size_t i = 0; i < KVL_LANDINGS_MAX; i++) {
        kvl_landing *landing = &landings->landings[i];
        if (landing->serial != 0) continue;
        kvl_container_share(container);
        *landing = (kvl_landing){.serial = ++landings->last_serial,
                                 .link = link,
                                 .request = request,
                                 .container = container,
                                 .block_min = block};
        break;
    }
    (void)pthread_mutex_unlock(&landings->lock);
}

bool kvl_landings_claim(kvl_landings *landings, kvl_link link, uint64_t request, uint32_t block)
{
    bool is_kept = true;
    (void)pthread_mutex_lock(&landings->lock);
    kvl_landing *landing = find(landings, link, request);
    if (landing != NULL && landing->has_begun && landing->block_first <= block) {
        end(landing);
        is_kept = false;
    } else if (landing != NULL && landing->block_min <= block) {
        landing->block_min = block + 1;
    }
    (void)pthread_mutex_unlock(&landings->lock);
    return is_kept;
}

void kvl_landings_end(kvl_landings *landings, kvl_link link, uint64_t request)
{
    (void)pthread_mutex_lock(&landings->lock);
    kvl_landing *landing = find(landings, link, request);
    if (landing != NULL) end(landing);
    (void)pthread_mutex_unlock(&landings->lock);
}

void kvl_landings_end_link(kvl_landings *landings, kvl_link link)
{
    (void)pthread_mutex_lock(&landings->lock);
    for (size_t i = 0; i < KVL_LANDINGS_MAX; i++) {
        kvl_landing *landing = &landings->landings[i];
        if (landing->serial != 0 && landing->link == link) end(landing);
    }
    (void)pthread_mutex_unlock(&landings->lock);
}

/* With the lock held: whether a piece is the one that the landing waits for. A block that the
 * landing may begin with is checked against the container like any other: nothing that a message
 * says is believed. */
static bool follows(kvl_landing *landing, const kvl_message *message, size_t n_bytes)
{
    const uint32_t block = message->block.block;
    if (block >= kvl_container_n_blocks(landing->container)) return false;
    const uint64_t total = kvl_container_info_of(landing->container)->block_bytes;
    if (message->block.total != total || message->block.offset > total ||
        n_bytes > total - message->block.offset || n_bytes == 0 ||
        !kvl_digest_equal(&message->block.id, &kvl_container_info_of(landing->container)->id)) {
        return false;
    }
    if (landing->has_begun)
        return block == landing->block && message->block.offset == landing->offset;
    if (message->block.offset != 0 || block < landing->block_min) return false;
    landing->has_begun = true;
    landing->block_first = landing->block = block;
    landing->offset = 0;
    return true;
}

bool kvl_landings_take(kvl_landings *landings, kvl_link link, const kvl_message *message,
                       size_t n_bytes, kvl_piece *piece)
{
    *piece = (kvl_piece){.serial = 0};
    if (message->kind != KVL_MESSAGE_BLOCK) return false;
    (void)pthread_mutex_lock(&landings->lock);
    kvl_landing *landing = find(landings, link, message->request);
    if (landing != NULL && follows(landing, message, n_bytes)) {
        size_t n_block_bytes = 0;
        uint8_t *block = kvl_container_block(landing->container, landing->block, &n_block_bytes);
        if (landing->offset == 0) kvl_checksummer_init(&landing->hash);
        kvl_container_share(landing->container);
        *piece = (kvl_piece){.serial = landing->serial,
                             .landing = landing,
                             .container = landing->container,
                             .bytes = block + landing->offset,
                             .ends_block = landing->offset + n_bytes == n_block_bytes};
    }
    (void)pthread_mutex_unlock(&landings->lock);
    return piece->serial != 0;
}

bool kvl_landings_enter(kvl_landings *landings, const kvl_piece *piece)
{
    (void)pthread_mutex_lock(&landings->lock);
    if (piece->landing->serial == piece->serial) return true;
    (void)pthread_mutex_unlock(&landings->lock);
    return false;
}

/* Hashed under the lock: a place that is given to another landing has its hash overwritten. */
void kvl_landings_leave(kvl_landings *landings, const kvl_piece *piece, const uint8_t *bytes,
                        size_t n_bytes)
{
    if (n_bytes > 0) kvl_checksummer_add(&piece->landing->hash, bytes, n_bytes);
    (void)pthread_mutex_unlock(&landings->lock);
}

bool kvl_landings_finish(kvl_landings *landings, kvl_piece *piece, size_t n_bytes)
{
    if (!kvl_landings_enter(landings, piece)) return false;
    kvl_landing *landing = piece->landing;
    landing->offset += n_bytes;
    if (piece->ends_block) {
        piece->checksum = kvl_checksummer_end(&landing->hash);
        landing->block++;
        landing->offset = 0;
    }
    (void)pthread_mutex_unlock(&landings->lock);
    return true;
}
