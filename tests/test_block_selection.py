"""`BlockSelection`: what it holds, its conversions, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn_jax as sa
from sparse_attn_jax.testing import oracle
from sparse_attn_jax.testing.inputs import DilatedPredicate, hostile_indices

SIZES = dict(q_block_size=4, kv_block_size=8)


def random_mask(shape=(2, 3, 5, 7), density=0.4):
    return np.random.default_rng(0).random(shape) < density


def select(indices, **sizes):
    return sa.BlockSelection(jnp.asarray(indices, jnp.int32), **(SIZES | sizes))


def test_block_mask_survives_the_round_trip():
    mask = random_mask()
    selection = sa.BlockSelection.from_block_mask(jnp.asarray(mask), **SIZES)
    assert selection.indices.dtype == jnp.int32 and selection.indices.shape == (2, 3, 5, 7)
    np.testing.assert_array_equal(selection.to_block_mask(56), mask)
    np.testing.assert_array_equal(selection.to_block_mask(50), mask)  # the last block is not full


def test_block_mask_lists_are_ascending_and_padded():
    mask = jnp.array([[[[False, True, False, True], [False, False, False, False]]]])
    selection = sa.BlockSelection.from_block_mask(mask, **SIZES, num_slots=3)
    np.testing.assert_array_equal(selection.indices, [[[[1, 3, -1], [-1, -1, -1]]]])


@pytest.mark.parametrize("num_slots", [1, 3, 7, 10])
def test_block_mask_keeps_the_lowest_ids_of_a_row(num_slots):
    mask = random_mask()
    selection = sa.BlockSelection.from_block_mask(jnp.asarray(mask), **SIZES, num_slots=num_slots)
    assert selection.indices.shape[-1] == num_slots
    np.testing.assert_array_equal(selection.to_block_mask(56), mask & (mask.cumsum(-1) <= num_slots))


def test_csr_holds_each_row():
    crow = jnp.array([[0, 2, 2, 5], [0, 1, 2, 3]])
    col = jnp.array([[4, 1, 0, 2, 3, -1], [5, 0, 1, -1, -1, -1]])
    selection = sa.BlockSelection.from_csr(crow, col, **SIZES)
    expected = [[[[4, 1, -1], [-1, -1, -1], [0, 2, 3]], [[5, -1, -1], [0, -1, -1], [1, -1, -1]]]]
    np.testing.assert_array_equal(selection.indices, expected)


def test_csr_under_jit_selects_the_same():
    crow, col = jnp.array([[0, 2, 2, 5]]), jnp.array([[4, 1, 0, 2, 3, -1]])

    def build(crow, col):
        return sa.BlockSelection.from_csr(crow, col, **SIZES).to_block_mask(48)

    np.testing.assert_array_equal(jax.jit(build)(crow, col), build(crow, col))


def test_csr_offsets_out_of_range_read_nothing():
    crow, col = jnp.array([[0, 100, -3, 4]]), jnp.array([[4, 1, 0, 2]])
    mask = jax.jit(lambda: sa.BlockSelection.from_csr(crow, col, **SIZES).to_block_mask(48))()
    assert mask.shape == (1, 1, 3, 6)


def test_csr_of_a_selection_is_ascending_and_without_what_is_ignored():
    indices = [[[[5, -1, 5, 0], [-1, -1, -1, -1], [7, 9, 2, -2]], [[3, -1, -1, -1], [6, 1, 4, 0], [0, 0, 0, 0]]]]
    crow, col = select(indices).to_csr(60)  # 8 blocks
    assert (crow.dtype, col.dtype) == (jnp.int32, jnp.int32)
    np.testing.assert_array_equal(crow, [[0, 2, 2, 4], [0, 1, 5, 6]])
    np.testing.assert_array_equal(col, [[0, 5, 2, 7, -1, -1], [3, 0, 1, 4, 6, 0]])


def test_csr_survives_the_round_trip():
    selection = sa.BlockSelection.from_block_mask(jnp.asarray(random_mask((1, 3, 5, 7))), **SIZES)

    def again(selection):
        crow, col = selection.to_csr(56)
        return col, sa.BlockSelection.from_csr(crow, col, **SIZES)

    col, rebuilt = again(selection)
    traced_col, traced = jax.jit(again)(selection)
    longest = int((selection.indices >= 0).sum((2, 3)).max())
    assert col.shape == (3, longest) and traced_col.shape == (3, 5 * 7)
    np.testing.assert_array_equal(traced_col[:, :longest], col)
    for other in (rebuilt, traced):
        np.testing.assert_array_equal(other.to_block_mask(56), selection.to_block_mask(56))


def test_csr_of_empty_lists():
    crow, col = select([[[[-1, -1], [-1, 99]]]]).to_csr(56)
    np.testing.assert_array_equal(crow, [[0, 0, 0]])
    np.testing.assert_array_equal(col, [[-1]])


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_dense_mask_equals_the_definition(heads):
    sizes = dict(q_len=18, kv_len=50, q_block_size=4, kv_block_size=8)
    indices = hostile_indices(batch=2, heads=heads, num_slots=5, seed=heads, **sizes)
    mask = select(indices).to_dense_mask(18, 50)
    expected = oracle.attention_mask(indices, batch=2, num_q_heads=heads, **sizes)
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(select(indices).to_block_mask(50), expected[:, :, ::4, ::8])


def test_density_counts_a_block_once():
    indices = [[[[0, 0, 0, -1], [1, 3, 9, 2**31 - 1]]]]  # 1 and 2 of 4 blocks
    np.testing.assert_allclose(select(indices).density(32), 3 / 8)


def test_selection_is_a_pytree():
    predicate = DilatedPredicate(jnp.arange(3), stride=2)
    selection = sa.BlockSelection(jnp.zeros((1, 1, 2, 2), jnp.int32), **SIZES, predicate=predicate)
    leaves, structure = jax.tree.flatten(selection)
    assert [leaf.shape for leaf in leaves] == [(1, 1, 2, 2), (3,)]
    rebuilt = jax.jit(lambda selection: selection)(selection)
    assert (rebuilt.q_block_size, rebuilt.kv_block_size, rebuilt.predicate.stride) == (4, 8, 2)
    assert jax.tree.structure(rebuilt) == structure
    assert structure != jax.tree.structure(select(selection.indices))


MASK = jnp.ones((1, 1, 2, 3), bool)
CROW, COL = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 4), jnp.int32)
BAD_INPUT = {
    "mask_rank": ("mask", lambda: sa.BlockSelection.from_block_mask(MASK[0], **SIZES)),
    "mask_dtype": ("mask", lambda: sa.BlockSelection.from_block_mask(MASK.astype(int), **SIZES)),
    "mask_num_slots": ("num_slots", lambda: sa.BlockSelection.from_block_mask(MASK, **SIZES, num_slots=0)),
    "mask_q_block_size": (
        "q_block_size",
        lambda: sa.BlockSelection.from_block_mask(MASK, q_block_size=0, kv_block_size=8),
    ),
    "mask_kv_block_size": (
        "kv_block_size",
        lambda: sa.BlockSelection.from_block_mask(MASK, q_block_size=4, kv_block_size=-8),
    ),
    "csr_crow_rank": ("crow", lambda: sa.BlockSelection.from_csr(CROW[0], COL, **SIZES)),
    "csr_col_dtype": ("col", lambda: sa.BlockSelection.from_csr(CROW, COL.astype(float), **SIZES)),
    "csr_heads": ("crow", lambda: sa.BlockSelection.from_csr(CROW, COL[:1], **SIZES)),
    "csr_no_offsets": ("crow", lambda: sa.BlockSelection.from_csr(CROW[:, :0], COL, **SIZES)),
    "csr_of_a_batch": ("indices", lambda: select([[[[0]]], [[[0]]]]).to_csr(8)),
    "csr_q_block_size": ("q_block_size", lambda: sa.BlockSelection.from_csr(CROW, COL, q_block_size=2.0, kv_block_size=8)),
}


@pytest.mark.parametrize("row", BAD_INPUT)
def test_bad_input_is_named(row):
    argument, call = BAD_INPUT[row]
    with pytest.raises(ValueError, match=f"`{argument}`"):
        call()
