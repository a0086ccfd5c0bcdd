/* model/tokenizer_symbols.h: the byte strings that byte-pair encoding works on, numbered. Private
 * to the room.
 *
 * The first numbers are the tokens of the vocabulary, in its order; behind them stand strings that
 * only merges know. A string can be stored without being findable: special tokens are.
 * Threads  One while it is filled; afterwards it never changes. */
#ifndef KVL_MODEL_TOKENIZER_SYMBOLS_H
#define KVL_MODEL_TOKENIZER_SYMBOLS_H

#include "base/status.h"

#define KVL_SYMBOL_NONE UINT32_MAX
/* All strings together; the largest vocabulary known has 3 MiB. */
#define KVL_SYMBOLS_BYTES_MAX (256u << 20)

typedef struct kvl_symbols {
    char *bytes;    /* all strings, one after the other */
    uint32_t *ends; /* [n] where each ends in `bytes` */
    uint32_t n;
    uint32_t capacity; /* of `ends` */
    uint32_t bytes_capacity;
    uint32_t
        *slots; /* hash table of findable ones, [n_slots], a power of two, KVL_SYMBOL_NONE: free */
    uint32_t n_slots;
    uint32_t n_findable;
} kvl_symbols;

/* Room for n_expected strings of n_bytes_expected together; more is made when needed.
 * Errors   KVL_ERR_NO_MEMORY; kvl_symbols_deinit after an error too */
KVL_MUST_USE kvl_status kvl_symbols_init(kvl_symbols *symbols, uint32_t n_expected,
                                         size_t n_bytes_expected, kvl_error *error);
void kvl_symbols_deinit(kvl_symbols *symbols);

/* Appends a string as number symbols->n. A findable one must not be findable yet.
 * Errors   KVL_ERR_TOO_LARGE, KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_symbols_add(kvl_symbols *symbols, const char *bytes, size_t n_bytes,
                                        bool findable, kvl_error *error);

/* KVL_SYMBOL_NONE if there is no findable string of these bytes. */
uint32_t kvl_symbols_find(const kvl_symbols *symbols, const char *bytes, size_t n_bytes);

/* symbol < symbols->n. Borrowed until the next add. */
const char *kvl_symbols_bytes(const kvl_symbols *symbols, uint32_t symbol, size_t *n_bytes);

#endif /* KVL_MODEL_TOKENIZER_SYMBOLS_H */
