/* http/batches_parts.h: what the two files of batches share; private to them. batches.c has what
 * clients see and what the disk has, batches_run.c the thread that computes. */
#ifndef KVL_HTTP_BATCHES_PARTS_H
#define KVL_HTTP_BATCHES_PARTS_H

#include "http/batch.h"
#include "http/batches.h"

#include <pthread.h>

typedef struct kvl_http_batch {
    struct kvl_http_batch *next; /* younger */
    kvl_http_batches *batches;
    char id[KVL_HTTP_ID_BYTES];
    char tenant[KVL_HTTP_TENANT_BYTES_MAX + 1];
    json_t *shown; /* as the API shows it, and the disk has it */
    int64_t created_ns;
} kvl_http_batch;

struct kvl_http_batches {
    kvl_http_files *files;
    kvl_service *service;
    const kvl_http_keys *keys;
    const char *model_name;
    pthread_t thread;
    bool has_thread;
    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t changed;
    kvl_http_batch *first; /* oldest first */
    kvl_batch *current;    /* what the engine thread advances; NULL: nothing */
    bool is_stopping;
};

/* ---- batches.c; with the lock held ---- */

const char *kvl_http_batch_text(const kvl_http_batch *batch, const char *name);
int64_t kvl_http_batch_time(const kvl_http_batch *batch, const char *name);
/* Sets the status and the time of it ("failed_at" and so on). */
void kvl_http_batch_enter(kvl_http_batch *batch, const char *status);
bool kvl_http_batch_is_over(const kvl_http_batch *batch);
/* Writes what is shown to the disk; a failure is logged, and the next change tries again. */
void kvl_http_batch_save(const kvl_http_batch *batch);

/* ---- batches_run.c ---- */

void *kvl_http_batches_work(void *batches);
/* For kvl_service_feed. */
void kvl_http_batches_feed(void *batches, kvl_scheduler *scheduler);

#endif /* KVL_HTTP_BATCHES_PARTS_H */
