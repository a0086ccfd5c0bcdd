/* compute/cpu/variant_matmul.c: products with weights, few rows and many, and dequantisation.
 *
 * Both kinds of product are made of scalar products along the inputs, the order of which
 * kernels.h fixes, so that a row's result is the same in a batch of any size.
 *   few   streams quantised weights through registers once: bound by memory
 *   many  multiplies a panel of dequantised weights that stays in cache: bound by arithmetic. The
 *         panel is cut into tiles of TILE_ROWS x 4 sums that stay in registers.
 * Error    each sum is within (run / KVL_LANES + log2(KVL_LANES) + number of runs + 1) roundings,
 *          relative to the sum of absolute products. */
#include "compute/cpu/expand.h"
#include "compute/cpu/kernels.h"

/* Rows of a tile: as many sums as the registers hold, beside one vector for each row. */
#if defined(KVL_VARIANT_avx512)
#define TILE_ROWS 4u
#elif defined(KVL_VARIANT_avx2)
#define TILE_ROWS 3u
#else
#define TILE_ROWS 2u
#endif
#define TILE_OUTPUTS 4u

/* Outputs that one row takes together. Eight chains of additions hide the latency of one. */
#define FEW_OUTPUTS 8u
#define FEW_ROWS 2u

/* How far dequantisation asks ahead, in bytes: it reads one row after the other. */
#define DEQUANTISE_AHEAD 2048u

/* Sanitizers add code to every step, and compilers then take minutes for the unrolled loops. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define UNROLL _Pragma("GCC unroll 1")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

typedef float four_floats __attribute__((vector_size(16), may_alias));

/* Asks for what the next steps will read; that may not be there, which does no harm. */
KVL_INLINE void fetch_ahead(const uint8_t *from, uint32_t n_bytes, bool to_first_level)
{
    UNROLL for (uint32_t at = 0; at < n_bytes; at += 64)
    {
        if (to_first_level)
            __builtin_prefetch(from + at, 0, 3);
        else
            __builtin_prefetch(from + at, 0, 2);
    }
}

/* ---- sums of lanes ---- */

/* The sums of four vectors, each added up exactly as kvl_vec_sum does. */
KVL_INLINE four_floats sum_four(kvl_vec a, kvl_vec b, kvl_vec c, kvl_vec d)
{
#if defined(KVL_VARIANT_avx512)
    /* Quarters 0 and 1 of each plus quarters 2 and 3, then even plus odd: a quarter an output. */
    const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xEE);
    const __m512 cd = _mm512_shuffle_f32x4(c, d, 0x44) + _mm512_shuffle_f32x4(c, d, 0xEE);
    __m512 all = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xDD);
    all += _mm512_permute_ps(all, 0x4E);
    all += _mm512_permute_ps(all, 0xB1);
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    return (four_floats)_mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, all));
#elif defined(KVL_VARIANT_avx2)
    const __m256 ab = _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
    const __m256 cd = _mm256_permute2f128_ps(c, d, 0x20) + _mm256_permute2f128_ps(c, d, 0x31);
    const __m256 half = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xEE);
    const __m256 all = _mm256_shuffle_ps(half, half, 0x88) + _mm256_shuffle_ps(half, half, 0xDD);
    return (four_floats)_mm_unpacklo_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
    const kvl_vec ab =
        __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    const kvl_vec cd =
        __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
    return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) +
           __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
#endif
}

/* Stores the first n <= 4 sums, added to y where wanted. */
KVL_INLINE void store_four(four_floats sums, uint32_t n, bool add, float *y)
{
    if (n == 4) {
        four_floats before;
        memcpy(&before, y, sizeof before);
        if (add) sums += before;
        memcpy(y, &sums, sizeof sums);
        return;
    }
    for (uint32_t i = 0; i < n; i++) y[i] = add ? sums[i] + y[i] : sums[i];
}

KVL_INLINE uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* ---- many rows ---- */

/* n_rows x 4 sums over the run; n_rows is a constant to the compiler. Outputs past the panel's
 * last repeat that one and are not stored. */
KVL_INLINE void multiply_tile(const kvl_cpu_panel *panel, uint32_t n_rows, uint32_t row,
                              uint32_t output)
{
    const float *x = panel->x + row * panel->x_stride;
    const uint32_t n_outputs = min_u32(panel->n_outputs - output, TILE_OUTPUTS);
    const float *w[TILE_OUTPUTS];
    kvl_vec sums[TILE_ROWS][TILE_OUTPUTS];
    UNROLL for (uint32_t o = 0; o < TILE_OUTPUTS; o++)
    {
        w[o] = panel->w + (output + min_u32(o, n_outputs - 1)) * panel->w_stride;
        UNROLL for (uint32_t r = 0; r < n_rows; r++) sums[r][o] = kvl_vec_zero();
    }
    const uint32_t n_whole = panel->n_inputs / KVL_LANES * KVL_LANES;
    kvl_vec inputs[TILE_ROWS];
    for (uint32_t k = 0; k < n_whole; k += KVL_LANES) {
        UNROLL for (uint32_t r = 0; r < n_rows; r++) inputs[r] =
            kvl_vec_load(x + r * panel->x_stride + k);
        UNROLL for (uint32_t o = 0; o < TILE_OUTPUTS; o++)
        {
            const kvl_vec weights = kvl_vec_load(w[o] + k);
            UNROLL for (uint32_t r = 0; r < n_rows; r++) sums[r][o] =
                kvl_vec_fma(weights, inputs[r], sums[r][o]);
        }
    }
    if (n_whole < panel->n_inputs) {
        UNROLL for (uint32_t r = 0; r < n_rows; r++)
        {
            inputs[r] =
                kvl_vec_load_some(x + r * panel->x_stride + n_whole, panel->n_inputs - n_whole);
            UNROLL for (uint32_t o = 0; o < TILE_OUTPUTS; o++) sums[r][o] =
                kvl_vec_fma(kvl_vec_load(w[o] + n_whole), inputs[r], sums[r][o]);
        }
    }
    float *y = panel->y + row * panel->y_stride + output;
    UNROLL for (uint32_t r = 0; r < n_rows; r++)
        store_four(sum_four(sums[r][0], sums[r][1], sums[r][2], sums[r][3]), n_outputs, panel->add,
                   y + r * panel->y_stride);
}

/* Four weight rows stay in the first-level cache while all rows of x pass. */
static void multiply(const kvl_cpu_panel *panel)
{
    for (uint32_t output = 0; output < panel->n_outputs; output += TILE_OUTPUTS) {
        uint32_t row = 0;
        for (; row + TILE_ROWS <= panel->n_rows; row += TILE_ROWS)
            multiply_tile(panel, TILE_ROWS, row, output);
        /* The compiler needs a constant: each case is a tile of its own. */
        const uint32_t n_rest = panel->n_rows - row;
        if (TILE_ROWS > 3 && n_rest == 3) multiply_tile(panel, TILE_ROWS - 1, row, output);
        if (TILE_ROWS > 2 && n_rest == 2) multiply_tile(panel, 2, row, output);
        if (n_rest == 1) multiply_tile(panel, 1, row, output);
    }
}

/* ---- few rows ---- */

/* Adds one block of n_outputs weight rows times n_rows inputs; both are constants. */
KVL_INLINE void few_block(const kvl_format *format, uint32_t n_rows, uint32_t n_outputs,
                          const uint8_t *const *blocks, size_t block_at, const float *x,
                          size_t x_stride, kvl_vec sums[FEW_ROWS][FEW_OUTPUTS])
{
    kvl_scales scales[FEW_OUTPUTS];
    if (format->plain) {
        float halves[2 * FEW_OUTPUTS];
        prepare_plain(blocks, block_at, n_outputs, halves);
        UNROLL for (uint32_t o = 0; o < n_outputs; o++)
        {
            scales[o].scale[0] = halves[2 * o];
            scales[o].min[0] = halves[2 * o + 1];
        }
    } else {
        UNROLL for (uint32_t o = 0; o < n_outputs; o++)
            format->prepare(blocks[o] + block_at, &scales[o]);
    }
    UNROLL for (uint32_t unit = 0; unit < format->n_units; unit++)
    {
        const float *inputs = x + unit * KVL_UNIT_WEIGHTS;
        UNROLL for (uint32_t o = 0; o < n_outputs; o++)
        {
            kvl_vec w[KVL_UNIT_VECTORS];
            format->expand(blocks[o] + block_at, &scales[o], unit, w);
            UNROLL for (uint32_t v = 0; v < KVL_UNIT_VECTORS; v++)
            {
                UNROLL for (uint32_t r = 0; r < n_rows; r++) sums[r][o] = kvl_vec_fma(
                    w[v], kvl_vec_load(inputs + r * x_stride + v * KVL_LANES), sums[r][o]);
            }
        }
    }
}

/* The inputs behind the last whole block, where a block is one weight (F32, F16, BF16): both sides
 * are filled up with zeros, which add nothing. */
KVL_INLINE void few_rest(const kvl_format *format, uint32_t n_rows, uint32_t n_outputs,
                         const uint8_t *const *rows, size_t rest_at, uint32_t n_rest,
                         const float *x, size_t x_stride, kvl_vec sums[FEW_ROWS][FEW_OUTPUTS])
{
    float inputs[FEW_ROWS * KVL_UNIT_WEIGHTS] = {0};
    uint8_t weights[FEW_OUTPUTS][KVL_UNIT_WEIGHTS * sizeof(float)] = {{0}};
    const uint8_t *blocks[FEW_OUTPUTS];
    for (uint32_t r = 0; r < n_rows; r++)
        memcpy(inputs + r * KVL_UNIT_WEIGHTS, x + r * x_stride, n_rest * sizeof(float));
    for (uint32_t o = 0; o < n_outputs; o++) {
        memcpy(weights[o], rows[o] + rest_at, format->n_bytes / KVL_UNIT_WEIGHTS * n_rest);
        blocks[o] = weights[o];
    }
    few_block(format, n_rows, n_outputs, blocks, 0, inputs, KVL_UNIT_WEIGHTS, sums);
}

/* n_rows x n_outputs sums over all runs. Outputs past the part's last repeat that one. */
KVL_INLINE void few_tile(const kvl_format *format, const kvl_cpu_few_part *part, uint32_t n_rows,
                         uint32_t n_outputs, uint32_t row, uint32_t output)
{
    const kvl_matrix *weights = part->weights;
    const uint32_t n_inputs = weights->n_inputs;
    const uint32_t block_weights = format->n_units * KVL_UNIT_WEIGHTS;
    const uint32_t n_there = min_u32(part->output_past - output, n_outputs);
    const uint32_t run_inputs = kvl_cpu_run_inputs(n_inputs);
    const float *x = part->x + (size_t)row * n_inputs;
    const uint8_t *rows[FEW_OUTPUTS];
    UNROLL for (uint32_t o = 0; o < n_outputs; o++) rows[o] =
        (const uint8_t *)weights->data + (output + min_u32(o, n_there - 1)) * weights->row_bytes;
    /* Rows of weights are short and several are read at once: too much for the prefetcher of the
     * processor. But the rows of the next tile follow in memory, so while a tile is worked on, as
     * many bytes of those are asked for (Zen 4, one thread, Q4_1: from 4.5 to 11 GB/s). A tile of
     * floats would push too much out of the first-level cache. */
    const uint8_t *ahead = rows[0] + n_outputs * weights->row_bytes;
    const bool quantised = format->n_units > 1 || format->n_bytes < 2 * KVL_UNIT_WEIGHTS;
    size_t at = 0; /* bytes into each row */
    for (uint32_t first = 0; first < n_inputs; first += run_inputs) {
        const uint32_t past = min_u32(n_inputs - first, run_inputs) + first;
        kvl_vec sums[FEW_ROWS][FEW_OUTPUTS];
        UNROLL for (uint32_t o = 0; o < n_outputs; o++)
        {
            UNROLL for (uint32_t r = 0; r < n_rows; r++) sums[r][o] = kvl_vec_zero();
        }
        uint32_t k = first;
        for (; k + block_weights <= past; k += block_weights, at += format->n_bytes) {
            fetch_ahead(ahead + at * n_outputs, n_outputs * format->n_bytes, quantised);
            few_block(format, n_rows, n_outputs, rows, at, x + k, n_inputs, sums);
        }
        if (format->n_units == 1 && k < past)
            few_rest(format, n_rows, n_outputs, rows, at, past - k, x + k, n_inputs, sums);
        for (uint32_t r = 0; r < n_rows; r++) {
            float *y = part->y + (size_t)(row + r) * weights->n_outputs + output;
            UNROLL for (uint32_t o = 0; o < n_outputs; o += 4)
            {
                if (o < n_there)
                    store_four(sum_four(sums[r][o], sums[r][o + 1], sums[r][o + 2], sums[r][o + 3]),
                               min_u32(n_there - o, 4), part->add || first > 0, y + o);
            }
        }
    }
}

KVL_INLINE void few(const kvl_format *format, const kvl_cpu_few_part *part)
{
    uint32_t row = 0;
    for (; row + 2 <= part->n_rows; row += 2) {
        for (uint32_t output = part->output_first; output < part->output_past; output += 4)
            few_tile(format, part, 2, 4, row, output);
    }
    if (row == part->n_rows) return;
    for (uint32_t output = part->output_first; output < part->output_past; output += FEW_OUTPUTS)
        few_tile(format, part, 1, FEW_OUTPUTS, row, output);
}

/* ---- dequantisation ---- */

KVL_INLINE void dequantise_block(const kvl_format *format, const uint8_t *block, float *out)
{
    kvl_scales scales;
    format->prepare(block, &scales);
    UNROLL for (uint32_t unit = 0; unit < format->n_units; unit++)
    {
        kvl_vec w[KVL_UNIT_VECTORS];
        format->expand(block, &scales, unit, w);
        UNROLL for (uint32_t v = 0; v < KVL_UNIT_VECTORS; v++)
            kvl_vec_store(out + unit * KVL_UNIT_WEIGHTS + v * KVL_LANES, w[v]);
    }
}

KVL_INLINE void dequantise(const kvl_format *format, size_t n, const uint8_t *weights, float *out)
{
    const size_t block_weights = format->n_units * (size_t)KVL_UNIT_WEIGHTS;
    for (; n >= block_weights; n -= block_weights) {
        fetch_ahead(weights + DEQUANTISE_AHEAD, format->n_bytes, true);
        dequantise_block(format, weights, out);
        weights += format->n_bytes;
        out += block_weights;
    }
    if (n == 0 || format->n_units > 1) return;
    uint8_t block[KVL_UNIT_WEIGHTS * sizeof(float)] = {0};
    float rest[KVL_UNIT_WEIGHTS];
    memcpy(block, weights, format->n_bytes / KVL_UNIT_WEIGHTS * n);
    dequantise_block(format, block, rest);
    memcpy(out, rest, n * sizeof(float));
}

/* One function of each kind for each dtype: with a constant format everything above unrolls. */
#define KVL_FORMAT_FUNCTIONS(name, units, bytes, plain, prepare_block, expand_unit)                \
    static const kvl_format format_##name = {units, bytes, plain, prepare_block, expand_unit};     \
    static void few_##name(const kvl_cpu_few_part *part)                                           \
    {                                                                                              \
        few(&format_##name, part);                                                                 \
    }                                                                                              \
    static void dequantise_##name(size_t n, const void *weights, float *out)                       \
    {                                                                                              \
        dequantise(&format_##name, n, weights, out);                                               \
    }
KVL_FORMAT_LIST(KVL_FORMAT_FUNCTIONS)

const kvl_cpu_matmul_kernels *KVL_VARIANT_NAME(kvl_cpu_matmul)(void)
{
    static const kvl_cpu_matmul_kernels kernels = {
        .dequantise =
            {
#define KVL_FORMAT_DEQUANTISE(name, units, bytes, plain, prepare_block, expand_unit)               \
    [KVL_DTYPE_##name] = dequantise_##name,
                KVL_FORMAT_LIST(KVL_FORMAT_DEQUANTISE)},
        .few =
            {
#define KVL_FORMAT_FEW(name, units, bytes, plain, prepare_block, expand_unit)                      \
    [KVL_DTYPE_##name] = few_##name,
                KVL_FORMAT_LIST(KVL_FORMAT_FEW)},
        .multiply = multiply,
    };
    return &kernels;
}
