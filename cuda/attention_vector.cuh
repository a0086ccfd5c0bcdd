/* cuda/attention_vector.cuh: vector works: warps by themselves (attention_kernel.cu tells the
 * whole). */
#ifndef KVL_CUDA_ATTENTION_VECTOR_CUH
#define KVL_CUDA_ATTENTION_VECTOR_CUH

#include "cuda/attention_parts.cuh"

namespace kvl
{

/* --- vector works: one warp has up to 8 packed rows ---
 * Everything is transposed: keys and values are the 16-row operand and the packed rows the 8
 * columns, so that a group of 4 to 8 query heads leaves little of the instruction unused. */

/* Where words stand in a kvl_cuda_vector_work, behind the pages: lane i holds word i. */
enum {
    PLACES = 0,
    POSITIONS = 8,
    SLOTS = 16,
    N_ROWS = 24,
    HEAD = 25,
    N_PAGES = 26,
    KEY_FIRST = 27
};

__device__ __forceinline__ uint32_t word(uint32_t words, int at)
{
    return __shfl_sync(~0u, words, at);
}

/* The lane's word of a work, or its page; past the last work, 0: a work without pages. */
__device__ __forceinline__ uint32_t fetch(const kvl_cuda_attention &p, uint32_t work, uint32_t past,
                                          int at)
{
    if (work >= past) return 0;
    return ((const uint32_t *)(p.vectors + work))[at + threadIdx.x % WARP];
}

/* What is asked for next: runs ahead of what is worked on, as far as the ring goes. */
template <typename C> struct VectorCursor {
    const kvl_cuda_attention &p;
    const Shape &shape;
    uint32_t work, past; /* of the next fetch */
    uint32_t ids, words; /* of the work being loaded */
    uint32_t next_ids, next_words;
    uint32_t page;
    uint32_t n_pages; /* 0: nothing left */

    __device__ VectorCursor(const kvl_cuda_attention &p_, const Shape &shape_, uint32_t first,
                            uint32_t past_)
        : p(p_), shape(shape_), work(first), past(past_)
    {
        prefetch();
        begin();
    }
    __device__ __forceinline__ void prefetch()
    {
        next_ids = fetch(p, work, past, 0);
        next_words = fetch(p, work, past, KVL_CUDA_VECTOR_PAGES);
        work += VECTOR_WARPS;
    }
    __device__ __forceinline__ void begin()
    {
        ids = next_ids;
        words = next_words;
        page = 0;
        n_pages = word(words, N_PAGES);
        prefetch();
    }
    /* Asks for the next page, going on to the next work behind the last. */
    __device__ __forceinline__ void load(uint32_t to, uint32_t full)
    {
        if (n_pages == 0) return;
        const uint32_t id = __shfl_sync(~0u, ids, page);
        const uint32_t head = word(words, HEAD);
        if (threadIdx.x % WARP == 0) {
            const char *from = shape.kv + id * shape.page_bytes + head * C::HEAD_BYTES;
            barrier_expect(full, 2 * C::HEAD_BYTES);
            bulk_load(to, from, C::HEAD_BYTES, full, CACHE_EVICT_FIRST);
            bulk_load(to + C::HEAD_BYTES, from + shape.half_bytes, C::HEAD_BYTES, full,
                      CACHE_EVICT_FIRST);
        }
        if (++page == n_pages) begin();
    }
};

/* Starts to bring the queries of a work, packed row after packed row, to shared memory. */
template <typename C>
__device__ __forceinline__ void ask_queries(const kvl_cuda_attention &p, const Shape &shape,
                                            uint32_t words, uint32_t to)
{
    typedef typename C::Number Number;
    constexpr uint32_t CHUNKS = C::D * sizeof(Number) / 16; /* 16 bytes each, of a row */
    const uint32_t n_packed = word(words, N_ROWS) * shape.group;
    const uint32_t head = word(words, HEAD);
    for (uint32_t i = 0; i < n_packed * CHUNKS; i += WARP) {
        const uint32_t chunk = i + threadIdx.x % WARP;
        const uint32_t packed = min(chunk / CHUNKS, n_packed - 1);
        const uint32_t place = word(words, PLACES + packed / shape.group);
        const Number *from =
            (const Number *)p.queries +
            ((size_t)place * p.n_heads + head * shape.group + packed % shape.group) * C::D;
        if (chunk < n_packed * CHUNKS)
            async_copy(to + packed * C::QUERY_STRIDE + chunk % CHUNKS * 16,
                       (const char *)from + chunk % CHUNKS * 16);
    }
    async_commit();
}

template <typename C> struct Columns {
    float out[C::D / 16][4]; /* [dimension / 16]: rows are dimensions, columns packed rows */
    uint32_t query[C::D / 16][2];
    float maximum[2]; /* of this thread's two columns */
    float sum[2];     /* of this thread's keys */
    bool seen[2];
    uint32_t limit[2];
};

template <typename C>
__device__ __forceinline__ void begin_columns(const Shape &shape, uint32_t words, uint32_t queries,
                                              Columns<C> &c)
{
    typedef typename C::Number Number;
    const int lane = threadIdx.x % WARP;
    const uint32_t n_packed = word(words, N_ROWS) * shape.group;
    const uint32_t at = queries + min((uint32_t)lane / 4, n_packed - 1) * C::QUERY_STRIDE +
                        lane % 4 * 2 * sizeof(Number);
    async_wait();
    __syncwarp();
#pragma unroll
    for (int k = 0; k < C::D / 16; k++) {
        c.query[k][0] = shared_pair<Number>(at + 16 * k * sizeof(Number));
        c.query[k][1] = shared_pair<Number>(at + (16 * k + 8) * sizeof(Number));
#pragma unroll
        for (int i = 0; i < 4; i++) c.out[k][i] = 0.0f;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t column = min((uint32_t)lane % 4 * 2 + i, n_packed - 1);
        c.limit[i] = word(words, POSITIONS + column / shape.group);
        c.maximum[i] = 0.0f;
        c.sum[i] = 0.0f;
        c.seen[i] = false;
    }
}

/* One page: scores, weights, values. */
template <typename C>
__device__ __forceinline__ void attend_page(const Shape &shape, Columns<C> &c, uint32_t page,
                                            uint32_t key)
{
    constexpr uint32_t TOKENS = C::D / 8 * 128;
    const int lane = threadIdx.x % WARP;
    const uint32_t matrix = lane / 8;
    const uint32_t row = lane % 8 * 16;
    float s[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float s_odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const uint32_t keys = page + matrix % 2 * TOKENS + matrix / 2 * 128 + row;
#pragma unroll
    for (int k = 0; k < C::D / 16; k += 2) {
        uint32_t a[4], b[4];
        load_matrices<false>(a, keys + k * 256);
        load_matrices<false>(b, keys + (k + 1) * 256);
        mma_16x8(s, a, c.query[k][0], c.query[k][1]);
        mma_16x8(s_odd, b, c.query[k + 1][0], c.query[k + 1][1]);
    }
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const bool inside = key + lane / 4 + i / 2 * 8 <= c.limit[i % 2];
        s[i] = inside ? (s[i] + s_odd[i]) * shape.scale : -INFINITY;
        top[i % 2] = fmaxf(top[i % 2], s[i]);
    }
    bool raise = false;
#pragma unroll
    for (int i = 0; i < 2; i++)
        raise |= c.seen[i] ? top[i] > c.maximum[i] + RAISE_ABOVE : top[i] != -INFINITY;
    if (__any_sync(~0u, raise)) {
        float scaling[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 4));
            top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 8));
            top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 16));
            const float before = c.maximum[i];
            if (top[i] != -INFINITY && (!c.seen[i] || top[i] > before)) c.maximum[i] = top[i];
            scaling[i] = c.seen[i] ? exp_2(before - c.maximum[i]) : 1.0f;
            c.seen[i] = c.seen[i] || top[i] != -INFINITY;
            c.sum[i] *= scaling[i];
        }
#pragma unroll
        for (int k = 0; k < C::D / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) c.out[k][i] *= scaling[i % 2];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        s[i] = exp_2(s[i] - c.maximum[i % 2]);
        c.sum[i % 2] += s[i];
    }
    const uint32_t low = transpose_8x8(pack_bf16(s[0], s[1]));
    const uint32_t high = transpose_8x8(pack_bf16(s[2], s[3]));
    const uint32_t values = page + C::HEAD_BYTES + matrix / 2 * TOKENS + matrix % 2 * 128 + row;
#pragma unroll
    for (int k = 0; k < C::D / 16; k++) {
        uint32_t a[4];
        load_matrices<true>(a, values + k * 256);
        mma_16x8(c.out[k], a, low, high);
    }
}

template <typename C>
__device__ __forceinline__ void keep_columns(const kvl_cuda_attention &p, const Columns<C> &c,
                                             int i, size_t at)
{
    const int lane = threadIdx.x % WARP;
    float *out = p.partial_rows + at * C::D + lane / 4;
#pragma unroll
    for (int k = 0; k < C::D / 16; k++) {
        out[16 * k] = c.out[k][i];
        out[16 * k + 8] = c.out[k][2 + i];
    }
    if (lane / 4 == 0)
        store_pair(p.partial_sums + 2 * at, c.seen[i] ? c.maximum[i] : -INFINITY, c.sum[i]);
}

template <typename C>
__device__ __forceinline__ void end_columns(const kvl_cuda_attention &p, const Shape &shape,
                                            uint32_t words, Columns<C> &c)
{
    const int lane = threadIdx.x % WARP;
    const uint32_t n_packed = word(words, N_ROWS) * shape.group;
    const uint32_t head = word(words, HEAD) * shape.group;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        c.sum[i] += __shfl_xor_sync(~0u, c.sum[i], 4);
        c.sum[i] += __shfl_xor_sync(~0u, c.sum[i], 8);
        c.sum[i] += __shfl_xor_sync(~0u, c.sum[i], 16);
        const bool mine = lane % 4 * 2 + i < n_packed;
        const uint32_t packed = min((uint32_t)lane % 4 * 2 + i, n_packed - 1);
        const uint32_t g = packed % shape.group;
        const uint32_t slot = word(words, SLOTS + packed / shape.group);
        const uint32_t place = word(words, PLACES + packed / shape.group);
        typename C::Number *out = place_of<C>(p, place, head + g) + lane / 4;
        if (mine && slot == KVL_CUDA_DIRECT) {
            const float part = c.sum[i] > 0.0f ? 1.0f / c.sum[i] : 0.0f;
#pragma unroll
            for (int k = 0; k < C::D / 16; k++) {
                store_one(out + 16 * k, c.out[k][i] * part);
                store_one(out + 16 * k + 8, c.out[k][2 + i] * part);
            }
        } else if (mine) {
            keep_columns<C>(p, c, i, (size_t)slot * shape.group + g);
        }
    }
}

/* While a work's pages are seen, the queries of the next come in, and the words of the one after. */
template <typename C>
__device__ void take_vector_works(const kvl_cuda_attention &p, const Layout<C> &at,
                                  const Shape &shape, int warp)
{
    const uint32_t first = p.vector_first[blockIdx.x] + warp;
    const uint32_t past = p.vector_first[blockIdx.x + 1];
    if (first >= past) return;
    const uint32_t queries = at.queries(warp);
    VectorCursor<C> cursor(p, shape, first, past);
    uint32_t words = cursor.words;
    uint32_t next = cursor.next_words;
    wait_for_launch();
    for (int i = 0; i < C::VECTOR_STAGES; i++)
        cursor.load(at.vector(warp, i), at.vector_full(warp, i));
    ask_queries<C>(p, shape, words, queries);
    Ring<C::VECTOR_STAGES> ring;
    for (uint32_t w = first; w < past; w += VECTOR_WARPS) {
        Columns<C> c;
        begin_columns<C>(shape, words, queries, c);
        ask_queries<C>(p, shape, next, queries);
        const uint32_t after = fetch(p, w + 2 * VECTOR_WARPS, past, KVL_CUDA_VECTOR_PAGES);
        const uint32_t n_pages = word(words, N_PAGES);
        const uint32_t key_first = word(words, KEY_FIRST);
        for (uint32_t page = 0; page < n_pages; page++) {
            barrier_wait(at.vector_full(warp, ring.at), ring.parity);
            attend_page<C>(shape, c, at.vector(warp, ring.at), key_first + page * PAGE);
            __syncwarp();
            cursor.load(at.vector(warp, ring.at), at.vector_full(warp, ring.at));
            ring.next();
        }
        end_columns<C>(p, shape, words, c);
        words = next;
        next = after;
    }
}

} // namespace kvl

#endif /* KVL_CUDA_ATTENTION_VECTOR_CUH */
