/* model/unicode_class.h: bytes to characters, characters to the four classes that pre-tokenizers
 * tell apart. Private to the room.
 *
 * The tables are our own and not the regular-expression library's: its Unicode version changes with
 * the distribution, and token ids must not. Version 15.1, as llama.cpp has it; 14.0, as Debian 12
 * has it, puts 5,010 characters in another class.
 * Threads  Tables never change: share them freely. */
#ifndef KVL_MODEL_UNICODE_CLASS_H
#define KVL_MODEL_UNICODE_CLASS_H

#include <stddef.h>
#include <stdint.h>

typedef enum kvl_unicode_class {
    KVL_UNICODE_OTHER = 0,  /* also unassigned, and bytes that are no character */
    KVL_UNICODE_LETTER = 1, /* general category L */
    KVL_UNICODE_NUMBER = 2, /* general category N */
    KVL_UNICODE_SPACE = 3,  /* property White_Space */
} kvl_unicode_class;

/* Runs of one class, see unicode_ranges.c. */
extern const size_t kvl_unicode_n_runs;
extern const uint32_t kvl_unicode_runs[];

/* code_point  0x80 .. 0x10ffff */
kvl_unicode_class kvl_unicode_class_of(uint32_t code_point);

/* Reads the character at text[0]; n_bytes > 0.
 * Returns its bytes, 1 .. 4, and sets *code_point; or 0 if text[0] begins no whole character: cut
 * short, overlong or past U+10FFFF. Surrogates (U+D800 ..) count as characters, as in llama.cpp. */
size_t kvl_utf8_read(const char *text, size_t n_bytes, uint32_t *code_point);

#endif /* KVL_MODEL_UNICODE_CLASS_H */
