/* gpu_model.c: a whole model of the shape of Llama-3.1-8B on the CUDA backend: prefill, decoding
 * with a shared prefix, selective recompute with KV streaming in.
 *
 *   gpu-model [--json] [--random-weights llama-8b] [--torch MS,MS,MS] [--torch-attention MS,MS,MS]
 *
 * Random bf16 weights of the right sizes; the walk over the layers is that of forward/, all rows in
 * one cut, through the backend's table of operations. Milliseconds of the host's clock from the
 * first call to the logits, median after warm-up. torch: eager prefill of the same shape; given by
 * --torch it was measured beside (tests/bench/peer_torch_prefill.py), otherwise it is what an H100
 * 80GB HBM3 took on 2026-11-24. Ratios of attention need --torch-attention.
 * Selective recompute: layer 0 and the keys and values of layer 1 for all tokens, the rest for 15 %
 * of them, chosen at random and the last one; KV of layers 2 to 31 comes from pinned memory and is
 * rotated into pages. Choosing tokens by their deviation is not part of it. */
#include "attention/attention.h"
#include "base/alloc.h"
#include "base/clock.h"
#include "base/random.h"
#include "cuda/backend.h"
#include "cuda/mover.h"
#include "cuda/moves.h"
#include "gpu_support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    N_LAYERS = 32,
    N_HEADS = 32,
    N_KV_HEADS = 8,
    HEAD_DIM = 128,
    WIDTH = N_HEADS * HEAD_DIM,
    KV_WIDTH = N_KV_HEADS * HEAD_DIM,
    FEED_FORWARD = 14336,
    N_VOCAB = 128256,
    N_POSITIONS = 16384 + 128,
    ROWS_MAX = 8192,
    SUFFIX = 128,
    SHARED_BATCH = 512,
    FULL_LAYERS = 2,
    WARM_UP = 2,
    REPEATS_MAX = 20,
    WEIGHT_STRIDE = 64, /* numbers: matrices overlap, each at an address of its own */
};

typedef struct layer {
    kvl_matrix query, key, value, output, gate, up, down;
} layer;

typedef struct bench {
    kvl_pool *threads;
    kvl_backend *backend;
    const kvl_backend_ops *ops;
    kvl_rotation *rotation;
    kvl_cuda_rotation tables; /* the same on the device */
    uint16_t *weights;        /* random bf16 */
    layer layers[N_LAYERS];
    kvl_matrix vocabulary;
    float *norm;
    float *stream, *normed, *queries, *keys, *values, *attended, *gate, *up, *logits;
    kvl_attention_plan *plan;
    uint32_t tokens[ROWS_MAX], positions[ROWS_MAX], slots[ROWS_MAX], kept[ROWS_MAX];
} bench;

/* Rows of one step, and the KV that they see. */
typedef struct batch {
    kvl_pages pages;
    uint32_t n_paths;
    uint32_t *ids;
    kvl_attention_path *paths;
    kvl_attention_row *rows;
    uint32_t n_rows;
} batch;

static void must(kvl_status status, const kvl_error *error)
{
    if (status == KVL_OK) return;
    (void)fprintf(stderr, "%s\n", error->text);
    exit(1);
}

static void *must_alloc(size_t n_bytes)
{
    void *memory = kvl_alloc_aligned(n_bytes);
    if (memory == NULL) exit(1);
    return memory;
}

/* --- the model --- */

static void make_weights(bench *b)
{
    const size_t n = (size_t)N_VOCAB * WIDTH + (size_t)N_LAYERS * 8 * WEIGHT_STRIDE;
    b->weights = must_alloc(n * sizeof *b->weights);
    kvl_random random = {17};
    for (size_t i = 0; i < n; i += 4) {
        const uint64_t bits = kvl_random_next(&random);
        /* Sign, an exponent of 2^-7 or 2^-6, and a random fraction. */
        for (size_t k = 0; k < 4 && i + k < n; k++) {
            const uint16_t word = (uint16_t)(bits >> 16 * k);
            b->weights[i + k] = (uint16_t)((word & 0x80ff) | 0x3c00);
        }
    }
    uint32_t n_made = 0;
    b->vocabulary =
        (kvl_matrix){b->weights, WIDTH * sizeof(uint16_t), N_VOCAB, WIDTH, KVL_DTYPE_BF16};
    for (uint32_t l = 0; l < N_LAYERS; l++) {
        layer *y = &b->layers[l];
        const struct {
            kvl_matrix *matrix;
            uint32_t n_outputs, n_inputs;
        } wanted[] = {{&y->query, WIDTH, WIDTH},       {&y->key, KV_WIDTH, WIDTH},
                      {&y->value, KV_WIDTH, WIDTH},    {&y->output, WIDTH, WIDTH},
                      {&y->gate, FEED_FORWARD, WIDTH}, {&y->up, FEED_FORWARD, WIDTH},
                      {&y->down, WIDTH, FEED_FORWARD}};
        for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
            *wanted[i].matrix =
                (kvl_matrix){b->weights + ++n_made * (size_t)WEIGHT_STRIDE,
                             wanted[i].n_inputs * sizeof(uint16_t), wanted[i].n_outputs,
                             wanted[i].n_inputs, KVL_DTYPE_BF16};
    }
}

static void load_weights(bench *b)
{
    kvl_error error;
    must(b->ops->weights_load(b->backend, &b->vocabulary, &error), &error);
    for (uint32_t l = 0; l < N_LAYERS; l++) {
        const layer *y = &b->layers[l];
        const kvl_matrix *const all[] = {&y->query, &y->key, &y->value, &y->output,
                                         &y->gate,  &y->up,  &y->down};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
            must(b->ops->weights_load(b->backend, all[i], &error), &error);
    }
}

static void make_rotation(bench *b)
{
    double frequencies[HEAD_DIM / 2];
    for (uint32_t j = 0; j < HEAD_DIM / 2; j++) frequencies[j] = pow(500000, -2.0 * j / HEAD_DIM);
    kvl_error error;
    must(kvl_rotation_create(frequencies, HEAD_DIM, N_POSITIONS, KVL_PAIRS_HALVES, &b->rotation,
                             &error),
         &error);
    const size_t n = (size_t)N_POSITIONS * HEAD_DIM / 2;
    float *tables = gpu_memory(2 * n * sizeof *tables);
    GPU_MUST(cudaMemcpy(tables, b->rotation->cosines, n * sizeof *tables, cudaMemcpyHostToDevice));
    GPU_MUST(
        cudaMemcpy(tables + n, b->rotation->sines, n * sizeof *tables, cudaMemcpyHostToDevice));
    b->tables = (kvl_cuda_rotation){tables, tables + n, HEAD_DIM, 1};
}

static float *activations(bench *b, size_t width)
{
    float *memory = b->ops->memory_create(b->backend, ROWS_MAX * width * sizeof(float));
    if (memory == NULL) exit(1);
    return memory;
}

static bench *make_bench(void)
{
    bench *b = must_alloc(sizeof *b);
    memset(b, 0, sizeof *b);
    kvl_error error;
    must(kvl_pool_create(0, false, &b->threads, &error), &error);
    must(kvl_backend_cuda_create(b->threads, 0, &b->backend, &error), &error);
    b->ops = b->backend->ops;
    must(kvl_attention_plan_create(&b->plan, &error), &error);
    make_rotation(b);
    make_weights(b);
    load_weights(b);
    b->norm = must_alloc(WIDTH * sizeof *b->norm);
    for (uint32_t i = 0; i < WIDTH; i++) b->norm[i] = 1.0F;
    b->stream = activations(b, WIDTH);
    b->normed = activations(b, WIDTH);
    b->queries = activations(b, WIDTH);
    b->keys = activations(b, KV_WIDTH);
    b->values = activations(b, KV_WIDTH);
    b->attended = activations(b, WIDTH);
    b->gate = activations(b, FEED_FORWARD);
    b->up = activations(b, FEED_FORWARD);
    b->logits = b->ops->memory_create(b->backend, (size_t)SHARED_BATCH * N_VOCAB * sizeof(float));
    if (b->logits == NULL) exit(1);
    for (uint32_t i = 0; i < ROWS_MAX; i++) b->tokens[i] = i * 7919 % N_VOCAB;
    return b;
}

/* --- one step --- */

/* Keys and values, and queries where the rows go on. */
static void project(bench *b, const batch *t, uint32_t l, bool with_queries)
{
    const kvl_backend_ops *ops = b->ops;
    kvl_backend *k = b->backend;
    const layer *y = &b->layers[l];
    ops->rms_norm(k, t->n_rows, WIDTH, b->stream, b->norm, 1e-5F, b->normed);
    const kvl_matmul_job inputs[] = {{&y->key, NULL, b->keys, false},
                                     {&y->value, NULL, b->values, false},
                                     {&y->query, NULL, b->queries, false}};
    ops->matmul(k, inputs, with_queries ? 3 : 2, t->n_rows, b->normed);
    ops->rotate(k, b->rotation, t->n_rows, b->positions, N_KV_HEADS, HEAD_DIM, b->keys);
    ops->pages_write(k, &t->pages, l, t->n_rows, b->slots, b->keys, b->values);
}

static void attend_and_gate(bench *b, const batch *t, uint32_t l)
{
    const kvl_backend_ops *ops = b->ops;
    kvl_backend *k = b->backend;
    const layer *y = &b->layers[l];
    const uint32_t n = t->n_rows;
    ops->rotate(k, b->rotation, n, b->positions, N_HEADS, HEAD_DIM, b->queries);
    kvl_attention_run(b->plan, k, &t->pages, l, N_HEADS, b->queries, b->attended);
    const kvl_matmul_job output = {&y->output, NULL, b->stream, true};
    ops->matmul(k, &output, 1, n, b->attended);
    ops->rms_norm(k, n, WIDTH, b->stream, b->norm, 1e-5F, b->normed);
    const kvl_matmul_job gated[] = {{&y->gate, NULL, b->gate, false}, {&y->up, NULL, b->up, false}};
    ops->matmul(k, gated, 2, n, b->normed);
    ops->silu_multiply(k, (size_t)n * FEED_FORWARD, b->gate, b->up);
    const kvl_matmul_job down = {&y->down, NULL, b->stream, true};
    ops->matmul(k, &down, 1, n, b->gate);
}

static void walk_layer(bench *b, const batch *t, uint32_t l)
{
    project(b, t, l, true);
    attend_and_gate(b, t, l);
}

/* Plans the rows of the batch and says where their KV goes. */
static void plan(bench *b, const batch *t)
{
    kvl_error error;
    for (uint32_t i = 0; i < t->n_rows; i++) {
        const kvl_attention_row *row = &t->rows[i];
        b->positions[i] = row->position;
        b->slots[i] = t->paths[row->path].pages[row->position / KVL_PAGE_TOKENS] * KVL_PAGE_TOKENS +
                      row->position % KVL_PAGE_TOKENS;
    }
    must(kvl_attention_plan_make(b->plan, t->rows, t->n_rows, t->paths, t->n_paths, &error),
         &error);
}

/* Logits of the last n_logits rows. */
static void finish(bench *b, uint32_t n_rows, uint32_t n_logits)
{
    for (uint32_t i = 0; i < n_logits; i++) b->kept[i] = n_rows - n_logits + i;
    b->ops->rows_keep(b->backend, n_logits, WIDTH, b->kept, b->stream);
    b->ops->rms_norm(b->backend, n_logits, WIDTH, b->stream, b->norm, 1e-5F, b->normed);
    const kvl_matmul_job job = {&b->vocabulary, NULL, b->logits, false};
    b->ops->matmul(b->backend, &job, 1, n_logits, b->normed);
    b->ops->synchronize(b->backend);
}

static double step_ms(bench *b, const batch *t, uint32_t n_logits)
{
    const int64_t from = kvl_clock_now(kvl_clock_system());
    plan(b, t);
    b->ops->embed(b->backend, &b->vocabulary, t->n_rows, b->tokens, b->stream);
    for (uint32_t l = 0; l < N_LAYERS; l++) walk_layer(b, t, l);
    finish(b, t->n_rows, n_logits);
    return kvl_ns_to_ms(kvl_clock_now(kvl_clock_system()) - from);
}

static double median_step_ms(bench *b, const batch *t, uint32_t n_logits, uint32_t n_repeats)
{
    double times[REPEATS_MAX];
    for (uint32_t i = 0; i < n_repeats + WARM_UP; i++) {
        const double ms = step_ms(b, t, n_logits);
        if (i >= WARM_UP) times[i - WARM_UP] = ms;
    }
    return gpu_median(times, n_repeats);
}

/* Attention alone, of one layer: all layers one after the other, over their number. */
static double attention_ms(bench *b, const batch *t)
{
    double times[REPEATS_MAX];
    plan(b, t);
    for (uint32_t i = 0; i < REPEATS_MAX; i++) {
        b->ops->synchronize(b->backend);
        const int64_t from = kvl_clock_now(kvl_clock_system());
        for (uint32_t l = 0; l < N_LAYERS; l++)
            kvl_attention_run(b->plan, b->backend, &t->pages, l, N_HEADS, b->queries, b->attended);
        b->ops->synchronize(b->backend);
        times[i] = kvl_ns_to_ms(kvl_clock_now(kvl_clock_system()) - from) / N_LAYERS;
    }
    return gpu_median(times, REPEATS_MAX);
}

/* --- batches --- */

static void make_pages(bench *b, batch *t, uint32_t n_pages)
{
    t->pages = (kvl_pages){NULL, N_LAYERS, n_pages, N_KV_HEADS, HEAD_DIM};
    const size_t n_numbers = (size_t)N_LAYERS * n_pages * kvl_pages_page_floats(&t->pages);
    t->pages.memory = b->ops->memory_create(b->backend, n_numbers * sizeof(uint16_t));
    if (t->pages.memory == NULL) exit(1);
    gpu_fill_bf16(t->pages.memory, n_numbers, 1.0F, 23, kvl_cuda_backend_stream(b->backend));
}

/* n_requests of prefix and suffix; `shared`: the prefix's pages are the same. The rows are each
 * request's last token, or (one request) all of its tokens. */
static batch make_batch(bench *b, uint32_t n_requests, uint32_t prefix, uint32_t suffix,
                        bool shared, bool all_rows)
{
    const uint32_t each = (prefix + suffix) / KVL_PAGE_TOKENS;
    const uint32_t n_shared = shared ? prefix / KVL_PAGE_TOKENS : 0;
    batch t = {.n_paths = n_requests, .n_rows = all_rows ? prefix + suffix : n_requests};
    t.ids = must_alloc((size_t)n_requests * each * sizeof *t.ids);
    t.paths = must_alloc(n_requests * sizeof *t.paths);
    t.rows = must_alloc(t.n_rows * sizeof *t.rows);
    uint32_t next = n_shared;
    for (uint32_t r = 0; r < n_requests; r++) {
        uint32_t *ids = t.ids + (size_t)r * each;
        for (uint32_t i = 0; i < each; i++) ids[i] = i < n_shared ? i : next++;
        t.paths[r] = (kvl_attention_path){ids, prefix + suffix};
        if (!all_rows) t.rows[r] = (kvl_attention_row){r, prefix + suffix - 1};
    }
    for (uint32_t i = 0; all_rows && i < t.n_rows; i++) t.rows[i] = (kvl_attention_row){0, i};
    make_pages(b, &t, next);
    return t;
}

static void free_batch(bench *b, batch *t)
{
    b->ops->memory_destroy(b->backend, t->pages.memory);
    kvl_free(t->ids);
    kvl_free(t->paths);
    kvl_free(t->rows);
}

/* --- selective recompute --- */

typedef struct blend {
    kvl_cuda_mover *mover;
    char *host; /* pinned: a block a layer */
    char *device;
    size_t block_bytes;
    cudaEvent_t loaded[N_LAYERS];
    uint32_t *positions, *slots; /* of all tokens, on the device */
    batch few;                   /* the rows that are recomputed; pages are the full batch's */
} blend;

static blend make_blend(const batch *full, kvl_random *random)
{
    const uint32_t n = full->n_rows;
    blend d = {.block_bytes = (size_t)2 * n * KV_WIDTH * sizeof(uint16_t), .few = *full};
    kvl_error error;
    must(kvl_cuda_mover_create(2, 1 << 20, &d.mover, &error), &error);
    for (uint32_t l = 0; l < N_LAYERS; l++)
        GPU_MUST(cudaEventCreateWithFlags(&d.loaded[l], cudaEventDisableTiming));
    const size_t n_bytes = N_LAYERS * d.block_bytes;
    void *host = NULL;
    GPU_MUST(cudaMallocHost(&host, n_bytes));
    d.host = host;
    d.device = gpu_memory(n_bytes);
    gpu_fill_bf16(d.device, n_bytes / 2, 1.0F, 29, NULL);
    GPU_MUST(cudaMemcpy(d.host, d.device, n_bytes, cudaMemcpyDeviceToHost));
    uint32_t *numbers = must_alloc(n * sizeof *numbers);
    for (uint32_t i = 0; i < n; i++) numbers[i] = i;
    d.positions = gpu_memory(n * sizeof *numbers);
    d.slots = gpu_memory(n * sizeof *numbers);
    GPU_MUST(cudaMemcpy(d.positions, numbers, n * sizeof *numbers, cudaMemcpyHostToDevice));
    for (uint32_t i = 0; i < n; i++)
        numbers[i] = full->ids[i / KVL_PAGE_TOKENS] * KVL_PAGE_TOKENS + i % KVL_PAGE_TOKENS;
    GPU_MUST(cudaMemcpy(d.slots, numbers, n * sizeof *numbers, cudaMemcpyHostToDevice));
    kvl_free(numbers);
    /* One random token of each stretch of 100 / 15, and the last. */
    d.few.rows = must_alloc(n * sizeof *d.few.rows);
    d.few.n_rows = n * 15 / 100;
    for (uint32_t i = 0; i < d.few.n_rows; i++) {
        const uint32_t first = i * 20 / 3;
        const uint32_t past = (i + 1) * 20 / 3;
        d.few.rows[i].path = 0;
        d.few.rows[i].position = first + (uint32_t)kvl_random_below(random, past - first);
    }
    d.few.rows[d.few.n_rows - 1].position = n - 1;
    return d;
}

static void free_blend(blend *d)
{
    kvl_cuda_mover_destroy(d->mover);
    for (uint32_t l = 0; l < N_LAYERS; l++) GPU_MUST(cudaEventDestroy(d->loaded[l]));
    GPU_MUST(cudaFreeHost(d->host));
    GPU_MUST(cudaFree(d->device));
    GPU_MUST(cudaFree(d->positions));
    GPU_MUST(cudaFree(d->slots));
    kvl_free(d->few.rows);
}

/* Asks for the KV of all layers from the first; nobody waits yet. */
static void ask_layers(const blend *d, uint32_t first)
{
    kvl_error error;
    for (uint32_t l = first; l < N_LAYERS; l++) {
        must(kvl_cuda_mover_load(d->mover, d->device + l * d->block_bytes,
                                 d->host + l * d->block_bytes, d->block_bytes, true, &error),
             &error);
        must(kvl_cuda_mover_mark(d->mover, d->loaded[l], &error), &error);
    }
}

/* KV of one layer into pages; the backend's stream waits for it, not the host. */
static void stream_layer(bench *b, const blend *d, const batch *full, uint32_t l, bool load)
{
    cudaStream_t stream = kvl_cuda_backend_stream(b->backend);
    char *device = d->device + l * d->block_bytes;
    if (load) GPU_MUST(cudaStreamWaitEvent(stream, d->loaded[l], 0));
    const size_t page_bytes = kvl_pages_page_floats(&full->pages) * sizeof(uint16_t);
    const kvl_cuda_place place = {.block = device,
                                  .positions = d->positions,
                                  .slots = d->slots,
                                  .pages = (char *)(void *)full->pages.memory +
                                           l * full->pages.n_pages * page_bytes,
                                  .rotation = b->tables,
                                  .format = KVL_CUDA_BF16,
                                  .block_tokens = full->n_rows,
                                  .n_tokens = full->n_rows,
                                  .n_kv_heads = N_KV_HEADS,
                                  .head_dim = HEAD_DIM};
    GPU_MUST(kvl_cuda_place_launch(&place, stream));
}

/* The last full layer: keys and values of all tokens, by which the few would be chosen; nobody
 * reads what else it makes of the others. Returns the few. */
static const batch *narrow_down(bench *b, const blend *d, const batch *full, uint32_t l)
{
    const batch *few = &d->few;
    project(b, full, l, false);
    for (uint32_t i = 0; i < few->n_rows; i++) b->kept[i] = few->rows[i].position;
    b->ops->rows_keep(b->backend, few->n_rows, WIDTH, b->kept, b->stream);
    b->ops->rows_keep(b->backend, few->n_rows, WIDTH, b->kept, b->normed);
    plan(b, few);
    const kvl_matmul_job queries = {&b->layers[l].query, NULL, b->queries, false};
    b->ops->matmul(b->backend, &queries, 1, few->n_rows, b->normed);
    attend_and_gate(b, few, l);
    return few;
}

/* n_full layers for all tokens, the others for few; `load`: the KV comes from the host, otherwise
 * it is on the device already. */
static double blend_ms(bench *b, const blend *d, const batch *full, uint32_t n_full, bool load)
{
    const int64_t from = kvl_clock_now(kvl_clock_system());
    const batch *t = n_full > 0 ? full : &d->few;
    if (load) ask_layers(d, n_full);
    plan(b, t);
    b->ops->embed(b->backend, &b->vocabulary, t->n_rows, b->tokens, b->stream);
    for (uint32_t l = 0; l < N_LAYERS; l++) {
        if (l >= n_full) stream_layer(b, d, full, l, load);
        if (l + 1 == n_full) {
            t = narrow_down(b, d, full, l);
        } else {
            walk_layer(b, t, l);
        }
    }
    finish(b, t->n_rows, 1);
    return kvl_ns_to_ms(kvl_clock_now(kvl_clock_system()) - from);
}

static double load_ms(const blend *d)
{
    kvl_error error;
    const int64_t from = kvl_clock_now(kvl_clock_system());
    ask_layers(d, FULL_LAYERS);
    must(kvl_cuda_mover_finish(d->mover, &error), &error);
    return kvl_ns_to_ms(kvl_clock_now(kvl_clock_system()) - from);
}

typedef struct blended {
    double ttft, resident, load, few_only;
} blended;

static blended measure_blend(bench *b, const batch *full, uint32_t n_repeats)
{
    kvl_random random = {31};
    blend d = make_blend(full, &random);
    double times[4][REPEATS_MAX];
    for (uint32_t i = 0; i < n_repeats + WARM_UP; i++) {
        const uint32_t at = i < WARM_UP ? 0 : i - WARM_UP;
        times[0][at] = blend_ms(b, &d, full, FULL_LAYERS, true);
        times[1][at] = blend_ms(b, &d, full, FULL_LAYERS, false);
        times[2][at] = load_ms(&d);
        times[3][at] = blend_ms(b, &d, full, 0, true);
    }
    free_blend(&d);
    return (blended){gpu_median(times[0], n_repeats), gpu_median(times[1], n_repeats),
                     gpu_median(times[2], n_repeats), gpu_median(times[3], n_repeats)};
}

/* --- report --- */

typedef struct prompt {
    uint32_t n_tokens;
    double torch_ms;
    double torch_attention_ms; /* 0: not measured */
} prompt;

static prompt prompts[] = {{1024, 29.5, 0}, {4096, 122.2, 0}, {8192, 273.6, 0}};
enum { N_PROMPTS = sizeof prompts / sizeof *prompts };

/* Three numbers with commas between. */
static void parse_times(const char *text, double times[N_PROMPTS])
{
    for (uint32_t i = 0; i < N_PROMPTS; i++) {
        char *end = NULL;
        times[i] = strtod(text, &end);
        if (end == text || !(times[i] > 0) || *end != (i + 1 < N_PROMPTS ? ',' : '\0')) {
            (void)fprintf(stderr, "%s: three numbers with commas between are wanted\n", text);
            exit(2);
        }
        text = end + 1;
    }
}

static void report_prompts(bench *b, double (*figures)[N_PROMPTS])
{
    for (uint32_t i = 0; i < N_PROMPTS; i++) {
        const prompt *p = &prompts[i];
        const uint32_t n_repeats = p->n_tokens > 4096 ? 10 : REPEATS_MAX;
        batch full = make_batch(b, 1, p->n_tokens, 0, false, true);
        const double ms = median_step_ms(b, &full, 1, n_repeats);
        const double attention = attention_ms(b, &full);
        const blended d = measure_blend(b, &full, n_repeats);
        const double overlap = d.ttft / (d.load > d.resident ? d.load : d.resident);
        printf("    {\"what\": \"prefill\", \"tokens\": %u, \"ms\": %.2f, \"torch_ms\": %.1f, "
               "\"attention_ms_a_layer\": %.3f, \"torch_attention_ms\": %.3f},\n"
               "    {\"what\": \"recompute 15 %%\", \"tokens\": %u, \"ttft_ms\": %.2f, "
               "\"resident_ms\": %.2f, \"load_ms\": %.2f, \"no_full_layer_ms\": %.2f},\n",
               p->n_tokens, ms, p->torch_ms, attention, p->torch_attention_ms, p->n_tokens, d.ttft,
               d.resident, d.load, d.few_only);
        (void)fflush(stdout);
        figures[0][i] = p->torch_ms / ms;
        figures[1][i] = ms / d.ttft;
        figures[2][i] = overlap;
        figures[3][i] = p->torch_attention_ms / attention;
        free_batch(b, &full);
    }
}

/* Tokens per second of a decode step. */
static double report_decode(bench *b, uint32_t n_requests, uint32_t prefix, bool shared)
{
    batch t = make_batch(b, n_requests, prefix, SUFFIX, shared, false);
    const double ms = median_step_ms(b, &t, n_requests, 10);
    printf("    {\"what\": \"decode step\", \"requests\": %u, \"prefix\": %u, \"shared\": %s, "
           "\"ms\": %.2f, \"tokens_per_s\": %.0f},\n",
           n_requests, prefix, shared ? "true" : "false", ms, n_requests / ms * 1000);
    (void)fflush(stdout);
    free_batch(b, &t);
    return n_requests / ms * 1000;
}

static void parse(int argc, char **argv)
{
    double times[N_PROMPTS];
    for (int i = 1; i < argc; i++) {
        const bool more = i + 1 < argc;
        if (strcmp(argv[i], "--json") == 0) continue;
        if (more && strcmp(argv[i], "--random-weights") == 0 &&
            strcmp(argv[i + 1], "llama-8b") == 0) {
            i++;
        } else if (more && strcmp(argv[i], "--torch") == 0) {
            parse_times(argv[++i], times);
            for (uint32_t k = 0; k < N_PROMPTS; k++) prompts[k].torch_ms = times[k];
        } else if (more && strcmp(argv[i], "--torch-attention") == 0) {
            parse_times(argv[++i], times);
            for (uint32_t k = 0; k < N_PROMPTS; k++) prompts[k].torch_attention_ms = times[k];
        } else {
            (void)fprintf(stderr, "usage: gpu-model [--json] [--random-weights llama-8b]\n"
                                  "       [--torch MS,MS,MS] [--torch-attention MS,MS,MS]\n");
            exit(2);
        }
    }
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    gpu_print_head("gpu-model", argc, argv);
    bench *b = make_bench();
    double f[4][N_PROMPTS];
    printf("  \"rows\": [\n");
    report_prompts(b, f);
    const double short_rate = report_decode(b, SHARED_BATCH, 1024, true);
    const double long_rate = report_decode(b, SHARED_BATCH, 16384, true);
    const double unshared_rate = report_decode(b, 22, 16384, false);
    printf("    {\"what\": \"copy\", \"tbps\": %.2f}\n  ],\n", gpu_copy_rate(NULL) / 1e12);
    double overlap = 0;
    for (uint32_t i = 0; i < N_PROMPTS; i++) overlap = fmax(overlap, f[2][i]);
    printf("  \"figures\": {\"prefill_vs_torch_1k\": %.3f, \"prefill_vs_torch_4k\": %.3f, "
           "\"prefill_vs_torch_8k\": %.3f, \"throughput_drop_1k_16k\": %.3f, "
           "\"blend15_speedup_1k\": %.2f, \"blend15_speedup_4k\": %.2f, "
           "\"blend15_speedup_8k\": %.2f, \"fused_overlap_ratio\": %.3f, "
           "\"shared_vs_unshared_16k\": %.1f, \"attention_vs_torch_flash_4k\": %.2f}\n}\n",
           f[0][0], f[0][1], f[0][2], 1 - long_rate / short_rate, f[1][0], f[1][1], f[1][2],
           overlap, long_rate / unshared_rate, f[3][1]);
    return 0;
}
