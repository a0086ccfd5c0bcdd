/* gpu_attention.c: decoding with a shared prefix, beside its roof, the best peer and no sharing.
 *
 *   gpu-attention [--json] [--variant N] [--repeats N] [--cell N] [--no-unshared]
 *                 [--requests N] [--prefix N] [--suffix N]
 *
 * 32 query heads, 8 KV heads, dimension 128, bf16; B requests share P tokens and have 128 of
 * their own. A CUDA graph of 8 layers with different KV, in pages in random order, the
 * second-level cache flushed before each replay; median of the replays, divided by 8. Rows of
 * every cell are compared with a reference in double. Roof: max(bytes / 3.0 TB/s, operations /
 * 800 TFLOP/s), bytes (P + 128 B) 4096 and queries and results.
 * Peers: the best of FlashInfer 0.6.14 (cascade in every setting, shared-prefix decode, mixes on
 * two streams), FastTree and Hydragen in torch 2.11, measured with the same method on an H100 80GB
 * HBM3 on 2026-11-24, not in this run. */
#include "attention/attention.h"
#include "base/alloc.h"
#include "base/random.h"
#include "cuda/attention.h"
#include "gpu_support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    N_HEADS = 32,
    N_KV_HEADS = 8,
    GROUP = N_HEADS / N_KV_HEADS,
    HEAD_DIM = 128,
    SUFFIX = 128, /* of every request, unless --suffix says otherwise */
    LAYERS = 8,
    PAGE_BYTES = 2 * N_KV_HEADS * 16 * HEAD_DIM * 2,
    ROW_BYTES = N_HEADS * HEAD_DIM * 2,
    CHECKED_ROWS = 12,
};

#define MEMORY_RATE 3.0e12
#define MATRIX_RATE 800e12

typedef struct cell {
    uint32_t n_requests;
    uint32_t prefix;
    double peer_us;
    const char *peer;
} cell;

static const cell cells[] = {
    {8, 1024, 14.4, "FastTree"},
    {32, 1024, 22.0, "FlashInfer fa2 prefix and decode, two streams"},
    {128, 1024, 50.4, "FlashInfer fa3 prefix and decode, two streams"},
    {512, 1024, 128.9, "FlashInfer fa3 prefix and decode, two streams"},
    {8, 4096, 20.4, "FastTree"},
    {32, 4096, 34.5, "FlashInfer fa2 prefix and tensor-core decode, two streams"},
    {128, 4096, 74.2, "FlashInfer fa2 prefix and decode, two streams"},
    {512, 4096, 163.2, "FlashInfer BatchDecodeWithSharedPrefix"},
    {8, 16384, 41.7, "FlashInfer fa2 prefix and tensor-core decode, two streams"},
    {32, 16384, 52.2, "FlashInfer fa2 prefix and decode, two streams"},
    {128, 16384, 146.1, "FlashInfer fa2 prefix and decode, two streams"},
    {512, 16384, 309.6, "FlashInfer BatchDecodeWithSharedPrefix"},
};
enum { N_CELLS = sizeof cells / sizeof *cells, UNSHARED_CELL = N_CELLS - 1 };
/* cuDNN through torch on distinct caches, the best peer without sharing; same source. */
static const double peer_unshared_us = 11129.7;

typedef struct options {
    uint32_t variant;
    uint32_t n_repeats;
    int cell; /* -1: all */
    uint32_t suffix;
    cell other; /* in place of the cells, where it has requests */
    bool unshared;
} options;

/* One batch: pages of every request, and its memory on the device. */
typedef struct batch {
    uint32_t n_requests;
    uint32_t n_tokens; /* of a request */
    uint32_t n_pages;
    uint32_t n_layers;
    uint32_t *ids; /* [n_requests][n_tokens / 16] */
    kvl_attention_path *paths;
    kvl_attention_row *rows;
    char *kv; /* [n_layers][n_pages] */
    char *queries;
    char *out;
    kvl_attention_plan *plan;
    kvl_cuda_step *step;
} batch;

static void must(kvl_status status, const kvl_error *error)
{
    if (status == KVL_OK) return;
    (void)fprintf(stderr, "%s\n", error->text);
    exit(1);
}

static void *must_alloc(size_t n_bytes)
{
    void *memory = kvl_alloc(n_bytes);
    if (memory == NULL) exit(1);
    return memory;
}

typedef struct listener {
    kvl_backend backend;
    kvl_attend_call call;
} listener;

static void listen(kvl_backend *backend, const kvl_attend_call *call)
{
    ((listener *)(void *)backend)->call = *call;
}

static void plan_batch(batch *b)
{
    static const kvl_backend_ops ops = {.name = "listener", .attend = listen};
    listener l = {.backend = {.ops = &ops}};
    const kvl_pages pages = {NULL, 1, b->n_pages, N_KV_HEADS, HEAD_DIM};
    kvl_error error;
    must(kvl_attention_plan_create(&b->plan, &error), &error);
    must(kvl_cuda_step_create(0, &b->step, &error), &error);
    must(kvl_attention_plan_make(b->plan, b->rows, b->n_requests, b->paths, b->n_requests, &error),
         &error);
    kvl_attention_run(b->plan, &l.backend, &pages, 0, N_HEADS, NULL, NULL);
    must(kvl_cuda_step_make(b->step, &l.call, N_KV_HEADS, HEAD_DIM, NULL, &error), &error);
    GPU_MUST(cudaDeviceSynchronize());
}

static void make_pages(batch *b, uint32_t prefix, bool shared)
{
    const uint32_t each = b->n_tokens / KVL_PAGE_TOKENS;
    const uint32_t prefix_pages = prefix / KVL_PAGE_TOKENS;
    b->n_pages =
        shared ? prefix_pages + b->n_requests * (each - prefix_pages) : b->n_requests * each;
    uint32_t *shuffled = must_alloc(b->n_pages * sizeof *shuffled);
    kvl_random random = {7};
    for (uint32_t i = 0; i < b->n_pages; i++) {
        const uint32_t at = (uint32_t)kvl_random_below(&random, i + 1);
        shuffled[i] = shuffled[at];
        shuffled[at] = i;
    }
    b->ids = must_alloc((size_t)b->n_requests * each * sizeof *b->ids);
    uint32_t next = shared ? prefix_pages : 0;
    for (uint32_t r = 0; r < b->n_requests; r++) {
        uint32_t *ids = b->ids + (size_t)r * each;
        for (uint32_t i = 0; i < each; i++)
            ids[i] = shared && i < prefix_pages ? shuffled[i] : shuffled[next++];
        b->paths[r] = (kvl_attention_path){ids, b->n_tokens};
        b->rows[r] = (kvl_attention_row){r, b->n_tokens - 1};
    }
    kvl_free(shuffled);
}

static batch make_batch(const cell *c, uint32_t suffix, bool shared)
{
    batch b = {.n_requests = c->n_requests,
               .n_tokens = c->prefix + suffix,
               .n_layers = shared ? LAYERS : 1};
    b.paths = must_alloc(b.n_requests * sizeof *b.paths);
    b.rows = must_alloc(b.n_requests * sizeof *b.rows);
    make_pages(&b, c->prefix, shared);
    const size_t kv_bytes = (size_t)b.n_layers * b.n_pages * PAGE_BYTES;
    const size_t row_bytes = (size_t)b.n_layers * b.n_requests * ROW_BYTES;
    b.kv = gpu_memory(kv_bytes);
    b.queries = gpu_memory(row_bytes);
    b.out = gpu_memory(row_bytes);
    gpu_fill_bf16(b.kv, kv_bytes / 2, 1.0F, 11, NULL);
    gpu_fill_bf16(b.queries, row_bytes / 2, 1.0F, 13, NULL);
    GPU_MUST(cudaMemset(b.out, 0xff, row_bytes));
    plan_batch(&b);
    return b;
}

static void free_batch(batch *b)
{
    GPU_MUST(cudaFree(b->kv));
    GPU_MUST(cudaFree(b->queries));
    GPU_MUST(cudaFree(b->out));
    kvl_cuda_step_destroy(b->step);
    kvl_attention_plan_destroy(b->plan);
    kvl_free(b->ids);
    kvl_free(b->paths);
    kvl_free(b->rows);
}

static double time_batch(const batch *b, const options *o, const gpu_flush *flush)
{
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    GPU_MUST(cudaStreamCreate(&stream));
    GPU_MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (uint32_t layer = 0; layer < b->n_layers; layer++) {
        const size_t row_at = (size_t)layer * b->n_requests * ROW_BYTES;
        kvl_error error;
        must(kvl_cuda_step_run(b->step, b->kv + (size_t)layer * b->n_pages * PAGE_BYTES,
                               b->queries + row_at, b->out + row_at, false, o->variant, stream,
                               &error),
             &error);
    }
    GPU_MUST(cudaStreamEndCapture(stream, &graph));
    GPU_MUST(cudaGraphInstantiate(&exec, graph, 0));
    const double ms = gpu_time_graph(exec, flush, o->n_repeats, stream);
    GPU_MUST(cudaGraphExecDestroy(exec));
    GPU_MUST(cudaGraphDestroy(graph));
    GPU_MUST(cudaStreamDestroy(stream));
    return ms * 1000 / b->n_layers;
}

/* --- checking --- */

static double number(const uint16_t *bf16)
{
    const uint32_t bits = (uint32_t)*bf16 << 16;
    float x = 0;
    memcpy(&x, &bits, sizeof x);
    return (double)x;
}

static void *to_host(const void *from, size_t n_bytes)
{
    void *to = must_alloc(n_bytes);
    GPU_MUST(cudaMemcpy(to, from, n_bytes, cudaMemcpyDeviceToHost));
    return to;
}

/* One query head of one request in double: out [HEAD_DIM]. */
static void attend(const batch *b, const char *kv, const uint16_t *query, uint32_t request,
                   uint32_t head, double *out)
{
    double *scores = must_alloc(b->n_tokens * sizeof *scores);
    double top = -INFINITY;
    for (uint32_t half = 0; half < 2; half++) {
        double sum = 0;
        for (uint32_t t = 0; t < b->n_tokens; t++) {
            const uint32_t page = b->paths[request].pages[t / KVL_PAGE_TOKENS];
            const uint16_t *at =
                (const uint16_t *)(const void *)(kv + (size_t)page * PAGE_BYTES) +
                (size_t)(half * N_KV_HEADS + head / GROUP) * KVL_PAGE_TOKENS * HEAD_DIM;
            if (half == 0) scores[t] = 0;
            const double weight = half == 0 ? 0 : exp(scores[t] - top);
            sum += weight;
            for (uint32_t d = 0; d < HEAD_DIM; d++) {
                const double x = number(at + kvl_cuda_page_at(HEAD_DIM, t % KVL_PAGE_TOKENS, d));
                if (half == 0)
                    scores[t] += x * number(query + d) / sqrt(HEAD_DIM);
                else
                    out[d] += weight * x;
            }
            if (half == 0) top = fmax(top, scores[t]);
        }
        for (uint32_t d = 0; d < HEAD_DIM; d++) out[d] = half == 0 ? 0 : out[d] / sum;
    }
    kvl_free(scores);
}

/* ||out - reference|| / ||reference|| over some rows of the first layer. */
static double check(const batch *b)
{
    char *kv = to_host(b->kv, (size_t)b->n_pages * PAGE_BYTES);
    uint16_t *queries = to_host(b->queries, (size_t)b->n_requests * ROW_BYTES);
    uint16_t *out = to_host(b->out, (size_t)b->n_requests * ROW_BYTES);
    double difference = 0;
    double size = 0;
    for (uint32_t i = 0; i < CHECKED_ROWS; i++) {
        const uint32_t request = i * (b->n_requests - 1) / (CHECKED_ROWS - 1);
        const uint32_t head = i * 5 % N_HEADS;
        const size_t at = ((size_t)request * N_HEADS + head) * HEAD_DIM;
        double wanted[HEAD_DIM];
        attend(b, kv, queries + at, request, head, wanted);
        for (uint32_t d = 0; d < HEAD_DIM; d++) {
            const double error = number(out + at + d) - wanted[d];
            difference += error * error;
            size += wanted[d] * wanted[d];
        }
    }
    kvl_free(kv);
    kvl_free(queries);
    kvl_free(out);
    return sqrt(difference / size);
}

/* --- report --- */

static double roof_us(const cell *c, uint32_t suffix)
{
    const double rows = c->n_requests;
    const double bytes = (c->prefix + suffix * rows) * 4096 + 2 * rows * ROW_BYTES;
    const double operations = 4.0 * rows * N_HEADS * (c->prefix + suffix) * HEAD_DIM;
    return 1e6 * fmax(bytes / MEMORY_RATE, operations / MATRIX_RATE);
}

typedef struct figures {
    double log_sum;
    double least;
    double roof_least;
    double shared_us;
    double worst_error;
    uint32_t n;
} figures;

static void run_cell(const cell *c, const options *o, const gpu_flush *flush, figures *f)
{
    batch b = make_batch(c, o->suffix, true);
    const double us = time_batch(&b, o, flush);
    const double error = check(&b);
    const double roof = roof_us(c, o->suffix) / us;
    const double gain = c->peer_us / us;
    const kvl_cuda_plan_view v = kvl_cuda_step_plan(b.step);
    printf("%s    {\"requests\": %u, \"prefix\": %u, \"us\": %.1f, \"roof_us\": %.1f, "
           "\"roof\": %.3f, \"peer_us\": %.1f, \"vs_peer\": %.2f, \"peer\": \"%s\", "
           "\"error\": %.2e, \"works\": [%u, %u], \"merges\": %u, \"slots\": %u}",
           f->n == 0 ? "" : ",\n", c->n_requests, c->prefix, us, roof_us(c, o->suffix), roof,
           c->peer_us, gain, c->peer, error, v.n_matrix, v.n_vectors, v.n_merges, v.n_slots);
    (void)fflush(stdout);
    f->log_sum += log(gain);
    f->n++;
    if (gain < f->least) f->least = gain;
    if (c->n_requests >= 32 && c->prefix >= 4096 && roof < f->roof_least) f->roof_least = roof;
    if (!(error <= f->worst_error)) f->worst_error = error;
    if (c == &cells[UNSHARED_CELL]) f->shared_us = us;
    free_batch(&b);
}

static double run_unshared(const options *o, const gpu_flush *flush, figures *f)
{
    batch b = make_batch(&cells[UNSHARED_CELL], o->suffix, false);
    options few = *o;
    few.n_repeats = 7;
    const double us = time_batch(&b, &few, flush);
    if (f->shared_us <= 0) f->shared_us = INFINITY;
    free_batch(&b);
    return us;
}

static options parse(int argc, char **argv)
{
    options o = {.n_repeats = 25, .cell = -1, .unshared = true, .suffix = SUFFIX};
    o.other.peer = "none";
    for (int i = 1; i < argc; i++) {
        const bool more = i + 1 < argc;
        if (strcmp(argv[i], "--json") == 0) continue;
        if (strcmp(argv[i], "--no-unshared") == 0) {
            o.unshared = false;
        } else if (strcmp(argv[i], "--variant") == 0 && more) {
            o.variant = (uint32_t)strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--repeats") == 0 && more) {
            o.n_repeats = (uint32_t)strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--requests") == 0 && more) {
            o.other.n_requests = (uint32_t)strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--prefix") == 0 && more) {
            o.other.prefix = (uint32_t)strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--suffix") == 0 && more) {
            o.suffix = (uint32_t)strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--cell") == 0 && more) {
            o.cell = (int)strtol(argv[++i], NULL, 10);
        } else {
            (void)fprintf(stderr, "usage: gpu-attention [--json] [--variant N] [--repeats N] "
                                  "[--cell N] [--no-unshared]\n"
                                  "       [--requests N] [--prefix N] [--suffix N]\n");
            exit(2);
        }
    }
    return o;
}

int main(int argc, char **argv)
{
    const options o = parse(argc, argv);
    gpu_print_head("gpu-attention", argc, argv);
    gpu_flush flush = gpu_flush_create();
    figures f = {.least = INFINITY, .roof_least = INFINITY};
    printf("  \"variant\": \"%s\",\n  \"rows\": [\n", kvl_cuda_attention_variant_name(o.variant));
    for (uint32_t i = 0; i < N_CELLS; i++)
        if (o.other.n_requests == 0 && (o.cell < 0 || o.cell == (int)i))
            run_cell(&cells[i], &o, &flush, &f);
    if (o.other.n_requests != 0) run_cell(&o.other, &o, &flush, &f);
    printf("\n  ],\n");
    double own_us = 0;
    if (o.unshared) own_us = run_unshared(&o, &flush, &f);
    const double unshared_us = own_us > 0 && own_us < peer_unshared_us ? own_us : peer_unshared_us;
    printf("  \"unshared_us\": {\"own\": %.1f, \"peer\": %.1f},\n", own_us, peer_unshared_us);
    printf("  \"figures\": {\"vs_best_peer_geomean\": %.3f, \"vs_best_peer_min\": %.3f, "
           "\"roof_min_large\": %.3f, \"vs_unshared_b512_p16k\": %.1f, \"worst_error\": %.2e}\n}\n",
           exp(f.log_sum / (f.n > 0 ? f.n : 1)), f.least, f.roof_least, unshared_us / f.shared_us,
           f.worst_error);
    gpu_flush_destroy(&flush);
    return f.worst_error < 0.01 ? 0 : 1;
}
