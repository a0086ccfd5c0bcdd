/* http: bodies to generations, whatever the body; keys and salts; every allocation may fail. */
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
#include "http/api.h"
#include "http/keys.h"
#include "test_random.h"
#include "tiny_engine.h"

static kvl_engine *engine;

static void make_file(char *path, size_t n_max)
{
    (void)snprintf(path, n_max, "/tmp/kvloom-http-XXXXXX");
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    (void)close(fd);
}

static int open_engine(void **state)
{
    (void)state;
    const kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("llama");
    engine = tiny_engine_open(&options, 1, 0);
    return 0;
}

static int close_engine(void **state)
{
    (void)state;
    kvl_engine_destroy(engine);
    return 0;
}

static bool parse(bool is_chat, const char *body, kvl_api_request *request, kvl_api_error *error)
{
    *error = (kvl_api_error){0};
    return kvl_api_request_parse(engine, "tiny", is_chat ? KVL_API_CHAT : KVL_API_TEXT, body,
                                 strlen(body), request, error);
}

static void test_every_field_arrives(void **state)
{
    (void)state;
    kvl_api_request r;
    kvl_api_error error;
    const char *body =
        "{\"model\": \"tiny\", \"messages\": [{\"role\": \"user\", \"content\": \"hello\"}],"
        "\"max_tokens\": 7, \"temperature\": 0.5, \"top_p\": 0.25, \"top_k\": 9, \"min_p\": 0.125,"
        "\"repetition_penalty\": 1.5, \"presence_penalty\": -1, \"frequency_penalty\": 2,"
        "\"seed\": 42, \"n\": 3, \"stop\": [\"a\", \"bc\"], \"logprobs\": true,"
        "\"top_logprobs\": 4, \"stream\": true, \"stream_options\": {\"include_usage\": true},"
        "\"cache_salt\": \"pepper\", \"ignore_eos\": true, \"user\": \"nobody\", \"unknown\": {}}";
    if (!parse(true, body, &r, &error)) fail_msg("%s", error.message);
    const kvl_generation *g = &r.generation;
    assert_int_equal(g->max_tokens, 7);
    assert_true(g->sampling.temperature == 0.5F && g->sampling.top_p == 0.25F);
    assert_true(g->sampling.min_p == 0.125F && g->sampling.repetition_penalty == 1.5F);
    assert_true(g->sampling.presence_penalty == -1.0F && g->sampling.frequency_penalty == 2.0F);
    assert_int_equal(g->sampling.top_k, 9);
    assert_int_equal(g->seed, 42);
    assert_int_equal(g->n_branches, 3);
    assert_int_equal(g->n_stops, 2);
    assert_string_equal(g->stops[1], "bc");
    assert_true(g->sampling.with_logprobs && g->sampling.n_logprobs == 4);
    assert_true(r.is_stream && r.with_usage && g->ignore_end);
    assert_string_equal(r.cache_salt, "pepper");
    assert_int_equal(g->ids[0], KVL_TINY_TURN_START);
    kvl_api_request_deinit(&r);
}

static void test_completions_take_texts_and_ids(void **state)
{
    (void)state;
    static const char *const bodies[] = {"{\"prompt\": \"ABC\"}", "{\"prompt\": [\"ABC\"]}",
                                         "{\"prompt\": [65, 66, 67]}",
                                         "{\"prompt\": [[65, 66, 67]]}"};
    for (size_t i = 0; i < sizeof bodies / sizeof *bodies; i++) {
        kvl_api_request r;
        kvl_api_error error;
        if (!parse(false, bodies[i], &r, &error)) fail_msg("%s: %s", bodies[i], error.message);
        assert_int_equal(r.generation.n_ids, 3);
        for (uint32_t k = 0; k < 3; k++) assert_int_equal(r.generation.ids[k], 65 + k);
        assert_int_equal(r.generation.max_tokens, 16);
        kvl_api_request_deinit(&r);
    }
    static const char *const bad[] = {"{\"prompt\": [\"A\", \"B\"]}", "{\"prompt\": []}",
                                      "{\"prompt\": \"\"}",           "{\"prompt\": [272]}",
                                      "{\"prompt\": [65, -1]}",       "{\"prompt\": [65, \"x\"]}",
                                      "{\"prompt\": null}",           "{}"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvl_api_request r;
        kvl_api_error error;
        assert_false(parse(false, bad[i], &r, &error));
        assert_int_equal(error.http_status, 400);
        assert_string_equal(error.param, "prompt");
        kvl_api_request_deinit(&r);
    }
}

/* What would need a constrained decoder is refused by name, and never answered freely. */
static void test_formats_but_text_are_refused_with_a_remedy(void **state)
{
    (void)state;
    static const struct {
        const char *format, *named; /* NULL: accepted */
    } cases[] = {
        {"{\"type\": \"text\"}", NULL},
        {"null", NULL},
        {"{\"type\": \"json_object\"}", "'json_object'"},
        {"{\"type\": \"json_schema\", \"json_schema\": {\"name\": \"x\", \"schema\": {}}}",
         "'json_schema'"},
        {"{\"type\": 5}", "type"},
        {"\"text\"", "object"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (int kind = KVL_API_CHAT; kind <= KVL_API_RESPONSE; kind += KVL_API_RESPONSE) {
            char body[512];
            (void)snprintf(body, sizeof body,
                           kind == KVL_API_CHAT
                               ? "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], "
                                 "\"response_format\": %s}"
                               : "{\"input\": \"hi\", \"text\": {\"format\": %s}}",
                           cases[i].format);
            kvl_api_request r;
            kvl_api_error error = {0};
            const bool is_taken = kvl_api_request_parse(engine, "tiny", (kvl_api_kind)kind, body,
                                                        strlen(body), &r, &error);
            assert_int_equal(is_taken, cases[i].named == NULL);
            if (!is_taken) {
                assert_int_equal(error.http_status, 400);
                assert_string_equal(error.param, kind == KVL_API_CHAT ? "response_format" : "text");
                assert_non_null(strstr(error.message, cases[i].named));
                assert_non_null(strstr(error.message, "{\"type\": \"text\"}"));
                assert_non_null(strstr(error.message,
                                       kind == KVL_API_CHAT ? "response_format" : "text.format"));
            }
            kvl_api_request_deinit(&r);
        }
    }
}

/* Cut anywhere, with any byte changed: parsed or refused, with a reason, and nothing leaks. */
static void test_damaged_bodies_are_refused_with_reasons(void **state)
{
    (void)state;
    static const char whole[] =
        "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"hi\"}]}],"
        "\"stop\":[\"x\"],\"n\":2,\"cache_salt\":\"s\",\"response_format\":{\"type\":\"text\"}}";
    kvl_random random = kvl_test_random();
    const int64_t n_live = kvl_alloc_live();
    for (int round = 0; round < 5000; round++) {
        char body[sizeof whole];
        memcpy(body, whole, sizeof whole);
        size_t n = sizeof whole - 1;
        if (round % 2 == 0) n = kvl_test_below(&random, (uint32_t)n);
        for (uint32_t i = kvl_test_below(&random, 4); i > 0 && n > 0; i--)
            body[kvl_test_below(&random, (uint32_t)n)] = (char)kvl_test_below(&random, 256);
        kvl_api_request r;
        kvl_api_error error = {0};
        if (!kvl_api_request_parse(engine, "tiny", (kvl_api_kind)(round % 3), body, n, &r,
                                   &error)) {
            assert_in_range(error.http_status, 400, 404);
            assert_true(strlen(error.message) > 0);
            json_t *json = kvl_api_error_json(&error);
            assert_non_null(json);
            json_decref(json);
        }
        kvl_api_request_deinit(&r);
        assert_int_equal(kvl_alloc_live(), n_live);
    }
}

static void test_parsing_survives_want_of_memory(void **state)
{
    (void)state;
    const char *body = "{\"messages\": [{\"role\": \"user\", \"content\": \"hello you\"}],"
                       "\"stop\": [\"a\"]}";
    const int64_t n_live = kvl_alloc_live();
    for (int64_t n = 0;; n++) {
        kvl_api_request r;
        kvl_api_error error = {0};
        kvl_alloc_fail_after(n);
        const bool is_parsed = parse(true, body, &r, &error);
        kvl_alloc_fail_after(-1);
        kvl_api_request_deinit(&r);
        assert_int_equal(kvl_alloc_live(), n_live);
        if (is_parsed) return;
        assert_true(error.http_status == 500 || error.http_status == 400);
    }
}

/* ---- keys ---- */

static kvl_status open_keys(const char *text, kvl_http_keys **keys, kvl_error *error)
{
    char path[64];
    make_file(path, sizeof path);
    FILE *out = fopen(path, "w");
    assert_non_null(out);
    (void)fputs(text, out);
    (void)fclose(out);
    const kvl_status status = kvl_http_keys_open(path, keys, error);
    (void)unlink(path);
    return status;
}

static void test_keys_find_their_tenant_and_nobody_else(void **state)
{
    (void)state;
    kvl_http_keys *keys = NULL;
    kvl_error error = {0};
    assert_int_equal(open_keys("# us\n\nred 0123456789abcdef\nblue fedcba9876543210\n"
                               "red another-key-of-red",
                               &keys, &error),
                     KVL_OK);
    assert_string_equal(kvl_http_keys_find(keys, "Bearer 0123456789abcdef"), "red");
    assert_string_equal(kvl_http_keys_find(keys, "Bearer another-key-of-red"), "red");
    assert_string_equal(kvl_http_keys_find(keys, "Bearer fedcba9876543210"), "blue");
    static const char *const bad[] = {
        "Bearer 0123456789abcde",  "Bearer 0123456789abcdef0", "Bearer ",
        "bearer 0123456789abcdef", "0123456789abcdef",         ""};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_null(kvl_http_keys_find(keys, bad[i]));
    assert_null(kvl_http_keys_find(keys, NULL));
    const uint64_t red = kvl_http_keys_salt(keys, "red", "");
    assert_true(red == kvl_http_keys_salt(keys, "red", ""));
    assert_true(red != kvl_http_keys_salt(keys, "blue", ""));
    assert_true(red != kvl_http_keys_salt(keys, "red", "x"));
    /* Not a tenant's name and a salt run together. */
    assert_true(kvl_http_keys_salt(keys, "ab", "c") != kvl_http_keys_salt(keys, "a", "bc"));
    kvl_http_keys_close(keys);
}

static void test_without_a_file_everybody_may_ask(void **state)
{
    (void)state;
    kvl_http_keys *keys = NULL;
    kvl_error error = {0};
    assert_int_equal(kvl_http_keys_open(NULL, &keys, &error), KVL_OK);
    assert_false(kvl_http_keys_are_needed(keys));
    assert_string_equal(kvl_http_keys_find(keys, NULL), "");
    kvl_http_keys_close(keys);
}

static void test_bad_key_files_name_the_line(void **state)
{
    (void)state;
    static const char *const bad[] = {"red short\n",         "red\n",
                                      " 0123456789abcdef\n", "red two words-0123456789\n",
                                      "# nothing\n",         ""};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvl_http_keys *keys = NULL;
        kvl_error error = {0};
        assert_int_equal(open_keys(bad[i], &keys, &error), KVL_ERR_INVALID);
        assert_null(keys);
        if (i < 4) assert_non_null(strstr(error.text, "line 1"));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_field_arrives),
        cmocka_unit_test(test_completions_take_texts_and_ids),
        cmocka_unit_test(test_formats_but_text_are_refused_with_a_remedy),
        cmocka_unit_test(test_damaged_bodies_are_refused_with_reasons),
        cmocka_unit_test(test_parsing_survives_want_of_memory),
        cmocka_unit_test(test_keys_find_their_tenant_and_nobody_else),
        cmocka_unit_test(test_without_a_file_everybody_may_ask),
        cmocka_unit_test(test_bad_key_files_name_the_line),
    };
    return cmocka_run_group_tests(tests, open_engine, close_engine);
}
