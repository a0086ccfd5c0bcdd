/* timing.h: whether two sets of times could be of one kind: the two-sample test of Kolmogorov and
 * Smirnov. */
#ifndef KVL_TESTS_TIMING_H
#define KVL_TESTS_TIMING_H

#include <stdbool.h>
#include <stddef.h>

/* The chance of a distance between two samples of one distribution that is at least the one that
 * these have. Sorts both. */
double kvl_test_ks_p(double *a, size_t n_a, double *b, size_t n_b);

/* Whether times say something of the program: not under a sanitizer. */
bool kvl_test_times_count(void);

#endif /* KVL_TESTS_TIMING_H */
