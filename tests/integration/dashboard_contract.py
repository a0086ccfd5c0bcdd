#!/usr/bin/env python3
"""The dashboard of `kvloom serve --http`: the page and its policy, keys, what it says against what
/metrics says, and that no text of a prompt is ever mark-up or another tenant's to see.

    python3 tests/integration/dashboard_contract.py build/release

Exit status 77 where the model is not in the cache."""
import base64
import hashlib
import json
import os
import re
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "support"))
import contract  # noqa: E402
from http_server import Server  # noqa: E402

DATA = "/dashboard/data"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"]}" * 3
KEYS = {"red": "red-key-0123456789abcdef", "blue": "blue-key-0123456789abcde"}


def bearer(tenant):
    return {"Authorization": f"Bearer {KEYS[tenant]}"}


def data_of(server, headers=None):
    status, kinds, data = server.ask("GET", DATA, headers=headers)
    assert status == 200, data
    assert kinds["Content-Type"] == "application/json" and kinds["Cache-Control"] == "no-store"
    assert kinds["X-Content-Type-Options"] == "nosniff"
    assert not re.search(rb"[<>&]", data), "mark-up in the data"
    return json.loads(data)


def texts_of(shown):
    return "".join(node["text"] for node in shown["tree"]["nodes"])


def check_the_page_needs_nothing_else(kvloom):
    with Server(kvloom) as server:
        status, headers, page = server.ask("GET", "/")
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
        policy = dict(part.strip().split(" ", 1)
                      for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'", policy
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'", policy
        assert "unsafe" not in headers["Content-Security-Policy"]
        text = page.decode()
        # One style and one script, those that the policy names; nothing from elsewhere.
        for name in ("style", "script"):
            found = re.findall(f"<{name}>(.*?)</{name}>", text, re.S)
            assert len(found) == 1 and len(re.findall(f"<{name}\\b", text)) == 1
            digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
            assert policy[f"{name}-src"] == f"'sha256-{digest}'", policy
        assert not re.search(r"\b(src|href)=\"(?!data:,)|@import|url\(|\son\w+=|\sstyle=|innerHTML",
                             text)
        links = set(re.findall(r"https?://[^'\"\s]+", text))
        assert links <= {"http://www.w3.org/2000/svg"}, links
        # The script asks for nodes that the page has.
        script = re.search("<script>(.*?)</script>", text, re.S).group(1)
        ids = set(re.findall(r' id="([a-z-]+)"', text))
        assert set(re.findall(r"\bat\('([a-z-]+)'\)", script)) <= ids
        assert "prefers-color-scheme:dark" in text and "width=device-width" in text
        assert server.ask("POST", "/", b"")[0] == 405
        assert server.ask("POST", DATA, b"")[0] == 405


def check_figures_agree_with_metrics(kvloom):
    with Server(kvloom, "127.0.0.1:0", "--pages", "200") as server:
        shown = data_of(server)
        assert shown["prompts"] == {"tokens": 0, "cached": 0, "hit_rate": None}, shown
        assert shown["tree"]["nodes"] == [] and shown["host"] is None
        shared = "A keeper notes the wind every hour and lights the lamp at dusk. " * 12
        for question in ("Why does he do so every hour, and who reads what he has noted there? " * 2,
                         "Name the color of the tower and the height of its lamp in feet. " * 2,
                         "Short?"):
            assert server.chat(shared + question, max_tokens=8)[0] == 200
        time.sleep(2.5)  # a sample more
        shown, numbers = data_of(server), server.metrics()
        pairs = {("prompts", "tokens"): "lookup_requested_tokens_total",
                 ("prompts", "cached"): "lookup_hit_tokens_total",
                 ("pages", "free"): "free_pages", ("pages", "tree"): "tree_pages",
                 ("answers", "tokens"): "answer_tokens_total",
                 ("answers", "finished"): "finished_total",
                 ("answers", "running"): "running_answers",
                 ("answers", "waiting"): "waiting_answers",
                 ("reuse", "placed"): "placed_tokens_total",
                 ("reuse", "recomputed"): "recomputed_tokens_total"}
        for (group, name), metric in pairs.items():
            assert shown[group][name] == numbers["kvloom_" + metric], (group, name, shown)
        prompts = shown["prompts"]
        assert prompts["cached"] > 100 and shown["answers"]["finished"] == 3
        assert abs(prompts["hit_rate"] - prompts["cached"] / prompts["tokens"]) < 1e-6
        tree = shown["tree"]
        nodes = tree["nodes"]
        assert sum(node["tokens"] for node in nodes) == tree["tokens"] == 16 * numbers[
            "kvloom_tree_pages"]
        assert len(nodes) == tree["n_nodes"] and tree["others"] == {"n_nodes": 0, "tokens": 0}
        assert all(node["parent"] is None or node["parent"] < i for i, node in enumerate(nodes))
        for i, node in enumerate(nodes):
            assert node["children"] == sum(other["parent"] == i for other in nodes)
        assert any(node["children"] >= 2 for node in nodes), nodes
        curves = shown["curves"]
        assert len({len(curve) for curve in curves.values()}) == 1
        ages, rates = curves["age_s"], curves["tokens_per_s"]
        assert ages == sorted(ages, reverse=True) and max(rates) > 0
        assert any(ttft is not None and ttft > 0 for ttft in curves["ttft_s"])


def check_prompts_are_never_markup(kvloom):
    with Server(kvloom) as server:
        assert server.chat(HOSTILE, max_tokens=4)[0] == 200
        assert server.post("/v1/completions", {"prompt": HOSTILE, "max_tokens": 4})[0] == 200
        shown = data_of(server)  # which has looked for < > &
        assert "<script>" in texts_of(shown), shown["tree"]
        assert b"alert(1)" not in server.ask("GET", "/")[2]


def check_tenants_see_their_own_texts(kvloom, folder):
    path = os.path.join(folder, "keys")
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8") as file:
        file.writelines(f"{tenant} {key}\n" for tenant, key in KEYS.items())
    with Server(kvloom, "127.0.0.1:0", "--api-keys", path) as server:
        assert server.ask("GET", "/")[0] == 200  # a page without figures, which asks for the key
        for headers in (None, {"Authorization": "Bearer wrong-key-0123456789"}):
            status, _, data = server.ask("GET", DATA, headers=headers)
            assert status == 401 and b"tree" not in data
        for tenant in KEYS:
            text = f"The {tenant} lighthouse has a {tenant} lamp. " * 6
            assert server.post("/v1/completions", {"prompt": text, "max_tokens": 2},
                               bearer(tenant))[0] == 200
        assert server.post("/v1/completions",
                           {"prompt": "A salted secret of red people. " * 6, "max_tokens": 2,
                            "cache_salt": "pepper"}, bearer("red"))[0] == 200
        for own, other in (("red", "blue"), ("blue", "red")):
            shown = data_of(server, bearer(own))
            text = texts_of(shown)
            assert own in text and other not in text and "secret" not in text, text
            assert other not in json.dumps(shown)
            assert shown["tree"]["others"]["tokens"] > 0
            total = shown["tree"]["tokens"] + shown["tree"]["others"]["tokens"]
            assert total == 16 * shown["pages"]["tree"], shown["tree"]


def check_hosts_show_anchors_and_peers(kvloom, folder):
    key = os.path.join(folder, "tenant.key")
    with open(os.open(key, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(bytes(range(32)))
    with Server(kvloom, "127.0.0.1:0", "--name", "one", "--listen", f"ipc://{folder}/one",
                "--store", os.path.join(folder, "store"), "--key-file", key,
                "--peer", f"two=ipc://{folder}/two") as server:
        document = "The lamp of the lighthouse is trimmed at dusk and put out at dawn. " * 14
        placed = 0
        for n in range(40):
            status, answer = server.post("/v1/chat/completions", {
                "messages": [{"role": "system", "content": f"You are reader {n}."},
                             {"role": "user", "content": document},
                             {"role": "user", "content": "When?"}],
                "max_tokens": 4, "temperature": 0, "kvloom": {"quality": "fast"}})
            assert status == 200, answer
            placed = data_of(server)["reuse"]["placed"]
            if placed > 0:
                break
            time.sleep(0.5)
        shown = data_of(server)
        assert placed > 0, "nothing was placed"
        assert shown["reuse"]["placed"] == server.metrics()["kvloom_placed_tokens_total"]
        host = shown["host"]
        assert host["peers"] == [{"name": "two", "is_up": False}], host
        assert host["anchors"] >= 0 and host["healed"] == server.metrics()["kvloom_healed_total"]


def main():
    contract.need_model("smollm2-135m")
    checks = contract.Checks()
    kvloom = contract.program()
    for check in (check_the_page_needs_nothing_else, check_figures_agree_with_metrics,
                  check_prompts_are_never_markup):
        checks.run(check, kvloom)
    for check in (check_tenants_see_their_own_texts, check_hosts_show_anchors_and_peers):
        checks.run_in_folder(check, kvloom)
    return checks.status()


if __name__ == "__main__":
    sys.exit(main())
