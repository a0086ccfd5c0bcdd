/* http/dashboard.h: what the page at / shows: figures of the last minutes, and the prefix tree.
 * Private to the room.
 *
 * Texts are a tenant's: nodes of the tree are told of one salt only, all others are two sums.
 * Threads  The caller's; a ring is one thread's at a time. */
#ifndef KVL_HTTP_DASHBOARD_H
#define KVL_HTTP_DASHBOARD_H

#include "host/host.h"
#include "model/tokenizer.h"

#include <jansson.h>

#define KVL_DASHBOARD_SAMPLES 300u
#define KVL_DASHBOARD_PERIOD_S 2

/* Counters as they stood at a time. */
typedef struct kvl_dashboard_sample {
    int64_t at_ns; /* monotonic */
    uint64_t n_answer_tokens, n_prompt_tokens, n_first_tokens;
    double ttft_s; /* sum over n_first_tokens */
    uint32_t n_running, n_waiting;
} kvl_dashboard_sample;

/* The last samples: ten minutes. Begins as zeros. */
typedef struct kvl_dashboard_ring {
    kvl_dashboard_sample samples[KVL_DASHBOARD_SAMPLES]; /* sample i at i modulo the length */
    uint64_t n_ever;
} kvl_dashboard_ring;

void kvl_dashboard_add(kvl_dashboard_ring *ring, const kvl_dashboard_sample *sample);

/* Curves between each two samples, oldest first, all of one length: age_s (of the later one),
 * tokens_per_s, prompt_tokens_per_s, ttft_s (a mean; null where no answer began), running,
 * waiting. The caller's; NULL without memory. */
json_t *kvl_dashboard_curves(const kvl_dashboard_ring *ring, int64_t now_ns);
/* The caller's; NULL without memory. Texts are UTF-8, whatever the ids are. */
json_t *kvl_dashboard_tree(const kvl_prefix_view *view, const kvl_tokenizer *tokenizer);
json_t *kvl_dashboard_host(const kvl_host_figures *figures);

/* JSON in which no <, > or & stands, but as an escape: whatever somebody takes it for, it is no
 * mark-up. Owns  the text: ended with kvl_free; NULL without memory */
char *kvl_dashboard_dump(const json_t *value, size_t *n_bytes);

/* The page is head, style, middle, script and tail. */
typedef struct kvl_dashboard_page {
    const char *head, *style, *middle, *script, *tail; /* static text */
} kvl_dashboard_page;
extern const kvl_dashboard_page kvl_dashboard_page_text;

/* Ends kvl_http_sampler_start. */
typedef struct kvl_http_sampler kvl_http_sampler;

#endif /* KVL_HTTP_DASHBOARD_H */
