/* model/architecture.h: what the supported architectures are, as tables: which metadata give the
 * shape, which tensors there are, of which sizes, and where they go. Private to the room.
 *
 * Another architecture of this family (pre-norm, gated feed-forward, grouped queries, rotary
 * positions) is one more row in architecture.c.
 * Threads  The tables are constants. */
#ifndef KVL_MODEL_ARCHITECTURE_H
#define KVL_MODEL_ARCHITECTURE_H

#include "model/gguf.h"
#include "model/model.h"

/* Limits of what a file may ask for; more than twice any open model of these architectures. */
#define KVL_WIDTH_MAX (1u << 16)
#define KVL_HEADS_MAX 1024u
#define KVL_FEED_FORWARD_MAX (1u << 18)
#define KVL_VOCABULARY_MAX (1u << 20)

/* A size of a tensor, as a rule over the shape. */
typedef enum kvl_extent {
    KVL_EXTENT_WIDTH,
    KVL_EXTENT_QUERIES,    /* n_heads * head_dim */
    KVL_EXTENT_KEY_VALUES, /* n_kv_heads * head_dim */
    KVL_EXTENT_FEED_FORWARD,
} kvl_extent;

/* One tensor of every layer, named "blk.<layer>.<name>". */
typedef struct kvl_tensor_rule {
    const char *name;
    bool is_matrix; /* [n_outputs][n_inputs]; otherwise a vector [n_outputs] */
    kvl_extent n_outputs;
    kvl_extent n_inputs; /* of a matrix */
    bool is_bias;        /* there only where the architecture says so */
    size_t field;        /* its place in kvl_layer_weights */
} kvl_tensor_rule;

#define KVL_TENSOR_RULES 12u
extern const kvl_tensor_rule kvl_tensor_rules[KVL_TENSOR_RULES];

typedef enum kvl_bias_use {
    KVL_BIAS_OPTIONAL, /* used where the file has it */
    KVL_BIAS_REQUIRED,
} kvl_bias_use;

typedef struct kvl_architecture {
    const char *name; /* general.architecture, and the first word of its keys */
    kvl_rotation_pairs pairs;
    kvl_bias_use biases;        /* of query, key and value */
    bool has_frequency_factors; /* may have the tensor rope_freqs.weight */
} kvl_architecture;

/* Room for "<architecture>.<longest key>" and for "blk.511.<longest name>", with the NUL. */
#define KVL_MODEL_NAME_BYTES 96u

/* Writes "<architecture>.<suffix>" to key[KVL_MODEL_NAME_BYTES] and returns it. */
const char *kvl_architecture_key(const kvl_architecture *architecture, const char *suffix,
                                 char *key);

/* Errors   KVL_ERR_UNSUPPORTED  another architecture, an adapter or vocabulary without weights:
 *                               text lists what is supported
 *          KVL_ERR_MALFORMED    general.architecture is missing or no text */
KVL_MUST_USE kvl_status kvl_architecture_find(const kvl_gguf *gguf,
                                              const kvl_architecture **architecture,
                                              kvl_error *error);

/* Reads the shape and refuses whatever would change the mathematics: experts, windows, soft caps,
 * scales. n_vocab comes from the embedding's tensor, everything else from keys.
 * Errors   KVL_ERR_MALFORMED, KVL_ERR_UNSUPPORTED, KVL_ERR_TOO_LARGE */
KVL_MUST_USE kvl_status kvl_architecture_read_shape(const kvl_architecture *architecture,
                                                    const kvl_gguf *gguf, kvl_model_shape *shape,
                                                    kvl_error *error);

uint32_t kvl_extent_of(kvl_extent extent, const kvl_model_shape *shape);

/* Angles of the rotation: inverse_frequencies [rotary_dim / 2] double, the caller's.
 * Method   frequency j = base^(-2j / rotary_dim), then, where the file asks for it, divided by a
 *          factor for all (linear: position interpolation, arXiv:2306.15595) or one for each pair
 *          (llama3: either a tensor of factors, as llama.cpp stores them, or the four numbers that
 *          they are made from). yarn and other scalings are refused.
 * Errors   KVL_ERR_MALFORMED, KVL_ERR_UNSUPPORTED, KVL_ERR_TOO_LARGE */
KVL_MUST_USE kvl_status kvl_frequencies_read(const kvl_architecture *architecture,
                                             const kvl_gguf *gguf, const kvl_model_shape *shape,
                                             double *inverse_frequencies, kvl_error *error);

/* Refuses a tensor whose sizes are not {n_inputs, n_outputs}, or {n_outputs} for vectors, where
 * n_inputs is 0.
 * Errors   KVL_ERR_MALFORMED */
KVL_MUST_USE kvl_status kvl_tensor_check_sizes(const kvl_gguf_tensor *tensor, uint32_t n_outputs,
                                               uint32_t n_inputs, kvl_error *error);

#endif /* KVL_MODEL_ARCHITECTURE_H */
