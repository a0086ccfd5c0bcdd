#!/usr/bin/env python3
"""What holds of recomputing among placed KV on random models holds on real ones: everything
recomputed is a full prefill to the last bit, in one batch or refreshed in order; a stale key
reaches no row before it; exact KV does not deviate.

    python3 tests/integration/invariants_contract.py build/release

Runs build/release/host_blend_test on each model of the cache. Exit status 77 where SmolLM2 is not
in it."""
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(ROOT, "tests", "support"))
import contract  # noqa: E402
import peers  # noqa: E402

MODELS = ("smollm2-135m", "qwen2.5-coder-0.5b")


def check_model(name):
    test = os.path.join(os.path.dirname(contract.program()), "host_blend_test")
    done = subprocess.run([test], env=dict(os.environ, KVLOOM_TEST_MODEL=peers.model_path(name)),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900,
                          check=False)
    assert done.returncode == 0, f"{name}: {done.stdout.decode()[-600:]}"
    assert b"4 test(s) run" in done.stdout, done.stdout.decode()[-600:]


def main():
    contract.need_model(MODELS[0])
    checks = contract.Checks()
    for name in MODELS:
        if os.path.exists(peers.model_path(name)):
            checks.run(check_model, name)
    return checks.status()


if __name__ == "__main__":
    sys.exit(main())
