/* base/status: every status has a name, a sentence and a class; unknown numbers are fatal. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/status.h"

static void test_every_status_is_described(void **state)
{
    (void)state;
#define KVL_CHECK(number, name, class_name, sentence)                                              \
    assert_int_equal(KVL_##name, (number));                                                        \
    assert_string_equal(kvl_status_name(KVL_##name), #name);                                       \
    assert_string_equal(kvl_status_sentence(KVL_##name), (sentence));                              \
    assert_int_equal(kvl_status_class_of(KVL_##name), KVL_CLASS_##class_name);
    KVL_STATUS_LIST(KVL_CHECK)
#undef KVL_CHECK
}

static void test_unknown_number_is_fatal(void **state)
{
    (void)state;
    assert_int_equal(kvl_status_class_of((kvl_status)-999), KVL_CLASS_FATAL);
    assert_string_equal(kvl_status_name((kvl_status)-999), "ERR_UNKNOWN");
}

static void test_error_text_is_cut_not_overrun(void **state)
{
    (void)state;
    char text[2 * KVL_ERROR_TEXT_MAX];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    kvl_error error;
    assert_int_equal(KVL_FAIL(&error, KVL_ERR_INVALID, "%s", text), KVL_ERR_INVALID);
    assert_int_equal(strlen(error.text), KVL_ERROR_TEXT_MAX - 1);
    assert_int_equal(KVL_FAIL(NULL, KVL_ERR_BUSY, "nobody listens"), KVL_ERR_BUSY);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_status_is_described),
        cmocka_unit_test(test_unknown_number_is_fatal),
        cmocka_unit_test(test_error_text_is_cut_not_overrun),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
