/* http/batch.h: a file of requests in OpenAI's batch format, answered as fast as this machine can.
 *
 * Every line is {"custom_id", "method": "POST", "url": "/v1/chat/completions" or "/v1/completions",
 * "body"}; every answered line {"id", "custom_id", "response": {"status_code", "request_id",
 * "body"}, "error": null}, in the order that answers end. A row that is refused is answered with
 * its status code and OpenAI's error.
 * Rows run in the order of host/batch_plan.h; a group's shared pages are held until its last row
 * has ended. The answers' file is appended to line by line: started again, rows that stand in it
 * are not computed again.
 * kvl_batch_run does all of it; a server, whose engine thread has others to serve too, takes the
 * steps by themselves.
 * Threads  kvl_batch_run and kvl_batch_advance: the engine thread. The rest: see there. */
#ifndef KVL_HTTP_BATCH_H
#define KVL_HTTP_BATCH_H

#include "host/scheduler.h"

#define KVL_BATCH_FILE_BYTES_MAX ((size_t)1 << 30)
#define KVL_CUSTOM_ID_BYTES_MAX 512u

typedef enum kvl_batch_order {
    KVL_BATCH_BY_PLAN,
    KVL_BATCH_BY_FILE, /* as they stand, with the prefix tree as an LRU cache: to compare with */
} kvl_batch_order;

typedef struct kvl_batch_options {
    const char *in_path, *out_path;
    const char *in_name; /* what errors call the first; NULL: its path */
    const char *model_name;
    kvl_batch_order order;
    kvl_scheduler_options scheduler;
    bool with_progress; /* on standard error */
    const char *url;    /* the one that every row must have; NULL: either */
    bool is_background; /* rows stand behind all other requests */
    /* Number of the prefix tree for a row's cache_salt; NULL: a checksum of it. */
    uint64_t (*salt)(void *context, const char *cache_salt);
    void *salt_context;
} kvl_batch_options;

typedef struct kvl_batch_result {
    uint32_t n_rows, n_resumed; /* rows of the file; of those, answered in an earlier run */
    uint32_t n_answered, n_refused;
    uint32_t n_groups;
    uint64_t n_prompt_tokens, n_cached_tokens, n_answer_tokens;
    uint64_t n_distinct_tokens; /* of prompts, that the plan says have to be computed */
    uint64_t n_paused;
    double seconds;
} kvl_batch_result;

/* Errors   KVL_ERR_NOT_FOUND, KVL_ERR_IO, KVL_ERR_TOO_LARGE, KVL_ERR_NO_MEMORY;
 *          KVL_ERR_MALFORMED (a line is no request: text has its number; nothing is computed) */
KVL_MUST_USE kvl_status kvl_batch_run(kvl_engine *engine, const kvl_batch_options *options,
                                      kvl_batch_result *result, kvl_error *error);

/* ---- step by step ---- */

typedef struct kvl_batch kvl_batch;

/* Reads both files, plans, and answers the rows that are refused. Any thread; borrows the engine's
 * model, and the options with their texts until the batch is closed.
 * Owns     *batch: ended with kvl_batch_close
 * Errors   as kvl_batch_run */
KVL_MUST_USE kvl_status kvl_batch_open(const kvl_engine *engine, const kvl_batch_options *options,
                                       kvl_batch **batch, kvl_error *error);
/* Submits what there is a place for, and looks after shared pages; before every step of the
 * scheduler. True while rows are left; once false, the batch holds nothing of the engine. Engine
 * thread. */
bool kvl_batch_advance(kvl_batch *batch, kvl_scheduler *scheduler);
/* Begins no further rows, and cancels those under way: they are not answered. Any thread; NULL does
 * nothing. */
void kvl_batch_cancel(kvl_batch *batch);
/* Rows of the file, answered and refused, those of earlier runs among them. Any thread. */
typedef struct kvl_batch_progress {
    uint32_t n_rows, n_answered, n_refused;
} kvl_batch_progress;
void kvl_batch_progress_read(const kvl_batch *batch, kvl_batch_progress *progress);
/* Syncs the file and ends the batch, which must not be advanced any more; any thread. What went
 * wrong on the way comes out here. *result may be NULL. */
KVL_MUST_USE kvl_status kvl_batch_close(kvl_batch *batch, kvl_batch_result *result,
                                        kvl_error *error);

#endif /* KVL_HTTP_BATCH_H */
