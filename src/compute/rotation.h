/* compute/rotation.h: the table of rotary position embedding (RoPE) of one model.
 * Method   RoFormer, arXiv:2104.09864, section 3.4.2. Which dimensions form a pair depends on how
 *          the weights are laid out; GGUF permutes llama's and leaves qwen2's as they are.
 * Error    Angles in double, rotation in float: within 4 * FLT_EPSILON of the double result,
 *          relative to the larger of the pair.
 * Threads  A table never changes once made: share it freely. */
#ifndef KVL_COMPUTE_ROTATION_H
#define KVL_COMPUTE_ROTATION_H

#include "base/status.h"

#define KVL_POSITIONS_MAX (1u << 20)

typedef enum kvl_rotation_pairs {
    KVL_PAIRS_ADJACENT, /* (2j, 2j + 1): llama as GGUF stores it */
    KVL_PAIRS_HALVES,   /* (j, j + rotary_dim / 2): qwen2 */
} kvl_rotation_pairs;

typedef struct kvl_rotation {
    float *cosines; /* [n_positions][rotary_dim / 2] */
    float *sines;   /* same */
    uint32_t n_positions;
    uint32_t rotary_dim; /* even, <= head_dim; later dimensions of a head are not rotated */
    kvl_rotation_pairs pairs;
} kvl_rotation;

/* inverse_frequencies [rotary_dim / 2] double: angle of pair j at position p is p * f[j].
 * Owns     *rotation: ended with kvl_rotation_destroy
 * Errors   KVL_ERR_OUT_OF_RANGE, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_rotation_create(const double *inverse_frequencies, uint32_t rotary_dim,
                                            uint32_t n_positions, kvl_rotation_pairs pairs,
                                            kvl_rotation **rotation, kvl_error *error);
void kvl_rotation_destroy(kvl_rotation *rotation);

/* Rotates rows in place, each of n_heads heads, to its own position; `backwards` undoes it.
 * rows       [n_rows][row_stride] float, the first n_heads * head_dim of each row are heads
 * positions  [n_rows], each < n_positions */
void kvl_rotate_rows(const kvl_rotation *rotation, uint32_t n_rows, const uint32_t *positions,
                     uint32_t n_heads, uint32_t head_dim, size_t row_stride, bool backwards,
                     float *rows);

#endif /* KVL_COMPUTE_ROTATION_H */
