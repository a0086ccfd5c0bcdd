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
#include "cuda/attention_matrix.cuh"
#include "cuda/attention_merge.cuh"
#include "cuda/attention_vector.cuh"

namespace kvl
{

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
    const cudaError_t error = cudaFuncSetAttribute(
        attention<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::SHARED_BYTES);
    if (error != cudaSuccess) return error;
    kvl_cuda_attention all = *work;
    if (options & UNMERGED) all.n_merges = 0;
    /* Works are read before what comes ahead has ended, see wait_for_launch. */
    if (work->is_first) options &= ~(uint32_t)OVERLAPPED;
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
