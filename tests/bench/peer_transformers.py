"""transformers with torch in float32 as a peer: reads requests as JSON lines, answers with seconds.

Started by compare.py under the peer's Python: peer_transformers.py MODEL THREADS. The weights are the
GGUF file's, dequantised; attention is torch's fused one (sdpa); only the last position's logits
are computed, as the others do."""
import json
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "support"))

import torch  # noqa: E402
import transformers  # noqa: E402
from oracle import Source, load_model  # noqa: E402

DECODED = 32


def prefill(model, n_tokens):
    ids = torch.randint(100, 40000, (1, n_tokens))
    start = time.perf_counter()
    with torch.no_grad():
        model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def decode(model, n_tokens):
    ids = torch.randint(100, 40000, (1, n_tokens))
    with torch.no_grad():
        answer = model(ids, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(DECODED):
            token = answer.logits[:, -1:].argmax(dim=-1)
            answer = model(token, past_key_values=answer.past_key_values, use_cache=True,
                           logits_to_keep=1)
        return time.perf_counter() - start


def main():
    model_path, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    model = load_model(Source(model_path), "sdpa")
    print(json.dumps({"version": f"{transformers.__version__}, torch {torch.__version__}"}),
          flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        work = prefill if request["kind"] == "prefill" else decode
        print(json.dumps(work(model, request["tokens"])), flush=True)


if __name__ == "__main__":
    main()
