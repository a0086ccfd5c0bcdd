/* exchange over real sockets: ipc and tcp loopback, threads, and a peer that is killed.
 * Method: two to four exchanges in one process or in forked ones; every wait has a limit, so a hang
 * is a failure. Times are checked with wide margins: the machine may be busy. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/file.h"
#include "base/log.h"
#include "exchange/exchange.h"
#include "exchange/message.h"
#include "tiny_store.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { HOSTS_MAX = 4, WAIT_MS = 10000 };

static char directory[64];

/* ---- hosts ---- */

typedef struct test_host {
    char name[8];
    char endpoint[96];
    tiny_store store;
    kvl_exchange *exchange;
    kvl_exchange_task_handler *task;
    kvl_digest fingerprint;
    _Atomic int n_tasks;
} test_host;

static test_host hosts[HOSTS_MAX];

static int64_t now(void)
{
    return kvl_clock_now(kvl_clock_system());
}

static int64_t in_ms(int64_t ms)
{
    return now() + ms * KVL_NS_PER_MS;
}

static void sleep_ms(int ms)
{
    (void)usleep((useconds_t)ms * 1000);
}

static kvl_status start(uint32_t i, uint32_t n_hosts, kvl_error *error)
{
    kvl_exchange_peer peers[HOSTS_MAX];
    size_t n_peers = 0;
    for (uint32_t j = 0; j < n_hosts; j++) {
        if (j != i)
            peers[n_peers++] =
                (kvl_exchange_peer){.name = hosts[j].name, .endpoint = hosts[j].endpoint};
    }
    const kvl_exchange_options options = {.name = hosts[i].name,
                                          .endpoint = hosts[i].endpoint,
                                          .peers = peers,
                                          .n_peers = n_peers,
                                          .store = &hosts[i].store.tier,
                                          .fingerprint = hosts[i].fingerprint,
                                          .clock = kvl_clock_system(),
                                          .task = hosts[i].task,
                                          .task_context = &hosts[i]};
    return kvl_exchange_start(&options, &hosts[i].exchange, error);
}

/* Names, endpoints and empty stores; nothing is started yet. */
static void prepare(uint32_t n_hosts, bool tcp)
{
    static int port = 0;
    if (port == 0)
        port = 10000 + (int)(getpid() % 20000); /* below those that the system hands out */
    for (uint32_t i = 0; i < n_hosts; i++) {
        memset(&hosts[i], 0, sizeof hosts[i]);
        (void)snprintf(hosts[i].name, sizeof hosts[i].name, "h%u", i);
        if (tcp) {
            (void)snprintf(hosts[i].endpoint, sizeof hosts[i].endpoint, "tcp://127.0.0.1:%d",
                           port++);
        } else {
            (void)snprintf(hosts[i].endpoint, sizeof hosts[i].endpoint, "ipc://%s/h%u", directory,
                           i);
        }
        tiny_store_init(&hosts[i].store);
    }
}

static void start_all(uint32_t n_hosts)
{
    for (uint32_t i = 0; i < n_hosts; i++) {
        kvl_error error = {0};
        if (start(i, n_hosts, &error) < 0) fail_msg("%s", error.text);
    }
}

static void stop_all(uint32_t n_hosts)
{
    for (uint32_t i = 0; i < n_hosts; i++) {
        kvl_exchange_stop(hosts[i].exchange);
        hosts[i].exchange = NULL;
        tiny_store_deinit(&hosts[i].store);
    }
}

static bool wait_for_peer(kvl_exchange *exchange, const char *peer, bool up)
{
    for (int64_t until = in_ms(WAIT_MS); now() < until; sleep_ms(1)) {
        if (kvl_exchange_peer_is_up(exchange, peer) == up) return true;
    }
    return false;
}

static kvl_exchange_stats stats_of(uint32_t host)
{
    kvl_exchange_stats stats;
    kvl_exchange_stats_of(hosts[host].exchange, &stats);
    return stats;
}

static kvl_status fetch(uint32_t host, uint64_t number, kvl_container **container, char *from)
{
    const kvl_digest id = tiny_id(number);
    kvl_error error;
    return kvl_exchange_fetch(hosts[host].exchange, &id, in_ms(WAIT_MS), container, from, 8,
                              &error);
}

/* ---- fetching ---- */

static void check_fetches(bool tcp)
{
    static const tiny_shape shapes[] = {
        {.n_blocks = 1, .block_bytes = 8},
        {.n_blocks = 30, .block_bytes = 40000},
        {.n_blocks = 3,
         .block_bytes = (5u << 20) + 24}, /* several pieces a block, more than a window */
    };
    prepare(2, tcp);
    for (uint64_t k = 0; k < 3; k++) assert_true(tiny_store_add(&hosts[1].store, k, 0, &shapes[k]));
    start_all(2);
    for (uint64_t k = 0; k < 3; k++) {
        kvl_container *container = NULL;
        char from[8] = "";
        assert_int_equal(fetch(0, k, &container, from), KVL_OK);
        assert_string_equal(from, "h1");
        assert_true(tiny_container_is(container, k, 0));
        assert_true(kvl_container_is_sealed(container));
        kvl_container_release(container);
    }
    kvl_container *none = NULL;
    assert_int_equal(fetch(0, 99, &none, NULL), KVL_ERR_NOT_FOUND);
    assert_null(none);
    assert_int_equal(stats_of(0).containers_fetched, 3);
    for (int64_t until = in_ms(WAIT_MS); stats_of(1).containers_served < 3 && now() < until;) {
        sleep_ms(1);
    }
    assert_int_equal(stats_of(1).containers_served, 3);
    stop_all(2);
}

static void test_containers_arrive_whole_over_ipc(void **state)
{
    (void)state;
    check_fetches(false);
}

static void test_containers_arrive_whole_over_tcp(void **state)
{
    (void)state;
    check_fetches(true);
}

/* Who announced is asked at once: no Locate goes out, which its store would notice as has(). */
static void test_an_announcement_is_remembered(void **state)
{
    (void)state;
    const tiny_shape shape = {.n_blocks = 2, .block_bytes = 100};
    prepare(3, false);
    start_all(3);
    assert_true(wait_for_peer(hosts[0].exchange, "h1", true));
    assert_true(wait_for_peer(hosts[1].exchange, "h0", true));
    assert_true(wait_for_peer(hosts[0].exchange, "h2", true));
    assert_true(tiny_store_add(&hosts[1].store, 5, 0, &shape));
    assert_true(tiny_store_add(&hosts[2].store, 5, 0, &shape));
    const kvl_digest id = tiny_id(5);
    kvl_exchange_announce(hosts[1].exchange, &id, KVL_CONTAINER_ANCHOR);
    sleep_ms(50);
    for (int i = 0; i < 5; i++) {
        kvl_container *container = NULL;
        char from[8] = "";
        assert_int_equal(fetch(0, 5, &container, from), KVL_OK);
        assert_string_equal(from, "h1");
        kvl_container_release(container);
    }
    stop_all(3);
}

typedef struct fetcher {
    pthread_t thread;
    uint32_t host;
    uint64_t first;
    int n_failed;
} fetcher;

static void *fetch_many(void *argument)
{
    fetcher *f = argument;
    for (uint64_t k = 0; k < 40; k++) {
        kvl_container *container = NULL;
        const uint64_t number = (f->first + 7 * k) % 20;
        if (fetch(f->host, number, &container, NULL) < 0) {
            f->n_failed++;
            continue;
        }
        if (!tiny_container_is(container, number, 0)) f->n_failed++;
        kvl_container_release(container);
    }
    return NULL;
}

static void test_many_threads_fetch_at_once(void **state)
{
    (void)state;
    const tiny_shape shape = {.n_blocks = 5, .block_bytes = 30000};
    prepare(3, false);
    for (uint64_t k = 0; k < 20; k++) {
        assert_true(tiny_store_add(&hosts[1 + k % 2].store, k, 0, &shape));
    }
    start_all(3);
    fetcher fetchers[8];
    for (uint32_t i = 0; i < 8; i++) {
        fetchers[i] = (fetcher){.host = 0, .first = i};
        assert_int_equal(pthread_create(&fetchers[i].thread, NULL, fetch_many, &fetchers[i]), 0);
    }
    for (uint32_t i = 0; i < 8; i++) {
        (void)pthread_join(fetchers[i].thread, NULL);
        assert_int_equal(fetchers[i].n_failed, 0);
    }
    assert_int_equal(stats_of(0).containers_fetched, 8 * 40);
    stop_all(3);
}

static void test_lists_are_filtered_and_merged(void **state)
{
    (void)state;
    prepare(3, false);
    for (uint64_t k = 0; k < 200; k++) {
        const tiny_shape shape = {.n_blocks = 1, .block_bytes = 8, .group = (uint32_t)(k % 2)};
        if (k < 150) assert_true(tiny_store_add(&hosts[1].store, k, 0, &shape));
        if (k >= 100) assert_true(tiny_store_add(&hosts[2].store, k, 0, &shape));
    }
    start_all(3);
    const uint8_t group = 1;
    kvl_digest *ids = NULL;
    size_t n_ids = 0;
    assert_int_equal(kvl_exchange_list(hosts[0].exchange, KVL_CONTAINER_ANCHOR, &group, 1,
                                       in_ms(WAIT_MS), &ids, &n_ids, NULL),
                     KVL_OK);
    assert_int_equal(n_ids, 100);
    for (uint64_t k = 1; k < 200; k += 2) {
        const kvl_digest id = tiny_id(k);
        bool found = false;
        for (size_t i = 0; i < n_ids; i++) found |= kvl_digest_equal(&ids[i], &id);
        assert_true(found);
    }
    kvl_free(ids);
    assert_int_equal(kvl_exchange_list(hosts[0].exchange, KVL_CONTAINER_SEGMENT, NULL, 0,
                                       in_ms(WAIT_MS), &ids, &n_ids, NULL),
                     KVL_OK);
    assert_int_equal(n_ids, 0);
    kvl_free(ids);
    stop_all(3);
}

/* ---- tasks ---- */

/* Answers with the body backwards; a body that begins with "fail" fails, one with "mute" waits. */
static void answer(void *context, uint64_t task, const void *body, size_t n_bytes)
{
    test_host *host = context;
    atomic_fetch_add(&host->n_tasks, 1);
    if (n_bytes >= 4 && memcmp(body, "mute", 4) == 0) return;
    if (n_bytes >= 4 && memcmp(body, "fail", 4) == 0) {
        kvl_exchange_reply(host->exchange, task, KVL_ERR_DENIED, "not today", NULL, 0);
        return;
    }
    uint8_t *reply = kvl_alloc(n_bytes + 1);
    for (size_t i = 0; i < n_bytes; i++) reply[i] = ((const uint8_t *)body)[n_bytes - 1 - i];
    kvl_exchange_reply(host->exchange, task, KVL_OK, NULL, reply, n_bytes);
    kvl_exchange_reply(host->exchange, task, KVL_OK, NULL, reply, n_bytes); /* ignored */
    kvl_free(reply);
}

static void check_call(kvl_exchange *exchange, const char *peer, size_t n_bytes)
{
    uint8_t *body = kvl_alloc(n_bytes + 1);
    for (size_t i = 0; i < n_bytes; i++) body[i] = (uint8_t)(i * 31 + i / 977);
    void *reply = NULL;
    size_t n_reply_bytes = 0;
    kvl_error error = {0};
    const kvl_status status = kvl_exchange_call(exchange, peer, body, n_bytes, in_ms(2 * WAIT_MS),
                                                &reply, &n_reply_bytes, &error);
    if (status < 0) fail_msg("%s: %s", kvl_status_name(status), error.text);
    assert_int_equal(n_reply_bytes, n_bytes);
    bool same = true;
    for (size_t i = 0; i < n_bytes; i++) same &= ((uint8_t *)reply)[i] == body[n_bytes - 1 - i];
    assert_true(same);
    kvl_free(reply);
    kvl_free(body);
}

static void *call_many(void *argument)
{
    fetcher *f = argument;
    for (uint64_t k = 0; k < 25; k++) check_call(hosts[f->host].exchange, "h1", f->first * 100 + k);
    return NULL;
}

static void test_tasks_are_answered_once(void **state)
{
    (void)state;
    prepare(2, false);
    hosts[1].task = answer;
    start_all(2);
    check_call(hosts[0].exchange, "h1", 0);
    check_call(hosts[0].exchange, "h1", (3u << 20) + 5);
    fetcher callers[6];
    for (uint32_t i = 0; i < 6; i++) {
        callers[i] = (fetcher){.host = 0, .first = i};
        assert_int_equal(pthread_create(&callers[i].thread, NULL, call_many, &callers[i]), 0);
    }
    for (uint32_t i = 0; i < 6; i++) (void)pthread_join(callers[i].thread, NULL);
    assert_int_equal(atomic_load(&hosts[1].n_tasks), 2 + 6 * 25);

    void *reply = NULL;
    size_t n = 0;
    kvl_error error;
    assert_int_equal(
        kvl_exchange_call(hosts[0].exchange, "h1", "fail", 4, in_ms(WAIT_MS), &reply, &n, &error),
        KVL_ERR_DENIED);
    assert_string_equal(error.text, "not today");
    assert_int_equal(
        kvl_exchange_call(hosts[0].exchange, "h1", "mute", 4, in_ms(100), &reply, &n, &error),
        KVL_ERR_TIMEOUT);
    /* h0 runs none, and nobody is called h7. */
    assert_int_equal(
        kvl_exchange_call(hosts[1].exchange, "h0", "x", 1, in_ms(WAIT_MS), &reply, &n, &error),
        KVL_ERR_UNSUPPORTED);
    assert_int_equal(
        kvl_exchange_call(hosts[1].exchange, "h7", "x", 1, in_ms(WAIT_MS), &reply, &n, &error),
        KVL_ERR_INVALID);
    stop_all(2);
}

/* A client listens nowhere, knows no model and only sends tasks. */
static void test_a_client_needs_no_model(void **state)
{
    (void)state;
    prepare(2, false);
    hosts[1].task = answer;
    hosts[1].fingerprint = tiny_id(1);
    hosts[0].fingerprint = tiny_id(1);
    start_all(2);
    const kvl_exchange_peer peer = {.name = "h1", .endpoint = hosts[1].endpoint};
    const kvl_exchange_options options = {
        .name = "client", .peers = &peer, .n_peers = 1, .clock = kvl_clock_system()};
    kvl_exchange *client = NULL;
    assert_int_equal(kvl_exchange_start(&options, &client, NULL), KVL_OK);
    check_call(client, "h1", 1000);
    kvl_container *container = NULL;
    const kvl_digest id = tiny_id(3);
    assert_int_equal(kvl_exchange_fetch(client, &id, in_ms(300), &container, NULL, 0, NULL),
                     KVL_ERR_UNREACHABLE);
    kvl_exchange_stop(client);
    stop_all(2);
}

static void *stop_soon(void *argument)
{
    (void)argument;
    sleep_ms(100);
    kvl_exchange_stop(hosts[0].exchange);
    hosts[0].exchange = NULL;
    return NULL;
}

static void test_stopping_cancels(void **state)
{
    (void)state;
    prepare(2, false);
    hosts[1].task = answer;
    start_all(2);
    assert_true(wait_for_peer(hosts[0].exchange, "h1", true));
    pthread_t stopper;
    assert_int_equal(pthread_create(&stopper, NULL, stop_soon, NULL), 0);
    void *reply = NULL;
    size_t n = 0;
    assert_int_equal(
        kvl_exchange_call(hosts[0].exchange, "h1", "mute", 4, in_ms(WAIT_MS), &reply, &n, NULL),
        KVL_ERR_CANCELLED);
    (void)pthread_join(stopper, NULL);
    assert_true(wait_for_peer(hosts[1].exchange, "h0", false));
    stop_all(2);
}

/* ---- refusals ---- */

static void test_a_foreign_model_is_refused_by_name(void **state)
{
    (void)state;
    kvl_log_set_level(KVL_LOG_SILENT);
    prepare(2, false);
    hosts[0].fingerprint = tiny_id(1);
    hosts[1].fingerprint = tiny_id(2);
    start_all(2);
    sleep_ms(300);
    void *reply = NULL;
    size_t n = 0;
    kvl_error error;
    assert_int_equal(
        kvl_exchange_call(hosts[0].exchange, "h1", "x", 1, in_ms(WAIT_MS), &reply, &n, &error),
        KVL_ERR_UNREACHABLE);
    char mine[KVL_DIGEST_TEXT_BYTES], theirs[KVL_DIGEST_TEXT_BYTES];
    assert_non_null(strstr(error.text, kvl_digest_to_text(&hosts[0].fingerprint, mine)));
    assert_non_null(strstr(error.text, kvl_digest_to_text(&hosts[1].fingerprint, theirs)));
    assert_true(stats_of(0).peers_refused > 0);
    assert_false(kvl_exchange_peer_is_up(hosts[0].exchange, "h1"));
    stop_all(2);
    kvl_log_set_level(KVL_LOG_WARN);
}

static void test_endpoints_are_checked(void **state)
{
    (void)state;
    static const struct {
        const char *endpoint;
        kvl_status status;
    } cases[] = {
        {"tcp://0.0.0.0:4000", KVL_ERR_DENIED},
        {"tcp://192.168.1.7:4000", KVL_ERR_DENIED},
        {"tcp://*:4000", KVL_ERR_DENIED},
        {"tcp://127.0.0.1.evil.org:4000", KVL_ERR_DENIED},
        {"tcp://127.0.0.1", KVL_ERR_INVALID},
        {"tcp://127.0.0.1:0", KVL_ERR_INVALID},
        {"tcp://127.0.0.1:65536", KVL_ERR_INVALID},
        {"tcp://127.0.0.1:*", KVL_ERR_INVALID},
        {"ipc://", KVL_ERR_INVALID},
        {"ipc://@abstract", KVL_ERR_INVALID},
        {"inproc://x", KVL_ERR_INVALID},
        {"", KVL_ERR_INVALID},
        {"ipc:///dev/null", KVL_ERR_IO}, /* exists and is no socket */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        prepare(1, false);
        (void)snprintf(hosts[0].endpoint, sizeof hosts[0].endpoint, "%s", cases[i].endpoint);
        kvl_error error = {0};
        assert_int_equal(start(0, 1, &error), cases[i].status);
        assert_true(strlen(error.text) > 20);
        assert_null(hosts[0].exchange);
        tiny_store_deinit(&hosts[0].store);
    }
    prepare(2, false);
    memcpy(hosts[1].name, "h0", 3);
    assert_int_equal(start(0, 2, NULL), KVL_ERR_INVALID); /* a peer with our own name */
}

static void test_a_socket_file_is_taken_over_only_from_the_dead(void **state)
{
    (void)state;
    prepare(1, false);
    const char *path = hosts[0].endpoint + strlen("ipc://");
    /* A bound socket that nobody listens to is what a killed process leaves behind. */
    const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    (void)snprintf(address.sun_path, sizeof address.sun_path, "%.90s", path);
    assert_int_equal(bind(fd, (const struct sockaddr *)&address, sizeof address), 0);
    (void)close(fd);
    kvl_error error = {0};
    assert_int_equal(start(0, 1, &error), KVL_OK);
    struct stat about;
    assert_int_equal(stat(path, &about), 0);
    assert_int_equal(about.st_mode & 0777, 0600);

    kvl_exchange *living = hosts[0].exchange;
    assert_int_equal(start(0, 1, &error), KVL_ERR_IO); /* the living one keeps it */
    assert_non_null(strstr(error.text, "listens"));
    hosts[0].exchange = living;
    stop_all(1);
    assert_int_equal(access(path, F_OK), -1); /* and takes it with it */
}

static void test_an_open_directory_is_refused(void **state)
{
    (void)state;
    char open[96];
    (void)snprintf(open, sizeof open, "%s/open", directory);
    assert_int_equal(mkdir(open, 0777), 0);
    assert_int_equal(chmod(open, 0777), 0);
    prepare(1, false);
    (void)snprintf(hosts[0].endpoint, sizeof hosts[0].endpoint, "ipc://%.60s/h", open);
    kvl_error error;
    assert_int_equal(start(0, 1, &error), KVL_ERR_IO);
    assert_non_null(strstr(error.text, "chmod"));
    tiny_store_deinit(&hosts[0].store);
}

/* ---- killed peers ---- */

/* Runs host i in a process of its own until it is killed. All processes are made before the first
 * thread is; `gate` gets the end of a pipe, and the child starts when a byte comes through. */
static pid_t fork_host(uint32_t i, uint32_t n_hosts, const tiny_shape *shape, int *gate)
{
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child > 0) {
        (void)close(ends[0]);
        *gate = ends[1];
        return child;
    }
    (void)close(ends[1]);
    /* A test that fails does not come to the end where it kills its hosts: they go with it. */
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    char byte = 0;
    if (read(ends[0], &byte, 1) != 1) _exit(4);
    kvl_error error = {0};
    if (!tiny_store_add(&hosts[i].store, 1, 0, shape)) _exit(3);
    if (start(i, n_hosts, &error) < 0) {
        (void)fprintf(stderr, "%s\n", error.text);
        _exit(2);
    }
    for (;;) (void)pause();
}

static void open_gate(int gate)
{
    assert_int_equal(write(gate, "x", 1), 1);
    (void)close(gate);
}

static void kill_host(pid_t child)
{
    assert_int_equal(kill(child, SIGKILL), 0);
    assert_int_equal(waitpid(child, NULL, 0), child);
}

static void *kill_soon(void *argument)
{
    sleep_ms(150);
    (void)kill(*(pid_t *)argument, SIGKILL);
    return NULL;
}

static void check_killed_peer(bool tcp)
{
    kvl_log_set_level(KVL_LOG_SILENT);
    const tiny_shape shape = {.n_blocks = 4, .block_bytes = 1000};
    prepare(2, tcp);
    hosts[1].task = answer;
    int gates[2];
    pid_t child = fork_host(1, 2, &shape, &gates[0]);
    const pid_t successor = fork_host(1, 2, &shape, &gates[1]);
    open_gate(gates[0]);
    assert_int_equal(start(0, 2, NULL), KVL_OK);
    assert_true(wait_for_peer(hosts[0].exchange, "h1", true));

    pthread_t killer;
    assert_int_equal(pthread_create(&killer, NULL, kill_soon, &child), 0);
    void *reply = NULL;
    size_t n = 0;
    const int64_t begin = now();
    assert_int_equal(
        kvl_exchange_call(hosts[0].exchange, "h1", "mute", 4, in_ms(4 * WAIT_MS), &reply, &n, NULL),
        KVL_ERR_UNREACHABLE);
    const double noticed_ms = kvl_ns_to_ms(now() - begin) - 150;
    (void)pthread_join(killer, NULL);
    (void)waitpid(child, NULL, 0);
    print_message("%s: a killed peer is noticed after %.1f ms\n", tcp ? "tcp" : "ipc", noticed_ms);
    assert_true(noticed_ms < 1000);
    assert_false(kvl_exchange_peer_is_up(hosts[0].exchange, "h1"));
    const int64_t again = now();
    kvl_container *container = NULL;
    assert_int_equal(fetch(0, 1, &container, NULL), KVL_ERR_UNREACHABLE); /* at once */
    assert_true(now() - again < 500 * KVL_NS_PER_MS);

    open_gate(gates[1]); /* the socket file of the dead one lies there */
    assert_true(wait_for_peer(hosts[0].exchange, "h1", true));
    assert_int_equal(fetch(0, 1, &container, NULL), KVL_OK);
    kvl_container_release(container);
    assert_int_equal(stats_of(0).peers_lost, 1);
    kill_host(successor);
    stop_all(1);
    tiny_store_deinit(&hosts[1].store);
    kvl_log_set_level(KVL_LOG_WARN);
}

static void test_a_killed_peer_is_noticed_at_once_over_ipc(void **state)
{
    (void)state;
    check_killed_peer(false);
}

static void test_a_killed_peer_is_noticed_at_once_over_tcp(void **state)
{
    (void)state;
    check_killed_peer(true);
}

static void *kill_sender(void *argument)
{
    const pid_t *children = argument;
    while (stats_of(0).bytes_fetched < 10u << 20) sleep_ms(1);
    (void)kill(children[0], SIGKILL);
    (void)kill(children[1], SIGCONT);
    return NULL;
}

/* Two processes hold a large container. One sleeps, so the other sends, and is killed half-way. */
static void test_another_holder_goes_on_when_one_is_killed(void **state)
{
    (void)state;
    kvl_log_set_level(KVL_LOG_SILENT);
    const tiny_shape shape = {.n_blocks = 128, .block_bytes = 1u << 20};
    prepare(3, false);
    int gates[2];
    pid_t children[2] = {fork_host(1, 3, &shape, &gates[0]), fork_host(2, 3, &shape, &gates[1])};
    open_gate(gates[0]);
    open_gate(gates[1]);
    assert_int_equal(start(0, 3, NULL), KVL_OK);
    assert_true(wait_for_peer(hosts[0].exchange, "h1", true));
    assert_true(wait_for_peer(hosts[0].exchange, "h2", true));
    /* Before it stands still it may answer for a while, and then be the one that is asked. */
    assert_int_equal(kill(children[1], SIGSTOP), 0);
    assert_int_equal(waitpid(children[1], NULL, WUNTRACED), children[1]);
    pthread_t killer;
    assert_int_equal(pthread_create(&killer, NULL, kill_sender, children), 0);
    kvl_container *container = NULL;
    char from[8] = "";
    assert_int_equal(fetch(0, 1, &container, from), KVL_OK);
    assert_string_equal(from, "h2");
    assert_true(tiny_container_is(container, 1, 0));
    kvl_container_release(container);
    /* What had arrived was not sent again. */
    assert_true(stats_of(0).bytes_fetched < ((uint64_t)128 << 20) + ((uint64_t)3 << 20));
    (void)pthread_join(killer, NULL);
    assert_int_equal(waitpid(children[0], NULL, 0), children[0]);
    kill_host(children[1]);
    stop_all(1);
    tiny_store_deinit(&hosts[1].store);
    tiny_store_deinit(&hosts[2].store);
    kvl_log_set_level(KVL_LOG_WARN);
}

/* ---- memory ---- */

static void test_a_start_without_memory_leaves_nothing(void **state)
{
    (void)state;
    prepare(2, false);
    kvl_status status = KVL_ERR_NO_MEMORY;
    for (int64_t n = 0; status < 0; n++) {
        assert_true(n < 1000);
        const int64_t live = kvl_alloc_live();
        kvl_alloc_fail_after(n);
        kvl_error error;
        status = start(0, 2, &error);
        kvl_alloc_fail_after(-1);
        if (status < 0) {
            assert_int_equal(status, KVL_ERR_NO_MEMORY);
            assert_int_equal(kvl_alloc_live(), live);
        } else {
            kvl_exchange_stop(hosts[0].exchange);
            assert_int_equal(kvl_alloc_live(), live);
        }
    }
    tiny_store_deinit(&hosts[0].store);
    tiny_store_deinit(&hosts[1].store);
}

static int make_directory(void **state)
{
    (void)state;
    (void)snprintf(directory, sizeof directory, "/tmp/kvloom-test-XXXXXX");
    return mkdtemp(directory) == NULL ? -1 : 0;
}

static int remove_directory(void **state)
{
    (void)state;
    kvl_container_spare_clear();
    return kvl_directory_remove(directory, NULL) == KVL_OK ? 0 : -1;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_killed_peer_is_noticed_at_once_over_ipc),
        cmocka_unit_test(test_a_killed_peer_is_noticed_at_once_over_tcp),
        cmocka_unit_test(test_another_holder_goes_on_when_one_is_killed),
        cmocka_unit_test(test_containers_arrive_whole_over_ipc),
        cmocka_unit_test(test_containers_arrive_whole_over_tcp),
        cmocka_unit_test(test_an_announcement_is_remembered),
        cmocka_unit_test(test_many_threads_fetch_at_once),
        cmocka_unit_test(test_lists_are_filtered_and_merged),
        cmocka_unit_test(test_tasks_are_answered_once),
        cmocka_unit_test(test_a_client_needs_no_model),
        cmocka_unit_test(test_stopping_cancels),
        cmocka_unit_test(test_a_foreign_model_is_refused_by_name),
        cmocka_unit_test(test_endpoints_are_checked),
        cmocka_unit_test(test_a_socket_file_is_taken_over_only_from_the_dead),
        cmocka_unit_test(test_an_open_directory_is_refused),
        cmocka_unit_test(test_a_start_without_memory_leaves_nothing),
    };
    return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
