/* store/store.h: tiers that keep containers by id, and the stack that a host uses.
 *
 * A tier is a table of operations over bytes; it knows nothing of tensors. Containers are
 * immutable: putting an id that is there already is no error and changes nothing.
 * Caveats of the LMDB tier (see also lmdb.h): one process opens a database once; never across a
 * fork; never on a remote file system; a reader that stays open keeps old pages alive, so views are
 * short; the map grows by the tier, not by LMDB; a dead reader's slot is cleared at open.
 * Threads  Every operation of every tier may be called from any thread. */
#ifndef KVL_STORE_STORE_H
#define KVL_STORE_STORE_H

#include "segment/container.h"

typedef struct kvl_tier kvl_tier;

typedef struct kvl_tier_stats {
    uint64_t n_containers, bytes, bytes_max;
    uint64_t hits, misses, evictions, damaged, foreign;
} kvl_tier_stats;

typedef struct kvl_tier_ops {
    const char *name; /* "memory", "lmdb" */
    /* Keeps a sealed container; durable tiers return after the commit. May block on the disk.
     * The tier shares the container or copies it; the caller keeps its reference. On error the tier
     * holds what it held before, less what was evicted to make room.
     * Errors   KVL_ERR_TOO_LARGE (alone above the cap), KVL_ERR_IO, KVL_ERR_NO_MEMORY,
     *          KVL_ERR_INVALID (not sealed), KVL_ERR_FOREIGN (of another model; counted) */
    kvl_status (*put)(kvl_tier *tier, kvl_container *container, kvl_error *error);
    /* Gives a reference. The id inside is compared; blocks are checked by whoever reads them, or
     * here where `check_blocks`.
     * Errors   KVL_ERR_NOT_FOUND, KVL_ERR_DAMAGED (it was removed), KVL_ERR_FOREIGN: all are misses
     *          and counted; KVL_ERR_NO_MEMORY, KVL_ERR_BUSY (too many readers), KVL_ERR_IO */
    kvl_status (*get)(kvl_tier *tier, const kvl_digest *id, bool check_blocks,
                      kvl_container **container, kvl_error *error);
    bool (*has)(kvl_tier *tier, const kvl_digest *id);
    /* Errors   KVL_ERR_NOT_FOUND */
    kvl_status (*remove)(kvl_tier *tier, const kvl_digest *id, kvl_error *error);
    /* Calls visit for every container's id, kind and bytes; stops when it returns false. The
     * visitor must not call the tier. */
    void (*list)(kvl_tier *tier,
                 bool (*visit)(void *context, const kvl_digest *id, kvl_container_kind kind,
                               uint64_t n_bytes),
                 void *context);
    /* Counts as a use of a container that another tier has just given; no miss where it is not
     * there. May be NULL. Never blocks on the disk. */
    void (*touch)(kvl_tier *tier, const kvl_digest *id);
    void (*stats)(kvl_tier *tier, kvl_tier_stats *stats);
    void (*destroy)(kvl_tier *tier);
} kvl_tier_ops;

struct kvl_tier {
    const kvl_tier_ops *ops;
};

/* Which container of a full memory goes first: store/policy.h says how each chooses. */
typedef enum kvl_policy_kind {
    KVL_POLICY_SLRU, /* segmented LRU */
    KVL_POLICY_LRU,
    KVL_POLICY_S3FIFO,
} kvl_policy_kind;
#define KVL_POLICIES 3u
/* "slru", "lru", "s3fifo"; static text. */
const char *kvl_policy_name(kvl_policy_kind kind);
bool kvl_policy_from_name(const char *name, kvl_policy_kind *kind); /* false: none is named so */

typedef struct kvl_memory_tier_options {
    uint64_t bytes_max;     /* > 0: no store without a cap */
    kvl_policy_kind policy; /* zero: segmented LRU */
    /* Nothing is evicted that somebody else holds: for a tier whose containers are lent to other
     * processes, so that what they hold stays within the cap. put answers KVL_ERR_BUSY where all
     * the rest does not make room. Otherwise a container that others still hold is evicted from
     * the tier, and its memory lives on with them. */
    bool keeps_held;
} kvl_memory_tier_options;

/* Keeps references, evicts above bytes_max.
 * Errors   KVL_ERR_INVALID, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_memory_tier_create_with(const kvl_memory_tier_options *options,
                                                    kvl_tier **tier, kvl_error *error);
/* The same by segmented LRU, without holding. */
KVL_MUST_USE kvl_status kvl_memory_tier_create(uint64_t bytes_max, kvl_tier **tier,
                                               kvl_error *error);

typedef struct kvl_lmdb_tier_options {
    const char *path;       /* directory, made where missing */
    uint64_t bytes_max;     /* > 0; the oldest used go first above 95 % of it, down to 90 % */
    kvl_digest fingerprint; /* containers of another model are refused and counted */
    bool durable;           /* sync at each commit; otherwise the system decides when */
    /* [32], copied; containers are sealed under a key that follows from it (store/lmdb_seal.h), and
     * what is not sealed under it is a miss, counted as foreign. Who deletes the key has deleted
     * the data. NULL: as they are. */
    const uint8_t *seal_key;
} kvl_lmdb_tier_options;

/* A database whose pages are damaged is renamed to data.mdb.damaged, logged, counted once in
 * stats.damaged, and replaced by an empty one: it is a cache, and nothing in it is wrong KV, only
 * missing KV. It is never opened: LMDB trusts its pages.
 * Errors   KVL_ERR_INVALID (options, or the database of another program), KVL_ERR_UNSUPPORTED (a
 *          file system of another machine), KVL_ERR_BUSY (open already, here or in another
 *          process), KVL_ERR_FOREIGN (format version: text names both), KVL_ERR_IO,
 *          KVL_ERR_CORRUPT (damaged and cannot be put aside), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_lmdb_tier_create(const kvl_lmdb_tier_options *options, kvl_tier **tier,
                                             kvl_error *error);

/* Looks at a database without opening it, and changes nothing; *n_bytes is its size. For tools.
 * Errors   KVL_ERR_NOT_FOUND (none is there), KVL_ERR_UNSUPPORTED (a file system of another
 *          machine), KVL_ERR_BUSY (somebody has it open, so it cannot be looked at),
 *          KVL_ERR_CORRUPT, KVL_ERR_FOREIGN (another version of LMDB's format), KVL_ERR_IO,
 *          KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_lmdb_tier_check(const char *path, uint64_t *n_bytes, kvl_error *error);
/* "LMDB 0.9.24: (July 24, 2019)"; static text. */
const char *kvl_lmdb_version(void);

/* Tiers from fast to slow as one: get asks in order and puts what a slower tier had into the faster
 * ones; put goes to all. The slowest decides what a put answers; where it fails for want of
 * memory or disk, the faster ones keep the container nevertheless. stats: sizes and evictions of
 * the slowest, hits and misses of the stack, the rest summed. Takes the tiers: they end with it.
 * tiers    [n_tiers], 1 .. 8
 * Errors   KVL_ERR_INVALID, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_stack_tier_create(kvl_tier *const *tiers, size_t n_tiers,
                                              kvl_tier **tier, kvl_error *error);

#endif /* KVL_STORE_STORE_H */
