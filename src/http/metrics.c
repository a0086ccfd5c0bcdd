/* http/metrics.c: what is counted, as Prometheus text 0.0.4; and readiness. */
#include "base/alloc.h"
#include "base/clock.h"
#include "http/server.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STUCK_NS (30 * KVL_NS_PER_S)

static const double bounds[KVL_HTTP_BUCKETS - 1] = {0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
                                                    1.0,  2.5,   5.0,  10., 30.};

static const char *const route_names[] = {
    [KVL_ROUTE_CHAT] = "chat_completions",
    [KVL_ROUTE_COMPLETIONS] = "completions",
    [KVL_ROUTE_RESPONSES] = "responses",
    [KVL_ROUTE_MODELS] = "models",
    [KVL_ROUTE_HEALTH] = "health",
    [KVL_ROUTE_READY] = "ready",
    [KVL_ROUTE_VERSION] = "version",
    [KVL_ROUTE_METRICS] = "metrics",
    [KVL_ROUTE_FILES] = "files",
    [KVL_ROUTE_BATCHES] = "batches",
    [KVL_ROUTE_DASHBOARD] = "dashboard",
    [KVL_ROUTE_DASHBOARD_DATA] = "dashboard_data",
    [KVL_ROUTE_NONE] = "none",
};

void kvl_http_count(kvl_http *http, kvl_http_route route, unsigned status)
{
    const unsigned hundreds = status / 100 < 6 ? status / 100 : 0;
    pthread_mutex_lock(&http->lock);
    http->n_answered[route][hundreds]++;
    pthread_mutex_unlock(&http->lock);
}

static void observe(kvl_http_histogram *histogram, double seconds)
{
    uint32_t bucket = 0;
    while (bucket < KVL_HTTP_BUCKETS - 1 && seconds > bounds[bucket]) bucket++;
    histogram->counts[bucket]++;
    histogram->sum += seconds;
}

void kvl_http_observe(kvl_http *http, const kvl_api_request *request, const kvl_api_answer *answer)
{
    const int64_t now = kvl_clock_now(kvl_clock_system());
    pthread_mutex_lock(&http->lock);
    if (answer->first_token_ns != 0)
        observe(&http->ttft,
                (double)(answer->first_token_ns - request->start_ns) / (double)KVL_NS_PER_S);
    http->n_placed += answer->reuse.n_placed;
    http->n_recomputed += answer->reuse.n_recomputed;
    http->n_corrected += answer->reuse.n_corrected;
    observe(&http->total, (double)(now - request->start_ns) / (double)KVL_NS_PER_S);
    pthread_mutex_unlock(&http->lock);
}

bool kvl_http_is_ready(kvl_http *http)
{
    kvl_service_state state;
    kvl_service_state_read(http->service, &state);
    const int64_t idle_ns = kvl_clock_now(kvl_clock_system()) - state.last_step_ns;
    return state.is_running && (state.n_streams == 0 || idle_ns < STUCK_NS);
}

/* ---- text ---- */

static void print_number(FILE *out, const char *name, const char *type, const char *help,
                         double value)
{
    (void)fprintf(out, "# HELP kvloom_%s %s\n# TYPE kvloom_%s %s\nkvloom_%s %.17g\n", name, help,
                  name, type, name, value);
}

static void print_histogram(FILE *out, const char *name, const char *help,
                            const kvl_http_histogram *histogram)
{
    uint64_t n = 0;
    (void)fprintf(out, "# HELP kvloom_%s %s\n# TYPE kvloom_%s histogram\n", name, help, name);
    for (uint32_t i = 0; i < KVL_HTTP_BUCKETS; i++) {
        n += histogram->counts[i];
        if (i + 1 < KVL_HTTP_BUCKETS) {
            (void)fprintf(out, "kvloom_%s_bucket{le=\"%g\"} %" PRIu64 "\n", name, bounds[i], n);
        } else {
            (void)fprintf(out, "kvloom_%s_bucket{le=\"+Inf\"} %" PRIu64 "\n", name, n);
        }
    }
    (void)fprintf(out, "kvloom_%s_sum %.9g\nkvloom_%s_count %" PRIu64 "\n", name, histogram->sum,
                  name, n);
}

static void print_scheduler(FILE *out, const kvl_service_state *state)
{
    const kvl_scheduler_stats *s = &state->scheduler;
    const struct {
        const char *name, *type, *help;
        double value;
    } numbers[] = {
        {"running_answers", "gauge", "Answers that are computed now.", s->n_running},
        {"waiting_answers", "gauge", "Answers that wait for pages or a place.", s->n_waiting},
        {"free_pages", "gauge", "Pages of KV that nobody holds.", s->free_pages},
        {"tree_pages", "gauge", "Pages of KV in the prefix tree.", s->tree_pages},
        {"steps_total", "counter", "Batches run through the model.", (double)s->n_steps},
        {"computed_rows_total", "counter", "Tokens run through the model.",
         (double)s->n_computed_rows},
        {"lookup_requested_tokens_total", "counter", "Prompt tokens of admitted requests.",
         (double)s->n_prompt_tokens},
        {"lookup_hit_tokens_total", "counter", "Prompt tokens found in the prefix tree.",
         (double)s->n_cached_tokens},
        {"answer_tokens_total", "counter", "Tokens of answers.", (double)s->n_answer_tokens},
        {"paused_total", "counter", "Answers paused for want of pages.", (double)s->n_paused},
        {"finished_total", "counter", "Answers that ended.", (double)s->n_finished},
        {"failed_total", "counter", "Answers that ended by an error.", (double)s->n_failed},
        {"refused_total", "counter", "Requests refused for want of room.", (double)s->n_refused},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        print_number(out, numbers[i].name, numbers[i].type, numbers[i].help, numbers[i].value);
}

static void print_requests(FILE *out, const kvl_http *http)
{
    (void)fprintf(out, "# HELP kvloom_http_requests_total Requests answered.\n"
                       "# TYPE kvloom_http_requests_total counter\n");
    for (uint32_t route = 0; route <= KVL_ROUTE_NONE; route++) {
        for (uint32_t hundreds = 1; hundreds < 6; hundreds++) {
            if (http->n_answered[route][hundreds] == 0) continue;
            (void)fprintf(out,
                          "kvloom_http_requests_total{route=\"%s\",code=\"%uxx\"} %" PRIu64 "\n",
                          route_names[route], hundreds, http->n_answered[route][hundreds]);
        }
    }
}

char *kvl_http_metrics_text(kvl_http *http)
{
    char *bytes = NULL;
    size_t n_bytes = 0;
    FILE *out = open_memstream(&bytes, &n_bytes);
    if (out == NULL) return NULL;
    kvl_service_state state;
    kvl_service_state_read(http->service, &state);
    (void)fprintf(out,
                  "# HELP kvloom_build_info Version of this program.\n"
                  "# TYPE kvloom_build_info gauge\n"
                  "kvloom_build_info{version=\"%s\"} 1\n",
                  KVL_VERSION);
    print_number(out, "ready", "gauge", "1 while the engine gets on.", kvl_http_is_ready(http));
    print_scheduler(out, &state);
    pthread_mutex_lock(&http->lock);
    print_requests(out, http);
    print_number(out, "placed_tokens_total", "counter",
                 "Prompt tokens of answers that stood elsewhere and were placed.",
                 (double)http->n_placed);
    print_number(out, "recomputed_tokens_total", "counter", "Of these, computed again.",
                 (double)http->n_recomputed);
    print_histogram(out, "ttft_seconds", "From a request to its first token.", &http->ttft);
    print_histogram(out, "request_seconds", "From a request to its last token.", &http->total);
    pthread_mutex_unlock(&http->lock);
    char *of_host = http->host == NULL ? NULL : kvl_host_metrics_text(http->host);
    if (of_host != NULL) (void)fputs(of_host, out);
    kvl_free(of_host);
    if (fclose(out) != 0) return NULL;
    char *copy = kvl_strdup(bytes);
    free(bytes); /* tidy: free, open_memstream allocated it */
    return copy;
}
