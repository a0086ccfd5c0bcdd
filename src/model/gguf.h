/* model/gguf.h: a GGUF file, versions 2 and 3, read in place: a table of metadata and a table of
 * tensors, both views into the bytes of the file. Private to the room.
 *
 * Everything in the file is foreign. Every count, length and offset is checked against a named
 * limit and against what is left of the file before it is used; nothing is allocated from a number
 * that has not been checked. Afterwards the views are safe to read without further checks.
 *
 * Errors  KVL_ERR_MALFORMED    the file breaks the format; text has key or tensor, value and offset
 *         KVL_ERR_UNSUPPORTED  version 1, big-endian, split files, tensor types unknown here
 *         KVL_ERR_TOO_LARGE    a number is above its limit
 *         KVL_ERR_NO_MEMORY
 * Threads A file never changes once parsed: share it freely.
 * Hazard  The file must not be cut short while it is mapped: reading past its new end is SIGBUS. */
#ifndef KVL_MODEL_GGUF_H
#define KVL_MODEL_GGUF_H

#include "base/status.h"
#include "compute/dtype.h"

#define KVL_GGUF_KEYS_MAX 65536u            /* metadata pairs in a file */
#define KVL_GGUF_TENSORS_MAX 65536u         /* tensors in a file */
#define KVL_GGUF_KEY_BYTES_MAX 1024u        /* of one key; the format itself allows 65535 */
#define KVL_GGUF_TEXT_BYTES_MAX (16u << 20) /* of one string: templates are a few kilobytes */
#define KVL_GGUF_ELEMENTS_MAX (1u << 24)    /* of all arrays inside one value together */
#define KVL_GGUF_DEPTH_MAX 4u               /* arrays inside arrays */
#define KVL_GGUF_DIMENSIONS_MAX 4u
#define KVL_GGUF_TENSOR_NAME_BYTES_MAX 64u
#define KVL_GGUF_ALIGNMENT_MAX (1u << 20)

/* Numbers as in the file. */
typedef enum kvl_gguf_type {
    KVL_GGUF_U8 = 0,
    KVL_GGUF_I8 = 1,
    KVL_GGUF_U16 = 2,
    KVL_GGUF_I16 = 3,
    KVL_GGUF_U32 = 4,
    KVL_GGUF_I32 = 5,
    KVL_GGUF_F32 = 6,
    KVL_GGUF_BOOL = 7,
    KVL_GGUF_TEXT = 8, /* "string" in the format */
    KVL_GGUF_ARRAY = 9,
    KVL_GGUF_U64 = 10,
    KVL_GGUF_I64 = 11,
    KVL_GGUF_F64 = 12,
    KVL_GGUF_TYPE_COUNT
} kvl_gguf_type;

/* Bytes of the file, any bytes, not NUL-terminated. Borrowed until the kvl_gguf ends. */
typedef struct kvl_gguf_text {
    const char *bytes;
    size_t n_bytes;
} kvl_gguf_text;

/* One pair of the metadata. Borrowed until the kvl_gguf ends. */
typedef struct kvl_gguf_value {
    kvl_gguf_text key;
    kvl_gguf_type type;
    kvl_gguf_type element_type; /* of an array; otherwise same as type */
    size_t n_elements;          /* of an array; otherwise 1 */
    const uint8_t *bytes;       /* numbers: packed, little endian, NOT aligned; text: its bytes;
                                   array: its first element, a text element with its length first */
    size_t n_bytes;             /* of all of that */
    size_t offset;              /* of `bytes` in the file, for errors */
} kvl_gguf_value;

typedef struct kvl_gguf_tensor {
    kvl_gguf_text name;
    uint64_t sizes[KVL_GGUF_DIMENSIONS_MAX]; /* innermost first, unused ones 1; none is 0 */
    uint32_t n_dimensions;
    kvl_dtype dtype;
    const uint8_t *data; /* aligned as the file says, at least to 8 */
    size_t n_bytes;
    size_t offset; /* of `data` in the file */
} kvl_gguf_tensor;

typedef struct kvl_gguf kvl_gguf;

/* Maps a file and parses it.
 * Owns     *gguf: ended with kvl_gguf_close, also the map
 * Errors   also KVL_ERR_NOT_FOUND, KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_gguf_open(const char *path, kvl_gguf **gguf, kvl_error *error);
/* Same for bytes in memory, aligned to 8, borrowed until the kvl_gguf ends. */
KVL_MUST_USE kvl_status kvl_gguf_parse(const void *bytes, size_t n_bytes, kvl_gguf **gguf,
                                       kvl_error *error);
void kvl_gguf_close(kvl_gguf *gguf);

/* ---- metadata. `key` ends with NUL. find: NULL or the fallback if the key is not there;
 *      get: a missing key is KVL_ERR_MALFORMED. A value of the wrong type or outside
 *      minimum .. maximum is KVL_ERR_MALFORMED, or KVL_ERR_TOO_LARGE above the maximum. On an error
 *      *result is untouched. */

size_t kvl_gguf_n_values(const kvl_gguf *gguf);
/* index < n_values; in the order of the file. */
const kvl_gguf_value *kvl_gguf_value_at(const kvl_gguf *gguf, size_t index);
const kvl_gguf_value *kvl_gguf_find(const kvl_gguf *gguf, const char *key);

/* Any integer type that fits; never a float or a bool. */
KVL_MUST_USE kvl_status kvl_gguf_get_u32(const kvl_gguf *gguf, const char *key, uint32_t minimum,
                                         uint32_t maximum, uint32_t *result, kvl_error *error);
KVL_MUST_USE kvl_status kvl_gguf_find_u32(const kvl_gguf *gguf, const char *key, uint32_t minimum,
                                          uint32_t maximum, uint32_t fallback, uint32_t *result,
                                          kvl_error *error);
/* F32 or F64; not-a-number is outside every range. */
KVL_MUST_USE kvl_status kvl_gguf_get_f32(const kvl_gguf *gguf, const char *key, float minimum,
                                         float maximum, float *result, kvl_error *error);
KVL_MUST_USE kvl_status kvl_gguf_find_f32(const kvl_gguf *gguf, const char *key, float minimum,
                                          float maximum, float fallback, float *result,
                                          kvl_error *error);
/* BOOL, whose byte was checked to be 0 or 1. */
KVL_MUST_USE kvl_status kvl_gguf_find_bool(const kvl_gguf *gguf, const char *key, bool fallback,
                                           bool *result, kvl_error *error);
KVL_MUST_USE kvl_status kvl_gguf_get_text(const kvl_gguf *gguf, const char *key,
                                          kvl_gguf_text *result, kvl_error *error);
/* *result is {NULL, 0} if the key is not there; a text that is there and empty has bytes != NULL.
 */
KVL_MUST_USE kvl_status kvl_gguf_find_text(const kvl_gguf *gguf, const char *key,
                                           kvl_gguf_text *result, kvl_error *error);
/* An array of this element type with n_minimum .. n_maximum elements. */
KVL_MUST_USE kvl_status kvl_gguf_get_array(const kvl_gguf *gguf, const char *key,
                                           kvl_gguf_type element_type, size_t n_minimum,
                                           size_t n_maximum, const kvl_gguf_value **result,
                                           kvl_error *error);
/* Same; *result is NULL if the key is not there. */
KVL_MUST_USE kvl_status kvl_gguf_find_array(const kvl_gguf *gguf, const char *key,
                                            kvl_gguf_type element_type, size_t n_minimum,
                                            size_t n_maximum, const kvl_gguf_value **result,
                                            kvl_error *error);

/* Elements of arrays of numbers (index < n_elements) and, with index 0, single numbers. */
int32_t kvl_gguf_element_i32(const kvl_gguf_value *value, size_t index);  /* type I32 */
uint32_t kvl_gguf_element_u32(const kvl_gguf_value *value, size_t index); /* type U32 */
float kvl_gguf_element_f32(const kvl_gguf_value *value, size_t index);    /* type F32 */

/* Walks an array of texts without copying:
 *     kvl_gguf_texts texts = kvl_gguf_texts_of(value);
 *     kvl_gguf_text text;
 *     while (kvl_gguf_texts_next(&texts, &text)) ...
 * value  an array whose element_type is KVL_GGUF_TEXT. Gives exactly n_elements texts. */
typedef struct kvl_gguf_texts {
    const uint8_t *at;
    size_t n_left;
} kvl_gguf_texts;

kvl_gguf_texts kvl_gguf_texts_of(const kvl_gguf_value *value);
bool kvl_gguf_texts_next(kvl_gguf_texts *texts, kvl_gguf_text *text);

bool kvl_gguf_text_is(kvl_gguf_text text, const char *wanted);

/* For error texts: a copy with its NUL, bytes that are not printable ASCII as '?', cut where it is
 * longer. `buffer` has KVL_GGUF_PRINTABLE_BYTES. Returns `buffer`. */
#define KVL_GGUF_PRINTABLE_BYTES 97u
const char *kvl_gguf_printable(kvl_gguf_text text, char *buffer);

/* ---- tensors */

size_t kvl_gguf_n_tensors(const kvl_gguf *gguf);
/* index < n_tensors; in the order of the file. */
const kvl_gguf_tensor *kvl_gguf_tensor_at(const kvl_gguf *gguf, size_t index);
/* NULL if there is none of this name. */
const kvl_gguf_tensor *kvl_gguf_find_tensor(const kvl_gguf *gguf, const char *name);

#endif /* KVL_MODEL_GGUF_H */
