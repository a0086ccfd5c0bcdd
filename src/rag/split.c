/* rag/split.c: one scan finds the gaps, a second one the strongest of each neighbourhood; what is
 * still too long is halved. */
#include "rag/split.h"

#include "base/alloc.h"
#include "base/hash.h"

#include <string.h>

/* Sizes are in tenths of a token. */
enum { WORD_SIZE = 13, SIGN_SIZE = 10, TENTHS = 10 };

typedef enum strength { LINE, SENTENCE, ITEM, CODE_BLANK, BLOCK, HEADING } strength;

typedef struct gap {
    size_t at;   /* byte */
    size_t size; /* of everything before it */
    strength kind;
    uint32_t n_words;   /* of the unit behind it */
    uint64_t hash;      /* of the unit before it */
    uint64_t signature; /* of the units around it */
} gap;

typedef struct scan {
    const char *text;
    size_t n_bytes;
    gap *gaps; /* the first stands at 0 */
    size_t n_gaps, n_gaps_max;
} scan;

static bool is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f' || c == '\v';
}

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* Letters, and everything of UTF-8 that is not a three- or four-byte character: those are
 * mostly words or signs of their own. */
static bool is_letter(unsigned char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= 0x80 && c < 0xe0);
}

static size_t measure(const char *text, size_t n_bytes)
{
    size_t size = 0;
    bool in_word = false;
    unsigned char sign = 0;
    for (size_t i = 0; i < n_bytes; i++) {
        const unsigned char c = (unsigned char)text[i];
        const bool continues = c >= 0x80 && c < 0xc0;
        const bool letter = is_letter(c) && !(continues && !in_word);
        if (letter && !in_word) size += WORD_SIZE;
        /* A row of one sign, as under a heading, is few tokens. */
        if (!letter && !continues && !is_blank(text[i]) && (c != sign || is_digit(text[i])))
            size += SIGN_SIZE;
        sign = letter || is_blank(text[i]) ? 0 : c;
        in_word = letter;
    }
    return size;
}

uint32_t kvl_split_guess_tokens(const char *text, size_t n_bytes)
{
    const size_t tokens = (measure(text, n_bytes) + TENTHS - 1) / TENTHS;
    return tokens > UINT32_MAX ? UINT32_MAX : (uint32_t)tokens;
}

/* Runs of what is not blank: another word in one's place changes no number of them. */
static uint32_t count_words(const char *text, size_t n_bytes)
{
    uint32_t n = 0;
    for (size_t i = 0; i < n_bytes; i++)
        n += !is_blank(text[i]) && (i == 0 || is_blank(text[i - 1]));
    return n;
}

static kvl_status add_gap(scan *s, size_t at, strength kind, kvl_error *error)
{
    if (s->n_gaps > 0 && s->gaps[s->n_gaps - 1].at == at) return KVL_OK;
    if (s->n_gaps == s->n_gaps_max) {
        const size_t n_max = s->n_gaps_max == 0 ? 256 : 2 * s->n_gaps_max;
        gap *grown = kvl_realloc(s->gaps, n_max * sizeof *grown);
        if (grown == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to split a text");
        s->gaps = grown;
        s->n_gaps_max = n_max;
    }
    s->gaps[s->n_gaps++] = (gap){.at = at, .kind = kind};
    return KVL_OK;
}

/* ---- lines ---- */

typedef struct line {
    const char *text;
    size_t n;      /* without its end */
    size_t indent; /* blanks before it */
} line;

static line line_at(const scan *s, size_t at)
{
    const char *end = at < s->n_bytes ? memchr(s->text + at, '\n', s->n_bytes - at) : NULL;
    line l = {s->text + at, end == NULL ? s->n_bytes - at : (size_t)(end - (s->text + at)), 0};
    while (l.n > 0 && is_blank(l.text[l.n - 1])) l.n--;
    while (l.indent < l.n && is_blank(l.text[l.indent])) l.indent++;
    return l;
}

static bool is_fence(const line *l)
{
    const char *from = l->text + l->indent;
    const size_t n = l->n - l->indent;
    return n >= 3 && (memcmp(from, "```", 3) == 0 || memcmp(from, "~~~", 3) == 0);
}

/* The line under a heading: nothing but = or -. */
static bool is_underline(const line *l)
{
    if (l->n < 3 || (l->text[0] != '=' && l->text[0] != '-')) return false;
    for (size_t i = 1; i < l->n; i++) {
        if (l->text[i] != l->text[0]) return false;
    }
    return true;
}

static bool is_heading(const line *l, const line *next)
{
    size_t n = 0;
    while (n < l->n && l->text[n] == '#') n++;
    if (n >= 1 && n <= 6 && n < l->n && l->text[n] == ' ') return true;
    return l->n > 0 && l->indent == 0 && !is_underline(l) && is_underline(next);
}

static bool is_item(const line *l)
{
    const char *from = l->text + l->indent;
    const size_t n = l->n - l->indent;
    if (n < 2) return false;
    if (strchr("-*+", from[0]) != NULL && from[1] == ' ') return true;
    size_t digits = 0;
    while (digits < n && is_digit(from[digits])) digits++;
    return digits > 0 && digits + 1 < n && strchr(".)", from[digits]) != NULL &&
           from[digits + 1] == ' ';
}

/* Whether the sentence ends with the sign before `at`. */
static bool ends_sentence(const char *text, size_t at)
{
    while (at > 0 && strchr("\"')]", text[at - 1]) != NULL && text[at - 1] != '\0') at--;
    return at > 0 && (text[at - 1] == '.' || text[at - 1] == '!' || text[at - 1] == '?');
}

typedef struct lines {
    bool in_fence, after_blank, after_fence, after_sentence, is_first;
} lines;

static strength strength_of(const lines *state, const line *l, const line *next, bool fence)
{
    if (state->after_fence || (fence && !state->in_fence)) return BLOCK;
    if (state->in_fence) return state->after_blank ? CODE_BLANK : ITEM;
    if (is_heading(l, next)) return HEADING;
    if (state->after_blank) return BLOCK;
    if (is_item(l)) return ITEM;
    return state->after_sentence ? SENTENCE : LINE;
}

static kvl_status add_sentences(scan *s, const line *l, kvl_error *error)
{
    const size_t first = (size_t)(l->text - s->text);
    for (size_t i = l->indent + 1; i + 1 < l->n; i++) {
        if (is_blank(l->text[i]) && !is_blank(l->text[i + 1]) && !is_blank(l->text[i - 1]) &&
            ends_sentence(l->text, i))
            KVL_TRY(add_gap(s, first + i + 1, SENTENCE, error));
    }
    return KVL_OK;
}

/* A line's own gap, and those inside of it. Blank lines belong to what stands before them. */
static kvl_status add_line(scan *s, lines *state, size_t at, const line *l, const line *next,
                           kvl_error *error)
{
    if (l->n == l->indent) {
        state->after_blank = true;
        return KVL_OK;
    }
    const bool fence = is_fence(l);
    const bool under = is_underline(l) && !state->after_blank && !state->in_fence;
    if (!state->is_first && !under)
        KVL_TRY(add_gap(s, at, strength_of(state, l, next, fence), error));
    if (!state->in_fence && !fence) KVL_TRY(add_sentences(s, l, error));
    state->is_first = false;
    state->after_fence = fence && state->in_fence;
    if (fence) state->in_fence = !state->in_fence;
    state->after_sentence = ends_sentence(l->text, l->n);
    state->after_blank = false;
    return KVL_OK;
}

static uint64_t combine(const gap *gaps, size_t n, size_t i)
{
    const uint32_t words[4] = {i >= 2 ? gaps[i - 2].n_words : 0, gaps[i - 1].n_words,
                               gaps[i].n_words, i + 1 < n ? gaps[i + 1].n_words : 0};
    return kvl_checksum(words, sizeof words);
}

static kvl_status find_gaps(scan *s, kvl_error *error)
{
    lines state = {.is_first = true};
    KVL_TRY(add_gap(s, 0, HEADING, error));
    for (size_t at = 0; at < s->n_bytes;) {
        const char *end = memchr(s->text + at, '\n', s->n_bytes - at);
        const size_t past = end == NULL ? s->n_bytes : (size_t)(end - s->text) + 1;
        const line l = line_at(s, at);
        const line next = line_at(s, past);
        KVL_TRY(add_line(s, &state, at, &l, &next, error));
        at = past;
    }
    size_t size = 0;
    for (size_t i = 0; i < s->n_gaps; i++) {
        const size_t past = i + 1 < s->n_gaps ? s->gaps[i + 1].at : s->n_bytes;
        const char *unit = s->text + s->gaps[i].at;
        const size_t n = past - s->gaps[i].at;
        s->gaps[i].size = size;
        s->gaps[i].n_words = count_words(unit, n);
        size += measure(unit, n);
        if (i + 1 < s->n_gaps) s->gaps[i + 1].hash = kvl_checksum(unit, n);
    }
    for (size_t i = 1; i < s->n_gaps; i++) s->gaps[i].signature = combine(s->gaps, s->n_gaps, i);
    return KVL_OK;
}

/* ---- boundaries ---- */

/* Whether a is the stronger; among equals the earlier. */
static bool beats(const gap *a, const gap *b)
{
    if (a->kind != b->kind) return a->kind > b->kind;
    if (a->signature != b->signature) return a->signature > b->signature;
    if (a->hash != b->hash) return a->hash > b->hash;
    return a->at < b->at;
}

static bool is_boundary(const scan *s, size_t i, size_t reach, size_t total)
{
    const gap *self = &s->gaps[i];
    if (self->size < reach || total - self->size < reach) return false;
    for (size_t j = i; j-- > 0 && self->size - s->gaps[j].size < reach;) {
        if (beats(&s->gaps[j], self)) return false;
    }
    for (size_t j = i + 1; j < s->n_gaps && s->gaps[j].size - self->size < reach; j++) {
        if (beats(&s->gaps[j], self)) return false;
    }
    return true;
}

typedef struct cuts {
    const scan *s;
    size_t size_max;
    kvl_text_span *spans;
    size_t n, n_max;
} cuts;

static kvl_status add_span(cuts *c, size_t first, size_t past, kvl_error *error)
{
    if (c->n == c->n_max) {
        const size_t n_max = c->n_max == 0 ? 64 : 2 * c->n_max;
        kvl_text_span *grown = kvl_realloc(c->spans, n_max * sizeof *grown);
        if (grown == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for chunks");
        c->spans = grown;
        c->n_max = n_max;
    }
    c->spans[c->n++] = (kvl_text_span){first, past - first};
    return KVL_OK;
}

/* Where no gap helps: before a word near the middle, or else before a character. */
static size_t cut_anywhere(const scan *s, size_t first, size_t past)
{
    const size_t middle = first + (past - first) / 2;
    for (size_t i = middle; i < first + (past - first) * 3 / 4; i++) {
        if (is_blank(s->text[i - 1]) && !is_blank(s->text[i])) return i;
    }
    size_t at = middle;
    while (at > first + 1 && ((unsigned char)s->text[at] & 0xc0) == 0x80) at--;
    return at;
}

/* The last gap at or before a byte. */
static size_t gap_before(const scan *s, size_t at)
{
    size_t low = 0;
    size_t past = s->n_gaps;
    while (past - low > 1) {
        const size_t middle = low + (past - low) / 2;
        if (s->gaps[middle].at <= at) {
            low = middle;
        } else {
            past = middle;
        }
    }
    return low;
}

/* The strongest gap in the middle half of a range, by size. */
static size_t cut_of(const scan *s, size_t first, size_t past, size_t size)
{
    const size_t at = gap_before(s, first);
    const size_t base =
        s->gaps[at].size + measure(s->text + s->gaps[at].at, first - s->gaps[at].at);
    const gap *best = NULL;
    for (size_t i = at + 1; i < s->n_gaps && s->gaps[i].at < past; i++) {
        const gap *g = &s->gaps[i];
        if (g->size < base + size / 4 || g->size > base + size - size / 4) continue;
        if (best == NULL || beats(g, best)) best = g;
    }
    return best != NULL ? best->at : cut_anywhere(s, first, past);
}

static kvl_status cut(cuts *c, size_t first, size_t past, kvl_error *error)
{
    const size_t size = measure(c->s->text + first, past - first);
    if (size <= c->size_max || past - first < 2) return add_span(c, first, past, error);
    const size_t at = cut_of(c->s, first, past, size);
    if (at <= first || at >= past) return add_span(c, first, past, error);
    KVL_TRY(cut(c, first, at, error));
    return cut(c, at, past, error);
}

static kvl_status cut_all(const scan *s, uint32_t n_tokens, cuts *c, kvl_error *error)
{
    const size_t reach = (size_t)n_tokens * TENTHS / 2;
    const gap *last = &s->gaps[s->n_gaps - 1];
    const size_t total = last->size + measure(s->text + last->at, s->n_bytes - last->at);
    size_t first = 0;
    for (size_t i = 1; i < s->n_gaps; i++) {
        if (!is_boundary(s, i, reach, total)) continue;
        KVL_TRY(cut(c, first, s->gaps[i].at, error));
        first = s->gaps[i].at;
    }
    return cut(c, first, s->n_bytes, error);
}

kvl_status kvl_split_text(const char *text, size_t n_bytes, uint32_t n_tokens,
                          kvl_text_span **chunks, size_t *n_chunks, kvl_error *error)
{
    *chunks = NULL;
    *n_chunks = 0;
    if (n_tokens < KVL_SPLIT_TOKENS_LEAST || n_tokens > KVL_SPLIT_TOKENS_MAX)
        return KVL_FAIL(error, KVL_ERR_OUT_OF_RANGE,
                        "chunks of %u tokens were asked for; they may have %u to %u", n_tokens,
                        KVL_SPLIT_TOKENS_LEAST, KVL_SPLIT_TOKENS_MAX);
    if (n_bytes > KVL_SPLIT_BYTES_MAX)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "the text has %zu bytes, at most %zu are split; divide it", n_bytes,
                        KVL_SPLIT_BYTES_MAX);
    if (n_bytes == 0) return KVL_OK;
    scan s = {.text = text, .n_bytes = n_bytes};
    cuts c = {.s = &s, .size_max = (size_t)n_tokens * TENTHS * 3 / 2};
    kvl_status status = find_gaps(&s, error);
    if (status == KVL_OK) status = cut_all(&s, n_tokens, &c, error);
    kvl_free(s.gaps);
    if (status != KVL_OK) {
        kvl_free(c.spans);
        return status;
    }
    *chunks = c.spans;
    *n_chunks = c.n;
    return KVL_OK;
}
