/* base/units.c: numbers with units. Digits are read here and not by the C library, which would take
 * hexadecimal, exponents, infinities and the user's own decimal sign. */
#include "base/units.h"

#include <stdio.h>
#include <string.h>

typedef struct unit {
    const char *name;
    uint64_t scale;
} unit;

static const unit byte_units[] = {
    {"", 1},
    {"B", 1},
    {"kB", UINT64_C(1000)},
    {"MB", UINT64_C(1000000)},
    {"GB", UINT64_C(1000000000)},
    {"TB", UINT64_C(1000000000000)},
    {"K", UINT64_C(1) << 10},
    {"M", UINT64_C(1) << 20},
    {"G", UINT64_C(1) << 30},
    {"T", UINT64_C(1) << 40},
    {"KiB", UINT64_C(1) << 10},
    {"MiB", UINT64_C(1) << 20},
    {"GiB", UINT64_C(1) << 30},
    {"TiB", UINT64_C(1) << 40},
};

static const unit time_units[] = {
    {"us", UINT64_C(1000)},         {"ms", UINT64_C(1000000)},      {"s", UINT64_C(1000000000)},
    {"min", UINT64_C(60000000000)}, {"h", UINT64_C(3600000000000)},
};

enum { N_BYTE_UNITS = sizeof byte_units / sizeof *byte_units };
enum { N_TIME_UNITS = sizeof time_units / sizeof *time_units };

/* Where a number ends; *tenths gets it in millionths, so that fractions stay exact to six
 * digits. */
static const char *read_number(const char *text, bool *is_number, bool *is_too_large,
                               uint64_t *millionths)
{
    uint64_t whole = 0;
    uint64_t fraction = 0;
    uint64_t digit_scale = 100000;
    *is_number = false;
    *is_too_large = false;
    for (; *text >= '0' && *text <= '9'; text++) {
        *is_number = true;
        whole = whole * 10 + (uint64_t)(*text - '0');
        if (whole > UINT64_MAX / 20000000) *is_too_large = true;
        if (*is_too_large) whole = 0;
    }
    if (*text == '.' && *is_number) {
        for (text++; *text >= '0' && *text <= '9'; text++) {
            fraction += (uint64_t)(*text - '0') * digit_scale;
            digit_scale /= 10;
        }
    }
    *millionths = whole * 1000000 + fraction;
    return text;
}

/* KVL_ERR_MALFORMED or KVL_ERR_OUT_OF_RANGE without a text: the callers know what they wanted. */
static kvl_status read_with_unit(const char *text, const unit *units, size_t n_units, uint64_t most,
                                 uint64_t *value)
{
    bool is_number = false;
    bool is_too_large = false;
    uint64_t millionths = 0;
    const char *name = read_number(text, &is_number, &is_too_large, &millionths);
    if (!is_number) return KVL_ERR_MALFORMED;
    while (*name == ' ') name++;
    for (size_t i = 0; i < n_units; i++) {
        if (strcmp(units[i].name, name) != 0) continue;
        const double product = (double)millionths / 1e6 * (double)units[i].scale;
        if (is_too_large || product > (double)most) return KVL_ERR_OUT_OF_RANGE;
        /* Whole numbers are exact; only a fraction goes through the double. */
        *value = millionths % 1000000 == 0 ? millionths / 1000000 * units[i].scale
                                           : (uint64_t)(product + 0.5);
        return KVL_OK;
    }
    return KVL_ERR_MALFORMED;
}

kvl_status kvl_bytes_from_text(const char *text, uint64_t *n_bytes, kvl_error *error)
{
    const kvl_status status =
        read_with_unit(text, byte_units, N_BYTE_UNITS, UINT64_C(1) << 63, n_bytes);
    if (status == KVL_OK) return KVL_OK;
    return KVL_FAIL(error, status,
                    "'%.60s' is no size: write a number and KiB, MiB, GiB, TiB, kB, "
                    "MB, GB or TB, as in 8GiB",
                    text);
}

kvl_status kvl_duration_from_text(const char *text, int64_t *duration_ns, kvl_error *error)
{
    const uint64_t most = UINT64_C(3153600000) * UINT64_C(1000000000);
    uint64_t value = 0;
    const kvl_status status = read_with_unit(text, time_units, N_TIME_UNITS, most, &value);
    if (status < 0) {
        return KVL_FAIL(error, status,
                        "'%.60s' is no time: write a number and us, ms, s, min or h, as in 50ms",
                        text);
    }
    *duration_ns = (int64_t)value;
    return KVL_OK;
}

char *kvl_bytes_to_text(uint64_t n_bytes, char *text)
{
    static const char *const names[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    size_t i = 0;
    double value = (double)n_bytes;
    while (value >= 1024.0 && i + 1 < sizeof names / sizeof *names) {
        value /= 1024.0;
        i++;
    }
    const int digits = i == 0 || value == (double)(uint64_t)value ? 0 : value < 10.0 ? 2 : 1;
    (void)snprintf(text, KVL_UNIT_TEXT_BYTES, "%.*f %s", digits, value, names[i]);
    return text;
}
