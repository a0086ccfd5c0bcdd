/* host: healing: exact KV that is computed in slices behind an answer is that of a full prefill to
 * the last bit, whatever the slices; the queue is bounded and says what became of each answer. */
#include <math.h>
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
#include "host/decode.h"
#include "host/host_parts.h"
#include "test_random.h"
#include "tiny_engine.h"

enum { N_LAYERS = 3, N_CONTEXT = 256, ANSWER_MAX = 90 };

typedef struct fixture {
    kvl_engine *engine;
    kvl_random random;
} fixture;

static int setup(void **state)
{
    static fixture f;
    f = (fixture){.random = kvl_test_random()};
    kvl_tiny_gguf_options tiny = kvl_tiny_gguf_defaults("llama");
    tiny.n_layers = N_LAYERS;
    tiny.n_context = N_CONTEXT;
    f.engine = tiny_engine_open(&tiny, 1, 64);
    *state = &f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    kvl_engine_destroy(f->engine);
    return 0;
}

static kvl_sent_answer random_answer(fixture *f, uint32_t n_prompt, uint32_t n_answer)
{
    kvl_sent_answer sent = {.n_prompt = n_prompt, .n_answer = n_answer, .salt = 7};
    sent.tokens = kvl_alloc_zero(n_prompt + n_answer, sizeof *sent.tokens);
    assert_non_null(sent.tokens);
    for (uint32_t i = 0; i < n_prompt + n_answer; i++)
        sent.tokens[i] = kvl_test_below(&f->random, f->engine->shape->n_vocab);
    return sent;
}

/* The same in one batch: KV of all tokens, and how many of the answer's are the likeliest. */
typedef struct naive {
    float *keys, *values;
    size_t n_floats;
    uint32_t n_agreed, n_differed;
} naive;

static naive prefill(fixture *f, const kvl_sent_answer *sent)
{
    const kvl_model_shape *shape = f->engine->shape;
    const uint32_t n = sent->n_prompt + sent->n_answer;
    const size_t n_floats = (size_t)n * shape->n_layers * shape->n_kv_heads * shape->head_dim;
    naive made = {.n_floats = n_floats};
    made.keys = kvl_alloc_aligned(n_floats * sizeof(float));
    made.values = kvl_alloc_aligned(n_floats * sizeof(float));
    float *logits = kvl_alloc_aligned((size_t)n * shape->n_vocab * sizeof(float));
    kvl_session *session = NULL;
    uint32_t n_shared = 0;
    kvl_error error = {0};
    assert_int_equal(kvl_session_create(f->engine, &session, &error), KVL_OK);
    assert_int_equal(
        kvl_session_begin(session, sent->tokens, n, 0, false, sent->salt, &n_shared, &error),
        KVL_OK);
    assert_int_equal(kvl_session_compute_range(session, 0, n, n, logits, &error), KVL_OK);
    kvl_session_extract(session, 0, n, made.keys, made.values);
    bool parted = false;
    for (uint32_t i = 0; i < sent->n_answer; i++) {
        const float *row = logits + (size_t)(sent->n_prompt - 1 + i) * shape->n_vocab;
        const bool agrees =
            kvl_draw_token(row, shape->n_vocab, 0.0F, NULL) == sent->tokens[sent->n_prompt + i];
        parted = parted || !agrees;
        made.n_agreed += !parted;
        made.n_differed += !agrees;
    }
    kvl_session_destroy(session);
    kvl_free(logits);
    return made;
}

static void free_naive(naive *made)
{
    kvl_free(made->keys);
    kvl_free(made->values);
}

/* Some of the answer is what the model would say, so that agreement is tested too. */
static void say_truly(fixture *f, kvl_sent_answer *sent, uint32_t n_true)
{
    const kvl_model_shape *shape = f->engine->shape;
    float *logits = kvl_alloc_aligned(shape->n_vocab * sizeof(float));
    kvl_session *session = NULL;
    uint32_t n_shared = 0;
    kvl_error error = {0};
    assert_int_equal(kvl_session_create(f->engine, &session, &error), KVL_OK);
    assert_int_equal(kvl_session_begin(session, sent->tokens, sent->n_prompt, sent->n_answer, false,
                                       sent->salt, &n_shared, &error),
                     KVL_OK);
    assert_int_equal(kvl_session_compute_range(session, 0, sent->n_prompt, 1, logits, &error),
                     KVL_OK);
    for (uint32_t i = 0; i < n_true; i++) {
        const uint32_t token = kvl_draw_token(logits, shape->n_vocab, 0.0F, NULL);
        sent->tokens[sent->n_prompt + i] = token;
        assert_int_equal(kvl_session_append(session, &token, 1, &error), KVL_OK);
        assert_int_equal(kvl_session_compute_range(session, sent->n_prompt + i,
                                                   sent->n_prompt + i + 1, 1, logits, &error),
                         KVL_OK);
    }
    kvl_session_destroy(session);
    kvl_free(logits);
}

/* algorithms: a healed cache equals full prefill bit for bit; also behind a prefix that the tree
 * gives, and for slices of any length. */
static void test_slices_are_a_full_prefill_bit_for_bit(void **state)
{
    fixture *f = *state;
    for (int round = 0; round < 24; round++) {
        const uint32_t n_prompt = 1 + kvl_test_below(&f->random, 150);
        const uint32_t n_answer = kvl_test_below(&f->random, ANSWER_MAX);
        kvl_sent_answer sent = random_answer(f, n_prompt, n_answer);
        say_truly(f, &sent, n_answer == 0 ? 0 : kvl_test_below(&f->random, n_answer + 1));
        naive full = prefill(f, &sent);
        for (int again = 0; again < 2; again++) { /* the second time, the tree has the prompt */
            exact_check check = {0};
            kvl_error error = {0};
            assert_int_equal(exact_check_begin(&check, f->engine, &sent, 0, &error), KVL_OK);
            assert_true(again == 1 || n_prompt <= KVL_PAGE_TOKENS || check.n_done == 0);
            while (!exact_check_is_done(&check))
                assert_int_equal(
                    exact_check_step(&check, 1 + kvl_test_below(&f->random, 100), &error), KVL_OK);
            assert_int_equal(check.n_agreed, full.n_agreed);
            assert_int_equal(check.n_differed, full.n_differed);
            float *keys = kvl_alloc_aligned(full.n_floats * sizeof *keys);
            float *values = kvl_alloc_aligned(full.n_floats * sizeof *values);
            kvl_session_extract(check.session, 0, n_prompt + n_answer, keys, values);
            assert_memory_equal(keys, full.keys, full.n_floats * sizeof *keys);
            assert_memory_equal(values, full.values, full.n_floats * sizeof *values);
            assert_int_equal(
                kvl_session_keep_prefix(check.session, sent.salt, n_prompt + n_answer, &error),
                KVL_OK);
            exact_check_end(&check);
            kvl_free(keys);
            kvl_free(values);
        }
        free_naive(&full);
        kvl_free(sent.tokens);
    }
}

static void test_a_check_that_may_stop_stops(void **state)
{
    fixture *f = *state;
    kvl_sent_answer sent = random_answer(f, 20, ANSWER_MAX);
    exact_check check = {.stops_at_first = true};
    kvl_error error = {0};
    assert_int_equal(exact_check_begin(&check, f->engine, &sent, 0, &error), KVL_OK);
    while (!exact_check_is_done(&check))
        assert_int_equal(exact_check_step(&check, 1000, &error), KVL_OK);
    assert_true(check.has_differed);
    assert_true(check.n_done < sent.n_prompt + sent.n_answer);
    /* What comes next is what exact KV gives there. */
    assert_int_not_equal(kvl_draw_token(check.next, f->engine->shape->n_vocab, 0.0F, NULL),
                         sent.tokens[sent.n_prompt + check.n_agreed]);
    exact_check_end(&check);
    kvl_free(sent.tokens);
}

static void test_a_check_without_memory_leaks_nothing(void **state)
{
    fixture *f = *state;
    kvl_sent_answer sent = random_answer(f, 40, 10);
    const uint32_t n_free = kvl_page_pool_n_free(f->engine->pool);
    for (int64_t n = 0;; n++) {
        const int64_t alive = kvl_alloc_live();
        exact_check check = {0};
        kvl_error error = {0};
        kvl_alloc_fail_after(n);
        const kvl_status status = exact_check_begin(&check, f->engine, &sent, 0, &error);
        kvl_alloc_fail_after(-1);
        exact_check_end(&check);
        assert_int_equal(kvl_alloc_live(), alive);
        if (status == KVL_OK) break;
        assert_int_equal(status, KVL_ERR_NO_MEMORY);
    }
    assert_int_equal(kvl_page_pool_n_free(f->engine->pool), n_free);
    kvl_free(sent.tokens);
}

static Kvloom__V1__HealReply told(const kvl_host *host, const kvl_digest *home)
{
    Kvloom__V1__HealReply reply = KVLOOM__V1__HEAL_REPLY__INIT;
    heal_tell(host, home, &reply);
    return reply;
}

static void test_the_queue_drops_the_oldest_and_says_so(void **state)
{
    fixture *f = *state;
    enum { TOO_MANY = 3 };
    kvl_host *host = kvl_alloc_zero(1, sizeof *host);
    assert_non_null(host);
    host->engine = f->engine;
    host->clock = kvl_clock_system();
    kvl_digest homes[KVL_HEALS_MAX + TOO_MANY];
    for (uint32_t i = 0; i < KVL_HEALS_MAX + TOO_MANY; i++) {
        memset(homes[i].bytes, (int)i + 1, sizeof homes[i].bytes);
        heal_request asked = {.sent = random_answer(f, 10, 5), .home = homes[i], .swaps = true};
        heal_add(host, &asked);
        assert_null(asked.sent.tokens);
        assert_int_equal(told(host, &homes[i]).state, KVLOOM__V1__HEAL_STATE__HEAL_WAITING);
    }
    assert_int_equal(host->heals.n, KVL_HEALS_MAX);
    assert_int_equal(host->heals.n_dropped, TOO_MANY);
    for (uint32_t i = 0; i < TOO_MANY; i++)
        assert_int_equal(told(host, &homes[i]).state, KVLOOM__V1__HEAL_STATE__HEAL_DROPPED);
    assert_int_equal(told(host, &homes[TOO_MANY]).state, KVLOOM__V1__HEAL_STATE__HEAL_WAITING);
    const kvl_digest unknown = {{0}};
    assert_int_equal(told(host, &unknown).state, KVLOOM__V1__HEAL_STATE__HEAL_UNKNOWN);
    /* Without memory for a job the answer is dropped too, and nothing leaks. */
    heal_request asked = {.sent = random_answer(f, 10, 5), .swaps = true};
    kvl_alloc_fail_after(0);
    heal_add(host, &asked);
    kvl_alloc_fail_after(-1);
    assert_null(asked.sent.tokens);
    assert_int_equal(host->heals.n_dropped, TOO_MANY + 1);
    assert_int_equal(host->heals.n, KVL_HEALS_MAX);
    heal_deinit(host);
    assert_null(host->heals.last);
    kvl_free(host);
}

/* Audits, which nobody waits for, make room before answers do; what is under way goes last. */
static void test_audits_and_what_has_not_begun_are_dropped_first(void **state)
{
    fixture *f = *state;
    kvl_host *host = kvl_alloc_zero(1, sizeof *host);
    assert_non_null(host);
    host->engine = f->engine;
    host->clock = kvl_clock_system();
    kvl_digest homes[KVL_HEALS_MAX + 2];
    for (uint32_t i = 0; i < KVL_HEALS_MAX + 2; i++) {
        memset(homes[i].bytes, (int)i + 1, sizeof homes[i].bytes);
        heal_request asked = {.sent = random_answer(f, 10, 5), .home = homes[i], .swaps = i != 5};
        if (i == KVL_HEALS_MAX) {
            kvl_error error = {0};
            heal_job *first = host->heals.first;
            assert_int_equal(
                exact_check_begin(&first->check, f->engine, &first->asked.sent, 0, &error), KVL_OK);
        }
        heal_add(host, &asked);
    }
    assert_int_equal(host->heals.n_dropped, 2);
    assert_int_equal(told(host, &homes[0]).state, KVLOOM__V1__HEAL_STATE__HEAL_WAITING);
    assert_int_equal(told(host, &homes[1]).state, KVLOOM__V1__HEAL_STATE__HEAL_DROPPED);
    assert_int_equal(told(host, &homes[2]).state, KVLOOM__V1__HEAL_STATE__HEAL_WAITING);
    assert_int_equal(told(host, &homes[5]).state, KVLOOM__V1__HEAL_STATE__HEAL_UNKNOWN);
    uint32_t n = 0;
    for (const heal_job *job = host->heals.first; job != NULL; job = job->next) n++;
    assert_int_equal(n, KVL_HEALS_MAX);
    assert_int_equal(host->heals.n, n);
    heal_deinit(host);
    assert_null(host->heals.last);
    kvl_free(host);
}

/* A clock that goes on by some milliseconds whenever it is read. */
static int64_t tick(void *context)
{
    int64_t *now = context;
    return *now += 3 * KVL_NS_PER_MS;
}

/* Of the engine's time, healing takes its share beside other work, however long its slices are; no
 * share, no healing; and an idle hour is not saved up. */
static void test_healing_beside_other_work_takes_its_share(void **state)
{
    fixture *f = *state;
    const double shares[] = {0.0, 0.1, 0.5, 0.9};
    for (size_t s = 0; s < sizeof shares / sizeof *shares; s++) {
        kvl_host *host = kvl_alloc_zero(1, sizeof *host);
        assert_non_null(host);
        int64_t now = 0;
        const kvl_clock clock = {.monotonic_ns = tick, .context = &now};
        host->engine = f->engine;
        host->clock = &clock;
        host->heals.share = shares[s];
        int64_t worked_ns = 0;
        for (int i = 0; i < 200; i++) {
            while (host->heals.n < KVL_HEALS_MAX) {
                heal_request audit = {.sent = random_answer(f, 12, 8)};
                heal_add(host, &audit);
            }
            const int64_t step_ns = (1 + (int64_t)kvl_test_below(&f->random, 20)) * KVL_NS_PER_MS;
            worked_ns += step_ns;
            heal_beside(host, step_ns);
        }
        const int64_t beside_ns = host->heals.beside_ns;
        const double seen = (double)beside_ns / (double)(beside_ns + worked_ns);
        /* No more than the last slice off. */
        assert_true(fabs(seen - shares[s]) < 0.03);
        if (shares[s] > 0.0) {
            heal_deinit(host);
            heal_beside(host, 3600 * KVL_NS_PER_S);
            assert_true(host->heals.credit_ns <= KVL_NS_PER_S);
        }
        heal_deinit(host);
        kvl_free(host);
    }
}

static void test_nobody_gets_an_unhealed_one_by_the_exact_home(void **state)
{
    (void)state;
    kvl_host *host = kvl_alloc_zero(1, sizeof *host);
    assert_non_null(host);
    kvl_digest home = {{1, 2, 3}};
    const kvl_digest first = heal_unhealed_home(host, &home);
    assert_false(kvl_digest_equal(&first, &home));
    host->tenant_key[0] = 1;
    const kvl_digest of_another = heal_unhealed_home(host, &home);
    assert_false(kvl_digest_equal(&first, &of_another));
    kvl_free(host);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_slices_are_a_full_prefill_bit_for_bit, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_a_check_that_may_stop_stops, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_check_without_memory_leaks_nothing, setup, teardown),
        cmocka_unit_test_setup_teardown(test_audits_and_what_has_not_begun_are_dropped_first, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_healing_beside_other_work_takes_its_share, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_the_queue_drops_the_oldest_and_says_so, setup,
                                        teardown),
        cmocka_unit_test(test_nobody_gets_an_unhealed_one_by_the_exact_home),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
