/* tiny_gguf.c: metadata, a tokenizer and random weights. */
#include "tiny_gguf.h"

#include "base/alloc.h"
#include "base/file.h"
#include "test_random.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

const char kvl_tiny_chat_template[] =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' "
    "}}{% endif %}";

/* In order of rank. Texts are as the vocabulary writes bytes: U+0120 is the space. */
static const char *const merges[KVL_TINY_MERGES] = {
    "t h",  "th e",       "\u0120 the", "i n",           "e r",  "\u0120 a", "a n",
    "an d", "\u0120 and", "o n",        "\u0120 \u0120", "in g", "l l",
};

kvl_tiny_gguf_options kvl_tiny_gguf_defaults(const char *architecture)
{
    return (kvl_tiny_gguf_options){
        .architecture = architecture,
        .n_layers = 2,
        .n_heads = 4,
        .n_kv_heads = 2,
        .head_dim = 16,
        .width = 64,
        .feed_forward = 96,
        .n_context = 256,
        .matrices = KVL_DTYPE_F32,
        .vectors = KVL_DTYPE_F32,
        .is_tied = true,
        .frequency_base = 10000.0F,
        .norm_epsilon = 1e-5F,
        .seed = 1,
    };
}

/* ---- tokenizer */

/* Byte-level vocabularies show every byte as a letter: printable Latin-1 as itself, the others as
 * the letters from U+0100 on, in order. */
static void write_byte_letter(unsigned byte, char text[3])
{
    unsigned letter = 256;
    for (unsigned b = 0; b <= byte; b++) {
        const bool is_itself = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        if (b == byte && is_itself) letter = b;
        if (b < byte && !is_itself) letter++;
    }
    if (letter < 128) {
        (void)snprintf(text, 3, "%c", (char)letter);
    } else {
        (void)snprintf(text, 3, "%c%c", (char)(0xc0u | letter >> 6),
                       (char)(0x80u | (letter & 63u)));
    }
}

static void write_tokenizer(const kvl_tiny_gguf_options *options, kvl_gguf_writer *writer)
{
    char texts[KVL_TINY_VOCABULARY][16];
    const char *tokens[KVL_TINY_VOCABULARY];
    int32_t types[KVL_TINY_VOCABULARY];
    for (unsigned b = 0; b < 256; b++) write_byte_letter(b, texts[b]);
    for (size_t i = 0; i < KVL_TINY_MERGES; i++) {
        const int n_left = (int)strcspn(merges[i], " ");
        (void)snprintf(texts[256 + i], sizeof texts[0], "%.*s%s", n_left, merges[i],
                       merges[i] + n_left + 1);
    }
    (void)snprintf(texts[KVL_TINY_END_OF_TEXT], sizeof texts[0], "<|endoftext|>");
    (void)snprintf(texts[KVL_TINY_TURN_START], sizeof texts[0], "<|im_start|>");
    (void)snprintf(texts[KVL_TINY_TURN_END], sizeof texts[0], "<|im_end|>");
    for (size_t i = 0; i < KVL_TINY_VOCABULARY; i++) {
        tokens[i] = texts[i];
        types[i] = i < KVL_TINY_END_OF_TEXT ? 1 : 3; /* normal, control */
    }
    const bool is_qwen = strcmp(options->architecture, "qwen2") == 0;
    kvl_gguf_set_text(writer, "tokenizer.ggml.model", "gpt2");
    kvl_gguf_set_text(writer, "tokenizer.ggml.pre", is_qwen ? "qwen2" : "smollm");
    kvl_gguf_set_texts(writer, "tokenizer.ggml.tokens", tokens, KVL_TINY_VOCABULARY);
    kvl_gguf_set_i32s(writer, "tokenizer.ggml.token_type", types, KVL_TINY_VOCABULARY);
    kvl_gguf_set_texts(writer, "tokenizer.ggml.merges", merges, KVL_TINY_MERGES);
    kvl_gguf_set_u32(writer, "tokenizer.ggml.bos_token_id", KVL_TINY_TURN_START);
    kvl_gguf_set_u32(writer, "tokenizer.ggml.eos_token_id", KVL_TINY_TURN_END);
    kvl_gguf_set_u32(writer, "tokenizer.ggml.padding_token_id", KVL_TINY_END_OF_TEXT);
    kvl_gguf_set_bool(writer, "tokenizer.ggml.add_bos_token", false);
    kvl_gguf_set_text(writer, "tokenizer.chat_template", kvl_tiny_chat_template);
}

/* ---- shape */

static void set_size(kvl_gguf_writer *writer, const char *architecture, const char *suffix,
                     uint32_t value)
{
    char key[96];
    (void)snprintf(key, sizeof key, "%s.%s", architecture, suffix);
    kvl_gguf_set_u32(writer, key, value);
}

static void write_shape(const kvl_tiny_gguf_options *options, kvl_gguf_writer *writer)
{
    const char *architecture = options->architecture;
    kvl_gguf_set_text(writer, "general.architecture", architecture);
    kvl_gguf_set_text(writer, "general.type", "model");
    kvl_gguf_set_text(writer, "general.name", "Tiny");
    set_size(writer, architecture, "block_count", options->n_layers);
    set_size(writer, architecture, "context_length", options->n_context);
    set_size(writer, architecture, "embedding_length", options->width);
    set_size(writer, architecture, "feed_forward_length", options->feed_forward);
    set_size(writer, architecture, "attention.head_count", options->n_heads);
    set_size(writer, architecture, "attention.head_count_kv", options->n_kv_heads);
    set_size(writer, architecture, "vocab_size", KVL_TINY_VOCABULARY);
    if (options->width != options->n_heads * options->head_dim) {
        set_size(writer, architecture, "attention.key_length", options->head_dim);
        set_size(writer, architecture, "attention.value_length", options->head_dim);
    }
    char key[96];
    (void)snprintf(key, sizeof key, "%s.rope.freq_base", architecture);
    kvl_gguf_set_f32(writer, key, options->frequency_base);
    (void)snprintf(key, sizeof key, "%s.attention.layer_norm_rms_epsilon", architecture);
    kvl_gguf_set_f32(writer, key, options->norm_epsilon);
}

/* ---- weights */

typedef struct weight_source {
    const kvl_tiny_gguf_options *options;
    kvl_gguf_writer *writer;
    kvl_random random;
    unsigned n_matrices;
} weight_source;

static void add_matrix(weight_source *source, const char *name, uint32_t n_outputs,
                       uint32_t n_inputs)
{
    static const kvl_dtype in_turn[] = {KVL_DTYPE_Q8_0, KVL_DTYPE_F32, KVL_DTYPE_Q4_1,
                                        KVL_DTYPE_F16};
    const kvl_dtype dtype =
        source->options->is_mixed ? in_turn[source->n_matrices++ % 4] : source->options->matrices;
    const size_t n = (size_t)n_outputs * n_inputs;
    float *numbers = kvl_alloc(n * sizeof *numbers);
    KVL_ASSERT(numbers != NULL);
    kvl_test_fill_normal(&source->random, numbers, n);
    for (size_t i = 0; i < n; i++) numbers[i] /= sqrtf((float)n_inputs);
    kvl_gguf_set_tensor(source->writer, name, n_outputs, n_inputs, dtype, numbers);
    kvl_free(numbers);
}

static void add_vector(weight_source *source, const char *name, uint32_t n, float mean)
{
    float *numbers = kvl_alloc(n * sizeof *numbers);
    KVL_ASSERT(numbers != NULL);
    kvl_test_fill_normal(&source->random, numbers, n);
    for (size_t i = 0; i < n; i++) numbers[i] = mean + 0.1F * numbers[i];
    kvl_gguf_set_tensor(source->writer, name, n, 0, source->options->vectors, numbers);
    kvl_free(numbers);
}

static const char *layer_name(char name[64], uint32_t layer, const char *suffix)
{
    (void)snprintf(name, 64, "blk.%" PRIu32 ".%s", layer, suffix);
    return name;
}

static void add_layer(weight_source *source, uint32_t layer)
{
    const kvl_tiny_gguf_options *options = source->options;
    const uint32_t width = options->width, feed_forward = options->feed_forward;
    const uint32_t queries = options->n_heads * options->head_dim;
    const uint32_t key_values = options->n_kv_heads * options->head_dim;
    char name[64];
    add_vector(source, layer_name(name, layer, "attn_norm.weight"), width, 1);
    add_matrix(source, layer_name(name, layer, "ffn_down.weight"), width, feed_forward);
    add_matrix(source, layer_name(name, layer, "ffn_gate.weight"), feed_forward, width);
    add_matrix(source, layer_name(name, layer, "ffn_up.weight"), feed_forward, width);
    add_vector(source, layer_name(name, layer, "ffn_norm.weight"), width, 1);
    add_matrix(source, layer_name(name, layer, "attn_k.weight"), key_values, width);
    add_matrix(source, layer_name(name, layer, "attn_output.weight"), width, queries);
    add_matrix(source, layer_name(name, layer, "attn_q.weight"), queries, width);
    add_matrix(source, layer_name(name, layer, "attn_v.weight"), key_values, width);
    if (strcmp(options->architecture, "qwen2") != 0 && !options->has_llama_biases) return;
    add_vector(source, layer_name(name, layer, "attn_q.bias"), queries, 0);
    add_vector(source, layer_name(name, layer, "attn_k.bias"), key_values, 0);
    add_vector(source, layer_name(name, layer, "attn_v.bias"), key_values, 0);
}

/* Slow pairs are slowed further, as for a longer context. Always F32, as converters write it. */
static void add_frequency_factors(weight_source *source)
{
    float factors[128];
    const uint32_t n_pairs = source->options->head_dim / 2;
    KVL_ASSERT(n_pairs <= sizeof factors / sizeof *factors);
    for (uint32_t j = 0; j < n_pairs; j++) factors[j] = j < n_pairs / 2 ? 1.0F : 8.0F;
    kvl_gguf_set_tensor(source->writer, "rope_freqs.weight", n_pairs, 0, KVL_DTYPE_F32, factors);
}

void kvl_tiny_gguf_write(const kvl_tiny_gguf_options *options, kvl_gguf_writer *writer)
{
    kvl_gguf_writer_init(writer);
    write_shape(options, writer);
    write_tokenizer(options, writer);
    weight_source source = {options, writer, {options->seed}, 0};
    if (options->has_frequency_factors) add_frequency_factors(&source);
    if (!options->is_tied)
        add_matrix(&source, "output.weight", KVL_TINY_VOCABULARY, options->width);
    add_matrix(&source, "token_embd.weight", KVL_TINY_VOCABULARY, options->width);
    for (uint32_t layer = 0; layer < options->n_layers; layer++) add_layer(&source, layer);
    add_vector(&source, "output_norm.weight", options->width, 1);
}

kvl_gguf_bytes kvl_tiny_gguf_make(const kvl_tiny_gguf_options *options)
{
    /* The lists of a writer are too large for a small stack. */
    kvl_gguf_writer *writer = kvl_alloc(sizeof *writer);
    KVL_ASSERT(writer != NULL);
    kvl_tiny_gguf_write(options, writer);
    const kvl_gguf_bytes file = kvl_gguf_writer_finish(writer);
    kvl_free(writer);
    return file;
}

void kvl_tiny_gguf_save(const kvl_tiny_gguf_options *options, const char *path)
{
    kvl_gguf_bytes file = kvl_tiny_gguf_make(options);
    KVL_ASSERT(kvl_file_write(path, file.bytes, file.n_bytes, NULL) == KVL_OK);
    kvl_gguf_bytes_deinit(&file);
}
