/* cuda/moves.h: KV on its way: segments into pages, pages to pages, host to device and back.
 *
 * Launches are put on `stream` and return before the work is done; all pointers are memory that
 * the device can reach: its own, or pinned host memory (read over the bus, without a copy first).
 * Keys are rotated in float (RoFormer, arXiv:2104.09864, section 3.4.2) and rounded to bf16 once. */
#ifndef KVL_CUDA_MOVES_H
#define KVL_CUDA_MOVES_H

#include "cuda/work.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* As kvl_rotation (compute/rotation.h), in device memory. rotary_dim must be a multiple of 16. */
typedef struct kvl_cuda_rotation {
    const float *cosines; /* [n_positions][rotary_dim / 2] */
    const float *sines;
    uint32_t rotary_dim;
    uint32_t halves; /* pairs (j, j + rotary_dim / 2), otherwise (2 j, 2 j + 1) */
} kvl_cuda_rotation;

/* Number formats of a segment's block (segment/codec.h). */
typedef enum kvl_cuda_format {
    KVL_CUDA_F32,
    KVL_CUDA_F16,
    KVL_CUDA_BF16,
    KVL_CUDA_INT8,
} kvl_cuda_format;

/* One layer of a segment into pages, in one kernel: dequantise, offset, rotate, scatter. */
typedef struct kvl_cuda_place {
    const void *block; /* [K|V][n_kv_heads][block_tokens][head_dim], int8: then the scales */
    /* What is added before rotation, [n_kv_heads][n_tokens][head_dim] float; NULL: nothing. */
    const float *key_offsets;
    const float *value_offsets;
    const uint32_t *positions; /* [n_tokens] */
    const uint32_t *slots;     /* [n_tokens]: page * KVL_CUDA_PAGE_TOKENS + index */
    void *pages;               /* of the layer */
    kvl_cuda_rotation rotation;
    kvl_cuda_format format;
    uint32_t block_tokens;
    uint32_t token_first; /* of the block */
    uint32_t n_tokens;
    uint32_t n_kv_heads;
    uint32_t head_dim; /* a multiple of 16 */
} kvl_cuda_place;

/* Errors   cudaErrorInvalidValue: a shape without a kernel */
cudaError_t kvl_cuda_place_launch(const kvl_cuda_place *place, cudaStream_t stream);

/* A page of each layer goes to another place; its keys are turned by `turn` positions. */
typedef struct kvl_cuda_page_move {
    uint32_t from;
    uint32_t to;
    int32_t turn;
} kvl_cuda_page_move;

typedef struct kvl_cuda_page_moves {
    const void *from; /* [n_layers][n_from_pages] */
    void *to;         /* [n_layers][n_to_pages]; pages must not overlap those that are read */
    const kvl_cuda_page_move *moves;
    kvl_cuda_rotation rotation; /* |turn| is below its n_positions */
    uint32_t n_moves;
    uint32_t n_layers;
    uint32_t n_from_pages;
    uint32_t n_to_pages;
    uint32_t n_kv_heads;
    uint32_t head_dim; /* a multiple of 16 */
    uint32_t n_blocks; /* thread blocks at most, so that others can compute; 0: as many as fit */
} kvl_cuda_page_moves;

cudaError_t kvl_cuda_page_moves_launch(const kvl_cuda_page_moves *moves, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* KVL_CUDA_MOVES_H */
