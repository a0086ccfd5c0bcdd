/* exchange/local.c: frames and descriptors over UNIX sockets. */
#include "exchange/local.h"

#include "base/alloc.h"
#include "base/file.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { HEAD_BYTES = 8, READ_BYTES_FIRST = 4096, KEPT_BYTES_MAX = 64 << 10, BACKLOG = 512 };

struct kvl_local_chunk {
    kvl_local_chunk *next;
    size_t n_bytes, n_sent; /* with the head */
    int fd;                 /* our own copy, or -1 */
    uint8_t bytes[];
};

/* ---- sockets ---- */

static kvl_status address_of(const char *path, struct sockaddr_un *address, kvl_error *error)
{
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    const size_t n = strlen(path);
    if (n == 0 || n >= sizeof address->sun_path) {
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "socket path %.120s has %zu bytes, must have 1 .. %zu: use a shorter one",
                        path, n, sizeof address->sun_path - 1);
    }
    memcpy(address->sun_path, path, n + 1);
    return KVL_OK;
}

static kvl_status fail_errno(kvl_error *error, const char *what, const char *path)
{
    return KVL_FAIL(error, KVL_ERR_IO, "cannot %s %.200s: %s", what, path, strerror(errno));
}

static int open_socket(void)
{
    return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
}

/* 0, or the reason of the system. */
static int connect_to(int fd, const struct sockaddr_un *address)
{
    return connect(fd, (const struct sockaddr *)address, sizeof *address) == 0 ? 0 : errno;
}

kvl_status kvl_local_dial(const char *path, int *fd, kvl_error *error)
{
    struct sockaddr_un address;
    *fd = -1;
    KVL_TRY(address_of(path, &address, error));
    const int made = open_socket();
    if (made < 0) return fail_errno(error, "open a socket for", path);
    const int reason = connect_to(made, &address);
    if (reason != 0) {
        (void)close(made);
        return KVL_FAIL(error, KVL_ERR_UNREACHABLE,
                        "no sidecar answers at %.200s: %s; start one with `kvloom sidecar`", path,
                        strerror(reason));
    }
    *fd = made;
    return KVL_OK;
}

/* Others must not be able to put their own socket where ours is expected. */
static kvl_status prepare_directory(const char *path, kvl_error *error)
{
    char directory[sizeof((struct sockaddr_un *)NULL)->sun_path];
    (void)snprintf(directory, sizeof directory, "%s", path);
    char *slash = strrchr(directory, '/');
    if (slash == NULL || slash == directory) return KVL_OK;
    *slash = '\0';
    struct stat about;
    if (stat(directory, &about) != 0) {
        KVL_TRY(kvl_directory_make(directory, error));
        return chmod(directory, 0700) == 0 ? KVL_OK : fail_errno(error, "protect", directory);
    }
    if ((about.st_mode & S_IWOTH) != 0 && (about.st_mode & S_ISVTX) == 0) {
        return KVL_FAIL(error, KVL_ERR_IO,
                        "anybody can write to directory %s, so anybody could take the place of its "
                        "sockets: chmod o-w it, or use another directory",
                        directory);
    }
    return KVL_OK;
}

/* A file stays behind when a process is killed; whether somebody listens is asked by connecting. */
static kvl_status remove_stale(const char *path, const struct sockaddr_un *address,
                               kvl_error *error)
{
    struct stat about;
    if (lstat(path, &about) != 0) return KVL_OK;
    if (!S_ISSOCK(about.st_mode)) {
        return KVL_FAIL(error, KVL_ERR_IO, "%.200s exists and is no socket: use another path",
                        path);
    }
    const int fd = open_socket();
    if (fd < 0) return fail_errno(error, "open a socket for", path);
    const int reason = connect_to(fd, address);
    (void)close(fd);
    if (reason != ECONNREFUSED) {
        return KVL_FAIL(error, KVL_ERR_BUSY,
                        "another process listens at %.200s: stop it, or use another path", path);
    }
    return unlink(path) == 0 ? KVL_OK : fail_errno(error, "remove the stale socket", path);
}

kvl_status kvl_local_make_way(const char *path, kvl_error *error)
{
    struct sockaddr_un address;
    KVL_TRY(address_of(path, &address, error));
    KVL_TRY(prepare_directory(path, error));
    return remove_stale(path, &address, error);
}

kvl_status kvl_local_listen(const char *path, mode_t mode, int *fd, kvl_error *error)
{
    struct sockaddr_un address;
    *fd = -1;
    KVL_TRY(address_of(path, &address, error));
    KVL_TRY(kvl_local_make_way(path, error));
    const int made = open_socket();
    if (made < 0) return fail_errno(error, "open a socket for", path);
    /* Nobody can connect between bind and chmod: connections wait for listen. */
    if (bind(made, (const struct sockaddr *)&address, sizeof address) != 0 ||
        chmod(path, mode) != 0 || listen(made, BACKLOG) != 0) {
        const kvl_status status = fail_errno(error, "listen at", path);
        (void)close(made);
        return status;
    }
    *fd = made;
    return KVL_OK;
}

/* ---- a link ---- */

void kvl_local_link_init(kvl_local_link *link, int fd)
{
    *link = (kvl_local_link){.fd = fd};
}

static void end_chunk(kvl_local_chunk *chunk)
{
    if (chunk->fd >= 0) (void)close(chunk->fd);
    kvl_free(chunk);
}

void kvl_local_link_deinit(kvl_local_link *link)
{
    while (link->out_first != NULL) {
        kvl_local_chunk *next = link->out_first->next;
        end_chunk(link->out_first);
        link->out_first = next;
    }
    for (size_t i = 0; i < link->n_fds; i++) (void)close(link->fds[i]);
    if (link->fd >= 0) (void)close(link->fd);
    kvl_free(link->in);
    *link = (kvl_local_link){.fd = -1};
}

static uint32_t get_u32(const uint8_t *bytes)
{
    return (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 |
           (uint32_t)bytes[3] << 24;
}

static void put_u32(uint8_t *bytes, uint32_t value)
{
    for (int i = 0; i < 4; i++) bytes[i] = (uint8_t)(value >> (8 * i));
}

/* Bytes that the frame at the front needs in all; the head alone while it is not here yet. */
static size_t frame_bytes(const kvl_local_link *link)
{
    const size_t n = link->in_past - link->in_first;
    return n < HEAD_BYTES ? HEAD_BYTES : HEAD_BYTES + get_u32(link->in + link->in_first);
}

/* Room for the frame that is arriving, and at least for a small one. What a large frame needed is
 * given back with the next small one: many idle clients must cost little. */
static kvl_status make_room(kvl_local_link *link)
{
    const size_t n = link->in_past - link->in_first;
    if (link->in_first > 0) {
        if (n > 0) memmove(link->in, link->in + link->in_first, n);
        link->in_first = 0;
        link->in_past = n;
    }
    size_t wanted = frame_bytes(link);
    if (wanted > HEAD_BYTES + KVL_LOCAL_MESSAGE_BYTES_MAX) return KVL_ERR_TOO_LARGE;
    if (wanted < READ_BYTES_FIRST) wanted = READ_BYTES_FIRST;
    const bool is_wide = link->capacity > KEPT_BYTES_MAX && wanted <= KEPT_BYTES_MAX && n == 0;
    if (wanted <= link->capacity && !is_wide) return KVL_OK;
    uint8_t *in = kvl_realloc(link->in, wanted);
    if (in == NULL) return KVL_ERR_NO_MEMORY;
    link->in = in;
    link->capacity = wanted;
    return KVL_OK;
}

/* Descriptors that do not fit are closed: the sender broke the rules. */
static kvl_status take_fds(kvl_local_link *link, struct msghdr *message)
{
    kvl_status status = (message->msg_flags & MSG_CTRUNC) != 0 ? KVL_ERR_MALFORMED : KVL_OK;
    for (struct cmsghdr *head = CMSG_FIRSTHDR(message); head != NULL;
         head = CMSG_NXTHDR(message, head)) {
        if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS) continue;
        const size_t n = (head->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(head) + i * sizeof fd, sizeof fd);
            if (link->n_fds < KVL_LOCAL_FDS_MAX) {
                link->fds[link->n_fds++] = fd;
            } else {
                (void)close(fd);
                status = KVL_ERR_MALFORMED;
            }
        }
    }
    return status;
}

kvl_status kvl_local_link_read(kvl_local_link *link)
{
    KVL_TRY(make_room(link));
    union {
        struct cmsghdr head;
        uint8_t bytes[CMSG_SPACE(KVL_LOCAL_FDS_MAX * sizeof(int))];
    } control;
    struct iovec part = {link->in + link->in_past, link->capacity - link->in_past};
    if (part.iov_len == 0) return KVL_OK; /* a whole frame waits to be taken */
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = &control,
                             .msg_controllen = sizeof control};
    const ssize_t n = recvmsg(link->fd, &message, MSG_CMSG_CLOEXEC);
    if (n < 0) {
        return errno == EAGAIN || errno == EINTR ? KVL_OK : KVL_ERR_UNREACHABLE;
    }
    const kvl_status status = take_fds(link, &message);
    if (n == 0) return KVL_ERR_UNREACHABLE;
    link->in_past += (size_t)n;
    return status;
}

kvl_status kvl_local_link_next(kvl_local_link *link, const uint8_t **bytes, size_t *n_bytes,
                               int *fd)
{
    *fd = -1;
    const size_t n = link->in_past - link->in_first;
    if (n < HEAD_BYTES) return KVL_IN_PROGRESS;
    const uint8_t *head = link->in + link->in_first;
    const size_t n_message = get_u32(head);
    const uint32_t n_fds = get_u32(head + 4);
    if (n_message > KVL_LOCAL_MESSAGE_BYTES_MAX) return KVL_ERR_TOO_LARGE;
    if (n_fds > 1) return KVL_ERR_MALFORMED;
    if (n < HEAD_BYTES + n_message) return KVL_IN_PROGRESS;
    if (n_fds > link->n_fds) return KVL_ERR_MALFORMED;
    if (n_fds == 1) {
        *fd = link->fds[0];
        link->n_fds--;
        memmove(link->fds, link->fds + 1, link->n_fds * sizeof *link->fds);
    }
    *bytes = head + HEAD_BYTES;
    *n_bytes = n_message;
    link->in_first += HEAD_BYTES + n_message;
    return KVL_OK;
}

/* ---- sending ---- */

kvl_local_chunk *kvl_local_chunk_create(size_t n_bytes)
{
    KVL_ASSERT(n_bytes <= KVL_LOCAL_MESSAGE_BYTES_MAX);
    kvl_local_chunk *chunk = kvl_alloc(sizeof *chunk + HEAD_BYTES + n_bytes);
    if (chunk == NULL) return NULL;
    *chunk = (kvl_local_chunk){.n_bytes = HEAD_BYTES + n_bytes, .fd = -1};
    put_u32(chunk->bytes, (uint32_t)n_bytes);
    return chunk;
}

uint8_t *kvl_local_chunk_bytes(kvl_local_chunk *chunk)
{
    return chunk->bytes + HEAD_BYTES;
}

/* Sends what it can of a chunk. KVL_IN_PROGRESS: not all of it yet. */
static kvl_status send_chunk(int socket, kvl_local_chunk *chunk, int fd)
{
    while (chunk->n_sent < chunk->n_bytes) {
        union {
            struct cmsghdr head;
            uint8_t bytes[CMSG_SPACE(sizeof(int))];
        } control;
        struct iovec part = {chunk->bytes + chunk->n_sent, chunk->n_bytes - chunk->n_sent};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
        if (fd >= 0 && chunk->n_sent == 0) {
            memset(&control, 0, sizeof control);
            message.msg_control = &control;
            message.msg_controllen = sizeof control;
            control.head.cmsg_level = SOL_SOCKET;
            control.head.cmsg_type = SCM_RIGHTS;
            control.head.cmsg_len = CMSG_LEN(sizeof fd);
            memcpy(CMSG_DATA(&control.head), &fd, sizeof fd);
        }
        const ssize_t n = sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return KVL_IN_PROGRESS;
        /* Too many descriptors are under way: those that nobody has taken yet. */
        if (n < 0 && errno == ETOOMANYREFS) return KVL_IN_PROGRESS;
        if (n < 0) return KVL_ERR_UNREACHABLE;
        chunk->n_sent += (size_t)n;
    }
    return KVL_OK;
}

static kvl_status queue(kvl_local_link *link, kvl_local_chunk *chunk, int fd)
{
    if (link->out_bytes + chunk->n_bytes > KVL_LOCAL_QUEUE_BYTES_MAX) {
        end_chunk(chunk);
        return KVL_ERR_BUSY;
    }
    if (fd >= 0 && chunk->n_sent == 0) {
        chunk->fd = dup(fd);
        if (chunk->fd < 0) {
            end_chunk(chunk);
            return KVL_ERR_IO;
        }
    }
    link->out_bytes += chunk->n_bytes;
    if (link->out_last == NULL) {
        link->out_first = chunk;
    } else {
        link->out_last->next = chunk;
    }
    link->out_last = chunk;
    return KVL_OK;
}

kvl_status kvl_local_link_send(kvl_local_link *link, kvl_local_chunk *chunk, int fd)
{
    put_u32(chunk->bytes + 4, fd >= 0 ? 1 : 0);
    kvl_status status = KVL_IN_PROGRESS;
    if (link->out_first == NULL) status = send_chunk(link->fd, chunk, fd);
    if (status == KVL_IN_PROGRESS) return queue(link, chunk, fd);
    end_chunk(chunk);
    return status;
}

kvl_status kvl_local_link_flush(kvl_local_link *link)
{
    while (link->out_first != NULL) {
        kvl_local_chunk *chunk = link->out_first;
        const kvl_status status = send_chunk(link->fd, chunk, chunk->fd);
        if (status == KVL_IN_PROGRESS) return KVL_OK;
        KVL_TRY(status);
        link->out_bytes -= chunk->n_bytes;
        link->out_first = chunk->next;
        if (link->out_first == NULL) link->out_last = NULL;
        end_chunk(chunk);
    }
    return KVL_OK;
}

/* ---- words that travel ---- */

/* Bytes of the UTF-8 character at `text`, of which n are left; 0 where there is none (RFC 3629,
 * section 4). */
static size_t utf8_bytes(const uint8_t *text, size_t n_left)
{
    const uint8_t first = text[0];
    if (first < 0x80) return 1;
    const size_t n = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
    if (first < 0xc2 || first > 0xf4 || n > n_left) return 0;
    for (size_t i = 1; i < n; i++) {
        if ((text[i] & 0xc0) != 0x80) return 0;
    }
    const uint8_t second = text[1];
    const bool overlong = (first == 0xe0 && second < 0xa0) || (first == 0xf0 && second < 0x90);
    const bool outside = (first == 0xed && second > 0x9f) || (first == 0xf4 && second > 0x8f);
    return overlong || outside ? 0 : n;
}

bool kvl_salt_is_valid(const void *salt, size_t n_bytes)
{
    const uint8_t *bytes = salt;
    if (n_bytes > KVL_LOCAL_SALT_BYTES_MAX) return false;
    for (size_t at = 0; at < n_bytes;) {
        const uint8_t c = bytes[at];
        const size_t n = utf8_bytes(bytes + at, n_bytes - at);
        if (n == 0 || c < 0x20 || c == 0x7f || c == '@' || c == '/' || c == '\\') return false;
        at += n;
    }
    return true;
}
