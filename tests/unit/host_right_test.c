/* host: right in the end: answers that are healed behind the reply, told from those that are not;
 * the gate; audits; the error budget of a request. */
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

static Kvloom__V1__HealReply heal(fixture *f, int h, const Kvloom__V1__RunReply *run,
                                  uint32_t wait_ms)
{
    Kvloom__V1__HealTask task = KVLOOM__V1__HEAL_TASK__INIT;
    task.home = run->home;
    task.wait_ms = wait_ms;
    Kvloom__V1__HostTask message = KVLOOM__V1__HOST_TASK__INIT;
    message.what_case = KVLOOM__V1__HOST_TASK__WHAT_HEAL;
    message.heal = &task;
    Kvloom__V1__HostReply *reply = NULL;
    kvl_error error = {0};
    if (call(f, h, &message, &reply, &error) != KVL_OK) fail_msg("%s", error.text);
    assert_int_equal(reply->what_case, KVLOOM__V1__HOST_REPLY__WHAT_HEAL);
    const Kvloom__V1__HealReply healing = *reply->heal;
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
    return healing;
}

/* A prompt that host one has answered and host two reads, in full and then with reuse. */
typedef struct read_twice {
    Kvloom__V1__HostReply *first, *full, *reuse;
} read_twice;

static read_twice read_answer(fixture *f, const char *question, Kvloom__V1__Quality quality)
{
    read_twice got;
    asked what = {.question = question, .quality = quality, .select = "none"};
    what.mode = KVLOOM__V1__MODE__MODE_FULL;
    kvloom__v1__host_reply__free_unpacked(run(f, 0, &what), NULL);
    what.mode = KVLOOM__V1__MODE__MODE_REUSE;
    got.first = run(f, 0, &what);
    what.answer = got.first->run;
    what.mode = KVLOOM__V1__MODE__MODE_FULL;
    got.full = run(f, 1, &what);
    what.mode = KVLOOM__V1__MODE__MODE_REUSE;
    got.reuse = run(f, 1, &what);
    return got;
}

static void free_twice(read_twice *got)
{
    kvloom__v1__host_reply__free_unpacked(got->first, NULL);
    kvloom__v1__host_reply__free_unpacked(got->full, NULL);
    kvloom__v1__host_reply__free_unpacked(got->reuse, NULL);
}

/* Where two answers part; the length of both where they do not. */
static uint32_t parting(const Kvloom__V1__RunReply *a, const Kvloom__V1__RunReply *b)
{
    uint32_t n = 0;
    while (n < a->n_tokens && n < b->n_tokens && a->tokens[n] == b->tokens[n]) n++;
    return n;
}

/* The answer comes from approximate KV and is sent as it is; behind it, the host finds the first
 * token that full prefill would not have given, and has exact KV from then on, to the last bit. */
static void test_healed_answers_are_made_right_behind_the_reply(void **state)
{
    fixture *f = *state;
    uint32_t n_differed = 0;
    for (int i = 0; i < 12; i++) {
        char question[96];
        number_question(question, sizeof question, i);
        read_twice got = read_answer(f, question, KVLOOM__V1__QUALITY__QUALITY_HEALED);
        const Kvloom__V1__RunReply *reply = got.reuse->run;
        assert_true(count_blended(got.reuse) > 0);
        assert_true(reply->healing);
        assert_false(reply->verified);
        const Kvloom__V1__HealReply healing = heal(f, 1, reply, 10000);
        assert_int_equal(healing.state, KVLOOM__V1__HEAL_STATE__HEAL_DONE);
        assert_int_equal(healing.n_tokens, reply->n_tokens);
        const uint32_t at = parting(reply, got.full->run);
        const bool same = at == reply->n_tokens && at == got.full->run->n_tokens;
        assert_int_equal(healing.differed == 0, same);
        if (!same) assert_int_equal(healing.first_differed, at);
        n_differed += !same;
        char *metrics = kvl_host_metrics_text(f->hosts[1]);
        assert_non_null(metrics);
        assert_non_null(strstr(metrics, "\nkvloom_heals_waiting 0\n"));
        kvl_free(metrics);

        /* Prompt and sent answer are in the prefix tree: another prompt that begins so shares them,
         * and what it is given is what a full prefill gives. */
        asked what = {.question = question,
                      .answer = got.first->run,
                      .mode = KVLOOM__V1__MODE__MODE_REUSE,
                      .quality = KVLOOM__V1__QUALITY__QUALITY_EXACT,
                      .select = "none"};
        Kvloom__V1__HostReply *exact = run(f, 1, &what);
        uint32_t n_shared = 0;
        for (size_t p = 0; p < exact->run->n_parts; p++) n_shared += exact->run->parts[p]->shared;
        assert_true(n_shared + 2 * KVL_PAGE_TOKENS > exact->run->prompt_tokens);
        assert_true(exact->run->evaluation->kl == 0.0);
        assert_int_equal(exact->run->wrong_tokens, 0);
        kvloom__v1__host_reply__free_unpacked(exact, NULL);
        free_twice(&got);
    }
    /* Otherwise nothing was tested. */
    assert_true(n_differed > 0);
}

static const Kvloom__V1__PartReport *part_of(const Kvloom__V1__HostReply *reply, const char *slot)
{
    for (size_t p = 0; p < reply->run->n_parts; p++)
        if (strcmp(reply->run->parts[p]->slot, slot) == 0) return reply->run->parts[p];
    fail_msg("no part %s", slot);
    return NULL;
}

/* Host one reads what host two answered from approximate KV. */
static void test_unhealed_answers_are_told_from_healed_ones(void **state)
{
    fixture *f = *state;
    read_twice got = read_answer(f, questions[0], KVLOOM__V1__QUALITY__QUALITY_BALANCED);
    assert_false(got.reuse->run->exact);
    asked what = {.question = questions[1],
                  .answer = got.reuse->run,
                  .quality = KVLOOM__V1__QUALITY__QUALITY_BALANCED,
                  .select = "none"};
    what.mode = KVLOOM__V1__MODE__MODE_FULL;
    kvloom__v1__host_reply__free_unpacked(run(f, 0, &what), NULL);
    what.mode = KVLOOM__V1__MODE__MODE_REUSE;
    what.quality = KVLOOM__V1__QUALITY__QUALITY_VERIFIED;
    Kvloom__V1__HostReply *reply = run(f, 0, &what);
    assert_int_equal(part_of(reply, "answer")->computed, ANSWER);
    assert_false(part_of(reply, "answer")->unhealed);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
    /* The tree has it now: other text before it, so that it is read again. */
    what.question = questions[2];
    what.mode = KVLOOM__V1__MODE__MODE_FULL;
    kvloom__v1__host_reply__free_unpacked(run(f, 0, &what), NULL);
    what.mode = KVLOOM__V1__MODE__MODE_REUSE;
    what.quality = KVLOOM__V1__QUALITY__QUALITY_BALANCED;
    what.wait_healed_ms = 1; /* nobody heals it: in vain */
    reply = run(f, 0, &what);
    assert_int_equal(part_of(reply, "answer")->blended, ANSWER);
    assert_true(part_of(reply, "answer")->unhealed);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
    free_twice(&got);

    got = read_answer(f, "Something else, of which the answer is to be healed before it is read",
                      KVLOOM__V1__QUALITY__QUALITY_HEALED);
    assert_true(got.reuse->run->healing);
    what.answer = got.reuse->run;
    what.wait_healed_ms = 20000;
    what.mode = KVLOOM__V1__MODE__MODE_FULL;
    kvloom__v1__host_reply__free_unpacked(run(f, 0, &what), NULL);
    what.mode = KVLOOM__V1__MODE__MODE_REUSE;
    reply = run(f, 0, &what);
    assert_int_equal(part_of(reply, "answer")->blended, ANSWER);
    assert_false(part_of(reply, "answer")->unhealed);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
    free_twice(&got);
}

/* Refreshing changes the cache that later tokens see, each stale token once; the comparison with
 * full prefill sees it too, and what is exact or verified does not notice. */
static void test_stale_tokens_are_refreshed_while_an_answer_is_decoded(void **state)
{
    fixture *f = *state;
    uint32_t n_changed = 0;
    double kl[2] = {0.0, 0.0};
    for (int i = 0; i < 8; i++) {
        char question[96];
        number_question(question, sizeof question, i);
        asked what = {.question = question, .select = "none"};
        what.mode = KVLOOM__V1__MODE__MODE_FULL;
        kvloom__v1__host_reply__free_unpacked(run(f, 0, &what), NULL);
        what.mode = KVLOOM__V1__MODE__MODE_REUSE;
        Kvloom__V1__HostReply *first = run(f, 0, &what);
        what.answer = first->run;
        what.mode = KVLOOM__V1__MODE__MODE_FULL;
        Kvloom__V1__HostReply *full = run(f, 1, &what);
        what.mode = KVLOOM__V1__MODE__MODE_REUSE;
        for (int refreshes = 0; refreshes < 2; refreshes++) {
            what.refresh = refreshes == 0 ? 0 : 8;
            Kvloom__V1__HostReply *reply = run(f, 1, &what);
            const uint32_t n_stale = count_blended(reply);
            assert_true(n_stale > 0);
            assert_true(reply->run->refreshed <= n_stale);
            assert_true(reply->run->refreshed <= what.refresh * ANSWER);
            assert_int_equal(reply->run->refreshed > 0, refreshes);
            assert_true(reply->run->refresh_steps <= reply->run->n_tokens);
            kl[refreshes] = reply->run->evaluation->kl;
            kvloom__v1__host_reply__free_unpacked(reply, NULL);
        }
        n_changed += kl[1] != kl[0];
        what.quality = KVLOOM__V1__QUALITY__QUALITY_VERIFIED;
        Kvloom__V1__HostReply *verified = run(f, 1, &what);
        assert_int_equal(parting(verified->run, full->run), full->run->n_tokens);
        assert_true(verified->run->evaluation->kl == 0.0);
        kvloom__v1__host_reply__free_unpacked(verified, NULL);
        kvloom__v1__host_reply__free_unpacked(first, NULL);
        kvloom__v1__host_reply__free_unpacked(full, NULL);
    }
    assert_true(n_changed > 0);
}

/* With random weights no two caches agree often, and no answer is sure: what the gate does not let
 * pass is full prefill's answer, and what it lets pass says so. */
static void test_the_gate_heals_what_it_does_not_trust(void **state)
{
    fixture *f = *state;
    uint32_t n_first = 0;
    for (int i = 0; i < 8; i++) {
        char question[96];
        number_question(question, sizeof question, i);
        asked what = {.question = question, .select = "none"};
        what.mode = KVLOOM__V1__MODE__MODE_FULL;
        kvloom__v1__host_reply__free_unpacked(run(f, 0, &what), NULL);
        what.mode = KVLOOM__V1__MODE__MODE_REUSE;
        what.gate = true;
        Kvloom__V1__HostReply *first = run(f, 0, &what);
        assert_false(first->run->gated); /* it was computed: there is nothing to doubt */
        what.answer = first->run;
        what.mode = KVLOOM__V1__MODE__MODE_FULL;
        Kvloom__V1__HostReply *full = run(f, 1, &what);
        what.mode = KVLOOM__V1__MODE__MODE_REUSE;
        Kvloom__V1__HostReply *reply = run(f, 1, &what);
        assert_true(reply->run->gated);
        assert_true(reply->run->gate_bar > 0.0F);
        const bool passes = reply->run->gate_score >= reply->run->gate_bar;
        assert_int_equal(reply->run->healed_first, !passes);
        assert_int_equal(reply->run->verified, reply->run->healed_first);
        if (reply->run->healed_first) {
            assert_int_equal(parting(reply->run, full->run), full->run->n_tokens);
            assert_int_equal(reply->run->n_tokens, full->run->n_tokens);
            assert_int_equal(reply->run->wrong_tokens, 0);
            n_first++;
        }
        kvloom__v1__host_reply__free_unpacked(first, NULL);
        kvloom__v1__host_reply__free_unpacked(full, NULL);
        kvloom__v1__host_reply__free_unpacked(reply, NULL);
    }
    assert_true(n_first > 0);
}

/* Everything computed again: the second cache is the first, and a chance to see agreement. */
static void test_caches_that_are_the_same_agree(void **state)
{
    fixture *f = *state;
    asked what = {.question = questions[0], .select = "all", .gate = true};
    what.mode = KVLOOM__V1__MODE__MODE_FULL;
    kvloom__v1__host_reply__free_unpacked(run(f, 0, &what), NULL);
    what.mode = KVLOOM__V1__MODE__MODE_REUSE;
    Kvloom__V1__HostReply *first = run(f, 0, &what);
    what.answer = first->run;
    what.mode = KVLOOM__V1__MODE__MODE_FULL;
    kvloom__v1__host_reply__free_unpacked(run(f, 1, &what), NULL);
    what.mode = KVLOOM__V1__MODE__MODE_REUSE;
    Kvloom__V1__HostReply *reply = run(f, 1, &what);
    assert_true(reply->run->gated);
    assert_true(reply->run->gate_score > 0.0F);
    assert_true(reply->run->gate_score < 1.0F);
    kvloom__v1__host_reply__free_unpacked(first, NULL);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
}

/* Host two may not be expected to be off by more than the budget: what does not fit is computed. */
static void test_a_request_stays_within_its_error_budget(void **state)
{
    fixture *f = *state;
    asked what = {.question = questions[0], .select = "none"};
    what.mode = KVLOOM__V1__MODE__MODE_FULL;
    kvloom__v1__host_reply__free_unpacked(run(f, 0, &what), NULL);
    what.mode = KVLOOM__V1__MODE__MODE_REUSE;
    Kvloom__V1__HostReply *first = run(f, 0, &what);
    what.answer = first->run;
    what.mode = KVLOOM__V1__MODE__MODE_PLAN;
    Kvloom__V1__HostReply *free_of_it = run(f, 1, &what);
    const double error = free_of_it->run->expected_error;
    assert_true(count_blended(free_of_it) > ANSWER);
    assert_true(error > 0.0);
    double sum = 0.0;
    for (size_t p = 0; p < free_of_it->run->n_parts; p++) sum += free_of_it->run->parts[p]->error;
    assert_true(sum > 0.999999 * error && sum < 1.000001 * error);
    kvloom__v1__host_reply__free_unpacked(free_of_it, NULL);

    what.error_budget = 0.5 * error; /* room for the short answer, not for the question */
    Kvloom__V1__HostReply *tight = run(f, 1, &what);
    assert_true(tight->run->expected_error > 0.0);
    assert_true(tight->run->expected_error <= 0.5 * error);
    assert_true(count_blended(tight) > 0);
    kvloom__v1__host_reply__free_unpacked(tight, NULL);

    what.mode = KVLOOM__V1__MODE__MODE_FULL;
    kvloom__v1__host_reply__free_unpacked(run(f, 1, &what), NULL);
    what.mode = KVLOOM__V1__MODE__MODE_REUSE;
    what.error_budget = 1e-9;
    Kvloom__V1__HostReply *none = run(f, 1, &what);
    assert_true(none->run->exact);
    assert_true(none->run->expected_error == 0.0);
    assert_int_equal(none->run->wrong_tokens, 0);
    kvloom__v1__host_reply__free_unpacked(none, NULL);
    kvloom__v1__host_reply__free_unpacked(first, NULL);
}

static int setup_audited(void **state)
{
    (void)setup(state);
    fixture *f = *state;
    f->audit_share = 1.0;
    stop_host(f, 1);
    wait_until(f, 1, false);
    start_host(f, 1);
    wait_until(f, 1, true);
    return 0;
}

static Kvloom__V1__HostReply *status_of(fixture *f, int h)
{
    Kvloom__V1__HostTask message = KVLOOM__V1__HOST_TASK__INIT;
    message.what_case = KVLOOM__V1__HOST_TASK__WHAT_STATUS;
    message.status = true;
    Kvloom__V1__HostReply *reply = NULL;
    kvl_error error = {0};
    if (call(f, h, &message, &reply, &error) != KVL_OK) fail_msg("%s", error.text);
    assert_int_equal(reply->what_case, KVLOOM__V1__HOST_REPLY__WHAT_STATUS);
    return reply;
}

static Kvloom__V1__HostReply *wait_for_audits(fixture *f, int h, uint64_t n)
{
    for (int i = 0; i < 2000; i++) {
        Kvloom__V1__HostReply *reply = status_of(f, h);
        if (reply->status->n_audits > 0 && reply->status->audits[0]->audited >= n) return reply;
        kvloom__v1__host_reply__free_unpacked(reply, NULL);
        const struct timespec pause = {0, 5000000};
        (void)nanosleep(&pause, NULL);
    }
    fail_msg("no %d audits", (int)n);
    return NULL;
}

/* What audits say of a template is what the comparison with the reference says, and survives a
 * restart. */
static void test_audits_measure_what_was_sent(void **state)
{
    fixture *f = *state;
    enum { N = 5 };
    double kl = 0.0;
    double exact = 0.0;
    for (int i = 0; i < N; i++) {
        char question[96];
        number_question(question, sizeof question, i);
        read_twice got = read_answer(f, question, KVLOOM__V1__QUALITY__QUALITY_BALANCED);
        const uint32_t at = parting(got.reuse->run, got.full->run);
        const bool same = at == got.reuse->run->n_tokens && at == got.full->run->n_tokens;
        exact = 0.99 * exact + (same ? 1.0 : 0.0);
        kl += got.reuse->run->evaluation->kl / N;
        free_twice(&got);
    }
    Kvloom__V1__HostReply *reply = wait_for_audits(f, 1, N);
    assert_int_equal(reply->status->n_audits, 1);
    const Kvloom__V1__AuditReport *audit = reply->status->audits[0];
    assert_string_equal(audit->key, "/two");
    assert_int_equal(audit->action, KVLOOM__V1__ACTION__ACTION_BLEND);
    assert_int_equal(audit->audited, N);
    assert_true(audit->kl > 0.2 * kl && audit->kl < 5.0 * kl); /* behind other tokens */
    double weight = 0.0;
    for (int i = 0; i < N; i++) weight = 0.99 * weight + 1.0;
    assert_true(audit->exact_match > exact / weight - 1e-9);
    assert_true(audit->exact_match < exact / weight + 1e-9);
    const double kept = audit->kl;
    char *metrics = kvl_host_metrics_text(f->hosts[1]);
    assert_non_null(metrics);
    assert_non_null(strstr(metrics, "\nkvloom_audits_total 5\n"));
    assert_non_null(strstr(metrics, "\nkvloom_audit_kl{key=\"/two\",action=\"blend\"} "));
    kvl_free(metrics);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);

    stop_host(f, 1);
    wait_until(f, 1, false);
    start_host(f, 1);
    wait_until(f, 1, true);
    reply = status_of(f, 1);
    assert_int_equal(reply->status->n_audits, 1);
    assert_true(reply->status->audits[0]->kl > 0.999 * kept);
    assert_true(reply->status->audits[0]->kl < 1.001 * kept);
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_healed_answers_are_made_right_behind_the_reply, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_unhealed_answers_are_told_from_healed_ones, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_stale_tokens_are_refreshed_while_an_answer_is_decoded,
                                        setup, teardown),
        cmocka_unit_test_setup_teardown(test_the_gate_heals_what_it_does_not_trust, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_caches_that_are_the_same_agree, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_request_stays_within_its_error_budget, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_audits_measure_what_was_sent, setup_audited, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
