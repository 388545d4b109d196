"""Native sparse attention: compressed, selected and nearby keys, each attended to apart and gated by the model."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparse_attn_jax import attention, dispatch, validation
from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.api import block_sparse_attention, sparse_attention
from sparse_attn_jax.problem import MAX_LENGTH, Operands, TokenMask
from sparse_attn_jax.scoring import compress_keys
from sparse_attn_jax.scoring_problem import absolute_positions, num_units
from sparse_attn_jax.selectors.dense import select_every_block
from sparse_attn_jax.selectors.nsa import NSA
from sparse_attn_jax.selectors.sliding_window import SlidingWindow
from sparse_attn_jax.validation import require

BRANCHES = ("compressed", "selected", "window")

# Units per block of the dense attention to all units. Only speed depends on it.
UNIT_BLOCK_SIZE = 64


def native_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gates: Sequence[jax.Array],
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    top_k: int = 16,
    num_sink_blocks: int = 1,
    num_local_blocks: int = 2,
    window_size: int = 512,
    compressed_key: jax.Array | None = None,
    compressed_value: jax.Array | None = None,
    window_key: jax.Array | None = None,
    window_value: jax.Array | None = None,
    q_offset: int | jax.Array | None = None,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """Causal attention by the three branches of NSA (DeepSeek's native sparse attention), and their gated sum.

    out[t, h] = sum over the branches c of gates[c][t, h] * out_c[t, h], each out_c a softmax attention of its own:

      compressed  over the units j that end by t: kernel_stride * j + kernel_size - 1 <= t
      selected    over the tokens up to t of the blocks that the compressed attention weighs most, see `selectors.NSA`
      window      over the `window_size` tokens up to t, t included

    Always causal: the method looks back only. A query that sees no unit yet gets 0 from that branch.

    Selection carries no gradient, so what compresses the keys learns through the compressed branch alone. Memory is linear in
    the lengths, time is q_len * kv_len / kernel_stride for the compressed branch and linear for the others.

    Args:
      query: [batch, q_len, num_q_heads, head_dim], float16, bfloat16, float32 or float64.
      key: [batch, kv_len, num_kv_heads, head_dim], dtype of query: the keys of the selected branch. Query head h reads KV head
        h // (num_q_heads // num_kv_heads).
      value: [batch, kv_len, num_kv_heads, value_head_dim], dtype of query.
      gates: three floating arrays [batch, q_len, num_q_heads], for the branches in the order above. The paper has a sigmoid of
        a projection of each token.
      kernel_size: tokens per unit.
      kernel_stride: tokens between the starts of neighbouring units.
      block_size: tokens per selected block.
      top_k: blocks that each query selects, sinks and local blocks included.
      num_sink_blocks: leading blocks that every query selects.
      num_local_blocks: most recent blocks that every query selects, its own included.
      window_size: tokens in the window, the query's own included, as in FLA. XunhaoLai's Triton version sees one more than its
        setting says.
      compressed_key: [batch, num_units, num_kv_heads, head_dim], dtype of query: what a model makes of each complete unit,
        num_units as in `compress_keys`. Default: the means of `key`.
      compressed_value: [batch, num_units, num_kv_heads, value_head_dim]. Default: the means of `value`.
      window_key: of the shape of `key`: the keys of the window, which are projected apart in the paper. Default: `key`.
      window_value: of the shape of `value`. Default: `value`.
      q_offset: position of query 0 among the keys: an int, or an integer array [] or [batch]. Default: kv_len - q_len.
      scale: multiplies query . key in all branches, and in the scores of blocks. Default: head_dim ** -0.5.
      implementation: as in `block_sparse_attention`, for the attention of all branches.

    Returns:
      [batch, q_len, num_q_heads, value_head_dim], dtype of query; the branches are summed in float32 at least.

    Raises:
      ValueError: an argument that no implementation could accept; the message names it.
      NotImplementedError: none of the implementations asked for can run this call.

    Differentiable in all floating arrays. The paper gives each branch keys and values of its own: give all of them. FLA has
    kernel_size = kernel_stride = block_size, means, and one set of keys and values for all branches.
    """
    validation.check_qkv(query, key, value)
    _check_gates(gates, query)
    _check_window(window_size, window_key, window_value, key, value)
    selector = NSA(top_k, block_size, kernel_size, kernel_stride, num_sink_blocks, num_local_blocks, scale=scale)
    units = dict(compressed_key=(compressed_key, key), compressed_value=(compressed_value, value))
    compressed_key, compressed_value = (_units(name, *arrays, selector) for name, arrays in units.items())
    kv_len = key.shape[1]
    selection = selector.select(query, compressed_key, kv_len=kv_len, is_causal=True, q_offset=q_offset)

    options = dict(scale=scale, implementation=implementation)
    positions = absolute_positions(q_offset, query.shape[1], kv_len)
    compressed = _attend_compressed(query, compressed_key, compressed_value, positions, selector, **options)
    options |= dict(is_causal=True, q_offset=q_offset)
    selected = block_sparse_attention(query, key, value, selection, **options)
    window_key, window_value = key if window_key is None else window_key, value if window_value is None else window_value
    window = sparse_attention(query, window_key, window_value, SlidingWindow(window_size), **options)

    dtype = jnp.promote_types(query.dtype, jnp.float32)
    outs = zip(gates, (compressed, selected, window), strict=True)
    return sum(gate[..., None].astype(dtype) * out.astype(dtype) for gate, out in outs).astype(query.dtype)


def _attend_compressed(query, key, value, positions, selector: NSA, scale, implementation) -> jax.Array:
    """Attention to the units that end by each query's position."""
    if 0 in (*query.shape[:2], key.shape[1]):
        return jnp.zeros((*query.shape[:3], value.shape[-1]), query.dtype)
    selection = select_every_block(query.shape[1], key.shape[1], UNIT_BLOCK_SIZE)
    options = ("local_window_size", "q_offset", "query_segment_ids", "key_value_segment_ids", "key_bias", "logits_soft_cap")
    options = dict.fromkeys(options) | dict(is_causal=True, num_sinks=0, scale=scale)
    problem = validation.make_problem(query, key, value, selection, **options)
    name = dispatch.choose(problem, implementation)
    # With units as keys, kernel_stride * j + kernel_size - 1 <= t is causality at the position of the last unit that ends by t.
    last_unit = (positions - (selector.kernel_size - 1)) // selector.kernel_stride
    mask = TokenMask(
        q_positions=jnp.clip(last_unit, -1, MAX_LENGTH - 1), kv_positions=jnp.arange(problem.kv_len, dtype=jnp.int32)[None]
    )
    plan = dispatch.get(name).build_plan(problem, selection)
    return attention.attend(name, problem, Operands(query, key, value), plan, mask)[0]


def _units(name: str, units: Any, tokens: jax.Array, selector: NSA) -> jax.Array:
    """The units that are given, or means."""
    if units is None:
        return compress_keys(tokens, selector.kernel_size, selector.kernel_stride)
    batch, kv_len, *rest = tokens.shape
    shape = (batch, num_units(kv_len, selector.kernel_size, selector.kernel_stride), *rest)
    needed = f"{tokens.dtype}{list(shape)}, the complete units of {kv_len} tokens"
    require(validation.is_array(units) and tuple(units.shape) == shape and units.dtype == tokens.dtype, name, units, needed)
    return units


def _check_gates(gates: Any, query: jax.Array) -> None:
    shape = query.shape[:3]
    if not isinstance(gates, Sequence) or len(gates) != len(BRANCHES):
        found = f"a sequence of {len(gates)}" if isinstance(gates, Sequence) else validation.describe(gates)
        needed = f"a sequence of {len(BRANCHES)} arrays, for the branches {', '.join(BRANCHES)}"
        raise ValueError(f"`gates` is {found}; it must be {needed}.")
    for i, gate in enumerate(gates):
        needed = f"a floating-point array {list(shape)}, [batch, q_len, num_q_heads]"
        is_floating = validation.is_array(gate) and jnp.issubdtype(gate.dtype, jnp.floating)
        require(is_floating and tuple(gate.shape) == shape, f"gates[{i}]", gate, needed)


def _check_window(window_size: Any, window_key: Any, window_value: Any, key: jax.Array, value: jax.Array) -> None:
    checks.check_int("window_size", window_size, 1)
    for name, x, like in (("window_key", window_key, key), ("window_value", window_value, value)):
        needed = f"{like.dtype}{list(like.shape)}, as `{name.removeprefix('window_')}`, or None"
        fits = x is None or (validation.is_array(x) and x.shape == like.shape and x.dtype == like.dtype)
        require(fits, name, x, needed)
