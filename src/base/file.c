/* base/file.c: POSIX files. */
#include "base/file.h"

#include "base/alloc.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static kvl_status fail(kvl_error *error, const char *what, const char *path)
{
    const int reason = errno;
    return KVL_FAIL(error, reason == ENOENT ? KVL_ERR_NOT_FOUND : KVL_ERR_IO, "cannot %s %s: %s",
                    what, path, strerror(reason));
}

static kvl_status open_regular(const char *path, int *fd, size_t *n_bytes, kvl_error *error)
{
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd < 0) return fail(error, "open", path);
    struct stat about;
    if (fstat(*fd, &about) != 0 || !S_ISREG(about.st_mode)) {
        (void)close(*fd);
        return KVL_FAIL(error, KVL_ERR_IO, "%s is not a regular file", path);
    }
    *n_bytes = (size_t)about.st_size;
    return KVL_OK;
}

kvl_status kvl_file_map_open(const char *path, kvl_file_map *map, kvl_error *error)
{
    *map = (kvl_file_map){0};
    int fd = -1;
    size_t n_bytes = 0;
    KVL_TRY(open_regular(path, &fd, &n_bytes, error));
    void *bytes = NULL;
    if (n_bytes > 0) {
        bytes = mmap(NULL, n_bytes, PROT_READ, MAP_SHARED, fd, 0);
        if (bytes == MAP_FAILED) {
            const kvl_status status = fail(error, "map", path);
            (void)close(fd);
            return status;
        }
    }
    (void)close(fd);
    *map = (kvl_file_map){bytes, n_bytes};
    return KVL_OK;
}

void kvl_file_map_close(kvl_file_map *map)
{
    if (map->bytes != NULL) (void)munmap((void *)(uintptr_t)map->bytes, map->n_bytes);
    *map = (kvl_file_map){0};
}

static bool read_all(int fd, char *bytes, size_t n_bytes)
{
    size_t done = 0;
    while (done < n_bytes) {
        const ssize_t got = read(fd, bytes + done, n_bytes - done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        done += (size_t)got;
    }
    return true;
}

kvl_status kvl_file_read(const char *path, size_t n_bytes_max, char **bytes, size_t *n_bytes,
                         kvl_error *error)
{
    *bytes = NULL;
    *n_bytes = 0;
    int fd = -1;
    size_t size = 0;
    KVL_TRY(open_regular(path, &fd, &size, error));
    kvl_status status = KVL_OK;
    char *content = NULL;
    if (size > n_bytes_max) {
        status = KVL_FAIL(error, KVL_ERR_TOO_LARGE, "%s has %zu bytes, at most %zu are allowed",
                          path, size, n_bytes_max);
    } else if ((content = kvl_alloc(size + 1)) == NULL) {
        status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for %s (%zu bytes)", path, size);
    } else if (!read_all(fd, content, size)) {
        status = KVL_FAIL(error, KVL_ERR_IO, "cannot read %s", path);
        kvl_free(content);
    } else {
        content[size] = '\0';
        *bytes = content;
        *n_bytes = size;
    }
    (void)close(fd);
    return status;
}

kvl_status kvl_file_open(const char *path, int *descriptor, size_t *n_bytes, kvl_error *error)
{
    return open_regular(path, descriptor, n_bytes, error);
}

kvl_status kvl_file_remove(const char *path, kvl_error *error)
{
    if (unlink(path) != 0 && errno != ENOENT) return fail(error, "remove", path);
    return KVL_OK;
}

static bool put_all(int fd, const char *bytes, size_t n_bytes)
{
    size_t done = 0;
    while (done < n_bytes) {
        const ssize_t put = write(fd, bytes + done, n_bytes - done);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) return false;
        done += (size_t)put;
    }
    return true;
}

static bool write_all(int fd, const char *bytes, size_t n_bytes)
{
    return put_all(fd, bytes, n_bytes) && fsync(fd) == 0;
}

kvl_status kvl_file_write(const char *path, const void *bytes, size_t n_bytes, kvl_error *error)
{
    char beside[PATH_MAX];
    const int length = snprintf(beside, sizeof beside, "%s.%ld.new", path, (long)getpid());
    if (length < 0 || (size_t)length >= sizeof beside)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path %.64s... is too long", path);
    const int fd = open(beside, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) return fail(error, "create", beside);
    const bool written = write_all(fd, bytes, n_bytes);
    const bool closed = close(fd) == 0;
    if (!written || !closed || rename(beside, path) != 0) {
        const kvl_status status = fail(error, "write", path);
        (void)unlink(beside);
        return status;
    }
    return KVL_OK;
}

kvl_status kvl_file_writer_open(const char *path, kvl_file_writer *writer, kvl_error *error)
{
    writer->descriptor = -1;
    writer->path = kvl_strdup(path);
    if (writer->path == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a path");
    writer->descriptor = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (writer->descriptor >= 0) return KVL_OK;
    const kvl_status status = fail(error, "create", path);
    kvl_free(writer->path);
    writer->path = NULL;
    return status;
}

kvl_status kvl_file_writer_add(kvl_file_writer *writer, const void *bytes, size_t n_bytes,
                               kvl_error *error)
{
    if (put_all(writer->descriptor, bytes, n_bytes)) return KVL_OK;
    return fail(error, "write", writer->path);
}

kvl_status kvl_file_writer_commit(kvl_file_writer *writer, const char *path, kvl_error *error)
{
    const bool synced = fsync(writer->descriptor) == 0;
    const bool closed = close(writer->descriptor) == 0;
    writer->descriptor = -1;
    kvl_status status = KVL_OK;
    if (!synced || !closed || rename(writer->path, path) != 0) {
        status = fail(error, "write", path);
        (void)unlink(writer->path);
    }
    kvl_free(writer->path);
    writer->path = NULL;
    return status;
}

void kvl_file_writer_abandon(kvl_file_writer *writer)
{
    if (writer->path == NULL) return;
    (void)close(writer->descriptor);
    (void)unlink(writer->path);
    kvl_free(writer->path);
    *writer = (kvl_file_writer){.descriptor = -1};
}

kvl_status kvl_directory_make(const char *path, kvl_error *error)
{
    char partial[PATH_MAX];
    const size_t length = strlen(path);
    if (length == 0 || length >= sizeof partial)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path %.64s... is empty or too long", path);
    memcpy(partial, path, length + 1);
    for (size_t i = 1; i <= length; i++) {
        if (partial[i] != '/' && partial[i] != '\0') continue;
        const char end = partial[i];
        partial[i] = '\0';
        if (mkdir(partial, 0755) != 0 && errno != EEXIST) return fail(error, "create", partial);
        partial[i] = end;
    }
    struct stat about;
    if (stat(path, &about) != 0 || !S_ISDIR(about.st_mode))
        return KVL_FAIL(error, KVL_ERR_IO, "%s is not a directory", path);
    return KVL_OK;
}

kvl_status kvl_directory_make_private(const char *path, kvl_error *error)
{
    KVL_TRY(kvl_directory_make(path, error));
    if (chmod(path, 0700) != 0) return fail(error, "change", path);
    return KVL_OK;
}

kvl_status kvl_directory_each(const char *path, void (*each)(void *context, const char *name),
                              void *context, kvl_error *error)
{
    DIR *folder = opendir(path);
    if (folder == NULL) return fail(error, "open", path);
    for (const struct dirent *entry = readdir(folder); entry != NULL; entry = readdir(folder))
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            each(context, entry->d_name);
    (void)closedir(folder);
    return KVL_OK;
}

static int remove_entry(const char *path, const struct stat *about, int type, struct FTW *where)
{
    (void)about;
    (void)type;
    (void)where;
    return remove(path);
}

kvl_status kvl_directory_remove(const char *path, kvl_error *error)
{
    enum { DIRECTORIES_OPEN = 16 };
    if (nftw(path, remove_entry, DIRECTORIES_OPEN, FTW_DEPTH | FTW_PHYS) != 0 && errno != ENOENT)
        return fail(error, "remove", path);
    return KVL_OK;
}
