/* http/server.h: what the files around the sockets share. Private to the room. */
#ifndef KVL_HTTP_SERVER_H
#define KVL_HTTP_SERVER_H

#include "http/api.h"
#include "http/batches.h"
#include "http/dashboard.h"
#include "http/http.h"
#include "http/keys.h"

#include <microhttpd.h>
#include <pthread.h>
#include <stdatomic.h>

/* Upper bounds of the buckets of times, in seconds; the last is infinite. */
#define KVL_HTTP_BUCKETS 12u

typedef struct kvl_http_histogram {
    uint64_t counts[KVL_HTTP_BUCKETS];
    double sum;
} kvl_http_histogram;

typedef enum kvl_http_route {
    KVL_ROUTE_CHAT,
    KVL_ROUTE_COMPLETIONS,
    KVL_ROUTE_RESPONSES,
    KVL_ROUTE_MODELS,
    KVL_ROUTE_HEALTH,
    KVL_ROUTE_READY,
    KVL_ROUTE_VERSION,
    KVL_ROUTE_METRICS,
    KVL_ROUTE_FILES,
    KVL_ROUTE_BATCHES,
    KVL_ROUTE_DASHBOARD,      /* the page */
    KVL_ROUTE_DASHBOARD_DATA, /* what it shows */
    KVL_ROUTE_NONE,
} kvl_http_route;

struct kvl_http {
    kvl_service *service;
    kvl_host *host; /* whose counts are shown too, or NULL */
    kvl_http_keys *keys;
    kvl_http_files *files; /* NULL, both: no folder for them was given */
    kvl_http_batches *batches;
    struct MHD_Daemon *daemon;
    int listener;
    char *certificate, *certificate_key; /* PEM; NULL: no TLS */
    char address[KVL_HTTP_ADDRESS_BYTES + 16];
    char unix_path[KVL_HTTP_ADDRESS_BYTES]; /* to remove at the end, or "" */
    char model_name[128];
    kvl_reuse_quality quality; /* of chats that name none */
    int64_t start_s;
    _Atomic bool is_stopping;
    pthread_mutex_t lock;                       /* of what follows */
    uint64_t n_answered[KVL_ROUTE_NONE + 1][6]; /* by hundreds of the status code */
    kvl_http_histogram ttft, total;
    uint64_t n_placed, n_recomputed, n_corrected; /* tokens, of kvl_reuse_report */
    kvl_http_sampler *sampler;
};

/* ---- listen.c ---- */

/* Errors   as kvl_http_start */
KVL_MUST_USE kvl_status kvl_http_listen(kvl_http *http, const char *address, kvl_error *error);

/* ---- tls.c ---- */

/* Reads certificate and key into `http`; without them does nothing. Errors   as kvl_http_start */
KVL_MUST_USE kvl_status kvl_http_tls_load(kvl_http *http, const kvl_http_options *options,
                                          kvl_error *error);
void kvl_http_tls_end(kvl_http *http);

/* ---- completions.c ---- */

/* Answers a whole request: waits, or streams. `tenant` is borrowed for the call. */
KVL_MUST_USE enum MHD_Result kvl_http_complete(kvl_http *http, struct MHD_Connection *connection,
                                               kvl_http_route route, const char *tenant,
                                               const char *body, size_t n_bytes);

/* ---- file_routes.c ---- */

/* A form that comes in: fields, and a file that goes to the disk as it comes. */
typedef struct kvl_http_form kvl_http_form;

/* NULL without memory, or where the body is no form. `tenant` is borrowed while it lives. */
kvl_http_form *kvl_http_form_begin(kvl_http *http, struct MHD_Connection *connection,
                                   const char *tenant);
void kvl_http_form_add(kvl_http_form *form, const char *bytes, size_t n_bytes);
/* What was not made a file is gone. NULL does nothing. */
void kvl_http_form_end(kvl_http_form *form);

/* What a request of these routes brings. */
typedef struct kvl_http_asked {
    struct MHD_Connection *connection;
    const char *path, *method, *tenant;
    const char *body; /* [n_bytes] */
    size_t n_bytes;
    kvl_http_form *form; /* of an upload */
} kvl_http_asked;

KVL_MUST_USE enum MHD_Result kvl_http_answer_files(kvl_http *http, const kvl_http_asked *asked);
KVL_MUST_USE enum MHD_Result kvl_http_answer_batches(kvl_http *http, const kvl_http_asked *asked);

/* ---- server.c ---- */

/* Queues a JSON body, which it ends. */
KVL_MUST_USE enum MHD_Result kvl_http_reply(kvl_http *http, struct MHD_Connection *connection,
                                            kvl_http_route route, unsigned status, json_t *body);
KVL_MUST_USE enum MHD_Result kvl_http_reply_error(kvl_http *http, struct MHD_Connection *connection,
                                                  kvl_http_route route, const kvl_api_error *error);

/* Queues bytes, which it copies. headers: pairs of name and value, ended by NULL; or NULL */
KVL_MUST_USE enum MHD_Result kvl_http_reply_bytes(kvl_http *http, struct MHD_Connection *connection,
                                                  kvl_http_route route, unsigned status,
                                                  const char *type, const char *const *headers,
                                                  const char *bytes, size_t n_bytes);

/* ---- dashboard_routes.c ---- */

/* Begins to take a sample every KVL_DASHBOARD_PERIOD_S, until it is ended.
 * Errors   KVL_ERR_NO_MEMORY, KVL_ERR_IO (no thread) */
KVL_MUST_USE kvl_status kvl_http_sampler_start(kvl_http *http, kvl_error *error);
/* NULL does nothing. */
void kvl_http_sampler_stop(kvl_http_sampler *sampler);

KVL_MUST_USE enum MHD_Result kvl_http_answer_dashboard(kvl_http *http,
                                                       struct MHD_Connection *connection);
/* Texts are those of `tenant` alone. */
KVL_MUST_USE enum MHD_Result kvl_http_answer_dashboard_data(kvl_http *http,
                                                            struct MHD_Connection *connection,
                                                            const char *tenant);

/* ---- metrics.c ---- */

void kvl_http_count(kvl_http *http, kvl_http_route route, unsigned status);
void kvl_http_observe(kvl_http *http, const kvl_api_request *request, const kvl_api_answer *answer);
/* Prometheus text, ended with kvl_free; NULL without memory. */
char *kvl_http_metrics_text(kvl_http *http);
/* Whether the engine thread gets on: false with work and no step for half a minute. */
bool kvl_http_is_ready(kvl_http *http);

#endif /* KVL_HTTP_SERVER_H */
