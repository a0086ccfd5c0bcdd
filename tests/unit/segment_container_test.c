/* segment/container: what is written is read back; what was damaged is never accepted; memory and
 * references balance.
 * Given a file name and a dtype (1 .. 4), writes a container whose numbers follow from a formula,
 * for tests/integration/segment_python_reader.py. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/file.h"
#include "segment/codec.h"
#include "segment/container.h"
#include "test_random.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

/* Where the fixed part of the header has what; see docs/segment-format.md. */
enum { AT_VERSION = 8, AT_CHECKSUM = 56, PREAMBLE = 64 };

static kvl_digest any_digest(kvl_random *random)
{
    kvl_digest digest;
    for (size_t i = 0; i < sizeof digest.bytes; i++)
        digest.bytes[i] = (uint8_t)kvl_random_next(random);
    return digest;
}

typedef struct sample {
    kvl_container_info info;
    uint32_t tokens[64];
    uint8_t extra[100];
} sample;

static void sample_fill(sample *s, kvl_random *random)
{
    const bool is_segment = kvl_test_below(random, 4) > 0;
    for (size_t i = 0; i < 64; i++) s->tokens[i] = (uint32_t)kvl_random_next(random) >> (i % 32);
    for (size_t i = 0; i < sizeof s->extra; i++) s->extra[i] = (uint8_t)kvl_random_next(random);
    s->info = (kvl_container_info){
        .kind = is_segment ? KVL_CONTAINER_SEGMENT : KVL_CONTAINER_ANCHOR,
        .id = any_digest(random),
        .fingerprint = any_digest(random),
        .home = kvl_test_below(random, 2) ? any_digest(random) : (kvl_digest){{0}},
        .home_is_canonical = kvl_test_below(random, 2) == 1,
        .is_unhealed = kvl_test_below(random, 4) == 0,
        .dtype = (kvl_kv_dtype)(1 + kvl_test_below(random, 4)),
        .n_layers = 1 + kvl_test_below(random, 6),
        .n_kv_heads = 1 + kvl_test_below(random, 3),
        .head_dim = 1 + kvl_test_below(random, 20),
        .n_tokens = is_segment ? 1 + kvl_test_below(random, 64) : 0,
        .pairs = kvl_test_below(random, 2),
        .tokens = s->tokens,
        .extra = s->extra,
        .n_extra_bytes = kvl_test_below(random, sizeof s->extra + 1),
    };
    s->info.block_bytes = 1 + kvl_test_below(random, 500);
    if (is_segment) {
        assert_true(kvl_segment_block_bytes(s->info.dtype, s->info.n_kv_heads, s->info.n_tokens,
                                            s->info.head_dim, &s->info.block_bytes));
    }
}

static void fill_blocks(kvl_container *container, kvl_random *random)
{
    for (uint32_t b = 0; b < kvl_container_n_blocks(container); b++) {
        size_t n_bytes = 0;
        uint8_t *block = kvl_container_block(container, b, &n_bytes);
        for (size_t i = 0; i < n_bytes; i++) block[i] = (uint8_t)kvl_random_next(random);
    }
}

static kvl_container *sealed_sample(sample *s, kvl_random *random)
{
    sample_fill(s, random);
    kvl_container *container = NULL;
    assert_int_equal(kvl_container_create(&s->info, &container, NULL), KVL_OK);
    fill_blocks(container, random);
    kvl_container_seal(container);
    return container;
}

static void assert_info_equal(const kvl_container_info *a, const kvl_container_info *b)
{
    assert_int_equal(a->kind, b->kind);
    assert_true(kvl_digest_equal(&a->id, &b->id));
    assert_true(kvl_digest_equal(&a->fingerprint, &b->fingerprint));
    assert_true(kvl_digest_equal(&a->home, &b->home));
    assert_int_equal(a->home_is_canonical, b->home_is_canonical);
    assert_int_equal(a->is_unhealed, b->is_unhealed);
    assert_int_equal(a->dtype, b->dtype);
    assert_int_equal(a->n_layers, b->n_layers);
    assert_int_equal(a->n_kv_heads, b->n_kv_heads);
    assert_int_equal(a->head_dim, b->head_dim);
    assert_int_equal(a->n_tokens, b->n_tokens);
    assert_int_equal(a->pairs, b->pairs);
    assert_int_equal(a->block_bytes, b->block_bytes);
    assert_int_equal(a->n_extra_bytes, b->n_extra_bytes);
    if (a->n_tokens > 0) assert_memory_equal(a->tokens, b->tokens, a->n_tokens * sizeof *a->tokens);
    if (a->n_extra_bytes > 0) assert_memory_equal(a->extra, b->extra, a->n_extra_bytes);
}

static void assert_blocks_equal(const kvl_container *a, const kvl_container *b)
{
    assert_int_equal(kvl_container_n_blocks(a), kvl_container_n_blocks(b));
    for (uint32_t i = 0; i < kvl_container_n_blocks(a); i++) {
        size_t n_a = 0, n_b = 0;
        const void *block_a = kvl_container_block_view(a, i, &n_a);
        const void *block_b = kvl_container_block_view(b, i, &n_b);
        assert_int_equal(n_a, n_b);
        assert_memory_equal(block_a, block_b, n_a);
    }
}

static void test_new_blocks_are_zero_and_aligned(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 50; round++) {
        sample s;
        sample_fill(&s, &random);
        /* Large enough for memory that was used before. */
        if (s.info.kind == KVL_CONTAINER_ANCHOR) s.info.block_bytes += 700000;
        kvl_container *container = NULL;
        assert_int_equal(kvl_container_create(&s.info, &container, NULL), KVL_OK);
        assert_false(kvl_container_is_sealed(container));
        for (uint32_t b = 0; b < s.info.n_layers; b++) {
            size_t n_bytes = 0;
            const uint8_t *block = kvl_container_block(container, b, &n_bytes);
            assert_int_equal(n_bytes, s.info.block_bytes);
            assert_int_equal((uintptr_t)block % KVL_ALIGNMENT, 0);
            for (size_t i = 0; i < n_bytes; i++) assert_int_equal(block[i], 0);
        }
        fill_blocks(container, &random);
        kvl_container_release(container);
    }
    kvl_container_spare_clear();
}

static void test_whole_bytes_come_back(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 300; round++) {
        sample s;
        kvl_container *made = sealed_sample(&s, &random);
        assert_info_equal(kvl_container_info_of(made), &s.info);
        size_t n_bytes = 0;
        const void *bytes = kvl_container_bytes(made, &n_bytes);
        kvl_container *read = NULL;
        assert_int_equal(kvl_container_from_bytes(bytes, n_bytes, &read, NULL), KVL_OK);
        assert_true(kvl_container_is_sealed(read));
        assert_info_equal(kvl_container_info_of(read), &s.info);
        assert_blocks_equal(made, read);
        size_t n_again = 0;
        const void *again = kvl_container_bytes(read, &n_again);
        assert_int_equal(n_again, n_bytes);
        assert_memory_equal(again, bytes, n_bytes);
        kvl_container_release(read);
        kvl_container_release(made);
    }
}

static void test_header_and_blocks_come_back_one_by_one(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 300; round++) {
        sample s;
        kvl_container *made = sealed_sample(&s, &random);
        size_t n_header = 0;
        const void *header = kvl_container_header(made, &n_header);
        kvl_container *read = NULL;
        assert_int_equal(kvl_container_from_header(header, n_header, &read, NULL), KVL_OK);
        const uint32_t n_blocks = kvl_container_n_blocks(made);
        const uint32_t first = kvl_test_below(&random, n_blocks);
        for (uint32_t i = 0; i < n_blocks; i++) {
            const uint32_t block = (first + i) % n_blocks;
            size_t n_bytes = 0;
            const void *from = kvl_container_block_view(made, block, &n_bytes);
            assert_false(kvl_container_is_sealed(read));
            uint8_t *to = kvl_container_block(read, block, &n_bytes);
            memcpy(to, from, n_bytes);
            to[n_bytes / 2] ^= 1;
            assert_int_equal(kvl_container_block_check(read, block, NULL), KVL_ERR_DAMAGED);
            to[n_bytes / 2] ^= 1;
            assert_int_equal(kvl_container_block_check(read, block, NULL), KVL_OK);
            assert_int_equal(kvl_container_block_check(read, block, NULL), KVL_OK);
        }
        assert_true(kvl_container_is_sealed(read));
        kvl_container_seal(read);
        size_t n_a = 0, n_b = 0;
        const void *a = kvl_container_bytes(made, &n_a);
        const void *b = kvl_container_bytes(read, &n_b);
        assert_int_equal(n_a, n_b);
        assert_memory_equal(a, b, n_a);
        kvl_container_release(read);
        kvl_container_release(made);
    }
}

static void count_release(void *context)
{
    ++*(int *)context;
}

static void test_borrowed_bytes_are_released_once(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    sample s;
    kvl_container *made = sealed_sample(&s, &random);
    size_t n_bytes = 0;
    const uint8_t *bytes = kvl_container_bytes(made, &n_bytes);
    int n_released = 0;
    kvl_container *view = NULL;
    assert_int_equal(
        kvl_container_borrow(bytes, n_bytes - 1, count_release, &n_released, &view, NULL),
        KVL_ERR_DAMAGED);
    assert_null(view);
    assert_int_equal(n_released, 0);
    assert_int_equal(kvl_container_borrow(bytes, n_bytes, count_release, &n_released, &view, NULL),
                     KVL_OK);
    assert_ptr_equal(kvl_container_bytes(view, &n_bytes), bytes);
    for (uint32_t i = 0; i < kvl_container_n_blocks(view); i++)
        assert_int_equal(kvl_container_block_check(view, i, NULL), KVL_OK);
    kvl_container_share(view);
    kvl_container_release(view);
    assert_int_equal(n_released, 0);
    kvl_container_release(view);
    assert_int_equal(n_released, 1);
    kvl_container_release(made);
    kvl_container_release(NULL);
}

/* Every byte of the file counts: none can change without notice. */
static void test_any_flipped_bit_is_noticed(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 6; round++) {
        sample s;
        kvl_container *made = sealed_sample(&s, &random);
        size_t n_bytes = 0, n_header = 0;
        (void)kvl_container_header(made, &n_header);
        const void *bytes = kvl_container_bytes(made, &n_bytes);
        uint8_t *copy = kvl_alloc(n_bytes);
        memcpy(copy, bytes, n_bytes);
        const size_t n_flips = n_bytes < 6000 ? n_bytes : 6000;
        for (size_t i = 0; i < n_flips; i++) {
            const size_t at = n_flips == n_bytes ? i : kvl_test_below(&random, (uint32_t)n_bytes);
            const uint8_t bit = (uint8_t)(1u << kvl_test_below(&random, 8));
            copy[at] ^= bit;
            kvl_container *read = NULL;
            assert_int_equal(kvl_container_from_bytes(copy, n_bytes, &read, NULL), KVL_ERR_DAMAGED);
            assert_null(read);
            if (at < n_header) {
                assert_int_equal(kvl_container_from_header(copy, n_header, &read, NULL),
                                 KVL_ERR_DAMAGED);
                assert_int_equal(kvl_container_copy(copy, n_bytes, false, &read, NULL),
                                 KVL_ERR_DAMAGED);
            }
            copy[at] ^= bit;
        }
        kvl_free(copy);
        kvl_container_release(made);
    }
}

static void test_any_other_length_is_refused(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    sample s;
    kvl_container *made = sealed_sample(&s, &random);
    size_t n_bytes = 0, n_header = 0;
    (void)kvl_container_header(made, &n_header);
    const void *bytes = kvl_container_bytes(made, &n_bytes);
    for (size_t n = 0; n <= n_bytes + 64; n++) {
        /* Memory of exactly that size, so that a read behind it is caught. */
        uint8_t *copy = kvl_alloc(n + 1);
        memcpy(copy + 1, bytes, n < n_bytes ? n : n_bytes);
        kvl_container *read = NULL;
        const kvl_status whole = kvl_container_from_bytes(copy + 1, n, &read, NULL);
        assert_int_equal(whole, n == n_bytes ? KVL_OK : KVL_ERR_DAMAGED);
        kvl_container_release(read);
        const kvl_status header = kvl_container_from_header(copy + 1, n, &read, NULL);
        assert_int_equal(header, n == n_header ? KVL_OK : KVL_ERR_DAMAGED);
        kvl_container_release(read);
        kvl_free(copy);
    }
    kvl_container_release(made);
}

static void resign_preamble(uint8_t *bytes)
{
    const uint64_t checksum = kvl_checksum(bytes, AT_CHECKSUM);
    memcpy(bytes + AT_CHECKSUM, &checksum, sizeof checksum);
}

static void test_other_version_is_foreign(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    sample s;
    kvl_container *made = sealed_sample(&s, &random);
    size_t n_bytes = 0;
    const void *bytes = kvl_container_bytes(made, &n_bytes);
    uint8_t *copy = kvl_alloc(n_bytes);
    memcpy(copy, bytes, n_bytes);
    const uint32_t version = 37;
    memcpy(copy + AT_VERSION, &version, sizeof version);
    resign_preamble(copy);
    kvl_container *read = NULL;
    kvl_error error;
    assert_int_equal(kvl_container_from_bytes(copy, n_bytes, &read, &error), KVL_ERR_FOREIGN);
    assert_non_null(strstr(error.text, "37"));
    assert_non_null(strstr(error.text, "reads 1"));
    kvl_free(copy);
    kvl_container_release(made);
}

/* Numbers of the preamble set to extremes, with a checksum that fits: sizes are still not
 * believed. */
static void test_hostile_sizes_are_refused(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 3000; round++) {
        sample s;
        kvl_container *made = sealed_sample(&s, &random);
        size_t n_bytes = 0;
        const void *bytes = kvl_container_bytes(made, &n_bytes);
        uint8_t *copy = kvl_alloc(n_bytes);
        memcpy(copy, bytes, n_bytes);
        const uint32_t extremes[] = {0,          1,          0x7fffffff, 0x80000000,
                                     0xffffffff, 0xffffffc0, 1u << 20};
        const size_t at = 12 + 4 * (size_t)kvl_test_below(&random, 11);
        uint32_t value = extremes[kvl_test_below(&random, 7)];
        if (kvl_test_below(&random, 3) == 0) memcpy(&value, copy + at, sizeof value);
        if (kvl_test_below(&random, 3) == 0) value += kvl_test_below(&random, 200) - 100;
        const bool is_same = memcmp(copy + at, &value, sizeof value) == 0;
        memcpy(copy + at, &value, sizeof value);
        resign_preamble(copy);
        kvl_container *read = NULL;
        const kvl_status status = kvl_container_from_bytes(copy, n_bytes, &read, NULL);
        if (is_same) {
            assert_int_equal(status, KVL_OK);
        } else {
            assert_true(status == KVL_ERR_DAMAGED || status == KVL_ERR_TOO_LARGE);
        }
        kvl_container_release(read);
        kvl_free(copy);
        kvl_container_release(made);
    }
}

static void expect_refused(const kvl_container_info *good, const kvl_container_info *bad,
                           const char *word)
{
    kvl_container *container = NULL;
    kvl_error error;
    assert_int_equal(kvl_container_create(good, &container, &error), KVL_OK);
    kvl_container_release(container);
    const kvl_status status = kvl_container_create(bad, &container, &error);
    assert_true(status == KVL_ERR_OUT_OF_RANGE || status == KVL_ERR_TOO_LARGE);
    assert_null(container);
    if (strstr(error.text, word) == NULL) fail_msg("'%s' does not name %s", error.text, word);
}

static void test_fields_out_of_range_are_named(void **state)
{
    (void)state;
    const uint32_t tokens[2] = {1, 2};
    const kvl_container_info good = {
        .kind = KVL_CONTAINER_SEGMENT,
        .dtype = KVL_KV_F16,
        .n_layers = 2,
        .n_kv_heads = 3,
        .head_dim = 4,
        .n_tokens = 2,
        .tokens = tokens,
        .block_bytes = 2 * 3 * 4 * 2 * 2,
    };
    kvl_container_info bad = good;
    bad.kind = (kvl_container_kind)3;
    expect_refused(&good, &bad, "kind");
    bad = good, bad.dtype = (kvl_kv_dtype)9;
    expect_refused(&good, &bad, "dtype");
    bad = good, bad.n_layers = 0;
    expect_refused(&good, &bad, "n_layers");
    bad = good, bad.n_layers = KVL_CONTAINER_LAYERS_MAX + 1;
    expect_refused(&good, &bad, "n_layers");
    bad = good, bad.n_kv_heads = 0;
    expect_refused(&good, &bad, "n_kv_heads");
    bad = good, bad.head_dim = KVL_CONTAINER_HEAD_DIM_MAX + 1;
    expect_refused(&good, &bad, "head_dim");
    bad = good, bad.n_tokens = 0;
    expect_refused(&good, &bad, "n_tokens");
    bad = good, bad.n_tokens = KVL_SEGMENT_TOKENS_MAX + 1;
    expect_refused(&good, &bad, "n_tokens");
    bad = good, bad.block_bytes++;
    expect_refused(&good, &bad, "block_bytes");
    bad = good, bad.n_extra_bytes = KVL_CONTAINER_EXTRA_BYTES_MAX + 1;
    expect_refused(&good, &bad, "extra");
    bad = good, bad.kind = KVL_CONTAINER_ANCHOR, bad.n_layers = 1024;
    bad.block_bytes = (uint64_t)1 << 30;
    expect_refused(&good, &bad, "bytes");
}

static void test_the_longest_header_is_taken(void **state)
{
    (void)state;
    uint32_t *tokens = kvl_alloc(KVL_SEGMENT_TOKENS_MAX * sizeof *tokens);
    uint8_t *extra = kvl_alloc_zero(KVL_CONTAINER_EXTRA_BYTES_MAX, 1);
    for (size_t i = 0; i < KVL_SEGMENT_TOKENS_MAX; i++) tokens[i] = UINT32_MAX;
    const kvl_container_info info = {
        .kind = KVL_CONTAINER_SEGMENT,
        .dtype = KVL_KV_INT8,
        .n_layers = 1,
        .n_kv_heads = 1,
        .head_dim = 1,
        .n_tokens = KVL_SEGMENT_TOKENS_MAX,
        .tokens = tokens,
        .block_bytes = 2ull * 3 * KVL_SEGMENT_TOKENS_MAX,
        .extra = extra,
        .n_extra_bytes = KVL_CONTAINER_EXTRA_BYTES_MAX,
    };
    kvl_container *made = NULL;
    kvl_container *read = NULL;
    assert_int_equal(kvl_container_create(&info, &made, NULL), KVL_OK);
    kvl_container_seal(made);
    size_t n_bytes = 0;
    const void *bytes = kvl_container_bytes(made, &n_bytes);
    assert_int_equal(kvl_container_from_bytes(bytes, n_bytes, &read, NULL), KVL_OK);
    assert_info_equal(kvl_container_info_of(read), &info);
    kvl_container_release(read);
    kvl_container_release(made);
    kvl_free(tokens);
    kvl_free(extra);
    kvl_container_spare_clear();
}

/* Appends to the message of a header what a later writer may have added, and signs all anew. */
static size_t with_more_message(const uint8_t *header, const uint8_t *more, size_t n_more,
                                uint32_t n_blocks, uint8_t *out)
{
    uint32_t message_bytes, table_at;
    memcpy(&message_bytes, header + 16, 4);
    memcpy(&table_at, header + 20, 4);
    const size_t table_bytes = 24 * (size_t)n_blocks;
    memset(out, 0, 64 << 10);
    memcpy(out, header, PREAMBLE + message_bytes);
    memcpy(out + PREAMBLE + message_bytes, more, n_more);
    message_bytes += (uint32_t)n_more;
    const uint32_t new_table_at = (PREAMBLE + message_bytes + 7) / 8 * 8;
    memcpy(out + new_table_at, header + table_at, table_bytes);
    uint32_t old_blocks_at;
    memcpy(&old_blocks_at, header + 24, 4);
    const uint32_t blocks_at = (uint32_t)(new_table_at + table_bytes + 8 + 63) / 64 * 64;
    const uint64_t moved = blocks_at - old_blocks_at;
    for (uint32_t i = 0; i <= n_blocks; i++) {
        uint8_t *at = i < n_blocks ? out + new_table_at + 24 * (size_t)i : out + 32;
        uint64_t offset;
        memcpy(&offset, at, 8);
        offset += moved;
        memcpy(at, &offset, 8);
    }
    memcpy(out + 16, &message_bytes, 4);
    memcpy(out + 20, &new_table_at, 4);
    memcpy(out + 24, &blocks_at, 4);
    uint64_t checksum = kvl_checksum(out + PREAMBLE, message_bytes);
    memcpy(out + 40, &checksum, 8);
    resign_preamble(out);
    checksum = kvl_checksum(out, new_table_at + table_bytes);
    memcpy(out + new_table_at + table_bytes, &checksum, 8);
    return blocks_at;
}

static void test_unknown_fields_are_tolerated_in_measure(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    sample s;
    kvl_container *made = sealed_sample(&s, &random);
    size_t n_header = 0;
    const uint8_t *header = kvl_container_header(made, &n_header);
    uint8_t *out = kvl_alloc(64 << 10);
    const uint8_t some[] = {0xf8, 0x01, 0x05, 0xc2, 0x3e,
                            0x03, 'a',  'b',  'c'}; /* fields 31, 1000 */
    size_t n = with_more_message(header, some, sizeof some, s.info.n_layers, out);
    kvl_container *read = NULL;
    kvl_error error = {.text = ""};
    if (kvl_container_from_header(out, n, &read, &error) != KVL_OK) fail_msg("%s", error.text);
    assert_info_equal(kvl_container_info_of(read), &s.info);
    kvl_container_release(read);

    /* Thousands of them would take many times their size in memory. */
    uint8_t many[39999];
    for (size_t i = 0; i < sizeof many; i += 3) memcpy(many + i, "\xf8\x01\x05", 3);
    n = with_more_message(header, many, sizeof many, s.info.n_layers, out);
    assert_int_equal(kvl_container_from_header(out, n, &read, &error), KVL_ERR_DAMAGED);
    assert_non_null(strstr(error.text, "cannot be read"));
    assert_null(read);
    n = with_more_message(header, many, 999, s.info.n_layers, out);
    assert_int_equal(kvl_container_from_header(out, n, &read, &error), KVL_OK);
    kvl_container_release(read);
    kvl_free(out);
    kvl_container_release(made);
}

static void test_failing_allocations_leave_nothing(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    sample s;
    kvl_container *made = sealed_sample(&s, &random);
    size_t n_bytes = 0, n_header = 0;
    const void *bytes = kvl_container_bytes(made, &n_bytes);
    const void *header = kvl_container_header(made, &n_header);
    const int64_t live = kvl_alloc_live();
    for (int which = 0; which < 4; which++) {
        kvl_status status = KVL_ERR_NO_MEMORY;
        for (int64_t n = 0; status != KVL_OK; n++) {
            assert_true(n < 100);
            int n_released = 0;
            kvl_container *container = NULL;
            kvl_alloc_fail_after(n);
            switch (which) {
            case 0: status = kvl_container_create(&s.info, &container, NULL); break;
            case 1: status = kvl_container_from_header(header, n_header, &container, NULL); break;
            case 2: status = kvl_container_from_bytes(bytes, n_bytes, &container, NULL); break;
            default:
                status = kvl_container_borrow(bytes, n_bytes, count_release, &n_released,
                                              &container, NULL);
            }
            kvl_alloc_fail_after(-1);
            assert_true(status == KVL_OK || status == KVL_ERR_NO_MEMORY);
            assert_true((status == KVL_OK) == (container != NULL));
            kvl_container_release(container);
            assert_int_equal(kvl_alloc_live(), live);
        }
    }
    kvl_container_release(made);
}

static void *share_and_release(void *context)
{
    kvl_container *container = context;
    for (int i = 0; i < 20000; i++) {
        kvl_container_share(container);
        kvl_container_release(container);
    }
    kvl_container_release(container);
    return NULL;
}

static void test_references_count_across_threads(void **state)
{
    (void)state;
    enum { THREADS = 4 };
    kvl_random random = kvl_test_random();
    sample s;
    kvl_container *made = sealed_sample(&s, &random);
    size_t n_bytes = 0;
    const void *bytes = kvl_container_bytes(made, &n_bytes);
    int n_released = 0;
    kvl_container *view = NULL;
    assert_int_equal(kvl_container_borrow(bytes, n_bytes, count_release, &n_released, &view, NULL),
                     KVL_OK);
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) {
        kvl_container_share(view);
        assert_int_equal(pthread_create(&threads[i], NULL, share_and_release, view), 0);
    }
    for (int i = 0; i < THREADS; i++) (void)pthread_join(threads[i], NULL);
    assert_int_equal(n_released, 0);
    kvl_container_release(view);
    assert_int_equal(n_released, 1);
    kvl_container_release(made);
}

static void *make_and_end(void *context)
{
    const uint8_t mark = *(const uint8_t *)context;
    for (int i = 0; i < 40; i++) {
        const kvl_container_info info = {
            .kind = KVL_CONTAINER_ANCHOR,
            .dtype = KVL_KV_INT8,
            .n_layers = 1 + (uint32_t)i % 3,
            .n_kv_heads = 1,
            .head_dim = 1,
            .block_bytes = (1u << 20) + 64,
        };
        kvl_container *container = NULL;
        if (kvl_container_create(&info, &container, NULL) != KVL_OK) return NULL;
        size_t n_bytes = 0;
        uint8_t *block = kvl_container_block(container, 0, &n_bytes);
        bool is_zero = true;
        for (size_t k = 0; k < n_bytes; k += 997) is_zero &= block[k] == 0;
        memset(block, mark, n_bytes);
        for (size_t k = 0; k < n_bytes; k += 997) is_zero &= block[k] == mark;
        kvl_container_release(container);
        if (!is_zero) return NULL;
    }
    return context;
}

/* Kept memory is bounded, comes back clean, and is never given to two at once. */
static void test_spare_memory(void **state)
{
    (void)state;
    enum { THREADS = 4, KEPT_MAX = 4 };
    kvl_container_spare_clear();
    const int64_t live = kvl_alloc_live();
    uint8_t marks[THREADS] = {1, 2, 3, 4};
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, make_and_end, &marks[i]), 0);
    for (int i = 0; i < THREADS; i++) {
        void *result = NULL;
        (void)pthread_join(threads[i], &result);
        assert_ptr_equal(result, &marks[i]);
    }
    assert_true(kvl_alloc_live() > live);
    assert_true(kvl_alloc_live() <= live + KEPT_MAX);
    kvl_container_spare_clear();
    assert_int_equal(kvl_alloc_live(), live);
}

/* Memory that held something else: what was received into it still has zeros between its blocks. */
static void test_padding_is_zero_in_used_memory(void **state)
{
    (void)state;
    const kvl_container_info info = {
        .kind = KVL_CONTAINER_ANCHOR,
        .dtype = KVL_KV_INT8,
        .n_layers = 3,
        .n_kv_heads = 1,
        .head_dim = 1,
        .block_bytes = (1u << 20) + 1,
    };
    kvl_container *made = NULL, *used = NULL, *read = NULL;
    assert_int_equal(kvl_container_create(&info, &made, NULL), KVL_OK);
    kvl_container_seal(made);
    assert_int_equal(kvl_container_create(&info, &used, NULL), KVL_OK);
    size_t n_bytes = 0, n_header = 0;
    uint8_t *start = kvl_container_block(used, 0, &n_bytes);
    memset(start, 0xff, 3 * (n_bytes + 63));
    kvl_container_release(used);
    const void *header = kvl_container_header(made, &n_header);
    assert_int_equal(kvl_container_from_header(header, n_header, &read, NULL), KVL_OK);
    assert_ptr_equal(kvl_container_block(read, 0, &n_bytes), start);
    for (uint32_t i = 0; i < 3; i++) {
        const void *block = kvl_container_block_view(made, i, &n_bytes);
        memcpy(kvl_container_block(read, i, &n_bytes), block, n_bytes);
        assert_int_equal(kvl_container_block_check(read, i, NULL), KVL_OK);
    }
    kvl_container_release(read);
    kvl_container_release(made);
    kvl_container_spare_clear();
}

static void test_segment_id(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    uint8_t key[KVL_DIGEST_BYTES];
    for (size_t i = 0; i < sizeof key; i++) key[i] = (uint8_t)kvl_random_next(&random);
    const kvl_digest fingerprint = any_digest(&random);
    const kvl_digest home = any_digest(&random);
    uint32_t tokens[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    const kvl_digest id = kvl_segment_id(key, &fingerprint, &home, tokens, 8);
    kvl_digest other = kvl_segment_id(key, &fingerprint, &home, tokens, 8);
    assert_true(kvl_digest_equal(&id, &other));
    other = kvl_segment_id(key, &fingerprint, &home, tokens, 9);
    assert_false(kvl_digest_equal(&id, &other));
    other = kvl_segment_id(key, &fingerprint, &home, tokens, 7);
    assert_false(kvl_digest_equal(&id, &other));
    other = kvl_segment_id(key, &home, &fingerprint, tokens, 8);
    assert_false(kvl_digest_equal(&id, &other));
    tokens[7] ^= 1u << 31;
    other = kvl_segment_id(key, &fingerprint, &home, tokens, 8);
    assert_false(kvl_digest_equal(&id, &other));
    tokens[7] ^= 1u << 31;
    key[31] ^= 0x80;
    other = kvl_segment_id(key, &fingerprint, &home, tokens, 8);
    assert_false(kvl_digest_equal(&id, &other));
    other = kvl_segment_id(key, &fingerprint, &home, NULL, 0);
    assert_false(kvl_digest_is_zero(&other));
}

/* The container that the Python reader knows: the number of layer l, token t, head h, dimension d
 * is ((l * 7 + t * 5 + h * 3 + d * 11 + 131 * is_value) % 255 - 127) / 16. */
static int write_example(const char *path, kvl_kv_dtype dtype)
{
    enum { LAYERS = 3, HEADS = 2, TOKENS = 5, DIM = 8, N = HEADS * TOKENS * DIM };
    uint32_t tokens[TOKENS];
    for (uint32_t t = 0; t < TOKENS; t++) tokens[t] = t * t * 40000 + 7;
    kvl_container_info info = {
        .kind = KVL_CONTAINER_SEGMENT,
        .dtype = dtype,
        .n_layers = LAYERS,
        .n_kv_heads = HEADS,
        .head_dim = DIM,
        .n_tokens = TOKENS,
        .tokens = tokens,
        .pairs = 1,
        .home_is_canonical = true,
        .extra = "example",
        .n_extra_bytes = 7,
    };
    for (size_t i = 0; i < KVL_DIGEST_BYTES; i++) {
        info.id.bytes[i] = (uint8_t)i;
        info.fingerprint.bytes[i] = (uint8_t)(255 - i);
        info.home.bytes[i] = (uint8_t)(3 * i + 1);
    }
    kvl_container *container = NULL;
    if (!kvl_segment_block_bytes(dtype, HEADS, TOKENS, DIM, &info.block_bytes)) return 1;
    if (kvl_container_create(&info, &container, NULL) != KVL_OK) return 1;
    for (int l = 0; l < LAYERS; l++) {
        float rows[2][N];
        for (int i = 0; i < 2 * N; i++) {
            const int t = i % N / (HEADS * DIM), h = i % (HEADS * DIM) / DIM, d = i % DIM;
            const int step = (l * 7 + t * 5 + h * 3 + d * 11 + 131 * (i / N)) % 255 - 127;
            rows[i / N][i % N] = (float)step / 16;
        }
        size_t n_bytes = 0;
        kvl_segment_encode_block(dtype, HEADS, TOKENS, DIM, rows[0], rows[1],
                                 kvl_container_block(container, (uint32_t)l, &n_bytes));
    }
    kvl_container_seal(container);
    size_t n_bytes = 0;
    const void *bytes = kvl_container_bytes(container, &n_bytes);
    const kvl_status status = kvl_file_write(path, bytes, n_bytes, NULL);
    kvl_container_release(container);
    return status == KVL_OK ? 0 : 1;
}

int main(int argc, char **argv)
{
    if (argc == 3) return write_example(argv[1], (kvl_kv_dtype)strtoul(argv[2], NULL, 10));
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_new_blocks_are_zero_and_aligned),
        cmocka_unit_test(test_whole_bytes_come_back),
        cmocka_unit_test(test_header_and_blocks_come_back_one_by_one),
        cmocka_unit_test(test_borrowed_bytes_are_released_once),
        cmocka_unit_test(test_any_flipped_bit_is_noticed),
        cmocka_unit_test(test_any_other_length_is_refused),
        cmocka_unit_test(test_other_version_is_foreign),
        cmocka_unit_test(test_hostile_sizes_are_refused),
        cmocka_unit_test(test_fields_out_of_range_are_named),
        cmocka_unit_test(test_the_longest_header_is_taken),
        cmocka_unit_test(test_unknown_fields_are_tolerated_in_measure),
        cmocka_unit_test(test_failing_allocations_leave_nothing),
        cmocka_unit_test(test_references_count_across_threads),
        cmocka_unit_test(test_spare_memory),
        cmocka_unit_test(test_padding_is_zero_in_used_memory),
        cmocka_unit_test(test_segment_id),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
