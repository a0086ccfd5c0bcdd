/* http/server.c: the daemon: bodies are collected, keys checked, routes found. Whatever is not in
 * the table of routes is 404; whatever is not open wants a key. */
#include "http/server.h"

#include "base/alloc.h"
#include "base/clock.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { IDLE_SECONDS = 300 };

/* A body as it comes. */
typedef struct upload {
    char *bytes;
    size_t n_bytes, bytes_max;
    bool is_too_large;
    const char *tenant;  /* NULL: no key, or a wrong one */
    kvl_http_form *form; /* of a file; its bytes are not kept here */
} upload;

static const struct {
    const char *path, *method; /* NULL: several */
    kvl_http_route route;
    bool is_open; /* to whoever has no key */
} routes[] = {
    {"/v1/chat/completions", "POST", KVL_ROUTE_CHAT, false},
    {"/v1/completions", "POST", KVL_ROUTE_COMPLETIONS, false},
    {"/v1/responses", "POST", KVL_ROUTE_RESPONSES, false},
    {"/v1/models", "GET", KVL_ROUTE_MODELS, false},
    {"/health", "GET", KVL_ROUTE_HEALTH, true},
    {"/ready", "GET", KVL_ROUTE_READY, true},
    {"/version", "GET", KVL_ROUTE_VERSION, false},
    {"/metrics", "GET", KVL_ROUTE_METRICS, false},
    {"/", "GET", KVL_ROUTE_DASHBOARD, true},
    {"/dashboard/data", "GET", KVL_ROUTE_DASHBOARD_DATA, false},
    {"/v1/files", NULL, KVL_ROUTE_FILES, false},
    {"/v1/batches", NULL, KVL_ROUTE_BATCHES, false},
};
enum { N_ROUTES = sizeof routes / sizeof *routes };

/* Routes with something behind them. */
static const struct {
    const char *path;
    kvl_http_route route;
} prefixes[] = {
    {"/v1/models/", KVL_ROUTE_MODELS},
    {"/v1/files/", KVL_ROUTE_FILES},
    {"/v1/batches/", KVL_ROUTE_BATCHES},
};

static const char models_prefix[] = "/v1/models/";

/* ---- replies ---- */

enum MHD_Result kvl_http_reply_bytes(kvl_http *http, struct MHD_Connection *connection,
                                     kvl_http_route route, unsigned status, const char *type,
                                     const char *const *headers, const char *bytes, size_t n_bytes)
{
    struct MHD_Response *response =
        MHD_create_response_from_buffer(n_bytes, (void *)(uintptr_t)bytes, MHD_RESPMEM_MUST_COPY);
    if (response == NULL) return MHD_NO;
    (void)MHD_add_response_header(response, "Content-Type", type);
    (void)MHD_add_response_header(response, "Cache-Control", "no-store");
    for (; headers != NULL && *headers != NULL; headers += 2)
        (void)MHD_add_response_header(response, headers[0], headers[1]);
    if (status == MHD_HTTP_TOO_MANY_REQUESTS || status == MHD_HTTP_SERVICE_UNAVAILABLE)
        (void)MHD_add_response_header(response, "Retry-After", "1");
    if (status == MHD_HTTP_UNAUTHORIZED)
        (void)MHD_add_response_header(response, "WWW-Authenticate", "Bearer");
    kvl_http_count(http, route, status);
    const enum MHD_Result result = MHD_queue_response(connection, status, response);
    MHD_destroy_response(response);
    return result;
}

typedef struct dumped {
    char *bytes;
    size_t n_bytes, bytes_max;
} dumped;

static int dump_more(const char *bytes, size_t n_bytes, void *context)
{
    dumped *to = context;
    if (to->n_bytes + n_bytes > to->bytes_max) {
        const size_t wanted = 2 * (to->n_bytes + n_bytes) + 512;
        char *larger = kvl_realloc(to->bytes, wanted);
        if (larger == NULL) return -1;
        to->bytes = larger;
        to->bytes_max = wanted;
    }
    memcpy(to->bytes + to->n_bytes, bytes, n_bytes);
    to->n_bytes += n_bytes;
    return 0;
}

enum MHD_Result kvl_http_reply(kvl_http *http, struct MHD_Connection *connection,
                               kvl_http_route route, unsigned status, json_t *body)
{
    dumped to = {0};
    enum MHD_Result result = MHD_NO;
    if (json_dump_callback(body, dump_more, &to, JSON_COMPACT) == 0)
        result = kvl_http_reply_bytes(http, connection, route, status, "application/json", NULL,
                                      to.bytes, to.n_bytes);
    json_decref(body);
    kvl_free(to.bytes);
    return result;
}

enum MHD_Result kvl_http_reply_error(kvl_http *http, struct MHD_Connection *connection,
                                     kvl_http_route route, const kvl_api_error *error)
{
    return kvl_http_reply(http, connection, route, error->http_status, kvl_api_error_json(error));
}

static enum MHD_Result reply_refusal(kvl_http *http, struct MHD_Connection *connection,
                                     kvl_http_route route, unsigned status, const char *code,
                                     const char *message)
{
    kvl_api_error error;
    (void)kvl_api_refuse(&error, "", "%s", message);
    error.http_status = status;
    error.code = code;
    return kvl_http_reply_error(http, connection, route, &error);
}

/* ---- routes ---- */

static json_t *model_json(const kvl_http *http)
{
    const kvl_engine *engine = kvl_service_engine(http->service);
    return json_pack("{s:s, s:s, s:I, s:s, s:I}", "id", http->model_name, "object", "model",
                     "created", (json_int_t)http->start_s, "owned_by", "kvloom", "max_model_len",
                     (json_int_t)engine->n_positions);
}

static enum MHD_Result reply_models(kvl_http *http, struct MHD_Connection *connection,
                                    const char *path)
{
    if (strncmp(path, models_prefix, sizeof models_prefix - 1) != 0) {
        json_t *list = json_array();
        (void)json_array_append_new(list, model_json(http));
        return kvl_http_reply(http, connection, KVL_ROUTE_MODELS, MHD_HTTP_OK,
                              json_pack("{s:s, s:o}", "object", "list", "data", list));
    }
    if (strcmp(path + sizeof models_prefix - 1, http->model_name) != 0)
        return reply_refusal(http, connection, KVL_ROUTE_MODELS, MHD_HTTP_NOT_FOUND,
                             "model_not_found", "there is no such model here");
    return kvl_http_reply(http, connection, KVL_ROUTE_MODELS, MHD_HTTP_OK, model_json(http));
}

static enum MHD_Result reply_metrics(kvl_http *http, struct MHD_Connection *connection)
{
    char *text = kvl_http_metrics_text(http);
    if (text == NULL) return MHD_NO;
    const enum MHD_Result result =
        kvl_http_reply_bytes(http, connection, KVL_ROUTE_METRICS, MHD_HTTP_OK,
                             "text/plain; version=0.0.4; charset=utf-8", NULL, text, strlen(text));
    kvl_free(text);
    return result;
}

static enum MHD_Result reply_stored(kvl_http *http, struct MHD_Connection *connection,
                                    kvl_http_route route, const char *path, const char *method,
                                    const upload *body)
{
    const kvl_http_asked asked = {.connection = connection,
                                  .path = path,
                                  .method = method,
                                  .tenant = body->tenant,
                                  .body = body->bytes == NULL ? "" : body->bytes,
                                  .n_bytes = body->n_bytes,
                                  .form = body->form};
    if (http->files == NULL)
        return reply_refusal(http, connection, route, MHD_HTTP_NOT_FOUND, NULL,
                             "this server keeps no files: start it with --data DIR");
    if (body->is_too_large)
        return reply_refusal(http, connection, route, MHD_HTTP_CONTENT_TOO_LARGE, NULL,
                             "the body has more than 16 MiB");
    return route == KVL_ROUTE_FILES ? kvl_http_answer_files(http, &asked)
                                    : kvl_http_answer_batches(http, &asked);
}

static enum MHD_Result reply_route(kvl_http *http, struct MHD_Connection *connection,
                                   kvl_http_route route, const char *path, const char *method,
                                   const upload *body)
{
    const bool is_ready = kvl_http_is_ready(http);
    switch (route) {
    case KVL_ROUTE_FILES:
    case KVL_ROUTE_BATCHES: return reply_stored(http, connection, route, path, method, body);
    case KVL_ROUTE_CHAT:
    case KVL_ROUTE_COMPLETIONS:
    case KVL_ROUTE_RESPONSES:
        if (body->is_too_large)
            return reply_refusal(http, connection, route, MHD_HTTP_CONTENT_TOO_LARGE, NULL,
                                 "the body has more than 16 MiB");
        return kvl_http_complete(http, connection, route, body->tenant,
                                 body->bytes == NULL ? "" : body->bytes, body->n_bytes);
    case KVL_ROUTE_MODELS: return reply_models(http, connection, path);
    case KVL_ROUTE_HEALTH:
        return kvl_http_reply(http, connection, route, MHD_HTTP_OK,
                              json_pack("{s:s}", "status", "ok"));
    case KVL_ROUTE_READY:
        return kvl_http_reply(http, connection, route,
                              is_ready ? MHD_HTTP_OK : MHD_HTTP_SERVICE_UNAVAILABLE,
                              json_pack("{s:s}", "status", is_ready ? "ready" : "stuck"));
    case KVL_ROUTE_VERSION:
        return kvl_http_reply(http, connection, route, MHD_HTTP_OK,
                              json_pack("{s:s}", "version", KVL_VERSION));
    case KVL_ROUTE_METRICS: return reply_metrics(http, connection);
    case KVL_ROUTE_DASHBOARD: return kvl_http_answer_dashboard(http, connection);
    case KVL_ROUTE_DASHBOARD_DATA:
        return kvl_http_answer_dashboard_data(http, connection, body->tenant);
    case KVL_ROUTE_NONE: break;
    }
    return reply_refusal(http, connection, KVL_ROUTE_NONE, MHD_HTTP_NOT_FOUND, NULL,
                         "there is no such route; docs/http-api.md lists them");
}

static enum MHD_Result dispatch(kvl_http *http, struct MHD_Connection *connection, const char *path,
                                const char *method, const upload *body)
{
    kvl_http_route route = KVL_ROUTE_NONE;
    bool is_open = false;
    bool is_allowed = true;
    kvl_http_route inside = KVL_ROUTE_NONE;
    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++)
        if (strncmp(path, prefixes[i].path, strlen(prefixes[i].path)) == 0)
            inside = prefixes[i].route;
    for (size_t i = 0; i < N_ROUTES; i++) {
        if (strcmp(path, routes[i].path) != 0 &&
            (inside == KVL_ROUTE_NONE || routes[i].route != inside))
            continue;
        route = routes[i].route;
        is_open = routes[i].is_open;
        is_allowed = routes[i].method == NULL || strcmp(method, routes[i].method) == 0;
    }
    if (body->tenant == NULL && !is_open)
        return reply_refusal(http, connection, route, MHD_HTTP_UNAUTHORIZED, "invalid_api_key",
                             "give an API key: Authorization: Bearer KEY");
    if (!is_allowed)
        return reply_refusal(http, connection, route, MHD_HTTP_METHOD_NOT_ALLOWED, NULL,
                             "this route has another method");
    return reply_route(http, connection, route, path, method, body);
}

/* ---- bodies ---- */

static void take_bytes(upload *body, const char *bytes, size_t n_bytes)
{
    /* Nothing is kept of what comes without a key. */
    if (body->is_too_large || body->tenant == NULL) return;
    if (body->form != NULL) {
        kvl_http_form_add(body->form, bytes, n_bytes);
        return;
    }
    if (body->n_bytes + n_bytes > KVL_HTTP_BODY_BYTES_MAX) {
        body->is_too_large = true;
        return;
    }
    if (body->n_bytes + n_bytes > body->bytes_max) {
        const size_t wanted = 2 * (body->n_bytes + n_bytes);
        char *larger = kvl_realloc(body->bytes, wanted);
        if (larger == NULL) {
            body->is_too_large = true;
            return;
        }
        body->bytes = larger;
        body->bytes_max = wanted;
    }
    memcpy(body->bytes + body->n_bytes, bytes, n_bytes);
    body->n_bytes += n_bytes;
}

static enum MHD_Result handle(void *context, struct MHD_Connection *connection, const char *path,
                              const char *method, const char *version, const char *bytes,
                              size_t *n_bytes, void **own)
{
    (void)version;
    kvl_http *http = context;
    if (*own == NULL) {
        upload *begun = kvl_alloc_zero(1, sizeof *begun);
        if (begun == NULL) return MHD_NO;
        begun->tenant = kvl_http_keys_find(
            http->keys, MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Authorization"));
        if (http->files != NULL && begun->tenant != NULL && strcmp(method, "POST") == 0 &&
            strcmp(path, "/v1/files") == 0)
            begun->form = kvl_http_form_begin(http, connection, begun->tenant);
        *own = begun;
        return MHD_YES;
    }
    if (*n_bytes > 0) {
        take_bytes(*own, bytes, *n_bytes);
        *n_bytes = 0;
        return MHD_YES;
    }
    return dispatch(http, connection, path, method, *own);
}

static void end_request(void *context, struct MHD_Connection *connection, void **own,
                        enum MHD_RequestTerminationCode code)
{
    (void)context;
    (void)connection;
    (void)code;
    upload *body = *own;
    if (body != NULL) {
        kvl_http_form_end(body->form);
        kvl_free(body->bytes);
    }
    kvl_free(body);
    *own = NULL;
}

/* ---- life ---- */

static void end(kvl_http *http)
{
    kvl_http_sampler_stop(http->sampler);
    if (http->listener >= 0) (void)close(http->listener);
    if (http->unix_path[0] != '\0') (void)unlink(http->unix_path);
    kvl_http_batches_close(http->batches);
    kvl_http_files_close(http->files);
    kvl_http_keys_close(http->keys);
    kvl_http_tls_end(http);
    (void)pthread_mutex_destroy(&http->lock);
    kvl_free(http);
}

static kvl_status start(kvl_http *http, const kvl_http_options *options, kvl_error *error)
{
    if (options->quality != NULL && !kvl_api_quality_of(options->quality, &http->quality))
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "quality is '%.20s'; it must be exact, balanced, fast, verified or healed",
                        options->quality);
    if (http->quality != KVL_REUSE_EXACT && !kvl_service_fills(http->service))
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "quality '%s' needs a host with a store: give --name, --listen, --store "
                        "and --key-file",
                        options->quality);
    KVL_TRY(kvl_http_keys_open(options->keys_file, &http->keys, error));
    KVL_TRY(kvl_http_tls_load(http, options, error));
    KVL_TRY(kvl_http_listen(http, options->address, error));
    if (options->data_path != NULL) {
        const uint64_t n_max = options->tenant_bytes_max;
        KVL_TRY(kvl_http_files_open(options->data_path, n_max == 0 ? (uint64_t)1 << 30 : n_max,
                                    &http->files, error));
        KVL_TRY(kvl_http_batches_open(http->files, http->service, http->keys, http->model_name,
                                      &http->batches, error));
    }
    KVL_TRY(kvl_http_sampler_start(http, error));
    static const char priorities[] = "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2";
    const struct MHD_OptionItem tls[] = {
        {MHD_OPTION_HTTPS_MEM_CERT, 0, http->certificate},
        {MHD_OPTION_HTTPS_MEM_KEY, 0, http->certificate_key},
        {MHD_OPTION_HTTPS_PRIORITIES, 0, (void *)(uintptr_t)priorities},
        {MHD_OPTION_END, 0, NULL},
    };
    const bool is_secret = http->certificate != NULL;
    http->daemon = MHD_start_daemon(
        MHD_USE_INTERNAL_POLLING_THREAD | MHD_USE_THREAD_PER_CONNECTION | MHD_USE_POLL |
            (is_secret ? MHD_USE_TLS : 0U),
        0, NULL, NULL, handle, http, MHD_OPTION_LISTEN_SOCKET, http->listener,
        MHD_OPTION_NOTIFY_COMPLETED, end_request, NULL, MHD_OPTION_CONNECTION_LIMIT,
        KVL_HTTP_CONNECTIONS_MAX, MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)IDLE_SECONDS,
        MHD_OPTION_ARRAY, is_secret ? tls : tls + 3, MHD_OPTION_END);
    if (http->daemon == NULL)
        return KVL_FAIL(error, KVL_ERR_IO, "cannot start the HTTP server at %s", http->address);
    return KVL_OK;
}

kvl_status kvl_http_start(const kvl_http_options *options, kvl_service *service, kvl_http **http,
                          kvl_error *error)
{
    *http = NULL;
    kvl_http *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for an HTTP server");
    const kvl_clock *clock = kvl_clock_system();
    made->service = service;
    made->host = options->host;
    made->listener = -1;
    made->start_s = clock->wall_ns(clock->context) / KVL_NS_PER_S;
    (void)pthread_mutex_init(&made->lock, NULL);
    (void)snprintf(made->model_name, sizeof made->model_name, "%s", options->model_name);
    const kvl_status status = start(made, options, error);
    if (status != KVL_OK) {
        end(made);
        return status;
    }
    *http = made;
    return KVL_OK;
}

void kvl_http_stop(kvl_http *http)
{
    if (http == NULL) return;
    atomic_store(&http->is_stopping, true);
    MHD_stop_daemon(http->daemon);
    http->listener = -1; /* the daemon has closed it */
    end(http);
}

const char *kvl_http_address(const kvl_http *http)
{
    return http->address;
}
