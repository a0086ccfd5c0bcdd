/* cli/demo_workflow.c: reads agents/data/workflow.json: templates, documents, questions. */
#include "base/alloc.h"
#include "base/file.h"
#include "cli/demo.h"

#include <jansson.h>
#include <string.h>

enum { FILE_BYTES_MAX = 1 << 20 };

static kvl_status add_piece(demo_agent *agent, const char *text, size_t n_bytes, const char *slot,
                            kvl_error *error)
{
    if (slot == NULL && n_bytes == 0) return KVL_OK;
    if (agent->n_pieces == DEMO_PARTS_MAX)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the template of %s has more than %d pieces",
                        agent->name, DEMO_PARTS_MAX);
    demo_piece *piece = &agent->pieces[agent->n_pieces];
    *piece = (demo_piece){0};
    if (slot != NULL) {
        if (n_bytes >= sizeof piece->slot)
            return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "a slot of %s has a name of %zu bytes",
                            agent->name, n_bytes);
        memcpy(piece->slot, slot, n_bytes);
    } else {
        piece->text = kvl_alloc_zero(1, n_bytes + 1);
        if (piece->text == NULL)
            return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a template");
        memcpy(piece->text, text, n_bytes);
    }
    agent->n_pieces++;
    return KVL_OK;
}

/* Cuts a text at its {slots}. */
static kvl_status split(demo_agent *agent, const char *text, kvl_error *error)
{
    const char *from = text;
    for (;;) {
        const char *open = strchr(from, '{');
        const char *close = open == NULL ? NULL : strchr(open, '}');
        if (open == NULL || close == NULL) return add_piece(agent, from, strlen(from), NULL, error);
        KVL_TRY(add_piece(agent, from, (size_t)(open - from), NULL, error));
        KVL_TRY(add_piece(agent, NULL, (size_t)(close - open - 1), open + 1, error));
        from = close + 1;
    }
}

/* Puts a template into ChatML: what stands before the line of three dashes is the system's part. */
static kvl_status wrap(demo_agent *agent, const char *text, kvl_error *error)
{
    const char *line = strstr(text, "\n---\n");
    if (line == NULL)
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "the template of %s has no line '---' between system and user",
                        agent->name);
    char *prompt = NULL;
    size_t n_bytes = 0;
    FILE *memory = open_memstream(&prompt, &n_bytes);
    if (memory == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a template");
    (void)fprintf(memory,
                  "<|im_start|>system\n%.*s<|im_end|>\n<|im_start|>user\n%s<|im_end|>\n"
                  "<|im_start|>assistant\n",
                  (int)(line - text), text, line + strlen("\n---\n"));
    (void)fclose(memory);
    const kvl_status status = split(agent, prompt, error);
    free(prompt); /* tidy: free, open_memstream allocated it */
    return status;
}

static kvl_status load_agent(const json_t *entry, size_t index, demo_agent *agent, kvl_error *error)
{
    const char *name = json_string_value(json_object_get(entry, "name"));
    const char *text = json_string_value(json_object_get(entry, "template"));
    if (name == NULL || text == NULL || strlen(name) >= sizeof agent->name)
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "agents[%zu] needs a name of at most %d bytes and a template", index,
                        DEMO_NAME_MAX - 1);
    (void)snprintf(agent->name, sizeof agent->name, "%s", name);
    return wrap(agent, text, error);
}

static kvl_status load_round(const char *directory, const json_t *entry, demo_workflow *workflow,
                             kvl_error *error)
{
    const size_t index = workflow->n_rounds;
    const char *file = json_string_value(json_object_get(entry, "document"));
    const char *question = json_string_value(json_object_get(entry, "question"));
    if (file == NULL || question == NULL || strchr(file, '/') != NULL)
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "rounds[%zu] needs a question and a document, a plain file name", index);
    char path[PATH_MAX];
    if (snprintf(path, sizeof path, "%s/%s", directory, file) >= (int)sizeof path)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path of %s is too long", file);
    char *document = NULL;
    size_t n_bytes = 0;
    KVL_TRY(kvl_file_read(path, FILE_BYTES_MAX, &document, &n_bytes, error));
    const size_t room = n_bytes + strlen(question) + 64;
    char *slot = kvl_alloc(room);
    char *copy = kvl_strdup(question);
    if (slot != NULL)
        (void)snprintf(slot, room, "Document:\n%s\n\nQuestion: %s", document, question);
    kvl_free(document);
    workflow->questions[index] = slot;
    workflow->short_questions[index] = copy;
    workflow->n_rounds++;
    if (slot == NULL || copy == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a document");
    return KVL_OK;
}

static kvl_status load_all(const char *directory, const json_t *root, demo_workflow *workflow,
                           kvl_error *error)
{
    const json_t *agents = json_object_get(root, "agents");
    const json_t *rounds = json_object_get(root, "rounds");
    if (json_array_size(agents) == 0 || json_array_size(agents) > DEMO_AGENTS_MAX ||
        json_array_size(rounds) == 0 || json_array_size(rounds) > DEMO_ROUNDS_MAX)
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "workflow.json needs 1 to %d agents and 1 to %d rounds", DEMO_AGENTS_MAX,
                        DEMO_ROUNDS_MAX);
    for (size_t i = 0; i < json_array_size(agents); i++) {
        workflow->n_agents = i + 1;
        KVL_TRY(load_agent(json_array_get(agents, i), i, &workflow->agents[i], error));
    }
    for (size_t i = 0; i < json_array_size(rounds); i++)
        KVL_TRY(load_round(directory, json_array_get(rounds, i), workflow, error));
    return KVL_OK;
}

kvl_status demo_workflow_load(const char *directory, demo_workflow *workflow, kvl_error *error)
{
    *workflow = (demo_workflow){0};
    char path[PATH_MAX];
    if (snprintf(path, sizeof path, "%s/workflow.json", directory) >= (int)sizeof path)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path of the workflow is too long");
    json_error_t reason;
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &reason);
    if (root == NULL)
        return KVL_FAIL(error, KVL_ERR_MALFORMED, "%s, line %d: %s", path, reason.line,
                        reason.text);
    const kvl_status status = load_all(directory, root, workflow, error);
    json_decref(root);
    if (status != KVL_OK) demo_workflow_deinit(workflow);
    return status;
}

void demo_workflow_deinit(demo_workflow *workflow)
{
    for (size_t a = 0; a < workflow->n_agents; a++) {
        for (size_t p = 0; p < workflow->agents[a].n_pieces; p++)
            kvl_free(workflow->agents[a].pieces[p].text);
    }
    for (size_t r = 0; r < workflow->n_rounds; r++) {
        kvl_free(workflow->questions[r]);
        kvl_free(workflow->short_questions[r]);
    }
    *workflow = (demo_workflow){0};
}
