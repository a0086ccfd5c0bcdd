/* exchange/seal.h: records that nobody can read, change, repeat, drop or reorder unnoticed.
 *
 * Both ends of a link agree on a secret under CURVE (two random shares, one from each side), for
 * this one connection. Each record is sealed with AES-256-GCM where both processors have it,
 * XChaCha20-Poly1305 otherwise; its nonce is a counter that is not sent, so a record opens only in
 * its place. A key is used for one direction, and 2^48 records at most.
 * AES is libcrypto's and the rest libsodium's: on the machine where this was written, libsodium
 * 1.0.18 sealed 1.9 GB/s and OpenSSL 3.0 4.5 GB/s.
 * Threads  One at a time for each seal. */
#ifndef KVL_EXCHANGE_SEAL_H
#define KVL_EXCHANGE_SEAL_H

#include "base/status.h"

#define KVL_SHARE_BYTES 32u
#define KVL_SEAL_TAG_BYTES 16u

/* Zeroed is none. */
typedef struct kvl_seal {
    void *aes; /* EVP_CIPHER_CTX; NULL: the other cipher */
    uint8_t key[32];
    uint64_t counter;
} kvl_seal;

/* True where this processor has the instructions. */
bool kvl_seal_has_aes(void);
/* Both sides call it with the same shares in the same order: the asker's, then the server's. False:
 * no memory.
 * Owns     seal's inside: ended with kvl_seal_wipe */
KVL_MUST_USE bool kvl_seal_init(kvl_seal *seal, const uint8_t asker_share[KVL_SHARE_BYTES],
                                const uint8_t server_share[KVL_SHARE_BYTES], bool uses_aes);
/* Overwrites the key. None does nothing. */
void kvl_seal_wipe(kvl_seal *seal);

/* sealed [n_bytes + KVL_SEAL_TAG_BYTES]. False when the key is used up. */
KVL_MUST_USE bool kvl_seal_close(kvl_seal *seal, const void *bytes, size_t n_bytes,
                                 uint8_t *sealed);
/* bytes [n_sealed - KVL_SEAL_TAG_BYTES], undefined where it returns false: then the record is not
 * the one that was sent as the next, and the seal must not be used again. */
KVL_MUST_USE bool kvl_seal_open(kvl_seal *seal, const uint8_t *sealed, size_t n_sealed,
                                uint8_t *bytes);

#endif /* KVL_EXCHANGE_SEAL_H */
