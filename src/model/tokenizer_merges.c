/* model/tokenizer_merges.c: the table of merges and the merging of a word. */
#include "model/tokenizer_merges.h"

#include "base/alloc.h"
#include "model/tokenizer_symbols.h"

#include <string.h>

#define NONE KVL_SYMBOL_NONE

/* ---- table */

kvl_status kvl_merges_init(kvl_merges *merges, uint32_t n_merges, kvl_error *error)
{
    *merges = (kvl_merges){0};
    KVL_ASSERT(n_merges < UINT32_MAX / 8);
    uint32_t n_slots = 64;
    while (n_slots / 5 * 3 <= n_merges) n_slots *= 2;
    merges->slots = kvl_alloc((size_t)n_slots * sizeof *merges->slots);
    merges->results = kvl_alloc_zero((size_t)n_merges + 1, sizeof *merges->results);
    if (merges->slots == NULL || merges->results == NULL) {
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for %u merges of a tokenizer",
                        n_merges);
    }
    memset(merges->slots, 0xff, (size_t)n_slots * sizeof *merges->slots);
    merges->n_slots = n_slots;
    merges->capacity = n_merges;
    return KVL_OK;
}

void kvl_merges_deinit(kvl_merges *merges)
{
    kvl_free(merges->slots);
    kvl_free(merges->results);
    *merges = (kvl_merges){0};
}

/* The slot of a pair, or the free one where it belongs. The table is never full. */
static kvl_merge_slot *slot_of(const kvl_merges *merges, uint32_t left, uint32_t right)
{
    const uint64_t pair = (uint64_t)left << 32 | right;
    /* Fibonacci hashing: the high half of the product depends on every bit of the pair. */
    uint32_t at = (uint32_t)((pair * UINT64_C(0x9e3779b97f4a7c15)) >> 32) & (merges->n_slots - 1);
    for (;;) {
        kvl_merge_slot *slot = &merges->slots[at];
        if (slot->left == NONE || (slot->left == left && slot->right == right)) return slot;
        at = (at + 1) & (merges->n_slots - 1);
    }
}

void kvl_merges_add(kvl_merges *merges, uint32_t rank, uint32_t left, uint32_t right,
                    uint32_t result)
{
    KVL_ASSERT(rank < merges->capacity);
    KVL_ASSERT(left != NONE && right != NONE && result != NONE);
    kvl_merge_slot *slot = slot_of(merges, left, right);
    if (slot->left != NONE) return;
    *slot = (kvl_merge_slot){left, right, rank};
    merges->results[rank] = result;
}

static uint32_t rank_of(const kvl_merges *merges, uint32_t left, uint32_t right)
{
    if (left == NONE || right == NONE) return NONE;
    const kvl_merge_slot *slot = slot_of(merges, left, right);
    return slot->left == NONE ? NONE : slot->rank;
}

/* ---- words */

void kvl_merge_word_deinit(kvl_merge_word *word)
{
    kvl_free(word->nodes);
    kvl_free(word->heap);
    *word = (kvl_merge_word){0};
}

kvl_status kvl_merge_word_reserve(kvl_merge_word *word, size_t n_symbols, kvl_error *error)
{
    if (n_symbols <= word->capacity) return KVL_OK;
    if (n_symbols > UINT32_MAX / 4) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "a word of %zu bytes; at most %u", n_symbols,
                        UINT32_MAX / 4);
    }
    kvl_merge_word_deinit(word);
    const size_t capacity = n_symbols < 1024 ? 1024 : n_symbols;
    word->nodes = kvl_alloc(capacity * sizeof *word->nodes);
    /* Every merge takes one pair off the heap and puts at most two on, so of n - 1 pairs and at
     * most n - 1 merges no more than 2 n are ever on it. */
    word->heap = kvl_alloc(2 * capacity * sizeof *word->heap);
    if (word->nodes == NULL || word->heap == NULL) {
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a word of %zu bytes", n_symbols);
    }
    word->capacity = capacity;
    return KVL_OK;
}

/* Puts a pair on a heap of n: heap[0] is the smallest, below i are 2 i + 1 and 2 i + 2. */
static void heap_push(uint64_t *heap, size_t n, uint64_t pair)
{
    size_t at = n;
    while (at > 0) {
        const size_t parent = (at - 1) / 2;
        if (heap[parent] <= pair) break;
        heap[at] = heap[parent];
        at = parent;
    }
    heap[at] = pair;
}

/* Takes the smallest of n > 0. */
static uint64_t heap_pop(uint64_t *heap, size_t n)
{
    const uint64_t smallest = heap[0];
    const uint64_t last = heap[n - 1];
    size_t at = 0;
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= n - 1) break;
        if (child + 1 < n - 1 && heap[child + 1] < heap[child]) child++;
        if (last <= heap[child]) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = last;
    return smallest;
}

/* Looks up the pair that begins at a node and puts it on the heap if it can be merged. */
static size_t queue_pair(const kvl_merges *merges, kvl_merge_word *word, uint32_t left,
                         size_t n_heap)
{
    kvl_merge_node *node = &word->nodes[left];
    node->rank =
        node->next == NONE ? NONE : rank_of(merges, node->symbol, word->nodes[node->next].symbol);
    if (node->rank == NONE) return n_heap;
    KVL_ASSERT(n_heap < 2 * word->capacity);
    heap_push(word->heap, n_heap, (uint64_t)node->rank << 32 | left);
    return n_heap + 1;
}

void kvl_merge_word_run(const kvl_merges *merges, kvl_merge_word *word, size_t n_symbols)
{
    KVL_ASSERT(n_symbols > 0 && n_symbols <= word->capacity);
    kvl_merge_node *nodes = word->nodes;
    const uint32_t n = (uint32_t)n_symbols;
    for (uint32_t i = 0; i < n; i++) {
        nodes[i].previous = i == 0 ? NONE : i - 1;
        nodes[i].next = i + 1 == n ? NONE : i + 1;
    }
    size_t n_heap = 0;
    for (uint32_t i = 0; i < n; i++) n_heap = queue_pair(merges, word, i, n_heap);

    while (n_heap > 0) {
        const uint64_t pair = heap_pop(word->heap, n_heap--);
        const uint32_t left = (uint32_t)pair;
        kvl_merge_node *node = &nodes[left];
        /* A pair on the heap is out of date when one of its two was merged since: then its left
         * node has another rank, or none because it is gone. If it has the same rank again, it is
         * the same pair again. */
        if (node->rank != (uint32_t)(pair >> 32)) continue;
        kvl_merge_node *right = &nodes[node->next];
        node->symbol = merges->results[node->rank];
        node->next = right->next;
        right->rank = NONE;
        if (node->next != NONE) nodes[node->next].previous = left;
        n_heap = queue_pair(merges, word, left, n_heap);
        if (node->previous != NONE) n_heap = queue_pair(merges, word, node->previous, n_heap);
    }
}
