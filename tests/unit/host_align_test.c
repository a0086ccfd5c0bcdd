/* host: a text that nobody has read is made of runs of tokens of others; what is new is computed,
 * and everything recomputed is a full prefill. Tokens are given as ids, so that a test knows them.
 */
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

enum { N_TEXT = 200, N_LEAD = 8, EDIT_AT = 90, N_EDIT = 3, FIRST_ID = 3 };

typedef struct prompt {
    uint32_t lead[N_LEAD]; /* other in every prompt, so that no prefix is shared */
    uint32_t text[N_TEXT], ending[N_LEAD];
} prompt;

static void draw(kvl_random *random, uint32_t *tokens, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) tokens[i] = FIRST_ID + kvl_test_below(random, 200);
}

static prompt make_prompt(kvl_random *random)
{
    prompt p;
    draw(random, p.lead, N_LEAD);
    draw(random, p.text, N_TEXT);
    draw(random, p.ending, N_LEAD);
    return p;
}

typedef struct how {
    Kvloom__V1__Mode mode;
    Kvloom__V1__Quality quality;
    const char *select;
    bool align, evaluate;
} how;

static Kvloom__V1__HostReply *run_prompt(fixture *f, const prompt *p, const how *by)
{
    Kvloom__V1__HostTask message = KVLOOM__V1__HOST_TASK__INIT;
    Kvloom__V1__RunTask task = KVLOOM__V1__RUN_TASK__INIT;
    Kvloom__V1__PromptPart parts[3];
    Kvloom__V1__PromptPart *pointers[3];
    for (int i = 0; i < 3; i++) {
        kvloom__v1__prompt_part__init(&parts[i]);
        pointers[i] = &parts[i];
        parts[i].n_tokens = i == 1 ? N_TEXT : N_LEAD;
    }
    parts[0].tokens = (uint32_t *)(uintptr_t)p->lead;
    parts[1].tokens = (uint32_t *)(uintptr_t)p->text;
    parts[2].tokens = (uint32_t *)(uintptr_t)p->ending;
    parts[1].slot = (char *)(uintptr_t) "text";
    message.what_case = KVLOOM__V1__HOST_TASK__WHAT_RUN;
    message.run = &task;
    task.parts = pointers;
    task.n_parts = 3;
    task.max_tokens = ANSWER;
    task.mode = by->mode;
    task.quality = by->quality;
    task.select = (char *)(uintptr_t)by->select;
    task.align = by->align;
    task.evaluate = by->evaluate;
    Kvloom__V1__HostReply *reply = NULL;
    kvl_error error = {0};
    if (call(f, 0, &message, &reply, &error) != KVL_OK) fail_msg("%s", error.text);
    return reply;
}

static void end(Kvloom__V1__HostReply *reply)
{
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
}

static void read_text(fixture *f, const prompt *p)
{
    const how by = {.mode = KVLOOM__V1__MODE__MODE_READ, .select = "none"};
    end(run_prompt(f, p, &by));
}

/* The same text with some tokens replaced, behind another lead. */
static prompt edit(kvl_random *random, const prompt *p)
{
    prompt edited = *p;
    draw(random, edited.lead, N_LEAD);
    for (uint32_t i = 0; i < N_EDIT; i++)
        edited.text[EDIT_AT + i] = FIRST_ID + (p->text[EDIT_AT + i] - FIRST_ID + 1) % 200;
    return edited;
}

static void sum(const Kvloom__V1__HostReply *reply, uint32_t *blended, uint32_t *computed)
{
    *blended = *computed = 0;
    for (size_t i = 0; i < reply->run->n_parts; i++) {
        *blended += reply->run->parts[i]->blended;
        *computed += reply->run->parts[i]->computed;
    }
    assert_int_equal(*blended + *computed, N_TEXT + 2 * N_LEAD);
}

static const how aligned = {.mode = KVLOOM__V1__MODE__MODE_REUSE, .select = "none", .align = true};

static void test_an_edited_text_is_placed_but_for_the_edit(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    const prompt first = make_prompt(&random);
    const prompt edited = edit(&random, &first);
    read_text(f, &first);
    uint32_t blended = 0, computed = 0;
    Kvloom__V1__HostReply *reply = run_prompt(f, &edited, &aligned);
    sum(reply, &blended, &computed);
    assert_int_equal(blended, N_TEXT - N_EDIT);
    assert_int_equal(reply->run->n_parts, 5);
    assert_false(reply->run->exact);
    /* What is not this text's own is nothing that a later prompt may be told to have. */
    for (size_t i = 0; i < 5; i++) assert_int_equal(reply->run->parts[i]->segment.len, 0);
    end(reply);
    /* Behind the answer the text was read itself: next time it is whole. */
    prompt again = edited;
    draw(&random, again.lead, N_LEAD);
    reply = run_prompt(f, &again, &aligned);
    sum(reply, &blended, &computed);
    assert_int_equal(blended, N_TEXT);
    assert_int_equal(reply->run->n_parts, 3);
    assert_int_equal(reply->run->parts[1]->segment.len, KVL_DIGEST_BYTES);
    end(reply);
}

static void test_nothing_is_aligned_unasked_or_for_little(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    const prompt first = make_prompt(&random);
    read_text(f, &first);
    uint32_t blended = 0, computed = 0;
    how by = aligned;
    by.align = false;
    prompt edited = edit(&random, &first);
    Kvloom__V1__HostReply *reply = run_prompt(f, &edited, &by);
    sum(reply, &blended, &computed);
    assert_int_equal(blended, 0);
    assert_true(reply->run->exact);
    end(reply);
    by = aligned;
    by.quality = KVLOOM__V1__QUALITY__QUALITY_EXACT;
    const prompt second = make_prompt(&random);
    read_text(f, &second);
    edited = edit(&random, &second);
    reply = run_prompt(f, &edited, &by);
    assert_true(reply->run->exact);
    end(reply);
    /* Less than half of it stands elsewhere. */
    prompt mostly_new = make_prompt(&random);
    memcpy(mostly_new.text, second.text, N_TEXT / 3 * sizeof *second.text);
    reply = run_prompt(f, &mostly_new, &aligned);
    assert_true(reply->run->exact);
    end(reply);
}

/* What was placed leaves no trace where everything is computed again, to the last bit. */
static void test_everything_recomputed_is_a_full_prefill(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    for (int i = 0; i < 3; i++) {
        const prompt first = make_prompt(&random);
        const prompt edited = edit(&random, &first);
        read_text(f, &first);
        how by = {.mode = KVLOOM__V1__MODE__MODE_FULL};
        Kvloom__V1__HostReply *full = run_prompt(f, &edited, &by);
        by = aligned;
        by.evaluate = true;
        by.select = i == 0 ? "all" : "none";
        if (i == 1) by.quality = KVLOOM__V1__QUALITY__QUALITY_VERIFIED;
        Kvloom__V1__HostReply *reply = run_prompt(f, &edited, &by);
        uint32_t blended = 0, computed = 0;
        sum(reply, &blended, &computed);
        assert_int_equal(blended, N_TEXT - N_EDIT);
        assert_non_null(reply->run->evaluation);
        if (i == 0) assert_true(reply->run->evaluation->kl == 0.0);
        if (i == 1) {
            assert_int_equal(reply->run->n_tokens, full->run->n_tokens);
            assert_memory_equal(reply->run->tokens, full->run->tokens,
                                full->run->n_tokens * sizeof *full->run->tokens);
        }
        /* Otherwise nothing was approximate, and nothing was tested. */
        if (i == 2) assert_true(reply->run->evaluation->kl > 0.0);
        end(reply);
        end(full);
    }
}

static void test_what_is_forgotten_is_no_donor(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    prompt first = make_prompt(&random);
    const prompt edited = edit(&random, &first);
    read_text(f, &first);
    draw(&random, first.lead, N_LEAD);
    const how by = {.mode = KVLOOM__V1__MODE__MODE_REUSE, .select = "none"};
    Kvloom__V1__HostReply *had = run_prompt(f, &first, &by);
    Kvloom__V1__HostTask message = KVLOOM__V1__HOST_TASK__INIT;
    Kvloom__V1__ForgetTask forget = KVLOOM__V1__FORGET_TASK__INIT;
    assert_int_equal(had->run->parts[1]->segment.len, KVL_DIGEST_BYTES);
    forget.n_ids = 1;
    forget.ids = &had->run->parts[1]->segment;
    message.what_case = KVLOOM__V1__HOST_TASK__WHAT_FORGET;
    message.forget = &forget;
    Kvloom__V1__HostReply *forgotten = NULL;
    kvl_error error = {0};
    assert_int_equal(call(f, 0, &message, &forgotten, &error), KVL_OK);
    assert_int_equal(forgotten->forgotten, 1);
    end(forgotten);
    end(had);
    Kvloom__V1__HostReply *reply = run_prompt(f, &edited, &aligned);
    assert_true(reply->run->exact);
    end(reply);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_an_edited_text_is_placed_but_for_the_edit, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_nothing_is_aligned_unasked_or_for_little, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_everything_recomputed_is_a_full_prefill, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_what_is_forgotten_is_no_donor, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
