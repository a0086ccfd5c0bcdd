/* token_case.h: small tokenizers made in memory, and golden files made of records, for the tests of
 * tokenizer and chat templates. */
#ifndef KVL_TEST_TOKEN_CASE_H
#define KVL_TEST_TOKEN_CASE_H

#include "gguf_writer.h"

#include "model/gguf.h"
#include "model/tokenizer.h"

/* A vocabulary: ids 0 .. 255 are the bytes, then come `tokens`. */
typedef struct kvl_token_case {
    const char *pre;           /* "smollm", ... */
    const char *const *tokens; /* as a file writes them */
    const int32_t *types;      /* of `tokens`; NULL: normal */
    size_t n_tokens;
    const char *const *merges;
    size_t n_merges;
    const uint8_t *missing; /* bytes without a token */
    size_t n_missing;
} kvl_token_case;

/* Starts the writer and writes the keys of the tokenizer. */
void kvl_token_case_write(const kvl_token_case *made_of, kvl_gguf_writer *writer);
/* Ends the writer. Owns: ended with kvl_tokenizer_destroy. */
kvl_tokenizer *kvl_token_case_finish(kvl_gguf_writer *writer);
kvl_tokenizer *kvl_token_case_make(const kvl_token_case *made_of);

/* The ids of a text; an error fails the test. Owns: list.ids, ended with kvl_free. */
typedef struct kvl_token_list {
    uint32_t *ids;
    size_t n;
} kvl_token_list;

kvl_token_list kvl_token_case_tokenize(const kvl_tokenizer *tokenizer, const char *text,
                                       size_t n_bytes, bool parse_special);
/* The bytes of the ids of a text are the text. */
void kvl_token_case_check_round_trip(const kvl_tokenizer *tokenizer, const char *text,
                                     size_t n_bytes);
/* Writes a character, surrogates too, and returns its bytes, 1 .. 4. */
size_t kvl_test_utf8_write(uint32_t code_point, char *text);

/* A file of the cache of models, without ".gguf". NULL, with a word on it, if it is not there.
 * Owns: ended with kvl_gguf_close. */
kvl_gguf *kvl_token_case_open_model(const char *name);

/* ---- golden files: see tests/golden/make_tokenizer_golden.py */

typedef struct kvl_golden {
    char *bytes;
    size_t n_bytes;
    size_t at;
} kvl_golden;

/* Fails the test if the file is not there. */
kvl_golden kvl_golden_open(const char *path);
void kvl_golden_close(kvl_golden *golden);
/* The letter of the next record, the one before having been read to its end; 0 at the end. */
char kvl_golden_letter(kvl_golden *golden);
/* The fields of a record, in their order. */
uint64_t kvl_golden_number(kvl_golden *golden, int base);
void kvl_golden_word(kvl_golden *golden, char *word, size_t size);
/* Reads a number and as many bytes. Borrowed until closed. */
const char *kvl_golden_bytes(kvl_golden *golden, size_t *n_bytes);

#endif /* KVL_TEST_TOKEN_CASE_H */
