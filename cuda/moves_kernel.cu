/* cuda/moves_kernel.cu: see moves.h.
 *
 * A page's head is core matrices of 8 tokens by 8 dimensions (cuda/work.h); a thread's unit is a
 * pair of 16-byte chunks, each 8 dimensions of one token, chosen so that every number finds the
 * one that it is rotated with among the same 16. */
#include "cuda/moves.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace kvl
{

constexpr int PAGE = KVL_CUDA_PAGE_TOKENS;
constexpr int CHUNK = 8;

struct Pair {
    float a[CHUNK];
    float b[CHUNK];
};

/* The two chunks of the pair `index` of a token, counted in chunks of 8 dimensions. */
struct Chunks {
    uint32_t a;
    uint32_t b;
};

__device__ __forceinline__ Chunks chunks_of(const kvl_cuda_rotation &r, uint32_t index)
{
    const uint32_t half = r.rotary_dim / 16;
    if (!r.halves || index >= half) return {2 * index, 2 * index + 1};
    return {index, index + half};
}

__device__ __forceinline__ void turn(float &x, float &y, float cosine, float sine)
{
    const float was = x;
    x = was * cosine - y * sine;
    y = was * sine + y * cosine;
}

/* `row` of the tables; sign: 1 forwards, -1 backwards. */
__device__ __forceinline__ void rotate(const kvl_cuda_rotation &r, uint32_t row, float sign,
                                       uint32_t index, Pair &pair)
{
    const size_t at = (size_t)row * (r.rotary_dim / 2) + index * 8;
    if (index >= r.rotary_dim / 16) return;
    const float4 *cosines = (const float4 *)(r.cosines + at);
    const float4 *sines = (const float4 *)(r.sines + at);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float4 c4 = __ldg(cosines + i);
        const float4 s4 = __ldg(sines + i);
        const float c[4] = {c4.x, c4.y, c4.z, c4.w};
        const float s[4] = {s4.x * sign, s4.y * sign, s4.z * sign, s4.w * sign};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (r.halves)
                turn(pair.a[4 * i + k], pair.b[4 * i + k], c[k], s[k]);
            else if (i == 0)
                turn(pair.a[2 * k], pair.a[2 * k + 1], c[k], s[k]);
            else
                turn(pair.b[2 * k], pair.b[2 * k + 1], c[k], s[k]);
        }
    }
}

__device__ __forceinline__ void widen(uint4 packed, float (&out)[CHUNK])
{
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ uint4 narrow(const float (&in)[CHUNK])
{
    uint4 packed;
    uint32_t *words = (uint32_t *)&packed;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
        words[i] = *(const uint32_t *)&two;
    }
    return packed;
}

/* --- pages to pages --- */

template <int UNROLL> __global__ void move_pages(const __grid_constant__ kvl_cuda_page_moves p)
{
    const uint32_t pairs = p.n_kv_heads * p.head_dim; /* of a page's keys; as many of its values */
    const size_t page_chunks = (size_t)4 * pairs;
    const uint32_t head_pairs = p.head_dim;
    for (uint32_t item = blockIdx.x; item < p.n_moves * p.n_layers; item += gridDim.x) {
        const uint32_t layer = item / p.n_moves;
        const kvl_cuda_page_move move = p.moves[item % p.n_moves];
        const uint4 *from =
            (const uint4 *)p.from + ((size_t)layer * p.n_from_pages + move.from) * page_chunks;
        uint4 *to = (uint4 *)p.to + ((size_t)layer * p.n_to_pages + move.to) * page_chunks;
        for (uint32_t base = threadIdx.x; base < 2 * pairs; base += UNROLL * blockDim.x) {
            uint4 a[UNROLL], b[UNROLL];
            uint32_t at[UNROLL], apart[UNROLL];
#pragma unroll
            for (int i = 0; i < UNROLL; i++) {
                const uint32_t pair = base + i * blockDim.x;
                const uint32_t within = pair % head_pairs;
                const uint32_t index = within % (head_pairs / 2) / CHUNK;
                const Chunks c = chunks_of(p.rotation, index);
                const uint32_t tokens = pair / head_pairs * 2 + within / (head_pairs / 2);
                at[i] = (tokens * (p.head_dim / CHUNK) + c.a) * CHUNK + within % CHUNK;
                apart[i] = (c.b - c.a) * CHUNK;
                if (pair >= 2 * pairs) continue;
                a[i] = __ldcs(from + at[i]);
                b[i] = __ldcs(from + at[i] + apart[i]);
            }
#pragma unroll
            for (int i = 0; i < UNROLL; i++) {
                const uint32_t pair = base + i * blockDim.x;
                if (pair >= 2 * pairs) continue;
                if (pair < pairs && move.turn != 0) {
                    Pair wide;
                    widen(a[i], wide.a);
                    widen(b[i], wide.b);
                    const uint32_t index = pair % (head_pairs / 2) / CHUNK;
                    rotate(p.rotation, (uint32_t)abs(move.turn), move.turn < 0 ? -1.0f : 1.0f,
                           index, wide);
                    a[i] = narrow(wide.a);
                    b[i] = narrow(wide.b);
                }
                __stcs(to + at[i], a[i]);
                __stcs(to + at[i] + apart[i], b[i]);
            }
        }
    }
}

/* --- segment to pages --- */

__device__ __forceinline__ void load_chunk(const float *p, float, float (&out)[CHUNK])
{
    const float4 low = __ldcs((const float4 *)p);
    const float4 high = __ldcs((const float4 *)p + 1);
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}

__device__ __forceinline__ void load_chunk(const __nv_bfloat16 *p, float, float (&out)[CHUNK])
{
    widen(__ldcs((const uint4 *)p), out);
}

__device__ __forceinline__ void load_chunk(const __half *p, float, float (&out)[CHUNK])
{
    const uint4 packed = __ldcs((const uint4 *)p);
    const __half2 *two = (const __half2 *)&packed;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 wide = __half22float2(two[i]);
        out[2 * i] = wide.x;
        out[2 * i + 1] = wide.y;
    }
}

__device__ __forceinline__ void load_chunk(const int8_t *p, float scale, float (&out)[CHUNK])
{
    const uint2 packed = __ldcs((const uint2 *)p);
    const int8_t *eight = (const int8_t *)&packed;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) out[i] = (float)eight[i] * scale;
}

__device__ __forceinline__ void add_chunk(const float *p, float (&out)[CHUNK])
{
    float offset[CHUNK];
    load_chunk(p, 0.0f, offset);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) out[i] += offset[i];
}

/* A thread: one pair of chunks of one token and head, of keys (first half of the grid's items) or
 * values. Eight tokens side by side, so that a core matrix is written whole, and four pairs of
 * each, so that 64 bytes are read. */
template <typename Number> __global__ void place_block(const __grid_constant__ kvl_cuda_place p)
{
    const uint32_t token_pairs = p.head_dim / 16;
    const uint32_t groups = (p.n_tokens + CHUNK - 1) / CHUNK;
    const uint64_t head_items = (uint64_t)groups * CHUNK * token_pairs;
    const uint64_t n_items = 2 * p.n_kv_heads * head_items;
    const size_t half = (size_t)p.n_kv_heads * p.block_tokens * p.head_dim;
    const __half *scales = (const __half *)((const Number *)p.block + 2 * half);
    for (uint64_t item = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; item < n_items;
         item += (uint64_t)gridDim.x * blockDim.x) {
        const uint32_t head = (uint32_t)(item / head_items); /* values after keys */
        const uint32_t within = (uint32_t)(item % head_items);
        const uint32_t token = within / (CHUNK * token_pairs) * CHUNK + within % CHUNK;
        const uint32_t index = within / CHUNK % token_pairs;
        if (token >= p.n_tokens) continue;
        const bool is_key = head < p.n_kv_heads;
        const Chunks c = chunks_of(p.rotation, index);
        const size_t row = (size_t)head * p.block_tokens + p.token_first + token;
        const Number *from = (const Number *)p.block + row * p.head_dim;
        const float scale = sizeof(Number) == 1 ? __half2float(scales[row]) : 1.0f;
        Pair pair;
        load_chunk(from + c.a * CHUNK, scale, pair.a);
        load_chunk(from + c.b * CHUNK, scale, pair.b);
        const float *offsets = is_key ? p.key_offsets : p.value_offsets;
        if (offsets != nullptr) {
            offsets += ((size_t)(head % p.n_kv_heads) * p.n_tokens + token) * p.head_dim;
            add_chunk(offsets + c.a * CHUNK, pair.a);
            add_chunk(offsets + c.b * CHUNK, pair.b);
        }
        if (is_key) rotate(p.rotation, p.positions[token], 1.0f, index, pair);
        const uint32_t slot = p.slots[token];
        uint4 *to = (uint4 *)p.pages +
                    ((size_t)slot / PAGE * 2 * p.n_kv_heads + head) * (2 * p.head_dim) +
                    slot % PAGE / CHUNK * p.head_dim + slot % CHUNK;
        to[c.a * CHUNK] = narrow(pair.a);
        to[c.b * CHUNK] = narrow(pair.b);
    }
}

static bool is_known(const kvl_cuda_rotation &r, uint32_t head_dim)
{
    return head_dim % 16 == 0 && r.rotary_dim % 16 == 0 && r.rotary_dim <= head_dim;
}

static uint32_t n_processors()
{
    int device = 0;
    int n = 1;
    if (cudaGetDevice(&device) != cudaSuccess) return 1;
    if (cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
    return (uint32_t)n;
}

} // namespace kvl

extern "C" cudaError_t kvl_cuda_place_launch(const kvl_cuda_place *p, cudaStream_t stream)
{
    constexpr uint32_t THREADS = 256;
    if (!kvl::is_known(p->rotation, p->head_dim)) return cudaErrorInvalidValue;
    if (p->n_tokens == 0) return cudaSuccess;
    const uint64_t n_items =
        (uint64_t)2 * p->n_kv_heads * ((p->n_tokens + 7) / 8) * p->head_dim / 2;
    const uint64_t wanted = (n_items + THREADS - 1) / THREADS;
    const uint32_t most = kvl::n_processors() * 8;
    const uint32_t n_blocks = wanted < most ? (uint32_t)wanted : most;
    switch (p->format) {
    case KVL_CUDA_F32: kvl::place_block<float><<<n_blocks, THREADS, 0, stream>>>(*p); break;
    case KVL_CUDA_F16: kvl::place_block<__half><<<n_blocks, THREADS, 0, stream>>>(*p); break;
    case KVL_CUDA_BF16:
        kvl::place_block<__nv_bfloat16><<<n_blocks, THREADS, 0, stream>>>(*p);
        break;
    case KVL_CUDA_INT8: kvl::place_block<int8_t><<<n_blocks, THREADS, 0, stream>>>(*p); break;
    default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

extern "C" cudaError_t kvl_cuda_page_moves_launch(const kvl_cuda_page_moves *p, cudaStream_t stream)
{
    if (!kvl::is_known(p->rotation, p->head_dim)) return cudaErrorInvalidValue;
    const uint64_t n_items = (uint64_t)p->n_moves * p->n_layers;
    if (n_items == 0) return cudaSuccess;
    if (n_items > UINT32_MAX) return cudaErrorInvalidValue;
    const uint32_t most = p->n_blocks != 0 ? p->n_blocks : kvl::n_processors() * 8;
    const uint32_t n_blocks = n_items < most ? (uint32_t)n_items : most;
    if (p->n_blocks != 0) {
        /* Few blocks, a long way to the memory: as many reads as a block can have on the way. */
        kvl::move_pages<4><<<n_blocks, 512, 0, stream>>>(*p);
    } else {
        kvl::move_pages<2><<<n_blocks, 256, 0, stream>>>(*p);
    }
    return cudaGetLastError();
}
