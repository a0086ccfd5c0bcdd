/* rag: a collection keeps what did not change, drops what is gone, finds what is asked for, and
 * goes on where it was interrupted; files that are no text are named and skipped. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/file.h"
#include "rag/collection.h"
#include "rag/documents.h"
#include "test_random.h"

typedef struct fixture {
    char directory[64];
    kvl_collection *collection;
} fixture;

static const char MODEL[] = "tiny";

static kvl_status open_as(fixture *f, uint32_t n_chunk_tokens, bool create, kvl_error *error)
{
    const kvl_collection_options options = {f->directory, create, n_chunk_tokens};
    return kvl_collection_open(&options, &f->collection, error);
}

static void reopen(fixture *f, uint32_t n_chunk_tokens)
{
    kvl_error error = {0};
    kvl_collection_close(f->collection);
    f->collection = NULL;
    if (open_as(f, n_chunk_tokens, true, &error) != KVL_OK) fail_msg("%s", error.text);
}

static int setup(void **state)
{
    static fixture f;
    f = (fixture){.directory = "/tmp/kvloom-rag-XXXXXX"};
    assert_non_null(mkdtemp(f.directory));
    reopen(&f, 64);
    *state = &f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    kvl_collection_close(f->collection);
    kvl_error error = {0};
    assert_int_equal(kvl_directory_remove(f->directory, &error), KVL_OK);
    return 0;
}

/* A document of `n` paragraphs about a subject, every one of its own. */
static char *document(const char *subject, int n)
{
    char *text = kvl_alloc((size_t)n * 512);
    assert_non_null(text);
    size_t at = 0;
    for (int i = 0; i < n; i++)
        at += (size_t)snprintf(text + at, 512,
                               "Paragraph %d is about the %s. It was number %d of the %s on that "
                               "day, and it had %d rivets in its left side, all of them counted "
                               "twice by somebody who wrote the numbers down with care.\n\n",
                               i, subject, i * 31 % 17, subject, i * 7919 % 1000);
    return text;
}

static kvl_collection_change put(fixture *f, const char *path, const char *text)
{
    kvl_collection_change change = {0};
    kvl_error error = {0};
    if (kvl_collection_put(f->collection, path, text, strlen(text), &change, &error) != KVL_OK)
        fail_msg("%s", error.text);
    return change;
}

static kvl_collection_stats stats(fixture *f)
{
    kvl_collection_stats s = {0};
    kvl_error error = {0};
    if (kvl_collection_get_stats(f->collection, MODEL, &s, &error) != KVL_OK)
        fail_msg("%s", error.text);
    return s;
}

/* Marks everything; how many that were. Segments are made of the chunk's number. */
static size_t read_all(fixture *f)
{
    size_t n = 0;
    int64_t after = 0;
    for (;;) {
        kvl_collection_chunk chunk = {0};
        bool found = false;
        kvl_error error = {0};
        assert_int_equal(
            kvl_collection_next_unread(f->collection, MODEL, after, &chunk, &found, &error),
            KVL_OK);
        if (!found) return n;
        assert_true(chunk.number > after);
        assert_int_equal(strlen(chunk.text), chunk.n_bytes);
        after = chunk.number;
        kvl_digest segment = {{0}};
        memcpy(segment.bytes, &after, sizeof after);
        assert_int_equal(
            kvl_collection_mark_read(f->collection, MODEL, &after, &segment, 1, &error), KVL_OK);
        n++;
    }
}

static size_t count_orphans(fixture *f, kvl_digest *ids)
{
    size_t n = 0;
    kvl_error error = {0};
    assert_int_equal(kvl_collection_list_orphans(f->collection, MODEL, 100, ids, &n, &error),
                     KVL_OK);
    return n;
}

static void test_a_second_pass_does_nothing(void **state)
{
    fixture *f = *state;
    char *text = document("crane", 12);
    kvl_collection_begin_pass(f->collection);
    const kvl_collection_change first = put(f, "/a/crane.txt", text);
    assert_true(first.n_chunks > 4 && first.n_new == first.n_chunks && !first.unchanged);
    assert_int_equal(read_all(f), first.n_new);
    reopen(f, 0);
    kvl_collection_begin_pass(f->collection);
    assert_true(put(f, "/a/crane.txt", text).unchanged);
    uint32_t n_removed = 7;
    kvl_error error = {0};
    assert_int_equal(kvl_collection_sweep(f->collection, "/a", &n_removed, &error), KVL_OK);
    assert_int_equal(n_removed, 0);
    assert_int_equal(read_all(f), 0);
    /* The same text under another name: known chunks, no KV to make. */
    const kvl_collection_change copy = put(f, "/a/copy.txt", text);
    assert_int_equal(copy.n_chunks, first.n_chunks);
    assert_int_equal(copy.n_new, 0);
    assert_int_equal(stats(f).n_documents, 2);
    assert_int_equal(stats(f).n_unread, 0);
    kvl_free(text);
}

static void test_an_edit_keeps_the_other_chunks(void **state)
{
    fixture *f = *state;
    char *text = document("lighthouse", 30);
    const kvl_collection_change first = put(f, "/l.txt", text);
    (void)read_all(f);
    char *word = strstr(text + strlen(text) / 2, "care");
    assert_non_null(word);
    memcpy(word, "love", 4);
    const kvl_collection_change second = put(f, "/l.txt", text);
    assert_true(second.n_new >= 1 && second.n_new <= 2);
    assert_int_equal(stats(f).n_unread, second.n_new);
    kvl_digest gone[100];
    const size_t n_gone = count_orphans(f, gone);
    assert_int_equal(first.n_chunks + second.n_new - n_gone, second.n_chunks);
    kvl_error error = {0};
    assert_int_equal(kvl_collection_drop_orphans(f->collection, MODEL, gone, n_gone, &error),
                     KVL_OK);
    assert_int_equal(count_orphans(f, gone), 0);
    kvl_free(text);
}

static size_t search(fixture *f, const char *question, size_t n_max, kvl_collection_found *found)
{
    size_t n = 0;
    kvl_error error = {0};
    if (kvl_collection_search(f->collection, MODEL, question, n_max, found, &n, &error) != KVL_OK)
        fail_msg("%s", error.text);
    return n;
}

static void test_removed_documents_go(void **state)
{
    fixture *f = *state;
    kvl_collection_found found[4];
    char *one = document("tram", 6);
    char *two = document("ferry", 6);
    kvl_collection_begin_pass(f->collection);
    (void)put(f, "/d/one", one);
    (void)put(f, "/d/two", two);
    (void)put(f, "/dd/three", two);
    (void)read_all(f);
    kvl_collection_begin_pass(f->collection);
    (void)put(f, "/d/one", one);
    uint32_t n_removed = 0;
    kvl_error error = {0};
    /* /dd is not below /d. */
    assert_int_equal(kvl_collection_sweep(f->collection, "/d", &n_removed, &error), KVL_OK);
    assert_int_equal(n_removed, 1);
    size_t n = search(f, "ferry", 4, found);
    assert_true(n > 0);
    for (size_t i = 0; i < n; i++) {
        assert_string_equal(found[i].path, "/dd/three");
        kvl_collection_found_deinit(&found[i]);
    }
    assert_int_equal(kvl_collection_sweep(f->collection, "/dd/", &n_removed, &error), KVL_OK);
    assert_int_equal(n_removed, 1);
    assert_int_equal(search(f, "ferry", 4, found), 0);
    kvl_digest gone[100];
    assert_true(count_orphans(f, gone) > 0);
    assert_int_equal(stats(f).n_documents, 1);
    kvl_free(one);
    kvl_free(two);
}

static void test_what_fits_best_comes_first(void **state)
{
    fixture *f = *state;
    static const char *const subjects[] = {"crane", "tram", "ferry", "lighthouse", "windmill"};
    for (size_t i = 0; i < 5; i++) {
        char path[32];
        char *text = document(subjects[i], 8);
        (void)snprintf(path, sizeof path, "/%s", subjects[i]);
        (void)put(f, path, text);
        kvl_free(text);
    }
    (void)put(f, "/fact", "The access code of the boiler room is 4711.");
    (void)read_all(f);
    kvl_collection_found found[8];
    /* Operators and quotes are only words; stems match. */
    size_t n = search(f, "what's the \"codes\" of (boiler) rooms* OR NOT near: 1?", 8, found);
    assert_true(n > 0);
    assert_string_equal(found[0].path, "/fact");
    assert_int_equal(found[0].place, 1);
    assert_true(found[0].is_read);
    double last = found[0].score;
    for (size_t i = 0; i < n; i++) {
        assert_true(found[i].score <= last);
        last = found[i].score;
        kvl_collection_found_deinit(&found[i]);
    }
    n = search(f, "windmill", 3, found);
    assert_int_equal(n, 3);
    for (size_t i = 0; i < n; i++) {
        assert_string_equal(found[i].path, "/windmill");
        kvl_collection_found_deinit(&found[i]);
    }
    kvl_error error = {0};
    assert_int_equal(kvl_collection_search(f->collection, MODEL, " ?!", 3, found, &n, &error),
                     KVL_ERR_INVALID);
    assert_int_equal(kvl_collection_search(f->collection, MODEL, "a", 65, found, &n, &error),
                     KVL_ERR_OUT_OF_RANGE);
}

static void test_the_primer_stays(void **state)
{
    fixture *f = *state;
    const char *primer = NULL;
    kvl_error error = {0};
    assert_int_equal(kvl_collection_primer(f->collection, &primer, &error), KVL_OK);
    assert_string_equal(primer, "");
    static const char *const subjects[] = {"crane", "tram", "ferry", "lighthouse"};
    for (size_t i = 0; i < 4; i++) {
        char *text = document(subjects[i], 4);
        (void)put(f, subjects[i], text);
        kvl_free(text);
    }
    assert_int_equal(kvl_collection_primer(f->collection, &primer, &error), KVL_OK);
    char kept[8192];
    (void)snprintf(kept, sizeof kept, "%s", primer);
    size_t n_subjects = 0;
    for (size_t i = 0; i < 4; i++) n_subjects += strstr(kept, subjects[i]) != NULL;
    assert_int_equal(n_subjects, 3);
    /* Its documents may go: it is what the KV of all others was made behind. */
    uint32_t n_removed = 0;
    kvl_collection_begin_pass(f->collection);
    for (size_t i = 0; i < 4; i++)
        assert_int_equal(kvl_collection_sweep(f->collection, subjects[i], &n_removed, &error),
                         KVL_OK);
    char *text = document("windmill", 9);
    (void)put(f, "windmill", text);
    kvl_free(text);
    reopen(f, 0);
    assert_int_equal(kvl_collection_primer(f->collection, &primer, &error), KVL_OK);
    assert_string_equal(primer, kept);
    const size_t n = read_all(f);
    assert_int_equal(kvl_collection_reset(f->collection, &error), KVL_OK);
    assert_int_equal(stats(f).n_unread, n);
    assert_int_equal(kvl_collection_primer(f->collection, &primer, &error), KVL_OK);
    assert_string_not_equal(primer, kept);
}

/* Other lengths: every document is split again when its turn comes. */
static void test_other_lengths_split_anew(void **state)
{
    fixture *f = *state;
    char *text = document("crane", 30);
    const kvl_collection_change small = put(f, "/crane", text);
    reopen(f, 256);
    const kvl_collection_change large = put(f, "/crane", text);
    assert_false(large.unchanged);
    assert_true(large.n_chunks < small.n_chunks / 2);
    reopen(f, 0);
    assert_int_equal(stats(f).n_chunk_tokens, 256);
    assert_true(put(f, "/crane", text).unchanged);
    kvl_free(text);
}

/* A process that ends anywhere inside of a document leaves the one before as it was. */
static void test_a_killed_put_was_never_there(void **state)
{
    fixture *f = *state;
    char *text = document("crane", 40);
    (void)put(f, "/crane", text);
    const kvl_collection_stats before = stats(f);
    for (int64_t n_allowed = 0; n_allowed < 3; n_allowed++) {
        kvl_collection_change change;
        kvl_error error = {0};
        kvl_alloc_fail_after(n_allowed);
        const kvl_status status = kvl_collection_put(f->collection, "/other", text + 300,
                                                     strlen(text + 300), &change, &error);
        kvl_alloc_fail_after(-1);
        if (status == KVL_OK) break;
        assert_int_equal(status, KVL_ERR_NO_MEMORY);
        assert_int_equal(stats(f).n_documents, before.n_documents);
        assert_int_equal(stats(f).n_chunks, before.n_chunks);
    }
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        kvl_collection_options options = {f->directory, false, 0};
        kvl_collection *c = NULL;
        kvl_collection_change change;
        if (kvl_collection_open(&options, &c, NULL) != KVL_OK) _exit(1);
        /* Never closed: what was committed must be there all the same. */
        if (kvl_collection_put(c, "/child", "A text of a child.", 18, &change, NULL) != KVL_OK)
            _exit(2);
        _exit(0);
    }
    int ended = -1;
    assert_int_equal(waitpid(child, &ended, 0), child);
    assert_int_equal(ended, 0);
    reopen(f, 0);
    assert_true(put(f, "/child", "A text of a child.").unchanged);
    kvl_free(text);
}

static void test_what_is_no_collection_is_refused(void **state)
{
    fixture *f = *state;
    kvl_collection_close(f->collection);
    f->collection = NULL;
    char path[128];
    (void)snprintf(path, sizeof path, "%s/index.db", f->directory);
    kvl_error error = {0};
    assert_int_equal(
        kvl_file_write(path, "not a database at all, but long enough to be one", 48, &error),
        KVL_OK);
    assert_int_equal(open_as(f, 0, true, &error), KVL_ERR_FOREIGN);
    assert_non_null(strstr(error.text, "index.db"));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(open_as(f, 0, false, &error), KVL_ERR_NOT_FOUND);
    assert_int_equal(open_as(f, 7, true, &error), KVL_ERR_OUT_OF_RANGE);
    assert_null(f->collection);
}

/* ---- files ---- */

typedef struct seen {
    char texts[512], skipped[1024];
} seen;

static kvl_status see_text(void *context, const char *path, const char *text, size_t n_bytes,
                           kvl_error *error)
{
    (void)error;
    seen *s = context;
    const size_t n = strlen(s->texts);
    assert_int_equal(strlen(text), n_bytes);
    (void)snprintf(s->texts + n, sizeof s->texts - n, "%s;", strrchr(path, '/') + 1);
    return KVL_OK;
}

static void see_skipped(void *context, const char *path, const char *reason)
{
    seen *s = context;
    const size_t n = strlen(s->skipped);
    (void)snprintf(s->skipped + n, sizeof s->skipped - n, "%s: %s;", strrchr(path, '/') + 1,
                   reason);
}

static void write_file(const char *directory, const char *name, const char *bytes, size_t n)
{
    char path[256];
    kvl_error error = {0};
    (void)snprintf(path, sizeof path, "%s/%s", directory, name);
    if (kvl_file_write(path, bytes, n, &error) != KVL_OK) fail_msg("%s", error.text);
}

static void test_files_that_are_no_text_are_named(void **state)
{
    (void)state;
    char directory[] = "/tmp/kvloom-docs-XXXXXX";
    char inner[64], path[128];
    kvl_error error = {0};
    assert_non_null(mkdtemp(directory));
    (void)snprintf(inner, sizeof inner, "%s/b", directory);
    assert_int_equal(kvl_directory_make(inner, &error), KVL_OK);
    write_file(directory, "c.md", "text", 4);
    write_file(directory, "a.md", "text", 4);
    write_file(inner, "z.md", "\xe2\x82\xac", 3);
    write_file(inner, "latin1.txt", "caf\xe9 au lait", 12);
    write_file(inner, "zero.bin", "ab\0cd", 5);
    write_file(inner, ".hidden", "text", 4);
    (void)snprintf(path, sizeof path, "%s/huge.log", directory);
    write_file(directory, "huge.log", "", 0);
    assert_int_equal(truncate(path, (off_t)KVL_DOCUMENT_BYTES_MAX + 1), 0);
    (void)snprintf(path, sizeof path, "%s/loop", directory);
    assert_int_equal(symlink(directory, path), 0);
    seen s = {{0}, {0}};
    const kvl_documents_visitor visitor = {see_text, see_skipped, &s};
    assert_int_equal(kvl_documents_visit(directory, &visitor, &error), KVL_OK);
    assert_string_equal(s.texts, "a.md;z.md;c.md;");
    assert_non_null(strstr(s.skipped, "latin1.txt: not UTF-8 text (byte 3)"));
    assert_non_null(strstr(s.skipped, "zero.bin: not UTF-8 text (byte 2)"));
    assert_non_null(strstr(s.skipped, "huge.log: larger than 8 MiB"));
    assert_int_equal(kvl_documents_visit("/nowhere/at/all", &visitor, &error), KVL_ERR_NOT_FOUND);
    assert_int_equal(kvl_directory_remove(directory, &error), KVL_OK);
}

static void test_utf8_is_told_from_other_bytes(void **state)
{
    (void)state;
    static const struct {
        const char *bytes;
        size_t n_good;
    } cases[] = {
        {"plain", 5},
        {"\xc3\xa9", 2},
        {"\xf0\x9f\x98\x80", 4},
        {"a\xc0\x80", 1},
        {"\xe0\x80\x80", 0},
        {"\xed\xa0\x80", 0},
        {"\xf4\x90\x80\x80", 0},
        {"\xf5\x80\x80\x80", 0},
        {"ab\xe2\x82", 2},
        {"\x80", 0},
        {"\xff", 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_int_equal(kvl_documents_utf8_prefix(cases[i].bytes, strlen(cases[i].bytes)),
                         cases[i].n_good);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_a_second_pass_does_nothing, setup, teardown),
        cmocka_unit_test_setup_teardown(test_an_edit_keeps_the_other_chunks, setup, teardown),
        cmocka_unit_test_setup_teardown(test_removed_documents_go, setup, teardown),
        cmocka_unit_test_setup_teardown(test_what_fits_best_comes_first, setup, teardown),
        cmocka_unit_test_setup_teardown(test_the_primer_stays, setup, teardown),
        cmocka_unit_test_setup_teardown(test_other_lengths_split_anew, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_killed_put_was_never_there, setup, teardown),
        cmocka_unit_test_setup_teardown(test_what_is_no_collection_is_refused, setup, teardown),
        cmocka_unit_test(test_files_that_are_no_text_are_named),
        cmocka_unit_test(test_utf8_is_told_from_other_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
