/* model/frequencies.c: how fast each pair of dimensions turns, from the keys <architecture>.rope.*
 * and the tensor rope_freqs.weight. All in double: at position 100,000 an error of a float's last
 * bit in a frequency of 1 would turn a key by a hundredth of a radian. */
#include "model/architecture.h"

#include <math.h>
#include <string.h>

#define BASE_DEFAULT 10000.0F /* what files without the key were made with */
#define BASE_MAX 1e12F
#define FACTOR_MAX 1e6F

typedef enum scaling {
    SCALING_NONE,
    SCALING_LINEAR,
    SCALING_LLAMA3,
} scaling;

/* An unknown kind is refused and not ignored: its model would answer well for a while and go wrong
 * with the length of the prompt, which nobody finds. */
static kvl_status read_scaling(const kvl_architecture *architecture, const kvl_gguf *gguf,
                               scaling *kind, kvl_error *error)
{
    char key[KVL_MODEL_NAME_BYTES];
    kvl_gguf_text type;
    KVL_TRY(kvl_gguf_find_text(gguf, kvl_architecture_key(architecture, "rope.scaling.type", key),
                               &type, error));
    /* Old files give a factor and no type; it has always meant this one. */
    if (type.bytes == NULL || kvl_gguf_text_is(type, "linear")) {
        *kind = SCALING_LINEAR;
    } else if (kvl_gguf_text_is(type, "none")) {
        *kind = SCALING_NONE;
    } else if (kvl_gguf_text_is(type, "llama3")) {
        *kind = SCALING_LLAMA3;
    } else {
        char text[KVL_GGUF_PRINTABLE_BYTES];
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                        "key %s is \"%s\" at byte %zu; supported are none, linear and llama3", key,
                        kvl_gguf_printable(type, text), kvl_gguf_find(gguf, key)->offset);
    }
    return KVL_OK;
}

/* The factor of linear scaling, under its name of today or its first one; 0 in a file means that
 * nothing is scaled. */
static kvl_status read_linear_factor(const kvl_architecture *architecture, const kvl_gguf *gguf,
                                     double *factor, kvl_error *error)
{
    char key[KVL_MODEL_NAME_BYTES];
    (void)kvl_architecture_key(architecture, "rope.scaling.factor", key);
    if (kvl_gguf_find(gguf, key) == NULL)
        (void)kvl_architecture_key(architecture, "rope.scale_linear", key);
    float value = 0;
    KVL_TRY(kvl_gguf_find_f32(gguf, key, 0, FACTOR_MAX, 1, &value, error));
    if (value > 0 && value < 1e-3F) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED, "key %s is %g at byte %zu; must be 0.001 to %g",
                        key, (double)value, kvl_gguf_find(gguf, key)->offset, (double)FACTOR_MAX);
    }
    *factor = value > 0 ? (double)value : 1.0;
    return KVL_OK;
}

/* Llama 3.1's rule: wavelengths longer than the original context are stretched by the factor, short
 * ones are left alone, and those in between pass from one to the other linearly in frequency. */
static double llama3_factor(double frequency, double factor, double low, double high,
                            double n_original)
{
    const double turns = n_original * frequency / (2 * acos(-1.0)); /* within the old context */
    if (turns > high) return 1;
    if (turns < low) return factor;
    const double kept = (turns - low) / (high - low);
    return 1 / (kept + (1 - kept) / factor);
}

/* All four numbers must be there; converters that write them write all. */
static kvl_status apply_llama3_keys(const kvl_architecture *architecture, const kvl_gguf *gguf,
                                    const kvl_model_shape *shape, double *frequencies,
                                    kvl_error *error)
{
    char key[KVL_MODEL_NAME_BYTES];
    float factor = 0, low = 0, high = 0;
    uint32_t n_original = 0;
    KVL_TRY(kvl_gguf_get_f32(gguf, kvl_architecture_key(architecture, "rope.scaling.factor", key),
                             1, FACTOR_MAX, &factor, error));
    (void)kvl_architecture_key(architecture, "rope.scaling.original_context_length", key);
    KVL_TRY(kvl_gguf_get_u32(gguf, key, 1, KVL_POSITIONS_MAX, &n_original, error));
    (void)kvl_architecture_key(architecture, "rope.scaling.low_freq_factor", key);
    KVL_TRY(kvl_gguf_get_f32(gguf, key, 1e-3F, FACTOR_MAX, &low, error));
    (void)kvl_architecture_key(architecture, "rope.scaling.high_freq_factor", key);
    KVL_TRY(kvl_gguf_get_f32(gguf, key, 1e-3F, FACTOR_MAX, &high, error));
    if (high <= low) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "key %s is %g at byte %zu; must be above the low factor %g", key,
                        (double)high, kvl_gguf_find(gguf, key)->offset, (double)low);
    }
    for (uint32_t j = 0; j < shape->rotary_dim / 2; j++) {
        frequencies[j] /= llama3_factor(frequencies[j], (double)factor, (double)low, (double)high,
                                        (double)n_original);
    }
    return KVL_OK;
}

/* Converters compute the factors from the same four numbers and store them for each pair, so this
 * is the same scaling with nothing left to choose. Factors are read from a tensor and so checked
 * one by one: 0 would make an infinite frequency, and every key not-a-number. */
static kvl_status apply_factor_tensor(const kvl_gguf_tensor *tensor, const kvl_model_shape *shape,
                                      double *frequencies, kvl_error *error)
{
    const uint32_t n_pairs = shape->rotary_dim / 2;
    KVL_TRY(kvl_tensor_check_sizes(tensor, n_pairs, 0, error));
    if (tensor->dtype != KVL_DTYPE_F32) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "tensor rope_freqs.weight with data at byte %zu is %s; must be F32",
                        tensor->offset, kvl_dtype_about(tensor->dtype)->name);
    }
    for (uint32_t j = 0; j < n_pairs; j++) {
        float factor;
        memcpy(&factor, tensor->data + j * sizeof factor, sizeof factor);
        /* Not-a-number fails this too. */
        if (!(factor >= 1e-3F && factor <= FACTOR_MAX)) {
            return KVL_FAIL(error, KVL_ERR_MALFORMED,
                            "factor %u of tensor rope_freqs.weight is %g at byte %zu; must be "
                            "0.001 to %g",
                            j, (double)factor, tensor->offset + j * sizeof factor,
                            (double)FACTOR_MAX);
        }
        frequencies[j] /= (double)factor;
    }
    return KVL_OK;
}

/* A tensor of factors comes before keys, as in llama.cpp, and replaces them. */
kvl_status kvl_frequencies_read(const kvl_architecture *architecture, const kvl_gguf *gguf,
                                const kvl_model_shape *shape, double *inverse_frequencies,
                                kvl_error *error)
{
    char key[KVL_MODEL_NAME_BYTES];
    scaling kind = SCALING_NONE;
    KVL_TRY(read_scaling(architecture, gguf, &kind, error));
    float base = 0;
    KVL_TRY(kvl_gguf_find_f32(gguf, kvl_architecture_key(architecture, "rope.freq_base", key), 1,
                              BASE_MAX, BASE_DEFAULT, &base, error));
    double divisor = 1;
    if (kind == SCALING_LINEAR) KVL_TRY(read_linear_factor(architecture, gguf, &divisor, error));
    for (uint32_t j = 0; j < shape->rotary_dim / 2; j++) {
        const double exponent = -2.0 * (double)j / (double)shape->rotary_dim;
        inverse_frequencies[j] = pow((double)base, exponent) / divisor;
    }
    const kvl_gguf_tensor *factors = kvl_gguf_find_tensor(gguf, "rope_freqs.weight");
    if (factors != NULL && architecture->has_frequency_factors)
        return apply_factor_tensor(factors, shape, inverse_frequencies, error);
    if (kind == SCALING_LLAMA3)
        return apply_llama3_keys(architecture, gguf, shape, inverse_frequencies, error);
    return KVL_OK;
}
