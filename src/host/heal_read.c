/* host/heal_read.c: which KV of another agent's answer a prompt takes: exact, or not healed yet. */
#include "host/host_parts.h"

#include <time.h>

/* How often a host that waits for a peer's healing looks whether it has been told of it. */
enum { LOOK_MS = 5 };

static bool may_take_unhealed(const run *r)
{
    return r->task->quality != KVLOOM__V1__QUALITY__QUALITY_EXACT &&
           r->task->quality != KVLOOM__V1__QUALITY__QUALITY_VERIFIED;
}

static bool take(run *r, run_part *part, const kvl_digest *id)
{
    kvl_tier *store = r->host->store;
    return store->ops->get(store, id, true, &part->container, NULL) == KVL_OK;
}

/* This host's own healing is done now; a peer says when it is done. */
static void wait_for_healed(run *r, const run_part *part)
{
    kvl_host *host = r->host;
    const int64_t max_ns = (int64_t)r->task->wait_healed_ms * KVL_NS_PER_MS;
    const int64_t past = kvl_clock_now(host->clock) + max_ns;
    heal_wait(host, &part->home, max_ns);
    while (kvl_clock_now(host->clock) < past && !host->store->ops->has(host->store, &part->id) &&
           !kvl_exchange_was_announced(host->exchange, &part->id)) {
        const struct timespec pause = {0, LOOK_MS * KVL_NS_PER_MS};
        (void)nanosleep(&pause, NULL);
    }
}

/* Exact KV that is at hand, or that a peer is known to have: no question goes out in vain. */
static bool take_exact(run *r, run_part *part)
{
    if (take(r, part, &part->id)) return true;
    if (!kvl_exchange_was_announced(r->host->exchange, &part->id)) return false;
    run_fetch(r, part, &part->id);
    return part->container != NULL;
}

void run_find_answer(run *r, run_part *part)
{
    if (take_exact(r, part)) return;
    const kvl_digest home = heal_unhealed_home(r->host, &part->home);
    const kvl_digest id = kvl_segment_id(r->host->tenant_key, &r->host->fingerprint, &home,
                                         r->ids + part->first, part->n_tokens);
    const bool is_here = r->host->store->ops->has(r->host->store, &id);
    const bool is_known = is_here || kvl_exchange_was_announced(r->host->exchange, &id);
    if (is_known && r->task->wait_healed_ms > 0) {
        wait_for_healed(r, part);
        if (take_exact(r, part)) return;
    }
    /* Peers that were not heard of may have the exact one; one who has the other at hand does not
     * ask them. */
    if (!is_known || !may_take_unhealed(r)) run_fetch(r, part, &part->id);
    if (part->container != NULL || !may_take_unhealed(r)) return;
    if (!take(r, part, &id)) run_fetch(r, part, &id);
    part->is_unhealed = part->container != NULL;
    /* Anchors are measured against this KV, so under its own name. */
    if (part->is_unhealed) part->id = id;
}
