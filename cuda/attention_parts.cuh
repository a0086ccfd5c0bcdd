/* cuda/attention_parts.cuh: what the roles of the attention kernel share: the threads of a block,
 * the layout of its shared memory, and numbers in and out. */
#ifndef KVL_CUDA_ATTENTION_PARTS_CUH
#define KVL_CUDA_ATTENTION_PARTS_CUH

#include "cuda/kernels.h"
#include "cuda/ptx.cuh"

namespace kvl
{

constexpr int WARP = 32;
constexpr int GROUP_THREADS = 128; /* of a warp group */
constexpr int MATRIX_THREADS = 2 * GROUP_THREADS;
constexpr int THREADS = 3 * GROUP_THREADS;
constexpr int VECTOR_WARPS = 3;
constexpr int PAGE = KVL_CUDA_PAGE_TOKENS;
constexpr int STEP_PAGES = KVL_CUDA_STEP_PAGES;
constexpr int STEP_KEYS = PAGE * STEP_PAGES;
constexpr float RAISE_ABOVE = 8.0f; /* in units of log 2 */
/* Named barriers; 0 is __syncthreads'. */
enum { BARRIER_BLOCK = 1, BARRIER_MATRIX = 2, BARRIER_TURN = 3 };

template <int D_, int STAGES_, int VECTOR_STAGES_, bool TURNS_, typename Number_> struct Config {
    static constexpr int D = D_;
    static constexpr int STAGES = STAGES_;
    static constexpr int VECTOR_STAGES = VECTOR_STAGES_;
    static constexpr bool TURNS = TURNS_; /* the two groups take turns at the tensor cores */
    typedef Number_ Number;
    static constexpr int HEAD_BYTES = PAGE * D * 2; /* keys or values of one head of a page */
    static constexpr int STEP_BYTES = STEP_PAGES * HEAD_BYTES;
    static constexpr int VECTOR_BYTES = VECTOR_WARPS * VECTOR_STAGES * 2 * HEAD_BYTES;
    static constexpr int QUERY_STRIDE = (D + 8) * sizeof(Number); /* no two rows in one bank */
    static constexpr int QUERY_BYTES = VECTOR_WARPS * KVL_CUDA_VECTOR_ROWS * QUERY_STRIDE;
    static constexpr int N_BARRIERS = 4 * STAGES + VECTOR_WARPS * VECTOR_STAGES;
    static constexpr int SHARED_BYTES =
        2 * STAGES * STEP_BYTES + VECTOR_BYTES + QUERY_BYTES + N_BARRIERS * 8 + 128;
    static_assert(SHARED_BYTES <= 227 * 1024, "more shared memory than a block can have");
};

/* A ring of stages: which one is next, and the parity of its barrier's phase. */
template <int N> struct Ring {
    int at = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next()
    {
        if (++at == N) {
            at = 0;
            parity ^= 1;
        }
    }
};

/* Tells the compiler that the warp agrees: matrix instructions may not stand in divergent code. */
__device__ __forceinline__ int uniform(int value)
{
    return __shfl_sync(~0u, value, 0);
}

template <typename C> struct Layout {
    uint32_t base;
    __device__ __forceinline__ uint32_t keys(int stage) const
    {
        return base + stage * C::STEP_BYTES;
    }
    __device__ __forceinline__ uint32_t values(int stage) const
    {
        return base + (C::STAGES + stage) * C::STEP_BYTES;
    }
    __device__ __forceinline__ uint32_t vector(int warp, int stage) const
    {
        return base + 2 * C::STAGES * C::STEP_BYTES +
               (warp * C::VECTOR_STAGES + stage) * 2 * C::HEAD_BYTES;
    }
    __device__ __forceinline__ uint32_t queries(int warp) const
    {
        return base + 2 * C::STAGES * C::STEP_BYTES + C::VECTOR_BYTES +
               warp * KVL_CUDA_VECTOR_ROWS * C::QUERY_STRIDE;
    }
    __device__ __forceinline__ uint32_t barrier(int i) const
    {
        return base + 2 * C::STAGES * C::STEP_BYTES + C::VECTOR_BYTES + C::QUERY_BYTES + 8 * i;
    }
    __device__ __forceinline__ uint32_t keys_full(int s) const
    {
        return barrier(s);
    }
    __device__ __forceinline__ uint32_t keys_empty(int s) const
    {
        return barrier(C::STAGES + s);
    }
    __device__ __forceinline__ uint32_t values_full(int s) const
    {
        return barrier(2 * C::STAGES + s);
    }
    __device__ __forceinline__ uint32_t values_empty(int s) const
    {
        return barrier(3 * C::STAGES + s);
    }
    __device__ __forceinline__ uint32_t vector_full(int warp, int s) const
    {
        return barrier(4 * C::STAGES + warp * C::VECTOR_STAGES + s);
    }
};

struct Shape {
    const char *kv;
    size_t page_bytes;
    uint32_t half_bytes; /* from keys to values in a page */
    uint32_t group;
    float scale; /* of scores, to units of log 2 */
};

__device__ __forceinline__ uint32_t load_pair(const __nv_bfloat16 *p)
{
    return *(const uint32_t *)p;
}

__device__ __forceinline__ uint32_t load_pair(const float *p)
{
    const float2 v = *(const float2 *)p;
    return pack_bf16(v.x, v.y);
}

/* The same from an address in shared memory. */
template <typename Number> __device__ __forceinline__ uint32_t shared_pair(uint32_t at)
{
    if constexpr (sizeof(Number) == 2) {
        return shared_word(at);
    } else {
        return pack_bf16(__uint_as_float(shared_word(at)), __uint_as_float(shared_word(at + 4)));
    }
}

__device__ __forceinline__ void store_pair(__nv_bfloat16 *p, float a, float b)
{
    *(uint32_t *)p = pack_bf16(a, b);
}

__device__ __forceinline__ void store_pair(float *p, float a, float b)
{
    *(float2 *)p = make_float2(a, b);
}

__device__ __forceinline__ void store_one(__nv_bfloat16 *p, float a)
{
    *p = __float2bfloat16(a);
}
__device__ __forceinline__ void store_one(float *p, float a)
{
    *p = a;
}

template <typename C>
__device__ __forceinline__ typename C::Number *place_of(const kvl_cuda_attention &p, uint32_t place,
                                                        uint32_t head)
{
    return (typename C::Number *)p.out + ((size_t)place * p.n_heads + head) * C::D;
}

} // namespace kvl

#endif /* KVL_CUDA_ATTENTION_PARTS_CUH */
