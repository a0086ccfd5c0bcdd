/* http/batches.c: batches as clients see them, and as the disk keeps them. */
#include "base/alloc.h"
#include "base/clock.h"
#include "base/log.h"
#include "http/batches_parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    WINDOW_S = 24 * 60 * 60,
    SHOWN_BYTES_MAX = 64 * 1024,
    METADATA_MAX = 16,
    METADATA_KEY_MAX = 64,
    METADATA_VALUE_MAX = 512
};

/* ---- one batch ---- */

const char *kvl_http_batch_text(const kvl_http_batch *batch, const char *name)
{
    const char *text = json_string_value(json_object_get(batch->shown, name));
    return text == NULL ? "" : text;
}

int64_t kvl_http_batch_time(const kvl_http_batch *batch, const char *name)
{
    return json_integer_value(json_object_get(batch->shown, name));
}

static int64_t wall_ns(void)
{
    const kvl_clock *clock = kvl_clock_system();
    return clock->wall_ns(clock->context);
}

void kvl_http_batch_enter(kvl_http_batch *batch, const char *status)
{
    char name[32];
    (void)snprintf(name, sizeof name, "%s_at", status);
    (void)json_object_set_new(batch->shown, "status", json_string(status));
    if (json_is_null(json_object_get(batch->shown, name)))
        (void)json_object_set_new(batch->shown, name,
                                  json_integer((json_int_t)(wall_ns() / KVL_NS_PER_S)));
}

bool kvl_http_batch_is_over(const kvl_http_batch *batch)
{
    static const char *const ends[] = {"completed", "failed", "expired", "cancelled"};
    const char *status = kvl_http_batch_text(batch, "status");
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        if (strcmp(status, ends[i]) == 0) return true;
    return false;
}

void kvl_http_batch_save(const kvl_http_batch *batch)
{
    char path[PATH_MAX];
    kvl_error error = {0};
    const char *root = kvl_http_files_root(batch->batches->files);
    kvl_status status = kvl_http_path_of(root, batch->tenant, batch->id, ".json", path, &error);
    json_t *kept =
        json_pack("{s:I, s:O}", "created_ns", (json_int_t)batch->created_ns, "shown", batch->shown);
    char *text = kept == NULL ? NULL : json_dumps(kept, JSON_COMPACT);
    json_decref(kept);
    if (status == KVL_OK && text == NULL)
        status = KVL_FAIL(&error, KVL_ERR_NO_MEMORY, "no memory for a batch");
    if (status == KVL_OK) status = kvl_file_write(path, text, strlen(text), &error);
    free(text); /* tidy: free, jansson allocated it */
    if (status != KVL_OK)
        kvl_log(KVL_LOG_ERROR, "batch_not_saved", "id=%s text=\"%s\"", batch->id, error.text);
}

static void destroy(kvl_http_batch *batch)
{
    json_decref(batch->shown);
    kvl_free(batch);
}

/* Keeps batches in the order of their making. */
static void insert(kvl_http_batches *batches, kvl_http_batch *batch)
{
    kvl_http_batch **at = &batches->first;
    while (*at != NULL && (*at)->created_ns <= batch->created_ns) at = &(*at)->next;
    batch->next = *at;
    *at = batch;
    batch->batches = batches;
}

/* ---- loading ---- */

static json_t *read_shown(const char *path, int64_t *created_ns)
{
    char *bytes = NULL;
    size_t n_bytes = 0;
    kvl_error error = {0};
    if (kvl_file_read(path, SHOWN_BYTES_MAX, &bytes, &n_bytes, &error) != KVL_OK) return NULL;
    json_t *kept = json_loadb(bytes, n_bytes, 0, NULL);
    kvl_free(bytes);
    json_t *shown = json_object_get(kept, "shown");
    *created_ns = json_integer_value(json_object_get(kept, "created_ns"));
    const bool is_whole = json_is_string(json_object_get(shown, "status")) &&
                          json_is_string(json_object_get(shown, "input_file_id")) &&
                          json_is_string(json_object_get(shown, "endpoint"));
    json_t *found = is_whole ? json_incref(shown) : NULL;
    json_decref(kept);
    return found;
}

static void load_one(void *context, const char *tenant, const char *name)
{
    kvl_http_batches *batches = context;
    static const char ending[] = ".json";
    const size_t n = strlen(name);
    char id[KVL_HTTP_ID_BYTES];
    char path[PATH_MAX];
    kvl_error error = {0};
    if (n < sizeof ending || n - (sizeof ending - 1) >= sizeof id ||
        strcmp(name + n - (sizeof ending - 1), ending) != 0)
        return;
    memcpy(id, name, n - (sizeof ending - 1));
    id[n - (sizeof ending - 1)] = '\0';
    if (!kvl_http_id_is("batch_", id)) return;
    const char *root = kvl_http_files_root(batches->files);
    if (kvl_http_path_of(root, tenant, name, "", path, &error) != KVL_OK) return;
    kvl_http_batch *made = kvl_alloc_zero(1, sizeof *made);
    if (made != NULL) made->shown = read_shown(path, &made->created_ns);
    if (made == NULL || made->shown == NULL) {
        kvl_log(KVL_LOG_WARN, "batch_not_loaded", "id=%s", id);
        kvl_free(made);
        return;
    }
    memcpy(made->id, id, sizeof id);
    memcpy(made->tenant, tenant, strlen(tenant) + 1);
    insert(batches, made);
}

kvl_status kvl_http_batches_open(kvl_http_files *files, kvl_service *service,
                                 const kvl_http_keys *keys, const char *model_name,
                                 kvl_http_batches **batches, kvl_error *error)
{
    *batches = NULL;
    kvl_http_batches *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for batches");
    made->files = files;
    made->service = service;
    made->keys = keys;
    made->model_name = model_name;
    (void)pthread_mutex_init(&made->lock, NULL);
    pthread_condattr_t attributes;
    (void)pthread_condattr_init(&attributes);
    (void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&made->changed, &attributes);
    (void)pthread_condattr_destroy(&attributes);
    kvl_status status = kvl_http_folders_each(kvl_http_files_root(files), load_one, made, error);
    kvl_service_feed(service, kvl_http_batches_feed, made);
    if (status == KVL_OK) {
        made->has_thread = pthread_create(&made->thread, NULL, kvl_http_batches_work, made) == 0;
        if (!made->has_thread) status = KVL_FAIL(error, KVL_ERR_IO, "cannot start a thread");
    }
    if (status != KVL_OK) {
        kvl_http_batches_close(made);
        return status;
    }
    *batches = made;
    return KVL_OK;
}

void kvl_http_batches_close(kvl_http_batches *batches)
{
    if (batches == NULL) return;
    pthread_mutex_lock(&batches->lock);
    batches->is_stopping = true;
    kvl_batch_cancel(batches->current);
    (void)pthread_cond_broadcast(&batches->changed);
    pthread_mutex_unlock(&batches->lock);
    if (batches->has_thread) (void)pthread_join(batches->thread, NULL);
    while (batches->first != NULL) {
        kvl_http_batch *next = batches->first->next;
        destroy(batches->first);
        batches->first = next;
    }
    (void)pthread_cond_destroy(&batches->changed);
    (void)pthread_mutex_destroy(&batches->lock);
    kvl_free(batches);
}

/* ---- what clients ask ---- */

static bool check_metadata(const json_t *metadata, kvl_api_error *error)
{
    if (metadata == NULL || json_is_null(metadata)) return true;
    if (!json_is_object(metadata) || json_object_size(metadata) > METADATA_MAX)
        return kvl_api_refuse(error, "metadata", "metadata must be an object of up to %d texts",
                              METADATA_MAX);
    const char *key = NULL;
    const json_t *value = NULL;
    json_object_foreach((json_t *)(uintptr_t)metadata, key, value)
    {
        if (!json_is_string(value) || strlen(key) > METADATA_KEY_MAX ||
            json_string_length(value) > METADATA_VALUE_MAX)
            return kvl_api_refuse(error, "metadata",
                                  "keys of metadata have up to %d bytes, values are texts of up to "
                                  "%d",
                                  METADATA_KEY_MAX, METADATA_VALUE_MAX);
    }
    return true;
}

static bool check_body(kvl_http_batches *batches, const char *tenant, const json_t *body,
                       kvl_api_error *error)
{
    const char *file_id = json_string_value(json_object_get(body, "input_file_id"));
    const char *endpoint = json_string_value(json_object_get(body, "endpoint"));
    const char *window = json_string_value(json_object_get(body, "completion_window"));
    const json_t *expires = json_object_get(body, "output_expires_after");
    kvl_http_file file;
    kvl_error failed = {0};
    if (!json_is_object(body)) return kvl_api_refuse(error, "", "the body must be a JSON object");
    if (file_id == NULL)
        return kvl_api_refuse(error, "input_file_id",
                              "input_file_id must be the id of a file of purpose batch");
    if (kvl_http_files_find(batches->files, tenant, file_id, &file, &failed) != KVL_OK ||
        strcmp(file.purpose, "batch") != 0)
        return kvl_api_refuse(error, "input_file_id",
                              "there is no file '%.40s' of purpose batch here", file_id);
    if (endpoint == NULL ||
        (strcmp(endpoint, "/v1/chat/completions") != 0 && strcmp(endpoint, "/v1/completions") != 0))
        return kvl_api_refuse(error, "endpoint",
                              "endpoint must be /v1/chat/completions or /v1/completions");
    if (window == NULL || strcmp(window, "24h") != 0)
        return kvl_api_refuse(error, "completion_window", "completion_window must be \"24h\"");
    if (expires != NULL && !json_is_null(expires))
        return kvl_api_refuse(error, "output_expires_after",
                              "output_expires_after is not supported: files stay until deleted");
    return check_metadata(json_object_get(body, "metadata"), error);
}

static json_t *make_shown(const char *id, const json_t *body, int64_t now_s)
{
    json_t *metadata = json_object_get(body, "metadata");
    json_t *shown = json_pack(
        "{s:s, s:s, s:O, s:n, s:O, s:O, s:s, s:n, s:n, s:I, s:n, s:I, s:n, s:n, s:n, s:n, s:n, s:n,"
        " s:{s:i, s:i, s:i}, s:O?}",
        "id", id, "object", "batch", "endpoint", json_object_get(body, "endpoint"), "errors",
        "input_file_id", json_object_get(body, "input_file_id"), "completion_window",
        json_object_get(body, "completion_window"), "status", "validating", "output_file_id",
        "error_file_id", "created_at", (json_int_t)now_s, "in_progress_at", "expires_at",
        (json_int_t)now_s + WINDOW_S, "finalizing_at", "completed_at", "failed_at", "expired_at",
        "cancelling_at", "cancelled_at", "request_counts", "total", 0, "completed", 0, "failed", 0,
        "metadata", metadata);
    return shown;
}

/* Forgets the oldest that is over, where there are too many; counts those that are not. */
static uint32_t make_room(kvl_http_batches *batches, const char *tenant)
{
    uint32_t n = 0;
    uint32_t n_open = 0;
    kvl_http_batch **oldest = NULL;
    for (kvl_http_batch **at = &batches->first; *at != NULL; at = &(*at)->next) {
        if (strcmp((*at)->tenant, tenant) != 0) continue;
        n++;
        n_open += kvl_http_batch_is_over(*at) ? 0 : 1;
        if (oldest == NULL && kvl_http_batch_is_over(*at)) oldest = at;
    }
    if (n < KVL_HTTP_BATCHES_KEPT_MAX || oldest == NULL) return n_open;
    kvl_http_batch *gone = *oldest;
    *oldest = gone->next;
    char path[PATH_MAX];
    kvl_error error = {0};
    if (kvl_http_path_of(kvl_http_files_root(batches->files), tenant, gone->id, ".json", path,
                         &error) == KVL_OK)
        kvl_ignore(kvl_file_remove(path, &error));
    destroy(gone);
    return n_open;
}

json_t *kvl_http_batches_create(kvl_http_batches *batches, const char *tenant, const char *body,
                                size_t n_bytes, kvl_api_error *error)
{
    json_error_t failed;
    json_t *asked = json_loadb(body, n_bytes, JSON_REJECT_DUPLICATES, &failed);
    if (asked == NULL) {
        (void)kvl_api_refuse(error, "", "the body is no JSON: %s", failed.text);
        return NULL;
    }
    kvl_http_batch *made = kvl_alloc_zero(1, sizeof *made);
    json_t *shown = NULL;
    if (made == NULL) kvl_api_error_from(error, KVL_ERR_NO_MEMORY, "", "no memory for a batch");
    if (made != NULL && check_body(batches, tenant, asked, error)) {
        kvl_http_id_make("batch_", made->id);
        memcpy(made->tenant, tenant, strlen(tenant) + 1);
        made->created_ns = wall_ns();
        made->shown = make_shown(made->id, asked, made->created_ns / KVL_NS_PER_S);
        pthread_mutex_lock(&batches->lock);
        if (made->shown == NULL) {
            kvl_api_error_from(error, KVL_ERR_NO_MEMORY, "", "no memory for a batch");
        } else if (make_room(batches, tenant) >= KVL_HTTP_BATCHES_OPEN_MAX) {
            kvl_api_error_from(error, KVL_ERR_BUSY, "",
                               "too many batches are waiting already; try again later");
        } else {
            insert(batches, made);
            kvl_http_batch_save(made);
            shown = json_deep_copy(made->shown);
            made = NULL;
            (void)pthread_cond_broadcast(&batches->changed);
        }
        pthread_mutex_unlock(&batches->lock);
    }
    if (made != NULL) destroy(made);
    json_decref(asked);
    return shown;
}

static kvl_http_batch *find(kvl_http_batches *batches, const char *tenant, const char *id,
                            kvl_api_error *error)
{
    for (kvl_http_batch *batch = batches->first; batch != NULL; batch = batch->next)
        if (strcmp(batch->id, id) == 0 && strcmp(batch->tenant, tenant) == 0) return batch;
    (void)kvl_api_refuse(error, "", "there is no batch '%.40s' here", id);
    error->http_status = 404;
    return NULL;
}

json_t *kvl_http_batches_find(kvl_http_batches *batches, const char *tenant, const char *id,
                              kvl_api_error *error)
{
    pthread_mutex_lock(&batches->lock);
    const kvl_http_batch *batch = find(batches, tenant, id, error);
    json_t *shown = batch == NULL ? NULL : json_deep_copy(batch->shown);
    pthread_mutex_unlock(&batches->lock);
    return shown;
}

json_t *kvl_http_batches_cancel(kvl_http_batches *batches, const char *tenant, const char *id,
                                kvl_api_error *error)
{
    json_t *shown = NULL;
    pthread_mutex_lock(&batches->lock);
    kvl_http_batch *batch = find(batches, tenant, id, error);
    if (batch != NULL && (kvl_http_batch_is_over(batch) ||
                          strcmp(kvl_http_batch_text(batch, "status"), "finalizing") == 0)) {
        (void)kvl_api_refuse(error, "", "this batch is %s: it cannot be cancelled",
                             kvl_http_batch_text(batch, "status"));
        error->http_status = 409;
    } else if (batch != NULL) {
        kvl_http_batch_enter(batch, "cancelling");
        kvl_http_batch_save(batch);
        shown = json_deep_copy(batch->shown);
        (void)pthread_cond_broadcast(&batches->changed);
    }
    pthread_mutex_unlock(&batches->lock);
    return shown;
}

json_t *kvl_http_batches_list(kvl_http_batches *batches, const char *tenant, const char *after,
                              uint32_t limit)
{
    json_t *all = json_array(); /* newest first */
    pthread_mutex_lock(&batches->lock);
    for (const kvl_http_batch *batch = batches->first; batch != NULL; batch = batch->next)
        if (strcmp(batch->tenant, tenant) == 0) (void)json_array_insert(all, 0, batch->shown);
    json_t *data = json_array();
    bool is_begun = after == NULL;
    bool has_more = false;
    for (size_t i = 0; i < json_array_size(all) && !has_more; i++) {
        const json_t *one = json_array_get(all, i);
        if (!is_begun) {
            is_begun = strcmp(json_string_value(json_object_get(one, "id")), after) == 0;
            continue;
        }
        has_more = json_array_size(data) == limit;
        if (!has_more) (void)json_array_append_new(data, json_deep_copy(one));
    }
    json_decref(all);
    pthread_mutex_unlock(&batches->lock);
    const size_t n = json_array_size(data);
    json_t *first = json_object_get(json_array_get(data, 0), "id");
    json_t *last = n == 0 ? NULL : json_object_get(json_array_get(data, n - 1), "id");
    return json_pack("{s:s, s:o, s:O?, s:O?, s:b}", "object", "list", "data", data, "first_id",
                     first, "last_id", last, "has_more", has_more);
}

bool kvl_http_batches_use(kvl_http_batches *batches, const char *tenant, const char *file_id)
{
    bool is_used = false;
    pthread_mutex_lock(&batches->lock);
    for (const kvl_http_batch *batch = batches->first; batch != NULL; batch = batch->next)
        is_used =
            is_used || (!kvl_http_batch_is_over(batch) && strcmp(batch->tenant, tenant) == 0 &&
                        strcmp(kvl_http_batch_text(batch, "input_file_id"), file_id) == 0);
    pthread_mutex_unlock(&batches->lock);
    return is_used;
}
