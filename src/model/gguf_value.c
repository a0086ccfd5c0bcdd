/* model/gguf_value.c: typed look-ups in the metadata. Everything that can be wrong with a value of
 * a parsed file is its type and its range; both are refused here, with key, value and byte, so that
 * no caller casts bytes on the file's word. */
#include "model/gguf.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

/* The format's names, except that its "string" is a text here. */
static const char *type_name(kvl_gguf_type type)
{
    static const char *const names[KVL_GGUF_TYPE_COUNT] = {
        "uint8", "int8", "uint16", "int16",  "uint32", "int32",   "float32",
        "bool",  "text", "array",  "uint64", "int64",  "float64",
    };
    KVL_ASSERT((unsigned)type < KVL_GGUF_TYPE_COUNT);
    return names[type];
}

static kvl_status refuse_missing(const char *key, kvl_error *error)
{
    return KVL_FAIL(error, KVL_ERR_MALFORMED,
                    "key %s is missing; convert the model again with current tools", key);
}

static kvl_status refuse_type(const kvl_gguf_value *value, const char *key, const char *wanted,
                              kvl_error *error)
{
    return KVL_FAIL(error, KVL_ERR_MALFORMED, "key %s is of type %s at byte %zu; must be %s", key,
                    type_name(value->type), value->offset, wanted);
}

/* Numbers lie where they fall in the file, so they are put together byte by byte: a cast would be
 * an unaligned read. */
static uint64_t bits_at(const kvl_gguf_value *value, size_t index, size_t n_bytes)
{
    KVL_ASSERT(index < value->n_elements && (index + 1) * n_bytes <= value->n_bytes);
    uint64_t bits = 0;
    for (size_t i = 0; i < n_bytes; i++)
        bits |= (uint64_t)value->bytes[index * n_bytes + i] << (8 * i);
    return bits;
}

uint32_t kvl_gguf_element_u32(const kvl_gguf_value *value, size_t index)
{
    KVL_ASSERT(value->element_type == KVL_GGUF_U32);
    return (uint32_t)bits_at(value, index, 4);
}

int32_t kvl_gguf_element_i32(const kvl_gguf_value *value, size_t index)
{
    KVL_ASSERT(value->element_type == KVL_GGUF_I32);
    const uint32_t bits = (uint32_t)bits_at(value, index, 4);
    int32_t number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

float kvl_gguf_element_f32(const kvl_gguf_value *value, size_t index)
{
    KVL_ASSERT(value->element_type == KVL_GGUF_F32);
    const uint32_t bits = (uint32_t)bits_at(value, index, 4);
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* An integer of any type as magnitude and sign: no 64-bit type holds them all. */
static bool integer_of(const kvl_gguf_value *value, uint64_t *magnitude, bool *negative)
{
    size_t n_bytes = 0;
    bool is_signed = false;
    switch (value->type) {
    case KVL_GGUF_U8: n_bytes = 1; break;
    case KVL_GGUF_U16: n_bytes = 2; break;
    case KVL_GGUF_U32: n_bytes = 4; break;
    case KVL_GGUF_U64: n_bytes = 8; break;
    case KVL_GGUF_I8: n_bytes = 1, is_signed = true; break;
    case KVL_GGUF_I16: n_bytes = 2, is_signed = true; break;
    case KVL_GGUF_I32: n_bytes = 4, is_signed = true; break;
    case KVL_GGUF_I64: n_bytes = 8, is_signed = true; break;
    default: return false;
    }
    const uint64_t bits = bits_at(value, 0, n_bytes);
    *negative = is_signed && (bits >> (8 * n_bytes - 1)) != 0;
    /* Negated within the width of the type; the mask is a shift that stays below 64. */
    *magnitude = *negative ? (0 - bits) & (UINT64_MAX >> (64 - 8 * n_bytes)) : bits;
    return true;
}

/* Too large and too small are different classes: a limit of ours can be asked to be raised, a size
 * of 0 is a broken file. */
static kvl_status u32_of(const kvl_gguf_value *value, const char *key, uint32_t minimum,
                         uint32_t maximum, uint32_t *result, kvl_error *error)
{
    uint64_t magnitude = 0;
    bool negative = false;
    if (!integer_of(value, &magnitude, &negative))
        return refuse_type(value, key, "an integer", error);
    if (negative || magnitude < minimum || magnitude > maximum) {
        const bool too_large = !negative && magnitude > maximum;
        return KVL_FAIL(error, too_large ? KVL_ERR_TOO_LARGE : KVL_ERR_MALFORMED,
                        "key %s is %s%" PRIu64 " at byte %zu; must be %u to %u", key,
                        negative ? "-" : "", magnitude, value->offset, minimum, maximum);
    }
    *result = (uint32_t)magnitude;
    return KVL_OK;
}

static kvl_status f32_of(const kvl_gguf_value *value, const char *key, float minimum, float maximum,
                         float *result, kvl_error *error)
{
    double number = 0;
    if (value->type == KVL_GGUF_F32) {
        number = (double)kvl_gguf_element_f32(value, 0);
    } else if (value->type == KVL_GGUF_F64) {
        const uint64_t bits = bits_at(value, 0, 8);
        memcpy(&number, &bits, sizeof number);
    } else {
        return refuse_type(value, key, "a float", error);
    }
    /* Written so that not-a-number fails it. Checked before the conversion, which is undefined for
     * a double that no float holds. */
    if (!(number >= (double)minimum && number <= (double)maximum)) {
        return KVL_FAIL(error, number > (double)maximum ? KVL_ERR_TOO_LARGE : KVL_ERR_MALFORMED,
                        "key %s is %g at byte %zu; must be %g to %g", key, number, value->offset,
                        (double)minimum, (double)maximum);
    }
    *result = (float)number;
    return KVL_OK;
}

kvl_status kvl_gguf_get_u32(const kvl_gguf *gguf, const char *key, uint32_t minimum,
                            uint32_t maximum, uint32_t *result, kvl_error *error)
{
    const kvl_gguf_value *value = kvl_gguf_find(gguf, key);
    if (value == NULL) return refuse_missing(key, error);
    return u32_of(value, key, minimum, maximum, result, error);
}

kvl_status kvl_gguf_find_u32(const kvl_gguf *gguf, const char *key, uint32_t minimum,
                             uint32_t maximum, uint32_t fallback, uint32_t *result,
                             kvl_error *error)
{
    const kvl_gguf_value *value = kvl_gguf_find(gguf, key);
    if (value != NULL) return u32_of(value, key, minimum, maximum, result, error);
    *result = fallback;
    return KVL_OK;
}

kvl_status kvl_gguf_get_f32(const kvl_gguf *gguf, const char *key, float minimum, float maximum,
                            float *result, kvl_error *error)
{
    const kvl_gguf_value *value = kvl_gguf_find(gguf, key);
    if (value == NULL) return refuse_missing(key, error);
    return f32_of(value, key, minimum, maximum, result, error);
}

kvl_status kvl_gguf_find_f32(const kvl_gguf *gguf, const char *key, float minimum, float maximum,
                             float fallback, float *result, kvl_error *error)
{
    const kvl_gguf_value *value = kvl_gguf_find(gguf, key);
    if (value != NULL) return f32_of(value, key, minimum, maximum, result, error);
    *result = fallback;
    return KVL_OK;
}

kvl_status kvl_gguf_find_bool(const kvl_gguf *gguf, const char *key, bool fallback, bool *result,
                              kvl_error *error)
{
    const kvl_gguf_value *value = kvl_gguf_find(gguf, key);
    if (value == NULL) {
        *result = fallback;
        return KVL_OK;
    }
    if (value->type != KVL_GGUF_BOOL) return refuse_type(value, key, "a bool", error);
    *result = value->bytes[0] == 1;
    return KVL_OK;
}

kvl_status kvl_gguf_find_text(const kvl_gguf *gguf, const char *key, kvl_gguf_text *result,
                              kvl_error *error)
{
    const kvl_gguf_value *value = kvl_gguf_find(gguf, key);
    if (value == NULL) {
        *result = (kvl_gguf_text){NULL, 0};
        return KVL_OK;
    }
    if (value->type != KVL_GGUF_TEXT) return refuse_type(value, key, "a text", error);
    *result = (kvl_gguf_text){(const char *)value->bytes, value->n_bytes};
    return KVL_OK;
}

kvl_status kvl_gguf_get_text(const kvl_gguf *gguf, const char *key, kvl_gguf_text *result,
                             kvl_error *error)
{
    if (kvl_gguf_find(gguf, key) == NULL) return refuse_missing(key, error);
    return kvl_gguf_find_text(gguf, key, result, error);
}

/* The element type is held against what the caller will read. A reader that skips this reads four
 * bytes an element out of an array that has one. */
kvl_status kvl_gguf_find_array(const kvl_gguf *gguf, const char *key, kvl_gguf_type element_type,
                               size_t n_minimum, size_t n_maximum, const kvl_gguf_value **result,
                               kvl_error *error)
{
    const kvl_gguf_value *value = kvl_gguf_find(gguf, key);
    if (value == NULL) {
        *result = NULL;
        return KVL_OK;
    }
    if (value->type != KVL_GGUF_ARRAY) return refuse_type(value, key, "an array", error);
    if (value->element_type != element_type) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "key %s is an array of %s at byte %zu; must be an array of %s", key,
                        type_name(value->element_type), value->offset, type_name(element_type));
    }
    if (value->n_elements < n_minimum || value->n_elements > n_maximum) {
        return KVL_FAIL(error,
                        value->n_elements > n_maximum ? KVL_ERR_TOO_LARGE : KVL_ERR_MALFORMED,
                        "key %s has %zu elements at byte %zu; must have %zu to %zu", key,
                        value->n_elements, value->offset, n_minimum, n_maximum);
    }
    *result = value;
    return KVL_OK;
}

kvl_status kvl_gguf_get_array(const kvl_gguf *gguf, const char *key, kvl_gguf_type element_type,
                              size_t n_minimum, size_t n_maximum, const kvl_gguf_value **result,
                              kvl_error *error)
{
    if (kvl_gguf_find(gguf, key) == NULL) return refuse_missing(key, error);
    return kvl_gguf_find_array(gguf, key, element_type, n_minimum, n_maximum, result, error);
}

kvl_gguf_texts kvl_gguf_texts_of(const kvl_gguf_value *value)
{
    KVL_ASSERT(value->type == KVL_GGUF_ARRAY && value->element_type == KVL_GGUF_TEXT);
    return (kvl_gguf_texts){value->bytes, value->n_elements};
}

/* The parser has walked the same lengths and found them inside the file. */
bool kvl_gguf_texts_next(kvl_gguf_texts *texts, kvl_gguf_text *text)
{
    if (texts->n_left == 0) return false;
    uint64_t n_bytes = 0;
    for (size_t i = 0; i < 8; i++) n_bytes |= (uint64_t)texts->at[i] << (8 * i);
    *text = (kvl_gguf_text){(const char *)texts->at + 8, (size_t)n_bytes};
    texts->at += 8 + (size_t)n_bytes;
    texts->n_left--;
    return true;
}

bool kvl_gguf_text_is(kvl_gguf_text text, const char *wanted)
{
    const size_t n_bytes = strlen(wanted);
    return text.n_bytes == n_bytes && (n_bytes == 0 || memcmp(text.bytes, wanted, n_bytes) == 0);
}

/* Bytes above 126 go too: half a UTF-8 character at the cut would be worse than a question mark. */
const char *kvl_gguf_printable(kvl_gguf_text text, char *buffer)
{
    const size_t n_max = KVL_GGUF_PRINTABLE_BYTES - 1;
    const size_t n = text.n_bytes < n_max ? text.n_bytes : n_max;
    for (size_t i = 0; i < n; i++)
        buffer[i] = text.bytes[i] >= ' ' && text.bytes[i] <= '~' ? text.bytes[i] : '?';
    buffer[n] = '\0';
    return buffer;
}
