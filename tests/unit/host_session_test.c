/* host/session: the same tokens give the same logits however they were computed: in one batch, in
 * pieces, scattered, behind a shared prefix, or placed from KV that was taken out.
 * Bound: rounding of float32 sums of a two-layer model with activations of size 1. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "host/decode.h"
#include "host/engine.h"
#include "test_random.h"
#include "tiny_engine.h"

#include <math.h>

enum { PROMPT_MAX = 120, N_PAGES = 64 };
static const float TOLERANCE = 2e-4F;

typedef struct fixture {
    kvl_engine *engine;
} fixture;

static void open_engine(fixture *f, const char *architecture)
{
    kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults(architecture);
    options.n_layers = 3;
    options.is_mixed = true;
    f->engine = tiny_engine_open(&options, 2, N_PAGES);
}

static int setup_llama(void **state)
{
    static fixture f;
    open_engine(&f, "llama");
    *state = &f;
    return 0;
}

static int setup_qwen2(void **state)
{
    static fixture f;
    open_engine(&f, "qwen2");
    *state = &f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    assert_int_equal(
        kvl_page_pool_n_free(f->engine->pool) + kvl_prefix_tree_n_pages(f->engine->tree), N_PAGES);
    kvl_engine_destroy(f->engine);
    return 0;
}

static uint32_t random_prompt(kvl_random *random, uint32_t *ids)
{
    const uint32_t n = 2 + kvl_test_below(random, PROMPT_MAX - 2);
    for (uint32_t i = 0; i < n; i++) ids[i] = kvl_test_below(random, 256);
    return n;
}

static kvl_session *begin(fixture *f, const uint32_t *ids, uint32_t n, bool use_tree,
                          uint32_t *n_shared)
{
    kvl_session *session = NULL;
    kvl_error error = {0};
    assert_int_equal(kvl_session_create(f->engine, &session, &error), KVL_OK);
    if (kvl_session_begin(session, ids, n, 4, use_tree, 7, n_shared, &error) != KVL_OK)
        fail_msg("%s", error.text);
    return session;
}

static void compute(kvl_session *session, uint32_t first, uint32_t past, float *logits)
{
    kvl_error error = {0};
    if (kvl_session_compute_range(session, first, past, logits == NULL ? 0 : 1, logits, &error) !=
        KVL_OK)
        fail_msg("%s", error.text);
}

static void full(fixture *f, const uint32_t *ids, uint32_t n, float *logits)
{
    uint32_t n_shared = 0;
    kvl_session *session = begin(f, ids, n, false, &n_shared);
    compute(session, 0, n, logits);
    kvl_session_destroy(session);
}

static void assert_close(const float *expected, const float *seen, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        if (!(fabsf(expected[i] - seen[i]) <= TOLERANCE))
            fail_msg("logit %u: %g expected, %g seen", i, (double)expected[i], (double)seen[i]);
    }
}

static void test_pieces_give_what_one_batch_gives(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    const uint32_t n_vocab = f->engine->shape->n_vocab;
    float expected[KVL_TINY_VOCABULARY], seen[KVL_TINY_VOCABULARY];
    uint32_t ids[PROMPT_MAX];
    for (int round = 0; round < 20; round++) {
        const uint32_t n = random_prompt(&random, ids);
        full(f, ids, n, expected);
        uint32_t n_shared = 0;
        kvl_session *session = begin(f, ids, n, false, &n_shared);
        for (uint32_t at = 0; at < n;) {
            const uint32_t past = at + 1 + kvl_test_below(&random, n - at);
            compute(session, at, past, past == n ? seen : NULL);
            at = past;
        }
        assert_close(expected, seen, n_vocab);
        kvl_session_destroy(session);
    }
}

static void test_shared_prefix_gives_what_full_prefill_gives(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    const uint32_t n_vocab = f->engine->shape->n_vocab;
    float expected[KVL_TINY_VOCABULARY], seen[KVL_TINY_VOCABULARY];
    uint32_t ids[PROMPT_MAX];
    uint32_t n_shared_ever = 0;
    for (int round = 0; round < 20; round++) {
        const uint32_t n = random_prompt(&random, ids);
        uint32_t n_shared = 0;
        kvl_session *first = begin(f, ids, n, true, &n_shared);
        compute(first, n_shared, n, seen);
        kvl_error error = {0};
        assert_int_equal(kvl_session_keep_prefix(first, 7, n, &error), KVL_OK);
        kvl_session_destroy(first);

        /* The same beginning, another end. */
        const uint32_t n_kept = kvl_test_below(&random, n);
        for (uint32_t i = n_kept; i < n; i++) ids[i] = kvl_test_below(&random, 256);
        full(f, ids, n, expected);
        kvl_session *second = begin(f, ids, n, true, &n_shared);
        assert_true(n_shared < n);
        n_shared_ever += n_shared;
        compute(second, n_shared, n, seen);
        assert_close(expected, seen, n_vocab);
        kvl_session_destroy(second);
    }
    assert_true(n_shared_ever > 0);
}

/* KV taken out and placed where it was is the KV that was there: what follows cannot tell.
 * Scattered tokens around it are computed in one batch, each seeing exactly what comes before it.
 */
static void test_placed_kv_gives_what_computed_kv_gives(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    const kvl_model_shape *shape = f->engine->shape;
    float expected[KVL_TINY_VOCABULARY], seen[KVL_TINY_VOCABULARY];
    uint32_t ids[PROMPT_MAX], positions[PROMPT_MAX];
    for (int round = 0; round < 20; round++) {
        const uint32_t n = random_prompt(&random, ids);
        const uint32_t first = kvl_test_below(&random, n - 1);
        const uint32_t n_placed = 1 + kvl_test_below(&random, n - 1 - first);
        const size_t n_floats =
            (size_t)shape->n_layers * n_placed * shape->n_kv_heads * shape->head_dim;
        float *keys = kvl_alloc(n_floats * sizeof *keys);
        float *values = kvl_alloc(n_floats * sizeof *values);
        uint32_t n_shared = 0;
        kvl_session *source = begin(f, ids, n, false, &n_shared);
        compute(source, 0, n, expected);
        kvl_session_extract(source, first, n_placed, keys, values);
        kvl_session_destroy(source);

        kvl_session *session = begin(f, ids, n, false, &n_shared);
        const kvl_kv_view kv = {shape->n_layers, n_placed, shape->n_kv_heads,
                                shape->head_dim, keys,     values};
        const kvl_placement placement = {&kv, 0, first, n_placed};
        kvl_session_place(session, &placement);
        uint32_t n_computed = 0;
        for (uint32_t p = 0; p < n; p++) {
            if (p < first || p >= first + n_placed) positions[n_computed++] = p;
        }
        kvl_error error = {0};
        assert_int_equal(kvl_session_compute(session, positions, n_computed, 1, seen, &error),
                         KVL_OK);
        assert_close(expected, seen, shape->n_vocab);
        kvl_session_destroy(session);
        kvl_free(keys);
        kvl_free(values);
    }
}

static void test_prompt_past_the_context_is_refused(void **state)
{
    fixture *f = *state;
    const uint32_t n = f->engine->n_positions;
    uint32_t *ids = kvl_alloc_zero(n + 1, sizeof *ids);
    const uint32_t refused[][2] = {{n + 1, 0}, {n, 1}, {1, n}, {1, UINT32_MAX}};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        kvl_session *session = NULL;
        kvl_error error = {0};
        uint32_t n_shared = 0;
        assert_int_equal(kvl_session_create(f->engine, &session, &error), KVL_OK);
        assert_int_equal(kvl_session_begin(session, ids, refused[i][0], refused[i][1], false, 0,
                                           &n_shared, &error),
                         KVL_ERR_OUT_OF_RANGE);
        kvl_session_destroy(session);
    }
    kvl_free(ids);
}

static void test_greedy_draw_takes_the_lowest_of_equals(void **state)
{
    (void)state;
    kvl_random random = {1};
    const float logits[] = {0.0F, 3.0F, 3.0F, -1.0F};
    assert_int_equal(kvl_draw_token(logits, 4, 0.0F, &random), 1);
    /* At a high temperature everything is drawn some time; at a low one only the highest two. */
    bool seen[4] = {false};
    for (int i = 0; i < 400; i++) seen[kvl_draw_token(logits, 4, 50.0F, &random)] = true;
    assert_true(seen[0] && seen[1] && seen[2] && seen[3]);
    for (int i = 0; i < 100; i++) {
        const uint32_t drawn = kvl_draw_token(logits, 4, 0.05F, &random);
        assert_true(drawn == 1 || drawn == 2);
    }
}

/* ---- guesses ---- */

enum { ANSWER_MAX = 10 };

typedef struct answer {
    uint32_t tokens[ANSWER_MAX + 1], n_drawn; /* with the one that ended it */
    uint32_t n_tokens, n_kept, stop_at;
    bool ended;
    float logits[KVL_TINY_VOCABULARY]; /* behind the last token, as the session has it */
} answer;

static bool note_token(void *context, uint32_t token, const float *logits)
{
    answer *a = context;
    assert_int_equal(token, kvl_draw_token(logits, KVL_TINY_VOCABULARY, 0.0F, NULL));
    a->tokens[a->n_drawn++] = token;
    return a->n_drawn == a->stop_at;
}

static answer decode_behind(fixture *f, const uint32_t *ids, uint32_t n, const uint32_t *guess,
                            uint32_t n_guess, uint32_t max_tokens, uint32_t stop_at)
{
    answer a = {.stop_at = stop_at};
    uint32_t n_shared = 0;
    float logits[KVL_TINY_VOCABULARY];
    kvl_session *session = begin(f, ids, n, false, &n_shared);
    compute(session, 0, n, logits);
    const kvl_decode_options options = {.max_tokens = max_tokens,
                                        .guess = guess,
                                        .n_guess = n_guess,
                                        .keep_last = true,
                                        .drawn = note_token,
                                        .context = &a};
    kvl_error error = {0};
    if (kvl_decode(session, f->engine, &options, logits, &a.n_tokens, &a.ended, &a.n_kept,
                   &error) != KVL_OK)
        fail_msg("%s", error.text);
    assert_int_equal(kvl_session_n_tokens(session), n + a.n_tokens);
    for (uint32_t i = 0; i < a.n_tokens; i++)
        assert_int_equal(kvl_session_tokens(session)[n + i], a.tokens[i]);
    /* One more token on top of the KV that was left: wrong KV would show. */
    const uint32_t next = 1;
    assert_int_equal(kvl_session_append(session, &next, 1, &error), KVL_OK);
    compute(session, n + a.n_tokens, n + a.n_tokens + 1, a.logits);
    kvl_session_destroy(session);
    return a;
}

/* Right, wrong from some token on, too long, or stopped in the middle: the answer is the same. */
static void test_a_guess_changes_no_answer(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    uint32_t n_kept_whole = 0, n_kept_partly = 0;
    for (int round = 0; round < 60; round++) {
        uint32_t ids[PROMPT_MAX], guess[ANSWER_MAX];
        const uint32_t n = random_prompt(&random, ids);
        const uint32_t max_tokens = 1 + kvl_test_below(&random, ANSWER_MAX);
        const uint32_t stop_at = kvl_test_below(&random, 2 * ANSWER_MAX);
        const answer plain = decode_behind(f, ids, n, NULL, 0, max_tokens, stop_at);
        const answer longest = decode_behind(f, ids, n, NULL, 0, ANSWER_MAX, 0);
        const uint32_t n_guess = kvl_test_below(&random, longest.n_tokens + 1);
        const uint32_t wrong_at = kvl_test_below(&random, 2 * ANSWER_MAX);
        for (uint32_t i = 0; i < n_guess; i++) {
            const uint32_t other = longest.tokens[i] == 5 ? 6 : 5;
            guess[i] = i == wrong_at ? other : longest.tokens[i];
        }
        const answer guessed = decode_behind(f, ids, n, guess, n_guess, max_tokens, stop_at);
        assert_int_equal(guessed.n_tokens, plain.n_tokens);
        assert_int_equal(guessed.n_drawn, plain.n_drawn);
        assert_int_equal(guessed.ended, plain.ended);
        assert_memory_equal(guessed.tokens, plain.tokens, plain.n_drawn * sizeof *plain.tokens);
        assert_close(plain.logits, guessed.logits, KVL_TINY_VOCABULARY);
        uint32_t n_most = n_guess < wrong_at ? n_guess : wrong_at;
        if (n_most > plain.n_tokens) n_most = plain.n_tokens;
        assert_int_equal(guessed.n_kept, n_most);
        n_kept_whole += n_guess > 1 && guessed.n_kept == n_guess;
        n_kept_partly += guessed.n_kept > 0 && guessed.n_kept < n_guess;
    }
    assert_true(n_kept_whole > 0 && n_kept_partly > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_pieces_give_what_one_batch_gives, setup_llama,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_pieces_give_what_one_batch_gives, setup_qwen2,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_shared_prefix_gives_what_full_prefill_gives,
                                        setup_llama, teardown),
        cmocka_unit_test_setup_teardown(test_placed_kv_gives_what_computed_kv_gives, setup_llama,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_placed_kv_gives_what_computed_kv_gives, setup_qwen2,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_prompt_past_the_context_is_refused, setup_llama,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_a_guess_changes_no_answer, setup_llama, teardown),
        cmocka_unit_test_setup_teardown(test_a_guess_changes_no_answer, setup_qwen2, teardown),
        cmocka_unit_test(test_greedy_draw_takes_the_lowest_of_equals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
