/* cli/eval_prompts.c: prompts of chunks, as a retrieval pipeline makes them, with planted facts. */
#include "base/alloc.h"
#include "base/file.h"
#include "cli/eval.h"

#include <glob.h>
#include <stdarg.h>
#include <string.h>

enum { PARAGRAPH_LEAST = 200, FILE_BYTES_MAX = 1 << 20, NUMBER_LEAST = 1000, NUMBERS = 9000 };

const eval_scenario eval_scenarios[] = {
    {"needle3", EVAL_NEEDLE, 3}, {"needle6", EVAL_NEEDLE, 6}, {"needle12", EVAL_NEEDLE, 12},
    {"cut6", EVAL_CUT, 6},       {"open6", EVAL_OPEN, 6},     {0},
};

static const char *const places[EVAL_POOL] = {
    "harbour crane", "north gate",   "boiler room", "seed bank",  "tram depot",   "town archive",
    "cold store",    "signal tower", "print shop",  "river lock", "wind tunnel",  "fire station",
    "grain silo",    "bell tower",   "map room",    "pump house", "glass works",  "night school",
    "salt mine",     "post office",  "dry dock",    "tea house",  "stone quarry", "radio mast",
};

static const char *const open_questions[] = {
    "Summarise in three sentences what these texts are about.",
    "Which of the problems that these texts describe is the most serious, and why?",
    "What do the people in these texts have in common?",
    "Write a short note to a colleague about what has to be done next.",
};
enum { N_OPEN = sizeof open_questions / sizeof *open_questions };

static kvl_status add_paragraphs(char *text, eval_corpus *corpus, kvl_error *error)
{
    char *rest = NULL;
    for (char *line = strtok_r(text, "\n", &rest); line != NULL;
         line = strtok_r(NULL, "\n", &rest)) {
        if (strlen(line) < PARAGRAPH_LEAST || corpus->n == EVAL_PARAGRAPHS_MAX) continue;
        corpus->paragraphs[corpus->n] = kvl_strdup(line);
        if (corpus->paragraphs[corpus->n] == NULL)
            return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a paragraph");
        corpus->n++;
    }
    return KVL_OK;
}

static kvl_status add_files(const glob_t *found, eval_corpus *corpus, kvl_error *error)
{
    for (size_t i = 0; i < found->gl_pathc; i++) {
        char *text = NULL;
        size_t n_bytes = 0;
        KVL_TRY(kvl_file_read(found->gl_pathv[i], FILE_BYTES_MAX, &text, &n_bytes, error));
        const kvl_status status = add_paragraphs(text, corpus, error);
        kvl_free(text);
        if (status != KVL_OK) return status;
    }
    return KVL_OK;
}

kvl_status eval_corpus_load(const char *directory, eval_corpus *corpus, kvl_error *error)
{
    *corpus = (eval_corpus){.n = 0};
    char pattern[PATH_MAX];
    if (snprintf(pattern, sizeof pattern, "%s/*.txt", directory) >= (int)sizeof pattern)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path of the texts is too long");
    glob_t found = {.gl_pathc = 0};
    kvl_status status = KVL_OK;
    if (glob(pattern, 0, NULL, &found) == 0) status = add_files(&found, corpus, error);
    globfree(&found);
    if (status == KVL_OK && corpus->n < EVAL_POOL)
        status = KVL_FAIL(error, KVL_ERR_NOT_FOUND,
                          "%s has %zu paragraphs of %d bytes or more, %d are needed", directory,
                          corpus->n, PARAGRAPH_LEAST, EVAL_POOL);
    if (status != KVL_OK) eval_corpus_deinit(corpus);
    return status;
}

void eval_corpus_deinit(eval_corpus *corpus)
{
    for (size_t i = 0; i < corpus->n; i++) kvl_free(corpus->paragraphs[i]);
    corpus->n = 0;
}

static char *join(const char *a, const char *b, const char *c)
{
    const size_t room = strlen(a) + strlen(b) + strlen(c) + 1;
    char *joined = kvl_alloc(room);
    if (joined != NULL) (void)snprintf(joined, room, "%s%s%s", a, b, c);
    return joined;
}

/* The number of a place: of the seed alone, so that a chunk is the same in every prompt. */
static uint32_t number_of(uint64_t seed, uint32_t place)
{
    kvl_random random = {seed * 1000003 + place};
    (void)kvl_random_next(&random);
    return NUMBER_LEAST + (uint32_t)(kvl_random_next(&random) % NUMBERS);
}

/* The paragraph with the fact behind its first sentence, where there is one to put it behind. */
static char *chunk_with_fact(const char *paragraph, const char *place, uint32_t number)
{
    char fact[96];
    (void)snprintf(fact, sizeof fact, " The access code of the %s is %u.", place, number);
    const char *end = strstr(paragraph, ". ");
    if (end == NULL) return join(paragraph, fact, "");
    const size_t n_head = (size_t)(end - paragraph) + 1;
    char *head = kvl_alloc(n_head + 1);
    if (head == NULL) return NULL;
    memcpy(head, paragraph, n_head);
    head[n_head] = '\0';
    char *chunk = join(head, fact, end + 1);
    kvl_free(head);
    return chunk;
}

static uint32_t below(kvl_random *random, uint32_t n)
{
    return (uint32_t)(kvl_random_next(random) % n);
}

/* n different numbers below EVAL_POOL. */
static void draw(kvl_random *random, uint32_t n, uint32_t *picked)
{
    uint32_t all[EVAL_POOL];
    for (uint32_t i = 0; i < EVAL_POOL; i++) all[i] = i;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t at = i + below(random, EVAL_POOL - i);
        picked[i] = all[at];
        all[at] = all[i];
    }
}

static bool fill_chunks(const eval_corpus *corpus, const eval_scenario *scenario, uint64_t seed,
                        const uint32_t *picked, uint32_t cut_at, eval_prompt *prompt)
{
    for (uint32_t i = 0; i < scenario->n_chunks; i++) {
        const char *paragraph = corpus->paragraphs[picked[i] * corpus->n / EVAL_POOL];
        const char *place = places[picked[i]];
        char fact[96];
        char **chunk = &prompt->chunks[prompt->n_chunks++];
        switch (scenario->kind) {
        case EVAL_OPEN: *chunk = join(paragraph, "", ""); break;
        case EVAL_NEEDLE:
            *chunk = chunk_with_fact(paragraph, place, number_of(seed, picked[i]));
            break;
        case EVAL_CUT:
            if (i == cut_at) {
                (void)snprintf(fact, sizeof fact, " The access code of the %s", place);
                *chunk = join(paragraph, fact, "");
            } else if (i == cut_at + 1) {
                (void)snprintf(fact, sizeof fact, " is %u. ", number_of(seed, picked[cut_at]));
                *chunk = join(fact, paragraph, "");
            } else {
                *chunk = chunk_with_fact(paragraph, place, number_of(seed, picked[i]));
            }
            break;
        }
        if (*chunk == NULL) return false;
    }
    return true;
}

kvl_status eval_prompt_make(const eval_corpus *corpus, const eval_scenario *scenario, uint64_t seed,
                            uint32_t index, eval_prompt *prompt, kvl_error *error)
{
    *prompt = (eval_prompt){.n_chunks = 0};
    kvl_random random = {seed ^ ((uint64_t)index << 32) ^ (uint64_t)(uintptr_t)scenario->n_chunks ^
                         ((uint64_t)scenario->kind << 16)};
    for (int i = 0; i < 4; i++) (void)kvl_random_next(&random); /* small seeds are much alike */
    uint32_t picked[EVAL_CHUNKS_MAX];
    draw(&random, scenario->n_chunks, picked);
    const uint32_t asked = below(&random, scenario->n_chunks);
    const uint32_t cut_at = asked + 1 < scenario->n_chunks ? asked : asked - 1;
    (void)snprintf(prompt->opening, sizeof prompt->opening,
                   "<|im_start|>system\nRequest %08x. Answer from the texts below, in one sentence."
                   "<|im_end|>\n<|im_start|>user\n",
                   (unsigned)(kvl_random_next(&random) & 0xffffffffU));
    const uint32_t about = picked[scenario->kind == EVAL_CUT ? cut_at : asked];
    if (scenario->kind == EVAL_OPEN) {
        (void)snprintf(prompt->question, sizeof prompt->question, "\n\nQuestion: %s",
                       open_questions[below(&random, N_OPEN)]);
    } else {
        (void)snprintf(prompt->question, sizeof prompt->question,
                       "\n\nQuestion: What is the access code of the %s?", places[about]);
        (void)snprintf(prompt->needle, sizeof prompt->needle, "%u", number_of(seed, about));
    }
    if (fill_chunks(corpus, scenario, seed, picked, cut_at, prompt)) return KVL_OK;
    eval_prompt_deinit(prompt);
    return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a prompt");
}

void eval_prompt_deinit(eval_prompt *prompt)
{
    for (uint32_t i = 0; i < prompt->n_chunks; i++) kvl_free(prompt->chunks[i]);
    prompt->n_chunks = 0;
}
