/* host: how a request was had can be asked for later, by its number: text, parts, and what was
 * computed again; of the last requests only. */
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

enum { KEPT = 64 };

static kvl_status find(fixture *f, uint64_t request, Kvloom__V1__HostReply **reply)
{
    Kvloom__V1__PlanTask plan = KVLOOM__V1__PLAN_TASK__INIT;
    Kvloom__V1__HostTask task = KVLOOM__V1__HOST_TASK__INIT;
    plan.request_id = request;
    task.what_case = KVLOOM__V1__HOST_TASK__WHAT_PLAN;
    task.plan = &plan;
    kvl_error error = {0};
    return call(f, 1, &task, reply, &error);
}

static void test_a_request_is_explained_by_its_number(void **state)
{
    fixture *f = *state;
    asked what = {.question = questions[0],
                  .mode = KVLOOM__V1__MODE__MODE_REUSE,
                  .select = "sink8",
                  .is_plain = true};
    Kvloom__V1__HostReply *first = run(f, 0, &what);
    what.answer = first->run;
    Kvloom__V1__HostReply *ran = run(f, 1, &what);
    assert_true(ran->run->request_id > 0);
    Kvloom__V1__HostReply *reply = NULL;
    assert_int_equal(find(f, ran->run->request_id, &reply), KVL_OK);
    const Kvloom__V1__PlanReply *plan = reply->plan;
    assert_int_equal(plan->plan->request_id, ran->run->request_id);
    assert_int_equal(plan->plan->n_parts, ran->run->n_parts);
    assert_int_equal(plan->n_texts, ran->run->n_parts);
    assert_true(plan->plan->ttft_ms == ran->run->ttft_ms);
    assert_int_equal(plan->texts[1].len, strlen(questions[0]));
    assert_memory_equal(plan->texts[1].data, questions[0], plan->texts[1].len);
    assert_int_equal(plan->n_recomputed, ran->run->recomputed);
    assert_true(plan->n_recomputed > 0);
    uint32_t first_of_part = 0, n_seen = 0;
    for (size_t p = 0; p < plan->plan->n_parts; p++) {
        const Kvloom__V1__PartReport *part = plan->plan->parts[p];
        size_t n_bytes = 0;
        for (size_t t = 0; t < part->n_token_bytes; t++) n_bytes += part->token_bytes[t];
        assert_int_equal(n_bytes, plan->texts[p].len);
        for (size_t i = 0; i < plan->n_recomputed; i++) {
            const uint32_t at = plan->recomputed[i];
            if (at < first_of_part || at >= first_of_part + part->n_tokens) continue;
            assert_true(at >= first_of_part + part->shared);
            assert_true(at < first_of_part + part->shared + part->blended);
            n_seen++;
        }
        first_of_part += part->n_tokens;
    }
    assert_int_equal(n_seen, plan->n_recomputed);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
    kvloom__v1__host_reply__free_unpacked(ran, NULL);
    kvloom__v1__host_reply__free_unpacked(first, NULL);
}

static void test_only_the_last_ones_are_kept(void **state)
{
    fixture *f = *state;
    const asked what = {
        .question = questions[0], .mode = KVLOOM__V1__MODE__MODE_PLAN, .select = "none"};
    uint64_t numbers[KEPT + 5];
    for (int i = 0; i < KEPT + 5; i++) {
        Kvloom__V1__HostReply *reply = run(f, 1, &what);
        numbers[i] = reply->run->request_id;
        if (i > 0) assert_int_equal(numbers[i], numbers[i - 1] + 1);
        kvloom__v1__host_reply__free_unpacked(reply, NULL);
    }
    for (int i = 0; i < KEPT + 5; i++) {
        Kvloom__V1__HostReply *reply = NULL;
        assert_int_equal(find(f, numbers[i], &reply), i < 5 ? KVL_ERR_NOT_FOUND : KVL_OK);
        if (reply != NULL) kvloom__v1__host_reply__free_unpacked(reply, NULL);
    }
    Kvloom__V1__HostReply *reply = NULL;
    assert_int_equal(find(f, 0, &reply), KVL_ERR_NOT_FOUND);
    assert_int_equal(find(f, numbers[KEPT + 4] + 1, &reply), KVL_ERR_NOT_FOUND);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_a_request_is_explained_by_its_number, setup, teardown),
        cmocka_unit_test_setup_teardown(test_only_the_last_ones_are_kept, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
