/* host/host.h: one agent host: an engine, a store, anchors and an exchange, run by tasks.
 *
 * Tasks come from clients over the exchange (proto/host.proto) and are done one after another by
 * the engine thread, those that save most first (host/order.h); a full queue is answered with
 * KVL_ERR_BUSY. Threads  kvl_host_run takes the
 * calling thread as the engine thread. */
#ifndef KVL_HOST_HOST_H
#define KVL_HOST_HOST_H

#include "exchange/exchange.h"
#include "host/service.h"

#define KVL_TENANT_KEY_BYTES 32u
/* Tasks that wait in order; as many more may come while one runs. */
#define KVL_HOST_TASKS_MAX 16u

typedef struct kvl_host_options {
    const char *name;
    const char *endpoint;
    const kvl_exchange_peer *peers;
    size_t n_peers;
    const char *store_path;    /* directory of the LMDB store */
    uint64_t store_bytes_max;  /* of the LMDB tier */
    uint64_t memory_bytes_max; /* of the memory tier */
    kvl_engine_options engine;
    kvl_anchor_options anchors;
    kvl_kv_dtype segment_dtype; /* of segments that this host publishes */
    double heal_share;          /* of the engine's time for healing while others wait; 0 .. 0.9 */
    /* With a service (host/service.h) its answers and this host's tasks share the engine thread:
     * a task runs between two steps. NULL: none. */
    const kvl_scheduler_options *scheduler;
    bool in_order; /* tasks go as they come; false: those first that save most (order.h) */
    bool donors;   /* kept and used where a task names a collection and says no more */
    uint64_t donor_bytes_max; /* of donors on disk, a quarter of memory_bytes_max of it in memory
                                 as well; 0: there are none */
    double audit_share;       /* of reused requests that are computed in full when idle; 0 .. 1 */
    /* Called on the engine thread with the text of each token of an answer as it is drawn, may be
     * NULL: for a program that has a host of its own. Not for full runs, nor for verified and
     * gated ones, whose tokens are not final yet. The bytes may end inside of a character. */
    void (*stream)(void *context, const char *bytes, size_t n_bytes);
    void *stream_context;
    uint8_t tenant_key[KVL_TENANT_KEY_BYTES];
} kvl_host_options;

/* 4 GiB of store, 1 GiB of memory and 1 GiB of donors, int8 segments; 5 % are audited, and
 * healing has 10 % of the time beside other work; donors are on where a task names a collection
 * (docs/rag.md says what they gave). */
kvl_host_options kvl_host_default_options(void);

typedef struct kvl_host kvl_host;

/* Opens model, store and exchange, and loads the anchors that the store has.
 * Owns     *host: ended with kvl_host_destroy
 * Errors   those of kvl_engine_create, kvl_lmdb_tier_create and kvl_exchange_start */
KVL_MUST_USE kvl_status kvl_host_create(const kvl_host_options *options, kvl_host **host,
                                        kvl_error *error);
void kvl_host_destroy(kvl_host *host);

/* Borrowed until the host is destroyed; it is immutable, for any thread. */
const kvl_model *kvl_host_model(const kvl_host *host);

/* NULL where the options asked for none. */
kvl_service *kvl_host_service(kvl_host *host);

/* What this host has healed, gated and audited, as Prometheus text 0.0.4. Any thread.
 * Owns     the text: ended with kvl_free; NULL without memory */
char *kvl_host_metrics_text(kvl_host *host);

#define KVL_HOST_PEERS_SHOWN 64u
#define KVL_HOST_ACTIONS_MAX 8u

/* What audits have found where one action had most of a prompt, over all workflows. */
typedef struct kvl_host_audit {
    const char *action; /* static text */
    uint64_t n;         /* audits */
    double kl;          /* mean KL(full || reuse), nats */
    double top1;        /* share of tokens that exact KV would have given too */
} kvl_host_audit;

/* A host at a glance: what its last work has left. */
typedef struct kvl_host_figures {
    uint64_t n_healed, n_heals_waiting, n_audited;
    uint32_t n_anchors;
    uint64_t anchor_bytes;
    kvl_host_audit audits[KVL_HOST_ACTIONS_MAX]; /* [n_audits] */
    uint32_t n_audits;
    struct {
        char name[64]; /* cut where it is longer */
        bool is_up;
    } peers[KVL_HOST_PEERS_SHOWN]; /* [n_peers] */
    uint32_t n_peers;
} kvl_host_figures;

/* Any thread. */
void kvl_host_figures_read(kvl_host *host, kvl_host_figures *figures);

/* Does tasks until a client's stop task or kvl_host_stop. */
void kvl_host_run(kvl_host *host);
/* Ends kvl_host_run after the task that runs. Any thread. */
void kvl_host_stop(kvl_host *host);

#endif /* KVL_HOST_HOST_H */
