/* sidecar/load.c: containers on their way into memory: from disk first, then from peers.
 *
 * There is one load for an id of a tenant at a time, whoever asks; who asks meanwhile waits with
 * the others. A peer's container is told about layer by layer, so that a reader begins with the
 * first one while the last is still on the wire. */
#include "sidecar/state.h"

#include "base/alloc.h"

#include <stdio.h>
#include <string.h>

static load *find(kvl_sidecar *s, const tenant *t, const kvl_digest *id)
{
    for (load *l = s->loads; l != NULL; l = l->next) {
        if (l->tenant == t && memcmp(&l->id, id, sizeof *id) == 0) return l;
    }
    return NULL;
}

static void unlink_load(kvl_sidecar *s, load *l)
{
    load **link = &s->loads;
    while (*link != l) link = &(*link)->next;
    *link = l->next;
    s->n_loads--;
}

/* Takes the waiter's count back from its client, if that is still there. */
static client *end_wait(kvl_sidecar *s, const waiter *w)
{
    client *c = sidecar_client_find(s, w->slot, w->serial);
    if (c != NULL) c->n_waiting--;
    return c;
}

static void fail_waiter(kvl_sidecar *s, const load *l, waiter *w, kvl_status status,
                        const char *text)
{
    client *c = end_wait(s, w);
    if (c != NULL) {
        if (status < 0 && kvl_status_class_of(status) == KVL_CLASS_MISS) c->tenant->misses++;
        if (status < 0) sidecar_access_note(s, l->tenant, &l->id, 0, KVL_ACCESS_MISS);
        /* What was sent of it is of no use; the client drops it too. */
        if (w->lease != 0) kvl_ignore(sidecar_lease_release(s, c, w->lease));
        sidecar_send_status(s, c, w->number, status, "%s", text);
    }
    kvl_free(w);
}

static void fail(kvl_sidecar *s, load *l, kvl_status status, const char *text)
{
    unlink_load(s, l);
    while (l->waiters != NULL) {
        waiter *w = l->waiters;
        l->waiters = w->next;
        fail_waiter(s, l, w, status, text);
    }
    kvl_container_release(l->partial);
    kvl_free(l);
}

/* ---- from peers: these two run on the exchange's thread ---- */

/* Without memory for the news there is no news: the end will tell. */
static void note_progress(void *context, kvl_container *container, uint32_t n_ready)
{
    const job *of = context;
    job *j = sidecar_job_create(of->sidecar, JOB_PROGRESS, of->tenant);
    if (j == NULL) return;
    j->id = of->id;
    j->container = container;
    kvl_container_share(container);
    j->n_ready = n_ready;
    sidecar_job_finish(j);
}

static void note_fetched(void *context, kvl_status status, const char *text,
                         kvl_container *container, const char *from)
{
    (void)from;
    job *j = context;
    j->status = status;
    j->container = container;
    (void)snprintf(j->text, sizeof j->text, "%s", text);
    sidecar_job_finish(j);
}

static kvl_status start_fetch(kvl_sidecar *s, load *l, kvl_error *error)
{
    job *j = sidecar_job_create(s, JOB_FETCHED, l->tenant);
    if (j == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a fetch");
    j->id = l->id;
    const kvl_exchange_watch watch = {note_progress, note_fetched, j};
    const kvl_status status =
        kvl_exchange_fetch_start(s->exchange, &l->id, l->deadline_ns, &watch, error);
    if (status < 0) {
        j->status = status;
        (void)snprintf(j->text, sizeof j->text, "the exchange is ending");
        sidecar_job_finish(j);
    }
    l->from_peer = true;
    return KVL_OK;
}

/* Peers are the first tenant's. */
static bool has_peers(const kvl_sidecar *s, const tenant *t)
{
    return s->exchange != NULL && t == &s->tenants[0];
}

static kvl_status start(kvl_sidecar *s, load *l, kvl_error *error)
{
    kvl_tier *disk = l->tenant->disk;
    if (disk != NULL && disk->ops->has(disk, &l->id)) {
        job *j = sidecar_job_create(s, JOB_LOAD, l->tenant);
        if (j == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a load");
        j->id = l->id;
        if (sidecar_job_start(s, j) == KVL_OK) return KVL_OK;
        sidecar_job_end(j);
        return KVL_FAIL(error, KVL_ERR_BUSY, "the disk has %u jobs already", KVL_SIDECAR_JOBS_MAX);
    }
    if (has_peers(s, l->tenant)) return start_fetch(s, l, error);
    return KVL_FAIL(error, KVL_ERR_NOT_FOUND, "it is neither in memory nor on disk");
}

kvl_status sidecar_load_start(kvl_sidecar *s, tenant *t, const kvl_digest *id, int64_t deadline_ns,
                              waiter *w, kvl_error *error)
{
    load *l = find(s, t, id);
    if (l == NULL) {
        if (s->n_loads >= KVL_SIDECAR_LOADS_MAX) {
            return KVL_FAIL(error, KVL_ERR_BUSY, "%u segments are being loaded already",
                            KVL_SIDECAR_LOADS_MAX);
        }
        l = kvl_alloc_zero(1, sizeof *l);
        if (l == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a load");
        l->tenant = t;
        l->id = *id;
        l->deadline_ns = deadline_ns;
        const kvl_status status = start(s, l, error);
        if (status < 0) {
            kvl_free(l);
            return status;
        }
        l->next = s->loads;
        s->loads = l;
        s->n_loads++;
    }
    if (w == NULL) return KVL_OK;
    w->next = l->waiters;
    l->waiters = w;
    client *c = sidecar_client_find(s, w->slot, w->serial);
    KVL_ASSERT(c != NULL);
    c->n_waiting++;
    if (w->by_layer && l->partial != NULL) {
        sidecar_answer_got(s, c, w, l->partial, l->n_ready, PLACE_PEER);
    }
    return KVL_OK;
}

/* ---- the ends ---- */

/* Holders of one id may differ in their roundings: what a reader has seen of one does not go with
 * the
 * layers of another. */
static void drop_readers_of_partial(kvl_sidecar *s, load *l)
{
    waiter **link = &l->waiters;
    while (*link != NULL) {
        waiter *w = *link;
        if (w->lease == 0) {
            link = &w->next;
            continue;
        }
        *link = w->next;
        fail_waiter(s, l, w, KVL_ERR_CANCELLED,
                    "the peer was lost and another one's rounding differs: get it again");
    }
}

static void set_partial(kvl_sidecar *s, load *l, kvl_container *container, uint32_t n_ready)
{
    if (l->partial != container) {
        if (l->partial != NULL) drop_readers_of_partial(s, l);
        kvl_container_release(l->partial);
        kvl_container_share(container);
        l->partial = container;
    }
    l->n_ready = n_ready;
}

static void progress(kvl_sidecar *s, load *l, const job *j)
{
    set_partial(s, l, j->container, j->n_ready);
    for (waiter *w = l->waiters; w != NULL; w = w->next) {
        client *c = w->by_layer ? sidecar_client_find(s, w->slot, w->serial) : NULL;
        if (c != NULL) sidecar_answer_got(s, c, w, l->partial, l->n_ready, PLACE_PEER);
    }
}

static void succeed(kvl_sidecar *s, load *l, kvl_container *container, int place)
{
    unlink_load(s, l);
    set_partial(s, l, container, kvl_container_n_blocks(container));
    l->tenant->hits[place] += l->waiters == NULL ? 1 : 0;
    while (l->waiters != NULL) {
        waiter *w = l->waiters;
        l->waiters = w->next;
        client *c = end_wait(s, w);
        if (c != NULL) {
            c->tenant->hits[place]++;
            sidecar_access_note(s, l->tenant, &l->id, kvl_container_n_bytes(container),
                                KVL_ACCESS_MISS);
            sidecar_answer_got(s, c, w, container, kvl_container_n_blocks(container), place);
        }
        kvl_free(w);
    }
    kvl_container_release(l->partial);
    kvl_free(l);
}

/* What came over the wire goes to disk behind the reader's back. */
static void keep_on_disk(kvl_sidecar *s, tenant *t, kvl_container *container)
{
    if (t->disk == NULL) return;
    job *j = sidecar_job_create(s, JOB_KEEP, t);
    if (j == NULL) return;
    j->container = container;
    kvl_container_share(container);
    if (sidecar_job_start(s, j) < 0) sidecar_job_end(j);
}

/* Only what the memory tier counts may be lent: otherwise memory would have no bound. */
static kvl_status take_into_memory(const load *l, kvl_container *container, kvl_error *error)
{
    kvl_tier *memory = l->tenant->memory;
    if (memory->ops->has(memory, &l->id)) return KVL_OK;
    return memory->ops->put(memory, container, error);
}

static bool has_patient_waiter(const load *l, int64_t now_ns)
{
    for (const waiter *w = l->waiters; w != NULL; w = w->next) {
        if (w->deadline_ns > now_ns) return true;
    }
    return false;
}

/* The first one's time is over, but who joined later may have more. */
static bool goes_on(kvl_sidecar *s, load *l, kvl_status status)
{
    const int64_t now_ns = sidecar_now(s);
    if (status == KVL_ERR_TIMEOUT && has_patient_waiter(l, now_ns)) {
        l->deadline_ns = now_ns;
        for (const waiter *w = l->waiters; w != NULL; w = w->next) {
            if (w->deadline_ns > l->deadline_ns) l->deadline_ns = w->deadline_ns;
        }
        return start_fetch(s, l, NULL) == KVL_OK;
    }
    const bool is_miss = kvl_status_class_of(status) == KVL_CLASS_MISS;
    if (!l->from_peer && is_miss && has_peers(s, l->tenant)) {
        return start_fetch(s, l, NULL) == KVL_OK;
    }
    return false;
}

void sidecar_load_done(kvl_sidecar *s, job *j)
{
    load *l = find(s, j->tenant, &j->id);
    if (l == NULL) {
        /* Nobody waits: late progress. */
    } else if (j->kind == JOB_PROGRESS) {
        progress(s, l, j);
    } else if (j->status == KVL_OK) {
        kvl_error error;
        const kvl_status status = take_into_memory(l, j->container, &error);
        if (j->kind == JOB_FETCHED) keep_on_disk(s, l->tenant, j->container);
        if (status == KVL_OK) {
            succeed(s, l, j->container, j->kind == JOB_FETCHED ? PLACE_PEER : PLACE_DISK);
        } else {
            fail(s, l, status, error.text);
        }
    } else if (!goes_on(s, l, j->status)) {
        fail(s, l, j->status, j->text);
    }
    sidecar_job_end(j);
}

void sidecar_load_tick(kvl_sidecar *s, int64_t now_ns)
{
    for (load *l = s->loads; l != NULL; l = l->next) {
        waiter **link = &l->waiters;
        while (*link != NULL) {
            waiter *w = *link;
            if (now_ns < w->deadline_ns) {
                link = &w->next;
                continue;
            }
            *link = w->next;
            fail_waiter(s, l, w, KVL_ERR_TIMEOUT, "the deadline passed while it was being loaded");
        }
    }
}

void sidecar_load_forget(kvl_sidecar *s, const client *c)
{
    for (load *l = s->loads; l != NULL; l = l->next) {
        waiter **link = &l->waiters;
        while (*link != NULL) {
            waiter *w = *link;
            if (w->slot != c->slot || w->serial != c->serial) {
                link = &w->next;
                continue;
            }
            *link = w->next;
            kvl_free(w);
        }
    }
}

void sidecar_load_end_all(kvl_sidecar *s)
{
    while (s->loads != NULL) fail(s, s->loads, KVL_ERR_CANCELLED, "the sidecar is ending");
}
