/* host/sampling.c: penalties on a copy of the logits, then candidates from a heap.
 *
 * Only as many candidates leave the heap as top-k and top-p want: usually a few dozen of some
 * 50,000, where sorting all would take longer than the model's last product. */
#include "host/sampling.h"

#include "base/alloc.h"

#include <math.h>
#include <string.h>

typedef struct candidate {
    float weight;
    uint32_t token;
} candidate;

typedef struct scratch {
    float *logits;         /* [n_vocab], after penalties */
    uint32_t *counts;      /* [n_vocab], all 0 between calls */
    candidate *candidates; /* [n_vocab] */
} scratch;

struct kvl_sampler {
    uint32_t n_vocab;
    size_t n_threads;
    scratch *scratch; /* [n_threads] */
};

kvl_sampling kvl_sampling_default(void)
{
    return (kvl_sampling){.top_p = 1.0F, .repetition_penalty = 1.0F};
}

static kvl_status check_range(const char *name, float value, float least, float most,
                              kvl_error *error)
{
    if (value >= least && value <= most) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE, "%s is %g; it must be %g to %g", name,
                    (double)value, (double)least, (double)most);
}

kvl_status kvl_sampling_check(const kvl_sampling *sampling, kvl_error *error)
{
    KVL_TRY(check_range("temperature", sampling->temperature, 0.0F, 2.0F, error));
    KVL_TRY(check_range("top_p", sampling->top_p, 1e-6F, 1.0F, error));
    KVL_TRY(check_range("min_p", sampling->min_p, 0.0F, 1.0F, error));
    KVL_TRY(check_range("repetition_penalty", sampling->repetition_penalty, 0.01F, 100.0F, error));
    KVL_TRY(check_range("presence_penalty", sampling->presence_penalty, -2.0F, 2.0F, error));
    KVL_TRY(check_range("frequency_penalty", sampling->frequency_penalty, -2.0F, 2.0F, error));
    return check_range("top_logprobs", (float)sampling->n_logprobs, 0.0F, (float)KVL_LOGPROBS_MAX,
                       error);
}

void kvl_sampler_destroy(kvl_sampler *sampler)
{
    if (sampler == NULL) return;
    for (size_t t = 0; sampler->scratch != NULL && t < sampler->n_threads; t++) {
        kvl_free(sampler->scratch[t].logits);
        kvl_free(sampler->scratch[t].counts);
        kvl_free(sampler->scratch[t].candidates);
    }
    kvl_free(sampler->scratch);
    kvl_free(sampler);
}

kvl_status kvl_sampler_create(uint32_t n_vocab, size_t n_threads, kvl_sampler **sampler,
                              kvl_error *error)
{
    *sampler = NULL;
    kvl_sampler *made = kvl_alloc_zero(1, sizeof *made);
    bool is_whole = made != NULL;
    if (is_whole) {
        made->n_vocab = n_vocab;
        made->n_threads = n_threads;
        made->scratch = kvl_alloc_zero(n_threads, sizeof *made->scratch);
        is_whole = made->scratch != NULL;
    }
    for (size_t t = 0; is_whole && t < n_threads; t++) {
        scratch *own = &made->scratch[t];
        own->logits = kvl_alloc_zero(n_vocab, sizeof *own->logits);
        own->counts = kvl_alloc_zero(n_vocab, sizeof *own->counts);
        own->candidates = kvl_alloc_zero(n_vocab, sizeof *own->candidates);
        is_whole = own->logits != NULL && own->counts != NULL && own->candidates != NULL;
    }
    if (!is_whole) {
        kvl_sampler_destroy(made);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for sampling from %u tokens", n_vocab);
    }
    *sampler = made;
    return KVL_OK;
}

/* ---- penalties ---- */

static bool has_penalties(const kvl_sampling *sampling)
{
    return sampling->repetition_penalty != 1.0F || sampling->presence_penalty != 0.0F ||
           sampling->frequency_penalty != 0.0F;
}

/* Every token once, however often it stands there. */
static void penalise_repetition(float penalty, const kvl_sampled_text *text, scratch *own)
{
    for (uint32_t i = 0; i < text->n_ids; i++) {
        const uint32_t token = text->ids[i];
        if (own->counts[token]++ > 0) continue;
        float *logit = &own->logits[token];
        *logit = *logit > 0.0F ? *logit / penalty : *logit * penalty;
    }
    for (uint32_t i = 0; i < text->n_ids; i++) own->counts[text->ids[i]] = 0;
}

static void penalise_answer(const kvl_sampling *sampling, const kvl_sampled_text *text,
                            scratch *own)
{
    for (uint32_t i = text->n_prompt; i < text->n_ids; i++) {
        const uint32_t token = text->ids[i];
        if (own->counts[token]++ == 0) own->logits[token] -= sampling->presence_penalty;
        own->logits[token] -= sampling->frequency_penalty;
    }
    for (uint32_t i = text->n_prompt; i < text->n_ids; i++) own->counts[text->ids[i]] = 0;
}

/* ---- the heap: the heaviest on top, the lower id among equals ---- */

static bool is_before(const candidate *a, const candidate *b)
{
    return a->weight > b->weight || (a->weight == b->weight && a->token < b->token);
}

static void sift_down(candidate *heap, uint32_t n, uint32_t at)
{
    const candidate moved = heap[at];
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= n) break;
        if (child + 1 < n && is_before(&heap[child + 1], &heap[child])) child++;
        if (!is_before(&heap[child], &moved)) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = moved;
}

static void make_heap(candidate *heap, uint32_t n)
{
    for (uint32_t at = n / 2; at-- > 0;) sift_down(heap, n, at);
}

/* Moves the heaviest behind the heap: taken candidates end up at heap[n - 1], heap[n - 2], ... */
static candidate take_heaviest(candidate *heap, uint32_t *n)
{
    const candidate top = heap[0];
    *n -= 1;
    heap[0] = heap[*n];
    heap[*n] = top;
    if (*n > 0) sift_down(heap, *n, 0);
    return top;
}

/* ---- drawing ---- */

static uint32_t highest(const float *logits, uint32_t n)
{
    uint32_t best = 0;
    for (uint32_t id = 1; id < n; id++)
        if (logits[id] > logits[best]) best = id;
    return best;
}

/* Weights relative to the likeliest, which has 1: nothing overflows. */
static void weigh(const float *logits, uint32_t n, float highest_logit, float temperature,
                  candidate *candidates)
{
    const float scale = 1.0F / temperature;
    for (uint32_t id = 0; id < n; id++)
        candidates[id] = (candidate){expf((logits[id] - highest_logit) * scale), id};
}

static double sum_weights(const candidate *candidates, uint32_t n)
{
    double sum = 0.0;
    for (uint32_t i = 0; i < n; i++) sum += (double)candidates[i].weight;
    return sum;
}

/* From all n: no order is needed, and the heap is left out. */
static uint32_t draw_from_all(const candidate *candidates, uint32_t n, kvl_random *random)
{
    double left = (double)kvl_random_uniform(random) * sum_weights(candidates, n);
    uint32_t last = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (candidates[i].weight == 0.0F) continue;
        last = i;
        left -= (double)candidates[i].weight;
        if (left < 0.0) break;
    }
    return candidates[last].token;
}

/* Takes candidates until top-k, top-p or min-p says enough, then draws from those taken. */
static uint32_t draw_from_heaviest(const kvl_sampling *sampling, candidate *heap, uint32_t n,
                                   kvl_random *random)
{
    const uint32_t n_all = n;
    const uint32_t n_most = sampling->top_k > 0 && sampling->top_k < n ? sampling->top_k : n;
    make_heap(heap, n);
    /* top-p is a share of what top-k leaves, so with top-k those come out first. */
    double total = 0.0;
    if (n_most < n_all) {
        for (uint32_t i = 0; i < n_most; i++) total += (double)take_heaviest(heap, &n).weight;
    } else {
        total = sum_weights(heap, n);
    }
    double sum = 0.0;
    uint32_t n_taken = 0;
    while (n_taken < n_most && (n_taken == 0 || sum < (double)sampling->top_p * total)) {
        const uint32_t at = n_all - 1 - n_taken;
        if (n > at) (void)take_heaviest(heap, &n);
        if (n_taken > 0 && heap[at].weight < sampling->min_p) break;
        sum += (double)heap[at].weight;
        n_taken++;
    }
    double left = (double)kvl_random_uniform(random) * sum;
    for (uint32_t i = 0; i < n_taken; i++) {
        left -= (double)heap[n_all - 1 - i].weight;
        if (left < 0.0) return heap[n_all - 1 - i].token;
    }
    return heap[n_all - n_taken].token;
}

static void fill_logprobs(const kvl_sampling *sampling, const float *logits, uint32_t n,
                          candidate *heap, kvl_drawn *drawn)
{
    const float top = logits[highest(logits, n)];
    double sum = 0.0;
    for (uint32_t id = 0; id < n; id++) sum += (double)expf(logits[id] - top);
    const float shift = top + (float)log(sum);
    drawn->logprob = logits[drawn->token] - shift;
    if (sampling->n_logprobs == 0) return;
    for (uint32_t id = 0; id < n; id++) heap[id] = (candidate){logits[id], id};
    make_heap(heap, n);
    const uint32_t n_top = sampling->n_logprobs < n ? sampling->n_logprobs : n;
    while (drawn->n_top < n_top) {
        const candidate next = take_heaviest(heap, &n);
        drawn->top[drawn->n_top++] = (kvl_logprob){next.token, next.weight - shift};
    }
}

void kvl_sampler_draw(kvl_sampler *sampler, size_t thread, const kvl_sampling *sampling,
                      const kvl_sampled_text *text, const float *logits, kvl_random *random,
                      kvl_drawn *drawn)
{
    KVL_ASSERT(thread < sampler->n_threads && text->n_prompt <= text->n_ids);
    scratch *own = &sampler->scratch[thread];
    const uint32_t n = sampler->n_vocab;
    const float *used = logits;
    if (has_penalties(sampling)) {
        memcpy(own->logits, logits, n * sizeof *logits);
        used = own->logits;
        if (sampling->repetition_penalty != 1.0F)
            penalise_repetition(sampling->repetition_penalty, text, own);
        penalise_answer(sampling, text, own);
    }
    *drawn = (kvl_drawn){.token = highest(used, n)};
    if (sampling->temperature > 0.0F) {
        weigh(used, n, used[drawn->token], sampling->temperature, own->candidates);
        const bool all =
            sampling->top_k == 0 && sampling->top_p >= 1.0F && !(sampling->min_p > 0.0F);
        drawn->token = all ? draw_from_all(own->candidates, n, random)
                           : draw_from_heaviest(sampling, own->candidates, n, random);
    }
    if (sampling->with_logprobs) fill_logprobs(sampling, logits, n, own->candidates, drawn);
}
