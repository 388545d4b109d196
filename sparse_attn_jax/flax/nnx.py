"""Sparse self-attention for `flax.nnx`."""

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_attn_jax.api import Window
from sparse_attn_jax.flax.decode_cache import CACHE_NAMES, Cache, make_cache
from sparse_attn_jax.flax.native import (
    NATIVE_CACHE_NAMES,
    NativeConfig,
    attend_native,
    attend_native_cached,
    flatten_units,
    make_native_cache,
    make_native_config,
    unit_tokens,
)
from sparse_attn_jax.flax.options import Selector, make_config
from sparse_attn_jax.flax.self_attention import attend, attend_cached, check_decode, check_inputs
from sparse_attn_jax.selection import BlockSelection

KERNEL_INIT = nnx.initializers.lecun_normal()
BIAS_INIT = nnx.initializers.zeros_init()
NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class SparseSelfAttention(nnx.Module):
    """Multi-head self-attention over the blocks that a selector chooses.

    Parameters are those of `nnx.MultiHeadAttention`: `query`, `key`, `value` and `out`, each a `LinearGeneral`. Sharding
    annotations come with the initialisers (`nnx.with_partitioning`) or as metadata (`kernel_metadata={"out_sharding": ...}`):
    kernels are [features, heads, head_dim], and [heads, value_head_dim, features] for `out`.

    Decoding: `init_cache(batch, max_len)` makes an empty cache of `nnx.Cache` variables. Each call with `decode=True` then
    takes the next tokens, all of a prompt or one at a time, and attends to all tokens so far: the outputs are those of one call
    on the whole sequence with `decode=False`. Tokens past max_len are not stored and give NaN. The cache is [batch, max_len]
    from the start and no step compresses all of it anew; a `dense_len` of the selector compares with max_len.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        selector: Selector | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        out_features: int | None = None,
        is_causal: bool = False,
        rotary_theta: float | None = None,
        local_window_size: Window | None = None,
        num_sinks: int | Sequence[int] = 0,
        scale: float | None = None,
        logits_soft_cap: float | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        out_kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer = BIAS_INIT,
        out_bias_init: nnx.Initializer | None = None,
        use_bias: bool = True,
        decode: bool = False,
        implementation: str | Sequence[str] | None = None,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        out_kernel_metadata: Mapping[str, Any] | None = None,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        out_bias_metadata: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes the parameters.

        Args:
          num_heads: query heads.
          in_features: features of the input.
          selector: chooses the blocks, see `sparse_attn_jax.selectors`. Default: all of them, dense attention.
          num_kv_heads: heads of keys and values; divides num_heads. Default: num_heads.
          head_dim: features per head of queries and keys. Default: in_features // num_heads, which must be exact.
          value_head_dim: features per head of values. Default: head_dim.
          out_features: features of the output. Default: in_features.
          is_causal: no token sees a later one, in selection and attention. Default: False.
          rotary_theta: base of a rotary position embedding of queries and keys. Default: none.
          local_window_size: (left, right), as in `block_sparse_attention`, on top of the selection; a tuple in place of an int
            for either side gives a size per head. Default: no window.
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
          decode: use the cache unless a call says otherwise. Default: False.
          implementation: as in `block_sparse_attention`.
          kernel_metadata: metadata of the kernels of `query`, `key` and `value`.
          out_kernel_metadata: metadata of the kernel of `out`. Default: kernel_metadata.
          bias_metadata: metadata of the biases of `query`, `key` and `value`.
          out_bias_metadata: metadata of the bias of `out`. Default: bias_metadata.
          rngs: streams; `params` is used.

        Raises:
          ValueError: an argument is wrong; the message names it.
        """
        self.in_features = in_features
        self.decode = decode
        self.config = make_config(
            in_features,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            out_features=out_features,
            selector=selector,
            is_causal=is_causal,
            rotary_theta=rotary_theta,
            local_window_size=local_window_size,
            num_sinks=num_sinks,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            implementation=implementation,
        )
        dtypes = dict(dtype=dtype, param_dtype=param_dtype, precision=precision)
        linear = functools.partial(nnx.LinearGeneral, use_bias=use_bias, rngs=rngs, **dtypes)
        inits = dict(kernel_init=kernel_init, bias_init=bias_init)
        metadata = dict(kernel_metadata=kernel_metadata, bias_metadata=bias_metadata)
        for name, features in self.config.projections().items():
            setattr(self, name, linear(in_features, features, **inits, **metadata))
        self.out = linear(
            (num_heads, self.config.value_head_dim),
            self.config.out_features,
            axis=(-2, -1),
            kernel_init=kernel_init if out_kernel_init is None else out_kernel_init,
            bias_init=bias_init if out_bias_init is None else out_bias_init,
            kernel_metadata=kernel_metadata if out_kernel_metadata is None else out_kernel_metadata,
            bias_metadata=bias_metadata if out_bias_metadata is None else out_bias_metadata,
        )
        _set_cache(self, CACHE_NAMES, {})

    def __call__(
        self,
        inputs: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        decode: bool | None = None,
        sow_selection: bool = False,
    ) -> jax.Array:
        """Attends within each sequence.

        Args:
          inputs: [batch, length, in_features], floating point. In decode mode the next tokens of each sequence.
          segment_ids: integers [batch, length]; a token sees only tokens of its own segment. Blocks are selected without regard
            to segments. Not in decode mode. Default: one segment.
          decode: use the cache. Default: as the module was made.
          sow_selection: sow the `BlockSelection` as `nnx.Intermediate` "selection".

        Returns:
          [batch, length, out_features], of the dtype of the computation.

        Raises:
          ValueError: an argument is wrong, or there is no cache; the message names it.
          NotImplementedError: none of the implementations asked for can run this call.
        """
        check_inputs(inputs, segment_ids, self.in_features)
        query, key, value = self.query(inputs), self.key(inputs), self.value(inputs)
        if self.decode if decode is None else decode:
            check_decode(self.config, segment_ids)
            out, selection = self._attend_cached(query, key, value)
        else:
            out, selection = attend(self.config, query, key, value, segment_ids)
        if sow_selection:
            self.sow(nnx.Intermediate, "selection", selection)
        return self.out(out)

    def init_cache(self, batch: int, max_len: int, dtype: Any = None) -> None:
        """Makes an empty decode cache, in place of any other.

        Args:
          batch: number of sequences.
          max_len: tokens that each may have.
          dtype: of keys and values. Default: the module's dtype, or else that of its parameters.

        Raises:
          ValueError: the layer cannot decode.
        """
        check_decode(self.config, None)
        key, value = (_projection_shape(project, batch, max_len, dtype) for project in (self.key, self.value))
        _set_cache(self, CACHE_NAMES, make_cache(self.config.selector, key, value))

    def _attend_cached(self, query, key, value) -> tuple[jax.Array, BlockSelection]:
        cache = _open_cache(self, CACHE_NAMES)
        out, selection, cache = attend_cached(self.config, cache, query, key, value)
        _store_cache(self, cache)
        return out, selection


class NativeSparseAttention(nnx.Module):
    """Multi-head native sparse attention: DeepSeek's NSA with all that it learns.

    Always causal. Parameters: `query`, a `gate` of three numbers per head (sigmoid of a linear function, for the compressed,
    the selected and the window branch), and keys and values for each branch: `key` and `value` for the selected one,
    `compressed_key` and `compressed_value`, `window_key` and `window_value`; each a `LinearGeneral`, as `out` is. What makes
    one key and value of a unit's tokens, `key_compression` and `value_compression`, adds a learned embedding of the place in
    the unit to each, and puts all together through two `Linear` with a GELU between, which the heads share.

    Rotary embedding turns queries, keys and window keys by the position of their token, and a compressed key, made of keys that
    are not turned, by the position of its unit's first token, as in XunhaoLai's Triton version; the paper does not say.

    Decoding: as `SparseSelfAttention`, by `init_cache` and `decode=True`. The cache holds keys and values of all three branches
    for max_len tokens, the window's too, and what is compressed of each complete unit; a step compresses only those units that
    its tokens complete.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        out_features: int | None = None,
        kernel_size: int = 32,
        kernel_stride: int = 16,
        block_size: int = 64,
        top_k: int = 16,
        num_sink_blocks: int = 1,
        num_local_blocks: int = 2,
        window_size: int = 512,
        compression_features: int | None = None,
        rotary_theta: float | None = None,
        scale: float | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        out_kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer = BIAS_INIT,
        out_bias_init: nnx.Initializer | None = None,
        use_bias: bool = True,
        decode: bool = False,
        implementation: str | Sequence[str] | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes the parameters.

        Args:
          num_heads: query heads.
          in_features: features of the input.
          num_kv_heads: heads of keys and values; divides num_heads. Default: num_heads.
          head_dim: features per head of queries and keys. Default: in_features // num_heads, which must be exact.
          value_head_dim: features per head of values. Default: head_dim.
          out_features: features of the output. Default: in_features.
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
          decode: use the cache unless a call says otherwise. Default: False.
          implementation: as in `native_sparse_attention`.
          rngs: streams; `params` is used.

        Raises:
          ValueError: an argument is wrong; the message names it.
        """
        self.in_features = in_features
        self.decode = decode
        self.config = make_native_config(
            in_features,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            out_features=out_features,
            kernel_size=kernel_size,
            kernel_stride=kernel_stride,
            block_size=block_size,
            top_k=top_k,
            num_sink_blocks=num_sink_blocks,
            num_local_blocks=num_local_blocks,
            window_size=window_size,
            compression_features=compression_features,
            rotary_theta=rotary_theta,
            scale=scale,
            implementation=implementation,
        )
        options = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, precision=precision, rngs=rngs)
        inits = dict(kernel_init=kernel_init, bias_init=bias_init)
        for name, sizes in self.config.projections().items():
            setattr(self, name, nnx.LinearGeneral(in_features, sizes, **inits, **options))
        for name, (_, sizes) in self.config.compressions().items():
            setattr(self, name, _Compression(self.config, *sizes, options))
        attention = self.config.attention
        self.out = nnx.LinearGeneral(
            (num_heads, attention.value_head_dim),
            attention.out_features,
            axis=(-2, -1),
            kernel_init=kernel_init if out_kernel_init is None else out_kernel_init,
            bias_init=bias_init if out_bias_init is None else out_bias_init,
            **options,
        )
        _set_cache(self, NATIVE_CACHE_NAMES, {})

    def __call__(self, inputs: jax.Array, *, decode: bool | None = None) -> jax.Array:
        """Attends within each sequence.

        Args:
          inputs: [batch, length, in_features], floating point. In decode mode the next tokens of each sequence.
          decode: use the cache. Default: as the module was made.

        Returns:
          [batch, length, out_features], of the dtype of the computation.

        Raises:
          ValueError: an argument is wrong, or there is no cache; the message names it.
          NotImplementedError: none of the implementations asked for can run this call.
        """
        check_inputs(inputs, None, self.in_features)
        projected = {name: getattr(self, name)(inputs) for name in self.config.projections()}
        compressions = {name: getattr(self, name) for name in self.config.compressions()}
        if self.decode if decode is None else decode:
            out, cache = attend_native_cached(self.config, _open_cache(self, NATIVE_CACHE_NAMES), projected, compressions)
            _store_cache(self, cache)
        else:
            out = attend_native(self.config, projected, compressions)
        return self.out(out)

    def init_cache(self, batch: int, max_len: int, dtype: Any = None) -> None:
        """Makes an empty decode cache, in place of any other.

        Args:
          batch: number of sequences.
          max_len: tokens that each may have.
          dtype: of keys and values. Default: the module's dtype, or else that of its parameters.
        """
        projected = {name: _projection_shape(getattr(self, name), batch, max_len, dtype) for name in self.config.projections()}
        _set_cache(self, NATIVE_CACHE_NAMES, make_native_cache(self.config, projected))


class _Compression(nnx.Module):
    """Units of tokens as one vector each."""

    def __init__(self, config: NativeConfig, heads: int, features: int, options: Mapping[str, Any]):
        """`options` are those of `nnx.Linear`."""
        self.config = config
        shape, dtype = (config.kernel_size, heads, features), options["param_dtype"]
        self.position_embedding = nnx.Param(nnx.initializers.normal(0.02)(options["rngs"].params(), shape, dtype))
        self.hidden = nnx.Linear(config.kernel_size * features, config.compression_features, **options)
        self.out = nnx.Linear(config.compression_features, features, **options)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[batch, length, heads, features] to [batch, num_units, heads, features]."""
        flat = flatten_units(unit_tokens(self.config, tokens), self.position_embedding[...])
        return self.out(nnx.gelu(self.hidden(flat)))


def _projection_shape(project: nnx.LinearGeneral, batch: int, max_len: int, dtype: Any) -> jax.ShapeDtypeStruct:
    """What a projection makes of inputs of the dtype of its parameters; `dtype` replaces that of the result."""
    out = jax.eval_shape(project, jax.ShapeDtypeStruct((batch, max_len, *project.in_features), project.param_dtype))
    return out if dtype is None else jax.ShapeDtypeStruct(out.shape, dtype)


def _set_cache(module: nnx.Module, names: Sequence[str], cache: Cache) -> None:
    """Makes the variables of a cache anew; `None` where it has no array of the name."""
    for name in names:
        setattr(module, name, nnx.Cache(cache[name]) if name in cache else nnx.data(None))


def _open_cache(module: nnx.Module, names: Sequence[str]) -> Cache:
    cache = {name: getattr(module, name)[...] for name in names if getattr(module, name) is not None}
    if not cache:
        raise ValueError("The module has no decode cache; call `init_cache(batch, max_len)` first.")
    return cache


def _store_cache(module: nnx.Module, cache: Cache) -> None:
    for name, x in cache.items():
        getattr(module, name)[...] = x
