/* lmdb_index.c: the index in memory, and how its order of use gets to disk.
 *
 * A use changes memory only; it is written when a transaction is on its way anyway, and all at the
 * end. A process that is killed forgets the order of its latest uses and nothing else. */
#include "store/lmdb_index.h"

#include "base/alloc.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static kvl_lmdb_entry *entry_of(kvl_entry *entry)
{
    return (kvl_lmdb_entry *)entry;
}

kvl_status kvl_lmdb_index_init(kvl_lmdb_index *index, uint64_t bytes_max, kvl_error *error)
{
    *index = (kvl_lmdb_index){.stats = {.bytes_max = bytes_max}};
    KVL_TRY(kvl_entry_map_init(&index->map, error));
    (void)pthread_mutex_init(&index->lock, NULL);
    return KVL_OK;
}

static void end_entries(kvl_lmdb_index *index)
{
    kvl_entry *entry = index->order.oldest;
    while (entry != NULL) {
        kvl_entry *next = entry->newer;
        kvl_free(entry_of(entry));
        entry = next;
    }
    index->order = (kvl_entry_list){0};
}

void kvl_lmdb_index_deinit(kvl_lmdb_index *index)
{
    if (index->map.buckets == NULL) return;
    end_entries(index);
    kvl_entry_map_deinit(&index->map);
    (void)pthread_mutex_destroy(&index->lock);
}

bool kvl_lmdb_index_find(kvl_lmdb_index *index, const kvl_digest *id, kvl_lmdb_use *use)
{
    (void)pthread_mutex_lock(&index->lock);
    kvl_entry *entry = kvl_entry_map_find(&index->map, id);
    if (entry != NULL && use != NULL) *use = entry_of(entry)->use;
    (void)pthread_mutex_unlock(&index->lock);
    return entry != NULL;
}

static void add(kvl_lmdb_index *index, kvl_lmdb_entry *entry)
{
    kvl_entry_map_add(&index->map, &entry->entry);
    kvl_entry_list_append(&index->order, &entry->entry);
    index->stats.n_containers++;
    index->stats.bytes += entry->use.n_bytes;
    if (entry->use.last_use > index->last_use) index->last_use = entry->use.last_use;
}

void kvl_lmdb_index_add(kvl_lmdb_index *index, kvl_lmdb_entry *entry)
{
    (void)pthread_mutex_lock(&index->lock);
    add(index, entry);
    (void)pthread_mutex_unlock(&index->lock);
}

bool kvl_lmdb_index_remove(kvl_lmdb_index *index, const kvl_digest *id)
{
    (void)pthread_mutex_lock(&index->lock);
    kvl_entry *entry = kvl_entry_map_find(&index->map, id);
    if (entry != NULL) {
        kvl_entry_map_remove(&index->map, entry);
        kvl_entry_list_remove(&index->order, entry);
        index->stats.n_containers--;
        index->stats.bytes -= entry_of(entry)->use.n_bytes;
    }
    (void)pthread_mutex_unlock(&index->lock);
    if (entry != NULL) kvl_free(entry_of(entry));
    return entry != NULL;
}

void kvl_lmdb_index_touch(kvl_lmdb_index *index, const kvl_digest *id)
{
    (void)pthread_mutex_lock(&index->lock);
    kvl_entry *entry = kvl_entry_map_find(&index->map, id);
    if (entry != NULL) {
        kvl_entry_list_remove(&index->order, entry);
        kvl_entry_list_append(&index->order, entry);
        entry_of(entry)->use.last_use = ++index->last_use;
        entry_of(entry)->is_dirty = true;
    }
    (void)pthread_mutex_unlock(&index->lock);
}

uint64_t kvl_lmdb_index_next_use(kvl_lmdb_index *index)
{
    (void)pthread_mutex_lock(&index->lock);
    const uint64_t next = ++index->last_use;
    (void)pthread_mutex_unlock(&index->lock);
    return next;
}

size_t kvl_lmdb_index_oldest(kvl_lmdb_index *index, uint64_t n_bytes, size_t n_max, kvl_digest *ids)
{
    size_t n = 0;
    uint64_t sum = 0;
    (void)pthread_mutex_lock(&index->lock);
    kvl_entry *entry = index->order.oldest;
    for (; entry != NULL && sum < n_bytes && n < n_max; entry = entry->newer) {
        sum += entry_of(entry)->use.n_bytes;
        ids[n++] = entry->id;
    }
    (void)pthread_mutex_unlock(&index->lock);
    return n;
}

typedef struct touched {
    kvl_digest id;
    kvl_lmdb_use use;
} touched;

/* Copies the uses that are not written yet among the newest n_max entries (0: all), as far as there
 * is room. What was used lately stands at the end of the order, so little is searched. */
static size_t collect_touched(kvl_lmdb_index *index, size_t n_max, size_t n_room, touched *uses)
{
    size_t n = 0;
    size_t n_seen = 0;
    (void)pthread_mutex_lock(&index->lock);
    for (kvl_entry *at = index->order.newest; at != NULL && n < n_room; at = at->older) {
        if (n_max > 0 && n_seen++ == n_max) break;
        kvl_lmdb_entry *entry = entry_of(at);
        if (!entry->is_dirty) continue;
        entry->is_dirty = false;
        uses[n++] = (touched){at->id, entry->use};
    }
    (void)pthread_mutex_unlock(&index->lock);
    return n;
}

int kvl_lmdb_index_write_uses(kvl_lmdb_index *index, const kvl_lmdb_env *env, MDB_txn *txn,
                              size_t n_max)
{
    enum { BATCH = 64 };
    touched uses[BATCH];
    size_t n = BATCH;
    while (n == BATCH) {
        n = collect_touched(index, n_max, BATCH, uses);
        for (size_t i = 0; i < n; i++) {
            MDB_val key = {sizeof uses[i].id.bytes, uses[i].id.bytes};
            MDB_val value = {sizeof uses[i].use, &uses[i].use};
            const int code = mdb_put(txn, env->uses, &key, &value, 0);
            if (code != 0) return code;
        }
        if (n_max > 0) break;
    }
    return 0;
}

static kvl_status not_fitting(kvl_error *error)
{
    return KVL_FAIL(error, KVL_ERR_CORRUPT,
                    "lmdb: the table of containers and that of their uses "
                    "do not fit one another");
}

/* Makes an entry of one record of both tables. The value of the container is not touched: its size
 * stands beside its key. */
static kvl_status entry_make(const MDB_val *id, const MDB_val *bytes, const MDB_val *use_id,
                             const MDB_val *use, kvl_lmdb_entry **entry, kvl_error *error)
{
    kvl_lmdb_use read;
    if (id->mv_size != KVL_DIGEST_BYTES || use_id->mv_size != KVL_DIGEST_BYTES ||
        use->mv_size != sizeof read || memcmp(id->mv_data, use_id->mv_data, KVL_DIGEST_BYTES) != 0)
        return not_fitting(error);
    memcpy(&read, use->mv_data, sizeof read);
    if (read.n_bytes != bytes->mv_size || read.last_use > UINT64_MAX / 2 ||
        (read.kind != KVL_CONTAINER_SEGMENT && read.kind != KVL_CONTAINER_ANCHOR))
        return not_fitting(error);
    *entry = kvl_alloc_zero(1, sizeof **entry);
    if (*entry == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "lmdb: no memory for the index");
    memcpy((*entry)->entry.id.bytes, id->mv_data, KVL_DIGEST_BYTES);
    (*entry)->use = read;
    return KVL_OK;
}

/* Walks both tables in step and puts the entries into the order of their ids. */
static kvl_status load_entries(kvl_lmdb_index *index, MDB_cursor *containers, MDB_cursor *uses,
                               kvl_error *error)
{
    for (MDB_cursor_op step = MDB_FIRST;; step = MDB_NEXT) {
        MDB_val id, bytes, use_id, use;
        const int code = mdb_cursor_get(containers, &id, &bytes, step);
        const int use_code = mdb_cursor_get(uses, &use_id, &use, step);
        if (code == MDB_NOTFOUND && use_code == MDB_NOTFOUND) return KVL_OK;
        if (code == MDB_NOTFOUND || use_code == MDB_NOTFOUND) return not_fitting(error);
        if (code != 0 || use_code != 0)
            return kvl_lmdb_fail(error, code != 0 ? code : use_code, "read the index");
        kvl_lmdb_entry *entry = NULL;
        KVL_TRY(entry_make(&id, &bytes, &use_id, &use, &entry, error));
        add(index, entry);
    }
}

static int compare_uses(const void *a, const void *b)
{
    const uint64_t left = entry_of(*(kvl_entry *const *)a)->use.last_use;
    const uint64_t right = entry_of(*(kvl_entry *const *)b)->use.last_use;
    return (left > right) - (left < right);
}

static kvl_status sort_by_use(kvl_lmdb_index *index, kvl_error *error)
{
    const size_t n = (size_t)index->stats.n_containers;
    if (n == 0) return KVL_OK;
    kvl_entry **entries = kvl_alloc_zero(n, sizeof *entries);
    if (entries == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "lmdb: no memory for the index");
    size_t i = 0;
    for (kvl_entry *at = index->order.oldest; at != NULL; at = at->newer) entries[i++] = at;
    qsort(entries, n, sizeof *entries, compare_uses);
    index->order = (kvl_entry_list){0};
    for (i = 0; i < n; i++) kvl_entry_list_append(&index->order, entries[i]);
    kvl_free(entries);
    return KVL_OK;
}

kvl_status kvl_lmdb_index_load(kvl_lmdb_index *index, const kvl_lmdb_env *env, kvl_error *error)
{
    MDB_txn *txn = NULL;
    MDB_cursor *containers = NULL;
    MDB_cursor *uses = NULL;
    int code = mdb_txn_begin(env->env, NULL, MDB_RDONLY, &txn);
    if (code != 0) return kvl_lmdb_fail(error, code, "begin to read");
    code = mdb_cursor_open(txn, env->containers, &containers);
    if (code == 0) code = mdb_cursor_open(txn, env->uses, &uses);
    kvl_status status = code == 0 ? load_entries(index, containers, uses, error)
                                  : kvl_lmdb_fail(error, code, "read the index");
    if (uses != NULL) mdb_cursor_close(uses);
    if (containers != NULL) mdb_cursor_close(containers);
    mdb_txn_abort(txn);
    return status == KVL_OK ? sort_by_use(index, error) : status;
}
