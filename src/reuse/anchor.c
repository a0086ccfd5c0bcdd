/* reuse/anchor.c: keeps anchors: measures them, takes them in, lets go of those used least.
 * Method  One list, oldest first, for all slots: a host has tens of slots and hundreds of anchors,
 *         which a scan passes in microseconds, while reading one anchor takes a millisecond.
 *         Eviction is the paper's (least used among the `window` oldest) with ageing, since a count
 *         that never falls lets an old favourite stay for ever. */
#include "reuse/anchor_pool.h"

#include "base/alloc.h"

#include <math.h>
#include <string.h>

kvl_anchor_options kvl_anchor_default_options(void)
{
    return (kvl_anchor_options){
        .mode = KVL_ANCHOR_SCALE_FREE,
        .n_anchors_max = 20,
        .bytes_max = (uint64_t)1 << 30,
        .window = 5,
        .entropy_share = 0.3F,
        .mass = 0.9F,
        .temperature = 1.0F,
        .distance_max = 1.5F,
        .n_anchors_min = 2,
        .coverage_min = 0.5F,
        .shrink = true,
        .dtype = KVL_KV_INT8,
        .threads = NULL,
    };
}

static kvl_status check_options(const kvl_anchor_options *o, kvl_error *error)
{
    if (o->n_anchors_max == 0 || o->n_anchors_max > KVL_ANCHORS_PER_SLOT_MAX) {
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "n_anchors_max is %u, must be 1 to %u",
                        o->n_anchors_max, KVL_ANCHORS_PER_SLOT_MAX);
    }
    if (o->n_anchors_min == 0 || o->n_anchors_min > o->n_anchors_max) {
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "n_anchors_min is %u, must be 1 to %u",
                        o->n_anchors_min, o->n_anchors_max);
    }
    if (o->window == 0) {
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "window is 0, must be 1 or more");
    }
    if (!(o->temperature > 0.0F) || !isfinite(o->temperature)) {
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "temperature is %g, must be above 0",
                        (double)o->temperature);
    }
    if (!(o->mass > 0.0F && o->mass <= 1.0F)) {
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "mass is %g, must be above 0, at most 1",
                        (double)o->mass);
    }
    if (!(o->entropy_share >= 0.0F && o->entropy_share <= 1.0F)) {
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "entropy_share is %g, must be 0 to 1",
                        (double)o->entropy_share);
    }
    if (!(o->coverage_min >= KVL_ANCHOR_COVERAGE_LEAST && o->coverage_min <= 1.0F)) {
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "coverage_min is %g, must be %g to 1",
                        (double)o->coverage_min, (double)KVL_ANCHOR_COVERAGE_LEAST);
    }
    if (!(o->distance_max >= 0.0F)) {
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "distance_max is %g, must be 0 or more",
                        (double)o->distance_max);
    }
    if (o->dtype != KVL_KV_INT8 && o->dtype != KVL_KV_F32) {
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "dtype is %d, must be int8 (%d) or f32 (%d)",
                        (int)o->dtype, (int)KVL_KV_INT8, (int)KVL_KV_F32);
    }
    return KVL_OK;
}

kvl_status kvl_anchor_pool_create(const kvl_anchor_options *options, kvl_anchor_pool **pool,
                                  kvl_error *error)
{
    *pool = NULL;
    KVL_TRY(check_options(options, error));
    kvl_anchor_pool *made = kvl_alloc_zero(1, sizeof *made);
    kvl_anchor **anchors = kvl_alloc_zero(KVL_ANCHOR_POOL_ANCHORS_MAX, sizeof *anchors);
    if (made == NULL || anchors == NULL) {
        kvl_free(made);
        kvl_free(anchors);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the anchor pool");
    }
    made->options = *options;
    made->kernels = kvl_anchor_kernels_for(KVL_CPU_BEST);
    made->anchors = anchors;
    *pool = made;
    return KVL_OK;
}

static void anchor_destroy(kvl_anchor *anchor)
{
    if (anchor == NULL) return;
    kvl_container_release(anchor->container);
    kvl_free(anchor->means);
    kvl_free(anchor);
}

static kvl_status add_means(const kvl_anchor_pool *pool, kvl_anchor *anchor, kvl_error *error)
{
    return kvl_anchor_pool_shrinks(pool) ? kvl_anchor_means_create(pool, anchor, error) : KVL_OK;
}

void kvl_anchor_pool_destroy(kvl_anchor_pool *pool)
{
    if (pool == NULL) return;
    for (uint32_t i = 0; i < pool->n; i++) anchor_destroy(pool->anchors[i]);
    kvl_free(pool->anchors);
    kvl_free(pool->per_token);
    kvl_free(pool->per_channel);
    kvl_free(pool);
}

void kvl_anchor_run(const kvl_anchor_pool *pool, kvl_pool_task *task, void *context, size_t n_items)
{
    if (pool->options.threads != NULL) {
        kvl_pool_run(pool->options.threads, task, context, n_items);
        return;
    }
    for (size_t item = 0; item < n_items; item++) task(context, item, 0);
}

size_t kvl_anchor_n_threads(const kvl_anchor_pool *pool)
{
    return pool->options.threads == NULL ? 1 : kvl_pool_n_threads(pool->options.threads);
}

/* Makes *floats at least n long; what it held is lost. It never shrinks: the longest anchor
 * decides, and a pool that has seen one will see more. */
static kvl_status reserve(size_t n, float **floats, size_t *n_floats, kvl_error *error)
{
    if (n <= *n_floats) return KVL_OK;
    float *larger = kvl_alloc_aligned(n * sizeof *larger);
    if (larger == NULL) {
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for %zu numbers of anchor weights", n);
    }
    kvl_free(*floats);
    *floats = larger;
    *n_floats = n;
    return KVL_OK;
}

static kvl_status reserve_for(kvl_anchor_pool *pool, const kvl_anchor_layout *layout,
                              kvl_error *error)
{
    /* Bounded: at most 64 * 2 * 2^17 and threads * 64 * 2^12 * 256 by the checks of the layout. */
    const size_t n_most = pool->options.n_anchors_max;
    /* The longest text that this anchor is long enough for. */
    size_t n_tokens = (size_t)((float)layout->n_tokens / pool->options.coverage_min) + 1;
    if (n_tokens > KVL_SEGMENT_TOKENS_MAX) n_tokens = KVL_SEGMENT_TOKENS_MAX;
    KVL_TRY(reserve(2 * n_most * n_tokens, &pool->per_token, &pool->n_per_token, error));
    const size_t width = (size_t)layout->n_kv_heads * layout->head_dim;
    const size_t n_rows = n_most > 2 ? n_most : 2;
    return reserve(kvl_anchor_n_threads(pool) * n_rows * width, &pool->per_channel,
                   &pool->n_per_channel, error);
}

static void take_out(kvl_anchor_pool *pool, uint32_t index)
{
    pool->bytes -= pool->anchors[index]->bytes;
    anchor_destroy(pool->anchors[index]);
    pool->n--;
    memmove(pool->anchors + index, pool->anchors + index + 1,
            (pool->n - index) * sizeof *pool->anchors);
}

/* Evicts the least used of the `window` oldest anchors, of one slot or (NULL) of the pool. */
static void evict(kvl_anchor_pool *pool, const kvl_anchor_slot *slot)
{
    uint32_t victim = UINT32_MAX;
    uint32_t n_seen = 0;
    for (uint32_t i = 0; i < pool->n && n_seen < pool->options.window; i++) {
        if (slot != NULL && !kvl_anchor_is_of(pool->anchors[i], slot)) continue;
        n_seen++;
        if (victim == UINT32_MAX || pool->anchors[i]->uses < pool->anchors[victim]->uses) {
            victim = i;
        }
    }
    KVL_ASSERT(victim != UINT32_MAX);
    /* Ageing at evictions and not by the clock: a slot that gets no new anchors has no need to
     * forget, and tests need no time. */
    const kvl_anchor_slot of = pool->anchors[victim]->extra.slot;
    take_out(pool, victim);
    pool->evictions++;
    for (uint32_t i = 0; i < pool->n; i++) {
        if (kvl_anchor_is_of(pool->anchors[i], &of)) pool->anchors[i]->uses /= 2;
    }
}

static uint32_t count_of(const kvl_anchor_pool *pool, const kvl_anchor_slot *slot)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < pool->n; i++) n += kvl_anchor_is_of(pool->anchors[i], slot) ? 1U : 0U;
    return n;
}

static bool same_shape(const kvl_anchor_layout *a, const kvl_anchor_layout *b)
{
    return a->n_layers == b->n_layers && a->n_kv_heads == b->n_kv_heads &&
           a->head_dim == b->head_dim && a->n_after == b->n_after;
}

/* Puts an anchor in as the youngest and makes room for it: its twin goes first, then anchors over
 * the limits. Takes the anchor; cannot fail, so that the pool is never left half changed. */
static void insert(kvl_anchor_pool *pool, kvl_anchor *anchor)
{
    const kvl_anchor_slot *slot = &anchor->extra.slot;
    for (uint32_t i = 0; i < pool->n; i++) {
        const kvl_anchor *old = pool->anchors[i];
        if (!kvl_anchor_is_of(old, slot)) continue;
        if (!kvl_digest_equal(&old->extra.base_id, &anchor->extra.base_id)) continue;
        anchor->uses = old->uses;
        take_out(pool, i);
        break;
    }
    while (count_of(pool, slot) >= pool->options.n_anchors_max) evict(pool, slot);
    while (pool->n == KVL_ANCHOR_POOL_ANCHORS_MAX ||
           (pool->n > 0 && pool->bytes > pool->options.bytes_max - anchor->bytes)) {
        evict(pool, NULL);
    }
    pool->anchors[pool->n++] = anchor;
    pool->bytes += anchor->bytes;
}

static kvl_status check_budget(const kvl_anchor_pool *pool, uint64_t n_bytes, kvl_error *error)
{
    if (n_bytes <= pool->options.bytes_max) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                    "an anchor of %llu bytes does not fit into bytes_max %llu; raise bytes_max",
                    (unsigned long long)n_bytes, (unsigned long long)pool->options.bytes_max);
}

/* Bytes that an anchor counts for. */
static uint64_t weigh(const kvl_anchor_layout *layout)
{
    const uint64_t row = (uint64_t)layout->n_kv_heads * layout->head_dim * sizeof(float);
    return ((uint64_t)layout->block_bytes + 2 * row) * layout->n_layers + sizeof(kvl_anchor);
}

static bool mode_can_use(kvl_anchor_mode mode, const kvl_anchor_layout *layout)
{
    return mode == KVL_ANCHOR_SCALE_FREE || (layout->base_stride == 1 && layout->base_keys);
}

kvl_status kvl_anchor_pool_add(kvl_anchor_pool *pool, const kvl_digest *fingerprint,
                               kvl_container *container, kvl_error *error)
{
    kvl_anchor_extra extra;
    kvl_anchor_layout layout;
    KVL_TRY(kvl_anchor_container_check(fingerprint, container, &extra, &layout, error));
    if (!mode_can_use(pool->options.mode, &layout)) {
        return KVL_FAIL(
            error, KVL_ERR_FOREIGN,
            "anchor holds no keys of the base, which the paper's mode needs; measure it "
            "again in this mode");
    }
    KVL_TRY(check_budget(pool, weigh(&layout), error));
    /* One shape a slot: correct() may then take the text after it from any of its anchors. */
    for (uint32_t i = 0; i < pool->n; i++) {
        const kvl_anchor *other = pool->anchors[i];
        if (kvl_anchor_is_of(other, &extra.slot) && !same_shape(&other->layout, &layout)) {
            return KVL_FAIL(error, KVL_ERR_FOREIGN,
                            "anchor has %u tokens after its slot, others of the slot have %u, or "
                            "their layers and heads differ",
                            layout.n_after, other->layout.n_after);
        }
    }
    kvl_anchor *anchor = kvl_alloc_zero(1, sizeof *anchor);
    if (anchor == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for an anchor");
    const kvl_status status = reserve_for(pool, &layout, error);
    if (status < 0) {
        kvl_free(anchor);
        return status;
    }
    kvl_container_share(container);
    *anchor = (kvl_anchor){
        .container = container, .extra = extra, .layout = layout, .bytes = weigh(&layout)};
    const kvl_status averaged = add_means(pool, anchor, error);
    if (averaged < 0) {
        anchor_destroy(anchor);
        return averaged;
    }
    insert(pool, anchor);
    return KVL_OK;
}

typedef struct fill_job {
    const kvl_anchor_layout *layout;
    const kvl_kv_view *base, *real, *after_base, *after_real;
    kvl_container *container;
    bool sane[KVL_ANCHOR_LAYERS_MAX]; /* by layer: threads do not share a flag */
} fill_job;

static void fill_layer(void *context, size_t layer, size_t thread)
{
    (void)thread;
    fill_job *job = context;
    size_t n_bytes = 0;
    uint8_t *block = kvl_container_block(job->container, (uint32_t)layer, &n_bytes);
    KVL_ASSERT(n_bytes >= job->layout->block_bytes);
    job->sane[layer] = kvl_anchor_block_fill(job->layout, (uint32_t)layer, job->base, job->real,
                                             job->after_base, job->after_real, block);
}

static bool views_agree(const kvl_kv_view *a, const kvl_kv_view *b)
{
    return a->n_layers == b->n_layers && a->n_tokens == b->n_tokens &&
           a->n_kv_heads == b->n_kv_heads && a->head_dim == b->head_dim;
}

static kvl_status plan_layout(const kvl_anchor_pool *pool, const kvl_kv_view *base,
                              uint32_t n_after, kvl_anchor_layout *layout, kvl_error *error)
{
    const bool paper = pool->options.mode == KVL_ANCHOR_PAPER;
    *layout = (kvl_anchor_layout){
        .dtype = pool->options.dtype,
        .n_layers = base->n_layers,
        .n_kv_heads = base->n_kv_heads,
        .head_dim = base->head_dim,
        .n_tokens = base->n_tokens,
        .n_after = n_after,
        .base_stride = paper ? 1 : KVL_ANCHOR_DISTANCE_STRIDE,
        .base_keys = paper,
    };
    if (!kvl_anchor_layout_fill(layout)) {
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "a slot of %u tokens and %u after it, %u layers, %u heads of %u, cannot "
                        "become an anchor",
                        base->n_tokens, n_after, base->n_layers, base->n_kv_heads, base->head_dim);
    }
    return check_budget(pool, weigh(layout), error);
}

/* Writes all blocks of a new container. */
static kvl_status fill(const kvl_anchor_pool *pool, const kvl_anchor_layout *layout,
                       const kvl_kv_view *base, const kvl_kv_view *real,
                       const kvl_kv_view *after_base, const kvl_kv_view *after_real,
                       kvl_container *container, kvl_error *error)
{
    fill_job *job = kvl_alloc_zero(1, sizeof *job);
    if (job == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to measure an anchor");
    job->layout = layout;
    job->base = base;
    job->real = real;
    job->after_base = after_base;
    job->after_real = after_real;
    job->container = container;
    kvl_anchor_run(pool, fill_layer, job, layout->n_layers);
    uint32_t layer = 0;
    while (layer < layout->n_layers && job->sane[layer]) layer++;
    kvl_free(job);
    if (layer == layout->n_layers) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                    "KV of layer %u or of tokens beside it is not finite or above %g", layer,
                    (double)KVL_ANCHOR_MAGNITUDE_MAX);
}

static kvl_status make_container(const kvl_anchor_layout *layout, const kvl_anchor_extra *extra,
                                 const kvl_digest *fingerprint, kvl_container **container,
                                 kvl_error *error)
{
    uint8_t bytes[KVL_ANCHOR_EXTRA_BYTES];
    kvl_anchor_extra_encode(extra, bytes);
    const kvl_container_info info = {
        .kind = KVL_CONTAINER_ANCHOR,
        .id = kvl_anchor_id(fingerprint, extra, layout),
        .fingerprint = *fingerprint,
        .dtype = layout->dtype,
        .n_layers = layout->n_layers,
        .n_kv_heads = layout->n_kv_heads,
        .head_dim = layout->head_dim,
        .block_bytes = layout->block_bytes,
        .extra = bytes,
        .n_extra_bytes = sizeof bytes,
    };
    return kvl_container_create(&info, container, error);
}

/* An anchor of what was measured, not yet in the pool. */
static kvl_status make_anchor(kvl_anchor_pool *pool, const kvl_anchor_layout *layout,
                              const kvl_anchor_extra *extra, kvl_container *container,
                              kvl_anchor **anchor, kvl_error *error)
{
    KVL_TRY(reserve_for(pool, layout, error));
    *anchor = kvl_alloc_zero(1, sizeof **anchor);
    if (*anchor == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for an anchor");
    kvl_container_seal(container);
    kvl_container_share(container);
    **anchor = (kvl_anchor){
        .container = container, .extra = *extra, .layout = *layout, .bytes = weigh(layout)};
    const kvl_status averaged = add_means(pool, *anchor, error);
    if (averaged < 0) {
        anchor_destroy(*anchor);
        *anchor = NULL;
    }
    return averaged;
}

kvl_status kvl_anchor_pool_measure(kvl_anchor_pool *pool, const kvl_anchor_slot *slot,
                                   const kvl_digest *fingerprint, const kvl_digest *base_id,
                                   const kvl_kv_view *base, const kvl_kv_view *real,
                                   const kvl_kv_view *after_base, const kvl_kv_view *after_real,
                                   kvl_container **container, kvl_error *error)
{
    const uint32_t n_after = after_base == NULL ? 0 : after_base->n_tokens;
    *container = NULL;
    KVL_ASSERT(views_agree(base, real));
    KVL_ASSERT(n_after == 0 || (after_real != NULL && views_agree(after_base, after_real)));
    KVL_ASSERT(n_after == 0 || (after_base->n_layers == base->n_layers &&
                                after_base->n_kv_heads == base->n_kv_heads &&
                                after_base->head_dim == base->head_dim));
    kvl_anchor_layout layout;
    KVL_TRY(plan_layout(pool, base, n_after, &layout, error));
    const kvl_anchor_extra extra = {
        .slot = *slot,
        .base_id = *base_id,
        .n_tokens = base->n_tokens,
        .n_after = n_after,
        .base_stride = layout.base_stride,
        .base_keys = layout.base_keys,
    };
    kvl_container *made = NULL;
    kvl_anchor *anchor = NULL;
    KVL_TRY(make_container(&layout, &extra, fingerprint, &made, error));
    kvl_status status = fill(pool, &layout, base, real, after_base, after_real, made, error);
    if (status >= 0) status = make_anchor(pool, &layout, &extra, made, &anchor, error);
    if (status < 0) {
        kvl_container_release(made);
        return status;
    }
    /* A stranger's anchor of another shape must not shut out what this host saw itself. */
    for (uint32_t i = pool->n; i-- > 0;) {
        const kvl_anchor *other = pool->anchors[i];
        if (!kvl_anchor_is_of(other, slot) || same_shape(&other->layout, &layout)) continue;
        take_out(pool, i);
        pool->evictions++;
    }
    insert(pool, anchor);
    *container = made;
    return KVL_OK;
}

void kvl_anchor_pool_stats(const kvl_anchor_pool *pool, kvl_anchor_stats *stats)
{
    *stats = (kvl_anchor_stats){
        .n_anchors = pool->n, .bytes = pool->bytes, .evictions = pool->evictions};
}

uint32_t kvl_anchor_pool_n_anchors(const kvl_anchor_pool *pool, const kvl_anchor_slot *slot,
                                   uint32_t n_tokens)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < pool->n; i++) {
        n += kvl_anchor_is_of(pool->anchors[i], slot) &&
             kvl_anchor_is_long_enough(pool, pool->anchors[i], n_tokens);
    }
    return n;
}
