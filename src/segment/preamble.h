/* segment/preamble.h: offsets and integers of the fixed parts of a container's header, for header.c
 * and header_read.c. */
#ifndef KVL_SEGMENT_PREAMBLE_H
#define KVL_SEGMENT_PREAMBLE_H

#include "segment/header.h"

#include <string.h>

/* A byte above 127 and both kinds of line end: a transfer that drops the high bit or changes ends
 * of lines is noticed at once, and no text file starts like this. */
#define KVL_MAGIC "\x8BKVL\r\n\x1A\n"
#define KVL_MAGIC_BYTES 8u

enum {
    KVL_PREAMBLE_AT_VERSION = 8,
    KVL_PREAMBLE_AT_N_BLOCKS = 12,
    KVL_PREAMBLE_AT_MESSAGE_BYTES = 16,
    KVL_PREAMBLE_AT_TABLE_AT = 20,
    KVL_PREAMBLE_AT_BLOCKS_AT = 24,
    KVL_PREAMBLE_AT_ZERO_FIRST = 28, /* 4 bytes */
    KVL_PREAMBLE_AT_N_BYTES = 32,
    KVL_PREAMBLE_AT_MESSAGE_CHECKSUM = 40,
    KVL_PREAMBLE_AT_ZERO_SECOND = 48, /* 8 bytes */
    KVL_PREAMBLE_AT_CHECKSUM = 56,    /* of all before it; the same in every version */
};

enum { KVL_ENTRY_AT_OFFSET = 0, KVL_ENTRY_AT_LENGTH = 8, KVL_ENTRY_AT_CHECKSUM = 16 };

static inline uint32_t kvl_get_u32(const uint8_t *bytes)
{
    uint32_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static inline uint64_t kvl_get_u64(const uint8_t *bytes)
{
    uint64_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static inline void kvl_put_u32(uint8_t *bytes, uint32_t value)
{
    memcpy(bytes, &value, sizeof value);
}

static inline void kvl_put_u64(uint8_t *bytes, uint64_t value)
{
    memcpy(bytes, &value, sizeof value);
}

/* The last eight bytes of the table: a checksum of all before them. */
static inline size_t kvl_table_checksum_at(const kvl_container_layout *layout)
{
    return layout->table_at + (size_t)layout->n_blocks * KVL_TABLE_ENTRY_BYTES;
}

#endif /* KVL_SEGMENT_PREAMBLE_H */
