/* http/dashboard_routes.c: the page, its data, and the thread that takes samples. */
#include "base/alloc.h"
#include "base/clock.h"
#include "http/server.h"

#include <sodium.h>
#include <stdio.h>
#include <string.h>

/* A look that the engine thread has no time for is left out: the page keeps the last one. */
enum { LOOK_MS = 1000, SHA256_TEXT = 64 };

struct kvl_http_sampler {
    kvl_http *http;
    pthread_t thread;
    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t stopping;
    bool is_stopping;
    kvl_dashboard_ring ring;
};

/* ---- samples ---- */

static kvl_dashboard_sample take_sample(kvl_http *http)
{
    kvl_service_state state;
    kvl_service_state_read(http->service, &state);
    kvl_dashboard_sample sample = {.at_ns = kvl_clock_now(kvl_clock_system()),
                                   .n_answer_tokens = state.scheduler.n_answer_tokens,
                                   .n_prompt_tokens = state.scheduler.n_prompt_tokens,
                                   .n_running = state.scheduler.n_running,
                                   .n_waiting = state.scheduler.n_waiting};
    pthread_mutex_lock(&http->lock);
    for (uint32_t i = 0; i < KVL_HTTP_BUCKETS; i++) sample.n_first_tokens += http->ttft.counts[i];
    sample.ttft_s = http->ttft.sum;
    pthread_mutex_unlock(&http->lock);
    return sample;
}

static void *take_samples(void *context)
{
    kvl_http_sampler *sampler = context;
    int64_t next_ns = kvl_clock_now(kvl_clock_system());
    pthread_mutex_lock(&sampler->lock);
    while (!sampler->is_stopping) {
        const kvl_dashboard_sample sample = take_sample(sampler->http);
        kvl_dashboard_add(&sampler->ring, &sample);
        next_ns += KVL_DASHBOARD_PERIOD_S * KVL_NS_PER_S;
        if (next_ns < sample.at_ns) next_ns = sample.at_ns; /* the machine has slept */
        const struct timespec until = {.tv_sec = next_ns / KVL_NS_PER_S,
                                       .tv_nsec = next_ns % KVL_NS_PER_S};
        int waited = 0;
        while (!sampler->is_stopping && waited == 0)
            waited = pthread_cond_timedwait(&sampler->stopping, &sampler->lock, &until);
    }
    pthread_mutex_unlock(&sampler->lock);
    return NULL;
}

static void end_sampler(kvl_http_sampler *sampler)
{
    (void)pthread_cond_destroy(&sampler->stopping);
    (void)pthread_mutex_destroy(&sampler->lock);
    kvl_free(sampler);
}

kvl_status kvl_http_sampler_start(kvl_http *http, kvl_error *error)
{
    kvl_http_sampler *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for samples");
    pthread_condattr_t attributes;
    (void)pthread_condattr_init(&attributes);
    (void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&made->stopping, &attributes);
    (void)pthread_condattr_destroy(&attributes);
    (void)pthread_mutex_init(&made->lock, NULL);
    made->http = http;
    if (pthread_create(&made->thread, NULL, take_samples, made) != 0) {
        end_sampler(made);
        return KVL_FAIL(error, KVL_ERR_IO, "cannot start a thread");
    }
    http->sampler = made;
    return KVL_OK;
}

void kvl_http_sampler_stop(kvl_http_sampler *sampler)
{
    if (sampler == NULL) return;
    pthread_mutex_lock(&sampler->lock);
    sampler->is_stopping = true;
    pthread_cond_signal(&sampler->stopping);
    pthread_mutex_unlock(&sampler->lock);
    (void)pthread_join(sampler->thread, NULL);
    end_sampler(sampler);
}

/* ---- the page ---- */

static void hash_of(const char *text, char hash[SHA256_TEXT])
{
    unsigned char bytes[crypto_hash_sha256_BYTES];
    (void)crypto_hash_sha256(bytes, (const unsigned char *)text, strlen(text));
    (void)sodium_bin2base64(hash, SHA256_TEXT, bytes, sizeof bytes, sodium_base64_VARIANT_ORIGINAL);
}

/* Runs this script, and none that finds its way into the page. */
enum MHD_Result kvl_http_answer_dashboard(kvl_http *http, struct MHD_Connection *connection)
{
    const kvl_dashboard_page *page = &kvl_dashboard_page_text;
    char style[SHA256_TEXT];
    char script[SHA256_TEXT];
    char policy[512];
    hash_of(page->style, style);
    hash_of(page->script, script);
    (void)snprintf(policy, sizeof policy,
                   "default-src 'none'; style-src 'sha256-%s'; script-src 'sha256-%s'; "
                   "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                   "frame-ancestors 'none'",
                   style, script);
    const char *const headers[] = {"Content-Security-Policy",
                                   policy,
                                   "X-Content-Type-Options",
                                   "nosniff",
                                   "Referrer-Policy",
                                   "no-referrer",
                                   NULL};
    const char *const parts[] = {page->head, page->style, page->middle, page->script, page->tail};
    size_t n = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) n += strlen(parts[i]);
    char *bytes = kvl_alloc(n);
    if (bytes == NULL) return MHD_NO;
    n = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        memcpy(bytes + n, parts[i], strlen(parts[i]));
        n += strlen(parts[i]);
    }
    const enum MHD_Result result =
        kvl_http_reply_bytes(http, connection, KVL_ROUTE_DASHBOARD, MHD_HTTP_OK,
                             "text/html; charset=utf-8", headers, bytes, n);
    kvl_free(bytes);
    return result;
}

/* ---- its data ---- */

static json_t *tree_json(kvl_http *http, const char *tenant)
{
    kvl_prefix_view view;
    const uint64_t salt = kvl_http_keys_salt(http->keys, tenant, "");
    if (kvl_service_look(http->service, salt, LOOK_MS, &view) != KVL_OK) return json_null();
    const kvl_engine *engine = kvl_service_engine(http->service);
    return kvl_dashboard_tree(&view, kvl_model_tokenizer(engine->model));
}

static json_t *host_json(kvl_http *http)
{
    if (http->host == NULL) return json_null();
    kvl_host_figures figures;
    kvl_host_figures_read(http->host, &figures);
    return kvl_dashboard_host(&figures);
}

static json_t *curves_json(const kvl_http *http)
{
    kvl_http_sampler *sampler = http->sampler;
    pthread_mutex_lock(&sampler->lock);
    json_t *curves = kvl_dashboard_curves(&sampler->ring, kvl_clock_now(kvl_clock_system()));
    pthread_mutex_unlock(&sampler->lock);
    return curves;
}

static json_t *answers_json(const kvl_scheduler_stats *s)
{
    return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "running",
                     (json_int_t)s->n_running, "waiting", (json_int_t)s->n_waiting, "background",
                     (json_int_t)s->n_background, "tokens", (json_int_t)s->n_answer_tokens,
                     "finished", (json_int_t)s->n_finished, "failed", (json_int_t)s->n_failed,
                     "refused", (json_int_t)s->n_refused, "paused", (json_int_t)s->n_paused);
}

static json_t *reuse_json(kvl_http *http)
{
    pthread_mutex_lock(&http->lock);
    json_t *made =
        json_pack("{s:I, s:I, s:I}", "placed", (json_int_t)http->n_placed, "recomputed",
                  (json_int_t)http->n_recomputed, "corrected", (json_int_t)http->n_corrected);
    pthread_mutex_unlock(&http->lock);
    return made;
}

enum MHD_Result kvl_http_answer_dashboard_data(kvl_http *http, struct MHD_Connection *connection,
                                               const char *tenant)
{
    json_t *tree = tree_json(http, tenant); /* first: the state behind it is as new */
    kvl_service_state state;
    kvl_service_state_read(http->service, &state);
    const kvl_scheduler_stats *s = &state.scheduler;
    const double n_prompt = (double)s->n_prompt_tokens;
    json_t *hits =
        s->n_prompt_tokens == 0 ? json_null() : json_real((double)s->n_cached_tokens / n_prompt);
    json_t *all = json_pack(
        "{s:s, s:s, s:b, s:o, s:{s:I, s:I}, s:{s:I, s:I, s:o}, s:o, s:o, s:o, s:o}", "version",
        KVL_VERSION, "model", http->model_name, "is_ready", kvl_http_is_ready(http), "answers",
        answers_json(s), "pages", "free", (json_int_t)s->free_pages, "tree",
        (json_int_t)s->tree_pages, "prompts", "tokens", (json_int_t)s->n_prompt_tokens, "cached",
        (json_int_t)s->n_cached_tokens, "hit_rate", hits, "reuse", reuse_json(http), "curves",
        curves_json(http), "tree", tree, "host", host_json(http));
    size_t n_bytes = 0;
    char *bytes = all == NULL ? NULL : kvl_dashboard_dump(all, &n_bytes);
    json_decref(all);
    if (bytes == NULL) return MHD_NO;
    static const char *const headers[] = {"X-Content-Type-Options", "nosniff", NULL};
    const enum MHD_Result result =
        kvl_http_reply_bytes(http, connection, KVL_ROUTE_DASHBOARD_DATA, MHD_HTTP_OK,
                             "application/json", headers, bytes, n_bytes);
    kvl_free(bytes);
    return result;
}
