/* compute/cpu/matmul.c: cuts the outputs of all jobs of a call into items of one parallel loop.
 *
 * Few rows are bound by memory: an item is some 24 KiB of weights, which hides the cost of taking
 * it. Many rows are bound by arithmetic: an item is a panel of outputs. Its weights are
 * dequantised run by run into the thread's scratch (at most 150 KiB) and multiplied with blocks of
 * rows, both of which fit the second-level cache. In between, where a part goes depends on its
 * dtype; the bits do not (kernels.h).
 * Own kernels and not BLAS: OpenBLAS 0.3.21 gives a row other bits in another batch (with its AVX2
 * kernels even at another place of the same batch). tests/bench/compute_bench.c prints both side by
 * side: on Zen 4, 512 rows, we reach 0.95 to 1.05 of plain sgemm, dequantisation included. */
#include "compute/cpu/matmul.h"

#include <string.h>

enum {
    FEW_ITEM_BYTES = 24 * 1024,
    FEW_ITEM_STEP = 8, /* outputs that the kernel takes together */
    FEW_ROWS_MAX = 8,
    STREAM_ROWS = 4, /* items are cut by bytes up to here, by outputs above */
    PANEL_OUTPUTS_MAX = 48,
    PANEL_OUTPUTS_MIN = 16,
    SMALL_PANEL_OUTPUTS = 8,
    SMALL_PANEL_ROWS = 32,
    ITEMS_A_THREAD = 8,
    BLOCK_ROWS = 96, /* a multiple of every tile height */
    PANEL_PAD = 16,  /* floats between weight rows, so that they do not fall on one cache set */
    WEIGHTS_PAD = 32 /* expand.h reads whole units */
};

_Static_assert((KVL_CPU_RUN_INPUTS_MAX + PANEL_PAD) * PANEL_OUTPUTS_MAX <= KVL_CPU_SCRATCH_FLOATS,
               "a panel fits the scratch of a thread");

typedef struct product {
    const kvl_backend_cpu *cpu;
    const kvl_matmul_job *jobs;
    size_t n_jobs;
    uint32_t n_rows;
    const float *x;
    uint32_t item_outputs;
} product;

typedef struct item_part {
    const kvl_matmul_job *job;
    uint32_t output_first;
    uint32_t output_past;
} item_part;

static uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static uint32_t n_items_of(const kvl_matmul_job *job, uint32_t item_outputs)
{
    return (job->weights->n_outputs + item_outputs - 1) / item_outputs;
}

static item_part part_of(const product *call, size_t item)
{
    const kvl_matmul_job *job = call->jobs;
    for (;; job++) {
        const uint32_t n_items = n_items_of(job, call->item_outputs);
        if (item < n_items) break;
        item -= n_items;
    }
    const uint32_t first = (uint32_t)item * call->item_outputs;
    const uint32_t past = first + min_u32(call->item_outputs, job->weights->n_outputs - first);
    return (item_part){job, first, past};
}

/* Puts the bias where the sums will be added. True when y now holds something to add to. */
static bool start_outputs(const item_part *part, uint32_t n_rows)
{
    const kvl_matmul_job *job = part->job;
    if (job->bias == NULL) return job->accumulate;
    for (uint32_t r = 0; r < n_rows; r++) {
        float *y = job->y + (size_t)r * job->weights->n_outputs;
        for (uint32_t o = part->output_first; o < part->output_past; o++)
            y[o] = job->accumulate ? y[o] + job->bias[o] : job->bias[o];
    }
    return true;
}

/* Whether the weights of a part go straight through registers, expanded again for every two rows.
 * The larger a weight, the less that costs beside reading it: measured on Zen 4, times cross near
 * 2 rows for formats of four bits, 4 for Q8_0 and 8 for F16 and F32. */
static bool is_few(const kvl_matrix *weights, uint32_t n_rows)
{
    const kvl_dtype_info *about = kvl_dtype_about(weights->dtype);
    const uint32_t crossing = 4 * about->block_bytes / about->block_weights / 2 * 2;
    return n_rows <= min_u32(crossing, FEW_ROWS_MAX);
}

static void stream_part(const product *call, const item_part *part)
{
    const kvl_matrix *weights = part->job->weights;
    call->cpu->kernels.matmul->few[weights->dtype](&(kvl_cpu_few_part){
        .weights = weights,
        .output_first = part->output_first,
        .output_past = part->output_past,
        .n_rows = call->n_rows,
        .x = call->x,
        .y = part->job->y,
        .add = start_outputs(part, call->n_rows),
    });
}

/* Gives the panel the weights of inputs input_first to input_first + n_inputs - 1. Rows of float32
 * are used where they lie, unless they end inside a unit. */
static void take_weights(const kvl_cpu_matmul_kernels *kernels, const item_part *part,
                         uint32_t input_first, float *scratch, kvl_cpu_panel *panel)
{
    const kvl_matrix *weights = part->job->weights;
    const kvl_dtype_info *about = kvl_dtype_about(weights->dtype);
    const uint8_t *from = (const uint8_t *)weights->data + part->output_first * weights->row_bytes +
                          input_first / about->block_weights * (size_t)about->block_bytes;
    if (weights->dtype == KVL_DTYPE_F32 && weights->n_inputs % WEIGHTS_PAD == 0) {
        panel->w = (const float *)(const void *)from;
        panel->w_stride = weights->row_bytes / sizeof(float);
        return;
    }
    const uint32_t padded = (panel->n_inputs + WEIGHTS_PAD - 1) / WEIGHTS_PAD * WEIGHTS_PAD;
    panel->w = scratch;
    panel->w_stride = padded + PANEL_PAD;
    for (uint32_t o = 0; o < panel->n_outputs; o++) {
        float *row = scratch + o * panel->w_stride;
        kernels->dequantise[weights->dtype](panel->n_inputs, from + o * weights->row_bytes, row);
        memset(row + panel->n_inputs, 0, (padded - panel->n_inputs) * sizeof(float));
    }
}

/* All rows times one panel: the outputs of `part`. */
static void multiply_part(const product *call, const item_part *part, float *scratch)
{
    const kvl_cpu_matmul_kernels *kernels = call->cpu->kernels.matmul;
    const kvl_matrix *weights = part->job->weights;
    const uint32_t run_inputs = kvl_cpu_run_inputs(weights->n_inputs);
    kvl_cpu_panel panel = {
        .n_outputs = part->output_past - part->output_first,
        .x_stride = weights->n_inputs,
        .y_stride = weights->n_outputs,
        .add = start_outputs(part, call->n_rows),
    };
    for (uint32_t first = 0; first < weights->n_inputs; first += run_inputs) {
        panel.n_inputs = min_u32(run_inputs, weights->n_inputs - first);
        take_weights(kernels, part, first, scratch, &panel);
        for (uint32_t row = 0; row < call->n_rows; row += BLOCK_ROWS) {
            panel.n_rows = min_u32(BLOCK_ROWS, call->n_rows - row);
            panel.x = call->x + (size_t)row * panel.x_stride + first;
            panel.y = part->job->y + (size_t)row * panel.y_stride + part->output_first;
            kernels->multiply(&panel);
        }
        panel.add = true;
    }
}

static void product_item(void *context, size_t item, size_t thread)
{
    const product *call = context;
    const item_part whole = part_of(call, item);
    if (is_few(whole.job->weights, call->n_rows)) {
        stream_part(call, &whole);
        return;
    }
    /* With not many rows a panel is soon used up: a small one has not left the first-level cache
     * by then. */
    const uint32_t step =
        call->n_rows <= SMALL_PANEL_ROWS ? SMALL_PANEL_OUTPUTS : PANEL_OUTPUTS_MAX;
    float *scratch = kvl_backend_cpu_scratch(call->cpu, thread);
    item_part part = whole;
    for (uint32_t first = whole.output_first; first < whole.output_past; first += step) {
        part.output_first = first;
        part.output_past = first + min_u32(step, whole.output_past - first);
        multiply_part(call, &part, scratch);
    }
}

/* Outputs of one item, a multiple of what the kernels take together. */
static uint32_t few_outputs(const kvl_matmul_job *jobs, size_t n_jobs)
{
    size_t row_bytes = 1;
    for (size_t j = 0; j < n_jobs; j++)
        if (jobs[j].weights->row_bytes > row_bytes) row_bytes = jobs[j].weights->row_bytes;
    const size_t fitting = FEW_ITEM_BYTES / row_bytes / FEW_ITEM_STEP * FEW_ITEM_STEP;
    return fitting == 0 ? FEW_ITEM_STEP : (uint32_t)fitting;
}

/* Small enough that the last items leave no thread waiting long, large enough that passing over
 * all rows of x for each costs little. */
static uint32_t panel_outputs(const kvl_matmul_job *jobs, size_t n_jobs, size_t n_threads)
{
    size_t n_outputs = 0;
    for (size_t j = 0; j < n_jobs; j++) n_outputs += jobs[j].weights->n_outputs;
    const size_t share = n_outputs / (n_threads * ITEMS_A_THREAD);
    if (share <= PANEL_OUTPUTS_MIN) return PANEL_OUTPUTS_MIN;
    if (share >= PANEL_OUTPUTS_MAX) return PANEL_OUTPUTS_MAX;
    return (uint32_t)share / 4 * 4;
}

void kvl_cpu_matmul(kvl_backend *backend, const kvl_matmul_job *jobs, size_t n_jobs,
                    uint32_t n_rows, const float *x)
{
    const kvl_backend_cpu *cpu = kvl_backend_cpu_of(backend);
    product call = {.cpu = cpu, .jobs = jobs, .n_jobs = n_jobs, .n_rows = n_rows, .x = x};
    if (n_rows == 0) return;
    call.item_outputs = n_rows <= STREAM_ROWS ? few_outputs(jobs, n_jobs)
                                              : panel_outputs(jobs, n_jobs, cpu->n_threads);
    size_t n_items = 0;
    for (size_t j = 0; j < n_jobs; j++) {
        KVL_ASSERT(jobs[j].weights->n_inputs == jobs[0].weights->n_inputs);
        n_items += n_items_of(&jobs[j], call.item_outputs);
    }
    kvl_pool_run(backend->pool, product_item, &call, n_items);
}

/* ---- embedding ---- */

enum { EMBED_ROWS = 16 };

typedef struct embedding {
    const kvl_backend_cpu *cpu;
    const kvl_matrix *table;
    uint32_t n_rows;
    const uint32_t *ids;
    float *out;
} embedding;

static void embed_item(void *context, size_t item, size_t thread)
{
    (void)thread;
    const embedding *call = context;
    const kvl_matrix *table = call->table;
    const uint32_t first = (uint32_t)item * EMBED_ROWS;
    const uint32_t past = first + min_u32(EMBED_ROWS, call->n_rows - first);
    for (uint32_t r = first; r < past; r++) {
        KVL_ASSERT(call->ids[r] < table->n_outputs);
        const uint8_t *row = (const uint8_t *)table->data + call->ids[r] * table->row_bytes;
        call->cpu->kernels.matmul->dequantise[table->dtype](
            table->n_inputs, row, call->out + (size_t)r * table->n_inputs);
    }
}

void kvl_cpu_embed(kvl_backend *backend, const kvl_matrix *table, uint32_t n_rows,
                   const uint32_t *ids, float *out)
{
    embedding call = {kvl_backend_cpu_of(backend), table, n_rows, ids, out};
    kvl_pool_run(backend->pool, embed_item, &call, (n_rows + EMBED_ROWS - 1) / EMBED_ROWS);
}
