/* stack_tier.c: tiers from fast to slow, used as one. The slowest is the one that counts: it is the
 * largest and, where there is a disk, the one that lasts. The faster ones only save time, so what
 * fails in them is logged and forgiven. */
#include "store/store.h"

#include "base/alloc.h"
#include "base/log.h"

#include <stdatomic.h>
#include <string.h>

enum { TIERS_MAX = 8 };

typedef struct stack_tier {
    kvl_tier tier; /* first: callers know tiers only */
    size_t n_tiers;
    kvl_tier *tiers[TIERS_MAX];
    _Atomic uint64_t hits, misses;
} stack_tier;

static kvl_tier *slowest(const stack_tier *self)
{
    return self->tiers[self->n_tiers - 1];
}

static void put_into_faster(stack_tier *self, size_t n_faster, kvl_container *container)
{
    for (size_t i = 0; i < n_faster; i++) {
        kvl_tier *tier = self->tiers[i];
        kvl_error error = {.text = ""};
        const kvl_status status = tier->ops->put(tier, container, &error);
        /* Too large for a small tier, or no room in one that is in use, is nothing to report every
         * time. */
        if (status != KVL_OK && status != KVL_ERR_TOO_LARGE && status != KVL_ERR_BUSY)
            kvl_log(KVL_LOG_WARN, "tier_put_failed", "tier=%s status=%s reason=\"%s\"",
                    tier->ops->name, kvl_status_name(status), error.text);
    }
}

/* Slower tiers hear of a use too, or what is hot in memory would look cold on disk. */
static void touch_slower(stack_tier *self, size_t first, const kvl_digest *id)
{
    for (size_t i = first; i < self->n_tiers; i++) {
        if (self->tiers[i]->ops->touch != NULL) self->tiers[i]->ops->touch(self->tiers[i], id);
    }
}

/* What a slower tier gave or took may have been removed from all tiers before it was put into the
 * faster ones: then they must not keep it alone. A remove that comes later takes it out of them
 * itself, since it goes from slow to fast. */
static void put_into_faster_of(stack_tier *self, size_t source, kvl_container *container)
{
    const kvl_digest *id = &kvl_container_info_of(container)->id;
    put_into_faster(self, source, container);
    if (self->tiers[source]->ops->has(self->tiers[source], id)) return;
    for (size_t i = source; i-- > 0;) (void)!self->tiers[i]->ops->remove(self->tiers[i], id, NULL);
}

/* The slowest goes first: what it refuses (a container of another model) must not be in the others
 * either. A full disk is no reason not to keep a container in memory. */
static kvl_status stack_put(kvl_tier *tier, kvl_container *container, kvl_error *error)
{
    stack_tier *self = (stack_tier *)tier;
    const kvl_status status = slowest(self)->ops->put(slowest(self), container, error);
    if (status == KVL_OK) put_into_faster_of(self, self->n_tiers - 1, container);
    if (kvl_status_class_of(status) == KVL_CLASS_FATAL)
        put_into_faster(self, self->n_tiers - 1, container);
    return status;
}

static void stack_touch(kvl_tier *tier, const kvl_digest *id)
{
    touch_slower((stack_tier *)tier, 0, id);
}

static kvl_status stack_get(kvl_tier *tier, const kvl_digest *id, bool check_blocks,
                            kvl_container **container, kvl_error *error)
{
    stack_tier *self = (stack_tier *)tier;
    kvl_error worst = {.status = KVL_ERR_NOT_FOUND, .text = "stack: it is not there"};
    *container = NULL;
    for (size_t i = 0; i < self->n_tiers; i++) {
        kvl_error reason = {.text = ""};
        const kvl_status status =
            self->tiers[i]->ops->get(self->tiers[i], id, check_blocks, container, &reason);
        if (status == KVL_OK) {
            if (i > 0) put_into_faster_of(self, i, *container);
            touch_slower(self, i + 1, id);
            atomic_fetch_add(&self->hits, 1);
            return KVL_OK;
        }
        if (status != KVL_ERR_NOT_FOUND) worst = reason;
    }
    atomic_fetch_add(&self->misses, 1);
    if (error != NULL) *error = worst;
    return worst.status;
}

static bool stack_has(kvl_tier *tier, const kvl_digest *id)
{
    stack_tier *self = (stack_tier *)tier;
    for (size_t i = 0; i < self->n_tiers; i++) {
        if (self->tiers[i]->ops->has(self->tiers[i], id)) return true;
    }
    return false;
}

/* From slow to fast: were it the other way round, a get in between would bring it back up. */
static kvl_status stack_remove(kvl_tier *tier, const kvl_digest *id, kvl_error *error)
{
    stack_tier *self = (stack_tier *)tier;
    kvl_status result = KVL_ERR_NOT_FOUND;
    kvl_error reason = {.text = "stack: it is not there"};
    for (size_t i = self->n_tiers; i-- > 0;) {
        kvl_error failure = {.text = ""};
        const kvl_status status = self->tiers[i]->ops->remove(self->tiers[i], id, &failure);
        if (status == KVL_ERR_NOT_FOUND) continue;
        if (status == KVL_OK && result == KVL_ERR_NOT_FOUND) result = KVL_OK;
        if (status != KVL_OK) {
            result = status;
            reason = failure;
        }
    }
    return result == KVL_OK ? KVL_OK : KVL_FAIL(error, result, "%s", reason.text);
}

typedef struct listing {
    stack_tier *self;
    size_t tier_index;
    bool goes_on;
    bool (*visit)(void *context, const kvl_digest *id, kvl_container_kind kind, uint64_t n_bytes);
    void *context;
} listing;

/* What a slower tier has too is told when that one is listed. Asking a slower tier while a faster
 * one is locked is fine: locks are only ever taken downwards. */
static bool visit_once(void *context, const kvl_digest *id, kvl_container_kind kind,
                       uint64_t n_bytes)
{
    listing *all = context;
    for (size_t i = all->tier_index + 1; i < all->self->n_tiers; i++) {
        if (all->self->tiers[i]->ops->has(all->self->tiers[i], id)) return true;
    }
    all->goes_on = all->visit(all->context, id, kind, n_bytes);
    return all->goes_on;
}

static void stack_list(kvl_tier *tier,
                       bool (*visit)(void *context, const kvl_digest *id, kvl_container_kind kind,
                                     uint64_t n_bytes),
                       void *context)
{
    stack_tier *self = (stack_tier *)tier;
    listing all = {self, 0, true, visit, context};
    for (; all.tier_index < self->n_tiers && all.goes_on; all.tier_index++) {
        kvl_tier *listed = self->tiers[all.tier_index];
        listed->ops->list(listed, visit_once, &all);
    }
}

/* Sizes are the slowest tier's; evictions are too, since what faster ones evict is not lost. */
static void stack_stats(kvl_tier *tier, kvl_tier_stats *stats)
{
    stack_tier *self = (stack_tier *)tier;
    slowest(self)->ops->stats(slowest(self), stats);
    for (size_t i = 0; i + 1 < self->n_tiers; i++) {
        kvl_tier_stats faster;
        self->tiers[i]->ops->stats(self->tiers[i], &faster);
        stats->damaged += faster.damaged;
        stats->foreign += faster.foreign;
    }
    stats->hits = atomic_load(&self->hits);
    stats->misses = atomic_load(&self->misses);
}

static void stack_destroy(kvl_tier *tier)
{
    stack_tier *self = (stack_tier *)tier;
    for (size_t i = 0; i < self->n_tiers; i++) self->tiers[i]->ops->destroy(self->tiers[i]);
    kvl_free(self);
}

kvl_status kvl_stack_tier_create(kvl_tier *const *tiers, size_t n_tiers, kvl_tier **tier,
                                 kvl_error *error)
{
    static const kvl_tier_ops ops = {
        .name = "stack",
        .put = stack_put,
        .get = stack_get,
        .has = stack_has,
        .remove = stack_remove,
        .list = stack_list,
        .touch = stack_touch,
        .stats = stack_stats,
        .destroy = stack_destroy,
    };
    *tier = NULL;
    if (n_tiers == 0 || n_tiers > TIERS_MAX) {
        return KVL_FAIL(error, KVL_ERR_INVALID, "stack: %zu tiers, must be 1 .. %d", n_tiers,
                        TIERS_MAX);
    }
    stack_tier *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "stack: no memory for the tier");
    made->tier.ops = &ops;
    made->n_tiers = n_tiers;
    memcpy(made->tiers, tiers, n_tiers * sizeof *tiers);
    *tier = &made->tier;
    return KVL_OK;
}
