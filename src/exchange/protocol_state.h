/* exchange/protocol_state.h: what the parts of the protocol know of one another. Private to
 * protocol.c (events, requests), peer.c (those we dial), session.c (those who dial us), fetch.c and
 * ask.c (requests from here), serve.c and task.c (requests from there). */
#ifndef KVL_EXCHANGE_PROTOCOL_STATE_H
#define KVL_EXCHANGE_PROTOCOL_STATE_H

#include "exchange/directory.h"
#include "exchange/protocol.h"

typedef enum kvl_peer_state {
    KVL_PEER_AWAY,     /* no connection */
    KVL_PEER_GREETING, /* connected, no Welcome yet */
    KVL_PEER_UP,
    KVL_PEER_REFUSED, /* it or we refused; until it restarts or reconnects */
} kvl_peer_state;

typedef struct kvl_peer {
    char name[KVL_NAME_BYTES_MAX + 1];
    kvl_peer_state state;
    bool connected; /* as the transport says */
    bool ever_up;
    bool shares_kv;         /* same fingerprint */
    uint64_t epoch;         /* of its process, once it was up */
    uint64_t hello_request; /* of the Hello that is not answered yet; 0: none */
    int64_t hello_ns, heard_ns, pinged_ns;
    uint64_t task_bytes_max;
    uint32_t n_streams; /* fetches of ours that it is sending now */
    /* ring of the latest times from Fetch to FetchHeader */
    int64_t header_ns[KVL_HEDGE_SAMPLES];
    uint32_t n_headers; /* ever */
    kvl_error refusal;
} kvl_peer;

/* Blocks that we send. */
typedef struct kvl_stream {
    kvl_container *container; /* a reference; NULL: free */
    uint64_t request;
    uint32_t block, block_past;
    uint64_t offset;
    uint64_t charged, granted; /* credit used and given, since the Fetch */
    int64_t moved_ns;
    bool stalled; /* the link's queue was full */
} kvl_stream;

typedef struct kvl_session {
    bool open;
    bool gone; /* the transport found nobody there: to be ended at the next tick */
    bool shares_kv;
    uint64_t serial; /* unique among all sessions of this process */
    uint64_t epoch;
    char name[KVL_NAME_BYTES_MAX + 1];
    uint32_t peer; /* the same host among our peers; KVL_PEERS_MAX where it is none */
    int64_t heard_ns;
    kvl_stream streams[KVL_STREAMS_PER_LINK];
    uint64_t tasks[KVL_TASKS_REMEMBERED]; /* ring of request numbers */
    uint64_t n_tasks;
    uint64_t task_floor; /* numbers up to this one have left the ring */
} kvl_session;

typedef enum kvl_task_state { KVL_TASK_FREE, KVL_TASK_RUNNING, KVL_TASK_REPLIED } kvl_task_state;

typedef struct kvl_task {
    kvl_task_state state;
    bool unwanted; /* runs, but nobody waits for the reply any more */
    uint64_t generation;
    kvl_link link;
    uint64_t serial; /* of the session */
    uint64_t request;
    kvl_status status;
    char text[KVL_WIRE_TEXT_BYTES_MAX + 1];
    kvl_bulk *body; /* of the reply; may be NULL */
    int64_t replied_ns;
} kvl_task;

/* A List that is being answered. */
typedef struct kvl_listing {
    bool open;
    kvl_link link;
    uint64_t serial;
    uint64_t request;
    uint8_t prefix[KVL_LIST_PREFIX_BYTES_MAX];
    size_t n_prefix_bytes;
    kvl_container_kind kind;
    kvl_digest *ids; /* candidates; the first n_kept of them are the answer so far */
    size_t n_ids, n_looked, n_kept, capacity;
    bool truncated;
} kvl_listing;

typedef enum kvl_op_kind { KVL_OP_FREE, KVL_OP_FETCH, KVL_OP_LIST, KVL_OP_CALL } kvl_op_kind;

typedef enum kvl_fetch_state {
    KVL_FETCH_SEARCHING, /* asking who has it */
    KVL_FETCH_WAITING,   /* holders are known, all of them are busy with fetches of ours */
    KVL_FETCH_STREAMING,
} kvl_fetch_state;

/* A local request. Sets of peers are masks, bit p for peer p. */
typedef struct kvl_op {
    kvl_op_kind kind;
    void *waiter;
    uint64_t order; /* of arrival */
    int64_t deadline_ns;
    uint64_t request;          /* of Locate, List or Task */
    int64_t asked_ns, sent_ns; /* first and latest sending of it */
    uint64_t asked, answered, failed;
    kvl_error cause; /* of the last failure of a peer; status 0: none */
    /* fetch */
    kvl_digest id;
    kvl_fetch_state state;
    uint64_t holders;
    uint64_t damaged_by;
    uint32_t n_damaged;
    uint32_t peer; /* that sends */
    uint64_t stream_request;
    bool header_seen, moved; /* in this stream */
    bool trusts_landing;     /* same */
    int64_t begun_ns;        /* when this stream was asked for */
    /* a second holder that has been asked as well; not while a header is here */
    bool has_hedge;
    uint32_t hedge_peer, n_hedges;
    uint64_t hedge_request;
    int64_t hedge_begun_ns;
    uint32_t n_retries; /* since the last progress */
    int64_t moved_ns;
    uint64_t charged, granted;
    kvl_container *container;
    uint64_t header_checksum;
    uint32_t header_peer;
    uint32_t n_blocks, block;
    uint64_t offset;
    /* list */
    kvl_container_kind wanted_kind;
    uint8_t prefix[KVL_LIST_PREFIX_BYTES_MAX];
    size_t n_prefix_bytes;
    kvl_digest *ids;
    size_t n_ids;
    /* call: `peer` above */
    kvl_bulk *body;
    bool sent;
} kvl_op;

struct kvl_protocol {
    char name[KVL_NAME_BYTES_MAX + 1];
    uint64_t epoch;
    kvl_digest fingerprint;
    kvl_tier *store;
    bool runs_tasks;
    int64_t timeout_ns;
    int64_t started_ns, ticked_ns;
    kvl_protocol_output output;
    kvl_exchange_stats stats;
    uint64_t last_number; /* of requests and of orders */
    uint64_t last_serial;
    uint32_t n_peers, n_ops, n_streams, n_listings;
    size_t reply_bytes_kept;
    kvl_peer_directory *directory;
    kvl_peer peers[KVL_PEERS_MAX];
    kvl_session sessions[KVL_CLIENTS_MAX];
    uint32_t rights[KVL_CLIENTS_MAX];  /* of who dialled, session or not */
    kvl_tier *stores[KVL_CLIENTS_MAX]; /* same */
    kvl_task tasks[KVL_TASKS_MAX];
    kvl_listing listings[KVL_LISTINGS_MAX];
    kvl_op ops[KVL_OPS_MAX];
};

#define KVL_NO_OWNER ((kvl_owner){NULL, NULL})

/* Fills an error that is kept or sent instead of returned. */
#define KVL_NOTE(error, status, ...)                                                               \
    do {                                                                                           \
        const kvl_status kvl_noted = KVL_FAIL(error, status, __VA_ARGS__);                         \
        (void)kvl_noted;                                                                           \
    } while (0)

/* ---- protocol.c ---- */

/* An empty message of a kind. */
kvl_message kvl_message_of(kvl_message_kind kind, uint64_t request);
/* Sends with our epoch on it. A client that is not there any more is marked as gone. */
kvl_status kvl_send(kvl_protocol *p, kvl_link link, kvl_message *message, const kvl_frame *frames,
                    size_t n_frames, kvl_owner owner);
void kvl_send_plain(kvl_protocol *p, kvl_link link, kvl_message_kind kind, uint64_t request);
void kvl_send_error(kvl_protocol *p, kvl_link link, uint64_t request, kvl_status status,
                    const char *format, ...) KVL_PRINTF(5, 6);
void kvl_report(kvl_protocol *p, kvl_log_level level, const char *event, const char *format, ...)
    KVL_PRINTF(4, 5);
/* A request number that leads back to the op. */
uint64_t kvl_op_number(kvl_protocol *p, const kvl_op *op);
/* The op that a reply's number leads to, or NULL. The caller compares the number. */
kvl_op *kvl_op_find(kvl_protocol *p, uint64_t request);
/* Ends an op without container, ids or reply. */
void kvl_op_fail(kvl_protocol *p, kvl_op *op, kvl_status status, const char *text);
/* Ends an op; what `completion` carries is given away, the rest of the op is freed. */
void kvl_op_end(kvl_protocol *p, kvl_op *op, kvl_completion *completion);
/* Remembers why a peer could not help. */
void kvl_op_blame(kvl_protocol *p, kvl_op *op, uint32_t peer, kvl_status status, const char *text);
static inline uint64_t kvl_bit(uint32_t peer)
{
    return UINT64_C(1) << peer;
}

/* ---- peer.c ---- */

void kvl_peer_greet(kvl_protocol *p, uint32_t peer, int64_t now_ns);
/* It is not there, or not the process that it was: everything under way with it is lost. */
void kvl_peer_lose(kvl_protocol *p, uint32_t peer, const char *why, int64_t now_ns);
void kvl_peer_receive(kvl_protocol *p, uint32_t peer, const kvl_message *message,
                      const kvl_frame *frames, size_t n_frames, int64_t now_ns);
void kvl_peer_tick(kvl_protocol *p, uint32_t peer, int64_t now_ns);
/* Peers that are up; with `sharing`, only those of our fingerprint. */
uint64_t kvl_peers_up(const kvl_protocol *p, bool sharing);
/* It was never there, but we have only just begun to dial. */
bool kvl_peer_is_expected(const kvl_protocol *p, uint32_t peer, int64_t now_ns);
bool kvl_peers_are_expected(const kvl_protocol *p, int64_t now_ns);

/* ---- session.c ---- */

void kvl_session_receive(kvl_protocol *p, kvl_link link, const kvl_message *message,
                         const kvl_frame *frames, size_t n_frames, int64_t now_ns);
void kvl_session_end(kvl_protocol *p, kvl_link link);
void kvl_session_tick(kvl_protocol *p, kvl_link link, int64_t now_ns);
static inline kvl_session *kvl_session_of(kvl_protocol *p, kvl_link link)
{
    return &p->sessions[link - KVL_LINK_CLIENT];
}
static inline kvl_tier *kvl_store_of(const kvl_protocol *p, kvl_link link)
{
    return p->stores[link - KVL_LINK_CLIENT];
}
/* What Hello and Welcome say of us on a link. */
void kvl_hello_fill(const kvl_protocol *p, kvl_link link, kvl_message *message);
void kvl_bulk_reset(const kvl_protocol *p, kvl_link link);
void kvl_bulk_agree(const kvl_protocol *p, kvl_link link, const kvl_message_hello *hello);
/* Whether the other side can be spoken to; sets *shares_kv.
 * Errors   KVL_ERR_UNSUPPORTED (magic, versions), KVL_ERR_FOREIGN (fingerprint); texts name both */
kvl_status kvl_hello_check(const kvl_protocol *p, const kvl_message_hello *hello, bool *shares_kv,
                           kvl_error *error);

/* ---- fetch.c ---- */

void kvl_fetch_peer_up(kvl_protocol *p, kvl_op *op, int64_t now_ns);
void kvl_fetch_peer_lost(kvl_protocol *p, kvl_op *op, uint32_t peer, int64_t now_ns);
void kvl_fetch_located(kvl_protocol *p, uint32_t peer, const kvl_message *message, int64_t now_ns);
void kvl_fetch_header(kvl_protocol *p, uint32_t peer, const kvl_message *message,
                      const kvl_frame *frames, size_t n_frames, int64_t now_ns);
void kvl_fetch_block(kvl_protocol *p, uint32_t peer, const kvl_message *message,
                     const kvl_frame *frame, int64_t now_ns);
void kvl_fetch_done(kvl_protocol *p, uint32_t peer, const kvl_message *message, int64_t now_ns);
void kvl_fetch_error(kvl_protocol *p, kvl_op *op, uint32_t peer, const kvl_message *message,
                     int64_t now_ns);
void kvl_fetch_tick(kvl_protocol *p, kvl_op *op, int64_t now_ns);
/* Leaves its stream, if it has one: the sender is told and others get its place. */
void kvl_fetch_leave(kvl_protocol *p, kvl_op *op);
/* Starts fetches that wait for a place. */
void kvl_fetch_kick(kvl_protocol *p, int64_t now_ns);

/* ---- hedge.c ---- */

/* A holder took this long to begin, or has not begun for so long. */
void kvl_hedge_sample(kvl_peer *peer, int64_t elapsed_ns);
/* How long a holder may take to begin before another is asked too: what it takes in 19 of 20 cases;
 * INT64_MAX where too little is known of it. */
int64_t kvl_hedge_patience(const kvl_peer *peer);
/* The second holder is not needed, or not there any more. Without one nothing happens. */
void kvl_hedge_drop(kvl_protocol *p, kvl_op *op);
/* It was faster: its stream is the op's from now on, and the first holder is told to stop. */
void kvl_hedge_win(kvl_protocol *p, kvl_op *op, int64_t now_ns);
/* Whether a message belongs to the second holder's stream. */
bool kvl_hedge_is(const kvl_op *op, uint32_t peer, uint64_t request);

/* ---- ask.c ---- */

void kvl_list_peer_up(kvl_protocol *p, kvl_op *op, int64_t now_ns);
void kvl_list_peer_lost(kvl_protocol *p, kvl_op *op, uint32_t peer, int64_t now_ns);
void kvl_list_answer(kvl_protocol *p, uint32_t peer, const kvl_message *message,
                     const kvl_frame *frames, size_t n_frames, int64_t now_ns);
void kvl_list_tick(kvl_protocol *p, kvl_op *op, int64_t now_ns);
void kvl_call_peer_up(kvl_protocol *p, kvl_op *op, int64_t now_ns);
void kvl_call_answer(kvl_protocol *p, uint32_t peer, const kvl_message *message,
                     const kvl_frame *frames, size_t n_frames, int64_t now_ns);
void kvl_call_error(kvl_protocol *p, kvl_op *op, const kvl_message *message, int64_t now_ns);
void kvl_call_tick(kvl_protocol *p, kvl_op *op, int64_t now_ns);

/* ---- serve.c ---- */

void kvl_serve_locate(kvl_protocol *p, kvl_link link, const kvl_message *message);
void kvl_serve_fetch(kvl_protocol *p, kvl_link link, const kvl_message *message, int64_t now_ns);
void kvl_serve_credit(kvl_protocol *p, kvl_link link, const kvl_message *message, int64_t now_ns);
void kvl_serve_cancel(kvl_protocol *p, kvl_link link, uint64_t request);
void kvl_serve_list(kvl_protocol *p, kvl_link link, const kvl_message *message,
                    const kvl_frame *frames, size_t n_frames);
bool kvl_serve_work(kvl_protocol *p);
void kvl_serve_tick(kvl_protocol *p, kvl_link link, int64_t now_ns);
void kvl_serve_end(kvl_protocol *p, kvl_link link);

/* ---- task.c ---- */

void kvl_task_receive(kvl_protocol *p, kvl_link link, const kvl_message *message,
                      const kvl_frame *frames, size_t n_frames);
void kvl_task_poll(kvl_protocol *p, kvl_link link, uint64_t request);
void kvl_task_done(kvl_protocol *p, kvl_link link, uint64_t request);
void kvl_task_tick(kvl_protocol *p, int64_t now_ns);
void kvl_task_end(kvl_protocol *p, kvl_link link);
void kvl_task_free(kvl_protocol *p, kvl_task *task);

#endif /* KVL_EXCHANGE_PROTOCOL_STATE_H */
