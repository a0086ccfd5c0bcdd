/* model/tokenizer.c: text to ids: special tokens are cut out, the rest is cut into words, and
 * within a word pairs of bytes are merged. */
#include "model/tokenizer.h"

#include "base/alloc.h"
#include "model/tokenizer_state.h"

#include <string.h>

/* One call of kvl_tokenize. */
typedef struct encoding {
    const kvl_tokenizer *tokenizer;
    const char *text;
    uint32_t **ids; /* the caller's */
    size_t n_ids;
    size_t capacity;
    uint8_t *classes; /* [n_bytes of the text] */
    kvl_pretokenizer_match *match;
    kvl_merge_word word;
    kvl_fragments fragments;
    kvl_error *error;
} encoding;

/* Makes room by half as much again, so that a long text does not copy its ids for every word. On an
 * error the caller's list is as it was. */
static kvl_status reserve_ids(encoding *encode, size_t n_more)
{
    if (n_more <= encode->capacity - encode->n_ids) return KVL_OK;
    const size_t capacity = encode->n_ids + n_more + encode->n_ids / 2;
    uint32_t *ids = kvl_realloc(*encode->ids, capacity * sizeof *ids);
    if (ids == NULL) {
        return KVL_FAIL(encode->error, KVL_ERR_NO_MEMORY, "no memory for %zu tokens", capacity);
    }
    *encode->ids = ids;
    encode->capacity = capacity;
    return KVL_OK;
}

/* Puts the symbols of a word into the nodes to merge; returns how many. A byte without a token
 * stays as a gap that nothing merges across, but if it is no part of a character either, it
 * becomes U+FFFD: what cannot be kept is at least shown. */
static size_t spread_word(const kvl_tokenizer *tokenizer, const char *text, const uint8_t *classes,
                          size_t n_classes, kvl_merge_node *nodes)
{
    static const uint8_t replacement[3] = {0xef, 0xbf, 0xbd};
    size_t n = 0;
    size_t at = 0;
    for (size_t c = 0; c < n_classes; c++) {
        const size_t past = at + kvl_class_bytes(classes[c]);
        const bool bad = classes[c] == KVL_CLASS_BAD_BYTE;
        for (; at < past; at++) {
            const uint32_t symbol = tokenizer->byte_symbols[(uint8_t)text[at]];
            if (symbol != KVL_SYMBOL_NONE || !bad) {
                nodes[n++].symbol = symbol;
                continue;
            }
            for (size_t i = 0; i < 3; i++) {
                nodes[n++].symbol = tokenizer->byte_symbols[replacement[i]];
            }
        }
    }
    return n;
}

/* Appends what a symbol stands for: a token, or, where merges made something that is none, its
 * bytes. A byte without a token has no id in any tokenizer and is left out, as llama.cpp does. */
static void append_symbol(encoding *encode, uint32_t symbol)
{
    const kvl_tokenizer *tokenizer = encode->tokenizer;
    uint32_t *ids = *encode->ids;
    if (symbol == KVL_SYMBOL_NONE) return;
    if (symbol < tokenizer->n_vocab) {
        ids[encode->n_ids++] = symbol;
        return;
    }
    size_t n_bytes = 0;
    const char *bytes = kvl_symbols_bytes(&tokenizer->symbols, symbol, &n_bytes);
    for (size_t i = 0; i < n_bytes; i++) {
        const uint32_t id = tokenizer->byte_symbols[(uint8_t)bytes[i]];
        if (id < tokenizer->n_vocab) ids[encode->n_ids++] = id;
    }
}

/* The room is reserved for the worst case, a token for every byte, before anything is appended:
 * nothing below can fail halfway through a word. */
static kvl_status encode_word(encoding *encode, const char *text, size_t n_bytes,
                              const uint8_t *classes, size_t n_classes)
{
    const kvl_tokenizer *tokenizer = encode->tokenizer;
    size_t n_symbols_max = n_bytes;
    for (size_t c = 0; c < n_classes; c++) {
        if (classes[c] == KVL_CLASS_BAD_BYTE) n_symbols_max += 2; /* see spread_word */
    }
    KVL_TRY(reserve_ids(encode, n_symbols_max));
    if (tokenizer->ignore_merges) {
        const uint32_t whole = kvl_symbols_find(&tokenizer->symbols, text, n_bytes);
        if (whole < tokenizer->n_vocab) {
            (*encode->ids)[encode->n_ids++] = whole;
            return KVL_OK;
        }
    }
    KVL_TRY(kvl_merge_word_reserve(&encode->word, n_symbols_max, encode->error));
    kvl_merge_node *nodes = encode->word.nodes;
    const size_t n_symbols = spread_word(tokenizer, text, classes, n_classes, nodes);
    kvl_merge_word_run(&tokenizer->merges, &encode->word, n_symbols);
    for (uint32_t at = 0; at != KVL_SYMBOL_NONE; at = nodes[at].next) {
        append_symbol(encode, nodes[at].symbol);
    }
    return KVL_OK;
}

/* Characters are classified once for the whole text between special tokens: what a pattern looks
 * ahead to ends there, as in llama.cpp. */
static kvl_status encode_words(encoding *encode, const char *text, size_t n_bytes)
{
    const size_t n_classes = kvl_pretokenizer_classify(text, n_bytes, encode->classes);
    size_t at = 0; /* in bytes, as `first` is in characters */
    for (size_t first = 0, past = 0; first < n_classes; first = past) {
        KVL_TRY(kvl_pretokenizer_next(encode->tokenizer->pretokenizer, encode->match,
                                      encode->classes, n_classes, first, &past, encode->error));
        size_t n_word = 0;
        for (size_t c = first; c < past; c++) n_word += kvl_class_bytes(encode->classes[c]);
        KVL_TRY(encode_word(encode, text + at, n_word, encode->classes + first, past - first));
        at += n_word;
    }
    /* Words cover the text: no byte is lost between two of them. */
    KVL_ASSERT(at == n_bytes);
    return KVL_OK;
}

static kvl_status encode_text(encoding *encode, size_t n_bytes, bool parse_special)
{
    encode->classes = kvl_alloc(n_bytes);
    encode->match = kvl_pretokenizer_match_create(encode->tokenizer->pretokenizer);
    if (encode->classes == NULL || encode->match == NULL) {
        return KVL_FAIL(encode->error, KVL_ERR_NO_MEMORY, "no memory to tokenize %zu bytes",
                        n_bytes);
    }
    KVL_TRY(kvl_specials_cut(&encode->tokenizer->specials, encode->text, n_bytes, parse_special,
                             &encode->fragments, encode->error));
    for (size_t i = 0; i < encode->fragments.n; i++) {
        const kvl_fragment fragment = encode->fragments.items[i];
        if (fragment.id == KVL_TOKEN_NONE) {
            KVL_TRY(encode_words(encode, encode->text + fragment.first,
                                 fragment.past - fragment.first));
            continue;
        }
        KVL_TRY(reserve_ids(encode, 1));
        (*encode->ids)[encode->n_ids++] = fragment.id;
    }
    return KVL_OK;
}

kvl_status kvl_tokenize(const kvl_tokenizer *tokenizer, const char *text, size_t n_bytes,
                        bool parse_special, uint32_t **ids, size_t *n_ids, kvl_error *error)
{
    KVL_ASSERT(tokenizer != NULL && ids != NULL && n_ids != NULL);
    KVL_ASSERT(*n_ids == 0 || *ids != NULL);
    if (n_bytes == 0) return KVL_OK;
    if (n_bytes > KVL_TEXT_BYTES_MAX) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "text of %zu bytes; at most %u at once: cut it into parts", n_bytes,
                        KVL_TEXT_BYTES_MAX);
    }
    encoding encode = {
        .tokenizer = tokenizer,
        .text = text,
        .ids = ids,
        .n_ids = *n_ids,
        .capacity = *n_ids,
        .error = error,
    };
    /* English has four to five bytes a token; a text that has fewer grows the list on its way. */
    kvl_status status = reserve_ids(&encode, n_bytes / 4 + 16);
    if (status >= 0) status = encode_text(&encode, n_bytes, parse_special);
    if (status >= 0) *n_ids = encode.n_ids;
    kvl_fragments_deinit(&encode.fragments);
    kvl_merge_word_deinit(&encode.word);
    kvl_pretokenizer_match_destroy(encode.match);
    kvl_free(encode.classes);
    return status;
}

/* ---- what a tokenizer knows of its tokens */

const char *kvl_token_bytes(const kvl_tokenizer *tokenizer, uint32_t id, bool with_special,
                            size_t *n_bytes)
{
    *n_bytes = 0;
    if (id >= tokenizer->n_vocab) return "";
    if ((tokenizer->flags[id] & KVL_TOKEN_HIDDEN) != 0 && !with_special) return "";
    return kvl_symbols_bytes(&tokenizer->symbols, id, n_bytes);
}

uint32_t kvl_tokenizer_n_vocab(const kvl_tokenizer *tokenizer)
{
    return tokenizer->n_vocab;
}

uint32_t kvl_tokenizer_bos(const kvl_tokenizer *tokenizer)
{
    return tokenizer->bos;
}

uint32_t kvl_tokenizer_eos(const kvl_tokenizer *tokenizer)
{
    return tokenizer->eos;
}

bool kvl_tokenizer_is_end(const kvl_tokenizer *tokenizer, uint32_t id)
{
    return id < tokenizer->n_vocab && (tokenizer->flags[id] & KVL_TOKEN_ENDS) != 0;
}

uint32_t kvl_tokenizer_special(const kvl_tokenizer *tokenizer, const char *text)
{
    const size_t n_bytes = strlen(text);
    for (uint32_t i = 0; i < tokenizer->specials.n; i++) {
        const kvl_special *special = &tokenizer->specials.items[i];
        if (special->n_bytes == n_bytes && memcmp(special->text, text, n_bytes) == 0) {
            return special->id;
        }
    }
    return KVL_TOKEN_NONE;
}
