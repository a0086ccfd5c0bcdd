/* compute/reference.c: plain loops over the definitions, in double, one weight at a time. */
#include "compute/reference.h"

#include "base/alloc.h"

#include <math.h>
#include <string.h>

/* ---- weights ---- */

/* IEEE binary16 by its definition: sign, five bits of exponent, ten of mantissa. */
static double half_at(const uint8_t *from)
{
    const unsigned bits = from[0] | (unsigned)from[1] << 8;
    const int exponent = (int)(bits >> 10 & 31U);
    const double mantissa = (double)(bits & 1023U);
    const double sign = (bits & 0x8000U) != 0 ? -1.0 : 1.0;
    if (exponent == 31) return mantissa != 0 ? (double)NAN : sign * (double)INFINITY;
    if (exponent == 0) return sign * ldexp(mantissa, -24);
    return sign * ldexp(1024.0 + mantissa, exponent - 25);
}

static double float_at(const uint8_t *from, bool upper_half_only)
{
    uint8_t bytes[4] = {0, 0, from[0], from[1]};
    if (!upper_half_only) memcpy(bytes, from, sizeof bytes);
    float value;
    memcpy(&value, bytes, sizeof value);
    return (double)value;
}

/* Nibble i of a block of 32: byte i mod 16, low for the first sixteen. */
static int nibble_at(const uint8_t *nibbles, unsigned i)
{
    return i < 16 ? nibbles[i] & 15 : nibbles[i - 16] >> 4;
}

static int bit_at(const uint8_t *bits, unsigned i)
{
    return bits[i / 8] >> (i % 8) & 1;
}

/* Six-bit scale and minimum of unit u of a Q4_K or Q5_K block. */
static void six_bits_at(const uint8_t *packed, unsigned unit, int *scale, int *min)
{
    if (unit < 4) {
        *scale = packed[unit] & 63;
        *min = packed[unit + 4] & 63;
    } else {
        *scale = (packed[unit + 4] & 15) | (packed[unit - 4] >> 6) << 4;
        *min = packed[unit + 4] >> 4 | (packed[unit] >> 6) << 4;
    }
}

static double k_weight(const uint8_t *block, unsigned i, bool five_bits)
{
    const unsigned unit = i / 32;
    const uint8_t *nibbles = block + (five_bits ? 48 : 16);
    const uint8_t both = nibbles[unit / 2 * 32 + i % 32];
    int quant = unit % 2 == 0 ? both & 15 : both >> 4;
    if (five_bits) quant += (block[16 + i % 32] >> unit & 1) << 4;
    int scale = 0;
    int min = 0;
    six_bits_at(block + 4, unit, &scale, &min);
    return half_at(block) * scale * quant - half_at(block + 2) * min;
}

static double q6_k_weight(const uint8_t *block, unsigned i)
{
    const unsigned half = i / 128;
    const unsigned unit = i % 128 / 32;
    const uint8_t both = block[64 * half + 32 * (unit % 2) + i % 32];
    const int low = unit < 2 ? both & 15 : both >> 4;
    const int high = block[128 + 32 * half + i % 32] >> (2 * unit) & 3;
    int scale = block[192 + i / 16];
    if (scale > 127) scale -= 256;
    return half_at(block + 208) * scale * ((low | high << 4) - 32);
}

/* Weight i of one block. */
static double weight_at(kvl_dtype dtype, const uint8_t *block, unsigned i)
{
    switch (dtype) {
    case KVL_DTYPE_F32: return float_at(block, false);
    case KVL_DTYPE_F16: return half_at(block);
    case KVL_DTYPE_BF16: return float_at(block, true);
    case KVL_DTYPE_Q8_0: return half_at(block) * (block[2 + i] - (block[2 + i] > 127 ? 256 : 0));
    case KVL_DTYPE_Q4_0: return half_at(block) * (nibble_at(block + 2, i) - 8);
    case KVL_DTYPE_Q4_1: return half_at(block) * nibble_at(block + 4, i) + half_at(block + 2);
    case KVL_DTYPE_Q5_0:
        return half_at(block) * (nibble_at(block + 6, i) + 16 * bit_at(block + 2, i) - 16);
    case KVL_DTYPE_Q5_1:
        return half_at(block) * (nibble_at(block + 8, i) + 16 * bit_at(block + 4, i)) +
               half_at(block + 2);
    case KVL_DTYPE_Q4_K: return k_weight(block, i, false);
    case KVL_DTYPE_Q5_K: return k_weight(block, i, true);
    case KVL_DTYPE_Q6_K: return q6_k_weight(block, i);
    case KVL_DTYPE_COUNT: break;
    }
    KVL_ASSERT(!"a dtype of the list");
    return 0;
}

void kvl_reference_dequantise(kvl_dtype dtype, size_t n, const void *weights, double *out)
{
    const kvl_dtype_info *about = kvl_dtype_about(dtype);
    for (size_t i = 0; i < n; i++) {
        const uint8_t *block =
            (const uint8_t *)weights + i / about->block_weights * about->block_bytes;
        out[i] = weight_at(dtype, block, (unsigned)(i % about->block_weights));
    }
}

/* ---- operations ---- */

kvl_status kvl_reference_matmul(const kvl_matrix *weights, uint32_t n_rows, const float *x,
                                const float *bias, double *y, double *magnitude)
{
    const size_t n_inputs = weights->n_inputs;
    double *row = kvl_alloc_zero(n_inputs, sizeof *row);
    if (row == NULL) return KVL_ERR_NO_MEMORY;
    for (size_t o = 0; o < weights->n_outputs; o++) {
        kvl_reference_dequantise(weights->dtype, n_inputs,
                                 (const uint8_t *)weights->data + o * weights->row_bytes, row);
        for (size_t r = 0; r < n_rows; r++) {
            double sum = bias != NULL ? (double)bias[o] : 0.0;
            double absolute = fabs(sum);
            for (size_t k = 0; k < n_inputs; k++) {
                sum += (double)x[r * n_inputs + k] * row[k];
                absolute += fabs((double)x[r * n_inputs + k] * row[k]);
            }
            y[r * weights->n_outputs + o] = sum;
            if (magnitude != NULL) magnitude[r * weights->n_outputs + o] = absolute;
        }
    }
    kvl_free(row);
    return KVL_OK;
}

void kvl_reference_rms_norm(uint32_t n_rows, uint32_t width, const float *x, const float *weight,
                            double epsilon, double *y)
{
    for (size_t r = 0; r < n_rows; r++) {
        double squares = 0;
        for (size_t i = 0; i < width; i++)
            squares += (double)x[r * width + i] * (double)x[r * width + i];
        const double scale = 1.0 / sqrt(squares / width + epsilon);
        for (size_t i = 0; i < width; i++)
            y[r * width + i] = (double)x[r * width + i] * scale * (double)weight[i];
    }
}

void kvl_reference_silu_multiply(size_t n, const float *gate, const float *up, double *out)
{
    for (size_t i = 0; i < n; i++)
        out[i] = (double)gate[i] / (1.0 + exp(-(double)gate[i])) * (double)up[i];
}

void kvl_reference_rotate(const double *inverse_frequencies, uint32_t rotary_dim,
                          kvl_rotation_pairs pairs, uint32_t position, bool backwards,
                          uint32_t head_dim, const float *head, double *out)
{
    for (uint32_t d = 0; d < head_dim; d++) out[d] = (double)head[d];
    for (uint32_t j = 0; j < rotary_dim / 2; j++) {
        const uint32_t first = pairs == KVL_PAIRS_ADJACENT ? 2 * j : j;
        const uint32_t second = pairs == KVL_PAIRS_ADJACENT ? 2 * j + 1 : j + rotary_dim / 2;
        const double angle = (backwards ? -1.0 : 1.0) * position * inverse_frequencies[j];
        out[first] = (double)head[first] * cos(angle) - (double)head[second] * sin(angle);
        out[second] = (double)head[first] * sin(angle) + (double)head[second] * cos(angle);
    }
}

/* One query [head_dim] against the keys of one KV head; scores has room for them. */
static void attend_one(const kvl_reference_attention *a, const float *query, uint32_t n_seen,
                       uint32_t kv_head, double *scores, double *out)
{
    const size_t stride = (size_t)a->n_kv_heads * a->head_dim;
    const float *keys = a->keys + (size_t)kv_head * a->head_dim;
    const float *values = a->values + (size_t)kv_head * a->head_dim;
    double largest = -(double)INFINITY;
    for (size_t k = 0; k < n_seen; k++) {
        scores[k] = 0;
        for (size_t d = 0; d < a->head_dim; d++)
            scores[k] += (double)query[d] * (double)keys[k * stride + d];
        scores[k] /= sqrt(a->head_dim);
        largest = fmax(largest, scores[k]);
    }
    double total = 0;
    for (size_t d = 0; d < a->head_dim; d++) out[d] = 0;
    for (size_t k = 0; k < n_seen; k++) {
        const double weight = exp(scores[k] - largest);
        total += weight;
        for (size_t d = 0; d < a->head_dim; d++) out[d] += weight * (double)values[k * stride + d];
    }
    for (size_t d = 0; d < a->head_dim && n_seen > 0; d++) out[d] /= total;
}

kvl_status kvl_reference_attend(const kvl_reference_attention *a, double *out)
{
    double *scores = kvl_alloc_zero((size_t)a->n_keys + 1, sizeof *scores);
    if (scores == NULL) return KVL_ERR_NO_MEMORY;
    const uint32_t group = a->n_heads / a->n_kv_heads;
    for (uint32_t r = 0; r < a->n_rows; r++) {
        const uint32_t n_seen = a->positions[r] < a->n_keys ? a->positions[r] + 1 : a->n_keys;
        for (uint32_t h = 0; h < a->n_heads; h++) {
            const size_t at = ((size_t)r * a->n_heads + h) * a->head_dim;
            attend_one(a, a->queries + at, n_seen, h / group, scores, out + at);
        }
    }
    kvl_free(scores);
    return KVL_OK;
}
