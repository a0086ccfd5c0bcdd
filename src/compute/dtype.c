/* compute/dtype.c: the table of number formats. */
#include "compute/dtype.h"

const kvl_dtype_info *kvl_dtype_about(kvl_dtype dtype)
{
    static const kvl_dtype_info table[] = {
#define KVL_DTYPE_ROW(name, n_weights, n_bytes) {#name, n_weights, n_bytes},
        KVL_DTYPE_LIST(KVL_DTYPE_ROW)
#undef KVL_DTYPE_ROW
    };
    KVL_ASSERT((size_t)dtype < sizeof table / sizeof *table);
    return &table[dtype];
}
