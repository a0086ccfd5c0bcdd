/* host: two hosts and a client, over real sockets, with a tiny random model: what is computed is
 * measured, then reused; what is exact is exact; what a peer has is fetched; what is lost is
 * computed. The hosts run in threads of this process, each with its own store. */
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

/* Runs in full, then with reuse, and returns the reply of the second. */
static Kvloom__V1__HostReply *run_both(fixture *f, int h, const char *question,
                                       const Kvloom__V1__RunReply *answer,
                                       Kvloom__V1__Quality quality)
{
    asked what = {question, answer, KVLOOM__V1__MODE__MODE_FULL, quality, NULL, 0, false, 0.0};
    Kvloom__V1__HostReply *full = run(f, h, &what);
    what.mode = KVLOOM__V1__MODE__MODE_REUSE;
    Kvloom__V1__HostReply *reuse = run(f, h, &what);
    assert_int_equal(full->run->prompt_tokens, reuse->run->prompt_tokens);
    uint32_t n = 0;
    for (size_t p = 0; p < reuse->run->n_parts; p++) {
        const Kvloom__V1__PartReport *part = reuse->run->parts[p];
        assert_int_equal(part->shared + part->placed + part->offset + part->computed,
                         part->n_tokens);
        n += part->n_tokens;
    }
    assert_int_equal(n, reuse->run->prompt_tokens);
    if (reuse->run->exact) {
        assert_int_equal(reuse->run->wrong_tokens, 0);
        assert_int_equal(full->run->n_tokens, reuse->run->n_tokens);
        assert_true(reuse->run->evaluation->kl < 1e-6);
    }
    kvloom__v1__host_reply__free_unpacked(full, NULL);
    return reuse;
}

static uint32_t count(const Kvloom__V1__HostReply *reply, const char *slot, char what)
{
    for (size_t p = 0; p < reply->run->n_parts; p++) {
        const Kvloom__V1__PartReport *part = reply->run->parts[p];
        if (strcmp(part->slot, slot) != 0) continue;
        return what == 'o' ? part->offset : what == 'p' ? part->placed : part->computed;
    }
    return UINT32_MAX;
}

/* One round of the pipeline: host one answers, host two reads its answer. */
static Kvloom__V1__HostReply *round_of(fixture *f, const char *question,
                                       Kvloom__V1__Quality quality)
{
    Kvloom__V1__HostReply *first = run_both(f, 0, question, NULL, quality);
    /* Whoever reads a text first computes it where it stands, even where anchors are known. */
    assert_true(first->run->exact);
    Kvloom__V1__HostReply *second = run_both(f, 1, question, first->run, quality);
    kvloom__v1__host_reply__free_unpacked(first, NULL);
    return second;
}

static void test_anchors_are_measured_then_used(void **state)
{
    fixture *f = *state;
    for (int r = 0; r < 2; r++) {
        Kvloom__V1__HostReply *reply =
            round_of(f, questions[r], KVLOOM__V1__QUALITY__QUALITY_BALANCED);
        assert_true(reply->run->exact);
        assert_int_equal(reply->run->n_anchors, 2);
        kvloom__v1__host_reply__free_unpacked(reply, NULL);
    }
    Kvloom__V1__HostReply *reply = round_of(f, questions[2], KVLOOM__V1__QUALITY__QUALITY_BALANCED);
    assert_false(reply->run->exact);
    assert_int_equal(count(reply, "question", 'o'), reply->run->parts[1]->n_tokens);
    assert_int_equal(count(reply, "answer", 'o'), ANSWER);
    assert_true(reply->run->fetched_bytes > 0);
    assert_string_equal(reply->run->parts[1]->from, "one");
    assert_non_null(reply->run->place_only);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);

    /* Anchors survive a restart: the third text of all is covered at once. */
    stop_host(f, 1);
    wait_until(f, 1, false);
    start_host(f, 1);
    wait_until(f, 1, true);
    reply =
        round_of(f, "A text that nobody has seen, of a length that is not far from all the others",
                 KVLOOM__V1__QUALITY__QUALITY_BALANCED);
    assert_false(reply->run->exact);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
}

static void test_the_same_prompt_again_is_shared(void **state)
{
    fixture *f = *state;
    Kvloom__V1__HostReply *first =
        run_both(f, 0, questions[0], NULL, KVLOOM__V1__QUALITY__QUALITY_BALANCED);
    Kvloom__V1__HostReply *again =
        run_both(f, 0, questions[0], NULL, KVLOOM__V1__QUALITY__QUALITY_BALANCED);
    assert_true(again->run->exact);
    assert_true(count(again, "question", 'c') < count(first, "question", 'c'));
    kvloom__v1__host_reply__free_unpacked(first, NULL);
    kvloom__v1__host_reply__free_unpacked(again, NULL);
}

static void test_exact_never_approximates(void **state)
{
    fixture *f = *state;
    for (int r = 0; r < 3; r++) {
        Kvloom__V1__HostReply *reply =
            round_of(f, questions[r], KVLOOM__V1__QUALITY__QUALITY_EXACT);
        assert_true(reply->run->exact);
        assert_int_equal(reply->run->n_anchors, 0);
        kvloom__v1__host_reply__free_unpacked(reply, NULL);
    }
}

/* The host that has the answer's segment goes: the answer is computed, the rest is still reused. */
static void test_a_lost_segment_is_computed(void **state)
{
    fixture *f = *state;
    for (int r = 0; r < 2; r++)
        kvloom__v1__host_reply__free_unpacked(
            round_of(f, questions[r], KVLOOM__V1__QUALITY__QUALITY_BALANCED), NULL);
    Kvloom__V1__HostReply *first =
        run_both(f, 0, questions[2], NULL, KVLOOM__V1__QUALITY__QUALITY_BALANCED);
    stop_host(f, 0);
    wait_until(f, 0, false);
    Kvloom__V1__HostReply *second =
        run_both(f, 1, questions[2], first->run, KVLOOM__V1__QUALITY__QUALITY_BALANCED);
    assert_int_equal(count(second, "answer", 'c'), ANSWER);
    kvloom__v1__host_reply__free_unpacked(first, NULL);
    kvloom__v1__host_reply__free_unpacked(second, NULL);
}

/* Host one reads and answers; host two has the question and the answer blended. */
static Kvloom__V1__HostReply *blended(fixture *f, const char *question, const char *select,
                                      Kvloom__V1__Quality quality)
{
    asked what = {question, NULL, KVLOOM__V1__MODE__MODE_REUSE, quality, select, 0, false, 0.0};
    what.mode = KVLOOM__V1__MODE__MODE_FULL;
    kvloom__v1__host_reply__free_unpacked(run(f, 0, &what), NULL);
    what.mode = KVLOOM__V1__MODE__MODE_REUSE;
    Kvloom__V1__HostReply *first = run(f, 0, &what);
    what.answer = first->run;
    what.mode = KVLOOM__V1__MODE__MODE_FULL;
    Kvloom__V1__HostReply *full = run(f, 1, &what);
    what.mode = KVLOOM__V1__MODE__MODE_REUSE;
    Kvloom__V1__HostReply *reply = run(f, 1, &what);
    if (reply->run->verified) {
        assert_int_equal(reply->run->n_tokens, full->run->n_tokens);
        for (size_t i = 0; i < full->run->n_tokens; i++)
            assert_int_equal(reply->run->tokens[i], full->run->tokens[i]);
        assert_int_equal(reply->run->wrong_tokens, 0);
    }
    kvloom__v1__host_reply__free_unpacked(first, NULL);
    kvloom__v1__host_reply__free_unpacked(full, NULL);
    return reply;
}

/* What is recomputed is what the policy says, and everything recomputed in order is a full prefill,
 * to the last bit: the placed KV leaves no trace. */
static void test_blending_recomputes_what_it_says(void **state)
{
    fixture *f = *state;
    const Kvloom__V1__Quality balanced = KVLOOM__V1__QUALITY__QUALITY_BALANCED;
    Kvloom__V1__HostReply *reply = blended(f, questions[0], "none", balanced);
    const uint32_t n = count_blended(reply);
    assert_true(n > ANSWER);
    assert_false(reply->run->exact);
    assert_int_equal(reply->run->recomputed, 0);
    assert_true(reply->run->evaluation->kl > 0);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);

    reply = blended(f, questions[1], "sink8+query10", balanced);
    const uint32_t sinks = 8 + (ANSWER < 8 ? ANSWER : 8);
    assert_int_equal(reply->run->recomputed, sinks + count_blended(reply) / 10);
    assert_false(reply->run->verified);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);

    reply = blended(f, questions[2], "deviation15", balanced);
    assert_int_equal(reply->run->recomputed, count_blended(reply) * 15 / 100);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);

    reply = blended(f, "Gradually now: what deviates most of all?", "deviation15g", balanced);
    assert_int_equal(reply->run->recomputed, count_blended(reply) * 15 / 100);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);

    reply = blended(f, "What stands there, in a word or two?", "sink8+draft15", balanced);
    const uint32_t n_most = count_blended(reply) * 15 / 100;
    assert_int_equal(reply->run->recomputed, sinks < n_most ? n_most : sinks);
    assert_true(reply->run->drafted > 0);
    assert_true(reply->run->draft_kept <= reply->run->drafted);
    assert_true(reply->run->draft_kept <= reply->run->n_tokens);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);

    reply = blended(f, "Another question altogether, which nobody has asked before this one", "all",
                    balanced);
    assert_int_equal(reply->run->recomputed, count_blended(reply));
    assert_true(reply->run->evaluation->kl == 0.0);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
}

/* With random weights approximate KV answers anything; verified answers are full prefill's. */
static void test_verified_answers_are_exact(void **state)
{
    fixture *f = *state;
    uint32_t n_corrected = 0;
    for (int i = 0; i < 12; i++) {
        char question[96];
        number_question(question, sizeof question, i);
        Kvloom__V1__HostReply *reply =
            blended(f, question, "none", KVLOOM__V1__QUALITY__QUALITY_VERIFIED);
        assert_true(count_blended(reply) > 0);
        assert_true(reply->run->verified);
        assert_true(reply->run->evaluation->kl < 1e-6);
        n_corrected += reply->run->corrected;
        kvloom__v1__host_reply__free_unpacked(reply, NULL);
    }
    /* Otherwise nothing was tested. */
    assert_true(n_corrected > 0);
}

static void test_bad_tasks_are_refused(void **state)
{
    fixture *f = *state;
    Kvloom__V1__HostTask message = KVLOOM__V1__HOST_TASK__INIT;
    Kvloom__V1__RunTask task = KVLOOM__V1__RUN_TASK__INIT;
    Kvloom__V1__PromptPart part;
    Kvloom__V1__PromptPart *pointer = &part;
    uint32_t token = 1U << 30;
    uint8_t home[7] = {0};
    message.what_case = KVLOOM__V1__HOST_TASK__WHAT_RUN;
    message.run = &task;
    for (int i = 0; i < 4; i++) {
        text_part(&part, "slot", i == 0 ? "" : "text");
        if (i == 1) part.n_tokens = 1;
        part.tokens = &token;
        if (i == 2) part.home = (ProtobufCBinaryData){sizeof home, home};
        task.n_parts = 1;
        task.parts = &pointer;
        task.max_tokens = i == 3 ? 0 : 4;
        Kvloom__V1__HostReply *reply = NULL;
        kvl_error error = {0};
        const kvl_status status = call(f, 0, &message, &reply, &error);
        assert_int_equal(kvl_status_class_of(status), KVL_CLASS_REFUSE);
        assert_true(error.text[0] != '\0');
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_anchors_are_measured_then_used, setup, teardown),
        cmocka_unit_test_setup_teardown(test_the_same_prompt_again_is_shared, setup, teardown),
        cmocka_unit_test_setup_teardown(test_exact_never_approximates, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_lost_segment_is_computed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_blending_recomputes_what_it_says, setup, teardown),
        cmocka_unit_test_setup_teardown(test_verified_answers_are_exact, setup, teardown),
        cmocka_unit_test_setup_teardown(test_bad_tasks_are_refused, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
