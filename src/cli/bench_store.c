/* cli/bench_store.c: `kvloom bench store`: the LMDB tier beside memcpy and beside LMDB itself with
 * the same settings, and look-ups among a million segments, in one run. */
#include "base/alloc.h"
#include "base/file.h"
#include "base/random.h"
#include "cli/bench_data.h"
#include "store/store.h"

#include <lmdb.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>

enum {
    REPEATS_MAX = 1000,
    LAYERS = 32,
    MILLION = 1000000,
    MILLION_QUICK = 200000,
    LOOKUPS = 20000
};
static const size_t SEGMENT_BYTES = (size_t)16 << 20;

typedef struct bench {
    kvl_bench_options options;
    char directory[64];
    json_t *figures, *rows;
} bench;

static int64_t now(void)
{
    return kvl_clock_now(kvl_clock_system());
}

static void add(bench *b, const char *name, double value)
{
    (void)json_object_set_new(b->figures, name, json_real(value));
}

static kvl_status open_tier(const bench *b, const char *name, uint64_t bytes_max, bool is_durable,
                            const uint8_t *seal_key, kvl_tier **tier, kvl_error *error)
{
    char path[128];
    (void)snprintf(path, sizeof path, "%s/%s", b->directory, name);
    const kvl_lmdb_tier_options options = {.path = path,
                                           .bytes_max = bytes_max,
                                           .fingerprint = kvl_bench_fingerprint(),
                                           .durable = is_durable,
                                           .seal_key = seal_key};
    return kvl_lmdb_tier_create(&options, tier, error);
}

/* ---- get ---- */

/* A get from the page cache, blocks checked against their checksums or not, beside memcpy of the
 * same bytes between buffers that were touched. */
static kvl_status measure_get(bench *b, kvl_tier *tier, kvl_error *error)
{
    double plain[REPEATS_MAX], checked[REPEATS_MAX], copy[REPEATS_MAX];
    uint8_t *from = kvl_alloc_aligned(SEGMENT_BYTES);
    uint8_t *to = kvl_alloc_aligned(SEGMENT_BYTES);
    kvl_status status = from == NULL || to == NULL
                            ? KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a benchmark")
                            : KVL_OK;
    if (status == KVL_OK) {
        memset(from, 1, SEGMENT_BYTES);
        memset(to, 2, SEGMENT_BYTES);
    }
    const kvl_digest id = kvl_bench_id(1);
    for (uint32_t r = 0; r < b->options.n_repeats + 1 && status == KVL_OK; r++) {
        for (int check = 0; check < 2 && status == KVL_OK; check++) {
            kvl_container *container = NULL;
            const int64_t start = now();
            status = tier->ops->get(tier, &id, check == 1, &container, error);
            (check == 1 ? checked : plain)[r == 0 ? 0 : r - 1] = kvl_bench_seconds_since(start);
            kvl_container_release(container);
        }
        const int64_t start = now();
        if (status == KVL_OK) memcpy(to, from, SEGMENT_BYTES);
        copy[r == 0 ? 0 : r - 1] = kvl_bench_seconds_since(start);
    }
    kvl_free(from);
    kvl_free(to);
    KVL_TRY(status);
    const uint32_t n = b->options.n_repeats;
    const double copy_s = kvl_bench_median(copy, n);
    const double plain_s = kvl_bench_median(plain, n);
    add(b, "lmdb_get_vs_memcpy", copy_s / plain_s);
    kvl_bench_row(b->rows, "memcpy, 16 MiB", (double)SEGMENT_BYTES / copy_s / 1e9, "GB/s");
    kvl_bench_row(b->rows, "LMDB tier, get, 16 MiB", (double)SEGMENT_BYTES / plain_s / 1e9, "GB/s");
    kvl_bench_row(b->rows, "LMDB tier, get, blocks checked",
                  (double)SEGMENT_BYTES / kvl_bench_median(checked, n) / 1e9, "GB/s");
    return KVL_OK;
}

/* ---- put ---- */

typedef struct raw_store {
    MDB_env *env;
    MDB_dbi table;
} raw_store;

static kvl_status open_raw(const bench *b, raw_store *raw, kvl_error *error)
{
    char path[128];
    (void)snprintf(path, sizeof path, "%s/raw", b->directory);
    KVL_TRY(kvl_directory_make(path, error));
    MDB_txn *txn = NULL;
    int code = mdb_env_create(&raw->env);
    if (code == 0) code = mdb_env_set_mapsize(raw->env, (size_t)4 << 30);
    if (code == 0) code = mdb_env_open(raw->env, path, MDB_NORDAHEAD, 0600);
    if (code == 0) code = mdb_txn_begin(raw->env, NULL, 0, &txn);
    if (code == 0) code = mdb_dbi_open(txn, NULL, 0, &raw->table);
    if (code == 0) code = mdb_txn_commit(txn);
    return code == 0 ? KVL_OK : KVL_FAIL(error, KVL_ERR_IO, "lmdb: %s", mdb_strerror(code));
}

/* One durable transaction with one new key: the least that LMDB does for a put. */
static double time_raw_put(const raw_store *raw, uint64_t number, const void *bytes, size_t n_bytes)
{
    kvl_digest id = kvl_bench_id(number);
    MDB_val key = {sizeof id.bytes, id.bytes};
    MDB_val value = {n_bytes, NULL};
    MDB_txn *txn = NULL;
    const int64_t start = now();
    if (mdb_txn_begin(raw->env, NULL, 0, &txn) != 0) return -1.0;
    if (mdb_put(txn, raw->table, &key, &value, MDB_RESERVE) != 0) {
        mdb_txn_abort(txn);
        return -1.0;
    }
    memcpy(value.mv_data, bytes, n_bytes);
    return mdb_txn_commit(txn) == 0 ? kvl_bench_seconds_since(start) : -1.0;
}

static kvl_status measure_put(bench *b, kvl_tier *tier, kvl_error *error)
{
    double ours[REPEATS_MAX], theirs[REPEATS_MAX];
    raw_store raw = {.env = NULL};
    KVL_TRY(open_raw(b, &raw, error));
    kvl_status status = KVL_OK;
    for (uint32_t r = 0; r < b->options.n_repeats && status == KVL_OK; r++) {
        kvl_container *container = NULL;
        status = kvl_bench_container(100 + r, SEGMENT_BYTES, LAYERS, &container, error);
        if (status < 0) break;
        size_t n_bytes = 0;
        const void *bytes = kvl_container_bytes(container, &n_bytes);
        if (r % 2 == 1) theirs[r] = time_raw_put(&raw, r, bytes, n_bytes);
        const int64_t start = now();
        status = tier->ops->put(tier, container, error);
        ours[r] = kvl_bench_seconds_since(start);
        if (r % 2 == 0) theirs[r] = time_raw_put(&raw, r, bytes, n_bytes);
        if (status == KVL_OK && theirs[r] < 0.0)
            status = KVL_FAIL(error, KVL_ERR_IO, "lmdb refused a put");
        kvl_container_release(container);
    }
    mdb_env_close(raw.env);
    KVL_TRY(status);
    const double ours_s = kvl_bench_median(ours, b->options.n_repeats);
    const double theirs_s = kvl_bench_median(theirs, b->options.n_repeats);
    add(b, "lmdb_put_vs_raw", theirs_s / ours_s);
    kvl_bench_row(b->rows, "LMDB tier, durable put, new key, 16 MiB",
                  (double)SEGMENT_BYTES / ours_s / 1e9, "GB/s");
    kvl_bench_row(b->rows, "LMDB alone, the same", (double)SEGMENT_BYTES / theirs_s / 1e9, "GB/s");
    return KVL_OK;
}

/* ---- a million ---- */

/* Of the heap, so without the map of the file, whose pages belong to the page cache. */
static double heap_bytes(void)
{
    const struct mallinfo2 heap = mallinfo2();
    return (double)(heap.uordblks + heap.hblkhd);
}

/* Containers of the least size that there is: what is measured is what a tier knows of them. */
static kvl_status measure_index(bench *b, kvl_error *error)
{
    kvl_tier *tier = NULL;
    const uint32_t n_all = b->options.n_repeats < 10 ? MILLION_QUICK : MILLION;
    KVL_TRY(open_tier(b, "million", (uint64_t)8 << 30, false, NULL, &tier, error));
    const double before = heap_bytes();
    kvl_status status = KVL_OK;
    for (uint32_t i = 0; i < n_all && status == KVL_OK; i++) {
        kvl_container *container = NULL;
        status = kvl_bench_container(1000 + i, 64, 1, &container, error);
        if (status == KVL_OK) status = tier->ops->put(tier, container, error);
        kvl_container_release(container);
        if (i % 100000 == 0) (void)fprintf(stderr, "bench: %u of %u segments\n", i, n_all);
    }
    double *seconds = kvl_alloc_zero(LOOKUPS, sizeof *seconds);
    if (status == KVL_OK && seconds == NULL)
        status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a benchmark");
    if (status == KVL_OK) {
        kvl_random random = {7};
        uint32_t n_found = 0;
        for (uint32_t i = 0; i < LOOKUPS; i++) {
            const kvl_digest id = kvl_bench_id(1000 + kvl_random_below(&random, n_all));
            const int64_t start = now();
            n_found += tier->ops->has(tier, &id) ? 1 : 0;
            seconds[i] = kvl_bench_seconds_since(start);
        }
        const double after = heap_bytes();
        add(b, "lookup_1m_p99_us", kvl_bench_quantile(seconds, LOOKUPS, 0.99) * 1e6);
        add(b, "bytes_per_segment", (after - before) / n_all);
        kvl_bench_row(b->rows, "segments in the index", n_all, "");
        kvl_bench_row(b->rows, "of the look-ups found", n_found, "");
        kvl_bench_row(b->rows, "look-up, median", kvl_bench_quantile(seconds, LOOKUPS, 0.5) * 1e6,
                      "us");
    }
    kvl_free(seconds);
    tier->ops->destroy(tier);
    return status;
}

/* ---- encryption at rest ---- */

/* The same gets and puts sealed and not, in turns: what the seal costs. */
static kvl_status time_pair(const bench *b, kvl_tier *const tiers[2], double *puts[2],
                            double *gets[2], kvl_error *error)
{
    for (uint32_t r = 0; r < b->options.n_repeats; r++) {
        kvl_container *container = NULL;
        KVL_TRY(kvl_bench_container(500 + r, SEGMENT_BYTES, LAYERS, &container, error));
        kvl_status status = KVL_OK;
        for (int i = 0; i < 2 && status == KVL_OK; i++) {
            kvl_container *read = NULL;
            const int k = (int)(r + (uint32_t)i) % 2;
            const kvl_digest id = kvl_bench_id(500 + r);
            int64_t start = now();
            status = tiers[k]->ops->put(tiers[k], container, error);
            puts[k][r] = kvl_bench_seconds_since(start);
            start = now();
            if (status == KVL_OK) status = tiers[k]->ops->get(tiers[k], &id, true, &read, error);
            gets[k][r] = kvl_bench_seconds_since(start);
            kvl_container_release(read);
        }
        kvl_container_release(container);
        KVL_TRY(status);
    }
    return KVL_OK;
}

static kvl_status measure_seal(bench *b, kvl_error *error)
{
    static double times[4][REPEATS_MAX];
    double *puts[2] = {times[0], times[1]};
    double *gets[2] = {times[2], times[3]};
    const uint8_t key[32] = {1};
    kvl_tier *tiers[2] = {NULL, NULL};
    kvl_status status = open_tier(b, "plain", (uint64_t)4 << 30, true, NULL, &tiers[0], error);
    if (status == KVL_OK)
        status = open_tier(b, "sealed", (uint64_t)4 << 30, true, key, &tiers[1], error);
    if (status == KVL_OK) status = time_pair(b, tiers, puts, gets, error);
    for (int i = 0; i < 2; i++) {
        if (tiers[i] != NULL) tiers[i]->ops->destroy(tiers[i]);
    }
    KVL_TRY(status);
    const uint32_t n = b->options.n_repeats;
    const double get_s = kvl_bench_median(gets[1], n);
    const double put_s = kvl_bench_median(puts[1], n);
    add(b, "sealed_get_vs_plain", kvl_bench_median(gets[0], n) / get_s);
    add(b, "sealed_put_vs_plain", kvl_bench_median(puts[0], n) / put_s);
    kvl_bench_row(b->rows, "LMDB tier, encrypted, get", (double)SEGMENT_BYTES / get_s / 1e9,
                  "GB/s");
    kvl_bench_row(b->rows, "LMDB tier, encrypted, durable put", (double)SEGMENT_BYTES / put_s / 1e9,
                  "GB/s");
    return KVL_OK;
}

static kvl_status measure(bench *b, kvl_error *error)
{
    kvl_tier *tier = NULL;
    kvl_container *container = NULL;
    KVL_TRY(open_tier(b, "store", (uint64_t)4 << 30, true, NULL, &tier, error));
    kvl_status status = kvl_bench_container(1, SEGMENT_BYTES, LAYERS, &container, error);
    if (status == KVL_OK) status = tier->ops->put(tier, container, error);
    kvl_container_release(container);
    if (status == KVL_OK) status = measure_get(b, tier, error);
    if (status == KVL_OK) status = measure_put(b, tier, error);
    tier->ops->destroy(tier);
    if (status == KVL_OK) status = measure_seal(b, error);
    kvl_container_spare_clear();
    return status == KVL_OK ? measure_index(b, error) : status;
}

int kvl_bench_store(int argc, char **argv)
{
    bench b = {.figures = NULL};
    kvl_error error = {.text = ""};
    if (!kvl_bench_parse(argc, argv, "The LMDB tier beside memcpy and LMDB itself.", &b.options))
        return KVL_EXIT_USAGE;
    if (kvl_cli_temporary("bench", b.directory, sizeof b.directory, &error) != KVL_OK)
        return kvl_cli_fail(&error);
    b.figures = json_object();
    b.rows = json_array();
    const kvl_status status = measure(&b, &error);
    kvl_ignore(kvl_directory_remove(b.directory, NULL));
    if (status == KVL_OK) {
        kvl_bench_report("store", &b.options, b.figures, b.rows);
        return KVL_EXIT_OK;
    }
    json_decref(b.figures);
    json_decref(b.rows);
    return kvl_cli_fail(&error);
}
