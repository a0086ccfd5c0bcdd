/* host/branch.c: requests and branches in memory; stop texts. */
#include "host/branch.h"

#include "base/alloc.h"

#include <string.h>

kvl_status kvl_request_create(const kvl_generation *asked, kvl_request **request, kvl_error *error)
{
    *request = NULL;
    kvl_request *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a request");
    made->asked = *asked;
    made->asked.ids = NULL;
    made->asked.texts = NULL;
    made->asked.stops = NULL;
    made->n_open = asked->n_branches;
    size_t n_bytes = 0;
    for (uint32_t i = 0; i < asked->n_stops; i++) n_bytes += strlen(asked->stops[i]) + 1;
    const char **stops = NULL;
    if (asked->n_stops > 0) {
        stops = kvl_alloc_zero(asked->n_stops, sizeof *stops);
        made->asked.stops = stops;
        made->stop_bytes = kvl_alloc(n_bytes);
        if (stops == NULL || made->stop_bytes == NULL) {
            kvl_request_destroy(made);
            return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for stop texts");
        }
    }
    char *at = made->stop_bytes;
    for (uint32_t i = 0; i < asked->n_stops; i++) {
        const size_t n = strlen(asked->stops[i]);
        memcpy(at, asked->stops[i], n + 1);
        stops[i] = at;
        at += n + 1;
        if (n > made->longest_stop) made->longest_stop = n;
    }
    *request = made;
    return KVL_OK;
}

void kvl_request_destroy(kvl_request *request)
{
    if (request == NULL) return;
    kvl_free((void *)(uintptr_t)request->asked.stops);
    kvl_free(request->stop_bytes);
    kvl_free(request);
}

kvl_status kvl_branch_create(kvl_request *request, uint32_t index, uint32_t n_prompt,
                             kvl_sequence *sequence, kvl_branch **branch, kvl_error *error)
{
    *branch = kvl_alloc_zero(1, sizeof **branch);
    if (*branch == NULL) {
        kvl_sequence_deinit(sequence);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a branch");
    }
    kvl_branch *made = *branch;
    made->request = request;
    made->sequence = *sequence;
    made->index = index;
    made->n_prompt = n_prompt;
    made->random = (kvl_random){request->asked.seed + index};
    kvl_detokenizer_init(&made->text.detokenizer, kvl_model_tokenizer(sequence->engine->model));
    *sequence = (kvl_sequence){0};
    return KVL_OK;
}

void kvl_branch_destroy(kvl_branch *branch)
{
    if (branch == NULL) return;
    kvl_sequence_deinit(&branch->sequence);
    kvl_free(branch->text.held);
    kvl_free(branch);
}

/* The first stop text in held [n]; n where there is none. */
static size_t find_stop(const kvl_request *request, const char *held, size_t n)
{
    size_t first = n;
    for (uint32_t i = 0; i < request->asked.n_stops; i++) {
        const char *stop = request->asked.stops[i];
        const char *at = n == 0 ? NULL : memmem(held, n, stop, strlen(stop));
        if (at != NULL && (size_t)(at - held) < first) first = (size_t)(at - held);
    }
    return first;
}

/* How much of the end of held [n] could become a stop text. */
static size_t count_suspects(const kvl_request *request, const char *held, size_t n)
{
    for (size_t n_end = n < request->longest_stop ? n : request->longest_stop; n_end > 0; n_end--) {
        for (uint32_t i = 0; i < request->asked.n_stops; i++) {
            const char *stop = request->asked.stops[i];
            if (strlen(stop) > n_end && memcmp(held + n - n_end, stop, n_end) == 0) return n_end;
        }
    }
    return 0;
}

static bool make_room(kvl_answer_text *text)
{
    const size_t wanted = text->n_held + KVL_DETOKENIZER_OUT_MIN;
    if (wanted <= text->held_max) return true;
    char *larger = kvl_realloc(text->held, 2 * wanted);
    if (larger == NULL) return false;
    text->held = larger;
    text->held_max = 2 * wanted;
    return true;
}

bool kvl_branch_push_text(kvl_branch *branch, uint32_t token, bool ends, const char **text,
                          size_t *n_bytes, kvl_status *status)
{
    kvl_answer_text *own = &branch->text;
    *text = "";
    *n_bytes = 0;
    *status = KVL_OK;
    /* What was given out last time is nobody's any more. */
    own->n_held -= own->n_shown;
    if (own->n_shown > 0) memmove(own->held, own->held + own->n_shown, own->n_held);
    own->n_shown = 0;
    if (!make_room(own)) {
        *status = KVL_ERR_NO_MEMORY;
        return false;
    }
    char *behind = own->held + own->n_held;
    const size_t room = own->held_max - own->n_held;
    own->n_held += ends ? kvl_detokenizer_finish(&own->detokenizer, behind, room)
                        : kvl_detokenizer_push(&own->detokenizer, token, behind, room);
    const size_t stop = find_stop(branch->request, own->held, own->n_held);
    const bool stopped = stop < own->n_held;
    own->n_shown = stopped ? stop : own->n_held;
    if (!stopped && !ends) own->n_shown -= count_suspects(branch->request, own->held, own->n_held);
    *text = own->held;
    *n_bytes = own->n_shown;
    return stopped;
}
