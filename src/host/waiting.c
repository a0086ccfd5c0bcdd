/* host/waiting.c: reads what has come, estimates what it saves, takes the first. */
#include "host/waiting.h"

#include "base/alloc.h"
#include "host/host_parts.h"

#include <string.h>

kvl_status waiting_init(waiting_tasks *waiting, bool is_in_order, kvl_error *error)
{
    *waiting = (waiting_tasks){.is_in_order = is_in_order, .options = kvl_order_default_options()};
    waiting->items = kvl_alloc_zero(KVL_HOST_TASKS_MAX, sizeof(waiting_task *));
    if (waiting->items == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the tasks that wait");
    return KVL_OK;
}

static void end_prompt(waiting_prompt *prompt)
{
    kvl_free(prompt->ids);
    kvl_free(prompt->segments);
    *prompt = (waiting_prompt){.ids = NULL};
}

void waiting_task_destroy(waiting_task *task)
{
    if (task == NULL) return;
    if (task->asked != NULL) kvloom__v1__host_task__free_unpacked(task->asked, NULL);
    end_prompt(&task->prompt);
    kvl_free(task);
}

void waiting_deinit(waiting_tasks *waiting)
{
    for (uint32_t i = 0; i < waiting->n; i++) waiting_task_destroy(waiting->items[i]);
    kvl_free(waiting->items);
    end_prompt(&waiting->last);
    *waiting = (waiting_tasks){.n = 0};
}

kvl_status waiting_push(kvl_host *host, uint64_t id, const void *body, size_t n_bytes)
{
    waiting_task *task = kvl_alloc(sizeof *task + n_bytes);
    if (task == NULL) return KVL_ERR_NO_MEMORY;
    *task = (waiting_task){.id = id, .arrived_ns = kvl_clock_now(host->clock), .n_bytes = n_bytes};
    memcpy(task->body, body, n_bytes);
    const kvl_status status = kvl_queue_push(host->tasks, task);
    if (status != KVL_OK) kvl_free(task);
    return status;
}

/* ---- what is known of a prompt ---- */

static bool may_move(const waiting_task *task)
{
    if (task->asked == NULL || task->asked->what_case != KVLOOM__V1__HOST_TASK__WHAT_RUN)
        return false;
    const Kvloom__V1__RunTask *asked = task->asked->run;
    return asked->mode == KVLOOM__V1__MODE__MODE_REUSE && !asked->evaluate;
}

static bool copy_prompt(run *r, waiting_prompt *prompt)
{
    const bool reuses = r->task->quality != KVLOOM__V1__QUALITY__QUALITY_EXACT;
    prompt->segments = kvl_alloc_zero(r->n_parts, sizeof *prompt->segments);
    if (prompt->segments == NULL) return false;
    for (uint32_t p = 0; p < r->n_parts; p++) {
        const run_part *part = &r->parts[p];
        if (!reuses || !part->is_slot || part->n_tokens == 0) continue;
        prompt->segments[prompt->n_segments++] =
            (waiting_segment){part->id, part->first, part->n_tokens};
    }
    prompt->ids = r->ids;
    prompt->n_ids = (uint32_t)r->n_ids;
    prompt->salt = r->salt;
    r->ids = NULL;
    return true;
}

/* A prompt that cannot be read saves nothing: its run will say why. */
static void find_prompt(kvl_host *host, waiting_task *task)
{
    if (task->has_prompt) return;
    task->has_prompt = true;
    run *r = kvl_alloc_zero(1, sizeof *r);
    kvl_error ignored = {0};
    if (r == NULL) return;
    if (run_init(r, host, task->asked->run, &ignored) == KVL_OK && !copy_prompt(r, &task->prompt))
        end_prompt(&task->prompt);
    run_deinit(r);
    kvl_free(r);
}

static bool has_segment(const waiting_prompt *prompt, const kvl_digest *id)
{
    for (uint32_t i = 0; i < prompt->n_segments; i++) {
        if (kvl_digest_equal(&prompt->segments[i].id, id)) return true;
    }
    return false;
}

bool waiting_wants(const kvl_host *host, const kvl_digest *id)
{
    for (uint32_t i = 0; i < host->waiting.n; i++) {
        if (has_segment(&host->waiting.items[i]->prompt, id)) return true;
    }
    return false;
}

/* Of computing a token, what having it from where it is saves, 0 .. 1. */
static double share_saved(kvl_host *host, const kvl_digest *id)
{
    const kvl_plan_rates *rates = &host->rates;
    double ms = 1.0 / rates->place_tokens_per_ms;
    if (!host->memory->ops->has(host->memory, id)) {
        if (host->store->ops->has(host->store, id))
            ms += host_bytes_of_token(host) / rates->disk_bytes_per_ms;
        else if (kvl_exchange_was_announced(host->exchange, id))
            ms += host_bytes_of_token(host) / rates->fetch_bytes_per_ms;
        else
            return 0.0;
    }
    const double saved = 1.0 - ms / rates->prefill_ms_per_token;
    return saved > 0.0 ? saved : 0.0;
}

static uint32_t n_common(const waiting_prompt *a, const waiting_prompt *b)
{
    uint32_t n = 0;
    if (a->salt != b->salt) return 0;
    while (n < a->n_ids && n < b->n_ids && a->ids[n] == b->ids[n]) n++;
    return n;
}

kvl_order_item waiting_estimate(kvl_host *host, const waiting_task *task)
{
    const waiting_prompt *prompt = &task->prompt;
    const waiting_prompt *last = &host->waiting.last;
    kvl_order_item item = {.arrived_ns = task->arrived_ns, .number = task->number};
    if (prompt->n_ids == 0) return item;
    const uint32_t n_known =
        kvl_prefix_tree_peek(host->engine->tree, prompt->salt, prompt->ids, prompt->n_ids - 1);
    item.n_saved = n_known;
    item.n_near = n_common(prompt, last);
    for (uint32_t i = 0; i < prompt->n_segments; i++) {
        const waiting_segment *segment = &prompt->segments[i];
        if (segment->first + segment->n_tokens <= n_known) continue;
        item.n_saved += segment->n_tokens * share_saved(host, &segment->id);
        if (has_segment(last, &segment->id)) item.n_near += segment->n_tokens;
    }
    const double left = (double)prompt->n_ids - item.n_saved;
    item.n_remaining = left > 1.0 ? (uint32_t)left : 1;
    return item;
}

/* ---- the next one ---- */

static void take_in(kvl_host *host, waiting_task *task)
{
    waiting_tasks *waiting = &host->waiting;
    task->number = waiting->n_ever++;
    task->asked = kvloom__v1__host_task__unpack(NULL, task->n_bytes, task->body);
    waiting->items[waiting->n++] = task;
}

/* Among those before the first that may not move; that one, where it is the first of all. */
static uint32_t choose(kvl_host *host)
{
    waiting_tasks *waiting = &host->waiting;
    kvl_order_item items[KVL_HOST_TASKS_MAX];
    uint32_t n = 0;
    while (n < waiting->n && may_move(waiting->items[n])) n++;
    if (n < 2 || waiting->is_in_order) return 0;
    for (uint32_t i = 0; i < n; i++) {
        find_prompt(host, waiting->items[i]);
        items[i] = waiting_estimate(host, waiting->items[i]);
    }
    return (uint32_t)kvl_order_first(&waiting->options, items, n, kvl_clock_now(host->clock));
}

static void take_all_in(kvl_host *host, bool waits)
{
    waiting_tasks *waiting = &host->waiting;
    while (waiting->n < KVL_HOST_TASKS_MAX) {
        waiting_task *task =
            waits && waiting->n == 0 ? kvl_queue_pop(host->tasks) : kvl_queue_try_pop(host->tasks);
        if (task == NULL) break;
        take_in(host, task);
    }
}

bool waiting_any(kvl_host *host)
{
    take_all_in(host, false);
    return host->waiting.n > 0;
}

waiting_task *waiting_next(kvl_host *host, bool waits)
{
    waiting_tasks *waiting = &host->waiting;
    take_all_in(host, waits);
    if (waiting->n == 0) return NULL;
    const uint32_t at = choose(host);
    waiting_task *task = waiting->items[at];
    waiting->n--;
    waiting->n_moved += at > 0 ? 1 : 0;
    memmove(&waiting->items[at], &waiting->items[at + 1],
            (waiting->n - at) * sizeof(waiting_task *));
    if (task->has_prompt) {
        end_prompt(&waiting->last);
        waiting->last = task->prompt;
        task->prompt = (waiting_prompt){.ids = NULL};
    }
    return task;
}
