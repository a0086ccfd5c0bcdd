#!/usr/bin/env python3
"""/v1/files and /v1/batches with the default model: each row as it would be alone and once, whatever
happens to the server, and nobody waits for it.

    python3 tests/integration/files_contract.py build/release

Exit status 77 where the model is not in the cache."""
import json
import os
import signal
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "support"))
import batch_rows  # noqa: E402
import contract  # noqa: E402
from http_server import MODEL, Server  # noqa: E402

CHAT = "/v1/chat/completions"
WAIT_S = 120


def form(fields, boundary="----a-boundary"):
    """(body, headers); a field is a text, or (filename, bytes)"""
    parts = []
    for name, value in fields:
        head = f'Content-Disposition: form-data; name="{name}"'
        data = value
        if isinstance(value, tuple):
            head += f'; filename="{value[0]}"\r\nContent-Type: application/octet-stream'
            data = value[1]
        data = data if isinstance(data, bytes) else data.encode()
        parts.append(f"--{boundary}\r\n{head}\r\n\r\n".encode() + data + b"\r\n")
    return (b"".join(parts) + f"--{boundary}--\r\n".encode(),
            {"Content-Type": f"multipart/form-data; boundary={boundary}"})


def upload(server, data, headers=None, name="rows.jsonl", purpose="batch"):
    body, own = form([("purpose", purpose), ("file", (name, data))])
    return server.post("/v1/files", body, {**own, **(headers or {})})


def lines_of(made, url=CHAT):
    return "".join(json.dumps({"custom_id": i, "method": "POST", "url": url, "body": b}) + "\n"
                   for i, b in made).encode()


def get(server, path, headers=None):
    status, _, data = server.ask("GET", path, None, headers)
    return status, json.loads(data)


def content(server, file_id, headers=None):
    status, _, data = server.ask("GET", f"/v1/files/{file_id}/content", None, headers)
    assert status == 200, data
    return [json.loads(line) for line in data.decode().splitlines()]


def begin(server, made, headers=None, **fields):
    status, file = upload(server, lines_of(made), headers)
    assert status == 200, file
    status, batch = server.post("/v1/batches", {"input_file_id": file["id"], "endpoint": CHAT,
                                                "completion_window": "24h", **fields}, headers)
    assert status == 200, batch
    return batch


def wait(server, batch, headers=None):
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        _, batch = get(server, "/v1/batches/" + batch["id"], headers)
        if batch["status"] in ("completed", "failed", "expired", "cancelled"):
            return batch
        time.sleep(0.05)
    raise AssertionError(f"the batch is not over: {batch}")


def text_of(line):
    assert line["response"]["status_code"] == 200, line
    return line["response"]["body"]["choices"][0]["message"]["content"]


def check_files(kvloom, folder):
    with Server(kvloom, "127.0.0.1:0", "--data", folder, "--files-mb", "1") as server:
        data = b"\x00one\r\ntwo\xff" * 1000
        status, file = upload(server, data, name="../a \u00fc.jsonl")
        assert status == 200 and file["object"] == "file" and file["purpose"] == "batch", file
        assert file["bytes"] == len(data) and file["filename"] == "a \u00fc.jsonl", file
        assert abs(file["created_at"] - time.time()) < 60
        assert get(server, "/v1/files/" + file["id"]) == (200, file)
        status, headers, found = server.ask("GET", f"/v1/files/{file['id']}/content")
        assert status == 200 and found == data
        assert headers["X-Content-Type-Options"] == "nosniff"
        _, other = upload(server, b"x")
        _, listed = get(server, "/v1/files")
        assert [f["id"] for f in listed["data"]] == [other["id"], file["id"]], listed
        assert listed["has_more"] is False and listed["object"] == "list"
        _, listed = get(server, "/v1/files?limit=1&order=asc")
        assert [f["id"] for f in listed["data"]] == [file["id"]] and listed["has_more"]
        _, listed = get(server, f"/v1/files?after={file['id']}&order=asc&purpose=batch")
        assert [f["id"] for f in listed["data"]] == [other["id"]], listed
        for path, code in (("/v1/files?limit=0", 400), ("/v1/files?limit=x", 400),
                           ("/v1/files?order=up", 400), ("/v1/files/file-1", 404),
                           ("/v1/files/..%2f..%2fetc%2fpasswd/content", 404),
                           (f"/v1/files/{file['id']}/other", 404)):
            status, answer = get(server, path)
            assert status == code and answer["error"]["message"], (path, answer)
        for change, param in (({"purpose": "assistants"}, "purpose"), ({"purpose": "x" * 99}, "purpose")):
            status, answer = upload(server, b"x", **change)
            assert status == 400 and answer["error"]["param"] == param, answer
        body, headers = form([("purpose", "batch")])
        status, answer = server.post("/v1/files", body, headers)
        assert status == 400 and answer["error"]["param"] == "file", answer
        body, headers = form([("purpose", "batch"), ("file", ("a", b"x" * 5000))])
        assert server.post("/v1/files", body[:3000], headers)[0] == 400
        assert server.post("/v1/files", {"purpose": "batch"})[0] == 400
        status, answer = upload(server, b"x" * (1 << 20))
        assert status == 413 and answer["error"]["code"] == "storage_limit_exceeded", answer
        assert server.ask("PUT", "/v1/files")[0] == 405
        status, _, gone = server.ask("DELETE", "/v1/files/" + file["id"])
        assert status == 200 and json.loads(gone) == {"id": file["id"], "object": "file",
                                                      "deleted": True}
        assert server.ask("DELETE", "/v1/files/" + file["id"])[0] == 404
        # Nothing of what was refused is left behind.
        names = [name for _, _, names in os.walk(folder) for name in names]
        assert sorted(names) == sorted([other["id"] + ".data", other["id"] + ".json"]), names
    with Server(kvloom, "127.0.0.1:0", "--data", folder) as server:
        assert [f["id"] for f in get(server, "/v1/files")[1]["data"]] == [other["id"]]
    with Server(kvloom) as server:
        status, answer = get(server, "/v1/files")
        assert status == 404 and "--data" in answer["error"]["message"]


def check_a_batch_is_answered(kvloom, folder):
    """As alone; with refused rows in a file of their own; and somebody in a hurry goes before it."""
    made = batch_rows.rows(3, 5, 60, 60, 24)
    bad = [("hot", {**made[0][1], "temperature": 9}), ("stream", {**made[0][1], "stream": True})]
    with Server(kvloom, "127.0.0.1:0", "--data", folder) as server:
        batch = begin(server, made + bad, metadata={"who": "a test"})
        assert batch["status"] == "validating" and batch["metadata"] == {"who": "a test"}, batch
        start = time.monotonic()
        status, _ = server.chat("Say one word.", max_tokens=2)
        hurry_s = time.monotonic() - start
        assert status == 200
        assert server.ask("DELETE", "/v1/files/" + batch["input_file_id"])[0] in (200, 409)
        done = wait(server, batch)
        assert done["status"] == "completed", done
        assert done["request_counts"] == {"total": len(made) + 2, "completed": len(made),
                                          "failed": 2}, done
        for name in ("in_progress_at", "finalizing_at", "completed_at"):
            assert done[name] >= done["created_at"], done
        found = {line["custom_id"]: text_of(line) for line in content(server, done["output_file_id"])}
        assert set(found) == {i for i, _ in made}
        refused = {line["custom_id"]: line for line in content(server, done["error_file_id"])}
        assert set(refused) == {"hot", "stream"}
        assert refused["hot"]["response"]["body"]["error"]["param"] == "temperature"
        for custom_id, body in made[::6]:
            _, whole = server.post(CHAT, body)
            assert whole["choices"][0]["message"]["content"] == found[custom_id]
        assert get(server, "/v1/files/" + done["output_file_id"])[1]["purpose"] == "batch_output"
        assert server.ask("POST", f"/v1/batches/{done['id']}/cancel")[0] == 409
        print(f"  an answer beside the batch came after {hurry_s:.2f} s")


def check_bad_batches(kvloom, folder):
    good = batch_rows.rows(1, 1, 5, 5, 4)
    with Server(kvloom, "127.0.0.1:0", "--data", folder) as server:
        _, file = upload(server, lines_of(good))
        asked = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
        for param, change in (("input_file_id", {"input_file_id": "file-" + "0" * 24}),
                              ("input_file_id", {"input_file_id": None}),
                              ("endpoint", {"endpoint": "/v1/embeddings"}),
                              ("completion_window", {"completion_window": "1h"}),
                              ("output_expires_after", {"output_expires_after": {"seconds": 1}}),
                              ("metadata", {"metadata": {"a": 5}})):
            status, answer = server.post("/v1/batches", {**asked, **change})
            assert status == 400 and answer["error"]["param"] == param, answer
        assert server.post("/v1/batches", b"{")[0] == 400
        assert get(server, "/v1/batches/batch_" + "0" * 24)[0] == 404
        assert server.ask("POST", "/v1/batches/batch_" + "0" * 24 + "/cancel")[0] == 404
        line = lines_of(good).decode()
        for text, word in (("{\n", "line 1"), (line + line, "line 2"),
                           (lines_of(good, "/v1/completions").decode(), "url /v1/chat/completions")):
            _, file = upload(server, text.encode())
            _, batch = server.post("/v1/batches", {**asked, "input_file_id": file["id"]})
            done = wait(server, batch)
            assert done["status"] == "failed" and done["failed_at"], done
            message = done["errors"]["data"][0]["message"]
            assert word in message and folder not in message, message
        _, listed = get(server, "/v1/batches?limit=2")
        assert len(listed["data"]) == 2 and listed["has_more"]
        _, rest = get(server, "/v1/batches?after=" + listed["last_id"])
        assert len(rest["data"]) == 1 and not rest["has_more"]


def check_cancelling(kvloom, folder):
    made = batch_rows.rows(4, 10, 40, 40, 40)
    with Server(kvloom, "127.0.0.1:0", "--data", folder, "--answers", "4") as server:
        batch, waiting = begin(server, made), begin(server, made)
        deadline = time.monotonic() + WAIT_S
        while get(server, "/v1/batches/" + batch["id"])[1]["request_counts"]["completed"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for one in (waiting, batch):
            status, _, data = server.ask("POST", f"/v1/batches/{one['id']}/cancel")
            assert status == 200 and json.loads(data)["status"] == "cancelling", data
        done = wait(server, batch)
        assert done["status"] == "cancelled" and done["cancelled_at"], done
        n = done["request_counts"]["completed"]
        assert 2 <= n < len(made), done
        assert len(content(server, done["output_file_id"])) == n
        done = wait(server, waiting)
        assert done["status"] == "cancelled" and done["output_file_id"] is None, done
        deadline = time.monotonic() + 10
        while server.metrics()["kvloom_running_answers"] > 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def lines_at(folder, batch):
    for where, _, names in os.walk(folder):
        if batch["id"] + ".lines" in names:
            with open(os.path.join(where, batch["id"] + ".lines"), "rb") as lines:
                return lines.read().split(b"\n")[:-1]
    return []


def check_a_killed_server_goes_on(kvloom, folder):
    """Killed at any moment: each row once at the end, and what was answered is not computed again."""
    made = batch_rows.rows(4, 8, 40, 40, 24)
    known = []
    for round_ in range(3):
        server = Server(kvloom, "127.0.0.1:0", "--data", folder, "--answers", "4")
        if round_ == 0:
            batch = begin(server, made)
        n_before = len(known)
        deadline = time.monotonic() + WAIT_S
        while len(known) < min(n_before + 4, len(made) - 4) and time.monotonic() < deadline:
            known = lines_at(folder, batch)
            time.sleep(0.02)
        # Told to stop it ends at once, killed it cannot do anything.
        if round_ == 1:
            assert server.stop() == 0, server.said
        else:
            server.process.send_signal(signal.SIGKILL)
            server.stop()
        before, known = known, lines_at(folder, batch)
        assert known[:len(before)] == before and 0 < len(known) < len(made), len(known)
    with Server(kvloom, "127.0.0.1:0", "--data", folder) as server:
        done = wait(server, batch)
        n_computed = server.metrics()["kvloom_answer_tokens_total"]
        assert done["status"] == "completed", done
        assert done["request_counts"]["completed"] == len(made), done
        answers = content(server, done["output_file_id"])
        assert sorted(a["custom_id"] for a in answers) == sorted(i for i, _ in made)
        assert answers[:len(known)] == [json.loads(line) for line in known]
        rest = sum(a["response"]["body"]["usage"]["completion_tokens"]
                   for a in answers[len(known):])
        assert n_computed == rest, (n_computed, rest)
        assert lines_at(folder, batch) == []


def check_tenants(kvloom, folder):
    keys = os.path.join(folder, "keys")
    with open(keys, "w", encoding="ascii") as out:
        out.write("red key-of-red-0123456789\nblue key-of-blue-0123456789\n")
    red, blue = ({"Authorization": f"Bearer key-of-{name}-0123456789"} for name in ("red", "blue"))
    made = batch_rows.rows(1, 2, 5, 5, 4)
    with Server(kvloom, "127.0.0.1:0", "--api-keys", keys, "--data",
                os.path.join(folder, "data")) as server:
        batch = begin(server, made, red)
        done = wait(server, batch, red)
        assert done["status"] == "completed", done
        for path in ("/v1/files/" + batch["input_file_id"], "/v1/batches/" + batch["id"],
                     f"/v1/files/{done['output_file_id']}/content"):
            assert server.ask("GET", path, None, blue)[0] == 404, path
            assert server.ask("GET", path)[0] == 401
            assert server.ask("GET", path, None, red)[0] == 200
        assert server.ask("DELETE", "/v1/files/" + batch["input_file_id"], None, blue)[0] == 404
        assert upload(server, b"x")[0] == 401
        for path in ("/v1/files", "/v1/batches"):
            assert get(server, path, blue)[1]["data"] == []
        status, answer = server.post("/v1/batches", {
            "input_file_id": batch["input_file_id"], "endpoint": CHAT,
            "completion_window": "24h"}, blue)
        assert status == 400 and answer["error"]["param"] == "input_file_id"


def main():
    contract.need_model(MODEL)
    checks = contract.Checks()
    for check in (check_files, check_a_batch_is_answered, check_bad_batches, check_cancelling,
                  check_a_killed_server_goes_on, check_tenants):
        checks.run_in_folder(check, contract.program())
    return checks.status()


if __name__ == "__main__":
    sys.exit(main())
