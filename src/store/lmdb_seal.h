/* store/lmdb_seal.h: containers as they lie in a sealed database: XChaCha20-Poly1305 (libsodium)
 * under a key that follows from the tenant's.
 *
 *   "KVLSEAL1"  8 bytes
 *   nonce       16 bytes, random for each put; the record's number (u64, little endian) follows it
 *   n_header    u32, length of the container's header; u32 zero
 *   record 0    the header, and 16 bytes of tag
 *   record 1..  the blocks, without padding, each with its tag
 *
 * The id is associated data of every record: what stands under another id does not open, nor does a
 * record in another's place. Without the key nothing of a container can be read, not even which
 * tokens it is of; so who deletes the key has deleted the data.
 * Threads  Safe from any thread. */
#ifndef KVL_STORE_LMDB_SEAL_H
#define KVL_STORE_LMDB_SEAL_H

#include "segment/container.h"

#define KVL_LMDB_SEAL_KEY_BYTES 32u

/* Length of a sealed container. */
uint64_t kvl_lmdb_sealed_bytes(const kvl_container *container);
/* Writes kvl_lmdb_sealed_bytes bytes. The container is sealed in its own sense. */
void kvl_lmdb_seal(const uint8_t *key, const kvl_container *container, uint8_t *bytes);
/* Whether a value claims to be a sealed container. */
bool kvl_lmdb_is_sealed(const void *bytes, size_t n_bytes);
/* Opens and checks all of it; each block straight into the container's memory.
 * Owns     *container
 * Errors   KVL_ERR_FOREIGN (the header does not open: it was sealed under another key or for
 *          another id, or it was changed), KVL_ERR_DAMAGED (behind the header), KVL_ERR_NO_MEMORY,
 *          those of kvl_container_from_header */
KVL_MUST_USE kvl_status kvl_lmdb_unseal(const uint8_t *key, const kvl_digest *id, const void *bytes,
                                        size_t n_bytes, kvl_container **container,
                                        kvl_error *error);

#endif /* KVL_STORE_LMDB_SEAL_H */
