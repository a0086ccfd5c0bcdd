"""Generate and stream of libkvloom against a real host: python3 host_library_contract.py BUILD

The same question over HTTP and through the library has the same answer; a stream grows and ends; a second
question finds the first one's prompt known; keys, salts and refusals are the host's. Exit status 77 where the
model is not in the cache.
"""
import ctypes as c
import json
import os
import select
import sys
import tempfile

ROOT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
sys.path.insert(0, os.path.join(ROOT, "tests", "support"))
from contract import need_model  # noqa: E402
from http_server import MODEL, Server  # noqa: E402

IN_PROGRESS, OK, DENIED, INVALID = 1, 0, -5, -1


class Host(c.Structure):
    _fields_ = [("address", c.c_char_p), ("api_key", c.c_char_p), ("reserved", c.c_uint64 * 4)]


class Message(c.Structure):
    _fields_ = [("role", c.c_char_p), ("text", c.c_char_p)]


class Question(c.Structure):
    _fields_ = [("messages", c.POINTER(Message)), ("n_messages", c.c_size_t),
                ("max_tokens", c.c_uint32), ("has_temperature", c.c_int), ("temperature", c.c_double),
                ("seed", c.c_uint64), ("cache_salt", c.c_char_p), ("reserved", c.c_uint64 * 4)]


class Usage(c.Structure):
    _fields_ = [("prompt_tokens", c.c_uint64), ("cached_tokens", c.c_uint64),
                ("answer_tokens", c.c_uint64), ("hit_max_tokens", c.c_int),
                ("reserved", c.c_uint64 * 4)]


class Error(c.Structure):
    _fields_ = [("status", c.c_int), ("text", c.c_char * 512)]


def question_of(text, tokens, salt=None):
    messages = (Message * 1)(Message(b"user", text.encode()))
    return Question(messages=messages, n_messages=1, max_tokens=tokens, has_temperature=1,
                    temperature=0.0, cache_salt=salt)


def text_of(library, answer):
    size = c.c_size_t()
    library.kvloom_answer_text.restype = c.c_void_p
    at = library.kvloom_answer_text(answer, c.byref(size))
    return c.string_at(at, size.value).decode()


def generate(library, host, question):
    answer, error, usage = c.c_void_p(), Error(), Usage()
    status = library.kvloom_generate(c.byref(host), c.byref(question), 120000, c.byref(answer),
                                     c.byref(error))
    if status != OK:
        return status, error.text.decode(), None
    text = text_of(library, answer)
    assert library.kvloom_answer_usage(answer, c.byref(usage)) == OK
    library.kvloom_answer_end(answer)
    return status, text, usage


def stream(library, host, question):
    answer, error = c.c_void_p(), Error()
    assert library.kvloom_stream(c.byref(host), c.byref(question), 120000, c.byref(answer),
                                 c.byref(error)) == OK, error.text
    lengths, status = set(), IN_PROGRESS
    while status == IN_PROGRESS:
        assert select.select([library.kvloom_answer_fd(answer)], [], [], 120)[0]
        status = library.kvloom_answer_read(answer, c.byref(error))
        lengths.add(len(text_of(library, answer)))
    assert status == OK, error.text
    text = text_of(library, answer)
    library.kvloom_answer_end(answer)
    return text, len(lengths)


def check(library, server, address):
    host = Host(address=address.encode())
    words = "Name three colours of the rainbow, one a line, and say why the sky is blue. " * 4
    body = {"messages": [{"role": "user", "content": words}], "max_tokens": 24, "temperature": 0}
    status, _, data = server.ask("POST", "/v1/chat/completions", body)
    assert status == 200, data
    wanted = json.loads(data)["choices"][0]["message"]["content"]
    status, text, usage = generate(library, host, question_of(words, 24))
    assert (status, text) == (OK, wanted), (status, text, wanted)
    assert usage.answer_tokens == 24 and usage.hit_max_tokens == 1
    assert 0 < usage.cached_tokens < usage.prompt_tokens
    _, _, salted = generate(library, host, question_of(words, 24, b"apart"))
    assert salted.cached_tokens == 0
    text, n_steps = stream(library, host, question_of(words, 24))
    assert text == wanted and n_steps > 4, (text, n_steps)
    status, text, _ = generate(library, host, question_of(words, 24, b"a@b"))
    assert status == INVALID and "cache_salt" in text, (status, text)
    # One that is given up in the middle leaves the host as it was.
    answer, error = c.c_void_p(), Error()
    question = question_of(words, 400)
    assert library.kvloom_stream(c.byref(host), c.byref(question), 0, c.byref(answer),
                                 c.byref(error)) == OK
    library.kvloom_answer_end(answer)
    assert generate(library, host, question_of(words, 4))[0] == OK


def main():
    need_model(MODEL)
    build = os.path.abspath(sys.argv[1])
    library = c.CDLL(os.path.join(build, "libkvloom.so"))
    kvloom = os.path.join(build, "kvloom")
    with tempfile.TemporaryDirectory() as place:
        with Server(kvloom, "127.0.0.1:0") as server:
            check(library, server, server.address)
        keys = os.path.join(place, "keys")
        with open(keys, "w", encoding="ascii") as file:
            file.write("us a-key-of-sixteen-bytes\n")
        with Server(kvloom, "unix:" + os.path.join(place, "s"), "--api-keys", keys) as server:
            address = server.address.encode()
            question = question_of("Hello", 3)
            status, text, _ = generate(library, Host(address=address), question)
            assert status == DENIED and "API key" in text, (status, text)
            host = Host(address=address, api_key=b"a-key-of-sixteen-bytes")
            assert generate(library, host, question)[0] == OK
    print("host and library: the answers, usage, streams and refusals are the host's")


if __name__ == "__main__":
    main()
