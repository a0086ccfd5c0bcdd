#!/usr/bin/env python3
"""Reads a .kvseg container, written from docs/segment-format.md alone; standard library only.

It shares no code with the writer in C. Checksums are compared where the module `xxhash` is installed
and skipped otherwise; everything else is always checked.

    read_kvseg.py FILE           prints what the header says
    read_kvseg.py FILE --values  prints the numbers too
"""
import struct
import sys

try:
    import xxhash
except ImportError:
    xxhash = None

MAGIC = b"\x8bKVL\r\n\x1a\n"
PREAMBLE = struct.Struct("<8sIIIIIIQQQQ")
ENTRY = struct.Struct("<QQQ")
VERSION = 1
SEGMENT, ANCHOR = 1, 2
F32, F16, BF16, INT8 = 1, 2, 3, 4
NAMES = {
    1: "version", 2: "kind", 3: "id", 4: "fingerprint", 5: "home", 6: "home_is_canonical",
    7: "dtype", 8: "n_layers", 9: "n_kv_heads", 10: "head_dim", 11: "n_tokens", 12: "pairs",
    13: "block_bytes", 14: "token_ids", 15: "extra",
}
BYTES_FIELDS = {"id", "fingerprint", "home", "extra"}


class Damaged(Exception):
    """The file is not a container, or not a whole one."""


def require(condition, text):
    if not condition:
        raise Damaged(text)


def check_sum(data, expected, what):
    if xxhash is not None:
        require(xxhash.xxh3_64_intdigest(data) == expected, "checksum of " + what)


def read_varint(data, at):
    value = shift = 0
    while True:
        require(at < len(data) and shift < 64, "varint")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def read_field(data, at):
    """One field of a protobuf message: number, value (int or bytes), where the next one is."""
    key, at = read_varint(data, at)
    number, wire = key >> 3, key & 7
    if wire == 0:
        value, at = read_varint(data, at)
        return number, value, at
    size = {1: 8, 5: 4}.get(wire)
    if wire == 2:
        size, at = read_varint(data, at)
    require(size is not None and size <= len(data) - at, "field of the message")
    return number, data[at:at + size], at + size


def read_message(data):
    header = {name: b"" if name in BYTES_FIELDS else 0 for name in NAMES.values()}
    tokens, at = [], 0
    while at < len(data):
        number, value, at = read_field(data, at)
        name = NAMES.get(number)
        if name == "token_ids":
            if isinstance(value, int):
                tokens.append(value)
            else:
                inner = 0
                while inner < len(value):
                    token, inner = read_varint(value, inner)
                    tokens.append(token)
        elif name is not None:
            require(isinstance(value, bytes) == (name in BYTES_FIELDS), "type of " + name)
            header[name] = value
    header["token_ids"] = tokens
    return header


def round_up(value, multiple):
    return (value + multiple - 1) // multiple * multiple


class Container:
    def __init__(self, data):
        require(len(data) >= PREAMBLE.size, "preamble")
        (magic, version, n_blocks, message_bytes, table_at, blocks_at, zero_1, n_bytes, message_sum,
         zero_2, preamble_sum) = PREAMBLE.unpack_from(data)
        require(magic == MAGIC, "magic")
        check_sum(data[:56], preamble_sum, "preamble")
        if version != VERSION:
            raise Damaged("version %d, this reader knows %d" % (version, VERSION))
        require(zero_1 == 0 and zero_2 == 0, "unused bytes")
        message_past = PREAMBLE.size + message_bytes
        table_past = table_at + n_blocks * ENTRY.size + 8
        require(table_at == round_up(message_past, 8), "place of the table")
        require(blocks_at == round_up(table_past, 64), "place of the blocks")
        require(n_bytes == len(data) and blocks_at <= n_bytes, "length")
        message = data[PREAMBLE.size:message_past]
        check_sum(message, message_sum, "message")
        check_sum(data[:table_past - 8], struct.unpack_from("<Q", data, table_past - 8)[0], "table")
        require(not any(data[message_past:table_at]), "padding of the message")
        require(not any(data[table_past:blocks_at]), "padding of the table")
        self.header = read_message(message)
        self.check_header(version, n_blocks)
        self.blocks = [self.read_block(data, i, table_at, blocks_at) for i in range(n_blocks)]
        last = blocks_at + n_blocks * round_up(self.header["block_bytes"], 64)
        require(last == n_bytes, "length of the blocks")

    def check_header(self, version, n_blocks):
        h = self.header
        require(h["version"] == version and h["n_layers"] == n_blocks, "version or layers")
        require(h["kind"] in (SEGMENT, ANCHOR) and h["dtype"] in (F32, F16, BF16, INT8), "kind")
        require(all(len(h[name]) == 32 for name in ("id", "fingerprint", "home")), "digest")
        require(len(h["token_ids"]) == h["n_tokens"], "number of tokens")
        if h["kind"] == SEGMENT:
            groups = h["n_kv_heads"] * h["n_tokens"]
            width = {F32: 4, F16: 2, BF16: 2, INT8: 1}[h["dtype"]]
            scale = 2 if h["dtype"] == INT8 else 0
            require(h["block_bytes"] == 2 * groups * (h["head_dim"] * width + scale), "block_bytes")

    def read_block(self, data, index, table_at, blocks_at):
        offset, length, checksum = ENTRY.unpack_from(data, table_at + index * ENTRY.size)
        stride = round_up(self.header["block_bytes"], 64)
        require(offset == blocks_at + index * stride, "place of block %d" % index)
        require(length == self.header["block_bytes"], "length of block %d" % index)
        block = data[offset:offset + length]
        check_sum(block, checksum, "block %d" % index)
        require(not any(data[offset + length:offset + stride]), "padding of block %d" % index)
        return block

    def matrix(self, layer, is_value):
        """Keys or values of a layer of a segment as a list [head][token][dimension] of floats."""
        h = self.header
        require(h["kind"] == SEGMENT, "an anchor has no keys and values of its own")
        heads, tokens, dim = h["n_kv_heads"], h["n_tokens"], h["head_dim"]
        block, n = self.blocks[layer], heads * tokens * dim
        numbers = numbers_of(h["dtype"], block, n * is_value, n)
        if h["dtype"] == INT8:
            groups = heads * tokens
            scales = struct.unpack_from("<%de" % groups, block, 2 * n + 2 * groups * is_value)
            numbers = [q * scales[i // dim] for i, q in enumerate(numbers)]
        return [[numbers[(k * tokens + t) * dim:(k * tokens + t + 1) * dim] for t in range(tokens)]
                for k in range(heads)]


def numbers_of(dtype, block, first, n):
    if dtype == F32:
        return list(struct.unpack_from("<%df" % n, block, 4 * first))
    if dtype == F16:
        return list(struct.unpack_from("<%de" % n, block, 2 * first))
    if dtype == INT8:
        return list(struct.unpack_from("<%db" % n, block, first))
    words = struct.unpack_from("<%dH" % n, block, 2 * first)
    return list(struct.unpack("<%df" % n, struct.pack("<%dI" % n, *(w << 16 for w in words))))


def read(path):
    with open(path, "rb") as file:
        return Container(file.read())


def main(arguments):
    container = read(arguments[0])
    for name, value in container.header.items():
        print("%s: %s" % (name, value.hex() if isinstance(value, bytes) else value))
    if "--values" in arguments:
        for layer in range(container.header["n_layers"]):
            print("layer %d keys: %s" % (layer, container.matrix(layer, False)))
            print("layer %d values: %s" % (layer, container.matrix(layer, True)))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1:])
    except Damaged as error:
        sys.exit("%s is damaged: %s" % (sys.argv[1], error))
