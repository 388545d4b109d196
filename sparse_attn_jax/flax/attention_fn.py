"""Sparse attention for the attention modules that Flax has itself."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparse_attn_jax.api import Window, sparse_attention
from sparse_attn_jax.flax.options import OpOptions, Selector, selector_or_dense
from sparse_attn_jax.validation import describe, is_array, require

MASK_ADVICE = (
    "Causality and windows are options of `attention_fn`. Flax's `decode=True` works by a mask; "
    "`SparseSelfAttention` of `sparse_attn_jax.flax.linen` and `.nnx` has a decode cache and segment ids."
)


def attention_fn(
    selector: Selector | None = None,
    *,
    is_causal: bool = False,
    q_offset: int | None = None,
    local_window_size: Window | None = None,
    num_sinks: int | Sequence[int] = 0,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Callable[..., jax.Array]:
    """An `attention_fn` for linen's `MultiHeadDotProductAttention` and nnx's `MultiHeadAttention`.

    What it cannot honour is a `ValueError`, never ignored: a dense mask or bias, dropout, attention weights to sow, einsum
    hooks, a precision. Flax's modules decode by means of a mask; `SparseSelfAttention` of `sparse_attn_jax.flax.linen` and
    `.nnx` has a decode cache.

    Args:
      selector: chooses the blocks, see `sparse_attn_jax.selectors`. Default: all of them, dense attention.
      is_causal: no query sees a later key. Attention is causal if either this or the module's own `is_causal` says so.
      q_offset: position of query 0 among the keys. Default: kv_len - q_len, as everywhere in this library; but causal attention
        between different lengths has to say, because Flax's own aligns top-left (0).
      local_window_size, num_sinks, scale, logits_soft_cap, implementation: as in `block_sparse_attention`.

    Returns:
      A function of (query, key, value) and the keywords of `dot_product_attention` in linen and nnx. It compares equal to one
      made of equal arguments. query is [..., q_len, num_heads, head_dim], key [..., kv_len, num_kv_heads, head_dim] and value
      [..., kv_len, num_kv_heads, value_head_dim]; they are promoted to one dtype, or to `dtype`. The softmax is float32.

    Raises:
      ValueError: `selector` or `is_causal` is wrong.
    """
    require(isinstance(is_causal, bool), "is_causal", is_causal, "a bool")
    options = OpOptions(
        local_window_size=local_window_size,
        num_sinks=num_sinks,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        implementation=implementation,
    )
    return _AttentionFn(selector_or_dense(selector), is_causal, q_offset, options)


@dataclasses.dataclass(frozen=True)
class _AttentionFn:
    """What `attention_fn` returns: hashable and equal by value, so that modules made alike share compiled code."""

    selector: Selector
    is_causal: bool
    q_offset: int | None
    options: OpOptions

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Callable[..., jax.Array] | None = None,
        qk_attn_weights_einsum: Callable[..., jax.Array] | None = None,
        attn_weights_value_einsum: Callable[..., jax.Array] | None = None,
        promote_dtype: Callable[..., Any] | None = None,
        is_causal: bool = False,
        **others: Any,
    ) -> jax.Array:
        """Attention of `query` to `key` and `value`; see `attention_fn`.

        linen passes a function only those keywords that its signature names, so all are named here, to be refused. Without
        dropout `broadcast_dropout` and `dropout_rng` say nothing; `force_fp32_for_softmax` asks for what is done anyway.
        """
        _refuse("mask", mask, MASK_ADVICE)
        _refuse("bias", bias, "There is no dense bias.")
        if not deterministic and dropout_rate != 0.0:
            raise ValueError(f"`dropout_rate` is {dropout_rate} and `deterministic` False; sparse attention has no dropout.")
        _refuse("module", module, "There are no attention weights to sow.")
        hooks = dict(qk_attn_weights_einsum=qk_attn_weights_einsum, attn_weights_value_einsum=attn_weights_value_einsum)
        hooks |= dict(einsum_dot_general=einsum_dot_general, promote_dtype=promote_dtype)
        for name, x in {**hooks, **others}.items():
            _refuse(name, x, "Sparse attention has nothing like it.")
        if precision not in (None, jax.lax.Precision.DEFAULT, "default"):
            _refuse("precision", precision, "`jax.default_matmul_precision` reaches inside.")
        return self._attend(query, key, value, dtype, self.is_causal or bool(is_causal))

    def _attend(self, query, key, value, dtype, is_causal: bool) -> jax.Array:
        leading = _check_ranks(query, key, value)
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        arrays = (x.astype(dtype).reshape(math.prod(leading), *x.shape[-3:]) for x in (query, key, value))
        same = query.shape[-3] == key.shape[-3]
        needed = "given for causal attention between different lengths: 0 is Flax's alignment, kv_len - q_len this library's"
        require(same or not is_causal or self.q_offset is not None, "q_offset", self.q_offset, needed)
        options = dict(is_causal=is_causal, q_offset=self.q_offset, **self.options.keywords())
        out = sparse_attention(*arrays, self.selector, **options)
        return out.reshape(*leading, *out.shape[1:])


def _refuse(name: str, x: Any, advice: str) -> None:
    if x is not None:
        raise ValueError(f"`{name}` is {describe(x)}; sparse attention cannot honour it, it must be None. {advice}")


def _check_ranks(query: Any, key: Any, value: Any) -> tuple[int, ...]:
    """The leading dimensions, which must agree."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        require(is_array(x) and len(x.shape) >= 3, name, x, "an array [..., length, num_heads, head_dim]")
        require(x.shape[:-3] == query.shape[:-3], name, x, f"of leading dimensions {list(query.shape[:-3])}, as `query`")
    return query.shape[:-3]
