/* reuse/anchor_match.c: how near the anchors of a slot are, and the sum of their offsets.
 *
 * Method, default mode. For token t, |V - V_a| / |V| over the layers that anchors keep for this
 * (the Frobenius norm over layers, heads and dimensions); weights of anchors softmax(-distance /
 * tau), one set a token for the slot, and one set from the mean over tokens for the text after it
 * and for the gate. Values know no position, so no rotation comes into it. Offsets are believed as
 * far as reuse/anchor_shrink.c says. Method, paper mode
 * (arXiv:2510.12872, equations 5 to 7, with the scales of the authors' program). Gate: entropy of
 * softmax(-|V - V_a|) over everything. Slot: softmax of the mean |K - K_a| a token, and of |V -
 * V_a| for values. Text after: softmax a layer, head and dimension of the L2 distance over the last
 * tokens. One difference: their distances of keys are taken between keys as rotated in whichever
 * agent wrote the base last; ours are taken before rotation, as the paper's text has it. Error Sums
 * in float, in the order of anchors. */
#include "reuse/anchor_pool.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum { TILE_TOKENS = 32 };

/* What takes part in one match or correction. */
typedef struct anchor_party {
    const kvl_anchor_pool *pool;
    const kvl_kv_view *base;
    uint32_t n;
    kvl_anchor *anchors[KVL_ANCHORS_PER_SLOT_MAX];
    kvl_anchor *exact; /* same text, or NULL */
} anchor_party;

static size_t row_width(const kvl_kv_view *view)
{
    return (size_t)view->n_kv_heads * view->head_dim;
}

/* [n_kv_heads][head_dim] of one token in one layer. */
static size_t row_at(const kvl_kv_view *view, uint32_t layer, size_t token)
{
    return ((size_t)layer * view->n_tokens + token) * row_width(view);
}

/* Anchors of the slot that are long enough. */
static void gather(kvl_anchor_pool *pool, const kvl_anchor_slot *slot, const kvl_digest *base_id,
                   const kvl_kv_view *base, anchor_party *party)
{
    *party = (struct anchor_party){.pool = pool, .base = base};
    for (uint32_t i = 0; i < pool->n; i++) {
        kvl_anchor *anchor = pool->anchors[i];
        const kvl_anchor_layout *layout = &anchor->layout;
        if (!kvl_anchor_is_of(anchor, slot)) continue;
        if (layout->n_layers != base->n_layers || layout->n_kv_heads != base->n_kv_heads ||
            layout->head_dim != base->head_dim ||
            !kvl_anchor_is_long_enough(pool, anchor, base->n_tokens)) {
            continue;
        }
        KVL_ASSERT(party->n < KVL_ANCHORS_PER_SLOT_MAX);
        party->anchors[party->n++] = anchor;
        /* The paper has no such rule: there an identical anchor is one among many. */
        if (pool->options.mode == KVL_ANCHOR_SCALE_FREE && layout->n_tokens == base->n_tokens &&
            kvl_digest_equal(&anchor->extra.base_id, base_id)) {
            party->exact = anchor;
        }
    }
}

/* What an anchor keeps of the base for one token and layer: n_kv_heads groups. */
static kvl_anchor_rows base_rows(const kvl_anchor *anchor, size_t token, uint32_t layer, bool keys)
{
    const kvl_anchor_layout *layout = &anchor->layout;
    const uint32_t first = kvl_anchor_first_layer(layout->n_layers, layout->base_stride);
    const uint32_t index = (layer - first) / layout->base_stride;
    const uint8_t *block = kvl_container_block_view(
        anchor->container, (uint32_t)(token / layout->base_rows), &(size_t){0});
    const kvl_anchor_rows all = kvl_anchor_section_rows(layout, block, KVL_ANCHOR_BASE);
    const kvl_anchor_rows row = kvl_anchor_rows_from(&all, token % layout->base_rows,
                                                     layout->base_groups, layout->head_dim);
    const uint32_t group = (keys ? layout->n_base_layers + index : index) * layout->n_kv_heads;
    return kvl_anchor_rows_group(&row, group, layout->head_dim);
}

typedef enum distance_kind {
    DISTANCE_RELATIVE,        /* |dV| / |V|, every fourth layer */
    DISTANCE_SQUARES,         /* |dV|^2, all layers */
    DISTANCE_ABSOLUTE_KEYS,   /* mean of |dK| over layers, heads, dimensions */
    DISTANCE_ABSOLUTE_VALUES, /* same of |dV| */
} distance_kind;

typedef struct distance_job {
    const anchor_party *party;
    distance_kind kind;
    float *out; /* [n anchors][n_tokens] */
} distance_job;

static float sum_of_squares(size_t n, const float *x)
{
    enum { LANES = 16 };
    float lanes[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) lanes[j] += x[i + (size_t)j] * x[i + (size_t)j];
    }
    for (; i < n; i++) lanes[0] += x[i] * x[i];
    float sum = 0.0F;
    for (int j = 0; j < LANES; j++) sum += lanes[j];
    return sum;
}

/* Sum over the layers that the kind looks at, of one token against one anchor. */
static float distance_sum(const distance_job *job, const kvl_anchor *anchor, size_t token)
{
    const kvl_kv_view *base = job->party->base;
    const kvl_anchor_kernels *kernels = job->party->pool->kernels;
    const uint32_t stride = job->kind == DISTANCE_RELATIVE ? KVL_ANCHOR_DISTANCE_STRIDE : 1;
    const bool keys = job->kind == DISTANCE_ABSOLUTE_KEYS;
    float sum = 0.0F;
    for (uint32_t l = kvl_anchor_first_layer(base->n_layers, stride); l < base->n_layers;
         l += stride) {
        const kvl_anchor_rows rows = base_rows(anchor, token, l, keys);
        const float *x = (keys ? base->keys : base->values) + row_at(base, l, token);
        if (job->kind == DISTANCE_RELATIVE || job->kind == DISTANCE_SQUARES) {
            sum += kvl_anchor_squares(kernels, &rows, base->n_kv_heads, base->head_dim, x);
        } else {
            sum += kvl_anchor_absolutes(kernels, &rows, base->n_kv_heads, base->head_dim, x);
        }
    }
    return sum;
}

/* |V| of one token in the layers of DISTANCE_RELATIVE. */
static float norm_of(const kvl_kv_view *base, size_t token)
{
    float sum = 0.0F;
    const uint32_t stride = KVL_ANCHOR_DISTANCE_STRIDE;
    for (uint32_t l = kvl_anchor_first_layer(base->n_layers, stride); l < base->n_layers;
         l += stride) {
        sum += sum_of_squares(row_width(base), base->values + row_at(base, l, token));
    }
    return sqrtf(sum);
}

static void distance_tile(void *context, size_t tile, size_t thread)
{
    (void)thread;
    const distance_job *job = context;
    const kvl_kv_view *base = job->party->base;
    const size_t first = tile * TILE_TOKENS;
    const size_t past = first + TILE_TOKENS < base->n_tokens ? first + TILE_TOKENS : base->n_tokens;
    const float n_numbers = (float)base->n_layers * (float)row_width(base);
    float norms[TILE_TOKENS] = {0};
    if (job->kind == DISTANCE_RELATIVE) {
        for (size_t t = first; t < past; t++) norms[t - first] = norm_of(base, t);
    }
    for (uint32_t a = 0; a < job->party->n; a++) {
        float *out = job->out + (size_t)a * base->n_tokens;
        for (size_t t = first; t < past; t++) {
            if (t >= job->party->anchors[a]->layout.n_tokens) {
                out[t] = INFINITY; /* the anchor says nothing about this token: weight 0 */
                continue;
            }
            const float sum = distance_sum(job, job->party->anchors[a], t);
            switch (job->kind) {
            case DISTANCE_RELATIVE: out[t] = sqrtf(sum) / (norms[t - first] + FLT_MIN); break;
            case DISTANCE_SQUARES: out[t] = sum; break;
            case DISTANCE_ABSOLUTE_KEYS:
            case DISTANCE_ABSOLUTE_VALUES: out[t] = sum / n_numbers; break;
            }
        }
    }
}

static void measure_distances(const anchor_party *party, distance_kind kind, float *out)
{
    distance_job job = {.party = party, .kind = kind, .out = out};
    KVL_ASSERT((size_t)party->n * party->base->n_tokens <= party->pool->n_per_token / 2);
    kvl_anchor_run(party->pool, distance_tile, &job,
                   (party->base->n_tokens + TILE_TOKENS - 1) / TILE_TOKENS);
}

/* One distance an anchor: in the default mode the mean over tokens, in the paper's |dV| over all.
 */
static void summarise(const anchor_party *party, const float *per_token, double *distances)
{
    const size_t n_tokens = party->base->n_tokens;
    for (uint32_t a = 0; a < party->n; a++) {
        const size_t n_known = party->anchors[a]->layout.n_tokens;
        const size_t n = n_known < n_tokens ? n_known : n_tokens;
        double sum = 0.0;
        for (size_t t = 0; t < n; t++) sum += (double)per_token[a * n_tokens + t];
        distances[a] = party->pool->options.mode == KVL_ANCHOR_PAPER ? sqrt(sum) : sum / (double)n;
    }
}

/* weights = softmax(-distances / temperature). Measured from the nearest, so that it never
 * overflows, and an anchor at any distance simply gets weight 0. */
static void softmax(uint32_t n, const double *distances, double temperature, double *weights)
{
    double nearest = distances[0];
    for (uint32_t a = 1; a < n; a++) nearest = fmin(nearest, distances[a]);
    double sum = 0.0;
    for (uint32_t a = 0; a < n; a++) {
        weights[a] = exp((nearest - distances[a]) / temperature);
        sum += weights[a];
    }
    for (uint32_t a = 0; a < n; a++) weights[a] /= sum;
}

/* The same for `width` columns at once: distances [n][stride], replaced by weights, which are all 0
 * in a column that no anchor knows. */
static void softmax_columns(uint32_t n, size_t width, size_t stride, float temperature, float *d)
{
    for (size_t i = 0; i < width; i++) {
        float nearest = d[i];
        for (uint32_t a = 1; a < n; a++) nearest = fminf(nearest, d[a * stride + i]);
        if (nearest == INFINITY) {
            for (uint32_t a = 0; a < n; a++) d[a * stride + i] = 0.0F;
            continue;
        }
        float sum = 0.0F;
        for (uint32_t a = 0; a < n; a++) {
            d[a * stride + i] = expf((nearest - d[a * stride + i]) / temperature);
            sum += d[a * stride + i];
        }
        const float inverse = 1.0F / sum;
        for (uint32_t a = 0; a < n; a++) d[a * stride + i] *= inverse;
    }
}

/* Weights of whole anchors: of the text after a slot in the default mode, of the paper's gate, and
 * of which anchors count as used. */
static void weigh_anchors(const anchor_party *party, const double *distances, double *weights)
{
    const kvl_anchor_options *o = &party->pool->options;
    softmax(party->n, distances, o->mode == KVL_ANCHOR_PAPER ? 1.0 : (double)o->temperature,
            weights);
}

/* Entropy of the weights as a share of its largest value, 0 .. 1. */
static double entropy_share(uint32_t n, const double *weights)
{
    if (n < 2) return 0.0;
    double entropy = 0.0;
    for (uint32_t a = 0; a < n; a++) {
        if (weights[a] > 0.0) entropy -= weights[a] * log2(weights[a]);
    }
    return fmax(0.0, fmin(1.0, entropy / log2((double)n)));
}

static distance_kind kind_of_gate(const kvl_anchor_pool *pool)
{
    return pool->options.mode == KVL_ANCHOR_PAPER ? DISTANCE_SQUARES : DISTANCE_RELATIVE;
}

static kvl_anchor_verdict judge(const kvl_anchor_options *o, const kvl_anchor_match *match)
{
    /* Written so that a distance that is no number never passes. */
    if (!(match->distance <= FLT_MAX)) return KVL_ANCHOR_TOO_FAR;
    const bool near = o->mode == KVL_ANCHOR_PAPER ? match->entropy_share <= o->entropy_share
                                                  : match->distance <= o->distance_max;
    return near ? KVL_ANCHOR_SHARE : KVL_ANCHOR_TOO_FAR;
}

void kvl_anchor_pool_match(kvl_anchor_pool *pool, const kvl_anchor_slot *slot,
                           const kvl_digest *base_id, const kvl_kv_view *base,
                           kvl_anchor_match *match)
{
    *match = (kvl_anchor_match){.verdict = KVL_ANCHOR_TOO_FEW};
    if (base->n_tokens == 0) return;
    anchor_party party;
    gather(pool, slot, base_id, base, &party);
    if (party.exact != NULL) {
        *match = (kvl_anchor_match){.verdict = KVL_ANCHOR_EXACT, .n_anchors = 1};
        return;
    }
    match->n_anchors = party.n;
    if (party.n == 0 || party.n < pool->options.n_anchors_min) return;

    double distances[KVL_ANCHORS_PER_SLOT_MAX], weights[KVL_ANCHORS_PER_SLOT_MAX];
    measure_distances(&party, kind_of_gate(pool), pool->per_token);
    summarise(&party, pool->per_token, distances);
    weigh_anchors(&party, distances, weights);
    double nearest = distances[0];
    for (uint32_t a = 1; a < party.n; a++) {
        if (!(distances[a] >= nearest)) nearest = distances[a]; /* keeps what is no number */
    }
    match->distance = (float)nearest;
    match->entropy_share = (float)entropy_share(party.n, weights);
    match->verdict = judge(&pool->options, match);
}

/* Counts the smallest set of anchors that has `mass` of the weight. */
static void count_uses(const anchor_party *party, const double *weights)
{
    bool counted[KVL_ANCHORS_PER_SLOT_MAX] = {false};
    double mass = 0.0;
    for (uint32_t n = 0; n < party->n && mass < (double)party->pool->options.mass; n++) {
        uint32_t best = UINT32_MAX;
        for (uint32_t a = 0; a < party->n; a++) {
            if (counted[a]) continue;
            if (best == UINT32_MAX || weights[a] > weights[best]) best = a;
        }
        counted[best] = true;
        mass += weights[best];
        if (party->anchors[best]->uses < UINT32_MAX) party->anchors[best]->uses++;
    }
}

typedef struct correction {
    const anchor_party *party;
    const float *key_weights;     /* [n][n_tokens] */
    const float *value_weights;   /* same */
    const float *mean_weights;    /* where offsets are shrunk: [n][n_tokens] as
                                     kvl_anchor_split_weights leaves it; otherwise NULL */
    const double *anchor_weights; /* [n] */
    float *keys, *values;
    const kvl_kv_view *after; /* NULL: there is none to correct */
    float *after_keys, *after_values;
} correction;

static bool all_are_zero(size_t n, const float *weights)
{
    float largest = 0.0F;
    for (size_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(weights[i]));
    return largest == 0.0F;
}

/* Adds all anchors' offsets of one section to one layer's rows from row_first on, a tile of tokens
 * at a time. weights [n][n_rows] */
static void add_section(const anchor_party *party, uint32_t layer, kvl_anchor_section section,
                        size_t row_first, size_t n_rows, const float *weights, float *rows)
{
    const kvl_kv_view *base = party->base;
    kvl_anchor_rows of[KVL_ANCHORS_PER_SLOT_MAX];
    for (uint32_t a = 0; a < party->n; a++)
        of[a] = kvl_anchor_rows_of(party->anchors[a], layer, section);
    for (size_t first = row_first; first < n_rows; first += TILE_TOKENS) {
        for (uint32_t a = 0; a < party->n; a++) {
            const size_t n_known = party->anchors[a]->layout.n_tokens;
            if (n_known <= first) continue;
            const size_t n_left = (n_known < n_rows ? n_known : n_rows) - first;
            const size_t n = n_left < TILE_TOKENS ? n_left : TILE_TOKENS;
            if (all_are_zero(n, weights + a * n_rows + first)) continue;
            const kvl_anchor_rows tile =
                kvl_anchor_rows_from(&of[a], first, base->n_kv_heads, base->head_dim);
            kvl_anchor_add(party->pool->kernels, &tile, (uint32_t)n, base->n_kv_heads,
                           base->head_dim, weights + a * n_rows + first,
                           rows + first * row_width(base));
        }
    }
}

/* The same with one weight an anchor. */
static void add_section_evenly(const anchor_party *party, uint32_t layer,
                               kvl_anchor_section section, size_t n_rows,
                               const double *anchor_weights, float *rows)
{
    const kvl_kv_view *base = party->base;
    for (uint32_t a = 0; a < party->n; a++) {
        const kvl_anchor_rows of = kvl_anchor_rows_of(party->anchors[a], layer, section);
        float weights[TILE_TOKENS];
        for (size_t i = 0; i < TILE_TOKENS; i++) weights[i] = (float)anchor_weights[a];
        for (size_t first = 0; first < n_rows; first += TILE_TOKENS) {
            const size_t n = n_rows - first < TILE_TOKENS ? n_rows - first : TILE_TOKENS;
            const kvl_anchor_rows tile =
                kvl_anchor_rows_from(&of, first, base->n_kv_heads, base->head_dim);
            kvl_anchor_add(party->pool->kernels, &tile, (uint32_t)n, base->n_kv_heads,
                           base->head_dim, weights, rows + first * row_width(base));
        }
    }
}

/* This thread's part of the pool's memory for rows. */
static float *rows_scratch(const anchor_party *party, size_t thread)
{
    const kvl_anchor_pool *pool = party->pool;
    const size_t n_rows = pool->options.n_anchors_max > 2 ? pool->options.n_anchors_max : 2;
    const size_t slice = n_rows * row_width(party->base);
    KVL_ASSERT((thread + 1) * slice <= pool->n_per_channel);
    return pool->per_channel + thread * slice;
}

/* The slot's keys or values of one layer. */
static void correct_slot(const correction *c, uint32_t layer, kvl_anchor_section section,
                         const float *weights, size_t thread, float *rows)
{
    const anchor_party *party = c->party;
    const uint32_t n_tokens = party->base->n_tokens;
    if (c->mean_weights == NULL) {
        add_section(party, layer, section, 0, n_tokens, weights, rows);
        return;
    }
    const kvl_anchor_correction shrunk = {.kernels = party->pool->kernels,
                                          .anchors = party->anchors,
                                          .n_anchors = party->n,
                                          .n_tokens = n_tokens,
                                          .layer = layer,
                                          .section = section};
    float *scratch = rows_scratch(party, thread);
    kvl_anchor_add_head(&shrunk, weights, c->mean_weights, scratch, rows);
    add_section(party, layer, section, kvl_anchor_head(n_tokens), n_tokens, weights, rows);
    kvl_anchor_add_means(&shrunk, c->mean_weights, scratch, rows);
}

static void correct_layer(void *context, size_t item, size_t thread)
{
    const correction *c = context;
    const uint32_t layer = (uint32_t)item + 1; /* layer 0 knows no context */
    const size_t at = row_at(c->party->base, layer, 0);
    correct_slot(c, layer, KVL_ANCHOR_SLOT_KEYS, c->key_weights, thread, c->keys + at);
    correct_slot(c, layer, KVL_ANCHOR_SLOT_VALUES, c->value_weights, thread, c->values + at);
    if (c->after == NULL) return;
    const size_t after_at = row_at(c->after, layer, 0);
    add_section_evenly(c->party, layer, KVL_ANCHOR_AFTER_KEYS, c->after->n_tokens,
                       c->anchor_weights, c->after_keys + after_at);
    add_section_evenly(c->party, layer, KVL_ANCHOR_AFTER_VALUES, c->after->n_tokens,
                       c->anchor_weights, c->after_values + after_at);
}

/* One section of the one anchor that measured this very text. */
static void add_exact(const correction *c, uint32_t layer, kvl_anchor_section section,
                      size_t n_rows, float *rows)
{
    const kvl_anchor_rows of = kvl_anchor_rows_of(c->party->exact, layer, section);
    if (of.dtype == KVL_KV_F32) {
        kvl_anchor_add_exact(n_rows * row_width(c->party->base), of.numbers, of.scales, rows);
        return;
    }
    const anchor_party alone = {
        .pool = c->party->pool, .base = c->party->base, .n = 1, .anchors = {c->party->exact}};
    add_section_evenly(&alone, layer, section, n_rows, &(double){1.0}, rows);
}

static void correct_layer_exactly(void *context, size_t item, size_t thread)
{
    (void)thread;
    const correction *c = context;
    const uint32_t layer = (uint32_t)item + 1;
    const size_t at = row_at(c->party->base, layer, 0);
    add_exact(c, layer, KVL_ANCHOR_SLOT_KEYS, c->party->base->n_tokens, c->keys + at);
    add_exact(c, layer, KVL_ANCHOR_SLOT_VALUES, c->party->base->n_tokens, c->values + at);
    if (c->after == NULL) return;
    const size_t after_at = row_at(c->after, layer, 0);
    add_exact(c, layer, KVL_ANCHOR_AFTER_KEYS, c->after->n_tokens, c->after_keys + after_at);
    add_exact(c, layer, KVL_ANCHOR_AFTER_VALUES, c->after->n_tokens, c->after_values + after_at);
}

/* Paper, equation 7: weights of the text after the slot, a channel each, from the last tokens of
 * the slot. weights [n][width]; x is the base's keys or values of the layer. */
static void weigh_channels(const anchor_party *party, uint32_t layer, bool keys, float *weights)
{
    const kvl_kv_view *base = party->base;
    const size_t width = row_width(base);
    const float *x = (keys ? base->keys : base->values) + row_at(base, layer, 0);
    memset(weights, 0, party->n * width * sizeof *weights);
    for (uint32_t a = 0; a < party->n; a++) {
        const kvl_anchor *anchor = party->anchors[a];
        const size_t skipped = anchor->layout.n_tokens - base->n_tokens;
        float *sums = weights + a * width;
        for (size_t t = 0; t < base->n_tokens; t++) {
            const kvl_anchor_rows rows = base_rows(anchor, skipped + t, layer, keys);
            kvl_anchor_add_square_channels(party->pool->kernels, &rows, base->n_kv_heads,
                                           base->head_dim, x + t * width, sums);
        }
        for (size_t i = 0; i < width; i++) sums[i] = sqrtf(sums[i]);
    }
    softmax_columns(party->n, width, width, 1.0F, weights);
}

static void correct_after_as_paper(const correction *c, uint32_t layer, bool keys, float *weights)
{
    const kvl_kv_view *base = c->party->base;
    const kvl_anchor_section section = keys ? KVL_ANCHOR_AFTER_KEYS : KVL_ANCHOR_AFTER_VALUES;
    float *rows = (keys ? c->after_keys : c->after_values) + row_at(c->after, layer, 0);
    weigh_channels(c->party, layer, keys, weights);
    for (uint32_t a = 0; a < c->party->n; a++) {
        const kvl_anchor_rows of = kvl_anchor_rows_of(c->party->anchors[a], layer, section);
        kvl_anchor_add_channels(c->party->pool->kernels, &of, c->after->n_tokens, base->n_kv_heads,
                                base->head_dim, weights + a * row_width(base), rows);
    }
}

static void correct_layer_as_paper(void *context, size_t item, size_t thread)
{
    const correction *c = context;
    const kvl_kv_view *base = c->party->base;
    const uint32_t layer = (uint32_t)item + 1;
    if (c->after != NULL) {
        /* First, since it looks at the base, and c->keys may be the base itself. */
        float *weights = rows_scratch(c->party, thread);
        correct_after_as_paper(c, layer, true, weights);
        correct_after_as_paper(c, layer, false, weights);
    }
    const size_t at = row_at(base, layer, 0);
    correct_slot(c, layer, KVL_ANCHOR_SLOT_KEYS, c->key_weights, thread, c->keys + at);
    correct_slot(c, layer, KVL_ANCHOR_SLOT_VALUES, c->value_weights, thread, c->values + at);
}

static kvl_status check_after(const anchor_party *party, const kvl_kv_view *after, kvl_error *error)
{
    if (after == NULL) return KVL_OK;
    const uint32_t n_after = party->anchors[0]->layout.n_after; /* all of a slot have the same */
    if (after->n_tokens == n_after && after->n_layers == party->base->n_layers &&
        after->n_kv_heads == party->base->n_kv_heads && after->head_dim == party->base->head_dim) {
        return KVL_OK;
    }
    return KVL_FAIL(error, KVL_ERR_FOREIGN,
                    "the text after the slot has %u tokens, its anchors know %u; compute the part",
                    after->n_tokens, n_after);
}

/* Weights a token, into the pool's working memory. */
static void weigh_tokens(const anchor_party *party, correction *c)
{
    const kvl_anchor_pool *pool = party->pool;
    const size_t n_tokens = party->base->n_tokens;
    const float temperature = pool->options.temperature;
    float *first = pool->per_token;
    float *second = pool->per_token + pool->n_per_token / 2;
    c->key_weights = first;
    c->value_weights = first;
    if (pool->options.mode == KVL_ANCHOR_PAPER) {
        measure_distances(party, DISTANCE_ABSOLUTE_KEYS, first);
        measure_distances(party, DISTANCE_ABSOLUTE_VALUES, second);
        softmax_columns(party->n, n_tokens, n_tokens, temperature, second);
        c->value_weights = second;
    }
    const bool shrinks = kvl_anchor_pool_shrinks(pool);
    if (shrinks) kvl_anchor_similarities(party->n * n_tokens, first, second);
    softmax_columns(party->n, n_tokens, n_tokens, temperature, first);
    if (!shrinks) return;
    kvl_anchor_split_weights(party->n, (uint32_t)n_tokens, first, second);
    c->mean_weights = second;
}

kvl_status kvl_anchor_pool_correct(kvl_anchor_pool *pool, const kvl_anchor_slot *slot,
                                   const kvl_digest *base_id, const kvl_kv_view *base, float *keys,
                                   float *values, const kvl_kv_view *after_base, float *after_keys,
                                   float *after_values, kvl_error *error)
{
    anchor_party party;
    gather(pool, slot, base_id, base, &party);
    if (party.n == 0 || base->n_tokens == 0) {
        return KVL_FAIL(error, KVL_ERR_NOT_FOUND,
                        "no anchor of this slot has %u tokens; compute the part", base->n_tokens);
    }
    KVL_TRY(check_after(&party, after_base, error));
    correction c = {
        .party = &party,
        .keys = keys,
        .values = values,
        .after = after_base != NULL && after_base->n_tokens > 0 ? after_base : NULL,
        .after_keys = after_keys,
        .after_values = after_values,
    };
    const size_t n_items = base->n_layers - 1;
    if (party.exact != NULL) {
        kvl_anchor_run(pool, correct_layer_exactly, &c, n_items);
        if (party.exact->uses < UINT32_MAX) party.exact->uses++;
        return KVL_OK;
    }
    double distances[KVL_ANCHORS_PER_SLOT_MAX], weights[KVL_ANCHORS_PER_SLOT_MAX];
    measure_distances(&party, kind_of_gate(pool), pool->per_token);
    summarise(&party, pool->per_token, distances);
    weigh_anchors(&party, distances, weights);
    weigh_tokens(&party, &c);
    c.anchor_weights = weights;
    const bool paper = pool->options.mode == KVL_ANCHOR_PAPER;
    kvl_anchor_run(pool, paper ? correct_layer_as_paper : correct_layer, &c, n_items);
    count_uses(&party, weights);
    return KVL_OK;
}
