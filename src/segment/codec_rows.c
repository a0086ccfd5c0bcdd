/* codec_rows.c: the conversions in plain C, number by number on the bits: the reference for
 * codec_rows_avx2.c, and what other processors run. */
#include "segment/codec_rows.h"

#include <string.h>

enum { INT8_MAX_STEPS = 127 };

static uint32_t bits_of(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

static uint16_t f16_of(float number)
{
    const uint32_t bits = bits_of(number);
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00 | (magnitude >> 13 & 0x3ff);
    } else if (magnitude >= 0x477ff000) { /* 65520, half way between the largest and infinity */
        half = 0x7c00;
    } else if (magnitude < 0x38800000) { /* 2^-14, the smallest normal float16 */
        /* Between 0.5 and 1 a float has steps of 2^-24, as subnormal float16 do: the addition
         * rounds for us, and the lower bits of the sum are the result. */
        half = bits_of(float_of(magnitude) + 0.5F) - 0x3f000000;
    } else {
        const uint32_t rebased = magnitude - 0x38000000;
        half = (rebased + 0xfff + (rebased >> 13 & 1)) >> 13;
    }
    return (uint16_t)(sign | half);
}

static float f32_of(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t exponent = half >> 10 & 0x1f;
    const uint32_t mantissa = half & 0x3ff;
    if (exponent == 0x1f) {
        const uint32_t quiet = mantissa == 0 ? 0 : 0x400000;
        return float_of(sign | 0x7f800000 | quiet | mantissa << 13);
    }
    if (exponent == 0) return float_of(sign | bits_of((float)mantissa * 0x1p-24F));
    return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

static void f16_from_f32(size_t n, const float *in, uint16_t *out)
{
    for (size_t i = 0; i < n; i++) out[i] = f16_of(in[i]);
}

static void f32_from_f16(size_t n, const uint16_t *in, float *out)
{
    for (size_t i = 0; i < n; i++) out[i] = f32_of(in[i]);
}

static void bf16_from_f32(size_t n, const float *in, uint16_t *out)
{
    for (size_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(in[i]);
        const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
        /* A carry out of the mantissa raises the exponent, up to infinity, which is right. */
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        out[i] = (uint16_t)(is_nan ? bits >> 16 | 0x40 : rounded);
    }
}

static void f32_from_bf16(size_t n, const uint16_t *in, float *out)
{
    for (size_t i = 0; i < n; i++) out[i] = float_of((uint32_t)in[i] << 16);
}

static uint32_t magnitude_max(size_t n, const float *in)
{
    uint32_t largest = 0;
    for (size_t i = 0; i < n; i++) {
        const uint32_t magnitude = bits_of(in[i]) & 0x7fffffff;
        if (magnitude < 0x7f800000 && magnitude > largest) largest = magnitude;
    }
    return largest;
}

static void int8_from_f32(size_t n, const float *in, float inverse, int8_t *out)
{
    for (size_t i = 0; i < n; i++) {
        float steps = in[i] * inverse;
        if (!(steps == steps)) steps = 0;
        if (steps > INT8_MAX_STEPS) steps = INT8_MAX_STEPS;
        if (steps < -INT8_MAX_STEPS) steps = -INT8_MAX_STEPS;
        /* A float near 1.5 * 2^23 has steps of 1, so the addition rounds to nearest even. */
        const float shifted = steps + 0x1.8p23F;
        out[i] = (int8_t)(shifted - 0x1.8p23F);
    }
}

static void f32_from_int8(size_t n, const int8_t *in, float scale, float *out)
{
    for (size_t i = 0; i < n; i++) out[i] = (float)in[i] * scale;
}

const kvl_codec_rows *kvl_codec_rows_portable(void)
{
    static const kvl_codec_rows rows = {
        f16_from_f32,  f32_from_f16,  bf16_from_f32, f32_from_bf16,
        magnitude_max, int8_from_f32, f32_from_int8,
    };
    return &rows;
}
