/* reuse/gate.c: a histogram of outcomes, and the lowest bar that it bears out. */
#include "reuse/gate.h"

#include <math.h>

/* The first bar is high: answers of a 135M model that were wrong although both caches agreed had up
 * to 0.45, and hardly one reaches the bar before the model's own outcomes move it. */
kvl_gate_options kvl_gate_default_options(void)
{
    return (kvl_gate_options){.precision_wanted = 0.98, .bar_first = 0.6F, .decay = 0.998F};
}

float kvl_gate_score(bool agrees, float lowest_probability)
{
    if (!agrees || !(lowest_probability > 0.0F)) return 0.0F;
    return lowest_probability < 1.0F ? lowest_probability : 1.0F;
}

static uint32_t bin_of(float score)
{
    const float at = score * (float)KVL_GATE_BINS;
    return at >= (float)KVL_GATE_BINS ? KVL_GATE_BINS - 1 : (uint32_t)at;
}

void kvl_gate_learn(kvl_gate *gate, const kvl_gate_options *options, float score, bool was_right)
{
    /* What disagrees never passes, whatever became of it: it says nothing of where the bar is. */
    if (!(score > 0.0F)) return;
    for (uint32_t b = 0; b < KVL_GATE_BINS; b++) {
        gate->right[b] *= options->decay;
        gate->wrong[b] *= options->decay;
    }
    const uint32_t b = bin_of(score);
    if (was_right)
        gate->right[b] += 1.0F;
    else
        gate->wrong[b] += 1.0F;
}

float kvl_gate_bar(const kvl_gate *gate, const kvl_gate_options *options)
{
    const double may_be_wrong = 1.0 - options->precision_wanted;
    double right = 0.0;
    double wrong = 0.0;
    float bar = KVL_GATE_SHUT;
    bool is_refuted = false;
    for (uint32_t b = KVL_GATE_BINS; b-- > 0;) {
        right += (double)gate->right[b];
        wrong += (double)gate->wrong[b];
        const float edge = (float)b / (float)KVL_GATE_BINS;
        const bool is_known = gate->right[b] > 0.0F; /* nothing is said of what was never seen */
        if (is_known && (wrong + 1.0) <= may_be_wrong * (right + wrong + 2.0) + 1e-9) bar = edge;
        /* Two wrong ones: a single one may be chance where little was seen. */
        if (edge >= options->bar_first && wrong >= 1.5 && wrong > may_be_wrong * (right + wrong))
            is_refuted = true;
    }
    if (bar < KVL_GATE_SHUT || is_refuted) return bar;
    return options->bar_first;
}

bool kvl_gate_passes(float score, float bar)
{
    return score > 0.0F && score >= bar;
}
