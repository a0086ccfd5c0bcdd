/* host/host.c: makes a host out of the rooms, and does its tasks one after another. */
#include "host/host.h"

#include "base/alloc.h"
#include "base/log.h"
#include "host/host_parts.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

kvl_host_options kvl_host_default_options(void)
{
    return (kvl_host_options){
        .store_bytes_max = UINT64_C(4) << 30,
        .memory_bytes_max = UINT64_C(1) << 30,
        .anchors = kvl_anchor_default_options(),
        /* Half of float16's bytes to fetch and to keep, at a KL below 0.001 to full prefill. */
        .segment_dtype = KVL_KV_INT8,
        .audit_share = 0.05,
        .donors = true,
        .donor_bytes_max = UINT64_C(1) << 30,
        .heal_share = 0.1,
    };
}

/* On the exchange thread: copies the body and leaves. */
static void accept_task(void *context, uint64_t id, const void *body, size_t n_bytes)
{
    kvl_host *host = context;
    const kvl_status status = waiting_push(host, id, body, n_bytes);
    if (status == KVL_OK) {
        if (host->service != NULL) kvl_service_wake(host->service);
        return;
    }
    kvl_exchange_reply(host->exchange, id, status, "this host has no room for another task", NULL,
                       0);
}

static kvl_status open_store(kvl_host *host, const kvl_host_options *options, kvl_error *error)
{
    kvl_tier *tiers[2] = {NULL, NULL};
    const kvl_lmdb_tier_options lmdb = {
        .path = options->store_path,
        .bytes_max = options->store_bytes_max,
        .fingerprint = host->fingerprint,
        .durable = false,
    };
    KVL_TRY(kvl_memory_tier_create(options->memory_bytes_max, &tiers[0], error));
    kvl_status status = kvl_lmdb_tier_create(&lmdb, &tiers[1], error);
    if (status == KVL_OK) status = kvl_stack_tier_create(tiers, 2, &host->store, error);
    if (status != KVL_OK) {
        tiers[0]->ops->destroy(tiers[0]);
        if (tiers[1] != NULL) tiers[1]->ops->destroy(tiers[1]);
        return status;
    }
    host->memory = tiers[0];
    return KVL_OK;
}

static bool collect_id(void *context, const kvl_digest *id, kvl_container_kind kind,
                       uint64_t n_bytes)
{
    (void)n_bytes;
    host_ids *found = context;
    if (kind != found->kind) return true;
    if (found->n == found->n_max) {
        const size_t n_max = found->n_max == 0 ? 64 : 2 * found->n_max;
        kvl_digest *grown = kvl_realloc(found->ids, n_max * sizeof *grown);
        if (grown == NULL) return false;
        found->ids = grown;
        found->n_max = n_max;
    }
    found->ids[found->n++] = *id;
    return true;
}

host_ids host_list_ids(kvl_tier *tier, kvl_container_kind kind)
{
    host_ids found = {.kind = kind};
    tier->ops->list(tier, collect_id, &found);
    return found;
}

/* Anchors survive a restart: what the store has goes into the pool. */
static void load_anchors(kvl_host *host)
{
    const host_ids found = host_list_ids(host->store, KVL_CONTAINER_ANCHOR);
    for (size_t i = 0; i < found.n; i++) {
        kvl_container *container = NULL;
        kvl_error error = {0};
        kvl_status status =
            host->store->ops->get(host->store, &found.ids[i], true, &container, &error);
        if (status == KVL_OK)
            status = kvl_anchor_pool_add(host->anchors, &host->fingerprint, container, &error);
        if (status != KVL_OK)
            kvl_log(KVL_LOG_WARN, "anchor_not_loaded", "status=%s text=\"%s\"",
                    kvl_status_name(status), error.text);
        kvl_container_release(container);
    }
    kvl_free(found.ids);
}

static bool do_waiting_tasks(void *context, bool is_idle);

static kvl_status create_parts(kvl_host *host, const kvl_host_options *options, kvl_error *error)
{
    KVL_TRY(kvl_engine_create(&options->engine, &host->engine, error));
    host->fingerprint = kvl_model_fingerprint(host->engine->model);
    host->logits = kvl_alloc_aligned(host->engine->shape->n_vocab * sizeof(float));
    if (host->logits == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for logits");
    KVL_TRY(host_homes_init(host, error));
    KVL_TRY(open_store(host, options, error));
    KVL_TRY(donors_init(host, options, error));
    char model[KVL_DIGEST_TEXT_BYTES];
    KVL_TRY(quality_init(&host->quality, options->store_path, options->audit_share,
                         kvl_digest_to_text(&host->fingerprint, model), error));
    kvl_anchor_options anchors = options->anchors;
    anchors.threads = host->engine->threads;
    KVL_TRY(kvl_anchor_pool_create(&anchors, &host->anchors, error));
    load_anchors(host);
    KVL_TRY(kvl_align_create(KVL_DONORS_MAX, &host->donors, error));
    KVL_TRY(waiting_init(&host->waiting, options->in_order, error));
    if (kvl_queue_create(KVL_HOST_TASKS_MAX, &host->tasks) != KVL_OK)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the task queue");
    if (options->scheduler != NULL) {
        KVL_TRY(kvl_service_create(host->engine, options->scheduler, &host->service, error));
        kvl_service_attach(host->service, do_waiting_tasks, host);
        kvl_service_fill(host->service, host_fill, host);
    }
    const kvl_exchange_options exchange = {
        .name = options->name,
        .endpoint = options->endpoint,
        .peers = options->peers,
        .n_peers = options->n_peers,
        .store = host->store,
        .fingerprint = host->fingerprint,
        .clock = host->clock,
        .task = accept_task,
        .task_context = host,
    };
    return kvl_exchange_start(&exchange, &host->exchange, error);
}

kvl_status kvl_host_create(const kvl_host_options *options, kvl_host **host, kvl_error *error)
{
    *host = NULL;
    if (!(options->heal_share >= 0.0 && options->heal_share <= 0.9))
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "heal_share is %g; it must be 0 to 0.9",
                        options->heal_share);
    if (options->name == NULL || strlen(options->name) >= KVL_SLOT_NAME_MAX)
        return KVL_FAIL(error, KVL_ERR_INVALID, "the host's name must have 1 to %u bytes",
                        KVL_SLOT_NAME_MAX - 1);
    kvl_host *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a host");
    made->clock = kvl_clock_system();
    (void)pthread_mutex_init(&made->seen.lock, NULL);
    made->segment_dtype = options->segment_dtype;
    made->heals.share = options->heal_share;
    made->rates = host_first_rates();
    made->stream = options->stream;
    made->stream_context = options->stream_context;
    memcpy(made->tenant_key, options->tenant_key, sizeof made->tenant_key);
    memcpy(made->name, options->name, strlen(options->name) + 1);
    kvl_log_set_host(options->name);
    for (; made->n_peers < options->n_peers && made->n_peers < KVL_PEERS_MAX; made->n_peers++)
        (void)snprintf(made->peer_names[made->n_peers], KVL_SLOT_NAME_MAX, "%s",
                       options->peers[made->n_peers].name);
    const kvl_status status = create_parts(made, options, error);
    if (status != KVL_OK) {
        kvl_host_destroy(made);
        return status;
    }
    host_show(made);
    *host = made;
    return KVL_OK;
}

void kvl_host_destroy(kvl_host *host)
{
    if (host == NULL) return;
    if (host->tasks != NULL) kvl_queue_close(host->tasks);
    kvl_exchange_stop(host->exchange);
    if (host->tasks != NULL) {
        for (void *task = kvl_queue_pop(host->tasks); task != NULL;
             task = kvl_queue_pop(host->tasks))
            waiting_task_destroy(task);
    }
    waiting_deinit(&host->waiting);
    kvl_queue_destroy(host->tasks);
    kvl_service_destroy(host->service);
    heal_deinit(host);
    plans_deinit(host);
    host_reads_deinit(host);
    if (host->quality.path != NULL) host_save_quality(host);
    quality_deinit(&host->quality);
    kvl_anchor_pool_destroy(host->anchors);
    kvl_align_destroy(host->donors);
    donors_deinit(host);
    if (host->store != NULL) host->store->ops->destroy(host->store);
    for (size_t i = 0; i < KVL_PARTS_MAX; i++) kv_buffer_deinit(&host->bases[i]);
    kv_buffer_deinit(&host->corrected);
    reference_deinit(&host->reference);
    kvl_free(host->logits);
    host_homes_deinit(host);
    kvl_engine_destroy(host->engine);
    (void)pthread_mutex_destroy(&host->seen.lock);
    kvl_free(host);
}

static void reply(kvl_host *host, uint64_t task, kvl_status status, const kvl_error *error,
                  const Kvloom__V1__HostReply *message)
{
    if (status != KVL_OK) {
        kvl_exchange_reply(host->exchange, task, status, error->text, NULL, 0);
        return;
    }
    const size_t n_bytes = kvloom__v1__host_reply__get_packed_size(message);
    uint8_t *body = kvl_alloc(n_bytes == 0 ? 1 : n_bytes);
    if (body == NULL) {
        kvl_exchange_reply(host->exchange, task, KVL_ERR_NO_MEMORY, "no memory for the reply", NULL,
                           0);
        return;
    }
    (void)kvloom__v1__host_reply__pack(message, body);
    kvl_exchange_reply(host->exchange, task, KVL_OK, NULL, body, n_bytes);
    kvl_free(body);
}

/* A second host keeps a copy of an anchor, so that its maker can have it back after losing its
 * disk. */
static kvl_status keep_container(kvl_host *host, const ProtobufCBinaryData *asked, kvl_error *error)
{
    enum { KEEP_TIMEOUT_MS = 10000 };
    if (asked->len != KVL_DIGEST_BYTES)
        return KVL_FAIL(error, KVL_ERR_INVALID, "the id has %zu bytes, must have %u", asked->len,
                        KVL_DIGEST_BYTES);
    kvl_digest id;
    memcpy(id.bytes, asked->data, sizeof id.bytes);
    if (host->store->ops->has(host->store, &id)) return KVL_OK;
    kvl_container *container = NULL;
    const int64_t deadline = kvl_clock_now(host->clock) + KEEP_TIMEOUT_MS * KVL_NS_PER_MS;
    KVL_TRY(kvl_exchange_fetch(host->exchange, &id, deadline, &container, NULL, 0, error));
    const kvl_status status = host->store->ops->put(host->store, container, error);
    kvl_container_release(container);
    return status;
}

void host_save_quality(const kvl_host *host)
{
    char model[KVL_DIGEST_TEXT_BYTES];
    quality_save(&host->quality, kvl_digest_to_text(&host->fingerprint, model));
}

static kvl_status forget(kvl_host *host, const Kvloom__V1__ForgetTask *asked, uint32_t *n_forgotten,
                         kvl_error *error)
{
    if (asked->n_ids > KVL_FORGET_MAX)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "%zu ids to forget, at most %u at once",
                        asked->n_ids, KVL_FORGET_MAX);
    *n_forgotten = 0;
    kvl_digest ids[KVL_FORGET_MAX];
    for (size_t i = 0; i < asked->n_ids; i++) {
        if (asked->ids[i].len != KVL_DIGEST_BYTES)
            return KVL_FAIL(error, KVL_ERR_INVALID, "id %zu has %zu bytes, must have %u", i,
                            asked->ids[i].len, KVL_DIGEST_BYTES);
        memcpy(ids[i].bytes, asked->ids[i].data, sizeof ids[i].bytes);
    }
    donors_forget(host, ids, asked->n_ids);
    for (size_t i = 0; i < asked->n_ids; i++) {
        kvl_align_remove(host->donors, &ids[i]);
        const kvl_status status = host->store->ops->remove(host->store, &ids[i], error);
        if (status != KVL_OK && status != KVL_ERR_NOT_FOUND) return status;
        *n_forgotten += status == KVL_OK ? 1 : 0;
    }
    return KVL_OK;
}

static kvl_status fill_status(kvl_host *host, Kvloom__V1__StatusReply *status, kvl_error *error)
{
    kvl_anchor_stats anchors = {0};
    kvl_tier_stats store = {0};
    kvl_anchor_pool_stats(host->anchors, &anchors);
    host->store->ops->stats(host->store, &store);
    kvl_tier_stats donors;
    donors_stats(host, &donors);
    status->donors = donors.n_containers;
    status->donor_bytes = donors.bytes;
    status->name = host->name;
    status->n_anchors = anchors.n_anchors;
    status->anchor_bytes = anchors.bytes;
    status->store_containers = store.n_containers;
    status->store_bytes = store.bytes;
    status->free_pages = kvl_page_pool_n_free(host->engine->pool);
    status->tree_pages = kvl_prefix_tree_n_pages(host->engine->tree);
    status->model = (char *)(uintptr_t)host->engine->shape->name;
    const heal_queue *heals = &host->heals;
    status->healed = heals->n_healed;
    status->heals_waiting = heals->n;
    status->heals_dropped = heals->n_dropped;
    status->heals_failed = heals->n_failed;
    status->healed_tokens = heals->n_tokens;
    status->differed_tokens = heals->n_differed;
    status->heal_beside_ms = kvl_ns_to_ms(heals->beside_ns);
    status->tasks_moved = host->waiting.n_moved;
    kvl_tier_stats memory = {0};
    host->memory->ops->stats(host->memory, &memory);
    status->store_hits = store.hits;
    status->memory_hits = memory.hits;
    status->memory_misses = memory.misses;
    return quality_fill_status(&host->quality, status, error);
}

static kvl_status ask_heal(kvl_host *host, const Kvloom__V1__HealTask *asked,
                           Kvloom__V1__HealReply *healing, kvl_error *error)
{
    kvl_digest home;
    if (asked->home.len != sizeof home.bytes)
        return KVL_FAIL(error, KVL_ERR_INVALID, "the home has %zu bytes, must have %u",
                        asked->home.len, KVL_DIGEST_BYTES);
    memcpy(home.bytes, asked->home.data, sizeof home.bytes);
    heal_wait(host, &home, (int64_t)asked->wait_ms * KVL_NS_PER_MS);
    heal_tell(host, &home, healing);
    return KVL_OK;
}

static void do_task(kvl_host *host, const waiting_task *task)
{
    kvl_error error = {0};
    const Kvloom__V1__HostTask *asked = task->asked;
    Kvloom__V1__HostReply answer = KVLOOM__V1__HOST_REPLY__INIT;
    Kvloom__V1__RunReply ran = KVLOOM__V1__RUN_REPLY__INIT;
    Kvloom__V1__StatusReply state = KVLOOM__V1__STATUS_REPLY__INIT;
    Kvloom__V1__HealReply healing = KVLOOM__V1__HEAL_REPLY__INIT;
    Kvloom__V1__PlanReply *plan = NULL;
    kvl_status status = KVL_OK;
    switch (asked == NULL ? KVLOOM__V1__HOST_TASK__WHAT__NOT_SET : asked->what_case) {
    case KVLOOM__V1__HOST_TASK__WHAT_RUN:
        status = host_run_task(host, asked->run, &ran, &error);
        answer.what_case = KVLOOM__V1__HOST_REPLY__WHAT_RUN;
        answer.run = &ran;
        break;
    case KVLOOM__V1__HOST_TASK__WHAT_KEEP:
        status = keep_container(host, &asked->keep->id, &error);
        answer.what_case = KVLOOM__V1__HOST_REPLY__WHAT_KEPT;
        answer.kept = true;
        break;
    case KVLOOM__V1__HOST_TASK__WHAT_STATUS:
        status = fill_status(host, &state, &error);
        answer.what_case = KVLOOM__V1__HOST_REPLY__WHAT_STATUS;
        answer.status = &state;
        break;
    case KVLOOM__V1__HOST_TASK__WHAT_HEAL:
        status = ask_heal(host, asked->heal, &healing, &error);
        answer.what_case = KVLOOM__V1__HOST_REPLY__WHAT_HEAL;
        answer.heal = &healing;
        break;
    case KVLOOM__V1__HOST_TASK__WHAT_PLAN:
        status = plans_find(host, asked->plan->request_id, &plan, &error);
        answer.what_case = KVLOOM__V1__HOST_REPLY__WHAT_PLAN;
        answer.plan = plan;
        break;
    case KVLOOM__V1__HOST_TASK__WHAT_FORGET:
        status = forget(host, asked->forget, &answer.forgotten, &error);
        answer.what_case = KVLOOM__V1__HOST_REPLY__WHAT_FORGOTTEN;
        break;
    case KVLOOM__V1__HOST_TASK__WHAT_STOP:
        host->stopping = true;
        answer.what_case = KVLOOM__V1__HOST_REPLY__WHAT_STOPPING;
        answer.stopping = true;
        break;
    default:
        status = KVL_FAIL(&error, KVL_ERR_MALFORMED, "this task is not one that this host knows");
    }
    host_show(host); /* before the reply, so that who has it sees what came of it */
    reply(host, task->id, status, &error, &answer);
    host_reply_deinit(&ran);
    quality_free_status(&state);
    if (plan != NULL) kvloom__v1__plan_reply__free_unpacked(plan, NULL);
}

static bool heal_when_idle(kvl_host *host)
{
    const bool has_more = heal_step(host);
    host_show(host);
    return has_more;
}

/* Between two steps of the service. Heals where there is nothing else to do, and its share beside
 * steps and tasks; true while some of it is left. */
static bool do_waiting_tasks(void *context, bool is_idle)
{
    kvl_host *host = context;
    const int64_t start = kvl_clock_now(host->clock);
    int64_t worked_ns = host->left_ns == 0 || is_idle ? 0 : start - host->left_ns;
    while (!host->stopping) {
        waiting_task *task = waiting_next(host, false);
        if (task == NULL) break;
        const int64_t before = kvl_clock_now(host->clock);
        do_task(host, task);
        waiting_task_destroy(task);
        worked_ns += kvl_clock_now(host->clock) - before;
    }
    if (host->stopping) {
        kvl_service_stop(host->service);
        return false;
    }
    if (!is_idle && host->heals.first != NULL) {
        heal_beside(host, worked_ns);
        host_show(host);
    }
    if (is_idle) host_read_step(host);
    const bool heals = is_idle ? heal_when_idle(host) : host->heals.first != NULL;
    host->left_ns = kvl_clock_now(host->clock);
    return heals || host->reads.n > 0;
}

const kvl_model *kvl_host_model(const kvl_host *host)
{
    return host->engine->model;
}

kvl_service *kvl_host_service(kvl_host *host)
{
    return host->service;
}

void kvl_host_run(kvl_host *host)
{
    if (host->service != NULL) {
        kvl_service_run(host->service);
        return;
    }
    bool heals = false;
    while (!host->stopping) {
        waiting_task *task = waiting_next(host, !heals);
        if (task == NULL && !heals) return;
        if (task == NULL) {
            heals = heal_when_idle(host) && !atomic_load(&host->is_closed);
            continue;
        }
        const int64_t before = kvl_clock_now(host->clock);
        do_task(host, task);
        waiting_task_destroy(task);
        if (waiting_any(host)) heal_beside(host, kvl_clock_now(host->clock) - before);
        heals = host->heals.first != NULL;
    }
}

void kvl_host_stop(kvl_host *host)
{
    atomic_store(&host->is_closed, true);
    kvl_queue_close(host->tasks);
    if (host->service != NULL) kvl_service_stop(host->service);
}
