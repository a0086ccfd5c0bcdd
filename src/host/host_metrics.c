/* host/host_metrics.c: what a host has healed, gated and audited, for other threads: the engine
 * thread puts a copy where they may look. */
#include "base/alloc.h"
#include "host/host_parts.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void host_show(kvl_host *host)
{
    const heal_queue *heals = &host->heals;
    const quality_book *book = &host->quality;
    kvl_anchor_stats anchors = {0};
    kvl_anchor_pool_stats(host->anchors, &anchors);
    (void)pthread_mutex_lock(&host->seen.lock);
    host_seen *seen = &host->seen;
    seen->n_waiting = heals->n;
    seen->heal_beside_ns = heals->beside_ns;
    seen->n_moved = host->waiting.n_moved;
    seen->n_healed = heals->n_healed;
    seen->n_dropped = heals->n_dropped;
    seen->n_failed = heals->n_failed;
    seen->n_tokens = heals->n_tokens;
    seen->n_differed = heals->n_differed;
    seen->n_gated = book->n_gated;
    seen->n_healed_first = book->n_healed_first;
    seen->n_audits = book->n_audits;
    seen->n_audits_skipped = book->n_audits_skipped;
    seen->n_anchors = anchors.n_anchors;
    seen->anchor_bytes = anchors.bytes;
    seen->n_rows = quality_rows(book, seen->rows);
    (void)pthread_mutex_unlock(&host->seen.lock);
}

static void print_number(FILE *out, const char *name, const char *type, const char *help,
                         uint64_t value)
{
    (void)fprintf(out, "# HELP kvloom_%s %s\n# TYPE kvloom_%s %s\nkvloom_%s %" PRIu64 "\n", name,
                  help, name, type, name, value);
}

static void print_counts(FILE *out, const host_seen *seen)
{
    const struct {
        const char *name, *type, *help;
        uint64_t value;
    } numbers[] = {
        {"heals_waiting", "gauge", "Answers that wait to be checked.", seen->n_waiting},
        {"healed_total", "counter", "Answers whose KV was made exact.", seen->n_healed},
        {"heals_dropped_total", "counter", "Answers that nobody had time to heal.",
         seen->n_dropped},
        {"heals_failed_total", "counter", "Healings that ended by an error.", seen->n_failed},
        {"healed_tokens_total", "counter", "Tokens of healed answers.", seen->n_tokens},
        {"differed_tokens_total", "counter", "Of these, not what exact KV would have given.",
         seen->n_differed},
        {"heal_beside_ms_total", "counter", "Healing beside other work, milliseconds.",
         (uint64_t)(seen->heal_beside_ns / KVL_NS_PER_MS)},
        {"tasks_moved_total", "counter", "Tasks that went before one that came earlier.",
         seen->n_moved},
        {"gated_total", "counter", "Answers that the gate was asked about.", seen->n_gated},
        {"healed_first_total", "counter", "Of these, verified before they were sent.",
         seen->n_healed_first},
        {"audits_total", "counter", "Reused requests computed in full.", seen->n_audits},
        {"audits_skipped_total", "counter", "Audits that there was no time for.",
         seen->n_audits_skipped},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        print_number(out, numbers[i].name, numbers[i].type, numbers[i].help, numbers[i].value);
}

static void print_rows(FILE *out, const host_seen *seen, const char *name, const char *help,
                       size_t offset)
{
    (void)fprintf(out, "# HELP kvloom_%s %s\n# TYPE kvloom_%s gauge\n", name, help, name);
    for (uint32_t i = 0; i < seen->n_rows; i++) {
        double value = 0.0;
        memcpy(&value, (const char *)&seen->rows[i] + offset, sizeof value);
        (void)fprintf(out, "kvloom_%s{key=\"%s\",action=\"%s\"} %.9g\n", name, seen->rows[i].name,
                      kvl_action_name((kvl_action)seen->rows[i].action), value);
    }
}

char *kvl_host_metrics_text(kvl_host *host)
{
    char *bytes = NULL;
    size_t n_bytes = 0;
    FILE *out = open_memstream(&bytes, &n_bytes);
    if (out == NULL) return NULL;
    (void)pthread_mutex_lock(&host->seen.lock);
    const host_seen *seen = &host->seen;
    print_counts(out, seen);
    if (seen->n_rows > 0) {
        print_rows(out, seen, "audit_kl", "Mean KL(full || reuse) of audited answers, nats.",
                   offsetof(quality_row, kl));
        print_rows(out, seen, "audit_top1_agreement", "Tokens that exact KV would have given too.",
                   offsetof(quality_row, top1));
        print_rows(out, seen, "audit_exact_match", "Answers that are full prefill's.",
                   offsetof(quality_row, exact));
        print_rows(out, seen, "gate_bar", "Score that an answer must have to pass; 2: none does.",
                   offsetof(quality_row, bar));
    }
    (void)pthread_mutex_unlock(&host->seen.lock);
    if (fclose(out) != 0) return NULL;
    char *copy = kvl_strdup(bytes);
    free(bytes); /* tidy: free, open_memstream allocated it */
    return copy;
}

/* Means over all keys, weighted by their audits. */
static void sum_audits(const host_seen *seen, kvl_host_figures *figures)
{
    _Static_assert(KVL_ACTIONS <= KVL_HOST_ACTIONS_MAX, "an action has no place");
    for (uint32_t action = 0; action < KVL_ACTIONS; action++) {
        kvl_host_audit sum = {.action = kvl_action_name((kvl_action)action)};
        for (uint32_t i = 0; i < seen->n_rows; i++) {
            const quality_row *row = &seen->rows[i];
            if (row->action != action || row->n_audited == 0) continue;
            sum.n += row->n_audited;
            sum.kl += (double)row->n_audited * row->kl;
            sum.top1 += (double)row->n_audited * row->top1;
        }
        if (sum.n == 0) continue;
        sum.kl /= (double)sum.n;
        sum.top1 /= (double)sum.n;
        figures->audits[figures->n_audits++] = sum;
    }
}

void kvl_host_figures_read(kvl_host *host, kvl_host_figures *figures)
{
    *figures = (kvl_host_figures){.n_audits = 0};
    (void)pthread_mutex_lock(&host->seen.lock);
    const host_seen *seen = &host->seen;
    figures->n_healed = seen->n_healed;
    figures->n_heals_waiting = seen->n_waiting;
    figures->n_audited = seen->n_audits;
    figures->n_anchors = seen->n_anchors;
    figures->anchor_bytes = seen->anchor_bytes;
    sum_audits(seen, figures);
    (void)pthread_mutex_unlock(&host->seen.lock);
    for (uint32_t i = 0; i < host->n_peers && i < KVL_HOST_PEERS_SHOWN; i++) {
        const char *name = host->peer_names[i];
        (void)snprintf(figures->peers[i].name, sizeof figures->peers[i].name, "%s", name);
        figures->peers[i].is_up = kvl_exchange_peer_is_up(host->exchange, name);
        figures->n_peers++;
    }
}
