/* http/batch.h: a file of requests in OpenAI's batch format, answered as fast as this machine can.
 *
 * Every line is {"custom_id", "method": "POST", "url": "/v1/chat/completions" or "/v1/completions",
 * "body"}; every answered line {"id", "custom_id", "response": {"status_code", "request_id",
 * "body"}, "error": null}, in the order that answers end. A row that is refused is answered with
 * its status code and OpenAI's error.
 * Rows run in the order of host/batch_plan.h; a group's shared pages are held until its last row
 * has ended. The answers' file is appended to line by line: started again, rows that stand in it
 * are not computed again.
 * Threads  The engine thread only. */
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
    const char *model_name;
    kvl_batch_order order;
    kvl_scheduler_options scheduler;
    bool with_progress; /* on standard error */
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

#endif /* KVL_HTTP_BATCH_H */
