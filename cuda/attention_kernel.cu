/* cuda/attention_kernel.cu: rows attend to spans, all levels of sharing in one launch.
 *
 * One persistent thread block a multiprocessor. Two warp groups take matrix works (many rows, the
 * group's query heads packed as rows) with warp-group matrix instructions, fed by a producer warp
 * with bulk copies; three more warps take vector works (few rows) with their own copies and
 * mma.sync. Both kinds run side by side on every multiprocessor, so that the memory that single
 * rows wait for hides behind the arithmetic that shared spans need.
 * Rows with several partial results are merged by log-sum-exp after a barrier over all blocks
 * (FlashDecoding's second pass, without its launch), each warp one query head of one row.
 * Maxima are raised only when a score exceeds them by 2^8: results are as exact, since sums and
 * rows always share one maximum, and most steps need neither shuffles nor rescaling. */
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

/* --- producer of matrix works: one warp --- */

template <typename C>
__device__ __forceinline__ void load_step(const Layout<C> &at, const Shape &shape, uint32_t id,
                                          int lane, uint32_t head, bool values, uint32_t to,
                                          uint32_t full)
{
    if (lane == 0) barrier_expect(full, C::STEP_BYTES);
    __syncwarp();
    if (lane < STEP_PAGES) {
        const char *from = shape.kv + id * shape.page_bytes + head * C::HEAD_BYTES +
                           (values ? shape.half_bytes : 0);
        bulk_load(to + lane * C::HEAD_BYTES, from, C::HEAD_BYTES, full, CACHE_EVICT_LAST);
    }
}

/* Pages past the work's last are loaded as that last one: finite numbers, which the mask drops. */
template <typename C>
__device__ void produce(const kvl_cuda_attention &p, const Layout<C> &at, const Shape &shape)
{
    const int lane = threadIdx.x % WARP;
    Ring<C::STAGES> ring;
    const uint32_t first = p.matrix_first[blockIdx.x];
    const uint32_t past = p.matrix_first[blockIdx.x + 1];
    bool waited = false;
    for (uint32_t w = first; w < past; w++) {
        const uint32_t head = p.matrix[w].head;
        const uint32_t n_pages = p.matrix[w].n_pages;
        const uint32_t *ids = p.page_ids + p.matrix[w].page_first;
        uint32_t here = ids[min((uint32_t)lane, n_pages - 1)];
        if (!waited) wait_for_launch();
        waited = true;
        for (uint32_t page = 0; page < n_pages; page += WARP) {
            const uint32_t ahead = ids[min(page + WARP + lane, n_pages - 1)];
            for (uint32_t i = 0; i < WARP && page + i < n_pages; i += STEP_PAGES) {
                const uint32_t id = __shfl_sync(~0u, here, (i + lane) % WARP);
                barrier_wait(at.keys_empty(ring.at), ring.parity ^ 1);
                load_step<C>(at, shape, id, lane, head, false, at.keys(ring.at),
                             at.keys_full(ring.at));
                barrier_wait(at.values_empty(ring.at), ring.parity ^ 1);
                load_step<C>(at, shape, id, lane, head, true, at.values(ring.at),
                             at.values_full(ring.at));
                ring.next();
            }
            here = ahead;
        }
    }
}

/* --- matrix works: a warp group has 64 of a work's packed rows --- */

template <typename C> struct Rows {
    float out[C::D / 2];          /* accumulators of wgmma: two rows of each thread */
    uint32_t query[C::D / 16][4]; /* A operands */
    float maximum[2];             /* times scale, 0 while nothing was seen */
    float sum[2];                 /* of this thread's columns */
    bool seen[2];
    uint32_t limit[2]; /* last key that the row sees */
};

template <typename C>
__device__ __forceinline__ void scores(Rows<C> &rows, float (&s)[STEP_KEYS / 2], uint32_t keys)
{
    constexpr uint32_t TOKENS = C::D / 8 * 128; /* from 8 tokens to the next 8 */
    const uint64_t b = operand(keys, 128, TOKENS);
#pragma unroll
    for (int k = 0; k < C::D / 16; k++)
        wgmma_64<0>(s, rows.query[k], operand_at(b, k * 256), k != 0);
}

template <typename C>
__device__ __forceinline__ void add_values(Rows<C> &rows,
                                           const uint32_t (&weights)[STEP_KEYS / 16][4],
                                           uint32_t values, bool first)
{
    constexpr uint32_t TOKENS = C::D / 8 * 128;
    const uint64_t b = operand(values, TOKENS, 128);
#pragma unroll
    for (int k = 0; k < STEP_KEYS / 16; k++) {
        const uint64_t here = operand_at(b, k * 2 * TOKENS);
        if constexpr (C::D == 128)
            wgmma_128<1>(rows.out, weights[k], here, k != 0 || !first);
        else
            wgmma_64<1>(rows.out, weights[k], here, k != 0 || !first);
    }
}

__device__ __forceinline__ void mask(float (&s)[STEP_KEYS / 2], uint32_t key, const uint32_t *limit)
{
    const uint32_t column = key + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < STEP_KEYS / 2; i++) {
        const uint32_t at = column + i / 4 * 8 + i % 2;
        if (at > limit[i / 2 % 2]) s[i] = -INFINITY;
    }
}

/* Scores become weights; *scaling gets what the rows so far must be multiplied with. Returns
 * whether that is not 1 for some row of the warp. */
template <typename C>
__device__ __forceinline__ bool weigh(Rows<C> &rows, float (&s)[STEP_KEYS / 2], float scale,
                                      float (&scaling)[2])
{
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < STEP_KEYS / 2; i++) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
    bool raise = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        top[r] *= scale;
        raise |= rows.seen[r] ? top[r] > rows.maximum[r] + RAISE_ABOVE : top[r] != -INFINITY;
    }
    raise = __any_sync(~0u, raise);
    if (raise) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
            top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
            const float before = rows.maximum[r];
            if (top[r] != -INFINITY && (!rows.seen[r] || top[r] > before)) rows.maximum[r] = top[r];
            scaling[r] = rows.seen[r] ? exp_2(before - rows.maximum[r]) : 1.0f;
            rows.seen[r] = rows.seen[r] || top[r] != -INFINITY;
            rows.sum[r] *= scaling[r];
        }
    }
#pragma unroll
    for (int i = 0; i < STEP_KEYS / 2; i++) {
        s[i] = exp_2(fmaf(s[i], scale, -rows.maximum[i / 2 % 2]));
        rows.sum[i / 2 % 2] += s[i];
    }
    return raise;
}

__device__ __forceinline__ void pack(const float (&s)[STEP_KEYS / 2],
                                     uint32_t (&weights)[STEP_KEYS / 16][4])
{
#pragma unroll
    for (int i = 0; i < STEP_KEYS / 4; i++)
        weights[i / 4][i % 4] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

struct Matrix {
    kvl_cuda_matrix_work work;
    uint32_t n_packed;
    uint32_t packed_first; /* of this warp group */
    uint32_t n_steps;
};

/* This thread's packed row r (0 or 1). */
__device__ __forceinline__ uint32_t packed_row(const Matrix &m, int r)
{
    const uint32_t thread = threadIdx.x % GROUP_THREADS;
    return m.packed_first + thread / WARP * 16 + thread % WARP / 4 + 8 * r;
}

/* Rows past the last read the last one's query: finite, and never written. */
template <typename C>
__device__ __forceinline__ void begin_rows(const kvl_cuda_attention &p, const Shape &shape,
                                           const Matrix &m, Rows<C> &rows)
{
    typedef typename C::Number Number;
    const uint32_t held = m.work.key_first + m.work.n_pages * PAGE - 1;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const uint32_t packed = min(packed_row(m, r), m.n_packed - 1);
        const uint32_t row = m.work.row_first + packed / shape.group;
        const uint32_t head = m.work.head * shape.group + packed % shape.group;
        const Number *q = (const Number *)p.queries +
                          ((size_t)p.order[row] * p.n_heads + head) * C::D + threadIdx.x % 4 * 2;
#pragma unroll
        for (int k = 0; k < C::D / 16; k++) {
            rows.query[k][r] = load_pair(q + 16 * k);
            rows.query[k][2 + r] = load_pair(q + 16 * k + 8);
        }
        rows.limit[r] = min(p.positions[row], held);
        rows.maximum[r] = 0.0f;
        rows.sum[r] = 0.0f;
        rows.seen[r] = false;
    }
}

template <typename C>
__device__ __forceinline__ typename C::Number *place_of(const kvl_cuda_attention &p, uint32_t place,
                                                        uint32_t head)
{
    return (typename C::Number *)p.out + ((size_t)place * p.n_heads + head) * C::D;
}

template <typename C>
__device__ __forceinline__ void store_rows(const Rows<C> &rows, int r, float factor,
                                           typename C::Number *out)
{
#pragma unroll
    for (int i = 0; i < C::D / 8; i++)
        store_pair(out + 8 * i, rows.out[4 * i + 2 * r] * factor,
                   rows.out[4 * i + 2 * r + 1] * factor);
}

template <typename C>
__device__ __forceinline__ void keep_rows(const kvl_cuda_attention &p, const Rows<C> &rows, int r,
                                          size_t at)
{
    float *out = p.partial_rows + at * C::D + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < C::D / 8; i++)
        store_pair(out + 8 * i, rows.out[4 * i + 2 * r], rows.out[4 * i + 2 * r + 1]);
    if (threadIdx.x % 4 == 0)
        store_pair(p.partial_sums + 2 * at, rows.seen[r] ? rows.maximum[r] : -INFINITY,
                   rows.sum[r]);
}

template <typename C>
__device__ __forceinline__ void end_rows(const kvl_cuda_attention &p, const Shape &shape,
                                         const Matrix &m, Rows<C> &rows)
{
    uint32_t slots[2];
    typename C::Number *out[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const uint32_t packed = min(packed_row(m, r), m.n_packed - 1);
        const uint32_t token = packed / shape.group;
        slots[r] = p.slots[m.work.slot_first + token];
        out[r] = place_of<C>(p, p.order[m.work.row_first + token],
                             m.work.head * shape.group + packed % shape.group) +
                 threadIdx.x % 4 * 2;
        rows.sum[r] += __shfl_xor_sync(~0u, rows.sum[r], 1);
        rows.sum[r] += __shfl_xor_sync(~0u, rows.sum[r], 2);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const bool mine = packed_row(m, r) < m.n_packed;
        const uint32_t g = min(packed_row(m, r), m.n_packed - 1) % shape.group;
        const bool direct = slots[r] == KVL_CUDA_DIRECT;
        if (mine && direct)
            store_rows<C>(rows, r, rows.sum[r] > 0.0f ? 1.0f / rows.sum[r] : 0.0f, out[r]);
        if (mine && !direct) keep_rows<C>(p, rows, r, (size_t)slots[r] * shape.group + g);
    }
}

/* A group without rows of this work still gives every stage back. */
template <typename C>
__device__ __forceinline__ void pass_by(const Layout<C> &at, Ring<C::STAGES> &keys,
                                        Ring<C::STAGES> &values, uint32_t n_steps)
{
    for (uint32_t step = 0; step < n_steps; step++) {
        barrier_wait(at.keys_full(keys.at), keys.parity);
        if (threadIdx.x % GROUP_THREADS == 0) barrier_arrive(at.keys_empty(keys.at));
        barrier_wait(at.values_full(values.at), values.parity);
        if (threadIdx.x % GROUP_THREADS == 0) barrier_arrive(at.values_empty(values.at));
        keys.next();
        values.next();
    }
}

/* While the tensor cores multiply the weights of one step with its values, the scores of the next
 * become weights. */
template <typename C>
__device__ __forceinline__ void attend_rows(const Layout<C> &at, const Shape &shape,
                                            const Matrix &m, Rows<C> &rows, Ring<C::STAGES> &keys,
                                            Ring<C::STAGES> &values, int turn, bool both)
{
    const bool first_thread = threadIdx.x % GROUP_THREADS == 0;
    float s[STEP_KEYS / 2];
    uint32_t weights[STEP_KEYS / 16][4];
    float scaling[2] = {1.0f, 1.0f};

    barrier_wait(at.keys_full(keys.at), keys.parity);
    if (C::TURNS && both) named_sync(BARRIER_TURN + turn, MATRIX_THREADS);
    wgmma_fence();
    scores<C>(rows, s, at.keys(keys.at));
    wgmma_commit();
    if (C::TURNS && both) named_arrive(BARRIER_TURN + (turn ^ 1), MATRIX_THREADS);
    wgmma_wait<0>();
    hold(s);
    if (first_thread) barrier_arrive(at.keys_empty(keys.at));
    keys.next();
    if (m.work.mask_step == 0) mask(s, m.work.key_first, rows.limit);
    weigh<C>(rows, s, shape.scale, scaling);
    pack(s, weights);

    for (uint32_t step = 1; step < m.n_steps; step++) {
        barrier_wait(at.keys_full(keys.at), keys.parity);
        if (C::TURNS && both) named_sync(BARRIER_TURN + turn, MATRIX_THREADS);
        wgmma_fence();
        scores<C>(rows, s, at.keys(keys.at));
        wgmma_commit();
        barrier_wait(at.values_full(values.at), values.parity);
        add_values<C>(rows, weights, at.values(values.at), step == 1);
        wgmma_commit();
        if (C::TURNS && both) named_arrive(BARRIER_TURN + (turn ^ 1), MATRIX_THREADS);
        wgmma_wait<1>();
        hold(s);
        if (first_thread) barrier_arrive(at.keys_empty(keys.at));
        keys.next();
        if (step >= m.work.mask_step) mask(s, m.work.key_first + step * STEP_KEYS, rows.limit);
        const bool raised = weigh<C>(rows, s, shape.scale, scaling);
        hold(s); /* all weights, before waiting */
        wgmma_wait<0>();
        hold(rows.out);
        if (first_thread) barrier_arrive(at.values_empty(values.at));
        values.next();
        if (raised) {
#pragma unroll
            for (int i = 0; i < C::D / 2; i++) rows.out[i] *= scaling[i / 2 % 2];
        }
        pack(s, weights);
    }
    barrier_wait(at.values_full(values.at), values.parity);
    wgmma_fence();
    add_values<C>(rows, weights, at.values(values.at), m.n_steps == 1);
    wgmma_commit();
    wgmma_wait<0>();
    hold(rows.out);
    if (first_thread) barrier_arrive(at.values_empty(values.at));
    values.next();
}

template <typename C>
__device__ void take_matrix_works(const kvl_cuda_attention &p, const Layout<C> &at,
                                  const Shape &shape)
{
    const int group = uniform(threadIdx.x / GROUP_THREADS);
    Ring<C::STAGES> keys, values;
    const uint32_t past = p.matrix_first[blockIdx.x + 1];
    wait_for_launch();
    if (C::TURNS && group == 1) named_arrive(BARRIER_TURN, MATRIX_THREADS);
    for (uint32_t w = p.matrix_first[blockIdx.x]; w < past; w++) {
        Matrix m;
        m.work = p.matrix[w];
        m.n_packed = m.work.n_rows * shape.group;
        m.packed_first = group * 64;
        m.n_steps = (m.work.n_pages + STEP_PAGES - 1) / STEP_PAGES;
        if (m.packed_first >= m.n_packed) {
            pass_by<C>(at, keys, values, m.n_steps);
            continue;
        }
        Rows<C> rows;
        begin_rows<C>(p, shape, m, rows);
        attend_rows<C>(at, shape, m, rows, keys, values, group, m.n_packed > 64);
        end_rows<C>(p, shape, m, rows);
        __syncwarp();
    }
    if (C::TURNS && group == 0) named_sync(BARRIER_TURN, MATRIX_THREADS);
}

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

/* --- the kernel --- */

template <typename C>
__global__ void __launch_bounds__(THREADS, 1)
    attention(const __grid_constant__ kvl_cuda_attention p)
{
    extern __shared__ __align__(128) char shared[];
    Layout<C> at{(shared_address(shared) + 127) & ~127u};
    const Shape shape{(const char *)p.kv, (size_t)2 * p.n_kv_heads * C::HEAD_BYTES,
                      p.n_kv_heads * C::HEAD_BYTES, p.n_heads / p.n_kv_heads,
                      1.4426950408889634f * rsqrtf((float)C::D)};
    if (threadIdx.x == 0) {
        for (int s = 0; s < C::STAGES; s++) {
            barrier_init(at.keys_full(s), 1);
            barrier_init(at.values_full(s), 1);
            barrier_init(at.keys_empty(s), 2);
            barrier_init(at.values_empty(s), 2);
        }
        for (int i = 0; i < VECTOR_WARPS * C::VECTOR_STAGES; i++)
            barrier_init(at.vector_full(0, i), 1);
        barrier_init_fence();
    }
    __syncthreads();
    launch_dependents();
    if (uniform(threadIdx.x / GROUP_THREADS) == 2) {
        registers_less<112>();
        const int warp = threadIdx.x / WARP - MATRIX_THREADS / WARP;
        if (warp == 0)
            produce<C>(p, at, shape);
        else
            take_vector_works<C>(p, at, shape, warp - 1);
        __syncwarp();
        if (p.n_merges != 0) named_arrive(BARRIER_BLOCK, THREADS);
    } else {
        registers_more<192>();
        take_matrix_works<C>(p, at, shape);
        if (p.n_merges != 0) take_merges<C>(p, shape);
    }
}

/* What a variant is made of. */
enum { TURNS = 1, OVERLAPPED = 2, UNMERGED = 4 };

template <typename C>
cudaError_t launch(const kvl_cuda_attention *work, uint32_t options, cudaStream_t stream)
{
    cudaError_t error = cudaFuncSetAttribute(
        attention<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::SHARED_BYTES);
    if (error != cudaSuccess) return error;
    kvl_cuda_attention all = *work;
    if (options & UNMERGED) all.n_merges = 0;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    if (!(options & OVERLAPPED)) {
        attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
        attributes[config.numAttrs++].val.cooperative = 1;
    }
    if (options & OVERLAPPED) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    config.gridDim = dim3(work->n_blocks);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = C::SHARED_BYTES;
    config.stream = stream;
    config.attrs = attributes;
    return cudaLaunchKernelEx(&config, attention<C>, all);
}

template <typename Number, bool TURNS_>
cudaError_t launch_shape(const kvl_cuda_attention *work, uint32_t options, cudaStream_t stream)
{
    constexpr int WIDE_STAGES = 3;
    if (work->head_dim == 128)
        return launch<Config<128, 4, WIDE_STAGES, TURNS_, Number>>(work, options, stream);
    if (work->head_dim == 64)
        return launch<Config<64, 4, 6, TURNS_, Number>>(work, options, stream);
    return cudaErrorInvalidValue;
}

struct Variant {
    const char *name;
    uint32_t options;
};

static const Variant variants[] = {
    {"overlapped", OVERLAPPED},
    {"overlapped, turns", OVERLAPPED | TURNS},
    {"cooperative", 0},
    {"unmerged", OVERLAPPED | UNMERGED}, /* wrong results: the price of merging */
};
constexpr uint32_t N_VARIANTS = sizeof variants / sizeof *variants;

} // namespace kvl

extern "C" cudaError_t kvl_cuda_attention_launch(const kvl_cuda_attention *work, uint32_t variant,
                                                 cudaStream_t stream)
{
    if (variant >= kvl::N_VARIANTS) return cudaErrorInvalidValue;
    const uint32_t options = kvl::variants[variant].options;
    if (options & kvl::TURNS)
        return work->float_numbers ? kvl::launch_shape<float, true>(work, options, stream)
                                   : kvl::launch_shape<__nv_bfloat16, true>(work, options, stream);
    return work->float_numbers ? kvl::launch_shape<float, false>(work, options, stream)
                               : kvl::launch_shape<__nv_bfloat16, false>(work, options, stream);
}

extern "C" uint32_t kvl_cuda_attention_n_variants(void)
{
    return kvl::N_VARIANTS;
}

extern "C" const char *kvl_cuda_attention_variant_name(uint32_t variant)
{
    return variant < kvl::N_VARIANTS ? kvl::variants[variant].name : "";
}
