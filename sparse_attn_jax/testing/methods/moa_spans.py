"""MoA: how many keys a head keeps, and which key each query sees."""

import math

import numpy as np


def span(alpha, beta, prompt_len, max_new_tokens, min_span, multiple) -> int:
    longest = prompt_len + max_new_tokens
    size = min(int(alpha + longest * beta), longest)
    return math.ceil(max(size, min_span) / multiple) * multiple


def mask(spans, offset: int, q_len: int, kv_len: int, num_sinks: int) -> np.ndarray:
    """bool [num_q_heads, q_len, kv_len]: what a cache of so many tokens holds, the leading ones and a ring of the latest."""
    found = np.zeros((len(spans), q_len, kv_len), bool)
    for head, query in np.ndindex(found.shape[:2]):
        seen = list(range(query + offset + 1))
        kept = seen[:num_sinks] + seen[num_sinks:][-(spans[head] - num_sinks) :]
        found[head, query, [key for key in kept if key < kv_len]] = True
    return found
