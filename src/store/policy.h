/* store/policy.h: which container of a full memory goes first.
 *
 * A policy orders entries and owns none of them; the memory tier and the replay of traces use the
 * same code, so that what a replay measures is what a tier does.
 *
 *   LRU       the one used longest ago goes first.
 *   SLRU      segmented LRU (Karedla, Love and Wherry, 1994): an entry comes in on probation and is
 *             protected from its first use on, in four fifths of the room at most; probation goes
 *             first. A scan of many entries that nobody asks for again pushes out no other.
 *   S3-FIFO   Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm
 *             1: a small queue of a tenth of the room, a main one, and a list of ids that left the
 *             small one of late, which come into the main one when they are seen again. A use only
 *             counts (up to 3); order changes when room is made.
 * Threads  One at a time: the tier that owns it has a lock. */
#ifndef KVL_STORE_POLICY_H
#define KVL_STORE_POLICY_H

#include "store/entry_map.h"
#include "store/store.h"

/* Ids that S3-FIFO remembers at most; 1.5 MiB, and only where it is the policy. */
#define KVL_GHOSTS_MAX 16384u

/* First member of a tier's own entry. */
typedef struct kvl_policy_entry {
    kvl_entry entry; /* first: maps and lists know entries only */
    uint64_t n_bytes;
    uint8_t queue;  /* index into kvl_policy.queues */
    uint8_t n_uses; /* S3-FIFO: since it came into its queue, up to 3 */
} kvl_policy_entry;

typedef struct kvl_ghost {
    kvl_entry entry; /* first */
    uint64_t n_bytes;
} kvl_ghost;

typedef struct kvl_policy {
    kvl_policy_kind kind;
    uint64_t bytes_max;
    kvl_entry_list queues[2]; /* LRU: the first; SLRU: probation, protected; S3-FIFO: small, main */
    uint64_t bytes[2];
    size_t n_entries;
    /* S3-FIFO alone */
    kvl_ghost *ghosts; /* [KVL_GHOSTS_MAX] */
    kvl_entry_map ghost_map;
    kvl_entry_list ghost_queue, ghost_spare;
    uint64_t ghost_bytes;
} kvl_policy;

/* Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_policy_init(kvl_policy *policy, kvl_policy_kind kind,
                                        uint64_t bytes_max, kvl_error *error);
/* The entries stay with the caller. A zeroed policy does nothing. */
void kvl_policy_deinit(kvl_policy *policy);

/* A new entry; its id and n_bytes are set. */
void kvl_policy_add(kvl_policy *policy, kvl_policy_entry *entry);
/* One that is there has been asked for. */
void kvl_policy_use(kvl_policy *policy, kvl_policy_entry *entry);
/* One that is there leaves for another reason than want of room. */
void kvl_policy_remove(kvl_policy *policy, kvl_policy_entry *entry);
/* Takes out the one that goes first among those that may; NULL where none may. `may_go` NULL: all
 * may. */
kvl_policy_entry *kvl_policy_evict(kvl_policy *policy,
                                   bool (*may_go)(const kvl_policy_entry *entry));

#endif /* KVL_STORE_POLICY_H */
