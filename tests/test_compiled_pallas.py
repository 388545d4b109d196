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


# The first copies, and those of each step: three loops over a tile's list, or one over a block's.
WAITS = dict(attention_forward=1 + 3, query_gradient=1 + 3, key_gradient=1 + 1, sum_parts=0)


def test_copies_of_threads_are_waited_for(kernels):
    """The interpreter runs other waits."""
    for program, name, numbers in kernels:
        assert numbers["waits"] == (WAITS[name] if program.startswith(AMPERE) else 0), (program, name)


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
