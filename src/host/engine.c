/* host/engine.c: makes the rooms below into one engine. */
#include "host/engine.h"

#include "base/alloc.h"
#include "host/load.h"

/* One prompt that runs, one that is compared with it, and as much again in the prefix tree. */
enum { CONTEXTS_OF_PAGES = 3 };

static kvl_status create_cache(kvl_engine *engine, const kvl_engine_options *options,
                               kvl_error *error)
{
    const kvl_model_shape *shape = engine->shape;
    uint32_t n_pages = options->n_pages;
    if (n_pages == 0) {
        const uint32_t a_context = (engine->n_positions + KVL_PAGE_TOKENS - 1) / KVL_PAGE_TOKENS;
        n_pages = CONTEXTS_OF_PAGES * a_context;
    }
    KVL_TRY(kvl_page_pool_create(engine->backend, shape->n_layers, shape->n_kv_heads,
                                 shape->head_dim, n_pages, &engine->pool, error));
    KVL_TRY(kvl_prefix_tree_create(engine->pool, &engine->tree, error));
    return kvl_forward_create(engine->model, engine->backend, kvl_page_pool_pages(engine->pool),
                              engine->n_positions, &engine->forward, error);
}

/* All at once, so that a device with too little memory says so before the first request. */
static kvl_status load_weights(kvl_engine *engine, kvl_error *error)
{
    kvl_backend *backend = engine->backend;
    const kvl_backend_ops *ops = backend->ops;
    KVL_TRY(ops->weights_load(backend, kvl_model_embedding(engine->model), error));
    KVL_TRY(ops->weights_load(backend, kvl_model_output(engine->model), error));
    for (uint32_t layer = 0; layer < engine->shape->n_layers; layer++) {
        const kvl_layer_weights *weights = kvl_model_layer(engine->model, layer);
        const kvl_matrix *const matrices[] = {
            &weights->query, &weights->key, &weights->value, &weights->attention_output,
            &weights->gate,  &weights->up,  &weights->down};
        for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++)
            KVL_TRY(ops->weights_load(backend, matrices[i], error));
    }
    return KVL_OK;
}

static kvl_status create_parts(kvl_engine *engine, const kvl_engine_options *options,
                               kvl_error *error)
{
    KVL_TRY(kvl_model_open(options->model_path, &engine->model, error));
    engine->shape = kvl_model_shape_of(engine->model);
    engine->n_positions =
        options->n_positions == 0 ? engine->shape->n_context : options->n_positions;
    if (engine->n_positions > engine->shape->n_context)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "a context of %u tokens was asked for; %s was made for at most %u",
                        engine->n_positions, options->model_path, engine->shape->n_context);
    KVL_TRY(kvl_pool_create(options->n_threads, true, &engine->threads, error));
    KVL_TRY(kvl_backend_create(engine->threads, options->device == NULL ? "cpu" : options->device,
                               options->variant, &engine->backend, error));
    KVL_TRY(load_weights(engine, error));
    return create_cache(engine, options, error);
}

kvl_status kvl_engine_create(const kvl_engine_options *options, kvl_engine **engine,
                             kvl_error *error)
{
    *engine = NULL;
    kvl_engine *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for an engine");
    const kvl_status status = create_parts(made, options, error);
    if (status != KVL_OK) {
        kvl_engine_destroy(made);
        return status;
    }
    *engine = made;
    return KVL_OK;
}

void kvl_engine_destroy(kvl_engine *engine)
{
    if (engine == NULL) return;
    kvl_loader_destroy(engine->loader);
    kvl_forward_destroy(engine->forward);
    if (engine->tree != NULL) kvl_prefix_tree_destroy(engine->tree);
    if (engine->pool != NULL) kvl_page_pool_destroy(engine->pool);
    if (engine->backend != NULL) engine->backend->ops->destroy(engine->backend);
    kvl_pool_destroy(engine->threads);
    kvl_model_close(engine->model);
    kvl_free(engine);
}
