/* store/lmdb, sealed: encryption at rest (S6, S24). What was put comes back; what was changed,
 * moved, or sealed under another key is a miss that is counted, and the file shows nothing. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/log.h"
#include "store/lmdb_seal.h"
#include "store/store.h"
#include "store_sample.h"
#include "test_random.h"

#include <lmdb.h>

static const uint8_t KEY[32] = {1, 2, 3};
static const uint8_t OTHER_KEY[32] = {1, 2, 4};
static kvl_store_place place;

static int set_up(void **state)
{
    (void)state;
    kvl_store_place_make(&place);
    kvl_log_set_level(KVL_LOG_ERROR);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    kvl_store_place_end(&place);
    return 0;
}

static kvl_tier *open_tier(const uint8_t *key)
{
    const kvl_lmdb_tier_options options = {.path = place.path,
                                           .bytes_max = (uint64_t)64 << 20,
                                           .fingerprint = kvl_store_fingerprint(),
                                           .seal_key = key};
    kvl_tier *tier = NULL;
    kvl_error error = {.text = ""};
    if (kvl_lmdb_tier_create(&options, &tier, &error) != KVL_OK) fail_msg("%s", error.text);
    return tier;
}

static void put(kvl_tier *tier, uint32_t number, size_t payload)
{
    kvl_container *container = kvl_store_sample(number, payload);
    assert_int_equal(tier->ops->put(tier, container, NULL), KVL_OK);
    kvl_container_release(container);
}

static kvl_status get(kvl_tier *tier, uint32_t number)
{
    const kvl_digest id = kvl_store_sample_id(number);
    kvl_container *container = NULL;
    const kvl_status status = tier->ops->get(tier, &id, false, &container, NULL);
    if (status == KVL_OK) kvl_store_sample_check(container, number);
    assert_true((status == KVL_OK) == (container != NULL));
    kvl_container_release(container);
    return status;
}

static kvl_tier_stats stats_of(kvl_tier *tier)
{
    kvl_tier_stats stats;
    tier->ops->stats(tier, &stats);
    return stats;
}

/* ---- the database in another's hands ---- */

static MDB_env *raw_begin(MDB_txn **txn, MDB_dbi *containers)
{
    MDB_env *env = NULL;
    assert_int_equal(mdb_env_create(&env), 0);
    assert_int_equal(mdb_env_set_maxdbs(env, 8), 0);
    assert_int_equal(mdb_env_set_mapsize(env, (size_t)256 << 20), 0);
    assert_int_equal(mdb_env_open(env, place.path, MDB_NOSYNC, 0600), 0);
    assert_int_equal(mdb_txn_begin(env, NULL, 0, txn), 0);
    assert_int_equal(mdb_dbi_open(*txn, "container", 0, containers), 0);
    return env;
}

static void raw_end(MDB_env *env, MDB_txn *txn)
{
    assert_int_equal(mdb_txn_commit(txn), 0);
    mdb_env_close(env);
}

/* A copy of a value; ended with free. */
static MDB_val raw_get(MDB_txn *txn, MDB_dbi containers, uint32_t number)
{
    kvl_digest id = kvl_store_sample_id(number);
    MDB_val key = {sizeof id.bytes, id.bytes}, value;
    assert_int_equal(mdb_get(txn, containers, &key, &value), 0);
    void *copy = kvl_alloc(value.mv_size);
    assert_non_null(copy);
    memcpy(copy, value.mv_data, value.mv_size);
    return (MDB_val){value.mv_size, copy};
}

static void raw_put(MDB_txn *txn, MDB_dbi containers, uint32_t number, MDB_val value)
{
    kvl_digest id = kvl_store_sample_id(number);
    MDB_val key = {sizeof id.bytes, id.bytes};
    assert_int_equal(mdb_put(txn, containers, &key, &value, 0), 0);
    kvl_free(value.mv_data);
}

/* ---- tests ---- */

static void what_is_put_comes_back(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_tier *tier = open_tier(KEY);
    size_t payloads[20];
    for (uint32_t i = 0; i < 20; i++) {
        payloads[i] = i == 0 ? 0 : kvl_random_below(&random, 300000);
        put(tier, i, payloads[i]);
    }
    for (int again = 0; again < 2; again++) {
        for (uint32_t i = 0; i < 20; i++) assert_int_equal(get(tier, i), KVL_OK);
        tier->ops->destroy(tier);
        tier = open_tier(KEY);
    }
    assert_int_equal(stats_of(tier).n_containers, 20);
    tier->ops->destroy(tier);
}

static bool has_bytes(const uint8_t *all, size_t n_all, const uint8_t *needle, size_t n)
{
    for (size_t at = 0; at + n <= n_all; at++) {
        if (memcmp(all + at, needle, n) == 0) return true;
    }
    return false;
}

/* Whether the file shows 32 bytes of a block, or of the header, of a container. */
static bool file_shows(uint32_t number)
{
    char path[96];
    kvl_file_map map;
    size_t n_block = 0, n_header = 0;
    kvl_container *container = kvl_store_sample(number, 40000);
    const uint8_t *block = kvl_container_block_view(container, 1, &n_block);
    const uint8_t *header = kvl_container_header(container, &n_header);
    (void)snprintf(path, sizeof path, "%s/data.mdb", place.path);
    assert_int_equal(kvl_file_map_open(path, &map, NULL), KVL_OK);
    const bool shows = has_bytes(map.bytes, map.n_bytes, block + 1000, 32) ||
                       has_bytes(map.bytes, map.n_bytes, header, 32);
    kvl_file_map_close(&map);
    kvl_container_release(container);
    return shows;
}

static void s24_the_file_shows_nothing(void **state)
{
    (void)state;
    kvl_tier *tier = open_tier(KEY);
    put(tier, 7, 40000);
    tier->ops->destroy(tier);
    assert_false(file_shows(7));
    /* The search finds what is there. */
    tear_down(NULL);
    set_up(NULL);
    tier = open_tier(NULL);
    put(tier, 7, 40000);
    tier->ops->destroy(tier);
    assert_true(file_shows(7));
}

/* Deleting the key deletes the data; bringing it back brings the data back. */
static void s24_without_the_key_all_is_a_miss(void **state)
{
    (void)state;
    kvl_tier *tier = open_tier(KEY);
    put(tier, 1, 5000);
    put(tier, 2, 5000);
    tier->ops->destroy(tier);
    const uint8_t *keys[] = {OTHER_KEY, NULL};
    for (size_t k = 0; k < 2; k++) {
        tier = open_tier(keys[k]);
        assert_int_equal(get(tier, 1), KVL_ERR_FOREIGN);
        assert_int_equal(get(tier, 2), KVL_ERR_FOREIGN);
        assert_int_equal(stats_of(tier).foreign, 2);
        assert_int_equal(stats_of(tier).misses, 2);
        put(tier, 3 + (uint32_t)k, 100);
        assert_int_equal(get(tier, 3 + (uint32_t)k), KVL_OK);
        tier->ops->destroy(tier);
    }
    tier = open_tier(KEY);
    assert_int_equal(get(tier, 1), KVL_OK);
    assert_int_equal(get(tier, 2), KVL_OK);
    assert_int_equal(get(tier, 3), KVL_ERR_FOREIGN); /* sealed under the other key */
    assert_int_equal(get(tier, 4), KVL_ERR_FOREIGN); /* not sealed: anybody could have put it */
    tier->ops->destroy(tier);
}

/* Any byte of a value, changed: a miss, and never other bytes. */
static void s6_a_changed_value_is_a_miss(void **state)
{
    (void)state;
    enum { PAYLOAD = 600 };
    kvl_tier *tier = open_tier(KEY);
    put(tier, 1, PAYLOAD);
    tier->ops->destroy(tier);
    MDB_txn *txn = NULL;
    MDB_dbi containers;
    MDB_env *env = raw_begin(&txn, &containers);
    MDB_val good = raw_get(txn, containers, 1);
    raw_end(env, txn);
    const kvl_digest id = kvl_store_sample_id(1);
    uint8_t *bytes = good.mv_data;
    kvl_container *container = NULL;
    kvl_digester digester;
    kvl_digester_init(&digester, KEY, sizeof KEY);
    kvl_digester_add(&digester, "kvloom.rest.1", sizeof "kvloom.rest.1");
    const kvl_digest key = kvl_digester_end(&digester);
    assert_int_equal(kvl_lmdb_unseal(key.bytes, &id, bytes, good.mv_size, &container, NULL),
                     KVL_OK);
    kvl_container_release(container);
    for (size_t at = 8; at < good.mv_size; at++) {
        bytes[at] ^= 0x10;
        const kvl_status status =
            kvl_lmdb_unseal(key.bytes, &id, bytes, good.mv_size, &container, NULL);
        /* Four bytes of the preamble mean nothing. */
        if (at < 28 || at >= 32)
            assert_true(status == KVL_ERR_FOREIGN || status == KVL_ERR_DAMAGED);
        kvl_container_release(container);
        bytes[at] ^= 0x10;
    }
    for (size_t n = 32; n < good.mv_size; n += 17)
        assert_true(kvl_lmdb_unseal(key.bytes, &id, bytes, n, &container, NULL) < 0);
    kvl_free(good.mv_data);
}

/* Two values change places, an older one comes back in a block of a newer: misses. */
static void s6_moved_values_do_not_open(void **state)
{
    (void)state;
    kvl_tier *tier = open_tier(KEY);
    for (uint32_t i = 1; i <= 3; i++) put(tier, i, 2000);
    tier->ops->destroy(tier);
    MDB_txn *txn = NULL;
    MDB_dbi containers;
    MDB_env *env = raw_begin(&txn, &containers);
    const MDB_val one = raw_get(txn, containers, 1), two = raw_get(txn, containers, 2);
    MDB_val three = raw_get(txn, containers, 3);
    /* The two blocks of one value, 1,001 bytes and a tag each, change places. */
    uint8_t *end = (uint8_t *)three.mv_data + three.mv_size;
    uint8_t block[1017];
    memcpy(block, end - 2034, sizeof block);
    memmove(end - 2034, end - 1017, sizeof block);
    memcpy(end - 1017, block, sizeof block);
    raw_put(txn, containers, 1, two);
    raw_put(txn, containers, 2, one);
    raw_put(txn, containers, 3, three);
    raw_end(env, txn);
    tier = open_tier(KEY);
    assert_int_equal(get(tier, 1), KVL_ERR_FOREIGN);
    assert_int_equal(get(tier, 2), KVL_ERR_FOREIGN);
    assert_int_equal(get(tier, 3), KVL_ERR_DAMAGED);
    assert_int_equal(get(tier, 3), KVL_ERR_NOT_FOUND); /* gone, so that a sound one can come */
    assert_int_equal(stats_of(tier).damaged, 1);
    tier->ops->destroy(tier);
}

static void every_allocation_may_fail(void **state)
{
    (void)state;
    kvl_tier *tier = open_tier(KEY);
    put(tier, 1, 3000);
    const kvl_digest id = kvl_store_sample_id(1);
    for (int64_t n = 0;; n++) {
        kvl_container *container = NULL;
        kvl_alloc_fail_after(n);
        const kvl_status status = tier->ops->get(tier, &id, true, &container, NULL);
        kvl_alloc_fail_after(-1);
        kvl_container_release(container);
        if (status == KVL_OK) break;
        assert_int_equal(status, KVL_ERR_NO_MEMORY);
    }
    tier->ops->destroy(tier);
}

#define CASE(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(what_is_put_comes_back),
        CASE(s24_the_file_shows_nothing),
        CASE(s24_without_the_key_all_is_a_miss),
        CASE(s6_a_changed_value_is_a_miss),
        CASE(s6_moved_values_do_not_open),
        CASE(every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
