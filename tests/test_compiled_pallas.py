"""The Pallas kernels, compiled for an H100 and an A100 on a machine without a GPU."""

import re

import jax
import pytest

from sparse_attn_jax import jax_compat
from tools import pallas_table
from tools.pallas_table import COMPILED_BY, TABLE

pytestmark = pytest.mark.kernels

# Kernels that only add or compare.
WITHOUT_PRODUCTS = {"sum_parts", "kth_largest"}
AMPERE = "attention on an A100"
SHARED_BYTES = {True: 163 * 1024, False: 227 * 1024}  # whether for Ampere
# Of an H100, less what the driver takes.
DEVICE_BYTES = 78 * 2**30


@pytest.fixture(scope="module")
def programs():
    if not jax_compat.HAS_MOSAIC_GPU:
        pytest.skip("needs JAX 0.11 or newer")
    if pallas_table.plugin() is None:
        pytest.skip("`make pallas-plugin` brings the compiler")
    return pallas_table.compile_programs()


@pytest.fixture(scope="module")
def kernels(programs):
    return [(line["program"], name, numbers) for line in programs for name, numbers in line["kernels"].items()]


def test_every_program_has_its_kernels(programs):
    attention = {"attention_forward", "query_gradient", "key_gradient", "sum_parts"}
    selection = {"block_scores", "kth_largest"}
    for line in programs:
        kind = line["program"].split(",")[0]
        expected = {"attention": attention, AMPERE: attention, "selection": selection}.get(kind, attention | selection)
        assert set(line["kernels"]) == expected, line["program"]


def test_products_are_made_by_tensor_cores(kernels):
    for program, name, numbers in kernels:
        own, other = ("mma", "wgmma") if program.startswith(AMPERE) else ("wgmma", "mma")
        assert (numbers[own] > 0) == (name not in WITHOUT_PRODUCTS), (program, name)
        assert numbers[other] == 0, (program, name)


def test_threads_copy_where_there_is_no_tma(kernels):
    for program, name, numbers in kernels:
        assert (numbers["cp_async"] > 0) == (program.startswith(AMPERE) and name not in WITHOUT_PRODUCTS), (program, name)


# On an A100: copies that come first, loops over the list, and stages by head_dim and block.
FIRST_AND_LOOPS = dict(attention_forward=(1, 3), query_gradient=(2, 3), key_gradient=(2, 1))
STAGES = dict(
    attention_forward={(64, 64): 4, (128, 16): 2, (128, 64): 2, (128, 128): 2},
    query_gradient={(64, 64): 4, (128, 16): 4, (128, 64): 4, (128, 128): 4},
    key_gradient={(64, 64): 3, (128, 16): 2, (128, 64): 4, (128, 128): 4},
)


def test_copies_of_threads_are_waited_for(kernels):
    """The interpreter runs other waits."""
    for program, name, numbers in kernels:
        if not program.startswith(AMPERE) or name in WITHOUT_PRODUCTS:
            assert (numbers["copies"], numbers["waits"]) == (0, []), (program, name)
            continue
        first, loops = FIRST_AND_LOOPS[name]
        head_dim, block = (int(re.search(rf"{what} (\d+)", program)[1]) for what in ("head_dim", "blocks of"))
        stages = STAGES[name][head_dim, block]
        # Of keys and values, or of query and d_out.
        per_item = 2 if name == "key_gradient" else 2 * max(1, 64 // block)
        assert numbers["copies"] == first + (stages - 1 + loops) * per_item, (program, name)
        # While enough items follow, some of them may be on their way.
        while_more = [(stages - 2) * per_item] * loops if stages > 2 else []
        assert numbers["waits"] == [0] * (1 + loops) + while_more, (program, name)


def test_no_kernel_spills_more_than_is_documented(kernels):
    for program, name, numbers in kernels:
        assert numbers["spill_bytes"] <= pallas_table.spill_budget(program, name), (program, name, numbers)


def test_kernels_fit(kernels):
    for program, name, numbers in kernels:
        assert numbers["shared_bytes"] <= SHARED_BYTES[program.startswith(AMPERE)], (program, name)


def test_training_step_fits_on_the_device(programs):
    (step,) = [line for line in programs if line["program"].startswith("training step")]
    assert sum(step["bytes"].values()) < DEVICE_BYTES


def test_table_is_of_these_kernels(programs):
    """Of the same JAX all numbers are the same; another has the same programs and kernels."""
    old, new = TABLE.read_text(), pallas_table.table(programs, jax.__version__)
    if COMPILED_BY.search(old)[1] != COMPILED_BY.search(new)[1]:
        old, new = (re.findall(r"^\| ([^|]*) \| ([a-z_]+) \|", text, flags=re.MULTILINE) for text in (old, new))
    assert old == new, "run `make pallas-table`"
