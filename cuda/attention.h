/* cuda/attention.h: a planned step of attention on the device: its plan in device memory, room for
 * partial results, and the launch for each layer.
 *
 *   kvl_cuda_step_create ... for each step: kvl_cuda_step_make, then kvl_cuda_step_run a layer
 *
 * A captured graph keeps the addresses it was captured with: they change only when a step needs
 * more room than any before it, and then kvl_cuda_step_generation changes.
 * Threads  The engine thread only. */
#ifndef KVL_CUDA_ATTENTION_H
#define KVL_CUDA_ATTENTION_H

#include "cuda/kernels.h"
#include "cuda/plan.h"

typedef struct kvl_cuda_step kvl_cuda_step;

/* n_blocks: thread blocks to run, 0: one a multiprocessor of the current device.
 * Owns     *step: ended with kvl_cuda_step_destroy
 * Errors   KVL_ERR_NO_MEMORY, KVL_ERR_UNSUPPORTED (not a Hopper device), KVL_ERR_IO (the driver) */
KVL_MUST_USE kvl_status kvl_cuda_step_create(uint32_t n_blocks, kvl_cuda_step **step,
                                             kvl_error *error);
void kvl_cuda_step_destroy(kvl_cuda_step *step);

/* Plans `call` and sends the plan on `stream`; head_dim 64 or 128. What `call` borrows may be
 * changed when this returns.
 * Errors   those of kvl_cuda_plan_make, KVL_ERR_UNSUPPORTED (head_dim), KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_cuda_step_make(kvl_cuda_step *step, const kvl_attend_call *call,
                                           uint32_t n_kv_heads, uint32_t head_dim,
                                           cudaStream_t stream, kvl_error *error);

/* One layer. kv: the layer's pages (cuda/work.h has their layout); queries, out
 * [n_rows][n_heads][head_dim], float where `float_numbers`, otherwise bf16; device memory.
 * variant  0, or another of kvl_cuda_attention_launch
 * Errors   KVL_ERR_IO: the launch was refused */
KVL_MUST_USE kvl_status kvl_cuda_step_run(kvl_cuda_step *step, const void *kv, const void *queries,
                                          void *out, bool float_numbers, uint32_t variant,
                                          cudaStream_t stream, kvl_error *error);

uint64_t kvl_cuda_step_generation(const kvl_cuda_step *step);
kvl_cuda_plan_view kvl_cuda_step_plan(const kvl_cuda_step *step);

/* A status of a driver call; what names the call.
 * Errors   KVL_ERR_NO_MEMORY, KVL_ERR_IO */
KVL_MUST_USE kvl_status kvl_cuda_check(cudaError_t result, const char *what, kvl_error *error);

#endif /* KVL_CUDA_ATTENTION_H */
