"""What the tests of selectors that read shapes and positions only share: what they mean, from one compiled program a call."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax.selection import BlockSelection
from sparse_attn_jax.testing import oracle


def shapes_of(q_len, kv_len, num_q_heads=4, num_kv_heads=2, batch=1) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """A query and a key without values: who reads one fails."""
    shapes = (batch, q_len, num_q_heads, 16), (batch, kv_len, num_kv_heads, 16)
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


def select(
    selector: Callable[..., BlockSelection], q_len: int, kv_len: int, *, is_causal=True, q_offset=None, more=None, **sizes
) -> tuple[BlockSelection, np.ndarray]:
    """A selection, and which key the op lets each query see: bool [batch, num_q_heads, q_len, kv_len].

    `more` are further arguments of the selector, `sizes` those of `shapes_of`.
    """
    query, key = shapes_of(q_len, kv_len, **sizes)
    batch, num_q_heads = query.shape[0], query.shape[2]

    @jax.jit
    def run():
        selection = selector(query, key, is_causal=is_causal, q_offset=q_offset, **(more or {}))
        if selection.predicate is None:
            return selection, True
        b, h, i, j = (jnp.asarray(x, jnp.int32) for x in np.ogrid[:batch, :num_q_heads, :q_len, :kv_len])
        offset = jnp.reshape(kv_len - q_len if q_offset is None else q_offset, (-1, 1, 1, 1))
        return selection, selection.predicate(b, h, i + offset, j)

    selection, kept = run()
    kept = np.asarray(kept)
    mask = oracle.attention_mask(
        selection.indices,
        batch=batch,
        num_q_heads=num_q_heads,
        q_len=q_len,
        kv_len=kv_len,
        q_block_size=selection.q_block_size,
        kv_block_size=selection.kv_block_size,
        is_causal=is_causal,
        q_offset=q_offset,
        predicate=lambda *_: kept,
    )
    return selection, mask


def assert_same_in_chunks(selector: Callable[..., BlockSelection], length: int, starts: tuple[int, ...], **options) -> None:
    """Chunked prefill, down to a single token, sees what a prefill of all tokens sees."""
    _, whole = select(selector, length, length, **options)
    for start, stop in zip(starts, (*starts[1:], length), strict=True):
        _, part = select(selector, stop - start, stop, **options)
        np.testing.assert_array_equal(part, whole[:, :, start:stop, :stop])


def assert_no_list_repeats(selection: BlockSelection, kv_len: int) -> None:
    """Ids are in range, and each stands once in its list."""
    ids = np.sort(selection.indices)
    assert ids.min() >= -1 and ids.max() < -(-kv_len // selection.kv_block_size)
    assert (np.diff(ids) != 0)[ids[..., 1:] >= 0].all()
