"""The methods that `benchmarks.recall` compares, each with budgets from small to large, for sequences of 2,048 tokens."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import sparse_attn_jax as sa
from benchmarks.recall_inputs import GRID, Pattern
from benchmarks.recall_measure import Attend, Counted
from sparse_attn_jax import selectors
from sparse_attn_jax.selectors import InfLLMV2

Select = Callable[..., sa.BlockSelection]


@dataclasses.dataclass(frozen=True)
class Method:
    """A selector by the name it has in docs/methods.md.

    Attributes:
      budgets: selectors by what they are called in tables, from few keys to many.
      arguments: what a selector is called with for a pattern, beside query and key.
      arrays: what it is called with in place of query and key.
      takes_lines: whether it is for causal sequences of tokens.
      takes_grids: whether it is for pictures.
      counted: what of a pattern is measured.
    """

    name: str
    budgets: Mapping[str, Select]
    arguments: Callable[[Pattern], dict[str, Any]] = lambda pattern: {}
    arrays: Callable[[Pattern], tuple[jax.Array, ...]] = lambda pattern: (pattern.query, pattern.key)
    takes_lines: bool = True
    takes_grids: bool = False
    counted: Callable[[Pattern], Counted] = lambda pattern: Counted()

    def takes(self, pattern: Pattern) -> bool:
        return self.takes_grids if pattern.shape else self.takes_lines

    def prepare(self, pattern: Pattern, budget: str) -> tuple[Attend, tuple[int, int]]:
        """Attention with one selection for the pattern, and the selection's block sizes."""
        selector = self.budgets[budget]
        if hasattr(selector, "permutation"):
            return _prepare_permuted(pattern, selector)
        selection = selector(*self.arrays(pattern), is_causal=pattern.is_causal, **self.arguments(pattern))
        attend = functools.partial(_attend, selection, pattern.key, is_causal=pattern.is_causal)
        return attend, (min(selection.q_block_size, pattern.query.shape[1]), selection.kv_block_size)


@functools.partial(jax.jit, static_argnames="is_causal")
def _attend(selection, key, query, value, *, is_causal: bool):
    options = dict(is_causal=is_causal, return_residual=True, implementation="xla")
    return sa.block_sparse_attention(query, key, value, selection, **options)


def _prepare_permuted(pattern: Pattern, selector: Any) -> tuple[Attend, tuple[int, int]]:
    """The same for a selector that wants its tokens in another order, which depends on positions alone."""
    permutation = selector.permutation(pattern.query, pattern.key)
    permuted = permutation.apply(pattern.query), permutation.apply(pattern.key)
    selection = selector(*permuted, is_causal=pattern.is_causal, permutation=permutation)

    attend = functools.partial(_attend_permuted, permutation, selection, pattern.key)
    return attend, (selection.q_block_size, selection.kv_block_size)


@jax.jit
def _attend_permuted(permutation, selection, key, query, value):
    arrays = (permutation.apply(x) for x in (query, key, value))
    result = sa.block_sparse_attention(*arrays, selection, return_residual=True, implementation="xla")
    return jax.tree.map(permutation.undo, result)


def _key_norms(pattern: Pattern) -> dict[str, jax.Array]:
    return dict(importance=jnp.linalg.norm(pattern.key, axis=-1).swapaxes(1, 2))


def _index_arrays(pattern: Pattern) -> tuple[jax.Array, ...]:
    """Queries of all heads, the mean of the keys' heads, and equal weights."""
    num_heads, head_dim = pattern.query.shape[2:]
    weights = jnp.full(pattern.query.shape[:3], 1 / num_heads)
    return pattern.query * head_dim**-0.5, pattern.key.mean(axis=2), weights


def _budgets(what: str, make: Callable[[Any], Select], *values: Any) -> dict[str, Select]:
    """Selectors by "value what"."""
    return {f"{value} {what}": make(value) for value in values}


def untrained_gate(pattern: Pattern) -> selectors.SeerGateParameters:
    """Queries as they are, and of keys the mean."""
    num_kv_heads, head_dim = pattern.key.shape[2:]
    mean = jnp.concatenate([jnp.zeros((2 * head_dim, head_dim)), jnp.eye(head_dim)])
    return selectors.SeerGateParameters(query=None, key=jnp.broadcast_to(mean, (num_kv_heads, *mean.shape)))


def _head_mix(num_local: int) -> Select:
    return selectors.HeadMix(head_mask_type=(0, -1, -1, -1), num_sinks=1, num_local=num_local, block_size=64)


def _moa(beta: float) -> Select:
    """Spans that double from head to head."""
    return selectors.MoASpans(alpha=(0.0,) * 4, beta=(beta / 4, beta / 2, beta, 2 * beta), max_new_tokens=0)


def _infllm(top_k: int) -> InfLLMV2:
    return InfLLMV2(top_k=top_k, num_local_blocks=2)


def _vertical_slash(num: int) -> Select:
    return selectors.VerticalSlash(num_vertical=num, num_slash=num, num_forced_columns=16, num_forced_diagonals=32)


# Policies of KV caches choose once the first half of a sequence is there, and the queries of the second half are measured.


def _prompt_len(key: jax.Array) -> int:
    return -(-key.shape[1] // 2)


def _second_half(pattern: Pattern) -> Counted:
    return Counted(first_query=_prompt_len(pattern.key))


def _keep_of_prompt(keep: Callable[[jax.Array, jax.Array], jax.Array]) -> Select:
    """A selection for ids [batch, num_kv_heads or 1, num_kept] of a prompt: what follows it sees them, and all that follows."""

    def select(query: jax.Array, key: jax.Array, *, is_causal: bool) -> sa.BlockSelection:
        del is_causal  # they are for decoding
        prompt_len, length = _prompt_len(key), key.shape[1]
        ids = keep(query[:, :prompt_len], key[:, :prompt_len])
        after = jnp.broadcast_to(jnp.arange(prompt_len, length, dtype=jnp.int32), (*ids.shape[:2], length - prompt_len))
        after = jnp.concatenate([ids, after], axis=-1)
        prompt = jnp.broadcast_to(jnp.arange(after.shape[-1], dtype=jnp.int32), after.shape)
        prompt = jnp.where(prompt < length, prompt, -1)
        return sa.BlockSelection(jnp.stack([prompt, after], axis=2), q_block_size=prompt_len, kv_block_size=1)

    return select


def _snapkv(num_kept: int) -> Select:
    return _keep_of_prompt(lambda query, key: sa.snapkv_keep(query, key, capacity=num_kept))


def _zipvl(threshold: float) -> Select:
    """The probe is the prompt's last queries."""
    return _keep_of_prompt(lambda query, key: sa.zipvl_keep(query[:, -64:], key, threshold=threshold)[0][:, None])


def _delta(num_pages: int) -> Select:
    """Every query reads what the same query of the first layer would."""

    @jax.jit
    def pages(query: jax.Array, key: jax.Array) -> jax.Array:
        def of_step(i):
            one = jax.lax.dynamic_slice_in_dim(query[:1], i, 1, axis=1)
            return sa.delta_pages(one, key[:1], num_pages=num_pages, num_recent=num_pages // 4, q_offset=i)[0]

        return jax.lax.map(of_step, jnp.arange(query.shape[1], dtype=jnp.int32))

    def select(query: jax.Array, key: jax.Array, *, is_causal: bool) -> sa.BlockSelection:
        del is_causal  # it is for decoding
        return sa.BlockSelection(pages(query, key)[None, None], q_block_size=1, kv_block_size=16)

    return select


METHODS = (
    Method("SlidingWindow", _budgets("tokens", lambda n: selectors.SlidingWindow(n, num_sinks=16), 128, 256, 512)),
    Method("AShape", _budgets("local tokens", lambda n: selectors.AShape(64, n), 128, 256, 512)),
    Method("TriShape", _budgets("local tokens", lambda n: selectors.TriShape(64, n), 128, 256, 512)),
    Method(
        "LocalStrided",
        _budgets("apart", lambda n: selectors.LocalStrided(local_blocks=2, vert_stride=n), 16, 8, 4),
    ),
    Method("HeadMix", _budgets("local blocks, a dense head", _head_mix, 2, 4, 8)),
    Method("MoASpans", _budgets("of the length, in the mean", _moa, 0.05, 0.1, 0.2)),
    Method(
        "NeighborhoodAttention",
        _budgets("wide", lambda n: selectors.NeighborhoodAttention(GRID, n, tile_shape=4), 7, 11, 19),
        takes_lines=False,
        takes_grids=True,
    ),
    Method(
        "SlidingTile",
        _budgets("tiles wide", lambda n: selectors.SlidingTile(GRID, 4, (n, n)), 3, 5),
        takes_lines=False,
        takes_grids=True,
    ),
    Method("InfLLMV2", _budgets("blocks", _infllm, 4, 8, 16)),
    Method("NSA", _budgets("blocks", lambda n: selectors.NSA(top_k=n), 4, 8, 16)),
    Method("MoBA", _budgets("chunks of 128", lambda n: selectors.MoBA(top_k=n, block_size=128), 2, 4, 8)),
    Method(
        "NOSA",
        _budgets("blocks", lambda n: selectors.NOSA(top_k=n, query_aware=_infllm(n * 3 // 4)), 4, 8, 16),
        arguments=_key_norms,
    ),
    Method("DSAIndexer", _budgets("tokens", lambda n: selectors.DSAIndexer(top_k=n), 128, 256, 512), arrays=_index_arrays),
    Method("Quest", _budgets("blocks of 16", lambda n: selectors.Quest(top_k=n), 8, 16, 32)),
    Method("VerticalSlash", _budgets("columns and diagonals", _vertical_slash, 64, 128, 256)),
    Method("PooledTopK", _budgets("of the blocks", lambda n: selectors.PooledTopK(ratio=n), 0.1, 0.25, 0.5), takes_grids=True),
    Method(
        "PooledCDF",
        _budgets("of the mass", lambda n: selectors.PooledCDF(cdf=n, similarity=0.0), 0.5, 0.8, 0.98),
        takes_grids=True,
    ),
    Method("XAttention", _budgets("of the mass", lambda n: selectors.XAttention(threshold=n, block_size=64), 0.5, 0.7, 0.9)),
    Method(
        "FlexPrefill",
        _budgets("of the mass", lambda n: selectors.FlexPrefill(gamma=n, min_budget=128, block_size=64), 0.5, 0.7, 0.9),
    ),
    Method("SALE", _budgets("threshold", lambda n: selectors.SALE(threshold=n, dense_len=0), 0.1, 0.03, 0.004)),
    Method(
        "Grid",
        _budgets("local tokens", lambda n: selectors.Grid(strides=(8, 16, 37), num_local=n, num_sinks=64), 64, 128, 256),
    ),
    Method(
        "SeerGate",
        _budgets("blocks", lambda n: selectors.SeerGate(top_k=n, rope_base=None), 4, 8, 16),
        arguments=lambda pattern: dict(gate=untrained_gate(pattern)),
    ),
    Method(
        "BiLevelRouting",
        _budgets("regions", lambda n: selectors.BiLevelRouting(GRID, num_regions=8, top_k=n), 4, 8, 16),
        takes_lines=False,
        takes_grids=True,
    ),
    Method("snapkv_keep", _budgets("of 1,024 tokens", _snapkv, 64, 128, 256), counted=_second_half),
    Method("zipvl_keep", _budgets("of the mass", _zipvl, 0.5, 0.8, 0.95), counted=_second_half),
    Method(
        "delta_pages",
        _budgets("pages of 16", _delta, 8, 16, 32),
        # A layer that follows, where there is one.
        counted=lambda pattern: Counted(first_layer=pattern.key.shape[0] - 1),
    ),
)
