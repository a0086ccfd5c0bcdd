/* gpu_support.cu: see gpu_support.h. */
#include "gpu_support.h"

#include <cstdio>
#include <cstdlib>
#include <ctime>

#include <cuda_bf16.h>

void gpu_must(cudaError_t result, const char *what)
{
    if (result == cudaSuccess) return;
    (void)fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(result));
    exit(1);
}

void *gpu_memory(size_t n_bytes)
{
    void *memory = NULL;
    GPU_MUST(cudaMalloc(&memory, n_bytes));
    return memory;
}

/* splitmix64 of the index: independent of the grid. */
__device__ uint64_t mixed(uint64_t x)
{
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

/* The sum of four 16-bit uniforms, scaled to variance 1. */
__global__ void fill(uint4 *to, size_t n, float deviation, uint64_t seed)
{
    const size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        __nv_bfloat16 numbers[8];
        for (int k = 0; k < 8; k++) {
            const uint64_t bits = mixed(seed * 0x100000001B3ull + i * 8 + k);
            const float sum = (float)(bits & 0xffff) + (float)(bits >> 16 & 0xffff) +
                              (float)(bits >> 32 & 0xffff) + (float)(bits >> 48);
            numbers[k] = __float2bfloat16((sum / 65536.0f - 2.0f) * 1.7320508f * deviation);
        }
        to[i] = *(const uint4 *)numbers;
    }
}

void gpu_fill_bf16(void *to, size_t n, float deviation, uint64_t seed, cudaStream_t stream)
{
    fill<<<1056, 256, 0, stream>>>((uint4 *)to, n / 8, deviation, seed);
    GPU_MUST(cudaGetLastError());
}

gpu_flush gpu_flush_create(void)
{
    gpu_flush flush = {NULL, 256u << 20};
    flush.memory = gpu_memory(flush.n_bytes);
    return flush;
}

void gpu_flush_run(const gpu_flush *flush, cudaStream_t stream)
{
    GPU_MUST(cudaMemsetAsync(flush->memory, 1, flush->n_bytes, stream));
}

void gpu_flush_destroy(gpu_flush *flush)
{
    GPU_MUST(cudaFree(flush->memory));
}

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a;
    const double y = *(const double *)b;
    return (x > y) - (x < y);
}

double gpu_median(double *numbers, size_t n)
{
    qsort(numbers, n, sizeof *numbers, compare);
    return n % 2 == 1 ? numbers[n / 2] : (numbers[n / 2 - 1] + numbers[n / 2]) / 2;
}

double gpu_time_graph(cudaGraphExec_t graph, const gpu_flush *flush, uint32_t n_repeats,
                      cudaStream_t stream)
{
    enum { WARM_UP = 3, REPEATS_MAX = 200 };
    double times[REPEATS_MAX];
    cudaEvent_t from, to;
    GPU_MUST(cudaEventCreate(&from));
    GPU_MUST(cudaEventCreate(&to));
    if (n_repeats > REPEATS_MAX) n_repeats = REPEATS_MAX;
    for (uint32_t i = 0; i < n_repeats + WARM_UP; i++) {
        if (flush != NULL) gpu_flush_run(flush, stream);
        GPU_MUST(cudaEventRecord(from, stream));
        GPU_MUST(cudaGraphLaunch(graph, stream));
        GPU_MUST(cudaEventRecord(to, stream));
        GPU_MUST(cudaEventSynchronize(to));
        float ms = 0;
        GPU_MUST(cudaEventElapsedTime(&ms, from, to));
        if (i >= WARM_UP) times[i - WARM_UP] = ms;
    }
    GPU_MUST(cudaEventDestroy(from));
    GPU_MUST(cudaEventDestroy(to));
    return gpu_median(times, n_repeats);
}

void gpu_print_head(const char *name, int argc, char **argv)
{
    cudaDeviceProp about;
    GPU_MUST(cudaGetDeviceProperties(&about, 0));
    char date[16] = "";
    const time_t now = time(NULL);
    struct tm day;
    if (gmtime_r(&now, &day) != NULL) (void)strftime(date, sizeof date, "%Y-%m-%d", &day);
    printf("{\n  \"name\": \"%s\",\n  \"version\": \"%s\",\n  \"date\": \"%s\",\n", name,
           KVL_VERSION, date);
    printf("  \"command\": \"%s", name);
    for (int i = 1; i < argc; i++) printf(" %s", argv[i]);
    printf(
        "\",\n  \"device\": \"%s\",\n  \"machine\": {\"device\": \"%s\", \"multiprocessors\": %d, \"memory_gib\": %.0f, "
        "\"cache_mib\": %.0f, \"copy_tbps\": %.2f},\n",
        about.name, about.name, about.multiProcessorCount, (double)about.totalGlobalMem / (1 << 30),
        (double)about.l2CacheSize / (1 << 20), gpu_copy_rate(0) / 1e12);
}

double gpu_copy_rate(cudaStream_t stream)
{
    const size_t n_bytes = (size_t)1 << 30;
    void *from = gpu_memory(n_bytes);
    void *to = gpu_memory(n_bytes);
    gpu_fill_bf16(from, n_bytes / 2, 1.0f, 1, stream);
    cudaEvent_t begin, end;
    GPU_MUST(cudaEventCreate(&begin));
    GPU_MUST(cudaEventCreate(&end));
    double times[9];
    for (int i = 0; i < 9; i++) {
        GPU_MUST(cudaEventRecord(begin, stream));
        GPU_MUST(cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyDeviceToDevice, stream));
        GPU_MUST(cudaEventRecord(end, stream));
        GPU_MUST(cudaEventSynchronize(end));
        float ms = 0;
        GPU_MUST(cudaEventElapsedTime(&ms, begin, end));
        times[i] = ms;
    }
    GPU_MUST(cudaEventDestroy(begin));
    GPU_MUST(cudaEventDestroy(end));
    GPU_MUST(cudaFree(from));
    GPU_MUST(cudaFree(to));
    return 2.0 * (double)n_bytes / (gpu_median(times, 9) / 1000);
}
