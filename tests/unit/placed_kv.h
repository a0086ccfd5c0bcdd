/* placed_kv.h: KV of a prompt's tokens, to be placed into a session or taken out of one, for tests
 * of what is computed among placed KV. Include it after cmocka.h. */
#ifndef KVL_PLACED_KV_H
#define KVL_PLACED_KV_H

#include "base/alloc.h"
#include "host/engine.h"
#include "test_random.h"

/* Keys are not rotated: [n_layers][n][n_kv_heads][head_dim] each, ended with kv_end. */
typedef struct kv {
    float *keys, *values;
    size_t n_floats;
    kvl_kv_view view;
} kv;

static inline kv kv_room(const kvl_engine *engine, uint32_t n)
{
    const kvl_model_shape *s = engine->shape;
    kv made = {.n_floats = (size_t)n * s->n_layers * s->n_kv_heads * s->head_dim};
    made.keys = kvl_alloc_aligned((made.n_floats + 1) * sizeof(float));
    made.values = kvl_alloc_aligned((made.n_floats + 1) * sizeof(float));
    assert_true(made.keys != NULL && made.values != NULL);
    made.view = (kvl_kv_view){s->n_layers, n, s->n_kv_heads, s->head_dim, made.keys, made.values};
    return made;
}

static inline void kv_end(kv *gone)
{
    kvl_free(gone->keys);
    kvl_free(gone->values);
}

/* KV that nothing computed. */
static inline kv kv_random(const kvl_engine *engine, uint32_t n, kvl_random *random)
{
    kv made = kv_room(engine, n);
    kvl_test_fill_uniform(random, made.keys, made.n_floats);
    kvl_test_fill_uniform(random, made.values, made.n_floats);
    return made;
}

/* Of the first n tokens of a session. */
static inline kv kv_of(const kvl_engine *engine, kvl_session *session, uint32_t n)
{
    kv made = kv_room(engine, n);
    kvl_session_extract(session, 0, n, made.keys, made.values);
    return made;
}

/* All of it, from a position on. */
static inline void kv_place(kvl_session *session, const kv *from, uint32_t position_first)
{
    const kvl_placement all = {
        .kv = &from->view, .position_first = position_first, .n = from->view.n_tokens};
    kvl_session_place(session, &all);
}

static inline void kv_assert_same(const kv *a, const kv *b)
{
    assert_int_equal(a->n_floats, b->n_floats);
    assert_memory_equal(a->keys, b->keys, a->n_floats * sizeof(float));
    assert_memory_equal(a->values, b->values, a->n_floats * sizeof(float));
}

#endif /* KVL_PLACED_KV_H */
