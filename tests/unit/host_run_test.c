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

#include "base/alloc.h"
#include "base/file.h"
#include "host.pb-c.h"
#include "host/host.h"
#include "test_random.h"
#include "tiny_gguf.h"

#include <pthread.h>

enum { N_HOSTS = 2, ANSWER = 6, CALL_S = 60 };

typedef struct fixture {
    char directory[64];
    char model[128];
    char endpoints[N_HOSTS][128], stores[N_HOSTS][128];
    kvl_host *hosts[N_HOSTS];
    pthread_t threads[N_HOSTS];
    kvl_exchange *client;
    double audit_share;
} fixture;

static const char *const names[N_HOSTS] = {"one", "two"};

static void *run_host(void *host)
{
    kvl_host_run(host);
    return NULL;
}

static void start_host(fixture *f, int h)
{
    const int other = 1 - h;
    const kvl_exchange_peer peer = {.name = names[other], .endpoint = f->endpoints[other]};
    kvl_host_options options = kvl_host_default_options();
    options.name = names[h];
    options.endpoint = f->endpoints[h];
    options.peers = &peer;
    options.n_peers = 1;
    options.store_path = f->stores[h];
    options.store_bytes_max = 64 << 20;
    options.memory_bytes_max = 64 << 20;
    options.engine = (kvl_engine_options){.model_path = f->model, .n_threads = 1, .n_pages = 128};
    options.anchors.distance_max = 1000.0F; /* random weights: nothing is near anything */
    options.audit_share = f->audit_share;
    memset(options.tenant_key, 42, sizeof options.tenant_key);
    kvl_error error = {0};
    if (kvl_host_create(&options, &f->hosts[h], &error) != KVL_OK) fail_msg("%s", error.text);
    assert_int_equal(pthread_create(&f->threads[h], NULL, run_host, f->hosts[h]), 0);
}

static void stop_host(fixture *f, int h)
{
    if (f->hosts[h] == NULL) return;
    kvl_host_stop(f->hosts[h]);
    pthread_join(f->threads[h], NULL);
    kvl_host_destroy(f->hosts[h]);
    f->hosts[h] = NULL;
}

static void wait_until(fixture *f, int h, bool up)
{
    for (int i = 0; i < 2000 && kvl_exchange_peer_is_up(f->client, names[h]) != up; i++) {
        const struct timespec pause = {0, 5000000};
        (void)nanosleep(&pause, NULL);
    }
    assert_int_equal(kvl_exchange_peer_is_up(f->client, names[h]), up);
}

static int setup(void **state)
{
    static fixture f;
    f = (fixture){.directory = "/tmp/kvloom-host-XXXXXX"};
    assert_non_null(mkdtemp(f.directory));
    (void)snprintf(f.model, sizeof f.model, "%s/model.gguf", f.directory);
    kvl_tiny_gguf_options tiny = kvl_tiny_gguf_defaults("llama");
    tiny.n_layers = 3;
    tiny.n_context = 512;
    kvl_tiny_gguf_save(&tiny, f.model);
    kvl_exchange_peer peers[N_HOSTS];
    for (int h = 0; h < N_HOSTS; h++) {
        (void)snprintf(f.endpoints[h], sizeof f.endpoints[h], "ipc://%s/%d.sock", f.directory, h);
        (void)snprintf(f.stores[h], sizeof f.stores[h], "%s/store-%d", f.directory, h);
        peers[h] = (kvl_exchange_peer){.name = names[h], .endpoint = f.endpoints[h]};
    }
    for (int h = 0; h < N_HOSTS; h++) start_host(&f, h);
    const kvl_exchange_options client = {
        .name = "client", .peers = peers, .n_peers = N_HOSTS, .clock = kvl_clock_system()};
    kvl_error error = {0};
    if (kvl_exchange_start(&client, &f.client, &error) != KVL_OK) fail_msg("%s", error.text);
    for (int h = 0; h < N_HOSTS; h++) wait_until(&f, h, true);
    *state = &f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    kvl_exchange_stop(f->client);
    for (int h = 0; h < N_HOSTS; h++) stop_host(f, h);
    kvl_error error = {0};
    assert_int_equal(kvl_directory_remove(f->directory, &error), KVL_OK);
    return 0;
}

/* "Fixed text {question} more fixed text {answer} the end": the answer's slot is left out where
 * there is no answer yet. */
typedef struct asked {
    const char *question;
    const Kvloom__V1__RunReply *answer;
    Kvloom__V1__Mode mode;
    Kvloom__V1__Quality quality;
    const char *select; /* NULL: a prompt of a workflow, with anchors */
    uint32_t wait_healed_ms;
    bool gate;
    double error_budget;
} asked;

static kvl_status call(fixture *f, int h, const Kvloom__V1__HostTask *task,
                       Kvloom__V1__HostReply **reply, kvl_error *error)
{
    uint8_t body[16384];
    const size_t n_bytes = kvloom__v1__host_task__get_packed_size(task);
    assert_true(n_bytes <= sizeof body);
    (void)kvloom__v1__host_task__pack(task, body);
    void *answer = NULL;
    size_t n_answer = 0;
    const int64_t deadline = kvl_clock_now(kvl_clock_system()) + CALL_S * KVL_NS_PER_S;
    const kvl_status status =
        kvl_exchange_call(f->client, names[h], body, n_bytes, deadline, &answer, &n_answer, error);
    if (status != KVL_OK) return status;
    *reply = kvloom__v1__host_reply__unpack(NULL, n_answer, answer);
    kvl_free(answer);
    assert_non_null(*reply);
    return KVL_OK;
}

static void text_part(Kvloom__V1__PromptPart *part, const char *slot, const char *text)
{
    kvloom__v1__prompt_part__init(part);
    if (slot != NULL) part->slot = (char *)(uintptr_t)slot;
    part->text = (ProtobufCBinaryData){strlen(text), (uint8_t *)(uintptr_t)text};
}

static Kvloom__V1__HostReply *run(fixture *f, int h, const asked *what)
{
    Kvloom__V1__PromptPart parts[5];
    Kvloom__V1__PromptPart *pointers[5];
    size_t n = 0;
    text_part(&parts[n++], NULL, "<|im_start|>a rather long opening, the same in every prompt\n");
    text_part(&parts[n++], "question", what->question);
    text_part(&parts[n++], NULL, "\nand then\n");
    if (what->answer != NULL) {
        Kvloom__V1__PromptPart *part = &parts[n++];
        kvloom__v1__prompt_part__init(part);
        part->slot = (char *)(uintptr_t) "answer";
        part->n_tokens = what->answer->n_tokens;
        part->tokens = what->answer->tokens;
        part->home = what->answer->home;
        text_part(&parts[n++], NULL, "\nthe end<|im_end|>\n");
    }
    for (size_t p = 0; p < n; p++) pointers[p] = &parts[p];
    Kvloom__V1__RunTask task = KVLOOM__V1__RUN_TASK__INIT;
    task.workflow = (char *)(uintptr_t)(what->select == NULL ? "test" : "");
    task.select = (char *)(uintptr_t)(what->select == NULL ? "" : what->select);
    task.template_name = (char *)(uintptr_t)names[h];
    task.n_parts = n;
    task.parts = pointers;
    task.mode = what->mode;
    task.quality = what->quality;
    task.max_tokens = ANSWER;
    task.wait_healed_ms = what->wait_healed_ms;
    task.gate = what->gate;
    task.error_budget = what->error_budget;
    task.evaluate = what->mode == KVLOOM__V1__MODE__MODE_REUSE;
    task.place_only = task.evaluate;
    Kvloom__V1__HostTask message = KVLOOM__V1__HOST_TASK__INIT;
    message.what_case = KVLOOM__V1__HOST_TASK__WHAT_RUN;
    message.run = &task;
    Kvloom__V1__HostReply *reply = NULL;
    kvl_error error = {0};
    if (call(f, h, &message, &reply, &error) != KVL_OK) fail_msg("%s", error.text);
    assert_int_equal(reply->what_case, KVLOOM__V1__HOST_REPLY__WHAT_RUN);
    return reply;
}

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

static const char *const questions[] = {
    "What is it that the first of all questions asks of us, here and now, before the day?",
    "Why would anybody want a second question, when the first one has no answer at all yet?",
    "How many questions are there going to be in this test, and who counts them all then?",
};

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

static uint32_t count_blended(const Kvloom__V1__HostReply *reply)
{
    uint32_t n = 0;
    for (size_t p = 0; p < reply->run->n_parts; p++) n += reply->run->parts[p]->blended;
    return n;
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
        (void)snprintf(question, sizeof question,
                       "Question %d of many, each of them with another number: %d", i, i * 7919);
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
        (void)snprintf(question, sizeof question,
                       "Question %d of many, each of them with another number: %d", i, i * 7919);
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

/* With random weights no two caches agree often, and no answer is sure: what the gate does not let
 * pass is full prefill's answer, and what it lets pass says so. */
static void test_the_gate_heals_what_it_does_not_trust(void **state)
{
    fixture *f = *state;
    uint32_t n_first = 0;
    for (int i = 0; i < 8; i++) {
        char question[96];
        (void)snprintf(question, sizeof question,
                       "Question %d of many, each of them with another number: %d", i, i * 7919);
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
        (void)snprintf(question, sizeof question,
                       "Question %d of many, each of them with another number: %d", i, i * 7919);
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
        cmocka_unit_test_setup_teardown(test_healed_answers_are_made_right_behind_the_reply, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_unhealed_answers_are_told_from_healed_ones, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_the_gate_heals_what_it_does_not_trust, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_caches_that_are_the_same_agree, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_request_stays_within_its_error_budget, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_audits_measure_what_was_sent, setup_audited, teardown),
        cmocka_unit_test_setup_teardown(test_bad_tasks_are_refused, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
