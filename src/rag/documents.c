/* rag/documents.c: a walk over directories, sorted, so that it is the same every time. */
#include "rag/documents.h"

#include "base/alloc.h"
#include "base/file.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* Bytes of the character that begins here, 0: none does. */
static size_t character(const unsigned char *at, size_t n)
{
    if (at[0] < 0x80) return at[0] == 0 ? 0 : 1;
    size_t length = 0;
    if (at[0] >= 0xc2 && at[0] < 0xe0) length = 2;
    if (at[0] >= 0xe0 && at[0] < 0xf0) length = 3;
    if (at[0] >= 0xf0 && at[0] < 0xf5) length = 4;
    if (length == 0 || n < length) return 0;
    for (size_t i = 1; i < length; i++) {
        if ((at[i] & 0xc0) != 0x80) return 0;
    }
    const bool is_overlong = (at[0] == 0xe0 && at[1] < 0xa0) || (at[0] == 0xf0 && at[1] < 0x90);
    const bool is_outside = (at[0] == 0xed && at[1] > 0x9f) || (at[0] == 0xf4 && at[1] > 0x8f);
    return is_overlong || is_outside ? 0 : length;
}

size_t kvl_documents_utf8_prefix(const char *text, size_t n_bytes)
{
    size_t at = 0;
    while (at < n_bytes) {
        const size_t n = character((const unsigned char *)text + at, n_bytes - at);
        if (n == 0) break;
        at += n;
    }
    return at;
}

static kvl_status visit_file(const char *path, const kvl_documents_visitor *visitor,
                             kvl_error *error)
{
    char *text = NULL;
    size_t n_bytes = 0;
    char reason[128];
    kvl_error why = {0};
    const kvl_status status = kvl_file_read(path, KVL_DOCUMENT_BYTES_MAX, &text, &n_bytes, &why);
    if (status == KVL_ERR_NO_MEMORY) return KVL_FAIL(error, status, "no memory to read %s", path);
    if (status == KVL_ERR_TOO_LARGE) {
        (void)snprintf(reason, sizeof reason, "larger than %zu MiB; divide it",
                       KVL_DOCUMENT_BYTES_MAX >> 20);
        visitor->skipped(visitor->context, path, reason);
        return KVL_OK;
    }
    if (status != KVL_OK) {
        visitor->skipped(visitor->context, path, why.text);
        return KVL_OK;
    }
    const size_t n_good = kvl_documents_utf8_prefix(text, n_bytes);
    kvl_status visited = KVL_OK;
    if (n_good < n_bytes) {
        (void)snprintf(reason, sizeof reason, "not UTF-8 text (byte %zu); convert it with iconv",
                       n_good);
        visitor->skipped(visitor->context, path, reason);
    } else {
        visited = visitor->text(visitor->context, path, text, n_bytes, error);
    }
    kvl_free(text);
    return visited;
}

static kvl_status visit(const char *path, uint32_t depth, const kvl_documents_visitor *visitor,
                        kvl_error *error);

static int is_wanted(const struct dirent *entry)
{
    return entry->d_name[0] != '.';
}

/* By bytes: scandir's own comparison depends on the locale. */
static int by_name(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

static kvl_status visit_entry(const char *path, const char *name, uint32_t depth,
                              const kvl_documents_visitor *visitor, kvl_error *error)
{
    char inside[PATH_MAX];
    const size_t n_path = strlen(path);
    const char *slash = n_path > 0 && path[n_path - 1] == '/' ? "" : "/";
    struct stat about;
    if (snprintf(inside, sizeof inside, "%s%s%s", path, slash, name) >= (int)sizeof inside)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path of %.64s in %.512s is too long", name,
                        path);
    if (lstat(inside, &about) != 0) {
        visitor->skipped(visitor->context, inside, strerror(errno));
        return KVL_OK;
    }
    if (!S_ISREG(about.st_mode) && !S_ISDIR(about.st_mode)) return KVL_OK;
    return visit(inside, depth + 1, visitor, error);
}

static kvl_status visit_directory(const char *path, uint32_t depth,
                                  const kvl_documents_visitor *visitor, kvl_error *error)
{
    if (depth >= KVL_DOCUMENT_DEPTH_MAX)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "%s is more than %u directories deep", path,
                        KVL_DOCUMENT_DEPTH_MAX);
    struct dirent **entries = NULL;
    const int n = scandir(path, &entries, is_wanted, by_name);
    if (n < 0 && depth == 0) return KVL_FAIL(error, KVL_ERR_IO, "%s: %s", path, strerror(errno));
    if (n < 0) {
        visitor->skipped(visitor->context, path, strerror(errno));
        return KVL_OK;
    }
    kvl_status status = KVL_OK;
    for (int i = 0; i < n; i++) {
        if (status == KVL_OK) status = visit_entry(path, entries[i]->d_name, depth, visitor, error);
        free(entries[i]); /* tidy: free, the C library allocated it */
    }
    free(entries); /* tidy: free, the C library allocated it */
    return status;
}

static kvl_status visit(const char *path, uint32_t depth, const kvl_documents_visitor *visitor,
                        kvl_error *error)
{
    struct stat about;
    if (stat(path, &about) != 0) {
        const kvl_status status = errno == ENOENT ? KVL_ERR_NOT_FOUND : KVL_ERR_IO;
        if (depth == 0) return KVL_FAIL(error, status, "%s: %s", path, strerror(errno));
        visitor->skipped(visitor->context, path, strerror(errno));
        return KVL_OK;
    }
    if (S_ISDIR(about.st_mode)) return visit_directory(path, depth, visitor, error);
    if (S_ISREG(about.st_mode)) return visit_file(path, visitor, error);
    if (depth == 0)
        return KVL_FAIL(error, KVL_ERR_INVALID, "%s is neither a file nor a directory", path);
    return KVL_OK;
}

kvl_status kvl_documents_visit(const char *path, const kvl_documents_visitor *visitor,
                               kvl_error *error)
{
    return visit(path, 0, visitor, error);
}
