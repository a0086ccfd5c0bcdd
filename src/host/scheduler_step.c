/* host/scheduler_step.c: one batch: who computes how much, the forward pass, a token for each. */
#include "base/log.h"
#include "host/scheduler_parts.h"

static uint32_t n_pending(const kvl_branch *branch)
{
    return branch->sequence.n_ids - branch->sequence.n_computed;
}

/* ---- choosing ---- */

/* Branches that decode come first and always; each has one row. Making room may pause those behind,
 * so the array is walked by its length of the moment. */
static uint32_t choose_decoding(kvl_scheduler *scheduler)
{
    uint32_t n_rows = 0;
    for (uint32_t i = 0; i < scheduler->n_running; i++) {
        kvl_branch *branch = scheduler->running[i];
        if (n_pending(branch) != 1 || kvl_scheduler_stands_still(scheduler, branch)) continue;
        if (!kvl_scheduler_make_room(scheduler, branch, branch->sequence.n_ids)) continue;
        branch->n_rows = 1;
        n_rows++;
    }
    return n_rows;
}

/* Whether a prompt that is computed in this very step begins as this one does, further than what
 * this one has: the next step will find it in the tree. */
static bool waits_for_prefix(const kvl_scheduler *scheduler, const kvl_branch *branch)
{
    const kvl_sequence *own = &branch->sequence;
    for (uint32_t i = 0; scheduler->running[i] != branch; i++) {
        const kvl_branch *other = scheduler->running[i];
        if (other->n_rows == 0 || n_pending(other) == 1) continue;
        uint32_t n_common = kvl_sequence_n_common(own, &other->sequence);
        if (n_common > own->n_ids - 1) n_common = own->n_ids - 1;
        if (n_common / KVL_PAGE_TOKENS * KVL_PAGE_TOKENS > own->n_computed) return true;
    }
    return false;
}

static void choose_prefill(kvl_scheduler *scheduler, uint32_t n_budget)
{
    for (uint32_t i = 0; i < scheduler->n_running && n_budget > 0; i++) {
        kvl_branch *branch = scheduler->running[i];
        if (branch->n_rows > 0 || n_pending(branch) == 1) continue;
        if (kvl_scheduler_stands_still(scheduler, branch)) continue;
        kvl_scheduler_adopt(scheduler, branch);
        if (waits_for_prefix(scheduler, branch)) continue;
        const uint32_t n = n_pending(branch) < n_budget ? n_pending(branch) : n_budget;
        if (!kvl_scheduler_make_room(scheduler, branch, branch->sequence.n_computed + n)) continue;
        branch->n_rows = n;
        n_budget -= n;
    }
}

static void choose(kvl_scheduler *scheduler)
{
    for (uint32_t i = 0; i < scheduler->n_running; i++) {
        scheduler->running[i]->n_rows = 0;
        scheduler->running[i]->has_logits = false;
    }
    const uint32_t n_decoding = choose_decoding(scheduler);
    /* Nobody waits for a token of a step that only reads prompts: it may be as long as it is fast.
     */
    const uint32_t n_rows_max =
        n_decoding > 0 ? scheduler->options.n_step_rows : KVL_FORWARD_ROWS_MAX;
    choose_prefill(scheduler, n_rows_max - n_decoding);
}

/* ---- computing ---- */

static void collect_batch(kvl_scheduler *scheduler)
{
    scheduler->n_batch = 0;
    for (uint32_t i = 0; i < scheduler->n_running; i++)
        if (scheduler->running[i]->n_rows > 0)
            scheduler->batch[scheduler->n_batch++] = scheduler->running[i];
}

static kvl_status compute(kvl_scheduler *scheduler, kvl_error *error)
{
    uint32_t n_rows = 0;
    uint32_t n_logits = 0;
    for (uint32_t i = 0; i < scheduler->n_batch; i++) {
        kvl_branch *branch = scheduler->batch[i];
        const kvl_sequence *sequence = &branch->sequence;
        const uint32_t past = sequence->n_computed + branch->n_rows;
        scheduler->paths[i] = (kvl_attention_path){sequence->pages, past};
        for (uint32_t p = sequence->n_computed; p < past; p++)
            scheduler->rows[n_rows++] = (kvl_forward_row){sequence->ids[p], i, p};
        branch->has_logits = past == sequence->n_ids;
        if (!branch->has_logits) continue;
        branch->logit_at = n_logits;
        scheduler->logit_rows[n_logits++] = n_rows - 1;
    }
    const kvl_forward_batch batch = {.rows = scheduler->rows,
                                     .n_rows = n_rows,
                                     .paths = scheduler->paths,
                                     .n_paths = scheduler->n_batch,
                                     .logit_rows = scheduler->logit_rows,
                                     .n_logit_rows = n_logits,
                                     .logits = scheduler->logits};
    scheduler->stats.n_steps++;
    scheduler->stats.n_computed_rows += n_rows;
    return kvl_forward_run(scheduler->engine->forward, &batch, error);
}

static void draw_item(void *context, size_t item, size_t thread)
{
    kvl_scheduler *scheduler = context;
    kvl_branch *branch = scheduler->batch[item];
    if (!branch->has_logits) return;
    const kvl_sampled_text text = {branch->sequence.ids, branch->sequence.n_ids, branch->n_prompt};
    const size_t n_vocab = scheduler->engine->shape->n_vocab;
    kvl_sampler_draw(scheduler->sampler, thread, &branch->request->asked.sampling, &text,
                     scheduler->logits + branch->logit_at * n_vocab, &branch->random,
                     &branch->drawn);
}

/* ---- what came of it ---- */

/* The other branches of a request begin where its prompt ends, with the last token still to
 * compute: its logits are what each draws its own first token from. */
static void fork_request(kvl_scheduler *scheduler, kvl_branch *first)
{
    kvl_request *request = first->request;
    request->is_forked = true;
    for (uint32_t b = request->asked.n_branches; b-- > 1;) {
        kvl_error error = {0};
        kvl_sequence sequence;
        kvl_branch *branch = NULL;
        kvl_status status = kvl_sequence_fork(&first->sequence, first->n_prompt, &sequence, &error);
        if (status == KVL_OK) {
            kvl_sequence_forget(&sequence, first->n_prompt - 1);
            status = kvl_branch_create(request, b, first->n_prompt, &sequence, &branch, &error);
        }
        if (status == KVL_OK) {
            kvl_scheduler_wait_first(scheduler, branch);
            continue;
        }
        request->n_open--;
        scheduler->stats.n_failed++;
        const kvl_generation_event event = {
            .branch = b, .text = "", .finish = KVL_FINISH_FAILED, .error = &error};
        request->asked.event(request->asked.context, &event);
    }
}

static kvl_finish finish_of(const kvl_scheduler *scheduler, const kvl_branch *branch)
{
    const kvl_generation *asked = &branch->request->asked;
    const kvl_tokenizer *tokenizer = kvl_model_tokenizer(scheduler->engine->model);
    if (!asked->ignore_end && kvl_tokenizer_is_end(tokenizer, branch->drawn.token))
        return KVL_FINISH_STOP;
    const uint32_t n_tokens = branch->sequence.n_ids + 1 - branch->n_prompt;
    return n_tokens >= asked->max_tokens ? KVL_FINISH_LENGTH : KVL_FINISH_NONE;
}

static void answer(kvl_scheduler *scheduler, kvl_branch *branch)
{
    kvl_error error = {0};
    const char *text = "";
    size_t n_bytes = 0;
    if (branch->index == 0 && !branch->request->is_forked) fork_request(scheduler, branch);
    const kvl_finish finish = finish_of(scheduler, branch);
    kvl_status status = KVL_OK;
    bool stopped = false;
    if (finish != KVL_FINISH_STOP) {
        status = kvl_sequence_append(&branch->sequence, branch->drawn.token, &error);
        if (status == KVL_OK)
            stopped =
                kvl_branch_push_text(branch, branch->drawn.token, false, &text, &n_bytes, &status);
        scheduler->stats.n_answer_tokens++;
    }
    if (status != KVL_OK) {
        kvl_ignore(KVL_FAIL(&error, status, "no memory for an answer"));
        kvl_scheduler_tell(scheduler, branch, NULL, "", 0, KVL_FINISH_FAILED, &error);
        return;
    }
    if (stopped || finish == KVL_FINISH_NONE) {
        kvl_scheduler_tell(scheduler, branch, &branch->drawn, text, n_bytes,
                           stopped ? KVL_FINISH_STOP : KVL_FINISH_NONE, NULL);
        return;
    }
    kvl_scheduler_tell(scheduler, branch, &branch->drawn, text, n_bytes, KVL_FINISH_NONE, NULL);
    stopped = kvl_branch_push_text(branch, 0, true, &text, &n_bytes, &status);
    kvl_scheduler_tell(scheduler, branch, NULL, text, n_bytes, stopped ? KVL_FINISH_STOP : finish,
                       NULL);
}

static void fail_batch(kvl_scheduler *scheduler, const kvl_error *error)
{
    kvl_log(KVL_LOG_ERROR, "step_failed", "status=%s text=\"%s\"", kvl_status_name(error->status),
            error->text);
    for (uint32_t i = 0; i < scheduler->n_batch; i++)
        kvl_scheduler_end(scheduler, scheduler->batch[i], KVL_FINISH_FAILED, error);
}

static void take_results(kvl_scheduler *scheduler)
{
    for (uint32_t i = 0; i < scheduler->n_batch; i++) {
        kvl_branch *branch = scheduler->batch[i];
        const bool is_prompt = branch->n_rows > 1 || branch->sequence.n_ids == branch->n_prompt;
        kvl_sequence_advance(&branch->sequence, branch->sequence.n_computed + branch->n_rows);
        kvl_error error;
        /* At once, so that whoever begins alike finds it in the next step. */
        if (is_prompt) kvl_ignore(kvl_sequence_keep(&branch->sequence, &error));
    }
    kvl_pool_run(scheduler->engine->threads, draw_item, scheduler, scheduler->n_batch);
    for (uint32_t i = 0; i < scheduler->n_batch; i++)
        if (scheduler->batch[i]->has_logits) answer(scheduler, scheduler->batch[i]);
}

bool kvl_scheduler_step(kvl_scheduler *scheduler)
{
    kvl_scheduler_end_cancelled(scheduler);
    kvl_scheduler_admit(scheduler);
    choose(scheduler);
    collect_batch(scheduler);
    if (scheduler->n_batch > 0) {
        kvl_error error = {0};
        if (compute(scheduler, &error) == KVL_OK) {
            take_results(scheduler);
        } else {
            fail_batch(scheduler, &error);
        }
    }
    return scheduler->requests != NULL;
}
