/* client/http_link.c: sockets, heads and chunks. */
#include "client/http_link.h"

#include "base/clock.h"
#include "client/state.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { READ_BYTES = 16384, READS_PER_TURN = 64 };

/* ---- connecting and sending ---- */

static int dial_unix(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) return -1;
    memcpy(address.sun_path, path, strlen(path) + 1);
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0 && connect(fd, (const struct sockaddr *)&address, sizeof address) == 0) return fd;
    if (fd >= 0) (void)close(fd);
    return -1;
}

/* "HOST:PORT" or "[HOST]:PORT". Numbers only, and localhost: a name could take seconds. */
static bool split(const char *text, char host[256], char port[8])
{
    const char *colon = strrchr(text, ':');
    if (colon == NULL || strlen(colon + 1) == 0 || strlen(colon + 1) >= 8) return false;
    size_t n = (size_t)(colon - text);
    if (n >= 2 && text[0] == '[' && text[n - 1] == ']') {
        text++;
        n -= 2;
    }
    if (n == 0 || n >= 256) return false;
    memcpy(host, text, n);
    host[n] = '\0';
    memcpy(port, colon + 1, strlen(colon + 1) + 1);
    if (strcmp(host, "localhost") == 0) memcpy(host, "127.0.0.1", sizeof "127.0.0.1");
    return true;
}

static kvloom_status dial_tcp(const char *text, int *fd, kvloom_error *error)
{
    char host[256], port[8];
    struct addrinfo *found = NULL;
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM,
                                   .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV};
    if (!split(text, host, port) || getaddrinfo(host, port, &hints, &found) != 0) {
        return client_fail(error, KVLOOM_ERR_INVALID,
                           "host '%.200s': must be NUMBERS:PORT, [NUMBERS]:PORT or unix:/PATH",
                           text);
    }
    const int on = 1;
    *fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    const bool is_begun =
        *fd >= 0 && (connect(*fd, found->ai_addr, found->ai_addrlen) == 0 || errno == EINPROGRESS);
    freeaddrinfo(found);
    if (is_begun) {
        (void)setsockopt(*fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        return KVLOOM_OK;
    }
    return client_fail(error, KVLOOM_ERR_UNREACHABLE, "no host at %.200s: %s", text,
                       strerror(errno));
}

static kvloom_status wait_for_room(int fd, const char *address, int64_t deadline_ns,
                                   kvloom_error *error)
{
    int wait_ms = -1;
    if (deadline_ns != INT64_MAX) {
        const int64_t left_ns = deadline_ns - client_now_ns();
        if (left_ns <= 0)
            return client_fail(error, KVLOOM_ERR_TIMEOUT, "host %.200s takes no more", address);
        wait_ms = (int)(left_ns / KVL_NS_PER_MS) + 1;
    }
    struct pollfd item = {.fd = fd, .events = POLLOUT};
    (void)poll(&item, 1, wait_ms);
    return KVLOOM_OK;
}

kvloom_status http_link_open(http_link *link, const char *address, const char *request,
                             size_t n_bytes, int64_t deadline_ns, kvloom_error *error)
{
    kvloom_status status = KVLOOM_OK;
    link->fd = -1;
    link->phase = HTTP_HEAD;
    if (strncmp(address, "unix:", 5) == 0) {
        link->fd = dial_unix(address + 5);
        if (link->fd < 0)
            return client_fail(error, KVLOOM_ERR_UNREACHABLE, "no host at %.200s", address);
    } else {
        const bool has_scheme = strncmp(address, "http://", 7) == 0;
        status = dial_tcp(has_scheme ? address + 7 : address, &link->fd, error);
    }
    for (size_t n_sent = 0; status == KVLOOM_OK && n_sent < n_bytes;) {
        const ssize_t n = send(link->fd, request + n_sent, n_bytes - n_sent, MSG_NOSIGNAL);
        if (n > 0) n_sent += (size_t)n;
        if (n >= 0 || errno == EINTR) continue;
        if (errno == EAGAIN || errno == ENOTCONN) {
            status = wait_for_room(link->fd, address, deadline_ns, error);
        } else {
            status = client_fail(error, KVLOOM_ERR_UNREACHABLE, "no host at %.200s: %s", address,
                                 strerror(errno));
        }
    }
    if (status < 0) http_link_close(link);
    return status;
}

void http_link_close(http_link *link)
{
    if (link->fd >= 0) (void)close(link->fd);
    link->fd = -1;
}

/* ---- heads ---- */

/* A number and nothing else, without a sign. */
static bool take_number(const char *text, int base, uint64_t *number)
{
    char *end = NULL;
    const bool begins = (text[0] >= '0' && text[0] <= '9') ||
                        (base == 16 && ((text[0] | 32) >= 'a' && (text[0] | 32) <= 'f'));
    errno = 0;
    *number = strtoull(text, &end, base);
    while (*end == ' ' || *end == '\t') end++;
    /* Behind a chunk's size there may be extensions, which mean nothing here. */
    return begins && errno == 0 && (*end == '\0' || (base == 16 && *end == ';')) &&
           *number <= HTTP_BODY_BYTES_MAX;
}

static bool take_header(http_link *link, char *line)
{
    char *value = strchr(line, ':');
    if (value == NULL) return false;
    *value++ = '\0';
    value += strspn(value, " \t");
    if (strcasecmp(line, "Content-Length") == 0) {
        link->has_length = true;
        return take_number(value, 10, &link->left);
    }
    if (strcasecmp(line, "Transfer-Encoding") != 0) return true;
    link->is_chunked = strcasecmp(value, "chunked") == 0;
    return link->is_chunked;
}

/* The whole head stands in link->line, ended with zero. */
static bool take_head(http_link *link)
{
    int minor = 0;
    char *at = link->line;
    char *end = strstr(at, "\r\n");
    *end = '\0';
    if (sscanf(at, "HTTP/1.%1d %3d", &minor, &link->status) != 2 || link->status < 200)
        return false;
    for (at = end + 2; *at != '\r'; at = end + 2) {
        end = strstr(at, "\r\n");
        *end = '\0';
        if (!take_header(link, at)) return false;
    }
    /* Both at once is how requests are smuggled. */
    if (link->is_chunked && link->has_length) return false;
    link->n_line = 0;
    link->phase = link->is_chunked ? HTTP_CHUNK_SIZE : HTTP_BODY;
    if (link->has_length && link->left == 0) link->phase = HTTP_DONE;
    return true;
}

/* Adds bytes up to what ends the line or head; how many. *is_whole: the end is there. */
static size_t add_line(http_link *link, const char *bytes, size_t n_bytes, bool *is_whole)
{
    const char *ending = link->phase == HTTP_HEAD ? "\r\n\r\n" : "\r\n";
    const size_t n_ending = strlen(ending);
    *is_whole = false;
    for (size_t i = 0; i < n_bytes; i++) {
        if (link->n_line + 1 >= sizeof link->line || bytes[i] == '\0') return 0;
        link->line[link->n_line++] = bytes[i];
        if (link->n_line < n_ending ||
            memcmp(link->line + link->n_line - n_ending, ending, n_ending) != 0) {
            continue;
        }
        link->line[link->n_line] = '\0';
        *is_whole = true;
        return i + 1;
    }
    return n_bytes;
}

/* ---- bodies ---- */

/* The size of a chunk; the last one has none, and what trails it is of no interest. */
static bool take_chunk_size(http_link *link)
{
    link->line[link->n_line - 2] = '\0';
    link->n_line = 0;
    if (!take_number(link->line, 16, &link->left)) return false;
    link->phase = link->left == 0 ? HTTP_DONE : HTTP_BODY;
    return true;
}

static bool take_line(http_link *link)
{
    if (link->phase == HTTP_HEAD) return take_head(link);
    if (link->phase == HTTP_CHUNK_SIZE) return take_chunk_size(link);
    const bool is_empty = link->n_line == 2;
    link->n_line = 0;
    link->phase = HTTP_CHUNK_SIZE;
    return is_empty;
}

static bool take_body(http_link *link, const char *bytes, size_t n_bytes, size_t *n_used,
                      http_take *take, void *context)
{
    const bool has_end = link->is_chunked || link->has_length;
    *n_used = has_end && link->left < n_bytes ? (size_t)link->left : n_bytes;
    link->taken += *n_used;
    if (link->taken > HTTP_BODY_BYTES_MAX || !take(context, bytes, *n_used)) return false;
    if (!has_end) return true;
    link->left -= *n_used;
    if (link->left == 0) link->phase = link->is_chunked ? HTTP_CHUNK_END : HTTP_DONE;
    return true;
}

static bool take_bytes(http_link *link, const char *bytes, size_t n_bytes, http_take *take,
                       void *context)
{
    while (n_bytes > 0 && link->phase != HTTP_DONE) {
        size_t n_used = 0;
        bool is_whole = false;
        if (link->phase == HTTP_BODY) {
            if (!take_body(link, bytes, n_bytes, &n_used, take, context)) return false;
        } else {
            n_used = add_line(link, bytes, n_bytes, &is_whole);
            if (n_used == 0 || (is_whole && !take_line(link))) return false;
        }
        bytes += n_used;
        n_bytes -= n_used;
    }
    return true;
}

kvloom_status http_link_read(http_link *link, http_take *take, void *context)
{
    char bytes[READ_BYTES];
    for (int turn = 0; turn < READS_PER_TURN && link->phase != HTTP_DONE; turn++) {
        const ssize_t n = recv(link->fd, bytes, sizeof bytes, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) return KVLOOM_IN_PROGRESS;
        if (n <= 0) {
            /* Without a length the end of the connection is the end of the body. */
            const bool is_end =
                n == 0 && link->phase == HTTP_BODY && !link->is_chunked && !link->has_length;
            if (!is_end) return KVLOOM_ERR_UNREACHABLE;
            link->phase = HTTP_DONE;
            return KVLOOM_OK;
        }
        if (!take_bytes(link, bytes, (size_t)n, take, context)) return KVLOOM_ERR_MALFORMED;
    }
    return link->phase == HTTP_DONE ? KVLOOM_OK : KVLOOM_IN_PROGRESS;
}
