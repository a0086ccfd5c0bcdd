/* exchange/exchange.h: hosts talk to one another: who has a container, give it to me block by
 * block, I have a new one, and tasks from a client.
 *
 * The protocol is a state machine without I/O or clock (exchange/protocol.h); one thread here
 * drives it with ZeroMQ sockets and serves peers straight out of the store. docs/protocol.md has
 * the messages. A peer that answers nothing is a miss after the deadline, never a hang.
 * Threads  Every function may be called from any thread; callbacks run on the exchange thread and
 *          must not block. */
#ifndef KVL_EXCHANGE_EXCHANGE_H
#define KVL_EXCHANGE_EXCHANGE_H

#include "base/clock.h"
#include "exchange/access.h"
#include "store/store.h"

#define KVL_PEERS_MAX 64u
#define KVL_TASK_BYTES_MAX (64u << 20)
#define KVL_EXCHANGE_TENANTS_MAX 64u

typedef struct kvl_exchange kvl_exchange;

typedef struct kvl_exchange_peer {
    const char *name;
    const char *endpoint;   /* "ipc:///path" or "tcp://host:port" */
    const char *public_key; /* as 40 characters, for CURVE over tcp; NULL: plain, loopback only */
} kvl_exchange_peer;

/* One of several whose containers one exchange serves. */
typedef struct kvl_exchange_tenant {
    const char *name; /* as in the allow-list */
    kvl_tier *store;  /* borrowed */
} kvl_exchange_tenant;

/* A task that a client sent: answer it once with kvl_exchange_reply, from any thread.
 * `body` is borrowed for the call. */
typedef void kvl_exchange_task_handler(void *context, uint64_t task, const void *body,
                                       size_t n_bytes);

typedef struct kvl_exchange_options {
    const char *name;     /* of this host, unique among its peers */
    const char *endpoint; /* to listen on; NULL for a client that only calls */
    const kvl_exchange_peer *peers;
    size_t n_peers;
    kvl_tier *store; /* what is served to peers; NULL for a client; borrowed */
    /* What is served to those whose key is another tenant's; who is of a tenant that is not here is
     * served nothing. Without any, `store` is every tenant's. */
    const kvl_exchange_tenant *tenants;
    size_t n_tenants; /* at most KVL_EXCHANGE_TENANTS_MAX */
    /* tcp beyond the loopback needs both; see exchange/access.h. Keys are copied, the list is
     * borrowed and may be reloaded: then kvl_exchange_recheck. */
    const kvl_key_pair *keys;
    kvl_allow_list *allow_list;
    kvl_digest fingerprint; /* a peer with another is refused, with a text that names both */
    const kvl_clock *clock;
    uint32_t timeout_ms;             /* of one request without progress; 0 for 2000 */
    kvl_exchange_task_handler *task; /* NULL: tasks are refused */
    void *task_context;
} kvl_exchange_options;

/* Binds, connects and starts the thread.
 * Errors   KVL_ERR_INVALID, KVL_ERR_IO (text: endpoint and reason), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_exchange_start(const kvl_exchange_options *options,
                                           kvl_exchange **exchange, kvl_error *error);
/* Ends open requests with KVL_ERR_CANCELLED, closes sockets, waits. NULL does nothing. */
void kvl_exchange_stop(kvl_exchange *exchange);

/* Fetches a container: asks the peers who has it (announcements are remembered), then fetches from
 * one, block by block under credit; blocks are checked as they arrive; another holder is tried when
 * one fails. Waits until it is done or the deadline passes.
 * container  a reference, sealed and checked whole; *from gets the peer's name (may be NULL)
 * Errors     KVL_ERR_NOT_FOUND (no peer has it), KVL_ERR_TIMEOUT, KVL_ERR_UNREACHABLE,
 *            KVL_ERR_DAMAGED, KVL_ERR_FOREIGN, KVL_ERR_CANCELLED */
KVL_MUST_USE kvl_status kvl_exchange_fetch(kvl_exchange *exchange, const kvl_digest *id,
                                           int64_t deadline_ns, kvl_container **container,
                                           char *from, size_t from_size, kvl_error *error);

/* Who wants to know how a fetch goes on. Called on the exchange thread; must not block. */
typedef struct kvl_exchange_watch {
    /* Blocks 0 .. n_ready - 1 of the container are here and checked. Borrowed for the call: shared
     * by who keeps it. `done` may bring another one, when holders of the same id differ. May be
     * NULL. */
    void (*progress)(void *context, kvl_container *container, uint32_t n_ready);
    /* Once. Takes the container (NULL unless `status` is KVL_OK); texts are borrowed. */
    void (*done)(void *context, kvl_status status, const char *text, kvl_container *container,
                 const char *from);
    void *context;
} kvl_exchange_watch;

/* Same as kvl_exchange_fetch, without waiting: `watch` is copied and told.
 * Errors   KVL_ERR_NO_MEMORY, KVL_ERR_CANCELLED (the exchange is ending): then nothing is told */
KVL_MUST_USE kvl_status kvl_exchange_fetch_start(kvl_exchange *exchange, const kvl_digest *id,
                                                 int64_t deadline_ns,
                                                 const kvl_exchange_watch *watch, kvl_error *error);

/* Tells all peers that this host has a container now. Never blocks. */
void kvl_exchange_announce(kvl_exchange *exchange, const kvl_digest *id, kvl_container_kind kind);

/* True where a peer that is up has announced it: a hint, from what is known here. */
bool kvl_exchange_was_announced(kvl_exchange *exchange, const kvl_digest *id);

/* Asks all peers for the ids of containers of a kind (used for anchors after a restart) whose
 * header's `extra` starts with `prefix`, and waits for those that answer before the deadline.
 * Owns     *ids: ended with kvl_free */
KVL_MUST_USE kvl_status kvl_exchange_list(kvl_exchange *exchange, kvl_container_kind kind,
                                          const void *prefix, size_t n_prefix_bytes,
                                          int64_t deadline_ns, kvl_digest **ids, size_t *n_ids,
                                          kvl_error *error);

/* The allow-list was reloaded: who is not on it any more is disconnected, rights change. */
void kvl_exchange_recheck(kvl_exchange *exchange);

/* True while the peer answers. */
bool kvl_exchange_peer_is_up(kvl_exchange *exchange, const char *peer);

/* Sends a task to a peer and waits for its reply.
 * Owns     *reply: ended with kvl_free
 * Errors   KVL_ERR_TIMEOUT, KVL_ERR_UNREACHABLE, KVL_ERR_BUSY, or what the peer replied */
KVL_MUST_USE kvl_status kvl_exchange_call(kvl_exchange *exchange, const char *peer,
                                          const void *body, size_t n_bytes, int64_t deadline_ns,
                                          void **reply, size_t *n_reply_bytes, kvl_error *error);
/* Answers a task; `status` below 0 sends `text` as its error. */
void kvl_exchange_reply(kvl_exchange *exchange, uint64_t task, kvl_status status, const char *text,
                        const void *body, size_t n_bytes);

typedef struct kvl_exchange_stats {
    uint64_t containers_fetched, bytes_fetched, containers_served, bytes_served;
    uint64_t fetches_failed, blocks_damaged, peers_refused, peers_lost;
    uint64_t messages_refused;   /* malformed, unexpected, without a right, or out of order */
    uint64_t keys_refused;       /* not on the allow-list */
    uint64_t bulk_refused;       /* records that did not open, connections without a token */
    uint64_t hedges, hedges_won; /* second holders that were asked, and those that were faster */
} kvl_exchange_stats;
void kvl_exchange_stats_of(kvl_exchange *exchange, kvl_exchange_stats *stats);

#endif /* KVL_EXCHANGE_EXCHANGE_H */
