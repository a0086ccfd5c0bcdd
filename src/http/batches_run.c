/* http/batches_run.c: one batch after another, from file to files. */
#include "base/alloc.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/log.h"
#include "http/batches_parts.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

enum { LOOK_MS = 200 };

/* What one run needs; the worker's. */
typedef struct running {
    kvl_http_batches *batches;
    kvl_http_batch *batch; /* kept until it is over: nobody else removes one that is not */
    kvl_batch_options options;
    char in_path[PATH_MAX], out_path[PATH_MAX];
    char in_name[KVL_HTTP_ID_BYTES], url[32];
    const char *ending; /* "completed", "cancelled" or "expired" */
} running;

/* ---- the engine thread ---- */

void kvl_http_batches_feed(void *context, kvl_scheduler *scheduler)
{
    kvl_http_batches *batches = context;
    pthread_mutex_lock(&batches->lock);
    kvl_batch *current = batches->current;
    pthread_mutex_unlock(&batches->lock);
    /* It stays until it is said to be over here, or until no engine thread runs any more. */
    if (current == NULL || kvl_batch_advance(current, scheduler)) return;
    pthread_mutex_lock(&batches->lock);
    batches->current = NULL;
    (void)pthread_cond_broadcast(&batches->changed);
    pthread_mutex_unlock(&batches->lock);
}

/* ---- the end: lines to files ---- */

/* The same for every run of a batch: a crash in the middle leaves no second file. */
static void output_id_of(const kvl_http_batch *batch, const char *kind, char *id)
{
    char text[KVL_DIGEST_TEXT_BYTES];
    kvl_digester digester;
    kvl_digester_init(&digester, NULL, 0);
    kvl_digester_add(&digester, batch->id, strlen(batch->id) + 1);
    kvl_digester_add(&digester, kind, strlen(kind));
    const kvl_digest digest = kvl_digester_end(&digester);
    (void)snprintf(id, KVL_HTTP_ID_BYTES, "file-%.24s", kvl_digest_to_text(&digest, text));
}

/* Those of the lines that were answered, or those that were refused; *n of them. */
static kvl_status write_lines(const kvl_file_map *lines, bool are_good, kvl_http_incoming *to,
                              uint32_t *n, kvl_error *error)
{
    const char *bytes = (const char *)lines->bytes;
    for (size_t at = 0; at < lines->n_bytes;) {
        const char *end = memchr(bytes + at, '\n', lines->n_bytes - at);
        if (end == NULL) break;
        const size_t n_bytes = (size_t)(end - (bytes + at)) + 1;
        json_t *line = json_loadb(bytes + at, n_bytes, 0, NULL);
        const json_t *code = json_object_get(json_object_get(line, "response"), "status_code");
        const bool is_wanted = line != NULL && (json_integer_value(code) == 200) == are_good;
        json_decref(line);
        if (is_wanted) KVL_TRY(kvl_http_incoming_add(to, bytes + at, n_bytes, error));
        *n += is_wanted ? 1 : 0;
        at += n_bytes;
    }
    return KVL_OK;
}

/* *id is "" where there is nothing to write. */
static kvl_status write_output(const running *r, bool are_good, char *id, kvl_error *error)
{
    kvl_file_map lines = {0};
    kvl_http_incoming *to = NULL;
    uint32_t n = 0;
    id[0] = '\0';
    const kvl_status opened = kvl_file_map_open(r->out_path, &lines, error);
    if (opened == KVL_ERR_NOT_FOUND) return KVL_OK;
    if (opened != KVL_OK) return opened;
    kvl_status status =
        kvl_http_incoming_begin(r->batches->files, r->batch->tenant, true, &to, error);
    if (status == KVL_OK) status = write_lines(&lines, are_good, to, &n, error);
    kvl_file_map_close(&lines);
    if (status != KVL_OK || n == 0) {
        kvl_http_incoming_abandon(to);
        return status;
    }
    char name[KVL_HTTP_FILENAME_BYTES];
    kvl_http_file file;
    output_id_of(r->batch, are_good ? "output" : "error", id);
    (void)snprintf(name, sizeof name, "%s_%s.jsonl", r->batch->id, are_good ? "output" : "error");
    return kvl_http_incoming_commit(to, id, name, "batch_output", &file, error);
}

static void fail(const running *r, const kvl_error *failed)
{
    kvl_log(KVL_LOG_WARN, "batch_failed", "id=%s status=%s text=\"%s\"", r->batch->id,
            kvl_status_name(failed->status), failed->text);
    const bool is_ours = kvl_status_class_of(failed->status) != KVL_CLASS_REFUSE &&
                         failed->status != KVL_ERR_MALFORMED;
    pthread_mutex_lock(&r->batches->lock);
    (void)json_object_set_new(
        r->batch->shown, "errors",
        json_pack("{s:s, s:[{s:s, s:s, s:n, s:n}]}", "object", "list", "data", "code",
                  is_ours ? "server_error" : "invalid_request", "message",
                  is_ours ? kvl_status_sentence(failed->status) : failed->text, "param", "line"));
    kvl_http_batch_enter(r->batch, "failed");
    kvl_http_batch_save(r->batch);
    pthread_mutex_unlock(&r->batches->lock);
    kvl_error error;
    kvl_ignore(kvl_file_remove(r->out_path, &error));
}

static void finalize(const running *r)
{
    char output[KVL_HTTP_ID_BYTES];
    char errors[KVL_HTTP_ID_BYTES];
    kvl_error error = {0};
    kvl_status status = write_output(r, true, output, &error);
    if (status == KVL_OK) status = write_output(r, false, errors, &error);
    if (status != KVL_OK) {
        fail(r, &error);
        return;
    }
    pthread_mutex_lock(&r->batches->lock);
    json_t *shown = r->batch->shown;
    if (output[0] != '\0') (void)json_object_set_new(shown, "output_file_id", json_string(output));
    if (errors[0] != '\0') (void)json_object_set_new(shown, "error_file_id", json_string(errors));
    kvl_http_batch_enter(r->batch, r->ending);
    kvl_http_batch_save(r->batch);
    pthread_mutex_unlock(&r->batches->lock);
    kvl_ignore(kvl_file_remove(r->out_path, &error));
}

/* ---- rows ---- */

static uint64_t salt_of(void *context, const char *cache_salt)
{
    const running *r = context;
    return kvl_http_keys_salt(r->batches->keys, r->batch->tenant, cache_salt);
}

static bool has_status(const kvl_http_batch *batch, const char *status)
{
    return strcmp(kvl_http_batch_text(batch, "status"), status) == 0;
}

/* With the lock held: whether this batch must begin no further rows, and as what it then ends. */
static bool must_end(running *r)
{
    const kvl_clock *clock = kvl_clock_system();
    if (has_status(r->batch, "cancelling")) {
        r->ending = "cancelled";
        return true;
    }
    if (clock->wall_ns(clock->context) / KVL_NS_PER_S <=
        kvl_http_batch_time(r->batch, "expires_at"))
        return false;
    r->ending = "expired";
    return true;
}

static void show_counts(const running *r, const kvl_batch *batch)
{
    kvl_batch_progress now;
    kvl_batch_progress_read(batch, &now);
    (void)json_object_set_new(r->batch->shown, "request_counts",
                              json_pack("{s:i, s:i, s:i}", "total", (int)now.n_rows, "completed",
                                        (int)now.n_answered, "failed", (int)now.n_refused));
}

static void wait_a_little(kvl_http_batches *batches)
{
    const int64_t at = kvl_clock_now(kvl_clock_system()) + LOOK_MS * KVL_NS_PER_MS;
    const struct timespec deadline = {.tv_sec = at / KVL_NS_PER_S, .tv_nsec = at % KVL_NS_PER_S};
    (void)pthread_cond_timedwait(&batches->changed, &batches->lock, &deadline);
}

static bool engine_runs(const kvl_http_batches *batches)
{
    kvl_service_state state;
    kvl_service_state_read(batches->service, &state);
    return state.is_running;
}

/* Lets the engine thread compute the rows. False: this program ends, and the batch has not. */
static bool compute(running *r, kvl_batch *batch)
{
    kvl_http_batches *batches = r->batches;
    pthread_mutex_lock(&batches->lock);
    if (!has_status(r->batch, "cancelling")) kvl_http_batch_enter(r->batch, "in_progress");
    show_counts(r, batch);
    kvl_http_batch_save(r->batch);
    batches->current = batch;
    while (batches->current != NULL && (!batches->is_stopping || engine_runs(batches))) {
        if (batches->is_stopping || must_end(r)) kvl_batch_cancel(batch);
        kvl_service_wake(batches->service);
        wait_a_little(batches);
        show_counts(r, batch);
    }
    batches->current = NULL;
    show_counts(r, batch);
    const bool is_over = !batches->is_stopping;
    /* A batch that was ended before its time goes from that straight to its end, also where a crash
     * comes between. */
    if (is_over && strcmp(r->ending, "completed") == 0)
        kvl_http_batch_enter(r->batch, "finalizing");
    kvl_http_batch_save(r->batch);
    pthread_mutex_unlock(&batches->lock);
    return is_over;
}

static kvl_status prepare(running *r, kvl_error *error)
{
    const char *root = kvl_http_files_root(r->batches->files);
    kvl_http_file file;
    KVL_TRY(kvl_http_files_find(r->batches->files, r->batch->tenant, r->in_name, &file, error));
    KVL_TRY(kvl_http_path_of(root, r->batch->tenant, r->in_name, ".data", r->in_path, error));
    r->options = (kvl_batch_options){.in_path = r->in_path,
                                     .in_name = r->in_name,
                                     .out_path = r->out_path,
                                     .model_name = r->batches->model_name,
                                     .url = r->url,
                                     .is_background = true,
                                     .salt = salt_of,
                                     .salt_context = r};
    return KVL_OK;
}

static void run_rows(running *r)
{
    kvl_error error = {0};
    kvl_batch *batch = NULL;
    kvl_status status = prepare(r, &error);
    if (status == KVL_OK)
        status =
            kvl_batch_open(kvl_service_engine(r->batches->service), &r->options, &batch, &error);
    if (status != KVL_OK) {
        fail(r, &error);
        return;
    }
    const bool is_over = compute(r, batch);
    status = kvl_batch_close(batch, NULL, &error);
    if (!is_over) return;
    if (status != KVL_OK) {
        fail(r, &error);
        return;
    }
    finalize(r);
}

/* The oldest that is not over; with the lock held. */
static kvl_http_batch *next_batch(const kvl_http_batches *batches)
{
    kvl_http_batch *batch = batches->first;
    while (batch != NULL && kvl_http_batch_is_over(batch)) batch = batch->next;
    return batch;
}

static void run_batch(running *r)
{
    kvl_error error = {0};
    r->ending = "completed";
    pthread_mutex_lock(&r->batches->lock);
    (void)snprintf(r->in_name, sizeof r->in_name, "%s",
                   kvl_http_batch_text(r->batch, "input_file_id"));
    (void)snprintf(r->url, sizeof r->url, "%s", kvl_http_batch_text(r->batch, "endpoint"));
    const bool is_computed = has_status(r->batch, "finalizing");
    const bool is_ended = !is_computed && must_end(r);
    pthread_mutex_unlock(&r->batches->lock);
    const kvl_status status =
        kvl_http_path_of(kvl_http_files_root(r->batches->files), r->batch->tenant, r->batch->id,
                         ".lines", r->out_path, &error);
    if (status != KVL_OK) {
        fail(r, &error);
    } else if (is_computed || is_ended) {
        finalize(r);
    } else {
        run_rows(r);
    }
}

void *kvl_http_batches_work(void *context)
{
    kvl_http_batches *batches = context;
    running *r = kvl_alloc_zero(1, sizeof *r);
    if (r == NULL) {
        kvl_log(KVL_LOG_ERROR, "batches_not_run", "text=\"no memory for a batch\"");
        return NULL;
    }
    pthread_mutex_lock(&batches->lock);
    while (!batches->is_stopping) {
        kvl_http_batch *batch = next_batch(batches);
        if (batch == NULL) {
            (void)pthread_cond_wait(&batches->changed, &batches->lock);
            continue;
        }
        pthread_mutex_unlock(&batches->lock);
        *r = (running){.batches = batches, .batch = batch};
        run_batch(r);
        pthread_mutex_lock(&batches->lock);
    }
    pthread_mutex_unlock(&batches->lock);
    kvl_free(r);
    return NULL;
}
