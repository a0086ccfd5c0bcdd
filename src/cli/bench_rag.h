/* cli/bench_rag.h: the corpus and the run of `kvloom bench rag`; private to the room. */
#ifndef KVL_CLI_BENCH_RAG_H
#define KVL_CLI_BENCH_RAG_H

#include "cli/rag.h"

#include <jansson.h>

enum { BENCH_RAG_CHUNKS_MAX = 48, BENCH_RAG_TOKENS = 224 };

/* Chunks of real text, each with a fact of its own in its middle. */
typedef struct bench_rag_corpus {
    kvl_rag_text chunks[BENCH_RAG_CHUNKS_MAX];
    char *texts[BENCH_RAG_CHUNKS_MAX];
    struct {
        char name[32], code[8];
    } facts[BENCH_RAG_CHUNKS_MAX];
    uint32_t n;
    char *primer; /* three chunks that are not among them */
} bench_rag_corpus;

/* From the documents that are installed on this machine (licences, then package documentation); the
 * same documents give the same corpus.
 * Errors   KVL_ERR_NOT_FOUND (too few), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status bench_rag_corpus_make(uint32_t n, bench_rag_corpus *corpus,
                                              kvl_error *error);
void bench_rag_corpus_deinit(bench_rag_corpus *corpus);

/* Adds the figures, medians of n_rounds (1 .. 99) prompts, and a row for each run.
 * Errors   those of hosts and of the corpus */
KVL_MUST_USE kvl_status kvl_bench_rag_run(const kvl_cli_engine *engine, bool quick,
                                          uint32_t n_rounds, json_t *figures, json_t *rows,
                                          kvl_error *error);

#endif /* KVL_CLI_BENCH_RAG_H */
