/* header.c: what stands before the blocks is checked, laid out and written here; header_read.c
 * reads it back. Integers are little endian, as on every machine that KVLoom runs on. */
#include "segment/header.h"

#include "segment/codec.h"
#include "segment/preamble.h"

#include "kvloom.pb-c.h"

#include <inttypes.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "containers are little endian");
_Static_assert(KVL_BLOCK_ALIGNMENT % 8 == 0, "the table is a table of 64-bit numbers");

bool kvl_bytes_are_zero(const uint8_t *bytes, size_t n_bytes)
{
    uint8_t any = 0;
    for (size_t i = 0; i < n_bytes; i++) any |= bytes[i];
    return any == 0;
}

static bool dtype_is_known(kvl_kv_dtype dtype)
{
    return dtype == KVL_KV_F32 || dtype == KVL_KV_F16 || dtype == KVL_KV_BF16 ||
           dtype == KVL_KV_INT8;
}

static kvl_status check_shape(const kvl_container_info *info, kvl_status failure, kvl_error *error)
{
    const struct {
        const char *name;
        uint64_t value, min, max;
    } ranges[] = {
        {"n_layers", info->n_layers, 1, KVL_CONTAINER_LAYERS_MAX},
        {"n_kv_heads", info->n_kv_heads, 1, KVL_CONTAINER_HEADS_MAX},
        {"head_dim", info->head_dim, 1, KVL_CONTAINER_HEAD_DIM_MAX},
        {"n_tokens", info->n_tokens, info->kind == KVL_CONTAINER_SEGMENT, KVL_SEGMENT_TOKENS_MAX},
        {"block_bytes", info->block_bytes, 1, KVL_CONTAINER_BYTES_MAX},
        {"extra", info->n_extra_bytes, 0, KVL_CONTAINER_EXTRA_BYTES_MAX},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        if (ranges[i].value >= ranges[i].min && ranges[i].value <= ranges[i].max) continue;
        return KVL_FAIL(error, failure,
                        "container: %s is %" PRIu64 ", must be %" PRIu64 " .. %" PRIu64,
                        ranges[i].name, ranges[i].value, ranges[i].min, ranges[i].max);
    }
    return KVL_OK;
}

kvl_status kvl_header_check(const kvl_container_info *info, kvl_status failure, kvl_error *error)
{
    if (info->kind != KVL_CONTAINER_SEGMENT && info->kind != KVL_CONTAINER_ANCHOR) {
        return KVL_FAIL(error, failure, "container: kind is %u, must be 1 (segment) or 2 (anchor)",
                        (unsigned)info->kind);
    }
    if (!dtype_is_known(info->dtype)) {
        return KVL_FAIL(error, failure, "container: dtype is %u, must be 1 .. 4",
                        (unsigned)info->dtype);
    }
    KVL_TRY(check_shape(info, failure, error));
    /* A segment's block follows from its shape; what an anchor keeps in one is its own business. */
    uint64_t expected = 0;
    if (info->kind == KVL_CONTAINER_SEGMENT &&
        (!kvl_segment_block_bytes(info->dtype, info->n_kv_heads, info->n_tokens, info->head_dim,
                                  &expected) ||
         expected != info->block_bytes)) {
        return KVL_FAIL(error, failure,
                        "container: block_bytes is %" PRIu64
                        ", a segment of this shape has %" PRIu64,
                        info->block_bytes, expected);
    }
    return KVL_OK;
}

static uint64_t round_up(uint64_t value, uint64_t multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

kvl_status kvl_header_layout(const kvl_container_info *info, uint64_t message_bytes,
                             kvl_container_layout *layout, kvl_error *error)
{
    KVL_ASSERT(info->n_layers <= KVL_CONTAINER_LAYERS_MAX);
    KVL_ASSERT(info->block_bytes <= KVL_CONTAINER_BYTES_MAX);
    if (message_bytes > KVL_CONTAINER_HEADER_BYTES_MAX) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "container: header message has %" PRIu64 " bytes, at most %u are allowed",
                        message_bytes, KVL_CONTAINER_HEADER_BYTES_MAX);
    }
    /* None of these can overflow: every term was checked against a limit far below 2^63. */
    const uint64_t table_at = round_up(KVL_PREAMBLE_BYTES + message_bytes, 8);
    const uint64_t table_bytes = (uint64_t)info->n_layers * KVL_TABLE_ENTRY_BYTES + 8;
    const uint64_t blocks_at = round_up(table_at + table_bytes, KVL_BLOCK_ALIGNMENT);
    const uint64_t stride = round_up(info->block_bytes, KVL_BLOCK_ALIGNMENT);
    const uint64_t n_bytes = blocks_at + info->n_layers * stride;
    if (blocks_at > KVL_CONTAINER_HEADER_BYTES_MAX) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "container: header has %" PRIu64 " bytes, at most %u are allowed",
                        blocks_at, KVL_CONTAINER_HEADER_BYTES_MAX);
    }
    if (n_bytes > KVL_CONTAINER_BYTES_MAX || n_bytes > SIZE_MAX) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "container: %" PRIu64 " bytes, at most %" PRIu64
                        " are allowed; split the part",
                        n_bytes, KVL_CONTAINER_BYTES_MAX);
    }
    *layout = (kvl_container_layout){
        .n_blocks = info->n_layers,
        .message_bytes = (uint32_t)message_bytes,
        .table_at = (uint32_t)table_at,
        .blocks_at = (uint32_t)blocks_at,
        .block_stride = stride,
        .n_bytes = n_bytes,
    };
    return KVL_OK;
}

/* protobuf-c has no const in its messages; packing only reads. */
static void *unconst(const void *bytes)
{
    return (void *)(uintptr_t)bytes;
}

static ProtobufCBinaryData digest_field(const kvl_digest *digest)
{
    return (ProtobufCBinaryData){KVL_DIGEST_BYTES, unconst(digest->bytes)};
}

static Kvloom__V1__ContainerHeader message_of(const kvl_container_info *info)
{
    Kvloom__V1__ContainerHeader message = KVLOOM__V1__CONTAINER_HEADER__INIT;
    message.version = KVL_CONTAINER_VERSION;
    message.kind = info->kind;
    message.id = digest_field(&info->id);
    message.fingerprint = digest_field(&info->fingerprint);
    message.home = digest_field(&info->home);
    message.home_is_canonical = info->home_is_canonical;
    message.unhealed = info->is_unhealed;
    message.dtype = info->dtype;
    message.n_layers = info->n_layers;
    message.n_kv_heads = info->n_kv_heads;
    message.head_dim = info->head_dim;
    message.n_tokens = info->n_tokens;
    message.pairs = info->pairs;
    message.block_bytes = info->block_bytes;
    message.n_token_ids = info->n_tokens;
    message.token_ids = unconst(info->tokens);
    message.extra = (ProtobufCBinaryData){info->n_extra_bytes, unconst(info->extra)};
    return message;
}

uint64_t kvl_header_message_bytes(const kvl_container_info *info)
{
    const Kvloom__V1__ContainerHeader message = message_of(info);
    return kvloom__v1__container_header__get_packed_size(&message);
}

uint64_t kvl_layout_block_at(const kvl_container_layout *layout, uint32_t block)
{
    KVL_ASSERT(block < layout->n_blocks);
    return layout->blocks_at + block * layout->block_stride;
}

static size_t checksum_at(const kvl_container_layout *layout, uint32_t block)
{
    KVL_ASSERT(block < layout->n_blocks);
    return layout->table_at + (size_t)block * KVL_TABLE_ENTRY_BYTES + KVL_ENTRY_AT_CHECKSUM;
}

uint64_t kvl_header_block_checksum(const kvl_container_layout *layout, const uint8_t *bytes,
                                   uint32_t block)
{
    return kvl_get_u64(bytes + checksum_at(layout, block));
}

void kvl_header_set_block_checksum(const kvl_container_layout *layout, uint8_t *bytes,
                                   uint32_t block, uint64_t checksum)
{
    kvl_put_u64(bytes + checksum_at(layout, block), checksum);
}

void kvl_header_finish(const kvl_container_layout *layout, uint8_t *bytes)
{
    const size_t at = kvl_table_checksum_at(layout);
    kvl_put_u64(bytes + at, kvl_checksum(bytes, at));
}

static void write_preamble(const kvl_container_layout *layout, uint8_t *bytes)
{
    memcpy(bytes, KVL_MAGIC, KVL_MAGIC_BYTES);
    kvl_put_u32(bytes + KVL_PREAMBLE_AT_VERSION, KVL_CONTAINER_VERSION);
    kvl_put_u32(bytes + KVL_PREAMBLE_AT_N_BLOCKS, layout->n_blocks);
    kvl_put_u32(bytes + KVL_PREAMBLE_AT_MESSAGE_BYTES, layout->message_bytes);
    kvl_put_u32(bytes + KVL_PREAMBLE_AT_TABLE_AT, layout->table_at);
    kvl_put_u32(bytes + KVL_PREAMBLE_AT_BLOCKS_AT, layout->blocks_at);
    kvl_put_u64(bytes + KVL_PREAMBLE_AT_N_BYTES, layout->n_bytes);
    kvl_put_u64(bytes + KVL_PREAMBLE_AT_MESSAGE_CHECKSUM,
                kvl_checksum(bytes + KVL_PREAMBLE_BYTES, layout->message_bytes));
    kvl_put_u64(bytes + KVL_PREAMBLE_AT_CHECKSUM, kvl_checksum(bytes, KVL_PREAMBLE_AT_CHECKSUM));
}

void kvl_header_write(const kvl_container_info *info, const kvl_container_layout *layout,
                      uint8_t *bytes)
{
    memset(bytes, 0, layout->blocks_at);
    const Kvloom__V1__ContainerHeader message = message_of(info);
    const size_t packed = kvloom__v1__container_header__pack(&message, bytes + KVL_PREAMBLE_BYTES);
    KVL_ASSERT(packed == layout->message_bytes);
    write_preamble(layout, bytes);
    for (uint32_t i = 0; i < layout->n_blocks; i++) {
        uint8_t *entry = bytes + layout->table_at + (size_t)i * KVL_TABLE_ENTRY_BYTES;
        kvl_put_u64(entry + KVL_ENTRY_AT_OFFSET, kvl_layout_block_at(layout, i));
        kvl_put_u64(entry + KVL_ENTRY_AT_LENGTH, info->block_bytes);
    }
}
