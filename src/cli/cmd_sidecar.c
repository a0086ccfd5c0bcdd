/* cli/cmd_sidecar.c: `kvloom sidecar`: keeps and exchanges segments for engines in other processes,
 * until SIGTERM. */
#include "base/alloc.h"
#include "base/file.h"
#include "base/log.h"
#include "base/units.h"
#include "cli/cli.h"
#include "kvloom.h"
#include "sidecar/sidecar.h"

#include <argp.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>

enum {
    OPTION_SOCKET = 256,
    OPTION_KEY,
    OPTION_MEMORY,
    OPTION_DISK,
    OPTION_FINGERPRINT,
    OPTION_LEASE,
    OPTION_NOT_DURABLE,
    OPTION_WITH_PARENT,
    OPTION_CURVE,
    OPTION_ALLOW,
    OPTION_PEER_KEY,
};

typedef struct arguments {
    kvl_sidecar_options sidecar;
    kvl_sidecar_tenant tenant;
    kvl_exchange_peer peers[KVL_PEERS_MAX];
    uint8_t key[KVL_TENANT_KEY_LENGTH];
    const char *key_file, *curve_file;
    kvl_key_pair keys;
    bool has_model, with_parent;
} arguments;

static const struct argp_option options[] = {
    {"name", 'n', "NAME", 0, "Name among its peers (sidecar)", 0},
    {"socket", OPTION_SOCKET, "PATH", 0, "Where clients on this machine connect", 0},
    {"key-file", OPTION_KEY, "FILE", 0, "The tenant's key, 32 bytes", 0},
    {"model", 'm', "TEXT", 0, "Names the model, as kvloom_fingerprint does for its clients", 0},
    {"fingerprint", OPTION_FINGERPRINT, "HEX", 0, "The same as its 64 hexadecimal digits", 0},
    {"memory", OPTION_MEMORY, "SIZE", 0, "Most that is kept in memory (1GiB)", 0},
    {"store", 's', "DIR", 0, "Where segments are kept on disk; without it they are not", 0},
    {"disk", OPTION_DISK, "SIZE", 0, "Most that is kept on disk (8GiB)", 0},
    {"not-durable", OPTION_NOT_DURABLE, NULL, 0, "Answer puts before the disk has them for sure",
     0},
    {"lease", OPTION_LEASE, "TIME", 0, "Longest lease of a client (60s)", 0},
    {"listen", 'l', "ENDPOINT", 0, "Where peers dial: ipc:///path or tcp://127.0.0.1:port", 0},
    {"peer", 'p', "NAME=ENDPOINT", 0, "A peer; may be given many times", 0},
    {"curve-key", OPTION_CURVE, "FILE", 0, "Key pair of `kvloom keygen`, for tcp between machines",
     0},
    {"allow-list", OPTION_ALLOW, "FILE", 0, "Public keys that may connect; read again on SIGHUP",
     0},
    {"peer-key", OPTION_PEER_KEY, "NAME=KEY", 0, "Public key of a peer that was named before", 0},
    {"with-parent", OPTION_WITH_PARENT, NULL, 0, "End when the process that started this ends", 0},
    {0},
};

static uint64_t parse_bytes(const struct argp_state *state, const char *text)
{
    uint64_t n_bytes = 0;
    kvl_error error;
    if (kvl_bytes_from_text(text, &n_bytes, &error) < 0) argp_error(state, "%s", error.text);
    if (n_bytes == 0) argp_error(state, "a store needs room: '%s' is none", text);
    return n_bytes;
}

static uint32_t parse_ms(const struct argp_state *state, const char *text)
{
    int64_t duration_ns = 0;
    kvl_error error;
    if (kvl_duration_from_text(text, &duration_ns, &error) < 0) argp_error(state, "%s", error.text);
    const int64_t duration_ms = duration_ns / KVL_NS_PER_MS;
    if (duration_ms < 1 || duration_ms > INT32_MAX)
        argp_error(state, "a lease of '%s' is not possible", text);
    return (uint32_t)duration_ms;
}

static void add_peer(arguments *wanted, char *text, const struct argp_state *state)
{
    char *separator = strchr(text, '=');
    if (separator == NULL || separator == text || separator[1] == '\0') {
        argp_error(state, "--peer is '%s'; it must be NAME=ENDPOINT", text);
        return;
    }
    if (wanted->sidecar.n_peers == KVL_PEERS_MAX)
        argp_error(state, "at most %u peers", KVL_PEERS_MAX);
    *separator = '\0';
    wanted->peers[wanted->sidecar.n_peers++] =
        (kvl_exchange_peer){.name = text, .endpoint = separator + 1};
}

static void set_peer_key(arguments *wanted, char *text, const struct argp_state *state)
{
    char *separator = strchr(text, '=');
    if (separator == NULL) {
        argp_error(state, "--peer-key is '%s'; it must be NAME=KEY", text);
        return;
    }
    *separator = '\0';
    for (size_t i = 0; i < wanted->sidecar.n_peers; i++) {
        if (strcmp(wanted->peers[i].name, text) != 0) continue;
        wanted->peers[i].public_key = separator + 1;
        return;
    }
    argp_error(state, "--peer-key names '%s', which no --peer before it does", text);
}

static void set_model(arguments *wanted, const char *text)
{
    const kvloom_digest digest = kvloom_fingerprint(text, strlen(text));
    memcpy(wanted->sidecar.fingerprint.bytes, digest.bytes, sizeof digest.bytes);
    wanted->has_model = true;
}

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    kvl_sidecar_tenant *tenant = &wanted->tenant;
    switch (key) {
    case 'n': wanted->sidecar.name = text; return 0;
    case OPTION_SOCKET: tenant->socket = text; return 0;
    case OPTION_KEY: wanted->key_file = text; return 0;
    case 'm': set_model(wanted, text); return 0;
    case OPTION_FINGERPRINT:
        if (kvl_digest_from_text(text, &wanted->sidecar.fingerprint) < 0)
            argp_error(state, "--fingerprint must be 64 hexadecimal digits");
        wanted->has_model = true;
        return 0;
    case OPTION_MEMORY: tenant->memory_bytes_max = parse_bytes(state, text); return 0;
    case 's': tenant->store_path = text; return 0;
    case OPTION_DISK: tenant->disk_bytes_max = parse_bytes(state, text); return 0;
    case OPTION_NOT_DURABLE: tenant->is_durable = false; return 0;
    case OPTION_LEASE: wanted->sidecar.lease_ms_max = parse_ms(state, text); return 0;
    case 'l': wanted->sidecar.endpoint = text; return 0;
    case 'p': add_peer(wanted, text, state); return 0;
    case OPTION_CURVE: wanted->curve_file = text; return 0;
    case OPTION_ALLOW: wanted->sidecar.allow_list = text; return 0;
    case OPTION_PEER_KEY: set_peer_key(wanted, text, state); return 0;
    case OPTION_WITH_PARENT: wanted->with_parent = true; return 0;
    case ARGP_KEY_END:
        if (tenant->socket == NULL || wanted->key_file == NULL || !wanted->has_model)
            argp_error(state, "--socket, --key-file and --model are needed");
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static kvl_status read_key(const char *path, uint8_t *key, kvl_error *error)
{
    char *bytes = NULL;
    size_t n_bytes = 0;
    KVL_TRY(kvl_file_read(path, KVL_TENANT_KEY_LENGTH, &bytes, &n_bytes, error));
    if (n_bytes == KVL_TENANT_KEY_LENGTH) memcpy(key, bytes, n_bytes);
    kvl_free(bytes);
    if (n_bytes != KVL_TENANT_KEY_LENGTH)
        return KVL_FAIL(error, KVL_ERR_INVALID, "%s has %zu bytes; a tenant's key has %u", path,
                        n_bytes, KVL_TENANT_KEY_LENGTH);
    return KVL_OK;
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

static kvl_status serve(arguments *wanted, kvl_error *error)
{
    KVL_TRY(read_key(wanted->key_file, wanted->key, error));
    wanted->tenant.key = wanted->key;
    wanted->sidecar.tenants = &wanted->tenant;
    wanted->sidecar.n_tenants = 1;
    wanted->sidecar.peers = wanted->peers;
    wanted->sidecar.clock = kvl_clock_system();
    if (wanted->curve_file != NULL) {
        KVL_TRY(kvl_key_pair_read(wanted->curve_file, &wanted->keys, error));
        wanted->sidecar.keys = &wanted->keys;
    }
    kvl_sidecar *sidecar = NULL;
    KVL_TRY(kvl_sidecar_create(&wanted->sidecar, &sidecar, error));
    running = sidecar;
    handle_signals();
    kvl_log(KVL_LOG_INFO, "sidecar_ready", "socket=%s", wanted->tenant.socket);
    kvl_sidecar_run(sidecar);
    running = NULL;
    kvl_sidecar_destroy(sidecar);
    return KVL_OK;
}

int kvl_command_sidecar(int argc, char **argv)
{
    static const struct argp argp = {
        options, parse, NULL, "Keep and exchange segments for engines in other processes.",
        NULL,    NULL,  NULL};
    arguments wanted = {
        .sidecar = {.name = "sidecar"},
        .tenant = {.name = "default",
                   .memory_bytes_max = UINT64_C(1) << 30,
                   .disk_bytes_max = UINT64_C(8) << 30,
                   .is_durable = true},
    };
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    if (wanted.with_parent) (void)prctl(PR_SET_PDEATHSIG, SIGTERM);
    kvl_error error;
    const kvl_status status = serve(&wanted, &error);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
