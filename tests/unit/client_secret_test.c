/* client_secret_test.c: what a client must not be able to learn from a sidecar, named after the
 * attacks: by time (S1), by ids that collide (S4), without having said who it is (S16). */
#include "base/alloc.h"
#include "base/log.h"
#include "exchange/local.h"
#include "local.pb-c.h"
#include "segment/container.h"
#include "sidecar_stage.h"
#include "store/store.h"
#include "test_random.h"
#include "timing.h"

#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { SAMPLES = 1500, TRIES = 3, TEXTS = 16, TOKENS_S1 = 2048, TOKENS = 64 };
static const double LEAST_P = 1e-4;

static double now_us(void)
{
    return (double)kvl_clock_now(kvl_clock_system()) / 1e3;
}

/* ---- S1 ---- */

typedef enum question { LOCATE, GET_NOW, GET, QUESTIONS } question;

/* What it takes to be told something of a segment. */
static double time_question(kvloom_client *client, question q, uint32_t number)
{
    const kvloom_key key = sidecar_stage_key(number, TOKENS_S1);
    kvloom_segment *segment = NULL;
    kvloom_place place;
    const double start = now_us();
    if (q == LOCATE) {
        assert_int_equal(kvloom_locate(client, &key, 1, &place, NULL), KVLOOM_OK);
    } else {
        (void)kvloom_get(client, &key, q == GET ? 1000 : 0, &segment, NULL);
    }
    const double time = now_us() - start;
    kvloom_segment_release(segment);
    return time;
}

/* Texts that the owner has, of even numbers, and others, of odd ones: drawn and in an order by
 * chance, so that whatever else goes on meets both alike, and no place of a single text in some
 * table counts. */
static double compare_times(kvloom_client *client, question q)
{
    static double times[2][SAMPLES];
    size_t n[2] = {0, 0};
    kvl_random random = kvl_test_random();
    while (n[0] < SAMPLES || n[1] < SAMPLES) {
        size_t which = kvl_test_below(&random, 2);
        if (n[which] == SAMPLES) which = 1 - which;
        const uint32_t number = 2 * kvl_test_below(&random, TEXTS) + (uint32_t)which;
        times[which][n[which]++] = time_question(client, q, number);
    }
    return kvl_test_ks_p(times[0], SAMPLES, times[1], SAMPLES);
}

/* S1: whether another tenant has a text cannot be told by the time of an answer, of the questions
 * that go to memory and of the one that goes to the disk. What differs does so every time, as one's
 * own texts show. Under a sanitizer times are its own: the questions are asked, and not timed. */
static void s1_time_does_not_tell_what_another_tenant_has(void **state)
{
    (void)state;
    sidecar_stage stage;
    sidecar_stage_prepare(&stage, "s");
    sidecar_stage_with_disk(&stage, 64 << 20);
    sidecar_stage_start(&stage);
    kvloom_client *owner = sidecar_stage_connect(&stage, 0, NULL);
    kvloom_client *other = sidecar_stage_connect(&stage, 1, NULL);
    for (uint32_t i = 0; i < TEXTS; i++)
        assert_int_equal(sidecar_stage_put(owner, 2 * i, TOKENS_S1, 0, NULL), KVLOOM_OK);
    for (int q = 0; q < QUESTIONS; q++) {
        double p = 0.0;
        for (int i = 0; i < TRIES && p <= LEAST_P; i++) p = compare_times(other, (question)q);
        if (p <= LEAST_P && kvl_test_times_count()) fail_msg("question %d: p is %g", q, p);
    }
    const double own = compare_times(owner, GET_NOW);
    assert_true(own < 1e-6 || !kvl_test_times_count());
    kvloom_close(owner);
    kvloom_close(other);
    sidecar_stage_end(&stage);
}

/* ---- S4 ---- */

/* A container with the id of one text and the tokens of another: what a collision would be. */
static kvl_container *make_collision(const sidecar_stage *stage, uint32_t id_of, uint32_t tokens_of)
{
    const kvl_digest nothing = {{0}};
    const kvloom_shape shape = sidecar_stage_shape();
    const kvloom_key wanted = sidecar_stage_key(id_of, TOKENS);
    const kvloom_key held = sidecar_stage_key(tokens_of, TOKENS);
    const kvl_container_info info = {.kind = KVL_CONTAINER_SEGMENT,
                                     .id =
                                         kvl_segment_id(stage->keys[0], &stage->options.fingerprint,
                                                        &nothing, wanted.tokens, TOKENS),
                                     .fingerprint = stage->options.fingerprint,
                                     .dtype = KVL_KV_F16,
                                     .n_layers = shape.n_layers,
                                     .n_kv_heads = shape.n_kv_heads,
                                     .head_dim = shape.head_dim,
                                     .pairs = shape.rotated_halves,
                                     .n_tokens = TOKENS,
                                     .block_bytes = kvloom_layer_bytes(&shape, TOKENS),
                                     .tokens = held.tokens};
    kvl_container *container = NULL;
    assert_int_equal(kvl_container_create(&info, &container, NULL), KVL_OK);
    kvl_container_seal(container);
    return container;
}

/* S4: were two texts ever to have one id, the one that is there is not taken for the one that is
 * asked for: the tokens are compared. */
static void s4_a_collision_is_no_hit(void **state)
{
    (void)state;
    sidecar_stage stage;
    sidecar_stage_prepare(&stage, "s");
    sidecar_stage_with_disk(&stage, 64 << 20);
    const kvl_lmdb_tier_options options = {
        .path = stage.store[0], .bytes_max = 64 << 20, .fingerprint = stage.options.fingerprint};
    kvl_tier *tier = NULL;
    assert_int_equal(kvl_lmdb_tier_create(&options, &tier, NULL), KVL_OK);
    for (uint32_t i = 0; i < 2; i++) { /* the second is what it says it is */
        kvl_container *container = make_collision(&stage, i, i == 0 ? 5 : i);
        assert_int_equal(tier->ops->put(tier, container, NULL), KVL_OK);
        kvl_container_release(container);
    }
    tier->ops->destroy(tier);
    sidecar_stage_start(&stage);
    kvloom_client *client = sidecar_stage_connect(&stage, 0, NULL);
    kvloom_segment *segment = NULL;
    kvloom_error error;
    kvloom_key key = sidecar_stage_key(1, TOKENS);
    assert_int_equal(kvloom_get(client, &key, 1000, &segment, &error), KVLOOM_OK);
    kvloom_segment_release(segment);
    key = sidecar_stage_key(0, TOKENS);
    for (int i = 0; i < 2; i++) { /* from disk, then from memory */
        assert_int_equal(kvloom_get(client, &key, 1000, &segment, &error), KVLOOM_ERR_DAMAGED);
        assert_null(segment);
        assert_true(KVLOOM_IS_MISS(error.status));
    }
    kvloom_transfer *transfer = NULL;
    assert_int_equal(kvloom_get_start(client, &key, 1000, &transfer, &error), KVLOOM_OK);
    while (kvloom_transfer_status(transfer, NULL, &error) == KVLOOM_IN_PROGRESS) {
        struct pollfd item = {.fd = kvloom_fd(client), .events = POLLIN};
        (void)poll(&item, 1, 1000);
        assert_int_equal(kvloom_dispatch(client, NULL), KVLOOM_OK);
    }
    assert_int_equal(kvloom_transfer_status(transfer, NULL, &error), KVLOOM_ERR_DAMAGED);
    assert_null(kvloom_transfer_segment(transfer));
    kvloom_transfer_end(transfer);
    sidecar_stage_close(&stage, client);
}

/* ---- S16 ---- */

/* What a client is told before it has said who it is; the body is an empty message, all of whose
 * fields are missing. */
static kvl_status ask_without_hello(const sidecar_stage *stage, uint8_t field)
{
    kvl_local_link link;
    int fd = -1;
    assert_int_equal(kvl_local_dial(stage->socket[0], &fd, NULL), KVL_OK);
    kvl_local_link_init(&link, fd);
    kvl_local_chunk *chunk = kvl_local_chunk_create(4);
    const uint8_t bytes[4] = {0x08, 7, (uint8_t)(field << 3 | 2), 0}; /* number 7, then the body */
    memcpy(kvl_local_chunk_bytes(chunk), bytes, sizeof bytes);
    kvl_ignore(kvl_local_link_send(&link, chunk, -1));
    kvl_status status = KVL_IN_PROGRESS;
    while (status == KVL_IN_PROGRESS) {
        const uint8_t *reply = NULL;
        size_t n = 0;
        int got = -1;
        struct pollfd item = {.fd = fd, .events = POLLIN};
        if (kvl_local_link_next(&link, &reply, &n, &got) != KVL_OK) {
            assert_int_equal(poll(&item, 1, 5000), 1);
            assert_true(kvl_local_link_read(&link) >= 0);
            continue;
        }
        Kvloom__Local__V1__Reply *r = kvloom__local__v1__reply__unpack(NULL, n, reply);
        assert_non_null(r);
        assert_int_equal(r->number, 7);
        assert_int_equal(r->body_case, KVLOOM__LOCAL__V1__REPLY__BODY__NOT_SET);
        status = (kvl_status)r->status;
        kvloom__local__v1__reply__free_unpacked(r, NULL);
    }
    kvl_local_link_deinit(&link);
    return status;
}

/* S16: every request but Hello is denied to who has not said Hello, those of later versions too:
 * whoever adds one has to do nothing for it. */
static void s16_nothing_is_answered_before_hello(void **state)
{
    (void)state;
    sidecar_stage stage;
    sidecar_stage_prepare(&stage, "s");
    sidecar_stage_start(&stage);
    for (uint8_t field = 3; field <= 15; field++)
        assert_int_equal(ask_without_hello(&stage, field), KVL_ERR_DENIED);
    sidecar_stage_end(&stage);
}

static int set_up(void **state)
{
    (void)state;
    kvl_log_set_level(KVL_LOG_SILENT);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(s1_time_does_not_tell_what_another_tenant_has, set_up),
        cmocka_unit_test(s4_a_collision_is_no_hit),
        cmocka_unit_test(s16_nothing_is_answered_before_hello),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
