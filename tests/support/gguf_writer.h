/* gguf_writer.h: makes GGUF files in memory, well-formed ones or, by setting the fields of the
 * header, broken ones. Shares no code with the reader in src/model.
 *
 * A writer is a list of metadata pairs and a list of tensors; setting a key or a tensor that is
 * there already replaces it, so a test can take a good file and spoil one thing:
 *
 *     kvl_gguf_writer writer;
 *     kvl_tiny_gguf_write(&options, &writer);              (tiny_gguf.h)
 *     kvl_gguf_set_u32(&writer, "general.alignment", 3);
 *     kvl_gguf_bytes file = kvl_gguf_writer_finish(&writer);
 *     ... kvl_model_parse(file.bytes, file.n_bytes, ...)
 *     kvl_gguf_bytes_deinit(&file);
 *
 * Running out of memory ends the test program: nothing here can fail. */
#ifndef KVL_TEST_GGUF_WRITER_H
#define KVL_TEST_GGUF_WRITER_H

#include "compute/dtype.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Types of metadata, by the format's numbers. */
enum {
    KVL_WRITE_U8 = 0,
    KVL_WRITE_I8 = 1,
    KVL_WRITE_U16 = 2,
    KVL_WRITE_I16 = 3,
    KVL_WRITE_U32 = 4,
    KVL_WRITE_I32 = 5,
    KVL_WRITE_F32 = 6,
    KVL_WRITE_BOOL = 7,
    KVL_WRITE_TEXT = 8,
    KVL_WRITE_ARRAY = 9,
    KVL_WRITE_U64 = 10,
    KVL_WRITE_I64 = 11,
    KVL_WRITE_F64 = 12,
};

/* A file in memory, aligned to 64. */
typedef struct kvl_gguf_bytes {
    uint8_t *bytes;
    size_t n_bytes;
    size_t data_at; /* where the tensors' data starts: before it are header and tables */
} kvl_gguf_bytes;

void kvl_gguf_bytes_deinit(kvl_gguf_bytes *file);

/* A piece of a file that grows. Put little-endian numbers, texts (length first) or bytes. */
typedef struct kvl_gguf_buffer {
    uint8_t *bytes;
    size_t n_bytes;
    size_t n_allocated;
} kvl_gguf_buffer;

void kvl_gguf_put(kvl_gguf_buffer *buffer, const void *bytes, size_t n_bytes);
void kvl_gguf_put_number(kvl_gguf_buffer *buffer, uint64_t number, size_t n_bytes);
void kvl_gguf_put_text(kvl_gguf_buffer *buffer, const char *text);
void kvl_gguf_buffer_deinit(kvl_gguf_buffer *buffer);

typedef struct kvl_gguf_pair {
    char *key;
    uint32_t type;
    kvl_gguf_buffer value;
} kvl_gguf_pair;

typedef struct kvl_gguf_written_tensor {
    char *name;
    uint32_t n_dimensions;
    uint64_t sizes[8]; /* innermost first */
    uint32_t type;     /* the format's number */
    uint64_t offset;   /* set by finish, unless keep_offset */
    bool keep_offset;
    kvl_gguf_buffer data;
} kvl_gguf_written_tensor;

enum { KVL_WRITER_PAIRS_MAX = 128, KVL_WRITER_TENSORS_MAX = 256 };

/* Fields may be changed by hand to break a file. */
typedef struct kvl_gguf_writer {
    uint32_t version;     /* 3 */
    uint64_t extra_pairs; /* added to the number of pairs in the header */
    uint64_t extra_tensors;
    size_t alignment; /* 32: of the data; the key general.alignment is the test's business */
    size_t n_pairs;
    size_t n_tensors;
    kvl_gguf_pair pairs[KVL_WRITER_PAIRS_MAX];
    kvl_gguf_written_tensor tensors[KVL_WRITER_TENSORS_MAX];
} kvl_gguf_writer;

void kvl_gguf_writer_init(kvl_gguf_writer *writer);
/* Writes the file, and ends the writer. */
kvl_gguf_bytes kvl_gguf_writer_finish(kvl_gguf_writer *writer);

void kvl_gguf_set_u32(kvl_gguf_writer *writer, const char *key, uint32_t value);
void kvl_gguf_set_f32(kvl_gguf_writer *writer, const char *key, float value);
void kvl_gguf_set_bool(kvl_gguf_writer *writer, const char *key, bool value);
void kvl_gguf_set_text(kvl_gguf_writer *writer, const char *key, const char *value);
void kvl_gguf_set_texts(kvl_gguf_writer *writer, const char *key, const char *const *texts,
                        size_t n);
void kvl_gguf_set_i32s(kvl_gguf_writer *writer, const char *key, const int32_t *numbers, size_t n);
/* Any type and bytes; for arrays the bytes start with the type and count of the elements. */
void kvl_gguf_set_raw(kvl_gguf_writer *writer, const char *key, uint32_t type, const void *bytes,
                      size_t n_bytes);
/* Adds a pair even if the key is there already. */
void kvl_gguf_add_raw(kvl_gguf_writer *writer, const char *key, uint32_t type, const void *bytes,
                      size_t n_bytes);
void kvl_gguf_remove_key(kvl_gguf_writer *writer, const char *key);

/* A matrix [n_outputs][n_inputs], or a vector [n_outputs] where n_inputs is 0, of the numbers
 * given, stored as F32, F16, BF16, Q8_0 or Q4_1 (rounded the plain way: the scale from the
 * extremes). */
void kvl_gguf_set_tensor(kvl_gguf_writer *writer, const char *name, uint32_t n_outputs,
                         uint32_t n_inputs, kvl_dtype dtype, const float *numbers);
/* NULL if there is none. */
kvl_gguf_written_tensor *kvl_gguf_written(kvl_gguf_writer *writer, const char *name);
void kvl_gguf_remove_tensor(kvl_gguf_writer *writer, const char *name);

/* Rounded to nearest, ties to even; for tests that check conversions too. */
uint16_t kvl_test_half_of(float number);
uint16_t kvl_test_bfloat_of(float number);

#endif /* KVL_TEST_GGUF_WRITER_H */
