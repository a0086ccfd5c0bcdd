/* tiny_store.h: the smallest tier that serves, and containers whose bytes follow from their number.
 * For tests of the exchange, which must not depend on the real tiers. */
#ifndef KVL_TEST_TINY_STORE_H
#define KVL_TEST_TINY_STORE_H

#include "store/store.h"

#include <pthread.h>

#define TINY_STORE_CONTAINERS_MAX 512u

typedef struct tiny_store {
    kvl_tier tier; /* first: the tier is the store */
    pthread_mutex_t lock;
    kvl_container *containers[TINY_STORE_CONTAINERS_MAX];
    size_t n_containers;
} tiny_store;

/* The caller's storage. */
void tiny_store_init(tiny_store *store);
void tiny_store_deinit(tiny_store *store);

typedef struct tiny_shape {
    uint32_t n_blocks;
    uint64_t block_bytes;
    uint32_t group; /* the first byte of `extra` */
    kvl_digest fingerprint;
} tiny_shape;

kvl_digest tiny_id(uint64_t number);
/* An anchor. `variant` changes the bytes of the blocks, not the id: as if another host had computed
 * the same with other roundings. NULL when there is no memory. */
kvl_container *tiny_container(uint64_t number, uint64_t variant, const tiny_shape *shape);
/* Whether the blocks are those of this number and variant. */
bool tiny_container_is(const kvl_container *container, uint64_t number, uint64_t variant);
/* Makes a container, puts it and lets it go; false when there is no memory. */
bool tiny_store_add(tiny_store *store, uint64_t number, uint64_t variant, const tiny_shape *shape);

#endif /* KVL_TEST_TINY_STORE_H */
