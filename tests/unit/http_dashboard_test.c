/* http/dashboard: rings keep what they may, curves are those of a naive twin, hostile texts stay
 * texts, memory may fail; and a look at the tree of a service that runs, or does not. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <math.h>
#include <pthread.h>

#include "base/alloc.h"
#include "base/clock.h"
#include "http/dashboard.h"
#include "test_random.h"
#include "tiny_engine.h"

static kvl_engine *engine;

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

static void assert_near(double a, double b)
{
    assert_true(fabs(a - b) <= 1e-6 * (1.0 + fabs(b)));
}

static double at(const json_t *curves, const char *name, size_t i)
{
    const json_t *point = json_array_get(json_object_get(curves, name), i);
    assert_true(json_is_number(point));
    return json_number_value(point);
}

enum { SAMPLES_MAX = 3 * KVL_DASHBOARD_SAMPLES };

/* Against all samples that there ever were. */
static void check_curves(const kvl_dashboard_ring *ring, const kvl_dashboard_sample *all, size_t n,
                         int64_t now_ns)
{
    const size_t first = n > KVL_DASHBOARD_SAMPLES ? n - KVL_DASHBOARD_SAMPLES : 0;
    const size_t n_points = n == 0 ? 0 : n - first - 1;
    json_t *curves = kvl_dashboard_curves(ring, now_ns);
    const char *name;
    json_t *curve;
    assert_int_equal(json_object_size(curves), 6);
    json_object_foreach(curves, name, curve) assert_int_equal(json_array_size(curve), n_points);
    for (size_t i = 0; i < n_points; i++) {
        const kvl_dashboard_sample *a = &all[first + i];
        const kvl_dashboard_sample *b = &all[first + i + 1];
        const double s = (double)(b->at_ns - a->at_ns) / 1e9;
        const uint64_t n_first = b->n_first_tokens - a->n_first_tokens;
        const json_t *ttft = json_array_get(json_object_get(curves, "ttft_s"), i);
        assert_near(at(curves, "age_s", i), (double)(now_ns - b->at_ns) / 1e9);
        assert_near(at(curves, "tokens_per_s", i) * s,
                    (double)(b->n_answer_tokens - a->n_answer_tokens));
        assert_near(at(curves, "prompt_tokens_per_s", i) * s,
                    (double)(b->n_prompt_tokens - a->n_prompt_tokens));
        assert_int_equal((int64_t)at(curves, "running", i), b->n_running);
        assert_int_equal((int64_t)at(curves, "waiting", i), b->n_waiting);
        assert_int_equal(json_is_null(ttft), n_first == 0);
        if (n_first > 0)
            assert_near(json_real_value(ttft) * (double)n_first, b->ttft_s - a->ttft_s);
    }
    json_decref(curves);
}

static void test_a_ring_keeps_the_last_minutes(void **state)
{
    (void)state;
    static kvl_dashboard_sample all[SAMPLES_MAX];
    static kvl_dashboard_ring ring;
    kvl_random random = kvl_test_random();
    ring = (kvl_dashboard_ring){.n_ever = 0};
    for (size_t i = 0; i < SAMPLES_MAX; i++) {
        if (i % 97 == 0 || i < 3 || (i > 298 && i < 303)) check_curves(&ring, all, i, 1LL << 50);
        kvl_dashboard_sample *next = &all[i];
        if (i > 0) *next = all[i - 1];
        const uint32_t n_first = kvl_test_below(&random, 3);
        next->at_ns += 1 + (int64_t)kvl_test_below(&random, 1U << 31) * 2;
        next->n_answer_tokens += kvl_test_below(&random, 1000);
        next->n_prompt_tokens += kvl_test_below(&random, 100000);
        next->n_first_tokens += n_first;
        next->ttft_s += n_first * (double)kvl_test_below(&random, 1000) / 1000.0;
        next->n_running = kvl_test_below(&random, 64);
        next->n_waiting = kvl_test_below(&random, 64);
        kvl_dashboard_add(&ring, next);
    }
    check_curves(&ring, all, SAMPLES_MAX, 1LL << 50);
}

/* Two samples of one moment: nothing is divided by nothing. */
static void test_no_time_is_no_rate(void **state)
{
    (void)state;
    kvl_dashboard_ring ring = {.n_ever = 0};
    kvl_dashboard_add(&ring, &(kvl_dashboard_sample){.at_ns = 5});
    kvl_dashboard_add(&ring, &(kvl_dashboard_sample){.at_ns = 5, .n_answer_tokens = 9});
    json_t *curves = kvl_dashboard_curves(&ring, 5);
    assert_true(at(curves, "tokens_per_s", 0) == 0.0);
    json_decref(curves);
}

/* ---- texts ---- */

static void tokens_of(const char *text, uint32_t ids[KVL_PAGE_TOKENS])
{
    uint32_t *made = NULL;
    size_t n = 0;
    kvl_error error;
    assert_int_equal(kvl_tokenize(kvl_model_tokenizer(engine->model), text, strlen(text), false,
                                  &made, &n, &error),
                     KVL_OK);
    for (size_t i = 0; i < KVL_PAGE_TOKENS; i++) ids[i] = made[i % n];
    kvl_free(made);
}

/* The text of a tree's node behind dump and parse; what was dumped has nothing of mark-up. */
static json_t *round_trip(const kvl_prefix_view *view)
{
    json_t *tree = kvl_dashboard_tree(view, kvl_model_tokenizer(engine->model));
    size_t n = 0;
    char *bytes = kvl_dashboard_dump(tree, &n);
    assert_non_null(bytes);
    for (size_t i = 0; i < n; i++) {
        assert_null(strchr("<>&", bytes[i] == '\0' ? '<' : bytes[i]));
        assert_true((unsigned char)bytes[i] >= 0x20);
    }
    json_t *read = json_loadb(bytes, n, JSON_ALLOW_NUL, NULL);
    assert_non_null(read);
    assert_true(json_equal(read, tree));
    kvl_free(bytes);
    json_decref(tree);
    return read;
}

static void test_hostile_texts_stay_texts(void **state)
{
    (void)state;
    static const char *const texts[] = {"</script>", "<!--",     "\"}]",         "&lt;",
                                        "\\u003c",   "\n\t\x01", "\xE2\x80\xA8", "\xFF\xFE<"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        static kvl_prefix_view view;
        view = (kvl_prefix_view){.n_nodes = 1, .own_nodes = 1, .own_pages = 3, .other_pages = 2};
        view.nodes[0] = (kvl_prefix_node){.parent = KVL_PREFIX_VIEW_FIRST, .n_pages = 3};
        tokens_of(texts[i], view.nodes[0].ids);
        json_t *tree = round_trip(&view);
        const json_t *node = json_array_get(json_object_get(tree, "nodes"), 0);
        const char *text = json_string_value(json_object_get(node, "text"));
        assert_true(json_is_null(json_object_get(node, "parent")));
        assert_int_equal(json_integer_value(json_object_get(node, "tokens")), 3 * KVL_PAGE_TOKENS);
        const bool is_utf8 = texts[i][0] != '\xFF';
        if (is_utf8) assert_int_equal(strncmp(text, texts[i], 1), 0);
        json_decref(tree);
    }
}

/* Any ids at all, unknown ones too, and as many nodes as there may be. */
static void test_any_ids_are_text(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    static kvl_prefix_view view;
    for (int round = 0; round < 20; round++) {
        view = (kvl_prefix_view){.n_nodes = KVL_PREFIX_VIEW_NODES};
        for (uint32_t i = 0; i < KVL_PREFIX_VIEW_NODES; i++) {
            kvl_prefix_node *node = &view.nodes[i];
            node->parent = i == 0 ? KVL_PREFIX_VIEW_FIRST : kvl_test_below(&random, i);
            for (uint32_t t = 0; t < KVL_PAGE_TOKENS; t++)
                node->ids[t] = round == 0 ? UINT32_MAX : kvl_test_below(&random, 400);
        }
        json_t *tree = round_trip(&view);
        assert_int_equal(json_array_size(json_object_get(tree, "nodes")), KVL_PREFIX_VIEW_NODES);
        json_decref(tree);
    }
}

static void test_hosts_have_audits_and_peers(void **state)
{
    (void)state;
    kvl_host_figures figures = {.n_audits = 1, .n_peers = 2, .n_anchors = 7};
    figures.audits[0] = (kvl_host_audit){"blend", 4, 0.25, 0.75};
    memcpy(figures.peers[1].name, "<b>", 4);
    figures.peers[1].is_up = true;
    json_t *host = kvl_dashboard_host(&figures);
    const json_t *audit = json_array_get(json_object_get(host, "audits"), 0);
    const json_t *peer = json_array_get(json_object_get(host, "peers"), 1);
    assert_string_equal(json_string_value(json_object_get(audit, "action")), "blend");
    assert_true(json_real_value(json_object_get(audit, "kl")) == 0.25);
    assert_true(json_real_value(json_object_get(audit, "top1")) == 0.75);
    assert_true(json_is_true(json_object_get(peer, "is_up")));
    assert_int_equal(json_integer_value(json_object_get(host, "anchors")), 7);
    json_decref(host);
}

/* ---- a look ---- */

static void *run_service(void *service)
{
    kvl_service_run(service);
    return NULL;
}

static void look_at_a_service(void)
{
    kvl_error error;
    kvl_service *service = NULL;
    pthread_t thread;
    kvl_prefix_view view;
    assert_int_equal(
        kvl_service_create(engine, &(kvl_scheduler_options){.n_running_max = 2}, &service, &error),
        KVL_OK);
    /* Nobody is there yet; what was asked then is answered later, to nobody. */
    assert_int_equal(kvl_service_look(service, 1, 20, &view), KVL_ERR_TIMEOUT);
    assert_int_equal(pthread_create(&thread, NULL, run_service, service), 0);
    uint32_t ids[40];
    for (uint32_t i = 0; i < 40; i++) ids[i] = 5 + i;
    const kvl_generation asked = {.ids = ids,
                                  .n_ids = 40,
                                  .sampling = kvl_sampling_default(),
                                  .salt = 1,
                                  .max_tokens = 2,
                                  .n_branches = 1};
    kvl_stream *stream = NULL;
    assert_int_equal(kvl_service_start(service, &asked, &stream, &error), KVL_OK);
    kvl_stream_item *item;
    while (kvl_stream_next(stream, 1000, &item)) kvl_stream_item_destroy(item);
    kvl_stream_item_destroy(item);
    kvl_stream_close(stream);
    assert_int_equal(kvl_service_look(service, 1, 5000, &view), KVL_OK);
    assert_int_equal(view.n_nodes, 1);
    assert_int_equal(view.nodes[0].n_pages, 2);
    assert_memory_equal(view.nodes[0].ids, ids, sizeof view.nodes[0].ids);
    assert_int_equal(kvl_service_look(service, 2, 5000, &view), KVL_OK);
    assert_int_equal(view.n_nodes, 0);
    assert_int_equal(view.other_pages, 2);
    for (int64_t n = 0; n < 2; n++) {
        kvl_alloc_fail_after(n);
        const kvl_status status = kvl_service_look(service, 2, 5000, &view);
        kvl_alloc_fail_after(-1);
        assert_true(status == KVL_ERR_NO_MEMORY || status == KVL_OK);
    }
    kvl_service_stop(service);
    (void)pthread_join(thread, NULL);
    assert_int_equal(kvl_service_look(service, 1, 5000, &view), KVL_ERR_CANCELLED);
    kvl_service_destroy(service);
    (void)kvl_prefix_tree_evict(engine->tree, UINT32_MAX);
}

/* The second time the engine has what it makes when it is first used. */
static void test_a_look_comes_or_says_why_not(void **state)
{
    (void)state;
    look_at_a_service();
    const int64_t live = kvl_alloc_live();
    look_at_a_service();
    assert_int_equal(kvl_alloc_live(), live);
}

/* Without memory there is no answer, and nothing is left behind. Jansson's memory is not ours. */
static void test_a_dump_may_find_no_memory(void **state)
{
    (void)state;
    json_t *value = json_pack("[s, s]", "<a>", "b & c");
    size_t n = 0;
    const int64_t live = kvl_alloc_live();
    kvl_alloc_fail_after(0);
    assert_null(kvl_dashboard_dump(value, &n));
    kvl_alloc_fail_after(-1);
    assert_int_equal(kvl_alloc_live(), live);
    char *bytes = kvl_dashboard_dump(value, &n);
    const char *wanted = "[\"\\u003ca\\u003e\",\"b \\u0026 c\"]";
    assert_int_equal(n, strlen(wanted));
    assert_memory_equal(bytes, wanted, n);
    kvl_free(bytes);
    json_decref(value);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_ring_keeps_the_last_minutes),
        cmocka_unit_test(test_no_time_is_no_rate),
        cmocka_unit_test(test_hostile_texts_stay_texts),
        cmocka_unit_test(test_any_ids_are_text),
        cmocka_unit_test(test_hosts_have_audits_and_peers),
        cmocka_unit_test(test_a_dump_may_find_no_memory),
        cmocka_unit_test(test_a_look_comes_or_says_why_not),
    };
    return cmocka_run_group_tests(tests, open_engine, close_engine);
}
