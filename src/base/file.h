/* base/file.h: whole files, read-only maps and directories; every path that KVLoom touches outside
 * LMDB goes through here.
 * Threads  Safe from any thread. Every call may block on the disk. */
#ifndef KVL_BASE_FILE_H
#define KVL_BASE_FILE_H

#include "base/status.h"

/* A read-only map of a file. Owns nothing but the map: ended with kvl_file_map_close. */
typedef struct kvl_file_map {
    const uint8_t *bytes; /* NULL for an empty file */
    size_t n_bytes;
} kvl_file_map;

/* Errors   KVL_ERR_NOT_FOUND, KVL_ERR_IO: `error` has the path and the reason */
KVL_MUST_USE kvl_status kvl_file_map_open(const char *path, kvl_file_map *map, kvl_error *error);
/* A map that was never opened or is zeroed does nothing. */
void kvl_file_map_close(kvl_file_map *map);

/* Reads a file of at most `n_bytes_max` bytes and adds a NUL that is not counted.
 * Owns     *bytes: ended with kvl_free
 * Errors   KVL_ERR_NOT_FOUND, KVL_ERR_TOO_LARGE, KVL_ERR_IO, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_file_read(const char *path, size_t n_bytes_max, char **bytes,
                                      size_t *n_bytes, kvl_error *error);

/* Writes beside the path, syncs and renames: a reader sees the old file or the new, never half.
 * Errors   KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_file_write(const char *path, const void *bytes, size_t n_bytes,
                                       kvl_error *error);

/* Opens a regular file to read. Owns *descriptor: ended with close(2).
 * Errors   KVL_ERR_NOT_FOUND, KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_file_open(const char *path, int *descriptor, size_t *n_bytes,
                                      kvl_error *error);
/* Removes a file; one that is not there is fine. Errors   KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_file_remove(const char *path, kvl_error *error);

/* A file that comes in pieces, and is there as a whole or not at all. */
typedef struct kvl_file_writer {
    int descriptor;
    char *path; /* of the unfinished file */
} kvl_file_writer;

/* Makes `path`, which must not be there, for its owner alone.
 * Owns     *writer: ended with kvl_file_writer_commit or _abandon
 * Errors   KVL_ERR_IO, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_file_writer_open(const char *path, kvl_file_writer *writer,
                                             kvl_error *error);
/* Errors   KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_file_writer_add(kvl_file_writer *writer, const void *bytes,
                                            size_t n_bytes, kvl_error *error);
/* Syncs and gives the file its name, in place of what may have had it. Errors   KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_file_writer_commit(kvl_file_writer *writer, const char *path,
                                               kvl_error *error);
/* Removes the unfinished file. One that is ended already does nothing. */
void kvl_file_writer_abandon(kvl_file_writer *writer);

/* A file of lines that grows: a log that is gone on with after a crash. */
typedef struct kvl_line_file {
    int descriptor;
} kvl_line_file;

/* Opens or makes it. Whatever stands behind the last line end is cut off: a line that a crash left
 * half-written was never there.
 * Owns     *file: ended with kvl_line_file_close
 * Errors   KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_line_file_open(const char *path, kvl_line_file *file, kvl_error *error);
/* Appends a line and its end; it survives this process, but a power cut only after a sync.
 * Errors   KVL_ERR_IO, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_line_file_add(kvl_line_file *file, const void *line, size_t n_bytes,
                                          kvl_error *error);
KVL_MUST_USE kvl_status kvl_line_file_sync(kvl_line_file *file, kvl_error *error);
void kvl_line_file_close(kvl_line_file *file);

/* Makes a directory and its parents; an existing one is fine.
 * Errors   KVL_ERR_IO, KVL_ERR_TOO_LARGE (path longer than 4095 bytes) */
KVL_MUST_USE kvl_status kvl_directory_make(const char *path, kvl_error *error);

/* The same, and nobody but its owner may look into it. Errors   as above */
KVL_MUST_USE kvl_status kvl_directory_make_private(const char *path, kvl_error *error);
/* Calls each(context, name) for every entry but . and .., in no order.
 * Errors   KVL_ERR_NOT_FOUND, KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_directory_each(const char *path,
                                           void (*each)(void *context, const char *name),
                                           void *context, kvl_error *error);

/* Removes a directory with everything in it; one that is not there is fine. Symbolic links are
 * removed, not followed. */
KVL_MUST_USE kvl_status kvl_directory_remove(const char *path, kvl_error *error);

#endif /* KVL_BASE_FILE_H */
