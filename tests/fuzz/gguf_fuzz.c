/* gguf_fuzz.c: a libFuzzer target over everything that reads a model file: the tables, and on top
 * of them shape, frequencies, tensors, tokenizer and template.
 *
 * Bytes are copied to memory of exactly their size, so that the address sanitizer sees a step past
 * the end. Good seeds are the files of tests/support/tiny_gguf.h: mutation seldom invents a model.
 *   clang -fsanitize=fuzzer,address,undefined ... tests/fuzz/gguf_fuzz.c
 * Without a fuzzing engine, -DKVL_FUZZ_REPLAY gives a main that runs the files named to it. */
#include "base/alloc.h"
#include "base/hash.h"
#include "model/gguf.h"
#include "model/model.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Where sums go, so that the reading is not optimised away. */
static volatile uint64_t sum_read;

static void read_values(const kvl_gguf *gguf)
{
    for (size_t i = 0; i < kvl_gguf_n_values(gguf); i++) {
        const kvl_gguf_value *value = kvl_gguf_value_at(gguf, i);
        sum_read += kvl_checksum(value->key.bytes, value->key.n_bytes);
        sum_read += kvl_checksum(value->bytes, value->n_bytes);
        if (value->type != KVL_GGUF_ARRAY || value->element_type != KVL_GGUF_TEXT) continue;
        kvl_gguf_texts texts = kvl_gguf_texts_of(value);
        kvl_gguf_text text;
        while (kvl_gguf_texts_next(&texts, &text))
            sum_read += kvl_checksum(text.bytes, text.n_bytes);
    }
}

static void read_tensors(const kvl_gguf *gguf)
{
    for (size_t i = 0; i < kvl_gguf_n_tensors(gguf); i++) {
        const kvl_gguf_tensor *tensor = kvl_gguf_tensor_at(gguf, i);
        KVL_ASSERT((uintptr_t)tensor->data % 8 == 0);
        sum_read += kvl_checksum(tensor->data, tensor->n_bytes);
    }
}

/* An opened model promises that every weight is there and every token has its row. */
static void read_model(const uint8_t *bytes, size_t n_bytes)
{
    kvl_model *model = NULL;
    kvl_error error = {0};
    const kvl_status status = kvl_model_parse(bytes, n_bytes, &model, &error);
    KVL_ASSERT((status == KVL_OK) == (model != NULL));
    KVL_ASSERT(status == KVL_OK || error.text[0] != '\0');
    if (model == NULL) return;
    const kvl_digest digest = kvl_model_fingerprint(model);
    sum_read += digest.bytes[0];
    const kvl_model_shape *shape = kvl_model_shape_of(model);
    KVL_ASSERT(kvl_tokenizer_n_vocab(kvl_model_tokenizer(model)) == shape->n_vocab);
    uint32_t *ids = NULL;
    size_t n_ids = 0;
    static const char text[] = "a text, 12345 \xc3\xa9\xff <|im_end|>";
    if (kvl_tokenize(kvl_model_tokenizer(model), text, sizeof text - 1, true, &ids, &n_ids, NULL) ==
        KVL_OK) {
        for (size_t i = 0; i < n_ids; i++) KVL_ASSERT(ids[i] < shape->n_vocab);
    }
    kvl_free(ids);
    kvl_model_close(model);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const int64_t live = kvl_alloc_live();
    uint8_t *bytes = kvl_alloc(size == 0 ? 1 : size);
    KVL_ASSERT(bytes != NULL);
    if (size > 0) memcpy(bytes, data, size);
    kvl_gguf *gguf = NULL;
    if (kvl_gguf_parse(bytes, size, &gguf, NULL) == KVL_OK) {
        read_values(gguf);
        read_tensors(gguf);
        kvl_gguf_close(gguf);
        read_model(bytes, size);
    }
    kvl_free(bytes);
    KVL_ASSERT(kvl_alloc_live() == live);
    return 0;
}

#ifdef KVL_FUZZ_REPLAY
#include "base/file.h"

int main(int n_arguments, char **arguments)
{
    for (int i = 1; i < n_arguments; i++) {
        kvl_file_map map;
        if (kvl_file_map_open(arguments[i], &map, NULL) != KVL_OK) return 1;
        (void)LLVMFuzzerTestOneInput(map.bytes, map.n_bytes);
        kvl_file_map_close(&map);
    }
    return 0;
}
#endif
