/* cli/cmd_serve.c: `kvloom serve`: one agent host, until it is told to stop or gets SIGTERM. */
#include "base/alloc.h"
#include "base/file.h"
#include "base/log.h"
#include "cli/cli.h"
#include "host/host.h"

#include <argp.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>

enum {
    OPTION_KEY = 256,
    OPTION_STORE_MB,
    OPTION_MEMORY_MB,
    OPTION_WITH_PARENT,
    OPTION_PAPER,
    OPTION_PAGES
};

typedef struct arguments {
    kvl_cli_engine engine;
    kvl_host_options host;
    kvl_exchange_peer peers[KVL_PEERS_MAX];
    const char *key_file;
    bool with_parent;
} arguments;

static const struct argp_option options[] = {
    {"name", 'n', "NAME", 0, "Name of this host among its peers", 0},
    {"listen", 'l', "ENDPOINT", 0, "ipc:///path or tcp://127.0.0.1:port", 0},
    {"peer", 'p', "NAME=ENDPOINT", 0, "A peer; may be given many times", 0},
    {"store", 's', "DIR", 0, "Where segments and anchors are kept", 0},
    {"key-file", OPTION_KEY, "FILE", 0, "The tenant's key, 32 bytes; peers of a tenant share it",
     0},
    {"store-mb", OPTION_STORE_MB, "N", 0, "Most that is kept on disk (4096)", 0},
    {"memory-mb", OPTION_MEMORY_MB, "N", 0, "Most that is kept in memory (1024)", 0},
    {"pages", OPTION_PAGES, "N", 0, "Pages of 16 tokens of KV (three contexts)", 0},
    {"paper-anchors", OPTION_PAPER, NULL, 0, "Match anchors as the KVCOMM paper does", 0},
    {"with-parent", OPTION_WITH_PARENT, NULL, 0, "End when the process that started this ends", 0},
    {0},
};

static void add_peer(arguments *wanted, char *text, const struct argp_state *state)
{
    char *separator = strchr(text, '=');
    if (separator == NULL || separator == text || separator[1] == '\0')
        argp_error(state, "--peer is '%s'; it must be NAME=ENDPOINT", text);
    if (wanted->host.n_peers == KVL_PEERS_MAX) argp_error(state, "at most %u peers", KVL_PEERS_MAX);
    if (separator == NULL) return;
    *separator = '\0';
    wanted->peers[wanted->host.n_peers++] =
        (kvl_exchange_peer){.name = text, .endpoint = separator + 1};
}

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    kvl_host_options *host = &wanted->host;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &wanted->engine; return 0;
    case 'n': host->name = text; return 0;
    case 'l': host->endpoint = text; return 0;
    case 'p': add_peer(wanted, text, state); return 0;
    case 's': host->store_path = text; return 0;
    case OPTION_KEY: wanted->key_file = text; return 0;
    case OPTION_STORE_MB:
        host->store_bytes_max = (uint64_t)kvl_cli_number(state, "--store-mb", text, 1, 1 << 24)
                                << 20;
        return 0;
    case OPTION_MEMORY_MB:
        host->memory_bytes_max = (uint64_t)kvl_cli_number(state, "--memory-mb", text, 1, 1 << 24)
                                 << 20;
        return 0;
    case OPTION_PAGES:
        host->engine.n_pages = kvl_cli_number(state, "--pages", text, 16, 1 << 24);
        return 0;
    case OPTION_PAPER: host->anchors.mode = KVL_ANCHOR_PAPER; return 0;
    case OPTION_WITH_PARENT: wanted->with_parent = true; return 0;
    case ARGP_KEY_END:
        if (host->name == NULL || host->endpoint == NULL || host->store_path == NULL ||
            wanted->key_file == NULL)
            argp_error(state, "--name, --listen, --store and --key-file are needed");
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static kvl_status read_key(const char *path, uint8_t *key, kvl_error *error)
{
    char *bytes = NULL;
    size_t n_bytes = 0;
    KVL_TRY(kvl_file_read(path, KVL_TENANT_KEY_BYTES, &bytes, &n_bytes, error));
    if (n_bytes == KVL_TENANT_KEY_BYTES) memcpy(key, bytes, n_bytes);
    kvl_free(bytes);
    if (n_bytes != KVL_TENANT_KEY_BYTES)
        return KVL_FAIL(error, KVL_ERR_INVALID, "%s has %zu bytes; a tenant's key has %u", path,
                        n_bytes, KVL_TENANT_KEY_BYTES);
    return KVL_OK;
}

typedef struct signals {
    sigset_t set;
    kvl_host *host;
} signals;

/* Waits for a signal on a thread of its own: a handler may not take locks, a thread may. */
static void *wait_for_signal(void *argument)
{
    const signals *waited = argument;
    int number = 0;
    if (sigwait(&waited->set, &number) == 0) kvl_host_stop(waited->host);
    return NULL;
}

static kvl_status serve(arguments *wanted, signals *waited, kvl_error *error)
{
    char path[PATH_MAX];
    const char *model = wanted->engine.model == NULL ? "smollm2-135m" : wanted->engine.model;
    KVL_TRY(kvl_models_find(model, path, error));
    KVL_TRY(read_key(wanted->key_file, wanted->host.tenant_key, error));
    wanted->host.engine.model_path = path;
    wanted->host.engine.n_threads = wanted->engine.n_threads;
    wanted->host.engine.n_positions = wanted->engine.n_positions;
    wanted->host.engine.variant = wanted->engine.variant;
    wanted->host.peers = wanted->peers;
    KVL_TRY(kvl_host_create(&wanted->host, &waited->host, error));
    pthread_t waiter;
    if (pthread_create(&waiter, NULL, wait_for_signal, waited) != 0) {
        kvl_host_destroy(waited->host);
        return KVL_FAIL(error, KVL_ERR_IO, "cannot start a thread");
    }
    kvl_log(KVL_LOG_INFO, "host_ready", "endpoint=%s", wanted->host.endpoint);
    kvl_host_run(waited->host);
    /* The waiter may still wait: any signal of its set ends it. */
    (void)pthread_kill(waiter, SIGTERM);
    (void)pthread_join(waiter, NULL);
    kvl_host_destroy(waited->host);
    return KVL_OK;
}

int kvl_command_serve(int argc, char **argv)
{
    static const struct argp_child children[] = {{&kvl_cli_engine_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {options,  parse, NULL, "Run one agent host.",
                                     children, NULL,  NULL};
    arguments wanted = {.host = kvl_host_default_options()};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    if (wanted.with_parent) (void)prctl(PR_SET_PDEATHSIG, SIGTERM);
    signals waited = {.host = NULL};
    (void)sigemptyset(&waited.set);
    (void)sigaddset(&waited.set, SIGTERM);
    (void)sigaddset(&waited.set, SIGINT);
    (void)pthread_sigmask(SIG_BLOCK, &waited.set, NULL);
    kvl_error error;
    const kvl_status status = serve(&wanted, &waited, &error);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
