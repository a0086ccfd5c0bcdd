/* sidecar/access.c: the latest accesses of a tenant, for who records a trace. Nothing is kept while
 * nobody asks, and a client that records and does not read loses what the ring has no room for. */
#include "sidecar/state.h"

#include "base/alloc.h"

#include <string.h>

enum { ACCESSES_PER_REPLY = 1024 };

void sidecar_access_note(kvl_sidecar *s, tenant *t, const kvl_digest *id, uint64_t n_bytes,
                         kvl_access_kind kind)
{
    if (t->accesses == NULL) return;
    t->accesses[++t->last_access % SIDECAR_ACCESSES] = (kvl_access_record){
        .time_us = (uint64_t)(sidecar_now(s) / 1000), .id = *id, .n_bytes = n_bytes, .kind = kind};
}

static void fill(Kvloom__Local__V1__Access *to, kvl_access_record *from)
{
    kvloom__local__v1__access__init(to);
    to->time_us = from->time_us;
    to->id.data = from->id.bytes;
    to->id.len = sizeof from->id.bytes;
    to->n_bytes = from->n_bytes;
    to->what = (uint32_t)from->kind;
}

static void send_accesses(kvl_sidecar *s, client *c, uint64_t number, uint64_t after)
{
    Kvloom__Local__V1__Access messages[ACCESSES_PER_REPLY];
    Kvloom__Local__V1__Access *pointers[ACCESSES_PER_REPLY];
    Kvloom__Local__V1__Reply reply = KVLOOM__LOCAL__V1__REPLY__INIT;
    Kvloom__Local__V1__Accessed accessed = KVLOOM__LOCAL__V1__ACCESSED__INIT;
    tenant *t = c->tenant;
    reply.number = number;
    reply.body_case = KVLOOM__LOCAL__V1__REPLY__BODY_ACCESSED;
    reply.accessed = &accessed;
    accessed.tenant = t->name;
    accessed.accesses = pointers;
    /* Numbers that are not given out yet are those of a sidecar that has ended since. */
    if (after == 0 || after > t->last_access) after = t->last_access;
    const uint64_t first_kept =
        t->last_access < SIDECAR_ACCESSES ? 1 : t->last_access - SIDECAR_ACCESSES + 1;
    uint64_t first = after + 1;
    if (first < first_kept) {
        accessed.lost = first_kept - first;
        first = first_kept;
    }
    for (; first <= t->last_access && accessed.n_accesses < ACCESSES_PER_REPLY; first++) {
        fill(&messages[accessed.n_accesses], &t->accesses[first % SIDECAR_ACCESSES]);
        pointers[accessed.n_accesses] = &messages[accessed.n_accesses];
        accessed.n_accesses++;
    }
    accessed.last = first - 1;
    sidecar_send(s, c, &reply, -1);
}

void sidecar_access_answer(kvl_sidecar *s, client *c, uint64_t number, uint64_t after)
{
    tenant *t = c->tenant;
    if (t->accesses == NULL) {
        t->accesses = kvl_alloc_zero(SIDECAR_ACCESSES, sizeof *t->accesses);
        /* Number 0 asks "from now on", so the first that is told is never it. */
        t->last_access = 1;
    }
    if (t->accesses == NULL) {
        sidecar_send_status(s, c, number, KVL_ERR_NO_MEMORY, "no memory to note accesses");
        return;
    }
    t->accesses_wanted_ns = sidecar_now(s);
    send_accesses(s, c, number, after);
}

void sidecar_access_tick(kvl_sidecar *s, int64_t now_ns)
{
    for (uint32_t i = 0; i < s->n_tenants; i++) {
        tenant *t = &s->tenants[i];
        if (t->accesses == NULL || now_ns - t->accesses_wanted_ns < SIDECAR_ACCESSES_KEPT_NS)
            continue;
        kvl_free(t->accesses);
        t->accesses = NULL;
    }
}
