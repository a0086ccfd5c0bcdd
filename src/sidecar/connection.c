/* sidecar/connection.c: clients come, are read, are answered, and go. */
#include "sidecar/state.h"

#include "base/alloc.h"
#include "base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ACCEPTS_PER_TURN = 64 };

client *sidecar_client_find(kvl_sidecar *s, uint32_t slot, uint64_t serial)
{
    client *c = s->clients[slot];
    return c != NULL && c->serial == serial ? c : NULL;
}

static client *add_client(kvl_sidecar *s, tenant *t, int fd)
{
    uint32_t slot = 0;
    while (slot < KVL_SIDECAR_CLIENTS_MAX && s->clients[slot] != NULL) slot++;
    if (slot == KVL_SIDECAR_CLIENTS_MAX) return NULL;
    client *c = kvl_alloc_zero(1, sizeof *c);
    if (c == NULL) return NULL;
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = KVL_SIDECAR_TENANTS_MAX + 1 + slot};
    if (epoll_ctl(s->epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0) {
        kvl_free(c);
        return NULL;
    }
    kvl_local_link_init(&c->link, fd);
    c->slot = slot;
    c->serial = ++s->last_serial;
    c->tenant = t;
    s->clients[slot] = c;
    if (slot >= s->clients_past) s->clients_past = slot + 1;
    s->n_clients++;
    t->n_clients++;
    return c;
}

/* Without a free descriptor a connection can neither be taken nor refused, and would wake us for
 * ever. So one is kept in reserve to refuse it with. */
static bool refuse_with_spare(kvl_sidecar *s, const tenant *t)
{
    if (s->spare_fd < 0) return false;
    (void)close(s->spare_fd);
    const int fd = accept4(t->listen_fd, NULL, NULL, SOCK_CLOEXEC);
    if (fd >= 0) (void)close(fd);
    s->spare_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    kvl_log(KVL_LOG_WARN, "client_refused", "tenant=%s why=\"no descriptor is left\"", t->name);
    return fd >= 0;
}

void sidecar_accept(kvl_sidecar *s, tenant *t)
{
    for (int turn = 0; turn < ACCEPTS_PER_TURN; turn++) {
        const int fd = accept4(t->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0 && (errno == EMFILE || errno == ENFILE) && refuse_with_spare(s, t)) continue;
        if (fd < 0) return;
        if (add_client(s, t, fd) != NULL) continue;
        t->refused++;
        kvl_log(KVL_LOG_WARN, "client_refused", "tenant=%s why=\"%u clients are connected\"",
                t->name, s->n_clients);
        (void)close(fd);
    }
}

void sidecar_client_end(kvl_sidecar *s, client *c)
{
    sidecar_load_forget(s, c);
    sidecar_lease_release_all(s, c);
    kvl_local_link_deinit(&c->link);
    s->clients[c->slot] = NULL;
    while (s->clients_past > 0 && s->clients[s->clients_past - 1] == NULL) s->clients_past--;
    s->n_clients--;
    c->tenant->n_clients--;
    kvl_free(c);
}

/* ---- sending ---- */

static void watch_for_room(kvl_sidecar *s, client *c)
{
    const bool wants = kvl_local_link_has_queued(&c->link);
    if (wants == c->wants_to_write) return;
    struct epoll_event event = {.events = wants ? EPOLLIN | EPOLLOUT : EPOLLIN,
                                .data.u64 = KVL_SIDECAR_TENANTS_MAX + 1 + c->slot};
    (void)epoll_ctl(s->epoll_fd, EPOLL_CTL_MOD, c->link.fd, &event);
    c->wants_to_write = wants;
}

void sidecar_send(kvl_sidecar *s, client *c, const Kvloom__Local__V1__Reply *reply, int fd)
{
    const size_t n_bytes = kvloom__local__v1__reply__get_packed_size(reply);
    KVL_ASSERT(n_bytes <= KVL_LOCAL_MESSAGE_BYTES_MAX);
    kvl_local_chunk *chunk = c->is_broken ? NULL : kvl_local_chunk_create(n_bytes);
    if (chunk == NULL) {
        c->is_broken = true;
        return;
    }
    (void)kvloom__local__v1__reply__pack(reply, kvl_local_chunk_bytes(chunk));
    const kvl_status status = kvl_local_link_send(&c->link, chunk, fd);
    if (status < 0) {
        if (status == KVL_ERR_BUSY) {
            kvl_log(KVL_LOG_WARN, "client_dropped", "client=%s why=\"it does not read\"", c->name);
        }
        c->is_broken = true;
        return;
    }
    watch_for_room(s, c);
}

void sidecar_send_status(kvl_sidecar *s, client *c, uint64_t number, kvl_status status,
                         const char *format, ...)
{
    char text[KVL_ERROR_TEXT_MAX];
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    Kvloom__Local__V1__Reply reply = KVLOOM__LOCAL__V1__REPLY__INIT;
    reply.number = number;
    reply.status = status;
    reply.text = text;
    sidecar_send(s, c, &reply, -1);
}

/* ---- receiving ---- */

/* All frames that one read has brought, for nothing else would wake us for those that are left; one
 * read is little enough for the others to wait. */
static kvl_status read_client(kvl_sidecar *s, client *c)
{
    KVL_TRY(kvl_local_link_read(&c->link));
    while (!c->is_broken) {
        const uint8_t *bytes = NULL;
        size_t n_bytes = 0;
        int fd = -1;
        const kvl_status status = kvl_local_link_next(&c->link, &bytes, &n_bytes, &fd);
        if (status == KVL_IN_PROGRESS) return KVL_OK;
        KVL_TRY(status);
        sidecar_request(s, c, bytes, n_bytes, fd);
    }
    return KVL_OK; /* broken: its owner ends it */
}

void sidecar_client_event(kvl_sidecar *s, client *c, uint32_t epoll_events)
{
    kvl_status status = KVL_OK;
    if ((epoll_events & EPOLLOUT) != 0) {
        status = kvl_local_link_flush(&c->link);
        if (status == KVL_OK) watch_for_room(s, c);
    }
    if (status == KVL_OK && (epoll_events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0) {
        status = read_client(s, c);
    }
    if (status < 0 && status != KVL_ERR_UNREACHABLE) {
        c->tenant->refused++;
        kvl_log(KVL_LOG_WARN, "client_dropped", "client=%s status=%s", c->name,
                kvl_status_name(status));
    }
    if (status < 0 || c->is_broken) sidecar_client_end(s, c);
}
