/* reuse/anchor_layout.h: how an anchor lies in its container: the header's `extra` and the blocks.
 *
 * extra, 92 bytes, integers little endian:
 *    0  template_id [32]     32  layout version    36  slot
 *   40  base_id [32]         72  n_tokens          76  n_after (text after the slot)
 *   80  base_stride          84  base_keys (0, 1)  88  0
 * The container's own n_tokens is 0: the ids of the slot are nobody's business.
 *
 * Block l has five sections, each on a multiple of 64 bytes; a row is one token:
 *   slot keys, slot values     offsets of layer l, n_tokens rows of n_kv_heads groups
 *   after keys, after values   offsets of the text after, n_after rows of n_kv_heads groups
 *   base                       tokens l * base_rows .. of the base: what distances need, in one row
 *                              for all layers kept: values of layer (first, first + stride, ...),
 *                              then keys likewise where base_keys; n_kv_heads groups each
 * so that every block has the same size, and a distance reads one run of bytes a token.
 * A group is head_dim numbers. int8: numbers, then (again on 64 bytes) their float16 scales. f32:
 * numbers; for offsets also a second plane with what rounding lost, which makes them exact.
 * Layer 0 holds zeros for offsets: its KV knows no context. */
#ifndef KVL_REUSE_ANCHOR_LAYOUT_H
#define KVL_REUSE_ANCHOR_LAYOUT_H

#include "reuse/anchor.h"
#include "reuse/anchor_kernel.h"

#define KVL_ANCHOR_LAYOUT_VERSION 1u
#define KVL_ANCHOR_EXTRA_BYTES 92u
#define KVL_ANCHOR_LAYERS_MAX (1u << 12)
#define KVL_ANCHOR_HEADS_MAX (1u << 12)
/* KV larger than this is no KV: keeps every sum of squares finite. */
#define KVL_ANCHOR_MAGNITUDE_MAX 0x1p20F

/* The default mode compares values in every fourth layer, 2, 6, 10 and so on. Measured on
 * SmolLM2-135M over all pairs of 20 texts of 160 tokens: a token's distance correlates 0.96 with
 * the one over all layers. From layer 1 on, a set that has the last layer in it, 0.93, and even
 * then weights at temperature 1 differ by 0.02 (total variation); single layers below 0.5. */
#define KVL_ANCHOR_DISTANCE_STRIDE 4u

typedef enum kvl_anchor_section {
    KVL_ANCHOR_SLOT_KEYS,
    KVL_ANCHOR_SLOT_VALUES,
    KVL_ANCHOR_AFTER_KEYS,
    KVL_ANCHOR_AFTER_VALUES,
    KVL_ANCHOR_BASE,
    KVL_ANCHOR_SECTIONS
} kvl_anchor_section;

typedef struct kvl_anchor_layout {
    kvl_kv_dtype dtype;
    uint32_t n_layers, n_kv_heads, head_dim;
    uint32_t n_tokens, n_after;
    uint32_t base_stride; /* 1 or KVL_ANCHOR_DISTANCE_STRIDE */
    bool base_keys;

    /* What follows from them. */
    uint32_t n_base_layers;
    uint32_t base_groups; /* of one base row */
    uint32_t base_rows;   /* tokens of the base that a block holds */
    size_t at[KVL_ANCHOR_SECTIONS];
    size_t scales_at[KVL_ANCHOR_SECTIONS]; /* int8; for f32, the second plane */
    size_t block_bytes;
} kvl_anchor_layout;

/* First layer kept for distances at a stride: base layer i is first + i * stride. */
static inline uint32_t kvl_anchor_first_layer(uint32_t n_layers, uint32_t stride)
{
    if (stride == 1) return 0;
    return n_layers > 2 ? 2 : n_layers - 1;
}

/* Fills what follows. False where a size is 0 or too large, or overflows. */
KVL_MUST_USE bool kvl_anchor_layout_fill(kvl_anchor_layout *layout);

typedef struct kvl_anchor_extra {
    kvl_anchor_slot slot;
    kvl_digest base_id;
    uint32_t n_tokens, n_after, base_stride;
    bool base_keys;
} kvl_anchor_extra;

/* bytes [KVL_ANCHOR_EXTRA_BYTES] */
void kvl_anchor_extra_encode(const kvl_anchor_extra *extra, uint8_t *bytes);

/* Name of an anchor among containers: of what was measured, not of the outcome, so that measuring
 * the same text again replaces it. */
kvl_digest kvl_anchor_id(const kvl_digest *fingerprint, const kvl_anchor_extra *extra,
                         const kvl_anchor_layout *layout);

/* Reads and checks what the header of a container says, and every block.
 * Errors   KVL_ERR_DAMAGED, KVL_ERR_FOREIGN */
KVL_MUST_USE kvl_status kvl_anchor_container_check(const kvl_digest *fingerprint,
                                                   const kvl_container *container,
                                                   kvl_anchor_extra *extra,
                                                   kvl_anchor_layout *layout, kvl_error *error);

/* Fills block `layer`: offsets, and the base rows that belong there. False where a number is not
 * finite or larger than KVL_ANCHOR_MAGNITUDE_MAX. */
KVL_MUST_USE bool kvl_anchor_block_fill(const kvl_anchor_layout *layout, uint32_t layer,
                                        const kvl_kv_view *base, const kvl_kv_view *real,
                                        const kvl_kv_view *after_base,
                                        const kvl_kv_view *after_real, uint8_t *block);

/* Rows of a section of a block; for the base, of all its tokens in this block. */
kvl_anchor_rows kvl_anchor_section_rows(const kvl_anchor_layout *layout, const uint8_t *block,
                                        kvl_anchor_section section);

#endif /* KVL_REUSE_ANCHOR_LAYOUT_H */
