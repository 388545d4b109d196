"""Sparse self-attention for `flax.linen`."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_attn_jax.api import Window
from sparse_attn_jax.flax.decode_cache import Cache, make_cache
from sparse_attn_jax.flax.native import (
    Compressions,
    NativeConfig,
    attend_native,
    attend_native_cached,
    flatten_units,
    make_native_cache,
    make_native_config,
    unit_tokens,
)
from sparse_attn_jax.flax.options import AttentionConfig, Selector, make_config
from sparse_attn_jax.flax.self_attention import attend, attend_cached, check_decode, check_inputs
from sparse_attn_jax.selection import BlockSelection


class SparseSelfAttention(nn.Module):
    """Multi-head self-attention over the blocks that a selector chooses.

    Parameters are those of `nn.MultiHeadDotProductAttention`: `query`, `key`, `value` and `out`, each a `DenseGeneral`.
    Sharding annotations are the initialisers' (`nn.with_partitioning`, `nn.with_logical_partitioning`): kernels are
    [features, heads, head_dim], and [heads, value_head_dim, features] for `out`.

    Decoding: with `decode=True`, `init` on inputs of [batch, max_len, features] makes an empty cache in the collection "cache".
    Each `apply(..., mutable=["cache"])` then takes the next tokens, all of a prompt or one at a time, and attends to all tokens
    so far: the outputs are those of one call on the whole sequence with `decode=False`. Tokens past max_len are not stored and
    give NaN. The cache is [batch, max_len] from the start and no step compresses all of it anew; a `dense_len` of the
    selector compares with max_len.

    Attributes:
      num_heads: query heads.
      selector: chooses the blocks, see `sparse_attn_jax.selectors`. Default: all of them, dense attention.
      num_kv_heads: heads of keys and values; divides num_heads. Default: num_heads.
      head_dim: features per head of queries and keys. Default: features // num_heads, which must be exact.
      value_head_dim: features per head of values. Default: head_dim.
      out_features: features of the output. Default: those of the input.
      is_causal: no token sees a later one, in selection and attention. Default: False.
      rotary_theta: base of a rotary position embedding of queries and keys. Default: none.
      local_window_size: (left, right), as in `block_sparse_attention`, on top of the selection; a tuple in place of an int for
        either side gives a size per head. Default: no window.
      num_sinks: leading tokens that the window does not hide; an int, or one per head. Default: 0.
      scale: multiplies query . key in the attention (a selector has its own). Default: head_dim ** -0.5.
      logits_soft_cap: c > 0 replaces a logit s by c * tanh(s / c). Default: no cap.
      dtype: of the computation. Default: inferred from inputs and parameters.
      param_dtype: of the parameters. Default: float32.
      precision: of the projections, not of the attention.
      kernel_init: initialiser of the kernels.
      out_kernel_init: initialiser of the kernel of `out`. Default: kernel_init.
      bias_init: initialiser of the biases.
      out_bias_init: initialiser of the bias of `out`. Default: bias_init.
      use_bias: whether the projections have biases. Default: True.
      decode: use the cache. Default: False.
      implementation: as in `block_sparse_attention`.
    """

    num_heads: int
    selector: Selector | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    out_features: int | None = None
    is_causal: bool = False
    rotary_theta: float | None = None
    local_window_size: Window | None = None
    num_sinks: int | Sequence[int] = 0
    scale: float | None = None
    logits_soft_cap: float | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    out_kernel_init: nn.initializers.Initializer | None = None
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    out_bias_init: nn.initializers.Initializer | None = None
    use_bias: bool = True
    decode: bool = False
    implementation: str | Sequence[str] | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array, *, segment_ids: jax.Array | None = None, sow_selection: bool = False) -> jax.Array:
        """Attends within each sequence.

        Args:
          inputs: [batch, length, features], floating point. In decode mode the next tokens of each sequence.
          segment_ids: integers [batch, length]; a token sees only tokens of its own segment. Blocks are selected without regard
            to segments. Not in decode mode. Default: one segment.
          sow_selection: sow the `BlockSelection` as "selection" into the collection "intermediates".

        Returns:
          [batch, length, out_features], of the dtype of the computation.

        Raises:
          ValueError: an attribute or argument is wrong; the message names it.
          NotImplementedError: none of the implementations asked for can run this call.
        """
        check_inputs(inputs, segment_ids)
        config = self._config(inputs.shape[-1])
        dense = functools.partial(
            nn.DenseGeneral,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
        )
        inits = dict(kernel_init=self.kernel_init, bias_init=self.bias_init)
        query, key, value = (dense(features, name=name, **inits)(inputs) for name, features in config.projections().items())
        if self.decode:
            check_decode(config, segment_ids)
            out, selection = self._attend_cached(config, query, key, value)
        else:
            out, selection = attend(config, query, key, value, segment_ids)
        if sow_selection:
            self.sow("intermediates", "selection", selection)
        inits = dict(
            kernel_init=self.kernel_init if self.out_kernel_init is None else self.out_kernel_init,
            bias_init=self.bias_init if self.out_bias_init is None else self.out_bias_init,
        )
        return dense(config.out_features, axis=(-2, -1), name="out", **inits)(out)

    def _config(self, in_features: int) -> AttentionConfig:
        return make_config(
            in_features,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_head_dim=self.value_head_dim,
            out_features=self.out_features,
            selector=self.selector,
            is_causal=self.is_causal,
            rotary_theta=self.rotary_theta,
            local_window_size=self.local_window_size,
            num_sinks=self.num_sinks,
            scale=self.scale,
            logits_soft_cap=self.logits_soft_cap,
            implementation=self.implementation,
        )

    def _attend_cached(self, config: AttentionConfig, query, key, value) -> tuple[jax.Array, BlockSelection]:
        empty = jax.eval_shape(functools.partial(make_cache, config.selector), key, value)
        cache = _open_cache(self, empty)
        if cache is None:
            return attend(config, query, key, value, None)
        out, selection, cache = attend_cached(config, cache, query, key, value)
        _store_cache(self, cache)
        return out, selection


class NativeSparseAttention(nn.Module):
    """Multi-head native sparse attention: DeepSeek's NSA with all that it learns.

    Always causal. Parameters: `query`, a `gate` of three numbers per head (sigmoid of a linear function, for the compressed,
    the selected and the window branch), and keys and values for each branch: `key` and `value` for the selected one,
    `compressed_key` and `compressed_value`, `window_key` and `window_value`; each a `DenseGeneral`, as is `out`. What makes one
    key and value of a unit's tokens, `key_compression` and `value_compression`, adds a learned embedding of the place in the
    unit to each, and puts all together through two `Dense` with a GELU between, which the heads share.

    Rotary embedding turns queries, keys and window keys by the position of their token, and a compressed key, made of keys that
    are not turned, by the position of its unit's first token, as in XunhaoLai's Triton version; the paper does not say.

    Decoding: as `SparseSelfAttention`, by `decode=True`. The cache holds keys and values of all three branches for max_len
    tokens, the window's too, and what is compressed of each complete unit; a step compresses only those units that its tokens
    complete.

    Attributes:
      num_heads: query heads.
      num_kv_heads: heads of keys and values; divides num_heads. Default: num_heads.
      head_dim: features per head of queries and keys. Default: features // num_heads, which must be exact.
      value_head_dim: features per head of values. Default: head_dim.
      out_features: features of the output. Default: those of the input.
      kernel_size: tokens per unit.
      kernel_stride: tokens between the starts of neighbouring units.
      block_size: tokens per selected block.
      top_k: blocks that each token selects, sinks and local blocks included.
      num_sink_blocks: leading blocks that every token selects.
      num_local_blocks: most recent blocks that every token selects, its own included.
      window_size: tokens of the window, the query's own included.
      compression_features: hidden features of the compressions. Default: head_dim.
      rotary_theta: base of a rotary position embedding. Default: none.
      scale: multiplies query . key. Default: head_dim ** -0.5.
      dtype: of the computation. Default: inferred from inputs and parameters.
      param_dtype: of the parameters. Default: float32.
      precision: of the projections and compressions, not of the attention.
      kernel_init: initialiser of the kernels [features, heads, head_dim] of the projections.
      out_kernel_init: initialiser of the kernel of `out`. Default: kernel_init.
      bias_init: initialiser of the biases of the projections.
      out_bias_init: initialiser of the bias of `out`. Default: bias_init.
      use_bias: whether there are biases. Default: True.
      decode: use the cache. Default: False.
      implementation: as in `native_sparse_attention`.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    out_features: int | None = None
    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    top_k: int = 16
    num_sink_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512
    compression_features: int | None = None
    rotary_theta: float | None = None
    scale: float | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    out_kernel_init: nn.initializers.Initializer | None = None
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    out_bias_init: nn.initializers.Initializer | None = None
    use_bias: bool = True
    decode: bool = False
    implementation: str | Sequence[str] | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Attends within each sequence.

        Args:
          inputs: [batch, length, features], floating point. In decode mode the next tokens of each sequence.

        Returns:
          [batch, length, out_features], of the dtype of the computation.

        Raises:
          ValueError: an attribute or argument is wrong; the message names it.
          NotImplementedError: none of the implementations asked for can run this call.
        """
        check_inputs(inputs, None)
        config = self._config(inputs.shape[-1])
        options = dict(use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype, precision=self.precision)
        dense = functools.partial(nn.DenseGeneral, **options)
        inits = dict(kernel_init=self.kernel_init, bias_init=self.bias_init)
        projected = {name: dense(sizes, name=name, **inits)(inputs) for name, sizes in config.projections().items()}
        compressions = {name: _Compression(config, options, name=name) for name in config.compressions()}
        if self.decode:
            out = self._attend_cached(config, projected, compressions)
        else:
            out = attend_native(config, projected, compressions)
        inits = dict(
            kernel_init=self.kernel_init if self.out_kernel_init is None else self.out_kernel_init,
            bias_init=self.bias_init if self.out_bias_init is None else self.out_bias_init,
        )
        return dense(config.attention.out_features, axis=(-2, -1), name="out", **inits)(out)

    def _config(self, in_features: int) -> NativeConfig:
        return make_native_config(
            in_features,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_head_dim=self.value_head_dim,
            out_features=self.out_features,
            kernel_size=self.kernel_size,
            kernel_stride=self.kernel_stride,
            block_size=self.block_size,
            top_k=self.top_k,
            num_sink_blocks=self.num_sink_blocks,
            num_local_blocks=self.num_local_blocks,
            window_size=self.window_size,
            compression_features=self.compression_features,
            rotary_theta=self.rotary_theta,
            scale=self.scale,
            implementation=self.implementation,
        )

    def _attend_cached(self, config: NativeConfig, projected: dict[str, jax.Array], compressions: Compressions) -> jax.Array:
        cache = _open_cache(self, jax.eval_shape(functools.partial(make_native_cache, config), projected))
        if cache is None:
            return attend_native(config, projected, compressions)
        out, cache = attend_native_cached(config, cache, projected, compressions)
        _store_cache(self, cache)
        return out


class _Compression(nn.Module):
    """Units of tokens as one vector each."""

    config: NativeConfig
    options: dict[str, Any]  # of `nn.Dense`

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[batch, length, heads, features] to [batch, num_units, heads, features]."""
        units = unit_tokens(self.config, tokens)
        dtype = self.options["param_dtype"]
        embedding = self.param("position_embedding", nn.initializers.normal(0.02), units.shape[2:], dtype)
        hidden = nn.Dense(self.config.compression_features, name="hidden", **self.options)(flatten_units(units, embedding))
        return nn.Dense(tokens.shape[-1], name="out", **self.options)(nn.gelu(hidden))


def _open_cache(module: nn.Module, empty: Cache) -> Cache | None:
    """The module's cache; a module that is initialising gets one like `empty`, and has none yet."""
    is_new = not module.has_variable("cache", "cached_key")
    if is_new and not module.is_initializing():
        raise ValueError(
            "The collection `cache` is empty; make it with `init` on inputs of [batch, max_len, features], and pass it to "
            "`apply` with mutable=['cache']."
        )
    zeros = lambda like: jnp.zeros(like.shape, like.dtype)
    variables = {name: module.variable("cache", name, zeros, like) for name, like in empty.items()}
    return None if is_new else {name: variable.value for name, variable in variables.items()}


def _store_cache(module: nn.Module, cache: Cache) -> None:
    for name, x in cache.items():
        module.put_variable("cache", name, x)
