/* sidecar/request.c: what clients ask. Nothing in a request is believed: sizes are compared with
 * their limits, ids of what is put are computed here, and a key leads nowhere but to its
 * tenant's store. */
#include "sidecar/state.h"

#include "base/alloc.h"
#include "base/log.h"
#include "segment/codec.h"

#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

typedef Kvloom__Local__V1__Request request;
typedef Kvloom__Local__V1__Key key_message;

/* Memory for one message: what it says may take a multiple of its bytes, but not any. */
typedef struct unpacking {
    size_t n_bytes_left;
} unpacking;

static void *unpack_alloc(void *context, size_t size)
{
    unpacking *u = context;
    if (size > u->n_bytes_left) return NULL;
    u->n_bytes_left -= size;
    return kvl_alloc(size);
}

static void unpack_free(void *context, void *memory)
{
    (void)context;
    kvl_free(memory);
}

static void refuse(kvl_sidecar *s, client *c, uint64_t number, const kvl_error *error)
{
    c->tenant->refused++;
    sidecar_send_status(s, c, number, error->status, "%s", error->text);
}

/* ---- keys ---- */

static kvl_status check_tokens(const char *what, const ProtobufCBinaryData *tokens, size_t least,
                               kvl_error *error)
{
    const size_t n = tokens->len / sizeof(uint32_t);
    if (tokens->len % sizeof(uint32_t) == 0 && n >= least && n <= KVL_SEGMENT_TOKENS_MAX) {
        return KVL_OK;
    }
    return KVL_FAIL(error, KVL_ERR_INVALID, "%s: %zu bytes, must be 4 for each of %zu .. %u ids",
                    what, tokens->len, least, KVL_SEGMENT_TOKENS_MAX);
}

static kvl_digest home_of(const kvl_sidecar *s, const client *c, const key_message *key)
{
    const kvl_digest nothing = {{0}};
    if (key->home.len == 0) return nothing;
    return kvl_segment_id(c->key, &s->fingerprint, &nothing, (const uint32_t *)key->home.data,
                          key->home.len / sizeof(uint32_t));
}

static kvl_status id_of(const kvl_sidecar *s, const client *c, const key_message *key,
                        kvl_digest *id, kvl_error *error)
{
    if (key == NULL) return KVL_FAIL(error, KVL_ERR_INVALID, "a request without a key");
    if (key->id.len != 0) {
        if (key->id.len != KVL_DIGEST_BYTES || key->tokens.len != 0 || key->home.len != 0) {
            return KVL_FAIL(error, KVL_ERR_INVALID,
                            "a key is tokens and home, or an id of %u bytes alone",
                            KVL_DIGEST_BYTES);
        }
        memcpy(id->bytes, key->id.data, KVL_DIGEST_BYTES);
        return KVL_OK;
    }
    KVL_TRY(check_tokens("tokens", &key->tokens, 1, error));
    KVL_TRY(check_tokens("home", &key->home, 0, error));
    const kvl_digest home = home_of(s, c, key);
    *id = kvl_segment_id(c->key, &s->fingerprint, &home, (const uint32_t *)key->tokens.data,
                         key->tokens.len / sizeof(uint32_t));
    return KVL_OK;
}

/* ---- hello ---- */

static kvl_status check_hello(const kvl_sidecar *s, const Kvloom__Local__V1__Hello *hello,
                              kvl_error *error)
{
    if (hello->magic != KVL_LOCAL_MAGIC) {
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED, "this is the socket of a KVLoom sidecar");
    }
    if (hello->version_min > KVL_LOCAL_VERSION_MAX || hello->version_max < KVL_LOCAL_VERSION_MIN ||
        hello->version_min == 0) {
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                        "the client speaks versions %u .. %u of the local protocol, this sidecar "
                        "(" KVL_VERSION ") %u .. %u: update the older one",
                        hello->version_min, hello->version_max, KVL_LOCAL_VERSION_MIN,
                        KVL_LOCAL_VERSION_MAX);
    }
    if (hello->fingerprint.len != KVL_DIGEST_BYTES) {
        return KVL_FAIL(error, KVL_ERR_INVALID, "fingerprint: %zu bytes, must be %u",
                        hello->fingerprint.len, KVL_DIGEST_BYTES);
    }
    kvl_digest theirs;
    memcpy(theirs.bytes, hello->fingerprint.data, sizeof theirs.bytes);
    if (!kvl_digest_equal(&theirs, &s->fingerprint)) {
        char a[KVL_DIGEST_TEXT_BYTES], b[KVL_DIGEST_TEXT_BYTES];
        return KVL_FAIL(error, KVL_ERR_FOREIGN, "the client runs model %s, this sidecar keeps %s",
                        kvl_digest_to_text(&theirs, a), kvl_digest_to_text(&s->fingerprint, b));
    }
    if (strlen(hello->name) > SIDECAR_NAME_BYTES_MAX) {
        return KVL_FAIL(error, KVL_ERR_INVALID, "name: %zu bytes, must be at most %u",
                        strlen(hello->name), SIDECAR_NAME_BYTES_MAX);
    }
    if (!kvl_salt_is_valid(hello->salt.data, hello->salt.len)) {
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "salt: must be UTF-8 of at most %u bytes without @ / \\ and control "
                        "characters",
                        KVL_LOCAL_SALT_BYTES_MAX);
    }
    return KVL_OK;
}

/* Another salt is another key, and so another set of ids: narrower than the tenant, never wider. */
static void narrow_key(client *c, const ProtobufCBinaryData *salt)
{
    static const char DOMAIN_NAME[] = "kvloom.salt.1";
    memcpy(c->key, c->tenant->key, sizeof c->key);
    if (salt->len == 0) return;
    kvl_digester digester;
    kvl_digester_init(&digester, c->tenant->key, sizeof c->tenant->key);
    kvl_digester_add(&digester, DOMAIN_NAME, sizeof DOMAIN_NAME);
    kvl_digester_add(&digester, salt->data, salt->len);
    const kvl_digest narrowed = kvl_digester_end(&digester);
    memcpy(c->key, narrowed.bytes, sizeof c->key);
}

static void keep_name(client *c, const char *name)
{
    const size_t n = strlen(name);
    for (size_t i = 0; i <= n; i++) {
        const unsigned char letter = (unsigned char)name[i];
        /* Whatever would forge lines of the log. */
        c->name[i] = i < n && (letter <= 0x20 || letter >= 0x7f || letter == '"') ? '?' : name[i];
    }
}

static void take_hello(kvl_sidecar *s, client *c, const request *from)
{
    kvl_error error;
    if (check_hello(s, from->hello, &error) < 0) {
        kvl_log(KVL_LOG_WARN, "client_refused", "tenant=%s why=\"%.300s\"", c->tenant->name,
                error.text);
        refuse(s, c, from->number, &error);
        return;
    }
    keep_name(c, from->hello->name);
    narrow_key(c, &from->hello->salt);
    c->is_greeted = true;
    Kvloom__Local__V1__Reply reply = KVLOOM__LOCAL__V1__REPLY__INIT;
    Kvloom__Local__V1__Welcome welcome = KVLOOM__LOCAL__V1__WELCOME__INIT;
    char version[] = KVL_VERSION;
    reply.number = from->number;
    reply.body_case = KVLOOM__LOCAL__V1__REPLY__BODY_WELCOME;
    reply.welcome = &welcome;
    welcome.version = KVL_LOCAL_VERSION_MAX;
    welcome.epoch = s->epoch;
    welcome.tenant = c->tenant->name;
    welcome.server = version;
    sidecar_send(s, c, &reply, -1);
}

/* ---- put ---- */

static void send_stored(kvl_sidecar *s, client *c, uint64_t number, const kvl_digest *id,
                        bool existed)
{
    Kvloom__Local__V1__Reply reply = KVLOOM__LOCAL__V1__REPLY__INIT;
    Kvloom__Local__V1__Stored stored = KVLOOM__LOCAL__V1__STORED__INIT;
    reply.number = number;
    reply.body_case = KVLOOM__LOCAL__V1__REPLY__BODY_STORED;
    reply.stored = &stored;
    stored.id.len = sizeof id->bytes;
    stored.id.data = (uint8_t *)(uintptr_t)id->bytes;
    stored.existed = existed;
    sidecar_send(s, c, &reply, -1);
}

static kvl_status check_put(kvl_sidecar *s, client *c, const request *from, int fd, job *j,
                            kvl_error *error)
{
    const Kvloom__Local__V1__Put *put = from->put;
    const Kvloom__Local__V1__Shape *shape = put->shape;
    if (shape == NULL || put->key == NULL) {
        return KVL_FAIL(error, KVL_ERR_INVALID, "a put needs a key and a shape");
    }
    if (put->key->id.len != 0) {
        return KVL_FAIL(error, KVL_ERR_DENIED,
                        "an id is computed here, from tokens and home: nobody may choose one");
    }
    KVL_TRY(id_of(s, c, put->key, &j->id, error));
    /* F_GET_SEALS works on files in memory only: no read of such a file can block. */
    if (fd < 0 || fcntl(fd, F_GET_SEALS) < 0) {
        return KVL_FAIL(error, KVL_ERR_INVALID, "a put needs a descriptor of memfd_create");
    }
    j->info =
        (kvl_container_info){.kind = KVL_CONTAINER_SEGMENT,
                             .id = j->id,
                             .fingerprint = s->fingerprint,
                             .home = home_of(s, c, put->key),
                             .home_is_canonical = put->home_is_canonical || put->key->home.len == 0,
                             .dtype = (kvl_kv_dtype)shape->dtype,
                             .n_layers = shape->n_layers,
                             .n_kv_heads = shape->n_kv_heads,
                             .head_dim = shape->head_dim,
                             .n_tokens = (uint32_t)(put->key->tokens.len / sizeof(uint32_t)),
                             .pairs = shape->pairs};
    if (shape->n_layers == 0 || shape->n_layers > KVL_CONTAINER_LAYERS_MAX ||
        shape->n_kv_heads == 0 || shape->n_kv_heads > KVL_CONTAINER_HEADS_MAX ||
        shape->head_dim == 0 || shape->head_dim > KVL_CONTAINER_HEAD_DIM_MAX || shape->pairs > 1 ||
        !kvl_segment_block_bytes(j->info.dtype, shape->n_kv_heads, j->info.n_tokens,
                                 shape->head_dim, &j->info.block_bytes)) {
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "shape of %u layers, %u heads of %u, dtype %u, pairs %u is outside limits",
                        shape->n_layers, shape->n_kv_heads, shape->head_dim, shape->dtype,
                        shape->pairs);
    }
    if (put->anchor != NULL) KVL_TRY(sidecar_anchor_put(s, c, put, j, error));
    kvl_tier_stats stats;
    kvl_tier *largest = c->tenant->disk != NULL ? c->tenant->disk : c->tenant->memory;
    largest->ops->stats(largest, &stats);
    if (j->info.block_bytes > stats.bytes_max / shape->n_layers) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "%u layers of %" PRIu64
                        " bytes are more than this tenant may keep (%" PRIu64 " bytes)",
                        shape->n_layers, j->info.block_bytes, stats.bytes_max);
    }
    return KVL_OK;
}

static bool is_held(const tenant *t, const kvl_digest *id)
{
    return t->memory->ops->has(t->memory, id) ||
           (t->disk != NULL && t->disk->ops->has(t->disk, id));
}

static kvl_status start_put(kvl_sidecar *s, client *c, const request *from, job *j,
                            kvl_error *error)
{
    const ProtobufCBinaryData *tokens = &from->put->key->tokens;
    if (c->n_waiting >= KVL_SIDECAR_WAITING_PER_CLIENT) {
        return KVL_FAIL(error, KVL_ERR_BUSY, "this client has %u requests open already",
                        KVL_SIDECAR_WAITING_PER_CLIENT);
    }
    j->tokens = kvl_alloc(tokens->len);
    if (j->tokens == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the tokens");
    memcpy(j->tokens, tokens->data, tokens->len);
    j->info.tokens = j->tokens;
    j->slot = c->slot;
    j->serial = c->serial;
    j->number = from->number;
    j->write_back = from->put->write_back;
    if (sidecar_job_start(s, j) < 0) {
        return KVL_FAIL(error, KVL_ERR_BUSY, "%u jobs wait already", KVL_SIDECAR_JOBS_MAX);
    }
    c->n_waiting++;
    return KVL_OK;
}

static void take_put(kvl_sidecar *s, client *c, const request *from, int *fd)
{
    kvl_error error;
    job *j = sidecar_job_create(s, JOB_PUT, c->tenant);
    if (j == NULL) {
        sidecar_send_status(s, c, from->number, KVL_ERR_NO_MEMORY, "no memory for a put");
        return;
    }
    kvl_status status = check_put(s, c, from, *fd, j, &error);
    if (status == KVL_OK && is_held(c->tenant, &j->id)) {
        send_stored(s, c, from->number, &j->id, true);
        sidecar_job_end(j);
        return;
    }
    if (status == KVL_OK) {
        j->fd = *fd;
        *fd = -1;
        status = start_put(s, c, from, j, &error);
    }
    if (status < 0) {
        refuse(s, c, from->number, &error);
        sidecar_job_end(j);
    }
}

/* ---- get, pin, prefetch ---- */

static int64_t deadline_of(const kvl_sidecar *s, uint32_t deadline_ms)
{
    return sidecar_now(s) + (int64_t)deadline_ms * KVL_NS_PER_MS;
}

static void count_miss(kvl_sidecar *s, tenant *t, const kvl_digest *id)
{
    t->misses++;
    sidecar_access_note(s, t, id, 0, KVL_ACCESS_MISS);
}

/* What is in memory is answered at once, here; the rest waits for a load. */
static void take_get(kvl_sidecar *s, client *c, const waiter *wanted, const key_message *key,
                     uint32_t deadline_ms)
{
    kvl_error error;
    kvl_digest id;
    if (id_of(s, c, key, &id, &error) < 0) {
        refuse(s, c, wanted->number, &error);
        return;
    }
    tenant *t = c->tenant;
    kvl_container *container = NULL;
    if (t->memory->ops->get(t->memory, &id, false, &container, &error) == KVL_OK) {
        t->hits[PLACE_MEMORY]++;
        sidecar_access_note(s, t, &id, kvl_container_n_bytes(container), KVL_ACCESS_HIT);
        if (t->disk != NULL) t->disk->ops->touch(t->disk, &id);
        waiter w = *wanted;
        sidecar_answer_got(s, c, &w, container, kvl_container_n_blocks(container), PLACE_MEMORY);
        kvl_container_release(container);
        return;
    }
    if (deadline_ms == 0 || c->n_waiting >= KVL_SIDECAR_WAITING_PER_CLIENT) {
        if (deadline_ms == 0) count_miss(s, t, &id);
        sidecar_send_status(
            s, c, wanted->number, deadline_ms == 0 ? KVL_ERR_NOT_FOUND : KVL_ERR_BUSY,
            deadline_ms == 0 ? "it is not in memory, and no time was given to load it"
                             : "this client has %u requests open already",
            KVL_SIDECAR_WAITING_PER_CLIENT);
        return;
    }
    waiter *w = kvl_alloc(sizeof *w);
    if (w == NULL) {
        sidecar_send_status(s, c, wanted->number, KVL_ERR_NO_MEMORY, "no memory for a get");
        return;
    }
    *w = *wanted;
    w->deadline_ns = deadline_of(s, deadline_ms);
    const kvl_status status = sidecar_load_start(s, t, &id, w->deadline_ns, w, &error);
    if (status == KVL_OK) return;
    if (status == KVL_ERR_NOT_FOUND) count_miss(s, t, &id);
    sidecar_send_status(s, c, wanted->number, status, "%s", error.text);
    kvl_free(w);
}

static bool count_is_allowed(kvl_sidecar *s, client *c, uint64_t number, size_t n)
{
    if (n >= 1 && n <= KVL_LOCAL_KEYS_MAX) return true;
    kvl_error error;
    kvl_ignore(
        KVL_FAIL(&error, KVL_ERR_INVALID, "%zu keys, must be 1 .. %u", n, KVL_LOCAL_KEYS_MAX));
    refuse(s, c, number, &error);
    return false;
}

/* Nobody waits: what cannot be begun now is left, and asked for when it is needed. */
static void take_prefetch(kvl_sidecar *s, client *c, const request *from)
{
    const Kvloom__Local__V1__Prefetch *prefetch = from->prefetch;
    if (!count_is_allowed(s, c, from->number, prefetch->n_keys)) return;
    for (size_t i = 0; i < prefetch->n_keys; i++) {
        kvl_error error;
        kvl_digest id;
        if (id_of(s, c, prefetch->keys[i], &id, &error) < 0) {
            refuse(s, c, from->number, &error);
            return;
        }
        if (c->tenant->memory->ops->has(c->tenant->memory, &id)) continue;
        const kvl_status status = sidecar_load_start(
            s, c->tenant, &id, deadline_of(s, prefetch->deadline_ms), NULL, &error);
        if (status < 0 && status != KVL_ERR_NOT_FOUND) {
            sidecar_send_status(s, c, from->number, status, "%s", error.text);
            return;
        }
    }
    sidecar_send_status(s, c, from->number, KVL_OK, "%s", "");
}

/* ---- looking ---- */

static uint8_t place_of(kvl_sidecar *s, const tenant *t, const kvl_digest *id)
{
    if (t->memory->ops->has(t->memory, id)) return PLACE_MEMORY;
    if (t->disk != NULL && t->disk->ops->has(t->disk, id)) return PLACE_DISK;
    const bool has_peers = s->exchange != NULL && t == &s->tenants[0];
    return has_peers && kvl_exchange_was_announced(s->exchange, id) ? PLACE_PEER : PLACE_NOWHERE;
}

static void take_locate(kvl_sidecar *s, client *c, const request *from)
{
    const Kvloom__Local__V1__Locate *locate = from->locate;
    uint8_t places[KVL_LOCAL_KEYS_MAX];
    if (!count_is_allowed(s, c, from->number, locate->n_keys)) return;
    for (size_t i = 0; i < locate->n_keys; i++) {
        kvl_error error;
        kvl_digest id;
        if (id_of(s, c, locate->keys[i], &id, &error) < 0) {
            refuse(s, c, from->number, &error);
            return;
        }
        places[i] = place_of(s, c->tenant, &id);
    }
    Kvloom__Local__V1__Reply reply = KVLOOM__LOCAL__V1__REPLY__INIT;
    Kvloom__Local__V1__Located located = KVLOOM__LOCAL__V1__LOCATED__INIT;
    reply.number = from->number;
    reply.body_case = KVLOOM__LOCAL__V1__REPLY__BODY_LOCATED;
    reply.located = &located;
    located.places.len = locate->n_keys;
    located.places.data = places;
    sidecar_send(s, c, &reply, -1);
}

static void take_stats(kvl_sidecar *s, client *c, uint64_t number)
{
    const tenant *t = c->tenant;
    kvl_tier_stats memory;
    kvl_tier_stats all = {0};
    t->memory->ops->stats(t->memory, &memory);
    t->store->ops->stats(t->store, &all);
    Kvloom__Local__V1__Reply reply = KVLOOM__LOCAL__V1__REPLY__INIT;
    Kvloom__Local__V1__Stats stats = KVLOOM__LOCAL__V1__STATS__INIT;
    reply.number = number;
    reply.body_case = KVLOOM__LOCAL__V1__REPLY__BODY_STATS;
    reply.stats = &stats;
    stats.memory_bytes = memory.bytes;
    stats.memory_bytes_max = memory.bytes_max;
    stats.disk_bytes = t->disk == NULL ? 0 : all.bytes;
    stats.disk_bytes_max = t->disk == NULL ? 0 : all.bytes_max;
    stats.n_containers = all.n_containers;
    stats.hits_memory = t->hits[PLACE_MEMORY];
    stats.hits_disk = t->hits[PLACE_DISK];
    stats.hits_peer = t->hits[PLACE_PEER];
    stats.misses = t->misses;
    stats.puts = t->puts;
    stats.refused = t->refused;
    stats.damaged = all.damaged;
    stats.evictions = all.evictions;
    stats.leases = t->n_leases;
    stats.clients = t->n_clients;
    stats.leases_expired = t->leases_expired;
    sidecar_send(s, c, &reply, -1);
}

/* The n smallest ids behind `after`, kept sorted while the tier is walked. */
typedef struct listing {
    kvl_digest after;
    bool has_after, more;
    size_t n, n_max;
    Kvloom__Local__V1__Entry *entries;
    kvl_digest *ids;
} listing;

static bool list_entry(void *context, const kvl_digest *id, kvl_container_kind kind,
                       uint64_t n_bytes)
{
    listing *l = context;
    if (l->has_after && memcmp(id, &l->after, sizeof *id) <= 0) return true;
    size_t first = 0;
    size_t past = l->n;
    while (first < past) {
        const size_t middle = (first + past) / 2;
        if (memcmp(&l->ids[middle], id, sizeof *id) < 0) {
            first = middle + 1;
        } else {
            past = middle;
        }
    }
    if (l->n == l->n_max) l->more = true;
    if (first == l->n_max) return true;
    const size_t n_moved = (l->n < l->n_max ? l->n : l->n_max - 1) - first;
    memmove(&l->ids[first + 1], &l->ids[first], n_moved * sizeof *l->ids);
    memmove(&l->entries[first + 1], &l->entries[first], n_moved * sizeof *l->entries);
    if (l->n < l->n_max) l->n++;
    l->ids[first] = *id;
    kvloom__local__v1__entry__init(&l->entries[first]);
    l->entries[first].kind = (uint32_t)kind;
    l->entries[first].n_bytes = n_bytes;
    return true;
}

void sidecar_send_listed(kvl_sidecar *s, client *c, uint64_t number,
                         Kvloom__Local__V1__Listed *listed)
{
    Kvloom__Local__V1__Reply reply = KVLOOM__LOCAL__V1__REPLY__INIT;
    reply.number = number;
    reply.body_case = KVLOOM__LOCAL__V1__REPLY__BODY_LISTED;
    reply.listed = listed;
    sidecar_send(s, c, &reply, -1);
}

static void send_listing(kvl_sidecar *s, client *c, uint64_t number, listing *l,
                         Kvloom__Local__V1__Entry **pointers)
{
    Kvloom__Local__V1__Listed listed = KVLOOM__LOCAL__V1__LISTED__INIT;
    c->tenant->store->ops->list(c->tenant->store, list_entry, l);
    for (size_t i = 0; i < l->n; i++) {
        l->entries[i].id.len = sizeof l->ids[i].bytes;
        l->entries[i].id.data = l->ids[i].bytes;
        pointers[i] = &l->entries[i];
    }
    listed.n_entries = l->n;
    listed.entries = pointers;
    listed.more = l->more;
    sidecar_send_listed(s, c, number, &listed);
}

static void take_list(kvl_sidecar *s, client *c, const request *from)
{
    const Kvloom__Local__V1__List *list = from->list;
    if (list->n_max == 0 || list->n_max > KVL_LOCAL_LIST_MAX ||
        (list->after.len != 0 && list->after.len != KVL_DIGEST_BYTES)) {
        c->tenant->refused++;
        sidecar_send_status(s, c, from->number, KVL_ERR_INVALID,
                            "a list of %u entries behind %zu bytes: must be 1 .. %u behind 0 or %u",
                            list->n_max, list->after.len, KVL_LOCAL_LIST_MAX, KVL_DIGEST_BYTES);
        return;
    }
    listing l = {.has_after = list->after.len != 0, .n_max = list->n_max};
    if (l.has_after) memcpy(l.after.bytes, list->after.data, KVL_DIGEST_BYTES);
    l.entries = kvl_alloc_zero(l.n_max, sizeof *l.entries);
    l.ids = kvl_alloc_zero(l.n_max, sizeof *l.ids);
    Kvloom__Local__V1__Entry **pointers = kvl_alloc_zero(l.n_max, sizeof *pointers);
    if (l.entries != NULL && l.ids != NULL && pointers != NULL) {
        send_listing(s, c, from->number, &l, pointers);
    } else {
        sidecar_send_status(s, c, from->number, KVL_ERR_NO_MEMORY, "no memory for a list");
    }
    kvl_free(pointers);
    kvl_free(l.ids);
    kvl_free(l.entries);
}

/* ---- remove ---- */

static void take_remove(kvl_sidecar *s, client *c, const request *from)
{
    kvl_error error;
    kvl_digest id;
    if (id_of(s, c, from->remove, &id, &error) < 0) {
        refuse(s, c, from->number, &error);
        return;
    }
    job *j = sidecar_job_create(s, JOB_REMOVE, c->tenant);
    if (j != NULL) {
        j->id = id;
        j->slot = c->slot;
        j->serial = c->serial;
        j->number = from->number;
        if (c->n_waiting < KVL_SIDECAR_WAITING_PER_CLIENT && sidecar_job_start(s, j) == KVL_OK) {
            c->n_waiting++;
            return;
        }
        sidecar_job_end(j);
    }
    sidecar_send_status(s, c, from->number, KVL_ERR_BUSY, "too many requests wait already");
}

/* ---- all of them ---- */

static void take(kvl_sidecar *s, client *c, const request *from, int *fd)
{
    waiter w = {.slot = c->slot, .serial = c->serial, .number = from->number};
    switch (from->body_case) {
    case KVLOOM__LOCAL__V1__REQUEST__BODY_PUT: take_put(s, c, from, fd); return;
    case KVLOOM__LOCAL__V1__REQUEST__BODY_GET:
        w.lease_ms = from->get->lease_ms;
        w.by_layer = from->get->by_layer;
        take_get(s, c, &w, from->get->key, from->get->deadline_ms);
        return;
    case KVLOOM__LOCAL__V1__REQUEST__BODY_PIN:
        w.lease_ms = from->pin->lease_ms;
        w.is_pin = true;
        take_get(s, c, &w, from->pin->key, from->pin->deadline_ms);
        return;
    case KVLOOM__LOCAL__V1__REQUEST__BODY_LOCATE: take_locate(s, c, from); return;
    case KVLOOM__LOCAL__V1__REQUEST__BODY_PREFETCH: take_prefetch(s, c, from); return;
    case KVLOOM__LOCAL__V1__REQUEST__BODY_RELEASE:
        /* A lease that expired is no mistake of the client's. */
        kvl_ignore(sidecar_lease_release(s, c, from->release->lease));
        return;
    case KVLOOM__LOCAL__V1__REQUEST__BODY_REMOVE: take_remove(s, c, from); return;
    case KVLOOM__LOCAL__V1__REQUEST__BODY_STATS: take_stats(s, c, from->number); return;
    case KVLOOM__LOCAL__V1__REQUEST__BODY_LIST: take_list(s, c, from); return;
    case KVLOOM__LOCAL__V1__REQUEST__BODY_ACCESSES:
        sidecar_access_answer(s, c, from->number, from->accesses->after);
        return;
    case KVLOOM__LOCAL__V1__REQUEST__BODY_ANCHORS:
        sidecar_anchor_list(s, c, from->number, from->anchors);
        return;
    default: break;
    }
    c->tenant->refused++;
    sidecar_send_status(s, c, from->number, KVL_ERR_UNSUPPORTED,
                        "a request of a kind that this sidecar (" KVL_VERSION ") does not know");
}

void sidecar_request(kvl_sidecar *s, client *c, const uint8_t *bytes, size_t n_bytes, int fd)
{
    unpacking memory = {2 * KVL_LOCAL_MESSAGE_BYTES_MAX};
    ProtobufCAllocator allocator = {unpack_alloc, unpack_free, &memory};
    request *from = kvloom__local__v1__request__unpack(&allocator, n_bytes, bytes);
    if (from == NULL) {
        c->tenant->refused++;
        c->is_broken = true; /* whatever it is, it does not speak this protocol */
    } else if (from->body_case == KVLOOM__LOCAL__V1__REQUEST__BODY_HELLO) {
        take_hello(s, c, from);
    } else if (!c->is_greeted) {
        c->tenant->refused++;
        sidecar_send_status(s, c, from->number, KVL_ERR_DENIED, "say Hello first");
    } else {
        take(s, c, from, &fd);
    }
    if (from != NULL) kvloom__local__v1__request__free_unpacked(from, &allocator);
    if (fd >= 0) (void)close(fd);
}

/* ---- results of workers ---- */

static void finish_put(kvl_sidecar *s, job *j)
{
    client *c = sidecar_client_find(s, j->slot, j->serial);
    if (c != NULL) c->n_waiting--;
    if (j->status == KVL_OK) {
        j->tenant->puts++;
        sidecar_access_note(s, j->tenant, &j->id,
                            j->container == NULL ? 0 : kvl_container_n_bytes(j->container),
                            KVL_ACCESS_PUT);
        if (s->exchange != NULL && j->tenant == &s->tenants[0]) {
            kvl_exchange_announce(s->exchange, &j->id, j->info.kind);
        }
        if (c != NULL) send_stored(s, c, j->number, &j->id, false);
    } else if (c != NULL) {
        sidecar_send_status(s, c, j->number, j->status, "%s", j->text);
    }
}

void sidecar_job_done(kvl_sidecar *s, job *j)
{
    if (j->kind == JOB_LOAD || j->kind == JOB_PROGRESS || j->kind == JOB_FETCHED) {
        sidecar_load_done(s, j);
        return;
    }
    if (j->kind == JOB_PUT) {
        finish_put(s, j);
    } else if (j->kind == JOB_REMOVE || j->kind == JOB_ANCHORS) {
        client *c = sidecar_client_find(s, j->slot, j->serial);
        if (c != NULL) c->n_waiting--;
        if (c != NULL && j->kind == JOB_ANCHORS) {
            sidecar_anchor_found(s, c, j);
        } else if (c != NULL) {
            sidecar_send_status(s, c, j->number, j->status, "%s", j->text);
        }
    } else if (j->status < 0) {
        kvl_log(KVL_LOG_WARN, "disk_put_failed", "tenant=%s status=%s reason=\"%s\"",
                j->tenant->name, kvl_status_name(j->status), j->text);
    }
    sidecar_job_end(j);
}
