/* host/correct.c: what is done to a run's placed KV: its scope's mean is added as it is placed, or
 * probes move it, layer by layer, as they are computed.
 *
 * Probes cost no walk over the layers of their own: the chosen tokens are computed anyway. What
 * they cost is the pass over layers 0 and 1 that says how far each other token is to be moved, and
 * a read and a write of what is placed in every layer. */
#include "base/alloc.h"
#include "host/host_parts.h"

#include <string.h>

const kvl_mean *run_mean(const run *r, const run_part *part)
{
    if (r->correction->kind != KVL_CORRECT_MEAN || !r->has_scope || part->is_donor) return NULL;
    if (part->step.action != KVL_ACTION_BLEND || part->container == NULL) return NULL;
    return donors_mean(r->host, &r->scope, kvl_container_info_of(part->container));
}

struct run_probe {
    run *of;
    size_t width; /* floats of one token's keys, of one layer */
    uint32_t n_probes, n_others;
    uint32_t *probes, *others; /* positions */
    float *weights;            /* [n_others] */
    float *stale, *rows;       /* [2][n][width]: of the probes as they were; scratch */
    float *shift;              /* [2][width] */
};

void run_probe_end(run *r)
{
    struct run_probe *probe = r->probe;
    r->probe = NULL;
    if (probe == NULL) return;
    kvl_free(probe->probes);
    kvl_free(probe->weights);
    kvl_free(probe->stale);
    kvl_free(probe);
}

static struct run_probe *make_probe(run *r, uint32_t n_placed, uint32_t n_chosen)
{
    const kvl_model_shape *shape = r->host->engine->shape;
    struct run_probe *probe = kvl_alloc_zero(1, sizeof *probe);
    if (probe == NULL) return NULL;
    r->probe = probe;
    probe->of = r;
    probe->width = (size_t)shape->n_kv_heads * shape->head_dim;
    probe->probes = kvl_alloc_zero(n_placed + 1, sizeof *probe->probes);
    probe->weights = kvl_alloc_zero(n_placed + 1, sizeof *probe->weights);
    /* The probes' rows twice, then all others' once, then the shift. */
    const size_t n_rows = 2 * ((size_t)n_chosen + n_placed + 1);
    probe->stale = kvl_alloc_zero(n_rows * probe->width, sizeof *probe->stale);
    if (probe->probes == NULL || probe->weights == NULL || probe->stale == NULL) {
        run_probe_end(r);
        return NULL;
    }
    probe->others = probe->probes + n_chosen;
    probe->rows = probe->stale + 2 * (size_t)n_chosen * probe->width;
    probe->shift = probe->rows + 2 * (size_t)n_placed * probe->width;
    return probe;
}

kvl_status run_note_deviation(run *r, const float *deviation, kvl_error *error)
{
    if (r->correction->kind != KVL_CORRECT_PROBE) return KVL_OK;
    if (r->deviation == NULL) r->deviation = kvl_alloc_zero(r->n_ids, sizeof *r->deviation);
    if (r->deviation == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the deviation of %zu tokens",
                        r->n_ids);
    memcpy(r->deviation, deviation, r->n_ids * sizeof *deviation);
    return KVL_OK;
}

static kvl_status deviate(run *r, const kvl_select_run *runs, size_t n_runs, uint32_t n_computed,
                          kvl_error *error)
{
    const kvl_deviation_check check = {.layer = 1};
    uint32_t *placed = kvl_alloc_zero(2 * r->n_ids, sizeof *placed);
    r->deviation = kvl_alloc_zero(r->n_ids, sizeof *r->deviation);
    kvl_status status = KVL_ERR_NO_MEMORY;
    if (placed == NULL || r->deviation == NULL) {
        status = KVL_FAIL(error, status, "no memory for the deviation of %zu tokens", r->n_ids);
    } else {
        uint32_t *all = placed + r->n_ids;
        const uint32_t n_placed = run_list_others(runs, n_runs, NULL, 0, placed);
        const uint32_t n = run_merge(r->positions, n_computed, placed, n_placed, all);
        status = kvl_session_deviation(r->session, &check, all, n, r->deviation, error);
    }
    kvl_free(placed);
    return status;
}

static kvl_status begin(run *r, const kvl_select_run *runs, size_t n_runs, uint32_t n_placed,
                        const uint32_t *chosen, uint32_t n_chosen, kvl_error *error)
{
    struct run_probe *probe = make_probe(r, n_placed, n_chosen);
    if (probe == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for %u probes", n_chosen);
    memcpy(probe->probes, chosen, n_chosen * sizeof *chosen);
    probe->n_probes = n_chosen;
    probe->n_others = run_list_others(runs, n_runs, chosen, n_chosen, probe->others);
    kvl_probe_weights(r->deviation, probe->probes, n_chosen, probe->others, probe->n_others,
                      probe->weights);
    r->n_shifted = probe->n_others;
    return KVL_OK;
}

kvl_status run_choose_probes(run *r, const kvl_select_run *runs, size_t n_runs, uint32_t n_computed,
                             const uint32_t *chosen, uint32_t n_chosen, kvl_error *error)
{
    if (r->correction->kind != KVL_CORRECT_PROBE) return KVL_OK;
    run_probe_end(r);
    uint32_t n_placed = 0;
    for (size_t i = 0; i < n_runs; i++) n_placed += runs[i].n;
    kvl_status status = KVL_OK;
    if (n_chosen > 0 && n_chosen < n_placed) {
        if (r->deviation == NULL) status = deviate(r, runs, n_runs, n_computed, error);
        if (status == KVL_OK) status = begin(r, runs, n_runs, n_placed, chosen, n_chosen, error);
    }
    kvl_free(r->deviation);
    r->deviation = NULL;
    return status;
}

/* Layers 0 and 1 of all that is placed are computed where the deviations come from. In layers that
 * a selection has computed for some of it before the choice, the probes have moved already and move
 * nobody else: between the check layers of one that filters gradually, and the first tokens of runs
 * where an answer was drafted. */
enum { LAYER_FIRST = 2 };

static void read_stale(void *context, uint32_t layer)
{
    struct run_probe *probe = context;
    if (layer < LAYER_FIRST) return;
    kvl_session_read_layer(probe->of->session, layer, probe->probes, probe->n_probes, probe->stale,
                           probe->stale + probe->n_probes * probe->width);
}

/* Probes among the rows of one cut: both ascend. */
static uint32_t count_computed(const struct run_probe *probe, uint32_t n_rows)
{
    const uint32_t last = probe->of->positions[n_rows - 1];
    uint32_t n = 0;
    while (n < probe->n_probes && probe->probes[n] <= last) n++;
    return n;
}

/* Tokens behind the last row of the cut are attended to by later cuts only, which see them moved by
 * the probes of this one. */
static void move_others(void *context, uint32_t layer, uint32_t row_first, uint32_t n_rows)
{
    struct run_probe *probe = context;
    if (layer < LAYER_FIRST || row_first > 0) return;
    const uint32_t n = count_computed(probe, n_rows);
    if (n == 0) return;
    kvl_session *session = probe->of->session;
    const size_t width = probe->width;
    float *fresh[2] = {probe->rows, probe->rows + n * width};
    kvl_session_read_layer(session, layer, probe->probes, n, fresh[0], fresh[1]);
    kvl_probe_shift(fresh[0], probe->stale, n, width, probe->shift);
    kvl_probe_shift(fresh[1], probe->stale + probe->n_probes * width, n, width,
                    probe->shift + width);
    float *rows[2] = {probe->rows, probe->rows + probe->n_others * width};
    kvl_session_read_layer(session, layer, probe->others, probe->n_others, rows[0], rows[1]);
    for (size_t half = 0; half < 2; half++)
        kvl_probe_apply(probe->shift + half * width, probe->weights, probe->n_others, width,
                        rows[half]);
    kvl_session_write_layer(session, layer, probe->others, probe->n_others, rows[0], rows[1]);
}

kvl_status run_compute(run *r, uint32_t n, kvl_error *error)
{
    float *logits = r->host->logits;
    if (r->probe == NULL) return kvl_session_compute(r->session, r->positions, n, 1, logits, error);
    const kvl_session_walk walk = {read_stale, move_others, r->probe};
    const kvl_status status =
        kvl_session_compute_watched(r->session, r->positions, n, 1, logits, &walk, error);
    run_probe_end(r);
    return status;
}
