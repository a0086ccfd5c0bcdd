/* exchange/protocol, one process that asks, against a test that plays all others: what hostile and
 * restarted peers do, and every allocation failing once. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "exchange_stage.h"

/* ---- greeting ---- */

static void test_another_version_is_refused_with_both_named(void **state)
{
    (void)state;
    kvl_message hello = stage_hello_of(KVL_MESSAGE_HELLO, "new", 5, 1);
    hello.hello.version_min = 7;
    hello.hello.version_max = 9;
    stage_give(CLIENT, &hello, NULL, 0);
    const stage_sent *error = stage_latest(CLIENT, KVL_MESSAGE_ERROR);
    assert_non_null(error);
    assert_int_equal(error->message.reply.status, KVL_ERR_UNSUPPORTED);
    assert_non_null(strstr(error->message.reply.text, "new speaks protocol versions 7 to 9"));
    assert_non_null(strstr(error->message.reply.text, "me speaks 1 to 1"));
    assert_false(kvl_protocol_client_is_open(stage.protocol, CLIENT));
    hello = stage_hello_of(KVL_MESSAGE_HELLO, "other", 5, 1);
    hello.hello.magic = 0x50545448;
    stage_give(CLIENT, &hello, NULL, 0);
    assert_non_null(strstr(stage_latest(CLIENT, KVL_MESSAGE_ERROR)->message.reply.text, "magic"));
    assert_int_equal(kvl_protocol_stats(stage.protocol)->peers_refused, 2);
}

static void test_a_wrong_name_behind_an_endpoint_is_refused(void **state)
{
    (void)state;
    kvl_protocol_connected(stage.protocol, 0, stage.now_ns);
    const kvl_message welcome = stage_hello_of(KVL_MESSAGE_WELCOME, "b", 9,
                                               stage_latest(0, KVL_MESSAGE_HELLO)->message.request);
    stage_give(0, &welcome, NULL, 0);
    assert_false(kvl_protocol_peer_is_up(stage.protocol, 0));
    kvl_bulk *body = kvl_bulk_copy("x", 1);
    kvl_protocol_call(stage.protocol, NULL, 0, body, stage.now_ns + 1000 * MS, stage.now_ns);
    kvl_bulk_release(body);
    assert_int_equal(stage.ended.status, KVL_ERR_UNREACHABLE);
    assert_non_null(strstr(stage.ended_text, "answered by b"));
}

static void test_strangers_are_told_to_say_hello(void **state)
{
    (void)state;
    stage_give_plain(CLIENT, KVL_MESSAGE_PING, 5, 3);
    assert_int_equal(stage_latest(CLIENT, KVL_MESSAGE_ERROR)->message.reply.status, KVL_ERR_DENIED);
    assert_int_equal(stage_latest(CLIENT, KVL_MESSAGE_ERROR)->message.request, 3);
    stage_give_plain(CLIENT, KVL_MESSAGE_ERROR, 5, 3); /* an error is never answered */
    assert_int_equal(stage_count_sent(CLIENT, KVL_MESSAGE_ERROR), 1);
    stage_dial_in(CLIENT, "x", 5);
    stage_give_plain(CLIENT, KVL_MESSAGE_PING, 6, 3); /* of an earlier process, and late */
    assert_int_equal(stage_count_sent(CLIENT, KVL_MESSAGE_PONG), 0);
    stage_give_plain(CLIENT, KVL_MESSAGE_PING, 5, 3);
    assert_int_equal(stage_count_sent(CLIENT, KVL_MESSAGE_PONG), 1);
}

/* ---- restarts ---- */

static void announce_from(kvl_link link, uint64_t epoch, const kvl_digest *id)
{
    kvl_message announce = stage_message_of(KVL_MESSAGE_ANNOUNCE, epoch, 0);
    announce.announce.id = *id;
    announce.announce.kind = KVL_CONTAINER_ANCHOR;
    stage_give(link, &announce, NULL, 0);
}

static void test_a_restarted_peer_is_known_by_its_epoch(void **state)
{
    (void)state;
    const kvl_digest id = tiny_id(1);
    stage_pass_ms(KVL_CONNECT_GRACE_NS / MS);
    stage_bring_up(0, 10);
    stage_dial_in(CLIENT, "a", 10);
    announce_from(CLIENT, 10, &id);
    int waiter = 0;
    kvl_protocol_fetch(stage.protocol, &waiter, &id, stage.now_ns + 60000 * MS, stage.now_ns);
    assert_non_null(stage_latest(0, KVL_MESSAGE_FETCH)); /* announced: asked at once */
    assert_int_equal(stage_count_sent(0, KVL_MESSAGE_LOCATE), 0);

    stage_pass_ms(200);
    stage_give_plain(0, KVL_MESSAGE_PONG, 11,
                     0); /* no disconnection was seen, but it is a new process */
    assert_true(kvl_protocol_peer_is_up(stage.protocol, 0));
    const kvl_message welcome = stage_hello_of(KVL_MESSAGE_WELCOME, "a", 11,
                                               stage_latest(0, KVL_MESSAGE_HELLO)->message.request);
    stage_give(0, &welcome, NULL, 0);
    assert_true(kvl_protocol_peer_is_up(stage.protocol, 0));
    assert_int_equal(stage.n_ended, 1);
    assert_int_equal(stage.ended.status, KVL_ERR_UNREACHABLE);
    assert_ptr_equal(stage.ended.waiter, &waiter);
    assert_int_equal(kvl_protocol_stats(stage.protocol)->peers_lost, 1);

    /* What the dead process announced is forgotten: both are asked. */
    stage_bring_up(1, 20);
    stage.n_sent = 0;
    kvl_protocol_fetch(stage.protocol, &waiter, &id, stage.now_ns + 60000 * MS, stage.now_ns);
    assert_null(stage_latest(0, KVL_MESSAGE_FETCH));
    assert_non_null(stage_latest(0, KVL_MESSAGE_LOCATE));
}

static void test_a_host_that_dials_anew_replaces_its_old_session(void **state)
{
    (void)state;
    stage_dial_in(CLIENT, "a", 10);
    stage_dial_in(CLIENT + 1, "a", 11);
    assert_false(kvl_protocol_client_is_open(stage.protocol, CLIENT));
    stage_dial_in(CLIENT + 2, "visitor", 12); /* no peer of ours: two may have one name */
    stage_dial_in(CLIENT + 3, "visitor", 13);
    assert_true(kvl_protocol_client_is_open(stage.protocol, CLIENT + 2));
    stage_pass_ms(KVL_CLIENT_SILENCE_NS / MS + 20);
    assert_false(kvl_protocol_client_is_open(stage.protocol, CLIENT + 3));
}

static void test_silence_and_pauses(void **state)
{
    (void)state;
    stage_bring_up(0, 10);
    stage_pass_ms(KVL_PEER_SILENCE_NS / MS - 50);
    assert_true(kvl_protocol_peer_is_up(stage.protocol, 0));
    assert_true(stage_count_sent(0, KVL_MESSAGE_PING) > 5);
    /* This process stands still for a minute: that is not the peer's fault. */
    stage_give_plain(0, KVL_MESSAGE_PONG, 10, 0);
    stage.now_ns += 60000 * MS;
    kvl_protocol_tick(stage.protocol, stage.now_ns);
    assert_true(kvl_protocol_peer_is_up(stage.protocol, 0));
    stage_pass_ms(KVL_PEER_SILENCE_NS / MS + 20);
    assert_false(kvl_protocol_peer_is_up(stage.protocol, 0));
}

static void test_a_call_waits_for_a_peer_that_is_being_dialled(void **state)
{
    (void)state;
    kvl_bulk *body = kvl_bulk_copy("x", 1);
    kvl_protocol_call(stage.protocol, NULL, 0, body, stage.now_ns + 10000 * MS, stage.now_ns);
    assert_int_equal(stage.n_ended, 0);
    stage_bring_up(0, 10);
    assert_non_null(stage_latest(0, KVL_MESSAGE_TASK));
    kvl_protocol_disconnected(stage.protocol, 0, stage.now_ns);
    assert_int_equal(stage.ended.status, KVL_ERR_UNREACHABLE);
    kvl_protocol_call(stage.protocol, NULL, 0, body, stage.now_ns + 10000 * MS, stage.now_ns);
    assert_int_equal(stage.n_ended, 2); /* it was there and is gone: at once */
    kvl_protocol_call(stage.protocol, NULL, 1, body, stage.now_ns + 10000 * MS, stage.now_ns);
    stage_pass_ms(KVL_CONNECT_GRACE_NS / MS + 20);
    assert_int_equal(stage.n_ended, 3); /* it never came */
    kvl_bulk_release(body);
}

/* ---- one peer alone ---- */

/* Whether it has it, one peer says to a Fetch as well as to a Locate, a round trip earlier. */
static void test_a_single_peer_is_not_asked_twice(void **state)
{
    (void)state;
    const kvl_digest id = tiny_id(1);
    stage_pass_ms(KVL_CONNECT_GRACE_NS / MS);
    stage_bring_up(0, 10);
    kvl_protocol_fetch(stage.protocol, NULL, &id, stage.now_ns + 60000 * MS, stage.now_ns);
    assert_int_equal(stage_count_sent(0, KVL_MESSAGE_LOCATE), 0);
    const kvl_message fetch = stage_latest(0, KVL_MESSAGE_FETCH)->message;
    kvl_message error = stage_message_of(KVL_MESSAGE_ERROR, 10, fetch.request);
    error.reply.status = KVL_ERR_NOT_FOUND;
    stage_give(0, &error, NULL, 0);
    assert_int_equal(stage.n_ended, 1);
    assert_int_equal(stage.ended.status, KVL_ERR_NOT_FOUND);
    assert_int_equal(stage_count_sent(0, KVL_MESSAGE_LOCATE), 0);

    /* With as many streams as it may have, it is asked: a miss does not wait for hits to end. */
    for (uint32_t i = 0; i < KVL_STREAMS_PER_PEER; i++)
        kvl_protocol_fetch(stage.protocol, NULL, &id, stage.now_ns + 60000 * MS, stage.now_ns);
    assert_int_equal(stage_count_sent(0, KVL_MESSAGE_LOCATE), 0);
    kvl_protocol_fetch(stage.protocol, NULL, &id, stage.now_ns + 60000 * MS, stage.now_ns);
    assert_int_equal(stage_count_sent(0, KVL_MESSAGE_LOCATE), 1);
}

/* ---- hostile answers to a fetch ---- */

/* Starts a fetch of container 1 at peer 0 and returns its Fetch. Peer 1 may be up already. */
static kvl_message begin_fetch(void)
{
    const kvl_digest id = tiny_id(1);
    stage_pass_ms(KVL_CONNECT_GRACE_NS / MS); /* nobody waits for peer 1 any more */
    stage_bring_up(0, 10);
    kvl_protocol_fetch(stage.protocol, NULL, &id, stage.now_ns + 60000 * MS, stage.now_ns);
    const stage_sent *locate = stage_latest(0, KVL_MESSAGE_LOCATE);
    if (locate != NULL) {
        kvl_message located = stage_message_of(KVL_MESSAGE_LOCATED, 10, locate->message.request);
        located.located.n_ids = located.located.held = 1;
        stage_give(0, &located, NULL, 0);
    }
    assert_non_null(stage_latest(0, KVL_MESSAGE_FETCH));
    return stage_latest(0, KVL_MESSAGE_FETCH)->message;
}

static kvl_message header_for(const kvl_message *fetch, kvl_container *container,
                              const void **bytes, size_t *n_bytes)
{
    *bytes = kvl_container_header(container, n_bytes);
    kvl_message header = stage_message_of(KVL_MESSAGE_FETCH_HEADER, 10, fetch->request);
    header.fetch_header.id = fetch->fetch.id;
    header.fetch_header.n_blocks = kvl_container_n_blocks(container);
    header.fetch_header.header_checksum = kvl_checksum(*bytes, *n_bytes);
    header.fetch_header.header_bytes = (uint32_t)*n_bytes;
    return header;
}

static kvl_message block_for(const kvl_message *fetch, uint32_t block)
{
    kvl_message message = stage_message_of(KVL_MESSAGE_BLOCK, 10, fetch->request);
    message.block.id = fetch->fetch.id;
    message.block.block = block;
    message.block.total = stage.shape.block_bytes;
    return message;
}

static void test_the_header_of_another_container_is_refused(void **state)
{
    (void)state;
    const kvl_message fetch = begin_fetch();
    kvl_container *other = tiny_container(2, 0, &stage.shape);
    const void *bytes = NULL;
    size_t n_bytes = 0;
    const kvl_message header = header_for(&fetch, other, &bytes, &n_bytes);
    stage_give(0, &header, bytes, n_bytes);
    kvl_container_release(other);
    assert_int_equal(stage.n_ended, 1);
    assert_int_equal(stage.ended.status, KVL_ERR_DAMAGED);
    assert_int_equal(stage_latest(0, KVL_MESSAGE_ERROR)->message.reply.status, KVL_ERR_DAMAGED);
    assert_int_equal(kvl_protocol_stats(stage.protocol)->messages_refused, 1);
}

static void test_the_container_of_another_model_is_refused(void **state)
{
    (void)state;
    const kvl_message fetch = begin_fetch();
    tiny_shape foreign = stage.shape;
    foreign.fingerprint.bytes[0] = 8;
    kvl_container *other = tiny_container(1, 0, &foreign);
    const void *bytes = NULL;
    size_t n_bytes = 0;
    const kvl_message header = header_for(&fetch, other, &bytes, &n_bytes);
    stage_give(0, &header, bytes, n_bytes);
    kvl_container_release(other);
    assert_int_equal(stage.ended.status, KVL_ERR_FOREIGN);
    assert_non_null(strstr(stage.ended_text, "0800000000"));
    assert_non_null(strstr(stage.ended_text, "0700000000"));
}

static void test_blocks_outside_of_the_container_are_refused(void **state)
{
    (void)state;
    for (int what = 0; what < 4; what++) {
        if (what > 0) {
            kvl_protocol_destroy(stage.protocol);
            assert_int_equal(stage_create(), KVL_OK);
        }
        const kvl_message fetch = begin_fetch();
        kvl_container *container = tiny_container(1, 0, &stage.shape);
        const void *bytes = NULL;
        size_t n_bytes = 0;
        const kvl_message header = header_for(&fetch, container, &bytes, &n_bytes);
        stage_give(0, &header, bytes, n_bytes);
        kvl_message block = block_for(&fetch, 0);
        const uint8_t zeros[2000] = {0};
        if (what == 0) block.block.block = 3;
        if (what == 1) block.block.total = 2000;
        if (what == 2) block.block.id.bytes[0] ^= 1;
        if (what == 3) block.block.block = UINT32_MAX;
        stage_give(0, &block, zeros, what == 1 ? 2000 : 1000);
        assert_int_equal(stage.n_ended, 1);
        assert_int_equal(stage.ended.status, KVL_ERR_DAMAGED);
        kvl_container_release(container);
    }
}

static void test_damage_is_asked_for_again_once(void **state)
{
    (void)state;
    kvl_message fetch = begin_fetch();
    kvl_container *container = tiny_container(1, 0, &stage.shape);
    const void *bytes = NULL;
    size_t n_bytes = 0;
    kvl_message header = header_for(&fetch, container, &bytes, &n_bytes);
    stage_give(0, &header, bytes, n_bytes);
    size_t n = 0;
    const void *good = kvl_container_block_view(container, 0, &n);
    kvl_message block = block_for(&fetch, 0);
    stage_give(0, &block, good, n);
    const uint8_t bad[1000] = {1};
    block = block_for(&fetch, 1);
    stage_give(0, &block, bad, n);
    assert_int_equal(stage.n_ended, 0);
    assert_int_equal(kvl_protocol_stats(stage.protocol)->blocks_damaged, 1);

    /* Nobody else has it, so the same peer gets a second chance, from the damaged block on. */
    fetch = stage_latest(0, KVL_MESSAGE_FETCH)->message;
    assert_int_equal(fetch.fetch.block_first, 1);
    assert_true(fetch.fetch.header_checksum == header.fetch_header.header_checksum);
    header = stage_message_of(KVL_MESSAGE_FETCH_HEADER, 10, fetch.request);
    header.fetch_header.id = fetch.fetch.id;
    header.fetch_header.n_blocks = 3;
    header.fetch_header.block_first = 1;
    header.fetch_header.header_checksum = fetch.fetch.header_checksum;
    stage_give(0, &header, NULL, 0);
    block = block_for(&fetch, 1);
    stage_give(0, &block, bad, n);
    assert_int_equal(stage.n_ended, 1);
    assert_int_equal(stage.ended.status, KVL_ERR_DAMAGED);
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
    stage_give(0, &header, bytes, n_bytes);
    size_t n = 0;
    const uint8_t *view = kvl_container_block_view(container, 0, &n);
    kvl_message block = block_for(&fetch, 0);
    block.block.total = n;
    /* Each costs 16 KiB of credit, and the credit that comes back grows by what they cost. */
    for (size_t at = 0; at < 64 * 1024; at += 512) {
        block.block.offset = at;
        stage_give(0, &block, view + at, 512);
    }
    assert_int_equal(stage.n_ended, 0);
    const stage_sent *credit = stage_latest(0, KVL_MESSAGE_CREDIT);
    assert_non_null(credit);
    assert_true(credit->message.credit.granted_bytes > KVL_STREAM_WINDOW_BYTES + (1u << 20));
    assert_true(credit->message.credit.granted_bytes <=
                128 * KVL_PIECE_CHARGE_MIN + KVL_STREAM_WINDOW_BYTES);
    kvl_container_release(container);
}

static void test_late_answers_are_ignored(void **state)
{
    (void)state;
    stage_bring_up(1, 20);
    kvl_message fetch = begin_fetch();
    kvl_container *container = tiny_container(1, 0, &stage.shape);
    const void *bytes = NULL;
    size_t n_bytes = 0;
    const kvl_message header = header_for(&fetch, container, &bytes, &n_bytes);
    stage_give(0, &header, bytes, n_bytes);
    stage_pass_ms(300); /* nothing comes, so it is asked again */
    assert_true(stage_latest(0, KVL_MESSAGE_FETCH)->message.request != fetch.request);
    kvl_message resumed = header;
    resumed.request = stage_latest(0, KVL_MESSAGE_FETCH)->message.request;
    resumed.fetch_header.header_bytes = 0; /* it has the header already */
    stage_give(0, &resumed, NULL, 0);
    const uint64_t before = kvl_protocol_stats(stage.protocol)->bytes_fetched;
    const kvl_message block = block_for(&fetch, 0);
    stage_give(0, &block, kvl_container_block_view(container, 0, &n_bytes), n_bytes);
    assert_true(kvl_protocol_stats(stage.protocol)->bytes_fetched == before);
    kvl_container_release(container);
    kvl_protocol_stop(stage.protocol);
    assert_int_equal(stage.ended.status, KVL_ERR_CANCELLED);

    /* The next fetch has the same slot; an answer to the first is not one to it. */
    kvl_message located = stage_message_of(KVL_MESSAGE_LOCATED, 10,
                                           stage_latest(0, KVL_MESSAGE_LOCATE)->message.request);
    located.located.n_ids = located.located.held = 1;
    stage.n_sent = 0;
    const kvl_digest id = tiny_id(2);
    kvl_protocol_fetch(stage.protocol, NULL, &id, stage.now_ns + 60000 * MS, stage.now_ns);
    stage_give(0, &located, NULL, 0);
    assert_int_equal(stage_count_sent(0, KVL_MESSAGE_FETCH), 0);
}

static void test_a_peer_answers_a_list_once(void **state)
{
    (void)state;
    stage_bring_up(0, 10);
    stage_bring_up(1, 20);
    kvl_protocol_list(stage.protocol, NULL, KVL_CONTAINER_ANCHOR, NULL, 0,
                      stage.now_ns + 60000 * MS, stage.now_ns);
    kvl_message listed = stage_message_of(KVL_MESSAGE_LISTED, 10,
                                          stage_latest(0, KVL_MESSAGE_LIST)->message.request);
    listed.listed.n_ids = 1;
    for (uint64_t number = 1; number <= 3; number++) {
        const kvl_digest id = tiny_id(number);
        stage_give(0, &listed, id.bytes, sizeof id.bytes);
    }
    assert_int_equal(stage.n_ended, 0); /* the other one is still to answer */
    kvl_protocol_disconnected(stage.protocol, 1, stage.now_ns);
    assert_int_equal(stage.n_ended, 1);
    assert_int_equal(stage.ended.status, KVL_OK);
    assert_int_equal(stage.ended.n_ids, 1);
}

static void test_a_stalled_holder_is_left(void **state)
{
    (void)state;
    (void)begin_fetch();
    const int64_t begin_ns = stage.now_ns;
    while (stage.n_ended == 0) {
        stage_give_plain(0, KVL_MESSAGE_PONG, 10, 0); /* alive, but it sends no blocks */
        stage_pass_ms(50);
        assert_true(stage.now_ns - begin_ns < 3000 * MS);
    }
    assert_int_equal(stage.ended.status, KVL_ERR_TIMEOUT);
    assert_true(stage_count_sent(0, KVL_MESSAGE_FETCH) > 2); /* asked again before */
    assert_true(stage_count_sent(0, KVL_MESSAGE_CANCEL) > 2);
}

/* A holder that is slow to say so has its whole time when the one that was sending is lost, however
 * long that one sent. */
static void test_a_slow_holder_is_waited_for_after_another_is_lost(void **state)
{
    (void)state;
    stage_bring_up(1, 20);
    const kvl_message fetch = begin_fetch();
    kvl_container *container = tiny_container(1, 0, &stage.shape);
    const void *bytes = NULL;
    size_t n_bytes = 0;
    const kvl_message header = header_for(&fetch, container, &bytes, &n_bytes);
    stage_give(0, &header, bytes, n_bytes);
    const uint8_t *view = kvl_container_block_view(container, 0, &n_bytes);
    kvl_message block = block_for(&fetch, 0);
    for (size_t at = 0; at < 500; at += 50) { /* 2 s: twice the patience */
        block.block.offset = at;
        stage_give(0, &block, view + at, 50);
        stage_give_plain(1, KVL_MESSAGE_PONG, 20, 0);
        stage_pass_ms(200);
    }
    kvl_container_release(container);
    stage.n_sent = 0;
    kvl_protocol_disconnected(stage.protocol, 0, stage.now_ns);
    stage_pass_ms(700);
    assert_int_equal(stage.n_ended, 0);
    const stage_sent *locate = stage_latest(1, KVL_MESSAGE_LOCATE); /* asked once more */
    assert_non_null(locate);
    kvl_message located = stage_message_of(KVL_MESSAGE_LOCATED, 20, locate->message.request);
    located.located.n_ids = located.located.held = 1;
    stage_give(1, &located, NULL, 0);
    assert_non_null(stage_latest(1, KVL_MESSAGE_FETCH));
}

static void test_a_server_that_asks_is_refused(void **state)
{
    (void)state;
    stage_bring_up(0, 10);
    stage_give_plain(0, KVL_MESSAGE_TASK, 10, 1);
    assert_int_equal(stage.n_tasks, 0);
    assert_int_equal(kvl_protocol_stats(stage.protocol)->messages_refused, 1);
    stage_dial_in(CLIENT, "x", 5);
    stage_give_plain(CLIENT, KVL_MESSAGE_LISTED, 5, 1);
    assert_int_equal(kvl_protocol_stats(stage.protocol)->messages_refused, 2);
}

/* ---- memory ---- */

/* One of everything; statuses do not matter, leaks and crashes do. */
static void do_everything(void)
{
    const kvl_message fetch = begin_fetch();
    stage_dial_in(CLIENT, "b", 20);
    kvl_container *container = stage.store.containers[0];
    const void *bytes = NULL;
    size_t n_bytes = 0;
    const kvl_message header = header_for(&fetch, container, &bytes, &n_bytes);
    stage_give(0, &header, bytes, n_bytes);
    for (uint32_t k = 0; k < 3; k++) {
        const kvl_message block = block_for(&fetch, k);
        const void *view = kvl_container_block_view(container, k, &n_bytes);
        stage_give(0, &block, view, n_bytes);
    }
    kvl_protocol_list(stage.protocol, NULL, KVL_CONTAINER_ANCHOR, "", 1, stage.now_ns + 100 * MS,
                      stage.now_ns);
    kvl_message listed = stage_message_of(KVL_MESSAGE_LISTED, 10,
                                          stage_latest(0, KVL_MESSAGE_LIST)->message.request);
    listed.listed.n_ids = 1;
    stage_give(0, &listed, fetch.fetch.id.bytes, KVL_DIGEST_BYTES);
    kvl_message reply = stage_message_of(KVL_MESSAGE_TASK_REPLY, 10, 0);
    kvl_bulk *body = kvl_bulk_copy("task", 4);
    if (body != NULL) {
        kvl_protocol_call(stage.protocol, NULL, 0, body, stage.now_ns + 100 * MS, stage.now_ns);
        reply.request = stage_latest(0, KVL_MESSAGE_TASK)->message.request;
        stage_give(0, &reply, "reply", 5);
        kvl_bulk_release(body);
    }
    const kvl_message asked = stage_fetch_of(20, 5, 1);
    stage_give(CLIENT, &asked, NULL, 0);
    kvl_message list = stage_message_of(KVL_MESSAGE_LIST, 20, 6);
    list.list.kind = KVL_CONTAINER_ANCHOR;
    stage_give(CLIENT, &list, "", 1);
    while (kvl_protocol_work(stage.protocol, stage.now_ns)) continue;
    const kvl_frame parts[2] = {{"two", 3}, {"parts", 5}};
    const kvl_message task = stage_message_of(KVL_MESSAGE_TASK, 20, 7);
    kvl_protocol_receive(stage.protocol, CLIENT, &task, parts, 2, stage.now_ns);
    if (stage.n_tasks > 0)
        kvl_protocol_reply(stage.protocol, stage.last_task, KVL_OK, NULL, NULL, stage.now_ns);
}

static void test_every_allocation_may_fail(void **state)
{
    (void)state;
    kvl_protocol_destroy(stage.protocol);
    stage.protocol = NULL;
    assert_true(tiny_store_add(&stage.store, 1, 0, &stage.shape));
    int64_t n_needed = 0;
    for (bool enough = false; !enough; n_needed++) {
        assert_true(n_needed < 200);
        kvl_container_spare_clear();
        const int64_t live = kvl_alloc_live();
        kvl_alloc_fail_after(n_needed);
        const kvl_status status = stage_create();
        if (status == KVL_OK) {
            do_everything();
            stage_pass_ms(300);
        }
        kvl_alloc_fail_after(-1);
        /* With memory for all of it, four things end well: fetch, list, call, and the task ran. */
        enough = status == KVL_OK && stage.ended.status == KVL_OK && stage.n_ended == 3 &&
                 stage.n_tasks == 1 &&
                 kvl_protocol_stats(stage.protocol)->containers_fetched == 1 &&
                 stage_latest(CLIENT, KVL_MESSAGE_LISTED) != NULL &&
                 stage_latest(CLIENT, KVL_MESSAGE_LISTED)->message.listed.n_ids == 1;
        if (status == KVL_OK)
            assert_int_equal(stage.n_ended, 3 - (stage_count_sent(0, KVL_MESSAGE_TASK) == 0));
        kvl_protocol_destroy(stage.protocol);
        stage.protocol = NULL;
        kvl_container_spare_clear();
        assert_int_equal(kvl_alloc_live(), live);
    }
    assert_true(n_needed > 5);
}

int main(void)
{
#define CASE(name) cmocka_unit_test_setup_teardown(name, stage_set_up, stage_tear_down)
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
        CASE(test_a_single_peer_is_not_asked_twice),
        CASE(test_late_answers_are_ignored),
        CASE(test_a_peer_answers_a_list_once),
        CASE(test_a_stalled_holder_is_left),
        CASE(test_a_slow_holder_is_waited_for_after_another_is_lost),
        CASE(test_a_server_that_asks_is_refused),
        CASE(test_every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
