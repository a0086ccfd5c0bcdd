/* base/random.c: splitmix64, and the kernel's generator through libsodium. */
#include "base/random.h"

#include "base/status.h"

#include <sodium.h>

uint64_t kvl_random_next(kvl_random *random)
{
    random->state += UINT64_C(0x9e3779b97f4a7c15);
    uint64_t z = random->state;
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

uint64_t kvl_random_below(kvl_random *random, uint64_t limit)
{
    KVL_ASSERT(limit > 0);
    /* Numbers above the last whole multiple of `limit` would favour small results. */
    const uint64_t unbiased_past = UINT64_MAX - UINT64_MAX % limit;
    uint64_t drawn = kvl_random_next(random);
    while (drawn >= unbiased_past) drawn = kvl_random_next(random);
    return drawn % limit;
}

float kvl_random_uniform(kvl_random *random)
{
    return (float)(kvl_random_next(random) >> 40) * 0x1p-24f;
}

void kvl_random_secret(void *bytes, size_t n_bytes)
{
    KVL_ASSERT(sodium_init() >= 0);
    randombytes_buf(bytes, n_bytes);
}
