"""Time and peak memory of attention, forward and backward, against the length: dense and sparse."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from tqdm import tqdm

import sparse_attn_jax as sa

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 64
# What is expected to take longer or to need more is compiled for its memory and not run.
_MAX_SECONDS = 6.0
_MAX_BYTES = 3 * 2**30
_ANCHOR_DISTANCE = 64

SELECTOR = sa.selectors.InfLLMV2(top_k=8, block_size=64, num_sink_blocks=1, num_local_blocks=2)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One contender at one length."""

    contender: str
    length: int
    seconds: float | None  # None if it was only compiled
    peak_bytes: int


def contenders() -> dict[str, Callable]:
    """Attention functions of query, key and value, by the name that the figure shows."""
    return {
        "dense: jax.nn.dot_product_attention": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
        "dense: this library, every block": lambda q, k, v: sa.sparse_attention(q, k, v, sa.selectors.Dense(), is_causal=True),
        "sparse: InfLLMV2, 8 blocks of 64 per token (selection included)": lambda q, k, v: sa.sparse_attention(
            q, k, v, SELECTOR, is_causal=True
        ),
    }


def measure_scaling(lengths: Sequence[int], seed: int = 0) -> list[Measurement]:
    """Every contender at every length, except where it would take too long: there it is compiled for its memory alone."""
    measurements = []
    attend = contenders()
    expected = dict.fromkeys(attend, 0.0)
    with tqdm(total=len(lengths) * len(attend), desc="scaling", unit=" runs") as bar:
        for length in sorted(lengths):
            for name, function in attend.items():
                bar.set_postfix_str(f"{length} tokens, {name.split(',')[0]}")
                measured = measure(name, function, length, expected[name] > _MAX_SECONDS, seed)
                own = [m.seconds for m in measurements if m.contender == name] + [measured.seconds]
                expected[name] = expect_next(own)
                measurements.append(measured)
                bar.update()
    return measurements


def expect_next(seconds: Sequence[float | None]) -> float:
    """Seconds at the next length if they grow as they did last, at most fourfold; endless after one that was not run."""
    if seconds[-1] is None:
        return math.inf
    return seconds[-1] * min(4.0, seconds[-1] / seconds[-2] if len(seconds) > 1 else 4.0)


def make_inputs(length: int, seed: int) -> list[jax.Array]:
    """Query, key and value. Queries and keys drift along the sequence: neighbours want similar blocks, as they do in text."""
    keys = jax.random.split(jax.random.key(seed), 3)
    num_anchors = length // _ANCHOR_DISTANCE + 2
    position = jnp.arange(length) / _ANCHOR_DISTANCE
    first, weight = position.astype(jnp.int32), (position % 1)[:, None, None]
    inputs = []
    for key, group_size in zip(keys, (NUM_Q_HEADS // NUM_KV_HEADS, 1, 1)):
        anchor_key, noise_key = jax.random.split(key)
        anchors = jax.random.normal(anchor_key, (num_anchors, NUM_KV_HEADS, HEAD_DIM))
        drift = ((1 - weight) * anchors[first] + weight * anchors[first + 1]).repeat(group_size, axis=1)
        inputs.append((drift + 0.25 * jax.random.normal(noise_key, drift.shape))[None])
    return inputs


def measure(name: str, attend: Callable, length: int, is_slow: bool, seed: int) -> Measurement:
    """Gradients of all three inputs at one length: peak memory from the compiler, and the best of up to three times."""
    shapes = jax.eval_shape(lambda: make_inputs(length, seed))
    compiled = jax.jit(jax.grad(lambda *qkv: attend(*qkv).sum(), argnums=(0, 1, 2))).lower(*shapes).compile()
    analysis = compiled.memory_analysis()
    peak_bytes = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    if is_slow or peak_bytes > _MAX_BYTES:
        return Measurement(name, length, None, peak_bytes)
    inputs = make_inputs(length, seed)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - start)
        if sum(times) > _MAX_SECONDS / 4:
            break
    return Measurement(name, length, min(times), peak_bytes)
