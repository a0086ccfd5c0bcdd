/* exchange/zmq_transport.c: sockets.
 *
 * ZMQ_IMMEDIATE keeps a DEALER from queueing for a peer that is not there, ROUTER_MANDATORY makes a
 * lost client an error instead of silence, ROUTER_HANDOVER lets a client that reconnects take its
 * name over from its own dead connection. A multi-part message is atomic in ZeroMQ: once the first
 * part is accepted or has arrived, so are the others. */
#include "exchange/zmq_transport.h"

#include "base/alloc.h"
#include "base/log.h"
#include "base/random.h"
#include "exchange/local.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>
#include <zmq.h>

enum {
    PARTS_MAX = 2 + KVL_FRAMES_MAX, /* identity, control, bulk */
    IDENTITY_BYTES_MAX = 255,
    POLL_ITEMS_MAX = 3 + 2 * KVL_PEERS_MAX,
    RECONNECT_MS = 20,
    RECONNECT_MS_MAX = 200,
    HANDSHAKE_MS = 2000,
    ZAP_FRAMES = 7, /* ZeroMQ's RFC 27: version, request, domain, address, identity, CURVE, key */
};

typedef struct client {
    bool used;
    uint8_t n_bytes;
    uint8_t identity[IDENTITY_BYTES_MAX];
    char key[KVL_KEY_TEXT_BYTES]; /* "": none was asked for */
} client;

struct kvl_transport {
    void *zmq;
    int wake_fd;
    void *router; /* NULL: nobody can dial us */
    void *zap;    /* who is asked about keys; NULL without keys */
    kvl_key_pair keys;
    bool has_keys, router_has_keys;
    kvl_allow_list *allow_list;
    _Atomic uint64_t n_refused;
    uint32_t n_peers;
    void *dealers[KVL_PEERS_MAX];
    void *monitors[KVL_PEERS_MAX];
    client clients[KVL_CLIENTS_MAX];
    uint32_t last_client; /* where the latest message came from: most often the next one too */
    zmq_pollitem_t items[POLL_ITEMS_MAX];
    char socket_path[sizeof((struct sockaddr_un *)NULL)->sun_path]; /* "": no file of ours */
    dev_t socket_device;
    ino_t socket_inode;
};

/* ---- endpoints ---- */

static kvl_status check_ipc(const char *endpoint, const char *path, kvl_error *error)
{
    const size_t path_bytes_max = sizeof((struct sockaddr_un *)NULL)->sun_path - 1;
    if (path[0] == '\0' || path[0] == '@' || path[0] == '*') {
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "endpoint %.200s: after ipc:// there must be the path of a file", endpoint);
    }
    if (strlen(path) > path_bytes_max) {
        return KVL_FAIL(
            error, KVL_ERR_INVALID,
            "endpoint %.200s: the path has %zu bytes, the system allows %zu: use a shorter one",
            endpoint, strlen(path), path_bytes_max);
    }
    return KVL_OK;
}

/* A name of the loopback, as people write it. */
static bool is_loopback(const char *address, size_t n)
{
    unsigned a = 0, b = 0, c = 0;
    int used = 0;
    const bool v4 = sscanf(address, "127.%3u.%3u.%3u%n", &a, &b, &c, &used) == 3 &&
                    (size_t)used == n && a < 256 && b < 256 && c < 256;
    const bool v6 = n == strlen("[::1]") && strncmp(address, "[::1]", n) == 0;
    return v4 || v6 || (n == strlen("localhost") && strncmp(address, "localhost", n) == 0);
}

static kvl_status check_tcp(const char *endpoint, const char *address, bool has_keys,
                            kvl_error *error)
{
    const char *colon = strrchr(address, ':');
    char *end = NULL;
    errno = 0;
    const unsigned long port = colon == NULL ? 0 : strtoul(colon + 1, &end, 10);
    if (colon == NULL || colon[1] < '0' || colon[1] > '9' || errno != 0 || *end != '\0' ||
        port == 0 || port > 65535) {
        return KVL_FAIL(error, KVL_ERR_INVALID, "endpoint %.200s: must end with a port, 1 to 65535",
                        endpoint);
    }
    if (has_keys || is_loopback(address, (size_t)(colon - address))) return KVL_OK;
    return KVL_FAIL(
        error, KVL_ERR_DENIED,
        "endpoint %.200s is not on this machine's loopback: between machines both sides "
        "need keys and whoever listens an allow-list; see `kvloom keygen --help`",
        endpoint);
}

kvl_status kvl_endpoint_check(const char *endpoint, bool has_keys, kvl_error *error)
{
    if (strncmp(endpoint, "ipc://", 6) == 0) return check_ipc(endpoint, endpoint + 6, error);
    if (strncmp(endpoint, "tcp://", 6) == 0)
        return check_tcp(endpoint, endpoint + 6, has_keys, error);
    return KVL_FAIL(error, KVL_ERR_INVALID, "endpoint %.200s: must begin with ipc:// or tcp://",
                    endpoint);
}

static kvl_status fail_errno(kvl_error *error, const char *what, const char *endpoint)
{
    return KVL_FAIL(error, KVL_ERR_IO, "cannot %s %.200s: %s", what, endpoint, zmq_strerror(errno));
}

/* ZeroMQ itself would just unlink the file of a living host. */
static kvl_status make_way(const char *path, kvl_error *error)
{
    kvl_error inner;
    if (kvl_local_make_way(path, &inner) == KVL_OK) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_IO, "%s", inner.text);
}

/* ---- opening and closing ---- */

static void set_int(void *socket, int option, int value)
{
    KVL_ASSERT(zmq_setsockopt(socket, option, &value, sizeof value) == 0);
}

static void set_text(void *socket, int option, const char *text)
{
    KVL_ASSERT(zmq_setsockopt(socket, option, text, strlen(text)) == 0);
}

/* Between machines a connection may die without a word. */
static void notice_dead_connections(void *socket)
{
    set_int(socket, ZMQ_HEARTBEAT_IVL, 1000);
    set_int(socket, ZMQ_HEARTBEAT_TIMEOUT, 5000);
}

/* Every queue has an end, and no frame is larger than the protocol's: ZeroMQ cuts a connection that
 * announces more before it allocates anything. */
static void *open_socket(kvl_transport *t, int type)
{
    void *socket = zmq_socket(t->zmq, type);
    if (socket == NULL) return NULL;
    set_int(socket, ZMQ_LINGER, KVL_LINGER_MS);
    set_int(socket, ZMQ_SNDHWM, KVL_SEND_QUEUE_MESSAGES_MAX);
    set_int(socket, ZMQ_RCVHWM, KVL_RECEIVE_QUEUE_MESSAGES_MAX);
    const int64_t bytes_max = KVL_FRAME_BYTES_MAX;
    KVL_ASSERT(zmq_setsockopt(socket, ZMQ_MAXMSGSIZE, &bytes_max, sizeof bytes_max) == 0);
    set_int(socket, ZMQ_HANDSHAKE_IVL, HANDSHAKE_MS);
    return socket;
}

static kvl_status bind_router(kvl_transport *t, const char *endpoint, kvl_error *error)
{
    const bool is_file = strncmp(endpoint, "ipc://", 6) == 0;
    const char *path = endpoint + 6;
    if (is_file) KVL_TRY(make_way(path, error));
    t->router = open_socket(t, ZMQ_ROUTER);
    if (t->router == NULL) return fail_errno(error, "open a socket for", endpoint);
    set_int(t->router, ZMQ_ROUTER_MANDATORY, 1);
    set_int(t->router, ZMQ_ROUTER_HANDOVER, 1);
    if (!is_file && t->has_keys) {
        t->router_has_keys = true;
        set_int(t->router, ZMQ_CURVE_SERVER, 1);
        set_text(t->router, ZMQ_CURVE_SECRETKEY, t->keys.secret_key);
        set_text(t->router, ZMQ_ZAP_DOMAIN, "kvloom");
        notice_dead_connections(t->router);
    }
    if (zmq_bind(t->router, endpoint) != 0) return fail_errno(error, "listen at", endpoint);
    if (!is_file) return KVL_OK;
    struct stat about;
    if (chmod(path, 0600) != 0 || lstat(path, &about) != 0)
        return fail_errno(error, "protect", path);
    (void)snprintf(t->socket_path, sizeof t->socket_path, "%s", path);
    t->socket_device = about.st_dev;
    t->socket_inode = about.st_ino;
    return KVL_OK;
}

/* ZeroMQ leaves the file where it is. It is removed only while it is still ours. */
static void remove_socket_file(const kvl_transport *t)
{
    struct stat about;
    if (t->socket_path[0] == '\0' || lstat(t->socket_path, &about) != 0) return;
    if (about.st_dev == t->socket_device && about.st_ino == t->socket_inode) {
        (void)unlink(t->socket_path);
    }
}

/* The identity has 64 random bits in it, drawn for this connection: a restarted process never
 * inherits what waits for the one before it, and nobody but the server at the other end can know it
 * and take its place there. */
static kvl_status dial(kvl_transport *t, const kvl_transport_options *options, uint32_t i,
                       kvl_error *error)
{
    const char *endpoint = options->peers[i].endpoint;
    char identity[KVL_NAME_BYTES_MAX + 18];
    uint64_t nobody_knows = 0;
    kvl_random_secret(&nobody_knows, sizeof nobody_knows);
    const int n =
        snprintf(identity, sizeof identity, "%s#%016" PRIx64, options->name, nobody_knows);
    KVL_ASSERT(n > 0 && (size_t)n < sizeof identity);
    void *dealer = t->dealers[i] = open_socket(t, ZMQ_DEALER);
    if (dealer == NULL) return fail_errno(error, "open a socket for", endpoint);
    KVL_ASSERT(zmq_setsockopt(dealer, ZMQ_ROUTING_ID, identity, (size_t)n) == 0);
    set_int(dealer, ZMQ_IMMEDIATE, 1);
    if (strncmp(endpoint, "tcp://", 6) == 0 && options->peers[i].public_key != NULL) {
        set_text(dealer, ZMQ_CURVE_SERVERKEY, options->peers[i].public_key);
        set_text(dealer, ZMQ_CURVE_PUBLICKEY, t->keys.public_key);
        set_text(dealer, ZMQ_CURVE_SECRETKEY, t->keys.secret_key);
        notice_dead_connections(dealer);
    }
    set_int(dealer, ZMQ_RECONNECT_IVL, RECONNECT_MS);
    set_int(dealer, ZMQ_RECONNECT_IVL_MAX, RECONNECT_MS_MAX);

    char watch[64];
    (void)snprintf(watch, sizeof watch, "inproc://monitor-%u", i);
    if (zmq_socket_monitor(dealer, watch, ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED) !=
        0) {
        return fail_errno(error, "watch the connection to", endpoint);
    }
    t->monitors[i] = zmq_socket(t->zmq, ZMQ_PAIR);
    if (t->monitors[i] == NULL || zmq_connect(t->monitors[i], watch) != 0) {
        return fail_errno(error, "watch the connection to", endpoint);
    }
    if (zmq_connect(dealer, endpoint) != 0) return fail_errno(error, "dial", endpoint);
    return KVL_OK;
}

/* Before any socket that has keys: ZeroMQ asks here during each handshake. */
static kvl_status open_zap(kvl_transport *t, kvl_error *error)
{
    t->zap = zmq_socket(t->zmq, ZMQ_REP);
    if (t->zap != NULL && zmq_bind(t->zap, "inproc://zeromq.zap.01") == 0) return KVL_OK;
    return fail_errno(error, "answer for keys at", "inproc://zeromq.zap.01");
}

static kvl_status open_all(kvl_transport *t, const kvl_transport_options *options, kvl_error *error)
{
    t->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (t->wake_fd < 0) return fail_errno(error, "make an eventfd for", options->name);
    t->zmq = zmq_ctx_new();
    if (t->zmq == NULL) return fail_errno(error, "start ZeroMQ for", options->name);
    if (t->has_keys) KVL_TRY(open_zap(t, error));
    if (options->endpoint != NULL) KVL_TRY(bind_router(t, options->endpoint, error));
    t->n_peers = (uint32_t)options->n_peers;
    for (uint32_t i = 0; i < t->n_peers; i++) KVL_TRY(dial(t, options, i, error));

    t->items[0] = (zmq_pollitem_t){.fd = t->wake_fd, .events = ZMQ_POLLIN};
    /* Without a router its place in the list stands for the eventfd once more. */
    t->items[1] = (zmq_pollitem_t){.socket = t->router, .fd = t->wake_fd, .events = ZMQ_POLLIN};
    t->items[2] = (zmq_pollitem_t){.socket = t->zap, .fd = t->wake_fd, .events = ZMQ_POLLIN};
    for (uint32_t i = 0; i < t->n_peers; i++) {
        t->items[3 + 2 * i] = (zmq_pollitem_t){.socket = t->dealers[i], .events = ZMQ_POLLIN};
        t->items[4 + 2 * i] = (zmq_pollitem_t){.socket = t->monitors[i], .events = ZMQ_POLLIN};
    }
    return KVL_OK;
}

/* Keys without a list would let anybody in: ZeroMQ takes every key unless somebody refuses. */
static kvl_status check_all(const kvl_transport_options *options, kvl_error *error)
{
    const bool has_keys = options->keys != NULL;
    if (options->endpoint != NULL) {
        KVL_TRY(kvl_endpoint_check(options->endpoint, has_keys, error));
        const bool is_tcp = strncmp(options->endpoint, "tcp://", 6) == 0;
        if (is_tcp && has_keys && options->allow_list == NULL) {
            return KVL_FAIL(
                error, KVL_ERR_DENIED,
                "endpoint %.200s has keys but no allow-list: name those who may connect",
                options->endpoint);
        }
    }
    if (has_keys && zmq_has("curve") != 1) {
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED, "this libzmq was built without CURVE");
    }
    for (size_t i = 0; i < options->n_peers; i++) {
        const kvl_exchange_peer *peer = &options->peers[i];
        KVL_TRY(kvl_endpoint_check(peer->endpoint, has_keys && peer->public_key != NULL, error));
        if (peer->public_key == NULL) continue;
        if (!has_keys || !kvl_key_text_is_valid(peer->public_key)) {
            return KVL_FAIL(error, KVL_ERR_INVALID, "peer %s: %s", peer->name,
                            has_keys ? "its public key is not one of `kvloom keygen`"
                                     : "it has a public key, but there is no key pair of our own");
        }
    }
    return KVL_OK;
}

kvl_status kvl_transport_open(const kvl_transport_options *options, kvl_transport **transport,
                              kvl_error *error)
{
    *transport = NULL;
    KVL_ASSERT(options->n_peers <= KVL_PEERS_MAX);
    KVL_TRY(check_all(options, error));
    kvl_transport *t = kvl_alloc_zero(1, sizeof *t);
    if (t == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the transport");
    t->wake_fd = -1;
    t->has_keys = options->keys != NULL;
    if (t->has_keys) t->keys = *options->keys;
    t->allow_list = options->allow_list;
    const kvl_status status = open_all(t, options, error);
    if (status < 0) {
        kvl_transport_close(t);
        return status;
    }
    *transport = t;
    return KVL_OK;
}

/* Ending the context waits for ZeroMQ's thread, so after this no frame is held any more. */
void kvl_transport_close(kvl_transport *t)
{
    if (t == NULL) return;
    remove_socket_file(t);
    for (uint32_t i = 0; i < KVL_PEERS_MAX; i++) {
        if (t->dealers[i] != NULL) (void)zmq_socket_monitor(t->dealers[i], NULL, 0);
        if (t->monitors[i] != NULL) (void)zmq_close(t->monitors[i]);
        if (t->dealers[i] != NULL) (void)zmq_close(t->dealers[i]);
    }
    if (t->router != NULL) (void)zmq_close(t->router);
    if (t->zap != NULL) (void)zmq_close(t->zap);
    if (t->zmq != NULL) {
        while (zmq_ctx_term(t->zmq) != 0 && errno == EINTR) continue;
    }
    if (t->wake_fd >= 0) (void)close(t->wake_fd);
    kvl_key_pair_wipe(&t->keys);
    kvl_free(t);
}

/* ---- sending ---- */

static void release_container(void *bytes, void *container)
{
    (void)bytes;
    kvl_container_release(container);
}

static void release_bulk(void *bytes, void *bulk)
{
    (void)bytes;
    kvl_bulk_release(bulk);
}

/* The reference is taken after the message exists: from then on ZeroMQ is sure to release it, even
 * when the message is never sent. */
static bool make_part(zmq_msg_t *part, const void *bytes, size_t n_bytes, kvl_owner owner)
{
    const bool owned = owner.container != NULL || owner.bulk != NULL;
    if (!owned || n_bytes < KVL_ZERO_COPY_BYTES_MIN) {
        if (zmq_msg_init_size(part, n_bytes) != 0) return false;
        if (n_bytes > 0) memcpy(zmq_msg_data(part), bytes, n_bytes);
        return true;
    }
    /* ZeroMQ only reads what it sends; its interface has no word for that. */
    void *data = (void *)(uintptr_t)bytes;
    if (owner.container != NULL) {
        if (zmq_msg_init_data(part, data, n_bytes, release_container, owner.container) != 0) {
            return false;
        }
        kvl_container_share(owner.container);
        return true;
    }
    if (zmq_msg_init_data(part, data, n_bytes, release_bulk, owner.bulk) != 0) return false;
    kvl_bulk_share(owner.bulk);
    return true;
}

static void close_parts(zmq_msg_t *parts, size_t n_parts)
{
    for (size_t i = 0; i < n_parts; i++) (void)zmq_msg_close(&parts[i]);
}

static kvl_status send_parts(void *socket, zmq_msg_t *parts, size_t n_parts)
{
    for (size_t i = 0; i < n_parts; i++) {
        const int more = i + 1 < n_parts ? ZMQ_SNDMORE : 0;
        if (zmq_msg_send(&parts[i], socket, ZMQ_DONTWAIT | more) >= 0) continue;
        const bool nobody = errno == EHOSTUNREACH;
        close_parts(parts + i, n_parts - i);
        return nobody ? KVL_ERR_UNREACHABLE : KVL_ERR_BUSY;
    }
    return KVL_OK;
}

kvl_status kvl_transport_send(kvl_transport *t, kvl_link link, const void *control,
                              size_t n_control_bytes, const kvl_frame *frames, size_t n_frames,
                              kvl_owner owner)
{
    zmq_msg_t parts[PARTS_MAX];
    size_t n = 0;
    void *socket = NULL;
    bool made = true;
    if (link >= KVL_LINK_CLIENT) {
        const client *to = &t->clients[link - KVL_LINK_CLIENT];
        if (!to->used) return KVL_ERR_UNREACHABLE;
        socket = t->router;
        made = make_part(&parts[n], to->identity, to->n_bytes, (kvl_owner){NULL, NULL});
        n += made ? 1 : 0;
    } else {
        socket = t->dealers[link];
    }
    made = made && make_part(&parts[n], control, n_control_bytes, (kvl_owner){NULL, NULL});
    n += made ? 1 : 0;
    for (size_t i = 0; made && i < n_frames; i++) {
        made = make_part(&parts[n], frames[i].bytes, frames[i].n_bytes, owner);
        n += made ? 1 : 0;
    }
    if (!made) {
        close_parts(parts, n);
        return KVL_ERR_NO_MEMORY;
    }
    return send_parts(socket, parts, n);
}

/* ---- receiving ---- */

/* One whole message. Returns the number of its parts, of which only the first PARTS_MAX are kept;
 * 0 when there is none. */
static size_t receive_parts(void *socket, zmq_msg_t parts[PARTS_MAX])
{
    size_t n = 0;
    for (bool more = true; more; n++) {
        zmq_msg_t surplus;
        zmq_msg_t *part = n < PARTS_MAX ? &parts[n] : &surplus;
        (void)zmq_msg_init(part);
        if (zmq_msg_recv(part, socket, ZMQ_DONTWAIT) < 0) {
            (void)zmq_msg_close(part);
            return n;
        }
        more = zmq_msg_more(part) != 0;
        if (part == &surplus) (void)zmq_msg_close(part);
    }
    return n;
}

/* The key that the connection of a message has proved to hold; "" for ipc and plain tcp. */
static const char *key_of(zmq_msg_t *part)
{
    const char *key = zmq_msg_gets(part, "User-Id");
    return key == NULL ? "" : key;
}

/* False: the key is not on the list any more. */
static bool admit(kvl_transport *t, uint32_t slot, const kvl_transport_events *events)
{
    const client *it = &t->clients[slot];
    kvl_access access;
    if (it->key[0] == '\0') {
        /* Where keys are asked for, a message without one is nobody's. */
        if (t->router_has_keys) return false;
        events->admitted(events->context, KVL_LINK_CLIENT + slot, NULL);
        return true;
    }
    if (!kvl_allow_list_find(t->allow_list, it->key, &access)) return false;
    events->admitted(events->context, KVL_LINK_CLIENT + slot, &access);
    return true;
}

/* The slot of an identity, a fresh one if it is new; KVL_CLIENTS_MAX when all are taken, or when
 * the identity is another key's. */
static uint32_t find_client(kvl_transport *t, zmq_msg_t *parts, const kvl_transport_events *events)
{
    const void *identity = zmq_msg_data(&parts[0]);
    const size_t n_bytes = zmq_msg_size(&parts[0]);
    const char *key = key_of(&parts[1]); /* the identity's frame is ZeroMQ's own and has none */
    uint32_t fresh = KVL_CLIENTS_MAX;
    for (uint32_t k = 0; k < KVL_CLIENTS_MAX; k++) {
        const uint32_t i = (t->last_client + k) % KVL_CLIENTS_MAX;
        const client *it = &t->clients[i];
        if (!it->used) {
            if (fresh == KVL_CLIENTS_MAX) fresh = i;
        } else if (it->n_bytes == n_bytes && memcmp(it->identity, identity, n_bytes) == 0) {
            if (strcmp(it->key, key) != 0) return KVL_CLIENTS_MAX;
            t->last_client = i;
            return i;
        }
    }
    if (fresh == KVL_CLIENTS_MAX || n_bytes > IDENTITY_BYTES_MAX) return KVL_CLIENTS_MAX;
    client *it = &t->clients[fresh];
    it->n_bytes = (uint8_t)n_bytes;
    memcpy(it->identity, identity, n_bytes);
    (void)snprintf(it->key, sizeof it->key, "%s", key);
    if (!admit(t, fresh, events)) return KVL_CLIENTS_MAX;
    it->used = true;
    return fresh;
}

void kvl_transport_recheck(kvl_transport *t, const kvl_transport_events *events)
{
    for (uint32_t slot = 0; slot < KVL_CLIENTS_MAX; slot++) {
        if (!t->clients[slot].used || admit(t, slot, events)) continue;
        events->disconnected(events->context, KVL_LINK_CLIENT + slot);
        t->clients[slot].used = false;
    }
}

int kvl_transport_wake_fd(const kvl_transport *t)
{
    return t->wake_fd;
}

uint64_t kvl_transport_n_refused(const kvl_transport *t)
{
    return atomic_load(&t->n_refused);
}

void kvl_transport_forget(kvl_transport *t, kvl_link link)
{
    KVL_ASSERT(link >= KVL_LINK_CLIENT && link < KVL_LINKS_MAX);
    t->clients[link - KVL_LINK_CLIENT].used = false;
}

static void hand_over(kvl_link link, zmq_msg_t *parts, size_t n_parts, size_t n_parts_max,
                      const kvl_transport_events *events)
{
    if (n_parts > n_parts_max) {
        events->overlong(events->context, link);
        return;
    }
    kvl_frame frames[KVL_FRAMES_MAX];
    for (size_t i = 1; i < n_parts; i++) {
        frames[i - 1].bytes = zmq_msg_data(&parts[i]);
        frames[i - 1].n_bytes = zmq_msg_size(&parts[i]);
    }
    events->message(events->context, link, zmq_msg_data(&parts[0]), zmq_msg_size(&parts[0]), frames,
                    n_parts - 1);
}

static void drain_router(kvl_transport *t, const kvl_transport_events *events)
{
    zmq_msg_t parts[PARTS_MAX];
    for (int turn = 0; turn < KVL_MESSAGES_PER_TURN; turn++) {
        const size_t n = receive_parts(t->router, parts);
        if (n == 0) return;
        /* An identity alone is no message; without a free slot there is nobody to answer to. */
        const uint32_t slot = n < 2 ? KVL_CLIENTS_MAX : find_client(t, parts, events);
        if (slot < KVL_CLIENTS_MAX) {
            hand_over(KVL_LINK_CLIENT + slot, parts + 1, n - 1, 1 + KVL_FRAMES_MAX, events);
        }
        close_parts(parts, n < PARTS_MAX ? n : PARTS_MAX);
    }
}

static void drain_dealer(kvl_transport *t, uint32_t peer, int n_turns,
                         const kvl_transport_events *events)
{
    zmq_msg_t parts[PARTS_MAX];
    for (int turn = 0; turn < n_turns; turn++) {
        const size_t n = receive_parts(t->dealers[peer], parts);
        if (n == 0) return;
        hand_over(peer, parts, n, 1 + KVL_FRAMES_MAX, events);
        close_parts(parts, n < PARTS_MAX ? n : PARTS_MAX);
    }
}

/* The events come in the order in which they happened, each in a message of its own. */
static void drain_monitor(kvl_transport *t, uint32_t peer, const kvl_transport_events *events)
{
    for (;;) {
        zmq_msg_t parts[PARTS_MAX];
        const size_t n = receive_parts(t->monitors[peer], parts);
        if (n == 0) return;
        uint16_t what = 0;
        if (zmq_msg_size(&parts[0]) >= sizeof what)
            memcpy(&what, zmq_msg_data(&parts[0]), sizeof what);
        close_parts(parts, n);
        if (what == ZMQ_EVENT_HANDSHAKE_SUCCEEDED) {
            /* Asking for events lets the socket take note of its new connection, so that the Hello
             * that follows finds it. */
            int pending = 0;
            size_t size = sizeof pending;
            (void)zmq_getsockopt(t->dealers[peer], ZMQ_EVENTS, &pending, &size);
            events->connected(events->context, peer);
        } else if (what == ZMQ_EVENT_DISCONNECTED) {
            /* Its last words first: they may complete a request. */
            drain_dealer(t, peer, KVL_RECEIVE_QUEUE_MESSAGES_MAX, events);
            events->disconnected(events->context, peer);
        }
    }
}

static void answer_zap(kvl_transport *t, zmq_msg_t *parts, const char *status, const char *key)
{
    const char *texts[] = {"1.0", NULL, status, status[0] == '2' ? "" : "not on the allow-list",
                           key,   ""};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        const int more = i + 1 < sizeof texts / sizeof *texts ? ZMQ_SNDMORE : 0;
        const void *bytes = texts[i] != NULL ? texts[i] : zmq_msg_data(&parts[1]);
        const size_t n = texts[i] != NULL ? strlen(texts[i]) : zmq_msg_size(&parts[1]);
        (void)zmq_send(t->zap, bytes, n, more | ZMQ_DONTWAIT);
    }
}

/* Who is on the list may come in, under the name of its key; the list decides, and nothing that the
 * other side says. */
static void drain_zap(kvl_transport *t)
{
    zmq_msg_t parts[PARTS_MAX];
    for (;;) {
        const size_t n = receive_parts(t->zap, parts);
        if (n == 0) return;
        char key[KVL_KEY_TEXT_BYTES] = "";
        const bool is_curve = n == ZAP_FRAMES && zmq_msg_size(&parts[5]) == strlen("CURVE") &&
                              memcmp(zmq_msg_data(&parts[5]), "CURVE", 5) == 0 &&
                              zmq_msg_size(&parts[6]) == KVL_PUBLIC_KEY_BYTES;
        if (is_curve) (void)zmq_z85_encode(key, zmq_msg_data(&parts[6]), KVL_PUBLIC_KEY_BYTES);
        const bool may_enter =
            is_curve && t->allow_list != NULL && kvl_allow_list_find(t->allow_list, key, NULL);
        if (!may_enter) {
            atomic_fetch_add(&t->n_refused, 1);
            kvl_log(KVL_LOG_WARN, "key_refused", "key=%s", key);
        }
        if (n >= 2) answer_zap(t, parts, may_enter ? "200" : "400", may_enter ? key : "");
        close_parts(parts, n < PARTS_MAX ? n : PARTS_MAX);
    }
}

void kvl_transport_wake(kvl_transport *t)
{
    const uint64_t one = 1;
    (void)!write(t->wake_fd, &one, sizeof one);
}

void kvl_transport_poll(kvl_transport *t, int timeout_ms, const kvl_transport_events *events)
{
    zmq_pollitem_t *items = t->items;
    const int n_items = (int)(3 + 2 * t->n_peers);
    if (zmq_poll(items, n_items, timeout_ms) <= 0) return;
    if ((items[0].revents & ZMQ_POLLIN) != 0) {
        uint64_t count = 0;
        (void)!read(t->wake_fd, &count, sizeof count);
    }
    if (t->zap != NULL && (items[2].revents & ZMQ_POLLIN) != 0) drain_zap(t);
    if (t->router != NULL && (items[1].revents & ZMQ_POLLIN) != 0) drain_router(t, events);
    for (uint32_t i = 0; i < t->n_peers; i++) {
        if ((items[3 + 2 * i].revents & ZMQ_POLLIN) != 0) {
            drain_dealer(t, i, KVL_MESSAGES_PER_TURN, events);
        }
        if ((items[4 + 2 * i].revents & ZMQ_POLLIN) != 0) drain_monitor(t, i, events);
    }
}
