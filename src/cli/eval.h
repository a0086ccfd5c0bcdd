/* cli/eval.h: what the files of `kvloom eval` share; private to them. */
#ifndef KVL_CLI_EVAL_H
#define KVL_CLI_EVAL_H

#include "base/random.h"
#include "cli/cli.h"

enum { EVAL_CHUNKS_MAX = 12, EVAL_POOL = 24, EVAL_PARAGRAPHS_MAX = 96, EVAL_NEEDLE_MAX = 8 };

/* Paragraphs of real text, from the documents of the data directory. */
typedef struct eval_corpus {
    char *paragraphs[EVAL_PARAGRAPHS_MAX];
    size_t n;
} eval_corpus;

KVL_MUST_USE kvl_status eval_corpus_load(const char *directory, eval_corpus *corpus,
                                         kvl_error *error);
void eval_corpus_deinit(eval_corpus *corpus);

typedef enum eval_kind {
    EVAL_NEEDLE, /* one chunk states the fact that is asked for; every other states another one */
    EVAL_CUT,    /* the fact is cut between two chunks that stand side by side */
    EVAL_OPEN,   /* a question that no single place answers */
} eval_kind;

typedef struct eval_scenario {
    const char *name; /* static */
    eval_kind kind;
    uint32_t n_chunks;
} eval_scenario;

/* Ended by one without name. */
extern const eval_scenario eval_scenarios[];

/* Texts of one prompt; `chunks` are the caller's to free with eval_prompt_deinit. */
typedef struct eval_prompt {
    char opening[160]; /* not the same in any two prompts, so that no prefix is shared by chance */
    char *chunks[EVAL_CHUNKS_MAX];
    uint32_t n_chunks;
    char question[256];
    char needle[EVAL_NEEDLE_MAX]; /* what a right answer contains; empty: there is no right one */
} eval_prompt;

/* Prompt `index` of a scenario: the same for the same seed. Chunks come from a pool of EVAL_POOL
 * that all prompts of a kind share, so that they are hot, as retrieved chunks are.
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status eval_prompt_make(const eval_corpus *corpus, const eval_scenario *scenario,
                                         uint64_t seed, uint32_t index, eval_prompt *prompt,
                                         kvl_error *error);
void eval_prompt_deinit(eval_prompt *prompt);

#endif /* KVL_CLI_EVAL_H */
