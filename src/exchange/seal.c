/* exchange/seal.c: AEADs with a counter as their nonce. */
#include "exchange/seal.h"

#include "base/hash.h"

#include <limits.h>
#include <openssl/evp.h>
#include <sodium.h>
#include <string.h>

_Static_assert(crypto_aead_xchacha20poly1305_ietf_ABYTES == KVL_SEAL_TAG_BYTES,
               "both tags have one length");

enum { AES_NONCE_BYTES = 12 };

static const uint64_t RECORDS_MAX = UINT64_C(1) << 48;

bool kvl_seal_has_aes(void)
{
    KVL_ASSERT(sodium_init() >= 0);
    return crypto_aead_aes256gcm_is_available() == 1;
}

bool kvl_seal_init(kvl_seal *seal, const uint8_t asker_share[KVL_SHARE_BYTES],
                   const uint8_t server_share[KVL_SHARE_BYTES], bool uses_aes)
{
    static const char DOMAIN_NAME[] = "kvloom.bulk.1";
    kvl_digester digester;
    kvl_digester_init(&digester, asker_share, KVL_SHARE_BYTES);
    kvl_digester_add(&digester, DOMAIN_NAME, sizeof DOMAIN_NAME);
    kvl_digester_add(&digester, server_share, KVL_SHARE_BYTES);
    const kvl_digest key = kvl_digester_end(&digester);
    *seal = (kvl_seal){.aes = NULL};
    memcpy(seal->key, key.bytes, sizeof seal->key);
    if (!uses_aes) return true;
    EVP_CIPHER_CTX *aes = EVP_CIPHER_CTX_new();
    if (aes == NULL) return false;
    /* Direction and nonce are set with each record; the expanded key stays. */
    if (EVP_CipherInit_ex(aes, EVP_aes_256_gcm(), NULL, seal->key, NULL, 1) != 1) {
        EVP_CIPHER_CTX_free(aes);
        return false;
    }
    seal->aes = aes;
    return true;
}

void kvl_seal_wipe(kvl_seal *seal)
{
    EVP_CIPHER_CTX_free(seal->aes); /* overwrites what it held */
    sodium_memzero(seal, sizeof *seal);
}

static void make_nonce(kvl_seal *seal, uint8_t *nonce, size_t n_bytes)
{
    memset(nonce, 0, n_bytes);
    for (size_t i = 0; i < 8; i++) nonce[i] = (uint8_t)(seal->counter >> (8 * i));
    seal->counter++;
}

/* The key stays set, but OpenSSL wants it again when the direction changes, which it never does. */
static bool run_aes(EVP_CIPHER_CTX *aes, const uint8_t *nonce, bool closes, const uint8_t *in,
                    size_t n_bytes, uint8_t *out, uint8_t *tag)
{
    int n = 0;
    if (n_bytes > INT_MAX || EVP_CipherInit_ex(aes, NULL, NULL, NULL, nonce, closes ? 1 : 0) != 1) {
        return false;
    }
    if (!closes && EVP_CIPHER_CTX_ctrl(aes, EVP_CTRL_AEAD_SET_TAG, KVL_SEAL_TAG_BYTES, tag) != 1)
        return false;
    if (EVP_CipherUpdate(aes, out, &n, in, (int)n_bytes) != 1 || (size_t)n != n_bytes) return false;
    if (EVP_CipherFinal_ex(aes, out + n, &n) != 1) return false;
    return !closes || EVP_CIPHER_CTX_ctrl(aes, EVP_CTRL_AEAD_GET_TAG, KVL_SEAL_TAG_BYTES, tag) == 1;
}

bool kvl_seal_close(kvl_seal *seal, const void *bytes, size_t n_bytes, uint8_t *sealed)
{
    uint8_t nonce[crypto_aead_xchacha20poly1305_ietf_NPUBBYTES];
    if (seal->counter >= RECORDS_MAX) return false;
    if (seal->aes != NULL) {
        make_nonce(seal, nonce, AES_NONCE_BYTES);
        return run_aes(seal->aes, nonce, true, bytes, n_bytes, sealed, sealed + n_bytes);
    }
    make_nonce(seal, nonce, sizeof nonce);
    return crypto_aead_xchacha20poly1305_ietf_encrypt(sealed, NULL, bytes, n_bytes, NULL, 0, NULL,
                                                      nonce, seal->key) == 0;
}

bool kvl_seal_open(kvl_seal *seal, const uint8_t *sealed, size_t n_sealed, uint8_t *bytes)
{
    uint8_t nonce[crypto_aead_xchacha20poly1305_ietf_NPUBBYTES];
    if (n_sealed < KVL_SEAL_TAG_BYTES || seal->counter >= RECORDS_MAX) return false;
    if (seal->aes != NULL) {
        const size_t n_bytes = n_sealed - KVL_SEAL_TAG_BYTES;
        uint8_t tag[KVL_SEAL_TAG_BYTES];
        memcpy(tag, sealed + n_bytes, sizeof tag);
        make_nonce(seal, nonce, AES_NONCE_BYTES);
        return run_aes(seal->aes, nonce, false, sealed, n_bytes, bytes, tag);
    }
    make_nonce(seal, nonce, sizeof nonce);
    return crypto_aead_xchacha20poly1305_ietf_decrypt(bytes, NULL, NULL, sealed, n_sealed, NULL, 0,
                                                      nonce, seal->key) == 0;
}
