/* entry_map.c: chained hashing, doubled when it is full. */
#include "store/entry_map.h"

#include "base/alloc.h"
#include "base/random.h"

#include <string.h>

enum { BUCKETS_FIRST = 64 };

kvl_status kvl_entry_map_init(kvl_entry_map *map, kvl_error *error)
{
    *map = (kvl_entry_map){.n_buckets = BUCKETS_FIRST};
    map->buckets = kvl_alloc_zero(map->n_buckets, sizeof(kvl_entry *));
    if (map->buckets == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a table");
    kvl_random_secret(map->keys, sizeof map->keys);
    return KVL_OK;
}

void kvl_entry_map_deinit(kvl_entry_map *map)
{
    kvl_free(map->buckets);
    *map = (kvl_entry_map){0};
}

/* Multilinear hashing of eight 32-bit words with secret 64-bit keys (Lemire and Kaser,
 * arXiv:1202.4961, section 3): two different ids meet in the upper 32 bits with a chance of 2^-32,
 * whoever chose them. */
static size_t bucket_of(const kvl_entry_map *map, const kvl_digest *id)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < 8; i++) {
        uint32_t word;
        memcpy(&word, id->bytes + 4 * i, sizeof word);
        sum += map->keys[i] * word;
    }
    return (size_t)(sum >> 32) & (map->n_buckets - 1);
}

kvl_entry *kvl_entry_map_find(const kvl_entry_map *map, const kvl_digest *id)
{
    kvl_entry *entry = map->buckets[bucket_of(map, id)];
    while (entry != NULL && memcmp(entry->id.bytes, id->bytes, sizeof id->bytes) != 0)
        entry = entry->next_in_bucket;
    return entry;
}

static void insert(kvl_entry_map *map, kvl_entry *entry)
{
    kvl_entry **bucket = &map->buckets[bucket_of(map, &entry->id)];
    entry->next_in_bucket = *bucket;
    *bucket = entry;
}

static void grow(kvl_entry_map *map)
{
    kvl_entry **wider = kvl_alloc_zero(map->n_buckets * 2, sizeof *wider);
    if (wider == NULL) return;
    kvl_entry **before = map->buckets;
    const size_t n_before = map->n_buckets;
    map->buckets = wider;
    map->n_buckets *= 2;
    for (size_t i = 0; i < n_before; i++) {
        kvl_entry *entry = before[i];
        while (entry != NULL) {
            kvl_entry *next = entry->next_in_bucket;
            insert(map, entry);
            entry = next;
        }
    }
    kvl_free(before);
}

void kvl_entry_map_add(kvl_entry_map *map, kvl_entry *entry)
{
    if (map->n_entries >= map->n_buckets) grow(map);
    insert(map, entry);
    map->n_entries++;
}

void kvl_entry_map_remove(kvl_entry_map *map, kvl_entry *entry)
{
    kvl_entry **link = &map->buckets[bucket_of(map, &entry->id)];
    while (*link != NULL && *link != entry) link = &(*link)->next_in_bucket;
    KVL_ASSERT(*link == entry);
    *link = entry->next_in_bucket;
    entry->next_in_bucket = NULL;
    map->n_entries--;
}

void kvl_entry_list_append(kvl_entry_list *list, kvl_entry *entry)
{
    entry->older = list->newest;
    entry->newer = NULL;
    if (list->newest != NULL) {
        list->newest->newer = entry;
    } else {
        list->oldest = entry;
    }
    list->newest = entry;
}

void kvl_entry_list_remove(kvl_entry_list *list, kvl_entry *entry)
{
    if (entry->older != NULL) {
        entry->older->newer = entry->newer;
    } else {
        KVL_ASSERT(list->oldest == entry);
        list->oldest = entry->newer;
    }
    if (entry->newer != NULL) {
        entry->newer->older = entry->older;
    } else {
        KVL_ASSERT(list->newest == entry);
        list->newest = entry->older;
    }
    entry->older = NULL;
    entry->newer = NULL;
}
