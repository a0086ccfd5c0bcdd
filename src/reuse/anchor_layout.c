/* reuse/anchor_layout.c: writes and checks the bytes of an anchor. */
#include "reuse/anchor_layout.h"

#include "base/alloc.h"
#include "segment/codec.h"

#include <math.h>
#include <string.h>

static const float int8_max = 127.0F;

static void put_u32(uint8_t *bytes, uint32_t value)
{
    for (int i = 0; i < 4; i++) bytes[i] = (uint8_t)(value >> (8 * i));
}

static uint32_t get_u32(const uint8_t *bytes)
{
    uint32_t value = 0;
    for (int i = 0; i < 4; i++) value |= (uint32_t)bytes[i] << (8 * i);
    return value;
}

void kvl_anchor_extra_encode(const kvl_anchor_extra *extra, uint8_t *bytes)
{
    memcpy(bytes, extra->slot.template_id.bytes, KVL_DIGEST_BYTES);
    put_u32(bytes + 32, KVL_ANCHOR_LAYOUT_VERSION);
    put_u32(bytes + 36, extra->slot.slot);
    memcpy(bytes + 40, extra->base_id.bytes, KVL_DIGEST_BYTES);
    put_u32(bytes + 72, extra->n_tokens);
    put_u32(bytes + 76, extra->n_after);
    put_u32(bytes + 80, extra->base_stride);
    put_u32(bytes + 84, extra->base_keys ? 1 : 0);
    put_u32(bytes + 88, 0);
}

/* The caller has checked the length and the version. */
static bool extra_decode(const uint8_t *bytes, kvl_anchor_extra *extra)
{
    memcpy(extra->slot.template_id.bytes, bytes, KVL_DIGEST_BYTES);
    extra->slot.slot = get_u32(bytes + 36);
    memcpy(extra->base_id.bytes, bytes + 40, KVL_DIGEST_BYTES);
    extra->n_tokens = get_u32(bytes + 72);
    extra->n_after = get_u32(bytes + 76);
    extra->base_stride = get_u32(bytes + 80);
    extra->base_keys = get_u32(bytes + 84) == 1;
    return get_u32(bytes + 84) <= 1 && get_u32(bytes + 88) == 0;
}

kvl_digest kvl_anchor_id(const kvl_digest *fingerprint, const kvl_anchor_extra *extra,
                         const kvl_anchor_layout *layout)
{
    /* The shape follows from the model and the text; it is here so that a header which contradicts
     * itself has a wrong id. */
    kvl_digester digester;
    kvl_digester_init(&digester, "kvloom anchor", 13);
    kvl_digester_add(&digester, fingerprint->bytes, KVL_DIGEST_BYTES);
    kvl_digester_add(&digester, extra->slot.template_id.bytes, KVL_DIGEST_BYTES);
    kvl_digester_add_u64(&digester, extra->slot.slot);
    kvl_digester_add(&digester, extra->base_id.bytes, KVL_DIGEST_BYTES);
    kvl_digester_add_u64(&digester, extra->n_tokens);
    kvl_digester_add_u64(&digester, extra->n_after);
    kvl_digester_add_u64(&digester, KVL_ANCHOR_LAYOUT_VERSION);
    kvl_digester_add_u64(&digester, extra->base_stride);
    kvl_digester_add_u64(&digester, extra->base_keys ? 1 : 0);
    kvl_digester_add_u64(&digester, (uint64_t)layout->dtype);
    kvl_digester_add_u64(&digester, layout->n_layers);
    kvl_digester_add_u64(&digester, layout->n_kv_heads);
    kvl_digester_add_u64(&digester, layout->head_dim);
    return kvl_digester_end(&digester);
}

/* Adds n_bytes, rounded up to 64, to *end. */
static bool advance(size_t n_bytes, size_t *end)
{
    size_t padded;
    if (!kvl_size_add(n_bytes, KVL_ALIGNMENT - 1, &padded)) return false;
    return kvl_size_add(*end, padded / KVL_ALIGNMENT * KVL_ALIGNMENT, end);
}

/* Gives a section its place: numbers, then scales or the second plane. */
static bool place_section(kvl_anchor_layout *layout, kvl_anchor_section section, size_t n_rows,
                          size_t n_groups, size_t *end)
{
    const bool int8 = layout->dtype == KVL_KV_INT8;
    size_t groups, numbers, number_bytes, second_bytes;
    if (!kvl_size_mul(n_rows, n_groups, &groups) ||
        !kvl_size_mul(groups, layout->head_dim, &numbers) ||
        !kvl_size_mul(numbers, int8 ? 1 : sizeof(float), &number_bytes)) {
        return false;
    }
    if (int8) {
        if (!kvl_size_mul(groups, sizeof(uint16_t), &second_bytes)) return false;
    } else {
        second_bytes = section == KVL_ANCHOR_BASE ? 0 : number_bytes;
    }
    layout->at[section] = *end;
    if (!advance(number_bytes, end)) return false;
    layout->scales_at[section] = *end;
    return advance(second_bytes, end);
}

bool kvl_anchor_layout_fill(kvl_anchor_layout *layout)
{
    const uint32_t stride = layout->base_stride;
    const uint32_t heads = layout->n_kv_heads;
    if (layout->dtype != KVL_KV_INT8 && layout->dtype != KVL_KV_F32) return false;
    if (stride != 1 && stride != KVL_ANCHOR_DISTANCE_STRIDE) return false;
    if (layout->n_layers == 0 || layout->n_layers > KVL_ANCHOR_LAYERS_MAX) return false;
    if (heads == 0 || heads > KVL_ANCHOR_HEADS_MAX) return false;
    if (layout->head_dim == 0 || layout->head_dim > KVL_HEAD_DIM_MAX) return false;
    if (layout->n_tokens == 0 || layout->n_tokens > KVL_SEGMENT_TOKENS_MAX) return false;
    if (layout->n_after > KVL_SEGMENT_TOKENS_MAX) return false;

    const uint32_t first = kvl_anchor_first_layer(layout->n_layers, stride);
    layout->n_base_layers = (layout->n_layers - first + stride - 1) / stride;
    layout->base_groups = layout->n_base_layers * heads * (layout->base_keys ? 2 : 1);
    layout->base_rows = (layout->n_tokens + layout->n_layers - 1) / layout->n_layers;

    /* Every product and sum is checked, since the sizes may come from a peer's header; the total is
     * held below what a container may have before anything of it is read. */
    size_t end = 0;
    const bool fits =
        place_section(layout, KVL_ANCHOR_SLOT_KEYS, layout->n_tokens, heads, &end) &&
        place_section(layout, KVL_ANCHOR_SLOT_VALUES, layout->n_tokens, heads, &end) &&
        place_section(layout, KVL_ANCHOR_AFTER_KEYS, layout->n_after, heads, &end) &&
        place_section(layout, KVL_ANCHOR_AFTER_VALUES, layout->n_after, heads, &end) &&
        place_section(layout, KVL_ANCHOR_BASE, layout->base_rows, layout->base_groups, &end);
    layout->block_bytes = end;
    return fits && end <= KVL_CONTAINER_BYTES_MAX / layout->n_layers;
}

kvl_anchor_rows kvl_anchor_section_rows(const kvl_anchor_layout *layout, const uint8_t *block,
                                        kvl_anchor_section section)
{
    return (kvl_anchor_rows){
        .dtype = layout->dtype,
        .numbers = block + layout->at[section],
        .scales = block + layout->scales_at[section],
    };
}

/* Rows and groups of a section. */
static size_t section_groups(const kvl_anchor_layout *layout, kvl_anchor_section section)
{
    if (section == KVL_ANCHOR_BASE) return (size_t)layout->base_rows * layout->base_groups;
    const bool after = section == KVL_ANCHOR_AFTER_KEYS || section == KVL_ANCHOR_AFTER_VALUES;
    return (size_t)(after ? layout->n_after : layout->n_tokens) * layout->n_kv_heads;
}

/* Size of the largest of n numbers, by its bits: as integers, the bits of numbers without their
 * sign are ordered as the numbers are, with infinity and NaN on top. */
static float largest_of(uint32_t n, const float *x)
{
    uint32_t largest = 0;
    for (uint32_t d = 0; d < n; d++) {
        uint32_t bits;
        memcpy(&bits, &x[d], sizeof bits);
        bits &= 0x7fffffffU;
        largest = bits > largest ? bits : largest;
    }
    float size;
    memcpy(&size, &largest, sizeof size);
    return size;
}

/* The nearest integer of a number within 127, ties to even, as int8: in 1.5 * 2^23 + x the integer
 * stands in the last bits of the float. */
static uint8_t round_int8(float x)
{
    const float low = x < -int8_max ? -int8_max : x;
    const float shifted = (low > int8_max ? int8_max : low) + 0x1.8p23F;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return (uint8_t)(bits & 0xffU);
}

/* One group of int8. The scale is rounded to float16 first and the numbers are measured with the
 * rounded one, so that its rounding is not added to theirs. */
static void write_group_int8(uint32_t dim, float largest, const float *x, uint8_t *numbers,
                             uint8_t *scale_bytes)
{
    float scale = largest / int8_max;
    uint16_t half;
    kvl_f16_from_f32(1, &scale, &half);
    kvl_f32_from_f16(1, &half, &scale);
    memcpy(scale_bytes, &half, sizeof half);
    const float inverse = scale > 0.0F ? 1.0F / scale : 0.0F;
    for (uint32_t d = 0; d < dim; d++) numbers[d] = round_int8(x[d] * inverse);
}

/* What x = real - base lost to rounding, exactly (Knuth, TAOCP volume 2, section 4.2.2, theorem B).
 * With it an exact hit gives back the very bits that were measured. */
static void write_rest(uint32_t dim, const float *real, const float *base, const float *x,
                       uint8_t *bytes)
{
    for (uint32_t d = 0; d < dim; d++) {
        const float back = x[d] - real[d];
        const float rest = (real[d] - (x[d] - back)) - (base[d] + back);
        memcpy(bytes + d * sizeof rest, &rest, sizeof rest);
    }
}

/* One group of offsets real - base (base NULL: of real itself), at a group index of a section. */
static bool write_group(const kvl_anchor_layout *layout, kvl_anchor_section section, size_t group,
                        const float *real, const float *base, uint8_t *block)
{
    const uint32_t dim = layout->head_dim;
    float x[KVL_HEAD_DIM_MAX];
    if (base == NULL) {
        memcpy(x, real, dim * sizeof *x);
    } else {
        for (uint32_t d = 0; d < dim; d++) x[d] = real[d] - base[d];
    }
    const float largest = largest_of(dim, x);
    if (!(largest <= KVL_ANCHOR_MAGNITUDE_MAX)) return false;
    uint8_t *numbers = block + layout->at[section];
    uint8_t *second = block + layout->scales_at[section];
    if (layout->dtype == KVL_KV_INT8) {
        write_group_int8(dim, largest, x, numbers + group * dim, second + 2 * group);
        return true;
    }
    memcpy(numbers + group * dim * sizeof *x, x, dim * sizeof *x);
    if (base != NULL) write_rest(dim, real, base, x, second + group * dim * sizeof *x);
    return true;
}

/* Offsets of one run of tokens of one layer, [n_rows][n_heads][dim]. */
static bool write_offsets(const kvl_anchor_layout *layout, kvl_anchor_section section,
                          uint32_t n_rows, const float *real, const float *base, uint8_t *block)
{
    const size_t n_groups = (size_t)n_rows * layout->n_kv_heads;
    for (size_t g = 0; g < n_groups; g++) {
        const size_t at = g * layout->head_dim;
        if (!write_group(layout, section, g, real + at, base + at, block)) return false;
    }
    return true;
}

/* The base row of one token: groups from `group` on, of all kept layers of keys or values. */
static bool write_base_row(const kvl_anchor_layout *layout, const float *all_layers, uint32_t token,
                           size_t group, uint8_t *block)
{
    const uint32_t stride = layout->base_stride;
    const size_t width = (size_t)layout->n_kv_heads * layout->head_dim;
    uint32_t layer = kvl_anchor_first_layer(layout->n_layers, stride);
    for (; layer < layout->n_layers; layer += stride) {
        const float *row = all_layers + ((size_t)layer * layout->n_tokens + token) * width;
        for (uint32_t h = 0; h < layout->n_kv_heads; h++, group++) {
            const float *head = row + (size_t)h * layout->head_dim;
            if (!write_group(layout, KVL_ANCHOR_BASE, group, head, NULL, block)) return false;
        }
    }
    return true;
}

static bool write_base(const kvl_anchor_layout *layout, uint32_t block_index,
                       const kvl_kv_view *base, uint8_t *block)
{
    for (uint32_t row = 0; row < layout->base_rows; row++) {
        const size_t token = (size_t)block_index * layout->base_rows + row;
        if (token >= layout->n_tokens) break;
        size_t group = (size_t)row * layout->base_groups;
        if (!write_base_row(layout, base->values, (uint32_t)token, group, block)) return false;
        if (!layout->base_keys) continue;
        group += (size_t)layout->n_base_layers * layout->n_kv_heads;
        if (!write_base_row(layout, base->keys, (uint32_t)token, group, block)) return false;
    }
    return true;
}

bool kvl_anchor_block_fill(const kvl_anchor_layout *layout, uint32_t layer, const kvl_kv_view *base,
                           const kvl_kv_view *real, const kvl_kv_view *after_base,
                           const kvl_kv_view *after_real, uint8_t *block)
{
    if (!write_base(layout, layer, base, block)) return false;
    if (layer == 0) return true; /* the container is zeroed, and so are the offsets of layer 0 */
    const size_t width = (size_t)layout->n_kv_heads * layout->head_dim;
    const size_t at = (size_t)layer * layout->n_tokens * width;
    if (!write_offsets(layout, KVL_ANCHOR_SLOT_KEYS, layout->n_tokens, real->keys + at,
                       base->keys + at, block) ||
        !write_offsets(layout, KVL_ANCHOR_SLOT_VALUES, layout->n_tokens, real->values + at,
                       base->values + at, block)) {
        return false;
    }
    if (layout->n_after == 0) return true;
    const size_t after_at = (size_t)layer * layout->n_after * width;
    return write_offsets(layout, KVL_ANCHOR_AFTER_KEYS, layout->n_after,
                         after_real->keys + after_at, after_base->keys + after_at, block) &&
           write_offsets(layout, KVL_ANCHOR_AFTER_VALUES, layout->n_after,
                         after_real->values + after_at, after_base->values + after_at, block);
}

static bool scales_are_sane(const uint8_t *scales, size_t n)
{
    /* Up to the scale that the writer gives to the largest number; also refuses a set sign,
     * infinity and NaN, whose bits are larger than any such number's. */
    const float limit = KVL_ANCHOR_MAGNITUDE_MAX / int8_max;
    uint16_t half_limit;
    kvl_f16_from_f32(1, &limit, &half_limit);
    bool sane = true;
    for (size_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, scales + 2 * i, sizeof half);
        sane = sane && half <= half_limit;
    }
    return sane;
}

static bool floats_are_sane(const uint8_t *numbers, size_t n)
{
    bool sane = true;
    for (size_t i = 0; i < n; i++) {
        float number;
        memcpy(&number, numbers + i * sizeof number, sizeof number);
        sane = sane && fabsf(number) <= KVL_ANCHOR_MAGNITUDE_MAX;
    }
    return sane;
}

static bool block_is_sane(const kvl_anchor_layout *layout, const uint8_t *block)
{
    for (kvl_anchor_section s = 0; s < KVL_ANCHOR_SECTIONS; s++) {
        const size_t groups = section_groups(layout, s);
        const uint8_t *second = block + layout->scales_at[s];
        if (layout->dtype == KVL_KV_INT8) {
            if (!scales_are_sane(second, groups)) return false;
            continue;
        }
        const size_t n = groups * layout->head_dim;
        if (!floats_are_sane(block + layout->at[s], n)) return false;
        if (s != KVL_ANCHOR_BASE && !floats_are_sane(second, n)) return false;
    }
    return true;
}

static kvl_status check_blocks(const kvl_container *container, const kvl_anchor_layout *layout,
                               kvl_error *error)
{
    for (uint32_t l = 0; l < layout->n_layers; l++) {
        KVL_TRY(kvl_container_block_check(container, l, error));
        size_t n_bytes = 0;
        const uint8_t *block = kvl_container_block_view(container, l, &n_bytes);
        if (block == NULL || n_bytes < layout->block_bytes) {
            return KVL_FAIL(error, KVL_ERR_DAMAGED,
                            "anchor: block %u has %zu bytes, needs %zu; measure it again", l,
                            n_bytes, layout->block_bytes);
        }
        if (!block_is_sane(layout, block)) {
            return KVL_FAIL(error, KVL_ERR_DAMAGED,
                            "anchor: block %u holds numbers that no KV has; measure it again", l);
        }
    }
    return KVL_OK;
}

/* kind, model, length and version of the extra: what must hold before the extra is read. */
static kvl_status check_header(const kvl_digest *fingerprint, const kvl_container_info *info,
                               kvl_error *error)
{
    if (info->kind != KVL_CONTAINER_ANCHOR) {
        return KVL_FAIL(error, KVL_ERR_FOREIGN, "container kind is %d, must be an anchor (%d)",
                        (int)info->kind, (int)KVL_CONTAINER_ANCHOR);
    }
    if (!kvl_digest_equal(fingerprint, &info->fingerprint)) {
        char theirs[KVL_DIGEST_TEXT_BYTES], ours[KVL_DIGEST_TEXT_BYTES];
        return KVL_FAIL(error, KVL_ERR_FOREIGN, "anchor is of model %.16s, this host serves %.16s",
                        kvl_digest_to_text(&info->fingerprint, theirs),
                        kvl_digest_to_text(fingerprint, ours));
    }
    if (info->n_extra_bytes < KVL_DIGEST_BYTES + 4 || info->extra == NULL) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "anchor: extra has %zu bytes, must have %u",
                        info->n_extra_bytes, KVL_ANCHOR_EXTRA_BYTES);
    }
    const uint32_t version = get_u32((const uint8_t *)info->extra + KVL_DIGEST_BYTES);
    if (version != KVL_ANCHOR_LAYOUT_VERSION) {
        return KVL_FAIL(error, KVL_ERR_FOREIGN, "anchor: layout version is %u, this host reads %u",
                        version, KVL_ANCHOR_LAYOUT_VERSION);
    }
    if (info->n_extra_bytes != KVL_ANCHOR_EXTRA_BYTES) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "anchor: extra has %zu bytes, must have %u",
                        info->n_extra_bytes, KVL_ANCHOR_EXTRA_BYTES);
    }
    return KVL_OK;
}

kvl_status kvl_anchor_container_check(const kvl_digest *fingerprint, const kvl_container *container,
                                      kvl_anchor_extra *extra, kvl_anchor_layout *layout,
                                      kvl_error *error)
{
    const kvl_container_info *info = kvl_container_info_of(container);
    KVL_TRY(check_header(fingerprint, info, error));
    if (!extra_decode(info->extra, extra)) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "anchor: extra has a flag that is not 0 or 1");
    }
    *layout = (kvl_anchor_layout){
        .dtype = info->dtype,
        .n_layers = info->n_layers,
        .n_kv_heads = info->n_kv_heads,
        .head_dim = info->head_dim,
        .n_tokens = extra->n_tokens,
        .n_after = extra->n_after,
        .base_stride = extra->base_stride,
        .base_keys = extra->base_keys,
    };
    if (!kvl_anchor_layout_fill(layout)) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED,
                        "anchor: shape %u layers, %u heads of %u, %u and %u tokens, dtype %d, "
                        "stride %u is not possible",
                        info->n_layers, info->n_kv_heads, info->head_dim, extra->n_tokens,
                        extra->n_after, (int)info->dtype, extra->base_stride);
    }
    if (info->block_bytes != layout->block_bytes ||
        kvl_container_n_blocks(container) != layout->n_layers) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "anchor: blocks have %llu bytes, must have %zu",
                        (unsigned long long)info->block_bytes, layout->block_bytes);
    }
    /* The id was announced and asked for; an anchor under another's id would replace it. */
    const kvl_digest id = kvl_anchor_id(fingerprint, extra, layout);
    if (!kvl_digest_equal(&id, &info->id)) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "anchor: its id does not fit its slot and base");
    }
    return check_blocks(container, layout, error);
}
