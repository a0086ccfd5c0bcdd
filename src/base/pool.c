/* base/pool.c: workers wait for a generation to change, then take items from a counter. */
#include "base/pool.h"

#include "base/alloc.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>

/* About 30 us on a 3 GHz core: longer than the gap between two loops of a decode step, shorter than
 * what a sleeping core notices. */
enum { SPINS_MAX = 4000 };

typedef struct worker {
    kvl_pool *pool;
    size_t index;
    pthread_t thread;
} worker;

struct kvl_pool {
    size_t n_threads;
    bool pinned;
    bool caller_pinned;
    int processors[KVL_POOL_THREADS_MAX];
    worker *workers; /* [n_threads - 1] */
    size_t n_started;

    kvl_pool_task *task;
    void *context;
    size_t n_items;
    _Alignas(64) _Atomic size_t next_item;
    _Alignas(64) _Atomic uint64_t generation;
    _Alignas(64) _Atomic size_t n_running;
    _Atomic bool stopping;
    _Atomic size_t n_sleeping;
    pthread_mutex_t lock;
    pthread_cond_t wake;
};

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void pin_to(int processor)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)processor, &set);
    /* Refused in some containers: then the threads float, which costs speed only. */
    (void)pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

static void take_items(kvl_pool *pool, size_t thread)
{
    for (;;) {
        const size_t item = atomic_fetch_add_explicit(&pool->next_item, 1, memory_order_relaxed);
        if (item >= pool->n_items) return;
        pool->task(pool->context, item, thread);
    }
}

static uint64_t wait_for_change(kvl_pool *pool, uint64_t seen)
{
    for (int spin = 0; spin < SPINS_MAX; spin++) {
        const uint64_t now = atomic_load_explicit(&pool->generation, memory_order_acquire);
        if (now != seen) return now;
        relax();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->n_sleeping, 1);
    while (atomic_load(&pool->generation) == seen) pthread_cond_wait(&pool->wake, &pool->lock);
    atomic_fetch_sub(&pool->n_sleeping, 1);
    pthread_mutex_unlock(&pool->lock);
    return atomic_load(&pool->generation);
}

static void *worker_main(void *argument)
{
    const worker *self = argument;
    kvl_pool *pool = self->pool;
    if (pool->pinned) pin_to(pool->processors[self->index]);
    uint64_t seen = 0;
    for (;;) {
        seen = wait_for_change(pool, seen);
        if (atomic_load(&pool->stopping)) return NULL;
        take_items(pool, self->index);
        atomic_fetch_sub_explicit(&pool->n_running, 1, memory_order_release);
    }
}

static void announce(kvl_pool *pool)
{
    atomic_fetch_add(&pool->generation, 1);
    if (atomic_load(&pool->n_sleeping) == 0) {
        /* A worker between its last look and its sleep holds the lock: taking it once orders us
         * after that sleep has begun, and only then may the wake-up be skipped. */
        pthread_mutex_lock(&pool->lock);
        const bool nobody = atomic_load(&pool->n_sleeping) == 0;
        pthread_mutex_unlock(&pool->lock);
        if (nobody) return;
    }
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

void kvl_pool_run(kvl_pool *pool, kvl_pool_task *task, void *context, size_t n_items)
{
    if (pool->pinned && !pool->caller_pinned) {
        pin_to(pool->processors[0]);
        pool->caller_pinned = true;
    }
    if (n_items == 0) return;
    if (pool->n_threads == 1 || n_items == 1) {
        for (size_t item = 0; item < n_items; item++) task(context, item, 0);
        return;
    }
    pool->task = task;
    pool->context = context;
    pool->n_items = n_items;
    atomic_store(&pool->next_item, 0);
    atomic_store(&pool->n_running, pool->n_threads - 1);
    announce(pool);
    take_items(pool, 0);
    while (atomic_load_explicit(&pool->n_running, memory_order_acquire) != 0) relax();
}

static size_t find_processors(int *processors)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) != 0) return 0;
    size_t n = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE && n < KVL_POOL_THREADS_MAX; cpu++) {
        if (CPU_ISSET((size_t)cpu, &set)) processors[n++] = cpu;
    }
    return n;
}

static kvl_status start_workers(kvl_pool *pool, kvl_error *error)
{
    for (size_t i = 1; i < pool->n_threads; i++) {
        worker *next = &pool->workers[i - 1];
        *next = (worker){.pool = pool, .index = i};
        const int reason = pthread_create(&next->thread, NULL, worker_main, next);
        if (reason != 0)
            return KVL_FAIL(error, KVL_ERR_IO, "cannot start thread %zu of %zu: %s", i,
                            pool->n_threads, strerror(reason));
        pool->n_started++;
    }
    return KVL_OK;
}

kvl_status kvl_pool_create(size_t n_threads, bool pinned, kvl_pool **pool, kvl_error *error)
{
    *pool = NULL;
    if (n_threads > KVL_POOL_THREADS_MAX)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "%zu threads asked for, at most %u", n_threads,
                        KVL_POOL_THREADS_MAX);
    kvl_pool *made = kvl_alloc_aligned(sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a thread pool");
    memset(made, 0, sizeof *made);
    const size_t n_processors = find_processors(made->processors);
    made->n_threads = n_threads != 0 ? n_threads : n_processors != 0 ? n_processors : 1;
    made->pinned = pinned && made->n_threads <= n_processors;
    (void)pthread_mutex_init(&made->lock, NULL);
    (void)pthread_cond_init(&made->wake, NULL);
    kvl_status status = KVL_OK;
    if (made->n_threads > 1) {
        made->workers = kvl_alloc_zero(made->n_threads - 1, sizeof *made->workers);
        status = made->workers == NULL
                     ? KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a thread pool")
                     : start_workers(made, error);
    }
    if (status != KVL_OK) {
        kvl_pool_destroy(made);
        return status;
    }
    *pool = made;
    return KVL_OK;
}

void kvl_pool_destroy(kvl_pool *pool)
{
    if (pool == NULL) return;
    atomic_store(&pool->stopping, true);
    announce(pool);
    for (size_t i = 0; i < pool->n_started; i++) pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    kvl_free(pool->workers);
    kvl_free(pool);
}

size_t kvl_pool_n_threads(const kvl_pool *pool)
{
    return pool->n_threads;
}
