/* cli/cmd_ingest.c: `kvloom ingest`: documents into a collection, and the KV of their chunks into
 * the store beside it. What is there already is not read again. */
#include "base/alloc.h"
#include "base/clock.h"
#include "cli/rag.h"
#include "rag/documents.h"
#include "rag/split.h"

#include <argp.h>
#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    PATHS_MAX = 256,
    AT_ONCE = 4, /* chunks of one task: what a kill may cost */
    ORPHANS_AT_ONCE = 1024,
    STORE_GIB_DEFAULT = 16,
    BAR_WIDTH = 24,
    OPTION_JSON = 256,
    OPTION_REBUILD,
    OPTION_CHUNK_TOKENS,
    OPTION_STORE
};

typedef struct arguments {
    kvl_cli_engine engine;
    const char *paths[PATHS_MAX];
    size_t n_paths;
    const char *collection;
    uint32_t n_chunk_tokens, store_gib;
    bool rebuild, json;
} arguments;

static const struct argp_option options[] = {
    {"collection", 'C', "C", 0, "Name of the collection, or its directory (default)", 0},
    {"chunk-tokens", OPTION_CHUNK_TOKENS, "N", 0, "Length of a chunk, about (256)", 0},
    {"store-gib", OPTION_STORE, "N", 0, "Largest size of the collection's KV store (16)", 0},
    {"rebuild", OPTION_REBUILD, NULL, 0, "Choose another primer and prefill everything again", 0},
    {"json", OPTION_JSON, NULL, 0, "Print one JSON object instead of text", 0},
    {0},
};

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &wanted->engine; return 0;
    case 'C': wanted->collection = text; return 0;
    case OPTION_CHUNK_TOKENS:
        wanted->n_chunk_tokens = kvl_cli_number(state, "--chunk-tokens", text,
                                                KVL_SPLIT_TOKENS_LEAST, KVL_SPLIT_TOKENS_MAX);
        return 0;
    case OPTION_STORE:
        wanted->store_gib = kvl_cli_number(state, "--store-gib", text, 1, 1 << 20);
        return 0;
    case OPTION_REBUILD: wanted->rebuild = true; return 0;
    case OPTION_JSON: wanted->json = true; return 0;
    case ARGP_KEY_ARG:
        if (wanted->n_paths == PATHS_MAX)
            argp_error(state, "at most %d files and directories at once", PATHS_MAX);
        wanted->paths[wanted->n_paths++] = text;
        return 0;
    case ARGP_KEY_NO_ARGS: argp_usage(state); return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

/* What a pass has done. */
typedef struct ingestion {
    const arguments *wanted;
    kvl_rag rag;
    uint32_t n_documents, n_unchanged, n_new_chunks, n_removed, n_skipped;
    uint32_t n_prefilled, n_too_long, n_forgotten;
    double prefill_s;
    json_t *skipped; /* of --json */
} ingestion;

/* ---- documents ---- */

static kvl_status put_document(void *context, const char *path, const char *text, size_t n_bytes,
                               kvl_error *error)
{
    ingestion *work = context;
    kvl_collection_change change;
    KVL_TRY(kvl_collection_put(work->rag.collection, path, text, n_bytes, &change, error));
    work->n_documents++;
    work->n_unchanged += change.unchanged ? 1 : 0;
    work->n_new_chunks += change.n_new;
    return KVL_OK;
}

static void name_skipped(void *context, const char *path, const char *reason)
{
    ingestion *work = context;
    work->n_skipped++;
    (void)fprintf(stderr, "skipped %s: %s\n", path, reason);
    (void)json_array_append_new(work->skipped,
                                json_pack("{s:s, s:s}", "path", path, "reason", reason));
}

static kvl_status read_documents(ingestion *work, kvl_error *error)
{
    const kvl_documents_visitor visitor = {put_document, name_skipped, work};
    kvl_collection_begin_pass(work->rag.collection);
    for (size_t i = 0; i < work->wanted->n_paths; i++) {
        char path[PATH_MAX];
        if (realpath(work->wanted->paths[i], path) == NULL)
            return KVL_FAIL(error, KVL_ERR_NOT_FOUND, "%s: %s", work->wanted->paths[i],
                            strerror(errno));
        KVL_TRY(kvl_documents_visit(path, &visitor, error));
        uint32_t n_removed = 0;
        KVL_TRY(kvl_collection_sweep(work->rag.collection, path, &n_removed, error));
        work->n_removed += n_removed;
    }
    return KVL_OK;
}

/* ---- KV ---- */

static void show_progress(const ingestion *work, uint64_t n_done, uint64_t n_all, double seconds,
                          bool is_last)
{
    static uint64_t n_tenths_shown = 0;
    const double rate = seconds > 0.0 ? (double)n_done / seconds : 0.0;
    const double left = rate > 0.0 ? (double)(n_all - n_done) / rate : 0.0;
    char bar[BAR_WIDTH + 1];
    (void)work;
    for (uint64_t i = 0; i < BAR_WIDTH; i++) bar[i] = i * n_all < n_done * BAR_WIDTH ? '#' : '.';
    bar[BAR_WIDTH] = '\0';
    if (isatty(STDERR_FILENO) == 1) {
        (void)fprintf(stderr, "\r[%s] %llu of %llu chunks, %.1f/s, %.0f:%02.0f left ", bar,
                      (unsigned long long)n_done, (unsigned long long)n_all, rate,
                      (double)(long)(left / 60.0), left - 60.0 * (double)(long)(left / 60.0));
        if (is_last) (void)fprintf(stderr, "\n");
        return;
    }
    /* A log gets ten lines. */
    const uint64_t n_tenths = n_done * 10 / n_all;
    if (n_tenths == n_tenths_shown) return;
    n_tenths_shown = n_tenths;
    (void)fprintf(stderr, "[%s] %llu of %llu chunks, %.1f/s, %.0f s left\n", bar,
                  (unsigned long long)n_done, (unsigned long long)n_all, rate, left);
}

typedef struct batch {
    int64_t numbers[AT_ONCE];
    char *texts[AT_ONCE];
    kvl_rag_text chunks[AT_ONCE];
    size_t n;
} batch;

static void batch_deinit(batch *b)
{
    for (size_t i = 0; i < b->n; i++) kvl_free(b->texts[i]);
    b->n = 0;
}

static kvl_status take_batch(ingestion *work, int64_t *after, batch *b, kvl_error *error)
{
    *b = (batch){.n = 0};
    while (b->n < AT_ONCE) {
        kvl_collection_chunk chunk;
        bool found = false;
        KVL_TRY(kvl_collection_next_unread(work->rag.collection, work->rag.model, *after, &chunk,
                                           &found, error));
        if (!found) break;
        *after = chunk.number;
        char *text = kvl_alloc(chunk.n_bytes + 1);
        if (text == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a chunk");
        memcpy(text, chunk.text, chunk.n_bytes);
        text[chunk.n_bytes] = '\0';
        b->numbers[b->n] = chunk.number;
        b->texts[b->n] = text;
        b->chunks[b->n] = (kvl_rag_text){text, chunk.n_bytes};
        b->n++;
    }
    return KVL_OK;
}

/* Marks what the host says it has. A chunk longer than the context behind its home stays unread:
 * it is computed in each prompt. */
static kvl_status mark(ingestion *work, const batch *b, const Kvloom__V1__RunReply *reply,
                       kvl_error *error)
{
    int64_t numbers[AT_ONCE];
    kvl_digest segments[AT_ONCE];
    size_t n = 0;
    for (size_t i = 0; i < b->n && i < reply->n_parts; i++) {
        if (reply->parts[i]->segment.len != KVL_DIGEST_BYTES) {
            work->n_too_long++;
            continue;
        }
        memcpy(segments[n].bytes, reply->parts[i]->segment.data, KVL_DIGEST_BYTES);
        numbers[n++] = b->numbers[i];
    }
    work->n_prefilled += reply->read;
    return kvl_collection_mark_read(work->rag.collection, work->rag.model, numbers, segments, n,
                                    error);
}

static kvl_status prefill_batch(ingestion *work, const char *primer, const batch *b,
                                kvl_error *error)
{
    kvl_rag_prompt prompt;
    Kvloom__V1__RunReply *reply = NULL;
    kvl_rag_prompt_read(b->chunks, b->n, primer, &prompt);
    kvl_status status = kvl_local_host_run(work->rag.host, &prompt.run, &reply, error);
    if (status == KVL_OK) status = mark(work, b, reply, error);
    if (reply != NULL) kvloom__v1__run_reply__free_unpacked(reply, NULL);
    kvl_rag_prompt_deinit(&prompt);
    return status;
}

static kvl_status prefill(ingestion *work, uint64_t n_all, kvl_error *error)
{
    const char *primer = NULL;
    KVL_TRY(kvl_collection_primer(work->rag.collection, &primer, error));
    const int64_t start = kvl_clock_now(kvl_clock_system());
    int64_t after = 0;
    for (uint64_t n_done = 0; n_done < n_all;) {
        batch b;
        kvl_status status = take_batch(work, &after, &b, error);
        const bool is_end = status == KVL_OK && b.n == 0;
        if (status == KVL_OK && !is_end) status = prefill_batch(work, primer, &b, error);
        n_done += b.n;
        batch_deinit(&b);
        KVL_TRY(status);
        if (is_end) break;
        work->prefill_s = (double)(kvl_clock_now(kvl_clock_system()) - start) / KVL_NS_PER_S;
        show_progress(work, n_done, n_all, work->prefill_s, n_done >= n_all);
    }
    return KVL_OK;
}

/* Takes KV of chunks that are gone out of the store. */
static kvl_status forget(ingestion *work, const kvl_digest *segments, size_t n, kvl_error *error)
{
    ProtobufCBinaryData *ids = kvl_alloc_zero(n, sizeof *ids);
    if (ids == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a task");
    for (size_t i = 0; i < n; i++)
        ids[i] = (ProtobufCBinaryData){KVL_DIGEST_BYTES, (uint8_t *)(uintptr_t)segments[i].bytes};
    Kvloom__V1__ForgetTask what = KVLOOM__V1__FORGET_TASK__INIT;
    what.n_ids = n;
    what.ids = ids;
    Kvloom__V1__HostTask task = KVLOOM__V1__HOST_TASK__INIT;
    task.what_case = KVLOOM__V1__HOST_TASK__WHAT_FORGET;
    task.forget = &what;
    Kvloom__V1__HostReply *reply = NULL;
    kvl_status status = kvl_local_host_do(work->rag.host, &task, &reply, error);
    kvl_free(ids);
    if (status != KVL_OK) return status;
    if (reply->what_case == KVLOOM__V1__HOST_REPLY__WHAT_FORGOTTEN)
        work->n_forgotten += reply->forgotten;
    kvloom__v1__host_reply__free_unpacked(reply, NULL);
    return kvl_collection_drop_orphans(work->rag.collection, work->rag.model, segments, n, error);
}

static kvl_status forget_orphans(ingestion *work, kvl_error *error)
{
    kvl_digest *segments = kvl_alloc_zero(ORPHANS_AT_ONCE, sizeof *segments);
    if (segments == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for ids");
    kvl_status status = KVL_OK;
    for (size_t n = ORPHANS_AT_ONCE; n == ORPHANS_AT_ONCE && status == KVL_OK;) {
        status = kvl_collection_list_orphans(work->rag.collection, work->rag.model, ORPHANS_AT_ONCE,
                                             segments, &n, error);
        if (status == KVL_OK && n > 0) status = forget(work, segments, n, error);
    }
    kvl_free(segments);
    return status;
}

static kvl_status ingest(ingestion *work, const kvl_rag_options *about, kvl_error *error)
{
    kvl_collection_stats stats;
    kvl_digest orphan;
    size_t n_orphans = 0;
    KVL_TRY(kvl_rag_open(about, &work->rag, error));
    if (work->wanted->rebuild) KVL_TRY(kvl_collection_reset(work->rag.collection, error));
    KVL_TRY(read_documents(work, error));
    KVL_TRY(kvl_collection_get_stats(work->rag.collection, work->rag.model, &stats, error));
    KVL_TRY(kvl_collection_list_orphans(work->rag.collection, work->rag.model, 1, &orphan,
                                        &n_orphans, error));
    if (stats.n_unread == 0 && n_orphans == 0) return KVL_OK;
    KVL_TRY(kvl_rag_start(&work->rag, about, error));
    /* Room first: what is gone may be most of the store. After a reset it is all of it. */
    KVL_TRY(forget_orphans(work, error));
    return prefill(work, stats.n_unread, error);
}

/* ---- what it says ---- */

static kvl_status print_outcome(ingestion *work, kvl_error *error)
{
    kvl_collection_stats stats;
    KVL_TRY(kvl_collection_get_stats(work->rag.collection, work->rag.model, &stats, error));
    if (!work->wanted->json) {
        (void)printf("%u documents, %u of them unchanged, %u removed, %u files skipped\n"
                     "%u new chunks; %u prefilled in %.1f s, %u forgotten\n"
                     "%s: %llu documents, %llu chunks of about %u tokens\n",
                     work->n_documents, work->n_unchanged, work->n_removed, work->n_skipped,
                     work->n_new_chunks, work->n_prefilled, work->prefill_s, work->n_forgotten,
                     work->rag.directory, (unsigned long long)stats.n_documents,
                     (unsigned long long)stats.n_chunks, stats.n_chunk_tokens);
        if (work->n_too_long > 0)
            (void)printf("%u chunks are longer than the context behind the primer: computed in "
                         "each prompt; use smaller --chunk-tokens\n",
                         work->n_too_long);
        return KVL_OK;
    }
    json_t *report =
        json_pack("{s:i, s:i, s:i, s:i, s:i, s:f, s:i, s:i, s:O, s:{s:s, s:I, s:I, s:I, s:i}}",
                  "documents", (int)work->n_documents, "unchanged", (int)work->n_unchanged,
                  "removed", (int)work->n_removed, "new_chunks", (int)work->n_new_chunks,
                  "prefilled", (int)work->n_prefilled, "prefill_s", work->prefill_s, "forgotten",
                  (int)work->n_forgotten, "too_long", (int)work->n_too_long, "skipped",
                  work->skipped, "collection", "directory", work->rag.directory, "documents",
                  (json_int_t)stats.n_documents, "chunks", (json_int_t)stats.n_chunks, "unread",
                  (json_int_t)stats.n_unread, "chunk_tokens", (int)stats.n_chunk_tokens);
    (void)json_dumpf(report, stdout, JSON_INDENT(2));
    (void)printf("\n");
    json_decref(report);
    return KVL_OK;
}

int kvl_command_ingest(int argc, char **argv)
{
    static const struct argp_child children[] = {{&kvl_cli_engine_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        options,
        parse,
        "DIR|FILE...",
        "Read documents into a collection and prefill their chunks, for `kvloom ask`. What is "
        "there already stays; what an edit changed is made again; what is gone goes.",
        children,
        NULL,
        NULL};
    arguments wanted = {.collection = "default", .store_gib = STORE_GIB_DEFAULT};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    if (wanted.engine.n_positions == 0) wanted.engine.n_positions = 4096;
    const kvl_rag_options about = {
        .collection = wanted.collection,
        .create = true,
        .n_chunk_tokens = wanted.n_chunk_tokens,
        .engine = &wanted.engine,
        .store_bytes_max = (uint64_t)wanted.store_gib << 30,
    };
    ingestion work = {.wanted = &wanted, .skipped = json_array()};
    kvl_error error = {0};
    kvl_status status = ingest(&work, &about, &error);
    if (status == KVL_OK) status = print_outcome(&work, &error);
    kvl_rag_close(&work.rag);
    json_decref(work.skipped);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
