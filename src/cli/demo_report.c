/* cli/demo_report.c: the demo as one HTML page without outside resources: figures, a timeline of
 * the hosts, and every prompt coloured by what happened to each token. */
#include "base/file.h"
#include "cli/demo.h"

#include <stdlib.h>
#include <string.h>

static const char page_head[] =
    "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">"
    "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"
    "<title>KVLoom: five agents share what they have read</title><style>"
    ":root{--ink:#1c2330;--dim:#667085;--line:#d9dee7;--paper:#fff;--shared:#b7e4c7;"
    "--offset:#bcd7f5;--placed:#fde7a9;--computed:#f6b8b0;--full:#c9ced8}"
    "@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--dim:#98a2b3;--line:#344054;"
    "--paper:#12161f;--shared:#1f5a3a;--offset:#20466f;--placed:#6b5413;--computed:#7a2f26;"
    "--full:#475067}}"
    "body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);"
    "max-width:1100px;margin:2rem auto;padding:0 1rem}h1{font-size:1.6rem}h2{margin-top:2.2rem}"
    "table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}"
    "th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right}"
    "th:first-child,td:first-child{text-align:left}th{color:var(--dim);font-weight:600}"
    ".cards{display:flex;flex-wrap:wrap;gap:1rem}.card{border:1px solid var(--line);"
    "border-radius:.6rem;padding:.7rem 1rem;min-width:9rem}.card b{display:block;font-size:1.5rem}"
    ".dim{color:var(--dim)}.key span,.prompt span{border-radius:.2rem}.key span{padding:0 .4rem}"
    ".s{background:var(--shared)}.o{background:var(--offset)}.p{background:var(--placed)}"
    ".c{background:var(--computed)}.prompt{white-space:pre-wrap;overflow-wrap:anywhere;"
    "border:1px solid var(--line);border-radius:.6rem;padding:1rem;font:13px/1.6 ui-monospace,"
    "monospace}details{margin:.5rem 0}summary{cursor:pointer}svg text{fill:var(--ink);"
    "font:12px system-ui,sans-serif}</style></head><body>";

static void put_text(FILE *out, const char *text, size_t n_bytes)
{
    for (size_t i = 0; i < n_bytes; i++) {
        switch (text[i]) {
        case '<': (void)fputs("&lt;", out); break;
        case '>': (void)fputs("&gt;", out); break;
        case '&': (void)fputs("&amp;", out); break;
        case '"': (void)fputs("&quot;", out); break;
        default: (void)fputc(text[i], out);
        }
    }
}

static void put_summary(FILE *out, const demo *d, const demo_summary *s)
{
    (void)fprintf(out,
                  "<h1>KVLoom: %u agents share what they have read</h1><div class=\"cards\">"
                  "<div class=\"card\"><b>%.1f&times;</b>faster first token, last agent</div>"
                  "<div class=\"card\"><b>%.1f&times;</b>mean, second agent on</div>"
                  "<div class=\"card\"><b>%.0f %%</b>of prompt tokens reused</div>"
                  "<div class=\"card\"><b>%.3f</b>top-1 agreement</div>"
                  "<div class=\"card\"><b>%.4f</b>mean KL, nats</div>"
                  "<div class=\"card\"><b>%u</b>wrong tokens in exact runs</div></div>",
                  d->options->n_agents, s->speedup_last, s->speedup_mean, 100.0 * s->reuse_rate,
                  s->top1, s->kl, s->wrong_exact_tokens);
}

static void put_table(FILE *out, const demo *d, const demo_summary *s)
{
    (void)fputs("<h2>Agents</h2><table><tr><th>agent<th>tokens<th>shared<th>placed<th>offset"
                "<th>computed<th>fetched<th>TTFT full<th>TTFT reuse<th>ratio<th>top-1<th>KL"
                "<th>top-1, place only<th>KL, place only</tr>",
                out);
    for (uint32_t a = 0; a < d->options->n_agents; a++) {
        const demo_figures *f = &s->agents[a];
        (void)fprintf(out,
                      "<tr><td>%s<td>%.0f<td>%.0f<td>%.0f<td>%.0f<td>%.0f<td>%.1f MB<td>%.0f ms"
                      "<td>%.0f ms<td>%.1f&times;<td>%.3f<td>%.4f<td>%.3f<td>%.4f</tr>",
                      d->workflow.agents[a].name, f->prompt_tokens, f->shared, f->placed, f->offset,
                      f->computed, f->fetched_bytes / 1e6, f->ttft_full_ms, f->ttft_reuse_ms,
                      f->speedup, f->top1, f->kl, f->place_only_top1, f->place_only_kl);
    }
    (void)fputs("</table><p class=\"dim\">Means of the rounds in which anchors can be used: they "
                "are measured in the first two.</p>",
                out);
}

enum { CHART_LEFT = 110, CHART_WIDTH = 960, LANE_HEIGHT = 30 };

static double end_of(const demo *d)
{
    double end = 1e-9;
    for (uint32_t r = 0; r < d->n_rounds_done; r++) {
        for (uint32_t a = 0; a < d->options->n_agents; a++) {
            if (d->cells[r][a].reuse_end_s > end) end = d->cells[r][a].reuse_end_s;
        }
    }
    return end;
}

static void put_bar(FILE *out, double scale, uint32_t lane, double from, double to,
                    const char *colour, const char *what)
{
    (void)fprintf(out,
                  "<rect x=\"%.1f\" y=\"%u\" width=\"%.2f\" height=\"%d\" rx=\"2\" "
                  "fill=\"var(--%s)\"><title>%s: %.2f s</title></rect>",
                  CHART_LEFT + from * scale, lane * LANE_HEIGHT + 6,
                  (to - from) * scale < 1.0 ? 1.0 : (to - from) * scale, LANE_HEIGHT - 12, colour,
                  what, to - from);
}

static void put_timeline(FILE *out, const demo *d)
{
    const uint32_t n = d->options->n_agents;
    const double scale = (CHART_WIDTH - CHART_LEFT) / end_of(d);
    (void)fprintf(out,
                  "<h2>Timeline</h2><p class=\"key\"><span style=\"background:var(--full)\">full "
                  "prefill and answer</span> <span class=\"c\">time to first token with reuse"
                  "</span> <span class=\"s\">its answer</span></p>"
                  "<svg viewBox=\"0 0 %d %u\" role=\"img\" aria-label=\"What each host did when\">",
                  CHART_WIDTH, n * LANE_HEIGHT + 20);
    for (uint32_t a = 0; a < n; a++) {
        (void)fprintf(out, "<text x=\"0\" y=\"%u\">%s</text>", a * LANE_HEIGHT + 20,
                      d->workflow.agents[a].name);
        for (uint32_t r = 0; r < d->n_rounds_done; r++) {
            const demo_cell *cell = &d->cells[r][a];
            const double first_token = cell->reuse_start_s + cell->reuse->ttft_ms / 1e3;
            put_bar(out, scale, a, cell->full_start_s, cell->full_end_s, "full", "full");
            put_bar(out, scale, a, cell->reuse_start_s, first_token, "computed",
                    "to the first token");
            put_bar(out, scale, a, first_token, cell->reuse_end_s, "shared", "answer");
        }
    }
    (void)fprintf(out,
                  "<text x=\"%d\" y=\"%u\">0 s</text><text x=\"%d\" y=\"%u\" "
                  "text-anchor=\"end\">%.1f s</text></svg>",
                  CHART_LEFT, n * LANE_HEIGHT + 15, CHART_WIDTH, n * LANE_HEIGHT + 15, end_of(d));
}

/* What a part says: its template text, the question, or another agent's answer. */
static ProtobufCBinaryData text_of_part(const demo *d, uint32_t round, uint32_t agent, size_t p)
{
    const demo_piece *piece = &d->workflow.agents[agent].pieces[p];
    unsigned from = 0;
    if (piece->text != NULL)
        return (ProtobufCBinaryData){strlen(piece->text), (uint8_t *)piece->text};
    if (sscanf(piece->slot, "agent_%u", &from) == 1 && from >= 1 && from <= d->options->n_agents &&
        d->cells[round][from - 1].reuse != NULL)
        return d->cells[round][from - 1].reuse->text;
    char *question = d->workflow.questions[round % d->workflow.n_rounds];
    return (ProtobufCBinaryData){strlen(question), (uint8_t *)question};
}

/* Tokens of a part stand in the order shared, reused, computed. */
static void put_part(FILE *out, const Kvloom__V1__PartReport *part, ProtobufCBinaryData text)
{
    const struct {
        uint32_t n;
        char style;
        const char *what;
    } runs[] = {{part->shared, 's', "shared"},
                {part->placed, 'p', "placed"},
                {part->offset, 'o', "offset"},
                {part->computed, 'c', "computed"}};
    size_t token = 0;
    size_t at = 0;
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        size_t n_bytes = 0;
        for (uint32_t t = 0; t < runs[i].n && token < part->n_token_bytes; t++)
            n_bytes += part->token_bytes[token++];
        if (n_bytes > text.len - at) n_bytes = text.len - at;
        if (n_bytes == 0) continue;
        (void)fprintf(out, "<span class=\"%c\" title=\"%u tokens %s%s%s: %s\">", runs[i].style,
                      runs[i].n, runs[i].what, part->from[0] == '\0' ? "" : ", from ", part->from,
                      part->reason);
        put_text(out, (const char *)text.data + at, n_bytes);
        (void)fputs("</span>", out);
        at += n_bytes;
    }
}

static void put_prompt(FILE *out, const demo *d, uint32_t round, uint32_t agent)
{
    const demo_cell *cell = &d->cells[round][agent];
    (void)fprintf(out,
                  "<details%s><summary>round %u, <b>%s</b>: %u tokens, first token after %.0f ms "
                  "instead of %.0f ms</summary><div class=\"prompt\">",
                  round + 1 == d->n_rounds_done && agent + 1 == d->options->n_agents ? " open" : "",
                  round + 1, d->workflow.agents[agent].name, cell->reuse->prompt_tokens,
                  cell->reuse->ttft_ms, demo_full_of(cell)->ttft_ms);
    for (size_t p = 0; p < cell->reuse->n_parts; p++)
        put_part(out, cell->reuse->parts[p], text_of_part(d, round, agent, p));
    (void)fputs("</div><p><b>Answer with reuse.</b> ", out);
    put_text(out, (const char *)cell->reuse->text.data, cell->reuse->text.len);
    (void)fputs("</p><p><b>Answer of full prefill.</b> ", out);
    put_text(out, (const char *)demo_full_of(cell)->text.data, demo_full_of(cell)->text.len);
    (void)fputs("</p></details>", out);
}

kvl_status demo_write_report(const demo *d, const demo_summary *summary, const char *path,
                             kvl_error *error)
{
    char *page = NULL;
    size_t n_bytes = 0;
    FILE *out = open_memstream(&page, &n_bytes);
    if (out == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the report");
    (void)fputs(page_head, out);
    put_summary(out, d, summary);
    put_table(out, d, summary);
    put_timeline(out, d);
    (void)fputs("<h2>Prompts</h2><p class=\"key\"><span class=\"s\">shared: exact prefix</span> "
                "<span class=\"o\">offset: placed, corrected by anchors</span> <span class=\"p\">"
                "placed</span> <span class=\"c\">computed</span></p>",
                out);
    for (uint32_t r = 0; r < d->n_rounds_done; r++) {
        for (uint32_t a = 0; a < d->options->n_agents; a++) put_prompt(out, d, r, a);
    }
    (void)fputs("</body></html>\n", out);
    const bool written = fclose(out) == 0;
    const kvl_status status = written
                                  ? kvl_file_write(path, page, n_bytes, error)
                                  : KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for the report");
    free(page); /* tidy: free, open_memstream allocated it */
    return status;
}
