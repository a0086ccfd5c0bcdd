/* host/engine.h: one model on one device, with its pages, its prefix tree and its forward pass; and
 * sessions, each the KV of one prompt.
 * Threads  The engine thread only, but for the model, which is immutable. */
#ifndef KVL_HOST_ENGINE_H
#define KVL_HOST_ENGINE_H

#include "cache/prefix_tree.h"
#include "forward/forward.h"
#include "reuse/anchor.h"
#include "reuse/correct.h"

typedef struct kvl_engine_options {
    const char *model_path;
    size_t n_threads;     /* 0: one a processor */
    uint32_t n_positions; /* context; 0: what the model was made for */
    uint32_t n_pages;     /* 0: enough for three whole contexts */
    const char *device;   /* as kvl_backend_create; NULL: "cpu" */
    kvl_cpu_variant variant;
} kvl_engine_options;

typedef struct kvl_engine {
    kvl_model *model;
    kvl_pool *threads;
    kvl_backend *backend;
    kvl_page_pool *pool;
    kvl_prefix_tree *tree;
    kvl_forward *forward;
    struct kvl_loader *loader; /* NULL until something was loaded */
    const kvl_model_shape *shape;
    uint32_t n_positions;
} kvl_engine;

/* Owns     *engine: ended with kvl_engine_destroy, after its sessions
 * Errors   those of kvl_model_open; KVL_ERR_NO_MEMORY, KVL_ERR_OUT_OF_RANGE, KVL_ERR_UNSUPPORTED */
KVL_MUST_USE kvl_status kvl_engine_create(const kvl_engine_options *options, kvl_engine **engine,
                                          kvl_error *error);
void kvl_engine_destroy(kvl_engine *engine);

/* The KV of one prompt: token ids and the pages that hold them. */
typedef struct kvl_session kvl_session;

KVL_MUST_USE kvl_status kvl_session_create(kvl_engine *engine, kvl_session **session,
                                           kvl_error *error);
/* Releases its pages. NULL does nothing. */
void kvl_session_destroy(kvl_session *session);

/* Gives the session n ids, none of them with KV yet, and pages for all of them and `n_more`. What
 * the prefix tree holds of them is shared, by whole pages and never the last token, where
 * `use_tree`; *n_shared says how many tokens that is. The session must be empty.
 * Errors   KVL_ERR_OUT_OF_RANGE (longer than the context), KVL_ERR_BUSY (no pages), NO_MEMORY */
KVL_MUST_USE kvl_status kvl_session_begin(kvl_session *session, const uint32_t *ids, uint32_t n_ids,
                                          uint32_t n_more, bool use_tree, uint64_t salt,
                                          uint32_t *n_shared, kvl_error *error);

/* Computes the tokens at `positions` [n], ascending, in one batch: prefill of a prompt, of a part,
 * of scattered tokens. Every position below the last that is not listed must have its KV already.
 * logits  [n_logits][n_vocab] of the last n_logits rows; may be 0. */
KVL_MUST_USE kvl_status kvl_session_compute(kvl_session *session, const uint32_t *positions,
                                            uint32_t n, uint32_t n_logits, float *logits,
                                            kvl_error *error);
/* Same for the half-open range first .. past - 1. */
KVL_MUST_USE kvl_status kvl_session_compute_range(kvl_session *session, uint32_t first,
                                                  uint32_t past, uint32_t n_logits, float *logits,
                                                  kvl_error *error);

/* Computes the tokens at `positions` [n] and sums the attention that those from position `from` on
 * give each position of the session, over all layers but the last, all heads and rows.
 * mass     [kvl_session_n_tokens], by position; overwritten
 * logits   [n_vocab] of the last token; NULL: not wanted
 * Errors   those of kvl_session_compute; KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_session_attention(kvl_session *session, const uint32_t *positions,
                                              uint32_t n, uint32_t from, float *mass,
                                              float *logits, kvl_error *error);
typedef struct kvl_deviation_check {
    uint32_t layer;   /* of the model; the layers up to it are computed */
    bool values_only; /* |dV|^2; else |dK|^2 + |dV|^2, keys before rotation */
} kvl_deviation_check;

/* Computes the tokens at `positions` [n] up to a layer only, and says how far each is there from
 * the KV that was there before.
 * deviation  [kvl_session_n_tokens], by position; 0 where nothing was computed
 * Errors   as above */
KVL_MUST_USE kvl_status kvl_session_deviation(kvl_session *session,
                                              const kvl_deviation_check *check,
                                              const uint32_t *positions, uint32_t n,
                                              float *deviation, kvl_error *error);

/* Whoever looks into a walk over the layers. */
typedef struct kvl_session_walk {
    /* The rows' KV of a layer is still what it was; everything that is loaded is in pages. */
    void (*before)(void *context, uint32_t layer);
    /* It is new now, and nothing has attended to it. Of rows row_first .. + n_rows - 1. */
    void (*after)(void *context, uint32_t layer, uint32_t row_first, uint32_t n_rows);
    void *context;
} kvl_session_walk;

/* kvl_session_compute with both called in every layer but the first; `before` only while the
 * first KVL_FORWARD_ROWS_MAX rows or fewer are computed. */
KVL_MUST_USE kvl_status kvl_session_compute_watched(kvl_session *session, const uint32_t *positions,
                                                    uint32_t n, uint32_t n_logits, float *logits,
                                                    const kvl_session_walk *walk, kvl_error *error);
/* One layer's KV of scattered positions [n], keys rotated back: keys, values
 * [n][n_kv_heads][head_dim] float. Read out of pages, or written into the session's own. */
void kvl_session_read_layer(kvl_session *session, uint32_t layer, const uint32_t *positions,
                            uint32_t n, float *keys, float *values);
void kvl_session_write_layer(kvl_session *session, uint32_t layer, const uint32_t *positions,
                             uint32_t n, const float *keys, const float *values);

/* Appends ids without KV; more pages are had where needed. Errors as kvl_session_begin. */
KVL_MUST_USE kvl_status kvl_session_append(kvl_session *session, const uint32_t *ids, uint32_t n,
                                           kvl_error *error);
/* Forgets everything from position n_tokens on. Pages stay with the session. */
void kvl_session_truncate(kvl_session *session, uint32_t n_tokens);

uint32_t kvl_session_n_tokens(const kvl_session *session);
const uint32_t *kvl_session_tokens(const kvl_session *session);
/* page * KVL_PAGE_TOKENS + index of a position. */
uint32_t kvl_session_slot(const kvl_session *session, uint32_t position);

/* Puts the whole pages of the first n_tokens into the prefix tree: their KV must be exact. */
KVL_MUST_USE kvl_status kvl_session_keep_prefix(kvl_session *session, uint64_t salt,
                                                uint32_t n_tokens, kvl_error *error);

/* Copies KV of positions first .. first + n - 1 out, keys rotated back:
 * keys, values [n_layers][n][n_kv_heads][head_dim] float */
void kvl_session_extract(kvl_session *session, uint32_t first, uint32_t n, float *keys,
                         float *values);

/* KV of a run of tokens to be placed: tokens token_first .. token_first + n - 1 of a view, keys not
 * rotated, go to positions position_first .. position_first + n - 1. */
typedef struct kvl_placement {
    const kvl_kv_view *kv;
    uint32_t token_first;
    uint32_t position_first;
    uint32_t n;
} kvl_placement;

/* The positions are the session's, and their pages its own. */
void kvl_session_place(kvl_session *session, const kvl_placement *placement);

/* A segment's tokens token_first .. token_first + n - 1 that go to position_first and so on. */
typedef struct kvl_session_load {
    const kvl_container *container; /* its blocks are checked; borrowed until the loading ends */
    uint32_t token_first;
    uint32_t position_first;
    uint32_t n;
    const kvl_mean *mean; /* added before rotation, by token of the segment; NULL: none; borrowed */
} kvl_session_load;

/* When layers were loaded, and done by the first pass over them, since loading began. */
typedef struct kvl_load_times {
    int64_t busy_ns, wait_ns;                      /* of the loading thread; of the engine's */
    int64_t loaded_ns[KVL_CONTAINER_LAYERS_MAX];   /* [layers of the model] */
    int64_t computed_ns[KVL_CONTAINER_LAYERS_MAX]; /* 0: no pass came by */
} kvl_load_times;

/* Whether the engine's pages are in the host's memory: then segments can be loaded by another
 * thread. */
bool kvl_engine_loads(const kvl_engine *engine);

/* Begins to place segments, layer by layer, on the engine's loading thread. The passes that follow
 * (kvl_session_compute, _attention, _deviation) wait for each layer until it is in its pages, so
 * that layer l + 1 is loaded while layer l is computed. Only where kvl_engine_loads; one session
 * at a time.
 * loads    [n], copied
 * Errors   KVL_ERR_NO_MEMORY; KVL_ERR_FOREIGN, KVL_ERR_DAMAGED (a segment that does not fit the
 *          model): nothing was begun */
KVL_MUST_USE kvl_status kvl_session_load_begin(kvl_session *session, const kvl_session_load *loads,
                                               size_t n, kvl_error *error);
/* Waits for everything, and ends the loading; nothing where none was begun. *times may be NULL. */
void kvl_session_load_end(kvl_session *session, kvl_load_times *times);

#endif /* KVL_HOST_ENGINE_H */
