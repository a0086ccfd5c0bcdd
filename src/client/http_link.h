/* client/http_link.h: one HTTP/1.1 request and its response, read without waiting. Private to the
 * room. What a server sends is bounded here and believed nowhere: a head of at most
 * HTTP_HEAD_BYTES_MAX, lengths and chunk sizes that are numbers, a body of at most
 * HTTP_BODY_BYTES_MAX.
 * Threads  One at a time. */
#ifndef KVL_CLIENT_HTTP_LINK_H
#define KVL_CLIENT_HTTP_LINK_H

#include "base/status.h"
#include "kvloom.h"

#include <stdbool.h>

#define HTTP_HEAD_BYTES_MAX 16384u
#define HTTP_BODY_BYTES_MAX ((uint64_t)256 << 20)

typedef enum http_phase {
    HTTP_HEAD,
    HTTP_BODY,
    HTTP_CHUNK_SIZE,
    HTTP_CHUNK_END,
    HTTP_DONE
} http_phase;

typedef struct http_link {
    int fd; /* -1: closed */
    http_phase phase;
    int status;
    bool is_chunked, has_length;
    char line[HTTP_HEAD_BYTES_MAX]; /* head, or the line of a chunk's size */
    size_t n_line;
    uint64_t left;  /* of the body, or of the chunk */
    uint64_t taken; /* of the body, so far */
} http_link;

/* Connects and sends, until deadline_ns (INT64_MAX: none).
 * Owns     link->fd: ended with http_link_close
 * Errors   KVLOOM_ERR_INVALID (address), KVLOOM_ERR_UNREACHABLE, KVLOOM_ERR_TIMEOUT */
kvloom_status http_link_open(http_link *link, const char *address, const char *request,
                             size_t n_bytes, int64_t deadline_ns, kvloom_error *error);
void http_link_close(http_link *link);

/* Bytes of the body; false: they are not wanted, the response is broken off. */
typedef bool http_take(void *context, const char *bytes, size_t n_bytes);
/* Takes what is there. link->status is known once the head is here.
 * Returns  KVLOOM_IN_PROGRESS, KVLOOM_OK (the response is whole), KVLOOM_ERR_UNREACHABLE (it ended
 *          before its end), KVLOOM_ERR_MALFORMED */
kvloom_status http_link_read(http_link *link, http_take *take, void *context);

#endif /* KVL_CLIENT_HTTP_LINK_H */
