"""The definition of attention over pages, key by key in float64 NumPy; it shares no code with the library."""

import numpy as np


def paged_attention(
    query, key_pages, value_pages, block_tables, seq_lens, page_selection=None, *, selection_block_size=None, scale=None,
    logits_soft_cap=None, local_window_size=None, num_sinks=0, causal_shift=0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """out [batch, q_len, num_q_heads, value_head_dim] and lse [batch, q_len, num_q_heads]; arguments as of the library's op.

    `causal_shift` is a deliberate error, for tests of the tests: keys that many tokens later are visible.
    """
    query, key_pages, value_pages = (np.asarray(x, np.float64) for x in (query, key_pages, value_pages))
    block_tables, seq_lens = np.asarray(block_tables).tolist(), np.asarray(seq_lens).tolist()
    batch, q_len, num_q_heads, head_dim = query.shape
    num_pages, page_size, num_kv_heads, value_head_dim = value_pages.shape
    block_size = page_size if selection_block_size is None else selection_block_size
    window = local_window_size if isinstance(local_window_size, tuple | None) else (local_window_size,) * 2
    left = np.broadcast_to(np.inf if window is None or window[0] is None else window[0], num_q_heads)
    sinks = np.broadcast_to(num_sinks, num_q_heads)
    out, lse = np.zeros((*query.shape[:3], value_head_dim)), np.full(query.shape[:3], -np.inf)
    for b, i, h in np.ndindex(*query.shape[:3]):
        position = max(seq_lens[b], 0) - q_len + i
        listed = None if page_selection is None else list_of(np.asarray(page_selection), b, h, i, num_q_heads)
        logits, values = [], []
        for j in range(min(position + causal_shift + 1, len(block_tables[b]) * page_size)):
            page = block_tables[b][j // page_size]
            is_selected = listed is None or j // block_size in listed
            if 0 <= page < num_pages and is_selected and (j >= position - left[h] or j < sinks[h]):
                n = h // (num_q_heads // num_kv_heads)
                logit = query[b, i, h] @ key_pages[page, j % page_size, n] * (head_dim**-0.5 if scale is None else scale)
                logits.append(logit if logits_soft_cap is None else logits_soft_cap * np.tanh(logit / logits_soft_cap))
                values.append(value_pages[page, j % page_size, n])
        if logits:
            lse[b, i, h] = np.logaddexp.reduce(logits)
            out[b, i, h] = np.exp(np.array(logits) - lse[b, i, h]) @ np.array(values)
    return out, lse


def list_of(page_selection: np.ndarray, b: int, h: int, i: int, num_q_heads: int) -> set[int]:
    """The blocks listed for one query of one head."""
    heads, rows = page_selection.shape[1:3]
    return set(page_selection[b, h * heads // num_q_heads, i if rows > 1 else 0].tolist())


def contiguous(pages: np.ndarray, block_tables: np.ndarray) -> np.ndarray:
    """What tables of real pages mean: [batch, max_pages * page_size, ...]."""
    found = np.asarray(pages)[np.asarray(block_tables)]
    return found.reshape(found.shape[0], -1, *found.shape[3:])


def in_pages(contents: np.ndarray, block_tables: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """`pages` with those of the tables replaced by contents [batch, max_pages * page_size, ...]: the inverse."""
    pages = np.array(pages)
    for b, table in enumerate(np.asarray(block_tables)):
        for logical, physical in enumerate(table):
            pages[physical] = contents[b, logical * pages.shape[1] : (logical + 1) * pages.shape[1]]
    return pages
