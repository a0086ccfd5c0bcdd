/* client/get.c: segments that are mapped, copied, or come in layer by layer. */
#include "client/state.h"

#include "base/alloc.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- a segment ---- */

/* Who reads a map must be sure that the file cannot be cut short under it, nor be written to. */
static kvloom_status map_file(int fd, size_t n_bytes, void **map, kvloom_error *error)
{
    struct stat about;
    const int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 ||
        (seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)) == 0 || fstat(fd, &about) != 0 ||
        (uint64_t)about.st_size < n_bytes || n_bytes == 0) {
        return client_fail(error, KVLOOM_ERR_DAMAGED,
                           "the sidecar's memory of %zu bytes is not sealed", n_bytes);
    }
    void *made = mmap(NULL, n_bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (made == MAP_FAILED) {
        return client_fail(error, KVLOOM_ERR_NO_MEMORY, "cannot map %zu bytes: %s", n_bytes,
                           strerror(errno));
    }
    *map = made;
    return KVLOOM_OK;
}

static void *copy_inside(const ProtobufCBinaryData *inside)
{
    void *copy = kvl_alloc_aligned(inside->len);
    if (copy != NULL) memcpy(copy, inside->data, inside->len);
    return copy;
}

static kvloom_status open_bytes(kvloom_segment *segment, const Kvloom__Local__V1__Got *got, int fd,
                                kvloom_error *error)
{
    kvl_error inner;
    const void *bytes = NULL;
    size_t n_bytes = 0;
    if (fd >= 0) {
        n_bytes = (size_t)got->n_bytes;
        const kvloom_status status = map_file(fd, n_bytes, &segment->map, error);
        if (status < 0) return status;
        segment->map_bytes = n_bytes;
        bytes = segment->map;
    } else {
        n_bytes = got->inside.len;
        segment->inside = n_bytes == 0 ? NULL : copy_inside(&got->inside);
        if (segment->inside == NULL) {
            return client_fail(error, n_bytes == 0 ? KVLOOM_ERR_DAMAGED : KVLOOM_ERR_NO_MEMORY,
                               "no memory for a segment of %zu bytes", n_bytes);
        }
        bytes = segment->inside;
    }
    if (kvl_container_borrow(bytes, n_bytes, NULL, NULL, &segment->container, &inner) < 0) {
        return client_fail_as(error, &inner);
    }
    return KVLOOM_OK;
}

/* An engine that puts one shape cannot use another one: better an error than a wrong answer. */
static kvloom_status check_shape(const kvloom_client *client, kvloom_segment *segment,
                                 const Kvloom__Local__V1__Got *got, kvloom_error *error)
{
    const kvl_container_info *info = kvl_container_info_of(segment->container);
    const kvloom_shape *wanted = &client->shape;
    segment->shape = (kvloom_shape){.dtype = (kvloom_dtype)info->dtype,
                                    .n_layers = info->n_layers,
                                    .n_kv_heads = info->n_kv_heads,
                                    .head_dim = info->head_dim,
                                    .rotated_halves = info->pairs};
    memcpy(segment->id.bytes, info->id.bytes, sizeof segment->id.bytes);
    if (memcmp(info->fingerprint.bytes, client->fingerprint.bytes, sizeof info->fingerprint) != 0) {
        return client_fail(error, KVLOOM_ERR_FOREIGN, "the segment is another model's");
    }
    if (got->id.len != sizeof info->id || memcmp(got->id.data, info->id.bytes, got->id.len) != 0) {
        return client_fail(error, KVLOOM_ERR_DAMAGED,
                           "the segment is not the one that was asked for");
    }
    const kvloom_shape *has = &segment->shape;
    if (wanted->n_layers == 0 || info->kind != KVL_CONTAINER_SEGMENT) return KVLOOM_OK;
    if (has->n_layers == wanted->n_layers && has->n_kv_heads == wanted->n_kv_heads &&
        has->head_dim == wanted->head_dim && has->dtype == wanted->dtype &&
        has->rotated_halves == wanted->rotated_halves) {
        return KVLOOM_OK;
    }
    return client_fail(
        error, KVLOOM_ERR_FOREIGN,
        "the segment has %u layers, %u heads of %u, dtype %d, halves %u; this client's "
        "engine has %u, %u of %u, %d, %u",
        has->n_layers, has->n_kv_heads, has->head_dim, (int)has->dtype, has->rotated_halves,
        wanted->n_layers, wanted->n_kv_heads, wanted->head_dim, (int)wanted->dtype,
        wanted->rotated_halves);
}

/* Ids are 256 bits of a keyed hash, so this never happens; but the tokens are here, and comparing
 * them costs nothing beside reading what they stand for. */
static kvloom_status check_tokens(const kvloom_segment *segment, const uint32_t *tokens,
                                  size_t n_tokens, kvloom_error *error)
{
    const kvl_container_info *info = kvl_container_info_of(segment->container);
    if (n_tokens == 0 || (info->n_tokens == n_tokens &&
                          memcmp(info->tokens, tokens, n_tokens * sizeof *tokens) == 0)) {
        return KVLOOM_OK;
    }
    return client_fail(error, KVLOOM_ERR_DAMAGED,
                       "the segment is of other tokens than were asked for");
}

kvloom_status client_segment_make(kvloom_client *client, const Kvloom__Local__V1__Got *got, int fd,
                                  const uint32_t *tokens, size_t n_tokens, kvloom_segment **out,
                                  kvloom_error *error)
{
    *out = NULL;
    kvloom_segment *segment = kvl_alloc_zero(1, sizeof *segment);
    kvloom_status status = KVLOOM_OK;
    if (segment == NULL) {
        status = client_fail(error, KVLOOM_ERR_NO_MEMORY, "no memory for a segment");
    } else {
        segment->lease = got->lease;
        segment->generation = client->shared->generation;
        segment->shared = client->shared;
        atomic_fetch_add(&client->shared->n_references, 1);
        segment->place = (kvloom_place)got->place;
        atomic_init(&segment->n_ready, got->n_ready);
        status = open_bytes(segment, got, fd, error);
        if (status == KVLOOM_OK) status = check_shape(client, segment, got, error);
        if (status == KVLOOM_OK) status = check_tokens(segment, tokens, n_tokens, error);
    }
    if (fd >= 0) (void)close(fd);
    if (status < 0) {
        kvloom_segment_release(segment);
        return status;
    }
    *out = segment;
    return KVLOOM_OK;
}

/* Sent without waiting; if the connection is another one by now, the lease is gone already. */
static void release_lease(const kvloom_segment *segment)
{
    shared_link *shared = segment->shared;
    request_message request = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__Release release = KVLOOM__LOCAL__V1__RELEASE__INIT;
    request.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_RELEASE;
    request.release = &release;
    release.lease = segment->lease;
    const size_t n_bytes = kvloom__local__v1__request__get_packed_size(&request);
    (void)pthread_mutex_lock(&shared->lock);
    if (shared->link.fd >= 0 && shared->generation == segment->generation) {
        kvl_local_chunk *chunk = kvl_local_chunk_create(n_bytes);
        if (chunk != NULL) {
            (void)kvloom__local__v1__request__pack(&request, kvl_local_chunk_bytes(chunk));
            kvl_ignore(kvl_local_link_send(&shared->link, chunk, -1));
        }
    }
    (void)pthread_mutex_unlock(&shared->lock);
}

void kvloom_segment_release(kvloom_segment *segment)
{
    if (segment == NULL) return;
    kvl_container_release(segment->container);
    if (segment->map != NULL) (void)munmap(segment->map, segment->map_bytes);
    kvl_free(segment->inside);
    if (segment->shared != NULL && segment->lease != 0) release_lease(segment);
    client_shared_release(segment->shared);
    kvl_free(segment);
}

/* ---- looking at it ---- */

const void *kvloom_segment_layer(const kvloom_segment *segment, uint32_t layer, size_t *n_bytes)
{
    size_t n = 0;
    if (n_bytes != NULL) *n_bytes = 0;
    if (layer >= atomic_load_explicit(&segment->n_ready, memory_order_acquire)) return NULL;
    const void *view = kvl_container_block_view(segment->container, layer, &n);
    if (n_bytes != NULL) *n_bytes = n;
    return view;
}

const kvloom_shape *kvloom_segment_shape(const kvloom_segment *segment)
{
    return &segment->shape;
}

const uint32_t *kvloom_segment_tokens(const kvloom_segment *segment, size_t *n_tokens)
{
    const kvl_container_info *info = kvl_container_info_of(segment->container);
    if (n_tokens != NULL) *n_tokens = info->n_tokens;
    return info->tokens;
}

const kvloom_digest *kvloom_segment_id(const kvloom_segment *segment)
{
    return &segment->id;
}

/* A sidecar's anchor begins with 32 bytes that name its slot, for the sidecar itself. */
const void *kvloom_segment_extra(const kvloom_segment *segment, size_t *n_bytes)
{
    const kvl_container_info *info = kvl_container_info_of(segment->container);
    const bool has_some =
        info->kind == KVL_CONTAINER_ANCHOR && info->n_extra_bytes > KVL_DIGEST_BYTES;
    if (n_bytes != NULL) *n_bytes = has_some ? info->n_extra_bytes - KVL_DIGEST_BYTES : 0;
    return has_some ? (const uint8_t *)info->extra + KVL_DIGEST_BYTES : NULL;
}

kvloom_place kvloom_segment_place(const kvloom_segment *segment)
{
    return segment->place;
}

const void *kvloom_segment_bytes(const kvloom_segment *segment, size_t *n_bytes)
{
    if (atomic_load(&segment->n_ready) < kvl_container_n_blocks(segment->container)) return NULL;
    return kvl_container_bytes(segment->container, n_bytes);
}

kvloom_status kvloom_segment_check(const kvloom_segment *segment, uint32_t layer,
                                   kvloom_error *error)
{
    kvl_error inner;
    if (layer >= atomic_load(&segment->n_ready)) {
        return client_fail(error, KVLOOM_ERR_OUT_OF_RANGE, "layer %u is not there", layer);
    }
    if (kvl_container_block_check(segment->container, layer, &inner) < 0) {
        return client_fail_as(error, &inner);
    }
    return KVLOOM_OK;
}

/* ---- getting ---- */

/* *fd: the file that the segment is mapped from, for who wants to read it otherwise; NULL:
 * closed. */
static kvloom_status get(kvloom_client *client, Kvloom__Local__V1__Key *key, uint32_t deadline_ms,
                         kvloom_segment **segment, int *fd, kvloom_error *error)
{
    request_message request = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__Get body = KVLOOM__LOCAL__V1__GET__INIT;
    request.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_GET;
    request.get = &body;
    body.key = key;
    body.deadline_ms = deadline_ms;
    reply_message *reply = NULL;
    int got_fd = -1;
    *segment = NULL;
    kvloom_status status = client_call(client, &request, -1, deadline_ms, &reply, &got_fd, error);
    if (status < 0) return status;
    if (reply->body_case != KVLOOM__LOCAL__V1__REPLY__BODY_GOT) {
        if (got_fd >= 0) (void)close(got_fd);
        status = client_fail(error, KVLOOM_ERR_MALFORMED, "the sidecar answered something else");
    } else {
        if (fd != NULL && got_fd >= 0) *fd = fcntl(got_fd, F_DUPFD_CLOEXEC, 0);
        status = client_segment_make(client, reply->got, got_fd,
                                     (const uint32_t *)(const void *)key->tokens.data,
                                     key->tokens.len / sizeof(uint32_t), segment, error);
    }
    client_reply_end(reply);
    return status;
}

kvloom_status kvloom_get(kvloom_client *client, const kvloom_key *key, uint32_t deadline_ms,
                         kvloom_segment **segment, kvloom_error *error)
{
    Kvloom__Local__V1__Key message;
    *segment = NULL;
    const kvloom_status status = client_key(key, &message, error);
    return status < 0 ? status : get(client, &message, deadline_ms, segment, NULL, error);
}

kvloom_status kvloom_get_id(kvloom_client *client, const kvloom_digest *id, uint32_t deadline_ms,
                            kvloom_segment **segment, kvloom_error *error)
{
    Kvloom__Local__V1__Key message;
    client_key_id(id, &message);
    return get(client, &message, deadline_ms, segment, NULL, error);
}

/* A run of bytes of a segment's file that is copied. */
typedef struct copy_part {
    int fd;
    size_t at, n_bytes;
    uint8_t *out;
    bool is_done;
} copy_part;

static bool read_part(const copy_part *part)
{
    size_t n_read = 0;
    while (n_read < part->n_bytes) {
        const ssize_t n =
            pread(part->fd, part->out + n_read, part->n_bytes - n_read, (off_t)(part->at + n_read));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        n_read += (size_t)n;
    }
    return true;
}

static void *read_part_in_thread(void *argument)
{
    copy_part *part = argument;
    part->is_done = read_part(part);
    return NULL;
}

/* Where pages are small, the system copies page by page, which one core does at a third of what
 * memory gives: 6 GB/s where memcpy ran at 20; two threads did 11.5. Below COPY_ALONE_BYTES_MAX a
 * thread costs more than it saves. */
static const size_t COPY_ALONE_BYTES_MAX = (size_t)4 << 20;

/* Elsewhere than this thread: the sidecar has just answered and often still has the other core; the
 * system would then put both halves on this one and leave them there while the copy lasts. */
static void place_elsewhere(pthread_attr_t *attributes)
{
    cpu_set_t allowed;
    const int here = sched_getcpu();
    if (here < 0 || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    CPU_CLR((size_t)here, &allowed);
    if (CPU_COUNT(&allowed) > 0)
        (void)pthread_attr_setaffinity_np(attributes, sizeof allowed, &allowed);
}

static bool read_shared(const copy_part *whole)
{
    if (whole->n_bytes <= COPY_ALONE_BYTES_MAX) return read_part(whole);
    copy_part halves[2] = {*whole, *whole};
    halves[0].n_bytes = whole->n_bytes / 2 / KVL_ALIGNMENT * KVL_ALIGNMENT;
    halves[1].at += halves[0].n_bytes;
    halves[1].out += halves[0].n_bytes;
    halves[1].n_bytes -= halves[0].n_bytes;
    /* A program's signals are for its own threads. */
    sigset_t all, before;
    pthread_t thread;
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return read_part(whole);
    place_elsewhere(&attributes);
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    const bool has_thread =
        pthread_create(&thread, &attributes, read_part_in_thread, &halves[1]) == 0;
    (void)pthread_attr_destroy(&attributes);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    const bool is_first_done = read_part(&halves[0]);
    if (!has_thread) return is_first_done && read_part(&halves[1]);
    (void)pthread_join(thread, NULL);
    return is_first_done && halves[1].is_done;
}

/* Reading the file copies without faulting in every page of the map, which costs as much as the
 * copy (1.2 ms for 16 MiB). */
static bool read_layer(const kvloom_segment *segment, int fd, const uint8_t *layer, size_t n_bytes,
                       uint8_t *out)
{
    if (fd < 0 || segment->map == NULL) {
        memcpy(out, layer, n_bytes);
        return true;
    }
    const copy_part whole = {.fd = fd,
                             .at = (size_t)(layer - (const uint8_t *)segment->map),
                             .n_bytes = n_bytes,
                             .out = out};
    return read_shared(&whole);
}

kvloom_status kvloom_get_into(kvloom_client *client, const kvloom_key *key, uint32_t deadline_ms,
                              void *buffer, size_t n_bytes, size_t *n_needed, kvloom_error *error)
{
    Kvloom__Local__V1__Key message;
    kvloom_segment *segment = NULL;
    int fd = -1;
    if (n_needed != NULL) *n_needed = 0;
    kvloom_status status = client_key(key, &message, error);
    if (status == KVLOOM_OK) status = get(client, &message, deadline_ms, &segment, &fd, error);
    if (status < 0) {
        if (fd >= 0) (void)close(fd);
        return status;
    }
    size_t n_layer = 0;
    (void)kvloom_segment_layer(segment, 0, &n_layer);
    const size_t needed = n_layer * segment->shape.n_layers;
    if (n_needed != NULL) *n_needed = needed;
    if (needed > n_bytes) {
        status = client_fail(error, KVLOOM_ERR_TOO_LARGE, "it has %zu bytes, there is room for %zu",
                             needed, n_bytes);
    }
    /* Layers mostly lie side by side: then all of them are read in one go. */
    const uint8_t *first = kvloom_segment_layer(segment, 0, NULL);
    const uint8_t *last = kvloom_segment_layer(segment, segment->shape.n_layers - 1, NULL);
    const bool in_one = last == first + (needed - n_layer);
    const uint32_t n_pieces = in_one ? 1 : segment->shape.n_layers;
    if (in_one) n_layer = needed;
    for (uint32_t l = 0; status == KVLOOM_OK && l < n_pieces; l++) {
        const uint8_t *layer = kvloom_segment_layer(segment, l, NULL);
        if (!read_layer(segment, fd, layer, n_layer, (uint8_t *)buffer + l * n_layer)) {
            status = client_fail(error, KVLOOM_ERR_IO, "cannot read the sidecar's memory: %s",
                                 strerror(errno));
        }
    }
    if (fd >= 0) (void)close(fd);
    kvloom_segment_release(segment);
    return status;
}

/* ---- transfers ---- */

kvloom_status kvloom_get_start(kvloom_client *client, const kvloom_key *key, uint32_t deadline_ms,
                               kvloom_transfer **out, kvloom_error *error)
{
    request_message request = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__Get body = KVLOOM__LOCAL__V1__GET__INIT;
    Kvloom__Local__V1__Key message;
    *out = NULL;
    kvloom_status status = client_key(key, &message, error);
    if (status < 0) return status;
    kvloom_transfer *transfer = kvl_alloc_zero(1, sizeof *transfer);
    uint32_t *tokens = transfer == NULL ? NULL : kvl_alloc(key->n_tokens * sizeof *tokens);
    if (tokens == NULL) {
        kvl_free(transfer);
        return client_fail(error, KVLOOM_ERR_NO_MEMORY, "no memory for a transfer");
    }
    memcpy(tokens, key->tokens, key->n_tokens * sizeof *tokens);
    transfer->tokens = tokens;
    transfer->n_tokens = key->n_tokens;
    request.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_GET;
    request.get = &body;
    body.key = &message;
    body.deadline_ms = deadline_ms;
    body.by_layer = 1;
    status = client_send(client, &request, -1, error);
    if (status < 0) {
        kvl_free(tokens);
        kvl_free(transfer);
        return status;
    }
    transfer->client = client;
    transfer->number = request.number;
    transfer->status = KVLOOM_IN_PROGRESS;
    transfer->next = client->transfers;
    client->transfers = transfer;
    *out = transfer;
    return KVLOOM_OK;
}

/* It gets no more replies. */
static void settle(kvloom_transfer *transfer)
{
    if (transfer->client == NULL) return;
    kvloom_transfer **link = &transfer->client->transfers;
    while (*link != NULL && *link != transfer) link = &(*link)->next;
    if (*link == transfer) *link = transfer->next;
    transfer->client = NULL;
}

void client_transfer_take(kvloom_client *client, kvloom_transfer *transfer,
                          const reply_message *reply, int fd)
{
    const bool is_got = reply->body_case == KVLOOM__LOCAL__V1__REPLY__BODY_GOT;
    kvloom_status status = reply->status;
    if (status < 0) {
        (void)client_fail(&transfer->error, status, "%s", reply->text);
    } else if (!is_got || reply->got->n_ready > KVL_CONTAINER_LAYERS_MAX) {
        status = client_fail(&transfer->error, KVLOOM_ERR_MALFORMED,
                             "the sidecar answered something else");
    } else if (transfer->segment == NULL) {
        const kvloom_status made =
            client_segment_make(client, reply->got, fd, transfer->tokens, transfer->n_tokens,
                                &transfer->segment, &transfer->error);
        fd = -1;
        if (made < 0) status = made;
    } else {
        atomic_store_explicit(&transfer->segment->n_ready, reply->got->n_ready,
                              memory_order_release);
    }
    if (fd >= 0) (void)close(fd);
    transfer->status = status;
    if (status != KVLOOM_IN_PROGRESS) settle(transfer);
}

void client_transfers_fail(kvloom_client *client, kvloom_status status, const char *text)
{
    while (client->transfers != NULL) {
        kvloom_transfer *transfer = client->transfers;
        transfer->status = client_fail(&transfer->error, status, "%s", text);
        settle(transfer);
    }
}

kvloom_status kvloom_transfer_status(const kvloom_transfer *transfer, uint32_t *n_layers_ready,
                                     kvloom_error *error)
{
    if (n_layers_ready != NULL) {
        *n_layers_ready = transfer->segment == NULL || transfer->status < 0
                              ? 0
                              : atomic_load(&transfer->segment->n_ready);
    }
    if (error != NULL && transfer->status < 0) *error = transfer->error;
    return transfer->status;
}

const kvloom_segment *kvloom_transfer_segment(const kvloom_transfer *transfer)
{
    return transfer->segment;
}

kvloom_segment *kvloom_transfer_take(kvloom_transfer *transfer)
{
    if (transfer->status != KVLOOM_OK) return NULL;
    kvloom_segment *segment = transfer->segment;
    transfer->segment = NULL;
    return segment;
}

/* What still comes for it finds nobody, and its lease is given back then. */
void kvloom_transfer_end(kvloom_transfer *transfer)
{
    if (transfer == NULL) return;
    settle(transfer);
    kvloom_segment_release(transfer->segment);
    kvl_free(transfer->tokens);
    kvl_free(transfer);
}
