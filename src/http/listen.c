/* http/listen.c: the listening socket: UNIX, or TCP on an address of this machine. */
#include "base/log.h"
#include "http/server.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { BACKLOG = 512 };

static kvl_status fail_io(const char *address, const char *what, kvl_error *error)
{
    return KVL_FAIL(error, KVL_ERR_IO, "cannot %s %s: %s", what, address, strerror(errno));
}

/* A socket that a process has left behind, and nobody answers at, makes room. */
static void remove_stale(const struct sockaddr_un *name)
{
    struct stat about;
    if (lstat(name->sun_path, &about) != 0 || !S_ISSOCK(about.st_mode)) return;
    const int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (probe < 0) return;
    const bool is_alive =
        connect(probe, (const struct sockaddr *)(const void *)name, sizeof *name) == 0;
    const bool is_stale = !is_alive && errno == ECONNREFUSED;
    (void)close(probe);
    if (is_stale) (void)unlink(name->sun_path);
}

static kvl_status listen_unix(kvl_http *http, const char *path, kvl_error *error)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    if (path[0] == '\0' || strlen(path) >= sizeof name.sun_path)
        return KVL_FAIL(error, KVL_ERR_INVALID, "the path of a UNIX socket has 1 to %zu bytes",
                        sizeof name.sun_path - 1);
    memcpy(name.sun_path, path, strlen(path) + 1);
    remove_stale(&name);
    http->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (http->listener < 0) return fail_io(path, "make a socket for", error);
    /* Nobody but the owner may connect, from the very first moment. */
    const mode_t mask = umask(0077);
    const int bound =
        bind(http->listener, (const struct sockaddr *)(const void *)&name, sizeof name);
    (void)umask(mask);
    if (bound != 0 || listen(http->listener, BACKLOG) != 0)
        return fail_io(path, "listen at", error);
    (void)snprintf(http->unix_path, sizeof http->unix_path, "%s", path);
    (void)snprintf(http->address, sizeof http->address, "unix:%s", path);
    return KVL_OK;
}

/* "HOST:PORT" or "[HOST]:PORT", numbers only: a name could be anybody's. */
static bool parse_tcp(const char *text, struct sockaddr_storage *name, socklen_t *n_bytes,
                      bool *is_loopback)
{
    char host[KVL_HTTP_ADDRESS_BYTES];
    const char *colon = strrchr(text, ':');
    if (colon == NULL || strlen(text) >= sizeof host) return false;
    char *end = NULL;
    const unsigned long port = strtoul(colon + 1, &end, 10);
    if (colon[1] < '0' || colon[1] > '9' || *end != '\0' || port > UINT16_MAX) return false;
    size_t n_host = (size_t)(colon - text);
    const bool is_v6 = n_host >= 2 && text[0] == '[' && text[n_host - 1] == ']';
    if (is_v6) {
        text++;
        n_host -= 2;
    }
    memcpy(host, text, n_host);
    host[n_host] = '\0';
    memset(name, 0, sizeof *name);
    if (is_v6) {
        struct sockaddr_in6 *six = (struct sockaddr_in6 *)(void *)name;
        six->sin6_family = AF_INET6;
        six->sin6_port = htons((uint16_t)port);
        *n_bytes = sizeof *six;
        if (inet_pton(AF_INET6, host, &six->sin6_addr) != 1) return false;
        *is_loopback = IN6_IS_ADDR_LOOPBACK(&six->sin6_addr);
        return true;
    }
    struct sockaddr_in *four = (struct sockaddr_in *)(void *)name;
    four->sin_family = AF_INET;
    four->sin_port = htons((uint16_t)port);
    *n_bytes = sizeof *four;
    if (inet_pton(AF_INET, host, &four->sin_addr) != 1) return false;
    *is_loopback = ntohl(four->sin_addr.s_addr) >> 24 == 127;
    return true;
}

static void name_address(kvl_http *http)
{
    struct sockaddr_storage name;
    socklen_t n_bytes = sizeof name;
    char host[INET6_ADDRSTRLEN] = "";
    const char *scheme = http->certificate == NULL ? "http" : "https";
    if (getsockname(http->listener, (struct sockaddr *)(void *)&name, &n_bytes) != 0) return;
    if (name.ss_family == AF_INET6) {
        const struct sockaddr_in6 *six = (const struct sockaddr_in6 *)(const void *)&name;
        (void)inet_ntop(AF_INET6, &six->sin6_addr, host, sizeof host);
        (void)snprintf(http->address, sizeof http->address, "%s://[%s]:%u", scheme, host,
                       ntohs(six->sin6_port));
        return;
    }
    const struct sockaddr_in *four = (const struct sockaddr_in *)(const void *)&name;
    (void)inet_ntop(AF_INET, &four->sin_addr, host, sizeof host);
    (void)snprintf(http->address, sizeof http->address, "%s://%s:%u", scheme, host,
                   ntohs(four->sin_port));
}

static kvl_status listen_tcp(kvl_http *http, const char *address, kvl_error *error)
{
    struct sockaddr_storage name;
    socklen_t n_bytes = 0;
    bool is_loopback = false;
    if (!parse_tcp(address, &name, &n_bytes, &is_loopback))
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "--http is '%.100s'; it must be 127.0.0.1:PORT, [::1]:PORT, another "
                        "address in numbers, or unix:/PATH",
                        address);
    if (!is_loopback && !kvl_http_keys_are_needed(http->keys))
        return KVL_FAIL(error, KVL_ERR_DENIED,
                        "%s can be reached from other machines: give API keys, or listen at "
                        "127.0.0.1",
                        address);
    if (!is_loopback && http->certificate == NULL)
        kvl_log(KVL_LOG_WARN, "keys_in_the_clear",
                "address=%s remedy=\"give --tls-certificate and --tls-key\"", address);
    http->listener = socket(name.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (http->listener < 0) return fail_io(address, "make a socket for", error);
    const int on = 1;
    (void)setsockopt(http->listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(http->listener, (const struct sockaddr *)(const void *)&name, n_bytes) != 0 ||
        listen(http->listener, BACKLOG) != 0)
        return fail_io(address, "listen at", error);
    name_address(http);
    return KVL_OK;
}

kvl_status kvl_http_listen(kvl_http *http, const char *address, kvl_error *error)
{
    static const char prefix[] = "unix:";
    if (strncmp(address, prefix, sizeof prefix - 1) == 0)
        return listen_unix(http, address + sizeof prefix - 1, error);
    return listen_tcp(http, address, error);
}
