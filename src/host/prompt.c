/* host/prompt.c: the parts of a task become ids. Parts are tokenized one by one, so that the ids of
 * a slot's text are the same in every prompt that it stands in. */
#include "base/alloc.h"
#include "host/host_parts.h"

#include <string.h>

static kvl_status append_ids(run *r, const uint32_t *ids, size_t n, kvl_error *error)
{
    const uint32_t n_vocab = r->host->engine->shape->n_vocab;
    for (size_t i = 0; i < n; i++) {
        if (ids[i] >= n_vocab)
            return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                            "token %zu of part %u is %u; ids of this model are below %u", i,
                            r->n_parts, ids[i], n_vocab);
    }
    uint32_t *grown = kvl_realloc(r->ids, (r->n_ids + n) * sizeof *grown);
    if (grown == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a prompt");
    memcpy(grown + r->n_ids, ids, n * sizeof *ids);
    r->ids = grown;
    r->n_ids += n;
    return KVL_OK;
}

static kvl_status add_ids_of_part(run *r, const Kvloom__V1__PromptPart *asked, kvl_error *error)
{
    if (asked->n_tokens > 0) return append_ids(r, asked->tokens, asked->n_tokens, error);
    const bool is_template = asked->slot[0] == '\0';
    return kvl_tokenize(kvl_model_tokenizer(r->host->engine->model), (const char *)asked->text.data,
                        asked->text.len, is_template, &r->ids, &r->n_ids, error);
}

/* An answer carries the context that it was decoded in; other texts are computed behind the run's
 * home, so everybody who has the text has the same id. */
static kvl_status find_home(run *r, run_part *part, kvl_error *error)
{
    const Kvloom__V1__PromptPart *asked = part->asked;
    part->is_canonical = asked->home.len == 0;
    part->home = r->home->id;
    if (!part->is_canonical) {
        if (asked->home.len != KVL_DIGEST_BYTES)
            return KVL_FAIL(error, KVL_ERR_INVALID,
                            "the home of part %u has %zu bytes, must have %u", r->n_parts,
                            asked->home.len, KVL_DIGEST_BYTES);
        memcpy(part->home.bytes, asked->home.data, KVL_DIGEST_BYTES);
    }
    part->id = kvl_segment_id(r->host->tenant_key, &r->host->fingerprint, &part->home,
                              r->ids + part->first, part->n_tokens);
    return KVL_OK;
}

static kvl_status add_part(run *r, const Kvloom__V1__PromptPart *asked, uint32_t *n_slots,
                           kvl_error *error)
{
    run_part *part = &r->parts[r->n_parts];
    *part = (run_part){.asked = asked, .first = (uint32_t)r->n_ids};
    KVL_TRY(add_ids_of_part(r, asked, error));
    if (r->n_ids > r->host->engine->n_positions)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "the prompt has more than the %u tokens of the context",
                        r->host->engine->n_positions);
    part->n_tokens = (uint32_t)r->n_ids - part->first;
    part->is_slot = asked->slot[0] != '\0';
    if (part->is_slot) {
        part->slot = (*n_slots)++;
        KVL_TRY(find_home(r, part, error));
    }
    r->n_parts++;
    return KVL_OK;
}

/* The template is what stays the same from run to run: its name, its text, the order of its slots.
 */
static kvl_digest identify_template(const run *r)
{
    kvl_digester digester;
    kvl_digester_init(&digester, r->host->tenant_key, sizeof r->host->tenant_key);
    const char *const names[] = {"kvloom template", r->task->workflow, r->task->template_name};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        kvl_digester_add(&digester, names[i], strlen(names[i]) + 1);
    kvl_digester_add(&digester, r->host->fingerprint.bytes, KVL_DIGEST_BYTES);
    /* An anchor is KV in context less KV at home: of another home it is another anchor. */
    if (r->home != &r->host->header)
        kvl_digester_add(&digester, r->home->id.bytes, KVL_DIGEST_BYTES);
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const run_part *part = &r->parts[p];
        kvl_digester_add_u64(&digester, part->is_slot ? UINT64_MAX : part->n_tokens);
        if (!part->is_slot)
            kvl_digester_add(&digester, r->ids + part->first, part->n_tokens * sizeof *r->ids);
    }
    return kvl_digester_end(&digester);
}

/* Prompts of no workflow, as of a pipeline that drops retrieved chunks into them, have no templates
 * that come again and so no anchors: their chunks are blended. */
static kvl_status find_policy(run *r, kvl_error *error)
{
    const Kvloom__V1__RunTask *task = r->task;
    r->correction = kvl_correct_find(task->correct[0] == '\0' ? "none" : task->correct);
    if (r->correction == NULL)
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "correct is '%.32s'; it must be none, anchors, mean or probe",
                        task->correct);
    if (task->quality == KVLOOM__V1__QUALITY__QUALITY_EXACT) return KVL_OK;
    if (r->correction->kind == KVL_CORRECT_ANCHORS) {
        if (task->select[0] == '\0' && task->workflow[0] != '\0') return KVL_OK;
        return KVL_FAIL(error, KVL_ERR_INVALID,
                        "correct is 'anchors', which belong to a workflow's templates: give a "
                        "workflow, and no select");
    }
    const bool is_fast = task->quality == KVLOOM__V1__QUALITY__QUALITY_FAST;
    if (task->select[0] == '\0') {
        if (task->workflow[0] == '\0' || r->correction->kind != KVL_CORRECT_NONE)
            r->select = kvl_select_find(is_fast ? "sink8" : "sink8+draft12");
        return KVL_OK;
    }
    r->select = kvl_select_find(task->select);
    if (r->select == NULL)
        return KVL_FAIL(error, KVL_ERR_INVALID, "select is '%.32s', which is no policy",
                        task->select);
    return KVL_OK;
}

/* Ids of segments come from their home's: under another id of the home, and with a tree of its own,
 * an owner finds nothing of anybody else's, and nobody finds anything of his. */
static kvl_status take_owner(run *r, kvl_error *error)
{
    const ProtobufCBinaryData *owner = &r->task->owner;
    if (r->task->salt != 0) r->salt = r->task->salt;
    if (owner->len == 0) return KVL_OK;
    if (owner->len != KVL_DIGEST_BYTES)
        return KVL_FAIL(error, KVL_ERR_INVALID, "the owner has %zu bytes, must have %u", owner->len,
                        KVL_DIGEST_BYTES);
    kvl_digester digester;
    kvl_digester_init(&digester, r->host->tenant_key, sizeof r->host->tenant_key);
    kvl_digester_add(&digester, "kvloom owner", sizeof "kvloom owner");
    kvl_digester_add(&digester, owner->data, owner->len);
    kvl_digester_add(&digester, r->home->id.bytes, sizeof r->home->id.bytes);
    r->owned = *r->home;
    r->owned.id = kvl_digester_end(&digester);
    r->home = &r->owned;
    return KVL_OK;
}

kvl_status run_init(run *r, kvl_host *host, const Kvloom__V1__RunTask *task, kvl_error *error)
{
    *r = (run){.host = host, .task = task, .start_ns = kvl_clock_now(host->clock)};
    r->salt = kvl_checksum(host->tenant_key, sizeof host->tenant_key);
    if (task->n_parts == 0 || task->n_parts > KVL_PARTS_MAX)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "a prompt has 1 to %u parts, this one %zu",
                        KVL_PARTS_MAX, task->n_parts);
    if (strlen(task->workflow) > 64 || strlen(task->template_name) > 64)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "workflow and template_name have at most 64 bytes");
    if (task->refresh > KVL_REFRESH_MAX)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "refresh is %u; it must be 0 to %u",
                        task->refresh, KVL_REFRESH_MAX);
    KVL_TRY(find_policy(r, error));
    KVL_TRY(run_find_scope(r, error));
    KVL_TRY(host_home_find(host, task, &r->home, error));
    KVL_TRY(take_owner(r, error));
    uint32_t n_slots = 0;
    for (size_t p = 0; p < task->n_parts; p++)
        KVL_TRY(add_part(r, task->parts[p], &n_slots, error));
    if (r->n_ids == 0) return KVL_FAIL(error, KVL_ERR_INVALID, "the prompt has no tokens");
    r->template_id = identify_template(r);
    r->positions = kvl_alloc_zero(r->n_ids, sizeof *r->positions);
    r->anchors = kvl_alloc_zero(KVL_PARTS_MAX, sizeof *r->anchors);
    const bool refreshes = task->refresh > 0 && task->mode == KVLOOM__V1__MODE__MODE_REUSE;
    if (refreshes) r->scores = kvl_alloc_zero(2 * r->n_ids, sizeof *r->scores);
    if (r->positions == NULL || r->anchors == NULL || (refreshes && r->scores == NULL))
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a run");
    return kvl_session_create(host->engine, &r->session, error);
}

void run_deinit(run *r)
{
    /* A run that failed may still be loading out of its containers. */
    if (r->session != NULL) kvl_session_load_end(r->session, NULL);
    for (uint32_t p = 0; p < r->n_parts; p++) kvl_container_release(r->parts[p].container);
    for (uint32_t p = 0; p < r->n_whole; p++) kvl_container_release(r->whole[p].container);
    kvl_session_destroy(r->session);
    run_probe_end(r);
    kvl_free(r->deviation);
    kvl_free(r->ids);
    kvl_free(r->positions);
    kvl_free(r->anchors);
    kvl_free(r->sent.tokens);
    kvl_free(r->sent_logits);
    kvl_free(r->load_times);
    kvl_free(r->scores);
    kvl_free(r->again);
    kvl_refresh_deinit(&r->refresh);
}
