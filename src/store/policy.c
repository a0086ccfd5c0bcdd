/* store/policy.c: three orders of eviction over the same two queues. */
#include "store/policy.h"

#include "base/alloc.h"

#include <string.h>

enum { YOUNG = 0, OLD = 1, USES_MAX = 3, USES_TO_STAY = 2 };

static kvl_policy_entry *entry_of(kvl_entry *entry)
{
    return (kvl_policy_entry *)entry;
}

static void append(kvl_policy *p, kvl_policy_entry *e, uint8_t queue)
{
    e->queue = queue;
    p->bytes[queue] += e->n_bytes;
    kvl_entry_list_append(&p->queues[queue], &e->entry);
}

static void take_out(kvl_policy *p, kvl_policy_entry *e)
{
    p->bytes[e->queue] -= e->n_bytes;
    kvl_entry_list_remove(&p->queues[e->queue], &e->entry);
}

static void move_to(kvl_policy *p, kvl_policy_entry *e, uint8_t queue)
{
    take_out(p, e);
    append(p, e, queue);
}

/* ---- ids that have left ---- */

static kvl_status init_ghosts(kvl_policy *p, kvl_error *error)
{
    KVL_TRY(kvl_entry_map_init(&p->ghost_map, error));
    p->ghosts = kvl_alloc_zero(KVL_GHOSTS_MAX, sizeof *p->ghosts);
    if (p->ghosts == NULL) {
        kvl_entry_map_deinit(&p->ghost_map);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a policy");
    }
    for (size_t i = 0; i < KVL_GHOSTS_MAX; i++)
        kvl_entry_list_append(&p->ghost_spare, &p->ghosts[i].entry);
    return KVL_OK;
}

static void forget_ghost(kvl_policy *p, kvl_entry *ghost)
{
    kvl_entry_map_remove(&p->ghost_map, ghost);
    kvl_entry_list_remove(&p->ghost_queue, ghost);
    kvl_entry_list_append(&p->ghost_spare, ghost);
    p->ghost_bytes -= ((kvl_ghost *)ghost)->n_bytes;
}

/* As many bytes of ids as the main queue may hold of entries. */
static void remember(kvl_policy *p, const kvl_policy_entry *e)
{
    const uint64_t bytes_max = p->bytes_max - p->bytes_max / 10;
    if (e->n_bytes > bytes_max) return;
    while (p->ghost_queue.oldest != NULL &&
           (p->ghost_spare.oldest == NULL || p->ghost_bytes > bytes_max - e->n_bytes)) {
        forget_ghost(p, p->ghost_queue.oldest);
    }
    kvl_ghost *ghost = (kvl_ghost *)p->ghost_spare.oldest;
    kvl_entry_list_remove(&p->ghost_spare, &ghost->entry);
    ghost->entry.id = e->entry.id;
    ghost->n_bytes = e->n_bytes;
    p->ghost_bytes += e->n_bytes;
    kvl_entry_map_add(&p->ghost_map, &ghost->entry);
    kvl_entry_list_append(&p->ghost_queue, &ghost->entry);
}

/* ---- coming and being used ---- */

kvl_status kvl_policy_init(kvl_policy *policy, kvl_policy_kind kind, uint64_t bytes_max,
                           kvl_error *error)
{
    *policy = (kvl_policy){.kind = kind, .bytes_max = bytes_max};
    return kind == KVL_POLICY_S3FIFO ? init_ghosts(policy, error) : KVL_OK;
}

void kvl_policy_deinit(kvl_policy *policy)
{
    kvl_entry_map_deinit(&policy->ghost_map);
    kvl_free(policy->ghosts);
    *policy = (kvl_policy){.kind = policy->kind};
}

void kvl_policy_add(kvl_policy *policy, kvl_policy_entry *entry)
{
    uint8_t queue = YOUNG;
    if (policy->kind == KVL_POLICY_S3FIFO) {
        kvl_entry *ghost = kvl_entry_map_find(&policy->ghost_map, &entry->entry.id);
        if (ghost != NULL) {
            forget_ghost(policy, ghost);
            queue = OLD;
        }
    }
    entry->n_uses = 0;
    append(policy, entry, queue);
    policy->n_entries++;
}

/* The oldest used of the protected goes back on probation where they are too many. */
static void protect(kvl_policy *p, kvl_policy_entry *entry)
{
    move_to(p, entry, OLD);
    const uint64_t protected_max = p->bytes_max / 5 * 4;
    while (p->bytes[OLD] > protected_max) move_to(p, entry_of(p->queues[OLD].oldest), YOUNG);
}

void kvl_policy_use(kvl_policy *policy, kvl_policy_entry *entry)
{
    switch (policy->kind) {
    case KVL_POLICY_LRU: move_to(policy, entry, YOUNG); return;
    case KVL_POLICY_S3FIFO:
        if (entry->n_uses < USES_MAX) entry->n_uses++;
        return;
    case KVL_POLICY_SLRU: break;
    }
    protect(policy, entry);
}

void kvl_policy_remove(kvl_policy *policy, kvl_policy_entry *entry)
{
    take_out(policy, entry);
    policy->n_entries--;
}

/* ---- going ---- */

typedef bool may_go_function(const kvl_policy_entry *entry);

static kvl_policy_entry *find_first(const kvl_policy *p, may_go_function *may_go)
{
    for (int queue = YOUNG; queue <= OLD; queue++) {
        for (kvl_entry *at = p->queues[queue].oldest; at != NULL; at = at->newer) {
            if (may_go == NULL || may_go(entry_of(at))) return entry_of(at);
        }
    }
    return NULL;
}

/* One step of algorithm 1; NULL: the oldest was given another chance. What others hold gets one for
 * nothing. */
static kvl_policy_entry *step(kvl_policy *p, may_go_function *may_go)
{
    const bool is_small = p->queues[OLD].oldest == NULL ||
                          (p->queues[YOUNG].oldest != NULL && p->bytes[YOUNG] >= p->bytes_max / 10);
    kvl_policy_entry *e = entry_of(p->queues[is_small ? YOUNG : OLD].oldest);
    if (is_small && e->n_uses >= USES_TO_STAY) {
        move_to(p, e, OLD);
        e->n_uses = 0;
    } else if (!is_small && e->n_uses > 0) {
        move_to(p, e, OLD);
        e->n_uses--;
    } else if (may_go != NULL && !may_go(e)) {
        move_to(p, e, e->queue);
    } else {
        if (is_small) remember(p, e);
        return e;
    }
    return NULL;
}

/* Each entry has at most USES_MAX chances, and one more in the main queue; where all that could be
 * reached is held, the order does not matter any more. */
static kvl_policy_entry *find_s3fifo(kvl_policy *p, may_go_function *may_go)
{
    for (size_t i = 0; i < (USES_MAX + 2) * p->n_entries; i++) {
        kvl_policy_entry *e = step(p, may_go);
        if (e != NULL) return e;
    }
    return find_first(p, may_go);
}

kvl_policy_entry *kvl_policy_evict(kvl_policy *policy,
                                   bool (*may_go)(const kvl_policy_entry *entry))
{
    kvl_policy_entry *e = policy->kind == KVL_POLICY_S3FIFO ? find_s3fifo(policy, may_go)
                                                            : find_first(policy, may_go);
    if (e != NULL) kvl_policy_remove(policy, e);
    return e;
}

/* ---- names ---- */

static const char *const names[KVL_POLICIES] = {
    [KVL_POLICY_SLRU] = "slru", [KVL_POLICY_LRU] = "lru", [KVL_POLICY_S3FIFO] = "s3fifo"};

const char *kvl_policy_name(kvl_policy_kind kind)
{
    return names[kind];
}

bool kvl_policy_from_name(const char *name, kvl_policy_kind *kind)
{
    for (size_t i = 0; i < KVL_POLICIES; i++) {
        if (strcmp(names[i], name) != 0) continue;
        *kind = (kvl_policy_kind)i;
        return true;
    }
    return false;
}
