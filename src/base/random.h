/* base/random.h: two kinds of chance, never mixed up.
 * kvl_random is a seeded generator (splitmix64, Steele et al. 2014) for sampling, tests and the
 * simulator: the same seed gives the same numbers everywhere. Secrets and nonces come from
 * kvl_random_secret, which asks the operating system. */
#ifndef KVL_BASE_RANDOM_H
#define KVL_BASE_RANDOM_H

#include <stddef.h>
#include <stdint.h>

/* One thread at a time. Any seed is fine. */
typedef struct kvl_random {
    uint64_t state;
} kvl_random;

uint64_t kvl_random_next(kvl_random *random);
/* 0 .. limit - 1, unbiased; `limit` > 0. */
uint64_t kvl_random_below(kvl_random *random, uint64_t limit);
/* [0, 1), 24 bits. */
float kvl_random_uniform(kvl_random *random);
/* Bytes that nobody can guess, from the kernel. Cannot fail once the system has booted. */
void kvl_random_secret(void *bytes, size_t n_bytes);

#endif /* KVL_BASE_RANDOM_H */
