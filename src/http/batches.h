/* http/batches.h: batches of requests in files (OpenAI's Batch API), computed behind all others.
 * Private to the room.
 *
 * A batch is ID.json beside its tenant's files, as the API shows it, and, while it is under way,
 * ID.lines: the answers so far (http/batch.h). Batches are computed one at a time, in the order of
 * their making; a thread of their own reads, plans and writes, the engine thread computes rows in
 * the background of the scheduler. After a crash or a restart what was not over goes on, and rows
 * that stand in ID.lines are not computed again. At the end the lines become an output file and,
 * of refused rows, an error file, whose ids follow from the batch's: a crash in the middle of that
 * makes no second ones.
 * Threads  Any; one lock. */
#ifndef KVL_HTTP_BATCHES_H
#define KVL_HTTP_BATCHES_H

#include "http/api.h"
#include "http/files.h"

#define KVL_HTTP_BATCHES_OPEN_MAX 100u  /* of a tenant, not over */
#define KVL_HTTP_BATCHES_KEPT_MAX 1000u /* of a tenant; older ones that are over are forgotten */

typedef struct kvl_http_batches kvl_http_batches;

/* Loads batches, and begins with those that are not over. Borrows everything until it is closed.
 * Before kvl_service_run.
 * Owns     *batches: ended with kvl_http_batches_close
 * Errors   KVL_ERR_IO, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_http_batches_open(kvl_http_files *files, kvl_service *service,
                                              const kvl_http_keys *keys, const char *model_name,
                                              kvl_http_batches **batches, kvl_error *error);
/* What is under way stays as it is for the next start. NULL does nothing. */
void kvl_http_batches_close(kvl_http_batches *batches);

/* Checks a request's body and begins a batch. The caller's; NULL when it is refused. */
json_t *kvl_http_batches_create(kvl_http_batches *batches, const char *tenant, const char *body,
                                size_t n_bytes, kvl_api_error *error);
/* The caller's; NULL when there is none: *error says so. */
json_t *kvl_http_batches_find(kvl_http_batches *batches, const char *tenant, const char *id,
                              kvl_api_error *error);
/* Begins no further rows; what is answered becomes the output. Likewise. */
json_t *kvl_http_batches_cancel(kvl_http_batches *batches, const char *tenant, const char *id,
                                kvl_api_error *error);
/* OpenAI's list, newest first. The caller's. */
json_t *kvl_http_batches_list(kvl_http_batches *batches, const char *tenant, const char *after,
                              uint32_t limit);
/* Whether a batch that is not over reads this file. */
bool kvl_http_batches_use(kvl_http_batches *batches, const char *tenant, const char *file_id);

#endif /* KVL_HTTP_BATCHES_H */
