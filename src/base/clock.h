/* base/clock.h: time, from the system or from a test. Nothing else in KVLoom asks for the time. */
#ifndef KVL_BASE_CLOCK_H
#define KVL_BASE_CLOCK_H

#include <stdint.h>

#define KVL_NS_PER_MS INT64_C(1000000)
#define KVL_NS_PER_S INT64_C(1000000000)

/* Table of operations. Both may be called from any thread and never block. */
typedef struct kvl_clock {
    int64_t (*monotonic_ns)(void *context); /* never goes back; since an unnamed start */
    int64_t (*wall_ns)(void *context);      /* since 1970-01-01 UTC; may jump */
    void *context;
} kvl_clock;

/* The system's clock. Static: it has no ender. */
const kvl_clock *kvl_clock_system(void);

static inline int64_t kvl_clock_now(const kvl_clock *clock)
{
    return clock->monotonic_ns(clock->context);
}

static inline double kvl_ns_to_ms(int64_t ns)
{
    return (double)ns / 1e6;
}

#endif /* KVL_BASE_CLOCK_H */
