/* segment/codec.h: float32 rows of KV to and from the number formats of a segment's blocks.
 * Threads  Safe from any thread. */
#ifndef KVL_SEGMENT_CODEC_H
#define KVL_SEGMENT_CODEC_H

#include "segment/container.h"

/* A block is numbers in the segment's dtype, little endian, head by head:
 *   keys [n_kv_heads][n_tokens][head_dim], values the same;
 *   int8 only, behind them: scales of keys [n_kv_heads][n_tokens] float16, those of values.
 * Rounding is to nearest, ties to even. int8: a group is one head of one token; its scale
 * is the smallest float16 that is at least max|x| / 127, a number stands for q * scale, so that
 * |x - q * scale| <= scale / 2. Numbers too large for that (above 127 * 65504) and infinities
 * become +-127, NaN becomes 0; neither counts in max|x|.
 * A block must be aligned to 2 bytes. */

/* Bytes of one block (keys and values of one layer). False on overflow or an unknown dtype. */
KVL_MUST_USE bool kvl_segment_block_bytes(kvl_kv_dtype dtype, uint32_t n_kv_heads,
                                          uint32_t n_tokens, uint32_t head_dim, uint64_t *n_bytes);

/* `block` gets kvl_segment_block_bytes bytes, each of them written.
 * keys, values [n_tokens][n_kv_heads][head_dim] float (token-major, as pages_read gives them) into
 * a block (head-major). */
void kvl_segment_encode_block(kvl_kv_dtype dtype, uint32_t n_kv_heads, uint32_t n_tokens,
                              uint32_t head_dim, const float *keys, const float *values,
                              void *block);
/* Tokens token_first .. token_first + n - 1 of a block of n_tokens back to token-major float:
 * keys, values [n][n_kv_heads][head_dim]. Either may be NULL. */
void kvl_segment_decode_block(kvl_kv_dtype dtype, uint32_t n_kv_heads, uint32_t n_tokens,
                              uint32_t head_dim, const void *block, uint32_t token_first,
                              uint32_t n, float *keys, float *values);

/* The number formats themselves, n numbers each; the processor's own conversion and ours give the
 * same bits, subnormals and NaN included (NaN becomes quiet and keeps its upper bits). */
void kvl_f16_from_f32(size_t n, const float *in, uint16_t *out);
void kvl_f32_from_f16(size_t n, const uint16_t *in, float *out);

#endif /* KVL_SEGMENT_CODEC_H */
