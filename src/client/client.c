/* client/client.c: one connection to a sidecar, and calls over it.
 *
 * Without threads of its own: a call reads the socket until its reply is there, and hands replies
 * of transfers to them on the way. `news_fd` then tells whoever polls that there is something to
 * see, although the socket is empty by now. */
#include "client/state.h"

#include "base/alloc.h"
#include "base/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

enum { HELLO_MS = 5000, GRACE_MS = 500 };

_Static_assert((int)KVLOOM_ERR_DAMAGED == (int)KVL_ERR_DAMAGED &&
                   (int)KVLOOM_ERR_BUSY == (int)KVL_ERR_BUSY &&
                   (int)KVLOOM_ERR_IO == (int)KVL_ERR_IO &&
                   (int)KVLOOM_ERR_MALFORMED == (int)KVL_ERR_MALFORMED,
               "the library's numbers are those of the wire");

/* ---- errors ---- */

kvloom_status client_fail(kvloom_error *error, kvloom_status status, const char *format, ...)
{
    if (error == NULL) return status;
    va_list arguments;
    va_start(arguments, format);
    error->status = status;
    (void)vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    return status;
}

kvloom_status client_fail_as(kvloom_error *error, const kvl_error *inner)
{
    return client_fail(error, (kvloom_status)inner->status, "%s", inner->text);
}

const char *kvloom_status_text(kvloom_status status)
{
    return kvl_status_sentence((kvl_status)status);
}

const char *kvloom_version(void)
{
    return KVL_VERSION;
}

int64_t client_now_ns(void)
{
    return kvl_clock_now(kvl_clock_system());
}

kvloom_digest kvloom_fingerprint(const void *description, size_t n_bytes)
{
    static const char DOMAIN_NAME[] = "kvloom.model.1";
    kvl_digester digester;
    kvl_digester_init(&digester, NULL, 0);
    kvl_digester_add(&digester, DOMAIN_NAME, sizeof DOMAIN_NAME);
    kvl_digester_add(&digester, description, n_bytes);
    const kvl_digest made = kvl_digester_end(&digester);
    kvloom_digest digest;
    memcpy(digest.bytes, made.bytes, sizeof digest.bytes);
    return digest;
}

/* ---- the connection ---- */

void client_shared_release(shared_link *shared)
{
    if (shared == NULL) return;
    if (atomic_fetch_sub(&shared->n_references, 1) > 1) return;
    kvl_local_link_deinit(&shared->link);
    (void)pthread_mutex_destroy(&shared->lock);
    kvl_free(shared);
}

/* epoll forgets a descriptor when it is closed. */
static void hang_up(kvloom_client *client)
{
    shared_link *shared = client->shared;
    (void)pthread_mutex_lock(&shared->lock);
    kvl_local_link_deinit(&shared->link);
    (void)pthread_mutex_unlock(&shared->lock);
}

static void tell_news(const kvloom_client *client)
{
    const uint64_t one = 1;
    (void)!write(client->news_fd, &one, sizeof one);
}

static void lose(kvloom_client *client)
{
    hang_up(client);
    if (client->transfers != NULL) tell_news(client);
    client_transfers_fail(client, KVLOOM_ERR_UNREACHABLE, "the connection to the sidecar ended");
}

/* Packs and sends under the lock that releases of segments share. */
static kvloom_status send_packed(shared_link *shared, const request_message *request, int fd,
                                 kvloom_error *error)
{
    const size_t n_bytes = kvloom__local__v1__request__get_packed_size(request);
    if (n_bytes > KVL_LOCAL_MESSAGE_BYTES_MAX) {
        return client_fail(error, KVLOOM_ERR_TOO_LARGE, "a request of %zu bytes, at most %zu",
                           n_bytes, KVL_LOCAL_MESSAGE_BYTES_MAX);
    }
    kvl_local_chunk *chunk = kvl_local_chunk_create(n_bytes);
    if (chunk == NULL) return client_fail(error, KVLOOM_ERR_NO_MEMORY, "no memory for a request");
    (void)kvloom__local__v1__request__pack(request, kvl_local_chunk_bytes(chunk));
    (void)pthread_mutex_lock(&shared->lock);
    const kvl_status status = kvl_local_link_send(&shared->link, chunk, fd);
    (void)pthread_mutex_unlock(&shared->lock);
    if (status == KVL_OK) return KVLOOM_OK;
    return client_fail(error, (kvloom_status)status, "the sidecar does not take a request: %s",
                       kvl_status_sentence(status));
}

/* Waits until the socket can be read, or what is queued can be sent. */
static kvloom_status wait_for(kvloom_client *client, int64_t deadline_ns, kvloom_error *error)
{
    kvl_local_link *link = &client->shared->link;
    const int64_t left_ns = deadline_ns - client_now_ns();
    const bool queued = kvl_local_link_has_queued(link);
    struct pollfd item = {.fd = link->fd, .events = (short)(POLLIN | (queued ? POLLOUT : 0))};
    const int64_t left_ms = left_ns <= 0 ? 0 : (left_ns + KVL_NS_PER_MS - 1) / KVL_NS_PER_MS;
    const int n = poll(&item, 1, (int)left_ms);
    if (n == 0) {
        return client_fail(error, KVLOOM_ERR_TIMEOUT, "the sidecar did not answer in time");
    }
    if (n > 0 && (item.revents & POLLOUT) != 0) {
        (void)pthread_mutex_lock(&client->shared->lock);
        const kvl_status status = kvl_local_link_flush(link);
        (void)pthread_mutex_unlock(&client->shared->lock);
        if (status < 0) return client_fail(error, KVLOOM_ERR_UNREACHABLE, "the sidecar is gone");
    }
    return KVLOOM_OK;
}

/* Takes one whole reply: KVLOOM_IN_PROGRESS where there is none yet. */
static kvloom_status next_reply(kvloom_client *client, reply_message **reply, int *fd,
                                kvloom_error *error)
{
    const uint8_t *bytes = NULL;
    size_t n_bytes = 0;
    *reply = NULL;
    const kvl_status status = kvl_local_link_next(&client->shared->link, &bytes, &n_bytes, fd);
    if (status == KVL_IN_PROGRESS) return KVLOOM_IN_PROGRESS;
    if (status == KVL_OK) *reply = kvloom__local__v1__reply__unpack(NULL, n_bytes, bytes);
    if (*reply != NULL) return KVLOOM_OK;
    if (*fd >= 0) (void)close(*fd);
    *fd = -1;
    return client_fail(error, KVLOOM_ERR_UNREACHABLE, "what the sidecar sent is no reply");
}

void client_reply_end(reply_message *reply)
{
    if (reply != NULL) kvloom__local__v1__reply__free_unpacked(reply, NULL);
}

/* A reply that no call waits for: a transfer's, or one that came after its deadline. */
static void hand_over(kvloom_client *client, reply_message *reply, int fd)
{
    kvloom_transfer *transfer = client->transfers;
    while (transfer != NULL && transfer->number != reply->number) transfer = transfer->next;
    if (transfer != NULL) {
        client_transfer_take(client, transfer, reply, fd);
    } else if (reply->body_case == KVLOOM__LOCAL__V1__REPLY__BODY_GOT && reply->got->lease != 0) {
        /* Nobody will read it: the sidecar need not keep it. */
        request_message request = KVLOOM__LOCAL__V1__REQUEST__INIT;
        Kvloom__Local__V1__Release release = KVLOOM__LOCAL__V1__RELEASE__INIT;
        request.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_RELEASE;
        request.release = &release;
        release.lease = reply->got->lease;
        (void)send_packed(client->shared, &request, -1, NULL);
        if (fd >= 0) (void)close(fd);
    } else if (fd >= 0) {
        (void)close(fd);
    }
    client_reply_end(reply);
}

/* Reads until the reply of a number is there. */
static kvloom_status await(kvloom_client *client, uint64_t number, int64_t deadline_ns,
                           reply_message **reply, int *fd, kvloom_error *error)
{
    bool has_news = false;
    kvloom_status status = KVLOOM_OK;
    for (;;) {
        status = next_reply(client, reply, fd, error);
        if (status == KVLOOM_OK && (*reply)->number == number) break;
        if (status == KVLOOM_OK) {
            hand_over(client, *reply, *fd);
            has_news = true;
            continue;
        }
        if (status == KVLOOM_IN_PROGRESS) status = wait_for(client, deadline_ns, error);
        if (status == KVLOOM_OK && kvl_local_link_read(&client->shared->link) < 0) {
            status = client_fail(error, KVLOOM_ERR_UNREACHABLE, "the sidecar ended the connection");
        }
        if (status < 0) break;
    }
    if (has_news) tell_news(client);
    if (status < 0) *reply = NULL;
    if (status == KVLOOM_ERR_UNREACHABLE) lose(client);
    return status;
}

static kvloom_status greet(kvloom_client *client, kvloom_error *error)
{
    request_message request = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__Hello hello = KVLOOM__LOCAL__V1__HELLO__INIT;
    request.number = ++client->last_number;
    request.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_HELLO;
    request.hello = &hello;
    hello.magic = KVL_LOCAL_MAGIC;
    hello.version_min = KVL_LOCAL_VERSION_MIN;
    hello.version_max = KVL_LOCAL_VERSION_MAX;
    hello.name = client->name;
    hello.fingerprint.len = sizeof client->fingerprint.bytes;
    hello.fingerprint.data = client->fingerprint.bytes;
    hello.salt.len = client->salt == NULL ? 0 : strlen(client->salt);
    hello.salt.data = (uint8_t *)client->salt;
    kvloom_status status = send_packed(client->shared, &request, -1, error);
    reply_message *reply = NULL;
    int fd = -1;
    if (status == KVLOOM_OK) {
        const int64_t deadline_ns = client_now_ns() + HELLO_MS * KVL_NS_PER_MS;
        status = await(client, request.number, deadline_ns, &reply, &fd, error);
    }
    if (status == KVLOOM_OK && reply->status < 0) {
        status = client_fail(error, reply->status, "the sidecar refused: %.400s", reply->text);
    }
    if (fd >= 0) (void)close(fd);
    client_reply_end(reply);
    return status;
}

static kvloom_status dial(kvloom_client *client, kvloom_error *error)
{
    kvl_error inner;
    int fd = -1;
    if (kvl_local_dial(client->path, &fd, &inner) < 0) return client_fail_as(error, &inner);
    struct epoll_event event = {.events = EPOLLIN};
    if (epoll_ctl(client->poll_fd, EPOLL_CTL_ADD, fd, &event) != 0) {
        (void)close(fd);
        return client_fail(error, KVLOOM_ERR_IO, "cannot watch a socket: %s", strerror(errno));
    }
    (void)pthread_mutex_lock(&client->shared->lock);
    kvl_local_link_init(&client->shared->link, fd);
    client->shared->generation++;
    (void)pthread_mutex_unlock(&client->shared->lock);
    const kvloom_status status = greet(client, error);
    if (status < 0) hang_up(client);
    return status;
}

kvloom_status client_send(kvloom_client *client, request_message *request, int fd,
                          kvloom_error *error)
{
    /* A sidecar that went away meanwhile is noticed here, and another one is dialled. */
    for (int round = 0;; round++) {
        if (client->shared->link.fd < 0) {
            const kvloom_status status = dial(client, error);
            if (status < 0) return status;
        }
        request->number = ++client->last_number;
        const kvloom_status status = send_packed(client->shared, request, fd, error);
        if (status != KVLOOM_ERR_UNREACHABLE) return status;
        lose(client);
        if (round > 0) return status;
    }
}

kvloom_status client_call(kvloom_client *client, request_message *request, int fd,
                          uint32_t deadline_ms, reply_message **reply, int *got_fd,
                          kvloom_error *error)
{
    int taken = -1;
    *reply = NULL;
    if (got_fd != NULL) *got_fd = -1;
    if (deadline_ms == 0 || deadline_ms > KVLOOM_CALL_MS_MAX) deadline_ms = KVLOOM_CALL_MS_MAX;
    const int64_t deadline_ns = client_now_ns() + ((int64_t)deadline_ms + GRACE_MS) * KVL_NS_PER_MS;
    kvloom_status status = KVLOOM_OK;
    /* Every request may be repeated: ids follow from content, what is there already stays. */
    for (int round = 0; round < 2; round++) {
        status = client_send(client, request, fd, error);
        if (status < 0) return status;
        status = await(client, request->number, deadline_ns, reply, &taken, error);
        if (status != KVLOOM_ERR_UNREACHABLE) break;
    }
    if (status == KVLOOM_OK && (*reply)->status < 0) {
        status = client_fail(error, (*reply)->status, "%s", (*reply)->text);
    }
    if (status < 0) {
        client_reply_end(*reply);
        *reply = NULL;
    }
    if (got_fd != NULL && status == KVLOOM_OK) {
        *got_fd = taken;
    } else if (taken >= 0) {
        (void)close(taken);
    }
    return status;
}

int kvloom_fd(const kvloom_client *client)
{
    return client->poll_fd;
}

kvloom_status kvloom_dispatch(kvloom_client *client, kvloom_error *error)
{
    uint64_t count = 0;
    (void)!read(client->news_fd, &count, sizeof count);
    if (client->shared->link.fd < 0) return KVLOOM_OK;
    kvl_status read = kvl_local_link_read(&client->shared->link);
    for (;;) {
        reply_message *reply = NULL;
        int fd = -1;
        const kvloom_status status = next_reply(client, &reply, &fd, error);
        if (status == KVLOOM_OK) hand_over(client, reply, fd);
        if (status == KVLOOM_IN_PROGRESS) break;
        if (status < 0) read = KVL_ERR_UNREACHABLE;
        if (status < 0) break;
    }
    if (read == KVL_OK) return KVLOOM_OK;
    lose(client);
    return client_fail(error, KVLOOM_ERR_UNREACHABLE, "the sidecar ended the connection");
}

/* ---- keys ---- */

kvloom_status client_key(const kvloom_key *key, Kvloom__Local__V1__Key *message,
                         kvloom_error *error)
{
    if (key->tokens == NULL || key->n_tokens == 0 || key->n_tokens > KVL_SEGMENT_TOKENS_MAX ||
        key->n_home > KVL_SEGMENT_TOKENS_MAX || (key->n_home > 0 && key->home == NULL)) {
        return client_fail(error, KVLOOM_ERR_INVALID,
                           "a key has 1 .. %u tokens and a home of at most as many",
                           KVL_SEGMENT_TOKENS_MAX);
    }
    kvloom__local__v1__key__init(message);
    message->tokens.len = key->n_tokens * sizeof *key->tokens;
    message->tokens.data = (uint8_t *)(uintptr_t)key->tokens; /* only read */
    message->home.len = key->n_home * sizeof *key->home;
    message->home.data = (uint8_t *)(uintptr_t)key->home;
    return KVLOOM_OK;
}

void client_key_id(const kvloom_digest *id, Kvloom__Local__V1__Key *message)
{
    kvloom__local__v1__key__init(message);
    message->id.len = sizeof id->bytes;
    message->id.data = (uint8_t *)(uintptr_t)id->bytes;
}

/* ---- life ---- */

static kvloom_status set_options(kvloom_client *client, const kvloom_options *options,
                                 kvloom_error *error)
{
    const char *path = options->socket;
    if (path == NULL) path = getenv("KVLOOM_SOCKET");
    if (path == NULL || path[0] == '\0') path = "/run/kvloom/sidecar.sock";
    if (strlen(path) >= sizeof client->path) {
        return client_fail(error, KVLOOM_ERR_INVALID, "the socket's path is longer than %zu bytes",
                           sizeof client->path - 1);
    }
    (void)snprintf(client->path, sizeof client->path, "%s", path);
    if (options->name == NULL) {
        (void)snprintf(client->name, sizeof client->name, "%ld", (long)getpid());
    } else if (strlen(options->name) >= sizeof client->name) {
        return client_fail(error, KVLOOM_ERR_INVALID, "a client's name has at most %zu bytes",
                           sizeof client->name - 1);
    } else {
        (void)snprintf(client->name, sizeof client->name, "%s", options->name);
    }
    client->fingerprint = options->fingerprint;
    client->shape = options->shape;
    if (options->salt == NULL) return KVLOOM_OK;
    client->salt = kvl_strdup(options->salt);
    return client->salt != NULL ? KVLOOM_OK
                                : client_fail(error, KVLOOM_ERR_NO_MEMORY, "no memory for a salt");
}

static kvloom_status open_descriptors(kvloom_client *client, kvloom_error *error)
{
    client->poll_fd = epoll_create1(EPOLL_CLOEXEC);
    client->news_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN};
    if (client->poll_fd < 0 || client->news_fd < 0 ||
        epoll_ctl(client->poll_fd, EPOLL_CTL_ADD, client->news_fd, &event) != 0) {
        return client_fail(error, KVLOOM_ERR_IO, "cannot make descriptors: %s", strerror(errno));
    }
    return KVLOOM_OK;
}

kvloom_status kvloom_connect(const kvloom_options *options, kvloom_client **out,
                             kvloom_error *error)
{
    *out = NULL;
    kvloom_client *client = kvl_alloc_zero(1, sizeof *client);
    shared_link *shared = kvl_alloc_zero(1, sizeof *shared);
    if (client == NULL || shared == NULL) {
        kvl_free(client);
        kvl_free(shared);
        return client_fail(error, KVLOOM_ERR_NO_MEMORY, "no memory for a client");
    }
    client->poll_fd = client->news_fd = client->staging_fd = -1;
    client->shared = shared;
    atomic_init(&shared->n_references, 1);
    (void)pthread_mutex_init(&shared->lock, NULL);
    kvl_local_link_init(&shared->link, -1);
    kvloom_status status = set_options(client, options, error);
    if (status == KVLOOM_OK) status = open_descriptors(client, error);
    if (status == KVLOOM_OK) status = dial(client, error);
    if (status < 0) {
        kvloom_close(client);
        return status;
    }
    *out = client;
    return KVLOOM_OK;
}

void kvloom_close(kvloom_client *client)
{
    if (client == NULL) return;
    hang_up(client);
    client_transfers_fail(client, KVLOOM_ERR_CANCELLED, "the client was closed");
    client_shared_release(client->shared);
    if (client->staging != NULL) (void)munmap(client->staging, client->staging_bytes);
    if (client->staging_fd >= 0) (void)close(client->staging_fd);
    if (client->poll_fd >= 0) (void)close(client->poll_fd);
    if (client->news_fd >= 0) (void)close(client->news_fd);
    kvl_free(client->put_ids);
    kvl_free(client->salt);
    kvl_free(client);
}
