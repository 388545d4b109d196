"""Breaks the Pallas kernels in one place, and runs them: `python tests/mosaic_mutant.py module old new`.

Exits with `NOTICED` if the oracle or the search for races says that they are wrong. A process of its own, because threads of an
interpreter that failed may go on waiting.
"""

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


def main(arguments: list[str]) -> int:
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from kernel_cases import attend_with, small_case

    from sparse_attn_jax.testing import compare

    # More chunks of keys, and slices of rows, than shared memory holds; small blocks, and the last chunk is not whole.
    inputs = small_case("odd_prefix", q_len=170, kv_len=260, num_slots=12, num_q_heads=2, num_kv_heads=1, q_block_size=16)
    if arguments:
        apply(*arguments)

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        try:
            results = compare.results_of(attend_with("mosaic", inputs), inputs)
        except RuntimeError as error:
            assert "RACE DETECTED" in str(error) or "barrier" in str(error).lower(), error
            return NOTICED
    try:
        compare.assert_results_match(results, inputs)
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
