/* exchange/protocol, one process that serves, against a test that plays those who dial it: credit,
 * limits, and tasks that run once. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "exchange_stage.h"

/* ---- serving ---- */

static uint64_t served_bytes(void)
{
    return kvl_protocol_stats(stage.protocol)->bytes_served;
}

static void test_blocks_flow_under_credit(void **state)
{
    (void)state;
    const tiny_shape large = {.n_blocks = 5, .block_bytes = 3u << 20, .fingerprint = {{7}}};
    assert_true(tiny_store_add(&stage.store, 1, 0, &large));
    stage_dial_in(CLIENT, "x", 5);
    kvl_message fetch = stage_fetch_of(5, 100, 1);
    stage_give(CLIENT, &fetch, NULL, 0);
    assert_int_equal(served_bytes(), KVL_CREDIT_BYTES_MIN);
    stage_give(CLIENT, &fetch, NULL, 0); /* the same once more changes nothing */
    assert_int_equal(served_bytes(), KVL_CREDIT_BYTES_MIN);
    kvl_message credit = stage_message_of(KVL_MESSAGE_CREDIT, 5, 100);
    for (uint64_t granted = 2u << 20; granted <= 14u << 20; granted += 3u << 19) {
        credit.credit.granted_bytes = granted;
        stage_give(CLIENT, &credit, NULL, 0);
        assert_int_equal(served_bytes(), granted >> 20 << 20); /* whole pieces only */
    }
    credit.credit.granted_bytes = UINT64_MAX; /* more than a window at once */
    stage_give(CLIENT, &credit, NULL, 0);
    assert_int_equal(stage_latest(CLIENT, KVL_MESSAGE_ERROR)->message.reply.status,
                     KVL_ERR_TOO_LARGE);
    assert_false(kvl_protocol_is_active(stage.protocol));
    assert_int_equal(stage_count_sent(CLIENT, KVL_MESSAGE_FETCH_DONE), 0);
}

/* Two hosts computed the same with other roundings: blocks of one do not fit the other's header. */
static void test_a_fetch_goes_on_only_with_the_same_header(void **state)
{
    (void)state;
    assert_true(tiny_store_add(&stage.store, 1, 0, &stage.shape));
    size_t n_bytes = 0;
    const void *bytes = kvl_container_header(stage.store.containers[0], &n_bytes);
    stage_dial_in(CLIENT, "x", 5);
    kvl_message fetch = stage_fetch_of(5, 100, 1);
    fetch.fetch.block_first = 2;
    fetch.fetch.header_checksum = kvl_checksum(bytes, n_bytes);
    stage_give(CLIENT, &fetch, NULL, 0);
    assert_int_equal(stage_latest(CLIENT, KVL_MESSAGE_FETCH_HEADER)->n_bulk_bytes, 0);
    assert_int_equal(stage_count_sent(CLIENT, KVL_MESSAGE_BLOCK), 1);
    fetch.request = 101;
    fetch.fetch.header_checksum ^= 1;
    stage_give(CLIENT, &fetch, NULL, 0);
    assert_int_equal(stage_latest(CLIENT, KVL_MESSAGE_FETCH_HEADER)->n_bulk_bytes, n_bytes);
    assert_int_equal(
        stage_latest(CLIENT, KVL_MESSAGE_FETCH_HEADER)->message.fetch_header.block_first, 0);
    assert_int_equal(stage_count_sent(CLIENT, KVL_MESSAGE_BLOCK), 1 + 3);
}

static void test_an_asker_cannot_hold_many_containers(void **state)
{
    (void)state;
    const tiny_shape large = {.n_blocks = 1, .block_bytes = 2u << 20, .fingerprint = {{7}}};
    assert_true(tiny_store_add(&stage.store, 1, 0, &large));
    stage_dial_in(CLIENT, "x", 5);
    for (uint64_t k = 0; k < 50; k++) {
        const kvl_message fetch = stage_fetch_of(5, 100 + k, 1);
        stage_give(CLIENT, &fetch, NULL, 0);
        stage.now_ns += MS;
    }
    kvl_message credit = stage_message_of(KVL_MESSAGE_CREDIT, 5, 0);
    credit.credit.granted_bytes = 4u << 20;
    size_t n_alive = 0;
    for (uint64_t k = 0; k < 50; k++) {
        const uint64_t before = served_bytes();
        credit.request = 100 + k;
        stage_give(CLIENT, &credit, NULL, 0);
        n_alive += served_bytes() > before;
    }
    assert_int_equal(n_alive, KVL_STREAMS_PER_LINK); /* the latest ones */
}

static void test_without_a_model_there_are_only_tasks(void **state)
{
    (void)state;
    assert_true(tiny_store_add(&stage.store, 1, 0, &stage.shape));
    kvl_message hello = stage_hello_of(KVL_MESSAGE_HELLO, "cli", 5, 1);
    memset(&hello.hello.fingerprint, 0, sizeof hello.hello.fingerprint);
    stage_give(CLIENT, &hello, NULL, 0);
    const kvl_message fetch = stage_fetch_of(5, 100, 1);
    stage_give(CLIENT, &fetch, NULL, 0);
    assert_int_equal(stage_latest(CLIENT, KVL_MESSAGE_ERROR)->message.reply.status,
                     KVL_ERR_FOREIGN);
    stage_give_plain(CLIENT, KVL_MESSAGE_TASK, 5, 101);
    assert_int_equal(stage.n_tasks, 1);
}

/* ---- tasks ---- */

static void test_a_repeated_task_runs_once(void **state)
{
    (void)state;
    stage_dial_in(CLIENT, "x", 5);
    stage_give_plain(CLIENT, KVL_MESSAGE_TASK, 5, 300);
    stage_give_plain(CLIENT, KVL_MESSAGE_TASK, 5, 300);
    assert_int_equal(stage.n_tasks, 1);
    assert_int_equal(stage_latest(CLIENT, KVL_MESSAGE_TASK_REPLY)->message.reply.status,
                     KVL_IN_PROGRESS);
    kvl_protocol_reply(stage.protocol, stage.last_task, KVL_OK, NULL, kvl_bulk_copy("yes", 3),
                       stage.now_ns);
    assert_int_equal(stage_latest(CLIENT, KVL_MESSAGE_TASK_REPLY)->n_bulk_bytes, 3);
    kvl_protocol_reply(stage.protocol, stage.last_task, KVL_OK, NULL, kvl_bulk_copy("no", 2),
                       stage.now_ns);
    assert_int_equal(stage_latest(CLIENT, KVL_MESSAGE_TASK_REPLY)->n_bulk_bytes,
                     3); /* answered once */

    stage.n_sent = 0;
    stage_give_plain(CLIENT, KVL_MESSAGE_TASK_POLL, 5,
                     300); /* the reply was lost: here it is again */
    assert_int_equal(stage_latest(CLIENT, KVL_MESSAGE_TASK_REPLY)->n_bulk_bytes, 3);
    stage_give_plain(CLIENT, KVL_MESSAGE_TASK_DONE, 5, 300);
    stage_give_plain(CLIENT, KVL_MESSAGE_TASK_POLL, 5, 300);
    assert_int_equal(stage_latest(CLIENT, KVL_MESSAGE_ERROR)->message.reply.status,
                     KVL_ERR_EXPIRED);
    stage_give_plain(CLIENT, KVL_MESSAGE_TASK, 5, 300);
    assert_int_equal(stage.n_tasks, 1);
    stage_give_plain(CLIENT, KVL_MESSAGE_TASK_POLL, 5, 999);
    assert_int_equal(stage_latest(CLIENT, KVL_MESSAGE_ERROR)->message.reply.status,
                     KVL_ERR_NOT_FOUND);
    /* Long after its number has left the ring it is still known as old. */
    for (uint64_t k = 0; k < 3 * KVL_TASKS_REMEMBERED; k++) {
        stage_give_plain(CLIENT, KVL_MESSAGE_TASK, 5, 1000 + k);
        kvl_protocol_reply(stage.protocol, stage.last_task, KVL_OK, NULL, NULL, stage.now_ns);
        stage_give_plain(CLIENT, KVL_MESSAGE_TASK_DONE, 5, 1000 + k);
        stage.n_sent = 0;
    }
    const int before = stage.n_tasks;
    stage_give_plain(CLIENT, KVL_MESSAGE_TASK, 5, 300);
    assert_int_equal(stage.n_tasks, before);
}

static void test_too_many_tasks_are_busy(void **state)
{
    (void)state;
    stage_dial_in(CLIENT, "x", 5);
    for (uint64_t k = 0; k < KVL_TASKS_MAX; k++)
        stage_give_plain(CLIENT, KVL_MESSAGE_TASK, 5, 300 + k);
    assert_int_equal(stage.n_tasks, KVL_TASKS_MAX);
    stage_give_plain(CLIENT, KVL_MESSAGE_TASK, 5, 5000);
    assert_int_equal(stage_latest(CLIENT, KVL_MESSAGE_TASK_REPLY)->message.reply.status,
                     KVL_ERR_BUSY);
    /* The asker is gone, but its tasks run on: their places are free when they are answered. */
    stage_give_plain(CLIENT, KVL_MESSAGE_GOODBYE, 5, 0);
    stage_dial_in(CLIENT, "x", 6);
    stage_give_plain(CLIENT, KVL_MESSAGE_TASK, 6, 300);
    assert_int_equal(stage.n_tasks, KVL_TASKS_MAX);
    const size_t before = stage.n_sent;
    kvl_protocol_reply(stage.protocol, stage.last_task, KVL_OK, NULL, NULL, stage.now_ns);
    assert_int_equal(stage.n_sent, before);
    stage_give_plain(CLIENT, KVL_MESSAGE_TASK, 6, 301);
    assert_int_equal(stage.n_tasks, KVL_TASKS_MAX + 1);
}

static void test_too_many_requests_are_busy(void **state)
{
    (void)state;
    const kvl_digest id = tiny_id(1);
    for (uint32_t k = 0; k < KVL_OPS_MAX; k++) {
        kvl_protocol_fetch(stage.protocol, NULL, &id, stage.now_ns + 100 * MS, stage.now_ns);
    }
    assert_int_equal(stage.n_ended, 0);
    kvl_protocol_fetch(stage.protocol, NULL, &id, stage.now_ns + 100 * MS, stage.now_ns);
    assert_int_equal(stage.n_ended, 1);
    assert_int_equal(stage.ended.status, KVL_ERR_BUSY);
    stage_pass_ms(120);
    assert_int_equal(stage.n_ended, 1 + KVL_OPS_MAX);
    assert_int_equal(stage.ended.status, KVL_ERR_TIMEOUT);
}

int main(void)
{
#define CASE(name) cmocka_unit_test_setup_teardown(name, stage_set_up, stage_tear_down)
    const struct CMUnitTest tests[] = {
        CASE(test_blocks_flow_under_credit),
        CASE(test_a_fetch_goes_on_only_with_the_same_header),
        CASE(test_an_asker_cannot_hold_many_containers),
        CASE(test_without_a_model_there_are_only_tasks),
        CASE(test_a_repeated_task_runs_once),
        CASE(test_too_many_tasks_are_busy),
        CASE(test_too_many_requests_are_busy),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
