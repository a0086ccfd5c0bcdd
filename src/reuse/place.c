/* reuse/place.c: rotate, then write; read, then rotate backwards.
 * Method  Backend operations run one at a time, so a container's layers go in waves: threads decode
 *         and rotate as many layers as the scratch holds, then the calling thread writes them. */
#include "reuse/place.h"

#include "base/alloc.h"
#include "segment/codec.h"

#include <string.h>

bool kvl_place_floats(const kvl_pages *pages, uint32_t n_tokens, size_t *n_floats)
{
    size_t heads;
    return kvl_size_mul(n_tokens, pages->n_kv_heads, &heads) &&
           kvl_size_mul(heads, pages->head_dim, n_floats);
}

/* How long a prompt is comes from outside, so a position past the table is an error. A slot past
 * the pages would be our own mistake, yet it would write into foreign memory: looked at as well. */
static kvl_status check_tokens(const kvl_place_target *target, const kvl_place_tokens_view *tokens,
                               kvl_error *error)
{
    const uint64_t n_slots = (uint64_t)target->pages->n_pages * KVL_PAGE_TOKENS;
    for (uint32_t i = 0; i < tokens->n_tokens; i++) {
        if (tokens->positions[i] >= target->rotation->n_positions) {
            return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                            "position %u is past the model's %u; shorten the prompt",
                            tokens->positions[i], target->rotation->n_positions);
        }
        if (tokens->slots[i] >= n_slots) {
            return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "slot %u is past the page pool's %llu",
                            tokens->slots[i], (unsigned long long)n_slots);
        }
    }
    return KVL_OK;
}

static void rotate(const kvl_place_target *target, const kvl_place_tokens_view *tokens,
                   bool backwards, float *keys)
{
    const kvl_pages *pages = target->pages;
    kvl_rotate_rows(target->rotation, tokens->n_tokens, tokens->positions, pages->n_kv_heads,
                    pages->head_dim, (size_t)pages->n_kv_heads * pages->head_dim, backwards, keys);
}

static void write_layer(const kvl_place_target *target, uint32_t layer,
                        const kvl_place_tokens_view *tokens, const float *rotated,
                        const float *values)
{
    target->backend->ops->pages_write(target->backend, target->pages, layer, tokens->n_tokens,
                                      tokens->slots, rotated, values);
}

kvl_status kvl_place_tokens(const kvl_place_target *target, uint32_t layer,
                            const kvl_place_tokens_view *tokens, const float *keys,
                            const float *values, float *scratch, kvl_error *error)
{
    KVL_ASSERT(layer < target->pages->n_layers);
    size_t n_floats;
    KVL_ASSERT(kvl_place_floats(target->pages, tokens->n_tokens, &n_floats));
    KVL_TRY(check_tokens(target, tokens, error));
    if (n_floats == 0) return KVL_OK;
    /* A copy: the same stored keys may go to several places, and rotating back would round. */
    memcpy(scratch, keys, n_floats * sizeof *keys);
    target->backend->ops->rotate(target->backend, target->rotation, tokens->n_tokens,
                                 tokens->positions, target->pages->n_kv_heads,
                                 target->pages->head_dim, scratch);
    write_layer(target, layer, tokens, scratch, values);
    return KVL_OK;
}

kvl_status kvl_extract_tokens(const kvl_place_target *target, uint32_t layer,
                              const kvl_place_tokens_view *tokens, float *keys, float *values,
                              kvl_error *error)
{
    KVL_ASSERT(layer < target->pages->n_layers);
    KVL_TRY(check_tokens(target, tokens, error));
    if (tokens->n_tokens == 0) return KVL_OK;
    target->backend->ops->pages_read(target->backend, target->pages, layer, tokens->n_tokens,
                                     tokens->slots, keys, values);
    rotate(target, tokens, true, keys);
    return KVL_OK;
}

/* Layers of one wave: prepared by threads, each in its own part of the scratch. */
typedef struct layer_wave {
    const kvl_place_target *target;
    const kvl_container *container;
    const kvl_place_tokens_view *tokens;
    const kvl_place_options *options;
    size_t n_floats; /* of one layer's keys */
    uint32_t layer_first;
    kvl_status *statuses; /* [layers at once] */
} layer_wave;

static float *wave_keys(const layer_wave *wave, size_t item)
{
    return wave->options->scratch + 2 * item * wave->n_floats;
}

static void prepare_layer(void *context, size_t item, size_t thread)
{
    (void)thread;
    const layer_wave *w = context;
    const kvl_container_info *info = kvl_container_info_of(w->container);
    const uint32_t layer = w->layer_first + (uint32_t)item;
    w->statuses[item] =
        w->options->blocks_checked ? KVL_OK : kvl_container_block_check(w->container, layer, NULL);
    if (w->statuses[item] < 0) return;
    size_t n_bytes = 0;
    const void *block = kvl_container_block_view(w->container, layer, &n_bytes);
    float *keys = wave_keys(w, item);
    kvl_segment_decode_block(info->dtype, info->n_kv_heads, info->n_tokens, info->head_dim, block,
                             w->options->token_first, w->tokens->n_tokens, keys,
                             keys + w->n_floats);
    rotate(w->target, w->tokens, false, keys);
}

static kvl_status check_container(const kvl_pages *pages, const kvl_container_info *info,
                                  const kvl_place_tokens_view *tokens, uint32_t token_first,
                                  kvl_error *error)
{
    if (info->kind != KVL_CONTAINER_SEGMENT) {
        return KVL_FAIL(error, KVL_ERR_FOREIGN, "container kind is %d, must be a segment (%d)",
                        (int)info->kind, (int)KVL_CONTAINER_SEGMENT);
    }
    if (info->n_layers != pages->n_layers || info->n_kv_heads != pages->n_kv_heads ||
        info->head_dim != pages->head_dim) {
        return KVL_FAIL(error, KVL_ERR_FOREIGN,
                        "segment has %u layers, %u heads of %u; the model has %u, %u of %u",
                        info->n_layers, info->n_kv_heads, info->head_dim, pages->n_layers,
                        pages->n_kv_heads, pages->head_dim);
    }
    uint64_t n_bytes;
    if (!kvl_segment_block_bytes(info->dtype, info->n_kv_heads, info->n_tokens, info->head_dim,
                                 &n_bytes) ||
        n_bytes != info->block_bytes) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED,
                        "segment: blocks have %llu bytes, not what %u "
                        "tokens need",
                        (unsigned long long)info->block_bytes, info->n_tokens);
    }
    if (token_first > info->n_tokens || tokens->n_tokens > info->n_tokens - token_first) {
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "tokens %u and %u more are past the segment's %u", token_first,
                        tokens->n_tokens, info->n_tokens);
    }
    return KVL_OK;
}

/* ---- one layer, without the backend ---- */

bool kvl_place_layer_floats(const kvl_pages *pages, size_t *n_floats)
{
    size_t one;
    return kvl_place_floats(pages, KVL_PAGE_TOKENS, &one) && kvl_size_mul(one, 2, n_floats);
}

/* Tokens [n] of one page, all heads: keys go dimension by dimension, values as rows (pages.h). */
static void write_page(const kvl_pages *pages, uint32_t layer, uint32_t slot, uint32_t n,
                       const float *keys, const float *values)
{
    const uint32_t page = slot / KVL_PAGE_TOKENS;
    const uint32_t index = slot % KVL_PAGE_TOKENS;
    const size_t row = (size_t)pages->n_kv_heads * pages->head_dim;
    for (uint32_t h = 0; h < pages->n_kv_heads; h++) {
        const float *from = keys + (size_t)h * pages->head_dim;
        float *to = kvl_pages_keys(pages, layer, page, h) + index;
        for (uint32_t d = 0; d < pages->head_dim; d++) {
            for (uint32_t t = 0; t < n; t++) to[d * KVL_PAGE_TOKENS + t] = from[t * row + d];
        }
        from = values + (size_t)h * pages->head_dim;
        to = kvl_pages_values(pages, layer, page, h) + (size_t)index * pages->head_dim;
        for (uint32_t t = 0; t < n; t++)
            memcpy(to + (size_t)t * pages->head_dim, from + t * row, pages->head_dim * sizeof *to);
    }
}

/* How many tokens from i on stand side by side in one page. */
static uint32_t count_in_page(const kvl_place_tokens_view *tokens, uint32_t i)
{
    const uint32_t room = KVL_PAGE_TOKENS - tokens->slots[i] % KVL_PAGE_TOKENS;
    uint32_t n = 1;
    while (n < room && i + n < tokens->n_tokens && tokens->slots[i + n] == tokens->slots[i] + n)
        n++;
    return n;
}

kvl_status kvl_place_check(const kvl_place_target *target, const kvl_container *container,
                           const kvl_place_tokens_view *tokens, uint32_t token_first,
                           kvl_error *error)
{
    KVL_TRY(check_container(target->pages, kvl_container_info_of(container), tokens, token_first,
                            error));
    return check_tokens(target, tokens, error);
}

kvl_status kvl_place_layer(const kvl_place_target *target, const kvl_container *container,
                           uint32_t layer, const kvl_place_tokens_view *tokens,
                           uint32_t token_first, float *scratch, kvl_error *error)
{
    return kvl_place_layer_moved(target, container, layer, tokens, token_first, NULL, scratch,
                                 error);
}

kvl_status kvl_place_layer_moved(const kvl_place_target *target, const kvl_container *container,
                                 uint32_t layer, const kvl_place_tokens_view *tokens,
                                 uint32_t token_first, const kvl_mean *mean, float *scratch,
                                 kvl_error *error)
{
    const kvl_container_info *info = kvl_container_info_of(container);
    const kvl_pages *pages = target->pages;
    KVL_TRY(kvl_place_check(target, container, tokens, token_first, error));
    KVL_ASSERT(layer < pages->n_layers);
    size_t n_floats, n_bytes;
    KVL_ASSERT(kvl_place_floats(pages, KVL_PAGE_TOKENS, &n_floats));
    float *values = scratch + n_floats;
    const void *block = kvl_container_block_view(container, layer, &n_bytes);
    for (uint32_t i = 0; i < tokens->n_tokens;) {
        const uint32_t n = count_in_page(tokens, i);
        const kvl_place_tokens_view run = {n, tokens->positions + i, NULL};
        kvl_segment_decode_block(info->dtype, info->n_kv_heads, info->n_tokens, info->head_dim,
                                 block, token_first + i, n, scratch, values);
        if (mean != NULL) kvl_mean_apply(mean, layer, token_first + i, n, scratch, values);
        rotate(target, &run, false, scratch);
        write_page(pages, layer, tokens->slots[i], n, scratch, values);
        i += n;
    }
    return KVL_OK;
}

enum { LAYERS_AT_ONCE_MAX = 64 };

/* Prepares and writes layers layer_first .. + n - 1. */
static kvl_status run_wave(layer_wave *wave, size_t n, kvl_error *error)
{
    if (wave->options->threads != NULL) {
        kvl_pool_run(wave->options->threads, prepare_layer, wave, n);
    } else {
        for (size_t item = 0; item < n; item++) prepare_layer(wave, item, 0);
    }
    /* All of a wave are looked at before any is written. */
    for (size_t item = 0; item < n; item++) {
        if (wave->statuses[item] < 0) {
            return KVL_FAIL(error, wave->statuses[item],
                            "segment: the block of layer %u is damaged; fetch it again or compute "
                            "the part",
                            wave->layer_first + (uint32_t)item);
        }
    }
    for (size_t item = 0; item < n; item++) {
        const float *keys = wave_keys(wave, item);
        write_layer(wave->target, wave->layer_first + (uint32_t)item, wave->tokens, keys,
                    keys + wave->n_floats);
    }
    return KVL_OK;
}

kvl_status kvl_place_container(const kvl_place_target *target, const kvl_container *container,
                               const kvl_place_tokens_view *tokens,
                               const kvl_place_options *options, kvl_error *error)
{
    const kvl_container_info *info = kvl_container_info_of(container);
    KVL_TRY(check_container(target->pages, info, tokens, options->token_first, error));
    KVL_TRY(check_tokens(target, tokens, error));
    if (tokens->n_tokens == 0) return KVL_OK;

    kvl_status statuses[LAYERS_AT_ONCE_MAX];
    layer_wave wave = {.target = target,
                       .container = container,
                       .tokens = tokens,
                       .options = options,
                       .statuses = statuses};
    KVL_ASSERT(kvl_place_floats(target->pages, tokens->n_tokens, &wave.n_floats));
    size_t at_once = options->n_scratch_floats / 2 / wave.n_floats;
    KVL_ASSERT(at_once > 0);
    if (at_once > LAYERS_AT_ONCE_MAX) at_once = LAYERS_AT_ONCE_MAX;
    while (wave.layer_first < info->n_layers) {
        const size_t left = info->n_layers - wave.layer_first;
        const size_t n = left < at_once ? left : at_once;
        KVL_TRY(run_wave(&wave, n, error));
        wave.layer_first += (uint32_t)n;
    }
    return KVL_OK;
}
