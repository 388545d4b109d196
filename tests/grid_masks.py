"""What a selection of a grid's tokens means, in the order that they had before the selector's permutation."""

import jax
import jax.numpy as jnp
import numpy as np
from fast_calls import compile_fast

from sparse_attn_jax.selection import BlockSelection
from sparse_attn_jax.testing import oracle


def shape_of(length: int, num_heads: int) -> jax.ShapeDtypeStruct:
    """A query or key without values: who reads one fails."""
    return jax.ShapeDtypeStruct((1, length, num_heads, 64), jnp.bfloat16)


@compile_fast
def _evaluate(predicate, *places):
    return predicate(*places)


def selected_mask(selector, length: int, num_q_heads: int = 1, num_kv_heads: int = 1) -> tuple[BlockSelection, np.ndarray]:
    """A selection, and what each token sees by the op's contract: bool [num_q_heads, length, length]."""
    permutation = selector.permutation(shape_of(length, num_q_heads), shape_of(length, num_kv_heads))
    options = {} if permutation is None else dict(permutation=permutation)
    order = np.arange(length) if permutation is None else np.asarray(permutation.order)
    selection = selector(shape_of(len(order), num_q_heads), shape_of(len(order), num_kv_heads), **options)
    kept = np.True_
    if selection.predicate is not None:
        places = [jnp.asarray(x, jnp.int32) for x in np.ogrid[:1, :num_q_heads, : len(order), : len(order)]]
        kept = np.asarray(_evaluate(selection.predicate, *places))
    permuted = oracle.attention_mask(
        selection.indices,
        batch=1,
        num_q_heads=num_q_heads,
        q_len=len(order),
        kv_len=len(order),
        q_block_size=selection.q_block_size,
        kv_block_size=selection.kv_block_size,
        predicate=lambda *_: kept,
    )[0]
    place = np.argsort(np.where(order < 0, length, order), kind="stable")[:length]
    assert not np.delete(permuted[:, place], place, axis=2).any(), "a token sees padding"
    return selection, permuted[:, place][:, :, place]
