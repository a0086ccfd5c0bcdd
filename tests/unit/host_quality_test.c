/* host: the book of what reuse costs: means are means, keys are bounded, names cannot break a line
 * of metrics, and a damaged file is begun anew. */
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
#include "base/file.h"
#include "host/host_parts.h"
#include "host/quality.h"
#include "reuse/planner.h"
#include "test_random.h"

static const char MODEL[] = "model";

typedef struct fixture {
    char directory[64], path[96];
    quality_book book;
} fixture;

static void open_book(fixture *f, const char *model)
{
    kvl_error error = {0};
    assert_int_equal(quality_init(&f->book, f->directory, 0.5, model, &error), KVL_OK);
}

static int setup(void **state)
{
    static fixture f;
    f = (fixture){.directory = "/tmp/kvloom-quality-XXXXXX"};
    assert_non_null(mkdtemp(f.directory));
    (void)snprintf(f.path, sizeof f.path, "%s/quality.json", f.directory);
    open_book(&f, MODEL);
    *state = &f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    quality_deinit(&f->book);
    kvl_error error = {0};
    assert_int_equal(kvl_directory_remove(f->directory, &error), KVL_OK);
    return 0;
}

static audit_result blended(double kl, bool is_exact)
{
    return (audit_result){.shares = {[KVL_ACTION_COMPUTE] = 0.2, [KVL_ACTION_BLEND] = 0.8},
                          .kl = kl,
                          .top1 = is_exact ? 1.0 : 0.5,
                          .has_kl = true,
                          .is_exact = is_exact};
}

static void test_means_are_kept_across_a_restart(void **state)
{
    fixture *f = *state;
    quality_entry *entry = quality_find(&f->book, "work", "template");
    for (int i = 0; i < 3; i++) {
        const audit_result result = blended(0.2, i != 1);
        quality_learn_audit(&f->book, entry, &result);
    }
    kvl_gate_learn(&entry->gate, &f->book.gate, 0.7F, true);
    const double kl = entry->errors.kl[KVL_ACTION_BLEND];
    assert_true(kl > kvl_error_model_first().kl[KVL_ACTION_BLEND]); /* 0.2 of 0.8 is more */
    quality_save(&f->book, MODEL);
    quality_deinit(&f->book);
    open_book(f, MODEL);
    assert_int_equal(f->book.n, 1);
    quality_row rows[QUALITY_KEYS_MAX * KVL_ACTIONS];
    assert_int_equal(quality_rows(&f->book, rows), 1);
    assert_string_equal(rows[0].name, "work/template");
    assert_int_equal(rows[0].action, KVL_ACTION_BLEND);
    assert_int_equal(rows[0].n_audited, 3);
    assert_true(fabs(rows[0].kl - 0.2) < 1e-9);
    assert_true(fabs(rows[0].exact - 2.0 / 3.0) < 0.01);
    entry = quality_find(&f->book, "work", "template");
    assert_true(fabs(entry->errors.kl[KVL_ACTION_BLEND] - kl) < 1e-9);
    assert_true(entry->gate.right[14] > 0.99F || entry->gate.right[13] > 0.99F);
    /* A new key begins with what was learnt of all. */
    assert_true(quality_find(&f->book, "work", "other")->errors.kl[KVL_ACTION_BLEND] > 0.1);
}

static void test_another_model_or_a_damaged_file_begins_anew(void **state)
{
    fixture *f = *state;
    const audit_result result = blended(0.2, true);
    quality_learn_audit(&f->book, quality_find(&f->book, "work", "template"), &result);
    quality_save(&f->book, MODEL);
    quality_deinit(&f->book);
    open_book(f, "another");
    assert_int_equal(f->book.n, 0);
    quality_deinit(&f->book);

    char *bytes = NULL;
    size_t n_bytes = 0;
    kvl_error error = {0};
    assert_int_equal(kvl_file_read(f->path, 1 << 20, &bytes, &n_bytes, &error), KVL_OK);
    kvl_random random = kvl_test_random();
    for (int round = 0; round < 300; round++) {
        char *damaged = kvl_alloc(n_bytes + 1);
        assert_non_null(damaged);
        memcpy(damaged, bytes, n_bytes);
        size_t n = n_bytes;
        if (round % 2 == 0) n = kvl_test_below(&random, (uint32_t)n_bytes);
        for (int i = 0; i < 4 && n > 0; i++)
            damaged[kvl_test_below(&random, (uint32_t)n)] = (char)kvl_test_below(&random, 256);
        assert_int_equal(kvl_file_write(f->path, damaged, n, &error), KVL_OK);
        kvl_free(damaged);
        open_book(f, MODEL); /* whatever was read of it, it is within its limits */
        assert_true(f->book.n <= 1);
        for (uint32_t a = 0; a < KVL_ACTIONS; a++)
            assert_true(f->book.errors.kl[a] >= 0.0 && f->book.errors.kl[a] <= 10.0);
        quality_row rows[QUALITY_KEYS_MAX * KVL_ACTIONS];
        const uint32_t n_rows = quality_rows(&f->book, rows);
        for (uint32_t i = 0; i < n_rows; i++) assert_true(isfinite(rows[i].kl));
        quality_deinit(&f->book);
    }
    kvl_free(bytes);
    assert_int_equal(unlink(f->path), 0);
    open_book(f, MODEL);
}

static void test_keys_are_bounded_and_harmless(void **state)
{
    fixture *f = *state;
    quality_entry *hot = quality_find(&f->book, "hot", "one");
    hot->gate.right[3] = 5.0F;
    for (int i = 0; i < 3 * QUALITY_KEYS_MAX; i++) {
        char name[32];
        (void)snprintf(name, sizeof name, "template %d", i);
        (void)quality_find(&f->book, "work", name);
        (void)quality_find(&f->book, "hot", "one"); /* in use: it stays */
    }
    assert_int_equal(f->book.n, QUALITY_KEYS_MAX);
    assert_true(quality_find(&f->book, "hot", "one")->gate.right[3] == 5.0F);
    assert_string_equal(quality_find(&f->book, "a\"b\\c\n", "\x01\xFF")->name, "a_b_c_/__");
}

static void test_audits_are_drawn_by_share(void **state)
{
    fixture *f = *state;
    const struct {
        double share;
        uint32_t least, most;
    } cases[] = {{0.0, 0, 0}, {1.0, 10000, 10000}, {0.05, 350, 650}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        f->book.audit_share = cases[c].share;
        uint32_t n = 0;
        for (int i = 0; i < 10000; i++) n += quality_draws_audit(&f->book);
        assert_true(n >= cases[c].least && n <= cases[c].most);
    }
}

/* What other threads see of audits is by action, each key by how often it was audited. */
static void test_figures_are_means_over_keys(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    kvl_host *host = kvl_alloc_zero(1, sizeof *host);
    assert_non_null(host);
    (void)pthread_mutex_init(&host->seen.lock, NULL);
    for (int round = 0; round < 50; round++) {
        double n[KVL_ACTIONS] = {0};
        double kl[KVL_ACTIONS] = {0};
        double top1[KVL_ACTIONS] = {0};
        host->seen.n_anchors = kvl_test_below(&random, 100);
        host->seen.n_rows = kvl_test_below(&random, QUALITY_KEYS_MAX * KVL_ACTIONS + 1);
        for (uint32_t i = 0; i < host->seen.n_rows; i++) {
            quality_row *row = &host->seen.rows[i];
            *row = (quality_row){.action = kvl_test_below(&random, KVL_ACTIONS),
                                 .n_audited = kvl_test_below(&random, 9),
                                 .kl = kvl_test_below(&random, 1000) / 100.0,
                                 .top1 = kvl_test_below(&random, 1000) / 1000.0};
            n[row->action] += (double)row->n_audited;
            kl[row->action] += (double)row->n_audited * row->kl;
            top1[row->action] += (double)row->n_audited * row->top1;
        }
        kvl_host_figures figures;
        kvl_host_figures_read(host, &figures);
        uint32_t at = 0;
        for (uint32_t action = 0; action < KVL_ACTIONS; action++) {
            if (n[action] == 0.0) continue;
            const kvl_host_audit *audit = &figures.audits[at++];
            assert_string_equal(audit->action, kvl_action_name((kvl_action)action));
            assert_int_equal(audit->n, (uint64_t)n[action]);
            assert_true(fabs(audit->kl - kl[action] / n[action]) < 1e-9);
            assert_true(fabs(audit->top1 - top1[action] / n[action]) < 1e-9);
        }
        assert_int_equal(figures.n_audits, at);
        assert_int_equal(figures.n_anchors, host->seen.n_anchors);
        assert_int_equal(figures.n_peers, 0);
    }
    (void)pthread_mutex_destroy(&host->seen.lock);
    kvl_free(host);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_means_are_kept_across_a_restart, setup, teardown),
        cmocka_unit_test_setup_teardown(test_another_model_or_a_damaged_file_begins_anew, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_keys_are_bounded_and_harmless, setup, teardown),
        cmocka_unit_test(test_figures_are_means_over_keys),
        cmocka_unit_test_setup_teardown(test_audits_are_drawn_by_share, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
