"""Block-sparse flash attention, backward, as a custom call of the hand-written CUDA kernels."""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_attn_jax.implementations.cuda import library
from sparse_attn_jax.implementations.cuda.arguments import AXES, attention_arguments, attention_attributes
from sparse_attn_jax.implementations.cuda.custom_call import EntryPoint, Result
from sparse_attn_jax.implementations.cuda.planning import add_inverse
from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.problem import Operands, Problem, TokenMask
from sparse_attn_jax.selection import num_blocks

BACKWARD = EntryPoint(
    library.ATTENTION_BACKWARD,
    (
        *AXES.values(),
        *("bshd", "bsh", "bsh"),  # d_out, lse, delta
        *("Ppo", "Ppe", "Ppe"),  # the inverse: offsets, tiles, slots
        *("Ppo", "Ppa"),  # the parts of its lists: parts, first_partials
    ),
    (
        Result("d_query", "bshd"),
        Result("d_key", "btkd"),
        Result("d_value", "btkd"),
        Result("d_key_bias", "bkt", "float32"),
        Result("partials", "bkmuv", "float32"),
        Result("num_taken", "bk", "int32"),
    ),
)

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


def backward(
    problem: Problem,
    operands: Operands,
    plan: TilePlan,
    mask: TokenMask,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
) -> Operands:
    """Gradients of the operands, each in its operand's shape and dtype, from the results of `forward` and their cotangents."""
    plan = add_inverse(plan)
    parts = split_lists(plan)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    bias = operands.key_bias
    arguments = (
        *attention_arguments(problem, operands, plan, mask),
        d_out.astype(operands.query.dtype),
        lse,
        delta,
        plan.inverse_offsets,
        plan.inverse_tiles,
        plan.inverse_slots,
        parts.first,
        parts.first_partial,
    )
    attributes = library.call_attributes(problem) | attention_attributes(problem, plan)
    sizes = dict(m=parts.max_partials, u=problem.kv_block_size, v=2 * problem.head_dim + 2)
    without = ("d_key_bias",) if bias is None else ()
    d_query, d_key, d_value, d_bias, *_ = BACKWARD(*arguments, sizes=sizes, without=without, **attributes)
    d_bias = None if bias is None else d_bias.astype(bias.dtype)
    return dataclasses.replace(operands, query=d_query, key=d_key, value=d_value, key_bias=d_bias)
