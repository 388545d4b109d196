"""Sparse self-attention for `flax.nnx`."""

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_attn_jax.api import Window
from sparse_attn_jax.flax.decode_cache import CACHE_NAMES, make_cache
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
        for name in CACHE_NAMES:
            setattr(self, name, nnx.data(None))

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
        inputs = jax.ShapeDtypeStruct((batch, max_len, self.in_features), self.key.param_dtype)
        key, value = (jax.eval_shape(project, inputs) for project in (self.key, self.value))
        if dtype is not None:
            key, value = (jax.ShapeDtypeStruct(x.shape, dtype) for x in (key, value))
        cache = make_cache(self.config.selector, key, value)
        for name in CACHE_NAMES:
            setattr(self, name, nnx.Cache(cache[name]) if name in cache else nnx.data(None))

    def _attend_cached(self, query, key, value) -> tuple[jax.Array, BlockSelection]:
        variables = {name: getattr(self, name) for name in CACHE_NAMES if getattr(self, name) is not None}
        if not variables:
            raise ValueError("The module has no decode cache; call `init_cache(batch, max_len)` first.")
        cache = {name: variable[...] for name, variable in variables.items()}
        out, selection, cache = attend_cached(self.config, cache, query, key, value)
        for name, variable in variables.items():
            variable[...] = cache[name]
        return out, selection
