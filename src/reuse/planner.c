/* reuse/planner.c: the rules, in the order in which they are asked.
 * Method  One walk over the parts decides each alone; if a slot turns out to lack anchors and the
 *         rule is all or nothing, a second walk makes everything beyond the exact prefix dense. */
#include "reuse/planner.h"

#include <math.h>

kvl_plan_options kvl_plan_default_options(void)
{
    return (kvl_plan_options){
        .quality = KVL_QUALITY_BALANCED,
        .reuse = true,
        .anchors = true,
        .all_or_nothing = true,
        .blend_share = 0.2,
        .short_text_tokens = 48,
    };
}

const char *kvl_action_name(kvl_action action)
{
    switch (action) {
    case KVL_ACTION_COMPUTE: return "compute";
    case KVL_ACTION_SHARE: return "share";
    case KVL_ACTION_PLACE: return "place";
    case KVL_ACTION_OFFSET: return "offset";
    case KVL_ACTION_BLEND: return "blend";
    }
    return "unknown";
}

/* Time to prefill n tokens behind `before` others: the difference of the fit at both ends. */
static double compute_ms(const kvl_plan_rates *rates, uint64_t before, uint32_t n)
{
    const double from = (double)before;
    const double count = (double)n;
    return rates->prefill_ms_per_token * count +
           rates->prefill_ms_per_square_token * count * (2.0 * from + count);
}

/* amount / rate; infinite where the rate is not known, so that it is never chosen. */
static double at_rate(double amount, double rate)
{
    if (amount <= 0.0) return 0.0;
    return rate > 0.0 ? amount / rate : HUGE_VAL;
}

/* Time to have n tokens of a part from its segment, corrected by n_anchors (0: not). */
static double reuse_ms(const kvl_plan_rates *rates, const kvl_plan_part *part, uint32_t n,
                       uint32_t n_anchors)
{
    double ms = at_rate((double)n, rates->place_tokens_per_ms) +
                at_rate((double)n * n_anchors, rates->offset_tokens_per_ms);
    const double bytes = (double)part->segment_bytes;
    if (part->where == KVL_SEGMENT_PEER) {
        ms += rates->fetch_latency_ms + at_rate(bytes, rates->fetch_bytes_per_ms);
    } else {
        ms += at_rate(bytes, rates->local_bytes_per_ms);
    }
    return ms;
}

/* What is known while walking over the parts. */
typedef struct plan_walk {
    const kvl_plan_options *options;
    const kvl_plan_rates *rates;
    uint64_t before;           /* tokens of the parts so far */
    bool in_prefix;            /* every part so far is in the exact prefix */
    const kvl_plan_part *slot; /* the part before, where it is a slot, or NULL */
    kvl_action slot_action;
} plan_walk;

static void choose(kvl_plan_step *step, kvl_action action, const char *reason)
{
    step->action = action;
    step->reason = reason;
}

/* n tokens of a slot beyond the prefix that has a segment, where correction or placing is allowed.
 */
static void choose_slot(const plan_walk *w, const kvl_plan_part *part, uint32_t n,
                        kvl_plan_step *step)
{
    const kvl_plan_options *o = w->options;
    const double compute = compute_ms(w->rates, w->before + step->n_shared, n);
    const double place = reuse_ms(w->rates, part, n, 0);
    if (!(place < compute)) {
        choose(step, KVL_ACTION_COMPUTE, "cheaper to compute than to load");
        return;
    }
    if (!o->anchors && !o->blend) {
        choose(step, KVL_ACTION_PLACE, "anchors are off");
        return;
    }
    const bool corrects =
        o->anchors && (part->verdict == KVL_ANCHOR_EXACT || part->verdict == KVL_ANCHOR_SHARE);
    if (o->blend && !corrects) {
        if (place + o->blend_share * compute < compute)
            choose(step, KVL_ACTION_BLEND, "placed, and its most attended tokens computed again");
        else
            choose(step, KVL_ACTION_COMPUTE, "cheaper to compute than to blend");
        return;
    }
    if (corrects) {
        const uint32_t n_anchors = part->n_anchors > 0 ? part->n_anchors : 1;
        if (reuse_ms(w->rates, part, n, n_anchors) < compute) {
            choose(step, KVL_ACTION_OFFSET,
                   part->verdict == KVL_ANCHOR_EXACT ? "an anchor of this very text"
                                                     : "anchors are near enough");
        } else {
            choose(step, KVL_ACTION_COMPUTE, "cheaper to compute than to correct");
        }
        return;
    }
    const bool few = part->verdict == KVL_ANCHOR_TOO_FEW;
    if (o->quality == KVL_QUALITY_FAST) {
        choose(step, KVL_ACTION_PLACE,
               few ? "too few anchors, placed as it is" : "no anchor is near, placed as it is");
        return;
    }
    /* Loading would pay, only anchors are missing: this time's work buys the next times'. */
    step->measure = true;
    choose(step, KVL_ACTION_COMPUTE,
           few ? "too few anchors: computed and measured"
               : "no anchor is near: computed and "
                 "measured");
}

/* n tokens of text beyond the prefix that has a segment. */
static void choose_text(const plan_walk *w, const kvl_plan_part *part, uint32_t n,
                        kvl_plan_step *step)
{
    const kvl_plan_options *o = w->options;
    if (w->slot != NULL && part->n_tokens <= o->short_text_tokens) {
        choose(step, KVL_ACTION_COMPUTE, "short text after a slot");
        return;
    }
    const double compute = compute_ms(w->rates, w->before + step->n_shared, n);
    if (!(reuse_ms(w->rates, part, n, 0) < compute)) {
        choose(step, KVL_ACTION_COMPUTE, "cheaper to compute than to load");
        return;
    }
    /* Only beside a corrected slot: the offset of this text is weighed by that slot's base. */
    if (w->slot != NULL && w->slot_action == KVL_ACTION_OFFSET) {
        const uint32_t n_anchors = w->slot->n_anchors > 0 ? w->slot->n_anchors : 1;
        if (reuse_ms(w->rates, part, n, n_anchors) < compute) {
            choose(step, KVL_ACTION_OFFSET, "the anchors of the slot before it know this text");
        } else {
            choose(step, KVL_ACTION_COMPUTE, "cheaper to compute than to correct");
        }
        return;
    }
    if (!o->anchors) {
        choose(step, KVL_ACTION_PLACE, "anchors are off");
    } else if (o->quality == KVL_QUALITY_FAST) {
        choose(step, KVL_ACTION_PLACE, "no anchor knows this text, placed as it is");
    } else {
        choose(step, KVL_ACTION_COMPUTE, "no anchor knows this text");
    }
}

/* Decides for the n tokens of a part that are beyond the prefix, of which the last n_tail are
 * computed in any case. */
static void choose_rest(const plan_walk *w, const kvl_plan_part *part, uint32_t n, uint32_t n_tail,
                        kvl_plan_step *step)
{
    if (!w->options->reuse) {
        choose(step, KVL_ACTION_COMPUTE, "reuse is off");
    } else if (n == 0) {
        choose(step, KVL_ACTION_SHARE, part->n_tokens == 0 ? "empty" : "exact prefix");
    } else if (n <= n_tail) {
        choose(step, KVL_ACTION_COMPUTE, "last token of the prompt");
    } else if (w->options->quality == KVL_QUALITY_EXACT) {
        choose(step, KVL_ACTION_COMPUTE, "exact quality: not in the exact prefix");
    } else if (part->where == KVL_SEGMENT_NOWHERE) {
        choose(step, KVL_ACTION_COMPUTE, "no segment of it was found");
    } else if (part->kind == KVL_PART_SLOT) {
        choose_slot(w, part, n - n_tail, step);
    } else {
        choose_text(w, part, n - n_tail, step);
    }
}

/* Sets the counts and the cost that follow from the action. n_tail: tokens at the end that are
 * computed in any case. */
static void settle(const plan_walk *w, const kvl_plan_part *part, uint32_t n_tail,
                   kvl_plan_step *step)
{
    const uint32_t keep = part->n_tokens - n_tail;
    if (step->n_shared > keep) step->n_shared = keep;
    const bool reuses = step->action == KVL_ACTION_PLACE || step->action == KVL_ACTION_OFFSET ||
                        step->action == KVL_ACTION_BLEND;
    step->n_reused = reuses ? keep - step->n_shared : 0;
    step->n_computed = part->n_tokens - step->n_shared - step->n_reused;
    if (part->n_tokens > 0 && step->n_shared == 0 && step->n_reused == 0) {
        if (step->action != KVL_ACTION_COMPUTE) step->reason = "last token of the prompt";
        step->action = KVL_ACTION_COMPUTE;
    }
    step->compute_ms = compute_ms(w->rates, w->before, part->n_tokens);
    const uint64_t computed_from = w->before + part->n_tokens - step->n_computed;
    step->cost_ms = compute_ms(w->rates, computed_from, step->n_computed);
    if (step->n_reused == 0) return;
    const kvl_plan_part *by = part->kind == KVL_PART_SLOT ? part : w->slot;
    uint32_t n_anchors = 0;
    if (step->action == KVL_ACTION_OFFSET) n_anchors = by->n_anchors > 0 ? by->n_anchors : 1;
    step->cost_ms += reuse_ms(w->rates, part, step->n_reused, n_anchors);
    if (step->action == KVL_ACTION_BLEND)
        step->cost_ms += w->options->blend_share *
                         compute_ms(w->rates, w->before + step->n_shared, step->n_reused);
}

/* Moves on behind a part. */
static void pass(plan_walk *w, const kvl_plan_part *part, const kvl_plan_step *step)
{
    const bool whole = w->options->reuse && part->n_shared == part->n_tokens;
    w->in_prefix = w->in_prefix && whole;
    w->before += part->n_tokens;
    w->slot = part->kind == KVL_PART_SLOT ? part : NULL;
    w->slot_action = step->action;
}

/* One walk; `dense` computes everything beyond the prefix. Returns whether a slot lacks anchors. */
static bool walk_parts(const kvl_plan_options *options, const kvl_plan_rates *rates,
                       const kvl_plan_part *parts, size_t n_parts, bool dense, kvl_plan_step *steps)
{
    size_t last = n_parts; /* part with the last token */
    for (size_t i = 0; i < n_parts; i++) last = parts[i].n_tokens > 0 ? i : last;
    plan_walk w = {.options = options, .rates = rates, .in_prefix = options->reuse};
    bool lacking = false;
    for (size_t i = 0; i < n_parts; i++) {
        const kvl_plan_part *part = &parts[i];
        KVL_ASSERT(part->n_shared <= part->n_tokens);
        kvl_plan_step *step = &steps[i];
        const char *measured = dense && step->measure ? step->reason : NULL;
        *step = (kvl_plan_step){.n_shared = w.in_prefix ? part->n_shared : 0};
        const uint32_t n = part->n_tokens - step->n_shared;
        const uint32_t n_tail = i == last ? 1 : 0;
        if (dense && n > 0) {
            choose(step, KVL_ACTION_COMPUTE,
                   measured != NULL
                       ? measured
                       : "another slot lacks anchors: computed, so that they are exact");
            step->measure = measured != NULL;
        } else {
            choose_rest(&w, part, n, n_tail, step);
        }
        lacking = lacking || step->measure;
        settle(&w, part, n_tail, step);
        pass(&w, part, step);
    }
    return lacking;
}

static void add_up(const kvl_plan_part *parts, const kvl_plan_step *steps, size_t n_parts,
                   kvl_plan_totals *totals)
{
    for (size_t i = 0; i < n_parts; i++) {
        totals->n_tokens += parts[i].n_tokens;
        totals->n_shared += steps[i].n_shared;
        totals->n_computed += steps[i].n_computed;
        if (steps[i].action == KVL_ACTION_OFFSET) {
            totals->n_offset += steps[i].n_reused;
        } else if (steps[i].action == KVL_ACTION_BLEND) {
            totals->n_blended += steps[i].n_reused;
        } else {
            totals->n_placed += steps[i].n_reused;
        }
        totals->cost_ms += steps[i].cost_ms;
        totals->compute_ms += steps[i].compute_ms;
    }
}

void kvl_plan_make(const kvl_plan_options *options, const kvl_plan_rates *rates,
                   const kvl_plan_part *parts, size_t n_parts, kvl_plan_step *steps,
                   kvl_plan_totals *totals)
{
    *totals = (kvl_plan_totals){0};
    const bool lacking = walk_parts(options, rates, parts, n_parts, false, steps);
    if (lacking && options->all_or_nothing) {
        totals->dense = true;
        (void)walk_parts(options, rates, parts, n_parts, true, steps);
    }
    add_up(parts, steps, n_parts, totals);
}
