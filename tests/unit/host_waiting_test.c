/* host: tasks that wait for the engine: a run whose texts are known goes before one that came
 * earlier and has to compute everything, unless the order of arrival was asked for; what is not a
 * plain run stays where it came. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "host_run_case.h"

/* The case has a function of this name, the room a type. */
#define run room_run
#include "host/host_parts.h"
#undef run

enum { WAITERS = 3 };

typedef struct waiter {
    fixture *f;
    const char *question; /* NULL: asks for the status */
    uint64_t place;       /* of the runs that the host did: their numbers ascend */
    uint32_t n_blended;
    pthread_t thread;
} waiter;

static void *wait_for_reply(void *context)
{
    waiter *w = context;
    Kvloom__V1__HostReply *reply = NULL;
    if (w->question == NULL) {
        Kvloom__V1__HostTask task = KVLOOM__V1__HOST_TASK__INIT;
        task.what_case = KVLOOM__V1__HOST_TASK__WHAT_STATUS;
        task.status = true;
        kvl_error error = {0};
        if (call(w->f, 0, &task, &reply, &error) != KVL_OK) abort();
    } else {
        const asked what = {.question = w->question,
                            .mode = KVLOOM__V1__MODE__MODE_REUSE,
                            .select = "none",
                            .is_plain = true};
        reply = run(w->f, 0, &what);
        w->n_blended = count_blended(reply);
        w->place = reply->run->request_id;
    }
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
    return NULL;
}

/* Has the host read the first question; then the others come while its engine does nothing. */
static void ask_all(fixture *f, const char *const *asked_texts, waiter *waiters)
{
    f->audit_share = 0.0;
    const asked known = {.question = questions[0],
                         .mode = KVLOOM__V1__MODE__MODE_REUSE,
                         .select = "none",
                         .is_plain = true};
    kvloom__v1__host_reply__free_unpacked(run(f, 0, &known), NULL);
    stop_host(f, 0);
    wait_until(f, 0, false);
    create_host(f, 0);
    wait_until(f, 0, true);
    for (int i = 0; i < WAITERS; i++) {
        waiters[i] = (waiter){.f = f, .question = asked_texts[i]};
        assert_int_equal(pthread_create(&waiters[i].thread, NULL, wait_for_reply, &waiters[i]), 0);
        const struct timespec pause = {0, 60 * KVL_NS_PER_MS};
        (void)nanosleep(&pause, NULL);
    }
    assert_int_equal(pthread_create(&f->threads[0], NULL, run_host, f->hosts[0]), 0);
    for (int i = 0; i < WAITERS; i++) (void)pthread_join(waiters[i].thread, NULL);
}

static void test_those_that_save_go_first(void **state)
{
    fixture *f = *state;
    waiter waiters[WAITERS];
    const char *const texts[] = {questions[1], questions[2], questions[0]};
    ask_all(f, texts, waiters);
    assert_int_equal(waiters[2].place, 1);
    assert_true(waiters[2].n_blended > 0);
    assert_int_equal(waiters[0].place, 2); /* equal gains: as they came */
    assert_int_equal(waiters[1].place, 3);
}

static void test_in_order_nobody_is_moved(void **state)
{
    fixture *f = *state;
    waiter waiters[WAITERS];
    const char *const texts[] = {questions[1], questions[2], questions[0]};
    f->in_order = true;
    ask_all(f, texts, waiters);
    for (int i = 0; i < WAITERS; i++) assert_int_equal(waiters[i].place, i + 1);
}

static void test_other_tasks_stay_where_they_came(void **state)
{
    fixture *f = *state;
    waiter waiters[WAITERS];
    const char *const texts[] = {questions[1], NULL, questions[0]};
    ask_all(f, texts, waiters);
    assert_int_equal(waiters[0].place, 1);
    assert_int_equal(waiters[2].place, 2);
}

/* ---- loading, by the rates that were measured ---- */

static const char PLACED[] = "placed, and its most attended tokens computed again";

/* What host two did for a text that its peer has read, once it has heard of that: the first
 * tellings may be lost while the two meet.
 * select   empty: as fast quality has it, which is sink8 */
static Kvloom__V1__HostReply *read_second(fixture *f, int first_number, const char *reason,
                                          const char *select)
{
    for (int i = 0; i < 50; i++) {
        char question[96];
        number_question(question, sizeof question, first_number + i);
        const asked what = {.question = question,
                            .mode = KVLOOM__V1__MODE__MODE_REUSE,
                            .quality = KVLOOM__V1__QUALITY__QUALITY_FAST,
                            .select = select,
                            .is_plain = true};
        kvloom__v1__host_reply__free_unpacked(run(f, 0, &what), NULL);
        const struct timespec pause = {0, 50 * KVL_NS_PER_MS};
        (void)nanosleep(&pause, NULL);
        Kvloom__V1__HostReply *reply = run(f, 1, &what);
        if (strcmp(reply->run->parts[1]->reason, reason) == 0) return reply;
        kvloom__v1__host_reply__free_unpacked(reply, NULL);
    }
    fail_msg("never: %s", reason);
    return NULL;
}

/* A host that computes faster than anything could be loaded neither fetches nor places a text that
 * its peer has; one that does not, does. */
static void test_what_is_faster_to_compute_is_not_loaded(void **state)
{
    fixture *f = *state;
    static const char *const reasons[] = {PLACED, "cheaper to compute than to load"};
    for (int is_fast = 0; is_fast < 2; is_fast++) {
        stop_host(f, 1);
        wait_until(f, 1, false);
        create_host(f, 1);
        wait_until(f, 1, true);
        if (is_fast) {
            f->hosts[1]->rates.prefill_ms_per_token = 1e-6;
            f->hosts[1]->rates.prefill_ms_per_square_token = 0.0;
        }
        assert_int_equal(pthread_create(&f->threads[1], NULL, run_host, f->hosts[1]), 0);
        Kvloom__V1__HostReply *reply = read_second(f, 100 * is_fast, reasons[is_fast], "sink8");
        const Kvloom__V1__PartReport *slot = reply->run->parts[1];
        assert_string_equal(slot->slot, "question");
        assert_int_equal(slot->blended > 0, !is_fast);
        assert_int_equal(slot->fetched_bytes > 0, !is_fast);
        assert_int_equal(slot->shared + slot->computed == slot->n_tokens, is_fast);
        kvloom__v1__host_reply__free_unpacked(reply, NULL);
    }
}

/* Where loading is slow, but not as slow as computing, more is computed again beside it. */
static void test_more_is_computed_again_where_loading_is_slow(void **state)
{
    fixture *f = *state;
    uint32_t n_recomputed[2] = {0, 0};
    for (int is_slow = 0; is_slow < 2; is_slow++) {
        stop_host(f, 1);
        wait_until(f, 1, false);
        create_host(f, 1);
        wait_until(f, 1, true);
        f->hosts[1]->rates.prefill_ms_per_token = 10.0;
        f->hosts[1]->rates.place_tokens_per_ms = is_slow ? 0.2 : 1e6;
        assert_int_equal(pthread_create(&f->threads[1], NULL, run_host, f->hosts[1]), 0);
        Kvloom__V1__HostReply *reply = read_second(f, 100 * is_slow, PLACED, "");
        assert_true(reply->run->parts[1]->blended > 32);
        n_recomputed[is_slow] = reply->run->recomputed;
        kvloom__v1__host_reply__free_unpacked(reply, NULL);
    }
    assert_int_equal(n_recomputed[0], 8);
    assert_true(n_recomputed[1] > 16);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_those_that_save_go_first, setup, teardown),
        cmocka_unit_test_setup_teardown(test_in_order_nobody_is_moved, setup, teardown),
        cmocka_unit_test_setup_teardown(test_what_is_faster_to_compute_is_not_loaded, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_more_is_computed_again_where_loading_is_slow, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_other_tasks_stay_where_they_came, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
