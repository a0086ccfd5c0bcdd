/* host/kv_events.c: events are packed where they happen and sent by a thread of their own. */
#include "host/kv_events.h"

#include "base/alloc.h"
#include "base/clock.h"
#include "base/log.h"

#include <errno.h>
#include <msgpack.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <zmq.h>

enum { LOOK_MS = 20, LINGER_MS = 200, NUMBER_BYTES = 8, BACKLOG = 100000 };

typedef struct sent_batch {
    char *bytes; /* [n_bytes] */
    size_t n_bytes;
} sent_batch;

struct kvl_kv_events {
    kvl_prefix_tree *tree;
    void *context, *publisher, *replayer; /* of ZeroMQ */
    const char *topic, *medium;
    pthread_t thread;
    bool has_thread;
    _Atomic bool is_stopping;
    pthread_mutex_t lock;    /* of what follows, up to the thread's own */
    msgpack_sbuffer pending; /* events, one behind the other */
    uint32_t n_pending;
    bool is_lost; /* something could not be packed */
    /* The thread's own. */
    sent_batch kept[KVL_KV_EVENTS_KEPT]; /* a ring: batch n at n modulo its length */
    uint64_t first_kept, past_kept;
    size_t n_kept_bytes;
};

/* ---- the engine thread: packing ---- */

static void pack_text(msgpack_packer *to, const char *text)
{
    (void)msgpack_pack_str_with_body(to, text, strlen(text));
}

static void pack_hashes(msgpack_packer *to, const uint64_t *hashes, size_t n)
{
    (void)msgpack_pack_array(to, n);
    for (size_t i = 0; i < n; i++) (void)msgpack_pack_uint64(to, hashes[i]);
}

/* With the lock held. */
static bool has_room(kvl_kv_events *events, size_t n_tokens)
{
    const size_t wanted = events->pending.size + 16 * (n_tokens + 16);
    if (wanted <= KVL_KV_EVENTS_BYTES_MAX) return true;
    events->is_lost = true;
    return false;
}

static void note_stored(void *context, const uint64_t *parent, const uint64_t *hashes,
                        const uint32_t *ids, size_t n_pages)
{
    kvl_kv_events *events = context;
    msgpack_packer to;
    pthread_mutex_lock(&events->lock);
    if (has_room(events, n_pages * KVL_PAGE_TOKENS)) {
        msgpack_packer_init(&to, &events->pending, msgpack_sbuffer_write);
        (void)msgpack_pack_array(&to, 7);
        pack_text(&to, "BlockStored");
        pack_hashes(&to, hashes, n_pages);
        if (parent == NULL) {
            (void)msgpack_pack_nil(&to);
        } else {
            (void)msgpack_pack_uint64(&to, *parent);
        }
        (void)msgpack_pack_array(&to, n_pages * KVL_PAGE_TOKENS);
        for (size_t i = 0; i < n_pages * KVL_PAGE_TOKENS; i++)
            (void)msgpack_pack_uint32(&to, ids[i]);
        (void)msgpack_pack_uint32(&to, KVL_PAGE_TOKENS);
        (void)msgpack_pack_nil(&to);
        pack_text(&to, events->medium);
        events->n_pending++;
    }
    pthread_mutex_unlock(&events->lock);
}

static void note_removed(void *context, const uint64_t *hashes, size_t n_pages)
{
    kvl_kv_events *events = context;
    msgpack_packer to;
    pthread_mutex_lock(&events->lock);
    if (has_room(events, n_pages)) {
        msgpack_packer_init(&to, &events->pending, msgpack_sbuffer_write);
        (void)msgpack_pack_array(&to, 3);
        pack_text(&to, "BlockRemoved");
        pack_hashes(&to, hashes, n_pages);
        pack_text(&to, events->medium);
        events->n_pending++;
    }
    pthread_mutex_unlock(&events->lock);
}

/* ---- the sending thread ---- */

static void forget_oldest(kvl_kv_events *events)
{
    sent_batch *gone = &events->kept[events->first_kept++ % KVL_KV_EVENTS_KEPT];
    events->n_kept_bytes -= gone->n_bytes;
    kvl_free(gone->bytes);
    *gone = (sent_batch){0};
}

static void write_number(uint64_t number, uint8_t bytes[NUMBER_BYTES])
{
    for (int i = 0; i < NUMBER_BYTES; i++) bytes[i] = (uint8_t)(number >> (56 - 8 * i));
}

/* Numbers a batch, keeps it and sends it. A subscriber that is behind is the socket's business. */
static void send_batch(kvl_kv_events *events, const msgpack_sbuffer *batch)
{
    sent_batch made = {kvl_alloc(batch->size), batch->size};
    uint8_t number[NUMBER_BYTES];
    /* Without memory it is sent and cannot be replayed. */
    if (made.bytes == NULL) made.n_bytes = 0;
    if (made.bytes != NULL) memcpy(made.bytes, batch->data, batch->size);
    while (events->past_kept - events->first_kept == KVL_KV_EVENTS_KEPT ||
           (events->first_kept < events->past_kept &&
            events->n_kept_bytes + made.n_bytes > KVL_KV_EVENTS_BYTES_MAX))
        forget_oldest(events);
    write_number(events->past_kept, number);
    events->kept[events->past_kept++ % KVL_KV_EVENTS_KEPT] = made;
    events->n_kept_bytes += made.n_bytes;
    const int flags = ZMQ_DONTWAIT | ZMQ_SNDMORE;
    const size_t n_topic = strlen(events->topic);
    if (zmq_send(events->publisher, events->topic, n_topic, flags) < 0 ||
        zmq_send(events->publisher, number, sizeof number, flags) < 0 ||
        zmq_send(events->publisher, batch->data, batch->size, ZMQ_DONTWAIT) < 0)
        kvl_log(KVL_LOG_WARN, "kv_events_not_sent", "reason=\"%s\"", zmq_strerror(errno));
}

/* Sends what has been packed since it was called last. */
static void flush(kvl_kv_events *events)
{
    msgpack_sbuffer batch;
    msgpack_packer to;
    msgpack_sbuffer_init(&batch);
    msgpack_packer_init(&to, &batch, msgpack_sbuffer_write);
    const kvl_clock *clock = kvl_clock_system();
    pthread_mutex_lock(&events->lock);
    const uint32_t n = events->n_pending;
    const bool is_lost = events->is_lost;
    if (n > 0 || is_lost) {
        (void)msgpack_pack_array(&to, 2);
        (void)msgpack_pack_double(&to, (double)clock->wall_ns(clock->context) / 1e9);
        (void)msgpack_pack_array(&to, is_lost ? 1 : n);
        if (is_lost) {
            (void)msgpack_pack_array(&to, 1);
            pack_text(&to, "AllBlocksCleared");
        } else {
            (void)msgpack_sbuffer_write(&batch, events->pending.data, events->pending.size);
        }
        msgpack_sbuffer_clear(&events->pending);
        events->n_pending = 0;
        events->is_lost = false;
    }
    pthread_mutex_unlock(&events->lock);
    if (n > 0 || is_lost) send_batch(events, &batch);
    msgpack_sbuffer_destroy(&batch);
}

/* False: whoever asked is gone, or does not read. */
static bool reply(kvl_kv_events *events, zmq_msg_t *who, uint64_t number, const sent_batch *batch)
{
    const int flags = ZMQ_DONTWAIT | ZMQ_SNDMORE;
    uint8_t bytes[NUMBER_BYTES];
    write_number(number, bytes);
    return zmq_send(events->replayer, zmq_msg_data(who), zmq_msg_size(who), flags) >= 0 &&
           zmq_send(events->replayer, "", 0, flags) >= 0 &&
           zmq_send(events->replayer, bytes, sizeof bytes, flags) >= 0 &&
           zmq_send(events->replayer, batch->bytes == NULL ? "" : batch->bytes, batch->n_bytes,
                    ZMQ_DONTWAIT) >= 0;
}

static void replay(kvl_kv_events *events, zmq_msg_t *who, uint64_t from)
{
    const sent_batch nothing = {0};
    if (from < events->first_kept) from = events->first_kept;
    bool is_read = true;
    for (uint64_t n = from; n < events->past_kept && is_read; n++) {
        const sent_batch *batch = &events->kept[n % KVL_KV_EVENTS_KEPT];
        if (batch->bytes != NULL) is_read = reply(events, who, n, batch);
    }
    if (is_read) (void)reply(events, who, UINT64_MAX, &nothing);
}

/* Takes one question: the asker's name, an empty frame, 8 bytes. Any other is dropped. */
static void take_question(kvl_kv_events *events)
{
    zmq_msg_t who;
    uint64_t from = 0;
    uint32_t n_frames = 1;
    bool is_good = true;
    (void)zmq_msg_init(&who);
    if (zmq_msg_recv(&who, events->replayer, ZMQ_DONTWAIT) >= 0) {
        for (bool has_more = zmq_msg_more(&who); has_more; n_frames++) {
            zmq_msg_t frame;
            (void)zmq_msg_init(&frame);
            is_good = zmq_msg_recv(&frame, events->replayer, ZMQ_DONTWAIT) >= 0 && is_good;
            has_more = zmq_msg_more(&frame);
            const uint8_t *bytes = zmq_msg_data(&frame);
            is_good = is_good && zmq_msg_size(&frame) == (n_frames == 1 ? 0 : NUMBER_BYTES);
            for (int i = 0; is_good && n_frames == 2 && i < NUMBER_BYTES; i++)
                from = from << 8 | bytes[i];
            (void)zmq_msg_close(&frame);
        }
        if (is_good && n_frames == 3) replay(events, &who, from);
    }
    (void)zmq_msg_close(&who);
}

static void *work(void *context)
{
    kvl_kv_events *events = context;
    while (!atomic_load(&events->is_stopping)) {
        zmq_pollitem_t item = {.socket = events->replayer, .events = ZMQ_POLLIN};
        const int n = zmq_poll(&item, events->replayer == NULL ? 0 : 1, LOOK_MS);
        flush(events);
        if (n > 0) take_question(events);
    }
    flush(events);
    return NULL;
}

/* ---- life ---- */

static kvl_status open_socket(kvl_kv_events *events, int type, const char *endpoint, void **made,
                              kvl_error *error)
{
    const bool is_local = strncmp(endpoint, "ipc://", 6) == 0 ||
                          strncmp(endpoint, "tcp://127.0.0.1:", 16) == 0 ||
                          strncmp(endpoint, "tcp://[::1]:", 12) == 0;
    const int linger = LINGER_MS;
    const int backlog = BACKLOG;
    const int is_v6 = strchr(endpoint, '[') != NULL;
    if (!is_local)
        return KVL_FAIL(error, KVL_ERR_DENIED,
                        "KV events have what people wrote in them: %.80s must be ipc://, "
                        "tcp://127.0.0.1: or tcp://[::1]:",
                        endpoint);
    *made = zmq_socket(events->context, type);
    if (*made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a socket");
    (void)zmq_setsockopt(*made, ZMQ_LINGER, &linger, sizeof linger);
    (void)zmq_setsockopt(*made, ZMQ_SNDHWM, &backlog, sizeof backlog);
    (void)zmq_setsockopt(*made, ZMQ_IPV6, &is_v6, sizeof is_v6);
    if (zmq_bind(*made, endpoint) == 0) return KVL_OK;
    return KVL_FAIL(error, errno == EINVAL ? KVL_ERR_INVALID : KVL_ERR_IO,
                    "cannot send KV events at %.80s: %s", endpoint, zmq_strerror(errno));
}

static void end(kvl_kv_events *events)
{
    if (events->publisher != NULL) (void)zmq_close(events->publisher);
    if (events->replayer != NULL) (void)zmq_close(events->replayer);
    if (events->context != NULL) (void)zmq_ctx_term(events->context);
    while (events->first_kept < events->past_kept) forget_oldest(events);
    msgpack_sbuffer_destroy(&events->pending);
    (void)pthread_mutex_destroy(&events->lock);
    kvl_free(events);
}

static kvl_status start(kvl_kv_events *events, const kvl_kv_events_options *options,
                        kvl_error *error)
{
    events->context = zmq_ctx_new();
    if (events->context == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for sockets");
    KVL_TRY(open_socket(events, ZMQ_PUB, options->endpoint, &events->publisher, error));
    if (options->replay_endpoint != NULL)
        KVL_TRY(
            open_socket(events, ZMQ_ROUTER, options->replay_endpoint, &events->replayer, error));
    events->has_thread = pthread_create(&events->thread, NULL, work, events) == 0;
    return events->has_thread ? KVL_OK : KVL_FAIL(error, KVL_ERR_IO, "cannot start a thread");
}

kvl_status kvl_kv_events_start(const kvl_kv_events_options *options, kvl_prefix_tree *tree,
                               kvl_kv_events **events, kvl_error *error)
{
    *events = NULL;
    kvl_kv_events *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for KV events");
    made->tree = tree;
    made->topic = options->topic == NULL ? "" : options->topic;
    made->medium = options->medium;
    (void)pthread_mutex_init(&made->lock, NULL);
    msgpack_sbuffer_init(&made->pending);
    const kvl_status status = start(made, options, error);
    if (status != KVL_OK) {
        end(made);
        return status;
    }
    const kvl_prefix_tree_watcher watcher = {
        .stored = note_stored, .removed = note_removed, .context = made};
    kvl_prefix_tree_watch(tree, &watcher);
    *events = made;
    return KVL_OK;
}

void kvl_kv_events_stop(kvl_kv_events *events)
{
    if (events == NULL) return;
    kvl_prefix_tree_watch(events->tree, NULL);
    pthread_mutex_lock(&events->lock);
    events->is_lost = true;
    pthread_mutex_unlock(&events->lock);
    atomic_store(&events->is_stopping, true);
    (void)pthread_join(events->thread, NULL);
    end(events);
}
