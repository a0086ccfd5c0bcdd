/* compute/cpu/dispatch.c: which variant of the kernels runs here.
 * Method   __builtin_cpu_supports, which asks the processor (CPUID) and, for the wide registers,
 *          whether the operating system saves them (XGETBV). A variant that cannot run is refused
 *          and never replaced in silence. */
#include "compute/cpu/kernels.h"

#include <stdlib.h>
#include <string.h>

static const char *const variant_names[] = {
    [KVL_CPU_BEST] = "best",
    [KVL_CPU_PORTABLE] = "portable",
    [KVL_CPU_AVX2] = "avx2",
    [KVL_CPU_AVX512] = "avx512",
};
enum { N_VARIANTS = sizeof variant_names / sizeof *variant_names };

const char *kvl_cpu_variant_name(kvl_cpu_variant variant)
{
    KVL_ASSERT((size_t)variant < N_VARIANTS);
    return variant_names[variant];
}

/* The features are those of the compiler flags in cmake/rooms.cmake. */
bool kvl_cpu_variant_runs(kvl_cpu_variant variant)
{
    switch (variant) {
    case KVL_CPU_BEST:
    case KVL_CPU_PORTABLE: return true;
#if defined(__x86_64__)
    case KVL_CPU_AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
    case KVL_CPU_AVX512:
        return kvl_cpu_variant_runs(KVL_CPU_AVX2) && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq");
#else
    case KVL_CPU_AVX2:
    case KVL_CPU_AVX512: return false;
#endif
    }
    return false;
}

static kvl_status variant_from_environment(kvl_cpu_variant *variant, kvl_error *error)
{
    const char *name = getenv("KVLOOM_CPU");
    if (name == NULL || name[0] == '\0') return KVL_OK;
    for (size_t i = 0; i < N_VARIANTS; i++) {
        if (strcmp(name, variant_names[i]) == 0) {
            *variant = (kvl_cpu_variant)i;
            return KVL_OK;
        }
    }
    return KVL_FAIL(error, KVL_ERR_INVALID,
                    "KVLOOM_CPU is \"%.32s\", must be portable, avx2, avx512 or best", name);
}

static void take_tables(kvl_cpu_variant variant, kvl_cpu_kernels *kernels)
{
#define KVL_CPU_TAKE(name)                                                                         \
    if (strcmp(variant_names[variant], #name) == 0)                                                \
        *kernels = (kvl_cpu_kernels){variant, kvl_cpu_matmul_##name(), kvl_cpu_vector_##name(),    \
                                     kvl_cpu_attend_##name(), kvl_cpu_mass_##name()};
    KVL_CPU_VARIANT_LIST(KVL_CPU_TAKE)
#undef KVL_CPU_TAKE
}

kvl_status kvl_cpu_kernels_choose(kvl_cpu_variant variant, kvl_cpu_kernels *kernels,
                                  kvl_error *error)
{
    KVL_ASSERT((size_t)variant < N_VARIANTS);
    if (variant == KVL_CPU_BEST) KVL_TRY(variant_from_environment(&variant, error));
    if (variant == KVL_CPU_BEST) {
        variant = KVL_CPU_AVX512;
        while (!kvl_cpu_variant_runs(variant)) variant--;
    }
    if (!kvl_cpu_variant_runs(variant))
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                        "CPU variant %s needs instructions that this processor or this build does "
                        "not have; unset KVLOOM_CPU or set it to portable",
                        variant_names[variant]);
    take_tables(variant, kernels);
    return KVL_OK;
}
