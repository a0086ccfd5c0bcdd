/* lmdb_look.c: a database as a tool sees it, which must not change it. */
#include "store/store.h"

#include "base/file.h"
#include "store/lmdb_check.h"
#include "store/lmdb_env.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/vfs.h>
#include <unistd.h>

static kvl_status check_pages(const char *path, uint64_t *n_bytes, kvl_error *error)
{
    char name[PATH_MAX];
    kvl_file_map map = {.bytes = NULL};
    kvl_error reason = {.text = ""};
    if (snprintf(name, sizeof name, "%s/data.mdb", path) >= (int)sizeof name)
        return KVL_FAIL(error, KVL_ERR_IO, "lmdb: %.200s: the path is too long", path);
    KVL_TRY(kvl_file_map_open(name, &map, error));
    const kvl_status status =
        map.n_bytes == 0 ? KVL_OK : kvl_lmdb_check(map.bytes, map.n_bytes, &reason);
    *n_bytes = map.n_bytes;
    kvl_file_map_close(&map);
    if (status == KVL_OK) return KVL_OK;
    return KVL_FAIL(error, status, "lmdb: %.200s: %s", path, reason.text);
}

/* The lock that a tier holds; -1 with KVL_OK: there is no lock file, so nobody has it open. */
static kvl_status lock(const char *path, int *fd, kvl_error *error)
{
    char name[PATH_MAX];
    if (snprintf(name, sizeof name, "%s/kvloom.lock", path) >= (int)sizeof name)
        return KVL_FAIL(error, KVL_ERR_IO, "lmdb: %.200s: the path is too long", path);
    *fd = open(name, O_RDWR | O_CLOEXEC);
    if (*fd < 0 && errno == ENOENT) return KVL_OK;
    if (*fd < 0)
        return KVL_FAIL(error, KVL_ERR_IO, "lmdb: cannot open %.200s: %s", name, strerror(errno));
    if (flock(*fd, LOCK_EX | LOCK_NB) == 0) return KVL_OK;
    (void)close(*fd);
    return KVL_FAIL(error, KVL_ERR_BUSY, "lmdb: %.200s is open in another process", path);
}

kvl_status kvl_lmdb_tier_check(const char *path, uint64_t *n_bytes, kvl_error *error)
{
    struct statfs about;
    int fd = -1;
    *n_bytes = 0;
    if (statfs(path, &about) != 0) {
        return KVL_FAIL(error, errno == ENOENT ? KVL_ERR_NOT_FOUND : KVL_ERR_IO,
                        "lmdb: cannot examine %.200s: %s", path, strerror(errno));
    }
    const char *remote = kvl_lmdb_remote_filesystem((uint64_t)about.f_type);
    if (remote != NULL)
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED, "lmdb: %.200s is on %s", path, remote);
    KVL_TRY(lock(path, &fd, error));
    const kvl_status status = check_pages(path, n_bytes, error);
    if (fd >= 0) (void)close(fd);
    return status;
}

const char *kvl_lmdb_version(void)
{
    return mdb_version(NULL, NULL, NULL);
}
