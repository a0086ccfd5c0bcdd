/* host/order.c: the highest priority. */
#include "host/order.h"

#include "base/clock.h"

kvl_order_options kvl_order_default_options(void)
{
    return (kvl_order_options){.per_second = 1.0, .gain_max = 8.0, .near_max = 4.0};
}

double kvl_order_priority(const kvl_order_options *options, const kvl_order_item *item,
                          int64_t now_ns)
{
    const double remaining = item->n_remaining > 0 ? (double)item->n_remaining : 1.0;
    const double gain = item->n_saved / remaining;
    const double near = item->n_near / (item->n_saved + remaining);
    const double waited = (double)(now_ns - item->arrived_ns) / (double)KVL_NS_PER_S;
    return (gain < options->gain_max ? gain : options->gain_max) +
           options->near_max * (near < 1.0 ? near : 1.0) + options->per_second * waited;
}

size_t kvl_order_first(const kvl_order_options *options, const kvl_order_item *items, size_t n,
                       int64_t now_ns)
{
    size_t best = 0;
    double highest = kvl_order_priority(options, &items[0], now_ns);
    for (size_t i = 1; i < n; i++) {
        const double priority = kvl_order_priority(options, &items[i], now_ns);
        if (priority < highest || (!(priority > highest) && items[i].number > items[best].number))
            continue;
        best = i;
        highest = priority;
    }
    return best;
}
