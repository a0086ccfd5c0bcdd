/* model/architecture.c: the tables, and reading a shape by them.
 *
 * Both architectures are the same walk over the layers. They differ in which dimensions of a head
 * turn together (GGUF permutes llama's query and key rows so that pairs lie side by side, and
 * leaves qwen2's in halves) and in the biases of query, key and value. */
#include "model/architecture.h"

#include "compute/pages.h"

#include <float.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#define HEAD_DIM_STEP 16u /* of compute/pages.h */

static const kvl_architecture architectures[] = {
    {"llama", KVL_PAIRS_ADJACENT, KVL_BIAS_OPTIONAL, true},
    {"qwen2", KVL_PAIRS_HALVES, KVL_BIAS_REQUIRED, false},
};
static const char supported_names[] = "llama, qwen2";

/* One row a tensor: name, sizes by the shape, place in kvl_layer_weights. */
#define MATRIX(name, n_outputs, n_inputs, field)                                                   \
    {                                                                                              \
        name, true, KVL_EXTENT_##n_outputs, KVL_EXTENT_##n_inputs, false,                          \
            offsetof(kvl_layer_weights, field)                                                     \
    }
#define VECTOR(name, n_outputs, is_bias, field)                                                    \
    {                                                                                              \
        name, false, KVL_EXTENT_##n_outputs, KVL_EXTENT_WIDTH, is_bias,                            \
            offsetof(kvl_layer_weights, field)                                                     \
    }

const kvl_tensor_rule kvl_tensor_rules[KVL_TENSOR_RULES] = {
    VECTOR("attn_norm.weight", WIDTH, false, attention_norm),
    MATRIX("attn_q.weight", QUERIES, WIDTH, query),
    MATRIX("attn_k.weight", KEY_VALUES, WIDTH, key),
    MATRIX("attn_v.weight", KEY_VALUES, WIDTH, value),
    VECTOR("attn_q.bias", QUERIES, true, query_bias),
    VECTOR("attn_k.bias", KEY_VALUES, true, key_bias),
    VECTOR("attn_v.bias", KEY_VALUES, true, value_bias),
    MATRIX("attn_output.weight", WIDTH, QUERIES, attention_output),
    VECTOR("ffn_norm.weight", WIDTH, false, feed_forward_norm),
    MATRIX("ffn_gate.weight", FEED_FORWARD, WIDTH, gate),
    MATRIX("ffn_up.weight", FEED_FORWARD, WIDTH, up),
    MATRIX("ffn_down.weight", WIDTH, FEED_FORWARD, down),
};

typedef struct size_key {
    const char *suffix;
    uint32_t maximum;
    size_t field; /* its place in kvl_model_shape */
} size_key;

/* All of these must be there and at least 1. Limits come before anything is multiplied: the largest
 * product of two is below 2^32. */
static const size_key size_keys[] = {
    {"block_count", KVL_LAYERS_MAX, offsetof(kvl_model_shape, n_layers)},
    {"context_length", KVL_POSITIONS_MAX, offsetof(kvl_model_shape, n_context)},
    {"embedding_length", KVL_WIDTH_MAX, offsetof(kvl_model_shape, width)},
    {"feed_forward_length", KVL_FEED_FORWARD_MAX, offsetof(kvl_model_shape, feed_forward)},
    {"attention.head_count", KVL_HEADS_MAX, offsetof(kvl_model_shape, n_heads)},
};

/* Keys that change what a layer computes, with the one value that leaves it as it is here. A file
 * with another value would load and quietly answer nonsense, so it is refused by name. */
typedef struct neutral_key {
    const char *suffix;
    double neutral;
    const char *what;
} neutral_key;

static const neutral_key neutral_keys[] = {
    {"expert_count", 0, "mixtures of experts are"},
    {"attention.causal", 1, "attention to later tokens is"},
    {"attention.clamp_kqv", 0, "clamped attention is"},
    {"attention.max_alibi_bias", 0, "ALiBi is"},
    {"attention.scale", 0, "another attention scale is"},
    {"attn_logit_softcapping", 0, "capped attention is"},
    {"final_logit_softcapping", 0, "capping of logits is"},
    {"logit_scale", 1, "scaling of logits is"},
    {"residual_scale", 1, "scaling of the residual stream is"},
    {"embedding_scale", 1, "scaling of embeddings is"},
    {"use_parallel_residual", 0, "a parallel residual stream is"},
    {"rope.scaling.attn_factor", 1, "an attention factor is"},
};

const char *kvl_architecture_key(const kvl_architecture *architecture, const char *suffix,
                                 char *key)
{
    const int n = snprintf(key, KVL_MODEL_NAME_BYTES, "%s.%s", architecture->name, suffix);
    KVL_ASSERT(n > 0 && (unsigned)n < KVL_MODEL_NAME_BYTES);
    return key;
}

/* Cannot wrap: KVL_HEADS_MAX * KVL_HEAD_DIM_MAX is 2^18. */
uint32_t kvl_extent_of(kvl_extent extent, const kvl_model_shape *shape)
{
    switch (extent) {
    case KVL_EXTENT_WIDTH: return shape->width;
    case KVL_EXTENT_QUERIES: return shape->n_heads * shape->head_dim;
    case KVL_EXTENT_KEY_VALUES: return shape->n_kv_heads * shape->head_dim;
    case KVL_EXTENT_FEED_FORWARD: return shape->feed_forward;
    }
    KVL_ASSERT(false);
    return 0;
}

/* A file of general.type "adapter" names the architecture that it adapts, so the type comes first.
 */
kvl_status kvl_architecture_find(const kvl_gguf *gguf, const kvl_architecture **architecture,
                                 kvl_error *error)
{
    char text[KVL_GGUF_PRINTABLE_BYTES];
    kvl_gguf_text type;
    KVL_TRY(kvl_gguf_find_text(gguf, "general.type", &type, error));
    if (type.bytes != NULL && !kvl_gguf_text_is(type, "model")) {
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                        "general.type is \"%s\" at byte %zu; only \"model\" has weights to run",
                        kvl_gguf_printable(type, text),
                        kvl_gguf_find(gguf, "general.type")->offset);
    }
    kvl_gguf_text name;
    KVL_TRY(kvl_gguf_get_text(gguf, "general.architecture", &name, error));
    for (size_t i = 0; i < sizeof architectures / sizeof *architectures; i++) {
        if (!kvl_gguf_text_is(name, architectures[i].name)) continue;
        *architecture = &architectures[i];
        return KVL_OK;
    }
    return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                    "general.architecture is \"%s\" at byte %zu; supported are: %s",
                    kvl_gguf_printable(name, text),
                    kvl_gguf_find(gguf, "general.architecture")->offset, supported_names);
}

/* A single number of any type, for comparing with a neutral one. */
static kvl_status number_of(const kvl_gguf *gguf, const char *key, double *number, kvl_error *error)
{
    const kvl_gguf_type type = kvl_gguf_find(gguf, key)->type;
    if (type == KVL_GGUF_BOOL) {
        bool truth = false;
        KVL_TRY(kvl_gguf_find_bool(gguf, key, false, &truth, error));
        *number = truth ? 1 : 0;
    } else if (type == KVL_GGUF_F32 || type == KVL_GGUF_F64) {
        float value = 0;
        KVL_TRY(kvl_gguf_get_f32(gguf, key, -FLT_MAX, FLT_MAX, &value, error));
        *number = (double)value;
    } else {
        uint32_t value = 0;
        KVL_TRY(kvl_gguf_get_u32(gguf, key, 0, UINT32_MAX, &value, error));
        *number = value;
    }
    return KVL_OK;
}

/* Written without ==, which a float compare warns of; not-a-number never gets here. */
static kvl_status refuse_other_mathematics(const kvl_architecture *architecture,
                                           const kvl_gguf *gguf, kvl_error *error)
{
    for (size_t i = 0; i < sizeof neutral_keys / sizeof *neutral_keys; i++) {
        const neutral_key *rule = &neutral_keys[i];
        char key[KVL_MODEL_NAME_BYTES];
        const kvl_gguf_value *value =
            kvl_gguf_find(gguf, kvl_architecture_key(architecture, rule->suffix, key));
        if (value == NULL) continue;
        double number = 0;
        KVL_TRY(number_of(gguf, key, &number, error));
        if (number < rule->neutral || number > rule->neutral) {
            return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                            "key %s is %g at byte %zu; %s not supported, only %g is", key, number,
                            value->offset, rule->what, rule->neutral);
        }
    }
    return KVL_OK;
}

/* A window as long as the context hides nothing, so it is no window. */
static kvl_status refuse_window(const kvl_architecture *architecture, const kvl_gguf *gguf,
                                const kvl_model_shape *shape, kvl_error *error)
{
    char key[KVL_MODEL_NAME_BYTES];
    (void)kvl_architecture_key(architecture, "attention.sliding_window", key);
    uint32_t window = 0;
    KVL_TRY(kvl_gguf_find_u32(gguf, key, 0, UINT32_MAX, 0, &window, error));
    if (window == 0 || window >= shape->n_context) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                    "key %s is %u at byte %zu, less than the context of %u; sliding-window "
                    "attention is not supported: use a model without it (%s)",
                    key, window, kvl_gguf_find(gguf, key)->offset, shape->n_context,
                    supported_names);
}

/* Heads, and how long they are: said by a key, or else the width shared out among them. Values must
 * be as long as keys, since pages and segments hold both in the same shape. */
static kvl_status read_heads(const kvl_architecture *architecture, const kvl_gguf *gguf,
                             kvl_model_shape *shape, kvl_error *error)
{
    char key[KVL_MODEL_NAME_BYTES];
    (void)kvl_architecture_key(architecture, "attention.head_count_kv", key);
    KVL_TRY(
        kvl_gguf_find_u32(gguf, key, 1, shape->n_heads, shape->n_heads, &shape->n_kv_heads, error));
    if (shape->n_heads % shape->n_kv_heads != 0) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "key %s is %u at byte %zu; must divide the %u heads", key,
                        shape->n_kv_heads, kvl_gguf_find(gguf, key)->offset, shape->n_heads);
    }
    (void)kvl_architecture_key(architecture, "attention.key_length", key);
    if (kvl_gguf_find(gguf, key) == NULL && shape->width % shape->n_heads != 0) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "key %s is missing, and the width %u is not a multiple of the %u heads",
                        key, shape->width, shape->n_heads);
    }
    KVL_TRY(kvl_gguf_find_u32(gguf, key, 1, KVL_HEAD_DIM_MAX, shape->width / shape->n_heads,
                              &shape->head_dim, error));
    /* The fallback has not been through the range of the key, and 0 comes of fewer dimensions than
     * heads. Pages and kernels hold heads in whole vectors. */
    if (shape->head_dim == 0 || shape->head_dim > KVL_HEAD_DIM_MAX ||
        shape->head_dim % HEAD_DIM_STEP != 0) {
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                        "heads have %u dimensions (key %s, or width %u over %u heads); supported "
                        "are multiples of %u up to %u",
                        shape->head_dim, key, shape->width, shape->n_heads, HEAD_DIM_STEP,
                        KVL_HEAD_DIM_MAX);
    }
    (void)kvl_architecture_key(architecture, "attention.value_length", key);
    uint32_t value_dim = 0;
    KVL_TRY(kvl_gguf_find_u32(gguf, key, 0, UINT32_MAX, shape->head_dim, &value_dim, error));
    if (value_dim == shape->head_dim) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                    "key %s is %u at byte %zu; values must be as long as keys, %u", key, value_dim,
                    kvl_gguf_find(gguf, key)->offset, shape->head_dim);
}

/* Fewer dimensions than a head has are fine: the rest of the head does not turn. */
static kvl_status read_rotary(const kvl_architecture *architecture, const kvl_gguf *gguf,
                              kvl_model_shape *shape, kvl_error *error)
{
    char key[KVL_MODEL_NAME_BYTES];
    (void)kvl_architecture_key(architecture, "rope.dimension_count", key);
    KVL_TRY(kvl_gguf_find_u32(gguf, key, 2, shape->head_dim, shape->head_dim, &shape->rotary_dim,
                              error));
    if (shape->rotary_dim % 2 == 0) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_MALFORMED, "key %s is %u at byte %zu; must be even", key,
                    shape->rotary_dim, kvl_gguf_find(gguf, key)->offset);
}

kvl_status kvl_tensor_check_sizes(const kvl_gguf_tensor *tensor, uint32_t n_outputs,
                                  uint32_t n_inputs, kvl_error *error)
{
    const uint64_t inner = n_inputs == 0 ? n_outputs : n_inputs;
    const uint64_t outer = n_inputs == 0 ? 1 : n_outputs;
    if (tensor->sizes[0] == inner && tensor->sizes[1] == outer && tensor->sizes[2] == 1 &&
        tensor->sizes[3] == 1)
        return KVL_OK;
    char name[KVL_GGUF_PRINTABLE_BYTES];
    return KVL_FAIL(error, KVL_ERR_MALFORMED,
                    "tensor %s with data at byte %zu is %" PRIu64 " x %" PRIu64 " x %" PRIu64
                    " x %" PRIu64 "; by the metadata it must be %" PRIu64 " x %" PRIu64,
                    kvl_gguf_printable(tensor->name, name), tensor->offset, tensor->sizes[0],
                    tensor->sizes[1], tensor->sizes[2], tensor->sizes[3], inner, outer);
}

/* The embedding's rows are the vocabulary; the key that also says it is not always there. */
static kvl_status read_vocabulary(const kvl_architecture *architecture, const kvl_gguf *gguf,
                                  kvl_model_shape *shape, kvl_error *error)
{
    const kvl_gguf_tensor *embedding = kvl_gguf_find_tensor(gguf, "token_embd.weight");
    if (embedding == NULL) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED, "tensor token_embd.weight is missing");
    }
    if (embedding->sizes[1] > KVL_VOCABULARY_MAX) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "tensor token_embd.weight with data at byte %zu has %" PRIu64
                        " rows; must be at most %u",
                        embedding->offset, embedding->sizes[1], KVL_VOCABULARY_MAX);
    }
    shape->n_vocab = (uint32_t)embedding->sizes[1];
    KVL_TRY(kvl_tensor_check_sizes(embedding, shape->n_vocab, shape->width, error));
    char key[KVL_MODEL_NAME_BYTES];
    (void)kvl_architecture_key(architecture, "vocab_size", key);
    uint32_t n_vocab = 0;
    KVL_TRY(kvl_gguf_find_u32(gguf, key, 1, KVL_VOCABULARY_MAX, shape->n_vocab, &n_vocab, error));
    if (n_vocab == shape->n_vocab) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_MALFORMED,
                    "key %s is %u at byte %zu; must be %u, the rows of token_embd.weight", key,
                    n_vocab, kvl_gguf_find(gguf, key)->offset, shape->n_vocab);
}

/* For people only: cut to fit, and made printable, since it goes to terminals and pages. */
static kvl_status read_name(const kvl_gguf *gguf, kvl_model_shape *shape, kvl_error *error)
{
    kvl_gguf_text name;
    KVL_TRY(kvl_gguf_find_text(gguf, "general.name", &name, error));
    char text[KVL_GGUF_PRINTABLE_BYTES];
    const char *printable = name.bytes == NULL ? "" : kvl_gguf_printable(name, text);
    (void)snprintf(shape->name, sizeof shape->name, "%.*s", (int)sizeof shape->name - 1, printable);
    return KVL_OK;
}

/* In this order, because later steps divide by and compare with what earlier ones have checked. */
kvl_status kvl_architecture_read_shape(const kvl_architecture *architecture, const kvl_gguf *gguf,
                                       kvl_model_shape *shape, kvl_error *error)
{
    *shape = (kvl_model_shape){.pairs = architecture->pairs};
    (void)snprintf(shape->architecture, sizeof shape->architecture, "%s", architecture->name);
    KVL_TRY(refuse_other_mathematics(architecture, gguf, error));
    char key[KVL_MODEL_NAME_BYTES];
    for (size_t i = 0; i < sizeof size_keys / sizeof *size_keys; i++) {
        uint32_t *size = (uint32_t *)(void *)((char *)shape + size_keys[i].field);
        KVL_TRY(kvl_gguf_get_u32(gguf, kvl_architecture_key(architecture, size_keys[i].suffix, key),
                                 1, size_keys[i].maximum, size, error));
    }
    (void)kvl_architecture_key(architecture, "attention.layer_norm_rms_epsilon", key);
    KVL_TRY(kvl_gguf_get_f32(gguf, key, 1e-12F, 1e-2F, &shape->norm_epsilon, error));
    KVL_TRY(read_heads(architecture, gguf, shape, error));
    KVL_TRY(read_rotary(architecture, gguf, shape, error));
    KVL_TRY(refuse_window(architecture, gguf, shape, error));
    KVL_TRY(read_vocabulary(architecture, gguf, shape, error));
    return read_name(gguf, shape, error);
}
