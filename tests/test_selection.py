"""compress_keys, score_blocks, select_blocks, and the fused path against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn_jax.block_top_k import nth_set_bit, pack_bits
from sparse_attn_jax.implementations.xla.scoring import select_from_units
from sparse_attn_jax.scoring import compress_keys, score_blocks, select_blocks
from sparse_attn_jax.scoring_problem import absolute_positions
from sparse_attn_jax.testing import selection_oracle as oracle
from sparse_attn_jax.testing.selection_cases import CASES, make_problem


def make_inputs(q_len, kv_len, num_q_heads=4, num_kv_heads=2, head_dim=16, batch=1, seed=0, dtype=jnp.float32):
    query_seed, key_seed = jax.random.split(jax.random.key(seed))
    query = 3 * jax.random.normal(query_seed, (batch, q_len, num_q_heads, head_dim))
    return query.astype(dtype), jax.random.normal(key_seed, (batch, kv_len, num_kv_heads, head_dim)).astype(dtype)


def numpy_positions(q_offset, batch, q_len, kv_len):
    offset = np.broadcast_to(kv_len - q_len if q_offset is None else np.asarray(q_offset), (batch,))
    return offset[:, None] + np.arange(q_len)


# (kernel, stride, block, kv_len): sizes that divide, sizes that do not, a stride beyond the kernel, too short for a unit.
GEOMETRIES = [
    (32, 16, 64, 256),
    (32, 16, 64, 271),  # 271 mod 16 = 15: one token short of another unit
    (32, 16, 64, 31),
    (32, 16, 64, 32),
    (32, 16, 40, 190),
    (12, 5, 16, 101),
    (8, 8, 8, 64),
    (7, 12, 10, 90),
    (4, 20, 8, 85),  # blocks without any unit
    (16, 16, 100, 90),
]


@pytest.mark.parametrize("kernel, stride", [(32, 16), (12, 5), (5, 5), (4, 10), (1, 1), (48, 32)])
@pytest.mark.parametrize("kv_len", [0, 3, 31, 32, 79, 80, 160])
def test_compress_keys_matches_oracle(kernel, stride, kv_len):
    _, key = make_inputs(1, kv_len)
    units = compress_keys(key, kernel, stride)
    wanted = oracle.compress(key, kernel, stride)
    assert units.shape == wanted.shape
    np.testing.assert_allclose(units, wanted, atol=1e-6)


def test_compress_keys_accumulates_in_float32():
    # 256 + 31 ones: a bfloat16 sum would stay at 256.
    key = jnp.ones((1, 32, 1, 1), jnp.bfloat16).at[0, 0].set(256.0)
    unit = compress_keys(key)
    assert unit.dtype == jnp.bfloat16
    assert unit[0, 0, 0, 0] == jnp.bfloat16(287 / 32)


def test_compress_keys_is_differentiable():
    _, key = make_inputs(1, 80)
    grad = jax.grad(lambda key: compress_keys(key).sum())(key)
    counts = np.array([sum(16 * unit <= token < 16 * unit + 32 for unit in range(4)) for token in range(80)])
    np.testing.assert_allclose(grad[0, :, 0, 0], counts / 32, atol=1e-6)


@pytest.mark.parametrize("use_coarse", [False, True], ids=["exact", "coarse"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("pooling, reduction", [("max", "sum"), ("overlap_sum", None)])
@pytest.mark.parametrize("kernel, stride, block, kv_len", GEOMETRIES)
def test_scores_match_oracle(kernel, stride, block, kv_len, pooling, reduction, is_causal, use_coarse):
    query, key = make_inputs(23, kv_len)
    coarse_sizes = (3 * kernel, 2 * stride)
    units = compress_keys(key, kernel, stride)
    coarse = compress_keys(key, *coarse_sizes) if use_coarse else None
    # From query 0 at position 9, so that some queries see no coarse unit.
    q_offset = 9 if use_coarse else None
    scores = score_blocks(
        query, units, kv_len=kv_len, block_size=block, kernel_size=kernel, kernel_stride=stride, pooling=pooling,
        group_reduction=reduction, is_causal=is_causal, q_offset=q_offset, coarse_key=coarse,
        coarse_kernel_size=coarse_sizes[0], coarse_kernel_stride=coarse_sizes[1],
    )  # fmt: skip
    wanted = oracle.score(
        query, units, numpy_positions(q_offset, 1, 23, kv_len), kv_len=kv_len, block_size=block, kernel=(kernel, stride),
        pooling=pooling, reduction=reduction, causal=is_causal, coarse=coarse, coarse_kernel=coarse_sizes,
    )  # fmt: skip
    assert scores.dtype == jnp.float32
    np.testing.assert_array_equal(np.isneginf(scores), np.isneginf(wanted))
    np.testing.assert_allclose(scores, wanted, rtol=2e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean", "max", None])
@pytest.mark.parametrize("pooling", ["max", "overlap_sum"])
def test_scores_match_oracle_for_every_reduction(pooling, reduction):
    query, key = make_inputs(30, 130, 6)
    units = compress_keys(key)
    scores = score_blocks(query, units, kv_len=130, pooling=pooling, group_reduction=reduction, is_causal=True)
    positions = numpy_positions(None, 1, 30, 130)
    wanted = oracle.score(query, units, positions, kv_len=130, block_size=64, pooling=pooling, reduction=reduction)
    np.testing.assert_allclose(scores, wanted, rtol=2e-5)


@pytest.mark.parametrize("num_q_heads", [2, 6, 8], ids=["group1", "group3", "group4"])
@pytest.mark.parametrize("q_offset", [0, 17, 250, -5, (3, 133)], ids=str)
def test_scores_match_oracle_at_any_offset(num_q_heads, q_offset):
    query, key = make_inputs(20, 271, num_q_heads, batch=2)
    units = compress_keys(key)
    offset = jnp.asarray(q_offset) if isinstance(q_offset, tuple) else q_offset
    scores = score_blocks(query, units, kv_len=271, is_causal=True, q_offset=offset, scale=0.4)
    positions = numpy_positions(q_offset, 2, 20, 271)
    wanted = oracle.score(query, units, positions, kv_len=271, block_size=64, scale=0.4)
    np.testing.assert_allclose(scores, wanted, rtol=2e-5)


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("path", ["definition", "fused"])
def test_oracle_notices_causality_off_by_one(shift, path):
    query, key = make_inputs(271, 271)
    units = compress_keys(key)
    positions = numpy_positions(None, 1, 271, 271)
    # Blocks of one stride, so that the newest unit decides about blocks that are not forced.
    score = functools.partial(oracle.score, query, units, positions, kv_len=271, block_size=16)
    pick = functools.partial(
        oracle.select, positions=positions, top_k=3, block_size=16, num_sink_blocks=0, num_local_blocks=1, causal=True
    )
    right, wrong = score(), score(visibility_shift=shift)
    if path == "definition":
        scores = score_blocks(query, units, kv_len=271, block_size=16, is_causal=True)
        np.testing.assert_allclose(scores, right, rtol=2e-5)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(scores, wrong, rtol=2e-5)
        return
    problem = make_problem(query, 271, block_size=16, top_k=3, num_sink_blocks=0, num_local_blocks=1)
    found = np.asarray(select_from_units(query, units, None, absolute_positions(None, 271, 271), problem=problem))
    oracle.assert_same_up_to_rounding(found, pick(right), right)
    with pytest.raises(AssertionError):
        oracle.assert_same_up_to_rounding(found, pick(wrong), right)


def test_score_blocks_overlap_weights_are_those_of_nsa():
    # With scale 0 each of the 13 units has probability 1/13 per head.
    query, key = make_inputs(1, 224, 2, 2)
    scores = score_blocks(query, compress_keys(key), kv_len=224, pooling="overlap_sum", scale=0.0)
    np.testing.assert_allclose(scores[0, 0, 0] * 13, [7, 8, 8, 3], rtol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_score_blocks_gradients_are_finite(is_causal):
    query, key = make_inputs(100, 100)

    def total(query, key):
        scores = score_blocks(query, compress_keys(key), kv_len=100, is_causal=is_causal, pooling="overlap_sum")
        return jnp.where(scores > -jnp.inf, scores, 0.0).sum()

    for grad in jax.grad(total, (0, 1))(query, key):
        assert np.isfinite(grad).all()


# Selection.


def random_scores(kind, shape, seed=0):
    generator = np.random.default_rng(seed)
    scores = generator.integers(-2, 3, shape).astype(np.float32) if kind == "ties" else generator.normal(size=shape)
    if kind == "special":
        special = generator.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, 1e-40], shape)
        scores = np.where(generator.random(shape) < 0.6, special, scores)
    return scores.astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "ties", "special"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("top_k, sinks, local", [(1, 0, 1), (4, 1, 1), (4, 1, 3), (7, 2, 2), (50, 1, 2), (6, 0, 1)])
def test_select_blocks_matches_oracle(kind, is_causal, top_k, sinks, local):
    block, kv_len, q_len = 4, 149, 60  # 38 blocks: more than one word of the bit set
    scores = random_scores(kind, (2, 2, q_len, 38))
    for q_offset in (None, 0, -3, 131, np.array([5, 89])):
        offset = jnp.asarray(q_offset) if isinstance(q_offset, np.ndarray) else q_offset
        selection = select_blocks(
            jnp.asarray(scores), top_k, kv_len=kv_len, block_size=block, num_sink_blocks=sinks, num_local_blocks=local,
            is_causal=is_causal, q_offset=offset,
        )  # fmt: skip
        wanted = oracle.select(
            scores, numpy_positions(q_offset, 2, q_len, kv_len), top_k=top_k, block_size=block, num_sink_blocks=sinks,
            num_local_blocks=local, causal=is_causal,
        )  # fmt: skip
        assert selection.indices.dtype == jnp.int32 and selection.q_block_size == 1 and selection.kv_block_size == block
        np.testing.assert_array_equal(selection.indices, wanted)


def test_select_blocks_lower_id_wins_ties():
    selection = select_blocks(jnp.zeros((1, 1, 1, 10)), 4, kv_len=640, is_causal=True)
    np.testing.assert_array_equal(selection.indices[0, 0, 0], [0, 1, 2, 9])


def test_a_unit_shared_by_two_blocks_ties_to_the_lower():
    # Unit 7 spans tokens 112-143, half in block 1 and half in block 2; it alone points along the query.
    key = jnp.zeros((1, 512, 1, 4)).at[:, 112:144].set(1.0)
    query = jnp.ones((1, 1, 1, 4))
    scores = score_blocks(query, compress_keys(key), kv_len=512, is_causal=True)
    assert scores[0, 0, 0, 1] == scores[0, 0, 0, 2] == scores.max()
    selection = select_blocks(scores, 3, kv_len=512, is_causal=True)
    np.testing.assert_array_equal(selection.indices[0, 0, 0], [0, 1, 7])


@pytest.mark.parametrize("score", [np.inf, 3e38, -3e38])
def test_forced_blocks_hold_against_any_score(score):
    scores = jnp.full((1, 1, 1, 16), score, jnp.float32)
    selection = select_blocks(scores, 3, kv_len=1024, num_sink_blocks=1, num_local_blocks=2, is_causal=True)
    np.testing.assert_array_equal(selection.indices[0, 0, 0], [0, 14, 15])


def test_nan_scores_are_never_chosen():
    scores = jnp.full((1, 1, 1, 8), jnp.nan).at[..., 5].set(-7.0)
    selection = select_blocks(scores, 4, kv_len=512, is_causal=True)
    np.testing.assert_array_equal(selection.indices[0, 0, 0], [0, 5, 7, -1])


def test_select_blocks_carries_no_gradient():
    def loss(scores):
        indices = select_blocks(scores, 3, kv_len=512, is_causal=True).indices
        return (scores * (indices.sum(-1, keepdims=True))).sum()

    scores = jax.random.normal(jax.random.key(0), (1, 1, 4, 8))
    indices = select_blocks(scores, 3, kv_len=512, is_causal=True).indices
    np.testing.assert_array_equal(jax.grad(loss)(scores)[..., 0], indices.sum(-1))


def test_select_blocks_works_under_jit_vmap_and_traced_offset():
    scores = jnp.asarray(random_scores("ties", (3, 2, 5, 8)))
    offsets = jnp.array([7, 300, 507])

    def select(scores, offset):
        return select_blocks(scores, 3, kv_len=512, is_causal=True, q_offset=offset).indices

    together = select(scores, offsets)
    one_by_one = jax.jit(jax.vmap(lambda scores, offset: select(scores[None], offset)[0]))(scores, offsets)
    np.testing.assert_array_equal(together, one_by_one)


@pytest.mark.parametrize("num_bits", [1, 31, 32, 33, 100])
def test_nth_set_bit_matches_nonzero(num_bits):
    mask = np.random.default_rng(0).random((num_bits, 7)) < 0.4
    mask[:, 0], mask[:, 1] = True, False
    found = nth_set_bit(pack_bits(jnp.asarray(mask)), jnp.arange(-1, num_bits + 1)[:, None])
    for column in range(7):
        wanted = np.full(num_bits + 2, -1)
        wanted[1 : 1 + mask[:, column].sum()] = np.flatnonzero(mask[:, column])
        np.testing.assert_array_equal(found[:, column], wanted)


# The fused path.


def select_unfused(query, units, coarse, q_offset, problem):
    scores = score_blocks(
        query, units, kv_len=problem.kv_len, block_size=problem.block_size, kernel_size=problem.kernel_size,
        kernel_stride=problem.kernel_stride, pooling=problem.pooling, group_reduction=problem.group_reduction,
        is_causal=problem.is_causal, q_offset=q_offset, coarse_key=coarse, coarse_kernel_size=problem.coarse_kernel_size,
        coarse_kernel_stride=problem.coarse_kernel_stride, scale=problem.scale,
    )  # fmt: skip
    selection = select_blocks(
        scores, problem.top_k, kv_len=problem.kv_len, block_size=problem.block_size,
        num_sink_blocks=problem.num_sink_blocks, num_local_blocks=problem.num_local_blocks, is_causal=problem.is_causal,
        q_offset=q_offset,
    )  # fmt: skip
    return np.asarray(selection.indices), np.asarray(scores)


@pytest.mark.parametrize("use_coarse", [False, True], ids=["exact", "coarse"])
@pytest.mark.parametrize("case", CASES)
def test_fused_equals_definition(case, use_coarse):
    options = dict(CASES[case])
    kv_len = options["kv_len"]
    q_len = kv_len if options.get("is_causal", True) else 100
    query, key = make_inputs(q_len, kv_len, 6, 2, batch=2)
    problem = make_problem(query, **options)
    units = compress_keys(key, problem.kernel_size, problem.kernel_stride)
    coarse = compress_keys(key, 128, 64) if use_coarse else None
    positions = absolute_positions(None, q_len, kv_len)
    found = select_from_units(query, units, coarse, positions, problem=problem, queries_per_chunk=64, num_buckets=3)
    wanted, scores = select_unfused(query, units, coarse, None, problem)
    assert found.shape == wanted.shape
    oracle.assert_same_up_to_rounding(np.asarray(found), wanted, scores)


def test_fused_largest_position_sees_all_keys():
    query, key = make_inputs(3, 799)
    problem, units = make_problem(query, 799), compress_keys(key)
    largest, last = (jnp.full((1, 3), position, jnp.int32) for position in (2**31 - 1, 799 + 64 * problem.num_local_blocks))
    select = lambda positions: select_from_units(query, units, None, positions, problem=problem, num_buckets=3)
    np.testing.assert_array_equal(select(largest), select(last))


@pytest.mark.parametrize("pooling", ["max", "overlap_sum"])
def test_fused_nan_stays_in_the_blocks_of_its_unit(pooling):
    query, key = make_inputs(10, 300)
    options = dict(pooling=pooling, is_causal=False, num_sink_blocks=0, num_local_blocks=0)
    problem, units, coarse = (
        make_problem(query, 300, **options),
        compress_keys(key).at[:, 0].set(jnp.nan),
        compress_keys(key, 128, 64),
    )
    found = select_from_units(query, units, coarse, absolute_positions(None, 10, 300), problem=problem)
    wanted, scores = select_unfused(query, units, coarse, None, problem)
    assert np.isnan(scores).any(axis=-1).all() and not np.isnan(scores[..., 1:]).any()
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("chunk", [1, 17, 100, 150])
def test_fused_chunk_length_changes_nothing(chunk):
    query, key = make_inputs(100, 300)
    problem, units, positions = make_problem(query, 300), compress_keys(key), absolute_positions(None, 100, 300)
    found = select_from_units(query, units, None, positions, problem=problem, queries_per_chunk=chunk)
    wanted, scores = select_unfused(query, units, None, None, problem)
    oracle.assert_same_up_to_rounding(np.asarray(found), wanted, scores)


@pytest.mark.parametrize("q_len, kv_len", [(0, 100), (5, 0), (0, 0)])
def test_fused_accepts_empty_lengths(q_len, kv_len):
    query, key = make_inputs(q_len, kv_len)
    problem, positions = make_problem(query, kv_len), absolute_positions(None, q_len, kv_len)
    found = select_from_units(query, compress_keys(key), None, positions, problem=problem)
    assert found.shape == (1, 2, q_len, 5) and (found == -1).all()


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_fused_breaks_exact_ties_as_the_definition(scale):
    # Small integers: equal logits are equal to the bit in both paths, and there are many.
    generator = np.random.default_rng(0)
    query = jnp.asarray(generator.integers(-1, 2, (1, 600, 1, 2)), jnp.float32)
    key = jnp.asarray(np.repeat(generator.integers(-1, 2, (1, 38, 1, 2)), 16, axis=1)[:, :600], jnp.float32)
    problem = make_problem(query, 600, scale=scale, top_k=6)
    units = compress_keys(key)
    found = select_from_units(query, units, None, absolute_positions(None, 600, 600), problem=problem, queries_per_chunk=64)
    wanted, scores = select_unfused(query, units, None, None, problem)
    sorted_scores = np.sort(scores, axis=-1)
    assert (sorted_scores[..., 1:] == sorted_scores[..., :-1]).mean() > 0.3
    np.testing.assert_array_equal(found, wanted)


def test_fused_accepts_any_traced_offset():
    query, key = make_inputs(70, 799, batch=2)
    problem = make_problem(query, 799)
    units, coarse = compress_keys(key), compress_keys(key, 128, 64)

    @jax.jit
    def select(offset):
        positions = absolute_positions(offset, 70, 799)
        return select_from_units(query, units, coarse, positions, problem=problem, queries_per_chunk=32, num_buckets=4)

    for q_offset in (0, 300, 700, -40, 5000, (0, 650), (900, 2)):
        offset = jnp.asarray(q_offset)
        wanted, scores = select_unfused(query, units, coarse, offset, problem)
        oracle.assert_same_up_to_rounding(np.asarray(select(offset)), wanted, scores)


def test_fused_memory_is_linear_in_the_length():
    # float32: JAX 0.10 runs bfloat16 on a CPU on a float32 copy of the queries, which would be most of what is measured.
    def temporary_bytes(length):
        query = jax.ShapeDtypeStruct((1, length, 32, 64), jnp.float32)
        units = jax.ShapeDtypeStruct((1, length // 16 - 1, 2, 64), jnp.float32)
        positions = jax.ShapeDtypeStruct((1, length), jnp.int32)
        lowered = select_from_units.lower(query, units, None, positions, problem=make_problem(query, length, top_k=64))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(16384), temporary_bytes(65536)
    assert long < 4.4 * short
    # The scores of all heads, queries and units would be 32 x 65,536 x 4,095 float32.
    assert long < 32 * 65536 * 4095 * 4 / 100


# Bad input.

KEY = jnp.zeros((2, 256, 2, 8))
QUERY = jnp.zeros((2, 4, 4, 8))
UNITS = compress_keys(KEY)
COARSE = compress_keys(KEY, 128, 64)
SCORES = jnp.zeros((2, 2, 4, 4))
score = functools.partial(score_blocks, kv_len=256)
select = functools.partial(select_blocks, kv_len=256)

BAD_CALLS = {
    "key-rank": ("`key`", lambda: compress_keys(KEY[0])),
    "key-dtype": ("`key`", lambda: compress_keys(KEY.astype(int))),
    "compress-kernel-0": ("`kernel_size`", lambda: compress_keys(KEY, 0)),
    "compress-kernel-float": ("`kernel_size`", lambda: compress_keys(KEY, 32.0)),
    "compress-stride-0": ("`kernel_stride`", lambda: compress_keys(KEY, 32, 0)),
    "query-rank": ("`query`", lambda: score(QUERY[0], UNITS)),
    "query-dtype": ("`query`", lambda: score(QUERY.astype(int), UNITS)),
    "query-batch": ("`query` has batch", lambda: score(QUERY[:1], UNITS)),
    "query-head-dim": ("`query` has head_dim", lambda: score(QUERY[..., :4], UNITS)),
    "query-heads": ("`query` has 3 heads", lambda: score(QUERY[:, :, :3], UNITS)),
    "no-heads": ("`query` has 0 heads", lambda: score(QUERY[:, :, :0], UNITS)),
    "units-rank": ("`compressed_key`", lambda: score(QUERY, UNITS[0])),
    "units-dtype": ("`compressed_key`", lambda: score(QUERY, UNITS.astype(int))),
    "units-count": ("`compressed_key` has 14 units", lambda: score(QUERY, UNITS[:, 1:])),
    "units-of-other-stride": ("`compressed_key` has 15 units", lambda: score(QUERY, UNITS, kernel_stride=8)),
    "kv-len-negative": ("`kv_len`", lambda: score_blocks(QUERY, UNITS, kv_len=-1)),
    "kv-len-too-large": ("`kv_len`", lambda: score_blocks(QUERY, UNITS, kv_len=2**31)),
    "score-block-0": ("`block_size`", lambda: score(QUERY, UNITS, block_size=0)),
    "score-kernel": ("`kernel_size`", lambda: score(QUERY, UNITS, kernel_size=True)),
    "score-stride": ("`kernel_stride`", lambda: score(QUERY, UNITS, kernel_stride=-16)),
    "coarse-kernel": ("`coarse_kernel_size`", lambda: score(QUERY, UNITS, coarse_kernel_size=0)),
    "coarse-stride": ("`coarse_kernel_stride`", lambda: score(QUERY, UNITS, coarse_kernel_stride=0)),
    "coarse-rank": ("`coarse_key`", lambda: score(QUERY, UNITS, coarse_key=COARSE[0])),
    "coarse-count": ("`coarse_key` has 2 units", lambda: score(QUERY, UNITS, coarse_key=COARSE[:, 1:])),
    "coarse-dtype": (
        "`coarse_key` is bfloat16; it must be float32",
        lambda: score(QUERY, UNITS, coarse_key=COARSE.astype("bfloat16")),
    ),
    "coarse-heads": ("`coarse_key`", lambda: score(QUERY, UNITS, coarse_key=COARSE[:, :, :1])),
    "pooling": ("`pooling`", lambda: score(QUERY, UNITS, pooling="mean")),
    "group-reduction": ("`group_reduction`", lambda: score(QUERY, UNITS, group_reduction="none")),
    "score-causal": ("`is_causal`", lambda: score(QUERY, UNITS, is_causal=1)),
    "scale": ("`scale`", lambda: score(QUERY, UNITS, scale="1")),
    "score-offset-float": ("`q_offset`", lambda: score(QUERY, UNITS, q_offset=1.0)),
    "score-offset-dtype": ("`q_offset`", lambda: score(QUERY, UNITS, q_offset=jnp.zeros(2))),
    "score-offset-shape": ("`q_offset`", lambda: score(QUERY, UNITS, q_offset=jnp.zeros(3, int))),
    "score-offset-too-large": ("`q_offset`", lambda: score(QUERY, UNITS, q_offset=2**30)),
    "implementation": ("`implementation`", lambda: score(QUERY, UNITS, implementation="triton")),
    "scores-rank": ("`scores`", lambda: select(SCORES[0], 3)),
    "scores-dtype": ("`scores`", lambda: select(SCORES.astype(int), 3)),
    "scores-blocks": ("`scores` has 4 blocks", lambda: select(SCORES, 3, block_size=32)),
    "top-k-0": ("`top_k`", lambda: select(SCORES, 0)),
    "top-k-float": ("`top_k`", lambda: select(SCORES, 3.0)),
    "forced-beyond-top-k": ("`top_k` is 3", lambda: select(SCORES, 3, num_sink_blocks=2, num_local_blocks=2)),
    "sinks-negative": ("`num_sink_blocks`", lambda: select(SCORES, 3, num_sink_blocks=-1)),
    "local-negative": ("`num_local_blocks`", lambda: select(SCORES, 3, num_local_blocks=-1)),
    "own-block-missing": ("`num_local_blocks`", lambda: select(SCORES, 3, num_local_blocks=0, is_causal=True)),
    "select-kv-len": ("`kv_len`", lambda: select_blocks(SCORES, 3, kv_len=256.0)),
    "select-block": ("`block_size`", lambda: select(SCORES, 3, block_size=-64)),
    "select-causal": ("`is_causal`", lambda: select(SCORES, 3, is_causal="yes")),
    "select-offset": ("`q_offset`", lambda: select(SCORES, 3, q_offset=jnp.zeros((2, 4), int))),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_refused_by_name(name):
    message, call = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("implementation", ["mosaic", ["cuda", "mosaic"]])
def test_missing_implementation_is_not_implemented(implementation):
    with pytest.raises(NotImplementedError, match="implementation"):
        score(QUERY, UNITS, implementation=implementation)


def test_implementation_may_be_named():
    np.testing.assert_array_equal(score(QUERY, UNITS, implementation=["cuda", "xla"]), score(QUERY, UNITS))
