/* model/pretokenize.h: cuts text into the words that byte pairs are merged within. Private to the
 * room.
 *
 * Method  Every character becomes one byte that says what a pattern wants to know of it: ASCII
 *         stands for itself, any other character for its Unicode class and its length. Patterns
 *         run over these bytes (PCRE2, compiled to machine code where it can be), so they see
 *         neither UTF-8, nor its errors, nor the library's own Unicode tables. They never need to
 *         step back more than one character, so time is linear and the stack does not grow.
 * Oracle  llama.cpp: same words on any text; a byte that is no part of a character is one
 *         character of class other, as the U+FFFD that llama.cpp puts in its place.
 * Threads Never changes once made: share it freely; the match belongs to one call. */
#ifndef KVL_MODEL_PRETOKENIZE_H
#define KVL_MODEL_PRETOKENIZE_H

#include "base/status.h"

/* A byte that is no part of a character. */
#define KVL_CLASS_BAD_BYTE 0x80u

typedef enum kvl_pretokenizer_kind {
    KVL_PRETOKENIZER_GPT2,
    KVL_PRETOKENIZER_SMOLLM,
    KVL_PRETOKENIZER_QWEN2,
    KVL_PRETOKENIZER_LLAMA_BPE,
    KVL_PRETOKENIZER_KIND_COUNT
} kvl_pretokenizer_kind;

typedef struct kvl_pretokenizer kvl_pretokenizer;
typedef struct kvl_pretokenizer_match kvl_pretokenizer_match; /* room for one match, reusable */

/* Looks up the value of tokenizer.ggml.pre; false if it is not known here. */
bool kvl_pretokenizer_kind_of(const char *name, size_t n_bytes, kvl_pretokenizer_kind *kind);
/* "gpt-2, smollm, ...": for errors. Static text. */
const char *kvl_pretokenizer_names(void);

/* use_machine_code  false leaves the library's interpreter to do it (tests compare the two)
 * Owns     *pretokenizer: ended with kvl_pretokenizer_destroy
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_pretokenizer_create(kvl_pretokenizer_kind kind, bool use_machine_code,
                                                kvl_pretokenizer **pretokenizer, kvl_error *error);
/* NULL does nothing. */
void kvl_pretokenizer_destroy(kvl_pretokenizer *pretokenizer);

/* Owns     ended with kvl_pretokenizer_match_destroy; NULL when there is no memory */
KVL_MUST_USE kvl_pretokenizer_match *kvl_pretokenizer_match_create(const kvl_pretokenizer *of);
/* NULL does nothing. */
void kvl_pretokenizer_match_destroy(kvl_pretokenizer_match *match);

/* Writes a class for every character of the text, at most n_bytes of them; returns how many. */
size_t kvl_pretokenizer_classify(const char *text, size_t n_bytes, uint8_t *classes);

/* Bytes of the character that a class stands for, 1 .. 4. */
static inline size_t kvl_class_bytes(uint8_t class_byte)
{
    return class_byte < 0x80 ? 1 : (size_t)(class_byte & 3) + 1;
}

/* Where the word that begins at `first` ends, in characters: first < *past <= n_classes.
 * first < n_classes
 * Errors   KVL_ERR_NO_MEMORY, KVL_ERR_INTERNAL */
KVL_MUST_USE kvl_status kvl_pretokenizer_next(const kvl_pretokenizer *pretokenizer,
                                              kvl_pretokenizer_match *match, const uint8_t *classes,
                                              size_t n_classes, size_t first, size_t *past,
                                              kvl_error *error);

#endif /* KVL_MODEL_PRETOKENIZE_H */
