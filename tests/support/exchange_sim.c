/* exchange_sim.c: an event queue in virtual time, and what must never happen.
 *
 * Invariants: a container that is handed out is byte for byte one that a host holds; every request
 * ends once, and not after its deadline; a task runs at most once; a reply is that of its task; a
 * list has only what is there. When the faults have stopped, everything that can be served is. */
#include "exchange_sim.h"

#include "base/alloc.h"
#include "base/random.h"
#include "exchange/protocol.h"
#include "exchange/wire.h"
#include "tiny_store.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

enum {
    HOSTS_MAX = KVL_SIM_HOSTS_MAX,
    REQUESTS_MAX = 512,
    NUMBERS = 24, /* containers that are asked for; the last six are nowhere */
    NUMBERS_HELD = 18,
    GROUPS = 3,
    BODY_BYTES_MAX = 3000,
};
static const int64_t chaos_ns = 2000 * KVL_NS_PER_MS; /* faults until then */
static const int64_t calm_ns = 5500 * KVL_NS_PER_MS;  /* then everything must be fine again */
static const int64_t end_ns = 9000 * KVL_NS_PER_MS;

typedef enum event_kind {
    EVENT_MESSAGE,
    EVENT_TICK,
    EVENT_CONNECT,
    EVENT_DISCONNECT,
    EVENT_REQUEST,
    EVENT_REPLY,
    EVENT_KILL,
    EVENT_REVIVE,
    EVENT_SPLIT,
    EVENT_JOIN,
    EVENT_JUMP,
} event_kind;

typedef struct event {
    int64_t at_ns;
    uint64_t order; /* of making: breaks ties */
    event_kind kind;
    uint32_t from, to; /* hosts; `to` is the one that it happens to */
    uint64_t from_life, to_life;
    bool from_asker;
    bool is_final; /* EVENT_REQUEST */
    uint64_t task; /* EVENT_REPLY */
    uint32_t request;
    size_t n_control_bytes, n_frames, block_bytes;
    kvl_frame frames[KVL_FRAMES_MAX]; /* into `bytes` */
    uint8_t bytes[];                  /* control, then bulk */
} event;

typedef struct request {
    kvl_message_kind kind; /* FETCH, LIST or TASK */
    bool open, is_final;
    uint32_t host, peer, number;
    int64_t deadline_ns;
    uint32_t n_runs; /* of a task */
} request;

typedef struct sim sim;

typedef struct host {
    sim *sim;
    uint32_t index;
    uint64_t life; /* 0: dead */
    kvl_protocol *protocol;
    tiny_store store;
    kvl_tier disk;               /* the store, which fails now and then */
    int64_t ahead_ns;            /* of its clock */
    int64_t jumped_ns;           /* since its last tick: what was due meanwhile is late by that */
    uint64_t dialled[HOSTS_MAX]; /* life of the other that we are connected to; 0: none */
    struct {
        bool used;
        uint32_t host;
        uint64_t life;
    } slots[KVL_CLIENTS_MAX];
} host;

struct sim {
    const kvl_sim_options *options;
    kvl_sim_report *report;
    kvl_random random;
    int64_t now_ns;
    uint64_t last_life, last_order;
    bool calm;
    uint32_t split; /* bit h: host h reaches only those with the same bit */
    host hosts[HOSTS_MAX];
    request requests[REQUESTS_MAX];
    uint32_t n_requests;
    int64_t last_at_ns[HOSTS_MAX][HOSTS_MAX][2]; /* of the latest message of a direction */
    uint64_t under_way_bytes[HOSTS_MAX][HOSTS_MAX];
    event **heap;
    size_t n_events, capacity;
    kvl_wire_decoder decoder;
};

static uint32_t below(sim *s, uint32_t limit)
{
    return (uint32_t)kvl_random_below(&s->random, limit);
}

static bool happens(sim *s, uint32_t of_thousand)
{
    return !s->calm && below(s, 1000) < of_thousand;
}

static int64_t clock_of(const host *h)
{
    return h->sim->now_ns + h->ahead_ns;
}

#define VIOLATE(s, ...)                                                                            \
    do {                                                                                           \
        if ((s)->report->violation[0] == '\0') {                                                   \
            (void)snprintf((s)->report->violation, sizeof(s)->report->violation, __VA_ARGS__);     \
        }                                                                                          \
    } while (0)

/* ---- the event queue ---- */

static bool comes_before(const event *a, const event *b)
{
    return a->at_ns != b->at_ns ? a->at_ns < b->at_ns : a->order < b->order;
}

static event *make_event(sim *s, event_kind kind, int64_t at_ns, size_t n_bytes)
{
    event *e = kvl_alloc_zero(1, sizeof *e + n_bytes);
    KVL_ASSERT(e != NULL);
    e->kind = kind;
    e->at_ns = at_ns;
    e->order = ++s->last_order;
    return e;
}

static void push(sim *s, event *e)
{
    if (s->n_events == s->capacity) {
        s->capacity = s->capacity == 0 ? 256 : 2 * s->capacity;
        s->heap = kvl_realloc(s->heap, s->capacity * sizeof *s->heap);
        KVL_ASSERT(s->heap != NULL);
    }
    size_t i = s->n_events++;
    for (; i > 0 && comes_before(e, s->heap[(i - 1) / 2]); i = (i - 1) / 2) {
        s->heap[i] = s->heap[(i - 1) / 2];
    }
    s->heap[i] = e;
}

static event *pop(sim *s)
{
    event *first = s->heap[0];
    event *moved = s->heap[--s->n_events];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= s->n_events) break;
        if (child + 1 < s->n_events && comes_before(s->heap[child + 1], s->heap[child])) child++;
        if (!comes_before(s->heap[child], moved)) break;
        s->heap[i] = s->heap[child];
        i = child;
    }
    s->heap[i] = moved;
    return first;
}

static void push_for_host(sim *s, event_kind kind, uint32_t to, uint32_t from, int64_t at_ns)
{
    event *e = make_event(s, kind, at_ns, 0);
    e->to = to;
    e->to_life = s->hosts[to].life;
    e->from = from;
    e->from_life = s->hosts[from].life;
    push(s, e);
}

/* ---- the network ---- */

static uint32_t host_of_peer(uint32_t host_index, uint32_t peer)
{
    return peer < host_index ? peer : peer + 1;
}

static uint32_t peer_of_host(uint32_t host_index, uint32_t other)
{
    return other < host_index ? other : other - 1;
}

/* Damage that the protocol must detect: whatever concerns containers. Tasks and lists have no
 * checksum of their own; the connection's must do for them. */
static void damage(sim *s, event *e, kvl_message_kind kind)
{
    const bool fetching = kind == KVL_MESSAGE_BLOCK || kind == KVL_MESSAGE_FETCH_HEADER ||
                          kind == KVL_MESSAGE_FETCH || kind == KVL_MESSAGE_CREDIT ||
                          kind == KVL_MESSAGE_LOCATED;
    if (!fetching || !happens(s, s->options->n_damaged)) return;
    uint8_t *bytes = e->bytes;
    size_t n_bytes = e->n_control_bytes;
    if (e->n_frames > 0 && below(s, 3) > 0) {
        bytes = e->bytes + e->n_control_bytes;
        n_bytes = e->frames[0].n_bytes;
    }
    bytes[below(s, (uint32_t)n_bytes)] ^= (uint8_t)(1u << below(s, 8));
}

static void deliver_later(host *from, uint32_t to, uint64_t to_life, bool from_asker,
                          const kvl_message *message, const kvl_frame *frames, size_t n_frames)
{
    sim *s = from->sim;
    uint8_t control[KVL_CONTROL_BYTES_MAX];
    const size_t n_control = kvl_wire_encode(message, control);
    const size_t n_bulk = kvl_frames_bytes(frames, n_frames);
    event *e = make_event(s, EVENT_MESSAGE, 0, n_control + n_bulk);
    e->from = from->index;
    e->from_life = from->life;
    e->to = to;
    e->to_life = to_life;
    e->from_asker = from_asker;
    e->n_control_bytes = n_control;
    e->n_frames = n_frames;
    memcpy(e->bytes, control, n_control);
    kvl_frames_join(frames, n_frames, e->bytes + n_control);
    uint8_t *at = e->bytes + n_control;
    for (size_t i = 0; i < n_frames; i++) {
        e->frames[i] = (kvl_frame){at, frames[i].n_bytes};
        at += frames[i].n_bytes;
    }
    damage(s, e, message->kind);
    e->at_ns = s->now_ns + 50000 + (int64_t)below(s, s->calm ? 500000 : 5000000);
    int64_t *last_ns = &s->last_at_ns[from->index][to][from_asker];
    const bool in_order = s->calm || !s->options->reorders;
    if (in_order && e->at_ns <= *last_ns) e->at_ns = *last_ns + 1;
    if (e->at_ns > *last_ns) *last_ns = e->at_ns;
    if (message->kind == KVL_MESSAGE_BLOCK) {
        uint64_t *bytes = &s->under_way_bytes[from->index][to];
        e->block_bytes = n_bulk;
        *bytes += n_bulk;
        if (*bytes > s->report->under_way_bytes_max) s->report->under_way_bytes_max = *bytes;
    }
    s->report->n_messages++;
    push(s, e);
}

static kvl_status sim_send(void *context, kvl_link link, const kvl_message *message,
                           const kvl_frame *frames, size_t n_frames, kvl_owner owner)
{
    (void)owner;
    host *from = context;
    sim *s = from->sim;
    const bool from_asker = link < KVL_LINK_CLIENT;
    uint32_t to = 0;
    uint64_t to_life = 0;
    if (from_asker) {
        to = host_of_peer(from->index, link);
        to_life = from->dialled[to];
        if (to_life == 0) return KVL_ERR_UNREACHABLE;
    } else {
        if (!from->slots[link - KVL_LINK_CLIENT].used) return KVL_ERR_UNREACHABLE;
        to = from->slots[link - KVL_LINK_CLIENT].host;
        to_life = from->slots[link - KVL_LINK_CLIENT].life;
        if (s->hosts[to].life != to_life && below(s, 2) == 0) return KVL_ERR_UNREACHABLE;
    }
    if (happens(s, s->options->n_lost)) return KVL_OK;
    if (happens(s, 5)) return KVL_ERR_BUSY; /* a queue is full */
    deliver_later(from, to, to_life, from_asker, message, frames, n_frames);
    if (happens(s, s->options->n_doubled)) {
        deliver_later(from, to, to_life, from_asker, message, frames, n_frames);
    }
    return KVL_OK;
}

static void forget_closed(host *h, uint32_t slot)
{
    if (!kvl_protocol_client_is_open(h->protocol, KVL_LINK_CLIENT + slot)) {
        h->slots[slot].used = false;
    }
}

static uint32_t slot_of(host *h, uint32_t from, uint64_t life)
{
    uint32_t fresh = KVL_CLIENTS_MAX;
    for (uint32_t i = 0; i < KVL_CLIENTS_MAX; i++) {
        if (!h->slots[i].used) {
            if (fresh == KVL_CLIENTS_MAX) fresh = i;
        } else if (h->slots[i].host == from && h->slots[i].life == life) {
            return i;
        }
    }
    KVL_ASSERT(fresh < KVL_CLIENTS_MAX);
    h->slots[fresh].used = true;
    h->slots[fresh].host = from;
    h->slots[fresh].life = life;
    return fresh;
}

static void arrive(sim *s, const event *e)
{
    if (e->block_bytes > 0) s->under_way_bytes[e->from][e->to] -= e->block_bytes;
    host *to = &s->hosts[e->to];
    if (((s->split >> e->from ^ s->split >> e->to) & 1) != 0) return;
    if (to->life == 0 || to->life != e->to_life) return;
    const uint32_t slot = e->from_asker ? slot_of(to, e->from, e->from_life) : 0;
    const kvl_link link = e->from_asker ? KVL_LINK_CLIENT + slot : peer_of_host(to->index, e->from);
    kvl_message message;
    kvl_error error;
    if (kvl_wire_decode(&s->decoder, e->bytes, e->n_control_bytes, e->frames, e->n_frames, &message,
                        &error) < 0) {
        kvl_protocol_refuse(to->protocol, link, message.request, &error);
    } else {
        kvl_protocol_receive(to->protocol, link, &message, e->frames, e->n_frames, clock_of(to));
    }
    if (e->from_asker) forget_closed(to, slot);
}

/* ---- what requests bring ---- */

static uint64_t variant_of(uint32_t number, uint32_t host_index)
{
    return number % 5 == 0 ? host_index : 0;
}

static bool holds(const sim *s, uint32_t host_index, uint32_t number)
{
    if (number >= NUMBERS_HELD) return false;
    const uint64_t word = (s->options->seed + number) * UINT64_C(0x9e3779b97f4a7c15);
    /* At least one host has it, others by chance. */
    return number % s->options->n_hosts == host_index || ((word >> (32 + host_index)) & 1) != 0;
}

static void check_container(sim *s, const request *r, kvl_container *container)
{
    bool known = false;
    for (uint32_t i = 0; i < s->options->n_hosts && !known; i++) {
        known = holds(s, i, r->number) &&
                tiny_container_is(container, r->number, variant_of(r->number, i));
    }
    if (!known) VIOLATE(s, "fetch of %u gave bytes that nobody has", r->number);
    if (!kvl_container_is_sealed(container)) VIOLATE(s, "fetch of %u is not sealed", r->number);
}

static void check_list(sim *s, const request *r, const kvl_completion *completion)
{
    for (size_t i = 0; i < completion->n_ids; i++) {
        bool known = false;
        for (uint32_t n = r->number; n < NUMBERS_HELD && !known; n += GROUPS) {
            const kvl_digest id = tiny_id(n);
            known = kvl_digest_equal(&id, &completion->ids[i]);
        }
        if (!known) VIOLATE(s, "a list of group %u has an id that is not of it", r->number);
    }
}

static uint8_t reply_byte(uint32_t index, uint32_t host_index, size_t at)
{
    return (uint8_t)(index * 7 + host_index * 31 + at * 13 + 5);
}

static void check_reply(sim *s, const request *r, const kvl_completion *completion)
{
    const uint8_t *bytes = completion->reply;
    const uint32_t index = (uint32_t)(r - s->requests);
    if (completion->n_reply_bytes != index % BODY_BYTES_MAX)
        VIOLATE(s, "reply %u has a wrong size", index);
    for (size_t i = 0; i < completion->n_reply_bytes; i++) {
        if (bytes[i] != reply_byte(index, r->peer, i)) {
            VIOLATE(s, "reply %u is not that of its task", index);
            return;
        }
    }
}

static void count_end(sim *s, const request *r, kvl_status status)
{
    kvl_sim_report *report = s->report;
    report->n_ended++;
    if (status == KVL_OK) report->n_ok++;
    if (status == KVL_ERR_UNREACHABLE) report->n_unreachable++;
    if (status == KVL_ERR_TIMEOUT) report->n_timeout++;
    if (status == KVL_ERR_NOT_FOUND) report->n_not_found++;
    if (!r->is_final) return;
    report->n_final++;
    if (status == KVL_OK) report->n_final_ok++;
}

static void sim_complete(void *context, const kvl_completion *completion)
{
    host *h = context;
    sim *s = h->sim;
    request *r = completion->waiter;
    if (!r->open) VIOLATE(s, "request %u ended twice", (uint32_t)(r - s->requests));
    if (clock_of(h) > r->deadline_ns + h->jumped_ns + 2 * KVL_TICK_NS) {
        VIOLATE(s, "request %u ended %lld ms late", (uint32_t)(r - s->requests),
                (long long)((clock_of(h) - r->deadline_ns) / KVL_NS_PER_MS));
    }
    r->open = false;
    count_end(s, r, completion->status);
    if (completion->status == KVL_OK && r->kind == KVL_MESSAGE_FETCH) {
        check_container(s, r, completion->container);
    }
    if (completion->status == KVL_OK && r->kind == KVL_MESSAGE_LIST) check_list(s, r, completion);
    if (completion->status == KVL_OK && r->kind == KVL_MESSAGE_TASK) check_reply(s, r, completion);
    if (completion->status == KVL_OK && r->kind == KVL_MESSAGE_FETCH && r->number >= NUMBERS_HELD) {
        VIOLATE(s, "a container was found that is nowhere");
    }
    kvl_container_release(completion->container);
    kvl_free(completion->ids);
    kvl_free(completion->reply);
}

static void sim_task(void *context, uint64_t task, const void *body, size_t n_bytes)
{
    host *h = context;
    sim *s = h->sim;
    uint32_t index = UINT32_MAX;
    if (n_bytes >= sizeof index) memcpy(&index, body, sizeof index);
    if (index >= s->n_requests || n_bytes != sizeof index + index % BODY_BYTES_MAX) {
        VIOLATE(s, "a task arrived that nobody sent");
        return;
    }
    s->report->n_tasks_run++;
    if (++s->requests[index].n_runs > 1) VIOLATE(s, "task %u ran twice", index);
    event *e = make_event(s, EVENT_REPLY, s->now_ns + (int64_t)below(s, 400) * KVL_NS_PER_MS, 0);
    e->to = h->index;
    e->to_life = h->life;
    e->task = task;
    e->request = index;
    push(s, e);
}

static void sim_event(void *context, kvl_log_level level, const char *name, const char *text)
{
    (void)context;
    (void)level;
    (void)name;
    (void)text;
}

static void reply(sim *s, const event *e)
{
    host *h = &s->hosts[e->to];
    if (h->life != e->to_life) return;
    kvl_bulk *body = kvl_bulk_create(e->request % BODY_BYTES_MAX);
    KVL_ASSERT(body != NULL);
    for (size_t i = 0; i < kvl_bulk_size(body); i++) {
        kvl_bulk_bytes(body)[i] = reply_byte(e->request, h->index, i);
    }
    kvl_protocol_reply(h->protocol, e->task, KVL_OK, NULL, body, clock_of(h));
}

static void begin_task(host *h, request *r, uint32_t index)
{
    kvl_bulk *body = kvl_bulk_create(sizeof index + index % BODY_BYTES_MAX);
    KVL_ASSERT(body != NULL);
    memset(kvl_bulk_bytes(body), 0, kvl_bulk_size(body));
    memcpy(kvl_bulk_bytes(body), &index, sizeof index);
    kvl_protocol_call(h->protocol, r, peer_of_host(h->index, r->peer), body, r->deadline_ns,
                      clock_of(h));
    kvl_bulk_release(body);
}

static void begin_request(sim *s, const event *e)
{
    host *h = &s->hosts[e->to];
    if (h->life == 0 || s->n_requests == REQUESTS_MAX) return;
    const uint32_t index = s->n_requests++;
    request *r = &s->requests[index];
    const uint32_t dice = below(s, 10);
    *r = (request){.open = true, .is_final = e->is_final, .host = h->index};
    r->kind = dice < 6 ? KVL_MESSAGE_FETCH : dice < 7 ? KVL_MESSAGE_LIST : KVL_MESSAGE_TASK;
    r->deadline_ns =
        clock_of(h) + (e->is_final ? 2500 : 30 + (int64_t)below(s, 2500)) * KVL_NS_PER_MS;
    r->peer = host_of_peer(h->index, below(s, s->options->n_hosts - 1));
    s->report->n_requests++;
    if (r->kind == KVL_MESSAGE_FETCH) {
        /* At the end only what another host has, so that success can be asked for. */
        do {
            r->number = below(s, NUMBERS);
        } while (e->is_final && !holds(s, r->peer, r->number));
        const kvl_digest id = tiny_id(r->number);
        if (happens(s, 300)) kvl_protocol_announce(h->protocol, &id, KVL_CONTAINER_ANCHOR);
        kvl_protocol_fetch(h->protocol, r, &id, r->deadline_ns, clock_of(h));
    } else if (r->kind == KVL_MESSAGE_LIST) {
        r->number = below(s, GROUPS);
        const uint8_t group = (uint8_t)r->number;
        kvl_protocol_list(h->protocol, r, KVL_CONTAINER_ANCHOR, &group, 1, r->deadline_ns,
                          clock_of(h));
    } else {
        begin_task(h, r, index);
    }
}

/* ---- disks that fail ---- */

static host *host_of_disk(kvl_tier *tier)
{
    return (host *)(void *)((uint8_t *)tier - offsetof(host, disk));
}

static bool fails(host *h)
{
    if (!happens(h->sim, h->sim->options->n_disk_errors)) return false;
    h->sim->report->n_disk_errors++;
    return true;
}

static kvl_status disk_get(kvl_tier *tier, const kvl_digest *id, bool check_blocks,
                           kvl_container **container, kvl_error *error)
{
    host *h = host_of_disk(tier);
    *container = NULL;
    if (fails(h)) return KVL_FAIL(error, KVL_ERR_IO, "the disk does not answer");
    return h->store.tier.ops->get(&h->store.tier, id, check_blocks, container, error);
}

static bool disk_has(kvl_tier *tier, const kvl_digest *id)
{
    host *h = host_of_disk(tier);
    return !fails(h) && h->store.tier.ops->has(&h->store.tier, id);
}

static void disk_list(kvl_tier *tier,
                      bool (*visit)(void *context, const kvl_digest *id, kvl_container_kind kind,
                                    uint64_t n_bytes),
                      void *context)
{
    host *h = host_of_disk(tier);
    if (!fails(h)) h->store.tier.ops->list(&h->store.tier, visit, context);
}

static const kvl_tier_ops disk_ops = {
    .name = "failing", .get = disk_get, .has = disk_has, .list = disk_list};

/* ---- hosts ---- */

static void revive(sim *s, uint32_t index)
{
    static const char *const names[HOSTS_MAX] = {"h0", "h1", "h2", "h3", "h4",  "h5",
                                                 "h6", "h7", "h8", "h9", "h10", "h11"};
    host *h = &s->hosts[index];
    if (h->life != 0) return;
    h->life = ++s->last_life;
    memset(h->dialled, 0, sizeof h->dialled);
    memset(h->slots, 0, sizeof h->slots);
    const char *peers[HOSTS_MAX];
    for (uint32_t i = 0; i + 1 < s->options->n_hosts; i++) peers[i] = names[host_of_peer(index, i)];
    const kvl_protocol_options options = {
        .name = names[index],
        .epoch = h->life,
        .seed = s->options->seed,
        .peers = peers,
        .n_peers = s->options->n_hosts - 1,
        .store = &h->disk,
        .timeout_ms = 800,
        .runs_tasks = true,
        .output = {.send = sim_send,
                   .complete = sim_complete,
                   .task = sim_task,
                   .event = sim_event,
                   .context = h},
    };
    KVL_ASSERT(kvl_protocol_create(&options, clock_of(h), &h->protocol) == KVL_OK);
    push_for_host(s, EVENT_TICK, index, index, s->now_ns + KVL_TICK_NS);
    for (uint32_t i = 0; i < s->options->n_hosts; i++) {
        if (i == index) continue;
        const int64_t soon_ns = s->now_ns + (int64_t)below(s, 20000000);
        push_for_host(s, EVENT_CONNECT, index, i, soon_ns);
        if (s->hosts[i].life != 0) push_for_host(s, EVENT_CONNECT, i, index, soon_ns + 1);
    }
}

static void count_host(sim *s, const host *h)
{
    const kvl_exchange_stats *stats = kvl_protocol_stats(h->protocol);
    s->report->n_blocks_damaged += stats->blocks_damaged;
    s->report->n_refused += stats->messages_refused;
    s->report->n_hedges += stats->hedges;
    s->report->n_hedges_won += stats->hedges_won;
}

static void kill_host(sim *s, uint32_t index)
{
    host *h = &s->hosts[index];
    if (h->life == 0 || s->calm) return;
    count_host(s, h);
    kvl_protocol_destroy(h->protocol);
    h->protocol = NULL;
    s->report->n_kills++;
    for (uint32_t i = 0; i < s->n_requests; i++) {
        if (s->requests[i].host == index && s->requests[i].open) {
            s->requests[i].open = false;
            s->report->n_ended++;
        }
    }
    for (uint32_t i = 0; i < s->options->n_hosts; i++) {
        /* Most of the others notice; for some it just falls silent. */
        if (i != index && s->hosts[i].dialled[index] == h->life && below(s, 10) < 7) {
            push_for_host(s, EVENT_DISCONNECT, i, index, s->now_ns + 1000000);
        }
    }
    h->life = 0;
    push_for_host(s, EVENT_REVIVE, index, index,
                  s->now_ns + (int64_t)below(s, 1500) * KVL_NS_PER_MS);
}

static void connect_hosts(sim *s, const event *e)
{
    host *h = &s->hosts[e->to];
    const uint64_t life = s->hosts[e->from].life;
    if (h->life == 0 || h->life != e->to_life || life == 0 || h->dialled[e->from] == life) return;
    const kvl_link link = peer_of_host(e->to, e->from);
    if (h->dialled[e->from] != 0) kvl_protocol_disconnected(h->protocol, link, clock_of(h));
    h->dialled[e->from] = life;
    kvl_protocol_connected(h->protocol, link, clock_of(h));
}

static void disconnect_hosts(sim *s, const event *e)
{
    host *h = &s->hosts[e->to];
    if (h->life == 0 || h->life != e->to_life || h->dialled[e->from] != e->from_life) return;
    h->dialled[e->from] = 0;
    kvl_protocol_disconnected(h->protocol, peer_of_host(e->to, e->from), clock_of(h));
}

static void tick(sim *s, const event *e)
{
    host *h = &s->hosts[e->to];
    if (h->life != e->to_life) return;
    kvl_protocol_tick(h->protocol, clock_of(h));
    h->jumped_ns = 0;
    while (kvl_protocol_work(h->protocol, clock_of(h))) continue;
    for (uint32_t slot = 0; slot < KVL_CLIENTS_MAX; slot++) forget_closed(h, slot);
    push_for_host(s, EVENT_TICK, e->to, e->to, s->now_ns + KVL_TICK_NS);
}

/* Some hosts on this side, some on that; the next split takes the place of this one. */
static void split(sim *s)
{
    if (s->calm) return;
    s->split = below(s, 1u << s->options->n_hosts);
    s->report->n_splits++;
    push_for_host(s, EVENT_JOIN, 0, 0, s->now_ns + (int64_t)below(s, 900) * KVL_NS_PER_MS);
}

/* Only forward: the clock is a monotonic one. */
static void jump(sim *s, host *h)
{
    if (s->calm) return;
    const int64_t by_ns = (int64_t)below(s, 6000) * KVL_NS_PER_MS;
    h->ahead_ns += by_ns;
    h->jumped_ns += by_ns;
    s->report->n_jumps++;
}

static void run_event(sim *s, const event *e)
{
    switch (e->kind) {
    case EVENT_MESSAGE: arrive(s, e); break;
    case EVENT_TICK: tick(s, e); break;
    case EVENT_CONNECT: connect_hosts(s, e); break;
    case EVENT_DISCONNECT: disconnect_hosts(s, e); break;
    case EVENT_REQUEST: begin_request(s, e); break;
    case EVENT_REPLY: reply(s, e); break;
    case EVENT_KILL: kill_host(s, e->to); break;
    case EVENT_REVIVE: revive(s, e->to); break;
    case EVENT_SPLIT: split(s); break;
    case EVENT_JOIN: s->split = 0; break;
    case EVENT_JUMP: jump(s, &s->hosts[e->to]); break;
    }
}

/* ---- a run ---- */

static void fill_stores(sim *s)
{
    for (uint32_t i = 0; i < s->options->n_hosts; i++) {
        tiny_store_init(&s->hosts[i].store);
        s->hosts[i].disk.ops = &disk_ops;
        for (uint32_t n = 0; n < NUMBERS_HELD; n++) {
            if (!holds(s, i, n)) continue;
            tiny_shape shape = {
                .n_blocks = 1 + n % 6, .block_bytes = 8 + 1000 * (n % 4), .group = n % GROUPS};
            if (n == 1) shape.block_bytes = 1200000; /* more than a piece */
            KVL_ASSERT(tiny_store_add(&s->hosts[i].store, n, variant_of(n, i), &shape));
        }
    }
}

static void plan(sim *s)
{
    const kvl_sim_options *o = s->options;
    for (uint32_t i = 0; i < o->n_hosts; i++)
        push_for_host(s, EVENT_REVIVE, i, i, (int64_t)i * 1000000);
    for (uint32_t i = 0; i < o->n_requests; i++) {
        const int64_t at_ns = (int64_t)kvl_random_below(&s->random, (uint64_t)chaos_ns);
        push_for_host(s, EVENT_REQUEST, below(s, o->n_hosts), 0, at_ns);
    }
    for (uint32_t i = 0; o->kills && i < 3; i++) {
        push_for_host(s, EVENT_KILL, below(s, o->n_hosts), 0,
                      (int64_t)kvl_random_below(&s->random, (uint64_t)chaos_ns));
    }
    for (uint32_t i = 0; i < 3; i++) {
        const int64_t split_ns = o->splits ? (int64_t)below(s, 1900) * KVL_NS_PER_MS : 0;
        const int64_t jump_ns = o->jumps ? (int64_t)below(s, 1900) * KVL_NS_PER_MS : 0;
        if (o->splits) push_for_host(s, EVENT_SPLIT, 0, 0, split_ns);
        if (o->jumps) push_for_host(s, EVENT_JUMP, below(s, o->n_hosts), 0, jump_ns);
    }
    for (uint32_t i = 0; i < 3 * o->n_hosts; i++) {
        event *e = make_event(s, EVENT_REQUEST, calm_ns + (int64_t)i * 1000000, 0);
        e->to = i % o->n_hosts;
        e->is_final = true;
        push(s, e);
    }
}

static void finish(sim *s, bool is_whole)
{
    for (uint32_t i = 0; i < s->options->n_hosts; i++) {
        host *h = &s->hosts[i];
        if (h->life != 0) count_host(s, h);
        kvl_protocol_destroy(h->protocol);
        tiny_store_deinit(&h->store);
    }
    while (s->n_events > 0) kvl_free(pop(s));
    kvl_free(s->heap);
    for (uint32_t i = 0; is_whole && i < s->n_requests; i++) {
        if (s->requests[i].open) VIOLATE(s, "request %u never ended", i);
    }
    if (is_whole && s->report->n_final != s->report->n_final_ok) {
        VIOLATE(s, "%llu of %llu requests failed after the faults had stopped",
                (unsigned long long)(s->report->n_final - s->report->n_final_ok),
                (unsigned long long)s->report->n_final);
    }
}

void kvl_sim_run(const kvl_sim_options *options, kvl_sim_report *report)
{
    KVL_ASSERT(options->n_hosts >= 2 && options->n_hosts <= HOSTS_MAX);
    memset(report, 0, sizeof *report);
    sim *s = kvl_alloc_zero(1, sizeof *s);
    KVL_ASSERT(s != NULL);
    s->options = options;
    s->report = report;
    s->random.state = options->seed;
    for (uint32_t i = 0; i < options->n_hosts; i++) {
        s->hosts[i].sim = s;
        s->hosts[i].index = i;
    }
    fill_stores(s);
    plan(s);
    bool is_whole = true;
    while (s->n_events > 0 && s->heap[0]->at_ns < end_ns && report->violation[0] == '\0') {
        event *e = pop(s);
        s->now_ns = e->at_ns;
        s->calm = s->now_ns >= chaos_ns;
        if (s->calm) s->split = 0;
        report->n_steps++;
        report->trace =
            (report->trace ^ (uint64_t)e->at_ns ^ (uint64_t)e->kind << 56 ^ (uint64_t)e->to << 48) *
            UINT64_C(0x100000001b3);
        is_whole = report->n_steps != options->n_steps;
        run_event(s, e);
        kvl_free(e);
        if (!is_whole) break;
    }
    finish(s, is_whole);
    kvl_free(s);
}

kvl_sim_options kvl_sim_everything(uint64_t seed)
{
    kvl_random random = {seed ^ UINT64_C(0x5eed)};
    return (kvl_sim_options){.seed = seed,
                             .n_hosts = 2 + (uint32_t)kvl_random_below(&random, HOSTS_MAX - 1),
                             .n_requests = 40 + (uint32_t)kvl_random_below(&random, 80),
                             .n_lost = (uint32_t)kvl_random_below(&random, 120),
                             .n_doubled = (uint32_t)kvl_random_below(&random, 80),
                             .n_damaged = (uint32_t)kvl_random_below(&random, 40),
                             .n_disk_errors = (uint32_t)kvl_random_below(&random, 100),
                             .reorders = kvl_random_below(&random, 2) == 1,
                             .kills = kvl_random_below(&random, 2) == 1,
                             .splits = kvl_random_below(&random, 2) == 1,
                             .jumps = kvl_random_below(&random, 2) == 1};
}
