"""A process that runs the checks on one compiled library after the other.

Standard input has a line of JSON for each: {"library": path, "archs": ["sm80"]}. Standard output has a line for each check
that begins, {"begins": name}, and one for each library: {"verdict": ..., "check": ..., "message": ...}.
"""

import ctypes
import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# The unchanged library, by which calls are traced.
os.environ["SPARSE_ATTN_HOST_SIM"] = sys.argv[1]

import jax  # noqa: E402

from sparse_attn_jax.implementations.cuda import library  # noqa: E402

HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)

current: ctypes.CDLL  # the library that is put to the test


def handler_of(target: str) -> HANDLER:
    """A handler that hands a call on to the library at hand: a name can be registered only once."""

    def call(frame):
        function = getattr(current, target)
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
        return function(frame)

    return HANDLER(call)


HANDLERS = {target: handler_of(target) for target in library.CUSTOM_CALL_TARGETS}


def register(capsules, platform: str) -> None:
    del capsules
    for target, handler in HANDLERS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform=platform)


def judge(checks, report) -> dict:
    for name in checks.makers:
        report(dict(begins=name))
        try:
            checks.run(name)
        except AssertionError as error:
            return dict(verdict="wrong result", check=name, message=str(error))
        except jax.errors.JaxRuntimeError as error:
            return dict(verdict="simulator", check=name, message=str(error))
    return dict(verdict="survived", check=None, message="")


def main() -> None:
    global current
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what else is printed is no report
    report = lambda line: print(json.dumps(line), file=out)
    current = ctypes.CDLL(sys.argv[1])
    library._register = register
    from tools.mutants.checks import Checks

    by_arch = {}
    for line in sys.stdin:
        order = json.loads(line)
        current = ctypes.CDLL(order["library"])
        for arch in order["archs"]:
            verdict = judge(by_arch.setdefault(arch, Checks(arch)), report)
            if verdict["verdict"] != "survived":
                break
        report(verdict)
        # An exception may hold on to results of the library.
        loaded, current = current._handle, None
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(loaded))


if __name__ == "__main__":
    main()
