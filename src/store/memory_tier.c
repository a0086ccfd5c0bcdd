/* memory_tier.c: containers in the memory of this process.
 *
 * Segmented LRU (Karedla, Love and Wherry, 1994) by bytes: a container comes in on probation and is
 * protected from its first use on; probation is evicted first. So a scan of many containers that
 * nobody asks for again does not push out those that are asked for. Protected containers hold at
 * most four fifths of the cap; beyond that the oldest used goes back on probation. */
#include "store/store.h"

#include "store/entry_map.h"

#include "base/alloc.h"

#include <inttypes.h>
#include <pthread.h>

typedef struct memory_entry {
    kvl_entry entry; /* first: the map knows entries only */
    kvl_container *container;
    uint64_t n_bytes;
    bool is_protected;
} memory_entry;

typedef struct memory_tier {
    kvl_tier tier; /* first: callers know tiers only */
    pthread_mutex_t lock;
    kvl_entry_map map;
    kvl_entry_list probation, protected;
    uint64_t protected_bytes;
    bool keeps_held; /* what others hold is not evicted, and so is always counted */
    kvl_tier_stats stats;
} memory_tier;

static memory_entry *entry_of(kvl_entry *entry)
{
    return (memory_entry *)entry;
}

static kvl_entry_list *list_of(memory_tier *self, const memory_entry *entry)
{
    return entry->is_protected ? &self->protected : &self->probation;
}

/* Unlinks; the caller ends the entry when the lock is open, for the last reference of a borrowed
 * container calls into whoever lent it. */
static void unlink_entry(memory_tier *self, memory_entry *entry)
{
    kvl_entry_map_remove(&self->map, &entry->entry);
    kvl_entry_list_remove(list_of(self, entry), &entry->entry);
    if (entry->is_protected) self->protected_bytes -= entry->n_bytes;
    self->stats.n_containers--;
    self->stats.bytes -= entry->n_bytes;
}

static void end_entry(memory_entry *entry)
{
    kvl_container_release(entry->container);
    kvl_free(entry);
}

/* Ends a chain that was linked through `newer`. */
static void end_entries(kvl_entry *entry)
{
    while (entry != NULL) {
        kvl_entry *next = entry->newer;
        end_entry(entry_of(entry));
        entry = next;
    }
}

/* The next to go, oldest on probation first; NULL where others hold all that is there. Nobody else
 * can get hold of a container meanwhile: that takes the lock, or a reference. */
static kvl_entry *find_victim(const memory_tier *self)
{
    for (int pass = 0; pass < 2; pass++) {
        kvl_entry *at = pass == 0 ? self->probation.oldest : self->protected.oldest;
        for (; at != NULL; at = at->newer) {
            if (!self->keeps_held || kvl_container_n_references(entry_of(at)->container) == 1)
                return at;
        }
    }
    return NULL;
}

/* Makes room for n_bytes more; gives what was evicted as a chain. False where that was not
 * enough. */
static bool evict(memory_tier *self, uint64_t n_bytes, kvl_entry **evicted)
{
    *evicted = NULL;
    while (self->stats.bytes > self->stats.bytes_max - n_bytes) {
        kvl_entry *oldest = find_victim(self);
        KVL_ASSERT(oldest != NULL || self->keeps_held);
        if (oldest == NULL) return false;
        unlink_entry(self, entry_of(oldest));
        self->stats.evictions++;
        oldest->newer = *evicted;
        *evicted = oldest;
    }
    return true;
}

static void use_entry(memory_tier *self, memory_entry *entry)
{
    kvl_entry_list_remove(list_of(self, entry), &entry->entry);
    if (!entry->is_protected) self->protected_bytes += entry->n_bytes;
    entry->is_protected = true;
    kvl_entry_list_append(&self->protected, &entry->entry);
    const uint64_t protected_max = self->stats.bytes_max / 5 * 4;
    while (self->protected_bytes > protected_max) {
        memory_entry *oldest = entry_of(self->protected.oldest);
        kvl_entry_list_remove(&self->protected, &oldest->entry);
        oldest->is_protected = false;
        self->protected_bytes -= oldest->n_bytes;
        kvl_entry_list_append(&self->probation, &oldest->entry);
    }
}

static kvl_status memory_put(kvl_tier *tier, kvl_container *container, kvl_error *error)
{
    memory_tier *self = (memory_tier *)tier;
    if (!kvl_container_is_sealed(container))
        return KVL_FAIL(error, KVL_ERR_INVALID, "memory: the container is not sealed yet");
    size_t n_bytes = 0;
    (void)kvl_container_bytes(container, &n_bytes);
    if (n_bytes > self->stats.bytes_max) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "memory: container of %zu bytes, the tier holds %" PRIu64 "; raise its cap",
                        n_bytes, self->stats.bytes_max);
    }
    memory_entry *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "memory: no memory for an entry");
    made->entry.id = kvl_container_info_of(container)->id;
    made->n_bytes = n_bytes;
    kvl_entry *ended = NULL;
    kvl_entry *unused = &made->entry;
    kvl_status status = KVL_OK;
    (void)pthread_mutex_lock(&self->lock);
    if (kvl_entry_map_find(&self->map, &made->entry.id) != NULL) {
        /* There already: nothing changes, not even the order. */
    } else if (!evict(self, n_bytes, &ended)) {
        status = KVL_FAIL(error, KVL_ERR_BUSY,
                          "memory: no room for %zu bytes, all of the %" PRIu64 " here are in use",
                          n_bytes, self->stats.bytes);
    } else {
        kvl_container_share(container);
        made->container = container;
        kvl_entry_map_add(&self->map, &made->entry);
        kvl_entry_list_append(&self->probation, &made->entry);
        self->stats.n_containers++;
        self->stats.bytes += n_bytes;
        unused = NULL;
    }
    (void)pthread_mutex_unlock(&self->lock);
    end_entries(ended);
    if (unused != NULL) end_entry(entry_of(unused));
    return status;
}

/* Takes out the entry of this very container; another of the same id may stand there by now. */
static void drop_damaged(memory_tier *self, const kvl_digest *id, const kvl_container *container)
{
    (void)pthread_mutex_lock(&self->lock);
    self->stats.damaged++;
    self->stats.hits--;
    self->stats.misses++;
    kvl_entry *entry = kvl_entry_map_find(&self->map, id);
    if (entry != NULL && entry_of(entry)->container != container) entry = NULL;
    if (entry != NULL) unlink_entry(self, entry_of(entry));
    (void)pthread_mutex_unlock(&self->lock);
    end_entries(entry);
}

static kvl_status memory_get(kvl_tier *tier, const kvl_digest *id, bool check_blocks,
                             kvl_container **container, kvl_error *error)
{
    memory_tier *self = (memory_tier *)tier;
    *container = NULL;
    (void)pthread_mutex_lock(&self->lock);
    kvl_entry *entry = kvl_entry_map_find(&self->map, id);
    if (entry != NULL) {
        use_entry(self, entry_of(entry));
        *container = entry_of(entry)->container;
        kvl_container_share(*container);
        self->stats.hits++;
    } else {
        self->stats.misses++;
    }
    (void)pthread_mutex_unlock(&self->lock);
    if (*container == NULL) return KVL_FAIL(error, KVL_ERR_NOT_FOUND, "memory: it is not there");
    kvl_status status = KVL_OK;
    for (uint32_t i = 0; check_blocks && i < kvl_container_n_blocks(*container); i++) {
        status = kvl_container_block_check(*container, i, error);
        if (status != KVL_OK) break;
    }
    if (status != KVL_OK) {
        drop_damaged(self, id, *container);
        kvl_container_release(*container);
        *container = NULL;
    }
    return status;
}

static bool memory_has(kvl_tier *tier, const kvl_digest *id)
{
    memory_tier *self = (memory_tier *)tier;
    (void)pthread_mutex_lock(&self->lock);
    const bool is_there = kvl_entry_map_find(&self->map, id) != NULL;
    (void)pthread_mutex_unlock(&self->lock);
    return is_there;
}

static kvl_status memory_remove(kvl_tier *tier, const kvl_digest *id, kvl_error *error)
{
    memory_tier *self = (memory_tier *)tier;
    (void)pthread_mutex_lock(&self->lock);
    kvl_entry *entry = kvl_entry_map_find(&self->map, id);
    if (entry != NULL) unlink_entry(self, entry_of(entry));
    (void)pthread_mutex_unlock(&self->lock);
    if (entry == NULL) return KVL_FAIL(error, KVL_ERR_NOT_FOUND, "memory: it is not there");
    end_entries(entry);
    return KVL_OK;
}

static void memory_list(kvl_tier *tier,
                        bool (*visit)(void *context, const kvl_digest *id, kvl_container_kind kind,
                                      uint64_t n_bytes),
                        void *context)
{
    memory_tier *self = (memory_tier *)tier;
    (void)pthread_mutex_lock(&self->lock);
    bool goes_on = true;
    for (int pass = 0; pass < 2; pass++) {
        kvl_entry *at = pass == 0 ? self->probation.oldest : self->protected.oldest;
        for (; at != NULL && goes_on; at = at->newer) {
            const memory_entry *entry = entry_of(at);
            goes_on = visit(context, &at->id, kvl_container_info_of(entry->container)->kind,
                            entry->n_bytes);
        }
    }
    (void)pthread_mutex_unlock(&self->lock);
}

static void memory_touch(kvl_tier *tier, const kvl_digest *id)
{
    memory_tier *self = (memory_tier *)tier;
    (void)pthread_mutex_lock(&self->lock);
    kvl_entry *entry = kvl_entry_map_find(&self->map, id);
    if (entry != NULL) use_entry(self, entry_of(entry));
    (void)pthread_mutex_unlock(&self->lock);
}

static void memory_stats(kvl_tier *tier, kvl_tier_stats *stats)
{
    memory_tier *self = (memory_tier *)tier;
    (void)pthread_mutex_lock(&self->lock);
    *stats = self->stats;
    (void)pthread_mutex_unlock(&self->lock);
}

static void memory_destroy(kvl_tier *tier)
{
    memory_tier *self = (memory_tier *)tier;
    end_entries(self->probation.oldest);
    end_entries(self->protected.oldest);
    kvl_entry_map_deinit(&self->map);
    (void)pthread_mutex_destroy(&self->lock);
    kvl_free(self);
}

static kvl_status create_tier(uint64_t bytes_max, bool keeps_held, kvl_tier **tier,
                              kvl_error *error)
{
    static const kvl_tier_ops ops = {
        .name = "memory",
        .put = memory_put,
        .get = memory_get,
        .has = memory_has,
        .remove = memory_remove,
        .list = memory_list,
        .touch = memory_touch,
        .stats = memory_stats,
        .destroy = memory_destroy,
    };
    *tier = NULL;
    if (bytes_max == 0) {
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "memory: bytes_max is 0, but a store needs a cap; give it one");
    }
    memory_tier *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "memory: no memory for the tier");
    made->tier.ops = &ops;
    made->stats.bytes_max = bytes_max;
    made->keeps_held = keeps_held;
    const kvl_status status = kvl_entry_map_init(&made->map, error);
    if (status != KVL_OK) {
        kvl_free(made);
        return status;
    }
    (void)pthread_mutex_init(&made->lock, NULL);
    *tier = &made->tier;
    return KVL_OK;
}

kvl_status kvl_memory_tier_create(uint64_t bytes_max, kvl_tier **tier, kvl_error *error)
{
    return create_tier(bytes_max, false, tier, error);
}

kvl_status kvl_memory_tier_create_holding(uint64_t bytes_max, kvl_tier **tier, kvl_error *error)
{
    return create_tier(bytes_max, true, tier, error);
}
