/* http/batch.c: lines to requests, requests through the scheduler, answers to lines. */
#include "http/batch.h"

#include "base/alloc.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/hash.h"
#include "host/batch_plan.h"
#include "http/api.h"
#include "model/model.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { AHEAD = 16, SYNC_MS = 2000, PROGRESS_MS = 500 };

typedef struct row {
    kvl_batch *batch;
    const char *custom_id; /* borrowed from line */
    json_t *line;
    kvl_api_request request;
    kvl_api_answer *answer; /* while it is under way */
    kvl_api_error error;    /* http_status 0: none */
    uint32_t group;
    uint64_t id; /* of the scheduler, while it is under way */
} row;

/* What holds a group's shared pages: from its first row's beginning to its last row's end. */
typedef struct pin {
    kvl_sequence sequence;
    uint32_t n_open; /* rows not ended */
    bool is_begun, is_given_up;
} pin;

struct kvl_batch {
    const kvl_engine *engine;
    const kvl_batch_options *options;
    row *rows; /* [n_rows] */
    uint32_t n_rows, n_in_flight, n_done;
    uint32_t n_runnable, next; /* rows that can run, in the plan's order; the first not begun */
    uint64_t n_paused;         /* of the scheduler, when it was looked at last */
    _Atomic bool is_cancelled;
    bool has_cancelled; /* those under way */
    _Atomic uint32_t n_answered, n_refused;
    kvl_batch_plan plan;
    pin *pins; /* [plan.n_groups] */
    uint32_t first_pin, past_pin;
    kvl_line_file out;
    /* By custom id: 1 answered in an earlier run, 0 refused then, false a row of this file. */
    json_t *known;
    uint32_t n_known_good;
    kvl_batch_result result;
    kvl_status status; /* the first thing that went wrong */
    kvl_error error;
    int64_t start_ns, synced_ns, shown_ns;
};

/* ---- reading ---- */

/* Custom ids of whole lines of an earlier run. */
static kvl_status read_known(kvl_batch *b)
{
    char *bytes = NULL;
    size_t n_bytes = 0;
    b->known = json_object();
    const kvl_status status =
        kvl_file_read(b->options->out_path, KVL_BATCH_FILE_BYTES_MAX, &bytes, &n_bytes, &b->error);
    if (status == KVL_ERR_NOT_FOUND) return KVL_OK;
    if (status != KVL_OK) return status;
    for (size_t at = 0; at < n_bytes;) {
        const char *end = memchr(bytes + at, '\n', n_bytes - at);
        if (end == NULL) break;
        json_t *line = json_loadb(bytes + at, (size_t)(end - (bytes + at)), 0, NULL);
        const char *id = json_string_value(json_object_get(line, "custom_id"));
        const json_t *code = json_object_get(json_object_get(line, "response"), "status_code");
        if (id != NULL)
            (void)json_object_set_new(b->known, id,
                                      json_integer(json_integer_value(code) == 200 ? 1 : 0));
        json_decref(line);
        at = (size_t)(end - bytes) + 1;
    }
    kvl_free(bytes);
    return KVL_OK;
}

static const char *name_of(const kvl_batch *b)
{
    return b->options->in_name == NULL ? b->options->in_path : b->options->in_name;
}

static uint64_t salt_of(const kvl_batch *b, const char *cache_salt)
{
    if (b->options->salt != NULL) return b->options->salt(b->options->salt_context, cache_salt);
    return kvl_checksum(cache_salt, strlen(cache_salt));
}

static kvl_status parse_line(kvl_batch *b, const char *bytes, size_t n_bytes, uint32_t number)
{
    json_error_t failed;
    json_t *line = json_loadb(bytes, n_bytes, JSON_REJECT_DUPLICATES, &failed);
    const char *id = json_string_value(json_object_get(line, "custom_id"));
    const char *url = json_string_value(json_object_get(line, "url"));
    json_t *body = json_object_get(line, "body");
    const bool is_chat = url != NULL && strcmp(url, "/v1/chat/completions") == 0;
    const bool is_text = url != NULL && strcmp(url, "/v1/completions") == 0;
    const bool is_wanted =
        (is_chat || is_text) && (b->options->url == NULL || strcmp(url, b->options->url) == 0);
    if (id == NULL || strlen(id) > KVL_CUSTOM_ID_BYTES_MAX || !json_is_object(body) || !is_wanted) {
        json_decref(line);
        return KVL_FAIL(&b->error, KVL_ERR_MALFORMED,
                        "line %u of %s must have a custom_id of up to %u bytes, url %s, and a body",
                        number, name_of(b), KVL_CUSTOM_ID_BYTES_MAX,
                        b->options->url == NULL ? "/v1/chat/completions or /v1/completions"
                                                : b->options->url);
    }
    if (json_object_get(b->known, id) != NULL) {
        const json_t *code = json_object_get(b->known, id);
        const bool is_answered = json_is_integer(code);
        b->n_known_good += json_integer_value(code) == 1 ? 1 : 0;
        json_decref(line);
        b->result.n_resumed += is_answered ? 1 : 0;
        if (is_answered) return KVL_OK;
        return KVL_FAIL(&b->error, KVL_ERR_MALFORMED,
                        "line %u of %s has the custom_id of an earlier line", number, name_of(b));
    }
    (void)json_object_set_new(b->known, id, json_false());
    row *own = &b->rows[b->n_rows++];
    *own = (row){.batch = b, .line = line, .custom_id = id};
    char *text = json_dumps(body, JSON_COMPACT);
    if (text == NULL) return KVL_FAIL(&b->error, KVL_ERR_NO_MEMORY, "no memory for a request");
    if (kvl_api_request_parse(b->engine, b->options->model_name,
                              is_chat ? KVL_API_CHAT : KVL_API_TEXT, text, strlen(text),
                              &own->request, &own->error) &&
        own->request.is_stream)
        (void)kvl_api_refuse(&own->error, "stream", "a batch's answers are not streamed");
    own->request.generation.salt = salt_of(b, own->request.cache_salt);
    free(text); /* tidy: free, jansson allocated it */
    return KVL_OK;
}

static kvl_status read_rows(kvl_batch *b)
{
    char *bytes = NULL;
    size_t n_bytes = 0;
    KVL_TRY(
        kvl_file_read(b->options->in_path, KVL_BATCH_FILE_BYTES_MAX, &bytes, &n_bytes, &b->error));
    size_t n_lines = 1;
    for (size_t i = 0; i < n_bytes; i++) n_lines += bytes[i] == '\n';
    b->rows = kvl_alloc_zero(n_lines, sizeof *b->rows);
    kvl_status status = KVL_OK;
    if (n_lines > KVL_BATCH_ROWS_MAX + 1)
        status = KVL_FAIL(&b->error, KVL_ERR_TOO_LARGE, "%s has %zu lines; at most %u", name_of(b),
                          n_lines, KVL_BATCH_ROWS_MAX);
    else if (b->rows == NULL)
        status = KVL_FAIL(&b->error, KVL_ERR_NO_MEMORY, "no memory for %zu rows", n_lines);
    uint32_t number = 0;
    for (size_t at = 0; at < n_bytes && status == KVL_OK;) {
        const char *end = memchr(bytes + at, '\n', n_bytes - at);
        const size_t n = end == NULL ? n_bytes - at : (size_t)(end - (bytes + at));
        number++;
        b->result.n_rows += n > 0;
        if (n > 0) status = parse_line(b, bytes + at, n, number);
        at += n + 1;
    }
    kvl_free(bytes);
    return status;
}

/* ---- the plan ---- */

/* Rows that can run, in the order of the plan or of the file; refused ones are answered at once. */
static kvl_status plan_rows(kvl_batch *b, const uint32_t *runnable)
{
    const uint32_t n = b->n_runnable;
    kvl_batch_row *asked = kvl_alloc_zero(n == 0 ? 1 : n, sizeof *asked);
    if (asked == NULL) return KVL_FAIL(&b->error, KVL_ERR_NO_MEMORY, "no memory for a plan");
    for (uint32_t i = 0; i < n; i++) {
        const kvl_generation *g = &b->rows[runnable[i]].request.generation;
        asked[i] = (kvl_batch_row){g->ids, g->n_ids, g->max_tokens * g->n_branches};
    }
    kvl_status status = kvl_batch_plan_make(asked, n, &b->plan, &b->error);
    kvl_free(asked);
    if (status != KVL_OK) return status;
    b->result.n_groups = b->plan.n_groups;
    b->result.n_distinct_tokens = b->plan.n_distinct;
    b->pins = kvl_alloc_zero(b->plan.n_groups + 1, sizeof *b->pins);
    if (b->pins == NULL) return KVL_FAIL(&b->error, KVL_ERR_NO_MEMORY, "no memory for a plan");
    for (uint32_t g = 0; g < b->plan.n_groups; g++) {
        const kvl_batch_group *group = &b->plan.groups[g];
        b->pins[g].n_open = group->n_rows;
        for (uint32_t i = group->first; i < group->first + group->n_rows; i++)
            b->rows[runnable[b->plan.order[i]]].group = g;
    }
    for (uint32_t i = 0; i < n; i++)
        b->plan.order[i] =
            b->options->order == KVL_BATCH_BY_FILE ? runnable[i] : runnable[b->plan.order[i]];
    return KVL_OK;
}

/* ---- answers ---- */

static void remember_failure(kvl_batch *b, kvl_status status)
{
    if (b->status == KVL_OK) b->status = status;
}

static void write_answer(kvl_batch *b, row *own)
{
    const bool is_good = own->error.http_status == 0;
    json_t *body =
        is_good ? kvl_api_whole(&own->request, own->answer) : kvl_api_error_json(&own->error);
    json_t *line = json_pack("{s:s, s:s, s:{s:i, s:s, s:o}, s:n}", "id", own->request.id,
                             "custom_id", own->custom_id, "response", "status_code",
                             is_good ? 200 : (int)own->error.http_status, "request_id",
                             own->request.id, "body", body, "error");
    char *text = line == NULL ? NULL : json_dumps(line, JSON_COMPACT);
    json_decref(line);
    kvl_status status = KVL_OK;
    if (text == NULL) {
        status = KVL_FAIL(&b->error, KVL_ERR_NO_MEMORY, "no memory for an answer");
    } else if (b->status == KVL_OK) {
        status = kvl_line_file_add(&b->out, text, strlen(text), &b->error);
    }
    free(text); /* tidy: free, jansson allocated it */
    if (status != KVL_OK) remember_failure(b, status);
    b->result.n_answered += is_good ? 1 : 0;
    b->result.n_refused += is_good ? 0 : 1;
    atomic_fetch_add(is_good ? &b->n_answered : &b->n_refused, 1);
}

static void end_row(kvl_batch *b, row *own)
{
    if (own->answer != NULL) kvl_api_answer_deinit(own->answer);
    kvl_free(own->answer);
    own->answer = NULL;
    own->id = 0;
    b->n_done++;
}

static void note_event(kvl_batch *b, row *own, const kvl_generation_event *event)
{
    if (event->drawn != NULL && own->answer->first_token_ns == 0)
        own->answer->first_token_ns = kvl_clock_now(kvl_clock_system());
    if (event->finish == KVL_FINISH_FAILED && own->error.http_status == 0)
        kvl_api_error_from(&own->error, event->error->status, "", event->error->text);
    if (!kvl_api_answer_add(own->answer, &own->request, kvl_model_tokenizer(b->engine->model),
                            event))
        kvl_api_error_from(&own->error, KVL_ERR_NO_MEMORY, "", "no memory for an answer");
    b->result.n_answer_tokens += event->drawn != NULL;
}

static void take_event(void *context, const kvl_generation_event *event)
{
    row *own = context;
    kvl_batch *b = own->batch;
    note_event(b, own, event);
    if (!event->is_last) return;
    b->n_in_flight--;
    b->pins[own->group].n_open--;
    b->result.n_prompt_tokens += own->request.generation.n_ids;
    b->result.n_cached_tokens += event->n_cached;
    /* What was cancelled was never answered: whoever goes on computes it. */
    if (event->finish != KVL_FINISH_CANCELLED) write_answer(b, own);
    end_row(b, own);
}

/* ---- pins ---- */

static void drop_pin(pin *own)
{
    kvl_sequence_deinit(&own->sequence);
    own->is_begun = false;
    own->is_given_up = true;
}

/* Takes what the tree has of a group's shared part, as long as that is not all of it. */
static void hold_pin(kvl_batch *b, kvl_engine *engine, uint32_t g)
{
    pin *own = &b->pins[g];
    const kvl_batch_group *group = &b->plan.groups[g];
    kvl_error error;
    if (own->is_given_up || group->n_shared == 0 || group->n_rows < 2) return;
    if (!own->is_begun) {
        const kvl_generation *first = &b->rows[b->plan.order[group->first]].request.generation;
        if (kvl_sequence_init(&own->sequence, engine, first->salt, first->ids, group->n_shared + 1,
                              &error) != KVL_OK)
            return;
        own->is_begun = true;
    }
    if (own->sequence.n_computed < group->n_shared)
        kvl_ignore(kvl_sequence_adopt(&own->sequence, &error));
}

/* Groups that have begun hold their pages. When somebody had to pause, all but the oldest let go:
 * pages that are held without being used must not keep others from running. */
static void look_after_pins(kvl_batch *b, kvl_engine *engine, bool is_short)
{
    if (b->options->order == KVL_BATCH_BY_FILE) return;
    while (b->first_pin < b->past_pin && b->pins[b->first_pin].n_open == 0)
        drop_pin(&b->pins[b->first_pin++]);
    for (uint32_t g = b->first_pin; g < b->past_pin; g++) {
        if (b->pins[g].n_open == 0 || (is_short && g > b->first_pin)) {
            drop_pin(&b->pins[g]);
        } else {
            hold_pin(b, engine, g);
        }
    }
}

static void drop_pins(kvl_batch *b)
{
    for (uint32_t g = 0; b->pins != NULL && g < b->plan.n_groups; g++)
        kvl_sequence_deinit(&b->pins[g].sequence);
}

/* ---- running ---- */

static void submit(kvl_batch *b, kvl_scheduler *scheduler, row *own)
{
    kvl_error failed = {0};
    kvl_generation *g = &own->request.generation;
    g->event = take_event;
    g->context = own;
    g->is_background = b->options->is_background;
    own->answer = kvl_alloc_zero(1, sizeof *own->answer);
    const kvl_status status = own->answer == NULL
                                  ? KVL_FAIL(&failed, KVL_ERR_NO_MEMORY, "no memory for an answer")
                                  : kvl_scheduler_submit(scheduler, g, &own->id, &failed);
    if (own->group + 1 > b->past_pin) b->past_pin = own->group + 1;
    if (status == KVL_OK) {
        b->n_in_flight++;
        return;
    }
    kvl_api_error_from(&own->error, status, "", failed.text);
    b->pins[own->group].n_open--;
    write_answer(b, own);
    end_row(b, own);
}

static void sync(kvl_batch *b)
{
    const int64_t now = kvl_clock_now(kvl_clock_system());
    if (now - b->synced_ns <= SYNC_MS * KVL_NS_PER_MS) return;
    b->synced_ns = now;
    const kvl_status status = kvl_line_file_sync(&b->out, &b->error);
    if (status != KVL_OK) remember_failure(b, status);
}

static void show_progress(kvl_batch *b, bool is_end)
{
    const int64_t now = kvl_clock_now(kvl_clock_system());
    if (!b->options->with_progress || (now - b->shown_ns < PROGRESS_MS * KVL_NS_PER_MS && !is_end))
        return;
    b->shown_ns = now;
    enum { WIDTH = 30 };
    const uint32_t n_all = b->n_runnable;
    const double seconds = (double)(now - b->start_ns) / (double)KVL_NS_PER_S;
    const double left = b->n_done == 0 ? 0.0 : seconds / b->n_done * (n_all - b->n_done);
    const double rate = seconds > 0.0 ? (double)b->result.n_answer_tokens / seconds : 0.0;
    char bar[WIDTH + 1] = {0};
    memset(bar, '.', WIDTH);
    memset(bar, '#', n_all == 0 ? WIDTH : (size_t)b->n_done * WIDTH / n_all);
    (void)fprintf(stderr, "\r[%s] %u of %u rows, %.1f answer tokens/s, %.0f s left   %s", bar,
                  b->n_done, n_all, rate, left, is_end ? "\n" : "");
}

/* Begins nothing more; those under way end without an answer. */
static void stop_rows(kvl_batch *b, kvl_scheduler *scheduler)
{
    b->n_done += b->n_runnable - b->next;
    b->next = b->n_runnable;
    if (b->has_cancelled) return;
    b->has_cancelled = true;
    for (uint32_t i = 0; i < b->n_rows; i++)
        if (b->rows[i].id != 0) kvl_scheduler_cancel(scheduler, b->rows[i].id);
}

bool kvl_batch_advance(kvl_batch *b, kvl_scheduler *scheduler)
{
    kvl_scheduler_stats stats = {0};
    /* Enough to choose from, and not so many that groups begin long before their turn. */
    const uint32_t window = kvl_scheduler_n_running_max(scheduler) + AHEAD;
    if (b->start_ns == 0) b->start_ns = b->synced_ns = kvl_clock_now(kvl_clock_system());
    if (atomic_load(&b->is_cancelled) || b->status != KVL_OK) stop_rows(b, scheduler);
    while (b->next < b->n_runnable && b->n_in_flight < window)
        submit(b, scheduler, &b->rows[b->plan.order[b->next++]]);
    kvl_scheduler_stats_read(scheduler, &stats);
    look_after_pins(b, kvl_scheduler_engine(scheduler), stats.n_paused > b->n_paused);
    b->n_paused = stats.n_paused;
    sync(b);
    const bool has_more = b->n_done < b->n_runnable;
    show_progress(b, !has_more);
    if (has_more) return true;
    drop_pins(b);
    b->result.n_paused = stats.n_paused;
    b->result.seconds =
        (double)(kvl_clock_now(kvl_clock_system()) - b->start_ns) / (double)KVL_NS_PER_S;
    return false;
}

/* ---- life ---- */

static kvl_status open_files(kvl_batch *b)
{
    KVL_TRY(read_known(b));
    KVL_TRY(read_rows(b));
    atomic_store(&b->n_answered, b->n_known_good);
    atomic_store(&b->n_refused, b->result.n_resumed - b->n_known_good);
    KVL_TRY(kvl_line_file_open(b->options->out_path, &b->out, &b->error));
    uint32_t *runnable = kvl_alloc_zero(b->n_rows + 1, sizeof *runnable);
    if (runnable == NULL) return KVL_FAIL(&b->error, KVL_ERR_NO_MEMORY, "no memory for rows");
    for (uint32_t i = 0; i < b->n_rows; i++) {
        if (b->rows[i].error.http_status != 0) {
            write_answer(b, &b->rows[i]);
        } else {
            runnable[b->n_runnable++] = i;
        }
    }
    const kvl_status status = b->status == KVL_OK ? plan_rows(b, runnable) : b->status;
    kvl_free(runnable);
    return status;
}

static void destroy(kvl_batch *b)
{
    drop_pins(b);
    kvl_free(b->pins);
    for (uint32_t i = 0; b->rows != NULL && i < b->n_rows; i++) {
        if (b->rows[i].answer != NULL) kvl_api_answer_deinit(b->rows[i].answer);
        kvl_free(b->rows[i].answer);
        kvl_api_request_deinit(&b->rows[i].request);
        json_decref(b->rows[i].line);
    }
    kvl_free(b->rows);
    kvl_batch_plan_deinit(&b->plan);
    kvl_line_file_close(&b->out);
    json_decref(b->known);
    kvl_free(b);
}

kvl_status kvl_batch_open(const kvl_engine *engine, const kvl_batch_options *options,
                          kvl_batch **batch, kvl_error *error)
{
    *batch = NULL;
    kvl_batch *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a batch");
    made->engine = engine;
    made->options = options;
    made->out.descriptor = -1;
    const kvl_status status = open_files(made);
    if (status != KVL_OK) {
        *error = made->error;
        destroy(made);
        return status;
    }
    *batch = made;
    return KVL_OK;
}

void kvl_batch_cancel(kvl_batch *batch)
{
    if (batch != NULL) atomic_store(&batch->is_cancelled, true);
}

void kvl_batch_progress_read(const kvl_batch *batch, kvl_batch_progress *progress)
{
    *progress = (kvl_batch_progress){.n_rows = batch->result.n_rows,
                                     .n_answered = atomic_load(&batch->n_answered),
                                     .n_refused = atomic_load(&batch->n_refused)};
}

kvl_status kvl_batch_close(kvl_batch *batch, kvl_batch_result *result, kvl_error *error)
{
    if (batch->status == KVL_OK) batch->status = kvl_line_file_sync(&batch->out, &batch->error);
    const kvl_status status = batch->status;
    if (status != KVL_OK) *error = batch->error;
    if (result != NULL) *result = batch->result;
    destroy(batch);
    return status;
}

kvl_status kvl_batch_run(kvl_engine *engine, const kvl_batch_options *options,
                         kvl_batch_result *result, kvl_error *error)
{
    *result = (kvl_batch_result){0};
    kvl_batch *batch = NULL;
    KVL_TRY(kvl_batch_open(engine, options, &batch, error));
    kvl_scheduler_options scheduler = options->scheduler;
    kvl_scheduler *made = NULL;
    scheduler.n_waiting_max = KVL_BATCH_ROWS_MAX;
    scheduler.in_order = true; /* which is that of the plan, or of the file */
    scheduler.holds_whole_answers = options->order == KVL_BATCH_BY_PLAN;
    const kvl_status status = kvl_scheduler_create(engine, &scheduler, &made, error);
    while (status == KVL_OK && kvl_batch_advance(batch, made)) (void)kvl_scheduler_step(made);
    const kvl_status ended = kvl_batch_close(batch, result, error);
    kvl_scheduler_destroy(made);
    return status != KVL_OK ? status : ended;
}
