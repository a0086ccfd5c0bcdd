#!/usr/bin/env python3
"""The peer of gpu-model: eager prefill of the shape of Llama-3.1-8B in torch, random bf16 weights.

    gpu-model --torch "$(python3 tests/bench/peer_torch_prefill.py)"

Prints the milliseconds for 1024, 4096 and 8192 tokens, with commas between: the host's clock from
the ids to the logits of the last token, median of ten after two. Attention is torch's flash kernel.
With --attention it prints the milliseconds of that kernel alone instead, one layer. Needs torch and
a CUDA device.
"""
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

WIDTH, HEADS, KV_HEADS, DIM = 4096, 32, 8, 128
FEED_FORWARD, VOCABULARY, LAYERS = 14336, 128256, 32
LENGTHS = (1024, 4096, 8192)
WARM_UP, REPEATS = 2, 10


def weights(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.012


def make_model():
    keys = KV_HEADS * DIM
    layers = [dict(query=weights(WIDTH, WIDTH), key=weights(keys, WIDTH),
                   value=weights(keys, WIDTH), output=weights(WIDTH, WIDTH),
                   gate=weights(FEED_FORWARD, WIDTH), up=weights(FEED_FORWARD, WIDTH),
                   down=weights(WIDTH, FEED_FORWARD)) for _ in range(LAYERS)]
    norm = torch.ones(WIDTH, device="cuda", dtype=torch.bfloat16)
    return weights(VOCABULARY, WIDTH), norm, layers


def rotate(x, cosines, sines):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cosines - b * sines, b * cosines + a * sines), -1)


def heads(x, matrix, n_heads):
    return F.linear(x, matrix).view(x.shape[0], n_heads, DIM).transpose(0, 1)[None]


@torch.inference_mode()
def prefill(model, ids, cosines, sines):
    embedding, norm, layers = model
    x = embedding[ids]
    for layer in layers:
        h = F.rms_norm(x, (WIDTH,), norm, 1e-5)
        query = rotate(heads(h, layer["query"], HEADS), cosines, sines)
        key = rotate(heads(h, layer["key"], KV_HEADS), cosines, sines)
        value = heads(h, layer["value"], KV_HEADS)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + F.linear(seen[0].transpose(0, 1).reshape(x.shape[0], WIDTH), layer["output"])
        h = F.rms_norm(x, (WIDTH,), norm, 1e-5)
        gated = F.silu(F.linear(h, layer["gate"])) * F.linear(h, layer["up"])
        x = x + F.linear(gated, layer["down"])
    return F.linear(F.rms_norm(x[-1:], (WIDTH,), norm, 1e-5), embedding)


def median_ms(run, n_inside=1):
    times = []
    for i in range(WARM_UP + REPEATS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(n_inside):
            run()
        torch.cuda.synchronize()
        if i >= WARM_UP:
            times.append((time.perf_counter() - begin) * 1000 / n_inside)
    return statistics.median(times)


def prefill_ms(model, n):
    frequencies = 500000 ** (-torch.arange(0, DIM, 2, device="cuda").float() / DIM)
    angles = torch.arange(n, device="cuda").float()[:, None] * frequencies
    cosines, sines = angles.cos().bfloat16(), angles.sin().bfloat16()
    ids = torch.randint(0, VOCABULARY, (n,), device="cuda")
    return median_ms(lambda: prefill(model, ids, cosines, sines))


def attention_ms(n):
    query = torch.randn(1, HEADS, n, DIM, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(1, KV_HEADS, n, DIM, device="cuda", dtype=torch.bfloat16)
    value = torch.randn_like(key)
    return median_ms(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True,
                                                            enable_gqa=True), LAYERS)


def main():
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        if "--attention" in sys.argv[1:]:
            times = [attention_ms(n) for n in LENGTHS]
        else:
            model = make_model()
            times = [prefill_ms(model, n) for n in LENGTHS]
    print(",".join(f"{ms:.3f}" for ms in times))


if __name__ == "__main__":
    main()
