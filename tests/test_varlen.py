"""Packed sequences against the oracle, sequence by sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn_jax as sa
from sparse_attn_jax.testing import compare, oracle
from sparse_attn_jax.testing.inputs import DilatedPredicate, hostile_indices

# One token, nothing, a whole number of blocks, odd lengths; no keys, more queries than keys, a prefix.
Q_LENGTHS = (1, 0, 32, 19, 7, 5, 0)
KV_LENGTHS = (1, 3, 32, 45, 0, 2, 17)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedCase:
    """One call on packed sequences; what is not named is as in `cases.Case`."""

    name: str
    q_lengths: tuple[int, ...] = Q_LENGTHS
    kv_lengths: tuple[int, ...] = KV_LENGTHS
    extra_tokens: int = 0  # after the last sequence, in none
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    value_head_dim: int = 32
    dtype: str = "float32"
    selection_heads: int = 2
    kv_block_size: int = 8
    per_sequence: bool = False  # one batch row of lists per sequence, instead of the rows of all one after another
    q_block_size: int = 1
    num_slots: int = 3
    has_key_bias: bool = False
    options: tuple = ()  # keyword arguments of the op
    predicate_stride: int | None = None


CASES = (
    PackedCase(name="per_token"),
    PackedCase(name="per_token_causal", options=(("is_causal", True),)),
    PackedCase(name="per_token_causal_per_sequence", options=(("is_causal", True),), per_sequence=True, dtype="bfloat16"),
    PackedCase(name="q_block16", options=(("is_causal", True),), q_block_size=16),
    PackedCase(name="q_block16_per_sequence", options=(("is_causal", True),), q_block_size=16, per_sequence=True),
    PackedCase(name="q_block64_bf16", q_block_size=64, dtype="bfloat16", selection_heads=4),
    PackedCase(name="q_block5", q_block_size=5, selection_heads=1, options=(("is_causal", True),)),
    PackedCase(name="group3", num_q_heads=6, selection_heads=6, value_head_dim=16, options=(("is_causal", True),)),
    PackedCase(name="one_sequence", q_lengths=(21,), kv_lengths=(40,), options=(("is_causal", True),)),
    PackedCase(name="all_sequences_empty", q_lengths=(0, 0), kv_lengths=(0, 0), extra_tokens=9),
    PackedCase(name="tokens_of_no_sequence", extra_tokens=11, options=(("is_causal", True),)),
    PackedCase(name="key_bias", has_key_bias=True, options=(("is_causal", True), ("logits_soft_cap", 2.0), ("scale", 0.3))),
    PackedCase(name="window", num_slots=9, options=(("is_causal", True), ("local_window_size", (6, 0)), ("num_sinks", 2))),
    PackedCase(
        name="window_per_head_blocks",
        num_slots=9,
        q_block_size=16,
        options=(("local_window_size", ((0, 3, 9, 50), 4)), ("num_sinks", (0, 1, 5, 2))),
    ),
    PackedCase(name="q_offset", options=(("is_causal", True), ("q_offset", 4))),
    PackedCase(name="q_offset_per_sequence", options=(("is_causal", True), ("q_offset", (0, 2, -5, 20, 3, 1, 0)))),
    PackedCase(name="predicate", num_slots=9, predicate_stride=2),
    PackedCase(
        name="everything_bf16",
        dtype="bfloat16",
        q_block_size=16,
        per_sequence=True,
        num_slots=5,
        has_key_bias=True,
        extra_tokens=3,
        options=(("is_causal", True), ("local_window_size", (20, None)), ("num_sinks", 4), ("logits_soft_cap", 3.0)),
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Packed:
    """Arguments of one call; `operands` have no batch dimension."""

    operands: dict[str, jax.Array]
    selection: sa.BlockSelection
    bounds: dict[str, jax.Array]
    options: dict
    d_out: jax.Array
    d_lse: jax.Array


def make_packed(case: PackedCase) -> Packed:
    rng = np.random.default_rng(len(case.name))
    q_tokens, kv_tokens = (sum(lengths) + case.extra_tokens for lengths in (case.q_lengths, case.kv_lengths))
    shapes = dict(
        query=(q_tokens, case.num_q_heads, case.head_dim),
        key=(kv_tokens, case.num_kv_heads, case.head_dim),
        value=(kv_tokens, case.num_kv_heads, case.value_head_dim),
    )
    operands = {name: jnp.asarray(rng.standard_normal(shape), case.dtype) for name, shape in shapes.items()}
    if case.has_key_bias:
        operands["key_bias"] = jnp.asarray(rng.standard_normal((case.num_kv_heads, kv_tokens)), jnp.float32)
    return Packed(
        operands,
        make_selection(case, q_tokens),
        dict(cu_seqlens_q=cumulative(case.q_lengths), cu_seqlens_kv=cumulative(case.kv_lengths)),
        {name: jnp.asarray(x) if name == "q_offset" and isinstance(x, tuple) else arrays(x) for name, x in case.options},
        jnp.asarray(rng.standard_normal((q_tokens, case.num_q_heads, case.value_head_dim)), case.dtype),
        jnp.asarray(rng.standard_normal((q_tokens, case.num_q_heads)), jnp.float32),
    )


def make_selection(case: PackedCase, q_tokens: int) -> sa.BlockSelection:
    """Lists with ids of the longest sequence, so out of range for the others, and hostile ones."""
    rows = [-(-length // case.q_block_size) for length in case.q_lengths]
    shape = (len(rows), max(rows)) if case.per_sequence else (1, max(sum(rows), -(-q_tokens // case.q_block_size)))
    indices = hostile_indices(
        batch=shape[0],
        heads=case.selection_heads,
        q_len=shape[1],
        kv_len=45,
        num_slots=case.num_slots,
        q_block_size=1,
        kv_block_size=case.kv_block_size,
        seed=len(case.name),
    )
    phase = jnp.arange(case.num_q_heads, dtype=jnp.int32)
    predicate = None if case.predicate_stride is None else DilatedPredicate(phase, stride=case.predicate_stride)
    sizes = dict(q_block_size=case.q_block_size, kv_block_size=case.kv_block_size)
    return sa.BlockSelection(jnp.asarray(indices), **sizes, predicate=predicate)


def cumulative(lengths) -> jax.Array:
    return jnp.asarray(np.cumsum((0, *lengths)), jnp.int32)


def arrays(x):
    """Tuples of ints inside a window, or of sinks, as arrays."""
    if not isinstance(x, tuple):
        return x
    if len(x) == 2:
        return tuple(arrays(side) for side in x)
    return jnp.asarray(x, jnp.int32)


def attend_packed(packed: Packed, **changes) -> compare.Attend:
    """The op with a batch dimension of 1 on operands and results, as the comparison wants them."""

    def attend(**operands):
        operands = {name: x[0] for name, x in operands.items()}
        arguments = dict(selection=packed.selection, **packed.bounds) | changes
        out, lse = sa.block_sparse_attention_varlen(**operands, **arguments, return_residual=True, **packed.options)
        return out[None], lse[None]

    return attend


def with_batch(packed: Packed) -> compare.Inputs:
    operands = {name: x[None] for name, x in packed.operands.items()}
    options = {name: x for name, x in packed.options.items() if name in ("scale", "logits_soft_cap")}
    return compare.Inputs(operands, packed.selection, options, packed.d_out[None], packed.d_lse[None])


def mask_of(case: PackedCase, packed: Packed) -> np.ndarray:
    options = {name: x for name, x in packed.options.items() if name not in ("scale", "logits_soft_cap")}
    if isinstance(options.get("q_offset"), jax.Array):
        options["q_offset"] = np.asarray(options["q_offset"])
    return oracle.varlen_mask(
        np.asarray(packed.selection.indices),
        *(np.asarray(bounds).tolist() for bounds in packed.bounds.values()),
        num_q_heads=case.num_q_heads,
        q_len=packed.operands["query"].shape[0],
        kv_len=packed.operands["key"].shape[0],
        q_block_size=case.q_block_size,
        kv_block_size=case.kv_block_size,
        predicate=packed.selection.predicate,
        **options,
    )


def check_against_oracle(case: PackedCase, implementation: str) -> None:
    packed = make_packed(case)
    inputs = with_batch(packed)
    run = compare.forward_and_backward(attend_packed(packed, implementation=implementation))
    results = run(inputs.operands, inputs.d_out, inputs.d_lse)
    compare.assert_results_match(results, inputs, mask_of(case, packed))
    again = run(inputs.operands, inputs.d_out, inputs.d_lse)
    for name in results:
        np.testing.assert_array_equal(again[name], results[name], err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_varlen_matches_oracle(case: PackedCase):
    check_against_oracle(case, "xla")


@pytest.mark.parametrize("case", [case for case in CASES if case.predicate_stride is None], ids=lambda case: case.name)
def test_cuda_kernels_match_oracle(case: PackedCase, cuda_on_cpu):
    """With the nearest dtype and sizes that the kernels have."""
    dtype = "float16" if case.dtype == "float32" else case.dtype
    check_against_oracle(dataclasses.replace(case, dtype=dtype, head_dim=64, value_head_dim=64, kv_block_size=16), "cuda")


@pytest.mark.parametrize("case", ["per_token_causal", "q_block16"])
def test_check_fails_when_a_sequence_is_one_token_shorter(case):
    case = next(x for x in CASES if x.name == case)
    packed = make_packed(case)
    inputs = with_batch(packed)
    results = compare.results_of(attend_packed(packed), inputs)
    for side in ("cu_seqlens_q", "cu_seqlens_kv"):
        moved = packed.bounds[side].at[3].add(-1)
        wrong = dataclasses.replace(packed, bounds=packed.bounds | {side: moved})
        with pytest.raises((AssertionError, IndexError)):
            compare.assert_results_match(results, inputs, mask_of(case, wrong))


def test_sequences_of_equal_length_equal_a_batch():
    case = PackedCase(
        name="batch", q_lengths=(24,) * 3, kv_lengths=(40,) * 3, per_sequence=True, options=(("is_causal", True),)
    )
    packed = make_packed(case)
    out = sa.block_sparse_attention_varlen(**packed.operands, selection=packed.selection, **packed.bounds, is_causal=True)
    batched = {name: x.reshape(3, -1, *x.shape[1:]) for name, x in packed.operands.items()}
    expected = sa.block_sparse_attention(**batched, selection=packed.selection, is_causal=True)
    np.testing.assert_allclose(out, expected.reshape(out.shape), atol=2e-6)


def test_both_shapes_of_a_selection_say_the_same():
    case = PackedCase(name="both", per_sequence=True, q_block_size=16)
    packed = make_packed(case)
    rows = [-(-length // 16) for length in Q_LENGTHS]
    lists = [packed.selection.indices[n : n + 1, :, :count] for n, count in enumerate(rows)]
    flat = dataclasses.replace(packed.selection, indices=jnp.concatenate(lists, axis=2))
    call = lambda selection: sa.block_sparse_attention_varlen(**packed.operands, selection=selection, **packed.bounds)
    np.testing.assert_allclose(call(flat), call(packed.selection), atol=2e-6)


@pytest.mark.parametrize("q_block_size", [1, 16])
def test_keys_that_no_query_sees_never_reach_a_result(q_block_size):
    case = PackedCase(name="nan", extra_tokens=5, q_block_size=q_block_size, options=(("is_causal", True),))
    packed = make_packed(case)
    inputs = with_batch(packed)
    unseen = ~mask_of(case, packed).any(axis=(0, 1, 2))
    assert unseen[1:4].all() and unseen[-22:].all()  # keys of sequences without queries, and of no sequence
    hide = lambda x: jnp.where(unseen[:, None, None], jnp.nan, x)
    poisoned = {name: hide(x) if name in ("key", "value") else x for name, x in inputs.operands.items()}
    run = compare.forward_and_backward(attend_packed(packed))
    clean, found = (run(operands, inputs.d_out, inputs.d_lse) for operands in (inputs.operands, poisoned))
    for name in clean:
        np.testing.assert_array_equal(found[name], clean[name], err_msg=name)


BAD_BOUNDS = (
    (0, 30, 10, 64),
    (64, 32, 16, 0),
    (-5, -1, 20, 64),
    (0, 1000, 2000, 3000),
    (-(2**31), 2**31 - 1, -(2**31), 2**31 - 1),
    (2**31 - 1, 0, 0, 0),
    (10, 20, 30, 40),
)


@pytest.mark.parametrize("q_block_size,per_sequence", [(1, False), (1, True), (16, False), (16, True)])
def test_lengths_that_make_no_sense_read_nothing_out_of_bounds(q_block_size, per_sequence):
    case = PackedCase(
        name="bad", q_lengths=(20, 24, 20), kv_lengths=(30, 4, 30), q_block_size=q_block_size, per_sequence=per_sequence
    )
    packed = make_packed(case)
    inputs = with_batch(packed)

    @jax.jit
    def call(operands, cu_seqlens_q, cu_seqlens_kv):
        attend = attend_packed(packed, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv)
        (out, lse), pull_back = jax.vjp(lambda operands: attend(**operands), operands)
        return out, lse, *pull_back((inputs.d_out, inputs.d_lse))

    for q_bounds in BAD_BOUNDS:
        for kv_bounds in BAD_BOUNDS:
            out, lse, gradients = call(inputs.operands, jnp.array(q_bounds, jnp.int32), jnp.array(kv_bounds, jnp.int32))
            assert np.isfinite(out).all() and not np.isnan(lse).any() and not np.isposinf(lse).any()
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
            # A mean of values: nothing from outside can have been read.
            assert np.abs(out).max() <= np.abs(packed.operands["value"]).max() * 1.001
