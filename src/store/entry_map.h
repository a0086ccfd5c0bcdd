/* store/entry_map.h: a table of entries by id, and lists in order of use; both live inside the
 * entries, so that finding, moving and removing allocate nothing.
 * Threads  One at a time: the tier that owns it has a lock. */
#ifndef KVL_STORE_ENTRY_MAP_H
#define KVL_STORE_ENTRY_MAP_H

#include "base/hash.h"

/* First member of a tier's own entry. */
typedef struct kvl_entry {
    kvl_digest id;
    struct kvl_entry *next_in_bucket;
    struct kvl_entry *older, *newer;
} kvl_entry;

typedef struct kvl_entry_map {
    kvl_entry **buckets;
    size_t n_buckets; /* a power of two */
    size_t n_entries;
    uint64_t keys[8]; /* secret: nobody can choose ids that fall into one bucket */
} kvl_entry_map;

/* Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_entry_map_init(kvl_entry_map *map, kvl_error *error);
/* The entries stay with the caller. A zeroed map does nothing. */
void kvl_entry_map_deinit(kvl_entry_map *map);
/* NULL where there is none. */
kvl_entry *kvl_entry_map_find(const kvl_entry_map *map, const kvl_digest *id);
/* Cannot fail: where the table cannot grow, it only gets slower. The id must not be there yet. */
void kvl_entry_map_add(kvl_entry_map *map, kvl_entry *entry);
/* The entry must be there. */
void kvl_entry_map_remove(kvl_entry_map *map, kvl_entry *entry);

/* Entries from the oldest used to the newest. Zeroed is empty. */
typedef struct kvl_entry_list {
    kvl_entry *oldest, *newest;
} kvl_entry_list;

void kvl_entry_list_append(kvl_entry_list *list, kvl_entry *entry); /* as the newest */
void kvl_entry_list_remove(kvl_entry_list *list, kvl_entry *entry);

#endif /* KVL_STORE_ENTRY_MAP_H */
