/* cli/bench_load.c: `kvloom bench load`: clients that ask one host at once. What healing behind the
 * answers and the gate before them cost, alone and beside others; and what it gains that those go
 * first that save most, over a memory tier and a page pool that hold a part of what is asked for.
 * Every way has a host of its own over one store, and the same requests. */
#include "cli/bench_load.h"

#include "base/alloc.h"
#include "base/file.h"
#include "base/random.h"
#include "cli/bench.h"
#include "cli/bench_rag.h"

#include <pthread.h>
#include <string.h>

enum {
    CHUNKS = 3,
    GROUPS = 6, /* of chunks that are asked for together */
    GROUPS_IN_MEMORY = 3,
    CLIENTS = 4,
    CLIENTS_WAITING = 12,
    ANSWER = 16,
    REQUESTS_MAX = 96,
    CONTEXT = 2048,
    PAGES_SMALL = 160, /* about three prompts */
    HEAL_WAIT_MS = 60000
};

/* How requests are asked and what their host is like. */
typedef struct way {
    const char *name;
    Kvloom__V1__Quality quality;
    bool is_gated, in_order;
    double heal_share;
    uint64_t memory_groups; /* that the memory tier holds; 0: all */
    uint32_t n_pages;       /* 0: a host's default */
    uint32_t n_clients;
    bool is_prefixed; /* requests of one group begin alike, and are computed exactly */
} way;

/* What came of them. */
typedef struct outcome {
    double seconds, first_ms, latency_ms, longest_ms, hit_rate, healed, dropped, beside_ms, moved;
    double shared; /* of the prompts' tokens, found in the prefix tree */
} outcome;

typedef struct bench {
    const kvl_cli_engine *engine;
    bench_rag_corpus corpus;
    char directory[64], store[96];
    uint8_t key[KVL_RAG_KEY_BYTES];
    kvl_local_host *host;
    uint64_t group_bytes; /* of a group's KV, as it is stored */
    uint32_t n_requests, n_prompts;
    json_t *figures, *rows;
    /* Of the way that runs. */
    const way *how;
    const uint32_t *groups;
    pthread_mutex_t lock;
    uint32_t next;
    double first_ms[REQUESTS_MAX], latency_ms[REQUESTS_MAX], shared;
    kvl_status status;
    kvl_error error;
} bench;

static kvl_status make_prompt(bench *b, uint32_t index, kvl_rag_prompt *prompt, kvl_error *error)
{
    char instruction[128], question[192];
    const uint32_t first = b->groups[index] * CHUNKS;
    /* Unless they are to begin alike, nothing of a prompt is in the prefix tree. */
    (void)snprintf(instruction, sizeof instruction,
                   "Request %u. Answer from these texts, in one sentence.\n\n",
                   b->how->is_prefixed ? b->groups[index] : b->n_prompts + index);
    (void)snprintf(question, sizeof question, "\n\nQuestion %u: What is the access code of %s?",
                   index, b->corpus.facts[first + index % CHUNKS].name);
    KVL_TRY(kvl_rag_prompt_make(kvl_local_host_model(b->host), instruction,
                                &b->corpus.chunks[first], CHUNKS, question, b->corpus.primer,
                                prompt, error));
    prompt->run.mode = KVLOOM__V1__MODE__MODE_REUSE;
    prompt->run.quality = b->how->quality;
    prompt->run.gate = b->how->is_gated;
    prompt->run.max_tokens = ANSWER;
    return KVL_OK;
}

/* An idle host is given the time to heal before it is asked again. */
static kvl_status wait_healed(bench *b, const Kvloom__V1__RunReply *reply, kvl_error *error)
{
    if (!reply->healing || b->how->n_clients > 1) return KVL_OK;
    Kvloom__V1__HealTask heal = KVLOOM__V1__HEAL_TASK__INIT;
    Kvloom__V1__HostTask task = KVLOOM__V1__HOST_TASK__INIT;
    Kvloom__V1__HostReply *healing = NULL;
    heal.home = reply->home;
    heal.wait_ms = HEAL_WAIT_MS;
    task.what_case = KVLOOM__V1__HOST_TASK__WHAT_HEAL;
    task.heal = &heal;
    KVL_TRY(kvl_local_host_do(b->host, &task, &healing, error));
    kvloom__v1__host_reply__free_unpacked(healing, NULL);
    return KVL_OK;
}

static kvl_status ask(bench *b, uint32_t index, kvl_error *error)
{
    kvl_rag_prompt prompt;
    Kvloom__V1__RunReply *reply = NULL;
    kvl_status status = make_prompt(b, index, &prompt, error);
    const int64_t start = kvl_clock_now(kvl_clock_system());
    if (status == KVL_OK) status = kvl_local_host_run(b->host, &prompt.run, &reply, error);
    const double latency_ms = 1e3 * kvl_bench_seconds_since(start);
    kvl_rag_prompt_deinit(&prompt);
    if (status != KVL_OK) return status;
    /* A gated or verified answer is held back until it is checked. */
    const double held_ms = reply->gate_ms + reply->verify_ms;
    double n_shared = 0.0;
    for (size_t p = 0; p < reply->n_parts; p++) n_shared += reply->parts[p]->shared;
    (void)pthread_mutex_lock(&b->lock);
    b->latency_ms[index] = latency_ms;
    b->first_ms[index] = held_ms > 0.0 ? reply->total_ms + held_ms : reply->ttft_ms;
    b->shared += n_shared / reply->prompt_tokens;
    (void)pthread_mutex_unlock(&b->lock);
    status = wait_healed(b, reply, error);
    kvloom__v1__run_reply__free_unpacked(reply, NULL);
    return status;
}

static void *run_client(void *context)
{
    bench *b = context;
    for (;;) {
        (void)pthread_mutex_lock(&b->lock);
        const uint32_t index = b->status == KVL_OK ? b->next++ : UINT32_MAX;
        (void)pthread_mutex_unlock(&b->lock);
        if (index >= b->n_requests) return NULL;
        kvl_error error = {0};
        const kvl_status status = ask(b, index, &error);
        if (status == KVL_OK) continue;
        (void)pthread_mutex_lock(&b->lock);
        b->status = status;
        b->error = error;
        (void)pthread_mutex_unlock(&b->lock);
    }
}

static kvl_status run_clients(bench *b, kvl_error *error)
{
    pthread_t threads[CLIENTS_WAITING];
    uint32_t n = 0;
    b->next = 0;
    b->shared = 0.0;
    b->status = KVL_OK;
    while (n < b->how->n_clients && pthread_create(&threads[n], NULL, run_client, b) == 0) n++;
    if (n < b->how->n_clients) {
        (void)pthread_mutex_lock(&b->lock);
        b->status = KVL_FAIL(&b->error, KVL_ERR_IO, "cannot start %u threads", b->how->n_clients);
        (void)pthread_mutex_unlock(&b->lock);
    }
    for (uint32_t i = 0; i < n; i++) (void)pthread_join(threads[i], NULL);
    if (b->status != KVL_OK) *error = b->error;
    return b->status;
}

static kvl_status open_host(bench *b, const way *how, kvl_error *error)
{
    kvl_cli_engine engine = *b->engine;
    if (how->n_pages > 0) engine.n_positions = CONTEXT;
    const kvl_local_host_options options = {
        .engine = &engine,
        .store_path = b->store,
        .tenant_key = b->key,
        .memory_bytes_max = how->memory_groups * b->group_bytes,
        .n_pages = how->n_pages,
        .in_order = how->in_order,
        .heal_share = how->heal_share,
    };
    return kvl_local_host_open(&options, &b->host, error);
}

static kvl_status read_status(bench *b, outcome *seen, kvl_error *error)
{
    Kvloom__V1__HostTask task = KVLOOM__V1__HOST_TASK__INIT;
    Kvloom__V1__HostReply *reply = NULL;
    task.what_case = KVLOOM__V1__HOST_TASK__WHAT_STATUS;
    task.status = true;
    KVL_TRY(kvl_local_host_do(b->host, &task, &reply, error));
    const Kvloom__V1__StatusReply *s = reply->status;
    const double asked = (double)(s->memory_hits + s->memory_misses);
    seen->hit_rate = asked > 0.0 ? (double)s->memory_hits / asked : 0.0;
    seen->healed = (double)s->healed;
    seen->dropped = (double)s->heals_dropped;
    seen->beside_ms = s->heal_beside_ms;
    seen->moved = (double)s->tasks_moved;
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
    return KVL_OK;
}

/* Ways that are compared are asked the same requests. */
static kvl_status run_way(bench *b, const way *how, const uint32_t *groups, outcome *seen,
                          kvl_error *error)
{
    b->how = how;
    b->groups = groups;
    KVL_TRY(open_host(b, how, error));
    const int64_t start = kvl_clock_now(kvl_clock_system());
    kvl_status status = run_clients(b, error);
    *seen = (outcome){.seconds = kvl_bench_seconds_since(start)};
    if (status == KVL_OK) status = read_status(b, seen, error);
    kvl_local_host_stop(b->host);
    b->host = NULL;
    b->n_prompts += b->n_requests;
    if (status != KVL_OK) return status;
    seen->shared = b->shared / b->n_requests;
    for (uint32_t i = 0; i < b->n_requests; i++) {
        seen->latency_ms += b->latency_ms[i] / b->n_requests;
        if (b->latency_ms[i] > seen->longest_ms) seen->longest_ms = b->latency_ms[i];
    }
    seen->first_ms = kvl_bench_median(b->first_ms, b->n_requests);
    (void)json_array_append_new(
        b->rows,
        json_pack("{s:s, s:i, s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "way",
                  how->name, "clients", (int)how->n_clients, "requests", (int)b->n_requests,
                  "seconds", seen->seconds, "ttft_ms", seen->first_ms, "latency_ms",
                  seen->latency_ms, "longest_ms", seen->longest_ms, "memory_hit_rate",
                  seen->hit_rate, "shared", seen->shared, "healed", seen->healed, "heals_dropped",
                  seen->dropped, "heal_beside_ms", seen->beside_ms, "moved", seen->moved));
    (void)fprintf(stderr, "bench: %-32s %2u clients  %6.2f s  first %7.1f ms  latency %7.1f ms\n",
                  how->name, how->n_clients, seen->seconds, seen->first_ms, seen->latency_ms);
    return KVL_OK;
}

static void set(bench *b, const char *figure, double value)
{
    (void)json_object_set_new(b->figures, figure, json_real(value));
}

/* Healing and the gate: first nobody else is there, then others always wait. */
static kvl_status measure_healing(bench *b, const uint32_t *groups, kvl_error *error)
{
    enum { PLAIN, HEALED, HEALED_0, HEALED_25, GATED, VERIFIED, WAYS };
    const Kvloom__V1__Quality balanced = KVLOOM__V1__QUALITY__QUALITY_BALANCED;
    const Kvloom__V1__Quality healed = KVLOOM__V1__QUALITY__QUALITY_HEALED;
    way ways[WAYS] = {
        [PLAIN] = {.name = "balanced", .quality = balanced},
        [HEALED] = {.name = "healed, share 10 %", .quality = healed, .heal_share = 0.10},
        [HEALED_0] = {.name = "healed, share 0 %", .quality = healed},
        [HEALED_25] = {.name = "healed, share 25 %", .quality = healed, .heal_share = 0.25},
        [GATED] = {.name = "gated", .quality = balanced, .is_gated = true},
        [VERIFIED] = {.name = "verified", .quality = KVLOOM__V1__QUALITY__QUALITY_VERIFIED},
    };
    outcome idle[WAYS] = {{0}}, loaded[WAYS] = {{0}};
    for (size_t w = 0; w < WAYS; w++) {
        ways[w].n_clients = 1;
        if (w != HEALED_0 && w != HEALED_25) KVL_TRY(run_way(b, &ways[w], groups, &idle[w], error));
        ways[w].n_clients = CLIENTS;
        KVL_TRY(run_way(b, &ways[w], groups, &loaded[w], error));
    }
    set(b, "heal_ttft_ratio_idle", idle[HEALED].first_ms / idle[PLAIN].first_ms);
    set(b, "gate_ttft_ratio_idle", idle[GATED].first_ms / idle[PLAIN].first_ms);
    set(b, "verify_ttft_ratio_idle", idle[VERIFIED].first_ms / idle[PLAIN].first_ms);
    set(b, "heal_ttft_ratio_loaded", loaded[HEALED].first_ms / loaded[PLAIN].first_ms);
    set(b, "gate_ttft_ratio_loaded", loaded[GATED].first_ms / loaded[PLAIN].first_ms);
    set(b, "heal_throughput_ratio_idle", idle[PLAIN].seconds / idle[HEALED].seconds);
    set(b, "heal_throughput_ratio_share0", loaded[PLAIN].seconds / loaded[HEALED_0].seconds);
    set(b, "heal_throughput_ratio_share10", loaded[PLAIN].seconds / loaded[HEALED].seconds);
    set(b, "heal_throughput_ratio_share25", loaded[PLAIN].seconds / loaded[HEALED_25].seconds);
    set(b, "gate_throughput_ratio_idle", idle[PLAIN].seconds / idle[GATED].seconds);
    set(b, "gate_throughput_ratio_loaded", loaded[PLAIN].seconds / loaded[GATED].seconds);
    set(b, "verify_throughput_ratio_loaded", loaded[PLAIN].seconds / loaded[VERIFIED].seconds);
    set(b, "healed_share0", loaded[HEALED_0].healed / b->n_requests);
    set(b, "healed_share10", loaded[HEALED].healed / b->n_requests);
    set(b, "healed_share25", loaded[HEALED_25].healed / b->n_requests);
    return KVL_OK;
}

/* As they came, and those first that save most: chunks out of a small memory tier, then exact
 * prefixes out of few pages. */
static kvl_status measure_order(bench *b, const uint32_t *groups, kvl_error *error)
{
    static const way ways[] = {
        {.name = "chunks, as they came", .in_order = true, .memory_groups = GROUPS_IN_MEMORY},
        {.name = "chunks, most saved first", .memory_groups = GROUPS_IN_MEMORY},
        {.name = "prefixes, as they came",
         .quality = KVLOOM__V1__QUALITY__QUALITY_EXACT,
         .in_order = true,
         .n_pages = PAGES_SMALL,
         .is_prefixed = true},
        {.name = "prefixes, most saved first",
         .quality = KVLOOM__V1__QUALITY__QUALITY_EXACT,
         .n_pages = PAGES_SMALL,
         .is_prefixed = true},
    };
    outcome seen[4];
    for (size_t w = 0; w < 4; w++) {
        way how = ways[w];
        how.n_clients = CLIENTS_WAITING;
        KVL_TRY(run_way(b, &how, groups, &seen[w], error));
    }
    set(b, "order_hit_rate_arrival", seen[0].hit_rate);
    set(b, "order_hit_rate_cache", seen[1].hit_rate);
    set(b, "order_throughput_ratio_chunks", seen[0].seconds / seen[1].seconds);
    set(b, "order_prefix_shared_arrival", seen[2].shared);
    set(b, "order_prefix_shared_cache", seen[3].shared);
    set(b, "order_throughput_ratio_prefixes", seen[2].seconds / seen[3].seconds);
    set(b, "order_longest_wait_ratio_prefixes", seen[3].longest_ms / seen[2].longest_ms);
    return KVL_OK;
}

/* Has every chunk's KV in the store, and knows what a group's takes. */
static kvl_status ingest(bench *b, kvl_error *error)
{
    static const way how = {.name = "ingest"};
    KVL_TRY(open_host(b, &how, error));
    kvl_status status = KVL_OK;
    for (uint32_t c = 0; c < b->corpus.n && status == KVL_OK; c++) {
        kvl_rag_prompt prompt;
        Kvloom__V1__RunReply *reply = NULL;
        kvl_rag_prompt_read(&b->corpus.chunks[c], 1, b->corpus.primer, &prompt);
        status = kvl_local_host_run(b->host, &prompt.run, &reply, error);
        kvl_rag_prompt_deinit(&prompt);
        if (reply != NULL) kvloom__v1__run_reply__free_unpacked(reply, NULL);
    }
    Kvloom__V1__HostTask task = KVLOOM__V1__HOST_TASK__INIT;
    Kvloom__V1__HostReply *reply = NULL;
    task.what_case = KVLOOM__V1__HOST_TASK__WHAT_STATUS;
    task.status = true;
    if (status == KVL_OK) status = kvl_local_host_do(b->host, &task, &reply, error);
    if (status == KVL_OK) b->group_bytes = reply->status->store_bytes / GROUPS;
    if (reply != NULL) kvloom__v1__host_reply__free_unpacked(reply, NULL);
    kvl_local_host_stop(b->host);
    b->host = NULL;
    return status;
}

static kvl_status measure(bench *b, const char *only, kvl_error *error)
{
    uint32_t groups[REQUESTS_MAX];
    kvl_random random = {23};
    for (uint32_t i = 0; i < REQUESTS_MAX; i++)
        groups[i] = (uint32_t)kvl_random_below(&random, GROUPS);
    KVL_TRY(bench_rag_corpus_make(GROUPS * CHUNKS, &b->corpus, error));
    KVL_TRY(ingest(b, error));
    if (only == NULL || strcmp(only, "healing") == 0) KVL_TRY(measure_healing(b, groups, error));
    b->n_requests *= 2;
    if (only == NULL || strcmp(only, "order") == 0) return measure_order(b, groups, error);
    return KVL_OK;
}

kvl_status kvl_bench_load_run(const kvl_cli_engine *engine, const char *only, uint32_t n_requests,
                              json_t *figures, json_t *rows, kvl_error *error)
{
    bench *b = kvl_alloc_zero(1, sizeof *b);
    if (b == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a benchmark");
    KVL_ASSERT(n_requests > 0 && 2 * n_requests <= REQUESTS_MAX);
    b->engine = engine;
    b->n_requests = n_requests;
    b->figures = figures;
    b->rows = rows;
    (void)pthread_mutex_init(&b->lock, NULL);
    kvl_random_secret(b->key, sizeof b->key);
    kvl_status status = kvl_cli_temporary("bench", b->directory, sizeof b->directory, error);
    if (status == KVL_OK) {
        (void)snprintf(b->store, sizeof b->store, "%s/store", b->directory);
        status = measure(b, only, error);
        kvl_error ignored;
        (void)!kvl_directory_remove(b->directory, &ignored);
    }
    bench_rag_corpus_deinit(&b->corpus);
    (void)pthread_mutex_destroy(&b->lock);
    kvl_free(b);
    return status;
}
