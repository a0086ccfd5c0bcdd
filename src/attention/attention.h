/* attention/attention.h: rows attend to spans.
 *
 * A row is one query position of one path; a path is the list of pages of a prompt. A row sees
 * exactly the keys of its path at positions <= its own, whatever subset of rows is in the batch:
 * prefill, decode and selective recompute are only different choices of rows. Spans that several
 * paths share are found by their page ids and read once for all rows under them (Hydragen,
 * arXiv:2402.05099).
 * Keys are cut into slices of KVL_ATTEND_SLICE_KEYS by absolute position; partial results of slices
 * are merged by log-sum-exp in order of position. A row's result is therefore the same to the last
 * bit in every batch.
 * Threads  The engine thread only. */
#ifndef KVL_ATTENTION_ATTENTION_H
#define KVL_ATTENTION_ATTENTION_H

#include "cache/page_pool.h"

typedef struct kvl_attention_row {
    uint32_t path;     /* index into paths */
    uint32_t position; /* < n_tokens of the path */
} kvl_attention_row;

/* Borrowed until the plan is made again. */
typedef struct kvl_attention_path {
    const uint32_t *pages; /* [ceil(n_tokens / KVL_PAGE_TOKENS)] */
    uint32_t n_tokens;
} kvl_attention_path;

typedef struct kvl_attention_plan kvl_attention_plan;

KVL_MUST_USE kvl_status kvl_attention_plan_create(kvl_attention_plan **plan, kvl_error *error);
void kvl_attention_plan_destroy(kvl_attention_plan *plan);

/* Plans one step; valid for every layer of it. Rows of one path should stand together.
 * Errors   KVL_ERR_NO_MEMORY, KVL_ERR_OUT_OF_RANGE (a path or position that is not there) */
KVL_MUST_USE kvl_status kvl_attention_plan_make(kvl_attention_plan *plan,
                                                const kvl_attention_row *rows, uint32_t n_rows,
                                                const kvl_attention_path *paths, uint32_t n_paths,
                                                kvl_error *error);

/* queries, out [n_rows][n_heads][head_dim] float, rows as planned, queries rotated. */
void kvl_attention_run(const kvl_attention_plan *plan, kvl_backend *backend, const kvl_pages *pages,
                       uint32_t layer, uint32_t n_heads, const float *queries, float *out);

#endif /* KVL_ATTENTION_ATTENTION_H */
