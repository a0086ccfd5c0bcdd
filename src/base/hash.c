/* base/hash.c: xxHash and libsodium behind our names. */
#include "base/hash.h"

#include <sodium.h>
#include <string.h>
#define XXH_STATIC_LINKING_ONLY /* the size of a state */
#include <xxhash.h>
#ifdef KVL_XXHASH_DISPATCH
/* The library's own choice at run time: 57 GB/s with AVX2 where the plain functions, which are
 * SSE2's, did 20. The same names and the same sums. */
#include <xxh_x86dispatch.h>
#endif

_Static_assert(sizeof(crypto_generichash_state) <= sizeof(kvl_digester),
               "kvl_digester must hold libsodium's state");

uint64_t kvl_checksum(const void *bytes, size_t n_bytes)
{
    return XXH3_64bits(bytes, n_bytes);
}

_Static_assert(sizeof(XXH3_state_t) <= sizeof(kvl_checksummer),
               "kvl_checksummer must hold xxHash's state");

void kvl_checksummer_init(kvl_checksummer *checksummer)
{
    (void)XXH3_64bits_reset((XXH3_state_t *)(void *)checksummer->opaque);
}

void kvl_checksummer_add(kvl_checksummer *checksummer, const void *bytes, size_t n_bytes)
{
    (void)XXH3_64bits_update((XXH3_state_t *)(void *)checksummer->opaque, bytes, n_bytes);
}

uint64_t kvl_checksummer_end(const kvl_checksummer *checksummer)
{
    return XXH3_64bits_digest((const XXH3_state_t *)(const void *)checksummer->opaque);
}

static crypto_generichash_state *state_of(kvl_digester *digester)
{
    return (crypto_generichash_state *)(void *)digester->opaque;
}

void kvl_digester_init(kvl_digester *digester, const void *key, size_t n_key_bytes)
{
    KVL_ASSERT(n_key_bytes <= crypto_generichash_KEYBYTES_MAX);
    /* Chooses the processor's fastest BLAKE2b; after the first call it only looks at a flag. */
    KVL_ASSERT(sodium_init() >= 0);
    KVL_ASSERT(crypto_generichash_init(state_of(digester), key, n_key_bytes, KVL_DIGEST_BYTES) ==
               0);
}

void kvl_digester_add(kvl_digester *digester, const void *bytes, size_t n_bytes)
{
    if (n_bytes == 0) return;
    KVL_ASSERT(crypto_generichash_update(state_of(digester), bytes, n_bytes) == 0);
}

void kvl_digester_add_u64(kvl_digester *digester, uint64_t value)
{
    uint8_t bytes[8];
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (uint8_t)(value >> (8 * i));
    kvl_digester_add(digester, bytes, sizeof bytes);
}

kvl_digest kvl_digester_end(kvl_digester *digester)
{
    kvl_digest digest;
    KVL_ASSERT(crypto_generichash_final(state_of(digester), digest.bytes, sizeof digest.bytes) ==
               0);
    return digest;
}

bool kvl_digest_equal(const kvl_digest *a, const kvl_digest *b)
{
    return sodium_memcmp(a->bytes, b->bytes, sizeof a->bytes) == 0;
}

bool kvl_digest_is_zero(const kvl_digest *digest)
{
    return sodium_is_zero(digest->bytes, sizeof digest->bytes) == 1;
}

char *kvl_digest_to_text(const kvl_digest *digest, char *text)
{
    return sodium_bin2hex(text, KVL_DIGEST_TEXT_BYTES, digest->bytes, sizeof digest->bytes);
}

kvl_status kvl_digest_from_text(const char *text, kvl_digest *digest)
{
    size_t n_bytes = 0;
    const size_t length = strnlen(text, KVL_DIGEST_TEXT_BYTES);
    if (length != KVL_DIGEST_TEXT_BYTES - 1) return KVL_ERR_MALFORMED;
    if (sodium_hex2bin(digest->bytes, sizeof digest->bytes, text, length, NULL, &n_bytes, NULL) !=
        0)
        return KVL_ERR_MALFORMED;
    return n_bytes == KVL_DIGEST_BYTES ? KVL_OK : KVL_ERR_MALFORMED;
}
