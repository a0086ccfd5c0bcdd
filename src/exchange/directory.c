/* exchange/directory.c: a set-associative cache of announcements. */
#include "exchange/directory.h"

#include "base/alloc.h"

#include <pthread.h>
#include <string.h>

enum { N_SETS = KVL_DIRECTORY_IDS / KVL_DIRECTORY_WAYS };

typedef struct entry {
    kvl_digest id;
    uint64_t peers; /* 0: free */
    uint64_t stamp; /* of the last announcement */
} entry;

struct kvl_peer_directory {
    pthread_mutex_t lock; /* the protocol's thread writes, any thread may look */
    uint64_t seed;
    uint64_t stamp;
    entry entries[N_SETS][KVL_DIRECTORY_WAYS];
};

kvl_peer_directory *kvl_peer_directory_create(uint64_t seed)
{
    kvl_peer_directory *directory = kvl_alloc_zero(1, sizeof *directory);
    if (directory == NULL) return NULL;
    directory->seed = seed;
    (void)pthread_mutex_init(&directory->lock, NULL);
    return directory;
}

void kvl_peer_directory_destroy(kvl_peer_directory *directory)
{
    if (directory == NULL) return;
    (void)pthread_mutex_destroy(&directory->lock);
    kvl_free(directory);
}

static size_t set_of(const kvl_peer_directory *directory, const kvl_digest *id)
{
    uint64_t word = 0;
    memcpy(&word, id->bytes, sizeof word);
    word = (word ^ directory->seed) * UINT64_C(0x9e3779b97f4a7c15);
    return (size_t)(word >> 32) % N_SETS;
}

static entry *find(const kvl_peer_directory *directory, const kvl_digest *id)
{
    const entry *set = directory->entries[set_of(directory, id)];
    for (size_t way = 0; way < KVL_DIRECTORY_WAYS; way++) {
        if (set[way].peers != 0 && memcmp(&set[way].id, id, sizeof *id) == 0) {
            return (entry *)(uintptr_t)&set[way];
        }
    }
    return NULL;
}

void kvl_peer_directory_add(kvl_peer_directory *directory, const kvl_digest *id, uint32_t peer)
{
    KVL_ASSERT(peer < 64);
    (void)pthread_mutex_lock(&directory->lock);
    entry *place = find(directory, id);
    if (place == NULL) {
        entry *set = directory->entries[set_of(directory, id)];
        place = &set[0];
        for (size_t way = 0; way < KVL_DIRECTORY_WAYS && place->peers != 0; way++) {
            if (set[way].peers == 0 || set[way].stamp < place->stamp) place = &set[way];
        }
        place->id = *id;
        place->peers = 0;
    }
    place->peers |= UINT64_C(1) << peer;
    place->stamp = ++directory->stamp;
    (void)pthread_mutex_unlock(&directory->lock);
}

void kvl_peer_directory_remove(kvl_peer_directory *directory, const kvl_digest *id, uint32_t peer)
{
    KVL_ASSERT(peer < 64);
    (void)pthread_mutex_lock(&directory->lock);
    entry *place = find(directory, id);
    if (place != NULL) place->peers &= ~(UINT64_C(1) << peer);
    (void)pthread_mutex_unlock(&directory->lock);
}

void kvl_peer_directory_forget_peer(kvl_peer_directory *directory, uint32_t peer)
{
    KVL_ASSERT(peer < 64);
    (void)pthread_mutex_lock(&directory->lock);
    for (size_t set = 0; set < N_SETS; set++) {
        for (size_t way = 0; way < KVL_DIRECTORY_WAYS; way++) {
            directory->entries[set][way].peers &= ~(UINT64_C(1) << peer);
        }
    }
    (void)pthread_mutex_unlock(&directory->lock);
}

uint64_t kvl_peer_directory_find(kvl_peer_directory *directory, const kvl_digest *id)
{
    (void)pthread_mutex_lock(&directory->lock);
    const entry *place = find(directory, id);
    const uint64_t peers = place == NULL ? 0 : place->peers;
    (void)pthread_mutex_unlock(&directory->lock);
    return peers;
}
