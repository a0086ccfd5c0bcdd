#!/usr/bin/env python3
"""`kvloom ingest` and `kvloom ask` with the default model: what scripts rely on.

    python3 tests/integration/rag_contract.py build/release

Exit status 77 where the model is not in the cache."""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "support"))
import contract  # noqa: E402

MODEL = "smollm2-135m"
SUBJECTS = ("harbour crane", "tram depot", "glass works", "night school")


def start(kvloom, *arguments):
    return subprocess.Popen([kvloom, *arguments, "--model", MODEL], stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(kvloom, *arguments, status=0):
    process = start(kvloom, *arguments)
    out, errors = process.communicate(timeout=600)
    if process.returncode != status:
        raise AssertionError(f"{' '.join(arguments)}: status {process.returncode}: "
                             f"{errors.decode(errors='replace')[-400:]}")
    return out if status == 0 else errors.decode(errors="replace")


def ingest(kvloom, collection, *paths):
    return json.loads(run(kvloom, "ingest", *paths, "--collection", collection, "--json"))


def ask(kvloom, collection, question, *more):
    return json.loads(run(kvloom, "ask", question, "--collection", collection, "--max-tokens", "24",
                          "--json", *more))


def paragraph(subject, number):
    return (f"Part {number} of the report on the {subject}. In the spring of that year the people "
            f"of the {subject} counted {number * 37 % 91} windows and {number * 53 % 97} doors, "
            "and wrote down what was broken, what had been mended, and who had done it. Nobody "
            "asked them to; they thought that somebody would want to know one day.\n\n")


def write_documents(folder):
    for place, subject in enumerate(SUBJECTS):
        text = f"# The {subject}\n\n" + "".join(paragraph(subject, n) for n in range(8))
        text += f"The access code of the {subject} is {4711 + place}.\n"
        with open(os.path.join(folder, f"{place}.md"), "w", encoding="utf-8") as out:
            out.write(text)
    with open(os.path.join(folder, "photo.jpg"), "wb") as out:
        out.write(b"\xff\xd8\xff\xe0 no text")


def check_resumes_after_a_kill(kvloom, folder, collection):
    """Killed in the middle, gone on with, and the third time there is nothing to do."""
    process = start(kvloom, "ingest", folder, "--collection", collection)
    seen = b""
    while b" of " not in seen:
        line = process.stderr.readline()
        assert line, "it ended before the first chunk was read"
        seen += line
    process.send_signal(signal.SIGKILL)
    process.communicate()
    second = ingest(kvloom, collection, folder)
    n_chunks = second["collection"]["chunks"]
    assert second["unchanged"] == second["documents"] == len(SUBJECTS), second
    assert 0 < second["prefilled"] < n_chunks, second
    assert second["collection"]["unread"] == 0
    assert [os.path.basename(s["path"]) for s in second["skipped"]] == ["photo.jpg"]
    assert "not UTF-8" in second["skipped"][0]["reason"]
    begun = time.monotonic()
    third = ingest(kvloom, collection, folder)
    assert third["prefilled"] == third["new_chunks"] == third["removed"] == 0, third
    assert time.monotonic() - begun < 5


def check_answers(kvloom, collection):
    """The fact's document comes first, its chunks are reused, and what verified says is exact's."""
    question = "What is the access code of the tram depot?"
    balanced = ask(kvloom, collection, question)
    assert os.path.basename(balanced["sources"][0]["path"]) == "1.md", balanced["sources"]
    usage = balanced["usage"]
    assert usage["reused_tokens"] > usage["prompt_tokens"] / 2, usage
    assert 0 < usage["recomputed_tokens"] < 0.3 * usage["reused_tokens"], usage
    assert not balanced["exact"] and not balanced["verified"]
    exact = ask(kvloom, collection, question, "--quality", "exact")
    assert exact["exact"] and exact["usage"]["recomputed_tokens"] == 0
    assert all(s["blended"] == 0 for s in exact["sources"])
    verified = ask(kvloom, collection, question, "--quality", "verified")
    assert verified["verified"] and verified["answer"] == exact["answer"], (verified, exact)
    fast = ask(kvloom, collection, question, "--quality", "fast", "--top", "2")
    assert len(fast["sources"]) == 2
    assert fast["usage"]["recomputed_tokens"] == 16, fast["usage"]
    # Exact prompts have left donors of their chunks: they are used where nobody says otherwise.
    assert not any(s["donor"] for s in balanced["sources"]), balanced["sources"]
    donors = ask(kvloom, collection, "Which code does the tram depot have?")
    shared = {(s["path"], s["chunk"]) for s in exact["sources"]}
    assert any(s["donor"] for s in donors["sources"]), donors["sources"]
    for source in donors["sources"]:
        is_known = (source["path"], source["chunk"]) in shared
        assert source["donor"] == (is_known and source["blended"] > 0), (source, shared)
    streamed = run(kvloom, "ask", question, "--collection", collection, "--donors", "off",
                   "--max-tokens", "24").decode()
    assert streamed.startswith(balanced["answer"]), (streamed, balanced["answer"])
    assert "Sources, best first:" in streamed and "1.md, chunk" in streamed


def check_edits(kvloom, folder, collection):
    """A word changes a chunk or two, a removed document goes, and its KV too."""
    path = os.path.join(folder, "2.md")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    with open(path, "w", encoding="utf-8") as out:
        out.write(text.replace("4713", "8888"))
    os.remove(os.path.join(folder, "3.md"))
    report = ingest(kvloom, collection, folder)
    assert 1 <= report["new_chunks"] <= 2 and report["prefilled"] == report["new_chunks"], report
    assert report["removed"] == 1 and report["forgotten"] >= 2, report
    answer = ask(kvloom, collection, "What is the access code of the night school?")
    assert all(not s["path"].endswith("3.md") for s in answer["sources"])
    again = ingest(kvloom, collection, folder)
    assert again["forgotten"] == again["prefilled"] == 0, again


def check_wrong_use(kvloom, folder, collection):
    for text, arguments in (
            ("make it with `kvloom ingest", ("ask", "what?", "--collection", folder + "/none")),
            ("has a word of the question", ("ask", "xyzzy", "--collection", collection)),
            ("no word to look for", ("ask", "?!", "--collection", collection)),
            ("No such file", ("ingest", folder + "/nothing", "--collection", collection)),
            ("it must be a name", ("ask", "what?", "--collection", ".odd"))):
        errors = run(kvloom, *arguments, status=1)
        assert text in errors, errors
    for text, arguments in (
            ("must be exact, verified, balanced or fast",
             ("ask", "what?", "--quality", "perfect")),
            ("must be on, read or off", ("ask", "what?", "--donors", "often")),
            ("--top", ("ask", "what?", "--top", "0")),
            ("--chunk-tokens", ("ingest", folder, "--chunk-tokens", "7"))):
        process = start(kvloom, *arguments)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0 and text in errors.decode(), errors


FIGURES = {"ttft_ratio_lmdb", "ttft_ratio_memory", "ttft_ratio_fast", "throughput_ratio",
           "overlap_ratio", "selective15_cost_ratio"}


def check_bench(kvloom):
    """Its keys, and that what it measures is what it says; speeds are not judged here."""
    report = json.loads(run(kvloom, "bench", "rag", "--quick", "--json"))
    assert report["name"] == "rag" and not FIGURES - set(report["figures"]), report["figures"]
    assert all(report[name] == report["figures"][name] > 0 for name in FIGURES)
    for row in report["rows"]:
        if row.get("way") == "fast":
            assert 0 < row["recomputed"] <= 0.05 * row["placed"], row
        if row.get("way") == "balanced":
            assert 0 < row["recomputed"] <= 0.15 * row["placed"], row
        if row.get("way") == "full prefill":
            assert row["placed"] == 0 and row["tokens"] > 1000, row


def main():
    kvloom = os.path.abspath(os.path.join(sys.argv[1] if len(sys.argv) > 1 else "build/release",
                                          "kvloom"))
    contract.need_model(MODEL)
    checks = contract.Checks()
    with tempfile.TemporaryDirectory() as place:
        folder = os.path.join(place, "documents")
        collection = os.path.join(place, "collection")
        os.mkdir(folder)
        write_documents(folder)
        checks.run(check_resumes_after_a_kill, kvloom, folder, collection)
        checks.run(check_answers, kvloom, collection)
        checks.run(check_edits, kvloom, folder, collection)
        checks.run(check_wrong_use, kvloom, folder, collection)
        checks.run(check_bench, kvloom)
    return checks.status()


if __name__ == "__main__":
    sys.exit(main())
