"""`select_attn_ops` for Ascend: Quest's extrema of keys by block, kept in pages, and the choice of blocks for decoding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.block_bounds import bound_scores, stack_bounds
from sparse_attn_jax.block_top_k import list_highest
from sparse_attn_jax.page_tables import look_up, read_pages
from sparse_attn_jax.quest_metadata import QuestMetadata
from sparse_attn_jax.selection import num_blocks
from sparse_attn_jax.validation import is_array, require

METADATA_AXES = ("num_meta_blocks", "block_size", "num_kv_heads", "head_dim")


def quest_prefill_metadata(
    k_cache: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    metadata_block_tables: jax.Array,
    maxblocks: jax.Array,
    minblocks: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The largest and the smallest key of every block, channel by channel, in the pages of the metadata.

    Block j of request r has row j % block_size of metadata block metadata_block_tables[r, j // block_size]. A last partial
    block counts its own tokens only. The rows after the last block, in the metadata blocks that a request uses, are zero;
    metadata blocks of no request stay as they are.

    Unlike the original: what it writes in place is returned; any block size and head size will do.

    Args:
      k_cache: [num_kv_blocks, block_size, num_kv_heads, head_dim].
      block_tables: int32 [batch, blocks of a request], which blocks of the cache hold its keys.
      seq_lens: int32 [batch], tokens of each request.
      metadata_block_tables: int32 [batch, metadata blocks of a request].
      maxblocks: [num_meta_blocks, block_size, num_kv_heads, head_dim], which the maxima are written to.
      minblocks: as maxblocks, for the minima.

    Returns:
      (maxblocks, minblocks), with these requests' rows replaced.

    Raises:
      ValueError: an argument is wrong; the message names it.
    """
    checks.check_array("k_cache", k_cache, ("num_kv_blocks", "block_size", "num_kv_heads", "head_dim"))
    _check_metadata(maxblocks, minblocks, *k_cache.shape[1:], like="k_cache", dtype=k_cache.dtype)
    block_size = k_cache.shape[1]
    tables = dict(block_tables=block_tables, metadata_block_tables=metadata_block_tables)
    seq_lens = _check_tables(None, **tables, seq_lens=seq_lens)
    page = jnp.broadcast_to(jnp.arange(metadata_block_tables.shape[1], dtype=jnp.int32), metadata_block_tables.shape)
    is_used = page < -(-seq_lens[:, None] // block_size**2)
    page = look_up(metadata_block_tables, jnp.where(is_used, page, -1), maxblocks.shape[0])
    maxblocks, minblocks = (x.at[page].set(0, mode="drop") for x in (maxblocks, minblocks))
    metadata = QuestMetadata(maxblocks, minblocks, jnp.zeros_like(seq_lens), metadata_block_tables, block_size=block_size)
    metadata = metadata.refresh(k_cache, 0, seq_lens, block_tables=block_tables)
    return metadata.maximum, metadata.minimum


def quest_block_select_paged(
    query: jax.Array,
    maxblocks: jax.Array,
    minblocks: jax.Array,
    metadata_block_tables: jax.Array,
    seq_lens: jax.Array,
    k: int,
) -> jax.Array:
    """The `k` blocks of each request that bound the product of the group's mean query with their keys the highest.

    score[n, j] = sum over channels of max(m * maximum[j], m * minimum[j]), m the mean of the query heads of KV head n

    Ids are logical: counted from the request's first block, before any block table. The mean query is no bound for each of the
    heads: opposite heads cancel.

    Unlike the original: blocks behind the request's last are told from `seq_lens`, not by zeros in the metadata, which outdo
    negative scores; with fewer than `k` blocks the list ends in -1; ids ascend, the lower one first among equal scores; group,
    head and block size, `k` and the number of metadata blocks are free.

    Args:
      query: [batch, num_heads, head_dim], one token per request. Query head h reads KV head h // (num_heads // num_kv_heads).
      maxblocks: [num_meta_blocks, block_size, num_kv_heads, head_dim], of `quest_prefill_metadata`.
      minblocks: as maxblocks.
      metadata_block_tables: int32 [batch, metadata blocks of a request].
      seq_lens: int32 [batch], tokens of each request; the metadata must cover them.
      k: blocks to choose.

    Returns:
      int32 [batch, num_kv_heads, k], ascending, -1 last.

    Raises:
      ValueError: an argument is wrong; the message names it.

    Carries no gradient.
    """
    return quest_block_select_paged_w(query, maxblocks, minblocks, metadata_block_tables, seq_lens, -1, k)


def quest_block_select_paged_in_out(
    query: jax.Array,
    maxblocks: jax.Array,
    minblocks: jax.Array,
    metadata_block_tables: jax.Array,
    seq_lens: jax.Array,
    selected_indices: jax.Array,
) -> jax.Array:
    """`quest_block_select_paged` with k from an array for the ids, of which only the shape is read.

    Args:
      query, maxblocks, minblocks, metadata_block_tables, seq_lens: as in `quest_block_select_paged`.
      selected_indices: int32 [batch, num_kv_heads, k], which the original overwrites.

    Returns:
      As `quest_block_select_paged`.

    Raises:
      ValueError: an argument is wrong.
    """
    k = _size_of(selected_indices, query, maxblocks)
    return quest_block_select_paged(query, maxblocks, minblocks, metadata_block_tables, seq_lens, k)


def quest_block_select_paged_w(
    query: jax.Array,
    maxblocks: jax.Array,
    minblocks: jax.Array,
    metadata_block_tables: jax.Array,
    seq_lens: jax.Array,
    tokens_since_metadata_update: int | jax.Array,
    k: int,
) -> jax.Array:
    """`quest_block_select_paged` for metadata that is some tokens old: sink and recent blocks are chosen whatever they score.

    With u = seq_lens - tokens_since_metadata_update, the metadata is that of the whole blocks before token u. Chosen are
    block 0, every block from floor(u / block_size) to the last, and the best of the rest, `k` in all.

    Unlike the original, whose rule misses the newest block where u is a multiple of the block size and seq_lens is not (129
    tokens, 1 since the update), and which may write id -1 or the same id twice. The original's `_w` is the reference for its
    `_in_out_w`.

    Args:
      query, maxblocks, minblocks, metadata_block_tables, seq_lens: as in `quest_block_select_paged`; the metadata need not
        cover more than the whole blocks before token u.
      tokens_since_metadata_update: -1: choose by score alone, from all blocks. Else an int of at least 0, or an integer array
        [] or [batch] of such: what is known only at run time does not compile anew every token.
      k: blocks to choose, at least 2 + ceil(t / block_size) for an int t of `tokens_since_metadata_update`. For an array at
        least 3, which is enough for up to block_size tokens; recent blocks beyond `k` are left out, the newest first.

    Returns:
      int32 [batch, num_kv_heads, k], ascending, -1 last.

    Raises:
      ValueError: an argument is wrong; the message names it.

    Carries no gradient.
    """
    checks.check_array("query", query, ("batch", "num_heads", "head_dim"))
    checks.check_array("maxblocks", maxblocks, METADATA_AXES)
    block_size, num_kv_heads = maxblocks.shape[1:3]
    batch = query.shape[0]
    like = dict(like="maxblocks", dtype=maxblocks.dtype)
    _check_metadata(maxblocks, minblocks, block_size, num_kv_heads, query.shape[2], **like)
    seq_lens = _check_tables(batch, metadata_block_tables=metadata_block_tables, seq_lens=seq_lens)
    is_multiple = num_kv_heads > 0 and query.shape[1] % num_kv_heads == 0
    require(is_multiple, "query", query, f"of a multiple of {num_kv_heads} heads, those of `maxblocks`")
    num_unlisted = _check_update(tokens_since_metadata_update, batch, block_size, k)

    query, maxblocks, minblocks = jax.lax.stop_gradient((query, maxblocks, minblocks))
    (maximum, has_page), (minimum, _) = (read_pages(x, metadata_block_tables) for x in (maxblocks, minblocks))
    scores = bound_scores(query[:, None], stack_bounds(maximum, minimum), "mean_q")[..., 0]
    scores = jnp.where(has_page[:, None], scores, -jnp.inf)
    # Blocks since the update may lie behind all that the tables have room for.
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, num_unlisted)), constant_values=-jnp.inf)
    block = jnp.arange(scores.shape[2], dtype=jnp.int32)
    since = jnp.reshape(jnp.asarray(tokens_since_metadata_update, jnp.int32), (-1, 1))
    exists = block < -(-seq_lens[:, None] // block_size)
    first_recent = jnp.maximum(seq_lens[:, None] - since, 0) // block_size
    is_forced = exists & (since >= 0) & ((block == 0) | (block >= first_recent))
    ids = list_highest(scores[..., None], exists[:, None, :, None], is_forced[:, None, :, None], k)
    return ids[..., 0]


def quest_block_select_paged_in_out_w(
    query: jax.Array,
    maxblocks: jax.Array,
    minblocks: jax.Array,
    metadata_block_tables: jax.Array,
    seq_lens: jax.Array,
    tokens_since_metadata_update: int | jax.Array,
    selected_indices: jax.Array,
) -> jax.Array:
    """`quest_block_select_paged_w` with k from an array for the ids, of which only the shape is read.

    Args:
      query, maxblocks, minblocks, metadata_block_tables, seq_lens, tokens_since_metadata_update: as in
        `quest_block_select_paged_w`.
      selected_indices: int32 [batch, num_kv_heads, k], which the original overwrites.

    Returns:
      As `quest_block_select_paged_w`.

    Raises:
      ValueError: an argument is wrong.
    """
    tables = metadata_block_tables, seq_lens, tokens_since_metadata_update
    return quest_block_select_paged_w(query, maxblocks, minblocks, *tables, _size_of(selected_indices, query, maxblocks))


def _check_metadata(maxblocks, minblocks, block_size: int, num_kv_heads: int, head_dim: int, *, like: str, dtype: Any) -> None:
    for name, x in (("maxblocks", maxblocks), ("minblocks", minblocks)):
        checks.check_array(name, x, METADATA_AXES)
        require(x.dtype == dtype, name, x, f"of dtype {dtype}, as `{like}`")
        shape = (maxblocks.shape[0], block_size, num_kv_heads, head_dim)
        require(tuple(x.shape) == shape, name, x, f"of shape {list(shape)}")


def _check_tables(batch: int | None, *, seq_lens: jax.Array, **tables: jax.Array) -> jax.Array:
    """The lengths, negative ones as 0. `None` takes the batch from them."""
    needed = f"int32 [{'batch' if batch is None else batch}]"
    is_list = is_array(seq_lens) and len(seq_lens.shape) == 1 and seq_lens.dtype == jnp.int32
    require(is_list and batch in (None, seq_lens.shape[0]), "seq_lens", seq_lens, needed)
    batch = seq_lens.shape[0]
    for name, x in tables.items():
        is_table = is_array(x) and len(x.shape) == 2 and x.shape[0] == batch and x.shape[1] > 0 and x.dtype == jnp.int32
        require(is_table, name, x, f"int32 [{batch}, blocks of a request], at least one")
    return jnp.maximum(seq_lens, 0)


def _check_update(since: int | jax.Array, batch: int, block_size: int, k: int) -> int:
    """The most blocks that may be recent, and not in the metadata; `k` has to have room for them and a sink."""
    checks.check_int("k", k, 1)
    if isinstance(since, int | np.integer) and not isinstance(since, bool):
        checks.check_int("tokens_since_metadata_update", since, -1)
        if since == -1:
            return 0
        num_recent = num_blocks(since, block_size) + 1
    else:
        is_array = hasattr(since, "dtype") and jnp.issubdtype(since.dtype, jnp.integer) and since.shape in ((), (batch,))
        require(is_array, "tokens_since_metadata_update", since, f"an int of at least -1, or integers [] or [{batch}]")
        num_recent = 2
    require(k > num_recent, "k", k, f"at least {num_recent + 1}: block 0 and {num_recent} recent blocks count inside it")
    return num_recent


def _size_of(selected_indices: jax.Array, query: jax.Array, maxblocks: jax.Array) -> int:
    checks.check_array("query", query, ("batch", "num_heads", "head_dim"))
    checks.check_array("maxblocks", maxblocks, METADATA_AXES)
    shape = (query.shape[0], maxblocks.shape[2])
    is_output = is_array(selected_indices) and len(selected_indices.shape) == 3 and selected_indices.shape[:2] == shape
    is_output = is_output and selected_indices.dtype == jnp.int32
    require(is_output, "selected_indices", selected_indices, "int32 [batch, num_kv_heads, k]")
    return selected_indices.shape[2]
