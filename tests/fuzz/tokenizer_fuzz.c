/* tokenizer_fuzz.c: a libFuzzer target over text: tokens of any bytes give the bytes back, and what
 * streams out of them is UTF-8. (Vocabularies from hostile files: gguf_fuzz.c.)
 *
 * The first byte of the data picks the pre-tokenizer and whether special tokens are looked for; the
 * rest is the text. Link with tests/support:
 *   clang -fsanitize=fuzzer,address,undefined ... tests/fuzz/tokenizer_fuzz.c
 * Without a fuzzing engine, -DKVL_FUZZ_REPLAY gives a main that runs the files named to it. */
#include "base/alloc.h"
#include "model/gguf.h"
#include "model/tokenizer_gguf.h"
#include "model/unicode_class.h"
#include "tiny_gguf.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { KINDS = 4 };

/* The vocabulary of a tiny model with each pre-tokenizer; made once and kept. */
static const kvl_tokenizer *tokenizer_of(size_t kind)
{
    static const char *const names[KINDS] = {"gpt-2", "smollm", "qwen2", "llama-bpe"};
    static kvl_tokenizer *made[KINDS];
    static kvl_gguf_writer writer;
    if (made[kind] != NULL) return made[kind];
    const kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("llama");
    kvl_tiny_gguf_write(&options, &writer);
    kvl_gguf_set_text(&writer, "tokenizer.ggml.pre", names[kind]);
    kvl_gguf_bytes file = kvl_gguf_writer_finish(&writer);
    kvl_gguf *gguf = NULL;
    KVL_ASSERT(kvl_gguf_parse(file.bytes, file.n_bytes, &gguf, NULL) == KVL_OK);
    KVL_ASSERT(kvl_tokenizer_create(gguf, &made[kind], NULL) == KVL_OK);
    kvl_gguf_close(gguf);
    kvl_gguf_bytes_deinit(&file);
    return made[kind];
}

static void check_utf8(const char *text, size_t n_bytes)
{
    for (size_t at = 0; at < n_bytes;) {
        uint32_t code_point = 0;
        const size_t length = kvl_utf8_read(text + at, n_bytes - at, &code_point);
        KVL_ASSERT(length > 0);
        at += length;
    }
}

static void check_stream(const kvl_tokenizer *tokenizer, const uint32_t *ids, size_t n_ids)
{
    char out[KVL_DETOKENIZER_OUT_MIN];
    kvl_detokenizer detokenizer;
    kvl_detokenizer_init(&detokenizer, tokenizer);
    for (size_t i = 0; i < n_ids; i++) {
        check_utf8(out, kvl_detokenizer_push(&detokenizer, ids[i], out, sizeof out));
    }
    check_utf8(out, kvl_detokenizer_finish(&detokenizer, out, sizeof out));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0) return 0;
    const kvl_tokenizer *tokenizer = tokenizer_of(data[0] % KINDS);
    const char *text = (const char *)data + 1;
    const size_t n_bytes = size - 1;
    uint32_t *ids = NULL;
    size_t n_ids = 0;
    const bool parse_special = (data[0] & KINDS) != 0;
    KVL_ASSERT(kvl_tokenize(tokenizer, text, n_bytes, parse_special, &ids, &n_ids, NULL) == KVL_OK);
    size_t at = 0;
    for (size_t i = 0; i < n_ids; i++) {
        size_t n = 0;
        const char *bytes = kvl_token_bytes(tokenizer, ids[i], true, &n);
        KVL_ASSERT(n > 0 && n <= n_bytes - at);
        KVL_ASSERT(memcmp(bytes, text + at, n) == 0);
        at += n;
    }
    KVL_ASSERT(at == n_bytes);
    check_stream(tokenizer, ids, n_ids);
    kvl_free(ids);
    return 0;
}

#ifdef KVL_FUZZ_REPLAY
#include "base/file.h"

#include <stdio.h>

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        char *bytes = NULL;
        size_t n_bytes = 0;
        kvl_error error = {0};
        if (kvl_file_read(argv[i], 64u << 20, &bytes, &n_bytes, &error) < 0) {
            (void)fprintf(stderr, "%s\n", error.text);
            return 1;
        }
        (void)LLVMFuzzerTestOneInput((const uint8_t *)bytes, n_bytes);
        kvl_free(bytes);
    }
    return 0;
}
#endif
