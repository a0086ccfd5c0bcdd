/* exchange/bulk_socket.c: addresses of bulk channels, which follow from those of the control
 * sockets. */
#include "exchange/bulk_state.h"

#include "exchange/local.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { BACKLOG = 64, QUEUE_BYTES = 1 << 20 };

void bulk_wake(int fd)
{
    const uint64_t one = 1;
    (void)!write(fd, &one, sizeof one);
}

void bulk_wake_taken(int fd)
{
    uint64_t count = 0;
    (void)!read(fd, &count, sizeof count);
}

bool bulk_is_tcp(const char *endpoint)
{
    return endpoint != NULL && strncmp(endpoint, "tcp://", 6) == 0;
}

/* TCP: messages go out when they are whole; waiting for more would only cost time. Its queues grow
 * with the way as the system sees it. A UNIX socket's own queue holds one record or two, and then
 * sender and receiver wake one another for each: with 1 MiB, 64 MiB went at 5 GB/s instead of 2.8;
 * with 4 MiB at 3.6, for what waits has left the cache by then. */
void bulk_tune(int fd)
{
    int domain = 0;
    socklen_t n = sizeof domain;
    const int on = 1, n_queue_bytes = QUEUE_BYTES;
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &n) == 0 && domain == AF_UNIX) {
        (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &n_queue_bytes, sizeof n_queue_bytes);
    } else {
        (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
}

/* "tcp://HOST:PORT" to HOST, without the brackets of IPv6; "*" and an empty one stand for all. */
static bool host_of(const char *endpoint, char *host, size_t size)
{
    if (strncmp(endpoint, "tcp://", 6) != 0) return false;
    const char *start = endpoint + 6;
    const char *colon = strrchr(start, ':');
    if (colon == NULL) return false;
    size_t n = (size_t)(colon - start);
    if (n >= 2 && start[0] == '[' && start[n - 1] == ']') {
        start++;
        n -= 2;
    }
    if (n >= size) return false;
    memcpy(host, start, n);
    host[n] = '\0';
    return true;
}

static bool resolve(const char *endpoint, uint16_t port, bool to_listen,
                    struct sockaddr_storage *address, socklen_t *n_address)
{
    char host[256];
    char service[8];
    if (!host_of(endpoint, host, sizeof host)) return false;
    (void)snprintf(service, sizeof service, "%u", port);
    const bool any = host[0] == '\0' || strcmp(host, "*") == 0;
    const struct addrinfo hints = {.ai_family = any ? AF_INET : AF_UNSPEC,
                                   .ai_socktype = SOCK_STREAM,
                                   .ai_flags = AI_NUMERICSERV | (to_listen ? AI_PASSIVE : 0)};
    struct addrinfo *found = NULL;
    if (getaddrinfo(any ? NULL : host, service, &hints, &found) != 0) return false;
    memcpy(address, found->ai_addr, found->ai_addrlen);
    *n_address = found->ai_addrlen;
    freeaddrinfo(found);
    return true;
}

static uint16_t port_of(int fd)
{
    struct sockaddr_storage address;
    socklen_t n = sizeof address;
    if (getsockname(fd, (struct sockaddr *)&address, &n) != 0) return 0;
    if (address.ss_family == AF_INET6)
        return ntohs(((const struct sockaddr_in6 *)(const void *)&address)->sin6_port);
    return ntohs(((const struct sockaddr_in *)(const void *)&address)->sin_port);
}

static bool path_of(const char *endpoint, char *path, size_t size)
{
    if (strncmp(endpoint, "ipc://", 6) != 0) return false;
    const int n = snprintf(path, size, "%s.bulk", endpoint + 6);
    return n > 0 && (size_t)n < size && (size_t)n < sizeof((struct sockaddr_un *)NULL)->sun_path;
}

kvl_status bulk_listen(const char *endpoint, int *fd, uint16_t *port, char *unix_path,
                       size_t unix_path_size, kvl_error *error)
{
    struct sockaddr_storage address;
    socklen_t n_address = 0;
    *fd = -1;
    if (strncmp(endpoint, "ipc://", 6) == 0) {
        char path[128];
        /* A path with no room for the ending has no channel: ZeroMQ carries all. */
        if (!path_of(endpoint, path, sizeof path)) return KVL_OK;
        KVL_TRY(kvl_local_listen(path, 0600, fd, error));
        (void)snprintf(unix_path, unix_path_size, "%s", path);
        *port = 1;
        return KVL_OK;
    }
    if (!resolve(endpoint, 0, true, &address, &n_address)) {
        return KVL_FAIL(error, KVL_ERR_IO, "%.200s: the address is unknown here", endpoint);
    }
    const int made = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (made >= 0 && bind(made, (const struct sockaddr *)&address, n_address) == 0 &&
        listen(made, BACKLOG) == 0) {
        *fd = made;
        *port = port_of(made);
        return KVL_OK;
    }
    const int reason = errno;
    if (made >= 0) (void)close(made);
    return KVL_FAIL(error, KVL_ERR_IO, "cannot listen for bulk beside %.200s: %s", endpoint,
                    strerror(reason));
}

kvl_status bulk_dial(const char *endpoint, uint16_t port, int *fd)
{
    char path[128];
    *fd = -1;
    if (path_of(endpoint, path, sizeof path)) return kvl_local_dial(path, fd, NULL);
    struct sockaddr_storage address;
    socklen_t n_address = 0;
    if (!resolve(endpoint, port, false, &address, &n_address)) return KVL_ERR_UNREACHABLE;
    const int made = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (made < 0) return KVL_ERR_UNREACHABLE;
    if (connect(made, (const struct sockaddr *)&address, n_address) != 0 && errno != EINPROGRESS) {
        (void)close(made);
        return KVL_ERR_UNREACHABLE;
    }
    bulk_tune(made);
    *fd = made;
    return KVL_OK;
}
