/* lmdb_env.c: everything that must hold before LMDB may touch a file, and the sizes of its map.
 *
 * Copy-on-write pages and a meta page that is written last make LMDB safe against a killed process;
 * what it does not survive is another opener in the same process, a remote file system, or pages
 * that something else has changed. Each is excluded here. */
#include "store/lmdb_env.h"

#include "store/lmdb_check.h"

#include "base/file.h"
#include "base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { TABLES_MAX = 4, READERS_MAX = 512, FILE_MODE = 0600 };

static const uint64_t MIB = (uint64_t)1 << 20;
static const uint64_t SLACK_BYTES = (uint64_t)16 << 20;
static const uint64_t STORE_BYTES_MAX = (uint64_t)1 << 44;

const char *kvl_lmdb_remote_filesystem(uint64_t type)
{
    /* linux/magic.h has most of them; the numbers are part of the kernel's interface. */
    static const struct {
        uint32_t type;
        const char *name;
    } remote[] = {
        {0x6969, "NFS"},       {0x517b, "SMB"},        {0xfe534d42, "SMB2"}, {0xff534d42, "CIFS"},
        {0x5346414f, "AFS"},   {0x73757245, "Coda"},   {0x00c36400, "Ceph"}, {0x01021997, "9P"},
        {0x564c, "NCP"},       {0x0bd00bd0, "Lustre"}, {0x47504653, "GPFS"}, {0x01161970, "GFS2"},
        {0x7461636f, "OCFS2"}, {0x19830326, "BeeGFS"}, {0x6b414653, "kAFS"},
    };
    for (size_t i = 0; i < sizeof remote / sizeof *remote; i++) {
        if ((uint32_t)type == remote[i].type) return remote[i].name;
    }
    return NULL;
}

kvl_status kvl_lmdb_fail(kvl_error *error, int code, const char *what)
{
    switch (code) {
    case ENOMEM: return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "lmdb: %s: no memory", what);
    case MDB_READERS_FULL:
        return KVL_FAIL(error, KVL_ERR_BUSY, "lmdb: %s: %d readers at once, no more are allowed",
                        what, READERS_MAX);
    case MDB_NOTFOUND: return KVL_FAIL(error, KVL_ERR_NOT_FOUND, "lmdb: %s: it is not there", what);
    case MDB_CORRUPTED:
    case MDB_PAGE_NOTFOUND:
    case MDB_INVALID:
    case MDB_BAD_TXN:
        return KVL_FAIL(error, KVL_ERR_CORRUPT, "lmdb: %s: %s", what, mdb_strerror(code));
    case ENOSPC:
    case EIO: /* LMDB's answer to a write that came out short, which is a full disk as a rule */
    case EDQUOT:
    case EFBIG:
        return KVL_FAIL(error, KVL_ERR_IO,
                        "lmdb: %s: %s; is the disk full? free space or lower the cap of the store",
                        what, mdb_strerror(code));
    case MDB_MAP_FULL:
        return KVL_FAIL(
            error, KVL_ERR_IO,
            "lmdb: %s: the map is full though everything old was evicted; raise the cap", what);
    case MDB_PANIC:
        return KVL_FAIL(error, KVL_ERR_IO,
                        "lmdb: %s: an earlier write failed half way; restart this process", what);
    default: return KVL_FAIL(error, KVL_ERR_IO, "lmdb: %s: %s", what, mdb_strerror(code));
    }
}

static kvl_status join(const char *directory, const char *name, char *path, kvl_error *error)
{
    const int length = snprintf(path, PATH_MAX, "%s/%s", directory, name);
    if (length < 0 || length >= PATH_MAX)
        return KVL_FAIL(error, KVL_ERR_INVALID, "lmdb: the path %.64s... is too long", directory);
    return KVL_OK;
}

static kvl_status check_options(const kvl_lmdb_tier_options *options, kvl_error *error)
{
    if (options->path == NULL || options->path[0] == '\0')
        return KVL_FAIL(error, KVL_ERR_INVALID, "lmdb: the path is empty; name a directory");
    if (options->bytes_max == 0 || options->bytes_max > STORE_BYTES_MAX) {
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "lmdb: bytes_max is %llu, must be 1 .. %llu: no store without a cap",
                        (unsigned long long)options->bytes_max,
                        (unsigned long long)STORE_BYTES_MAX);
    }
    return KVL_OK;
}

static kvl_status open_directory(const char *path, kvl_error *error)
{
    KVL_TRY(kvl_directory_make(path, error));
    struct statfs about;
    if (statfs(path, &about) != 0)
        return KVL_FAIL(error, KVL_ERR_IO, "lmdb: cannot examine %s: %s", path, strerror(errno));
    const char *remote = kvl_lmdb_remote_filesystem((uint64_t)about.f_type);
    if (remote != NULL) {
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                        "lmdb: %s is on %s; choose a directory on a local disk", path, remote);
    }
    return KVL_OK;
}

/* The tier keeps an index of the database in memory, so nobody else may write; and LMDB must not be
 * opened twice in one process, which a lock of the open file notices too. The kernel drops the lock
 * with the process, however it ends. */
static kvl_status lock_directory(const char *path, int *fd, kvl_error *error)
{
    char name[PATH_MAX];
    KVL_TRY(join(path, "kvloom.lock", name, error));
    *fd = open(name, O_RDWR | O_CREAT | O_CLOEXEC, FILE_MODE);
    if (*fd < 0)
        return KVL_FAIL(error, KVL_ERR_IO, "lmdb: cannot open %s: %s", name, strerror(errno));
    if (flock(*fd, LOCK_EX | LOCK_NB) == 0) return KVL_OK;
    const int reason = errno;
    (void)close(*fd);
    *fd = -1;
    if (reason == EWOULDBLOCK) {
        return KVL_FAIL(error, KVL_ERR_BUSY,
                        "lmdb: %s is open already; give each host a directory of its own", path);
    }
    return KVL_FAIL(error, KVL_ERR_IO, "lmdb: cannot lock %s: %s", name, strerror(reason));
}

kvl_status kvl_lmdb_quarantine(const char *path, const char *reason, kvl_error *error)
{
    char from[PATH_MAX];
    char to[PATH_MAX];
    KVL_TRY(join(path, "data.mdb", from, error));
    KVL_TRY(join(path, "data.mdb.damaged", to, error));
    if (rename(from, to) != 0)
        return KVL_FAIL(error, KVL_ERR_IO, "lmdb: cannot rename %s: %s", from, strerror(errno));
    kvl_log(KVL_LOG_WARN, "store_quarantined", "tier=lmdb kept_as=data.mdb.damaged reason=\"%s\"",
            reason);
    return KVL_OK;
}

/* Checks the file while nobody has it open. */
static kvl_status check_file(const char *path, bool *was_damaged, uint64_t *file_bytes,
                             kvl_error *error)
{
    char name[PATH_MAX];
    KVL_TRY(join(path, "data.mdb", name, error));
    kvl_file_map map = {0};
    *file_bytes = 0;
    kvl_status status = kvl_file_map_open(name, &map, error);
    if (status == KVL_ERR_NOT_FOUND) return KVL_OK;
    if (status != KVL_OK) return status;
    kvl_error reason = {.text = ""};
    if (map.n_bytes > 0) status = kvl_lmdb_check(map.bytes, map.n_bytes, &reason);
    *file_bytes = map.n_bytes;
    kvl_file_map_close(&map);
    if (status == KVL_ERR_CORRUPT) {
        *was_damaged = true;
        *file_bytes = 0;
        return kvl_lmdb_quarantine(path, reason.text, error);
    }
    if (status != KVL_OK) return KVL_FAIL(error, status, "lmdb: %s: %s", path, reason.text);
    return KVL_OK;
}

static uint64_t round_up(uint64_t value, uint64_t multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

/* A quarter above the cap: values need runs of pages, and freed runs seldom fit the next value
 * exactly; besides, pages that a transaction frees can be used only by the one after the next. */
static void size_map(kvl_lmdb_env *env, uint64_t bytes_max, uint64_t file_bytes)
{
    env->map_bytes_max = round_up(bytes_max + bytes_max / 4, MIB) + SLACK_BYTES;
    env->map_bytes = round_up(file_bytes, MIB) + SLACK_BYTES;
    if (env->map_bytes > env->map_bytes_max) env->map_bytes = env->map_bytes_max;
    /* The cap may have been lowered since; what is there must still be mapped. */
    if (env->map_bytes < file_bytes + MIB) env->map_bytes = round_up(file_bytes, MIB) + MIB;
}

static bool set_map(kvl_lmdb_env *env, uint64_t n_bytes)
{
    if (mdb_env_set_mapsize(env->env, n_bytes) != 0) return false;
    env->map_bytes = n_bytes;
    return true;
}

bool kvl_lmdb_env_grow(kvl_lmdb_env *env)
{
    if (env->map_bytes >= env->map_bytes_max) return false;
    const uint64_t wanted = env->map_bytes * 2;
    return set_map(env, wanted < env->map_bytes_max ? wanted : env->map_bytes_max);
}

bool kvl_lmdb_env_grow_for_delete(kvl_lmdb_env *env)
{
    const uint64_t limit = env->map_bytes_max + SLACK_BYTES;
    return env->map_bytes < limit && set_map(env, env->map_bytes + MIB);
}

static int open_environment(const kvl_lmdb_tier_options *options, kvl_lmdb_env *env)
{
    int n_dead = 0;
    int code = mdb_env_create(&env->env);
    if (code == 0) code = mdb_env_set_maxdbs(env->env, TABLES_MAX);
    if (code == 0) code = mdb_env_set_maxreaders(env->env, READERS_MAX);
    if (code == 0) code = mdb_env_set_mapsize(env->env, env->map_bytes);
    if (code == 0) {
        /* A transaction belongs to one call here and not to its thread. */
        const unsigned flags = MDB_NOTLS | (options->durable ? 0u : MDB_NOSYNC);
        code = mdb_env_open(env->env, options->path, flags, FILE_MODE);
    }
    if (code == 0) code = mdb_reader_check(env->env, &n_dead);
    if (code == 0 && n_dead > 0)
        kvl_log(KVL_LOG_INFO, "store_readers_cleared", "tier=lmdb n=%d", n_dead);
    return code;
}

static int open_tables(MDB_txn *txn, unsigned flags, kvl_lmdb_env *env)
{
    int code = mdb_dbi_open(txn, "container", flags, &env->containers);
    if (code == 0) code = mdb_dbi_open(txn, "use", flags, &env->uses);
    if (code == 0) code = mdb_dbi_open(txn, "about", flags, &env->about);
    return code;
}

static MDB_val text_key(const char *text)
{
    return (MDB_val){strlen(text), (void *)(uintptr_t)text};
}

static int put_bytes(MDB_txn *txn, MDB_dbi table, const char *name, const void *bytes, size_t n)
{
    MDB_val key = text_key(name);
    MDB_val old;
    if (mdb_get(txn, table, &key, &old) == 0 && old.mv_size == n &&
        memcmp(old.mv_data, bytes, n) == 0)
        return 0;
    MDB_val value = {n, (void *)(uintptr_t)bytes};
    return mdb_put(txn, table, &key, &value, 0);
}

/* Writes only what differs: opening a database again changes nothing in it. */
static kvl_status write_about(const kvl_lmdb_tier_options *options, MDB_txn *txn, kvl_lmdb_env *env,
                              kvl_error *error)
{
    const uint32_t format = KVL_LMDB_FORMAT;
    int code = put_bytes(txn, env->about, "format", &format, sizeof format);
    if (code == 0) {
        code = put_bytes(txn, env->about, "fingerprint", options->fingerprint.bytes,
                         sizeof options->fingerprint.bytes);
    }
    return code == 0 ? KVL_OK : kvl_lmdb_fail(error, code, "write the format");
}

static kvl_status check_format(MDB_txn *txn, const kvl_lmdb_env *env, kvl_error *error)
{
    MDB_val key = text_key("format");
    MDB_val value;
    uint32_t format = 0;
    const int code = mdb_get(txn, env->about, &key, &value);
    if (code == 0 && value.mv_size == sizeof format) memcpy(&format, value.mv_data, sizeof format);
    if (code != 0 || format == 0) {
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "lmdb: the database says no format; it is not one of KVLoom's");
    }
    if (format != KVL_LMDB_FORMAT) {
        return KVL_FAIL(error, KVL_ERR_FOREIGN,
                        "lmdb: the database has format %u, this build reads %u; remove it or use "
                        "the build that made it",
                        format, KVL_LMDB_FORMAT);
    }
    return KVL_OK;
}

/* Opens the tables of our database, or makes them in one that is empty. */
static kvl_status prepare_tables(const kvl_lmdb_tier_options *options, MDB_txn *txn,
                                 kvl_lmdb_env *env, kvl_error *error)
{
    MDB_dbi main_table;
    MDB_stat about;
    int code = mdb_dbi_open(txn, NULL, 0, &main_table);
    if (code == 0) code = mdb_stat(txn, main_table, &about);
    if (code != 0) return kvl_lmdb_fail(error, code, "read the list of tables");
    const bool is_new = about.ms_entries == 0;
    code = open_tables(txn, is_new ? MDB_CREATE : 0, env);
    if (code == MDB_NOTFOUND || code == MDB_INCOMPATIBLE) {
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "lmdb: %s has the database of another program; choose another directory",
                        options->path);
    }
    if (code != 0) return kvl_lmdb_fail(error, code, "open the tables");
    if (!is_new) KVL_TRY(check_format(txn, env, error));
    return write_about(options, txn, env, error);
}

static kvl_status open_database(const kvl_lmdb_tier_options *options, kvl_lmdb_env *env,
                                kvl_error *error)
{
    int code = open_environment(options, env);
    if (code != 0) return kvl_lmdb_fail(error, code, "open the database");
    MDB_txn *txn = NULL;
    code = mdb_txn_begin(env->env, NULL, 0, &txn);
    if (code != 0) return kvl_lmdb_fail(error, code, "begin to write");
    const kvl_status status = prepare_tables(options, txn, env, error);
    if (status != KVL_OK) {
        mdb_txn_abort(txn);
        return status;
    }
    code = mdb_txn_commit(txn);
    return code == 0 ? KVL_OK : kvl_lmdb_fail(error, code, "write the format");
}

kvl_status kvl_lmdb_env_open(const kvl_lmdb_tier_options *options, kvl_lmdb_env *env,
                             bool *was_damaged, kvl_error *error)
{
    *env = (kvl_lmdb_env){.lock_fd = -1};
    uint64_t file_bytes = 0;
    KVL_TRY(check_options(options, error));
    KVL_TRY(open_directory(options->path, error));
    KVL_TRY(lock_directory(options->path, &env->lock_fd, error));
    kvl_status status = check_file(options->path, was_damaged, &file_bytes, error);
    if (status == KVL_OK) {
        size_map(env, options->bytes_max, file_bytes);
        status = open_database(options, env, error);
    }
    if (status != KVL_OK) kvl_lmdb_env_close(env);
    return status;
}

void kvl_lmdb_env_close(kvl_lmdb_env *env)
{
    if (env->env != NULL) mdb_env_close(env->env);
    if (env->lock_fd >= 0) (void)close(env->lock_fd);
    *env = (kvl_lmdb_env){.lock_fd = -1};
}
