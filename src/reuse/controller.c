/* reuse/controller.c: the slower of the two, or their sum. */
#include "reuse/controller.h"

#include <math.h>

kvl_load_decision kvl_load_control(const kvl_load_case *about, double load_ms)
{
    double ratio = about->least_ratio;
    if (about->overlaps && about->prefill_ms > 0.0)
        ratio = fmin(fmax(load_ms / about->prefill_ms, ratio), 1.0);
    const double again_ms = ratio * about->prefill_ms;
    const double both_ms = about->overlaps ? fmax(load_ms, again_ms) : load_ms + again_ms;
    const double total_ms = about->select_ms + both_ms;
    return (kvl_load_decision){ratio, total_ms, total_ms < about->prefill_ms};
}

size_t kvl_load_choose(const kvl_load_case *about, const double *load_ms, size_t n)
{
    size_t best = n;
    double fastest = about->prefill_ms;
    for (size_t i = 0; i < n; i++) {
        const kvl_load_decision decision = kvl_load_control(about, load_ms[i]);
        if (!decision.reuses || !(decision.total_ms < fastest)) continue;
        best = i;
        fastest = decision.total_ms;
    }
    return best;
}
