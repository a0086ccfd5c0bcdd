/* client/ask.c: where things are, what should be there soon, and what is kept. */
#include "client/state.h"

#include "base/alloc.h"

#include <stdio.h>
#include <string.h>

static kvloom_status unexpected(kvloom_error *error)
{
    return client_fail(error, KVLOOM_ERR_MALFORMED, "the sidecar answered something else");
}

/* Messages of several keys, in one piece: the pointers first. Owns *keys: ended with kvl_free. */
static kvloom_status make_keys(const kvloom_key *from, size_t n, Kvloom__Local__V1__Key ***keys,
                               kvloom_error *error)
{
    *keys = NULL;
    if (n == 0 || n > KVLOOM_KEYS_MAX) {
        return client_fail(error, KVLOOM_ERR_OUT_OF_RANGE, "%zu keys, must be 1 .. %d", n,
                           KVLOOM_KEYS_MAX);
    }
    Kvloom__Local__V1__Key **made = kvl_alloc_zero(n, sizeof **made + sizeof *made);
    if (made == NULL) return client_fail(error, KVLOOM_ERR_NO_MEMORY, "no memory for keys");
    Kvloom__Local__V1__Key *messages = (Kvloom__Local__V1__Key *)(void *)(made + n);
    for (size_t i = 0; i < n; i++) {
        made[i] = &messages[i];
        const kvloom_status status = client_key(&from[i], made[i], error);
        if (status < 0) {
            kvl_free(made);
            return status;
        }
    }
    *keys = made;
    return KVLOOM_OK;
}

kvloom_status kvloom_locate(kvloom_client *client, const kvloom_key *keys, size_t n_keys,
                            kvloom_place *places, kvloom_error *error)
{
    request_message request = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__Locate locate = KVLOOM__LOCAL__V1__LOCATE__INIT;
    reply_message *reply = NULL;
    kvloom_status status = make_keys(keys, n_keys, &locate.keys, error);
    if (status < 0) return status;
    locate.n_keys = n_keys;
    request.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_LOCATE;
    request.locate = &locate;
    status = client_call(client, &request, -1, 0, &reply, NULL, error);
    kvl_free(locate.keys);
    if (status < 0) return status;
    if (reply->body_case != KVLOOM__LOCAL__V1__REPLY__BODY_LOCATED ||
        reply->located->places.len != n_keys) {
        status = unexpected(error);
    }
    for (size_t i = 0; status == KVLOOM_OK && i < n_keys; i++) {
        const uint8_t place = reply->located->places.data[i];
        places[i] = place <= KVLOOM_AT_PEER ? (kvloom_place)place : KVLOOM_NOWHERE;
    }
    client_reply_end(reply);
    return status;
}

kvloom_status kvloom_prefetch(kvloom_client *client, const kvloom_key *keys, size_t n_keys,
                              uint32_t deadline_ms, kvloom_error *error)
{
    request_message request = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__Prefetch prefetch = KVLOOM__LOCAL__V1__PREFETCH__INIT;
    reply_message *reply = NULL;
    kvloom_status status = make_keys(keys, n_keys, &prefetch.keys, error);
    if (status < 0) return status;
    prefetch.n_keys = n_keys;
    prefetch.deadline_ms = deadline_ms;
    request.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_PREFETCH;
    request.prefetch = &prefetch;
    status = client_call(client, &request, -1, 0, &reply, NULL, error);
    kvl_free(prefetch.keys);
    client_reply_end(reply);
    return status;
}

static kvloom_status pin(kvloom_client *client, Kvloom__Local__V1__Key *key, uint32_t deadline_ms,
                         uint32_t lease_ms, uint64_t *lease, kvloom_error *error)
{
    request_message request = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__Pin body = KVLOOM__LOCAL__V1__PIN__INIT;
    reply_message *reply = NULL;
    *lease = 0;
    request.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_PIN;
    request.pin = &body;
    body.key = key;
    body.deadline_ms = deadline_ms;
    body.lease_ms = lease_ms;
    kvloom_status status = client_call(client, &request, -1, deadline_ms, &reply, NULL, error);
    if (status < 0) return status;
    if (reply->body_case == KVLOOM__LOCAL__V1__REPLY__BODY_PINNED) {
        *lease = reply->pinned->lease;
    } else {
        status = unexpected(error);
    }
    client_reply_end(reply);
    return status;
}

kvloom_status kvloom_pin(kvloom_client *client, const kvloom_key *key, uint32_t deadline_ms,
                         uint32_t lease_ms, uint64_t *lease, kvloom_error *error)
{
    Kvloom__Local__V1__Key message;
    *lease = 0;
    const kvloom_status status = client_key(key, &message, error);
    return status < 0 ? status : pin(client, &message, deadline_ms, lease_ms, lease, error);
}

kvloom_status kvloom_pin_id(kvloom_client *client, const kvloom_digest *id, uint32_t deadline_ms,
                            uint32_t lease_ms, uint64_t *lease, kvloom_error *error)
{
    Kvloom__Local__V1__Key message;
    client_key_id(id, &message);
    return pin(client, &message, deadline_ms, lease_ms, lease, error);
}

kvloom_status kvloom_unpin(kvloom_client *client, uint64_t lease, kvloom_error *error)
{
    request_message request = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__Release release = KVLOOM__LOCAL__V1__RELEASE__INIT;
    request.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_RELEASE;
    request.release = &release;
    release.lease = lease;
    return client_send(client, &request, -1, error);
}

static kvloom_status forget(kvloom_client *client, Kvloom__Local__V1__Key *key, kvloom_error *error)
{
    request_message request = KVLOOM__LOCAL__V1__REQUEST__INIT;
    reply_message *reply = NULL;
    request.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_REMOVE;
    request.remove = key;
    const kvloom_status status = client_call(client, &request, -1, 0, &reply, NULL, error);
    client_reply_end(reply);
    return status;
}

kvloom_status kvloom_remove(kvloom_client *client, const kvloom_key *key, kvloom_error *error)
{
    Kvloom__Local__V1__Key message;
    const kvloom_status status = client_key(key, &message, error);
    return status < 0 ? status : forget(client, &message, error);
}

kvloom_status kvloom_remove_id(kvloom_client *client, const kvloom_digest *id, kvloom_error *error)
{
    Kvloom__Local__V1__Key message;
    client_key_id(id, &message);
    return forget(client, &message, error);
}

kvloom_status kvloom_list(kvloom_client *client, const kvloom_digest *after, kvloom_entry *entries,
                          size_t n_max, size_t *n_entries, kvloom_error *error)
{
    request_message request = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__List list = KVLOOM__LOCAL__V1__LIST__INIT;
    reply_message *reply = NULL;
    *n_entries = 0;
    request.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_LIST;
    request.list = &list;
    if (n_max > KVL_LOCAL_LIST_MAX) {
        return client_fail(error, KVLOOM_ERR_OUT_OF_RANGE, "%zu entries, must be at most %u", n_max,
                           KVL_LOCAL_LIST_MAX);
    }
    list.n_max = (uint32_t)n_max;
    if (after != NULL) {
        list.after.len = sizeof after->bytes;
        list.after.data = (uint8_t *)(uintptr_t)after->bytes; /* only read */
    }
    kvloom_status status = client_call(client, &request, -1, 0, &reply, NULL, error);
    if (status < 0) return status;
    if (reply->body_case != KVLOOM__LOCAL__V1__REPLY__BODY_LISTED ||
        reply->listed->n_entries > n_max) {
        status = unexpected(error);
    }
    for (size_t i = 0; status == KVLOOM_OK && i < reply->listed->n_entries; i++) {
        const Kvloom__Local__V1__Entry *from = reply->listed->entries[i];
        if (from->id.len != KVLOOM_DIGEST_BYTES) {
            status = unexpected(error);
            break;
        }
        memcpy(entries[i].id.bytes, from->id.data, KVLOOM_DIGEST_BYTES);
        entries[i].kind = from->kind;
        entries[i].n_bytes = from->n_bytes;
        *n_entries = i + 1;
    }
    client_reply_end(reply);
    return status;
}

kvloom_status kvloom_list_anchors(kvloom_client *client, const char *template_name, uint32_t slot,
                                  kvloom_digest *ids, size_t n_max, size_t *n_ids,
                                  kvloom_error *error)
{
    request_message request = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__Anchors anchors = KVLOOM__LOCAL__V1__ANCHORS__INIT;
    reply_message *reply = NULL;
    *n_ids = 0;
    request.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_ANCHORS;
    request.anchors = &anchors;
    anchors.template_name.data = (uint8_t *)(uintptr_t)template_name; /* only read */
    anchors.template_name.len = strlen(template_name);
    anchors.slot = slot;
    kvloom_status status = client_call(client, &request, -1, 0, &reply, NULL, error);
    if (status < 0) return status;
    if (reply->body_case != KVLOOM__LOCAL__V1__REPLY__BODY_LISTED) status = unexpected(error);
    const size_t n = status < 0 ? 0 : reply->listed->n_entries;
    for (size_t i = 0; i < n && i < n_max && status == KVLOOM_OK; i++) {
        const Kvloom__Local__V1__Entry *from = reply->listed->entries[i];
        if (from->id.len != KVLOOM_DIGEST_BYTES) {
            status = unexpected(error);
            break;
        }
        memcpy(ids[i].bytes, from->id.data, KVLOOM_DIGEST_BYTES);
        *n_ids = i + 1;
    }
    client_reply_end(reply);
    return status;
}

/* False: one of them is none of this protocol. */
static bool take_accesses(const Kvloom__Local__V1__Accessed *from, kvloom_access *accesses)
{
    for (size_t i = 0; i < from->n_accesses; i++) {
        const Kvloom__Local__V1__Access *access = from->accesses[i];
        if (access->id.len != KVLOOM_DIGEST_BYTES || access->what < KVLOOM_ACCESS_HIT ||
            access->what > KVLOOM_ACCESS_PUT) {
            return false;
        }
        accesses[i] = (kvloom_access){
            .time_us = access->time_us, .n_bytes = access->n_bytes, .what = access->what};
        memcpy(accesses[i].id.bytes, access->id.data, KVLOOM_DIGEST_BYTES);
    }
    return true;
}

kvloom_status kvloom_accesses(kvloom_client *client, uint64_t *after, kvloom_access *accesses,
                              size_t n_max, size_t *n_accesses, uint64_t *n_lost, char *tenant,
                              kvloom_error *error)
{
    request_message request = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__Accesses body = KVLOOM__LOCAL__V1__ACCESSES__INIT;
    reply_message *reply = NULL;
    *n_accesses = 0;
    if (n_lost != NULL) *n_lost = 0;
    request.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_ACCESSES;
    request.accesses = &body;
    body.after = *after;
    kvloom_status status = client_call(client, &request, -1, 0, &reply, NULL, error);
    if (status < 0) return status;
    if (reply->body_case != KVLOOM__LOCAL__V1__REPLY__BODY_ACCESSED ||
        reply->accessed->n_accesses > n_max || !take_accesses(reply->accessed, accesses)) {
        status = unexpected(error);
    } else {
        *n_accesses = reply->accessed->n_accesses;
        *after = reply->accessed->last;
        if (n_lost != NULL) *n_lost = reply->accessed->lost;
        if (tenant != NULL)
            (void)snprintf(tenant, KVLOOM_TENANT_BYTES, "%s", reply->accessed->tenant);
    }
    client_reply_end(reply);
    return status;
}

kvloom_status kvloom_get_stats(kvloom_client *client, kvloom_stats *stats, kvloom_error *error)
{
    request_message request = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__Empty empty = KVLOOM__LOCAL__V1__EMPTY__INIT;
    reply_message *reply = NULL;
    memset(stats, 0, sizeof *stats);
    request.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_STATS;
    request.stats = &empty;
    const kvloom_status status = client_call(client, &request, -1, 0, &reply, NULL, error);
    if (status < 0) return status;
    if (reply->body_case == KVLOOM__LOCAL__V1__REPLY__BODY_STATS) {
        const Kvloom__Local__V1__Stats *from = reply->stats;
        *stats = (kvloom_stats){.memory_bytes = from->memory_bytes,
                                .memory_bytes_max = from->memory_bytes_max,
                                .disk_bytes = from->disk_bytes,
                                .disk_bytes_max = from->disk_bytes_max,
                                .n_containers = from->n_containers,
                                .hits_memory = from->hits_memory,
                                .hits_disk = from->hits_disk,
                                .hits_peer = from->hits_peer,
                                .misses = from->misses,
                                .puts = from->puts,
                                .refused = from->refused,
                                .damaged = from->damaged,
                                .evictions = from->evictions,
                                .leases = from->leases,
                                .leases_expired = from->leases_expired,
                                .clients = from->clients};
        client_reply_end(reply);
        return KVLOOM_OK;
    }
    client_reply_end(reply);
    return unexpected(error);
}
