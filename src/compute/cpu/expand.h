/* compute/cpu/expand.h: from blocks of quantised weights to vectors of float32, for every dtype.
 * Part of variant_matmul.c.
 *
 * Blocks   Those of GGUF; the layout of a block stands at its `expand`.
 * Error    None but one rounding: a scale has 11 significant bits, a sub-scale at most 7 and a
 * quant at most 8, so that scale * quant fits a float; only adding the minimum rounds. Every
 * variant therefore expands to the same bits, and so does anybody who multiplies before adding.
 *
 * A unit is 32 weights that stand together: KVL_UNIT_VECTORS vectors. A format says how many units
 * a block has; `prepare` reads the scales of a block once, `expand` one of its units. */
#ifndef KVL_COMPUTE_CPU_EXPAND_H
#define KVL_COMPUTE_CPU_EXPAND_H

#include "compute/cpu/variant.h"

#define KVL_UNIT_WEIGHTS 32u
#define KVL_UNIT_VECTORS (KVL_UNIT_WEIGHTS / KVL_LANES)
#define KVL_BLOCK_UNITS_MAX 8u

/* Without AVX a vector of 32 bytes has no fixed way to be passed. Nothing here is ever passed: all
 * functions vanish into their callers. */
#pragma GCC diagnostic ignored "-Wpsabi"

typedef uint8_t kvl_bytes16 __attribute__((vector_size(16)));
typedef uint8_t kvl_bytes32 __attribute__((vector_size(32)));

/* Scales and minima of the units of one block; two scales a unit where 16 weights share one. */
typedef struct kvl_scales {
    float scale[2 * KVL_BLOCK_UNITS_MAX];
    float min[KVL_BLOCK_UNITS_MAX];
} kvl_scales;

typedef struct kvl_format {
    uint32_t n_units; /* of a block */
    uint32_t n_bytes; /* of a block */
    bool plain;       /* a block begins with half scale[0] and perhaps half min[0], that is all */
    void (*prepare)(const uint8_t *block, kvl_scales *scales);
    void (*expand)(const uint8_t *block, const kvl_scales *scales, uint32_t unit, kvl_vec *w);
} kvl_format;

/* ---- pieces ---- */

KVL_INLINE uint32_t read_u32(const uint8_t *from)
{
    uint32_t bits;
    memcpy(&bits, from, sizeof bits);
    return bits;
}

/* IEEE half precision, little endian. */
KVL_INLINE float read_half(const uint8_t *from)
{
    uint16_t half;
    memcpy(&half, from, sizeof half);
#if defined(KVL_VARIANT_avx2) || defined(KVL_VARIANT_avx512)
    return _cvtsh_ss(half);
#else
    /* Exponent and mantissa move into place, the bias is put right by a multiplication: that also
     * normalises subnormal numbers. Infinity and NaN need the largest exponent again. */
    uint32_t bits = (uint32_t)(half & 0x7FFFU) << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    value *= 0x1p112F;
    memcpy(&bits, &value, sizeof bits);
    if ((half & 0x7C00U) == 0x7C00U) bits |= 0x7F800000U;
    bits |= (uint32_t)(half & 0x8000U) << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

KVL_INLINE kvl_bytes16 load_bytes16(const uint8_t *from)
{
    kvl_bytes16 bytes;
    memcpy(&bytes, from, sizeof bytes);
    return bytes;
}

KVL_INLINE kvl_bytes32 load_bytes32(const uint8_t *from)
{
    kvl_bytes32 bytes;
    memcpy(&bytes, from, sizeof bytes);
    return bytes;
}

/* 16 bytes with two quants each: the low nibbles are weights 0 to 15, the high ones 16 to 31. */
KVL_INLINE kvl_bytes32 split_nibbles(const uint8_t *from)
{
    const kvl_bytes16 both = load_bytes16(from);
    const kvl_bytes16 low = both & 15;
    const kvl_bytes16 high = both >> 4;
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                                   16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
}

/* 32 bits become 32 bytes of 0 or 16: the fifth bit of five-bit quants. */
KVL_INLINE kvl_bytes32 fifth_bits(const uint8_t *from)
{
#if defined(KVL_VARIANT_avx512)
    return (kvl_bytes32)_mm256_maskz_set1_epi8(read_u32(from), 16);
#elif defined(KVL_VARIANT_avx2)
    /* Each byte gets a copy of the byte its bit is in, then its own bit is tested. */
    const __m256i spread = _mm256_setr_epi64x(0x0000000000000000, 0x0101010101010101,
                                              0x0202020202020202, 0x0303030303030303);
    const __m256i own = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    const __m256i all = _mm256_set1_epi32((int32_t)read_u32(from));
    const __m256i bits = _mm256_and_si256(_mm256_shuffle_epi8(all, spread), own);
    return (kvl_bytes32)_mm256_and_si256(_mm256_cmpeq_epi8(bits, own), _mm256_set1_epi8(16));
#else
    const uint32_t bits = read_u32(from);
    kvl_bytes32 bytes;
    for (uint32_t i = 0; i < 32; i++) bytes[i] = (uint8_t)((bits >> i & 1U) << 4);
    return bytes;
#endif
}

/* 32 signed bytes to floats. */
KVL_INLINE void bytes_to_floats(const kvl_bytes32 *bytes, kvl_vec *w)
{
#if defined(KVL_VARIANT_avx512)
    const __m256i all = (__m256i)*bytes;
    w[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(all)));
    w[1] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(all, 1)));
#elif defined(KVL_VARIANT_avx2)
    const __m128i low = _mm256_castsi256_si128((__m256i)*bytes);
    const __m128i high = _mm256_extracti128_si256((__m256i)*bytes, 1);
    w[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low));
    w[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(low, 8)));
    w[2] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high));
    w[3] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(high, 8)));
#else
    int8_t quants[KVL_UNIT_WEIGHTS];
    float floats[KVL_UNIT_WEIGHTS];
    memcpy(quants, bytes, sizeof quants);
    for (uint32_t i = 0; i < KVL_UNIT_WEIGHTS; i++) floats[i] = (float)quants[i];
    for (uint32_t v = 0; v < KVL_UNIT_VECTORS; v++) w[v] = kvl_vec_load(floats + v * KVL_LANES);
#endif
}

/* w = scale * quant */
KVL_INLINE void scale_bytes(const kvl_bytes32 *quants, float scale, kvl_vec *w)
{
    bytes_to_floats(quants, w);
    for (uint32_t v = 0; v < KVL_UNIT_VECTORS; v++) w[v] = kvl_vec_all(scale) * w[v];
}

/* w = scale * quant + min */
KVL_INLINE void scale_and_shift_bytes(const kvl_bytes32 *quants, float scale, float min, kvl_vec *w)
{
    bytes_to_floats(quants, w);
    for (uint32_t v = 0; v < KVL_UNIT_VECTORS; v++)
        w[v] = kvl_vec_fma(kvl_vec_all(scale), w[v], kvl_vec_all(min));
}

#if defined(KVL_VARIANT_avx512)
/* Of 16 nibbles from bit `shift` of 16 bytes on: the 16 possible weights are computed once and
 * looked up, which is fewer steps than converting every nibble. The index is the low four bits. */
KVL_INLINE kvl_vec look_up_nibbles(const uint8_t *from, uint32_t shift, kvl_vec table)
{
    const __m512i bytes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)from));
    return _mm512_permutexvar_ps(shift == 0 ? bytes : _mm512_srli_epi32(bytes, 4), table);
}

/* scale * (0 .. 15 + quant_first) + min */
KVL_INLINE kvl_vec nibble_table(float scale, float quant_first, float min)
{
    const kvl_vec steps = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return kvl_vec_fma(kvl_vec_all(scale), steps + kvl_vec_all(quant_first), kvl_vec_all(min));
}
#endif

/* ---- floating point: a block is 32 weights ---- */

KVL_INLINE void prepare_nothing(const uint8_t *block, kvl_scales *scales)
{
    (void)block;
    (void)scales;
}

KVL_INLINE void expand_f32(const uint8_t *block, const kvl_scales *scales, uint32_t unit,
                           kvl_vec *w)
{
    (void)scales;
    (void)unit;
    for (uint32_t v = 0; v < KVL_UNIT_VECTORS; v++)
        w[v] = kvl_vec_load((const float *)(const void *)block + v * KVL_LANES);
}

KVL_INLINE void expand_f16(const uint8_t *block, const kvl_scales *scales, uint32_t unit,
                           kvl_vec *w)
{
    (void)scales;
    (void)unit;
    for (uint32_t v = 0; v < KVL_UNIT_VECTORS; v++) {
        const uint8_t *from = block + v * KVL_LANES * 2;
#if defined(KVL_VARIANT_avx512)
        w[v] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)from));
#elif defined(KVL_VARIANT_avx2)
        w[v] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)from));
#else
        for (uint32_t i = 0; i < KVL_LANES; i++) w[v][i] = read_half(from + i * 2);
#endif
    }
}

/* The upper half of a float32. */
KVL_INLINE void expand_bf16(const uint8_t *block, const kvl_scales *scales, uint32_t unit,
                            kvl_vec *w)
{
    (void)scales;
    (void)unit;
    for (uint32_t v = 0; v < KVL_UNIT_VECTORS; v++) {
        const uint8_t *from = block + v * KVL_LANES * 2;
#if defined(KVL_VARIANT_avx512)
        const __m512i bits =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)from));
        w[v] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
#elif defined(KVL_VARIANT_avx2)
        const __m256i bits =
            _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)from));
        w[v] = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
#else
        uint16_t upper[KVL_LANES];
        uint32_t bits[KVL_LANES];
        memcpy(upper, from, sizeof upper);
        for (uint32_t i = 0; i < KVL_LANES; i++) bits[i] = (uint32_t)upper[i] << 16;
        memcpy(&w[v], bits, sizeof bits);
#endif
    }
}

/* ---- blocks of 32 ---- */

KVL_INLINE void prepare_scale(const uint8_t *block, kvl_scales *scales)
{
    scales->scale[0] = read_half(block);
}

KVL_INLINE void prepare_scale_and_min(const uint8_t *block, kvl_scales *scales)
{
    scales->scale[0] = read_half(block);
    scales->min[0] = read_half(block + 2);
}

/* The same for four or eight blocks at once: converting numbers one by one would cost more than the
 * quants. floats [n_blocks][2]: scale and min; what stands there for a format without min is not
 * used. */
KVL_INLINE void prepare_plain(const uint8_t *const *blocks, size_t block_at, uint32_t n_blocks,
                              float *floats)
{
#if defined(KVL_VARIANT_avx2) || defined(KVL_VARIANT_avx512)
    for (uint32_t b = 0; b < n_blocks; b += 4) {
        const __m128i pairs = _mm_setr_epi32((int32_t)read_u32(blocks[b] + block_at),
                                             (int32_t)read_u32(blocks[b + 1] + block_at),
                                             (int32_t)read_u32(blocks[b + 2] + block_at),
                                             (int32_t)read_u32(blocks[b + 3] + block_at));
        _mm256_storeu_ps(floats + 2 * b, _mm256_cvtph_ps(pairs));
    }
    /* Spreading a number over a vector costs nothing when it is loaded from memory. The compiler
     * must not know what is there, or it would shuffle it out of the register instead. */
    __asm__("" : "+m"(*(float(*)[16])floats));
#else
    for (uint32_t b = 0; b < n_blocks; b++) {
        floats[2 * b] = read_half(blocks[b] + block_at);
        floats[2 * b + 1] = read_half(blocks[b] + block_at + 2);
    }
#endif
}

/* half scale, int8 quants[32] */
KVL_INLINE void expand_q8_0(const uint8_t *block, const kvl_scales *scales, uint32_t unit,
                            kvl_vec *w)
{
    (void)unit;
    const kvl_bytes32 quants = load_bytes32(block + 2);
    scale_bytes(&quants, scales->scale[0], w);
}

/* half scale, nibbles[16]; quants are 8 too high */
KVL_INLINE void expand_q4_0(const uint8_t *block, const kvl_scales *scales, uint32_t unit,
                            kvl_vec *w)
{
    (void)unit;
#if defined(KVL_VARIANT_avx512)
    const kvl_vec table = nibble_table(scales->scale[0], -8.0F, -0.0F); /* -0 adds nothing */
    w[0] = look_up_nibbles(block + 2, 0, table);
    w[1] = look_up_nibbles(block + 2, 4, table);
#else
    const kvl_bytes32 quants = split_nibbles(block + 2) - 8;
    scale_bytes(&quants, scales->scale[0], w);
#endif
}

/* half scale, half min, nibbles[16] */
KVL_INLINE void expand_q4_1(const uint8_t *block, const kvl_scales *scales, uint32_t unit,
                            kvl_vec *w)
{
    (void)unit;
#if defined(KVL_VARIANT_avx512)
    const kvl_vec table = nibble_table(scales->scale[0], 0.0F, scales->min[0]);
    w[0] = look_up_nibbles(block + 4, 0, table);
    w[1] = look_up_nibbles(block + 4, 4, table);
#else
    const kvl_bytes32 quants = split_nibbles(block + 4);
    scale_and_shift_bytes(&quants, scales->scale[0], scales->min[0], w);
#endif
}

/* half scale, 32 fifth bits, nibbles[16]; quants are 16 too high */
KVL_INLINE void expand_q5_0(const uint8_t *block, const kvl_scales *scales, uint32_t unit,
                            kvl_vec *w)
{
    (void)unit;
    const kvl_bytes32 quants = (split_nibbles(block + 6) | fifth_bits(block + 2)) - 16;
    scale_bytes(&quants, scales->scale[0], w);
}

/* half scale, half min, 32 fifth bits, nibbles[16] */
KVL_INLINE void expand_q5_1(const uint8_t *block, const kvl_scales *scales, uint32_t unit,
                            kvl_vec *w)
{
    (void)unit;
    const kvl_bytes32 quants = split_nibbles(block + 8) | fifth_bits(block + 4);
    scale_and_shift_bytes(&quants, scales->scale[0], scales->min[0], w);
}

/* ---- blocks of 256: eight units ---- */

/* to[0 .. 7] = factor * byte */
KVL_INLINE void scale_eight(uint32_t low, uint32_t high, float factor, float *to)
{
    const uint64_t bytes = (uint64_t)high << 32 | low;
#if defined(KVL_VARIANT_avx2) || defined(KVL_VARIANT_avx512)
    const __m256i eight = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
    _mm256_storeu_ps(to, _mm256_set1_ps(factor) * _mm256_cvtepi32_ps(eight));
#else
    for (uint32_t i = 0; i < 8; i++) to[i] = factor * (float)(int32_t)(bytes >> (8 * i) & 0xFFU);
#endif
}

/* Q4_K and Q5_K: half scale of scales, half scale of minima, 12 bytes with eight scales and eight
 * minima of six bits. Bytes 0-3 hold scales 0-3, bytes 4-7 minima 0-3, and both in their upper two
 * bits the top of the later four; bytes 8-11 hold the rest of those, scale low, minimum high. */
KVL_INLINE void prepare_six_bits(const uint8_t *block, kvl_scales *scales)
{
    const uint32_t a = read_u32(block + 4);
    const uint32_t b = read_u32(block + 8);
    const uint32_t c = read_u32(block + 12);
    scale_eight(a & 0x3F3F3F3FU, (c & 0x0F0F0F0FU) | (a >> 2 & 0x30303030U), read_half(block),
                scales->scale);
    scale_eight(b & 0x3F3F3F3FU, (c >> 4 & 0x0F0F0F0FU) | (b >> 2 & 0x30303030U),
                -read_half(block + 2), scales->min);
}

/* Each 32 bytes hold two units: low nibbles the even one, high nibbles the odd one. */
KVL_INLINE kvl_bytes32 nibbles_of_unit(const uint8_t *from, uint32_t unit)
{
    const kvl_bytes32 both = load_bytes32(from + 32 * (unit / 2));
    return (unit & 1U) != 0 ? both >> 4 : both & 15;
}

/* 16 bytes of scales, nibbles[128] */
KVL_INLINE void expand_q4_k(const uint8_t *block, const kvl_scales *scales, uint32_t unit,
                            kvl_vec *w)
{
#if defined(KVL_VARIANT_avx512)
    const kvl_vec table = nibble_table(scales->scale[unit], 0.0F, scales->min[unit]);
    const uint8_t *nibbles = block + 16 + 32 * (unit / 2);
    w[0] = look_up_nibbles(nibbles, 4 * (unit & 1U), table);
    w[1] = look_up_nibbles(nibbles + 16, 4 * (unit & 1U), table);
#else
    const kvl_bytes32 quants = nibbles_of_unit(block + 16, unit);
    scale_and_shift_bytes(&quants, scales->scale[unit], scales->min[unit], w);
#endif
}

/* 16 bytes of scales, fifth bits[32] (bit u of byte i is that of weight i of unit u), nibbles[128]
 */
KVL_INLINE void expand_q5_k(const uint8_t *block, const kvl_scales *scales, uint32_t unit,
                            kvl_vec *w)
{
    const kvl_bytes32 fifth = (load_bytes32(block + 16) >> (uint8_t)unit & 1) << 4;
    const kvl_bytes32 quants = nibbles_of_unit(block + 48, unit) | fifth;
    scale_and_shift_bytes(&quants, scales->scale[unit], scales->min[unit], w);
}

/* low nibbles[128], upper two bits[64], int8 scales[16] (one for 16 weights), half scale */
KVL_INLINE void prepare_q6_k(const uint8_t *block, kvl_scales *scales)
{
    const float scale = read_half(block + 208);
    int8_t steps[16];
    memcpy(steps, block + 192, sizeof steps);
    for (uint32_t i = 0; i < 16; i++) scales->scale[i] = scale * (float)steps[i];
}

/* A half block of 128 weights has 64 nibble bytes and 32 bytes of upper bits. Of its four units,
 * two share nibble bytes (units 0 and 2 the first 32 bytes) and all share the upper bits. Quants
 * are 32 too high. */
KVL_INLINE void expand_q6_k(const uint8_t *block, const kvl_scales *scales, uint32_t unit,
                            kvl_vec *w)
{
    const uint32_t half = unit / 4;
    const uint32_t quarter = unit % 4;
    const kvl_bytes32 both = load_bytes32(block + 64 * half + 32 * (quarter & 1U));
    const kvl_bytes32 low = quarter >= 2 ? both >> 4 : both & 15;
    const kvl_bytes32 upper = load_bytes32(block + 128 + 32 * half) >> (uint8_t)(2 * quarter) & 3;
    const kvl_bytes32 quants = (low | upper << 4) - 32;
    bytes_to_floats(&quants, w);
    for (uint32_t v = 0; v < KVL_UNIT_VECTORS; v++)
        w[v] = kvl_vec_all(scales->scale[2 * unit + v * KVL_LANES / 16]) * w[v];
}

/*    dtype, units a block, bytes a block, plain, prepare, expand */
#define KVL_FORMAT_LIST(X)                                                                         \
    X(F32, 1, 128, false, prepare_nothing, expand_f32)                                             \
    X(F16, 1, 64, false, prepare_nothing, expand_f16)                                              \
    X(BF16, 1, 64, false, prepare_nothing, expand_bf16)                                            \
    X(Q8_0, 1, 34, true, prepare_scale, expand_q8_0)                                               \
    X(Q4_0, 1, 18, true, prepare_scale, expand_q4_0)                                               \
    X(Q4_1, 1, 20, true, prepare_scale_and_min, expand_q4_1)                                       \
    X(Q5_0, 1, 22, true, prepare_scale, expand_q5_0)                                               \
    X(Q5_1, 1, 24, true, prepare_scale_and_min, expand_q5_1)                                       \
    X(Q4_K, 8, 144, false, prepare_six_bits, expand_q4_k)                                          \
    X(Q5_K, 8, 176, false, prepare_six_bits, expand_q5_k)                                          \
    X(Q6_K, 8, 210, false, prepare_q6_k, expand_q6_k)

#endif /* KVL_COMPUTE_CPU_EXPAND_H */
