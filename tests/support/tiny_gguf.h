/* tiny_gguf.h: complete language models of a few kilobytes, random and reproducible, as GGUF files
 * in memory or on disk. For every room whose tests need a model:
 *
 *     kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("qwen2");
 *     options.n_layers = 3;
 *     kvl_gguf_bytes file = kvl_tiny_gguf_make(&options);
 *     kvl_model *model = NULL;
 *     assert_int_equal(kvl_model_parse(file.bytes, file.n_bytes, &model, NULL), KVL_OK);
 *     ...
 *     kvl_model_close(model);            (before the bytes: the weights are read in place)
 *     kvl_gguf_bytes_deinit(&file);
 *
 * or kvl_tiny_gguf_save(&options, path) and kvl_model_open(path, ...).
 *
 * Weights   matrices normal with variance 1 / n_inputs, so that activations keep their size from
 *           layer to layer; norms about 1; biases about 0.1; the same seed gives the same file.
 * Tokenizer byte-level BPE, "smollm" for llama and "qwen2" for qwen2. Ids:
 *             0 .. 255                the bytes, in their order: id 65 is "A"
 *             256 .. 256 + 12         what the 13 merges make: "th", "the", " the", ...
 *             KVL_TINY_END_OF_TEXT    <|endoftext|>
 *             KVL_TINY_TURN_START     <|im_start|>   (beginning of text)
 *             KVL_TINY_TURN_END       <|im_end|>     (end of text)
 * Template  ChatML without a default system message. */
#ifndef KVL_TEST_TINY_GGUF_H
#define KVL_TEST_TINY_GGUF_H

#include "gguf_writer.h"

enum {
    KVL_TINY_MERGES = 13,
    KVL_TINY_END_OF_TEXT = 256 + KVL_TINY_MERGES,
    KVL_TINY_TURN_START,
    KVL_TINY_TURN_END,
    KVL_TINY_VOCABULARY, /* 272 */
};

/* The text of the template, without C's escapes. */
extern const char kvl_tiny_chat_template[];

typedef struct kvl_tiny_gguf_options {
    const char *architecture; /* "llama" or "qwen2" */
    uint32_t n_layers;
    uint32_t n_heads;
    uint32_t n_kv_heads;   /* divides n_heads */
    uint32_t head_dim;     /* a multiple of 16 */
    uint32_t width;        /* a multiple of 32 for quantised matrices; need not be heads * dim */
    uint32_t feed_forward; /* a multiple of 32 for quantised matrices */
    uint32_t n_context;
    kvl_dtype matrices;    /* F32, F16, BF16, Q8_0 or Q4_1 */
    bool is_mixed;         /* instead: F32, F16, Q8_0 and Q4_1 in turn, from tensor to tensor */
    kvl_dtype vectors;     /* norms and biases: F32, F16 or BF16 */
    bool is_tied;          /* no output.weight */
    bool has_llama_biases; /* query, key and value biases in a llama too; qwen2 always has them */
    bool has_frequency_factors; /* rope_freqs.weight, as llama 3.1 has; llama only */
    float frequency_base;
    float norm_epsilon;
    uint64_t seed;
} kvl_tiny_gguf_options;

/* 2 layers, 4 heads over 2 KV heads of 16, width 64, feed-forward 96, context 256, F32, tied,
 * seed 1. */
kvl_tiny_gguf_options kvl_tiny_gguf_defaults(const char *architecture);

/* Starts the writer and fills it; ended with kvl_gguf_writer_finish. */
void kvl_tiny_gguf_write(const kvl_tiny_gguf_options *options, kvl_gguf_writer *writer);
/* Owns: ended with kvl_gguf_bytes_deinit. */
kvl_gguf_bytes kvl_tiny_gguf_make(const kvl_tiny_gguf_options *options);
/* The same into a file. */
void kvl_tiny_gguf_save(const kvl_tiny_gguf_options *options, const char *path);

#endif /* KVL_TEST_TINY_GGUF_H */
