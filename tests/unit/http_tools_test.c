/* http/tools: signatures into the prompt, calls out of the answer, however the answer is cut; what
 * is no call stays text. */
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
#include "http/tools.h"
#include "model/model.h"
#include "test_random.h"
#include "tiny_engine.h"

#define TOOLS                                                                                      \
    "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"get_weather\",\"description\":"    \
    "\"now\",\"parameters\":{\"type\":\"object\",\"properties\":{\"city\":{\"type\":\"string\"}}}" \
    "}},{\"type\":\"function\",\"function\":{\"name\":\"add\"}}]"
#define CALL_A                                                                                     \
    "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>"
#define CALL_B                                                                                     \
    "<tool_call>{\"name\":\"add\",\"arguments\":{\"a\":1,\"b\":[2,\"</x>\"]}}</tool_call>"

static kvl_engine *engine;

static int open_engine(void **state)
{
    (void)state;
    const kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("llama");
    engine = tiny_engine_open(&options, 1, 0);
    assert_memory_equal(kvl_chat_template_name(kvl_model_chat_template(engine->model)), "chatml",
                        6);
    return 0;
}

static int close_engine(void **state)
{
    (void)state;
    kvl_engine_destroy(engine);
    return 0;
}

/* What was refused: the parameter, in static memory; NULL where it was taken. */
static const char *translate(const char *body, kvl_api_request *request)
{
    static kvl_api_error error;
    error = (kvl_api_error){0};
    *request = (kvl_api_request){.kind = KVL_API_CHAT, .is_chat = true};
    request->body = json_loads(body, 0, NULL);
    assert_non_null(request->body);
    if (kvl_tools_translate(engine, request, &error)) return NULL;
    assert_int_equal(error.http_status, 400);
    assert_true(strlen(error.message) > 0);
    return error.param;
}

static const char *content_of(const kvl_api_request *request, size_t index, const char *role)
{
    const json_t *message = json_array_get(json_object_get(request->body, "messages"), index);
    const char *has = json_string_value(json_object_get(message, "role"));
    if (has == NULL) return NULL;
    assert_string_equal(has, role);
    return json_string_value(json_object_get(message, "content"));
}

static void test_signatures_stand_in_the_systems_message(void **state)
{
    (void)state;
    kvl_api_request r;
    assert_null(translate("{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]," TOOLS "}", &r));
    const char *system = content_of(&r, 0, "system");
    assert_non_null(strstr(system, "assistant"));
    assert_non_null(strstr(system, "\"name\": \"get_weather\""));
    assert_string_equal(content_of(&r, 1, "user"), "hi");
    kvl_api_request_deinit(&r);
    assert_null(translate("{\"messages\":[{\"role\":\"developer\",\"content\":[{\"type\":\"text\","
                          "\"text\":\"Be\"},{\"type\":\"text\",\"text\":\" brief.\"}]},"
                          "{\"role\":\"user\",\"content\":\"hi\"}]," TOOLS "}",
                          &r));
    system = content_of(&r, 0, "system");
    assert_memory_equal(system, "Be brief.\n\n# Tools", 18);
    assert_int_equal(json_array_size(json_object_get(r.body, "messages")), 2);
    kvl_api_request_deinit(&r);
    /* None are wanted: nothing changes. */
    assert_null(translate("{\"tool_choice\":\"none\",\"messages\":[{\"role\":\"user\",\"content\":"
                          "\"hi\"}]," TOOLS "}",
                          &r));
    assert_string_equal(content_of(&r, 0, "user"), "hi");
    assert_null(r.tools);
    kvl_api_request_deinit(&r);
}

static void test_calls_and_answers_become_text(void **state)
{
    (void)state;
    kvl_api_request r;
    assert_null(translate(
        "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"},{\"role\":\"assistant\",\"content\":"
        "null,\"tool_calls\":[{\"id\":\"1\",\"type\":\"function\",\"function\":{\"name\":\"add\","
        "\"arguments\":\"{\\\"a\\\": 1}\"}},{\"function\":{\"name\":\"add\",\"arguments\":\"{}\"}}]"
        "},{\"role\":\"tool\",\"tool_call_id\":\"1\",\"content\":\"3\"},{\"role\":\"tool\","
        "\"tool_call_id\":\"2\",\"content\":\"4\"},{\"role\":\"user\",\"content\":\"so?\"}]}",
        &r));
    assert_string_equal(content_of(&r, 1, "assistant"),
                        "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>"
                        "\n<tool_call>\n{\"name\": \"add\", \"arguments\": {}}\n</tool_call>");
    assert_string_equal(
        content_of(&r, 2, "user"),
        "<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response>");
    assert_string_equal(content_of(&r, 3, "user"), "so?");
    assert_null(content_of(&r, 4, "user"));
    kvl_api_request_deinit(&r);
}

static void test_what_cannot_be_is_refused_by_name(void **state)
{
    (void)state;
#define HI "\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]"
    static const struct {
        const char *body, *param;
    } cases[] = {
        {"{\"tools\":5," HI "}", "tools"},
        {"{\"tools\":[{}]," HI "}", "tools[0]"},
        {"{\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"a b\"}}]," HI "}",
         "tools[0]"},
        {"{\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"a\",\"parameters\":[]}}]," HI
         "}",
         "tools[0]"},
        {"{\"tool_choice\":\"required\"," TOOLS "," HI "}", "tool_choice"},
        {"{\"tool_choice\":{\"type\":\"function\"}," TOOLS "," HI "}", "tool_choice"},
        {"{\"messages\":[{\"role\":\"tool\",\"content\":\"x\"}]}", "messages"},
        {"{\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{}]}]}", "messages"},
        {"{\"messages\":[{\"role\":\"system\",\"content\":5}]," TOOLS "}", "messages[0]"},
        {"{\"messages\":[{\"role\":\"tool\",\"tool_call_id\":\"1\"}]}", "messages[0]"},
        {"{\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{\"name\":\"a\","
         "\"arguments\":\"{\"}}]}]}",
         "messages"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kvl_api_request r;
        const char *param = translate(cases[i].body, &r);
        assert_non_null(param);
        assert_string_equal(param, cases[i].param);
        kvl_api_request_deinit(&r);
    }
}

static void check_calls(const char *text, size_t n_calls, size_t n_before)
{
    kvl_api_request r;
    assert_null(translate("{" HI "," TOOLS "}", &r));
    size_t n_content = 0;
    json_t *calls = kvl_tools_calls(&r, text, strlen(text), &n_content);
    assert_int_equal(json_array_size(calls), n_calls);
    assert_int_equal(n_content, n_before);
    for (size_t i = 0; i < n_calls; i++) {
        const json_t *call = json_array_get(calls, i);
        const json_t *arguments = json_object_get(json_object_get(call, "function"), "arguments");
        json_t *parsed = json_loads(json_string_value(arguments), 0, NULL);
        assert_true(json_is_object(parsed)); /* a text that is JSON, as OpenAI has it */
        json_decref(parsed);
        assert_memory_equal(json_string_value(json_object_get(call, "id")), "call_", 5);
    }
    json_decref(calls);
    kvl_api_request_deinit(&r);
}

static void test_calls_are_found_and_what_is_none_stays(void **state)
{
    (void)state;
    check_calls(CALL_A, 1, 0);
    check_calls("I will look.\n\n" CALL_A "\n" CALL_B, 2, strlen("I will look."));
    check_calls("<tool_call>{\"name\":\"add\",\"arguments\":{}}", 1, 0); /* ended without a mark */
    /* Nothing but a call, without marks. */
    check_calls("{\"name\":\"add\",\"arguments\":{}}\n", 1, 0);
    check_calls("```json\n{\"name\":\"add\",\"arguments\":{}}\n```", 1, 0);
    static const char *const none[] = {
        "{\"name\":\"add\"}",
        "So: {\"name\":\"add\",\"arguments\":{}}",
        "```",
        "```json```",
        "{\"name\":\"rm\",\"arguments\":{}}",
        "",
        "no call",
        "<tool_call>",
        "<tool_call>{\"name\":\"add\"}</tool_call>",
        "<tool_call>{\"name\":\"rm\",\"arguments\":{}}</tool_call>",
        "<tool_call>{\"name\":\"add\",\"arguments\":{</tool_call>",
        CALL_A "<tool_call>{}",
        "<tool_call>{\"name\":\"add\",\"arguments\":[1]}</tool_call>",
    };
    for (size_t i = 0; i < sizeof none / sizeof *none; i++)
        check_calls(none[i], 0, strlen(none[i]));
}

/* Whatever the pieces that an answer comes in, its chunks put together are the whole answer's. */
static void test_a_stream_says_what_the_whole_says(void **state)
{
    (void)state;
    static const char *const texts[] = {"Well < then <tool",
                                        "I will.\n" CALL_A "\n" CALL_B,
                                        CALL_B,
                                        "<tool_call>nothing",
                                        "a\n\nb <tool_call",
                                        "",
                                        "{\"name\":\"add\",\"arguments\":{}}",
                                        "``` is code",
                                        " {not JSON",
                                        "{\"name\":\"rm\",\"arguments\":{}}"};
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 600; round++) {
        const char *text = texts[round % 10];
        kvl_api_request r;
        assert_null(translate("{" HI "," TOOLS "}", &r));
        r.is_stream = true;
        r.model_name = "tiny";
        kvl_api_answer *answer = kvl_alloc_zero(1, sizeof *answer);
        char content[512] = "";
        size_t n_calls = 0, n_whole = 0;
        const char *finish = NULL;
        json_t *last = NULL;
        for (size_t at = 0; finish == NULL;) {
            size_t n = kvl_test_below(&random, 6);
            if (n > strlen(text) - at) n = strlen(text) - at;
            const bool is_end = at + n == strlen(text) && kvl_test_below(&random, 2) == 0;
            const kvl_generation_event event = {
                .text = text + at,
                .n_text_bytes = n,
                .finish = is_end ? KVL_FINISH_STOP : KVL_FINISH_NONE,
            };
            at += n;
            assert_true(kvl_api_answer_add(answer, &r, kvl_model_tokenizer(engine->model), &event));
            json_t *made = kvl_api_piece(&r, answer, kvl_model_tokenizer(engine->model), &event);
            const json_t *choice = json_array_get(json_object_get(made, "choices"), 0);
            const json_t *delta = json_object_get(choice, "delta");
            const char *more = json_string_value(json_object_get(delta, "content"));
            if (more != NULL) strncat(content, more, sizeof content - strlen(content) - 1);
            n_calls += json_array_size(json_object_get(delta, "tool_calls"));
            finish = json_string_value(json_object_get(choice, "finish_reason"));
            json_decref(last);
            last = made;
        }
        json_t *calls = kvl_tools_calls(&r, text, strlen(text), &n_whole);
        assert_int_equal(n_calls, json_array_size(calls));
        assert_int_equal(strlen(content), n_whole);
        assert_memory_equal(content, text, n_whole);
        assert_string_equal(finish, calls == NULL ? "stop" : "tool_calls");
        json_decref(calls);
        json_decref(last);
        kvl_api_answer_deinit(answer);
        kvl_free(answer);
        kvl_api_request_deinit(&r);
    }
}

static void test_damaged_requests_leak_nothing(void **state)
{
    (void)state;
    static const char whole[] = "{\"messages\":[{\"role\":\"assistant\",\"content\":\"x\","
                                "\"tool_calls\":[{\"function\":{\"name\":\"add\",\"arguments\":"
                                "\"{}\"}}]},{\"role\":\"tool\",\"tool_call_id\":\"1\",\"content\":"
                                "\"3\"}]," TOOLS "}";
    kvl_random random = kvl_test_random();
    const int64_t live = kvl_alloc_live();
    for (int round = 0; round < 4000; round++) {
        char body[sizeof whole];
        memcpy(body, whole, sizeof whole);
        for (uint32_t i = kvl_test_below(&random, 3); i > 0; i--)
            body[kvl_test_below(&random, sizeof whole - 1)] = (char)kvl_test_below(&random, 128);
        kvl_api_request r;
        kvl_api_error error = {0};
        if (!kvl_api_request_parse(engine, "tiny", KVL_API_CHAT, body, sizeof whole - 1, &r,
                                   &error))
            assert_in_range(error.http_status, 400, 404);
        kvl_api_request_deinit(&r);
        assert_int_equal(kvl_alloc_live(), live);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_signatures_stand_in_the_systems_message),
        cmocka_unit_test(test_calls_and_answers_become_text),
        cmocka_unit_test(test_what_cannot_be_is_refused_by_name),
        cmocka_unit_test(test_calls_are_found_and_what_is_none_stays),
        cmocka_unit_test(test_a_stream_says_what_the_whole_says),
        cmocka_unit_test(test_damaged_requests_leak_nothing),
    };
    return cmocka_run_group_tests(tests, open_engine, close_engine);
}
