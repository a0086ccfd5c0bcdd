/* reuse_anchor_case.h: KV of random shapes, and a slot with its text, for the tests of anchors.
 * Include it after cmocka.h. */
#ifndef KVL_REUSE_ANCHOR_CASE_H
#define KVL_REUSE_ANCHOR_CASE_H

#include "base/alloc.h"
#include "reuse/anchor.h"
#include "test_random.h"

#include <string.h>

/* KV that the test owns. */
typedef struct kv {
    kvl_kv_view view; /* points to the two below */
    float *keys, *values;
    size_t n;
} kv;

static inline size_t kv_row(const kvl_kv_view *view)
{
    return (size_t)view->n_kv_heads * view->head_dim;
}

static inline kv kv_zero(uint32_t n_layers, uint32_t n_tokens, uint32_t n_heads, uint32_t dim)
{
    kv made = {.n = (size_t)n_layers * n_tokens * n_heads * dim};
    made.keys = kvl_alloc_zero(made.n + 1, sizeof(float));
    made.values = kvl_alloc_zero(made.n + 1, sizeof(float));
    assert_non_null(made.keys);
    assert_non_null(made.values);
    made.view = (kvl_kv_view){n_layers, n_tokens, n_heads, dim, made.keys, made.values};
    return made;
}

static inline kv kv_random(kvl_random *random, const kvl_kv_view *shape, uint32_t n_tokens)
{
    kv made = kv_zero(shape->n_layers, n_tokens, shape->n_kv_heads, shape->head_dim);
    kvl_test_fill_normal(random, made.keys, made.n);
    kvl_test_fill_normal(random, made.values, made.n);
    return made;
}

static inline kv kv_copy(const kv *from)
{
    kv made = kv_zero(from->view.n_layers, from->view.n_tokens, from->view.n_kv_heads,
                      from->view.head_dim);
    memcpy(made.keys, from->keys, from->n * sizeof(float));
    memcpy(made.values, from->values, from->n * sizeof(float));
    return made;
}

/* A copy with random offsets of the given size, none in layer 0. */
static inline kv kv_moved(kvl_random *random, const kv *from, float size)
{
    kv made = kv_copy(from);
    kv noise = kv_random(random, &from->view, from->view.n_tokens);
    const size_t layer = from->view.n_tokens * kv_row(&from->view);
    for (size_t i = layer; i < made.n; i++) {
        made.keys[i] += size * noise.keys[i];
        made.values[i] += size * noise.values[i];
    }
    kvl_free(noise.keys);
    kvl_free(noise.values);
    return made;
}

static inline void kv_free(kv *gone)
{
    kvl_free(gone->keys);
    kvl_free(gone->values);
}

static inline void assert_same_bits(const kv *a, const kv *b)
{
    assert_int_equal(a->n, b->n);
    assert_memory_equal(a->keys, b->keys, a->n * sizeof(float));
    assert_memory_equal(a->values, b->values, a->n * sizeof(float));
}

/* One text in one slot: at home and in context, and so for the template's text after the slot. */
typedef struct example {
    kvl_digest base_id;
    kv base, real, after_base, after_real;
} example;

static inline kvl_digest digest_of(uint64_t number)
{
    kvl_digest digest = {{0}};
    for (int i = 0; i < 8; i++) digest.bytes[i] = (uint8_t)(number >> (8 * i));
    digest.bytes[31] = 1;
    return digest;
}

/* `after_base` is the template's, the same in all examples of a slot: copied. */
static inline example example_random(kvl_random *random, uint64_t number, const kvl_kv_view *shape,
                                     uint32_t n_tokens, const kv *after_base)
{
    example made = {.base_id = digest_of(number)};
    made.base = kv_random(random, shape, n_tokens);
    made.real = kv_moved(random, &made.base, 0.3F);
    made.after_base = kv_copy(after_base);
    made.after_real = kv_moved(random, after_base, 0.3F);
    return made;
}

static inline void example_free(example *gone)
{
    kv_free(&gone->base);
    kv_free(&gone->real);
    kv_free(&gone->after_base);
    kv_free(&gone->after_real);
}

static const kvl_digest model = {{7, 7, 7}};
static const kvl_anchor_slot question = {.template_id = {{1, 2, 3}}, .slot = 1};

static inline void example_measure(kvl_anchor_pool *pool, const example *e)
{
    kvl_container *container = NULL;
    kvl_error error;
    assert_int_equal(kvl_anchor_pool_measure(pool, &question, &model, &e->base_id, &e->base.view,
                                             &e->real.view, &e->after_base.view,
                                             &e->after_real.view, &container, &error),
                     KVL_OK);
    kvl_container_release(container);
}

static inline kvl_anchor_pool *pool_of(const kvl_anchor_options *options)
{
    kvl_anchor_pool *pool = NULL;
    kvl_error error;
    assert_int_equal(kvl_anchor_pool_create(options, &pool, &error), KVL_OK);
    return pool;
}

/* Corrects copies of the base and of the text after it. */
typedef struct corrected {
    kv slot, after;
} corrected;

static inline void corrected_free(corrected *gone)
{
    kv_free(&gone->slot);
    kv_free(&gone->after);
}

static inline kvl_status try_correct(kvl_anchor_pool *pool, const example *e, corrected *out)
{
    out->slot = kv_copy(&e->base);
    out->after = kv_copy(&e->after_base);
    return kvl_anchor_pool_correct(pool, &question, &e->base_id, &e->base.view, out->slot.keys,
                                   out->slot.values, &e->after_base.view, out->after.keys,
                                   out->after.values, NULL);
}

static inline corrected correct(kvl_anchor_pool *pool, const example *e)
{
    corrected out;
    assert_int_equal(try_correct(pool, e, &out), KVL_OK);
    return out;
}

static inline kvl_anchor_match match_of(kvl_anchor_pool *pool, const example *e)
{
    kvl_anchor_match match;
    kvl_anchor_pool_match(pool, &question, &e->base_id, &e->base.view, &match);
    return match;
}

static inline kvl_anchor_options exact_options(void)
{
    kvl_anchor_options options = kvl_anchor_default_options();
    options.dtype = KVL_KV_F32;
    options.distance_max = 100.0F;
    options.n_anchors_min = 1;
    options.shrink = false;
    return options;
}

#endif /* KVL_REUSE_ANCHOR_CASE_H */
