/* reuse/correct.h: what is done to KV that was placed, so that it looks more like KV in context
 * before the selected tokens are computed among it.
 *
 * A table of corrections, as reuse/select.h is one of selections. Anchors (reuse/anchor.h) are an
 * older path and only named here. A mean by position is learnt from exact prompts; probes are the
 * tokens that are computed again anyway, and move the others as far as they moved themselves
 * (AgentKVShift, arXiv:2607.21604). Keys are always the ones before rotation, so that what was
 * seen at one position holds at another. Layer 0 depends on the token alone and is never changed.
 * Pure: looks nothing up.
 * Threads  Safe from any thread; nobody may learn while another applies. */
#ifndef KVL_REUSE_CORRECT_H
#define KVL_REUSE_CORRECT_H

#include "base/status.h"
#include "reuse/anchor.h"

typedef enum kvl_correct_kind {
    KVL_CORRECT_NONE,
    KVL_CORRECT_ANCHORS, /* KVCOMM (arXiv:2510.12872); of a workflow's templates */
    KVL_CORRECT_MEAN,
    KVL_CORRECT_PROBE,
} kvl_correct_kind;

typedef struct kvl_correction {
    const char *name; /* static */
    kvl_correct_kind kind;
} kvl_correction;

/* A table, ended by one without name. */
extern const kvl_correction kvl_corrections[];
/* NULL where there is none of that name. */
const kvl_correction *kvl_correct_find(const char *name);

/* ---- mean by position ---- */

/* The first tokens of a text draw attention for want of anything before them, each in its own way;
 * all others have one row. */
#define KVL_MEAN_ROWS 17u

/* How KV in context differed from KV at home, in the mean, of texts of one kind. */
typedef struct kvl_mean {
    uint32_t n_layers, n_kv_heads, head_dim;
    uint64_t n_tokens[KVL_MEAN_ROWS]; /* that each row was learnt from */
    float *keys, *values;             /* [n_layers][KVL_MEAN_ROWS][n_kv_heads][head_dim] */
    double *sums;                     /* [2][n_kv_heads][head_dim] scratch */
} kvl_mean;

/* Zero everywhere: it changes nothing.
 * Owns     mean's members: ended with kvl_mean_deinit
 * Errors   KVL_ERR_NO_MEMORY, KVL_ERR_TOO_LARGE */
KVL_MUST_USE kvl_status kvl_mean_init(kvl_mean *mean, uint32_t n_layers, uint32_t n_kv_heads,
                                      uint32_t head_dim, kvl_error *error);
void kvl_mean_deinit(kvl_mean *mean);

/* Takes one text into the running mean.
 * in_context, at_home  of the same tokens, in the mean's shape; keys before rotation */
void kvl_mean_learn(kvl_mean *mean, const kvl_kv_view *in_context, const kvl_kv_view *at_home);

/* Adds the rows of tokens token_first .. token_first + n - 1 of a text to one layer of their KV.
 * keys, values  [n][n_kv_heads][head_dim] */
void kvl_mean_apply(const kvl_mean *mean, uint32_t layer, uint32_t token_first, uint32_t n,
                    float *keys, float *values);

/* ---- probes ---- */

/* How much of the probes' shift each other token gets: its deviation over the probes' mean one, at
 * most 1; 0 where a deviation is no number, or the probes have none.
 * deviation  by position, |dK|^2 + |dV|^2
 * weights    [n_others] */
void kvl_probe_weights(const float *deviation, const uint32_t *probes, uint32_t n_probes,
                       const uint32_t *others, uint32_t n_others, float *weights);
/* Mean of fresh - stale over rows.
 * fresh, stale  [n][width]; shift [width]; n = 0 gives zero */
void kvl_probe_shift(const float *fresh, const float *stale, uint32_t n, size_t width,
                     float *shift);
/* rows [n][width] += weights [n] * shift [width] */
void kvl_probe_apply(const float *shift, const float *weights, uint32_t n, size_t width,
                     float *rows);

#endif /* KVL_REUSE_CORRECT_H */
