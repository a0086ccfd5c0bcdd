/* cli/explain_html.c: writes the page front to back. */
#include "cli/explain_html.h"

#include "base/file.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* How the KV of a token was had. */
typedef enum how { SHARED, PLACED, OFFSET, BLENDED, AGAIN, COMPUTED, HOWS } how;

static const struct {
    const char *letter, *name;
} hows[HOWS] = {
    [SHARED] = {"s", "shared: pages of the exact prefix"},
    [PLACED] = {"p", "placed: rotated to its position"},
    [OFFSET] = {"o", "offset: placed and corrected by anchors"},
    [BLENDED] = {"b", "blended: placed"},
    [AGAIN] = {"a", "placed, then computed again"},
    [COMPUTED] = {"c", "computed"},
};

static const char opening[] =
    "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n"
    "<meta name=\"viewport\" content=\"width=device-width\">\n<title>KVLoom: a plan</title>\n"
    "<style>\n"
    ":root{color-scheme:light dark;--s:#b7d7a8;--p:#f4b183;--o:#ffe08a;--b:#a8cbf0;--a:#c9a8e8;"
    "--c:#e2e2e2}\n"
    "@media(prefers-color-scheme:dark){:root{--s:#38602a;--p:#8a4a1c;--o:#7a6414;--b:#24507e;"
    "--a:#5d3a86;--c:#4a4a4a}}\n"
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}\n"
    "table{border-collapse:collapse;width:100%}\n"
    "td,th{padding:.2em .6em;text-align:right;border-bottom:1px solid #8884}\n"
    "td:first-child,td:last-child,th:first-child,th:last-child{text-align:left}\n"
    ".t{white-space:pre-wrap;overflow-wrap:anywhere;font-family:ui-monospace,monospace;"
    "margin:.3em 0 1em}\n"
    ".t span,.k{border-radius:2px;box-shadow:inset 0 0 0 .5px #8886}\n"
    ".s{background:var(--s)}.p{background:var(--p)}.o{background:var(--o)}"
    ".b{background:var(--b)}.a{background:var(--a)}.c{background:var(--c)}\n"
    ".k{padding:0 .5em;margin-right:.8em}\n"
    ".bar{display:flex;height:1.1em;margin:.2em 0}.bar i{display:block;min-width:1px}\n"
    "</style></head><body>\n";

/* ---- text ---- */

/* Bytes of the character that begins here; 0 where it is none. */
static size_t utf8_length(const uint8_t *at, size_t n)
{
    const uint8_t lead = at[0];
    size_t length = 0;
    if (lead < 0x80) length = 1;
    if (lead >= 0xC2 && lead <= 0xDF) length = 2;
    if (lead >= 0xE0 && lead <= 0xEF) length = 3;
    if (lead >= 0xF0 && lead <= 0xF4) length = 4;
    if (length == 0 || length > n) return 0;
    for (size_t i = 1; i < length; i++) {
        if ((at[i] & 0xC0) != 0x80) return 0;
    }
    const bool is_overlong = (lead == 0xE0 && at[1] < 0xA0) || (lead == 0xF0 && at[1] < 0x90);
    const bool is_outside = (lead == 0xED && at[1] >= 0xA0) || (lead == 0xF4 && at[1] >= 0x90);
    return is_overlong || is_outside ? 0 : length;
}

static void print_escaped(FILE *out, const uint8_t *text, size_t n)
{
    for (size_t i = 0; i < n;) {
        const size_t length = utf8_length(text + i, n - i);
        const uint8_t c = text[i];
        if (length == 0 || (c < 0x20 && c != '\n' && c != '\t') || c == 0x7F)
            (void)fputs("\xEF\xBF\xBD", out);
        else if (c == '&')
            (void)fputs("&amp;", out);
        else if (c == '<')
            (void)fputs("&lt;", out);
        else if (c == '>')
            (void)fputs("&gt;", out);
        else if (c == '"')
            (void)fputs("&quot;", out);
        else
            (void)fwrite(text + i, 1, length, out);
        i += length == 0 ? 1 : length;
    }
}

static void print_text(FILE *out, const char *text)
{
    print_escaped(out, (const uint8_t *)text, strlen(text));
}

/* Whether the text ends inside of a character, which the next token goes on with. */
static bool ends_inside(const uint8_t *text, size_t n)
{
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        const uint8_t c = text[n - back];
        if ((c & 0xC0) == 0x80) continue;
        if (c < 0xC2 || c > 0xF4) return false;
        const size_t length = c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : 2;
        return length > back;
    }
    return false;
}

/* ---- the prompt ---- */

static how how_of(const Kvloom__V1__PartReport *part, uint32_t token)
{
    if (token < part->shared) return SHARED;
    uint32_t past = part->shared + part->placed;
    if (token < past) return PLACED;
    past += part->offset;
    if (token < past) return OFFSET;
    past += part->blended;
    return token < past ? BLENDED : COMPUTED;
}

typedef struct page {
    FILE *out;
    const Kvloom__V1__PlanReply *plan;
    uint32_t position; /* of the next token of the prompt */
    size_t n_again;    /* of plan->recomputed, passed */
} page;

static how how_at(page *p, const Kvloom__V1__PartReport *part, uint32_t token)
{
    const Kvloom__V1__PlanReply *plan = p->plan;
    const uint32_t at = p->position + token;
    while (p->n_again < plan->n_recomputed && plan->recomputed[p->n_again] < at) p->n_again++;
    const bool is_again = p->n_again < plan->n_recomputed && plan->recomputed[p->n_again] == at;
    return is_again ? AGAIN : how_of(part, token);
}

/* One span a token; tokens that share a character have one together. */
static kvl_status print_tokens(page *p, const Kvloom__V1__PartReport *part,
                               const ProtobufCBinaryData *text, kvl_error *error)
{
    size_t from = 0, past = 0;
    bool is_open = false;
    for (uint32_t t = 0; t < part->n_token_bytes; t++) {
        const how had = how_at(p, part, t);
        if (part->token_bytes[t] > text->len - past)
            return KVL_FAIL(error, KVL_ERR_MALFORMED,
                            "the text of a part is shorter than its "
                            "tokens");
        past += part->token_bytes[t];
        if (!is_open)
            (void)fprintf(p->out, "<span class=\"%s\" title=\"%" PRIu32 "\">", hows[had].letter,
                          p->position + t);
        is_open = true;
        if (t + 1 < part->n_token_bytes && ends_inside(text->data + from, past - from)) continue;
        print_escaped(p->out, text->data + from, past - from);
        (void)fputs("</span>", p->out);
        from = past;
        is_open = false;
    }
    return KVL_OK;
}

static kvl_status print_prompt(page *p, kvl_error *error)
{
    const Kvloom__V1__RunReply *run = p->plan->plan;
    (void)fputs("<h2>The prompt, token by token</h2>\n<p>", p->out);
    for (size_t h = 0; h < HOWS; h++)
        (void)fprintf(p->out, "<span class=\"k %s\">%s</span>", hows[h].letter, hows[h].name);
    (void)fputs("</p>\n", p->out);
    for (size_t i = 0; i < run->n_parts; i++) {
        const Kvloom__V1__PartReport *part = run->parts[i];
        (void)fputs("<div class=\"t\">", p->out);
        KVL_TRY(print_tokens(p, part, &p->plan->texts[i], error));
        (void)fputs("</div>\n", p->out);
        p->position += part->n_tokens;
    }
    return KVL_OK;
}

/* ---- cost ---- */

static uint32_t count_again(const Kvloom__V1__PlanReply *plan, uint32_t first, uint32_t n)
{
    uint32_t found = 0;
    for (size_t i = 0; i < plan->n_recomputed; i++)
        found += plan->recomputed[i] >= first && plan->recomputed[i] < first + n;
    return found;
}

static void print_row(const page *p, const Kvloom__V1__PartReport *part, uint32_t first)
{
    (void)fputs("<tr><td>", p->out);
    print_text(p->out, part->slot[0] == '\0' ? "(template)" : part->slot);
    (void)fprintf(p->out,
                  "</td><td>%u</td><td>%u</td><td>%u</td><td>%u</td><td>%u</td><td>%u</td>"
                  "<td>%u</td><td>%.1f ms</td><td>%.1f ms</td><td>%.4f</td><td>",
                  part->n_tokens, part->shared, part->placed, part->offset, part->blended,
                  count_again(p->plan, first, part->n_tokens), part->computed, part->cost_ms,
                  part->compute_ms, part->error);
    print_text(p->out, part->reason);
    if (part->from[0] != '\0') {
        (void)fputs(", from ", p->out);
        print_text(p->out, part->from);
    }
    (void)fputs("</td></tr>\n", p->out);
}

/* Expected cost beside that of computing everything, in the colours of what most of a part is. */
static void print_bar(const page *p, bool is_computed, double most_ms)
{
    const Kvloom__V1__RunReply *run = p->plan->plan;
    (void)fputs("<div class=\"bar\">", p->out);
    for (size_t i = 0; i < run->n_parts && most_ms > 0.0; i++) {
        const Kvloom__V1__PartReport *part = run->parts[i];
        const uint32_t reused = part->placed + part->offset + part->blended;
        how had = reused == 0 ? COMPUTED : how_of(part, part->shared);
        if (part->shared == part->n_tokens && part->n_tokens > 0) had = SHARED;
        const double ms = is_computed ? part->compute_ms : part->cost_ms;
        (void)fprintf(p->out, "<i class=\"%s\" style=\"width:%.2f%%\" title=\"%.1f ms\"></i>",
                      hows[is_computed ? COMPUTED : had].letter, 100.0 * ms / most_ms, ms);
    }
    (void)fputs("</div>\n", p->out);
}

static void print_costs(const page *p)
{
    const Kvloom__V1__RunReply *run = p->plan->plan;
    double cost = 0.0, compute = 0.0;
    uint32_t first = 0;
    for (size_t i = 0; i < run->n_parts; i++) {
        cost += run->parts[i]->cost_ms;
        compute += run->parts[i]->compute_ms;
    }
    (void)fprintf(p->out,
                  "<h1>Request %" PRIu64 "</h1>\n<p>%u tokens; expected %.1f ms where computing "
                  "everything takes %.1f ms; expected error %.4f nats.",
                  run->request_id, run->prompt_tokens, cost, compute, run->expected_error);
    if (run->n_tokens > 0)
        (void)fprintf(p->out,
                      " It was answered with %zu tokens, the first after %.1f ms, %.1f ms in all; "
                      "%s.",
                      run->n_tokens, run->ttft_ms, run->total_ms,
                      run->exact      ? "exact"
                      : run->verified ? "verified"
                      : run->healing  ? "healed behind the answer"
                                      : "not checked");
    (void)fputs("</p>\n", p->out);
    print_bar(p, false, cost > compute ? cost : compute);
    print_bar(p, true, cost > compute ? cost : compute);
    (void)fputs("<table><tr><th>part</th><th>tokens</th><th>shared</th><th>placed</th>"
                "<th>offset</th><th>blended</th><th>again</th><th>computed</th><th>cost</th>"
                "<th>if computed</th><th>error</th><th>why</th></tr>\n",
                p->out);
    for (size_t i = 0; i < run->n_parts; i++) {
        print_row(p, run->parts[i], first);
        first += run->parts[i]->n_tokens;
    }
    (void)fputs("</table>\n", p->out);
}

kvl_status kvl_explain_html_write(const Kvloom__V1__PlanReply *plan, const char *path,
                                  kvl_error *error)
{
    if (plan->plan == NULL || plan->n_texts != plan->plan->n_parts)
        return KVL_FAIL(error, KVL_ERR_MALFORMED, "the plan has not a text for every part");
    char *bytes = NULL;
    size_t n_bytes = 0;
    page p = {.out = open_memstream(&bytes, &n_bytes), .plan = plan};
    if (p.out == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a page");
    (void)fputs(opening, p.out);
    print_costs(&p);
    kvl_status status = print_prompt(&p, error);
    (void)fputs("</body></html>\n", p.out);
    if (fclose(p.out) != 0 && status == KVL_OK)
        status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a page");
    if (status == KVL_OK) status = kvl_file_write(path, bytes, n_bytes, error);
    free(bytes); /* tidy: free, open_memstream allocated it */
    return status;
}
