/* base/line_file.c: lines appended with one write each, so that a crash leaves at most the last one
 * half-written. */
#include "base/file.h"

#include "base/alloc.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BACK_BYTES = 1 << 16 };

static kvl_status fail(const char *what, kvl_error *error)
{
    return KVL_FAIL(error, KVL_ERR_IO, "cannot %s: %s", what, strerror(errno));
}

/* Where the last line ends: read backwards. False when the file cannot be read. */
static bool find_end(int descriptor, off_t n_bytes, off_t *end)
{
    char bytes[BACK_BYTES];
    for (off_t past = n_bytes; past > 0;) {
        const off_t first = past > BACK_BYTES ? past - BACK_BYTES : 0;
        const ssize_t n = pread(descriptor, bytes, (size_t)(past - first), first);
        if (n != past - first) return false;
        const char *line_end = memrchr(bytes, '\n', (size_t)n);
        if (line_end != NULL) {
            *end = first + (line_end - bytes) + 1;
            return true;
        }
        past = first;
    }
    *end = 0;
    return true;
}

kvl_status kvl_line_file_open(const char *path, kvl_line_file *file, kvl_error *error)
{
    file->descriptor = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (file->descriptor < 0)
        return KVL_FAIL(error, KVL_ERR_IO, "cannot open %s: %s", path, strerror(errno));
    struct stat about;
    off_t end = 0;
    const bool is_cut = fstat(file->descriptor, &about) == 0 && S_ISREG(about.st_mode) &&
                        find_end(file->descriptor, about.st_size, &end) &&
                        (end == about.st_size || ftruncate(file->descriptor, end) == 0);
    if (is_cut) return KVL_OK;
    const int reason = errno;
    kvl_line_file_close(file);
    return KVL_FAIL(error, KVL_ERR_IO, "cannot go on with %s: %s", path, strerror(reason));
}

kvl_status kvl_line_file_add(kvl_line_file *file, const void *line, size_t n_bytes,
                             kvl_error *error)
{
    char *whole = kvl_alloc(n_bytes + 1);
    if (whole == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a line");
    memcpy(whole, line, n_bytes);
    whole[n_bytes] = '\n';
    size_t n_done = 0;
    bool is_good = true;
    while (is_good && n_done <= n_bytes) {
        const ssize_t n = write(file->descriptor, whole + n_done, n_bytes + 1 - n_done);
        is_good = n > 0 || (n < 0 && errno == EINTR);
        if (n > 0) n_done += (size_t)n;
    }
    const int reason = errno;
    kvl_free(whole);
    errno = reason;
    return is_good ? KVL_OK : fail("write a line", error);
}

kvl_status kvl_line_file_sync(kvl_line_file *file, kvl_error *error)
{
    return fdatasync(file->descriptor) == 0 ? KVL_OK : fail("sync", error);
}

void kvl_line_file_close(kvl_line_file *file)
{
    if (file->descriptor >= 0) (void)close(file->descriptor);
    file->descriptor = -1;
}
