/* cuda/operations_kernel.cu: see operations.h. */
#include "cuda/operations.h"

#include <cuda_bf16.h>

namespace kvl
{

constexpr int THREADS = 256;
constexpr int WARP = 32;

static uint32_t blocks_for(size_t n)
{
    const size_t wanted = (n + THREADS - 1) / THREADS;
    return wanted < 8192 ? (uint32_t)wanted : 8192;
}

#define KVL_FOR_EACH(i, n)                                                                         \
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < (n);                        \
         i += (size_t)gridDim.x * blockDim.x)

__global__ void copy_words(size_t n, const uint32_t *from, uint32_t *to)
{
    KVL_FOR_EACH(i, n) to[i] = from[i];
}

__global__ void narrow(size_t n, const float *from, __nv_bfloat16 *to)
{
    KVL_FOR_EACH(i, n) to[i] = __float2bfloat16(from[i]);
}

__global__ void narrow_four(size_t n, const float4 *from, uint2 *to)
{
    KVL_FOR_EACH(i, n)
    {
        const float4 v = from[i];
        const __nv_bfloat162 low = __floats2bfloat162_rn(v.x, v.y);
        const __nv_bfloat162 high = __floats2bfloat162_rn(v.z, v.w);
        to[i] = make_uint2(*(const uint32_t *)&low, *(const uint32_t *)&high);
    }
}

__global__ void set_bias(size_t n, uint32_t width, const float *bias, int add, float *y)
{
    KVL_FOR_EACH(i, n) y[i] = (add ? y[i] : 0.0f) + bias[i % width];
}

__global__ void __launch_bounds__(THREADS)
    rms_norm(uint32_t width, const float *x, const float *weight, float epsilon, float *y,
             __nv_bfloat16 *rounded)
{
    __shared__ float sums[THREADS / WARP];
    const float *row = x + (size_t)blockIdx.x * width;
    float *out = y + (size_t)blockIdx.x * width;
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) sum = fmaf(row[i], row[i], sum);
    for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int i = 0; i < THREADS / WARP; i++) sum += sums[i];
    const float scale = rsqrtf(sum / (float)width + epsilon);
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) {
        const float number = row[i] * scale * weight[i];
        out[i] = number;
        rounded[(size_t)blockIdx.x * width + i] = __float2bfloat16(number);
    }
}

/* A thread: one pair of one head of one row. */
__global__ void rotate_rows(const kvl_cuda_rotation r, size_t n, uint32_t n_heads,
                            uint32_t head_dim, const uint32_t *positions, float *rows)
{
    const uint32_t half = r.rotary_dim / 2;
    KVL_FOR_EACH(i, n)
    {
        const uint32_t j = (uint32_t)(i % half);
        const size_t head = i / half; /* of all rows */
        const size_t at = (size_t)positions[head / n_heads] * half + j;
        float *x = rows + head * head_dim + (r.halves ? j : 2 * j);
        float *y = x + (r.halves ? half : 1);
        const float c = r.cosines[at];
        const float s = r.sines[at];
        const float was = *x;
        *x = was * c - *y * s;
        *y = was * s + *y * c;
    }
}

__global__ void silu_multiply(size_t n, float *gate, const float *up, __nv_bfloat16 *rounded)
{
    KVL_FOR_EACH(i, n)
    {
        const float g = gate[i];
        const float number = g / (1.0f + __expf(-g)) * up[i];
        gate[i] = number;
        rounded[i] = __float2bfloat16(number);
    }
}

__global__ void embed(uint32_t width, const uint32_t *ids, const __nv_bfloat16 *table, float *out)
{
    const __nv_bfloat16 *row = table + (size_t)ids[blockIdx.x] * width;
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x)
        out[(size_t)blockIdx.x * width + i] = __bfloat162float(row[i]);
}

__global__ void gather_rows(uint32_t width, const uint32_t *from, const float *rows, float *out)
{
    const float *row = rows + (size_t)from[blockIdx.x] * width;
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x)
        out[(size_t)blockIdx.x * width + i] = row[i];
}

/* A thread: 8 dimensions of one head of one row; heads of values come after those of keys. */
struct Place {
    size_t page; /* chunk of 16 bytes in the pages */
    size_t row;  /* number in the rows */
    bool is_key;
};

__device__ __forceinline__ Place place_of(size_t i, uint32_t n_kv_heads, uint32_t head_dim,
                                          const uint32_t *slots)
{
    const uint32_t chunks = head_dim / 8;
    const uint32_t chunk = (uint32_t)(i % chunks);
    const uint32_t head = (uint32_t)(i / chunks % (2 * n_kv_heads));
    const size_t row = i / chunks / (2 * n_kv_heads);
    const uint32_t slot = slots[row];
    const size_t head_chunks = (size_t)KVL_CUDA_PAGE_TOKENS * chunks;
    Place p;
    p.page = ((size_t)(slot / KVL_CUDA_PAGE_TOKENS) * 2 * n_kv_heads + head) * head_chunks +
             (slot % KVL_CUDA_PAGE_TOKENS / 8 * chunks + chunk) * 8 + slot % 8;
    p.row = (row * n_kv_heads + head % n_kv_heads) * head_dim + chunk * 8;
    p.is_key = head < n_kv_heads;
    return p;
}

__global__ void pages_write(size_t n, uint32_t n_kv_heads, uint32_t head_dim, const uint32_t *slots,
                            const float *keys, const float *values, uint4 *pages)
{
    KVL_FOR_EACH(i, n)
    {
        const Place p = place_of(i, n_kv_heads, head_dim, slots);
        const float4 *from = (const float4 *)((p.is_key ? keys : values) + p.row);
        const float4 low = from[0];
        const float4 high = from[1];
        const __nv_bfloat162 packed[4] = {
            __floats2bfloat162_rn(low.x, low.y), __floats2bfloat162_rn(low.z, low.w),
            __floats2bfloat162_rn(high.x, high.y), __floats2bfloat162_rn(high.z, high.w)};
        pages[p.page] = *(const uint4 *)packed;
    }
}

__global__ void pages_read(size_t n, uint32_t n_kv_heads, uint32_t head_dim, const uint32_t *slots,
                           float *keys, float *values, const uint4 *pages)
{
    KVL_FOR_EACH(i, n)
    {
        const Place p = place_of(i, n_kv_heads, head_dim, slots);
        const uint4 packed = pages[p.page];
        const __nv_bfloat162 *pairs = (const __nv_bfloat162 *)&packed;
        float2 *to = (float2 *)((p.is_key ? keys : values) + p.row);
        for (int k = 0; k < 4; k++) to[k] = __bfloat1622float2(pairs[k]);
    }
}

} // namespace kvl

using namespace kvl;

extern "C" cudaError_t kvl_cuda_copy_words(size_t n, const uint32_t *from, uint32_t *to,
                                           cudaStream_t stream)
{
    if (n == 0) return cudaSuccess;
    copy_words<<<blocks_for(n), THREADS, 0, stream>>>(n, from, to);
    return cudaGetLastError();
}

extern "C" cudaError_t kvl_cuda_narrow(size_t n, const float *from, void *to, cudaStream_t stream)
{
    if (n == 0) return cudaSuccess;
    if (n % 4 == 0)
        narrow_four<<<blocks_for(n / 4), THREADS, 0, stream>>>(n / 4, (const float4 *)from,
                                                               (uint2 *)to);
    else
        narrow<<<blocks_for(n), THREADS, 0, stream>>>(n, from, (__nv_bfloat16 *)to);
    return cudaGetLastError();
}

extern "C" cudaError_t kvl_cuda_bias(uint32_t n_rows, uint32_t width, const float *bias, int add,
                                     float *y, cudaStream_t stream)
{
    const size_t n = (size_t)n_rows * width;
    if (n == 0) return cudaSuccess;
    set_bias<<<blocks_for(n), THREADS, 0, stream>>>(n, width, bias, add, y);
    return cudaGetLastError();
}

extern "C" cudaError_t kvl_cuda_rms_norm(uint32_t n_rows, uint32_t width, const float *x,
                                         const float *weight, float epsilon, float *y,
                                         void *rounded, cudaStream_t stream)
{
    if (n_rows == 0) return cudaSuccess;
    rms_norm<<<n_rows, THREADS, 0, stream>>>(width, x, weight, epsilon, y,
                                             (__nv_bfloat16 *)rounded);
    return cudaGetLastError();
}

extern "C" cudaError_t kvl_cuda_rotate(const kvl_cuda_rotation *rotation, uint32_t n_rows,
                                       const uint32_t *positions, uint32_t n_heads,
                                       uint32_t head_dim, float *rows, cudaStream_t stream)
{
    const size_t n = (size_t)n_rows * n_heads * (rotation->rotary_dim / 2);
    if (n == 0) return cudaSuccess;
    rotate_rows<<<blocks_for(n), THREADS, 0, stream>>>(*rotation, n, n_heads, head_dim, positions,
                                                       rows);
    return cudaGetLastError();
}

extern "C" cudaError_t kvl_cuda_silu_multiply(size_t n, float *gate, const float *up, void *rounded,
                                              cudaStream_t stream)
{
    if (n == 0) return cudaSuccess;
    silu_multiply<<<blocks_for(n), THREADS, 0, stream>>>(n, gate, up, (__nv_bfloat16 *)rounded);
    return cudaGetLastError();
}

extern "C" cudaError_t kvl_cuda_embed(uint32_t n_rows, uint32_t width, const uint32_t *ids,
                                      const void *table, float *out, cudaStream_t stream)
{
    if (n_rows == 0) return cudaSuccess;
    embed<<<n_rows, THREADS, 0, stream>>>(width, ids, (const __nv_bfloat16 *)table, out);
    return cudaGetLastError();
}

extern "C" cudaError_t kvl_cuda_gather_rows(uint32_t n_rows, uint32_t width, const uint32_t *from,
                                            const float *rows, float *out, cudaStream_t stream)
{
    if (n_rows == 0) return cudaSuccess;
    gather_rows<<<n_rows, THREADS, 0, stream>>>(width, from, rows, out);
    return cudaGetLastError();
}

extern "C" cudaError_t kvl_cuda_pages_write(uint32_t n_rows, uint32_t n_kv_heads, uint32_t head_dim,
                                            const uint32_t *slots, const float *keys,
                                            const float *values, void *pages, cudaStream_t stream)
{
    const size_t n = (size_t)n_rows * 2 * n_kv_heads * (head_dim / 8);
    if (n == 0) return cudaSuccess;
    pages_write<<<blocks_for(n), THREADS, 0, stream>>>(n, n_kv_heads, head_dim, slots, keys, values,
                                                       (uint4 *)pages);
    return cudaGetLastError();
}

extern "C" cudaError_t kvl_cuda_pages_read(uint32_t n_rows, uint32_t n_kv_heads, uint32_t head_dim,
                                           const uint32_t *slots, float *keys, float *values,
                                           const void *pages, cudaStream_t stream)
{
    const size_t n = (size_t)n_rows * 2 * n_kv_heads * (head_dim / 8);
    if (n == 0) return cudaSuccess;
    pages_read<<<blocks_for(n), THREADS, 0, stream>>>(n, n_kv_heads, head_dim, slots, keys, values,
                                                      (const uint4 *)pages);
    return cudaGetLastError();
}
