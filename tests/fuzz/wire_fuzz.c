/* wire_fuzz.c: a libFuzzer target over what a peer may send: any control parts with any frames, one
 * after the other, to a process that has a peer, a client and open requests.
 *   clang -fsanitize=fuzzer,address,undefined ... tests/fuzz/wire_fuzz.c tests/support/tiny_store.c
 * Without a fuzzing engine, -DKVL_FUZZ_REPLAY gives a main that runs the files named to it.
 *
 * An input is a row of records: flags (bit 0: from the client, not the peer; bit 1: the right epoch
 * and request number are put in; bits 2 to 4: number of frames), the length of the control part,
 * the length of each frame divided by 8 (two bytes, little endian), then the control part. */
#include "base/alloc.h"
#include "exchange/protocol.h"
#include "exchange/wire.h"
#include "tiny_store.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { EPOCH = 5, FRAMES_MAX = 7 };

static uint64_t requests[8]; /* the latest numbers that went out: answers to them get further */
static size_t n_requests;
static uint8_t bulk[1u << 20];

static kvl_status keep_request(void *context, kvl_link link, const kvl_message *message,
                               const kvl_frame *frames, size_t n_frames, kvl_owner owner)
{
    (void)context;
    (void)frames;
    (void)n_frames;
    (void)owner;
    uint8_t control[KVL_CONTROL_BYTES_MAX];
    KVL_ASSERT(kvl_wire_encode(message, control) > 0);
    if (link < KVL_LINK_CLIENT) requests[n_requests++ % 8] = message->request;
    return KVL_OK;
}

static void end_request(void *context, const kvl_completion *completion)
{
    (void)context;
    kvl_container_release(completion->container);
    kvl_free(completion->ids);
    kvl_free(completion->reply);
}

static void ignore_task(void *context, uint64_t task, const void *body, size_t n_bytes)
{
    (void)context;
    (void)task;
    (void)body;
    (void)n_bytes;
}

static void ignore_event(void *context, kvl_log_level level, const char *event, const char *text)
{
    (void)context;
    (void)level;
    (void)event;
    (void)text;
}

static void say_hello(kvl_protocol *protocol, kvl_link link, kvl_message_kind kind,
                      uint64_t request)
{
    kvl_message message;
    memset(&message, 0, sizeof message);
    message.kind = kind;
    message.epoch = EPOCH;
    message.request = request;
    message.hello.magic = KVL_PROTOCOL_MAGIC;
    message.hello.version_min = message.hello.version_max = 1;
    memcpy(message.hello.name, "peer", sizeof "peer");
    message.hello.frame_bytes_max = KVL_FRAME_BYTES_MAX;
    message.hello.window_bytes_max = KVL_CREDIT_BYTES_MAX;
    message.hello.task_bytes_max = KVL_TASK_BYTES_MAX;
    kvl_protocol_receive(protocol, link, &message, NULL, 0, 0);
}

/* A process with a peer that is up, a client, and one request of each kind. */
static kvl_protocol *make_protocol(tiny_store *store)
{
    static const char *const peer = "peer";
    const kvl_protocol_options options = {
        .name = "me",
        .epoch = 1,
        .peers = &peer,
        .n_peers = 1,
        .store = &store->tier,
        .timeout_ms = 1000,
        .runs_tasks = true,
        .output = {keep_request, end_request, ignore_task, ignore_event, NULL},
    };
    kvl_protocol *protocol = NULL;
    KVL_ASSERT(kvl_protocol_create(&options, 0, &protocol) == KVL_OK);
    kvl_protocol_connected(protocol, 0, 0);
    say_hello(protocol, 0, KVL_MESSAGE_WELCOME, requests[(n_requests - 1) % 8]);
    say_hello(protocol, KVL_LINK_CLIENT, KVL_MESSAGE_HELLO, 1);
    const kvl_digest id = tiny_id(1);
    kvl_bulk *body = kvl_bulk_copy("body", 4);
    KVL_ASSERT(body != NULL);
    kvl_protocol_fetch(protocol, NULL, &id, KVL_NS_PER_S, 0);
    kvl_protocol_list(protocol, NULL, KVL_CONTAINER_ANCHOR, NULL, 0, KVL_NS_PER_S, 0);
    kvl_protocol_call(protocol, NULL, 0, body, KVL_NS_PER_S, 0);
    kvl_bulk_release(body);
    return protocol;
}

static void give(kvl_protocol *protocol, uint8_t flags, const uint8_t *control, size_t n_control,
                 const kvl_frame *frames, size_t n_frames, int64_t now_ns)
{
    static kvl_wire_decoder decoder;
    const kvl_link link = (flags & 1) != 0 ? KVL_LINK_CLIENT : 0;
    kvl_message message;
    kvl_error error;
    if (kvl_wire_decode(&decoder, control, n_control, frames, n_frames, &message, &error) < 0) {
        kvl_protocol_refuse(protocol, link, message.request, &error);
        return;
    }
    if ((flags & 2) != 0) {
        message.epoch = EPOCH;
        if (link == 0) message.request = requests[message.request % 8];
    }
    kvl_protocol_receive(protocol, link, &message, frames, n_frames, now_ns);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    tiny_store store;
    tiny_store_init(&store);
    const tiny_shape shape = {.n_blocks = 2, .block_bytes = 64};
    KVL_ASSERT(tiny_store_add(&store, 1, 0, &shape));
    kvl_protocol *protocol = make_protocol(&store);
    int64_t now_ns = 0;
    while (size >= 2) {
        const uint8_t flags = data[0];
        const size_t n_frames = flags >> 2 & FRAMES_MAX;
        size_t n_control = data[1];
        data += 2;
        size -= 2;
        kvl_frame frames[FRAMES_MAX];
        if (size < 2 * n_frames) break;
        for (size_t i = 0; i < n_frames; i++) {
            frames[i] =
                (kvl_frame){bulk, 8 * ((size_t)data[2 * i] + 256 * (size_t)data[2 * i + 1])};
        }
        data += 2 * n_frames;
        size -= 2 * n_frames;
        if (n_control > size) n_control = size;
        give(protocol, flags, data, n_control, frames, n_frames, now_ns);
        data += n_control;
        size -= n_control;
        now_ns += KVL_TICK_NS;
        kvl_protocol_tick(protocol, now_ns);
        (void)kvl_protocol_work(protocol, now_ns);
    }
    kvl_protocol_stop(protocol);
    kvl_protocol_destroy(protocol);
    tiny_store_deinit(&store);
    kvl_container_spare_clear();
    return 0;
}

#ifdef KVL_FUZZ_REPLAY
#include "base/file.h"

int main(int n_arguments, char **arguments)
{
    for (int i = 1; i < n_arguments; i++) {
        char *bytes = NULL;
        size_t n_bytes = 0;
        if (kvl_file_read(arguments[i], (size_t)1 << 20, &bytes, &n_bytes, NULL) < 0) return 1;
        (void)LLVMFuzzerTestOneInput((const uint8_t *)bytes, n_bytes);
        kvl_free(bytes);
    }
    return 0;
}
#endif
