/* model/tokenizer_specials.c: finding special tokens in text, and which texts are special. */
#include "model/tokenizer_specials.h"

#include "base/alloc.h"
#include "model/tokenizer.h"

#include <stdlib.h>
#include <string.h>

static int longest_first(const void *a, const void *b)
{
    const kvl_special *one = a;
    const kvl_special *other = b;
    if (one->n_bytes != other->n_bytes) return one->n_bytes > other->n_bytes ? -1 : 1;
    return one->id < other->id ? -1 : one->id > other->id;
}

void kvl_specials_sort(kvl_specials *specials)
{
    if (specials->n > 1)
        qsort(specials->items, specials->n, sizeof *specials->items, longest_first);
}

/* ---- cutting */

static kvl_status append(kvl_fragments *fragments, size_t first, size_t past, uint32_t id,
                         kvl_error *error)
{
    if (first == past) return KVL_OK;
    if (fragments->n == fragments->capacity) {
        const size_t capacity = fragments->capacity == 0 ? 16 : 2 * fragments->capacity;
        kvl_fragment *items = kvl_realloc(fragments->items, capacity * sizeof *items);
        if (items == NULL) {
            return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for %zu special tokens of a text",
                            capacity);
        }
        fragments->items = items;
        fragments->capacity = capacity;
    }
    fragments->items[fragments->n++] = (kvl_fragment){first, past, id};
    return KVL_OK;
}

/* Appends a fragment cut at every occurrence of one special token. */
static kvl_status cut_fragment(const kvl_special *special, const char *text,
                               const kvl_fragment *fragment, kvl_fragments *result,
                               kvl_error *error)
{
    size_t first = fragment->first;
    while (fragment->id == KVL_TOKEN_NONE && fragment->past - first >= special->n_bytes) {
        const char *found =
            memmem(text + first, fragment->past - first, special->text, special->n_bytes);
        if (found == NULL) break;
        const size_t at = (size_t)(found - text);
        KVL_TRY(append(result, first, at, KVL_TOKEN_NONE, error));
        KVL_TRY(append(result, at, at + special->n_bytes, special->id, error));
        first = at + special->n_bytes;
    }
    return append(result, first, fragment->past, fragment->id, error);
}

kvl_status kvl_specials_cut(const kvl_specials *specials, const char *text, size_t n_bytes,
                            bool parse_special, kvl_fragments *fragments, kvl_error *error)
{
    fragments->n = 0;
    KVL_TRY(append(fragments, 0, n_bytes, KVL_TOKEN_NONE, error));
    kvl_fragments cut = {0};
    kvl_status status = KVL_OK;
    for (uint32_t i = 0; i < specials->n && status >= 0; i++) {
        const kvl_special *special = &specials->items[i];
        if (!special->always && !parse_special) continue;
        /* Most tokens are nowhere in most texts, and then the fragments need not be copied. */
        if (memmem(text, n_bytes, special->text, special->n_bytes) == NULL) continue;
        cut.n = 0;
        for (size_t f = 0; f < fragments->n && status >= 0; f++) {
            status = cut_fragment(special, text, &fragments->items[f], &cut, error);
        }
        if (status < 0) break;
        const kvl_fragments swapped = *fragments;
        *fragments = cut;
        cut = swapped;
    }
    kvl_fragments_deinit(&cut);
    return status;
}

void kvl_fragments_deinit(kvl_fragments *fragments)
{
    kvl_free(fragments->items);
    *fragments = (kvl_fragments){0};
}

/* ---- known texts */

/* Files often mark these as ordinary tokens, so llama.cpp goes by their text; this is its list,
 * found by trying. An answer is over after those of the first part; padding and the marks between
 * files of code-completing models are among them. */
static const char *const ending[] = {
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
    "<|eom_id|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "</s>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
};

/* Where the parts of a file begin for a model that completes code. */
static const char *const not_ending[] = {
    "<|fim_prefix|>",  "<fim-prefix>",    "<fim_prefix>",   "<｜fim▁begin｜>", "<PRE>",
    "▁<PRE>",          "<|code_prefix|>", "<|fim_suffix|>", "<fim-suffix>",    "<fim_suffix>",
    "<｜fim▁hole｜>",  "<SUF>",           "▁<SUF>",         "<|code_suffix|>", "<|fim_middle|>",
    "<fim-middle>",    "<fim_middle>",    "<｜fim▁end｜>",  "<MID>",           "▁<MID>",
    "<|code_middle|>",
};

static bool is_among(const char *const *list, size_t n, const char *text, size_t n_bytes)
{
    for (size_t i = 0; i < n; i++) {
        if (strlen(list[i]) == n_bytes && memcmp(list[i], text, n_bytes) == 0) return true;
    }
    return false;
}

bool kvl_special_is_known(const char *text, size_t n_bytes, bool *ends)
{
    *ends = is_among(ending, sizeof ending / sizeof ending[0], text, n_bytes);
    return *ends || is_among(not_ending, sizeof not_ending / sizeof not_ending[0], text, n_bytes);
}
