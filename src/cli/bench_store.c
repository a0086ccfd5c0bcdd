/* cli/bench_store.c: `kvloom bench store`: the LMDB tier beside memcpy and LMDB itself, and the index of
 * a million segments, in one run. */
#include "base/alloc.h"
#include "base/file.h"
#include "cli/bench.h"
#include "store/entry_map.h"
#include "store/lmdb_index.h"
#include "store/store.h"

#include <lmdb.h>
#include <stdlib.h>
#include <string.h>

int kvl_bench_store(int argc, char **argv)
{
    (void)argc;
    (void)argv;
    return KVL_EXIT_FAILED;
}
