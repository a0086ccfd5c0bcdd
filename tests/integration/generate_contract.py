#!/usr/bin/env python3
"""`kvloom generate`, `tokenize` and `bench` with the default model: the promises that scripts rely on.

    python3 tests/integration/generate_contract.py build/release

Exit status 77 where the model is not in the cache."""
import json
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "support"))
import contract  # noqa: E402

MODEL = "smollm2-135m"
# Long runs of blanks, digits, emoji with joiners, and bytes that are no UTF-8: a lone continuation,
# a beginning without an end. (Bytes that no character begins with, as 0xff, are not in the model's
# vocabulary: they cannot come back.)
BYTES = ("Grüße aus Tornby, 17 May 1907\n\n\n        x = 0x7fff;\t\t\n"
         "\U0001f469\u200d\U0001f52c e\u0301 \u6865\u5c06 \u0663\u0664").encode() + b"\x80 \xe2\x28 end \xe6\xa1"


def run(kvloom, *arguments):
    done = subprocess.run([kvloom, *arguments], capture_output=True, stdin=subprocess.DEVNULL,
                          check=False)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(arguments)}: status {done.returncode}: "
                             f"{done.stderr.decode(errors='replace')[-400:]}")
    return done.stdout


def check_streaming_equals_json(kvloom, folder):
    """The streamed text, the JSON's text, and the JSON's tokens turned back are the same answer,
    twice in a row, with any number of threads."""
    prompt = ("generate", "--model", MODEL, "--prompt", "Name three uses of copper.",
              "--max-tokens", "40")
    streamed = run(kvloom, *prompt).decode()
    answer = json.loads(run(kvloom, *prompt, "--json"))
    again = json.loads(run(kvloom, *prompt, "--json", "--threads", "1"))
    assert streamed == answer["text"] + "\n", "streamed text differs from the JSON's"
    assert answer["tokens"] == again["tokens"], "one thread gives other tokens"
    assert 0 < len(answer["tokens"]) <= 40
    assert answer["usage"]["completion_tokens"] == len(answer["tokens"])
    assert answer["usage"]["total_tokens"] == (answer["usage"]["prompt_tokens"]
                                               + len(answer["tokens"]))
    assert answer["finish_reason"] in ("stop", "length")
    assert len(answer["text"].split()) > 10, "no sentence"


def check_messages_equal_prompt(kvloom, folder):
    """--prompt is one user message, from the command line or a file."""
    text = "What is 17 plus 25?"
    messages = os.path.join(folder, "messages.json")
    file = os.path.join(folder, "prompt.txt")
    with open(messages, "w", encoding="utf-8") as out:
        json.dump([{"role": "user", "content": text}], out)
    with open(file, "w", encoding="utf-8") as out:
        out.write(text)
    common = ("generate", "--model", MODEL, "--max-tokens", "12", "--json")
    answers = [json.loads(run(kvloom, *common, *how)) for how in
               (("--prompt", text), ("--prompt-file", file), ("--messages", messages))]
    assert answers[0]["tokens"] == answers[1]["tokens"] == answers[2]["tokens"]


def check_chat_goes_on(kvloom, folder):
    """The first answer is what `generate` gives; later turns know what was said."""
    text = "Name three uses of copper."
    said = subprocess.run([kvloom, "chat", "--model", MODEL, "--max-tokens", "24"], input=text
                          + "\n\nAnd of tin?\n", capture_output=True, text=True, check=True)
    alone = run(kvloom, "generate", "--model", MODEL, "--prompt", text, "--max-tokens", "24")
    assert said.stdout.startswith(alone.decode()), said.stdout
    known = [line for line in said.stderr.splitlines() if "prompt tokens were known" in line]
    assert len(known) == 2 and known[0].startswith("[0 of "), known
    assert int(known[1][1:].split()[0]) >= 32, known


def check_tokens_round_trip(kvloom, folder):
    """Every byte comes back, also those that are no UTF-8."""
    text, ids = os.path.join(folder, "text"), os.path.join(folder, "ids")
    with open(text, "wb") as out:
        out.write(BYTES)
    with open(ids, "wb") as out:
        out.write(run(kvloom, "tokenize", "--model", MODEL, text))
    with open(ids, encoding="ascii") as lines:
        assert all(line.strip().isdigit() for line in lines)
    back = run(kvloom, "tokenize", "--model", MODEL, "--decode", ids)
    assert back == BYTES, f"{back!r}"


def check_bench(kvloom, folder):
    """One JSON object and nothing else, with figures that can be true."""
    for name in ("prefill", "decode"):
        report = json.loads(run(kvloom, "bench", "--model", MODEL, "--tokens", "64", "--repeats", "1",
                                "--json", name))
        assert report["name"] == name
        assert set(report) >= {"figures", "rows", "machine", "version"}
        figures = report["figures"]
        assert figures[f"{name}_tokens_per_s"] > 0
        fraction = figures["fraction_of_sgemm" if name == "prefill"
                           else "fraction_of_memory_bandwidth"]
        assert 0 < fraction < 1.5, fraction


def check_bench_attention(kvloom, folder):
    """Every cell says what it was measured beside; sharing never loses by much, and a tree gains."""
    report = json.loads(run(kvloom, "bench", "--model", MODEL, "--repeats", "1", "--shape",
                            "smollm2-135m", "--json", "attention"))
    cells = [row for row in report["rows"] if "prefix" in row]
    assert {(row["rows"], row["prefix"]) for row in cells} == {
        (rows, prefix) for rows in (8, 32, 128) for prefix in (1024, 4096, 8192)}
    for row in cells:
        limit = max(row["limit_bytes_ms"], row["limit_operations_ms"])
        assert abs(row["fraction_of_limit"] - limit / row["shared_ms"]) < 1e-6, row
        assert row["sgemm_gflops"] > 0 and row["read_gb_per_s"] > 0, row
    assert report["figures"]["shared_vs_unshared_b32_p8k"] > 1.0, report["figures"]
    assert report["figures"]["tree_time_saved"] > 0.0, report["figures"]
    assert 0 < report["figures"]["throughput_drop_1k_16k"] < 1, report["figures"]


def main():
    contract.need_model(MODEL)
    checks = contract.Checks()
    for check in (check_streaming_equals_json, check_messages_equal_prompt, check_chat_goes_on,
                  check_tokens_round_trip, check_bench, check_bench_attention):
        checks.run_in_folder(check, contract.program())
    return checks.status()


if __name__ == "__main__":
    sys.exit(main())
