/* model/gguf.c: reads the header, the metadata and the tensor table of a GGUF file, once, front to
 * back, and leaves views into the file.
 *
 * Method   A reader that can only take what is left of the file, and says where it ran out. Counts
 *          are held against the smallest space that many things can need in the file before memory
 *          is asked for, so a small file can never cost much memory. Both tables get an index
 *          sorted by name, which finds duplicates on the way; sorting is n log n whatever names a
 *          file chooses, which a hash table is not. */
#include "model/gguf.h"

#include "base/alloc.h"
#include "base/file.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define ALIGNMENT_DEFAULT 32u
#define ALIGNMENT_MIN 8u /* the format's own minimum; floats in place rely on it */
/* The fewest bytes that a pair or a tensor can take: lengths, a name of one byte, and a value. */
#define PAIR_BYTES_MIN (8u + 1u + 4u + 1u)
#define TENSOR_BYTES_MIN (8u + 1u + 4u + 8u + 4u + 8u)

struct kvl_gguf {
    kvl_file_map map; /* zeroed where the bytes are the caller's */
    size_t n_values;
    kvl_gguf_value *values;
    const kvl_gguf_value **values_by_key; /* sorted */
    size_t n_tensors;
    kvl_gguf_tensor *tensors;
    const kvl_gguf_tensor **tensors_by_name; /* sorted */
};

typedef struct reader {
    const uint8_t *bytes;
    size_t n_bytes;
    size_t at;
} reader;

/* ---- single things */

/* Always subtracted and never added to: a length from the file plus a position can wrap, what is
 * left cannot. */
static size_t bytes_left(const reader *from)
{
    return from->n_bytes - from->at;
}

/* The only way forward: whatever is read has been through here, or through lengths that were.
 * `what` names it in an error. */
static kvl_status take(reader *from, size_t n_bytes, const char *what, const uint8_t **bytes,
                       kvl_error *error)
{
    if (n_bytes > bytes_left(from)) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "%s at byte %zu needs %zu bytes, but the file ends at byte %zu; "
                        "download it again",
                        what, from->at, n_bytes, from->n_bytes);
    }
    *bytes = from->bytes + from->at;
    from->at += n_bytes;
    return KVL_OK;
}

/* Little endian by hand: neither the machine's order nor alignment matters. */
static uint64_t little_endian(const uint8_t *bytes, size_t n_bytes)
{
    uint64_t value = 0;
    for (size_t i = 0; i < n_bytes; i++) value |= (uint64_t)bytes[i] << (8 * i);
    return value;
}

static kvl_status take_u32(reader *from, const char *what, uint32_t *value, kvl_error *error)
{
    const uint8_t *bytes = NULL;
    KVL_TRY(take(from, 4, what, &bytes, error));
    *value = (uint32_t)little_endian(bytes, 4);
    return KVL_OK;
}

static kvl_status take_u64(reader *from, const char *what, uint64_t *value, kvl_error *error)
{
    const uint8_t *bytes = NULL;
    KVL_TRY(take(from, 8, what, &bytes, error));
    *value = little_endian(bytes, 8);
    return KVL_OK;
}

/* The end of the file is checked before the limit, so that a damaged length is told from a long
 * text: the first asks for another download, the second for another model. */
static kvl_status take_text(reader *from, const char *what, size_t n_bytes_max, kvl_gguf_text *text,
                            kvl_error *error)
{
    const size_t length_at = from->at;
    uint64_t n_bytes = 0;
    KVL_TRY(take_u64(from, what, &n_bytes, error));
    if (n_bytes > bytes_left(from)) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "%s has length %" PRIu64 " at byte %zu, but only %zu bytes of the file "
                        "are left; download it again",
                        what, n_bytes, length_at, bytes_left(from));
    }
    if (n_bytes > n_bytes_max) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "%s has length %" PRIu64 " at byte %zu; must be at most %zu", what, n_bytes,
                        length_at, n_bytes_max);
    }
    const uint8_t *bytes = NULL;
    KVL_TRY(take(from, (size_t)n_bytes, what, &bytes, error));
    *text = (kvl_gguf_text){(const char *)bytes, (size_t)n_bytes};
    return KVL_OK;
}

/* ---- metadata values */

/* Bytes of one number; 0 for texts and arrays, whose size is in the file. */
static size_t number_bytes(kvl_gguf_type type)
{
    static const uint8_t sizes[KVL_GGUF_TYPE_COUNT] = {
        [KVL_GGUF_U8] = 1,  [KVL_GGUF_I8] = 1,  [KVL_GGUF_U16] = 2, [KVL_GGUF_I16] = 2,
        [KVL_GGUF_U32] = 4, [KVL_GGUF_I32] = 4, [KVL_GGUF_F32] = 4, [KVL_GGUF_BOOL] = 1,
        [KVL_GGUF_U64] = 8, [KVL_GGUF_I64] = 8, [KVL_GGUF_F64] = 8,
    };
    KVL_ASSERT((unsigned)type < KVL_GGUF_TYPE_COUNT);
    return sizes[type];
}

/* Checked here once; everywhere else a type is an index into tables. */
static kvl_status take_type(reader *from, const char *key, kvl_gguf_type *type, kvl_error *error)
{
    const size_t type_at = from->at;
    uint32_t number = 0;
    KVL_TRY(take_u32(from, key, &number, error));
    if (number >= KVL_GGUF_TYPE_COUNT) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED, "%s has type %u at byte %zu; must be 0 to %u",
                        key, number, type_at, (unsigned)KVL_GGUF_TYPE_COUNT - 1);
    }
    *type = (kvl_gguf_type)number;
    return KVL_OK;
}

/* A truth value other than 0 and 1 would be undefined behaviour as a C bool. */
static kvl_status check_bools(const reader *from, const uint8_t *bytes, size_t n, const char *key,
                              kvl_error *error)
{
    for (size_t i = 0; i < n; i++) {
        if (bytes[i] > 1) {
            return KVL_FAIL(error, KVL_ERR_MALFORMED,
                            "%s is %u at byte %zu; a truth value must be 0 or 1", key, bytes[i],
                            (size_t)(bytes - from->bytes) + i);
        }
    }
    return KVL_OK;
}

/* Numbers are not looked at, but for truth values; their getters read them one by one. */
static kvl_status skip_numbers(reader *from, kvl_gguf_type type, size_t n, const char *key,
                               kvl_error *error)
{
    size_t n_bytes = 0;
    if (!kvl_size_mul(n, number_bytes(type), &n_bytes)) n_bytes = SIZE_MAX;
    const uint8_t *bytes = NULL;
    KVL_TRY(take(from, n_bytes, key, &bytes, error));
    return type == KVL_GGUF_BOOL ? check_bools(from, bytes, n, key, error) : KVL_OK;
}

/* Walks texts to their end, so that later walks over the same lengths need no checks. Each takes 8
 * bytes of the file or more, so n is bounded by the file here too. */
static kvl_status skip_elements(reader *from, kvl_gguf_type type, size_t n, const char *key,
                                kvl_error *error)
{
    if (type != KVL_GGUF_TEXT) return skip_numbers(from, type, n, key, error);
    for (size_t i = 0; i < n; i++) {
        kvl_gguf_text text;
        KVL_TRY(take_text(from, key, KVL_GGUF_TEXT_BYTES_MAX, &text, error));
    }
    return KVL_OK;
}

/* n_allowed is what earlier arrays of the same value have left of KVL_GGUF_ELEMENTS_MAX. */
static kvl_status take_array_head(reader *from, const char *key, size_t n_allowed,
                                  kvl_gguf_type *type, size_t *n, kvl_error *error)
{
    KVL_TRY(take_type(from, key, type, error));
    const size_t count_at = from->at;
    uint64_t count = 0;
    KVL_TRY(take_u64(from, key, &count, error));
    if (count > n_allowed) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "%s has %" PRIu64 " elements at byte %zu; all arrays of one value "
                        "together must have at most %u",
                        key, count, count_at, KVL_GGUF_ELEMENTS_MAX);
    }
    *n = (size_t)count;
    return KVL_OK;
}

/* Walks arrays inside arrays with a stack of its own: how deep they go is the file's choice, and
 * must not become the depth of our stack. Every inner array takes 12 bytes of the file or more, so
 * the walk is bounded by the file even where all of them are empty. */
static kvl_status take_array(reader *from, const char *key, kvl_gguf_value *value, kvl_error *error)
{
    size_t n_allowed = KVL_GGUF_ELEMENTS_MAX;
    KVL_TRY(take_array_head(from, key, n_allowed, &value->element_type, &value->n_elements, error));
    n_allowed -= value->n_elements;
    value->offset = from->at;
    value->bytes = from->bytes + from->at;
    if (value->element_type != KVL_GGUF_ARRAY)
        return skip_elements(from, value->element_type, value->n_elements, key, error);

    size_t arrays_left[KVL_GGUF_DEPTH_MAX] = {value->n_elements};
    size_t depth = 1;
    while (depth > 0) {
        if (arrays_left[depth - 1] == 0) {
            depth--;
            continue;
        }
        arrays_left[depth - 1]--;
        const size_t head_at = from->at;
        kvl_gguf_type type = KVL_GGUF_U8;
        size_t n = 0;
        KVL_TRY(take_array_head(from, key, n_allowed, &type, &n, error));
        n_allowed -= n;
        if (type != KVL_GGUF_ARRAY) {
            KVL_TRY(skip_elements(from, type, n, key, error));
        } else if (depth + 1 < KVL_GGUF_DEPTH_MAX) {
            arrays_left[depth++] = n;
        } else {
            return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                            "%s has arrays inside arrays deeper than %u at byte %zu", key,
                            KVL_GGUF_DEPTH_MAX, head_at);
        }
    }
    return KVL_OK;
}

/* The key is copied only into error texts, made printable: a file must not write to a terminal. */
static kvl_status take_pair(reader *from, kvl_gguf_value *value, kvl_error *error)
{
    const size_t key_at = from->at;
    KVL_TRY(take_text(from, "a metadata key", KVL_GGUF_KEY_BYTES_MAX, &value->key, error));
    if (value->key.n_bytes == 0) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED, "a metadata key at byte %zu is empty", key_at);
    }
    char key[KVL_GGUF_PRINTABLE_BYTES];
    (void)kvl_gguf_printable(value->key, key);
    KVL_TRY(take_type(from, key, &value->type, error));
    value->element_type = value->type;
    value->n_elements = 1;
    value->offset = from->at;
    value->bytes = from->bytes + from->at;
    if (value->type == KVL_GGUF_ARRAY) {
        KVL_TRY(take_array(from, key, value, error));
    } else if (value->type == KVL_GGUF_TEXT) {
        kvl_gguf_text text;
        KVL_TRY(take_text(from, key, KVL_GGUF_TEXT_BYTES_MAX, &text, error));
        value->bytes = (const uint8_t *)text.bytes;
        value->offset = (size_t)(value->bytes - from->bytes);
    } else {
        KVL_TRY(skip_numbers(from, value->type, 1, key, error));
    }
    value->n_bytes = (size_t)(from->bytes + from->at - value->bytes);
    return KVL_OK;
}

/* ---- sorted indexes */

/* Any total order would do; this one never reads past the shorter text. */
static int compare_texts(kvl_gguf_text a, kvl_gguf_text b)
{
    const size_t n_common = a.n_bytes < b.n_bytes ? a.n_bytes : b.n_bytes;
    const int order = n_common == 0 ? 0 : memcmp(a.bytes, b.bytes, n_common);
    if (order != 0) return order;
    return (a.n_bytes > b.n_bytes) - (a.n_bytes < b.n_bytes);
}

static int compare_values(const void *a, const void *b)
{
    const kvl_gguf_value *const *left = a, *const *right = b;
    return compare_texts((*left)->key, (*right)->key);
}

static int compare_tensors(const void *a, const void *b)
{
    const kvl_gguf_tensor *const *left = a, *const *right = b;
    return compare_texts((*left)->name, (*right)->name);
}

static int compare_offsets(const void *a, const void *b)
{
    const kvl_gguf_tensor *const *left = a, *const *right = b;
    return ((*left)->offset > (*right)->offset) - ((*left)->offset < (*right)->offset);
}

/* Which of two equal keys a reader takes differs from program to program, so that one file could
 * show a scanner one value and an engine another. */
static kvl_status index_values(kvl_gguf *gguf, const reader *from, kvl_error *error)
{
    for (size_t i = 0; i < gguf->n_values; i++) gguf->values_by_key[i] = &gguf->values[i];
    qsort(gguf->values_by_key, gguf->n_values, sizeof *gguf->values_by_key, compare_values);
    for (size_t i = 1; i < gguf->n_values; i++) {
        const kvl_gguf_text a = gguf->values_by_key[i - 1]->key;
        const kvl_gguf_text b = gguf->values_by_key[i]->key;
        if (compare_texts(a, b) != 0) continue;
        char key[KVL_GGUF_PRINTABLE_BYTES];
        return KVL_FAIL(
            error, KVL_ERR_MALFORMED, "key %s is there twice, at bytes %zu and %zu; must be unique",
            kvl_gguf_printable(a, key), (size_t)((const uint8_t *)a.bytes - from->bytes),
            (size_t)((const uint8_t *)b.bytes - from->bytes));
    }
    return KVL_OK;
}

/* Sorts by place first, to find tensors that share bytes, then by name for good. */
static kvl_status index_tensors(kvl_gguf *gguf, kvl_error *error)
{
    const kvl_gguf_tensor **sorted = gguf->tensors_by_name;
    char name[KVL_GGUF_PRINTABLE_BYTES], other[KVL_GGUF_PRINTABLE_BYTES];
    for (size_t i = 0; i < gguf->n_tensors; i++) sorted[i] = &gguf->tensors[i];
    qsort(sorted, gguf->n_tensors, sizeof *sorted, compare_offsets);
    for (size_t i = 1; i < gguf->n_tensors; i++) {
        if (sorted[i]->offset - sorted[i - 1]->offset >= sorted[i - 1]->n_bytes) continue;
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "tensor %s at byte %zu has %zu bytes and reaches into tensor %s at byte "
                        "%zu; tensors must not overlap",
                        kvl_gguf_printable(sorted[i - 1]->name, name), sorted[i - 1]->offset,
                        sorted[i - 1]->n_bytes, kvl_gguf_printable(sorted[i]->name, other),
                        sorted[i]->offset);
    }
    qsort(sorted, gguf->n_tensors, sizeof *sorted, compare_tensors);
    for (size_t i = 1; i < gguf->n_tensors; i++) {
        if (compare_texts(sorted[i - 1]->name, sorted[i]->name) != 0) continue;
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "tensor %s is there twice, its data at bytes %zu and %zu; must be unique",
                        kvl_gguf_printable(sorted[i]->name, name), sorted[i - 1]->offset,
                        sorted[i]->offset);
    }
    return KVL_OK;
}

/* ---- tensors */

typedef struct tensor_type {
    uint32_t number;
    int32_t dtype; /* a kvl_dtype, or -1: known by name only */
    const char *name;
} tensor_type;

/* Types without a dtype are listed for their names: "IQ4_NL" tells a user more than 20. */
static const tensor_type *find_tensor_type(uint32_t number)
{
    static const tensor_type types[] = {
        {0, KVL_DTYPE_F32, "F32"},
        {1, KVL_DTYPE_F16, "F16"},
        {2, KVL_DTYPE_Q4_0, "Q4_0"},
        {3, KVL_DTYPE_Q4_1, "Q4_1"},
        {6, KVL_DTYPE_Q5_0, "Q5_0"},
        {7, KVL_DTYPE_Q5_1, "Q5_1"},
        {8, KVL_DTYPE_Q8_0, "Q8_0"},
        {9, -1, "Q8_1"},
        {10, -1, "Q2_K"},
        {11, -1, "Q3_K"},
        {12, KVL_DTYPE_Q4_K, "Q4_K"},
        {13, KVL_DTYPE_Q5_K, "Q5_K"},
        {14, KVL_DTYPE_Q6_K, "Q6_K"},
        {15, -1, "Q8_K"},
        {16, -1, "IQ2_XXS"},
        {17, -1, "IQ2_XS"},
        {18, -1, "IQ3_XXS"},
        {19, -1, "IQ1_S"},
        {20, -1, "IQ4_NL"},
        {21, -1, "IQ3_S"},
        {22, -1, "IQ2_S"},
        {23, -1, "IQ4_XS"},
        {24, -1, "I8"},
        {25, -1, "I16"},
        {26, -1, "I32"},
        {27, -1, "I64"},
        {28, -1, "F64"},
        {29, -1, "IQ1_M"},
        {30, KVL_DTYPE_BF16, "BF16"},
        {34, -1, "TQ1_0"},
        {35, -1, "TQ2_0"},
        {39, -1, "MXFP4"},
    };
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        if (types[i].number == number) return &types[i];
    }
    return NULL;
}

/* A number above all known types, or one of the gaps that removed types left, is unknown. */
static kvl_status take_dtype(reader *from, const char *name, kvl_dtype *dtype, kvl_error *error)
{
    const size_t type_at = from->at;
    uint32_t number = 0;
    KVL_TRY(take_u32(from, name, &number, error));
    const tensor_type *type = find_tensor_type(number);
    if (type == NULL || type->dtype < 0) {
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                        "tensor %s has type %u (%s) at byte %zu; supported are F32 F16 BF16 Q8_0 "
                        "Q4_0 Q4_1 Q5_0 Q5_1 Q4_K Q5_K Q6_K: quantise it to one of these",
                        name, number, type == NULL ? "unknown" : type->name, type_at);
    }
    *dtype = (kvl_dtype)type->dtype;
    return KVL_OK;
}

/* The count of dimensions is checked before it is an index: sizes[] has four places. */
static kvl_status take_sizes(reader *from, const char *name, kvl_gguf_tensor *tensor,
                             kvl_error *error)
{
    const size_t count_at = from->at;
    KVL_TRY(take_u32(from, name, &tensor->n_dimensions, error));
    if (tensor->n_dimensions < 1 || tensor->n_dimensions > KVL_GGUF_DIMENSIONS_MAX) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "tensor %s has %u dimensions at byte %zu; must be 1 to %u", name,
                        tensor->n_dimensions, count_at, KVL_GGUF_DIMENSIONS_MAX);
    }
    for (uint32_t d = 0; d < KVL_GGUF_DIMENSIONS_MAX; d++) tensor->sizes[d] = 1;
    for (uint32_t d = 0; d < tensor->n_dimensions; d++) {
        const size_t size_at = from->at;
        KVL_TRY(take_u64(from, name, &tensor->sizes[d], error));
        /* A size of 0 is harmless alone, but would let all the others be anything. */
        if (tensor->sizes[d] == 0) {
            return KVL_FAIL(error, KVL_ERR_MALFORMED,
                            "tensor %s has size 0 in dimension %u at byte %zu; must be at least 1",
                            name, d, size_at);
        }
    }
    return KVL_OK;
}

/* Sets n_bytes from sizes and dtype. The product is held against the file's size step by step: no
 * wrapped product can pass for a small tensor. */
static kvl_status measure_tensor(const reader *from, const char *name, kvl_gguf_tensor *tensor,
                                 kvl_error *error)
{
    const kvl_dtype_info *about = kvl_dtype_about(tensor->dtype);
    if (tensor->sizes[0] % about->block_weights != 0) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "tensor %s has rows of %" PRIu64 " weights before byte %zu; %s needs a "
                        "multiple of %u",
                        name, tensor->sizes[0], from->at, about->name, about->block_weights);
    }
    size_t n_bytes = 0;
    bool fits = kvl_size_mul((size_t)(tensor->sizes[0] / about->block_weights), about->block_bytes,
                             &n_bytes);
    for (uint32_t d = 1; fits && d < tensor->n_dimensions; d++)
        fits = kvl_size_mul(n_bytes, (size_t)tensor->sizes[d], &n_bytes);
    if (!fits || n_bytes > from->n_bytes) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "tensor %s of %" PRIu64 " x %" PRIu64 " x %" PRIu64 " x %" PRIu64
                        " weights before byte %zu is larger than the file of %zu bytes; "
                        "download it again",
                        name, tensor->sizes[0], tensor->sizes[1], tensor->sizes[2],
                        tensor->sizes[3], from->at, from->n_bytes);
    }
    tensor->n_bytes = n_bytes;
    return KVL_OK;
}

/* Leaves in `offset` what the file says, which counts from the start of the data. */
static kvl_status take_tensor(reader *from, size_t alignment, kvl_gguf_tensor *tensor,
                              kvl_error *error)
{
    const size_t name_at = from->at;
    KVL_TRY(take_text(from, "a tensor name", KVL_GGUF_TENSOR_NAME_BYTES_MAX, &tensor->name, error));
    if (tensor->name.n_bytes == 0) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED, "a tensor name at byte %zu is empty", name_at);
    }
    char name[KVL_GGUF_PRINTABLE_BYTES];
    (void)kvl_gguf_printable(tensor->name, name);
    KVL_TRY(take_sizes(from, name, tensor, error));
    KVL_TRY(take_dtype(from, name, &tensor->dtype, error));
    KVL_TRY(measure_tensor(from, name, tensor, error));
    const size_t offset_at = from->at;
    uint64_t offset = 0;
    KVL_TRY(take_u64(from, name, &offset, error));
    if (offset % alignment != 0) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "tensor %s has offset %" PRIu64 " at byte %zu; must be a multiple of the "
                        "alignment %zu",
                        name, offset, offset_at, alignment);
    }
    if (offset > from->n_bytes) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "tensor %s has offset %" PRIu64 " at byte %zu, past the end of the file "
                        "of %zu bytes; download it again",
                        name, offset, offset_at, from->n_bytes);
    }
    tensor->offset = (size_t)offset;
    return KVL_OK;
}

/* The data starts at the first aligned byte after the table; only now is it known where. */
static kvl_status place_tensors(kvl_gguf *gguf, const reader *from, size_t alignment,
                                kvl_error *error)
{
    size_t data_at = 0;
    if (!kvl_size_add(from->at, alignment - 1, &data_at)) data_at = SIZE_MAX;
    data_at -= data_at % alignment;
    for (size_t i = 0; i < gguf->n_tensors; i++) {
        kvl_gguf_tensor *tensor = &gguf->tensors[i];
        size_t first = 0, past = 0;
        if (!kvl_size_add(data_at, tensor->offset, &first) ||
            !kvl_size_add(first, tensor->n_bytes, &past) || past > from->n_bytes) {
            char name[KVL_GGUF_PRINTABLE_BYTES];
            return KVL_FAIL(error, KVL_ERR_MALFORMED,
                            "tensor %s has offset %zu and %zu bytes after the data's start at "
                            "byte %zu, past the end of the file of %zu bytes; download it again",
                            kvl_gguf_printable(tensor->name, name), tensor->offset, tensor->n_bytes,
                            data_at, from->n_bytes);
        }
        tensor->offset = first;
        tensor->data = from->bytes + first;
    }
    return KVL_OK;
}

/* ---- the file */

/* Version 2 and 3 differ in nothing but that 3 may be big-endian; version 1 had 32-bit lengths. */
static kvl_status take_version(reader *from, kvl_error *error)
{
    const uint8_t *magic = NULL;
    KVL_TRY(take(from, 4, "the mark of a GGUF file", &magic, error));
    if (memcmp(magic, "GGUF", 4) != 0) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "not a GGUF file: it starts with bytes %02x %02x %02x %02x", magic[0],
                        magic[1], magic[2], magic[3]);
    }
    uint32_t version = 0;
    KVL_TRY(take_u32(from, "the version", &version, error));
    if (version == 2 || version == 3) return KVL_OK;
    if (version == 1) {
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                        "the version is 1 at byte 4; supported are 2 and 3: convert the model "
                        "again with current tools");
    }
    /* No version will ever have its low half empty: this is a small number seen from behind. */
    if (version != 0 && (version & 0xffffu) == 0) {
        return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                        "the version is 0x%08x at byte 4: a big-endian file; convert it to "
                        "little endian",
                        version);
    }
    return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                    "the version is %u at byte 4; supported are 2 and 3", version);
}

/* Two checks, since each alone is too weak: the limit keeps a table reasonable whatever the file's
 * size, and the file's size keeps it honest: a file of 100 bytes does not have 60,000 tensors. */
static kvl_status take_count(reader *from, const char *what, size_t n_max, size_t item_bytes_min,
                             size_t *n, kvl_error *error)
{
    const size_t count_at = from->at;
    uint64_t count = 0;
    KVL_TRY(take_u64(from, what, &count, error));
    if (count > n_max) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "%s is %" PRIu64 " at byte %zu; must be at most %zu", what, count, count_at,
                        n_max);
    }
    if (count > bytes_left(from) / item_bytes_min) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "%s is %" PRIu64 " at byte %zu, more than the file of %zu bytes can hold; "
                        "download it again",
                        what, count, count_at, from->n_bytes);
    }
    *n = (size_t)count;
    return KVL_OK;
}

/* Both counts are checked: the tables are at most a few times as large as the file. One element
 * more, so that an empty table is memory too. */
static kvl_status allocate_tables(kvl_gguf *gguf, kvl_error *error)
{
    gguf->values = kvl_alloc_zero(gguf->n_values + 1, sizeof *gguf->values);
    gguf->values_by_key = kvl_alloc_zero(gguf->n_values + 1, sizeof *gguf->values_by_key);
    gguf->tensors = kvl_alloc_zero(gguf->n_tensors + 1, sizeof *gguf->tensors);
    gguf->tensors_by_name = kvl_alloc_zero(gguf->n_tensors + 1, sizeof *gguf->tensors_by_name);
    if (gguf->values != NULL && gguf->values_by_key != NULL && gguf->tensors != NULL &&
        gguf->tensors_by_name != NULL)
        return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for %zu metadata pairs and %zu tensors",
                    gguf->n_values, gguf->n_tensors);
}

/* Before any tensor, since their offsets are held against it. An alignment of 0 would be divided
 * by, and a huge one would move the data past the end. */
static kvl_status find_alignment(const kvl_gguf *gguf, size_t *alignment, kvl_error *error)
{
    uint32_t value = 0;
    KVL_TRY(kvl_gguf_find_u32(gguf, "general.alignment", 0, UINT32_MAX, ALIGNMENT_DEFAULT, &value,
                              error));
    if (value < ALIGNMENT_MIN || value > KVL_GGUF_ALIGNMENT_MAX || (value & (value - 1)) != 0) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "general.alignment is %u at byte %zu; must be a power of two from %u to %u",
                        value, kvl_gguf_find(gguf, "general.alignment")->offset, ALIGNMENT_MIN,
                        KVL_GGUF_ALIGNMENT_MAX);
    }
    *alignment = value;
    return KVL_OK;
}

/* Before the tensors too: a part of a model would only complain about the missing ones. */
static kvl_status refuse_split(const kvl_gguf *gguf, kvl_error *error)
{
    uint32_t n_files = 0;
    KVL_TRY(kvl_gguf_find_u32(gguf, "split.count", 0, UINT32_MAX, 1, &n_files, error));
    if (n_files <= 1) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_UNSUPPORTED,
                    "split.count is %u at byte %zu; a model in several files is not supported: "
                    "merge them into one",
                    n_files, kvl_gguf_find(gguf, "split.count")->offset);
}

/* Leaves a gguf that kvl_gguf_close can end, however far it got. */
static kvl_status parse_into(kvl_gguf *gguf, reader from, kvl_error *error)
{
    KVL_TRY(take_version(&from, error));
    KVL_TRY(take_count(&from, "the number of tensors", KVL_GGUF_TENSORS_MAX, TENSOR_BYTES_MIN,
                       &gguf->n_tensors, error));
    KVL_TRY(take_count(&from, "the number of metadata pairs", KVL_GGUF_KEYS_MAX, PAIR_BYTES_MIN,
                       &gguf->n_values, error));
    KVL_TRY(allocate_tables(gguf, error));
    for (size_t i = 0; i < gguf->n_values; i++) KVL_TRY(take_pair(&from, &gguf->values[i], error));
    KVL_TRY(index_values(gguf, &from, error));
    KVL_TRY(refuse_split(gguf, error));
    size_t alignment = 0;
    KVL_TRY(find_alignment(gguf, &alignment, error));
    for (size_t i = 0; i < gguf->n_tensors; i++)
        KVL_TRY(take_tensor(&from, alignment, &gguf->tensors[i], error));
    KVL_TRY(place_tensors(gguf, &from, alignment, error));
    return index_tensors(gguf, error);
}

kvl_status kvl_gguf_parse(const void *bytes, size_t n_bytes, kvl_gguf **gguf, kvl_error *error)
{
    KVL_ASSERT(bytes != NULL || n_bytes == 0);
    KVL_ASSERT((uintptr_t)bytes % ALIGNMENT_MIN == 0);
    *gguf = NULL;
    kvl_gguf *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a model file");
    const kvl_status status = parse_into(made, (reader){bytes, n_bytes, 0}, error);
    if (status < 0) {
        kvl_gguf_close(made);
        return status;
    }
    *gguf = made;
    return KVL_OK;
}

kvl_status kvl_gguf_open(const char *path, kvl_gguf **gguf, kvl_error *error)
{
    *gguf = NULL;
    kvl_file_map map;
    KVL_TRY(kvl_file_map_open(path, &map, error));
    const kvl_status status = kvl_gguf_parse(map.bytes, map.n_bytes, gguf, error);
    if (status < 0) {
        kvl_file_map_close(&map);
        return status;
    }
    (*gguf)->map = map;
    return KVL_OK;
}

void kvl_gguf_close(kvl_gguf *gguf)
{
    if (gguf == NULL) return;
    kvl_free(gguf->values);
    kvl_free((void *)gguf->values_by_key);
    kvl_free(gguf->tensors);
    kvl_free((void *)gguf->tensors_by_name);
    kvl_file_map_close(&gguf->map);
    kvl_free(gguf);
}

/* ---- looking up */

size_t kvl_gguf_n_values(const kvl_gguf *gguf)
{
    return gguf->n_values;
}

const kvl_gguf_value *kvl_gguf_value_at(const kvl_gguf *gguf, size_t index)
{
    KVL_ASSERT(index < gguf->n_values);
    return &gguf->values[index];
}

const kvl_gguf_value *kvl_gguf_find(const kvl_gguf *gguf, const char *key)
{
    const kvl_gguf_value wanted = {.key = {key, strlen(key)}};
    const kvl_gguf_value *const wanted_at = &wanted;
    const kvl_gguf_value *const *found = bsearch(&wanted_at, gguf->values_by_key, gguf->n_values,
                                                 sizeof *gguf->values_by_key, compare_values);
    return found == NULL ? NULL : *found;
}

size_t kvl_gguf_n_tensors(const kvl_gguf *gguf)
{
    return gguf->n_tensors;
}

const kvl_gguf_tensor *kvl_gguf_tensor_at(const kvl_gguf *gguf, size_t index)
{
    KVL_ASSERT(index < gguf->n_tensors);
    return &gguf->tensors[index];
}

const kvl_gguf_tensor *kvl_gguf_find_tensor(const kvl_gguf *gguf, const char *name)
{
    const kvl_gguf_tensor wanted = {.name = {name, strlen(name)}};
    const kvl_gguf_tensor *const wanted_at = &wanted;
    const kvl_gguf_tensor *const *found =
        bsearch(&wanted_at, gguf->tensors_by_name, gguf->n_tensors, sizeof *gguf->tensors_by_name,
                compare_tensors);
    return found == NULL ? NULL : *found;
}
