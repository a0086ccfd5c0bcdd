/* attention/plan.c: the door of the room: checks, memory, and handing a plan to the backend. */
#include "attention/plan.h"

#include "base/alloc.h"

kvl_status kvl_attention_reserve(void **array, size_t *n_max, size_t n, size_t size)
{
    if (n <= *n_max) return KVL_OK;
    const size_t wanted = n > 2 * *n_max ? n : 2 * *n_max;
    size_t n_bytes = 0;
    if (!kvl_size_mul(wanted, size, &n_bytes)) return KVL_ERR_NO_MEMORY;
    void *larger = kvl_realloc(*array, n_bytes);
    if (larger == NULL) return KVL_ERR_NO_MEMORY;
    *array = larger;
    *n_max = wanted;
    return KVL_OK;
}

kvl_status kvl_attention_plan_create(kvl_attention_plan **plan, kvl_error *error)
{
    *plan = kvl_alloc_zero(1, sizeof **plan);
    if (*plan == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for an attention plan");
    return KVL_OK;
}

void kvl_attention_plan_destroy(kvl_attention_plan *plan)
{
    if (plan == NULL) return;
    kvl_free(plan->blocks);
    kvl_free(plan->tiles);
    kvl_free(plan->runs);
    kvl_free(plan->page_ids);
    kvl_free(plan->numbers);
    kvl_free(plan);
}

static kvl_status check_rows(const kvl_attention_plan *plan, kvl_error *error)
{
    for (uint32_t i = 0; i < plan->n_rows; i++) {
        const kvl_attention_row *row = &plan->rows[i];
        if (row->path >= plan->n_paths)
            return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                            "row %u is of path %u, but there are %u paths: give the path too", i,
                            row->path, plan->n_paths);
        const uint32_t n_tokens = plan->paths[row->path].n_tokens;
        if (row->position >= n_tokens)
            return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                            "row %u is at position %u, but path %u has %u tokens: lengthen the "
                            "path first",
                            i, row->position, row->path, n_tokens);
    }
    return KVL_OK;
}

static uint32_t *take(uint32_t **numbers, uint32_t n)
{
    uint32_t *taken = *numbers;
    *numbers += n;
    return taken;
}

static kvl_status reserve_numbers(kvl_attention_plan *plan)
{
    const size_t n = 3 * ((size_t)plan->n_rows + plan->n_paths);
    void *memory = plan->numbers;
    const kvl_status status =
        kvl_attention_reserve(&memory, &plan->numbers_max, n, sizeof *plan->numbers);
    plan->numbers = memory;
    if (status != KVL_OK) return status;
    uint32_t *rest = plan->numbers;
    plan->order = take(&rest, plan->n_rows);
    plan->positions = take(&rest, plan->n_rows);
    plan->links = take(&rest, plan->n_rows);
    plan->path_order = take(&rest, plan->n_paths);
    plan->path_ranks = take(&rest, plan->n_paths);
    plan->path_links = take(&rest, plan->n_paths);
    return KVL_OK;
}

static void empty_plan(kvl_attention_plan *plan)
{
    plan->n_rows = 0;
    plan->n_blocks = 0;
    plan->n_tiles = 0;
    plan->n_runs = 0;
    plan->n_splits = 0;
    plan->n_partials = 0;
    plan->n_page_ids = 0;
}

/* Devices keep what they make of a plan for its other layers, and know it by this number. */
static uint64_t next_serial(void)
{
    static _Atomic uint64_t n_made;
    return ++n_made;
}

kvl_status kvl_attention_plan_make(kvl_attention_plan *plan, const kvl_attention_row *rows,
                                   uint32_t n_rows, const kvl_attention_path *paths,
                                   uint32_t n_paths, kvl_error *error)
{
    KVL_ASSERT(n_rows == 0 || (rows != NULL && paths != NULL));
    empty_plan(plan);
    plan->serial = next_serial();
    plan->rows = rows;
    plan->paths = paths;
    plan->n_rows = n_rows;
    plan->n_paths = n_paths;
    kvl_status status = check_rows(plan, error);
    if (status == KVL_OK && n_rows != 0) {
        status = reserve_numbers(plan);
        if (status == KVL_OK) {
            kvl_attention_order_rows(plan);
            status = kvl_attention_cut_tiles(plan);
        }
        if (status != KVL_OK)
            status = KVL_FAIL(error, status, "no memory to plan attention of %u rows", n_rows);
    }
    if (status != KVL_OK) empty_plan(plan);
    plan->rows = NULL;
    plan->paths = NULL;
    return status;
}

void kvl_attention_run(const kvl_attention_plan *plan, kvl_backend *backend, const kvl_pages *pages,
                       uint32_t layer, uint32_t n_heads, const float *queries, float *out)
{
    KVL_ASSERT(layer < pages->n_layers);
    KVL_ASSERT(n_heads > 0 && n_heads % pages->n_kv_heads == 0);
    if (plan->n_rows == 0) return;
    const kvl_attend_call call = {.pages = pages,
                                  .layer = layer,
                                  .n_heads = n_heads,
                                  .n_rows = plan->n_rows,
                                  .serial = plan->serial,
                                  .queries = queries,
                                  .order = plan->order,
                                  .positions = plan->positions,
                                  .page_ids = plan->page_ids,
                                  .tiles = plan->tiles,
                                  .blocks = plan->blocks,
                                  .runs = plan->runs,
                                  .n_blocks = plan->n_blocks,
                                  .n_runs = plan->n_runs,
                                  .n_splits = plan->n_splits,
                                  .n_partials = plan->n_partials,
                                  .out = out};
    backend->ops->attend(backend, &call);
}
