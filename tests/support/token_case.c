/* token_case.c: see its header. */
#include "token_case.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/file.h"
#include "model/tokenizer_gguf.h"

enum { TOKENS_MAX = 4096 };

/* The letter that stands for a byte: printable Latin-1 for itself, the rest from U+0100 on. */
static void write_letter(unsigned byte, char text[3])
{
    unsigned letter = byte;
    if (byte <= 0x20) letter = 0x100 + byte;
    if (byte >= 0x7f && byte <= 0xa0) letter = 0x121 + byte - 0x7f;
    if (byte == 0xad) letter = 0x143;
    if (letter < 0x80) {
        (void)snprintf(text, 3, "%c", (char)letter);
    } else {
        (void)snprintf(text, 3, "%c%c", (char)(0xc0u | letter >> 6),
                       (char)(0x80u | (letter & 63u)));
    }
}

void kvl_token_case_write(const kvl_token_case *made_of, kvl_gguf_writer *writer)
{
    static char letters[256][16];
    static const char *tokens[TOKENS_MAX];
    static int32_t types[TOKENS_MAX];
    const size_t n = 256 + made_of->n_tokens;
    assert_in_range(n, 256, TOKENS_MAX);
    for (unsigned byte = 0; byte < 256; byte++) {
        write_letter(byte, letters[byte]);
        tokens[byte] = letters[byte];
        types[byte] = 1;
    }
    for (size_t i = 0; i < made_of->n_missing; i++) {
        const uint8_t byte = made_of->missing[i];
        (void)snprintf(letters[byte], sizeof letters[byte], "[MISSING %02x]", byte);
        types[byte] = 5;
    }
    for (size_t i = 0; i < made_of->n_tokens; i++) {
        tokens[256 + i] = made_of->tokens[i];
        types[256 + i] = made_of->types == NULL ? 1 : made_of->types[i];
    }
    kvl_gguf_writer_init(writer);
    kvl_gguf_set_text(writer, "tokenizer.ggml.model", "gpt2");
    kvl_gguf_set_text(writer, "tokenizer.ggml.pre", made_of->pre);
    kvl_gguf_set_texts(writer, "tokenizer.ggml.tokens", tokens, n);
    kvl_gguf_set_i32s(writer, "tokenizer.ggml.token_type", types, n);
    kvl_gguf_set_texts(writer, "tokenizer.ggml.merges", made_of->merges, made_of->n_merges);
}

kvl_tokenizer *kvl_token_case_finish(kvl_gguf_writer *writer)
{
    kvl_gguf_bytes file = kvl_gguf_writer_finish(writer);
    kvl_gguf *gguf = NULL;
    kvl_error error = {0};
    kvl_tokenizer *tokenizer = NULL;
    if (kvl_gguf_parse(file.bytes, file.n_bytes, &gguf, &error) < 0 ||
        kvl_tokenizer_create(gguf, &tokenizer, &error) < 0) {
        fail_msg("%s", error.text);
    }
    kvl_gguf_close(gguf);
    kvl_gguf_bytes_deinit(&file);
    return tokenizer;
}

kvl_tokenizer *kvl_token_case_make(const kvl_token_case *made_of)
{
    kvl_gguf_writer *writer = kvl_alloc(sizeof *writer);
    assert_non_null(writer);
    kvl_token_case_write(made_of, writer);
    kvl_tokenizer *tokenizer = kvl_token_case_finish(writer);
    kvl_free(writer);
    return tokenizer;
}

/* ---- texts */

kvl_token_list kvl_token_case_tokenize(const kvl_tokenizer *tokenizer, const char *text,
                                       size_t n_bytes, bool parse_special)
{
    kvl_token_list list = {0};
    kvl_error error = {0};
    if (kvl_tokenize(tokenizer, text, n_bytes, parse_special, &list.ids, &list.n, &error) < 0) {
        fail_msg("%s", error.text);
    }
    return list;
}

void kvl_token_case_check_round_trip(const kvl_tokenizer *tokenizer, const char *text,
                                     size_t n_bytes)
{
    kvl_token_list list = kvl_token_case_tokenize(tokenizer, text, n_bytes, false);
    size_t at = 0;
    for (size_t i = 0; i < list.n; i++) {
        size_t n = 0;
        const char *bytes = kvl_token_bytes(tokenizer, list.ids[i], true, &n);
        assert_true(n > 0 && n <= n_bytes - at);
        assert_memory_equal(bytes, text + at, n);
        at += n;
    }
    assert_int_equal(at, n_bytes);
    kvl_free(list.ids);
}

size_t kvl_test_utf8_write(uint32_t code_point, char *text)
{
    uint32_t rest = code_point;
    if (rest < 0x80) {
        text[0] = (char)rest;
        return 1;
    }
    const size_t n = rest < 0x800 ? 2 : rest < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, rest >>= 6) text[i] = (char)(0x80 | (rest & 0x3f));
    text[0] = (char)((0xf00u >> n & 0xff) | rest);
    return n;
}

kvl_gguf *kvl_token_case_open_model(const char *name)
{
    const char *cache = getenv("XDG_CACHE_HOME");
    const char *home = getenv("HOME");
    const bool has_cache = cache != NULL && cache[0] != '\0';
    char path[4096];
    (void)snprintf(path, sizeof path, "%s%s/kvloom/models/%s.gguf",
                   has_cache      ? cache
                   : home == NULL ? ""
                                  : home,
                   has_cache ? "" : "/.cache", name);
    kvl_gguf *gguf = NULL;
    kvl_error error = {0};
    const kvl_status status = kvl_gguf_open(path, &gguf, &error);
    if (status == KVL_ERR_NOT_FOUND) {
        print_message("%s is not there: skipped\n", path);
    } else if (status < 0) {
        fail_msg("%s", error.text);
    }
    return gguf;
}

/* ---- golden files */

kvl_golden kvl_golden_open(const char *path)
{
    kvl_golden golden = {0};
    kvl_error error = {0};
    if (kvl_file_read(path, 64u << 20, &golden.bytes, &golden.n_bytes, &error) < 0) {
        fail_msg("%s", error.text);
    }
    return golden;
}

void kvl_golden_close(kvl_golden *golden)
{
    kvl_free(golden->bytes);
    *golden = (kvl_golden){0};
}

char kvl_golden_letter(kvl_golden *golden)
{
    if (golden->at > 0) {
        assert_true(golden->at < golden->n_bytes);
        assert_int_equal(golden->bytes[golden->at], '\n');
        golden->at++;
    }
    if (golden->at == golden->n_bytes) return 0;
    return golden->bytes[golden->at++];
}

static void skip_space(kvl_golden *golden)
{
    assert_true(golden->at < golden->n_bytes);
    assert_int_equal(golden->bytes[golden->at], ' ');
    golden->at++;
}

uint64_t kvl_golden_number(kvl_golden *golden, int base)
{
    skip_space(golden);
    /* The file ends with NUL in memory, so this stops inside. */
    char *past = NULL;
    const uint64_t number = strtoull(golden->bytes + golden->at, &past, base);
    assert_true(past > golden->bytes + golden->at);
    golden->at = (size_t)(past - golden->bytes);
    return number;
}

void kvl_golden_word(kvl_golden *golden, char *word, size_t size)
{
    skip_space(golden);
    const size_t n = strcspn(golden->bytes + golden->at, " \n");
    assert_in_range(n, 1, size - 1);
    memcpy(word, golden->bytes + golden->at, n);
    word[n] = '\0';
    golden->at += n;
}

const char *kvl_golden_bytes(kvl_golden *golden, size_t *n_bytes)
{
    *n_bytes = (size_t)kvl_golden_number(golden, 10);
    skip_space(golden);
    assert_true(*n_bytes <= golden->n_bytes - golden->at);
    const char *bytes = golden->bytes + golden->at;
    golden->at += *n_bytes;
    return bytes;
}
