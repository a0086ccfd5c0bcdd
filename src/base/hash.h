/* base/hash.h: checksums against damage (XXH3-64, xxHash) and digests against people (keyed
 * BLAKE2b-256, libsodium). Threads: safe from any thread, on different objects. */
#ifndef KVL_BASE_HASH_H
#define KVL_BASE_HASH_H

#include "base/status.h"

#define KVL_DIGEST_BYTES 32u
#define KVL_DIGEST_TEXT_BYTES 65u /* hexadecimal with its NUL */

typedef struct kvl_digest {
    uint8_t bytes[KVL_DIGEST_BYTES];
} kvl_digest;

/* XXH3-64 of the bytes, seed 0. */
uint64_t kvl_checksum(const void *bytes, size_t n_bytes);

/* The same, fed in pieces. The caller's storage; needs no ending. */
typedef struct kvl_checksummer {
    _Alignas(64) uint8_t opaque[640]; /* XXH3_state_t of xxHash */
} kvl_checksummer;

void kvl_checksummer_init(kvl_checksummer *checksummer);
void kvl_checksummer_add(kvl_checksummer *checksummer, const void *bytes, size_t n_bytes);
uint64_t kvl_checksummer_end(const kvl_checksummer *checksummer);

/* BLAKE2b-256 fed in pieces. `key` has n_key_bytes, 0 .. 64. */
typedef struct kvl_digester {
    _Alignas(64) uint8_t opaque[384]; /* crypto_generichash_state of libsodium */
} kvl_digester;

void kvl_digester_init(kvl_digester *digester, const void *key, size_t n_key_bytes);
void kvl_digester_add(kvl_digester *digester, const void *bytes, size_t n_bytes);
/* Adds `value` as eight bytes, little endian. */
void kvl_digester_add_u64(kvl_digester *digester, uint64_t value);
kvl_digest kvl_digester_end(kvl_digester *digester);

/* Compares in constant time. */
bool kvl_digest_equal(const kvl_digest *a, const kvl_digest *b);
bool kvl_digest_is_zero(const kvl_digest *digest);
/* Writes KVL_DIGEST_TEXT_BYTES bytes of lower-case hexadecimal; returns `text`. */
char *kvl_digest_to_text(const kvl_digest *digest, char *text);
/* Errors   KVL_ERR_MALFORMED  not exactly 64 hexadecimal digits */
KVL_MUST_USE kvl_status kvl_digest_from_text(const char *text, kvl_digest *digest);

#endif /* KVL_BASE_HASH_H */
