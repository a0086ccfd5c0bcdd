/* cuda/work.h: what the host hands to the device: plain structures.
 *
 * Read by C and by CUDA C++, with and without CUDA's headers, so it includes nothing of the rooms.
 * Every pointer in them is device memory.
 *
 * A page of one layer, bf16, keys rotated:  [K|V][n_kv_heads][2][head_dim / 8][8][8]
 * that is, for each KV head two groups of 8 tokens, in each the dimensions in groups of 8, and in
 * each of those 8 tokens by 8 dimensions in 128 bytes. These are the core matrices that warp-group
 * matrix instructions and ldmatrix read from shared memory, so one bulk copy of a head of a page
 * (16 * head_dim * 2 bytes) brings it there ready for use: no swizzle, no tensor map, no bank
 * conflicts. Page memory must hold finite numbers everywhere: what is masked is multiplied by 0. */
#ifndef KVL_CUDA_WORK_H
#define KVL_CUDA_WORK_H

#include <stddef.h>
#include <stdint.h>

#define KVL_CUDA_PAGE_TOKENS 16u
/* Packed rows (tokens times query heads of one KV head) of one matrix work. */
#define KVL_CUDA_MATRIX_ROWS 128u
/* Pages that a matrix work takes in one step; works are cut at multiples of it. */
#define KVL_CUDA_STEP_PAGES 4u
/* Packed rows and pages of one vector work. */
#define KVL_CUDA_VECTOR_ROWS 8u
#define KVL_CUDA_VECTOR_PAGES 32u
/* The work writes its rows' results itself: nothing else sees these rows. */
#define KVL_CUDA_DIRECT UINT32_MAX

/* Many rows, by warp-group matrix instructions: one KV head of a span. */
typedef struct kvl_cuda_matrix_work {
    uint32_t row_first;  /* planned row */
    uint32_t n_rows;     /* times the group: at most KVL_CUDA_MATRIX_ROWS */
    uint32_t head;       /* KV head */
    uint32_t page_first; /* index into page_ids */
    uint32_t n_pages;
    uint32_t key_first;  /* position of its first key */
    uint32_t slot_first; /* index into slots, one a row */
    uint32_t mask_step;  /* from this step on some row does not see every key */
} kvl_cuda_matrix_work;

/* Few rows, by one warp: one KV head of some pages. Everything a warp needs to begin is in its 256
 * bytes, which the lanes fetch in two loads, well before they begin. */
typedef struct kvl_cuda_vector_work {
    uint32_t pages[KVL_CUDA_VECTOR_PAGES];
    uint32_t places[KVL_CUDA_VECTOR_ROWS];    /* of its rows in queries and out */
    uint32_t positions[KVL_CUDA_VECTOR_ROWS]; /* of its rows */
    uint32_t slots[KVL_CUDA_VECTOR_ROWS];     /* of its rows, or KVL_CUDA_DIRECT */
    uint32_t n_rows;                          /* times the group: at most KVL_CUDA_VECTOR_ROWS */
    uint32_t head;
    uint32_t n_pages;
    uint32_t key_first;
    uint32_t row_first; /* planned row */
    uint32_t unused[3];
} kvl_cuda_vector_work;

/* Partial results of one row and KV head, to be merged. */
typedef struct kvl_cuda_merge {
    uint32_t place; /* of the row in queries and out */
    uint32_t head;
    uint32_t slot_first;
    uint32_t n_slots;
} kvl_cuda_merge;

typedef struct kvl_cuda_attention {
    const void *kv; /* pages of the layer */
    const void *queries;
    void *out;
    const uint32_t *order;     /* [n_rows]: planned row r stands at order[r] of queries and out */
    const uint32_t *positions; /* [n_rows]: planned row r sees keys at positions <= positions[r] */
    const uint32_t *page_ids;
    const kvl_cuda_matrix_work *matrix;
    const uint32_t *matrix_first; /* [n_blocks + 1]: works of a thread block */
    const kvl_cuda_vector_work *vectors;
    const uint32_t *vector_first; /* same */
    const uint32_t *slots;
    const kvl_cuda_merge *merges;
    float *partial_rows; /* [n_slots][group][head_dim], not divided by the sum */
    float *partial_sums; /* [n_slots][group][2]: maximum (in units of log 2) and sum */
    uint64_t *barrier;   /* arrivals, counted on by every launch with the same n_blocks */
    uint32_t n_merges;
    uint32_t n_parts_max; /* partial results of one merge */
    uint32_t n_heads;
    uint32_t n_kv_heads;
    uint32_t head_dim;      /* 64 or 128 */
    uint32_t n_blocks;      /* thread blocks, at most the multiprocessors of the device */
    uint32_t float_numbers; /* queries and out are float; otherwise bf16 */
    uint32_t is_first;      /* launch of this plan: it may not begin before the plan is there */
} kvl_cuda_attention;

/* Where dimension `dim` of token 0 .. 15 of a page stands, counted in numbers from the start of its
 * KV head's keys or values. */
static inline uint32_t kvl_cuda_page_at(uint32_t head_dim, uint32_t token, uint32_t dim)
{
    return (token / 8 * (head_dim / 8) + dim / 8) * 64 + token % 8 * 8 + dim % 8;
}

#endif /* KVL_CUDA_WORK_H */
