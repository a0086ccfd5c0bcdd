/* lmdb_tier.c: containers in an LMDB database on a local disk.
 *
 * Reading  copies the value into a container's own memory while the transaction is open, checking
 *          blocks on the way. Lending the mapped pages instead would save the copy (1 to 2 ms for
 *          16 MiB, against some 5 ms of fetching from a peer), but a container lives as long as
 *          somebody holds it, and an open reader keeps every page freed since then from being used
 *          again: one forgotten container would grow the file without end, and no map could be
 *          resized.
 * Writing  one transaction puts the value (in place, MDB_RESERVE), its use, and uses of others that
 *          were waiting to be written. A map that is full is made larger up to a limit, then the
 *          oldest used are evicted until the value fits.
 * Locks    writer, then map_lock, then the index's own; each is taken in that order only. */
#include "store/store.h"

#include "store/lmdb_env.h"
#include "store/lmdb_index.h"
#include "store/lmdb_seal.h"

#include "base/alloc.h"
#include "base/log.h"

#include <inttypes.h>
#include <pthread.h>
#include <sodium.h>
#include <string.h>

/* Of uses written along with a put: enough for what is used between two puts, and no more than a
 * few pages in the transaction. */
enum { USES_ALONG = 64, EVICT_BATCH = 64 };

static const uint64_t VALUE_BYTES_MAX = UINT32_MAX; /* LMDB's own limit */

typedef struct lmdb_tier {
    kvl_tier tier; /* first: callers know tiers only */
    kvl_lmdb_env env;
    kvl_lmdb_index index;
    kvl_digest fingerprint;
    bool is_durable;
    bool is_sealed;
    uint8_t seal_key[KVL_LMDB_SEAL_KEY_BYTES];
    pthread_mutex_t writer;    /* one transaction that writes at a time */
    pthread_rwlock_t map_lock; /* shared by open transactions that read; resizing has it alone */
} lmdb_tier;

typedef enum counter { HIT, MISS, DAMAGED, FOREIGN } counter;

static void count(lmdb_tier *self, counter which)
{
    kvl_tier_stats *stats = &self->index.stats;
    (void)pthread_mutex_lock(&self->index.lock);
    stats->hits += which == HIT;
    stats->misses += which != HIT;
    stats->damaged += which == DAMAGED;
    stats->foreign += which == FOREIGN;
    (void)pthread_mutex_unlock(&self->index.lock);
}

static uint64_t bytes_held(lmdb_tier *self)
{
    (void)pthread_mutex_lock(&self->index.lock);
    const uint64_t bytes = self->index.stats.bytes;
    (void)pthread_mutex_unlock(&self->index.lock);
    return bytes;
}

static bool grow_map(lmdb_tier *self, bool for_delete)
{
    (void)pthread_rwlock_wrlock(&self->map_lock);
    const bool is_larger =
        for_delete ? kvl_lmdb_env_grow_for_delete(&self->env) : kvl_lmdb_env_grow(&self->env);
    (void)pthread_rwlock_unlock(&self->map_lock);
    return is_larger;
}

static int delete_once(lmdb_tier *self, size_t n, const kvl_digest *ids)
{
    MDB_txn *txn = NULL;
    int code = mdb_txn_begin(self->env.env, NULL, 0, &txn);
    if (code != 0) return code;
    for (size_t i = 0; i < n && code == 0; i++) {
        MDB_val key = {sizeof ids[i].bytes, (void *)(uintptr_t)ids[i].bytes};
        code = mdb_del(txn, self->env.containers, &key, NULL);
        if (code == 0) code = mdb_del(txn, self->env.uses, &key, NULL);
    }
    if (code == 0) return mdb_txn_commit(txn);
    mdb_txn_abort(txn);
    return code;
}

/* Deletes from the database, then from the index. The writer lock is held. */
static kvl_status delete_containers(lmdb_tier *self, size_t n, const kvl_digest *ids,
                                    kvl_error *error)
{
    int code = delete_once(self, n, ids);
    /* Deleting writes changed pages to new places, so a map full to the brim needs a little
     * more. */
    while (code == MDB_MAP_FULL && (grow_map(self, false) || grow_map(self, true)))
        code = delete_once(self, n, ids);
    if (code != 0) return kvl_lmdb_fail(error, code, "delete");
    for (size_t i = 0; i < n; i++) KVL_ASSERT(kvl_lmdb_index_remove(&self->index, &ids[i]));
    return KVL_OK;
}

/* Evicts the oldest used that sum to n_bytes, in batches. KVL_ERR_NOT_FOUND: there was nothing. */
static kvl_status evict(lmdb_tier *self, uint64_t n_bytes, kvl_error *error)
{
    const uint64_t before = bytes_held(self);
    const uint64_t target = n_bytes < before ? before - n_bytes : 0;
    if (before == 0) return KVL_FAIL(error, KVL_ERR_NOT_FOUND, "lmdb: nothing is left to evict");
    for (uint64_t held = before; held > target; held = bytes_held(self)) {
        kvl_digest ids[EVICT_BATCH];
        const size_t n = kvl_lmdb_index_oldest(&self->index, held - target, EVICT_BATCH, ids);
        KVL_TRY(delete_containers(self, n, ids, error));
        (void)pthread_mutex_lock(&self->index.lock);
        self->index.stats.evictions += n;
        (void)pthread_mutex_unlock(&self->index.lock);
    }
    return KVL_OK;
}

/* Above 95 % of the cap with what comes, down to 90 %: so that not every put has to evict. */
static kvl_status make_room(lmdb_tier *self, uint64_t n_bytes, kvl_error *error)
{
    const uint64_t bytes_max = self->index.stats.bytes_max;
    const uint64_t held = bytes_held(self);
    const uint64_t high = bytes_max - bytes_max / 20;
    const uint64_t low = bytes_max - bytes_max / 10;
    if (held == 0 || (n_bytes <= high && held <= high - n_bytes)) return KVL_OK;
    const uint64_t target = n_bytes < low ? low - n_bytes : 0;
    return held > target ? evict(self, held - target, error) : KVL_OK;
}

static void write_value(const lmdb_tier *self, const kvl_container *container, void *to)
{
    size_t n_bytes = 0;
    if (self->is_sealed) {
        kvl_lmdb_seal(self->seal_key, container, to);
        return;
    }
    const void *bytes = kvl_container_bytes(container, &n_bytes);
    memcpy(to, bytes, n_bytes);
}

static int put_once(lmdb_tier *self, const kvl_lmdb_entry *entry, const kvl_container *container)
{
    MDB_txn *txn = NULL;
    int code = mdb_txn_begin(self->env.env, NULL, 0, &txn);
    if (code != 0) return code;
    MDB_val key = {sizeof entry->entry.id.bytes, (void *)(uintptr_t)entry->entry.id.bytes};
    MDB_val value = {entry->use.n_bytes, NULL};
    MDB_val use = {sizeof entry->use, (void *)(uintptr_t)&entry->use};
    code = mdb_put(txn, self->env.containers, &key, &value, MDB_RESERVE);
    if (code == 0) write_value(self, container, value.mv_data);
    if (code == 0) code = mdb_put(txn, self->env.uses, &key, &use, 0);
    if (code == 0) code = kvl_lmdb_index_write_uses(&self->index, &self->env, txn, USES_ALONG);
    if (code == 0) return mdb_txn_commit(txn);
    mdb_txn_abort(txn);
    return code;
}

/* Changes one number and commits: pages that a transaction freed are free for the one after the
 * next only, so this brings them nearer. */
static int pass_a_transaction(lmdb_tier *self, uint64_t number)
{
    MDB_txn *txn = NULL;
    int code = mdb_txn_begin(self->env.env, NULL, 0, &txn);
    if (code != 0) return code;
    MDB_val key = {4, (void *)(uintptr_t) "tick"};
    MDB_val value = {sizeof number, &number};
    code = mdb_put(txn, self->env.about, &key, &value, 0);
    if (code == 0) return mdb_txn_commit(txn);
    mdb_txn_abort(txn);
    return code;
}

/* Puts until the map is large enough, or empty enough. */
static kvl_status put_growing(lmdb_tier *self, const kvl_lmdb_entry *entry,
                              const kvl_container *container, kvl_error *error)
{
    for (;;) {
        int code = put_once(self, entry, container);
        if (code == 0) return KVL_OK;
        if (code != MDB_MAP_FULL) return kvl_lmdb_fail(error, code, "put");
        if (grow_map(self, false)) continue;
        if (evict(self, entry->use.n_bytes, NULL) != KVL_OK)
            return kvl_lmdb_fail(error, code, "put");
        code = pass_a_transaction(self, entry->use.last_use);
        if (code != 0 && code != MDB_MAP_FULL) return kvl_lmdb_fail(error, code, "put");
    }
}

static kvl_status put_new(lmdb_tier *self, const kvl_container *container, uint64_t n_bytes,
                          kvl_error *error)
{
    const kvl_container_info *info = kvl_container_info_of(container);
    /* Memory first, so that nothing can fail once the transaction is through. */
    kvl_lmdb_entry *entry = kvl_alloc_zero(1, sizeof *entry);
    if (entry == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "lmdb: no memory for an entry");
    entry->entry.id = info->id;
    entry->use = (kvl_lmdb_use){
        .last_use = kvl_lmdb_index_next_use(&self->index),
        .n_bytes = n_bytes,
        .kind = info->kind,
    };
    kvl_status status = make_room(self, n_bytes, error);
    if (status == KVL_OK) status = put_growing(self, entry, container, error);
    if (status != KVL_OK) {
        kvl_free(entry);
        return status;
    }
    kvl_lmdb_index_add(&self->index, entry);
    return KVL_OK;
}

static kvl_status foreign(lmdb_tier *self, const kvl_digest *theirs, kvl_error *error)
{
    char ours[KVL_DIGEST_TEXT_BYTES];
    char other[KVL_DIGEST_TEXT_BYTES];
    return KVL_FAIL(
        error, KVL_ERR_FOREIGN, "lmdb: the container is of model %.16s, this store serves %.16s",
        kvl_digest_to_text(theirs, other), kvl_digest_to_text(&self->fingerprint, ours));
}

static kvl_status lmdb_put(kvl_tier *tier, kvl_container *container, kvl_error *error)
{
    lmdb_tier *self = (lmdb_tier *)tier;
    const kvl_container_info *info = kvl_container_info_of(container);
    if (!kvl_container_is_sealed(container))
        return KVL_FAIL(error, KVL_ERR_INVALID, "lmdb: the container is not sealed yet");
    const uint64_t n_bytes =
        self->is_sealed ? kvl_lmdb_sealed_bytes(container) : kvl_container_n_bytes(container);
    if (!kvl_digest_equal(&info->fingerprint, &self->fingerprint)) {
        (void)pthread_mutex_lock(&self->index.lock);
        self->index.stats.foreign++;
        (void)pthread_mutex_unlock(&self->index.lock);
        return foreign(self, &info->fingerprint, error);
    }
    const uint64_t bytes_max = self->index.stats.bytes_max;
    const uint64_t limit = bytes_max < VALUE_BYTES_MAX ? bytes_max : VALUE_BYTES_MAX;
    if (n_bytes > limit) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "lmdb: container of %" PRIu64 " bytes, the tier takes %" PRIu64
                        "; raise its cap",
                        n_bytes, limit);
    }
    (void)pthread_mutex_lock(&self->writer);
    kvl_status status = KVL_OK;
    if (!kvl_lmdb_index_find(&self->index, &info->id, NULL))
        status = put_new(self, container, n_bytes, error);
    (void)pthread_mutex_unlock(&self->writer);
    return status;
}

/* What is sealed needs the key, and with a key nothing else is believed: whoever can write to the
 * database could put anything there. */
static kvl_status copy_value(const lmdb_tier *self, const kvl_digest *id, const MDB_val *value,
                             bool check_blocks, kvl_container **container, kvl_error *error)
{
    const bool is_sealed = kvl_lmdb_is_sealed(value->mv_data, value->mv_size);
    if (is_sealed != self->is_sealed)
        return KVL_FAIL(error, KVL_ERR_FOREIGN, "lmdb: the container is %s, the tier is %s",
                        is_sealed ? "sealed" : "not sealed", is_sealed ? "not" : "sealed");
    if (is_sealed) {
        return kvl_lmdb_unseal(self->seal_key, id, value->mv_data, value->mv_size, container,
                               error);
    }
    return kvl_container_copy(value->mv_data, value->mv_size, check_blocks, container, error);
}

/* Copies one container out of the map. */
static kvl_status read_container(lmdb_tier *self, const kvl_digest *id, bool check_blocks,
                                 kvl_container **container, kvl_error *error)
{
    MDB_txn *txn = NULL;
    MDB_val key = {sizeof id->bytes, (void *)(uintptr_t)id->bytes};
    MDB_val value;
    int code = mdb_txn_begin(self->env.env, NULL, MDB_RDONLY, &txn);
    if (code != 0) return kvl_lmdb_fail(error, code, "begin to read");
    code = mdb_get(txn, self->env.containers, &key, &value);
    const kvl_status status = code == 0
                                  ? copy_value(self, id, &value, check_blocks, container, error)
                                  : kvl_lmdb_fail(error, code, "get");
    mdb_txn_abort(txn);
    return status;
}

/* The bytes are sound; are they what was asked for, and ours? */
static kvl_status check_identity(lmdb_tier *self, const kvl_digest *id,
                                 const kvl_container *container, kvl_error *error)
{
    const kvl_container_info *info = kvl_container_info_of(container);
    if (!kvl_digest_equal(&info->id, id))
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "lmdb: another container stands under this id");
    if (!kvl_digest_equal(&info->fingerprint, &self->fingerprint))
        return foreign(self, &info->fingerprint, error);
    return KVL_OK;
}

/* A damaged container goes, so that the next put of its id can bring a sound one. */
static void drop_damaged(lmdb_tier *self, const kvl_digest *id)
{
    char text[KVL_DIGEST_TEXT_BYTES];
    kvl_log(KVL_LOG_WARN, "container_damaged", "tier=lmdb container=%.16s",
            kvl_digest_to_text(id, text));
    (void)pthread_mutex_lock(&self->writer);
    kvl_error error = {.text = ""};
    if (kvl_lmdb_index_find(&self->index, id, NULL) &&
        delete_containers(self, 1, id, &error) != KVL_OK)
        kvl_log(KVL_LOG_WARN, "container_not_removed", "tier=lmdb reason=\"%s\"", error.text);
    (void)pthread_mutex_unlock(&self->writer);
}

static void log_foreign(const kvl_digest *id)
{
    char text[KVL_DIGEST_TEXT_BYTES];
    kvl_log(KVL_LOG_WARN, "container_foreign", "tier=lmdb container=%.16s",
            kvl_digest_to_text(id, text));
}

static kvl_status lmdb_get(kvl_tier *tier, const kvl_digest *id, bool check_blocks,
                           kvl_container **container, kvl_error *error)
{
    lmdb_tier *self = (lmdb_tier *)tier;
    *container = NULL;
    if (!kvl_lmdb_index_find(&self->index, id, NULL)) {
        count(self, MISS);
        return KVL_FAIL(error, KVL_ERR_NOT_FOUND, "lmdb: it is not there");
    }
    (void)pthread_rwlock_rdlock(&self->map_lock);
    kvl_status status = read_container(self, id, check_blocks, container, error);
    (void)pthread_rwlock_unlock(&self->map_lock);
    if (status == KVL_OK) status = check_identity(self, id, *container, error);
    if (status == KVL_OK) {
        kvl_lmdb_index_touch(&self->index, id);
        count(self, HIT);
        return KVL_OK;
    }
    kvl_container_release(*container);
    *container = NULL;
    /* A size past a limit can only be damage here: no such container was ever put. */
    if (status == KVL_ERR_TOO_LARGE) status = KVL_ERR_DAMAGED;
    count(self, status == KVL_ERR_DAMAGED ? DAMAGED : status == KVL_ERR_FOREIGN ? FOREIGN : MISS);
    if (status == KVL_ERR_DAMAGED) drop_damaged(self, id);
    if (status == KVL_ERR_FOREIGN) log_foreign(id);
    return status;
}

static bool lmdb_has(kvl_tier *tier, const kvl_digest *id)
{
    return kvl_lmdb_index_find(&((lmdb_tier *)tier)->index, id, NULL);
}

static kvl_status lmdb_remove(kvl_tier *tier, const kvl_digest *id, kvl_error *error)
{
    lmdb_tier *self = (lmdb_tier *)tier;
    (void)pthread_mutex_lock(&self->writer);
    kvl_status status = KVL_OK;
    if (kvl_lmdb_index_find(&self->index, id, NULL)) {
        status = delete_containers(self, 1, id, error);
    } else {
        status = KVL_FAIL(error, KVL_ERR_NOT_FOUND, "lmdb: it is not there");
    }
    (void)pthread_mutex_unlock(&self->writer);
    return status;
}

static void lmdb_list(kvl_tier *tier,
                      bool (*visit)(void *context, const kvl_digest *id, kvl_container_kind kind,
                                    uint64_t n_bytes),
                      void *context)
{
    lmdb_tier *self = (lmdb_tier *)tier;
    (void)pthread_mutex_lock(&self->index.lock);
    for (kvl_entry *at = self->index.order.oldest; at != NULL; at = at->newer) {
        const kvl_lmdb_use *use = &((const kvl_lmdb_entry *)at)->use;
        if (!visit(context, &at->id, (kvl_container_kind)use->kind, use->n_bytes)) break;
    }
    (void)pthread_mutex_unlock(&self->index.lock);
}

static void lmdb_touch(kvl_tier *tier, const kvl_digest *id)
{
    kvl_lmdb_index_touch(&((lmdb_tier *)tier)->index, id);
}

static void lmdb_stats(kvl_tier *tier, kvl_tier_stats *stats)
{
    lmdb_tier *self = (lmdb_tier *)tier;
    (void)pthread_mutex_lock(&self->index.lock);
    *stats = self->index.stats;
    (void)pthread_mutex_unlock(&self->index.lock);
}

/* What was used since the last put; without it only the order of eviction would be older. */
static void write_all_uses(lmdb_tier *self)
{
    MDB_txn *txn = NULL;
    int code = mdb_txn_begin(self->env.env, NULL, 0, &txn);
    if (code == 0) {
        code = kvl_lmdb_index_write_uses(&self->index, &self->env, txn, 0);
        if (code == 0) {
            code = mdb_txn_commit(txn);
        } else {
            mdb_txn_abort(txn);
        }
    }
    if (code == 0 && !self->is_durable) code = mdb_env_sync(self->env.env, 1);
    if (code != 0)
        kvl_log(KVL_LOG_WARN, "store_order_not_saved", "tier=lmdb reason=\"%s\"",
                mdb_strerror(code));
}

/* Overwrites the key. */
static void end(lmdb_tier *self)
{
    (void)sodium_munlock(self->seal_key, sizeof self->seal_key);
    kvl_free(self);
}

static void lmdb_destroy(kvl_tier *tier)
{
    lmdb_tier *self = (lmdb_tier *)tier;
    write_all_uses(self);
    kvl_lmdb_env_close(&self->env);
    kvl_lmdb_index_deinit(&self->index);
    (void)pthread_rwlock_destroy(&self->map_lock);
    (void)pthread_mutex_destroy(&self->writer);
    end(self);
}

static kvl_status open_and_load(lmdb_tier *self, const kvl_lmdb_tier_options *options,
                                bool *was_damaged, kvl_error *error)
{
    KVL_TRY(kvl_lmdb_env_open(options, &self->env, was_damaged, error));
    kvl_status status = kvl_lmdb_index_init(&self->index, options->bytes_max, error);
    if (status == KVL_OK) status = kvl_lmdb_index_load(&self->index, &self->env, error);
    if (status != KVL_OK) {
        kvl_lmdb_index_deinit(&self->index);
        kvl_lmdb_env_close(&self->env);
    }
    return status;
}

/* Pages may be sound while what they say is not: such a database is put aside as well. */
static kvl_status open_or_quarantine(lmdb_tier *self, const kvl_lmdb_tier_options *options,
                                     kvl_error *error)
{
    bool was_damaged = false;
    kvl_error reason = {.text = ""};
    kvl_status status = open_and_load(self, options, &was_damaged, &reason);
    if (status == KVL_ERR_CORRUPT) {
        was_damaged = true;
        KVL_TRY(kvl_lmdb_quarantine(options->path, reason.text, error));
        status = open_and_load(self, options, &was_damaged, &reason);
    }
    if (status != KVL_OK) return KVL_FAIL(error, status, "%s", reason.text);
    if (was_damaged) self->index.stats.damaged++;
    return KVL_OK;
}

static void init_locks(lmdb_tier *self)
{
    pthread_rwlockattr_t attributes;
    (void)pthread_rwlockattr_init(&attributes);
    /* Otherwise readers that overlap would keep a full map from ever growing. */
    (void)pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    (void)pthread_rwlock_init(&self->map_lock, &attributes);
    (void)pthread_rwlockattr_destroy(&attributes);
    (void)pthread_mutex_init(&self->writer, NULL);
}

/* Not the tenant's key itself, which makes ids: what one key does must tell nothing of the other.
 * Where memory cannot be locked (`kvloom doctor` says so), the key may reach the swap. */
static void take_key(lmdb_tier *self, const uint8_t *key)
{
    static const char DOMAIN_NAME[] = "kvloom.rest.1";
    (void)sodium_mlock(self->seal_key, sizeof self->seal_key);
    if (key == NULL) return;
    kvl_digester digester;
    kvl_digester_init(&digester, key, KVL_LMDB_SEAL_KEY_BYTES);
    kvl_digester_add(&digester, DOMAIN_NAME, sizeof DOMAIN_NAME);
    kvl_digest derived = kvl_digester_end(&digester);
    memcpy(self->seal_key, derived.bytes, sizeof self->seal_key);
    sodium_memzero(&derived, sizeof derived);
    self->is_sealed = true;
}

kvl_status kvl_lmdb_tier_create(const kvl_lmdb_tier_options *options, kvl_tier **tier,
                                kvl_error *error)
{
    static const kvl_tier_ops ops = {
        .name = "lmdb",
        .put = lmdb_put,
        .get = lmdb_get,
        .has = lmdb_has,
        .remove = lmdb_remove,
        .list = lmdb_list,
        .touch = lmdb_touch,
        .stats = lmdb_stats,
        .destroy = lmdb_destroy,
    };
    *tier = NULL;
    lmdb_tier *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "lmdb: no memory for the tier");
    made->tier.ops = &ops;
    made->fingerprint = options->fingerprint;
    made->is_durable = options->durable;
    take_key(made, options->seal_key);
    const kvl_status status = open_or_quarantine(made, options, error);
    if (status != KVL_OK) {
        end(made);
        return status;
    }
    init_locks(made);
    *tier = &made->tier;
    return KVL_OK;
}
