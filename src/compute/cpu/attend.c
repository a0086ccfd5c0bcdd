/* compute/cpu/attend.c: shares attention out over threads; copies rows to pages and back.
 *
 * An item is one run of one KV head. A block with one run is finished by the thread that takes it.
 * The runs of a split block write partials to memory; the thread that ends the last of them folds
 * them, so that there is no second loop to wait for. */
#include "compute/cpu/attend.h"

#include "base/alloc.h"

#include <stdatomic.h>
#include <string.h>

/* Beyond this, blocks are not split: there are so many rows and slices then that blocks alone keep
 * the threads busy. */
#define PARTIAL_BYTES_MAX ((size_t)64 << 20)

/* Rows of one item when keys and values are copied: long enough to be worth waking a thread. */
enum { COPY_ROWS = 64 };

typedef struct attention {
    const kvl_backend_cpu *cpu;
    const kvl_attend_call *call;
    _Atomic uint32_t *open_runs; /* [n_splits][n_kv_heads]: runs that are not done yet */
    float *partials;             /* [n_partials][n_heads][partial] */
    size_t n_partials;           /* that memory has room for */
} attention;

static size_t round_up(size_t n)
{
    return (n + KVL_ALIGNMENT - 1) / KVL_ALIGNMENT * KVL_ALIGNMENT;
}

/* Makes room for counters and partials; with less memory, or none, fewer blocks are split. */
static void prepare_splits(kvl_backend_cpu *cpu, attention *work)
{
    const kvl_attend_call *call = work->call;
    if (call->n_splits == 0) return;
    const size_t n_counters = (size_t)call->n_splits * call->pages->n_kv_heads;
    const size_t counter_bytes = round_up(n_counters * sizeof *work->open_runs);
    const size_t partial_bytes =
        call->n_heads * kvl_attend_partial_floats(call->pages->head_dim) * sizeof(float);
    size_t wanted = counter_bytes + call->n_partials * partial_bytes;
    if (wanted > PARTIAL_BYTES_MAX) wanted = PARTIAL_BYTES_MAX;
    if (cpu->attend_memory_bytes < wanted) {
        void *larger = kvl_alloc_aligned(wanted);
        if (larger != NULL) {
            kvl_free(cpu->attend_memory);
            cpu->attend_memory = larger;
            cpu->attend_memory_bytes = wanted;
        }
    }
    if (cpu->attend_memory_bytes < counter_bytes) return;
    work->open_runs = cpu->attend_memory;
    work->partials = (float *)((char *)cpu->attend_memory + counter_bytes);
    work->n_partials = (cpu->attend_memory_bytes - counter_bytes) / partial_bytes;
    for (const kvl_attend_block *block = call->blocks; block < call->blocks + call->n_blocks;
         block++) {
        if (block->n_runs < 2) continue;
        for (uint32_t h = 0; h < call->pages->n_kv_heads; h++)
            atomic_init(&work->open_runs[block->split * call->pages->n_kv_heads + h],
                        block->n_runs);
    }
}

static void merge_block(const attention *work, const kvl_attend_block *block, uint32_t kv_head,
                        float *state)
{
    const kvl_attend_call *call = work->call;
    const uint32_t head_dim = call->pages->head_dim;
    const uint32_t group = call->n_heads / call->pages->n_kv_heads;
    const size_t row_floats = call->n_heads * kvl_attend_partial_floats(head_dim);
    for (uint32_t r = 0; r < block->n_rows; r++) {
        const uint32_t row = block->row_first + r;
        const uint32_t n_slices = call->positions[row] / KVL_ATTEND_SLICE_KEYS + 1;
        for (uint32_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
            const float *first = work->partials + (block->partial_first + r) * row_floats +
                                 head * kvl_attend_partial_floats(head_dim);
            float *out = call->out + ((size_t)call->order[row] * call->n_heads + head) * head_dim;
            work->cpu->kernels.attend->merge(head_dim, n_slices, first, block->n_rows * row_floats,
                                             state, out);
        }
    }
}

static void attend_item(void *context, size_t item, size_t thread)
{
    const attention *work = context;
    const kvl_attend_call *call = work->call;
    /* Backwards, since later rows of a prompt see more: the longest runs of a head come first and
     * the threads end together. */
    const kvl_attend_run *run = &call->runs[call->n_runs - 1 - item % call->n_runs];
    const kvl_attend_block *block = &call->blocks[run->block];
    kvl_attend_job job = {.call = call,
                          .block = block,
                          .tiles = call->tiles + run->tile_first,
                          .n_tiles = run->n_tiles,
                          .kv_head = (uint32_t)(item / call->n_runs),
                          .scratch = kvl_backend_cpu_scratch(work->cpu, thread)};
    if (block->n_runs == 1) {
        work->cpu->kernels.attend->run(&job);
        return;
    }
    const size_t partial_past = block->partial_first + (size_t)block->n_slices * block->n_rows;
    if (partial_past > work->n_partials) {
        /* No room: the first run takes the whole block. */
        if (run->tile_first != block->tile_first) return;
        job.n_tiles = block->n_tiles;
        work->cpu->kernels.attend->run(&job);
        return;
    }
    job.partials = work->partials;
    work->cpu->kernels.attend->run(&job);
    _Atomic uint32_t *open = &work->open_runs[block->split * call->pages->n_kv_heads + job.kv_head];
    if (atomic_fetch_sub_explicit(open, 1, memory_order_acq_rel) == 1)
        merge_block(work, block, job.kv_head, job.scratch);
}

typedef struct mass_work {
    kvl_backend_cpu *cpu;
    const kvl_attend_mass_call *call;
    float *mass;
} mass_work;

static void mass_item(void *context, size_t kv_head, size_t thread)
{
    const mass_work *work = context;
    work->cpu->kernels.mass->mass(work->call, (uint32_t)kv_head,
                                  kvl_backend_cpu_scratch(work->cpu, thread),
                                  work->mass + kv_head * work->call->n_keys);
}

void kvl_cpu_attend_mass(kvl_backend *backend, const kvl_attend_mass_call *call, float *mass)
{
    KVL_ASSERT(call->n_heads > 0 && call->n_heads % call->pages->n_kv_heads == 0);
    if (call->n_rows == 0 || call->n_keys == 0) return;
    mass_work work = {kvl_backend_cpu_of(backend), call, mass};
    kvl_pool_run(backend->pool, mass_item, &work, call->pages->n_kv_heads);
}

void kvl_cpu_attend(kvl_backend *backend, const kvl_attend_call *call)
{
    KVL_ASSERT(call->n_heads > 0 && call->n_heads % call->pages->n_kv_heads == 0);
    kvl_backend_cpu *cpu = kvl_backend_cpu_of(backend);
    attention work = {.cpu = cpu, .call = call};
    prepare_splits(cpu, &work);
    kvl_pool_run(backend->pool, attend_item, &work, (size_t)call->n_runs * call->pages->n_kv_heads);
}

/* ---- pages ---- */

/* Rows to pages, or pages to rows: the two pointers of the other direction are NULL. */
typedef struct page_copy {
    const kvl_pages *pages;
    uint32_t layer;
    uint32_t n_rows;
    const uint32_t *slots;
    const float *keys_from; /* [n_rows][n_kv_heads][head_dim], as the other three */
    const float *values_from;
    float *keys_to;
    float *values_to;
} page_copy;

/* Keys of a page lie dimension-major, so one token's key is a column of it. */
static void copy_row(const page_copy *copy, uint32_t row, uint32_t head)
{
    const kvl_pages *pages = copy->pages;
    const uint32_t head_dim = pages->head_dim;
    const uint32_t page = copy->slots[row] / KVL_PAGE_TOKENS;
    const uint32_t token = copy->slots[row] % KVL_PAGE_TOKENS;
    KVL_ASSERT(page < pages->n_pages);
    float *column = kvl_pages_keys(pages, copy->layer, page, head) + token;
    float *line = kvl_pages_values(pages, copy->layer, page, head) + (size_t)token * head_dim;
    const size_t at = ((size_t)row * pages->n_kv_heads + head) * head_dim;
    if (copy->keys_from != NULL) {
        const float *key = copy->keys_from + at;
        for (uint32_t d = 0; d < head_dim; d++) column[(size_t)d * KVL_PAGE_TOKENS] = key[d];
        memcpy(line, copy->values_from + at, head_dim * sizeof *line);
    } else {
        float *key = copy->keys_to + at;
        for (uint32_t d = 0; d < head_dim; d++) key[d] = column[(size_t)d * KVL_PAGE_TOKENS];
        memcpy(copy->values_to + at, line, head_dim * sizeof *line);
    }
}

/* Heads outside: a page's keys of one head are 4 KiB at 64 dimensions and stay in the cache while
 * its tokens, which usually follow each other, are copied. */
static void copy_item(void *context, size_t item, size_t thread)
{
    (void)thread;
    const page_copy *copy = context;
    const uint32_t first = (uint32_t)item * COPY_ROWS;
    const uint32_t past = copy->n_rows - first < COPY_ROWS ? copy->n_rows : first + COPY_ROWS;
    for (uint32_t head = 0; head < copy->pages->n_kv_heads; head++)
        for (uint32_t row = first; row < past; row++) copy_row(copy, row, head);
}

static void copy_rows(kvl_backend *backend, page_copy *copy)
{
    KVL_ASSERT(copy->layer < copy->pages->n_layers);
    kvl_pool_run(backend->pool, copy_item, copy,
                 ((size_t)copy->n_rows + COPY_ROWS - 1) / COPY_ROWS);
}

void kvl_cpu_pages_write(kvl_backend *backend, const kvl_pages *pages, uint32_t layer,
                         uint32_t n_rows, const uint32_t *slots, const float *keys,
                         const float *values)
{
    page_copy copy = {.pages = pages, .layer = layer, .n_rows = n_rows, .slots = slots};
    copy.keys_from = keys;
    copy.values_from = values;
    copy_rows(backend, &copy);
}

void kvl_cpu_pages_read(kvl_backend *backend, const kvl_pages *pages, uint32_t layer,
                        uint32_t n_rows, const uint32_t *slots, float *keys, float *values)
{
    page_copy copy = {.pages = pages, .layer = layer, .n_rows = n_rows, .slots = slots};
    copy.keys_to = keys;
    copy.values_to = values;
    copy_rows(backend, &copy);
}
