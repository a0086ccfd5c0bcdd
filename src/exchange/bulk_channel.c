/* exchange/bulk_channel.c: life of the channel, and the half that sends.
 *
 * An outlet is the sending end for one who dialled us. The exchange's thread makes it, gives it
 * messages and dooms it; the sending thread alone touches its socket and its seal, and frees it. So
 * the one lock is held for moments only. */
#include "exchange/bulk_channel.h"

#include "exchange/bulk_state.h"

#include "base/alloc.h"
#include "base/random.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

/* ---- messages that wait ---- */

static void release_owner(kvl_owner owner)
{
    kvl_container_release(owner.container);
    kvl_bulk_release(owner.bulk);
}

static void share_owner(kvl_owner owner)
{
    if (owner.container != NULL) kvl_container_share(owner.container);
    if (owner.bulk != NULL) kvl_bulk_share(owner.bulk);
}

static size_t payload_bytes(const bulk_item *item)
{
    return kvl_frames_bytes(item->frames, item->n_frames);
}

static void end_items(outlet *o)
{
    for (; o->n_items > 0; o->n_items--) {
        release_owner(o->items[o->item_first].owner);
        o->item_first = (o->item_first + 1) % KVL_BULK_QUEUE_MESSAGES_MAX;
    }
}

/* ---- sending ---- */

/* Sends what is left of some bytes. False: not all of it, and *gone says whether ever. */
static bool send_rest(int fd, const uint8_t *bytes, size_t n_bytes, size_t *n_sent, bool *gone)
{
    while (*n_sent < n_bytes) {
        const ssize_t n = send(fd, bytes + *n_sent, n_bytes - *n_sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) *gone = errno != EAGAIN && errno != EWOULDBLOCK;
        if (n < 0) return false;
        *n_sent += (size_t)n;
    }
    return true;
}

static void put_u32(uint8_t *bytes, size_t value)
{
    for (int i = 0; i < 4; i++) bytes[i] = (uint8_t)(value >> (8 * i));
}

/* Adds one record to what is to be sent: its length, then the bytes, sealed or not. */
static bool add_record(outlet *o, const uint8_t *bytes, size_t n_bytes)
{
    const size_t n_sealed = n_bytes + (o->is_sealed ? KVL_SEAL_TAG_BYTES : 0);
    uint8_t *at = o->out + o->n_out;
    put_u32(at, n_sealed);
    if (!o->is_sealed) memcpy(at + 4, bytes, n_bytes);
    if (o->is_sealed && !kvl_seal_close(&o->seal, bytes, n_bytes, at + 4)) return false;
    o->n_out += 4 + n_sealed;
    return true;
}

/* The record that a message begins with: lengths of payload and control, and the control. */
static bool add_head(outlet *o, const bulk_item *item)
{
    uint8_t head[8 + BULK_CONTROL_BYTES_MAX];
    put_u32(head, payload_bytes(item));
    put_u32(head + 4, item->n_control);
    memcpy(head + 8, item->control, item->n_control);
    return add_record(o, head, 8 + item->n_control);
}

/* Where the payload goes on, and how much of it lies in one piece there. */
static const uint8_t *payload_at(const bulk_item *item, size_t at, size_t *n_bytes)
{
    size_t i = 0;
    while (at >= item->frames[i].n_bytes) at -= item->frames[i++].n_bytes;
    *n_bytes = item->frames[i].n_bytes - at;
    return (const uint8_t *)item->frames[i].bytes + at;
}

/* Adds the next piece of a payload. False where it is to be sent from where it lies, or cannot be
 * sealed (*gone). */
static bool add_piece(outlet *o, const bulk_item *item, bool *gone)
{
    size_t n_piece = 0;
    const uint8_t *piece = payload_at(item, o->payload_at, &n_piece);
    if (!o->is_sealed && n_piece > BULK_COPIED_BYTES_MAX) return false;
    if (n_piece > KVL_BULK_RECORD_BYTES) n_piece = KVL_BULK_RECORD_BYTES;
    if (o->is_sealed) {
        if (!add_record(o, piece, n_piece)) *gone = true;
        if (*gone) return false;
    } else {
        memcpy(o->out + o->n_out, piece, n_piece);
        o->n_out += n_piece;
    }
    o->payload_at += n_piece;
    return true;
}

/* Payload without a seal goes out from where it lies. */
static bool send_plain(outlet *o, const bulk_item *item, bool *gone)
{
    while (o->payload_at < payload_bytes(item)) {
        size_t n_piece = 0;
        size_t n_sent = 0;
        const uint8_t *piece = payload_at(item, o->payload_at, &n_piece);
        const bool all = send_rest(o->fd, piece, n_piece, &n_sent, gone);
        o->payload_at += n_sent;
        if (!all) return false;
    }
    return true;
}

static bool first_item(kvl_bulk_channel *c, outlet *o, bulk_item *item)
{
    (void)pthread_mutex_lock(&c->lock);
    const bool has_item = o->state == BULK_READY && o->n_items > 0;
    if (has_item) *item = o->items[o->item_first];
    (void)pthread_mutex_unlock(&c->lock);
    return has_item;
}

static void drop_first_item(kvl_bulk_channel *c, outlet *o, const bulk_item *item)
{
    (void)pthread_mutex_lock(&c->lock);
    o->item_first = (o->item_first + 1) % KVL_BULK_QUEUE_MESSAGES_MAX;
    o->n_items--;
    (void)pthread_mutex_unlock(&c->lock);
    release_owner(item->owner);
    o->is_begun = false;
}

/* Collects records of as many messages as fill one: small blocks by the dozen would otherwise cost
 * a call of the system each. True: there is a payload to be sent from where it lies. */
static bool collect_records(kvl_bulk_channel *c, outlet *o, bulk_item *item, bool *gone)
{
    while (o->n_out < KVL_BULK_RECORD_BYTES && !*gone && first_item(c, o, item)) {
        if (!o->is_begun) {
            if (!add_head(o, item)) *gone = true;
            o->is_begun = true;
            o->payload_at = 0;
        }
        while (!*gone && o->payload_at < payload_bytes(item) && o->n_out < KVL_BULK_RECORD_BYTES) {
            if (!add_piece(o, item, gone)) return !*gone;
        }
        if (!*gone && o->payload_at == payload_bytes(item)) drop_first_item(c, o, item);
    }
    return false;
}

/* Sends messages until there are none, or the socket is full. */
static void pump(kvl_bulk_channel *c, outlet *o)
{
    bool gone = false;
    for (;;) {
        bulk_item item;
        const bool has_plain = collect_records(c, o, &item, &gone);
        if (o->n_out == 0 && !has_plain) break;
        if (gone || !send_rest(o->fd, o->out, o->n_out, &o->n_out_sent, &gone)) break;
        o->n_out = o->n_out_sent = 0;
        if (!has_plain) continue;
        if (!send_plain(o, &item, &gone)) break;
        drop_first_item(c, o, &item);
    }
    if (!gone) return;
    (void)pthread_mutex_lock(&c->lock);
    if (o->state == BULK_READY) o->state = BULK_BROKEN;
    (void)pthread_mutex_unlock(&c->lock);
}

/* ---- those who connect ---- */

static void refuse_stranger(kvl_bulk_channel *c, stranger *s)
{
    /* Counted first: whoever sees the end of the connection finds it counted. */
    atomic_fetch_add(&c->n_refused, 1);
    (void)close(s->fd);
    s->fd = -1;
}

static void take_stranger(kvl_bulk_channel *c)
{
    const int fd = accept4(c->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) return;
    for (size_t i = 0; i < KVL_BULK_STRANGERS_MAX; i++) {
        if (c->strangers[i].fd >= 0) continue;
        c->strangers[i] = (stranger){.fd = fd, .came_ns = kvl_clock_now(kvl_clock_system())};
        return;
    }
    atomic_fetch_add(&c->n_refused, 1);
    (void)close(fd);
}

/* Compared in constant time, or the time would tell how much of a token is right. */
static outlet *find_by_token(kvl_bulk_channel *c, const uint8_t *token)
{
    for (outlet *o = c->outlets; o != NULL; o = o->next) {
        if (o->state == BULK_AGREED && sodium_memcmp(o->token, token, sizeof o->token) == 0) {
            return o;
        }
    }
    return NULL;
}

static void hear_stranger(kvl_bulk_channel *c, stranger *s)
{
    const ssize_t n =
        recv(s->fd, s->token + s->n_token, sizeof s->token - s->n_token, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) {
        refuse_stranger(c, s);
        return;
    }
    s->n_token += (size_t)n;
    if (s->n_token < sizeof s->token) return;
    bulk_tune(s->fd);
    (void)pthread_mutex_lock(&c->lock);
    outlet *o = find_by_token(c, s->token);
    if (o != NULL) {
        o->fd = s->fd;
        o->state = BULK_READY; /* a token works once */
    }
    (void)pthread_mutex_unlock(&c->lock);
    if (o == NULL) {
        refuse_stranger(c, s);
    } else {
        s->fd = -1;
    }
}

static void end_late_strangers(kvl_bulk_channel *c)
{
    const int64_t now_ns = kvl_clock_now(kvl_clock_system());
    for (size_t i = 0; i < KVL_BULK_STRANGERS_MAX; i++) {
        stranger *s = &c->strangers[i];
        if (s->fd >= 0 && now_ns - s->came_ns >= KVL_BULK_GREETING_MS * KVL_NS_PER_MS)
            refuse_stranger(c, s);
    }
}

/* ---- the sending thread ---- */

static void end_outlet(outlet *o)
{
    if (o->fd >= 0) (void)close(o->fd);
    end_items(o);
    kvl_seal_wipe(&o->seal);
    sodium_memzero(o->share, sizeof o->share);
    kvl_free(o->out);
    kvl_free(o);
}

/* Frees the doomed, and closes the sockets of the broken, which stay until their link is reset. */
static void sweep_outlets(kvl_bulk_channel *c)
{
    outlet *doomed = NULL;
    (void)pthread_mutex_lock(&c->lock);
    for (outlet **link = &c->outlets; *link != NULL;) {
        outlet *o = *link;
        if (o->state == BULK_BROKEN && o->fd >= 0) {
            (void)close(o->fd);
            o->fd = -1;
            end_items(o);
        }
        if (o->state == BULK_DOOMED) {
            *link = o->next;
            o->next = doomed;
            doomed = o;
        } else {
            link = &o->next;
        }
    }
    (void)pthread_mutex_unlock(&c->lock);
    while (doomed != NULL) {
        outlet *next = doomed->next;
        end_outlet(doomed);
        doomed = next;
    }
}

enum { SENDER_ITEMS_MAX = 2 + KVL_BULK_STRANGERS_MAX + KVL_CLIENTS_MAX };

/* Only this thread removes outlets, so those it has seen stay until it sweeps. */
static size_t collect(kvl_bulk_channel *c, struct pollfd *items, outlet **who)
{
    size_t n = 0;
    items[n++] = (struct pollfd){.fd = c->sender_wake_fd, .events = POLLIN};
    items[n++] = (struct pollfd){.fd = c->listen_fd, .events = POLLIN};
    for (size_t i = 0; i < KVL_BULK_STRANGERS_MAX; i++)
        items[n++] = (struct pollfd){.fd = c->strangers[i].fd, .events = POLLIN};
    (void)pthread_mutex_lock(&c->lock);
    for (outlet *o = c->outlets; o != NULL && n < SENDER_ITEMS_MAX; o = o->next) {
        if (o->state != BULK_READY) continue;
        who[n] = o;
        const bool has_more = o->n_items > 0 || o->n_out > 0;
        items[n++] = (struct pollfd){.fd = o->fd, .events = (short)(has_more ? POLLOUT : 0)};
    }
    (void)pthread_mutex_unlock(&c->lock);
    return n;
}

static void *send_all(void *argument)
{
    kvl_bulk_channel *c = argument;
    struct pollfd items[SENDER_ITEMS_MAX];
    outlet *who[SENDER_ITEMS_MAX];
    while (!atomic_load(&c->is_stopping)) {
        sweep_outlets(c);
        const size_t n = collect(c, items, who);
        bool has_strangers = false;
        for (size_t i = 0; i < KVL_BULK_STRANGERS_MAX; i++)
            has_strangers |= c->strangers[i].fd >= 0;
        (void)poll(items, n, has_strangers ? 200 : -1);
        if ((items[0].revents & POLLIN) != 0) bulk_wake_taken(c->sender_wake_fd);
        if ((items[1].revents & POLLIN) != 0) take_stranger(c);
        for (size_t i = 0; i < KVL_BULK_STRANGERS_MAX; i++) {
            stranger *s = &c->strangers[i];
            if (s->fd >= 0 && items[2 + i].fd == s->fd && items[2 + i].revents != 0)
                hear_stranger(c, s);
        }
        end_late_strangers(c);
        for (size_t i = 2 + KVL_BULK_STRANGERS_MAX; i < n; i++) {
            if (items[i].revents != 0) pump(c, who[i]);
            if ((items[i].revents & (POLLERR | POLLHUP)) == 0) continue;
            (void)pthread_mutex_lock(&c->lock);
            if (who[i]->state == BULK_READY) who[i]->state = BULK_BROKEN;
            (void)pthread_mutex_unlock(&c->lock);
        }
    }
    return NULL;
}

/* ---- the exchange's thread ---- */

static outlet *outlet_of(kvl_bulk_channel *c, kvl_link link)
{
    return c->outlet_of_link[link - KVL_LINK_CLIENT];
}

static outlet *make_outlet(kvl_bulk_channel *c, kvl_link link)
{
    outlet *o = kvl_alloc_zero(1, sizeof *o);
    if (o == NULL) return NULL;
    o->out = kvl_alloc_aligned(BULK_OUT_BYTES);
    if (o->out == NULL) {
        kvl_free(o);
        return NULL;
    }
    o->fd = -1;
    o->is_sealed = c->is_sealed;
    kvl_random_secret(o->token, sizeof o->token);
    kvl_random_secret(o->share, sizeof o->share);
    c->outlet_of_link[link - KVL_LINK_CLIENT] = o;
    (void)pthread_mutex_lock(&c->lock);
    o->next = c->outlets;
    c->outlets = o;
    (void)pthread_mutex_unlock(&c->lock);
    return o;
}

void bulk_outlet_offer(kvl_bulk_channel *c, kvl_link link, kvl_bulk_offer *offer)
{
    if (c->listen_fd < 0) return;
    outlet *o = outlet_of(c, link);
    if (o == NULL) o = make_outlet(c, link);
    if (o == NULL) return;
    offer->port = c->port;
    offer->has_aes = c->has_aes;
    memcpy(offer->token, o->token, sizeof offer->token);
    memcpy(offer->share, o->share, sizeof offer->share);
}

/* An asker that offers nothing has no channel, or knows of none. */
void bulk_outlet_agree(kvl_bulk_channel *c, kvl_link link, const kvl_bulk_offer *theirs)
{
    if (c->listen_fd < 0 || theirs->port == 0) return;
    outlet *o = outlet_of(c, link);
    if (o == NULL) o = make_outlet(c, link);
    if (o == NULL) return;
    (void)pthread_mutex_lock(&c->lock);
    /* A Hello that is repeated agrees once: a seal begins with its first record. */
    if (o->state == BULK_OFFERED) {
        const bool uses_aes = theirs->has_aes && c->has_aes;
        const bool has_seal =
            !o->is_sealed || kvl_seal_init(&o->seal, theirs->share, o->share, uses_aes);
        o->state = has_seal ? BULK_AGREED : BULK_BROKEN;
    }
    (void)pthread_mutex_unlock(&c->lock);
}

void bulk_outlet_reset(kvl_bulk_channel *c, kvl_link link)
{
    outlet *o = outlet_of(c, link);
    if (o == NULL) return;
    c->outlet_of_link[link - KVL_LINK_CLIENT] = NULL;
    (void)pthread_mutex_lock(&c->lock);
    o->state = BULK_DOOMED;
    (void)pthread_mutex_unlock(&c->lock);
    bulk_wake(c->sender_wake_fd);
}

bool kvl_bulk_channel_is_ready(kvl_bulk_channel *c, kvl_link link)
{
    if (c == NULL || link < KVL_LINK_CLIENT) return false;
    const outlet *o = outlet_of(c, link);
    if (o == NULL) return false;
    (void)pthread_mutex_lock(&c->lock);
    const bool is_ready = o->state == BULK_READY;
    (void)pthread_mutex_unlock(&c->lock);
    return is_ready;
}

kvl_status kvl_bulk_channel_send(kvl_bulk_channel *c, kvl_link link, const void *control,
                                 size_t n_control_bytes, const kvl_frame *frames, size_t n_frames,
                                 kvl_owner owner)
{
    outlet *o = outlet_of(c, link);
    KVL_ASSERT(o != NULL && n_control_bytes <= BULK_CONTROL_BYTES_MAX);
    KVL_ASSERT(n_frames <= KVL_HEADER_FRAMES_MAX);
    bulk_item item = {.n_control = n_control_bytes, .n_frames = n_frames, .owner = owner};
    memcpy(item.control, control, n_control_bytes);
    for (size_t i = 0; i < n_frames; i++) item.frames[i] = frames[i];
    if (payload_bytes(&item) > KVL_BULK_MESSAGE_BYTES_MAX) return KVL_ERR_TOO_LARGE;
    (void)pthread_mutex_lock(&c->lock);
    kvl_status status = o->state == BULK_READY ? KVL_OK : KVL_ERR_UNREACHABLE;
    if (status == KVL_OK && o->n_items == KVL_BULK_QUEUE_MESSAGES_MAX) status = KVL_ERR_BUSY;
    const bool was_empty = o->n_items == 0;
    if (status == KVL_OK) {
        share_owner(owner);
        o->items[(o->item_first + o->n_items) % KVL_BULK_QUEUE_MESSAGES_MAX] = item;
        o->n_items++;
    }
    (void)pthread_mutex_unlock(&c->lock);
    if (status == KVL_OK && was_empty) bulk_wake(c->sender_wake_fd);
    return status;
}

/* ---- life ---- */

static kvl_status start_threads(kvl_bulk_channel *c, kvl_error *error)
{
    sigset_t all, before;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    if (c->listen_fd >= 0) c->has_sender = pthread_create(&c->sender, NULL, send_all, c) == 0;
    c->has_receiver = pthread_create(&c->receiver, NULL, bulk_receive_all, c) == 0;
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (c->has_receiver && (c->has_sender || c->listen_fd < 0)) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no thread for a bulk channel");
}

static kvl_status open_all(kvl_bulk_channel *c, const kvl_bulk_channel_options *options,
                           kvl_error *error)
{
    c->sender_wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    c->receiver_wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (c->sender_wake_fd < 0 || c->receiver_wake_fd < 0) {
        return KVL_FAIL(error, KVL_ERR_IO, "cannot make an eventfd: %s", strerror(errno));
    }
    if (options->endpoint != NULL) {
        KVL_TRY(bulk_listen(options->endpoint, &c->listen_fd, &c->port, c->unix_path,
                            sizeof c->unix_path, error));
    }
    return start_threads(c, error);
}

kvl_status kvl_bulk_channel_open(const kvl_bulk_channel_options *options,
                                 kvl_bulk_channel **channel, kvl_error *error)
{
    *channel = NULL;
    kvl_bulk_channel *c = kvl_alloc_zero(1, sizeof *c);
    if (c == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a bulk channel");
    c->listen_fd = c->sender_wake_fd = c->receiver_wake_fd = -1;
    for (size_t i = 0; i < KVL_BULK_STRANGERS_MAX; i++) c->strangers[i].fd = -1;
    c->has_keys = options->has_keys;
    c->is_sealed = options->has_keys && bulk_is_tcp(options->endpoint);
    c->has_aes = kvl_seal_has_aes();
    c->wake_fd = options->wake_fd;
    (void)pthread_mutex_init(&c->lock, NULL);
    kvl_landings_init(&c->landings);
    const kvl_status status = open_all(c, options, error);
    if (status < 0) {
        kvl_bulk_channel_close(c);
        return status;
    }
    *channel = c;
    return KVL_OK;
}

void kvl_bulk_channel_close(kvl_bulk_channel *c)
{
    if (c == NULL) return;
    for (kvl_link link = 0; link < KVL_LINKS_MAX; link++) kvl_bulk_channel_reset(c, link);
    atomic_store(&c->is_stopping, true);
    if (c->has_sender) bulk_wake(c->sender_wake_fd);
    if (c->has_receiver) bulk_wake(c->receiver_wake_fd);
    if (c->has_sender) (void)pthread_join(c->sender, NULL);
    if (c->has_receiver) (void)pthread_join(c->receiver, NULL);
    sweep_outlets(c);
    bulk_inlets_end(c);
    for (size_t i = 0; i < KVL_BULK_STRANGERS_MAX; i++) {
        if (c->strangers[i].fd >= 0) (void)close(c->strangers[i].fd);
    }
    if (c->listen_fd >= 0) (void)close(c->listen_fd);
    if (c->unix_path[0] != '\0') (void)unlink(c->unix_path);
    if (c->sender_wake_fd >= 0) (void)close(c->sender_wake_fd);
    if (c->receiver_wake_fd >= 0) (void)close(c->receiver_wake_fd);
    kvl_landings_deinit(&c->landings);
    (void)pthread_mutex_destroy(&c->lock);
    kvl_free(c);
}

uint64_t kvl_bulk_channel_n_refused(kvl_bulk_channel *c)
{
    return atomic_load(&c->n_refused);
}

void kvl_bulk_channel_offer(kvl_bulk_channel *c, kvl_link link, kvl_bulk_offer *offer)
{
    memset(offer, 0, sizeof *offer);
    if (link >= KVL_LINK_CLIENT) {
        bulk_outlet_offer(c, link, offer);
    } else {
        bulk_inlet_offer(c, link, offer);
    }
}

void kvl_bulk_channel_agree(kvl_bulk_channel *c, kvl_link link, const kvl_bulk_offer *theirs,
                            const char *peer_endpoint)
{
    if (link >= KVL_LINK_CLIENT) {
        bulk_outlet_agree(c, link, theirs);
    } else {
        bulk_inlet_agree(c, link, theirs, peer_endpoint);
    }
}

void kvl_bulk_channel_reset(kvl_bulk_channel *c, kvl_link link)
{
    if (link >= KVL_LINK_CLIENT) {
        bulk_outlet_reset(c, link);
    } else {
        bulk_inlet_reset(c, link);
    }
}
