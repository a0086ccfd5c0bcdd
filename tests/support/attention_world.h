/* attention_world.h: random trees of prompts in bf16 pages, rows that attend to them, and the
 * answers in double: what the device's plan and the device's kernels are compared with. */
#ifndef KVL_TESTS_ATTENTION_WORLD_H
#define KVL_TESTS_ATTENTION_WORLD_H

#include "attention/attention.h"
#include "cuda/work.h"
#include "test_random.h"

typedef struct world_shape {
    uint32_t n_kv_heads;
    uint32_t group;
    uint32_t head_dim;
    uint32_t n_paths;
    uint32_t n_tokens_max;
    uint32_t n_rows_max; /* a path */
    bool decode;         /* one row a path, at its end */
} world_shape;

typedef struct world {
    world_shape shape;
    uint32_t n_heads;
    uint32_t n_rows;
    uint32_t n_pages;
    kvl_attention_path *paths; /* [n_paths] */
    uint32_t *page_ids;        /* of all paths */
    kvl_attention_row *rows;
    uint16_t *kv;      /* [n_pages], as cuda/work.h has them */
    uint16_t *queries; /* [n_rows][n_heads][head_dim] bf16 */
    /* Filled by world_attend. */
    double *out;       /* as queries */
    double *magnitude; /* the same with the values' absolute values */
} world;

float world_float(uint16_t bf16);
uint16_t world_bf16(float number);
size_t world_page_numbers(const world *w);

/* Ends the process when there is no memory: this is a test. */
world *world_create(kvl_random *random, const world_shape *shape);
void world_destroy(world *w);
/* A shape of any kind, small enough for world_attend. */
world_shape world_random_shape(kvl_random *random);
/* The answers in double. */
void world_attend(world *w);
/* The largest error over all of out [n_rows][n_heads][head_dim], relative to what the roundings of
 * bf16 on the way allow: at most 1 is right. NaN counts as infinite. `rounded`: out went through
 * bf16 too. */
double world_error(const world *w, const float *out, bool rounded);

/* Plans the world's rows and gives what attention/ hands to a backend; borrowed from `plan`. */
kvl_attend_call world_plan(const world *w, kvl_attention_plan *plan);

#endif /* KVL_TESTS_ATTENTION_WORLD_H */
