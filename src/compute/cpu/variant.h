/* compute/cpu/variant.h: what a family of kernels (variant_<family>.c) is written in.
 *
 * Such a file is compiled three times, as portable, avx2 and avx512. It names what others can see
 * with KVL_VARIANT_NAME and computes on kvl_vec, a vector of KVL_LANES floats. Only a variant file
 * may include this header.
 * Order    Every function has one fixed order of roundings, so a kernel gives the same bits on
 *          every run of one variant. Variants differ from each other in the last bits: lanes, and
 *          kvl_vec_fma, which rounds once with AVX2 and twice in the portable twin. */
#ifndef KVL_COMPUTE_CPU_VARIANT_H
#define KVL_COMPUTE_CPU_VARIANT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(KVL_VARIANT_avx2) || defined(KVL_VARIANT_avx512)
#include <immintrin.h>
#endif

#ifndef KVL_VARIANT
#error "variant.h is for files that are compiled once for each instruction set"
#endif

/* KVL_VARIANT_NAME(kvl_cpu_matmul) is kvl_cpu_matmul_avx2 in the AVX2 variant. */
#define KVL_VARIANT_PASTE(name, variant) name##_##variant
#define KVL_VARIANT_EXPAND(name, variant) KVL_VARIANT_PASTE(name, variant)
#define KVL_VARIANT_NAME(name) KVL_VARIANT_EXPAND(name, KVL_VARIANT)

/* For helpers that must vanish into their caller, so that constant arguments unroll loops. With a
 * sanitizer in every copy that takes compilers minutes, and speed is not the point then. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define KVL_INLINE static inline __attribute__((unused))
#else
#define KVL_INLINE static inline __attribute__((always_inline, unused))
#endif

/* kvl_vec allows + - * / and unary minus between vectors, and v[lane] for reading. */
#if defined(KVL_VARIANT_avx512)
#define KVL_LANES 16u
typedef __m512 kvl_vec;
#elif defined(KVL_VARIANT_avx2)
#define KVL_LANES 8u
typedef __m256 kvl_vec;
#else
#define KVL_LANES 4u
typedef float kvl_vec __attribute__((vector_size(16), may_alias));
#endif
typedef int32_t kvl_vec_int __attribute__((vector_size(4 * KVL_LANES), may_alias));

/* All lanes `value`. */
KVL_INLINE kvl_vec kvl_vec_all(float value)
{
#if defined(KVL_VARIANT_avx512)
    return _mm512_set1_ps(value);
#elif defined(KVL_VARIANT_avx2)
    return _mm256_set1_ps(value);
#else
    return (kvl_vec){value, value, value, value};
#endif
}

KVL_INLINE kvl_vec kvl_vec_zero(void)
{
    return kvl_vec_all(0.0F);
}

/* KVL_LANES floats from any address. */
KVL_INLINE kvl_vec kvl_vec_load(const float *from)
{
    kvl_vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

KVL_INLINE void kvl_vec_store(float *to, kvl_vec v)
{
    memcpy(to, &v, sizeof v);
}

/* The first n <= KVL_LANES floats; the other lanes are 0 and their memory is not touched. */
KVL_INLINE kvl_vec kvl_vec_load_some(const float *from, size_t n)
{
#if defined(KVL_VARIANT_avx512)
    return _mm512_maskz_loadu_ps((__mmask16)((1U << n) - 1U), from);
#else
    float lanes[KVL_LANES] = {0};
    for (size_t i = 0; i < n; i++) lanes[i] = from[i];
    return kvl_vec_load(lanes);
#endif
}

KVL_INLINE void kvl_vec_store_some(float *to, kvl_vec v, size_t n)
{
#if defined(KVL_VARIANT_avx512)
    _mm512_mask_storeu_ps(to, (__mmask16)((1U << n) - 1U), v);
#else
    for (size_t i = 0; i < n; i++) to[i] = v[i];
#endif
}

/* a * b + c */
KVL_INLINE kvl_vec kvl_vec_fma(kvl_vec a, kvl_vec b, kvl_vec c)
{
#if defined(KVL_VARIANT_avx512)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(KVL_VARIANT_avx2)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

/* The larger; where one is NaN, b. */
KVL_INLINE kvl_vec kvl_vec_max(kvl_vec a, kvl_vec b)
{
#if defined(KVL_VARIANT_avx512)
    return _mm512_max_ps(a, b);
#elif defined(KVL_VARIANT_avx2)
    return _mm256_max_ps(a, b);
#else
    const kvl_vec_int larger = a > b;
    return (kvl_vec)(((kvl_vec_int)a & larger) | ((kvl_vec_int)b & ~larger));
#endif
}

/* The smaller; where one is NaN, b. */
KVL_INLINE kvl_vec kvl_vec_min(kvl_vec a, kvl_vec b)
{
#if defined(KVL_VARIANT_avx512)
    return _mm512_min_ps(a, b);
#elif defined(KVL_VARIANT_avx2)
    return _mm256_min_ps(a, b);
#else
    const kvl_vec_int smaller = a < b;
    return (kvl_vec)(((kvl_vec_int)a & smaller) | ((kvl_vec_int)b & ~smaller));
#endif
}

/* The first n <= KVL_LANES lanes of v, `rest` in the others. */
KVL_INLINE kvl_vec kvl_vec_first(kvl_vec v, size_t n, kvl_vec rest)
{
#if defined(KVL_VARIANT_avx512)
    return _mm512_mask_mov_ps(rest, (__mmask16)((1U << n) - 1U), v);
#else
    for (size_t i = n; i < KVL_LANES; i++) v[i] = rest[i];
    return v;
#endif
}

/* Sum of the lanes: halves are added, then halves of halves. */
KVL_INLINE float kvl_vec_sum(kvl_vec v)
{
#if defined(KVL_VARIANT_avx512)
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#elif defined(KVL_VARIANT_avx2)
    const __m256 half = v;
#endif
#if defined(KVL_VARIANT_avx512) || defined(KVL_VARIANT_avx2)
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

/* The largest lane; no lane may be NaN. */
KVL_INLINE float kvl_vec_top(kvl_vec v)
{
#if defined(KVL_VARIANT_avx512)
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#elif defined(KVL_VARIANT_avx2)
    const __m256 half = v;
#endif
#if defined(KVL_VARIANT_avx512) || defined(KVL_VARIANT_avx2)
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
#else
    const float even = v[0] > v[2] ? v[0] : v[2];
    const float odd = v[1] > v[3] ? v[1] : v[3];
    return even > odd ? even : odd;
#endif
}

/* To the nearest whole number; |v| < 2^22. */
KVL_INLINE kvl_vec kvl_vec_round(kvl_vec v)
{
#if defined(KVL_VARIANT_avx512)
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(KVL_VARIANT_avx2)
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    /* Adding 1.5 * 2^23 pushes every digit behind the point out of the mantissa. */
    const kvl_vec shift = kvl_vec_all(0x1.8p23F);
    return (v + shift) - shift;
#endif
}

/* v * 2^n for whole n in [-150, 128], rounded once: subnormal results too. */
KVL_INLINE kvl_vec kvl_vec_scale(kvl_vec v, kvl_vec n)
{
#if defined(KVL_VARIANT_avx512)
    return _mm512_scalef_ps(v, n);
#else
    /* 2^n itself may not be a float: two factors are. The first product is exact. */
#if defined(KVL_VARIANT_avx2)
    const kvl_vec_int whole = (kvl_vec_int)_mm256_cvtps_epi32(n);
#else
    const kvl_vec_int whole = __builtin_convertvector(n, kvl_vec_int);
#endif
    const kvl_vec_int half = whole >> 1;
    const kvl_vec first = (kvl_vec)((half + 127) << 23);
    const kvl_vec second = (kvl_vec)((whole - half + 127) << 23);
    return v * first * second;
#endif
}

/* e^v within 2 units in the last place; 0 for -infinity, infinity above 88.73, NaN for NaN.
 * Method: v = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts (Cody and Waite); e^r by a
 * polynomial of degree 6, fitted to minimise the largest relative error (3.4e-9); then times 2^n.
 * Beyond the clamp the result is 0 or infinity anyway. */
KVL_INLINE kvl_vec kvl_vec_exp(kvl_vec v)
{
    v = kvl_vec_min(kvl_vec_all(89.0F), kvl_vec_max(kvl_vec_all(-104.0F), v));
    const kvl_vec n = kvl_vec_round(v * kvl_vec_all(1.44269504F));
    kvl_vec r = kvl_vec_fma(n, kvl_vec_all(-0x1.63p-1F), v);
    r = kvl_vec_fma(n, kvl_vec_all(2.12194440e-4F), r);
    kvl_vec tail = kvl_vec_all(0x1.6dbf64p-10F);
    tail = kvl_vec_fma(tail, r, kvl_vec_all(0x1.1240fep-7F));
    tail = kvl_vec_fma(tail, r, kvl_vec_all(0x1.555450p-5F));
    tail = kvl_vec_fma(tail, r, kvl_vec_all(0x1.555488p-3F));
    tail = kvl_vec_fma(tail, r, kvl_vec_all(0.5F));
    const kvl_vec power = kvl_vec_all(1.0F) + kvl_vec_fma(tail, r * r, r);
    return kvl_vec_scale(power, n);
}

#endif /* KVL_COMPUTE_CPU_VARIANT_H */
