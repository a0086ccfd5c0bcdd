/* host/donor.c: donors are kept, found and forgotten, and means learnt. */
#include "host/donor.h"

#include "base/alloc.h"
#include "base/log.h"
#include "host/host_parts.h"

#include <string.h>

/* Shorter texts are computed sooner than they are looked for. */
enum { DONOR_TOKENS_LEAST = 16 };

static const char SCOPE[] = "kvloom.donor.1";

kvl_status donors_init(kvl_host *host, const kvl_host_options *options, kvl_error *error)
{
    static const char below[] = "/donors";
    host_in_context *kept = &host->in_context;
    const size_t n = strlen(options->store_path);
    kept->path = kvl_alloc(n + sizeof below);
    if (kept->path == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for donors");
    memcpy(kept->path, options->store_path, n);
    memcpy(kept->path + n, below, sizeof below);
    kept->bytes_max = options->donor_bytes_max;
    kept->memory_bytes_max = options->memory_bytes_max / 4;
    if (kept->memory_bytes_max > kept->bytes_max) kept->memory_bytes_max = kept->bytes_max;
    kept->is_default = options->donors && kept->bytes_max > 0;
    return KVL_OK;
}

void donors_deinit(kvl_host *host)
{
    host_in_context *kept = &host->in_context;
    if (kept->tier != NULL) kept->tier->ops->destroy(kept->tier);
    for (size_t i = 0; i < KVL_MEANS_MAX; i++) kvl_mean_deinit(&kept->means[i].mean);
    kvl_free(kept->path);
}

static kvl_status open_tiers(kvl_host *host, kvl_error *error)
{
    host_in_context *kept = &host->in_context;
    kvl_tier *tiers[2] = {NULL, NULL};
    const kvl_lmdb_tier_options lmdb = {
        .path = kept->path,
        .bytes_max = kept->bytes_max,
        .fingerprint = host->fingerprint,
        .durable = false,
    };
    KVL_TRY(kvl_memory_tier_create(kept->memory_bytes_max, &tiers[0], error));
    kvl_status status = kvl_lmdb_tier_create(&lmdb, &tiers[1], error);
    if (status == KVL_OK) status = kvl_stack_tier_create(tiers, 2, &kept->tier, error);
    if (status == KVL_OK) return KVL_OK;
    tiers[0]->ops->destroy(tiers[0]);
    if (tiers[1] != NULL) tiers[1]->ops->destroy(tiers[1]);
    return status;
}

/* NULL where there is none: the cap is 0, or it could not be opened. */
static kvl_tier *tier_of(kvl_host *host)
{
    host_in_context *kept = &host->in_context;
    if (kept->tier != NULL || kept->bytes_max == 0 || kept->is_broken) return kept->tier;
    kvl_error error;
    const kvl_status status = open_tiers(host, &error);
    if (status == KVL_OK) return kept->tier;
    kept->is_broken = true;
    kvl_log(KVL_LOG_WARN, "no_donors", "status=%s text=\"%s\"", kvl_status_name(status),
            error.text);
    return NULL;
}

void donors_stats(const kvl_host *host, kvl_tier_stats *stats)
{
    *stats = (kvl_tier_stats){0};
    kvl_tier *tier = host->in_context.tier;
    if (tier != NULL) tier->ops->stats(tier, stats);
}

/* ---- what a task wants ---- */

static kvl_digest scope_of(const kvl_host *host, const Kvloom__V1__RunTask *task)
{
    kvl_digester digester;
    kvl_digester_init(&digester, host->tenant_key, sizeof host->tenant_key);
    const char *const names[] = {SCOPE, task->workflow, task->collection};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        kvl_digester_add(&digester, names[i], strlen(names[i]) + 1);
    return kvl_digester_end(&digester);
}

kvl_status run_find_scope(run *r, kvl_error *error)
{
    const Kvloom__V1__RunTask *task = r->task;
    if (strlen(task->collection) > 64)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "collection has at most 64 bytes");
    Kvloom__V1__Donors wanted = task->donors;
    if (wanted == KVLOOM__V1__DONORS__DONORS_DEFAULT)
        wanted = r->host->in_context.is_default && task->collection[0] != '\0'
                     ? KVLOOM__V1__DONORS__DONORS_ON
                     : KVLOOM__V1__DONORS__DONORS_OFF;
    if (task->workflow[0] == '\0' && task->collection[0] == '\0') return KVL_OK;
    r->scope = scope_of(r->host, task);
    r->has_scope = true;
    r->keeps_donors = wanted == KVLOOM__V1__DONORS__DONORS_ON;
    r->reads_donors = r->keeps_donors || wanted == KVLOOM__V1__DONORS__DONORS_READ;
    r->learns_mean =
        r->correction->kind == KVL_CORRECT_MEAN && wanted != KVLOOM__V1__DONORS__DONORS_READ;
    return KVL_OK;
}

static kvl_digest donor_id(const kvl_host *host, const kvl_digest *scope, const uint32_t *ids,
                           uint32_t n)
{
    return kvl_segment_id(host->tenant_key, &host->fingerprint, scope, ids, n);
}

bool run_find_donor(run *r, run_part *part)
{
    const bool answers = r->task->mode == KVLOOM__V1__MODE__MODE_REUSE ||
                         r->task->mode == KVLOOM__V1__MODE__MODE_PLAN;
    if (!r->reads_donors || !answers || r->select == NULL) return false;
    kvl_tier *tier = tier_of(r->host);
    if (tier == NULL) return false;
    const kvl_digest id = donor_id(r->host, &r->scope, r->ids + part->first, part->n_tokens);
    part->is_donor = tier->ops->get(tier, &id, true, &part->container, NULL) == KVL_OK;
    return part->is_donor;
}

static void add_texts(const run_part *parts, uint32_t n_parts, exact_lesson *lesson)
{
    for (uint32_t p = 0; p < n_parts && lesson->n_texts < KVL_LESSON_TEXTS_MAX; p++) {
        const run_part *part = &parts[p];
        if (!part->is_slot || part->is_aligned || part->n_tokens < DONOR_TOKENS_LEAST) continue;
        lesson->texts[lesson->n_texts].first = part->first;
        lesson->texts[lesson->n_texts].n = part->n_tokens;
        lesson->texts[lesson->n_texts++].at_home = part->id;
    }
}

void run_make_lesson(const run *r, exact_lesson *lesson)
{
    *lesson = (exact_lesson){
        .keeps_donors = r->keeps_donors, .learns_mean = r->learns_mean, .scope = r->scope};
    if (!lesson->keeps_donors && !lesson->learns_mean) return;
    add_texts(r->parts, r->n_parts, lesson);
    add_texts(r->whole, r->n_whole, lesson);
}

/* ---- lessons ---- */

/* Tokens before a donor when it was kept. */
static uint32_t depth_of(const kvl_container *container)
{
    const kvl_container_info *info = kvl_container_info_of(container);
    uint32_t depth = 0;
    if (info->n_extra_bytes == sizeof depth) memcpy(&depth, info->extra, sizeof depth);
    return depth;
}

/* Whether there is one that more tokens stood before. */
static bool has_deeper(kvl_tier *tier, const kvl_digest *id, uint32_t first)
{
    kvl_container *known = NULL;
    if (tier->ops->get(tier, id, false, &known, NULL) != KVL_OK) return false;
    const bool is_deeper = depth_of(known) > first;
    kvl_container_release(known);
    return is_deeper;
}

static kvl_status keep_donor(kvl_host *host, kvl_tier *tier, kvl_session *session,
                             const kvl_digest *scope, uint32_t first, uint32_t n, bool *is_kept,
                             kvl_error *error)
{
    const kvl_digest id = donor_id(host, scope, kvl_session_tokens(session) + first, n);
    *is_kept = false;
    if (has_deeper(tier, &id, first)) return KVL_OK;
    const host_publication what = {
        .first = first,
        .n = n,
        .home = *scope,
        .extra = &first,
        .n_extra_bytes = sizeof first,
    };
    kvl_container *container = NULL;
    KVL_TRY(host_encode(host, session, &what, &container, error));
    (void)!tier->ops->remove(tier, &id, NULL); /* there may be none */
    const kvl_status status = tier->ops->put(tier, container, error);
    kvl_container_release(container);
    *is_kept = status == KVL_OK;
    return status;
}

static host_mean *find_mean(host_in_context *kept, const kvl_digest *scope, const kvl_digest *home)
{
    for (size_t i = 0; i < KVL_MEANS_MAX; i++) {
        host_mean *m = &kept->means[i];
        if (m->mean.keys == NULL || !kvl_digest_equal(&m->scope, scope) ||
            !kvl_digest_equal(&m->home, home))
            continue;
        m->last_use = ++kept->n_uses;
        return m;
    }
    return NULL;
}

/* No digest of anything: what answers have in common. */
static kvl_digest home_of(const kvl_container_info *segment)
{
    kvl_digest home = segment->home;
    if (!segment->home_is_canonical) memset(&home, 0xff, sizeof home);
    return home;
}

const kvl_mean *donors_mean(kvl_host *host, const kvl_digest *scope,
                            const kvl_container_info *segment)
{
    const kvl_digest home = home_of(segment);
    const host_mean *known =
        segment->is_unhealed ? NULL : find_mean(&host->in_context, scope, &home);
    return known == NULL ? NULL : &known->mean;
}

/* The mean, or a new one in the place of the one that was not used for longest. */
static kvl_status have_mean(kvl_host *host, const kvl_digest *scope, const kvl_digest *home,
                            kvl_mean **mean, kvl_error *error)
{
    host_in_context *kept = &host->in_context;
    host_mean *known = find_mean(kept, scope, home);
    if (known == NULL) {
        known = &kept->means[0];
        for (size_t i = 1; i < KVL_MEANS_MAX; i++) {
            if (kept->means[i].last_use < known->last_use) known = &kept->means[i];
        }
        const kvl_model_shape *shape = host->engine->shape;
        kvl_mean_deinit(&known->mean);
        *known = (host_mean){.scope = *scope, .home = *home};
        KVL_TRY(kvl_mean_init(&known->mean, shape->n_layers, shape->n_kv_heads, shape->head_dim,
                              error));
        known->last_use = ++kept->n_uses;
    }
    *mean = &known->mean;
    return KVL_OK;
}

/* A text whose KV at home is not in the store teaches nothing. */
static kvl_status learn_mean(kvl_host *host, kvl_session *session, const kvl_digest *scope,
                             const kvl_digest *at_home, uint32_t first, uint32_t n,
                             kvl_error *error)
{
    const kvl_model_shape *shape = host->engine->shape;
    kv_buffer *base = &host->bases[0];
    kvl_container *container = NULL;
    if (host->store->ops->get(host->store, at_home, true, &container, NULL) != KVL_OK)
        return KVL_OK;
    const kvl_container_info *info = kvl_container_info_of(container);
    const kvl_digest home = home_of(info);
    kvl_mean *mean = NULL;
    kvl_status status = KVL_OK;
    const bool is_right = info->kind == KVL_CONTAINER_SEGMENT && !info->is_unhealed &&
                          info->n_tokens == n && info->n_layers == shape->n_layers &&
                          info->n_kv_heads == shape->n_kv_heads &&
                          info->head_dim == shape->head_dim;
    if (is_right) status = kv_buffer_load(base, host->engine, container, error);
    if (is_right && status == KVL_OK) status = kv_buffer_reserve(&host->corrected, shape, n, error);
    if (is_right && status == KVL_OK) status = have_mean(host, scope, &home, &mean, error);
    if (mean != NULL) {
        kvl_session_extract(session, first, n, host->corrected.keys, host->corrected.values);
        const kvl_kv_view at = kv_buffer_view(base, shape, n);
        const kvl_kv_view in = kv_buffer_view(&host->corrected, shape, n);
        kvl_mean_learn(mean, &in, &at);
    }
    kvl_container_release(container);
    return status;
}

uint32_t donors_learn(kvl_host *host, kvl_session *session, const exact_lesson *lesson)
{
    kvl_tier *tier = lesson->keeps_donors ? tier_of(host) : NULL;
    uint32_t n_kept = 0;
    for (uint32_t i = 0; i < lesson->n_texts; i++) {
        const uint32_t first = lesson->texts[i].first;
        const uint32_t n = lesson->texts[i].n;
        kvl_error error = {0};
        kvl_status status = KVL_OK;
        bool is_kept = false;
        if (lesson->learns_mean)
            status = learn_mean(host, session, &lesson->scope, &lesson->texts[i].at_home, first, n,
                                &error);
        if (status == KVL_OK && tier != NULL)
            status = keep_donor(host, tier, session, &lesson->scope, first, n, &is_kept, &error);
        n_kept += is_kept ? 1 : 0;
        if (status != KVL_OK)
            kvl_log(KVL_LOG_WARN, "donor_not_kept", "status=%s text=\"%s\"",
                    kvl_status_name(status), error.text);
    }
    return n_kept;
}

/* ---- forgetting ---- */

/* What two segments of the same tokens have in common, whatever their homes are. */
static bool text_of(const kvl_host *host, kvl_tier *tier, const kvl_digest *id, kvl_digest *text)
{
    const kvl_digest nothing = {{0}};
    kvl_container *container = NULL;
    if (tier->ops->get(tier, id, false, &container, NULL) != KVL_OK) return false;
    const kvl_container_info *info = kvl_container_info_of(container);
    const bool is_text = info->kind == KVL_CONTAINER_SEGMENT;
    if (is_text) *text = donor_id(host, &nothing, info->tokens, info->n_tokens);
    kvl_container_release(container);
    return is_text;
}

void donors_forget(kvl_host *host, const kvl_digest *ids, size_t n)
{
    const host_in_context *kept = &host->in_context;
    uint64_t n_bytes = 0;
    /* A host that never had a donor makes no database to forget one. */
    if (n == 0 || (kept->tier == NULL &&
                   kvl_lmdb_tier_check(kept->path, &n_bytes, NULL) == KVL_ERR_NOT_FOUND))
        return;
    kvl_tier *tier = tier_of(host);
    kvl_digest *texts = tier == NULL ? NULL : kvl_alloc_zero(n, sizeof *texts);
    if (texts == NULL) return;
    size_t n_texts = 0;
    for (size_t i = 0; i < n; i++)
        n_texts += text_of(host, host->store, &ids[i], &texts[n_texts]) ? 1 : 0;
    const host_ids all = host_list_ids(tier, KVL_CONTAINER_SEGMENT);
    for (size_t i = 0; i < all.n && n_texts > 0; i++) {
        kvl_digest text;
        if (!text_of(host, tier, &all.ids[i], &text)) continue;
        for (size_t t = 0; t < n_texts; t++) {
            if (!kvl_digest_equal(&text, &texts[t])) continue;
            (void)!tier->ops->remove(tier, &all.ids[i], NULL);
            break;
        }
    }
    kvl_free(all.ids);
    kvl_free(texts);
}
