/* exchange/protocol.h: the protocol between hosts as a state machine, without sockets, clock,
 * threads or chance of its own.
 *
 * Events come in as calls: a link is connected, a message arrived, a local request, time passed.
 * What is to be done goes out through kvl_protocol_output while the call runs. The same events in
 * the same order give the same output, so a simulator can replay anything (tests/support/exchange).
 *
 * Links    A process dials each of its peers once and asks on that link; it serves those who
 *          dialled it. 0 .. KVL_PEERS_MAX - 1 are the peers in the order of the options,
 *          KVL_LINK_CLIENT + slot are those who dialled.
 * Store    The tier that is served is called right here, in the middle of an event: it hands out
 *          references to memory or to a map, and whoever waits for the disk is the sending thread.
 * Memory   All tables have a fixed size (limits below). What a peer can make this process hold: one
 *          container for each fetch that was asked for here, a list or a reply that was asked for
 *          here, KVL_STREAMS_PER_LINK references a link, replies up to KVL_REPLY_BYTES_KEPT_MAX.
 * Threads  One thread at a time. */
#ifndef KVL_EXCHANGE_PROTOCOL_H
#define KVL_EXCHANGE_PROTOCOL_H

#include "base/log.h"
#include "exchange/access.h"
#include "exchange/bulk.h"
#include "exchange/exchange.h"

#define KVL_CLIENTS_MAX 128u
#define KVL_LINK_CLIENT KVL_PEERS_MAX
#define KVL_LINKS_MAX (KVL_PEERS_MAX + KVL_CLIENTS_MAX)

/* Local requests at a time; more are KVL_ERR_BUSY. A power of two, part of request numbers. */
#define KVL_OPS_MAX 256u
/* Tasks that run or whose reply is kept, of all clients together; more are KVL_ERR_BUSY. */
#define KVL_TASKS_MAX 128u
#define KVL_REPLY_BYTES_KEPT_MAX ((size_t)128 << 20)
/* Numbers of tasks of one client that are remembered, so that none runs twice. */
#define KVL_TASKS_REMEMBERED 128u
/* Blocks under way: a fetch has KVL_STREAM_WINDOW_BYTES of credit, a peer two fetches at once. */
#define KVL_STREAMS_PER_PEER 2u
#define KVL_STREAM_WINDOW_BYTES ((uint64_t)4 << 20)
/* Hedging: of a holder's latest times to begin, how many there must be and are kept; no other
 * holder is asked before the least time; and at most so many in one fetch. */
#define KVL_HEDGE_SAMPLES 32u
#define KVL_HEDGE_SAMPLES_MIN 8u
#define KVL_HEDGE_NS_MIN (20 * KVL_NS_PER_MS)
#define KVL_HEDGES_MAX 2u
/* What a server keeps for one who dialled it; the oldest idle one is dropped for a new one. */
#define KVL_STREAMS_PER_LINK 4u
#define KVL_PIECE_BYTES ((size_t)1 << 20)
/* A message costs at least this much credit, so that tiny blocks cannot pile up by the thousand. */
#define KVL_PIECE_CHARGE_MIN ((uint64_t)16 << 10)
#define KVL_LISTINGS_MAX 8u
#define KVL_LIST_TOTAL_IDS_MAX 65536u
/* Containers that a listing looks at before other events get their turn. */
#define KVL_LISTING_STEP 64u

#define KVL_TICK_NS (10 * KVL_NS_PER_MS)
#define KVL_PING_NS (200 * KVL_NS_PER_MS)
/* A process that dies is noticed by its connection, within milliseconds. Silence only finds one
 * that hangs, and must not mistake one for it that is short of processor time: with 1 s, that
 * happened on two cores with a load of 12. */
#define KVL_PEER_SILENCE_NS (3000 * KVL_NS_PER_MS)
#define KVL_CLIENT_SILENCE_NS (10000 * KVL_NS_PER_MS)
#define KVL_HELLO_RETRY_NS (100 * KVL_NS_PER_MS)
#define KVL_CONNECT_GRACE_NS (500 * KVL_NS_PER_MS)
#define KVL_TASK_POLL_NS (1000 * KVL_NS_PER_MS)
#define KVL_STREAM_IDLE_NS (10 * KVL_NS_PER_S)
#define KVL_REPLY_KEPT_NS (10 * KVL_NS_PER_S)

typedef struct kvl_protocol kvl_protocol;
typedef uint32_t kvl_link;

/* How a local request ended. The receiver takes container, ids and reply where they are not NULL;
 * texts are borrowed for the call. */
typedef struct kvl_completion {
    void *waiter; /* as given to the request */
    kvl_status status;
    const char *text;         /* of an error */
    const char *from;         /* peer that a container came from, or NULL */
    kvl_container *container; /* a reference */
    kvl_digest *ids;          /* ended with kvl_free */
    size_t n_ids;
    void *reply; /* ended with kvl_free */
    size_t n_reply_bytes;
} kvl_completion;

/* Where output goes. No slot may call the protocol back or block. */
typedef struct kvl_protocol_output {
    /* Sends or drops. Bytes of frames stay alive only as long as `owner` is shared.
     * Errors   KVL_ERR_BUSY (the link's queue is full now), KVL_ERR_UNREACHABLE (nobody there) */
    kvl_status (*send)(void *context, kvl_link link, const kvl_message *message,
                       const kvl_frame *frames, size_t n_frames, kvl_owner owner);
    void (*complete)(void *context, const kvl_completion *completion);
    /* Of a fetch that is under way: blocks 0 .. n_ready - 1 of the container are here and checked.
     * Borrowed for the call; the completion may bring another container, when holders differ. NULL:
     * nobody wants to know. */
    void (*progress)(void *context, void *waiter, kvl_container *container, uint32_t n_ready);
    /* A task to run: to be answered once with kvl_protocol_reply, later. `body` is borrowed. */
    void (*task)(void *context, uint64_t task, const void *body, size_t n_bytes);
    /* Of the second connection for blocks of a link; all NULL where there is none. offer: what
     * Hello or Welcome are to say of it; agree: what the other side has said; reset: the link is
     * another one from now on, and so are its secrets. */
    void (*bulk_offer)(void *context, kvl_link link, kvl_bulk_offer *offer);
    void (*bulk_agree)(void *context, kvl_link link, const kvl_bulk_offer *offer);
    void (*bulk_reset)(void *context, kvl_link link);
    /* Of pieces that go straight into their container (exchange/landing.h); all NULL where there is
     * no such way. land: a stream fills the blocks from `block` on; claim: the protocol itself
     * writes up to `block`, false where what has landed there is not to be believed; leave: the
     * stream has ended, and when it returns nobody writes there. */
    void (*land)(void *context, kvl_link link, uint64_t request, kvl_container *container,
                 uint32_t block);
    bool (*claim)(void *context, kvl_link link, uint64_t request, uint32_t block);
    void (*leave)(void *context, kvl_link link, uint64_t request);
    /* Something an operator wants to know: an event name and key=value text. */
    void (*event)(void *context, kvl_log_level level, const char *event, const char *text);
    void *context;
} kvl_protocol_output;

typedef struct kvl_protocol_options {
    const char *name;
    uint64_t epoch;           /* random, not 0 */
    uint64_t seed;            /* of the directory's mix */
    const char *const *peers; /* names */
    size_t n_peers;
    kvl_tier *store; /* may be NULL; borrowed */
    kvl_digest fingerprint;
    uint32_t timeout_ms; /* > 0 */
    bool runs_tasks;
    kvl_protocol_output output;
} kvl_protocol_options;

/* Owns     *protocol: ended with kvl_protocol_destroy
 * Errors   KVL_ERR_NO_MEMORY. Names are checked by the caller. */
KVL_MUST_USE kvl_status kvl_protocol_create(const kvl_protocol_options *options, int64_t now_ns,
                                            kvl_protocol **protocol);
/* Requests that are still open are dropped without completion: kvl_protocol_stop first. */
void kvl_protocol_destroy(kvl_protocol *protocol);

/* ---- events from the links ---- */

/* A dialled link can carry messages now. */
void kvl_protocol_connected(kvl_protocol *protocol, kvl_link link, int64_t now_ns);
/* Nobody is there any more; what was under way is lost. */
void kvl_protocol_disconnected(kvl_protocol *protocol, kvl_link link, int64_t now_ns);
/* A decoded message; frames are borrowed for the call. */
void kvl_protocol_receive(kvl_protocol *protocol, kvl_link link, const kvl_message *message,
                          const kvl_frame *frames, size_t n_frames, int64_t now_ns);
/* What one who dialled us may do, and whose containers it sees; KVL_RIGHT_ALL and the store of the
 * options unless it is called. `store` NULL: none. */
void kvl_protocol_set_access(kvl_protocol *protocol, kvl_link link, uint32_t rights,
                             kvl_tier *store);
/* Bytes that are no message: counted, and the sender is told. */
void kvl_protocol_refuse(kvl_protocol *protocol, kvl_link link, uint64_t request,
                         const kvl_error *error);
/* To be called about every KVL_TICK_NS. */
void kvl_protocol_tick(kvl_protocol *protocol, int64_t now_ns);
/* Does a step of long work; true while there is more. */
bool kvl_protocol_work(kvl_protocol *protocol, int64_t now_ns);

/* ---- local requests; every one ends with exactly one completion, possibly within the call ---- */

void kvl_protocol_fetch(kvl_protocol *protocol, void *waiter, const kvl_digest *id,
                        int64_t deadline_ns, int64_t now_ns);
/* prefix is borrowed for the call, at most KVL_LIST_PREFIX_BYTES_MAX. */
void kvl_protocol_list(kvl_protocol *protocol, void *waiter, kvl_container_kind kind,
                       const void *prefix, size_t n_prefix_bytes, int64_t deadline_ns,
                       int64_t now_ns);
/* Shares body. peer: index in the options. */
void kvl_protocol_call(kvl_protocol *protocol, void *waiter, uint32_t peer, kvl_bulk *body,
                       int64_t deadline_ns, int64_t now_ns);
void kvl_protocol_announce(kvl_protocol *protocol, const kvl_digest *id, kvl_container_kind kind);
/* Takes body, which may be NULL; a task that is not known any more is ignored. */
void kvl_protocol_reply(kvl_protocol *protocol, uint64_t task, kvl_status status, const char *text,
                        kvl_bulk *body, int64_t now_ns);
/* Ends all requests with KVL_ERR_CANCELLED and says goodbye on every link. */
void kvl_protocol_stop(kvl_protocol *protocol);

/* ---- looking ---- */

bool kvl_protocol_peer_is_up(const kvl_protocol *protocol, uint32_t peer);
/* Peers that announced a container, bit p for peer p; from any thread. */
uint64_t kvl_protocol_announced(kvl_protocol *protocol, const kvl_digest *id);
/* False once a client's session has ended: the transport forgets its slot. */
bool kvl_protocol_client_is_open(const kvl_protocol *protocol, kvl_link link);
/* True while a request, a stream or a task is open. */
bool kvl_protocol_is_active(const kvl_protocol *protocol);
const kvl_exchange_stats *kvl_protocol_stats(const kvl_protocol *protocol);

/* Index of a task in 0 .. KVL_TASKS_MAX - 1; unique among tasks that are not answered yet. */
uint32_t kvl_task_index(uint64_t task);

#endif /* KVL_EXCHANGE_PROTOCOL_H */
