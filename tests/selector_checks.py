"""What the tests of all selectors share: the mask that a selection means, and the properties that every selector has."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax.selection import BlockSelection
from sparse_attn_jax.testing import oracle


def make_inputs(q_len, kv_len, num_q_heads=4, num_kv_heads=2, head_dim=16, batch=1, seed=0) -> tuple[jax.Array, jax.Array]:
    """Random query and key; the queries are large, so that the softmax is not flat."""
    # Not jax.random, which compiles for every shape, longer than most tests take.
    rng = np.random.default_rng(seed)
    query = 3 * rng.standard_normal((batch, q_len, num_q_heads, head_dim), np.float32)
    return jnp.asarray(query), jnp.asarray(rng.standard_normal((batch, kv_len, num_kv_heads, head_dim), np.float32))


def visible_mask(
    selection: BlockSelection, query: jax.Array, key: jax.Array, *, is_causal: bool = False, q_offset=None
) -> np.ndarray:
    """bool [batch, num_q_heads, q_len, kv_len]: what the op lets each query see, predicate and causality included."""
    return oracle.attention_mask(
        selection.indices,
        batch=query.shape[0],
        num_q_heads=query.shape[2],
        q_len=query.shape[1],
        kv_len=key.shape[1],
        q_block_size=selection.q_block_size,
        kv_block_size=selection.kv_block_size,
        is_causal=is_causal,
        q_offset=q_offset,
        predicate=selection.predicate,
    )


def select_mask(selector: Callable[..., BlockSelection], query: jax.Array, key: jax.Array, **options) -> np.ndarray:
    """`visible_mask` of what the selector selects; options are `is_causal` and `q_offset`."""
    return visible_mask(selector(query, key, **options), query, key, **options)


def assert_later_tokens_change_nothing(selector: Callable[..., BlockSelection], length: int = 200, lasts=None, **sizes) -> None:
    """Changing the tokens after t leaves what the queries up to t see as it is."""
    query, key = make_inputs(length, length, **sizes)
    before = select_mask(selector, query, key, is_causal=True)
    for last in lasts or (0, 7, 31, 62, 63, 64, 143, 198):
        other_query, other_key = make_inputs(length, length, seed=last + 1, **sizes)
        is_later = jnp.arange(length)[:, None, None] > last
        mixed_query = jnp.where(is_later, other_query, query)
        mixed_key = jnp.where(is_later, 10 * other_key, key).at[:, -1].set(jnp.nan)
        after = select_mask(selector, mixed_query, mixed_key, is_causal=True)
        np.testing.assert_array_equal(after[:, :, : last + 1], before[:, :, : last + 1])


def assert_chunks_see_what_the_whole_sees(selector: Callable[..., BlockSelection], length: int = 200, starts=(0, 1, 50, 149)):
    """Chunked prefill, down to a single token, sees what a prefill of all tokens sees."""
    query, key = make_inputs(length, length)
    whole = select_mask(selector, query, key, is_causal=True)
    for start, stop in zip(starts, (*starts[1:], length), strict=True):
        part = select_mask(selector, query[:, start:stop], key[:, :stop], is_causal=True)
        np.testing.assert_array_equal(part, whole[:, :, start:stop, :stop])
