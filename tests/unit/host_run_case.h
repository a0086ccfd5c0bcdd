/* host_run_case.h: two hosts in threads of this process, each with its own store, and a client,
 * over real sockets, with a tiny random model; for the tests of runs. Include it after cmocka.h. */
#ifndef KVL_HOST_RUN_CASE_H
#define KVL_HOST_RUN_CASE_H

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
    /* Of hosts that are started from now on. */
    int tenant;
    uint64_t donor_bytes_max;
} fixture;

static const char *const names[N_HOSTS] = {"one", "two"};

static inline void *run_host(void *host)
{
    kvl_host_run(host);
    return NULL;
}

static inline void start_host(fixture *f, int h)
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
    options.donor_bytes_max = f->donor_bytes_max;
    memset(options.tenant_key, 42 + f->tenant, sizeof options.tenant_key);
    kvl_error error = {0};
    if (kvl_host_create(&options, &f->hosts[h], &error) != KVL_OK) fail_msg("%s", error.text);
    assert_int_equal(pthread_create(&f->threads[h], NULL, run_host, f->hosts[h]), 0);
}

static inline void stop_host(fixture *f, int h)
{
    if (f->hosts[h] == NULL) return;
    kvl_host_stop(f->hosts[h]);
    pthread_join(f->threads[h], NULL);
    kvl_host_destroy(f->hosts[h]);
    f->hosts[h] = NULL;
}

static inline void wait_until(fixture *f, int h, bool up)
{
    for (int i = 0; i < 2000 && kvl_exchange_peer_is_up(f->client, names[h]) != up; i++) {
        const struct timespec pause = {0, 5000000};
        (void)nanosleep(&pause, NULL);
    }
    assert_int_equal(kvl_exchange_peer_is_up(f->client, names[h]), up);
}

static inline int setup(void **state)
{
    static fixture f;
    f = (fixture){.directory = "/tmp/kvloom-host-XXXXXX", .donor_bytes_max = 64 << 20};
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

static inline int teardown(void **state)
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

/* A question that no other number has. */
static inline void number_question(char *question, size_t n_bytes, int number)
{
    (void)snprintf(question, n_bytes, "Question %d of many, each of them with another number: %d",
                   number, number * 7919);
}

static inline kvl_status call(fixture *f, int h, const Kvloom__V1__HostTask *task,
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

static inline void text_part(Kvloom__V1__PromptPart *part, const char *slot, const char *text)
{
    kvloom__v1__prompt_part__init(part);
    if (slot != NULL) part->slot = (char *)(uintptr_t)slot;
    part->text = (ProtobufCBinaryData){strlen(text), (uint8_t *)(uintptr_t)text};
}

static inline Kvloom__V1__HostReply *run(fixture *f, int h, const asked *what)
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

static const char *const questions[] = {
    "What is it that the first of all questions asks of us, here and now, before the day?",
    "Why would anybody want a second question, when the first one has no answer at all yet?",
    "How many questions are there going to be in this test, and who counts them all then?",
};

static inline uint32_t count_blended(const Kvloom__V1__HostReply *reply)
{
    uint32_t n = 0;
    for (size_t p = 0; p < reply->run->n_parts; p++) n += reply->run->parts[p]->blended;
    return n;
}

#endif /* KVL_HOST_RUN_CASE_H */
