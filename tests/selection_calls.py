"""Calls of block selection that all kernels are tested with."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax.scoring_problem import ScoringProblem
from sparse_attn_jax.testing import selection_oracle as oracle
from sparse_attn_jax.testing.selection_cases import make_problem

# 50 blocks of 16 tokens, in units of 8 with overlaps of 4: short enough for many queries.
SMALL = dict(kv_len=799, block_size=16, kernel_size=8, kernel_stride=4, coarse_kernel_size=32, coarse_kernel_stride=16)


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one selection."""

    query: jax.Array
    compressed: jax.Array
    coarse: jax.Array | None
    positions: jax.Array
    problem: ScoringProblem

    def run(self, select: Callable[..., jax.Array], **options) -> np.ndarray:
        """The lists of an implementation's `select_from_units`."""
        arrays = self.query, self.compressed, self.coarse, self.positions
        return np.asarray(select(*arrays, problem=self.problem, **options))

    def define(self, **changes) -> tuple[np.ndarray, np.ndarray]:
        """Lists and scores by the definition; `changes` replace arguments of the oracle's scores."""
        p = self.problem
        positions = np.broadcast_to(self.positions, self.query.shape[:2])
        scores = oracle.score(
            self.query, self.compressed, positions, kv_len=p.kv_len, block_size=p.block_size,
            kernel=(p.kernel_size, p.kernel_stride), pooling=p.pooling, reduction=p.group_reduction, causal=p.is_causal,
            coarse=self.coarse, coarse_kernel=(p.coarse_kernel_size, p.coarse_kernel_stride), scale=p.scale, **changes,
        )  # fmt: skip
        lists = oracle.select(
            scores, positions, top_k=p.top_k, block_size=p.block_size, num_sink_blocks=p.num_sink_blocks,
            num_local_blocks=p.num_local_blocks, causal=p.is_causal,
        )  # fmt: skip
        return lists, scores


def make_call(
    q_len, num_q_heads=4, num_kv_heads=2, head_dim=64, batch=1, dtype="bfloat16", use_coarse=False, q_offset=None, key=None,
    seed=0, **options,
) -> Call:  # fmt: skip
    """Random arrays, made by NumPy: XLA would compile for each shape."""
    generator = np.random.default_rng(seed)
    query = jnp.asarray(3 * generator.standard_normal((batch, q_len, num_q_heads, head_dim)), dtype)
    problem = make_problem(query, num_kv_heads=num_kv_heads, **options)
    key = generator.standard_normal((batch, problem.kv_len, num_kv_heads, head_dim)) if key is None else key
    units = oracle.compress(key, problem.kernel_size, problem.kernel_stride)
    coarse = oracle.compress(key, problem.coarse_kernel_size, problem.coarse_kernel_stride)
    offset = problem.kv_len - q_len if q_offset is None else q_offset
    positions = np.reshape(offset, (-1, 1)) + np.arange(q_len)
    return Call(
        query,
        jnp.asarray(units, dtype),
        jnp.asarray(coarse, dtype) if use_coarse else None,
        jnp.asarray(positions, jnp.int32),
        problem,
    )


def call_with_positions_of_any_order() -> Call:
    call = make_call(60, 4, 2, batch=2, use_coarse=True, **SMALL)
    positions = np.random.default_rng(0).integers(-40, 900, (2, 60))
    positions[0, :4] = 2**31 - 1, -(2**31), 798, 799
    return dataclasses.replace(call, positions=jnp.asarray(positions, jnp.int32))


def call_of_many_segments(key_of: str) -> Call:
    """Long lists of candidates, in the order that makes the most and the least of them interim winners."""
    key = None
    if key_of != "random":
        key = np.zeros((1, 2000, 1, 64))
        key[..., 0] = np.linspace(-1, 1, 2000)[:, None] * (1 if key_of == "ascending" else -1)
    call = make_call(20, 2, 1, key=key, kv_len=2000, block_size=8, kernel_size=8, kernel_stride=4, top_k=40)
    # Of one sign: else the heads would not agree about the order.
    return dataclasses.replace(call, query=call.query.at[..., 0].set(abs(call.query[..., 0])))


def call_with_ties(scale: float) -> Call:
    # Small integers: equal logits are equal to the bit, and there are many.
    generator = np.random.default_rng(0)
    query, key = np.zeros((1, 600, 1, 64)), np.zeros((1, 600, 1, 64))
    query[..., :2] = generator.integers(-1, 2, (1, 600, 1, 2))
    key[..., :2] = np.repeat(generator.integers(-1, 2, (1, 38, 1, 2)), 16, axis=1)[:, :600]
    call = make_call(600, 1, 1, key=key, kv_len=600, scale=scale, top_k=6)
    return dataclasses.replace(call, query=jnp.asarray(query, jnp.bfloat16))


def call_with_a_unit_shared_by_two_blocks() -> Call:
    # Unit 7 spans tokens 112-143, half in block 1 and half in block 2; it alone points along the query.
    key = np.zeros((1, 512, 1, 64))
    key[:, 112:144] = 1
    call = make_call(1, 1, 1, key=key, kv_len=512, top_k=3, num_local_blocks=1)
    return dataclasses.replace(call, query=jnp.ones_like(call.query))


def calls_with_hidden_units(group_size: int, use_coarse: bool, value: float) -> tuple[Call, Call]:
    """A call, and the same one with `value` in units that the queries before the 27th do not see."""
    call = make_call(50, group_size, 1, use_coarse=use_coarse, q_offset=400, top_k=9, **SMALL)
    first = 105  # of the bad units: the last token of unit 105 is 427
    changes = dict(compressed=call.compressed.at[:, first:].set(value))
    if use_coarse:
        changes["coarse"] = call.coarse.at[:, 25:].set(value)  # the last token of coarse unit 25 is 431
    return call, dataclasses.replace(call, **changes)


def call_with_a_nan_in_a_unit(use_coarse: bool, pooling: str, reduction: str | None) -> Call:
    call = make_call(60, 6, 2, use_coarse=use_coarse, pooling=pooling, group_reduction=reduction, top_k=20, **SMALL)
    return dataclasses.replace(call, compressed=call.compressed.at[:, 40, 0, 3].set(jnp.nan))


def assert_nan_scores_are_chosen_only_if_forced(found, lists, scores, use_coarse: bool) -> None:
    """With a denominator over the coarse units, the blocks of one unit have a NaN; else all of a query that sees it."""
    if use_coarse:
        # The rows without a NaN are compared as they are, and what differs by rounding may.
        oracle.assert_same_up_to_rounding(found, lists, scores)
    else:
        heads = found.shape[1] // 2
        np.testing.assert_array_equal(found[:, :heads], lists[:, :heads])
        oracle.assert_same_up_to_rounding(found[:, heads:], lists[:, heads:], scores[:, heads:])


def calls_with_a_nan_in_the_first_query() -> tuple[Call, Call]:
    """Without it, and with it. Groups of three heads leave rows of each token empty."""
    call = make_call(40, 6, 2, **SMALL)
    return call, dataclasses.replace(call, query=call.query.at[0, 0].set(jnp.nan))


def call_with_infinite_logits(where: str) -> Call:
    call = make_call(40, 4, 2, use_coarse=True, top_k=8, **SMALL)
    if where == "query":
        return dataclasses.replace(call, query=call.query.at[:, 7, 1, 0].set(jnp.inf))
    return dataclasses.replace(call, compressed=call.compressed.at[:, 30, 1, 0].set(jnp.inf))
