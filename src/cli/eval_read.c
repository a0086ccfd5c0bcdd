/* cli/eval_read.c: questions about real text with nothing planted: how does a sentence go on? The
 * text itself has the answer, and nothing else in the prompt does. */
#include "cli/eval.h"

#include <ctype.h>
#include <string.h>

enum { LEAD_WORDS = 7, WORD_LEAST = 4, TRIES = 64 };

static bool is_space(char c)
{
    return isspace((unsigned char)c) != 0;
}

/* A word that a question may be about: a number, or long enough, and of letters and digits only. */
static bool is_plain(const char *word, size_t n)
{
    bool has_digit = false;
    for (size_t i = 0; i < n; i++) {
        if (!isalnum((unsigned char)word[i])) return false;
        has_digit |= isdigit((unsigned char)word[i]) != 0;
    }
    return n >= (has_digit ? 2 : WORD_LEAST);
}

static uint32_t count(const char *text, const char *word)
{
    uint32_t n = 0;
    for (const char *at = strstr(text, word); at != NULL; at = strstr(at + 1, word)) n++;
    return n;
}

/* Steps back over words; NULL where a sentence begins before there are enough. */
static const char *lead_of(const char *text, const char *at)
{
    for (int words = 0; words < LEAD_WORDS; words++) {
        while (at > text && is_space(at[-1])) at--;
        if (at == text || strchr(".;:!?\"()", at[-1]) != NULL) return NULL;
        while (at > text && !is_space(at[-1])) at--;
    }
    return at;
}

static bool is_unique(const char *text, const char *const *others, uint32_t n_others,
                      const char *word)
{
    if (count(text, word) != 1) return false;
    for (uint32_t i = 0; i < n_others; i++) {
        if (others[i] != text && strstr(others[i], word) != NULL) return false;
    }
    return true;
}

bool eval_find_question(kvl_random *random, const char *text, const char *const *others,
                        uint32_t n_others, char *lead, size_t n_lead, char *word, size_t n_word)
{
    const size_t n_text = strlen(text);
    if (n_text < 2) return false;
    for (int tries = 0; tries < TRIES; tries++) {
        const char *at = text + kvl_random_below(random, n_text - 1);
        while (*at != '\0' && !is_space(*at)) at++;
        while (is_space(*at)) at++;
        size_t n = 0;
        while (isalnum((unsigned char)at[n])) n++;
        const char *from = lead_of(text, at);
        if (from == NULL || n >= n_word || !is_plain(at, n)) continue;
        const size_t n_before = (size_t)(at - from);
        if (n_before + 1 > n_lead || memchr(from, '"', n_before) != NULL) continue;
        (void)snprintf(word, n_word, "%.*s", (int)n, at);
        (void)snprintf(lead, n_lead, "%.*s", (int)(n_before - 1), from);
        if (is_unique(text, others, n_others, word) && strstr(lead, word) == NULL) return true;
    }
    word[0] = lead[0] = '\0';
    return false;
}
