/* cli/eval_prompts.c: prompts of chunks, as a retrieval pipeline makes them, with planted facts, or
 * with questions about what stands there anyway. */
#include "base/alloc.h"
#include "base/file.h"
#include "cli/eval.h"

#include <glob.h>
#include <stdarg.h>
#include <string.h>

enum {
    PARAGRAPH_LEAST = 200,
    PARAGRAPH_MOST = 1500,
    FILE_BYTES_MAX = 1 << 22,
    NUMBER_LEAST = 1000,
    NUMBERS = 9000,
    PROMPTS_PER_POOL = 16
};

const eval_scenario eval_scenarios[] = {
    {"needle3", EVAL_NEEDLE, 3},   {"needle6", EVAL_NEEDLE, 6},
    {"needle12", EVAL_NEEDLE, 12}, {"cut6", EVAL_CUT, 6},
    {"edited6", EVAL_EDITED, 6},   {"read6", EVAL_READ, 6},
    {"open6", EVAL_OPEN, 6},       {"agents5", EVAL_AGENTS, 0},
    {"asked6", EVAL_ASKED, 6},     {0},
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

static kvl_status add_paragraph(const char *text, size_t n_bytes, eval_corpus *corpus,
                                kvl_error *error)
{
    while (n_bytes > 0 && text[n_bytes - 1] == '\n') n_bytes--;
    if (n_bytes < PARAGRAPH_LEAST || n_bytes > PARAGRAPH_MOST) return KVL_OK;
    if (corpus->n == corpus->n_room) {
        const size_t n_room = corpus->n_room == 0 ? 64 : 2 * corpus->n_room;
        char **grown = kvl_realloc(corpus->paragraphs, n_room * sizeof *grown);
        if (grown == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for paragraphs");
        corpus->paragraphs = grown;
        corpus->n_room = n_room;
    }
    char *copy = kvl_alloc(n_bytes + 1);
    if (copy == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a paragraph");
    size_t n = 0;
    for (size_t i = 0; i < n_bytes; i++) {
        const char c = text[i] == '\n' || text[i] == '\t' ? ' ' : text[i];
        if (c != ' ' || n == 0 || copy[n - 1] != ' ') copy[n++] = c;
    }
    copy[n] = '\0';
    corpus->paragraphs[corpus->n++] = copy;
    return KVL_OK;
}

static kvl_status add_paragraphs(const char *text, eval_corpus *corpus, kvl_error *error)
{
    while (*text != '\0') {
        const char *end = strstr(text, "\n\n");
        const size_t n_bytes = end == NULL ? strlen(text) : (size_t)(end - text);
        KVL_TRY(add_paragraph(text, n_bytes, corpus, error));
        text += n_bytes;
        while (*text == '\n') text++;
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
                          "the *.txt of %s have %zu paragraphs of %d to %d bytes, %d are needed",
                          directory, corpus->n, PARAGRAPH_LEAST, PARAGRAPH_MOST, EVAL_POOL);
    if (status != KVL_OK) eval_corpus_deinit(corpus);
    return status;
}

void eval_corpus_deinit(eval_corpus *corpus)
{
    for (size_t i = 0; i < corpus->n; i++) kvl_free(corpus->paragraphs[i]);
    kvl_free(corpus->paragraphs);
    *corpus = (eval_corpus){.n = 0};
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

/* n different numbers below EVAL_POOL. */
static void draw(kvl_random *random, uint32_t n, uint32_t *picked)
{
    uint32_t all[EVAL_POOL];
    for (uint32_t i = 0; i < EVAL_POOL; i++) all[i] = i;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t at = i + (uint32_t)kvl_random_below(random, EVAL_POOL - i);
        picked[i] = all[at];
        all[at] = all[i];
    }
}

/* What one prompt is made of. */
typedef struct making {
    const eval_corpus *corpus;
    const eval_scenario *scenario;
    uint64_t seed;
    uint32_t version;
    kvl_random random;
    uint32_t picked[EVAL_CHUNKS_MAX];
    const char *paragraphs[EVAL_CHUNKS_MAX];
    uint32_t asked; /* which chunk the question is about; CUT: the first of two */
    char *chunks[EVAL_CHUNKS_MAX];
    char question[512];
    char beginning[256]; /* of the answer */
} making;

static void begin(making *m, uint32_t index)
{
    m->random = (kvl_random){m->seed ^ ((uint64_t)index << 32) ^ ((uint64_t)m->scenario->n_chunks) ^
                             ((uint64_t)m->scenario->kind << 16)};
    for (int i = 0; i < 4; i++) (void)kvl_random_next(&m->random); /* small seeds are much alike */
    const uint32_t n = m->scenario->n_chunks;
    draw(&m->random, n, m->picked);
    m->asked = (uint32_t)kvl_random_below(&m->random, n);
    if (m->scenario->kind == EVAL_CUT && m->asked + 1 == n) m->asked--;
    /* A small corpus is one pool, whose places lie evenly in it. */
    const size_t pool = (size_t)(m->seed + index / PROMPTS_PER_POOL) * EVAL_POOL;
    const bool is_small = m->corpus->n < 4 * EVAL_POOL;
    for (uint32_t i = 0; i < n; i++) {
        const size_t at = is_small ? m->picked[i] * m->corpus->n / EVAL_POOL
                                   : (pool + m->picked[i]) % m->corpus->n;
        m->paragraphs[i] = m->corpus->paragraphs[at];
    }
}

/* The fact that is asked for, as this version has it. */
static uint32_t asked_number(const making *m)
{
    return number_of(m->seed + (uint64_t)m->version * 104729, m->picked[m->asked]);
}

static char *make_chunk(const making *m, uint32_t i)
{
    const char *place = places[m->picked[i]];
    const uint32_t number = number_of(m->seed, m->picked[i]);
    char fact[96];
    switch (m->scenario->kind) {
    case EVAL_CUT:
        if (i == m->asked) {
            (void)snprintf(fact, sizeof fact, " The access code of the %s", place);
            return join(m->paragraphs[i], fact, "");
        }
        if (i == m->asked + 1) {
            (void)snprintf(fact, sizeof fact, " is %u. ", number_of(m->seed, m->picked[m->asked]));
            return join(fact, m->paragraphs[i], "");
        }
        return chunk_with_fact(m->paragraphs[i], place, number);
    case EVAL_NEEDLE:
    case EVAL_ASKED:
    case EVAL_EDITED:
        return chunk_with_fact(m->paragraphs[i], place, i == m->asked ? asked_number(m) : number);
    default: return join(m->paragraphs[i], "", "");
    }
}

/* Of the first of the texts, from the one drawn on, that a question can be asked about. */
static void find_question(making *m, char *lead, size_t n_lead, eval_prompt *prompt)
{
    const uint32_t n = m->scenario->n_chunks;
    for (uint32_t i = 0; i < n; i++) {
        if (eval_find_question(&m->random, m->paragraphs[(m->asked + i) % n], m->paragraphs, n,
                               lead, n_lead, prompt->needle, sizeof prompt->needle))
            return;
    }
}

static void ask(making *m, eval_prompt *prompt)
{
    const char *place = places[m->picked[m->asked]];
    char lead[160];
    switch (m->scenario->kind) {
    case EVAL_OPEN:
        (void)snprintf(m->question, sizeof m->question, "\n\nQuestion: %s",
                       open_questions[kvl_random_below(&m->random, N_OPEN)]);
        return;
    case EVAL_READ:
        find_question(m, lead, sizeof lead, prompt);
        (void)snprintf(m->question, sizeof m->question,
                       "\n\nQuestion: How does the sentence go on in which the texts say \"%s\"?",
                       lead);
        (void)snprintf(m->beginning, sizeof m->beginning, "It says: \"%s", lead);
        return;
    default:
        (void)snprintf(m->question, sizeof m->question,
                       "\n\nQuestion: What is the access code of the %s?", place);
        (void)snprintf(prompt->needle, sizeof prompt->needle, "%u", asked_number(m));
        if (m->scenario->kind == EVAL_ASKED) return;
        (void)snprintf(m->beginning, sizeof m->beginning, "The access code of the %s is", place);
    }
}

bool eval_prompt_add(eval_prompt *prompt, bool is_slot, char *text)
{
    if (text == NULL || prompt->n_pieces == EVAL_PIECES_MAX) {
        kvl_free(text);
        return false;
    }
    prompt->pieces[prompt->n_pieces++] = (eval_piece){.text = text, .is_slot = is_slot};
    return true;
}

static bool assemble(making *m, eval_prompt *prompt)
{
    char opening[160];
    /* Not the same in any two prompts, so that no prefix is shared by chance. */
    (void)snprintf(opening, sizeof opening,
                   "<|im_start|>system\nRequest %08x. Answer from the texts below, in one sentence."
                   "<|im_end|>\n<|im_start|>user\n",
                   (unsigned)(kvl_random_next(&m->random) & 0xffffffffU) + m->version);
    bool is_whole = eval_prompt_add(prompt, false, kvl_strdup(opening));
    for (uint32_t i = 0; i < m->scenario->n_chunks && is_whole; i++) {
        if (i > 0) is_whole = eval_prompt_add(prompt, false, kvl_strdup("\n\n"));
        is_whole = is_whole && eval_prompt_add(prompt, true, make_chunk(m, i));
    }
    ask(m, prompt);
    return is_whole &&
           eval_prompt_add(prompt, false,
                           join(m->question, "<|im_end|>\n<|im_start|>assistant\n", m->beginning));
}

kvl_status eval_prompt_make(const eval_corpus *corpus, const eval_scenario *scenario, uint64_t seed,
                            uint32_t index, uint32_t version, eval_prompt *prompt, kvl_error *error)
{
    *prompt = (eval_prompt){.n_pieces = 0};
    making m = {.corpus = corpus, .scenario = scenario, .seed = seed, .version = version};
    begin(&m, index);
    if (assemble(&m, prompt)) return KVL_OK;
    eval_prompt_deinit(prompt);
    return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a prompt");
}

void eval_prompt_deinit(eval_prompt *prompt)
{
    for (uint32_t i = 0; i < prompt->n_pieces; i++) {
        eval_piece *piece = &prompt->pieces[i];
        kvl_free(piece->text);
        if (piece->answer != NULL) kvloom__v1__run_reply__free_unpacked(piece->answer, NULL);
    }
    *prompt = (eval_prompt){.n_pieces = 0};
}

void eval_task_make(const eval_prompt *prompt, eval_task *made)
{
    kvloom__v1__run_task__init(&made->run);
    made->run.parts = made->pointers;
    for (uint32_t i = 0; i < prompt->n_pieces; i++) {
        const eval_piece *piece = &prompt->pieces[i];
        Kvloom__V1__PromptPart *part = &made->parts[i];
        kvloom__v1__prompt_part__init(part);
        if (piece->is_slot) {
            (void)snprintf(made->names[i], sizeof made->names[i], "slot_%u", i);
            part->slot = made->names[i];
        }
        if (piece->answer != NULL) {
            part->n_tokens = piece->answer->n_tokens;
            part->tokens = piece->answer->tokens;
            part->home = piece->answer->home;
        } else {
            part->text = (ProtobufCBinaryData){strlen(piece->text), (uint8_t *)piece->text};
        }
        made->pointers[made->run.n_parts++] = part;
    }
}
