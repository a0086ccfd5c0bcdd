/* http/http.h: an OpenAI-compatible API over HTTP/1.1, for a service (host/service.h).
 *
 *   POST /v1/chat/completions, /v1/completions, /v1/responses    streaming (SSE) and not
 *   GET  /v1/models, /v1/models/NAME
 *   /v1/files, /v1/batches    with a folder for them: OpenAI's files and batches
 *   GET  /health   200 while the process lives      GET /ready    200 while the engine gets on
 *   GET  /         a page that shows GET /dashboard/data
 *   GET  /version                                   GET /metrics  Prometheus text 0.0.4
 * Errors have OpenAI's shape and name the field. What a request asks for and this server cannot do
 * is 400 and never left out in silence. docs/http-api.md has every field.
 * Access   a UNIX socket or a loopback address; any other address needs API keys. With keys every
 *          route but /, /health and /ready wants one, and each key's tenant has a prefix tree of
 *          its own: nothing of one tenant is found, or timed, by another.
 * Threads  one a connection, at most KVL_HTTP_CONNECTIONS_MAX, which parse, wait and write; the
 *          engine thread is the service's. */
#ifndef KVL_HTTP_HTTP_H
#define KVL_HTTP_HTTP_H

#include "host/host.h"

#define KVL_HTTP_CONNECTIONS_MAX 512u
#define KVL_HTTP_BODY_BYTES_MAX ((size_t)16 << 20)
#define KVL_HTTP_ADDRESS_BYTES 128u

typedef struct kvl_http_options {
    const char *address;   /* "127.0.0.1:8080", "[::1]:8080", port 0 for a free one; "unix:/PATH" */
    const char *keys_file; /* lines "TENANT KEY"; NULL: no keys */
    const char *model_name;    /* what /v1/models and answers call the model */
    const char *quality;       /* of chats that name none; NULL: exact */
    const char *data_path;     /* folder of /v1/files and /v1/batches; NULL: there are none */
    uint64_t tenant_bytes_max; /* of a tenant's files; 0: 1 GiB */
    kvl_host *host; /* whose counts /metrics has too; NULL: there is none; outlives this */
    /* PEM files of a certificate, with its chain, and of its key, which nobody else may read: TLS
     * 1.2 or 1.3 and nothing in the clear. NULL, both: plain HTTP. */
    const char *certificate_file, *certificate_key_file;
} kvl_http_options;

typedef struct kvl_http kvl_http;

/* Listens and serves until kvl_http_stop. Before kvl_service_run. Borrows the service, and, during
 * the call, the texts of the options.
 * Owns     *http: ended with kvl_http_stop, before the service
 * Errors   KVL_ERR_INVALID (address, keys, certificate, quality), KVL_ERR_DENIED (an address that
 *          is not loopback, without keys; a key file that others may read), KVL_ERR_UNSUPPORTED (a
 *          libmicrohttpd without TLS), KVL_ERR_IO (in use, no rights), KVL_ERR_NOT_FOUND,
 *          KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_http_start(const kvl_http_options *options, kvl_service *service,
                                       kvl_http **http, kvl_error *error);
/* Closes connections; answers under way are cancelled. NULL does nothing. */
void kvl_http_stop(kvl_http *http);

/* "http://127.0.0.1:8080" or "https://...", with the port that was given, or "unix:/PATH".
 * Borrowed. */
const char *kvl_http_address(const kvl_http *http);

#endif /* KVL_HTTP_HTTP_H */
