/* cli/rag.h: what ingest, ask and `bench rag` share: where a collection is kept, and prompts made
 * of its chunks. Private to the room. */
#ifndef KVL_CLI_RAG_H
#define KVL_CLI_RAG_H

#include "cli/task.h"
#include "rag/collection.h"

#define KVL_RAG_CHUNKS_MAX 24u
#define KVL_RAG_KEY_BYTES 32u

/* A collection with the host that has its KV. */
typedef struct kvl_rag {
    char directory[PATH_MAX], store[PATH_MAX];
    char model[KVL_MODEL_NAME_MAX];
    uint8_t key[KVL_RAG_KEY_BYTES]; /* of this collection's segments alone */
    kvl_collection *collection;
    kvl_local_host *host; /* NULL until it is started */
} kvl_rag;

typedef struct kvl_rag_options {
    const char *collection; /* a name, or a path with a slash in it */
    bool create;
    uint32_t n_chunk_tokens; /* 0: as it is */
    const kvl_cli_engine *engine;
    uint64_t store_bytes_max;
    void (*stream)(void *context, const char *bytes, size_t n_bytes); /* may be NULL */
} kvl_rag_options;

/* Opens the collection and its key. Names are below ${XDG_DATA_HOME:-~/.local/share}/kvloom.
 * Owns     rag's members: ended with kvl_rag_close, also after an error
 * Errors   those of kvl_collection_open; KVL_ERR_INVALID (a name with odd characters) */
KVL_MUST_USE kvl_status kvl_rag_open(const kvl_rag_options *options, kvl_rag *rag,
                                     kvl_error *error);
/* Starts the host that computes and keeps the collection's KV. Errors: kvl_local_host_open's */
KVL_MUST_USE kvl_status kvl_rag_start(kvl_rag *rag, const kvl_rag_options *options,
                                      kvl_error *error);
void kvl_rag_close(kvl_rag *rag);

/* A prompt: instruction, chunks, question, in the model's own chat template. */
typedef struct kvl_rag_prompt {
    Kvloom__V1__RunTask run;
    Kvloom__V1__PromptPart parts[2 * KVL_RAG_CHUNKS_MAX + 2];
    Kvloom__V1__PromptPart *pointers[2 * KVL_RAG_CHUNKS_MAX + 2];
    char names[KVL_RAG_CHUNKS_MAX][24];
    uint32_t *opening, *ending; /* ids of what stands before and behind the chunks */
} kvl_rag_prompt;

/* What a chunk is for a prompt. Borrowed until the run is done. */
typedef struct kvl_rag_text {
    const char *text;
    size_t n_bytes;
} kvl_rag_text;

/* instruction, question  never parsed for special tokens; neither are chunks
 * chunks  [n], n <= KVL_RAG_CHUNKS_MAX, in the order of the prompt; borrowed
 * primer  what the chunks were prefilled behind; empty: the header; borrowed
 * Owns    *prompt: ended with kvl_rag_prompt_deinit, also after an error
 * Errors  those of kvl_chat_render */
KVL_MUST_USE kvl_status kvl_rag_prompt_make(const kvl_model *model, const char *instruction,
                                            const kvl_rag_text *chunks, size_t n,
                                            const char *question, const char *primer,
                                            kvl_rag_prompt *prompt, kvl_error *error);
/* The same without a question: chunks to be had at home (MODE_READ). */
void kvl_rag_prompt_read(const kvl_rag_text *chunks, size_t n, const char *primer,
                         kvl_rag_prompt *prompt);
void kvl_rag_prompt_deinit(kvl_rag_prompt *prompt);

#endif /* KVL_CLI_RAG_H */
