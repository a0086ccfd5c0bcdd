/* model/tokenizer_specials.h: tokens whose text is found whole, before words are cut and pairs are
 * merged. Private to the room.
 *
 * Oracle   llama.cpp: the longest text first, everywhere; then the next longest in what is left.
 *          Tokens that the user of a model defined are always found; control tokens only where the
 *          caller asks for it.
 * Threads  Never changes once filled; fragments belong to one call. */
#ifndef KVL_MODEL_TOKENIZER_SPECIALS_H
#define KVL_MODEL_TOKENIZER_SPECIALS_H

#include "base/status.h"

typedef struct kvl_special {
    const char *text; /* borrowed from the vocabulary */
    uint32_t n_bytes; /* > 0 */
    uint32_t id;
    bool always; /* found in user text too */
} kvl_special;

typedef struct kvl_specials {
    kvl_special *items; /* longest first, lower id first among equals */
    uint32_t n;
} kvl_specials;

/* A stretch of a text: one special token, or bytes between them (id KVL_TOKEN_NONE). */
typedef struct kvl_fragment {
    size_t first, past;
    uint32_t id;
} kvl_fragment;

typedef struct kvl_fragments {
    kvl_fragment *items;
    size_t n;
    size_t capacity;
} kvl_fragments;

void kvl_specials_sort(kvl_specials *specials);

/* Cuts a text into fragments, none empty. *fragments is zeroed or from an earlier call.
 * Owns     the caller ends it with kvl_fragments_deinit, also after an error
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_specials_cut(const kvl_specials *specials, const char *text,
                                         size_t n_bytes, bool parse_special,
                                         kvl_fragments *fragments, kvl_error *error);
void kvl_fragments_deinit(kvl_fragments *fragments);

/* A text that marks a token as special whatever the file says. False for any other.
 * ends  set to whether an answer is over after it */
bool kvl_special_is_known(const char *text, size_t n_bytes, bool *ends);

#endif /* KVL_MODEL_TOKENIZER_SPECIALS_H */
