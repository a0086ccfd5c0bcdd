/* cli/task.c: calls, and a host in a thread. */
#include "cli/task.h"

#include "base/alloc.h"
#include "base/file.h"
#include "base/random.h"
#include "host/host.h"

#include <argp.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { LOCAL_TIMEOUT_S = 600, UP_TIMEOUT_S = 30 };

kvl_exchange_peer kvl_cli_peer(char *text, const char *option, const struct argp_state *state)
{
    char *separator = strchr(text, '=');
    if (separator == NULL || separator == text || separator[1] == '\0') {
        argp_error(state, "%s is '%s'; it must be NAME=ENDPOINT", option, text);
        return (kvl_exchange_peer){0}; /* argp_error returns where errors do not end the program */
    }
    *separator = '\0';
    return (kvl_exchange_peer){.name = text, .endpoint = separator + 1};
}

kvl_status kvl_cli_dial_host(const char *own_name, const kvl_exchange_peer *host, int64_t wait_s,
                             kvl_exchange **exchange, kvl_error *error)
{
    const kvl_clock *clock = kvl_clock_system();
    const kvl_exchange_options options = {
        .name = own_name, .peers = host, .n_peers = 1, .clock = clock};
    KVL_TRY(kvl_exchange_start(&options, exchange, error));
    const int64_t deadline = kvl_clock_now(clock) + wait_s * KVL_NS_PER_S;
    while (!kvl_exchange_peer_is_up(*exchange, host->name) && kvl_clock_now(clock) < deadline) {
        const struct timespec pause = {0, 5 * KVL_NS_PER_MS};
        (void)nanosleep(&pause, NULL);
    }
    return KVL_OK;
}

kvl_status kvl_cli_call(kvl_exchange *exchange, const char *host, const Kvloom__V1__HostTask *task,
                        int64_t timeout_s, Kvloom__V1__HostReply **reply, kvl_error *error)
{
    *reply = NULL;
    const size_t n_bytes = kvloom__v1__host_task__get_packed_size(task);
    uint8_t *body = kvl_alloc(n_bytes);
    if (body == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a task");
    (void)kvloom__v1__host_task__pack(task, body);
    const int64_t deadline = kvl_clock_now(kvl_clock_system()) + timeout_s * KVL_NS_PER_S;
    void *answer = NULL;
    size_t n_answer = 0;
    const kvl_status status =
        kvl_exchange_call(exchange, host, body, n_bytes, deadline, &answer, &n_answer, error);
    kvl_free(body);
    if (status != KVL_OK) return status;
    *reply = kvloom__v1__host_reply__unpack(NULL, n_answer, answer);
    kvl_free(answer);
    if (*reply == NULL)
        return KVL_FAIL(error, KVL_ERR_MALFORMED, "the reply of %s cannot be read", host);
    return KVL_OK;
}

kvl_status kvl_cli_call_run(kvl_exchange *exchange, const char *host, Kvloom__V1__RunTask *run,
                            int64_t timeout_s, Kvloom__V1__RunReply **reply, kvl_error *error)
{
    *reply = NULL;
    Kvloom__V1__HostTask task = KVLOOM__V1__HOST_TASK__INIT;
    task.what_case = KVLOOM__V1__HOST_TASK__WHAT_RUN;
    task.run = run;
    Kvloom__V1__HostReply *envelope = NULL;
    KVL_TRY(kvl_cli_call(exchange, host, &task, timeout_s, &envelope, error));
    const bool is_run = envelope->what_case == KVLOOM__V1__HOST_REPLY__WHAT_RUN;
    if (is_run) {
        *reply = envelope->run;
        envelope->run = NULL;
        envelope->what_case = KVLOOM__V1__HOST_REPLY__WHAT__NOT_SET;
    }
    kvloom__v1__host_reply__free_unpacked(envelope, NULL);
    if (is_run) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_MALFORMED, "%s answered something else than a run", host);
}

struct kvl_local_host {
    char directory[64], endpoint[96], store[96], model[PATH_MAX];
    kvl_host *host;
    pthread_t thread;
    bool is_running;
    kvl_exchange *client;
};

static const char LOCAL_NAME[] = "local";

static void *run_host(void *host)
{
    kvl_host_run(host);
    return NULL;
}

static kvl_status open_host(kvl_local_host *local, const kvl_local_host_options *wanted,
                            kvl_error *error)
{
    const kvl_cli_engine *engine = wanted->engine;
    KVL_TRY(kvl_models_find(engine->model == NULL ? "smollm2-135m" : engine->model, local->model,
                            error));
    kvl_host_options options = kvl_host_default_options();
    options.name = LOCAL_NAME;
    options.endpoint = local->endpoint;
    options.store_path = wanted->store_path == NULL ? local->store : wanted->store_path;
    if (wanted->store_bytes_max > 0) options.store_bytes_max = wanted->store_bytes_max;
    if (wanted->memory_bytes_max > 0) options.memory_bytes_max = wanted->memory_bytes_max;
    options.stream = wanted->stream;
    options.stream_context = wanted->stream_context;
    options.engine = (kvl_engine_options){.model_path = local->model,
                                          .n_threads = engine->n_threads,
                                          .n_positions = engine->n_positions,
                                          .device = kvl_cli_device(engine),
                                          .variant = engine->variant};
    options.engine.n_pages = wanted->n_pages;
    options.in_order = wanted->in_order;
    options.heal_share = wanted->heal_share;
    options.audit_share = 0.0; /* it would compute beside what is measured */
    if (wanted->tenant_key != NULL)
        memcpy(options.tenant_key, wanted->tenant_key, sizeof options.tenant_key);
    else
        kvl_random_secret(options.tenant_key, sizeof options.tenant_key);
    KVL_TRY(kvl_host_create(&options, &local->host, error));
    if (pthread_create(&local->thread, NULL, run_host, local->host) != 0)
        return KVL_FAIL(error, KVL_ERR_IO, "cannot start a thread");
    local->is_running = true;
    return KVL_OK;
}

static kvl_status open_client(kvl_local_host *local, kvl_error *error)
{
    const kvl_exchange_peer peer = {.name = LOCAL_NAME, .endpoint = local->endpoint};
    KVL_TRY(kvl_cli_dial_host("client", &peer, UP_TIMEOUT_S, &local->client, error));
    if (kvl_exchange_peer_is_up(local->client, LOCAL_NAME)) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_TIMEOUT, "the host does not answer after %d s", UP_TIMEOUT_S);
}

kvl_status kvl_local_host_start(const kvl_cli_engine *engine, kvl_local_host **host,
                                kvl_error *error)
{
    const kvl_local_host_options options = {.engine = engine};
    return kvl_local_host_open(&options, host, error);
}

const kvl_model *kvl_local_host_model(const kvl_local_host *host)
{
    return kvl_host_model(host->host);
}

kvl_status kvl_local_host_do(kvl_local_host *host, const Kvloom__V1__HostTask *task,
                             Kvloom__V1__HostReply **reply, kvl_error *error)
{
    return kvl_cli_call(host->client, LOCAL_NAME, task, LOCAL_TIMEOUT_S, reply, error);
}

kvl_status kvl_local_host_open(const kvl_local_host_options *options, kvl_local_host **host,
                               kvl_error *error)
{
    *host = NULL;
    kvl_local_host *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a host");
    const kvl_status has_place =
        kvl_cli_temporary("local", made->directory, sizeof made->directory, error);
    if (has_place != KVL_OK) {
        kvl_free(made);
        return has_place;
    }
    (void)snprintf(made->endpoint, sizeof made->endpoint, "ipc://%s/host.sock", made->directory);
    (void)snprintf(made->store, sizeof made->store, "%s/store", made->directory);
    kvl_status status = open_host(made, options, error);
    if (status == KVL_OK) status = open_client(made, error);
    if (status != KVL_OK) {
        kvl_local_host_stop(made);
        return status;
    }
    *host = made;
    return KVL_OK;
}

void kvl_local_host_stop(kvl_local_host *host)
{
    if (host == NULL) return;
    kvl_exchange_stop(host->client);
    if (host->is_running) {
        kvl_host_stop(host->host);
        (void)pthread_join(host->thread, NULL);
    }
    kvl_host_destroy(host->host);
    kvl_error ignored;
    (void)!kvl_directory_remove(host->directory, &ignored);
    kvl_free(host);
}

kvl_status kvl_local_host_run(kvl_local_host *host, Kvloom__V1__RunTask *run,
                              Kvloom__V1__RunReply **reply, kvl_error *error)
{
    return kvl_cli_call_run(host->client, LOCAL_NAME, run, LOCAL_TIMEOUT_S, reply, error);
}

const char *kvl_cli_data_directory(void)
{
    const char *wanted = getenv("KVLOOM_DATA");
    if (wanted != NULL) return wanted;
    if (access(KVL_DATA_SOURCE "/workflow.json", R_OK) == 0) return KVL_DATA_SOURCE;
    return KVL_DATA_INSTALLED;
}
