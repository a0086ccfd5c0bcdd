/* compute/dtype.h: number formats of weights, and matrices made of them.
 * The quantised formats are those of GGUF: blocks of 32 (Q8_0 .. Q5_1) or 256 (Q4_K .. Q6_K)
 * weights along a row, each block with its own scales. Little endian. */
#ifndef KVL_COMPUTE_DTYPE_H
#define KVL_COMPUTE_DTYPE_H

#include "base/status.h"

/*    name, weights a block, bytes a block */
#define KVL_DTYPE_LIST(X)                                                                          \
    X(F32, 1, 4)                                                                                   \
    X(F16, 1, 2)                                                                                   \
    X(BF16, 1, 2)                                                                                  \
    X(Q8_0, 32, 34)                                                                                \
    X(Q4_0, 32, 18)                                                                                \
    X(Q4_1, 32, 20)                                                                                \
    X(Q5_0, 32, 22)                                                                                \
    X(Q5_1, 32, 24)                                                                                \
    X(Q4_K, 256, 144)                                                                              \
    X(Q5_K, 256, 176)                                                                              \
    X(Q6_K, 256, 210)

typedef enum kvl_dtype {
#define KVL_DTYPE_ENUM(name, n_weights, n_bytes) KVL_DTYPE_##name,
    KVL_DTYPE_LIST(KVL_DTYPE_ENUM)
#undef KVL_DTYPE_ENUM
        KVL_DTYPE_COUNT
} kvl_dtype;

typedef struct kvl_dtype_info {
    const char *name;
    uint32_t block_weights;
    uint32_t block_bytes;
} kvl_dtype_info;

/* dtype < KVL_DTYPE_COUNT. Static. */
const kvl_dtype_info *kvl_dtype_about(kvl_dtype dtype);

/* A weight matrix, used as y = x W^T: n_outputs rows of n_inputs weights, row after row.
 * n_inputs is a multiple of the block of the dtype. Borrowed: `data` belongs to the model. */
typedef struct kvl_matrix {
    const void *data;
    size_t row_bytes;
    uint32_t n_outputs;
    uint32_t n_inputs;
    kvl_dtype dtype;
} kvl_matrix;

#endif /* KVL_COMPUTE_DTYPE_H */
