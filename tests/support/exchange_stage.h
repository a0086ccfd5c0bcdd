/* exchange_stage.h: one protocol on a stage where the test plays everybody else: messages are
 * handed in one by one, what goes out is kept in a log. */
#ifndef KVL_TEST_EXCHANGE_STAGE_H
#define KVL_TEST_EXCHANGE_STAGE_H

#include "exchange/protocol.h"
#include "tiny_store.h"

enum { STAGE_LOG_MAX = 4096, CLIENT = KVL_LINK_CLIENT };

#define MS KVL_NS_PER_MS

typedef struct stage_sent {
    kvl_link link;
    kvl_message message;
    size_t n_bulk_bytes;
} stage_sent;

typedef struct stage_state {
    kvl_protocol *protocol; /* "me", epoch 1, with peers "a" (link 0) and "b" (link 1) */
    tiny_store store;
    int64_t now_ns;
    stage_sent outbox[STAGE_LOG_MAX];
    size_t n_sent;
    kvl_completion ended; /* the latest; what it carried is gone */
    char ended_text[KVL_ERROR_TEXT_MAX];
    int n_ended;
    uint64_t last_task;
    int n_tasks;
    const tiny_shape shape; /* of the containers that are spoken about, of the stage's model */
} stage_state;

extern stage_state stage;

/* For cmocka: a store that is empty and a protocol. */
int stage_set_up(void **state);
int stage_tear_down(void **state);
/* A new protocol over the same store; the former one has been destroyed. */
kvl_status stage_create(void);

kvl_message stage_message_of(kvl_message_kind kind, uint64_t epoch, uint64_t request);
kvl_message stage_hello_of(kvl_message_kind kind, const char *name, uint64_t epoch,
                           uint64_t request);
kvl_message stage_fetch_of(uint64_t epoch, uint64_t request, uint64_t number);
void stage_give(kvl_link link, const kvl_message *message, const void *bulk, size_t n_bytes);
void stage_give_plain(kvl_link link, kvl_message_kind kind, uint64_t epoch, uint64_t request);
void stage_pass_ms(int64_t ms);
/* The latest message of a kind on a link, or NULL. */
const stage_sent *stage_latest(kvl_link link, kvl_message_kind kind);
size_t stage_count_sent(kvl_link link, kvl_message_kind kind);
/* Peer `link` is connected and welcomes us. */
void stage_bring_up(kvl_link link, uint64_t epoch);
/* Somebody dials us and says Hello. */
void stage_dial_in(kvl_link link, const char *name, uint64_t epoch);

#endif /* KVL_TEST_EXCHANGE_STAGE_H */
