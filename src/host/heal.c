/* host/heal.c: the queue of answers to be healed, and the healing. */
#include "host/heal.h"

#include "base/alloc.h"
#include "base/log.h"
#include "host/host_parts.h"

#include <string.h>

/* About a quarter of a second for a small model: a task that comes waits no longer. */
enum { SLICE_ROWS = 256 };

static const char UNHEALED[] = "kvloom.unhealed.1";

kvl_digest heal_unhealed_home(const kvl_host *host, const kvl_digest *home)
{
    kvl_digester digester;
    kvl_digester_init(&digester, host->tenant_key, sizeof host->tenant_key);
    kvl_digester_add(&digester, UNHEALED, sizeof UNHEALED);
    kvl_digester_add(&digester, home->bytes, sizeof home->bytes);
    return kvl_digester_end(&digester);
}

static void remember(heal_queue *queue, const heal_job *job, Kvloom__V1__HealState state)
{
    heal_outcome *outcome = &queue->outcomes[queue->n_outcomes++ % KVL_HEAL_OUTCOMES];
    *outcome = (heal_outcome){job->asked.home,          state,
                              job->asked.sent.n_answer, job->check.n_differed,
                              job->check.n_agreed,      job->spent_ns};
}

static void end_request(heal_request *asked)
{
    kvl_free(asked->sent.tokens);
    kvl_free(asked->reused);
    *asked = (heal_request){0};
}

static void end_job(heal_job *job)
{
    exact_check_end(&job->check);
    end_request(&job->asked);
    kvl_free(job);
}

static heal_job *take_first(heal_queue *queue)
{
    heal_job *job = queue->first;
    queue->first = job->next;
    if (queue->first == NULL) queue->last = NULL;
    queue->n--;
    return job;
}

static void drop_first(heal_queue *queue)
{
    heal_job *job = take_first(queue);
    queue->n_dropped++;
    kvl_log(KVL_LOG_WARN, "heal_dropped", "waiting=%u remedy=\"ask for fewer healed answers\"",
            queue->n);
    if (job->asked.swaps) remember(queue, job, KVLOOM__V1__HEAL_STATE__HEAL_DROPPED);
    end_job(job);
}

void heal_add(kvl_host *host, heal_request *asked)
{
    heal_queue *queue = &host->heals;
    heal_job *job = kvl_alloc_zero(1, sizeof *job);
    if (job == NULL) {
        queue->n_dropped++;
        end_request(asked);
        return;
    }
    while (queue->n >= KVL_HEALS_MAX) drop_first(queue);
    job->asked = *asked;
    *asked = (heal_request){0};
    if (queue->last == NULL)
        queue->first = job;
    else
        queue->last->next = job;
    queue->last = job;
    queue->n++;
}

/* Exact KV takes the place of approximate KV: in the tree, in the store, and with the peers, who
 * hear of the new container. One who is reading the old one keeps it until he lets go of it. */
static kvl_status swap(kvl_host *host, heal_job *job, kvl_error *error)
{
    kvl_session *exact = job->check.session;
    const kvl_sent_answer *sent = &job->asked.sent;
    KVL_TRY(kvl_session_keep_prefix(exact, sent->salt, sent->n_prompt + sent->n_answer, error));
    if (sent->n_answer == 0) return KVL_OK;
    kvl_container *container = NULL;
    const host_publication what = {
        .first = sent->n_prompt, .n = sent->n_answer, .home = job->asked.home};
    KVL_TRY(host_publish(host, exact, &what, &container, error));
    kvl_container_release(container);
    const kvl_digest home = heal_unhealed_home(host, &job->asked.home);
    const kvl_digest id = kvl_segment_id(host->tenant_key, &host->fingerprint, &home,
                                         sent->tokens + sent->n_prompt, sent->n_answer);
    /* It may have been evicted before. */
    (void)!host->store->ops->remove(host->store, &id, NULL);
    return KVL_OK;
}

/* What the host knows now of answers of this kind. */
static void learn(kvl_host *host, const heal_job *job)
{
    const heal_request *asked = &job->asked;
    if (asked->reused == NULL && !asked->has_score) return;
    quality_entry *entry = quality_find(&host->quality, asked->workflow, asked->template_name);
    const uint32_t n = asked->sent.n_answer + asked->sent.ended;
    const uint32_t n_differed = job->check.n_differed;
    if (asked->has_score)
        kvl_gate_learn(&entry->gate, &host->quality.gate, asked->score, n_differed == 0);
    if (job->n_kl == 0) return;
    audit_result result = {
        .kl = job->kl_sum / job->n_kl,
        .has_kl = true,
        .top1 = n == 0 ? 1.0 : 1.0 - (double)n_differed / n,
        .is_exact = n_differed == 0,
    };
    memcpy(result.shares, asked->shares, sizeof result.shares);
    quality_learn_audit(&host->quality, entry, &result);
    host_save_quality(host);
}

static void finish(kvl_host *host, heal_job *job)
{
    heal_queue *queue = &host->heals;
    learn(host, job);
    if (!job->asked.swaps) return;
    queue->n_healed++;
    queue->n_tokens += job->asked.sent.n_answer;
    queue->n_differed += job->check.n_differed;
    remember(queue, job, KVLOOM__V1__HEAL_STATE__HEAL_DONE);
}

static void compare_with_sent(void *context, uint32_t at, const float *logits)
{
    heal_job *job = context;
    if (at >= job->asked.n_reused) return;
    const uint32_t n_vocab = job->check.engine->shape->n_vocab;
    bool agrees = false;
    job->kl_sum += divergence(logits, job->asked.reused + (size_t)at * n_vocab, n_vocab, &agrees);
    job->n_kl++;
}

static kvl_status advance(kvl_host *host, heal_job *job, kvl_error *error)
{
    if (job->check.session == NULL) {
        job->kl_sum = 0.0;
        job->n_kl = 0;
        job->check.row = job->asked.reused == NULL ? NULL : compare_with_sent;
        job->check.context = job;
        KVL_TRY(exact_check_begin(&job->check, host->engine, &job->asked.sent, 0, error));
    }
    KVL_TRY(exact_check_step(&job->check, SLICE_ROWS, error));
    if (!exact_check_is_done(&job->check)) return KVL_OK;
    (void)donors_learn(host, job->check.session, &job->asked.lesson);
    return job->asked.swaps ? swap(host, job, error) : KVL_OK;
}

bool heal_step(kvl_host *host)
{
    heal_queue *queue = &host->heals;
    heal_job *job = queue->first;
    if (job == NULL) return false;
    kvl_error error = {0};
    const int64_t start = kvl_clock_now(host->clock);
    const kvl_status status = advance(host, job, &error);
    job->spent_ns += kvl_clock_now(host->clock) - start;
    if (status == KVL_OK && !exact_check_is_done(&job->check)) return true;
    (void)take_first(queue);
    if (status == KVL_OK) {
        finish(host, job);
    } else {
        queue->n_failed++;
        kvl_log(KVL_LOG_WARN, "heal_failed", "status=%s text=\"%s\"", kvl_status_name(status),
                error.text);
        if (job->asked.swaps) remember(queue, job, KVLOOM__V1__HEAL_STATE__HEAL_FAILED);
    }
    end_job(job);
    return queue->first != NULL;
}

/* The job of a home becomes the first; whether there is one. */
static bool bring_forward(heal_queue *queue, const kvl_digest *home)
{
    heal_job *before = NULL;
    heal_job *job = queue->first;
    while (job != NULL && !(job->asked.swaps && kvl_digest_equal(&job->asked.home, home))) {
        before = job;
        job = job->next;
    }
    if (job == NULL) return false;
    if (before == NULL) return true;
    before->next = job->next;
    if (queue->last == job) queue->last = before;
    job->next = queue->first;
    queue->first = job;
    return true;
}

void heal_wait(kvl_host *host, const kvl_digest *home, int64_t max_ns)
{
    const int64_t past = kvl_clock_now(host->clock) + max_ns;
    while (kvl_clock_now(host->clock) < past && bring_forward(&host->heals, home))
        (void)heal_step(host);
}

void heal_make_room(kvl_host *host)
{
    const uint32_t n_pages = host->engine->n_positions / KVL_PAGE_TOKENS + 1;
    for (heal_job *job = host->heals.first; job != NULL; job = job->next) {
        /* A run may need a context for its prompt and another to verify its answer. */
        if (kvl_page_pool_n_free(host->engine->pool) >= 2 * n_pages) return;
        exact_check_end(&job->check);
    }
}

void heal_tell(const kvl_host *host, const kvl_digest *home, Kvloom__V1__HealReply *reply)
{
    const heal_queue *queue = &host->heals;
    for (const heal_job *job = queue->first; job != NULL; job = job->next) {
        if (!job->asked.swaps || !kvl_digest_equal(&job->asked.home, home)) continue;
        reply->state = KVLOOM__V1__HEAL_STATE__HEAL_WAITING;
        reply->n_tokens = job->asked.sent.n_answer;
        return;
    }
    const uint64_t n =
        queue->n_outcomes < KVL_HEAL_OUTCOMES ? queue->n_outcomes : KVL_HEAL_OUTCOMES;
    for (uint64_t back = 1; back <= n; back++) {
        const heal_outcome *outcome =
            &queue->outcomes[(queue->n_outcomes - back) % KVL_HEAL_OUTCOMES];
        if (!kvl_digest_equal(&outcome->home, home)) continue;
        reply->state = outcome->state;
        reply->n_tokens = outcome->n_tokens;
        reply->differed = outcome->n_differed;
        reply->first_differed = outcome->n_differed > 0 ? outcome->first_differed : 0;
        reply->heal_ms = kvl_ns_to_ms(outcome->spent_ns);
        return;
    }
}

void heal_deinit(kvl_host *host)
{
    while (host->heals.first != NULL) end_job(take_first(&host->heals));
}
