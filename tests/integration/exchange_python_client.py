"""Another implementation of the protocol: python3 exchange_python_client.py BUILD_DIRECTORY

Puts a segment into a sidecar over its UNIX socket and fetches it again as a peer over ZeroMQ, with nothing
of KVLoom but proto/*.proto and what docs/local.md and docs/protocol.md say. Needs pyzmq and protobuf
(python3-zmq, python3-protobuf); exits with 77 without them.
"""
import array
import hashlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

try:
    import zmq
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
except ImportError as missing:
    print(f"skipped: {missing}; install python3-zmq and python3-protobuf")
    sys.exit(77)

ROOT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
KEY = bytes(range(32))
LAYERS, HEADS, DIM = 3, 2, 8
TOKENS = [5, 6, 7, 8, 9]


def messages(place, name, package):
    """The message classes of a .proto file: {name: class}."""
    path = os.path.join(place, name + ".bin")
    proto = os.path.join(ROOT, "proto")
    subprocess.run(["protoc-c", "--descriptor_set_out=" + path, "-I" + proto,
                    os.path.join(proto, name + ".proto")], check=True)
    files = descriptor_pb2.FileDescriptorSet()
    with open(path, "rb") as file:
        files.ParseFromString(file.read())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    made = {}
    for message in files.file[0].message_type:
        descriptor = pool.FindMessageTypeByName(f"{package}.{message.name}")
        if hasattr(message_factory, "GetMessageClass"):
            made[message.name] = message_factory.GetMessageClass(descriptor)
        else:
            made[message.name] = message_factory.MessageFactory(pool).GetPrototype(descriptor)
    return made


def keyed(key, *parts):
    digest = hashlib.blake2b(key=key, digest_size=32)
    for part in parts:
        digest.update(part)
    return digest.digest()


def fingerprint(text):
    return keyed(b"", b"kvloom.model.1\0", text)


def segment_id(model, tokens):
    ids = struct.pack(f"<{len(tokens)}I", *tokens)
    return keyed(KEY, b"kvloom.segment.1\0", model, bytes(32), struct.pack("<Q", len(tokens)), ids)


# --- docs/local.md ---

class Local:
    def __init__(self, path, types):
        self.types = types
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.number = 0

    def call(self, fd=None, **body):
        self.number += 1
        message = self.types["Request"](number=self.number, **body).SerializeToString()
        frame = struct.pack("<II", len(message), 0 if fd is None else 1) + message
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS,
                                         array.array("i", [fd]))]
        self.socket.sendmsg([frame], rights)
        head, fds = self.read(8)
        rest, more = self.read(struct.unpack("<II", head)[0])
        reply = self.types["Reply"]()
        reply.ParseFromString(rest)
        assert reply.number == self.number
        return reply, fds + more

    def read(self, n):
        data, fds = b"", []
        while len(data) < n:
            part, found, _, _ = socket.recv_fds(self.socket, n - len(data), 4)
            assert part, "the sidecar ended the connection"
            data += part
            fds += found
        return data, fds


def put_and_get(path, types, model, blocks):
    local = Local(path, types)
    hello = types["Hello"](magic=0x4C4C564B, version_min=1, version_max=1, name="python",
                           fingerprint=bytes(32))
    reply, _ = local.call(hello=hello)
    assert reply.status == -22 and model.hex() in reply.text, reply
    hello.fingerprint = model
    reply, _ = local.call(hello=hello)
    assert reply.status == 0 and reply.welcome.version == 1, reply
    memory = os.memfd_create("put")
    os.write(memory, b"".join(blocks))
    key = types["Key"](tokens=struct.pack(f"<{len(TOKENS)}I", *TOKENS))
    shape = types["Shape"](dtype=2, n_layers=LAYERS, n_kv_heads=HEADS, head_dim=DIM)
    reply, _ = local.call(fd=memory, put=types["Put"](key=key, shape=shape))
    assert reply.status == 0 and reply.stored.id == segment_id(model, TOKENS), reply
    reply, fds = local.call(get=types["Get"](key=key))
    assert reply.status == 0, reply
    container = reply.got.inside or os.pread(fds[0], reply.got.n_bytes, 0)
    for block in blocks:
        assert block in container


# --- docs/protocol.md ---

class Peer:
    def __init__(self, endpoint, types, model):
        self.types = types
        self.epoch = 0x1234567
        self.request = 0
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.ROUTING_ID, b"python#" + os.urandom(8).hex().encode())
        self.socket.setsockopt(zmq.RCVTIMEO, 10000)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)
        self.hello = types["Hello"](magic=0x4D4C564B, version_min=1, version_max=1, name="python",
                                    fingerprint=model, frame_bytes_max=1 << 20,
                                    window_bytes_max=1 << 20, task_bytes_max=1 << 20)

    def send(self, **body):
        self.request += 1
        envelope = self.types["Envelope"](epoch=self.epoch, request=self.request, **body)
        self.socket.send(envelope.SerializeToString())
        return self.request

    def receive(self):
        control, *frames = self.socket.recv_multipart()
        envelope = self.types["Envelope"]()
        envelope.ParseFromString(control)
        return envelope, frames

    def answer(self, kind, **body):
        number = self.send(**body)
        envelope, frames = self.receive()
        assert envelope.request == number and envelope.WhichOneof("body") == kind, envelope
        return getattr(envelope, kind), frames


def fetch_as_peer(endpoint, types, model, blocks):
    peer = Peer(endpoint, types, model)
    wanted = segment_id(model, TOKENS)
    error, _ = peer.answer("error", locate=types["Locate"](ids=[wanted]))
    assert error.status == -5, error  # no session yet
    stranger = types["Hello"]()
    stranger.CopyFrom(peer.hello)
    stranger.fingerprint = b"\1" * 32
    error, _ = peer.answer("error", hello=stranger)
    assert error.status == -22 and model.hex() in error.text, error
    welcome, _ = peer.answer("welcome", hello=peer.hello)
    assert welcome.name == "side" and "store" in welcome.features, welcome
    located, _ = peer.answer("located", locate=types["Locate"](ids=[wanted, bytes(32)]))
    assert located.held == 1, located
    number = peer.send(fetch=types["Fetch"](id=wanted, credit_bytes=1 << 20))
    got, header = [], b""
    while True:
        envelope, frames = peer.receive()
        assert envelope.request == number, envelope
        kind = envelope.WhichOneof("body")
        if kind == "fetch_header":
            header = b"".join(frames)
            assert envelope.fetch_header.n_blocks == LAYERS
            assert len(header) == envelope.fetch_header.header_bytes
        elif kind == "block":
            assert envelope.block.block == len(got) and envelope.block.total == len(frames[0])
            got.append(frames[0])
        else:
            assert kind == "fetch_done", envelope
            break
    assert got == blocks and header[:4] == b"\x8bKVL"
    error, _ = peer.answer("error", fetch=types["Fetch"](id=bytes(32), credit_bytes=1 << 20))
    assert error.status == -20, error
    peer.send(goodbye=types["Empty"]())


def main():
    program = os.path.join(os.path.abspath(sys.argv[1]), "kvloom")
    place = tempfile.mkdtemp(prefix="kvloom-python-")
    path, endpoint = os.path.join(place, "s.sock"), f"ipc://{place}/peers"
    with open(os.path.join(place, "key"), "wb") as file:
        file.write(KEY)
    process = subprocess.Popen([program, "sidecar", "--name", "side", "--socket", path, "--key-file",
                                os.path.join(place, "key"), "--model", "m", "--listen", endpoint,
                                "--with-parent"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(500):
            if os.path.exists(path) and os.path.exists(endpoint[6:]):
                break
            time.sleep(0.01)
        model = fingerprint(b"m")
        size = 2 * HEADS * len(TOKENS) * DIM * 2
        blocks = [bytes((17 * layer + 3 * i) % 251 for i in range(size)) for layer in range(LAYERS)]
        put_and_get(path, messages(place, "local", "kvloom.local.v1"), model, blocks)
        fetch_as_peer(endpoint, messages(place, "kvloom", "kvloom.v1"), model, blocks)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        shutil.rmtree(place)
    print("a client in Python puts, gets and fetches what the sidecar keeps")


if __name__ == "__main__":
    main()
