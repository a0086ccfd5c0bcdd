#!/usr/bin/env python3
"""`kvloom serve` with a store: texts of conversations are reused at other places of other
conversations where a request allows it, and nothing of that reaches one that does not.

    python3 tests/integration/reuse_contract.py build/release

Exit status 77 where the model is not in the cache."""
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "support"))
import contract  # noqa: E402
from batch_rows import WORDS  # noqa: E402
from http_server import MODEL, Server  # noqa: E402

CHAT = "/v1/chat/completions"


def document(seed, n_words=200):
    import random
    chance = random.Random(seed)
    return f"Record {seed}. " + " ".join(chance.choice(WORDS) for _ in range(n_words)) + "."


def host(kvloom, folder, *options):
    key = os.path.join(folder, "key")
    with open(key, "wb") as out:
        out.write(bytes(range(32)))
    return Server(kvloom, "127.0.0.1:0", "--name", "one", "--listen",
                  f"ipc://{folder}/one.sock", "--store", os.path.join(folder, "store"),
                  "--key-file", key, *options)


def ask(server, messages, quality=None, headers=None, **fields):
    body = {"messages": messages, "max_tokens": 16, "temperature": 0, **fields}
    if quality is not None:
        body["kvloom"] = {"quality": quality}
    status, answer = server.post(CHAT, body, headers)
    assert status == 200, answer
    return answer


def text_of(answer):
    return answer["choices"][0]["message"]["content"]


def placed_of(answer):
    return answer["kvloom"].get("placed_tokens", 0)


def user(text):
    return {"role": "user", "content": text}


def other_conversation(n):
    """A document of the first conversation at another place: behind another system's message."""
    return [{"role": "system", "content": f"You answer in {n} words, and only from the records."},
            user([{"type": "text", "text": document(1)}, {"type": "text", "text": document(2)}]),
            user("What is in the records?")]


def until_placed(server, messages, quality, headers=None):
    """Texts are read when the server has nothing else to do: asked again until one is placed."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        answer = ask(server, messages, quality, headers)
        if placed_of(answer) > 0:
            return answer, messages
        messages = [{"role": "system", "content": f"Now {time.monotonic()}."}, *messages[1:]]
        time.sleep(0.3)
    raise AssertionError("no text was ever placed")


def check_texts_move_between_conversations(kvloom, folder):
    with host(kvloom, folder) as server:
        first = ask(server, [user(document(2)), user("Say yes.")], "balanced")
        assert first["kvloom"]["quality"] == "balanced" and placed_of(first) == 0, first
        assert first["kvloom"]["approximate"] is False
        again, again_asked = until_placed(server, other_conversation(5), "balanced")
        own, usage = again["kvloom"], again["usage"]
        assert own["approximate"] is True and own["recomputed_tokens"] > 0, own
        assert own["placed_tokens"] > 150, own
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert own["computed_tokens"] == (usage["prompt_tokens"] - cached - own["placed_tokens"]
                                          + own["recomputed_tokens"]), again
        # Both parts of the message are texts by now, and the tree has neither.
        time.sleep(1.5)
        both, _ = until_placed(server, other_conversation(6), "fast")
        assert placed_of(both) > 1.5 * own["placed_tokens"], (both, own)
        # Whoever asks for exactness has what a server has that never heard of the texts.
        exact = ask(server, again_asked)
        assert placed_of(exact) == 0 and "quality" not in exact["kvloom"], exact
        # Of the same prompt the tree has what stands before the first placed token, and no more.
        assert exact["usage"]["prompt_tokens_details"]["cached_tokens"] <= (
            usage["prompt_tokens"] - own["placed_tokens"]), (exact, again)
        verified = ask(server, other_conversation(7), "verified")
        assert verified["kvloom"]["verified"] is True, verified
        healed = ask(server, other_conversation(8), "healed")
        assert healed["kvloom"]["healing"] is True or not healed["kvloom"]["approximate"], healed
        alone = ask(server, other_conversation(7), "exact")
    with Server(kvloom) as server:
        assert text_of(ask(server, again_asked)) == text_of(exact)
        assert text_of(ask(server, other_conversation(7))) == text_of(alone)
        status, answer = server.post(CHAT, {"messages": [user("x")],
                                            "kvloom": {"quality": "balanced"}})
        assert status == 400 and answer["error"]["param"] == "kvloom.quality", answer
        assert "--store" in answer["error"]["message"]


def check_branches_streams_and_neighbours(kvloom, folder):
    """A placed prompt decodes in the scheduler: with n, drawn, streamed, and beside others."""
    with host(kvloom, folder, "--quality", "balanced", "--pages", "400") as server:
        ask(server, [user(document(1)), user("Say yes.")])
        time.sleep(1.0)
        asked = [user("Before it."), user(document(1)), user("And now?")]
        several, _ = until_placed(server, asked, None)
        assert several["kvloom"]["quality"] == "balanced"
        body = {"messages": [{"role": "system", "content": "x"}, *asked[1:]], "temperature": 0.9,
                "seed": 3, "n": 3, "max_tokens": 12, "logprobs": True,
                "stream_options": {"include_usage": True}}
        events = server.events(CHAT, body)
        assert placed_of(events[-1]) > 0, events[-1]
        for index in range(3):
            own = [c for e in events for c in e["choices"] if c["index"] == index]
            assert own[-1]["finish_reason"] in ("stop", "length")
        # The server's own choice refuses nothing that it cannot do.
        assert server.post("/v1/completions", {"prompt": "One, two", "max_tokens": 2})[0] == 200
        free = server.metrics()
        assert free["kvloom_running_answers"] == 0


def check_errors(kvloom, folder):
    with host(kvloom, folder) as server:
        good = {"messages": [user("hi")], "max_tokens": 2, "temperature": 0}
        for param, change in (("kvloom.quality", {"kvloom": {"quality": "best"}}),
                              ("kvloom.quality", {"kvloom": {"quality": 5}}),
                              ("kvloom", {"kvloom": "exact"}),
                              ("kvloom.quality", {"kvloom": {"quality": "verified"}, "n": 2}),
                              ("kvloom.quality", {"kvloom": {"quality": "healed"},
                                                  "temperature": 1})):
            status, answer = server.post(CHAT, {**good, **change})
            assert status == 400 and answer["error"]["param"] == param, (change, answer)
        status, answer = server.post("/v1/completions", {"prompt": "x",
                                                         "kvloom": {"quality": "fast"}})
        assert status == 400 and answer["error"]["param"] == "kvloom.quality"
        # More texts than a prompt may have parts: the longest of them are slots.
        many = [user(" ".join(WORDS[(i + k) % len(WORDS)] for k in range(64))) for i in range(33)]
        assert ask(server, many, "balanced", max_tokens=2)["usage"]["prompt_tokens"] > 2000


def check_tenants(kvloom, folder):
    """A text of one tenant is never placed for another, and is still one's own after a restart."""
    keys = os.path.join(folder, "keys")
    with open(keys, "w", encoding="ascii") as out:
        out.write("red key-of-red-0123456789\nblue key-of-blue-0123456789\n")
    red, blue = ({"Authorization": f"Bearer key-of-{name}-0123456789"} for name in ("red", "blue"))
    asked = [user("Before it."), user(document(1)), user("And now?")]
    with host(kvloom, folder, "--api-keys", keys) as server:
        ask(server, [user(document(1)), user("Say yes.")], "balanced", red)
        until_placed(server, asked, "balanced", red)
        assert placed_of(ask(server, asked, "balanced", blue)) == 0
        salted = ask(server, asked, "balanced", red, cache_salt="x")
        assert placed_of(salted) == 0
        # Now the text of blue is blue's own.
        until_placed(server, asked, "balanced", blue)
    with host(kvloom, folder, "--api-keys", keys) as server:
        assert placed_of(ask(server, asked, "balanced", red)) > 0


def main():
    contract.need_model(MODEL)
    checks = contract.Checks()
    for check in (check_texts_move_between_conversations, check_branches_streams_and_neighbours,
                  check_errors, check_tenants):
        checks.run_in_folder(check, contract.program())
    return checks.status()


if __name__ == "__main__":
    sys.exit(main())
