/* exchange/zmq_transport.h: links over ZeroMQ; the only file of KVLoom's exchange with sockets.
 *
 * One ROUTER where others dial, one DEALER for each peer that we dial, and a monitor beside it that
 * says at once when the other side dies. Bulk frames are sent from where they lie.
 * Threads  One thread polls and sends; kvl_transport_wake may be called from any. Frames that are
 *          under way are released on ZeroMQ's own thread. */
#ifndef KVL_EXCHANGE_ZMQ_TRANSPORT_H
#define KVL_EXCHANGE_ZMQ_TRANSPORT_H

#include "exchange/protocol.h"

/* Frames below this are copied: keeping a reference costs more. */
#define KVL_ZERO_COPY_BYTES_MIN ((size_t)16 << 10)
/* Messages that may wait in a link's queue to be sent; a window of the smallest pieces fits
 * (protocol.h). Those that wait to be read are fewer: the rest stays with the sender. */
#define KVL_SEND_QUEUE_MESSAGES_MAX 2048
#define KVL_RECEIVE_QUEUE_MESSAGES_MAX 64
/* Messages of one socket that are taken before the others get their turn. */
#define KVL_MESSAGES_PER_TURN 64
/* What is still in the queues when the transport closes gets this long to leave. */
#define KVL_LINGER_MS 100

typedef struct kvl_transport kvl_transport;

typedef struct kvl_transport_options {
    const char *name;
    uint64_t epoch;
    const char *endpoint; /* NULL: nobody can dial us */
    const kvl_exchange_peer *peers;
    size_t n_peers;
    const kvl_key_pair *keys;   /* NULL: none, and so no tcp but on the loopback; copied */
    kvl_allow_list *allow_list; /* who may dial us over tcp where there are keys; borrowed */
} kvl_transport_options;

/* What happened; called from kvl_transport_poll. May call kvl_transport_send and _forget. */
typedef struct kvl_transport_events {
    void (*connected)(void *context, kvl_link link);
    void (*disconnected)(void *context, kvl_link link);
    /* Who is behind a link that dialled us, before its first message, and again when that changed;
     * NULL: whoever can reach the endpoint. */
    void (*admitted)(void *context, kvl_link link, const kvl_access *access);
    /* All of it is borrowed for the call. */
    void (*message)(void *context, kvl_link link, const void *control, size_t n_control_bytes,
                    const kvl_frame *frames, size_t n_frames);
    /* A message with more parts than any message may have. */
    void (*overlong)(void *context, kvl_link link);
    void *context;
} kvl_transport_events;

/* Checks the form of an endpoint: ipc:// and a path, or tcp://, an address and a port. Without keys
 * on both sides only a loopback address is allowed.
 * Errors   KVL_ERR_INVALID, KVL_ERR_DENIED (another address without keys) */
KVL_MUST_USE kvl_status kvl_endpoint_check(const char *endpoint, bool has_keys, kvl_error *error);

/* Binds and begins to dial. A socket file that nobody listens to any more is removed; one that
 * somebody listens to is not.
 * Owns     *transport: ended with kvl_transport_close
 * Errors   KVL_ERR_INVALID, KVL_ERR_DENIED, KVL_ERR_IO (endpoint and reason), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_transport_open(const kvl_transport_options *options,
                                           kvl_transport **transport, kvl_error *error);
/* Waits at most KVL_LINGER_MS for what is queued. NULL does nothing. */
void kvl_transport_close(kvl_transport *transport);

/* Waits for something to happen, or for a wake, and handles it. */
void kvl_transport_poll(kvl_transport *transport, int timeout_ms,
                        const kvl_transport_events *events);
/* Ends a poll that waits, or the next one. */
void kvl_transport_wake(kvl_transport *transport);

/* Queues one message. Never blocks.
 * Errors   KVL_ERR_BUSY (queue full), KVL_ERR_UNREACHABLE, KVL_ERR_NO_MEMORY: nothing was queued */
KVL_MUST_USE kvl_status kvl_transport_send(kvl_transport *transport, kvl_link link,
                                           const void *control, size_t n_control_bytes,
                                           const kvl_frame *frames, size_t n_frames,
                                           kvl_owner owner);
/* The allow-list has changed: links whose key is not on it any more end at once. */
void kvl_transport_recheck(kvl_transport *transport, const kvl_transport_events *events);
/* The eventfd that ends a poll; borrowed. */
int kvl_transport_wake_fd(const kvl_transport *transport);
/* Connections that were refused during the handshake. */
uint64_t kvl_transport_n_refused(const kvl_transport *transport);
/* A client's slot is free again. */
void kvl_transport_forget(kvl_transport *transport, kvl_link link);

#endif /* KVL_EXCHANGE_ZMQ_TRANSPORT_H */
