/* test_random.c: one seed a process. */
#include "test_random.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

kvl_random kvl_test_random(void)
{
    static uint64_t seed;
    static bool known;
    if (!known) {
        const char *wanted = getenv("KVL_TEST_SEED");
        if (wanted != NULL) {
            seed = strtoull(wanted, NULL, 10);
        } else {
            kvl_random_secret(&seed, sizeof seed);
        }
        known = true;
        (void)fprintf(stderr, "KVL_TEST_SEED=%" PRIu64 "\n", seed);
    }
    return (kvl_random){seed};
}

uint32_t kvl_test_below(kvl_random *random, uint32_t limit)
{
    return (uint32_t)kvl_random_below(random, limit);
}

void kvl_test_fill_uniform(kvl_random *random, float *numbers, size_t n)
{
    for (size_t i = 0; i < n; i++) numbers[i] = 2.0F * kvl_random_uniform(random) - 1.0F;
}

void kvl_test_fill_normal(kvl_random *random, float *numbers, size_t n)
{
    /* The sum of twelve uniform numbers has variance 1 and is near enough to normal for a test. */
    for (size_t i = 0; i < n; i++) {
        float sum = -6.0F;
        for (int k = 0; k < 12; k++) sum += kvl_random_uniform(random);
        numbers[i] = sum;
    }
}
