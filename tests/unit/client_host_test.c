/* client_host_test.c: answers of a host, whatever it sends and in whatever pieces. */
#include "base/alloc.h"
#include "base/file.h"
#include "exchange/local.h"
#include "kvloom.h"
#include "test_random.h"

#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

/* ---- a host that says what it is told to ---- */

typedef struct server {
    char directory[64], path[96], address[128];
    int listen_fd;
    const char *response;
    size_t step; /* bytes at a time; 0: all at once */
    bool stays;  /* does not close the connection */
    char request[8192];
    size_t n_request;
    pthread_t thread;
} server;

static bool request_is_whole(const server *s)
{
    const char *end = strstr(s->request, "\r\n\r\n");
    const char *length = strstr(s->request, "Content-Length: ");
    return end != NULL && length != NULL &&
           s->n_request == (size_t)(end + 4 - s->request) + strtoul(length + 16, NULL, 10);
}

static void *serve(void *argument)
{
    server *s = argument;
    struct pollfd item = {.fd = s->listen_fd, .events = POLLIN};
    if (poll(&item, 1, 5000) != 1) return NULL;
    const int fd = accept(s->listen_fd, NULL, NULL);
    while (fd >= 0 && !request_is_whole(s)) {
        const ssize_t n =
            recv(fd, s->request + s->n_request, sizeof s->request - 1 - s->n_request, 0);
        if (n <= 0) break;
        s->n_request += (size_t)n;
        s->request[s->n_request] = '\0';
    }
    const size_t n_bytes = strlen(s->response);
    for (size_t at = 0; at < n_bytes;) {
        const size_t left = n_bytes - at;
        const size_t n = s->step > 0 && s->step < left ? s->step : left;
        if (send(fd, s->response + at, n, MSG_NOSIGNAL) != (ssize_t)n) break;
        at += n;
        if (s->step > 0) (void)usleep(50);
    }
    char byte;
    if (s->stays) (void)!recv(fd, &byte, 1, 0); /* until the client goes */
    (void)close(fd);
    return NULL;
}

static void start(server *s, const char *response, size_t step, bool stays)
{
    memset(s, 0, sizeof *s);
    s->response = response;
    s->step = step;
    s->stays = stays;
    (void)snprintf(s->directory, sizeof s->directory, "/tmp/kvloom-host-XXXXXX");
    assert_non_null(mkdtemp(s->directory));
    (void)snprintf(s->path, sizeof s->path, "%s/s", s->directory);
    (void)snprintf(s->address, sizeof s->address, "unix:%s", s->path);
    assert_int_equal(kvl_local_listen(s->path, 0600, &s->listen_fd, NULL), KVL_OK);
    assert_int_equal(pthread_create(&s->thread, NULL, serve, s), 0);
}

static void stop(server *s)
{
    (void)pthread_join(s->thread, NULL);
    (void)close(s->listen_fd);
    assert_int_equal(kvl_directory_remove(s->directory, NULL), KVL_OK);
}

static kvloom_question hello(void)
{
    static const kvloom_message message = {"user", "Say \"hi\"\n"};
    return (kvloom_question){.messages = &message, .n_messages = 1, .max_tokens = 5};
}

static kvloom_status ask(const char *response, size_t step, kvloom_answer **answer,
                         kvloom_error *error)
{
    server s;
    const kvloom_question question = hello();
    start(&s, response, step, false);
    const kvloom_host host = {.address = s.address};
    const kvloom_status status = kvloom_generate(&host, &question, 5000, answer, error);
    stop(&s);
    return status;
}

/* ---- good ones ---- */

#define HEAD "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
#define CHUNKED HEAD "Transfer-Encoding: chunked\r\n\r\n"
#define DELTA(text) "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"" text "\"}}]}\n\n"
#define END                                                                                        \
    "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"length\"}]}\n\n"            \
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3,"                \
    "\"prompt_tokens_details\":{\"cached_tokens\":6}}}\n\ndata: [DONE]\n\n"
#define EVENTS ": a comment\r\n\r\nevent: x\n" DELTA("Hel") DELTA("lo \\u00e9\\n") END

static void check_hello(kvloom_answer *answer)
{
    size_t n = 0;
    kvloom_usage usage;
    const char *text = kvloom_answer_text(answer, &n);
    assert_string_equal(text, "Hello \xc3\xa9\n");
    assert_int_equal(n, strlen(text));
    assert_int_equal(kvloom_answer_usage(answer, &usage), KVLOOM_OK);
    assert_int_equal(usage.prompt_tokens, 7);
    assert_int_equal(usage.cached_tokens, 6);
    assert_int_equal(usage.answer_tokens, 3);
    assert_int_equal(usage.hit_max_tokens, 1);
    kvloom_answer_end(answer);
}

/* The same events in chunks of any size, cut anywhere, with a length, or up to the end. */
static void answers_arrive_in_any_pieces(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    static char response[1 << 16];
    for (int round = 0; round < 30; round++) {
        size_t n = (size_t)snprintf(response, sizeof response, CHUNKED);
        for (size_t at = 0; at < strlen(EVENTS);) {
            size_t chunk = 1 + kvl_test_below(&random, round % 2 == 0 ? 5 : 300);
            if (chunk > strlen(EVENTS) - at) chunk = strlen(EVENTS) - at;
            n += (size_t)snprintf(response + n, sizeof response - n, "%zX%s\r\n%.*s\r\n", chunk,
                                  round % 3 == 0 ? ";x=y" : "", (int)chunk, &EVENTS[at]);
            at += chunk;
        }
        (void)snprintf(response + n, sizeof response - n, "0\r\n\r\n");
        kvloom_answer *answer = NULL;
        const size_t step = round < 20 ? 0 : 1 + kvl_test_below(&random, 40);
        assert_int_equal(ask(response, step, &answer, NULL), KVLOOM_OK);
        check_hello(answer);
    }
    kvloom_answer *answer = NULL;
    (void)snprintf(response, sizeof response, HEAD "content-length:  %zu\r\n\r\n%s", strlen(EVENTS),
                   EVENTS);
    assert_int_equal(ask(response, 7, &answer, NULL), KVLOOM_OK);
    check_hello(answer);
    (void)snprintf(response, sizeof response, HEAD "\r\n%s", EVENTS);
    assert_int_equal(ask(response, 11, &answer, NULL), KVLOOM_OK);
    check_hello(answer);
    assert_int_equal(kvl_alloc_live(), 0);
}

/* A program with a loop of its own: the text grows, and the descriptor tells when. */
static void a_stream_is_read_as_it_comes(void **state)
{
    (void)state;
    server s;
    const kvloom_question question = hello();
    start(&s, HEAD "\r\n" EVENTS, 16, true);
    const kvloom_host host = {.address = s.address, .api_key = "a-key-of-16-bytes"};
    kvloom_answer *answer = NULL;
    assert_int_equal(kvloom_stream(&host, &question, 0, &answer, NULL), KVLOOM_OK);
    size_t before = 0, n_grown = 0;
    kvloom_status status = KVLOOM_IN_PROGRESS;
    while (status == KVLOOM_IN_PROGRESS) {
        struct pollfd item = {.fd = kvloom_answer_fd(answer), .events = POLLIN};
        assert_int_equal(poll(&item, 1, 5000), 1);
        status = kvloom_answer_read(answer, NULL);
        size_t n = 0;
        (void)kvloom_answer_text(answer, &n);
        assert_true(n >= before);
        n_grown += n > before ? 1 : 0;
        before = n;
    }
    assert_int_equal(status, KVLOOM_OK); /* "[DONE]" is the end, whatever the connection does */
    assert_true(n_grown >= 1);
    check_hello(answer);
    stop(&s);
    assert_non_null(strstr(s.request, "POST /v1/chat/completions HTTP/1.1\r\n"));
    assert_non_null(strstr(s.request, "Authorization: Bearer a-key-of-16-bytes\r\n"));
    assert_non_null(strstr(s.request, "\"content\":\"Say \\\"hi\\\"\\n\""));
    assert_non_null(strstr(s.request, "\"max_tokens\":5"));
}

/* ---- bad ones ---- */

static void what_the_host_refuses_is_told(void **state)
{
    (void)state;
    static const struct {
        const char *response;
        kvloom_status status;
        const char *text;
    } cases[] = {
        {"HTTP/1.1 401 Unauthorized\r\nContent-Length: 42\r\n\r\n"
         "{\"error\": {\"message\": \"give an API key\" }}  ",
         KVLOOM_ERR_DENIED, "give an API key"},
        {"HTTP/1.1 429 Too Many\r\n\r\n{\"error\":{\"message\":\"wait\"}}", KVLOOM_ERR_BUSY,
         "wait"},
        {"HTTP/1.1 400 Bad\r\n\r\nno json", KVLOOM_ERR_INVALID, "no reason"},
        {"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", KVLOOM_ERR_IO, "no reason"},
        {HEAD
         "\r\n" DELTA("x") "data: {\"error\":{\"message\":\"out of pages\"}}\n\ndata: [DONE]\n\n",
         KVLOOM_ERR_IO, "out of pages"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kvloom_answer *answer = NULL;
        kvloom_error error = {.text = ""};
        assert_int_equal(ask(cases[i].response, 3, &answer, &error), cases[i].status);
        assert_null(answer);
        assert_non_null(strstr(error.text, cases[i].text));
    }
}

/* S9: no length of the wire is believed, and what is no answer is none. */
static void s9_hostile_responses_are_refused(void **state)
{
    (void)state;
    static const char *const responses[] = {
        "SSH-2.0-x\r\n\r\n",
        "HTTP/2 200\r\n\r\n",
        "HTTP/1.1 100 Continue\r\n\r\n",
        HEAD "Content-Length: -1\r\n\r\n",
        HEAD "Content-Length: 99999999999999999999\r\n\r\n",
        HEAD "Content-Length: 4294967296\r\n\r\n",
        HEAD "Content-Length: 1x\r\n\r\n",
        HEAD "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        HEAD "Transfer-Encoding: gzip\r\n\r\n",
        HEAD "no colon\r\n\r\n",
        CHUNKED "zz\r\n",
        CHUNKED "-5\r\nhello\r\n",
        CHUNKED "FFFFFFFFFFFFFFFF\r\n",
        CHUNKED "FFFFFFFFFFFFFFFFF\r\n",
        CHUNKED "5\r\nhellox\r\n",
        HEAD "\r\ndata: [1]\n\n",
        HEAD "\r\ndata: {\n\n",
        HEAD "\r\ndata: {\"a\":1,\"a\":2}\n\n",
        HEAD "Content-Length: 3\r\n\r\nabc", /* an end without [DONE] */
        CHUNKED "0\r\n\r\n",
    };
    for (size_t i = 0; i < sizeof responses / sizeof *responses; i++) {
        kvloom_answer *answer = NULL;
        kvloom_error error = {.text = ""};
        const kvloom_status status = ask(responses[i], 0, &answer, &error);
        if (status != KVLOOM_ERR_MALFORMED) fail_msg("response %zu gives %d", i, status);
        assert_null(answer);
    }
    kvloom_answer *answer = NULL;
    assert_int_equal(ask(CHUNKED "5\r\nhe", 0, &answer, NULL), KVLOOM_ERR_UNREACHABLE);
    char *long_head = kvl_alloc(20000);
    memset(long_head, 'x', 19999);
    long_head[19999] = '\0';
    memcpy(long_head, HEAD, strlen(HEAD));
    assert_int_equal(ask(long_head, 0, &answer, NULL), KVLOOM_ERR_MALFORMED);
    kvl_free(long_head);
    assert_int_equal(kvl_alloc_live(), 0);
}

/* Any one byte of a good response changed: an answer or a refusal, and never more. */
static void any_changed_byte_is_survived(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    char good[2048], response[2048];
    (void)snprintf(good, sizeof good, CHUNKED "%zx\r\n%s\r\n0\r\n\r\n", strlen(EVENTS), EVENTS);
    for (int round = 0; round < 300; round++) {
        kvloom_answer *answer = NULL;
        memcpy(response, good, sizeof good);
        response[kvl_test_below(&random, (uint32_t)strlen(good))] =
            (char)(1 + kvl_test_below(&random, 255));
        const kvloom_status status = ask(response, 0, &answer, NULL);
        assert_true((status == KVLOOM_OK) == (answer != NULL));
        kvloom_answer_end(answer);
    }
    assert_int_equal(kvl_alloc_live(), 0);
}

static void deadlines_and_bad_questions(void **state)
{
    (void)state;
    server s;
    kvloom_question question = hello();
    kvloom_answer *answer = NULL;
    kvloom_error error = {.text = ""};
    start(&s, HEAD "\r\n" DELTA("x"), 0, true);
    kvloom_host host = {.address = s.address};
    assert_int_equal(kvloom_generate(&host, &question, 100, &answer, &error), KVLOOM_ERR_TIMEOUT);
    assert_null(answer);
    stop(&s);
    assert_int_equal(kvloom_stream(&host, &question, 100, &answer, &error), KVLOOM_ERR_UNREACHABLE);
    host.address = "127.0.0.1:1";
    assert_int_equal(kvloom_generate(&host, &question, 1000, &answer, &error),
                     KVLOOM_ERR_UNREACHABLE);
    host.address = "example.invalid:80";
    assert_int_equal(kvloom_stream(&host, &question, 100, &answer, &error), KVLOOM_ERR_INVALID);
    question.n_messages = 0;
    assert_int_equal(kvloom_stream(&host, &question, 100, &answer, &error), KVLOOM_ERR_INVALID);
    const kvloom_message bad[] = {{"user", "\xff"}, {"user", NULL}};
    question.n_messages = 1;
    for (size_t i = 0; i < 2; i++) {
        question.messages = &bad[i];
        assert_int_equal(kvloom_stream(&host, &question, 100, &answer, &error), KVLOOM_ERR_INVALID);
    }
    question = hello();
    host.api_key = "two\r\nlines"; /* S9: nothing of a key becomes a header of its own */
    assert_int_equal(kvloom_stream(&host, &question, 100, &answer, &error), KVLOOM_ERR_INVALID);
    assert_int_equal(kvl_alloc_live(), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(answers_arrive_in_any_pieces),
        cmocka_unit_test(a_stream_is_read_as_it_comes),
        cmocka_unit_test(what_the_host_refuses_is_told),
        cmocka_unit_test(s9_hostile_responses_are_refused),
        cmocka_unit_test(any_changed_byte_is_survived),
        cmocka_unit_test(deadlines_and_bad_questions),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
