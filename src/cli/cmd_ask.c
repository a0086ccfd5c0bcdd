/* cli/cmd_ask.c: `kvloom ask`: retrieves chunks, fuses them into one prompt, streams the answer,
 * then says what it was made from and what was reused. */
#include "base/alloc.h"
#include "cli/rag.h"

#include <argp.h>
#include <jansson.h>
#include <string.h>

enum {
    TOP_DEFAULT = 6,
    ANSWER_DEFAULT = 128,
    QUESTION_BYTES_MAX = 8192,
    OPTION_JSON = 256,
    OPTION_QUALITY,
    OPTION_DONORS,
    OPTION_TOP
};

typedef struct arguments {
    kvl_cli_engine engine;
    const char *collection, *question;
    Kvloom__V1__Quality quality;
    const char *quality_name;
    Kvloom__V1__Donors donors;
    uint32_t n_top, max_tokens;
    bool json;
} arguments;

static const struct argp_option options[] = {
    {"collection", 'C', "C", 0, "Name of the collection, or its directory (default)", 0},
    {"top", OPTION_TOP, "N", 0, "Chunks to answer from (6)", 0},
    {"quality", OPTION_QUALITY, "Q", 0, "exact, verified, balanced or fast (balanced)", 0},
    {"donors", OPTION_DONORS, "USE", 0,
     "on, read or off: KV of chunks as they stood in exact prompts before, used and kept, or only "
     "used (on)",
     0},
    {"max-tokens", 'n', "N", 0, "Longest answer in tokens (128)", 0},
    {"json", OPTION_JSON, NULL, 0, "Print one JSON object instead of streaming", 0},
    {0},
};

static const struct {
    const char *name;
    Kvloom__V1__Quality quality;
} qualities[] = {
    {"exact", KVLOOM__V1__QUALITY__QUALITY_EXACT},
    {"verified", KVLOOM__V1__QUALITY__QUALITY_VERIFIED},
    {"balanced", KVLOOM__V1__QUALITY__QUALITY_BALANCED},
    {"fast", KVLOOM__V1__QUALITY__QUALITY_FAST},
};

static void parse_quality(arguments *wanted, const char *text, const struct argp_state *state)
{
    for (size_t i = 0; i < sizeof qualities / sizeof *qualities; i++) {
        if (strcmp(text, qualities[i].name) != 0) continue;
        wanted->quality = qualities[i].quality;
        wanted->quality_name = qualities[i].name;
        return;
    }
    argp_error(state, "--quality is '%s'; it must be exact, verified, balanced or fast", text);
}

static void parse_donors(arguments *wanted, const char *text, const struct argp_state *state)
{
    if (strcmp(text, "on") == 0)
        wanted->donors = KVLOOM__V1__DONORS__DONORS_ON;
    else if (strcmp(text, "read") == 0)
        wanted->donors = KVLOOM__V1__DONORS__DONORS_READ;
    else if (strcmp(text, "off") == 0)
        wanted->donors = KVLOOM__V1__DONORS__DONORS_OFF;
    else
        argp_error(state, "--donors is '%s'; it must be on, read or off", text);
}

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &wanted->engine; return 0;
    case 'C': wanted->collection = text; return 0;
    case OPTION_TOP:
        wanted->n_top = kvl_cli_number(state, "--top", text, 1, KVL_RAG_CHUNKS_MAX);
        return 0;
    case OPTION_QUALITY: parse_quality(wanted, text, state); return 0;
    case OPTION_DONORS: parse_donors(wanted, text, state); return 0;
    case 'n':
        wanted->max_tokens = kvl_cli_number(state, "--max-tokens", text, 1, KVL_POSITIONS_MAX);
        return 0;
    case OPTION_JSON: wanted->json = true; return 0;
    case ARGP_KEY_ARG:
        if (wanted->question != NULL)
            argp_error(state, "one question at a time; put it in quotes: \"%s ...\"",
                       wanted->question);
        if (strlen(text) > QUESTION_BYTES_MAX)
            argp_error(state, "the question has %zu bytes; at most %d are allowed", strlen(text),
                       QUESTION_BYTES_MAX);
        wanted->question = text;
        return 0;
    case ARGP_KEY_NO_ARGS: argp_usage(state); return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

static void stream_text(void *context, const char *bytes, size_t n_bytes)
{
    (void)context;
    (void)fwrite(bytes, 1, n_bytes, stdout);
    (void)fflush(stdout);
}

typedef struct answer {
    const arguments *wanted;
    kvl_rag rag;
    kvl_collection_found found[KVL_RAG_CHUNKS_MAX];
    size_t n_found;
    Kvloom__V1__RunReply *reply;
} answer;

/* The best chunk comes last, beside the question. */
static size_t rank_of(const answer *a, size_t chunk)
{
    return a->n_found - 1 - chunk;
}

static kvl_status run(answer *a, kvl_error *error)
{
    const char *primer = NULL;
    kvl_rag_text chunks[KVL_RAG_CHUNKS_MAX];
    char question[QUESTION_BYTES_MAX + 64];
    KVL_TRY(kvl_collection_primer(a->rag.collection, &primer, error));
    for (size_t i = 0; i < a->n_found; i++) {
        const kvl_collection_found *found = &a->found[rank_of(a, i)];
        chunks[i] = (kvl_rag_text){found->text, found->n_bytes};
    }
    (void)snprintf(question, sizeof question, "\n\nQuestion: %s", a->wanted->question);
    kvl_rag_prompt prompt;
    kvl_status status =
        kvl_rag_prompt_make(kvl_local_host_model(a->rag.host),
                            "Answer the question from these texts, in one or two sentences.\n\n",
                            chunks, a->n_found, question, primer, &prompt, error);
    if (status == KVL_OK) {
        prompt.run.mode = KVLOOM__V1__MODE__MODE_REUSE;
        prompt.run.quality = a->wanted->quality;
        prompt.run.donors = a->wanted->donors;
        /* Ids are keyed by the collection's own key, so one name does for all of them. */
        prompt.run.collection = (char *)(uintptr_t) "collection";
        prompt.run.max_tokens = a->wanted->max_tokens;
        status = kvl_local_host_run(a->rag.host, &prompt.run, &a->reply, error);
    }
    kvl_rag_prompt_deinit(&prompt);
    return status;
}

static kvl_status ask(answer *a, kvl_error *error)
{
    const arguments *wanted = a->wanted;
    const kvl_rag_options about = {
        .collection = wanted->collection,
        .engine = &wanted->engine,
        .stream = wanted->json ? NULL : stream_text,
    };
    kvl_status status = kvl_rag_open(&about, &a->rag, error);
    if (status == KVL_ERR_NOT_FOUND)
        return KVL_FAIL(error, status,
                        "there is no collection '%s' (%s); make it with `kvloom ingest DIR "
                        "--collection %s`",
                        wanted->collection, a->rag.directory, wanted->collection);
    KVL_TRY(status);
    KVL_TRY(kvl_collection_search(a->rag.collection, a->rag.model, wanted->question, wanted->n_top,
                                  a->found, &a->n_found, error));
    if (a->n_found == 0)
        return KVL_FAIL(error, KVL_ERR_NOT_FOUND,
                        "no chunk of '%s' has a word of the question; ask with words that the "
                        "documents have",
                        wanted->collection);
    KVL_TRY(kvl_rag_start(&a->rag, &about, error));
    return run(a, error);
}

/* ---- what it says ---- */

static const Kvloom__V1__PartReport *part_of(const answer *a, size_t chunk)
{
    size_t n = 0;
    for (size_t p = 0; p < a->reply->n_parts; p++) {
        if (a->reply->parts[p]->slot[0] != '\0' && n++ == chunk) return a->reply->parts[p];
    }
    return NULL;
}

static uint32_t count_reused(const answer *a)
{
    uint32_t n = 0;
    for (size_t p = 0; p < a->reply->n_parts; p++)
        n += a->reply->parts[p]->n_tokens - a->reply->parts[p]->computed;
    return n;
}

static void print_sources(const answer *a)
{
    const Kvloom__V1__RunReply *reply = a->reply;
    if (a->wanted->quality == KVLOOM__V1__QUALITY__QUALITY_VERIFIED)
        (void)fwrite(reply->text.data, 1, reply->text.len, stdout);
    (void)printf("\n\nSources, best first:\n");
    for (size_t i = a->n_found; i-- > 0;) {
        const kvl_collection_found *found = &a->found[rank_of(a, i)];
        const Kvloom__V1__PartReport *part = part_of(a, i);
        if (part == NULL) continue;
        (void)printf("  %s, chunk %u (BM25 %.1f): %u tokens, %u reused\n", found->path,
                     found->place, found->score, part->n_tokens, part->n_tokens - part->computed);
    }
    (void)printf("%u of %u tokens of the prompt reused, %u of them computed again; first token "
                 "after %.0f ms%s\n",
                 count_reused(a), reply->prompt_tokens, reply->recomputed, reply->ttft_ms,
                 reply->exact      ? "; exact"
                 : reply->verified ? "; checked against a full prefill"
                                   : "; approximate");
}

static json_t *sources_of(const answer *a)
{
    json_t *sources = json_array();
    for (size_t i = a->n_found; i-- > 0;) {
        const kvl_collection_found *found = &a->found[rank_of(a, i)];
        const Kvloom__V1__PartReport *part = part_of(a, i);
        if (part == NULL) continue;
        (void)json_array_append_new(
            sources,
            json_pack("{s:s, s:i, s:f, s:i, s:b, s:i, s:i, s:i, s:s}", "path", found->path, "chunk",
                      (int)found->place, "score", found->score, "tokens", (int)part->n_tokens,
                      "donor", (int)part->donor, "shared", (int)part->shared, "blended",
                      (int)(part->blended + part->placed + part->offset), "computed",
                      (int)part->computed, "reason", part->reason));
    }
    return sources;
}

static void print_json(const answer *a)
{
    const Kvloom__V1__RunReply *reply = a->reply;
    /* An answer may end inside of a character. */
    json_t *text = NULL;
    for (size_t n = reply->text.len; text == NULL && n + 4 > reply->text.len; n--) {
        text = json_stringn((const char *)reply->text.data, n);
        if (n == 0) break;
    }
    json_t *report = json_pack(
        "{s:s, s:o, s:o, s:s, s:b, s:b, s:{s:i, s:i, s:i, s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:f}}",
        "question", a->wanted->question, "answer", text != NULL ? text : json_string(""), "sources",
        sources_of(a), "quality", a->wanted->quality_name, "exact", (int)reply->exact, "verified",
        (int)reply->verified, "usage", "prompt_tokens", (int)reply->prompt_tokens,
        "completion_tokens", (int)reply->n_tokens, "reused_tokens", (int)count_reused(a),
        "recomputed_tokens", (int)reply->recomputed, "ttft_ms", reply->ttft_ms, "total_ms",
        reply->total_ms, "fetch_ms", reply->fetch_ms, "place_ms", reply->place_ms, "select_ms",
        reply->select_ms, "compute_ms", reply->compute_ms, "verify_ms", reply->verify_ms);
    (void)json_dumpf(report, stdout, JSON_INDENT(2));
    (void)printf("\n");
    json_decref(report);
}

int kvl_command_ask(int argc, char **argv)
{
    static const struct argp_child children[] = {{&kvl_cli_engine_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {options,
                                     parse,
                                     "\"QUESTION\"",
                                     "Answer a question from a collection of `kvloom ingest`.",
                                     children,
                                     NULL,
                                     NULL};
    arguments wanted = {.collection = "default",
                        .quality = KVLOOM__V1__QUALITY__QUALITY_BALANCED,
                        .quality_name = "balanced",
                        .n_top = TOP_DEFAULT,
                        .max_tokens = ANSWER_DEFAULT};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    if (wanted.engine.n_positions == 0) wanted.engine.n_positions = 4096;
    answer a = {.wanted = &wanted};
    kvl_error error = {0};
    const kvl_status status = ask(&a, &error);
    if (status == KVL_OK && wanted.json) print_json(&a);
    if (status == KVL_OK && !wanted.json) print_sources(&a);
    if (a.reply != NULL) kvloom__v1__run_reply__free_unpacked(a.reply, NULL);
    for (size_t i = 0; i < a.n_found; i++) kvl_collection_found_deinit(&a.found[i]);
    kvl_rag_close(&a.rag);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
