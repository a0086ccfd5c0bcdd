/* host/run.c: one run task from end to end.
 *
 * MODE_FULL prefills everything and keeps the answer's distributions as the reference. MODE_REUSE
 * resolves, plans, fills, decodes and publishes; then, outside the time to first token, compares
 * with the reference and measures anchors where none covered a slot. MODE_PLAN stops before the
 * work begins. MODE_READ has slots' KV at home and nothing else. */
#include "base/alloc.h"
#include "base/log.h"
#include "host/decode.h"
#include "host/host_parts.h"

#include <stdlib.h>
#include <string.h>

/* Anchors for this slot would have a chance: only then is it worth having its KV at home before the
 * first token. */
static bool anchors_may_cover(const run *r)
{
    const uint32_t n_least = kvl_anchor_default_options().n_anchors_min;
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const run_part *part = &r->parts[p];
        const kvl_anchor_slot slot = {r->template_id, part->slot};
        if (part->is_slot && part->n_tokens > 0 &&
            kvl_anchor_pool_n_anchors(r->host->anchors, &slot, part->n_tokens) < n_least)
            return false;
    }
    return true;
}

static bool keep_reference(void *context, uint32_t token, const float *logits)
{
    kvl_host *host = ((run *)context)->host;
    (void)token;
    reference_add(&host->reference, host->engine->shape->n_vocab, logits);
    return false;
}

/* Tokens of an answer that may still be corrected are not told before that. */
static bool streams(const run *r)
{
    return r->host->stream != NULL && !r->task->gate &&
           r->task->quality != KVLOOM__V1__QUALITY__QUALITY_VERIFIED;
}

/* Tells the program that has this host of its own. */
static void pass_on(const kvl_host *host, uint32_t token)
{
    const kvl_tokenizer *tokenizer = kvl_model_tokenizer(host->engine->model);
    if (kvl_tokenizer_is_end(tokenizer, token)) return;
    size_t n_bytes = 0;
    const char *bytes = kvl_token_bytes(tokenizer, token, false, &n_bytes);
    host->stream(host->stream_context, bytes, n_bytes);
}

static bool watch(void *context, uint32_t token, const float *logits)
{
    run *r = context;
    run_watch(r, logits);
    if (streams(r)) pass_on(r->host, token);
    return false;
}

static kvl_status decode(run *r, bool is_full, kvl_error *error)
{
    kvl_host *host = r->host;
    const kvl_decode_options options = {
        .max_tokens = r->task->max_tokens,
        .guess = r->draft,
        .n_guess = is_full ? 0 : r->n_draft,
        .keep_last = !is_full,
        .drawn = is_full ? keep_reference : watch,
        .context = r,
    };
    r->first_token_ns = kvl_clock_now(host->clock);
    KVL_TRY(kvl_decode(r->session, host->engine, &options, host->logits, &r->n_answer, &r->ended,
                       &r->n_draft_kept, error));
    r->end_ns = kvl_clock_now(host->clock);
    const kvl_digest nothing = {{0}};
    r->answer_home =
        kvl_segment_id(host->tenant_key, &host->fingerprint, &nothing, r->ids, r->n_ids);
    return KVL_OK;
}

static kvl_status run_full(run *r, kvl_error *error)
{
    kvl_host *host = r->host;
    const uint32_t n = (uint32_t)r->n_ids;
    KVL_TRY(kvl_session_begin(r->session, r->ids, n, r->task->max_tokens, false, r->salt,
                              &r->n_shared, error));
    KVL_TRY(reference_begin(&host->reference, r, error));
    const int64_t start = kvl_clock_now(host->clock);
    KVL_TRY(kvl_session_compute_range(r->session, 0, n, 1, host->logits, error));
    r->compute_ns = kvl_clock_now(host->clock) - start;
    r->is_exact = true;
    for (uint32_t p = 0; p < r->n_parts; p++)
        r->parts[p].step = (kvl_plan_step){.action = KVL_ACTION_COMPUTE,
                                           .n_computed = r->parts[p].n_tokens,
                                           .reason = "full prefill was asked for"};
    KVL_TRY(decode(r, true, error));
    memcpy(host->reference.tokens, kvl_session_tokens(r->session) + n,
           r->n_answer * sizeof *r->ids);
    host->reference.n_tokens = r->n_answer;
    return KVL_OK;
}

/* Everything up to the first token that is not exact may be shared by later prompts. */
static kvl_status keep_exact_prefix(run *r, kvl_error *error)
{
    uint32_t n_exact = 0;
    if (r->is_verified)
        return kvl_session_keep_prefix(r->session, r->salt, (uint32_t)r->n_ids, error);
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const kvl_plan_step *step = &r->parts[p].step;
        if (step->n_reused > 0) {
            n_exact += step->n_shared;
            break;
        }
        n_exact += r->parts[p].n_tokens;
    }
    return kvl_session_keep_prefix(r->session, r->salt, n_exact, error);
}

static kvl_status publish_answer(run *r, kvl_error *error)
{
    if (r->n_answer == 0) return KVL_OK;
    const bool is_exact = r->is_exact || r->is_verified;
    const host_publication what = {
        .first = (uint32_t)r->n_ids,
        .n = r->n_answer,
        .home = is_exact ? r->answer_home : heal_unhealed_home(r->host, &r->answer_home),
        .is_unhealed = !is_exact,
    };
    kvl_container *container = NULL;
    KVL_TRY(host_publish(r->host, r->session, &what, &container, error));
    kvl_container_release(container);
    return KVL_OK;
}

kvl_status run_copy_sent(const run *r, kvl_sent_answer *sent, kvl_error *error)
{
    const size_t n = r->n_ids + r->n_answer;
    sent->tokens = kvl_alloc_zero(n, sizeof *sent->tokens);
    if (sent->tokens == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to check %u tokens", r->n_answer);
    memcpy(sent->tokens, kvl_session_tokens(r->session), n * sizeof *sent->tokens);
    sent->n_prompt = (uint32_t)r->n_ids;
    sent->n_answer = r->n_answer;
    sent->ended = r->ended;
    sent->salt = r->salt;
    return KVL_OK;
}

/* The answer as it was decoded, for whoever looks at it again. */
static kvl_status keep_sent(run *r, kvl_error *error)
{
    const bool heals = r->task->quality == KVLOOM__V1__QUALITY__QUALITY_HEALED;
    if (r->is_exact || (!heals && !r->task->gate && r->sent_logits == NULL)) return KVL_OK;
    return run_copy_sent(r, &r->sent, error);
}

static void count_wrong_tokens(run *r)
{
    const reference *kept = &r->host->reference;
    const uint32_t *tokens = kvl_session_tokens(r->session) + r->n_ids;
    const uint32_t n_both = r->n_answer < kept->n_tokens ? r->n_answer : kept->n_tokens;
    r->n_wrong = r->n_answer + kept->n_tokens - 2 * n_both;
    for (uint32_t i = 0; i < n_both; i++) r->n_wrong += tokens[i] != kept->tokens[i];
}

/* Compares with the reference; where asked, also without anchors, everything else the same. */
static kvl_status evaluate(run *r, kvl_error *error)
{
    kvl_host *host = r->host;
    if (r->is_exact || r->is_verified) count_wrong_tokens(r);
    KVL_TRY(run_evaluate(r, &r->evaluation, error));
    r->has_evaluation = true;
    if (!r->task->place_only || r->is_exact || r->is_verified) return KVL_OK;
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const run_part *part = &r->parts[p];
        if (part->step.n_reused > 0)
            KVL_TRY(kv_buffer_load(&host->bases[part->slot], host->engine, part->container, error));
    }
    KVL_TRY(run_fill(r, false, error));
    KVL_TRY(run_evaluate(r, &r->place_only, error));
    r->has_place_only = true;
    return KVL_OK;
}

static bool wants_anchors(const run *r)
{
    if (!r->is_exact || r->task->quality == KVLOOM__V1__QUALITY__QUALITY_EXACT) return false;
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const run_part *part = &r->parts[p];
        if (part->is_slot && part->n_tokens > 0 && part->match.verdict != KVL_ANCHOR_EXACT)
            return true;
    }
    return false;
}

static void fill_part(const run *r, const run_part *part, Kvloom__V1__PartReport *report)
{
    (void)r;
    kvloom__v1__part_report__init(report);
    report->slot = part->asked->slot;
    report->n_tokens = part->n_tokens;
    report->shared = part->step.n_shared;
    const uint32_t n_reused = part->step.n_reused;
    report->placed = part->step.action == KVL_ACTION_PLACE ? n_reused : 0;
    report->offset = part->step.action == KVL_ACTION_OFFSET ? n_reused : 0;
    report->blended = part->step.action == KVL_ACTION_BLEND ? n_reused : 0;
    report->computed = part->n_tokens - part->step.n_shared - n_reused;
    report->fetched_bytes = part->fetched_bytes;
    report->from = (char *)(uintptr_t)part->from;
    report->unhealed = part->is_unhealed;
    report->cost_ms = part->step.cost_ms;
    report->compute_ms = part->step.compute_ms;
    report->error = part->step.error;
    report->n_anchors = part->match.n_anchors;
    report->distance = part->match.distance;
    const char *reason = part->step.reason == NULL ? "" : part->step.reason;
    if (part->is_aligned) reason = "these tokens stand in another text that was read";
    if (part->is_donor) reason = "its KV stood in an earlier exact prompt of this workflow";
    report->donor = part->is_donor;
    if (part->is_missing) reason = "its segment was not to be had: computed";
    report->reason = (char *)(uintptr_t)reason;
}

static kvl_status copy_token_bytes(const run *r, const run_part *part,
                                   Kvloom__V1__PartReport *report, kvl_error *error)
{
    const kvl_tokenizer *tokenizer = kvl_model_tokenizer(r->host->engine->model);
    if (part->n_tokens == 0) return KVL_OK;
    report->token_bytes = kvl_alloc_zero(part->n_tokens, sizeof *report->token_bytes);
    if (report->token_bytes == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a reply");
    for (uint32_t t = 0; t < part->n_tokens; t++) {
        size_t n_bytes = 0;
        (void)kvl_token_bytes(tokenizer, r->ids[part->first + t], true, &n_bytes);
        report->token_bytes[t] = (uint32_t)n_bytes;
    }
    report->n_token_bytes = part->n_tokens;
    return KVL_OK;
}

static kvl_status copy_digest(const kvl_digest *from, ProtobufCBinaryData *to, kvl_error *error)
{
    to->data = kvl_alloc(KVL_DIGEST_BYTES);
    if (to->data == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a reply");
    memcpy(to->data, from->bytes, KVL_DIGEST_BYTES);
    to->len = KVL_DIGEST_BYTES;
    return KVL_OK;
}

/* A donor says nothing of the text's KV at home. */
static bool has_kv_at_home(const run *r, const run_part *part)
{
    if (part->container == NULL || part->is_aligned) return false;
    return !part->is_donor || r->host->store->ops->has(r->host->store, &part->id);
}

/* Copies what the reply needs: the run is gone when it is packed. */
static kvl_status copy_parts(const run *r, Kvloom__V1__RunReply *reply, kvl_error *error)
{
    reply->parts = kvl_alloc_zero(r->n_parts, sizeof *reply->parts);
    if (reply->parts == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a reply");
    for (uint32_t p = 0; p < r->n_parts; p++) {
        Kvloom__V1__PartReport *report = kvl_alloc_zero(1, sizeof *report);
        if (report == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a reply");
        reply->parts[reply->n_parts++] = report;
        fill_part(r, &r->parts[p], report);
        report->from = kvl_strdup(r->parts[p].from);
        if (report->from == NULL)
            return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a reply");
        KVL_TRY(copy_token_bytes(r, &r->parts[p], report, error));
        if (has_kv_at_home(r, &r->parts[p]))
            KVL_TRY(copy_digest(&r->parts[p].id, &report->segment, error));
        reply->fetched_bytes += report->fetched_bytes;
    }
    return KVL_OK;
}

static kvl_status copy_answer(const run *r, Kvloom__V1__RunReply *reply, kvl_error *error)
{
    const kvl_tokenizer *tokenizer = kvl_model_tokenizer(r->host->engine->model);
    const uint32_t *tokens = kvl_session_tokens(r->session) + r->n_ids;
    size_t n_text = 0;
    for (uint32_t i = 0; i < r->n_answer; i++) {
        size_t n_bytes = 0;
        (void)kvl_token_bytes(tokenizer, tokens[i], false, &n_bytes);
        n_text += n_bytes;
    }
    reply->tokens = kvl_alloc_zero(r->n_answer + 1, sizeof *reply->tokens);
    reply->text.data = kvl_alloc_zero(n_text + 1, 1);
    reply->home.data = kvl_alloc(KVL_DIGEST_BYTES);
    if (reply->tokens == NULL || reply->text.data == NULL || reply->home.data == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a reply");
    reply->n_tokens = r->n_answer;
    memcpy(reply->tokens, tokens, r->n_answer * sizeof *tokens);
    for (uint32_t i = 0; i < r->n_answer; i++) {
        size_t n_bytes = 0;
        const char *bytes = kvl_token_bytes(tokenizer, tokens[i], false, &n_bytes);
        memcpy(reply->text.data + reply->text.len, bytes, n_bytes);
        reply->text.len += n_bytes;
    }
    memcpy(reply->home.data, r->answer_home.bytes, KVL_DIGEST_BYTES);
    reply->home.len = KVL_DIGEST_BYTES;
    return KVL_OK;
}

static kvl_status copy_anchors(const run *r, Kvloom__V1__RunReply *reply, kvl_error *error)
{
    if (r->n_anchors == 0) return KVL_OK;
    reply->anchors = kvl_alloc_zero(r->n_anchors, sizeof *reply->anchors);
    if (reply->anchors == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a reply");
    for (uint32_t i = 0; i < r->n_anchors; i++) {
        uint8_t *copy = kvl_alloc(KVL_DIGEST_BYTES);
        if (copy == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a reply");
        memcpy(copy, r->anchors[i].bytes, KVL_DIGEST_BYTES);
        reply->anchors[reply->n_anchors++] = (ProtobufCBinaryData){KVL_DIGEST_BYTES, copy};
    }
    return KVL_OK;
}

static kvl_status copy_timeline(const run *r, Kvloom__V1__RunReply *reply, kvl_error *error)
{
    const uint32_t n = r->host->engine->shape->n_layers;
    if (r->load_times == NULL) return KVL_OK;
    reply->layer_loaded_ms = kvl_alloc_zero(n, sizeof *reply->layer_loaded_ms);
    reply->layer_computed_ms = kvl_alloc_zero(n, sizeof *reply->layer_computed_ms);
    if (reply->layer_loaded_ms == NULL || reply->layer_computed_ms == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a reply");
    for (uint32_t l = 0; l < n; l++) {
        reply->layer_loaded_ms[l] = kvl_ns_to_ms(r->load_times->loaded_ns[l]);
        reply->layer_computed_ms[l] = kvl_ns_to_ms(r->load_times->computed_ns[l]);
    }
    reply->n_layer_loaded_ms = n;
    reply->n_layer_computed_ms = n;
    return KVL_OK;
}

static kvl_status copy_evaluation(const Kvloom__V1__Evaluation *from, Kvloom__V1__Evaluation **to,
                                  kvl_error *error)
{
    *to = kvl_alloc_zero(1, sizeof **to);
    if (*to == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a reply");
    kvloom__v1__evaluation__init(*to);
    (*to)->n_positions = from->n_positions;
    (*to)->kl = from->kl;
    (*to)->top1_agreement = from->top1_agreement;
    return KVL_OK;
}

static kvl_status fill_reply(const run *r, Kvloom__V1__RunReply *reply, kvl_error *error)
{
    reply->prompt_tokens = (uint32_t)r->n_ids;
    reply->ttft_ms = kvl_ns_to_ms(r->first_token_ns - r->start_ns);
    reply->total_ms = kvl_ns_to_ms(r->end_ns - r->start_ns);
    reply->fetch_ms = kvl_ns_to_ms(r->fetch_ns);
    reply->correct_ms = kvl_ns_to_ms(r->correct_ns);
    reply->place_ms = kvl_ns_to_ms(r->place_ns);
    reply->compute_ms = kvl_ns_to_ms(r->compute_ns);
    reply->select_ms = kvl_ns_to_ms(r->select_ns);
    reply->verify_ms = kvl_ns_to_ms(r->verify_ns);
    reply->wait_ms = kvl_ns_to_ms(r->wait_ns);
    reply->recomputed = r->n_recomputed;
    reply->corrected = r->n_corrected;
    reply->drafted = r->n_draft;
    reply->draft_kept = r->n_draft_kept;
    reply->verified = r->is_verified || r->is_exact;
    reply->exact = r->is_exact;
    reply->healing = r->is_healing;
    reply->expected_error = r->expected_error;
    reply->gated = r->is_gated;
    reply->gate_score = r->gate_score;
    reply->gate_bar = r->gate_bar;
    reply->healed_first = r->is_healed_first;
    reply->gate_ms = kvl_ns_to_ms(r->gate_ns);
    reply->read = r->n_read;
    reply->ended = r->ended;
    reply->wrong_tokens = r->n_wrong;
    reply->donors_kept = r->n_donors_kept;
    reply->shifted = r->n_shifted;
    KVL_TRY(copy_digest(&r->home->id, &reply->slots_home, error));
    KVL_TRY(copy_parts(r, reply, error));
    KVL_TRY(copy_anchors(r, reply, error));
    KVL_TRY(copy_timeline(r, reply, error));
    if (r->has_evaluation) KVL_TRY(copy_evaluation(&r->evaluation, &reply->evaluation, error));
    if (r->has_place_only) KVL_TRY(copy_evaluation(&r->place_only, &reply->place_only, error));
    return KVL_OK;
}

static kvl_status run_reuse(run *r, Kvloom__V1__RunReply *reply, kvl_error *error)
{
    const bool may_reuse = r->task->quality != KVLOOM__V1__QUALITY__QUALITY_EXACT;
    KVL_TRY(kvl_session_begin(r->session, r->ids, (uint32_t)r->n_ids, r->task->max_tokens, true,
                              r->salt, &r->n_shared, error));
    const bool early =
        may_reuse && (r->select != NULL || r->task->quality == KVLOOM__V1__QUALITY__QUALITY_FAST ||
                      anchors_may_cover(r));
    if (early) KVL_TRY(run_resolve(r, false, error));
    if (early && r->task->align && run_loads_beside(r)) KVL_TRY(run_align(r, error));
    KVL_TRY(run_plan(r, error));
    KVL_TRY(run_fill(r, true, error));
    run_begin_audit(r);
    KVL_TRY(decode(r, false, error));
    KVL_TRY(keep_sent(r, error));
    /* From here on nothing is in the time to first token, nor in the answer's. What was spent on
     * the way to it is kept, and the answer copied before the comparison overwrites it. */
    const int64_t spent[] = {r->fetch_ns, r->correct_ns, r->place_ns, r->select_ns, r->compute_ns};
    const uint32_t n_recomputed = r->n_recomputed;
    const uint32_t n_shifted = r->n_shifted;
    KVL_TRY(run_gate(r, error));
    if (r->task->quality == KVLOOM__V1__QUALITY__QUALITY_VERIFIED && !r->is_exact)
        KVL_TRY(run_verify(r, error));
    KVL_TRY(keep_exact_prefix(r, error));
    KVL_TRY(publish_answer(r, error));
    KVL_TRY(copy_answer(r, reply, error));
    run_check_later(r);
    if (r->task->evaluate) KVL_TRY(evaluate(r, error));
    /* A text that nobody has read yet is computed where it stands, which is exact and takes no
     * longer than computing it behind the header; the latter is done now, for those who read it
     * next. */
    if (may_reuse) KVL_TRY(run_resolve(r, true, error));
    if (wants_anchors(r)) KVL_TRY(run_measure_anchors(r, error));
    if (r->is_exact || r->is_verified) {
        exact_lesson lesson;
        run_make_lesson(r, &lesson);
        r->n_donors_kept = donors_learn(r->host, r->session, &lesson);
    }
    r->fetch_ns = spent[0];
    r->correct_ns = spent[1];
    r->place_ns = spent[2];
    r->select_ns = spent[3];
    r->compute_ns = spent[4];
    r->n_recomputed = n_recomputed;
    r->n_shifted = n_shifted;
    return KVL_OK;
}

/* Only what later runs will place: no session of its own, no answer. */
static kvl_status run_read(run *r, kvl_error *error)
{
    KVL_TRY(run_resolve(r, true, error));
    r->first_token_ns = r->start_ns;
    r->end_ns = kvl_clock_now(r->host->clock);
    return KVL_OK;
}

/* What run_reuse would do: nothing is computed, so the reply has no answer. */
static kvl_status run_explain(run *r, kvl_error *error)
{
    KVL_TRY(kvl_session_begin(r->session, r->ids, (uint32_t)r->n_ids, 0, true, r->salt,
                              &r->n_shared, error));
    if (r->task->quality != KVLOOM__V1__QUALITY__QUALITY_EXACT)
        KVL_TRY(run_resolve(r, false, error));
    if (r->task->align && run_loads_beside(r)) KVL_TRY(run_align(r, error));
    KVL_TRY(run_plan(r, error));
    r->first_token_ns = r->start_ns;
    r->end_ns = kvl_clock_now(r->host->clock);
    return KVL_OK;
}

kvl_status host_run_task(kvl_host *host, const Kvloom__V1__RunTask *task,
                         Kvloom__V1__RunReply *reply, kvl_error *error)
{
    const bool is_plan = task->mode == KVLOOM__V1__MODE__MODE_PLAN;
    const bool is_read = task->mode == KVLOOM__V1__MODE__MODE_READ;
    if (!is_plan && !is_read &&
        (task->max_tokens == 0 || task->max_tokens > host->engine->n_positions))
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "max_tokens is %u; it must be 1 to %u",
                        task->max_tokens, host->engine->n_positions);
    heal_make_room(host);
    run *r = kvl_alloc_zero(1, sizeof *r);
    if (r == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a run");
    kvl_status status = run_init(r, host, task, error);
    if (status == KVL_OK && task->mode == KVLOOM__V1__MODE__MODE_FULL) {
        status = run_full(r, error);
        if (status == KVL_OK) status = copy_answer(r, reply, error);
    } else if (status == KVL_OK && is_read) {
        status = run_read(r, error);
    } else if (status == KVL_OK) {
        status = is_plan ? run_explain(r, error) : run_reuse(r, reply, error);
    }
    if (status == KVL_OK) status = fill_reply(r, reply, error);
    if (status != KVL_OK)
        kvl_log(KVL_LOG_WARN, "run_failed", "status=%s text=\"%s\"", kvl_status_name(status),
                error->text);
    run_deinit(r);
    kvl_free(r);
    return status;
}

void host_reply_deinit(Kvloom__V1__RunReply *reply)
{
    for (size_t p = 0; p < reply->n_parts; p++) {
        kvl_free(reply->parts[p]->from);
        kvl_free(reply->parts[p]->token_bytes);
        kvl_free(reply->parts[p]->segment.data);
        kvl_free(reply->parts[p]);
    }
    for (size_t i = 0; i < reply->n_anchors; i++) kvl_free(reply->anchors[i].data);
    kvl_free(reply->parts);
    kvl_free(reply->anchors);
    kvl_free(reply->tokens);
    kvl_free(reply->text.data);
    kvl_free(reply->home.data);
    kvl_free(reply->slots_home.data);
    kvl_free(reply->layer_loaded_ms);
    kvl_free(reply->layer_computed_ms);
    kvl_free(reply->evaluation);
    kvl_free(reply->place_only);
}
