/* cli/eval.h: what the files of `kvloom eval` share; private to them. */
#ifndef KVL_CLI_EVAL_H
#define KVL_CLI_EVAL_H

#include "base/random.h"
#include "cli/cli.h"
#include "cli/demo.h"
#include "cli/task.h"

enum {
    EVAL_CHUNKS_MAX = 12,
    EVAL_POOL = 24,
    EVAL_PIECES_MAX = 2 * EVAL_CHUNKS_MAX + 8,
    EVAL_NEEDLE_MAX = 32,
    EVAL_NAME_MAX = 48,
    EVAL_POLICIES_MAX = 32,
    EVAL_SCENARIOS_MAX = 16
};

/* ---- texts ---- */

/* Paragraphs of real text. */
typedef struct eval_corpus {
    char **paragraphs; /* [n] */
    size_t n, n_room;
} eval_corpus;

/* Reads *.txt of a directory. Paragraphs are separated by empty lines; very short and very long
 * ones are left out.
 * Errors   KVL_ERR_NOT_FOUND (fewer than EVAL_POOL), those of reading, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status eval_corpus_load(const char *directory, eval_corpus *corpus,
                                         kvl_error *error);
void eval_corpus_deinit(eval_corpus *corpus);

/* ---- prompts ---- */

typedef enum eval_kind {
    EVAL_NEEDLE, /* one chunk states the fact that is asked for; every other states another one.
                    The answer's beginning is given, up to the fact itself */
    EVAL_ASKED,  /* as NEEDLE, but the model words its answer itself */
    EVAL_CUT,    /* the fact is cut between two chunks that stand side by side */
    EVAL_EDITED, /* as NEEDLE, but the chunk with the fact was read with another number in it */
    EVAL_READ,   /* nothing is planted: how a sentence of the texts goes on */
    EVAL_OPEN,   /* a question that no single place answers */
    EVAL_AGENTS, /* the last of five agents, which reads a document and four answers */
} eval_kind;

typedef struct eval_scenario {
    const char *name; /* static */
    eval_kind kind;
    uint32_t n_chunks;
} eval_scenario;

/* Ended by one without name. */
extern const eval_scenario eval_scenarios[];

/* A piece of a prompt: text around the slots, or what fills one. */
typedef struct eval_piece {
    char *text;                   /* owned; NULL for an answer */
    Kvloom__V1__RunReply *answer; /* owned; of an earlier agent */
    bool is_slot;
} eval_piece;

typedef struct eval_prompt {
    eval_piece pieces[EVAL_PIECES_MAX];
    uint32_t n_pieces;
    char needle[EVAL_NEEDLE_MAX]; /* what a right answer contains; empty: there is no right one */
} eval_prompt;

/* Adds a piece; a NULL text says that there was no memory for it. */
KVL_MUST_USE bool eval_prompt_add(eval_prompt *prompt, bool is_slot, char *text);

/* Prompt `index` of a scenario of chunks: the same for the same seed. Chunks come from pools of
 * EVAL_POOL that some prompts share, so that they are hot, as retrieved chunks are.
 * version  each begins with other tokens, and in EDITED has another number
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status eval_prompt_make(const eval_corpus *corpus, const eval_scenario *scenario,
                                         uint64_t seed, uint32_t index, uint32_t version,
                                         eval_prompt *prompt, kvl_error *error);
void eval_prompt_deinit(eval_prompt *prompt);

/* A word of a sentence of `text` that stands nowhere else in `others` [n_others], and the words
 * before it. False where there is none. cli/eval_read.c
 * lead, word   buffers of n_lead and n_word bytes */
bool eval_find_question(kvl_random *random, const char *text, const char *const *others,
                        uint32_t n_others, char *lead, size_t n_lead, char *word, size_t n_word);

/* ---- tasks ---- */

typedef struct eval_task {
    Kvloom__V1__RunTask run;
    Kvloom__V1__PromptPart parts[EVAL_PIECES_MAX];
    Kvloom__V1__PromptPart *pointers[EVAL_PIECES_MAX];
    char names[EVAL_PIECES_MAX][24];
} eval_task;

/* Fills a task from a prompt, which it borrows; without a workflow: what is placed is blended. */
void eval_task_make(const eval_prompt *prompt, eval_task *made);

/* ---- donors and means (src/host/donor.h) ---- */

/* What the runs before the evaluated ones leave behind. */
typedef struct eval_warmth {
    bool keeps_donors, learns_means;
} eval_warmth;

/* An evaluated run uses what is there, and leaves nothing; one before it leaves what is wanted. */
void eval_warmth_set(const eval_warmth *warmth, bool is_evaluated, Kvloom__V1__RunTask *run);
/* Whether there is anything to be left. */
bool eval_warmth_is_wanted(const eval_warmth *warmth);

enum { EVAL_WARM_TEXTS_MAX = 64, EVAL_WARM_GROUP = 16 };

/* Prompts of the texts of some evaluated ones, in other company, in another order, with another
 * question. */
typedef struct eval_warm_up {
    char *texts[EVAL_WARM_TEXTS_MAX];  /* [n_texts], each once */
    uint64_t sources[EVAL_WARM_GROUP]; /* [n_sources] bit t: the prompt has text t */
    uint32_t n_texts, n_sources, n_prompts, n_slots;
    uint32_t order[EVAL_WARM_TEXTS_MAX]; /* of texts, from prompt to prompt */
} eval_warm_up;

/* Takes the slots' texts of a prompt; false without memory or room. */
KVL_MUST_USE bool eval_warm_up_add(eval_warm_up *warm, const eval_prompt *prompt);
/* Draws an order in which no prompt has exactly the texts of an evaluated one; false where the
 * texts do not allow one. */
KVL_MUST_USE bool eval_warm_up_draw(eval_warm_up *warm, uint64_t seed);
/* Puts the texts of the warm-up's prompt `index` into the slots of a prompt, whose own go. */
KVL_MUST_USE bool eval_warm_up_fill(const eval_warm_up *warm, uint32_t index, eval_prompt *prompt);
void eval_warm_up_deinit(eval_warm_up *warm);

/* The prompt of the last agent of a workflow, about a document of the corpus. The agents before it
 * are run on the host, exactly, and leave what `warmth` wants. cli/eval_agents.c
 * Errors   those of the runs, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status eval_agents_make(const eval_corpus *corpus, const demo_workflow *workflow,
                                         kvl_local_host *host, const eval_warmth *warmth,
                                         uint64_t seed, uint32_t index, eval_prompt *prompt,
                                         kvl_error *error);

/* ---- what was seen ---- */

/* A policy as it is asked for. */
typedef struct eval_policy {
    const char *name, *select; /* select: reuse/select.h */
    Kvloom__V1__Quality quality;
    bool is_quick; /* part of --quick */
    bool is_gated; /* answers that the gate does not trust are verified (reuse/gate.h) */
} eval_policy;

/* Ended by one without name. */
extern const eval_policy eval_policies[];

/* A policy with a correction (reuse/correct.h) has a number of its own: policy `p` with the c-th of
 * the table; the 0-th is none. Its name is that of the policy, "+" and the correction. */
uint32_t eval_policy_number(uint32_t p, uint32_t c);
void eval_policy_name(uint32_t number, char *name, size_t n_bytes);
/* False where there is none of that name; "full" is full prefill. */
KVL_MUST_USE bool eval_policy_find(const char *name, uint32_t *number);
/* The number behind this one, in the order of the tables; false: it was the last one. Begins with
 * EVAL_POLICIES_MAX, full prefill's. */
bool eval_policy_next(uint32_t *number);

/* One prompt under one policy. */
typedef struct eval_record {
    uint32_t scenario, policy; /* a number; EVAL_POLICIES_MAX for full prefill */
    uint32_t prompt;           /* unique among all scenarios */
    double kl, top1, exact, right, placed, recomputed, corrected, ttft_ms, full_ttft_ms;
    double passed, healed_first; /* the gate: let it pass, or not; 0 where it was not asked */
    double drafted, draft_kept;  /* tokens of a drafted answer, and those that the answer has */
    double passed_right;         /* passed, and what full prefill says */
    double work; /* of full prefill's time computing, what scoring and computing took */
} eval_record;

typedef struct eval_records {
    eval_record *items; /* [n] */
    size_t n, n_room;
} eval_records;

KVL_MUST_USE kvl_status eval_records_add(eval_records *records, const eval_record *record,
                                         kvl_error *error);
void eval_records_deinit(eval_records *records);
/* Adds the records from `first` on to a file, one JSON object a line, and reads such files, whose
 * prompts stay apart: evaluations may run one beside another, or one after another.
 * Errors   KVL_ERR_IO; KVL_ERR_MALFORMED (names the line); KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status eval_records_save(const eval_records *records, size_t first,
                                          const char *path, kvl_error *error);
KVL_MUST_USE kvl_status eval_records_load(eval_records *records, const char *path,
                                          kvl_error *error);

/* A mean and where 95 % of the means of 1,000 resamples of the prompts lie. */
typedef struct eval_estimate {
    double mean, low, high;
    uint32_t n;
} eval_estimate;

/* Of the field at `offset` of eval_record, over prompts of some kinds (bits 1 << kind; scenario
 * UINT32_MAX: all). `minus`: the same prompts under another policy, subtracted prompt by prompt;
 * NULL: nothing is. Policies by name; "full" is full prefill. */
eval_estimate eval_estimate_of(const eval_records *records, const char *policy, const char *minus,
                               unsigned kinds, uint32_t scenario, size_t offset);
/* The mean alone, and of how many prompts. */
double eval_mean_of(const eval_records *records, const char *policy, unsigned kinds,
                    uint32_t scenario, size_t offset, uint32_t *n);

/* cli/eval_output.c */
typedef struct eval_about {
    const char *model, *texts;
    uint32_t n_prompts, seed;
} eval_about;
void eval_print_json(const eval_records *records, const eval_about *about);
void eval_print_table(const eval_records *records);

#endif /* KVL_CLI_EVAL_H */
