/* cli/bench_rag.c: `kvloom bench rag`: prompts of retrieved chunks of this machine's own documents,
 * with facts planted in them: time to first token and throughput beside full prefill, prompt by
 * prompt in one run, and where the time goes. */
#include "cli/bench_rag.h"
#include "base/alloc.h"
#include "base/file.h"
#include "base/random.h"
#include "cli/bench.h"
#include "cli/bench_data.h"

#include <string.h>

enum {
    ROUNDS_MAX = 99,
    ROUNDS_QUICK = 2,
    LOAD_DEFAULT = 12,
    LOAD_QUICK = 3,
    LOAD_ANSWER = 16,
    CHUNKS = 6,
    LONG_CHUNKS = 8, /* about 2K tokens */
    MEMORY_LEAST = 1 /* byte: a memory tier that keeps nothing, so that every chunk is read anew */
};

typedef struct bench {
    uint32_t n_rounds, n_load;
    const kvl_cli_engine *engine;
    bench_rag_corpus corpus;
    char directory[64], store[96];
    uint8_t key[KVL_RAG_KEY_BYTES];
    kvl_local_host *host;
    uint32_t n_prompts; /* so far: no two begin alike */
    json_t *figures, *rows;
} bench;

/* What a run asks for, beside its chunks. */
typedef struct way {
    const char *name, *select;
    Kvloom__V1__Mode mode;
    Kvloom__V1__Quality quality;
    bool load_first;
} way;

static const way full = {"full prefill", "", KVLOOM__V1__MODE__MODE_FULL,
                         KVLOOM__V1__QUALITY__QUALITY_EXACT, false};
static const way exact = {"no reuse", "", KVLOOM__V1__MODE__MODE_REUSE,
                          KVLOOM__V1__QUALITY__QUALITY_EXACT, false};
static const way balanced = {"balanced", "", KVLOOM__V1__MODE__MODE_REUSE,
                             KVLOOM__V1__QUALITY__QUALITY_BALANCED, false};
static const way fast = {"fast", "", KVLOOM__V1__MODE__MODE_REUSE,
                         KVLOOM__V1__QUALITY__QUALITY_FAST, false};
static const way query15 = {"query15", "query15", KVLOOM__V1__MODE__MODE_REUSE,
                            KVLOOM__V1__QUALITY__QUALITY_BALANCED, false};
static const way query15_apart = {"query15, loaded first", "query15", KVLOOM__V1__MODE__MODE_REUSE,
                                  KVLOOM__V1__QUALITY__QUALITY_BALANCED, true};

static kvl_status open_host(bench *b, uint64_t memory_bytes, kvl_error *error)
{
    const kvl_local_host_options options = {.engine = b->engine,
                                            .store_path = b->store,
                                            .tenant_key = b->key,
                                            .memory_bytes_max = memory_bytes};
    return kvl_local_host_open(&options, &b->host, error);
}

/* Has every chunk's KV in the store, behind the corpus's primer. */
static kvl_status ingest(bench *b, kvl_error *error)
{
    for (uint32_t c = 0; c < b->corpus.n; c++) {
        kvl_rag_prompt prompt;
        Kvloom__V1__RunReply *reply = NULL;
        kvl_rag_prompt_read(&b->corpus.chunks[c], 1, b->corpus.primer, &prompt);
        const kvl_status status = kvl_local_host_run(b->host, &prompt.run, &reply, error);
        kvl_rag_prompt_deinit(&prompt);
        if (status != KVL_OK) return status;
        kvloom__v1__run_reply__free_unpacked(reply, NULL);
        (void)fprintf(stderr, "\rbench: %u of %u chunks read ", c + 1, b->corpus.n);
    }
    (void)fprintf(stderr, "\n");
    return KVL_OK;
}

/* Runs chunks picked [n]; the question is about the last of them. The prompt begins with a number
 * of its own: nothing of it is in the prefix tree. */
static kvl_status run(bench *b, const way *how, const uint32_t *picked, uint32_t n,
                      uint32_t max_tokens, Kvloom__V1__RunReply **reply, kvl_error *error)
{
    kvl_rag_text chunks[LONG_CHUNKS];
    char instruction[128], question[192];
    for (uint32_t i = 0; i < n; i++) chunks[i] = b->corpus.chunks[picked[i]];
    (void)snprintf(instruction, sizeof instruction,
                   "Request %u. Answer from these texts, in one sentence.\n\n", ++b->n_prompts);
    (void)snprintf(question, sizeof question, "\n\nQuestion: What is the access code of %s?",
                   b->corpus.facts[picked[n - 1]].name);
    kvl_rag_prompt prompt;
    kvl_status status = kvl_rag_prompt_make(kvl_local_host_model(b->host), instruction, chunks, n,
                                            question, b->corpus.primer, &prompt, error);
    if (status == KVL_OK) {
        prompt.run.mode = how->mode;
        prompt.run.quality = how->quality;
        prompt.run.select = (char *)(uintptr_t)how->select;
        prompt.run.load_first = how->load_first;
        prompt.run.max_tokens = max_tokens;
        status = kvl_local_host_run(b->host, &prompt.run, reply, error);
    }
    kvl_rag_prompt_deinit(&prompt);
    return status;
}

/* n different chunks. */
static void pick(kvl_random *random, uint32_t n_all, uint32_t n, uint32_t *picked)
{
    for (uint32_t i = 0; i < n; i++) {
        bool is_new = false;
        while (!is_new) {
            picked[i] = (uint32_t)kvl_random_below(random, n_all);
            is_new = true;
            for (uint32_t j = 0; j < i; j++) is_new = is_new && picked[j] != picked[i];
        }
    }
}

static uint32_t count_placed(const Kvloom__V1__RunReply *reply)
{
    uint32_t n = 0;
    for (size_t p = 0; p < reply->n_parts; p++) n += reply->parts[p]->blended;
    return n;
}

/* The timeline of loading beside computing: when each layer was loaded, and when the first pass had
 * computed it. */
static void add_layers(json_t *row, const char *name, const double *ms, size_t n)
{
    json_t *layers = json_array();
    for (size_t l = 0; l < n; l++) (void)json_array_append_new(layers, json_real(ms[l]));
    (void)json_object_set_new(row, name, layers);
}

static void add_row(bench *b, const char *where, const way *how, const Kvloom__V1__RunReply *reply)
{
    json_t *row = json_pack("{s:s, s:s, s:i, s:i, s:i, s:f, s:f, s:f, s:f, s:f, s:f}", "from",
                            where, "way", how->name, "tokens", (int)reply->prompt_tokens, "placed",
                            (int)count_placed(reply), "recomputed", (int)reply->recomputed,
                            "ttft_ms", reply->ttft_ms, "fetch_ms", reply->fetch_ms, "place_ms",
                            reply->place_ms, "select_ms", reply->select_ms, "compute_ms",
                            reply->compute_ms, "wait_ms", reply->wait_ms);
    if (how == &query15) {
        add_layers(row, "layer_loaded_ms", reply->layer_loaded_ms, reply->n_layer_loaded_ms);
        add_layers(row, "layer_computed_ms", reply->layer_computed_ms, reply->n_layer_computed_ms);
    }
    (void)json_array_append_new(b->rows, row);
}

/* One prompt in one way; its time to the first token. */
static kvl_status time_one(bench *b, const char *where, const way *how, const uint32_t *picked,
                           uint32_t n, double *ttft_ms, double *compute_ms, kvl_error *error)
{
    Kvloom__V1__RunReply *reply = NULL;
    KVL_TRY(run(b, how, picked, n, 1, &reply, error));
    *ttft_ms = reply->ttft_ms;
    if (compute_ms != NULL) *compute_ms = reply->compute_ms;
    add_row(b, where, how, reply);
    const bool is_reused = count_placed(reply) > reply->prompt_tokens / 2;
    kvloom__v1__run_reply__free_unpacked(reply, NULL);
    if (how->mode == KVLOOM__V1__MODE__MODE_FULL || is_reused) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_INVALID, "%s from %s: most of the prompt was not reused",
                    how->name, where);
}

static void set(bench *b, const char *figure, double value)
{
    (void)json_object_set_new(b->figures, figure, json_real(value));
    (void)fprintf(stderr, "bench: %s %.3f\n", figure, value);
}

/* Median of full prefill's time over each way's, of prompts that were run in all of them. */
static kvl_status measure_ttft(bench *b, const char *where, const way *const *ways,
                               const char *const *names, size_t n_ways, kvl_error *error)
{
    double ratios[4][ROUNDS_MAX];
    kvl_random random = {11};
    KVL_ASSERT(n_ways <= 4);
    for (uint32_t r = 0; r < b->n_rounds + 1; r++) {
        uint32_t picked[CHUNKS];
        double full_ms = 0.0;
        pick(&random, b->corpus.n, CHUNKS, picked);
        KVL_TRY(time_one(b, where, &full, picked, CHUNKS, &full_ms, NULL, error));
        for (size_t w = 0; w < n_ways; w++) {
            double ms = 0.0;
            KVL_TRY(time_one(b, where, ways[w], picked, CHUNKS, &ms, NULL, error));
            /* The first round warms up. */
            ratios[w][r == 0 ? 0 : r - 1] = full_ms / ms;
        }
    }
    for (size_t w = 0; w < n_ways; w++) set(b, names[w], kvl_bench_median(ratios[w], b->n_rounds));
    return KVL_OK;
}

/* A fused prefill beside its two halves alone, and the recompute of 15 % beside full prefill's. */
static kvl_status measure_overlap(bench *b, kvl_error *error)
{
    double overlap[ROUNDS_MAX], cost[ROUNDS_MAX];
    kvl_random random = {13};
    for (uint32_t r = 0; r < b->n_rounds + 1; r++) {
        uint32_t picked[LONG_CHUNKS];
        double full_ms = 0.0, ignored = 0.0;
        const uint32_t at = r == 0 ? 0 : r - 1;
        pick(&random, b->corpus.n, LONG_CHUNKS, picked);
        KVL_TRY(time_one(b, "memory", &full, picked, LONG_CHUNKS, &ignored, &full_ms, error));
        Kvloom__V1__RunReply *apart = NULL, *fused = NULL;
        KVL_TRY(run(b, &query15_apart, picked, LONG_CHUNKS, 1, &apart, error));
        kvl_status status = run(b, &query15, picked, LONG_CHUNKS, 1, &fused, error);
        if (status == KVL_OK) {
            const double load = apart->place_ms;
            const double recompute = apart->select_ms + apart->compute_ms;
            const double together = fused->place_ms + fused->select_ms + fused->compute_ms;
            overlap[at] = together / (load > recompute ? load : recompute);
            cost[at] = apart->compute_ms / full_ms;
            add_row(b, "memory", &query15_apart, apart);
            add_row(b, "memory", &query15, fused);
        }
        kvloom__v1__run_reply__free_unpacked(apart, NULL);
        if (fused != NULL) kvloom__v1__run_reply__free_unpacked(fused, NULL);
        KVL_TRY(status);
    }
    set(b, "overlap_ratio", kvl_bench_median(overlap, b->n_rounds));
    set(b, "selective15_cost_ratio", kvl_bench_median(cost, b->n_rounds));
    return KVL_OK;
}

/* Requests whose chunks come again and again, each answered in full length, one after another, in
 * turn with and without reuse. */
static kvl_status measure_load(bench *b, kvl_error *error)
{
    static const way *const ways[] = {&exact, &balanced};
    double seconds[2] = {0.0, 0.0};
    uint32_t n_right = 0;
    kvl_random random = {17};
    for (uint32_t i = 0; i < b->n_load; i++) {
        uint32_t picked[CHUNKS];
        pick(&random, b->corpus.n, CHUNKS, picked);
        for (size_t w = 0; w < 2; w++) {
            Kvloom__V1__RunReply *reply = NULL;
            const int64_t start = kvl_clock_now(kvl_clock_system());
            KVL_TRY(run(b, ways[w], picked, CHUNKS, LOAD_ANSWER, &reply, error));
            seconds[w] += kvl_bench_seconds_since(start);
            const char *code = b->corpus.facts[picked[CHUNKS - 1]].code;
            n_right += memmem(reply->text.data, reply->text.len, code, strlen(code)) != NULL;
            kvloom__v1__run_reply__free_unpacked(reply, NULL);
        }
    }
    set(b, "throughput_ratio", seconds[0] / seconds[1]);
    (void)json_array_append_new(
        b->rows, json_pack("{s:s, s:i, s:f, s:f, s:i}", "from", "load of repeated chunks",
                           "requests", (int)b->n_load, "no_reuse_s", seconds[0], "balanced_s",
                           seconds[1], "answers_with_the_fact", (int)n_right));
    return KVL_OK;
}

static kvl_status measure_memory(bench *b, kvl_error *error)
{
    static const way *const ways[] = {&balanced, &fast};
    static const char *const names[] = {"ttft_ratio_memory", "ttft_ratio_fast"};
    KVL_TRY(ingest(b, error));
    KVL_TRY(measure_ttft(b, "memory", ways, names, 2, error));
    KVL_TRY(measure_overlap(b, error));
    return measure_load(b, error);
}

/* Another host over the same store, whose memory keeps nothing: what is read comes from LMDB each
 * time. Its pages may be in the system's page cache. */
static kvl_status measure_lmdb(bench *b, kvl_error *error)
{
    static const way *const ways[] = {&balanced, &fast};
    static const char *const names[] = {"ttft_ratio_lmdb", "ttft_ratio_fast_lmdb"};
    return measure_ttft(b, "LMDB", ways, names, 2, error);
}

static kvl_status measure(bench *b, kvl_error *error)
{
    kvl_status status = open_host(b, 0, error);
    if (status == KVL_OK) status = measure_memory(b, error);
    kvl_local_host_stop(b->host);
    b->host = NULL;
    KVL_TRY(status);
    KVL_TRY(open_host(b, MEMORY_LEAST, error));
    status = measure_lmdb(b, error);
    kvl_local_host_stop(b->host);
    return status;
}

kvl_status kvl_bench_rag_run(const kvl_cli_engine *engine, bool quick, uint32_t n_rounds,
                             json_t *figures, json_t *rows, kvl_error *error)
{
    bench b = {.n_rounds = quick ? ROUNDS_QUICK : n_rounds,
               .n_load = quick ? LOAD_QUICK : LOAD_DEFAULT,
               .engine = engine,
               .figures = figures,
               .rows = rows};
    KVL_ASSERT(b.n_rounds > 0 && b.n_rounds <= ROUNDS_MAX);
    KVL_TRY(kvl_cli_temporary("bench", b.directory, sizeof b.directory, error));
    (void)snprintf(b.store, sizeof b.store, "%s/store", b.directory);
    kvl_random_secret(b.key, sizeof b.key);
    kvl_status status = bench_rag_corpus_make(quick ? LONG_CHUNKS : 4 * CHUNKS, &b.corpus, error);
    if (status == KVL_OK) status = measure(&b, error);
    bench_rag_corpus_deinit(&b.corpus);
    kvl_error ignored;
    (void)!kvl_directory_remove(b.directory, &ignored);
    return status;
}
