/* cli/cmd_chat.c: `kvloom chat`: a conversation in the terminal. What was said before is in the
 * prefix tree, so each turn computes only what is new; a line after each answer says so. */
#include "base/alloc.h"
#include "base/clock.h"
#include "cli/cli.h"
#include "host/scheduler.h"
#include "model/model.h"

#include <argp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    MAX_TOKENS_DEFAULT = 1024,
    OPTION_SEED = 256,
    OPTION_TEMPERATURE,
    OPTION_SYSTEM,
    OPTION_QUIET
};

typedef struct arguments {
    kvl_cli_engine engine;
    const char *system;
    uint32_t max_tokens, seed;
    float temperature;
    bool quiet;
} arguments;

static const struct argp_option options[] = {
    {"system", OPTION_SYSTEM, "TEXT", 0, "A first message from the system", 0},
    {"max-tokens", 'n', "N", 0, "Longest answer in tokens (1024)", 0},
    {"temperature", OPTION_TEMPERATURE, "T", 0, "Draw at this temperature; 0 is greedy (0)", 0},
    {"seed", OPTION_SEED, "N", 0, "Of the draws (1)", 0},
    {"quiet", OPTION_QUIET, NULL, 0, "No prompt, and no line on what was known", 0},
    {0},
};

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    char *end = NULL;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &wanted->engine; return 0;
    case OPTION_SYSTEM: wanted->system = text; return 0;
    case OPTION_QUIET: wanted->quiet = true; return 0;
    case 'n':
        wanted->max_tokens = kvl_cli_number(state, "--max-tokens", text, 1, KVL_POSITIONS_MAX);
        return 0;
    case OPTION_SEED: wanted->seed = kvl_cli_number(state, "--seed", text, 0, UINT32_MAX); return 0;
    case OPTION_TEMPERATURE:
        wanted->temperature = strtof(text, &end);
        if (end == text || *end != '\0' ||
            !(wanted->temperature >= 0.0F && wanted->temperature <= 2.0F))
            argp_error(state, "--temperature is '%s'; it must be a number from 0 to 2", text);
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

/* What was said so far. */
typedef struct history {
    kvl_message *messages; /* contents are the history's */
    size_t n, n_max;
} history;

/* Copies the text. */
static kvl_status say(history *said, const char *role, const char *text, size_t n_bytes,
                      kvl_error *error)
{
    if (said->n == said->n_max) {
        const size_t n_max = said->n_max == 0 ? 16 : 2 * said->n_max;
        kvl_message *larger = kvl_realloc(said->messages, n_max * sizeof *larger);
        if (larger == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a message");
        said->messages = larger;
        said->n_max = n_max;
    }
    char *copy = kvl_alloc(n_bytes + 1);
    if (copy == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a message");
    memcpy(copy, text, n_bytes);
    copy[n_bytes] = '\0';
    said->messages[said->n++] =
        (kvl_message){.role = role, .content = copy, .content_bytes = n_bytes};
    return KVL_OK;
}

static void forget_from(history *said, size_t n)
{
    while (said->n > n) kvl_free((void *)(uintptr_t)said->messages[--said->n].content);
}

/* One answer as it comes. */
typedef struct turn {
    FILE *text; /* a memory stream: what was answered */
    uint32_t n_tokens, n_cached;
    int64_t first_ns;
    kvl_finish finish;
    kvl_error error;
} turn;

static void show(void *context, const kvl_generation_event *event)
{
    turn *own = context;
    if (event->drawn != NULL && own->first_ns == 0)
        own->first_ns = kvl_clock_now(kvl_clock_system());
    (void)fwrite(event->text, 1, event->n_text_bytes, stdout);
    (void)fflush(stdout);
    (void)fwrite(event->text, 1, event->n_text_bytes, own->text);
    own->n_tokens = event->n_tokens;
    own->n_cached = event->n_cached;
    if (event->finish != KVL_FINISH_NONE) own->finish = event->finish;
    if (event->error != NULL) own->error = *event->error;
}

/* An interrupt ends the answer and not the conversation; between answers, the conversation. */
static volatile sig_atomic_t interrupted;

static void note_interrupt(int number)
{
    (void)number;
    interrupted = 1;
}

static kvl_status run_turn(kvl_engine *engine, kvl_scheduler *scheduler, const arguments *wanted,
                           const kvl_prompt *prompt, turn *own, kvl_error *error)
{
    const uint32_t room = kvl_scheduler_tokens_max(engine);
    if (prompt->n_ids >= room)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "the conversation has %zu tokens; the context is %u. Begin another one",
                        prompt->n_ids, room);
    kvl_sampling sampling = kvl_sampling_default();
    sampling.temperature = wanted->temperature;
    const uint32_t left = room - (uint32_t)prompt->n_ids;
    const kvl_generation asked = {
        .ids = prompt->ids,
        .n_ids = (uint32_t)prompt->n_ids,
        .max_tokens = wanted->max_tokens < left ? wanted->max_tokens : left,
        .n_branches = 1,
        .sampling = sampling,
        .seed = wanted->seed,
        .event = show,
        .context = own,
    };
    uint64_t id = 0;
    KVL_TRY(kvl_scheduler_submit(scheduler, &asked, &id, error));
    while (kvl_scheduler_step(scheduler))
        if (interrupted) kvl_scheduler_cancel(scheduler, id);
    if (own->finish != KVL_FINISH_FAILED) return KVL_OK;
    *error = own->error;
    return error->status;
}

static kvl_status answer(kvl_engine *engine, kvl_scheduler *scheduler, const arguments *wanted,
                         history *said, kvl_error *error)
{
    kvl_prompt prompt = {0};
    char *text = NULL;
    size_t n_text = 0;
    turn own = {.text = open_memstream(&text, &n_text)};
    const int64_t start = kvl_clock_now(kvl_clock_system());
    interrupted = 0;
    if (own.text == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for an answer");
    kvl_status status =
        kvl_chat_render(kvl_model_chat_template(engine->model), kvl_model_tokenizer(engine->model),
                        said->messages, said->n, true, &prompt, error);
    if (status == KVL_OK) status = run_turn(engine, scheduler, wanted, &prompt, &own, error);
    (void)fclose(own.text);
    if (status == KVL_OK) status = say(said, "assistant", text, n_text, error);
    free(text); /* tidy: free, open_memstream allocated it */
    (void)printf("\n");
    const int64_t end = kvl_clock_now(kvl_clock_system());
    const double seconds = (double)(end - own.first_ns) / (double)KVL_NS_PER_S;
    if (status == KVL_OK && !wanted->quiet && own.first_ns != 0)
        (void)fprintf(stderr,
                      "[%u of %zu prompt tokens were known; first token after %.0f ms; "
                      "%u tokens, %.1f a second%s]\n",
                      own.n_cached, prompt.n_ids, kvl_ns_to_ms(own.first_ns - start), own.n_tokens,
                      seconds > 0.0 ? own.n_tokens / seconds : 0.0,
                      own.finish == KVL_FINISH_CANCELLED ? "; interrupted" : "");
    kvl_prompt_deinit(&prompt);
    return status;
}

/* Lines from standard input, each a message, until it ends. */
static kvl_status converse(kvl_engine *engine, kvl_scheduler *scheduler, const arguments *wanted,
                           history *said, kvl_error *error)
{
    const bool shows_prompt = !wanted->quiet && isatty(STDIN_FILENO) != 0;
    char *line = NULL;
    size_t line_max = 0;
    kvl_status status = KVL_OK;
    if (wanted->system != NULL)
        status = say(said, "system", wanted->system, strlen(wanted->system), error);
    while (status == KVL_OK) {
        if (shows_prompt) (void)fprintf(stderr, "> ");
        const ssize_t n = getline(&line, &line_max, stdin);
        if (n < 0) break;
        const size_t n_bytes = n > 0 && line[n - 1] == '\n' ? (size_t)n - 1 : (size_t)n;
        if (n_bytes == 0) continue;
        const size_t n_before = said->n;
        status = say(said, "user", line, n_bytes, error);
        if (status == KVL_OK) status = answer(engine, scheduler, wanted, said, error);
        /* What could not be answered was not said: a shorter message may still fit. */
        if (kvl_status_class_of(status) == KVL_CLASS_REFUSE && shows_prompt) {
            (void)kvl_cli_fail(error);
            forget_from(said, n_before);
            status = KVL_OK;
        }
    }
    free(line); /* tidy: free, getline allocated it */
    return status;
}

int kvl_command_chat(int argc, char **argv)
{
    static const struct argp_child children[] = {{&kvl_cli_engine_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        options,
        parse,
        NULL,
        "Talk with a model: a line is a message. Control-C ends an answer, Control-D the "
        "conversation.",
        children,
        NULL,
        NULL};
    arguments wanted = {.max_tokens = MAX_TOKENS_DEFAULT, .seed = 1};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    /* No restarting: an interrupt while a line is awaited ends the conversation. */
    const struct sigaction action = {.sa_handler = note_interrupt};
    (void)sigaction(SIGINT, &action, NULL);
    kvl_error error;
    kvl_engine *engine = NULL;
    if (kvl_cli_engine_create(&wanted.engine, 0, &engine, &error) != KVL_OK)
        return kvl_cli_fail(&error);
    kvl_scheduler *scheduler = NULL;
    history said = {0};
    const kvl_scheduler_options one = {.n_running_max = 1};
    kvl_status status = kvl_scheduler_create(engine, &one, &scheduler, &error);
    if (status == KVL_OK) status = converse(engine, scheduler, &wanted, &said, &error);
    forget_from(&said, 0);
    kvl_free(said.messages);
    kvl_scheduler_destroy(scheduler);
    kvl_engine_destroy(engine);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
