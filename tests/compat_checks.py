"""What the tests of the originals' interfaces share: packed sequences, and attention to them by the oracle."""

import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax.testing import oracle


def signature_of(function: Callable) -> str:
    """Names, order and defaults, as a project writes them: `q, k, causal=False`."""
    words = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        has_default = parameter.default is not inspect.Parameter.empty
        words.append(f"{parameter.name}={parameter.default!r}" if has_default else parameter.name)
    return ", ".join(words)


def cumulative(lengths: Sequence[int]) -> jax.Array:
    return jnp.asarray(np.cumsum((0, *lengths)), jnp.int32)


def random_packed(q_lens, kv_lens, num_q_heads=4, num_kv_heads=2, head_dim=8, seed=0) -> tuple[jax.Array, ...]:
    """Packed q, k and v."""
    rng = np.random.default_rng(seed)
    shapes = (sum(q_lens), num_q_heads), (sum(kv_lens), num_kv_heads), (sum(kv_lens), num_kv_heads)
    return tuple(jnp.asarray(rng.standard_normal((*shape, head_dim)), jnp.float32) for shape in shapes)


def causal_mask(q_len: int, kv_len: int) -> np.ndarray:
    """bool [q_len, kv_len], aligned to the bottom right corner."""
    return np.arange(kv_len) <= np.arange(q_len)[:, None] + kv_len - q_len


def packed_mask(masks: Sequence[np.ndarray]) -> np.ndarray:
    """bool [heads, q_len, kv_len] of each sequence -> [heads, total_q, total_kv], False across sequences."""
    bounds = np.cumsum([(0, 0), *(mask.shape[1:] for mask in masks)], axis=0)
    packed = np.zeros((masks[0].shape[0], *bounds[-1]), bool)
    for mask, start, stop in zip(masks, bounds[:-1], bounds[1:], strict=True):
        packed[:, start[0] : stop[0], start[1] : stop[1]] = mask
    return packed


def attend_packed(masks: Sequence[np.ndarray], q, k, v, d_out=0.0, **options) -> list[np.ndarray]:
    """out [tokens, heads, dim], lse [tokens, heads], +inf where a query sees nothing, d_q, d_k and d_v, by the oracle."""
    operands = (np.asarray(x)[None] for x in (q, k, v))
    out, lse, *gradients = oracle.attention(packed_mask(masks)[None], *operands, d_out=d_out, **options)[:5]
    return [out[0], np.where(np.isneginf(lse[0]), np.inf, lse[0]), *(x[0] for x in gradients)]


def assert_close(found, wanted, tolerance=2e-5) -> None:
    """Infinities in the same places, the rest within the tolerance."""
    assert found.shape == wanted.shape
    np.testing.assert_allclose(np.asarray(found), wanted, atol=tolerance, rtol=tolerance)
