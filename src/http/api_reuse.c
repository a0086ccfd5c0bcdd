/* http/api_reuse.c: what of a request's prompt may be reused, and how: kvloom.quality. */
#include "base/alloc.h"
#include "http/api.h"

#include <string.h>

static const char *const names[] = {
    [KVL_REUSE_EXACT] = "exact",       [KVL_REUSE_BALANCED] = "balanced", [KVL_REUSE_FAST] = "fast",
    [KVL_REUSE_VERIFIED] = "verified", [KVL_REUSE_HEALED] = "healed",
};
enum { N_NAMES = sizeof names / sizeof *names };

bool kvl_api_quality_of(const char *name, kvl_reuse_quality *quality)
{
    for (int i = 0; name != NULL && i < N_NAMES; i++) {
        if (strcmp(name, names[i]) != 0) continue;
        *quality = (kvl_reuse_quality)i;
        return true;
    }
    return false;
}

const char *kvl_api_quality_name(kvl_reuse_quality quality)
{
    return names[quality];
}

static bool is_whole(kvl_reuse_quality quality)
{
    return quality == KVL_REUSE_VERIFIED || quality == KVL_REUSE_HEALED;
}

/* Answers that are checked behind the last token are drawn by the checker: greedily. */
static bool can_be_checked(const kvl_generation *g)
{
    const kvl_sampling *s = &g->sampling;
    return s->temperature <= 0.0F && g->n_branches == 1 && g->n_stops == 0 && !s->with_logprobs &&
           !g->ignore_end && s->repetition_penalty == 1.0F && s->presence_penalty == 0.0F &&
           s->frequency_penalty == 0.0F;
}

/* What the request says; *is_named: it says something. */
static bool read_field(const kvl_api_request *request, kvl_reuse_quality *quality, bool *is_named,
                       kvl_api_error *error)
{
    const json_t *own = json_object_get(request->body, "kvloom");
    if (own == NULL || json_is_null(own)) return true;
    if (!json_is_object(own)) return kvl_api_refuse(error, "kvloom", "kvloom must be an object");
    const json_t *given = json_object_get(own, "quality");
    if (given == NULL || json_is_null(given)) return true;
    *is_named = true;
    if (kvl_api_quality_of(json_string_value(given), quality)) return true;
    return kvl_api_refuse(error, "kvloom.quality",
                          "kvloom.quality must be exact, balanced, fast, verified or healed");
}

static bool take_texts(kvl_api_request *request, kvl_api_error *error)
{
    const kvl_prompt *prompt = &request->prompt;
    kvl_generation *g = &request->generation;
    request->texts = kvl_alloc_zero(prompt->n_parts + 1, sizeof *request->texts);
    if (request->texts == NULL) {
        kvl_api_error_from(error, KVL_ERR_NO_MEMORY, "", "no memory for a request");
        return false;
    }
    for (size_t i = 0; i < prompt->n_parts; i++) {
        const kvl_prompt_part *part = &prompt->parts[i];
        if (part->message < 0) continue;
        request->texts[g->n_texts++] = (kvl_text_run){part->first, part->n_tokens};
    }
    g->texts = request->texts;
    return true;
}

bool kvl_api_request_reuse(kvl_api_request *request, kvl_reuse_quality otherwise, bool can_reuse,
                           kvl_api_error *error)
{
    kvl_generation *g = &request->generation;
    kvl_reuse_quality quality = KVL_REUSE_EXACT;
    bool is_named = false;
    if (!read_field(request, &quality, &is_named, error)) return false;
    if (!is_named) {
        /* The server's own choice never refuses a request. */
        const bool fits =
            request->is_chat && can_reuse && (!is_whole(otherwise) || can_be_checked(g));
        quality = fits ? otherwise : KVL_REUSE_EXACT;
    }
    g->quality = quality;
    if (quality == KVL_REUSE_EXACT) return true;
    if (!request->is_chat)
        return kvl_api_refuse(error, "kvloom.quality",
                              "kvloom.quality '%s' needs messages: a prompt without them is reused "
                              "exactly",
                              names[quality]);
    if (!can_reuse)
        return kvl_api_refuse(error, "kvloom.quality",
                              "kvloom.quality '%s' needs a server with a store: start it with "
                              "--name, --listen, --store and --key-file",
                              names[quality]);
    if (is_whole(quality) && !can_be_checked(g))
        return kvl_api_refuse(error, "kvloom.quality",
                              "kvloom.quality '%s' is for greedy answers: temperature 0, n 1, no "
                              "stop, logprobs, penalties nor ignore_eos",
                              names[quality]);
    return take_texts(request, error);
}
