/* host/align.c: an edited document, or one that quotes another, is a text that nobody has read, and
 * most of its tokens have been (KVShare, arXiv:2503.16525). Their KV was computed with other tokens
 * before them, which is what blending mends: the runs that are found are placed, those that the
 * question looks at are computed again, and the tokens that are new always are. */
#include "base/alloc.h"
#include "base/log.h"
#include "host/host_parts.h"

#include <string.h>

enum { SPANS_MAX = 16, SPAN_LEAST = 32 };

void host_remember_donor(kvl_host *host, const kvl_container *container)
{
    const kvl_container_info *info = kvl_container_info_of(container);
    kvl_error error;
    if (!info->home_is_canonical) return;
    if (kvl_align_add(host->donors, &info->id, &info->home, info->tokens, info->n_tokens, &error) <
        0)
        kvl_log(KVL_LOG_WARN, "donor_not_remembered", "reason=\"%s\"", error.text);
}

/* The donor's KV of a span, or NULL where it is gone, or is not what the index believes. */
static kvl_container *have_donor(run *r, const run_part *part, const kvl_align_span *span)
{
    kvl_host *host = r->host;
    kvl_container *container = NULL;
    if (host->store->ops->get(host->store, &span->id, true, &container, NULL) != KVL_OK) {
        kvl_align_remove(host->donors, &span->id);
        return NULL;
    }
    const kvl_container_info *info = kvl_container_info_of(container);
    const bool is_right = info->kind == KVL_CONTAINER_SEGMENT && !info->is_unhealed &&
                          kvl_digest_equal(&info->fingerprint, &host->fingerprint) &&
                          kvl_digest_equal(&info->home, &part->home) &&
                          info->n_tokens >= span->segment_at + span->n &&
                          memcmp(info->tokens + span->segment_at, r->ids + part->first + span->at,
                                 span->n * sizeof *r->ids) == 0;
    if (is_right) return container;
    kvl_container_release(container);
    return NULL;
}

/* Pieces of one part, in order: runs with a donor, and what stands between them. */
typedef struct pieces {
    run_part items[2 * SPANS_MAX + 1];
    uint32_t n, n_found; /* items; tokens with a donor */
} pieces;

static void add_piece(pieces *made, const run_part *part, uint32_t at, uint32_t n,
                      kvl_container *container, uint32_t container_first)
{
    if (n == 0) return;
    run_part *piece = &made->items[made->n++];
    *piece = *part;
    piece->first = part->first + at;
    piece->n_tokens = n;
    piece->container = container;
    piece->container_first = container_first;
    piece->is_aligned = piece->is_slot = container != NULL;
    if (container != NULL) made->n_found += n;
}

static void release_pieces(pieces *made)
{
    for (uint32_t i = 0; i < made->n; i++) kvl_container_release(made->items[i].container);
    made->n = 0;
}

static void cut(run *r, const run_part *part, pieces *made)
{
    kvl_align_span spans[SPANS_MAX];
    const uint32_t n_spans = kvl_align_find(r->host->donors, &part->home, r->ids + part->first,
                                            part->n_tokens, SPAN_LEAST, spans, SPANS_MAX);
    uint32_t at = 0;
    for (uint32_t i = 0; i < n_spans; i++) {
        kvl_container *container = have_donor(r, part, &spans[i]);
        if (container == NULL) continue;
        add_piece(made, part, at, spans[i].at - at, NULL, 0);
        add_piece(made, part, spans[i].at, spans[i].n, container, spans[i].segment_at);
        at = spans[i].at + spans[i].n;
    }
    add_piece(made, part, at, part->n_tokens - at, NULL, 0);
}

static void replace_part(run *r, uint32_t index, const pieces *made)
{
    r->whole[r->n_whole++] = r->parts[index];
    const uint32_t n_behind = r->n_parts - index - 1;
    memmove(&r->parts[index + made->n], &r->parts[index + 1], n_behind * sizeof *r->parts);
    memcpy(&r->parts[index], made->items, made->n * sizeof *r->parts);
    r->n_parts += made->n - 1;
}

kvl_status run_align(run *r, kvl_error *error)
{
    pieces *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to align a text");
    for (uint32_t p = 0; p < r->n_parts && r->n_whole < KVL_WHOLE_MAX; p++) {
        const run_part *part = &r->parts[p];
        const bool is_shared = part->first + part->n_tokens <= r->n_shared;
        if (!part->is_slot || !part->is_canonical || part->container != NULL || is_shared) continue;
        *made = (pieces){.n = 0};
        cut(r, part, made);
        /* With less than half of it, what is placed costs more truth than time is won. */
        if (2 * made->n_found < part->n_tokens || r->n_parts + made->n - 1 > KVL_PARTS_MAX) {
            release_pieces(made);
            continue;
        }
        kvl_log(KVL_LOG_DEBUG, "aligned", "slot=%s tokens=%u found=%u pieces=%u", part->asked->slot,
                part->n_tokens, made->n_found, made->n);
        replace_part(r, p, made);
        p += made->n - 1;
    }
    kvl_free(made);
    return KVL_OK;
}
