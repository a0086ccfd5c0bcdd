#!/usr/bin/env python3
"""The rules of the house, checked: python3 tests/tidy.py [ROOT]

Reads the table of rooms from ARCHITECTURE.md and checks
  - every #include of src/: only rooms that the table allows, only doors of other rooms
  - that CMakeLists.txt repeats the table, that every room has its folder and every folder its room
  - functions of at most 70 lines, files of at most 800, lines of at most 100 columns, no tabs
  - calls that are banned everywhere, or outside base, which has the one way to memory, time, chance
  - head comments, include guards, headers that nobody includes
  - no unfinished-work marks, no paths of somebody's machine in any file

A banned call that must stay says why on its line or the one before:
    /* tidy: NAME, reason */
Prints one finding a line, as path:line: text, and exits with 1 if there is any. Needs nothing but
Python's own library.
"""
import os
import re
import sys

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 800
COLUMNS_MAX = 100

# Without a place in this program: they cannot be used safely, or not be used in a test.
BANNED_EVERYWHERE = set("""strcpy strcat sprintf vsprintf gets strtok atoi atol atoll atof rand srand
    rand_r drand48 random srandom tmpnam mktemp gmtime localtime asctime ctime alloca system
    """.split())
# base/alloc.h, base/clock.h and base/random.h have what is to be used instead.
BANNED_OUTSIDE_BASE = set("""malloc calloc realloc reallocarray free strdup strndup aligned_alloc
    posix_memalign memalign valloc time clock gettimeofday clock_gettime getrandom getentropy
    """.split())

TEXT_ENDINGS = (".c", ".h", ".cu", ".cuh", ".py", ".sh", ".md", ".proto", ".cmake", ".txt", ".json",
                ".yml", ".yaml", ".toml")
SKIPPED_FOLDERS = {".git", "build", "__pycache__", ".cache"}
# Written in pieces, so that this file does not find itself.
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX|HA" + r"CK)\b")
CARRIES_CODE = re.compile(r"\b(import|from) (pickle|marshal|shelve|dill)\b|\btorch[.]load\(|"
                          r"(?<![\w.])(eval|exec)\(")
MACHINE_PATH = re.compile(r"(?<![\w.~}/$-])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me|Us" + r"ers|tmp/w)/")

COMMENT_OR_LITERAL = re.compile(
    r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.S)
DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.M)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.M)
CALL = re.compile(r"(?<![\w.>])([A-Za-z_]\w*)[ \t]*\(")
EXEMPTION = re.compile(r"tidy: (\w+), \S")


class Findings:
    def __init__(self):
        self.lines = []

    def add(self, path, line, text):
        self.lines.append((path, line, text))


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def line_of(text, at):
    return text.count("\n", 0, at) + 1


def blank(match):
    """What is left of a comment or a literal: its line breaks, so that line numbers stay."""
    found = match.group(0)
    kept = re.sub(r"[^\n]", " ", found)
    return kept if found.startswith("/") else '"' + kept[1:-1] + '"'


def without_comments(text):
    return COMMENT_OR_LITERAL.sub(blank, text)


def without_directives(text):
    return DIRECTIVE.sub(lambda match: re.sub(r"[^\n]", " ", match.group(0)), text)


# --- the table of rooms ---

def read_rooms(root, findings):
    """{room: (set of rooms it may include, set of its doors)} from the table whose head begins
    with `| room |`: the third column lists rooms, the fourth headers that other rooms may use."""
    rooms = {}
    inside = False
    for number, line in enumerate(read(os.path.join(root, "ARCHITECTURE.md")).split("\n"), 1):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| room |"):
            inside = True
        elif inside and not line.startswith("|"):
            inside = False
        elif inside and not set(line) <= set("|-: "):
            if len(cells) != 4:
                findings.add("ARCHITECTURE.md", number, "a row of the table of rooms has 4 cells")
                continue
            name = cells[0].strip("`")
            rooms[name] = (set(re.findall(r"[a-z]+", cells[2])) - {"nothing"},
                           set(re.findall(r"[a-z_0-9/]+\.h", cells[3])))
    if not rooms:
        findings.add("ARCHITECTURE.md", 1, "there is no table of rooms")
    for name, (may_include, _) in rooms.items():
        for other in sorted(may_include - set(rooms)):
            findings.add("ARCHITECTURE.md", 1, f"{name} may include {other}, which is no room")
    return rooms


def check_cmake(root, rooms, findings):
    """Libraries link what the table lets their room include, no more and no less."""
    text = read(os.path.join(root, "CMakeLists.txt"))
    seen = {}
    for match in re.finditer(r"kvl_room\((\w+)([^)]*)\)", text):
        listed = re.search(r"\bROOMS\b((?:\s+(?!LIBRARIES\b)\S+)*)", match.group(2))
        seen[match.group(1)] = (set(listed.group(1).split()) if listed else set(),
                                line_of(text, match.start()))
    for name in sorted(set(rooms) | set(seen)):
        if name not in seen:
            findings.add("CMakeLists.txt", 1, f"room {name} of ARCHITECTURE.md is missing")
        elif name not in rooms:
            findings.add("CMakeLists.txt", seen[name][1], f"room {name} is not in ARCHITECTURE.md")
        elif rooms[name][0] != seen[name][0]:
            differing = " ".join(sorted(rooms[name][0] ^ seen[name][0]))
            findings.add("CMakeLists.txt", seen[name][1],
                         f"room {name} differs from ARCHITECTURE.md in: {differing}")


def check_folders(root, rooms, findings):
    src = os.path.join(root, "src")
    for name in sorted(os.listdir(src)):
        folder = os.path.join(src, name)
        if os.path.isdir(folder) and os.listdir(folder) and name not in rooms:
            findings.add(f"src/{name}", 1, "is not in the table of rooms of ARCHITECTURE.md")
    for name, (_, doors) in sorted(rooms.items()):
        if not os.path.isdir(os.path.join(src, name)):
            findings.add("ARCHITECTURE.md", 1, f"room {name} has no folder src/{name}")
        for door in sorted(doors):
            if not os.path.isfile(os.path.join(src, name, door)):
                findings.add("ARCHITECTURE.md", 1, f"{name}/{door} is a door but no file")


# --- one source file ---

def check_includes(root, path, text, rooms, included, findings):
    room = path.split("/")[1] if path.count("/") > 1 else None
    code = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group(0)), text, flags=re.S)
    for match in INCLUDE.finditer(code):
        name = match.group(1)
        line = line_of(code, match.start())
        included.add(name)
        if name.endswith(".pb-c.h"):
            if not os.path.isfile(os.path.join(root, "proto", name[:-len(".pb-c.h")] + ".proto")):
                findings.add(path, line, f"{name} has no proto/*.proto that it is made from")
            continue
        if not os.path.isfile(os.path.join(root, "src", name)):
            findings.add(path, line, f'"{name}" is not a path under src/')
            continue
        other, _, file = name.partition("/")
        if room is None or other == room or not file:
            continue
        if other not in rooms.get(room, (set(), set()))[0]:
            findings.add(path, line, f"room {room} may not include {other} (ARCHITECTURE.md)")
        elif rooms.get(other, (set(), set()))[1] and file not in rooms[other][1]:
            findings.add(path, line, f"{name} is private to {other}: not among its doors")


def check_calls(path, text, code, findings):
    in_base = path.startswith("src/base/")
    lines = text.split("\n")
    for match in CALL.finditer(code):
        name = match.group(1)
        if name not in BANNED_EVERYWHERE and (in_base or name not in BANNED_OUTSIDE_BASE):
            continue
        line = line_of(code, match.start())
        near = " ".join(lines[max(0, line - 2):line])
        if any(exempt == name for exempt in EXEMPTION.findall(near)):
            continue
        where = "" if name in BANNED_EVERYWHERE else " outside base"
        findings.add(path, line, f"{name}() is banned{where}")


def functions_of(code):
    """(name, first line, last line) of every function body in code without comments, literals and
    directives. A brace at the outermost level opens a function if a parameter list stands before
    it and no `=`: otherwise it opens a type, a list or an initializer."""
    depth = 0
    start = 0
    for match in re.finditer(r"[{};]", code):
        mark = match.group(0)
        if mark == "{":
            if depth == 0:
                head = code[start:match.start()]
                signature_at = start + len(head) - len(head.lstrip())
                named = re.search(r"([A-Za-z_]\w*)[ \t\n]*\(", head)
                opens = named is not None and ")" in head and "=" not in head
                name = named.group(1) if opens else None
            depth += 1
        elif mark == "}":
            depth -= 1
            if depth == 0:
                if name is not None:
                    yield name, line_of(code, signature_at), line_of(code, match.start())
                start = match.end()
        elif depth == 0:
            start = match.end()


def check_lengths(path, text, code, findings):
    lines = text.split("\n")
    if len(lines) - 1 > FILE_LINES_MAX:
        findings.add(path, FILE_LINES_MAX + 1, f"{len(lines) - 1} lines, at most {FILE_LINES_MAX}")
    for number, line in enumerate(lines, 1):
        if len(line) > COLUMNS_MAX:
            findings.add(path, number, f"{len(line)} columns, at most {COLUMNS_MAX}")
        if "\t" in line:
            findings.add(path, number, "a tab")
        if line != line.rstrip():
            findings.add(path, number, "blanks at the end of the line")
    for name, first, last in functions_of(without_directives(code)):
        if last - first + 1 > FUNCTION_LINES_MAX:
            findings.add(path, first,
                         f"{name}() has {last - first + 1} lines, at most {FUNCTION_LINES_MAX}")


def check_head(path, text, findings):
    """The file says first what it is: `/* room/file.c: purpose`, or its name alone."""
    name = path.rsplit("/", 1)[1]
    if not re.match(r"/\* (?:[a-z_0-9/]+/)?" + re.escape(name) + r"[:,] ", text):
        findings.add(path, 1, f'does not begin with "/* {name}: ..."')


def check_guard(path, text, code, guards, findings):
    match = re.search(r"^#ifndef (\w+)\n#define (\w+)$", code, re.M)
    if match is None or match.group(1) != match.group(2):
        findings.add(path, 1, "no include guard")
        return
    guard = match.group(1)
    if not guard.startswith("KVL_") or not guard.endswith("_H"):
        findings.add(path, line_of(code, match.start()), f"guard {guard} is not KVL_..._H")
    if guard in guards:
        findings.add(path, line_of(code, match.start()), f"guard {guard} is also {guards[guard]}'s")
    guards[guard] = path
    if not re.search(r"^#endif /\* " + guard + r" \*/$", text, re.M):
        findings.add(path, 1, f"the guard's #endif does not name {guard}")


# --- all files ---

def walk(root, top, endings):
    for folder, folders, files in os.walk(os.path.join(root, top)):
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS)
        for file in sorted(files):
            if file.endswith(endings):
                yield os.path.relpath(os.path.join(folder, file), root)


def check_sources(root, rooms, findings):
    included = set()
    guards = {}
    headers = []
    for path in walk(root, "src", (".c", ".h")):
        text = read(os.path.join(root, path))
        code = without_comments(text)
        check_includes(root, path, text, rooms, included, findings)
        check_calls(path, text, code, findings)
        check_lengths(path, text, code, findings)
        check_head(path, text, findings)
        if path.endswith(".h"):
            headers.append(path)
            check_guard(path, text, code, guards, findings)
    for path in walk(root, "tests", (".c", ".h")):
        text = read(os.path.join(root, path))
        check_lengths(path, text, without_comments(text), findings)
        included.update(INCLUDE.findall(text))
    for path in headers:
        if path[len("src/"):] not in included and path != "src/kvloom.h":
            findings.add(path, 1, "nobody includes this header")


def check_texts(root, findings):
    for path in walk(root, ".", TEXT_ENDINGS):
        path = os.path.normpath(path)
        try:
            text = read(os.path.join(root, path))
        except UnicodeDecodeError:
            if path.startswith("tests/golden"):
                continue  # bytes that are no UTF-8 on purpose
            findings.add(path, 1, "is not UTF-8")
            continue
        for number, line in enumerate(text.split("\n"), 1):
            if UNFINISHED.search(line):
                findings.add(path, number, "an unfinished-work mark: finish it or open an issue")
            if MACHINE_PATH.search(line):
                findings.add(path, number, "a path of somebody's machine")
            if path.endswith(".py") and CARRIES_CODE.search(line):
                findings.add(path, number, "S7: a format that carries code")


def main():
    default = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
    root = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else default)
    findings = Findings()
    rooms = read_rooms(root, findings)
    check_cmake(root, rooms, findings)
    check_folders(root, rooms, findings)
    check_sources(root, rooms, findings)
    check_texts(root, findings)
    for path, line, text in sorted(findings.lines):
        print(f"{path}:{line}: {text}")
    print(f"tidy: {len(findings.lines)} findings", file=sys.stderr)
    return 1 if findings.lines else 0


if __name__ == "__main__":
    sys.exit(main())
