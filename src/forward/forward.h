/* forward/forward.h: the one walk over the layers. Prefill, decode, selective recompute and
 * teacher-forcing are only choices of rows; a hook sees every layer.
 * Threads  The engine thread only. */
#ifndef KVL_FORWARD_FORWARD_H
#define KVL_FORWARD_FORWARD_H

#include "attention/attention.h"
#include "model/model.h"

/* Rows of one call; more are cut into calls of this many. */
#define KVL_FORWARD_ROWS_MAX 1024u

typedef struct kvl_forward kvl_forward;

/* One token to compute: its KV goes to its place in its path; it attends to everything before. */
typedef struct kvl_forward_row {
    uint32_t token;
    uint32_t path;
    uint32_t position;
} kvl_forward_row;

typedef struct kvl_forward_batch {
    const kvl_forward_row *rows; /* rows of one path together, positions ascending */
    uint32_t n_rows;
    const kvl_attention_path *paths; /* pages for every position up to the last row's */
    uint32_t n_paths;
    const uint32_t *logit_rows; /* [n_logit_rows] indices into rows, ascending */
    uint32_t n_logit_rows;
    float *logits; /* [n_logit_rows][n_vocab] float, the caller's */
    /* Called after each layer of each cut, may be NULL: true stops the walk (KVL_ERR_CANCELLED). */
    bool (*after_layer)(void *context, uint32_t layer, uint32_t row_first, uint32_t n_rows);
    /* Called in every layer but the last, before attention, may be NULL: the rotated queries of
     * the cut's rows [n_rows][n_heads][head_dim], borrowed; the keys that they see are in pages. */
    void (*on_queries)(void *context, uint32_t layer, uint32_t row_first, uint32_t n_rows,
                       const float *queries);
    /* Called in every layer of each cut, before attention, may be NULL: keys and values of the
     * cut's rows are in pages, where they and others may be read, and others changed. */
    void (*on_keys)(void *context, uint32_t layer, uint32_t row_first, uint32_t n_rows);
    void *context;
} kvl_forward_batch;

/* Borrows all three until it is destroyed. The rotation table covers n_positions.
 * Owns     *forward: ended with kvl_forward_destroy
 * Errors   KVL_ERR_NO_MEMORY, KVL_ERR_OUT_OF_RANGE */
KVL_MUST_USE kvl_status kvl_forward_create(const kvl_model *model, kvl_backend *backend,
                                           const kvl_pages *pages, uint32_t n_positions,
                                           kvl_forward **forward, kvl_error *error);
void kvl_forward_destroy(kvl_forward *forward);

const kvl_rotation *kvl_forward_rotation(const kvl_forward *forward);

/* Computes the batch: writes KV of every row into its pages, logits of the rows asked for.
 * Errors   KVL_ERR_OUT_OF_RANGE (position past the context), KVL_ERR_NO_MEMORY, KVL_ERR_CANCELLED
 */
KVL_MUST_USE kvl_status kvl_forward_run(kvl_forward *forward, const kvl_forward_batch *batch,
                                        kvl_error *error);

#endif /* KVL_FORWARD_FORWARD_H */
