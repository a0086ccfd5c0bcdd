/* compute/rotation.c: makes the table of angles and turns pairs of numbers by them.
 * Method   RoFormer, arXiv:2104.09864, section 3.4.2. Angles, cosines and sines in double, then
 *          rounded once: an angle of a million positions would lose its turns in float. */
#include "compute/rotation.h"

#include "base/alloc.h"
#include "compute/pages.h"

#include <math.h>

static kvl_status check_shape(uint32_t rotary_dim, uint32_t n_positions, kvl_error *error)
{
    if (rotary_dim == 0 || rotary_dim > KVL_HEAD_DIM_MAX || rotary_dim % 2 != 0)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "rotary dimension is %u, must be even and in 2 .. %u", rotary_dim,
                        KVL_HEAD_DIM_MAX);
    if (n_positions == 0 || n_positions > KVL_POSITIONS_MAX)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "context length is %u positions, must be in 1 .. %u", n_positions,
                        KVL_POSITIONS_MAX);
    return KVL_OK;
}

static void fill_table(const double *inverse_frequencies, kvl_rotation *rotation)
{
    const uint32_t n_pairs = rotation->rotary_dim / 2;
    for (uint32_t p = 0; p < rotation->n_positions; p++) {
        float *cosines = rotation->cosines + (size_t)p * n_pairs;
        float *sines = rotation->sines + (size_t)p * n_pairs;
        for (uint32_t j = 0; j < n_pairs; j++) {
            const double angle = (double)p * inverse_frequencies[j];
            cosines[j] = (float)cos(angle);
            sines[j] = (float)sin(angle);
        }
    }
}

kvl_status kvl_rotation_create(const double *inverse_frequencies, uint32_t rotary_dim,
                               uint32_t n_positions, kvl_rotation_pairs pairs,
                               kvl_rotation **rotation, kvl_error *error)
{
    *rotation = NULL;
    KVL_TRY(check_shape(rotary_dim, n_positions, error));
    kvl_rotation *made = kvl_alloc_zero(1, sizeof *made);
    /* At most 2^20 positions of 128 pairs: the product fits in 64 bits. */
    const size_t table_bytes = (size_t)n_positions * (rotary_dim / 2) * sizeof(float);
    if (made != NULL) {
        *made = (kvl_rotation){.n_positions = n_positions,
                               .rotary_dim = rotary_dim,
                               .pairs = pairs,
                               .cosines = kvl_alloc_aligned(table_bytes),
                               .sines = kvl_alloc_aligned(table_bytes)};
    }
    if (made == NULL || made->cosines == NULL || made->sines == NULL) {
        kvl_rotation_destroy(made);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY,
                        "no memory for the angles of %u positions (%zu MiB): shorten the context",
                        n_positions, 2 * table_bytes >> 20);
    }
    fill_table(inverse_frequencies, made);
    *rotation = made;
    return KVL_OK;
}

void kvl_rotation_destroy(kvl_rotation *rotation)
{
    if (rotation == NULL) return;
    kvl_free(rotation->cosines);
    kvl_free(rotation->sines);
    kvl_free(rotation);
}

/* sign is 1 forwards and -1 backwards. A pair is read before it is written. */
static void rotate_adjacent(uint32_t n_pairs, const float *cosines, const float *sines, float sign,
                            float *head)
{
    for (uint32_t j = 0; j < n_pairs; j++) {
        const float sine = sign * sines[j];
        const float first = head[2 * j];
        const float second = head[2 * j + 1];
        head[2 * j] = first * cosines[j] - second * sine;
        head[2 * j + 1] = second * cosines[j] + first * sine;
    }
}

static void rotate_halves(uint32_t n_pairs, const float *cosines, const float *sines, float sign,
                          float *head)
{
    for (uint32_t j = 0; j < n_pairs; j++) {
        const float sine = sign * sines[j];
        const float first = head[j];
        const float second = head[j + n_pairs];
        head[j] = first * cosines[j] - second * sine;
        head[j + n_pairs] = second * cosines[j] + first * sine;
    }
}

void kvl_rotate_rows(const kvl_rotation *rotation, uint32_t n_rows, const uint32_t *positions,
                     uint32_t n_heads, uint32_t head_dim, size_t row_stride, bool backwards,
                     float *rows)
{
    KVL_ASSERT(rotation->rotary_dim <= head_dim);
    const uint32_t n_pairs = rotation->rotary_dim / 2;
    const float sign = backwards ? -1.0F : 1.0F;
    for (uint32_t r = 0; r < n_rows; r++) {
        KVL_ASSERT(positions[r] < rotation->n_positions);
        const float *cosines = rotation->cosines + (size_t)positions[r] * n_pairs;
        const float *sines = rotation->sines + (size_t)positions[r] * n_pairs;
        for (uint32_t h = 0; h < n_heads; h++) {
            float *head = rows + r * row_stride + (size_t)h * head_dim;
            if (rotation->pairs == KVL_PAIRS_ADJACENT)
                rotate_adjacent(n_pairs, cosines, sines, sign, head);
            else
                rotate_halves(n_pairs, cosines, sines, sign, head);
        }
    }
}
