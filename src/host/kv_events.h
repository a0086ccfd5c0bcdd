/* host/kv_events.h: what enters and leaves the prefix tree, told to routers over ZeroMQ in the
 * words of vLLM's KV events, so that routers that read those read these.
 *
 * A PUB socket sends three frames: topic, sequence number (8 bytes, big endian, from 0), and a
 * batch in MessagePack: [time in seconds, [event, ...]], where an event is one of
 *   ["BlockStored", hashes, parent hash or nil, token ids, block size, nil, "GPU" or "CPU"]
 *   ["BlockRemoved", hashes, medium]         ["AllBlocksCleared"]
 * Hashes are whole numbers of 64 bits, chained, of KVL_PAGE_TOKENS ids each; tenants' are apart.
 * A ROUTER socket replays: asked with an empty frame and a first sequence number it sends an empty
 * frame, number and batch for each one kept, and ends with the number -1 and an empty batch.
 * A subscriber that is too slow loses batches, sees it by the numbers, and asks for a replay. What
 * cannot be told for want of memory is told as AllBlocksCleared: less is then believed to be here
 * than is.
 * Access   token ids are what people wrote: ipc:// or loopback only.
 * Threads  One of its own sends; the engine thread only packs. */
#ifndef KVL_HOST_KV_EVENTS_H
#define KVL_HOST_KV_EVENTS_H

#include "cache/prefix_tree.h"

#define KVL_KV_EVENTS_KEPT 10000u /* batches for replays, and at most */
#define KVL_KV_EVENTS_BYTES_MAX ((size_t)64 << 20)

typedef struct kvl_kv_events_options {
    const char *endpoint;        /* "ipc:///PATH", "tcp://127.0.0.1:PORT" or "tcp://[::1]:PORT" */
    const char *replay_endpoint; /* likewise; NULL: no replays */
    const char *topic;           /* NULL: "" */
    const char *medium;          /* where pages lie: "CPU" or "GPU" */
} kvl_kv_events_options;

typedef struct kvl_kv_events kvl_kv_events;

/* Watches the tree until it is stopped. While no engine thread runs.
 * Owns     *events: ended with kvl_kv_events_stop, before the tree, when no engine thread runs
 * Errors   KVL_ERR_DENIED (an endpoint that is not of this machine), KVL_ERR_INVALID, KVL_ERR_IO
 *          (in use), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_kv_events_start(const kvl_kv_events_options *options,
                                            kvl_prefix_tree *tree, kvl_kv_events **events,
                                            kvl_error *error);
/* Tells that all is gone, and ends. NULL does nothing. */
void kvl_kv_events_stop(kvl_kv_events *events);

#endif /* KVL_HOST_KV_EVENTS_H */
