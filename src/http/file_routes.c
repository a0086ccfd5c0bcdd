/* http/file_routes.c: /v1/files and /v1/batches: forms, paths and arguments to http/files.h and
 * http/batches.h, and back. */
#include "base/alloc.h"
#include "http/server.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { FORM_BYTES = 64 * 1024, FIELD_BYTES = 64, LIMIT_DEFAULT = 100, LIMIT_MAX = 1000 };

struct kvl_http_form {
    kvl_http *http;
    const char *tenant;
    struct MHD_PostProcessor *processor;
    kvl_http_incoming *incoming;
    char purpose[FIELD_BYTES];
    char filename[KVL_HTTP_FILENAME_BYTES];
    bool has_file;
    kvl_api_error error; /* http_status 0: none */
};

/* ---- forms ---- */

static void refuse_form(kvl_http_form *form, kvl_status status, const char *param, const char *text)
{
    if (form->error.http_status != 0) return;
    kvl_api_error_from(&form->error, status, param, text);
    if (status != KVL_ERR_TOO_LARGE) return;
    form->error.http_status = MHD_HTTP_CONTENT_TOO_LARGE;
    form->error.code = "storage_limit_exceeded";
}

/* The last part of a path, or "file" where that is no name. */
static void take_filename(kvl_http_form *form, const char *given)
{
    const char *slash = strrchr(given, '/');
    const char *name = slash == NULL ? given : slash + 1;
    json_t *text = strlen(name) < sizeof form->filename ? json_string(name) : NULL;
    (void)snprintf(form->filename, sizeof form->filename, "%s",
                   text == NULL || *name == '\0' ? "file" : name);
    json_decref(text);
}

static void take_file(kvl_http_form *form, const char *filename, const char *bytes, size_t n_bytes)
{
    kvl_error error = {0};
    if (!form->has_file) {
        take_filename(form, filename);
        form->has_file = true;
        const kvl_status status = kvl_http_incoming_begin(form->http->files, form->tenant, false,
                                                          &form->incoming, &error);
        if (status != KVL_OK) refuse_form(form, status, "file", error.text);
    }
    if (form->incoming == NULL || form->error.http_status != 0) return;
    const kvl_status status = kvl_http_incoming_add(form->incoming, bytes, n_bytes, &error);
    if (status == KVL_OK) return;
    refuse_form(form, status, "file", error.text);
    kvl_http_incoming_abandon(form->incoming);
    form->incoming = NULL;
}

static enum MHD_Result take_field(void *context, enum MHD_ValueKind kind, const char *key,
                                  const char *filename, const char *type, const char *encoding,
                                  const char *bytes, uint64_t at, size_t n_bytes)
{
    (void)kind;
    (void)type;
    (void)encoding;
    kvl_http_form *form = context;
    if (key == NULL) return MHD_YES;
    if (strcmp(key, "file") == 0 && filename != NULL) {
        take_file(form, filename, bytes, n_bytes);
    } else if (strcmp(key, "purpose") == 0) {
        if (at + n_bytes >= sizeof form->purpose) {
            refuse_form(form, KVL_ERR_INVALID, "purpose", "purpose must be \"batch\"");
        } else {
            memcpy(form->purpose + at, bytes, n_bytes);
        }
    } else if (strncmp(key, "expires_after", strlen("expires_after")) == 0) {
        refuse_form(form, KVL_ERR_INVALID, "expires_after",
                    "expires_after is not supported: files stay until they are deleted");
    }
    return MHD_YES;
}

kvl_http_form *kvl_http_form_begin(kvl_http *http, struct MHD_Connection *connection,
                                   const char *tenant)
{
    kvl_http_form *form = kvl_alloc_zero(1, sizeof *form);
    if (form == NULL) return NULL;
    form->http = http;
    form->tenant = tenant;
    form->processor = MHD_create_post_processor(connection, FORM_BYTES, take_field, form);
    if (form->processor != NULL) return form;
    kvl_free(form);
    return NULL;
}

void kvl_http_form_add(kvl_http_form *form, const char *bytes, size_t n_bytes)
{
    if (form->error.http_status != 0) return;
    if (MHD_post_process(form->processor, bytes, n_bytes) == MHD_NO)
        refuse_form(form, KVL_ERR_MALFORMED, "", "the form is damaged");
}

void kvl_http_form_end(kvl_http_form *form)
{
    if (form == NULL) return;
    if (form->processor != NULL) (void)MHD_destroy_post_processor(form->processor);
    kvl_http_incoming_abandon(form->incoming);
    kvl_free(form);
}

/* ---- replies ---- */

static enum MHD_Result refuse(kvl_http *http, const kvl_http_asked *asked, kvl_http_route route,
                              unsigned status, const char *param, const char *message)
{
    kvl_api_error error;
    (void)kvl_api_refuse(&error, param, "%s", message);
    error.http_status = status;
    return kvl_http_reply_error(http, asked->connection, route, &error);
}

static enum MHD_Result refuse_method(kvl_http *http, const kvl_http_asked *asked,
                                     kvl_http_route route)
{
    return refuse(http, asked, route, MHD_HTTP_METHOD_NOT_ALLOWED, "",
                  "this route has another method");
}

static enum MHD_Result reply_status(kvl_http *http, const kvl_http_asked *asked,
                                    kvl_http_route route, kvl_status status, const char *text)
{
    kvl_api_error error;
    kvl_api_error_from(&error, status, "", text);
    if (status == KVL_ERR_NOT_FOUND) error.http_status = MHD_HTTP_NOT_FOUND;
    return kvl_http_reply_error(http, asked->connection, route, &error);
}

/* Takes the object; NULL is a refusal. */
static enum MHD_Result reply_or_refuse(kvl_http *http, const kvl_http_asked *asked,
                                       kvl_http_route route, json_t *object, kvl_api_error *error)
{
    if (object != NULL) return kvl_http_reply(http, asked->connection, route, MHD_HTTP_OK, object);
    if (error->http_status == 0)
        kvl_api_error_from(error, KVL_ERR_NO_MEMORY, "", "no memory for a reply");
    return kvl_http_reply_error(http, asked->connection, route, error);
}

/* ---- arguments ---- */

static const char *argument(const kvl_http_asked *asked, const char *name)
{
    const char *value = MHD_lookup_connection_value(asked->connection, MHD_GET_ARGUMENT_KIND, name);
    return value == NULL || *value == '\0' ? NULL : value;
}

/* 0: it is no number that may stand there. */
static uint32_t take_limit(const kvl_http_asked *asked, uint32_t otherwise)
{
    const char *text = argument(asked, "limit");
    if (text == NULL) return otherwise;
    char *end = NULL;
    const unsigned long n = strtoul(text, &end, 10);
    const bool is_number = *text >= '0' && *text <= '9' && *end == '\0';
    return is_number && n <= LIMIT_MAX ? (uint32_t)n : 0;
}

/* Cuts "/v1/files/ID/REST" into its parts; ids that are none become "", which nothing has. */
static void cut_path(const char *path, const char *root, const char *prefix, char *id,
                     const char **rest)
{
    id[0] = '\0';
    *rest = "";
    if (strncmp(path, root, strlen(root)) != 0) return;
    const char *begin = path + strlen(root);
    const char *slash = strchr(begin, '/');
    const size_t n = slash == NULL ? strlen(begin) : (size_t)(slash - begin);
    *rest = slash == NULL ? "" : slash + 1;
    if (n >= KVL_HTTP_ID_BYTES) return;
    memcpy(id, begin, n);
    id[n] = '\0';
    if (!kvl_http_id_is(prefix, id)) id[0] = '\0';
}

/* ---- files ---- */

static enum MHD_Result commit_form(kvl_http *http, const kvl_http_asked *asked)
{
    kvl_http_form *form = asked->form;
    if (form == NULL)
        return refuse(http, asked, KVL_ROUTE_FILES, MHD_HTTP_BAD_REQUEST, "",
                      "send multipart/form-data with the fields purpose and file");
    /* What the parser still holds, and whether the form has an end. */
    const enum MHD_Result is_whole = MHD_destroy_post_processor(form->processor);
    form->processor = NULL;
    if (is_whole == MHD_NO) refuse_form(form, KVL_ERR_MALFORMED, "", "the form is cut short");
    if (strcmp(form->purpose, "batch") != 0)
        refuse_form(form, KVL_ERR_INVALID, "purpose",
                    "purpose must be \"batch\": this server has no other use for files");
    if (form->incoming == NULL)
        refuse_form(form, KVL_ERR_INVALID, "file", "the form has no field file with a filename");
    if (form->error.http_status != 0)
        return kvl_http_reply_error(http, asked->connection, KVL_ROUTE_FILES, &form->error);
    kvl_http_file file;
    kvl_error error = {0};
    kvl_http_incoming *incoming = form->incoming;
    form->incoming = NULL;
    const kvl_status status =
        kvl_http_incoming_commit(incoming, NULL, form->filename, "batch", &file, &error);
    if (status != KVL_OK) return reply_status(http, asked, KVL_ROUTE_FILES, status, error.text);
    return kvl_http_reply(http, asked->connection, KVL_ROUTE_FILES, MHD_HTTP_OK,
                          kvl_http_file_json(&file));
}

static enum MHD_Result list_files(kvl_http *http, const kvl_http_asked *asked)
{
    const uint32_t limit = take_limit(asked, LIMIT_MAX);
    const char *order = argument(asked, "order");
    if (limit == 0)
        return refuse(http, asked, KVL_ROUTE_FILES, MHD_HTTP_BAD_REQUEST, "limit",
                      "limit must be a whole number from 1 to 1000");
    if (order != NULL && strcmp(order, "asc") != 0 && strcmp(order, "desc") != 0)
        return refuse(http, asked, KVL_ROUTE_FILES, MHD_HTTP_BAD_REQUEST, "order",
                      "order must be asc or desc");
    kvl_api_error error = {0};
    json_t *list =
        kvl_http_files_list(http->files, asked->tenant, argument(asked, "after"), limit,
                            order != NULL && strcmp(order, "asc") == 0, argument(asked, "purpose"));
    return reply_or_refuse(http, asked, KVL_ROUTE_FILES, list, &error);
}

static enum MHD_Result send_content(kvl_http *http, const kvl_http_asked *asked, const char *id)
{
    int descriptor = -1;
    size_t n_bytes = 0;
    kvl_error error = {0};
    const kvl_status status =
        kvl_http_files_read(http->files, asked->tenant, id, &descriptor, &n_bytes, &error);
    if (status != KVL_OK) return reply_status(http, asked, KVL_ROUTE_FILES, status, error.text);
    struct MHD_Response *response = MHD_create_response_from_fd64(n_bytes, descriptor);
    if (response == NULL) {
        (void)close(descriptor);
        return MHD_NO;
    }
    /* Never shown by a browser as what its sender would like it to be. */
    (void)MHD_add_response_header(response, "Content-Type", "application/octet-stream");
    (void)MHD_add_response_header(response, "X-Content-Type-Options", "nosniff");
    (void)MHD_add_response_header(response, "Cache-Control", "no-store");
    kvl_http_count(http, KVL_ROUTE_FILES, MHD_HTTP_OK);
    const enum MHD_Result result = MHD_queue_response(asked->connection, MHD_HTTP_OK, response);
    MHD_destroy_response(response);
    return result;
}

static enum MHD_Result delete_file(kvl_http *http, const kvl_http_asked *asked, const char *id)
{
    kvl_error error = {0};
    if (kvl_http_batches_use(http->batches, asked->tenant, id))
        return refuse(http, asked, KVL_ROUTE_FILES, MHD_HTTP_CONFLICT, "",
                      "a batch that is under way reads this file: cancel it first");
    const kvl_status status = kvl_http_files_remove(http->files, asked->tenant, id, &error);
    if (status != KVL_OK) return reply_status(http, asked, KVL_ROUTE_FILES, status, error.text);
    return kvl_http_reply(http, asked->connection, KVL_ROUTE_FILES, MHD_HTTP_OK,
                          json_pack("{s:s, s:s, s:b}", "id", id, "object", "file", "deleted", 1));
}

enum MHD_Result kvl_http_answer_files(kvl_http *http, const kvl_http_asked *asked)
{
    const bool is_get = strcmp(asked->method, "GET") == 0;
    char id[KVL_HTTP_ID_BYTES];
    const char *rest = "";
    if (strcmp(asked->path, "/v1/files") == 0) {
        if (strcmp(asked->method, "POST") == 0) return commit_form(http, asked);
        return is_get ? list_files(http, asked) : refuse_method(http, asked, KVL_ROUTE_FILES);
    }
    cut_path(asked->path, "/v1/files/", "file-", id, &rest);
    if (strcmp(rest, "content") == 0 && is_get) return send_content(http, asked, id);
    if (*rest != '\0')
        return refuse(http, asked, KVL_ROUTE_FILES, MHD_HTTP_NOT_FOUND, "",
                      "there is no such route; docs/http-api.md lists them");
    if (strcmp(asked->method, "DELETE") == 0) return delete_file(http, asked, id);
    if (!is_get) return refuse_method(http, asked, KVL_ROUTE_FILES);
    kvl_http_file file;
    kvl_error error = {0};
    const kvl_status status = kvl_http_files_find(http->files, asked->tenant, id, &file, &error);
    if (status != KVL_OK) return reply_status(http, asked, KVL_ROUTE_FILES, status, error.text);
    return kvl_http_reply(http, asked->connection, KVL_ROUTE_FILES, MHD_HTTP_OK,
                          kvl_http_file_json(&file));
}

/* ---- batches ---- */

static enum MHD_Result list_batches(kvl_http *http, const kvl_http_asked *asked)
{
    const uint32_t limit = take_limit(asked, LIMIT_DEFAULT);
    kvl_api_error error = {0};
    if (limit == 0)
        return refuse(http, asked, KVL_ROUTE_BATCHES, MHD_HTTP_BAD_REQUEST, "limit",
                      "limit must be a whole number from 1 to 1000");
    json_t *list =
        kvl_http_batches_list(http->batches, asked->tenant, argument(asked, "after"), limit);
    return reply_or_refuse(http, asked, KVL_ROUTE_BATCHES, list, &error);
}

enum MHD_Result kvl_http_answer_batches(kvl_http *http, const kvl_http_asked *asked)
{
    const bool is_get = strcmp(asked->method, "GET") == 0;
    const bool is_post = strcmp(asked->method, "POST") == 0;
    char id[KVL_HTTP_ID_BYTES];
    const char *rest = "";
    kvl_api_error error = {0};
    json_t *shown = NULL;
    if (strcmp(asked->path, "/v1/batches") == 0) {
        if (is_get) return list_batches(http, asked);
        if (!is_post) return refuse_method(http, asked, KVL_ROUTE_BATCHES);
        shown = kvl_http_batches_create(http->batches, asked->tenant, asked->body, asked->n_bytes,
                                        &error);
        return reply_or_refuse(http, asked, KVL_ROUTE_BATCHES, shown, &error);
    }
    cut_path(asked->path, "/v1/batches/", "batch_", id, &rest);
    if (strcmp(rest, "cancel") == 0) {
        if (!is_post) return refuse_method(http, asked, KVL_ROUTE_BATCHES);
        shown = kvl_http_batches_cancel(http->batches, asked->tenant, id, &error);
    } else if (*rest != '\0') {
        return refuse(http, asked, KVL_ROUTE_BATCHES, MHD_HTTP_NOT_FOUND, "",
                      "there is no such route; docs/http-api.md lists them");
    } else if (is_get) {
        shown = kvl_http_batches_find(http->batches, asked->tenant, id, &error);
    } else {
        return refuse_method(http, asked, KVL_ROUTE_BATCHES);
    }
    return reply_or_refuse(http, asked, KVL_ROUTE_BATCHES, shown, &error);
}
