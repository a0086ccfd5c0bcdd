/* exchange_hedge_test.c: a second holder is asked when the first takes longer to begin than it
 * usually does; whoever begins first goes on, and nothing is left over of the other. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "exchange/protocol_state.h"
#include "exchange_stage.h"
#include "test_random.h"

enum { USUAL_MS = 30 };

static kvl_message header_for(const kvl_message *fetch, kvl_link link, kvl_container *container,
                              const void **bytes, size_t *n_bytes)
{
    *bytes = kvl_container_header(container, n_bytes);
    kvl_message header =
        stage_message_of(KVL_MESSAGE_FETCH_HEADER, link == 0 ? 10 : 20, fetch->request);
    header.fetch_header.id = fetch->fetch.id;
    header.fetch_header.n_blocks = kvl_container_n_blocks(container);
    header.fetch_header.header_checksum = kvl_checksum(*bytes, *n_bytes);
    header.fetch_header.header_bytes = (uint32_t)*n_bytes;
    return header;
}

/* The container from one who was asked for it, whole. */
static void give_all(const kvl_message *fetch, kvl_link link, uint64_t number)
{
    kvl_container *container = tiny_container(number, 0, &stage.shape);
    const void *bytes = NULL;
    size_t n_bytes = 0;
    const kvl_message header = header_for(fetch, link, container, &bytes, &n_bytes);
    stage_give(link, &header, bytes, n_bytes);
    for (uint32_t b = 0; b < kvl_container_n_blocks(container); b++) {
        kvl_message block =
            stage_message_of(KVL_MESSAGE_BLOCK, link == 0 ? 10 : 20, fetch->request);
        block.block.id = fetch->fetch.id;
        block.block.block = b;
        block.block.total = stage.shape.block_bytes;
        stage_give(link, &block, kvl_container_block_view(container, b, &n_bytes),
                   stage.shape.block_bytes);
    }
    kvl_container_release(container);
}

static void begin(uint64_t number)
{
    const kvl_digest id = tiny_id(number);
    stage.n_sent = 0;
    kvl_protocol_fetch(stage.protocol, NULL, &id, stage.now_ns + 60000 * MS, stage.now_ns);
}

static void locate(kvl_link link, uint32_t held)
{
    kvl_message located = stage_message_of(KVL_MESSAGE_LOCATED, link == 0 ? 10 : 20,
                                           stage_latest(link, KVL_MESSAGE_LOCATE)->message.request);
    located.located.n_ids = 1;
    located.located.held = held;
    stage_give(link, &located, NULL, 0);
}

static void keep_up(void)
{
    stage_give_plain(0, KVL_MESSAGE_PONG, 10, 0);
    stage_give_plain(1, KVL_MESSAGE_PONG, 20, 0);
}

/* Both are up, and peer 0 is known to take USUAL_MS. */
static void prepare(void)
{
    stage_pass_ms(KVL_CONNECT_GRACE_NS / MS);
    stage_bring_up(0, 10);
    for (uint32_t i = 0; i < KVL_HEDGE_SAMPLES_MIN; i++) {
        begin(100 + i);
        stage_pass_ms(USUAL_MS);
        const kvl_message fetch = stage_latest(0, KVL_MESSAGE_FETCH)->message;
        give_all(&fetch, 0, 100 + i);
        assert_int_equal(stage.ended.status, KVL_OK);
    }
    stage_bring_up(1, 20);
    keep_up();
}

/* Peer 0 is asked for container 1 and peer 1 has it too; after the usual time, it is asked. */
static void begin_hedged(kvl_message fetches[2])
{
    prepare();
    begin(1);
    locate(0, 1);
    locate(1, 1);
    fetches[0] = stage_latest(0, KVL_MESSAGE_FETCH)->message;
    assert_int_equal(stage_count_sent(1, KVL_MESSAGE_FETCH), 0);
    stage_pass_ms(USUAL_MS - 10);
    assert_int_equal(stage_count_sent(1, KVL_MESSAGE_FETCH), 0);
    stage_pass_ms(20);
    assert_int_equal(stage_count_sent(1, KVL_MESSAGE_FETCH), 1);
    fetches[1] = stage_latest(1, KVL_MESSAGE_FETCH)->message;
    assert_true(fetches[1].request != fetches[0].request);
    assert_int_equal(kvl_protocol_stats(stage.protocol)->hedges, 1);
}

/* Streams are counted where they are limited: a leak would end all fetches from a peer. */
static void expect_no_streams(void)
{
    for (uint32_t i = 0; i < 2; i++) assert_int_equal(stage.protocol->peers[i].n_streams, 0);
}

static void test_the_second_may_win(void **state)
{
    (void)state;
    kvl_message fetches[2];
    begin_hedged(fetches);
    const int ended = stage.n_ended;
    give_all(&fetches[1], 1, 1);
    assert_int_equal(stage.n_ended, ended + 1);
    assert_int_equal(stage.ended.status, KVL_OK);
    assert_int_equal(stage_count_sent(0, KVL_MESSAGE_CANCEL), 1);
    assert_int_equal(stage_latest(0, KVL_MESSAGE_CANCEL)->message.request, fetches[0].request);
    give_all(&fetches[0], 0, 1); /* late: of nobody's interest */
    assert_int_equal(stage.n_ended, ended + 1);
    assert_int_equal(kvl_protocol_stats(stage.protocol)->hedges_won, 1);
    expect_no_streams();
}

static void test_the_first_may_win(void **state)
{
    (void)state;
    kvl_message fetches[2];
    begin_hedged(fetches);
    give_all(&fetches[0], 0, 1);
    assert_int_equal(stage.ended.status, KVL_OK);
    assert_int_equal(stage_latest(1, KVL_MESSAGE_CANCEL)->message.request, fetches[1].request);
    give_all(&fetches[1], 1, 1);
    assert_int_equal(kvl_protocol_stats(stage.protocol)->hedges_won, 0);
    expect_no_streams();
}

static void test_either_may_be_lost(void **state)
{
    (void)state;
    kvl_message fetches[2];
    begin_hedged(fetches);
    kvl_protocol_disconnected(stage.protocol, 1, stage.now_ns);
    const int ended = stage.n_ended;
    give_all(&fetches[0], 0, 1);
    assert_int_equal(stage.n_ended, ended + 1);
    assert_int_equal(stage.ended.status, KVL_OK);
    expect_no_streams();
}

/* The second is asked again, under another number, when the first is gone. */
static void test_the_second_goes_on_alone(void **state)
{
    (void)state;
    kvl_message fetches[2];
    begin_hedged(fetches);
    kvl_protocol_disconnected(stage.protocol, 0, stage.now_ns);
    const kvl_message again = stage_latest(1, KVL_MESSAGE_FETCH)->message;
    give_all(&again, 1, 1);
    assert_int_equal(stage.ended.status, KVL_OK);
    expect_no_streams();
}

static void test_the_second_may_not_have_it(void **state)
{
    (void)state;
    kvl_message fetches[2];
    begin_hedged(fetches);
    const int ended = stage.n_ended;
    kvl_message error = stage_message_of(KVL_MESSAGE_ERROR, 20, fetches[1].request);
    error.reply.status = KVL_ERR_NOT_FOUND;
    stage_give(1, &error, NULL, 0);
    stage_pass_ms(100);
    assert_int_equal(stage_count_sent(1, KVL_MESSAGE_FETCH), 1); /* it has said so */
    assert_int_equal(stage.n_ended, ended);
    give_all(&fetches[0], 0, 1);
    assert_int_equal(stage.ended.status, KVL_OK);
    expect_no_streams();
}

/* Where nobody else is known to have it, the others are asked whether they do. */
static void test_others_are_asked_whether_they_have_it(void **state)
{
    (void)state;
    prepare();
    const kvl_digest id = tiny_id(1);
    kvl_message announce = stage_message_of(KVL_MESSAGE_ANNOUNCE, 10, 0);
    announce.announce.id = id;
    announce.announce.kind = KVL_CONTAINER_SEGMENT;
    stage_dial_in(CLIENT, "a", 10);
    stage_give(CLIENT, &announce, NULL, 0);
    begin(1);
    assert_int_equal(stage_count_sent(0, KVL_MESSAGE_FETCH), 1);
    assert_int_equal(stage_count_sent(1, KVL_MESSAGE_LOCATE), 0);
    stage_pass_ms(USUAL_MS + 10);
    assert_int_equal(stage_count_sent(1, KVL_MESSAGE_LOCATE), 1);
    locate(1, 1);
    stage_pass_ms(20);
    const kvl_message fetch = stage_latest(1, KVL_MESSAGE_FETCH)->message;
    give_all(&fetch, 1, 1);
    assert_int_equal(stage.ended.status, KVL_OK);
    expect_no_streams();
}

static void test_patience_is_the_time_of_nineteen_in_twenty(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 200; round++) {
        kvl_peer peer = {.n_streams = 0};
        const uint32_t n = 1 + kvl_test_below(&random, 3 * KVL_HEDGE_SAMPLES);
        for (uint32_t i = 0; i < n; i++)
            kvl_hedge_sample(&peer, (int64_t)kvl_test_below(&random, 1000) * MS);
        const int64_t patience = kvl_hedge_patience(&peer);
        if (n < KVL_HEDGE_SAMPLES_MIN) {
            assert_true(patience == INT64_MAX);
            continue;
        }
        const uint32_t kept = n < KVL_HEDGE_SAMPLES ? n : KVL_HEDGE_SAMPLES;
        uint32_t n_within = 0, n_below = 0;
        for (uint32_t i = 0; i < kept; i++) {
            n_within += peer.header_ns[i] <= patience ? 1 : 0;
            n_below += peer.header_ns[i] < patience ? 1 : 0;
        }
        assert_true(20 * n_within >= 19 * kept);
        assert_true(20 * n_below < 19 * kept || patience == KVL_HEDGE_NS_MIN);
    }
}

int main(void)
{
#define CASE(f) cmocka_unit_test_setup_teardown(f, stage_set_up, stage_tear_down)
    const struct CMUnitTest tests[] = {
        CASE(test_the_second_may_win),
        CASE(test_the_first_may_win),
        CASE(test_either_may_be_lost),
        CASE(test_the_second_goes_on_alone),
        CASE(test_the_second_may_not_have_it),
        CASE(test_others_are_asked_whether_they_have_it),
        cmocka_unit_test(test_patience_is_the_time_of_nineteen_in_twenty),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
