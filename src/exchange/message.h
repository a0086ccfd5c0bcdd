/* exchange/message.h: every message between two processes as a plain struct, and its limits.
 *
 * The protocol works on these; exchange/wire.h turns them into bytes and back. A message has one
 * control part and up to KVL_FRAMES_MAX bulk frames; docs/protocol.md says what they mean. */
#ifndef KVL_EXCHANGE_MESSAGE_H
#define KVL_EXCHANGE_MESSAGE_H

#include "segment/container.h"

#define KVL_PROTOCOL_MAGIC 0x4d4c564bu
#define KVL_PROTOCOL_VERSION_MIN 1u
#define KVL_PROTOCOL_VERSION_MAX 1u

#define KVL_NAME_BYTES_MAX 31u
#define KVL_FEATURES_MAX 8u
#define KVL_FEATURE_BYTES_MAX 31u
#define KVL_LOCATE_IDS_MAX 16u
#define KVL_LIST_IDS_MAX 16384u
#define KVL_LIST_PREFIX_BYTES_MAX 1024u
#define KVL_WIRE_TEXT_BYTES_MAX (KVL_ERROR_TEXT_MAX - 1)
#define KVL_CONTROL_BYTES_MAX 4096u
#define KVL_FRAMES_MAX 64u
#define KVL_FRAME_BYTES_MAX (1u << 20)
#define KVL_HEADER_FRAMES_MAX 4u
#define KVL_BULK_TOKEN_BYTES 16u
#define KVL_BULK_SHARE_BYTES 32u
#define KVL_CREDIT_BYTES_MIN ((uint64_t)1 << 20)
#define KVL_CREDIT_BYTES_MAX ((uint64_t)8 << 20)

/* Bytes beside a message; borrowed for the call that they are given to. */
typedef struct kvl_frame {
    const void *bytes;
    size_t n_bytes;
} kvl_frame;

typedef enum kvl_message_kind {
    KVL_MESSAGE_HELLO = 1,
    KVL_MESSAGE_WELCOME,
    KVL_MESSAGE_PING,
    KVL_MESSAGE_PONG,
    KVL_MESSAGE_GOODBYE,
    KVL_MESSAGE_LOCATE,
    KVL_MESSAGE_LOCATED,
    KVL_MESSAGE_ANNOUNCE,
    KVL_MESSAGE_FETCH,
    KVL_MESSAGE_FETCH_HEADER,
    KVL_MESSAGE_BLOCK,
    KVL_MESSAGE_CREDIT,
    KVL_MESSAGE_FETCH_DONE,
    KVL_MESSAGE_CANCEL,
    KVL_MESSAGE_LIST,
    KVL_MESSAGE_LISTED,
    KVL_MESSAGE_TASK,
    KVL_MESSAGE_TASK_POLL,
    KVL_MESSAGE_TASK_REPLY,
    KVL_MESSAGE_TASK_DONE,
    KVL_MESSAGE_ERROR,
} kvl_message_kind;

/* A second connection for blocks (exchange/bulk_channel.h). */
typedef struct kvl_bulk_offer {
    uint16_t port; /* 0: no channel */
    bool has_aes;
    uint8_t token[KVL_BULK_TOKEN_BYTES];
    uint8_t share[KVL_BULK_SHARE_BYTES];
} kvl_bulk_offer;

typedef struct kvl_message_hello {
    uint32_t magic;
    uint32_t version_min, version_max;
    char name[KVL_NAME_BYTES_MAX + 1];
    kvl_digest fingerprint;
    uint32_t frame_bytes_max;
    uint64_t window_bytes_max;
    uint64_t task_bytes_max;
    uint32_t n_features;
    char features[KVL_FEATURES_MAX][KVL_FEATURE_BYTES_MAX + 1];
    kvl_bulk_offer bulk;
} kvl_message_hello;

typedef struct kvl_message {
    kvl_message_kind kind;
    uint64_t epoch;
    uint64_t request;
    union {
        kvl_message_hello hello; /* HELLO, WELCOME */
        struct {
            uint32_t n_ids;
            kvl_digest ids[KVL_LOCATE_IDS_MAX];
        } locate;
        struct {
            uint32_t n_ids;
            uint32_t held; /* bit i: ids[i] is there */
        } located;
        struct {
            kvl_digest id;
            kvl_container_kind kind;
        } announce;
        struct {
            kvl_digest id;
            uint32_t block_first, block_past; /* block_past 0: to the end */
            uint64_t header_checksum;         /* 0: none is known */
            uint64_t credit_bytes;
        } fetch;
        struct {
            kvl_digest id;
            uint32_t n_blocks;
            uint32_t block_first;
            uint64_t header_checksum;
            uint32_t header_bytes; /* 0: as the asker has it */
        } fetch_header;
        struct {
            kvl_digest id;
            uint32_t block;
            uint64_t offset;
            uint64_t total;
            /* Not on the wire: a piece that went straight into its container (exchange/landing.h)
             * and ends its block brings the checksum of the block. */
            bool has_checksum;
            uint64_t checksum;
        } block;
        struct {
            uint64_t granted_bytes;
        } credit;
        struct {
            kvl_container_kind kind;
        } list;
        struct {
            uint32_t n_ids;
            bool truncated;
        } listed;
        struct {
            uint64_t body_bytes;
        } task;
        struct {
            kvl_status status;
            char text[KVL_WIRE_TEXT_BYTES_MAX + 1];
            uint64_t body_bytes;
        } reply; /* TASK_REPLY; ERROR uses status and text */
    };
} kvl_message;

/* "HELLO"; static text. */
const char *kvl_message_kind_name(kvl_message_kind kind);

/* Length of a name that may travel: 1 .. KVL_NAME_BYTES_MAX of A-Z a-z 0-9 . _ - */
bool kvl_name_is_valid(const char *name);

#endif /* KVL_EXCHANGE_MESSAGE_H */
