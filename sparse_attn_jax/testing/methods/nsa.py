"""Native sparse attention: what each branch sees, and the gated sum of the branches with its gradients."""

import numpy as np

from sparse_attn_jax.testing import oracle, selection_oracle


def unit_mask(positions, num_units: int, kernel: tuple[int, int]) -> np.ndarray:
    """Units that end by each query: bool [batch, 1, q_len, num_units]. `positions` are absolute, [batch, q_len]."""
    size, stride = kernel
    mask = np.zeros((*np.shape(positions), num_units), bool)
    for b, i, unit in np.ndindex(mask.shape):
        mask[b, i, unit] = max(range(unit * stride, unit * stride + size)) <= positions[b][i]
    return mask[:, None]


def selected_blocks(query, units, positions, *, kv_len, block_size, kernel, top_k, num_sink_blocks, num_local_blocks):
    """Lists int [batch, num_kv_heads, q_len, top_k], ascending, -1 last, and the scores that they are made from."""
    scores = selection_oracle.score(
        query, units, positions, kv_len=kv_len, block_size=block_size, kernel=kernel, pooling="overlap_sum"
    )
    lists = selection_oracle.select(
        scores, positions, top_k=top_k, block_size=block_size, num_sink_blocks=num_sink_blocks,
        num_local_blocks=num_local_blocks, causal=True,
    )  # fmt: skip
    return lists, scores


def branch_masks(query, units, positions, *, kv_len: int, window_size: int, kernel, **selection) -> dict[str, np.ndarray]:
    """By branch, what each query sees: bool [batch, num_q_heads, q_len, units or keys]."""
    num_q_heads, positions = np.shape(query)[2], np.asarray(positions)
    lists, _ = selected_blocks(query, units, positions, kv_len=kv_len, kernel=kernel, **selection)
    is_listed = (lists[..., None] == np.arange(kv_len) // selection["block_size"]).any(axis=-2)
    is_listed = is_listed.repeat(num_q_heads // is_listed.shape[1], axis=1)
    distance = positions[:, None, :, None] - np.arange(kv_len)
    masks = dict(
        compressed=unit_mask(positions, np.shape(units)[1], kernel),
        selected=is_listed & (distance >= 0),
        window=(distance >= 0) & (distance < window_size),
    )
    return {name: np.broadcast_to(m, (m.shape[0], num_q_heads, *m.shape[2:])) for name, m in masks.items()}


def attention(query, branches, gates, masks, d_out):
    """The gated sum, and the gradients of sum(out * d_out).

    Args:
      branches: by name, (key, value) of each branch.
      gates: by name, [batch, q_len, num_q_heads].
      masks: as `branch_masks` gives them.

    Returns:
      out, d_query, and by name d_key, d_value and d_gate.
    """
    out, d_query, d_branches = 0.0, 0.0, {}
    for name, (key, value) in branches.items():
        gate = np.asarray(gates[name], np.float64)[..., None]
        own, _, d_own_query, d_key, d_value, _ = oracle.attention(masks[name], query, key, value, d_out=gate * d_out)
        out, d_query = out + gate * own, d_query + d_own_query
        d_branches[name] = d_key, d_value, (own * d_out).sum(axis=-1)
    return out, d_query, d_branches
