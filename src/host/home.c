/* host/home.c: what a slot's text is prefilled behind.
 *
 * Nothing, the chat template's header, or a primer: the header and a few short documents of a
 * collection's own kind, so that a chunk is not computed as if it began the world. All three are
 * canonical: whoever has the texts computes the same KV, so it is published under a content id. */
#include "base/alloc.h"
#include "host/host_parts.h"

#include <string.h>

static const size_t PRIMER_BYTES_MAX = 64 << 10;

static kvl_status take_header(kvl_host *host, const kvl_prompt *prompt, kvl_error *error)
{
    KVL_ASSERT(prompt->n_parts > 0 && prompt->parts[0].message < 0);
    host_home *header = &host->header;
    header->n_ids = prompt->parts[0].n_tokens;
    header->ids = kvl_alloc_zero(header->n_ids + 1, sizeof *header->ids);
    if (header->ids == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the header");
    memcpy(header->ids, prompt->ids, header->n_ids * sizeof *header->ids);
    header->id = kvl_segment_id(host->tenant_key, &host->fingerprint, &host->nothing.id,
                                header->ids, header->n_ids);
    return KVL_OK;
}

/* The header is the chat template's own opening before a user's text. */
kvl_status host_homes_init(kvl_host *host, kvl_error *error)
{
    const kvl_message message = {.role = "user", .content = "text", .content_bytes = 4};
    kvl_prompt prompt = {0};
    kvl_status status = kvl_chat_render(kvl_model_chat_template(host->engine->model),
                                        kvl_model_tokenizer(host->engine->model), &message, 1,
                                        false, &prompt, error);
    if (status == KVL_OK) status = take_header(host, &prompt, error);
    kvl_prompt_deinit(&prompt);
    return status;
}

void host_homes_deinit(kvl_host *host)
{
    kvl_free(host->header.ids);
    for (size_t i = 0; i < KVL_PRIMERS_MAX; i++) kvl_free(host->primers[i].ids);
}

static host_home *find_primer(kvl_host *host, const kvl_digest *id)
{
    for (size_t i = 0; i < KVL_PRIMERS_MAX; i++) {
        host_home *primer = &host->primers[i];
        if (primer->ids == NULL || !kvl_digest_equal(&primer->id, id)) continue;
        primer->last_use = ++host->n_primer_uses;
        return primer;
    }
    return NULL;
}

/* Takes ids [n]: header and primer. */
static const host_home *remember_primer(kvl_host *host, uint32_t *ids, uint32_t n)
{
    const uint32_t n_header = host->header.n_ids;
    const kvl_digest id = kvl_segment_id(host->tenant_key, &host->fingerprint, &host->header.id,
                                         ids + n_header, n - n_header);
    host_home *known = find_primer(host, &id);
    if (known != NULL) {
        kvl_free(ids);
        return known;
    }
    host_home *place = &host->primers[0];
    for (size_t i = 1; i < KVL_PRIMERS_MAX; i++) {
        if (host->primers[i].last_use < place->last_use) place = &host->primers[i];
    }
    kvl_free(place->ids);
    *place = (host_home){id, ids, n, ++host->n_primer_uses};
    return place;
}

static kvl_status read_primer(kvl_host *host, const ProtobufCBinaryData *text,
                              const host_home **home, kvl_error *error)
{
    if (text->len > PRIMER_BYTES_MAX)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "the primer has %zu bytes, at most %zu are allowed; shorten it", text->len,
                        PRIMER_BYTES_MAX);
    const host_home *header = &host->header;
    size_t n = header->n_ids;
    uint32_t *ids = kvl_alloc_zero(n + 1, sizeof *ids);
    if (ids == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a primer");
    memcpy(ids, header->ids, n * sizeof *ids);
    const size_t n_max = host->engine->n_positions / 2;
    kvl_status status = kvl_tokenize(kvl_model_tokenizer(host->engine->model),
                                     (const char *)text->data, text->len, false, &ids, &n, error);
    if (status == KVL_OK && n > n_max)
        status = KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                          "header and primer have %zu tokens, half of the context is %zu; shorten "
                          "the primer",
                          n, n_max);
    if (status != KVL_OK) {
        kvl_free(ids);
        return status;
    }
    *home = remember_primer(host, ids, (uint32_t)n);
    return KVL_OK;
}

kvl_status host_home_find(kvl_host *host, const Kvloom__V1__RunTask *task, const host_home **home,
                          kvl_error *error)
{
    const bool is_primer = strcmp(task->home, "primer") == 0;
    const size_t n_given = (size_t)(task->primer.len > 0) + (size_t)(task->primer_home.len > 0);
    if (n_given != (is_primer ? 1U : 0U))
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        is_primer ? "home is 'primer': give one of primer and primer_home"
                                  : "a primer was given, but home is '%.32s'; it must be 'primer'",
                        task->home);
    if (task->home[0] == '\0' || strcmp(task->home, "header") == 0) {
        *home = &host->header;
        return KVL_OK;
    }
    if (strcmp(task->home, "nothing") == 0) {
        *home = &host->nothing;
        return KVL_OK;
    }
    if (!is_primer)
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "home is '%.32s'; it must be header, nothing or primer", task->home);
    if (task->primer.len > 0) return read_primer(host, &task->primer, home, error);
    kvl_digest id;
    if (task->primer_home.len != KVL_DIGEST_BYTES)
        return KVL_FAIL(error, KVL_ERR_INVALID, "primer_home has %zu bytes, must have %u",
                        task->primer_home.len, KVL_DIGEST_BYTES);
    memcpy(id.bytes, task->primer_home.data, sizeof id.bytes);
    *home = find_primer(host, &id);
    if (*home == NULL)
        return KVL_FAIL(error, KVL_ERR_NOT_FOUND,
                        "primer_home is not one of the last %u primers; send the primer's text",
                        KVL_PRIMERS_MAX);
    return KVL_OK;
}
