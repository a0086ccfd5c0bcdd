/* host/resolve.c: where the KV of a slot comes from: this host's store, a peer, or, for a text that
 * nobody has read yet, this host itself, behind the run's home. */
#include "base/alloc.h"
#include "base/log.h"
#include "host/host_parts.h"

#include <string.h>

/* A peer that does not answer within this time costs more than computing would. */
enum { FETCH_TIMEOUT_MS = 3000 };
/* Less is latency more than it is bandwidth. */
enum { BYTES_THAT_TELL = 1 << 20 };

static bool fits(const kvl_host *host, const run *r, const run_part *part)
{
    const kvl_container_info *info = kvl_container_info_of(part->container);
    const kvl_model_shape *shape = host->engine->shape;
    return info->kind == KVL_CONTAINER_SEGMENT && info->n_tokens == part->n_tokens &&
           info->n_layers == shape->n_layers && info->n_kv_heads == shape->n_kv_heads &&
           info->head_dim == shape->head_dim && info->pairs == (uint32_t)shape->pairs &&
           kvl_digest_equal(&info->fingerprint, &host->fingerprint) &&
           info->is_unhealed == part->is_unhealed &&
           memcmp(info->tokens, r->ids + part->first, part->n_tokens * sizeof *r->ids) == 0;
}

/* Fetches from a peer and keeps the segment in memory: another run of this host may want it. */
void run_fetch(run *r, run_part *part, const kvl_digest *id)
{
    kvl_host *host = r->host;
    kvl_error error;
    const int64_t start = kvl_clock_now(host->clock);
    const int64_t deadline = start + FETCH_TIMEOUT_MS * KVL_NS_PER_MS;
    const kvl_status status = kvl_exchange_fetch(host->exchange, id, deadline, &part->container,
                                                 part->from, sizeof part->from, &error);
    if (status != KVL_OK) {
        kvl_log(KVL_LOG_INFO, "fetch_failed", "slot=%s status=%s", part->asked->slot,
                kvl_status_name(status));
        return;
    }
    size_t n_bytes = 0;
    (void)kvl_container_bytes(part->container, &n_bytes);
    part->fetched_bytes = n_bytes;
    if (n_bytes >= BYTES_THAT_TELL)
        host_learn_rate(&host->rates.fetch_bytes_per_ms, (double)n_bytes,
                        kvl_ns_to_ms(kvl_clock_now(host->clock) - start));
    (void)host->memory->ops->put(host->memory, part->container, NULL);
}

static kvl_status compute_at_home(run *r, run_part *part, kvl_error *error)
{
    kvl_host *host = r->host;
    const host_home *home = r->home;
    const uint32_t n = home->n_ids + part->n_tokens;
    if (n > host->engine->n_positions) {
        kvl_log(KVL_LOG_WARN, "too_long_behind_its_home", "slot=%s tokens=%u context=%u",
                part->asked->slot, n, host->engine->n_positions);
        return KVL_OK;
    }
    uint32_t *ids = kvl_alloc_zero(n, sizeof *ids);
    kvl_session *session = NULL;
    if (ids == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a slot's text");
    if (home->n_ids > 0) memcpy(ids, home->ids, home->n_ids * sizeof *ids);
    memcpy(ids + home->n_ids, r->ids + part->first, part->n_tokens * sizeof *ids);
    uint32_t n_shared = 0;
    kvl_status status = kvl_session_create(host->engine, &session, error);
    if (status == KVL_OK)
        status = kvl_session_begin(session, ids, n, 0, true, r->salt, &n_shared, error);
    if (status == KVL_OK) status = kvl_session_compute_range(session, n_shared, n, 0, NULL, error);
    if (status == KVL_OK) status = kvl_session_keep_prefix(session, r->salt, home->n_ids, error);
    if (status == KVL_OK)
        status = host_publish(host, session,
                              &(host_publication){.first = home->n_ids,
                                                  .n = part->n_tokens,
                                                  .home = part->home,
                                                  .is_canonical = true},
                              &part->container, error);
    if (status == KVL_OK) r->n_read++;
    kvl_session_destroy(session);
    kvl_free(ids);
    return status;
}

static void find(run *r, run_part *part)
{
    kvl_tier *store = r->host->store;
    if (run_find_donor(r, part)) return;
    if (!part->is_canonical)
        run_find_answer(r, part);
    else if (store->ops->get(store, &part->id, true, &part->container, NULL) != KVL_OK)
        run_fetch(r, part, &part->id);
}

static kvl_status resolve_part(run *r, run_part *part, bool may_compute, kvl_error *error)
{
    kvl_host *host = r->host;
    find(r, part);
    if (part->container != NULL && !fits(host, r, part)) {
        kvl_log(KVL_LOG_WARN, "segment_does_not_fit", "slot=%s", part->asked->slot);
        kvl_container_release(part->container);
        part->container = NULL;
        part->is_unhealed = part->is_donor = false;
    }
    if (part->container != NULL) host_remember_donor(host, part->container);
    if (part->container == NULL && part->is_canonical && may_compute)
        KVL_TRY(compute_at_home(r, part, error));
    /* A text that nobody has read yet is not one that went missing. */
    part->is_missing = part->container == NULL && !part->is_canonical;
    if (part->is_missing)
        kvl_log(KVL_LOG_WARN, "segment_not_available",
                "slot=%s tokens=%u remedy=\"computed densely\"", part->asked->slot, part->n_tokens);
    return KVL_OK;
}

kvl_status run_resolve(run *r, bool may_compute, kvl_error *error)
{
    const int64_t start = kvl_clock_now(r->host->clock);
    for (uint32_t p = 0; p < r->n_parts; p++) {
        run_part *part = &r->parts[p];
        const bool is_shared = part->first + part->n_tokens <= r->n_shared;
        if (!part->is_slot || part->n_tokens == 0 || is_shared) continue;
        if (part->container != NULL || part->is_missing) continue;
        KVL_TRY(resolve_part(r, part, may_compute, error));
    }
    for (uint32_t i = 0; may_compute && i < r->n_whole; i++) {
        if (r->whole[i].container == NULL)
            KVL_TRY(resolve_part(r, &r->whole[i], may_compute, error));
    }
    r->fetch_ns += kvl_clock_now(r->host->clock) - start;
    return KVL_OK;
}
