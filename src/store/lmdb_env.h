/* store/lmdb_env.h: one LMDB environment, opened only where it is safe to.
 *
 * Tables   "container"  id -> the bytes of the container
 *          "use"        id -> kvl_lmdb_use
 *          "about"      "format" -> u32, "fingerprint" -> of the model that opened it last
 * Threads  Opening and closing: one. LMDB's rules for the rest. */
#ifndef KVL_STORE_LMDB_ENV_H
#define KVL_STORE_LMDB_ENV_H

#include "store/store.h"

#include <lmdb.h>

#define KVL_LMDB_FORMAT 1u

/* Of each container, in the same transaction as the container itself. */
typedef struct kvl_lmdb_use {
    uint64_t last_use; /* a counter; higher is later */
    uint64_t n_bytes;
    uint32_t kind;
    uint32_t zero;
} kvl_lmdb_use;

typedef struct kvl_lmdb_env {
    MDB_env *env;
    MDB_dbi containers, uses, about;
    int lock_fd; /* holds other processes off */
    uint64_t map_bytes, map_bytes_max;
} kvl_lmdb_env;

/* Makes the directory where it is missing, refuses remote file systems, locks, checks every page of
 * an existing database, opens it and compares its format. A damaged database is renamed to
 * data.mdb.damaged (in place of an earlier one) and an empty one is made; *was_damaged says so.
 * Owns     *env: ended with kvl_lmdb_env_close
 * Errors   KVL_ERR_INVALID (options, or the database of another program), KVL_ERR_BUSY (open
 *          elsewhere), KVL_ERR_UNSUPPORTED (remote file system), KVL_ERR_FOREIGN (format),
 *          KVL_ERR_IO, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_lmdb_env_open(const kvl_lmdb_tier_options *options, kvl_lmdb_env *env,
                                          bool *was_damaged, kvl_error *error);
void kvl_lmdb_env_close(kvl_lmdb_env *env);

/* Renames data.mdb aside. The environment must be closed.
 * Errors   KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_lmdb_quarantine(const char *path, const char *reason, kvl_error *error);

/* Makes the map twice as large, at most map_bytes_max. No transaction may be open. False where it
 * cannot grow. */
bool kvl_lmdb_env_grow(kvl_lmdb_env *env);
/* A little more than map_bytes_max, so that records can be deleted from a full map. */
bool kvl_lmdb_env_grow_for_delete(kvl_lmdb_env *env);

/* What a code of LMDB or of the system means to us: `what` failed. */
KVL_MUST_USE kvl_status kvl_lmdb_fail(kvl_error *error, int code, const char *what);

/* Name of a file system on another machine, NULL for others. `type`: f_type of statfs(2). */
const char *kvl_lmdb_remote_filesystem(uint64_t type);

#endif /* KVL_STORE_LMDB_ENV_H */
