/* compute/backend.h: what a device offers to the layers above: one table of operations.
 *
 * Every pointer to numbers is device memory of the backend; on the CPU that is ordinary memory.
 * Operations run in the order they are called. None of them fails on numbers: shapes are checked
 * (asserted) by the caller, and memory is had beforehand.
 * Threads  One thread at a time (the engine thread). Operations share work over the pool inside.
 * Rows     x [n_rows][width] float32, row after row without gaps unless a stride is given.
 *
 * Independence of the batch: what an operation computes for one row must not depend on the other
 * rows of the same call, to the last bit, whenever both calls use the same path (few rows or many
 * rows, see matmul). That is what makes greedy tokens the same in any batch. */
#ifndef KVL_COMPUTE_BACKEND_H
#define KVL_COMPUTE_BACKEND_H

#include "base/pool.h"
#include "compute/dtype.h"
#include "compute/pages.h"
#include "compute/rotation.h"

/* One product y = x W^T (+ bias) (+ y). Several jobs of one call share x and one parallel loop. */
typedef struct kvl_matmul_job {
    const kvl_matrix *weights;
    const float *bias; /* [n_outputs] or NULL */
    float *y;          /* [n_rows][n_outputs] */
    bool accumulate;   /* add to what y holds (the residual stream) */
} kvl_matmul_job;

/* Part of attention's work: rows that stand together in the batch against one slice of keys.
 * See attention/attention.h, which makes these and owns their meaning. */
typedef struct kvl_attend_tile {
    uint32_t row_first;
    uint32_t n_rows;
    const uint32_t *pages;   /* of the slice, in order */
    uint32_t key_first;      /* position of the first key of the slice */
    uint32_t n_keys;         /* keys in the slice that exist, <= the backend's slice length */
    uint32_t partial_first;  /* where the partial of the first row goes: [n_partials] */
    uint32_t partial_stride; /* distance between the partials of neighbouring rows */
} kvl_attend_tile;

typedef struct kvl_attend_call {
    const kvl_pages *pages;
    uint32_t layer;
    uint32_t n_heads;          /* query heads, a multiple of pages->n_kv_heads */
    uint32_t n_rows;
    const float *queries;      /* [n_rows][n_heads][head_dim], rotated */
    const uint32_t *positions; /* [n_rows]: a row sees keys at positions <= its own */
    const kvl_attend_tile *tiles;
    size_t n_tiles;
    const uint32_t *row_partials; /* [n_rows + 1]: partials of row r, in order of keys */
    size_t n_partials;
    float *out; /* [n_rows][n_heads][head_dim] */
} kvl_attend_call;

typedef struct kvl_backend kvl_backend;

typedef struct kvl_backend_ops {
    const char *name; /* "cpu", "cuda" */

    /* Device memory, aligned to KVL_ALIGNMENT, touched. NULL when there is none. */
    void *(*memory_create)(kvl_backend *backend, size_t n_bytes);
    void (*memory_destroy)(kvl_backend *backend, void *memory);

    /* x [n_rows][n_inputs]; all jobs have the same n_inputs. Two paths: few rows stream the
     * quantised weights, many rows dequantise panels for BLAS. */
    void (*matmul)(kvl_backend *backend, const kvl_matmul_job *jobs, size_t n_jobs, uint32_t n_rows,
                   const float *x);

    /* y[r] = x[r] / sqrt(mean(x[r]^2) + epsilon) * weight; y may be x. weight [width]. */
    void (*rms_norm)(kvl_backend *backend, uint32_t n_rows, uint32_t width, const float *x,
                     const float *weight, float epsilon, float *y);

    /* RoPE in place; arguments as in kvl_rotate_rows, forwards, heads without gaps. */
    void (*rotate)(kvl_backend *backend, const kvl_rotation *rotation, uint32_t n_rows,
                   const uint32_t *positions, uint32_t n_heads, uint32_t head_dim, float *rows);

    /* gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i], n floats. */
    void (*silu_multiply)(kvl_backend *backend, size_t n, float *gate, const float *up);

    /* out[r] = row ids[r] of table, dequantised. ids < table->n_outputs. */
    void (*embed)(kvl_backend *backend, const kvl_matrix *table, uint32_t n_rows,
                  const uint32_t *ids, float *out);

    /* Writes rotated keys and values of one layer into pages.
     * keys, values [n_rows][n_kv_heads][head_dim]; slots [n_rows]: page * KVL_PAGE_TOKENS + index */
    void (*pages_write)(kvl_backend *backend, const kvl_pages *pages, uint32_t layer,
                        uint32_t n_rows, const uint32_t *slots, const float *keys,
                        const float *values);
    /* The inverse: gathers rows out of pages. */
    void (*pages_read)(kvl_backend *backend, const kvl_pages *pages, uint32_t layer,
                       uint32_t n_rows, const uint32_t *slots, float *keys, float *values);

    void (*attend)(kvl_backend *backend, const kvl_attend_call *call);

    /* Waits for everything called so far. */
    void (*synchronize)(kvl_backend *backend);
    void (*destroy)(kvl_backend *backend);
} kvl_backend_ops;

struct kvl_backend {
    const kvl_backend_ops *ops;
    kvl_pool *pool; /* borrowed until the backend is destroyed */
};

/* Keys in one attention slice: every row's keys are cut at multiples of this position, whatever
 * the batch, so that a row's sum is always taken in the same order. */
#define KVL_ATTEND_SLICE_KEYS 256u

/* "portable", "avx2", "avx512": what the CPU backend compiled. */
typedef enum kvl_cpu_variant {
    KVL_CPU_BEST, /* the best that this processor can run; KVLOOM_CPU=name overrides */
    KVL_CPU_PORTABLE,
    KVL_CPU_AVX2,
    KVL_CPU_AVX512,
} kvl_cpu_variant;

KVL_MUST_USE bool kvl_cpu_variant_runs(kvl_cpu_variant variant);
const char *kvl_cpu_variant_name(kvl_cpu_variant variant);

/* Owns     *backend: ended with backend->ops->destroy(backend), before the pool
 * Errors   KVL_ERR_UNSUPPORTED (the processor cannot run the variant), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_backend_cpu_create(kvl_pool *pool, kvl_cpu_variant variant,
                                               kvl_backend **backend, kvl_error *error);

#endif /* KVL_COMPUTE_BACKEND_H */
