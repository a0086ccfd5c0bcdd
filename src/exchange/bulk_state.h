/* exchange/bulk_state.h: what the two halves of a bulk channel know of one another. Private to
 * bulk_channel.c (life, sending), bulk_receive.c and bulk_socket.c. */
#ifndef KVL_EXCHANGE_BULK_STATE_H
#define KVL_EXCHANGE_BULK_STATE_H

#include "exchange/bulk_channel.h"
#include "exchange/landing.h"
#include "exchange/wire.h"

#include <pthread.h>
#include <stdatomic.h>

#define BULK_CONTROL_BYTES_MAX 192u
/* Plain payload up to here is copied beside its head; more goes out from where it lies. */
#define BULK_COPIED_BYTES_MAX ((size_t)64 << 10)
/* A record that is not full yet, and one more head and piece behind it. */
#define BULK_OUT_BYTES (2 * KVL_BULK_RECORD_BYTES + 4096)
#define BULK_IN_BYTES (2 * KVL_BULK_RECORD_BYTES + 4096)

typedef enum bulk_state {
    BULK_OFFERED, /* our share has been told, theirs has not */
    BULK_AGREED,  /* both are known; the connection is not there yet */
    BULK_READY,
    BULK_BROKEN, /* stays until its link is reset */
    BULK_DOOMED, /* its thread frees it */
} bulk_state;

typedef struct bulk_item {
    uint8_t control[BULK_CONTROL_BYTES_MAX];
    size_t n_control;
    kvl_frame frames[KVL_HEADER_FRAMES_MAX];
    size_t n_frames;
    kvl_owner owner; /* a reference */
} bulk_item;

typedef struct outlet {
    struct outlet *next;
    bulk_state state; /* lock */
    uint8_t token[KVL_BULK_TOKEN_BYTES], share[KVL_SHARE_BYTES];
    bool is_sealed;
    kvl_seal seal;
    int fd;
    bulk_item items[KVL_BULK_QUEUE_MESSAGES_MAX]; /* ring; lock */
    size_t item_first, n_items;                   /* lock */
    /* of the sending thread */
    bool is_begun;     /* the first message's head is in `out` */
    size_t payload_at; /* how much of its payload is sent, or in `out` */
    uint8_t *out;      /* [BULK_OUT_BYTES] */
    size_t n_out, n_out_sent;
} outlet;

typedef struct stranger {
    int fd; /* -1: free */
    int64_t came_ns;
    uint8_t token[KVL_BULK_TOKEN_BYTES];
    size_t n_token;
} stranger;

/* What has arrived, whole. */
typedef struct bulk_buffer {
    struct bulk_buffer *next;
    kvl_link link;
    uint64_t serial; /* of the inlet */
    uint8_t control[BULK_CONTROL_BYTES_MAX];
    size_t n_control, n_payload;
    uint8_t *payload; /* [KVL_BULK_MESSAGE_BYTES_MAX], once a message needed it; or NULL */
    kvl_piece piece;  /* serial 0: the message is in `payload` */
    bool is_dropped;  /* its landing has ended while it arrived: nobody waits for it */
} bulk_buffer;

typedef struct inlet {
    struct inlet *next;
    bulk_state state; /* lock */
    kvl_link link;
    uint64_t serial;
    uint8_t token[KVL_BULK_TOKEN_BYTES], share[KVL_SHARE_BYTES];
    bool is_sealed;
    kvl_seal seal;
    char endpoint[256]; /* of the control socket */
    uint16_t port;
    int fd;
    uint8_t *in; /* [BULK_IN_BYTES]: what has arrived and is not taken yet */
    size_t in_first, in_past;
    bulk_buffer *buffer; /* of the message that is arriving; NULL: none has begun */
    bool is_starved;     /* there was no buffer */
    size_t payload_at;
    int low_water; /* bytes that make the socket readable; 0: the system's one */
} inlet;

struct kvl_bulk_channel {
    bool has_keys, has_aes;
    bool is_sealed; /* what we send */
    int wake_fd;
    int listen_fd;
    uint16_t port;
    char unix_path[128];
    int sender_wake_fd, receiver_wake_fd;
    bool has_sender, has_receiver;
    pthread_t sender, receiver;
    _Atomic bool is_stopping;
    _Atomic uint64_t n_refused;
    stranger strangers[KVL_BULK_STRANGERS_MAX]; /* of the sending thread */
    outlet *outlet_of_link[KVL_CLIENTS_MAX];    /* of the exchange's thread, as the next two */
    inlet *inlet_of_link[KVL_PEERS_MAX];
    uint64_t last_serial;
    pthread_mutex_t lock; /* guards the lists and what is marked so */
    outlet *outlets;
    inlet *inlets;
    bulk_buffer *arrived_first, *arrived_last, *spare;
    uint32_t n_buffers;
    kvl_landings landings;
    kvl_wire_decoder decoder; /* of the receiving thread, as the next one */
    size_t n_untold_bytes;    /* arrived since the exchange's thread was woken */
};

/* ---- bulk_socket.c ---- */

/* Listens beside a control endpoint. *port: 1 for ipc, whose file is `unix_path`. */
KVL_MUST_USE kvl_status bulk_listen(const char *endpoint, int *fd, uint16_t *port, char *unix_path,
                                    size_t unix_path_size, kvl_error *error);
/* Begins to connect. Errors   KVL_ERR_UNREACHABLE */
KVL_MUST_USE kvl_status bulk_dial(const char *endpoint, uint16_t port, int *fd);
bool bulk_is_tcp(const char *endpoint); /* NULL is not */
void bulk_tune(int fd);
void bulk_wake(int fd);
void bulk_wake_taken(int fd);

/* ---- bulk_channel.c ---- */

void bulk_outlet_offer(kvl_bulk_channel *c, kvl_link link, kvl_bulk_offer *offer);
void bulk_outlet_agree(kvl_bulk_channel *c, kvl_link link, const kvl_bulk_offer *theirs);
void bulk_outlet_reset(kvl_bulk_channel *c, kvl_link link);

/* ---- bulk_receive.c ---- */

void bulk_inlet_offer(kvl_bulk_channel *c, kvl_link link, kvl_bulk_offer *offer);
void bulk_inlet_agree(kvl_bulk_channel *c, kvl_link link, const kvl_bulk_offer *theirs,
                      const char *endpoint);
void bulk_inlet_reset(kvl_bulk_channel *c, kvl_link link);
void *bulk_receive_all(void *channel);
/* After the threads have ended. */
void bulk_inlets_end(kvl_bulk_channel *c);

#endif /* KVL_EXCHANGE_BULK_STATE_H */
