/* cli/cmd_generate.c: `kvloom generate`: one answer, streamed. */
#include "base/alloc.h"
#include "base/clock.h"
#include "base/file.h"
#include "cli/cli.h"
#include "host/decode.h"

#include <argp.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

enum {
    MESSAGES_MAX = 256,
    MAX_TOKENS_DEFAULT = 256,
    OPTION_IDS = 256,
    OPTION_FILE,
    OPTION_JSON,
    OPTION_RAW,
    OPTION_SEED,
    OPTION_TEMPERATURE
};

typedef struct arguments {
    kvl_cli_engine engine;
    const char *prompt, *prompt_file, *messages_file, *ids_file;
    uint32_t max_tokens, seed;
    float temperature;
    bool json, raw;
} arguments;

static const struct argp_option options[] = {
    {"prompt", 'p', "TEXT", 0, "The prompt, as one user message", 0},
    {"prompt-file", OPTION_FILE, "FILE", 0, "The same, from a file", 0},
    {"messages", 'M', "FILE", 0, "Messages as JSON: [{\"role\": ..., \"content\": ...}, ...]", 0},
    {"tokens-file", OPTION_IDS, "IDS", 0, "Token ids, one a line, as they are", 0},
    {"raw", OPTION_RAW, NULL, 0, "Use the prompt as it is, without the chat template", 0},
    {"max-tokens", 'n', "N", 0, "Longest answer in tokens (256)", 0},
    {"temperature", OPTION_TEMPERATURE, "T", 0, "Draw at this temperature; 0 is greedy (0)", 0},
    {"seed", OPTION_SEED, "N", 0, "Seed of the draws (0)", 0},
    {"json", OPTION_JSON, NULL, 0, "Print one JSON object instead of streaming", 0},
    {0},
};

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &wanted->engine; return 0;
    case 'p': wanted->prompt = text; return 0;
    case 'M': wanted->messages_file = text; return 0;
    case OPTION_FILE: wanted->prompt_file = text; return 0;
    case OPTION_IDS: wanted->ids_file = text; return 0;
    case OPTION_RAW: wanted->raw = true; return 0;
    case OPTION_JSON: wanted->json = true; return 0;
    case 'n':
        wanted->max_tokens = kvl_cli_number(state, "--max-tokens", text, 1, KVL_POSITIONS_MAX);
        return 0;
    case OPTION_SEED: wanted->seed = kvl_cli_number(state, "--seed", text, 0, UINT32_MAX); return 0;
    case OPTION_TEMPERATURE: {
        char *end = NULL;
        wanted->temperature = strtof(text, &end);
        if (end == text || *end != '\0' || !(wanted->temperature >= 0.0F) ||
            wanted->temperature > 100.0F)
            argp_error(state, "--temperature is '%s'; it must be a number from 0 to 100", text);
        return 0;
    }
    case ARGP_KEY_END: {
        const int n = (wanted->prompt != NULL) + (wanted->prompt_file != NULL) +
                      (wanted->messages_file != NULL) + (wanted->ids_file != NULL);
        if (n != 1)
            argp_error(state, "give one of --prompt, --prompt-file, --messages, --tokens-file");
        return 0;
    }
    default: return ARGP_ERR_UNKNOWN;
    }
}

static kvl_status render(const kvl_model *model, const kvl_message *messages, size_t n_messages,
                         uint32_t **ids, size_t *n_ids, kvl_error *error)
{
    kvl_prompt prompt = {0};
    const kvl_status status =
        kvl_chat_render(kvl_model_chat_template(model), kvl_model_tokenizer(model), messages,
                        n_messages, true, &prompt, error);
    if (status == KVL_OK) {
        *ids = prompt.ids;
        *n_ids = prompt.n_ids;
        prompt.ids = NULL;
    }
    kvl_prompt_deinit(&prompt);
    return status;
}

static kvl_status render_text(const kvl_model *model, const arguments *wanted, const char *text,
                              size_t n_bytes, uint32_t **ids, size_t *n_ids, kvl_error *error)
{
    if (wanted->raw)
        return kvl_tokenize(kvl_model_tokenizer(model), text, n_bytes, true, ids, n_ids, error);
    const kvl_message message = {.role = "user", .content = text, .content_bytes = n_bytes};
    return render(model, &message, 1, ids, n_ids, error);
}

static kvl_status read_messages(const json_t *list, const char *path, kvl_message *messages,
                                size_t *n_messages, kvl_error *error)
{
    if (!json_is_array(list) || json_array_size(list) == 0 || json_array_size(list) > MESSAGES_MAX)
        return KVL_FAIL(error, KVL_ERR_MALFORMED, "%s must be a list of 1 to %d messages", path,
                        MESSAGES_MAX);
    *n_messages = json_array_size(list);
    for (size_t i = 0; i < *n_messages; i++) {
        const json_t *message = json_array_get(list, i);
        const json_t *content = json_object_get(message, "content");
        messages[i].role = json_string_value(json_object_get(message, "role"));
        messages[i].content = json_string_value(content);
        messages[i].content_bytes = json_string_length(content);
        if (messages[i].role == NULL || messages[i].content == NULL)
            return KVL_FAIL(error, KVL_ERR_MALFORMED,
                            "%s: message %zu needs a role and a content, both texts", path, i);
    }
    return KVL_OK;
}

static kvl_status render_messages(const kvl_model *model, const char *path, uint32_t **ids,
                                  size_t *n_ids, kvl_error *error)
{
    json_error_t reason;
    json_t *list = json_load_file(path, JSON_REJECT_DUPLICATES, &reason);
    if (list == NULL)
        return KVL_FAIL(error, KVL_ERR_MALFORMED, "%s, line %d: %s", path, reason.line,
                        reason.text);
    kvl_message messages[MESSAGES_MAX];
    size_t n_messages = 0;
    kvl_status status = read_messages(list, path, messages, &n_messages, error);
    if (status == KVL_OK) status = render(model, messages, n_messages, ids, n_ids, error);
    json_decref(list);
    return status;
}

static kvl_status make_prompt(const kvl_model *model, const arguments *wanted, uint32_t **ids,
                              size_t *n_ids, kvl_error *error)
{
    if (wanted->ids_file != NULL)
        return kvl_cli_read_ids(wanted->ids_file, kvl_model_shape_of(model)->n_vocab, ids, n_ids,
                                error);
    if (wanted->messages_file != NULL)
        return render_messages(model, wanted->messages_file, ids, n_ids, error);
    if (wanted->prompt != NULL)
        return render_text(model, wanted, wanted->prompt, strlen(wanted->prompt), ids, n_ids,
                           error);
    char *text = NULL;
    size_t n_bytes = 0;
    KVL_TRY(kvl_file_read(wanted->prompt_file, KVL_TEXT_BYTES_MAX, &text, &n_bytes, error));
    const kvl_status status = render_text(model, wanted, text, n_bytes, ids, n_ids, error);
    kvl_free(text);
    return status;
}

typedef struct stream {
    kvl_detokenizer detokenizer;
    bool silent;
} stream;

static bool print_token(void *context, uint32_t token, const float *logits)
{
    (void)logits;
    stream *out = context;
    char text[KVL_DETOKENIZER_OUT_MIN];
    const size_t n_bytes = kvl_detokenizer_push(&out->detokenizer, token, text, sizeof text);
    if (!out->silent && n_bytes > 0) {
        (void)fwrite(text, 1, n_bytes, stdout);
        (void)fflush(stdout);
    }
    return false;
}

static void print_json(const kvl_engine *engine, const kvl_session *session, uint32_t n_prompt,
                       bool ended, double ttft_ms, double total_ms)
{
    const kvl_tokenizer *tokenizer = kvl_model_tokenizer(engine->model);
    const uint32_t n_tokens = kvl_session_n_tokens(session) - n_prompt;
    json_t *tokens = json_array();
    kvl_detokenizer detokenizer;
    kvl_detokenizer_init(&detokenizer, tokenizer);
    char *text = NULL;
    size_t n_text = 0;
    FILE *memory = open_memstream(&text, &n_text);
    char piece[KVL_DETOKENIZER_OUT_MIN];
    for (uint32_t i = 0; i < n_tokens; i++) {
        const uint32_t id = kvl_session_tokens(session)[n_prompt + i];
        (void)json_array_append_new(tokens, json_integer(id));
        (void)fwrite(piece, 1, kvl_detokenizer_push(&detokenizer, id, piece, sizeof piece), memory);
    }
    (void)fwrite(piece, 1, kvl_detokenizer_finish(&detokenizer, piece, sizeof piece), memory);
    (void)fclose(memory);
    json_t *answer = json_pack(
        "{s:o?, s:o, s:s, s:{s:i, s:i, s:i}, s:f, s:f}", "text", json_stringn(text, n_text),
        "tokens", tokens, "finish_reason", ended ? "stop" : "length", "usage", "prompt_tokens",
        (int)n_prompt, "completion_tokens", (int)n_tokens, "total_tokens",
        (int)(n_prompt + n_tokens), "ttft_ms", ttft_ms, "total_ms", total_ms);
    (void)json_dumpf(answer, stdout, JSON_INDENT(2));
    (void)printf("\n");
    json_decref(answer);
    free(text); /* tidy: free, open_memstream allocated it */
}

static kvl_status answer(kvl_engine *engine, const arguments *wanted, const uint32_t *ids,
                         size_t n_ids, float *logits, kvl_session *session, kvl_error *error)
{
    const kvl_clock *clock = kvl_clock_system();
    const int64_t start = kvl_clock_now(clock);
    if (n_ids == 0 || n_ids >= engine->n_positions)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "the prompt has %zu tokens; it must have 1 to %u", n_ids,
                        engine->n_positions - 1);
    const uint32_t n_prompt = (uint32_t)n_ids;
    const uint32_t room = engine->n_positions - n_prompt;
    const uint32_t max_tokens = wanted->max_tokens < room ? wanted->max_tokens : room;
    uint32_t n_shared = 0;
    KVL_TRY(kvl_session_begin(session, ids, n_prompt, max_tokens, false, 0, &n_shared, error));
    KVL_TRY(kvl_session_compute_range(session, 0, n_prompt, 1, logits, error));
    const int64_t first = kvl_clock_now(clock);
    stream out = {.silent = wanted->json};
    kvl_detokenizer_init(&out.detokenizer, kvl_model_tokenizer(engine->model));
    const kvl_decode_options decoding = {
        .max_tokens = max_tokens,
        .temperature = wanted->temperature,
        .seed = wanted->seed,
        .drawn = print_token,
        .context = &out,
    };
    uint32_t n_tokens = 0;
    bool ended = false;
    KVL_TRY(kvl_decode(session, engine, &decoding, logits, &n_tokens, &ended, NULL, error));
    const int64_t end = kvl_clock_now(clock);
    if (wanted->json) {
        print_json(engine, session, n_prompt, ended, kvl_ns_to_ms(first - start),
                   kvl_ns_to_ms(end - start));
    } else {
        char rest[KVL_DETOKENIZER_OUT_MIN];
        const size_t n_bytes = kvl_detokenizer_finish(&out.detokenizer, rest, sizeof rest);
        (void)fwrite(rest, 1, n_bytes, stdout);
        (void)printf("\n");
    }
    return KVL_OK;
}

static kvl_status generate(kvl_engine *engine, const arguments *wanted, kvl_error *error)
{
    uint32_t *ids = NULL;
    size_t n_ids = 0;
    kvl_session *session = NULL;
    float *logits = kvl_alloc((size_t)engine->shape->n_vocab * sizeof *logits);
    kvl_status status = logits == NULL ? KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for logits")
                                       : make_prompt(engine->model, wanted, &ids, &n_ids, error);
    if (status == KVL_OK) status = kvl_session_create(engine, &session, error);
    if (status == KVL_OK) status = answer(engine, wanted, ids, n_ids, logits, session, error);
    kvl_session_destroy(session);
    kvl_free(logits);
    kvl_free(ids);
    return status;
}

int kvl_command_generate(int argc, char **argv)
{
    static const struct argp_child children[] = {{&kvl_cli_engine_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {options,  parse, NULL, "Answer a prompt.",
                                     children, NULL,  NULL};
    arguments wanted = {.max_tokens = MAX_TOKENS_DEFAULT};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    kvl_error error;
    kvl_engine *engine = NULL;
    if (kvl_cli_engine_create(&wanted.engine, 0, &engine, &error) != KVL_OK)
        return kvl_cli_fail(&error);
    const kvl_status status = generate(engine, &wanted, &error);
    kvl_engine_destroy(engine);
    return status == KVL_OK ? KVL_EXIT_OK : kvl_cli_fail(&error);
}
