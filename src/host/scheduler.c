/* host/scheduler.c: requests come, wait, run, pause and end. */
#include "base/alloc.h"
#include "host/order.h"
#include "host/scheduler_parts.h"

#include <string.h>

enum { RUNNING_DEFAULT = 64, WAITING_DEFAULT = 256, STEP_ROWS_DEFAULT = 256, STEP_ROWS_MIN = 32 };

/* ---- life ---- */

static void fill_options(kvl_scheduler_options *options)
{
    if (options->n_running_max == 0) options->n_running_max = RUNNING_DEFAULT;
    if (options->clock == NULL) options->clock = kvl_clock_system();
    if (options->n_waiting_max == 0) options->n_waiting_max = WAITING_DEFAULT;
    if (options->n_step_rows == 0) options->n_step_rows = STEP_ROWS_DEFAULT;
    /* Every running branch may have a row, and a prompt must get on beside them. */
    const uint32_t most = KVL_FORWARD_ROWS_MAX - STEP_ROWS_MIN;
    if (options->n_running_max > most) options->n_running_max = most;
    if (options->n_step_rows < options->n_running_max + STEP_ROWS_MIN)
        options->n_step_rows = options->n_running_max + STEP_ROWS_MIN;
    if (options->n_step_rows > KVL_FORWARD_ROWS_MAX) options->n_step_rows = KVL_FORWARD_ROWS_MAX;
}

kvl_status kvl_scheduler_create(kvl_engine *engine, const kvl_scheduler_options *options,
                                kvl_scheduler **scheduler, kvl_error *error)
{
    *scheduler = NULL;
    kvl_scheduler *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a scheduler");
    made->engine = engine;
    made->options = *options;
    made->next_id = 1;
    fill_options(&made->options);
    const uint32_t n = made->options.n_running_max;
    kvl_status status = kvl_sampler_create(
        engine->shape->n_vocab, kvl_pool_n_threads(engine->threads), &made->sampler, error);
    made->running = kvl_alloc_zero(n, sizeof(kvl_branch *));
    made->batch = kvl_alloc_zero(n, sizeof(kvl_branch *));
    made->rows = kvl_alloc_zero(KVL_FORWARD_ROWS_MAX, sizeof *made->rows);
    made->paths = kvl_alloc_zero(n, sizeof *made->paths);
    made->logit_rows = kvl_alloc_zero(n, sizeof *made->logit_rows);
    made->logits = kvl_alloc_aligned((size_t)n * engine->shape->n_vocab * sizeof(float));
    if (status == KVL_OK &&
        (made->running == NULL || made->batch == NULL || made->rows == NULL ||
         made->paths == NULL || made->logit_rows == NULL || made->logits == NULL))
        status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to run %u answers at once", n);
    if (status != KVL_OK) {
        kvl_scheduler_destroy(made);
        return status;
    }
    *scheduler = made;
    return KVL_OK;
}

static void destroy_list(kvl_branch *branch)
{
    while (branch != NULL) {
        kvl_branch *next = branch->next;
        kvl_branch_destroy(branch);
        branch = next;
    }
}

void kvl_scheduler_destroy(kvl_scheduler *scheduler)
{
    if (scheduler == NULL) return;
    for (uint32_t i = 0; i < scheduler->n_running; i++) kvl_branch_destroy(scheduler->running[i]);
    destroy_list(scheduler->waiting);
    destroy_list(scheduler->behind);
    while (scheduler->requests != NULL) {
        kvl_request *next = scheduler->requests->next;
        kvl_request_destroy(scheduler->requests);
        scheduler->requests = next;
    }
    kvl_sampler_destroy(scheduler->sampler);
    kvl_free(scheduler->running);
    kvl_free(scheduler->batch);
    kvl_free(scheduler->rows);
    kvl_free(scheduler->paths);
    kvl_free(scheduler->logit_rows);
    kvl_free(scheduler->logits);
    kvl_free(scheduler);
}

/* ---- requests ---- */

static kvl_status check_stops(const kvl_generation *asked, kvl_error *error)
{
    if (asked->n_stops > KVL_STOPS_MAX)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "stop has %u texts; at most %u", asked->n_stops,
                        KVL_STOPS_MAX);
    for (uint32_t i = 0; i < asked->n_stops; i++) {
        const size_t n = strnlen(asked->stops[i], KVL_STOP_BYTES_MAX + 1);
        if (n == 0 || n > KVL_STOP_BYTES_MAX)
            return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                            "stop text %u has %zu bytes; it must have 1 to %u", i, n,
                            KVL_STOP_BYTES_MAX);
    }
    return KVL_OK;
}

uint32_t kvl_scheduler_tokens_max(const kvl_engine *engine)
{
    const uint64_t n_held = (uint64_t)kvl_page_pool_pages(engine->pool)->n_pages * KVL_PAGE_TOKENS;
    return n_held < engine->n_positions ? (uint32_t)n_held : engine->n_positions;
}

static kvl_status check_request(const kvl_scheduler *scheduler, const kvl_generation *asked,
                                kvl_error *error)
{
    const kvl_engine *engine = scheduler->engine;
    if (asked->n_ids == 0) return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "the prompt is empty");
    const uint32_t room = kvl_scheduler_tokens_max(engine);
    if (asked->max_tokens == 0 || (uint64_t)asked->n_ids + asked->max_tokens > room)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "a prompt of %u tokens and max_tokens of %u do not fit the context of "
                        "%u tokens; shorten the prompt or the answer",
                        asked->n_ids, asked->max_tokens, room);
    for (uint32_t i = 0; i < asked->n_ids; i++) {
        if (asked->ids[i] >= engine->shape->n_vocab)
            return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                            "token %u of the prompt is %u; ids are "
                            "below %u",
                            i, asked->ids[i], engine->shape->n_vocab);
    }
    if (asked->n_branches == 0 || asked->n_branches > KVL_BRANCHES_MAX)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "n is %u; it must be 1 to %u",
                        asked->n_branches, KVL_BRANCHES_MAX);
    KVL_TRY(check_stops(asked, error));
    return kvl_sampling_check(&asked->sampling, error);
}

static bool is_background(const kvl_branch *branch)
{
    return branch->request->asked.is_background;
}

static kvl_branch **list_of(kvl_scheduler *scheduler, const kvl_branch *branch)
{
    return is_background(branch) ? &scheduler->behind : &scheduler->waiting;
}

static void wait_last(kvl_scheduler *scheduler, kvl_branch *branch)
{
    kvl_branch **at = list_of(scheduler, branch);
    while (*at != NULL) at = &(*at)->next;
    *at = branch;
    branch->next = NULL;
    scheduler->stats.n_waiting++;
}

void kvl_scheduler_wait_first(kvl_scheduler *scheduler, kvl_branch *branch)
{
    kvl_branch **list = list_of(scheduler, branch);
    branch->next = *list;
    *list = branch;
    scheduler->stats.n_waiting++;
}

static kvl_status check_room(kvl_scheduler *scheduler, const kvl_generation *generation,
                             kvl_error *error)
{
    KVL_TRY(check_request(scheduler, generation, error));
    if (generation->is_background || scheduler->n_new < scheduler->options.n_waiting_max)
        return KVL_OK;
    scheduler->stats.n_refused++;
    return KVL_FAIL(error, KVL_ERR_BUSY, "%u requests are waiting already; try again later",
                    scheduler->n_new);
}

/* Takes the sequence. */
static kvl_status queue(kvl_scheduler *scheduler, const kvl_generation *generation,
                        kvl_sequence *sequence, kvl_request **queued, kvl_error *error)
{
    kvl_request *request = NULL;
    kvl_branch *branch = NULL;
    kvl_status status = kvl_request_create(generation, &request, error);
    if (status != KVL_OK) {
        kvl_sequence_deinit(sequence);
        return status;
    }
    status = kvl_branch_create(request, 0, generation->n_ids, sequence, &branch, error);
    if (status != KVL_OK) {
        kvl_request_destroy(request);
        return status;
    }
    request->id = scheduler->next_id++;
    request->next = scheduler->requests;
    scheduler->requests = request;
    if (!generation->is_background) scheduler->n_new++;
    branch->arrived_ns = kvl_clock_now(scheduler->options.clock);
    wait_last(scheduler, branch);
    *queued = request;
    return KVL_OK;
}

kvl_status kvl_scheduler_submit(kvl_scheduler *scheduler, const kvl_generation *generation,
                                uint64_t *id, kvl_error *error)
{
    KVL_TRY(check_room(scheduler, generation, error));
    kvl_sequence sequence;
    kvl_request *request = NULL;
    KVL_TRY(kvl_sequence_init(&sequence, scheduler->engine, generation->salt, generation->ids,
                              generation->n_ids, error));
    KVL_TRY(queue(scheduler, generation, &sequence, &request, error));
    *id = request->id;
    return KVL_OK;
}

kvl_status kvl_scheduler_submit_filled(kvl_scheduler *scheduler, const kvl_generation *generation,
                                       kvl_sequence *sequence, uint32_t n_cached,
                                       const kvl_reuse_report *report, uint64_t *id,
                                       kvl_error *error)
{
    const kvl_status status = check_room(scheduler, generation, error);
    kvl_request *request = NULL;
    if (status != KVL_OK) {
        kvl_sequence_deinit(sequence);
        return status;
    }
    KVL_TRY(queue(scheduler, generation, sequence, &request, error));
    request->n_cached = n_cached;
    request->reuse = *report;
    scheduler->stats.n_cached_tokens += n_cached;
    *id = request->id;
    return KVL_OK;
}

void kvl_scheduler_cancel(kvl_scheduler *scheduler, uint64_t id)
{
    for (kvl_request *request = scheduler->requests; request != NULL; request = request->next)
        if (request->id == id) request->is_cancelled = true;
}

void kvl_scheduler_cancel_all(kvl_scheduler *scheduler)
{
    for (kvl_request *request = scheduler->requests; request != NULL; request = request->next)
        request->is_cancelled = true;
}

kvl_engine *kvl_scheduler_engine(const kvl_scheduler *scheduler)
{
    return scheduler->engine;
}

uint32_t kvl_scheduler_n_running_max(const kvl_scheduler *scheduler)
{
    return scheduler->options.n_running_max;
}

/* ---- telling and ending ---- */

static void remove_request(kvl_scheduler *scheduler, kvl_request *request)
{
    kvl_request **at = &scheduler->requests;
    while (*at != request) at = &(*at)->next;
    *at = request->next;
    kvl_request_destroy(request);
}

static void remove_branch(kvl_scheduler *scheduler, kvl_branch *branch)
{
    for (uint32_t i = 0; i < scheduler->n_running; i++) {
        if (scheduler->running[i] != branch) continue;
        scheduler->n_running--;
        memmove(&scheduler->running[i], &scheduler->running[i + 1],
                (scheduler->n_running - i) * sizeof(kvl_branch *));
        return;
    }
    for (kvl_branch **at = list_of(scheduler, branch); *at != NULL; at = &(*at)->next) {
        if (*at != branch) continue;
        *at = branch->next;
        scheduler->stats.n_waiting--;
        return;
    }
}

static void end_branch(kvl_scheduler *scheduler, kvl_branch *branch)
{
    /* Prompt and answer stay for whoever goes on with the conversation. Without memory they do
     * not: that costs time only. */
    kvl_error error;
    kvl_ignore(kvl_sequence_keep(&branch->sequence, &error));
    kvl_request *request = branch->request;
    remove_branch(scheduler, branch);
    if (!request->is_admitted && !request->asked.is_background) scheduler->n_new--;
    request->is_admitted = true;
    kvl_branch_destroy(branch);
    if (request->n_open == 0) remove_request(scheduler, request);
}

void kvl_scheduler_tell(kvl_scheduler *scheduler, kvl_branch *branch, const kvl_drawn *drawn,
                        const char *text, size_t n_text_bytes, kvl_finish finish,
                        const kvl_error *error)
{
    kvl_request *request = branch->request;
    if (finish != KVL_FINISH_NONE) {
        KVL_ASSERT(request->n_open > 0);
        request->n_open--;
        scheduler->stats.n_finished++;
        scheduler->stats.n_failed += finish == KVL_FINISH_FAILED ? 1 : 0;
    }
    const kvl_generation_event event = {
        .branch = branch->index,
        .drawn = drawn,
        .text = text,
        .n_text_bytes = n_text_bytes,
        .finish = finish,
        .n_tokens = branch->sequence.n_ids - branch->n_prompt,
        .n_cached = request->n_cached,
        .reuse = request->reuse,
        .is_last = request->n_open == 0,
        .error = error,
    };
    request->asked.event(request->asked.context, &event);
    if (finish != KVL_FINISH_NONE) end_branch(scheduler, branch);
}

void kvl_scheduler_end(kvl_scheduler *scheduler, kvl_branch *branch, kvl_finish finish,
                       const kvl_error *error)
{
    kvl_request *request = branch->request;
    if (!request->is_forked) {
        for (uint32_t b = 1; b < request->asked.n_branches; b++) {
            request->n_open--;
            const kvl_generation_event event = {.branch = b,
                                                .text = "",
                                                .finish = finish,
                                                .n_cached = request->n_cached,
                                                .reuse = request->reuse,
                                                .error = error};
            request->asked.event(request->asked.context, &event);
        }
    }
    kvl_scheduler_tell(scheduler, branch, NULL, "", 0, finish, error);
}

static kvl_branch *find_cancelled(const kvl_scheduler *scheduler)
{
    for (uint32_t i = 0; i < scheduler->n_running; i++)
        if (scheduler->running[i]->request->is_cancelled) return scheduler->running[i];
    for (kvl_branch *branch = scheduler->waiting; branch != NULL; branch = branch->next)
        if (branch->request->is_cancelled) return branch;
    for (kvl_branch *branch = scheduler->behind; branch != NULL; branch = branch->next)
        if (branch->request->is_cancelled) return branch;
    return NULL;
}

void kvl_scheduler_end_cancelled(kvl_scheduler *scheduler)
{
    for (kvl_branch *branch = find_cancelled(scheduler); branch != NULL;
         branch = find_cancelled(scheduler))
        kvl_scheduler_end(scheduler, branch, KVL_FINISH_CANCELLED, NULL);
}

/* ---- pages ---- */

static bool evict_until(kvl_scheduler *scheduler, uint32_t n_pages)
{
    kvl_engine *engine = scheduler->engine;
    if (kvl_page_pool_n_free(engine->pool) < n_pages)
        (void)kvl_prefix_tree_evict(engine->tree, n_pages);
    return kvl_page_pool_n_free(engine->pool) >= n_pages;
}

/* Branches that wait hold pages only as long as nobody wants them. */
static void strip_waiting(kvl_scheduler *scheduler)
{
    for (kvl_branch *branch = scheduler->waiting; branch != NULL; branch = branch->next)
        kvl_sequence_forget(&branch->sequence, 0);
    for (kvl_branch *branch = scheduler->behind; branch != NULL; branch = branch->next)
        kvl_sequence_forget(&branch->sequence, 0);
}

/* What it has computed goes to the tree, from where it comes back when it is resumed, unless others
 * needed the pages in the meantime. */
static void pause_branch(kvl_scheduler *scheduler, kvl_branch *branch)
{
    kvl_error error;
    kvl_ignore(kvl_sequence_keep(&branch->sequence, &error));
    kvl_sequence_forget(&branch->sequence, 0);
    branch->n_rows = 0;
    branch->has_logits = false;
    branch->was_paused = true;
    remove_branch(scheduler, branch);
    kvl_scheduler_wait_first(scheduler, branch);
    scheduler->stats.n_paused++;
}

bool kvl_scheduler_stands_still(const kvl_scheduler *scheduler, const kvl_branch *branch)
{
    if (!is_background(branch)) return false;
    for (uint32_t i = 0; i < scheduler->n_running; i++)
        if (!is_background(scheduler->running[i])) return true;
    return false;
}

/* The first to be paused: of the background, or, where none of it runs, of all, the last that was
 * admitted. */
static kvl_branch *first_to_pause(const kvl_scheduler *scheduler)
{
    for (uint32_t i = scheduler->n_running; i-- > 0;)
        if (is_background(scheduler->running[i])) return scheduler->running[i];
    return scheduler->running[scheduler->n_running - 1];
}

/* Where one of the background runs, it is paused: for somebody else's pages or place. */
static bool pause_background(kvl_scheduler *scheduler)
{
    if (scheduler->n_running == 0) return false;
    kvl_branch *branch = first_to_pause(scheduler);
    if (!is_background(branch)) return false;
    pause_branch(scheduler, branch);
    return true;
}

bool kvl_scheduler_make_room(kvl_scheduler *scheduler, kvl_branch *branch, uint32_t past)
{
    const uint32_t n_missing = kvl_sequence_n_missing(&branch->sequence, past);
    if (!evict_until(scheduler, n_missing)) strip_waiting(scheduler);
    while (!evict_until(scheduler, n_missing)) {
        kvl_branch *last = first_to_pause(scheduler);
        pause_branch(scheduler, last);
        if (last == branch) return false;
    }
    kvl_error error;
    return kvl_sequence_reserve(&branch->sequence, past, &error) == KVL_OK;
}

void kvl_scheduler_adopt(kvl_scheduler *scheduler, kvl_branch *branch)
{
    const uint32_t n_before = branch->sequence.n_computed;
    kvl_error error;
    kvl_ignore(kvl_sequence_adopt(&branch->sequence, &error));
    if (branch->was_paused || branch->request->is_forked) return;
    const uint32_t n_more = branch->sequence.n_computed - n_before;
    branch->request->n_cached += n_more;
    scheduler->stats.n_cached_tokens += n_more;
}

/* Pages that a branch will need and has not, if its answer is as long as it may be. */
static uint32_t pages_to_end(const kvl_branch *branch)
{
    const uint32_t n_tokens = branch->n_prompt + branch->request->asked.max_tokens;
    const uint32_t n_pages = (n_tokens + KVL_PAGE_TOKENS - 1) / KVL_PAGE_TOKENS;
    return n_pages > branch->sequence.n_pages ? n_pages - branch->sequence.n_pages : 0;
}

/* One page more than it needs, and one for each that runs: otherwise the next step would pause
 * somebody. Or, where whole answers are held, all that it and those that run can come to. */
static bool has_room_for(kvl_scheduler *scheduler, kvl_branch *branch)
{
    uint32_t n_missing =
        kvl_sequence_n_missing(&branch->sequence, branch->sequence.n_ids) + scheduler->n_running;
    if (scheduler->options.holds_whole_answers) {
        n_missing = pages_to_end(branch) + 1;
        for (uint32_t i = 0; i < scheduler->n_running; i++)
            n_missing += pages_to_end(scheduler->running[i]);
    }
    return evict_until(scheduler, n_missing);
}

/* Never admitted yet: branches that were, and answers beside a first one, go before all others. */
static bool is_new(const kvl_branch *branch)
{
    return !branch->was_paused && !branch->request->is_admitted;
}

static kvl_order_item item_of(const kvl_scheduler *scheduler, const kvl_branch *branch,
                              uint64_t number)
{
    const kvl_sequence *own = &branch->sequence;
    uint32_t n_saved = kvl_sequence_n_known(own);
    if (scheduler->n_running > 0) {
        const kvl_branch *last = scheduler->running[scheduler->n_running - 1];
        const uint32_t n_common = kvl_sequence_n_common(own, &last->sequence);
        if (n_common > n_saved) n_saved = n_common;
    }
    if (n_saved >= own->n_ids) n_saved = own->n_ids - 1;
    return (kvl_order_item){.n_saved = n_saved,
                            .n_remaining = own->n_ids - n_saved,
                            .arrived_ns = branch->arrived_ns,
                            .number = number};
}

/* Of the first of those that wait anew, the one with the highest priority becomes the first. */
static void bring_best_first(kvl_scheduler *scheduler)
{
    enum { LOOKED_AT = 64 };
    const kvl_order_options options = kvl_order_default_options();
    kvl_order_item items[LOOKED_AT];
    kvl_branch **places[LOOKED_AT];
    size_t n = 0;
    if (scheduler->options.in_order || !is_new(scheduler->waiting)) return;
    for (kvl_branch **at = &scheduler->waiting; *at != NULL && n < LOOKED_AT; at = &(*at)->next) {
        places[n] = at;
        items[n] = item_of(scheduler, *at, n);
        n++;
    }
    if (n < 2) return;
    const size_t first =
        kvl_order_first(&options, items, n, kvl_clock_now(scheduler->options.clock));
    kvl_branch *branch = *places[first];
    *places[first] = branch->next;
    branch->next = scheduler->waiting;
    scheduler->waiting = branch;
}

/* False: there is no room for it now. */
static bool admit_branch(kvl_scheduler *scheduler, kvl_branch *branch)
{
    const uint32_t n_cached = branch->request->n_cached;
    kvl_scheduler_adopt(scheduler, branch);
    while (scheduler->n_running > 0 && !has_room_for(scheduler, branch)) {
        if (!is_background(branch) && pause_background(scheduler)) continue;
        /* What it has taken from the tree would be counted again. */
        scheduler->stats.n_cached_tokens -= branch->request->n_cached - n_cached;
        branch->request->n_cached = n_cached;
        kvl_sequence_forget(&branch->sequence, 0);
        return false;
    }
    remove_branch(scheduler, branch);
    branch->order = scheduler->next_order++;
    scheduler->running[scheduler->n_running++] = branch;
    if (branch->request->is_admitted) return true;
    branch->request->is_admitted = true;
    if (!is_background(branch)) scheduler->n_new--;
    scheduler->stats.n_prompt_tokens += branch->n_prompt;
    return true;
}

static bool has_place(const kvl_scheduler *scheduler)
{
    return scheduler->n_running < scheduler->options.n_running_max;
}

void kvl_scheduler_admit(kvl_scheduler *scheduler)
{
    while (scheduler->waiting != NULL && (has_place(scheduler) || pause_background(scheduler))) {
        bring_best_first(scheduler);
        if (!admit_branch(scheduler, scheduler->waiting)) return;
    }
    while (scheduler->waiting == NULL && scheduler->behind != NULL && has_place(scheduler) &&
           !kvl_scheduler_stands_still(scheduler, scheduler->behind))
        if (!admit_branch(scheduler, scheduler->behind)) return;
}

void kvl_scheduler_stats_read(const kvl_scheduler *scheduler, kvl_scheduler_stats *stats)
{
    *stats = scheduler->stats;
    stats->n_running = scheduler->n_running;
    stats->free_pages = kvl_page_pool_n_free(scheduler->engine->pool);
    stats->tree_pages = kvl_prefix_tree_n_pages(scheduler->engine->tree);
    stats->n_background = 0;
    for (uint32_t i = 0; i < scheduler->n_running; i++)
        stats->n_background += is_background(scheduler->running[i]) ? 1 : 0;
    for (const kvl_branch *branch = scheduler->behind; branch != NULL; branch = branch->next)
        stats->n_background++;
}
