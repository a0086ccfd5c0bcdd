/* cuda/attention_merge.cuh: partial results become results, behind a barrier of all blocks. */
#ifndef KVL_CUDA_ATTENTION_MERGE_CUH
#define KVL_CUDA_ATTENTION_MERGE_CUH

#include "cuda/attention_parts.cuh"

namespace kvl
{

/* --- merging --- */

/* Waits until all blocks have come here. They are all on the device together: there is one for each
 * multiprocessor at most, and a launch that overlaps this one begins behind it. */
__device__ __forceinline__ void wait_for_blocks(uint64_t *barrier, uint32_t n_blocks)
{
    fence_device();
    const uint64_t before = add_release(barrier, 1);
    const uint64_t goal = (before / n_blocks + 1) * n_blocks;
    while (load_acquire(barrier) < goal) {
    }
}

/* One query head of one row: a warp. Rows are asked for before their weights are known. */
template <typename C>
__device__ __forceinline__ void merge(const kvl_cuda_attention &p, const Shape &shape,
                                      const kvl_cuda_merge &m, uint32_t g)
{
    constexpr int EACH = C::D / WARP; /* 4 or 2 dimensions a lane */
    constexpr int TOGETHER = 20;
    const int lane = threadIdx.x % WARP;
    const float2 *sums = (const float2 *)p.partial_sums + (size_t)m.slot_first * shape.group + g;
    const float *rows =
        p.partial_rows + ((size_t)m.slot_first * shape.group + g) * C::D + lane * EACH;
    float2 first = make_float2(-INFINITY, 0.0f);
    if (lane < m.n_slots) first = __ldcg(sums + (size_t)lane * shape.group);
    float top = first.x;
    for (uint32_t i = lane + WARP; i < m.n_slots; i += WARP)
        top = fmaxf(top, __ldcg(sums + (size_t)i * shape.group).x);
    float sum = 0.0f;
    float out[EACH] = {};
    for (uint32_t base = 0; base < m.n_slots; base += TOGETHER) {
        float parts[TOGETHER][EACH];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            if (base + i >= m.n_slots) continue;
            const float *from = rows + (size_t)(base + i) * shape.group * C::D;
#pragma unroll
            for (int e = 0; e < EACH; e += 2) {
                const float2 two = __ldcg((const float2 *)(from + e));
                parts[i][e] = two.x;
                parts[i][e + 1] = two.y;
            }
        }
        if (base == 0) {
#pragma unroll
            for (int step = 16; step > 0; step /= 2)
                top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
            if (top == -INFINITY) top = 0.0f;
        }
        float2 one = first;
        if (base != 0) {
            one = make_float2(-INFINITY, 0.0f);
            if (base + lane < m.n_slots) one = __ldcg(sums + (size_t)(base + lane) * shape.group);
        }
        const float weight = exp_2(one.x - top);
        if (lane < TOGETHER) sum += weight * one.y;
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const float w = __shfl_sync(~0u, weight, i);
            if (base + i >= m.n_slots) continue;
#pragma unroll
            for (int e = 0; e < EACH; e++) out[e] = fmaf(w, parts[i][e], out[e]);
        }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    const float part = sum > 0.0f ? 1.0f / sum : 0.0f;
    typename C::Number *to = place_of<C>(p, m.place, m.head * shape.group + g) + lane * EACH;
#pragma unroll
    for (int e = 0; e < EACH; e += 2) store_pair(to + e, out[e] * part, out[e + 1] * part);
}

/* MERGES neighbours in the list, each of up to PARTS partial results, all query heads of each in
 * fours, by one warp: what it needs is asked for at once. */
template <typename C, int MERGES, int PARTS>
__device__ __forceinline__ void merge_few(const kvl_cuda_attention &p, const Shape &shape,
                                          const kvl_cuda_merge (&m)[MERGES])
{
    constexpr int EACH = C::D / WARP;
    const int lane = threadIdx.x % WARP;
    for (uint32_t g = 0; g < shape.group; g += 4) {
        float parts[MERGES][PARTS][4][EACH];
        float2 sums[MERGES];
#pragma unroll
        for (int k = 0; k < MERGES; k++) {
            const size_t first = (size_t)m[k].slot_first * shape.group + g;
            const bool mine = lane / 4 < m[k].n_slots && g + lane % 4 < shape.group;
            sums[k] = make_float2(-INFINITY, 0.0f);
            if (mine)
                sums[k] = __ldcg((const float2 *)p.partial_sums + first +
                                 (size_t)(lane / 4) * shape.group + lane % 4);
            const float *rows = p.partial_rows + first * C::D + lane * EACH;
#pragma unroll
            for (int i = 0; i < PARTS * 4; i++) {
                if (i / 4 >= m[k].n_slots || g + i % 4 >= shape.group) continue;
                const float *from = rows + ((size_t)(i / 4) * shape.group + i % 4) * C::D;
#pragma unroll
                for (int e = 0; e < EACH; e += 2) {
                    const float2 two = __ldcg((const float2 *)(from + e));
                    parts[k][i / 4][i % 4][e] = two.x;
                    parts[k][i / 4][i % 4][e + 1] = two.y;
                }
            }
        }
#pragma unroll
        for (int k = 0; k < MERGES; k++) {
            float top = sums[k].x;
#pragma unroll
            for (int step = 4; step < WARP; step *= 2)
                top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
            if (top == -INFINITY) top = 0.0f;
            float weight = exp_2(sums[k].x - top);
            float sum = weight * sums[k].y;
#pragma unroll
            for (int step = 4; step < WARP; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
            weight *= sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
            for (int h = 0; h < 4; h++) {
                float out[EACH] = {};
#pragma unroll
                for (int i = 0; i < PARTS; i++) {
                    const float w = __shfl_sync(~0u, weight, i * 4 + h);
                    if (i >= m[k].n_slots) continue;
#pragma unroll
                    for (int e = 0; e < EACH; e++) out[e] = fmaf(w, parts[k][i][h][e], out[e]);
                }
                if (m[k].n_slots == 0 || g + h >= shape.group) continue;
                typename C::Number *to =
                    place_of<C>(p, m[k].place, m[k].head * shape.group + g + h) + lane * EACH;
#pragma unroll
                for (int e = 0; e < EACH; e += 2) store_pair(to + e, out[e], out[e + 1]);
            }
        }
    }
}

/* All that has begun on the device is written. */
__device__ __forceinline__ void wait_for_results(const kvl_cuda_attention &p)
{
    named_sync(BARRIER_BLOCK, THREADS);
    if (threadIdx.x == 0) wait_for_blocks(p.barrier, gridDim.x);
    named_sync(BARRIER_MATRIX, MATRIX_THREADS);
}

/* Past the end of the list come merges without parts. */
template <int MERGES>
__device__ __forceinline__ void ask_merges(const kvl_cuda_attention &p, uint32_t first,
                                           kvl_cuda_merge (&m)[MERGES])
{
#pragma unroll
    for (int k = 0; k < MERGES; k++) {
        m[k] = p.merges[min(first + k, p.n_merges - 1)];
        if (first + k >= p.n_merges) m[k].n_slots = 0;
    }
}

template <typename C, int MERGES, int PARTS>
__device__ __forceinline__ void take_few_merges(const kvl_cuda_attention &p, const Shape &shape,
                                                uint32_t at, uint32_t step)
{
    kvl_cuda_merge next[MERGES];
    ask_merges(p, at * MERGES, next);
    wait_for_results(p);
    for (uint32_t i = at * MERGES; i < p.n_merges; i += step * MERGES) {
        kvl_cuda_merge m[MERGES];
#pragma unroll
        for (int k = 0; k < MERGES; k++) m[k] = next[k];
        ask_merges(p, i + step * MERGES, next);
        merge_few<C, MERGES, PARTS>(p, shape, m);
    }
}

template <typename C> __device__ void take_merges(const kvl_cuda_attention &p, const Shape &shape)
{
    const uint32_t step = gridDim.x * (MATRIX_THREADS / WARP);
    /* Blocks first, so that few merges spread over all multiprocessors. */
    const uint32_t at = threadIdx.x / WARP * gridDim.x + blockIdx.x;
    if (p.n_parts_max <= 2) {
        take_few_merges<C, 2, 2>(p, shape, at, step);
    } else if (p.n_parts_max <= 5) {
        take_few_merges<C, 1, 5>(p, shape, at, step);
    } else {
        const uint32_t n = p.n_merges * shape.group;
        kvl_cuda_merge next = p.merges[min(at, n - 1) / shape.group];
        wait_for_results(p);
        for (uint32_t i = at; i < n; i += step) {
            const kvl_cuda_merge m = next;
            next = p.merges[min(i + step, n - 1) / shape.group];
            merge<C>(p, shape, m, i % shape.group);
        }
    }
}

} // namespace kvl

#endif /* KVL_CUDA_ATTENTION_MERGE_CUH */
