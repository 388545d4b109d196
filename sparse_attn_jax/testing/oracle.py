"""The definition of the op in float64 NumPy, on a dense mask. Shares no code with any implementation."""

import numpy as np


def attention_mask(
    indices, *, batch, num_q_heads, q_len, kv_len, q_block_size, kv_block_size, is_causal=False, q_offset=None,
    local_window_size=None, num_sinks=0, query_segment_ids=None, key_value_segment_ids=None, predicate=None):  # fmt: skip
    """Which key each query sees: bool [batch, num_q_heads, q_len, kv_len], from the op's arguments as the caller gave them."""
    j = np.arange(kv_len)
    selected = (np.asarray(indices, np.int64)[..., None] == j // kv_block_size).any(
        axis=-2
    )  # [batch or 1, heads, rows, kv_len]
    selected = selected.repeat(num_q_heads // selected.shape[1], axis=1)[:, :, np.arange(q_len) // q_block_size]
    # Absolute positions, [batch or 1, 1, q_len, 1], and what is per head as [num_q_heads or 1, 1, 1].
    i = np.arange(q_len)[:, None] + np.reshape(kv_len - q_len if q_offset is None else q_offset, (-1, 1, 1, 1))
    left, right = (np.reshape(np.inf if x is None else x, (-1, 1, 1)) for x in local_window_size or (None, None))
    in_window = (j >= i - left) & (j <= i + right)
    visible = selected & (in_window | (j < np.reshape(num_sinks, (-1, 1, 1)))) & ((j <= i) | (not is_causal))
    if query_segment_ids is not None:
        visible = visible & (
            np.asarray(query_segment_ids)[:, None, :, None] == np.asarray(key_value_segment_ids)[:, None, None]
        )
    if predicate is not None:
        visible = visible & np.asarray(predicate(*np.ogrid[:batch, :num_q_heads, :1, :1][:2], i, j))
    return np.broadcast_to(visible, (batch, num_q_heads, q_len, kv_len))


def varlen_mask(
    indices, cu_seqlens_q, cu_seqlens_kv, *, num_q_heads, q_len, kv_len, q_block_size, q_offset=None, predicate=None, **options
):
    """The same for packed sequences, one after another: bool [1, num_q_heads, q_len, kv_len], False across sequences.

    A predicate's batch is the number of the sequence.
    """
    mask, row = np.zeros((1, num_q_heads, q_len, kv_len), bool), 0
    for n in range(len(cu_seqlens_q) - 1):
        q, kv = slice(*cu_seqlens_q[n : n + 2]), slice(*cu_seqlens_kv[n : n + 2])
        lengths = dict(q_len=q.stop - q.start, kv_len=kv.stop - kv.start)
        num_rows = -(-lengths["q_len"] // q_block_size)
        lists = indices[:, :, row : row + num_rows] if indices.shape[0] == 1 else indices[n : n + 1]
        options["q_offset"] = q_offset if np.ndim(q_offset) == 0 else q_offset[n]
        options["predicate"] = predicate and (lambda batch, *where, n=n: predicate(batch + n, *where))
        mask[:, :, q, kv] = attention_mask(
            lists, batch=1, num_q_heads=num_q_heads, q_block_size=q_block_size, **lengths, **options
        )
        row += num_rows
    return mask


def attention(mask, query, key, value, key_bias=None, *, d_out=0.0, d_lse=0.0, scale=None, logits_soft_cap=None):
    """Masked softmax attention, and in closed form the gradients of sum(out * d_out) + sum(lse * d_lse).

    Returns (out, lse, d_query, d_key, d_value, d_key_bias), all float64.
    """
    query, key, value, d_out, d_lse = (np.asarray(x, np.float64) for x in (query, key, value, d_out, d_lse))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group_size = query.shape[2] // key.shape[2]
    k, v = key.repeat(group_size, axis=2), value.repeat(group_size, axis=2)
    scores = np.einsum("bihd,bjhd->bhij", query, k) * scale
    capped = scores if logits_soft_cap is None else logits_soft_cap * np.tanh(scores / logits_soft_cap)
    bias = 0.0 if key_bias is None else np.asarray(key_bias, np.float64).repeat(group_size, axis=1)[:, :, None]
    logits = np.where(mask, capped + bias, -np.inf)
    lse = np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isneginf(lse), 0.0, lse))  # a query that sees nothing: lse -inf, weights 0
    lse = lse[..., 0].swapaxes(1, 2)  # [batch, q_len, num_q_heads]
    out = np.einsum("bhij,bjhd->bihd", weights, v)
    d_out, d_lse = np.broadcast_to(d_out, out.shape), np.broadcast_to(d_lse, lse.shape)
    d_row = (d_lse - (d_out * out).sum(axis=-1)).swapaxes(1, 2)[..., None]
    d_capped = weights * (np.einsum("bihd,bjhd->bhij", d_out, v) + d_row)
    d_scores = d_capped if logits_soft_cap is None else d_capped * (1.0 - (capped / logits_soft_cap) ** 2)

    def ungroup(x):  # [batch, num_q_heads, kv_len, ...] to [batch, num_kv_heads, kv_len, ...]
        return x.reshape(x.shape[0], -1, group_size, *x.shape[2:]).sum(axis=2)

    d_query = np.einsum("bhij,bjhd->bihd", d_scores, k) * scale
    d_key = ungroup(np.einsum("bhij,bihd->bhjd", d_scores, query)).swapaxes(1, 2) * scale
    d_value = ungroup(np.einsum("bhij,bihd->bhjd", weights, d_out)).swapaxes(1, 2)
    d_key_bias = ungroup(d_capped.sum(axis=2))
    return out, lse, d_query, d_key, d_value, d_key_bias
