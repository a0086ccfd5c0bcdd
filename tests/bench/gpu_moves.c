/* gpu_moves.c: how fast KV moves: within the device, from pinned host memory, both ways at once.
 *
 *   gpu-moves [--json]
 *
 * 32 layers, 8 KV heads, dimension 128, bf16: a page of 16 tokens is 64 KiB a layer. CUDA events,
 * median of 20 after warm-up. Rates within the device count bytes read and bytes written, those of
 * the bus the bytes that cross it. */
#include "base/random.h"
#include "base/status.h"
#include "cuda/mover.h"
#include "cuda/moves.h"
#include "gpu_support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    N_LAYERS = 32,
    N_KV_HEADS = 8,
    HEAD_DIM = 128,
    PAGE_BYTES = 2 * N_KV_HEADS * 16 * HEAD_DIM * 2,
    N_PAGES = 256,     /* of a layer: 512 MiB in all */
    N_HOST_PAGES = 64, /* of a layer: 128 MiB in all */
    N_POSITIONS = 16384,
    REPEATS = 20,
    WARM_UP = 3,
};

typedef void work(void *context, cudaStream_t stream);

static double median_seconds(work *run, void *context)
{
    cudaEvent_t from, to;
    cudaStream_t stream;
    double times[REPEATS];
    GPU_MUST(cudaEventCreate(&from));
    GPU_MUST(cudaEventCreate(&to));
    GPU_MUST(cudaStreamCreate(&stream));
    for (int i = 0; i < REPEATS + WARM_UP; i++) {
        GPU_MUST(cudaEventRecord(from, stream));
        run(context, stream);
        GPU_MUST(cudaEventRecord(to, stream));
        GPU_MUST(cudaEventSynchronize(to));
        float ms = 0;
        GPU_MUST(cudaEventElapsedTime(&ms, from, to));
        if (i >= WARM_UP) times[i - WARM_UP] = ms / 1000;
    }
    GPU_MUST(cudaEventDestroy(from));
    GPU_MUST(cudaEventDestroy(to));
    GPU_MUST(cudaStreamDestroy(stream));
    return gpu_median(times, REPEATS);
}

static kvl_cuda_rotation make_rotation(void)
{
    const size_t n = (size_t)N_POSITIONS * HEAD_DIM / 2;
    float *tables = malloc(2 * n * sizeof *tables);
    if (tables == NULL) exit(1);
    for (size_t i = 0; i < n; i++) {
        const double angle = (double)(i / (HEAD_DIM / 2)) *
                             pow(500000, -2.0 * (double)(i % (HEAD_DIM / 2)) / HEAD_DIM);
        tables[i] = (float)cos(angle);
        tables[n + i] = (float)sin(angle);
    }
    float *device = gpu_memory(2 * n * sizeof *device);
    GPU_MUST(cudaMemcpy(device, tables, 2 * n * sizeof *device, cudaMemcpyHostToDevice));
    free(tables);
    return (kvl_cuda_rotation){device, device + n, HEAD_DIM, 1};
}

static kvl_cuda_page_move *make_moves(uint32_t n, bool turned)
{
    kvl_random random = {3};
    kvl_cuda_page_move moves[N_PAGES];
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t at = (uint32_t)kvl_random_below(&random, i + 1);
        moves[i].from = moves[at].from;
        moves[at].from = i;
        moves[i].to = i;
        moves[i].turn = turned ? (int32_t)kvl_random_below(&random, N_POSITIONS - 1) + 1 : 0;
    }
    kvl_cuda_page_move *device = gpu_memory(n * sizeof *device);
    GPU_MUST(cudaMemcpy(device, moves, n * sizeof *device, cudaMemcpyHostToDevice));
    return device;
}

static void move(void *context, cudaStream_t stream)
{
    GPU_MUST(kvl_cuda_page_moves_launch(context, stream));
}

static void place(void *context, cudaStream_t stream)
{
    GPU_MUST(kvl_cuda_place_launch(context, stream));
}

/* --- whole segments --- */

typedef struct copies {
    kvl_cuda_mover *mover;
    char *device[2];
    char *host[2];
    size_t layer_bytes;
    bool in, out;
} copies;

static void must(kvl_status status, const kvl_error *error)
{
    if (status == KVL_OK) return;
    (void)fprintf(stderr, "%s\n", error->text);
    exit(1);
}

static void copy(void *context, cudaStream_t stream)
{
    copies *c = context;
    kvl_error error;
    /* The clock's first event is on `stream`, so both ways begin behind it. */
    GPU_MUST(cudaStreamSynchronize(stream));
    for (size_t layer = 0; layer < N_LAYERS; layer++) {
        const size_t at = layer * c->layer_bytes;
        if (c->in)
            must(kvl_cuda_mover_load(c->mover, c->device[0] + at, c->host[0] + at, c->layer_bytes,
                                     true, &error),
                 &error);
        if (c->out)
            must(kvl_cuda_mover_store(c->mover, c->host[1] + at, c->device[1] + at, c->layer_bytes,
                                      true, stream, &error),
                 &error);
    }
    must(kvl_cuda_mover_order(c->mover, stream, &error), &error);
    if (c->out) must(kvl_cuda_mover_finish(c->mover, &error), &error);
}

static double segment_rate(copies *c, bool in, bool out)
{
    c->in = in;
    c->out = out;
    const double bytes = (double)c->layer_bytes * N_LAYERS;
    return bytes / median_seconds(copy, c) / 1e9;
}

typedef struct figures {
    double gather, gather_rotate, host_pages[3], place_bf16, place_int8, load, store, both;
} figures;

static void measure_device(figures *f, const kvl_cuda_rotation *rotation)
{
    const size_t n_bytes = (size_t)N_LAYERS * N_PAGES * PAGE_BYTES;
    kvl_cuda_page_moves moves = {.from = gpu_memory(n_bytes),
                                 .to = gpu_memory(n_bytes),
                                 .moves = make_moves(N_PAGES, true),
                                 .rotation = *rotation,
                                 .n_moves = N_PAGES,
                                 .n_layers = N_LAYERS,
                                 .n_from_pages = N_PAGES,
                                 .n_to_pages = N_PAGES,
                                 .n_kv_heads = N_KV_HEADS,
                                 .head_dim = HEAD_DIM};
    gpu_fill_bf16((void *)(uintptr_t)moves.from, n_bytes / 2, 1.0F, 5, NULL);
    f->gather_rotate = 2.0 * (double)n_bytes / median_seconds(move, &moves) / 1e12;
    moves.moves = make_moves(N_PAGES, false);
    f->gather = 2.0 * (double)n_bytes / median_seconds(move, &moves) / 1e12;

    /* The same memory as a segment of 4096 tokens by 32 layers laid end to end. */
    const uint32_t n_tokens = N_LAYERS * N_PAGES * 16;
    uint32_t *numbers = malloc(n_tokens * sizeof *numbers);
    if (numbers == NULL) exit(1);
    for (uint32_t i = 0; i < n_tokens; i++) numbers[i] = i % N_POSITIONS;
    uint32_t *positions = gpu_memory(n_tokens * sizeof *positions);
    GPU_MUST(cudaMemcpy(positions, numbers, n_tokens * sizeof *numbers, cudaMemcpyHostToDevice));
    for (uint32_t i = 0; i < n_tokens; i++)
        numbers[i] = (i / 16 * 37 % (n_tokens / 16)) * 16 + i % 16;
    uint32_t *slots = gpu_memory(n_tokens * sizeof *slots);
    GPU_MUST(cudaMemcpy(slots, numbers, n_tokens * sizeof *numbers, cudaMemcpyHostToDevice));
    free(numbers);
    kvl_cuda_place segment = {.block = moves.from,
                              .positions = positions,
                              .slots = slots,
                              .pages = moves.to,
                              .rotation = *rotation,
                              .format = KVL_CUDA_BF16,
                              .block_tokens = n_tokens,
                              .n_tokens = n_tokens,
                              .n_kv_heads = N_KV_HEADS,
                              .head_dim = HEAD_DIM};
    f->place_bf16 = 2.0 * (double)n_bytes / median_seconds(place, &segment) / 1e12;
    segment.format = KVL_CUDA_INT8;
    segment.block_tokens = segment.n_tokens = n_tokens / 2;
    const double half = (double)n_bytes / 2;
    f->place_int8 =
        (half + half / 2 * (1 + 2.0 / HEAD_DIM)) / median_seconds(place, &segment) / 1e12;
    GPU_MUST(cudaFree((void *)(uintptr_t)moves.from));
    GPU_MUST(cudaFree(moves.to));
}

static void measure_host_pages(figures *f, const kvl_cuda_rotation *rotation)
{
    static const uint32_t blocks[] = {8, 16, 32};
    const size_t n_bytes = (size_t)N_LAYERS * N_HOST_PAGES * PAGE_BYTES;
    void *host = NULL;
    GPU_MUST(cudaMallocHost(&host, n_bytes));
    memset(host, 0x3c, n_bytes);
    kvl_cuda_page_moves moves = {.from = host,
                                 .to = gpu_memory(n_bytes),
                                 .moves = make_moves(N_HOST_PAGES, true),
                                 .rotation = *rotation,
                                 .n_moves = N_HOST_PAGES,
                                 .n_layers = N_LAYERS,
                                 .n_from_pages = N_HOST_PAGES,
                                 .n_to_pages = N_HOST_PAGES,
                                 .n_kv_heads = N_KV_HEADS,
                                 .head_dim = HEAD_DIM};
    for (int i = 0; i < 3; i++) {
        moves.n_blocks = blocks[i];
        f->host_pages[i] = (double)n_bytes / median_seconds(move, &moves) / 1e9;
    }
    GPU_MUST(cudaFreeHost(host));
    GPU_MUST(cudaFree(moves.to));
}

static void measure_segments(figures *f)
{
    kvl_error error;
    copies c = {.layer_bytes = (size_t)8 << 20};
    must(kvl_cuda_mover_create(4, (size_t)8 << 20, &c.mover, &error), &error);
    for (int i = 0; i < 2; i++) {
        void *host = NULL;
        GPU_MUST(cudaMallocHost(&host, N_LAYERS * c.layer_bytes));
        memset(host, 0x3c, N_LAYERS * c.layer_bytes);
        c.host[i] = host;
        c.device[i] = gpu_memory(N_LAYERS * c.layer_bytes);
    }
    f->load = segment_rate(&c, true, false);
    f->store = segment_rate(&c, false, true);
    f->both = segment_rate(&c, true, true);
    kvl_cuda_mover_destroy(c.mover);
}

int main(int argc, char **argv)
{
    gpu_print_head("gpu-moves", argc, argv);
    figures f = {0};
    const kvl_cuda_rotation rotation = make_rotation();
    measure_device(&f, &rotation);
    measure_host_pages(&f, &rotation);
    measure_segments(&f);
    printf("  \"rows\": [\n"
           "    {\"what\": \"gather of 512 MiB of pages\", \"tbps\": %.2f},\n"
           "    {\"what\": \"the same, keys rotated\", \"tbps\": %.2f},\n"
           "    {\"what\": \"segment to rotated pages, bf16\", \"tbps\": %.2f},\n"
           "    {\"what\": \"segment to rotated pages, int8\", \"tbps\": %.2f},\n",
           f.gather, f.gather_rotate, f.place_bf16, f.place_int8);
    printf("    {\"what\": \"pages from pinned host memory, rotated\", \"blocks\": [8, 16, 32], "
           "\"gbps\": [%.1f, %.1f, %.1f]},\n"
           "    {\"what\": \"segment of 256 MiB by layers\", \"load_gbps\": %.1f, "
           "\"store_gbps\": %.1f, \"both_each_gbps\": %.1f}\n  ],\n",
           f.host_pages[0], f.host_pages[1], f.host_pages[2], f.load, f.store, f.both);
    printf("  \"figures\": {\"gather_rotate_tbps\": %.2f, \"host_pages_gbps\": %.1f, "
           "\"segment_load_gbps\": %.1f, \"segment_both_ways_gbps\": %.1f}\n}\n",
           f.gather_rotate, f.host_pages[2], f.load, f.both);
    return 0;
}
