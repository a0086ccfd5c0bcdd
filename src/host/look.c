/* host/look.c: a look at the prefix tree for other threads. */
#include "base/alloc.h"
#include "base/clock.h"
#include "host/service_parts.h"

struct service_look {
    pthread_mutex_t lock;
    pthread_cond_t answered;
    uint32_t n_holders;
    uint64_t salt;
    bool is_answered;
    kvl_status status; /* where answered */
    kvl_prefix_view view;
};

service_look *service_look_create(uint64_t salt)
{
    service_look *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return NULL;
    made->salt = salt;
    made->n_holders = 2;
    (void)pthread_mutex_init(&made->lock, NULL);
    service_cond_init(&made->answered);
    return made;
}

void service_look_release(service_look *look)
{
    pthread_mutex_lock(&look->lock);
    const bool is_last = --look->n_holders == 0;
    pthread_mutex_unlock(&look->lock);
    if (!is_last) return;
    (void)pthread_cond_destroy(&look->answered);
    (void)pthread_mutex_destroy(&look->lock);
    kvl_free(look);
}

void service_look_answer(service_look *look, const kvl_prefix_tree *tree)
{
    pthread_mutex_lock(&look->lock);
    if (tree != NULL) kvl_prefix_tree_look(tree, look->salt, KVL_PREFIX_VIEW_NODES, &look->view);
    look->status = tree != NULL ? KVL_OK : KVL_ERR_CANCELLED;
    look->is_answered = true;
    pthread_cond_signal(&look->answered);
    pthread_mutex_unlock(&look->lock);
    service_look_release(look);
}

kvl_status service_look_wait(service_look *look, uint32_t timeout_ms, kvl_prefix_view *view)
{
    const struct timespec deadline = service_deadline(timeout_ms);
    int waited = 0;
    pthread_mutex_lock(&look->lock);
    while (!look->is_answered && waited == 0)
        waited = pthread_cond_timedwait(&look->answered, &look->lock, &deadline);
    const kvl_status status = look->is_answered ? look->status : KVL_ERR_TIMEOUT;
    if (status == KVL_OK) *view = look->view;
    pthread_mutex_unlock(&look->lock);
    service_look_release(look);
    return status;
}
