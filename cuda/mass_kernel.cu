/* cuda/mass_kernel.cu: how much attention some rows give each key (operations.h). */
#include "cuda/operations.h"

#include <cuda_bf16.h>

namespace kvl
{

constexpr int THREADS = 256;
constexpr int HEAD_DIM_MAX = 256;

/* One query against one key, scaled. */
__device__ __forceinline__ float score(const kvl_cuda_mass &m, const float *query, uint32_t kv_head,
                                       uint32_t key)
{
    const uint32_t chunks = m.head_dim / 8;
    const uint32_t token = key % KVL_CUDA_PAGE_TOKENS;
    const size_t head = (size_t)m.page_ids[key / KVL_CUDA_PAGE_TOKENS] * 2 * m.n_kv_heads + kv_head;
    const uint4 *at = (const uint4 *)m.pages + head * KVL_CUDA_PAGE_TOKENS * chunks +
                      token / 8 * chunks * 8 + token % 8;
    float sum = 0.0f;
    for (uint32_t c = 0; c < chunks; c++) {
        const uint4 packed = at[c * 8];
        const __nv_bfloat162 *pairs = (const __nv_bfloat162 *)&packed;
        for (int i = 0; i < 4; i++) {
            const float2 two = __bfloat1622float2(pairs[i]);
            sum = fmaf(query[8 * c + 2 * i], two.x, sum);
            sum = fmaf(query[8 * c + 2 * i + 1], two.y, sum);
        }
    }
    return sum * rsqrtf((float)m.head_dim);
}

__device__ __forceinline__ uint32_t keys_seen(const kvl_cuda_mass &m, uint32_t row)
{
    return min(m.positions[row] + 1, m.n_keys);
}

/* A block: one query head of one row. The logarithm of the sum of its weights. */
__global__ void __launch_bounds__(THREADS) find_normalisers(const kvl_cuda_mass m)
{
    __shared__ float query[HEAD_DIM_MAX];
    __shared__ float tops[THREADS];
    __shared__ float sums[THREADS];
    const uint32_t row = blockIdx.x / m.n_heads;
    const uint32_t head = blockIdx.x % m.n_heads;
    for (uint32_t d = threadIdx.x; d < m.head_dim; d += THREADS)
        query[d] = m.queries[(size_t)blockIdx.x * m.head_dim + d];
    __syncthreads();
    const uint32_t kv_head = head / (m.n_heads / m.n_kv_heads);
    float top = -INFINITY;
    float sum = 0.0f;
    for (uint32_t key = threadIdx.x; key < keys_seen(m, row); key += THREADS) {
        const float s = score(m, query, kv_head, key);
        const float higher = fmaxf(top, s);
        sum = sum * __expf(top - higher) + __expf(s - higher);
        top = higher;
    }
    tops[threadIdx.x] = top;
    sums[threadIdx.x] = sum;
    for (int step = THREADS / 2; step > 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x >= step) continue;
        const float other = tops[threadIdx.x + step];
        const float higher = fmaxf(tops[threadIdx.x], other);
        if (higher == -INFINITY) continue;
        sums[threadIdx.x] = sums[threadIdx.x] * __expf(tops[threadIdx.x] - higher) +
                            sums[threadIdx.x + step] * __expf(other - higher);
        tops[threadIdx.x] = higher;
    }
    if (threadIdx.x == 0) m.normalisers[blockIdx.x] = tops[0] + __logf(sums[0]);
}

/* A thread: one key of one KV head. */
__global__ void __launch_bounds__(THREADS) add_mass(const kvl_cuda_mass m)
{
    const uint32_t key = blockIdx.x * THREADS + threadIdx.x;
    const uint32_t kv_head = blockIdx.y;
    const uint32_t group = m.n_heads / m.n_kv_heads;
    if (key >= m.n_keys) return;
    float sum = 0.0f;
    for (uint32_t row = 0; row < m.n_rows; row++) {
        if (key >= keys_seen(m, row)) continue;
        for (uint32_t g = 0; g < group; g++) {
            const size_t at = (size_t)row * m.n_heads + kv_head * group + g;
            sum += __expf(score(m, m.queries + at * m.head_dim, kv_head, key) - m.normalisers[at]);
        }
    }
    m.mass[(size_t)kv_head * m.n_keys + key] += sum;
}

} // namespace kvl

extern "C" cudaError_t kvl_cuda_attend_mass(const kvl_cuda_mass *m, cudaStream_t stream)
{
    if (m->head_dim % 8 != 0 || m->head_dim > kvl::HEAD_DIM_MAX) return cudaErrorInvalidValue;
    if (m->n_rows == 0 || m->n_keys == 0) return cudaSuccess;
    kvl::find_normalisers<<<m->n_rows * m->n_heads, kvl::THREADS, 0, stream>>>(*m);
    const dim3 blocks((m->n_keys + kvl::THREADS - 1) / kvl::THREADS, m->n_kv_heads);
    kvl::add_mass<<<blocks, kvl::THREADS, 0, stream>>>(*m);
    return cudaGetLastError();
}
