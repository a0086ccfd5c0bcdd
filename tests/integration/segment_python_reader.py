#!/usr/bin/env python3
"""What the C writer writes, the independent Python reader reads: header and numbers, every dtype.

    segment_python_reader.py BUILD_FOLDER, or a program in it

Also reads the small files beside the reader, which earlier builds have written: the format of
version 1 stays what it is. `--update` writes those that are missing.
"""
import os
import random
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(HERE, "..", "golden", "segment")
sys.path.insert(0, GOLDEN)
sys.dont_write_bytecode = True
import read_kvseg  # noqa: E402

DTYPES = {read_kvseg.F32: "f32", read_kvseg.F16: "f16", read_kvseg.BF16: "bf16",
          read_kvseg.INT8: "int8"}
LAYERS, HEADS, TOKENS, DIM = 3, 2, 5, 8


def expected_number(layer, token, head, dim, is_value):
    """The formula in tests/unit/segment_container_test.c."""
    step = (layer * 7 + token * 5 + head * 3 + dim * 11 + 131 * is_value) % 255 - 127
    return step / 16


def check_header(header, dtype):
    expected = {
        "version": 1, "kind": read_kvseg.SEGMENT, "dtype": dtype, "n_layers": LAYERS,
        "n_kv_heads": HEADS, "head_dim": DIM, "n_tokens": TOKENS, "pairs": 1,
        "home_is_canonical": 1, "extra": b"example", "id": bytes(range(32)),
        "fingerprint": bytes(255 - i for i in range(32)),
        "home": bytes((3 * i + 1) % 256 for i in range(32)),
        "token_ids": [t * t * 40000 + 7 for t in range(TOKENS)],
    }
    for name, value in expected.items():
        assert header[name] == value, "%s is %r, must be %r" % (name, header[name], value)


def check_numbers(container, dtype):
    for layer in range(LAYERS):
        for is_value in (False, True):
            matrix = container.matrix(layer, is_value)
            for head in range(HEADS):
                for token in range(TOKENS):
                    row = [expected_number(layer, token, head, d, is_value) for d in range(DIM)]
                    # Sixteenths up to 8 are exact but in int8: there half a step of the scale,
                    # which is at most one float16 step above the largest number by 127.
                    scale = max(map(abs, row)) / 127 * (1 + 2 ** -10)
                    bound = scale / 2 * (1 + 1e-5) if dtype == read_kvseg.INT8 else 0
                    for wanted, got in zip(row, matrix[head][token]):
                        assert abs(wanted - got) <= bound, (layer, is_value, head, token, wanted, got)


def check_file(path, dtype):
    container = read_kvseg.read(path)
    check_header(container.header, dtype)
    check_numbers(container, dtype)


def check_damage(path):
    """The reader itself must notice damage, or its agreement would say little."""
    with open(path, "rb") as file:
        sound = file.read()
    chance = random.Random(1)
    n_noticed = n_tried = 0
    for _ in range(200):
        damaged = bytearray(sound)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        n_tried += 1
        try:
            read_kvseg.Container(bytes(damaged))
        except read_kvseg.Damaged:
            n_noticed += 1
    if read_kvseg.xxhash is not None:
        assert n_noticed == n_tried, "%d of %d flips were noticed" % (n_noticed, n_tried)
    for n in (0, 63, 64, len(sound) - 1):
        try:
            read_kvseg.Container(sound[:n])
        except read_kvseg.Damaged:
            continue
        raise AssertionError("%d of %d bytes were taken for a whole file" % (n, len(sound)))


def main():
    arguments = [a for a in sys.argv[1:] if not a.startswith("--")]
    if len(arguments) != 1:
        sys.exit(__doc__)
    folder = arguments[0] if os.path.isdir(arguments[0]) else os.path.dirname(arguments[0])
    writer = os.path.join(folder, "segment_container_test")
    for dtype, name in DTYPES.items():
        golden = os.path.join(GOLDEN, "example_%s.kvseg" % name)
        if "--update" in sys.argv and not os.path.exists(golden):
            subprocess.run([writer, golden, str(dtype)], check=True)
        with tempfile.TemporaryDirectory() as folder:
            fresh = os.path.join(folder, "fresh.kvseg")
            subprocess.run([writer, fresh, str(dtype)], check=True)
            check_file(fresh, dtype)
            check_damage(fresh)
            with open(fresh, "rb") as a, open(golden, "rb") as b:
                assert a.read() == b.read(), "%s: the writer's bytes have changed" % golden
        check_file(golden, dtype)
    checksums = "compared" if read_kvseg.xxhash is not None else "skipped (no module xxhash)"
    print("segment_python_reader: %d dtypes read back, checksums %s" % (len(DTYPES), checksums))


if __name__ == "__main__":
    main()
