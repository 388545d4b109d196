"""What selectors share that work on all tokens of a grid, permuted or not."""

import numbers

import jax

from sparse_attn_jax.permutation import TokenPermutation
from sparse_attn_jax.selectors.static_rows import check_call


def check_grid_call(
    query: jax.Array,
    key: jax.Array,
    is_causal: bool,
    q_offset: int | None,
    permutation: TokenPermutation | None,
    wanted: TokenPermutation | None,
    num_tokens: int,
    advice: str = "the pattern looks both ways",
) -> None:
    """Raises `ValueError` unless query and key are all tokens of a grid, permuted by `wanted` if that is not `None`."""
    check_call(query, key, is_causal, q_offset)
    if is_causal:
        raise ValueError(f"`is_causal` is True; on a grid it must be False: {advice}.")
    if q_offset is not None and not (isinstance(q_offset, numbers.Integral) and q_offset == 0):
        raise ValueError(f"`q_offset` is {q_offset!r}; on a grid it must be 0 or None.")
    if (permutation is None) != (wanted is None):
        found, needed = ("None", "given: call `sparse_attention`") if permutation is None else ("given", "None")
        raise ValueError(f"`permutation` is {found}; for this selector it must be {needed}.")
    length = num_tokens if wanted is None else wanted.permuted_len
    if permutation is not None and (permutation.length, permutation.permuted_len) != (num_tokens, length):
        raise ValueError(
            f"`permutation` is of {permutation.length} tokens to {permutation.permuted_len}; it must be that of the selector, "
            f"of {num_tokens} tokens to {length}."
        )
    for name, x in (("query", query), ("key", key)):
        if x.shape[1] != length:
            raise ValueError(f"`{name}` has {x.shape[1]} tokens; the grid has {num_tokens}, in this order {length}.")
