/* header_read.c: reads what somebody else may have written.
 *
 * Order of checks: the preamble's own checksum first, so that a flipped bit in the version is
 * damage and not a foreign format; then the version; then sizes against limits and against one
 * another; then checksums of what the sizes enclose; only then is the message unpacked and memory
 * taken. */
#include "segment/header.h"

#include "segment/preamble.h"

#include "base/alloc.h"
#include "kvloom.pb-c.h"

#include <inttypes.h>
#include <string.h>

/* What unpacking may take, for each byte of the message and besides. Ids take 4 bytes for 1 to 5 of
 * the message; thousands of tiny unknown fields would take 40 times their size, and are refused. */
enum { UNPACK_FACTOR = 16, UNPACK_EXTRA = 64 << 10 };

/* What unpacking allocates is counted, and why it ended is remembered: a hostile message and a full
 * machine are different errors. */
typedef struct budget {
    size_t left;
    bool is_memory_out;
} budget;

static void *budget_alloc(void *context, size_t size)
{
    budget *limits = context;
    if (size > limits->left) return NULL;
    limits->left -= size;
    void *memory = kvl_alloc(size);
    if (memory == NULL) limits->is_memory_out = true;
    return memory;
}

static void budget_free(void *context, void *memory)
{
    (void)context;
    kvl_free(memory);
}

void kvl_header_message_free(kvl_header_message *message)
{
    if (message == NULL) return;
    ProtobufCAllocator allocator = {budget_alloc, budget_free, NULL};
    kvloom__v1__container_header__free_unpacked(message, &allocator);
}

static kvl_status unpack(const uint8_t *bytes, uint32_t n_bytes, kvl_header_message **message,
                         kvl_error *error)
{
    budget limits = {(size_t)n_bytes * UNPACK_FACTOR + UNPACK_EXTRA, false};
    ProtobufCAllocator allocator = {budget_alloc, budget_free, &limits};
    *message = kvloom__v1__container_header__unpack(&allocator, n_bytes, bytes);
    if (*message != NULL) return KVL_OK;
    if (limits.is_memory_out) {
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a header of %u bytes", n_bytes);
    }
    return KVL_FAIL(error, KVL_ERR_DAMAGED,
                    "container: header message of %u bytes cannot be read; fetch it again",
                    n_bytes);
}

static kvl_status check_preamble(const uint8_t *bytes, size_t n_bytes, kvl_error *error)
{
    if (n_bytes < KVL_PREAMBLE_BYTES) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "container: %zu bytes, the preamble alone has %u",
                        n_bytes, KVL_PREAMBLE_BYTES);
    }
    if (memcmp(bytes, KVL_MAGIC, KVL_MAGIC_BYTES) != 0)
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "container: it does not start like a .kvseg");
    if (kvl_get_u64(bytes + KVL_PREAMBLE_AT_CHECKSUM) !=
        kvl_checksum(bytes, KVL_PREAMBLE_AT_CHECKSUM))
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "container: checksum of the preamble is wrong");
    const uint32_t version = kvl_get_u32(bytes + KVL_PREAMBLE_AT_VERSION);
    if (version != KVL_CONTAINER_VERSION) {
        return KVL_FAIL(error, KVL_ERR_FOREIGN,
                        "container: format version is %u, this build reads %u", version,
                        KVL_CONTAINER_VERSION);
    }
    if (kvl_get_u32(bytes + KVL_PREAMBLE_AT_ZERO_FIRST) != 0 ||
        kvl_get_u64(bytes + KVL_PREAMBLE_AT_ZERO_SECOND) != 0)
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "container: unused bytes of the preamble are set");
    return KVL_OK;
}

/* Reads the sizes of the preamble into `claimed`. That message and table lie inside the bytes that
 * are there is all that is known afterwards; whether they fit one another comes later. */
static kvl_status read_sizes(const uint8_t *bytes, size_t n_bytes, kvl_container_layout *claimed,
                             kvl_error *error)
{
    *claimed = (kvl_container_layout){
        .n_blocks = kvl_get_u32(bytes + KVL_PREAMBLE_AT_N_BLOCKS),
        .message_bytes = kvl_get_u32(bytes + KVL_PREAMBLE_AT_MESSAGE_BYTES),
        .table_at = kvl_get_u32(bytes + KVL_PREAMBLE_AT_TABLE_AT),
        .blocks_at = kvl_get_u32(bytes + KVL_PREAMBLE_AT_BLOCKS_AT),
        .n_bytes = kvl_get_u64(bytes + KVL_PREAMBLE_AT_N_BYTES),
    };
    if (claimed->n_blocks == 0 || claimed->n_blocks > KVL_CONTAINER_LAYERS_MAX) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "container: n_blocks is %u, must be 1 .. %u",
                        claimed->n_blocks, KVL_CONTAINER_LAYERS_MAX);
    }
    if (claimed->blocks_at > KVL_CONTAINER_HEADER_BYTES_MAX) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "container: header has %u bytes, at most %u are allowed",
                        claimed->blocks_at, KVL_CONTAINER_HEADER_BYTES_MAX);
    }
    if (claimed->blocks_at > n_bytes) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "container: header has %u bytes, only %zu came",
                        claimed->blocks_at, n_bytes);
    }
    const uint64_t message_past = (uint64_t)KVL_PREAMBLE_BYTES + claimed->message_bytes;
    const uint64_t table_past = kvl_table_checksum_at(claimed) + sizeof(uint64_t);
    if (message_past > claimed->table_at || table_past > claimed->blocks_at) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED,
                        "container: message to %llu, table at %u and blocks at %u overlap",
                        (unsigned long long)message_past, claimed->table_at, claimed->blocks_at);
    }
    return KVL_OK;
}

static kvl_status check_sums(const uint8_t *bytes, const kvl_container_layout *claimed, bool sealed,
                             kvl_error *error)
{
    const size_t message_past = KVL_PREAMBLE_BYTES + (size_t)claimed->message_bytes;
    const size_t table_checksum_at = kvl_table_checksum_at(claimed);
    const size_t table_past = table_checksum_at + sizeof(uint64_t);
    if (kvl_get_u64(bytes + KVL_PREAMBLE_AT_MESSAGE_CHECKSUM) !=
        kvl_checksum(bytes + KVL_PREAMBLE_BYTES, claimed->message_bytes))
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "container: checksum of the message is wrong");
    if (sealed && kvl_get_u64(bytes + table_checksum_at) != kvl_checksum(bytes, table_checksum_at))
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "container: checksum of the table is wrong");
    if (!kvl_bytes_are_zero(bytes + message_past, claimed->table_at - message_past) ||
        !kvl_bytes_are_zero(bytes + table_past, claimed->blocks_at - table_past))
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "container: padding of the header is not zero");
    return KVL_OK;
}

static bool read_digest(const ProtobufCBinaryData *field, kvl_digest *digest)
{
    if (field->len != KVL_DIGEST_BYTES) return false;
    memcpy(digest->bytes, field->data, KVL_DIGEST_BYTES);
    return true;
}

static kvl_status read_info(const kvl_header_message *message, kvl_container_info *info,
                            kvl_error *error)
{
    *info = (kvl_container_info){
        .kind = (kvl_container_kind)message->kind,
        .home_is_canonical = message->home_is_canonical,
        .is_unhealed = message->unhealed,
        .dtype = (kvl_kv_dtype)message->dtype,
        .n_layers = message->n_layers,
        .n_kv_heads = message->n_kv_heads,
        .head_dim = message->head_dim,
        .n_tokens = message->n_tokens,
        .pairs = message->pairs,
        .block_bytes = message->block_bytes,
        .tokens = message->token_ids,
        .extra = message->extra.data,
        .n_extra_bytes = message->extra.len,
    };
    if (message->version != KVL_CONTAINER_VERSION) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED,
                        "container: the message says version %u, the preamble %u", message->version,
                        KVL_CONTAINER_VERSION);
    }
    if (!read_digest(&message->id, &info->id) ||
        !read_digest(&message->fingerprint, &info->fingerprint) ||
        !read_digest(&message->home, &info->home)) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED,
                        "container: id, fingerprint and home have %zu, %zu and %zu bytes, must "
                        "have %u each",
                        message->id.len, message->fingerprint.len, message->home.len,
                        KVL_DIGEST_BYTES);
    }
    if (message->n_token_ids != message->n_tokens) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "container: n_tokens is %u, but %zu ids are there",
                        message->n_tokens, message->n_token_ids);
    }
    return kvl_header_check(info, KVL_ERR_DAMAGED, error);
}

/* There is one way only to lay out a container, so what the file says must be that. */
static kvl_status check_layout(const uint8_t *bytes, const kvl_container_layout *claimed,
                               const kvl_container_info *info, kvl_container_layout *layout,
                               kvl_error *error)
{
    KVL_TRY(kvl_header_layout(info, claimed->message_bytes, layout, error));
    if (claimed->n_blocks != layout->n_blocks || claimed->table_at != layout->table_at ||
        claimed->blocks_at != layout->blocks_at || claimed->n_bytes != layout->n_bytes) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED,
                        "container: %u blocks, table at %u, blocks at %u, %" PRIu64 " bytes do not "
                        "fit the message: %u, %u, %u, %" PRIu64,
                        claimed->n_blocks, claimed->table_at, claimed->blocks_at, claimed->n_bytes,
                        layout->n_blocks, layout->table_at, layout->blocks_at, layout->n_bytes);
    }
    for (uint32_t i = 0; i < layout->n_blocks; i++) {
        const uint8_t *entry = bytes + layout->table_at + (size_t)i * KVL_TABLE_ENTRY_BYTES;
        const uint64_t offset = kvl_get_u64(entry + KVL_ENTRY_AT_OFFSET);
        const uint64_t length = kvl_get_u64(entry + KVL_ENTRY_AT_LENGTH);
        if (offset == kvl_layout_block_at(layout, i) && length == info->block_bytes) continue;
        return KVL_FAIL(error, KVL_ERR_DAMAGED,
                        "container: table puts block %u at %" PRIu64 ", %" PRIu64
                        " bytes; it must be at %" PRIu64 ", %" PRIu64 " bytes",
                        i, offset, length, kvl_layout_block_at(layout, i), info->block_bytes);
    }
    return KVL_OK;
}

kvl_status kvl_header_read(const uint8_t *bytes, size_t n_bytes, bool sealed,
                           kvl_container_layout *layout, kvl_container_info *info,
                           kvl_header_message **message, kvl_error *error)
{
    *message = NULL;
    kvl_container_layout claimed;
    KVL_TRY(check_preamble(bytes, n_bytes, error));
    KVL_TRY(read_sizes(bytes, n_bytes, &claimed, error));
    KVL_TRY(check_sums(bytes, &claimed, sealed, error));
    KVL_TRY(unpack(bytes + KVL_PREAMBLE_BYTES, claimed.message_bytes, message, error));
    kvl_status status = read_info(*message, info, error);
    if (status == KVL_OK) status = check_layout(bytes, &claimed, info, layout, error);
    if (status != KVL_OK) {
        kvl_header_message_free(*message);
        *message = NULL;
    }
    return status;
}
