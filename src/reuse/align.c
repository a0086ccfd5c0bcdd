/* reuse/align.c: the index of windows and the search. */
#include "reuse/align.h"

#include "base/alloc.h"
#include "base/random.h"

#include <stdlib.h>
#include <string.h>

enum { CANDIDATES_MAX = 256, W = KVL_ALIGN_WINDOW, BUCKETS_PER_SEGMENT = 32 };

/* A window of a segment, by numbers: a bucket's chain goes through all segments. */
typedef struct link {
    uint32_t segment, window; /* segment UINT32_MAX: the chain ends */
} link;

static const link end_of_chain = {UINT32_MAX, 0};

typedef struct window {
    uint64_t hash;
    link next;
} window;

typedef struct segment {
    kvl_digest id, home;
    uint32_t *tokens; /* [n_tokens]; NULL: the place is free */
    window *windows;  /* [n_tokens / W] */
    uint32_t n_tokens;
} segment;

struct kvl_align_index {
    uint64_t base, base_out; /* of the hash; base to the power of W - 1 */
    segment *segments;       /* [n_segments_max] a ring */
    uint32_t n_segments_max;
    uint32_t n_added; /* ever; the next one's place is n_added % n_segments_max */
    link *buckets;    /* [n_buckets] */
    uint32_t n_buckets;
};

/* ---- hashes ---- */

static uint64_t number_of(uint32_t token)
{
    return (uint64_t)token + 1; /* or runs of token 0 would all be alike */
}

static uint64_t hash_of(const kvl_align_index *index, const uint32_t *tokens)
{
    uint64_t hash = 0;
    for (uint32_t i = 0; i < W; i++) hash = hash * index->base + number_of(tokens[i]);
    return hash;
}

/* The high half has the better bits of a product. */
static link *bucket_of(const kvl_align_index *index, uint64_t hash)
{
    return &index->buckets[(uint32_t)(hash >> 32) % index->n_buckets];
}

/* ---- life ---- */

kvl_status kvl_align_create(uint32_t n_segments_max, kvl_align_index **index, kvl_error *error)
{
    KVL_ASSERT(n_segments_max > 0);
    *index = NULL;
    kvl_align_index *made = kvl_alloc_zero(1, sizeof *made);
    if (made != NULL) {
        made->n_segments_max = n_segments_max;
        made->n_buckets = n_segments_max * BUCKETS_PER_SEGMENT;
        made->segments = kvl_alloc_zero(n_segments_max, sizeof *made->segments);
        made->buckets = kvl_alloc_zero(made->n_buckets, sizeof *made->buckets);
    }
    if (made == NULL || made->segments == NULL || made->buckets == NULL) {
        kvl_align_destroy(made);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for an index of %u segments",
                        n_segments_max);
    }
    for (uint32_t b = 0; b < made->n_buckets; b++) made->buckets[b] = end_of_chain;
    /* Secret: nobody can make texts whose windows all share a bucket. */
    kvl_random_secret(&made->base, sizeof made->base);
    made->base |= 1;
    made->base_out = 1;
    for (uint32_t i = 1; i < W; i++) made->base_out *= made->base;
    *index = made;
    return KVL_OK;
}

static void free_segment(segment *s)
{
    kvl_free(s->tokens);
    kvl_free(s->windows);
    *s = (segment){.n_tokens = 0};
}

void kvl_align_destroy(kvl_align_index *index)
{
    if (index == NULL) return;
    for (uint32_t i = 0; index->segments != NULL && i < index->n_segments_max; i++)
        free_segment(&index->segments[i]);
    kvl_free(index->segments);
    kvl_free(index->buckets);
    kvl_free(index);
}

static window *window_of(const kvl_align_index *index, link at)
{
    return &index->segments[at.segment].windows[at.window];
}

static void unlink_segment(kvl_align_index *index, uint32_t number)
{
    segment *s = &index->segments[number];
    for (uint32_t w = 0; s->tokens != NULL && w < s->n_tokens / W; w++) {
        link *at = bucket_of(index, s->windows[w].hash);
        while (at->segment != number || at->window != w) at = &window_of(index, *at)->next;
        *at = s->windows[w].next;
    }
    free_segment(s);
}

static uint32_t find_segment(const kvl_align_index *index, const kvl_digest *id)
{
    for (uint32_t i = 0; i < index->n_segments_max; i++) {
        const segment *s = &index->segments[i];
        if (s->tokens != NULL && kvl_digest_equal(&s->id, id)) return i;
    }
    return UINT32_MAX;
}

void kvl_align_remove(kvl_align_index *index, const kvl_digest *id)
{
    const uint32_t number = find_segment(index, id);
    if (number != UINT32_MAX) unlink_segment(index, number);
}

kvl_status kvl_align_add(kvl_align_index *index, const kvl_digest *id, const kvl_digest *home,
                         const uint32_t *tokens, uint32_t n_tokens, kvl_error *error)
{
    if (n_tokens < W || find_segment(index, id) != UINT32_MAX) return KVL_OK;
    segment fresh = {.id = *id, .home = *home, .n_tokens = n_tokens};
    fresh.tokens = kvl_alloc_zero(n_tokens, sizeof *fresh.tokens);
    fresh.windows = kvl_alloc_zero(n_tokens / W, sizeof *fresh.windows);
    if (fresh.tokens == NULL || fresh.windows == NULL) {
        free_segment(&fresh);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to remember a segment's tokens");
    }
    memcpy(fresh.tokens, tokens, n_tokens * sizeof *tokens);
    const uint32_t number = index->n_added++ % index->n_segments_max;
    unlink_segment(index, number);
    index->segments[number] = fresh;
    for (uint32_t w = 0; w < n_tokens / W; w++) {
        const uint64_t hash = hash_of(index, tokens + (size_t)w * W);
        link *bucket = bucket_of(index, hash);
        fresh.windows[w] = (window){hash, *bucket};
        *bucket = (link){number, w};
    }
    return KVL_OK;
}

/* ---- search ---- */

typedef struct candidate {
    uint32_t at, n, segment, segment_at;
} candidate;

typedef struct search {
    const kvl_align_index *index;
    const kvl_digest *home;
    const uint32_t *tokens;
    uint32_t n_tokens, n_least, n;
    candidate found[CANDIDATES_MAX];
} search;

/* Whether a span that was found goes through here already: its other windows lead to it again. */
static bool is_known(const search *s, uint32_t at, uint32_t number, uint32_t segment_at)
{
    for (uint32_t i = s->n; i-- > 0;) {
        const candidate *c = &s->found[i];
        if (c->segment == number && at >= c->at && at < c->at + c->n &&
            at - c->at == segment_at - c->segment_at)
            return true;
    }
    return false;
}

static void grow(search *s, uint32_t at, uint32_t number, uint32_t segment_at)
{
    const segment *in = &s->index->segments[number];
    const uint32_t *a = s->tokens + at;
    const uint32_t *b = in->tokens + segment_at;
    uint32_t left = 0, right = 0;
    const uint32_t left_max = at < segment_at ? at : segment_at;
    const uint32_t rest = s->n_tokens - at;
    const uint32_t segment_rest = in->n_tokens - segment_at;
    const uint32_t right_max = rest < segment_rest ? rest : segment_rest;
    while (right < right_max && a[right] == b[right]) right++;
    if (right < W) return; /* the hash was wrong */
    while (left < left_max && a[-1 - (int64_t)left] == b[-1 - (int64_t)left]) left++;
    if (left + right < s->n_least || s->n == CANDIDATES_MAX) return;
    s->found[s->n++] = (candidate){at - left, left + right, number, segment_at - left};
}

static void look_up(search *s, uint32_t at, uint64_t hash)
{
    for (link l = *bucket_of(s->index, hash); l.segment != UINT32_MAX;) {
        const window *found = window_of(s->index, l);
        if (found->hash == hash && kvl_digest_equal(&s->index->segments[l.segment].home, s->home) &&
            !is_known(s, at, l.segment, l.window * W))
            grow(s, at, l.segment, l.window * W);
        l = found->next;
    }
}

/* Longest first; among equals the earlier one, then the one of the lower place: always the same. */
static int compare_lengths(const void *a, const void *b)
{
    const candidate *left = a;
    const candidate *right = b;
    if (left->n != right->n) return left->n > right->n ? -1 : 1;
    if (left->at != right->at) return left->at < right->at ? -1 : 1;
    return (left->segment > right->segment) - (left->segment < right->segment);
}

static int compare_places(const void *a, const void *b)
{
    const kvl_align_span *left = a;
    const kvl_align_span *right = b;
    return (left->at > right->at) - (left->at < right->at);
}

/* Cuts off what longer spans have. A span that another one lies within is cut behind it: what is
 * left before is what a shorter span could have been found for. */
static void trim(candidate *c, const kvl_align_span *spans, uint32_t n_spans)
{
    for (uint32_t i = 0; i < n_spans; i++) {
        const uint32_t end = c->at + c->n;
        const uint32_t taken_end = spans[i].at + spans[i].n;
        if (taken_end <= c->at || spans[i].at >= end) continue;
        const uint32_t before = spans[i].at > c->at ? spans[i].at - c->at : 0;
        const uint32_t behind = end > taken_end ? end - taken_end : 0;
        if (before >= behind) {
            c->n = before;
        } else {
            c->segment_at += taken_end - c->at;
            c->at = taken_end;
            c->n = behind;
        }
    }
}

uint32_t kvl_align_find(const kvl_align_index *index, const kvl_digest *home,
                        const uint32_t *tokens, uint32_t n_tokens, uint32_t n_least,
                        kvl_align_span *spans, uint32_t n_spans_max)
{
    KVL_ASSERT(n_least >= W);
    search s = {
        .index = index, .home = home, .tokens = tokens, .n_tokens = n_tokens, .n_least = n_least};
    if (n_tokens < W) return 0;
    uint64_t hash = hash_of(index, tokens);
    for (uint32_t at = 0;; at++) {
        look_up(&s, at, hash);
        if (at + W == n_tokens) break;
        hash = (hash - number_of(tokens[at]) * index->base_out) * index->base +
               number_of(tokens[at + W]);
    }
    qsort(s.found, s.n, sizeof *s.found, compare_lengths);
    uint32_t n = 0;
    for (uint32_t i = 0; i < s.n && n < n_spans_max; i++) {
        candidate *c = &s.found[i];
        trim(c, spans, n);
        if (c->n < n_least) continue;
        spans[n++] = (kvl_align_span){c->at, c->n, c->segment_at, index->segments[c->segment].id};
    }
    qsort(spans, n, sizeof *spans, compare_places);
    return n;
}
