/* sidecar/lease.c: who holds which container, and until when.
 *
 * Leases live in chunks that never move, so that clients can link theirs; the number of a lease is
 * its place and a count that never repeats, so that a late release finds out that it is late. */
#include "sidecar/state.h"

#include "base/alloc.h"

static lease *lease_at(const kvl_sidecar *s, uint32_t place)
{
    return &s->lease_chunks[place / SIDECAR_LEASE_CHUNK][place % SIDECAR_LEASE_CHUNK];
}

static bool add_chunk(kvl_sidecar *s)
{
    if (s->n_lease_chunks * SIDECAR_LEASE_CHUNK >= KVL_SIDECAR_LEASES_MAX) return false;
    lease **chunks =
        kvl_realloc(s->lease_chunks, (s->n_lease_chunks + 1) * sizeof *s->lease_chunks);
    if (chunks == NULL) return false;
    s->lease_chunks = chunks;
    lease *chunk = kvl_alloc_zero(SIDECAR_LEASE_CHUNK, sizeof *chunk);
    if (chunk == NULL) return false;
    chunks[s->n_lease_chunks++] = chunk;
    return true;
}

/* The search begins behind the latest place, so that it is short while there are free ones. */
static lease *find_free(kvl_sidecar *s, uint32_t *place)
{
    for (int round = 0; round < 2; round++) {
        const uint32_t n = s->n_lease_chunks * SIDECAR_LEASE_CHUNK;
        if (s->n_leases < n) {
            for (uint32_t k = 0; k < n; k++) {
                *place = (uint32_t)((s->last_lease + k) % n);
                if (lease_at(s, *place)->number == 0) return lease_at(s, *place);
            }
        }
        if (!add_chunk(s)) return NULL;
    }
    return NULL;
}

uint64_t sidecar_lease_create(kvl_sidecar *s, client *c, kvl_container *container,
                              uint32_t lease_ms, const char **text)
{
    if (c->n_leases >= KVL_SIDECAR_LEASES_PER_CLIENT) {
        *text = "this client holds as many leases as a client may: release some";
        return 0;
    }
    uint32_t place = 0;
    lease *l = find_free(s, &place);
    if (l == NULL) {
        *text = "all leases of the sidecar are taken: release some";
        return 0;
    }
    if (lease_ms == 0 || lease_ms > s->lease_ms_max) lease_ms = s->lease_ms_max;
    kvl_container_share(container);
    s->last_lease++;
    *l = (lease){.next = c->leases,
                 .number = s->last_lease * KVL_SIDECAR_LEASES_MAX + place,
                 .container = container,
                 .expires_ns = sidecar_now(s) + (int64_t)lease_ms * KVL_NS_PER_MS,
                 .client = c};
    if (c->leases != NULL) c->leases->before = l;
    c->leases = l;
    c->n_leases++;
    c->tenant->n_leases++;
    s->n_leases++;
    return l->number;
}

static void end(kvl_sidecar *s, lease *l)
{
    client *c = l->client;
    if (l->before != NULL) {
        l->before->next = l->next;
    } else {
        c->leases = l->next;
    }
    if (l->next != NULL) l->next->before = l->before;
    kvl_container_release(l->container);
    *l = (lease){.number = 0};
    c->n_leases--;
    c->tenant->n_leases--;
    s->n_leases--;
}

kvl_status sidecar_lease_release(kvl_sidecar *s, client *c, uint64_t number)
{
    const uint32_t place = (uint32_t)(number % KVL_SIDECAR_LEASES_MAX);
    if (place >= s->n_lease_chunks * SIDECAR_LEASE_CHUNK) return KVL_ERR_NOT_FOUND;
    lease *l = lease_at(s, place);
    if (number == 0 || l->number != number || l->client != c) return KVL_ERR_NOT_FOUND;
    end(s, l);
    return KVL_OK;
}

void sidecar_lease_release_all(kvl_sidecar *s, client *c)
{
    while (c->leases != NULL) end(s, c->leases);
}

void sidecar_lease_tick(kvl_sidecar *s, int64_t now_ns)
{
    const uint32_t n = s->n_leases == 0 ? 0 : s->n_lease_chunks * SIDECAR_LEASE_CHUNK;
    for (uint32_t i = 0; i < n; i++) {
        lease *l = lease_at(s, i);
        if (l->number == 0 || now_ns < l->expires_ns) continue;
        l->client->tenant->leases_expired++;
        end(s, l);
    }
}

void sidecar_lease_deinit(kvl_sidecar *s)
{
    for (uint32_t i = 0; i < s->n_lease_chunks; i++) kvl_free(s->lease_chunks[i]);
    kvl_free(s->lease_chunks);
    s->lease_chunks = NULL;
    s->n_lease_chunks = 0;
}
