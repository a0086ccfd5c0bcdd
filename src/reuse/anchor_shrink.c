/* reuse/anchor_shrink.c: how much of the anchors' offsets to believe.
 *
 * A few examples are a noisy measure of how KV differs in context. What they agree on is worth
 * adding, what they do not agree on is better left out; and the offset of a single token says much
 * of the same token in the same place, and little of another token.
 * Method  A token whose values stand at a relative distance d from the anchor's has the cosine
 *         1 - d^2/2 with them, if both are of one length. That share of the anchor's offset is
 *         believed as it is. The rest is replaced by a mean: past the head of the slot by the
 *         anchor's mean over tokens, which change nearly alike there; in the head by the mean over
 *         anchors of that very position, since the first tokens of a text are what it attends to
 *         for want of anything before it, and change each in its own way. Means are shrunk by the
 *         factor of James and Stein, 1 - s^2 / (n |m|^2) or 0: m is the mean over n anchors and s^2
 *         their squared distance from it, over n - 1. One anchor agrees with nobody: 0.
 *         Measured on five agents and SmolLM2-135M with two anchors a slot (mean KL to full prefill
 *         over 24 answers): placed 0.031, interpolated without this 0.019, with it 0.010. */
#include "base/alloc.h"
#include "reuse/anchor_pool.h"

#include <math.h>
#include <string.h>

enum { HEAD_TOKENS = 16, TILE_TOKENS = 32 };

uint32_t kvl_anchor_head(uint32_t n_tokens)
{
    return n_tokens >= 2 * HEAD_TOKENS ? HEAD_TOKENS : n_tokens / 2;
}

static size_t width_of(const kvl_anchor *anchor)
{
    return (size_t)anchor->layout.n_kv_heads * anchor->layout.head_dim;
}

/* [width] */
static float *mean_of(const kvl_anchor *anchor, uint32_t layer, bool values)
{
    const size_t row = (values ? anchor->layout.n_layers : 0) + (size_t)layer;
    return anchor->means + row * width_of(anchor);
}

static double square_sum(size_t n, const float *x)
{
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sum;
}

/* The share of a mean to believe: `sum` [width] of n rows, `squares` the sum of their squares. */
static float agreement(uint32_t n, size_t width, const float *sum, double squares)
{
    if (n < 2) return 0.0F;
    const double mean_square = square_sum(width, sum) / n / n;
    if (!(mean_square > 0.0)) return 0.0F;
    const double spread = fmax(squares - n * mean_square, 0.0) / (n - 1);
    return (float)fmax(1.0 - spread / (n * mean_square), 0.0);
}

typedef struct mean_job {
    const kvl_anchor_pool *pool;
    const kvl_anchor *anchor;
    float *tiles; /* [n threads][TILE_TOKENS][width] */
} mean_job;

/* mean = the mean over the tokens past the head of one layer's keys or values. */
static void average(const mean_job *job, uint32_t layer, bool values, float *tile)
{
    static const float ones[TILE_TOKENS] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                            1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const kvl_anchor_layout *layout = &job->anchor->layout;
    const size_t width = width_of(job->anchor);
    const uint32_t head = kvl_anchor_head(layout->n_tokens);
    float *mean = mean_of(job->anchor, layer, values);
    const kvl_anchor_rows all = kvl_anchor_rows_of(
        job->anchor, layer, values ? KVL_ANCHOR_SLOT_VALUES : KVL_ANCHOR_SLOT_KEYS);
    for (uint32_t t = head; t < layout->n_tokens; t += TILE_TOKENS) {
        const uint32_t left = layout->n_tokens - t;
        const uint32_t n = left < TILE_TOKENS ? left : TILE_TOKENS;
        const kvl_anchor_rows rows =
            kvl_anchor_rows_from(&all, t, layout->n_kv_heads, layout->head_dim);
        memset(tile, 0, n * width * sizeof *tile);
        kvl_anchor_add(job->pool->kernels, &rows, n, layout->n_kv_heads, layout->head_dim, ones,
                       tile);
        for (uint32_t r = 0; r < n; r++) {
            for (size_t i = 0; i < width; i++) mean[i] += tile[r * width + i];
        }
    }
    for (size_t i = 0; i < width; i++) mean[i] /= (float)(layout->n_tokens - head);
}

static void average_layer(void *context, size_t item, size_t thread)
{
    const mean_job *job = context;
    float *tile = job->tiles + thread * TILE_TOKENS * width_of(job->anchor);
    average(job, (uint32_t)item, false, tile);
    average(job, (uint32_t)item, true, tile);
}

kvl_status kvl_anchor_means_create(const kvl_anchor_pool *pool, kvl_anchor *anchor,
                                   kvl_error *error)
{
    const size_t width = width_of(anchor);
    float *tiles = kvl_alloc_zero(kvl_anchor_n_threads(pool) * TILE_TOKENS * width, sizeof *tiles);
    anchor->means = kvl_alloc_zero(2 * (size_t)anchor->layout.n_layers * width, sizeof(float));
    if (tiles == NULL || anchor->means == NULL) {
        kvl_free(tiles);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for an anchor's mean offset");
    }
    mean_job job = {pool, anchor, tiles};
    kvl_anchor_run(pool, average_layer, &job, anchor->layout.n_layers);
    kvl_free(tiles);
    return KVL_OK;
}

void kvl_anchor_similarities(size_t n, const float *distances, float *similarities)
{
    for (size_t i = 0; i < n; i++)
        similarities[i] = fmaxf(1.0F - 0.5F * distances[i] * distances[i], 0.0F);
}

void kvl_anchor_split_weights(uint32_t n_anchors, uint32_t n_tokens, float *weights,
                              float *similarities)
{
    for (uint32_t t = kvl_anchor_head(n_tokens); t < n_tokens; t++) {
        float sum = 0.0F;
        for (uint32_t a = 0; a < n_anchors; a++) sum += weights[(size_t)a * n_tokens + t];
        for (uint32_t a = 0; a < n_anchors; a++) {
            const size_t at = (size_t)a * n_tokens + t;
            const float own = sum > 0.0F ? weights[at] * similarities[at] : 0.0F;
            similarities[at] = sum > 0.0F ? weights[at] - own : 1.0F / (float)n_anchors;
            weights[at] = own;
        }
    }
}

void kvl_anchor_add_head(const kvl_anchor_correction *c, const float *weights,
                         const float *similarities, float *scratch, float *rows)
{
    const kvl_anchor_layout *layout = &c->anchors[0]->layout;
    const size_t width = width_of(c->anchors[0]);
    float *sum = scratch;
    float *row = scratch + width;
    const float one = 1.0F;
    for (uint32_t t = 0; t < kvl_anchor_head(c->n_tokens); t++) {
        kvl_anchor_rows of[KVL_ANCHORS_PER_SLOT_MAX];
        uint32_t n = 0;
        double squares = 0.0;
        memset(sum, 0, width * sizeof *sum);
        for (uint32_t a = 0; a < c->n_anchors; a++) {
            if (c->anchors[a]->layout.n_tokens <= t) continue;
            const kvl_anchor_rows all = kvl_anchor_rows_of(c->anchors[a], c->layer, c->section);
            of[a] = kvl_anchor_rows_from(&all, t, layout->n_kv_heads, layout->head_dim);
            memset(row, 0, width * sizeof *row);
            kvl_anchor_add(c->kernels, &of[a], 1, layout->n_kv_heads, layout->head_dim, &one, row);
            for (size_t i = 0; i < width; i++) sum[i] += row[i];
            squares += square_sum(width, row);
            n++;
        }
        const float agreed = agreement(n, width, sum, squares);
        for (uint32_t a = 0; a < c->n_anchors; a++) {
            if (c->anchors[a]->layout.n_tokens <= t) continue;
            const size_t at = (size_t)a * c->n_tokens + t;
            const float believed = similarities[at] + (1.0F - similarities[at]) * agreed;
            kvl_anchor_add(c->kernels, &of[a], 1, layout->n_kv_heads, layout->head_dim,
                           &(float){weights[at] * believed}, rows + t * width);
        }
    }
}

void kvl_anchor_add_means(const kvl_anchor_correction *c, const float *mean_weights, float *scratch,
                          float *rows)
{
    const size_t width = width_of(c->anchors[0]);
    const bool values = c->section == KVL_ANCHOR_SLOT_VALUES;
    double squares = 0.0;
    memset(scratch, 0, width * sizeof *scratch);
    for (uint32_t a = 0; a < c->n_anchors; a++) {
        const float *mean = mean_of(c->anchors[a], c->layer, values);
        for (size_t i = 0; i < width; i++) scratch[i] += mean[i];
        squares += square_sum(width, mean);
    }
    const float agreed = agreement(c->n_anchors, width, scratch, squares);
    if (!(agreed > 0.0F)) return;
    for (uint32_t t = kvl_anchor_head(c->n_tokens); t < c->n_tokens; t++) {
        float *row = rows + t * width;
        for (uint32_t a = 0; a < c->n_anchors; a++) {
            const float *mean = mean_of(c->anchors[a], c->layer, values);
            const float weight = agreed * mean_weights[(size_t)a * c->n_tokens + t];
            for (size_t i = 0; i < width; i++) row[i] += weight * mean[i];
        }
    }
}
