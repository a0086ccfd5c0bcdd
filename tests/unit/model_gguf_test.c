/* model/gguf: what a file says is read back, every type at its ends; whatever breaks the format is
 * refused with key, value and byte. Among the refusals are the published faults of other readers:
 * counts and products that wrap, sizes of 0, too many dimensions, alignments that are none, arrays
 * of another type than expected, arrays inside arrays without end. Damage at random has a test of
 * its own beside this one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/file.h"
#include "model/gguf.h"
#include "tiny_gguf.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* ---- help */

/* Too large for a stack with sanitizers; one at a time. */
static kvl_gguf_writer writer;

static kvl_gguf *parsed(const kvl_gguf_bytes *file)
{
    kvl_gguf *gguf = NULL;
    kvl_error error = {0};
    const kvl_status status = kvl_gguf_parse(file->bytes, file->n_bytes, &gguf, &error);
    if (status != KVL_OK) print_error("%s\n", error.text);
    assert_int_equal(status, KVL_OK);
    return gguf;
}

/* Opening what the writer holds must fail so, with all these pieces in the text. */
static void assert_refused(kvl_status wanted, const char *piece, const char *other_piece)
{
    kvl_gguf_bytes file = kvl_gguf_writer_finish(&writer);
    const int64_t live = kvl_alloc_live();
    kvl_gguf *gguf = NULL;
    kvl_error error = {0};
    assert_int_equal(kvl_gguf_parse(file.bytes, file.n_bytes, &gguf, &error), wanted);
    assert_null(gguf);
    assert_int_equal(error.status, wanted);
    if (strstr(error.text, piece) == NULL || strstr(error.text, other_piece) == NULL)
        fail_msg("\"%s\" lacks \"%s\" or \"%s\"", error.text, piece, other_piece);
    assert_int_equal(kvl_alloc_live(), live);
    kvl_gguf_bytes_deinit(&file);
}

static void add_number(const char *key, uint32_t type, uint64_t number, size_t n_bytes)
{
    kvl_gguf_buffer bytes = {0};
    kvl_gguf_put_number(&bytes, number, n_bytes);
    kvl_gguf_set_raw(&writer, key, type, bytes.bytes, n_bytes);
    kvl_gguf_buffer_deinit(&bytes);
}

static void add_f64(const char *key, double number)
{
    uint64_t bits;
    memcpy(&bits, &number, sizeof bits);
    add_number(key, KVL_WRITE_F64, bits, 8);
}

/* An array value by hand: type, count, then whatever follows. */
static void add_array(const char *key, uint32_t element_type, uint64_t n, const void *bytes,
                      size_t n_bytes)
{
    kvl_gguf_buffer value = {0};
    kvl_gguf_put_number(&value, element_type, 4);
    kvl_gguf_put_number(&value, n, 8);
    kvl_gguf_put(&value, bytes, n_bytes);
    kvl_gguf_set_raw(&writer, key, KVL_WRITE_ARRAY, value.bytes, value.n_bytes);
    kvl_gguf_buffer_deinit(&value);
}

/* `depth` arrays inside one another, the innermost of one byte. */
static void add_nested(const char *key, unsigned depth)
{
    kvl_gguf_buffer inside = {0};
    for (unsigned d = 1; d < depth; d++) {
        kvl_gguf_put_number(&inside, d + 1 < depth ? KVL_WRITE_ARRAY : KVL_WRITE_U8, 4);
        kvl_gguf_put_number(&inside, 1, 8);
    }
    kvl_gguf_put_number(&inside, 7, 1);
    add_array(key, depth > 1 ? KVL_WRITE_ARRAY : KVL_WRITE_U8, 1, inside.bytes, inside.n_bytes);
    kvl_gguf_buffer_deinit(&inside);
}

/* ---- reading back */

static void test_numbers_are_read_back(void **state)
{
    (void)state;
    kvl_gguf_writer_init(&writer);
    add_number("u8", KVL_WRITE_U8, 200, 1);
    add_number("i8", KVL_WRITE_I8, 100, 1);
    add_number("u16", KVL_WRITE_U16, 60000, 2);
    add_number("i16", KVL_WRITE_I16, 30000, 2);
    add_number("u32", KVL_WRITE_U32, 4000000000, 4);
    add_number("i32", KVL_WRITE_I32, 2000000000, 4);
    add_number("u64", KVL_WRITE_U64, 4294967295, 8);
    add_number("i64", KVL_WRITE_I64, 4294967295, 8);
    kvl_gguf_set_f32(&writer, "f32", -1.25F);
    add_f64("f64", 0.5);
    kvl_gguf_set_bool(&writer, "yes", true);
    kvl_gguf_set_bool(&writer, "no", false);
    kvl_gguf_bytes file = kvl_gguf_writer_finish(&writer);
    kvl_gguf *gguf = parsed(&file);

    static const struct {
        const char *key;
        uint32_t value;
    } integers[] = {{"u8", 200},         {"i8", 100},         {"u16", 60000},
                    {"i16", 30000},      {"u32", 4000000000}, {"i32", 2000000000},
                    {"u64", 4294967295}, {"i64", 4294967295}};
    for (size_t i = 0; i < sizeof integers / sizeof *integers; i++) {
        uint32_t value = 0;
        assert_int_equal(kvl_gguf_get_u32(gguf, integers[i].key, 0, UINT32_MAX, &value, NULL),
                         KVL_OK);
        assert_true(value == integers[i].value);
    }
    float number = 0;
    assert_int_equal(kvl_gguf_get_f32(gguf, "f32", -2, 2, &number, NULL), KVL_OK);
    assert_true(number == -1.25F);
    assert_int_equal(kvl_gguf_get_f32(gguf, "f64", -2, 2, &number, NULL), KVL_OK);
    assert_true(number == 0.5F);
    bool truth = false;
    assert_int_equal(kvl_gguf_find_bool(gguf, "yes", false, &truth, NULL), KVL_OK);
    assert_true(truth);
    assert_int_equal(kvl_gguf_find_bool(gguf, "no", true, &truth, NULL), KVL_OK);
    assert_false(truth);
    assert_int_equal(kvl_gguf_n_values(gguf), 12);
    assert_true(kvl_gguf_text_is(kvl_gguf_value_at(gguf, 4)->key, "u32"));
    kvl_gguf_close(gguf);
    kvl_gguf_bytes_deinit(&file);
}

static void test_texts_and_arrays_are_read_back(void **state)
{
    (void)state;
    const char *const texts[] = {"one", "", "three"};
    const int32_t numbers[] = {1, -2, INT32_MIN, INT32_MAX};
    kvl_gguf_writer_init(&writer);
    kvl_gguf_set_text(&writer, "text", "caf\u00e9");
    kvl_gguf_set_text(&writer, "empty", "");
    kvl_gguf_set_texts(&writer, "texts", texts, 3);
    kvl_gguf_set_texts(&writer, "no_texts", texts, 0);
    kvl_gguf_set_i32s(&writer, "numbers", numbers, 4);
    add_nested("nested", KVL_GGUF_DEPTH_MAX);
    kvl_gguf_bytes file = kvl_gguf_writer_finish(&writer);
    kvl_gguf *gguf = parsed(&file);

    kvl_gguf_text text;
    assert_int_equal(kvl_gguf_get_text(gguf, "text", &text, NULL), KVL_OK);
    assert_true(kvl_gguf_text_is(text, "caf\u00e9"));
    assert_false(kvl_gguf_text_is(text, "caf"));
    assert_int_equal(kvl_gguf_find_text(gguf, "empty", &text, NULL), KVL_OK);
    assert_true(text.bytes != NULL && text.n_bytes == 0 && kvl_gguf_text_is(text, ""));
    assert_int_equal(kvl_gguf_find_text(gguf, "absent", &text, NULL), KVL_OK);
    assert_null(text.bytes);
    const kvl_gguf_value *array = NULL;
    assert_int_equal(kvl_gguf_get_array(gguf, "texts", KVL_GGUF_TEXT, 3, 3, &array, NULL), KVL_OK);
    kvl_gguf_texts walk = kvl_gguf_texts_of(array);
    for (size_t i = 0; i < 3; i++) {
        assert_true(kvl_gguf_texts_next(&walk, &text));
        assert_true(kvl_gguf_text_is(text, texts[i]));
    }
    assert_false(kvl_gguf_texts_next(&walk, &text));
    assert_int_equal(kvl_gguf_find_array(gguf, "no_texts", KVL_GGUF_TEXT, 0, 9, &array, NULL),
                     KVL_OK);
    assert_int_equal(array->n_elements, 0);
    assert_int_equal(kvl_gguf_find_array(gguf, "absent", KVL_GGUF_TEXT, 0, 9, &array, NULL),
                     KVL_OK);
    assert_null(array);
    assert_int_equal(kvl_gguf_get_array(gguf, "numbers", KVL_GGUF_I32, 1, 4, &array, NULL), KVL_OK);
    for (size_t i = 0; i < 4; i++) assert_int_equal(kvl_gguf_element_i32(array, i), numbers[i]);
    assert_int_equal(kvl_gguf_find(gguf, "nested")->element_type, KVL_GGUF_ARRAY);
    kvl_gguf_close(gguf);
    kvl_gguf_bytes_deinit(&file);
}

static void test_fallbacks_stand_in_for_missing_keys(void **state)
{
    (void)state;
    kvl_gguf_writer_init(&writer);
    kvl_gguf_bytes file = kvl_gguf_writer_finish(&writer);
    kvl_gguf *gguf = parsed(&file);
    uint32_t integer = 0;
    float number = 0;
    bool truth = false;
    assert_int_equal(kvl_gguf_find_u32(gguf, "x", 0, 1, 77, &integer, NULL), KVL_OK);
    assert_int_equal(integer, 77);
    assert_int_equal(kvl_gguf_find_f32(gguf, "x", 0, 1, 2.5F, &number, NULL), KVL_OK);
    assert_true(number == 2.5F);
    assert_int_equal(kvl_gguf_find_bool(gguf, "x", true, &truth, NULL), KVL_OK);
    assert_true(truth);
    kvl_error error = {0};
    assert_int_equal(kvl_gguf_get_u32(gguf, "x", 0, 1, &integer, &error), KVL_ERR_MALFORMED);
    assert_non_null(strstr(error.text, "key x is missing"));
    kvl_gguf_text text;
    const kvl_gguf_value *array = NULL;
    assert_int_equal(kvl_gguf_get_f32(gguf, "x", 0, 1, &number, NULL), KVL_ERR_MALFORMED);
    assert_int_equal(kvl_gguf_get_text(gguf, "x", &text, NULL), KVL_ERR_MALFORMED);
    assert_int_equal(kvl_gguf_get_array(gguf, "x", KVL_GGUF_I32, 0, 1, &array, NULL),
                     KVL_ERR_MALFORMED);
    assert_null(kvl_gguf_find_tensor(gguf, "x"));
    kvl_gguf_close(gguf);
    kvl_gguf_bytes_deinit(&file);
}

/* Every integer type at its ends, against a range: only what fits comes through. */
static void test_integers_outside_their_range_are_refused(void **state)
{
    (void)state;
    static const struct {
        uint32_t type;
        size_t n_bytes;
        uint64_t bits;
        kvl_status wanted; /* for the range 10 .. 1000 */
        const char *text;
    } cases[] = {
        {KVL_WRITE_U8, 1, 9, KVL_ERR_MALFORMED, "is 9 "},
        {KVL_WRITE_U8, 1, 10, KVL_OK, ""},
        {KVL_WRITE_U16, 2, 1000, KVL_OK, ""},
        {KVL_WRITE_U16, 2, 1001, KVL_ERR_TOO_LARGE, "is 1001 "},
        {KVL_WRITE_I8, 1, 0xff, KVL_ERR_MALFORMED, "is -1 "},
        {KVL_WRITE_I8, 1, 0x80, KVL_ERR_MALFORMED, "is -128 "},
        {KVL_WRITE_I16, 2, 0x8000, KVL_ERR_MALFORMED, "is -32768 "},
        {KVL_WRITE_I32, 4, 0x80000000, KVL_ERR_MALFORMED, "is -2147483648 "},
        {KVL_WRITE_I64, 8, UINT64_MAX, KVL_ERR_MALFORMED, "is -1 "},
        {KVL_WRITE_I64, 8, (uint64_t)1 << 63, KVL_ERR_MALFORMED, "is -9223372036854775808 "},
        {KVL_WRITE_U64, 8, UINT64_MAX, KVL_ERR_TOO_LARGE, "is 18446744073709551615 "},
        /* Its low 32 bits would be in range. */
        {KVL_WRITE_U64, 8, ((uint64_t)1 << 32) + 500, KVL_ERR_TOO_LARGE, "is 4294967796 "},
        {KVL_WRITE_F32, 4, 500, KVL_ERR_MALFORMED, "of type float32"},
        {KVL_WRITE_BOOL, 1, 1, KVL_ERR_MALFORMED, "of type bool"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kvl_gguf_writer_init(&writer);
        add_number("n", cases[i].type, cases[i].bits, cases[i].n_bytes);
        kvl_gguf_bytes file = kvl_gguf_writer_finish(&writer);
        kvl_gguf *gguf = parsed(&file);
        uint32_t value = 7;
        kvl_error error = {0};
        assert_int_equal(kvl_gguf_get_u32(gguf, "n", 10, 1000, &value, &error), cases[i].wanted);
        if (cases[i].wanted != KVL_OK) assert_int_equal(value, 7);
        assert_non_null(strstr(error.text, cases[i].text));
        kvl_gguf_close(gguf);
        kvl_gguf_bytes_deinit(&file);
    }
}

static void test_floats_outside_their_range_are_refused(void **state)
{
    (void)state;
    static const struct {
        double number;
        kvl_status wanted; /* for the range 1 .. 100 */
    } cases[] = {{1, KVL_OK},
                 {100, KVL_OK},
                 {0.999, KVL_ERR_MALFORMED},
                 {-5, KVL_ERR_MALFORMED},
                 {100.001, KVL_ERR_TOO_LARGE},
                 {1e300, KVL_ERR_TOO_LARGE}, /* no float holds it */
                 {(double)INFINITY, KVL_ERR_TOO_LARGE},
                 {-(double)INFINITY, KVL_ERR_MALFORMED},
                 {(double)NAN, KVL_ERR_MALFORMED}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kvl_gguf_writer_init(&writer);
        kvl_gguf_set_f32(&writer, "f32", (float)fmin(fmax(cases[i].number, -1e30), 1e30));
        if (isnan(cases[i].number)) kvl_gguf_set_f32(&writer, "f32", NAN);
        add_f64("f64", cases[i].number);
        kvl_gguf_set_u32(&writer, "integer", 50);
        kvl_gguf_bytes file = kvl_gguf_writer_finish(&writer);
        kvl_gguf *gguf = parsed(&file);
        float value = 7;
        assert_int_equal(kvl_gguf_get_f32(gguf, "f32", 1, 100, &value, NULL), cases[i].wanted);
        assert_int_equal(kvl_gguf_get_f32(gguf, "f64", 1, 100, &value, NULL), cases[i].wanted);
        assert_int_equal(kvl_gguf_get_f32(gguf, "integer", 1, 100, &value, NULL),
                         KVL_ERR_MALFORMED);
        if (cases[i].wanted != KVL_OK) assert_true(value == 7);
        kvl_gguf_close(gguf);
        kvl_gguf_bytes_deinit(&file);
    }
}

/* The class of faults that cast an array to what it should be, whatever it says it is. */
static void test_values_of_another_type_are_refused(void **state)
{
    (void)state;
    const uint8_t bytes[4] = {1, 2, 3, 4};
    const char *const texts[] = {"a", "b"};
    kvl_gguf_writer_init(&writer);
    add_array("narrow", KVL_WRITE_U8, 4, bytes, 4);
    kvl_gguf_set_texts(&writer, "texts", texts, 2);
    kvl_gguf_set_u32(&writer, "number", 1);
    kvl_gguf_bytes file = kvl_gguf_writer_finish(&writer);
    kvl_gguf *gguf = parsed(&file);
    const kvl_gguf_value *array = NULL;
    kvl_gguf_text text;
    bool truth = false;
    uint32_t integer = 0;
    kvl_error error = {0};
    assert_int_equal(kvl_gguf_get_array(gguf, "narrow", KVL_GGUF_I32, 0, 9, &array, &error),
                     KVL_ERR_MALFORMED);
    assert_non_null(strstr(error.text, "array of uint8"));
    assert_int_equal(kvl_gguf_get_array(gguf, "number", KVL_GGUF_U32, 0, 9, &array, NULL),
                     KVL_ERR_MALFORMED);
    assert_int_equal(kvl_gguf_get_array(gguf, "texts", KVL_GGUF_TEXT, 3, 9, &array, &error),
                     KVL_ERR_MALFORMED);
    assert_non_null(strstr(error.text, "key texts has 2 elements at byte"));
    assert_int_equal(kvl_gguf_get_array(gguf, "texts", KVL_GGUF_TEXT, 0, 1, &array, NULL),
                     KVL_ERR_TOO_LARGE);
    assert_int_equal(kvl_gguf_get_text(gguf, "texts", &text, NULL), KVL_ERR_MALFORMED);
    assert_int_equal(kvl_gguf_find_bool(gguf, "number", true, &truth, NULL), KVL_ERR_MALFORMED);
    assert_int_equal(kvl_gguf_get_u32(gguf, "narrow", 0, 9, &integer, NULL), KVL_ERR_MALFORMED);
    assert_null(array);
    kvl_gguf_close(gguf);
    kvl_gguf_bytes_deinit(&file);
}

static void test_tensors_are_read_back(void **state)
{
    (void)state;
    const float numbers[64] = {1, 2, 3, [63] = 64};
    const size_t alignments[] = {8, 32, 256};
    for (size_t i = 0; i < 3; i++) {
        kvl_gguf_writer_init(&writer);
        writer.version = i == 0 ? 2 : 3;
        writer.alignment = alignments[i];
        kvl_gguf_set_u32(&writer, "general.alignment", (uint32_t)alignments[i]);
        kvl_gguf_set_tensor(&writer, "zeta", 5, 0, KVL_DTYPE_F16, numbers);
        kvl_gguf_set_tensor(&writer, "alpha", 2, 32, KVL_DTYPE_F32, numbers);
        kvl_gguf_set_tensor(&writer, "beta", 2, 32, KVL_DTYPE_Q4_1, numbers);
        kvl_gguf_bytes file = kvl_gguf_writer_finish(&writer);
        kvl_gguf *gguf = parsed(&file);
        assert_int_equal(kvl_gguf_n_tensors(gguf), 3);
        const kvl_gguf_tensor *zeta = kvl_gguf_find_tensor(gguf, "zeta");
        assert_ptr_equal(zeta, kvl_gguf_tensor_at(gguf, 0));
        assert_int_equal(zeta->dtype, KVL_DTYPE_F16);
        assert_int_equal(zeta->n_bytes, 10);
        assert_int_equal(zeta->offset, file.data_at);
        const kvl_gguf_tensor *alpha = kvl_gguf_find_tensor(gguf, "alpha");
        assert_int_equal(alpha->n_dimensions, 2);
        assert_int_equal(alpha->sizes[0], 32);
        assert_int_equal(alpha->sizes[1], 2);
        assert_int_equal(alpha->sizes[2], 1);
        assert_int_equal((uintptr_t)(alpha->data - file.bytes) % alignments[i], 0);
        assert_memory_equal(alpha->data, numbers, sizeof numbers);
        assert_int_equal(kvl_gguf_find_tensor(gguf, "beta")->n_bytes, 2 * 20);
        assert_null(kvl_gguf_find_tensor(gguf, "alph"));
        assert_null(kvl_gguf_find_tensor(gguf, "alphas"));
        kvl_gguf_close(gguf);
        kvl_gguf_bytes_deinit(&file);
    }
}

static void test_files_are_opened_from_disk(void **state)
{
    (void)state;
    char path[] = "/tmp/kvloom-gguf-XXXXXX";
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    (void)close(fd);
    const kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("qwen2");
    kvl_tiny_gguf_save(&options, path);
    kvl_gguf *gguf = NULL;
    assert_int_equal(kvl_gguf_open(path, &gguf, NULL), KVL_OK);
    assert_non_null(kvl_gguf_find_tensor(gguf, "blk.1.attn_k.bias"));
    kvl_gguf_close(gguf);
    assert_int_equal(kvl_file_write(path, "", 0, NULL), KVL_OK);
    kvl_error error = {0};
    assert_int_equal(kvl_gguf_open(path, &gguf, &error), KVL_ERR_MALFORMED);
    assert_non_null(strstr(error.text, "the file ends at byte 0"));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(kvl_gguf_open(path, &gguf, NULL), KVL_ERR_NOT_FOUND);
    kvl_gguf_close(NULL);
}

/* ---- refusals */

static void test_foreign_headers_are_refused(void **state)
{
    (void)state;
    static const struct {
        uint32_t version;
        const char *piece;
    } versions[] = {{1, "the version is 1 at byte 4"},
                    {4, "the version is 4 at byte 4; supported are 2 and 3"},
                    {0, "the version is 0"},
                    {3u << 24, "big-endian"}};
    for (size_t i = 0; i < sizeof versions / sizeof *versions; i++) {
        kvl_gguf_writer_init(&writer);
        writer.version = versions[i].version;
        assert_refused(KVL_ERR_UNSUPPORTED, versions[i].piece, "byte 4");
    }
    kvl_gguf *gguf = NULL;
    kvl_error error = {0};
    _Alignas(8) const uint8_t other[24] = "PK\003\004 and more than that";
    assert_int_equal(kvl_gguf_parse(other, sizeof other, &gguf, &error), KVL_ERR_MALFORMED);
    assert_non_null(strstr(error.text, "starts with bytes 50 4b 03 04"));
    assert_int_equal(kvl_gguf_parse(NULL, 0, &gguf, &error), KVL_ERR_MALFORMED);
}

static void test_counts_beyond_the_file_are_refused(void **state)
{
    (void)state;
    kvl_gguf_writer_init(&writer);
    writer.extra_pairs = 65537;
    assert_refused(KVL_ERR_TOO_LARGE, "the number of metadata pairs is 65537 at byte 16", "65536");
    kvl_gguf_writer_init(&writer);
    writer.extra_tensors = UINT64_MAX;
    assert_refused(KVL_ERR_TOO_LARGE, "the number of tensors is 18446744073709551615", "at byte 8");
    kvl_gguf_writer_init(&writer);
    writer.extra_pairs = 60000;
    assert_refused(KVL_ERR_MALFORMED, "the number of metadata pairs is 60000 at byte 16",
                   "more than the file");
    kvl_gguf_writer_init(&writer);
    writer.extra_tensors = 60000;
    assert_refused(KVL_ERR_MALFORMED, "the number of tensors is 60000 at byte 8",
                   "more than the file");
}

static void test_bad_alignments_are_refused(void **state)
{
    (void)state;
    static const uint32_t refused[] = {0, 1, 3, 4, 33, 1u << 21, UINT32_MAX};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        char piece[64];
        kvl_gguf_writer_init(&writer);
        kvl_gguf_set_u32(&writer, "general.alignment", refused[i]);
        (void)snprintf(piece, sizeof piece, "general.alignment is %u at byte 53", refused[i]);
        assert_refused(KVL_ERR_MALFORMED, piece, "must be a power of two from 8 to 1048576");
    }
    kvl_gguf_writer_init(&writer);
    kvl_gguf_set_text(&writer, "general.alignment", "32");
    assert_refused(KVL_ERR_MALFORMED, "key general.alignment is of type text",
                   "must be an integer");
}

static void test_bad_pairs_are_refused(void **state)
{
    (void)state;
    const uint8_t two = 2;
    kvl_gguf_writer_init(&writer);
    kvl_gguf_set_raw(&writer, "flag", KVL_WRITE_BOOL, &two, 1);
    assert_refused(KVL_ERR_MALFORMED, "flag is 2 at byte 40", "must be 0 or 1");
    kvl_gguf_writer_init(&writer);
    add_array("flags", KVL_WRITE_BOOL, 3, "\0\1\2", 3);
    assert_refused(KVL_ERR_MALFORMED, "flags is 2 at byte 55", "must be 0 or 1");
    kvl_gguf_writer_init(&writer);
    kvl_gguf_set_raw(&writer, "strange", 13, "12345678", 8);
    assert_refused(KVL_ERR_MALFORMED, "strange has type 13 at byte 39", "must be 0 to 12");
    kvl_gguf_writer_init(&writer);
    kvl_gguf_set_u32(&writer, "", 3);
    assert_refused(KVL_ERR_MALFORMED, "metadata key at byte 24 is empty", "");
    kvl_gguf_writer_init(&writer);
    kvl_gguf_set_u32(&writer, "same", 3);
    kvl_gguf_set_u32(&writer, "other", 3);
    kvl_gguf_add_raw(&writer, "same", KVL_WRITE_U8, "1", 1);
    assert_refused(KVL_ERR_MALFORMED, "key same is there twice", "at bytes 32 and 73");
    kvl_gguf_writer_init(&writer);
    char key[1026];
    memset(key, 'k', sizeof key - 1);
    key[sizeof key - 1] = '\0';
    kvl_gguf_set_u32(&writer, key, 3);
    assert_refused(KVL_ERR_TOO_LARGE, "a metadata key has length 1025 at byte 24", "at most 1024");
    kvl_gguf_writer_init(&writer);
    kvl_gguf_set_u32(&writer, "bell\a\n", 13);
    add_number("bell\a\n", 99, 1, 4);
    assert_refused(KVL_ERR_MALFORMED, "bell?? has type 99", "");
}

static void test_bad_texts_and_arrays_are_refused(void **state)
{
    (void)state;
    static const uint64_t lengths[] = {100, (uint64_t)1 << 32, (uint64_t)1 << 63, UINT64_MAX};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        kvl_gguf_writer_init(&writer);
        add_number("text", KVL_WRITE_TEXT, lengths[i], 8);
        assert_refused(KVL_ERR_MALFORMED, "text has length ", "bytes of the file are left");
        kvl_gguf_writer_init(&writer);
        add_array("texts", KVL_WRITE_TEXT, lengths[i], "", 0);
        assert_refused(i == 0 ? KVL_ERR_MALFORMED : KVL_ERR_TOO_LARGE, "texts", " at byte ");
        kvl_gguf_writer_init(&writer);
        add_array("numbers", KVL_WRITE_U64, lengths[i], "", 0);
        assert_refused(i == 0 ? KVL_ERR_MALFORMED : KVL_ERR_TOO_LARGE, "numbers", " at byte ");
    }
    kvl_gguf_writer_init(&writer);
    add_array("numbers", 77, 1, "12345678", 8);
    assert_refused(KVL_ERR_MALFORMED, "numbers has type 77", "must be 0 to 12");
    kvl_gguf_writer_init(&writer);
    add_nested("deep", KVL_GGUF_DEPTH_MAX + 1);
    assert_refused(KVL_ERR_TOO_LARGE, "deep has arrays inside arrays deeper than 4", "at byte ");
    kvl_gguf_writer_init(&writer);
    add_nested("deeper", 20000);
    assert_refused(KVL_ERR_TOO_LARGE, "deeper has arrays inside arrays deeper than 4", "at byte ");
}

/* Two inner arrays within the limit each, but not together. */
static void test_elements_are_counted_over_all_inner_arrays(void **state)
{
    (void)state;
    kvl_gguf_buffer inside = {0};
    uint8_t *zeros = kvl_alloc_zero(KVL_GGUF_ELEMENTS_MAX / 2 + 1, 1);
    assert_non_null(zeros);
    for (int i = 0; i < 2; i++) {
        kvl_gguf_put_number(&inside, KVL_WRITE_U8, 4);
        kvl_gguf_put_number(&inside, KVL_GGUF_ELEMENTS_MAX / 2 + 1, 8);
        kvl_gguf_put(&inside, zeros, KVL_GGUF_ELEMENTS_MAX / 2 + 1);
    }
    kvl_gguf_writer_init(&writer);
    add_array("wide", KVL_WRITE_ARRAY, 2, inside.bytes, inside.n_bytes);
    assert_refused(KVL_ERR_TOO_LARGE, "wide has 8388609 elements", "at most 16777216");
    kvl_free(zeros);
    kvl_gguf_buffer_deinit(&inside);
}

static void test_split_files_are_refused(void **state)
{
    (void)state;
    kvl_gguf_writer_init(&writer);
    add_number("split.count", KVL_WRITE_U16, 3, 2);
    assert_refused(KVL_ERR_UNSUPPORTED, "split.count is 3 at byte 47", "merge them");
    kvl_gguf_writer_init(&writer);
    add_number("split.count", KVL_WRITE_U16, 1, 2);
    kvl_gguf_bytes file = kvl_gguf_writer_finish(&writer);
    kvl_gguf_close(parsed(&file));
    kvl_gguf_bytes_deinit(&file);
}

/* One good tensor "t" of 2 x 32 Q8_0 weights, then a change to what the table says of it. */
static kvl_gguf_written_tensor *start_with_tensor(void)
{
    const float numbers[64] = {1};
    kvl_gguf_writer_init(&writer);
    kvl_gguf_set_tensor(&writer, "t", 2, 32, KVL_DTYPE_Q8_0, numbers);
    return kvl_gguf_written(&writer, "t");
}

static void test_bad_tensor_shapes_are_refused(void **state)
{
    (void)state;
    start_with_tensor()->n_dimensions = 0;
    assert_refused(KVL_ERR_MALFORMED, "tensor t has 0 dimensions at byte 33", "must be 1 to 4");
    start_with_tensor()->n_dimensions = 5;
    assert_refused(KVL_ERR_MALFORMED, "tensor t has 5 dimensions at byte 33", "must be 1 to 4");
    start_with_tensor()->n_dimensions = UINT32_MAX;
    assert_refused(KVL_ERR_MALFORMED, "tensor t has 4294967295 dimensions", "must be 1 to 4");
    start_with_tensor()->sizes[1] = 0;
    assert_refused(KVL_ERR_MALFORMED, "tensor t has size 0 in dimension 1 at byte 45", "");
    start_with_tensor()->sizes[0] = 33;
    assert_refused(KVL_ERR_MALFORMED, "tensor t has rows of 33 weights",
                   "Q8_0 needs a multiple of 32");
    /* Products that wrap to something small in 64 bits. */
    start_with_tensor()->sizes[1] = (uint64_t)1 << 63;
    assert_refused(KVL_ERR_MALFORMED, "tensor t of 32 x 9223372036854775808",
                   "larger than the file");
    start_with_tensor()->sizes[0] = (uint64_t)1 << 63;
    assert_refused(KVL_ERR_MALFORMED, "tensor t of 9223372036854775808", "larger than the file");
    kvl_gguf_written_tensor *tensor = start_with_tensor();
    tensor->n_dimensions = 4;
    tensor->sizes[1] = tensor->sizes[2] = tensor->sizes[3] = (uint64_t)1 << 32;
    assert_refused(KVL_ERR_MALFORMED, "x 4294967296 x 4294967296", "larger than the file");
    start_with_tensor()->sizes[1] = 3;
    assert_refused(KVL_ERR_MALFORMED, "tensor t has offset 0 and 102 bytes",
                   "past the end of the file");
}

static void test_bad_tensor_types_and_places_are_refused(void **state)
{
    (void)state;
    start_with_tensor()->type = 10;
    assert_refused(KVL_ERR_UNSUPPORTED, "tensor t has type 10 (Q2_K) at byte 53",
                   "supported are F32");
    start_with_tensor()->type = 4;
    assert_refused(KVL_ERR_UNSUPPORTED, "tensor t has type 4 (unknown)", "");
    start_with_tensor()->type = UINT32_MAX;
    assert_refused(KVL_ERR_UNSUPPORTED, "tensor t has type 4294967295 (unknown)", "");
    static const uint64_t offsets[] = {32, 4096, (uint64_t)1 << 40, UINT64_MAX - 31};
    for (size_t i = 0; i < sizeof offsets / sizeof *offsets; i++) {
        kvl_gguf_written_tensor *tensor = start_with_tensor();
        tensor->keep_offset = true;
        tensor->offset = offsets[i];
        assert_refused(KVL_ERR_MALFORMED, "tensor t has offset ", "past the end of the file");
    }
    kvl_gguf_written_tensor *tensor = start_with_tensor();
    tensor->keep_offset = true;
    tensor->offset = 8;
    assert_refused(KVL_ERR_MALFORMED, "tensor t has offset 8 at byte 57",
                   "multiple of the alignment 32");
    (void)start_with_tensor();
    kvl_gguf_written(&writer, "t")->name[0] = '\0';
    assert_refused(KVL_ERR_MALFORMED, "tensor name at byte 24 is empty", "");
}

static void test_tensors_of_one_name_or_place_are_refused(void **state)
{
    (void)state;
    const float numbers[64] = {1};
    (void)start_with_tensor();
    kvl_gguf_set_tensor(&writer, "u", 2, 32, KVL_DTYPE_F32, numbers);
    kvl_gguf_written(&writer, "u")->name[0] = 't';
    assert_refused(KVL_ERR_MALFORMED, "tensor t is there twice", "at bytes ");
    (void)start_with_tensor();
    kvl_gguf_set_tensor(&writer, "u", 2, 32, KVL_DTYPE_F32, numbers);
    kvl_gguf_written(&writer, "u")->keep_offset = true;
    kvl_gguf_written(&writer, "u")->offset = 64;
    assert_refused(KVL_ERR_MALFORMED, "tensor t at byte ", "reaches into tensor u");
    (void)start_with_tensor();
    char name[66];
    memset(name, 'n', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    kvl_gguf_set_tensor(&writer, name, 2, 32, KVL_DTYPE_F32, numbers);
    assert_refused(KVL_ERR_TOO_LARGE, "a tensor name has length 65", "at most 64");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_numbers_are_read_back),
        cmocka_unit_test(test_texts_and_arrays_are_read_back),
        cmocka_unit_test(test_fallbacks_stand_in_for_missing_keys),
        cmocka_unit_test(test_integers_outside_their_range_are_refused),
        cmocka_unit_test(test_floats_outside_their_range_are_refused),
        cmocka_unit_test(test_values_of_another_type_are_refused),
        cmocka_unit_test(test_tensors_are_read_back),
        cmocka_unit_test(test_files_are_opened_from_disk),
        cmocka_unit_test(test_foreign_headers_are_refused),
        cmocka_unit_test(test_counts_beyond_the_file_are_refused),
        cmocka_unit_test(test_bad_alignments_are_refused),
        cmocka_unit_test(test_bad_pairs_are_refused),
        cmocka_unit_test(test_bad_texts_and_arrays_are_refused),
        cmocka_unit_test(test_elements_are_counted_over_all_inner_arrays),
        cmocka_unit_test(test_split_files_are_refused),
        cmocka_unit_test(test_bad_tensor_shapes_are_refused),
        cmocka_unit_test(test_bad_tensor_types_and_places_are_refused),
        cmocka_unit_test(test_tensors_of_one_name_or_place_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
