"""The language model over paged caches: a prompt at a time fills its pages, then every step makes a byte of each sequence."""

import dataclasses
import functools
import operator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from lm_model import ByteEmbedding, ModelConfig

import sparse_attn_jax as sa
from sparse_attn_jax.flax.rotary import apply_rotary
from sparse_attn_jax.paged_attention import paged_block_sparse_attention
from sparse_attn_jax.paged_cache import PagedKVCache
from sparse_attn_jax.quest_metadata import QuestMetadata
from sparse_attn_jax.selectors.quest import Quest

ROTARY_THETA = 10_000.0
# How many bytes the embedding of one looks at.
NUM_RECENT = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What the model knows of a batch of sequences. A slot is a row of the batch, which sequences take one after another."""

    caches: tuple[PagedKVCache, ...]  # of each layer
    metadata: tuple[QuestMetadata, ...]  # of each layer's keys
    recent: jax.Array  # int32 [num_slots, NUM_RECENT], the last bytes


@dataclasses.dataclass(frozen=True)
class PagedModel:
    """The model, with dense attention or Quest's, and the sizes of its caches.

    Attributes:
      config: of the trained model.
      quest: selects the pages that decoding reads; `None` reads all of them.
      num_slots: sequences at a time.
      num_pages: of the pool of each layer.
      page_size: tokens per page, and per block of Quest.
      max_length: of a sequence.
    """

    config: ModelConfig
    quest: Quest | None
    num_slots: int
    num_pages: int
    page_size: int
    max_length: int

    @property
    def max_pages(self) -> int:
        return -(-self.max_length // self.page_size)

    def empty_state(self) -> State:
        heads = dict(num_kv_heads=self.config.num_kv_heads, head_dim=self.config.head_dim, batch=self.num_slots)
        pages = dict(num_pages=self.num_pages, page_size=self.page_size, max_pages_per_sequence=self.max_pages)
        layers = range(self.config.num_layers)
        return State(
            caches=tuple(PagedKVCache.create(**heads, **pages) for _ in layers),
            metadata=tuple(QuestMetadata.create(**heads, max_len=self.max_length, block_size=self.page_size) for _ in layers),
            recent=jnp.zeros((self.num_slots, NUM_RECENT), jnp.int32),
        )


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def admit(
    model: PagedModel, params: Any, state: State, slot: jax.Array, pages: jax.Array, prompt: jax.Array, length: jax.Array
) -> tuple[State, jax.Array]:
    """Gives a slot to a sequence, reads its prompt with dense attention, and predicts what follows.

    Args:
      model: sizes.
      params: of the model.
      state: before.
      slot: int32 scalar.
      pages: int32 [max_pages], physical, -1 last.
      prompt: int32 [1, padded length]; what follows the first `length` bytes is padding.
      length: int32 scalar.

    Returns:
      The state, and the likeliest byte, an int32 scalar.
    """
    positions = jnp.arange(prompt.shape[1], dtype=jnp.int32)[None]
    caches, metadata = [], []

    def attend(layer, query, key, value):
        query, key = (_rotate(x, positions) for x in (query, key))
        cache = state.caches[layer].assign(slot, pages).prefill(slot, key[0], value[0], length=length)
        caches.append(cache)
        fresh = state.metadata[layer].reset(slot)
        metadata.append(fresh.refresh(cache.key_pages, None, cache.lengths, block_tables=cache.block_tables))
        return sa.sparse_attention(query, key, value, sa.selectors.Dense(), is_causal=True)

    x = ByteEmbedding(model.config.d_model, decode=False).apply({"params": params["embedding"]}, prompt)
    logits = _forward(model, params, x, attend)[0]
    token = logits[length - 1].argmax().astype(jnp.int32)
    # The embedding takes bytes before the first for zeros.
    recent = jax.lax.dynamic_slice(jnp.pad(prompt[0], (NUM_RECENT, 0)), (length,), (NUM_RECENT,))
    return State(tuple(caches), tuple(metadata), state.recent.at[slot].set(recent)), token


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode(
    model: PagedModel, params: Any, state: State, tokens: jax.Array, active: jax.Array
) -> tuple[State, jax.Array, jax.Array]:
    """Every active sequence continues with a byte, and the model predicts the next.

    Args:
      model: sizes, and how to select.
      params: of the model.
      state: before.
      tokens: int32 [num_slots], the bytes that sequences continue with.
      active: bool [num_slots].

    Returns:
      The state; the likeliest next bytes, int32 [num_slots]; and the keys read per layer and KV head, float32 [num_slots], a
      block's extrema counting as one key and its value.
    """
    caches, metadata, read = [], [], []

    def attend(layer, query, key, value):
        positions = state.caches[layer].lengths[:, None]
        query, key = (_rotate(x, positions) for x in (query, key))
        cache = state.caches[layer].append(key, value, active)
        extrema, ids = state.metadata[layer], None
        if model.quest is not None:
            extrema = extrema.append(key, active)
            ids = model.quest.select(query, extrema, seq_lens=cache.lengths)
        read.append(_keys_read(ids, extrema, cache))
        caches.append(cache)
        metadata.append(extrema)
        return paged_block_sparse_attention(query, cache.key_pages, cache.value_pages, cache.block_tables, cache.lengths, ids)

    recent = jnp.concatenate([state.recent[:, 1:], tokens[:, None]], axis=1)
    recent = jnp.where(active[:, None], recent, state.recent)
    embedding = ByteEmbedding(model.config.d_model, decode=False)
    x = embedding.apply({"params": params["embedding"]}, recent)[:, -1:]
    logits = _forward(model, params, x, attend)[:, 0]
    return State(tuple(caches), tuple(metadata), recent), logits.argmax(-1).astype(jnp.int32), sum(read) / len(read)


@functools.partial(jax.jit, donate_argnames="state")
def release(state: State, slot: jax.Array) -> State:
    """Takes its pages from a slot."""
    empty = jnp.full_like(state.caches[0].block_tables[0], -1)
    return dataclasses.replace(state, caches=tuple(cache.assign(slot, empty) for cache in state.caches))


def _keys_read(ids: jax.Array | None, metadata: QuestMetadata, cache: PagedKVCache) -> jax.Array:
    lengths = cache.lengths.astype(jnp.float32)
    if ids is None:
        return lengths
    start = ids[:, :, 0] * metadata.block_size  # [num_slots, num_kv_heads, top_k]
    tokens = jnp.clip(cache.lengths[:, None, None] - start, 0, metadata.block_size)
    tokens = jnp.where(start < 0, 0, tokens).sum(axis=-1)
    return tokens.mean(axis=-1) + metadata.covered_len // metadata.block_size


def _forward(model: PagedModel, params: Any, x: jax.Array, attend) -> jax.Array:
    """Embedded bytes [batch, length, d_model] to logits; `attend(layer, query, key, value)` is the only difference between
    training, prompts and steps. The parameters are those of `lm_model.LanguageModel`."""
    for layer in range(model.config.num_layers):
        own = jax.tree.map(operator.itemgetter(layer), params["layers"])
        attention = own["SparseSelfAttention_0"]
        normed = _norm(own["RMSNorm_0"], x)
        query, key, value = (
            jnp.einsum("bld,dhf->blhf", normed, attention[name]["kernel"]) for name in ("query", "key", "value")
        )
        x = x + jnp.einsum("blhf,hfd->bld", attend(layer, query, key, value), attention["out"]["kernel"])
        gate, up = jnp.split(_norm(own["RMSNorm_1"], x) @ own["Dense_0"]["kernel"], 2, axis=-1)
        x = x + (nn.silu(gate) * up) @ own["Dense_1"]["kernel"]
    return _norm(params["norm"], x) @ params["logits"]["kernel"]


def _norm(params: Any, x: jax.Array) -> jax.Array:
    return nn.RMSNorm().apply({"params": params}, x)


def _rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotates [batch, length, heads, dim] at positions [batch or 1, length]."""
    positions = jnp.broadcast_to(positions, x.shape[:2])
    return jax.vmap(lambda one, where: apply_rotary(one[None], where, ROTARY_THETA)[0])(x, positions)
