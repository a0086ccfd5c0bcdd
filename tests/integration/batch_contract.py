#!/usr/bin/env python3
"""`kvloom batch` with the default model: each row as it would be alone, once, whatever happens.

    python3 tests/integration/batch_contract.py build/release

Exit status 77 where the model is not in the cache."""
import json
import os
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "support"))
import batch_rows  # noqa: E402
import contract  # noqa: E402
from http_server import MODEL, Server  # noqa: E402


def batch(kvloom, source, target, *options, status=0):
    done = subprocess.run([kvloom, "batch", "--model", MODEL, "--json", *options, source, target],
                          capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == status, (done.returncode, done.stderr[-400:])
    return json.loads(done.stdout)["figures"] if done.stdout else done.stderr


def text_of(response):
    assert response["status_code"] == 200, response
    return response["body"]["choices"][0]["message"]["content"]


def check_rows_are_answered_as_alone(kvloom, folder):
    """In both orders, with few pages, and by the server: the same answers."""
    made = batch_rows.rows(3, 6, 60, 60, 16)
    source = os.path.join(folder, "in.jsonl")
    batch_rows.write(source, made)
    answers = []
    for name, options in (("plan", ("--order", "plan")), ("file", ("--order", "file")),
                          ("few", ("--pages", "60", "--answers", "16"))):
        target = os.path.join(folder, name)
        figures = batch(kvloom, source, target, *options)
        assert figures["rows"] == figures["answered"] == len(made), figures
        assert figures["cached_tokens"] > 0.5 * figures["prompt_tokens"], figures
        answers.append({i: text_of(r) for i, r in batch_rows.read(target).items()})
        if name == "plan":
            # Nothing that the plan says to share was computed twice.
            computed = figures["prompt_tokens"] - figures["cached_tokens"]
            assert computed == figures["distinct_tokens"], figures
            assert figures["groups"] == 3, figures
    assert set(answers[0]) == {custom_id for custom_id, _ in made}
    assert answers[0] == answers[1] == answers[2]
    with Server(kvloom) as server:
        for custom_id, body in made[::5]:
            _, whole = server.post("/v1/chat/completions", body)
            assert whole["choices"][0]["message"]["content"] == answers[0][custom_id]


def check_a_killed_batch_goes_on(kvloom, folder):
    """Killed at any moment, with half a line in its file: each row once at the end."""
    made = batch_rows.rows(4, 8, 40, 40, 24)
    source, target = os.path.join(folder, "in.jsonl"), os.path.join(folder, "out.jsonl")
    batch_rows.write(source, made)
    n_before = 0
    for _ in range(2):
        with subprocess.Popen([kvloom, "batch", "--model", MODEL, "--answers", "4", source, target],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and process.poll() is None:
                if os.path.exists(target):
                    with open(target, "rb") as lines:
                        if lines.read().count(b"\n") >= n_before + 4:
                            break
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        n_before = len(batch_rows.read(target))
        assert 0 < n_before < len(made), n_before
        with open(target, "ab") as out:
            out.write(b'{"id": "batch", "custom_id": "r0-')
    before = {}
    with open(target, encoding="utf-8") as lines:
        for line in lines.read().split("\n")[:-1]:
            before[json.loads(line)["custom_id"]] = line
    figures = batch(kvloom, source, target)
    assert figures["resumed"] == len(before) == n_before, figures
    assert figures["answered"] == len(made) - n_before, figures
    found = batch_rows.read(target)
    assert set(found) == {custom_id for custom_id, _ in made}
    with open(target, encoding="utf-8") as lines:
        assert lines.read().split("\n")[:n_before] == list(before.values()), "lines were changed"
    # And once more: nothing is left to do.
    figures = batch(kvloom, source, target)
    assert figures["resumed"] == len(made) and figures["answered"] == 0, figures
    assert batch_rows.read(target) == found


def check_bad_rows(kvloom, folder):
    """What one row may not ask is answered in its place; what is no batch is refused whole."""
    source, target = os.path.join(folder, "in.jsonl"), os.path.join(folder, "out.jsonl")
    good = batch_rows.rows(1, 2, 5, 5, 4)
    batch_rows.write(source, good + [("hot", {**good[0][1], "temperature": 9}),
                                     ("stream", {**good[0][1], "stream": True}),
                                     ("long", {**good[0][1], "max_tokens": 10 ** 6})])
    figures = batch(kvloom, source, target, status=1)
    assert figures["answered"] == 2 and figures["refused"] == 3, figures
    found = batch_rows.read(target)
    assert found["hot"]["status_code"] == 400
    assert found["hot"]["body"]["error"]["param"] == "temperature"
    assert found["stream"]["body"]["error"]["param"] == "stream"
    assert found["long"]["body"]["error"]["param"] == "max_tokens"
    line = json.dumps({"custom_id": "a", "url": "/v1/chat/completions", "body": good[0][1]})
    for text, word in (("{", "line 1"), (line + "\n" + line, "line 2"),
                       (line.replace("/v1/chat/completions", "/v1/embeddings"), "url"),
                       (line.replace('"custom_id": "a"', '"custom_id": 5'), "custom_id")):
        other = os.path.join(folder, "other")
        with open(source, "w", encoding="utf-8") as out:
            out.write(text + "\n")
        said = batch(kvloom, source, other, status=1)
        assert word in said, (word, said)
        assert not os.path.exists(other)


def main():
    contract.need_model(MODEL)
    checks = contract.Checks()
    for check in (check_rows_are_answered_as_alone, check_a_killed_batch_goes_on, check_bad_rows):
        checks.run_in_folder(check, contract.program())
    return checks.status()


if __name__ == "__main__":
    sys.exit(main())
