/* host/sampling.h: how the next token is drawn from logits.
 *
 * In order: repetition, presence and frequency penalties; temperature; top-k; top-p; min-p; then
 * one draw. Candidates are taken by weight, the lower id first among equals, and sums are in
 * double, so that the same logits, options and random state always give the same token.
 * Threads  A sampler's scratch is for one thread at a time; different threads use different
 *          `thread` numbers. */
#ifndef KVL_HOST_SAMPLING_H
#define KVL_HOST_SAMPLING_H

#include "base/random.h"
#include "base/status.h"

#define KVL_LOGPROBS_MAX 20u

typedef struct kvl_sampling {
    float temperature;        /* 0: the likeliest token, the lowest id among equals */
    uint32_t top_k;           /* 0: all */
    float top_p;              /* (0, 1]; 1: all */
    float min_p;              /* [0, 1], of the likeliest token's weight; 0: all */
    float repetition_penalty; /* > 0; 1: none. Tokens of prompt and answer (arXiv:1909.05858) */
    float presence_penalty;   /* taken from the logit of every token of the answer */
    float frequency_penalty;  /* the same, once for every time that it stands there */
    bool with_logprobs;       /* of the token drawn, and of the likeliest n_logprobs */
    uint32_t n_logprobs;      /* at most KVL_LOGPROBS_MAX */
} kvl_sampling;

/* Greedy, without penalties. */
kvl_sampling kvl_sampling_default(void);

/* Errors   KVL_ERR_OUT_OF_RANGE: `error` names the option and its range */
KVL_MUST_USE kvl_status kvl_sampling_check(const kvl_sampling *sampling, kvl_error *error);

typedef struct kvl_logprob {
    uint32_t token;
    float logprob; /* of the model itself: before penalties and temperature */
} kvl_logprob;

typedef struct kvl_drawn {
    uint32_t token;
    float logprob;  /* where with_logprobs */
    uint32_t n_top; /* likeliest first */
    kvl_logprob top[KVL_LOGPROBS_MAX];
} kvl_drawn;

/* What came before: of ids [n_ids] the first n_prompt are the prompt's. Borrowed for a call. */
typedef struct kvl_sampled_text {
    const uint32_t *ids;
    uint32_t n_ids, n_prompt;
} kvl_sampled_text;

typedef struct kvl_sampler kvl_sampler;

/* Scratch for n_threads threads.
 * Owns     *sampler: ended with kvl_sampler_destroy
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_sampler_create(uint32_t n_vocab, size_t n_threads,
                                           kvl_sampler **sampler, kvl_error *error);
/* NULL does nothing. */
void kvl_sampler_destroy(kvl_sampler *sampler);

/* logits [n_vocab], as the model gave them. The random state moves where temperature > 0. */
void kvl_sampler_draw(kvl_sampler *sampler, size_t thread, const kvl_sampling *sampling,
                      const kvl_sampled_text *text, const float *logits, kvl_random *random,
                      kvl_drawn *drawn);

#endif /* KVL_HOST_SAMPLING_H */
