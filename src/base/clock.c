/* base/clock.c: the system's clock. */
#include "base/clock.h"

#include <stddef.h>
#include <time.h>

static int64_t read_clock(clockid_t id)
{
    struct timespec now = {0};
    (void)clock_gettime(id, &now);
    return (int64_t)now.tv_sec * KVL_NS_PER_S + (int64_t)now.tv_nsec;
}

static int64_t system_monotonic(void *context)
{
    (void)context;
    return read_clock(CLOCK_MONOTONIC);
}

static int64_t system_wall(void *context)
{
    (void)context;
    return read_clock(CLOCK_REALTIME);
}

const kvl_clock *kvl_clock_system(void)
{
    static const kvl_clock clock = {system_monotonic, system_wall, NULL};
    return &clock;
}
