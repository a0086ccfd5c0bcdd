/* exchange_stage.c: the stage's props. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "exchange_stage.h"

stage_state stage = {.shape = {.n_blocks = 3, .block_bytes = 1000, .fingerprint = {{7}}}};

static const kvl_digest model = {{7}};

static kvl_status keep_sent(void *context, kvl_link link, const kvl_message *message,
                            const kvl_frame *frames, size_t n_frames, kvl_owner owner)
{
    (void)context;
    (void)owner;
    assert_true(stage.n_sent < STAGE_LOG_MAX);
    stage.outbox[stage.n_sent++] = (stage_sent){link, *message, kvl_frames_bytes(frames, n_frames)};
    return KVL_OK;
}

static void keep_ended(void *context, const kvl_completion *completion)
{
    (void)context;
    stage.ended = *completion;
    (void)snprintf(stage.ended_text, sizeof stage.ended_text, "%s",
                   completion->text == NULL ? "" : completion->text);
    stage.n_ended++;
    kvl_container_release(completion->container);
    kvl_free(completion->ids);
    kvl_free(completion->reply);
}

static void keep_task(void *context, uint64_t task, const void *body, size_t n_bytes)
{
    (void)context;
    (void)body;
    (void)n_bytes;
    stage.last_task = task;
    stage.n_tasks++;
}

static void ignore_event(void *context, kvl_log_level level, const char *event, const char *text)
{
    (void)context;
    (void)level;
    (void)event;
    (void)text;
}

/* Peers "a" and "b"; epoch 1. The store is empty. */
kvl_status stage_create(void)
{
    static const char *const peers[] = {"a", "b"};
    const kvl_protocol_options options = {
        .name = "me",
        .epoch = 1,
        .seed = 3,
        .peers = peers,
        .n_peers = 2,
        .store = &stage.store.tier,
        .fingerprint = model,
        .timeout_ms = 1000,
        .runs_tasks = true,
        .output = {.send = keep_sent,
                   .complete = keep_ended,
                   .task = keep_task,
                   .event = ignore_event},
    };
    stage.n_sent = 0;
    stage.n_ended = stage.n_tasks = 0;
    stage.now_ns = 0;
    return kvl_protocol_create(&options, stage.now_ns, &stage.protocol);
}

int stage_set_up(void **state)
{
    (void)state;
    tiny_store_init(&stage.store);
    return stage_create() == KVL_OK ? 0 : -1;
}

int stage_tear_down(void **state)
{
    (void)state;
    kvl_protocol_destroy(stage.protocol);
    stage.protocol = NULL;
    tiny_store_deinit(&stage.store);
    kvl_container_spare_clear();
    return 0;
}

kvl_message stage_message_of(kvl_message_kind kind, uint64_t epoch, uint64_t request)
{
    kvl_message message;
    memset(&message, 0, sizeof message);
    message.kind = kind;
    message.epoch = epoch;
    message.request = request;
    return message;
}

void stage_give(kvl_link link, const kvl_message *message, const void *bulk, size_t n_bytes)
{
    const kvl_frame frame = {bulk, n_bytes};
    kvl_protocol_receive(stage.protocol, link, message, &frame, n_bytes > 0 ? 1 : 0, stage.now_ns);
}

void stage_give_plain(kvl_link link, kvl_message_kind kind, uint64_t epoch, uint64_t request)
{
    const kvl_message message = stage_message_of(kind, epoch, request);
    stage_give(link, &message, NULL, 0);
}

void stage_pass_ms(int64_t ms)
{
    for (const int64_t until = stage.now_ns + ms * KVL_NS_PER_MS; stage.now_ns < until;) {
        stage.now_ns += KVL_TICK_NS;
        kvl_protocol_tick(stage.protocol, stage.now_ns);
    }
}

/* The latest message of a kind on a link, or NULL. */
const stage_sent *stage_latest(kvl_link link, kvl_message_kind kind)
{
    for (size_t i = stage.n_sent; i-- > 0;) {
        if (stage.outbox[i].link == link && stage.outbox[i].message.kind == kind)
            return &stage.outbox[i];
    }
    return NULL;
}

size_t stage_count_sent(kvl_link link, kvl_message_kind kind)
{
    size_t n = 0;
    for (size_t i = 0; i < stage.n_sent; i++)
        n += stage.outbox[i].link == link && stage.outbox[i].message.kind == kind;
    return n;
}

kvl_message stage_hello_of(kvl_message_kind kind, const char *name, uint64_t epoch,
                           uint64_t request)
{
    kvl_message message = stage_message_of(kind, epoch, request);
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
void stage_bring_up(kvl_link link, uint64_t epoch)
{
    kvl_protocol_connected(stage.protocol, link, stage.now_ns);
    const stage_sent *hello = stage_latest(link, KVL_MESSAGE_HELLO);
    assert_non_null(hello);
    const kvl_message welcome =
        stage_hello_of(KVL_MESSAGE_WELCOME, link == 0 ? "a" : "b", epoch, hello->message.request);
    stage_give(link, &welcome, NULL, 0);
    assert_true(kvl_protocol_peer_is_up(stage.protocol, link));
}

void stage_dial_in(kvl_link link, const char *name, uint64_t epoch)
{
    const kvl_message hello = stage_hello_of(KVL_MESSAGE_HELLO, name, epoch, 1);
    stage_give(link, &hello, NULL, 0);
    assert_true(kvl_protocol_client_is_open(stage.protocol, link));
}

kvl_message stage_fetch_of(uint64_t epoch, uint64_t request, uint64_t number)
{
    kvl_message fetch = stage_message_of(KVL_MESSAGE_FETCH, epoch, request);
    fetch.fetch.id = tiny_id(number);
    fetch.fetch.credit_bytes = KVL_CREDIT_BYTES_MIN;
    return fetch;
}
