/* cli/bench_rag_corpus.c: real text from the documents of this machine, with planted facts. */
#include "base/alloc.h"
#include "base/random.h"
#include "cli/bench_rag.h"
#include "rag/documents.h"
#include "rag/split.h"

#include <string.h>

enum { PRIMERS = 3, CHUNKS_OF_A_DOCUMENT = 6 };

/* Licences are on every Debian, in all lengths; the rest makes the texts more various. */
static const char *const places[] = {"/usr/share/common-licenses", "/usr/share/doc",
                                     "/usr/share/perl"};

static const char *const subjects[] = {"the harbour crane", "the north gate",  "the boiler room",
                                       "the seed bank",     "the tram depot",  "the town archive",
                                       "the cold store",    "the signal tower"};
static const char *const owners[] = {"of Tornby", "of Aldwick", "of Vessen",
                                     "of Marlow", "of Quern",   "of Holt"};
enum { N_SUBJECTS = sizeof subjects / sizeof *subjects, N_OWNERS = sizeof owners / sizeof *owners };

typedef struct gathering {
    bench_rag_corpus *corpus;
    uint32_t n_wanted; /* with the primer's */
    uint32_t n_taken;
    kvl_digest seen[BENCH_RAG_CHUNKS_MAX + PRIMERS];
} gathering;

static kvl_digest digest_of(const char *text, size_t n_bytes)
{
    kvl_digester digester;
    kvl_digester_init(&digester, NULL, 0);
    kvl_digester_add(&digester, text, n_bytes);
    return kvl_digester_end(&digester);
}

static bool is_new(gathering *g, const char *text, size_t n_bytes)
{
    const kvl_digest digest = digest_of(text, n_bytes);
    for (uint32_t i = 0; i < g->n_taken; i++) {
        if (kvl_digest_equal(&g->seen[i], &digest)) return false;
    }
    g->seen[g->n_taken] = digest;
    return true;
}

/* The text with its fact behind a sentence near the middle, or at the end. */
static char *plant(const char *text, size_t n_bytes, const char *name, const char *code)
{
    char fact[96];
    const size_t n_fact =
        (size_t)snprintf(fact, sizeof fact, " The access code of %s is %s.", name, code);
    size_t at = n_bytes;
    for (size_t i = n_bytes / 2; i + 1 < n_bytes; i++) {
        if (text[i] != '.' || (text[i + 1] != ' ' && text[i + 1] != '\n')) continue;
        at = i + 1;
        break;
    }
    char *planted = kvl_alloc(n_bytes + n_fact + 1);
    if (planted == NULL) return NULL;
    memcpy(planted, text, at);
    memcpy(planted + at, fact, n_fact);
    memcpy(planted + at + n_fact, text + at, n_bytes - at);
    planted[n_bytes + n_fact] = '\0';
    return planted;
}

static kvl_status add_to_primer(bench_rag_corpus *corpus, const char *text, size_t n_bytes,
                                kvl_error *error)
{
    const size_t n = corpus->primer == NULL ? 0 : strlen(corpus->primer);
    char *grown = kvl_realloc(corpus->primer, n + n_bytes + 3);
    if (grown == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a primer");
    memcpy(grown + n, text, n_bytes);
    memcpy(grown + n + n_bytes, "\n\n", 3);
    corpus->primer = grown;
    return KVL_OK;
}

static kvl_status add_chunk(bench_rag_corpus *corpus, const char *text, size_t n_bytes,
                            kvl_error *error)
{
    const uint32_t c = corpus->n;
    kvl_random random = {c + 1};
    (void)kvl_random_next(&random);
    (void)snprintf(corpus->facts[c].name, sizeof corpus->facts[c].name, "%s %s",
                   subjects[c % N_SUBJECTS], owners[c / N_SUBJECTS % N_OWNERS]);
    (void)snprintf(corpus->facts[c].code, sizeof corpus->facts[c].code, "%u",
                   1000 + (uint32_t)kvl_random_below(&random, 9000));
    corpus->texts[c] = plant(text, n_bytes, corpus->facts[c].name, corpus->facts[c].code);
    if (corpus->texts[c] == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a chunk");
    corpus->chunks[c] = (kvl_rag_text){corpus->texts[c], strlen(corpus->texts[c])};
    corpus->n++;
    return KVL_OK;
}

/* Chunks of about the wanted length, a few of each document. */
static kvl_status take_document(void *context, const char *path, const char *text, size_t n_bytes,
                                kvl_error *error)
{
    gathering *g = context;
    kvl_text_span *spans = NULL;
    size_t n_spans = 0;
    (void)path;
    KVL_TRY(kvl_split_text(text, n_bytes, BENCH_RAG_TOKENS, &spans, &n_spans, error));
    kvl_status status = KVL_OK;
    uint32_t n_of_this = 0;
    for (size_t i = 0; i < n_spans && status == KVL_OK; i++) {
        const char *from = text + spans[i].first;
        const uint32_t guess = kvl_split_guess_tokens(from, spans[i].n_bytes);
        if (guess < BENCH_RAG_TOKENS * 3 / 4 || guess > BENCH_RAG_TOKENS * 5 / 4) continue;
        if (g->n_taken == g->n_wanted || n_of_this == CHUNKS_OF_A_DOCUMENT) break;
        if (!is_new(g, from, spans[i].n_bytes)) continue;
        status = g->n_taken < PRIMERS ? add_to_primer(g->corpus, from, spans[i].n_bytes, error)
                                      : add_chunk(g->corpus, from, spans[i].n_bytes, error);
        g->n_taken++;
        n_of_this++;
    }
    kvl_free(spans);
    if (status == KVL_OK && g->n_taken == g->n_wanted)
        return KVL_FAIL(error, KVL_ERR_CANCELLED, "enough");
    return status;
}

static void pass_over(void *context, const char *path, const char *reason)
{
    (void)context;
    (void)path;
    (void)reason;
}

kvl_status bench_rag_corpus_make(uint32_t n, bench_rag_corpus *corpus, kvl_error *error)
{
    *corpus = (bench_rag_corpus){.n = 0};
    KVL_ASSERT(n <= BENCH_RAG_CHUNKS_MAX);
    gathering g = {.corpus = corpus, .n_wanted = n + PRIMERS};
    const kvl_documents_visitor visitor = {take_document, pass_over, &g};
    kvl_status status = KVL_OK;
    for (size_t i = 0; i < sizeof places / sizeof *places && g.n_taken < g.n_wanted; i++) {
        status = kvl_documents_visit(places[i], &visitor, error);
        if (status == KVL_ERR_NO_MEMORY) break;
    }
    if (g.n_taken == g.n_wanted) return KVL_OK;
    bench_rag_corpus_deinit(corpus);
    if (status == KVL_ERR_NO_MEMORY) return status;
    return KVL_FAIL(error, KVL_ERR_NOT_FOUND,
                    "%s and %s have %u chunks of text, %u are needed; install a package with "
                    "documentation",
                    places[0], places[1], g.n_taken, g.n_wanted);
}

void bench_rag_corpus_deinit(bench_rag_corpus *corpus)
{
    for (uint32_t i = 0; i < corpus->n; i++) kvl_free(corpus->texts[i]);
    kvl_free(corpus->primer);
    *corpus = (bench_rag_corpus){.n = 0};
}
