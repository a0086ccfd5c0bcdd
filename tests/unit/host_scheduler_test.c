/* host/scheduler: whoever else is in the batch, however little room there is, and wherever a prompt
 * is cut: a greedy answer is the one that its prompt gets alone; forks, stop texts, pauses and
 * cancellations keep every page accounted for. */
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
#include "host/scheduler.h"
#include "test_random.h"
#include "tiny_engine.h"

/* Two hundred mixes show that tokens do not depend on them. The thread sanitizer, ten times slower,
 * looks for races, and some mixes have them all. */
#ifdef __SANITIZE_THREAD__
#define N_MIXES 30
#else
#define N_MIXES 200
#endif

enum {
    CONTEXT = 256,
    N_PAGES = 22, /* less than a context and a half: many mixes do not fit */
    PROMPT_MAX = 120,
    ANSWER_MAX = 90,
    MIXES = N_MIXES,
    REQUESTS_MAX = 12,
    BRANCHES = 4,
    TEXT_MAX = 1024,
};

typedef struct fixture {
    kvl_engine *engine;
    float *logits;
} fixture;

static int setup(void **state)
{
    static fixture f;
    kvl_tiny_gguf_options options = kvl_tiny_gguf_defaults("llama");
    options.is_mixed = true;
    options.n_context = CONTEXT;
    f.engine = tiny_engine_open(&options, 1, N_PAGES);
    f.logits = kvl_alloc(KVL_TINY_VOCABULARY * sizeof(float));
    assert_non_null(f.logits);
    *state = &f;
    return 0;
}

/* Every page is free or the tree's. */
static void assert_pages_back(const fixture *f)
{
    assert_int_equal(
        kvl_page_pool_n_free(f->engine->pool) + kvl_prefix_tree_n_pages(f->engine->tree), N_PAGES);
}

static int teardown(void **state)
{
    fixture *f = *state;
    assert_pages_back(f);
    kvl_free(f->logits);
    kvl_engine_destroy(f->engine);
    return 0;
}

/* ---- what one request asks and gets ---- */

typedef struct answer {
    uint32_t tokens[ANSWER_MAX + 1];
    uint32_t n_tokens;
    char text[TEXT_MAX];
    size_t n_text;
    kvl_finish finish;
} answer;

typedef struct asked {
    uint32_t ids[PROMPT_MAX];
    kvl_generation generation;
    uint64_t id;
    answer answers[BRANCHES];
    uint32_t n_finished;
    uint32_t n_cached;
    bool is_over;
} asked;

static void take(void *context, const kvl_generation_event *event)
{
    asked *own = context;
    assert_true(event->branch < BRANCHES);
    assert_false(own->is_over);
    answer *to = &own->answers[event->branch];
    assert_int_equal(to->finish, KVL_FINISH_NONE);
    if (event->drawn != NULL && event->n_tokens > to->n_tokens) {
        assert_int_equal(event->n_tokens, to->n_tokens + 1);
        assert_true(to->n_tokens < ANSWER_MAX);
        to->tokens[to->n_tokens++] = event->drawn->token;
    }
    assert_true(to->n_text + event->n_text_bytes < TEXT_MAX);
    memcpy(to->text + to->n_text, event->text, event->n_text_bytes);
    to->n_text += event->n_text_bytes;
    to->finish = event->finish;
    own->n_finished += event->finish != KVL_FINISH_NONE;
    own->n_cached = event->n_cached;
    own->is_over = event->is_last;
    if (event->is_last) assert_int_equal(own->n_finished, own->generation.n_branches);
}

/* Prompts of few different beginnings, so that they share prefixes of every depth. */
static void make_asked(kvl_random *random, asked *own)
{
    memset(own, 0, sizeof *own);
    const uint32_t n = 1 + kvl_test_below(random, PROMPT_MAX);
    const uint32_t n_shared = kvl_test_below(random, n + 1);
    const uint32_t family = kvl_test_below(random, 3);
    for (uint32_t i = 0; i < n; i++)
        own->ids[i] = i < n_shared ? (7 + 31 * family + 5 * i) % 256 : kvl_test_below(random, 256);
    own->generation = (kvl_generation){
        .ids = own->ids,
        .n_ids = n,
        .salt = kvl_test_below(random, 2),
        .max_tokens = 1 + kvl_test_below(random, ANSWER_MAX),
        .n_branches = 1,
        .sampling = kvl_sampling_default(),
        .ignore_end = true,
        .event = take,
        .context = own,
    };
}

static kvl_scheduler *make_scheduler_as(fixture *f, const kvl_scheduler_options *options)
{
    kvl_scheduler *scheduler = NULL;
    kvl_error error = {0};
    if (kvl_scheduler_create(f->engine, options, &scheduler, &error) != KVL_OK)
        fail_msg("%s", error.text);
    return scheduler;
}

static kvl_scheduler *make_scheduler(fixture *f, uint32_t n_running, uint32_t n_step_rows)
{
    const kvl_scheduler_options options = {.n_running_max = n_running, .n_step_rows = n_step_rows};
    return make_scheduler_as(f, &options);
}

static void submit(kvl_scheduler *scheduler, asked *own)
{
    kvl_error error = {0};
    if (kvl_scheduler_submit(scheduler, &own->generation, &own->id, &error) != KVL_OK)
        fail_msg("%s", error.text);
}

static void run_all(kvl_scheduler *scheduler)
{
    uint32_t n_steps = 0;
    while (kvl_scheduler_step(scheduler)) assert_true(++n_steps < 20000);
}

/* The answer of a session of its own, one token after another, without the prefix tree. */
static void answer_alone(fixture *f, const asked *own, uint32_t *tokens)
{
    const kvl_generation *g = &own->generation;
    kvl_session *session = NULL;
    kvl_error error = {0};
    uint32_t n_shared = 0;
    const uint32_t n_vocab = f->engine->shape->n_vocab;
    assert_int_equal(kvl_session_create(f->engine, &session, &error), KVL_OK);
    if (kvl_session_begin(session, own->ids, g->n_ids, g->max_tokens, false, 0, &n_shared,
                          &error) != KVL_OK)
        fail_msg("%s", error.text);
    assert_int_equal(kvl_session_compute_range(session, 0, g->n_ids, 1, f->logits, &error), KVL_OK);
    for (uint32_t i = 0; i < g->max_tokens; i++) {
        tokens[i] = kvl_draw_token(f->logits, n_vocab, 0.0F, NULL);
        assert_int_equal(kvl_session_append(session, &tokens[i], 1, &error), KVL_OK);
        assert_int_equal(kvl_session_compute_range(session, g->n_ids + i, g->n_ids + i + 1, 1,
                                                   f->logits, &error),
                         KVL_OK);
    }
    kvl_session_destroy(session);
}

static void assert_same_tokens(fixture *f, const asked *own)
{
    uint32_t expected[ANSWER_MAX];
    answer_alone(f, own, expected);
    for (uint32_t b = 0; b < own->generation.n_branches; b++) {
        assert_int_equal(own->answers[b].finish, KVL_FINISH_LENGTH);
        assert_int_equal(own->answers[b].n_tokens, own->generation.max_tokens);
        assert_memory_equal(own->answers[b].tokens, expected,
                            own->generation.max_tokens * sizeof *expected);
    }
}

/* ---- tests ---- */

static void test_mixes_answer_as_each_alone(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    static asked all[REQUESTS_MAX];
    uint64_t n_paused = 0;
    uint64_t n_cached = 0;
    for (int mix = 0; mix < MIXES; mix++) {
        /* Whole answers of single branches never have to pause. */
        const bool holds = mix % 4 == 3;
        const kvl_scheduler_options options = {.n_running_max = 1 + kvl_test_below(&random, 10),
                                               .n_step_rows = 1 + kvl_test_below(&random, 90),
                                               .holds_whole_answers = holds};
        kvl_scheduler *scheduler = make_scheduler_as(f, &options);
        const uint32_t n = 1 + kvl_test_below(&random, REQUESTS_MAX);
        for (uint32_t i = 0; i < n; i++) {
            make_asked(&random, &all[i]);
            if (!holds && kvl_test_below(&random, 4) == 0)
                all[i].generation.n_branches = 1 + kvl_test_below(&random, BRANCHES);
            /* Rows of a batch behind them change nothing either, nor do they. */
            all[i].generation.is_background = !holds && kvl_test_below(&random, 4) == 0;
            submit(scheduler, &all[i]);
            /* Requests come while others are under way. */
            for (uint32_t s = kvl_test_below(&random, 6); s > 0; s--)
                (void)kvl_scheduler_step(scheduler);
        }
        run_all(scheduler);
        kvl_scheduler_stats stats;
        kvl_scheduler_stats_read(scheduler, &stats);
        assert_int_equal(stats.n_running + stats.n_waiting, 0);
        if (holds) assert_int_equal(stats.n_paused, 0);
        n_paused += stats.n_paused;
        n_cached += stats.n_cached_tokens;
        kvl_scheduler_destroy(scheduler);
        assert_pages_back(f);
        /* Answers in a session need the pages that the tree holds: it gives them back. */
        for (uint32_t i = 0; i < n; i++) assert_same_tokens(f, &all[i]);
    }
    /* Otherwise the mixes were not what this test is about. */
    assert_true(n_paused > 10);
    assert_true(n_cached > 0);
}

static uint32_t tokens_so_far(const asked *own)
{
    uint32_t n = 0;
    for (uint32_t b = 0; b < own->generation.n_branches; b++) n += own->answers[b].n_tokens;
    return n;
}

/* Whatever the background holds: a request gets its place and its pages in the very next step, and
 * until it is over the background draws nothing; then it goes on, from where it was. */
static void test_the_background_stands_still_for_others(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    enum { ROWS = 6 };
    static asked rows[ROWS];
    static asked urgent;
    for (int round = 0; round < 20; round++) {
        kvl_scheduler *scheduler = make_scheduler(f, 3, 64);
        for (uint32_t i = 0; i < ROWS; i++) {
            make_asked(&random, &rows[i]);
            rows[i].generation.is_background = true;
            submit(scheduler, &rows[i]);
        }
        for (uint32_t s = kvl_test_below(&random, 40); s > 0; s--)
            (void)kvl_scheduler_step(scheduler);
        make_asked(&random, &urgent);
        submit(scheduler, &urgent);
        uint32_t before = 0;
        for (uint32_t i = 0; i < ROWS; i++) before += tokens_so_far(&rows[i]);
        uint32_t n_steps = 0;
        while (!urgent.is_over) {
            (void)kvl_scheduler_step(scheduler);
            n_steps++;
        }
        /* Steps of its prompt, and one for each token. */
        assert_true(n_steps <= urgent.generation.n_ids / 32 + 1 + urgent.generation.max_tokens);
        uint32_t after = 0;
        for (uint32_t i = 0; i < ROWS; i++) after += tokens_so_far(&rows[i]);
        assert_int_equal(after, before);
        run_all(scheduler);
        kvl_scheduler_stats stats;
        kvl_scheduler_stats_read(scheduler, &stats);
        assert_int_equal(stats.n_running + stats.n_waiting + stats.n_background, 0);
        kvl_scheduler_destroy(scheduler);
        assert_pages_back(f);
        assert_same_tokens(f, &urgent);
        for (uint32_t i = 0; i < ROWS; i++) assert_same_tokens(f, &rows[i]);
    }
}

/* A session whose positions from `first` on were computed behind another text, as if placed. */
static void fill_wrongly(fixture *f, asked *own, uint32_t first, kvl_sequence *sequence)
{
    kvl_session *session = NULL;
    kvl_error error = {0};
    uint32_t n_shared = 0;
    const uint32_t n = own->generation.n_ids;
    uint32_t other[PROMPT_MAX];
    memcpy(other, own->ids, n * sizeof *other);
    for (uint32_t i = first; i < n; i++) other[i] = (other[i] + 7) % 256;
    assert_int_equal(kvl_session_create(f->engine, &session, &error), KVL_OK);
    assert_int_equal(kvl_session_begin(session, other, n, 0, false, 0, &n_shared, &error), KVL_OK);
    assert_int_equal(kvl_session_compute_range(session, 0, n, 0, NULL, &error), KVL_OK);
    kvl_session_truncate(session, first);
    assert_int_equal(kvl_session_append(session, own->ids + first, n - first, &error), KVL_OK);
    assert_int_equal(
        kvl_sequence_of_session(sequence, f->engine, own->generation.salt, session, first, &error),
        KVL_OK);
    kvl_session_destroy(session);
}

/* KV that was placed is decoded from, and never found by anybody who asks for the exact one; and
 * what was given back for want of pages comes back exact. */
static void test_what_was_placed_stays_with_its_answer(void **state)
{
    fixture *f = *state;
    enum { N = 100, FIRST = 40, SALT = 4711 };
    static asked placed;
    static asked after;
    for (int is_stripped = 0; is_stripped < 2; is_stripped++) {
        kvl_scheduler *scheduler = make_scheduler(f, 4, 0);
        memset(&placed, 0, sizeof placed);
        for (uint32_t t = 0; t < N; t++) placed.ids[t] = (5 * t + 1) % 256;
        placed.generation = (kvl_generation){.ids = placed.ids,
                                             .n_ids = N,
                                             .salt = SALT + (uint64_t)is_stripped,
                                             .max_tokens = 8,
                                             .n_branches = 2,
                                             .sampling = kvl_sampling_default(),
                                             .ignore_end = true,
                                             .event = take,
                                             .context = &placed};
        placed.generation.sampling.temperature = 0.0F;
        kvl_sequence sequence;
        kvl_error error = {0};
        fill_wrongly(f, &placed, FIRST, &sequence);
        assert_int_equal(sequence.n_computed, N - 1);
        if (is_stripped) kvl_sequence_forget(&sequence, FIRST / 2);
        assert_int_equal(sequence.n_exact, is_stripped ? UINT32_MAX : FIRST);
        const kvl_reuse_report report = {.n_placed = N - FIRST, .is_approximate = true};
        assert_int_equal(kvl_scheduler_submit_filled(scheduler, &placed.generation, &sequence, 0,
                                                     &report, &placed.id, &error),
                         KVL_OK);
        run_all(scheduler);
        assert_true(placed.is_over);
        after = placed;
        memset(after.answers, 0, sizeof after.answers);
        after.n_finished = 0;
        after.is_over = false;
        after.generation.ids = after.ids;
        after.generation.context = &after;
        submit(scheduler, &after);
        run_all(scheduler);
        const uint32_t n_found = is_stripped ? N - 1 : FIRST;
        assert_int_equal(after.n_cached, n_found / KVL_PAGE_TOKENS * KVL_PAGE_TOKENS);
        kvl_scheduler_destroy(scheduler);
        assert_pages_back(f);
        assert_same_tokens(f, &after);
        const bool differs = memcmp(placed.answers[0].tokens, after.answers[0].tokens,
                                    sizeof placed.answers[0].tokens) != 0;
        assert_int_equal(differs, !is_stripped);
    }
}

/* Requests with one prefix that come together compute it once. */
static void test_a_common_prefix_is_computed_once(void **state)
{
    fixture *f = *state;
    kvl_scheduler *scheduler = make_scheduler(f, 8, 0);
    static asked all[8];
    enum { PREFIX = 96, SALT = 77 };
    for (uint32_t i = 0; i < 8; i++) {
        memset(&all[i], 0, sizeof all[i]);
        for (uint32_t t = 0; t < PREFIX; t++) all[i].ids[t] = 3 * t % 256;
        all[i].ids[PREFIX] = i;
        all[i].generation = (kvl_generation){.ids = all[i].ids,
                                             .n_ids = PREFIX + 1,
                                             .salt = SALT,
                                             .max_tokens = 4,
                                             .n_branches = 1,
                                             .sampling = kvl_sampling_default(),
                                             .ignore_end = true,
                                             .event = take,
                                             .context = &all[i]};
        submit(scheduler, &all[i]);
    }
    run_all(scheduler);
    kvl_scheduler_stats stats;
    kvl_scheduler_stats_read(scheduler, &stats);
    assert_int_equal(all[0].n_cached, 0);
    for (uint32_t i = 1; i < 8; i++) assert_int_equal(all[i].n_cached, PREFIX);
    /* Three rows of every answer are computed besides: the last token is only drawn. */
    assert_int_equal(stats.n_computed_rows, PREFIX + 8 * (1 + 3));
    kvl_scheduler_destroy(scheduler);
    for (uint32_t i = 0; i < 8; i++) assert_same_tokens(f, &all[i]);
}

/* n answers of one prompt cost one prompt; greedy ones are all alike, drawn ones are what a request
 * with that seed alone draws. */
static void test_branches_draw_by_their_own_seed(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    static asked together;
    static asked alone;
    for (int round = 0; round < 20; round++) {
        make_asked(&random, &together);
        together.generation.n_branches = BRANCHES;
        together.generation.seed = (uint64_t)round;
        together.generation.sampling.temperature = 0.9F;
        together.generation.sampling.top_p = round % 2 == 0 ? 0.9F : 1.0F;
        together.generation.sampling.presence_penalty = round % 3 == 0 ? 0.5F : 0.0F;
        kvl_scheduler *scheduler = make_scheduler(f, 3, 0);
        submit(scheduler, &together);
        run_all(scheduler);
        for (uint32_t b = 0; b < BRANCHES; b++) {
            alone = together;
            memset(alone.answers, 0, sizeof alone.answers);
            alone.n_finished = 0;
            alone.is_over = false;
            alone.generation.n_branches = 1;
            alone.generation.seed = together.generation.seed + b;
            alone.generation.ids = alone.ids;
            alone.generation.context = &alone;
            submit(scheduler, &alone);
            run_all(scheduler);
            assert_int_equal(alone.answers[0].n_tokens, together.answers[b].n_tokens);
            assert_memory_equal(alone.answers[0].tokens, together.answers[b].tokens,
                                alone.answers[0].n_tokens * sizeof(uint32_t));
            assert_memory_equal(alone.answers[0].text, together.answers[b].text, TEXT_MAX);
        }
        kvl_scheduler_destroy(scheduler);
    }
}

/* The text of a stopped answer is the whole answer's up to the stop text, wherever tokens end. */
static void test_stop_texts_cut_the_answer(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    static asked whole;
    static asked stopped;
    uint32_t n_stopped = 0;
    for (int round = 0; round < 60; round++) {
        make_asked(&random, &whole);
        whole.generation.max_tokens = ANSWER_MAX;
        whole.generation.seed = (uint64_t)round;
        whole.generation.sampling.temperature = 1.5F;
        kvl_scheduler *scheduler = make_scheduler(f, 2, 0);
        submit(scheduler, &whole);
        run_all(scheduler);
        const answer *all = &whole.answers[0];
        /* A piece of the answer's own text. */
        char stop[8] = {0};
        if (all->n_text > 12) {
            const size_t n = 1 + kvl_test_below(&random, 5);
            memcpy(stop, all->text + kvl_test_below(&random, (uint32_t)(all->n_text - n)), n);
        }
        if (strlen(stop) > 0) {
            const char *stops[] = {"no such text in any answer", stop};
            stopped = whole;
            memset(stopped.answers, 0, sizeof stopped.answers);
            stopped.n_finished = 0;
            stopped.is_over = false;
            stopped.generation.ids = stopped.ids;
            stopped.generation.context = &stopped;
            stopped.generation.stops = stops;
            stopped.generation.n_stops = 2;
            submit(scheduler, &stopped);
            run_all(scheduler);
            const char *at = memmem(all->text, all->n_text, stop, strlen(stop));
            assert_non_null(at);
            assert_int_equal(stopped.answers[0].finish, KVL_FINISH_STOP);
            assert_int_equal(stopped.answers[0].n_text, (size_t)(at - all->text));
            assert_memory_equal(stopped.answers[0].text, all->text, stopped.answers[0].n_text);
            n_stopped++;
        }
        kvl_scheduler_destroy(scheduler);
    }
    assert_true(n_stopped > 20);
}

/* Cancelled or finished: each answer of each request is told of once, and no page is lost. */
static void test_cancelling_gives_everything_back(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    static asked all[REQUESTS_MAX];
    for (int round = 0; round < 60; round++) {
        kvl_scheduler *scheduler = make_scheduler(f, 1 + kvl_test_below(&random, 6), 64);
        for (uint32_t i = 0; i < REQUESTS_MAX; i++) {
            make_asked(&random, &all[i]);
            all[i].generation.n_branches = 1 + kvl_test_below(&random, BRANCHES);
            submit(scheduler, &all[i]);
            if (kvl_test_below(&random, 2) == 0) (void)kvl_scheduler_step(scheduler);
            kvl_scheduler_cancel(scheduler, all[kvl_test_below(&random, i + 1)].id);
        }
        /* Sometimes the scheduler ends with requests under way. */
        const bool whole = round % 3 != 0;
        if (whole) run_all(scheduler);
        kvl_scheduler_destroy(scheduler);
        for (uint32_t i = 0; i < REQUESTS_MAX && whole; i++) assert_true(all[i].is_over);
        assert_pages_back(f);
        /* The tree keeps nodes of its own. */
        (void)kvl_prefix_tree_evict(f->engine->tree, N_PAGES);
        assert_int_equal(kvl_page_pool_n_free(f->engine->pool), N_PAGES);
    }
}

static void test_requests_are_refused_with_reasons(void **state)
{
    fixture *f = *state;
    const kvl_scheduler_options options = {.n_running_max = 2, .n_waiting_max = 2};
    kvl_scheduler *scheduler = NULL;
    kvl_error error = {0};
    assert_int_equal(kvl_scheduler_create(f->engine, &options, &scheduler, &error), KVL_OK);
    kvl_random random = kvl_test_random();
    static asked own;
    make_asked(&random, &own);
    kvl_generation bad = own.generation;
    uint64_t id = 0;
    bad.n_ids = 0;
    assert_int_equal(kvl_scheduler_submit(scheduler, &bad, &id, &error), KVL_ERR_OUT_OF_RANGE);
    bad = own.generation;
    bad.max_tokens = CONTEXT;
    assert_int_equal(kvl_scheduler_submit(scheduler, &bad, &id, &error), KVL_ERR_OUT_OF_RANGE);
    bad = own.generation;
    bad.sampling.top_p = 0.0F;
    assert_int_equal(kvl_scheduler_submit(scheduler, &bad, &id, &error), KVL_ERR_OUT_OF_RANGE);
    assert_non_null(strstr(error.text, "top_p"));
    bad = own.generation;
    const uint32_t outside[] = {1, KVL_TINY_VOCABULARY};
    bad.ids = outside;
    bad.n_ids = 2;
    assert_int_equal(kvl_scheduler_submit(scheduler, &bad, &id, &error), KVL_ERR_OUT_OF_RANGE);
    bad = own.generation;
    const char *nothing[] = {""};
    bad.stops = nothing;
    bad.n_stops = 1;
    assert_int_equal(kvl_scheduler_submit(scheduler, &bad, &id, &error), KVL_ERR_TOO_LARGE);
    submit(scheduler, &own);
    static asked second;
    make_asked(&random, &second);
    submit(scheduler, &second);
    assert_int_equal(kvl_scheduler_submit(scheduler, &own.generation, &id, &error), KVL_ERR_BUSY);
    run_all(scheduler);
    kvl_scheduler_destroy(scheduler);
}

/* However far memory lasts, every answer ends, well or with an error, and nothing leaks. */
static void test_every_allocation_may_fail(void **state)
{
    fixture *f = *state;
    kvl_random random = kvl_test_random();
    static asked own;
    bool is_whole = false;
    for (int64_t n_allowed = 0; !is_whole; n_allowed++) {
        make_asked(&random, &own);
        own.generation.n_branches = 3;
        own.generation.max_tokens = 6;
        const char *stops[] = {"never in it"};
        own.generation.stops = stops;
        own.generation.n_stops = 1;
        (void)kvl_prefix_tree_evict(f->engine->tree, N_PAGES);
        kvl_scheduler *scheduler = NULL;
        kvl_error error = {0};
        const kvl_scheduler_options options = {.n_running_max = 2};
        kvl_alloc_fail_after(n_allowed);
        kvl_status status = kvl_scheduler_create(f->engine, &options, &scheduler, &error);
        if (status == KVL_OK)
            status = kvl_scheduler_submit(scheduler, &own.generation, &own.id, &error);
        uint32_t n_steps = 0;
        while (status == KVL_OK && kvl_scheduler_step(scheduler) && n_steps < 100) n_steps++;
        kvl_alloc_fail_after(-1);
        if (status == KVL_OK) {
            run_all(scheduler);
            assert_true(own.is_over);
            is_whole = n_allowed > 400;
        }
        kvl_scheduler_destroy(scheduler);
        assert_pages_back(f);
    }
}

/* ---- order ---- */

static int64_t read_clock(void *context)
{
    return *(const int64_t *)context;
}

/* One answer at a time; the names of the requests in the order in which they were over. */
typedef struct finished {
    asked asked;
    char name;
    char *order;
} finished;

static void take_finished(void *context, const kvl_generation_event *event)
{
    finished *own = context;
    take(&own->asked, event);
    if (event->is_last) own->order[strlen(own->order)] = own->name;
}

static void make_finished(finished *own, char name, uint32_t beginning, char *order)
{
    *own = (finished){.name = name, .order = order};
    asked *a = &own->asked;
    const uint32_t n = 4 * KVL_PAGE_TOKENS + 3;
    for (uint32_t i = 0; i < n; i++) a->ids[i] = (beginning + 5 * i) % 256;
    a->ids[n - 1] = (uint32_t)(unsigned char)name;
    a->generation = (kvl_generation){.ids = a->ids,
                                     .n_ids = n,
                                     .max_tokens = 2,
                                     .n_branches = 1,
                                     .sampling = kvl_sampling_default(),
                                     .ignore_end = true,
                                     .event = take_finished,
                                     .context = own};
}

/* Two families of prompts come in turn: each family's run beside each other, since their prefix is
 * in the tree; but not before one that has waited for long. */
static void test_those_with_a_prefix_in_the_tree_go_first(void **state)
{
    fixture *f = *state;
    const struct {
        bool in_order;
        int64_t late_ns; /* when the second half comes */
        const char *expected;
    } cases[] = {
        {false, 0, "acebdf"},
        {true, 0, "abcdef"},
        {false, 60 * KVL_NS_PER_S, "abcdef"},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        int64_t now = 0;
        const kvl_clock clock = {.monotonic_ns = read_clock, .context = &now};
        const kvl_scheduler_options options = {
            .n_running_max = 1, .in_order = cases[c].in_order, .clock = &clock};
        kvl_scheduler *scheduler = make_scheduler_as(f, &options);
        char order[8] = {0};
        static finished all[6];
        for (uint32_t i = 0; i < 6; i++) {
            make_finished(&all[i], (char)('a' + i), 1000 * (uint32_t)c + 17 * (i % 2), order);
            now = cases[c].late_ns * i;
            submit(scheduler, &all[i].asked);
        }
        run_all(scheduler);
        assert_string_equal(order, cases[c].expected);
        kvl_scheduler_destroy(scheduler);
        assert_pages_back(f);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_those_with_a_prefix_in_the_tree_go_first, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_mixes_answer_as_each_alone, setup, teardown),
        cmocka_unit_test_setup_teardown(test_what_was_placed_stays_with_its_answer, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_the_background_stands_still_for_others, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_a_common_prefix_is_computed_once, setup, teardown),
        cmocka_unit_test_setup_teardown(test_branches_draw_by_their_own_seed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_stop_texts_cut_the_answer, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cancelling_gives_everything_back, setup, teardown),
        cmocka_unit_test_setup_teardown(test_requests_are_refused_with_reasons, setup, teardown),
        cmocka_unit_test_setup_teardown(test_every_allocation_may_fail, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
