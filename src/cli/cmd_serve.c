/* cli/cmd_serve.c: `kvloom serve`: one agent host, or a server for OpenAI's clients, or both on one
 * engine, until it is told to stop or gets SIGTERM. */
#include "base/alloc.h"
#include "base/file.h"
#include "base/log.h"
#include "cli/cli.h"
#include "cli/task.h"
#include "host/host.h"
#include "host/kv_events.h"
#include "http/http.h"

#include <argp.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>

enum {
    OPTION_KEY = 256,
    OPTION_STORE_MB,
    OPTION_MEMORY_MB,
    OPTION_DONORS_MB,
    OPTION_WITH_PARENT,
    OPTION_PAPER,
    OPTION_PAGES,
    OPTION_HTTP,
    OPTION_API_KEYS,
    OPTION_SERVED_NAME,
    OPTION_TLS_CERTIFICATE,
    OPTION_TLS_KEY,
    OPTION_ANSWERS,
    OPTION_WAITING,
    OPTION_STEP_ROWS,
    OPTION_AUDIT,
    OPTION_HEAL_SHARE,
    OPTION_ORDER,
    OPTION_DATA,
    OPTION_QUALITY,
    OPTION_KV_EVENTS,
    OPTION_KV_EVENTS_REPLAY,
    OPTION_KV_EVENTS_TOPIC,
    OPTION_FILES_MB
};

typedef struct arguments {
    kvl_cli_engine engine;
    kvl_host_options host;
    kvl_exchange_peer peers[KVL_PEERS_MAX];
    const char *key_file;
    kvl_http_options http;        /* address NULL: none */
    kvl_kv_events_options events; /* endpoint NULL: none */
    kvl_scheduler_options scheduler;
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
    {"donors-mb", OPTION_DONORS_MB, "N", 0,
     "Most that is kept of texts as they stood in exact prompts; 0: nothing (1024)", 0},
    {"pages", OPTION_PAGES, "N", 0, "Pages of 16 tokens of KV (three contexts)", 0},
    {"http", OPTION_HTTP, "ADDRESS", 0,
     "Serve OpenAI's API at 127.0.0.1:PORT, [::1]:PORT or unix:/PATH; the options above are then "
     "needed only to exchange with peers",
     0},
    {"api-keys", OPTION_API_KEYS, "FILE", 0, "Lines 'TENANT KEY'; needed beyond loopback", 0},
    {"tls-certificate", OPTION_TLS_CERTIFICATE, "FILE", 0,
     "PEM, with its chain: HTTPS instead of HTTP; needs --tls-key", 0},
    {"tls-key", OPTION_TLS_KEY, "FILE", 0, "PEM; only its owner may read it", 0},
    {"served-name", OPTION_SERVED_NAME, "NAME", 0, "What the API calls the model (--model)", 0},
    {"quality", OPTION_QUALITY, "NAME", 0,
     "How chats that name none may reuse texts: exact (default), balanced, fast, verified, healed",
     0},
    {"kv-events", OPTION_KV_EVENTS, "ENDPOINT", 0,
     "Tell routers what is cached, as vLLM does: ipc:///PATH or tcp://127.0.0.1:PORT", 0},
    {"kv-events-replay", OPTION_KV_EVENTS_REPLAY, "ENDPOINT", 0, "Answer those who missed some", 0},
    {"kv-events-topic", OPTION_KV_EVENTS_TOPIC, "TEXT", 0, "First frame of every event (empty)", 0},
    {"data", OPTION_DATA, "DIR", 0,
     "Keep clients' files and batches there: /v1/files and /v1/batches", 0},
    {"files-mb", OPTION_FILES_MB, "N", 0, "Most that a tenant's files may have (1024)", 0},
    {"answers", OPTION_ANSWERS, "N", 0, "Answers that are computed at once (64)", 0},
    {"waiting", OPTION_WAITING, "N", 0, "Requests that may wait; more are told to come again (256)",
     0},
    {"step-rows", OPTION_STEP_ROWS, "N", 0, "Tokens of one step while anybody decodes (256)", 0},
    {"audit", OPTION_AUDIT, "PERCENT", 0,
     "Share of reused requests that are computed in full when idle, to learn what reuse costs (5)",
     0},
    {"heal-share", OPTION_HEAL_SHARE, "PERCENT", 0,
     "Share of the engine's time for healing while others wait; idle, it has all (10)", 0},
    {"order", OPTION_ORDER, "ORDER", 0,
     "cache: those that wait and have most of their prompt here go first; arrival: as they come "
     "(cache)",
     0},
    {"paper-anchors", OPTION_PAPER, NULL, 0, "Match anchors as the KVCOMM paper does", 0},
    {"with-parent", OPTION_WITH_PARENT, NULL, 0, "End when the process that started this ends", 0},
    {0},
};

static void add_peer(arguments *wanted, char *text, const struct argp_state *state)
{
    if (wanted->host.n_peers == KVL_PEERS_MAX) {
        argp_error(state, "at most %u peers", KVL_PEERS_MAX);
        return;
    }
    wanted->peers[wanted->host.n_peers++] = kvl_cli_peer(text, "--peer", state);
}

/* Whether anything was asked for that only a host with peers and a store has. */
static bool is_host(const arguments *wanted)
{
    const kvl_host_options *host = &wanted->host;
    return host->name != NULL || host->endpoint != NULL || host->store_path != NULL ||
           wanted->key_file != NULL || host->n_peers > 0;
}

/* What needs something else that was not asked for. */
static void check_together(const arguments *wanted, const struct argp_state *state)
{
    if (wanted->events.endpoint != NULL && wanted->http.address == NULL)
        argp_error(state, "--kv-events needs --http");
    if (wanted->events.endpoint == NULL && wanted->events.replay_endpoint != NULL)
        argp_error(state, "--kv-events-replay needs --kv-events");
    if (is_host(wanted) || wanted->http.address == NULL) {
        if (wanted->host.name == NULL || wanted->host.endpoint == NULL ||
            wanted->host.store_path == NULL || wanted->key_file == NULL)
            argp_error(state, "--name, --listen, --store and --key-file are needed, or --http "
                              "alone");
    }
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
    case OPTION_DONORS_MB:
        host->donor_bytes_max = (uint64_t)kvl_cli_number(state, "--donors-mb", text, 0, 1 << 24)
                                << 20;
        return 0;
    case OPTION_PAGES:
        host->engine.n_pages = kvl_cli_number(state, "--pages", text, 16, 1 << 24);
        return 0;
    case OPTION_HTTP: wanted->http.address = text; return 0;
    case OPTION_API_KEYS: wanted->http.keys_file = text; return 0;
    case OPTION_TLS_CERTIFICATE: wanted->http.certificate_file = text; return 0;
    case OPTION_TLS_KEY: wanted->http.certificate_key_file = text; return 0;
    case OPTION_SERVED_NAME: wanted->http.model_name = text; return 0;
    case OPTION_KV_EVENTS: wanted->events.endpoint = text; return 0;
    case OPTION_KV_EVENTS_REPLAY: wanted->events.replay_endpoint = text; return 0;
    case OPTION_KV_EVENTS_TOPIC: wanted->events.topic = text; return 0;
    case OPTION_QUALITY: wanted->http.quality = text; return 0;
    case OPTION_DATA: wanted->http.data_path = text; return 0;
    case OPTION_FILES_MB:
        wanted->http.tenant_bytes_max =
            (uint64_t)kvl_cli_number(state, "--files-mb", text, 1, 1 << 24) << 20;
        return 0;
    case OPTION_ANSWERS:
        wanted->scheduler.n_running_max = kvl_cli_number(state, "--answers", text, 1, 512);
        return 0;
    case OPTION_WAITING:
        wanted->scheduler.n_waiting_max = kvl_cli_number(state, "--waiting", text, 1, 1 << 16);
        return 0;
    case OPTION_STEP_ROWS:
        wanted->scheduler.n_step_rows =
            kvl_cli_number(state, "--step-rows", text, 1, KVL_FORWARD_ROWS_MAX);
        return 0;
    case OPTION_AUDIT:
        host->audit_share = kvl_cli_number(state, "--audit", text, 0, 100) / 100.0;
        return 0;
    case OPTION_HEAL_SHARE:
        host->heal_share = kvl_cli_number(state, "--heal-share", text, 0, 90) / 100.0;
        return 0;
    case OPTION_ORDER:
        if (strcmp(text, "cache") != 0 && strcmp(text, "arrival") != 0)
            argp_error(state, "--order is '%s'; it must be cache or arrival", text);
        host->in_order = wanted->scheduler.in_order = strcmp(text, "arrival") == 0;
        return 0;
    case OPTION_PAPER: host->anchors.mode = KVL_ANCHOR_PAPER; return 0;
    case OPTION_WITH_PARENT: wanted->with_parent = true; return 0;
    case ARGP_KEY_END: check_together(wanted, state); return 0;
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

/* What a signal stops: whichever of the two is there. */
typedef struct stopped {
    kvl_host *host;
    kvl_service *service;
} stopped;

/* Posted by the handler, which may do nothing else; and at the end, so that the waiter ends too. */
static sem_t signalled;

static void handle_signal(int number)
{
    (void)number;
    (void)sem_post(&signalled);
}

/* Handlers, and not a blocked set: OpenBLAS starts threads of its own before main, which block
 * nothing, and a signal that one of them gets would end the process. */
static void install_handlers(void)
{
    struct sigaction action = {.sa_handler = handle_signal, .sa_flags = SA_RESTART};
    (void)sem_init(&signalled, 0, 0);
    (void)sigemptyset(&action.sa_mask);
    (void)sigaction(SIGTERM, &action, NULL);
    (void)sigaction(SIGINT, &action, NULL);
}

static void *wait_for_signal(void *argument)
{
    const stopped *waited = argument;
    while (sem_wait(&signalled) != 0) continue;
    if (waited->host != NULL) {
        kvl_host_stop(waited->host);
    } else {
        kvl_service_stop(waited->service);
    }
    return NULL;
}

/* Nothing where no events were asked for. */
static kvl_status start_events(arguments *wanted, const kvl_service *service,
                               kvl_kv_events **events, kvl_error *error)
{
    if (wanted->events.endpoint == NULL) return KVL_OK;
    const kvl_engine *engine = kvl_service_engine(service);
    wanted->events.medium = kvl_engine_loads(engine) ? "CPU" : "GPU";
    return kvl_kv_events_start(&wanted->events, engine->tree, events, error);
}

/* Serves until it is told to stop; host or service is there and ready. */
static kvl_status run(arguments *wanted, stopped *waited, kvl_error *error)
{
    kvl_http *http = NULL;
    kvl_kv_events *events = NULL;
    if (wanted->http.address != NULL) {
        kvl_service *service =
            waited->host != NULL ? kvl_host_service(waited->host) : waited->service;
        wanted->http.host = waited->host;
        KVL_TRY(start_events(wanted, service, &events, error));
        const kvl_status status = kvl_http_start(&wanted->http, service, &http, error);
        if (status != KVL_OK) {
            kvl_kv_events_stop(events);
            return status;
        }
        /* A script may have asked for any free port: it reads here which it got. */
        (void)printf("listening at %s\n", kvl_http_address(http));
        (void)fflush(stdout);
    }
    pthread_t waiter;
    if (pthread_create(&waiter, NULL, wait_for_signal, waited) != 0) {
        kvl_http_stop(http);
        kvl_kv_events_stop(events);
        return KVL_FAIL(error, KVL_ERR_IO, "cannot start a thread");
    }
    if (waited->host != NULL) {
        kvl_log(KVL_LOG_INFO, "host_ready", "endpoint=%s", wanted->host.endpoint);
        kvl_host_run(waited->host);
    } else {
        kvl_service_run(waited->service);
    }
    (void)sem_post(&signalled);
    (void)pthread_join(waiter, NULL);
    kvl_http_stop(http);
    kvl_kv_events_stop(events);
    return KVL_OK;
}

static kvl_status serve_host(arguments *wanted, stopped *waited, kvl_error *error)
{
    KVL_TRY(read_key(wanted->key_file, wanted->host.tenant_key, error));
    wanted->host.peers = wanted->peers;
    if (wanted->http.address != NULL) wanted->host.scheduler = &wanted->scheduler;
    KVL_TRY(kvl_host_create(&wanted->host, &waited->host, error));
    const kvl_status status = run(wanted, waited, error);
    kvl_host_destroy(waited->host);
    return status;
}

static kvl_status serve_http(arguments *wanted, stopped *waited, kvl_error *error)
{
    kvl_engine *engine = NULL;
    KVL_TRY(kvl_engine_create(&wanted->host.engine, &engine, error));
    kvl_status status = kvl_service_create(engine, &wanted->scheduler, &waited->service, error);
    if (status == KVL_OK) status = run(wanted, waited, error);
    kvl_service_destroy(waited->service);
    kvl_engine_destroy(engine);
    return status;
}

static kvl_status serve(arguments *wanted, stopped *waited, kvl_error *error)
{
    char path[PATH_MAX];
    char name[KVL_MODEL_NAME_MAX];
    const char *model = wanted->engine.model == NULL ? "smollm2-135m" : wanted->engine.model;
    KVL_TRY(kvl_models_find(model, path, error));
    kvl_cli_name_model(model, name);
    if (wanted->http.model_name == NULL) wanted->http.model_name = name;
    wanted->host.engine.model_path = path;
    wanted->host.engine.n_threads = wanted->engine.n_threads;
    wanted->host.engine.n_positions = wanted->engine.n_positions;
    wanted->host.engine.device = kvl_cli_device(&wanted->engine);
    wanted->host.engine.variant = wanted->engine.variant;
    return is_host(wanted) ? serve_host(wanted, waited, error) : serve_http(wanted, waited, error);
}

int kvl_command_serve(int argc, char **argv)
{
    static const struct argp_child children[] = {{&kvl_cli_engine_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {options,  parse, NULL, "Run one agent host.",
                                     children, NULL,  NULL};
    arguments wanted = {.host = kvl_host_default_options()};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    if (wanted.with_parent) (void)prctl(PR_SET_PDEATHSIG, SIGTERM);
    stopped waited = {0};
    install_handlers();
    kvl_error error;
    const kvl_status status = serve(&wanted, &waited, &error);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
