/* model/pretokenize.c: the patterns of the pre-tokenizers, over bytes of classes. */
#include "model/pretokenize.h"

#include "base/alloc.h"
#include "model/unicode_class.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <string.h>

struct kvl_pretokenizer {
    pcre2_general_context *memory;
    pcre2_match_context *limits;
    pcre2_code *code;
};

/* What stands inside brackets: letters, numbers, spaces. A class other than ASCII is 0x80 + 4 *
 * class + length - 1, so each of them has four bytes. */
#define L "A-Za-z\\x84-\\x87"
#define N "0-9\\x88-\\x8b"
#define S "\\t-\\r \\x8c-\\x8f"

/* Endings of English verbs. The second form is for either case; it lists letters because Unicode
 * has more small and capital letters that fold to s than these two. */
#define ENDINGS "'(?:[stmd]|re|ve|ll)"
#define ENDINGS_ANY_CASE "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"

/* A run of spaces before something else leaves its last one to the next word; a run at the end of
 * the text does not. */
#define SPACES "[" S "]+(?![^" S "])|[" S "]++"

/* A word with the one character before it, marks with the line ends after them, spaces up to the
 * last line end. What is between is how many digits make a word. */
#define LLAMA_3(digits)                                                                            \
    ENDINGS_ANY_CASE "|[^\\r\\n" L N "]?[" L "]++|" digits "| ?[^" S L N "]++[\\r\\n]*+"           \
                     "|[" S "]*[\\r\\n]++|" SPACES

/* Repetitions are possessive (++) wherever what follows cannot match what they took: nothing to
 * step back to means nothing to remember. */
static const char *const patterns[KVL_PRETOKENIZER_KIND_COUNT] = {
    [KVL_PRETOKENIZER_GPT2] = ENDINGS "| ?[" L "]++| ?[" N "]++| ?[^" S L N "]++|" SPACES,
    /* Digits are cut out first, and each piece between is then a text of its own: spaces before a
     * digit are at the end of their text. */
    [KVL_PRETOKENIZER_SMOLLM] = ENDINGS "| ?[" L "]++|[" N "]| ?[^" S L N "]++"
                                        "|[" S "]++(?=[" N "]|\\z)|" SPACES,
    [KVL_PRETOKENIZER_QWEN2] = LLAMA_3("[" N "]"),
    [KVL_PRETOKENIZER_LLAMA_BPE] = LLAMA_3("[" N "]{1,3}+"),
};

/* Names of tokenizer.ggml.pre. */
static const struct {
    const char *name;
    kvl_pretokenizer_kind kind;
} names[] = {
    {"gpt-2", KVL_PRETOKENIZER_GPT2},       {"smollm", KVL_PRETOKENIZER_SMOLLM},
    {"qwen2", KVL_PRETOKENIZER_QWEN2},      {"llama-bpe", KVL_PRETOKENIZER_LLAMA_BPE},
    {"llama3", KVL_PRETOKENIZER_LLAMA_BPE}, {"llama-v3", KVL_PRETOKENIZER_LLAMA_BPE},
};

bool kvl_pretokenizer_kind_of(const char *name, size_t n_bytes, kvl_pretokenizer_kind *kind)
{
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (strlen(names[i].name) != n_bytes || memcmp(names[i].name, name, n_bytes) != 0) continue;
        *kind = names[i].kind;
        return true;
    }
    return false;
}

const char *kvl_pretokenizer_names(void)
{
    return "gpt-2, smollm, qwen2, llama-bpe (llama3, llama-v3)";
}

/* ---- the library's memory comes from base/alloc.h too */

static void *take(size_t size, void *unused)
{
    (void)unused;
    return kvl_alloc(size);
}

static void give(void *memory, void *unused)
{
    (void)unused;
    kvl_free(memory);
}

static kvl_status compile(kvl_pretokenizer *pretokenizer, kvl_pretokenizer_kind kind,
                          kvl_error *error)
{
    pretokenizer->memory = pcre2_general_context_create(take, give, NULL);
    if (pretokenizer->memory == NULL) {
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the patterns of the tokenizer");
    }
    pcre2_compile_context *context = pcre2_compile_context_create(pretokenizer->memory);
    pretokenizer->limits = pcre2_match_context_create(pretokenizer->memory);
    int reason = PCRE2_ERROR_NOMEMORY;
    size_t offset = 0;
    if (context != NULL && pretokenizer->limits != NULL) {
        pretokenizer->code =
            pcre2_compile((PCRE2_SPTR)patterns[kind], PCRE2_ZERO_TERMINATED,
                          PCRE2_ANCHORED | PCRE2_DOTALL, &reason, &offset, context);
    }
    pcre2_compile_context_free(context);
    if (pretokenizer->code != NULL) return KVL_OK;
    /* The patterns are ours: memory is all that can be missing. Its number while compiling (121)
     * has no name in the header. */
    return KVL_FAIL(error, KVL_ERR_NO_MEMORY,
                    "pattern of the pre-tokenizer not compiled at %zu, reason %d", offset, reason);
}

kvl_status kvl_pretokenizer_create(kvl_pretokenizer_kind kind, bool use_machine_code,
                                   kvl_pretokenizer **pretokenizer, kvl_error *error)
{
    KVL_ASSERT(kind >= 0 && kind < KVL_PRETOKENIZER_KIND_COUNT);
    *pretokenizer = NULL;
    kvl_pretokenizer *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a pre-tokenizer");
    const kvl_status status = compile(made, kind, error);
    if (status < 0) {
        kvl_pretokenizer_destroy(made);
        return status;
    }
    /* The interpreter counts every step back of a repetition of one character; there is at most one
     * for each character of a text, whose length has a limit of its own. */
    pcre2_set_match_limit(made->limits, UINT32_MAX);
    /* Without machine code (no support, or a system that forbids it) the interpreter does it. */
    if (use_machine_code) (void)pcre2_jit_compile(made->code, PCRE2_JIT_COMPLETE);
    *pretokenizer = made;
    return KVL_OK;
}

void kvl_pretokenizer_destroy(kvl_pretokenizer *pretokenizer)
{
    if (pretokenizer == NULL) return;
    pcre2_code_free(pretokenizer->code);
    pcre2_match_context_free(pretokenizer->limits);
    pcre2_general_context_free(pretokenizer->memory);
    kvl_free(pretokenizer);
}

kvl_pretokenizer_match *kvl_pretokenizer_match_create(const kvl_pretokenizer *of)
{
    return (kvl_pretokenizer_match *)pcre2_match_data_create(1, of->memory);
}

void kvl_pretokenizer_match_destroy(kvl_pretokenizer_match *match)
{
    pcre2_match_data_free((pcre2_match_data *)match);
}

/* ---- matching */

size_t kvl_pretokenizer_classify(const char *text, size_t n_bytes, uint8_t *classes)
{
    size_t n_classes = 0;
    for (size_t at = 0; at < n_bytes;) {
        const uint8_t byte = (uint8_t)text[at];
        if (byte < 0x80) {
            classes[n_classes++] = byte;
            at++;
            continue;
        }
        uint32_t code_point = 0;
        const size_t length = kvl_utf8_read(text + at, n_bytes - at, &code_point);
        if (length == 0) {
            classes[n_classes++] = KVL_CLASS_BAD_BYTE;
            at++;
            continue;
        }
        const unsigned kind = (unsigned)kvl_unicode_class_of(code_point);
        classes[n_classes++] = (uint8_t)(0x80u | kind << 2 | (unsigned)(length - 1));
        at += length;
    }
    return n_classes;
}

kvl_status kvl_pretokenizer_next(const kvl_pretokenizer *pretokenizer,
                                 kvl_pretokenizer_match *match, const uint8_t *classes,
                                 size_t n_classes, size_t first, size_t *past, kvl_error *error)
{
    KVL_ASSERT(first < n_classes);
    pcre2_match_data *data = (pcre2_match_data *)match;
    const int found = pcre2_match(pretokenizer->code, classes, n_classes, first, PCRE2_NO_UTF_CHECK,
                                  data, pretokenizer->limits);
    if (found == PCRE2_ERROR_NOMEMORY || found == PCRE2_ERROR_HEAPLIMIT) {
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for cutting a text into words");
    }
    if (found < 0) {
        return KVL_FAIL(error, KVL_ERR_INTERNAL, "pre-tokenizer gave %d at character %zu", found,
                        first);
    }
    *past = pcre2_get_ovector_pointer(data)[1];
    KVL_ASSERT(*past > first && *past <= n_classes);
    return KVL_OK;
}
