/* exchange/protocol, one process against a test that plays all others: what a hostile or restarted
 * peer does, limits, and every allocation failing once.
 * Method: messages are handed in one by one; what goes out is kept in a small log. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "exchange/protocol.h"
#include "test_random.h"
#include "tiny_store.h"

enum { LOG_MAX = 4096, CLIENT = KVL_LINK_CLIENT };

#define MS KVL_NS_PER_MS

typedef struct sent {
    kvl_link link;
    kvl_message message;
    size_t n_bulk_bytes;
} sent;

static sent outbox[LOG_MAX];
static size_t n_sent;
static kvl_completion ended; /* the latest */
static char ended_text[KVL_ERROR_TEXT_MAX];
static int n_ended;
static uint64_t last_task;
static int n_tasks;
static kvl_protocol *protocol;
static tiny_store store;
static int64_t now_ns;

static kvl_status keep_sent(void *context, kvl_link link, const kvl_message *message,
                            const kvl_frame *frames, size_t n_frames, kvl_owner owner)
{
    (void)context;
    (void)owner;
    assert_true(n_sent < LOG_MAX);
    outbox[n_sent++] = (sent){link, *message, kvl_frames_bytes(frames, n_frames)};
    return KVL_OK;
}

static void keep_ended(void *context, const kvl_completion *completion)
{
    (void)context;
    ended = *completion;
    (void)snprintf(ended_text, sizeof ended_text, "%s",
                   completion->text == NULL ? "" : completion->text);
    n_ended++;
    kvl_container_release(completion->container);
    kvl_free(completion->ids);
    kvl_free(completion->reply);
}

static void keep_task(void *context, uint64_t task, const void *body, size_t n_bytes)
{
    (void)context;
    (void)body;
    (void)n_bytes;
    last_task = task;
    n_tasks++;
}

static void ignore_event(void *context, kvl_log_level level, const char *event, const char *text)
{
    (void)context;
    (void)level;
    (void)event;
    (void)text;
}

static const kvl_digest model = {{7}};

/* Peers "a" and "b"; epoch 1. The store is empty. */
static kvl_status create(void)
{
    static const char *const peers[] = {"a", "b"};
    const kvl_protocol_options options = {
        .name = "me",
        .epoch = 1,
        .seed = 3,
        .peers = peers,
        .n_peers = 2,
        .store = &store.tier,
        .fingerprint = model,
        .timeout_ms = 1000,
        .runs_tasks = true,
        .output = {keep_sent, keep_ended, keep_task, ignore_event, NULL},
    };
    n_sent = 0;
    n_ended = n_tasks = 0;
    now_ns = 0;
    return kvl_protocol_create(&options, now_ns, &protocol);
}

static int set_up(void **state)
{
    (void)state;
    tiny_store_init(&store);
    return create() == KVL_OK ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    kvl_protocol_destroy(protocol);
    protocol = NULL;
    tiny_store_deinit(&store);
    kvl_container_spare_clear();
    return 0;
}

static kvl_message message_of(kvl_message_kind kind, uint64_t epoch, uint64_t request)
{
    kvl_message message;
    memset(&message, 0, sizeof message);
    message.kind = kind;
    message.epoch = epoch;
    message.request = request;
    return message;
}

static void give(kvl_link link, const kvl_message *message, const void *bulk, size_t n_bytes)
{
    const kvl_frame frame = {bulk, n_bytes};
    kvl_protocol_receive(protocol, link, message, &frame, n_bytes > 0 ? 1 : 0, now_ns);
}

static void give_plain(kvl_link link, kvl_message_kind kind, uint64_t epoch, uint64_t request)
{
    const kvl_message message = message_of(kind, epoch, request);
    give(link, &message, NULL, 0);
}

static void pass_ms(int64_t ms)
{
    for (const int64_t until = now_ns + ms * MS; now_ns < until;) {
        now_ns += KVL_TICK_NS;
        kvl_protocol_tick(protocol, now_ns);
    }
}

/* The latest message of a kind on a link, or NULL. */
static const sent *latest(kvl_link link, kvl_message_kind kind)
{
    for (size_t i = n_sent; i-- > 0;) {
        if (outbox[i].link == link && outbox[i].message.kind == kind) return &outbox[i];
    }
    return NULL;
}

static size_t count_sent(kvl_link link, kvl_message_kind kind)
{
    size_t n = 0;
    for (size_t i = 0; i < n_sent; i++)
        n += outbox[i].link == link && outbox[i].message.kind == kind;
    return n;
}

static kvl_message hello_of(kvl_message_kind kind, const char *name, uint64_t epoch,
                            uint64_t request)
{
    kvl_message message = message_of(kind, epoch, request);
    message.hello.magic = KVL_PROTOCOL_MAGIC;
    message.hello.version_min = message.hello.version_max = 1;
    (void)snprintf(message.hello.name, sizeof message.hello.name, "%s", name);
    message.hello.fingerprint = model;
    message.hello.frame_bytes_max = KVL_FRAME_BYTES_MAX;
    message.hello.window_bytes_max = KVL_CREDIT_BYTES_MAX;
    message.hello.task_bytes_max = KVL_TASK_BYTES_MAX;
    return message;
}

/* Peer `link` is connected and welcomes us. */
static void bring_up(kvl_link link, uint64_t epoch)
{
    kvl_protocol_connected(protocol, link, now_ns);
    const sent *hello = latest(link, KVL_MESSAGE_HELLO);
    assert_non_null(hello);
    const kvl_message welcome =
        hello_of(KVL_MESSAGE_WELCOME, link == 0 ? "a" : "b", epoch, hello->message.request);
    give(link, &welcome, NULL, 0);
    assert_true(kvl_protocol_peer_is_up(protocol, link));
}

static void dial_in(kvl_link link, const char *name, uint64_t epoch)
{
    const kvl_message hello = hello_of(KVL_MESSAGE_HELLO, name, epoch, 1);
    give(link, &hello, NULL, 0);
    assert_true(kvl_protocol_client_is_open(protocol, link));
}

/* ---- greeting ---- */

static void test_another_version_is_refused_with_both_named(void **state)
{
    (void)state;
    kvl_message hello = hello_of(KVL_MESSAGE_HELLO, "new", 5, 1);
    hello.hello.version_min = 7;
    hello.hello.version_max = 9;
    give(CLIENT, &hello, NULL, 0);
    const sent *error = latest(CLIENT, KVL_MESSAGE_ERROR);
    assert_non_null(error);
    assert_int_equal(error->message.reply.status, KVL_ERR_UNSUPPORTED);
    assert_non_null(strstr(error->message.reply.text, "new speaks protocol versions 7 to 9"));
    assert_non_null(strstr(error->message.reply.text, "me speaks 1 to 1"));
    assert_false(kvl_protocol_client_is_open(protocol, CLIENT));
    hello = hello_of(KVL_MESSAGE_HELLO, "other", 5, 1);
    hello.hello.magic = 0x50545448;
    give(CLIENT, &hello, NULL, 0);
    assert_non_null(strstr(latest(CLIENT, KVL_MESSAGE_ERROR)->message.reply.text, "magic"));
    assert_int_equal(kvl_protocol_stats(protocol)->peers_refused, 2);
}

static void test_a_wrong_name_behind_an_endpoint_is_refused(void **state)
{
    (void)state;
    kvl_protocol_connected(protocol, 0, now_ns);
    const kvl_message welcome =
        hello_of(KVL_MESSAGE_WELCOME, "b", 9, latest(0, KVL_MESSAGE_HELLO)->message.request);
    give(0, &welcome, NULL, 0);
    assert_false(kvl_protocol_peer_is_up(protocol, 0));
    kvl_bulk *body = kvl_bulk_copy("x", 1);
    kvl_protocol_call(protocol, NULL, 0, body, now_ns + 1000 * MS, now_ns);
    kvl_bulk_release(body);
    assert_int_equal(ended.status, KVL_ERR_UNREACHABLE);
    assert_non_null(strstr(ended_text, "answered by b"));
}

static void test_strangers_are_told_to_say_hello(void **state)
{
    (void)state;
    give_plain(CLIENT, KVL_MESSAGE_PING, 5, 3);
    assert_int_equal(latest(CLIENT, KVL_MESSAGE_ERROR)->message.reply.status, KVL_ERR_DENIED);
    assert_int_equal(latest(CLIENT, KVL_MESSAGE_ERROR)->message.request, 3);
    give_plain(CLIENT, KVL_MESSAGE_ERROR, 5, 3); /* an error is never answered */
    assert_int_equal(count_sent(CLIENT, KVL_MESSAGE_ERROR), 1);
}

/* ---- restarts ---- */

static void announce_from(kvl_link link, uint64_t epoch, const kvl_digest *id)
{
    kvl_message announce = message_of(KVL_MESSAGE_ANNOUNCE, epoch, 0);
    announce.announce.id = *id;
    announce.announce.kind = KVL_CONTAINER_ANCHOR;
    give(link, &announce, NULL, 0);
}

static void test_a_restarted_peer_is_known_by_its_epoch(void **state)
{
    (void)state;
    const kvl_digest id = tiny_id(1);
    pass_ms(KVL_CONNECT_GRACE_NS / MS);
    bring_up(0, 10);
    dial_in(CLIENT, "a", 10);
    announce_from(CLIENT, 10, &id);
    int waiter = 0;
    kvl_protocol_fetch(protocol, &waiter, &id, now_ns + 60000 * MS, now_ns);
    assert_non_null(latest(0, KVL_MESSAGE_FETCH)); /* announced: asked at once */
    assert_int_equal(count_sent(0, KVL_MESSAGE_LOCATE), 0);

    pass_ms(200);
    give_plain(0, KVL_MESSAGE_PONG, 11, 0); /* no disconnection was seen, but it is a new process */
    assert_true(kvl_protocol_peer_is_up(protocol, 0));
    const kvl_message welcome =
        hello_of(KVL_MESSAGE_WELCOME, "a", 11, latest(0, KVL_MESSAGE_HELLO)->message.request);
    give(0, &welcome, NULL, 0);
    assert_true(kvl_protocol_peer_is_up(protocol, 0));
    assert_int_equal(n_ended, 1);
    assert_int_equal(ended.status, KVL_ERR_UNREACHABLE);
    assert_ptr_equal(ended.waiter, &waiter);
    assert_int_equal(kvl_protocol_stats(protocol)->peers_lost, 1);

    /* What the dead process announced is forgotten. */
    n_sent = 0;
    kvl_protocol_fetch(protocol, &waiter, &id, now_ns + 60000 * MS, now_ns);
    assert_null(latest(0, KVL_MESSAGE_FETCH));
    assert_non_null(latest(0, KVL_MESSAGE_LOCATE));
}

static void test_a_host_that_dials_anew_replaces_its_old_session(void **state)
{
    (void)state;
    dial_in(CLIENT, "a", 10);
    dial_in(CLIENT + 1, "a", 11);
    assert_false(kvl_protocol_client_is_open(protocol, CLIENT));
    dial_in(CLIENT + 2, "visitor", 12); /* no peer of ours: two may have one name */
    dial_in(CLIENT + 3, "visitor", 13);
    assert_true(kvl_protocol_client_is_open(protocol, CLIENT + 2));
    pass_ms(KVL_CLIENT_SILENCE_NS / MS + 20);
    assert_false(kvl_protocol_client_is_open(protocol, CLIENT + 3));
}

static void test_silence_and_pauses(void **state)
{
    (void)state;
    bring_up(0, 10);
    pass_ms(KVL_PEER_SILENCE_NS / MS - 50);
    assert_true(kvl_protocol_peer_is_up(protocol, 0));
    assert_true(count_sent(0, KVL_MESSAGE_PING) > 5);
    /* This process stands still for a minute: that is not the peer's fault. */
    give_plain(0, KVL_MESSAGE_PONG, 10, 0);
    now_ns += 60000 * MS;
    kvl_protocol_tick(protocol, now_ns);
    assert_true(kvl_protocol_peer_is_up(protocol, 0));
    pass_ms(KVL_PEER_SILENCE_NS / MS + 20);
    assert_false(kvl_protocol_peer_is_up(protocol, 0));
}

static void test_a_call_waits_for_a_peer_that_is_being_dialled(void **state)
{
    (void)state;
    kvl_bulk *body = kvl_bulk_copy("x", 1);
    kvl_protocol_call(protocol, NULL, 0, body, now_ns + 10000 * MS, now_ns);
    assert_int_equal(n_ended, 0);
    bring_up(0, 10);
    assert_non_null(latest(0, KVL_MESSAGE_TASK));
    kvl_protocol_disconnected(protocol, 0, now_ns);
    assert_int_equal(ended.status, KVL_ERR_UNREACHABLE);
    kvl_protocol_call(protocol, NULL, 0, body, now_ns + 10000 * MS, now_ns);
    assert_int_equal(n_ended, 2); /* it was there and is gone: at once */
    kvl_protocol_call(protocol, NULL, 1, body, now_ns + 10000 * MS, now_ns);
    pass_ms(KVL_CONNECT_GRACE_NS / MS + 20);
    assert_int_equal(n_ended, 3); /* it never came */
    kvl_bulk_release(body);
}

/* ---- hostile answers to a fetch ---- */

static const tiny_shape shape = {.n_blocks = 3, .block_bytes = 1000, .fingerprint = {{7}}};

/* Starts a fetch of container 1 at peer 0 and returns its Fetch. */
static kvl_message begin_fetch(void)
{
    const kvl_digest id = tiny_id(1);
    pass_ms(KVL_CONNECT_GRACE_NS / MS); /* nobody waits for peer 1 any more */
    bring_up(0, 10);
    kvl_protocol_fetch(protocol, NULL, &id, now_ns + 60000 * MS, now_ns);
    kvl_message located =
        message_of(KVL_MESSAGE_LOCATED, 10, latest(0, KVL_MESSAGE_LOCATE)->message.request);
    located.located.n_ids = 1;
    located.located.held = 1;
    give(0, &located, NULL, 0);
    assert_non_null(latest(0, KVL_MESSAGE_FETCH));
    return latest(0, KVL_MESSAGE_FETCH)->message;
}

static kvl_message header_for(const kvl_message *fetch, kvl_container *container,
                              const void **bytes, size_t *n_bytes)
{
    *bytes = kvl_container_header(container, n_bytes);
    kvl_message header = message_of(KVL_MESSAGE_FETCH_HEADER, 10, fetch->request);
    header.fetch_header.id = fetch->fetch.id;
    header.fetch_header.n_blocks = kvl_container_n_blocks(container);
    header.fetch_header.header_checksum = kvl_checksum(*bytes, *n_bytes);
    header.fetch_header.header_bytes = (uint32_t)*n_bytes;
    return header;
}

static kvl_message block_for(const kvl_message *fetch, uint32_t block)
{
    kvl_message message = message_of(KVL_MESSAGE_BLOCK, 10, fetch->request);
    message.block.id = fetch->fetch.id;
    message.block.block = block;
    message.block.total = shape.block_bytes;
    return message;
}

static void test_the_header_of_another_container_is_refused(void **state)
{
    (void)state;
    const kvl_message fetch = begin_fetch();
    kvl_container *other = tiny_container(2, 0, &shape);
    const void *bytes = NULL;
    size_t n_bytes = 0;
    const kvl_message header = header_for(&fetch, other, &bytes, &n_bytes);
    give(0, &header, bytes, n_bytes);
    kvl_container_release(other);
    assert_int_equal(n_ended, 1);
    assert_int_equal(ended.status, KVL_ERR_DAMAGED);
    assert_int_equal(latest(0, KVL_MESSAGE_ERROR)->message.reply.status, KVL_ERR_DAMAGED);
    assert_int_equal(kvl_protocol_stats(protocol)->messages_refused, 1);
}

static void test_the_container_of_another_model_is_refused(void **state)
{
    (void)state;
    const kvl_message fetch = begin_fetch();
    tiny_shape foreign = shape;
    foreign.fingerprint.bytes[0] = 8;
    kvl_container *other = tiny_container(1, 0, &foreign);
    const void *bytes = NULL;
    size_t n_bytes = 0;
    const kvl_message header = header_for(&fetch, other, &bytes, &n_bytes);
    give(0, &header, bytes, n_bytes);
    kvl_container_release(other);
    assert_int_equal(ended.status, KVL_ERR_FOREIGN);
    assert_non_null(strstr(ended_text, "0800000000"));
    assert_non_null(strstr(ended_text, "0700000000"));
}

static void test_blocks_outside_of_the_container_are_refused(void **state)
{
    (void)state;
    for (int what = 0; what < 4; what++) {
        if (what > 0) {
            kvl_protocol_destroy(protocol);
            assert_int_equal(create(), KVL_OK);
        }
        const kvl_message fetch = begin_fetch();
        kvl_container *container = tiny_container(1, 0, &shape);
        const void *bytes = NULL;
        size_t n_bytes = 0;
        const kvl_message header = header_for(&fetch, container, &bytes, &n_bytes);
        give(0, &header, bytes, n_bytes);
        kvl_message block = block_for(&fetch, 0);
        const uint8_t zeros[2000] = {0};
        if (what == 0) block.block.block = 3;
        if (what == 1) block.block.total = 2000;
        if (what == 2) block.block.id.bytes[0] ^= 1;
        if (what == 3) block.block.block = UINT32_MAX;
        give(0, &block, zeros, what == 1 ? 2000 : 1000);
        assert_int_equal(n_ended, 1);
        assert_int_equal(ended.status, KVL_ERR_DAMAGED);
        kvl_container_release(container);
    }
}

static void test_damage_is_asked_for_again_once(void **state)
{
    (void)state;
    kvl_message fetch = begin_fetch();
    kvl_container *container = tiny_container(1, 0, &shape);
    const void *bytes = NULL;
    size_t n_bytes = 0;
    kvl_message header = header_for(&fetch, container, &bytes, &n_bytes);
    give(0, &header, bytes, n_bytes);
    size_t n = 0;
    const void *good = kvl_container_block_view(container, 0, &n);
    kvl_message block = block_for(&fetch, 0);
    give(0, &block, good, n);
    const uint8_t bad[1000] = {1};
    block = block_for(&fetch, 1);
    give(0, &block, bad, n);
    assert_int_equal(n_ended, 0);
    assert_int_equal(kvl_protocol_stats(protocol)->blocks_damaged, 1);

    /* Nobody else has it, so the same peer gets a second chance, from the damaged block on. */
    fetch = latest(0, KVL_MESSAGE_FETCH)->message;
    assert_int_equal(fetch.fetch.block_first, 1);
    assert_true(fetch.fetch.header_checksum == header.fetch_header.header_checksum);
    header = message_of(KVL_MESSAGE_FETCH_HEADER, 10, fetch.request);
    header.fetch_header.id = fetch.fetch.id;
    header.fetch_header.n_blocks = 3;
    header.fetch_header.block_first = 1;
    header.fetch_header.header_checksum = fetch.fetch.header_checksum;
    give(0, &header, NULL, 0);
    block = block_for(&fetch, 1);
    give(0, &block, bad, n);
    assert_int_equal(n_ended, 1);
    assert_int_equal(ended.status, KVL_ERR_DAMAGED);
    kvl_container_release(container);
}

static void test_tiny_pieces_cost_credit_too(void **state)
{
    (void)state;
    const tiny_shape large = {.n_blocks = 3, .block_bytes = 6u << 20, .fingerprint = {{7}}};
    const kvl_message fetch = begin_fetch();
    kvl_container *container = tiny_container(1, 0, &large);
    const void *bytes = NULL;
    size_t n_bytes = 0;
    const kvl_message header = header_for(&fetch, container, &bytes, &n_bytes);
    give(0, &header, bytes, n_bytes);
    size_t n = 0;
    const uint8_t *view = kvl_container_block_view(container, 0, &n);
    kvl_message block = block_for(&fetch, 0);
    block.block.total = n;
    /* Each costs 16 KiB of credit, and the credit that comes back grows by what they cost. */
    for (size_t at = 0; at < 64 * 1024; at += 512) {
        block.block.offset = at;
        give(0, &block, view + at, 512);
    }
    assert_int_equal(n_ended, 0);
    const sent *credit = latest(0, KVL_MESSAGE_CREDIT);
    assert_non_null(credit);
    assert_true(credit->message.credit.granted_bytes > KVL_STREAM_WINDOW_BYTES + (1u << 20));
    assert_true(credit->message.credit.granted_bytes <=
                128 * KVL_PIECE_CHARGE_MIN + KVL_STREAM_WINDOW_BYTES);
    kvl_container_release(container);
}

static void test_a_stalled_holder_is_left(void **state)
{
    (void)state;
    (void)begin_fetch();
    const int64_t begin_ns = now_ns;
    while (n_ended == 0) {
        give_plain(0, KVL_MESSAGE_PONG, 10, 0); /* alive, but it sends no blocks */
        pass_ms(50);
        assert_true(now_ns - begin_ns < 3000 * MS);
    }
    assert_int_equal(ended.status, KVL_ERR_TIMEOUT);
    assert_true(count_sent(0, KVL_MESSAGE_FETCH) > 2); /* asked again before */
    assert_true(count_sent(0, KVL_MESSAGE_CANCEL) > 2);
}

static void test_a_server_that_asks_is_refused(void **state)
{
    (void)state;
    bring_up(0, 10);
    give_plain(0, KVL_MESSAGE_TASK, 10, 1);
    assert_int_equal(n_tasks, 0);
    assert_int_equal(kvl_protocol_stats(protocol)->messages_refused, 1);
    dial_in(CLIENT, "x", 5);
    give_plain(CLIENT, KVL_MESSAGE_LISTED, 5, 1);
    assert_int_equal(kvl_protocol_stats(protocol)->messages_refused, 2);
}

/* ---- serving ---- */

static kvl_message fetch_of(uint64_t epoch, uint64_t request, uint64_t number)
{
    kvl_message fetch = message_of(KVL_MESSAGE_FETCH, epoch, request);
    fetch.fetch.id = tiny_id(number);
    fetch.fetch.credit_bytes = KVL_CREDIT_BYTES_MIN;
    return fetch;
}

static uint64_t served_bytes(void)
{
    return kvl_protocol_stats(protocol)->bytes_served;
}

static void test_blocks_flow_under_credit(void **state)
{
    (void)state;
    const tiny_shape large = {.n_blocks = 5, .block_bytes = 3u << 20, .fingerprint = {{7}}};
    assert_true(tiny_store_add(&store, 1, 0, &large));
    dial_in(CLIENT, "x", 5);
    kvl_message fetch = fetch_of(5, 100, 1);
    give(CLIENT, &fetch, NULL, 0);
    assert_int_equal(served_bytes(), KVL_CREDIT_BYTES_MIN);
    give(CLIENT, &fetch, NULL, 0); /* the same once more changes nothing */
    assert_int_equal(served_bytes(), KVL_CREDIT_BYTES_MIN);
    kvl_message credit = message_of(KVL_MESSAGE_CREDIT, 5, 100);
    for (uint64_t granted = 2u << 20; granted <= 14u << 20; granted += 3u << 19) {
        credit.credit.granted_bytes = granted;
        give(CLIENT, &credit, NULL, 0);
        assert_int_equal(served_bytes(), granted >> 20 << 20); /* whole pieces only */
    }
    credit.credit.granted_bytes = UINT64_MAX; /* more than a window at once */
    give(CLIENT, &credit, NULL, 0);
    assert_int_equal(latest(CLIENT, KVL_MESSAGE_ERROR)->message.reply.status, KVL_ERR_TOO_LARGE);
    assert_false(kvl_protocol_is_active(protocol));
    assert_int_equal(count_sent(CLIENT, KVL_MESSAGE_FETCH_DONE), 0);
}

static void test_an_asker_cannot_hold_many_containers(void **state)
{
    (void)state;
    const tiny_shape large = {.n_blocks = 1, .block_bytes = 2u << 20, .fingerprint = {{7}}};
    assert_true(tiny_store_add(&store, 1, 0, &large));
    dial_in(CLIENT, "x", 5);
    for (uint64_t k = 0; k < 50; k++) {
        const kvl_message fetch = fetch_of(5, 100 + k, 1);
        give(CLIENT, &fetch, NULL, 0);
        now_ns += MS;
    }
    kvl_message credit = message_of(KVL_MESSAGE_CREDIT, 5, 0);
    credit.credit.granted_bytes = 4u << 20;
    size_t n_alive = 0;
    for (uint64_t k = 0; k < 50; k++) {
        const uint64_t before = served_bytes();
        credit.request = 100 + k;
        give(CLIENT, &credit, NULL, 0);
        n_alive += served_bytes() > before;
    }
    assert_int_equal(n_alive, KVL_STREAMS_PER_LINK); /* the latest ones */
}

static void test_without_a_model_there_are_only_tasks(void **state)
{
    (void)state;
    assert_true(tiny_store_add(&store, 1, 0, &shape));
    kvl_message hello = hello_of(KVL_MESSAGE_HELLO, "cli", 5, 1);
    memset(&hello.hello.fingerprint, 0, sizeof hello.hello.fingerprint);
    give(CLIENT, &hello, NULL, 0);
    const kvl_message fetch = fetch_of(5, 100, 1);
    give(CLIENT, &fetch, NULL, 0);
    assert_int_equal(latest(CLIENT, KVL_MESSAGE_ERROR)->message.reply.status, KVL_ERR_FOREIGN);
    give_plain(CLIENT, KVL_MESSAGE_TASK, 5, 101);
    assert_int_equal(n_tasks, 1);
}

/* ---- tasks ---- */

static void test_a_repeated_task_runs_once(void **state)
{
    (void)state;
    dial_in(CLIENT, "x", 5);
    give_plain(CLIENT, KVL_MESSAGE_TASK, 5, 300);
    give_plain(CLIENT, KVL_MESSAGE_TASK, 5, 300);
    assert_int_equal(n_tasks, 1);
    assert_int_equal(latest(CLIENT, KVL_MESSAGE_TASK_REPLY)->message.reply.status, KVL_IN_PROGRESS);
    kvl_protocol_reply(protocol, last_task, KVL_OK, NULL, kvl_bulk_copy("yes", 3), now_ns);
    assert_int_equal(latest(CLIENT, KVL_MESSAGE_TASK_REPLY)->n_bulk_bytes, 3);
    kvl_protocol_reply(protocol, last_task, KVL_OK, NULL, kvl_bulk_copy("no", 2), now_ns);
    assert_int_equal(latest(CLIENT, KVL_MESSAGE_TASK_REPLY)->n_bulk_bytes, 3); /* answered once */

    n_sent = 0;
    give_plain(CLIENT, KVL_MESSAGE_TASK_POLL, 5, 300); /* the reply was lost: here it is again */
    assert_int_equal(latest(CLIENT, KVL_MESSAGE_TASK_REPLY)->n_bulk_bytes, 3);
    give_plain(CLIENT, KVL_MESSAGE_TASK_DONE, 5, 300);
    give_plain(CLIENT, KVL_MESSAGE_TASK_POLL, 5, 300);
    assert_int_equal(latest(CLIENT, KVL_MESSAGE_ERROR)->message.reply.status, KVL_ERR_EXPIRED);
    give_plain(CLIENT, KVL_MESSAGE_TASK, 5, 300);
    assert_int_equal(n_tasks, 1);
    give_plain(CLIENT, KVL_MESSAGE_TASK_POLL, 5, 999);
    assert_int_equal(latest(CLIENT, KVL_MESSAGE_ERROR)->message.reply.status, KVL_ERR_NOT_FOUND);
    /* Long after its number has left the ring it is still known as old. */
    for (uint64_t k = 0; k < 3 * KVL_TASKS_REMEMBERED; k++) {
        give_plain(CLIENT, KVL_MESSAGE_TASK, 5, 1000 + k);
        kvl_protocol_reply(protocol, last_task, KVL_OK, NULL, NULL, now_ns);
        give_plain(CLIENT, KVL_MESSAGE_TASK_DONE, 5, 1000 + k);
        n_sent = 0;
    }
    const int before = n_tasks;
    give_plain(CLIENT, KVL_MESSAGE_TASK, 5, 300);
    assert_int_equal(n_tasks, before);
}

static void test_too_many_tasks_are_busy(void **state)
{
    (void)state;
    dial_in(CLIENT, "x", 5);
    for (uint64_t k = 0; k < KVL_TASKS_MAX; k++) give_plain(CLIENT, KVL_MESSAGE_TASK, 5, 300 + k);
    assert_int_equal(n_tasks, KVL_TASKS_MAX);
    give_plain(CLIENT, KVL_MESSAGE_TASK, 5, 5000);
    assert_int_equal(latest(CLIENT, KVL_MESSAGE_TASK_REPLY)->message.reply.status, KVL_ERR_BUSY);
    /* The asker is gone, but its tasks run on: their places are free when they are answered. */
    give_plain(CLIENT, KVL_MESSAGE_GOODBYE, 5, 0);
    dial_in(CLIENT, "x", 6);
    give_plain(CLIENT, KVL_MESSAGE_TASK, 6, 300);
    assert_int_equal(n_tasks, KVL_TASKS_MAX);
    const size_t before = n_sent;
    kvl_protocol_reply(protocol, last_task, KVL_OK, NULL, NULL, now_ns);
    assert_int_equal(n_sent, before);
    give_plain(CLIENT, KVL_MESSAGE_TASK, 6, 301);
    assert_int_equal(n_tasks, KVL_TASKS_MAX + 1);
}

static void test_too_many_requests_are_busy(void **state)
{
    (void)state;
    const kvl_digest id = tiny_id(1);
    for (uint32_t k = 0; k < KVL_OPS_MAX; k++) {
        kvl_protocol_fetch(protocol, NULL, &id, now_ns + 100 * MS, now_ns);
    }
    assert_int_equal(n_ended, 0);
    kvl_protocol_fetch(protocol, NULL, &id, now_ns + 100 * MS, now_ns);
    assert_int_equal(n_ended, 1);
    assert_int_equal(ended.status, KVL_ERR_BUSY);
    pass_ms(120);
    assert_int_equal(n_ended, 1 + KVL_OPS_MAX);
    assert_int_equal(ended.status, KVL_ERR_TIMEOUT);
}

/* ---- memory ---- */

/* One of everything; statuses do not matter, leaks and crashes do. */
static void do_everything(void)
{
    const kvl_message fetch = begin_fetch();
    dial_in(CLIENT, "b", 20);
    kvl_container *container = store.containers[0];
    const void *bytes = NULL;
    size_t n_bytes = 0;
    const kvl_message header = header_for(&fetch, container, &bytes, &n_bytes);
    give(0, &header, bytes, n_bytes);
    for (uint32_t k = 0; k < 3; k++) {
        const kvl_message block = block_for(&fetch, k);
        const void *view = kvl_container_block_view(container, k, &n_bytes);
        give(0, &block, view, n_bytes);
    }
    kvl_protocol_list(protocol, NULL, KVL_CONTAINER_ANCHOR, "", 1, now_ns + 100 * MS, now_ns);
    kvl_message listed =
        message_of(KVL_MESSAGE_LISTED, 10, latest(0, KVL_MESSAGE_LIST)->message.request);
    listed.listed.n_ids = 1;
    give(0, &listed, fetch.fetch.id.bytes, KVL_DIGEST_BYTES);
    kvl_message reply = message_of(KVL_MESSAGE_TASK_REPLY, 10, 0);
    kvl_bulk *body = kvl_bulk_copy("task", 4);
    if (body != NULL) {
        kvl_protocol_call(protocol, NULL, 0, body, now_ns + 100 * MS, now_ns);
        reply.request = latest(0, KVL_MESSAGE_TASK)->message.request;
        give(0, &reply, "reply", 5);
        kvl_bulk_release(body);
    }
    const kvl_message asked = fetch_of(20, 5, 1);
    give(CLIENT, &asked, NULL, 0);
    kvl_message list = message_of(KVL_MESSAGE_LIST, 20, 6);
    list.list.kind = KVL_CONTAINER_ANCHOR;
    give(CLIENT, &list, "", 1);
    while (kvl_protocol_work(protocol, now_ns)) continue;
    const kvl_frame parts[2] = {{"two", 3}, {"parts", 5}};
    const kvl_message task = message_of(KVL_MESSAGE_TASK, 20, 7);
    kvl_protocol_receive(protocol, CLIENT, &task, parts, 2, now_ns);
    if (n_tasks > 0) kvl_protocol_reply(protocol, last_task, KVL_OK, NULL, NULL, now_ns);
}

static void test_every_allocation_may_fail(void **state)
{
    (void)state;
    kvl_protocol_destroy(protocol);
    protocol = NULL;
    assert_true(tiny_store_add(&store, 1, 0, &shape));
    int64_t n_needed = 0;
    for (bool enough = false; !enough; n_needed++) {
        assert_true(n_needed < 200);
        kvl_container_spare_clear();
        const int64_t live = kvl_alloc_live();
        kvl_alloc_fail_after(n_needed);
        const kvl_status status = create();
        if (status == KVL_OK) {
            do_everything();
            pass_ms(300);
        }
        kvl_alloc_fail_after(-1);
        /* With memory for all of it, four things end well: fetch, list, call, and the task ran. */
        enough = status == KVL_OK && ended.status == KVL_OK && n_ended == 3 && n_tasks == 1 &&
                 kvl_protocol_stats(protocol)->containers_fetched == 1 &&
                 latest(CLIENT, KVL_MESSAGE_LISTED) != NULL &&
                 latest(CLIENT, KVL_MESSAGE_LISTED)->message.listed.n_ids == 1;
        if (status == KVL_OK) assert_int_equal(n_ended, 3 - (count_sent(0, KVL_MESSAGE_TASK) == 0));
        kvl_protocol_destroy(protocol);
        protocol = NULL;
        kvl_container_spare_clear();
        assert_int_equal(kvl_alloc_live(), live);
    }
    assert_true(n_needed > 5);
}

int main(void)
{
#define CASE(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        CASE(test_another_version_is_refused_with_both_named),
        CASE(test_a_wrong_name_behind_an_endpoint_is_refused),
        CASE(test_strangers_are_told_to_say_hello),
        CASE(test_a_restarted_peer_is_known_by_its_epoch),
        CASE(test_a_host_that_dials_anew_replaces_its_old_session),
        CASE(test_silence_and_pauses),
        CASE(test_a_call_waits_for_a_peer_that_is_being_dialled),
        CASE(test_the_header_of_another_container_is_refused),
        CASE(test_the_container_of_another_model_is_refused),
        CASE(test_blocks_outside_of_the_container_are_refused),
        CASE(test_damage_is_asked_for_again_once),
        CASE(test_tiny_pieces_cost_credit_too),
        CASE(test_a_stalled_holder_is_left),
        CASE(test_a_server_that_asks_is_refused),
        CASE(test_blocks_flow_under_credit),
        CASE(test_an_asker_cannot_hold_many_containers),
        CASE(test_without_a_model_there_are_only_tasks),
        CASE(test_a_repeated_task_runs_once),
        CASE(test_too_many_tasks_are_busy),
        CASE(test_too_many_requests_are_busy),
        CASE(test_every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
