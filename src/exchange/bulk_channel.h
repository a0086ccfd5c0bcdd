/* exchange/bulk_channel.h: a second connection beside a link, for blocks.
 *
 * ZeroMQ's CURVE moves 0.2 to 0.5 GB/s, so blocks of a link with keys do not pass through it. The
 * server listens on a port of its own; the asker, who was told the port and a token under CURVE,
 * connects there and shows the token. From then on the server sends FetchHeader, Block and
 * FetchDone of that link here, as sealed records (exchange/seal.h), in the order in which they were
 * given. Links without keys (ipc, or plain tcp on the loopback) use the same channel without a
 * seal: it saves the two allocations and the copy that each ZeroMQ message costs.
 *
 * Trust    Whoever connects without a token gets nothing: no byte is sent, and after
 *          KVL_BULK_GREETING_MS the connection is closed; KVL_BULK_STRANGERS_MAX may try at a time,
 *          each costing a descriptor and a few bytes. A record that does not open ends the channel,
 *          the link goes on without it.
 * Memory   Blocks go straight into the container that they belong to (exchange/landing.h). What has
 *          no such place goes into buffers, which are faulted in once and reused: KVL_BULK_BUFFERS
 *          to receive into, one record to seal into. What waits to be sent lies where it lay, by
 *          reference.
 * Threads  Two of its own, one to send and one to receive. The functions are for the exchange's
 *          thread. */
#ifndef KVL_EXCHANGE_BULK_CHANNEL_H
#define KVL_EXCHANGE_BULK_CHANNEL_H

#include "exchange/protocol.h"
#include "exchange/seal.h"

#define KVL_BULK_RECORD_BYTES ((size_t)128 << 10)
#define KVL_BULK_MESSAGE_BYTES_MAX ((size_t)2 << 20)
#define KVL_BULK_BUFFERS 8u
/* A window of the smallest pieces fits (protocol.h). */
#define KVL_BULK_QUEUE_MESSAGES_MAX 288u
#define KVL_BULK_STRANGERS_MAX 32u
#define KVL_BULK_GREETING_MS 2000

typedef struct kvl_bulk_channel kvl_bulk_channel;

typedef struct kvl_bulk_channel_options {
    const char
        *endpoint; /* of the control socket; NULL: nobody dials us. The bulk port is on the same
                              address, chosen by the system; for ipc, a file beside it */
    int wake_fd;   /* an eventfd that is written to when something arrived; borrowed */
    bool has_keys; /* links over tcp speak CURVE: their records are sealed */
} kvl_bulk_channel_options;

/* Owns     *channel: ended with kvl_bulk_channel_close
 * Errors   KVL_ERR_IO (text: address and reason), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_bulk_channel_open(const kvl_bulk_channel_options *options,
                                              kvl_bulk_channel **channel, kvl_error *error);
void kvl_bulk_channel_close(kvl_bulk_channel *channel); /* NULL does nothing */

/* What Hello or Welcome say of the channel of a link; the same until the link is reset. */
void kvl_bulk_channel_offer(kvl_bulk_channel *channel, kvl_link link, kvl_bulk_offer *offer);
/* The other side's offer: a server waits for the token, an asker dials (peer_endpoint: that of the
 * control socket). Whatever does not work is logged, and the link goes on without a channel. */
void kvl_bulk_channel_agree(kvl_bulk_channel *channel, kvl_link link, const kvl_bulk_offer *theirs,
                            const char *peer_endpoint);
/* The link is gone, or is another one now: its channel ends, its secret is forgotten. */
void kvl_bulk_channel_reset(kvl_bulk_channel *channel, kvl_link link);

/* False: there is no channel; send it another way.
 * Errors   KVL_ERR_BUSY (too much waits), KVL_ERR_UNREACHABLE */
bool kvl_bulk_channel_is_ready(kvl_bulk_channel *channel, kvl_link link);
KVL_MUST_USE kvl_status kvl_bulk_channel_send(kvl_bulk_channel *channel, kvl_link link,
                                              const void *control, size_t n_control_bytes,
                                              const kvl_frame *frames, size_t n_frames,
                                              kvl_owner owner);

/* Blocks of a stream that we asked for go straight into its container: exchange/landing.h. */
void kvl_bulk_channel_land(kvl_bulk_channel *channel, kvl_link link, uint64_t request,
                           kvl_container *container, uint32_t block);
bool kvl_bulk_channel_claim(kvl_bulk_channel *channel, kvl_link link, uint64_t request,
                            uint32_t block);
void kvl_bulk_channel_leave(kvl_bulk_channel *channel, kvl_link link, uint64_t request);

/* All of it is borrowed for the call. `checksum` is of a block that has landed and that this
 * message ends, or NULL. */
typedef void kvl_bulk_take(void *context, kvl_link link, const void *control,
                           size_t n_control_bytes, const kvl_frame *frames, size_t n_frames,
                           const uint64_t *checksum);
/* Calls `take` for some messages that have arrived, in the order of each link. True: there may be
 * more, call again soon. */
bool kvl_bulk_channel_drain(kvl_bulk_channel *channel, kvl_bulk_take *take, void *context);

/* Records that did not open, and connections without a token. */
uint64_t kvl_bulk_channel_n_refused(kvl_bulk_channel *channel);

#endif /* KVL_EXCHANGE_BULK_CHANNEL_H */
