/* reuse/planner.c: the rules, in the order in which they are asked.
 * Method  One walk over the parts decides each alone; if a slot turns out to lack anchors and the
 *         rule is all or nothing, a second walk makes everything beyond the exact prefix dense. */
#include "reuse/planner.h"

#include "reuse/budget.h"
#include "reuse/controller.h"

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
        .errors = kvl_error_model_first(),
        .error_budget = HUGE_VAL,
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
    } else if (part->where == KVL_SEGMENT_DISK) {
        ms += at_rate(bytes, rates->disk_bytes_per_ms);
    } else {
        ms += at_rate(bytes, rates->local_bytes_per_ms);
    }
    return ms;
}

double kvl_plan_compute_ms(const kvl_plan_rates *rates, uint64_t before, uint32_t n)
{
    return compute_ms(rates, before, n);
}

double kvl_plan_load_ms(const kvl_plan_rates *rates, const kvl_plan_part *part, uint32_t n)
{
    return part->where == KVL_SEGMENT_NOWHERE ? HUGE_VAL : reuse_ms(rates, part, n, 0);
}

static kvl_load_decision control_blend(const kvl_plan_options *options, double prefill_ms,
                                       double load_ms)
{
    const kvl_load_case about = {.prefill_ms = prefill_ms,
                                 .least_ratio = options->blend_share,
                                 .overlaps = options->blend_overlaps};
    return kvl_load_control(&about, load_ms);
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
        if (control_blend(o, compute, place).reuses)
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
    const double load_ms = reuse_ms(w->rates, part, step->n_reused, n_anchors);
    step->blend_share = 0.0;
    if (step->action != KVL_ACTION_BLEND) {
        step->cost_ms += load_ms;
        return;
    }
    const kvl_load_decision decision = control_blend(
        w->options, compute_ms(w->rates, w->before + step->n_shared, step->n_reused), load_ms);
    step->blend_share = decision.ratio;
    step->cost_ms += decision.total_ms;
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

/* ---- the error budget ---- */

/* What a part can be had by: as the rules say, blended (a slot), computed, placed (a text whose
 * slot is not corrected any more). */
enum { AS_RULED, BLENDED, COMPUTED, PLACED, N_WAYS };

typedef struct plan_ways {
    kvl_plan_step steps[N_WAYS];
    bool has[N_WAYS];
} plan_ways;

/* Parts that are chosen together: one, or a slot and the text behind it that its anchors know. */
typedef struct plan_group {
    size_t first, n_parts;
    uint8_t ways[KVL_BUDGET_CHOICES][2];
} plan_group;

static void set_error(const kvl_plan_options *options, uint64_t n_tokens, kvl_plan_step *step)
{
    step->error = step->n_reused == 0
                      ? 0.0
                      : options->errors.kl[step->action] * step->n_reused / (double)n_tokens;
}

/* Another way than the rules', where it is cheaper than computing. */
static void add_way(const plan_walk *w, const kvl_plan_part *part, uint32_t n_tail,
                    uint64_t n_tokens, plan_ways *ways, uint8_t way, kvl_action action,
                    const char *reason)
{
    kvl_plan_step *step = &ways->steps[way];
    *step = (kvl_plan_step){.n_shared = ways->steps[COMPUTED].n_shared};
    choose(step, action, reason);
    settle(w, part, n_tail, step);
    set_error(w->options, n_tokens, step);
    ways->has[way] = step->cost_ms < ways->steps[COMPUTED].cost_ms;
}

/* hangs: a text behind a slot that the rules correct, so that it is chosen with that. */
static void find_ways(const plan_walk *w, const kvl_plan_part *part, bool hangs, uint32_t n_tail,
                      uint64_t n_tokens, const kvl_plan_step *ruled, plan_ways *ways)
{
    *ways = (plan_ways){.has = {[AS_RULED] = true}};
    ways->steps[AS_RULED] = *ruled;
    if (ruled->n_reused == 0 && !hangs) return;
    kvl_plan_step *computed = &ways->steps[COMPUTED];
    *computed = *ruled;
    if (ruled->n_reused > 0) {
        *computed = (kvl_plan_step){.n_shared = ruled->n_shared};
        choose(computed, KVL_ACTION_COMPUTE, "computed, to stay within the error budget");
        settle(w, part, n_tail, computed);
    }
    ways->has[COMPUTED] = true;
    const kvl_plan_options *o = w->options;
    if (o->blend && part->kind == KVL_PART_SLOT && ruled->action != KVL_ACTION_BLEND)
        add_way(w, part, n_tail, n_tokens, ways, BLENDED, KVL_ACTION_BLEND,
                "blended, to stay within the error budget");
    if (hangs && o->quality == KVL_QUALITY_FAST && part->where != KVL_SEGMENT_NOWHERE &&
        part->n_tokens > o->short_text_tokens)
        add_way(w, part, n_tail, n_tokens, ways, PLACED, KVL_ACTION_PLACE,
                "placed: its slot is not corrected, for the error budget");
}

static void add_choice(kvl_budget_group *choices, plan_group *group, const kvl_plan_step *first,
                       uint8_t way, const kvl_plan_step *second, uint8_t second_way)
{
    group->ways[choices->n][0] = way;
    group->ways[choices->n][1] = second_way;
    choices->cost[choices->n] = first->cost_ms + (second == NULL ? 0.0 : second->cost_ms);
    choices->error[choices->n] = first->error + (second == NULL ? 0.0 : second->error);
    choices->n++;
}

/* A text is corrected only beside a slot that is. */
static void list_choices(const plan_ways *ways, plan_group *group, kvl_budget_group *choices)
{
    choices->n = 0;
    for (uint8_t way = 0; way < N_WAYS; way++) {
        if (!ways[0].has[way]) continue;
        if (group->n_parts == 1)
            add_choice(choices, group, &ways[0].steps[way], way, NULL, AS_RULED);
        for (uint8_t of_text = 0; group->n_parts == 2 && of_text < N_WAYS; of_text++) {
            const bool may = of_text == COMPUTED || (way == AS_RULED) == (of_text == AS_RULED);
            if (ways[1].has[of_text] && may)
                add_choice(choices, group, &ways[0].steps[way], way, &ways[1].steps[of_text],
                           of_text);
        }
    }
}

/* Chooses anew among the ways of the parts, as many as there is room for; what is behind those is
 * computed. */
static void fit_budget(const kvl_plan_options *options, const kvl_plan_rates *rates,
                       const kvl_plan_part *parts, size_t n_parts, uint64_t n_tokens,
                       kvl_plan_step *steps)
{
    kvl_budget_group choices[KVL_BUDGET_GROUPS] = {{0}};
    plan_group groups[KVL_BUDGET_GROUPS];
    plan_ways ways[KVL_BUDGET_GROUPS][2];
    uint8_t taken[KVL_BUDGET_GROUPS];
    size_t n_groups = 0;
    size_t last = n_parts;
    for (size_t i = 0; i < n_parts; i++) last = parts[i].n_tokens > 0 ? i : last;
    plan_walk w = {.options = options, .rates = rates};
    for (size_t i = 0; i < n_parts; i++) {
        const kvl_plan_step ruled = steps[i];
        const bool is_behind =
            parts[i].kind == KVL_PART_TEXT && w.slot != NULL && w.slot_action == KVL_ACTION_OFFSET;
        const bool hangs = is_behind && n_groups > 0 && groups[n_groups - 1].first + 1 == i;
        plan_ways alone;
        find_ways(&w, &parts[i], hangs, i == last, n_tokens, &ruled, &alone);
        if (hangs) {
            groups[n_groups - 1].n_parts = 2;
            ways[n_groups - 1][1] = alone;
        } else if (ruled.n_reused > 0 && (is_behind || n_groups == KVL_BUDGET_GROUPS)) {
            steps[i] = alone.steps[COMPUTED];
        } else if (ruled.n_reused > 0) {
            groups[n_groups] = (plan_group){.first = i, .n_parts = 1};
            ways[n_groups++][0] = alone;
        }
        pass(&w, &parts[i], &ruled);
    }
    for (size_t g = 0; g < n_groups; g++) list_choices(ways[g], &groups[g], &choices[g]);
    kvl_budget_choose(choices, n_groups, options->error_budget, taken);
    for (size_t g = 0; g < n_groups; g++) {
        for (size_t i = 0; i < groups[g].n_parts; i++)
            steps[groups[g].first + i] = ways[g][i].steps[groups[g].ways[taken[g]][i]];
    }
}

static void set_errors(const kvl_plan_options *options, const kvl_plan_part *parts, size_t n_parts,
                       kvl_plan_step *steps, uint64_t *n_tokens)
{
    *n_tokens = 0;
    for (size_t i = 0; i < n_parts; i++) *n_tokens += parts[i].n_tokens;
    for (size_t i = 0; i < n_parts; i++) set_error(options, *n_tokens, &steps[i]);
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
            totals->blend_share += steps[i].blend_share * steps[i].n_reused;
        } else {
            totals->n_placed += steps[i].n_reused;
        }
        totals->cost_ms += steps[i].cost_ms;
        totals->compute_ms += steps[i].compute_ms;
        totals->error += steps[i].error;
    }
    if (totals->n_blended > 0) totals->blend_share /= (double)totals->n_blended;
}

void kvl_plan_make(const kvl_plan_options *asked, const kvl_plan_rates *rates,
                   const kvl_plan_part *parts, size_t n_parts, kvl_plan_step *steps,
                   kvl_plan_totals *totals)
{
    *totals = (kvl_plan_totals){0};
    kvl_plan_options exact = *asked;
    exact.quality = KVL_QUALITY_EXACT;
    const kvl_plan_options *options = asked->error_budget > 0.0 ? asked : &exact;
    const bool lacking = walk_parts(options, rates, parts, n_parts, false, steps);
    if (lacking && options->all_or_nothing) {
        totals->dense = true;
        (void)walk_parts(options, rates, parts, n_parts, true, steps);
    }
    uint64_t n_tokens = 0;
    set_errors(options, parts, n_parts, steps, &n_tokens);
    if (options->error_budget < HUGE_VAL)
        fit_budget(options, rates, parts, n_parts, n_tokens, steps);
    add_up(parts, steps, n_parts, totals);
}
