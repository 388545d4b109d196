"""A process that runs the checks on one mutant after the other.

Standard input has a line of JSON for each: {"library": path, "mutant": number, "kernels": ["sm80/launchers.cu"]}. Standard
output has a line for each check that begins, {"begins": name}, and one for each mutant: {"verdict": ..., "check": ...,
"message": ...}.
"""

import ctypes
import json
import os
import sys
import threading
import time

os.environ["JAX_PLATFORMS"] = "cpu"
# The unchanged library, by which calls are traced.
os.environ["SPARSE_ATTN_HOST_SIM"] = sys.argv[1]

import jax  # noqa: E402

from sparse_attn_jax.implementations.cuda import library  # noqa: E402
from tools.mutants.rules import SWITCH  # noqa: E402

HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


class Handlers:
    """Custom calls that are handed on to the library at hand: a name can be registered only once."""

    def __init__(self):
        self.libraries = {}
        self.of_targets = {target: self.handler_of(target) for target in library.CUSTOM_CALL_TARGETS}

    def choose(self, path: str, mutant: int) -> None:
        if path not in self.libraries:
            self.libraries[path] = ctypes.CDLL(path)
        self.current = self.libraries[path]
        ctypes.c_int.in_dll(self.current, SWITCH).value = mutant

    def handler_of(self, target: str) -> HANDLER:
        def call(frame):
            function = getattr(self.current, target)
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
            return function(frame)

        return HANDLER(call)

    def register(self, capsules, platform: str) -> None:
        """In place of `library._register`."""
        del capsules
        for target, handler in self.of_targets.items():
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform=platform)


def judge(checks, kernels: list[str], report) -> dict:
    for source, name in checks.names(kernels):
        check = f"{source}: {name}"
        report(dict(begins=check))
        try:
            checks.run(source, name)
        except AssertionError as error:
            return dict(verdict="wrong result", check=check, message=str(error))
        except jax.errors.JaxRuntimeError as error:
            return dict(verdict="simulator", check=check, message=str(error))
    return dict(verdict="survived", check=None, message="")


def end_with(parent: int) -> None:
    """A mutant may never return, and nobody would know."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what else is printed is no report
    report = lambda line: print(json.dumps(line), file=out)
    handlers = Handlers()
    library._register = handlers.register
    handlers.choose(sys.argv[1], 0)
    from tools.mutants.checks import Checks

    checks = Checks()
    for line in sys.stdin:
        order = json.loads(line)
        handlers.choose(order["library"], order["mutant"])
        report(judge(checks, order["kernels"], report))


if __name__ == "__main__":
    main()
