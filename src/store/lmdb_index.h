/* store/lmdb_index.h: what the LMDB tier knows about its containers without asking LMDB: id, kind,
 * size and order of use. Loaded at open; the order is written back with later transactions.
 * Threads  Locked inside. Entries are added and removed by one thread at a time (the writer). */
#ifndef KVL_STORE_LMDB_INDEX_H
#define KVL_STORE_LMDB_INDEX_H

#include "store/entry_map.h"
#include "store/lmdb_env.h"

#include <pthread.h>

typedef struct kvl_lmdb_entry {
    kvl_entry entry; /* first: maps and lists know entries only */
    kvl_lmdb_use use;
    bool is_dirty; /* use.last_use is later than what the database says */
} kvl_lmdb_entry;

typedef struct kvl_lmdb_index {
    pthread_mutex_t lock;
    kvl_entry_map map;
    kvl_entry_list order;
    uint64_t last_use; /* the highest there is */
    kvl_tier_stats stats;
} kvl_lmdb_index;

/* Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_lmdb_index_init(kvl_lmdb_index *index, uint64_t bytes_max,
                                            kvl_error *error);
/* Ends the entries too. A zeroed index does nothing. */
void kvl_lmdb_index_deinit(kvl_lmdb_index *index);

/* Reads the index of a database into an empty index.
 * Errors   KVL_ERR_CORRUPT (tables do not fit one another), KVL_ERR_NO_MEMORY, KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_lmdb_index_load(kvl_lmdb_index *index, const kvl_lmdb_env *env,
                                            kvl_error *error);

/* Copies what is known of an id; false where there is none. `use` may be NULL. */
bool kvl_lmdb_index_find(kvl_lmdb_index *index, const kvl_digest *id, kvl_lmdb_use *use);
/* Takes the entry, whose id, kind and size are set and whose id is not there yet, as the newest. */
void kvl_lmdb_index_add(kvl_lmdb_index *index, kvl_lmdb_entry *entry);
/* False where there is none. */
bool kvl_lmdb_index_remove(kvl_lmdb_index *index, const kvl_digest *id);
/* Makes it the newest; one that is gone by now is left alone. */
void kvl_lmdb_index_touch(kvl_lmdb_index *index, const kvl_digest *id);
uint64_t kvl_lmdb_index_next_use(kvl_lmdb_index *index);

/* Copies ids of the oldest until they sum to n_bytes, at most n_max; returns how many. */
size_t kvl_lmdb_index_oldest(kvl_lmdb_index *index, uint64_t n_bytes, size_t n_max,
                             kvl_digest *ids);

/* Writes back what was used lately: among the newest n_max, at most 64; with 0, all. Returns a
 * code of LMDB. */
int kvl_lmdb_index_write_uses(kvl_lmdb_index *index, const kvl_lmdb_env *env, MDB_txn *txn,
                              size_t n_max);

#endif /* KVL_STORE_LMDB_INDEX_H */
