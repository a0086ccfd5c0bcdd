/* reuse/anchor_kernel.c: distances to stored rows and weighted sums of them.
 * Method  The two loops of the default mode exist three times: plain C, AVX2 and AVX-512, chosen at
 *         run time. They stream one anchor at a time over a tile of tokens, so that the processor
 *         prefetches a few long streams and the sums stay in the first-level cache. The loops of
 *         the paper's mode, which is there for replication, are plain C over decoded groups. */
#include "reuse/anchor_kernel.h"

#include <math.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { LANES = 16 };

/* float16 that is finite and not negative: its bits, moved to where a float has them, are 2^-112 of
 * the value, and that holds for subnormal numbers too. */
static inline float scale_at(const uint8_t *scales, size_t index)
{
    uint16_t half;
    memcpy(&half, scales + 2 * index, sizeof half);
    const uint32_t bits = (uint32_t)(half & 0x7fffU) << 13;
    float scaled;
    memcpy(&scaled, &bits, sizeof scaled);
    return scaled * 0x1p112F;
}

static inline float float_at(const uint8_t *numbers, size_t index)
{
    float number;
    memcpy(&number, numbers + sizeof number * index, sizeof number);
    return number;
}

static inline float int8_at(const uint8_t *numbers, size_t index)
{
    return (float)(int8_t)numbers[index];
}

static inline float lanes_sum(const float *lanes)
{
    float sum = 0.0F;
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}

static float squares_portable(uint32_t n_groups, uint32_t dim, const uint8_t *numbers,
                              const uint8_t *scales, const float *x)
{
    float lanes[LANES] = {0};
    for (uint32_t g = 0; g < n_groups; g++) {
        const float scale = scale_at(scales, g);
        for (uint32_t d = 0; d < dim; d++) {
            const size_t i = (size_t)g * dim + d;
            const float e = x[i] - scale * int8_at(numbers, i);
            lanes[d % LANES] += e * e;
        }
    }
    return lanes_sum(lanes);
}

static void add_portable(uint32_t n_rows, uint32_t n_groups, uint32_t dim, const uint8_t *numbers,
                         const uint8_t *scales, const float *weights, float *out)
{
    for (uint32_t r = 0; r < n_rows; r++) {
        for (uint32_t g = 0; g < n_groups; g++) {
            const size_t group = (size_t)r * n_groups + g;
            const float factor = weights[r] * scale_at(scales, group);
            const uint8_t *q = numbers + group * dim;
            float *y = out + group * dim;
            for (uint32_t d = 0; d < dim; d++) y[d] += factor * int8_at(q, d);
        }
    }
}

static void load_portable(uint32_t dim, const uint8_t *numbers, float scale, float *x)
{
    for (uint32_t d = 0; d < dim; d++) x[d] = scale * int8_at(numbers, d);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static inline __m256 load8_avx2(const uint8_t *q)
{
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)q)));
}

__attribute__((target("avx2,fma"))) static float squares_avx2(uint32_t n_groups, uint32_t dim,
                                                              const uint8_t *numbers,
                                                              const uint8_t *scales, const float *x)
{
    __m256 low = _mm256_setzero_ps();
    __m256 high = _mm256_setzero_ps();
    float rest = 0.0F;
    for (uint32_t g = 0; g < n_groups; g++, numbers += dim, x += dim) {
        const float scale = scale_at(scales, g);
        const __m256 scale8 = _mm256_set1_ps(scale);
        uint32_t d = 0;
        for (; d + LANES <= dim; d += LANES) {
            const __m256 e =
                _mm256_fnmadd_ps(scale8, load8_avx2(numbers + d), _mm256_loadu_ps(x + d));
            const __m256 f =
                _mm256_fnmadd_ps(scale8, load8_avx2(numbers + d + 8), _mm256_loadu_ps(x + d + 8));
            low = _mm256_fmadd_ps(e, e, low);
            high = _mm256_fmadd_ps(f, f, high);
        }
        for (; d < dim; d++) {
            const float e = x[d] - scale * int8_at(numbers, d);
            rest += e * e;
        }
    }
    float lanes[LANES];
    _mm256_storeu_ps(lanes, low);
    _mm256_storeu_ps(lanes + 8, high);
    return lanes_sum(lanes) + rest;
}

__attribute__((target("avx2,fma"))) static void add_avx2(uint32_t n_rows, uint32_t n_groups,
                                                         uint32_t dim, const uint8_t *numbers,
                                                         const uint8_t *scales,
                                                         const float *weights, float *out)
{
    for (uint32_t r = 0; r < n_rows; r++) {
        for (uint32_t g = 0; g < n_groups; g++, numbers += dim, out += dim) {
            const float factor = weights[r] * scale_at(scales, (size_t)r * n_groups + g);
            const __m256 factor8 = _mm256_set1_ps(factor);
            uint32_t d = 0;
            for (; d + 8 <= dim; d += 8) {
                const __m256 y = _mm256_loadu_ps(out + d);
                _mm256_storeu_ps(out + d, _mm256_fmadd_ps(factor8, load8_avx2(numbers + d), y));
            }
            for (; d < dim; d++) out[d] += factor * int8_at(numbers, d);
        }
    }
}

__attribute__((target("avx2,fma"))) static void load_avx2(uint32_t dim, const uint8_t *numbers,
                                                          float scale, float *x)
{
    const __m256 scale8 = _mm256_set1_ps(scale);
    uint32_t d = 0;
    for (; d + 8 <= dim; d += 8) {
        _mm256_storeu_ps(x + d, _mm256_mul_ps(scale8, load8_avx2(numbers + d)));
    }
    for (; d < dim; d++) x[d] = scale * int8_at(numbers, d);
}

__attribute__((target("avx512f"))) static inline __m512 load16_avx512(const uint8_t *q)
{
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)q)));
}

__attribute__((target("avx512f"))) static float squares_avx512(uint32_t n_groups, uint32_t dim,
                                                               const uint8_t *numbers,
                                                               const uint8_t *scales,
                                                               const float *x)
{
    __m512 sum = _mm512_setzero_ps();
    float rest = 0.0F;
    for (uint32_t g = 0; g < n_groups; g++, numbers += dim, x += dim) {
        const float scale = scale_at(scales, g);
        const __m512 scale16 = _mm512_set1_ps(scale);
        uint32_t d = 0;
        for (; d + LANES <= dim; d += LANES) {
            const __m512 e =
                _mm512_fnmadd_ps(scale16, load16_avx512(numbers + d), _mm512_loadu_ps(x + d));
            sum = _mm512_fmadd_ps(e, e, sum);
        }
        for (; d < dim; d++) {
            const float e = x[d] - scale * int8_at(numbers, d);
            rest += e * e;
        }
    }
    float lanes[LANES];
    _mm512_storeu_ps(lanes, sum);
    return lanes_sum(lanes) + rest;
}

__attribute__((target("avx512f"))) static void add_avx512(uint32_t n_rows, uint32_t n_groups,
                                                          uint32_t dim, const uint8_t *numbers,
                                                          const uint8_t *scales,
                                                          const float *weights, float *out)
{
    for (uint32_t r = 0; r < n_rows; r++) {
        for (uint32_t g = 0; g < n_groups; g++, numbers += dim, out += dim) {
            const float factor = weights[r] * scale_at(scales, (size_t)r * n_groups + g);
            const __m512 factor16 = _mm512_set1_ps(factor);
            uint32_t d = 0;
            for (; d + LANES <= dim; d += LANES) {
                const __m512 y = _mm512_loadu_ps(out + d);
                _mm512_storeu_ps(out + d, _mm512_fmadd_ps(factor16, load16_avx512(numbers + d), y));
            }
            for (; d < dim; d++) out[d] += factor * int8_at(numbers, d);
        }
    }
}
#endif

const kvl_anchor_kernels *kvl_anchor_kernels_for(kvl_cpu_variant variant)
{
    static const kvl_anchor_kernels portable = {squares_portable, add_portable, load_portable};
#if defined(__x86_64__)
    static const kvl_anchor_kernels avx2 = {squares_avx2, add_avx2, load_avx2};
    static const kvl_anchor_kernels avx512 = {squares_avx512, add_avx512, load_avx2};
    const bool has_avx512 = __builtin_cpu_supports("avx512f") != 0;
    const bool has_avx2 = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
    if (variant == KVL_CPU_AVX512 || (variant == KVL_CPU_BEST && has_avx512)) {
        return has_avx512 ? &avx512 : NULL;
    }
    if (variant == KVL_CPU_AVX2 || (variant == KVL_CPU_BEST && has_avx2)) {
        return has_avx2 ? &avx2 : NULL;
    }
#else
    if (variant == KVL_CPU_AVX512 || variant == KVL_CPU_AVX2) return NULL;
#endif
    return &portable;
}

kvl_anchor_rows kvl_anchor_rows_from(const kvl_anchor_rows *rows, size_t row, uint32_t n_groups,
                                     uint32_t dim)
{
    kvl_anchor_rows moved = *rows;
    const size_t groups = row * n_groups;
    if (rows->dtype == KVL_KV_INT8) {
        moved.numbers += groups * dim;
        moved.scales += 2 * groups;
    } else {
        moved.numbers += groups * dim * sizeof(float);
    }
    return moved;
}

kvl_anchor_rows kvl_anchor_rows_group(const kvl_anchor_rows *rows, uint32_t group, uint32_t dim)
{
    return kvl_anchor_rows_from(rows, group, 1, dim);
}

/* One group as floats, for the loops of the paper's mode. */
static void load_group(const kvl_anchor_kernels *kernels, const kvl_anchor_rows *rows, size_t group,
                       uint32_t dim, float *x)
{
    if (rows->dtype == KVL_KV_INT8) {
        kernels->load_int8(dim, rows->numbers + group * dim, scale_at(rows->scales, group), x);
    } else {
        memcpy(x, rows->numbers + group * dim * sizeof *x, dim * sizeof *x);
    }
}

float kvl_anchor_squares(const kvl_anchor_kernels *kernels, const kvl_anchor_rows *rows,
                         uint32_t n_groups, uint32_t dim, const float *x)
{
    if (rows->dtype == KVL_KV_INT8) {
        return kernels->squares_int8(n_groups, dim, rows->numbers, rows->scales, x);
    }
    float lanes[LANES] = {0};
    for (size_t i = 0; i < (size_t)n_groups * dim; i++) {
        const float e = x[i] - float_at(rows->numbers, i);
        lanes[i % LANES] += e * e;
    }
    return lanes_sum(lanes);
}

float kvl_anchor_absolutes(const kvl_anchor_kernels *kernels, const kvl_anchor_rows *rows,
                           uint32_t n_groups, uint32_t dim, const float *x)
{
    float lanes[LANES] = {0};
    float y[KVL_HEAD_DIM_MAX];
    for (uint32_t g = 0; g < n_groups; g++, x += dim) {
        load_group(kernels, rows, g, dim, y);
        size_t d = 0; /* the inner loop has a fixed length, which lets -O2 vectorise it */
        for (; d + LANES <= dim; d += LANES) {
            for (size_t j = 0; j < LANES; j++) lanes[j] += fabsf(x[d + j] - y[d + j]);
        }
        for (; d < dim; d++) lanes[0] += fabsf(x[d] - y[d]);
    }
    return lanes_sum(lanes);
}

void kvl_anchor_add_square_channels(const kvl_anchor_kernels *kernels, const kvl_anchor_rows *rows,
                                    uint32_t n_groups, uint32_t dim, const float *x, float *sums)
{
    float y[KVL_HEAD_DIM_MAX];
    for (uint32_t g = 0; g < n_groups; g++, x += dim, sums += dim) {
        load_group(kernels, rows, g, dim, y);
        size_t d = 0;
        for (; d + LANES <= dim; d += LANES) {
            for (size_t j = 0; j < LANES; j++) {
                const float e = x[d + j] - y[d + j];
                y[d + j] = e * e;
            }
            for (size_t j = 0; j < LANES; j++) sums[d + j] += y[d + j];
        }
        for (; d < dim; d++) sums[d] += (x[d] - y[d]) * (x[d] - y[d]);
    }
}

void kvl_anchor_add(const kvl_anchor_kernels *kernels, const kvl_anchor_rows *rows, uint32_t n_rows,
                    uint32_t n_groups, uint32_t dim, const float *weights, float *out)
{
    if (rows->dtype == KVL_KV_INT8) {
        kernels->add_int8(n_rows, n_groups, dim, rows->numbers, rows->scales, weights, out);
        return;
    }
    const size_t width = (size_t)n_groups * dim;
    for (uint32_t r = 0; r < n_rows; r++) {
        const uint8_t *numbers = rows->numbers + r * width * sizeof(float);
        float *y = out + r * width;
        for (size_t i = 0; i < width; i++) y[i] += weights[r] * float_at(numbers, i);
    }
}

void kvl_anchor_add_channels(const kvl_anchor_kernels *kernels, const kvl_anchor_rows *rows,
                             uint32_t n_rows, uint32_t n_groups, uint32_t dim, const float *weights,
                             float *out)
{
    float y[KVL_HEAD_DIM_MAX];
    for (uint32_t r = 0; r < n_rows; r++) {
        for (uint32_t g = 0; g < n_groups; g++, out += dim) {
            load_group(kernels, rows, (size_t)r * n_groups + g, dim, y);
            const float *of_group = weights + (size_t)g * dim;
            for (uint32_t d = 0; d < dim; d++) out[d] += of_group[d] * y[d];
        }
    }
}

void kvl_anchor_add_exact(size_t n, const uint8_t *high, const uint8_t *low, float *out)
{
    /* Where out + high cancels, the sum is exact in double; where it does not, its rounding is
     * 2^-29 of a float's: either way the float nearest to the sum is the one that was measured. */
    for (size_t i = 0; i < n; i++) {
        const double sum = (double)out[i] + (double)float_at(high, i);
        out[i] = (float)(sum + (double)float_at(low, i));
    }
}
