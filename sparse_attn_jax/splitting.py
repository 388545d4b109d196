"""How long lists of a plan's inverse are split, so that several thread blocks share the work of one KV block."""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.selection import num_blocks

# A list that is so many times longer than the others are on average, at most, is walked in parts: the keys that all queries
# attend, as the first.
LONG_LIST = 4
MIN_ENTRIES_PER_PART = 64


@dataclasses.dataclass(frozen=True)
class Parts:
    """How the lists of the inverse are split between thread blocks. A KV block has at least one part.

    Attributes:
      first: int32 [plan batch, plan heads, num_kv_blocks + 1], the number of the parts of all blocks before.
      first_partial: int32 [plan batch, plan heads, num_kv_blocks], the same of blocks with several parts only.
      max_partials: no row has more parts of blocks with several; nor more than this plus num_kv_blocks in all.
    """

    first: jax.Array
    first_partial: jax.Array
    max_partials: int


def split_lists(plan: TilePlan) -> Parts:
    num_kv_blocks = num_blocks(plan.kv_len, plan.kv_block_size)
    num_entries = plan.inverse_tiles.shape[-1]
    entries_per_part = max(MIN_ENTRIES_PER_PART, LONG_LIST * num_blocks(num_entries, num_kv_blocks))
    max_partials = 2 * num_entries // entries_per_part
    lengths = jnp.clip(jnp.diff(plan.inverse_offsets, axis=-1), 0, num_entries)
    parts = jnp.maximum(num_blocks(lengths, entries_per_part), 1)
    several = jnp.where(parts > 1, parts, 0)
    end = jnp.cumsum(several, axis=-1)
    # Offsets that contradict themselves: such a list stays in one part.
    fits = end <= max_partials
    parts = jnp.where(fits, parts, 1)
    first = jnp.pad(jnp.cumsum(parts, axis=-1), [(0, 0), (0, 0), (1, 0)])
    return Parts(first, end - several, max_partials)
