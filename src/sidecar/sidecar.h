/* sidecar/sidecar.h: a process without a model that keeps segments for the engines beside it:
 * memory, LMDB, peers, leases.
 *
 * Clients (kvloom.h) speak to it over a UNIX socket, one for each tenant: whoever may open the
 * socket is the tenant, so the file system decides. A tenant has its own key, its own memory and
 * its own database; nothing that one tenant does evicts, names or times what another one has.
 *
 * A get gives the client a sealed descriptor of the very memory that holds the segment. A lease
 * keeps it there until the client releases it, it expires, or the client is gone; it is never more
 * than that: a client that still reads afterwards reads memory of its own.
 * Threads  kvl_sidecar_run is one thread: sockets, memory tier, leases. Disk and large copies are
 * on
 *          worker threads, peers on the exchange's own. kvl_sidecar_stop may be called from any. */
#ifndef KVL_SIDECAR_SIDECAR_H
#define KVL_SIDECAR_SIDECAR_H

#include "exchange/exchange.h"

#include <sys/types.h>

#define KVL_SIDECAR_TENANTS_MAX 64u
#define KVL_SIDECAR_CLIENTS_MAX 4096u
#define KVL_SIDECAR_LEASES_MAX 65536u
#define KVL_SIDECAR_LEASES_PER_CLIENT 1024u
#define KVL_SIDECAR_LEASE_MS_MAX 60000u
/* Requests of one client that wait for disk or peers; more are KVL_ERR_BUSY. */
#define KVL_SIDECAR_WAITING_PER_CLIENT 64u
/* Segments that are being loaded at a time, of all clients. */
#define KVL_SIDECAR_LOADS_MAX 1024u
#define KVL_SIDECAR_JOBS_MAX 1024u
#define KVL_SIDECAR_WORKERS_MAX 16u
#define KVL_TENANT_KEY_LENGTH 32u

typedef struct kvl_sidecar_tenant {
    const char *name;
    const char *socket;        /* path */
    mode_t socket_mode;        /* 0: 0600 */
    const uint8_t *key;        /* [KVL_TENANT_KEY_LENGTH] */
    uint64_t memory_bytes_max; /* > 0 */
    kvl_policy_kind policy;    /* which container of a full memory goes first */
    const char *store_path;    /* NULL: no disk */
    uint64_t disk_bytes_max;   /* > 0 with a disk */
    bool seals_disk; /* what is on disk is encrypted under a key that follows from `key` */
    bool is_durable; /* a put is answered when it would survive a power cut */
} kvl_sidecar_tenant;

typedef struct kvl_sidecar_options {
    const char *name;
    kvl_digest fingerprint; /* of the model whose KV is kept */
    const kvl_sidecar_tenant *tenants;
    size_t n_tenants;               /* 1 .. KVL_SIDECAR_TENANTS_MAX */
    const char *endpoint;           /* where peers dial; NULL: nobody can */
    const kvl_exchange_peer *peers; /* of the first tenant */
    size_t n_peers;
    const kvl_key_pair *keys; /* for CURVE over tcp; NULL: none; copied */
    const char *allow_list;   /* file of those who may dial over tcp with keys; NULL: nobody */
    uint32_t lease_ms_max;    /* 0: KVL_SIDECAR_LEASE_MS_MAX */
    uint32_t n_workers;       /* 0: 2 */
    const kvl_clock *clock;
} kvl_sidecar_options;

typedef struct kvl_sidecar kvl_sidecar;

/* Opens stores and sockets; from here on clients can connect, and are served by kvl_sidecar_run.
 * Containers of the whole process are made in memory that can be lent from now on.
 * Owns     *sidecar: ended with kvl_sidecar_destroy
 * Errors   those of the tiers, of kvl_exchange_start and of kvl_local_listen; KVL_ERR_INVALID */
KVL_MUST_USE kvl_status kvl_sidecar_create(const kvl_sidecar_options *options,
                                           kvl_sidecar **sidecar, kvl_error *error);
/* Serves until it is stopped. */
void kvl_sidecar_run(kvl_sidecar *sidecar);
/* Ends a run, or the next one. Puts that were begun are finished and answered. */
void kvl_sidecar_stop(kvl_sidecar *sidecar);
/* Reads the allow-list again, soon; whoever is not on it any more is disconnected. A list with a
 * mistake is logged, and the former one stays. From any thread or signal handler. */
void kvl_sidecar_reload(kvl_sidecar *sidecar);
/* NULL does nothing. */
void kvl_sidecar_destroy(kvl_sidecar *sidecar);

#endif /* KVL_SIDECAR_SIDECAR_H */
