/* timing.c: see the header. */
#include "timing.h"

#include <math.h>
#include <stdlib.h>

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Equal times, of a clock with steps, are passed on both sides before the distance is taken. */
static double distance(double *a, size_t n_a, double *b, size_t n_b)
{
    double most = 0.0;
    qsort(a, n_a, sizeof *a, compare);
    qsort(b, n_b, sizeof *b, compare);
    for (size_t i = 0, j = 0; i < n_a && j < n_b;) {
        const double at = a[i] < b[j] ? a[i] : b[j];
        while (i < n_a && a[i] <= at) i++;
        while (j < n_b && b[j] <= at) j++;
        const double d = fabs((double)i / (double)n_a - (double)j / (double)n_b);
        if (d > most) most = d;
    }
    return most;
}

/* Asymptotic distribution with Stephens' correction, as in Numerical Recipes, 14.3. */
double kvl_test_ks_p(double *a, size_t n_a, double *b, size_t n_b)
{
    const double root = sqrt((double)n_a * (double)n_b / (double)(n_a + n_b));
    const double lambda = (root + 0.12 + 0.11 / root) * distance(a, n_a, b, n_b);
    if (lambda < 0.2) return 1.0;
    double sum = 0.0;
    for (int k = 1; k <= 100; k++)
        sum += (k % 2 == 1 ? 2.0 : -2.0) * exp(-2.0 * k * k * lambda * lambda);
    return sum > 1.0 ? 1.0 : sum;
}

bool kvl_test_times_count(void)
{
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    return false;
#else
    return true;
#endif
}
