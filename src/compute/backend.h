/* compute/backend.h: what a device offers to the layers above: one table of operations.
 *
 * On the CPU device memory is ordinary memory. Elsewhere activations and pages are device memory;
 * weights, norms, biases, tables, positions, slots and ids are the host's, and rows of matmul,
 * rotate and pages_write or _read may be either. Weights must stay where and what they are until
 * the backend is destroyed: a device keeps copies.
 * Operations run in the order they are called. None of them fails on numbers: shapes are checked
 * (asserted) by the caller, and memory is had beforehand.
 * Threads  One thread at a time (the engine thread). Operations share work over the pool inside.
 * Rows     x [n_rows][width] float32, row after row without gaps unless a stride is given.
 *
 * Independence of the batch: what an operation computes for one row does not depend on the other
 * rows of the same call, on their number or on the number of threads, to the last bit. One row
 * alone (decoding) and the same row among a thousand (prefill) give the same bits: that is what
 * makes a shared or recomputed token exactly the one that a full prefill gives. Variants of the CPU
 * kernels differ among each other in the last bits. The CUDA backend does not keep this promise:
 * there a batch decides how sums are cut, and rows agree to the rounding of bf16 only. */
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

/* Attention's work: made by attention/attention.h once a step, the same for every layer. Rows are
 * renumbered there so that rows which share pages stand together; "row" below is that number.
 * Arrays are borrowed until the plan is made again.
 *
 * A tile is pages that a range of rows shares, and lies in one slice of KVL_ATTEND_SLICE_KEYS. */
typedef struct kvl_attend_tile {
    uint32_t row_first;
    uint32_t n_rows;
    uint32_t key_first;  /* position of its first key, a multiple of KVL_PAGE_TOKENS */
    uint32_t page_first; /* index into page_ids */
    uint32_t n_pages;
} kvl_attend_tile;

/* Rows that are worked on together, so that keys are read once for all of them. */
typedef struct kvl_attend_block {
    uint32_t row_first;
    uint32_t n_rows;     /* 1 .. KVL_ATTEND_BLOCK_ROWS */
    uint32_t tile_first; /* its tiles, in order of slices and, for every row, of keys */
    uint32_t n_tiles;
    uint32_t n_slices; /* of its row that sees most */
    uint32_t run_first;
    uint32_t n_runs;
    uint32_t split;         /* number among the blocks with several runs */
    uint32_t partial_first; /* where those keep partials: [n_slices][n_rows] from here */
} kvl_attend_block;

/* Neighbouring slices of one block: what one thread does for one KV head at a time. */
typedef struct kvl_attend_run {
    uint32_t block;
    uint32_t tile_first;
    uint32_t n_tiles;
} kvl_attend_run;

typedef struct kvl_attend_call {
    const kvl_pages *pages;
    uint32_t layer;
    uint32_t n_heads; /* query heads, a multiple of pages->n_kv_heads */
    uint32_t n_rows;
    uint64_t serial;           /* of the plan: no two that a process makes are the same */
    const float *queries;      /* [n_rows][n_heads][head_dim], rotated, in the caller's order */
    const uint32_t *order;     /* [n_rows]: row r stands at order[r] in queries and out */
    const uint32_t *positions; /* [n_rows]: row r sees keys at positions <= positions[r] */
    const uint32_t *page_ids;
    const kvl_attend_tile *tiles;
    const kvl_attend_block *blocks;
    const kvl_attend_run *runs; /* [n_runs], every block's together and in order */
    uint32_t n_blocks;
    uint32_t n_runs;
    uint32_t n_splits;   /* blocks with several runs */
    uint32_t n_partials; /* rows of those, counted once a slice */
    float *out;          /* [n_rows][n_heads][head_dim] */
} kvl_attend_call;

/* How much attention some rows of one path give each of its keys. */
typedef struct kvl_attend_mass_call {
    const kvl_pages *pages;
    uint32_t layer;
    uint32_t n_heads; /* query heads, a multiple of pages->n_kv_heads */
    uint32_t n_rows;
    const float *queries;      /* [n_rows][n_heads][head_dim], rotated */
    const uint32_t *positions; /* [n_rows]: row r sees keys at positions <= positions[r] */
    const uint32_t *page_ids;  /* [ceil(n_keys / KVL_PAGE_TOKENS)] */
    uint32_t n_keys;           /* at most KVL_ATTEND_MASS_KEYS_MAX; keys behind them do not exist */
} kvl_attend_mass_call;

#define KVL_ATTEND_MASS_KEYS_MAX 131072u

typedef struct kvl_backend kvl_backend;

typedef struct kvl_backend_ops {
    const char *name; /* "cpu", "cuda" */

    /* Device memory, aligned to KVL_ALIGNMENT, touched. NULL when there is none. */
    void *(*memory_create)(kvl_backend *backend, size_t n_bytes);
    void (*memory_destroy)(kvl_backend *backend, void *memory);

    /* Brings weights to the device before they are used, so that too little memory is told early.
     * Errors   KVL_ERR_NO_MEMORY, KVL_ERR_UNSUPPORTED, KVL_ERR_IO */
    kvl_status (*weights_load)(kvl_backend *backend, const kvl_matrix *weights, kvl_error *error);

    /* Row i becomes row from[i] of rows [][width]; from ascending, from[i] >= i. */
    void (*rows_keep)(kvl_backend *backend, uint32_t n_rows, uint32_t width, const uint32_t *from,
                      float *rows);

    /* x [n_rows][n_inputs]; all jobs have the same n_inputs. y must not overlap x. Few rows stream
     * the quantised weights, many rows use panels that are dequantised once: the same bits. */
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
     * keys, values [n_rows][n_kv_heads][head_dim]; slots [n_rows]: page * KVL_PAGE_TOKENS + index
     */
    void (*pages_write)(kvl_backend *backend, const kvl_pages *pages, uint32_t layer,
                        uint32_t n_rows, const uint32_t *slots, const float *keys,
                        const float *values);
    /* The inverse: gathers rows out of pages. */
    void (*pages_read)(kvl_backend *backend, const kvl_pages *pages, uint32_t layer,
                       uint32_t n_rows, const uint32_t *slots, float *keys, float *values);

    void (*attend)(kvl_backend *backend, const kvl_attend_call *call);

    /* mass[h][k] += sum over rows and over the query heads of KV head h of the attention weight of
     * key k: a row's weights are those of all keys that it sees and add up to 1. mass
     * [n_kv_heads][n_keys]: a sum for each KV head, so that threads need no order. */
    void (*attend_mass)(kvl_backend *backend, const kvl_attend_mass_call *call, float *mass);

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
/* Rows of one block at most. A row is one token: its query heads come on top. */
#define KVL_ATTEND_BLOCK_ROWS 32u

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

/* The CUDA backend on device `number`, in bf16 with float sums.
 * Owns     *backend: as above
 * Errors   KVL_ERR_UNSUPPORTED (built without CUDA; no driver; no such device; a chip that the
 *          kernels are not for), KVL_ERR_NO_MEMORY, KVL_ERR_IO: the text says what to do */
KVL_MUST_USE kvl_status kvl_backend_cuda_create(kvl_pool *pool, uint32_t number,
                                                kvl_backend **backend, kvl_error *error);

#define KVL_DEVICES_MAX 64u

/* device  "cpu", "cuda:N", "cuda" (the first), or "auto": the first CUDA device that the backend
 *         runs on, otherwise the CPU; which one it is stands in (*backend)->ops->name.
 * variant  of the CPU
 * Errors   KVL_ERR_INVALID (another text), those of the backend that is named: a device that was
 *          asked for by name is never replaced by another */
KVL_MUST_USE kvl_status kvl_backend_create(kvl_pool *pool, const char *device,
                                           kvl_cpu_variant variant, kvl_backend **backend,
                                           kvl_error *error);

#endif /* KVL_COMPUTE_BACKEND_H */
