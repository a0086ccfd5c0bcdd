#!/usr/bin/env python3
"""Writes src/model/unicode_ranges.c: which code points are letters, numbers and spaces.

The tables are those of Unicode 15.1, as llama.cpp has them, so Python 3.13 is needed: its unicodedata
is of that version. Run from anywhere: python3.13 tests/golden/make_unicode_ranges.py
"""
import pathlib
import sys
import unicodedata

WANTED = "15.1.0"
OTHER, LETTER, NUMBER, SPACE = range(4)
# White_Space of PropList.txt, which unicodedata does not carry; the same in every version since 6.3.
SPACES = {0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}

HEAD = """\
/* model/unicode_ranges.c: made by tests/golden/make_unicode_ranges.py from Unicode {version}.
 *
 * Every number is where a run of code points of one class begins, times 4, plus the class: 0 other,
 * 1 letter, 2 number, 3 space. A run ends where the next begins; the first begins after ASCII. */
#include "model/unicode_class.h"

const size_t kvl_unicode_n_runs = {count};
const uint32_t kvl_unicode_runs[] = {{
"""


def class_of(code_point):
    if code_point in SPACES:
        return SPACE
    return {"L": LETTER, "N": NUMBER}.get(unicodedata.category(chr(code_point))[0], OTHER)


def main():
    if unicodedata.unidata_version != WANTED:
        sys.exit(f"Unicode {WANTED} needed, this Python has {unicodedata.unidata_version}")
    runs = []
    for code_point in range(0x80, 0x110000):
        found = class_of(code_point)
        if not runs or runs[-1] & 3 != found:
            runs.append(code_point << 2 | found)
    lines = [
        "    " + ", ".join(f"0x{run:06x}" for run in runs[at : at + 9]) + ","
        for at in range(0, len(runs), 9)
    ]
    out = pathlib.Path(__file__).resolve().parents[2] / "src/model/unicode_ranges.c"
    out.write_text(HEAD.format(version=WANTED, count=len(runs)) + "\n".join(lines) + "\n};\n")
    print(f"{out}: {len(runs)} runs")


if __name__ == "__main__":
    main()
