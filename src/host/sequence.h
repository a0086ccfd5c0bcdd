/* host/sequence.h: the ids and pages of one text that grows: what the scheduler batches.
 *
 * Pages are shared with the prefix tree and between forks, and copied when one that others hold
 * too is to be written (copy on write), so that a fork costs no page until it differs.
 * A kvl_session (host/engine.h) is for one prompt whose KV is had in many ways; a sequence is
 * small, so that there can be hundreds.
 * Threads  The engine thread only. */
#ifndef KVL_HOST_SEQUENCE_H
#define KVL_HOST_SEQUENCE_H

#include "host/engine.h"

/* The caller's storage; fields are read by anybody, written only here. */
typedef struct kvl_sequence {
    kvl_engine *engine; /* borrowed */
    uint64_t salt;      /* of the prefix tree */
    uint32_t *ids;      /* [n_ids] */
    uint32_t n_ids;
    uint32_t n_computed; /* leading ids whose KV is in the pages */
    uint32_t n_exact;    /* leading ids whose KV is exact where it is there: all, unless some was
                            placed; only that goes into the tree */
    uint32_t *pages;     /* [n_pages], at least as many as n_computed needs */
    uint32_t n_pages;
    size_t ids_max, pages_max; /* room in the arrays */
} kvl_sequence;

/* Errors   KVL_ERR_NO_MEMORY: the sequence is deinit'ed */
KVL_MUST_USE kvl_status kvl_sequence_init(kvl_sequence *sequence, kvl_engine *engine, uint64_t salt,
                                          const uint32_t *ids, uint32_t n_ids, kvl_error *error);
/* The same, with the KV of all ids but the last that a session holds: pages are shared.
 * n_exact  leading ids whose KV is that of a prefill
 * Errors   KVL_ERR_NO_MEMORY: the sequence is deinit'ed */
KVL_MUST_USE kvl_status kvl_sequence_of_session(kvl_sequence *sequence, kvl_engine *engine,
                                                uint64_t salt, const kvl_session *session,
                                                uint32_t n_exact, kvl_error *error);
/* Gives its pages back. A zeroed sequence does nothing. */
void kvl_sequence_deinit(kvl_sequence *sequence);

/* A child with the first n_ids ids of the parent, and what KV of them there is: pages are shared.
 * Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_sequence_fork(const kvl_sequence *parent, uint32_t n_ids,
                                          kvl_sequence *child, kvl_error *error);
/* Errors   KVL_ERR_NO_MEMORY: as before */
KVL_MUST_USE kvl_status kvl_sequence_append(kvl_sequence *sequence, uint32_t id, kvl_error *error);
/* Forgets everything from n_ids on, and gives back the pages that held only that. */
void kvl_sequence_truncate(kvl_sequence *sequence, uint32_t n_ids);

/* Forgets the KV of all tokens from n_computed on, as above, but keeps the ids. */
void kvl_sequence_forget(kvl_sequence *sequence, uint32_t n_computed);

/* Takes over KV that the prefix tree has and the sequence has not; never of the last id, since
 * whoever computes needs its logits. Errors   KVL_ERR_NO_MEMORY: as before */
KVL_MUST_USE kvl_status kvl_sequence_adopt(kvl_sequence *sequence, kvl_error *error);
/* How many leading ids the tree has: what adopting would leave computed. Changes nothing. */
uint32_t kvl_sequence_n_known(const kvl_sequence *sequence);
/* Gives the tree the whole pages of what is computed. Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_sequence_keep(kvl_sequence *sequence, kvl_error *error);

/* Pages that writing positions n_computed .. past - 1 needs and the sequence has not: new ones, and
 * one for a copy. */
uint32_t kvl_sequence_n_missing(const kvl_sequence *sequence, uint32_t past);
/* Has those pages, all its own from position n_computed on.
 * Errors   KVL_ERR_BUSY (not enough are free; nothing is evicted for it), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_sequence_reserve(kvl_sequence *sequence, uint32_t past,
                                             kvl_error *error);
/* Says that positions up to past - 1 have been computed. */
void kvl_sequence_advance(kvl_sequence *sequence, uint32_t past);

/* Leading ids that two sequences of one salt have in common; 0 for different salts. */
uint32_t kvl_sequence_n_common(const kvl_sequence *a, const kvl_sequence *b);

#endif /* KVL_HOST_SEQUENCE_H */
