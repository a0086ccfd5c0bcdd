/* exchange/bulk_receive.c: the half of a bulk channel that receives.
 *
 * An inlet is the receiving end of one link that we dialled. Its thread reads records into memory
 * that stays in the core's cache, opens them into one of a few buffers, and hands whole messages to
 * the exchange's thread. Without a free buffer it stops reading: back-pressure is TCP's own. */
#include "exchange/bulk_state.h"

#include "base/alloc.h"
#include "base/log.h"
#include "base/random.h"

#include <errno.h>
#include <poll.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Taken before commands, pings and the others get their turn. */
enum { MESSAGES_PER_TURN = 16 };

enum { TOLD_BYTES = 256 << 10 };

/* A quarter of the smallest second-level cache in use: read, then hashed there. */
static const size_t BULK_STEP_BYTES = (size_t)128 << 10;

/* ---- buffers ---- */

static bulk_buffer *make_buffer(void)
{
    return kvl_alloc_zero(1, sizeof(bulk_buffer));
}

/* Most messages land in a container and need no payload of the buffer's. */
static bool has_payload(bulk_buffer *b)
{
    if (b->payload == NULL) b->payload = kvl_alloc_aligned(KVL_BULK_MESSAGE_BYTES_MAX);
    return b->payload != NULL;
}

/* NULL where all are in use. The one used last comes first: its memory is in the cache. */
static bulk_buffer *take_buffer(kvl_bulk_channel *c)
{
    (void)pthread_mutex_lock(&c->lock);
    bulk_buffer *b = c->spare;
    if (b != NULL) c->spare = b->next;
    const bool may_make = b == NULL && c->n_buffers < KVL_BULK_BUFFERS;
    if (may_make) c->n_buffers++;
    (void)pthread_mutex_unlock(&c->lock);
    if (!may_make) return b;
    b = make_buffer();
    if (b != NULL) return b;
    (void)pthread_mutex_lock(&c->lock);
    c->n_buffers--;
    (void)pthread_mutex_unlock(&c->lock);
    return NULL;
}

static void give_buffer(kvl_bulk_channel *c, bulk_buffer *b)
{
    if (b == NULL) return;
    kvl_container_release(b->piece.container);
    b->piece = (kvl_piece){.serial = 0};
    (void)pthread_mutex_lock(&c->lock);
    const bool was_short = c->spare == NULL;
    b->next = c->spare;
    c->spare = b;
    (void)pthread_mutex_unlock(&c->lock);
    if (was_short) bulk_wake(c->receiver_wake_fd);
}

/* The exchange's thread hears of what has arrived when there is enough of it to be worth a switch
 * of threads, or when this one is about to wait: a wake for each small block took more time than
 * opening the block. */
static void tell(kvl_bulk_channel *c)
{
    if (c->n_untold_bytes == 0) return;
    c->n_untold_bytes = 0;
    bulk_wake(c->wake_fd);
}

static void deliver(kvl_bulk_channel *c, inlet *in)
{
    bulk_buffer *b = in->buffer;
    in->buffer = NULL;
    b->next = NULL;
    b->link = in->link;
    b->serial = in->serial;
    (void)pthread_mutex_lock(&c->lock);
    if (c->arrived_last == NULL) {
        c->arrived_first = b;
    } else {
        c->arrived_last->next = b;
    }
    c->arrived_last = b;
    (void)pthread_mutex_unlock(&c->lock);
    c->n_untold_bytes += b->n_control + b->n_payload;
    if (c->n_untold_bytes >= TOLD_BYTES) tell(c);
}

/* ---- records ---- */

static size_t get_u32(const uint8_t *bytes)
{
    return (size_t)bytes[0] | (size_t)bytes[1] << 8 | (size_t)bytes[2] << 16 |
           (size_t)bytes[3] << 24;
}

typedef enum step { STEP_DONE, STEP_WAIT, STEP_CLOSED, STEP_BROKEN } step;

static step receive(int fd, uint8_t *bytes, size_t n_bytes, size_t *n_got)
{
    for (;;) {
        const ssize_t n = recv(fd, bytes, n_bytes, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) return STEP_WAIT;
        if (n <= 0) return STEP_CLOSED; /* the other process ended; the link will say so too */
        *n_got = (size_t)n;
        return STEP_DONE;
    }
}

/* Reads as much as there is room for, many small records at a time. */
static step refill(inlet *in)
{
    const size_t n = in->in_past - in->in_first;
    size_t n_got = 0;
    if (in->in_first > 0 && n > 0) memmove(in->in, in->in + in->in_first, n);
    in->in_first = 0;
    in->in_past = n;
    const step got = receive(in->fd, in->in + n, BULK_IN_BYTES - n, &n_got);
    if (got == STEP_DONE) in->in_past += n_got;
    return got;
}

/* The next whole record, where it lies; taken. */
static step next_record(inlet *in, const uint8_t **record, size_t *n_bytes)
{
    const size_t overhead = in->is_sealed ? KVL_SEAL_TAG_BYTES : 0;
    for (;;) {
        const size_t n = in->in_past - in->in_first;
        const uint8_t *at = in->in + in->in_first;
        *n_bytes = n < 4 ? 0 : get_u32(at);
        if (n >= 4 && (*n_bytes <= overhead || *n_bytes > KVL_BULK_RECORD_BYTES + overhead))
            return STEP_BROKEN;
        if (n >= 4 && n - 4 >= *n_bytes) {
            *record = at + 4;
            in->in_first += 4 + *n_bytes;
            return STEP_DONE;
        }
        const step got = refill(in);
        if (got != STEP_DONE) return got;
    }
}

/* Where the message of a head goes: to the block that it brings, or into the buffer. What cannot be
 * decoded is the exchange's thread's to refuse. */
static step find_place(kvl_bulk_channel *c, inlet *in)
{
    bulk_buffer *b = in->buffer;
    kvl_message message;
    kvl_error error;
    const kvl_frame frame = {NULL, b->n_payload};
    b->is_dropped = false;
    if (b->n_payload > 0 && b->n_payload <= KVL_FRAME_BYTES_MAX &&
        kvl_wire_decode(&c->decoder, b->control, b->n_control, &frame, 1, &message, &error) == 0 &&
        kvl_landings_take(&c->landings, in->link, &message, b->n_payload, &b->piece)) {
        return STEP_DONE;
    }
    if (b->n_payload == 0 || has_payload(b)) return STEP_DONE;
    b->n_control = 0;
    return STEP_BROKEN; /* without memory the link goes on without a channel */
}

/* The record that a message begins with. */
static step take_head(kvl_bulk_channel *c, inlet *in)
{
    uint8_t opened[8 + BULK_CONTROL_BYTES_MAX];
    const uint8_t *record = NULL;
    size_t n = 0;
    bulk_buffer *b = in->buffer;
    const step got = next_record(in, &record, &n);
    if (got != STEP_DONE) return got;
    const size_t overhead = in->is_sealed ? KVL_SEAL_TAG_BYTES : 0;
    const size_t n_head = n - overhead;
    if (n_head < 8 || n_head > sizeof opened) return STEP_BROKEN;
    if (in->is_sealed && !kvl_seal_open(&in->seal, record, n, opened)) return STEP_BROKEN;
    const uint8_t *head = in->is_sealed ? opened : record;
    b->n_payload = get_u32(head);
    b->n_control = get_u32(head + 4);
    if (b->n_control == 0 || b->n_control != n_head - 8 ||
        b->n_payload > KVL_BULK_MESSAGE_BYTES_MAX) {
        b->n_control = 0;
        return STEP_BROKEN;
    }
    memcpy(b->control, head + 8, b->n_control);
    in->payload_at = 0;
    return find_place(c, in);
}

/* Where the next bytes of the message may be written; a landing's lock is held until
 * `leave_place`. */
static uint8_t *enter_place(kvl_bulk_channel *c, bulk_buffer *b)
{
    if (b->piece.serial == 0) return b->payload;
    if (!b->is_dropped && kvl_landings_enter(&c->landings, &b->piece)) return b->piece.bytes;
    /* Its fetch has ended; the stream of bytes goes on, so the rest is read and forgotten. */
    b->is_dropped = true;
    return has_payload(b) ? b->payload : NULL;
}

static void leave_place(kvl_bulk_channel *c, const inlet *in, size_t n_new)
{
    const bulk_buffer *b = in->buffer;
    if (b->piece.serial == 0 || b->is_dropped) return;
    kvl_landings_leave(&c->landings, &b->piece, b->piece.bytes + in->payload_at, n_new);
}

static step take_sealed_payload(kvl_bulk_channel *c, inlet *in)
{
    bulk_buffer *b = in->buffer;
    while (in->payload_at < b->n_payload) {
        const uint8_t *record = NULL;
        size_t n = 0;
        const step got = next_record(in, &record, &n);
        if (got != STEP_DONE) return got;
        n -= KVL_SEAL_TAG_BYTES;
        if (n > b->n_payload - in->payload_at) return STEP_BROKEN;
        uint8_t *to = enter_place(c, b);
        if (to == NULL) return STEP_BROKEN;
        /* What does not open has been written all the same, into a block that nobody accepts. */
        const bool is_open =
            kvl_seal_open(&in->seal, record, n + KVL_SEAL_TAG_BYTES, to + in->payload_at);
        leave_place(c, in, is_open ? n : 0);
        if (!is_open) return STEP_BROKEN;
        in->payload_at += n;
    }
    return STEP_DONE;
}

/* What came along with the head is copied, the rest is read to where it belongs, in steps that are
 * hashed while they are in the cache. */
static step take_plain_payload(kvl_bulk_channel *c, inlet *in)
{
    bulk_buffer *b = in->buffer;
    while (in->payload_at < b->n_payload) {
        const size_t n_here = in->in_past - in->in_first;
        size_t n = b->n_payload - in->payload_at;
        if (n > BULK_STEP_BYTES) n = BULK_STEP_BYTES;
        uint8_t *to = enter_place(c, b);
        if (to == NULL) return STEP_BROKEN;
        to += in->payload_at;
        step got = STEP_DONE;
        if (n_here > 0) {
            if (n > n_here) n = n_here;
            memcpy(to, in->in + in->in_first, n);
            in->in_first += n;
        } else {
            size_t n_got = 0;
            got = receive(in->fd, to, n, &n_got);
            n = n_got;
        }
        leave_place(c, in, n);
        in->payload_at += n;
        if (got != STEP_DONE) return got;
    }
    return STEP_DONE;
}

/* A message is whole. One whose landing has gone is of a stream that has ended: nobody would read
 * it, and its buffer is free for the next. */
static void end_message(kvl_bulk_channel *c, inlet *in)
{
    bulk_buffer *b = in->buffer;
    if (b->piece.serial != 0 && !b->is_dropped)
        b->is_dropped = !kvl_landings_finish(&c->landings, &b->piece, b->n_payload);
    if (!b->is_dropped) {
        deliver(c, in);
        return;
    }
    in->buffer = NULL;
    give_buffer(c, b);
}

/* Whole messages, until the socket is empty or no buffer is free. */
static step read_messages(kvl_bulk_channel *c, inlet *in)
{
    for (;;) {
        if (in->buffer == NULL) {
            in->buffer = take_buffer(c);
            in->is_starved = in->buffer == NULL;
            if (in->is_starved) return STEP_WAIT;
            in->buffer->n_control = 0;
        }
        step got = in->buffer->n_control == 0 ? take_head(c, in) : STEP_DONE;
        if (got == STEP_DONE)
            got = in->is_sealed ? take_sealed_payload(c, in) : take_plain_payload(c, in);
        if (got != STEP_DONE) return got;
        end_message(c, in);
    }
}

/* ---- the receiving thread ---- */

static void end_inlet(kvl_bulk_channel *c, inlet *in)
{
    if (in->fd >= 0) (void)close(in->fd);
    give_buffer(c, in->buffer);
    kvl_seal_wipe(&in->seal);
    sodium_memzero(in->share, sizeof in->share);
    kvl_free(in->in);
    kvl_free(in);
}

static void sweep(kvl_bulk_channel *c)
{
    inlet *doomed = NULL;
    (void)pthread_mutex_lock(&c->lock);
    for (inlet **link = &c->inlets; *link != NULL;) {
        inlet *in = *link;
        if (in->state == BULK_DOOMED) {
            *link = in->next;
            in->next = doomed;
            doomed = in;
        } else {
            link = &in->next;
        }
    }
    (void)pthread_mutex_unlock(&c->lock);
    while (doomed != NULL) {
        inlet *next = doomed->next;
        end_inlet(c, doomed);
        doomed = next;
    }
}

static void break_inlet(kvl_bulk_channel *c, inlet *in, bool is_refused)
{
    (void)pthread_mutex_lock(&c->lock);
    if (in->state != BULK_DOOMED) in->state = BULK_BROKEN;
    (void)pthread_mutex_unlock(&c->lock);
    if (in->fd >= 0) (void)close(in->fd);
    in->fd = -1;
    give_buffer(c, in->buffer);
    in->buffer = NULL;
    if (!is_refused) return;
    atomic_fetch_add(&c->n_refused, 1);
    kvl_log(KVL_LOG_WARN, "bulk_channel_lost", "endpoint=%s", in->endpoint);
}

/* Dials, and shows the token as soon as the connection takes it: those few bytes always fit. */
static void connect_inlet(kvl_bulk_channel *c, inlet *in)
{
    if (bulk_dial(in->endpoint, in->port, &in->fd) < 0) {
        break_inlet(c, in, true);
        return;
    }
    struct pollfd item = {.fd = in->fd, .events = POLLOUT};
    const bool shown = poll(&item, 1, KVL_BULK_GREETING_MS) == 1 &&
                       send(in->fd, in->token, sizeof in->token, MSG_NOSIGNAL | MSG_DONTWAIT) ==
                           (ssize_t)sizeof in->token;
    if (!shown) {
        break_inlet(c, in, true);
        return;
    }
    (void)pthread_mutex_lock(&c->lock);
    if (in->state == BULK_AGREED) in->state = BULK_READY;
    (void)pthread_mutex_unlock(&c->lock);
}

/* How many bytes there must be before going on is worth the while: the rest of a record, for a part
 * of one cannot be opened, or of a step. */
static size_t bytes_awaited(const inlet *in)
{
    const size_t n = in->in_past - in->in_first;
    if (in->is_sealed) {
        const size_t n_record = n < 4 ? 0 : 4 + get_u32(in->in + in->in_first);
        return n_record > n ? n_record - n : 1;
    }
    if (in->buffer == NULL || in->buffer->n_control == 0) return 1;
    const size_t rest = in->buffer->n_payload - in->payload_at;
    return rest < 1 ? 1 : rest < BULK_STEP_BYTES ? rest : BULK_STEP_BYTES;
}

/* TCP brings a record in two or three parts, and each would wake this thread. UNIX sockets know no
 * such mark and are as before. */
static void set_low_water(inlet *in)
{
    const int wanted = (int)bytes_awaited(in);
    if (wanted == in->low_water) return;
    in->low_water = wanted;
    (void)setsockopt(in->fd, SOL_SOCKET, SO_RCVLOWAT, &wanted, sizeof wanted);
}

enum { RECEIVER_ITEMS_MAX = 1 + KVL_PEERS_MAX };

static size_t collect(kvl_bulk_channel *c, struct pollfd *items, inlet **who, inlet **fresh)
{
    size_t n = 0;
    *fresh = NULL;
    items[n++] = (struct pollfd){.fd = c->receiver_wake_fd, .events = POLLIN};
    (void)pthread_mutex_lock(&c->lock);
    const bool has_buffer = c->spare != NULL || c->n_buffers < KVL_BULK_BUFFERS;
    for (inlet *in = c->inlets; in != NULL && n < RECEIVER_ITEMS_MAX; in = in->next) {
        if (in->state == BULK_AGREED) *fresh = in;
        if (in->state != BULK_READY) continue;
        who[n] = in;
        const bool can_read = has_buffer || in->buffer != NULL;
        set_low_water(in);
        items[n++] = (struct pollfd){.fd = can_read ? in->fd : -1, .events = POLLIN};
    }
    (void)pthread_mutex_unlock(&c->lock);
    return n;
}

void *bulk_receive_all(void *channel)
{
    kvl_bulk_channel *c = channel;
    struct pollfd items[RECEIVER_ITEMS_MAX];
    inlet *who[RECEIVER_ITEMS_MAX];
    while (!atomic_load(&c->is_stopping)) {
        inlet *fresh = NULL;
        sweep(c);
        const size_t n = collect(c, items, who, &fresh);
        if (fresh != NULL) {
            connect_inlet(c, fresh);
            continue;
        }
        (void)poll(items, n, -1);
        if ((items[0].revents & POLLIN) != 0) bulk_wake_taken(c->receiver_wake_fd);
        for (size_t i = 1; i < n; i++) {
            /* What was read before buffers ran out makes no socket readable. */
            if (items[i].revents == 0 && !who[i]->is_starved) continue;
            const step got = read_messages(c, who[i]);
            tell(c);
            if (got == STEP_BROKEN || got == STEP_CLOSED)
                break_inlet(c, who[i], got == STEP_BROKEN);
        }
    }
    return NULL;
}

void bulk_inlets_end(kvl_bulk_channel *c)
{
    sweep(c);
    for (int list = 0; list < 2; list++) {
        bulk_buffer *b = list == 0 ? c->arrived_first : c->spare;
        while (b != NULL) {
            bulk_buffer *next = b->next;
            kvl_container_release(b->piece.container);
            kvl_free(b->payload);
            kvl_free(b);
            b = next;
        }
    }
    c->arrived_first = c->arrived_last = c->spare = NULL;
}

/* ---- the exchange's thread ---- */

static inlet *make_inlet(kvl_bulk_channel *c, kvl_link link)
{
    inlet *in = kvl_alloc_zero(1, sizeof *in);
    if (in == NULL) return NULL;
    in->in = kvl_alloc_aligned(BULK_IN_BYTES);
    if (in->in == NULL) {
        kvl_free(in);
        return NULL;
    }
    in->fd = -1;
    in->link = link;
    in->serial = ++c->last_serial;
    kvl_random_secret(in->share, sizeof in->share);
    c->inlet_of_link[link] = in;
    (void)pthread_mutex_lock(&c->lock);
    in->next = c->inlets;
    c->inlets = in;
    (void)pthread_mutex_unlock(&c->lock);
    return in;
}

void bulk_inlet_offer(kvl_bulk_channel *c, kvl_link link, kvl_bulk_offer *offer)
{
    inlet *in = c->inlet_of_link[link];
    if (in == NULL) in = make_inlet(c, link);
    if (in == NULL) return;
    offer->port = 1; /* only that there is a channel: askers do not listen */
    offer->has_aes = c->has_aes;
    memcpy(offer->share, in->share, sizeof offer->share);
}

void bulk_inlet_agree(kvl_bulk_channel *c, kvl_link link, const kvl_bulk_offer *theirs,
                      const char *endpoint)
{
    inlet *in = c->inlet_of_link[link];
    if (in == NULL || theirs->port == 0) return;
    (void)pthread_mutex_lock(&c->lock);
    if (in->state == BULK_OFFERED) {
        in->is_sealed = c->has_keys && bulk_is_tcp(endpoint);
        const bool uses_aes = theirs->has_aes && c->has_aes;
        const bool has_seal =
            !in->is_sealed || kvl_seal_init(&in->seal, in->share, theirs->share, uses_aes);
        memcpy(in->token, theirs->token, sizeof in->token);
        in->port = theirs->port;
        (void)snprintf(in->endpoint, sizeof in->endpoint, "%s", endpoint);
        in->state = has_seal ? BULK_AGREED : BULK_BROKEN;
    }
    (void)pthread_mutex_unlock(&c->lock);
    bulk_wake(c->receiver_wake_fd);
}

void bulk_inlet_reset(kvl_bulk_channel *c, kvl_link link)
{
    inlet *in = c->inlet_of_link[link];
    kvl_landings_end_link(&c->landings, link);
    if (in == NULL) return;
    c->inlet_of_link[link] = NULL;
    (void)pthread_mutex_lock(&c->lock);
    in->state = BULK_DOOMED;
    (void)pthread_mutex_unlock(&c->lock);
    bulk_wake(c->receiver_wake_fd);
}

static bulk_buffer *next_arrived(kvl_bulk_channel *c)
{
    (void)pthread_mutex_lock(&c->lock);
    bulk_buffer *b = c->arrived_first;
    if (b != NULL) c->arrived_first = b->next;
    if (c->arrived_first == NULL) c->arrived_last = NULL;
    (void)pthread_mutex_unlock(&c->lock);
    return b;
}

/* What a former connection of the link has brought is dropped: its sender is another process by
 * now. */
bool kvl_bulk_channel_drain(kvl_bulk_channel *c, kvl_bulk_take *take, void *context)
{
    for (int turn = 0; turn < MESSAGES_PER_TURN; turn++) {
        bulk_buffer *b = next_arrived(c);
        if (b == NULL) return false;
        const inlet *in = c->inlet_of_link[b->link];
        if (in != NULL && in->serial == b->serial) {
            const bool has_landed = b->piece.serial != 0;
            kvl_frame frames[KVL_FRAMES_MAX];
            const size_t n_frames =
                kvl_frames_cut(has_landed ? b->piece.bytes : b->payload, b->n_payload, frames);
            take(context, b->link, b->control, b->n_control, frames, n_frames,
                 has_landed && b->piece.ends_block ? &b->piece.checksum : NULL);
        }
        give_buffer(c, b);
    }
    return true;
}

void kvl_bulk_channel_land(kvl_bulk_channel *c, kvl_link link, uint64_t request,
                           kvl_container *container, uint32_t block)
{
    const inlet *in = c->inlet_of_link[link];
    if (in != NULL && !kvl_container_is_sealed(container))
        kvl_landings_begin(&c->landings, link, request, container, block);
}

bool kvl_bulk_channel_claim(kvl_bulk_channel *c, kvl_link link, uint64_t request, uint32_t block)
{
    return kvl_landings_claim(&c->landings, link, request, block);
}

void kvl_bulk_channel_leave(kvl_bulk_channel *c, kvl_link link, uint64_t request)
{
    kvl_landings_end(&c->landings, link, request);
}
