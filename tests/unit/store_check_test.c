/* store/lmdb_check: accepts whatever LMDB writes, and nothing that could lead LMDB astray: what was
 * changed at random and is still accepted, LMDB must survive (run in a child process). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/log.h"
#include "store/lmdb_check.h"
#include "store/store.h"
#include "store_sample.h"
#include "test_random.h"

#include <lmdb.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FILE_BYTES_MAX = 64 << 20 };

/* Random work on three tables, so that the file has branches, values in pages of their own and
 * lists of free pages of many shapes. */
static void work_on(const char *path, kvl_random *random, int n_transactions)
{
    static uint8_t bytes[200000];
    MDB_env *env = NULL;
    assert_int_equal(mdb_env_create(&env), 0);
    assert_int_equal(mdb_env_set_maxdbs(env, 4), 0);
    assert_int_equal(mdb_env_set_mapsize(env, FILE_BYTES_MAX), 0);
    assert_int_equal(mdb_env_open(env, path, MDB_NOSYNC, 0600), 0);
    for (int i = 0; i < n_transactions; i++) {
        MDB_txn *txn = NULL;
        assert_int_equal(mdb_txn_begin(env, NULL, 0, &txn), 0);
        const char *const names[] = {"a", "b", "c"};
        for (int k = 0; k < 3; k++) {
            MDB_dbi table;
            assert_int_equal(mdb_dbi_open(txn, names[k], MDB_CREATE, &table), 0);
            for (uint32_t n = kvl_test_below(random, 60); n > 0; n--) {
                uint8_t id[40] = {0};
                const uint32_t number = kvl_test_below(random, 300);
                memcpy(id, &number, sizeof number);
                MDB_val key = {4 + kvl_test_below(random, 2) * 28, id};
                const size_t most = kvl_test_below(random, 8) == 0 ? 60000 : 500;
                MDB_val value = {kvl_test_below(random, (uint32_t)most), bytes};
                if (kvl_test_below(random, 3) == 0) {
                    const int code = mdb_del(txn, table, &key, NULL);
                    assert_true(code == 0 || code == MDB_NOTFOUND);
                } else {
                    assert_int_equal(mdb_put(txn, table, &key, &value, 0), 0);
                }
            }
        }
        if (kvl_test_below(random, 5) == 0) {
            mdb_txn_abort(txn);
        } else {
            assert_int_equal(mdb_txn_commit(txn), 0);
        }
    }
    mdb_env_close(env);
}

static char *read_database(const char *path, size_t *n_bytes)
{
    char name[128];
    char *bytes = NULL;
    (void)snprintf(name, sizeof name, "%s/data.mdb", path);
    assert_int_equal(kvl_file_read(name, FILE_BYTES_MAX, &bytes, n_bytes, NULL), KVL_OK);
    return bytes;
}

static void test_every_sound_database_passes(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 12; round++) {
        kvl_store_place place;
        kvl_store_place_make(&place);
        for (int part = 0; part < 4; part++) {
            work_on(place.path, &random, 1 + (int)kvl_test_below(&random, 12));
            size_t n_bytes = 0;
            char *bytes = read_database(place.path, &n_bytes);
            kvl_error error = {.text = ""};
            if (kvl_lmdb_check((const uint8_t *)bytes, n_bytes, &error) != KVL_OK)
                fail_msg("%s", error.text);
            kvl_free(bytes);
        }
        kvl_store_place_end(&place);
    }
}

/* In the child: everything a tier does to a database, and more. */
static _Noreturn void use_database(const char *path)
{
    const struct rlimit no_core = {0, 0};
    (void)setrlimit(RLIMIT_CORE, &no_core);
    (void)alarm(20);
    MDB_env *env = NULL;
    if (mdb_env_create(&env) != 0 || mdb_env_set_maxdbs(env, 4) != 0 ||
        mdb_env_set_mapsize(env, FILE_BYTES_MAX) != 0 ||
        mdb_env_open(env, path, MDB_NOSYNC, 0600) != 0)
        _exit(0);
    static uint8_t value_bytes[30000];
    uint64_t sum = 0;
    for (int round = 0; round < 6; round++) {
        MDB_txn *txn = NULL;
        if (mdb_txn_begin(env, NULL, 0, &txn) != 0) _exit(0);
        const char *const names[] = {"a", "b", "c"};
        for (int k = 0; k < 3; k++) {
            MDB_dbi table;
            MDB_cursor *cursor = NULL;
            MDB_val key, value;
            if (mdb_dbi_open(txn, names[k], 0, &table) != 0) continue;
            if (mdb_cursor_open(txn, table, &cursor) != 0) continue;
            for (int i = 0;
                 mdb_cursor_get(cursor, &key, &value, i == 0 ? MDB_FIRST : MDB_NEXT) == 0; i++) {
                for (size_t b = 0; b < value.mv_size; b += 512)
                    sum += ((uint8_t *)value.mv_data)[b];
                if (i % 3 == round % 3) (void)mdb_cursor_del(cursor, 0);
            }
            mdb_cursor_close(cursor);
            for (uint32_t i = 0; i < 20; i++) {
                uint32_t id = i * 7 + (uint32_t)round;
                key = (MDB_val){sizeof id, &id};
                value = (MDB_val){i * 1400, value_bytes};
                (void)mdb_put(txn, table, &key, &value, 0);
            }
        }
        if (mdb_txn_commit(txn) != 0) _exit(0);
    }
    mdb_env_close(env);
    _exit(sum == UINT64_MAX ? 1 : 0);
}

static void write_database(const char *path, const char *bytes, size_t n_bytes)
{
    char name[128];
    (void)snprintf(name, sizeof name, "%s/data.mdb", path);
    FILE *file = fopen(name, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, n_bytes, file), n_bytes);
    assert_int_equal(fclose(file), 0);
}

/* Changes a few bytes, mostly where structure is: page headers, node offsets, node headers. */
static void mutate(kvl_random *random, char *bytes, size_t n_bytes)
{
    enum { PAGE = 4096 };
    for (uint32_t n = 1 + kvl_test_below(random, 3); n > 0; n--) {
        const size_t page = kvl_test_below(random, (uint32_t)(n_bytes / PAGE)) * (size_t)PAGE;
        const uint32_t where[] = {16, 200, 64, PAGE};
        size_t at = page + kvl_test_below(random, where[kvl_test_below(random, 4)]);
        uint16_t upper = 0;
        memcpy(&upper, bytes + page + 14, sizeof upper);
        if (kvl_test_below(random, 3) == 0 && upper < PAGE - 8)
            at = page + upper + kvl_test_below(random, 8);
        switch (kvl_test_below(random, 4)) {
        case 0: bytes[at] = (char)(bytes[at] ^ 1 << kvl_test_below(random, 8)); break;
        case 1: bytes[at] = (char)kvl_random_next(random); break;
        case 2: bytes[at] = (char)(bytes[at] + 1); break;
        default: bytes[at] = bytes[kvl_test_below(random, (uint32_t)n_bytes)];
        }
    }
}

/* S19 */
static void s19_lmdb_survives_what_passes(void **state)
{
    (void)state;
    enum { ROUNDS = 1500, USES_MAX = 150 };
    kvl_random random = kvl_test_random();
    kvl_store_place place;
    kvl_store_place_make(&place);
    work_on(place.path, &random, 15);
    size_t n_bytes = 0;
    char *sound = read_database(place.path, &n_bytes);
    char *changed = kvl_alloc(n_bytes);
    int n_refused = 0, n_used = 0;
    for (int round = 0; round < ROUNDS; round++) {
        memcpy(changed, sound, n_bytes);
        mutate(&random, changed, n_bytes);
        if (kvl_lmdb_check((const uint8_t *)changed, n_bytes, NULL) != KVL_OK) {
            n_refused++;
            continue;
        }
        if (n_used == USES_MAX) continue;
        n_used++;
        write_database(place.path, changed, n_bytes);
        const pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) use_database(place.path);
        int how = 0;
        assert_int_equal(waitpid(child, &how, 0), child);
        if (!WIFEXITED(how) || WEXITSTATUS(how) != 0)
            fail_msg("round %d: LMDB ended with %x", round, how);
    }
    assert_true(n_refused > ROUNDS / 20);
    assert_true(n_used > 0);
    kvl_free(changed);
    kvl_free(sound);
    kvl_store_place_end(&place);
}

static void test_any_length_is_read_within_bounds(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_store_place place;
    kvl_store_place_make(&place);
    work_on(place.path, &random, 6);
    size_t n_bytes = 0;
    char *sound = read_database(place.path, &n_bytes);
    for (int round = 0; round < 300; round++) {
        const size_t n =
            round < 40 ? (size_t)round * 256 : kvl_test_below(&random, (uint32_t)n_bytes);
        uint8_t *part =
            kvl_alloc(n + 1); /* of just this size, so that a sanitizer sees reads behind it */
        memcpy(part + 1, sound, n);
        const kvl_status status = kvl_lmdb_check(part + 1, n, NULL);
        assert_true(status == KVL_OK || status == KVL_ERR_CORRUPT);
        kvl_free(part);
    }
    kvl_free(sound);
    kvl_store_place_end(&place);
}

static void test_failing_allocation_is_no_damage(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_store_place place;
    kvl_store_place_make(&place);
    work_on(place.path, &random, 3);
    size_t n_bytes = 0;
    char *bytes = read_database(place.path, &n_bytes);
    kvl_alloc_fail_after(0);
    const kvl_status status = kvl_lmdb_check((const uint8_t *)bytes, n_bytes, NULL);
    kvl_alloc_fail_after(-1);
    assert_int_equal(status, KVL_ERR_NO_MEMORY);
    kvl_free(bytes);
    kvl_store_place_end(&place);
}

int main(void)
{
    kvl_log_set_level(KVL_LOG_SILENT);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_sound_database_passes),
        cmocka_unit_test(s19_lmdb_survives_what_passes),
        cmocka_unit_test(test_any_length_is_read_within_bounds),
        cmocka_unit_test(test_failing_allocation_is_no_damage),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
