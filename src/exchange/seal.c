/* exchange/seal.c: libsodium's AEADs with a counter as their nonce. */
#include "exchange/seal.h"

#include "base/hash.h"

#include <sodium.h>
#include <string.h>

_Static_assert(sizeof(crypto_aead_aes256gcm_state) <= sizeof(((kvl_seal *)NULL)->opaque),
               "kvl_seal must hold libsodium's state");
_Static_assert(crypto_aead_aes256gcm_ABYTES == KVL_SEAL_TAG_BYTES &&
                   crypto_aead_xchacha20poly1305_ietf_ABYTES == KVL_SEAL_TAG_BYTES,
               "both tags have one length");

static const uint64_t RECORDS_MAX = UINT64_C(1) << 48;

bool kvl_seal_has_aes(void)
{
    KVL_ASSERT(sodium_init() >= 0);
    return crypto_aead_aes256gcm_is_available() == 1;
}

static crypto_aead_aes256gcm_state *state_of(kvl_seal *seal)
{
    return (crypto_aead_aes256gcm_state *)(void *)seal->opaque;
}

void kvl_seal_init(kvl_seal *seal, const uint8_t asker_share[KVL_SHARE_BYTES],
                   const uint8_t server_share[KVL_SHARE_BYTES], bool uses_aes)
{
    static const char DOMAIN_NAME[] = "kvloom.bulk.1";
    KVL_ASSERT(!uses_aes || kvl_seal_has_aes());
    kvl_digester digester;
    kvl_digester_init(&digester, asker_share, KVL_SHARE_BYTES);
    kvl_digester_add(&digester, DOMAIN_NAME, sizeof DOMAIN_NAME);
    kvl_digester_add(&digester, server_share, KVL_SHARE_BYTES);
    const kvl_digest key = kvl_digester_end(&digester);
    memcpy(seal->key, key.bytes, sizeof seal->key);
    seal->counter = 0;
    seal->uses_aes = uses_aes;
    if (uses_aes) KVL_ASSERT(crypto_aead_aes256gcm_beforenm(state_of(seal), seal->key) == 0);
}

void kvl_seal_wipe(kvl_seal *seal)
{
    sodium_memzero(seal, sizeof *seal);
}

static void make_nonce(const kvl_seal *seal, uint8_t *nonce, size_t n_bytes)
{
    memset(nonce, 0, n_bytes);
    for (size_t i = 0; i < 8; i++) nonce[i] = (uint8_t)(seal->counter >> (8 * i));
}

bool kvl_seal_close(kvl_seal *seal, const void *bytes, size_t n_bytes, uint8_t *sealed)
{
    uint8_t nonce[crypto_aead_xchacha20poly1305_ietf_NPUBBYTES];
    if (seal->counter >= RECORDS_MAX) return false;
    make_nonce(seal, nonce, sizeof nonce);
    seal->counter++;
    if (seal->uses_aes) {
        return crypto_aead_aes256gcm_encrypt_afternm(sealed, NULL, bytes, n_bytes, NULL, 0, NULL,
                                                     nonce, state_of(seal)) == 0;
    }
    return crypto_aead_xchacha20poly1305_ietf_encrypt(sealed, NULL, bytes, n_bytes, NULL, 0, NULL,
                                                      nonce, seal->key) == 0;
}

bool kvl_seal_open(kvl_seal *seal, const uint8_t *sealed, size_t n_sealed, uint8_t *bytes)
{
    uint8_t nonce[crypto_aead_xchacha20poly1305_ietf_NPUBBYTES];
    if (n_sealed < KVL_SEAL_TAG_BYTES || seal->counter >= RECORDS_MAX) return false;
    make_nonce(seal, nonce, sizeof nonce);
    seal->counter++;
    if (seal->uses_aes) {
        return crypto_aead_aes256gcm_decrypt_afternm(bytes, NULL, NULL, sealed, n_sealed, NULL, 0,
                                                     nonce, state_of(seal)) == 0;
    }
    return crypto_aead_xchacha20poly1305_ietf_decrypt(bytes, NULL, NULL, sealed, n_sealed, NULL, 0,
                                                      nonce, seal->key) == 0;
}
