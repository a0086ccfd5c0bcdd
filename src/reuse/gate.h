/* reuse/gate.h: whether an answer that approximate KV gave may be sent before it is checked.
 *
 * What tells a bad answer is not how far KV is off, but whether a second cache, with more of it
 * computed again, gives the same answer, and how sure the model was of its least sure token
 * (quality was measured for both: residuals of probes did not tell). The score unites the two; the
 * bar that it must reach is learnt from answers that were checked, key by key: a key is a template
 * or a collection, whose prompts are alike.
 * Pure: looks nothing up, allocates nothing.
 * Threads  Safe from any thread, one at a time for each gate. */
#ifndef KVL_REUSE_GATE_H
#define KVL_REUSE_GATE_H

#include <stdbool.h>
#include <stdint.h>

#define KVL_GATE_BINS 20u
/* Above every score: nothing passes. */
#define KVL_GATE_SHUT 2.0F

typedef struct kvl_gate_options {
    double precision_wanted; /* share of answers that pass which must be full prefill's; 0 .. 1 */
    float bar_first;         /* before enough was checked */
    float decay;             /* of what was learnt, with each outcome; 1: nothing is forgotten */
} kvl_gate_options;

kvl_gate_options kvl_gate_default_options(void);

/* Outcomes by score: bin b has those from b / KVL_GATE_BINS on. All zero: nothing learnt yet. */
typedef struct kvl_gate {
    float right[KVL_GATE_BINS], wrong[KVL_GATE_BINS];
} kvl_gate;

/* 0 where the two caches disagree: no bar lets that pass. Else the lowest probability, in either of
 * them, of the likeliest token at any place of the answer. */
float kvl_gate_score(bool agrees, float lowest_probability);

/* An answer of that score was checked. */
void kvl_gate_learn(kvl_gate *gate, const kvl_gate_options *options, float score, bool was_right);

/* The lowest bar, at a score that was right before, above which enough outcomes were right: of n
 * outcomes with w wrong ones, (w + 1) / (n + 2) (Laplace's rule) is what may be wrong of the next.
 * Where no bar has that, the first one while it is not refuted, and KVL_GATE_SHUT when it is. One
 * wrong outcome more never lowers it, where nothing is forgotten. */
float kvl_gate_bar(const kvl_gate *gate, const kvl_gate_options *options);

bool kvl_gate_passes(float score, float bar);

#endif /* KVL_REUSE_GATE_H */
