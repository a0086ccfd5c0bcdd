#!/usr/bin/env python3
"""`kvloom serve --http` with the default model, as OpenAI's clients see it.

    python3 tests/integration/http_contract.py build/release [SECONDS]

SECONDS (8) is how long clients come and go at random. Exit status 77 where the model is not in the
cache."""
import concurrent.futures
import copy
import http.client
import json
import os
import random
import ssl
import subprocess
import sys
import threading
import time
import warnings

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "support"))
import contract  # noqa: E402
from http_server import MODEL, Server  # noqa: E402

CHAT, TEXT, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SHARED = " ".join(f"Rule {i}: a keeper notes the wind at hour {i % 24}." for i in range(60))


def text_of(answer):
    return answer["choices"][0]["message"]["content"]


def check_streams_say_what_whole_answers_say(server):
    body = {"model": MODEL, "max_tokens": 24, "temperature": 0, "n": 2,
            "messages": [{"role": "system", "content": "Be brief."},
                         {"role": "user", "content": [{"type": "text", "text": "Name three "},
                                                      {"type": "text", "text": "metals. 你好"}]}]}
    status, whole = server.post(CHAT, body)
    assert status == 200, whole
    events = server.events(CHAT, {**body, "stream_options": {"include_usage": True}})
    for index in range(2):
        own = [c for e in events for c in e["choices"] if c["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        text = "".join(c["delta"].get("content", "") for c in own)
        assert text == whole["choices"][index]["message"]["content"] != ""
        assert own[-1]["finish_reason"] == whole["choices"][index]["finish_reason"]
        assert all(c["finish_reason"] is None for c in own[:-1])
    assert [e for e in events if e["choices"] == []] == events[-1:]
    usage = events[-1]["usage"]
    assert usage["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"] <= 48
    assert len({e["id"] for e in events}) == 1


def check_completions_and_logprobs(server):
    body = {"prompt": "The capital of France is", "max_tokens": 6, "temperature": 0, "logprobs": 3}
    status, whole = server.post(TEXT, body)
    assert status == 200, whole
    choice = whole["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert all(n <= 0 for n in choice["logprobs"]["token_logprobs"])
    assert all(len(top) == 3 for top in choice["logprobs"]["top_logprobs"])
    streamed = "".join(c["text"] for e in server.events(TEXT, body) for c in e["choices"])
    assert streamed == choice["text"]
    status, chat = server.chat("Hello", logprobs=True, top_logprobs=2, max_tokens=5)
    for entry in chat["choices"][0]["logprobs"]["content"]:
        # Greedy: what was drawn is the likeliest.
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert bytes(entry["bytes"]).decode(errors="replace")


def check_what_is_known_is_not_computed_again(server):
    _, first = server.chat(SHARED + " Summarise the rules.")
    _, second = server.chat(SHARED + " Count the rules.")
    usage = second["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0.9 * usage["prompt_tokens"] - 32
    assert second["kvloom"]["computed_tokens"] == (
        usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"])
    _, again = server.chat(SHARED + " Summarise the rules.")
    assert text_of(again) == text_of(first), "a cached prompt gave another answer"
    # Another salt shares nothing, and answers the same.
    _, salted = server.chat(SHARED + " Summarise the rules.", cache_salt="other")
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert text_of(salted) == text_of(first)


def check_sampling_fields(server):
    _, one = server.chat("Tell me a story.", temperature=1.2, seed=7)
    _, two = server.chat("Tell me a story.", temperature=1.2, seed=7)
    _, other = server.chat("Tell me a story.", temperature=1.2, seed=8)
    assert text_of(one) == text_of(two) != text_of(other)
    _, greedy = server.chat("Count from one to ten in words.", max_tokens=60)
    stop = text_of(greedy)[10:14]
    _, stopped = server.chat("Count from one to ten in words.", max_tokens=60, stop=[stop, "xyzzy"])
    assert text_of(stopped) == text_of(greedy)[:text_of(greedy).index(stop)]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    _, branches = server.chat("Tell me a story.", temperature=1.2, seed=7, n=3)
    assert len({c["message"]["content"] for c in branches["choices"]}) == 3
    assert text_of(branches) == text_of(one)


def check_errors_name_the_field(server):
    good = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    for param, change in (
            ("messages", {"messages": []}), ("messages", {"messages": "hi"}),
            ("messages[0]", {"messages": [{"role": "robot", "content": "hi"}]}),
            ("messages[0]", {"messages": [{"role": "user", "content": 5}]}),
            ("temperature", {"temperature": 3}), ("temperature", {"temperature": "hot"}),
            ("top_p", {"top_p": 2}), ("n", {"n": 0}), ("n", {"n": 1.5}), ("stop", {"stop": [""]}),
            ("stop", {"stop": ["a"] * 17}), ("max_tokens", {"max_tokens": 0}),
            ("max_tokens", {"max_tokens": 10 ** 6}), ("top_logprobs", {"top_logprobs": 3}),
            ("seed", {"seed": "x"}), ("cache_salt", {"cache_salt": "a/b"}),
            ("cache_salt", {"cache_salt": ""}), ("cache_salt", {"cache_salt": "a" * 129}),
            ("cache_salt", {"cache_salt": "a\u0000b"}), ("stream_options", {"stream_options": {}}),
            ("tools[0]", {"tools": [{"type": "function"}]}), ("tool_choice", {"tool_choice": "required"}),
            ("messages", {"messages": [{"role": "tool", "content": "x"}]}), ("logit_bias", {"logit_bias": {"5": 1}}),
            ("response_format", {"response_format": {"type": "json_object"}}),
            ("presence_penalty", {"presence_penalty": -3})):
        status, answer = server.post(CHAT, {**good, **change})
        assert status == 400, (change, status, answer)
        assert answer["error"]["param"] == param, (change, answer)
        assert answer["error"]["type"] == "invalid_request_error"
        assert answer["error"]["message"]
    for param, change in (
            ("input", {"input": []}), ("input", {"input": 5}), ("input", {}),
            ("input", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
            ("input", {"input": [{"type": "function_call_output"}]}),
            ("instructions", {"input": "hi", "instructions": 5}),
            ("previous_response_id", {"input": "hi", "previous_response_id": "resp_1"}),
            ("max_output_tokens", {"input": "hi", "max_output_tokens": -1}),
            ("text", {"input": "hi", "text": {"format": {"type": "json_object"}}}),
            ("tools", {"input": "hi", "tools": [{"type": "function"}]})):
        status, answer = server.post(RESPONSE, change)
        assert status == 400 and answer["error"]["param"] == param, (change, answer)
    status, answer = server.post(CHAT, {**good, "model": "gpt-9"})
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    long = {"messages": [{"role": "user", "content": "word " * 9000}]}
    status, answer = server.post(CHAT, long)
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded", answer
    for body in (b"", b"{", b"[]", b"\xff\xfe", b'{"a":1,"a":2}', b"[" * 100000):
        status, answer = server.post(CHAT, body)
        assert status == 400 and answer["error"]["message"], body[:20]
    assert server.ask("GET", CHAT)[0] == 405
    assert server.ask("POST", "/v1/nothing", {})[0] == 404
    assert server.ask("GET", "/v1/models/" + MODEL)[0] == 200
    assert server.ask("GET", "/v1/models/other")[0] == 404


def mutate(chance, value):
    """Something else in place of a part of a JSON value."""
    if chance.random() < 0.35 or not isinstance(value, (dict, list)) or not value:
        return chance.choice([None, True, -1, 0, 2 ** 63, 1e308, "", "x" * 300, "\u0000", [], {},
                              [[]], {"type": "text"}, ["a", 1], -0.5])
    if isinstance(value, list):
        value[chance.randrange(len(value))] = mutate(chance, value[chance.randrange(len(value))])
    else:
        key = chance.choice(list(value))
        value[key] = mutate(chance, value[key])
    return value


def check_hostile_bodies(server):
    """Whatever the body, the answer is an answer or a refusal, and the server lives."""
    seed = int(os.environ.get("KVL_TEST_SEED", time.time_ns() % 10 ** 9))
    print(f"KVL_TEST_SEED={seed}", flush=True)
    chance = random.Random(seed)
    whole = {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "text",
                                                                        "text": "hi"}]}],
             "prompt": ["hi"], "input": [{"role": "user", "content": [
                 {"type": "input_text", "text": "hi"}]}], "instructions": "Be brief.",
             "text": {"format": {"type": "text"}}, "max_output_tokens": 1, "max_tokens": 1, "temperature": 1, "top_p": 1, "top_k": 5, "n": 1,
             "min_p": 0.1, "stop": ["a"], "seed": 1, "stream": False, "logprobs": 1,
             "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1,
             "cache_salt": "s", "response_format": {"type": "text"}, "ignore_eos": False}
    for _ in range(300):
        body = copy.deepcopy(whole)
        for _ in range(chance.randrange(1, 4)):
            body = mutate(chance, body)
        if isinstance(body, dict):
            # What would be a right request, but a long one.
            for name in ("max_tokens", "max_output_tokens", "n"):
                if body.get(name) is None or body.get(name) is not whole.get(name):
                    body[name] = 1 if chance.random() < 0.9 else body.get(name, -1)
        if isinstance(body, dict) and chance.random() < 0.5:
            body.pop("prompt", None)  # /v1/responses has another meaning for it
        path = chance.choice([CHAT, TEXT, RESPONSE])
        status, _, data = server.ask("POST", path, body)
        assert status in (200, 400, 404), (status, path, body, data)
        if status != 200:
            assert json.loads(data)["error"]["message"], data
    assert server.ask("GET", "/ready")[0] == 200


def check_32_at_once_answer_as_one_alone(server):
    prompts = [f"{SHARED} What should keeper {i} do at hour {i}?" for i in range(32)]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda p: server.chat(p, max_tokens=16)[1], prompts))
    for prompt, answer in list(zip(prompts, together))[::5]:
        _, alone = server.chat(prompt, max_tokens=16, cache_salt="alone")
        assert text_of(alone) == text_of(answer)
    # Whoever came later found the common beginning.
    cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in together]
    assert sum(c > 500 for c in cached) >= 31, cached


def resident_kib(server):
    with open(f"/proc/{server.process.pid}/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def leave_at_random(server, seed, end):
    chance = random.Random(seed)
    while time.monotonic() < end:
        connection = server.connect()
        body = {"messages": [{"role": "user", "content": SHARED[:chance.randrange(2000)] + "?"}],
                "max_tokens": chance.randrange(1, 200), "stream": chance.random() < 0.7,
                "n": chance.randrange(1, 4)}
        connection.request("POST", CHAT, json.dumps(body))
        connection.sock.settimeout(chance.random() * 2)
        try:
            answer = connection.getresponse()
            for _ in range(chance.randrange(20)):
                answer.readline()
        except (TimeoutError, OSError):
            pass
        connection.close()


def check_clients_that_leave(server, seconds):
    """Nothing of them stays: no answer that runs or waits, no page, no memory."""
    n_pages = None
    levels = []
    for part in range(2):
        end = time.monotonic() + seconds / 2
        clients = [threading.Thread(target=leave_at_random, args=(server, 100 * part + i, end))
                   for i in range(24)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            now = server.metrics()
            if now["kvloom_running_answers"] + now["kvloom_waiting_answers"] == 0:
                break
            time.sleep(0.2)
        assert now["kvloom_running_answers"] + now["kvloom_waiting_answers"] == 0, now
        pages = now["kvloom_free_pages"] + now["kvloom_tree_pages"]
        assert n_pages in (None, pages), (n_pages, pages)
        n_pages = pages
        levels.append(resident_kib(server))
    assert levels[1] < 1.1 * levels[0] + 20000, f"resident KiB: {levels}"


def check_keys_and_tenants(kvloom, folder):
    keys = os.path.join(folder, "keys")
    with open(keys, "w", encoding="ascii") as out:
        out.write("# two tenants\nred red-key-0123456789\nblue blue-key-0123456789\n")
    with Server(kvloom, "127.0.0.1:0", "--api-keys", keys) as server:
        red, blue = ({"Authorization": f"Bearer {name}-key-0123456789"} for name in ("red", "blue"))
        for headers in ({}, {"Authorization": "Bearer wrong-key-0123456789"},
                        {"Authorization": "red-key-0123456789"},
                        {"Authorization": "Bearer " + "x" * 5000}):
            status, answer = server.chat("hi", headers=headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
            for path in ("/v1/models", "/metrics", "/version", "/v1/nothing"):
                assert server.ask("GET", path, None, headers)[0] == 401, path
        assert server.ask("GET", "/health")[0] == server.ask("GET", "/ready")[0] == 200
        cached = []
        for headers in (red, blue, red):
            status, answer = server.chat(SHARED, headers=headers, max_tokens=2)
            assert status == 200, answer
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == cached[1] == 0 < cached[2], cached


def check_tls(kvloom, folder):
    """Nothing but TLS 1.2 and 1.3 at the port; a pair that is none, or open to others, is refused."""
    certificate, key = os.path.join(folder, "certificate.pem"), os.path.join(folder, "key.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                    "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
                   check=True, capture_output=True)
    os.chmod(key, 0o600)
    tls = ("--tls-certificate", certificate, "--tls-key", key)
    with Server(kvloom, "127.0.0.1:0", *tls) as server:
        assert server.address.startswith("https://"), server.address
        server.trust = ssl.create_default_context(cafile=certificate)
        status, answer = server.chat("Name a colour.", max_tokens=4)
        assert status == 200 and answer["choices"], answer
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        server.trust = old
        for plain in (False, True):
            if plain:
                server.address = server.address.replace("https", "http")
            try:
                answered = server.ask("GET", "/health")[0]
            except (OSError, http.client.HTTPException):
                continue
            raise AssertionError(f"answered {answered} without TLS 1.2")
    for options, word in (((*tls[:2], "--tls-key", certificate), "chmod"),
                          (("--tls-certificate", key, "--tls-key", key), "pair"),
                          (tls[:2], "together")):
        refused = subprocess.run([kvloom, "serve", "--model", MODEL, "--http", "127.0.0.1:0",
                                  *options], capture_output=True, text=True, check=False)
        assert refused.returncode == 1 and word in refused.stderr, refused


def check_addresses(kvloom, folder):
    refused = subprocess.run([kvloom, "serve", "--model", MODEL, "--http", "0.0.0.0:0"],
                             capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "keys" in refused.stderr, refused
    refused = subprocess.run([kvloom, "serve", "--model", MODEL, "--http", "localhost"],
                             capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "localhost" in refused.stderr, refused
    path = os.path.join(folder, "socket")
    with Server(kvloom, "unix:" + path) as server:
        assert os.stat(path).st_mode & 0o077 == 0
        status, answer = server.chat("hi", max_tokens=2)
        assert status == 200, answer
        assert server.stop() == 0, server.said
    assert not os.path.exists(path)


def check_back_pressure(kvloom, _folder):
    """Who finds no room is told at once, and when to come again."""
    with Server(kvloom, "127.0.0.1:0", "--answers", "1", "--waiting", "2") as server:
        def one(i):
            return server.ask("POST", CHAT, {"messages": [{"role": "user", "content": f"{i}?"}],
                                             "max_tokens": 60, "ignore_eos": True})
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(one, range(16)))
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 429}, statuses
        assert statuses.count(200) >= 3, statuses
        for status, headers, data in answers:
            if status == 429:
                assert headers["Retry-After"] and json.loads(data)["error"]["code"] == "server_busy"


def check_few_pages(kvloom, _folder):
    """More answers than pages: some pause, all end, and each as it would alone."""
    with Server(kvloom, "127.0.0.1:0", "--pages", "40", "--answers", "8") as server:
        def one(i):
            return server.chat(f"Write about the number {i}.", max_tokens=110, ignore_eos=True)[1]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            together = list(pool.map(one, range(8)))
        numbers = server.metrics()
        assert numbers["kvloom_paused_total"] > 0, numbers
        for i in (0, 7):
            assert text_of(one(i)) == text_of(together[i])


def main():
    kvloom = contract.program()
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 8.0
    contract.need_model(MODEL)
    checks = contract.Checks()
    with Server(kvloom) as server:
        for check in (check_streams_say_what_whole_answers_say, check_completions_and_logprobs,
                      check_what_is_known_is_not_computed_again, check_sampling_fields,
                      check_errors_name_the_field, check_hostile_bodies,
                      check_32_at_once_answer_as_one_alone):
            checks.run(check, server)
        checks.run(check_clients_that_leave, server, seconds)
        assert server.stop() == 0, server.said
    for check in (check_keys_and_tenants, check_tls, check_addresses, check_back_pressure, check_few_pages):
        checks.run_in_folder(check, kvloom)
    return checks.status()


if __name__ == "__main__":
    sys.exit(main())
