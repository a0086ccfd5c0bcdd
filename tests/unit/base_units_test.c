/* base_units_test.c: sizes and times as people write them. */
#include "base/units.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

static void sizes_are_read_exactly(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        uint64_t wanted;
    } cases[] = {{"0", 0},
                 {"1", 1},
                 {"17B", 17},
                 {"8GiB", UINT64_C(8) << 30},
                 {"512 KiB", 512 << 10},
                 {"2kB", 2000},
                 {"3MB", 3000000},
                 {"1.5GiB", UINT64_C(3) << 29},
                 {"0.25T", UINT64_C(1) << 38},
                 {"900719925474", UINT64_C(900719925474)}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint64_t n_bytes = 1;
        assert_int_equal(kvl_bytes_from_text(cases[i].text, &n_bytes, NULL), KVL_OK);
        assert_int_equal(n_bytes, cases[i].wanted);
    }
}

static void what_is_no_size_or_time_is_refused(void **state)
{
    (void)state;
    static const char *const sizes[] = {"",     "GiB",  "-1", "+1",     "0x10", "1e3", "1 2",
                                        "8gib", "8 Gb", "2k", "1.GiBs", "nan",  "inf", " 1"};
    uint64_t n_bytes = 0;
    int64_t duration_ns = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        assert_int_equal(kvl_bytes_from_text(sizes[i], &n_bytes, NULL), KVL_ERR_MALFORMED);
        assert_int_equal(kvl_duration_from_text(sizes[i], &duration_ns, NULL), KVL_ERR_MALFORMED);
    }
    assert_int_equal(kvl_bytes_from_text("99999999TiB", &n_bytes, NULL), KVL_ERR_OUT_OF_RANGE);
    assert_int_equal(kvl_bytes_from_text("99999999999999999999999", &n_bytes, NULL),
                     KVL_ERR_OUT_OF_RANGE);
    assert_int_equal(kvl_duration_from_text("5", &duration_ns, NULL), KVL_ERR_MALFORMED);
    assert_int_equal(kvl_duration_from_text("99999999h", &duration_ns, NULL), KVL_ERR_OUT_OF_RANGE);
    kvl_error error;
    assert_int_equal(kvl_bytes_from_text("8 gigs", &n_bytes, &error), KVL_ERR_MALFORMED);
    assert_non_null(strstr(error.text, "8 gigs"));
}

static void times_are_read_exactly(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int64_t wanted;
    } cases[] = {{"50ms", 50000000},
                 {"2 min", INT64_C(120000000000)},
                 {"0.5s", 500000000},
                 {"7us", 7000},
                 {"1h", INT64_C(3600000000000)}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int64_t duration_ns = 0;
        assert_int_equal(kvl_duration_from_text(cases[i].text, &duration_ns, NULL), KVL_OK);
        assert_int_equal(duration_ns, cases[i].wanted);
    }
}

static void sizes_are_written_for_people(void **state)
{
    (void)state;
    char text[KVL_UNIT_TEXT_BYTES];
    assert_string_equal(kvl_bytes_to_text(0, text), "0 B");
    assert_string_equal(kvl_bytes_to_text(1023, text), "1023 B");
    assert_string_equal(kvl_bytes_to_text(1024, text), "1 KiB");
    assert_string_equal(kvl_bytes_to_text(1536 << 10, text), "1.50 MiB");
    assert_string_equal(kvl_bytes_to_text(UINT64_C(8) << 30, text), "8 GiB");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes_are_read_exactly),
        cmocka_unit_test(what_is_no_size_or_time_is_refused),
        cmocka_unit_test(times_are_read_exactly),
        cmocka_unit_test(sizes_are_written_for_people),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
