/* model/tokenizer_merges.h: byte-pair encoding of one word. Private to the room.
 *
 * Method   Sennrich et al., arXiv:1508.07909, section 3.2, over bytes: the pair of neighbours that
 *          comes first in the list of merges becomes one, the leftmost of equals first, until no
 *          pair is in the list. A heap of pairs and a chained list of what is left make it
 *          O(n log n), whatever the word.
 * Threads  Merges never change once filled; a word belongs to one call. */
#ifndef KVL_MODEL_TOKENIZER_MERGES_H
#define KVL_MODEL_TOKENIZER_MERGES_H

#include "base/status.h"

typedef struct kvl_merge_slot {
    uint32_t left, right; /* symbols; left KVL_SYMBOL_NONE: free */
    uint32_t rank;
} kvl_merge_slot;

typedef struct kvl_merges {
    kvl_merge_slot *slots; /* hash table, [n_slots], a power of two */
    uint32_t n_slots;
    uint32_t *results; /* [capacity] by rank: the symbol that the pair becomes */
    uint32_t capacity;
} kvl_merges;

/* Room for ranks 0 .. n_merges - 1.
 * Errors   KVL_ERR_NO_MEMORY; kvl_merges_deinit after an error too */
KVL_MUST_USE kvl_status kvl_merges_init(kvl_merges *merges, uint32_t n_merges, kvl_error *error);
void kvl_merges_deinit(kvl_merges *merges);

/* Of two merges of the same pair the one added first counts. Each rank once at most. */
void kvl_merges_add(kvl_merges *merges, uint32_t rank, uint32_t left, uint32_t right,
                    uint32_t result);

/* A symbol of a word and its neighbours. */
typedef struct kvl_merge_node {
    uint32_t symbol;
    uint32_t previous, next; /* index, or KVL_SYMBOL_NONE at the ends */
    uint32_t rank;           /* of the pair (this, next); KVL_SYMBOL_NONE if it is in no list */
} kvl_merge_node;

/* Room for the longest word so far. Zeroed to begin with. */
typedef struct kvl_merge_word {
    kvl_merge_node *nodes;
    uint64_t *heap; /* rank << 32 | index of the left one; [2 * capacity] */
    size_t capacity;
} kvl_merge_word;

void kvl_merge_word_deinit(kvl_merge_word *word);
/* Errors   KVL_ERR_NO_MEMORY, KVL_ERR_TOO_LARGE */
KVL_MUST_USE kvl_status kvl_merge_word_reserve(kvl_merge_word *word, size_t n_symbols,
                                               kvl_error *error);

/* Merges the symbols of nodes 0 .. n_symbols - 1 (n_symbols > 0, reserved). What is left is the
 * chain that begins at node 0. A symbol KVL_SYMBOL_NONE is never merged. */
void kvl_merge_word_run(const kvl_merges *merges, kvl_merge_word *word, size_t n_symbols);

#endif /* KVL_MODEL_TOKENIZER_MERGES_H */
