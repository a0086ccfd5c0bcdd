/* cli/bench_scene.c: lays out pages, paths and rows for a tree of spans. */
#include "cli/bench_scene.h"

#include "base/alloc.h"
#include "base/clock.h"
#include "base/random.h"

#define CACHE_BYTES ((size_t)256 << 20)

typedef struct counts {
    uint32_t shared_pages; /* of the levels that rows share */
    uint32_t row_pages;    /* of one row's own */
    uint32_t path_pages;   /* of one row's path */
} counts;

static counts count_pages(const kvl_bench_tree *tree, uint32_t n_shared)
{
    counts n = {0};
    for (uint32_t l = 0; l < tree->n_levels; l++) {
        const uint32_t n_pages = tree->n_tokens[l] / KVL_PAGE_TOKENS;
        n.path_pages += n_pages;
        if (l < n_shared) {
            n.shared_pages += n_pages * tree->n_groups[l];
        } else {
            n.row_pages += n_pages;
        }
    }
    return n;
}

/* How many rows and layers there is room for. */
static void choose_sizes(kvl_bench_scene *scene, const kvl_bench_tree *tree, const counts *n,
                         const kvl_bench_shape *shape, size_t n_floats)
{
    const size_t page_floats = kvl_pages_page_floats(&scene->pages);
    const size_t n_pages_max = n_floats / page_floats;
    const size_t n_rows_max = (n_pages_max - n->shared_pages) / n->row_pages;
    KVL_ASSERT(n_pages_max > n->shared_pages && n_rows_max > 0);
    scene->n_rows = tree->n_rows < n_rows_max ? tree->n_rows : (uint32_t)n_rows_max;
    scene->scale = (double)tree->n_rows / scene->n_rows;
    scene->pages.n_pages = n->shared_pages + scene->n_rows * n->row_pages;
    const size_t n_layer_floats = scene->pages.n_pages * page_floats;
    const size_t n_layers = CACHE_BYTES / sizeof(float) / n_layer_floats;
    scene->pages.n_layers = n_layers < 1                 ? 1
                            : n_layers > shape->n_layers ? shape->n_layers
                                                         : (uint32_t)n_layers;
}

static void count_work(kvl_bench_scene *scene, const kvl_bench_tree *tree, const counts *n)
{
    const double row_floats = (double)scene->n_heads * scene->pages.head_dim;
    const double n_pages = n->shared_pages + (double)tree->n_rows * n->row_pages;
    const double page_floats = (double)kvl_pages_page_floats(&scene->pages);
    scene->n_bytes = sizeof(float) * (n_pages * page_floats + 2.0 * tree->n_rows * row_floats);
    /* A multiplication and an addition for every key and dimension, and again for every value. */
    scene->flops = 4.0 * tree->n_rows * row_floats * n->path_pages * KVL_PAGE_TOKENS;
}

/* A random order of all pages of a layer. */
static uint32_t *shuffle_pages(uint32_t n_pages)
{
    uint32_t *dealt = kvl_alloc_zero(n_pages, sizeof *dealt);
    if (dealt == NULL) return NULL;
    kvl_random random = {7};
    for (uint32_t i = 0; i < n_pages; i++) {
        const uint32_t at = (uint32_t)kvl_random_below(&random, i + 1);
        dealt[i] = dealt[at];
        dealt[at] = i;
    }
    return dealt;
}

static void lay_paths(kvl_bench_scene *scene, const kvl_bench_tree *tree, uint32_t n_shared,
                      const counts *n, const uint32_t *dealt)
{
    for (uint32_t r = 0; r < scene->n_rows; r++) {
        uint32_t *path = scene->page_ids + (size_t)r * n->path_pages;
        uint32_t level_first = 0;
        uint32_t own = n->shared_pages + r * n->row_pages;
        uint32_t at = 0;
        for (uint32_t l = 0; l < tree->n_levels; l++) {
            const uint32_t n_pages = tree->n_tokens[l] / KVL_PAGE_TOKENS;
            /* Of the tree's rows and not of those measured: neighbours keep a group full. */
            const uint32_t group = r / (tree->n_rows / tree->n_groups[l]);
            uint32_t from = level_first + group * n_pages;
            if (l >= n_shared) {
                from = own;
                own += n_pages;
            } else {
                level_first += n_pages * tree->n_groups[l];
            }
            for (uint32_t i = 0; i < n_pages; i++) path[at++] = dealt[from + i];
        }
        scene->paths[r] = (kvl_attention_path){path, n->path_pages * KVL_PAGE_TOKENS};
        scene->rows[r] = (kvl_attention_row){r, n->path_pages * KVL_PAGE_TOKENS - 1};
    }
}

static kvl_status create_arrays(kvl_bench_scene *scene, const counts *n, kvl_error *error)
{
    const size_t row_floats = (size_t)scene->n_heads * scene->pages.head_dim;
    scene->page_ids =
        kvl_alloc_zero((size_t)scene->n_rows * n->path_pages, sizeof *scene->page_ids);
    scene->paths = kvl_alloc_zero(scene->n_rows, sizeof *scene->paths);
    scene->rows = kvl_alloc_zero(scene->n_rows, sizeof *scene->rows);
    scene->queries = kvl_alloc_aligned(scene->n_rows * row_floats * sizeof(float));
    scene->out = kvl_alloc_aligned(scene->n_rows * row_floats * sizeof(float));
    if (scene->page_ids == NULL || scene->paths == NULL || scene->rows == NULL ||
        scene->queries == NULL || scene->out == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a benchmark of %u rows",
                        scene->n_rows);
    kvl_random random = {3};
    for (size_t i = 0; i < scene->n_rows * row_floats; i++)
        scene->queries[i] = 2.0F * kvl_random_uniform(&random) - 1.0F;
    return KVL_OK;
}

kvl_status kvl_bench_scene_init(kvl_bench_scene *scene, const kvl_bench_tree *tree,
                                uint32_t n_shared, const kvl_bench_shape *shape, float *memory,
                                size_t n_floats, kvl_error *error)
{
    KVL_ASSERT(n_shared < tree->n_levels && tree->n_levels <= KVL_BENCH_LEVELS_MAX);
    *scene = (kvl_bench_scene){.n_heads = shape->n_heads};
    scene->pages.memory = memory;
    scene->pages.n_kv_heads = shape->n_kv_heads;
    scene->pages.head_dim = shape->head_dim;
    const counts n = count_pages(tree, n_shared);
    choose_sizes(scene, tree, &n, shape, n_floats);
    count_work(scene, tree, &n);
    KVL_TRY(create_arrays(scene, &n, error));
    uint32_t *dealt = shuffle_pages(scene->pages.n_pages);
    if (dealt == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a benchmark");
    lay_paths(scene, tree, n_shared, &n, dealt);
    kvl_free(dealt);
    KVL_TRY(kvl_attention_plan_create(&scene->plan, error));
    return kvl_attention_plan_make(scene->plan, scene->rows, scene->n_rows, scene->paths,
                                   scene->n_rows, error);
}

void kvl_bench_scene_deinit(kvl_bench_scene *scene)
{
    kvl_attention_plan_destroy(scene->plan);
    kvl_free(scene->page_ids);
    kvl_free(scene->paths);
    kvl_free(scene->rows);
    kvl_free(scene->queries);
    kvl_free(scene->out);
}

double kvl_bench_scene_run(const kvl_bench_scene *scene, kvl_backend *backend)
{
    const int64_t start = kvl_clock_now(kvl_clock_system());
    for (uint32_t l = 0; l < scene->pages.n_layers; l++)
        kvl_attention_run(scene->plan, backend, &scene->pages, l, scene->n_heads, scene->queries,
                          scene->out);
    const int64_t end = kvl_clock_now(kvl_clock_system());
    return (double)(end - start) / (double)KVL_NS_PER_S / scene->pages.n_layers * scene->scale;
}
