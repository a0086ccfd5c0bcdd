"""llama.cpp as a peer, over xllamacpp: reads requests as JSON lines, answers each with seconds.

Started by compare.py under the peer's Python: peer_llamacpp.py MODEL THREADS. Settings are
llama.cpp's defaults (f16 KV, flash attention where it chooses it, batches of 2,048 cut into 512)
but for the number of threads and the length of the context. Times are llama.cpp's own, of its
evaluation of the prompt and of its generation; tokenising and transport are outside."""
import json
import os
import random
import sys

# llama.cpp writes its log to standard output's descriptor too: answers go to a copy of it.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import xllamacpp  # noqa: E402

CONTEXT = 4096
DECODED = 32


def complete(server, ids, n_predict, cached):
    answer = server.handle_completions({
        "prompt": ids, "n_predict": n_predict, "temperature": 0, "ignore_eos": True,
        "cache_prompt": cached})
    if isinstance(answer, str):
        answer = json.loads(answer)
    return answer["timings"]


def prefill(server, n_tokens):
    # Other tokens each time, so that nothing can be had from a cache.
    ids = [random.randrange(100, 40000) for _ in range(n_tokens)]
    timings = complete(server, ids, 1, False)
    if timings["prompt_n"] != n_tokens:
        raise RuntimeError(f"llama.cpp evaluated {timings['prompt_n']} tokens of {n_tokens}")
    return timings["prompt_ms"] / 1e3


def decode(server, n_tokens):
    """Seconds of DECODED tokens behind a context, which only the first request has to prefill. The
    first token comes out of the prompt's evaluation, so one more is asked for."""
    ids = [random.Random(n_tokens).randrange(100, 40000) for _ in range(n_tokens)]
    timings = complete(server, ids, DECODED + 1, True)
    if timings["predicted_n"] != DECODED + 1:
        raise RuntimeError(f"llama.cpp generated {timings['predicted_n']} tokens")
    return timings["predicted_ms"] / 1e3


def main():
    model, threads = sys.argv[1], int(sys.argv[2])
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx = CONTEXT
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    parameters.verbosity = -1
    server = xllamacpp.Server(parameters)
    about = {"version": xllamacpp.__version__, "features": xllamacpp.get_system_info().strip()}
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        work = prefill if request["kind"] == "prefill" else decode
        print(json.dumps(work(server, request["tokens"])), file=answers, flush=True)
    # The server's threads outlive main otherwise.
    answers.close()
    os._exit(0)


if __name__ == "__main__":
    main()
