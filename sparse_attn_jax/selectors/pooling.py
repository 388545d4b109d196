"""What selectors that score whole blocks share: block means, which blocks see each other, and choosing by rank or by mass.

Query blocks are counted from query 0, KV blocks from key 0. All scores are float32. `BlockSelection.from_block_mask` makes the
lists of a chosen mask.
"""

import numbers

import jax
import jax.numpy as jnp

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.scoring_problem import absolute_positions
from sparse_attn_jax.selection import num_blocks

CUMULATIVE_RULES = ("exclusive", "inclusive")


def check_fraction(name: str, value: object) -> None:
    """Raises `ValueError` unless `value` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise ValueError(f"`{name}` is {value!r}; it must be a number in [0, 1].")


def check_fractions(name: str, value: object) -> None:
    """Raises `ValueError` unless `value` is a number in [0, 1], or a tuple with one for each query head."""
    if isinstance(value, tuple) and value:
        for i, x in enumerate(value):
            check_fraction(f"{name}[{i}]", x)
    else:
        check_fraction(name, value)


def per_head(name: str, value: float | tuple[float, ...], num_heads: int) -> jax.Array:
    """float32 [num_heads or 1, 1, 1], to broadcast against [batch, heads, rows, blocks]; a tuple has an entry for each head."""
    if isinstance(value, tuple) and len(value) != num_heads:
        raise ValueError(f"`{name}` has {len(value)} entries; the call has {num_heads} query heads.")
    return jnp.asarray(value, jnp.float32).reshape(-1, 1, 1)


def dot_operand(x: jax.Array) -> jax.Array:
    """`x` as matrix units take it: 16-bit floats as they are, whose products float32 holds exactly; others as float32."""
    return x if x.dtype.itemsize == 2 else x.astype(jnp.float32)


def block_means(x: jax.Array, block_size: int) -> jax.Array:
    """Means over blocks of tokens, the last over the tokens it has.

    Args:
      x: [batch, length, heads, head_dim].
      block_size: tokens per block.

    Returns:
      float32 [batch, num_blocks, heads, head_dim].
    """
    return block_sums(x, block_size, axis=1) / block_lengths(x.shape[1], block_size)[:, None, None]


def block_sums(x: jax.Array, block_size: int, axis: int = -1) -> jax.Array:
    """Sums over blocks along `axis`, float32; an incomplete last block sums what it has."""
    axis %= x.ndim
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % block_size)
    x = jnp.pad(x, padding)
    return x.reshape(*x.shape[:axis], -1, block_size, *x.shape[axis + 1 :]).sum(axis=axis + 1, dtype=jnp.float32)


def block_extremes(values: jax.Array, mask: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
    """The lowest and the highest value among the marked entries of each block.

    Args:
      values: int32 [..., n], at least 0; broadcasts with `mask`.
      mask: bool [..., n].
      block_size: entries per block.

    Returns:
      int32 [..., num_blocks] each; where nothing is marked, the highest int32 there is and -1.
    """
    highest = jnp.iinfo(jnp.int32).max
    padding = [(0, 0)] * (mask.ndim - 1) + [(0, -mask.shape[-1] % block_size)]

    def blocked(empty):
        marked = jnp.pad(jnp.where(mask, values, empty), padding, constant_values=empty)
        return marked.reshape(*marked.shape[:-1], -1, block_size)

    return blocked(highest).min(axis=-1), blocked(-1).max(axis=-1)


def block_lengths(length: int, block_size: int) -> jax.Array:
    """The tokens of each block: int32 [num_blocks]."""
    starts = jnp.arange(num_blocks(length, block_size), dtype=jnp.int32) * block_size
    return jnp.minimum(length - starts, block_size)


def pooled_logits(query_means: jax.Array, key_means: jax.Array, scale: float = 1.0) -> jax.Array:
    """scale * query block . key block, per query head.

    Args:
      query_means: float32 [batch, num_q_blocks, num_q_heads, head_dim]. Query head h meets KV head h // group_size.
      key_means: float32 [batch, num_kv_blocks, num_kv_heads, head_dim].
      scale: multiplies the dot products.

    Returns:
      float32 [batch, num_q_heads, num_q_blocks, num_kv_blocks].
    """
    batch, num_q_blocks, num_q_heads, head_dim = query_means.shape
    num_kv_heads = key_means.shape[2]
    grouped = query_means.reshape(batch, num_q_blocks, num_kv_heads, num_q_heads // num_kv_heads, head_dim) * scale
    logits = jnp.einsum("bqngd,bknd->bngqk", grouped, key_means, precision=jax.lax.Precision.HIGHEST)
    return logits.reshape(batch, num_q_heads, num_q_blocks, -1)


def max_touched_blocks(num_tokens: int, block_size: int) -> int:
    """How many blocks so many successive tokens can lie in, wherever they start."""
    return num_blocks(num_tokens - 1, block_size) + 1 if num_tokens else 0


def row_positions(q_offset: int | jax.Array | None, q_len: int, kv_len: int, q_block_size: int) -> tuple[jax.Array, jax.Array]:
    """The absolute positions of the first and the last query of each query block: int32 [batch or 1, num_q_blocks] each."""
    positions = absolute_positions(q_offset, q_len, kv_len)
    first = positions[:, ::q_block_size]
    return first, first + block_lengths(q_len, q_block_size) - 1


def causal_block_mask(
    q_offset: int | jax.Array | None, q_len: int, kv_len: int, q_block_size: int, kv_block_size: int
) -> jax.Array:
    """Which KV blocks have a key that some query of the block may see: bool [batch or 1, 1, num_q_blocks, num_kv_blocks]."""
    _, last = row_positions(q_offset, q_len, kv_len, q_block_size)
    starts = jnp.arange(num_blocks(kv_len, kv_block_size), dtype=jnp.int32) * kv_block_size
    return starts <= last[:, None, :, None]


def diagonal_block_mask(
    q_offset: int | jax.Array | None, q_len: int, kv_len: int, q_block_size: int, kv_block_size: int
) -> jax.Array:
    """Which KV blocks hold the position of some query of the block: bool [batch or 1, 1, num_q_blocks, num_kv_blocks].

    One per row if blocks of queries start where blocks of keys of their size do, else two; none where a block of queries lies
    before or after all keys.
    """
    first, last = (x[:, None, :, None] // kv_block_size for x in row_positions(q_offset, q_len, kv_len, q_block_size))
    ids = jnp.arange(num_blocks(kv_len, kv_block_size), dtype=jnp.int32)
    return (first <= ids) & (ids <= last)


def masked_softmax(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis where `mask` holds, 0 elsewhere and in rows without an entry; NaN counts as masked."""
    logits = jnp.where(mask & ~jnp.isnan(logits), logits, -jnp.inf)
    largest = logits.max(axis=-1, keepdims=True, initial=-jnp.inf)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(largest), largest, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def top_k_mask(scores: jax.Array, top_k: int | jax.Array, allowed: jax.Array, forced: jax.Array | None = None) -> jax.Array:
    """Marks the forced entries, then those of the highest score: `top_k` in all, or more if more are forced.

    Args:
      scores: float32 [..., n]. -inf and NaN are not chosen, unless forced. The lower id goes first among equals.
      top_k: an int, or int32 that broadcasts with [..., 1]; more than there are marks them all.
      allowed: bool, broadcasts with `scores`; nothing else is marked.
      forced: bool, broadcasts with `scores`; `None` forces nothing.

    Returns:
      bool [..., n].
    """
    allowed = jnp.broadcast_to(allowed, scores.shape)
    forced = allowed & (False if forced is None else forced)
    # The comparison also leaves out NaN.
    scores = jnp.where(allowed & ~forced & (scores > -jnp.inf), scores, -jnp.inf)
    num_free = top_k - forced.sum(axis=-1, keepdims=True, dtype=jnp.int32)
    return forced | _highest(scores, jnp.sort(scores, axis=-1, descending=True), num_free)


def _highest(scores: jax.Array, ordered: jax.Array, count: jax.Array) -> jax.Array:
    """Marks the `count` [..., 1] highest entries that are not -inf; `ordered` is `scores` from high to low."""
    last = jnp.clip(count - 1, 0, scores.shape[-1] - 1)
    threshold = jnp.take_along_axis(ordered, jnp.broadcast_to(last, (*scores.shape[:-1], 1)), axis=-1)
    above = scores > threshold
    level = scores == threshold
    num_level = count - above.sum(axis=-1, keepdims=True, dtype=jnp.int32)
    is_marked = above | (level & (jnp.cumsum(level, axis=-1, dtype=jnp.int32) <= num_level))
    return is_marked & (scores > -jnp.inf)


def cumulative_mass_mask(
    mass: jax.Array, threshold: float | jax.Array, rule: str, allowed: jax.Array, forced: jax.Array | None = None
) -> jax.Array:
    """Marks the forced entries, then those of the highest mass until a share of the whole mass is reached.

    With m_1 >= m_2 >= ... the masses in the order of marking, forced entries first, and total their sum, entry r is marked if

      "exclusive":  m_1 + ... + m_(r-1) <  threshold * total    the entry that reaches the share is marked (XAttention)
      "inclusive":  m_1 + ... + m_r     <= threshold * total    it is not (FlexPrefill; SpargeAttn's search to the right)

    The lower id goes first among equals. A threshold of 1 marks all that is allowed, whatever rounding does to the sums.

    Args:
      mass: float32 [..., n], not negative; NaN counts as 0.
      threshold: broadcasts with [..., 1].
      rule: "exclusive" or "inclusive".
      allowed: bool, broadcasts with `mass`; nothing else is marked or counts in the total.
      forced: bool, broadcasts with `mass`; `None` forces nothing. Their masses come first and count.

    Returns:
      bool [..., n].
    """
    checks.check_choice("rule", rule, CUMULATIVE_RULES)
    allowed = jnp.broadcast_to(allowed, mass.shape)
    forced = allowed & (False if forced is None else forced)
    mass = jnp.where(allowed & ~jnp.isnan(mass), mass, 0.0)
    forced_mass = jnp.where(forced, mass, 0.0).sum(axis=-1, keepdims=True)
    candidates = allowed & ~forced
    scores = jnp.where(candidates, mass, -jnp.inf)
    ordered = jnp.sort(scores, axis=-1, descending=True)
    up_to = forced_mass + jnp.cumsum(jnp.maximum(ordered, 0.0), axis=-1)
    before = jnp.concatenate([forced_mass, up_to[..., :-1]], axis=-1)
    share = threshold * up_to[..., -1:]
    num_marked = (before < share if rule == "exclusive" else up_to <= share).sum(axis=-1, keepdims=True, dtype=jnp.int32)
    return forced | _highest(scores, ordered, num_marked) | (candidates & (jnp.asarray(threshold) >= 1))


def cover_count(mass: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """The fewest entries of the last axis whose mass exceeds `threshold` of the whole: int32 [..., 1].

    One more than there are if none do, as with a threshold of 1.

    Args:
      mass: float32 [..., n], not negative, no NaN.
      threshold: broadcasts with [..., 1].
    """
    up_to = jnp.cumsum(jnp.sort(mass, axis=-1, descending=True), axis=-1)
    return 1 + (up_to <= threshold * up_to[..., -1:]).sum(axis=-1, keepdims=True, dtype=jnp.int32)
