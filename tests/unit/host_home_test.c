/* host: homes of slots, and loading beside the computing. Segments of different homes stand side by
 * side and never mix; a slot that is placed behind exactly its home is what a full prefill gives;
 * primers are sent once. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/file.h"
#include "host.pb-c.h"
#include "host/host.h"
#include "test_random.h"
#include "tiny_gguf.h"

#include <pthread.h>

enum { CALL_S = 60, ANSWER = 4 };

typedef struct fixture {
    char directory[64], model[128], endpoint[128], store[128];
    kvl_host *host;
    pthread_t thread;
    kvl_exchange *client;
} fixture;

static const char primer_one[] =
    "A short document about rivers and locks.\n\nAnother one, about the people who open them.\n\n";
static const char primer_two[] = "Quite another kind of text, about stars and their names.\n\n";
static const char chunk[] =
    "The harbour crane was painted green before the war, and grey after it, "
    "and nobody knows why that was.";

static void *run_host(void *host)
{
    kvl_host_run(host);
    return NULL;
}

static void start_client(fixture *f)
{
    const kvl_exchange_peer peer = {.name = "one", .endpoint = f->endpoint};
    const kvl_exchange_options options = {
        .name = "client", .peers = &peer, .n_peers = 1, .clock = kvl_clock_system()};
    kvl_error error = {0};
    if (kvl_exchange_start(&options, &f->client, &error) != KVL_OK) fail_msg("%s", error.text);
    for (int i = 0; i < 2000 && !kvl_exchange_peer_is_up(f->client, "one"); i++) {
        const struct timespec pause = {0, 5000000};
        (void)nanosleep(&pause, NULL);
    }
    assert_true(kvl_exchange_peer_is_up(f->client, "one"));
}

static int setup(void **state)
{
    static fixture f;
    f = (fixture){.directory = "/tmp/kvloom-home-XXXXXX"};
    assert_non_null(mkdtemp(f.directory));
    (void)snprintf(f.model, sizeof f.model, "%s/model.gguf", f.directory);
    (void)snprintf(f.endpoint, sizeof f.endpoint, "ipc://%s/host.sock", f.directory);
    (void)snprintf(f.store, sizeof f.store, "%s/store", f.directory);
    kvl_tiny_gguf_options tiny = kvl_tiny_gguf_defaults("llama");
    tiny.n_layers = 3;
    tiny.n_context = 1024;
    kvl_tiny_gguf_save(&tiny, f.model);
    kvl_host_options options = kvl_host_default_options();
    options.name = "one";
    options.endpoint = f.endpoint;
    options.store_path = f.store;
    options.store_bytes_max = 64 << 20;
    options.memory_bytes_max = 64 << 20;
    options.segment_dtype = KVL_KV_F32; /* so that what is placed right is exact to rounding */
    options.engine = (kvl_engine_options){.model_path = f.model, .n_threads = 1, .n_pages = 256};
    memset(options.tenant_key, 42, sizeof options.tenant_key);
    kvl_error error = {0};
    if (kvl_host_create(&options, &f.host, &error) != KVL_OK) fail_msg("%s", error.text);
    assert_int_equal(pthread_create(&f.thread, NULL, run_host, f.host), 0);
    start_client(&f);
    *state = &f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    kvl_exchange_stop(f->client);
    kvl_host_stop(f->host);
    pthread_join(f->thread, NULL);
    kvl_host_destroy(f->host);
    kvl_error error = {0};
    assert_int_equal(kvl_directory_remove(f->directory, &error), KVL_OK);
    return 0;
}

static kvl_status call(fixture *f, const Kvloom__V1__HostTask *task, Kvloom__V1__HostReply **reply,
                       kvl_error *error)
{
    const size_t n_bytes = kvloom__v1__host_task__get_packed_size(task);
    uint8_t *body = kvl_alloc(n_bytes);
    assert_non_null(body);
    (void)kvloom__v1__host_task__pack(task, body);
    void *answer = NULL;
    size_t n_answer = 0;
    const int64_t deadline = kvl_clock_now(kvl_clock_system()) + CALL_S * KVL_NS_PER_S;
    const kvl_status status =
        kvl_exchange_call(f->client, "one", body, n_bytes, deadline, &answer, &n_answer, error);
    kvl_free(body);
    if (status != KVL_OK) return status;
    *reply = kvloom__v1__host_reply__unpack(NULL, n_answer, answer);
    kvl_free(answer);
    assert_non_null(*reply);
    return KVL_OK;
}

/* "BEFORE chunk the end", the chunk in a slot. */
typedef struct asked {
    const char *before, *home, *primer;
    ProtobufCBinaryData primer_home;
    Kvloom__V1__Mode mode;
    const char *slot_text; /* NULL: the chunk above */
    const char *select;    /* NULL: nothing is computed again */
    bool load_first;
} asked;

static void text_part(Kvloom__V1__PromptPart *part, const char *slot, const char *text)
{
    kvloom__v1__prompt_part__init(part);
    part->slot = (char *)(uintptr_t)slot;
    part->text = (ProtobufCBinaryData){strlen(text), (uint8_t *)(uintptr_t)text};
}

static kvl_status run(fixture *f, const asked *what, Kvloom__V1__HostReply **reply,
                      kvl_error *error)
{
    Kvloom__V1__PromptPart parts[4];
    Kvloom__V1__PromptPart *pointers[4];
    Kvloom__V1__RunTask task = KVLOOM__V1__RUN_TASK__INIT;
    if (what->before != NULL) {
        text_part(&parts[task.n_parts++], "", "<|im_start|>user\n");
        text_part(&parts[task.n_parts++], "", what->before);
    }
    text_part(&parts[task.n_parts++], "chunk", what->slot_text == NULL ? chunk : what->slot_text);
    if (what->mode != KVLOOM__V1__MODE__MODE_READ) text_part(&parts[task.n_parts++], "", "the end");
    for (size_t p = 0; p < task.n_parts; p++) pointers[p] = &parts[p];
    task.parts = pointers;
    task.mode = what->mode;
    task.select = (char *)(uintptr_t)(what->select == NULL ? "none" : what->select);
    task.load_first = what->load_first;
    task.home = (char *)(uintptr_t)(what->home == NULL ? "" : what->home);
    if (what->primer != NULL)
        task.primer =
            (ProtobufCBinaryData){strlen(what->primer), (uint8_t *)(uintptr_t)what->primer};
    task.primer_home = what->primer_home;
    task.max_tokens = ANSWER;
    task.evaluate = what->mode == KVLOOM__V1__MODE__MODE_REUSE;
    Kvloom__V1__HostTask message = KVLOOM__V1__HOST_TASK__INIT;
    message.what_case = KVLOOM__V1__HOST_TASK__WHAT_RUN;
    message.run = &task;
    return call(f, &message, reply, error);
}

static Kvloom__V1__HostReply *run_well(fixture *f, const asked *what)
{
    Kvloom__V1__HostReply *reply = NULL;
    kvl_error error = {0};
    if (run(f, what, &reply, &error) != KVL_OK) fail_msg("%s", error.text);
    assert_int_equal(reply->what_case, KVLOOM__V1__HOST_REPLY__WHAT_RUN);
    assert_int_equal(reply->run->slots_home.len, KVL_DIGEST_BYTES);
    return reply;
}

static void end(Kvloom__V1__HostReply *reply)
{
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
}

static uint64_t n_stored(fixture *f)
{
    Kvloom__V1__HostTask message = KVLOOM__V1__HOST_TASK__INIT;
    message.what_case = KVLOOM__V1__HOST_TASK__WHAT_STATUS;
    message.status = true;
    Kvloom__V1__HostReply *reply = NULL;
    kvl_error error = {0};
    assert_int_equal(call(f, &message, &reply, &error), KVL_OK);
    const uint64_t n = reply->status->store_containers;
    end(reply);
    return n;
}

static const asked homes[] = {
    {.home = NULL},
    {.home = "nothing"},
    {.home = "primer", .primer = primer_one},
    {.home = "primer", .primer = primer_two},
};
enum { N_HOMES = sizeof homes / sizeof *homes };

static void test_homes_stand_side_by_side(void **state)
{
    fixture *f = *state;
    uint8_t ids[N_HOMES][KVL_DIGEST_BYTES];
    for (int round = 0; round < 2; round++) {
        for (size_t h = 0; h < N_HOMES; h++) {
            asked what = homes[h];
            what.mode = KVLOOM__V1__MODE__MODE_READ;
            Kvloom__V1__HostReply *reply = run_well(f, &what);
            assert_int_equal(reply->run->read, round == 0 ? 1 : 0);
            assert_int_equal(reply->run->n_tokens, 0);
            if (round == 0) memcpy(ids[h], reply->run->slots_home.data, KVL_DIGEST_BYTES);
            assert_memory_equal(ids[h], reply->run->slots_home.data, KVL_DIGEST_BYTES);
            assert_int_equal(n_stored(f), round == 0 ? h + 1 : N_HOMES);
            end(reply);
        }
    }
    for (size_t a = 0; a < N_HOMES; a++) {
        for (size_t b = 0; b < a; b++) assert_memory_not_equal(ids[a], ids[b], KVL_DIGEST_BYTES);
    }
}

/* The same header and primer before the chunk as in its home: placing it is a full prefill. Behind
 * anything else it is not, or nothing is tested. */
static double kl_behind(fixture *f, const char *before, const asked *home)
{
    asked what = *home;
    what.before = before;
    what.mode = KVLOOM__V1__MODE__MODE_READ;
    end(run_well(f, &what));
    what.mode = KVLOOM__V1__MODE__MODE_FULL;
    end(run_well(f, &what));
    what.mode = KVLOOM__V1__MODE__MODE_REUSE;
    Kvloom__V1__HostReply *reply = run_well(f, &what);
    assert_false(reply->run->exact);
    assert_int_equal(reply->run->parts[2]->blended, reply->run->parts[2]->n_tokens);
    const double kl = reply->run->evaluation->kl;
    end(reply);
    return kl;
}

static void test_a_slot_behind_its_own_home_is_exact(void **state)
{
    fixture *f = *state;
    const double same = kl_behind(f, primer_one, &homes[2]);
    const double other = kl_behind(f, primer_one, &homes[3]);
    const double nothing = kl_behind(f, primer_one, &homes[1]);
    /* Keys were rotated there and back: rounding, as in the other tests of exactness. */
    assert_true(same < 1e-7);
    assert_true(other > 1e-6 && other > 100 * same);
    assert_true(nothing > 1e-6 && nothing > 100 * same);
}

/* Whatever is computed again: an answer does not depend on whether the placed KV was all there
 * before the first layer or came in layer by layer, and no layer is computed before it is loaded.
 */
static void test_loading_beside_computing_changes_nothing(void **state)
{
    fixture *f = *state;
    static const char *const policies[] = {"none", "sink8", "sink8+query10", "deviation15", "all"};
    asked what = {.home = "nothing", .before = "An opening of some length before the chunk."};
    what.mode = KVLOOM__V1__MODE__MODE_READ;
    end(run_well(f, &what));
    what.mode = KVLOOM__V1__MODE__MODE_FULL;
    end(run_well(f, &what));
    what.mode = KVLOOM__V1__MODE__MODE_REUSE;
    for (int round = 0; round < 6; round++) {
        for (size_t p = 0; p < sizeof policies / sizeof *policies; p++) {
            what.select = policies[p];
            what.load_first = true;
            Kvloom__V1__HostReply *apart = run_well(f, &what);
            what.load_first = false;
            Kvloom__V1__HostReply *beside = run_well(f, &what);
            assert_int_equal(apart->run->recomputed, beside->run->recomputed);
            assert_int_equal(apart->run->n_tokens, beside->run->n_tokens);
            assert_memory_equal(apart->run->tokens, beside->run->tokens,
                                beside->run->n_tokens * sizeof(uint32_t));
            assert_true(apart->run->evaluation->kl == beside->run->evaluation->kl);
            assert_true((strcmp(policies[p], "all") == 0) == (beside->run->evaluation->kl == 0.0));
            assert_int_equal(beside->run->n_layer_loaded_ms, 3);
            for (size_t l = 0; l < 3; l++) {
                const double loaded = beside->run->layer_loaded_ms[l];
                assert_true(loaded > (l == 0 ? 0.0 : beside->run->layer_loaded_ms[l - 1]));
                assert_true(beside->run->layer_computed_ms[l] > loaded);
                assert_true(apart->run->layer_computed_ms[l] == 0.0);
            }
            end(apart);
            end(beside);
        }
    }
}

/* What was computed among others' KV is never published as the text's own (HijackKV): a blended
 * run leaves one segment more, its answer's, whose home is that prompt; the chunk's is as it was.
 */
static void test_fused_kv_stays_private(void **state)
{
    fixture *f = *state;
    asked what = {.home = "nothing", .mode = KVLOOM__V1__MODE__MODE_READ};
    Kvloom__V1__HostReply *read = run_well(f, &what);
    assert_int_equal(read->run->parts[0]->segment.len, KVL_DIGEST_BYTES);
    assert_int_equal(n_stored(f), 1);
    what.before = "A text before the chunk, which changes what its tokens mean.";
    what.mode = KVLOOM__V1__MODE__MODE_FULL;
    end(run_well(f, &what));
    what.mode = KVLOOM__V1__MODE__MODE_REUSE;
    what.select = "sink16";
    double kl[2];
    for (int i = 0; i < 2; i++) {
        Kvloom__V1__HostReply *reply = run_well(f, &what);
        assert_true(reply->run->recomputed == 16);
        assert_memory_equal(reply->run->parts[2]->segment.data, read->run->parts[0]->segment.data,
                            KVL_DIGEST_BYTES);
        assert_memory_not_equal(reply->run->home.data, reply->run->slots_home.data,
                                KVL_DIGEST_BYTES);
        kl[i] = reply->run->evaluation->kl;
        end(reply);
        assert_int_equal(n_stored(f), 2);
    }
    assert_true(kl[0] > 0.0 && kl[0] == kl[1]);
    end(read);
}

/* Chunks that are gone: their segments go, and are computed again when somebody asks. */
static void test_what_is_forgotten_is_computed_again(void **state)
{
    fixture *f = *state;
    asked what = {.home = "nothing", .mode = KVLOOM__V1__MODE__MODE_READ};
    Kvloom__V1__HostReply *read = run_well(f, &what);
    ProtobufCBinaryData ids[2] = {read->run->parts[0]->segment, read->run->slots_home};
    Kvloom__V1__ForgetTask forget = KVLOOM__V1__FORGET_TASK__INIT;
    forget.n_ids = 2;
    forget.ids = ids;
    Kvloom__V1__HostTask message = KVLOOM__V1__HOST_TASK__INIT;
    message.what_case = KVLOOM__V1__HOST_TASK__WHAT_FORGET;
    message.forget = &forget;
    Kvloom__V1__HostReply *reply = NULL;
    kvl_error error = {0};
    assert_int_equal(call(f, &message, &reply, &error), KVL_OK);
    assert_int_equal(reply->forgotten, 1); /* the other was never there */
    end(reply);
    assert_int_equal(n_stored(f), 0);
    ids[1].len = 7;
    assert_int_equal(call(f, &message, &reply, &error), KVL_ERR_INVALID);
    Kvloom__V1__HostReply *again = run_well(f, &what);
    assert_int_equal(again->run->read, 1);
    end(again);
    end(read);
}

static void test_a_primer_is_sent_once(void **state)
{
    fixture *f = *state;
    asked what = homes[2];
    what.mode = KVLOOM__V1__MODE__MODE_READ;
    Kvloom__V1__HostReply *first = run_well(f, &what);
    asked by_id = {.home = "primer",
                   .primer_home = first->run->slots_home,
                   .mode = KVLOOM__V1__MODE__MODE_READ};
    Kvloom__V1__HostReply *again = run_well(f, &by_id);
    assert_int_equal(again->run->read, 0);
    assert_memory_equal(first->run->slots_home.data, again->run->slots_home.data, KVL_DIGEST_BYTES);
    end(again);
    /* The host remembers a few; whoever is forgotten is told to send the text. */
    for (int i = 0; i < 8; i++) {
        char text[64];
        (void)snprintf(text, sizeof text, "Primer number %d of many others.", i);
        asked other = {.home = "primer", .primer = text, .mode = KVLOOM__V1__MODE__MODE_READ};
        end(run_well(f, &other));
    }
    Kvloom__V1__HostReply *reply = NULL;
    kvl_error error = {0};
    assert_int_equal(run(f, &by_id, &reply, &error), KVL_ERR_NOT_FOUND);
    assert_non_null(strstr(error.text, "send the primer's text"));
    /* Its segments are there still. */
    Kvloom__V1__HostReply *back = run_well(f, &what);
    assert_int_equal(back->run->read, 0);
    end(back);
    end(first);
}

static void test_bad_homes_are_refused(void **state)
{
    fixture *f = *state;
    static char long_text[8192];
    memset(long_text, 'x', sizeof long_text - 1);
    for (size_t i = 0; i + 1 < sizeof long_text; i += 2) long_text[i] = ' ';
    uint8_t seven[7] = {0};
    const asked bad[] = {
        {.home = "attic"},
        {.home = "primer"},
        {.home = "header", .primer = primer_one},
        {.primer = primer_one},
        {.home = "primer", .primer = long_text},
        {.home = "primer", .primer_home = {sizeof seven, seven}},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        asked what = bad[i];
        what.mode = KVLOOM__V1__MODE__MODE_READ;
        Kvloom__V1__HostReply *reply = NULL;
        kvl_error error = {0};
        const kvl_status status = run(f, &what, &reply, &error);
        assert_int_equal(status, i == 4 ? KVL_ERR_TOO_LARGE : KVL_ERR_INVALID);
        assert_true(strlen(error.text) > 20);
    }
    assert_int_equal(n_stored(f), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_homes_stand_side_by_side, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_slot_behind_its_own_home_is_exact, setup, teardown),
        cmocka_unit_test_setup_teardown(test_loading_beside_computing_changes_nothing, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_fused_kv_stays_private, setup, teardown),
        cmocka_unit_test_setup_teardown(test_what_is_forgotten_is_computed_again, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_primer_is_sent_once, setup, teardown),
        cmocka_unit_test_setup_teardown(test_bad_homes_are_refused, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
