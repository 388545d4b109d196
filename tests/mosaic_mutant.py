"""Breaks the Pallas kernels in one place, and runs them: `python tests/mosaic_mutant.py module old new`.

Exits with `NOTICED` if the oracle or the search for races says that they are wrong. A process of its own, because threads of an
interpreter that failed may go on waiting.
"""

import functools
import importlib
import inspect
import os
import sys
import traceback
import types

NOTICED = 3


def apply(name: str, old: str, new: str) -> None:
    module = importlib.import_module(f"sparse_attn_jax.implementations.mosaic.{name}")
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{name} has {source.count(old)} times: {old}"
    mutated = types.ModuleType(module.__name__)
    exec(compile(source.replace(old, new), module.__file__, "exec"), mutated.__dict__)
    vars(module).update({key: value for key, value in vars(mutated).items() if not key.startswith("__")})


def attention(forward_alone: bool = False):
    """Runs the kernels of attention; returns what compares the results with the oracle."""
    import jax
    from kernel_cases import attend_with, small_case

    from sparse_attn_jax.testing import compare

    # More chunks of keys, and slices of rows, than shared memory holds; small blocks, and the last chunk is not whole.
    inputs = small_case("odd_prefix", q_len=170, kv_len=260, num_slots=12, num_q_heads=2, num_kv_heads=1, q_block_size=16)
    attend = attend_with("mosaic", inputs)
    if forward_alone:
        results = jax.device_get(dict(zip(("out", "lse"), jax.jit(attend)(**inputs.operands))))
    else:
        results = compare.results_of(attend, inputs)
    return lambda: compare.assert_results_match(results, inputs)


def ampere_attention(forward_alone: bool = False):
    """The same for Ampere."""
    from unittest import mock

    from sparse_attn_jax.implementations import mosaic

    with mock.patch.object(mosaic, "kernels_of", lambda problem: (mosaic.ampere_forward, mosaic.ampere_backward)):
        return attention(forward_alone)


def selection():
    """The same for those of block selection."""
    from selection_calls import make_call

    from sparse_attn_jax.implementations.mosaic.scoring import select_from_units
    from sparse_attn_jax.testing import selection_oracle as oracle

    # Coarse units and queries that see none, more steps of units than shared memory holds, two chunks of blocks, three heads of
    # a list; few blocks are forced.
    sizes = dict(kv_len=1150, block_size=16, kernel_size=8, kernel_stride=4, coarse_kernel_size=128, coarse_kernel_stride=8)
    call = make_call(90, 3, 1, use_coarse=True, q_offset=(90, 1060), batch=2, num_local_blocks=1, top_k=4, **sizes)
    found = call.run(select_from_units)
    return lambda: oracle.assert_same_up_to_rounding(found, *call.define())


SELECTION_MODULES = ("scoring_layout", "block_scores", "kth_largest")


def check_of(module: str):
    if module in SELECTION_MODULES:
        return selection
    check = ampere_attention if module.startswith("ampere") else attention
    return functools.partial(check, forward_alone=module.endswith("_forward"))


def main(arguments: list[str]) -> int:
    from mosaic_interpreter import interpreted_kernels

    if arguments:
        apply(*arguments)
    checks = [check_of(arguments[0])] if arguments else [attention, ampere_attention, selection]
    with interpreted_kernels():
        try:
            compare_all = [check() for check in checks]
        except RuntimeError as error:
            assert "RACE DETECTED" in str(error) or "barrier" in str(error).lower(), error
            return NOTICED
    try:
        for compare in compare_all:
            compare()
    except AssertionError:
        return NOTICED
    return 0


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    # As many threads as warpgroups wait for each other, and more.
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    try:
        status = main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)  # without waiting for other threads
