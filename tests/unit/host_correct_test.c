/* host: what is done to placed KV inside of a walk over the layers: probes move the other tokens
 * as a twin does that computes the chosen ones anew for every layer; a walk that is only watched
 * computes the same bits. */
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
#include "host/host_parts.h"
#include "placed_kv.h"
#include "tiny_engine.h"

#include <math.h>

enum { N_CONTEXT = 1600, N_PAGES = 220, ROUNDS = 8, SHORT = 120, LONG = 1500 };

typedef struct fixture {
    kvl_engine *engine;
    kvl_random random;
    kvl_host host; /* as much of one as a run's computing needs */
    uint32_t ids[N_CONTEXT], n;
    size_t width;
} fixture;

static int setup(void **state)
{
    static fixture f;
    f = (fixture){.random = kvl_test_random()};
    kvl_tiny_gguf_options tiny = kvl_tiny_gguf_defaults("llama");
    tiny.n_layers = 4;
    tiny.n_context = N_CONTEXT;
    f.engine = tiny_engine_open(&tiny, 2, N_PAGES);
    f.host.engine = f.engine;
    f.host.logits = kvl_alloc_aligned(f.engine->shape->n_vocab * sizeof(float));
    assert_non_null(f.host.logits);
    f.width = (size_t)f.engine->shape->n_kv_heads * f.engine->shape->head_dim;
    *state = &f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    assert_int_equal(kvl_page_pool_n_free(f->engine->pool), N_PAGES);
    kvl_free(f->host.logits);
    kvl_engine_destroy(f->engine);
    return 0;
}

static kv draw(fixture *f, uint32_t n)
{
    f->n = n;
    for (uint32_t i = 0; i < n; i++) f->ids[i] = kvl_test_below(&f->random, 256);
    return kv_random(f->engine, n, &f->random);
}

static kvl_session *placed(fixture *f, const kv *stale)
{
    kvl_session *session = NULL;
    uint32_t n_shared = 0;
    kvl_error error = {0};
    assert_int_equal(kvl_session_create(f->engine, &session, &error), KVL_OK);
    assert_int_equal(kvl_session_begin(session, f->ids, f->n, 0, false, 1, &n_shared, &error),
                     KVL_OK);
    kv_place(session, stale, 0);
    return session;
}

/* What is chosen, and, behind it, the last token, which is always computed. */
static uint32_t choose(fixture *f, uint32_t one_of, uint32_t *positions)
{
    uint32_t n = 0;
    for (uint32_t p = 0; p + 1 < f->n; p++) {
        if (kvl_test_below(&f->random, one_of) == 0) positions[n++] = p;
    }
    positions[n] = f->n - 1;
    return n;
}

/* Layers 0 and 1 of everything that was placed are computed here, as blending does. */
static void deviate_all(fixture *f, kvl_session *session, float *deviation)
{
    kvl_error error = {0};
    const kvl_deviation_check check = {.layer = 1};
    uint32_t all[N_CONTEXT];
    for (uint32_t p = 0; p < f->n; p++) all[p] = p;
    assert_int_equal(kvl_session_deviation(session, &check, all, f->n, deviation, &error), KVL_OK);
}

static void run_probes(fixture *f, kvl_session *session, uint32_t *positions, uint32_t n_chosen,
                       bool *has_probe)
{
    static const kvl_correction probe = {"probe", KVL_CORRECT_PROBE};
    run *r = kvl_alloc_zero(1, sizeof *r);
    uint32_t *last = kvl_alloc_zero(1, sizeof *last);
    assert_true(r != NULL && last != NULL);
    *last = f->n - 1;
    *r = (run){.host = &f->host,
               .session = session,
               .positions = last,
               .n_ids = f->n,
               .correction = &probe};
    const kvl_select_run placed_run = {0, f->n - 1};
    kvl_error error = {0};
    assert_int_equal(run_choose_probes(r, &placed_run, 1, 1, positions, n_chosen, &error), KVL_OK);
    assert_null(r->deviation);
    r->positions = positions;
    *has_probe = r->probe != NULL;
    assert_int_equal(r->n_shifted, *has_probe ? f->n - 1 - n_chosen : 0);
    assert_int_equal(run_compute(r, n_chosen + 1, &error), KVL_OK);
    assert_null(r->probe);
    kvl_free(r);
    kvl_free(last);
}

static bool is_in(uint32_t position, const uint32_t *positions, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        if (positions[i] == position) return true;
    }
    return false;
}

/* One layer of the twin: the chosen rows are fresh up to here, and so is this layer's shift. */
static void move_layer(fixture *f, kvl_session *session, const kv *stale, uint32_t layer,
                       const uint32_t *positions, uint32_t n_chosen, uint32_t n_probes,
                       const double *weights)
{
    kvl_error error = {0};
    assert_int_equal(
        kvl_session_compute(session, positions, n_chosen + 1, 1, f->host.logits, &error), KVL_OK);
    kv now = kv_of(f->engine, session, f->n);
    for (uint32_t p = 0; p + 1 < f->n; p++) {
        if (is_in(p, positions, n_chosen)) continue;
        const size_t row = ((size_t)layer * f->n + p) * f->width;
        for (size_t d = 0; d < f->width; d++) {
            double keys = 0.0, values = 0.0;
            for (uint32_t i = 0; i < n_probes; i++) {
                const size_t at = ((size_t)layer * f->n + positions[i]) * f->width + d;
                keys += ((double)now.keys[at] - (double)stale->keys[at]) / n_probes;
                values += ((double)now.values[at] - (double)stale->values[at]) / n_probes;
            }
            now.keys[row + d] = (float)((double)stale->keys[row + d] + weights[p] * keys);
            now.values[row + d] = (float)((double)stale->values[row + d] + weights[p] * values);
        }
        kvl_session_write_layer(session, layer, &p, 1, now.keys + row, now.values + row);
    }
    kv_end(&now);
}

static void run_twin(fixture *f, kvl_session *session, const kv *stale, const uint32_t *positions,
                     uint32_t n_chosen, uint32_t n_probes)
{
    float deviation[N_CONTEXT];
    double weights[N_CONTEXT];
    deviate_all(f, session, deviation);
    double mean = 0.0;
    for (uint32_t i = 0; i < n_chosen; i++)
        mean += sqrt((double)deviation[positions[i]]) / n_chosen;
    for (uint32_t p = 0; p < f->n; p++) weights[p] = fmin(sqrt((double)deviation[p]) / mean, 1.0);
    for (uint32_t l = 2; l < f->engine->shape->n_layers; l++)
        move_layer(f, session, stale, l, positions, n_chosen, n_probes, weights);
    kvl_error error = {0};
    assert_int_equal(
        kvl_session_compute(session, positions, n_chosen + 1, 1, f->host.logits, &error), KVL_OK);
}

static void assert_near(const kv *a, const kv *b)
{
    for (size_t i = 0; i < a->n_floats; i++) {
        const float room = 1e-3F * fmaxf(1.0F, fabsf(a->keys[i]) + fabsf(a->values[i]));
        assert_true(fabsf(a->keys[i] - b->keys[i]) <= room);
        assert_true(fabsf(a->values[i] - b->values[i]) <= room);
    }
}

static void compare_with_twin(fixture *f, uint32_t n, uint32_t one_of)
{
    kv stale = draw(f, n);
    uint32_t positions[N_CONTEXT];
    const uint32_t n_chosen = choose(f, one_of, positions);
    bool has_probe = false;
    kvl_session *ours = placed(f, &stale);
    run_probes(f, ours, positions, n_chosen, &has_probe);
    assert_true(has_probe);
    /* The walk is cut evenly, and its first cut has the probes. */
    const uint32_t n_cuts = (n_chosen + 1 + KVL_FORWARD_ROWS_MAX - 1) / KVL_FORWARD_ROWS_MAX;
    const uint32_t n_probes = n_cuts == 1 ? n_chosen : (n_chosen + 1 + n_cuts - 1) / n_cuts;
    kvl_session *theirs = placed(f, &stale);
    run_twin(f, theirs, &stale, positions, n_chosen, n_probes);
    kv seen = kv_of(f->engine, ours, f->n);
    kv wanted = kv_of(f->engine, theirs, f->n);
    assert_near(&wanted, &seen);
    /* Otherwise nothing was moved. */
    double moved = 0.0;
    for (uint32_t p = 0; p + 1 < n; p++) {
        if (is_in(p, positions, n_chosen)) continue;
        const size_t at = ((size_t)2 * n + p) * f->width;
        moved += fabs((double)seen.values[at] - (double)stale.values[at]);
    }
    assert_true(moved > 0.0);
    kvl_session_destroy(ours);
    kvl_session_destroy(theirs);
    kv_end(&seen);
    kv_end(&wanted);
    kv_end(&stale);
}

static void test_probes_move_what_the_twin_moves(void **state)
{
    fixture *f = *state;
    for (int round = 0; round < ROUNDS; round++)
        compare_with_twin(f, SHORT / 2 + kvl_test_below(&f->random, SHORT / 2), 5);
}

static void test_probes_of_the_first_cut_move_all(void **state)
{
    fixture *f = *state;
    /* Four of five are chosen: more rows than one cut has. */
    kv stale = draw(f, LONG);
    uint32_t positions[N_CONTEXT];
    uint32_t n_chosen = 0;
    for (uint32_t p = 0; p + 1 < f->n; p++) {
        if (p % 5 != 0) positions[n_chosen++] = p;
    }
    positions[n_chosen] = f->n - 1;
    assert_true(n_chosen + 1 > KVL_FORWARD_ROWS_MAX);
    kvl_session *ours = placed(f, &stale);
    bool has_probe = false;
    run_probes(f, ours, positions, n_chosen, &has_probe);
    kvl_session *theirs = placed(f, &stale);
    run_twin(f, theirs, &stale, positions, n_chosen, (n_chosen + 2) / 2);
    kv seen = kv_of(f->engine, ours, f->n);
    kv wanted = kv_of(f->engine, theirs, f->n);
    assert_near(&wanted, &seen);
    kvl_session_destroy(ours);
    kvl_session_destroy(theirs);
    kv_end(&seen);
    kv_end(&wanted);
    kv_end(&stale);
}

/* With nothing chosen there are no probes, with everything nobody to move: bits as without. */
static void test_without_probes_or_others_nothing_changes(void **state)
{
    fixture *f = *state;
    for (int all = 0; all < 2; all++) {
        kv stale = draw(f, SHORT);
        uint32_t positions[N_CONTEXT];
        const uint32_t n_chosen = all ? choose(f, 1, positions) : 0;
        positions[n_chosen] = f->n - 1;
        bool has_probe = true;
        kvl_session *ours = placed(f, &stale);
        run_probes(f, ours, positions, n_chosen, &has_probe);
        assert_false(has_probe);
        kvl_session *plain = placed(f, &stale);
        kvl_error error = {0};
        assert_int_equal(kvl_session_compute(plain, positions, n_chosen + 1, 0, NULL, &error),
                         KVL_OK);
        kv seen = kv_of(f->engine, ours, f->n);
        kv wanted = kv_of(f->engine, plain, f->n);
        assert_memory_equal(seen.keys, wanted.keys, seen.n_floats * sizeof(float));
        assert_memory_equal(seen.values, wanted.values, seen.n_floats * sizeof(float));
        kvl_session_destroy(ours);
        kvl_session_destroy(plain);
        kv_end(&seen);
        kv_end(&wanted);
        kv_end(&stale);
    }
}

typedef struct watcher {
    fixture *f;
    kvl_session *session;
    const kv *stale;
    uint32_t position; /* one that is computed */
    uint32_t n_before, n_after, n_rows;
} watcher;

static float first_value(const watcher *w, uint32_t layer)
{
    float keys[256], values[256];
    assert_true(w->f->width <= 256);
    kvl_session_read_layer(w->session, layer, &w->position, 1, keys, values);
    return values[0];
}

static void look_before(void *context, uint32_t layer)
{
    watcher *w = context;
    const size_t at = ((size_t)layer * w->f->n + w->position) * w->f->width;
    assert_true(first_value(w, layer) == w->stale->values[at]);
    assert_int_equal(layer, ++w->n_before);
}

static void look_after(void *context, uint32_t layer, uint32_t row_first, uint32_t n_rows)
{
    watcher *w = context;
    const size_t at = ((size_t)layer * w->f->n + w->position) * w->f->width;
    assert_true(first_value(w, layer) != w->stale->values[at]);
    assert_int_equal(layer, ++w->n_after);
    assert_int_equal(row_first, 0);
    w->n_rows += n_rows;
}

static void test_a_watched_walk_computes_the_same_bits(void **state)
{
    fixture *f = *state;
    const uint32_t n_layers = f->engine->shape->n_layers;
    kv stale = draw(f, SHORT);
    uint32_t positions[N_CONTEXT];
    const uint32_t n = choose(f, 4, positions) + 1;
    kvl_session *plain = placed(f, &stale);
    kvl_session *watched = placed(f, &stale);
    watcher w = {.f = f, .session = watched, .stale = &stale, .position = positions[0]};
    const kvl_session_walk walk = {look_before, look_after, &w};
    kvl_error error = {0};
    assert_int_equal(kvl_session_compute(plain, positions, n, 0, NULL, &error), KVL_OK);
    assert_int_equal(kvl_session_compute_watched(watched, positions, n, 0, NULL, &walk, &error),
                     KVL_OK);
    assert_int_equal(w.n_before, n_layers - 1);
    assert_int_equal(w.n_after, n_layers - 1);
    assert_int_equal(w.n_rows, (n_layers - 1) * n);
    kv seen = kv_of(f->engine, watched, f->n);
    kv wanted = kv_of(f->engine, plain, f->n);
    assert_memory_equal(seen.keys, wanted.keys, seen.n_floats * sizeof(float));
    assert_memory_equal(seen.values, wanted.values, seen.n_floats * sizeof(float));
    kvl_session_destroy(plain);
    kvl_session_destroy(watched);
    kv_end(&seen);
    kv_end(&wanted);
    kv_end(&stale);
}

static void test_probes_without_memory_are_an_error(void **state)
{
    fixture *f = *state;
    static const kvl_correction probe = {"probe", KVL_CORRECT_PROBE};
    kv stale = draw(f, SHORT);
    kvl_session *session = placed(f, &stale);
    uint32_t chosen[] = {3, 5, 8};
    uint32_t last = SHORT - 1;
    const kvl_select_run all = {0, SHORT - 1};
    run *r = kvl_alloc_zero(1, sizeof *r);
    assert_non_null(r);
    /* The walk's own memory is kept from one to the next. */
    float deviation[N_CONTEXT];
    deviate_all(f, session, deviation);
    const int64_t n_live = kvl_alloc_live();
    int n_failed = 0;
    for (int64_t n_allowed = 0;; n_allowed++) {
        *r = (run){.host = &f->host,
                   .session = session,
                   .positions = &last,
                   .n_ids = SHORT,
                   .correction = &probe};
        kvl_error error = {0};
        kvl_alloc_fail_after(n_allowed);
        const kvl_status status = run_choose_probes(r, &all, 1, 1, chosen, 3, &error);
        kvl_alloc_fail_after(-1);
        if (status == KVL_OK) break;
        assert_int_equal(status, KVL_ERR_NO_MEMORY);
        assert_null(r->probe);
        assert_null(r->deviation);
        assert_int_equal(kvl_alloc_live(), n_live);
        n_failed++;
    }
    assert_true(n_failed >= 7);
    run_probe_end(r);
    assert_int_equal(kvl_alloc_live(), n_live);
    kvl_free(r);
    kvl_session_destroy(session);
    kv_end(&stale);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_probes_move_what_the_twin_moves, setup, teardown),
        cmocka_unit_test_setup_teardown(test_probes_of_the_first_cut_move_all, setup, teardown),
        cmocka_unit_test_setup_teardown(test_without_probes_or_others_nothing_changes, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_a_watched_walk_computes_the_same_bits, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_probes_without_memory_are_an_error, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
