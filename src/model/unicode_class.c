/* model/unicode_class.c: UTF-8 by the table of the Unicode standard, 3.9 (table 3-7), and classes
 * by binary search. */
#include "model/unicode_class.h"

#include "base/status.h"

kvl_unicode_class kvl_unicode_class_of(uint32_t code_point)
{
    KVL_ASSERT(code_point >= 0x80 && code_point <= 0x10ffff);
    /* The last run that begins at or before the code point; the first run begins at 0x80. */
    size_t first = 0;
    size_t past = kvl_unicode_n_runs;
    while (past - first > 1) {
        const size_t middle = first + (past - first) / 2;
        if (kvl_unicode_runs[middle] >> 2 <= code_point) {
            first = middle;
        } else {
            past = middle;
        }
    }
    return (kvl_unicode_class)(kvl_unicode_runs[first] & 3);
}

/* How many bytes the character has that begins with `lead`, 0 if none does. 0xc0 and 0xc1 could
 * only begin overlong ones, 0xf5 and up only what lies past U+10FFFF. */
static size_t length_of(uint8_t lead)
{
    if (lead < 0x80) return 1;
    if (lead < 0xc2) return 0;
    if (lead < 0xe0) return 2;
    if (lead < 0xf0) return 3;
    return lead < 0xf5 ? 4 : 0;
}

size_t kvl_utf8_read(const char *text, size_t n_bytes, uint32_t *code_point)
{
    KVL_ASSERT(n_bytes > 0);
    const uint8_t *bytes = (const uint8_t *)text;
    const size_t length = length_of(bytes[0]);
    if (length == 0 || length > n_bytes) return 0;
    if (length == 1) {
        *code_point = bytes[0];
        return 1;
    }
    uint32_t value = bytes[0] & (0xffu >> (length + 1));
    for (size_t i = 1; i < length; i++) {
        if ((bytes[i] & 0xc0) != 0x80) return 0;
        value = value << 6 | (bytes[i] & 0x3fu);
    }
    if (length == 3 && value < 0x800) return 0;
    if (length == 4 && (value < 0x10000 || value > 0x10ffff)) return 0;
    *code_point = value;
    return length;
}
