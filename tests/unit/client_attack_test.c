/* client_attack_test.c: what a client must not be able to do to a sidecar, named after the
 * attacks. */
#include "base/alloc.h"
#include "base/log.h"
#include "base/random.h"
#include "exchange/local.h"
#include "local.pb-c.h"
#include "sidecar_stage.h"

#include <dirent.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

enum { TOKENS = 64, WAIT_MS = 5000 };

typedef Kvloom__Local__V1__Request request;
typedef Kvloom__Local__V1__Reply reply;

static int set_up(void **state)
{
    (void)state;
    kvl_log_set_level(KVL_LOG_SILENT);
    return 0;
}

/* ---- speaking the protocol by hand ---- */

static kvl_local_link dial(const sidecar_stage *stage)
{
    kvl_local_link link;
    int fd = -1;
    assert_int_equal(kvl_local_dial(stage->socket[0], &fd, NULL), KVL_OK);
    kvl_local_link_init(&link, fd);
    return link;
}

static void send_request(kvl_local_link *link, const request *r, int fd)
{
    kvl_local_chunk *chunk = kvl_local_chunk_create(kvloom__local__v1__request__get_packed_size(r));
    (void)kvloom__local__v1__request__pack(r, kvl_local_chunk_bytes(chunk));
    kvl_ignore(kvl_local_link_send(link, chunk, fd));
}

/* The status of the next reply; KVL_ERR_UNREACHABLE where the connection ended. */
static kvl_status next_status(kvl_local_link *link)
{
    for (;;) {
        const uint8_t *bytes = NULL;
        size_t n_bytes = 0;
        int fd = -1;
        const kvl_status status = kvl_local_link_next(link, &bytes, &n_bytes, &fd);
        if (status == KVL_OK) {
            reply *got = kvloom__local__v1__reply__unpack(NULL, n_bytes, bytes);
            assert_non_null(got);
            const kvl_status said = (kvl_status)got->status;
            kvloom__local__v1__reply__free_unpacked(got, NULL);
            if (fd >= 0) (void)close(fd);
            return said;
        }
        struct pollfd item = {.fd = link->fd, .events = POLLIN};
        if (poll(&item, 1, WAIT_MS) != 1) return KVL_ERR_TIMEOUT;
        if (kvl_local_link_read(link) < 0) return KVL_ERR_UNREACHABLE;
    }
}

static kvl_status say_hello(kvl_local_link *link, const void *salt, size_t n_salt)
{
    request r = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__Hello hello = KVLOOM__LOCAL__V1__HELLO__INIT;
    kvloom_digest fingerprint = sidecar_stage_fingerprint();
    char name[] = "attacker";
    r.number = 1;
    r.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_HELLO;
    r.hello = &hello;
    hello.magic = KVL_LOCAL_MAGIC;
    hello.version_min = hello.version_max = 1;
    hello.name = name;
    hello.fingerprint.data = fingerprint.bytes;
    hello.fingerprint.len = sizeof fingerprint.bytes;
    hello.salt.data = (uint8_t *)(uintptr_t)salt;
    hello.salt.len = n_salt;
    send_request(link, &r, -1);
    return next_status(link);
}

static void check_alive(const sidecar_stage *stage)
{
    kvloom_client *client = sidecar_stage_connect(stage, 0, NULL);
    kvloom_stats stats;
    assert_int_equal(kvloom_get_stats(client, &stats, NULL), KVLOOM_OK);
    kvloom_close(client);
}

static size_t open_descriptors(void)
{
    size_t n = 0;
    DIR *folder = opendir("/proc/self/fd");
    assert_non_null(folder);
    while (readdir(folder) != NULL) n++;
    (void)closedir(folder);
    return n;
}

/* ---- the attacks ---- */

static void s3_a_bad_salt_is_refused_and_harms_nobody(void **state)
{
    (void)state;
    sidecar_stage stage;
    sidecar_stage_prepare(&stage, "s");
    sidecar_stage_start(&stage);
    char longest[129];
    memset(longest, 's', sizeof longest);
    const struct {
        const char *salt;
        size_t n;
        kvl_status wanted;
    } cases[] = {{"", 0, KVL_OK},
                 {longest, 128, KVL_OK},
                 {"\xc3\xa9", 2, KVL_OK},
                 {longest, 129, KVL_ERR_INVALID},
                 {"a@b", 3, KVL_ERR_INVALID},
                 {"a/b", 3, KVL_ERR_INVALID},
                 {"a\\b", 3, KVL_ERR_INVALID},
                 {"a\0b", 3, KVL_ERR_INVALID},
                 {"\n", 1, KVL_ERR_INVALID},
                 {"\xff\xfe", 2, KVL_ERR_INVALID},
                 {"\xc0\xaf", 2, KVL_ERR_INVALID},
                 {"\xed\xa0\x80", 3, KVL_ERR_INVALID},
                 {"\xe2\x82", 2, KVL_ERR_INVALID},
                 {"\xf4\x90\x80\x80", 4, KVL_ERR_INVALID}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kvl_local_link link = dial(&stage);
        assert_int_equal(say_hello(&link, cases[i].salt, cases[i].n), cases[i].wanted);
        kvl_local_link_deinit(&link);
    }
    check_alive(&stage);
    sidecar_stage_end(&stage);
}

/* More requests at once than fit into one read are all answered. */
static void requests_in_a_row_are_all_answered(void **state)
{
    (void)state;
    enum { N = 2000 };
    sidecar_stage stage;
    sidecar_stage_prepare(&stage, "s");
    sidecar_stage_start(&stage);
    kvl_local_link link = dial(&stage);
    assert_int_equal(say_hello(&link, "", 0), KVL_OK);
    request r = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__Empty empty = KVLOOM__LOCAL__V1__EMPTY__INIT;
    r.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_STATS;
    r.stats = &empty;
    for (uint64_t i = 0; i < N; i++) {
        r.number = i + 2;
        send_request(&link, &r, -1);
    }
    for (int i = 0; i < N; i++) {
        kvl_ignore(kvl_local_link_flush(&link));
        assert_int_equal(next_status(&link), KVL_OK);
    }
    kvl_local_link_deinit(&link);
    sidecar_stage_end(&stage);
}

/* S2, S1 in part: tenants and salts find nothing of each other, by key or by id. */
static void s2_a_tenant_or_salt_sees_nothing_of_another(void **state)
{
    (void)state;
    sidecar_stage stage;
    sidecar_stage_prepare(&stage, "s");
    memcpy(stage.keys[1], stage.keys[0], sizeof stage.keys[1]); /* even with the same key */
    sidecar_stage_start(&stage);
    kvloom_client *owner = sidecar_stage_connect(&stage, 0, NULL);
    kvloom_client *salted = sidecar_stage_connect(&stage, 0, "team-b");
    kvloom_client *other = sidecar_stage_connect(&stage, 1, NULL);
    kvloom_error error;
    assert_int_equal(sidecar_stage_put(owner, 1, TOKENS, 0, &error), KVLOOM_OK);
    const kvloom_key key = sidecar_stage_key(1, TOKENS);
    kvloom_segment *segment = NULL;
    assert_int_equal(kvloom_get(owner, &key, 0, &segment, &error), KVLOOM_OK);
    const kvloom_digest id = *kvloom_segment_id(segment);
    kvloom_segment_release(segment);
    kvloom_client *const strangers[] = {salted, other};
    for (size_t i = 0; i < 2; i++) {
        kvloom_place place = KVLOOM_IN_MEMORY;
        assert_int_equal(kvloom_get(strangers[i], &key, 100, &segment, &error),
                         KVLOOM_ERR_NOT_FOUND);
        assert_int_equal(kvloom_locate(strangers[i], &key, 1, &place, &error), KVLOOM_OK);
        assert_int_equal(place, KVLOOM_NOWHERE);
    }
    /* S11: nor may another tenant delete or pin it by its id. */
    uint64_t lease = 0;
    assert_int_equal(kvloom_get_id(other, &id, 100, &segment, &error), KVLOOM_ERR_NOT_FOUND);
    assert_int_equal(kvloom_remove_id(other, &id, &error), KVLOOM_ERR_NOT_FOUND);
    assert_int_equal(kvloom_pin_id(other, &id, 100, 0, &lease, &error), KVLOOM_ERR_NOT_FOUND);
    assert_int_equal(kvloom_get(owner, &key, 0, &segment, &error), KVLOOM_OK);
    kvloom_segment_release(segment);
    kvloom_close(owner);
    kvloom_close(salted);
    kvloom_close(other);
    sidecar_stage_end(&stage);
}

static kvl_status put_by_hand(kvl_local_link *link, uint32_t n_layers, uint32_t dtype,
                              const kvl_digest *id, int fd)
{
    request r = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__Put put = KVLOOM__LOCAL__V1__PUT__INIT;
    Kvloom__Local__V1__Key key = KVLOOM__LOCAL__V1__KEY__INIT;
    Kvloom__Local__V1__Shape shape = KVLOOM__LOCAL__V1__SHAPE__INIT;
    uint32_t tokens[] = {1, 2, 3};
    r.number = 2;
    r.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_PUT;
    r.put = &put;
    put.key = &key;
    put.shape = &shape;
    key.tokens.data = (uint8_t *)tokens;
    key.tokens.len = sizeof tokens;
    if (id != NULL) {
        key.id.data = (uint8_t *)(uintptr_t)id->bytes;
        key.id.len = sizeof id->bytes;
    }
    shape.dtype = dtype;
    shape.n_layers = n_layers;
    shape.n_kv_heads = 1;
    shape.head_dim = 8;
    send_request(link, &r, fd);
    return next_status(link);
}

/* S5: nobody chooses a name. S9: no size is believed, no descriptor but one of memory is read. */
static void s5_s9_forged_puts_are_refused(void **state)
{
    (void)state;
    sidecar_stage stage;
    sidecar_stage_prepare(&stage, "s");
    sidecar_stage_start(&stage);
    kvl_local_link link = dial(&stage);
    const kvl_digest chosen = {{7}};
    assert_int_equal(put_by_hand(&link, 1, 1, NULL, -1), KVL_ERR_DENIED); /* no Hello yet */
    assert_int_equal(say_hello(&link, "", 0), KVL_OK);
    const int memory = memfd_create("t", MFD_CLOEXEC);
    assert_int_equal(ftruncate(memory, 100), 0);
    int pipes[2];
    assert_int_equal(pipe(pipes), 0);
    assert_int_equal(put_by_hand(&link, 1, 1, &chosen, memory), KVL_ERR_DENIED);
    assert_int_equal(put_by_hand(&link, 1, 1, NULL, -1), KVL_ERR_INVALID);
    assert_int_equal(put_by_hand(&link, 1, 1, NULL, pipes[0]), KVL_ERR_INVALID); /* would block */
    assert_int_equal(put_by_hand(&link, 1, 1, NULL, memory), KVL_ERR_MALFORMED); /* too short */
    const uint32_t layers[] = {0, 1025, UINT32_MAX};
    for (size_t i = 0; i < 3; i++)
        assert_int_equal(put_by_hand(&link, layers[i], 1, NULL, memory), KVL_ERR_OUT_OF_RANGE);
    assert_int_equal(put_by_hand(&link, 1, 99, NULL, memory), KVL_ERR_OUT_OF_RANGE);
    (void)close(memory);
    (void)close(pipes[0]);
    (void)close(pipes[1]);
    kvl_local_link_deinit(&link);
    check_alive(&stage);
    sidecar_stage_end(&stage);
}

/* S7, S12: bytes that are no protocol, half frames, descriptors that nobody asked for, and clients
 * that vanish in the middle: the sidecar lives, and everything is as before. */
static void s7_s12_noise_leaves_nothing_behind(void **state)
{
    (void)state;
    sidecar_stage stage;
    sidecar_stage_prepare(&stage, "s");
    sidecar_stage_start(&stage);
    kvl_random random = {.state = 12};
    check_alive(&stage);
    const size_t before = open_descriptors();
    for (int i = 0; i < 3000; i++) {
        kvl_local_link link = dial(&stage);
        if (i % 3 == 0) kvl_ignore(say_hello(&link, "", 0));
        uint8_t noise[300];
        const size_t n = 1 + kvl_random_below(&random, sizeof noise);
        for (size_t k = 0; k < n; k++) noise[k] = (uint8_t)kvl_random_next(&random);
        if (i % 2 == 0 && n > 8) {
            memset(noise, 0, 8); /* a frame whose length is right */
            noise[0] = (uint8_t)(n - 8);
            noise[1] = (uint8_t)((n - 8) >> 8);
        }
        (void)send(link.fd, noise, n, MSG_NOSIGNAL);
        if (i % 5 == 0) {
            const int fd = memfd_create("t", MFD_CLOEXEC);
            kvl_local_chunk *chunk = kvl_local_chunk_create(4);
            memset(kvl_local_chunk_bytes(chunk), 0xff, 4);
            kvl_ignore(kvl_local_link_send(&link, chunk, fd));
            (void)close(fd);
        }
        kvl_local_link_deinit(&link);
    }
    kvloom_client *client = sidecar_stage_connect(&stage, 0, NULL);
    kvloom_stats stats = {.clients = 2};
    for (int i = 0; i < 500 && stats.clients > 1; i++) {
        assert_int_equal(kvloom_get_stats(client, &stats, NULL), KVLOOM_OK);
        (void)poll(NULL, 0, 10);
    }
    assert_int_equal(stats.clients, 1);
    assert_int_equal(stats.leases, 0);
    assert_true(stats.refused > 100);
    kvloom_close(client);
    for (int i = 0; i < 500 && open_descriptors() > before; i++) (void)poll(NULL, 0, 10);
    assert_true(open_descriptors() <= before);
    sidecar_stage_end(&stage);
}

/* S8: one that never reads is dropped, and does not delay the others meanwhile. */
static void s8_a_client_that_never_reads_is_dropped(void **state)
{
    (void)state;
    sidecar_stage stage;
    kvloom_client *client = sidecar_stage_open(&stage, 0);
    for (uint32_t i = 0; i < 200; i++)
        assert_int_equal(sidecar_stage_put(client, i, 1, 0, NULL), KVLOOM_OK);
    kvl_local_link deaf = dial(&stage);
    assert_int_equal(say_hello(&deaf, "", 0), KVL_OK);
    request r = KVLOOM__LOCAL__V1__REQUEST__INIT;
    Kvloom__Local__V1__List list = KVLOOM__LOCAL__V1__LIST__INIT;
    r.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_LIST;
    r.list = &list;
    list.n_max = KVL_LOCAL_LIST_MAX;
    kvloom_stats stats = {.clients = 2};
    for (int i = 0; i < 20000 && stats.clients > 1; i++) {
        r.number = (uint64_t)i;
        send_request(&deaf, &r, -1);
        if (i % 100 == 0) assert_int_equal(kvloom_get_stats(client, &stats, NULL), KVLOOM_OK);
    }
    for (int i = 0; i < WAIT_MS / 10 && stats.clients > 1; i++) {
        kvl_ignore(kvl_local_link_flush(&deaf));
        assert_int_equal(kvloom_get_stats(client, &stats, NULL), KVLOOM_OK);
        (void)poll(NULL, 0, 10);
    }
    assert_int_equal(stats.clients, 1);
    kvl_local_link_deinit(&deaf);
    sidecar_stage_close(&stage, client);
}

static void flood(kvl_policy_kind policy)
{
    sidecar_stage stage;
    sidecar_stage_prepare(&stage, "s");
    for (int t = 0; t < 2; t++) {
        stage.tenants[t].memory_bytes_max = 4 << 20;
        stage.tenants[t].policy = policy;
    }
    sidecar_stage_start(&stage);
    kvloom_client *quiet = sidecar_stage_connect(&stage, 0, NULL);
    kvloom_client *loud = sidecar_stage_connect(&stage, 1, NULL);
    enum { KEPT = 20, FLOOD = 500 };
    for (uint32_t i = 0; i < KEPT; i++)
        assert_int_equal(sidecar_stage_put(quiet, i, TOKENS, 0, NULL), KVLOOM_OK);
    for (uint32_t i = 0; i < FLOOD; i++)
        assert_int_equal(sidecar_stage_put(loud, i, TOKENS, 0, NULL), KVLOOM_OK);
    for (uint32_t i = 0; i < KEPT; i++) {
        const kvloom_key key = sidecar_stage_key(i, TOKENS);
        kvloom_segment *segment = NULL;
        assert_int_equal(kvloom_get(quiet, &key, 0, &segment, NULL), KVLOOM_OK);
        kvloom_segment_release(segment);
    }
    kvloom_stats stats;
    assert_int_equal(kvloom_get_stats(loud, &stats, NULL), KVLOOM_OK);
    assert_true(stats.evictions > 0);
    assert_true(stats.memory_bytes <= stats.memory_bytes_max);
    kvloom_close(quiet);
    kvloom_close(loud);
    sidecar_stage_end(&stage);
}

/* S18: however one tenant writes, another one's segments stay where they are, under each policy. */
static void s18_a_flood_by_one_tenant_evicts_nothing_of_another(void **state)
{
    (void)state;
    for (uint32_t k = 0; k < KVL_POLICIES; k++) flood((kvl_policy_kind)k);
}

/* S21: what does not fit is refused in words that name both. */
static void s21_other_versions_are_refused_by_name(void **state)
{
    (void)state;
    sidecar_stage stage;
    sidecar_stage_prepare(&stage, "s");
    sidecar_stage_start(&stage);
    const uint32_t versions[][2] = {{2, 3}, {0, 1}, {1, 9}};
    const kvl_status wanted[] = {KVL_ERR_UNSUPPORTED, KVL_ERR_UNSUPPORTED, KVL_OK};
    for (size_t i = 0; i < 3; i++) {
        kvl_local_link link = dial(&stage);
        request r = KVLOOM__LOCAL__V1__REQUEST__INIT;
        Kvloom__Local__V1__Hello hello = KVLOOM__LOCAL__V1__HELLO__INIT;
        kvloom_digest fingerprint = sidecar_stage_fingerprint();
        r.body_case = KVLOOM__LOCAL__V1__REQUEST__BODY_HELLO;
        r.hello = &hello;
        hello.magic = KVL_LOCAL_MAGIC;
        hello.version_min = versions[i][0];
        hello.version_max = versions[i][1];
        hello.fingerprint.data = fingerprint.bytes;
        hello.fingerprint.len = sizeof fingerprint.bytes;
        send_request(&link, &r, -1);
        assert_int_equal(next_status(&link), wanted[i]);
        kvl_local_link_deinit(&link);
    }
    sidecar_stage_end(&stage);
}

/* S22 in small: a client works on over restarts, and never sees a wrong byte. */
static void s22_restarts_cost_misses_and_nothing_else(void **state)
{
    (void)state;
    sidecar_stage stage;
    kvloom_client *client = sidecar_stage_open(&stage, 64 << 20);
    for (uint32_t round = 0; round < 10; round++) {
        assert_int_equal(sidecar_stage_put(client, round, TOKENS, 0, NULL), KVLOOM_OK);
        sidecar_stage_stop(&stage);
        sidecar_stage_start(&stage);
        for (uint32_t i = 0; i <= round; i++) {
            const kvloom_key key = sidecar_stage_key(i, TOKENS);
            kvloom_segment *segment = NULL;
            assert_int_equal(kvloom_get(client, &key, 2000, &segment, NULL), KVLOOM_OK);
            assert_true(sidecar_stage_is(segment, i, TOKENS));
            kvloom_segment_release(segment);
        }
    }
    sidecar_stage_close(&stage, client);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(s3_a_bad_salt_is_refused_and_harms_nobody, set_up),
        cmocka_unit_test(requests_in_a_row_are_all_answered),
        cmocka_unit_test(s2_a_tenant_or_salt_sees_nothing_of_another),
        cmocka_unit_test(s5_s9_forged_puts_are_refused),
        cmocka_unit_test(s7_s12_noise_leaves_nothing_behind),
        cmocka_unit_test(s8_a_client_that_never_reads_is_dropped),
        cmocka_unit_test(s18_a_flood_by_one_tenant_evicts_nothing_of_another),
        cmocka_unit_test(s21_other_versions_are_refused_by_name),
        cmocka_unit_test(s22_restarts_cost_misses_and_nothing_else),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
