/* cli/cmd_sidecar.c: `kvloom sidecar`: keeps and exchanges segments for engines in other processes,
 * until SIGTERM. */
#include "base/log.h"
#include "cli/cli.h"
#include "cli/config.h"

#include <argp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

/* Options of one value are numbered behind this: first those of the sidecar, then those of its
 * first tenant. */
enum {
    OPTION_VALUES = 256,
    OPTION_TENANT = OPTION_VALUES + KVL_CONFIG_KEYS,
    OPTION_CONFIG = OPTION_TENANT + KVL_TENANT_KEYS,
    OPTION_CHECK,
    OPTION_PRINT,
    OPTION_NOT_DURABLE,
    OPTION_ENCRYPT,
    OPTION_WITH_PARENT,
    OPTION_PEER_KEY,
};

#define VALUE(key) (OPTION_VALUES + KVL_CONFIG_##key)
#define TENANT(key) (OPTION_TENANT + KVL_TENANT_##key)

static const struct argp_option options[] = {
    {"config", OPTION_CONFIG, "FILE", 0, "YAML file ($KVLOOM_CONFIG); what follows wins over it",
     0},
    {"check-config", OPTION_CHECK, NULL, 0, "Only say whether the configuration is right", 0},
    {"print-config", OPTION_PRINT, NULL, 0, "Only print what all sources come to", 0},
    {"name", VALUE(NAME), "NAME", 0, "Name among its peers (sidecar)", 0},
    {"socket", TENANT(SOCKET), "PATH", 0, "Where clients on this machine connect", 0},
    {"socket-mode", TENANT(SOCKET_MODE), "MODE", 0, "Who may connect there (0600)", 0},
    {"key-file", TENANT(KEY_FILE), "FILE", 0, "The tenant's key, 32 bytes", 0},
    {"model", VALUE(MODEL), "TEXT", 0, "Names the model, as kvloom_fingerprint does for clients",
     0},
    {"fingerprint", VALUE(FINGERPRINT), "HEX", 0, "The same as its 64 hexadecimal digits", 0},
    {"memory", TENANT(MEMORY), "SIZE", 0, "Most that is kept in memory (1GiB)", 0},
    {"policy", TENANT(POLICY), "WHICH", 0,
     "What of a full memory goes first: slru, lru, s3fifo or "
     "auto, which --trace decides (slru)",
     0},
    {"trace", TENANT(TRACE), "FILE", 0, "What `kvloom trace record` has written, for auto", 0},
    {"store", TENANT(STORE), "DIR", 0, "Where segments are kept on disk; without it they are not",
     0},
    {"disk", TENANT(DISK), "SIZE", 0, "Most that is kept on disk (8GiB)", 0},
    {"not-durable", OPTION_NOT_DURABLE, NULL, 0, "Answer puts before the disk has them for sure",
     0},
    {"encrypt", OPTION_ENCRYPT, NULL, 0, "Seal what is on disk under the tenant's key", 0},
    {"lease", VALUE(LEASE), "TIME", 0, "Longest lease of a client (60s)", 0},
    {"workers", VALUE(WORKERS), "N", 0, "Threads for the disk (2)", 0},
    {"listen", VALUE(LISTEN), "ENDPOINT", 0, "Where peers dial: ipc:///path or tcp://host:port", 0},
    {"curve-key", VALUE(CURVE_KEY), "FILE", 0, "Key pair of `kvloom keygen`, for tcp", 0},
    {"allow-list", VALUE(ALLOW_LIST), "FILE", 0, "Keys that may connect; read again on SIGHUP", 0},
    {"peer", 'p', "NAME=ENDPOINT", 0, "A peer; may be given many times", 0},
    {"peer-key", OPTION_PEER_KEY, "NAME=KEY", 0, "Public key of a peer that was named before", 0},
    {"with-parent", OPTION_WITH_PARENT, NULL, 0, "End when the process that started this ends", 0},
    {0},
};

typedef struct arguments {
    kvl_config config;
    bool is_file_pass; /* the first look, for --config only */
    const char *file;
    bool checks, prints, with_parent;
} arguments;

static void set(const struct argp_state *state, char **value, const char *text)
{
    kvl_error error;
    if (kvl_config_set(value, text, &error) < 0) argp_failure(state, 1, 0, "%s", error.text);
}

/* Cuts NAME=VALUE in two; the second half. */
static char *cut(const struct argp_state *state, const char *option, char *text)
{
    char *separator = strchr(text, '=');
    if (separator == NULL || separator == text || separator[1] == '\0') {
        argp_error(state, "%s is '%s'; it must be NAME=VALUE", option, text);
        return text;
    }
    *separator = '\0';
    return separator + 1;
}

static void add_peer(arguments *wanted, char *text, const struct argp_state *state)
{
    kvl_config *config = &wanted->config;
    if (config->n_peers == KVL_PEERS_MAX) argp_error(state, "at most %u peers", KVL_PEERS_MAX);
    const char *endpoint = cut(state, "--peer", text);
    set(state, &config->peers[config->n_peers][KVL_PEER_NAME], text);
    set(state, &config->peers[config->n_peers][KVL_PEER_ENDPOINT], endpoint);
    config->n_peers++;
}

static void set_peer_key(arguments *wanted, char *text, const struct argp_state *state)
{
    kvl_config *config = &wanted->config;
    const char *key = cut(state, "--peer-key", text);
    for (size_t i = 0; i < config->n_peers; i++) {
        const char *name = config->peers[i][KVL_PEER_NAME];
        if (name == NULL || strcmp(name, text) != 0) continue;
        set(state, &config->peers[i][KVL_PEER_PUBLIC_KEY], key);
        return;
    }
    argp_error(state, "--peer-key names '%s', which is no peer", text);
}

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    if (key == OPTION_CONFIG) wanted->file = text;
    if (key == ARGP_KEY_ARG) argp_usage(state);
    /* The file comes first whatever the order: the rest of the line wins over it. */
    if (wanted->is_file_pass) return 0;
    if (key >= OPTION_VALUES && key < OPTION_TENANT) {
        set(state, &wanted->config.values[key - OPTION_VALUES], text);
        return 0;
    }
    if (key >= OPTION_TENANT && key < OPTION_CONFIG) {
        set(state, &wanted->config.tenants[0][key - OPTION_TENANT], text);
        return 0;
    }
    switch (key) {
    case OPTION_CONFIG: return 0;
    case OPTION_CHECK: wanted->checks = true; return 0;
    case OPTION_PRINT: wanted->prints = true; return 0;
    case OPTION_NOT_DURABLE:
        set(state, &wanted->config.tenants[0][KVL_TENANT_DURABLE], "false");
        return 0;
    case OPTION_ENCRYPT:
        set(state, &wanted->config.tenants[0][KVL_TENANT_ENCRYPT], "true");
        return 0;
    case 'p': add_peer(wanted, text, state); return 0;
    case OPTION_PEER_KEY: set_peer_key(wanted, text, state); return 0;
    case OPTION_WITH_PARENT: wanted->with_parent = true; return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

/* A handler and no waiting thread: libraries have threads of their own that do not block signals,
 * and one of them would take the default action. kvl_sidecar_stop only sets a flag and writes. */
static kvl_sidecar *volatile running;

static void stop_running(int number)
{
    (void)number;
    if (running != NULL) kvl_sidecar_stop(running);
}

static void reload_running(int number)
{
    (void)number;
    if (running != NULL) kvl_sidecar_reload(running);
}

static void handle_signals(void)
{
    struct sigaction action = {.sa_handler = stop_running, .sa_flags = SA_RESTART};
    (void)sigfillset(&action.sa_mask);
    (void)sigaction(SIGTERM, &action, NULL);
    (void)sigaction(SIGINT, &action, NULL);
    action.sa_handler = reload_running;
    (void)sigaction(SIGHUP, &action, NULL);
}

static kvl_status serve(const kvl_sidecar_options *wanted, kvl_error *error)
{
    kvl_sidecar *sidecar = NULL;
    KVL_TRY(kvl_sidecar_create(wanted, &sidecar, error));
    running = sidecar;
    handle_signals();
    kvl_log(KVL_LOG_INFO, "sidecar_ready", "socket=%s", wanted->tenants[0].socket);
    kvl_sidecar_run(sidecar);
    running = NULL;
    kvl_sidecar_destroy(sidecar);
    return KVL_OK;
}

static kvl_status configure(arguments *wanted, kvl_error *error)
{
    if (wanted->file == NULL) wanted->file = getenv("KVLOOM_CONFIG");
    if (wanted->file != NULL) KVL_TRY(kvl_config_load(&wanted->config, wanted->file, error));
    return kvl_config_take_environment(&wanted->config, error);
}

/* What the configuration says, or the sidecar itself. */
static kvl_status run(arguments *wanted, kvl_error *error)
{
    kvl_sidecar_options sidecar;
    if (wanted->prints) {
        if (wanted->config.n_tenants == 0) wanted->config.n_tenants = 1;
        kvl_config_print(&wanted->config, stdout);
        return KVL_OK;
    }
    KVL_TRY(kvl_config_resolve(&wanted->config, &sidecar, error));
    if (!wanted->checks) return serve(&sidecar, error);
    (void)printf("the configuration is right: %zu tenants, %zu peers\n", sidecar.n_tenants,
                 sidecar.n_peers);
    return KVL_OK;
}

int kvl_command_sidecar(int argc, char **argv)
{
    static const struct argp argp = {
        options, parse, NULL, "Keep and exchange segments for engines in other processes.",
        NULL,    NULL,  NULL};
    static arguments wanted = {.is_file_pass = true};
    kvl_error error;
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    kvl_status status = configure(&wanted, &error);
    wanted.is_file_pass = false;
    if (status == KVL_OK && argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0)
        return KVL_EXIT_USAGE;
    if (status == KVL_OK && wanted.with_parent) (void)prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (status == KVL_OK) status = run(&wanted, &error);
    kvl_config_deinit(&wanted.config);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
