"""A `kvloom serve --http` for tests, and a client of the standard library."""
import http.client
import json
import os
import socket
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

MODEL = "smollm2-135m"
TIMEOUT_S = 120


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=TIMEOUT_S)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self.path)


class Server:
    """with Server(kvloom, "127.0.0.1:0", "--answers", "8") as server: ..."""

    def __init__(self, kvloom, address="127.0.0.1:0", *options):
        self.trust = None  # an ssl.SSLContext, where the server speaks TLS
        command = [kvloom, "serve", "--model", MODEL, "--http", address, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        stdin=subprocess.DEVNULL, text=True)
        line = self.process.stdout.readline()
        if not line.startswith("listening at "):
            raise AssertionError(f"the server did not start: {self.process.stderr.read()[-400:]}")
        self.address = line[len("listening at "):].strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """The exit status; whatever the server said on standard error is kept in .said."""
        if self.process.poll() is None:
            self.process.terminate()
        _, self.said = self.process.communicate(timeout=60)
        return self.process.returncode

    def connect(self):
        if self.address.startswith("unix:"):
            return UnixConnection(self.address[len("unix:"):])
        scheme, place = self.address.split("://", 1)
        host, port = place.rsplit(":", 1)
        if scheme == "https":
            return http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=TIMEOUT_S,
                                               context=self.trust)
        return http.client.HTTPConnection(host.strip("[]"), int(port), timeout=TIMEOUT_S)

    def ask(self, method, path, body=None, headers=None):
        """(status, headers, bytes)"""
        connection = self.connect()
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def post(self, path, body, headers=None):
        status, _, data = self.ask("POST", path, body, headers)
        return status, json.loads(data)

    def chat(self, text, headers=None, **fields):
        fields = {"max_tokens": 24, "temperature": 0, **fields}
        return self.post("/v1/chat/completions",
                         {"model": MODEL, "messages": [{"role": "user", "content": text}],
                          **fields}, headers)

    def events(self, path, body):
        """The objects of a stream, in order; the stream ends with [DONE]."""
        status, headers, data = self.ask("POST", path, {**body, "stream": True})
        assert status == 200, data
        assert headers["Content-Type"].startswith("text/event-stream"), headers
        lines = [line for line in data.decode().split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines), lines
        assert lines[-1] == "data: [DONE]", lines[-1]
        return [json.loads(line[len("data: "):]) for line in lines[:-1]]

    def metrics(self):
        """Numbers without labels, by name."""
        _, _, text = self.ask("GET", "/metrics")
        numbers = {}
        for line in text.decode().splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                numbers[name] = float(value)
        return numbers
