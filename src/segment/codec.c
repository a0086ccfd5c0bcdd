/* codec.c: rows of KV between the engine's order and number format and a segment's.
 *
 * The engine has tokens outside and heads inside, a segment the other way round, so that one head's
 * keys are one run of memory. Both directions walk token by token: the float32 side, the larger
 * one, is then read or written once from start to end, and the segment's side is n_kv_heads
 * streams, each in order too. */
#include "segment/codec.h"

#include "segment/codec_rows.h"

#include <string.h>

enum { SCALE_BYTES = 2, INT8_STEPS = 127 };

/* One matrix of a block: its numbers, and for int8 its scales. */
typedef struct matrix {
    kvl_kv_dtype dtype;
    uint32_t n_heads, n_tokens, dim;
    uint8_t *numbers; /* [n_heads][n_tokens][dim] */
    uint8_t *scales;  /* [n_heads][n_tokens] float16 */
} matrix;

static const kvl_codec_rows *rows_best(void)
{
    const kvl_codec_rows *rows = kvl_codec_rows_avx2();
    return rows != NULL ? rows : kvl_codec_rows_portable();
}

void kvl_f16_from_f32(size_t n, const float *in, uint16_t *out)
{
    rows_best()->f16_from_f32(n, in, out);
}

void kvl_f32_from_f16(size_t n, const uint16_t *in, float *out)
{
    rows_best()->f32_from_f16(n, in, out);
}

/* 0 for a dtype that is none. */
static uint64_t number_bytes(kvl_kv_dtype dtype)
{
    switch (dtype) {
    case KVL_KV_F32: return 4;
    case KVL_KV_F16:
    case KVL_KV_BF16: return 2;
    case KVL_KV_INT8: return 1;
    }
    return 0;
}

bool kvl_segment_block_bytes(kvl_kv_dtype dtype, uint32_t n_kv_heads, uint32_t n_tokens,
                             uint32_t head_dim, uint64_t *n_bytes)
{
    /* The product of two 32-bit numbers fits; from there on each step can overflow. */
    const uint64_t scale_bytes = dtype == KVL_KV_INT8 ? SCALE_BYTES : 0;
    const uint64_t per_group = number_bytes(dtype) * head_dim + scale_bytes;
    const uint64_t n_groups = (uint64_t)n_kv_heads * n_tokens;
    uint64_t one = 0;
    uint64_t both = 0;
    if (number_bytes(dtype) == 0 || __builtin_mul_overflow(n_groups, per_group, &one) ||
        __builtin_mul_overflow(one, (uint64_t)2, &both))
        return false;
    *n_bytes = both;
    return true;
}

static matrix matrix_of(kvl_kv_dtype dtype, uint32_t n_kv_heads, uint32_t n_tokens,
                        uint32_t head_dim, const void *block, bool is_values)
{
    KVL_ASSERT(number_bytes(dtype) != 0);
    KVL_ASSERT((uintptr_t)block % 2 == 0);
    const size_t n_groups = (size_t)n_kv_heads * n_tokens;
    const size_t bytes = n_groups * head_dim * (size_t)number_bytes(dtype);
    uint8_t *start = (uint8_t *)(uintptr_t)block;
    return (matrix){
        .dtype = dtype,
        .n_heads = n_kv_heads,
        .n_tokens = n_tokens,
        .dim = head_dim,
        .numbers = start + (is_values ? bytes : 0),
        .scales = start + 2 * bytes + (is_values ? n_groups * SCALE_BYTES : 0),
    };
}

/* The smallest float16 that is at least magnitude / 127, as far as float16 goes. */
static uint16_t scale_of(const kvl_codec_rows *rows, float magnitude)
{
    enum { LARGEST = 0x7bff };
    const float wanted = magnitude / INT8_STEPS;
    uint16_t scale;
    float rounded;
    rows->f16_from_f32(1, &wanted, &scale);
    if (scale >= LARGEST) return LARGEST;
    rows->f32_from_f16(1, &scale, &rounded);
    /* Exact: 11 bits times 7. */
    return (uint16_t)(scale + (rounded * INT8_STEPS < magnitude));
}

static void encode_int8(const kvl_codec_rows *rows, uint32_t dim, const float *in, uint8_t *numbers,
                        uint8_t *scale_bytes)
{
    const uint32_t bits = rows->magnitude_max(dim, in);
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    const uint16_t scale = scale_of(rows, magnitude);
    float step;
    rows->f32_from_f16(1, &scale, &step);
    rows->int8_from_f32(dim, in, scale == 0 ? 0 : 1 / step, (int8_t *)numbers);
    memcpy(scale_bytes, &scale, sizeof scale);
}

static void encode_row(const kvl_codec_rows *rows, const matrix *to, size_t group, const float *in)
{
    const uint32_t dim = to->dim;
    uint8_t *numbers = to->numbers + group * dim * (size_t)number_bytes(to->dtype);
    switch (to->dtype) {
    case KVL_KV_F32: memcpy(numbers, in, dim * sizeof *in); break;
    case KVL_KV_F16: rows->f16_from_f32(dim, in, (uint16_t *)(void *)numbers); break;
    case KVL_KV_BF16: rows->bf16_from_f32(dim, in, (uint16_t *)(void *)numbers); break;
    case KVL_KV_INT8: encode_int8(rows, dim, in, numbers, to->scales + group * SCALE_BYTES); break;
    }
}

static void decode_row(const kvl_codec_rows *rows, const matrix *from, size_t group, float *out)
{
    const uint32_t dim = from->dim;
    const uint8_t *numbers = from->numbers + group * dim * (size_t)number_bytes(from->dtype);
    switch (from->dtype) {
    case KVL_KV_F32: memcpy(out, numbers, dim * sizeof *out); break;
    case KVL_KV_F16: rows->f32_from_f16(dim, (const uint16_t *)(const void *)numbers, out); break;
    case KVL_KV_BF16: rows->f32_from_bf16(dim, (const uint16_t *)(const void *)numbers, out); break;
    case KVL_KV_INT8: {
        uint16_t half;
        float scale;
        memcpy(&half, from->scales + group * SCALE_BYTES, sizeof half);
        rows->f32_from_f16(1, &half, &scale);
        rows->f32_from_int8(dim, (const int8_t *)numbers, scale, out);
        break;
    }
    }
}

static void encode_matrix(const matrix *to, const float *in)
{
    const kvl_codec_rows *rows = rows_best();
    for (size_t t = 0; t < to->n_tokens; t++) {
        for (size_t h = 0; h < to->n_heads; h++) {
            encode_row(rows, to, h * to->n_tokens + t, in);
            in += to->dim;
        }
    }
}

static void decode_matrix(const matrix *from, uint32_t token_first, uint32_t n, float *out)
{
    const kvl_codec_rows *rows = rows_best();
    for (size_t t = token_first; t < (size_t)token_first + n; t++) {
        for (size_t h = 0; h < from->n_heads; h++) {
            decode_row(rows, from, h * from->n_tokens + t, out);
            out += from->dim;
        }
    }
}

void kvl_segment_encode_block(kvl_kv_dtype dtype, uint32_t n_kv_heads, uint32_t n_tokens,
                              uint32_t head_dim, const float *keys, const float *values,
                              void *block)
{
    const matrix to_keys = matrix_of(dtype, n_kv_heads, n_tokens, head_dim, block, false);
    const matrix to_values = matrix_of(dtype, n_kv_heads, n_tokens, head_dim, block, true);
    encode_matrix(&to_keys, keys);
    encode_matrix(&to_values, values);
}

void kvl_segment_decode_block(kvl_kv_dtype dtype, uint32_t n_kv_heads, uint32_t n_tokens,
                              uint32_t head_dim, const void *block, uint32_t token_first,
                              uint32_t n, float *keys, float *values)
{
    KVL_ASSERT(token_first <= n_tokens && n <= n_tokens - token_first);
    const matrix from_keys = matrix_of(dtype, n_kv_heads, n_tokens, head_dim, block, false);
    const matrix from_values = matrix_of(dtype, n_kv_heads, n_tokens, head_dim, block, true);
    if (keys != NULL) decode_matrix(&from_keys, token_first, n, keys);
    if (values != NULL) decode_matrix(&from_values, token_first, n, values);
}
