/* exchange/exchange.c: the door: callers' threads on one side, the protocol's thread on the other.
 *
 * A request is a command in a list; the caller waits on its own condition until the protocol has
 * completed it, which it always does: every request has a deadline there. The nodes of requests
 * lie on the callers' stacks and those of replies in a table as long as that of the tasks, so the
 * list cannot grow without bound. */
#include "exchange/exchange.h"

#include "base/alloc.h"
#include "base/random.h"
#include "exchange/bulk_channel.h"
#include "exchange/wire.h"
#include "exchange/zmq_transport.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

enum {
    TIMEOUT_MS_DEFAULT = 2000,
    ANNOUNCES_QUEUED_MAX = 4096,
    POLL_BUSY_MS = (int)(KVL_TICK_NS / KVL_NS_PER_MS),
    POLL_IDLE_MS = 50,
};

typedef enum command_kind {
    COMMAND_FETCH,
    COMMAND_FETCH_WATCHED,
    COMMAND_LIST,
    COMMAND_CALL,
    COMMAND_ANNOUNCE,
    COMMAND_REPLY,
} command_kind;

typedef struct command {
    struct command *next;
    command_kind kind;
    kvl_digest id;
    kvl_container_kind container_kind;
    int64_t deadline_ns;
    const void *prefix;
    size_t n_prefix_bytes;
    uint32_t peer;
    kvl_bulk *body;
    uint64_t task;
    kvl_status status;
    char text[KVL_ERROR_TEXT_MAX];
    bool queued; /* of a reply: its place in the table is taken */
    kvl_exchange_watch watch;
} command;

/* One caller that waits. */
typedef struct waiter {
    command command;
    pthread_cond_t ended;
    bool done;
    kvl_completion result; /* its texts are in the two fields below */
    char text[KVL_ERROR_TEXT_MAX];
    char from[KVL_NAME_BYTES_MAX + 1];
} waiter;

struct kvl_exchange {
    kvl_protocol *protocol; /* of the thread */
    kvl_transport *transport;
    kvl_bulk_channel *bulk;
    /* Latest requests of each link whose stream began on the control connection. */
    uint64_t by_control[KVL_CLIENTS_MAX][KVL_STREAMS_PER_LINK];
    kvl_tier *store;
    uint32_t n_tenants;
    kvl_exchange_tenant tenants[KVL_EXCHANGE_TENANTS_MAX];
    char tenant_names[KVL_EXCHANGE_TENANTS_MAX][KVL_TENANT_NAME_BYTES_MAX + 1];
    char endpoints[KVL_PEERS_MAX][256]; /* of peers */
    _Atomic bool must_recheck;
    const kvl_clock *clock;
    kvl_exchange_task_handler *task;
    void *task_context;
    uint32_t n_peers;
    char peers[KVL_PEERS_MAX][KVL_NAME_BYTES_MAX + 1];
    _Atomic bool peer_up[KVL_PEERS_MAX];
    pthread_t thread;
    kvl_wire_decoder decoder;

    pthread_mutex_t lock; /* guards everything below */
    pthread_cond_t left;  /* n_inside became 0 */
    command *first, *last;
    uint32_t n_announces, n_inside;
    bool stopping;
    kvl_exchange_stats stats;
    command replies[KVL_TASKS_MAX];
};

/* ---- the thread ---- */

static int64_t now_of(const kvl_exchange *exchange)
{
    return kvl_clock_now(exchange->clock);
}

/* Before every completion and after every round: who learns that a call was unreachable must not
 * see its peer up. */
static void publish_peers(kvl_exchange *exchange)
{
    for (uint32_t i = 0; i < exchange->n_peers; i++) {
        atomic_store_explicit(&exchange->peer_up[i], kvl_protocol_peer_is_up(exchange->protocol, i),
                              memory_order_release);
    }
}

/* A stream stays on the connection that it began on: the two do not keep each other's order. */
static bool goes_by_bulk(kvl_exchange *exchange, kvl_link link, const kvl_message *message)
{
    if (link < KVL_LINK_CLIENT) return false;
    uint64_t *by_control = exchange->by_control[link - KVL_LINK_CLIENT];
    switch (message->kind) {
    case KVL_MESSAGE_FETCH_HEADER:
        if (kvl_bulk_channel_is_ready(exchange->bulk, link)) return true;
        memmove(&by_control[1], &by_control[0], (KVL_STREAMS_PER_LINK - 1) * sizeof *by_control);
        by_control[0] = message->request;
        return false;
    case KVL_MESSAGE_BLOCK:
    case KVL_MESSAGE_FETCH_DONE:
        for (size_t i = 0; i < KVL_STREAMS_PER_LINK; i++) {
            if (by_control[i] == message->request) return false;
        }
        return kvl_bulk_channel_is_ready(exchange->bulk, link);
    default: return false;
    }
}

static kvl_status send_message(void *context, kvl_link link, const kvl_message *message,
                               const kvl_frame *frames, size_t n_frames, kvl_owner owner)
{
    kvl_exchange *exchange = context;
    uint8_t control[KVL_CONTROL_BYTES_MAX];
    const size_t n_bytes = kvl_wire_encode(message, control);
    if (n_frames <= KVL_HEADER_FRAMES_MAX && goes_by_bulk(exchange, link, message)) {
        const kvl_status status =
            kvl_bulk_channel_send(exchange->bulk, link, control, n_bytes, frames, n_frames, owner);
        /* A channel that has just been lost is no loss of the link. */
        if (status != KVL_ERR_UNREACHABLE && status != KVL_ERR_TOO_LARGE) return status;
    }
    return kvl_transport_send(exchange->transport, link, control, n_bytes, frames, n_frames, owner);
}

/* The node of a watched fetch is all that there is of it: nobody waits. */
static void complete_watched(command *c, const kvl_completion *completion)
{
    c->watch.done(c->watch.context, completion->status,
                  completion->text == NULL ? "" : completion->text, completion->container,
                  completion->from == NULL ? "" : completion->from);
    kvl_free(c);
}

static void report_progress(void *context, void *waiting, kvl_container *container,
                            uint32_t n_ready)
{
    (void)context;
    const command *c = waiting;
    if (c->kind == COMMAND_FETCH_WATCHED && c->watch.progress != NULL) {
        c->watch.progress(c->watch.context, container, n_ready);
    }
}

static void complete(void *context, const kvl_completion *completion)
{
    kvl_exchange *exchange = context;
    publish_peers(exchange);
    command *c = completion->waiter;
    if (c->kind == COMMAND_FETCH_WATCHED) {
        complete_watched(c, completion);
        return;
    }
    waiter *w = completion->waiter;
    (void)pthread_mutex_lock(&exchange->lock);
    exchange->stats = *kvl_protocol_stats(exchange->protocol);
    w->result = *completion;
    (void)snprintf(w->text, sizeof w->text, "%s", completion->text == NULL ? "" : completion->text);
    (void)snprintf(w->from, sizeof w->from, "%s", completion->from == NULL ? "" : completion->from);
    w->done = true;
    /* Under the lock: the waiter is gone as soon as it sees `done`. */
    (void)pthread_cond_signal(&w->ended);
    (void)pthread_mutex_unlock(&exchange->lock);
}

static void bulk_offer(void *context, kvl_link link, kvl_bulk_offer *offer)
{
    kvl_exchange *exchange = context;
    kvl_bulk_channel_offer(exchange->bulk, link, offer);
}

static void bulk_agree(void *context, kvl_link link, const kvl_bulk_offer *offer)
{
    kvl_exchange *exchange = context;
    kvl_bulk_channel_agree(exchange->bulk, link, offer,
                           link < KVL_LINK_CLIENT ? exchange->endpoints[link] : "");
}

static void bulk_reset(void *context, kvl_link link)
{
    kvl_exchange *exchange = context;
    if (exchange->bulk != NULL) kvl_bulk_channel_reset(exchange->bulk, link);
}

static void land(void *context, kvl_link link, uint64_t request, kvl_container *container,
                 uint32_t block)
{
    kvl_exchange *exchange = context;
    kvl_bulk_channel_land(exchange->bulk, link, request, container, block);
}

static bool claim(void *context, kvl_link link, uint64_t request, uint32_t block)
{
    kvl_exchange *exchange = context;
    return kvl_bulk_channel_claim(exchange->bulk, link, request, block);
}

static void leave(void *context, kvl_link link, uint64_t request)
{
    kvl_exchange *exchange = context;
    kvl_bulk_channel_leave(exchange->bulk, link, request);
}

static void run_task(void *context, uint64_t task, const void *body, size_t n_bytes)
{
    kvl_exchange *exchange = context;
    exchange->task(exchange->task_context, task, body, n_bytes);
}

static void log_event(void *context, kvl_log_level level, const char *event, const char *text)
{
    (void)context;
    kvl_log(level, event, "%s", text);
}

static void link_connected(void *context, kvl_link link)
{
    kvl_exchange *exchange = context;
    kvl_protocol_connected(exchange->protocol, link, now_of(exchange));
}

static void link_disconnected(void *context, kvl_link link)
{
    kvl_exchange *exchange = context;
    kvl_protocol_disconnected(exchange->protocol, link, now_of(exchange));
}

/* A slot of the transport is kept for sessions only, so that strangers cannot use them up. */
static void forget_if_closed(kvl_exchange *exchange, kvl_link link)
{
    if (link >= KVL_LINK_CLIENT && !kvl_protocol_client_is_open(exchange->protocol, link)) {
        kvl_transport_forget(exchange->transport, link);
    }
}

/* The tenant is the key's; who came without one, over ipc or the loopback, is the first. */
static void link_admitted(void *context, kvl_link link, const kvl_access *access)
{
    kvl_exchange *exchange = context;
    kvl_tier *store = exchange->store;
    if (access != NULL && exchange->n_tenants > 0) {
        store = NULL;
        for (uint32_t i = 0; i < exchange->n_tenants; i++) {
            if (strcmp(exchange->tenants[i].name, access->tenant) == 0)
                store = exchange->tenants[i].store;
        }
    }
    kvl_protocol_set_access(exchange->protocol, link,
                            access == NULL ? KVL_RIGHT_ALL : access->rights, store);
}

static void bulk_message(void *context, kvl_link link, const void *control, size_t n_control_bytes,
                         const kvl_frame *frames, size_t n_frames, const uint64_t *checksum)
{
    kvl_exchange *exchange = context;
    kvl_message message;
    kvl_error error;
    if (kvl_wire_decode(&exchange->decoder, control, n_control_bytes, frames, n_frames, &message,
                        &error) < 0) {
        kvl_protocol_refuse(exchange->protocol, link, message.request, &error);
    } else {
        if (message.kind == KVL_MESSAGE_BLOCK) {
            message.block.has_checksum = checksum != NULL;
            if (checksum != NULL) message.block.checksum = *checksum;
        }
        kvl_protocol_receive(exchange->protocol, link, &message, frames, n_frames,
                             now_of(exchange));
    }
    forget_if_closed(exchange, link);
}

static void link_message(void *context, kvl_link link, const void *control, size_t n_control_bytes,
                         const kvl_frame *frames, size_t n_frames)
{
    bulk_message(context, link, control, n_control_bytes, frames, n_frames, NULL);
}

static void link_overlong(void *context, kvl_link link)
{
    kvl_exchange *exchange = context;
    kvl_error error;
    const kvl_status status = KVL_FAIL(&error, KVL_ERR_TOO_LARGE,
                                       "a message of more than %u bulk frames", KVL_FRAMES_MAX);
    (void)status;
    kvl_protocol_refuse(exchange->protocol, link, 0, &error);
    forget_if_closed(exchange, link);
}

static void run_command(kvl_exchange *exchange, command *c)
{
    kvl_protocol *protocol = exchange->protocol;
    const int64_t now_ns = now_of(exchange);
    switch (c->kind) {
    case COMMAND_FETCH:
    case COMMAND_FETCH_WATCHED:
        kvl_protocol_fetch(protocol, c, &c->id, c->deadline_ns, now_ns);
        return;
    case COMMAND_LIST:
        kvl_protocol_list(protocol, c, c->container_kind, c->prefix, c->n_prefix_bytes,
                          c->deadline_ns, now_ns);
        return;
    case COMMAND_CALL:
        kvl_protocol_call(protocol, c, c->peer, c->body, c->deadline_ns, now_ns);
        return;
    case COMMAND_ANNOUNCE:
        kvl_protocol_announce(protocol, &c->id, c->container_kind);
        kvl_free(c);
        return;
    case COMMAND_REPLY: break;
    }
    /* The place in the table is free before the protocol can give its task's place to another. */
    const uint64_t task = c->task;
    const kvl_status status = c->status;
    kvl_bulk *body = c->body;
    char text[KVL_ERROR_TEXT_MAX];
    memcpy(text, c->text, sizeof text);
    (void)pthread_mutex_lock(&exchange->lock);
    c->queued = false;
    (void)pthread_mutex_unlock(&exchange->lock);
    kvl_protocol_reply(protocol, task, status, text, body, now_ns);
}

/* Takes the whole list at once; returns whether the exchange is to stop. */
static bool run_commands(kvl_exchange *exchange)
{
    (void)pthread_mutex_lock(&exchange->lock);
    command *c = exchange->first;
    exchange->first = exchange->last = NULL;
    exchange->n_announces = 0;
    const bool stopping = exchange->stopping;
    exchange->stats = *kvl_protocol_stats(exchange->protocol);
    (void)pthread_mutex_unlock(&exchange->lock);
    while (c != NULL) {
        command *next = c->next; /* the node may be gone when it has run */
        run_command(exchange, c);
        c = next;
    }
    return stopping;
}

/* Commands, messages, time, in turns. The wait is short only while something is under way, so an
 * idle host wakes up twenty times a second and does next to nothing. */
static void *run_thread(void *argument)
{
    kvl_exchange *exchange = argument;
    kvl_protocol *protocol = exchange->protocol;
    const kvl_transport_events events = {link_connected, link_disconnected, link_admitted,
                                         link_message,   link_overlong,     exchange};
    int64_t ticked_ns = now_of(exchange);
    bool more_work = false;
    while (!run_commands(exchange)) {
        const int wait_ms = kvl_protocol_is_active(protocol) ? POLL_BUSY_MS : POLL_IDLE_MS;
        kvl_transport_poll(exchange->transport, more_work ? 0 : wait_ms, &events);
        const bool more_bulk = kvl_bulk_channel_drain(exchange->bulk, bulk_message, exchange);
        if (atomic_exchange(&exchange->must_recheck, false))
            kvl_transport_recheck(exchange->transport, &events);
        const int64_t now_ns = now_of(exchange);
        if (now_ns - ticked_ns >= KVL_TICK_NS) {
            ticked_ns = now_ns;
            kvl_protocol_tick(protocol, now_ns);
            for (kvl_link link = KVL_LINK_CLIENT; link < KVL_LINKS_MAX; link++) {
                forget_if_closed(exchange, link);
            }
        }
        more_work = kvl_protocol_work(protocol, now_ns) || more_bulk;
        publish_peers(exchange);
    }
    /* Nothing enters the list any more; what entered it before `stopping` has been run. */
    kvl_protocol_stop(protocol);
    return NULL;
}

/* ---- start and stop ---- */

static kvl_status check_options(const kvl_exchange_options *options, kvl_error *error)
{
    if (options->name == NULL || !kvl_name_is_valid(options->name)) {
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "name \"%.40s\" of the host: must be 1 to %u of A-Z a-z 0-9 . _ -",
                        options->name == NULL ? "" : options->name, KVL_NAME_BYTES_MAX);
    }
    if (options->n_peers > KVL_PEERS_MAX) {
        return KVL_FAIL(error, KVL_ERR_INVALID, "%zu peers, at most %u", options->n_peers,
                        KVL_PEERS_MAX);
    }
    if (options->n_tenants > KVL_EXCHANGE_TENANTS_MAX) {
        return KVL_FAIL(error, KVL_ERR_INVALID, "%zu tenants, at most %u", options->n_tenants,
                        KVL_EXCHANGE_TENANTS_MAX);
    }
    for (size_t i = 0; i < options->n_peers; i++) {
        const kvl_exchange_peer *peer = &options->peers[i];
        if (peer->name == NULL || peer->endpoint == NULL || !kvl_name_is_valid(peer->name)) {
            return KVL_FAIL(
                error, KVL_ERR_INVALID,
                "peer %zu: needs an endpoint and a name of 1 to %u of A-Z a-z 0-9 . _ -", i,
                KVL_NAME_BYTES_MAX);
        }
        bool taken = strcmp(peer->name, options->name) == 0;
        for (size_t j = 0; j < i; j++) taken |= strcmp(peer->name, options->peers[j].name) == 0;
        if (taken) {
            return KVL_FAIL(error, KVL_ERR_INVALID,
                            "name %s is used twice: hosts and their peers need different names",
                            peer->name);
        }
    }
    return KVL_OK;
}

static kvl_status make_protocol(kvl_exchange *exchange, const kvl_exchange_options *options,
                                uint64_t epoch, kvl_error *error)
{
    const char *names[KVL_PEERS_MAX];
    for (size_t i = 0; i < options->n_peers; i++) names[i] = options->peers[i].name;
    kvl_protocol_options of = {
        .name = options->name,
        .epoch = epoch,
        .peers = names,
        .n_peers = options->n_peers,
        .store = options->store,
        .fingerprint = options->fingerprint,
        .timeout_ms = options->timeout_ms == 0 ? TIMEOUT_MS_DEFAULT : options->timeout_ms,
        .runs_tasks = options->task != NULL,
        .output = {.send = send_message,
                   .complete = complete,
                   .progress = report_progress,
                   .task = run_task,
                   .bulk_offer = bulk_offer,
                   .bulk_agree = bulk_agree,
                   .bulk_reset = bulk_reset,
                   .land = land,
                   .claim = claim,
                   .leave = leave,
                   .event = log_event,
                   .context = exchange},
    };
    kvl_random_secret(&of.seed, sizeof of.seed);
    if (kvl_protocol_create(&of, now_of(exchange), &exchange->protocol) < 0) {
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the protocol");
    }
    return KVL_OK;
}

/* Signals belong to the threads that the program set up for them. */
static int start_thread(kvl_exchange *exchange)
{
    sigset_t all, before;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    const int failed = pthread_create(&exchange->thread, NULL, run_thread, exchange);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failed;
}

static void free_exchange(kvl_exchange *exchange)
{
    kvl_protocol_destroy(exchange->protocol);
    kvl_bulk_channel_close(exchange->bulk);
    kvl_transport_close(exchange->transport);
    (void)pthread_mutex_destroy(&exchange->lock);
    (void)pthread_cond_destroy(&exchange->left);
    kvl_free(exchange);
}

static void keep_names(kvl_exchange *exchange, const kvl_exchange_options *options)
{
    for (size_t i = 0; i < options->n_peers; i++) {
        memcpy(exchange->peers[i], options->peers[i].name, strlen(options->peers[i].name) + 1);
        (void)snprintf(exchange->endpoints[i], sizeof exchange->endpoints[i], "%s",
                       options->peers[i].endpoint);
    }
    exchange->store = options->store;
    exchange->n_tenants = (uint32_t)options->n_tenants;
    for (size_t i = 0; i < options->n_tenants; i++) {
        (void)snprintf(exchange->tenant_names[i], sizeof exchange->tenant_names[i], "%s",
                       options->tenants[i].name);
        exchange->tenants[i] =
            (kvl_exchange_tenant){exchange->tenant_names[i], options->tenants[i].store};
    }
}

kvl_status kvl_exchange_start(const kvl_exchange_options *options, kvl_exchange **out,
                              kvl_error *error)
{
    *out = NULL;
    KVL_ASSERT(options->clock != NULL);
    KVL_TRY(check_options(options, error));
    kvl_exchange *exchange = kvl_alloc_zero(1, sizeof *exchange);
    if (exchange == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the exchange");
    (void)pthread_mutex_init(&exchange->lock, NULL);
    (void)pthread_cond_init(&exchange->left, NULL);
    exchange->clock = options->clock;
    exchange->task = options->task;
    exchange->task_context = options->task_context;
    exchange->n_peers = (uint32_t)options->n_peers;
    keep_names(exchange, options);
    uint64_t epoch = 0;
    while (epoch == 0) kvl_random_secret(&epoch, sizeof epoch);
    const kvl_transport_options of = {.name = options->name,
                                      .epoch = epoch,
                                      .endpoint = options->endpoint,
                                      .peers = options->peers,
                                      .n_peers = options->n_peers,
                                      .keys = options->keys,
                                      .allow_list = options->allow_list};
    kvl_status status = make_protocol(exchange, options, epoch, error);
    if (status == KVL_OK) status = kvl_transport_open(&of, &exchange->transport, error);
    if (status == KVL_OK) {
        const kvl_bulk_channel_options bulk = {.endpoint = options->endpoint,
                                               .wake_fd =
                                                   kvl_transport_wake_fd(exchange->transport),
                                               .has_keys = options->keys != NULL};
        status = kvl_bulk_channel_open(&bulk, &exchange->bulk, error);
    }
    if (status == KVL_OK && start_thread(exchange) != 0) {
        status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no thread for the exchange");
    }
    if (status < 0) {
        free_exchange(exchange);
        return status;
    }
    *out = exchange;
    return KVL_OK;
}

/* All requests have been completed when the thread has ended; their callers still have to leave the
 * lock behind before it can go. */
void kvl_exchange_stop(kvl_exchange *exchange)
{
    if (exchange == NULL) return;
    (void)pthread_mutex_lock(&exchange->lock);
    exchange->stopping = true;
    (void)pthread_mutex_unlock(&exchange->lock);
    kvl_transport_wake(exchange->transport);
    (void)pthread_join(exchange->thread, NULL);
    (void)pthread_mutex_lock(&exchange->lock);
    while (exchange->n_inside > 0) (void)pthread_cond_wait(&exchange->left, &exchange->lock);
    (void)pthread_mutex_unlock(&exchange->lock);
    free_exchange(exchange);
}

/* ---- requests ---- */

/* With the lock held. */
static void enqueue(kvl_exchange *exchange, command *c)
{
    c->next = NULL;
    if (exchange->last == NULL) {
        exchange->first = c;
    } else {
        exchange->last->next = c;
    }
    exchange->last = c;
}

/* Runs a request and waits for its end; w->result is filled. */
static void run_and_wait(kvl_exchange *exchange, waiter *w)
{
    (void)pthread_cond_init(&w->ended, NULL);
    (void)pthread_mutex_lock(&exchange->lock);
    if (exchange->stopping) {
        w->result.status = KVL_ERR_CANCELLED;
        (void)snprintf(w->text, sizeof w->text, "the exchange is ending");
    } else {
        exchange->n_inside++;
        /* Only the first of several needs to wake the thread. */
        const bool first = exchange->first == NULL;
        enqueue(exchange, &w->command);
        if (first) kvl_transport_wake(exchange->transport);
        while (!w->done) (void)pthread_cond_wait(&w->ended, &exchange->lock);
        exchange->n_inside--;
        if (exchange->n_inside == 0) (void)pthread_cond_signal(&exchange->left);
    }
    (void)pthread_mutex_unlock(&exchange->lock);
    (void)pthread_cond_destroy(&w->ended);
}

static kvl_status fail_as(const waiter *w, kvl_error *error)
{
    return KVL_FAIL(error, w->result.status, "%s", w->text);
}

kvl_status kvl_exchange_fetch(kvl_exchange *exchange, const kvl_digest *id, int64_t deadline_ns,
                              kvl_container **container, char *from, size_t from_size,
                              kvl_error *error)
{
    *container = NULL;
    waiter w = {.command = {.kind = COMMAND_FETCH, .id = *id, .deadline_ns = deadline_ns}};
    run_and_wait(exchange, &w);
    if (w.result.status < 0) return fail_as(&w, error);
    if (from != NULL && from_size > 0) (void)snprintf(from, from_size, "%s", w.from);
    *container = w.result.container;
    return KVL_OK;
}

kvl_status kvl_exchange_fetch_start(kvl_exchange *exchange, const kvl_digest *id,
                                    int64_t deadline_ns, const kvl_exchange_watch *watch,
                                    kvl_error *error)
{
    command *c = kvl_alloc_zero(1, sizeof *c);
    if (c == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a fetch");
    c->kind = COMMAND_FETCH_WATCHED;
    c->id = *id;
    c->deadline_ns = deadline_ns;
    c->watch = *watch;
    (void)pthread_mutex_lock(&exchange->lock);
    const bool taken = !exchange->stopping;
    if (taken) {
        const bool first = exchange->first == NULL;
        enqueue(exchange, c);
        if (first) kvl_transport_wake(exchange->transport);
    }
    (void)pthread_mutex_unlock(&exchange->lock);
    if (taken) return KVL_OK;
    kvl_free(c);
    return KVL_FAIL(error, KVL_ERR_CANCELLED, "the exchange is ending");
}

void kvl_exchange_announce(kvl_exchange *exchange, const kvl_digest *id, kvl_container_kind kind)
{
    command *c = kvl_alloc_zero(1, sizeof *c);
    if (c != NULL) {
        c->kind = COMMAND_ANNOUNCE;
        c->id = *id;
        c->container_kind = kind;
        (void)pthread_mutex_lock(&exchange->lock);
        const bool taken = !exchange->stopping && exchange->n_announces < ANNOUNCES_QUEUED_MAX;
        if (taken) {
            const bool first = exchange->first == NULL;
            enqueue(exchange, c);
            exchange->n_announces++;
            if (first) kvl_transport_wake(exchange->transport);
        }
        (void)pthread_mutex_unlock(&exchange->lock);
        if (taken) return;
        kvl_free(c);
    }
    /* Nothing is wrong then: peers that want the container ask for it. */
    kvl_log(KVL_LOG_DEBUG, "announce_dropped", "kind=%d", (int)kind);
}

kvl_status kvl_exchange_list(kvl_exchange *exchange, kvl_container_kind kind, const void *prefix,
                             size_t n_prefix_bytes, int64_t deadline_ns, kvl_digest **ids,
                             size_t *n_ids, kvl_error *error)
{
    *ids = NULL;
    *n_ids = 0;
    if (n_prefix_bytes > KVL_LIST_PREFIX_BYTES_MAX) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "a prefix of %zu bytes, must be at most %u",
                        n_prefix_bytes, KVL_LIST_PREFIX_BYTES_MAX);
    }
    waiter w = {.command = {.kind = COMMAND_LIST,
                            .container_kind = kind,
                            .prefix = prefix,
                            .n_prefix_bytes = n_prefix_bytes,
                            .deadline_ns = deadline_ns}};
    run_and_wait(exchange, &w);
    if (w.result.status < 0) return fail_as(&w, error);
    *ids = w.result.ids;
    *n_ids = w.result.n_ids;
    return KVL_OK;
}

bool kvl_exchange_was_announced(kvl_exchange *exchange, const kvl_digest *id)
{
    const uint64_t peers = kvl_protocol_announced(exchange->protocol, id);
    for (uint32_t i = 0; i < exchange->n_peers; i++) {
        const bool is_up = atomic_load_explicit(&exchange->peer_up[i], memory_order_acquire);
        if (is_up && (peers >> i & 1) != 0) return true;
    }
    return false;
}

static uint32_t find_peer(const kvl_exchange *exchange, const char *name)
{
    uint32_t i = 0;
    while (i < exchange->n_peers && strcmp(exchange->peers[i], name) != 0) i++;
    return i;
}

bool kvl_exchange_peer_is_up(kvl_exchange *exchange, const char *peer)
{
    const uint32_t i = find_peer(exchange, peer);
    return i < exchange->n_peers &&
           atomic_load_explicit(&exchange->peer_up[i], memory_order_acquire);
}

kvl_status kvl_exchange_call(kvl_exchange *exchange, const char *peer, const void *body,
                             size_t n_bytes, int64_t deadline_ns, void **reply,
                             size_t *n_reply_bytes, kvl_error *error)
{
    *reply = NULL;
    *n_reply_bytes = 0;
    const uint32_t index = find_peer(exchange, peer);
    if (index == exchange->n_peers) {
        return KVL_FAIL(error, KVL_ERR_INVALID, "%.60s is no peer of this host", peer);
    }
    if (n_bytes > KVL_TASK_BYTES_MAX) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "a task of %zu bytes, must be at most %u",
                        n_bytes, KVL_TASK_BYTES_MAX);
    }
    kvl_bulk *copy = kvl_bulk_copy(body, n_bytes);
    if (copy == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a task");
    waiter w = {
        .command = {.kind = COMMAND_CALL, .peer = index, .body = copy, .deadline_ns = deadline_ns}};
    run_and_wait(exchange, &w);
    kvl_bulk_release(copy);
    if (w.result.status < 0) return fail_as(&w, error);
    *reply = w.result.reply;
    *n_reply_bytes = w.result.n_reply_bytes;
    return KVL_OK;
}

void kvl_exchange_reply(kvl_exchange *exchange, uint64_t task, kvl_status status, const char *text,
                        const void *body, size_t n_bytes)
{
    KVL_ASSERT(status <= 0);
    kvl_bulk *copy = NULL;
    if (status == KVL_OK && n_bytes > KVL_TASK_BYTES_MAX) {
        status = KVL_ERR_TOO_LARGE;
        text = "the reply is larger than a reply may be (64 MiB)";
    } else if (status == KVL_OK) {
        copy = kvl_bulk_copy(body, n_bytes);
        if (copy == NULL) {
            status = KVL_ERR_BUSY;
            text = "no memory for the reply";
        }
    }
    (void)pthread_mutex_lock(&exchange->lock);
    command *c = &exchange->replies[kvl_task_index(task)];
    const bool taken = !c->queued && !exchange->stopping;
    if (taken) {
        c->queued = true;
        c->kind = COMMAND_REPLY;
        c->task = task;
        c->status = status;
        c->body = copy;
        (void)snprintf(c->text, sizeof c->text, "%s", text == NULL ? "" : text);
        const bool first = exchange->first == NULL;
        enqueue(exchange, c);
        if (first) kvl_transport_wake(exchange->transport);
    }
    (void)pthread_mutex_unlock(&exchange->lock);
    if (!taken) kvl_bulk_release(copy); /* answered twice, or too late */
}

void kvl_exchange_recheck(kvl_exchange *exchange)
{
    atomic_store(&exchange->must_recheck, true);
    kvl_transport_wake(exchange->transport);
}

void kvl_exchange_stats_of(kvl_exchange *exchange, kvl_exchange_stats *stats)
{
    (void)pthread_mutex_lock(&exchange->lock);
    *stats = exchange->stats;
    (void)pthread_mutex_unlock(&exchange->lock);
    stats->keys_refused = kvl_transport_n_refused(exchange->transport);
    stats->bulk_refused = kvl_bulk_channel_n_refused(exchange->bulk);
}
