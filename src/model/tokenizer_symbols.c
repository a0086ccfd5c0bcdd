/* model/tokenizer_symbols.c: strings in one run of memory, found by an open hash table of their
 * numbers (XXH3, linear probing, at most three slots of five taken). */
#include "model/tokenizer_symbols.h"

#include "base/alloc.h"
#include "base/hash.h"

#include <string.h>

static uint32_t first_slot(const kvl_symbols *symbols, const char *bytes, size_t n_bytes)
{
    return (uint32_t)kvl_checksum(bytes, n_bytes) & (symbols->n_slots - 1);
}

/* The string must not be in the table, and the table must have a free slot. */
static void take_slot(kvl_symbols *symbols, uint32_t symbol)
{
    size_t n_bytes = 0;
    const char *bytes = kvl_symbols_bytes(symbols, symbol, &n_bytes);
    uint32_t slot = first_slot(symbols, bytes, n_bytes);
    while (symbols->slots[slot] != KVL_SYMBOL_NONE) slot = (slot + 1) & (symbols->n_slots - 1);
    symbols->slots[slot] = symbol;
}

static kvl_status no_memory(kvl_error *error)
{
    return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the vocabulary of a tokenizer");
}

/* The old table stays until the new one is there, so that an error leaves a table that works. */
static kvl_status grow_slots(kvl_symbols *symbols, uint32_t n_slots, kvl_error *error)
{
    uint32_t *old = symbols->slots;
    const uint32_t n_old = symbols->n_slots;
    uint32_t *slots = kvl_alloc((size_t)n_slots * sizeof *slots);
    if (slots == NULL) return no_memory(error);
    memset(slots, 0xff, (size_t)n_slots * sizeof *slots);
    symbols->slots = slots;
    symbols->n_slots = n_slots;
    for (uint32_t i = 0; i < n_old; i++) {
        if (old[i] != KVL_SYMBOL_NONE) take_slot(symbols, old[i]);
    }
    kvl_free(old);
    return KVL_OK;
}

static kvl_status grow_ends(kvl_symbols *symbols, uint32_t capacity, kvl_error *error)
{
    uint32_t *ends = kvl_realloc(symbols->ends, (size_t)capacity * sizeof *ends);
    if (ends == NULL) return no_memory(error);
    symbols->ends = ends;
    symbols->capacity = capacity;
    return KVL_OK;
}

static kvl_status grow_bytes(kvl_symbols *symbols, uint32_t capacity, kvl_error *error)
{
    char *bytes = kvl_realloc(symbols->bytes, capacity);
    if (bytes == NULL) return no_memory(error);
    symbols->bytes = bytes;
    symbols->bytes_capacity = capacity;
    return KVL_OK;
}

kvl_status kvl_symbols_init(kvl_symbols *symbols, uint32_t n_expected, size_t n_bytes_expected,
                            kvl_error *error)
{
    *symbols = (kvl_symbols){0};
    KVL_ASSERT(n_expected < UINT32_MAX / 8);
    if (n_bytes_expected > KVL_SYMBOLS_BYTES_MAX) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "tokens of the vocabulary have %zu bytes together; at most %u",
                        n_bytes_expected, KVL_SYMBOLS_BYTES_MAX);
    }
    uint32_t n_slots = 64;
    while (n_slots / 5 * 3 <= n_expected) n_slots *= 2;
    KVL_TRY(grow_slots(symbols, n_slots, error));
    KVL_TRY(grow_ends(symbols, n_expected + 16, error));
    return grow_bytes(symbols, (uint32_t)n_bytes_expected + 64, error);
}

void kvl_symbols_deinit(kvl_symbols *symbols)
{
    kvl_free(symbols->bytes);
    kvl_free(symbols->ends);
    kvl_free(symbols->slots);
    *symbols = (kvl_symbols){0};
}

/* Whatever can fail happens here, before anything changes. Limits are subtracted from, never added
 * to, so nothing can wrap; 2 * needed stays below UINT32_MAX because of the limit. */
static kvl_status make_room(kvl_symbols *symbols, size_t n_bytes, bool findable, kvl_error *error)
{
    const uint32_t used = symbols->n == 0 ? 0 : symbols->ends[symbols->n - 1];
    if (n_bytes > KVL_SYMBOLS_BYTES_MAX - used || symbols->n >= UINT32_MAX / 16) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "vocabulary and merges have more than %u bytes or %u strings",
                        KVL_SYMBOLS_BYTES_MAX, UINT32_MAX / 16);
    }
    const uint32_t needed = used + (uint32_t)n_bytes;
    if (needed > symbols->bytes_capacity) KVL_TRY(grow_bytes(symbols, 2 * needed, error));
    if (symbols->n == symbols->capacity) KVL_TRY(grow_ends(symbols, 2 * symbols->n, error));
    if (findable && symbols->n_findable >= symbols->n_slots / 5 * 3) {
        KVL_TRY(grow_slots(symbols, 2 * symbols->n_slots, error));
    }
    return KVL_OK;
}

kvl_status kvl_symbols_add(kvl_symbols *symbols, const char *bytes, size_t n_bytes, bool findable,
                           kvl_error *error)
{
    KVL_ASSERT(!findable || kvl_symbols_find(symbols, bytes, n_bytes) == KVL_SYMBOL_NONE);
    KVL_TRY(make_room(symbols, n_bytes, findable, error));
    const uint32_t used = symbols->n == 0 ? 0 : symbols->ends[symbols->n - 1];
    if (n_bytes > 0) memcpy(symbols->bytes + used, bytes, n_bytes);
    symbols->ends[symbols->n] = used + (uint32_t)n_bytes;
    symbols->n++;
    if (!findable) return KVL_OK;
    take_slot(symbols, symbols->n - 1);
    symbols->n_findable++;
    return KVL_OK;
}

/* Ends because a table always has free slots. */
uint32_t kvl_symbols_find(const kvl_symbols *symbols, const char *bytes, size_t n_bytes)
{
    uint32_t slot = first_slot(symbols, bytes, n_bytes);
    for (;;) {
        const uint32_t symbol = symbols->slots[slot];
        if (symbol == KVL_SYMBOL_NONE) return KVL_SYMBOL_NONE;
        size_t n_found = 0;
        const char *found = kvl_symbols_bytes(symbols, symbol, &n_found);
        if (n_found == n_bytes && memcmp(found, bytes, n_bytes) == 0) return symbol;
        slot = (slot + 1) & (symbols->n_slots - 1);
    }
}

const char *kvl_symbols_bytes(const kvl_symbols *symbols, uint32_t symbol, size_t *n_bytes)
{
    KVL_ASSERT(symbol < symbols->n);
    const uint32_t first = symbol == 0 ? 0 : symbols->ends[symbol - 1];
    *n_bytes = symbols->ends[symbol] - first;
    return symbols->bytes + first;
}
