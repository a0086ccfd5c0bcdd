/* client/state.h: what the parts of the library know of one another. Private to client.c
 * (connection and calls), put.c, get.c (segments and transfers), ask.c (the rest). */
#ifndef KVL_CLIENT_STATE_H
#define KVL_CLIENT_STATE_H

#include "exchange/local.h"
#include "kvloom.h"
#include "segment/container.h"

#include "local.pb-c.h"

#include <pthread.h>
#include <stdatomic.h>

#define CLIENT_PATH_BYTES_MAX 128u

/* What outlives a client: segments give their leases back through it. */
typedef struct shared_link {
    _Atomic int64_t n_references;
    pthread_mutex_t lock; /* guards sending, and which connection it is */
    kvl_local_link link;
    uint64_t generation; /* of the connection: leases of an earlier one are gone; 0: none */
} shared_link;

struct kvloom_segment {
    shared_link *shared; /* NULL: no lease */
    uint64_t generation, lease;
    kvl_container *container; /* over `map` or `inside` */
    void *map;                /* of the sidecar's memory; NULL: none */
    size_t map_bytes;
    uint8_t *inside; /* owned */
    kvloom_shape shape;
    kvloom_digest id;
    kvloom_place place;
    _Atomic uint32_t n_ready;
};

/* A get that goes on while its caller does something else. */
struct kvloom_transfer {
    kvloom_client *client; /* NULL: it has been closed */
    kvloom_transfer *next;
    uint64_t number;
    kvloom_status status;
    kvloom_segment *segment;
    uint32_t *tokens; /* [n_tokens] that were asked for; owned */
    size_t n_tokens;
    kvloom_error error;
};

struct kvloom_client {
    char path[CLIENT_PATH_BYTES_MAX];
    char name[32];
    char *salt; /* owned; NULL: none */
    kvloom_digest fingerprint;
    kvloom_shape shape;
    shared_link *shared;
    uint64_t last_number;
    kvloom_transfer *transfers; /* that have not ended */
    int poll_fd;                /* epoll over the socket and news_fd */
    int news_fd;                /* readable when a call took what kvloom_dispatch would have */
    /* the put that is open */
    bool put_is_open;
    uint32_t *put_ids; /* tokens, then home; owned */
    size_t put_n_tokens, put_n_home;
    size_t put_layer_bytes;
    int staging_fd; /* -1: none yet */
    uint8_t *staging;
    size_t staging_bytes;
};

typedef Kvloom__Local__V1__Request request_message;
typedef Kvloom__Local__V1__Reply reply_message;

/* ---- client.c ---- */

kvloom_status client_fail(kvloom_error *error, kvloom_status status, const char *format, ...)
    KVL_PRINTF(3, 4);
/* As client_fail, with what an inner call has said. */
kvloom_status client_fail_as(kvloom_error *error, const kvl_error *inner);
/* Sends a request and waits for its last reply, at most deadline_ms and a little more for the way.
 * Dials again where the sidecar has restarted; repeats once what can be repeated (all of it can).
 * fd: sent along, -1 for none. *got_fd: of the reply, -1 for none; NULL: closed.
 * Owns     *reply: ended with client_reply_end; NULL where the status is below 0 */
kvloom_status client_call(kvloom_client *client, request_message *request, int fd,
                          uint32_t deadline_ms, reply_message **reply, int *got_fd,
                          kvloom_error *error);
void client_reply_end(reply_message *reply);
/* Sends, after dialling where there is no connection. */
kvloom_status client_send(kvloom_client *client, request_message *request, int fd,
                          kvloom_error *error);
/* Fills what a key says; borrows from it. Errors   KVLOOM_ERR_INVALID */
kvloom_status client_key(const kvloom_key *key, Kvloom__Local__V1__Key *message,
                         kvloom_error *error);
void client_key_id(const kvloom_digest *id, Kvloom__Local__V1__Key *message);
int64_t client_now_ns(void);
void client_shared_release(shared_link *shared);

/* ---- get.c ---- */

/* Makes a segment of a reply; takes fd. tokens [n_tokens]: those that it must be of; n_tokens 0: it
 * was asked for by its id. */
kvloom_status client_segment_make(kvloom_client *client, const Kvloom__Local__V1__Got *got, int fd,
                                  const uint32_t *tokens, size_t n_tokens, kvloom_segment **segment,
                                  kvloom_error *error);
/* A reply to a transfer; takes fd. */
void client_transfer_take(kvloom_client *client, kvloom_transfer *transfer,
                          const reply_message *reply, int fd);
/* All transfers end: the connection is gone, or the client is. */
void client_transfers_fail(kvloom_client *client, kvloom_status status, const char *text);

#endif /* KVL_CLIENT_STATE_H */
