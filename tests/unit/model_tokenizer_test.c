/* model/tokenizer: words are the same by machine code and interpreter; merging is what a naive
 * merger does; special tokens, bytes and hostile vocabularies; text streams in whole characters.
 * The ids of whole models: model_tokenizer_golden_test.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "model/pretokenize.h"
#include "model/tokenizer_gguf.h"
#include "model/unicode_class.h"
#include "test_random.h"
#include "token_case.h"

#define N_OF(array) (sizeof(array) / sizeof(array)[0])

/* ---- helpers */

static void check_ids(const kvl_tokenizer *tokenizer, const char *text, bool parse_special,
                      const uint32_t *ids, size_t n)
{
    kvl_token_list list = kvl_token_case_tokenize(tokenizer, text, strlen(text), parse_special);
    assert_int_equal(list.n, n);
    if (n > 0) assert_memory_equal(list.ids, ids, n * sizeof *ids);
    kvl_free(list.ids);
}

/* ---- characters and words */

static void test_every_character_is_read_back(void **state)
{
    (void)state;
    for (uint32_t c = 0; c < 0x110000; c++) {
        char text[4];
        uint32_t found = 0;
        const size_t n = kvl_test_utf8_write(c, text);
        assert_int_equal(kvl_utf8_read(text, n, &found), n);
        assert_int_equal(found, c);
        if (n > 1) assert_int_equal(kvl_utf8_read(text, n - 1, &found), 0);
    }
}

static void test_what_is_no_character_is_not_read(void **state)
{
    (void)state;
    static const char *const texts[] = {
        "\x80",
        "\xbf",
        "\xc0\xaf",
        "\xc1\xbf",
        "\xe0\x80\xaf",
        "\xe0\x9f\xbf",
        "\xc3(",
        "\xf0\x8f\xbf\xbf",
        "\xf4\x90\x80\x80",
        "\xf5\x80\x80\x80",
        "\xe4\xb8",
        "\xe4\xb8(",
        "\xff",
        "\xf8\x88\x80\x80\x80",
    };
    for (size_t i = 0; i < N_OF(texts); i++) {
        uint32_t found = 0;
        assert_int_equal(kvl_utf8_read(texts[i], strlen(texts[i]), &found), 0);
    }
}

static void test_classes_of_some_characters(void **state)
{
    (void)state;
    static const struct {
        uint32_t code_point;
        kvl_unicode_class expected;
    } cases[] = {
        {0xaa, KVL_UNICODE_LETTER},    {0xb2, KVL_UNICODE_NUMBER},    {0xa0, KVL_UNICODE_SPACE},
        {0x85, KVL_UNICODE_SPACE},     {0xd7, KVL_UNICODE_OTHER},     {0x663, KVL_UNICODE_NUMBER},
        {0x180e, KVL_UNICODE_OTHER},   {0x200b, KVL_UNICODE_OTHER},   {0x3000, KVL_UNICODE_SPACE},
        {0x4e2d, KVL_UNICODE_LETTER},  {0x3007, KVL_UNICODE_NUMBER},  {0x301, KVL_UNICODE_OTHER},
        {0x31350, KVL_UNICODE_LETTER}, {0x11f50, KVL_UNICODE_NUMBER}, {0x10ffff, KVL_UNICODE_OTHER},
        {0x80, KVL_UNICODE_OTHER},     {0xd800, KVL_UNICODE_OTHER},   {0x1f600, KVL_UNICODE_OTHER},
    };
    for (size_t i = 0; i < N_OF(cases); i++) {
        assert_int_equal(kvl_unicode_class_of(cases[i].code_point), cases[i].expected);
    }
}

/* Both ways of running the patterns give the same words, and words cover the text. */
static void compare_words(const uint8_t *classes, size_t n_classes)
{
    for (int kind = 0; kind < KVL_PRETOKENIZER_KIND_COUNT; kind++) {
        kvl_pretokenizer *fast = NULL;
        kvl_pretokenizer *slow = NULL;
        const kvl_pretokenizer_kind which = (kvl_pretokenizer_kind)kind;
        assert_int_equal(kvl_pretokenizer_create(which, true, &fast, NULL), KVL_OK);
        assert_int_equal(kvl_pretokenizer_create(which, false, &slow, NULL), KVL_OK);
        kvl_pretokenizer_match *fast_match = kvl_pretokenizer_match_create(fast);
        kvl_pretokenizer_match *slow_match = kvl_pretokenizer_match_create(slow);
        for (size_t first = 0, past = 0, other = 0; first < n_classes; first = past) {
            assert_int_equal(
                kvl_pretokenizer_next(fast, fast_match, classes, n_classes, first, &past, NULL),
                KVL_OK);
            assert_int_equal(
                kvl_pretokenizer_next(slow, slow_match, classes, n_classes, first, &other, NULL),
                KVL_OK);
            assert_int_equal(past, other);
            assert_in_range(past, first + 1, n_classes);
        }
        kvl_pretokenizer_match_destroy(fast_match);
        kvl_pretokenizer_match_destroy(slow_match);
        kvl_pretokenizer_destroy(fast);
        kvl_pretokenizer_destroy(slow);
    }
}

/* Words of some texts, a bar after each. */
static void test_words_of_some_texts(void **state)
{
    (void)state;
    static const struct {
        kvl_pretokenizer_kind kind;
        const char *text;
        const char *words;
    } cases[] = {
        {KVL_PRETOKENIZER_GPT2, "It's 12345  men!?", "It|'s| 12345| | men|!?|"},
        {KVL_PRETOKENIZER_GPT2, "I'LL \n\n x\t\t", "I|'|LL| \n\n| x|\t\t|"},
        {KVL_PRETOKENIZER_SMOLLM, "It's 12  3a  b ", "It|'s| |1|2|  |3|a| | b| |"},
        {KVL_PRETOKENIZER_SMOLLM, "x.\n 1", "x|.|\n |1|"},
        {KVL_PRETOKENIZER_QWEN2, "IT'S 123 (x)!\n\n y", "IT|'S| |1|2|3| (|x|)!\n\n| y|"},
        {KVL_PRETOKENIZER_QWEN2, " \n \n  a\tb", " \n \n| | a|\tb|"},
        {KVL_PRETOKENIZER_LLAMA_BPE, "1234567 12", "123|456|7| |12|"},
        {KVL_PRETOKENIZER_LLAMA_BPE, "we'Ve.x\r\n", "we|'Ve|.x|\r\n|"},
    };
    for (size_t i = 0; i < N_OF(cases); i++) {
        kvl_pretokenizer *pretokenizer = NULL;
        assert_int_equal(kvl_pretokenizer_create(cases[i].kind, true, &pretokenizer, NULL), KVL_OK);
        kvl_pretokenizer_match *match = kvl_pretokenizer_match_create(pretokenizer);
        char words[64] = {0};
        size_t n = 0;
        const size_t n_bytes = strlen(cases[i].text);
        for (size_t first = 0, past = 0; first < n_bytes; first = past) {
            assert_int_equal(kvl_pretokenizer_next(pretokenizer, match,
                                                   (const uint8_t *)cases[i].text, n_bytes, first,
                                                   &past, NULL),
                             KVL_OK);
            memcpy(words + n, cases[i].text + first, past - first);
            n += past - first;
            words[n++] = '|';
        }
        assert_string_equal(words, cases[i].words);
        kvl_pretokenizer_match_destroy(match);
        kvl_pretokenizer_destroy(pretokenizer);
    }
}

static void test_machine_code_and_interpreter_agree(void **state)
{
    (void)state;
    static const uint8_t common[] = {'a', 's', 'l', ' ', ' ', '\n', '\r', '\t', '\'', '1', '.'};
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 200; round++) {
        uint8_t classes[64];
        const size_t n = 1 + kvl_test_below(&random, sizeof classes);
        for (size_t i = 0; i < n; i++) {
            classes[i] = kvl_test_below(&random, 3) == 0
                             ? (uint8_t)kvl_test_below(&random, 0x90)
                             : common[kvl_test_below(&random, N_OF(common))];
        }
        compare_words(classes, n);
    }
}

/* Long runs of one kind neither exhaust a stack nor reach a limit of the library. */
static void test_long_runs_are_words_like_any_other(void **state)
{
    (void)state;
    enum { N = 1 << 20 };
    uint8_t *classes = kvl_alloc(N);
    assert_non_null(classes);
    static const uint8_t runs[] = {'a', ' ', '\n', '.', 0x84, 0x8c};
    for (size_t i = 0; i < N_OF(runs); i++) {
        memset(classes, runs[i], N);
        classes[N - 1] = 'x';
        compare_words(classes, N);
    }
    kvl_free(classes);
}

/* ---- merging */

enum { LETTERS = 3, RANDOM_MERGES = 40, TEXT_MAX = 60 };

/* Random merges over a few letters, each of parts that exist by then. */
typedef struct random_merges {
    char texts[RANDOM_MERGES][64];
    const char *list[RANDOM_MERGES];
    char parts[LETTERS + RANDOM_MERGES][32];
    size_t n_parts;
    size_t n;
} random_merges;

static void make_merges(kvl_random *random, random_merges *merges)
{
    *merges = (random_merges){0};
    for (; merges->n_parts < LETTERS; merges->n_parts++) {
        merges->parts[merges->n_parts][0] = (char)('a' + (int)merges->n_parts);
    }
    while (merges->n < RANDOM_MERGES) {
        const char *left = merges->parts[kvl_test_below(random, (uint32_t)merges->n_parts)];
        const char *right = merges->parts[kvl_test_below(random, (uint32_t)merges->n_parts)];
        if (strlen(left) + strlen(right) > 9) continue;
        char *text = merges->texts[merges->n];
        memcpy(text, left, strlen(left));
        text[strlen(left)] = ' ';
        memcpy(text + strlen(left) + 1, right, strlen(right));
        merges->list[merges->n] = merges->texts[merges->n];
        merges->n++;
        char joined[32] = {0};
        memcpy(joined, left, strlen(left));
        memcpy(joined + strlen(left), right, strlen(right));
        bool is_new = true;
        for (size_t i = 0; i < merges->n_parts; i++) {
            if (strcmp(merges->parts[i], joined) == 0) is_new = false;
        }
        if (is_new) memcpy(merges->parts[merges->n_parts++], joined, sizeof joined);
    }
}

/* The paper's loop, without any cleverness: again and again, the best pair, leftmost first. */
static size_t merge_naively(const random_merges *merges, const char *text, char pieces[][32])
{
    size_t n = strlen(text);
    for (size_t i = 0; i < n; i++) {
        pieces[i][0] = text[i];
        pieces[i][1] = '\0';
    }
    for (;;) {
        size_t best = merges->n;
        size_t best_at = 0;
        for (size_t at = 0; at + 1 < n; at++) {
            char pair[80];
            (void)snprintf(pair, sizeof pair, "%.31s %.31s", pieces[at], pieces[at + 1]);
            for (size_t rank = 0; rank < best; rank++) {
                if (strcmp(merges->list[rank], pair) == 0) {
                    best = rank;
                    best_at = at;
                }
            }
        }
        if (best == merges->n) return n;
        (void)strncat(pieces[best_at], pieces[best_at + 1], 16);
        for (size_t at = best_at + 1; at + 1 < n; at++) memcpy(pieces[at], pieces[at + 1], 32);
        n--;
    }
}

static void test_merging_is_the_papers(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 60; round++) {
        static random_merges merges;
        make_merges(&random, &merges);
        const char *tokens[LETTERS + RANDOM_MERGES];
        for (size_t i = LETTERS; i < merges.n_parts; i++) tokens[i - LETTERS] = merges.parts[i];
        const kvl_token_case made_of = {.pre = "gpt-2",
                                        .tokens = tokens,
                                        .n_tokens = merges.n_parts - LETTERS,
                                        .merges = merges.list,
                                        .n_merges = merges.n};
        kvl_tokenizer *tokenizer = kvl_token_case_make(&made_of);
        for (int repeat = 0; repeat < 20; repeat++) {
            char text[TEXT_MAX + 1] = {0};
            static char pieces[TEXT_MAX][32];
            const size_t n_bytes = 1 + kvl_test_below(&random, TEXT_MAX);
            for (size_t i = 0; i < n_bytes; i++) {
                text[i] = (char)('a' + (int)kvl_test_below(&random, LETTERS));
            }
            const size_t n = merge_naively(&merges, text, pieces);
            kvl_token_list list = kvl_token_case_tokenize(tokenizer, text, n_bytes, false);
            assert_int_equal(list.n, n);
            for (size_t i = 0; i < n; i++) {
                size_t n_token = 0;
                const char *bytes = kvl_token_bytes(tokenizer, list.ids[i], false, &n_token);
                assert_int_equal(n_token, strlen(pieces[i]));
                assert_memory_equal(bytes, pieces[i], n_token);
            }
            kvl_free(list.ids);
        }
        kvl_tokenizer_destroy(tokenizer);
    }
}

/* A merge may pass through what is no token, and end there: then its bytes stand for it. */
static void test_what_is_no_token_falls_to_bytes(void **state)
{
    (void)state;
    static const char *const tokens[] = {"abc"};
    static const char *const merges[] = {"a b", "ab c"};
    const kvl_token_case made_of = {
        .pre = "gpt-2", .tokens = tokens, .n_tokens = 1, .merges = merges, .n_merges = 2};
    kvl_tokenizer *tokenizer = kvl_token_case_make(&made_of);
    check_ids(tokenizer, "abc", false, (uint32_t[]){256}, 1);
    check_ids(tokenizer, "abab", false, (uint32_t[]){'a', 'b', 'a', 'b'}, 4);
    check_ids(tokenizer, "ababc", false, (uint32_t[]){'a', 'b', 256}, 3);
    check_ids(tokenizer, "", false, NULL, 0);
    kvl_tokenizer_destroy(tokenizer);
}

static void test_llama_takes_whole_words_first(void **state)
{
    (void)state;
    static const char *const tokens[] = {"abc", "bc", "\u0120abc"};
    static const char *const merges[] = {"b c"};
    kvl_token_case made_of = {
        .pre = "llama-bpe", .tokens = tokens, .n_tokens = 3, .merges = merges, .n_merges = 1};
    kvl_tokenizer *tokenizer = kvl_token_case_make(&made_of);
    check_ids(tokenizer, "abc abc", false, (uint32_t[]){256, 258}, 2);
    check_ids(tokenizer, "abca", false, (uint32_t[]){'a', 257, 'a'}, 3);
    kvl_tokenizer_destroy(tokenizer);
    made_of.pre = "qwen2";
    tokenizer = kvl_token_case_make(&made_of);
    check_ids(tokenizer, "abc", false, (uint32_t[]){'a', 257}, 2);
    kvl_tokenizer_destroy(tokenizer);
    /* A word that only a merge knows is no token. */
    made_of = (kvl_token_case){.pre = "llama-bpe", .merges = merges, .n_merges = 1};
    tokenizer = kvl_token_case_make(&made_of);
    check_ids(tokenizer, "bc", false, (uint32_t[]){'b', 'c'}, 2);
    kvl_tokenizer_destroy(tokenizer);
}

/* A word of a mebibyte: quadratic work would take the test past its time limit. */
static void test_a_long_word_is_no_trap(void **state)
{
    (void)state;
    enum { N = 1 << 20 };
    static const char *const tokens[] = {"aa", "aaaa"};
    static const char *const merges[] = {"a a", "aa aa"};
    const kvl_token_case made_of = {
        .pre = "qwen2", .tokens = tokens, .n_tokens = 2, .merges = merges, .n_merges = 2};
    kvl_tokenizer *tokenizer = kvl_token_case_make(&made_of);
    char *text = kvl_alloc(N);
    assert_non_null(text);
    memset(text, 'a', N);
    kvl_token_list list = kvl_token_case_tokenize(tokenizer, text, N, false);
    assert_int_equal(list.n, N / 4);
    for (size_t i = 0; i < list.n; i++) assert_int_equal(list.ids[i], 257);
    kvl_free(list.ids);
    kvl_free(text);
    kvl_tokenizer_destroy(tokenizer);
}

/* ---- special tokens */

enum { LONGER = 256, SHORTER, DEFINED, TURN_END, PADDING, UNUSED };
static const char *const special_tokens[] = {"<x><y>", "<x>", "<d>", "<|im_end|>", "<p>", "<u>"};
static const int32_t special_types[] = {3, 3, 4, 1, 3, 5};

static kvl_tokenizer *make_special(void)
{
    const kvl_token_case made_of = {.pre = "smollm",
                                    .tokens = special_tokens,
                                    .types = special_types,
                                    .n_tokens = N_OF(special_tokens)};
    static kvl_gguf_writer writer;
    kvl_token_case_write(&made_of, &writer);
    kvl_gguf_set_u32(&writer, "tokenizer.ggml.eos_token_id", SHORTER);
    return kvl_token_case_finish(&writer);
}

static void test_special_tokens_are_found_when_asked(void **state)
{
    (void)state;
    kvl_tokenizer *tokenizer = make_special();
    check_ids(tokenizer, "a<x><y><x>b", true, (uint32_t[]){'a', LONGER, SHORTER, 'b'}, 4);
    check_ids(tokenizer, "<x><x><y><y>", true, (uint32_t[]){SHORTER, LONGER, '<', 'y', '>'}, 5);
    check_ids(tokenizer, "<x>", false, (uint32_t[]){'<', 'x', '>'}, 3);
    check_ids(tokenizer, "1<d>2", false, (uint32_t[]){'1', DEFINED, '2'}, 3);
    check_ids(tokenizer, "<u>", true, (uint32_t[]){'<', 'u', '>'}, 3);
    /* Special by its text, though the file calls it an ordinary token. */
    check_ids(tokenizer, "<|im_end|>", true, (uint32_t[]){TURN_END}, 1);
    kvl_token_list list = kvl_token_case_tokenize(tokenizer, "<|im_end|>", 10, false);
    assert_int_equal(list.n, 10);
    kvl_free(list.ids);
    kvl_tokenizer_destroy(tokenizer);
}

static void test_a_tokenizer_knows_its_tokens(void **state)
{
    (void)state;
    kvl_tokenizer *tokenizer = make_special();
    assert_int_equal(kvl_tokenizer_n_vocab(tokenizer), 262);
    assert_int_equal(kvl_tokenizer_bos(tokenizer), KVL_TOKEN_NONE);
    assert_int_equal(kvl_tokenizer_eos(tokenizer), SHORTER);
    assert_int_equal(kvl_tokenizer_special(tokenizer, "<x>"), SHORTER);
    assert_int_equal(kvl_tokenizer_special(tokenizer, "<d>"), DEFINED);
    assert_int_equal(kvl_tokenizer_special(tokenizer, "a"), KVL_TOKEN_NONE);
    for (uint32_t id = 0; id < 264; id++) {
        assert_int_equal(kvl_tokenizer_is_end(tokenizer, id), id == SHORTER || id == TURN_END);
        size_t n_shown = 0;
        size_t n_all = 0;
        assert_non_null(kvl_token_bytes(tokenizer, id, false, &n_shown));
        assert_non_null(kvl_token_bytes(tokenizer, id, true, &n_all));
        const bool is_hidden = id >= 256 && id != DEFINED;
        assert_int_equal(n_shown == 0, is_hidden);
        assert_int_equal(n_all == 0, id > UNUSED);
    }
    assert_int_equal(kvl_tokenizer_is_end(tokenizer, KVL_TOKEN_NONE), false);
    kvl_tokenizer_destroy(tokenizer);
}

static void test_results_are_appended(void **state)
{
    (void)state;
    kvl_tokenizer *tokenizer = make_special();
    kvl_token_list list = kvl_token_case_tokenize(tokenizer, "ab", 2, false);
    assert_int_equal(kvl_tokenize(tokenizer, "c<x>", 4, true, &list.ids, &list.n, NULL), KVL_OK);
    assert_int_equal(kvl_tokenize(tokenizer, "", 0, true, &list.ids, &list.n, NULL), KVL_OK);
    assert_int_equal(list.n, 4);
    assert_memory_equal(list.ids, ((uint32_t[]){'a', 'b', 'c', SHORTER}), 16);
    kvl_error error = {0};
    assert_int_equal(kvl_tokenize(tokenizer, "", (size_t)KVL_TEXT_BYTES_MAX + 1, false, &list.ids,
                                  &list.n, &error),
                     KVL_ERR_TOO_LARGE);
    assert_int_equal(list.n, 4);
    kvl_free(list.ids);
    kvl_tokenizer_destroy(tokenizer);
}

/* ---- bytes */

static void test_any_bytes_come_back(void **state)
{
    (void)state;
    static const char *const tokens[] = {"th", "the", "\u0120the", "\u00e2\u0122", "\u0120\u0120"};
    static const char *const merges[] = {"t h", "th e", "\u0120 the", "\u00e2 \u0122",
                                         "\u0120 \u0120"};
    kvl_random random = kvl_test_random();
    for (int kind = 0; kind < 4; kind++) {
        static const char *const names[] = {"gpt-2", "smollm", "qwen2", "llama-bpe"};
        const kvl_token_case made_of = {
            .pre = names[kind], .tokens = tokens, .n_tokens = 5, .merges = merges, .n_merges = 5};
        kvl_tokenizer *tokenizer = kvl_token_case_make(&made_of);
        for (int round = 0; round < 300; round++) {
            char text[80];
            const size_t n = kvl_test_below(&random, sizeof text);
            for (size_t i = 0; i < n; i++) {
                text[i] = kvl_test_below(&random, 2) == 0
                              ? (char)kvl_test_below(&random, 256)
                              : "the \n\xe2\x80\xa8"[kvl_test_below(&random, 8)];
            }
            kvl_token_case_check_round_trip(tokenizer, text, n);
        }
        kvl_token_case_check_round_trip(tokenizer, "\xc0\xaf\xf4\x90\x80\x80\xe0\x80", 8);
        kvl_tokenizer_destroy(tokenizer);
    }
}

static void test_bytes_without_a_token(void **state)
{
    (void)state;
    static const uint8_t missing[] = {0x04, 0xf1, 0xff};
    const kvl_token_case made_of = {.pre = "smollm", .missing = missing, .n_missing = 3};
    kvl_tokenizer *tokenizer = kvl_token_case_make(&made_of);
    check_ids(tokenizer,
              "a\x04"
              "b",
              false, (uint32_t[]){'a', 'b'}, 2);
    check_ids(tokenizer, "\xf1\x80\x80\x80", false, (uint32_t[]){0x80, 0x80, 0x80}, 3);
    check_ids(tokenizer,
              "\xff"
              "b",
              false, (uint32_t[]){0xef, 0xbf, 0xbd, 'b'}, 4);
    check_ids(tokenizer, "\xfe", false, (uint32_t[]){0xfe}, 1);
    check_ids(tokenizer, "\x04", false, NULL, 0);
    /* Three ids for a byte: more than the word has bytes. */
    char text[4000];
    memset(text, 0xff, sizeof text);
    kvl_token_list list = kvl_token_case_tokenize(tokenizer, text, sizeof text, false);
    assert_int_equal(list.n, 3 * sizeof text);
    for (size_t i = 0; i < list.n; i++) assert_int_equal(list.ids[i], "\xef\xbf\xbd"[i % 3] & 0xff);
    kvl_free(list.ids);
    kvl_tokenizer_destroy(tokenizer);
}

/* ---- detokenizer */

/* True if exactly these bytes are a character, surrogates not counted. */
static bool is_character(const uint8_t *bytes, size_t n)
{
    uint32_t c = 0;
    return kvl_utf8_read((const char *)bytes, n, &c) == n && (c < 0xd800 || c > 0xdfff);
}

/* True if a character begins with these n bytes and has more: then it does with 0x80 or 0xbf for
 * each of the rest, or with both where the second byte is bounded on one side. */
static bool is_beginning(const uint8_t *bytes, size_t n)
{
    uint8_t whole[4];
    memcpy(whole, bytes, n);
    for (size_t length = n + 1; length <= 4; length++) {
        memset(whole + n, 0x80, 4 - n);
        if (is_character(whole, length)) return true;
        memset(whole + n, 0xbf, 4 - n);
        if (is_character(whole, length)) return true;
    }
    return false;
}

static size_t replace_naively(const uint8_t *bytes, size_t n_bytes, char *out)
{
    size_t n_out = 0;
    for (size_t at = 0; at < n_bytes;) {
        size_t n = 1;
        while (n < 4 && n < n_bytes - at && !is_character(bytes + at, n)) n++;
        if (is_character(bytes + at, n)) {
            memcpy(out + n_out, bytes + at, n);
            n_out += n;
            at += n;
            continue;
        }
        for (n = 1; n < 3 && n < n_bytes - at && is_beginning(bytes + at, n + 1);) n++;
        memcpy(out + n_out, "\xef\xbf\xbd", 3);
        n_out += 3;
        at += n;
    }
    return n_out;
}

static void check_stream(const kvl_tokenizer *tokenizer, const uint8_t *bytes, size_t n_bytes)
{
    char expected[256];
    char found[256];
    char out[KVL_DETOKENIZER_OUT_MIN];
    size_t n_found = 0;
    kvl_detokenizer detokenizer;
    kvl_detokenizer_init(&detokenizer, tokenizer);
    for (size_t i = 0; i <= n_bytes; i++) {
        const size_t n = i < n_bytes ? kvl_detokenizer_push(&detokenizer, bytes[i], out, sizeof out)
                                     : kvl_detokenizer_finish(&detokenizer, out, sizeof out);
        memcpy(found + n_found, out, n);
        n_found += n;
        /* What was given so far ends with a whole character. */
        for (size_t at = 0; at < n;) {
            uint32_t c = 0;
            const size_t length = kvl_utf8_read(out + at, n - at, &c);
            assert_true(length > 0);
            at += length;
        }
    }
    const size_t n_expected = replace_naively(bytes, n_bytes, expected);
    assert_int_equal(n_found, n_expected);
    assert_memory_equal(found, expected, n_expected);
}

static void test_text_streams_in_whole_characters(void **state)
{
    (void)state;
    static const uint8_t leads[] = {'a',  0xc3, 0xe0, 0xe4, 0xed, 0xf0,
                                    0xf1, 0xf4, 0xf5, 0xc0, 0xff};
    static const uint8_t tails[] = {0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf};
    kvl_random random = kvl_test_random();
    kvl_tokenizer *tokenizer = kvl_token_case_make(&(kvl_token_case){.pre = "gpt-2"});
    for (int round = 0; round < 20000; round++) {
        uint8_t bytes[24];
        const size_t n = kvl_test_below(&random, sizeof bytes);
        for (size_t i = 0; i < n; i++) {
            bytes[i] = kvl_test_below(&random, 3) == 0
                           ? leads[kvl_test_below(&random, N_OF(leads))]
                           : tails[kvl_test_below(&random, N_OF(tails))];
        }
        check_stream(tokenizer, bytes, n);
    }
    kvl_tokenizer_destroy(tokenizer);
}

static void test_special_tokens_stream_as_nothing(void **state)
{
    (void)state;
    kvl_tokenizer *tokenizer = make_special();
    kvl_detokenizer detokenizer;
    char out[KVL_DETOKENIZER_OUT_MIN];
    kvl_detokenizer_init(&detokenizer, tokenizer);
    assert_int_equal(kvl_detokenizer_push(&detokenizer, 0xc3, out, sizeof out), 0);
    assert_int_equal(kvl_detokenizer_push(&detokenizer, TURN_END, out, sizeof out), 0);
    assert_int_equal(kvl_detokenizer_push(&detokenizer, 0xa9, out, sizeof out), 2);
    assert_memory_equal(out, "\xc3\xa9", 2);
    assert_int_equal(kvl_detokenizer_push(&detokenizer, 99999, out, sizeof out), 0);
    assert_int_equal(kvl_detokenizer_finish(&detokenizer, out, sizeof out), 0);
    kvl_tokenizer_destroy(tokenizer);
}

/* ---- hostile files */

typedef void (*spoiler)(kvl_gguf_writer *writer);

static void spoil_model(kvl_gguf_writer *writer)
{
    kvl_gguf_set_text(writer, "tokenizer.ggml.model", "llama");
}
static void spoil_pre(kvl_gguf_writer *writer)
{
    kvl_gguf_set_text(writer, "tokenizer.ggml.pre", "tekken");
}
static void spoil_no_tokens(kvl_gguf_writer *writer)
{
    kvl_gguf_remove_key(writer, "tokenizer.ggml.tokens");
}
static void spoil_types(kvl_gguf_writer *writer)
{
    kvl_gguf_set_i32s(writer, "tokenizer.ggml.token_type", (int32_t[]){1, 1}, 2);
}
static void spoil_twins(kvl_gguf_writer *writer)
{
    kvl_gguf_set_texts(writer, "tokenizer.ggml.tokens", (const char *const[]){"a", "b", "a"}, 3);
    kvl_gguf_remove_key(writer, "tokenizer.ggml.token_type");
}
static void spoil_long(kvl_gguf_writer *writer)
{
    static char text[340];
    memset(text, 'a', sizeof text - 1);
    kvl_gguf_set_texts(writer, "tokenizer.ggml.tokens", (const char *const[]){text}, 1);
    kvl_gguf_remove_key(writer, "tokenizer.ggml.token_type");
}
static void spoil_longer(kvl_gguf_writer *writer)
{
    static char text[9000];
    memset(text, 'a', sizeof text - 1);
    kvl_gguf_set_texts(writer, "tokenizer.ggml.tokens", (const char *const[]){text}, 1);
    kvl_gguf_remove_key(writer, "tokenizer.ggml.token_type");
}
static void spoil_merge(kvl_gguf_writer *writer)
{
    kvl_gguf_set_texts(writer, "tokenizer.ggml.merges", (const char *const[]){"a b", "ab"}, 2);
}
static void spoil_merge_end(kvl_gguf_writer *writer)
{
    kvl_gguf_set_texts(writer, "tokenizer.ggml.merges", (const char *const[]){"ab "}, 1);
}
static void spoil_end(kvl_gguf_writer *writer)
{
    kvl_gguf_set_u32(writer, "tokenizer.ggml.eos_token_id", 256);
}

static void test_hostile_vocabularies_are_refused(void **state)
{
    (void)state;
    static const struct {
        spoiler spoil;
        kvl_status expected;
        const char *says;
    } cases[] = {
        {spoil_model, KVL_ERR_UNSUPPORTED, "tokenizer.ggml.model is llama"},
        {spoil_pre, KVL_ERR_UNSUPPORTED, "tokenizer.ggml.pre is tekken"},
        {spoil_no_tokens, KVL_ERR_MALFORMED, "tokenizer.ggml.tokens"},
        {spoil_types, KVL_ERR_MALFORMED, "tokenizer.ggml.token_type has 2"},
        {spoil_twins, KVL_ERR_MALFORMED, "tokens 0 and 2"},
        {spoil_long, KVL_ERR_TOO_LARGE, "339 bytes"},
        {spoil_longer, KVL_ERR_TOO_LARGE, "8999 bytes"},
        {spoil_merge, KVL_ERR_MALFORMED, "merge 1"},
        {spoil_merge_end, KVL_ERR_MALFORMED, "merge 0"},
        {spoil_end, KVL_ERR_TOO_LARGE, "tokenizer.ggml.eos_token_id"},
    };
    static kvl_gguf_writer writer;
    for (size_t i = 0; i < N_OF(cases); i++) {
        const int64_t live = kvl_alloc_live();
        kvl_token_case_write(&(kvl_token_case){.pre = "gpt-2"}, &writer);
        cases[i].spoil(&writer);
        kvl_gguf_bytes file = kvl_gguf_writer_finish(&writer);
        kvl_gguf *gguf = NULL;
        kvl_tokenizer *tokenizer = NULL;
        kvl_error error = {0};
        assert_int_equal(kvl_gguf_parse(file.bytes, file.n_bytes, &gguf, NULL), KVL_OK);
        assert_int_equal(kvl_tokenizer_create(gguf, &tokenizer, &error), cases[i].expected);
        assert_null(tokenizer);
        if (strstr(error.text, cases[i].says) == NULL) {
            fail_msg("\"%s\" lacks \"%s\"", error.text, cases[i].says);
        }
        kvl_gguf_close(gguf);
        kvl_gguf_bytes_deinit(&file);
        assert_int_equal(kvl_alloc_live(), live);
    }
}

static void test_odd_merges_do_no_harm(void **state)
{
    (void)state;
    /* Characters that stand for no byte, a merge twice, parts that are no tokens, a space first. */
    static const char *const merges[] = {"\u4e2d \u6587", "a b", "a b", "x yz", "  a", "b a"};
    const kvl_token_case made_of = {.pre = "gpt-2", .merges = merges, .n_merges = N_OF(merges)};
    kvl_tokenizer *tokenizer = kvl_token_case_make(&made_of);
    check_ids(tokenizer, "aba", false, (uint32_t[]){'a', 'b', 'a'}, 3);
    kvl_tokenizer_destroy(tokenizer);
}

/* Far more strings than the vocabulary has: tables grow while merges are read. */
static void test_merges_may_outnumber_tokens(void **state)
{
    (void)state;
    enum { N = 26 * 26 };
    static char texts[N][4];
    static const char *merges[N];
    for (int i = 0; i < N; i++) {
        (void)snprintf(texts[i], sizeof texts[i], "%c %c", 'a' + i / 26, 'a' + i % 26);
        merges[i] = texts[i];
    }
    const kvl_token_case made_of = {.pre = "gpt-2", .merges = merges, .n_merges = N};
    kvl_tokenizer *tokenizer = kvl_token_case_make(&made_of);
    check_ids(tokenizer, "zyx", false, (uint32_t[]){'z', 'y', 'x'}, 3);
    kvl_tokenizer_destroy(tokenizer);
}

static kvl_status create_and_use(const kvl_gguf *gguf, kvl_error *error)
{
    kvl_tokenizer *tokenizer = NULL;
    KVL_TRY(kvl_tokenizer_create(gguf, &tokenizer, error));
    uint32_t *ids = NULL;
    size_t n_ids = 0;
    const kvl_status status =
        kvl_tokenize(tokenizer, "some <d>text<|im_end|>", 22, true, &ids, &n_ids, error);
    assert_int_equal(n_ids, status < 0 ? 0 : 11);
    kvl_free(ids);
    kvl_tokenizer_destroy(tokenizer);
    return status;
}

static void test_every_failed_allocation_is_reported(void **state)
{
    (void)state;
    static kvl_gguf_writer writer;
    const kvl_token_case made_of = {.pre = "smollm",
                                    .tokens = special_tokens,
                                    .types = special_types,
                                    .n_tokens = N_OF(special_tokens)};
    kvl_token_case_write(&made_of, &writer);
    kvl_gguf_bytes file = kvl_gguf_writer_finish(&writer);
    kvl_gguf *gguf = NULL;
    assert_int_equal(kvl_gguf_parse(file.bytes, file.n_bytes, &gguf, NULL), KVL_OK);
    const int64_t live = kvl_alloc_live();
    kvl_status status = KVL_ERR_NO_MEMORY;
    int64_t n = 0;
    for (; status == KVL_ERR_NO_MEMORY && n < 1000; n++) {
        kvl_error error = {0};
        kvl_alloc_fail_after(n);
        status = create_and_use(gguf, &error);
        kvl_alloc_fail_after(-1);
        assert_true(status == KVL_OK || error.status == KVL_ERR_NO_MEMORY);
        assert_int_equal(kvl_alloc_live(), live);
    }
    assert_int_equal(status, KVL_OK);
    assert_true(n > 10);
    kvl_gguf_close(gguf);
    kvl_gguf_bytes_deinit(&file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_character_is_read_back),
        cmocka_unit_test(test_what_is_no_character_is_not_read),
        cmocka_unit_test(test_classes_of_some_characters),
        cmocka_unit_test(test_words_of_some_texts),
        cmocka_unit_test(test_machine_code_and_interpreter_agree),
        cmocka_unit_test(test_long_runs_are_words_like_any_other),
        cmocka_unit_test(test_merging_is_the_papers),
        cmocka_unit_test(test_what_is_no_token_falls_to_bytes),
        cmocka_unit_test(test_llama_takes_whole_words_first),
        cmocka_unit_test(test_a_long_word_is_no_trap),
        cmocka_unit_test(test_special_tokens_are_found_when_asked),
        cmocka_unit_test(test_a_tokenizer_knows_its_tokens),
        cmocka_unit_test(test_results_are_appended),
        cmocka_unit_test(test_any_bytes_come_back),
        cmocka_unit_test(test_bytes_without_a_token),
        cmocka_unit_test(test_text_streams_in_whole_characters),
        cmocka_unit_test(test_special_tokens_stream_as_nothing),
        cmocka_unit_test(test_hostile_vocabularies_are_refused),
        cmocka_unit_test(test_odd_merges_do_no_harm),
        cmocka_unit_test(test_merges_may_outnumber_tokens),
        cmocka_unit_test(test_every_failed_allocation_is_reported),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
