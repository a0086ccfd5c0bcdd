/* cli/bench_exchange.c: `kvloom bench exchange`: segments between processes, beside what the
 * machine, ZeroMQ, its CURVE and Redis do with the same bytes in the same run.
 *
 * Servers are forked before this process has threads. All ways are measured in turns, so that
 * whatever else the machine does meets all of them; figures are ratios of medians. */
#include "base/alloc.h"
#include "base/file.h"
#include "base/log.h"
#include "cli/bench_data.h"
#include "cli/bench_servers.h"
#include "exchange/exchange.h"
#include "kvloom.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zmq.h>

enum { REPEATS_MAX = 1000, DEADLINE_S = 30, LATENCIES = 300, SOURCES = 8 };
static const size_t MIB = (size_t)1 << 20;

typedef struct bench {
    kvl_bench_options options;
    bench_place place;
    pid_t raw, peers, sidecar, redis;
    uint8_t *buffer; /* [64 MiB], touched */
    json_t *figures, *rows;
    kvloom_client *client;
    int redis_fd;
    void *zmq;
} bench;

static int64_t now(void)
{
    return kvl_clock_now(kvl_clock_system());
}

static double gbs(size_t n_bytes, double seconds)
{
    return (double)n_bytes / seconds / 1e9;
}

/* ---- this machine ---- */

static double time_memcpy(bench *b, const uint8_t *from, size_t n_bytes)
{
    const int64_t start = now();
    memcpy(b->buffer, from, n_bytes);
    return kvl_bench_seconds_since(start);
}

/* ---- raw ZeroMQ ---- */

static void *dial_raw(bench *b, const char *endpoint, bool with_curve)
{
    void *socket = zmq_socket(b->zmq, ZMQ_DEALER);
    const int timeout_ms = DEADLINE_S * 1000;
    (void)zmq_setsockopt(socket, ZMQ_RCVTIMEO, &timeout_ms, sizeof timeout_ms);
    const int linger = 0;
    (void)zmq_setsockopt(socket, ZMQ_LINGER, &linger, sizeof linger);
    if (with_curve) bench_set_curve(socket, &b->place, false);
    (void)zmq_connect(socket, endpoint);
    return socket;
}

/* Asks for n messages of n_bytes and receives them, as ZeroMQ gives them. */
static double time_raw(void *socket, size_t n_bytes, uint32_t n)
{
    const bench_question question = {n_bytes, n};
    const int64_t start = now();
    if (zmq_send(socket, &question, sizeof question, 0) < 0) return -1.0;
    for (uint32_t i = 0; i < n; i++) {
        zmq_msg_t message;
        (void)zmq_msg_init(&message);
        if (zmq_msg_recv(&message, socket, 0) < 0) return -1.0;
        (void)zmq_msg_close(&message);
    }
    return kvl_bench_seconds_since(start);
}

/* ---- our exchange ---- */

static kvl_exchange *dial_peer(bench *b, const char *endpoint, bool with_keys, kvl_error *error)
{
    const kvl_exchange_peer peer = {.name = "server",
                                    .endpoint = endpoint,
                                    .public_key =
                                        with_keys ? b->place.server_keys.public_key : NULL};
    const kvl_exchange_options options = {.name = "bench",
                                          .peers = &peer,
                                          .n_peers = 1,
                                          .fingerprint = kvl_bench_fingerprint(),
                                          .keys = with_keys ? &b->place.client_keys : NULL,
                                          .clock = kvl_clock_system()};
    kvl_exchange *exchange = NULL;
    if (kvl_exchange_start(&options, &exchange, error) < 0) return NULL;
    for (int i = 0; i < 500 && !kvl_exchange_peer_is_up(exchange, "server"); i++)
        (void)poll(NULL, 0, 10);
    return exchange;
}

/* A container arrives whole, each block checked against its checksum. */
static double time_fetch(kvl_exchange *exchange, uint64_t number)
{
    const kvl_digest id = kvl_bench_id(number);
    kvl_container *container = NULL;
    kvl_error error;
    const int64_t start = now();
    if (kvl_exchange_fetch(exchange, &id, start + DEADLINE_S * KVL_NS_PER_S, &container, NULL, 0,
                           &error) < 0) {
        (void)fprintf(stderr, "bench: %s\n", error.text);
        return -1.0;
    }
    const double seconds = kvl_bench_seconds_since(start);
    kvl_container_release(container);
    return seconds;
}

/* ---- Redis ---- */

static bool send_all(int fd, const void *bytes, size_t n_bytes)
{
    const uint8_t *at = bytes;
    while (n_bytes > 0) {
        const ssize_t n = send(fd, at, n_bytes, MSG_NOSIGNAL);
        if (n <= 0) return false;
        at += n;
        n_bytes -= (size_t)n;
    }
    return true;
}

static bool redis_set(bench *b, const uint8_t *bytes, size_t n_bytes)
{
    char head[64];
    char answer[5];
    const int n = snprintf(head, sizeof head, "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%zu\r\n", n_bytes);
    return send_all(b->redis_fd, head, (size_t)n) && send_all(b->redis_fd, bytes, n_bytes) &&
           send_all(b->redis_fd, "\r\n", 2) &&
           recv(b->redis_fd, answer, sizeof answer, MSG_WAITALL) == sizeof answer &&
           memcmp(answer, "+OK\r\n", sizeof answer) == 0;
}

/* The value goes straight into the touched buffer: the fastest that a client of Redis can be. */
static double time_redis(bench *b, size_t n_bytes)
{
    static const char question[] = "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n";
    char head[32] = "";
    const int64_t start = now();
    if (!send_all(b->redis_fd, question, sizeof question - 1)) return -1.0;
    for (size_t i = 0; i + 1 < sizeof head; i++) {
        if (recv(b->redis_fd, &head[i], 1, 0) != 1) return -1.0;
        if (head[i] == '\n') break;
    }
    if (strtoul(head + 1, NULL, 10) != n_bytes) return -1.0;
    const ssize_t n = recv(b->redis_fd, b->buffer, n_bytes + 2, MSG_WAITALL);
    return n == (ssize_t)n_bytes + 2 ? kvl_bench_seconds_since(start) : -1.0;
}

/* ---- the sidecar ---- */

enum { SHAPE_LAYERS = 32, SHAPE_HEADS = 4, SHAPE_DIM = 64, TOKENS = 512 };

/* 16 MiB: 32 layers of 512 KiB. */
static kvloom_shape shape_16m(void)
{
    return (kvloom_shape){.dtype = KVLOOM_F16,
                          .n_layers = SHAPE_LAYERS,
                          .n_kv_heads = SHAPE_HEADS,
                          .head_dim = SHAPE_DIM};
}

static kvloom_key key_16m(uint32_t number)
{
    static uint32_t tokens[TOKENS];
    for (uint32_t i = 0; i < TOKENS; i++) tokens[i] = number + i;
    return (kvloom_key){.tokens = tokens, .n_tokens = TOKENS};
}

static bool connect_sidecar(bench *b)
{
    const kvloom_options options = {.socket = b->place.sidecar_socket,
                                    .fingerprint = kvloom_fingerprint("bench", 5),
                                    .shape = shape_16m()};
    kvloom_error error = {.text = ""};
    const int64_t start = now();
    while (kvloom_connect(&options, &b->client, &error) < 0) {
        if (kvl_bench_seconds_since(start) > 10.0) {
            (void)fprintf(stderr, "bench: %s\n", error.text);
            return false;
        }
        (void)poll(NULL, 0, 1);
    }
    (void)json_object_set_new(b->figures, "start_ms",
                              json_real(kvl_bench_seconds_since(b->place.sidecar_ns) * 1e3));
    return true;
}

static bool put_16m(bench *b, uint32_t number)
{
    const void *layers[SHAPE_LAYERS];
    const kvloom_key key = key_16m(number);
    kvloom_error error;
    for (size_t l = 0; l < SHAPE_LAYERS; l++) layers[l] = b->buffer + l * (MIB / 2);
    if (kvloom_put(b->client, &key, layers, 0, &error) == KVLOOM_OK) return true;
    (void)fprintf(stderr, "bench: %s\n", error.text);
    return false;
}

/* Seconds until the first byte of the segment has been read. */
static double time_first_byte(bench *b, kvloom_segment **segment)
{
    const kvloom_key key = key_16m(1);
    const int64_t start = now();
    if (kvloom_get(b->client, &key, 0, segment, NULL) != KVLOOM_OK) return -1.0;
    const volatile uint8_t *layer = kvloom_segment_layer(*segment, 0, NULL);
    (void)layer[0];
    return kvl_bench_seconds_since(start);
}

/* What memcpy takes where nothing has touched the destination yet, as most destinations are. */
static double time_memcpy_fresh(const uint8_t *from, size_t n_bytes)
{
    const int64_t start = now();
    uint8_t *fresh =
        mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED) return -1.0;
    memcpy(fresh, from, n_bytes);
    const double seconds = kvl_bench_seconds_since(start);
    (void)munmap(fresh, n_bytes);
    return seconds;
}

static double time_copy(bench *b, uint32_t number)
{
    const kvloom_key key = key_16m(number);
    const int64_t start = now();
    if (kvloom_get_into(b->client, &key, 0, b->buffer, 16 * MIB, NULL, NULL) != KVLOOM_OK)
        return -1.0;
    return kvl_bench_seconds_since(start);
}

/* ---- measuring ---- */

static void add(bench *b, const char *name, double value)
{
    (void)json_object_set_new(b->figures, name, json_real(value));
}

static bool measure_same_machine(bench *b)
{
    double first[LATENCIES], copy[REPEATS_MAX], memory[REPEATS_MAX], redis[REPEATS_MAX];
    double fresh[REPEATS_MAX];
    /* In turns over more than the caches hold: what is copied is cold, as it is in use. */
    uint8_t *source = kvl_alloc_aligned(SOURCES * 16 * MIB);
    if (source == NULL) return false;
    memset(source, 3, SOURCES * 16 * MIB);
    const bool has_redis = b->redis_fd >= 0 && redis_set(b, source, 16 * MIB);
    bool is_done = true;
    for (uint32_t i = 0; i < SOURCES && is_done; i++) is_done = put_16m(b, i + 1);
    for (size_t i = 0; i < LATENCIES && is_done; i++) {
        kvloom_segment *segment = NULL;
        first[i] = time_first_byte(b, &segment);
        is_done = first[i] > 0.0;
        kvloom_segment_release(segment);
    }
    const uint32_t n = b->options.n_repeats;
    for (uint32_t r = 0; r < n && is_done; r++) {
        memory[r] = time_memcpy(b, source + r % SOURCES * 16 * MIB, 16 * MIB);
        copy[r] = time_copy(b, 1 + r % SOURCES);
        is_done = copy[r] > 0.0;
    }
    /* In turns of their own: after an answer, Redis gives its memory back to the system for another
     * millisecond, and whoever is measured next would pay for that; so it is with fresh memory. */
    for (uint32_t r = 0; r < n && is_done; r++) {
        fresh[r] = time_memcpy_fresh(source + r % SOURCES * 16 * MIB, 16 * MIB);
        is_done = fresh[r] > 0.0;
    }
    for (uint32_t r = 0; r < n && is_done && has_redis; r++) {
        redis[r] = time_redis(b, 16 * MIB);
        is_done = redis[r] > 0.0;
    }
    kvl_free(source);
    if (!is_done) return false;
    const double first_p50 = kvl_bench_median(first, LATENCIES);
    add(b, "first_byte_us_p50", first_p50 * 1e6);
    kvl_bench_row(b->rows, "sidecar, 16 MiB, first byte, p99",
                  kvl_bench_quantile(first, LATENCIES, 0.99) * 1e6, "us");
    const double copy_p50 = kvl_bench_median(copy, n);
    const double memory_p50 = kvl_bench_median(memory, n);
    add(b, "copy_vs_memcpy", memory_p50 / copy_p50);
    kvl_bench_row(b->rows, "memcpy, 16 MiB, cold source", gbs(16 * MIB, memory_p50), "GB/s");
    const double fresh_p50 = kvl_bench_median(fresh, n);
    add(b, "copy_vs_memcpy_fresh", fresh_p50 / copy_p50);
    kvl_bench_row(b->rows, "memcpy, 16 MiB, destination never touched", gbs(16 * MIB, fresh_p50),
                  "GB/s");
    kvl_bench_row(b->rows, "sidecar, 16 MiB, get that copies", gbs(16 * MIB, copy_p50), "GB/s");
    (void)json_object_set_new(b->figures, "get16m_vs_redis", json_null());
    if (!has_redis) return true;
    const double redis_p50 = kvl_bench_median(redis, n);
    add(b, "get16m_vs_redis", redis_p50 / first_p50);
    kvl_bench_row(b->rows, "Redis GET, UNIX socket, 16 MiB", gbs(16 * MIB, redis_p50), "GB/s");
    kvl_bench_row(b->rows, "get that copies, over Redis GET", redis_p50 / copy_p50, "times");
    return true;
}

/* Ours and theirs in turns; what is measured first in a turn changes from turn to turn. */
static double measure_pair(bench *b, const char *what, kvl_exchange *ours, uint64_t number,
                           void *theirs, size_t n_bytes, size_t message_bytes, const char *name)
{
    double a[REPEATS_MAX], z[REPEATS_MAX];
    const uint32_t n_messages = (uint32_t)(n_bytes / message_bytes);
    if (time_fetch(ours, number) < 0.0 || time_raw(theirs, message_bytes, n_messages) < 0.0)
        return -1.0;
    for (uint32_t r = 0; r < b->options.n_repeats; r++) {
        if (r % 2 == 0) a[r] = time_fetch(ours, number);
        z[r] = time_raw(theirs, message_bytes, n_messages);
        if (r % 2 == 1) a[r] = time_fetch(ours, number);
        if (a[r] < 0.0 || z[r] < 0.0) return -1.0;
    }
    const double ours_s = kvl_bench_median(a, b->options.n_repeats);
    const double theirs_s = kvl_bench_median(z, b->options.n_repeats);
    char text[96];
    (void)snprintf(text, sizeof text, "exchange, %s, %zu MiB", what, n_bytes / MIB);
    kvl_bench_row(b->rows, text, gbs(n_bytes, ours_s), "GB/s");
    (void)snprintf(text, sizeof text, "%s, %s, %zu MiB", name, what, n_bytes / MIB);
    kvl_bench_row(b->rows, text, gbs(n_bytes, theirs_s), "GB/s");
    return theirs_s / ours_s;
}

static bool measure_plain(bench *b, kvl_error *error)
{
    double one = 1e9, stream = 1e9;
    for (int tcp = 0; tcp < 2; tcp++) {
        const char *what = tcp ? "tcp" : "ipc";
        kvl_exchange *ours = dial_peer(b, b->place.peer_endpoint[tcp], false, error);
        if (ours == NULL) return false;
        void *theirs = dial_raw(b, b->place.raw_endpoint[tcp], false);
        const double a = measure_pair(b, what, ours, BENCH_64M, theirs, 64 * MIB, 64 * MIB,
                                      "one ZeroMQ message");
        const double z = measure_pair(b, what, ours, BENCH_64M, theirs, 64 * MIB, MIB,
                                      "ZeroMQ messages of 1 MiB");
        if (a < one) one = a;
        if (z < stream) stream = z;
        kvl_exchange_stop(ours);
        (void)zmq_close(theirs);
    }
    add(b, "plain_vs_zmq_64m", one);
    add(b, "plain_vs_zmq_stream", stream);
    return one > 0.0 && stream > 0.0;
}

static bool measure_sealed(bench *b, kvl_error *error)
{
    static const struct {
        uint64_t number;
        size_t n_mib;
        const char *figure;
    } sizes[] = {{BENCH_1M, 1, "sealed_vs_curve_1m"},
                 {BENCH_16M, 16, "sealed_vs_curve_16m"},
                 {BENCH_64M, 64, "sealed_vs_curve_64m"}};
    kvl_exchange *ours = dial_peer(b, b->place.peer_endpoint[2], true, error);
    if (ours == NULL) return false;
    void *theirs = dial_raw(b, b->place.raw_endpoint[2], true);
    bool is_done = true;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes && is_done; i++) {
        const double ratio = measure_pair(b, "tcp, encrypted", ours, sizes[i].number, theirs,
                                          sizes[i].n_mib * MIB, sizes[i].n_mib * MIB, "CURVE");
        add(b, sizes[i].figure, ratio);
        is_done = ratio > 0.0;
    }
    kvl_exchange_stop(ours);
    (void)zmq_close(theirs);
    return is_done;
}

static bool measure(bench *b, kvl_error *error)
{
    *error = (kvl_error){.status = KVL_ERR_IO, .text = "a measurement failed"};
    b->redis_fd = b->redis > 0 ? bench_dial_redis(&b->place) : -1;
    if (b->redis_fd < 0)
        (void)fprintf(stderr, "bench: redis-server is not installed: not compared with it\n");
    b->zmq = zmq_ctx_new();
    const bool is_done =
        measure_same_machine(b) && measure_plain(b, error) && measure_sealed(b, error);
    kvloom_close(b->client);
    if (b->redis_fd >= 0) (void)close(b->redis_fd);
    (void)zmq_ctx_term(b->zmq);
    return is_done;
}

static void end_child(pid_t pid)
{
    if (pid <= 0) return;
    (void)kill(pid, SIGKILL);
    (void)waitpid(pid, NULL, 0);
}

int kvl_bench_exchange(int argc, char **argv)
{
    static bench b;
    kvl_error error = {.text = ""};
    if (!kvl_bench_parse(argc, argv, "Segments between processes, beside ZeroMQ and Redis.",
                         &b.options))
        return KVL_EXIT_USAGE;
    if (bench_place_make(&b.place, &error) < 0) return kvl_cli_fail(&error);
    b.figures = json_object();
    b.rows = json_array();
    b.sidecar = bench_start_sidecar(&b.place);
    bool is_done = b.sidecar > 0 && connect_sidecar(&b);
    if (is_done) add(&b, "idle_rss_mib", bench_resident_mib(b.sidecar));
    b.raw = bench_serve_raw(&b.place);
    b.peers = bench_serve_peers(&b.place);
    b.redis = bench_start_redis(&b.place);
    b.buffer = kvl_alloc_aligned(64 * MIB + 64);
    is_done = is_done && b.buffer != NULL && b.raw > 0 && b.peers > 0;
    if (is_done) {
        memset(b.buffer, 1, 64 * MIB + 64);
        is_done = measure(&b, &error);
    }
    end_child(b.sidecar);
    end_child(b.redis);
    end_child(b.peers);
    end_child(b.raw);
    bench_place_end(&b.place);
    kvl_free(b.buffer);
    if (is_done) {
        kvl_bench_report("exchange", &b.options, b.figures, b.rows);
        return KVL_EXIT_OK;
    }
    json_decref(b.figures);
    json_decref(b.rows);
    return kvl_cli_fail(&error);
}
