/* exchange/local.h: a client and a sidecar on one machine: UNIX sockets, frames, and descriptors
 * that travel with them. proto/local.proto has the messages, docs/local.md the rules.
 *
 * A frame is 8 bytes (length of the message, number of descriptors: 0 or 1, both 32 bits little
 * endian) and the message. The socket is a stream, so that a frame may be larger than what the
 * system takes in one piece; a descriptor is attached to the first byte of its frame.
 * Trust    A length is compared with KVL_LOCAL_MESSAGE_BYTES_MAX before anything is allocated; what
 *          is not yet read is at most one frame and KVL_LOCAL_FDS_MAX descriptors.
 * Threads  One at a time for each link. */
#ifndef KVL_EXCHANGE_LOCAL_H
#define KVL_EXCHANGE_LOCAL_H

#include "base/status.h"

#include <sys/types.h>

#define KVL_LOCAL_MAGIC 0x4c4c564bu
#define KVL_LOCAL_VERSION_MIN 1u
#define KVL_LOCAL_VERSION_MAX 1u
#define KVL_LOCAL_MESSAGE_BYTES_MAX ((size_t)2 << 20)
#define KVL_LOCAL_FDS_MAX 16u
/* What may wait to be sent to somebody who does not read; more ends the link. */
#define KVL_LOCAL_QUEUE_BYTES_MAX ((size_t)8 << 20)
#define KVL_LOCAL_KEYS_MAX 256u
#define KVL_LOCAL_LIST_MAX 4096u
#define KVL_LOCAL_SALT_BYTES_MAX 128u

typedef struct kvl_local_chunk kvl_local_chunk;

typedef struct kvl_local_link {
    int fd; /* non-blocking; -1: ended */
    uint8_t *in;
    size_t capacity, in_first, in_past;
    int fds[KVL_LOCAL_FDS_MAX]; /* arrived, not yet taken */
    size_t n_fds;
    kvl_local_chunk *out_first, *out_last;
    size_t out_bytes;
} kvl_local_link;

/* Connects. Errors   KVL_ERR_INVALID (path), KVL_ERR_UNREACHABLE (nobody listens there),
 * KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_local_dial(const char *path, int *fd, kvl_error *error);
/* Sees to it that a socket file can be made. A file that nobody listens to any more is removed; its
 * directory is made with 0700 where it is missing, and refused where anybody may write to it.
 * Errors   KVL_ERR_INVALID, KVL_ERR_BUSY (somebody listens there), KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_local_make_way(const char *path, kvl_error *error);
/* The same, and listens; the socket file gets `mode`.
 * Errors   KVL_ERR_INVALID, KVL_ERR_BUSY (somebody listens there), KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_local_listen(const char *path, mode_t mode, int *fd, kvl_error *error);

/* Takes fd. */
void kvl_local_link_init(kvl_local_link *link, int fd);
/* Closes everything. A link that was ended or zeroed with fd -1 does nothing. */
void kvl_local_link_deinit(kvl_local_link *link);

/* Reads what is there without waiting.
 * Errors   KVL_ERR_UNREACHABLE (the other side is gone), KVL_ERR_NO_MEMORY, KVL_ERR_MALFORMED */
KVL_MUST_USE kvl_status kvl_local_link_read(kvl_local_link *link);
/* Takes the next whole frame: KVL_OK, or KVL_IN_PROGRESS where there is none yet. *fd is a
 * descriptor that the caller now owns, or -1. `bytes` is borrowed until the next call.
 * Errors   KVL_ERR_TOO_LARGE, KVL_ERR_MALFORMED: the link cannot go on */
KVL_MUST_USE kvl_status kvl_local_link_next(kvl_local_link *link, const uint8_t **bytes,
                                            size_t *n_bytes, int *fd);

/* Room for a message of n_bytes, to be filled and sent by kvl_local_link_send. NULL: no memory. */
KVL_MUST_USE kvl_local_chunk *kvl_local_chunk_create(size_t n_bytes);
uint8_t *kvl_local_chunk_bytes(kvl_local_chunk *chunk);
/* Sends or queues; takes the chunk. fd is borrowed for the call; -1 for none.
 * Errors   KVL_ERR_UNREACHABLE, KVL_ERR_BUSY (too much is queued), KVL_ERR_IO (no descriptor
 * left) */
KVL_MUST_USE kvl_status kvl_local_link_send(kvl_local_link *link, kvl_local_chunk *chunk, int fd);
/* Sends what is queued, as far as the system takes it. Errors   KVL_ERR_UNREACHABLE */
KVL_MUST_USE kvl_status kvl_local_link_flush(kvl_local_link *link);
static inline bool kvl_local_link_has_queued(const kvl_local_link *link)
{
    return link->out_first != NULL;
}

/* The rules that engines have for a salt: UTF-8, at most 128 bytes, none of @ / \ and no control
 * characters. */
bool kvl_salt_is_valid(const void *salt, size_t n_bytes);

#endif /* KVL_EXCHANGE_LOCAL_H */
