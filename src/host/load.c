/* host/load.c: the loading thread. It runs one job at a time, layer after layer; a counter of whole
 * layers is all that the two threads share beside the pages. */
#include "host/load.h"

#include "base/alloc.h"
#include "base/clock.h"

#include <pthread.h>

struct kvl_loader {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    float *scratch;
    /* Under the lock. */
    kvl_loader_job job;
    uint32_t n_loaded; /* layers of the job; n_layers: there is nothing to do */
    bool is_stopping;
    int64_t busy_ns;
    int64_t loaded_ns[KVL_CONTAINER_LAYERS_MAX];
    /* Of the engine thread. */
    int64_t start_ns, wait_ns;
    int64_t computed_ns[KVL_CONTAINER_LAYERS_MAX];
};

static int64_t now(void)
{
    return kvl_clock_now(kvl_clock_system());
}

static void load_layer(kvl_loader *loader, const kvl_loader_job *job, uint32_t layer)
{
    for (size_t i = 0; i < job->n_pieces; i++) {
        const kvl_loader_piece *piece = &job->pieces[i];
        const kvl_status status =
            kvl_place_layer_moved(&job->target, piece->container, layer, &piece->tokens,
                                  piece->token_first, piece->mean, loader->scratch, NULL);
        KVL_ASSERT(status == KVL_OK); /* checked when the job was made */
    }
}

static void *work(void *context)
{
    kvl_loader *loader = context;
    (void)pthread_mutex_lock(&loader->lock);
    while (!loader->is_stopping) {
        if (loader->n_loaded == loader->job.n_layers) {
            (void)pthread_cond_wait(&loader->changed, &loader->lock);
            continue;
        }
        const kvl_loader_job job = loader->job;
        const uint32_t layer = loader->n_loaded;
        (void)pthread_mutex_unlock(&loader->lock);
        const int64_t start = now();
        load_layer(loader, &job, layer);
        const int64_t end = now();
        (void)pthread_mutex_lock(&loader->lock);
        loader->busy_ns += end - start;
        loader->loaded_ns[layer] = end;
        loader->n_loaded++;
        (void)pthread_cond_broadcast(&loader->changed);
    }
    (void)pthread_mutex_unlock(&loader->lock);
    return NULL;
}

kvl_status kvl_loader_create(const kvl_pages *pages, kvl_loader **loader, kvl_error *error)
{
    *loader = NULL;
    size_t n_floats = 0;
    kvl_loader *made = kvl_alloc_zero(1, sizeof *made);
    if (made != NULL && kvl_place_layer_floats(pages, &n_floats))
        made->scratch = kvl_alloc_aligned(n_floats * sizeof(float));
    if (made == NULL || made->scratch == NULL) {
        kvl_free(made);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the loading thread");
    }
    (void)pthread_mutex_init(&made->lock, NULL);
    (void)pthread_cond_init(&made->changed, NULL);
    if (pthread_create(&made->thread, NULL, work, made) != 0) {
        kvl_free(made->scratch);
        kvl_free(made);
        return KVL_FAIL(error, KVL_ERR_IO, "cannot start the loading thread");
    }
    *loader = made;
    return KVL_OK;
}

void kvl_loader_destroy(kvl_loader *loader)
{
    if (loader == NULL) return;
    (void)pthread_mutex_lock(&loader->lock);
    loader->is_stopping = true;
    (void)pthread_cond_broadcast(&loader->changed);
    (void)pthread_mutex_unlock(&loader->lock);
    (void)pthread_join(loader->thread, NULL);
    (void)pthread_cond_destroy(&loader->changed);
    (void)pthread_mutex_destroy(&loader->lock);
    kvl_free(loader->scratch);
    kvl_free(loader);
}

void kvl_loader_begin(kvl_loader *loader, const kvl_loader_job *job)
{
    loader->start_ns = now();
    loader->wait_ns = 0;
    for (uint32_t l = 0; l < job->n_layers; l++) loader->computed_ns[l] = 0;
    (void)pthread_mutex_lock(&loader->lock);
    KVL_ASSERT(loader->n_loaded == loader->job.n_layers);
    loader->busy_ns = 0;
    loader->job = *job;
    loader->n_loaded = 0;
    (void)pthread_cond_broadcast(&loader->changed);
    (void)pthread_mutex_unlock(&loader->lock);
}

void kvl_loader_wait(kvl_loader *loader, uint32_t layer)
{
    const int64_t start = now();
    (void)pthread_mutex_lock(&loader->lock);
    while (loader->n_loaded <= layer) (void)pthread_cond_wait(&loader->changed, &loader->lock);
    (void)pthread_mutex_unlock(&loader->lock);
    loader->wait_ns += now() - start;
}

void kvl_loader_passed(kvl_loader *loader, uint32_t layer)
{
    if (loader->computed_ns[layer] == 0) loader->computed_ns[layer] = now();
}

void kvl_loader_end(kvl_loader *loader, kvl_load_times *times)
{
    const uint32_t n_layers = loader->job.n_layers;
    kvl_loader_wait(loader, n_layers - 1);
    if (times == NULL) return;
    times->busy_ns = loader->busy_ns;
    times->wait_ns = loader->wait_ns;
    for (uint32_t l = 0; l < n_layers; l++) {
        times->loaded_ns[l] = loader->loaded_ns[l] - loader->start_ns;
        const bool passed = loader->computed_ns[l] != 0;
        times->computed_ns[l] = passed ? loader->computed_ns[l] - loader->start_ns : 0;
    }
}
