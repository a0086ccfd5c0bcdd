/* model/model.c: a model out of a GGUF file: every tensor found, checked against the shape and put
 * into its place; weights are read where they lie in the map.
 *
 * A file must have exactly the tensors that its architecture asks for. One too many is refused like
 * one too few: it belongs to a model that computes something else (a norm of queries, a bias), and
 * would be left out without a word. */
#include "model/model.h"

#include "base/alloc.h"
#include "model/architecture.h"
#include "model/chat_template_gguf.h"
#include "model/gguf.h"
#include "model/tokenizer_gguf.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "weights are read in place, as little-endian numbers"
#endif

/* The one thing of a model that is made late; apart from it, so that the rest can be constant. */
typedef struct lazy_digest {
    pthread_mutex_t lock;
    bool is_known;
    kvl_digest digest;
} lazy_digest;

struct kvl_model {
    kvl_gguf *gguf;
    kvl_model_shape shape;
    kvl_layer_weights *layers; /* [n_layers] */
    kvl_matrix embedding;
    kvl_matrix output;
    bool is_tied;
    const float *output_norm;
    double *inverse_frequencies; /* [rotary_dim / 2] */
    float **converted;           /* vectors that the file has as 16-bit floats; ours */
    size_t n_converted;
    kvl_tokenizer *tokenizer;
    kvl_chat_template *chat_template;
    lazy_digest *fingerprint;
};

/* What binding needs besides the model: which tensors have found their place. */
typedef struct binder {
    kvl_model *model;
    const kvl_architecture *architecture;
    bool *is_used; /* [n_tensors], in the order of the file */
} binder;

/* ---- finding tensors */

/* NULL if it is not there; otherwise marks it as used. */
static const kvl_gguf_tensor *claim(binder *binding, const char *name)
{
    const kvl_gguf *gguf = binding->model->gguf;
    const kvl_gguf_tensor *tensor = kvl_gguf_find_tensor(gguf, name);
    if (tensor != NULL) binding->is_used[tensor - kvl_gguf_tensor_at(gguf, 0)] = true;
    return tensor;
}

static kvl_status refuse_missing(const binder *binding, const char *name, kvl_error *error)
{
    return KVL_FAIL(error, KVL_ERR_MALFORMED, "tensor %s is missing; %s models must have it", name,
                    binding->architecture->name);
}

/* The parser has found n_bytes from the same sizes, so a row is an exact part of it. */
static kvl_status bind_matrix(binder *binding, const char *name, uint32_t n_outputs,
                              uint32_t n_inputs, kvl_matrix *matrix, kvl_error *error)
{
    const kvl_gguf_tensor *tensor = claim(binding, name);
    if (tensor == NULL) return refuse_missing(binding, name, error);
    KVL_TRY(kvl_tensor_check_sizes(tensor, n_outputs, n_inputs, error));
    *matrix = (kvl_matrix){
        .data = tensor->data,
        .row_bytes = tensor->n_bytes / n_outputs,
        .n_outputs = n_outputs,
        .n_inputs = n_inputs,
        .dtype = tensor->dtype,
    };
    return KVL_OK;
}

/* ---- vectors of 16-bit floats, which kernels want as 32-bit ones */

/* IEEE 754 half precision. Subnormal halves are a small integer times 2^-24. */
static float float_of_half(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half >> 15) << 31;
    const uint32_t exponent = (half >> 10) & 0x1fu;
    const uint32_t fraction = half & 0x3ffu;
    uint32_t bits;
    if (exponent == 0) {
        const float magnitude = (float)fraction * 0x1p-24F;
        memcpy(&bits, &magnitude, sizeof bits);
    } else if (exponent == 0x1f) {
        bits = 0x7f800000u | fraction << 13;
    } else {
        bits = (exponent + 127 - 15) << 23 | fraction << 13;
    }
    bits |= sign;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The upper half of a float. */
static float float_of_bfloat(uint16_t bfloat)
{
    const uint32_t bits = (uint32_t)bfloat << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* n is a size of the checked shape. The list has a place for every vector that a model can have. */
static kvl_status convert_vector(binder *binding, const kvl_gguf_tensor *tensor, uint32_t n,
                                 const float **vector, kvl_error *error)
{
    kvl_model *model = binding->model;
    float *converted = kvl_alloc_aligned((size_t)n * sizeof *converted);
    if (converted == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a vector of %u", n);
    for (uint32_t i = 0; i < n; i++) {
        uint16_t bits;
        memcpy(&bits, tensor->data + (size_t)i * sizeof bits, sizeof bits);
        converted[i] = tensor->dtype == KVL_DTYPE_F16 ? float_of_half(bits) : float_of_bfloat(bits);
    }
    model->converted[model->n_converted++] = converted;
    *vector = converted;
    return KVL_OK;
}

/* A missing optional vector is NULL, and stays so for kernels to see. Quantised norms are refused:
 * no converter writes them, and a norm's error would go into every number after it. */
static kvl_status bind_vector(binder *binding, const char *name, uint32_t n, bool is_optional,
                              const float **vector, kvl_error *error)
{
    *vector = NULL;
    const kvl_gguf_tensor *tensor = claim(binding, name);
    if (tensor == NULL) return is_optional ? KVL_OK : refuse_missing(binding, name, error);
    KVL_TRY(kvl_tensor_check_sizes(tensor, n, 0, error));
    if (tensor->dtype == KVL_DTYPE_F32) {
        /* In place: the parser has seen to an alignment of 8. */
        *vector = (const float *)(const void *)tensor->data;
        return KVL_OK;
    }
    if (tensor->dtype == KVL_DTYPE_F16 || tensor->dtype == KVL_DTYPE_BF16)
        return convert_vector(binding, tensor, n, vector, error);
    return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                    "tensor %s with data at byte %zu is %s; norms and biases must be F32, F16 or "
                    "BF16",
                    name, tensor->offset, kvl_dtype_about(tensor->dtype)->name);
}

/* ---- the whole set */

/* One walk over the table of tensors; `field` is the matrix or the pointer that a rule names. */
static kvl_status bind_layer(binder *binding, uint32_t layer, kvl_error *error)
{
    const kvl_model_shape *shape = &binding->model->shape;
    char *weights = (char *)&binding->model->layers[layer];
    for (size_t i = 0; i < KVL_TENSOR_RULES; i++) {
        const kvl_tensor_rule *rule = &kvl_tensor_rules[i];
        char name[KVL_MODEL_NAME_BYTES];
        (void)snprintf(name, sizeof name, "blk.%" PRIu32 ".%s", layer, rule->name);
        const uint32_t n_outputs = kvl_extent_of(rule->n_outputs, shape);
        void *field = weights + rule->field;
        if (rule->is_matrix) {
            KVL_TRY(bind_matrix(binding, name, n_outputs, kvl_extent_of(rule->n_inputs, shape),
                                field, error));
        } else {
            const bool is_optional =
                rule->is_bias && binding->architecture->biases == KVL_BIAS_OPTIONAL;
            KVL_TRY(bind_vector(binding, name, n_outputs, is_optional, field, error));
        }
    }
    return KVL_OK;
}

static kvl_status refuse_unused(const binder *binding, kvl_error *error)
{
    const kvl_gguf *gguf = binding->model->gguf;
    for (size_t i = 0; i < kvl_gguf_n_tensors(gguf); i++) {
        if (binding->is_used[i]) continue;
        const kvl_gguf_tensor *tensor = kvl_gguf_tensor_at(gguf, i);
        char name[KVL_GGUF_PRINTABLE_BYTES];
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                        "tensor %s with data at byte %zu is not part of a %s model of %u layers: "
                        "this model computes something that is not supported",
                        kvl_gguf_printable(tensor->name, name), tensor->offset,
                        binding->architecture->name, binding->model->shape.n_layers);
    }
    return KVL_OK;
}

/* Without output.weight the embedding is read the other way round: tied, as in small models. */
static kvl_status bind_all(binder *binding, kvl_error *error)
{
    kvl_model *model = binding->model;
    const kvl_model_shape *shape = &model->shape;
    KVL_TRY(bind_matrix(binding, "token_embd.weight", shape->n_vocab, shape->width,
                        &model->embedding, error));
    model->is_tied = kvl_gguf_find_tensor(model->gguf, "output.weight") == NULL;
    if (model->is_tied) {
        model->output = model->embedding;
    } else {
        KVL_TRY(bind_matrix(binding, "output.weight", shape->n_vocab, shape->width, &model->output,
                            error));
    }
    KVL_TRY(bind_vector(binding, "output_norm.weight", shape->width, false, &model->output_norm,
                        error));
    for (uint32_t layer = 0; layer < shape->n_layers; layer++)
        KVL_TRY(bind_layer(binding, layer, error));
    if (binding->architecture->has_frequency_factors) (void)claim(binding, "rope_freqs.weight");
    return refuse_unused(binding, error);
}

/* ---- open and close */

/* The shape is checked: at most KVL_LAYERS_MAX layers and a few vectors in each. */
static kvl_status allocate_parts(kvl_model *model, kvl_error *error)
{
    const size_t n_vectors = (size_t)model->shape.n_layers * KVL_TENSOR_RULES + 1;
    model->layers = kvl_alloc_zero(model->shape.n_layers, sizeof *model->layers);
    model->converted = kvl_alloc_zero(n_vectors, sizeof *model->converted);
    model->inverse_frequencies =
        kvl_alloc_zero(model->shape.rotary_dim / 2, sizeof *model->inverse_frequencies);
    model->fingerprint = kvl_alloc_zero(1, sizeof *model->fingerprint);
    if (model->fingerprint != NULL)
        KVL_ASSERT(pthread_mutex_init(&model->fingerprint->lock, NULL) == 0);
    if (model->layers != NULL && model->converted != NULL && model->inverse_frequencies != NULL &&
        model->fingerprint != NULL)
        return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a model of %u layers",
                    model->shape.n_layers);
}

static kvl_status bind_tensors(kvl_model *model, const kvl_architecture *architecture,
                               kvl_error *error)
{
    /* Not empty: the shape was read from one of its tensors. */
    binder binding = {model, architecture, kvl_alloc_zero(kvl_gguf_n_tensors(model->gguf), 1)};
    if (binding.is_used == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a list of tensors");
    const kvl_status status = bind_all(&binding, error);
    kvl_free(binding.is_used);
    return status;
}

/* An id of the tokenizer is a row of the embedding: one without a row would be read past its end.
 */
static kvl_status make_tokenizer(kvl_model *model, kvl_error *error)
{
    KVL_TRY(kvl_tokenizer_create(model->gguf, &model->tokenizer, error));
    const uint32_t n_tokens = kvl_tokenizer_n_vocab(model->tokenizer);
    if (n_tokens == model->shape.n_vocab) return KVL_OK;
    const kvl_gguf_value *tokens = kvl_gguf_find(model->gguf, "tokenizer.ggml.tokens");
    return KVL_FAIL(error, KVL_ERR_MALFORMED,
                    "key tokenizer.ggml.tokens has %u tokens at byte %zu; must be %u, the rows of "
                    "token_embd.weight",
                    n_tokens, tokens == NULL ? 0 : tokens->offset, model->shape.n_vocab);
}

/* From cheap to dear: a file that is refused is refused before its vocabulary is read. Leaves a
 * model that kvl_model_close can end, however far it got. */
static kvl_status fill_model(kvl_model *model, kvl_error *error)
{
    const kvl_architecture *architecture = NULL;
    KVL_TRY(kvl_architecture_find(model->gguf, &architecture, error));
    KVL_TRY(kvl_architecture_read_shape(architecture, model->gguf, &model->shape, error));
    KVL_TRY(allocate_parts(model, error));
    KVL_TRY(kvl_frequencies_read(architecture, model->gguf, &model->shape,
                                 model->inverse_frequencies, error));
    KVL_TRY(bind_tensors(model, architecture, error));
    KVL_TRY(make_tokenizer(model, error));
    return kvl_chat_template_create(model->gguf, &model->chat_template, error);
}

/* Takes the gguf, also when it fails. */
static kvl_status make_model(kvl_gguf *gguf, kvl_model **model, kvl_error *error)
{
    kvl_model *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) {
        kvl_gguf_close(gguf);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a model");
    }
    made->gguf = gguf;
    const kvl_status status = fill_model(made, error);
    if (status < 0) {
        kvl_model_close(made);
        return status;
    }
    *model = made;
    return KVL_OK;
}

kvl_status kvl_model_open(const char *path, kvl_model **model, kvl_error *error)
{
    *model = NULL;
    kvl_gguf *gguf = NULL;
    KVL_TRY(kvl_gguf_open(path, &gguf, error));
    return make_model(gguf, model, error);
}

kvl_status kvl_model_parse(const void *bytes, size_t n_bytes, kvl_model **model, kvl_error *error)
{
    *model = NULL;
    kvl_gguf *gguf = NULL;
    KVL_TRY(kvl_gguf_parse(bytes, n_bytes, &gguf, error));
    return make_model(gguf, model, error);
}

/* Every part may be missing: a model that was not finished ends here too. The file goes last. */
void kvl_model_close(kvl_model *model)
{
    if (model == NULL) return;
    kvl_chat_template_destroy(model->chat_template);
    kvl_tokenizer_destroy(model->tokenizer);
    if (model->fingerprint != NULL) (void)pthread_mutex_destroy(&model->fingerprint->lock);
    kvl_free(model->fingerprint);
    for (size_t i = 0; i < model->n_converted; i++) kvl_free(model->converted[i]);
    kvl_free(model->converted);
    kvl_free(model->inverse_frequencies);
    kvl_free(model->layers);
    kvl_gguf_close(model->gguf);
    kvl_free(model);
}

/* ---- what it holds */

const kvl_model_shape *kvl_model_shape_of(const kvl_model *model)
{
    return &model->shape;
}

const kvl_layer_weights *kvl_model_layer(const kvl_model *model, uint32_t layer)
{
    KVL_ASSERT(layer < model->shape.n_layers);
    return &model->layers[layer];
}

const kvl_matrix *kvl_model_embedding(const kvl_model *model)
{
    return &model->embedding;
}

const kvl_matrix *kvl_model_output(const kvl_model *model)
{
    return &model->output;
}

const float *kvl_model_output_norm(const kvl_model *model)
{
    return model->output_norm;
}

const double *kvl_model_inverse_frequencies(const kvl_model *model)
{
    return model->inverse_frequencies;
}

const kvl_tokenizer *kvl_model_tokenizer(const kvl_model *model)
{
    return model->tokenizer;
}

const kvl_chat_template *kvl_model_chat_template(const kvl_model *model)
{
    return model->chat_template;
}

/* ---- fingerprint */

/* Bytes as they are in the file: the same weights in another format give another KV. */
static void digest_matrix(kvl_digester *digester, const kvl_matrix *matrix)
{
    kvl_digester_add_u64(digester, (uint64_t)matrix->dtype);
    kvl_digester_add_u64(digester, matrix->n_outputs);
    kvl_digester_add_u64(digester, matrix->n_inputs);
    kvl_digester_add(digester, matrix->data, matrix->row_bytes * matrix->n_outputs);
}

/* A vector that is not there is one of length 0. */
static void digest_vector(kvl_digester *digester, const float *vector, uint32_t n)
{
    kvl_digester_add_u64(digester, vector == NULL ? 0 : n);
    if (vector != NULL) kvl_digester_add(digester, vector, (size_t)n * sizeof *vector);
}

static void digest_layer(kvl_digester *digester, const kvl_model_shape *shape,
                         const kvl_layer_weights *weights)
{
    for (size_t i = 0; i < KVL_TENSOR_RULES; i++) {
        const kvl_tensor_rule *rule = &kvl_tensor_rules[i];
        const void *field = (const char *)weights + rule->field;
        if (rule->is_matrix) {
            digest_matrix(digester, field);
        } else {
            digest_vector(digester, *(const float *const *)field,
                          kvl_extent_of(rule->n_outputs, shape));
        }
    }
}

/* As floats: the last bit of a double's power is the mathematics library's choice, and hosts with
 * different ones must agree. */
static void digest_frequencies(kvl_digester *digester, const kvl_model *model)
{
    for (uint32_t j = 0; j < model->shape.rotary_dim / 2; j++) {
        const float frequency = (float)model->inverse_frequencies[j];
        kvl_digester_add(digester, &frequency, sizeof frequency);
    }
}

/* The model's name and n_context are left out: they change no KV. */
static void digest_shape(kvl_digester *digester, const kvl_model *model)
{
    const kvl_model_shape *shape = &model->shape;
    const uint64_t sizes[] = {
        strlen(shape->architecture), shape->n_layers, shape->n_heads,
        shape->n_kv_heads,           shape->head_dim, shape->width,
        shape->feed_forward,         shape->n_vocab,  shape->rotary_dim,
        (uint64_t)shape->pairs,      model->is_tied,
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        kvl_digester_add_u64(digester, sizes[i]);
    kvl_digester_add(digester, shape->architecture, strlen(shape->architecture));
    kvl_digester_add(digester, &shape->norm_epsilon, sizeof shape->norm_epsilon);
    digest_frequencies(digester, model);
}

/* Every number stands at a place that the ones before it fix, so that no two models can give the
 * same bytes. */
static kvl_digest compute_fingerprint(const kvl_model *model)
{
    static const char domain[] = "KVLoom model 1";
    kvl_digester digester;
    kvl_digester_init(&digester, NULL, 0);
    kvl_digester_add(&digester, domain, sizeof domain);
    digest_shape(&digester, model);
    digest_matrix(&digester, &model->embedding);
    if (!model->is_tied) digest_matrix(&digester, &model->output);
    digest_vector(&digester, model->output_norm, model->shape.width);
    for (uint32_t layer = 0; layer < model->shape.n_layers; layer++)
        digest_layer(&digester, &model->shape, &model->layers[layer]);
    return kvl_digester_end(&digester);
}

/* Whoever comes second waits for the first: the work is done once. */
kvl_digest kvl_model_fingerprint(const kvl_model *model)
{
    lazy_digest *lazy = model->fingerprint;
    KVL_ASSERT(pthread_mutex_lock(&lazy->lock) == 0);
    if (!lazy->is_known) {
        lazy->digest = compute_fingerprint(model);
        lazy->is_known = true;
    }
    const kvl_digest digest = lazy->digest;
    KVL_ASSERT(pthread_mutex_unlock(&lazy->lock) == 0);
    return digest;
}
