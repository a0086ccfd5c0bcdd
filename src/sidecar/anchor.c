/* sidecar/anchor.c: anchors of engines in other processes: kept like segments, found by the slot
 * that they were measured in. What their blocks mean is the engine's business; their extra begins
 * with a name of template and slot that follows from the tenant's key, as ids do. */
#include "sidecar/state.h"

#include "base/alloc.h"

#include <stdio.h>
#include <string.h>

enum {
    TEMPLATE_BYTES_MAX = 256,
    SLOTS_MAX = 1024,
    EXTRA_BYTES_MAX = 4096,
    LISTED_MAX = 256,
    LOOKED_AT_MAX = 4096,
    PREFIX_BYTES = KVL_DIGEST_BYTES,
};

static kvl_status check_slot(const ProtobufCBinaryData *name, uint32_t slot, kvl_error *error)
{
    if (name->len >= 1 && name->len <= TEMPLATE_BYTES_MAX && slot < SLOTS_MAX) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_INVALID,
                    "template of %zu bytes, slot %u: must be 1 .. %d bytes, slot 0 .. %d",
                    name->len, slot, TEMPLATE_BYTES_MAX, SLOTS_MAX - 1);
}

static kvl_digest slot_id(const kvl_sidecar *s, const client *c, const ProtobufCBinaryData *name,
                          uint32_t slot)
{
    static const char DOMAIN_NAME[] = "kvloom.anchor.slot.1";
    kvl_digester digester;
    kvl_digester_init(&digester, c->key, sizeof c->key);
    kvl_digester_add(&digester, DOMAIN_NAME, sizeof DOMAIN_NAME);
    kvl_digester_add(&digester, s->fingerprint.bytes, sizeof s->fingerprint.bytes);
    kvl_digester_add_u64(&digester, name->len);
    kvl_digester_add(&digester, name->data, name->len);
    kvl_digester_add_u64(&digester, slot);
    return kvl_digester_end(&digester);
}

/* ---- putting ---- */

/* One text in one slot has one anchor. */
static kvl_digest anchor_id(const client *c, const kvl_digest *slot,
                            const ProtobufCBinaryData *tokens)
{
    static const char DOMAIN_NAME[] = "kvloom.anchor.1";
    kvl_digester digester;
    kvl_digester_init(&digester, c->key, sizeof c->key);
    kvl_digester_add(&digester, DOMAIN_NAME, sizeof DOMAIN_NAME);
    kvl_digester_add(&digester, slot->bytes, sizeof slot->bytes);
    kvl_digester_add(&digester, tokens->data, tokens->len);
    return kvl_digester_end(&digester);
}

kvl_status sidecar_anchor_put(const kvl_sidecar *s, const client *c,
                              const Kvloom__Local__V1__Put *put, job *j, kvl_error *error)
{
    const Kvloom__Local__V1__Anchor *anchor = put->anchor;
    KVL_TRY(check_slot(&anchor->template_name, anchor->slot, error));
    if (put->key->home.len != 0 || anchor->extra.len > EXTRA_BYTES_MAX ||
        anchor->block_bytes == 0 || anchor->block_bytes > KVL_CONTAINER_BYTES_MAX) {
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "an anchor has no home, layers of 1 byte or more, and at most %d bytes of "
                        "extra",
                        EXTRA_BYTES_MAX);
    }
    const kvl_digest slot = slot_id(s, c, &anchor->template_name, anchor->slot);
    j->extra = kvl_alloc(PREFIX_BYTES + anchor->extra.len);
    if (j->extra == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for an anchor");
    memcpy(j->extra, slot.bytes, PREFIX_BYTES);
    if (anchor->extra.len > 0)
        memcpy(j->extra + PREFIX_BYTES, anchor->extra.data, anchor->extra.len);
    j->id = j->info.id = anchor_id(c, &slot, &put->key->tokens);
    j->info.kind = KVL_CONTAINER_ANCHOR;
    j->info.home_is_canonical = false;
    j->info.block_bytes = anchor->block_bytes;
    j->info.extra = j->extra;
    j->info.n_extra_bytes = PREFIX_BYTES + anchor->extra.len;
    return KVL_OK;
}

/* ---- finding ---- */

void sidecar_anchor_list(kvl_sidecar *s, client *c, uint64_t number,
                         const Kvloom__Local__V1__Anchors *wanted)
{
    kvl_error error;
    if (check_slot(&wanted->template_name, wanted->slot, &error) < 0) {
        c->tenant->refused++;
        sidecar_send_status(s, c, number, error.status, "%s", error.text);
        return;
    }
    const kvl_digest slot = slot_id(s, c, &wanted->template_name, wanted->slot);
    job *j = sidecar_job_create(s, JOB_ANCHORS, c->tenant);
    if (j != NULL) {
        j->slot = c->slot;
        j->serial = c->serial;
        j->number = number;
        j->extra = kvl_alloc(PREFIX_BYTES);
        if (j->extra != NULL) memcpy(j->extra, slot.bytes, PREFIX_BYTES);
        if (j->extra != NULL && c->n_waiting < KVL_SIDECAR_WAITING_PER_CLIENT &&
            sidecar_job_start(s, j) == KVL_OK) {
            c->n_waiting++;
            return;
        }
        sidecar_job_end(j);
    }
    sidecar_send_status(s, c, number, KVL_ERR_BUSY, "too many requests wait already");
}

/* Runs inside the tier, which must not be called back: only ids are noted. */
static bool note_anchor(void *context, const kvl_digest *id, kvl_container_kind kind,
                        uint64_t n_bytes)
{
    job *j = context;
    if (kind != KVL_CONTAINER_ANCHOR) return true;
    if (j->n_anchors == LOOKED_AT_MAX) {
        j->has_more_anchors = true;
        return false;
    }
    j->anchors[j->n_anchors++] = (found_anchor){*id, n_bytes};
    return true;
}

static bool is_of_slot(const job *j, const kvl_digest *id)
{
    kvl_tier *store = j->tenant->store;
    kvl_container *container = NULL;
    if (store->ops->get(store, id, false, &container, NULL) < 0) return false;
    const kvl_container_info *info = kvl_container_info_of(container);
    const bool is_it =
        info->n_extra_bytes >= PREFIX_BYTES && memcmp(info->extra, j->extra, PREFIX_BYTES) == 0;
    kvl_container_release(container);
    return is_it;
}

void sidecar_anchor_find(job *j)
{
    kvl_tier *store = j->tenant->store;
    size_t n = 0;
    j->anchors = kvl_alloc_zero(LOOKED_AT_MAX, sizeof *j->anchors);
    if (j->anchors == NULL) {
        j->status = KVL_ERR_NO_MEMORY;
        (void)snprintf(j->text, sizeof j->text, "no memory to look for anchors");
        return;
    }
    store->ops->list(store, note_anchor, j);
    for (size_t i = 0; i < j->n_anchors; i++) {
        if (!is_of_slot(j, &j->anchors[i].id)) continue;
        j->has_more_anchors |= n == LISTED_MAX;
        if (n < LISTED_MAX) j->anchors[n++] = j->anchors[i];
    }
    j->n_anchors = n;
}

void sidecar_anchor_found(kvl_sidecar *s, client *c, const job *j)
{
    Kvloom__Local__V1__Entry entries[LISTED_MAX];
    Kvloom__Local__V1__Entry *pointers[LISTED_MAX];
    Kvloom__Local__V1__Listed listed = KVLOOM__LOCAL__V1__LISTED__INIT;
    if (j->status < 0) {
        sidecar_send_status(s, c, j->number, j->status, "%s", j->text);
        return;
    }
    for (size_t i = 0; i < j->n_anchors; i++) {
        kvloom__local__v1__entry__init(&entries[i]);
        entries[i].id.data = j->anchors[i].id.bytes;
        entries[i].id.len = sizeof j->anchors[i].id.bytes;
        entries[i].kind = KVL_CONTAINER_ANCHOR;
        entries[i].n_bytes = j->anchors[i].n_bytes;
        pointers[i] = &entries[i];
    }
    listed.n_entries = j->n_anchors;
    listed.entries = pointers;
    listed.more = j->has_more_anchors;
    sidecar_send_listed(s, c, j->number, &listed);
}
