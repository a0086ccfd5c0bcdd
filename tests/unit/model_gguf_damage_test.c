/* model/gguf: no change of any byte of the tables, no cut and no failing allocation leads outside
 * the file or leaks. Worth most under the address sanitizer: files are copied to memory of exactly
 * their size, and whatever opens is read to its end. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/hash.h"
#include "model/gguf.h"
#include "test_random.h"
#include "tiny_gguf.h"

/* A whole model, as small as its tokenizer lets it be. */
static kvl_gguf_bytes small_file(void)
{
    kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("llama");
    options.n_layers = 1;
    options.width = 32;
    options.feed_forward = 32;
    options.is_mixed = true;
    options.has_frequency_factors = true;
    return kvl_tiny_gguf_make(&options);
}

/* Memory of exactly the size asked for, so that a step past it is seen. */
static uint8_t *exact_copy(const uint8_t *bytes, size_t n_bytes)
{
    uint8_t *copy = kvl_alloc(n_bytes == 0 ? 1 : n_bytes);
    assert_non_null(copy);
    if (n_bytes > 0) memcpy(copy, bytes, n_bytes);
    return copy;
}

/* Reads everything that an opened file offers. A sum, so that no read can be left out. */
static uint64_t read_everything(const kvl_gguf *gguf)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < kvl_gguf_n_values(gguf); i++) {
        const kvl_gguf_value *value = kvl_gguf_value_at(gguf, i);
        sum += kvl_checksum(value->key.bytes, value->key.n_bytes);
        sum += kvl_checksum(value->bytes, value->n_bytes);
        if (value->type != KVL_GGUF_ARRAY || value->element_type != KVL_GGUF_TEXT) continue;
        kvl_gguf_texts texts = kvl_gguf_texts_of(value);
        kvl_gguf_text text;
        size_t n_texts = 0;
        while (kvl_gguf_texts_next(&texts, &text)) {
            sum += kvl_checksum(text.bytes, text.n_bytes);
            n_texts++;
        }
        assert_int_equal(n_texts, value->n_elements);
    }
    for (size_t i = 0; i < kvl_gguf_n_tensors(gguf); i++) {
        const kvl_gguf_tensor *tensor = kvl_gguf_tensor_at(gguf, i);
        sum += kvl_checksum(tensor->data, tensor->n_bytes);
    }
    return sum;
}

static void test_every_cut_is_refused(void **state)
{
    (void)state;
    kvl_gguf_bytes file = small_file();
    const int64_t live = kvl_alloc_live();
    /* All of the tables byte by byte, the data in larger steps, and its last bytes again. */
    for (size_t n = 0; n < file.n_bytes;
         n += n < file.data_at + 64 || n + 64 > file.n_bytes ? 1 : 61) {
        uint8_t *cut = exact_copy(file.bytes, n);
        kvl_gguf *gguf = NULL;
        kvl_error error = {0};
        const kvl_status status = kvl_gguf_parse(cut, n, &gguf, &error);
        if (status != KVL_ERR_MALFORMED)
            fail_msg("cut to %zu bytes: %s", n, kvl_status_name(status));
        assert_true(strlen(error.text) > 0);
        kvl_free(cut);
    }
    assert_int_equal(kvl_alloc_live(), live);
    kvl_gguf_bytes_deinit(&file);
}

/* Where sums go, so that the reading is not optimised away. */
static volatile uint64_t sum_read;

/* Opened or refused, and what is opened can be read to its end. */
static void try_damaged(const uint8_t *bytes, size_t n_bytes, size_t *n_opened)
{
    kvl_gguf *gguf = NULL;
    kvl_error error = {0};
    const kvl_status status = kvl_gguf_parse(bytes, n_bytes, &gguf, &error);
    if (status == KVL_OK) {
        sum_read = read_everything(gguf);
        (*n_opened)++;
    } else {
        assert_true(status == KVL_ERR_MALFORMED || status == KVL_ERR_TOO_LARGE ||
                    status == KVL_ERR_UNSUPPORTED);
        assert_true(strlen(error.text) > 0);
    }
    kvl_gguf_close(gguf);
}

static void test_every_changed_byte_is_refused_or_harmless(void **state)
{
    (void)state;
    kvl_gguf_bytes file = small_file();
    uint8_t *bytes = exact_copy(file.bytes, file.n_bytes);
    const int64_t live = kvl_alloc_live();
    static const uint8_t flips[] = {0x01, 0x80, 0xff};
    size_t n_opened = 0;
    for (size_t at = 0; at < file.data_at; at++) {
        for (size_t f = 0; f < sizeof flips; f++) {
            bytes[at] ^= flips[f];
            try_damaged(bytes, file.n_bytes, &n_opened);
            bytes[at] ^= flips[f];
        }
    }
    assert_memory_equal(bytes, file.bytes, file.n_bytes);
    /* Letters of texts may change, lengths and types may not: both must have happened. */
    assert_true(n_opened > 0 && n_opened < 3 * file.data_at);
    assert_int_equal(kvl_alloc_live(), live);
    kvl_free(bytes);
    kvl_gguf_bytes_deinit(&file);
}

/* Numbers that a parser gets wrong, written over whatever is there. */
static void test_hostile_numbers_anywhere_are_refused_or_harmless(void **state)
{
    (void)state;
    static const uint64_t hostile[] = {0,
                                       1,
                                       0x7f,
                                       0xff,
                                       0x7fff,
                                       0xffff,
                                       0x10000,
                                       0x7fffffff,
                                       0x80000000,
                                       0xffffffff,
                                       0x100000000,
                                       0x7fffffffffffffff,
                                       0x8000000000000000,
                                       0xffffffffffffffff,
                                       0xfffffffffffffff8,
                                       0x2000000000000001,
                                       0x0000040000000001};
    kvl_random random = kvl_test_random();
    kvl_gguf_bytes file = small_file();
    uint8_t *bytes = exact_copy(file.bytes, file.n_bytes);
    size_t n_opened = 0;
    for (int round = 0; round < 4000; round++) {
        memcpy(bytes, file.bytes, file.data_at);
        const uint32_t n_changes = 1 + kvl_test_below(&random, 3);
        for (uint32_t c = 0; c < n_changes; c++) {
            const uint64_t number =
                hostile[kvl_test_below(&random, sizeof hostile / sizeof *hostile)];
            const size_t n_bytes = (size_t)1 << kvl_test_below(&random, 4);
            const size_t at = kvl_test_below(&random, (uint32_t)(file.data_at - n_bytes));
            memcpy(bytes + at, &number, n_bytes);
        }
        try_damaged(bytes, file.n_bytes, &n_opened);
    }
    kvl_free(bytes);
    kvl_gguf_bytes_deinit(&file);
}

static void test_every_failing_allocation_is_survived(void **state)
{
    (void)state;
    kvl_gguf_bytes file = small_file();
    const int64_t live = kvl_alloc_live();
    int64_t n_allowed = 0;
    kvl_status status = KVL_ERR_NO_MEMORY;
    for (; status != KVL_OK; n_allowed++) {
        kvl_gguf *gguf = NULL;
        kvl_alloc_fail_after(n_allowed);
        status = kvl_gguf_parse(file.bytes, file.n_bytes, &gguf, NULL);
        kvl_alloc_fail_after(-1);
        assert_true(status == KVL_OK || status == KVL_ERR_NO_MEMORY);
        assert_true((status == KVL_OK) == (gguf != NULL));
        kvl_gguf_close(gguf);
        assert_int_equal(kvl_alloc_live(), live);
    }
    assert_true(n_allowed > 4);
    kvl_gguf_bytes_deinit(&file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_cut_is_refused),
        cmocka_unit_test(test_every_changed_byte_is_refused_or_harmless),
        cmocka_unit_test(test_hostile_numbers_anywhere_are_refused_or_harmless),
        cmocka_unit_test(test_every_failing_allocation_is_survived),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
