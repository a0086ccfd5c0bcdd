#!/usr/bin/env python3
"""Real text for `kvloom eval reuse --texts DIR`: what Python's standard library says of itself.

    python3 tests/bench/eval_texts.py DIR

Reads the documentation strings of the library's sources, imports nothing, and writes one *.txt a
module. Paragraphs of one string are put together until they have 700 characters, so that a chunk
has about as many tokens as `kvloom ingest` gives one; a paragraph that stands in two places is
written once."""
import ast
import glob
import os
import re
import sys
import sysconfig

LEAST, MOST = 700, 1450


def strings_of(path):
    with open(path, "rb") as file:
        tree = ast.parse(file.read())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text and text.isascii():
            name = getattr(node, "name", os.path.basename(path)[:-3])
            yield f"{name}: {text}"


def paragraphs_of(text):
    kept = ""
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        if ">>>" in paragraph or not paragraph:
            continue
        kept = f"{kept} {paragraph}".strip()
        if len(kept) >= LEAST:
            if len(kept) <= MOST:
                yield kept
            kept = ""


def main():
    folder = sys.argv[1]
    os.makedirs(folder, exist_ok=True)
    seen, n = set(), 0
    library = sysconfig.get_path("stdlib")
    for path in sorted(glob.glob(os.path.join(library, "*.py")) +
                       glob.glob(os.path.join(library, "*", "*.py"))):
        name = os.path.relpath(path, library)[:-3].replace(os.sep, ".")
        if name.split(".")[0] in ("test", "site-packages", "idlelib", "lib2to3"):
            continue
        found = []
        for text in strings_of(path):
            for paragraph in paragraphs_of(text):
                if paragraph not in seen:
                    seen.add(paragraph)
                    found.append(paragraph)
        if found:
            n += len(found)
            with open(os.path.join(folder, name + ".txt"), "w", encoding="ascii") as out:
                out.write("\n\n".join(found) + "\n")
    print(f"{n} paragraphs in {folder}")


if __name__ == "__main__":
    main()
