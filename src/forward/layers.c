/* forward/layers.c: embed, walk the layers, and give logits where they are asked for.
 *
 * A batch is cut into calls of at most KVL_FORWARD_ROWS_MAX rows, as even as can be: rows of a
 * later cut see the KV that an earlier one has written. In the last layer only rows whose logits
 * are wanted go on after their keys and values are written: nobody reads the others. */
#include "base/alloc.h"
#include "forward/forward.h"

struct kvl_forward {
    const kvl_model *model;
    kvl_backend *backend;
    const kvl_pages *pages;
    kvl_rotation *rotation;
    uint32_t n_positions;
    kvl_attention_plan *plan;
    kvl_attention_plan *last_plan; /* of the rows that go on in the last layer */
    /* Device memory, [KVL_FORWARD_ROWS_MAX][...] each. */
    float *stream, *normed, *queries, *keys, *values, *attended, *gate, *up;
    /* Of the cut that runs. */
    kvl_attention_row *rows; /* [KVL_FORWARD_ROWS_MAX], and so on */
    kvl_attention_row *last_rows;
    uint32_t *tokens, *positions, *slots, *last_positions;
};

/* One cut of a batch, with what its last layer needs. */
typedef struct cut {
    const kvl_forward_batch *batch;
    uint32_t row_first, n_rows;
    uint32_t logit_first, n_logits; /* of batch->logit_rows */
} cut;

static kvl_status create_memory(kvl_forward *forward, kvl_error *error)
{
    const kvl_model_shape *shape = kvl_model_shape_of(forward->model);
    const size_t width = shape->width;
    const size_t queries = (size_t)shape->n_heads * shape->head_dim;
    const size_t keys = (size_t)shape->n_kv_heads * shape->head_dim;
    const struct {
        float **memory;
        size_t width;
    } wanted[] = {
        {&forward->stream, width},
        {&forward->normed, width},
        {&forward->queries, queries},
        {&forward->keys, keys},
        {&forward->values, keys},
        {&forward->attended, queries},
        {&forward->gate, shape->feed_forward},
        {&forward->up, shape->feed_forward},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        const size_t n_bytes = wanted[i].width * KVL_FORWARD_ROWS_MAX * sizeof(float);
        *wanted[i].memory = forward->backend->ops->memory_create(forward->backend, n_bytes);
        if (*wanted[i].memory == NULL)
            return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for activations (%zu bytes)",
                            n_bytes);
    }
    forward->rows = kvl_alloc_zero(KVL_FORWARD_ROWS_MAX, sizeof *forward->rows);
    forward->last_rows = kvl_alloc_zero(KVL_FORWARD_ROWS_MAX, sizeof *forward->last_rows);
    forward->tokens = kvl_alloc_zero((size_t)4 * KVL_FORWARD_ROWS_MAX, sizeof *forward->tokens);
    if (forward->rows == NULL || forward->last_rows == NULL || forward->tokens == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the rows of a batch");
    forward->positions = forward->tokens + KVL_FORWARD_ROWS_MAX;
    forward->slots = forward->positions + KVL_FORWARD_ROWS_MAX;
    forward->last_positions = forward->slots + KVL_FORWARD_ROWS_MAX;
    return KVL_OK;
}

static kvl_status create_parts(kvl_forward *forward, kvl_error *error)
{
    const kvl_model_shape *shape = kvl_model_shape_of(forward->model);
    KVL_TRY(kvl_rotation_create(kvl_model_inverse_frequencies(forward->model), shape->rotary_dim,
                                forward->n_positions, shape->pairs, &forward->rotation, error));
    KVL_TRY(kvl_attention_plan_create(&forward->plan, error));
    KVL_TRY(kvl_attention_plan_create(&forward->last_plan, error));
    return create_memory(forward, error);
}

kvl_status kvl_forward_create(const kvl_model *model, kvl_backend *backend, const kvl_pages *pages,
                              uint32_t n_positions, kvl_forward **forward, kvl_error *error)
{
    *forward = NULL;
    const kvl_model_shape *shape = kvl_model_shape_of(model);
    KVL_ASSERT(pages->n_layers == shape->n_layers && pages->n_kv_heads == shape->n_kv_heads);
    KVL_ASSERT(pages->head_dim == shape->head_dim);
    if (n_positions == 0 || n_positions > shape->n_context)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "a context of %u tokens was asked for; the model was made for 1 to %u",
                        n_positions, shape->n_context);
    kvl_forward *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the forward pass");
    made->model = model;
    made->backend = backend;
    made->pages = pages;
    made->n_positions = n_positions;
    const kvl_status status = create_parts(made, error);
    if (status != KVL_OK) {
        kvl_forward_destroy(made);
        return status;
    }
    *forward = made;
    return KVL_OK;
}

void kvl_forward_destroy(kvl_forward *forward)
{
    if (forward == NULL) return;
    float *const memory[] = {forward->stream, forward->normed,   forward->queries, forward->keys,
                             forward->values, forward->attended, forward->gate,    forward->up};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) {
        if (memory[i] != NULL) forward->backend->ops->memory_destroy(forward->backend, memory[i]);
    }
    kvl_free(forward->rows);
    kvl_free(forward->last_rows);
    kvl_free(forward->tokens);
    kvl_attention_plan_destroy(forward->plan);
    kvl_attention_plan_destroy(forward->last_plan);
    kvl_rotation_destroy(forward->rotation);
    kvl_free(forward);
}

const kvl_rotation *kvl_forward_rotation(const kvl_forward *forward)
{
    return forward->rotation;
}

static kvl_status check_row(const kvl_forward *forward, const kvl_forward_batch *batch, uint32_t r,
                            kvl_error *error)
{
    const kvl_forward_row *row = &batch->rows[r];
    if (row->position >= forward->n_positions)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "position %u is past the context of %u tokens; shorten the prompt",
                        row->position, forward->n_positions);
    if (row->token >= kvl_model_shape_of(forward->model)->n_vocab)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "token id %u is not below %u", row->token,
                        kvl_model_shape_of(forward->model)->n_vocab);
    KVL_ASSERT(row->path < batch->n_paths);
    KVL_ASSERT(row->position < batch->paths[row->path].n_tokens);
    return KVL_OK;
}

/* Fills the arrays of a cut and plans its attention. */
static kvl_status prepare(kvl_forward *forward, const cut *work, kvl_error *error)
{
    const kvl_forward_batch *batch = work->batch;
    for (uint32_t i = 0; i < work->n_rows; i++) {
        const kvl_forward_row *row = &batch->rows[work->row_first + i];
        const uint32_t page = batch->paths[row->path].pages[row->position / KVL_PAGE_TOKENS];
        forward->rows[i] = (kvl_attention_row){row->path, row->position};
        forward->tokens[i] = row->token;
        forward->positions[i] = row->position;
        forward->slots[i] = page * KVL_PAGE_TOKENS + row->position % KVL_PAGE_TOKENS;
    }
    for (uint32_t i = 0; i < work->n_logits; i++) {
        const uint32_t at = batch->logit_rows[work->logit_first + i] - work->row_first;
        forward->last_rows[i] = forward->rows[at];
        forward->last_positions[i] = forward->positions[at];
    }
    KVL_TRY(kvl_attention_plan_make(forward->plan, forward->rows, work->n_rows, batch->paths,
                                    batch->n_paths, error));
    if (work->n_logits == 0) return KVL_OK;
    return kvl_attention_plan_make(forward->last_plan, forward->last_rows, work->n_logits,
                                   batch->paths, batch->n_paths, error);
}

/* Normalise, project to keys and values, rotate the keys, write both into their pages. With
 * `with_queries` the queries are projected in the same pass over the rows. */
static void project(kvl_forward *forward, uint32_t layer, uint32_t n_rows, bool with_queries)
{
    const kvl_model_shape *shape = kvl_model_shape_of(forward->model);
    const kvl_layer_weights *weights = kvl_model_layer(forward->model, layer);
    kvl_backend *backend = forward->backend;
    const kvl_backend_ops *ops = backend->ops;
    ops->rms_norm(backend, n_rows, shape->width, forward->stream, weights->attention_norm,
                  shape->norm_epsilon, forward->normed);
    const kvl_matmul_job jobs[] = {
        {&weights->key, weights->key_bias, forward->keys, false},
        {&weights->value, weights->value_bias, forward->values, false},
        {&weights->query, weights->query_bias, forward->queries, false},
    };
    ops->matmul(backend, jobs, with_queries ? 3 : 2, n_rows, forward->normed);
    ops->rotate(backend, forward->rotation, n_rows, forward->positions, shape->n_kv_heads,
                shape->head_dim, forward->keys);
    ops->pages_write(backend, forward->pages, layer, n_rows, forward->slots, forward->keys,
                     forward->values);
    if (with_queries)
        ops->rotate(backend, forward->rotation, n_rows, forward->positions, shape->n_heads,
                    shape->head_dim, forward->queries);
}

/* Attention's output and the gated part, both added to the stream of n_rows rows. */
static void finish_layer(kvl_forward *forward, const kvl_attention_plan *plan, uint32_t layer,
                         uint32_t n_rows)
{
    const kvl_model_shape *shape = kvl_model_shape_of(forward->model);
    const kvl_layer_weights *weights = kvl_model_layer(forward->model, layer);
    kvl_backend *backend = forward->backend;
    const kvl_backend_ops *ops = backend->ops;
    kvl_attention_run(plan, backend, forward->pages, layer, shape->n_heads, forward->queries,
                      forward->attended);
    const kvl_matmul_job output = {&weights->attention_output, NULL, forward->stream, true};
    ops->matmul(backend, &output, 1, n_rows, forward->attended);
    ops->rms_norm(backend, n_rows, shape->width, forward->stream, weights->feed_forward_norm,
                  shape->norm_epsilon, forward->normed);
    const kvl_matmul_job gated[] = {
        {&weights->gate, NULL, forward->gate, false},
        {&weights->up, NULL, forward->up, false},
    };
    ops->matmul(backend, gated, 2, n_rows, forward->normed);
    ops->silu_multiply(backend, (size_t)n_rows * shape->feed_forward, forward->gate, forward->up);
    const kvl_matmul_job down = {&weights->down, NULL, forward->stream, true};
    ops->matmul(backend, &down, 1, n_rows, forward->gate);
}

/* Moves the rows that want logits to the front of the stream and of the normalised rows. */
static void keep_logit_rows(kvl_forward *forward, const cut *work)
{
    const uint32_t width = kvl_model_shape_of(forward->model)->width;
    kvl_backend *backend = forward->backend;
    uint32_t *from = forward->tokens; /* the tokens have been embedded */
    for (uint32_t i = 0; i < work->n_logits; i++)
        from[i] = work->batch->logit_rows[work->logit_first + i] - work->row_first;
    backend->ops->rows_keep(backend, work->n_logits, width, from, forward->stream);
    backend->ops->rows_keep(backend, work->n_logits, width, from, forward->normed);
}

static void tell_of_keys(uint32_t layer, const cut *work)
{
    if (work->batch->on_keys != NULL)
        work->batch->on_keys(work->batch->context, layer, work->row_first, work->n_rows);
}

static void last_layer(kvl_forward *forward, uint32_t layer, const cut *work)
{
    const kvl_model_shape *shape = kvl_model_shape_of(forward->model);
    const kvl_layer_weights *weights = kvl_model_layer(forward->model, layer);
    kvl_backend *backend = forward->backend;
    project(forward, layer, work->n_rows, false);
    tell_of_keys(layer, work);
    if (work->n_logits == 0) return;
    keep_logit_rows(forward, work);
    const kvl_matmul_job job = {&weights->query, weights->query_bias, forward->queries, false};
    backend->ops->matmul(backend, &job, 1, work->n_logits, forward->normed);
    backend->ops->rotate(backend, forward->rotation, work->n_logits, forward->last_positions,
                         shape->n_heads, shape->head_dim, forward->queries);
    finish_layer(forward, forward->last_plan, layer, work->n_logits);
    backend->ops->rms_norm(backend, work->n_logits, shape->width, forward->stream,
                           kvl_model_output_norm(forward->model), shape->norm_epsilon,
                           forward->normed);
    float *logits = work->batch->logits + (size_t)work->logit_first * shape->n_vocab;
    const kvl_matmul_job output = {kvl_model_output(forward->model), NULL, logits, false};
    backend->ops->matmul(backend, &output, 1, work->n_logits, forward->normed);
}

static kvl_status run_cut(kvl_forward *forward, const cut *work, kvl_error *error)
{
    const kvl_forward_batch *batch = work->batch;
    const uint32_t n_layers = kvl_model_shape_of(forward->model)->n_layers;
    KVL_TRY(prepare(forward, work, error));
    forward->backend->ops->embed(forward->backend, kvl_model_embedding(forward->model),
                                 work->n_rows, forward->tokens, forward->stream);
    for (uint32_t layer = 0; layer < n_layers; layer++) {
        if (layer + 1 == n_layers) {
            last_layer(forward, layer, work);
        } else {
            project(forward, layer, work->n_rows, true);
            tell_of_keys(layer, work);
            if (batch->on_queries != NULL)
                batch->on_queries(batch->context, layer, work->row_first, work->n_rows,
                                  forward->queries);
            finish_layer(forward, forward->plan, layer, work->n_rows);
        }
        if (batch->after_layer != NULL &&
            batch->after_layer(batch->context, layer, work->row_first, work->n_rows))
            return KVL_FAIL(error, KVL_ERR_CANCELLED, "stopped after layer %u", layer);
    }
    return KVL_OK;
}

kvl_status kvl_forward_run(kvl_forward *forward, const kvl_forward_batch *batch, kvl_error *error)
{
    for (uint32_t r = 0; r < batch->n_rows; r++) KVL_TRY(check_row(forward, batch, r, error));
    const uint32_t n_cuts = (batch->n_rows + KVL_FORWARD_ROWS_MAX - 1) / KVL_FORWARD_ROWS_MAX;
    uint32_t row = 0;
    uint32_t logit = 0;
    for (uint32_t i = 0; i < n_cuts; i++) {
        const uint32_t n_left = batch->n_rows - row;
        cut work = {batch, row, (n_left + (n_cuts - i) - 1) / (n_cuts - i), logit, 0};
        while (logit < batch->n_logit_rows && batch->logit_rows[logit] < row + work.n_rows) logit++;
        work.n_logits = logit - work.logit_first;
        KVL_TRY(run_cut(forward, &work, error));
        row += work.n_rows;
    }
    KVL_ASSERT(logit == batch->n_logit_rows);
    forward->backend->ops->synchronize(forward->backend);
    return KVL_OK;
}
