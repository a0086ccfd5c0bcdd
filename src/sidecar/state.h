/* sidecar/state.h: what the parts of a sidecar know of one another. Private to sidecar.c (life and
 * loop), connection.c (clients), request.c (what they ask), load.c (from disk and peers), worker.c
 * (threads that may block), lease.c.
 *
 * Everything here belongs to the thread of kvl_sidecar_run, but what stands under `lock` and the
 * jobs that a worker has taken. */
#ifndef KVL_SIDECAR_STATE_H
#define KVL_SIDECAR_STATE_H

#include "base/queue.h"
#include "exchange/local.h"
#include "sidecar/sidecar.h"
#include "store/trace.h"

#include "local.pb-c.h"

#include <pthread.h>
#include <stdatomic.h>

#define SIDECAR_NAME_BYTES_MAX 31u
/* Containers from here on are memory that can be lent; below, they travel inside a message. */
#define SIDECAR_LENT_BYTES_MIN ((size_t)64 << 10)
#define SIDECAR_INSIDE_BYTES_MAX ((size_t)256 << 10)
#define SIDECAR_TICK_MS 100
/* Accesses that are kept for who records them: at 100,000 a second a tenth of a second and more. */
#define SIDECAR_ACCESSES 16384u
#define SIDECAR_ACCESSES_KEPT_NS (60 * KVL_NS_PER_S)

enum { PLACE_NOWHERE = 0, PLACE_MEMORY = 1, PLACE_DISK = 2, PLACE_PEER = 3 };

typedef struct tenant {
    char name[SIDECAR_NAME_BYTES_MAX + 1];
    char socket_path[128];
    int listen_fd;
    uint8_t key[KVL_TENANT_KEY_LENGTH];
    kvl_tier *memory, *disk; /* borrowed from `store`; disk may be NULL */
    kvl_tier *store;         /* both as one */
    uint64_t hits[4];        /* by place */
    uint64_t misses, puts, refused, leases_expired;
    uint32_t n_leases, n_clients;
    kvl_access_record *accesses; /* ring [SIDECAR_ACCESSES]; NULL: nobody wants to know */
    uint64_t last_access;        /* number of the latest; the first is 1 */
    int64_t accesses_wanted_ns;
} tenant;

/* One who holds a container in memory for a while. */
typedef struct lease {
    struct lease *before, *next; /* of the same client */
    uint64_t number;             /* 0: free */
    kvl_container *container;
    int64_t expires_ns;
    struct client *client;
} lease;

typedef struct client {
    uint32_t slot;
    uint64_t serial; /* unique among all clients of this process: a late answer finds nobody */
    kvl_local_link link;
    tenant *tenant;
    bool is_greeted;
    bool wants_to_write; /* as epoll knows */
    bool is_broken;      /* to be ended when its event has been handled */
    char name[SIDECAR_NAME_BYTES_MAX + 1];
    uint8_t key[KVL_TENANT_KEY_LENGTH]; /* the tenant's, narrowed by the salt */
    uint32_t n_waiting, n_leases;
    lease *leases;
} client;

/* A request that waits for a load. */
typedef struct waiter {
    struct waiter *next;
    uint32_t slot;
    uint64_t serial;
    uint64_t number;
    int64_t deadline_ns;
    uint32_t lease_ms;
    bool is_pin, by_layer;
    uint64_t lease; /* of a get by layer that has begun */
} waiter;

/* A container on its way into memory, from disk or from a peer; whoever wants it joins. */
typedef struct load {
    struct load *next;
    tenant *tenant;
    kvl_digest id;
    int64_t deadline_ns;
    waiter *waiters;
    bool from_peer;
    kvl_container *partial; /* a reference, while layers come in; NULL: none yet */
    uint32_t n_ready;
} load;

typedef enum job_kind {
    JOB_LOAD,     /* disk to memory */
    JOB_PUT,      /* blocks of a client to a container, to disk and memory */
    JOB_KEEP,     /* a container from a peer to disk */
    JOB_REMOVE,   /* from disk and memory */
    JOB_ANCHORS,  /* ids of the anchors of a slot */
    JOB_PROGRESS, /* of a fetch: never queued for a worker */
    JOB_FETCHED,  /* same */
} job_kind;

/* Work for a thread that may block, and its result on the way back. */
typedef struct job {
    struct job *next;
    kvl_sidecar *sidecar;
    job_kind kind;
    tenant *tenant;
    kvl_digest id;
    int64_t deadline_ns;
    /* of a request that is answered with this */
    uint32_t slot;
    uint64_t serial, number;
    /* put */
    kvl_container_info info;
    uint32_t *tokens; /* owned */
    uint8_t *extra; /* owned; of an anchor, or how the extra of those that are looked for begins */
    int fd;         /* owned; -1: none */
    bool write_back;
    /* result, and what JOB_KEEP keeps */
    kvl_status status;
    char text[KVL_ERROR_TEXT_MAX];
    kvl_container *container;
    uint32_t n_ready;
    struct found_anchor *anchors; /* owned */
    size_t n_anchors;
    bool has_more_anchors;
} job;

struct kvl_sidecar {
    char name[SIDECAR_NAME_BYTES_MAX + 1];
    kvl_digest fingerprint;
    uint64_t epoch;
    uint32_t lease_ms_max;
    const kvl_clock *clock;
    kvl_exchange *exchange; /* NULL: no peers */
    uint32_t n_tenants;
    tenant tenants[KVL_SIDECAR_TENANTS_MAX];

    int epoll_fd, wake_fd, spare_fd;
    _Atomic bool is_stopping, must_reload;
    kvl_allow_list *allow_list; /* NULL: none */
    client *clients[KVL_SIDECAR_CLIENTS_MAX];
    uint32_t n_clients, clients_past; /* slots in use are below clients_past */
    uint64_t last_serial;

    lease **lease_chunks; /* [n_lease_chunks][SIDECAR_LEASE_CHUNK]: leases never move */
    uint32_t n_lease_chunks, n_leases;
    uint64_t last_lease;
    load *loads;
    uint32_t n_loads;
    int64_t ticked_ns;

    kvl_queue *jobs;
    pthread_t workers[KVL_SIDECAR_WORKERS_MAX];
    uint32_t n_workers;

    pthread_mutex_t lock; /* guards what follows */
    job *done_first, *done_last;
};

#define SIDECAR_LEASE_CHUNK 64u

static inline int64_t sidecar_now(const kvl_sidecar *s)
{
    return kvl_clock_now(s->clock);
}

/* ---- sidecar.c ---- */

/* The client of a late answer; NULL where it has gone. */
client *sidecar_client_find(kvl_sidecar *s, uint32_t slot, uint64_t serial);

/* ---- connection.c ---- */

void sidecar_accept(kvl_sidecar *s, tenant *t);
/* Something arrived, or there is room to send again. May end the client. */
void sidecar_client_event(kvl_sidecar *s, client *c, uint32_t epoll_events);
void sidecar_client_end(kvl_sidecar *s, client *c);
/* Sends one reply; fd is borrowed, -1 for none. A client that does not read is broken by this. */
void sidecar_send(kvl_sidecar *s, client *c, const Kvloom__Local__V1__Reply *reply, int fd);
/* The answer to a request, by its number, that asked for a list. */
void sidecar_send_listed(kvl_sidecar *s, client *c, uint64_t number,
                         Kvloom__Local__V1__Listed *listed);
void sidecar_send_status(kvl_sidecar *s, client *c, uint64_t number, kvl_status status,
                         const char *format, ...) KVL_PRINTF(5, 6);

/* ---- request.c ---- */

/* A whole message; fd is taken, -1 for none. */
void sidecar_request(kvl_sidecar *s, client *c, const uint8_t *bytes, size_t n_bytes, int fd);
/* What a worker has done. Takes the job. */
void sidecar_job_done(kvl_sidecar *s, job *j);

/* ---- answer.c ---- */

/* Answers a get with the container, whole or as far as it is there, and with a lease on it. */
void sidecar_answer_got(kvl_sidecar *s, client *c, waiter *w, kvl_container *container,
                        uint32_t n_ready, int place);

/* ---- load.c ---- */

/* Starts or joins; takes the waiter, which may be NULL. Errors   KVL_ERR_BUSY, KVL_ERR_NO_MEMORY,
 * KVL_ERR_NOT_FOUND (no place to look at): the caller still has it */
KVL_MUST_USE kvl_status sidecar_load_start(kvl_sidecar *s, tenant *t, const kvl_digest *id,
                                           int64_t deadline_ns, waiter *w, kvl_error *error);
void sidecar_load_done(kvl_sidecar *s, job *j);
void sidecar_load_tick(kvl_sidecar *s, int64_t now_ns);
/* Nobody waits any more: the client is gone. */
void sidecar_load_forget(kvl_sidecar *s, const client *c);
void sidecar_load_end_all(kvl_sidecar *s);

/* ---- worker.c ---- */

KVL_MUST_USE kvl_status sidecar_workers_start(kvl_sidecar *s, uint32_t n, kvl_error *error);
/* Finishes what was begun. */
void sidecar_workers_stop(kvl_sidecar *s);
KVL_MUST_USE job *sidecar_job_create(kvl_sidecar *s, job_kind kind, tenant *t);
void sidecar_job_end(job *j);
/* Takes the job. Errors   KVL_ERR_BUSY: the caller still has it */
KVL_MUST_USE kvl_status sidecar_job_start(kvl_sidecar *s, job *j);
/* From any thread: the loop is woken and gets the job. */
void sidecar_job_finish(job *j);
/* The next finished job, or NULL. */
job *sidecar_job_next(kvl_sidecar *s);

/* ---- anchor.c ---- */

typedef struct found_anchor {
    kvl_digest id;
    uint64_t n_bytes;
} found_anchor;

/* Fills what differs from a segment's put: kind, id, block_bytes, extra.
 * Errors   KVL_ERR_INVALID, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status sidecar_anchor_put(const kvl_sidecar *s, const client *c,
                                           const Kvloom__Local__V1__Put *put, job *j,
                                           kvl_error *error);
void sidecar_anchor_list(kvl_sidecar *s, client *c, uint64_t number,
                         const Kvloom__Local__V1__Anchors *wanted);
void sidecar_anchor_find(job *j); /* on a worker */
void sidecar_anchor_found(kvl_sidecar *s, client *c, const job *j);

/* ---- access.c ---- */

/* One get or put of the tenant's; n_bytes 0: not known. */
void sidecar_access_note(kvl_sidecar *s, tenant *t, const kvl_digest *id, uint64_t n_bytes,
                         kvl_access_kind kind);
void sidecar_access_answer(kvl_sidecar *s, client *c, uint64_t number, uint64_t after);
void sidecar_access_tick(kvl_sidecar *s, int64_t now_ns);

/* ---- lease.c ---- */

/* Shares the container. 0: too many (*text says which limit). */
uint64_t sidecar_lease_create(kvl_sidecar *s, client *c, kvl_container *container,
                              uint32_t lease_ms, const char **text);
/* Errors   KVL_ERR_NOT_FOUND: none of this client's */
KVL_MUST_USE kvl_status sidecar_lease_release(kvl_sidecar *s, client *c, uint64_t number);
void sidecar_lease_release_all(kvl_sidecar *s, client *c);
void sidecar_lease_tick(kvl_sidecar *s, int64_t now_ns);
void sidecar_lease_deinit(kvl_sidecar *s);

#endif /* KVL_SIDECAR_STATE_H */
