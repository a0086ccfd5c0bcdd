/* http/dashboard.c: figures to JSON, without sockets. */
#include "http/dashboard.h"

#include "base/alloc.h"
#include "base/clock.h"

#include <string.h>

void kvl_dashboard_add(kvl_dashboard_ring *ring, const kvl_dashboard_sample *sample)
{
    ring->samples[ring->n_ever++ % KVL_DASHBOARD_SAMPLES] = *sample;
}

static double seconds(int64_t ns)
{
    return (double)ns / (double)KVL_NS_PER_S;
}

/* ---- curves ---- */

enum { AGE, TOKENS, PROMPT, TTFT, RUNNING, WAITING, CURVES };

static const char *const curve_names[CURVES] = {"age_s",  "tokens_per_s", "prompt_tokens_per_s",
                                                "ttft_s", "running",      "waiting"};

static int add_point(json_t *const *curves, const kvl_dashboard_sample *before,
                     const kvl_dashboard_sample *after, int64_t now_ns)
{
    const double period = seconds(after->at_ns - before->at_ns);
    const uint64_t n_tokens = after->n_answer_tokens - before->n_answer_tokens;
    const uint64_t n_prompt = after->n_prompt_tokens - before->n_prompt_tokens;
    const uint64_t n_first = after->n_first_tokens - before->n_first_tokens;
    const double ttft = after->ttft_s - before->ttft_s;
    const bool has_period = period > 0.0;
    json_t *const points[CURVES] = {
        [AGE] = json_real(seconds(now_ns - after->at_ns)),
        [TOKENS] = json_real(has_period ? (double)n_tokens / period : 0.0),
        [PROMPT] = json_real(has_period ? (double)n_prompt / period : 0.0),
        [TTFT] = n_first == 0 ? json_null() : json_real(ttft / (double)n_first),
        [RUNNING] = json_integer(after->n_running),
        [WAITING] = json_integer(after->n_waiting),
    };
    int failed = 0;
    for (uint32_t i = 0; i < CURVES; i++) failed |= json_array_append_new(curves[i], points[i]);
    return failed;
}

json_t *kvl_dashboard_curves(const kvl_dashboard_ring *ring, int64_t now_ns)
{
    const uint64_t n_ever = ring->n_ever;
    const uint64_t first = n_ever > KVL_DASHBOARD_SAMPLES ? n_ever - KVL_DASHBOARD_SAMPLES : 0;
    json_t *all = json_object();
    json_t *curves[CURVES];
    int failed = all == NULL;
    for (uint32_t i = 0; i < CURVES; i++) {
        curves[i] = json_array();
        failed |= json_object_set_new(all, curve_names[i], curves[i]);
    }
    for (uint64_t i = first + 1; failed == 0 && i < n_ever; i++)
        failed = add_point(curves, &ring->samples[(i - 1) % KVL_DASHBOARD_SAMPLES],
                           &ring->samples[i % KVL_DASHBOARD_SAMPLES], now_ns);
    if (failed == 0) return all;
    json_decref(all);
    return NULL;
}

/* ---- the tree ---- */

static json_t *text_of(const uint32_t *ids, const kvl_tokenizer *tokenizer)
{
    enum { PIECE = KVL_DETOKENIZER_OUT_MIN, BYTES_MAX = 160 };
    char text[BYTES_MAX + PIECE];
    size_t n = 0;
    kvl_detokenizer detokenizer;
    kvl_detokenizer_init(&detokenizer, tokenizer);
    for (uint32_t i = 0; i < KVL_PAGE_TOKENS && n < BYTES_MAX; i++)
        n += kvl_detokenizer_push(&detokenizer, ids[i], text + n, PIECE);
    if (n < BYTES_MAX) n += kvl_detokenizer_finish(&detokenizer, text + n, PIECE);
    /* Cut where a character begins. */
    if (n > BYTES_MAX) {
        n = BYTES_MAX;
        while (n > 0 && ((unsigned char)text[n] & 0xC0) == 0x80) n--;
    }
    return json_stringn(text, n);
}

static json_t *node_json(const kvl_prefix_node *node, const kvl_tokenizer *tokenizer)
{
    json_t *parent = node->parent == KVL_PREFIX_VIEW_FIRST ? json_null()
                                                           : json_integer((json_int_t)node->parent);
    return json_pack("{s:o, s:I, s:I, s:I, s:o}", "parent", parent, "tokens",
                     (json_int_t)node->n_pages * KVL_PAGE_TOKENS, "children",
                     (json_int_t)node->n_children, "sequences", (json_int_t)node->n_holders, "text",
                     text_of(node->ids, tokenizer));
}

json_t *kvl_dashboard_tree(const kvl_prefix_view *view, const kvl_tokenizer *tokenizer)
{
    json_t *nodes = json_array();
    int failed = nodes == NULL;
    for (uint32_t i = 0; failed == 0 && i < view->n_nodes; i++)
        failed = json_array_append_new(nodes, node_json(&view->nodes[i], tokenizer));
    if (failed != 0) {
        json_decref(nodes);
        return NULL;
    }
    return json_pack(
        "{s:o, s:I, s:I, s:{s:I, s:I}}", "nodes", nodes, "n_nodes", (json_int_t)view->own_nodes,
        "tokens", (json_int_t)view->own_pages * KVL_PAGE_TOKENS, "others", "n_nodes",
        (json_int_t)view->other_nodes, "tokens", (json_int_t)view->other_pages * KVL_PAGE_TOKENS);
}

/* ---- the host ---- */

json_t *kvl_dashboard_host(const kvl_host_figures *figures)
{
    json_t *audits = json_array();
    json_t *peers = json_array();
    int failed = audits == NULL || peers == NULL;
    for (uint32_t i = 0; i < figures->n_audits; i++) {
        const kvl_host_audit *audit = &figures->audits[i];
        failed |= json_array_append_new(audits, json_pack("{s:s, s:I, s:f, s:f}", "action",
                                                          audit->action, "n", (json_int_t)audit->n,
                                                          "kl", audit->kl, "top1", audit->top1));
    }
    for (uint32_t i = 0; i < figures->n_peers; i++)
        failed |=
            json_array_append_new(peers, json_pack("{s:s, s:b}", "name", figures->peers[i].name,
                                                   "is_up", figures->peers[i].is_up));
    if (failed != 0) {
        json_decref(audits);
        json_decref(peers);
        return NULL;
    }
    return json_pack("{s:I, s:I, s:I, s:I, s:I, s:o, s:o}", "healed", (json_int_t)figures->n_healed,
                     "heals_waiting", (json_int_t)figures->n_heals_waiting, "audited",
                     (json_int_t)figures->n_audited, "anchors", (json_int_t)figures->n_anchors,
                     "anchor_bytes", (json_int_t)figures->anchor_bytes, "audits", audits, "peers",
                     peers);
}

/* ---- text ---- */

typedef struct dumped {
    char *bytes;
    size_t n, max;
} dumped;

/* These three stand in texts only, where an escape is the same. */
static int dump_more(const char *bytes, size_t n_bytes, void *context)
{
    dumped *to = context;
    const size_t wanted = to->n + 6 * n_bytes;
    if (wanted > to->max) {
        char *larger = kvl_realloc(to->bytes, 2 * wanted + 1024);
        if (larger == NULL) return -1;
        to->bytes = larger;
        to->max = 2 * wanted + 1024;
    }
    for (size_t i = 0; i < n_bytes; i++) {
        const char *escape = bytes[i] == '<'   ? "\\u003c"
                             : bytes[i] == '>' ? "\\u003e"
                             : bytes[i] == '&' ? "\\u0026"
                                               : NULL;
        if (escape == NULL) {
            to->bytes[to->n++] = bytes[i];
        } else {
            memcpy(to->bytes + to->n, escape, 6);
            to->n += 6;
        }
    }
    return 0;
}

char *kvl_dashboard_dump(const json_t *value, size_t *n_bytes)
{
    dumped to = {0};
    const size_t flags = JSON_COMPACT | JSON_REAL_PRECISION(9);
    const bool is_whole = json_dump_callback(value, dump_more, &to, flags) == 0;
    *n_bytes = to.n;
    if (is_whole) return to.bytes;
    kvl_free(to.bytes);
    return NULL;
}
