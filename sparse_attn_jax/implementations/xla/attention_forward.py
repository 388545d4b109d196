"""Block-sparse flash attention, forward, in XLA: a loop over steps of a few query tiles, and in it one over their blocks."""

import jax
import jax.numpy as jnp

from sparse_attn_jax.implementations.xla import tiles
from sparse_attn_jax.implementations.xla.config import choose_config
from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.problem import Operands, Problem, TokenMask


def forward(problem: Problem, operands: Operands, plan: TilePlan, mask: TokenMask) -> tuple[jax.Array, jax.Array]:
    """Attention of each query over the visible keys of its selected blocks.

    Returns:
      out [batch, q_len, num_q_heads, value_head_dim] in the query's dtype, and the natural-log lse [batch, q_len, num_q_heads],
      float32 (float64 for float64 inputs). A row that sees nothing has out 0 and lse -inf.
    """
    geometry = tiles.make_geometry(problem, plan, choose_config(problem, plan))
    lists = tiles.make_lists(geometry, plan, mask)
    tables = tiles.make_mask_tables(geometry, mask)
    query = tiles.to_tiles(geometry, operands.query)
    keys = tiles.to_key_blocks(geometry, operands)

    def attend_step(index, carry):
        out, lse = carry
        step = tiles.locate(geometry, lists, index)
        step_out, step_lse = _attend(geometry, step, query, keys, lists, tables)
        return tiles.write_rows(step, out, step_out.astype(operands.query.dtype)), tiles.write_rows(step, lse, step_lse)

    out = tiles.zeros((*query.shape[:-1], problem.value_head_dim), operands.query.dtype, operands)
    lse = tiles.zeros((*query.shape[:-1], 1), geometry.accumulator_dtype, operands)
    out, lse = jax.lax.fori_loop(0, geometry.num_steps, attend_step, (out, lse))
    return tiles.from_tiles(geometry, out), tiles.from_tiles(geometry, lse)[..., 0]


def _attend(geometry, step, query, keys, lists, tables):
    """out [items, rows, value_head_dim] and lse [items, rows, 1] of one step, by online softmax over its chunks."""
    query_rows = tiles.read_rows(geometry, step, query).astype(geometry.matmul_dtype)

    def attend_chunk(c, carry):
        row_max, row_sum, acc = carry
        part = tiles.read_chunk(geometry, step, keys, lists, tables, c)
        logits, _ = tiles.scores(geometry, query_rows, part.key, part.key_bias)
        logits = jnp.where(part.visible, logits, -jnp.inf)
        new_max = jnp.maximum(row_max, logits.max(-1, keepdims=True))
        shift = jnp.where(new_max == -jnp.inf, 0, new_max)
        probs = jnp.exp(logits - shift)
        rescale = jnp.exp(row_max - shift)
        row_sum = row_sum * rescale + probs.sum(-1, keepdims=True)
        product = jnp.einsum(
            "irk,ikd->ird",
            probs.astype(geometry.matmul_dtype),
            part.value,
            preferred_element_type=geometry.accumulator_dtype,
        )
        return new_max, row_sum, acc * rescale + product

    stat = jnp.zeros_like(query_rows[..., :1], geometry.accumulator_dtype)
    acc = jnp.broadcast_to(stat, (*stat.shape[:-1], geometry.problem.value_head_dim))
    row_max, row_sum, acc = jax.lax.fori_loop(step.first, step.end, attend_chunk, (stat - jnp.inf, stat, acc))
    out = acc / jnp.where(row_sum == 0, 1, row_sum)
    return out, row_max + jnp.log(row_sum)
