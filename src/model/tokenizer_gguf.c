/* model/tokenizer_gguf.c: reads vocabulary, merges and special tokens from a GGUF file. */
#include "model/tokenizer_gguf.h"

#include "base/alloc.h"
#include "model/tokenizer_state.h"
#include "model/unicode_class.h"

#include <string.h>

/* tokenizer.ggml.token_type */
enum {
    TYPE_NORMAL = 1,
    TYPE_UNKNOWN = 2,
    TYPE_CONTROL = 3,
    TYPE_USER_DEFINED = 4,
    TYPE_UNUSED = 5,
    TYPE_BYTE = 6,
};

typedef struct loading {
    const kvl_gguf *gguf;
    kvl_tokenizer *tokenizer;
    uint16_t byte_of[0x200]; /* byte for a character of a token's text, 0x100 if it is none */
    kvl_error *error;
} loading;

/* ---- text of tokens
 *
 * GPT-2 wrote byte-level tokens as text by giving every byte a printable character: itself where it
 * is printable in Latin-1, otherwise the next one from U+0100 on. */

static void fill_byte_of(uint16_t byte_of[0x200])
{
    for (size_t i = 0; i < 0x200; i++) byte_of[i] = 0x100;
    uint32_t next = 0x100;
    for (uint16_t byte = 0; byte < 0x100; byte++) {
        const bool printable = (byte > ' ' && byte < 0x7f) || (byte > 0xa0 && byte != 0xad);
        byte_of[printable ? byte : next++] = byte;
    }
}

/* Turns the text of a token into its bytes (never more). False if a character stands for none, or
 * if there are more than `capacity`. */
static bool decode_text(const loading *load, kvl_gguf_text text, char *bytes, size_t capacity,
                        size_t *n_bytes)
{
    size_t n = 0;
    for (size_t at = 0; at < text.n_bytes;) {
        uint32_t code_point = 0;
        const size_t length = kvl_utf8_read(text.bytes + at, text.n_bytes - at, &code_point);
        if (length == 0 || code_point >= 0x200 || load->byte_of[code_point] > 0xff) return false;
        if (n == capacity) return false;
        bytes[n++] = (char)load->byte_of[code_point];
        at += length;
    }
    *n_bytes = n;
    return true;
}

/* ---- vocabulary */

static kvl_status add_token(loading *load, kvl_gguf_text text, int32_t type)
{
    kvl_tokenizer *tokenizer = load->tokenizer;
    const uint32_t id = tokenizer->symbols.n;
    /* A character of a text is at most two bytes here, so this bounds the token's bytes too. */
    if (text.n_bytes > 2 * (size_t)KVL_TOKEN_BYTES_MAX) {
        return KVL_FAIL(load->error, KVL_ERR_TOO_LARGE,
                        "token %u of tokenizer.ggml.tokens has %zu bytes; at most %u", id,
                        text.n_bytes, 2 * KVL_TOKEN_BYTES_MAX);
    }
    char decoded[2 * KVL_TOKEN_BYTES_MAX];
    size_t n_decoded = 0;
    const bool decodable = decode_text(load, text, decoded, sizeof decoded, &n_decoded);
    const bool as_written =
        !decodable || type == TYPE_CONTROL || type == TYPE_USER_DEFINED || type == TYPE_UNKNOWN;
    const char *bytes = as_written ? text.bytes : decoded;
    const size_t n_bytes = as_written ? text.n_bytes : n_decoded;
    if (n_bytes > KVL_TOKEN_BYTES_MAX) {
        return KVL_FAIL(load->error, KVL_ERR_TOO_LARGE,
                        "token %u of tokenizer.ggml.tokens stands for %zu bytes; at most %u", id,
                        n_bytes, KVL_TOKEN_BYTES_MAX);
    }
    /* Merges and words find a token by its bytes; one that is shown as written is among them only
     * where that is the same. */
    const bool findable =
        decodable && n_bytes > 0 && n_bytes == n_decoded && memcmp(bytes, decoded, n_bytes) == 0;
    if (findable && kvl_symbols_find(&tokenizer->symbols, bytes, n_bytes) != KVL_SYMBOL_NONE) {
        return KVL_FAIL(load->error, KVL_ERR_MALFORMED,
                        "tokens %u and %u of tokenizer.ggml.tokens are the same",
                        kvl_symbols_find(&tokenizer->symbols, bytes, n_bytes), id);
    }
    return kvl_symbols_add(&tokenizer->symbols, bytes, n_bytes, findable, load->error);
}

static kvl_status read_types(const loading *load, uint32_t n_vocab, const kvl_gguf_value **types)
{
    KVL_TRY(kvl_gguf_find_array(load->gguf, "tokenizer.ggml.token_type", KVL_GGUF_I32, 0,
                                KVL_VOCABULARY_MAX, types, load->error));
    if (*types == NULL || (*types)->n_elements == n_vocab) return KVL_OK;
    return KVL_FAIL(load->error, KVL_ERR_MALFORMED,
                    "key tokenizer.ggml.token_type has %zu elements at byte %zu; must be %u, as "
                    "many as tokenizer.ggml.tokens",
                    (*types)->n_elements, (*types)->offset, n_vocab);
}

static kvl_status read_tokens(loading *load, const kvl_gguf_value **types)
{
    kvl_tokenizer *tokenizer = load->tokenizer;
    const kvl_gguf_value *tokens = NULL;
    KVL_TRY(kvl_gguf_get_array(load->gguf, "tokenizer.ggml.tokens", KVL_GGUF_TEXT, 1,
                               KVL_VOCABULARY_MAX, &tokens, load->error));
    tokenizer->n_vocab = (uint32_t)tokens->n_elements;
    KVL_TRY(read_types(load, tokenizer->n_vocab, types));
    tokenizer->flags = kvl_alloc_zero(tokenizer->n_vocab, sizeof *tokenizer->flags);
    if (tokenizer->flags == NULL) {
        return KVL_FAIL(load->error, KVL_ERR_NO_MEMORY, "no memory for %u tokens",
                        tokenizer->n_vocab);
    }
    KVL_TRY(
        kvl_symbols_init(&tokenizer->symbols, tokenizer->n_vocab, tokens->n_bytes, load->error));
    kvl_gguf_texts texts = kvl_gguf_texts_of(tokens);
    kvl_gguf_text text;
    for (uint32_t id = 0; kvl_gguf_texts_next(&texts, &text); id++) {
        const int32_t type = *types == NULL ? TYPE_NORMAL : kvl_gguf_element_i32(*types, id);
        KVL_TRY(add_token(load, text, type));
    }
    for (unsigned byte = 0; byte < 256; byte++) {
        const char one = (char)byte;
        tokenizer->byte_symbols[byte] = kvl_symbols_find(&tokenizer->symbols, &one, 1);
    }
    return KVL_OK;
}

/* ---- merges */

/* The symbol of these bytes, made if there is none: a part of a merge need not be a token. */
static kvl_status symbol_for(loading *load, const char *bytes, size_t n_bytes, uint32_t *symbol)
{
    kvl_symbols *symbols = &load->tokenizer->symbols;
    *symbol = kvl_symbols_find(symbols, bytes, n_bytes);
    if (*symbol != KVL_SYMBOL_NONE) return KVL_OK;
    *symbol = symbols->n;
    return kvl_symbols_add(symbols, bytes, n_bytes, true, load->error);
}

/* "left right", where either may begin with a space but not contain one further on. */
static kvl_status add_merge(loading *load, kvl_gguf_text text, uint32_t rank)
{
    const char *space = text.n_bytes < 3 ? NULL : memchr(text.bytes + 1, ' ', text.n_bytes - 2);
    if (space == NULL) {
        return KVL_FAIL(load->error, KVL_ERR_MALFORMED,
                        "merge %u of tokenizer.ggml.merges is not two texts with a space between",
                        rank);
    }
    const size_t n_left_text = (size_t)(space - text.bytes);
    const kvl_gguf_text left_text = {text.bytes, n_left_text};
    const kvl_gguf_text right_text = {space + 1, text.n_bytes - n_left_text - 1};
    char bytes[2 * KVL_TOKEN_BYTES_MAX];
    size_t n_left = 0;
    size_t n_right = 0;
    /* A part with a character that stands for no byte, or longer than a token may be, can never
     * come up in a word. Its rank is not given to another merge. */
    if (!decode_text(load, left_text, bytes, KVL_TOKEN_BYTES_MAX, &n_left) ||
        !decode_text(load, right_text, bytes + n_left, KVL_TOKEN_BYTES_MAX, &n_right)) {
        return KVL_OK;
    }
    uint32_t left = 0;
    uint32_t right = 0;
    uint32_t result = 0;
    KVL_TRY(symbol_for(load, bytes, n_left, &left));
    KVL_TRY(symbol_for(load, bytes + n_left, n_right, &right));
    KVL_TRY(symbol_for(load, bytes, n_left + n_right, &result));
    kvl_merges_add(&load->tokenizer->merges, rank, left, right, result);
    return KVL_OK;
}

static kvl_status read_merges(loading *load)
{
    const kvl_gguf_value *merges = NULL;
    KVL_TRY(kvl_gguf_get_array(load->gguf, "tokenizer.ggml.merges", KVL_GGUF_TEXT, 0,
                               KVL_MERGES_MAX, &merges, load->error));
    KVL_TRY(kvl_merges_init(&load->tokenizer->merges, (uint32_t)merges->n_elements, load->error));
    kvl_gguf_texts texts = kvl_gguf_texts_of(merges);
    kvl_gguf_text text;
    for (uint32_t rank = 0; kvl_gguf_texts_next(&texts, &text); rank++) {
        KVL_TRY(add_merge(load, text, rank));
    }
    return KVL_OK;
}

/* ---- special tokens */

static kvl_status read_id(const loading *load, const char *key, uint32_t *id)
{
    return kvl_gguf_find_u32(load->gguf, key, 0, load->tokenizer->n_vocab - 1, KVL_TOKEN_NONE, id,
                             load->error);
}

/* Tokens that end an answer because the file names them. */
static kvl_status mark_named_ends(const loading *load)
{
    static const char *const keys[] = {
        "tokenizer.ggml.eos_token_id",     "tokenizer.ggml.eot_token_id",
        "tokenizer.ggml.eom_token_id",     "tokenizer.ggml.fim_pad_token_id",
        "tokenizer.ggml.fim_rep_token_id", "tokenizer.ggml.fim_sep_token_id",
    };
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        uint32_t id = KVL_TOKEN_NONE;
        KVL_TRY(read_id(load, keys[i], &id));
        if (id != KVL_TOKEN_NONE) load->tokenizer->flags[id] |= KVL_TOKEN_ENDS;
    }
    return KVL_OK;
}

/* Sets the flags of a token; true if its text is to be found whole. A known text makes a token
 * special even if the file calls it an ordinary one or the user's own. */
static bool classify_token(kvl_tokenizer *tokenizer, uint32_t id, int32_t type, bool *always)
{
    size_t n_bytes = 0;
    const char *bytes = kvl_symbols_bytes(&tokenizer->symbols, id, &n_bytes);
    bool ends = false;
    const bool known = kvl_special_is_known(bytes, n_bytes, &ends);
    if (ends) tokenizer->flags[id] |= KVL_TOKEN_ENDS;
    *always = type == TYPE_USER_DEFINED && !known;
    if (known || type == TYPE_CONTROL || type == TYPE_UNKNOWN || type == TYPE_UNUSED) {
        tokenizer->flags[id] |= KVL_TOKEN_HIDDEN;
    }
    const bool whole =
        known || type == TYPE_CONTROL || type == TYPE_UNKNOWN || type == TYPE_USER_DEFINED;
    return whole && n_bytes > 0;
}

static kvl_status read_specials(const loading *load, const kvl_gguf_value *types)
{
    kvl_tokenizer *tokenizer = load->tokenizer;
    kvl_specials *specials = &tokenizer->specials;
    uint32_t capacity = 0;
    for (uint32_t id = 0; id < tokenizer->n_vocab; id++) {
        const int32_t type = types == NULL ? TYPE_NORMAL : kvl_gguf_element_i32(types, id);
        bool always = false;
        if (!classify_token(tokenizer, id, type, &always)) continue;
        if (specials->n == capacity) {
            capacity = capacity == 0 ? 64 : 2 * capacity;
            kvl_special *items = kvl_realloc(specials->items, capacity * sizeof *items);
            if (items == NULL) {
                return KVL_FAIL(load->error, KVL_ERR_NO_MEMORY, "no memory for special tokens");
            }
            specials->items = items;
        }
        size_t n_bytes = 0;
        const char *text = kvl_symbols_bytes(&tokenizer->symbols, id, &n_bytes);
        specials->items[specials->n++] = (kvl_special){text, (uint32_t)n_bytes, id, always};
    }
    kvl_specials_sort(specials);
    return mark_named_ends(load);
}

/* ---- all together */

static kvl_status read_kind(const loading *load, kvl_pretokenizer_kind *kind)
{
    kvl_gguf_text model;
    kvl_gguf_text pretokenizer;
    KVL_TRY(kvl_gguf_get_text(load->gguf, "tokenizer.ggml.model", &model, load->error));
    if (!kvl_gguf_text_is(model, "gpt2")) {
        return KVL_FAIL(load->error, KVL_ERR_UNSUPPORTED,
                        "key tokenizer.ggml.model is %.*s; known is gpt2 (byte-level BPE)",
                        (int)(model.n_bytes < 64 ? model.n_bytes : 64), model.bytes);
    }
    KVL_TRY(kvl_gguf_get_text(load->gguf, "tokenizer.ggml.pre", &pretokenizer, load->error));
    if (kvl_pretokenizer_kind_of(pretokenizer.bytes, pretokenizer.n_bytes, kind)) return KVL_OK;
    return KVL_FAIL(load->error, KVL_ERR_UNSUPPORTED,
                    "key tokenizer.ggml.pre is %.*s; known are %s",
                    (int)(pretokenizer.n_bytes < 64 ? pretokenizer.n_bytes : 64),
                    pretokenizer.bytes, kvl_pretokenizer_names());
}

static kvl_status read_all(loading *load)
{
    kvl_tokenizer *tokenizer = load->tokenizer;
    kvl_pretokenizer_kind kind = KVL_PRETOKENIZER_GPT2;
    KVL_TRY(read_kind(load, &kind));
    tokenizer->ignore_merges = kind == KVL_PRETOKENIZER_LLAMA_BPE;
    KVL_TRY(kvl_pretokenizer_create(kind, true, &tokenizer->pretokenizer, load->error));
    const kvl_gguf_value *types = NULL;
    KVL_TRY(read_tokens(load, &types));
    KVL_TRY(read_merges(load));
    KVL_TRY(read_id(load, "tokenizer.ggml.bos_token_id", &tokenizer->bos));
    KVL_TRY(read_id(load, "tokenizer.ggml.eos_token_id", &tokenizer->eos));
    /* Last, because special tokens borrow their texts from the symbols, which move while they
     * grow. */
    return read_specials(load, types);
}

kvl_status kvl_tokenizer_create(const kvl_gguf *gguf, kvl_tokenizer **tokenizer, kvl_error *error)
{
    KVL_ASSERT(gguf != NULL && tokenizer != NULL);
    *tokenizer = NULL;
    kvl_tokenizer *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a tokenizer");
    loading load = {.gguf = gguf, .tokenizer = made, .error = error};
    fill_byte_of(load.byte_of);
    const kvl_status status = read_all(&load);
    if (status < 0) {
        kvl_tokenizer_destroy(made);
        return status;
    }
    *tokenizer = made;
    return KVL_OK;
}

void kvl_tokenizer_destroy(kvl_tokenizer *tokenizer)
{
    if (tokenizer == NULL) return;
    kvl_pretokenizer_destroy(tokenizer->pretokenizer);
    kvl_symbols_deinit(&tokenizer->symbols);
    kvl_merges_deinit(&tokenizer->merges);
    kvl_free(tokenizer->specials.items);
    kvl_free(tokenizer->flags);
    kvl_free(tokenizer);
}
