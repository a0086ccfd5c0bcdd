/* sidecar/sidecar.c: life and loop. */
#include "sidecar/state.h"

#include "base/alloc.h"
#include "base/log.h"
#include "base/random.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

enum { EVENTS_PER_TURN = 64, WORKERS_DEFAULT = 2, WAKE_TAG = KVL_SIDECAR_TENANTS_MAX };

/* ---- making ---- */

static kvl_status check(const kvl_sidecar_options *options, kvl_error *error)
{
    if (options->n_tenants == 0 || options->n_tenants > KVL_SIDECAR_TENANTS_MAX) {
        return KVL_FAIL(error, KVL_ERR_INVALID, "%zu tenants, must be 1 .. %u", options->n_tenants,
                        KVL_SIDECAR_TENANTS_MAX);
    }
    if (options->n_workers > KVL_SIDECAR_WORKERS_MAX) {
        return KVL_FAIL(error, KVL_ERR_INVALID, "%u workers, must be at most %u",
                        options->n_workers, KVL_SIDECAR_WORKERS_MAX);
    }
    if (options->name == NULL || strlen(options->name) > SIDECAR_NAME_BYTES_MAX) {
        return KVL_FAIL(error, KVL_ERR_INVALID, "a sidecar needs a name of at most %u bytes",
                        SIDECAR_NAME_BYTES_MAX);
    }
    for (size_t i = 0; i < options->n_tenants; i++) {
        const kvl_sidecar_tenant *t = &options->tenants[i];
        if (t->name == NULL || t->name[0] == '\0' || strlen(t->name) > SIDECAR_NAME_BYTES_MAX ||
            t->socket == NULL || t->key == NULL) {
            return KVL_FAIL(error, KVL_ERR_INVALID,
                            "tenant %zu needs a name of 1 .. %u bytes, a socket and a key", i,
                            SIDECAR_NAME_BYTES_MAX);
        }
        for (size_t k = 0; k < i; k++) {
            if (strcmp(options->tenants[k].name, t->name) != 0) continue;
            return KVL_FAIL(error, KVL_ERR_INVALID, "two tenants are called %s", t->name);
        }
    }
    return KVL_OK;
}

/* Each container that can be lent is an open file. */
static void raise_descriptor_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
    limit.rlim_cur = limit.rlim_max;
    (void)setrlimit(RLIMIT_NOFILE, &limit);
}

static kvl_status open_store(const kvl_sidecar_options *options, const kvl_sidecar_tenant *from,
                             tenant *t, kvl_error *error)
{
    kvl_tier *tiers[2];
    size_t n = 0;
    const kvl_memory_tier_options memory = {
        .bytes_max = from->memory_bytes_max, .policy = from->policy, .keeps_held = true};
    KVL_TRY(kvl_memory_tier_create_with(&memory, &tiers[n++], error));
    t->memory = tiers[0];
    kvl_status status = KVL_OK;
    if (from->store_path != NULL) {
        const kvl_lmdb_tier_options of = {.path = from->store_path,
                                          .bytes_max = from->disk_bytes_max,
                                          .fingerprint = options->fingerprint,
                                          .durable = from->is_durable,
                                          .seal_key = from->seals_disk ? from->key : NULL};
        status = kvl_lmdb_tier_create(&of, &tiers[n], error);
        if (status == KVL_OK) t->disk = tiers[n++];
    }
    if (status == KVL_OK) status = kvl_stack_tier_create(tiers, n, &t->store, error);
    if (status < 0) {
        for (size_t i = 0; i < n; i++) {
            if (tiers[i] != NULL) tiers[i]->ops->destroy(tiers[i]);
        }
        t->memory = t->disk = NULL;
    }
    return status;
}

static kvl_status add_to_epoll(kvl_sidecar *s, int fd, uint64_t tag, kvl_error *error)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = tag};
    if (epoll_ctl(s->epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_IO, "cannot watch a socket: %s", strerror(errno));
}

static kvl_status open_tenant(kvl_sidecar *s, const kvl_sidecar_options *options, uint32_t i,
                              kvl_error *error)
{
    const kvl_sidecar_tenant *from = &options->tenants[i];
    tenant *t = &s->tenants[i];
    t->listen_fd = -1;
    s->n_tenants = i + 1;
    (void)snprintf(t->name, sizeof t->name, "%s", from->name);
    memcpy(t->key, from->key, sizeof t->key);
    KVL_TRY(open_store(options, from, t, error));
    KVL_TRY(kvl_local_listen(from->socket, from->socket_mode == 0 ? 0600 : from->socket_mode,
                             &t->listen_fd, error));
    (void)snprintf(t->socket_path, sizeof t->socket_path, "%s", from->socket);
    return add_to_epoll(s, t->listen_fd, i, error);
}

static kvl_status open_exchange(kvl_sidecar *s, const kvl_sidecar_options *options,
                                kvl_error *error)
{
    if (options->endpoint == NULL && options->n_peers == 0) return KVL_OK;
    if (options->allow_list != NULL)
        KVL_TRY(kvl_allow_list_open(options->allow_list, &s->allow_list, error));
    kvl_exchange_tenant tenants[KVL_SIDECAR_TENANTS_MAX];
    for (uint32_t i = 0; i < s->n_tenants; i++)
        tenants[i] = (kvl_exchange_tenant){s->tenants[i].name, s->tenants[i].store};
    const kvl_exchange_options of = {.name = s->name,
                                     .endpoint = options->endpoint,
                                     .peers = options->peers,
                                     .n_peers = options->n_peers,
                                     .store = s->tenants[0].store,
                                     .tenants = tenants,
                                     .n_tenants = s->n_tenants,
                                     .keys = options->keys,
                                     .allow_list = s->allow_list,
                                     .fingerprint = s->fingerprint,
                                     .clock = s->clock};
    return kvl_exchange_start(&of, &s->exchange, error);
}

static kvl_status open_all(kvl_sidecar *s, const kvl_sidecar_options *options, kvl_error *error)
{
    s->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    s->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->spare_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (s->epoll_fd < 0 || s->wake_fd < 0 || s->spare_fd < 0) {
        return KVL_FAIL(error, KVL_ERR_IO, "cannot make descriptors: %s", strerror(errno));
    }
    KVL_TRY(add_to_epoll(s, s->wake_fd, WAKE_TAG, error));
    for (uint32_t i = 0; i < options->n_tenants; i++) KVL_TRY(open_tenant(s, options, i, error));
    KVL_TRY(sidecar_workers_start(s, options->n_workers == 0 ? WORKERS_DEFAULT : options->n_workers,
                                  error));
    return open_exchange(s, options, error);
}

kvl_status kvl_sidecar_create(const kvl_sidecar_options *options, kvl_sidecar **sidecar,
                              kvl_error *error)
{
    *sidecar = NULL;
    KVL_ASSERT(options->clock != NULL);
    KVL_TRY(check(options, error));
    kvl_sidecar *s = kvl_alloc_zero(1, sizeof *s);
    if (s == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a sidecar");
    raise_descriptor_limit();
    kvl_container_use_shared_memory(SIDECAR_LENT_BYTES_MIN);
    s->epoll_fd = s->wake_fd = s->spare_fd = -1;
    (void)pthread_mutex_init(&s->lock, NULL);
    (void)snprintf(s->name, sizeof s->name, "%s", options->name);
    s->fingerprint = options->fingerprint;
    s->clock = options->clock;
    const uint32_t lease_ms = options->lease_ms_max;
    s->lease_ms_max = lease_ms == 0 ? KVL_SIDECAR_LEASE_MS_MAX : lease_ms;
    while (s->epoch == 0) kvl_random_secret(&s->epoch, sizeof s->epoch);
    const kvl_status status = open_all(s, options, error);
    if (status < 0) {
        kvl_sidecar_destroy(s);
        return status;
    }
    *sidecar = s;
    return KVL_OK;
}

/* ---- ending ---- */

/* Fetches are ended by the exchange, jobs by the workers; all of them report before this
 * returns. */
static void finish_work(kvl_sidecar *s)
{
    kvl_exchange_stop(s->exchange);
    s->exchange = NULL;
    kvl_allow_list_close(s->allow_list);
    s->allow_list = NULL;
    sidecar_workers_stop(s);
    for (job *j = sidecar_job_next(s); j != NULL; j = sidecar_job_next(s)) sidecar_job_done(s, j);
}

static void close_tenant(tenant *t)
{
    if (t->listen_fd >= 0) {
        (void)close(t->listen_fd);
        (void)unlink(t->socket_path);
    }
    if (t->store != NULL) t->store->ops->destroy(t->store);
    kvl_free(t->accesses);
}

void kvl_sidecar_destroy(kvl_sidecar *s)
{
    if (s == NULL) return;
    finish_work(s);
    sidecar_load_end_all(s);
    for (uint32_t i = 0; i < KVL_SIDECAR_CLIENTS_MAX; i++) {
        if (s->clients[i] != NULL) sidecar_client_end(s, s->clients[i]);
    }
    sidecar_lease_deinit(s);
    for (uint32_t i = 0; i < s->n_tenants; i++) close_tenant(&s->tenants[i]);
    if (s->epoll_fd >= 0) (void)close(s->epoll_fd);
    if (s->wake_fd >= 0) (void)close(s->wake_fd);
    if (s->spare_fd >= 0) (void)close(s->spare_fd);
    (void)pthread_mutex_destroy(&s->lock);
    kvl_free(s);
}

void kvl_sidecar_stop(kvl_sidecar *s)
{
    atomic_store(&s->is_stopping, true);
    const uint64_t one = 1;
    (void)!write(s->wake_fd, &one, sizeof one);
}

void kvl_sidecar_reload(kvl_sidecar *s)
{
    atomic_store(&s->must_reload, true);
    const uint64_t one = 1;
    (void)!write(s->wake_fd, &one, sizeof one);
}

static void reload(kvl_sidecar *s)
{
    kvl_error error;
    if (s->allow_list == NULL) return;
    if (kvl_allow_list_reload(s->allow_list, &error) < 0) {
        kvl_log(KVL_LOG_ERROR, "allow_list_kept", "why=\"%s\"", error.text);
        return;
    }
    kvl_log(KVL_LOG_INFO, "allow_list_read", "keys=%zu", kvl_allow_list_size(s->allow_list));
    kvl_exchange_recheck(s->exchange);
}

/* ---- the loop ---- */

/* Clients that were broken by an answer which was not to an event of theirs. */
static void end_broken(kvl_sidecar *s)
{
    for (uint32_t i = 0; i < s->clients_past; i++) {
        if (s->clients[i] != NULL && s->clients[i]->is_broken) sidecar_client_end(s, s->clients[i]);
    }
}

static void take_results(kvl_sidecar *s)
{
    uint64_t count = 0;
    (void)!read(s->wake_fd, &count, sizeof count);
    if (atomic_exchange(&s->must_reload, false)) reload(s);
    for (job *j = sidecar_job_next(s); j != NULL; j = sidecar_job_next(s)) sidecar_job_done(s, j);
    end_broken(s);
}

static void handle(kvl_sidecar *s, const struct epoll_event *event)
{
    const uint64_t tag = event->data.u64;
    if (tag == WAKE_TAG) {
        take_results(s);
    } else if (tag < KVL_SIDECAR_TENANTS_MAX) {
        sidecar_accept(s, &s->tenants[tag]);
    } else {
        client *c = s->clients[tag - KVL_SIDECAR_TENANTS_MAX - 1];
        if (c != NULL) sidecar_client_event(s, c, event->events);
    }
}

void kvl_sidecar_run(kvl_sidecar *s)
{
    while (!atomic_load(&s->is_stopping)) {
        struct epoll_event events[EVENTS_PER_TURN];
        const bool has_time = s->n_leases > 0 || s->n_loads > 0;
        const int n =
            epoll_wait(s->epoll_fd, events, EVENTS_PER_TURN, has_time ? SIDECAR_TICK_MS : -1);
        /* An event of a slot whose client is another one by now only makes that one look once in
         * vain. */
        for (int i = 0; i < n; i++) handle(s, &events[i]);
        const int64_t now_ns = sidecar_now(s);
        if (now_ns - s->ticked_ns >= SIDECAR_TICK_MS * KVL_NS_PER_MS) {
            s->ticked_ns = now_ns;
            sidecar_lease_tick(s, now_ns);
            sidecar_load_tick(s, now_ns);
            sidecar_access_tick(s, now_ns);
            end_broken(s);
        }
    }
    kvl_log(KVL_LOG_INFO, "sidecar_stops", "clients=%u", s->n_clients);
}
