/* segment/header.h: the bytes before the first block: preamble, ContainerHeader message, table.
 * docs/segment-format.md describes each of them.
 * Threads  Safe from any thread. */
#ifndef KVL_SEGMENT_HEADER_H
#define KVL_SEGMENT_HEADER_H

#include "segment/container.h"

#define KVL_PREAMBLE_BYTES 64u
#define KVL_TABLE_ENTRY_BYTES 24u
#define KVL_BLOCK_ALIGNMENT 64u

/* Where things are; all in bytes from the start of the container. */
typedef struct kvl_container_layout {
    uint32_t n_blocks;
    uint32_t message_bytes; /* of the protobuf message, which starts behind the preamble */
    uint32_t table_at;
    uint32_t blocks_at;
    uint64_t block_stride; /* from block to block */
    uint64_t n_bytes;      /* of the whole container */
} kvl_container_layout;

/* The unpacked message of proto/kvloom.proto: holds the tokens and extra of a header that was
 * read. */
typedef struct Kvloom__V1__ContainerHeader kvl_header_message;
void kvl_header_message_free(kvl_header_message *message); /* NULL does nothing */

/* Checks every field against its range and its neighbours.
 * Errors   `failure` (text names the field, its value and its limit) */
KVL_MUST_USE kvl_status kvl_header_check(const kvl_container_info *info, kvl_status failure,
                                         kvl_error *error);

/* Lays out a container of checked info whose message has message_bytes.
 * Errors   KVL_ERR_TOO_LARGE */
KVL_MUST_USE kvl_status kvl_header_layout(const kvl_container_info *info, uint64_t message_bytes,
                                          kvl_container_layout *layout, kvl_error *error);

/* Bytes of the message that kvl_header_write writes. */
uint64_t kvl_header_message_bytes(const kvl_container_info *info);

/* Writes layout->blocks_at bytes: all but the checksums of the table. */
void kvl_header_write(const kvl_container_info *info, const kvl_container_layout *layout,
                      uint8_t *bytes);

/* Reads and checks all before the first block; `bytes` may go on behind it. info->tokens and
 * info->extra point into *message. Where `sealed` is false, the checksums of the table are not
 * there yet and are not compared.
 * Owns     *message: ended with kvl_header_message_free, also after info is copied
 * Errors   KVL_ERR_DAMAGED, KVL_ERR_FOREIGN, KVL_ERR_TOO_LARGE, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_header_read(const uint8_t *bytes, size_t n_bytes, bool sealed,
                                        kvl_container_layout *layout, kvl_container_info *info,
                                        kvl_header_message **message, kvl_error *error);

/* Where block `block` starts. */
uint64_t kvl_layout_block_at(const kvl_container_layout *layout, uint32_t block);
/* The checksum in the table; `bytes` is the start of the container. */
uint64_t kvl_header_block_checksum(const kvl_container_layout *layout, const uint8_t *bytes,
                                   uint32_t block);
void kvl_header_set_block_checksum(const kvl_container_layout *layout, uint8_t *bytes,
                                   uint32_t block, uint64_t checksum);
/* Writes the checksum over header and table, when all checksums of blocks are there. */
void kvl_header_finish(const kvl_container_layout *layout, uint8_t *bytes);

bool kvl_bytes_are_zero(const uint8_t *bytes, size_t n_bytes);

#endif /* KVL_SEGMENT_HEADER_H */
