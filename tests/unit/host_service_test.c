/* host/service: streams from many threads: each gets its own answer, whole and once; those that are
 * closed early, refused, or under way when the service stops leave nothing behind. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/queue.h"
#include "host/service.h"
#include "test_random.h"
#include "tiny_engine.h"

#include <pthread.h>
#include <stdatomic.h>

enum { N_PAGES = 40, CLIENTS = 6, ROUNDS = 12, ANSWER = 12, PROMPT = 40, PATIENCE_MS = 60000 };

typedef struct fixture {
    kvl_engine *engine;
    kvl_service *service;
    pthread_t thread;
} fixture;

static void *run_service(void *service)
{
    kvl_service_run(service);
    return NULL;
}

static int setup(void **state)
{
    static fixture f;
    const kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("llama");
    f.engine = tiny_engine_open(&options, 1, N_PAGES);
    const kvl_scheduler_options scheduler = {.n_running_max = 4, .n_waiting_max = 64};
    kvl_error error = {0};
    if (kvl_service_create(f.engine, &scheduler, &f.service, &error) != KVL_OK)
        fail_msg("%s", error.text);
    assert_int_equal(pthread_create(&f.thread, NULL, run_service, f.service), 0);
    *state = &f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    kvl_service_stop(f->service);
    assert_int_equal(pthread_join(f->thread, NULL), 0);
    kvl_service_state seen;
    kvl_service_state_read(f->service, &seen);
    assert_false(seen.is_running);
    assert_int_equal(seen.n_streams, 0);
    kvl_service_destroy(f->service);
    assert_int_equal(
        kvl_page_pool_n_free(f->engine->pool) + kvl_prefix_tree_n_pages(f->engine->tree), N_PAGES);
    kvl_engine_destroy(f->engine);
    return 0;
}

static kvl_generation generation_of(const uint32_t *ids, uint32_t n_ids)
{
    return (kvl_generation){.ids = ids,
                            .n_ids = n_ids,
                            .max_tokens = ANSWER,
                            .n_branches = 1,
                            .sampling = kvl_sampling_default(),
                            .ignore_end = true};
}

/* Reads to the end; false where it was cancelled or failed. */
static bool read_answer(kvl_stream *stream, uint32_t *tokens)
{
    uint32_t n = 0;
    bool is_good = true;
    kvl_stream_item *item = NULL;
    while (kvl_stream_next(stream, PATIENCE_MS, &item)) {
        if (item == NULL) return false;
        if (item->has_token && n < ANSWER) tokens[n++] = item->drawn.token;
        is_good =
            is_good && item->finish != KVL_FINISH_CANCELLED && item->finish != KVL_FINISH_FAILED;
        kvl_stream_item_destroy(item);
    }
    return is_good && n == ANSWER;
}

typedef struct client {
    fixture *f;
    uint32_t number;
    _Atomic uint32_t n_right, n_wrong, n_left;
} client;

/* The same prompt must give the same answer every time; in between, prompts that are left alone. */
static void *be_client(void *argument)
{
    client *own = argument;
    uint32_t ids[PROMPT];
    uint32_t first[ANSWER] = {0};
    uint32_t tokens[ANSWER] = {0};
    for (uint32_t i = 0; i < PROMPT; i++) ids[i] = i < 20 ? i : (i * own->number) % 256;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        const kvl_generation wanted = generation_of(ids, PROMPT);
        kvl_stream *stream = NULL;
        kvl_error error = {0};
        if (kvl_service_start(own->f->service, &wanted, &stream, &error) != KVL_OK) {
            own->n_wrong++;
            continue;
        }
        if (round % 3 == 2) {
            kvl_stream_item *item = NULL;
            (void)kvl_stream_next(stream, round, &item);
            kvl_stream_item_destroy(item);
            own->n_left++;
        } else if (read_answer(stream, round == 0 ? first : tokens) &&
                   (round == 0 || memcmp(first, tokens, sizeof first) == 0)) {
            own->n_right++;
        } else {
            own->n_wrong++;
        }
        kvl_stream_close(stream);
    }
    return NULL;
}

static void test_each_client_gets_its_own_answers(void **state)
{
    fixture *f = *state;
    static client clients[CLIENTS];
    pthread_t threads[CLIENTS];
    for (uint32_t i = 0; i < CLIENTS; i++) {
        clients[i].f = f;
        clients[i].number = i + 3;
        assert_int_equal(pthread_create(&threads[i], NULL, be_client, &clients[i]), 0);
    }
    for (uint32_t i = 0; i < CLIENTS; i++) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
        assert_int_equal(clients[i].n_wrong, 0);
        assert_int_equal(clients[i].n_right, ROUNDS - clients[i].n_left);
        assert_true(clients[i].n_left > 0);
    }
}

static void test_a_refusal_comes_as_an_item(void **state)
{
    fixture *f = *state;
    const uint32_t ids[] = {1, 2, 3};
    kvl_generation wanted = generation_of(ids, 3);
    wanted.max_tokens = 100000;
    kvl_stream *stream = NULL;
    kvl_error error = {0};
    assert_int_equal(kvl_service_start(f->service, &wanted, &stream, &error), KVL_OK);
    kvl_stream_item *item = NULL;
    assert_true(kvl_stream_next(stream, PATIENCE_MS, &item));
    assert_non_null(item);
    assert_int_equal(item->finish, KVL_FINISH_FAILED);
    assert_int_equal(item->status, KVL_ERR_OUT_OF_RANGE);
    assert_non_null(strstr(item->error_text, "context"));
    assert_true(item->is_last);
    kvl_stream_item_destroy(item);
    assert_false(kvl_stream_next(stream, 0, &item));
    assert_null(item);
    kvl_stream_close(stream);
}

/* Streams that are open when the service stops end as cancelled; later ones are not begun. */
static void test_stopping_cancels_what_is_under_way(void **state)
{
    fixture *f = *state;
    uint32_t ids[PROMPT];
    kvl_stream *streams[CLIENTS];
    kvl_error error = {0};
    for (uint32_t i = 0; i < PROMPT; i++) ids[i] = i;
    for (uint32_t i = 0; i < CLIENTS; i++) {
        kvl_generation wanted = generation_of(ids, PROMPT);
        wanted.max_tokens = 200;
        wanted.n_branches = 3;
        assert_int_equal(kvl_service_start(f->service, &wanted, &streams[i], &error), KVL_OK);
    }
    kvl_service_stop(f->service);
    const kvl_generation late = generation_of(ids, PROMPT);
    kvl_stream *none = NULL;
    assert_int_equal(kvl_service_start(f->service, &late, &none, &error), KVL_ERR_CANCELLED);
    assert_null(none);
    for (uint32_t i = 0; i < CLIENTS; i++) {
        uint32_t tokens[ANSWER];
        (void)read_answer(streams[i], tokens);
        kvl_stream_item *item = NULL;
        assert_false(kvl_stream_next(streams[i], 0, &item));
        kvl_stream_close(streams[i]);
    }
}

static _Atomic int n_called;

/* Wants to be called twice more, and is, as nothing else is to be done. */
static bool count_call(void *context, bool is_idle)
{
    (void)context;
    assert_true(is_idle);
    n_called++;
    return n_called < 3;
}

static void test_attached_work_is_done_when_woken(void **state)
{
    (void)state;
    fixture f;
    const kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("llama");
    f.engine = tiny_engine_open(&options, 1, N_PAGES);
    const kvl_scheduler_options scheduler = {0};
    kvl_error error = {0};
    assert_int_equal(kvl_service_create(f.engine, &scheduler, &f.service, &error), KVL_OK);
    kvl_service_attach(f.service, count_call, NULL);
    kvl_service_wake(f.service);
    assert_int_equal(n_called, 0);
    assert_int_equal(pthread_create(&f.thread, NULL, run_service, f.service), 0);
    while (n_called < 3) (void)usleep(1000);
    kvl_service_stop(f.service);
    (void)pthread_join(f.thread, NULL);
    kvl_service_destroy(f.service);
    kvl_engine_destroy(f.engine);
}

static void test_a_queue_gives_what_it_has_without_waiting(void **state)
{
    (void)state;
    kvl_queue *queue = NULL;
    int item = 0;
    assert_int_equal(kvl_queue_create(2, &queue), KVL_OK);
    assert_null(kvl_queue_try_pop(queue));
    assert_int_equal(kvl_queue_push(queue, &item), KVL_OK);
    assert_ptr_equal(kvl_queue_try_pop(queue), &item);
    assert_null(kvl_queue_try_pop(queue));
    kvl_queue_close(queue);
    assert_null(kvl_queue_try_pop(queue));
    kvl_queue_destroy(queue);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_each_client_gets_its_own_answers, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_refusal_comes_as_an_item, setup, teardown),
        cmocka_unit_test_setup_teardown(test_stopping_cancels_what_is_under_way, setup, teardown),
        cmocka_unit_test(test_attached_work_is_done_when_woken),
        cmocka_unit_test(test_a_queue_gives_what_it_has_without_waiting),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
