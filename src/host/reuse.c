/* host/reuse.c: what a prompt's KV is made of: planned, placed, corrected, and the rest computed.
 */
#include "base/alloc.h"
#include "host/host_parts.h"

#include <math.h>

/* A run's measurement moves the host's rates by this share: single runs are noisy. */
static const double RATE_WEIGHT = 0.3;
/* Below this many tokens a prefill says little of long ones. */
enum { TOKENS_THAT_TELL = 128 };

kvl_plan_rates host_first_rates(void)
{
    /* A small model on two cores; the first dense prefill corrects it. */
    return (kvl_plan_rates){
        .prefill_ms_per_token = 1.5,
        .prefill_ms_per_square_token = 0.0002,
        .local_bytes_per_ms = 2e6,
        .disk_bytes_per_ms = 1e6,
        .fetch_bytes_per_ms = 1e6,
        .fetch_latency_ms = 1.0,
        .place_tokens_per_ms = 50.0,
        .offset_tokens_per_ms = 100.0,
    };
}

/* Without anchors nobody looks at KV at home: it goes straight into pages, layer by layer, while
 * the first layers are computed. */
bool run_loads_beside(const run *r)
{
    return r->select != NULL && kvl_engine_loads(r->host->engine);
}

/* Matches the anchors of one slot against its KV at home, which stays loaded for run_fill. */
static kvl_status match(run *r, run_part *part, kvl_error *error)
{
    kvl_host *host = r->host;
    part->match = (kvl_anchor_match){.verdict = KVL_ANCHOR_TOO_FEW};
    if (part->container == NULL || run_loads_beside(r)) return KVL_OK;
    KVL_TRY(kv_buffer_load(&host->bases[part->slot], host->engine, part->container, error));
    const kvl_kv_view base =
        kv_buffer_view(&host->bases[part->slot], host->engine->shape, part->n_tokens);
    const kvl_anchor_slot slot = {r->template_id, part->slot};
    kvl_anchor_pool_match(host->anchors, &slot, &part->id, &base, &part->match);
    return KVL_OK;
}

static uint32_t shared_tokens(const run *r, const run_part *part)
{
    if (r->n_shared <= part->first) return 0;
    const uint32_t n = r->n_shared - part->first;
    return n < part->n_tokens ? n : part->n_tokens;
}

static void describe(const run *r, const run_part *part, kvl_plan_part *about)
{
    *about = (kvl_plan_part){
        .kind = part->is_slot ? KVL_PART_SLOT : KVL_PART_TEXT,
        .n_tokens = part->n_tokens,
        .n_shared = shared_tokens(r, part),
        .where = part->container == NULL ? KVL_SEGMENT_NOWHERE : KVL_SEGMENT_LOCAL,
        .verdict = part->match.verdict,
        .n_anchors = part->match.n_anchors,
    };
    if (part->container == NULL) return;
    const kvl_container_info *info = kvl_container_info_of(part->container);
    about->segment_bytes = info->block_bytes * info->n_layers;
}

static kvl_quality quality_of(const run *r)
{
    switch (r->task->quality) {
    case KVLOOM__V1__QUALITY__QUALITY_EXACT: return KVL_QUALITY_EXACT;
    case KVLOOM__V1__QUALITY__QUALITY_FAST: return KVL_QUALITY_FAST;
    default: return KVL_QUALITY_BALANCED;
    }
}

/* A slot whose segment has gone with its host is not one that anchors failed: it alone is computed,
 * and what its neighbours have is still of use. */
static bool some_slot_lacks_anchors(const run *r)
{
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const run_part *part = &r->parts[p];
        if (part->is_slot && part->n_tokens > 0 && part->container != NULL &&
            part->match.verdict != KVL_ANCHOR_EXACT && part->match.verdict != KVL_ANCHOR_SHARE)
            return true;
    }
    return false;
}

/* Loading is slower than computing again what the policy asks for: the heads of the chunks grow
 * until it is not. */
static void widen(run *r, uint32_t n_blended, double share)
{
    uint32_t n_runs = 0;
    for (uint32_t p = 0; p < r->n_parts; p++)
        n_runs += r->parts[p].step.action == KVL_ACTION_BLEND && r->parts[p].step.n_reused > 0;
    const uint32_t n_sink = (uint32_t)(share * n_blended / n_runs);
    if (n_sink <= r->select->n_sink) return;
    r->widened = *r->select;
    r->widened.n_sink = n_sink;
    r->select = &r->widened;
}

double host_bytes_of_token(const kvl_host *host)
{
    const kvl_model_shape *s = host->engine->shape;
    const kvl_kv_dtype dtype = host->segment_dtype;
    const double width = dtype == KVL_KV_F32 ? 4.0 : dtype == KVL_KV_INT8 ? 1.0 : 2.0;
    return 2.0 * s->n_layers * s->n_kv_heads * s->head_dim * width;
}

kvl_status run_plan(run *r, kvl_error *error)
{
    const int64_t start = kvl_clock_now(r->host->clock);
    kvl_plan_part about[KVL_PARTS_MAX];
    kvl_plan_step steps[KVL_PARTS_MAX];
    for (uint32_t p = 0; p < r->n_parts; p++) {
        if (r->parts[p].is_slot) KVL_TRY(match(r, &r->parts[p], error));
        describe(r, &r->parts[p], &about[p]);
    }
    kvl_plan_options options = kvl_plan_default_options();
    options.quality = quality_of(r);
    options.blend = r->select != NULL;
    /* A policy that asks for scores has a pass over everything loaded before it computes again. */
    options.blend_overlaps =
        run_loads_beside(r) && !r->task->load_first && r->select->score == KVL_SELECT_NO_SCORE;
    options.anchors = !options.blend;
    options.all_or_nothing = !options.blend && some_slot_lacks_anchors(r);
    quality_entry *known =
        quality_find(&r->host->quality, r->task->workflow, r->task->template_name);
    options.errors = known->errors;
    if (r->task->error_budget > 0.0) options.error_budget = r->task->error_budget;
    kvl_plan_totals totals = {0};
    kvl_plan_make(&options, &r->host->rates, about, r->n_parts, steps, &totals);
    for (uint32_t p = 0; p < r->n_parts; p++) r->parts[p].step = steps[p];
    /* A policy that was asked for by its name does what it says. The share is a mean of parts': it
     * is above the least only by more than rounding. */
    if (r->task->select[0] == '\0' && options.blend_overlaps &&
        totals.blend_share > 1.001 * options.blend_share)
        widen(r, (uint32_t)totals.n_blended, totals.blend_share);
    r->expected_error = totals.error;
    r->is_exact = totals.n_placed == 0 && totals.n_offset == 0 && totals.n_blended == 0;
    r->correct_ns += kvl_clock_now(r->host->clock) - start;
    return KVL_OK;
}

static void add_mean(run *r, const kvl_mean *mean, const kv_buffer *buffer, uint32_t n)
{
    const size_t layer_floats = (size_t)n * mean->n_kv_heads * mean->head_dim;
    for (uint32_t l = 0; l < mean->n_layers; l++)
        kvl_mean_apply(mean, l, 0, n, buffer->keys + l * layer_floats,
                       buffer->values + l * layer_floats);
    r->n_shifted += n;
}

static kvl_status reuse_part(run *r, run_part *part, bool with_anchors, kvl_error *error)
{
    kvl_host *host = r->host;
    kv_buffer *buffer = &host->bases[part->slot];
    const kvl_kv_view base = kv_buffer_view(buffer, host->engine->shape, part->n_tokens);
    const int64_t start = kvl_clock_now(host->clock);
    if (part->step.action == KVL_ACTION_OFFSET && with_anchors) {
        const kvl_anchor_slot slot = {r->template_id, part->slot};
        KVL_TRY(kvl_anchor_pool_correct(host->anchors, &slot, &part->id, &base, buffer->keys,
                                        buffer->values, NULL, NULL, NULL, error));
    }
    const kvl_mean *mean = with_anchors ? run_mean(r, part) : NULL;
    if (mean != NULL) add_mean(r, mean, buffer, part->n_tokens);
    const int64_t corrected = kvl_clock_now(host->clock);
    const kvl_placement placement = {
        .kv = &base,
        .token_first = part->step.n_shared,
        .position_first = part->first + part->step.n_shared,
        .n = part->step.n_reused,
    };
    kvl_session_place(r->session, &placement);
    r->correct_ns += corrected - start;
    const int64_t placed = kvl_clock_now(host->clock) - corrected;
    r->place_ns += placed;
    if (placement.n >= TOKENS_THAT_TELL)
        host_learn_rate(&host->rates.place_tokens_per_ms, placement.n, kvl_ns_to_ms(placed));
    return KVL_OK;
}

/* Positions that are neither shared nor placed, in order; a policy may add to them. */
static uint32_t list_computed(run *r)
{
    uint32_t n = 0;
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const run_part *part = &r->parts[p];
        for (uint32_t t = part->step.n_shared + part->step.n_reused; t < part->n_tokens; t++)
            r->positions[n++] = part->first + t;
    }
    return n;
}

/* Keeps the measured cost of a token near the truth; attention's share keeps its first guess, since
 * one run cannot tell the two apart. */
static void learn_prefill(kvl_plan_rates *rates, uint32_t n, double ms)
{
    if (n < TOKENS_THAT_TELL) return;
    const double attention = rates->prefill_ms_per_square_token * (double)n * (double)n;
    const double per_token = fmax(ms - attention, 0.1 * ms) / (double)n;
    rates->prefill_ms_per_token += RATE_WEIGHT * (per_token - rates->prefill_ms_per_token);
}

void host_learn_rate(double *rate, double amount, double ms)
{
    if (!(ms > 0.0)) return;
    *rate += RATE_WEIGHT * (amount / ms - *rate);
}

static kvl_status begin_loading(run *r, kvl_error *error)
{
    const int64_t start = kvl_clock_now(r->host->clock);
    kvl_session_load loads[KVL_PARTS_MAX];
    size_t n = 0;
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const run_part *part = &r->parts[p];
        if (part->step.n_reused == 0) continue;
        loads[n++] = (kvl_session_load){
            part->container, part->container_first + part->step.n_shared,
            part->first + part->step.n_shared, part->step.n_reused, run_mean(r, part)};
        if (loads[n - 1].mean != NULL) r->n_shifted += part->step.n_reused;
    }
    if (n == 0) return KVL_OK;
    kvl_free(r->load_times); /* of an earlier filling */
    r->load_times = kvl_alloc_zero(1, sizeof *r->load_times);
    if (r->load_times == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a run");
    KVL_TRY(kvl_session_load_begin(r->session, loads, n, error));
    if (r->task->load_first) kvl_session_load_end(r->session, r->load_times);
    r->place_ns += kvl_clock_now(r->host->clock) - start;
    return KVL_OK;
}

kvl_status run_load_bases(run *r, kvl_error *error)
{
    kvl_host *host = r->host;
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const run_part *part = &r->parts[p];
        if (part->step.n_reused > 0)
            KVL_TRY(kv_buffer_load(&host->bases[part->slot], host->engine, part->container, error));
    }
    return KVL_OK;
}

static kvl_status place_parts(run *r, bool with_anchors, kvl_error *error)
{
    if (with_anchors && run_loads_beside(r)) return begin_loading(r, error);
    for (uint32_t p = 0; p < r->n_parts; p++) {
        if (r->parts[p].step.n_reused > 0)
            KVL_TRY(reuse_part(r, &r->parts[p], with_anchors, error));
    }
    return KVL_OK;
}

/* The loading thread's own time: what it waits for is in no rate. */
static void learn_loading(run *r)
{
    uint32_t n = 0;
    r->wait_ns = r->load_times->wait_ns;
    for (uint32_t p = 0; p < r->n_parts; p++) n += r->parts[p].step.n_reused;
    if (n >= TOKENS_THAT_TELL)
        host_learn_rate(&r->host->rates.place_tokens_per_ms, n,
                        kvl_ns_to_ms(r->load_times->busy_ns));
}

kvl_status run_fill(run *r, bool with_anchors, kvl_error *error)
{
    KVL_TRY(place_parts(r, with_anchors, error));
    uint32_t n = list_computed(r);
    if (with_anchors) KVL_TRY(run_select(r, &n, error));
    r->n_filled = n;
    const int64_t start = kvl_clock_now(r->host->clock);
    KVL_TRY(run_compute(r, n, error));
    const int64_t took = kvl_clock_now(r->host->clock) - start;
    r->compute_ns += took;
    kvl_session_load_end(r->session, r->load_times);
    if (r->load_times != NULL) learn_loading(r);
    learn_prefill(&r->host->rates, n, kvl_ns_to_ms(took));
    return KVL_OK;
}
