/* reuse/controller.h: how much to compute again beside what is loaded, from where to load it, and
 * whether to load it at all.
 *
 * Where layers are loaded while those before are computed, the time is that of the slower of the
 * two: if loading is, more can be computed again for nothing, which only makes the answer better.
 * Where one waits for the other, times add up and nothing is free.
 * Method   CacheBlend's loading controller (arXiv:2405.16444, section 5.1), with the cost of
 *          choosing, and reuse declined where computing is as fast
 * Pure.    Threads  Safe from any thread. */
#ifndef KVL_REUSE_CONTROLLER_H
#define KVL_REUSE_CONTROLLER_H

#include <stdbool.h>
#include <stddef.h>

/* KV of some tokens that could be loaded. */
typedef struct kvl_load_case {
    double prefill_ms;  /* computing all of it */
    double least_ratio; /* of prefill_ms: computing again what must be, 0 .. 1 */
    double select_ms;   /* choosing that */
    bool overlaps;      /* loading runs beside computing */
} kvl_load_case;

typedef struct kvl_load_decision {
    double ratio;    /* of prefill_ms, least_ratio .. 1 */
    double total_ms; /* loading, choosing and computing again */
    bool reuses;     /* total_ms is less than prefill_ms */
} kvl_load_decision;

/* load_ms >= 0; infinite: it cannot be loaded. The ratio never falls as load_ms grows. */
kvl_load_decision kvl_load_control(const kvl_load_case *about, double load_ms);

/* The index of the fastest of the places that it could be loaded from; n: none is faster than
 * computing. Among equals the first.
 * load_ms  [n], infinite where it is not */
size_t kvl_load_choose(const kvl_load_case *about, const double *load_ms, size_t n);

#endif /* KVL_REUSE_CONTROLLER_H */
