/* memory_tier.c: containers in the memory of this process, in the order of a policy
 * (store/policy.h). */
#include "store/store.h"

#include "store/policy.h"

#include "base/alloc.h"

#include <inttypes.h>
#include <pthread.h>

typedef struct memory_entry {
    kvl_policy_entry entry; /* first: maps and policies know entries only */
    kvl_container *container;
} memory_entry;

typedef struct memory_tier {
    kvl_tier tier; /* first: callers know tiers only */
    pthread_mutex_t lock;
    kvl_entry_map map;
    kvl_policy policy;
    bool keeps_held; /* what others hold is not evicted, and so is always counted */
    kvl_tier_stats stats;
} memory_tier;

static memory_entry *entry_of(kvl_entry *entry)
{
    return (memory_entry *)entry;
}

/* Of one that the policy has given out; the caller ends it when the lock is open, for the last
 * reference of a borrowed container calls into whoever lent it. */
static void forget_entry(memory_tier *self, memory_entry *entry)
{
    kvl_entry_map_remove(&self->map, &entry->entry.entry);
    self->stats.n_containers--;
    self->stats.bytes -= entry->entry.n_bytes;
}

static void unlink_entry(memory_tier *self, memory_entry *entry)
{
    kvl_policy_remove(&self->policy, &entry->entry);
    forget_entry(self, entry);
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

/* Nobody else can get hold of a container meanwhile: that takes the lock, or a reference. */
static bool is_ours_alone(const kvl_policy_entry *entry)
{
    const memory_entry *e = (const memory_entry *)entry;
    return kvl_container_n_references(e->container) == 1;
}

/* Makes room for n_bytes more; gives what was evicted as a chain. False where others hold all that
 * is left, and that was not enough. */
static bool evict(memory_tier *self, uint64_t n_bytes, kvl_entry **evicted)
{
    *evicted = NULL;
    while (self->stats.bytes > self->stats.bytes_max - n_bytes) {
        kvl_policy_entry *victim =
            kvl_policy_evict(&self->policy, self->keeps_held ? is_ours_alone : NULL);
        KVL_ASSERT(victim != NULL || self->keeps_held);
        if (victim == NULL) return false;
        forget_entry(self, (memory_entry *)victim);
        self->stats.evictions++;
        victim->entry.newer = *evicted;
        *evicted = &victim->entry;
    }
    return true;
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
    made->entry.entry.id = kvl_container_info_of(container)->id;
    made->entry.n_bytes = n_bytes;
    kvl_entry *ended = NULL;
    memory_entry *unused = made;
    kvl_status status = KVL_OK;
    (void)pthread_mutex_lock(&self->lock);
    if (kvl_entry_map_find(&self->map, &made->entry.entry.id) != NULL) {
        /* There already: nothing changes, not even the order. */
    } else if (!evict(self, n_bytes, &ended)) {
        status = KVL_FAIL(error, KVL_ERR_BUSY,
                          "memory: no room for %zu bytes, all of the %" PRIu64 " here are in use",
                          n_bytes, self->stats.bytes);
    } else {
        kvl_container_share(container);
        made->container = container;
        kvl_entry_map_add(&self->map, &made->entry.entry);
        kvl_policy_add(&self->policy, &made->entry);
        self->stats.n_containers++;
        self->stats.bytes += n_bytes;
        unused = NULL;
    }
    (void)pthread_mutex_unlock(&self->lock);
    end_entries(ended);
    if (unused != NULL) end_entry(unused);
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
        kvl_policy_use(&self->policy, &entry_of(entry)->entry);
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
        kvl_entry *at = self->policy.queues[pass].oldest;
        for (; at != NULL && goes_on; at = at->newer) {
            const memory_entry *entry = entry_of(at);
            goes_on = visit(context, &at->id, kvl_container_info_of(entry->container)->kind,
                            entry->entry.n_bytes);
        }
    }
    (void)pthread_mutex_unlock(&self->lock);
}

static void memory_touch(kvl_tier *tier, const kvl_digest *id)
{
    memory_tier *self = (memory_tier *)tier;
    (void)pthread_mutex_lock(&self->lock);
    kvl_entry *entry = kvl_entry_map_find(&self->map, id);
    if (entry != NULL) kvl_policy_use(&self->policy, &entry_of(entry)->entry);
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
    for (int pass = 0; pass < 2; pass++) end_entries(self->policy.queues[pass].oldest);
    kvl_policy_deinit(&self->policy);
    kvl_entry_map_deinit(&self->map);
    (void)pthread_mutex_destroy(&self->lock);
    kvl_free(self);
}

kvl_status kvl_memory_tier_create_with(const kvl_memory_tier_options *options, kvl_tier **tier,
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
    if (options->bytes_max == 0) {
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "memory: bytes_max is 0, but a store needs a cap; give it one");
    }
    if (options->policy >= KVL_POLICIES)
        return KVL_FAIL(error, KVL_ERR_INVALID, "memory: policy %d is none", (int)options->policy);
    memory_tier *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "memory: no memory for the tier");
    made->tier.ops = &ops;
    made->stats.bytes_max = options->bytes_max;
    made->keeps_held = options->keeps_held;
    kvl_status status = kvl_entry_map_init(&made->map, error);
    if (status == KVL_OK)
        status = kvl_policy_init(&made->policy, options->policy, options->bytes_max, error);
    if (status != KVL_OK) {
        kvl_entry_map_deinit(&made->map);
        kvl_free(made);
        return status;
    }
    (void)pthread_mutex_init(&made->lock, NULL);
    *tier = &made->tier;
    return KVL_OK;
}

kvl_status kvl_memory_tier_create(uint64_t bytes_max, kvl_tier **tier, kvl_error *error)
{
    return kvl_memory_tier_create_with(&(kvl_memory_tier_options){.bytes_max = bytes_max}, tier,
                                       error);
}
