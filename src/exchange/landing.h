/* exchange/landing.h: where the blocks of a fetch go while they arrive: into the container itself.
 *
 * Without it every byte is written twice by the receiving process, into a buffer and then into the
 * container, and read a third time for its checksum; on two cores that was a third of the time of a
 * large fetch. So the exchange's thread says, once it has the header of a stream, which container
 * the stream fills; the thread that receives writes pieces there, and hashes each while it is in
 * the cache.
 *
 * Order    Two threads write to one container, never to one block: what has been checked must not
 *          change any more. A landing begins with a piece that begins a block, and takes only the
 *          piece that follows the one before. Pieces that arrived another way belong to the
 *          exchange's thread, which claims their block first (kvl_landings_claim). A landing that
 *          has begun at or before a claimed block ends there: only a sender that breaks the rules
 *          of docs/protocol.md causes that.
 * End      When kvl_landings_end returns, nothing is written there any more, though bytes are still
 *          coming: their receiver finds the landing gone and drops them.
 * Threads  One that receives; the rest is for the exchange's thread. */
#ifndef KVL_EXCHANGE_LANDING_H
#define KVL_EXCHANGE_LANDING_H

#include "exchange/protocol.h"

#include <pthread.h>

#define KVL_LANDINGS_MAX (KVL_PEERS_MAX * KVL_STREAMS_PER_PEER)

typedef struct kvl_landing {
    uint64_t serial; /* unique; 0: free */
    kvl_link link;
    uint64_t request;
    kvl_container *container; /* a reference */
    uint32_t block_min;       /* where it may begin; those before are the exchange's thread's */
    bool has_begun;
    uint32_t block_first, block; /* where it began; the block that arrives */
    uint64_t offset;             /* the piece that is expected next */
    kvl_checksummer hash;        /* of the block so far */
} kvl_landing;

typedef struct kvl_landings {
    pthread_mutex_t lock; /* held for one read of a socket at the longest */
    uint64_t last_serial;
    kvl_landing landings[KVL_LANDINGS_MAX];
} kvl_landings;

/* A piece under way. */
typedef struct kvl_piece {
    uint64_t serial; /* of its landing; 0: none, it goes into a buffer */
    kvl_landing *landing;
    kvl_container *container; /* a reference, released by whoever ends the piece */
    uint8_t *bytes;           /* where it goes */
    bool ends_block;
    uint64_t checksum; /* of the whole block, once a piece that ends one is here */
} kvl_piece;

void kvl_landings_init(kvl_landings *landings);
void kvl_landings_deinit(kvl_landings *landings); /* ends all */

/* ---- the exchange's thread ---- */

/* From `block` on, blocks of a stream may go straight into the container, which is shared. Without
 * a free place nothing happens: they arrive by way of buffers. */
void kvl_landings_begin(kvl_landings *landings, kvl_link link, uint64_t request,
                        kvl_container *container, uint32_t block);
/* The caller alone writes to the blocks up to this one from now on. False: the landing had begun
 * there and has ended for it, so what it says of checksums counts no more. */
bool kvl_landings_claim(kvl_landings *landings, kvl_link link, uint64_t request, uint32_t block);
void kvl_landings_end(kvl_landings *landings, kvl_link link, uint64_t request);
void kvl_landings_end_link(kvl_landings *landings, kvl_link link);

/* ---- the receiving thread ---- */

/* A head has arrived. False: the piece has no landing, or is not the one that follows. */
bool kvl_landings_take(kvl_landings *landings, kvl_link link, const kvl_message *message,
                       size_t n_bytes, kvl_piece *piece);
/* Before and after some bytes of the piece are written. Between the two the lock is held: write
 * without waiting. False: the landing is gone, the lock is not held, write nothing. */
bool kvl_landings_enter(kvl_landings *landings, const kvl_piece *piece);
void kvl_landings_leave(kvl_landings *landings, const kvl_piece *piece, const uint8_t *bytes,
                        size_t n_bytes);
/* The piece is whole; n_bytes of it. False: the landing is gone. */
bool kvl_landings_finish(kvl_landings *landings, kvl_piece *piece, size_t n_bytes);

#endif /* KVL_EXCHANGE_LANDING_H */
