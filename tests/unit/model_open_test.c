/* model: a file of each architecture comes back as the shape and weights that were written; what
 * would compute something else is refused by name; the fingerprint follows what matters to KV and
 * nothing else; damage anywhere in the tables is refused or harmless. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/file.h"
#include "model/model.h"
#include "test_random.h"
#include "tiny_gguf.h"

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* ---- help */

/* Too large for a stack with sanitizers; one at a time. */
static kvl_gguf_writer writer;

typedef struct opened {
    kvl_gguf_bytes file;
    kvl_model *model;
} opened;

static opened open_file(kvl_gguf_bytes file)
{
    opened result = {file, NULL};
    kvl_error error = {0};
    if (kvl_model_parse(file.bytes, file.n_bytes, &result.model, &error) != KVL_OK)
        fail_msg("not opened: %s", error.text);
    assert_non_null(result.model);
    return result;
}

static opened open_tiny(const kvl_tiny_gguf_options *options)
{
    return open_file(kvl_tiny_gguf_make(options));
}

static void close_opened(opened *one)
{
    kvl_model_close(one->model);
    kvl_gguf_bytes_deinit(&one->file);
}

static void start_tiny(const char *architecture)
{
    const kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults(architecture);
    kvl_tiny_gguf_write(&options, &writer);
}

/* Opening what the writer holds must fail so, with both pieces in the text. */
static void assert_refused(kvl_status wanted, const char *piece, const char *other_piece)
{
    kvl_gguf_bytes file = kvl_gguf_writer_finish(&writer);
    const int64_t live = kvl_alloc_live();
    kvl_model *model = NULL;
    kvl_error error = {0};
    const kvl_status status = kvl_model_parse(file.bytes, file.n_bytes, &model, &error);
    if (status != wanted || strstr(error.text, piece) == NULL ||
        strstr(error.text, other_piece) == NULL)
        fail_msg("%s: \"%s\" instead of %s with \"%s\" and \"%s\"", kvl_status_name(status),
                 error.text, kvl_status_name(wanted), piece, other_piece);
    assert_null(model);
    assert_int_equal(kvl_alloc_live(), live);
    kvl_gguf_bytes_deinit(&file);
}

/* A random shape that the format, the kernels and the quantised blocks allow. */
static kvl_tiny_gguf_options random_options(kvl_random *random)
{
    static const kvl_dtype matrices[] = {KVL_DTYPE_F32, KVL_DTYPE_F16, KVL_DTYPE_BF16,
                                         KVL_DTYPE_Q8_0, KVL_DTYPE_Q4_1};
    static const kvl_dtype vectors[] = {KVL_DTYPE_F32, KVL_DTYPE_F16, KVL_DTYPE_BF16};
    const bool is_llama = kvl_test_below(random, 2) == 0;
    kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults(is_llama ? "llama" : "qwen2");
    options.n_layers = 1 + kvl_test_below(random, 3);
    options.n_kv_heads = 1 + kvl_test_below(random, 3);
    options.n_heads = options.n_kv_heads * (1 + kvl_test_below(random, 3));
    options.head_dim = 32 * (1 + kvl_test_below(random, 2));
    options.width = 32 * (1 + kvl_test_below(random, 4));
    options.feed_forward = 32 * (1 + kvl_test_below(random, 4));
    options.n_context = 1 + kvl_test_below(random, 5000);
    options.matrices = matrices[kvl_test_below(random, 5)];
    options.is_mixed = kvl_test_below(random, 2) == 0;
    options.vectors = vectors[kvl_test_below(random, 3)];
    options.is_tied = kvl_test_below(random, 2) == 0;
    options.has_llama_biases = kvl_test_below(random, 2) == 0;
    options.seed = kvl_random_next(random);
    return options;
}

/* ---- reading back */

static void check_shape(const kvl_model_shape *shape, const kvl_tiny_gguf_options *options)
{
    const bool is_llama = strcmp(options->architecture, "llama") == 0;
    assert_int_equal(shape->n_layers, options->n_layers);
    assert_int_equal(shape->n_heads, options->n_heads);
    assert_int_equal(shape->n_kv_heads, options->n_kv_heads);
    assert_int_equal(shape->head_dim, options->head_dim);
    assert_int_equal(shape->rotary_dim, options->head_dim);
    assert_int_equal(shape->width, options->width);
    assert_int_equal(shape->feed_forward, options->feed_forward);
    assert_int_equal(shape->n_vocab, KVL_TINY_VOCABULARY);
    assert_int_equal(shape->n_context, options->n_context);
    assert_true(shape->norm_epsilon == options->norm_epsilon);
    assert_int_equal(shape->pairs, is_llama ? KVL_PAIRS_ADJACENT : KVL_PAIRS_HALVES);
    assert_string_equal(shape->architecture, options->architecture);
    assert_string_equal(shape->name, "Tiny");
}

static void check_matrix(const char *name, const kvl_matrix *matrix, uint32_t n_outputs,
                         uint32_t n_inputs)
{
    const kvl_gguf_written_tensor *written = kvl_gguf_written(&writer, name);
    assert_non_null(written);
    assert_int_equal(matrix->n_outputs, n_outputs);
    assert_int_equal(matrix->n_inputs, n_inputs);
    assert_int_equal(matrix->row_bytes * n_outputs, written->data.n_bytes);
    assert_memory_equal(matrix->data, written->data.bytes, written->data.n_bytes);
    const kvl_dtype_info *about = kvl_dtype_about(matrix->dtype);
    assert_int_equal(matrix->row_bytes, n_inputs / about->block_weights * about->block_bytes);
}

/* `vectors` is what norms and biases were written as; the reference has them as F32. */
static void check_vector(const char *name, const float *vector, uint32_t n, kvl_dtype vectors)
{
    const kvl_gguf_written_tensor *written = kvl_gguf_written(&writer, name);
    if (written == NULL) {
        assert_null(vector);
        return;
    }
    assert_non_null(vector);
    assert_int_equal((uintptr_t)vector % sizeof *vector, 0);
    assert_int_equal(written->data.n_bytes, n * sizeof(float));
    for (uint32_t i = 0; i < n; i++) {
        float exact;
        memcpy(&exact, written->data.bytes + i * sizeof exact, sizeof exact);
        /* Half a step of 11 and of 8 significant bits, or of the smallest half. */
        const double step = vectors == KVL_DTYPE_F32   ? 0
                            : vectors == KVL_DTYPE_F16 ? 0x1p-11
                                                       : 0x1p-8;
        const double bound = fmax(step * fabs((double)exact), step > 0 ? 0x1p-25 : 0);
        assert_true(fabs((double)vector[i] - (double)exact) <= bound);
    }
}

/* The same file with vectors as F32 is the reference; the writer keeps it while it is compared. */
static void check_weights(const kvl_model *model, const kvl_tiny_gguf_options *options)
{
    kvl_tiny_gguf_options reference = *options;
    reference.vectors = KVL_DTYPE_F32;
    kvl_tiny_gguf_write(&reference, &writer);
    const uint32_t width = options->width, feed_forward = options->feed_forward;
    const uint32_t queries = options->n_heads * options->head_dim;
    const uint32_t key_values = options->n_kv_heads * options->head_dim;
    check_matrix("token_embd.weight", kvl_model_embedding(model), KVL_TINY_VOCABULARY, width);
    check_matrix(options->is_tied ? "token_embd.weight" : "output.weight", kvl_model_output(model),
                 KVL_TINY_VOCABULARY, width);
    check_vector("output_norm.weight", kvl_model_output_norm(model), width, options->vectors);
    for (uint32_t l = 0; l < options->n_layers; l++) {
        const kvl_layer_weights *layer = kvl_model_layer(model, l);
        char name[64];
#define NAMED(suffix) ((void)snprintf(name, sizeof name, "blk.%u.%s", l, suffix), name)
        check_vector(NAMED("attn_norm.weight"), layer->attention_norm, width, options->vectors);
        check_matrix(NAMED("attn_q.weight"), &layer->query, queries, width);
        check_matrix(NAMED("attn_k.weight"), &layer->key, key_values, width);
        check_matrix(NAMED("attn_v.weight"), &layer->value, key_values, width);
        check_matrix(NAMED("attn_output.weight"), &layer->attention_output, width, queries);
        check_vector(NAMED("attn_q.bias"), layer->query_bias, queries, options->vectors);
        check_vector(NAMED("attn_k.bias"), layer->key_bias, key_values, options->vectors);
        check_vector(NAMED("attn_v.bias"), layer->value_bias, key_values, options->vectors);
        check_vector(NAMED("ffn_norm.weight"), layer->feed_forward_norm, width, options->vectors);
        check_matrix(NAMED("ffn_gate.weight"), &layer->gate, feed_forward, width);
        check_matrix(NAMED("ffn_up.weight"), &layer->up, feed_forward, width);
        check_matrix(NAMED("ffn_down.weight"), &layer->down, width, feed_forward);
#undef NAMED
    }
    kvl_gguf_bytes file = kvl_gguf_writer_finish(&writer);
    kvl_gguf_bytes_deinit(&file);
}

static void test_random_models_are_read_back(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 40; round++) {
        const kvl_tiny_gguf_options options = random_options(&random);
        opened one = open_tiny(&options);
        check_shape(kvl_model_shape_of(one.model), &options);
        check_weights(one.model, &options);
        assert_int_equal(kvl_tokenizer_n_vocab(kvl_model_tokenizer(one.model)),
                         KVL_TINY_VOCABULARY);
        assert_non_null(kvl_model_chat_template(one.model));
        close_opened(&one);
    }
}

/* Every kind of half there is, by the format's definition and not by a twin of the code. */
static void test_halves_are_converted(void **state)
{
    (void)state;
    kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("llama");
    options.vectors = KVL_DTYPE_F16;
    static const struct {
        uint16_t half;
        float value;
    } cases[] = {{0x0000, 0.0F},          {0x8000, -0.0F},    {0x0001, 0x1p-24F},
                 {0x83ff, -0x1.ff8p-15F}, {0x0400, 0x1p-14F}, {0x3c00, 1.0F},
                 {0x3555, 0x1.554p-2F},   {0xc000, -2.0F},    {0x7bff, 65504.0F},
                 {0x7c00, INFINITY},      {0xfc00, -INFINITY}};
    kvl_tiny_gguf_write(&options, &writer);
    kvl_gguf_written_tensor *norm = kvl_gguf_written(&writer, "output_norm.weight");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        memcpy(norm->data.bytes + 2 * i, &cases[i].half, 2);
    opened one = open_file(kvl_gguf_writer_finish(&writer));
    const float *values = kvl_model_output_norm(one.model);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_memory_equal(&values[i], &cases[i].value, sizeof(float));
    close_opened(&one);
}

/* ---- rotation */

static void test_frequencies_are_powers_of_the_base(void **state)
{
    (void)state;
    kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("qwen2");
    options.frequency_base = 1e6F;
    opened one = open_tiny(&options);
    for (uint32_t j = 0; j < 8; j++) {
        const double wanted = exp(-log(1e6) * j / 8);
        assert_true(fabs(kvl_model_inverse_frequencies(one.model)[j] / wanted - 1) < 1e-12);
    }
    close_opened(&one);

    start_tiny("llama");
    kvl_gguf_remove_key(&writer, "llama.rope.freq_base");
    kvl_gguf_set_u32(&writer, "llama.rope.dimension_count", 8);
    kvl_gguf_set_text(&writer, "llama.rope.scaling.type", "linear");
    kvl_gguf_set_f32(&writer, "llama.rope.scaling.factor", 4);
    one = open_file(kvl_gguf_writer_finish(&writer));
    assert_int_equal(kvl_model_shape_of(one.model)->rotary_dim, 8);
    for (uint32_t j = 0; j < 4; j++) {
        const double wanted = exp(-log(1e4) * j / 4) / 4;
        assert_true(fabs(kvl_model_inverse_frequencies(one.model)[j] / wanted - 1) < 1e-12);
    }
    close_opened(&one);
}

/* The first frequency of a model, with a scaling type ("" for none) and the old or new factor. */
static double first_frequency(const char *type, const char *factor_key, float factor)
{
    start_tiny("llama");
    if (*type != '\0') kvl_gguf_set_text(&writer, "llama.rope.scaling.type", type);
    kvl_gguf_set_f32(&writer, factor_key, factor);
    opened one = open_file(kvl_gguf_writer_finish(&writer));
    const double frequency = kvl_model_inverse_frequencies(one.model)[0];
    close_opened(&one);
    return frequency;
}

static void test_linear_factors_under_all_their_names(void **state)
{
    (void)state;
    assert_true(first_frequency("", "llama.rope.scaling.factor", 8) == 0.125);
    assert_true(first_frequency("", "llama.rope.scale_linear", 2) == 0.5);
    assert_true(first_frequency("linear", "llama.rope.scaling.factor", 0) == 1);
    assert_true(first_frequency("none", "llama.rope.scaling.factor", 8) == 1);
}

static void test_frequency_factors_divide(void **state)
{
    (void)state;
    kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("llama");
    opened plain = open_tiny(&options);
    options.has_frequency_factors = true;
    opened scaled = open_tiny(&options);
    for (uint32_t j = 0; j < 8; j++) {
        const double factor = j < 4 ? 1 : 8;
        assert_true(kvl_model_inverse_frequencies(scaled.model)[j] * factor ==
                    kvl_model_inverse_frequencies(plain.model)[j]);
    }
    close_opened(&plain);
    close_opened(&scaled);
}

/* Llama 3.1's own numbers, against its rule written by wavelengths. */
static void test_llama3_scaling_by_keys(void **state)
{
    (void)state;
    kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("llama");
    options.head_dim = 128;
    options.n_heads = 1;
    options.n_kv_heads = 1;
    options.frequency_base = 500000.0F;
    kvl_tiny_gguf_write(&options, &writer);
    kvl_gguf_set_text(&writer, "llama.rope.scaling.type", "llama3");
    kvl_gguf_set_f32(&writer, "llama.rope.scaling.factor", 8);
    kvl_gguf_set_f32(&writer, "llama.rope.scaling.low_freq_factor", 1);
    kvl_gguf_set_f32(&writer, "llama.rope.scaling.high_freq_factor", 4);
    kvl_gguf_set_u32(&writer, "llama.rope.scaling.original_context_length", 8192);
    opened one = open_file(kvl_gguf_writer_finish(&writer));
    unsigned n_kept = 0, n_between = 0, n_stretched = 0;
    for (uint32_t j = 0; j < 64; j++) {
        const double plain = exp(-log(500000.0) * j / 64);
        const double wavelength = 2 * acos(-1.0) / plain;
        double wanted;
        if (wavelength < 8192.0 / 4) {
            wanted = plain;
            n_kept++;
        } else if (wavelength > 8192.0) {
            wanted = plain / 8;
            n_stretched++;
        } else {
            const double smooth = (8192.0 / wavelength - 1) / (4 - 1);
            wanted = (1 - smooth) * plain / 8 + smooth * plain;
            n_between++;
        }
        assert_true(fabs(kvl_model_inverse_frequencies(one.model)[j] / wanted - 1) < 1e-12);
    }
    assert_true(n_kept > 0 && n_between > 0 && n_stretched > 0);
    close_opened(&one);
}

static void test_unknown_scaling_is_refused(void **state)
{
    (void)state;
    static const char *const types[] = {"yarn", "longrope", "dynamic", ""};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        start_tiny("qwen2");
        kvl_gguf_set_text(&writer, "qwen2.rope.scaling.type", types[i]);
        char piece[64];
        (void)snprintf(piece, sizeof piece, "key qwen2.rope.scaling.type is \"%s\" at byte",
                       types[i]);
        assert_refused(KVL_ERR_UNSUPPORTED, piece, "supported are none, linear and llama3");
    }
    start_tiny("llama");
    kvl_gguf_set_text(&writer, "llama.rope.scaling.type", "llama3");
    assert_refused(KVL_ERR_MALFORMED, "key llama.rope.scaling.factor is missing", "");
    start_tiny("llama");
    kvl_gguf_set_f32(&writer, "llama.rope.freq_base", NAN);
    assert_refused(KVL_ERR_MALFORMED, "key llama.rope.freq_base is ", "must be 1 to 1e+12");
    const float factors[8] = {1, 1, 1, NAN, 1, 1, 1, 1};
    start_tiny("llama");
    kvl_gguf_set_tensor(&writer, "rope_freqs.weight", 8, 0, KVL_DTYPE_F32, factors);
    assert_refused(KVL_ERR_MALFORMED, "factor 3 of tensor rope_freqs.weight is ", "at byte");
    start_tiny("llama");
    kvl_gguf_set_tensor(&writer, "rope_freqs.weight", 7, 0, KVL_DTYPE_F32, factors);
    assert_refused(KVL_ERR_MALFORMED, "tensor rope_freqs.weight", "must be 8 x 1");
    start_tiny("llama");
    kvl_gguf_set_tensor(&writer, "rope_freqs.weight", 8, 0, KVL_DTYPE_F16, factors);
    assert_refused(KVL_ERR_MALFORMED, "tensor rope_freqs.weight", "is F16; must be F32");
}

/* ---- refusals */

static void test_other_architectures_are_refused(void **state)
{
    (void)state;
    start_tiny("llama");
    kvl_gguf_set_text(&writer, "general.architecture", "mamba\n");
    assert_refused(KVL_ERR_UNSUPPORTED, "general.architecture is \"mamba?\" at byte 64",
                   "supported are: llama, qwen2");
    start_tiny("llama");
    kvl_gguf_set_text(&writer, "general.architecture", "qwen2");
    assert_refused(KVL_ERR_MALFORMED, "key qwen2.block_count is missing", "");
    start_tiny("llama");
    kvl_gguf_remove_key(&writer, "general.architecture");
    assert_refused(KVL_ERR_MALFORMED, "key general.architecture is missing", "");
    start_tiny("llama");
    kvl_gguf_set_text(&writer, "general.type", "adapter");
    assert_refused(KVL_ERR_UNSUPPORTED, "general.type is \"adapter\" at byte", "");
}

static void test_other_mathematics_is_refused(void **state)
{
    (void)state;
    static const struct {
        const char *key;
        float value;
        const char *piece;
    } cases[] = {
        {"llama.expert_count", 8, "mixtures of experts are not supported"},
        {"llama.attention.sliding_window", 255, "sliding-window attention is not supported"},
        {"llama.logit_scale", 0.5F, "scaling of logits is not supported"},
        {"llama.attention.scale", 0.1F, "another attention scale is not supported"},
        {"llama.attention.causal", 0, "attention to later tokens is not supported"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        start_tiny("llama");
        if (i < 2) {
            kvl_gguf_set_u32(&writer, cases[i].key, (uint32_t)cases[i].value);
        } else if (i == 4) {
            kvl_gguf_set_bool(&writer, cases[i].key, false);
        } else {
            kvl_gguf_set_f32(&writer, cases[i].key, cases[i].value);
        }
        assert_refused(KVL_ERR_UNSUPPORTED, cases[i].key, cases[i].piece);
    }
    /* The same keys at values that change nothing. */
    start_tiny("llama");
    kvl_gguf_set_u32(&writer, "llama.expert_count", 0);
    kvl_gguf_set_u32(&writer, "llama.attention.sliding_window", 256);
    kvl_gguf_set_f32(&writer, "llama.logit_scale", 1);
    kvl_gguf_set_bool(&writer, "llama.attention.causal", true);
    opened one = open_file(kvl_gguf_writer_finish(&writer));
    close_opened(&one);
}

static void test_bad_shapes_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *suffix;
        uint32_t value;
        kvl_status wanted;
        const char *piece;
    } cases[] = {
        {"block_count", 0, KVL_ERR_MALFORMED, "must be 1 to 512"},
        {"block_count", 513, KVL_ERR_TOO_LARGE, "must be 1 to 512"},
        {"block_count", 3, KVL_ERR_MALFORMED, "tensor blk.2.attn_norm.weight is missing"},
        {"block_count", 1, KVL_ERR_UNSUPPORTED, "tensor blk.1.attn_norm.weight"},
        {"context_length", (1u << 20) + 1, KVL_ERR_TOO_LARGE, "must be 1 to 1048576"},
        {"embedding_length", UINT32_MAX, KVL_ERR_TOO_LARGE, "must be 1 to 65536"},
        {"embedding_length", 128, KVL_ERR_MALFORMED, "token_embd.weight"},
        {"feed_forward_length", 64, KVL_ERR_MALFORMED, "by the metadata it must be 64 x 64"},
        {"attention.head_count", 1025, KVL_ERR_TOO_LARGE, "must be 1 to 1024"},
        {"attention.head_count", 3, KVL_ERR_MALFORMED, "must divide the 3 heads"},
        {"attention.head_count", 2, KVL_ERR_MALFORMED, "tensor blk.0.attn_k.weight"},
        {"attention.head_count", 8, KVL_ERR_UNSUPPORTED, "heads have 8 dimensions"},
        {"attention.head_count_kv", 0, KVL_ERR_MALFORMED, "must be 1 to 4"},
        {"attention.head_count_kv", 5, KVL_ERR_TOO_LARGE, "must be 1 to 4"},
        {"attention.head_count_kv", 3, KVL_ERR_MALFORMED, "must divide the 4 heads"},
        {"attention.key_length", 257, KVL_ERR_TOO_LARGE, "must be 1 to 256"},
        {"attention.key_length", 24, KVL_ERR_UNSUPPORTED, "multiples of 16 up to 256"},
        {"attention.value_length", 32, KVL_ERR_UNSUPPORTED, "values must be as long as keys, 16"},
        {"rope.dimension_count", 17, KVL_ERR_TOO_LARGE, "must be 2 to 16"},
        {"rope.dimension_count", 7, KVL_ERR_MALFORMED, "must be even"},
        {"vocab_size", 271, KVL_ERR_MALFORMED, "must be 272"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char key[64];
        (void)snprintf(key, sizeof key, "llama.%s", cases[i].suffix);
        start_tiny("llama");
        kvl_gguf_set_u32(&writer, key, cases[i].value);
        assert_refused(cases[i].wanted, cases[i].piece, "");
    }
    start_tiny("llama");
    kvl_gguf_set_f32(&writer, "llama.attention.layer_norm_rms_epsilon", 0);
    assert_refused(KVL_ERR_MALFORMED, "key llama.attention.layer_norm_rms_epsilon is 0", "");
}

static void test_wrong_sets_of_tensors_are_refused(void **state)
{
    (void)state;
    const float numbers[64] = {1};
    static const char *const needed[] = {"token_embd.weight", "output_norm.weight",
                                         "blk.1.attn_output.weight", "blk.0.ffn_norm.weight",
                                         "blk.1.attn_k.bias"};
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        char piece[96];
        start_tiny("qwen2");
        kvl_gguf_remove_tensor(&writer, needed[i]);
        (void)snprintf(piece, sizeof piece, "tensor %s is missing", needed[i]);
        assert_refused(KVL_ERR_MALFORMED, piece, "");
    }
    static const char *const unknown[] = {"blk.0.attn_q_norm.weight", "blk.0.attn_output.bias",
                                          "blk.0.ffn_gate.bias", "blk.00.attn_norm.weight",
                                          "rope_factors_long.weight"};
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
        char piece[96];
        start_tiny("llama");
        kvl_gguf_set_tensor(&writer, unknown[i], 64, 0, KVL_DTYPE_F32, numbers);
        (void)snprintf(piece, sizeof piece, "tensor %s with data at byte", unknown[i]);
        assert_refused(KVL_ERR_UNSUPPORTED, piece, "not part of a llama model of 2 layers");
    }
    start_tiny("qwen2");
    kvl_gguf_set_tensor(&writer, "rope_freqs.weight", 8, 0, KVL_DTYPE_F32, numbers);
    assert_refused(KVL_ERR_UNSUPPORTED, "tensor rope_freqs.weight", "not part of a qwen2 model");
    start_tiny("llama");
    kvl_gguf_set_tensor(&writer, "output_norm.weight", 64, 0, KVL_DTYPE_Q8_0, numbers);
    assert_refused(KVL_ERR_UNSUPPORTED, "tensor output_norm.weight", "is Q8_0");
}

/* Twice the weights of a vector, in a third dimension: the first two are as they should be. */
static void test_further_dimensions_are_refused(void **state)
{
    (void)state;
    start_tiny("llama");
    kvl_gguf_written_tensor *norm = kvl_gguf_written(&writer, "output_norm.weight");
    const uint8_t zeros[64 * sizeof(float)] = {0};
    kvl_gguf_put(&norm->data, zeros, sizeof zeros);
    norm->n_dimensions = 3;
    norm->sizes[2] = 2;
    assert_refused(KVL_ERR_MALFORMED, "tensor output_norm.weight", "is 64 x 1 x 2 x 1");
}

/* A token without a row in the embedding would be read past its end. */
static void test_vocabularies_of_another_size_are_refused(void **state)
{
    (void)state;
    kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("llama");
    kvl_tiny_gguf_write(&options, &writer);
    float *numbers =
        kvl_alloc_zero((size_t)(KVL_TINY_VOCABULARY - 1) * options.width, sizeof *numbers);
    assert_non_null(numbers);
    kvl_gguf_set_tensor(&writer, "token_embd.weight", KVL_TINY_VOCABULARY - 1, options.width,
                        KVL_DTYPE_F32, numbers);
    kvl_gguf_remove_key(&writer, "llama.vocab_size");
    assert_refused(KVL_ERR_MALFORMED, "key tokenizer.ggml.tokens has 272 tokens", "must be 271");
    kvl_free(numbers);
}

/* ---- fingerprint */

static kvl_digest fingerprint_of(kvl_gguf_bytes file)
{
    opened one = open_file(file);
    const kvl_digest digest = kvl_model_fingerprint(one.model);
    const kvl_digest again = kvl_model_fingerprint(one.model);
    assert_true(kvl_digest_equal(&digest, &again));
    close_opened(&one);
    return digest;
}

static kvl_digest tiny_fingerprint(const char *architecture)
{
    start_tiny(architecture);
    return fingerprint_of(kvl_gguf_writer_finish(&writer));
}

static void test_fingerprint_ignores_what_kv_does_not_depend_on(void **state)
{
    (void)state;
    const kvl_digest plain = tiny_fingerprint("llama");
    start_tiny("llama");
    kvl_gguf_set_text(&writer, "general.name", "Another name");
    kvl_gguf_set_u32(&writer, "llama.context_length", 512);
    kvl_gguf_set_u32(&writer, "general.alignment", 256);
    writer.alignment = 256;
    const kvl_digest renamed = fingerprint_of(kvl_gguf_writer_finish(&writer));
    assert_true(kvl_digest_equal(&plain, &renamed));
    assert_false(kvl_digest_is_zero(&plain));
}

static void test_fingerprint_follows_shape_and_rotation(void **state)
{
    (void)state;
    const kvl_digest plain = tiny_fingerprint("llama");
    const kvl_digest qwen = tiny_fingerprint("qwen2");
    assert_false(kvl_digest_equal(&plain, &qwen));
    start_tiny("llama");
    kvl_gguf_set_f32(&writer, "llama.rope.freq_base", 10001);
    kvl_digest other = fingerprint_of(kvl_gguf_writer_finish(&writer));
    assert_false(kvl_digest_equal(&plain, &other));
    start_tiny("llama");
    kvl_gguf_set_f32(&writer, "llama.attention.layer_norm_rms_epsilon", 2e-5F);
    other = fingerprint_of(kvl_gguf_writer_finish(&writer));
    assert_false(kvl_digest_equal(&plain, &other));
    /* The embedding given again as the output computes the same, but is another set of weights. */
    start_tiny("llama");
    const kvl_gguf_written_tensor *embedding = kvl_gguf_written(&writer, "token_embd.weight");
    kvl_gguf_set_tensor(&writer, "output.weight", KVL_TINY_VOCABULARY, 64, KVL_DTYPE_F32,
                        (const float *)(const void *)embedding->data.bytes);
    other = fingerprint_of(kvl_gguf_writer_finish(&writer));
    assert_false(kvl_digest_equal(&plain, &other));
}

/* One bit of one weight, in every tensor of the file. */
static void test_fingerprint_follows_every_tensor(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("qwen2");
    options.is_tied = false;
    options.is_mixed = true;
    const kvl_digest plain = fingerprint_of(kvl_tiny_gguf_make(&options));
    kvl_tiny_gguf_write(&options, &writer);
    const size_t n_tensors = writer.n_tensors;
    for (size_t i = 0; i < n_tensors; i++) {
        if (i > 0) kvl_tiny_gguf_write(&options, &writer);
        kvl_gguf_buffer *data = &writer.tensors[i].data;
        data->bytes[kvl_test_below(&random, (uint32_t)data->n_bytes)] ^= 0x01;
        const kvl_digest other = fingerprint_of(kvl_gguf_writer_finish(&writer));
        assert_false(kvl_digest_equal(&plain, &other));
    }
    assert_int_equal(n_tensors, 3 + 2 * 12);
}

static void *ask_fingerprint(void *model)
{
    kvl_digest *digest = kvl_alloc(sizeof *digest);
    if (digest != NULL) *digest = kvl_model_fingerprint(model);
    return digest;
}

static void test_fingerprint_is_asked_by_many_threads_at_once(void **state)
{
    (void)state;
    const kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("llama");
    opened one = open_tiny(&options);
    const kvl_digest wanted = tiny_fingerprint("llama");
    pthread_t threads[4];
    for (size_t i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, ask_fingerprint, one.model), 0);
    for (size_t i = 0; i < 4; i++) {
        void *digest = NULL;
        assert_int_equal(pthread_join(threads[i], &digest), 0);
        assert_true(kvl_digest_equal(digest, &wanted));
        kvl_free(digest);
    }
    close_opened(&one);
}

/* ---- damage and want */

/* One change to each byte of the tables, another at every run; with the tokenizer and the template
 * on top of the reader, which has its own test of all changes. */
static void test_damaged_tables_are_refused_or_harmless(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("qwen2");
    options.n_layers = 1;
    options.width = 32;
    options.feed_forward = 32;
    kvl_gguf_bytes file = kvl_tiny_gguf_make(&options);
    uint8_t *bytes = kvl_alloc(file.n_bytes);
    assert_non_null(bytes);
    memcpy(bytes, file.bytes, file.n_bytes);
    const int64_t live = kvl_alloc_live();
    size_t n_opened = 0;
    for (size_t at = 0; at < file.data_at; at++) {
        bytes[at] ^= (uint8_t)(1 + kvl_test_below(&random, 255));
        kvl_model *model = NULL;
        kvl_error error = {0};
        const kvl_status status = kvl_model_parse(bytes, file.n_bytes, &model, &error);
        if (status == KVL_OK) {
            n_opened++;
        } else if (status != KVL_ERR_MALFORMED && status != KVL_ERR_TOO_LARGE &&
                   status != KVL_ERR_UNSUPPORTED) {
            fail_msg("byte %zu: %s: %s", at, kvl_status_name(status), error.text);
        }
        kvl_model_close(model);
        bytes[at] = file.bytes[at];
    }
    assert_true(n_opened > 0 && n_opened < file.data_at);
    assert_int_equal(kvl_alloc_live(), live);
    kvl_free(bytes);
    kvl_gguf_bytes_deinit(&file);
}

static void test_every_failing_allocation_is_survived(void **state)
{
    (void)state;
    kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("qwen2");
    options.vectors = KVL_DTYPE_F16; /* so that conversion allocates too */
    kvl_gguf_bytes file = kvl_tiny_gguf_make(&options);
    const int64_t live = kvl_alloc_live();
    kvl_status status = KVL_ERR_NO_MEMORY;
    int64_t n_allowed = 0;
    for (; status != KVL_OK; n_allowed++) {
        kvl_model *model = NULL;
        kvl_alloc_fail_after(n_allowed);
        status = kvl_model_parse(file.bytes, file.n_bytes, &model, NULL);
        kvl_alloc_fail_after(-1);
        assert_true(status == KVL_OK || status == KVL_ERR_NO_MEMORY);
        assert_true((status == KVL_OK) == (model != NULL));
        kvl_model_close(model);
        assert_int_equal(kvl_alloc_live(), live);
    }
    assert_true(n_allowed > 2 * 5);
    kvl_gguf_bytes_deinit(&file);
}

static void test_missing_files_are_not_found(void **state)
{
    (void)state;
    kvl_model *model = NULL;
    kvl_error error = {0};
    assert_int_equal(kvl_model_open("/nonexistent/model.gguf", &model, &error), KVL_ERR_NOT_FOUND);
    assert_non_null(strstr(error.text, "/nonexistent/model.gguf"));
    assert_null(model);
    kvl_model_close(NULL);
}

/* ---- real models, where they have been fetched */

static const char *model_path(const char *name, char path[512])
{
    const char *cache = getenv("XDG_CACHE_HOME");
    const char *home = getenv("HOME");
    if (cache != NULL && *cache != '\0') {
        (void)snprintf(path, 512, "%s/kvloom/models/%s", cache, name);
    } else {
        (void)snprintf(path, 512, "%s/.cache/kvloom/models/%s", home == NULL ? "" : home, name);
    }
    return path;
}

static void test_smollm2_opens(void **state)
{
    (void)state;
    char path[512];
    if (access(model_path("smollm2-135m-instruct.q4_1.gguf", path), R_OK) != 0) skip();
    kvl_model *model = NULL;
    kvl_error error = {0};
    if (kvl_model_open(path, &model, &error) != KVL_OK) fail_msg("%s", error.text);
    const kvl_model_shape *shape = kvl_model_shape_of(model);
    assert_string_equal(shape->architecture, "llama");
    assert_int_equal(shape->n_layers, 30);
    assert_int_equal(shape->n_heads, 9);
    assert_int_equal(shape->n_kv_heads, 3);
    assert_int_equal(shape->head_dim, 64);
    assert_int_equal(shape->width, 576);
    assert_int_equal(shape->feed_forward, 1536);
    assert_int_equal(shape->n_vocab, 49152);
    assert_int_equal(shape->n_context, 8192);
    assert_ptr_equal(kvl_model_output(model)->data, kvl_model_embedding(model)->data);
    assert_int_equal(kvl_model_embedding(model)->dtype, KVL_DTYPE_Q8_0);
    assert_int_equal(kvl_model_layer(model, 29)->down.dtype, KVL_DTYPE_Q4_1);
    assert_null(kvl_model_layer(model, 0)->query_bias);
    assert_true(fabs(kvl_model_inverse_frequencies(model)[31] - pow(1e5, -62.0 / 64)) < 1e-12);
    const kvl_digest digest = kvl_model_fingerprint(model);
    assert_false(kvl_digest_is_zero(&digest));
    kvl_model_close(model);
}

static void test_qwen_opens(void **state)
{
    (void)state;
    char path[512];
    if (access(model_path("qwen2.5-coder-0.5b-instruct.q4_k_m.gguf", path), R_OK) != 0) skip();
    kvl_model *model = NULL;
    kvl_error error = {0};
    if (kvl_model_open(path, &model, &error) != KVL_OK) fail_msg("%s", error.text);
    const kvl_model_shape *shape = kvl_model_shape_of(model);
    assert_string_equal(shape->architecture, "qwen2");
    assert_int_equal(shape->pairs, KVL_PAIRS_HALVES);
    assert_int_equal(shape->n_layers, 24);
    assert_int_equal(shape->n_heads, 14);
    assert_int_equal(shape->n_kv_heads, 2);
    assert_int_equal(shape->head_dim, 64);
    assert_int_equal(shape->n_vocab, 151936);
    assert_int_equal(kvl_model_output(model)->dtype, KVL_DTYPE_Q8_0);
    assert_int_equal(kvl_model_embedding(model)->dtype, KVL_DTYPE_Q5_0);
    assert_non_null(kvl_model_layer(model, 23)->value_bias);
    kvl_model_close(model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_models_are_read_back),
        cmocka_unit_test(test_halves_are_converted),
        cmocka_unit_test(test_frequencies_are_powers_of_the_base),
        cmocka_unit_test(test_linear_factors_under_all_their_names),
        cmocka_unit_test(test_frequency_factors_divide),
        cmocka_unit_test(test_llama3_scaling_by_keys),
        cmocka_unit_test(test_unknown_scaling_is_refused),
        cmocka_unit_test(test_other_architectures_are_refused),
        cmocka_unit_test(test_other_mathematics_is_refused),
        cmocka_unit_test(test_bad_shapes_are_refused),
        cmocka_unit_test(test_wrong_sets_of_tensors_are_refused),
        cmocka_unit_test(test_further_dimensions_are_refused),
        cmocka_unit_test(test_vocabularies_of_another_size_are_refused),
        cmocka_unit_test(test_fingerprint_ignores_what_kv_does_not_depend_on),
        cmocka_unit_test(test_fingerprint_follows_shape_and_rotation),
        cmocka_unit_test(test_fingerprint_follows_every_tensor),
        cmocka_unit_test(test_fingerprint_is_asked_by_many_threads_at_once),
        cmocka_unit_test(test_damaged_tables_are_refused_or_harmless),
        cmocka_unit_test(test_every_failing_allocation_is_survived),
        cmocka_unit_test(test_missing_files_are_not_found),
        cmocka_unit_test(test_smollm2_opens),
        cmocka_unit_test(test_qwen_opens),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
