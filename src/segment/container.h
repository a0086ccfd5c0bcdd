/* segment/container.h: the .kvseg container: a header, a table of blocks, the blocks.
 *
 * One container is either a segment (KV of one part's tokens) or an anchor (an example of how KV in
 * context differed from KV at home). The same bytes stand in memory, in LMDB, on the wire and in a
 * file; docs/segment-format.md describes every byte. Block l belongs to layer l, starts on a
 * multiple of 64 bytes and has its own XXH3-64 checksum: the unit of loading, sending and checking.
 * Trust    Nothing in a container from outside is believed: sizes are checked before they are used,
 *          blocks before they are read. Damage is KVL_ERR_DAMAGED, never wrong KV.
 * Threads  A sealed container never changes: share it freely. */
#ifndef KVL_SEGMENT_CONTAINER_H
#define KVL_SEGMENT_CONTAINER_H

#include "base/hash.h"

#define KVL_CONTAINER_VERSION 1u
#define KVL_CONTAINER_BYTES_MAX ((uint64_t)8 << 30)
#define KVL_CONTAINER_HEADER_BYTES_MAX (1u << 20)
#define KVL_CONTAINER_EXTRA_BYTES_MAX (1u << 16)
#define KVL_CONTAINER_LAYERS_MAX 1024u
#define KVL_CONTAINER_HEADS_MAX 1024u
#define KVL_CONTAINER_HEAD_DIM_MAX 4096u
#define KVL_SEGMENT_TOKENS_MAX (1u << 17)

typedef enum kvl_container_kind {
    KVL_CONTAINER_SEGMENT = 1,
    KVL_CONTAINER_ANCHOR = 2
} kvl_container_kind;

/* Numbers of KV. int8: per group of one token and one head, a float16 scale beside it. */
typedef enum kvl_kv_dtype {
    KVL_KV_F32 = 1,
    KVL_KV_F16 = 2,
    KVL_KV_BF16 = 3,
    KVL_KV_INT8 = 4,
} kvl_kv_dtype;

/* What a header says. For a segment, block l is keys [n_kv_heads][n_tokens][head_dim] (before
 * rotation), then values in the same shape, then, for int8, float16 scales of keys and of values
 * [n_kv_heads][n_tokens]. For an anchor, reuse/anchor_layout.h says what a block is, and n_tokens
 * may be 0. */
typedef struct kvl_container_info {
    kvl_container_kind kind;
    kvl_digest id;
    kvl_digest fingerprint; /* of the model */
    kvl_digest home;        /* zero: behind nothing */
    bool home_is_canonical; /* false: carries its context, only the same workflow may use it */
    bool is_unhealed;       /* computed behind approximate KV, which no full prefill has replaced */
    kvl_kv_dtype dtype;
    uint32_t n_layers;
    uint32_t n_kv_heads;
    uint32_t head_dim;
    uint32_t n_tokens;
    uint32_t pairs;         /* kvl_rotation_pairs of the model: what "before rotation" means */
    uint64_t block_bytes;   /* of each block, without padding; the same for all */
    const uint32_t *tokens; /* [n_tokens] ids; borrowed */
    const void *extra;      /* bytes that belong to the kind (an anchor's own header); borrowed */
    size_t n_extra_bytes;
} kvl_container_info;

/* Shared and counted; starts with one reference. */
typedef struct kvl_container kvl_container;

/* Makes a container with the header written and blocks zeroed, to be filled and sealed.
 * Takes copies of tokens and extra; info->id is set by kvl_container_seal's caller beforehand.
 * Errors   KVL_ERR_OUT_OF_RANGE (text names the field), KVL_ERR_TOO_LARGE (the whole is),
 *          KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_container_create(const kvl_container_info *info,
                                             kvl_container **container, kvl_error *error);
/* Writes the checksums; from now on nobody writes to it. A container of kvl_container_from_header
 * is sealed by its last block check already, with the table that came with it: then, as for any
 * sealed container, this does nothing. */
void kvl_container_seal(kvl_container *container);
bool kvl_container_is_sealed(const kvl_container *container);

/* Makes an unsealed container from the header bytes of a peer or a file (exactly what
 * kvl_container_header gives), with room for its blocks; each block is written to
 * kvl_container_block and accepted by kvl_container_block_check. Once all have been accepted the
 * container is sealed. What stands in a block before it is written is undefined.
 * Errors   KVL_ERR_DAMAGED, KVL_ERR_FOREIGN (version), KVL_ERR_TOO_LARGE, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_container_from_header(const void *bytes, size_t n_bytes,
                                                  kvl_container **container, kvl_error *error);
/* Copies whole container bytes and checks everything. Errors as above. */
KVL_MUST_USE kvl_status kvl_container_from_bytes(const void *bytes, size_t n_bytes,
                                                 kvl_container **container, kvl_error *error);
/* Same, and leaves blocks to their readers where `check_blocks` is false. */
KVL_MUST_USE kvl_status kvl_container_copy(const void *bytes, size_t n_bytes, bool check_blocks,
                                           kvl_container **container, kvl_error *error);
/* Uses the bytes in place, checks the header only; `bytes` must outlive the container; blocks are
 * checked one by one by the reader. `release(context)` runs when the last reference goes. */
KVL_MUST_USE kvl_status kvl_container_borrow(const void *bytes, size_t n_bytes,
                                             void (*release)(void *context), void *context,
                                             kvl_container **container, kvl_error *error);

void kvl_container_share(kvl_container *container);   /* one reference more */
void kvl_container_release(kvl_container *container); /* one less; NULL does nothing */

/* How many hold it now: who holds the only reference knows that nobody else reads it. */
uint32_t kvl_container_n_references(const kvl_container *container);

/* From now on containers of at least n_bytes_min bytes are made in memory that can be lent to other
 * processes; 0 switches this off again. For the whole process; by default off. */
void kvl_container_use_shared_memory(size_t n_bytes_min);
/* Descriptor of a sealed file whose first bytes are the container's, to be passed to a process that
 * maps it for reading; borrowed until the container ends. -1: this one's memory cannot be lent.
 * Memory that was lent once is never used for another container. A container that is still being
 * received may be lent too: its reader may look at a block when that block has been checked. */
int kvl_container_lend(kvl_container *container);

/* Borrowed until the container ends. */
const kvl_container_info *kvl_container_info_of(const kvl_container *container);
/* Everything before the first block: what kvl_container_from_header reads. Not of a container of
 * kvl_container_create before it is sealed. */
const void *kvl_container_header(const kvl_container *container, size_t *n_bytes);
/* All bytes, of a sealed container. */
const void *kvl_container_bytes(const kvl_container *container, size_t *n_bytes);
uint64_t kvl_container_n_bytes(const kvl_container *container);  /* also before it is sealed */
uint32_t kvl_container_n_blocks(const kvl_container *container); /* = n_layers */
/* Block of a layer, 64-byte aligned in memory we made. Writable until sealed. */
void *kvl_container_block(kvl_container *container, uint32_t block, size_t *n_bytes);
const void *kvl_container_block_view(const kvl_container *container, uint32_t block,
                                     size_t *n_bytes);
/* Compares the checksum of a block with the table, and the padding behind it with zero. Not for a
 * container of kvl_container_create before it is sealed.
 * Errors   KVL_ERR_DAMAGED */
KVL_MUST_USE kvl_status kvl_container_block_check(const kvl_container *container, uint32_t block,
                                                  kvl_error *error);

/* The same where the checksum of the block was computed while it was written, from exactly these
 * bytes: they are not read again. */
KVL_MUST_USE kvl_status kvl_container_block_accept(const kvl_container *container, uint32_t block,
                                                   uint64_t checksum, kvl_error *error);

/* Memory of containers of 1 MiB and more is kept for the next ones when they end, at most 4 buffers
 * and 256 MiB, because touching fresh pages costs more than filling them. This gives it back; until
 * then kvl_alloc_live counts it. */
void kvl_container_spare_clear(void);

/* Id of a segment: keyed BLAKE2b-256 over fingerprint, home and ids. Without the tenant's key it
 * can be neither guessed nor probed. tenant_key [32]. */
kvl_digest kvl_segment_id(const uint8_t *tenant_key, const kvl_digest *fingerprint,
                          const kvl_digest *home, const uint32_t *tokens, size_t n_tokens);

#endif /* KVL_SEGMENT_CONTAINER_H */
