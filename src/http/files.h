/* http/files.h: files of clients on disk (OpenAI's Files API), each tenant's in a folder of its
 * own. Private to the room.
 *
 * A file is two: ID.data with its bytes, and ID.json with what is known of it, written last. A
 * crash leaves the whole file or, for the next start to remove, bytes that nobody has been told of.
 * Folders are named after the tenants in hexadecimal, ids are this server's: nothing that a client
 * sends becomes part of a path unless it is an id that exists.
 * Limits   bytes of a tenant, of a file and of a name; all of them are refused with a reason
 * Threads  Any; one lock. A file that is removed while somebody reads it stays readable for him. */
#ifndef KVL_HTTP_FILES_H
#define KVL_HTTP_FILES_H

#include "base/file.h"
#include "http/keys.h"

#include <jansson.h>
#include <limits.h>

#define KVL_HTTP_ID_BYTES 32u /* of a file or batch, with its NUL */
#define KVL_HTTP_FILE_BYTES_MAX ((uint64_t)200 << 20)
#define KVL_HTTP_FILES_MAX 10000u /* of a tenant */
#define KVL_HTTP_FILENAME_BYTES 256u
#define KVL_HTTP_FOLDER_BYTES (3 + 2 * KVL_HTTP_TENANT_BYTES_MAX)

typedef struct kvl_http_file {
    char id[KVL_HTTP_ID_BYTES];
    char filename[KVL_HTTP_FILENAME_BYTES];
    const char *purpose; /* "batch" or "batch_output" */
    uint64_t n_bytes;
    int64_t created_ns; /* wall clock */
} kvl_http_file;

typedef struct kvl_http_files kvl_http_files;

/* Loads what is in the folder `path`, which is made where it is not there, and removes what a crash
 * left behind.
 * Owns     *files: ended with kvl_http_files_close
 * Errors   KVL_ERR_IO, KVL_ERR_TOO_LARGE (the path), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_http_files_open(const char *path, uint64_t tenant_bytes_max,
                                            kvl_http_files **files, kvl_error *error);
void kvl_http_files_close(kvl_http_files *files);

/* "file-" or "batch_" and 24 hexadecimal digits that nobody can guess. */
void kvl_http_id_make(const char *prefix, char *id);
/* Whether a text is one, for that prefix. */
bool kvl_http_id_is(const char *prefix, const char *text);

/* Name of a tenant's folder, and back; `folder` has KVL_HTTP_FOLDER_BYTES, `tenant` one byte more
 * than KVL_HTTP_TENANT_BYTES_MAX. */
void kvl_http_folder_of(const char *tenant, char *folder);
bool kvl_http_tenant_of(const char *folder, char *tenant);
/* Calls each(context, tenant, name) for everything in the tenants' folders. Errors as open. */
typedef void (*kvl_http_visit)(void *context, const char *tenant, const char *name);
KVL_MUST_USE kvl_status kvl_http_folders_each(const char *root, kvl_http_visit each, void *context,
                                              kvl_error *error);
/* ROOT/FOLDER/NAME + ending; `path` has PATH_MAX bytes. Errors   KVL_ERR_TOO_LARGE */
KVL_MUST_USE kvl_status kvl_http_path_of(const char *root, const char *tenant, const char *name,
                                         const char *ending, char *path, kvl_error *error);
const char *kvl_http_files_root(const kvl_http_files *files);

/* Errors   KVL_ERR_NOT_FOUND */
KVL_MUST_USE kvl_status kvl_http_files_find(kvl_http_files *files, const char *tenant,
                                            const char *id, kvl_http_file *file, kvl_error *error);
/* Opens the bytes. Owns *descriptor. Errors   KVL_ERR_NOT_FOUND, KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_http_files_read(kvl_http_files *files, const char *tenant,
                                            const char *id, int *descriptor, size_t *n_bytes,
                                            kvl_error *error);
/* Errors   KVL_ERR_NOT_FOUND, KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_http_files_remove(kvl_http_files *files, const char *tenant,
                                              const char *id, kvl_error *error);
/* OpenAI's list: from behind `after` (NULL: the beginning), at most `limit`, newest first unless
 * is_ascending, of one purpose unless NULL. The caller's; NULL without memory. */
json_t *kvl_http_files_list(kvl_http_files *files, const char *tenant, const char *after,
                            uint32_t limit, bool is_ascending, const char *purpose);
json_t *kvl_http_file_json(const kvl_http_file *file);

/* ---- a file that comes in pieces ---- */

typedef struct kvl_http_incoming kvl_http_incoming;

/* is_own: made by this server: counted, but not refused for want of room.
 * Owns     *incoming: ended with kvl_http_incoming_commit or _abandon
 * Errors   KVL_ERR_TOO_LARGE (as many files as a tenant may have), KVL_ERR_IO, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_http_incoming_begin(kvl_http_files *files, const char *tenant,
                                                bool is_own, kvl_http_incoming **incoming,
                                                kvl_error *error);
/* Errors   KVL_ERR_TOO_LARGE (of a file, of a tenant), KVL_ERR_IO: abandon it then */
KVL_MUST_USE kvl_status kvl_http_incoming_add(kvl_http_incoming *incoming, const void *bytes,
                                              size_t n_bytes, kvl_error *error);
/* Takes it, also after an error. id: NULL: a new one; one that exists is replaced.
 * Errors   KVL_ERR_IO, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_http_incoming_commit(kvl_http_incoming *incoming, const char *id,
                                                 const char *filename, const char *purpose,
                                                 kvl_http_file *file, kvl_error *error);
/* NULL does nothing. */
void kvl_http_incoming_abandon(kvl_http_incoming *incoming);

#endif /* KVL_HTTP_FILES_H */
