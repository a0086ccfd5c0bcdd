/* host/fill.c: requests of the service whose prompts may be made of texts that stand elsewhere, in
 * other prompts, at other places.
 *
 * The prompt goes the way of a run task up to its first token, without anchors, since conversations
 * have no templates: texts that were read before are placed and blended, the rest is computed. What
 * comes of it is a sequence that the scheduler decodes beside all others; only what stands before
 * the first placed token may enter the prefix tree. Qualities that are checked behind the answer
 * are whole run tasks. Texts that nobody has read are computed where they stand, and read at home
 * when there is nothing else to do. */
#include "base/alloc.h"
#include "base/log.h"
#include "host/host_parts.h"

#include <string.h>

/* A shorter text costs less to compute than to look for. */
enum { TEXT_LEAST = 64, SLOTS_MAX = (KVL_PARTS_MAX - 1) / 2 };

/* A task in the words of the protocol, over the ids of a request. */
typedef struct asked_task {
    Kvloom__V1__RunTask task;
    Kvloom__V1__PromptPart parts[KVL_PARTS_MAX];
    Kvloom__V1__PromptPart *pointers[KVL_PARTS_MAX];
} asked_task;

static char slot_name[] = "text";

static void add_part(asked_task *to, const kvl_generation *asked, uint32_t first, uint32_t past,
                     bool is_slot)
{
    if (first == past) return;
    KVL_ASSERT(to->task.n_parts < KVL_PARTS_MAX);
    Kvloom__V1__PromptPart *part = &to->parts[to->task.n_parts];
    kvloom__v1__prompt_part__init(part);
    if (is_slot) part->slot = slot_name;
    part->tokens = (uint32_t *)(uintptr_t)(asked->ids + first);
    part->n_tokens = past - first;
    to->pointers[to->task.n_parts++] = part;
}

/* Length of the shortest text that still becomes a slot: there may be so many only. */
static uint32_t shortest_slot(const kvl_generation *asked)
{
    uint32_t least = TEXT_LEAST;
    for (;;) {
        uint32_t n = 0;
        for (uint32_t i = 0; i < asked->n_texts; i++) n += asked->texts[i].n_ids >= least ? 1 : 0;
        if (n <= SLOTS_MAX) return least;
        least += least / 4;
    }
}

static Kvloom__V1__Quality quality_of(const kvl_generation *asked)
{
    switch (asked->quality) {
    case KVL_REUSE_FAST: return KVLOOM__V1__QUALITY__QUALITY_FAST;
    case KVL_REUSE_VERIFIED: return KVLOOM__V1__QUALITY__QUALITY_VERIFIED;
    case KVL_REUSE_HEALED: return KVLOOM__V1__QUALITY__QUALITY_HEALED;
    case KVL_REUSE_EXACT: return KVLOOM__V1__QUALITY__QUALITY_EXACT;
    default: return KVLOOM__V1__QUALITY__QUALITY_BALANCED;
    }
}

static void set_owner(Kvloom__V1__RunTask *task, const kvl_digest *owner, uint64_t salt)
{
    task->salt = salt;
    if (kvl_digest_is_zero(owner)) return;
    task->owner.data = (uint8_t *)(uintptr_t)owner->bytes;
    task->owner.len = sizeof owner->bytes;
}

static void make_task(const kvl_generation *asked, asked_task *to)
{
    const uint32_t least = shortest_slot(asked);
    uint32_t at = 0;
    kvloom__v1__run_task__init(&to->task);
    to->task.parts = to->pointers;
    to->task.mode = KVLOOM__V1__MODE__MODE_REUSE;
    to->task.quality = quality_of(asked);
    to->task.max_tokens = asked->max_tokens;
    set_owner(&to->task, &asked->owner, asked->salt);
    for (uint32_t i = 0; i < asked->n_texts; i++) {
        const kvl_text_run *text = &asked->texts[i];
        if (text->n_ids < least) continue;
        add_part(to, asked, at, text->first, false);
        add_part(to, asked, text->first, text->first + text->n_ids, true);
        at = text->first + text->n_ids;
    }
    add_part(to, asked, at, asked->n_ids, false);
}

/* ---- texts to read ---- */

static void remember_text(run *r, const run_part *part)
{
    host_reads *reads = &r->host->reads;
    for (uint32_t i = 0; i < reads->n; i++)
        if (reads->texts[i].n_ids == part->n_tokens && reads->texts[i].salt == r->salt &&
            memcmp(reads->texts[i].ids, r->ids + part->first, part->n_tokens * sizeof *r->ids) == 0)
            return;
    if (reads->n == KVL_READS_MAX) return; /* it comes again, or nobody misses it */
    host_read made = {.n_ids = part->n_tokens, .salt = r->salt};
    made.ids = kvl_alloc_zero(part->n_tokens, sizeof *made.ids);
    if (made.ids == NULL) return;
    memcpy(made.ids, r->ids + part->first, part->n_tokens * sizeof *made.ids);
    if (r->task->owner.len == sizeof made.owner.bytes)
        memcpy(made.owner.bytes, r->task->owner.data, sizeof made.owner.bytes);
    reads->texts[reads->n++] = made;
}

void host_read_step(kvl_host *host)
{
    host_reads *reads = &host->reads;
    if (reads->n == 0) return;
    host_read text = reads->texts[0];
    reads->n--;
    memmove(reads->texts, reads->texts + 1, reads->n * sizeof *reads->texts);
    asked_task *to = kvl_alloc_zero(1, sizeof *to);
    if (to != NULL) {
        const kvl_generation asked = {.ids = text.ids, .n_ids = text.n_ids};
        Kvloom__V1__RunReply reply = KVLOOM__V1__RUN_REPLY__INIT;
        kvl_error error = {0};
        kvloom__v1__run_task__init(&to->task);
        to->task.parts = to->pointers;
        to->task.mode = KVLOOM__V1__MODE__MODE_READ;
        set_owner(&to->task, &text.owner, text.salt);
        add_part(to, &asked, 0, text.n_ids, true);
        /* A text that cannot be read now is computed again by whoever has it next; logged there. */
        kvl_ignore(host_run_task(host, &to->task, &reply, &error));
        host_reply_deinit(&reply);
    }
    kvl_free(to);
    kvl_free(text.ids);
}

void host_reads_deinit(kvl_host *host)
{
    for (uint32_t i = 0; i < host->reads.n; i++) kvl_free(host->reads.texts[i].ids);
    host->reads.n = 0;
}

/* ---- prompts ---- */

/* Counts what was placed; *n_exact: leading tokens before it. */
static void report_fill(const run *r, kvl_filled *filled, uint32_t *n_exact)
{
    *n_exact = UINT32_MAX;
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const run_part *part = &r->parts[p];
        if (part->step.n_reused == 0) continue;
        if (*n_exact == UINT32_MAX) *n_exact = part->first + part->step.n_shared;
        filled->report.n_placed += part->step.n_reused;
    }
    filled->report.n_recomputed = r->n_recomputed;
    filled->report.is_approximate = filled->report.n_placed > 0;
    filled->n_cached = r->n_shared;
}

static kvl_status fill_prompt(run *r, kvl_filled *filled, kvl_error *error)
{
    uint32_t n_exact = 0;
    KVL_TRY(kvl_session_begin(r->session, r->ids, (uint32_t)r->n_ids, 0, true, r->salt,
                              &r->n_shared, error));
    KVL_TRY(run_resolve(r, false, error));
    KVL_TRY(run_plan(r, error));
    KVL_TRY(run_fill(r, true, error));
    report_fill(r, filled, &n_exact);
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const run_part *part = &r->parts[p];
        if (part->is_slot && part->container == NULL) remember_text(r, part);
    }
    return kvl_sequence_of_session(&filled->sequence, r->host->engine, r->salt, r->session, n_exact,
                                   error);
}

static kvl_status fill(kvl_host *host, const asked_task *to, kvl_filled *filled, kvl_error *error)
{
    heal_make_room(host);
    run *r = kvl_alloc_zero(1, sizeof *r);
    if (r == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a run");
    kvl_status status = run_init(r, host, &to->task, error);
    if (status == KVL_OK) status = fill_prompt(r, filled, error);
    run_deinit(r);
    kvl_free(r);
    if (status != KVL_ERR_BUSY) return status;
    /* No pages beside those that run: it waits for them as every prompt does, and is computed. */
    kvl_log(KVL_LOG_INFO, "prompt_not_placed", "reason=\"no pages\"");
    *filled = (kvl_filled){.report = {.is_fallback = true}};
    return KVL_OK;
}

/* ---- whole answers ---- */

static kvl_status tell(const kvl_host *host, const kvl_generation *asked,
                       const Kvloom__V1__RunReply *reply, const kvl_filled *filled,
                       kvl_error *error)
{
    const kvl_tokenizer *tokenizer = kvl_model_tokenizer(host->engine->model);
    const uint32_t n = (uint32_t)reply->n_tokens;
    /* The detokenizer makes three bytes of one that is no character. */
    const size_t room = 3 * reply->text.len + KVL_DETOKENIZER_OUT_MIN * 2;
    char *text = kvl_alloc(room);
    if (text == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for an answer");
    kvl_detokenizer detokenizer;
    kvl_detokenizer_init(&detokenizer, tokenizer);
    size_t n_text = 0;
    for (uint32_t i = 0; i < n; i++)
        n_text +=
            kvl_detokenizer_push(&detokenizer, reply->tokens[i], text + n_text, room - n_text);
    n_text += kvl_detokenizer_finish(&detokenizer, text + n_text, room - n_text);
    kvl_drawn drawn = {.token = n == 0 ? 0 : reply->tokens[n - 1]};
    const kvl_generation_event event = {
        .drawn = n == 0 ? NULL : &drawn,
        .text = text,
        .n_text_bytes = n_text,
        .finish = reply->ended ? KVL_FINISH_STOP : KVL_FINISH_LENGTH,
        .n_tokens = n,
        .n_cached = filled->n_cached,
        .reuse = filled->report,
        .is_last = true,
    };
    asked->event(asked->context, &event);
    kvl_free(text);
    return KVL_OK;
}

static kvl_status answer(kvl_host *host, const kvl_generation *asked, const asked_task *to,
                         kvl_filled *filled, kvl_error *error)
{
    Kvloom__V1__RunReply reply = KVLOOM__V1__RUN_REPLY__INIT;
    kvl_status status = host_run_task(host, &to->task, &reply, error);
    for (size_t p = 0; status == KVL_OK && p < reply.n_parts; p++) {
        const Kvloom__V1__PartReport *part = reply.parts[p];
        filled->report.n_placed += part->placed + part->offset + part->blended;
        filled->n_cached += part->shared;
    }
    filled->report.n_recomputed = reply.recomputed;
    filled->report.n_corrected = reply.corrected;
    filled->report.is_verified = reply.verified;
    filled->report.is_healing = reply.healing;
    filled->report.is_approximate = !reply.verified;
    filled->is_answered = true;
    if (status == KVL_OK) status = tell(host, asked, &reply, filled, error);
    host_reply_deinit(&reply);
    return status;
}

kvl_status host_fill(void *context, const kvl_generation *asked, kvl_filled *filled,
                     kvl_error *error)
{
    kvl_host *host = context;
    const bool is_whole =
        asked->quality == KVL_REUSE_VERIFIED || asked->quality == KVL_REUSE_HEALED;
    asked_task *to = kvl_alloc_zero(1, sizeof *to);
    if (to == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a run");
    make_task(asked, to);
    const kvl_status status =
        is_whole ? answer(host, asked, to, filled, error) : fill(host, to, filled, error);
    kvl_free(to);
    return status;
}
