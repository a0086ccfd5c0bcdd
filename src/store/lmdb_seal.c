/* lmdb_seal.c: one record for the header, one for each block. */
#include "store/lmdb_seal.h"

#include "base/alloc.h"
#include "base/random.h"

#include <sodium.h>
#include <string.h>

static const char MAGIC[8] = {'K', 'V', 'L', 'S', 'E', 'A', 'L', '1'};

enum {
    NONCE_AT = 8,
    NONCE_BYTES = 16,
    LENGTH_AT = 24,
    PREAMBLE = 32,
    TAG = crypto_aead_xchacha20poly1305_ietf_ABYTES,
};

_Static_assert(NONCE_BYTES + 8 == crypto_aead_xchacha20poly1305_ietf_NPUBBYTES,
               "a nonce is what is random of it and a number");

static void make_nonce(const uint8_t *preamble, uint64_t number,
                       uint8_t nonce[crypto_aead_xchacha20poly1305_ietf_NPUBBYTES])
{
    memcpy(nonce, preamble + NONCE_AT, NONCE_BYTES);
    for (size_t i = 0; i < 8; i++) nonce[NONCE_BYTES + i] = (uint8_t)(number >> (8 * i));
}

static void close_record(const uint8_t *key, const kvl_digest *id, const uint8_t *preamble,
                         uint64_t number, const void *bytes, size_t n_bytes, uint8_t *sealed)
{
    uint8_t nonce[crypto_aead_xchacha20poly1305_ietf_NPUBBYTES];
    make_nonce(preamble, number, nonce);
    KVL_ASSERT(crypto_aead_xchacha20poly1305_ietf_encrypt(sealed, NULL, bytes, n_bytes, id->bytes,
                                                          sizeof id->bytes, NULL, nonce, key) == 0);
}

static bool open_record(const uint8_t *key, const kvl_digest *id, const uint8_t *preamble,
                        uint64_t number, const uint8_t *sealed, size_t n_bytes, void *bytes)
{
    uint8_t nonce[crypto_aead_xchacha20poly1305_ietf_NPUBBYTES];
    make_nonce(preamble, number, nonce);
    return crypto_aead_xchacha20poly1305_ietf_decrypt(bytes, NULL, NULL, sealed, n_bytes + TAG,
                                                      id->bytes, sizeof id->bytes, nonce, key) == 0;
}

uint64_t kvl_lmdb_sealed_bytes(const kvl_container *container)
{
    size_t n_header = 0;
    (void)kvl_container_header(container, &n_header);
    const uint64_t block = kvl_container_info_of(container)->block_bytes + TAG;
    return PREAMBLE + n_header + TAG + kvl_container_n_blocks(container) * block;
}

void kvl_lmdb_seal(const uint8_t *key, const kvl_container *container, uint8_t *bytes)
{
    size_t n_header = 0;
    const void *header = kvl_container_header(container, &n_header);
    const kvl_digest *id = &kvl_container_info_of(container)->id;
    memcpy(bytes, MAGIC, sizeof MAGIC);
    kvl_random_secret(bytes + NONCE_AT, NONCE_BYTES);
    for (size_t i = 0; i < 4; i++) bytes[LENGTH_AT + i] = (uint8_t)(n_header >> (8 * i));
    memset(bytes + LENGTH_AT + 4, 0, 4);
    uint8_t *at = bytes + PREAMBLE;
    close_record(key, id, bytes, 0, header, n_header, at);
    at += n_header + TAG;
    for (uint32_t i = 0; i < kvl_container_n_blocks(container); i++) {
        size_t n_block = 0;
        const void *block = kvl_container_block_view(container, i, &n_block);
        close_record(key, id, bytes, i + 1, block, n_block, at);
        at += n_block + TAG;
    }
}

bool kvl_lmdb_is_sealed(const void *bytes, size_t n_bytes)
{
    return n_bytes >= PREAMBLE && memcmp(bytes, MAGIC, sizeof MAGIC) == 0;
}

/* A header that opens is one that we wrote, but its size is still compared with what is there. */
static kvl_status open_header(const uint8_t *key, const kvl_digest *id, const uint8_t *bytes,
                              size_t n_bytes, size_t *n_header, kvl_container **container,
                              kvl_error *error)
{
    *n_header = 0;
    for (size_t i = 0; i < 4; i++) *n_header |= (size_t)bytes[LENGTH_AT + i] << (8 * i);
    if (*n_header > KVL_CONTAINER_HEADER_BYTES_MAX || n_bytes - PREAMBLE < *n_header + TAG)
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "lmdb: a sealed header of %zu bytes in %zu",
                        *n_header, n_bytes);
    uint8_t *header = kvl_alloc(*n_header + 1);
    if (header == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "lmdb: no memory for a header");
    kvl_status status = KVL_OK;
    if (!open_record(key, id, bytes, 0, bytes + PREAMBLE, *n_header, header)) {
        status = KVL_FAIL(error, KVL_ERR_FOREIGN,
                          "lmdb: it does not open: another key, another id, or changed bytes");
    }
    if (status == KVL_OK) status = kvl_container_from_header(header, *n_header, container, error);
    kvl_free(header);
    return status;
}

static kvl_status open_blocks(const uint8_t *key, const kvl_digest *id, const uint8_t *bytes,
                              size_t n_bytes, size_t at, kvl_container *container, kvl_error *error)
{
    const uint32_t n_blocks = kvl_container_n_blocks(container);
    if (n_bytes != kvl_lmdb_sealed_bytes(container))
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "lmdb: a sealed container of %zu bytes", n_bytes);
    for (uint32_t i = 0; i < n_blocks; i++) {
        size_t n_block = 0;
        void *block = kvl_container_block(container, i, &n_block);
        if (!open_record(key, id, bytes, i + 1, bytes + at, n_block, block))
            return KVL_FAIL(error, KVL_ERR_DAMAGED, "lmdb: sealed block %u does not open", i);
        KVL_TRY(kvl_container_block_check(container, i, error));
        at += n_block + TAG;
    }
    return KVL_OK;
}

kvl_status kvl_lmdb_unseal(const uint8_t *key, const kvl_digest *id, const void *bytes,
                           size_t n_bytes, kvl_container **container, kvl_error *error)
{
    size_t n_header = 0;
    KVL_ASSERT(kvl_lmdb_is_sealed(bytes, n_bytes));
    *container = NULL;
    kvl_status status = open_header(key, id, bytes, n_bytes, &n_header, container, error);
    if (status == KVL_OK) {
        status = open_blocks(key, id, bytes, n_bytes, PREAMBLE + n_header + TAG, *container, error);
    }
    if (status < 0) {
        kvl_container_release(*container);
        *container = NULL;
    }
    return status;
}
