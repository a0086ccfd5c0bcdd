#!/usr/bin/env python3
"""Writes compute_golden.h: random blocks of every quantised format, and a digest of what the
reference implementation of GGUF (package gguf, with numpy) makes of them.

    python3 compute_golden_make.py > compute_golden.h
"""
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

N_BLOCKS = 2
# Where the half-precision numbers of a block stand.
FORMATS = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2],
           "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}


def fnv1a(data: bytes) -> int:
    digest = 0xCBF29CE484222325
    for byte in data:
        digest = (digest ^ byte) * 0x100000001B3 % 2**64
    return digest


def main() -> None:
    chance = np.random.default_rng(20)
    print("/* compute_golden.h: made by compute_golden_make.py with the gguf package.")
    print(" * Blocks, and FNV-1a (64 bits) of the float32 weights they stand for. */")
    print("#ifndef KVL_COMPUTE_GOLDEN_H\n#define KVL_COMPUTE_GOLDEN_H\n")
    print('#include "compute/dtype.h"\n')
    rows = []
    for name, halves in FORMATS.items():
        kind = GGMLQuantizationType[name]
        _, n_bytes = GGML_QUANT_SIZES[kind]
        blocks = chance.integers(0, 256, (N_BLOCKS, n_bytes), dtype=np.uint8)
        for at in halves:
            scale = chance.normal(0, 0.02, N_BLOCKS).astype("<f2")
            blocks[:, at:at + 2] = scale.view(np.uint8).reshape(N_BLOCKS, 2)
        weights = dequantize(blocks, kind).astype("<f4")
        print(f"static const uint8_t golden_{name}[] = {{")
        text = [f"0x{byte:02X}," for byte in blocks.reshape(-1)]
        for i in range(0, len(text), 16):
            print("    " + " ".join(text[i:i + 16]))
        print("};\n")
        rows.append(f"    {{KVL_DTYPE_{name}, {weights.size}, golden_{name}, "
                    f"UINT64_C(0x{fnv1a(weights.tobytes()):016X})}},")
    print("static const struct {\n    kvl_dtype dtype;\n    size_t n_weights;")
    print("    const uint8_t *bytes;\n    uint64_t digest;\n} golden_blocks[] = {")
    print("\n".join(rows))
    print("};\n\n#endif /* KVL_COMPUTE_GOLDEN_H */")


main()
