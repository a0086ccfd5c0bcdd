/* model/tokenizer: ids are those of llama.cpp on 20,000 lines a model, with its own pre-tokenizer
 * and with three others, and bytes come back. Expected ids: tests/golden/make_tokenizer_golden.py,
 * whose generator of lines is here too. Needs the models that `kvloom model pull` fetches. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/random.h"
#include "model/tokenizer_gguf.h"
#include "model/unicode_class.h"
#include "token_case.h"

#define GOLDEN KVL_TESTS_DIR "/golden/tokenizer/"
#define N_OF(array) (sizeof(array) / sizeof(array)[0])

enum { LINE_MAX = 1 << 17, PIECES_MAX = 1024, LINES_A_HASH = 100 };
#define LINE_SEED UINT64_C(0x6b766c6f6f6d)

typedef struct line_maker {
    kvl_golden golden;
    const char *pieces[PIECES_MAX];
    size_t piece_bytes[PIECES_MAX];
    size_t n_pieces;
    char line[LINE_MAX];
    size_t n_line;
    char repaired[3 * LINE_MAX];
    size_t n_repaired;
} line_maker;

static line_maker *open_maker(void)
{
    line_maker *maker = kvl_alloc_zero(1, sizeof *maker);
    assert_non_null(maker);
    maker->golden = kvl_golden_open(GOLDEN "pieces.golden");
    for (char letter; (letter = kvl_golden_letter(&maker->golden)) != 0; maker->n_pieces++) {
        assert_int_equal(letter, 'F');
        assert_true(maker->n_pieces < PIECES_MAX);
        maker->pieces[maker->n_pieces] =
            kvl_golden_bytes(&maker->golden, &maker->piece_bytes[maker->n_pieces]);
    }
    return maker;
}

static void close_maker(line_maker *maker)
{
    kvl_golden_close(&maker->golden);
    kvl_free(maker);
}

static uint32_t below(kvl_random *random, uint64_t limit)
{
    return (uint32_t)(kvl_random_next(random) % limit);
}

/* Writes one piece to `text` (at most 256 bytes) and returns its bytes. */
static size_t make_piece(const line_maker *maker, kvl_random *random, char *text)
{
    static const uint32_t ranges[][2] = {{0x20, 0x7f},       {0xa0, 0x250},     {0x250, 0x3000},
                                         {0x3000, 0xd800},   {0xe000, 0x10000}, {0x10000, 0x20000},
                                         {0x20000, 0x110000}};
    static const uint8_t leads[] = {0xc3, 0xe4, 0xed, 0xf1, 0xfe, 0xff};
    const uint32_t kind = below(random, 16);
    if (kind < 13) {
        const uint32_t which = below(random, maker->n_pieces);
        assert_in_range(maker->piece_bytes[which], 1, 256);
        memcpy(text, maker->pieces[which], maker->piece_bytes[which]);
        return maker->piece_bytes[which];
    }
    if (kind < 15) {
        const uint32_t *range = ranges[below(random, N_OF(ranges))];
        return kvl_test_utf8_write(range[0] + below(random, range[1] - range[0]), text);
    }
    const size_t n = 1 + below(random, 4);
    for (size_t i = 0; i < n; i++) {
        const uint32_t which = below(random, 64 + N_OF(leads));
        text[i] = (char)(which < 64 ? 0x80 + which : leads[which - 64]);
    }
    return n;
}

static void make_line(line_maker *maker, uint64_t index)
{
    kvl_random random = {.state = LINE_SEED + index};
    const uint32_t n_parts = 1 + below(&random, 12);
    maker->n_line = 0;
    for (uint32_t part = 0; part < n_parts; part++) {
        char text[256];
        const uint32_t times = below(&random, 20) != 0 ? 1 : 1 + below(&random, 60);
        const size_t n = make_piece(maker, &random, text);
        for (uint32_t i = 0; i < times; i++) {
            assert_true(n <= LINE_MAX - maker->n_line);
            memcpy(maker->line + maker->n_line, text, n);
            maker->n_line += n;
        }
    }
}

/* Puts U+FFFD for every byte that is no UTF-8, as llama.cpp does before it looks at a text. */
static void repair_line(line_maker *maker, const char *line, size_t n_line)
{
    assert_true(n_line <= LINE_MAX);
    maker->n_repaired = 0;
    for (size_t at = 0; at < n_line;) {
        uint32_t c = 0;
        const size_t n = kvl_utf8_read(line + at, n_line - at, &c);
        memcpy(maker->repaired + maker->n_repaired, n == 0 ? "\xef\xbf\xbd" : line + at,
               n == 0 ? 3 : n);
        maker->n_repaired += n == 0 ? 3 : n;
        at += n == 0 ? 1 : n;
    }
}

static uint64_t hash_ids(uint64_t hash, const kvl_token_list *list)
{
    hash = (hash ^ list->n) * UINT64_C(0x100000001b3);
    for (size_t i = 0; i < list->n; i++) hash = (hash ^ list->ids[i]) * UINT64_C(0x100000001b3);
    return hash;
}

static uint64_t hash_lines(line_maker *maker, const kvl_tokenizer *tokenizer, uint64_t first,
                           bool has_all_bytes)
{
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (uint64_t index = first; index < first + LINES_A_HASH; index++) {
        make_line(maker, index);
        repair_line(maker, maker->line, maker->n_line);
        kvl_token_list list =
            kvl_token_case_tokenize(tokenizer, maker->repaired, maker->n_repaired, index % 4 == 3);
        hash = hash_ids(hash, &list);
        kvl_free(list.ids);
        if (has_all_bytes) kvl_token_case_check_round_trip(tokenizer, maker->line, maker->n_line);
    }
    return hash;
}

static void check_shown(line_maker *maker, const kvl_tokenizer *tokenizer, kvl_golden *golden)
{
    const bool parse_special = kvl_golden_number(golden, 10) != 0;
    size_t n_bytes = 0;
    const char *text = kvl_golden_bytes(golden, &n_bytes);
    assert_int_equal(kvl_golden_letter(golden), 'I');
    repair_line(maker, text, n_bytes);
    kvl_token_list list =
        kvl_token_case_tokenize(tokenizer, maker->repaired, maker->n_repaired, parse_special);
    assert_int_equal(list.n, kvl_golden_number(golden, 10));
    for (size_t i = 0; i < list.n; i++) {
        assert_int_equal(list.ids[i], kvl_golden_number(golden, 10));
    }
    kvl_free(list.ids);
}

static void check_ends(const kvl_tokenizer *tokenizer, kvl_golden *golden)
{
    uint64_t left = kvl_golden_number(golden, 10);
    uint64_t next = left == 0 ? UINT64_MAX : kvl_golden_number(golden, 10);
    for (uint32_t id = 0; id < kvl_tokenizer_n_vocab(tokenizer); id++) {
        assert_int_equal(kvl_tokenizer_is_end(tokenizer, id), id == next);
        if (id == next) next = --left == 0 ? UINT64_MAX : kvl_golden_number(golden, 10);
    }
    assert_int_equal(left, 0);
}

static void check_golden(const kvl_tokenizer *tokenizer, const char *path, bool has_all_bytes)
{
    line_maker *maker = open_maker();
    kvl_golden golden = kvl_golden_open(path);
    uint64_t n_lines = 0;
    for (char letter; (letter = kvl_golden_letter(&golden)) != 0;) {
        if (letter == 'E') {
            check_ends(tokenizer, &golden);
        } else if (letter == 'L') {
            check_shown(maker, tokenizer, &golden);
        } else {
            assert_int_equal(letter, 'H');
            const uint64_t expected = kvl_golden_number(&golden, 16);
            const uint64_t found = hash_lines(maker, tokenizer, n_lines, has_all_bytes);
            if (found != expected) {
                fail_msg("ids differ from llama.cpp's in lines %u to %u of %s", (unsigned)n_lines,
                         (unsigned)n_lines + LINES_A_HASH - 1, path);
            }
            n_lines += LINES_A_HASH;
        }
    }
    assert_int_equal(n_lines, 20000);
    kvl_golden_close(&golden);
    close_maker(maker);
}

static kvl_tokenizer *create_tokenizer(const kvl_gguf *gguf)
{
    kvl_tokenizer *tokenizer = NULL;
    kvl_error error = {0};
    if (kvl_tokenizer_create(gguf, &tokenizer, &error) < 0) fail_msg("%s", error.text);
    return tokenizer;
}

static void check_model(const char *file, const char *golden, bool has_all_bytes)
{
    kvl_gguf *gguf = kvl_token_case_open_model(file);
    if (gguf == NULL) skip();
    kvl_tokenizer *tokenizer = create_tokenizer(gguf);
    check_golden(tokenizer, golden, has_all_bytes);
    kvl_tokenizer_destroy(tokenizer);
    kvl_gguf_close(gguf);
}

#define SMOLLM2 "smollm2-135m-instruct.q4_1"
#define QWEN "qwen2.5-coder-0.5b-instruct.q4_k_m"

static void test_smollm2_ids_are_those_of_llama_cpp(void **state)
{
    (void)state;
    check_model(SMOLLM2, GOLDEN SMOLLM2 ".golden", false);
}

static void test_qwen_ids_are_those_of_llama_cpp(void **state)
{
    (void)state;
    check_model(QWEN, GOLDEN QWEN ".golden", true);
}

/* The metadata of a file alone, with the text behind one key changed. */
static kvl_gguf_bytes copy_metadata(const kvl_gguf *gguf, const char *key, const char *text)
{
    const kvl_gguf_value *changed = kvl_gguf_find(gguf, key);
    const kvl_gguf_value *last = kvl_gguf_value_at(gguf, kvl_gguf_n_values(gguf) - 1);
    assert_non_null(changed);
    const uint8_t *file = changed->bytes - changed->offset;
    kvl_gguf_buffer buffer = {0};
    kvl_gguf_put(&buffer, file, 8);
    kvl_gguf_put_number(&buffer, 0, 8); /* tensors */
    kvl_gguf_put(&buffer, file + 16, changed->offset - 8 - 16);
    kvl_gguf_put_text(&buffer, text);
    const size_t past = changed->offset + changed->n_bytes;
    kvl_gguf_put(&buffer, file + past, last->offset + last->n_bytes - past);
    kvl_gguf_put(&buffer, (const uint8_t[64]){0}, 64);
    return (kvl_gguf_bytes){.bytes = buffer.bytes, .n_bytes = buffer.n_bytes};
}

static void test_other_pretokenizers_are_those_of_llama_cpp(void **state)
{
    (void)state;
    static const char *const names[] = {"gpt-2", "qwen2", "llama-bpe"};
    static const char *const goldens[] = {GOLDEN SMOLLM2 ".gpt-2.golden",
                                          GOLDEN SMOLLM2 ".qwen2.golden",
                                          GOLDEN SMOLLM2 ".llama-bpe.golden"};
    kvl_gguf *original = kvl_token_case_open_model(SMOLLM2);
    if (original == NULL) skip();
    for (size_t i = 0; i < N_OF(names); i++) {
        kvl_gguf_bytes copy = copy_metadata(original, "tokenizer.ggml.pre", names[i]);
        kvl_gguf *gguf = NULL;
        kvl_error error = {0};
        if (kvl_gguf_parse(copy.bytes, copy.n_bytes, &gguf, &error) < 0) fail_msg("%s", error.text);
        kvl_tokenizer *tokenizer = create_tokenizer(gguf);
        check_golden(tokenizer, goldens[i], false);
        kvl_tokenizer_destroy(tokenizer);
        kvl_gguf_close(gguf);
        kvl_gguf_bytes_deinit(&copy);
    }
    kvl_gguf_close(original);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_smollm2_ids_are_those_of_llama_cpp),
        cmocka_unit_test(test_qwen_ids_are_those_of_llama_cpp),
        cmocka_unit_test(test_other_pretokenizers_are_those_of_llama_cpp),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
