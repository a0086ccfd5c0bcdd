/* test_random.h: chance in tests, replayable: KVL_TEST_SEED=n repeats a run; the seed is printed.
 */
#ifndef KVL_TEST_RANDOM_H
#define KVL_TEST_RANDOM_H

#include "base/random.h"

/* The seed of this process: from KVL_TEST_SEED, or fresh; printed once. */
kvl_random kvl_test_random(void);
/* 0 .. limit - 1 */
uint32_t kvl_test_below(kvl_random *random, uint32_t limit);
/* n numbers in [-1, 1) */
void kvl_test_fill_uniform(kvl_random *random, float *numbers, size_t n);
/* n numbers, roughly normal, mean 0 and variance 1 */
void kvl_test_fill_normal(kvl_random *random, float *numbers, size_t n);

#endif /* KVL_TEST_RANDOM_H */
