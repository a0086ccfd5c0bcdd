/* container_fuzz.c: a libFuzzer target over any bytes as a container. Good seeds are the files of
 * tests/golden/segment.
 *   clang -fsanitize=fuzzer,address,undefined ... tests/fuzz/container_fuzz.c
 * Without a fuzzing engine, -DKVL_FUZZ_REPLAY gives a main that runs the files named to it.
 *
 * Checksums stop a random change at once, so each input is read as it is, and a second time with
 * its checksums made to fit, which lets changes through to the checks behind them. */
#include "base/alloc.h"
#include "segment/codec.h"
#include "segment/container.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum {
    PREAMBLE = 64,
    AT_N_BLOCKS = 12,
    AT_MESSAGE_BYTES = 16,
    AT_TABLE = 20,
    AT_MESSAGE_SUM = 40,
    AT_SUM = 56,
    ENTRY = 24,
};

static uint32_t get_u32(const uint8_t *bytes)
{
    uint32_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static uint64_t get_u64(const uint8_t *bytes)
{
    uint64_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static void put_sum(uint8_t *bytes, size_t size, size_t from, size_t n, size_t to)
{
    if (from > size || n > size - from || to > size || size - to < sizeof(uint64_t)) return;
    const uint64_t sum = kvl_checksum(bytes + from, n);
    memcpy(bytes + to, &sum, sizeof sum);
}

/* As far as the claimed sizes lie in the input. */
static void fix_checksums(uint8_t *bytes, size_t size)
{
    if (size < PREAMBLE) return;
    const size_t n_blocks = get_u32(bytes + AT_N_BLOCKS);
    const size_t table_at = get_u32(bytes + AT_TABLE);
    const size_t table_past = table_at + n_blocks * ENTRY;
    for (size_t i = 0; i < n_blocks && i < KVL_CONTAINER_LAYERS_MAX; i++) {
        const size_t entry = table_at + i * ENTRY;
        if (entry > size || size - entry < ENTRY) break;
        put_sum(bytes, size, get_u64(bytes + entry), get_u64(bytes + entry + 8), entry + 16);
    }
    put_sum(bytes, size, PREAMBLE, get_u32(bytes + AT_MESSAGE_BYTES), AT_MESSAGE_SUM);
    put_sum(bytes, size, 0, AT_SUM, AT_SUM);
    put_sum(bytes, size, 0, table_past, table_past);
}

/* What a reader does with a segment that was accepted: every number of it. */
static void decode(const kvl_container *container)
{
    const kvl_container_info *info = kvl_container_info_of(container);
    if (info->kind != KVL_CONTAINER_SEGMENT) return;
    const size_t n = (size_t)info->n_kv_heads * info->n_tokens * info->head_dim;
    float *rows = kvl_alloc(n * sizeof *rows);
    if (rows == NULL) return;
    for (uint32_t i = 0; i < kvl_container_n_blocks(container); i++) {
        size_t n_bytes = 0;
        const void *block = kvl_container_block_view(container, i, &n_bytes);
        kvl_segment_decode_block(info->dtype, info->n_kv_heads, info->n_tokens, info->head_dim,
                                 block, 0, info->n_tokens, rows, NULL);
        kvl_segment_decode_block(info->dtype, info->n_kv_heads, info->n_tokens, info->head_dim,
                                 block, 0, info->n_tokens, NULL, rows);
    }
    kvl_free(rows);
}

static void read_all_ways(const uint8_t *bytes, size_t size)
{
    kvl_error error;
    kvl_container *container = NULL;
    if (kvl_container_from_bytes(bytes, size, &container, &error) == KVL_OK) {
        decode(container);
        /* What was accepted is given back byte by byte. */
        size_t n_bytes = 0;
        const void *again = kvl_container_bytes(container, &n_bytes);
        KVL_ASSERT(n_bytes == size && memcmp(again, bytes, size) == 0);
        kvl_container_release(container);
    }
    if (kvl_container_borrow(bytes, size, NULL, NULL, &container, &error) == KVL_OK) {
        for (uint32_t i = 0; i < kvl_container_n_blocks(container); i++) {
            const kvl_status status = kvl_container_block_check(container, i, &error);
            KVL_ASSERT(status == KVL_OK || status == KVL_ERR_DAMAGED);
        }
        kvl_container_release(container);
    }
    /* A header alone: the place of its blocks is what the preamble says. A claim of gigabytes is
     * allowed by the format, but not asked of a fuzzer's memory. */
    const size_t blocks_at = size >= PREAMBLE ? get_u32(bytes + 24) : 0;
    if (blocks_at > 0 && blocks_at <= size && get_u64(bytes + 32) <= (uint64_t)64 << 20 &&
        kvl_container_from_header(bytes, blocks_at, &container, &error) == KVL_OK)
        kvl_container_release(container);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    read_all_ways(data, size);
    uint8_t *copy = kvl_alloc(size > 0 ? size : 1); /* ends where the input does */
    if (copy == NULL) return 0;
    memcpy(copy, data, size);
    fix_checksums(copy, size);
    read_all_ways(copy, size);
    kvl_free(copy);
    return 0;
}

#ifdef KVL_FUZZ_REPLAY
#include "base/file.h"

int main(int n_arguments, char **arguments)
{
    for (int i = 1; i < n_arguments; i++) {
        char *bytes = NULL;
        size_t n_bytes = 0;
        if (kvl_file_read(arguments[i], (size_t)1 << 26, &bytes, &n_bytes, NULL) != KVL_OK)
            return 1;
        (void)LLVMFuzzerTestOneInput((const uint8_t *)bytes, n_bytes);
        kvl_free(bytes);
    }
    return 0;
}
#endif
