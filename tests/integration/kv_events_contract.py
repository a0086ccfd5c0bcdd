#!/usr/bin/env python3
"""KV events of `kvloom serve` as a router reads them, in vLLM's schema, with nothing of KVLoom but
docs/http-api.md; a router that came late, and what it believes against what the server says.

    python3 tests/integration/kv_events_contract.py build/release

Exit status 77 where the model is not in the cache, or without pyzmq (python3-zmq)."""
import os
import struct
import sys
import time

try:
    import zmq
except ImportError as missing:
    print(f"skipped: {missing}; install python3-zmq")
    sys.exit(77)

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "support"))
import contract  # noqa: E402
from http_server import MODEL, Server  # noqa: E402

PAGE = 16
END = (1 << 64) - 1


def unpack(data, at=0):
    """One value of MessagePack, of the kinds that events have: (value, where it ends)"""
    kind = data[at]
    at += 1
    if kind < 0x80:
        return kind, at
    if 0x90 <= kind < 0xa0 or kind in (0xdc, 0xdd):
        n, at = (kind & 15, at) if kind < 0xa0 else number(data, at, kind - 0xdb)
        values = []
        for _ in range(n):
            value, at = unpack(data, at)
            values.append(value)
        return values, at
    if 0xa0 <= kind < 0xc0:
        end = at + (kind & 31)
        return data[at:end].decode(), end
    if kind == 0xc0:
        return None, at
    if kind == 0xcb:
        return struct.unpack_from(">d", data, at)[0], at + 8
    assert 0xcc <= kind <= 0xcf, hex(kind)
    return number(data, at, kind - 0xcc)


def number(data, at, log_bytes):
    n = 1 << log_bytes
    return int.from_bytes(data[at:at + n], "big"), at + n


class Router:
    """What it believes to be cached, from what it was told; numbers have no gap."""

    def __init__(self):
        self.blocks = {}  # hash: (parent, ids)
        self.next, self.n_removed, self.is_cleared = None, 0, False

    def take(self, sequence, data):
        assert self.next is None or sequence == self.next, (sequence, self.next)
        self.next = sequence + 1
        batch, end = unpack(data)
        assert end == len(data) and abs(batch[0] - time.time()) < 300, batch[:1]
        for event in batch[1]:
            if event[0] == "BlockStored":
                _, hashes, parent, ids, size, lora, medium = event
                assert size == PAGE and len(ids) == PAGE * len(hashes) and lora is None
                assert medium in ("CPU", "GPU") and (parent is None or parent in self.blocks)
                for i, own in enumerate(hashes):
                    self.blocks[own] = (parent, ids[i * PAGE:(i + 1) * PAGE])
                    parent = own
            elif event[0] == "BlockRemoved":
                for own in event[1]:
                    del self.blocks[own]
                    self.n_removed += 1
            else:
                assert event == ["AllBlocksCleared"], event
                self.blocks = {}
                self.is_cleared = True


def listen(context, endpoint, topic):
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.SUBSCRIBE, topic)
    socket.connect(endpoint)
    time.sleep(0.3)
    return socket


def take_all(socket, router, topic, quiet_ms=500):
    while socket.poll(quiet_ms):
        frames = socket.recv_multipart()
        assert len(frames) == 3 and frames[0] == topic and len(frames[1]) == 8
        router.take(int.from_bytes(frames[1], "big"), frames[2])


def replay(context, endpoint, first):
    """[(number, batch)] from number `first` on"""
    socket = context.socket(zmq.DEALER)
    socket.connect(endpoint)
    socket.send_multipart([b"", first.to_bytes(8, "big")])
    found = []
    while True:
        assert socket.poll(5000), "no answer"
        empty, sequence, data = socket.recv_multipart()
        assert empty == b""
        if int.from_bytes(sequence, "big") == END:
            assert data == b""
            socket.close(0)
            return found
        found.append((int.from_bytes(sequence, "big"), data))


def check_a_router_knows_what_is_cached(kvloom, folder):
    events, replays = f"ipc://{folder}/events", f"ipc://{folder}/replays"
    context = zmq.Context()
    with Server(kvloom, "127.0.0.1:0", "--kv-events", events, "--kv-events-replay", replays,
                "--kv-events-topic", "kv@one", "--pages", "60") as server:
        socket = listen(context, events, b"kv@")
        router = Router()
        shared = "A keeper notes the wind every hour and lights the lamp at dusk. " * 12
        for question in ("Why?", "When?"):
            status, answer = server.chat(shared + question, max_tokens=4)
            assert status == 200
        take_all(socket, router, b"kv@one")
        assert len(router.blocks) == server.metrics()["kvloom_tree_pages"] > 8, len(router.blocks)
        # The ids of the chain to any block are those of a prompt: they begin as all of them do.
        firsts = {tuple(ids) for parent, ids in router.blocks.values() if parent is None}
        assert len(firsts) == 1, firsts
        # The second question has found what the first has stored.
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= PAGE * 8 and router.n_removed == 0
        _, salted = server.chat(shared + "Why?", max_tokens=4, cache_salt="x")
        assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        for n in range(4):
            server.chat(f"{n} " + shared * 2, max_tokens=4)
        take_all(socket, router, b"kv@one")
        assert router.n_removed > 0, "nothing had to go"
        assert len(router.blocks) == server.metrics()["kvloom_tree_pages"]
        # One that came late believes the same, and one that lost the middle catches up.
        late = Router()
        for sequence, data in replay(context, replays, 0):
            late.take(sequence, data)
        assert late.blocks == router.blocks and late.next == router.next
        assert [n for n, _ in replay(context, replays, 2)] == list(range(2, router.next))
        assert replay(context, replays, 10 ** 6) == []
        # Nonsense is not answered, and harms nobody.
        odd = context.socket(zmq.DEALER)
        odd.connect(replays)
        odd.send_multipart([b"", b"x"])
        odd.send_multipart([b"\0" * 8])
        odd.send_multipart([b"", b"\0" * 8, b"more"])
        assert not odd.poll(300)
        odd.close(0)
        assert len(replay(context, replays, 0)) == router.next
        assert server.stop() == 0, server.said
        take_all(socket, router, b"kv@one")
        assert router.is_cleared and router.blocks == {}
        socket.close(0)
    context.term()


def check_other_machines_get_nothing(kvloom, folder):
    for options, word in ((["--kv-events", "tcp://0.0.0.0:5557"], "127.0.0.1"),
                          (["--kv-events", f"ipc://{folder}/e", "--kv-events-replay", "tcp://*:1"],
                           "127.0.0.1"),
                          (["--kv-events", f"ipc://{folder}/none/e"], "cannot send")):
        try:
            Server(kvloom, "127.0.0.1:0", *options).stop()
        except AssertionError as error:
            assert word in str(error), error
        else:
            raise AssertionError(f"{options} was not refused")


def main():
    contract.need_model(MODEL)
    checks = contract.Checks()
    for check in (check_a_router_knows_what_is_cached, check_other_machines_get_nothing):
        checks.run_in_folder(check, contract.program())
    return checks.status()


if __name__ == "__main__":
    sys.exit(main())
