/* cuda/plan.h: one step of attention, shared out among the thread blocks of a device.
 *
 * Takes the tiles that attention/ has cut (compute/backend.h) and makes the works of
 * cuda/work.h: tiles that follow each other along the same rows are joined into spans, spans
 * are cut by rows (many: matrix works; up to KVL_CUDA_VECTOR_ROWS packed: vector works) and by keys
 * so that every thread block has the same number of pages to read. Plain C, no device needed.
 * A row's keys are cut where the balance wants it, so, unlike on a CPU, its last bits depend on
 * what else is in the step.
 * Threads  The engine thread only.
 * Memory   Arrays only grow. */
#ifndef KVL_CUDA_PLAN_H
#define KVL_CUDA_PLAN_H

#include "compute/backend.h"
#include "cuda/work.h"

typedef struct kvl_cuda_plan kvl_cuda_plan;

/* Host memory, borrowed until the plan is made again. */
typedef struct kvl_cuda_plan_view {
    const kvl_cuda_matrix_work *matrix;
    const kvl_cuda_vector_work *vectors;
    const kvl_cuda_merge *merges;
    const uint32_t *matrix_first; /* [n_blocks + 1] */
    const uint32_t *vector_first; /* [n_blocks + 1] */
    const uint32_t *slots;        /* [n_slot_entries] */
    const uint32_t *page_ids;
    uint32_t n_matrix;
    uint32_t n_vectors;
    uint32_t n_merges;
    uint32_t n_slot_entries;
    uint32_t n_page_ids;
    uint32_t n_slots;     /* partial results that need room */
    uint32_t n_parts_max; /* of one merge */
} kvl_cuda_plan_view;

KVL_MUST_USE kvl_status kvl_cuda_plan_create(kvl_cuda_plan **plan, kvl_error *error);
void kvl_cuda_plan_destroy(kvl_cuda_plan *plan);

/* Of `call` only what attention/ planned is read (order, positions, page_ids, tiles, blocks), and
 * n_heads. n_blocks: thread blocks that will run. Queries per KV head: at most
 * KVL_CUDA_VECTOR_ROWS.
 * Errors   KVL_ERR_NO_MEMORY, KVL_ERR_UNSUPPORTED (more query heads a KV head) */
KVL_MUST_USE kvl_status kvl_cuda_plan_make(kvl_cuda_plan *plan, const kvl_attend_call *call,
                                           uint32_t n_kv_heads, uint32_t n_blocks,
                                           kvl_error *error);
kvl_cuda_plan_view kvl_cuda_plan_look(const kvl_cuda_plan *plan);

#endif /* KVL_CUDA_PLAN_H */
