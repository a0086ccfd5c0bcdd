"""llama.cpp's own HTTP server as a peer, over xllamacpp: prints its address and serves until its
standard input ends.

Started by compare_serve.py under the peer's Python: peer_llamacpp_server.py MODEL THREADS SLOTS
CONTEXT. Defaults (f16 KV, continuous batching, prompt cache, flash attention where it chooses it) but
for threads, slots and the context, which is CONTEXT for each slot."""
import json
import os
import socket
import sys

# llama.cpp writes its log to standard output's descriptor too: answers go to a copy of it.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import xllamacpp  # noqa: E402


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main():
    model, threads, slots, context = sys.argv[1], *map(int, sys.argv[2:5])
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx = context * slots
    parameters.n_parallel = slots
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    parameters.verbosity = -1
    parameters.n_threads_http = slots + 4
    parameters.port = free_port()
    server = xllamacpp.Server(parameters)
    about = {"version": xllamacpp.__version__, "address": server.listening_address}
    print(json.dumps(about), file=answers, flush=True)
    sys.stdin.read()
    # The server's threads outlive main otherwise.
    os._exit(0)


if __name__ == "__main__":
    main()
