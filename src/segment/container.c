/* container.c: the life of a container: made, filled or received, sealed, shared, ended.
 *
 * A container is three things: its bytes (ours, or somebody's that we borrow), what the header says
 * (unpacked once), and a count of references. Its state only ever goes forward:
 *   FILLING    made here; blocks are written, then kvl_container_seal makes the table
 *   RECEIVING  the header came from elsewhere; blocks are written and checked against its table,
 *              and the last check seals it
 *   SEALED     nobody writes any more */
#include "segment/container.h"

#include "segment/header.h"
#include "segment/preamble.h"
#include "segment/spare.h"

#include "base/alloc.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <string.h>

enum { FILLING, RECEIVING, SEALED };

/* Counted apart from the container, since checking is no change of a container to its readers. */
typedef struct block_progress {
    _Atomic uint32_t n_left;
    _Atomic uint8_t is_checked[KVL_CONTAINER_LAYERS_MAX];
    _Atomic int state;
} block_progress;

struct kvl_container {
    _Atomic uint32_t n_references;
    kvl_container_info info;
    kvl_container_layout layout;
    kvl_header_message *message; /* owns what info points to */
    block_progress *progress;    /* NULL: sealed from the start */
    const uint8_t *bytes;
    uint8_t *own; /* the same bytes where they are ours, else NULL */
    kvl_spare memory;
    _Atomic bool was_lent;
    void (*release)(void *context);
    void *release_context;
};

bool kvl_container_is_sealed(const kvl_container *container)
{
    return container->progress == NULL || atomic_load(&container->progress->state) == SEALED;
}

/* Ends what was made so far; what is borrowed stays with the caller. */
static void discard(kvl_container *container)
{
    kvl_header_message_free(container->message);
    kvl_spare_give(container->memory, !atomic_load(&container->was_lent));
    kvl_free(container->progress);
    kvl_free(container);
}

static kvl_status container_new(kvl_container **container, kvl_error *error)
{
    *container = kvl_alloc_zero(1, sizeof **container);
    if (*container == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a container");
    atomic_init(&(*container)->n_references, 1);
    return KVL_OK;
}

static kvl_status add_progress(kvl_container *container, int state, kvl_error *error)
{
    container->progress = kvl_alloc_zero(1, sizeof *container->progress);
    if (container->progress == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a container");
    atomic_init(&container->progress->n_left, container->layout.n_blocks);
    atomic_init(&container->progress->state, state);
    return KVL_OK;
}

static kvl_status add_bytes(kvl_container *container, kvl_error *error)
{
    const size_t n_bytes = (size_t)container->layout.n_bytes;
    if (!kvl_spare_take(n_bytes, &container->memory))
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a container of %zu bytes",
                        n_bytes);
    container->own = container->memory.bytes;
    container->bytes = container->own;
    return KVL_OK;
}

/* Used memory is handed out again, and padding must be zero before it leaves the process. */
static void clear_padding(kvl_container *container)
{
    const size_t padding = (size_t)(container->layout.block_stride - container->info.block_bytes);
    for (uint32_t i = 0; i < container->layout.n_blocks; i++) {
        const uint64_t past =
            kvl_layout_block_at(&container->layout, i) + container->info.block_bytes;
        memset(container->own + past, 0, padding);
    }
}

static kvl_status create(const kvl_container_info *info, kvl_container *made, kvl_error *error)
{
    made->info = *info;
    KVL_TRY(kvl_header_layout(info, kvl_header_message_bytes(info), &made->layout, error));
    KVL_TRY(add_bytes(made, error));
    KVL_TRY(add_progress(made, FILLING, error));
    kvl_header_write(info, &made->layout, made->own);
    /* Zeroing pages that the system has just zeroed would touch 16 MiB twice. */
    if (!made->memory.is_zeroed) {
        memset(made->own + made->layout.blocks_at, 0,
               (size_t)(made->layout.n_bytes - made->layout.blocks_at));
    }
    /* Reading our own header back gives the copies of tokens and extra, and shows that a reader
     * will take what was written. */
    kvl_container_layout read;
    const kvl_status status = kvl_header_read(made->own, made->layout.blocks_at, false, &read,
                                              &made->info, &made->message, error);
    KVL_ASSERT(status == KVL_OK || status == KVL_ERR_NO_MEMORY);
    return status;
}

kvl_status kvl_container_create(const kvl_container_info *info, kvl_container **container,
                                kvl_error *error)
{
    *container = NULL;
    KVL_TRY(kvl_header_check(info, KVL_ERR_OUT_OF_RANGE, error));
    KVL_ASSERT(info->n_tokens == 0 || info->tokens != NULL);
    KVL_ASSERT(info->n_extra_bytes == 0 || info->extra != NULL);
    kvl_container *made = NULL;
    KVL_TRY(container_new(&made, error));
    const kvl_status status = create(info, made, error);
    if (status != KVL_OK) {
        discard(made);
        return status;
    }
    *container = made;
    return KVL_OK;
}

void kvl_container_seal(kvl_container *container)
{
    if (kvl_container_is_sealed(container)) return;
    /* A received container is sealed by its last check; here blocks are missing. */
    KVL_ASSERT(atomic_load(&container->progress->state) == FILLING);
    for (uint32_t i = 0; i < container->layout.n_blocks; i++) {
        const uint8_t *block = container->own + kvl_layout_block_at(&container->layout, i);
        kvl_header_set_block_checksum(&container->layout, container->own, i,
                                      kvl_checksum(block, (size_t)container->info.block_bytes));
    }
    kvl_header_finish(&container->layout, container->own);
    atomic_store(&container->progress->state, SEALED);
}

kvl_status kvl_container_from_header(const void *bytes, size_t n_bytes, kvl_container **container,
                                     kvl_error *error)
{
    *container = NULL;
    kvl_container *made = NULL;
    KVL_TRY(container_new(&made, error));
    kvl_status status =
        kvl_header_read(bytes, n_bytes, true, &made->layout, &made->info, &made->message, error);
    if (status == KVL_OK && n_bytes != made->layout.blocks_at) {
        status = KVL_FAIL(error, KVL_ERR_DAMAGED, "container: header of %zu bytes says it has %u",
                          n_bytes, made->layout.blocks_at);
    }
    if (status == KVL_OK) status = add_progress(made, RECEIVING, error);
    if (status == KVL_OK) status = add_bytes(made, error);
    if (status != KVL_OK) {
        discard(made);
        return status;
    }
    memcpy(made->own, bytes, n_bytes);
    clear_padding(made);
    *container = made;
    return KVL_OK;
}

/* Reads the header and compares the length; gives a container without bytes of its own. */
static kvl_status read_whole(const void *bytes, size_t n_bytes, kvl_container **container,
                             kvl_error *error)
{
    kvl_container *made = NULL;
    KVL_TRY(container_new(&made, error));
    kvl_status status =
        kvl_header_read(bytes, n_bytes, true, &made->layout, &made->info, &made->message, error);
    if (status == KVL_OK && n_bytes != made->layout.n_bytes) {
        status = KVL_FAIL(error, KVL_ERR_DAMAGED, "container: %zu bytes came, %" PRIu64 " expected",
                          n_bytes, made->layout.n_bytes);
    }
    if (status != KVL_OK) {
        discard(made);
        return status;
    }
    made->bytes = bytes;
    *container = made;
    return KVL_OK;
}

kvl_status kvl_container_copy(const void *bytes, size_t n_bytes, bool check_blocks,
                              kvl_container **container, kvl_error *error)
{
    *container = NULL;
    kvl_container *made = NULL;
    KVL_TRY(read_whole(bytes, n_bytes, &made, error));
    kvl_status status = add_bytes(made, error);
    if (status == KVL_OK) memcpy(made->own, bytes, made->layout.blocks_at);
    /* Block by block, so that a block is checked while it is still in the cache of the core. */
    const size_t stride = (size_t)made->layout.block_stride;
    for (uint32_t i = 0; status == KVL_OK && i < made->layout.n_blocks; i++) {
        const size_t at = (size_t)kvl_layout_block_at(&made->layout, i);
        memcpy(made->own + at, (const uint8_t *)bytes + at, stride);
        if (check_blocks) status = kvl_container_block_check(made, i, error);
    }
    if (status != KVL_OK) {
        discard(made);
        return status;
    }
    *container = made;
    return KVL_OK;
}

kvl_status kvl_container_from_bytes(const void *bytes, size_t n_bytes, kvl_container **container,
                                    kvl_error *error)
{
    return kvl_container_copy(bytes, n_bytes, true, container, error);
}

kvl_status kvl_container_borrow(const void *bytes, size_t n_bytes, void (*release)(void *context),
                                void *context, kvl_container **container, kvl_error *error)
{
    *container = NULL;
    KVL_TRY(read_whole(bytes, n_bytes, container, error));
    (*container)->release = release;
    (*container)->release_context = context;
    return KVL_OK;
}

void kvl_container_share(kvl_container *container)
{
    const uint32_t before =
        atomic_fetch_add_explicit(&container->n_references, 1, memory_order_relaxed);
    KVL_ASSERT(before > 0 && before < UINT32_MAX);
}

void kvl_container_release(kvl_container *container)
{
    if (container == NULL) return;
    const uint32_t before =
        atomic_fetch_sub_explicit(&container->n_references, 1, memory_order_acq_rel);
    KVL_ASSERT(before > 0);
    if (before > 1) return;
    void (*release)(void *context) = container->release;
    void *context = container->release_context;
    discard(container);
    if (release != NULL) release(context);
}

uint32_t kvl_container_n_references(const kvl_container *container)
{
    return atomic_load_explicit(&container->n_references, memory_order_acquire);
}

int kvl_container_lend(kvl_container *container)
{
    if (container->own == NULL || container->memory.fd < 0) return -1;
    atomic_store(&container->was_lent, true);
    return container->memory.fd;
}

const kvl_container_info *kvl_container_info_of(const kvl_container *container)
{
    return &container->info;
}

const void *kvl_container_header(const kvl_container *container, size_t *n_bytes)
{
    KVL_ASSERT(container->progress == NULL || atomic_load(&container->progress->state) != FILLING);
    *n_bytes = container->layout.blocks_at;
    return container->bytes;
}

const void *kvl_container_bytes(const kvl_container *container, size_t *n_bytes)
{
    KVL_ASSERT(kvl_container_is_sealed(container));
    *n_bytes = (size_t)container->layout.n_bytes;
    return container->bytes;
}

uint64_t kvl_container_n_bytes(const kvl_container *container)
{
    return container->layout.n_bytes;
}

uint32_t kvl_container_n_blocks(const kvl_container *container)
{
    return container->layout.n_blocks;
}

void *kvl_container_block(kvl_container *container, uint32_t block, size_t *n_bytes)
{
    KVL_ASSERT(!kvl_container_is_sealed(container));
    *n_bytes = (size_t)container->info.block_bytes;
    return container->own + kvl_layout_block_at(&container->layout, block);
}

const void *kvl_container_block_view(const kvl_container *container, uint32_t block,
                                     size_t *n_bytes)
{
    *n_bytes = (size_t)container->info.block_bytes;
    return container->bytes + kvl_layout_block_at(&container->layout, block);
}

/* A block of a received container passed; the last one seals it. Passing twice counts once. */
static void note_checked(block_progress *progress, uint32_t block)
{
    if (atomic_exchange(&progress->is_checked[block], 1) != 0) return;
    if (atomic_fetch_sub(&progress->n_left, 1) == 1) atomic_store(&progress->state, SEALED);
}

kvl_status kvl_container_block_check(const kvl_container *container, uint32_t block,
                                     kvl_error *error)
{
    const block_progress *progress = container->progress;
    KVL_ASSERT(progress == NULL || atomic_load(&progress->state) != FILLING);
    size_t n_bytes = 0;
    const void *bytes = kvl_container_block_view(container, block, &n_bytes);
    return kvl_container_block_accept(container, block, kvl_checksum(bytes, n_bytes), error);
}

kvl_status kvl_container_block_accept(const kvl_container *container, uint32_t block,
                                      uint64_t actual, kvl_error *error)
{
    block_progress *progress = container->progress;
    KVL_ASSERT(progress == NULL || atomic_load(&progress->state) != FILLING);
    const kvl_container_layout *layout = &container->layout;
    const size_t n_bytes = (size_t)container->info.block_bytes;
    const uint8_t *bytes = container->bytes + kvl_layout_block_at(layout, block);
    const uint64_t expected = kvl_header_block_checksum(layout, container->bytes, block);
    if (actual != expected) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED,
                        "container: checksum of block %u is %016" PRIx64 ", must be %016" PRIx64,
                        block, actual, expected);
    }
    if (!kvl_bytes_are_zero(bytes + n_bytes, (size_t)layout->block_stride - n_bytes))
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "container: padding of block %u is not zero",
                        block);
    if (progress != NULL) note_checked(progress, block);
    return KVL_OK;
}
