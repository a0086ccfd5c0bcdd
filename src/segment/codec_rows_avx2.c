/* codec_rows_avx2.c: eight numbers at a time; what is left of a run goes to the portable twin. */
#include "segment/codec_rows.h"

#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>
#include <pthread.h>

#define AVX2 __attribute__((target("avx2,f16c")))

enum { LANES = 8 };

static pthread_once_t detected = PTHREAD_ONCE_INIT;
static bool is_usable;

AVX2 static void f16_from_f32(size_t n, const float *in, uint16_t *out)
{
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)(void *)(out + i), halves);
    }
    kvl_codec_rows_portable()->f16_from_f32(n - i, in + i, out + i);
}

AVX2 static void f32_from_f16(size_t n, const uint16_t *in, float *out)
{
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const __m128i halves = _mm_loadu_si128((const __m128i *)(const void *)(in + i));
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(halves));
    }
    kvl_codec_rows_portable()->f32_from_f16(n - i, in + i, out + i);
}

AVX2 static __m256i magnitudes(__m256i bits)
{
    return _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
}

AVX2 static void bf16_from_f32(size_t n, const float *in, uint16_t *out)
{
    const __m256i infinity = _mm256_set1_epi32(0x7f800000);
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const __m256i bits = _mm256_loadu_si256((const __m256i *)(const void *)(in + i));
        const __m256i upper = _mm256_srli_epi32(bits, 16);
        const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
        const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
        const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
        const __m256i is_nan = _mm256_cmpgt_epi32(magnitudes(bits), infinity);
        const __m256i words = _mm256_blendv_epi8(rounded, quiet, is_nan);
        const __m128i packed =
            _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128((__m128i *)(void *)(out + i), packed);
    }
    kvl_codec_rows_portable()->bf16_from_f32(n - i, in + i, out + i);
}

AVX2 static void f32_from_bf16(size_t n, const uint16_t *in, float *out)
{
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const __m128i words = _mm_loadu_si128((const __m128i *)(const void *)(in + i));
        const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16);
        _mm256_storeu_si256((__m256i *)(void *)(out + i), bits);
    }
    kvl_codec_rows_portable()->f32_from_bf16(n - i, in + i, out + i);
}

/* Magnitudes of finite floats are in the order of their bits, so integers are compared. */
AVX2 static uint32_t magnitude_max(size_t n, const float *in)
{
    const __m256i infinity = _mm256_set1_epi32(0x7f800000);
    __m256i largest = _mm256_setzero_si256();
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const __m256i bits = _mm256_loadu_si256((const __m256i *)(const void *)(in + i));
        const __m256i magnitude = magnitudes(bits);
        const __m256i is_finite = _mm256_cmpgt_epi32(infinity, magnitude);
        largest = _mm256_max_epi32(largest, _mm256_and_si256(magnitude, is_finite));
    }
    __m128i half =
        _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    const uint32_t whole = (uint32_t)_mm_cvtsi128_si32(half);
    const uint32_t rest = kvl_codec_rows_portable()->magnitude_max(n - i, in + i);
    return whole > rest ? whole : rest;
}

AVX2 static __m256i steps_of(const float *in, __m256 inverse)
{
    __m256 steps = _mm256_mul_ps(_mm256_loadu_ps(in), inverse);
    steps = _mm256_and_ps(steps, _mm256_cmp_ps(steps, steps, _CMP_ORD_Q));
    steps = _mm256_min_ps(steps, _mm256_set1_ps(127.0F));
    steps = _mm256_max_ps(steps, _mm256_set1_ps(-127.0F));
    return _mm256_cvtps_epi32(steps);
}

AVX2 static void int8_from_f32(size_t n, const float *in, float inverse, int8_t *out)
{
    enum { STEP = 4 * LANES };
    /* Packing works within each half of a register; this puts groups of four back in order. */
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256 factor = _mm256_set1_ps(inverse);
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        const __m256i a = steps_of(in + i, factor);
        const __m256i b = steps_of(in + i + LANES, factor);
        const __m256i c = steps_of(in + i + 2 * LANES, factor);
        const __m256i d = steps_of(in + i + 3 * LANES, factor);
        const __m256i packed =
            _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
        _mm256_storeu_si256((__m256i *)(void *)(out + i),
                            _mm256_permutevar8x32_epi32(packed, order));
    }
    kvl_codec_rows_portable()->int8_from_f32(n - i, in + i, inverse, out + i);
}

AVX2 static void f32_from_int8(size_t n, const int8_t *in, float scale, float *out)
{
    const __m256 factor = _mm256_set1_ps(scale);
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)(in + i));
        const __m256 steps = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(steps, factor));
    }
    kvl_codec_rows_portable()->f32_from_int8(n - i, in + i, scale, out + i);
}

/* Not every compiler's __builtin_cpu_supports knows F16C by name. */
static bool has_f16c(void)
{
    unsigned eax, ebx, ecx = 0, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

static void detect(void)
{
    is_usable = __builtin_cpu_supports("avx2") && has_f16c();
}

const kvl_codec_rows *kvl_codec_rows_avx2(void)
{
    static const kvl_codec_rows rows = {
        f16_from_f32,  f32_from_f16,  bf16_from_f32, f32_from_bf16,
        magnitude_max, int8_from_f32, f32_from_int8,
    };
    /* cpuid leaves a virtual machine and takes a microsecond there, so it is asked once. */
    (void)pthread_once(&detected, detect);
    return is_usable ? &rows : NULL;
}

#else

const kvl_codec_rows *kvl_codec_rows_avx2(void)
{
    return NULL;
}

#endif
