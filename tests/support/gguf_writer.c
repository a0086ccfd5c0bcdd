/* gguf_writer.c: lists of pairs and tensors, written out at the end. */
#include "gguf_writer.h"

#include "base/alloc.h"

#include <math.h>
#include <string.h>

/* ---- bytes */

void kvl_gguf_put(kvl_gguf_buffer *buffer, const void *bytes, size_t n_bytes)
{
    if (n_bytes == 0) return;
    if (n_bytes > buffer->n_allocated - buffer->n_bytes) {
        const size_t n_wanted = 2 * (buffer->n_bytes + n_bytes) + 64;
        uint8_t *grown = kvl_realloc(buffer->bytes, n_wanted);
        KVL_ASSERT(grown != NULL);
        buffer->bytes = grown;
        buffer->n_allocated = n_wanted;
    }
    memcpy(buffer->bytes + buffer->n_bytes, bytes, n_bytes);
    buffer->n_bytes += n_bytes;
}

void kvl_gguf_put_number(kvl_gguf_buffer *buffer, uint64_t number, size_t n_bytes)
{
    uint8_t bytes[8];
    KVL_ASSERT(n_bytes <= sizeof bytes);
    for (size_t i = 0; i < n_bytes; i++) bytes[i] = (uint8_t)(number >> (8 * i));
    kvl_gguf_put(buffer, bytes, n_bytes);
}

void kvl_gguf_put_text(kvl_gguf_buffer *buffer, const char *text)
{
    kvl_gguf_put_number(buffer, strlen(text), 8);
    kvl_gguf_put(buffer, text, strlen(text));
}

void kvl_gguf_buffer_deinit(kvl_gguf_buffer *buffer)
{
    kvl_free(buffer->bytes);
    *buffer = (kvl_gguf_buffer){0};
}

void kvl_gguf_bytes_deinit(kvl_gguf_bytes *file)
{
    kvl_free(file->bytes);
    *file = (kvl_gguf_bytes){0};
}

static uint32_t bits_of(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

static char *copy_text(const char *text)
{
    char *copy = kvl_strdup(text);
    KVL_ASSERT(copy != NULL);
    return copy;
}

/* ---- metadata */

void kvl_gguf_writer_init(kvl_gguf_writer *writer)
{
    *writer = (kvl_gguf_writer){.version = 3, .alignment = 32};
}

static void end_pair(kvl_gguf_pair *pair)
{
    kvl_free(pair->key);
    kvl_gguf_buffer_deinit(&pair->value);
}

void kvl_gguf_add_raw(kvl_gguf_writer *writer, const char *key, uint32_t type, const void *bytes,
                      size_t n_bytes)
{
    KVL_ASSERT(writer->n_pairs < KVL_WRITER_PAIRS_MAX);
    kvl_gguf_pair *pair = &writer->pairs[writer->n_pairs++];
    *pair = (kvl_gguf_pair){.key = copy_text(key), .type = type};
    kvl_gguf_put(&pair->value, bytes, n_bytes);
}

void kvl_gguf_set_raw(kvl_gguf_writer *writer, const char *key, uint32_t type, const void *bytes,
                      size_t n_bytes)
{
    for (size_t i = 0; i < writer->n_pairs; i++) {
        kvl_gguf_pair *pair = &writer->pairs[i];
        if (strcmp(pair->key, key) != 0) continue;
        kvl_gguf_buffer_deinit(&pair->value);
        pair->type = type;
        kvl_gguf_put(&pair->value, bytes, n_bytes);
        return;
    }
    kvl_gguf_add_raw(writer, key, type, bytes, n_bytes);
}

static void set_buffer(kvl_gguf_writer *writer, const char *key, uint32_t type,
                       kvl_gguf_buffer *value)
{
    kvl_gguf_set_raw(writer, key, type, value->bytes, value->n_bytes);
    kvl_gguf_buffer_deinit(value);
}

void kvl_gguf_set_u32(kvl_gguf_writer *writer, const char *key, uint32_t value)
{
    kvl_gguf_buffer bytes = {0};
    kvl_gguf_put_number(&bytes, value, 4);
    set_buffer(writer, key, KVL_WRITE_U32, &bytes);
}

void kvl_gguf_set_f32(kvl_gguf_writer *writer, const char *key, float value)
{
    kvl_gguf_buffer bytes = {0};
    kvl_gguf_put_number(&bytes, bits_of(value), 4);
    set_buffer(writer, key, KVL_WRITE_F32, &bytes);
}

void kvl_gguf_set_bool(kvl_gguf_writer *writer, const char *key, bool value)
{
    const uint8_t byte = value ? 1 : 0;
    kvl_gguf_set_raw(writer, key, KVL_WRITE_BOOL, &byte, 1);
}

void kvl_gguf_set_text(kvl_gguf_writer *writer, const char *key, const char *value)
{
    kvl_gguf_buffer bytes = {0};
    kvl_gguf_put_text(&bytes, value);
    set_buffer(writer, key, KVL_WRITE_TEXT, &bytes);
}

void kvl_gguf_set_texts(kvl_gguf_writer *writer, const char *key, const char *const *texts,
                        size_t n)
{
    kvl_gguf_buffer bytes = {0};
    kvl_gguf_put_number(&bytes, KVL_WRITE_TEXT, 4);
    kvl_gguf_put_number(&bytes, n, 8);
    for (size_t i = 0; i < n; i++) kvl_gguf_put_text(&bytes, texts[i]);
    set_buffer(writer, key, KVL_WRITE_ARRAY, &bytes);
}

void kvl_gguf_set_i32s(kvl_gguf_writer *writer, const char *key, const int32_t *numbers, size_t n)
{
    kvl_gguf_buffer bytes = {0};
    kvl_gguf_put_number(&bytes, KVL_WRITE_I32, 4);
    kvl_gguf_put_number(&bytes, n, 8);
    for (size_t i = 0; i < n; i++) kvl_gguf_put_number(&bytes, (uint32_t)numbers[i], 4);
    set_buffer(writer, key, KVL_WRITE_ARRAY, &bytes);
}

void kvl_gguf_remove_key(kvl_gguf_writer *writer, const char *key)
{
    size_t n_kept = 0;
    for (size_t i = 0; i < writer->n_pairs; i++) {
        if (strcmp(writer->pairs[i].key, key) == 0) {
            end_pair(&writer->pairs[i]);
        } else {
            writer->pairs[n_kept++] = writer->pairs[i];
        }
    }
    writer->n_pairs = n_kept;
}

/* ---- number formats */

uint16_t kvl_test_half_of(float number)
{
    const uint16_t sign = (uint16_t)(bits_of(number) >> 31 << 15);
    const double magnitude = fabs((double)number);
    if (isnan(number)) return sign | 0x7e00u;
    if (!(magnitude > 0)) return sign;
    if (magnitude >= 65520.0) return sign | 0x7c00u;
    /* The spacing of halves around the number: 2^-24 at least. nearbyint rounds ties to even. */
    int exponent = 0;
    (void)frexp(magnitude, &exponent);
    const int spacing = exponent - 11 > -24 ? exponent - 11 : -24;
    const double steps = nearbyint(ldexp(magnitude, -spacing)); /* <= 2048 */
    /* A half's bits count such steps: 1024 for every exponent above the smallest. */
    return sign | (uint16_t)((double)(spacing + 24) * 1024.0 + steps);
}

uint16_t kvl_test_bfloat_of(float number)
{
    const uint32_t bits = bits_of(number);
    if (isnan(number)) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* A half, and 32 whole numbers of -127 .. 127 that it scales. */
static void put_block_q8_0(kvl_gguf_buffer *data, const float *numbers)
{
    float largest = 0;
    for (size_t i = 0; i < 32; i++) largest = fmaxf(largest, fabsf(numbers[i]));
    const float scale = largest / 127.0F;
    kvl_gguf_put_number(data, kvl_test_half_of(scale), 2);
    for (size_t i = 0; i < 32; i++) {
        const long step = scale > 0 ? lroundf(numbers[i] / scale) : 0;
        kvl_gguf_put_number(data, (uint64_t)step, 1);
    }
}

/* Two halves, scale and minimum, and 32 numbers of 0 .. 15: the first 16 are the low halves of the
 * bytes, the others the high ones. */
static void put_block_q4_1(kvl_gguf_buffer *data, const float *numbers)
{
    float least = numbers[0], largest = numbers[0];
    for (size_t i = 1; i < 32; i++) {
        least = fminf(least, numbers[i]);
        largest = fmaxf(largest, numbers[i]);
    }
    const float scale = (largest - least) / 15.0F;
    kvl_gguf_put_number(data, kvl_test_half_of(scale), 2);
    kvl_gguf_put_number(data, kvl_test_half_of(least), 2);
    unsigned steps[32];
    for (size_t i = 0; i < 32; i++)
        steps[i] = scale > 0 ? (unsigned)lroundf((numbers[i] - least) / scale) & 15u : 0;
    for (size_t i = 0; i < 16; i++) kvl_gguf_put_number(data, steps[i] | steps[i + 16] << 4, 1);
}

static void put_numbers(kvl_gguf_buffer *data, kvl_dtype dtype, const float *numbers, size_t n)
{
    const bool is_blocked = dtype == KVL_DTYPE_Q8_0 || dtype == KVL_DTYPE_Q4_1;
    KVL_ASSERT(!is_blocked || n % 32 == 0);
    for (size_t i = 0; i < n; i += is_blocked ? 32 : 1) {
        switch (dtype) {
        case KVL_DTYPE_F32: kvl_gguf_put_number(data, bits_of(numbers[i]), 4); break;
        case KVL_DTYPE_F16: kvl_gguf_put_number(data, kvl_test_half_of(numbers[i]), 2); break;
        case KVL_DTYPE_BF16: kvl_gguf_put_number(data, kvl_test_bfloat_of(numbers[i]), 2); break;
        case KVL_DTYPE_Q8_0: put_block_q8_0(data, numbers + i); break;
        case KVL_DTYPE_Q4_1: put_block_q4_1(data, numbers + i); break;
        default: KVL_ASSERT(false);
        }
    }
}

static uint32_t format_number(kvl_dtype dtype)
{
    switch (dtype) {
    case KVL_DTYPE_F32: return 0;
    case KVL_DTYPE_F16: return 1;
    case KVL_DTYPE_Q4_1: return 3;
    case KVL_DTYPE_Q8_0: return 8;
    case KVL_DTYPE_BF16: return 30;
    default: KVL_ASSERT(false);
    }
    return 0;
}

/* ---- tensors */

kvl_gguf_written_tensor *kvl_gguf_written(kvl_gguf_writer *writer, const char *name)
{
    for (size_t i = 0; i < writer->n_tensors; i++) {
        if (strcmp(writer->tensors[i].name, name) == 0) return &writer->tensors[i];
    }
    return NULL;
}

void kvl_gguf_set_tensor(kvl_gguf_writer *writer, const char *name, uint32_t n_outputs,
                         uint32_t n_inputs, kvl_dtype dtype, const float *numbers)
{
    kvl_gguf_written_tensor *tensor = kvl_gguf_written(writer, name);
    if (tensor == NULL) {
        KVL_ASSERT(writer->n_tensors < KVL_WRITER_TENSORS_MAX);
        tensor = &writer->tensors[writer->n_tensors++];
        *tensor = (kvl_gguf_written_tensor){.name = copy_text(name)};
    }
    tensor->n_dimensions = n_inputs == 0 ? 1 : 2;
    tensor->sizes[0] = n_inputs == 0 ? n_outputs : n_inputs;
    tensor->sizes[1] = n_inputs == 0 ? 1 : n_outputs;
    tensor->type = format_number(dtype);
    tensor->data.n_bytes = 0;
    put_numbers(&tensor->data, dtype, numbers, (size_t)n_outputs * (n_inputs == 0 ? 1 : n_inputs));
}

static void end_tensor(kvl_gguf_written_tensor *tensor)
{
    kvl_free(tensor->name);
    kvl_gguf_buffer_deinit(&tensor->data);
}

void kvl_gguf_remove_tensor(kvl_gguf_writer *writer, const char *name)
{
    kvl_gguf_written_tensor *tensor = kvl_gguf_written(writer, name);
    KVL_ASSERT(tensor != NULL);
    end_tensor(tensor);
    const size_t index = (size_t)(tensor - writer->tensors);
    writer->n_tensors--;
    memmove(tensor, tensor + 1, (writer->n_tensors - index) * sizeof *tensor);
}

/* ---- the file */

static void put_padding(kvl_gguf_buffer *file, size_t alignment)
{
    while (file->n_bytes % alignment != 0) kvl_gguf_put_number(file, 0, 1);
}

static void put_tables(kvl_gguf_writer *writer, kvl_gguf_buffer *file)
{
    kvl_gguf_put(file, "GGUF", 4);
    kvl_gguf_put_number(file, writer->version, 4);
    kvl_gguf_put_number(file, writer->n_tensors + writer->extra_tensors, 8);
    kvl_gguf_put_number(file, writer->n_pairs + writer->extra_pairs, 8);
    for (size_t i = 0; i < writer->n_pairs; i++) {
        const kvl_gguf_pair *pair = &writer->pairs[i];
        kvl_gguf_put_text(file, pair->key);
        kvl_gguf_put_number(file, pair->type, 4);
        kvl_gguf_put(file, pair->value.bytes, pair->value.n_bytes);
    }
    for (size_t i = 0; i < writer->n_tensors; i++) {
        const kvl_gguf_written_tensor *tensor = &writer->tensors[i];
        kvl_gguf_put_text(file, tensor->name);
        kvl_gguf_put_number(file, tensor->n_dimensions, 4);
        for (uint32_t d = 0; d < tensor->n_dimensions && d < 8; d++)
            kvl_gguf_put_number(file, tensor->sizes[d], 8);
        kvl_gguf_put_number(file, tensor->type, 4);
        kvl_gguf_put_number(file, tensor->offset, 8);
    }
}

kvl_gguf_bytes kvl_gguf_writer_finish(kvl_gguf_writer *writer)
{
    kvl_gguf_buffer data = {0}, tables = {0};
    for (size_t i = 0; i < writer->n_tensors; i++) {
        kvl_gguf_written_tensor *tensor = &writer->tensors[i];
        put_padding(&data, writer->alignment);
        if (!tensor->keep_offset) tensor->offset = data.n_bytes;
        kvl_gguf_put(&data, tensor->data.bytes, tensor->data.n_bytes);
    }
    put_tables(writer, &tables);
    put_padding(&tables, writer->alignment);
    kvl_gguf_bytes file = {kvl_alloc_aligned(tables.n_bytes + data.n_bytes),
                           tables.n_bytes + data.n_bytes, tables.n_bytes};
    KVL_ASSERT(file.bytes != NULL);
    memcpy(file.bytes, tables.bytes, tables.n_bytes);
    if (data.n_bytes > 0) memcpy(file.bytes + tables.n_bytes, data.bytes, data.n_bytes);
    kvl_gguf_buffer_deinit(&data);
    kvl_gguf_buffer_deinit(&tables);
    for (size_t i = 0; i < writer->n_pairs; i++) end_pair(&writer->pairs[i]);
    for (size_t i = 0; i < writer->n_tensors; i++) end_tensor(&writer->tensors[i]);
    *writer = (kvl_gguf_writer){0};
    return file;
}
