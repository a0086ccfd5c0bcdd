/* store/lmdb: what only a database can do wrong: be damaged, killed, full, foreign, opened
 * twice. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/log.h"
#include "store/lmdb_env.h"
#include "store/store.h"
#include "store_sample.h"
#include "test_random.h"

#include <lmdb.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static const uint64_t MIB = (uint64_t)1 << 20;

static kvl_tier *open_tier(const char *path, uint64_t bytes_max, bool durable)
{
    const kvl_lmdb_tier_options options = {path, bytes_max, kvl_store_fingerprint(), durable, NULL};
    kvl_tier *tier = NULL;
    kvl_error error = {.text = ""};
    if (kvl_lmdb_tier_create(&options, &tier, &error) != KVL_OK) fail_msg("%s", error.text);
    return tier;
}

static kvl_status put_number(kvl_tier *tier, uint32_t number, size_t payload)
{
    kvl_container *container = kvl_store_sample(number, payload);
    const kvl_status status = tier->ops->put(tier, container, NULL);
    kvl_container_release(container);
    return status;
}

static kvl_status get_number(kvl_tier *tier, uint32_t number)
{
    const kvl_digest id = kvl_store_sample_id(number);
    kvl_container *container = NULL;
    const kvl_status status = tier->ops->get(tier, &id, true, &container, NULL);
    if (status == KVL_OK) kvl_store_sample_check(container, number);
    kvl_container_release(container);
    return status;
}

static kvl_tier_stats stats_of(kvl_tier *tier)
{
    kvl_tier_stats stats;
    tier->ops->stats(tier, &stats);
    return stats;
}

/* The database as another program sees it, while no tier has it open. */
typedef struct raw {
    MDB_env *env;
    MDB_txn *txn;
    MDB_dbi containers, uses, about;
} raw;

static raw raw_open(const char *path)
{
    raw r = {0};
    assert_int_equal(mdb_env_create(&r.env), 0);
    assert_int_equal(mdb_env_set_maxdbs(r.env, 8), 0);
    assert_int_equal(mdb_env_set_mapsize(r.env, 256 * MIB), 0);
    assert_int_equal(mdb_env_open(r.env, path, MDB_NOSYNC, 0600), 0);
    assert_int_equal(mdb_txn_begin(r.env, NULL, 0, &r.txn), 0);
    (void)mdb_dbi_open(r.txn, "container", 0, &r.containers);
    (void)mdb_dbi_open(r.txn, "use", 0, &r.uses);
    (void)mdb_dbi_open(r.txn, "about", 0, &r.about);
    return r;
}

static void raw_close(raw *r)
{
    assert_int_equal(mdb_txn_commit(r->txn), 0);
    mdb_env_close(r->env);
}

static void flip(const char *path, uint32_t number, kvl_random *random)
{
    raw r = raw_open(path);
    kvl_digest id = kvl_store_sample_id(number);
    MDB_val key = {sizeof id.bytes, id.bytes};
    MDB_val value;
    assert_int_equal(mdb_get(r.txn, r.containers, &key, &value), 0);
    uint8_t *copy = malloc(value.mv_size);
    memcpy(copy, value.mv_data, value.mv_size);
    copy[kvl_test_below(random, (uint32_t)value.mv_size)] ^=
        (uint8_t)(1u << kvl_test_below(random, 8));
    value.mv_data = copy;
    assert_int_equal(mdb_put(r.txn, r.containers, &key, &value, 0), 0);
    free(copy);
    raw_close(&r);
}

static void test_any_flipped_bit_is_a_miss(void **state)
{
    (void)state;
    kvl_store_place place;
    kvl_store_place_make(&place);
    kvl_random random = kvl_test_random();
    kvl_tier *tier = open_tier(place.path, 64 * MIB, false);
    for (uint32_t round = 0; round < 150; round++) {
        const uint32_t number = kvl_test_below(&random, 3);
        const size_t payload = number == 0 ? 300 : 3000; /* in a page, and in pages of its own */
        for (uint32_t i = 0; i < 3; i++)
            assert_int_equal(put_number(tier, i, i == 0 ? 300 : 3000), KVL_OK);
        tier->ops->destroy(tier);
        flip(place.path, number, &random);
        tier = open_tier(place.path, 64 * MIB, false);
        assert_int_equal(get_number(tier, number), KVL_ERR_DAMAGED);
        assert_int_equal(get_number(tier, number), KVL_ERR_NOT_FOUND);
        kvl_tier_stats stats = stats_of(tier);
        assert_int_equal(stats.damaged, 1);
        assert_int_equal(stats.misses, 2);
        assert_int_equal(stats.n_containers, 2);
        assert_int_equal(put_number(tier, number, payload), KVL_OK);
        for (uint32_t i = 0; i < 3; i++) assert_int_equal(get_number(tier, i), KVL_OK);
    }
    tier->ops->destroy(tier);
    kvl_store_place_end(&place);
}

/* A sound container under the id of another: the id inside tells. */
static void test_swapped_containers_are_damage(void **state)
{
    (void)state;
    kvl_store_place place;
    kvl_store_place_make(&place);
    kvl_tier *tier = open_tier(place.path, 64 * MIB, false);
    for (uint32_t i = 0; i < 2; i++) assert_int_equal(put_number(tier, i, 3000), KVL_OK);
    tier->ops->destroy(tier);
    raw r = raw_open(place.path);
    kvl_digest ids[2] = {kvl_store_sample_id(0), kvl_store_sample_id(1)};
    MDB_val key = {sizeof ids[0].bytes, ids[0].bytes};
    MDB_val value;
    assert_int_equal(mdb_get(r.txn, r.containers, &key, &value), 0);
    void *copy = malloc(value.mv_size);
    memcpy(copy, value.mv_data, value.mv_size);
    key.mv_data = ids[1].bytes;
    value.mv_data = copy;
    assert_int_equal(mdb_put(r.txn, r.containers, &key, &value, 0), 0);
    free(copy);
    raw_close(&r);
    tier = open_tier(place.path, 64 * MIB, false);
    assert_int_equal(get_number(tier, 1), KVL_ERR_DAMAGED);
    assert_int_equal(get_number(tier, 0), KVL_OK);
    assert_int_equal(stats_of(tier).n_containers, 1);
    tier->ops->destroy(tier);
    kvl_store_place_end(&place);
}

static void test_everything_is_there_after_reopening(void **state)
{
    (void)state;
    enum { N = 60 };
    kvl_store_place place;
    kvl_store_place_make(&place);
    kvl_tier *tier = open_tier(place.path, 64 * MIB, true);
    for (uint32_t i = 0; i < N; i++) assert_int_equal(put_number(tier, i, 100 * i), KVL_OK);
    const kvl_tier_stats before = stats_of(tier);
    tier->ops->destroy(tier);
    tier = open_tier(place.path, 64 * MIB, true);
    const kvl_tier_stats after = stats_of(tier);
    assert_int_equal(after.n_containers, N);
    assert_int_equal(after.bytes, before.bytes);
    for (uint32_t i = 0; i < N; i++) assert_int_equal(get_number(tier, i), KVL_OK);
    tier->ops->destroy(tier);
    kvl_store_place_end(&place);
}

static bool note_order(void *context, const kvl_digest *id, kvl_container_kind kind,
                       uint64_t n_bytes)
{
    (void)kind;
    (void)n_bytes;
    uint32_t *numbers = context;
    for (uint32_t i = 0; i < 100; i++) {
        const kvl_digest known = kvl_store_sample_id(i);
        if (kvl_digest_equal(&known, id)) numbers[++numbers[0]] = i;
    }
    return true;
}

static void test_order_of_use_survives(void **state)
{
    (void)state;
    enum { N = 100 };
    kvl_store_place place;
    kvl_store_place_make(&place);
    kvl_random random = kvl_test_random();
    kvl_tier *tier = open_tier(place.path, 64 * MIB, false);
    for (uint32_t i = 0; i < N; i++) assert_int_equal(put_number(tier, i, 100), KVL_OK);
    for (int i = 0; i < 300; i++)
        assert_int_equal(get_number(tier, kvl_test_below(&random, N)), KVL_OK);
    uint32_t before[N + 1] = {0}, after[N + 1] = {0};
    tier->ops->list(tier, note_order, before);
    tier->ops->destroy(tier);
    tier = open_tier(place.path, 64 * MIB, false);
    tier->ops->list(tier, note_order, after);
    assert_int_equal(after[0], N);
    assert_memory_equal(before, after, sizeof before);
    tier->ops->destroy(tier);
    kvl_store_place_end(&place);
}

/* In the child: puts, removes and gets for ever, and says after each put that it is through. */
static _Noreturn void write_until_killed(const char *path, int acknowledge, uint64_t seed)
{
    kvl_random random = {seed};
    kvl_tier *tier = open_tier(path, 4 * MIB, true);
    for (uint32_t number = 0;; number++) {
        const size_t payload = 100 + kvl_test_below(&random, 60000);
        if (put_number(tier, number, payload) != KVL_OK) _exit(3);
        if (write(acknowledge, &number, sizeof number) != sizeof number) _exit(4);
        const kvl_digest id = kvl_store_sample_id(kvl_test_below(&random, number + 1));
        kvl_container *container = NULL;
        if (kvl_test_below(&random, 2) == 0 &&
            tier->ops->get(tier, &id, true, &container, NULL) == KVL_OK)
            kvl_container_release(container);
    }
}

static bool check_listed(void *context, const kvl_digest *id, kvl_container_kind kind,
                         uint64_t n_bytes)
{
    (void)kind;
    (void)n_bytes;
    kvl_digest *ids = context;
    size_t n = 0;
    while (!kvl_digest_is_zero(&ids[n])) n++;
    ids[n] = *id;
    return true;
}

/* S20. Killed at any instant: what was acknowledged last is there, and nothing that is there is
 * torn. */
static void s20_a_killed_writer_leaves_whole_containers(void **state)
{
    (void)state;
    enum { KILLS = 36, IDS_MAX = 100000 };
    kvl_random random = kvl_test_random();
    static kvl_digest ids[IDS_MAX];
    for (int round = 0; round < KILLS; round++) {
        kvl_store_place place;
        kvl_store_place_make(&place);
        int ends[2];
        assert_int_equal(pipe(ends), 0);
        const uint64_t seed = kvl_random_next(&random);
        const pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            (void)close(ends[0]);
            write_until_killed(place.path, ends[1], seed);
        }
        (void)close(ends[1]);
        uint32_t last = UINT32_MAX;
        assert_int_equal(read(ends[0], &last, sizeof last), sizeof last);
        (void)usleep(kvl_test_below(&random, 30000));
        (void)kill(child, SIGKILL);
        int how = 0;
        assert_int_equal(waitpid(child, &how, 0), child);
        assert_true(WIFSIGNALED(how));
        while (read(ends[0], &last, sizeof last) == (ssize_t)sizeof last) continue;
        (void)close(ends[0]);

        kvl_tier *tier = open_tier(place.path, 4 * MIB, true);
        assert_int_equal(stats_of(tier).damaged, 0);
        assert_int_equal(get_number(tier, last), KVL_OK);
        memset(ids, 0, sizeof ids[0] * (stats_of(tier).n_containers + 2));
        tier->ops->list(tier, check_listed, ids);
        for (size_t i = 0; i < stats_of(tier).n_containers; i++) {
            kvl_container *container = NULL;
            assert_int_equal(tier->ops->get(tier, &ids[i], true, &container, NULL), KVL_OK);
            kvl_container_release(container);
        }
        assert_int_equal(put_number(tier, last + 1, 5000), KVL_OK);
        tier->ops->destroy(tier);
        kvl_store_place_end(&place);
    }
}

static void test_containers_of_another_model_are_foreign(void **state)
{
    (void)state;
    kvl_store_place place;
    kvl_store_place_make(&place);
    kvl_tier *tier = open_tier(place.path, 64 * MIB, false);
    kvl_digest other = kvl_store_fingerprint();
    other.bytes[31] ^= 1;
    kvl_container *container = kvl_store_sample_of(7, 100, &other);
    kvl_container_seal(container);
    kvl_error error;
    assert_int_equal(tier->ops->put(tier, container, &error), KVL_ERR_FOREIGN);
    assert_non_null(strstr(error.text, "5a5a5a5a"));
    kvl_container_release(container);
    assert_int_equal(stats_of(tier).foreign, 1);
    assert_int_equal(stats_of(tier).n_containers, 0);
    assert_int_equal(put_number(tier, 1, 100), KVL_OK);
    tier->ops->destroy(tier);

    /* The same database under another model: nothing is given out, nothing is lost. */
    const kvl_lmdb_tier_options options = {place.path, 64 * MIB, other, false, NULL};
    assert_int_equal(kvl_lmdb_tier_create(&options, &tier, NULL), KVL_OK);
    assert_int_equal(get_number(tier, 1), KVL_ERR_FOREIGN);
    assert_int_equal(stats_of(tier).foreign, 1);
    assert_int_equal(stats_of(tier).misses, 1);
    tier->ops->destroy(tier);
    tier = open_tier(place.path, 64 * MIB, false);
    assert_int_equal(get_number(tier, 1), KVL_OK);
    tier->ops->destroy(tier);
    kvl_store_place_end(&place);
}

static void expect_no_tier(const kvl_lmdb_tier_options *options, kvl_status expected,
                           const char *word)
{
    kvl_tier *tier = NULL;
    kvl_error error = {.text = ""};
    assert_int_equal(kvl_lmdb_tier_create(options, &tier, &error), expected);
    assert_null(tier);
    if (strstr(error.text, word) == NULL) fail_msg("'%s' does not say '%s'", error.text, word);
}

static void test_a_path_that_will_not_do_is_refused(void **state)
{
    (void)state;
    kvl_store_place place;
    kvl_store_place_make(&place);
    char file[128];
    (void)snprintf(file, sizeof file, "%s/file", place.path);
    assert_int_equal(kvl_file_write(file, "x", 1, NULL), KVL_OK);
    kvl_lmdb_tier_options options = {file, MIB, kvl_store_fingerprint(), false, NULL};
    expect_no_tier(&options, KVL_ERR_IO, "not a directory");
    options.path = "";
    expect_no_tier(&options, KVL_ERR_INVALID, "path is empty");
    options.path = place.path;
    options.bytes_max = 0;
    expect_no_tier(&options, KVL_ERR_INVALID, "bytes_max is 0");
    options.bytes_max = UINT64_MAX;
    expect_no_tier(&options, KVL_ERR_INVALID, "bytes_max");
    options.bytes_max = MIB;
    kvl_tier *first = open_tier(place.path, MIB, false);
    expect_no_tier(&options, KVL_ERR_BUSY, "open already");
    first->ops->destroy(first);
    kvl_tier *second = open_tier(place.path, MIB, false);
    second->ops->destroy(second);
    kvl_store_place_end(&place);
    assert_string_equal(kvl_lmdb_remote_filesystem(0x6969), "NFS");
    assert_string_equal(kvl_lmdb_remote_filesystem(0xff534d42), "CIFS");
    assert_null(kvl_lmdb_remote_filesystem(0xef53)); /* ext4 */
}

static void test_another_format_is_refused_and_left_alone(void **state)
{
    (void)state;
    kvl_store_place place;
    kvl_store_place_make(&place);
    kvl_tier *tier = open_tier(place.path, MIB, false);
    assert_int_equal(put_number(tier, 1, 100), KVL_OK);
    tier->ops->destroy(tier);
    for (uint32_t format = KVL_LMDB_FORMAT + 1; format + 1 > KVL_LMDB_FORMAT; format--) {
        raw r = raw_open(place.path);
        MDB_val key = {6, (void *)(uintptr_t) "format"};
        MDB_val value = {sizeof format, &format};
        assert_int_equal(mdb_put(r.txn, r.about, &key, &value, 0), 0);
        raw_close(&r);
        const kvl_lmdb_tier_options options = {place.path, MIB, kvl_store_fingerprint(), false,
                                               NULL};
        if (format > KVL_LMDB_FORMAT) {
            expect_no_tier(&options, KVL_ERR_FOREIGN, "format 2, this build reads 1");
        } else if (format == KVL_LMDB_FORMAT) {
            tier = open_tier(place.path, MIB, false);
            assert_int_equal(get_number(tier, 1), KVL_OK);
            tier->ops->destroy(tier);
        }
    }
    kvl_store_place_end(&place);
}

static void test_another_programs_database_is_left_alone(void **state)
{
    (void)state;
    kvl_store_place place;
    kvl_store_place_make(&place);
    raw r = raw_open(place.path);
    MDB_dbi theirs;
    assert_int_equal(mdb_dbi_open(r.txn, "accounts", MDB_CREATE, &theirs), 0);
    MDB_val key = {3, (void *)(uintptr_t) "bob"};
    assert_int_equal(mdb_put(r.txn, theirs, &key, &key, 0), 0);
    raw_close(&r);
    const kvl_lmdb_tier_options options = {place.path, MIB, kvl_store_fingerprint(), false, NULL};
    expect_no_tier(&options, KVL_ERR_INVALID, "another program");
    r = raw_open(place.path);
    MDB_val value;
    assert_int_equal(mdb_dbi_open(r.txn, "accounts", 0, &theirs), 0);
    assert_int_equal(mdb_get(r.txn, theirs, &key, &value), 0);
    raw_close(&r);
    kvl_store_place_end(&place);
}

static void damage_file(const char *path, size_t at, const void *bytes, size_t n_bytes)
{
    char name[128];
    (void)snprintf(name, sizeof name, "%s/data.mdb", path);
    FILE *file = fopen(name, "r+b");
    assert_non_null(file);
    assert_int_equal(fseek(file, (long)at, SEEK_SET), 0);
    assert_int_equal(fwrite(bytes, 1, n_bytes, file), n_bytes);
    assert_int_equal(fclose(file), 0);
}

static void test_a_damaged_database_is_put_aside(void **state)
{
    (void)state;
    for (int which = 0; which < 3; which++) {
        kvl_store_place place;
        kvl_store_place_make(&place);
        kvl_tier *tier = open_tier(place.path, MIB, false);
        for (uint32_t i = 0; i < 20; i++) assert_int_equal(put_number(tier, i, 3000), KVL_OK);
        tier->ops->destroy(tier);
        if (which == 0) { /* garbage in place of pages */
            uint8_t garbage[8 * 4096];
            memset(garbage, 0xee, sizeof garbage);
            damage_file(place.path, 2 * 4096, garbage, sizeof garbage);
        } else if (which == 1) { /* not LMDB at all */
            damage_file(place.path, 0, "hello, world; I am a text file", 30);
        } else { /* sound pages, but the tables differ */
            raw r = raw_open(place.path);
            kvl_digest id = kvl_store_sample_id(3);
            MDB_val key = {sizeof id.bytes, id.bytes};
            assert_int_equal(mdb_del(r.txn, r.uses, &key, NULL), 0);
            raw_close(&r);
        }
        tier = open_tier(place.path, MIB, false);
        assert_int_equal(stats_of(tier).damaged, 1);
        assert_int_equal(stats_of(tier).n_containers, 0);
        assert_int_equal(put_number(tier, 1, 3000), KVL_OK);
        assert_int_equal(get_number(tier, 1), KVL_OK);
        tier->ops->destroy(tier);
        char aside[128];
        struct stat about;
        (void)snprintf(aside, sizeof aside, "%s/data.mdb.damaged", place.path);
        assert_int_equal(stat(aside, &about), 0);
        tier = open_tier(place.path, MIB, false);
        assert_int_equal(stats_of(tier).damaged, 0);
        assert_int_equal(get_number(tier, 1), KVL_OK);
        tier->ops->destroy(tier);
        kvl_store_place_end(&place);
    }
}

typedef struct reading {
    kvl_tier *tier;
    _Atomic bool is_over;
    _Atomic uint64_t n_right, n_wrong;
} reading;

static void *read_on(void *context)
{
    reading *r = context;
    kvl_random random = {(uint64_t)(uintptr_t)&random};
    while (!atomic_load(&r->is_over)) {
        const uint32_t number = kvl_test_below(&random, 60);
        const kvl_digest id = kvl_store_sample_id(number);
        kvl_container *container = NULL;
        const kvl_status status = r->tier->ops->get(r->tier, &id, true, &container, NULL);
        if (status == KVL_OK) atomic_fetch_add(&r->n_right, 1);
        if (status != KVL_OK && status != KVL_ERR_NOT_FOUND) atomic_fetch_add(&r->n_wrong, 1);
        kvl_container_release(container);
    }
    return NULL;
}

static uint64_t database_bytes(const char *path)
{
    char name[128];
    struct stat about;
    (void)snprintf(name, sizeof name, "%s/data.mdb", path);
    assert_int_equal(stat(name, &about), 0);
    return (uint64_t)about.st_size;
}

/* Values of very different sizes, twice what fits, while others read: the map grows and evicts, the
 * file stays within its bounds, and no reader sees anything but whole containers. */
static void test_a_full_map_grows_then_evicts(void **state)
{
    (void)state;
    enum { N = 60 };
    const uint64_t bytes_max = 40 * MIB;
    kvl_store_place place;
    kvl_store_place_make(&place);
    kvl_random random = kvl_test_random();
    reading r = {.tier = open_tier(place.path, bytes_max, false)};
    pthread_t reader;
    assert_int_equal(pthread_create(&reader, NULL, read_on, &r), 0);
    for (uint32_t i = 0; i < N; i++) {
        const size_t payload = 1000 + kvl_test_below(&random, (uint32_t)(6 * MIB));
        assert_int_equal(put_number(r.tier, i, payload), KVL_OK);
        assert_int_equal(get_number(r.tier, i), KVL_OK);
        assert_true(stats_of(r.tier).bytes <= bytes_max);
    }
    atomic_store(&r.is_over, true);
    (void)pthread_join(reader, NULL);
    assert_int_equal(atomic_load(&r.n_wrong), 0);
    assert_true(stats_of(r.tier).evictions > 0);
    assert_true(stats_of(r.tier).bytes > bytes_max / 2);
    r.tier->ops->destroy(r.tier);
    assert_true(database_bytes(place.path) <= bytes_max + bytes_max / 4 + 33 * MIB);
    kvl_container_spare_clear();
    kvl_store_place_end(&place);
}

/* A map that cannot grow: a value of half a page takes a whole one, so the pages of 30 MiB of
 * them do not fit into the map before the cap is reached. */
static void test_a_map_at_its_limit_evicts(void **state)
{
    (void)state;
    enum { N_MAX = 20000 };
    const uint64_t bytes_max = 32 * MIB;
    kvl_store_place place;
    kvl_store_place_make(&place);
    kvl_tier *tier = open_tier(place.path, bytes_max, false);
    uint32_t n = 0;
    for (; stats_of(tier).evictions == 0 && n < N_MAX; n++)
        assert_int_equal(put_number(tier, n, 1650), KVL_OK);
    assert_true(stats_of(tier).evictions > 0);
    assert_true(stats_of(tier).bytes < bytes_max / 100 * 94); /* it was not the cap */
    for (uint32_t more = 0; more < 500; more++, n++)
        assert_int_equal(put_number(tier, n, 1650), KVL_OK);
    const kvl_tier_stats stats = stats_of(tier);
    assert_int_equal(stats.n_containers + stats.evictions, n);
    assert_int_equal(get_number(tier, n - 1), KVL_OK);
    tier->ops->destroy(tier);
    tier = open_tier(place.path, bytes_max, false);
    assert_int_equal(stats_of(tier).n_containers, stats.n_containers);
    assert_int_equal(get_number(tier, n - 1), KVL_OK);
    tier->ops->destroy(tier);
    kvl_store_place_end(&place);
}

/* In the child: files may not grow past a limit, as on a full disk. */
static _Noreturn void fill_the_disk(const char *path)
{
    const struct rlimit limit = {3 * MIB, 3 * MIB};
    (void)signal(SIGXFSZ, SIG_IGN);
    kvl_tier *tier = open_tier(path, 64 * MIB, true);
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) _exit(10);
    uint32_t n = 0;
    kvl_status status = KVL_OK;
    while (status == KVL_OK && n < 100) status = put_number(tier, n++, 100000);
    if (status != KVL_ERR_IO || n < 5) _exit(11);
    kvl_error error = {.text = ""};
    kvl_container *container = kvl_store_sample(200, 100000);
    if (tier->ops->put(tier, container, &error) != KVL_ERR_IO) _exit(12);
    if (strstr(error.text, "free space") == NULL) _exit(13);
    for (uint32_t i = 0; i < n - 1; i++) {
        if (get_number(tier, i) != KVL_OK) _exit(14);
    }
    if (get_number(tier, n - 1) != KVL_ERR_NOT_FOUND) _exit(15);
    if (stats_of(tier).n_containers != n - 1) _exit(16);
    tier->ops->destroy(tier);
    _exit((int)n);
}

/* S20 */
static void s20_a_full_disk_loses_nothing(void **state)
{
    (void)state;
    kvl_store_place place;
    kvl_store_place_make(&place);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) fill_the_disk(place.path);
    int how = 0;
    assert_int_equal(waitpid(child, &how, 0), child);
    assert_true(WIFEXITED(how));
    const uint32_t n = (uint32_t)WEXITSTATUS(how);
    if (n <= 20) fail_msg("the child ended with %u", n);
    kvl_tier *tier = open_tier(place.path, 64 * MIB, true);
    assert_int_equal(stats_of(tier).n_containers, n - 1);
    for (uint32_t i = 0; i < n - 1; i++) assert_int_equal(get_number(tier, i), KVL_OK);
    assert_int_equal(put_number(tier, n, 100000), KVL_OK);
    tier->ops->destroy(tier);
    kvl_store_place_end(&place);
}

int main(void)
{
    kvl_log_set_level(KVL_LOG_ERROR);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_any_flipped_bit_is_a_miss),
        cmocka_unit_test(test_swapped_containers_are_damage),
        cmocka_unit_test(test_everything_is_there_after_reopening),
        cmocka_unit_test(test_order_of_use_survives),
        cmocka_unit_test(s20_a_killed_writer_leaves_whole_containers),
        cmocka_unit_test(test_containers_of_another_model_are_foreign),
        cmocka_unit_test(test_a_path_that_will_not_do_is_refused),
        cmocka_unit_test(test_another_format_is_refused_and_left_alone),
        cmocka_unit_test(test_another_programs_database_is_left_alone),
        cmocka_unit_test(test_a_damaged_database_is_put_aside),
        cmocka_unit_test(test_a_full_map_grows_then_evicts),
        cmocka_unit_test(test_a_map_at_its_limit_evicts),
        cmocka_unit_test(s20_a_full_disk_loses_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
