/* exchange/bulk.h: counted bytes that several holders share while they are being sent, and the one
 * word for "whoever keeps these frames alive".
 * Threads  Sharing and releasing from any thread; the bytes never change once they are shared. */
#ifndef KVL_EXCHANGE_BULK_H
#define KVL_EXCHANGE_BULK_H

#include "exchange/message.h"

typedef struct kvl_bulk kvl_bulk;

/* Room for n_bytes (0 is fine), with one reference. NULL when there is no memory. */
KVL_MUST_USE kvl_bulk *kvl_bulk_create(size_t n_bytes);
/* Same, with a copy of the bytes. */
KVL_MUST_USE kvl_bulk *kvl_bulk_copy(const void *bytes, size_t n_bytes);
void kvl_bulk_share(kvl_bulk *bulk);
void kvl_bulk_release(kvl_bulk *bulk); /* NULL does nothing */
/* Borrowed until the bulk ends; to be written before it is shared. */
uint8_t *kvl_bulk_bytes(kvl_bulk *bulk);
size_t kvl_bulk_size(const kvl_bulk *bulk);

/* Cuts bytes into frames of KVL_FRAME_BYTES_MAX, the last may be shorter; returns their number.
 * n_bytes is at most KVL_FRAMES_MAX frames. */
size_t kvl_frames_cut(const void *bytes, size_t n_bytes, kvl_frame frames[KVL_FRAMES_MAX]);
/* Joins frames into memory that has room for all of them. */
void kvl_frames_join(const kvl_frame *frames, size_t n_frames, uint8_t *bytes);
size_t kvl_frames_bytes(const kvl_frame *frames, size_t n_frames);

/* Whose bytes the frames of an outgoing message are: at most one of the two. With neither, they are
 * borrowed for the call. */
typedef struct kvl_owner {
    kvl_container *container;
    kvl_bulk *bulk;
} kvl_owner;

#endif /* KVL_EXCHANGE_BULK_H */
