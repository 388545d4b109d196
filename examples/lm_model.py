"""A small byte-level transformer in Flax linen; its attention is `SparseSelfAttention` with any selector."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from lm_data import VOCABULARY

import sparse_attn_jax as sa
from sparse_attn_jax.flax.linen import SparseSelfAttention


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model. The defaults learn visibly within minutes on two CPU cores."""

    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    mlp_dim: int = 512
    block_size: int = 64
    top_k: int = 8
    num_local_blocks: int = 2

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    def selector(self, attention: str) -> Any:
        """The selector of a model with `attention` "sparse" or "dense": the only difference between the two."""
        if attention == "dense":
            return sa.selectors.Dense(block_size=self.block_size)
        return sa.selectors.InfLLMV2(
            top_k=self.top_k, block_size=self.block_size, num_sink_blocks=1, num_local_blocks=self.num_local_blocks
        )


class ByteEmbedding(nn.Module):
    """Each byte together with the few before it, so that attention need not spell: int32 [batch, length] to features."""

    features: int
    decode: bool
    num_previous: int = 3

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        before = jnp.zeros((tokens.shape[0], self.num_previous), jnp.int32)
        if self.decode:
            previous = self.variable("cache", "previous_bytes", lambda: before)
            before = previous.value
        padded = jnp.concatenate([before, tokens], axis=1)
        if self.decode:
            previous.value = padded[:, tokens.shape[1] :]
        embedded = 0
        for distance in range(self.num_previous + 1):
            first = self.num_previous - distance
            embed = nn.Embed(VOCABULARY, self.features, name=f"distance_{distance}")
            embedded += embed(padded[:, first : first + tokens.shape[1]])
        return embedded


class Layer(nn.Module):
    """Attention and a gated MLP, each on the normalised residual stream."""

    config: ModelConfig
    selector: Any
    decode: bool
    sow_selection: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        config = self.config
        # Small at the start, so that every layer begins close to the identity.
        out_init = nn.initializers.variance_scaling(0.1, "fan_in", "normal")
        attention = SparseSelfAttention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            selector=self.selector,
            is_causal=True,
            rotary_theta=10_000.0,
            use_bias=False,
            out_kernel_init=out_init,
            decode=self.decode,
        )
        x = x + attention(nn.RMSNorm()(x), sow_selection=self.sow_selection)
        hidden = nn.Dense(2 * config.mlp_dim, use_bias=False)(nn.RMSNorm()(x))
        gate, up = jnp.split(hidden, 2, axis=-1)
        return x + nn.Dense(config.d_model, use_bias=False, kernel_init=out_init)(nn.silu(gate) * up), None


class LanguageModel(nn.Module):
    """Bytes to logits of the next byte: int32 [batch, length] to float32 [batch, length, 256].

    With `decode` the bytes continue those of earlier calls, whose keys and values are in the "cache" collection. With
    `sow_selection` every layer sows its selection into "intermediates".
    """

    config: ModelConfig
    selector: Any
    decode: bool = False
    sow_selection: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        # One loop over the layers compiles several times faster than a copy of each.
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0, "cache": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=self.config.num_layers,
        )
        x = ByteEmbedding(self.config.d_model, self.decode, name="embedding")(tokens)
        x, _ = layers(self.config, self.selector, self.decode, self.sow_selection, name="layers")(x)
        return nn.Dense(VOCABULARY, use_bias=False, name="logits")(nn.RMSNorm(name="norm")(x))


def selected_blocks(model: LanguageModel, params: Any, text: np.ndarray) -> dict[str, np.ndarray]:
    """Which blocks each byte of a text may read: bool [length, num_blocks], for every layer and KV head, by name."""

    @jax.jit
    def run(params, tokens):
        sowing = model.clone(sow_selection=True)
        _, collections = sowing.apply({"params": params}, tokens, mutable=["intermediates"])
        (stacked,) = jax.tree.leaves(collections, is_leaf=lambda x: isinstance(x, sa.BlockSelection))
        return jax.vmap(lambda selection: selection.to_block_mask(len(text))[0])(stacked)

    masks = run(params, text.astype(np.int32)[None])
    return {
        f"layer {layer}, KV head {head}": np.asarray(mask)
        for layer, heads in enumerate(masks)
        for head, mask in enumerate(heads)
    }
