/* sidecar/worker.c: threads for what may block: the disk, and copies of many megabytes.
 *
 * The loop hands jobs over by a bounded queue, and gets them back in a list and a wake; so a reader
 * of what is in memory never waits behind a writer. */
#include "sidecar/state.h"

#include "base/alloc.h"
#include "base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

job *sidecar_job_create(kvl_sidecar *s, job_kind kind, tenant *t)
{
    job *j = kvl_alloc_zero(1, sizeof *j);
    if (j == NULL) return NULL;
    j->sidecar = s;
    j->kind = kind;
    j->tenant = t;
    j->fd = -1;
    return j;
}

void sidecar_job_end(job *j)
{
    if (j == NULL) return;
    if (j->fd >= 0) (void)close(j->fd);
    kvl_container_release(j->container);
    kvl_free(j->tokens);
    kvl_free(j->extra);
    kvl_free(j->anchors);
    kvl_free(j);
}

/* A sidecar that is ending has no workers any more. */
kvl_status sidecar_job_start(kvl_sidecar *s, job *j)
{
    return s->jobs == NULL ? KVL_ERR_BUSY : kvl_queue_push(s->jobs, j);
}

void sidecar_job_finish(job *j)
{
    kvl_sidecar *s = j->sidecar;
    j->next = NULL;
    (void)pthread_mutex_lock(&s->lock);
    if (s->done_last == NULL) {
        s->done_first = j;
    } else {
        s->done_last->next = j;
    }
    s->done_last = j;
    const uint64_t one = 1;
    (void)!write(s->wake_fd, &one, sizeof one);
    (void)pthread_mutex_unlock(&s->lock);
}

job *sidecar_job_next(kvl_sidecar *s)
{
    (void)pthread_mutex_lock(&s->lock);
    job *j = s->done_first;
    if (j != NULL) s->done_first = j->next;
    if (s->done_first == NULL) s->done_last = NULL;
    (void)pthread_mutex_unlock(&s->lock);
    return j;
}

/* ---- what a worker does ---- */

/* The kernel copies, so a client that cuts the file short meanwhile causes an error here and no
 * fault. What it writes meanwhile is its own affair: the checksums are made of our copy. */
static kvl_status read_block(int fd, uint8_t *block, size_t n_bytes, uint64_t at, kvl_error *error)
{
    size_t n_read = 0;
    while (n_read < n_bytes) {
        const ssize_t n = pread(fd, block + n_read, n_bytes - n_read, (off_t)(at + n_read));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0)
            return KVL_FAIL(error, KVL_ERR_IO, "cannot read the blocks: %s", strerror(errno));
        if (n == 0) {
            return KVL_FAIL(error, KVL_ERR_MALFORMED,
                            "the descriptor's file ends at %llu bytes, inside a block",
                            (unsigned long long)(at + n_read));
        }
        n_read += (size_t)n;
    }
    return KVL_OK;
}

static kvl_status make_container(const job *j, kvl_container **container, kvl_error *error)
{
    kvl_container *made = NULL;
    KVL_TRY(kvl_container_create(&j->info, &made, error));
    kvl_status status = KVL_OK;
    for (uint32_t l = 0; l < j->info.n_layers && status == KVL_OK; l++) {
        size_t n_bytes = 0;
        uint8_t *block = kvl_container_block(made, l, &n_bytes);
        status = read_block(j->fd, block, n_bytes, (uint64_t)l * n_bytes, error);
    }
    if (status < 0) {
        kvl_container_release(made);
        return status;
    }
    kvl_container_seal(made);
    *container = made;
    return KVL_OK;
}

/* With write-back, memory answers and the disk follows; where memory has no room, the disk
 * answers. */
static void run_put(job *j)
{
    kvl_error error = {.text = ""};
    kvl_tier *memory = j->tenant->memory;
    kvl_tier *disk = j->tenant->disk;
    j->status = make_container(j, &j->container, &error);
    if (j->status == KVL_OK && j->write_back && disk != NULL &&
        memory->ops->put(memory, j->container, &error) == KVL_OK) {
        kvl_container *container = j->container;
        const tenant *t = j->tenant;
        kvl_container_share(container);
        sidecar_job_finish(j);
        const kvl_status status = disk->ops->put(disk, container, &error);
        if (status < 0) {
            kvl_log(KVL_LOG_WARN, "write_back_failed", "tenant=%s status=%s reason=\"%s\"", t->name,
                    kvl_status_name(status), error.text);
        }
        kvl_container_release(container);
        return;
    }
    if (j->status == KVL_OK) {
        j->status = j->tenant->store->ops->put(j->tenant->store, j->container, &error);
    }
    (void)snprintf(j->text, sizeof j->text, "%s", error.text);
    sidecar_job_finish(j);
}

static void run(job *j)
{
    kvl_error error = {.text = ""};
    kvl_tier *store = j->tenant->store;
    if (j->kind == JOB_PUT) {
        run_put(j);
        return;
    }
    if (j->kind == JOB_ANCHORS) {
        sidecar_anchor_find(j);
        sidecar_job_finish(j);
        return;
    }
    if (j->kind == JOB_LOAD) {
        j->status = store->ops->get(store, &j->id, true, &j->container, &error);
    } else if (j->kind == JOB_KEEP) {
        j->status = store->ops->put(store, j->container, &error);
    } else {
        KVL_ASSERT(j->kind == JOB_REMOVE);
        j->status = store->ops->remove(store, &j->id, &error);
    }
    (void)snprintf(j->text, sizeof j->text, "%s", error.text);
    sidecar_job_finish(j);
}

static void *work(void *argument)
{
    kvl_sidecar *s = argument;
    for (job *j = kvl_queue_pop(s->jobs); j != NULL; j = kvl_queue_pop(s->jobs)) run(j);
    return NULL;
}

/* Signals belong to the threads that the program set up for them. */
kvl_status sidecar_workers_start(kvl_sidecar *s, uint32_t n, kvl_error *error)
{
    sigset_t all, before;
    if (kvl_queue_create(KVL_SIDECAR_JOBS_MAX, &s->jobs) < 0) {
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a queue of jobs");
    }
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    while (s->n_workers < n) {
        if (pthread_create(&s->workers[s->n_workers], NULL, work, s) != 0) break;
        s->n_workers++;
    }
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return s->n_workers == n ? KVL_OK
                             : KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no thread for a worker");
}

void sidecar_workers_stop(kvl_sidecar *s)
{
    if (s->jobs == NULL) return;
    kvl_queue_close(s->jobs);
    for (uint32_t i = 0; i < s->n_workers; i++) (void)pthread_join(s->workers[i], NULL);
    s->n_workers = 0;
    kvl_queue_destroy(s->jobs);
    s->jobs = NULL;
}
