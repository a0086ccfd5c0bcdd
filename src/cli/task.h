/* cli/task.h: what commands that give tasks to hosts share: the call, and a host of their own.
 * Threads  One thread at a time. */
#ifndef KVL_CLI_TASK_H
#define KVL_CLI_TASK_H

#include "cli/cli.h"
#include "exchange/exchange.h"
#include "host.pb-c.h"

/* Cuts NAME=ENDPOINT, which stays with the caller, at its sign. Ends in argp_error where that is
 * not what the text is. */
kvl_exchange_peer kvl_cli_peer(char *text, const char *option, const struct argp_state *state);

/* A client of one host, which is waited for. One that does not come is no error here: a call then
 * says why.
 * Owns     *exchange: ended with kvl_exchange_stop
 * Errors   those of kvl_exchange_start */
KVL_MUST_USE kvl_status kvl_cli_dial_host(const char *own_name, const kvl_exchange_peer *host,
                                          int64_t wait_s, kvl_exchange **exchange,
                                          kvl_error *error);

/* Sends a task and unpacks the reply.
 * Owns     *reply: ended with kvloom__v1__host_reply__free_unpacked; NULL after an error
 * Errors   those of kvl_exchange_call; KVL_ERR_MALFORMED, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_cli_call(kvl_exchange *exchange, const char *host,
                                     const Kvloom__V1__HostTask *task, int64_t timeout_s,
                                     Kvloom__V1__HostReply **reply, kvl_error *error);

/* Sends a run and takes its reply out of the envelope; ended with
 * kvloom__v1__run_reply__free_unpacked. Errors as above. */
KVL_MUST_USE kvl_status kvl_cli_call_run(kvl_exchange *exchange, const char *host,
                                         Kvloom__V1__RunTask *run, int64_t timeout_s,
                                         Kvloom__V1__RunReply **reply, kvl_error *error);

/* A host in a thread of this process and its client. */
typedef struct kvl_local_host kvl_local_host;

typedef struct kvl_local_host_options {
    const kvl_cli_engine *engine;
    const char *store_path;                     /* NULL: a store that goes when the host stops */
    const uint8_t *tenant_key;                  /* NULL: one that nobody will know again */
    uint64_t store_bytes_max, memory_bytes_max; /* 0: a host's default */
    uint32_t n_pages;                           /* likewise */
    bool in_order;                              /* as in kvl_host_options */
    double heal_share;                          /* likewise */
    /* As in kvl_host_options; on the host's thread. May be NULL. */
    void (*stream)(void *context, const char *bytes, size_t n_bytes);
    void *stream_context;
} kvl_local_host_options;

/* Owns     *host: ended with kvl_local_host_stop
 * Errors   as kvl_local_host_start */
KVL_MUST_USE kvl_status kvl_local_host_open(const kvl_local_host_options *options,
                                            kvl_local_host **host, kvl_error *error);
/* Borrowed until the host is stopped. */
const kvl_model *kvl_local_host_model(const kvl_local_host *host);
/* Any other task; ended with kvloom__v1__host_reply__free_unpacked. */
KVL_MUST_USE kvl_status kvl_local_host_do(kvl_local_host *host, const Kvloom__V1__HostTask *task,
                                          Kvloom__V1__HostReply **reply, kvl_error *error);

/* The same with a store of its own, everything else by default. */

/* Owns     *host: ended with kvl_local_host_stop
 * Errors   those of kvl_host_create; KVL_ERR_IO (no temporary directory, no thread) */
KVL_MUST_USE kvl_status kvl_local_host_start(const kvl_cli_engine *engine, kvl_local_host **host,
                                             kvl_error *error);
void kvl_local_host_stop(kvl_local_host *host);
KVL_MUST_USE kvl_status kvl_local_host_run(kvl_local_host *host, Kvloom__V1__RunTask *run,
                                           Kvloom__V1__RunReply **reply, kvl_error *error);

/* Where the texts of demo and evaluation are: KVLOOM_DATA, the source tree of this build, or the
 * place of an installation. */
const char *kvl_cli_data_directory(void);

#endif /* KVL_CLI_TASK_H */
