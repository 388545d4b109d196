"""Block-sparse flash attention, backward, in XLA: the forward's walk, with probabilities recomputed from the lse.

One pass over the query tiles gives all gradients: dK, dV and the bias gradient are added block by block to float32 arrays the
size of K and V. The loop is sequential, so the result is deterministic on a CPU; on a GPU the scatter-add within one step is so
under `--xla_gpu_deterministic_ops`.
"""

import jax
import jax.numpy as jnp

from sparse_attn_jax.implementations.xla import tiles
from sparse_attn_jax.implementations.xla.config import choose_config
from sparse_attn_jax.planning import TilePlan
from sparse_attn_jax.problem import Operands, Problem, TokenMask


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
    """Gradients of the op with respect to `operands`, given those of out and lse."""
    geometry = tiles.make_geometry(problem, plan, choose_config(problem, plan))
    lists = tiles.make_lists(geometry, plan, mask)
    tables = tiles.make_mask_tables(geometry, mask)
    keys = tiles.to_key_blocks(geometry, operands)
    dtype = geometry.accumulator_dtype
    delta = jnp.einsum("bqhd,bqhd->bqh", d_out, out, preferred_element_type=dtype) - d_lse
    rows = tuple(
        tiles.to_tiles(geometry, x, fill)
        for x, fill in ((operands.query, 0), (d_out, 0), (lse[..., None], -jnp.inf), (delta[..., None], 0))
    )

    def add_step(index, carry):
        d_query, d_blocks = carry
        step = tiles.locate(geometry, lists, index)
        d_rows, d_blocks = _backward(geometry, step, rows, keys, lists, tables, d_blocks)
        return tiles.write_rows(step, d_query, d_rows.astype(operands.query.dtype)), d_blocks

    d_query = tiles.zeros(rows[0].shape, operands.query.dtype, operands)
    d_blocks = tiles.zero_gradients(geometry, operands, keys)
    d_query, d_blocks = jax.lax.fori_loop(0, geometry.num_steps, add_step, (d_query, d_blocks))
    d_key, d_value, d_key_bias = (None if x is None else tiles.from_gradient_blocks(geometry, x) for x in d_blocks)
    return Operands(
        query=tiles.from_tiles(geometry, d_query),
        key=d_key.astype(operands.key.dtype),
        value=d_value.astype(operands.value.dtype),
        key_bias=None if d_key_bias is None else jnp.swapaxes(d_key_bias[..., 0], 1, 2).astype(operands.key_bias.dtype),
    )


def _backward(geometry, step, rows, keys, lists, tables, d_blocks):
    """Query gradient [items, rows, head_dim] of one step; its key, value and bias gradients are added to `d_blocks`."""
    query, d_out, lse, delta = (tiles.read_rows(geometry, step, x) for x in rows)
    # A row that saw nothing contributes nothing, whatever its query or cotangent holds.
    seen = lse > -jnp.inf
    query = jnp.where(seen, query, 0).astype(geometry.matmul_dtype)
    d_out = jnp.where(seen, d_out, 0).astype(geometry.matmul_dtype)
    delta = jnp.where(seen, delta, 0)
    # exp(x - inf) is 0 for the rows that saw nothing.
    lse = jnp.where(seen, lse, jnp.inf)

    query_transposed, d_out_transposed = jnp.swapaxes(query, 1, 2), jnp.swapaxes(d_out, 1, 2)

    def matmul(equation, a, b):
        return jnp.einsum(equation, a, b, preferred_element_type=geometry.accumulator_dtype)

    def add_chunk(c, carry):
        d_query, (d_key, d_value, d_key_bias) = carry
        part = tiles.read_chunk(geometry, step, keys, lists, tables, c)
        logits, slope = tiles.scores(geometry, query, part.key, part.key_bias)
        keep = part.visible & seen
        probs = jnp.where(keep, jnp.exp(logits - lse), 0)
        d_probs = matmul("ird,ikd->irk", d_out, part.value)
        d_logits = jnp.where(keep, probs * (d_probs - delta), 0)
        # The slope of a logit that nobody sees may be NaN.
        d_product = (jnp.where(keep, d_logits * slope, 0) * geometry.problem.scale).astype(geometry.matmul_dtype)
        d_query = d_query + matmul("irk,ikd->ird", d_product, part.key)
        d_key = tiles.add_blocks(step, d_key, part.ids, matmul("idr,irk->idk", query_transposed, d_product))
        probs = probs.astype(geometry.matmul_dtype)
        d_value = tiles.add_blocks(step, d_value, part.ids, matmul("idr,irk->idk", d_out_transposed, probs))
        if d_key_bias is not None:
            d_key_bias = tiles.add_blocks(step, d_key_bias, part.ids, d_logits.sum(1, keepdims=True))
        return d_query, [d_key, d_value, d_key_bias]

    d_query = jnp.zeros_like(query, geometry.accumulator_dtype)
    return jax.lax.fori_loop(step.first, step.end, add_chunk, (d_query, d_blocks))
