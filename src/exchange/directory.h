/* exchange/directory.h: which peers said that they have a container.
 *
 * A cache with a fixed size: KVL_DIRECTORY_IDS ids in sets of KVL_DIRECTORY_WAYS, the oldest of a
 * set goes when it is full. It may forget and may be out of date; whoever asks must be ready for
 * "not there". The set is chosen by a keyed mix of the id, so that a peer cannot aim at one set.
 * Threads  Any: a lock inside guards each call. */
#ifndef KVL_EXCHANGE_DIRECTORY_H
#define KVL_EXCHANGE_DIRECTORY_H

#include "base/hash.h"

#define KVL_DIRECTORY_IDS 16384u
#define KVL_DIRECTORY_WAYS 8u

typedef struct kvl_peer_directory kvl_peer_directory;

/* NULL when there is no memory. Owns: the caller ends it with kvl_peer_directory_destroy. */
KVL_MUST_USE kvl_peer_directory *kvl_peer_directory_create(uint64_t seed);
void kvl_peer_directory_destroy(kvl_peer_directory *directory); /* NULL does nothing */

/* peer: 0 .. 63 */
void kvl_peer_directory_add(kvl_peer_directory *directory, const kvl_digest *id, uint32_t peer);
void kvl_peer_directory_remove(kvl_peer_directory *directory, const kvl_digest *id, uint32_t peer);
/* Forgets everything that this peer said. */
void kvl_peer_directory_forget_peer(kvl_peer_directory *directory, uint32_t peer);
/* Bit p: peer p said so. 0 where nothing is known. */
uint64_t kvl_peer_directory_find(kvl_peer_directory *directory, const kvl_digest *id);

#endif /* KVL_EXCHANGE_DIRECTORY_H */
