/* cuda/attention_matrix.cuh: matrix works: a producer warp and two warp groups (attention_kernel.cu
 * tells the whole). */
#ifndef KVL_CUDA_ATTENTION_MATRIX_CUH
#define KVL_CUDA_ATTENTION_MATRIX_CUH

#include "cuda/attention_parts.cuh"

namespace kvl
{

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

} // namespace kvl

#endif /* KVL_CUDA_ATTENTION_MATRIX_CUH */
