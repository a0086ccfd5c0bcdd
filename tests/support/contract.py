"""What the contract tests share: the program under test, the model it needs, and running checks."""
import os
import sys
import tempfile
import time

import peers


def program():
    """The kvloom of the build folder that the command line names."""
    return os.path.abspath(os.path.join(sys.argv[1] if len(sys.argv) > 1 else "build/release",
                                        "kvloom"))


def need_model(name):
    """Ends with status 77, which says skipped, where the model is not in the cache."""
    if os.path.exists(peers.model_path(name)):
        return
    print(f"{name} is not in the cache: fetch it with kvloom model pull {name}")
    sys.exit(77)


class Checks:
    """Runs checks and remembers whether one failed. A check fails by an assertion."""

    def __init__(self):
        self.n_failed = 0

    def run(self, check, *arguments):
        start = time.monotonic()
        try:
            check(*arguments)
            print(f"{check.__name__}: as promised ({time.monotonic() - start:.1f} s)", flush=True)
        except AssertionError as error:
            self.n_failed += 1
            print(f"{check.__name__}: {error or 'an assertion failed'}", flush=True)

    def run_in_folder(self, check, *arguments):
        """The same, with a folder of its own as the last argument."""
        with tempfile.TemporaryDirectory() as folder:
            self.run(check, *arguments, folder)

    def status(self):
        return 1 if self.n_failed else 0
