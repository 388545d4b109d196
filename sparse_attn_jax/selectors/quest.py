"""`Quest`: the blocks in which some key could attract the query most, by a bound from the extrema of the channels."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_attn_jax import dispatch, validation
from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.block_bounds import block_extrema, bound_scores, list_by_limits, stack_bounds
from sparse_attn_jax.bound_problem import BoundOperands, BoundProblem
from sparse_attn_jax.problem import device_of
from sparse_attn_jax.query_chunks import map_chunks
from sparse_attn_jax.quest_metadata import QuestMetadata
from sparse_attn_jax.scoring_problem import absolute_positions
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.static_rows import check_call

GROUPS = ("max", "mean_bound", "mean_q", None)

# Scores held at once, in elements, and the fewest queries at a time.
CHUNK_SCORES = 2**20
MIN_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Quest:
    """Query-aware block selection of Quest (Tang et al., 2024; mit-han-lab/Quest), without parameters.

    A block's score is a bound on the product of the query with any of its keys, from the maximum M and the minimum m of each
    channel over the keys:

      u[h, b] = sum_d max(query[h, d] * M[b, d], query[h, d] * m[b, d])  >=  query[h] . key[j]    for every key j of block b

    Scored are blocks that are complete before the query. Kept, inside `top_k`, are the first blocks (sinks), the query's own
    block, and in decoding every block that is newer than the metadata; then the best of the others. A block with a NaN among
    its keys scores NaN and is not chosen unless it is forced; the lower id wins a tie.

    The paper scores per query head and does not say what the query heads that share a KV head do: `group`. Ascend's operators
    (CANN select_attn_ops) average the queries ("mean_q"), which bounds none of them: two opposite heads cancel. They also
    score metadata of blocks that do not exist, list a block of the window twice, and leave out the newest block where the
    metadata ends with a block and the sequence does not; none of that is done here.

    Attributes:
      top_k: blocks per query, the forced ones included.
      block_size: tokens per block; 16 is what the paper validates, and the bound is looser the larger the block.
      group: "max": the largest of the bounds of the query heads of a KV head; "mean_bound": their mean; "mean_q": the bound of
        the mean query; `None`: a list for each query head.
      num_sink_blocks: leading blocks that every query keeps.
      num_window_blocks: most recent blocks that every query keeps, its own included; those newer than the metadata are kept
        besides. "auto": its own, if attention is causal.
    """

    top_k: int
    block_size: int = 16
    group: str | None = "max"
    num_sink_blocks: int = 1
    num_window_blocks: int | str = "auto"

    causal_safe: ClassVar[bool] = True

    def __post_init__(self):
        checks.check_int("block_size", self.block_size, 1)
        checks.check_choice("group", self.group, GROUPS)
        if isinstance(self.num_window_blocks, str):
            checks.check_choice("num_window_blocks", self.num_window_blocks, ("auto",))
        else:
            checks.check_int("num_window_blocks", self.num_window_blocks, 0)
        checks.check_forced_blocks(self.top_k, self.num_sink_blocks, max(1, self._window(0)))

    def __call__(
        self, query: jax.Array, key: jax.Array, *, is_causal: bool = False, q_offset: int | jax.Array | None = None
    ) -> BlockSelection:
        """Selects for one call; the arguments are those of the attention op.

        Args:
          query: [batch, q_len, num_q_heads, head_dim], any floating dtype. Query head h reads KV head h // group_size.
          key: [batch, kv_len, num_kv_heads, head_dim].
          is_causal: no block after the query's own is listed, and its own always is. Without it all blocks are scored.
          q_offset: absolute position of query 0, an int or an integer array, scalar or [batch]; `None` is kv_len - q_len.

        Returns:
          A `BlockSelection` with a list per query (`q_block_size=1`): int32 [batch, num_kv_heads (num_q_heads if `group` is
          `None`), q_len, top_k], ascending, -1 last.

        Raises:
          ValueError: an argument is wrong.

        Carries no gradient. Memory is linear in the lengths.
        """
        check_call(query, key, is_causal, q_offset)
        query, key = jax.lax.stop_gradient((query, key))
        (batch, q_len), kv_len = query.shape[:2], key.shape[1]
        bounds = stack_bounds(*_extrema_of(key, self.block_size))
        positions = absolute_positions(q_offset, q_len, kv_len)
        heads = query.shape[2] if self.group is None else key.shape[2]
        num_scored = num_blocks(kv_len, self.block_size)
        if q_len == 0:
            return self._selection(jnp.zeros((batch, heads, 0, self.top_k), jnp.int32))

        chunk = min(max(CHUNK_SCORES // max(batch * query.shape[2] * num_scored, 1), MIN_CHUNK), q_len)

        def select_chunk(start):
            position = jax.lax.dynamic_slice_in_dim(positions, start, chunk, axis=1)
            scores = bound_scores(jax.lax.dynamic_slice_in_dim(query, start, chunk, axis=1), bounds, self.group)
            own = position // self.block_size
            limits = self._limits(own, own if is_causal else num_scored, is_causal=is_causal)
            return list_by_limits(scores, limits, self.top_k)

        return self._selection(map_chunks(select_chunk, q_len, chunk))

    def select(
        self,
        query: jax.Array,
        metadata: QuestMetadata,
        *,
        seq_lens: jax.Array,
        tokens_since_update: jax.Array | int | None = None,
        out: jax.Array | None = None,
        implementation: str | Sequence[str] | None = None,
    ) -> jax.Array:
        """Selects for decoding, from metadata that may lag behind the sequences.

        With mru the tokens that the metadata covers and p a query's position, blocks b < min(mru, p) // block_size are scored.
        The others up to the query's own are kept, and so are the sinks. Should that be more than `top_k`, the newest stay.

        Args:
          query: [batch, q_len, num_q_heads, head_dim], the last tokens of each sequence: 1, or a few that are speculated.
          metadata: of the keys; blocks of `block_size` tokens.
          seq_lens: int32 [batch], tokens of each sequence, the queries included; values outside [0, metadata.max_len] count
            as the nearest inside.
          tokens_since_update: int32 [batch] or an int, for a caller who knows that so many of the newest tokens are not
            covered: mru is then at most seq_lens minus it. A negative number forces nothing, and scores the metadata's last
            block even if it is incomplete, as Ascend's operators do with -1. `None`: mru is `metadata.covered_len`.
          out: int32, of the result's shape: a buffer that the result takes the place of, if the caller donates it.
          implementation: "xla", "mosaic" or "cuda", or a sequence of them to try in order. Default: the first that can.

        Returns:
          int32 [batch, num_kv_heads (num_q_heads if `group` is `None`), q_len, top_k], logical ids, ascending, -1 last:
          `page_selection` of `paged_block_sparse_attention` with `selection_block_size=block_size`.

        Raises:
          ValueError: an argument is wrong, or metadata of another batch, number of heads, head_dim or block size.
          NotImplementedError: none of the implementations asked for can run this call; the message lists every reason.
        """
        self._check_select(query, metadata, seq_lens, tokens_since_update)
        batch, q_len, num_q_heads, _ = query.shape
        heads = num_q_heads if self.group is None else metadata.maximum.shape[2]
        shape = (batch, heads, q_len, self.top_k)
        if out is not None:
            fits = validation.is_array(out) and out.dtype == jnp.int32 and tuple(out.shape) == shape
            validation.require(fits, "out", out, f"int32 of shape {list(shape)}")
        problem = self._problem(query, metadata)
        name = dispatch.choose(problem, implementation)
        seq_lens = jnp.clip(seq_lens, 0, metadata.max_len)[:, None]
        position = seq_lens - q_len + jnp.arange(q_len, dtype=jnp.int32)  # [batch, q_len]
        own = position // self.block_size
        covered = jnp.clip(metadata.covered_len[:, None], 0, seq_lens)
        is_forcing = None
        if tokens_since_update is not None:
            since = jnp.broadcast_to(jnp.asarray(tokens_since_update, jnp.int32), (batch,))[:, None]
            is_forcing = since >= 0
            covered = jnp.where(is_forcing, jnp.minimum(covered, seq_lens - jnp.minimum(since, seq_lens)), covered)
        num_scored = jnp.minimum(covered // self.block_size, own)
        if is_forcing is not None:
            num_scored = jnp.where(is_forcing, num_scored, jnp.minimum(num_blocks(covered, self.block_size), own + 1))
        limits = jnp.broadcast_to(self._limits(own, num_scored, is_forcing=is_forcing), (batch, q_len, 4))
        arrays = jax.lax.stop_gradient((query, metadata.maximum, metadata.minimum))
        operands = BoundOperands(*arrays, metadata.block_tables, limits)
        ids = dispatch.get(name).select_by_bounds(problem, operands)
        return ids if out is None else out.at[:].set(ids)

    def _selection(self, ids: jax.Array) -> BlockSelection:
        return BlockSelection(ids, q_block_size=1, kv_block_size=self.block_size)

    def _window(self, auto: int) -> int:
        return auto if isinstance(self.num_window_blocks, str) else self.num_window_blocks

    def _problem(self, query: jax.Array, metadata: QuestMetadata) -> BoundProblem:
        batch, q_len, num_q_heads, head_dim = query.shape
        return BoundProblem(
            batch=batch,
            q_len=q_len,
            num_q_heads=num_q_heads,
            num_kv_heads=metadata.maximum.shape[2],
            head_dim=head_dim,
            dtype=query.dtype.name,
            extrema_dtype=metadata.maximum.dtype.name,
            num_blocks=metadata.num_blocks,
            block_size=self.block_size,
            page_rows=None if metadata.block_tables is None else metadata.maximum.shape[1],
            group=self.group,
            top_k=self.top_k,
            **device_of(query)._asdict(),
        )

    def _check_select(self, query, metadata, seq_lens, tokens_since_update) -> None:
        validation.require(isinstance(metadata, QuestMetadata), "metadata", metadata, "a QuestMetadata")
        checks.check_array("query", query, checks.QUERY_AXES)
        batch, _, num_q_heads, head_dim = query.shape
        num_kv_heads = metadata.maximum.shape[2]
        for name, found, needed in (
            ("block_size", metadata.block_size, self.block_size),
            ("batch", metadata.batch, batch),
            ("head_dim", metadata.maximum.shape[3], head_dim),
        ):
            if found != needed:
                raise ValueError(f"`metadata` has {name} {found}; these arguments need {needed}.")
        if num_q_heads % num_kv_heads:
            raise ValueError(f"`query` has {num_q_heads} heads; they must be a multiple of the metadata's {num_kv_heads}.")
        fits = validation.is_array(seq_lens) and seq_lens.dtype == jnp.int32 and tuple(seq_lens.shape) == (batch,)
        validation.require(fits, "seq_lens", seq_lens, f"int32 of shape [{batch}]")
        if tokens_since_update is not None:
            validation.check_integers("tokens_since_update", tokens_since_update, (batch,))

    def _limits(self, own, num_scored, *, is_causal: bool = True, is_forcing=None) -> jax.Array:
        """What each query keeps and what competes, int32 [batch or 1, queries, 4], see `BoundOperands`.

        Args:
          own: int32 [batch or 1, queries], the block of each query.
          num_scored: an int, or int32 [batch or 1, queries]: the leading blocks that compete by score.
          is_causal: the blocks from `num_scored` to the query's own are kept, and none after it.
          is_forcing: bool [batch, queries], the queries that keep blocks; `None` is all.
        """
        num_scored = jnp.broadcast_to(jnp.asarray(num_scored, jnp.int32), own.shape)
        num_sinks = jnp.full_like(own, self.num_sink_blocks)
        end = own + 1
        oldest = end - self._window(0)
        if is_causal:
            oldest = jnp.minimum(oldest, num_scored)
            num_sinks, num_scored = jnp.minimum(num_sinks, end), jnp.minimum(num_scored, end)
        # With the sinks, no more than there is room for.
        oldest = jnp.maximum(oldest, end - (self.top_k - self.num_sink_blocks))
        if is_forcing is not None:
            num_sinks, oldest = jnp.where(is_forcing, num_sinks, 0), jnp.where(is_forcing, oldest, end)
        return jnp.stack([num_sinks, oldest, end, num_scored], axis=-1)


def _extrema_of(key: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
    """maximum and minimum [batch, num_blocks, num_kv_heads, head_dim] of the blocks of [batch, kv_len, ...]."""
    batch, kv_len, *rest = key.shape
    count = num_blocks(kv_len, block_size)
    padded = jnp.pad(key, [(0, 0), (0, count * block_size - kv_len), (0, 0), (0, 0)])
    exists = jnp.arange(count * block_size).reshape(1, count, block_size) < kv_len
    return block_extrema(padded.reshape(batch, count, block_size, *rest), exists)
