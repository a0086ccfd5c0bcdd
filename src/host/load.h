/* host/load.h: a thread that places segments layer by layer while the engine computes the layers
 * before; private to the room.
 * Threads  The engine thread calls; the loading thread works. */
#ifndef KVL_HOST_LOAD_H
#define KVL_HOST_LOAD_H

#include "host/engine.h"
#include "reuse/place.h"

typedef struct kvl_loader kvl_loader;

/* Where one segment's tokens go. */
typedef struct kvl_loader_piece {
    const kvl_container *container;
    uint32_t token_first;
    kvl_place_tokens_view tokens;
    const kvl_mean *mean; /* added; NULL: none */
} kvl_loader_piece;

/* What is loaded: pieces and the arrays they point to must live until kvl_loader_end. */
typedef struct kvl_loader_job {
    kvl_place_target target;
    const kvl_loader_piece *pieces;
    size_t n_pieces;
    uint32_t n_layers;
} kvl_loader_job;

/* Owns     *loader: ended with kvl_loader_destroy
 * Errors   KVL_ERR_NO_MEMORY, KVL_ERR_IO (no thread) */
KVL_MUST_USE kvl_status kvl_loader_create(const kvl_pages *pages, kvl_loader **loader,
                                          kvl_error *error);
/* No job may be under way. NULL does nothing. */
void kvl_loader_destroy(kvl_loader *loader);

/* Nothing else may be under way. Pieces fit the model: they were checked. */
void kvl_loader_begin(kvl_loader *loader, const kvl_loader_job *job);
/* Returns when a layer is in its pages. */
void kvl_loader_wait(kvl_loader *loader, uint32_t layer);
/* The first pass is through a layer: for the timeline. */
void kvl_loader_passed(kvl_loader *loader, uint32_t layer);
/* Waits for the last layer. times may be NULL. */
void kvl_loader_end(kvl_loader *loader, kvl_load_times *times);

#endif /* KVL_HOST_LOAD_H */
