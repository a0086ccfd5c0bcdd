/* cli/eval_agents.c: the last of several agents: it reads a document, and what the agents before it
 * have answered, which comes as it was decoded. */
#include "base/alloc.h"
#include "cli/eval.h"

#include <stdlib.h>
#include <string.h>

enum { DOCUMENT_BYTES = 3200, ANSWER_TOKENS = 48, PARAGRAPHS_MAX = 12 };

static const char *const questions[] = {
    "What is the most important thing that this document says?",
    "What would go wrong if nobody knew this document?",
    "Which number or name in this document matters most, and why?",
    "Who should read this document first?",
};

/* Paragraphs of the corpus, one behind another, and a question. */
static char *make_document(const eval_corpus *corpus, uint64_t seed, uint32_t index)
{
    kvl_random random = {seed * 7919 + index};
    for (int i = 0; i < 4; i++) (void)kvl_random_next(&random);
    size_t at = (size_t)kvl_random_below(&random, corpus->n);
    char *text = NULL;
    size_t n_bytes = 0;
    FILE *memory = open_memstream(&text, &n_bytes);
    if (memory == NULL) return NULL;
    (void)fprintf(memory, "Document %u:\n", index + 1);
    size_t n = 0;
    for (int i = 0; i < PARAGRAPHS_MAX && n < DOCUMENT_BYTES; i++, at = (at + 1) % corpus->n) {
        (void)fprintf(memory, "%s\n\n", corpus->paragraphs[at]);
        n += strlen(corpus->paragraphs[at]);
    }
    const size_t asked = (size_t)kvl_random_below(&random, sizeof questions / sizeof *questions);
    (void)fprintf(memory, "Question: %s", questions[asked]);
    (void)fclose(memory);
    char *copy = text == NULL ? NULL : kvl_strdup(text);
    free(text); /* tidy: free, open_memstream allocated it */
    return copy;
}

/* The agent's template with its slots filled; answers move into the prompt. */
static kvl_status fill(const demo_agent *agent, const char *document,
                       Kvloom__V1__RunReply **answers, eval_prompt *prompt, kvl_error *error)
{
    *prompt = (eval_prompt){.n_pieces = 0};
    for (size_t p = 0; p < agent->n_pieces; p++) {
        const demo_piece *piece = &agent->pieces[p];
        unsigned earlier = 0;
        bool added = false;
        if (piece->text == NULL && sscanf(piece->slot, "agent_%u", &earlier) == 1) {
            if (earlier < 1 || earlier > DEMO_AGENTS_MAX || answers[earlier - 1] == NULL ||
                prompt->n_pieces == EVAL_PIECES_MAX)
                return KVL_FAIL(error, KVL_ERR_MALFORMED, "%s reads %s, which is not there",
                                agent->name, piece->slot);
            prompt->pieces[prompt->n_pieces++] =
                (eval_piece){.answer = answers[earlier - 1], .is_slot = true};
            answers[earlier - 1] = NULL;
            added = true;
        } else {
            added = eval_prompt_add(prompt, piece->text == NULL,
                                    kvl_strdup(piece->text == NULL ? document : piece->text));
        }
        if (!added) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a prompt");
    }
    return KVL_OK;
}

static kvl_status read_document(kvl_local_host *host, const char *document, kvl_error *error)
{
    char *text = (char *)(uintptr_t)document;
    const eval_prompt alone = {.n_pieces = 1, .pieces = {{.text = text, .is_slot = true}}};
    eval_task made;
    eval_task_make(&alone, &made);
    made.run.mode = KVLOOM__V1__MODE__MODE_READ;
    Kvloom__V1__RunReply *reply = NULL;
    KVL_TRY(kvl_local_host_run(host, &made.run, &reply, error));
    kvloom__v1__run_reply__free_unpacked(reply, NULL);
    return KVL_OK;
}

/* Runs one agent exactly, and gives its answers back to those behind it. */
static kvl_status run_agent(const demo_agent *agent, const char *document, kvl_local_host *host,
                            const eval_warmth *warmth, Kvloom__V1__RunReply **answers, size_t index,
                            kvl_error *error)
{
    eval_prompt prompt;
    kvl_status status = fill(agent, document, answers, &prompt, error);
    Kvloom__V1__RunReply *reply = NULL;
    if (status == KVL_OK) {
        eval_task made;
        eval_task_make(&prompt, &made);
        made.run.mode = KVLOOM__V1__MODE__MODE_REUSE;
        made.run.quality = KVLOOM__V1__QUALITY__QUALITY_EXACT;
        made.run.max_tokens = ANSWER_TOKENS;
        eval_warmth_set(warmth, false, &made.run);
        status = kvl_local_host_run(host, &made.run, &reply, error);
    }
    for (uint32_t p = 0; p < prompt.n_pieces; p++) {
        unsigned earlier = 0;
        if (prompt.pieces[p].answer == NULL) continue;
        (void)sscanf(agent->pieces[p].slot, "agent_%u", &earlier); /* pieces stand in line */
        answers[earlier - 1] = prompt.pieces[p].answer;
        prompt.pieces[p].answer = NULL;
    }
    answers[index] = reply;
    eval_prompt_deinit(&prompt);
    return status;
}

kvl_status eval_agents_make(const eval_corpus *corpus, const demo_workflow *workflow,
                            kvl_local_host *host, const eval_warmth *warmth, uint64_t seed,
                            uint32_t index, eval_prompt *prompt, kvl_error *error)
{
    *prompt = (eval_prompt){.n_pieces = 0};
    char *document = make_document(corpus, seed, index);
    if (document == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a document");
    Kvloom__V1__RunReply *answers[DEMO_AGENTS_MAX] = {NULL};
    const size_t last = workflow->n_agents - 1;
    /* A mean is of KV in context less KV at home: there must be one. */
    kvl_status status = warmth->learns_means ? read_document(host, document, error) : KVL_OK;
    for (size_t a = 0; a < last && status == KVL_OK; a++)
        status = run_agent(&workflow->agents[a], document, host, warmth, answers, a, error);
    if (status == KVL_OK) status = fill(&workflow->agents[last], document, answers, prompt, error);
    for (size_t a = 0; a < DEMO_AGENTS_MAX; a++) {
        if (answers[a] != NULL) kvloom__v1__run_reply__free_unpacked(answers[a], NULL);
    }
    kvl_free(document);
    if (status != KVL_OK) eval_prompt_deinit(prompt);
    return status;
}
