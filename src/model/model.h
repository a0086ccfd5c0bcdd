/* model/model.h: a language model read from a GGUF file: shape, weights, tokenizer, template.
 * Threads  Never changes once opened: share it freely. */
#ifndef KVL_MODEL_MODEL_H
#define KVL_MODEL_MODEL_H

#include "base/hash.h"
#include "compute/dtype.h"
#include "compute/rotation.h"
#include "model/chat_template.h"
#include "model/tokenizer.h"

#define KVL_LAYERS_MAX 512u

/* Sizes are counts; all are checked against limits when the file is read. */
typedef struct kvl_model_shape {
    uint32_t n_layers;
    uint32_t n_heads;
    uint32_t n_kv_heads;
    uint32_t head_dim;
    uint32_t width;        /* of the residual stream */
    uint32_t feed_forward; /* width of the gated part */
    uint32_t n_vocab;
    uint32_t n_context; /* positions that the model was made for */
    float norm_epsilon;
    uint32_t rotary_dim;
    kvl_rotation_pairs pairs;
    char architecture[32]; /* "llama", "qwen2" */
    char name[64];         /* general.name, or "" */
} kvl_model_shape;

/* y = x W^T + bias; a bias is NULL where the architecture has none. */
typedef struct kvl_layer_weights {
    const float *attention_norm; /* [width] */
    kvl_matrix query, key, value, attention_output;
    const float *query_bias, *key_bias, *value_bias;
    const float *feed_forward_norm; /* [width] */
    kvl_matrix gate, up, down;
} kvl_layer_weights;

typedef struct kvl_model kvl_model;

/* Opens and checks a file; weights stay in the read-only map.
 * Owns     *model: ended with kvl_model_close
 * Errors   KVL_ERR_NOT_FOUND, KVL_ERR_IO, KVL_ERR_NO_MEMORY,
 *          KVL_ERR_MALFORMED    the file breaks the format: text has key, value and offset
 *          KVL_ERR_UNSUPPORTED  architecture, tensor type, tokenizer or template unknown here
 *          KVL_ERR_TOO_LARGE    a number is above its limit */
KVL_MUST_USE kvl_status kvl_model_open(const char *path, kvl_model **model, kvl_error *error);
/* Same for the bytes of a file in memory, aligned to 8, borrowed until the model is closed. */
KVL_MUST_USE kvl_status kvl_model_parse(const void *bytes, size_t n_bytes, kvl_model **model,
                                        kvl_error *error);
/* NULL does nothing. */
void kvl_model_close(kvl_model *model);

const kvl_model_shape *kvl_model_shape_of(const kvl_model *model);
const kvl_layer_weights *kvl_model_layer(const kvl_model *model, uint32_t layer);
/* [n_vocab][width]; the output matrix is the same where embeddings are tied. */
const kvl_matrix *kvl_model_embedding(const kvl_model *model);
const kvl_matrix *kvl_model_output(const kvl_model *model);
const float *kvl_model_output_norm(const kvl_model *model); /* [width] */

/* [rotary_dim / 2] double, after llama3 scaling where the file asks for it. */
const double *kvl_model_inverse_frequencies(const kvl_model *model);

const kvl_tokenizer *kvl_model_tokenizer(const kvl_model *model);
/* Never NULL: a model with an unknown template is opened, and its template says so when used. */
const kvl_chat_template *kvl_model_chat_template(const kvl_model *model);

/* BLAKE2b-256 over architecture, shapes, frequencies and every weight: KV of one fingerprint means
 * nothing to a model of another. Computed at the first call (about a second a gigabyte). The same
 * file gives the same digest on every machine. */
kvl_digest kvl_model_fingerprint(const kvl_model *model);

#endif /* KVL_MODEL_MODEL_H */
