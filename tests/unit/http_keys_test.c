/* http/keys: S16: time says nothing about an API key, and only a whole key is one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/clock.h"
#include "base/file.h"
#include "http/keys.h"
#include "test_random.h"
#include "timing.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { SAMPLES = 20000, TRIES = 3, KEYS = 50 };
static const double LEAST_P = 1e-4;

static const char KEY[] = "0123456789abcdef0123456789abcdef0123456789abcdef";

static kvl_http_keys *open_keys(void)
{
    char path[] = "/tmp/kvloom-keys-XXXXXX";
    char text[KEYS * 64 + 128] = "";
    kvl_http_keys *keys = NULL;
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    (void)close(fd);
    size_t n = 0;
    for (int i = 0; i < KEYS; i++)
        n += (size_t)snprintf(text + n, sizeof text - n, "other%d a-key-of-another-one-%04d\n", i,
                              i);
    (void)snprintf(text + n, sizeof text - n, "owner %s\n", KEY);
    assert_int_equal(kvl_file_write(path, text, strlen(text), NULL), KVL_OK);
    assert_int_equal(kvl_http_keys_open(path, &keys, NULL), KVL_OK);
    (void)unlink(path);
    return keys;
}

static double time_key(const kvl_http_keys *keys, const char *key)
{
    char header[128];
    (void)snprintf(header, sizeof header, "Bearer %s", key);
    /* What copying one key cost more than the other, as where it crosses a line of the cache, must
     * be over before time is taken. */
    assert_null(kvl_http_keys_find(keys, "Bearer nobody's"));
    const int64_t start_ns = kvl_clock_now(kvl_clock_system());
    const char *tenant = kvl_http_keys_find(keys, header);
    const int64_t end_ns = kvl_clock_now(kvl_clock_system());
    assert_null(tenant);
    return (double)(end_ns - start_ns);
}

/* A key that is wrong in its last letter takes as long as one that is wrong in its first. */
static void s16_time_does_not_tell_how_much_of_a_key_is_right(void **state)
{
    (void)state;
    static double times[2][SAMPLES];
    kvl_http_keys *keys = open_keys();
    kvl_random random = kvl_test_random();
    double p = 0.0;
    for (int i = 0; i < TRIES && p <= LEAST_P; i++) {
        size_t n[2] = {0, 0};
        while (n[0] < SAMPLES || n[1] < SAMPLES) {
            size_t which = kvl_test_below(&random, 2);
            if (n[which] == SAMPLES) which = 1 - which;
            char wrong[sizeof KEY];
            memcpy(wrong, KEY, sizeof KEY);
            wrong[which == 0 ? 0 : sizeof KEY - 2] = (char)('g' + kvl_test_below(&random, 20));
            times[which][n[which]++] = time_key(keys, wrong);
        }
        p = kvl_test_ks_p(times[0], SAMPLES, times[1], SAMPLES);
    }
    kvl_http_keys_close(keys);
    if (p <= LEAST_P && kvl_test_times_count()) fail_msg("p is %g", p);
}

static void s16_only_a_whole_key_is_one(void **state)
{
    (void)state;
    kvl_http_keys *keys = open_keys();
    char header[128];
    for (size_t n = 0; n < sizeof KEY - 1; n++) {
        (void)snprintf(header, sizeof header, "Bearer %.*s", (int)n, KEY);
        assert_null(kvl_http_keys_find(keys, header));
    }
    (void)snprintf(header, sizeof header, "Bearer %s0", KEY);
    assert_null(kvl_http_keys_find(keys, header));
    (void)snprintf(header, sizeof header, "bearer %s", KEY);
    assert_null(kvl_http_keys_find(keys, header));
    assert_null(kvl_http_keys_find(keys, NULL));
    assert_null(kvl_http_keys_find(keys, ""));
    (void)snprintf(header, sizeof header, "Bearer %s", KEY);
    assert_string_equal(kvl_http_keys_find(keys, header), "owner");
    kvl_http_keys_close(keys);
    assert_int_equal(kvl_alloc_live(), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(s16_time_does_not_tell_how_much_of_a_key_is_right),
        cmocka_unit_test(s16_only_a_whole_key_is_one),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
