/* model/detokenizer.c: tokens to text as they come, in whole characters.
 *
 * Method   The Unicode standard, 3.9, "U+FFFD substitution of maximal subparts": bytes that began a
 *          character which did not come are replaced together, any other bad byte alone. So the
 *          output is always UTF-8, and the same however the bytes were spread over tokens. */
#include "model/tokenizer.h"

#include "model/tokenizer_state.h"
#include "model/unicode_class.h"

#include <string.h>

static const char replacement[3] = {'\xef', '\xbf', '\xbd'};

void kvl_detokenizer_init(kvl_detokenizer *detokenizer, const kvl_tokenizer *tokenizer)
{
    KVL_ASSERT(tokenizer != NULL);
    *detokenizer = (kvl_detokenizer){.tokenizer = tokenizer};
}

typedef enum fit {
    FIT_BROKEN, /* no character begins like this */
    FIT_BEGUN,  /* more bytes can make it one */
    FIT_WHOLE,
} fit;

/* What n > 0 bytes are to UTF-8, of which all but the last are known to fit. The second byte rules
 * out overlong forms, surrogates and what lies past U+10FFFF. */
static fit fit_of(const uint8_t *bytes, size_t n)
{
    const uint8_t lead = bytes[0];
    if (lead < 0x80) return FIT_WHOLE;
    if (lead < 0xc2 || lead > 0xf4) return FIT_BROKEN;
    if (n == 1) return FIT_BEGUN;
    const uint8_t last = bytes[n - 1];
    if (last < 0x80 || last > 0xbf) return FIT_BROKEN;
    if (n == 2) {
        if (lead == 0xe0 && last < 0xa0) return FIT_BROKEN;
        if (lead == 0xed && last > 0x9f) return FIT_BROKEN;
        if (lead == 0xf0 && last < 0x90) return FIT_BROKEN;
        if (lead == 0xf4 && last > 0x8f) return FIT_BROKEN;
    }
    const size_t length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    return n < length ? FIT_BEGUN : FIT_WHOLE;
}

/* Adds a byte to what waits. Writes what can be written, at most three bytes for each byte that no
 * longer waits, and returns how many. */
static size_t push_byte(kvl_detokenizer *detokenizer, char byte, char *out)
{
    size_t n_out = 0;
    char *pending = detokenizer->pending;
    KVL_ASSERT(detokenizer->n_pending < sizeof detokenizer->pending);
    pending[detokenizer->n_pending++] = byte;
    fit how = fit_of((const uint8_t *)pending, detokenizer->n_pending);
    if (how == FIT_BROKEN && detokenizer->n_pending > 1) {
        /* What waited never becomes a character; the new byte may begin one. */
        memcpy(out, replacement, sizeof replacement);
        n_out = sizeof replacement;
        pending[0] = byte;
        detokenizer->n_pending = 1;
        how = fit_of((const uint8_t *)pending, 1);
    }
    if (how == FIT_BEGUN) return n_out;
    const char *text = how == FIT_WHOLE ? pending : replacement;
    const size_t n_text = how == FIT_WHOLE ? detokenizer->n_pending : sizeof replacement;
    memcpy(out + n_out, text, n_text);
    detokenizer->n_pending = 0;
    return n_out + n_text;
}

size_t kvl_detokenizer_push(kvl_detokenizer *detokenizer, uint32_t id, char *out, size_t out_size)
{
    KVL_ASSERT(out_size >= KVL_DETOKENIZER_OUT_MIN);
    size_t n_bytes = 0;
    const char *bytes = kvl_token_bytes(detokenizer->tokenizer, id, false, &n_bytes);
    KVL_ASSERT(n_bytes <= KVL_TOKEN_BYTES_MAX);
    size_t n_out = 0;
    for (size_t i = 0; i < n_bytes; i++) {
        n_out += push_byte(detokenizer, bytes[i], out + n_out);
        KVL_ASSERT(n_out <= out_size);
    }
    return n_out;
}

size_t kvl_detokenizer_finish(kvl_detokenizer *detokenizer, char *out, size_t out_size)
{
    KVL_ASSERT(out_size >= 12);
    if (detokenizer->n_pending == 0) return 0;
    detokenizer->n_pending = 0;
    memcpy(out, replacement, sizeof replacement);
    return sizeof replacement;
}
