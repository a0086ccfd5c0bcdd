/* cli/bench_servers.c: servers to measure against. */
#include "cli/bench_servers.h"

#include "base/alloc.h"
#include "base/file.h"
#include "cli/bench_data.h"
#include "exchange/exchange.h"
#include "exchange/local.h"
#include "store/store.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zmq.h>

enum { PORT_FIRST = 10000, PORTS = 20000, RAW_SOCKETS = 3 };

/* ---- places ---- */

kvl_status bench_place_make(bench_place *place, kvl_error *error)
{
    memset(place, 0, sizeof *place);
    KVL_TRY(kvl_cli_temporary("bench", place->directory, sizeof place->directory, error));
    const int port = PORT_FIRST + (int)(getpid() % PORTS);
    for (int i = 0; i < 3; i++) {
        char *raw = place->raw_endpoint[i];
        char *peer = place->peer_endpoint[i];
        if (i == 0) {
            (void)snprintf(raw, 96, "ipc://%s/raw", place->directory);
            (void)snprintf(peer, 96, "ipc://%s/peer", place->directory);
        } else {
            (void)snprintf(raw, 96, "tcp://127.0.0.1:%d", port + 2 * i);
            (void)snprintf(peer, 96, "tcp://127.0.0.1:%d", port + 2 * i + 1);
        }
    }
    (void)snprintf(place->sidecar_socket, 96, "%s/sidecar.sock", place->directory);
    (void)snprintf(place->redis_socket, 96, "%s/redis.sock", place->directory);
    (void)snprintf(place->allow_list, 96, "%s/allow", place->directory);
    (void)snprintf(place->key_file, 96, "%s/tenant.key", place->directory);
    KVL_TRY(kvl_key_pair_make(&place->server_keys, error));
    KVL_TRY(kvl_key_pair_make(&place->client_keys, error));
    char line[128];
    const int n = snprintf(line, sizeof line, "%s bench read\n", place->client_keys.public_key);
    KVL_TRY(kvl_file_write(place->allow_list, line, (size_t)n, error));
    static const uint8_t key[32] = {1};
    return kvl_file_write(place->key_file, key, sizeof key, error);
}

void bench_place_end(bench_place *place)
{
    kvl_ignore(kvl_directory_remove(place->directory, NULL));
}

/* ---- raw ZeroMQ ---- */

void bench_set_curve(void *socket, const bench_place *place, bool as_server)
{
    const kvl_key_pair *own = as_server ? &place->server_keys : &place->client_keys;
    const int on = 1;
    if (as_server) {
        (void)zmq_setsockopt(socket, ZMQ_CURVE_SERVER, &on, sizeof on);
    } else {
        (void)zmq_setsockopt(socket, ZMQ_CURVE_SERVERKEY, place->server_keys.public_key, 40);
        (void)zmq_setsockopt(socket, ZMQ_CURVE_PUBLICKEY, own->public_key, 40);
    }
    (void)zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, own->secret_key, 40);
}

static void keep_bytes(void *bytes, void *hint)
{
    (void)bytes;
    (void)hint;
}

/* Messages are sent from where they lie: the fastest that ZeroMQ can be. */
static void answer_question(void *socket, uint8_t *bytes)
{
    bench_question question;
    if (zmq_recv(socket, &question, sizeof question, 0) != (int)sizeof question) return;
    for (uint32_t i = 0; i < question.n; i++) {
        zmq_msg_t message;
        if (zmq_msg_init_data(&message, bytes, question.n_bytes, keep_bytes, NULL) != 0) return;
        if (zmq_msg_send(&message, socket, 0) < 0) (void)zmq_msg_close(&message);
    }
}

static void serve_raw(const bench_place *place)
{
    void *zmq = zmq_ctx_new();
    uint8_t *bytes = kvl_alloc_aligned((size_t)64 << 20);
    if (zmq == NULL || bytes == NULL) return;
    memset(bytes, 7, (size_t)64 << 20);
    zmq_pollitem_t items[RAW_SOCKETS];
    for (int i = 0; i < RAW_SOCKETS; i++) {
        void *socket = zmq_socket(zmq, ZMQ_DEALER);
        if (i == 2) bench_set_curve(socket, place, true);
        if (zmq_bind(socket, place->raw_endpoint[i]) != 0) return;
        items[i] = (zmq_pollitem_t){.socket = socket, .events = ZMQ_POLLIN};
    }
    while (zmq_poll(items, RAW_SOCKETS, -1) >= 0) {
        for (int i = 0; i < RAW_SOCKETS; i++) {
            if ((items[i].revents & ZMQ_POLLIN) != 0) answer_question(items[i].socket, bytes);
        }
    }
}

/* ---- our exchange ---- */

static kvl_status serve_peers(const bench_place *place, kvl_error *error)
{
    static const size_t sizes[] = {1, 16, 64};
    kvl_tier *store = NULL;
    kvl_allow_list *list = NULL;
    KVL_TRY(kvl_memory_tier_create((uint64_t)1 << 30, &store, error));
    KVL_TRY(kvl_allow_list_open(place->allow_list, &list, error));
    for (uint64_t i = 0; i < 3; i++) {
        kvl_container *container = NULL;
        KVL_TRY(kvl_bench_container(BENCH_1M + i, sizes[i] << 20, 32, &container, error));
        KVL_TRY(store->ops->put(store, container, error));
        kvl_container_release(container);
    }
    for (int i = 0; i < 3; i++) {
        kvl_exchange *exchange = NULL;
        const kvl_exchange_options options = {.name = "server",
                                              .endpoint = place->peer_endpoint[i],
                                              .store = store,
                                              .fingerprint = kvl_bench_fingerprint(),
                                              .keys = i == 2 ? &place->server_keys : NULL,
                                              .allow_list = i == 2 ? list : NULL,
                                              .clock = kvl_clock_system()};
        KVL_TRY(kvl_exchange_start(&options, &exchange, error));
    }
    return KVL_OK;
}

static pid_t fork_with_parent(void)
{
    const pid_t pid = fork();
    if (pid == 0) (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    return pid;
}

pid_t bench_serve_raw(const bench_place *place)
{
    const pid_t pid = fork_with_parent();
    if (pid != 0) return pid;
    serve_raw(place);
    _exit(1);
}

pid_t bench_serve_peers(const bench_place *place)
{
    const pid_t pid = fork_with_parent();
    if (pid != 0) return pid;
    kvl_error error = {.text = ""};
    if (serve_peers(place, &error) < 0) {
        (void)fprintf(stderr, "bench: %s\n", error.text);
        _exit(1);
    }
    for (;;) (void)poll(NULL, 0, -1);
}

/* ---- programs ---- */

pid_t bench_start_sidecar(bench_place *place)
{
    place->sidecar_ns = kvl_clock_now(kvl_clock_system());
    const pid_t pid = fork_with_parent();
    if (pid != 0) return pid;
    (void)execl("/proc/self/exe", "kvloom", "sidecar", "--socket", place->sidecar_socket,
                "--key-file", place->key_file, "--model", "bench", "--memory", "256MiB",
                (char *)NULL);
    _exit(127);
}

pid_t bench_start_redis(const bench_place *place)
{
    static const char program[] = "/usr/bin/redis-server";
    if (access(program, X_OK) != 0) return 0;
    const pid_t pid = fork_with_parent();
    if (pid != 0) return pid;
    const int nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC);
    if (nowhere >= 0) (void)dup2(nowhere, STDOUT_FILENO);
    (void)execl(program, program, "--unixsocket", place->redis_socket, "--port", "0", "--save", "",
                "--appendonly", "no", "--dir", place->directory, (char *)NULL);
    _exit(127);
}

int bench_dial_redis(const bench_place *place)
{
    for (int i = 0; i < 300; i++) {
        int fd = -1;
        if (kvl_local_dial(place->redis_socket, &fd, NULL) == KVL_OK) {
            (void)fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
            return fd;
        }
        (void)poll(NULL, 0, 10);
    }
    return -1;
}

double bench_resident_mib(pid_t pid)
{
    char path[64];
    char line[256];
    double kib = 0.0;
    (void)snprintf(path, sizeof path, "/proc/%ld/status", (long)pid);
    FILE *file = fopen(path, "re");
    if (file == NULL) return 0.0;
    while (fgets(line, sizeof line, file) != NULL) {
        if (strncmp(line, "VmRSS:", 6) == 0) kib = strtod(line + 6, NULL);
    }
    (void)fclose(file);
    return kib / 1024.0;
}
