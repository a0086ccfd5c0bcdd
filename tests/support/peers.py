"""Peers: other engines that KVLoom is compared with, each in a virtual environment of its own under
$XDG_CACHE_HOME/kvloom/peers, made the first time it is needed. Nothing of them is part of KVLoom."""
import os
import subprocess
import sys

PACKAGES = {
    "transformers": ["torch", "transformers", "gguf", "numpy", "tokenizers", "accelerate"],
    "llamacpp": ["xllamacpp", "numpy"],
    "openai": ["openai"],
}
MODELS = {
    "smollm2-135m": "smollm2-135m-instruct.q4_1.gguf",
    "qwen2.5-coder-0.5b": "qwen2.5-coder-0.5b-instruct.q4_k_m.gguf",
}


def cache_folder():
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "kvloom")


def model_path(name):
    return os.path.join(cache_folder(), "models", MODELS[name])


def say(text):
    print(text, file=sys.stderr, flush=True)


def python_of(peer, imports):
    """The Python of a peer's environment, which is made where it cannot import `imports`."""
    folder = os.path.join(cache_folder(), "peers", peer)
    python = os.path.join(folder, "bin", "python")
    test = [python, "-c", "import " + ", ".join(imports)]
    if os.path.exists(python) and subprocess.run(test, capture_output=True).returncode == 0:
        return python
    say(f"{peer}: installing {' '.join(PACKAGES[peer])} into {folder}, once")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, stdout=sys.stderr)
    subprocess.run([python, "-m", "pip", "install", *PACKAGES[peer]], check=True,
                   stdout=sys.stderr)
    return python


def run_again_under(peer, imports):
    """Replaces this process by the same program under the peer's Python, once."""
    if os.environ.get("KVLOOM_PEER") == peer:
        return
    python = python_of(peer, imports)
    os.environ["KVLOOM_PEER"] = peer
    os.execv(python, [python, *sys.argv])
