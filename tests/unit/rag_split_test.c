/* rag: chunks cover a text, keep to their length and to its structure, and an edit leaves the
 * others as they were. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/hash.h"
#include "rag/split.h"
#include "test_random.h"

enum { TEXT_MAX = 1 << 17 };

typedef struct text {
    char *bytes;
    size_t n;
} text;

static void put(text *t, const char *what)
{
    const size_t n = strlen(what);
    assert_true(t->n + n < TEXT_MAX);
    memcpy(t->bytes + t->n, what, n + 1);
    t->n += n;
}

static void put_word(text *t, kvl_random *random)
{
    char word[12];
    const uint32_t n = 1 + kvl_test_below(random, 9);
    for (uint32_t i = 0; i < n; i++) word[i] = (char)('a' + kvl_test_below(random, 26));
    word[n] = '\0';
    put(t, word);
}

static void put_sentence(text *t, kvl_random *random)
{
    const uint32_t n = 4 + kvl_test_below(random, 22);
    for (uint32_t i = 0; i < n; i++) {
        put_word(t, random);
        put(t, i + 1 == n ? "." : kvl_test_below(random, 10) == 0 ? ", " : " ");
    }
}

/* Prose in paragraphs, sometimes under headings, sometimes with lists and code. */
static text make_text(kvl_random *random, uint32_t n_paragraphs, bool plain)
{
    text t = {kvl_alloc(TEXT_MAX), 0};
    assert_non_null(t.bytes);
    for (uint32_t p = 0; p < n_paragraphs; p++) {
        const uint32_t kind = plain ? 9 : kvl_test_below(random, 10);
        if (kind == 0) {
            put(&t, "## ");
            put_word(&t, random);
            put(&t, "\n\n");
        }
        if (kind == 1) put(&t, "```c\n");
        const uint32_t n = 1 + kvl_test_below(random, 8);
        for (uint32_t s = 0; s < n; s++) {
            if (kind == 2) put(&t, "- ");
            put_sentence(&t, random);
            put(&t, kind <= 2 || kvl_test_below(random, 3) == 0 ? "\n" : " ");
        }
        if (kind == 1) put(&t, "```\n");
        put(&t, "\n\n");
    }
    return t;
}

static size_t split(const text *t, uint32_t n_tokens, kvl_text_span **chunks)
{
    size_t n = 0;
    kvl_error error = {0};
    if (kvl_split_text(t->bytes, t->n, n_tokens, chunks, &n, &error) != KVL_OK)
        fail_msg("%s", error.text);
    return n;
}

static void check_cover(const text *t, const kvl_text_span *chunks, size_t n, uint32_t n_tokens)
{
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(chunks[i].first, at);
        assert_true(chunks[i].n_bytes > 0);
        at += chunks[i].n_bytes;
        assert_true(kvl_split_guess_tokens(t->bytes + chunks[i].first, chunks[i].n_bytes) <=
                    n_tokens + n_tokens / 2 + 1);
        if (at < t->n) assert_true(((unsigned char)t->bytes[at] & 0xc0) != 0x80);
    }
    assert_int_equal(at, t->n);
}

static void test_chunks_cover_any_bytes(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    static const char alphabet[] = "ab \n#-`~=.!?\t1\xc3\xa9\xe2\x82\xac\r";
    for (int round = 0; round < 400; round++) {
        text t = {kvl_alloc(TEXT_MAX), 0};
        assert_non_null(t.bytes);
        const uint32_t n = kvl_test_below(&random, 4000);
        /* Any bytes at all; characters of UTF-8 stay whole in every second round. */
        while (t.n < n) {
            const uint32_t pick = kvl_test_below(&random, round % 2 == 0 ? 19 : 15);
            if (pick < 14)
                t.bytes[t.n++] = alphabet[pick];
            else if (pick == 14)
                put(&t, kvl_test_below(&random, 2) ? "\xc3\xa9" : "\xe2\x82\xac");
            else
                t.bytes[t.n++] = (char)kvl_test_below(&random, 256);
        }
        const uint32_t n_tokens = 32 + kvl_test_below(&random, 300);
        kvl_text_span *chunks = NULL;
        const size_t n_chunks = split(&t, n_tokens, &chunks);
        if (round % 2 == 1) check_cover(&t, chunks, n_chunks, n_tokens);
        kvl_free(chunks);
        kvl_free(t.bytes);
    }
}

static void test_lengths_are_near_what_is_asked(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (uint32_t n_tokens = 64; n_tokens <= 512; n_tokens *= 2) {
        text t = make_text(&random, 120, false);
        kvl_text_span *chunks = NULL;
        const size_t n = split(&t, n_tokens, &chunks);
        check_cover(&t, chunks, n, n_tokens);
        const double mean = (double)kvl_split_guess_tokens(t.bytes, t.n) / (double)n;
        assert_true(mean > 0.6 * n_tokens && mean < 1.3 * n_tokens);
        kvl_free(chunks);
        kvl_free(t.bytes);
    }
}

/* Chunks of `b` that `a` has not. */
static size_t count_new(const text *a, const text *b, uint32_t n_tokens)
{
    kvl_text_span *before = NULL, *after = NULL;
    const size_t n_before = split(a, n_tokens, &before);
    const size_t n_after = split(b, n_tokens, &after);
    size_t n_new = 0;
    for (size_t i = 0; i < n_after; i++) {
        bool known = false;
        for (size_t j = 0; j < n_before && !known; j++)
            known = before[j].n_bytes == after[i].n_bytes &&
                    memcmp(a->bytes + before[j].first, b->bytes + after[i].first,
                           after[i].n_bytes) == 0;
        n_new += known ? 0 : 1;
    }
    kvl_free(before);
    kvl_free(after);
    return n_new;
}

/* `with` in the place of a word somewhere in the text; NULL: the word goes; `before`: it stays. */
static text edit(const text *t, kvl_random *random, const char *with, bool before)
{
    text edited = {kvl_alloc(TEXT_MAX), 0};
    assert_non_null(edited.bytes);
    size_t at = kvl_test_below(random, (uint32_t)t->n - 100);
    while (t->bytes[at] != ' ' || t->bytes[at + 1] < 'a' || t->bytes[at + 1] > 'z') at++;
    at++;
    size_t past = at;
    while (t->bytes[past] >= 'a' && t->bytes[past] <= 'z') past++;
    memcpy(edited.bytes, t->bytes, at);
    edited.n = at;
    put(&edited, with);
    const size_t from = before ? at : past;
    memcpy(edited.bytes + edited.n, t->bytes + from, t->n - from);
    edited.n += t->n - from;
    return edited;
}

static void test_another_word_changes_at_most_two_chunks(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    size_t n_most = 0, n_sum = 0;
    for (int round = 0; round < 40; round++) {
        text t = make_text(&random, 80, round % 2 == 0);
        for (int i = 0; i < 10; i++) {
            text edited = edit(&t, &random, "zebra", false);
            const size_t n = count_new(&t, &edited, 256);
            n_most = n > n_most ? n : n_most;
            n_sum += n;
            kvl_free(edited.bytes);
        }
        kvl_free(t.bytes);
    }
    assert_true(n_sum >= 390); /* an edit is an edit */
    assert_true(n_most <= 2);
}

/* A word more or less is another number of words: boundaries near it may move, none far away. */
static void test_a_word_more_or_less_changes_few_chunks(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    size_t n_most = 0, n_above = 0;
    for (int round = 0; round < 40; round++) {
        text t = make_text(&random, 80, round % 2 == 0);
        for (int i = 0; i < 10; i++) {
            text edited =
                i % 2 == 0 ? edit(&t, &random, "zebra ", true) : edit(&t, &random, "", false);
            const size_t n = count_new(&t, &edited, 256);
            n_most = n > n_most ? n : n_most;
            n_above += n > 2 ? 1 : 0;
            kvl_free(edited.bytes);
        }
        kvl_free(t.bytes);
    }
    print_message("a word more or less: %zu of 400 above 2 chunks, at most %zu\n", n_above, n_most);
    assert_true(n_most <= 8);
    assert_true(n_above <= 40);
}

/* Headings and edges of code are where chunks begin, where there is a choice. */
static void test_structure_is_kept(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    text t = {kvl_alloc(TEXT_MAX), 0};
    assert_non_null(t.bytes);
    for (int section = 0; section < 8; section++) {
        put(&t, section % 2 == 0 ? "# Section\n\n" : "Section\n=======\n\n");
        for (int s = 0; s < 9; s++) {
            put_sentence(&t, &random);
            put(&t, " ");
        }
        put(&t, "\n\n");
    }
    kvl_text_span *chunks = NULL;
    const size_t n = split(&t, 160, &chunks);
    size_t n_at_heading = 0;
    for (size_t i = 0; i < n; i++) {
        const char *from = t.bytes + chunks[i].first;
        n_at_heading += strncmp(from, "# Section", 9) == 0 || strncmp(from, "Section\n=", 9) == 0;
        assert_int_not_equal(from[0], '=');
    }
    assert_true(n_at_heading >= 6);
    kvl_free(chunks);
    kvl_free(t.bytes);
}

static void test_hostile_texts_end(void **state)
{
    (void)state;
    static const char *const rows[] = {"a", "\xe2\x82\xac", "1", ".", "\n", " ", "x y. ", "#\n"};
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
        text t = {kvl_alloc(TEXT_MAX), 0};
        assert_non_null(t.bytes);
        while (t.n < 60000) put(&t, rows[r]);
        kvl_text_span *chunks = NULL;
        const size_t n = split(&t, 64, &chunks);
        check_cover(&t, chunks, n, 64);
        kvl_free(chunks);
        kvl_free(t.bytes);
    }
    kvl_text_span *chunks = NULL;
    size_t n = 7;
    kvl_error error = {0};
    assert_int_equal(kvl_split_text("", 0, 256, &chunks, &n, &error), KVL_OK);
    assert_int_equal(n, 0);
    assert_null(chunks);
    assert_int_equal(kvl_split_text("a", 1, 31, &chunks, &n, &error), KVL_ERR_OUT_OF_RANGE);
    assert_int_equal(kvl_split_text("a", KVL_SPLIT_BYTES_MAX + 1, 256, &chunks, &n, &error),
                     KVL_ERR_TOO_LARGE);
}

static void test_no_memory_is_told(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    text t = make_text(&random, 80, false);
    const int64_t live = kvl_alloc_live();
    kvl_status status = KVL_ERR_NO_MEMORY;
    int64_t n_allowed = 0;
    for (; status != KVL_OK; n_allowed++) {
        kvl_text_span *chunks = NULL;
        size_t n = 0;
        kvl_error error = {0};
        kvl_alloc_fail_after(n_allowed);
        status = kvl_split_text(t.bytes, t.n, 64, &chunks, &n, &error);
        kvl_alloc_fail_after(-1);
        if (status != KVL_OK) assert_int_equal(status, KVL_ERR_NO_MEMORY);
        kvl_free(chunks);
        assert_int_equal(kvl_alloc_live(), live);
    }
    assert_true(n_allowed > 2);
    kvl_free(t.bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chunks_cover_any_bytes),
        cmocka_unit_test(test_lengths_are_near_what_is_asked),
        cmocka_unit_test(test_another_word_changes_at_most_two_chunks),
        cmocka_unit_test(test_a_word_more_or_less_changes_few_chunks),
        cmocka_unit_test(test_structure_is_kept),
        cmocka_unit_test(test_hostile_texts_end),
        cmocka_unit_test(test_no_memory_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
