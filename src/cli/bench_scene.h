/* cli/bench_scene.h: one step of attention for `kvloom bench attention`: rows that decode behind a
 * tree of spans, with as much sharing as is asked for. Private to the room. */
#ifndef KVL_CLI_BENCH_SCENE_H
#define KVL_CLI_BENCH_SCENE_H

#include "attention/attention.h"

#define KVL_BENCH_LEVELS_MAX 3u

/* What a row sees, from the root on: level l has n_groups[l] spans of n_tokens[l] tokens, and rows
 * are dealt out evenly among them. The last level is the rows' own. Tokens are whole pages. */
typedef struct kvl_bench_tree {
    uint32_t n_rows;
    uint32_t n_levels;
    uint32_t n_tokens[KVL_BENCH_LEVELS_MAX];
    uint32_t n_groups[KVL_BENCH_LEVELS_MAX];
} kvl_bench_tree;

typedef struct kvl_bench_shape {
    const char *name;
    uint32_t n_layers, n_heads, n_kv_heads, head_dim;
} kvl_bench_shape;

typedef struct kvl_bench_scene {
    kvl_pages pages;
    uint32_t n_heads;
    uint32_t n_rows; /* measured; fewer than the tree's where memory holds no more */
    double scale;    /* rows of the tree for each row measured */
    double n_bytes;  /* that one layer has to read and write at least, for the tree's rows */
    double flops;    /* of one layer, for the tree's rows */
    uint32_t *page_ids;
    kvl_attention_path *paths;
    kvl_attention_row *rows;
    kvl_attention_plan *plan;
    float *queries, *out; /* [n_rows][n_heads][head_dim] */
} kvl_bench_scene;

/* Levels below n_shared are shared as the tree says; above, every row has pages of its own with as
 * many tokens. Pages are dealt out in random order, as a pool in use gives them. The scene has as
 * many layers as the shape, or as fill 256 MiB, so that no layer is in a cache from the last pass.
 * memory   [n_floats], borrowed: keys and values, whatever they are
 * Owns     *scene: ended with kvl_bench_scene_deinit, also after an error
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_bench_scene_init(kvl_bench_scene *scene, const kvl_bench_tree *tree,
                                             uint32_t n_shared, const kvl_bench_shape *shape,
                                             float *memory, size_t n_floats, kvl_error *error);
void kvl_bench_scene_deinit(kvl_bench_scene *scene);

/* Seconds of one layer for the tree's rows, planning excluded: it is done once for all layers. */
double kvl_bench_scene_run(const kvl_bench_scene *scene, kvl_backend *backend);

#endif /* KVL_CLI_BENCH_SCENE_H */
