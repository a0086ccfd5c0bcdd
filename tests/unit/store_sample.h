/* store_sample.h: containers whose content follows from a number, and places for databases, for the
 * tests of store. */
#ifndef KVL_STORE_SAMPLE_H
#define KVL_STORE_SAMPLE_H

#include "base/alloc.h"
#include "base/file.h"
#include "base/random.h"
#include "segment/container.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A fresh directory. */
typedef struct kvl_store_place {
    char path[64];
} kvl_store_place;

static inline void kvl_store_place_make(kvl_store_place *place)
{
    (void)snprintf(place->path, sizeof place->path, "/tmp/kvloom-store-test-XXXXXX");
    KVL_ASSERT(mkdtemp(place->path) != NULL);
}

static inline void kvl_store_place_end(kvl_store_place *place)
{
    KVL_ASSERT(kvl_directory_remove(place->path, NULL) == KVL_OK);
}

static inline kvl_digest kvl_store_fingerprint(void)
{
    kvl_digest fingerprint;
    memset(fingerprint.bytes, 0x5a, sizeof fingerprint.bytes);
    return fingerprint;
}

static inline kvl_digest kvl_store_sample_id(uint32_t number)
{
    kvl_random random = {number};
    kvl_digest id;
    for (size_t i = 0; i < sizeof id.bytes; i++) id.bytes[i] = (uint8_t)kvl_random_next(&random);
    return id;
}

/* Byte i of block b of container `number`. */
static inline uint8_t kvl_store_sample_byte(uint32_t number, uint32_t b, size_t i)
{
    return (uint8_t)((number * 37u + b * 11u + 1u) * (i * 13u + 7u) >> 3);
}

/* Two blocks with `payload` bytes together, at least one each; not filled. */
static inline kvl_container *kvl_store_sample_of(uint32_t number, size_t payload,
                                                 const kvl_digest *fingerprint)
{
    const kvl_container_info info = {
        .kind = KVL_CONTAINER_ANCHOR,
        .id = kvl_store_sample_id(number),
        .fingerprint = *fingerprint,
        .dtype = KVL_KV_INT8,
        .n_layers = 2,
        .n_kv_heads = 1,
        .head_dim = 1,
        .block_bytes = payload / 2 + 1,
        .extra = &number,
        .n_extra_bytes = sizeof number,
    };
    kvl_container *container = NULL;
    KVL_ASSERT(kvl_container_create(&info, &container, NULL) == KVL_OK);
    return container;
}

static inline kvl_container *kvl_store_sample_unsealed(uint32_t number, size_t payload)
{
    const kvl_digest fingerprint = kvl_store_fingerprint();
    return kvl_store_sample_of(number, payload, &fingerprint);
}

static inline kvl_container *kvl_store_sample(uint32_t number, size_t payload)
{
    kvl_container *container = kvl_store_sample_unsealed(number, payload);
    for (uint32_t b = 0; b < 2; b++) {
        size_t n_bytes = 0;
        uint8_t *block = kvl_container_block(container, b, &n_bytes);
        for (size_t i = 0; i < n_bytes; i++) block[i] = kvl_store_sample_byte(number, b, i);
    }
    kvl_container_seal(container);
    return container;
}

static inline bool kvl_store_sample_is(const kvl_container *container, uint32_t number)
{
    const kvl_container_info *info = kvl_container_info_of(container);
    const kvl_digest id = kvl_store_sample_id(number);
    if (!kvl_digest_equal(&info->id, &id) || info->n_layers != 2) return false;
    if (info->n_extra_bytes != sizeof number || memcmp(info->extra, &number, sizeof number) != 0)
        return false;
    for (uint32_t b = 0; b < 2; b++) {
        size_t n_bytes = 0;
        const uint8_t *block = kvl_container_block_view(container, b, &n_bytes);
        for (size_t i = 0; i < n_bytes; i++) {
            if (block[i] != kvl_store_sample_byte(number, b, i)) return false;
        }
    }
    return true;
}

#define kvl_store_sample_check(container, number)                                                  \
    assert_true(kvl_store_sample_is((container), (number)))

static inline int kvl_store_compare(const void *a, const void *b)
{
    const int64_t left = *(const int64_t *)a, right = *(const int64_t *)b;
    return (left > right) - (left < right);
}

/* Sorts the times. */
static inline int64_t kvl_store_median(int64_t *times, size_t n)
{
    qsort(times, n, sizeof *times, kvl_store_compare);
    return times[n / 2];
}

#endif /* KVL_STORE_SAMPLE_H */
