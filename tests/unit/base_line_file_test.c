/* base/file: a file of lines goes on after its last whole line, wherever it was cut. */
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
#include "test_random.h"

enum { BYTES_MAX = 300000 };

static void make_path(char path[64])
{
    (void)snprintf(path, 64, "/tmp/kvloom-lines-XXXXXX");
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    (void)close(fd);
}

static size_t read_back(const char *path, char *bytes)
{
    char *found = NULL;
    size_t n_bytes = 0;
    kvl_error error = {0};
    assert_int_equal(kvl_file_read(path, BYTES_MAX, &found, &n_bytes, &error), KVL_OK);
    memcpy(bytes, found, n_bytes);
    kvl_free(found);
    return n_bytes;
}

/* Cut at every kind of place, also so that the last line end is further back than one look. */
static void test_what_a_crash_left_half_written_is_cut_off(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    static char written[BYTES_MAX];
    static char found[BYTES_MAX];
    for (int round = 0; round < 60; round++) {
        char path[64];
        kvl_line_file file;
        kvl_error error = {0};
        make_path(path);
        assert_int_equal(kvl_line_file_open(path, &file, &error), KVL_OK);
        size_t n = 0;
        for (uint32_t lines = kvl_test_below(&random, 5); lines > 0; lines--) {
            const size_t n_line = kvl_test_below(&random, round % 4 == 0 ? 50000 : 50);
            memset(written + n, 'a' + (int)lines, n_line);
            assert_int_equal(kvl_line_file_add(&file, written + n, n_line, &error), KVL_OK);
            n += n_line;
            written[n++] = '\n';
        }
        assert_int_equal(kvl_line_file_sync(&file, &error), KVL_OK);
        kvl_line_file_close(&file);
        assert_int_equal(read_back(path, found), n);
        assert_memory_equal(found, written, n);

        const size_t n_cut = kvl_test_below(&random, (uint32_t)n + 1);
        assert_int_equal(truncate(path, (off_t)n_cut), 0);
        size_t n_whole = n_cut;
        while (n_whole > 0 && written[n_whole - 1] != '\n') n_whole--;
        assert_int_equal(kvl_line_file_open(path, &file, &error), KVL_OK);
        assert_int_equal(kvl_line_file_add(&file, "next", 4, &error), KVL_OK);
        kvl_line_file_close(&file);
        assert_int_equal(read_back(path, found), n_whole + 5);
        assert_memory_equal(found, written, n_whole);
        assert_memory_equal(found + n_whole, "next\n", 5);
        (void)unlink(path);
    }
}

static void test_what_is_no_file_is_refused(void **state)
{
    (void)state;
    kvl_line_file file;
    kvl_error error = {0};
    assert_int_equal(kvl_line_file_open("/tmp", &file, &error), KVL_ERR_IO);
    assert_int_equal(kvl_line_file_open("/dev/null", &file, &error), KVL_ERR_IO);
    assert_int_equal(kvl_line_file_open("/nowhere/lines", &file, &error), KVL_ERR_IO);
    assert_non_null(strstr(error.text, "/nowhere/lines"));
}

static void test_without_memory_a_line_is_not_added(void **state)
{
    (void)state;
    char path[64];
    char found[16];
    kvl_line_file file;
    kvl_error error = {0};
    make_path(path);
    assert_int_equal(kvl_line_file_open(path, &file, &error), KVL_OK);
    kvl_alloc_fail_after(0);
    assert_int_equal(kvl_line_file_add(&file, "lost", 4, &error), KVL_ERR_NO_MEMORY);
    kvl_alloc_fail_after(-1);
    assert_int_equal(kvl_line_file_add(&file, "kept", 4, &error), KVL_OK);
    kvl_line_file_close(&file);
    assert_int_equal(read_back(path, found), 5);
    (void)unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_what_a_crash_left_half_written_is_cut_off),
        cmocka_unit_test(test_what_is_no_file_is_refused),
        cmocka_unit_test(test_without_memory_a_line_is_not_added),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
