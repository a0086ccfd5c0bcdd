/* cli/demo_hosts.c: one process a host, each with its own store, all connected to all. */
#include "base/alloc.h"
#include "base/file.h"
#include "base/random.h"
#include "cli/demo.h"

#include <errno.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    ARGUMENTS_MAX = 64,
    TEXT_MAX = PATH_MAX + 64,
    START_TIMEOUT_S = 60,
    STOP_TIMEOUT_S = 5,
    /* The longest prompt has 1,700 tokens. A host holds pages of three contexts: of the whole 8,192
     * tokens that the model was made for, five hosts would touch 6 GB before the first of them
     * answers. */
    CONTEXT_DEFAULT = 3072,
};

extern char **environ;

/* Arguments of one host, with room for their texts. */
typedef struct command_line {
    char texts[ARGUMENTS_MAX][TEXT_MAX];
    char *arguments[ARGUMENTS_MAX + 1];
    size_t n;
} command_line;

static void add(command_line *line, const char *option, const char *value)
{
    KVL_ASSERT(line->n + 2 <= ARGUMENTS_MAX);
    const char *const texts[] = {option, value};
    for (size_t i = 0; i < 2; i++) {
        if (texts[i] == NULL) continue;
        (void)snprintf(line->texts[line->n], TEXT_MAX, "%s", texts[i]);
        line->arguments[line->n] = line->texts[line->n];
        line->n++;
    }
}

static void add_number(command_line *line, const char *option, uint32_t number)
{
    char text[16];
    (void)snprintf(text, sizeof text, "%u", number);
    if (number != 0) add(line, option, text);
}

static void build_line(const demo *d, size_t host, command_line *line)
{
    char text[TEXT_MAX];
    add(line, "kvloom", NULL);
    add(line, "serve", NULL);
    add(line, "--with-parent", NULL);
    add(line, "--audit", "0"); /* of five hosts on one machine, one would compute beside another */
    add(line, "--name", d->hosts[host].name);
    add(line, "--listen", d->hosts[host].endpoint);
    add(line, "--store", d->hosts[host].store);
    (void)snprintf(text, sizeof text, "%s/tenant.key", d->directory);
    add(line, "--key-file", text);
    add(line, "--model", d->model);
    add_number(line, "--threads", d->options->engine.n_threads);
    const uint32_t context = d->options->engine.n_positions;
    add_number(line, "--context", context == 0 ? CONTEXT_DEFAULT : context);
    if (d->options->engine.device != NULL) add(line, "--device", d->options->engine.device);
    if (d->options->engine.variant != KVL_CPU_BEST)
        add(line, "--cpu", kvl_cpu_variant_name(d->options->engine.variant));
    if (d->options->paper_anchors) add(line, "--paper-anchors", NULL);
    for (size_t p = 0; p < d->options->n_agents; p++) {
        if (p == host) continue;
        (void)snprintf(text, sizeof text, "%s=%s", d->hosts[p].name, d->hosts[p].endpoint);
        add(line, "--peer", text);
    }
}

static kvl_status spawn_host(demo *d, size_t host, kvl_error *error)
{
    command_line *line = kvl_alloc_zero(1, sizeof *line);
    if (line == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a command line");
    build_line(d, host, line);
    /* The name behind the link, and not the link: a tool that runs this program in its own process,
     * as valgrind does, answers with the program and not with itself. */
    char program[PATH_MAX];
    const ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    program[n < 0 ? 0 : n] = '\0';
    const int reason =
        posix_spawn(&d->hosts[host].pid, program, NULL, NULL, line->arguments, environ);
    kvl_free(line);
    if (reason == 0) return KVL_OK;
    d->hosts[host].pid = 0;
    return KVL_FAIL(error, KVL_ERR_IO, "cannot start host %s: %s", d->hosts[host].name,
                    strerror(reason));
}

static void nap(void)
{
    const struct timespec pause = {0, 5 * KVL_NS_PER_MS};
    (void)nanosleep(&pause, NULL);
}

/* Waits until a host answers; one that has ended will never do so. */
static kvl_status wait_until_up(demo *d, size_t host, kvl_error *error)
{
    const kvl_clock *clock = kvl_clock_system();
    const int64_t deadline = kvl_clock_now(clock) + START_TIMEOUT_S * KVL_NS_PER_S;
    while (!kvl_exchange_peer_is_up(d->exchange, d->hosts[host].name)) {
        int outcome = 0;
        if (waitpid(d->hosts[host].pid, &outcome, WNOHANG) == d->hosts[host].pid) {
            d->hosts[host].pid = 0;
            return KVL_FAIL(error, KVL_ERR_UNREACHABLE,
                            "host %s ended while it started; its "
                            "message is above",
                            d->hosts[host].name);
        }
        if (kvl_clock_now(clock) > deadline)
            return KVL_FAIL(error, KVL_ERR_TIMEOUT, "host %s does not answer after %d s",
                            d->hosts[host].name, START_TIMEOUT_S);
        nap();
    }
    return KVL_OK;
}

kvl_status demo_hosts_revive(demo *d, kvl_error *error)
{
    bool started[DEMO_AGENTS_MAX] = {false};
    for (size_t h = 0; h < d->options->n_agents; h++) {
        if (d->hosts[h].pid != 0) continue;
        KVL_TRY(spawn_host(d, h, error));
        started[h] = true;
    }
    for (size_t h = 0; h < d->options->n_agents; h++) {
        if (started[h]) KVL_TRY(wait_until_up(d, h, error));
    }
    return KVL_OK;
}

static kvl_status make_directory(demo *d, kvl_error *error)
{
    if (d->options->state != NULL) {
        if (realpath(d->options->state, d->directory) == NULL) {
            KVL_TRY(kvl_directory_make(d->options->state, error));
            if (realpath(d->options->state, d->directory) == NULL)
                return KVL_FAIL(error, KVL_ERR_IO, "cannot find %s: %s", d->options->state,
                                strerror(errno));
        }
        return KVL_OK;
    }
    return kvl_cli_temporary("demo", d->directory, sizeof d->directory, error);
}

static kvl_status make_key(const demo *d, kvl_error *error)
{
    char path[PATH_MAX];
    if (snprintf(path, sizeof path, "%s/tenant.key", d->directory) >= (int)sizeof path)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path %.64s... is too long", d->directory);
    if (access(path, R_OK) == 0) return KVL_OK;
    uint8_t key[32];
    kvl_random_secret(key, sizeof key);
    return kvl_file_write(path, key, sizeof key, error);
}

static kvl_status name_hosts(demo *d, kvl_error *error)
{
    for (size_t h = 0; h < d->options->n_agents; h++) {
        demo_host *host = &d->hosts[h];
        (void)snprintf(host->name, sizeof host->name, "%s", d->workflow.agents[h].name);
        const int n = snprintf(host->endpoint, sizeof host->endpoint, "ipc://%s/%zu.sock",
                               d->directory, h + 1);
        const int m =
            snprintf(host->store, sizeof host->store, "%s/store-%zu", d->directory, h + 1);
        if (n >= (int)sizeof host->endpoint || m >= (int)sizeof host->store)
            return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path %.64s... is too long",
                            d->directory);
    }
    return KVL_OK;
}

kvl_status demo_hosts_start(demo *d, kvl_error *error)
{
    KVL_TRY(make_directory(d, error));
    KVL_TRY(make_key(d, error));
    KVL_TRY(name_hosts(d, error));
    kvl_exchange_peer peers[DEMO_AGENTS_MAX];
    for (size_t h = 0; h < d->options->n_agents; h++)
        peers[h] = (kvl_exchange_peer){.name = d->hosts[h].name, .endpoint = d->hosts[h].endpoint};
    const kvl_exchange_options exchange = {
        .name = "demo",
        .peers = peers,
        .n_peers = d->options->n_agents,
        .clock = kvl_clock_system(),
    };
    KVL_TRY(kvl_exchange_start(&exchange, &d->exchange, error));
    return demo_hosts_revive(d, error);
}

void demo_host_kill(demo *d, size_t host)
{
    if (d->hosts[host].pid == 0) return;
    (void)kill(d->hosts[host].pid, SIGKILL);
    (void)waitpid(d->hosts[host].pid, NULL, 0);
    d->hosts[host].pid = 0;
}

void demo_hosts_stop(demo *d)
{
    /* First, so that nobody is missed by us when they go. */
    kvl_exchange_stop(d->exchange);
    d->exchange = NULL;
    for (size_t h = 0; h < DEMO_AGENTS_MAX; h++) {
        if (d->hosts[h].pid != 0) (void)kill(d->hosts[h].pid, SIGTERM);
    }
    const kvl_clock *clock = kvl_clock_system();
    const int64_t deadline = kvl_clock_now(clock) + STOP_TIMEOUT_S * KVL_NS_PER_S;
    for (size_t h = 0; h < DEMO_AGENTS_MAX; h++) {
        while (d->hosts[h].pid != 0 && kvl_clock_now(clock) < deadline) {
            if (waitpid(d->hosts[h].pid, NULL, WNOHANG) != 0)
                d->hosts[h].pid = 0;
            else
                nap();
        }
        demo_host_kill(d, h);
    }
    if (d->options->state == NULL && d->directory[0] != '\0')
        kvl_ignore(kvl_directory_remove(d->directory, NULL));
}
