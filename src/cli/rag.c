/* cli/rag.c: a collection's directory, its host, its prompts. */
#include "cli/rag.h"

#include "base/alloc.h"
#include "base/file.h"
#include "base/random.h"
#include "model/chat_template.h"
#include "model/model.h"
#include "model/tokenizer.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- the directory ---- */

static kvl_status data_home(char home[PATH_MAX], kvl_error *error)
{
    const char *data = getenv("XDG_DATA_HOME");
    const char *user = getenv("HOME");
    int n = -1;
    if (data != NULL && data[0] == '/') {
        n = snprintf(home, PATH_MAX, "%s/kvloom/collections", data);
    } else if (user != NULL && user[0] != '\0') {
        n = snprintf(home, PATH_MAX, "%s/.local/share/kvloom/collections", user);
    } else {
        return KVL_FAIL(error, KVL_ERR_NOT_FOUND,
                        "neither XDG_DATA_HOME nor HOME is set; give --collection a path");
    }
    if (n >= PATH_MAX) return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path of HOME is too long");
    return KVL_OK;
}

static kvl_status find_directory(const char *name, char directory[PATH_MAX], kvl_error *error)
{
    char home[PATH_MAX];
    if (strchr(name, '/') != NULL) {
        if (snprintf(directory, PATH_MAX, "%s", name) >= PATH_MAX)
            return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "--collection: the path is too long");
        return KVL_OK;
    }
    if (name[0] == '\0' || name[0] == '.' || strlen(name) > 64)
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "--collection is '%.64s'; it must be a name of 1 to 64 characters that "
                        "does not begin with a dot, or a path with a slash in it",
                        name);
    KVL_TRY(data_home(home, error));
    if (snprintf(directory, PATH_MAX, "%s/%s", home, name) >= PATH_MAX)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path of the collection is too long");
    return KVL_OK;
}

static kvl_status read_key(int file, const char *path, uint8_t key[KVL_RAG_KEY_BYTES],
                           kvl_error *error)
{
    const ssize_t n = read(file, key, KVL_RAG_KEY_BYTES);
    if (n == (ssize_t)KVL_RAG_KEY_BYTES) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_MALFORMED,
                    "%s must have %u bytes; remove it and ingest with --rebuild", path,
                    KVL_RAG_KEY_BYTES);
}

/* Ids of segments are keyed, so that nobody can guess from a store what was read. The key is made
 * beside the collection, under another name first, so that it is never half there. */
static kvl_status find_key(const kvl_rag *rag, uint8_t key[KVL_RAG_KEY_BYTES], kvl_error *error)
{
    char path[PATH_MAX], fresh[PATH_MAX];
    if (snprintf(path, sizeof path, "%s/tenant.key", rag->directory) >= (int)sizeof path ||
        snprintf(fresh, sizeof fresh, "%s/tenant.key.%d", rag->directory, (int)getpid()) >=
            (int)sizeof fresh)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path of the collection is too long");
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 && errno == ENOENT) {
        kvl_random_secret(key, KVL_RAG_KEY_BYTES);
        const int made = open(fresh, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        const bool is_written =
            made >= 0 && write(made, key, KVL_RAG_KEY_BYTES) == (ssize_t)KVL_RAG_KEY_BYTES;
        if (made >= 0) (void)close(made);
        /* A link, not a rename: of two processes that make one, both use the first. */
        if (is_written) (void)!link(fresh, path);
        (void)unlink(fresh);
        file = open(path, O_RDONLY | O_CLOEXEC);
    }
    if (file < 0) return KVL_FAIL(error, KVL_ERR_IO, "%s: %s", path, strerror(errno));
    const kvl_status status = read_key(file, path, key, error);
    (void)close(file);
    return status;
}

kvl_status kvl_rag_open(const kvl_rag_options *options, kvl_rag *rag, kvl_error *error)
{
    *rag = (kvl_rag){.host = NULL};
    kvl_cli_name_model(options->engine->model, rag->model);
    KVL_TRY(find_directory(options->collection, rag->directory, error));
    if (snprintf(rag->store, sizeof rag->store, "%s/kv-%s", rag->directory, rag->model) >=
        (int)sizeof rag->store)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path of the collection is too long");
    const kvl_collection_options collection = {rag->directory, options->create,
                                               options->n_chunk_tokens};
    KVL_TRY(kvl_collection_open(&collection, &rag->collection, error));
    return find_key(rag, rag->key, error);
}

kvl_status kvl_rag_start(kvl_rag *rag, const kvl_rag_options *options, kvl_error *error)
{
    const kvl_local_host_options host = {
        .engine = options->engine,
        .store_path = rag->store,
        .tenant_key = rag->key,
        .store_bytes_max = options->store_bytes_max,
        .stream = options->stream,
    };
    return kvl_local_host_open(&host, &rag->host, error);
}

void kvl_rag_close(kvl_rag *rag)
{
    kvl_local_host_stop(rag->host);
    kvl_collection_close(rag->collection);
    rag->host = NULL;
    rag->collection = NULL;
}

/* ---- prompts ---- */

static Kvloom__V1__PromptPart *add_part(kvl_rag_prompt *prompt)
{
    Kvloom__V1__PromptPart *part = &prompt->parts[prompt->run.n_parts];
    kvloom__v1__prompt_part__init(part);
    prompt->pointers[prompt->run.n_parts++] = part;
    return part;
}

static void add_chunks(kvl_rag_prompt *prompt, const kvl_rag_text *chunks, size_t n, bool apart)
{
    static const char between[] = "\n\n";
    for (size_t i = 0; i < n; i++) {
        if (i > 0 && apart)
            add_part(prompt)->text =
                (ProtobufCBinaryData){sizeof between - 1, (uint8_t *)(uintptr_t)between};
        Kvloom__V1__PromptPart *part = add_part(prompt);
        (void)snprintf(prompt->names[i], sizeof prompt->names[i], "chunk_%u", (uint32_t)i + 1);
        part->slot = prompt->names[i];
        part->text = (ProtobufCBinaryData){chunks[i].n_bytes, (uint8_t *)(uintptr_t)chunks[i].text};
    }
}

static void begin(kvl_rag_prompt *prompt, const char *primer)
{
    *prompt = (kvl_rag_prompt){.opening = NULL};
    kvloom__v1__run_task__init(&prompt->run);
    prompt->run.parts = prompt->pointers;
    if (primer[0] == '\0') return;
    prompt->run.home = (char *)(uintptr_t) "primer";
    prompt->run.primer = (ProtobufCBinaryData){strlen(primer), (uint8_t *)(uintptr_t)primer};
}

/* Ids of a rendered prompt up to and behind its user's content. */
static kvl_status cut_rendered(const kvl_prompt *rendered, size_t *n_before, size_t *first_behind,
                               kvl_error *error)
{
    for (size_t p = 0; p < rendered->n_parts; p++) {
        if (rendered->parts[p].message != 0) continue;
        *n_before = rendered->parts[p].first;
        *first_behind = *n_before + rendered->parts[p].n_tokens;
        return KVL_OK;
    }
    return KVL_FAIL(error, KVL_ERR_UNSUPPORTED, "the chat template leaves out what a user says");
}

/* first ids, then the ids of a text, then last ids. */
static kvl_status join_ids(const kvl_model *model, const uint32_t *first, size_t n_first,
                           const char *text, const uint32_t *last, size_t n_last, uint32_t **ids,
                           size_t *n, kvl_error *error)
{
    *n = n_first;
    *ids = kvl_alloc_zero(n_first + 1, sizeof **ids);
    if (*ids == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a prompt");
    if (n_first > 0) memcpy(*ids, first, n_first * sizeof *first);
    KVL_TRY(kvl_tokenize(kvl_model_tokenizer(model), text, strlen(text), false, ids, n, error));
    if (n_last == 0) return KVL_OK;
    uint32_t *grown = kvl_realloc(*ids, (*n + n_last) * sizeof *grown);
    if (grown == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a prompt");
    memcpy(grown + *n, last, n_last * sizeof *last);
    *ids = grown;
    *n += n_last;
    return KVL_OK;
}

static kvl_status make(const kvl_model *model, const kvl_prompt *rendered, const char *instruction,
                       const kvl_rag_text *chunks, size_t n, const char *question,
                       kvl_rag_prompt *prompt, kvl_error *error)
{
    size_t n_before = 0, behind = 0, n_ids = 0;
    KVL_TRY(cut_rendered(rendered, &n_before, &behind, error));
    KVL_TRY(join_ids(model, rendered->ids, n_before, instruction, NULL, 0, &prompt->opening, &n_ids,
                     error));
    Kvloom__V1__PromptPart *part = add_part(prompt);
    part->tokens = prompt->opening;
    part->n_tokens = n_ids;
    add_chunks(prompt, chunks, n, true);
    KVL_TRY(join_ids(model, NULL, 0, question, rendered->ids + behind, rendered->n_ids - behind,
                     &prompt->ending, &n_ids, error));
    part = add_part(prompt);
    part->tokens = prompt->ending;
    part->n_tokens = n_ids;
    return KVL_OK;
}

kvl_status kvl_rag_prompt_make(const kvl_model *model, const char *instruction,
                               const kvl_rag_text *chunks, size_t n, const char *question,
                               const char *primer, kvl_rag_prompt *prompt, kvl_error *error)
{
    KVL_ASSERT(n <= KVL_RAG_CHUNKS_MAX);
    begin(prompt, primer);
    const kvl_message message = {.role = "user", .content = "text", .content_bytes = 4};
    kvl_prompt rendered = {0};
    kvl_status status = kvl_chat_render(kvl_model_chat_template(model), kvl_model_tokenizer(model),
                                        &message, 1, true, &rendered, error);
    if (status == KVL_OK)
        status = make(model, &rendered, instruction, chunks, n, question, prompt, error);
    kvl_prompt_deinit(&rendered);
    return status;
}

void kvl_rag_prompt_read(const kvl_rag_text *chunks, size_t n, const char *primer,
                         kvl_rag_prompt *prompt)
{
    KVL_ASSERT(n <= KVL_RAG_CHUNKS_MAX);
    begin(prompt, primer);
    prompt->run.mode = KVLOOM__V1__MODE__MODE_READ;
    add_chunks(prompt, chunks, n, false);
}

void kvl_rag_prompt_deinit(kvl_rag_prompt *prompt)
{
    kvl_free(prompt->opening);
    kvl_free(prompt->ending);
    prompt->opening = NULL;
    prompt->ending = NULL;
}
