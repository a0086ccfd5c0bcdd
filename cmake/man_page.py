#!/usr/bin/env python3
"""man_page.py INPUT OUTPUT NAME SECTION SUMMARY: a manual page of a header or of a page in Markdown, whose
words are taken as they are, so that the manual cannot say anything else.

A header: its first comment is the description, the rest is shown as it stands. Markdown: headings, paragraphs,
lists, tables and blocks of code, as far as this project's pages use them.
"""
import re
import sys


def escape(text):
    """A line of text as roff takes it; a dot or an apostrophe in front would be a command."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text[:1] in (".", "'") else text


def spans(text):
    """Bold, code and links of Markdown."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    parts = re.split(r"`([^`]*)`", text)
    for i, part in enumerate(parts):
        part = re.sub(r"\*\*?([^*]+)\*\*?", r"\1", part) if i % 2 == 0 else part
        parts[i] = "\\fB" + escape(part) + "\\fR" if i % 2 == 1 else escape(part)
    text = "".join(parts)
    return "\\&" + text if text[:1] in (".", "'") else text


def verbatim(lines):
    return [".PP", ".nf"] + [escape(line.rstrip()) for line in lines] + [".fi"]


def from_header(text):
    """The description, and all that can be called."""
    first, rest = text.split("*/", 1)
    about = [line.strip().lstrip("/*").strip() for line in first.splitlines()]
    about[0] = about[0].split(":", 1)[1].strip()
    out = [".SH SYNOPSIS", ".B #include <kvloom.h>", ".br", "cc program.c $(pkg\\-config \\-\\-cflags \\-\\-libs kvloom)"]
    out += [".SH DESCRIPTION"]
    out += verbatim(about)
    body = [line for line in rest.splitlines()
            if not re.match(r"#(ifndef|ifdef|endif|include)|extern \"C\"|^}$", line)]
    while body and not body[0].strip():
        body.pop(0)
    return out + [".SH \"TYPES AND FUNCTIONS\""] + verbatim(body)


def table(rows):
    """A table of Markdown as the same rows, each column as wide as its widest."""
    cells = [[cell.strip().replace("`", "") for cell in row.strip().strip("|").split("|")] for row in rows]
    cells = [row for row in cells if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    out = [".TS", "allbox;", " ".join(["lb"] * len(cells[0])), " ".join(["lx" if i == len(cells[0]) - 1 else "l"
           for i in range(len(cells[0]))]) + "."]
    for row in cells:
        out.append("\t".join(row[:-1] + ["T{"]))
        out += [escape(row[-1]), "T}"]
    return [".PP"] + out + [".TE"]


def from_markdown(text):
    out, lines, i = [".SH DESCRIPTION"], text.splitlines(), 0
    while i < len(lines):
        line = lines[i]
        block = []
        if line.startswith("```"):
            i += 1
            while i < len(lines) and not lines[i].startswith("```"):
                block.append(lines[i])
                i += 1
            out += verbatim(block)
        elif line.startswith("|"):
            while i < len(lines) and lines[i].startswith("|"):
                block.append(lines[i])
                i += 1
            out += table(block)
            continue
        elif line.startswith("# "):
            pass  # the title is in the first line of the page
        elif line.startswith("#"):
            out += ['.SH "%s"' % escape(line.lstrip("# ")).upper()]
        elif re.match(r"[-*] |\d+\. ", line):
            out += [".IP \\(bu 2", spans(re.sub(r"^([-*]|\d+\.) ", "", line))]
        elif not line.strip():
            out += [".PP"]
        else:
            out += [spans(line.strip())]
        i += 1
    return out


def main():
    source, target, name, section, summary = sys.argv[1:]
    with open(source, encoding="utf-8") as file:
        text = file.read()
    page = ["'\\\" t", '.TH "%s" "%s" "" "KVLoom" "KVLoom"' % (name.upper(), section),
            ".SH NAME", "%s \\- %s" % (name, escape(summary))]
    page += from_header(text) if source.endswith(".h") else from_markdown(text)
    with open(target, "w", encoding="utf-8") as file:
        file.write("\n".join(page) + "\n")


main()
